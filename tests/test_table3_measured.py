"""Table 3 measured: what a scale keeps of the paper's rows, data, steps, paired ratios."""

import dataclasses
import itertools
import math
import statistics

import pytest
import torch

pytest.importorskip("timm")
pytest.importorskip("transformers")

from table3_cases import SMALLEST  # noqa: E402

from flamingo_fast import reference  # noqa: E402
from flamingo_fast.bench import table3_measured  # noqa: E402
from flamingo_fast.bench.agreement import Agreement, spearman  # noqa: E402
from flamingo_fast.bench.table3 import CONTROLS  # noqa: E402
from flamingo_fast.bench.table3_measured import (  # noqa: E402
    Measurement,
    Session,
    Store,
    check_rows,
)
from flamingo_fast.bench.table3_scales import SCALES  # noqa: E402
from flamingo_fast.bench.table3_steps import Step, synthetic_batch  # noqa: E402
from flamingo_fast.bench.timing import Interval  # noqa: E402
from flamingo_fast.models import work  # noqa: E402
from flamingo_fast.models.presets import table3_configs  # noqa: E402
from flamingo_fast.testing import eager  # noqa: E402
from flamingo_fast.training.throughput import WorkCounter  # noqa: E402

MICRO = SCALES["micro"]
CPU = torch.device("cpu")


@pytest.mark.parametrize("name", SCALES)
def test_no_rows_operations_are_in_another_proportion_than_the_papers(name):
    scale, configs = SCALES[name], table3_configs()
    base = configs["baseline"]
    full, small = work.step_flops(base).total, scale.flops(scale.config(base)).total
    for row, config in configs.items():
        expected = work.step_flops(config).total / full
        found = scale.flops(scale.config(config)).total / small
        assert found == pytest.approx(expected, abs=0.05), row
        if row in CONTROLS:
            assert found == 1


def test_a_row_keeps_what_it_changes():
    configs = {row: MICRO.config(config) for row, config in table3_configs().items()}
    base = configs.pop("baseline")
    # In the paper's baseline this dataset is two.
    assert MICRO.passes(configs["laion"]).keys() == {"m3w", "laion.0", "laion.1", "vtp"}
    for row, config in configs.items():
        assert config != base, row
    assert configs["mlp"].resampler.kind == "mlp"
    assert len(configs["every_4th"].conditioning.layers(base.lm.depth)) == 3
    assert configs["vision_unfrozen"].vision == dataclasses.replace(base.vision, is_frozen=False)


def test_the_papers_proportions_of_batches():
    passes = MICRO.passes(MICRO.config(table3_configs()["baseline"]))
    assert [each.samples for each in passes.values()] == [4, 8, 8, 1]
    assert [each.tokens for each in passes.values()] == [64, 8, 16, 16]
    assert [each.media for each in passes.values()] == [5, 1, 1, 1]
    assert [each.frames for each in passes.values()] == [1, 1, 1, 8]


def test_what_a_scale_changes_is_said():
    lines = "\n".join(MICRO.changes())
    for change in (
        "nfnet_f6 -> test_nfnet at 96 px",
        "num_latents 64 -> 5",
        "num_layers 12 -> 6",
        "dim 2048 -> 192",
        "m3w 4 x 64, align 8 x 8, ltip 8 x 16, vtp 1 x 16",
    ):
        assert change in lines


@pytest.mark.parametrize("name", ["m3w", "align", "vtp"])
def test_synthetic_batches_have_the_shapes_of_real_ones(name):
    config = MICRO.config(table3_configs()["baseline"])
    sizes = MICRO.passes(config)[name]
    batch = synthetic_batch(config, sizes, CPU)
    is_image = batch.input_ids == config.image_token_id
    assert (is_image.sum(1) == sizes.media).all()
    assert is_image[:, 0].all()
    assert (batch.labels[is_image] == -100).all()
    # Each but the first comes after an `<EOC>`, which is predicted.
    is_eoc = batch.labels[:, :-1] == config.eoc_token_id
    assert torch.equal(is_eoc, is_image[:, 1:])
    assert batch.pixels.shape == (sizes.samples * sizes.media, sizes.frames, 3, 96, 96)
    expected = ["previous", "next"] * 2 if name == "m3w" else None
    assert batch.attend == expected
    assert batch.input_ids.max() <= config.lm.vocab_size


def test_a_steps_operations_are_those_of_its_batches():
    """The predicted column counts what is measured."""
    from flamingo_fast.models.flamingo import Flamingo

    config = SMALLEST.config(table3_configs()["every_2nd"])
    count = WorkCounter(Flamingo(config, device="meta"))
    amounts = [
        count(synthetic_batch(config, sizes, CPU)) for sizes in SMALLEST.passes(config).values()
    ]
    assert sum(each.flops for each in amounts) == SMALLEST.flops(config).total


