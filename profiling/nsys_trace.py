"""Reports of Nsight Systems: .sqlite as `nsys export` writes it, .nsys-rep and .qdstrm through it.

Tables and columns: NVIDIA, "SQLite Schema Reference" of the Nsight Systems documentation.
"""

import contextlib
import os
import sqlite3
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from operator import index
from pathlib import Path

from flamingo_fast.profiling.processes import find_program
from flamingo_fast.profiling.recorded_session import RecordedSession
from flamingo_fast.profiling.traces import GpuWork, Range, ReportError, Trace, assemble

_DOMAIN_CREATE, _PUSH_POP, _START_END = 75, 59, 60
# CUPTI's CUpti_ActivityMemcpyKind.
_COPIES = {1: "host to device", 2: "device to host", 8: "device to device", 10: "peer to peer"}


def read_nsys(path: Path, session: RecordedSession) -> Trace:
    """Of the NVTX domain of `session`.

    Raises:
        ReportError: `path` is no report, is truncated, has no steps, or needs nsys and there is
            none.
    """
    if path.stat().st_size == 0:
        raise ReportError(f"{path}: expected a report of Nsight Systems, got an empty file")
    if path.suffix == ".sqlite":
        return _read_tables(path, path, session)
    nsys = _find_nsys(path)
    with tempfile.TemporaryDirectory() as folder:
        report = path
        if path.suffix == ".qdstrm":
            report = Path(folder, "report.nsys-rep")
            _convert(path, (_find_importer(nsys, path), "-i", path, "-o", report), report)
        tables = Path(folder, "report.sqlite")
        options = ("export", "--type", "sqlite", "--force-overwrite", "true", "--output")
        _convert(path, (nsys, *options, tables, report), tables)
        return _read_tables(tables, path, session)


def _find_nsys(path: Path) -> Path:
    found = find_program("nsys")
    if found is None:
        chosen = os.environ.get("FLAMINGO_FAST_NSYS")
        where = "it is not in $PATH or $CUDA_HOME/bin"
        where = f"FLAMINGO_FAST_NSYS, {chosen}, is no program" if chosen else where
        raise ReportError(
            f"{path}: reading {path.suffix} needs nsys, and {where}; set FLAMINGO_FAST_NSYS to it, "
            "or run `nsys export --type sqlite` elsewhere and report on the .sqlite"
        )
    return Path(found)


def _find_importer(nsys: Path, path: Path) -> Path:
    """Beside nsys in NVIDIA's packages; Debian's has a folder of the architecture between them."""
    for folder in nsys.resolve().parents:
        for pattern in ("host-linux-*", "nsight-systems*/host-linux-*"):
            for found in sorted(folder.glob(f"{pattern}/QdstrmImporter")):
                return found
    raise ReportError(
        f"{path}: reading .qdstrm needs host-linux-x64/QdstrmImporter of the Nsight Systems whose "
        f"nsys is {nsys}, and it is not there"
    )


def _convert(path: Path, command: Sequence[str | Path], made: Path) -> None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, errors="replace")
    except OSError as error:
        raise ReportError(f"{path}: can't run {command[0]}: {error}") from error
    if done.returncode or not made.is_file():
        said = (done.stderr + done.stdout).split("\n")
        last = next((line.strip() for line in reversed(said) if line.strip()), "nothing")
        name = Path(command[0]).name
        raise ReportError(
            f"{path}: expected a report of Nsight Systems; {name} can't read it and says: {last}"
        )


def _read_tables(tables: Path, path: Path, session: RecordedSession) -> Trace:
    notes: list[str] = []
    try:
        with contextlib.closing(
            sqlite3.connect(f"{tables.resolve().as_uri()}?mode=ro", uri=True)
        ) as connection:
            report = _Tables(connection, path)
            ranges = [*_ranges(report, session, notes)]
            work = [*_work(report)]
    # TypeError: what should be a number is none, in tables that have but the same names.
    except (sqlite3.Error, TypeError) as error:
        raise ReportError(
            f"{path}: expected tables of `nsys export --type sqlite`; "
            f"it is truncated or something else: {error}"
        ) from error
    return assemble(path, "nsys", ranges, work, notes, step=session.step, capture=session.capture)


