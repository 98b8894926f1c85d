"""Runs suites one after another, and writes one report of what they found.

It is written anew after each suite, so that what is finished is kept whatever comes after.
"""

import dataclasses
import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from flamingo_fast.bench import page, records
from flamingo_fast.bench.plan import BASELINE
from flamingo_fast.bench.plot import import_pyplot
from flamingo_fast.bench.records import Environment
from flamingo_fast.bench.section import Ratio, Section, median_half_width
from flamingo_fast.bench.settings import Settings
from flamingo_fast.bench.suites import SUITES, sections
from flamingo_fast.bench.table3_suite import STEP_TIME
from flamingo_fast.bench.tables import Table, bullets

SCHEMA = 1
CSV_NAME, JSON_NAME, PAGE_NAME, MARKDOWN_NAME = (
    *("results.csv", "results.json"),
    *("index.html", "report.md"),
)


@dataclasses.dataclass
class Report:
    """What suites found, so far.

    Attributes:
        command: that made it, for people.
    """

    environment: Environment
    command: str
    sections: list[Section] = dataclasses.field(default_factory=list)

    @property
    def failures(self) -> list[str]:
        return [line for section in self.sections for line in section.failures]

    @property
    def is_interrupted(self) -> bool:
        return any(section.is_interrupted for section in self.sections)

    @property
    def ratios(self) -> list[Ratio]:
        return [ratio for section in self.sections for ratio in section.ratios]

    @property
    def summary(self) -> Section:
        """Headline ratios, Amdahl's table, what was not measured."""
        found = Section("summary", "Summary")
        if self.is_interrupted:
            found.failures.append("interrupted: what follows was not measured")
        found.sentences = [each for section in self.sections for each in section.sentences]
        ratios = [each for each in self.ratios if each.of != STEP_TIME]
        if ratios:
            found.tables.append(_ratios_table(ratios))
        if amdahl := _amdahl(self):
            found.tables.append(amdahl)
        sure = [each for each in self.ratios if each.is_sure]
        if (width := median_half_width(sure)) is not None:
            found.notes.append(
                f"The median half-width of {len(sure)} intervals is {width:.1%} of the ratio; "
                "intervals of a confidence below 90 % are left out."
            )
        rows = list(
            dict.fromkeys(pair for section in self.sections for pair in section.not_measured)
        )
        if rows:
            found.tables.append(
                Table("Not measured, and why", ("what", "why"), [[*row] for row in rows], 2)
            )
        return found


def _ratios_table(ratios: Sequence[Ratio]) -> Table:
    return Table(
        "Ratios",
        ("case", "ratio", "of", "interval", "pairs"),
        [
            [
                each.name,
                f"{each.value:.2f}",
                each.of,
                f"{each.low:.2f} - {each.high:.2f}",
                str(each.pairs),
            ]
            for each in ratios
        ],
        3,
        (
            "Medians of the ratios of calls in the same round, above 1 is faster; an interval of "
            "that median, of ranks, has a confidence of 99 % or what the number of pairs allows.",
        ),
    )


def _amdahl(report: "Report") -> Table | None:
    """What a kernel's gain leaves of a block's, and that of a model's.

    The kernel's share of the eager block's time bounds what the block gains by it alone.
    """
    chosen = {each.level: each for each in report.ratios if each.level}
    if not {"kernel", "block"} <= chosen.keys():
        return None
    kernel, block = chosen["kernel"], chosen["block"]
    eager = {
        f"{m.kernel} {m.shape} {m.dtype} {m.mode}": m.value.p50
        for section in report.sections
        for m in section.measurements
        if m.provider == BASELINE and m.metric == "time"
    }
    share = eager[kernel.name] / eager[block.name]
    bound = 1 / (1 - share + share / kernel.value)
    rows = [
        ["kernel", kernel.name, *_cells(kernel), ""],
        ["block around it", block.name, *_cells(block), f"{share:.0%}, {bound:.2f}"],
    ]
    if model := chosen.get("model"):
        rows.append(["model around that", model.name, *_cells(model), ""])
    return Table(
        "From kernel to model (Amdahl)",
        ("level", "case", "x", "interval", "kernel's share, gain by it alone"),
        rows,
        2,
        (
            f"x: over {BASELINE}, which is OpenFlamingo's code of each. kernel's share: of the "
            "eager block's time; gain by it alone: of the block, if nothing else were faster. The "
            "rest is linear layers, which are the same for all.",
        ),
    )


