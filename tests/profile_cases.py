"""Recordings for tests of `profile report`: tables as nsys exports them, and sessions."""

import json
import sqlite3
from pathlib import Path
from typing import Any

MS = 1_000_000
PROCESS = 4711
MAIN = PROCESS << 24 | 1
AUTOGRAD = PROCESS << 24 | 2
DOMAIN = 3

# Columns of NVIDIA's "SQLite Schema Reference"; versions add some.
_SCHEMA = """
CREATE TABLE StringIds (id INTEGER PRIMARY KEY, value TEXT NOT NULL);
CREATE TABLE NVTX_EVENTS (start INTEGER NOT NULL, end INTEGER, eventType INTEGER NOT NULL,
    rangeId INTEGER, category INTEGER, color INTEGER, text TEXT, globalTid INTEGER,
    endGlobalTid INTEGER, textId INTEGER, domainId INTEGER, uint64Value INTEGER,
    int64Value INTEGER, doubleValue REAL, uint32Value INTEGER, int32Value INTEGER,
    floatValue REAL, jsonTextId INTEGER, jsonText TEXT);
CREATE TABLE CUPTI_ACTIVITY_KIND_RUNTIME (start INTEGER NOT NULL, end INTEGER NOT NULL,
    eventClass INTEGER NOT NULL, globalTid INTEGER, correlationId INTEGER,
    nameId INTEGER NOT NULL, returnValue INTEGER NOT NULL, callchainId INTEGER);
CREATE TABLE CUPTI_ACTIVITY_KIND_KERNEL (start INTEGER NOT NULL, end INTEGER NOT NULL,
    deviceId INTEGER NOT NULL, contextId INTEGER NOT NULL, streamId INTEGER NOT NULL,
    correlationId INTEGER, globalPid INTEGER, demangledName INTEGER NOT NULL,
    shortName INTEGER NOT NULL, mangledName INTEGER, launchType INTEGER, cacheConfig INTEGER,
    registersPerThread INTEGER NOT NULL, gridX INTEGER NOT NULL, gridY INTEGER NOT NULL,
    gridZ INTEGER NOT NULL, blockX INTEGER NOT NULL, blockY INTEGER NOT NULL,
    blockZ INTEGER NOT NULL, staticSharedMemory INTEGER NOT NULL,
    dynamicSharedMemory INTEGER NOT NULL, localMemoryPerThread INTEGER NOT NULL,
    localMemoryTotal INTEGER NOT NULL, gridId INTEGER NOT NULL, sharedMemoryExecuted INTEGER,
    graphNodeId INTEGER, sharedMemoryLimitConfig INTEGER);
CREATE TABLE CUPTI_ACTIVITY_KIND_MEMCPY (start INTEGER NOT NULL, end INTEGER NOT NULL,
    deviceId INTEGER NOT NULL, contextId INTEGER NOT NULL, streamId INTEGER NOT NULL,
    correlationId INTEGER, globalPid INTEGER, bytes INTEGER NOT NULL, copyKind INTEGER NOT NULL,
    deprecatedSrcId INTEGER, srcKind INTEGER, dstKind INTEGER, srcDeviceId INTEGER,
    srcContextId INTEGER, dstDeviceId INTEGER, dstContextId INTEGER, graphNodeId INTEGER);
CREATE TABLE CUPTI_ACTIVITY_KIND_MEMSET (start INTEGER NOT NULL, end INTEGER NOT NULL,
    deviceId INTEGER NOT NULL, contextId INTEGER NOT NULL, streamId INTEGER NOT NULL,
    correlationId INTEGER, globalPid INTEGER, value INTEGER NOT NULL, bytes INTEGER NOT NULL,
    graphNodeId INTEGER, memKind INTEGER);
"""


