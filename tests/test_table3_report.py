"""Table 3 measured, for people: tables, plots, sentences, and the command."""

import csv
import dataclasses
from pathlib import Path

import pytest
import torch

pytest.importorskip("timm")
pytest.importorskip("transformers")

from shard_cases import encoded, pair, picture, write_tar  # noqa: E402
from stream_cases import word_tokenizer  # noqa: E402
from table3_cases import SMALLEST  # noqa: E402

from flamingo_fast.bench import table3, table3_measured, table3_report, table3_suite  # noqa: E402
from flamingo_fast.bench.table3_data import RealData  # noqa: E402
from flamingo_fast.bench.table3_measured import Measurement  # noqa: E402
from flamingo_fast.bench.table3_scales import SCALES  # noqa: E402
from flamingo_fast.bench.table3_steps import Step  # noqa: E402
from flamingo_fast.models import work  # noqa: E402
from flamingo_fast.models.config import ConfigError  # noqa: E402
from flamingo_fast.models.presets import table3_configs  # noqa: E402

ROWS = ("baseline", "wo_m3w", "round_robin", "every_4th", "lm_pretrained")


def predictions():
    """Of the rows that are measured here, without counting all of them."""
    configs = table3_configs()
    return [
        table3.Prediction(
            *(each["group"], each["row"], each["changed_value"], 3_000_000, 1_000_000, 4),
            *(work.step_flops(configs[each["row"]]).total, 1, each["params_b"]),
            *(float(each["step_time_s"]), float(each["overall_score"])),
        )
        for each in table3.read_table3()
        if each["row"] in ROWS
    ]


def measurement(row: str, ratio: float, **changes) -> Measurement:
    base = work.Flops(vision=200, lm=800)
    return dataclasses.replace(
        Measurement(
            row,
            (ratio, 1.01 * ratio, 0.99 * ratio),
            (1.0,) * 3,
            work.Flops(vision=200, lm=round(1000 * ratio) - 200),
            base,
            scale="micro",
            precision="fp32",
            static_bytes=int(2e9 * ratio),
            step_bytes=int(1e9),
            parts={"vision": 0.2, "lm": ratio - 0.2},
            baseline_parts={"vision": 0.2, "lm": 0.8},
        ),
        **changes,
    )


MEASURED = [
    measurement(row, ratio) for row, ratio in zip(ROWS, (1.0, 0.5, 1.1, 0.7, 1.3), strict=True)
]


def test_columns_and_their_sources():
    ratios, _, parts, parameters = table3_report.tables(MEASURED, predictions())
    (row,) = (each for each in ratios.rows if each[0] == "every_4th")
    cells = dict(zip(ratios.headers, row, strict=True))
    assert cells["paper"] == f"{1.02 / 1.74:.3f}" and cells["measured"] == "0.700"
    assert cells["interval"] == "0.693 - 0.707" and cells["flops here"] == "0.700"
    assert cells["GB"] == "2.40"
    text = ratios.markdown()
    for part in ("arXiv 2204.14198", "fitted to the paper", "dim 2048 -> 192", "all is fp32"):
        assert part in text
    assert [row[:3] for row in parameters.rows][0] == ["baseline", "3.2", "0.003"]
    (row,) = (each for each in parts.rows if each[0] == "wo_m3w")
    assert dict(zip(parts.headers, row, strict=True))["vision"] == "40"
    with pytest.raises(ValueError, match="measurements: expected at least one"):
        table3_report.tables([], predictions())


def test_bf16_states_and_models_alone_are_said_beside_the_rows():
    alone = [dataclasses.replace(MEASURED[0], is_alone=True, precision="bf16 states")]
    text = table3_report.tables(alone, predictions())[0].markdown()
    assert "without fp32 master weights" in text and "One model at a time" in text


def test_other_ops_have_a_column_of_their_own():
    for impl, said in (("peer", "OpenFlamingo's compositions"), ("reference", "PyTorch's own")):
        each = measurement("every_4th", 0.7, impl=impl, other_seconds=(1.4, 1.4, 1.4))
        table = table3_report.tables([each], predictions())[0]
        assert f"x {impl}" in table.headers
        assert table.rows[0][-2] == "2.00" and said in table.markdown()


def test_agreement_is_over_rows_that_differ():
    rows = table3_report.rows_of(MEASURED, predictions())
    table = table3_report.agreement_table(rows, predictions())
    by_pair = {(row[0], row[1]): row[2:] for row in table.rows}
    # Not of the baseline.
    assert by_pair["measured", "flops here"] == ["1.000", "0.000", "4"]
    assert ("flops + params", "paper") in by_pair
    assert "flops + params is fitted to the paper" in table.notes[1]