def _cells(ratio: Ratio) -> list[str]:
    return [f"{ratio.value:.2f}", f"{ratio.low:.2f} - {ratio.high:.2f}"]


def default_out() -> Path:
    """results/<utc>-<commit> of the checkout, or bench_results."""
    return records.results_folder() if records.IN_CHECKOUT else Path("bench_results")


def prepare(out: Path) -> None:
    """Finds out before anything is measured whether `write` can work, and makes the folder.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: `out` can't be written to, or its results.csv is not one of this version.
    """
    import_pyplot()
    try:
        out.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=out).close()
        records.read_csv(out / CSV_NAME)
    except OSError as error:
        raise ValueError(f"out: can't write to {out}: {error}") from error


def run(
    names: Sequence[str],
    settings: Settings,
    command: str,
    progress: Callable[[str, float], None] = lambda text, share: None,
) -> Iterator[Report]:
    """Gives the report after each section; it ends with the first that is interrupted.

    Arguments:
        names: of suites.
        progress: is told what runs, and which part of all is done, in seconds as estimated.
    """
    report = Report(records.environment(settings.device), command)
    estimates = {name: max(SUITES[name].seconds(settings), 1e-3) for name in names}
    total, done = sum(estimates.values()), 0.0
    for name in names:

        def tell(text: str, share: float, name: str = name, done: float = done) -> None:
            progress(text, (done + share * estimates[name]) / total)

        start = time.perf_counter()
        for section in sections(SUITES[name], settings, tell):
            now = time.perf_counter()
            section.seconds, start = now - start, now
            _add(report, section)
            yield report
            if section.is_interrupted:
                return
        done += estimates[name]


def _add(report: Report, section: Section) -> None:
    """Names of sections, and of files of plots, differ."""
    names = [each.name for each in report.sections]
    if section.name in names:
        count = sum(each.partition("-")[0] == section.name for each in names) + 1
        section.name = f"{section.name}-{count}"
        section.figures = [
            dataclasses.replace(each, name=f"{each.name}-{count}") for each in section.figures
        ]
    report.sections.append(section)


def write(report: Report, out: Path) -> list[Path]:
    """The page, the same in markdown, and numbers as JSON and CSV; plots as PNG beside it.

    In results.csv rows of other runs stay.
    """
    paths = []
    rows = [row for section in report.sections for row in section.measurements]
    records.write_csv(out / CSV_NAME, rows, report.environment)
    paths.append(out / CSV_NAME)
    paths.append(out / JSON_NAME)
    records.replace(paths[-1], json.dumps(_to_dict(report), indent=1).encode())
    sections = [report.summary, *report.sections]
    return paths + write_pages(
        out, report.environment, report.command, sections, "flamingo_fast benchmarks"
    )


def write_pages(
    out: Path,
    environment: Environment | str,
    command: str,
    sections: Sequence[Section],
    title: str,
) -> list[Path]:
    """The HTML page, the same in markdown, and plots as PNG beside it.

    Arguments:
        sections: as `page.html` takes them.
    """
    contents = {
        f"{figure.name}.png": figure.png for section in sections for figure in section.figures
    }
    contents[MARKDOWN_NAME] = markdown(environment, command, sections, title).encode()
    contents[PAGE_NAME] = page.html(environment, command, sections, title).encode()
    for name, data in contents.items():
        records.replace(out / name, data)
    return [out / name for name in contents]


def _to_dict(report: Report) -> dict[str, Any]:
    return {
        "schema": SCHEMA,
        "environment": dataclasses.asdict(report.environment),
        "command": report.command,
        "is_interrupted": report.is_interrupted,
        "failures": report.failures,
        "ratios": [dataclasses.asdict(each) for each in report.ratios],
        "sections": [
            {
                "name": section.name,
                "seconds": section.seconds,
                "is_interrupted": section.is_interrupted,
                "sentences": section.sentences,
                "notes": section.notes,
                "failures": section.failures,
                "tables": [dataclasses.asdict(each) for each in section.tables],
                "not_measured": section.not_measured,
            }
            for section in report.sections
        ],
    }


