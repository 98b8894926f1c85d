"""One benchmark run: ceilings, then for each case the correctness gate and interleaved timing."""

import dataclasses
import itertools
import os
import statistics
from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch
from torch.utils import _pytree as pytree

from flamingo_fast.bench import records
from flamingo_fast.bench.ceilings import Ceilings, measure_ceilings
from flamingo_fast.bench.correctness import is_only_rounding, problems
from flamingo_fast.bench.plan import BASELINE, Plan
from flamingo_fast.bench.records import Environment, Measurement
from flamingo_fast.bench.registry import (
    Benchmark,
    Call,
    Case,
    Floor,
    Function,
    Rearranged,
    Unavailable,
    shape_name,
)
from flamingo_fast.bench.timing import (
    MIN_ROUNDS,
    Quantiles,
    Sampler,
    device_clock,
    interleaved,
    paired_ratios,
    wall_clock,
)
from flamingo_fast.bench.work import Work
from flamingo_fast.errors import one_line

_CALLS_PER_SAMPLE = 20


@dataclasses.dataclass
class Results:
    """What came of a run.

    failures: calls that raised or computed something else; they have no measurements.
    notes: baselines that were measured although their rounding is bad.
    pairs: (case, mode, provider) -> how many times faster than the baseline, by rounds; or by
        passes, where there are several: the median of each.
    unavailable: (provider, reason) -> the ops for which it did not run.
    """

    plan: Plan
    device: torch.device
    environment: Environment
    ceilings: Ceilings
    measurements: list[Measurement] = dataclasses.field(default_factory=list)
    failures: list[str] = dataclasses.field(default_factory=list)
    notes: list[str] = dataclasses.field(default_factory=list)
    unavailable: dict[tuple[str, str], list[str]] = dataclasses.field(default_factory=dict)
    pairs: dict[tuple[str, str, str], list[float]] = dataclasses.field(default_factory=dict)
    is_interrupted: bool = False


def run(
    plan: Plan,
    device: torch.device,
    progress: Callable[[str], None] = lambda step: None,
    ceilings: Ceilings | None = None,
) -> Results:
    """Measures all of `plan` on `device`; `progress` is told what comes next.

    Arguments:
        ceilings: of this device, if they were measured in this process.
    """
    if ceilings is None:
        progress("ceilings")
        ceilings = measure_ceilings(device, plan.dtypes, budget_s=plan.budget_s, quick=plan.quick)
    results = Results(plan, device, records.environment(device), ceilings, ceilings.measurements())
    try:
        _measure(plan, device, results, progress)
    except KeyboardInterrupt:
        results.is_interrupted = True
    return results


def _measure(
    plan: Plan, device: torch.device, results: Results, progress: Callable[[str], None]
) -> None:
    clock = device_clock(device)
    timings: dict[tuple[str, str], _Timing] = {}
    failed = set()
    try:
        for index in range(plan.passes):
            for benchmark, shape, dtype in plan.cases:
                name = f"{benchmark.name} {shape_name(shape)} {dtype}"
                if name in failed:
                    continue
                progress(name)
                try:
                    # Anew in each pass: where tensors lie in memory is part of what differs
                    # between runs.
                    case = Case(benchmark, shape, dtype, device)
                    _measure_time(case, clock, results, timings, is_first=index == 0)
                # Of the user's --shape: memory that runs out, or heads that can't share keys.
                except (RuntimeError, ValueError) as error:
                    results.failures.append(f"{name}: {one_line(error)}")
                    failed.add(name)
    finally:
        for timing in timings.values():
            _record_timing(timing, results)
    for benchmark in plan.benchmarks:
        progress(f"{benchmark.name}: CPU time per call")
        try:
            _measure_overhead(benchmark, device, results)
        # A GPU that a case has broken.
        except RuntimeError as error:
            results.failures.append(f"{benchmark.name}: {one_line(error)}")


@dataclasses.dataclass
class _Timing:
    """Of one case and mode.

    Attributes:
        passes: of each, samples in seconds by provider.
        metrics: that are not of time, of the first pass, by provider.
    """

    name: str
    kernel: str
    shape: str
    dtype: str
    mode: str
    work: Work
    passes: list[dict[str, list[float]]] = dataclasses.field(default_factory=list)
    metrics: dict[str, dict[tuple[str, str], Quantiles]] = dataclasses.field(default_factory=dict)


