"""What `flamingo-fast accept` leaves: results.json, and the limits of the folder that it is in.

results.json has the schema below, which `DESCRIPTION` says once more for programs:

    schema      SCHEMA; another number is another format, and is refused
    command     that made it, for people
    device      "cuda" or "cpu"
    quick       whether shapes were small
    stages      in the order of `accept_stages.STAGES`, those that have run:
      name, about
      status    "passed"; "failed": a check did, or the stage crashed or ran out of time;
                "skipped": what it needs is missing; "running": it was stopped half way
      reason    why it failed or was skipped; what of it was not done
      started   UTC, ISO 8601
      seconds, limit_s
      environment   of what ran it: names and texts, such as device, torch, triton, commit
      checks    name, status ("passed", "failed", "skipped") and detail of each
      tables    title, headers and rows of texts
      not_exercised   what of the stage this device can't show
      files     names of files in the folder that it left
      left_out  how many checks and rows were dropped for the sake of size
"""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from flamingo_fast.bench.records import replace

SCHEMA = 1
MAX_FILES = 8
MAX_BYTES = 16 * 2**20
JSON_NAME, PAGE_NAME, LOG_NAME = "results.json", "report.html", "log.txt"
# Together less than MAX_BYTES; what a stage leaves has the rest.
_MAX_JSON, _MAX_PAGE, MAX_LOG = 3 * 2**20, 6 * 2**20, 2 * 2**20
_MAX_DETAIL = 2000

STATUSES = ("passed", "failed", "skipped", "running")

_STAGE = {
    "name": str,
    "about": str,
    "status": STATUSES,
    "reason": str,
    "started": str,
    "seconds": float,
    "limit_s": float,
    "environment": {str: str},
    "checks": [{"name": str, "status": STATUSES[:3], "detail": str}],
    "tables": [{"title": str, "headers": [str], "rows": [[str]]}],
    "not_exercised": [str],
    "files": [str],
    "left_out": int,
}
DESCRIPTION: dict[str, Any] = {
    "schema": int,
    "command": str,
    "device": ("cuda", "cpu"),
    "quick": bool,
    "stages": [_STAGE],
}
"""A type; a tuple: one of these texts; a list: any number of its element; a dict: exactly its keys,
or with `str` as the key any."""


class ResultsError(ValueError):
    """A folder or a file in it that can't be used; the message says which, and why."""


@dataclasses.dataclass(frozen=True)
class Check:
    name: str
    status: str
    detail: str = ""


@dataclasses.dataclass
class Table:
    title: str
    headers: list[str]
    rows: list[list[str]] = dataclasses.field(default_factory=list)


@dataclasses.dataclass
class StageResult:
    """See the module's docstring."""

    name: str
    about: str
    limit_s: float
    started: str
    status: str = "running"
    reason: str = ""
    seconds: float = 0.0
    environment: dict[str, str] = dataclasses.field(default_factory=dict)
    checks: list[Check] = dataclasses.field(default_factory=list)
    tables: list[Table] = dataclasses.field(default_factory=list)
    not_exercised: list[str] = dataclasses.field(default_factory=list)
    files: list[str] = dataclasses.field(default_factory=list)
    left_out: int = 0

    def with_status(self, status: str) -> list[Check]:
        return [check for check in self.checks if check.status == status]

    def table(self, title: str, headers: Sequence[str]) -> Table:
        """The one of that title, made if there is none."""
        for each in self.tables:
            if each.title == title:
                return each
        self.tables.append(Table(title, list(headers)))
        return self.tables[-1]

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "StageResult":
        lists = {
            "checks": [Check(**each) for each in values["checks"]],
            "tables": [Table(**each) for each in values["tables"]],
        }
        return cls(**{**values, **lists})


@dataclasses.dataclass
class Results:
    command: str
    device: str
    quick: bool
    stages: list[StageResult] = dataclasses.field(default_factory=list)

    @property
    def failed(self) -> list[StageResult]:
        """Those that did not come to an end too."""
        return [stage for stage in self.stages if stage.status in ("failed", "running")]

    def put(self, stage: StageResult, order: Sequence[str]) -> None:
        """In the place of an earlier one of that name, or where `order` has it."""
        kept = {each.name: each for each in (*self.stages, stage)}
        self.stages = sorted(kept.values(), key=lambda each: order.index(each.name))

    def to_dict(self) -> dict[str, Any]:
        return {"schema": SCHEMA, **dataclasses.asdict(self)}

    @classmethod
    def from_dict(cls, values: Any) -> "Results":
        """
        Raises:
            ResultsError: it has another schema, or is not as `DESCRIPTION` has it.
        """
        if isinstance(values, dict) and values.get("schema", SCHEMA) != SCHEMA:
            raise ResultsError(f"schema: expected {SCHEMA}, got {values['schema']!r}")
        validate(values)
        rest = {name: each for name, each in values.items() if name != "schema"}
        return cls(**{**rest, "stages": [StageResult.from_dict(each) for each in rest["stages"]]})


def validate(values: Any, description: Any = DESCRIPTION, where: str = "results") -> None:
    """
    Raises:
        ResultsError: names the first part that is not as described.
    """
    if isinstance(description, tuple):
        if values not in description:
            raise ResultsError(f"{where}: expected one of {', '.join(description)}; got {values!r}")
    elif isinstance(description, list):
        if not isinstance(values, list):
            raise ResultsError(f"{where}: expected a list, got {type(values).__name__}")
        for index, each in enumerate(values):
            validate(each, description[0], f"{where}[{index}]")
    elif isinstance(description, dict):
        if not isinstance(values, dict):
            raise ResultsError(f"{where}: expected an object, got {type(values).__name__}")
        expected = dict.fromkeys(values, description[str]) if str in description else description
        if values.keys() != expected.keys():
            names = " ".join(sorted(values.keys() ^ expected.keys()))
            raise ResultsError(f"{where}: missing or unknown: {names}")
        for name, each in expected.items():
            validate(values[name], each, f"{where}.{name}")
    else:
        # JSON writes 2.0 as 2.0, but other writers as 2; and True is an int to Python.
        allowed = (int, float) if description is float else (description,)
        if not isinstance(values, allowed) or isinstance(values, bool) != (description is bool):
            raise ResultsError(
                f"{where}: expected {description.__name__}, got {type(values).__name__}"
            )