def markdown(
    environment: Environment | str, command: str, sections: Sequence[Section], title: str
) -> str:
    """The page's contents, as `page.html` takes them; figures are PNGs beside it."""
    parts = [f"# {title}", str(environment), f"`{command}`"]
    for section in sections:
        parts.append(f"# {section.title}")
        for heading, lines in (
            ("", section.sentences if section.name == "summary" else ()),
            ("## Failed", section.failures),
            ("## Notes", section.notes),
        ):
            if lines:
                parts.append("\n".join([heading, *bullets(lines)]).strip("\n"))
        parts += [table.markdown() for table in section.tables]
        parts += [f"![{figure.caption}]({figure.name}.png)" for figure in section.figures]
    return "\n\n".join(parts) + "\n"


def show(report: Report) -> None:
    """Prints it, but for what the page alone has room for."""
    # Not a terminal: rich would fold the tables to 80 columns.
    console = Console(width=None if sys.stdout.isatty() else 200)
    console.print(str(report.environment), highlight=False)
    summary = report.summary
    for section in (*report.sections, summary):
        for table in section.tables:
            console.print(table.rich())
        for label, lines in (
            # The summary has all sections'.
            ("", section.sentences if section is summary else ()),
            ("Note: ", section.notes),
            ("FAILED: ", section.failures),
        ):
            for line in lines:
                console.print(f"{label}{line}", highlight=False, markup=False)


@dataclasses.dataclass(frozen=True)
class Earlier:
    """A report that was written: its environment, and ratios by name and what is divided."""

    environment: Environment
    ratios: dict[str, Ratio]


def read(path: Path) -> Earlier:
    """Of a results.json or the folder that has it.

    Raises:
        ValueError: there is none, or it is of another version.
    """
    file = path / JSON_NAME if path.is_dir() else path
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
        if values["schema"] != SCHEMA:
            raise ValueError(f"schema {values['schema']}, expected {SCHEMA}")
        found = [Ratio(**each) for each in values["ratios"]]
        environment = Environment(**values["environment"])
    except (OSError, UnicodeDecodeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: expected a report of bench: {error}") from error
    return Earlier(environment, {f"{each.name}, {each.of}": each for each in found})


def compare(first: Path, second: Path) -> tuple[Table, float]:
    """Ratios of two runs side by side, and the share of them whose intervals overlap.

    Raises:
        ValueError: as `read`; they have no ratio in common.
    """
    one, other = read(first), read(second)
    names = [name for name in one.ratios if name in other.ratios]
    if not names:
        raise ValueError(f"{second}: expected ratios of the same cases as {first}, got none")
    pairs = [(one.ratios[name], other.ratios[name]) for name in names]
    agree = [a.agrees_with(b) for a, b in pairs]
    within = [b.low <= a.value <= b.high for a, b in pairs]
    rows = [
        [
            name,
            *(f"{each.value:.3f}" for each in pair),
            *(f"{each.low:.3f} - {each.high:.3f}" for each in pair),
            "yes" if same else "no",
        ]
        for name, pair, same in zip(names, pairs, agree, strict=True)
    ]
    share = sum(agree) / len(names)
    notes = [
        f"{sum(agree)} of {len(names)} intervals overlap ({share:.0%}); {sum(within)} of the first "
        "run's medians lie in the second's intervals.",
        f"first: {one.environment}",
        f"second: {other.environment}",
    ]
    widths = [median_half_width(list(each.ratios.values())) for each in (one, other)]
    if None not in widths:
        notes.insert(1, "Median half-width: " + ", ".join(f"{width:.1%}" for width in widths))
    for which, mine, theirs in (("first", one, other), ("second", other, one)):
        if alone := [name for name in mine.ratios if name not in theirs.ratios]:
            notes.append(f"Only in the {which}: {'; '.join(alone)}")
    headers = ("ratio", "first", "second", "interval", "interval", "agree")
    return Table("Two runs", headers, rows, 1, notes), share
