"""Table 3 measured, for people: tables, a CSV, and the trade-offs that the paper's is about."""

import csv
import dataclasses
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from flamingo_fast.bench import table3_parts
from flamingo_fast.bench.agreement import Agreement
from flamingo_fast.bench.plot import import_pyplot
from flamingo_fast.bench.table3 import (
    BASELINE,
    CONTROLS,
    Prediction,
    Ratios,
    agreements,
    differing,
    left_out,
    of_table3,
    ratios,
)
from flamingo_fast.bench.table3_measured import Measurement
from flamingo_fast.bench.table3_scales import SCALES
from flamingo_fast.bench.table3_steps import PRECISIONS
from flamingo_fast.bench.tables import Table
from flamingo_fast.bench.timing import Interval
from flamingo_fast.errors import one_line

# Over it a difference of ratios is explained.
_EXPLAINED = 0.15
_EVERY_4TH = "every_4th"
# Section 3.3 of the paper.
_PAPERS_SPEEDUP = 0.66


@dataclasses.dataclass(frozen=True)
class Row:
    """A row of the table with all that is known of it."""

    measurement: Measurement
    prediction: Prediction
    ratios: Ratios

    @property
    def name(self) -> str:
        return self.measurement.row

    @property
    def is_differing(self) -> bool:
        """Whether it is work of another kind than the baseline's, and of as many chips."""
        return self.name not in (BASELINE, *CONTROLS) and self.prediction.chips == 1

    @property
    def is_itself(self) -> bool:
        """The baseline where there is none to compare it with."""
        return self.measurement.is_alone and self.name == BASELINE

    @property
    def interval(self) -> str:
        """Of the ratio; a single pair has none."""
        interval = self.measurement.interval
        if self.is_itself or not interval.confidence:
            return "-"
        return f"{interval.low:.3f} - {interval.high:.3f}"

    @property
    def explanation(self) -> str:
        """Of a ratio that is far from that of operations, or from the fitted one; else empty."""
        each, lines = self.measurement, []
        gap = each.ratio - each.flops_ratio
        if abs(gap) > _EXPLAINED and each.parts and each.baseline_parts:
            found = table3_parts.explanation(
                each.parts, each.baseline_parts, each.flops, each.baseline_flops, gap
            )
            why = "steps whose parts were measured don't show it"
            if found is not None:
                why = f"{found[0]} explains {found[1]:+.3f} of it"
            lines.append(f"by operations {each.flops_ratio:.3f} ({gap:+.3f}); {why}")
        fitted = self.ratios.flops_and_parameters
        if abs(each.ratio - fitted) > _EXPLAINED:
            charged = fitted - self.ratios.flops
            lines.append(
                f"by the fit to the paper {fitted:.3f} ({each.ratio - fitted:+.3f}); for "
                f"parameters, of which gradients and states are summed over the paper's chips "
                f"and not here, it has {charged:+.3f} that operations have not"
            )
        return f"{self.name}: measured {each.ratio:.3f}. {'. '.join(lines)}." if lines else ""


def rows_of(measurements: Sequence[Measurement], predictions: Sequence[Prediction]) -> list[Row]:
    of_row, by_name = ratios(predictions), {each.row: each for each in predictions}
    return [Row(each, by_name[each.row], of_row[each.row]) for each in measurements]


def tables(measurements: Sequence[Measurement], predictions: Sequence[Prediction]) -> list[Table]:
    """Ratios, how near they are to others, times by part, parameters.

    Raises:
        ValueError: no measurements.
    """
    if not measurements:
        raise ValueError("measurements: expected at least one, got none")
    rows = rows_of(measurements, predictions)
    return [
        _ratios_table(rows),
        agreement_table(rows, predictions),
        _parts_table(rows),
        _parameters_table(rows),
    ]


def _ratios_table(rows: Sequence[Row]) -> Table:
    first = rows[0].measurement
    impl = first.impl
    cells = []
    for row in rows:
        each = row.measurement
        speedup = Interval.of_median(each.speedups) if each.speedups else None
        cells.append(
            [
                row.name,
                row.prediction.change,
                f"{row.ratios.paper:.3f}",
                f"{each.ratio:.3f}",
                row.interval,
                f"{each.flops_ratio:.3f}",
                f"{row.ratios.flops:.3f}",
                f"{row.ratios.flops_and_parameters:.3f}",
                f"{statistics.median(each.seconds):.3f}",
                f"{each.peak_bytes / 1e9:.2f}",
                *(
                    [
                        f"{statistics.median(each.speedups):.2f}",
                        f"{speedup.low:.2f} - {speedup.high:.2f}",
                    ]
                    if speedup
                    else []
                ),
            ]
        )
    pairs = len(first.seconds)
    return Table(
        f"Table 3: step time over the baseline's, scale {first.scale}, {pairs} pairs a row",
        (
            *("row", "change", "paper", "measured", "interval", "flops here", "flops"),
            *("flops + params", "s", "GB"),
            *((f"x {impl}", "interval") if first.other_seconds else ()),
        ),
        cells,
        2,
        [*_notes(rows), *_scale(first)],
    )


