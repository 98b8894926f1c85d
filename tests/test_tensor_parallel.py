"""Tensor parallel on gloo ranks: layers shared by heads train as they do in one process."""

import contextlib
import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from model_cases import IMAGE, VOCAB, flamingo, open_gates
from rank_cases import met, on_ranks, one_rank_of
from run_cases import config, finish, make_data, metrics, start
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Shard

from flamingo_fast.models.config import ConfigError, FlamingoConfig
from flamingo_fast.models.flamingo import Flamingo
from flamingo_fast.ops.feed_forward import feed_forward
from flamingo_fast.training import tensor_parallel
from flamingo_fast.training.batch import Batch
from flamingo_fast.training.checkpoints import Checkpoints
from flamingo_fast.training.config import OptimizerConfig, ParallelConfig
from flamingo_fast.training.parallel import Ranks, make_ranks, prepare
from flamingo_fast.training.pieces import checkpointable, whole
from flamingo_fast.training.step import TrainStep, split_batch
from flamingo_fast.training.tensor_parallel import fsdp_placement, parallelize

# fp32 sums of two ranks' products, in another order than one process makes them.
LOSS = {"rtol": 1e-5, "atol": 1e-5}
GRADIENT = {"rtol": 1e-3, "atol": 1e-5}
# After steps of 1e-2.
WEIGHT = {"rtol": 1e-3, "atol": 1e-5}
KINDS = ("gated_xattn_dense", "vanilla_xattn", "grafting")
RESAMPLERS = ("perceiver", "transformer", "mlp")


def make_model(kind: str = "gated_xattn_dense", resampler: str = "perceiver") -> Flamingo:
    """All of it but the vision encoder is trained, so that all that is split has gradients."""
    model = open_gates(flamingo("chinchilla", kind, resampler={"kind": resampler}))
    model.lang_model.requires_grad_(True)
    model.vision_encoder.requires_grad_(False)
    return model.train()


def make_batch(rows: int, media: int, seed: int) -> Batch:
    """Rows of 10 tokens, each with `media` images."""
    generator = torch.Generator().manual_seed(seed)
    input_ids = torch.randint(5, VOCAB, (rows, 10), generator=generator)
    input_ids[:, 0 : 4 * media : 4] = IMAGE
    labels = input_ids.masked_fill(input_ids == IMAGE, -100)
    labels[:, 0] = -100
    pixels = torch.randn(rows * media, 1, 3, 8, 8, generator=generator) if media else None
    return Batch(
        input_ids=input_ids,
        labels=labels,
        attention_mask=torch.ones_like(input_ids),
        cu_seqlens=None,
        num_media=[media] * rows,
        attend=None,
        pixels=pixels,
        features=None,
    )


def mixture(step: int) -> dict[str, Batch]:
    return {"pages": make_batch(4, 2, 2 * step), "pairs": make_batch(2, 1, 2 * step + 1)}


def make_step(model: Flamingo, optimisation: str = "accumulation", **options: Any) -> TrainStep:
    # With AdamW's own eps a gradient that is 0 but for rounding, as that of a key's bias is, moves
    # its weight as far as any other.
    optimizer = OptimizerConfig(lr=1e-2, warmup_steps=2, eps=1e-3)
    weights = {"pages": 1.0, "pairs": 0.2}
    return TrainStep(model, optimizer, weights=weights, optimisation=optimisation, **options)


def loss_of(model: Flamingo, batch: Batch) -> torch.Tensor:
    loss = model(
        batch.input_ids, videos=batch.pixels, labels=batch.labels, num_media=batch.num_media
    ).loss
    assert loss is not None
    return loss


def check_same_weights(model: Flamingo, expected: Flamingo) -> None:
    others = dict(expected.named_parameters())
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(
            whole(parameter), others[name], **WEIGHT, msg=lambda text, name=name: f"{name}: {text}"
        )


def _worker(rank: int, world: int, folder: str, checks: tuple[Callable[[str], None], ...]) -> None:
    with met(rank, world, f"{folder}/store"):
        for check in checks:
            check(folder)


def check_on_ranks(world: int, folder: Path, *checks: Callable[[str], None]) -> None:
    """Several checks in the same processes: starting these takes longer than most checks."""
    on_ranks(world, _worker, world, str(folder), checks)


def _mesh() -> DeviceMesh:
    return init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("tp",))