def test_a_part_explains_what_operations_do_not():
    slow = measurement(
        "round_robin",
        1.3,
        flops=work.Flops(vision=200, lm=800),
        parts={"vision": 0.2, "lm": 0.8, "optimiser": 0.3},
    )
    (row,) = table3_report.rows_of([slow], predictions())
    (line,) = table3_report.explanations([row])
    assert "round_robin: measured 1.300. by operations 1.000 (+0.300)" in line
    assert "optimiser explains +0.300" in line
    fitted = row.ratios.flops_and_parameters
    assert f"by the fit to the paper {fitted:.3f} ({1.3 - fitted:+.3f})" in line
    assert table3_report.explanations(table3_report.rows_of(MEASURED[:1], predictions())) == []


def test_the_papers_sentence_of_what_was_measured():
    line = table3_report.every_4th(MEASURED, predictions())
    assert "43 % faster here (41 to 44 %)" in line and "the paper says 66 %" in line
    assert "71 % apart" in line and "68.8 in place of 70.7" in line
    assert table3_report.every_4th(MEASURED[:2], predictions()) == ""
    one = dataclasses.replace(MEASURED[3], seconds=(0.7,), baseline_seconds=(1.0,))
    assert "43 % faster here; the paper" in table3_report.every_4th([one], predictions())
    assert table3_report.tables([one], predictions())[0].rows[0][4] == "-"


def test_pareto_front():
    points = [(1.0, 70), (0.5, 60), (0.7, 60), (0.7, 68), (1.2, 70), (0.5, 60)]
    assert table3_report.pareto(points) == [0, 1, 3, 5]


def test_plots_have_every_row():
    pytest.importorskip("matplotlib")
    section = table3_suite.table3_section(MEASURED, predictions())
    assert [figure.name for figure in section.figures] == ["table3", "tradeoff"]
    for figure in section.figures:
        assert figure.png.startswith(b"\x89PNG") and figure.svg.startswith("<svg")
    assert [ratio.name for ratio in section.ratios] == [f"table3 micro {row}" for row in ROWS]
    assert table3_suite.table3_section([], predictions()).tables == []


def test_the_plot_of_a_file_is_that_of_its_measurement(tmp_path: Path):
    pyplot = pytest.importorskip("matplotlib.pyplot")
    file = tmp_path / "table3.csv"
    table3_report.write_csv(MEASURED, predictions(), file)
    drawn = [
        table3_report.plot_ratios(MEASURED, predictions()),
        table3_report.plot_ratios_of_csv(file),
    ]

    def points(figure) -> dict[str, list[float]]:
        found = {line.get_label(): list(line.get_xdata()) for line in figure.axes[0].lines}
        (bars,) = figure.axes[0].containers
        return found | {"measured": list(bars[0].get_xdata())}

    measured, of_file = map(points, drawn)
    assert measured.keys() == of_file.keys() and len(measured["measured"]) == len(MEASURED)
    for label, places in measured.items():
        assert of_file[label] == pytest.approx(places, rel=1e-5)
    # Without a measurement there are predictions, which say so.
    predicted = table3_report.plot_predicted_ratios(predictions())
    assert [text.get_text() for text in predicted.legends[0].texts][:2] == [
        "paper",
        "flops (predicted)",
    ]
    for figure in (*drawn, predicted):
        pyplot.close(figure)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"row,paper_ratio\nbaseline,1\n", "KeyError: 'flops_here_ratio'"),
        (b"row,paper_ratio\n", "ValueError: no rows"),
        (b"", "ValueError: no rows"),
        (b"\x89PNG\r\n", "UnicodeDecodeError: 'utf-8' codec can't decode"),
    ],
)
def test_what_is_no_csv_of_a_measurement_is_refused(tmp_path: Path, data: bytes, reason: str):
    pytest.importorskip("matplotlib.pyplot")
    file = tmp_path / "table3.csv"
    file.write_bytes(data)
    with pytest.raises(ValueError) as error:
        table3_report.plot_ratios_of_csv(file)
    assert f"{file}: expected a table3.csv of a measurement: {reason}" in str(error.value)