def _notes(rows: Sequence[Row]) -> list[str]:
    first = rows[0].measurement
    notes = [
        "paper: of arXiv 2204.14198, table 3. measured: median of the ratios of pairs of steps, "
        f"with an interval of it, of ranks, with a confidence of {first.interval.confidence:.0%} "
        "(none of one pair). "
        "s: median of the row's steps. GB: weights, the optimiser's state, and what a step holds "
        "beside them at most.",
        "flops here: predicted from the operations of these models; flops, and flops + params, "
        "which is fitted to the paper's times: from those of the paper's models. No prediction "
        "knows of a measurement.",
        "laion and no_tanh_gating are the baseline's work, and baseline is another model of its "
        "own: what they measure is noise, but for the gates.",
    ]
    if first.is_alone:
        notes.append(
            "One model at a time fits in memory: a row's steps came after the baseline's, not in "
            "turns with them, and the baseline's ratio is that to itself."
        )
    if first.other_seconds:
        notes.append(
            f"x {first.impl}: how many times longer the same row's steps take with "
            + (
                "OpenFlamingo's compositions in place of our ops"
                if first.impl == "peer"
                else "the reference's ops, which are PyTorch's own"
            )
            + "; what modules save besides, such as projecting media once, both have."
        )
    return notes


def agreement_table(rows: Sequence[Row], predictions: Sequence[Prediction]) -> Table:
    """How near ratios are to others', over rows that are neither controls nor of more chips."""
    found: list[tuple[str, str, Agreement]] = []
    chosen = [row for row in rows if row.is_differing]
    if len(chosen) >= 3:
        measured = [row.measurement.ratio for row in chosen]
        others = {
            "paper": [row.ratios.paper for row in chosen],
            "flops here": [row.measurement.flops_ratio for row in chosen],
            "flops": [row.ratios.flops for row in chosen],
            "flops + params": [row.ratios.flops_and_parameters for row in chosen],
        }
        found += [("measured", name, Agreement.of(measured, o)) for name, o in others.items()]
    notes = []
    if len(differing(predictions)) >= 3:
        found += [(name, "paper", each) for name, each in agreements(predictions).items()]
        notes.append(f"flops + params is fitted to the paper; {left_out(predictions)}.")
    return Table(
        "Table 3: how near ratios are to each other",
        ("ratios", "against", "rank correlation", "mean error", "rows"),
        [
            [one, other, f"{each.spearman:.3f}", f"{each.error:.3f}", str(each.rows)]
            for one, other, each in found
        ],
        2,
        (
            "Over rows whose work differs from the baseline's; rank correlation is Spearman's.",
            *notes,
        ),
    )


def explanations(rows: Sequence[Row]) -> list[str]:
    """Of rows whose measured ratio is more than 0.15 from a predicted one."""
    return [row.explanation for row in rows if row.explanation]


def _scale(measurement: Measurement) -> list[str]:
    scale = SCALES.get(measurement.scale)
    changes = scale.changes() if scale else []
    if measurement.data:
        changes = [*changes, f"data and vocabulary are of {measurement.data}"]
    precision = f"precision {measurement.precision}: {PRECISIONS.get(measurement.precision, '')}"
    return [*(f"scale {measurement.scale}, {line}" for line in changes), precision]


def _parameters_table(rows: Sequence[Row]) -> Table:
    cells = [
        [
            row.name,
            row.prediction.paper_parameters,
            f"{row.prediction.parameters / 1e9:.3f}",
            f"{row.prediction.trainable / 1e9:.3f}",
            f"{row.prediction.flops / 1e15:.3f}",
        ]
        for row in rows
    ]
    headers = ("row", "paper, B", "parameters, B", "trainable, B", "PFLOP of a step")
    return Table("Table 3: parameters of the paper's models", headers, cells, 1)