def check_gradients(folder: str) -> None:
    mesh = _mesh()
    for kind, resampler in [(each, "perceiver") for each in KINDS] + [
        (KINDS[0], each) for each in RESAMPLERS[1:]
    ]:
        one = make_model(kind, resampler)
        shared = copy.deepcopy(one)
        parallelize(shared, mesh)
        # The second has no media: what is sent is empty.
        for batch in (make_batch(2, 2, 0), make_batch(2, 0, 1)):
            losses = [loss_of(model, batch) for model in (one, shared)]
            torch.testing.assert_close(*reversed(losses), **LOSS)
            for loss in losses:
                loss.backward()
        _check_gradients(shared, one, f"{kind}, {resampler}")


def _check_gradients(shared: Flamingo, one: Flamingo, case: str) -> None:
    expected, split = dict(one.named_parameters()), set()
    for name, parameter in shared.named_parameters():
        if isinstance(parameter, DTensor):
            split.add(name.rpartition(".layers.")[2].partition(".")[2])
            assert parameter.to_local().numel() * 2 == parameter.numel(), f"{case}: {name}"
        assert torch.equal(whole(parameter), expected[name]), f"{case}: {name}"
        gradient = expected[name].grad
        if gradient is None:
            assert parameter.grad is None, f"{case}: {name}"
            continue
        torch.testing.assert_close(
            whole(parameter.grad),
            gradient,
            **GRADIENT,
            msg=lambda text, name=name: f"{case}: {name}: {text}",
        )
    of_lm = {"to_qkv.weight", "to_position.weight", "to_out.weight", "content_bias"}
    assert {f"self_attn.{each}" for each in of_lm} | {"mlp.1.weight", "mlp.3.weight"} <= split


def check_training(folder: str) -> None:
    for optimisation in ("accumulation", "round_robin"):
        one = make_model()
        shared = copy.deepcopy(one)
        prepare(
            shared, ParallelConfig(tensor_parallel=2, activation_checkpointing=True), "fp32", "cpu"
        )
        steps = make_step(one, optimisation), make_step(shared, optimisation, micro_batch_size=2)
        for number in range(2):
            expected, got = (step(mixture(number)) for step in steps)
            assert got.losses == pytest.approx(expected.losses, rel=1e-4)
            assert got.grad_norm == pytest.approx(expected.grad_norm, rel=1e-4)
        check_same_weights(shared, one)
        check_ranks_agree(shared)


def check_ranks_agree(model: Flamingo) -> None:
    """What is whole on all ranks is the same to the bit: else they would drift apart."""
    own = [each.detach().flatten() for each in model.parameters() if not isinstance(each, DTensor)]
    of_ranks = [torch.empty_like(torch.cat(own)) for _ in range(dist.get_world_size())]
    dist.all_gather(of_ranks, torch.cat(own))
    assert torch.equal(*of_ranks)


def check_training_in_bf16(folder: str) -> None:
    one = make_model()
    shared = copy.deepcopy(one)
    prepare(one, ParallelConfig(), "bf16", "cpu", Ranks(torch.device("cpu")))
    prepare(shared, ParallelConfig(tensor_parallel=2), "bf16", "cpu")
    steps = make_step(one), make_step(shared)
    for number in range(2):
        expected, got = (step(mixture(number)) for step in steps)
        # A bf16 number has 8 bits.
        assert got.losses == pytest.approx(expected.losses, rel=2e-2)
        assert got.grad_norm == pytest.approx(expected.grad_norm, rel=5e-2)
    check_ranks_agree(shared)


def check_checkpoints(folder: str) -> None:
    """What two ranks save one process loads, and the other way round."""
    checkpoints = Checkpoints(f"{folder}/checkpoints")
    shared = make_model()
    parallelize(shared, _mesh())
    step = make_step(shared)
    step(mixture(0))
    checkpoints.save(1, step.state(), {})
    alone = make_step(make_model())
    _load(alone, checkpoints)
    saved, loaded = step.state(), alone.state()
    for key in ("weights", "exp_avg", "exp_avg_sq"):
        for name, tensor in loaded[key].items():
            assert torch.equal(tensor, whole(saved[key][name])), f"{key}: {name}"
    checkpoints.save(2, loaded, {})
    again = make_model()
    parallelize(again, _mesh())
    resumed = make_step(again)
    _load(resumed, checkpoints)
    assert resumed(mixture(1)) == step(mixture(1))
    for (name, got), expected in zip(again.named_parameters(), shared.parameters(), strict=True):
        assert torch.equal(whole(got), whole(expected)), name


