"""Every promise of the project beside what shows it: tests, commands, files with numbers.

Tests are run in one call of pytest, or were: then junit files say how they ended. One that did not
run is a failure, unless `--sample` may have left it out.
"""

import collections
import dataclasses
import os
import shlex
import subprocess
import sys
import xml.etree.ElementTree
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import torch

from flamingo_fast.bench import promises as promises_
from flamingo_fast.bench import records, runner, table3, table3_report
from flamingo_fast.bench.promises import KINDS, Area, Evidence, Promise
from flamingo_fast.bench.section import Figure, Section
from flamingo_fast.bench.tables import Table

FOLDER = Path("docs", "promises")
TABLE3 = Path("bench", "data", "table3_mini.csv")
JUNIT_NAME = "junit.xml"
_COMMAND_LIMIT_S = 120
_NOT_RUN, _LEFT_OUT = "not run", "not in this sample"
# How a row's evidence ended, the first that any of it has.
_ENDS = ("failed", "passed", "recorded", "skipped", _LEFT_OUT, _NOT_RUN)


@dataclasses.dataclass(frozen=True)
class Outcome:
    """How evidence ended: one of _ENDS, and what there is to say of it."""

    end: str
    detail: str = ""


@dataclasses.dataclass(frozen=True)
class Row:
    """A promise, and how each of its evidence ended."""

    promise: Promise
    outcomes: Sequence[Outcome]

    @property
    def failures(self) -> list[str]:
        failed = [each.detail for each in self.outcomes if each.end == "failed"]
        return [*self.promise.problems, *failed]

    @property
    def result(self) -> str:
        ends = {each.end for each in self.outcomes}
        found = next((end for end in _ENDS if end in ends), _NOT_RUN)
        if self.failures:
            return "failed"
        return f"short; {found}" if self.promise.short else found


def verify(
    root: Path,
    unknown: Callable[[Sequence[str]], str],
    junit: Sequence[Path] = (),
    pytest_arguments: Sequence[str] = (),
    measured: Path | None = None,
    out: Path | None = None,
    command: str = "flamingo-fast verify",
) -> int:
    """Checks all promises, writes report.md and index.html, prints what they come to.

    Arguments:
        root: of a checkout.
        unknown: as of `promises.check`.
        junit: XML files of pytest, or folders of such, of runs that there were; else tests run now.
        pytest_arguments: of that run, beside the tests.
        measured: a table3.csv for the figure; by default that of bench/data, and without it
            predictions alone are drawn.
        out: default: build/verify of the checkout.

    Returns:
        1 if a promise has no evidence, or some of it failed; else 0.

    Raises:
        ImportError: an extra is not installed.
        OSError: a file can't be read or written.
        ValueError: promises, junit files or `measured` are none, or pytest could not run.
    """
    out = out or root / "build" / "verify"
    out.mkdir(parents=True, exist_ok=True)
    if measured is None and (root / TABLE3).is_file():
        measured = root / TABLE3
    figure = _figure(measured)
    areas = promises_.read(root / FOLDER)
    rows = promises_.of(areas)
    promises_.check(rows, root, unknown)
    tests = list(dict.fromkeys(e.test for each in rows for e in each.evidence if e.test))
    tests = [each for each in tests if (root / _file(each)).is_file()]
    if junit:
        ended = read_junit(junit, root)
    else:
        known = collect(root, tests)
        there = [each for each in tests if _of(each, known)]
        ended = _run_tests(root, there, pytest_arguments, out / JUNIT_NAME)
    missing = [each for each in tests if not _of(each, ended)]
    sampled = collect(root, missing, "-m", "matrix")
    outcomes = {each: _outcome_of_test(each, ended, sampled) for each in tests}
    sound = [each for each in rows if not each.problems]
    commands = dict.fromkeys(e.command for each in sound for e in each.evidence if e.run)
    ran = {each: _run_command(each, root) for each in commands}

    def outcome(evidence: Evidence) -> Outcome:
        if evidence.test:
            # Without its file the row has that as a problem.
            return outcomes.get(evidence.test, Outcome(_NOT_RUN))
        if evidence.file:
            return Outcome("recorded")
        return ran.get(evidence.command, Outcome(_NOT_RUN))

    table = [
        (area, [Row(each, [outcome(e) for e in each.evidence]) for each in area.promises])
        for area in areas
    ]
    summary = _summary(table, figure)
    sections = [summary, *(_section(*each) for each in table)]
    environment = records.environment(torch.device("cpu"))
    paths = runner.write_pages(out, environment, command, sections, "flamingo_fast promises")
    for line in (*(f"FAILED {each}" for each in summary.failures), *summary.sentences):
        print(line)
    print(*paths, sep="\n")
    return 1 if summary.failures else 0