def _build(
    case: Case, mode: str, results: Results, only: Collection[str] = ()
) -> dict[str, Function]:
    """The wanted providers' functions, baseline first; why others don't run goes to `results`."""
    functions: dict[str, Function] = {}
    for provider in case.benchmark.providers:
        if only and provider.name not in only:
            continue
        if provider.name in results.plan.providers:
            try:
                functions[provider.name] = provider.build(case, mode)
                continue
            except Unavailable as error:
                reason = str(error)
        elif provider.name in results.plan.left_out:
            reason = (
                "takes seconds to compile, and is left out here; "
                "ops, modules or decode with --provider have it"
            )
        else:
            continue
        without = results.unavailable.setdefault((provider.name, reason), [])
        if case.benchmark.name not in without:
            without.append(case.benchmark.name)
    return functions


def _right_calls(
    case: Case, functions: Mapping[str, Function], mode: str, results: Results
) -> dict[str, Call]:
    """The calls that agree with the reference; none if the baseline is there and does not."""
    calls = {}
    for provider, function in functions.items():
        if found := problems(case, function, mode):
            line = f"{case} {mode}, {provider}: {'; '.join(found)}"
            if provider != BASELINE or not is_only_rounding(case, function, mode):
                results.failures.append(line)
                continue
            results.notes.append(f"{line} (rounding: it is right in fp32)")
        calls[provider] = case.call(function, mode)
    return calls if BASELINE in calls or BASELINE not in functions else {}