def _load(step: TrainStep, checkpoints: Checkpoints) -> None:
    state = step.state()
    checkpoints.load(state)
    step.load(state)


@pytest.mark.slow
def test_two_ranks_do_what_one_process_does(tmp_path):
    checks = (check_gradients, check_training, check_training_in_bf16, check_checkpoints)
    check_on_ranks(2, tmp_path, *checks)


@contextlib.contextmanager
def fake_mesh(*sizes: int) -> Iterator[DeviceMesh]:
    """A mesh as one of its ranks sees it, without the others."""
    world = torch.Size(sizes).numel()
    with one_rank_of(world, rank=world - 1):
        yield init_device_mesh("cpu", sizes, mesh_dim_names=("dp", "tp")[-len(sizes) :])


def test_the_paper_s_80b_model_is_split_over_16_ranks():
    model = Flamingo(FlamingoConfig.preset("flamingo-80b"), device="meta", dtype=torch.bfloat16)
    parts = {name: sum(each.numel() for each in part.parameters()) for name, part in _parts(model)}
    with fake_mesh(16) as mesh:
        parallelize(model, mesh)
        for name, parameter in model.named_parameters():
            if isinstance(parameter, DTensor):
                assert parameter.to_local().numel() * 16 == parameter.numel(), name
        of_rank = {name: _local_numel(part) for name, part in _parts(model)}
    # Embedding and vision encoder are whole.
    assert of_rank["lang_model"] - 32_000 * 8192 < parts["lang_model"] / 15.9
    assert of_rank["conditioning"] < parts["conditioning"] / 15.9
    assert of_rank["resampler"] < parts["resampler"] / 11
    # In bf16, and of what is trained fp32 weights, gradients and two moments beside.
    trained = _local_numel(model, lambda each: each.requires_grad)
    frozen = _local_numel(model, lambda each: not each.requires_grad)
    assert 2 * frozen < 10.2e9 and 18 * trained < 11.3e9


def _parts(model: nn.Module) -> list[tuple[str, nn.Module]]:
    return [*model.named_children()]


def _local_numel(
    part: nn.Module, is_counted: Callable[[torch.Tensor], bool] = lambda _: True
) -> int:
    return sum(
        (each.to_local() if isinstance(each, DTensor) else each).numel()
        for each in part.parameters()
        if is_counted(each)
    )


@pytest.mark.parametrize(
    ("lm", "field", "got"),
    [
        ({}, "lm.heads", 4),
        ({"heads": 16, "dim_head": 2}, "conditioning.heads", 2),
        ({"heads": 16, "dim_head": 2, "ff_mult": 0.75}, "lm.ff_mult", 24),
    ],
)
def test_what_the_ranks_do_not_divide_is_refused_by_name(lm, field, got):
    model = flamingo("chinchilla", lm=lm)
    parameters = [*model.parameters()]
    match = rf"{field}: expected .* that parallel.tensor_parallel = 16 divides, got {got}"
    with fake_mesh(16) as mesh, pytest.raises(ConfigError, match=match):
        parallelize(model, mesh)
    assert all(one is other for one, other in zip(parameters, model.parameters(), strict=True))


def test_widths_that_fsdp_can_not_share_are_refused_by_name():
    model = flamingo("chinchilla")
    with fake_mesh(2) as mesh:
        parallelize(model, mesh)
        weight = model.lang_model.layers[0].self_attn.to_qkv.weight
        assert fsdp_placement(weight, size=4) == Shard(1)
        with pytest.raises(ConfigError, match="divide the widths .* got 3 and a width of 32"):
            fsdp_placement(weight, size=3)
        assert fsdp_placement(model.lang_model.layers[0].self_attn.to_out.weight, size=3) is None


def test_what_is_not_ours_to_split_is_refused_by_name():
    class LoRA(nn.Linear):
        pass

    model = flamingo("chinchilla")
    model.conditioning.blocks[1].attn.to_q.__class__ = LoRA
    with fake_mesh(2) as mesh:
        with pytest.raises(ConfigError, match="got GPT2LMHeadModel"):
            parallelize(flamingo("gpt2"), mesh)
        with pytest.raises(ConfigError, match=r"blocks.1.attn.to_q: .* got LoRA, Parameter"):
            parallelize(model, mesh)
        model = flamingo("chinchilla")
        parallelize(model, mesh)
        with pytest.raises(ValueError, match="model: .* whole"):
            parallelize(model, mesh)
    with fake_mesh(2, 2) as mesh, pytest.raises(ValueError, match="mesh: expected one dimension"):
        parallelize(flamingo("chinchilla"), mesh)