def _file(test: str) -> str:
    return test.partition("::")[0]


# Of files of tests: how each of their items, by node id, ended; nothing where it is not known.
_Items = dict[str, dict[str, str]]


def _of(test: str, items: _Items) -> dict[str, str]:
    """Those of a node id, with all its parameters."""
    found = items.get(_file(test), {})
    # A file that was skipped, or could not be imported, is an item of its own.
    if "::" not in test or found.keys() == {_file(test)}:
        return found
    starts = (f"{test}[", f"{test}::")
    return {each: end for each, end in found.items() if each == test or each.startswith(starts)}


def collect(root: Path, tests: Iterable[str], *options: str) -> _Items:
    """All items of the files of tests, of all samples, that options of pytest leave.

    Raises:
        ValueError: pytest can't collect them.
    """
    files = sorted(set(map(_file, tests)))
    if not files:
        return {}
    result = subprocess.run(
        [*_pytest(root), "--collect-only", "-q", *options, *files],
        cwd=root,
        env=_environment(root),
        capture_output=True,
        text=True,
    )
    if result.returncode not in (0, 5):
        last = "\n".join((result.stdout + result.stderr).strip().splitlines()[-15:])
        raise ValueError(f"pytest can't collect {' '.join(files)}:\n{last}")
    items: _Items = {}
    for line in result.stdout.splitlines():
        if "::" in line and _file(line) in files:
            items.setdefault(_file(line), {})[line] = ""
    return items


def _run_tests(root: Path, tests: Sequence[str], arguments: Sequence[str], file: Path) -> _Items:
    """Raises ValueError if pytest ends without results."""
    if not tests:
        return {}
    file.unlink(missing_ok=True)
    # A file that is run as a whole has its tests already.
    whole = {each for each in tests if "::" not in each}
    chosen = [each for each in tests if each in whole or _file(each) not in whole]
    program = [*_pytest(root), "-q", f"--junitxml={file.resolve()}", *arguments, *chosen]
    code = subprocess.run(program, cwd=root, env=_environment(root)).returncode
    # 1: some failed, 5: the sample has none of them.
    if code not in (0, 1, 5) or not file.exists():
        raise ValueError(f"pytest: expected exit code 0 or 1, got {code}")
    ended = read_junit([file], root)
    if code == 1 and not any("failed" in each.values() for each in ended.values()):
        raise ValueError("pytest: exit code 1, and no test failed")
    return ended


def _pytest(root: Path) -> list[str]:
    return [sys.executable, "-m", "pytest", f"--rootdir={root}"]


def _environment(root: Path) -> dict[str, str]:
    path = [str(root), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(path)}


def read_junit(paths: Iterable[Path], root: Path) -> _Items:
    """How items ended that were run: "passed", "failed" or "skipped"; the worst of several runs.

    One that was skipped in a run and passed in another has passed.

    Raises:
        ValueError: a file is none of pytest's, a folder has none, or no test ran.
    """
    rank = {"skipped": 0, "passed": 1, "failed": 2}
    items: _Items = {}
    for path in paths:
        files = sorted(path.glob("*.xml")) if path.is_dir() else [path]
        for file in files:
            try:
                cases = list(xml.etree.ElementTree.parse(file).iter("testcase"))
            except (OSError, xml.etree.ElementTree.ParseError) as error:
                raise ValueError(f"{file}: expected a junit file of pytest: {error}") from error
            for case in cases:
                item, end = _item(case, root), _end(case)
                found = items.setdefault(_file(item), {})
                if rank[end] >= rank.get(found.get(item, ""), -1):
                    found[item] = end
    if not items:
        raise ValueError(f"{', '.join(map(str, paths))}: expected tests that ran, got none")
    return items


def _item(case: xml.etree.ElementTree.Element, root: Path) -> str:
    """The node id: pytest writes a file and its classes as names with dots."""
    name = case.get("name", "")
    parts = [each for each in case.get("classname", "").split(".") if each]
    for length in range(len(parts), 0, -1):
        file = Path(*parts[:length]).with_suffix(".py")
        if (root / file).is_file():
            return "::".join([file.as_posix(), *parts[length:], name])
    # A file that can't be imported is a case without a class, with its own name.
    file = Path(*name.split(".")).with_suffix(".py")
    return file.as_posix()


