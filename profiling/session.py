"""The process that a tool looks at: warms a target up, then runs some steps inside a range.

    python -m flamingo_fast.profiling.session TARGET --out DIR

It writes DIR/session.json; with --tool torch the trace, too. `flamingo-fast profile run` starts it
under nsys and ncu, whose command lines are in `flamingo_fast.profiling.run`.
"""

import argparse
import contextlib
import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

import flamingo_fast
from flamingo_fast.gpus import GPUS
from flamingo_fast.profiling.annotate import DOMAIN, annotate, nvtx_domain
from flamingo_fast.profiling.recorded_session import FILE_NAME, SCHEMA
from flamingo_fast.profiling.targets import Target, TargetError, build_target
from flamingo_fast.ranges import span

TRACE = "trace.json.gz"
CAPTURE = "capture"
STEP = "step"


def device_of(name: str) -> torch.device:
    """
    Raises:
        ValueError: it is no device that targets can run on.
    """
    try:
        kind = torch.device(name).type
    except RuntimeError:
        kind = ""
    if kind not in ("cpu", "cuda"):
        raise ValueError(f"device: expected cpu or cuda, got {name!r}")
    if kind == "cuda" and not torch.cuda.is_available():
        raise ValueError("device: torch sees no GPU; expected cpu")
    return torch.device(name)


def run_session(
    name: str, tool: str, out: Path, *, steps: int, warmup: int, device: torch.device
) -> None:
    """Runs a target as a tool wants it, and writes what came of it into the folder `out`.

    Raises:
        TargetError: it is no target.
        ImportError: something that it needs is not installed.
        OSError: `out` can't be written.
    """
    target = build_target(name, device)
    for _ in range(warmup):
        target.step()
    _wait(device)
    if tool == "torch":
        seconds = _under_torch(target, steps, out / TRACE, device)
    else:
        seconds = _under_nvtx(target, steps, device)
    session = {
        "schema": SCHEMA,
        "what": "flamingo_fast profiling session",
        "target": target.name,
        "tool": tool,
        "device": _device_name(device),
        "versions": _versions(),
        "domain": DOMAIN,
        "capture": CAPTURE,
        "step": STEP,
        "step_s": seconds,
        "work": target.work(),
        "ceilings": _ceilings(device),
    }
    (out / FILE_NAME).write_text(json.dumps(session, indent=1) + "\n")


def _under_nvtx(target: Target, steps: int, device: torch.device) -> list[float]:
    domain = nvtx_domain()
    # A range that starts and ends, and isn't pushed: nsys and ncu may begin with either.
    started = domain.start_range(message=CAPTURE)
    seconds = _timed_steps(target, steps, device, "nvtx")
    domain.end_range(started)
    return seconds


def _under_torch(target: Target, steps: int, trace: Path, device: torch.device) -> list[float]:
    activities = [torch.profiler.ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities) as profiler:
        seconds = _timed_steps(target, steps, device, "torch")
    profiler.export_chrome_trace(str(trace))
    return seconds


def _timed_steps(target: Target, steps: int, device: torch.device, backend: str) -> list[float]:
    seconds = []
    with _annotated(target, backend):
        for _ in range(steps):
            started = time.perf_counter()
            with span(STEP):
                target.step()
                _wait(device)
            seconds.append(time.perf_counter() - started)
    return seconds


@contextlib.contextmanager
def _annotated(target: Target, backend: str) -> Iterator[None]:
    # An op has no parts, and is a module all the same.
    with annotate(target.model or torch.nn.Identity(), backend=backend):
        yield


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def _versions() -> dict[str, str]:
    versions = {"torch": str(torch.__version__), "flamingo_fast": flamingo_fast.__version__}
    with contextlib.suppress(ImportError):
        import triton

        versions["triton"] = triton.__version__
    return versions


def _ceilings(device: torch.device) -> dict[str, Any] | None:
    """By the data sheet, of a GPU that we have one of."""
    name = _device_name(device)
    gpu = next((each for each in GPUS if name in each.device_names), None)
    if gpu is None:
        return None
    return {
        "gb_s": gpu.bandwidth_of(name),
        "fp32_tflop_s": gpu.vector,
        "matmul_tflop_s": gpu.matmul,
        "source": gpu.source,
    }


def main(arguments: list[str]) -> int:
    """Runs the session that the arguments say; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m flamingo_fast.profiling.session")
    parser.add_argument("target")
    parser.add_argument("--tool", choices=("nsys", "ncu", "torch"), default="torch")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--warmup", type=int, default=2)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    given = parser.parse_args(arguments)
    try:
        device = device_of(given.device)
    except ValueError as error:
        parser.error(str(error))
    given.out.mkdir(parents=True, exist_ok=True)
    try:
        run_session(
            given.target,
            given.tool,
            given.out,
            steps=given.steps,
            warmup=given.warmup,
            device=device,
        )
    except (TargetError, ImportError, OSError) as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
