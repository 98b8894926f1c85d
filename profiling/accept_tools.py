"""The stages of `accept` that run other programs: doctor, compute-sanitizer, Nsight sessions."""

import functools
import importlib.util
import os
import re
import sys
import tempfile

from flamingo_fast.profiling.accept_context import Context, Skip, synchronize
from flamingo_fast.profiling.processes import find_program, run_program

_TORCH, _TRITON = (2, 11), (3, 6)


def doctor(context: Context) -> None:
    """What `flamingo-fast doctor` tries; what every later stage needs has to work."""
    from flamingo_fast.doctor import examine

    report = examine()
    for name, version in report.versions.items():
        context.row("Versions", ("package", "version"), (name, version or "not installed"))
    for device in report.devices:
        context.row("Devices", ("device",), (device,))
    for name, least in (("torch", _TORCH), ("triton", _TRITON)):
        version = report.versions[name]
        if version is not None and _numbers(version) >= least:
            context.check(name, True, version)
        else:
            expected = f"expected {'.'.join(map(str, least))} or later"
            context.check(name, False, f"{version}, {expected}")
    on_device = "triton on a GPU" if context.on_gpu else "triton in its interpreter"
    for backend in report.backends:
        if backend.status == "unavailable" and backend.name not in ("torch", on_device):
            context.skip(backend.name, backend.detail)
        else:
            context.check(backend.name, backend.status == "usable", backend.detail)


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(map(int, re.findall(r"\d+", version)[:2]))


def sanitizer(context: Context) -> None:
    """No access out of bounds, no race in shared memory, in `small_cases`."""
    program = find_program("compute-sanitizer") if context.on_gpu else None
    if context.on_gpu and program is None:
        context.skip("compute-sanitizer", "missing compute-sanitizer")
        return
    for tool in ("memcheck", "racecheck") if context.on_gpu else ("memcheck",):
        context.attempt(tool, functools.partial(_sanitized, context, program, tool))
    if not context.on_gpu:
        context.not_exercised("compute-sanitizer: its cases ran without it")


def small_cases(context: Context) -> None:
    """Forward and backward of a kernel of each family, at sizes that fill no tile."""
    from flamingo_fast.bench import attention, latent, several_media
    from flamingo_fast.profiling.accept_parity import BENCHMARKS, Legs, Subject

    shapes = {
        "gated_residual_layer_norm": (33, 1001),
        attention.NAME: (2, 100, 2, 2, 64, 5),
        several_media.ALL_PREVIOUS: (2, 100, 2, 2, 64, 5),
        latent.NAME: (3, 10, 70, 4, 2, 64, 37),
    }
    for name, shape in shapes.items():
        small = shape if context.on_gpu else BENCHMARKS[name].tiny_shape
        legs = Legs(Subject(BENCHMARKS[name], small, "fp16", context.device))

        def run(legs: Legs = legs) -> str:
            found = legs.ours("triton")
            synchronize(context.device)
            return f"{len(found)} tensors"

        context.attempt(name, run)


