"""What the project promises, and what shows each promise: read from YAML and checked.

A file of docs/promises/ has an area's promises:

    area: Ops
    promises:
      - promise: "rms_norm takes rows of any width from 1 to 16384"
        kind: test
        evidence:
          - tests/test_norm.py::test_every_width
          - {file: README.md, has: ["4.33 / 4.09"]}
          - {command: flamingo-fast doctor, run: true}
        short: "what was promised and is not so, and why"
"""

import collections
import dataclasses
import re
import shlex
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from flamingo_fast.models.extras import require

KINDS = {
    "test": "tests that pass, a command that exits with 0, or a file that has it",
    "measured": "numbers, in a file that says on what",
    "predicted": "a model's numbers, by code that tests hold to its formulas",
    "rehearsed": "run on a CPU in place of the machine that it is for",
}
_FIELDS = {"promise", "kind", "evidence", "short"}
# Between two words of a text that is looked for there may be an end of line.
_SPACE = re.compile(r"\s+")


@dataclasses.dataclass(frozen=True)
class Evidence:
    """One of a test, a command and a file.

    Attributes:
        test: a file of tests, or a node id as pytest has it, of all of its parameters.
        command: of the shell, at the repository's root.
        run: whether the command is quick enough to be run each time.
        file: that has all of `has`, whatever its lines are.
    """

    test: str = ""
    command: str = ""
    run: bool = False
    file: str = ""
    has: tuple[str, ...] = ()

    def __str__(self) -> str:
        return self.test or self.command or self.file


@dataclasses.dataclass
class Promise:
    """A row of the table.

    Attributes:
        place: the file that it is from.
        problems: what is wrong with the row itself, and with evidence that is not there.
        short: how it fell short; empty if it did not.
    """

    place: str
    text: str
    kind: str = ""
    evidence: tuple[Evidence, ...] = ()
    short: str = ""
    problems: list[str] = dataclasses.field(default_factory=list)

    def __str__(self) -> str:
        return f"{self.place}: {self.text}"


@dataclasses.dataclass(frozen=True)
class Area:
    """The promises of a file, in its order."""

    name: str
    title: str
    promises: Sequence[Promise]


def read(folder: Path) -> list[Area]:
    """All files of a folder, by name. What is wrong with a row is in its `problems`.

    Raises:
        ImportError: PyYAML is not installed.
        ValueError: there are none, or one has no promises that could be read.
    """
    yaml = require("yaml", "bench")
    areas = []
    for file in sorted(folder.glob("*.yaml")):
        try:
            content = yaml.safe_load(file.read_text(encoding="utf-8"))
            title, rows = content["area"], content["promises"]
            if not isinstance(title, str) or not isinstance(rows, list) or not rows:
                raise TypeError("area and promises")
        except (yaml.YAMLError, KeyError, TypeError, UnicodeDecodeError) as error:
            why = " ".join(str(error).split())
            raise ValueError(f"{file}: expected `area` and a list `promises`: {why}") from error
        promises = [_promise(file.name, index, row) for index, row in enumerate(rows, 1)]
        areas.append(Area(file.stem, title, promises))
    if not areas:
        raise ValueError(f"{folder}: expected files *.yaml of promises, got none")
    texts = collections.Counter(_words(each.text) for each in of(areas))
    for each in of(areas):
        if texts[_words(each.text)] > 1:
            each.problems.append("another row has the same promise")
    return areas


def of(areas: Iterable[Area]) -> list[Promise]:
    return [promise for area in areas for promise in area.promises]


def _words(text: str) -> str:
    return " ".join(re.findall(r"\w+", text.lower()))