def _parts_table(rows: Sequence[Row]) -> Table:
    cells = []
    for row in rows:
        parts = table3_parts.in_order(row.measurement.parts)
        total = sum(parts.values())
        if total:
            of_all = (f"{100 * each / total:.0f}" for each in parts.values())
            cells.append([row.name, f"{total:.3f}", *of_all])
    return Table(
        "Table 3: where a step's time goes, %",
        ("row", "s", *table3_parts.FORWARD),
        cells,
        1,
        (
            "Of steps of their own, forward by part; backward is of all parts, and the CSV has it "
            "by part. conditioning: cross-attention and the new layers around it. loss: with the "
            "product that makes logits. rest: in no part.",
        ),
    )


def every_4th(measurements: Sequence[Measurement], predictions: Sequence[Prediction]) -> str:
    """The paper's sentence about it, of what was measured here; empty if it wasn't."""
    by_name = {row.name: row for row in rows_of(measurements, predictions)}
    if _EVERY_4TH not in by_name:
        return ""
    row, scores = by_name[_EVERY_4TH], {each.row: each.paper_score for each in predictions}
    each, interval = row.measurement, row.measurement.interval
    faster = [100 * (1 / ratio - 1) for ratio in (each.ratio, interval.high, interval.low)]
    between = f" ({faster[1]:.0f} to {faster[2]:.0f} %)" if interval.confidence else ""
    return (
        f"New layers before every 4th layer, not before each, make steps {faster[0]:.0f} % faster "
        f"here{between}; the paper says "
        f"{100 * _PAPERS_SPEEDUP:.0f} % (section 3.3) and prints times that are "
        f"{100 * (1 / row.ratios.paper - 1):.0f} % apart, for an overall score of "
        f"{scores[_EVERY_4TH]} in place of {scores[BASELINE]}."
    )


def pareto(points: Sequence[tuple[float, float]]) -> list[int]:
    """Of (cost, score), those than which none is as cheap and as good, and one of both better."""
    return [
        index
        for index, point in enumerate(points)
        if not any(
            other[0] <= point[0] and other[1] >= point[1] and other != point for other in points
        )
    ]


def plot_tradeoff(measurements: Sequence[Measurement], predictions: Sequence[Prediction]) -> Any:
    """A figure: measured time, and memory, against the paper's score; the Pareto front is marked.

    Raises:
        ImportError: matplotlib is not installed.
    """
    pyplot = import_pyplot()
    rows = [
        row for row in rows_of(measurements, predictions) if row.prediction.paper_score is not None
    ]
    base = next((row for row in rows if row.name == BASELINE), None)
    figure, axes = pyplot.subplots(2, 1, figsize=(7, 8.6), layout="constrained")
    memory = base.measurement.peak_bytes if base else 0
    panels = [("measured step time over the baseline's", lambda row: row.measurement.ratio)]
    if memory:
        panels.append(
            (
                "measured peak memory over the baseline's",
                lambda row: row.measurement.peak_bytes / memory,
            )
        )
    else:
        axes[1].set_visible(False)
    for axis, (label, cost) in zip(axes, panels, strict=False):
        points = [(cost(row), row.prediction.paper_score or 0.0) for row in rows]
        front = sorted(pareto(points), key=lambda index: points[index])
        axis.plot(
            [points[i][0] for i in front],
            [points[i][1] for i in front],
            color="C1",
            drawstyle="steps-post",
            lw=1,
            label="Pareto front",
        )
        for index, (row, (x, y)) in enumerate(zip(rows, points, strict=True)):
            axis.plot(x, y, "o", color="C1" if index in front else "C0", ms=5)
            axis.annotate(row.name, (x, y), xytext=(4, 3), textcoords="offset points", fontsize=7)
        if label.startswith("measured step"):
            for row, (_, y) in zip(rows, points, strict=True):
                interval = row.measurement.interval
                axis.hlines(y, interval.low, interval.high, color="C0", lw=0.8)
        axis.set_xlabel(label, fontsize=8)
        axis.set_ylabel("overall score (paper; not reproduced here)", fontsize=8)
        axis.tick_params(labelsize=8)
        axis.margins(x=0.15)
    axes[0].legend(fontsize=8, loc="lower right")
    return figure


def plot_ratios(measurements: Sequence[Measurement], predictions: Sequence[Prediction]) -> Any:
    """A figure: of each row the paper's ratio, the measured one and both predictions.

    Raises:
        ImportError: matplotlib is not installed.
    """
    rows = rows_of(measurements, predictions)
    intervals = [row.measurement.interval for row in rows]
    return _plot_ratios(
        [row.name for row in rows],
        [row.ratios.paper for row in rows],
        "flops here (predicted)",
        [row.measurement.flops_ratio for row in rows],
        [row.ratios.flops_and_parameters for row in rows],
        [
            (row.measurement.ratio, each.low, each.high)
            for row, each in zip(rows, intervals, strict=True)
        ],
    )


