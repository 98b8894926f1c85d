"""Predicted times of our kernels on GPUs that need not be there, and what limits them.

`flamingo-fast kernels --roofline`. Nothing here is measured: what a launch does is known in closed
form, what its binary asks for by compiling it, and what a GPU does at best by its data sheet.
"""

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from flamingo_fast.bench.roofline import GPUS, Gpu
from flamingo_fast.profiling.counted import Counted, count_all
from flamingo_fast.profiling.roofline_cases import (
    ROOFLINE_CASES,
    Launched,
    RooflineCase,
    launched_by,
)
from flamingo_fast.profiling.rowwise_work import LaunchWork
from flamingo_fast.testing.aot import Compiler, PlannedCompile
from flamingo_fast.testing.goldens import load_goldens
from flamingo_fast.testing.occupancy import ARCHITECTURES, occupancy

TARGETS = {"sm_80": "A100", "sm_90": "H100", "sm_100": "B200", "gfx942": "MI300X"}

# From the start of a kernel to the start of the next one, of kernels that do nothing.
LAUNCH_US = 2.0

ASSUMPTIONS = (
    "predicted, not measured: the longest of useful bytes / peak bandwidth and operations of whole "
    "tiles / peak rate, by data sheets; caches cold, and no byte comes from memory twice",
    "programs are alike: an operation's peak is that of the SMs with work, and the last to finish "
    "decides; a program's SM draws its share of the bandwidth at most",
    f"a kernel takes {LAUNCH_US:g} us at least, which is an assumption",
    "bound: memory, vector, matrix; waves: SMs without work more than double the time; launch: the "
    "least time of a kernel",
)

Progress = Callable[[Iterable[Any], str, int], Iterable[Any]]
"""Wraps things as they are done, with what is done and how many there will be."""


class NoSuchCaseError(ValueError):
    """The user asked for what there is not; the message names it."""


@dataclasses.dataclass(frozen=True)
class Resources:
    """Of a binary; `taken_from`: "golden", or "compiled"."""

    registers: int
    shared_bytes: int
    local_bytes: int
    taken_from: str


@dataclasses.dataclass(frozen=True)
class Waves:
    """How a grid fills a GPU.

    Attributes:
        blocks_per_sm, warps_per_sm: that an SM holds; 0: not even one block fits.
        occupancy: of the warps that it could hold.
        waves: of as many blocks as all SMs hold, of which the last may be small.
        efficiency: of SMs, over the time that the busiest one takes.
    """

    blocks_per_sm: int
    warps_per_sm: int
    occupancy: float
    waves: float
    efficiency: float


@dataclasses.dataclass(frozen=True)
class Prediction:
    """Of one call; us: None if an SM can't hold a block."""

    us: float | None
    bound: str
    waves: Waves


@dataclasses.dataclass(frozen=True)
class OnGpu:
    """A kernel of a case on one GPU; `error`: why it doesn't compile."""

    gpu: str
    target: str
    launched: Launched
    resources: Resources | None
    prediction: Prediction | None
    error: str = ""


@dataclasses.dataclass(frozen=True)
class Row:
    """A kernel of a case; `on` by target, of those where the case starts it."""

    case: RooflineCase
    kernel: str
    on: Mapping[str, OnGpu]
    counted: Counted | None

    @property
    def shown(self) -> Launched:
        """Of the H100, if it is there: bytes and operations differ a little between targets."""
        return (self.on.get("sm_90") or next(iter(self.on.values()))).launched

    def as_dict(self) -> dict[str, Any]:
        """For JSON; a name, a unit each."""
        return {
            "op": self.case.op,
            "shape": list(self.case.shape),
            "dtype": self.case.dtype,
            "kernel": self.kernel,
            "counted": dataclasses.asdict(self.counted) if self.counted else None,
            "predicted": [_as_dict(on) for on in self.on.values()],
        }


def _as_dict(on: OnGpu) -> dict[str, Any]:
    useful, executed = on.launched.work.useful, on.launched.work.executed
    numbers: dict[str, Any] = {
        "gpu": on.gpu,
        "target": on.target,
        "calls": on.launched.calls,
        "programs": on.launched.programs,
        "bytes": useful.bytes,
        "vector_flops": useful.vector_flops,
        "matmul_flops": useful.matmul_flops,
        "executed_bytes": executed.bytes,
        "executed_vector_flops": executed.vector_flops,
        "executed_matmul_flops": executed.matmul_flops,
    }
    if on.resources is None or on.prediction is None:
        return numbers | {"error": on.error}
    numbers |= dataclasses.asdict(on.resources) | dataclasses.asdict(on.prediction.waves)
    return numbers | {"predicted_us": on.prediction.us, "bound": on.prediction.bound}