def test_every_row_trains():
    for row, config in table3_configs().items():
        step = Step(SMALLEST.config(config), SMALLEST, CPU)
        step()
        assert step.train_step.updates == (4 if row == "round_robin" else 1), row
        parts = {name.partition(".")[0] for name in step.train_step.state()["weights"]}
        expected = {"resampler", "conditioning", "tokens"}
        expected |= {"lang_model"} if row.startswith("lm_") else set()
        expected |= {"vision_encoder"} if row == "vision_unfrozen" else set()
        assert parts == expected, row


class Fake:
    """A step that takes so long on a machine that gets slower and slower."""

    now, slowness = 0.0, 1.0

    def __init__(self, config, scale, device, **options):
        self.seconds = 1.0 if config == scale.config(table3_configs()["baseline"]) else 2.0

    def __call__(self):
        Fake.slowness *= 1.01
        Fake.now += self.seconds * Fake.slowness

    def static_bytes(self):
        return 30


@pytest.fixture
def fake(monkeypatch):
    monkeypatch.setattr(table3_measured, "Step", Fake)
    monkeypatch.setattr(
        table3_measured, "part_seconds", lambda step, repeats: {"lm": step.seconds, "vision": 1.0}
    )
    monkeypatch.setattr(table3_measured, "peak_bytes", lambda call, device: 12)
    Fake.now, Fake.slowness = 0.0, 1.0


def test_ratios_are_of_neighbours(fake):
    session = Session(MICRO, ["every_4th"], 9, CPU, clock=lambda: Fake.now)
    steps = []
    session.progress = lambda row, done: steps.append(done)
    (measured,) = session.run()
    assert len(measured.seconds) == len(measured.baseline_seconds) == 9
    assert measured.ratio == pytest.approx(2, abs=0.03)
    assert measured.flops_ratio == pytest.approx(0.72, abs=0.02)
    assert (measured.scale, measured.precision, measured.is_alone) == ("micro", "fp32", False)
    assert measured.peak_bytes == 42 and measured.parts["lm"] == 2
    assert measured.baseline_parts["lm"] == 1
    assert steps == sorted(steps) and steps[-1] == session.total_steps


def test_controls_and_the_baseline_are_measured_like_any_row(fake):
    session = Session(MICRO, ["baseline", "laion"], 2, CPU, clock=lambda: Fake.now)
    base, laion = session.run()
    for measured in (base, laion):
        assert measured.seconds != measured.baseline_seconds
        assert measured.ratio != 1


@pytest.mark.parametrize("impl", ["reference", "peer"])
def test_other_ops_are_timed_in_the_same_rounds(impl, fake):
    (measured,) = Session(MICRO, ["mlp"], 3, CPU, impl, clock=lambda: Fake.now).run()
    assert measured.impl == impl
    assert statistics.median(measured.speedups) == pytest.approx(1, abs=0.05)


def test_one_model_at_a_time_where_no_more_fit(fake):
    session = Session(SCALES["full"], ["baseline", "every_4th"], 2, CPU, clock=lambda: Fake.now)
    steps = []
    session.progress = lambda row, done: steps.append(done)
    base, other = session.run()
    assert base.is_alone and other.is_alone
    assert base.precision == "bf16 states"
    assert base.seconds == other.baseline_seconds and base.ratio == 1
    assert other.ratio == pytest.approx(2, abs=0.3)
    assert steps[-1] == session.total_steps
    session = Session(SCALES["full"], ["mlp"], 3, CPU, "peer", clock=lambda: Fake.now)
    session.progress = lambda row, done: steps.append(done)
    (measured,) = session.run()
    assert len(measured.other_seconds) == 3 and steps[-1] == session.total_steps


@pytest.mark.parametrize("impl", ["reference", "peer"])
def test_rows_have_the_same_losses_with_other_ops(impl):
    step = Step(SMALLEST.config(table3_configs()["every_2nd"]), SMALLEST, CPU)
    losses = []

    def loss():
        model, batch = step.train_step.model.eval(), step.batches["m3w"]
        with torch.no_grad():
            for block in model.conditioning.blocks:
                block.attn_gate.fill_(0.5)
            found = model(
                batch.input_ids,
                videos=batch.pixels,
                labels=batch.labels,
                num_media=batch.num_media,
                attend=batch.attend,
            )
        losses.append(float(found.loss))

    calls = []
    original = eager.masked_cross_attention
    loss()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            eager,
            "masked_cross_attention",
            lambda *args, **options: calls.append(1) or original(*args, **options),
        )
        table3_measured._with_ops(impl, loss)()
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    # Theirs ran, and is not left in place of the reference.
    assert bool(calls) == (impl == "peer")
    assert reference.masked_cross_attention.__module__ == "flamingo_fast.reference"


