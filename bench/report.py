"""Results for people, as tables for the terminal and for markdown, and the files of a run."""

import dataclasses
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import rich.box
import rich.table
from rich.console import Console

from flamingo_fast.bench import attention, roofline
from flamingo_fast.bench.plan import BASELINE, Plan
from flamingo_fast.bench.plot import import_pyplot, plot, plot_growth
from flamingo_fast.bench.records import Environment, Measurement, read_csv, write_csv
from flamingo_fast.bench.registry import DTYPES, shape_name
from flamingo_fast.bench.run import Results

CSV_NAME = "results.csv"
_COMPARED = (BASELINE, "ours")


@dataclasses.dataclass(frozen=True)
class Table:
    """Columns from `first_number` on are numbers. `notes` stand below."""

    title: str
    headers: Sequence[str]
    rows: Sequence[Sequence[str]]
    first_number: int
    notes: Sequence[str] = ()

    def rich(self) -> rich.table.Table:
        """A section for each value of the first column."""
        table = rich.table.Table(
            title=self.title,
            title_justify="left",
            box=rich.box.SIMPLE_HEAD,
            caption="\n".join(self.notes),
            caption_justify="left",
        )
        for index, header in enumerate(self.headers):
            number = index >= self.first_number
            # Names that are too long are broken, for their ends tell variants apart.
            table.add_column(
                header, justify="right" if number else "left", no_wrap=number, overflow="fold"
            )
        for index, row in enumerate(self.rows):
            following = self.rows[index + 1 : index + 2]
            table.add_row(*row, end_section=any(next_row[0] != row[0] for next_row in following))
        return table

    def markdown(self) -> str:
        numbers = len(self.headers) - self.first_number
        rule = ["---"] * self.first_number + ["---:"] * numbers
        headers = [header.replace("\n", " ") for header in self.headers]
        lines = ["| " + " | ".join(cells) + " |" for cells in (headers, rule, *self.rows)]
        return "\n".join([f"## {self.title}", "", *lines, *_bullets(self.notes)])


def _bullets(notes: Sequence[str]) -> list[str]:
    return ["", *(f"- {note}" for note in notes)] if notes else []


def tables(results: Results) -> list[Table]:
    """The measured tables and, without a GPU, the predicted one."""
    found = [_ceilings(results), _measured(results.measurements), _cpu_time(results.measurements)]
    found.append(_not_run(results))
    if results.device.type != "cuda":
        found.append(predicted(results.plan))
    return [table for table in found if table.rows]


def _ceilings(results: Results) -> Table:
    rows = [
        [m.kernel, m.dtype, m.unit, digits(m.value.p50), _range(m)]
        for m in results.ceilings.measurements()
    ]
    return Table("Measured ceilings", ("", "dtype", "unit", "median", "p20 to p80"), rows, 3)


def _measured(measurements: Sequence[Measurement]) -> Table:
    by_case: dict[tuple[str, ...], dict[str, Measurement]] = {}
    for m in measurements:
        case = (m.kernel, m.shape, m.dtype, m.mode, m.provider)
        by_case.setdefault(case, {})[m.metric] = m
    on_gpu = any(m.metric == "cpu_time" for m in measurements)
    rows = [
        [
            *case,
            digits(found["time"].value.p50),
            _range(found["time"]),
            f"{found['speedup'].value.p50:.2f}" if "speedup" in found else "",
            digits(found["bandwidth"].value.p50),
            f"{found['of_copy_ceiling'].value.p50:.0f}",
            digits(found["peak_memory"].value.p50),
            digits(found["saved_for_backward"].value.p50) if "saved_for_backward" in found else "",
            *([digits(found["cpu_time"].value.p50)] if on_gpu else []),
        ]
        for case, found in by_case.items()
        if "time" in found
    ]
    return Table(
        "Measured",
        (
            *("op", "shape", "dtype", "mode", "provider"),
            *("ms", "p20 to p80", f"x vs {BASELINE}", "GB/s", "% of copy", "MB", "saved"),
            *(["CPU ms"] if on_gpu else []),
        ),
        rows,
        5,
        (
            f"x vs {BASELINE}: median of the ratios of paired rounds; above 1 is faster.",
            "GB/s: useful bytes (each input read and each output written once) over the time.",
            "MB: the most that a call holds at once, its results among it.",
            "saved: MB that a forward keeps for its backward, its inputs aside.",
            *(
                ["CPU ms: what starting a call takes; ms is of a GPU that never waits for it."]
                if on_gpu
                else []
            ),
        ),
    )