def fill(target: str, programs: int, num_warps: int, resources: Resources) -> Waves:
    """How `programs` blocks fill a GPU of the architecture `target`."""
    architecture = ARCHITECTURES[target]
    resident = occupancy(target, resources.registers, num_warps, resources.shared_bytes)
    share = resident.warps / architecture.max_warps
    if resident.blocks == 0:
        return Waves(0, 0, 0.0, 0.0, 0.0)
    busiest = -(-programs // architecture.num_sms)
    return Waves(
        resident.blocks,
        resident.warps,
        share,
        programs / (resident.blocks * architecture.num_sms),
        programs / (busiest * architecture.num_sms),
    )


def predict(work: LaunchWork, dtype: str, gpu: Gpu, programs: int, waves: Waves) -> Prediction:
    """The time of one call under ASSUMPTIONS; `waves` of `programs` on that GPU."""
    if waves.blocks_per_sm == 0:
        return Prediction(None, "does not fit", waves)
    limits = {
        "memory": work.useful.bytes / (gpu.bandwidth * 1e3),
        "vector": work.executed.vector_flops / (gpu.vector * 1e6),
        "matrix": work.executed.matmul_flops / (gpu.matmul[dtype] * 1e6),
    }
    # Memory is everybody's: SMs that still have work draw what the others leave.
    busy = min(programs / ARCHITECTURES[_TARGET_OF[gpu.name]].num_sms, 1.0)
    slowed = {
        name: us / (busy if name == "memory" else waves.efficiency) for name, us in limits.items()
    }
    bound, us = max(slowed.items(), key=lambda limit: limit[1])
    if us < LAUNCH_US:
        return Prediction(LAUNCH_US, "launch", waves)
    if us > 2 * max(limits.values()):
        bound = "waves"
    return Prediction(us, bound, waves)


_TARGET_OF = {gpu: target for target, gpu in TARGETS.items()}
_GPUS = {gpu.name: gpu for gpu in GPUS}


def check_targets(targets: Iterable[str]) -> tuple[str, ...]:
    """In the order of TARGETS, all of them for none.

    Raises:
        NoSuchCaseError: a GPU whose peaks are not known.
    """
    chosen = set(targets) or set(TARGETS)
    if unknown := chosen - set(TARGETS):
        raise NoSuchCaseError(
            f"target: with --roofline, expected some of {', '.join(TARGETS)}; "
            f"got {', '.join(sorted(unknown))}"
        )
    return tuple(target for target in TARGETS if target in chosen)


def choose_cases(part: str) -> list[RooflineCase]:
    """Those with `part` in their names, as op/shape/dtype; of an empty one all in bf16.

    Raises:
        NoSuchCaseError: there are none.
    """
    chosen = [case for name, case in ROOFLINE_CASES.items() if part in name]
    if not part:
        chosen = [case for case in chosen if case.dtype == "bf16"]
    if not chosen:
        ops = ", ".join(dict.fromkeys(case.op for case in ROOFLINE_CASES.values()))
        raise NoSuchCaseError(
            f"case: no benchmark's op/shape/dtype has {part!r} in it; ops: {ops}; such as "
            f"{next(iter(ROOFLINE_CASES))}"
        )
    return chosen


def run_roofline(
    compiler: Compiler,
    cases: Iterable[RooflineCase],
    targets: Iterable[str],
    progress: Progress = lambda things, what, total: things,
) -> list[Row]:
    """A row for every kernel of every case.

    Arguments:
        compiler: of `profiling.roofline_cases`.
    """
    cases, targets = list(cases), tuple(targets)
    keys = [(case, target) for case in cases for target in targets]
    futures = [compiler.submit(launched_by, case.name, target) for case, target in keys]
    launched = {
        key: future.result()
        for key, future in progress(
            zip(keys, futures, strict=True), "Recording launches", len(keys)
        )
    }
    resources = _resources(compiler, launched.values(), progress)
    wanted = {
        case.name: (case, {each.kernel for target in targets for each in launched[case, target]})
        for case in cases
    }
    counted = count_all(wanted, lambda names, total: progress(names, "Counting", total))
    return [
        Row(case, kernel, on, counted[case.name].get(kernel))
        for case in cases
        for kernel, on in _aligned(case, {t: launched[case, t] for t in targets}, resources)
    ]


def _aligned(
    case: RooflineCase,
    by_target: Mapping[str, list[Launched]],
    resources: Mapping[str, Resources | str],
) -> Iterator[tuple[str, dict[str, OnGpu]]]:
    """The n-th launch of a kernel on each target is one row."""
    rows: dict[tuple[str, int], dict[str, OnGpu]] = {}
    for target, launches in by_target.items():
        counts: dict[str, int] = {}
        for launched in launches:
            number = counts[launched.kernel] = counts.get(launched.kernel, 0) + 1
            on = _on_gpu(case, target, launched, resources[launched.plan.source])
            rows.setdefault((launched.kernel, number), {})[target] = on
    for (kernel, _), on_targets in rows.items():
        yield kernel, on_targets


def _on_gpu(
    case: RooflineCase, target: str, launched: Launched, resources: Resources | str
) -> OnGpu:
    gpu = _GPUS[TARGETS[target]]
    if isinstance(resources, str):
        return OnGpu(gpu.name, target, launched, None, None, resources)
    waves = fill(target, launched.programs, launched.num_warps, resources)
    prediction = predict(launched.work, case.dtype, gpu, launched.programs, waves)
    return OnGpu(gpu.name, target, launched, resources, prediction)


def _resources(
    compiler: Compiler, launched: Iterable[list[Launched]], progress: Progress
) -> dict[str, Resources | str]:
    """By source: what goldens have, and what has none compiled; an error's text if it doesn't."""
    plans: dict[str, PlannedCompile] = {
        each.plan.source: each.plan for launches in launched for each in launches
    }
    found: dict[str, Resources | str] = {}
    for golden in (load_goldens(compiler.triton_version()) or {}).values():
        if golden.source in plans:
            found[golden.source] = Resources(
                golden.registers, golden.shared_bytes, golden.local_bytes, "golden"
            )
    missing = [plan for source, plan in plans.items() if source not in found]
    for outcome in progress(compiler.compile(missing), "Compiling", len(missing)):
        binary = outcome.binary
        found[outcome.plan.source] = (
            outcome.error
            if binary is None
            else Resources(binary.registers, binary.shared_bytes, binary.local_bytes, "compiled")
        )
    return found