def plot_ratios_of_csv(path: str | Path) -> Any:
    """`plot_ratios` of what `write_csv` wrote.

    Raises:
        ImportError: matplotlib is not installed.
        OSError: the file can't be read.
        ValueError: it is no such file.
    """
    try:
        with open(path, newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
        if not rows:
            raise ValueError("no rows")
        return _plot_ratios(
            [row["row"] for row in rows],
            [float(row["paper_ratio"]) for row in rows],
            "flops here (predicted)",
            [float(row["flops_here_ratio"]) for row in rows],
            [float(row["flops_and_parameters_ratio"]) for row in rows],
            [(float(row["measured_ratio"]), float(row["low"]), float(row["high"])) for row in rows],
        )
    except (KeyError, TypeError, ValueError, csv.Error) as error:
        reason = one_line(error)
        raise ValueError(f"{path}: expected a table3.csv of a measurement: {reason}") from error


def plot_predicted_ratios(predictions: Sequence[Prediction]) -> Any:
    """The same without a measured one, of table 3's rows.

    Raises:
        ImportError: matplotlib is not installed.
    """
    of_row, rows = ratios(predictions), of_table3(predictions)
    numbers = [of_row[each.row] for each in rows]
    return _plot_ratios(
        [each.row for each in rows],
        [each.paper for each in numbers],
        "flops (predicted)",
        [each.flops for each in numbers],
        [each.flops_and_parameters for each in numbers],
    )


def _plot_ratios(
    names: Sequence[str],
    paper: Sequence[float],
    flops_label: str,
    flops: Sequence[float],
    fitted: Sequence[float],
    measured: Sequence[tuple[float, float, float]] = (),
) -> Any:
    """`measured`: ratios, and both ends of their intervals; may be empty."""
    pyplot = import_pyplot()
    figure, axis = pyplot.subplots(figsize=(8, 0.9 + 0.3 * len(names)), layout="constrained")
    places = range(len(names))
    series = {
        "paper": (paper, "D", "C3"),
        flops_label: (flops, "|", "C0"),
        "flops + params (fitted to the paper)": (fitted, "x", "C2"),
    }
    if measured:
        axis.errorbar(
            [value for value, _, _ in measured],
            places,
            xerr=(
                [value - low for value, low, _ in measured],
                [high - value for value, _, high in measured],
            ),
            fmt="o",
            color="C1",
            ms=5,
            lw=1,
            label="measured",
        )
    for label, (values, marker, color) in series.items():
        axis.plot(values, places, marker, color=color, label=label, ms=6, fillstyle="none")
    axis.set_yticks(places, names, fontsize=8)
    axis.invert_yaxis()
    axis.axvline(1, color="gray", lw=0.6)
    axis.set_xlabel("step time over the baseline's", fontsize=8)
    axis.tick_params(axis="x", labelsize=8)
    axis.grid(axis="y", lw=0.3)
    figure.legend(loc="outside lower center", ncols=4, fontsize=8)
    return figure


def write_csv(
    measurements: Sequence[Measurement], predictions: Sequence[Prediction], path: str | Path
) -> None:
    """A line for each row.

    Raises:
        OSError: the file can't be written.
    """
    names = sorted({name for each in measurements for name in each.parts})
    with open(path, "w", newline="") as file:
        writer = None
        for row in rows_of(measurements, predictions):
            each, interval, numbers = row.measurement, row.measurement.interval, row.ratios
            values: dict[str, Any] = {
                "row": row.name,
                "scale": each.scale,
                "precision": each.precision,
                "paper_ratio": numbers.paper,
                "measured_ratio": each.ratio,
                "low": interval.low,
                "high": interval.high,
                "confidence": interval.confidence,
                "pairs": len(each.seconds),
                "median_s": statistics.median(each.seconds),
                "baseline_median_s": statistics.median(each.baseline_seconds),
                "flops": each.flops.total,
                "flops_here_ratio": each.flops_ratio,
                "flops_ratio": numbers.flops,
                "flops_and_parameters_ratio": numbers.flops_and_parameters,
                "static_bytes": each.static_bytes,
                "step_bytes": each.step_bytes,
                "impl": each.impl if each.speedups else "",
                "speedup": statistics.median(each.speedups) if each.speedups else "",
                **{f"{name.replace(' ', '_')}_s": each.parts.get(name, 0.0) for name in names},
            }
            if writer is None:
                writer = csv.DictWriter(file, list(values), lineterminator="\n")
                writer.writeheader()
            writer.writerow(
                {k: f"{v:.6g}" if isinstance(v, float) else v for k, v in values.items()}
            )
