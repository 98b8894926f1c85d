"""Traces of torch.profiler: Chrome's format, as .json or .json.gz."""

import gzip
import json
import zlib
from pathlib import Path
from typing import Any

from flamingo_fast.profiling.recorded_session import RecordedSession
from flamingo_fast.profiling.traces import GpuWork, Range, ReportError, Trace, assemble

_GPU = ("kernel", "gpu_memcpy", "gpu_memset")
_LAUNCHES = ("cuda_runtime", "cuda_driver")


def read_torch_trace(path: Path, session: RecordedSession) -> Trace:
    """Ranges are annotations that begin with the domain of `session`.

    Raises:
        ReportError: `path` is no trace, is truncated, or has no steps.
    """
    prefix = f"{session.domain}: "
    ranges, gpu, launches = [], [], {}
    for number, event in enumerate(_events(path)):
        category = event.get("cat") if isinstance(event, dict) else None
        if category not in ("user_annotation", *_GPU, *_LAUNCHES) or event.get("ph") != "X":
            continue
        try:
            name, process, thread = str(event["name"]), event["pid"], event["tid"]
            start = round(event["ts"] * 1e3)
            end = start + round(event["dur"] * 1e3)
            arguments = event.get("args", {})
            if category in _LAUNCHES:
                if "correlation" in arguments:
                    launches[arguments["correlation"]] = process, thread, start
            elif category in _GPU:
                gpu.append((category, name, start, end, arguments))
            elif name.startswith(prefix):
                ranges.append(Range(name.removeprefix(prefix), start, end, process, thread))
        except (KeyError, TypeError, AttributeError, ValueError, OverflowError) as error:
            raise ReportError(
                f"{path}: event {number}: expected pid, tid, ts and dur of a {category}: {error!r}"
            ) from error
    # There is but one process in a trace; a kernel's `pid` is its device.
    process = ranges[0].process if ranges else 0
    work = []
    for category, name, start, end, arguments in gpu:
        launch = launches.get(arguments.get("correlation"))
        device, stream = (_number(arguments.get(key)) for key in ("device", "stream"))
        work.append(
            GpuWork(
                name if category == "kernel" else f"[{name}]",
                *(start, end, process, device, stream),
                launch[1:] if launch else None,
            )
        )
    return assemble(path, "torch", ranges, work, (), step=session.step, capture=session.capture)


def _number(value: Any) -> int:
    return value if isinstance(value, int) else 0


def _events(path: Path) -> list[Any]:
    expected = "expected a Chrome trace of torch.profiler"
    try:
        opened = gzip.open(path) if path.suffix == ".gz" else path.open("rb")
        with opened as file:
            data = json.load(file)
    except (OSError, EOFError, zlib.error, ValueError) as error:
        if path.stat().st_size == 0:
            raise ReportError(f"{path}: {expected}, got an empty file") from error
        raise ReportError(f"{path}: {expected}; it is truncated or none: {error}") from error
    events = data.get("traceEvents") if isinstance(data, dict) else None
    if not isinstance(events, list):
        raise ReportError(f"{path}: {expected}, got JSON without a list 'traceEvents'")
    return events