class NsysTables:
    """A report's tables; times are in ms. The domain flamingo_fast is there."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._connection = sqlite3.connect(path)
        self._connection.executescript(_SCHEMA)
        self._strings: dict[str, int] = {}
        self._correlation = 0
        self._insert("NVTX_EVENTS", start=0, eventType=75, **self._text("flamingo_fast"))
        self._insert("NVTX_EVENTS", start=0, eventType=75, text="NCCL", globalTid=MAIN, domainId=4)

    def _text(self, name: str, thread: int = MAIN) -> dict[str, Any]:
        """Written in place, or as most versions do by an id."""
        return {"textId": self._string(name), "globalTid": thread, "domainId": DOMAIN}

    def _string(self, value: str) -> int:
        if value not in self._strings:
            self._strings[value] = len(self._strings) + 1
            self._insert("StringIds", id=self._strings[value], value=value)
        return self._strings[value]

    def _insert(self, table: str, **values: Any) -> None:
        info = self._connection.execute(f"PRAGMA table_info({table})")
        values = {name: 0 for _, name, _, required, *_ in info if required} | values
        columns = ", ".join(f'"{name}"' for name in values)
        marks = ", ".join("?" * len(values))
        self._connection.execute(
            f"INSERT INTO {table} ({columns}) VALUES ({marks})", [*values.values()]
        )

    def range(
        self, name: str, start: float, end: float | None, thread: int = MAIN, **values: Any
    ) -> None:
        """Push and pop, unless `values` say otherwise, such as of columns."""
        self._insert(
            "NVTX_EVENTS",
            **{
                "start": round(start * MS),
                "end": None if end is None else round(end * MS),
                "eventType": 59,
                **self._text(name, thread),
                **values,
            },
        )

    def kernel(
        self,
        name: str,
        start: float,
        end: float,
        launch: float | None = None,
        thread: int = MAIN,
        **values: Any,
    ) -> None:
        """Launched at `launch` by a call in `thread`, or by one that was not recorded."""
        self._work("KERNEL", start, end, launch, thread, self._named(name) | values)

    def _named(self, name: str) -> dict[str, Any]:
        return {"demangledName": self._string(name), "shortName": self._string(name[:6])}

    def copy(self, kind: int, start: float, end: float, launch: float) -> None:
        self._work("MEMCPY", start, end, launch, MAIN, {"copyKind": kind})

    def fill(self, start: float, end: float, launch: float) -> None:
        self._work("MEMSET", start, end, launch, MAIN, {})

    def _work(
        self,
        table: str,
        start: float,
        end: float,
        launch: float | None,
        thread: int,
        values: dict[str, Any],
    ) -> None:
        self._correlation += 1
        values = {"correlationId": self._correlation} | values
        if launch is not None:
            self._insert(
                "CUPTI_ACTIVITY_KIND_RUNTIME",
                start=round(launch * MS),
                end=round(launch * MS) + 5000,
                globalTid=thread,
                correlationId=values["correlationId"],
            )
        self._insert(
            f"CUPTI_ACTIVITY_KIND_{table}",
            **{
                "start": round(start * MS),
                "end": round(end * MS),
                "streamId": 7,
                "globalPid": thread >> 24 << 24,
                **values,
            },
        )

    def execute(self, statement: str) -> None:
        self._connection.execute(statement)

    def close(self) -> Path:
        self._connection.commit()
        self._connection.close()
        return self.path


def write_session(folder: Path, **changes: Any) -> Path:
    """A session.json of nsys without work and ceilings; returns its path."""
    folder.mkdir(exist_ok=True)
    session = {
        "schema": 1,
        "what": "flamingo_fast profiling session",
        "target": "train:micro",
        "tool": "nsys",
        "device": "cpu",
        "versions": {"torch": "2.11"},
        "domain": "flamingo_fast",
        "capture": "capture",
        "step": "step",
        "step_s": [],
        "work": [],
        "ceilings": None,
    }
    (folder / "session.json").write_text(json.dumps(session | changes))
    return folder / "session.json"


def gpu_step(path: Path, kernel_ms: float = 2.0) -> Path:
    """Two steps of 20 ms on a GPU, whose backward runs in autograd's thread."""
    tables = NsysTables(path)
    tables.range("capture", 0, 100, eventType=60)
    for at in (10, 40):
        tables.range("step", at, at + 20)
        tables.range("vision (2, 3, 32, 32)", at, at + 4)
        tables.range("lm layer 0 (2, 32, 64)", at + 4, at + 10)
        tables.range("gated block 0 (2, 32, 64)", at + 4, at + 7)
        tables.range("attention", at + 4.5, at + 6.5)
        tables.range("backward", at + 10, at + 19)
        tables.range("lm layer 0 (2, 32, 64) backward", at + 11, at + 17, AUTOGRAD)
        tables.range("gated block 0 backward", at + 13, at + 16, AUTOGRAD, eventType=60)
        # Of another domain, and of none.
        tables.range("ncclAllReduce", at + 18, at + 19, domainId=4)
        tables.range("aten::add", at + 18, at + 19, domainId=0)
        tables.copy(1, at + 0.5, at + 1, launch=at + 0.2)
        tables.kernel("_latent_forward_kernel", at + 2, at + 3, launch=at + 1)
        tables.kernel("_several_media_forward_kernel", at + 6, at + 6 + kernel_ms, launch=at + 5)
        # Of two streams at once.
        tables.kernel("void gemm<float>(float*)", at + 7, at + 9, launch=at + 8, streamId=9)
        tables.kernel(
            "_several_media_backward_kernel", at + 14, at + 18, launch=at + 13.5, thread=AUTOGRAD
        )
    return tables.close()
