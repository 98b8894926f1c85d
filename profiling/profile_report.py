"""`flamingo-fast profile report`: from the files of a profiler to tables, a page and CSV files."""

import csv
import dataclasses
from collections.abc import Sequence
from pathlib import Path

from flamingo_fast.bench.section import Figure, Section
from flamingo_fast.bench.tables import Table
from flamingo_fast.profiling import report_tables
from flamingo_fast.profiling.analysis import (
    Analysis,
    analyse,
    by_kind,
    changes,
    kernel_changes,
    range_changes,
)
from flamingo_fast.profiling.ncu_trace import Launch, mean_times, read_ncu
from flamingo_fast.profiling.nsys_trace import read_nsys
from flamingo_fast.profiling.recorded_session import RecordedSession, locate
from flamingo_fast.profiling.report_tables import Rows
from flamingo_fast.profiling.torch_trace import read_torch_trace
from flamingo_fast.profiling.traces import ReportError

# Of a table on the terminal and the page; CSV files have all rows.
_MOST_ROWS = 60


@dataclasses.dataclass(frozen=True)
class Kernels:
    """What ncu measured."""

    path: Path
    session: RecordedSession
    launches: list[Launch]


@dataclasses.dataclass
class Report:
    """`rows` are by the names of CSV files, without suffix."""

    sections: list[Section]
    rows: dict[str, Rows]
    analyses: list[Analysis]


def read(path: Path) -> Analysis | Kernels:
    """What `path` has: a session's folder, its session.json, or a profiler's file.

    Raises:
        ReportError: in one line what is wrong with it, and what was expected.
    """
    file, session = locate(path)
    suffixes = file.suffixes[-2:] if file.suffix == ".gz" else file.suffixes[-1:]
    suffix = "".join(suffixes)
    try:
        if suffix in (".nsys-rep", ".qdstrm", ".sqlite"):
            return analyse(read_nsys(file, session), session)
        if suffix in (".json", ".json.gz"):
            return analyse(read_torch_trace(file, session), session)
        if suffix in (".ncu-rep", ".csv"):
            return Kernels(file, session, read_ncu(file))
    except OSError as error:
        raise ReportError(f"{file}: can't be read: {error.strerror or error}") from error
    raise ReportError(
        f"{path}: expected a session's folder, .nsys-rep, .qdstrm, .sqlite, .ncu-rep, .csv of ncu, "
        ".json or .json.gz of torch.profiler"
    )


def report(paths: Sequence[Path], *, pictures: bool = False) -> Report:
    """Of one or two traces and of one or two reports of ncu; two are compared, in this order.

    Arguments:
        pictures: draw timelines, which takes seconds and matplotlib.

    Raises:
        ReportError: a file can't be reported on, or there are three of a sort.
        ImportError: matplotlib is not installed; names the extra.
    """
    if pictures:
        # Brings all benchmarks with it.
        from flamingo_fast.bench.plot import import_pyplot

        import_pyplot()
    found = [read(path) for path in paths]
    analyses = [each for each in found if isinstance(each, Analysis)]
    kernels = [each for each in found if isinstance(each, Kernels)]
    if len(analyses) > 2 or len(kernels) > 2:
        raise ReportError(
            f"expected one file, or two to compare, got {len(analyses)} traces and "
            f"{len(kernels)} of ncu: {', '.join(map(str, paths))}"
        )
    result = Report([Section("summary", "Summary")], {}, analyses)
    for index, analysis in enumerate(analyses):
        _add_trace(result, analysis, f"_{index + 1}" if len(analyses) > 1 else "", pictures)
    for index, of_ncu in enumerate(kernels):
        _add_ncu(result, of_ncu, f"_{index + 1}" if len(kernels) > 1 else "")
    if len(analyses) == 2:
        _add_difference(result, *analyses)
    if len(kernels) == 2:
        _add_ncu_difference(result, *kernels)
    result.sections[0].sentences = [s for each in result.sections for s in each.sentences]
    return result