def test_bf16_states_have_no_master_weights():
    step = Step(SMALLEST.config(table3_configs()["baseline"]), SMALLEST, CPU, "bf16 states")
    step()
    state = step.train_step.state()
    for name in ("weights", "exp_avg", "exp_avg_sq"):
        assert {each.dtype for each in state[name].values()} == {torch.bfloat16}
    # Of closed gates, which the resampler is behind.
    assert state["exp_avg_sq"]["conditioning.blocks.0.attn_gate"] > 0
    wide = Step(SMALLEST.config(table3_configs()["baseline"]), SMALLEST, CPU, "bf16")
    assert {each.dtype for each in wide.train_step.state()["weights"].values()} == {torch.float32}
    # Of 2 bytes each: weights, and two moments of what is trained.
    model = step.train_step.model
    numel = sum(each.numel() for each in model.parameters())
    trained = sum(each.numel() for each in model.parameters() if each.requires_grad)
    buffers = sum(each.untyped_storage().nbytes() for each in model.buffers())
    assert step.static_bytes() == 2 * (numel + 2 * trained) + buffers
    assert wide.static_bytes() >= 2 * numel + 12 * trained


def test_a_stopped_run_goes_on(tmp_path):
    flops = work.Flops(1, 2, 3, 4)
    one = Measurement("mlp", (1.0, 2.0), (0.5, 1.0), flops, flops, parts={"lm": 0.1}, impl="peer")
    store = Store(tmp_path / "new" / "table3.jsonl", {"commit": "a", "pairs": 2})
    assert store.read() == {}
    store.add(one)
    store.add(dataclasses.replace(one, row="laion", other_seconds=(3.0, 4.0)))
    with store.path.open("a") as file:
        file.write('{"about": {"commit": "a", "pairs": 2}, "row": "cut o')
    store.add(dataclasses.replace(one, row="every_4th"))
    assert store.read() == {
        "mlp": one,
        "laion": dataclasses.replace(one, row="laion", other_seconds=(3.0, 4.0)),
        "every_4th": dataclasses.replace(one, row="every_4th"),
    }
    # Of another machine, commit or number of pairs nothing is mixed in.
    assert Store(store.path, {"commit": "b", "pairs": 2}).read() == {}
    assert Store(store.path, {"commit": "a", "pairs": 2}, resume=False).read() == {}


def test_a_loss_that_is_not_finite_stops_the_measurement():
    step = Step(SMALLEST.config(table3_configs()["no_tanh_gating"]), SMALLEST, CPU)
    with torch.no_grad():
        next(step.train_step.model.resampler.parameters()).fill_(float("nan"))
    with pytest.raises(FloatingPointError, match="not finite"):
        step()


@pytest.mark.parametrize("count", [1, 2, 5, 7, 9, 12, 15])
def test_the_medians_interval_holds_it_as_often_as_it_says(count):
    """Exact: over all ways in which samples can be on the two sides of the median."""
    interval = Interval.of_median(range(count))
    outside = 0
    for sides in itertools.product((0, 1), repeat=count):
        below = sum(sides)
        # The median lies between the samples `below` - 1 and `below` in order.
        outside += not interval.low < below - 0.5 < interval.high if 0 < below < count else 1
    if count > 1:
        assert interval.confidence == pytest.approx(1 - outside / 2**count)
    assert interval.confidence >= 0.99 or (interval.low, interval.high) == (0, count - 1)


def test_no_samples_have_no_interval():
    with pytest.raises(ValueError, match="samples: expected at least one"):
        Interval.of_median([])


def test_spearman():
    assert spearman([1, 2, 3], [10, 20, 15]) == pytest.approx(0.5)
    assert spearman([1, 2, 2, 4], [1, 3, 3, 9]) == pytest.approx(1)
    assert math.isnan(spearman([1, 1], [1, 2]))


def test_rows_are_in_the_tables_order_and_others_refused():
    assert check_rows(["mlp", "baseline", "every_4th"]) == ["baseline", "every_4th", "mlp"]
    # Rows of other tables are there by name alone.
    assert len(check_rows([])) == 18
    assert "m3w_only" not in check_rows([]) and check_rows(["m3w_only"]) == ["m3w_only"]
    with pytest.raises(ValueError, match="rows: expected some of baseline, .*; got 'every_5th'"):
        check_rows(["every_5th"])
    with pytest.raises(ValueError, match="pairs: expected at least 1, got 0"):
        Session(MICRO, ["mlp"], 0, CPU)
    with pytest.raises(ValueError, match="impl: expected one of auto, reference, peer; got 'x'"):
        Session(MICRO, ["mlp"], 1, CPU, "x")


def test_agreement():
    found = Agreement.of([1.0, 2.0, 4.0], [1.5, 2.0, 3.0])
    assert (found.rows, found.spearman, found.error) == (3, 1, 0.5)
    for values, others in (([], []), ([1.0], [1.0, 2.0])):
        with pytest.raises(ValueError, match="others: expected as many as values, at least one"):
            Agreement.of(values, others)