def _measure_time(
    case: Case,
    clock: Sampler,
    results: Results,
    timings: dict[tuple[str, str], _Timing],
    is_first: bool,
) -> None:
    """A pass over a case's modes; in the first one providers are gated, and memory is counted."""
    plan = results.plan
    for mode in plan.modes:
        key = (str(case), mode)
        if is_first:
            functions = _build(case, mode, results)
            calls = _right_calls(case, functions, mode, results)
            if not calls:
                continue
            shape = shape_name(case.shape)
            timings[key] = _Timing(
                *(str(case), case.benchmark.name, shape, case.dtype, mode), case.work(mode)
            )
        elif key in timings and timings[key].metrics:
            chosen = timings[key].passes[0]
            functions = {
                each.name: each.build(case, mode)
                for each in case.benchmark.providers
                if each.name in chosen
            }
            calls = {name: case.call(function, mode) for name, function in functions.items()}
        else:
            continue
        timing = timings[key]
        fewest = max(case.benchmark.fewest_rounds // plan.passes, 2)
        timing.passes.append(
            interleaved(
                calls,
                clock,
                budget_s=plan.budget_s / plan.passes,
                fewest_rounds=fewest,
                wanted_rounds=max(MIN_ROUNDS // plan.passes, fewest),
            )
        )
        if is_first:
            timing.metrics = _other_metrics(case, functions, calls, mode, results)


def _other_metrics(
    case: Case,
    functions: Mapping[str, Function],
    calls: Mapping[str, Call],
    mode: str,
    results: Results,
) -> dict[str, dict[tuple[str, str], Quantiles]]:
    """Memory, and on a GPU what starting a call costs the CPU."""
    found: dict[str, dict[tuple[str, str], Quantiles]] = {name: {} for name in calls}
    if case.device.type == "cuda":
        budget_s = results.plan.budget_s / 3
        host = interleaved(calls, wall_clock(case.device), budget_s=budget_s, fewest_rounds=5)
        for provider, seconds in host.items():
            found[provider]["cpu_time", "ms"] = Quantiles.of(second * 1e3 for second in seconds)
    for provider, call in calls.items():
        megabytes = peak_bytes(call, case.device) / 1e6
        found[provider]["peak_memory", "MB"] = Quantiles(megabytes, megabytes, megabytes, 1)
        function = functions[provider]
        if mode == "fwd_bwd" and not isinstance(function, Floor):
            megabytes = saved_bytes(case, function) / 1e6
            found[provider]["saved_for_backward", "MB"] = Quantiles(
                megabytes, megabytes, megabytes, 1
            )
    return found


def _record_timing(timing: _Timing, results: Results) -> None:
    # Of a first pass that raised or was interrupted there is not all that a row of a table has.
    if not timing.metrics:
        return
    work = timing.work
    samples = {
        provider: [second for each in timing.passes for second in each[provider]]
        for provider in timing.passes[0]
    }
    for provider, seconds in samples.items():
        bandwidth = [work.bytes / 1e9 / second for second in seconds]
        metrics = {
            ("time", "ms"): Quantiles.of(second * 1e3 for second in seconds),
            ("bandwidth", "GB/s"): Quantiles.of(bandwidth),
            ("of_copy_ceiling", "%"): Quantiles.of(
                100 * rate / results.ceilings.copy.p50 for rate in bandwidth
            ),
        }
        if BASELINE in samples:
            metrics["speedup", "x"] = paired_ratios(samples[BASELINE], seconds)
            if provider != BASELINE:
                ratios = [
                    [b / o for b, o in zip(each[BASELINE], each[provider], strict=True)]
                    for each in timing.passes
                ]
                # Rounds of one pass are more alike than passes are.
                pairs = [statistics.median(of_pass) for of_pass in ratios]
                key = (timing.name, timing.mode, provider)
                results.pairs[key] = pairs if len(pairs) > 1 else ratios[0]
        if work.matmul_flops:
            rates = [work.matmul_flops / 1e12 / second for second in seconds]
            ceiling = results.ceilings.matmul[timing.dtype].p50
            metrics["rate", "TFLOP/s"] = Quantiles.of(rates)
            metrics["of_matmul_ceiling", "%"] = Quantiles.of(100 * rate / ceiling for rate in rates)
        metrics |= timing.metrics.get(provider, {})
        _record(timing.kernel, timing.shape, timing.dtype, provider, timing.mode, metrics, results)


def peak_bytes(call: Call, device: torch.device) -> int:
    """Memory that one call and its results hold at once, beyond what was there before."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    # Not a dispatch mode: what an op allocates inside does not come by there. Below this level
    # some versions of the profiler write to stderr whenever they start and stop.
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profile:
        results = call()
    del results
    assert profile.profiler is not None and profile.profiler.kineto_results is not None
    events = profile.profiler.kineto_results.events()
    allocations = sorted(
        ((event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]"),
        key=lambda event: event[0],
    )
    return max(itertools.accumulate((nbytes for _, nbytes in allocations), initial=0))


def saved_bytes(case: Case, function: Callable[..., Any] | Rearranged) -> int:
    """Memory that a forward keeps for its backward, beyond the inputs."""
    kept: dict[int, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        # Alive, or what comes later could lie at the same address.
        kept[storage.data_ptr()] = tensor
        return tensor

    call, inputs = case.forward(function)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        call()
    for value in pytree.tree_leaves(inputs):
        if isinstance(value, torch.Tensor):
            kept.pop(value.untyped_storage().data_ptr(), None)
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


def _measure_overhead(benchmark: Benchmark, device: torch.device, results: Results) -> None:
    """CPU time of a call whose tensors are so small that nothing but the call is left."""
    dtype = results.plan.dtypes[0]
    case = Case(benchmark, benchmark.tiny_shape, dtype, device)
    clock = wall_clock(device, _CALLS_PER_SAMPLE)
    for mode in results.plan.modes:
        functions = _build(case, mode, results, only=(BASELINE, "ours"))
        calls = _right_calls(case, functions, mode, results)
        if not calls:
            continue
        samples = interleaved(calls, clock, budget_s=results.plan.budget_s)
        for provider, seconds in samples.items():
            overhead = Quantiles.of(second * 1e6 for second in seconds)
            shape = shape_name(case.shape)
            metrics = {("cpu_time_per_call", "us"): overhead}
            _record(benchmark.name, shape, dtype, provider, mode, metrics, results)


def _record(
    kernel: str,
    shape: str,
    dtype: str,
    provider: str,
    mode: str,
    metrics: Mapping[tuple[str, str], Quantiles],
    results: Results,
) -> None:
    results.measurements += [
        Measurement(kernel, provider, mode, shape, dtype, metric, unit, value)
        for (metric, unit), value in metrics.items()
    ]
