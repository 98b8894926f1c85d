"""Bytes and products of kernels as the interpreter's guard counts them, beside the formulas'.

To be called in processes where TRITON_INTERPRET=1 was set before Triton was imported.
"""

import dataclasses
import multiprocessing
import os
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from unittest import mock

import torch

from flamingo_fast.bench import plan
from flamingo_fast.profiling.roofline_cases import RooflineCase


@dataclasses.dataclass(frozen=True)
class Counted:
    """Of all launches of a kernel in a case: counted / formula.

    Attributes:
        at: the case's name.
        bytes: as lanes ask for them.
        memory: bytes of the 32-byte sectors that are touched, beside useful ones; at small shapes
            much of a sector may be nobody's.
        flops: of products of tiles; None: it has none.
    """

    kernel: str
    at: str
    bytes: float
    memory: float
    flops: float | None


def count(case: RooflineCase) -> list[Counted]:
    """Runs a small case, forward and backward, in the interpreter."""
    from flamingo_fast.bench.registry import DTYPES
    from flamingo_fast.kernels.launch import INTERPRETER
    from flamingo_fast.profiling.kernel_work import work_of_call
    from flamingo_fast.profiling.launches import calls_of, launches_of
    from flamingo_fast.testing.guard import guard

    benchmark = plan.BENCHMARKS[case.op]
    calls = calls_of(launches_of(benchmark, case.shape, case.dtype, "fwd_bwd", INTERPRETER))
    inputs = benchmark.make_inputs(case.shape, DTYPES[case.dtype], torch.device("cpu"))
    leaves = [
        value.requires_grad_()
        for value in inputs.values()
        if isinstance(value, torch.Tensor) and value.is_floating_point()
    ]
    with guard() as guarded:
        outputs = benchmark.ours(*inputs.values(), impl="triton")
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        torch.autograd.grad(outputs, leaves, [torch.ones_like(out) for out in outputs])
    started = [launch.kernel for launch in guarded.launches]
    recorded = [call.kernel for call in calls]
    if started != recorded:
        raise RuntimeError(f"{case.name}: recorded {recorded}, but {started} ran")
    found = []
    for kernel in dict.fromkeys(started):
        measured = guarded.total(kernel)
        formulas = [work_of_call(call) for call in calls if call.kernel == kernel]
        lanes, useful, flops = (
            sum(numbers)
            for numbers in zip(
                *(
                    (work.executed.bytes, work.useful.bytes, work.executed.matmul_flops)
                    for work in formulas
                ),
                strict=True,
            )
        )
        found.append(
            Counted(
                kernel,
                case.name,
                bytes=(measured.bytes_loaded + measured.bytes_stored) / lanes,
                memory=(measured.sectors_loaded + measured.sectors_stored) / useful,
                flops=measured.dot_flops / flops if flops else None,
            )
        )
    return found


def count_all(
    wanted: dict[str, tuple[RooflineCase, set[str]]],
    progress: Callable[[Iterable[str], int], Iterable[str]],
) -> dict[str, dict[str, Counted]]:
    """By name of a case and kernel, each counted at the first small shape that starts it.

    Arguments:
        wanted: cases by name, and their kernels.
        progress: wraps the names as they are done; its second argument is how many there are.
    """
    found: dict[str, dict[str, Counted]] = {}
    done: dict[str, list[Counted]] = {}
    context = multiprocessing.get_context("spawn")
    # An initializer would come too late: to find it is to import Triton.
    with (
        mock.patch.dict(os.environ, TRITON_INTERPRET="1"),
        ProcessPoolExecutor(mp_context=context) as pool,
    ):
        small = {each.name: each for case, _ in wanted.values() for each in [next(case.small())]}
        futures = {name: pool.submit(count, each) for name, each in small.items()}
        for name in progress(iter(futures), len(futures)):
            done[name] = futures[name].result()
        for name, (case, kernels) in wanted.items():
            of_case = found.setdefault(name, {})
            for each in case.small():
                if kernels <= of_case.keys():
                    break
                if each.name not in done:
                    done[each.name] = pool.submit(count, each).result()
                for counted in done[each.name]:
                    if counted.kernel in kernels:
                        of_case.setdefault(counted.kernel, counted)
    return found