def _sanitized(context: Context, program: str | None, tool: str) -> str:
    """Runs `small_cases` under a tool, or without one where `program` is None."""
    from flamingo_fast.profiling import accept_worker

    work = context.work / tool
    work.mkdir()
    child = Context(context.device, context.quick, work, work / "events.jsonl", context.deadline)
    # Half of what is left, so that a tool that hangs leaves time to the next one.
    limit_s = max(context.seconds_left / 2 - 2, 1.0)
    target = f"{small_cases.__module__}:{small_cases.__name__}"
    prefix = [] if program is None else [program, "--tool", tool, "--error-exitcode", "99"]
    command = [
        *prefix,
        *(sys.executable, "-m", accept_worker.__name__),
        *accept_worker.arguments(child, target, limit_s),
    ]
    # One block of memory for many tensors would hide what runs over the end of one.
    code, output = run_shown(command, limit_s, {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"})
    told = child.events.read_text() if child.events.exists() else ""
    return judge_sanitizer(code, output, told, with_tool=program is not None)


def judge_sanitizer(code: int, output: str, told: str, *, with_tool: bool) -> str:
    """The tool's summary.

    Arguments:
        told: events of the cases.

    Raises:
        Skip: the tool does not work on this machine.
        AssertionError: it found something, or the cases did not come to an end.
    """
    summary = _line(output, r"(ERROR|RACECHECK) SUMMARY:") or "no summary"
    found = re.search(r"SUMMARY: (\d+)", summary)
    # Other programs say so, too, of something else.
    unsupported = _line(output, r"not supported|Unable to|Failed to init|No attachable")
    if with_tool and unsupported and not found:
        raise Skip(unsupported)
    if with_tool and found and int(found[1]):
        errors = _line(output, r"Invalid|hazard|race|Error: ") or ""
        raise AssertionError(f"{summary}; first: {errors}")
    if '"failed"' in told or '"end"' not in told or code:
        raise AssertionError(f"exit code {code}, the cases failed or did not end: {output[-500:]}")
    if with_tool and not found:
        raise AssertionError(f"no summary: {output[-500:]}")
    return summary if with_tool else "without the tool"


def _line(text: str, pattern: str) -> str | None:
    return next((line.strip() for line in text.splitlines() if re.search(pattern, line)), None)


def run_shown(
    command: list[str], limit_s: float, more_environment: dict[str, str] | None = None
) -> tuple[int, str]:
    """Exit code and output; also printed.

    Raises:
        TimeoutError: it takes longer than that.
    """
    print("$", *command, flush=True)
    environment = {**os.environ, **(more_environment or {})}
    with tempfile.TemporaryFile() as file:
        try:
            code = run_program(command, file, limit_s=limit_s, environment=environment)
        finally:
            file.seek(0)
            output = file.read().decode(errors="replace")
            print(output, flush=True)
    return code, output


TARGETS = ("train:micro", "decode:micro", "masked_cross_attention")
_DRIVER = "flamingo_fast.profiling.run"


# There is room for three files; ncu's of whole models are like that of the op.
_KEPT = (("nsys", "train:micro"), ("nsys", "decode:micro"), ("ncu", "masked_cross_attention"))
# ncu runs each launch dozens of times over.
_LAUNCHES = 6


def sessions(context: Context) -> None:
    """Each profiler's session of each target writes something; a missing profiler is skipped."""
    if importlib.util.find_spec(_DRIVER) is None:
        raise ModuleNotFoundError(f"No module named {_DRIVER!r}", name=_DRIVER)
    tools = ("nsys", "ncu") if context.on_gpu else ("torch",)
    todo = [(tool, target) for tool in tools for target in TARGETS]
    for index, (tool, target) in enumerate(todo):
        limit_s = max((context.seconds_left - 5) / (len(todo) - index), 5.0)
        # None waits for more than two shares, and what one leaves the next ones have.
        limit_s = min(2 * limit_s, context.seconds_left - 5)
        context.attempt(
            f"{tool} {target}",
            functools.partial(_session, context, tool, target, limit_s),
        )
    if not context.on_gpu:
        context.not_exercised("nsys and ncu: torch.profiler ran in their place")


def _session(context: Context, tool: str, target: str, limit_s: float) -> str:
    from flamingo_fast.profiling.kernel_work import FORMULAS
    from flamingo_fast.profiling.profile_report import report
    from flamingo_fast.profiling.run import LOG

    if tool != "torch" and find_program(tool) is None:
        raise Skip(f"missing {tool}")
    out = context.work / re.sub(r"\W", "_", f"{tool}_{target}")
    command = [sys.executable, "-m", _DRIVER, target, "--tool", tool, "--out", str(out)]
    # Before we end it, so that it can say what the tool said.
    command += ["--timeout", f"{max(limit_s - 3, 1):.0f}"]
    if context.quick:
        command += ["--steps", "1", "--warmup", "1" if context.on_gpu else "0"]
    if tool == "ncu":
        command += ["--kernel", "|".join(FORMULAS), "--launches", str(_LAUNCHES)]
    code, output = run_shown(command, limit_s)
    if code:
        log = out / LOG
        said = log.read_text(errors="replace") if log.exists() else ""
        print(said, flush=True)
        raise session_error(code, f"{said}\n{output}")
    files = [each for each in out.rglob("*") if each.is_file() and each.stat().st_size]
    if tool == "torch" or (tool, target) in _KEPT:
        largest = max(files, key=lambda each: each.stat().st_size)
        context.keep(largest, f"{out.name}{''.join(largest.suffixes[-2:])}")
    return " ".join(report([out]).sections[0].sentences)


def session_error(code: int, output: str) -> Exception:
    """Of a driver that failed: Skip where it lacks something, or may not read the counters."""
    if found := re.search(r"No module named '([^']+)'|(\S+) is not installed", output):
        package = (found[1] or found[2]).partition(".")[0]
        if package != "flamingo_fast":
            return Skip(f"missing {package}")
    if line := _line(output, r"ERR_NVGPUCTRPERM|LibraryNotLoaded"):
        return Skip(line)
    return AssertionError(f"exit code {code}: {output.strip()[-500:]}")
