"""Runs stages of `accept`, each in a process of its own, so that none stops the others."""

import datetime
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

import flamingo_fast
from flamingo_fast.profiling import accept_worker
from flamingo_fast.profiling.accept_context import Context
from flamingo_fast.profiling.accept_report import page
from flamingo_fast.profiling.accept_results import (
    MAX_LOG,
    Check,
    Folder,
    Results,
    StageResult,
    kept_ends,
)
from flamingo_fast.profiling.accept_stages import Stage

# Where `flamingo_fast` is imported from, installed or not.
_ROOT = Path(flamingo_fast.__file__).absolute().parents[1]
_POLL_S = 0.1
_WRITE_S = 2.0
# Of the end of a process, and of its traceback.
_GRACE_S = 5.0
_MAX_LOG_OF_STAGE = MAX_LOG // 10


def environment(device: torch.device, tuned: Path) -> dict[str, str]:
    """Of a stage's process: this one's without what would change timings.

    Arguments:
        tuned: a folder where kernels look for what tuning found, and nowhere else.
    """
    values = dict(os.environ)
    values["FLAMINGO_FAST_CACHE"] = str(tuned.absolute())
    # Launches that wait for each other can't be captured, and have other times.
    values.pop("CUDA_LAUNCH_BLOCKING", None)
    # Triton decides at import; a test's setting would interpret kernels beside a GPU.
    values.pop("TRITON_INTERPRET", None)
    if device.type == "cpu":
        values["TRITON_INTERPRET"] = "1"
    paths = [str(_ROOT), *filter(None, [values.get("PYTHONPATH")])]
    values |= {"PYTHONPATH": os.pathsep.join(paths), "PYTHONUNBUFFERED": "1"}
    return values


def run(
    stages: Sequence[Stage],
    order: Sequence[str],
    folder: Folder,
    results: Results,
    show: Callable[[str], None] = print,
) -> None:
    """Adds each stage to `results` and to the folder, also while it runs.

    Arguments:
        stages: to run.
        order: names of all.
        show: is told what runs and what came of it.

    Raises:
        KeyboardInterrupt: the running stage was stopped, and is written down as such.
    """
    for stage in stages:
        show(f"{stage.name}: {stage.about} (at most {stage.limit_s:g} s) ...")
        result = _StageRun(stage, order, folder, results).run()
        show(f"{stage.name}: {result.status} in {result.seconds:.1f} s {result.reason}".rstrip())