def _cpu_time(measurements: Sequence[Measurement]) -> Table:
    by_case: dict[tuple[str, ...], dict[str, Measurement]] = {}
    for m in measurements:
        if m.metric == "cpu_time_per_call":
            by_case.setdefault((m.kernel, m.shape, m.dtype, m.mode), {})[m.provider] = m
    rows = [
        [*case, *(digits(found[name].value.p50) if name in found else "" for name in _COMPARED)]
        for case, found in by_case.items()
    ]
    headers = ("op", "shape", "dtype", "mode", *(f"{name}, us" for name in _COMPARED))
    return Table("Measured CPU time of a call", headers, rows, 4)


def _not_run(results: Results) -> Table:
    rows = [
        [provider, reason, ", ".join(ops)]
        for (provider, reason), ops in results.unavailable.items()
    ]
    return Table("Not run", ("provider", "reason", "ops"), rows, 3)


def predicted(plan: Plan) -> Table:
    """What the plan's kernels and their eager compositions would take on GPUs, by the roofline."""
    rows = []
    for benchmark, shape, dtype in plan.cases:
        itemsize = DTYPES[dtype].itemsize
        for mode in plan.modes:
            ours = benchmark.work(shape, itemsize, mode)
            eager = benchmark.eager_work(shape, itemsize, mode)
            times = (
                digits(roofline.predicted_us(work, dtype, gpu))
                for gpu in roofline.GPUS
                for work in (ours, eager)
            )
            rows.append([benchmark.name, shape_name(shape), dtype, mode, *times])
    return Table(
        "Predicted GPU time in us, not measured",
        (
            *("op", "shape", "dtype", "mode"),
            *(f"{gpu.name}\n{name}" for gpu in roofline.GPUS for name in ("ours", BASELINE)),
        ),
        rows,
        4,
        (*roofline.ASSUMPTIONS, *(f"{gpu.name}: {gpu.source}" for gpu in roofline.GPUS)),
    )


def digits(value: float) -> str:
    """Three significant digits, without an exponent."""
    return f"{value:.0f}" if value >= 100 else f"{value:#.3g}"


def _range(m: Measurement) -> str:
    return f"{digits(m.value.p20)} to {digits(m.value.p80)}"


def show(results: Results) -> None:
    """Prints the tables, what is to be noted and what failed."""
    print_tables(results.environment, tables(results), results.notes, results.failures)


def print_tables(
    environment: Environment,
    tables: Sequence[Table],
    notes: Sequence[str],
    failures: Sequence[str],
) -> None:
    """Prints a run: on what, the tables, what is to be noted and what failed."""
    # Not a terminal: rich would fold the tables to 80 columns.
    console = Console(width=None if sys.stdout.isatty() else 180)
    console.print(str(environment), highlight=False)
    for table in tables:
        console.print(table.rich())
    for label, lines in (("Note", notes), ("FAILED", failures)):
        for line in lines:
            console.print(f"{label}: {line}", highlight=False, markup=False)


def prepare(out: Path) -> None:
    """Finds out before anything is measured whether `write` can work.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: `out` can't be written to, or its results.csv is not one of this version.
    """
    import_pyplot()
    check_out(out)


def check_out(out: Path) -> None:
    """Makes the folder.

    Raises:
        ValueError: as `prepare`.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=out).close()
        read_csv(out / CSV_NAME)
    except OSError as error:
        raise ValueError(f"out: can't write to {out}: {error}") from error


def write(results: Results, out: Path) -> list[Path]:
    """Writes results.csv, where rows of other runs stay, and this run's report.md and plot.

    The plot is report.png; of a run against sizes growth.png of masked_cross_attention, and
    growth_<variant>.png of its variants.
    """
    csv, markdown = out / CSV_NAME, out / "report.md"
    write_csv(csv, results.measurements, results.environment)
    markdown.write_text(
        document(results.environment, results.failures, results.notes, tables(results)),
        encoding="utf-8",
    )
    if not results.plan.growth:
        plot(results, out / "report.png")
        return [csv, markdown, out / "report.png"]
    images = []
    for benchmark in results.plan.benchmarks:
        images.append(out / f"growth{benchmark.name.removeprefix(attention.NAME)}.png")
        plot_growth(results, benchmark.name, images[-1])
    return [csv, markdown, *images]


def document(
    environment: Environment,
    failures: Sequence[str],
    notes: Sequence[str],
    tables: Sequence[Table],
) -> str:
    """A run in markdown."""
    parts = ["# Benchmark", str(environment)]
    for title, lines in (("Failed", failures), ("Notes", notes)):
        if lines:
            parts.append("\n".join([f"## {title}", *_bullets(lines)]))
    parts += [table.markdown() for table in tables]
    return "\n\n".join(parts) + "\n"
