"""The search for launch configurations: what is tried, what is wrong, what is faster.

From the heuristic's configuration, one field at a time, to the fastest of its neighbours, and on
from there. A candidate is compiled first, which tells its registers and shared memory; then it must
be right; only then it is timed, in turns with the heuristic's.
"""

import dataclasses
import statistics
import time
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import torch

from flamingo_fast.bench.timing import Quantiles, Sampler, interleaved, paired_ratios
from flamingo_fast.errors import one_line
from flamingo_fast.profiling.tune_cases import Call, Case
from flamingo_fast.testing.compare import assert_close_to_oracle, outputs_and_gradients
from flamingo_fast.testing.occupancy import ARCHITECTURES, occupancy

# How many times as fast a candidate must be in four of five rounds.
ENOUGH = 1.03

# What is timed of an op's call: its kernel, and that which adds up what it leaves.
KERNELS = {
    "one_medium_fwd": ("_one_medium_fwd_kernel",),
    "one_medium_bwd": ("_one_medium_bwd_kernel", "_sum_split_media_kernel"),
    "several_media_fwd": ("_several_media_fwd_kernel", "_combine_splits_kernel"),
    "several_media_dq": ("_several_media_dq_kernel",),
    "several_media_dkv": ("_several_media_dkv_kernel",),
    "latent_fwd": ("_latent_fwd_kernel", "_combine_splits_kernel"),
    "latent_bwd": ("_latent_bwd_kernel", "_sum_splits_kernel"),
    "latent_dkv": ("_latent_dkv_kernel",),
    "norm_fwd": ("_norm_fwd_kernel",),
    "norm_bwd": ("_norm_bwd_kernel", "_sum_partials_kernel"),
}


@dataclasses.dataclass(frozen=True)
class Effort:
    """How much is tried of each op and shape, and how long two configurations are timed."""

    steps: int
    candidates: int
    seconds: float
    rounds: int


@dataclasses.dataclass(frozen=True)
class Resources:
    """What a compiled kernel takes: registers a thread, spilled ones too, bytes of a block."""

    registers: int
    spills: int
    shared_bytes: int
    num_warps: int


@dataclasses.dataclass(frozen=True)
class Timing:
    """Microseconds of two configurations in turns, and how many times as fast the second is."""

    heuristic_us: float
    us: float
    ratio: Quantiles

    @property
    def is_faster(self) -> bool:
        return self.ratio.p20 > ENOUGH


@dataclasses.dataclass
class Outcome:
    """Of the search for one op and shape; `timing` is None until a candidate was timed."""

    request: Any
    heuristic_us: float
    best: Any
    timing: Timing | None = None
    tried: int = 0
    refused: list[tuple[Any, str]] = dataclasses.field(default_factory=list)
    is_complete: bool = False

    @property
    def is_replaced(self) -> bool:
        return self.timing is not None and self.timing.is_faster


def why_pruned(candidate: Resources, usual: Resources, arch: str) -> str | None:
    """Why what a candidate takes rules it out beside the heuristic's; None if it may be timed."""
    if candidate.spills > usual.spills:
        return f"spills {candidate.spills} registers, the heuristic's {usual.spills}"
    if arch not in ARCHITECTURES:
        return None
    resident = occupancy(
        arch, max(candidate.registers, 1), candidate.num_warps, candidate.shared_bytes
    )
    if resident.blocks == 0:
        return (
            f"{candidate.registers} registers of {candidate.num_warps} warps and "
            f"{candidate.shared_bytes} B: no block fits"
        )
    return None