class _StageRun:
    """The processes of one stage."""

    def __init__(
        self, stage: Stage, order: Sequence[str], folder: Folder, results: Results
    ) -> None:
        self.stage, self.order, self.folder, self.results = stage, order, folder, results
        now = datetime.datetime.now(datetime.timezone.utc)
        self.result = StageResult(
            stage.name, stage.about, float(stage.limit_s), now.isoformat(timespec="seconds")
        )
        self.earlier_files = [
            name for each in results.stages if each.name == stage.name for name in each.files
        ]
        self.ends: list[dict[str, Any]] = []
        self.files: dict[str, Path] = {}
        self.notes: list[str] = []

    def run(self) -> StageResult:
        device = torch.device(self.results.device)
        count = min(self.stage.most_processes, os.cpu_count() or 1)
        with tempfile.TemporaryDirectory(prefix="accept-", ignore_cleanup_errors=True) as name:
            shards = [
                Context(
                    device, self.results.quick, Path(name, f"{i}"), Path(name, f"{i}.jsonl"), 0.0,
                    i, count,
                )
                for i in range(count)
            ]  # fmt: skip
            self._write()
            start = time.monotonic()
            processes = [self._start(shard) for shard in shards]
            try:
                reasons = self._wait(processes, shards, start)
            except BaseException:
                self.result.reason = "interrupted"
                raise
            finally:
                for process in processes:
                    _kill(process)
                self._read(shards)
                self.result.seconds = round(time.monotonic() - start, 2)
                self._keep(shards)
                self._write()
        self._judge(reasons)
        self._write()
        return self.result

    def _start(self, shard: Context) -> "subprocess.Popen[bytes]":
        shard.work.mkdir()
        shard.events.touch()
        arguments = accept_worker.arguments(shard, self.stage.target, self.stage.limit_s)
        with open(f"{shard.work}.log", "wb") as log:
            return subprocess.Popen(
                [sys.executable, "-m", accept_worker.__name__, *arguments],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=environment(shard.device, self.folder.path),
                # A group of its own: what it starts ends with it.
                start_new_session=True,
            )

    def _wait(
        self,
        processes: Sequence["subprocess.Popen[bytes]"],
        shards: Sequence[Context],
        start: float,
    ) -> list[str]:
        """Why processes ended without a result."""
        written = start
        while any(process.poll() is None for process in processes):
            time.sleep(_POLL_S)
            now = time.monotonic()
            if now - start > self.stage.limit_s + _GRACE_S:
                break
            if now - written > _WRITE_S and self._read(shards):
                self.result.seconds, written = round(now - start, 2), now
                self._write()
        late = time.monotonic() - start >= self.stage.limit_s - 1
        reasons = []
        for process, shard in zip(processes, shards, strict=True):
            if "end" in (kinds := [each["kind"] for each in _events(shard.events)]):
                continue
            code = process.poll()
            if code is None or late:
                reasons.append(f"not done within {self.stage.limit_s:g} s")
            elif code < 0:
                reasons.append(f"ended by {signal.Signals(-code).name}")
            else:
                reasons.append(f"ended with exit code {code} after {len(kinds)} events")
        return list(dict.fromkeys(reasons))

    def _read(self, shards: Sequence[Context]) -> bool:
        """Makes the result anew from what was told; whether there is more than before."""
        earlier = len(self.result.checks), sum(len(each.rows) for each in self.result.tables)
        self.result.checks, self.result.tables, self.ends = [], [], []
        self.files, self.notes = {}, []
        for shard in shards:
            for event in _events(shard.events):
                self._add(event)
        return earlier != (
            len(self.result.checks),
            sum(len(each.rows) for each in self.result.tables),
        )

    def _add(self, event: dict[str, Any]) -> None:
        result = self.result
        match event["kind"]:
            case "check":
                result.checks.append(Check(event["name"], event["status"], event["detail"]))
            case "row":
                result.table(event["title"], event["headers"]).rows.append(event["cells"])
            case "not_exercised":
                if event["text"] not in result.not_exercised:
                    result.not_exercised.append(event["text"])
            case "environment":
                result.environment = event["values"]
            case "file":
                self.files[event["name"]] = Path(event["path"])
            case "note":
                self.notes.append(event["text"])
            case "end":
                self.ends.append(event)

    def _judge(self, reasons: Sequence[str]) -> None:
        """The stage's status, of its processes' and its checks'."""
        result = self.result
        failed, skipped = result.with_status("failed"), result.with_status("skipped")
        ended = {
            status: [each["reason"] for each in self.ends if each["status"] == status]
            for status in ("failed", "skipped")
        }
        why = [*reasons, *ended["failed"]]
        if failed:
            why.append(f"{len(failed)} of {len(result.checks)} checks failed")
        if why:
            result.status = "failed"
        elif ended["skipped"]:
            result.status, why = "skipped", ended["skipped"]
        elif skipped and len(skipped) == len(result.checks):
            result.status, why = "skipped", [each.detail for each in skipped]
        elif not result.checks:
            result.status, why = "failed", ["nothing was checked"]
        else:
            result.status = "passed"
            if skipped:
                why.append(f"{len(skipped)} of {len(result.checks)} checks skipped")
        result.reason = "; ".join(dict.fromkeys([*why, *self.notes]))

    def _keep(self, shards: Sequence[Context]) -> None:
        """The log, and files that there is room for; of an earlier run of the stage none stays."""
        parts = [f"== {self.stage.name}, {self.result.started}\n".encode()]
        for shard in shards:
            log = Path(f"{shard.work}.log")
            parts.append(kept_ends(log.read_bytes() if log.exists() else b"", _MAX_LOG_OF_STAGE))
        self.folder.add_to_log(b"".join(parts).decode(errors="replace") + "\n")
        for name in self.earlier_files:
            (self.folder.path / name).unlink(missing_ok=True)
        for name, path in self.files.items():
            if why_not := self.folder.adopt(path, name):
                self.notes.append(f"not kept: {why_not}")
            else:
                self.result.files.append(name)

    def _write(self) -> None:
        self.results.put(self.result, self.order)
        self.folder.write(self.results)
        self.folder.write_page(page(self.results), page(self.results, tables=False))


def _events(path: Path) -> list[dict[str, Any]]:
    """Those whose lines are complete."""
    if not path.exists():
        return []
    *lines, _ = path.read_text(encoding="utf-8").split("\n")
    return [json.loads(line) for line in lines]


def _kill(process: "subprocess.Popen[bytes]") -> None:
    """It, and what it started."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except (ProcessLookupError, PermissionError):
        pass
    process.wait()
