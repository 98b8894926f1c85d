"""TrainStep in one process: mixtures, micro batches, precision, what is not finite, its state."""

import copy
import math

import pytest
import torch
from model_cases import IMAGE, VOCAB, flamingo, open_gates

from flamingo_fast.models.flamingo import Flamingo
from flamingo_fast.training.batch import Batch
from flamingo_fast.training.config import OptimizerConfig, ParallelConfig
from flamingo_fast.training.optimizer import global_norm, warm_up
from flamingo_fast.training.parallel import prepare
from flamingo_fast.training.step import TrainStep, split_batch
from flamingo_fast.training.throughput import documents_of

# With AdamW's own eps a gradient that is 0 but for rounding, as that of a key's bias is, moves its
# weight as far as any other.
OPTIMIZER = OptimizerConfig(lr=1e-2, warmup_steps=2, eps=1e-3)
WEIGHTS = {"web": 1.0, "pairs": 0.2}


def make_batch(rows: int, seed: int, length: int = 8) -> Batch:
    """Rows with two media each."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(5, VOCAB, (rows, length), generator=generator)
    ids[:, 0] = ids[:, 4] = IMAGE
    labels = ids.masked_fill(ids == IMAGE, -100)
    # Datasets and micro batches whose mean of means is not the mean.
    labels[0, length // 2 :] = -100
    pixels = torch.randn(2 * rows, 1, 3, 8, 8, generator=generator)
    mask = torch.ones_like(ids)
    return Batch(ids, labels, mask, None, [2] * rows, None, pixels, None)


def make_batches(step: int) -> dict[str, Batch]:
    return {"web": make_batch(2, step), "pairs": make_batch(4, 100 + step)}


def make_model(**options: object) -> Flamingo:
    return open_gates(flamingo("chinchilla", **options))


def weights_of(model: Flamingo) -> dict[str, torch.Tensor]:
    return {name: each.detach().clone() for name, each in model.named_parameters()}


def mean_loss(model: Flamingo, batch: Batch) -> torch.Tensor:
    return model(
        batch.input_ids,
        videos=batch.pixels,
        attention_mask=batch.attention_mask,
        labels=batch.labels,
        num_media=batch.num_media,
    ).loss


@pytest.mark.parametrize("optimisation", ["accumulation", "round_robin"])
def test_it_is_adamw_of_weighted_gradients(optimisation):
    model, expected = make_model(), make_model()
    step = TrainStep(model, OPTIMIZER, weights=WEIGHTS, optimisation=optimisation)
    decays = {True: 0.0, False: 0.1}
    trainable = [(name, each) for name, each in expected.named_parameters() if each.requires_grad]
    optimizer = torch.optim.AdamW(
        [
            {
                "params": [each for name, each in trainable if ("resampler." in name) == is_it],
                "weight_decay": decay,
            }
            for is_it, decay in decays.items()
        ],
        lr=1e-2,
        eps=1e-3,
    )
    for index in range(3):
        batches = make_batches(index)
        result = step(batches)
        for group in optimizer.param_groups:
            group["lr"] = [5e-3, 1e-2, 1e-2][index]
        updates = [["web", "pairs"]] if optimisation == "accumulation" else [["web"], ["pairs"]]
        for names in updates:
            for name in names:
                loss = mean_loss(expected, batches[name])
                assert result.losses[name] == pytest.approx(loss.item(), rel=1e-5)
                (WEIGHTS[name] * loss).backward()
            torch.nn.utils.clip_grad_norm_(expected.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
    for (name, one), other in zip(model.named_parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5, msg=name)
    assert result.loss_tokens == {"web": 9, "pairs": 21}
    assert step.updates == 3 * len(updates)


def test_frozen_weights_keep_their_bits_and_get_no_gradients():
    model = make_model()
    before = weights_of(model)
    TrainStep(model, OPTIMIZER, weights=WEIGHTS)(make_batches(0))
    for name, parameter in model.named_parameters():
        assert parameter.grad is None
        assert torch.equal(parameter, before[name]) != parameter.requires_grad, name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_micro_batches_change_nothing(dtype):
    models = [make_model().to(dtype) for _ in range(2)]
    steps = [
        TrainStep(model, OPTIMIZER, weights=WEIGHTS, micro_batch_size=size)
        for model, size in zip(models, (None, 1), strict=True)
    ]
    tolerance = 1e-4 if dtype == torch.float32 else 2e-2
    for index in range(2):
        whole, split = (step(make_batches(index)) for step in steps)
        assert whole.losses == pytest.approx(split.losses, rel=tolerance)
        assert whole.grad_norm == pytest.approx(split.grad_norm, rel=tolerance)
        assert whole.loss_tokens == split.loss_tokens


def test_master_weights_keep_updates_that_bf16_would_lose():
    model = make_model().bfloat16()
    # Below half the distance of bf16 numbers around most weights.
    step = TrainStep(model, OptimizerConfig(lr=1e-5, warmup_steps=0), weights=WEIGHTS)
    name = "resampler.latents"
    start = step.state()["weights"][name].clone()
    for index in range(3):
        step(make_batches(index))
    end = step.state()["weights"][name]
    assert end.dtype == torch.float32
    assert (end != start).all()
    parameter = dict(model.named_parameters())[name]
    assert torch.equal(parameter, end.bfloat16())
    assert (parameter == start.bfloat16()).float().mean() > 0.5


@pytest.mark.parametrize("what", ["loss", "gradient"])
@pytest.mark.parametrize("optimisation", ["accumulation", "round_robin"])
def test_an_update_that_is_not_finite_is_skipped_and_counted(what, optimisation):
    model = make_model()
    step = TrainStep(model, OPTIMIZER, weights=WEIGHTS, optimisation=optimisation)
    step(make_batches(0))
    before = copy.deepcopy(step.state())
    batches = make_batches(1)
    handle = None
    if what == "loss":
        batches["web"].pixels[0, 0, 0, 0, 0] = math.nan
    else:
        # Of both datasets: their losses are finite.
        handle = model.resampler.latents.register_hook(lambda gradient: gradient * math.inf)
    result = step(batches)
    if handle is not None:
        handle.remove()
    is_one_good = what == "loss" and optimisation == "round_robin"
    expected = 2 if what == "gradient" and optimisation == "round_robin" else 1
    assert (result.skipped, step.skipped) == (expected, expected)
    assert not math.isfinite(result.grad_norm)
    after = step.state()
    for key in ("weights", "exp_avg", "exp_avg_sq"):
        same = [torch.equal(after[key][name], before[key][name]) for name in before[key]]
        assert not any(same) if is_one_good else all(same)
    assert step.updates == before["counters"][1] + is_one_good
    assert step(make_batches(2)).skipped == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_from_its_state_it_goes_on_as_it_would_have(dtype):
    steps = [
        TrainStep(make_model().to(dtype), OPTIMIZER, weights=WEIGHTS, seed=3) for _ in range(2)
    ]
    steps[0](make_batches(0))
    steps[0](make_batches(1))
    # As a checkpoint is loaded: in place, into the state of a step that made no update yet.
    state, saved = steps[1].state(), copy.deepcopy(steps[0].state())
    for key in ("weights", "exp_avg", "exp_avg_sq"):
        for name in state[key]:
            state[key][name].copy_(saved[key][name])
    state["counters"].copy_(saved["counters"])
    steps[1].load(state)
    assert steps[1].updates == 2
    for index in (2, 3):
        assert steps[0](make_batches(index)) == steps[1](make_batches(index))
    for one, other in zip(steps[0].model.parameters(), steps[1].model.parameters(), strict=True):
        assert torch.equal(one, other)


class NormedEncoder(torch.nn.Module):
    """With batch norm, whose statistics a forward changes."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = torch.nn.Sequential(
            torch.nn.Conv2d(3, 12, 4, stride=4), torch.nn.BatchNorm2d(12), torch.nn.Flatten(2)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layers(x).mT


