"""session.json: what was profiled, by which clock, and the work it should have taken."""

import dataclasses
import json
from pathlib import Path
from typing import Any

from flamingo_fast.profiling.traces import ReportError

SCHEMA = 1
FILE_NAME = "session.json"
# The tool's files in a session's folder; of those as old as each other the first is read.
_FILES = {
    "nsys": ("report.sqlite", "report.nsys-rep", "report.qdstrm"),
    "ncu": ("report.csv", "report.ncu-rep"),
    "torch": ("trace.json", "trace.json.gz"),
}


@dataclasses.dataclass(frozen=True)
class KernelWork:
    """Closed-form useful work of all calls of a kernel in one step: bytes and operations."""

    kernel: str
    calls: int
    dtype: str
    bytes: float
    vector_flops: float
    matmul_flops: float


@dataclasses.dataclass(frozen=True)
class Ceilings:
    """What the device can do at best: GB/s and TFLOP/s (of matrix products by dtype)."""

    gb_s: float
    fp32_tflop_s: float
    matmul_tflop_s: dict[str, float]
    source: str


@dataclasses.dataclass(frozen=True)
class RecordedSession:
    """Of `step_s`, in seconds, the driver's own clock of each step; names are of NVTX ranges."""

    domain: str = "flamingo_fast"
    capture: str = "capture"
    step: str = "step"
    target: str = ""
    tool: str = ""
    device: str = ""
    versions: dict[str, str] = dataclasses.field(default_factory=dict)
    step_s: tuple[float, ...] = ()
    work: tuple[KernelWork, ...] = ()
    ceilings: Ceilings | None = None

    def __str__(self) -> str:
        versions = (f"{name} {version}" for name, version in self.versions.items())
        return ", ".join(filter(None, (self.target, self.tool, self.device, *versions)))


def locate(path: Path) -> tuple[Path, RecordedSession]:
    """The file to read for `path`, a folder, its session.json or a file, and its session.

    A file that has no session.json beside it was recorded by something else: that session knows
    the names of ranges only.

    Raises:
        ReportError: nothing is there, the session is broken, or its tool's file is missing.
    """
    if not path.exists():
        raise ReportError(
            f"{path}: no such file or folder; expected a session or a profiler's file"
        )
    if path.is_dir():
        if not (path / FILE_NAME).is_file():
            raise ReportError(f"{path}: expected a session's folder, with a {FILE_NAME} in it")
        path = path / FILE_NAME
    if path.name == FILE_NAME:
        session = read_session(path)
        names = _FILES[session.tool]
        files = [file for name in names if (file := path.parent / name).is_file()]
        if not files:
            raise ReportError(f"{path}: expected one of {', '.join(names)} beside it, found none")
        # The others may be of an earlier recording.
        return max(files, key=lambda file: file.stat().st_mtime_ns), session
    beside = path.parent / FILE_NAME
    return path, read_session(beside) if beside.is_file() else RecordedSession()


def read_session(path: Path) -> RecordedSession:
    """What `profile run` wrote.

    Raises:
        ReportError: `path` is no session.json of this version; names the field that is wrong.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ReportError(f"{path}: expected a session as JSON: {error}") from error
    if not isinstance(data, dict) or data.get("schema") != SCHEMA:
        schema = data.get("schema") if isinstance(data, dict) else None
        raise ReportError(f"{path}: schema: expected {SCHEMA}, got {schema!r}")
    read = _Fields(path, "", data)
    tool = read.text("tool")
    if tool not in _FILES:
        raise ReportError(f"{path}: tool: expected one of {', '.join(_FILES)}; got {tool!r}")
    work = [
        _Fields(path, f"work[{index}].", each) for index, each in enumerate(read.get("work", list))
    ]
    ceilings = data.get("ceilings")
    return RecordedSession(
        domain=read.text("domain"),
        capture=read.text("capture"),
        step=read.text("step"),
        target=read.text("target"),
        tool=tool,
        device=read.text("device"),
        versions={str(k): str(v) for k, v in read.get("versions", dict).items()},
        step_s=tuple(read.numbers("step_s", read.get("step_s", list))),
        work=tuple(
            KernelWork(
                each.text("kernel"),
                each.get("calls", int),
                each.text("dtype"),
                *(each.number(name) for name in ("bytes", "vector_flops", "matmul_flops")),
            )
            for each in work
        ),
        ceilings=None if ceilings is None else _ceilings(_Fields(path, "ceilings.", ceilings)),
    )


def _ceilings(read: "_Fields") -> Ceilings:
    matmul = read.get("matmul_tflop_s", dict)
    values = read.numbers("matmul_tflop_s", list(matmul.values()))
    return Ceilings(
        read.number("gb_s"),
        read.number("fp32_tflop_s"),
        dict(zip(matmul, values, strict=True)),
        read.text("source"),
    )


class _Fields:
    """Of an object in the file `path`, which are named after `prefix` in errors."""

    def __init__(self, path: Path, prefix: str, data: Any) -> None:
        self._path, self._prefix = path, prefix
        self._data = data if isinstance(data, dict) else {}

    def get(self, name: str, kind: Any) -> Any:
        value = self._data.get(name)
        if not isinstance(value, kind) or isinstance(value, bool):
            self._fail(name, kind.__name__, value)
        return value

    def text(self, name: str) -> str:
        return self.get(name, str)

    def number(self, name: str) -> float:
        return self.numbers(name, [self._data.get(name)])[0]

    def numbers(self, name: str, values: list[Any]) -> list[float]:
        for value in values:
            if not isinstance(value, int | float) or isinstance(value, bool) or not value >= 0:
                self._fail(name, "a number from 0", value)
        return [float(value) for value in values]

    def _fail(self, name: str, expected: str, value: Any) -> None:
        shown = "nothing" if value is None else repr(value)
        raise ReportError(f"{self._path}: {self._prefix}{name}: expected {expected}, got {shown}")