def test_command(tmp_path: Path, monkeypatch, command):
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(table3_suite, "predict", predictions)
    monkeypatch.setitem(SCALES, "smallest", SMALLEST)
    file, out = tmp_path / "measured.csv", tmp_path / "report"
    options = ("--scale", "smallest", "--steps", "2", "--out", str(out))
    code, shown, _ = command("table3", *options, "--rows", "every_4th", "--csv", str(file))
    assert code == 0
    with file.open(newline="") as lines:
        (row,) = csv.DictReader(lines)
    assert row["paper_ratio"] == f"{1.02 / 1.74:.6g}"
    assert (row["pairs"], row["confidence"], row["scale"]) == ("2", "0.5", "smallest")
    assert float(row["low"]) <= float(row["measured_ratio"]) <= float(row["high"])
    assert int(row["step_bytes"]) > 0 and float(row["lm_backward_s"]) > 0
    line = next(each.split() for each in shown.splitlines() if each.strip().startswith("every_4th"))
    assert f"{float(row['measured_ratio']):.3f}" in line and "0.586" in line
    assert "2 pairs a row" in shown
    assert shown.splitlines()[-1] == str(out) and (out / "index.html").exists()
    # What is finished is not measured again.
    monkeypatch.setattr(
        table3_measured, "Step", lambda config, *_, **__: pytest.fail("measured again")
    )
    code, again, _ = command("table3", *options, "--rows", "every_4th", "--resume")
    assert code == 0 and f"{float(row['measured_ratio']):.3f}" in again


def test_ctrl_c_keeps_what_is_finished(tmp_path: Path, monkeypatch, command):
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(table3_suite, "predict", predictions)
    monkeypatch.setitem(SCALES, "smallest", SMALLEST)
    made = []

    def interrupted(config, *arguments, **options):
        made.append(config)
        if len(made) == 3:
            raise KeyboardInterrupt
        return Step(config, *arguments, **options)

    monkeypatch.setattr(table3_measured, "Step", interrupted)
    options = ("--scale", "smallest", "--steps", "1", "--out", str(tmp_path))
    code, shown, _ = command("table3", *options, "--rows", "every_4th,wo_m3w")
    assert code == 1
    assert "interrupted: what follows was not measured" in shown
    assert "wo_m3w" in shown and "every_4th  " not in shown
    assert "wo_m3w" in (tmp_path / "table3.csv").read_text()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--scale", "huge"], "scale: expected one of full, half, mini, micro; got 'huge'"),
        (["--scale", "micro", "--rows", "x"], "rows: expected some of baseline"),
        (["--scale", "micro", "--impl", "x"], "impl: expected one of auto, reference, peer"),
        (["--rows", "mlp"], "rows: expected --scale with it"),
        (["--device", "cpu"], "device: expected --scale with it"),
        (["--impl", "peer"], "impl: expected --scale with it"),
        (["--scale", "micro", "--resume"], "resume: expected --out with it"),
        (["--scale", "micro", "--device", "nonsense"], "nonsense"),
        (["--scale", "micro", "--data", "tests"], "tokenizer"),
    ],
)
def test_wrong_options_are_refused_by_name(arguments, message, monkeypatch, command):
    monkeypatch.chdir(Path(__file__).parents[1])
    monkeypatch.setattr(table3_suite, "predict", lambda: pytest.fail("measured"))
    code, _, err = command("table3", *arguments)
    assert code == 2
    assert message in " ".join(err.replace("│", " ").split())


def shards(folder: Path) -> Path:
    """Pairs alone, as many as two steps take."""
    image = encoded(picture(40, 30))
    for name in ("align", "ltip", "laion"):
        write_tar(folder / f"{name}-0.tar", [(str(i), pair(image, b"a b c")) for i in range(40)])
    word_tokenizer().backend_tokenizer.save(str(folder / "tokenizer.json"))
    return folder


def test_real_samples(tmp_path: Path):
    data = RealData(shards(tmp_path), SMALLEST, torch.device("cpu"))
    config = dataclasses.replace(
        data.config(SMALLEST.config(table3_configs()["laion"])), datasets=("laion", "ltip")
    )
    batches = data.batches(config)
    assert list(batches) == ["laion.0", "laion.1", "ltip"]
    for batch in batches.values():
        assert (batch.input_ids[:, 0] == config.image_token_id).all()
        assert batch.pixels.shape[-1] == 28 and batch.num_media == [1] * 8
    Step(config, SMALLEST, torch.device("cpu"), batches=batches)()
    with pytest.raises(ConfigError, match="m3w"):
        data.batches(dataclasses.replace(config, datasets=("m3w",)))
