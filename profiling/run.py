"""Starts a profiling session under nsys, ncu or torch.profiler; one driver for all three.

Also without installation, from the repository's root:

    python -m flamingo_fast.profiling.run TARGET --tool nsys|ncu|torch [--out DIR]
"""

import argparse
import os
import sys
from pathlib import Path

import torch

from flamingo_fast.profiling.annotate import DOMAIN, nvtx_domain
from flamingo_fast.profiling.processes import find_program, run_program
from flamingo_fast.profiling.recorded_session import FILE_NAME
from flamingo_fast.profiling.session import CAPTURE, TRACE, device_of
from flamingo_fast.profiling.targets import TargetError, check_target

TOOLS = ("nsys", "ncu", "torch")
REPORT = "report"
LOG = "log.txt"
# ncu runs each kernel many times over, once for each group of counters.
_STEPS = {"nsys": 3, "ncu": 1, "torch": 3}
_WARMUP = 2
# One of these has a session beside session.json.
_WRITTEN = {
    "nsys": (f"{REPORT}.nsys-rep", f"{REPORT}.qdstrm"),
    "ncu": (f"{REPORT}.ncu-rep",),
    "torch": (TRACE,),
}


class SessionError(RuntimeError):
    """There is no session; the message says why."""


class FailedSessionError(SessionError):
    """The tool or the target was started, and failed."""


def run(
    target: str,
    *,
    tool: str | None = None,
    out: Path | None = None,
    steps: int | None = None,
    warmup: int = _WARMUP,
    device: str | None = None,
    kernel: str = "",
    launches: int | None = None,
    timeout_s: float | None = None,
) -> Path:
    """A session's folder: session.json, and report.nsys-rep, report.ncu-rep or trace.json.

    Arguments:
        target: see `flamingo_fast.profiling.targets`.
        tool: by default nsys where it is found, else torch.
        out: by default a new folder in profiling/reports.
        steps: that are recorded; 3 by default, 1 under ncu.
        warmup: steps before these.
        device: by default a GPU, if there is one.
        kernel: of ncu, a regular expression of kernels' names.
        launches: of ncu, the most that it looks at; each runs dozens of times over.
        timeout_s: seconds that all of it may take.

    Raises:
        TargetError: a name that is no target.
        SessionError: the tool or the device isn't there.
        FailedSessionError: the tool or the target failed.
        OSError: `out` can't be written.
        ImportError: nvtx is not installed, and nsys or ncu are to see ranges.
    """
    check_target(target)
    tool = tool or ("nsys" if find_program("nsys") else "torch")
    if tool not in TOOLS:
        raise SessionError(f"tool: expected one of {', '.join(TOOLS)}; got {tool!r}")
    try:
        on_gpu = torch.cuda.is_available() if device is None else device_of(device).type == "cuda"
    except ValueError as error:
        raise SessionError(str(error)) from None
    if tool == "ncu" and not on_gpu:
        raise SessionError("tool: ncu measures kernels of a GPU, and there is none; nsys or torch")
    executable = find_tool(tool) if tool != "torch" else None
    if tool != "torch":
        nvtx_domain()
    out = default_out(target, tool) if out is None else out
    out.mkdir(parents=True, exist_ok=True)
    for name in (FILE_NAME, *(name for names in _WRITTEN.values() for name in names)):
        (out / name).unlink(missing_ok=True)
    session = [
        *(sys.executable, "-m", "flamingo_fast.profiling.session", target),
        *("--tool", tool, "--out", str(out)),
        *("--steps", str(steps or _STEPS[tool]), "--warmup", str(warmup)),
        *(("--device", device) if device else ()),
    ]
    prefix = tool_command(tool, executable, out, on_gpu=on_gpu, kernel=kernel, launches=launches)
    _start([*prefix, *session], tool, out, timeout_s)
    return out


