"""Two ranks train as one process does, by FSDP2 or with whole copies.

Tolerances, after two steps, of one process that computes each op's reference. In fp32, relative:
losses 1e-6, gradients' norms 1e-5; weights 1e-4 of the learning rate times the updates. What was
seen is a tenth of that. In bf16: 1e-2, 5e-2, and a half.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from model_cases import IMAGE, VOCAB, flamingo, open_gates
from rank_cases import free_port, met, on_ranks
from torch.distributed.tensor import DTensor

from flamingo_fast.models.config import ConfigError
from flamingo_fast.models.flamingo import Flamingo
from flamingo_fast.training.batch import Batch
from flamingo_fast.training.config import OptimizerConfig, ParallelConfig
from flamingo_fast.training.parallel import Ranks, init_distributed, make_ranks, prepare
from flamingo_fast.training.step import StepResult, TrainStep, split_batch

WORLD = 2
# eps: see test_train_step.py.
OPTIMIZER = OptimizerConfig(lr=1e-2, warmup_steps=2, eps=1e-3)
WEIGHTS = {"web": 1.0, "pairs": 0.2}


@dataclasses.dataclass(frozen=True)
class Case:
    """A model, and how it is trained.

    Attributes:
        model: arguments of `flamingo`.
        frames: of each medium of a row; several numbers: of each row in turn.
        text_only: which rows of a batch have no media.
        is_packed: whether rows hold two documents, of 4 tokens.
        has_features: whether batches have features in place of pixels.
    """

    model: dict[str, Any]
    optimisation: str = "accumulation"
    parallel: ParallelConfig = ParallelConfig()
    precision: str = "fp32"
    micro_batch_size: int | None = None
    frames: tuple[int, ...] = (1,)
    text_only: tuple[int, ...] = ()
    unfreeze_vision: bool = False
    is_packed: bool = False
    has_features: bool = False


class ScaledEncoder(torch.nn.Module):
    """With a scalar, as NFNets have it."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(4)
        self.convolution = torch.nn.Conv2d(3, 12, 4, stride=4)
        self.gain = torch.nn.Parameter(torch.tensor(0.7))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (self.convolution(x) * self.gain).flatten(2).mT


GATED = {"family": "chinchilla"}
SCALED = {**GATED, "encoder": ScaledEncoder}
CHECKPOINTING = ParallelConfig(activation_checkpointing=True)
WHOLE = ParallelConfig(fsdp=False)
CASES = {
    "accumulation": Case(GATED),
    "round_robin": Case(GATED, "round_robin"),
    "checkpointing": Case(GATED, parallel=CHECKPOINTING, text_only=(2, 3)),
    "whole_copies": Case(GATED, parallel=WHOLE, micro_batch_size=1),
    "whole_copies_bf16": Case(GATED, parallel=WHOLE, precision="bf16"),
    "bf16": Case(GATED, precision="bf16"),
    "grafting": Case(
        {**GATED, "kind": "grafting"}, parallel=ParallelConfig(reshard_after_forward=False)
    ),
    "vanilla": Case({**GATED, "kind": "vanilla_xattn"}, "round_robin", micro_batch_size=1),
    "tied_head_and_learnt_tokens": Case(
        {"family": "gpt2", "learnt_token_ids": (4, VOCAB)}, parallel=CHECKPOINTING
    ),
    "head_of_its_own_and_learnt_tokens": Case({"family": "llama", "learnt_token_ids": (4,)}),
    "trained_language_model": Case({**GATED, "lm": {"is_frozen": False}}),
    "text_only_rank_and_trained_vision": Case(GATED, text_only=(0, 1), unfreeze_vision=True),
    "text_only_rank_and_features": Case(
        GATED, micro_batch_size=1, text_only=(0, 1), is_packed=True, has_features=True
    ),
    "scalars": Case(SCALED, unfreeze_vision=True),
    "scalars_bf16": Case(SCALED, precision="bf16", unfreeze_vision=True),
    "frozen_scalars_bf16": Case(SCALED, precision="bf16"),
    "videos_of_other_lengths": Case(GATED, frames=(1, 1, 2, 3), unfreeze_vision=True),
}


