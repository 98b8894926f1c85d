"""How kernels are started: what launchers tune for, and the one door for all launches."""

import contextlib
import dataclasses
import functools
from collections.abc import Iterator
from typing import Any

import torch


@dataclasses.dataclass(frozen=True)
class Target:
    """What launch configurations depend on. `arch` is "sm_90", "gfx942", ... or "interpreter".

    device: the name of the one that is here, whose tuned configurations are used; "": of none.
    """

    arch: str
    num_sms: int
    device: str = ""


@dataclasses.dataclass(frozen=True)
class Launch:
    """One recorded kernel launch: all that Triton needs to compile it."""

    kernel: Any
    grid: tuple[int, ...]
    args: tuple[Any, ...]
    constexprs: dict[str, Any]
    options: dict[str, Any]


# Few programs, so that the loops of persistent kernels run more than once in tests.
INTERPRETER = Target("interpreter", num_sms=4, device="interpreter")

_recording: tuple[Target, list[Launch]] | None = None


@functools.cache
def _cuda_target(index: int) -> Target:
    properties = torch.cuda.get_device_properties(index)
    if torch.version.hip:
        arch = properties.gcnArchName.split(":")[0]
    else:
        arch = f"sm_{properties.major}{properties.minor}"
    return Target(arch, properties.multi_processor_count, properties.name)


def target_of(tensor: torch.Tensor) -> Target:
    """The target that `tensor`'s kernels run on, or the recorded one inside `recording`."""
    if _recording is not None:
        return _recording[0]
    if tensor.device.type == "cuda":
        return _cuda_target(tensor.device.index)
    return INTERPRETER


@contextlib.contextmanager
def recording(target: Target) -> Iterator[list[Launch]]:
    """Launchers called inside tune for `target` and have their launches recorded, not run.

    What they choose follows from `target` alone, whatever was tuned on the device that is here.

    Tensors may be on the meta device: nothing is read. The ahead-of-time gate compiles what
    this yields, so it sees the arguments that the launchers themselves produce.
    """
    global _recording
    if _recording is not None:
        raise RuntimeError("recording() is already active")
    _recording = (dataclasses.replace(target, device=""), [])
    try:
        yield _recording[1]
    finally:
        _recording = None


def cdiv(a: int, b: int) -> int:
    """triton.cdiv and its like cost several microseconds a call outside kernels."""
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    return 1 << max(n - 1, 0).bit_length()


def launch(
    kernel: Any,
    grid: tuple[int, ...],
    *args: Any,
    num_warps: int,
    num_stages: int = 1,
    max_registers: int | None = None,
    **constexprs: Any,
) -> None:
    """Starts `kernel` on the device of its first tensor argument; an empty grid starts nothing.

    Arguments:
        max_registers: a thread's, on NVIDIA GPUs. Left alone, ptxas may spill for the sake of more
            blocks an SM.
    """
    if 0 in grid:
        return
    tensor = next(arg for arg in args if isinstance(arg, torch.Tensor))
    # The default of enable_fp_fusion differs between Triton versions.
    options = {"num_warps": num_warps, "num_stages": num_stages, "enable_fp_fusion": True}
    if max_registers is not None and target_of(tensor).arch.startswith("sm_"):
        options["maxnreg"] = max_registers
    if _recording is not None:
        _recording[1].append(Launch(kernel, grid, args, constexprs, options))
        return
    device = tensor.device
    if device.type == "cuda" and device.index != torch.cuda.current_device():
        with torch.cuda.device(device):
            start(kernel, grid, args, constexprs, options, device.index)
    else:
        start(kernel, grid, args, constexprs, options, device.index)


# Calls of one model repeat a few hundred; this many are of shapes that never come back.
_MOST_STARTED = 8192
_started: dict[tuple[Any, ...], tuple[Any, tuple[Any, ...]]] = {}


def start(
    kernel: Any,
    grid: tuple[int, ...],
    args: tuple[Any, ...],
    constexprs: dict[str, Any],
    options: dict[str, Any],
    device_index: int | None,
) -> None:
    """Compiles `kernel` for these arguments if it wasn't, and starts it on the current device.

    Triton's own way from arguments to the compiled kernel costs as much as all else of an op that
    a CPU does. All that it could depend on is the key here: of numbers the values themselves.
    """
    key = (
        id(kernel),
        device_index,
        *options.values(),
        *constexprs.values(),
        *[(x.dtype, x.data_ptr() & 15) if isinstance(x, torch.Tensor) else x for x in args],
    )
    if (found := _started.get(key)) is not None:
        compiled, constants = found
        compiled[(*grid, 1, 1)[:3]](*args, *constants)
        return
    compiled = kernel[grid](*args, **constexprs, **options)
    # Triton's interpreter has none, and what compiles in the background can't be started yet.
    if hasattr(compiled, "__getitem__"):
        if len(_started) >= _MOST_STARTED:
            _started.clear()
        constants = tuple(constexprs[name] for name in kernel.arg_names[len(args) :])
        _started[key] = compiled, constants
