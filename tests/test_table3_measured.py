"""Table 3 measured: what a scale keeps of the paper's rows, data, paired ratios, the command."""

import csv
import dataclasses
import itertools
import math
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("timm")
pytest.importorskip("transformers")

from flamingo_fast import cli  # noqa: E402
from flamingo_fast.bench import table3, table3_measured  # noqa: E402
from flamingo_fast.bench.agreement import Agreement, spearman  # noqa: E402
from flamingo_fast.bench.table3 import CONTROLS  # noqa: E402
from flamingo_fast.bench.table3_measured import (  # noqa: E402
    Interval,
    Measurement,
    Step,
    check_rows,
    measure,
    synthetic_batch,
)
from flamingo_fast.bench.table3_scales import SCALES  # noqa: E402
from flamingo_fast.models import work  # noqa: E402
from flamingo_fast.models.presets import table3_configs  # noqa: E402
from flamingo_fast.training.throughput import WorkCounter  # noqa: E402

MICRO = SCALES["micro"]
CPU = torch.device("cpu")
# Too small for numbers.
SMALLEST = dataclasses.replace(
    MICRO,
    name="smallest",
    encoders={name: ("vit_mini", 28) for name in MICRO.encoders},
    resampler=MICRO.resampler | {"dim": 16, "depth": 1},
    lm=MICRO.lm | {"vocab_size": 50, "dim": 24, "depth": 2, "heads": 2, "dim_head": 8},
    num_layers=1,
    tokens_divisor=8,
)


def test_no_rows_operations_are_in_another_proportion_than_the_papers():
    configs = table3_configs()
    base = configs["baseline"]
    full, small = work.step_flops(base).total, MICRO.flops(MICRO.config(base)).total
    for row, config in configs.items():
        expected = work.step_flops(config).total / full
        found = MICRO.flops(MICRO.config(config)).total / small
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


def test_ratios_are_of_neighbours(monkeypatch):
    """On a machine that gets slower and slower, and a row that takes twice the baseline's time."""
    now, slowness = 0.0, 1.0
    seconds = {"every_4th": 2.0, "baseline": 1.0}
    base = MICRO.config(table3_configs()["baseline"])

    def fake(config, scale, device):
        def step():
            nonlocal now, slowness
            row = "baseline" if config == base else "every_4th"
            slowness *= 1.01
            now += seconds[row] * slowness

        return step

    monkeypatch.setattr(table3_measured, "Step", fake)
    (measured,) = measure(MICRO, ["every_4th"], 9, CPU, clock=lambda: now)
    assert len(measured.seconds) == len(measured.baseline_seconds) == 9
    assert measured.ratio == pytest.approx(2, abs=0.03)
    assert measured.flops_ratio == pytest.approx(0.72, abs=0.02)


def test_a_loss_that_is_not_finite_stops_the_measurement():
    step = Step(SMALLEST.config(table3_configs()["no_tanh_gating"]), SMALLEST, CPU)
    with torch.no_grad():
        next(step.train_step.model.resampler.parameters()).fill_(float("nan"))
    with pytest.raises(FloatingPointError, match="not finite"):
        step()


@pytest.mark.parametrize("count", [1, 2, 5, 6, 7, 9, 15])
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
    assert interval.confidence >= 0.95 or (interval.low, interval.high) == (0, count - 1)


def test_no_samples_have_no_interval():
    with pytest.raises(ValueError, match="samples: expected at least one"):
        Interval.of_median([])


def test_spearman():
    assert spearman([1, 2, 3], [10, 20, 15]) == pytest.approx(0.5)
    assert spearman([1, 2, 2, 4], [1, 3, 3, 9]) == pytest.approx(1)
    assert math.isnan(spearman([1, 1], [1, 2]))


def test_rows_are_in_the_tables_order_and_others_refused():
    assert check_rows(["mlp", "baseline", "every_4th"]) == ["every_4th", "mlp"]
    assert len(check_rows([])) == 22
    with pytest.raises(ValueError, match="rows: expected some of baseline, .*; got 'every_5th'"):
        check_rows(["every_5th"])
    with pytest.raises(ValueError, match="pairs: expected at least 1, got 0"):
        next(measure(MICRO, ["mlp"], 0, CPU))