def tool_command(
    tool: str,
    executable: str | None,
    out: Path,
    *,
    on_gpu: bool,
    kernel: str = "",
    launches: int | None = None,
) -> list[str]:
    """The tool's part of the command line."""
    report = str(out / REPORT)
    if tool == "nsys":
        traces = "cuda,nvtx,osrt,cudnn,cublas" if on_gpu else "nvtx,osrt"
        return [
            *(str(executable), "profile", f"--trace={traces}"),
            # The samples of a CPU need rights, and cost time.
            *("--sample=none", "--cpuctxsw=none"),
            *("--capture-range=nvtx", f"--nvtx-capture={CAPTURE}@{DOMAIN}"),
            *("--capture-range-end=stop", "--force-overwrite=true", f"--output={report}"),
        ]
    if tool == "ncu":
        return [
            *(str(executable), "--nvtx", "--nvtx-include", f"{DOMAIN}@{CAPTURE}"),
            # Source lines beside SASS; base clocks, so that sessions can be compared: absolute
            # times are longer than outside of ncu.
            *("--set", "full", "--import-source", "yes", "--clock-control", "base"),
            *(("--kernel-name", f"regex:{kernel}") if kernel else ()),
            *(("--launch-count", str(launches)) if launches else ()),
            *("--target-processes", "all", "--force-overwrite", "--export", report),
        ]
    return []


def environment(tool: str) -> dict[str, str]:
    """What the session's process gets."""
    values = dict(os.environ)
    root = str(Path(__file__).resolve().parents[1])
    if Path(root, "flamingo_fast").is_dir():
        values["PYTHONPATH"] = os.pathsep.join(filter(None, (root, values.get("PYTHONPATH"))))
    if tool == "nsys":
        # Else only a registered string's range begins the capture.
        values["NSYS_NVTX_PROFILER_REGISTER_ONLY"] = "0"
    return values


def _start(command: list[str], tool: str, out: Path, timeout_s: float | None) -> None:
    log = out / LOG
    try:
        with log.open("wb") as file:
            file.write(" ".join(command).encode() + b"\n")
            file.flush()
            code = run_program(command, file, limit_s=timeout_s, environment=environment(tool))
    except TimeoutError as error:
        raise FailedSessionError(f"{tool}: {error}; see {log}") from None
    if code or not (out / FILE_NAME).exists():
        last = log.read_text(errors="replace").strip().splitlines()[-1]
        raise FailedSessionError(f"exit code {code}: {last}; see {log}")
    if not any((out / name).exists() for name in _WRITTEN[tool]):
        raise FailedSessionError(f"{tool} wrote no {' or '.join(_WRITTEN[tool])}; see {log}")


def find_tool(tool: str) -> str:
    """Path of nsys or ncu: $FLAMINGO_FAST_NSYS or $FLAMINGO_FAST_NCU, in $PATH or $CUDA_HOME/bin.

    Raises:
        SessionError: it is not there.
    """
    found = find_program(tool)
    if found is None:
        raise SessionError(
            f"tool: {tool} is not in $PATH, in $CUDA_HOME/bin or ${_variable(tool)}; --tool torch "
            "needs none"
        )
    return found


def _variable(tool: str) -> str:
    return f"FLAMINGO_FAST_{tool.upper()}"


def default_out(target: str, tool: str) -> Path:
    """A new folder in profiling/reports, which git ignores, of the working directory."""
    name = "".join(each if each.isalnum() or each in "._-" else "-" for each in target)
    parent = Path("profiling", "reports")
    number = 1
    while (out := parent / f"{name}-{tool}-{number}").exists():
        number += 1
    return out


def main(arguments: list[str]) -> int:
    """Runs what the arguments say; returns the exit code: 1 a failed session, 2 bad usage."""
    parser = argparse.ArgumentParser(prog="python -m flamingo_fast.profiling.run")
    parser.add_argument("target")
    parser.add_argument("--tool", choices=TOOLS)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--steps", type=int)
    parser.add_argument("--warmup", type=int, default=_WARMUP)
    parser.add_argument("--device")
    parser.add_argument("--kernel", default="")
    parser.add_argument("--launches", type=int)
    parser.add_argument("--timeout", type=float, dest="timeout_s")
    given = vars(parser.parse_args(arguments))
    try:
        print(run(given.pop("target"), **given))
    except (FailedSessionError, ImportError, OSError) as error:
        print(f"profile run: {error}", file=sys.stderr)
        return 1
    except (TargetError, SessionError) as error:
        print(f"profile run: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