def _end(case: xml.etree.ElementTree.Element) -> str:
    if case.find("failure") is not None or case.find("error") is not None:
        return "failed"
    return "skipped" if case.find("skipped") is not None else "passed"


def _outcome_of_test(test: str, ended: _Items, sampled: _Items) -> Outcome:
    counts = collections.Counter(_of(test, ended).values())
    if failed := counts["failed"]:
        first = next(each for each, end in _of(test, ended).items() if end == "failed")
        return Outcome("failed", f"{failed} of {counts.total()} failed: {first}")
    if counts["passed"]:
        return Outcome("passed", f"{counts['passed']} passed")
    if counts:
        return Outcome("skipped", f"{counts.total()} skipped")
    # Of those that aren't parametrised no sample leaves one out.
    if any("[" in each for each in _of(test, sampled)):
        return Outcome(_LEFT_OUT)
    return Outcome("failed", f"{test}: there is no such test, or it did not run")


# Commands


def _run_command(command: str, root: Path) -> Outcome:
    arguments = shlex.split(command)[1:]
    try:
        result = subprocess.run(
            [sys.executable, "-m", "flamingo_fast.cli", *arguments],
            cwd=root,
            env=_environment(root),
            capture_output=True,
            text=True,
            timeout=_COMMAND_LIMIT_S,
        )
    except subprocess.TimeoutExpired:
        return Outcome("failed", f"{command}: took longer than {_COMMAND_LIMIT_S} s")
    if result.returncode == 0:
        return Outcome("passed", "exits with 0")
    last = (result.stdout + result.stderr).strip().splitlines()[-1:]
    return Outcome("failed", f"{command}: exit code {result.returncode} {' '.join(last)}")


# The report


def _figure(measured: Path | None) -> Figure:
    """Table 3, as measured in `measured`, or as predicted.

    Raises ImportError, OSError and ValueError.
    """
    if measured is not None:
        what, drawn = "measured and predicted", table3_report.plot_ratios_of_csv(measured)
    else:
        what = "and predicted; no measured ones were given"
        drawn = table3_report.plot_predicted_ratios(table3.predict())
    caption = f"Table 3: step times over the baseline's, the paper's, {what}"
    return Figure.of("table3", caption, drawn)


def _summary(table: Sequence[tuple[Area, Sequence[Row]]], figure: Figure) -> Section:
    rows = [row for _, of_area in table for row in of_area]
    short = [row.promise for row in rows if row.promise.short]
    failed = [row for row in rows if row.failures]
    counts = collections.Counter(row.promise.kind for row in rows)
    section = Section("summary", "Summary", figures=[figure])
    section.failures = [f"{row.promise}: {'; '.join(row.failures)}" for row in failed]
    ends = collections.Counter(row.result.removeprefix("short; ") for row in rows)
    section.sentences = [
        f"{len(rows)} promises: {', '.join(f'{ends[end]} {end}' for end in _ENDS if ends[end])}.",
        f"{len(short)} fell short of what was first promised, and say how.",
    ]
    section.tables = [
        Table(
            "Promises by area",
            ("area", *KINDS, "short", "failed"),
            [
                [
                    area.title,
                    *(str(sum(row.promise.kind == kind for row in of_area)) for kind in KINDS),
                    str(sum(bool(row.promise.short) for row in of_area)),
                    str(sum(bool(row.failures) for row in of_area)),
                ]
                for area, of_area in table
            ],
            1,
            [f"{kind} ({counts[kind]}): {about}" for kind, about in KINDS.items()],
        ),
        Table(
            "What fell short",
            ("promise", "how"),
            [[each.text, each.short] for each in short],
            2,
        ),
    ]
    return section


def _section(area: Area, rows: Sequence[Row]) -> Section:
    cells = [
        [
            row.promise.text,
            row.result,
            row.promise.kind,
            "; ".join(
                f"{evidence} ({outcome.detail})" if outcome.detail else str(evidence)
                for evidence, outcome in zip(row.promise.evidence, row.outcomes, strict=True)
            ),
            row.promise.short,
        ]
        for row in rows
    ]
    headers = ("promise", "result", "kind", "evidence", "fell short")
    return Section(area.name, area.title, tables=[Table("Promises", headers, cells, 5)])