def make_batch(case: Case, seed: int, rows: int = 4) -> Batch:
    """Rows with two media each, but those of text alone."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(5, VOCAB, (rows, 8), generator=generator)
    for row in range(rows):
        if row not in case.text_only:
            ids[row, 0] = ids[row, 4] = IMAGE
    labels = ids.masked_fill(ids == IMAGE, -100)
    # The ranks predict different numbers of tokens.
    labels[0, 4:] = -100
    num_media = [0 if row in case.text_only else 2 for row in range(rows)]
    shape = (4, 12) if case.has_features else (3, 8, 8)
    media = [
        torch.randn(case.frames[row % len(case.frames)], *shape, generator=generator)
        for row, count in enumerate(num_media)
        for _ in range(count)
    ]
    batch = Batch(ids, labels, torch.ones_like(ids), None, num_media, None, media, None)
    if case.has_features:
        batch.pixels, batch.features = None, media
    if case.is_packed:
        labels[:, [0, 4]] = -100
        batch.attention_mask = None
        batch.cu_seqlens = torch.arange(0, rows * 8 + 1, 4, dtype=torch.int32)
        batch.num_media = [count // 2 for count in num_media for _ in range(2)]
        batch.attend = ["next", "previous"] * rows
    return batch


def make_batches(case: Case, step: int) -> dict[str, Batch]:
    return {"web": make_batch(case, step), "pairs": make_batch(case, 100 + step)}


def make_model(case: Case) -> Flamingo:
    arguments = dict(case.model)
    # One of each model's own.
    if isinstance(arguments.get("encoder"), type):
        arguments["encoder"] = arguments["encoder"]()
    model = open_gates(flamingo(**arguments))
    if case.unfreeze_vision:
        model.vision_encoder.freeze(False)
    return model


def make_step(case: Case, model: Flamingo, group: dist.ProcessGroup | None = None) -> TrainStep:
    return TrainStep(
        model,
        OPTIMIZER,
        weights=WEIGHTS,
        optimisation=case.optimisation,
        micro_batch_size=case.micro_batch_size,
        dp_group=group,
    )


def rows_of(batches: dict[str, Batch], rank: int) -> dict[str, Batch]:
    return {name: list(split_batch(batch, 2))[rank] for name, batch in batches.items()}


def whole(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor.detach()


def train_sharded(case: Case, rank: int) -> tuple[TrainStep, list[StepResult]]:
    model = make_model(case)
    ranks = prepare(model, case.parallel, case.precision, "cpu")
    assert (ranks.dp_rank, ranks.dp_size) == (rank, WORLD)
    step = make_step(case, model, ranks.dp_group)
    return step, [step(rows_of(make_batches(case, index), rank)) for index in range(2)]


def train_alone(case: Case) -> tuple[TrainStep, list[StepResult]]:
    """With the reference of each op, in one process."""
    model = make_model(case)
    for module in model.modules():
        if hasattr(module, "impl"):
            module.impl = "reference"
    alone = dataclasses.replace(case.parallel, activation_checkpointing=False)
    prepare(model, alone, case.precision, "cpu", Ranks(torch.device("cpu")))
    step = make_step(case, model)
    return step, [step(make_batches(case, index)) for index in range(2)]


def check_case(name: str, rank: int) -> None:
    case = CASES[name]
    sharded, results = train_sharded(case, rank)
    alone, expected = train_alone(case)
    is_narrow = case.precision == "bf16"
    for one, other in zip(results, expected, strict=True):
        assert one.losses == pytest.approx(other.losses, rel=1e-2 if is_narrow else 1e-6), name
        assert one.grad_norm == pytest.approx(other.grad_norm, rel=5e-2 if is_narrow else 1e-5)
        assert one.loss_tokens == other.loss_tokens
        assert one.skipped == 0
    updates = sharded.updates
    assert updates == alone.updates
    own, others = sharded.state()["weights"], alone.state()["weights"]
    assert list(own) == list(others)
    for key, weight in own.items():
        assert weight.dtype == torch.float32
        is_shared = case.parallel.fsdp and weight.dim() > 0
        assert isinstance(weight, DTensor) == is_shared, f"{name}: {key}"
        atol = (0.5 if is_narrow else 1e-4) * OPTIMIZER.lr * updates
        torch.testing.assert_close(
            whole(weight), others[key], rtol=0, atol=atol, msg=f"{name}: {key}"
        )
    for key, parameter in sharded.model.named_parameters():
        assert parameter.grad is None, key
        if not parameter.requires_grad:
            expected_bits = dict(alone.model.named_parameters())[key]
            assert parameter.dtype == (torch.bfloat16 if is_narrow else torch.float32)
            assert torch.equal(whole(parameter), expected_bits), f"{name}: {key} is frozen"


def _worker(rank: int, store: str, check: Callable[..., None], arguments: tuple[Any, ...]) -> None:
    with met(rank, WORLD, store):
        for argument in arguments:
            check(argument, rank)


def on_two_ranks(tmp_path: Any, check: Callable[..., None], *arguments: Any) -> None:
    on_ranks(WORLD, _worker, str(tmp_path / "store"), check, arguments)


# All in the same processes: most of the time is that of their imports.
@pytest.mark.slow
def test_two_ranks_train_as_one(tmp_path):
    on_two_ranks(tmp_path, check_case, *CASES)


def check_skipping(name: str, rank: int) -> None:
    """What is not finite on one rank is skipped on both."""
    case = CASES[name]
    model = make_model(case)
    ranks = prepare(model, case.parallel, case.precision, "cpu")
    step = make_step(case, model, ranks.dp_group)
    for index in range(3):
        before = {name: whole(each).clone() for name, each in step.state()["weights"].items()}
        batches = rows_of(make_batches(case, index), rank)
        if index == 1 and rank == 1:
            batches["web"].pixels[0][0, 0, 0, 0] = math.nan
        result = step(batches)
        same = [
            torch.equal(whole(each), before[key]) for key, each in step.state()["weights"].items()
        ]
        if index == 1:
            assert result.skipped == 1 and math.isnan(result.losses["web"]) and all(same)
        else:
            assert result.skipped == 0 and not any(same)
    assert (step.updates, step.skipped) == (2, 1)


def check_refusal(name: str, rank: int) -> None:
    """Ranks that would wait for each other for good say so."""
    case = dataclasses.replace(CASES[name], micro_batch_size=1)
    model = make_model(case)
    ranks = prepare(model, case.parallel, case.precision, "cpu")
    step = make_step(case, model, ranks.dp_group)
    for batches in (
        {"web": make_batch(case, 0, rows=1 + rank)},
        {("web", "pairs")[rank]: make_batch(case, 0)},
    ):
        with pytest.raises(ValueError, match="batches: expected as many rows of each dataset"):
            step(batches)


class NormedEncoder(torch.nn.Sequential):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x).flatten(2).mT


def check_statistics(rank: int) -> None:
    """The ranks saw other rows, and have the same statistics: a checkpoint has those of one."""
    torch.manual_seed(3)
    encoder = NormedEncoder(torch.nn.Conv2d(3, 12, 4, stride=4), torch.nn.BatchNorm2d(12))
    case = Case({**GATED, "encoder": encoder}, precision="bf16", unfreeze_vision=True)
    sharded, _ = train_sharded(case, rank)
    mean = sharded.state()["weights"]["vision_encoder.model.1.running_mean"]
    of_ranks = [torch.empty_like(mean) for _ in range(WORLD)]
    dist.all_gather(of_ranks, mean)
    assert mean.any() and torch.equal(*of_ranks)


def save_case(name: str, folder: Path, rank: int) -> None:
    case = CASES[name]
    sharded, _ = train_sharded(case, rank)
    model = make_model(case)
    other = make_step(case, model, prepare(model, case.parallel, case.precision, "cpu").dp_group)
    other.load(sharded.state())
    of_other = other.state()["weights"]
    for key, weight in sharded.state()["weights"].items():
        assert torch.equal(whole(weight), whole(of_other[key])), key
    dcp.save(sharded.state(), checkpoint_id=folder)
    result = sharded(rows_of(make_batches(case, 2), rank))
    if rank == 0:
        torch.save(dataclasses.asdict(result), f"{folder}.result")


@pytest.mark.slow
def test_two_ranks_agree_on_what_to_skip_and_refuse(tmp_path):
    on_two_ranks(tmp_path, check_all, ("accumulation", tmp_path / "saved"))
    # One process goes on from where two were.
    case = CASES["accumulation"]
    model = make_model(case)
    prepare(model, case.parallel, case.precision, "cpu")
    step = make_step(case, model)
    state = step.state()
    dcp.load(state, checkpoint_id=tmp_path / "saved")
    step.load(state)
    assert (step.steps, step.updates) == (2, 2)
    result, expected = step(make_batches(case, 2)), torch.load(tmp_path / "saved.result")
    assert result.losses == pytest.approx(expected["losses"], rel=1e-6)
    assert result.grad_norm == pytest.approx(expected["grad_norm"], rel=1e-5)


def check_all(name_and_folder: tuple[str, Path], rank: int) -> None:
    name, folder = name_and_folder
    check_skipping(name, rank)
    check_skipping("whole_copies_bf16", rank)
    check_refusal(name, rank)
    check_statistics(rank)
    save_case(name, folder, rank)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["gated_xattn_dense", "vanilla_xattn"])
def test_compiled_layers(kind, monkeypatch):
    # The compiler of kernels is not ours to test, and takes a minute.
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    torch.compiler.reset()
    results = []
    for parallel in (ParallelConfig(), ParallelConfig(compile=True, activation_checkpointing=True)):
        case = Case({**GATED, "kind": kind}, parallel=parallel)
        model = make_model(case)
        prepare(model, parallel, case.precision, "cpu")
        step = make_step(case, model)
        results.append([step(make_batches(case, index)) for index in range(2)])
    for one, other in zip(*results, strict=True):
        assert one.losses == pytest.approx(other.losses, rel=1e-6)
        assert one.grad_norm == pytest.approx(other.grad_norm, rel=1e-5)


def test_master_weights_are_those_before_rounding():
    case = Case({"family": "gpt2", "learnt_token_ids": (4,)}, precision="bf16")
    model, before = make_model(case), dict(make_model(case).named_parameters())
    ranks = prepare(model, case.parallel, case.precision, "cpu")
    assert ranks == Ranks(torch.device("cpu")) and ranks.dp_group is None
    weights = make_step(case, model).state()["weights"]
    for name, parameter in model.named_parameters():
        assert parameter.dtype == torch.bfloat16
        assert torch.equal(parameter, before[name].bfloat16())
        assert parameter.requires_grad == (name in weights)
    assert all(torch.equal(weight, before[name]) for name, weight in weights.items())
    head = model.lang_model.get_output_embeddings()
    assert head.weight is model.lang_model.get_input_embeddings().weight


def test_wrong_fields_are_named():
    model = make_model(CASES["accumulation"])
    for error, call in (
        ("precision: expected one of", lambda: prepare(model, ParallelConfig(), "fp16", "cpu")),
        (
            "parallel.tensor_parallel: expected a divisor of the 1 processes, got 2",
            lambda: make_ranks(ParallelConfig(tensor_parallel=2), "cpu"),
        ),
        ("device: expected a device of PyTorch, got 'gpu'", lambda: init_distributed("gpu")),
    ):
        with pytest.raises(ConfigError, match=f"^{error}"):
            call()


def test_processes_that_torchrun_started(monkeypatch):
    assert init_distributed("cpu") == torch.device("cpu") and not dist.is_initialized()
    values = {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 1, "MASTER_ADDR": "localhost"}
    for name, value in {**values, "MASTER_PORT": free_port()}.items():
        monkeypatch.setenv(name, str(value))
    try:
        assert init_distributed("cpu") == torch.device("cpu")
        assert dist.get_world_size() == 1
        assert make_ranks(ParallelConfig(), "cpu") == Ranks(torch.device("cpu"))
    finally:
        dist.destroy_process_group()