def _promise(place: str, index: int, row: Any) -> Promise:
    if not isinstance(row, dict) or not isinstance(row.get("promise"), str):
        return Promise(place, f"row {index}", problems=["expected a mapping with `promise`"])
    found = Promise(place, _SPACE.sub(" ", row["promise"]).strip())
    found.kind, found.short = str(row.get("kind", "")), str(row.get("short", ""))
    if unknown := sorted(map(str, row.keys() - _FIELDS)):
        found.problems.append(f"unknown fields: {', '.join(unknown)}")
    if found.kind not in KINDS:
        found.problems.append(f"kind: expected one of {', '.join(KINDS)}, got {found.kind!r}")
    if "short" in row and not found.short.strip():
        found.problems.append("short: expected how it fell short, got nothing")
    given = row.get("evidence")
    if not given:
        found.problems.append("no evidence")
    elif not isinstance(given, list):
        found.problems.append(f"evidence: expected a list, got {given!r}")
    else:
        try:
            found.evidence = tuple(map(_evidence, given))
        except ValueError as error:
            found.problems.append(str(error))
    if found.evidence and (lacking := _lacks(found)):
        found.problems.append(f"{found.kind}: expected {lacking}")
    return found


def _evidence(value: Any) -> Evidence:
    """Raises ValueError."""
    match value:
        case str() if value.partition("::")[0].endswith(".py"):
            return Evidence(test=value)
        case str():
            return Evidence(command=value)
        case {"command": str(command), **rest} if rest.keys() <= {"run"}:
            return Evidence(command=command, run=rest.get("run") is True)
        case {"file": str(file), "has": [_, *_] as has, **rest} if not rest:
            return Evidence(file=file, has=tuple(map(str, has)))
    raise ValueError(
        "evidence: expected a test, a command, {command, run} or {file, has: [text, ...]}, "
        f"got {value!r}"
    )


def _lacks(promise: Promise) -> str:
    """What evidence of this kind can't do without, if it does."""
    if promise.kind == "measured":
        return "" if any(each.file for each in promise.evidence) else "a file with its numbers"
    if promise.kind == "test" and not any(e.test or e.run or e.file for e in promise.evidence):
        return "a test, a command that is run each time, or a file that says how it ended"
    if promise.kind in ("predicted", "rehearsed") and all(each.file for each in promise.evidence):
        return "a test or a command, got files alone"
    return ""


def check(promises: Iterable[Promise], root: Path, unknown: Callable[[Sequence[str]], str]) -> None:
    """Adds what is not there to rows' `problems`; whether tests exist pytest alone knows.

    Arguments:
        unknown: what is unknown of arguments of `flamingo-fast`; empty if nothing.
    """
    makefile = root / "Makefile"
    text = makefile.read_text(encoding="utf-8") if makefile.is_file() else ""
    targets = set(re.findall(r"^([a-z][\w-]*):", text, re.M))
    texts: dict[str, str | None] = {}
    for promise in promises:
        for each in promise.evidence:
            if each.test and not (root / each.test.partition("::")[0]).is_file():
                promise.problems.append(f"{each.test}: there is no such file")
            elif each.command and (problem := _unknown(each, targets, root, unknown)):
                promise.problems.append(f"{each.command}: {problem}")
            elif each.file:
                if each.file not in texts:
                    texts[each.file] = _read(root / each.file)
                content = texts[each.file]
                if content is None:
                    promise.problems.append(f"{each.file}: there is no such file of text")
                    continue
                promise.problems += [
                    f"{each.file} has no {has!r}"
                    for has in each.has
                    if _SPACE.sub(" ", has) not in content
                ]


def _read(file: Path) -> str | None:
    try:
        return _SPACE.sub(" ", file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError):
        return None


def _unknown(
    evidence: Evidence, targets: set[str], root: Path, unknown: Callable[[Sequence[str]], str]
) -> str:
    try:
        program, *arguments = shlex.split(evidence.command)
    except ValueError as error:
        return str(error)
    if program == "flamingo-fast":
        return unknown(arguments)
    if evidence.run:
        return "only flamingo-fast is run each time"
    if program == "make":
        named = [each for each in arguments if "=" not in each]
        missing = sorted(set(named) - targets)
        return f"the Makefile has no {', '.join(missing)}" if missing or not named else ""
    if (root / program).is_file():
        return ""
    return "expected flamingo-fast, make or a file of the repository"