def neighbours(tunable: Any, config: Any) -> Iterator[Any]:
    """Configurations that differ from `config` in one field, by one step."""
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if field.name in tunable.fixed or field.name == "max_registers":
            continue
        if field.type is bool:
            steps: tuple[int, ...] = (not value,)
        else:
            steps = (
                (value - 1, value + 1) if field.name == "num_stages" else (value // 2, value * 2)
            )
            least, most = tunable.limits(field.name)
            steps = tuple(step for step in steps if least <= step <= most)
        for step in steps:
            yield dataclasses.replace(config, **{field.name: step})


class Run:
    """Starts the kernels of one op as its launcher would with `config`; what a clock times."""

    def __init__(self, launch: ModuleType, config: Any, launches: list[Any]) -> None:
        self.config = config
        self.launches = launches
        self._start = launch.start

    def __call__(self) -> None:
        for one in self.launches:
            tensor = next(arg for arg in one.args if isinstance(arg, torch.Tensor))
            self._start(
                one.kernel, one.grid, one.args, one.constexprs, one.options, tensor.device.index
            )


class CaseSearch:
    """Of the ops of one case in one dtype.

    Arguments:
        sampler: seconds of one call, such as `bench.timing.device_clock`.
        deadline: of time.monotonic(), after which nothing new is tried.
    """

    def __init__(
        self,
        case: Case,
        dtype: torch.dtype,
        device: torch.device,
        sampler: Sampler,
        effort: Effort,
        deadline: float,
    ) -> None:
        from flamingo_fast.kernels import launch, tuned

        self._launch, self._tuned = launch, tuned
        self._target = launch.target_of(torch.empty(0, device=device))
        self._sampler, self._effort, self._deadline = sampler, effort, deadline
        self._timed = case.make(case.timed_batch, dtype, device)
        self._make_checked = lambda: case.make(case.checked_batch, dtype, device)
        self._checks: _Checks | None = None

    def requests(self) -> dict[str, Any]:
        """What the launchers of the case ask for, by op."""
        with self._tuned.forced() as asked, self._launch.recording(self._target):
            _call(self._timed)
        return asked

    def search(self, request: Any, note: Callable[[Outcome], object]) -> Outcome:
        """`note` gets the outcome so far, first with the heuristic alone.

        Raises whatever the heuristic's own configuration raises.
        """
        usual = self._run(request.op, request.heuristic)
        usual()
        samples = [self._sampler(usual) for _ in range(max(self._effort.rounds, 2))]
        outcome = Outcome(request, statistics.median(samples) * 1e6, request.heuristic)
        note(outcome)
        outcome.is_complete = self._walk(outcome, usual)
        if outcome.best != request.heuristic and self._out_of_time():
            # Of many the fastest was lucky, too: alone its time says little.
            outcome.is_complete, outcome.timing, outcome.best = False, None, request.heuristic
        elif outcome.best != request.heuristic:
            again = self._run(request.op, outcome.best)
            outcome.timing = self._time(usual, again)
            outcome.heuristic_us = outcome.timing.heuristic_us
            if outcome.timing.ratio.p50 <= 1:
                outcome.timing, outcome.best = None, request.heuristic
        note(outcome)
        return outcome

    def _walk(self, outcome: Outcome, usual: Run) -> bool:
        """Leaves the fastest in `outcome.best`; whether all was tried that was to be."""
        request, tunable = outcome.request, self._tuned.TUNABLES[outcome.request.op]
        seen, fastest = {request.heuristic}, 1.0
        for _ in range(self._effort.steps):
            centre = outcome.best
            for config in neighbours(tunable, centre):
                if config in seen:
                    continue
                if outcome.tried >= self._effort.candidates:
                    return True
                if self._out_of_time():
                    return False
                seen.add(config)
                outcome.tried += 1
                timing = self._try(config, tunable, outcome, usual)
                if timing is not None and timing.ratio.p50 > fastest:
                    fastest, outcome.best = timing.ratio.p50, config
            if outcome.best == centre:
                break
        return True

    def _out_of_time(self) -> bool:
        return time.monotonic() >= self._deadline

    def _try(self, config: Any, tunable: Any, outcome: Outcome, usual: Run) -> Timing | None:
        why = tunable.problem(config, outcome.request)
        try:
            if why is None:
                run = self._run(outcome.request.op, config)
                why = self._why_pruned(run, usual) or self._why_wrong(outcome.request.op, config)
            if why is None:
                run()
                return self._time(usual, run)
        # Triton and LLVM raise what they like, of a candidate that nobody needs.
        except Exception as error:
            why = one_line(error)
        outcome.refused.append((config, why))
        return None

    def _run(self, op: str, config: Any) -> Run:
        with self._tuned.forced({op: config}), self._launch.recording(self._target) as launches:
            _call(self._timed)
        return Run(
            self._launch,
            config,
            [one for one in launches if one.kernel.__name__ in KERNELS[op]],
        )

    def _time(self, usual: Run, run: Run) -> Timing:
        rounds = self._effort.rounds
        samples = interleaved(
            {"usual": usual, "other": run},
            self._sampler,
            budget_s=self._effort.seconds,
            fewest_rounds=rounds,
            wanted_rounds=rounds,
        )
        usual_us, other_us = (statistics.median(each) * 1e6 for each in samples.values())
        return Timing(usual_us, other_us, paired_ratios(samples["usual"], samples["other"]))

    def _why_pruned(self, run: Run, usual: Run) -> str | None:
        if self._target.arch == "interpreter":
            return None
        # Those after the first have no configuration.
        resources = _resources(run.launches[0]), _resources(usual.launches[0])
        return why_pruned(*resources, self._target.arch)

    def _why_wrong(self, op: str, config: Any) -> str | None:
        if self._checks is None:
            self._checks = _Checks(self._make_checked(), self._tuned)
        return self._checks.why_wrong(op, config)


class _Checks:
    """Results beside the heuristics' and an fp64 oracle's."""

    def __init__(self, call: Call, tuned: ModuleType) -> None:
        self._call, self._tuned = call, tuned
        self._oracle = _call(call, "reference", torch.float64)
        with tuned.forced():
            self._usual = _call(call)

    def why_wrong(self, op: str, config: Any) -> str | None:
        with self._tuned.forced({op: config}):
            ours, again = _call(self._call), _call(self._call)
        try:
            assert_close_to_oracle(ours, self._usual, self._oracle)
        except AssertionError as error:
            return " ".join(str(error).split("\n"))
        # A race shows here at best.
        differs = [name for name in ours if not torch.equal(ours[name], again[name])]
        return f"twice the same call has two results: {', '.join(differs)}" if differs else None


def _call(
    call: Call, impl: str = "triton", dtype: torch.dtype | None = None
) -> dict[str, torch.Tensor]:
    """All outputs and gradients."""

    def function(*inputs: torch.Tensor) -> torch.Tensor | tuple[torch.Tensor, ...]:
        return call.function(*inputs, impl=impl)

    names, gradients = zip(*call.gradients.items(), strict=True)
    return outputs_and_gradients(function, call.inputs, names, gradients, dtype)


def _resources(one: Any) -> Resources:
    """Of a recorded launch, compiled for the GPU that is here and loaded."""
    compiled = one.kernel.warmup(*one.args, grid=one.grid, **one.constexprs, **one.options)
    # Private, but the only way to the numbers without starting it.
    compiled._init_handles()
    return Resources(
        compiled.n_regs, compiled.n_spills, compiled.metadata.shared, one.options["num_warps"]
    )