class Folder:
    """Where results go: at most MAX_FILES files of less than MAX_BYTES together.

    Arguments:
        path: is made if it isn't there.
        resume: whether it has results, to be added to.

    Attributes:
        results: that it has; None without `resume`.

    Raises:
        ResultsError: it can't be written, or has files that are not of `accept`; results.json is
            there without `resume`, or not there with it, or no results of this schema.
    """

    def __init__(self, path: Path, *, resume: bool) -> None:
        self.path = path
        try:
            path.mkdir(parents=True, exist_ok=True)
            probe = path / "results.json.partial"
            probe.write_bytes(b"")
            probe.unlink()
            names = sorted(each.name for each in path.iterdir())
        except OSError as error:
            raise ResultsError(f"out: can't write to {path}: {error}") from error
        self.results: Results | None = None
        if JSON_NAME in names and not resume:
            raise ResultsError(f"out: {path} has results already; --resume adds to them")
        if resume:
            self.results = _read(path / JSON_NAME)
        known = {JSON_NAME, PAGE_NAME, LOG_NAME}
        for stage in self.results.stages if self.results else ():
            known |= set(stage.files)
        # A run that was killed leaves what it was writing.
        partial = [each for each in names if resume and each.endswith(".partial")]
        known |= set(partial)
        if others := [name for name in names if name not in known]:
            raise ResultsError(
                f"out: expected an empty folder or one of accept's, and {path} has "
                f"{', '.join(others[:5])}{' ...' if len(others) > 5 else ''}"
            )
        for name in partial:
            (path / name).unlink()

    def write(self, results: Results) -> None:
        """results.json, all of it or what was there before."""
        _shorten(results)
        replace(self.path / JSON_NAME, _dumped(results))

    def write_page(self, page: str, without_tables: str) -> None:
        data = page.encode()
        replace(self.path / PAGE_NAME, data if len(data) <= _MAX_PAGE else without_tables.encode())

    def add_to_log(self, text: str) -> None:
        """At its end; of a long log the middle goes."""
        path = self.path / LOG_NAME
        earlier = path.read_bytes() if path.exists() else b""
        replace(path, kept_ends(earlier + text.encode(), MAX_LOG))

    def adopt(self, source: Path, name: str) -> str | None:
        """Takes in a file; why not, where it is too large or one too many."""
        if not source.is_file():
            return f"{name}: {source} is missing"
        target = self.path / name
        others = [each for each in self.path.iterdir() if each != target]
        reserved = {JSON_NAME, PAGE_NAME, LOG_NAME} - {each.name for each in others}
        if len(others) + len(reserved) >= MAX_FILES:
            return f"{name}: the folder has {MAX_FILES} files"
        core = {JSON_NAME, PAGE_NAME, LOG_NAME}
        taken = sum(each.stat().st_size for each in others if each.name not in core)
        room = MAX_BYTES - 2**20 - (_MAX_JSON + _MAX_PAGE + MAX_LOG) - taken
        if source.stat().st_size > room:
            size = source.stat().st_size / 2**20
            return f"{name}: {size:.1f} MiB, there is room for {max(room, 0) / 2**20:.1f}"
        replace(target, source.read_bytes())
        return None

    def __str__(self) -> str:
        files = [each for each in self.path.iterdir() if each.is_file()]
        total = sum(each.stat().st_size for each in files)
        return f"{self.path}: {len(files)} files, {total / 2**20:.2f} MiB"


def _read(path: Path) -> Results:
    try:
        return Results.from_dict(json.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        raise ResultsError(f"resume: {path} is not there") from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, ResultsError) as error:
        raise ResultsError(f"resume: {path}: expected results of accept: {error}") from error


def _dumped(results: Results) -> bytes:
    return json.dumps(results.to_dict(), indent=1).encode()


def _shorten(results: Results) -> None:
    """Until results.json is small enough: long details, then checks that passed and rows."""
    for stage in results.stages:
        stage.checks = [
            dataclasses.replace(each, detail=_cut(each.detail, _MAX_DETAIL))
            for each in stage.checks
        ]
        stage.reason = _cut(stage.reason, _MAX_DETAIL)
    limit = 1024
    while len(_dumped(results)) > _MAX_JSON and limit:
        limit //= 2
        for stage in results.stages:
            first = sorted(stage.checks, key=lambda each: each.status != "failed")
            stage.left_out += max(len(first) - limit, 0)
            stage.checks = first[:limit]
            for table in stage.tables:
                stage.left_out += max(len(table.rows) - limit, 0)
                del table.rows[limit:]


def _cut(text: str, limit: int) -> str:
    return text if len(text) <= limit else f"{text[:limit]} ..."


def kept_ends(data: bytes, limit: int) -> bytes:
    """All of it, or its beginning and its end with a line between that says what is missing."""
    if len(data) <= limit:
        return data
    note = f"\n... {len(data)} bytes, the middle is left out ...\n".encode()
    room = limit - len(note)
    return data[: room // 4] + note + data[-(room - room // 4) :]