def test_one_rank_has_all_of_it():
    model = flamingo("chinchilla")
    with fake_mesh(1) as mesh:
        parallelize(model, mesh)
    assert not any(isinstance(each, DTensor) for each in model.parameters())


def test_fused_feed_forwards_stay_fused(monkeypatch):
    calls = []

    def seen(*args: Any, **options: Any) -> torch.Tensor:
        calls.append([type(each) for each in args if each is not None])
        return feed_forward(*args, **options)

    monkeypatch.setattr(tensor_parallel, "feed_forward", seen)
    model = make_model()
    with fake_mesh(2) as mesh:
        parallelize(model, mesh)
        loss_of(model, make_batch(2, 1, 0)).backward()
        model.conditioning.blocks[0].ff[1].register_forward_hook(lambda *_: None)
        assert not model.conditioning.blocks[0].ff.is_plain()
    # Of 4 layers, 4 blocks and 2 layers of the resampler.
    assert len(calls) == 10 and all(each is torch.Tensor for types in calls for each in types)


def test_pieces_are_only_for_checkpoints():
    with fake_mesh(2) as mesh:
        model = flamingo("chinchilla")
        parallelize(model, mesh)
        attn = model.lang_model.layers[0].self_attn
        assert checkpointable(attn.to_out.weight) is attn.to_out.weight
        pieces = checkpointable(attn.to_qkv.weight)
        assert pieces.shape == attn.to_qkv.weight.shape
        with pytest.raises(NotImplementedError, match="to be saved"):
            pieces + 1


def check_training_with_fsdp(folder: str) -> None:
    parallel = ParallelConfig(tensor_parallel=2)
    ranks = make_ranks(parallel, "cpu")
    one, alone = make_model(), make_model()
    shared = copy.deepcopy(one)
    prepare(shared, parallel, "fp32", "cpu", ranks)
    steps = make_step(one), make_step(shared, dp_group=ranks.dp_group)
    for number in range(2):
        batches = mixture(number)
        own = {
            name: [*split_batch(each, each.num_rows // 2)][ranks.dp_rank]
            for name, each in batches.items()
        }
        expected, got = steps[0](batches), steps[1](own)
        assert got.loss_tokens == expected.loss_tokens
        assert got.losses == pytest.approx(expected.losses, rel=1e-4)
        assert got.grad_norm == pytest.approx(expected.grad_norm, rel=1e-4)
    check_same_weights(shared, one)
    checkpoints = Checkpoints(f"{folder}/checkpoints")
    checkpoints.save(2, steps[1].state(), {})
    loaded = make_step(alone)
    _load(loaded, checkpoints)
    for (name, got), expected in zip(alone.named_parameters(), shared.parameters(), strict=True):
        assert torch.equal(got, whole(expected)), name


@pytest.mark.slow
def test_two_times_two_ranks_with_fsdp_do_so_too(tmp_path):
    check_on_ranks(4, tmp_path, check_training_with_fsdp)


@pytest.mark.slow
def test_a_run_goes_on_on_ranks_that_share_layers(tmp_path):
    """As it would have in one process: packed rows, frozen parts, learnt tokens and all."""
    make_data(tmp_path)
    alone, shared = tmp_path / "alone", tmp_path / "shared"
    runs = [
        (1, config(tmp_path, alone)),
        (1, config(tmp_path, shared, steps=2)),
        (2, config(tmp_path, shared, parallel={"tensor_parallel": 2})),
    ]
    for ranks, values in runs:
        assert finish(start(values, ranks=ranks)) == [0] * ranks
    lines = [*zip(metrics(shared), metrics(alone), strict=True)]
    assert len(lines) == 3
    for line, expected in lines:
        assert line.pop("loss") == pytest.approx(expected.pop("loss"), rel=1e-4)
        assert line.pop("grad_norm") == pytest.approx(expected.pop("grad_norm"), rel=1e-4)
        assert line == expected
    got, expected = (Flamingo.from_pretrained(each / "model") for each in (shared, alone))
    check_same_weights(got, expected)