def _add_trace(result: Report, analysis: Analysis, suffix: str, pictures: bool) -> None:
    # Ids of plots are made of it.
    section = Section(f"trace{suffix}", str(analysis.trace.path))
    section.sentences = [_sentence(analysis)]
    section.notes += analysis.trace.notes
    result.rows |= {f"ranges{suffix}": report_tables.range_rows(analysis, analysis.ranges)}
    kinds = by_kind(analysis.ranges)
    section.tables.append(report_tables.range_table(analysis, kinds, "Ranges by kind"))
    # A range is as long as those inside, so that the longest are a tree, too.
    least = sorted((each.total_ns for each in analysis.ranges), reverse=True)[:_MOST_ROWS][-1]
    longest = [each for each in analysis.ranges if each.total_ns >= least]
    title = "Ranges" if len(longest) == len(analysis.ranges) else "Longest ranges"
    section.tables.append(report_tables.range_table(analysis, longest, title))
    if analysis.kernels:
        section.tables += [
            report_tables.kernel_table(analysis),
            report_tables.gap_table(analysis),
            report_tables.launch_bound_table(analysis),
        ]
        result.rows |= {
            f"kernels{suffix}": report_tables.kernel_rows(analysis),
            f"gpu_gaps{suffix}": report_tables.gap_rows(analysis),
            f"launch_bound{suffix}": report_tables.range_rows(analysis, analysis.launch_bound),
        }
    else:
        section.notes.append("There is no GPU work in it, so no kernels, gaps and launches.")
    section.tables = [_cut(table) for table in section.tables if table.rows]
    if pictures:
        from flamingo_fast.profiling.timeline import draw

        caption = "The step that is nearest to the median; names without indices and shapes."
        section.figures.append(Figure.of(f"timeline{suffix}", caption, draw(analysis)))
    result.sections.append(section)


def _sentence(analysis: Analysis) -> str:
    median = f"{analysis.step_s * 1e3:.4g} ms"
    ours = f"{analysis.trace.path}: {analysis.steps} steps, the median {median}"
    if driver := analysis.driver_s:
        apart = f"{abs(analysis.step_s / driver - 1):.1%}"
        ours += f" ({driver * 1e3:.4g} ms by the driver's clock, {apart} apart)"
        if len(analysis.session.step_s) != analysis.steps:
            ours += f", which has {len(analysis.session.step_s)} steps"
    return f"{ours}; ranges inside cover {analysis.covered:.1%} of it."


def _cut(table: Table) -> Table:
    """Without rows at the end, of which a note tells."""
    more = len(table.rows) - _MOST_ROWS
    if more <= 0:
        return table
    note = f"{more} more rows are in the CSV files of --out."
    return dataclasses.replace(table, rows=table.rows[:_MOST_ROWS], notes=(*table.notes, note))


def _add_ncu(result: Report, found: Kernels, suffix: str) -> None:
    section = Section("ncu", str(found.path))
    section.sentences = [f"{found.path}: {len(found.launches)} launches of kernels."]
    section.tables = [_cut(report_tables.launch_table(found.launches, found.session))]
    result.rows[f"ncu{suffix}"] = report_tables.launch_rows(found.launches, found.session)
    result.sections.append(section)


def _add_difference(result: Report, before: Analysis, after: Analysis) -> None:
    ratio = after.step_s / before.step_s
    section = Section("difference", "Difference")
    section.sentences = [
        f"{before.trace.path} to {after.trace.path}: the median step from "
        f"{before.step_s * 1e3:.4g} to {after.step_s * 1e3:.4g} ms, {ratio:.3f} times as long."
    ]
    for name, of, found in (
        ("ranges", "Difference by range", range_changes(before, after)),
        ("kernels", "Difference by kernel", kernel_changes(before, after)),
    ):
        if found:
            section.tables.append(_cut(report_tables.change_table(of, found)))
            result.rows[f"diff_{name}"] = report_tables.change_rows(found)
    result.sections.append(section)


def _add_ncu_difference(result: Report, before: Kernels, after: Kernels) -> None:
    """Of the mean time of a launch."""
    found = changes(*(mean_times(each.launches) for each in (before, after)))
    section = Section("difference", "Difference of kernels that ncu profiled")
    note = "Of a mean launch."
    section.tables = [_cut(report_tables.change_table("Difference by kernel", found, note))]
    result.rows["diff_ncu"] = report_tables.change_rows(found)
    result.sections.append(section)


def write(result: Report, out: Path, command: str) -> list[Path]:
    """index.html, a CSV file for each table and timeline*.png in the folder `out`.

    Raises:
        OSError: that can't be written.
        ImportError: Jinja is not installed; names the extra.
    """
    try:
        from flamingo_fast.bench import page
    except ModuleNotFoundError:
        extra = "pip install 'flamingo_fast[bench]'"
        raise ImportError(f"the page needs Jinja: {extra}") from None
    out.mkdir(parents=True, exist_ok=True)
    sessions = dict.fromkeys(str(each.session) for each in result.analyses)
    title = "flamingo_fast profile"
    written = [out / "index.html"]
    text = page.html("; ".join(filter(None, sessions)), command, result.sections, title)
    written[0].write_text(text, encoding="utf-8")
    for name, (header, rows) in result.rows.items():
        written.append(out / f"{name}.csv")
        with written[-1].open("w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([header, *rows])
    for figure in (each for section in result.sections for each in section.figures):
        written.append(out / f"{figure.name}.png")
        written[-1].write_bytes(figure.png)
    return written
