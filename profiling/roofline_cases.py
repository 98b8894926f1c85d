"""The registry's benchmarks as cases for `flamingo_fast.testing.aot.Compiler`, and small ones."""

import dataclasses
from collections.abc import Iterator

from flamingo_fast.bench import plan
from flamingo_fast.bench.registry import Shape, shape_name
from flamingo_fast.profiling.kernel_work import LaunchWork, work_of_call
from flamingo_fast.profiling.launches import call_case, calls_of
from flamingo_fast.testing.aot import KernelCase, PlannedCompile, plan_launches

DTYPES = ("bf16", "fp32")

# Norms of Flamingo-80B's language model; only of rows so wide the backward takes two kernels.
_MORE_SHAPES: dict[str, tuple[Shape, ...]] = {"gated_residual_layer_norm": ((2048, 8192),)}

# Beside the tiny shape of each op, small ones that start the kernels which that doesn't: media of
# several work items, splits of keys, heads that share keys, rows too wide for one pass.
_MORE_SMALL_SHAPES: dict[str, tuple[Shape, ...]] = {
    "gated_residual_layer_norm": ((2, 4160),),
    "masked_cross_attention": ((1, 256, 1, 1, 16, 16),),
    "masked_cross_attention_mllama": ((1, 1, 1, 4, 1, 16, 1, 1100),),
    "latent_attention": ((1, 16, 1100, 8, 1, 16, 1100),),
}


@dataclasses.dataclass(frozen=True)
class RooflineCase:
    """A benchmark at one of its shapes, forward and backward."""

    op: str
    shape: Shape
    dtype: str

    @property
    def name(self) -> str:
        return f"{self.op}/{shape_name(self.shape)}/{self.dtype}"

    def run(self) -> None:
        call_case(plan.BENCHMARKS[self.op], self.shape, self.dtype, "fwd_bwd")

    def small(self) -> Iterator["RooflineCase"]:
        """Such as an interpreter runs in a second, the smallest first."""
        tiny = plan.BENCHMARKS[self.op].tiny_shape
        for shape in (tiny, *_MORE_SMALL_SHAPES.get(self.op, ())):
            yield dataclasses.replace(self, shape=shape)
        # Its variants start the same kernels.
        for op, shapes in _MORE_SMALL_SHAPES.items():
            for shape in shapes if op != self.op else ():
                yield RooflineCase(op, shape, self.dtype)


def _cases() -> Iterator[RooflineCase]:
    for name, benchmark in plan.BENCHMARKS.items():
        for shape in (*benchmark.shapes, *_MORE_SHAPES.get(name, ())):
            for dtype in DTYPES:
                yield RooflineCase(name, shape, dtype)


ROOFLINE_CASES = {case.name: case for case in _cases()}
CASES = [KernelCase(case.name, case.run) for case in ROOFLINE_CASES.values()]


@dataclasses.dataclass(frozen=True)
class Launched:
    """What a case launches once, or `calls` times alike.

    Attributes:
        kernel: the function's name.
        plan: what it takes to compile it.
        programs, num_warps: of the grid, and of a program.
        work: of one call.
    """

    kernel: str
    plan: PlannedCompile
    programs: int
    num_warps: int
    work: LaunchWork
    calls: int = 1


def launched_by(case: str, target: str) -> list[Launched]:
    """Different launches of a case, in order. To be called as `plan_launches`."""
    kernel_case = next(each for each in CASES if each.name == case)
    planned = plan_launches(kernel_case, target)
    found: dict[tuple[object, ...], Launched] = {}
    for (plan_of_launch, _), call in zip(
        planned, calls_of(launch for _, launch in planned), strict=True
    ):
        work = work_of_call(call)
        new = Launched(call.kernel, plan_of_launch, call.programs, call.num_warps, work, calls=0)
        key = (call.kernel, plan_of_launch.source, call.programs, work)
        known = found.setdefault(key, new)
        found[key] = dataclasses.replace(known, calls=known.calls + 1)
    return list(found.values())