class _Tables:
    """A database whose tables may lack: nsys writes those that it has rows for."""

    def __init__(self, connection: sqlite3.Connection, path: Path) -> None:
        self._connection, self._path = connection, path
        rows = connection.execute("SELECT name FROM sqlite_master WHERE type IN ('table', 'view')")
        self.names = {name for (name,) in rows}
        self.strings: dict[int, str] = {}
        if "StringIds" in self.names:
            self.strings = dict(self.rows("StringIds", ("id", "value")))

    def rows(
        self, table: str, columns: Sequence[str], optional: Sequence[str] = ()
    ) -> Iterator[tuple]:
        """Of `columns` and then `optional` ones, None for those that this version does not have."""
        there = {name for _, name, *_ in self._connection.execute(f"PRAGMA table_info({table})")}
        if missing := [name for name in columns if name not in there]:
            raise ReportError(
                f"{self._path}: expected the columns {', '.join(columns)} of {table}, "
                f"which lacks {', '.join(missing)}"
            )
        chosen = [f'"{name}"' for name in columns]
        chosen += [f'"{name}"' if name in there else "NULL" for name in optional]
        return iter(self._connection.execute(f"SELECT {', '.join(chosen)} FROM {table}"))

    def string(self, number: int | None) -> str:
        return self.strings.get(number, "") if number is not None else ""


def _process(global_id: int) -> int:
    """Of what nsys writes: the process in bits 24 and up, the thread in those below."""
    return global_id >> 24


def _ranges(report: _Tables, session: RecordedSession, notes: list[str]) -> Iterator[Range]:
    if "NVTX_EVENTS" not in report.names:
        there = ", ".join(sorted(report.names)[:5]) or "none"
        raise ReportError(
            f"{report._path}: expected the table NVTX_EVENTS of `nsys export --type sqlite`, that "
            f"is NVTX ranges; its tables are: {there}"
        )
    columns = ("start", "end", "eventType", "globalTid", "text")
    rows = [*report.rows("NVTX_EVENTS", columns, ("textId", "domainId"))]
    events = [
        (start, end, kind, thread, text or report.string(text_id), domain or 0)
        for start, end, kind, thread, text, text_id, domain in rows
    ]
    domains = {
        (_process(thread), domain)
        for _, _, kind, thread, text, domain in events
        if kind == _DOMAIN_CREATE and text == session.domain
    }
    unfinished = 0
    for start, end, kind, thread, text, domain in events:
        if kind in (_PUSH_POP, _START_END) and (_process(thread), domain) in domains:
            if end is None:
                unfinished += text != session.capture
            else:
                yield Range(text, index(start), index(end), _process(thread), thread)
    if unfinished:
        notes.append(f"Left out, as they had not ended with the recording: {unfinished} ranges.")


def _work(report: _Tables) -> Iterator[GpuWork]:
    launches = {}
    if "CUPTI_ACTIVITY_KIND_RUNTIME" in report.names:
        columns = ("start", "globalTid", "correlationId")
        for start, thread, correlation in report.rows("CUPTI_ACTIVITY_KIND_RUNTIME", columns):
            launches[_process(thread), correlation] = thread, start
    place = ("start", "end", "deviceId", "streamId", "correlationId", "globalPid")
    for table, optional in (
        ("CUPTI_ACTIVITY_KIND_KERNEL", ("demangledName", "shortName")),
        ("CUPTI_ACTIVITY_KIND_MEMCPY", ("copyKind",)),
        ("CUPTI_ACTIVITY_KIND_MEMSET", ()),
        # Whole graphs, where nsys was not told to trace their kernels.
        ("CUPTI_ACTIVITY_KIND_GRAPH_TRACE", ()),
    ):
        if table not in report.names:
            continue
        for start, end, device, stream, correlation, pid, *names in report.rows(
            table, place, optional
        ):
            if table.endswith("KERNEL"):
                name = report.string(names[0]) or report.string(names[1]) or "[unnamed kernel]"
            elif table.endswith("MEMCPY"):
                name = f"[copy {_COPIES.get(names[0], f'of kind {names[0]}')}]"
            else:
                name = "[fill]" if table.endswith("MEMSET") else "[CUDA graph]"
            process = _process(pid or 0)
            yield GpuWork(
                *(name, index(start), index(end), process, device, stream),
                launches.get((process, correlation)),
            )