def test_states_hold_buffers_of_trained_parts():
    model = make_model(encoder=NormedEncoder())
    name = "vision_encoder.model.layers.1.running_mean"
    assert name not in TrainStep(model, OPTIMIZER, weights=WEIGHTS).state()["weights"]
    model.vision_encoder.freeze(False)
    step = TrainStep(model, OPTIMIZER, weights=WEIGHTS)
    step(make_batches(0))
    assert step.state()["weights"][name].abs().sum() > 0


@pytest.mark.parametrize("optimisation", ["accumulation", "round_robin"])
def test_a_skipped_update_leaves_batch_norm_as_it_was(optimisation):
    model = make_model(encoder=NormedEncoder())
    model.vision_encoder.freeze(False)
    step = TrainStep(model, OPTIMIZER, weights=WEIGHTS, optimisation=optimisation)
    step(make_batches(0))
    before = {name: each.clone() for name, each in model.named_buffers()}
    batches = make_batches(1)
    batches["web"].pixels[0, 0, 0, 0, 0] = math.nan
    assert step(batches).skipped == 1
    for name, buffer in model.named_buffers():
        assert buffer.isfinite().all(), name
        if name.endswith("running_mean"):
            assert torch.equal(buffer, before[name]) == (optimisation == "accumulation")


