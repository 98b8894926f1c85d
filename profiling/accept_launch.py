"""What a call of an op costs the CPU, over what Triton takes to launch the same kernels.

A bare launch is what someone with the kernel alone would write, `kernel[grid](*arguments, ...)`
with all memory there already; of an op of several kernels it is all of them. The op's call also
checks its arguments, allocates and dispatches. Beside it, unjudged, is what starts a kernel here:
compiled ones are remembered by their arguments (`kernels/launch.py`).
"""

import contextlib
import dataclasses
import functools
import statistics
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch

from flamingo_fast.bench import attention, latent, ops, pairs, several_media
from flamingo_fast.bench.timing import interleaved, wall_clock
from flamingo_fast.kernels.launch import Launch, start
from flamingo_fast.profiling.accept_context import Context
from flamingo_fast.profiling.accept_parity import Legs, Subject, subjects

MOST = 1.3
_CALLS_PER_SAMPLE = 20
_NAMES = (
    *ops.BENCHMARKS,
    *(attention.NAME, several_media.ALL_PREVIOUS, several_media.MLLAMA, pairs.NAME, latent.NAME),
)
_HEADERS = ("op", "mode", "kernels", "call, us", "bare launch, us", "ratio", "our launch, us")


@contextlib.contextmanager
def _recording() -> Iterator[list[Launch]]:
    """Launches that run inside, with their arguments."""
    from flamingo_fast.kernels import launch

    started: list[Launch] = []

    def record(
        kernel: Any,
        grid: tuple[int, ...],
        args: tuple[Any, ...],
        constexprs: dict[str, Any],
        options: dict[str, Any],
        device_index: int | None,
    ) -> None:
        started.append(Launch(kernel, grid, args, constexprs, options))
        start(kernel, grid, args, constexprs, options, device_index)

    with mock.patch.object(launch, "start", record):
        yield started


def _launch_all(launches: list[Launch]) -> None:
    for each in launches:
        each.kernel[each.grid](*each.args, **each.constexprs, **each.options)


def _start_all(launches: list[Launch], device_index: int | None) -> None:
    for each in launches:
        start(each.kernel, each.grid, each.args, each.constexprs, each.options, device_index)


def _call(subject: Subject, mode: str) -> Callable[[], object]:
    """Forward without gradients, as at inference, or forward and backward."""
    legs = Legs(subject)
    # With the defaults: a mean over all values is PyTorch's, beside the kernels.
    if subject.benchmark.name == several_media.ALL_PREVIOUS:
        legs.benchmark = dataclasses.replace(legs.benchmark, ours=attention.ours)
    if mode == "fwd_bwd":
        return lambda: legs.ours("triton")
    inputs = [
        each.detach() if isinstance(each, torch.Tensor) else each
        for each in legs.case.inputs.values()
    ]
    return lambda: legs.benchmark.ours(*inputs, impl="triton")


def measure(context: Context, subject: Subject, mode: str) -> str | None:
    """Adds a row.

    Raises:
        AssertionError: on a GPU, if a forward call takes more than MOST times the bare launch.
    """
    device = context.device
    call = _call(subject, mode)
    call()
    with _recording() as launches:
        call()
    if not launches:
        raise AssertionError("no kernel was started")
    index = device.index or 0 if context.on_gpu else None
    repeats, rounds = (_CALLS_PER_SAMPLE, 15) if context.on_gpu else (1, 2)
    samples = interleaved(
        {
            "call": call,
            "bare": functools.partial(_launch_all, launches),
            "ours": functools.partial(_start_all, launches, index),
        },
        wall_clock(device, repeats),
        budget_s=0.3 if context.on_gpu else 0.0,
        fewest_rounds=rounds,
        wanted_rounds=rounds,
    )
    pairs_of_rounds = zip(samples["call"], samples["bare"], strict=True)
    ratio = statistics.median(one / other for one, other in pairs_of_rounds)
    us = {name: statistics.median(each) * 1e6 for name, each in samples.items()}
    name = subject.benchmark.name
    numbers = (*(f"{us[key]:.1f}" for key in ("call", "bare")), f"{ratio:.2f}", f"{us['ours']:.1f}")
    context.row("CPU time of a call", _HEADERS, (name, mode, len(launches), *numbers))
    text = f"{us['call']:.1f} us, {ratio:.2f} x the bare launch of {len(launches)}"
    if context.on_gpu and mode == "fwd" and ratio > MOST:
        raise AssertionError(f"{text}, expected at most {MOST}")
    return text


def launch(context: Context) -> None:
    """Forward calls of every op are judged; those with a backward are measured, too."""
    every = subjects(context.device, quick=True, names=_NAMES, dtypes=("bf16",))
    # Small: the GPU must not be what calls wait for.
    small = [each for each in every if each.shape == each.benchmark.tiny_shape]
    if context.quick:
        small = small if context.on_gpu else [small[0], small[-1]]
    for subject in small:
        for mode in ("fwd", "fwd_bwd"):
            context.attempt(
                f"{subject.benchmark.name} {mode}",
                functools.partial(measure, context, subject, mode),
            )
    if not context.on_gpu:
        context.not_exercised(f"the limit of {MOST}: an interpreter's times say nothing of it")