def _predictions():
    """The two rows that the test of the command measures, without counting all of them."""
    configs, csv_rows = table3_configs(), table3.read_table3()
    return [
        table3.Prediction(
            *(each["group"], each["row"], each["changed_value"], 3_000_000, 1_000_000, 4),
            *(work.step_flops(configs[each["row"]]).total, 1, each["params_b"]),
            float(each["step_time_s"]),
        )
        for each in csv_rows
        if each["row"] in ("baseline", "every_4th", "round_robin", "wo_m3w")
    ]


def run_command(monkeypatch, capsys, *arguments: str) -> tuple[int, str, str]:
    monkeypatch.setattr(sys, "argv", ["flamingo-fast", "table3", *arguments])
    with pytest.raises(SystemExit) as exit:
        cli.main()
    captured = capsys.readouterr()
    return exit.value.code or 0, captured.out, captured.err


def test_command(tmp_path: Path, monkeypatch, capsys):
    monkeypatch.setattr(table3, "predict", _predictions)
    monkeypatch.setitem(SCALES, "smallest", SMALLEST)
    file = tmp_path / "measured.csv"
    code, out, _ = run_command(
        monkeypatch,
        capsys,
        *("--scale", "smallest", "--rows", "every_4th", "--steps", "2", "--csv", str(file)),
    )
    assert code == 0
    line = next(line for line in out.splitlines() if line.startswith("│ every_4th"))
    cells = [cell.strip() for cell in line.strip("│").split("│")]
    with file.open(newline="") as lines:
        (row,) = csv.DictReader(lines)
    assert (cells[2], row["paper_ratio"]) == ("0.586", f"{1.02 / 1.74:.6g}")
    columns = ("measured_ratio", "median_s", "flops_here_ratio", "flops_ratio")
    assert [cells[i] for i in (3, 5, 6, 7)] == [f"{float(row[name]):.3f}" for name in columns]
    assert cells[4] == f"[{float(row['low']):.3f}, {float(row['high']):.3f}]"
    assert (row["pairs"], row["confidence"]) == ("2", "0.5")
    assert float(row["low"]) <= float(row["measured_ratio"]) <= float(row["high"])
    assert "2 pairs a row" in out
    assert "dim 2048 -> 24" in out
    assert "threads, Python" in out


def test_agreement_is_shown_over_rows_that_are_no_controls():
    rows = {"every_4th": 0.7, "round_robin": 1.1, "wo_m3w": 0.5}
    measurements = [
        Measurement(row, (ratio,) * 3, (1.0,) * 3, round(ratio * 1000), 1000)
        for row, ratio in rows.items()
    ]
    lines = table3_measured._agreement(measurements, _predictions())
    assert "flops here: rank correlation 1.000, mean absolute error 0.000, over 3 rows" in lines[1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--scale", "huge"], "scale: expected one of micro; got 'huge'"),
        (["--scale", "micro", "--rows", "x"], "rows: expected some of baseline"),
        (["--scale", "micro", "--rows", "baseline"], "rows: expected others than the baseline"),
        (["--rows", "mlp"], "rows: expected --scale with it"),
        (["--device", "cpu"], "device: expected --scale with it"),
        (["--scale", "micro", "--device", "nonsense"], "nonsense"),
    ],
)
def test_wrong_options_are_one_line(arguments, message, monkeypatch, capsys):
    monkeypatch.setattr(table3_measured, "measure", lambda *_: pytest.fail("measured"))
    code, _, err = run_command(monkeypatch, capsys, *arguments)
    assert code == 2
    assert message in " ".join(err.replace("│", " ").split())


def test_agreement():
    found = Agreement.of([1.0, 2.0, 4.0], [1.5, 2.0, 3.0])
    assert (found.rows, found.spearman, found.error) == (3, 1, 0.5)
    for values, others in (([], []), ([1.0], [1.0, 2.0])):
        with pytest.raises(ValueError, match="others: expected as many as values, at least one"):
            Agreement.of(values, others)