@pytest.mark.parametrize("is_frozen", [True, False])
def test_batch_norm_in_bf16(is_frozen):
    model = make_model(encoder=NormedEncoder())
    model.vision_encoder.freeze(is_frozen)
    prepare(model, ParallelConfig(), "bf16", "cpu")
    result = TrainStep(model, OPTIMIZER, weights=WEIGHTS)(make_batches(0))
    assert result.skipped == 0


def test_datasets_without_anything_to_predict_are_left_out():
    batches = make_batches(0)
    batches["pairs"].labels.fill_(-100)
    step = TrainStep(make_model(), OPTIMIZER, weights=WEIGHTS, optimisation="round_robin")
    result = step(batches)
    assert result.losses["pairs"] == 0.0 and result.loss_tokens["pairs"] == 0
    assert (step.updates, step.skipped) == (1, 0)
    batches["web"].labels.fill_(-100)
    assert step(batches).grad_norm == 0.0
    assert step.updates == 1


def test_packed_batches_are_split_by_documents():
    batch = make_batch(2, 0)
    packed = Batch(
        batch.input_ids,
        batch.labels,
        None,
        # The second has no tokens; the last is padding.
        torch.tensor([0, 3, 3, 8, 14, 16], dtype=torch.int32),
        [1, 0, 1, 2, 0],
        ["next", "next", "previous", "previous", "previous"],
        [torch.full((1, 3, 8, 8), float(index)) for index in range(4)],
        None,
    )
    packed.labels[1, 6:] = -100
    first, second = split_batch(packed, 1)
    assert first.cu_seqlens.tolist() == [0, 3, 3, 8]
    assert second.cu_seqlens.tolist() == [0, 6, 8]
    assert (first.num_media, second.num_media) == ([1, 0, 1], [2, 0])
    assert first.attend == ["next", "next", "previous"]
    assert [each[0, 0, 0, 0].item() for each in second.pixels] == [2.0, 3.0]
    # In the first row one predicts, as labels of a half are left out.
    assert (len(documents_of(first)), len(documents_of(second))) == (2, 1)
    packed.cu_seqlens = torch.tensor([0, 3, 3, 7, 14, 16], dtype=torch.int32)
    with pytest.raises(ValueError, match="cu_seqlens: expected documents that begin"):
        list(split_batch(packed, 1))


def test_wrong_arguments_are_named():
    model = make_model()
    for options, name in (
        ({"weights": {}}, "weights"),
        ({"weights": {"web": -1.0}}, "weights"),
        ({"weights": WEIGHTS, "optimisation": "both"}, "optimisation"),
        ({"weights": WEIGHTS, "micro_batch_size": 0}, "micro_batch_size"),
    ):
        with pytest.raises(ValueError, match=f"^{name}: expected"):
            TrainStep(model, OPTIMIZER, **options)
    step = TrainStep(model, OPTIMIZER, weights=WEIGHTS)
    for batches in ({}, {"video": make_batch(1, 0)}):
        with pytest.raises(ValueError, match="^batches: expected some of the datasets web, pairs"):
            step(batches)
    with pytest.raises(ValueError, match="model: expected trainable parameters"):
        TrainStep(model.requires_grad_(False), OPTIMIZER, weights=WEIGHTS)


def test_warm_up_and_norm():
    config = OptimizerConfig(lr=1.0, warmup_steps=4)
    assert [warm_up(config, step) for step in (0, 1, 3, 9)] == [0.25, 0.5, 1.0, 1.0]
    assert warm_up(OptimizerConfig(lr=1.0, warmup_steps=0), 0) == 1.0
    norm = global_norm([torch.full((2, 2), 3.0), torch.tensor([8.0])])
    assert norm.item() == pytest.approx(10.0)
