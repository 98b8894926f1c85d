"""What a trace says: time by range and by kernel, gaps of the GPU, rates against ceilings."""

import bisect
import dataclasses
import itertools
import re
import statistics
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence

from flamingo_fast.profiling.recorded_session import KernelWork, RecordedSession
from flamingo_fast.profiling.traces import GpuWork, Interval, Range, Trace, length, union

# Of a range's time: with less of it idle the GPU hardly waited.
IDLE_SHARE = 0.1


@dataclasses.dataclass
class RangeTime:
    """All calls of one path of ranges, in ns; a mean step has `total_ns / steps`.

    Attributes:
        path: names from the step to the range.
        self_ns: that no range inside has.
        gpu_ns, gpu_self_ns: of the GPU work launched in it; in it but in no range inside.
        launches: of that work.
        idle_ns: of `total_ns`, while the GPU had nothing to do.
    """

    path: tuple[str, ...]
    calls: int = 0
    total_ns: int = 0
    self_ns: int = 0
    gpu_ns: int = 0
    gpu_self_ns: int = 0
    launches: int = 0
    idle_ns: int = 0

    @property
    def is_launch_bound(self) -> bool:
        """Whether its GPU work takes less than the CPU does, and the GPU waits meanwhile."""
        return self.gpu_ns < self.total_ns and self.idle_ns > IDLE_SHARE * self.total_ns


@dataclasses.dataclass
class KernelTime:
    """All calls of a kernel in the steps. Rates are of the closed-form work, None without it.

    Attributes:
        gb_s, tflop_s: the latter of matrix products if it has any, else of the vector units.
        of_bandwidth, of_compute: shares of the ceilings.
        expected_calls: in a step, by the closed form.
    """

    name: str
    calls: int
    total_ns: int
    gb_s: float | None = None
    tflop_s: float | None = None
    of_bandwidth: float | None = None
    of_compute: float | None = None
    expected_calls: int | None = None


@dataclasses.dataclass(frozen=True)
class StepGaps:
    """Of a step and a device, in ns: when no kernel, copy or fill ran."""

    step: int
    device: int
    step_ns: int
    idle_ns: int
    gaps: int
    largest_ns: int


@dataclasses.dataclass(frozen=True)
class Analysis:
    """Attributes:
    covered: share of the steps' time that ranges inside of them have.
    ranges: in the order in which they first begin.
    kernels: the longest first.
    """

    trace: Trace
    session: RecordedSession
    ranges: list[RangeTime]
    kernels: list[KernelTime]
    gaps: list[StepGaps]
    covered: float

    @property
    def steps(self) -> int:
        return len(self.trace.steps)

    @property
    def steps_ns(self) -> int:
        return sum(step.ns for step in self.trace.steps)

    @property
    def step_s(self) -> float:
        """The median step, in seconds."""
        return statistics.median(step.ns for step in self.trace.steps) / 1e9

    @property
    def driver_s(self) -> float | None:
        """The same by the clock of the program that was profiled."""
        return statistics.median(self.session.step_s) if self.session.step_s else None

    @property
    def launch_bound(self) -> list[RangeTime]:
        """The longest wait first; none without GPU work."""
        found = [each for each in self.ranges if each.is_launch_bound] if self.kernels else []
        return sorted(found, key=lambda each: -each.idle_ns)


def analyse(trace: Trace, session: RecordedSession) -> Analysis:
    steps = set(trace.steps)
    children: dict[Range, list[Interval]] = defaultdict(list)
    inside = [each for each in trace.ranges if each.root in steps]
    for each in inside:
        if each.parent is not None:
            children[each.parent].append((each.start, each.end))
    busy = _Busy((each.start, each.end) for each in trace.work)
    rows: dict[tuple[str, ...], RangeTime] = {}
    for each in sorted(inside, key=lambda each: (each.start, -each.end)):
        row = rows.setdefault(each.path, RangeTime(each.path))
        row.calls += 1
        row.total_ns += each.ns
        row.self_ns += each.ns - length(union(children[each], (each.start, each.end)))
        row.idle_ns += each.ns - busy.within(each.start, each.end)
    work = [each for each in trace.work if _is_of_steps(each, trace.steps, steps)]
    for launched in work:
        if launched.range is None or launched.range.root not in steps:
            continue
        path = launched.range.path
        rows[path].gpu_self_ns += launched.ns
        for depth in range(1, len(path) + 1):
            rows[path[:depth]].gpu_ns += launched.ns
            rows[path[:depth]].launches += 1
    covered = sum(length(union(children[step], (step.start, step.end))) for step in steps)
    return Analysis(
        trace,
        session,
        _tree_order(rows),
        _kernels(work, session, len(steps)),
        [*_gaps(trace)],
        covered / sum(step.ns for step in steps),
    )


def _tree_order(rows: dict[tuple[str, ...], RangeTime]) -> list[RangeTime]:
    """A range's parts right below it: parts of later steps may be new."""
    places = {path: place for place, path in enumerate(rows)}
    return sorted(
        rows.values(),
        key=lambda row: [places[row.path[:depth]] for depth in range(1, len(row.path) + 1)],
    )


def _is_of_steps(work: GpuWork, ordered: Sequence[Range], steps: set[Range]) -> bool:
    if work.range is not None and work.range.root in steps:
        return True
    # Launched outside of all ranges, or by a call that was not recorded.
    time = work.launch[1] if work.launch else work.start
    place = bisect.bisect_right(ordered, time, key=lambda step: step.start) - 1
    return place >= 0 and time < ordered[place].end


class _Busy:
    """When the GPU does something, for questions about many times."""

    def __init__(self, intervals: Iterable[Interval]) -> None:
        disjoint = union(intervals, (-(2**63), 2**63))
        self._starts = [start for start, _ in disjoint]
        self._ends = [end for _, end in disjoint]
        sums = itertools.accumulate((end - start for start, end in disjoint), initial=0)
        self._before = [*sums]

    def within(self, start: int, end: int) -> int:
        return self._until(end) - self._until(start)

    def _until(self, time: int) -> int:
        place = bisect.bisect_right(self._starts, time)
        # The last that has begun may go on after `time`.
        return self._before[place] - (max(self._ends[place - 1] - time, 0) if place else 0)


def _gaps(trace: Trace) -> Iterable[StepGaps]:
    by_device: dict[int, list[Interval]] = defaultdict(list)
    for each in trace.work:
        by_device[each.device].append((each.start, each.end))
    for index, step in enumerate(trace.steps):
        for device, intervals in sorted(by_device.items()):
            ran = union(intervals, (step.start, step.end))
            edges = [step.start, *itertools.chain.from_iterable(ran), step.end]
            gaps = [end - start for start, end in zip(edges[::2], edges[1::2], strict=True)]
            gaps = [gap for gap in gaps if gap]
            yield StepGaps(index, device, step.ns, sum(gaps), len(gaps), max(gaps, default=0))


def kernel_base(name: str) -> str:
    """The function's name alone: without arguments of it and its template, and older Triton's."""
    name = re.sub(r"\(.*", "", name.removeprefix("void ")) or name
    return re.sub(r"_(?:\d+[dc]e?)+$", "", re.sub(r"<.*", "", name).strip())


def _kernels(work: Sequence[GpuWork], session: RecordedSession, steps: int) -> list[KernelTime]:
    rows: dict[str, KernelTime] = {}
    for each in work:
        row = rows.setdefault(each.name, KernelTime(each.name, 0, 0))
        row.calls += 1
        row.total_ns += each.ns
    for row in rows.values():
        if (found := work_of(row.name, session)) and row.total_ns:
            rates = Rates.of(found, session, row.total_ns / steps)
            row.expected_calls = sum(each.calls for each in found)
            row.gb_s, row.tflop_s = rates.gb_s, rates.tflop_s
            row.of_bandwidth, row.of_compute = rates.of_bandwidth, rates.of_compute
    return sorted(rows.values(), key=lambda row: -row.total_ns)


def work_of(kernel: str, session: RecordedSession) -> list[KernelWork]:
    """The entries of a session's work for a kernel, whatever a profiler makes of its name."""
    names = {kernel, kernel_base(kernel)}
    return [each for each in session.work if each.kernel in names]


@dataclasses.dataclass(frozen=True)
class Rates:
    """Of useful work in a time; shares are of a session's ceilings, None where it has none."""

    gb_s: float
    tflop_s: float
    of_bandwidth: float | None
    of_compute: float | None

    @classmethod
    def of(
        cls, work: Sequence[KernelWork], session: RecordedSession, ns: float, share: float = 1.0
    ) -> "Rates":
        """Of the part `share` of all that `work` is of."""
        seconds = ns / 1e9 / share
        gigabytes = sum(each.bytes for each in work) / 1e9
        matmul = sum(each.matmul_flops for each in work) / 1e12
        vector = sum(each.vector_flops for each in work) / 1e12
        of_bandwidth = of_compute = None
        if (best := session.ceilings) is not None:
            of_bandwidth = _ratio(gigabytes / seconds, best.gb_s)
            # Each dtype has a ceiling, so what adds up is the time that it takes at best.
            by_dtype = [best.matmul_tflop_s.get(each.dtype) for each in work]
            of_vector = _ratio(vector / seconds, best.fp32_tflop_s)
            if all(by_dtype):
                least = sum(
                    each.matmul_flops / 1e12 / (rate or 1)
                    for each, rate in zip(work, by_dtype, strict=True)
                )
                of_compute = max(least / seconds, of_vector or 0)
            elif not matmul:
                of_compute = of_vector
        return cls(gigabytes / seconds, (matmul or vector) / seconds, of_bandwidth, of_compute)


def _ratio(value: float, ceiling: float) -> float | None:
    return value / ceiling if ceiling else None


def bare(name: str) -> str:
    """A range's name without shapes, which differ from one batch to another."""
    return re.sub(r" \([^()]*\)", "", name)


def kind(name: str) -> str:
    """Of a range, without the index of its layer either."""
    return re.sub(r" \d+(?= |$)", "", bare(name))


RangePath = tuple[str, ...]


def merged(rows: Iterable[RangeTime], path_of: Callable[[RangePath], RangePath]) -> list[RangeTime]:
    """As one those ranges whose paths are alike after `path_of`."""
    found: dict[RangePath, RangeTime] = {}
    for row in rows:
        path = path_of(row.path)
        into = found.setdefault(path, RangeTime(path))
        for field in dataclasses.fields(RangeTime)[1:]:
            setattr(into, field.name, getattr(into, field.name) + getattr(row, field.name))
    return [*found.values()]


def by_kind(rows: Iterable[RangeTime]) -> list[RangeTime]:
    """Wherever they are in the tree; those with the most time of their own first."""
    return sorted(merged(rows, lambda path: (kind(path[-1]),)), key=lambda row: -row.self_ns)


@dataclasses.dataclass(frozen=True)
class Change:
    """Of the time of a range or kernel in a mean step, in ns; None where it is not there."""

    name: str
    before: float | None
    after: float | None

    @property
    def difference(self) -> float:
        return (self.after or 0) - (self.before or 0)

    @property
    def ratio(self) -> float | None:
        """Of what is after to what was before."""
        return self.after / self.before if self.before and self.after is not None else None


def changes(before: dict[str, float], after: dict[str, float]) -> list[Change]:
    """The largest difference first."""
    names = dict.fromkeys((*before, *after))
    found = (Change(name, before.get(name), after.get(name)) for name in names)
    return sorted(found, key=lambda each: -abs(each.difference))


def range_changes(before: Analysis, after: Analysis) -> list[Change]:
    """Of ranges by their paths without shapes: those of another batch are still the same."""
    return changes(
        *(
            {
                " / ".join(row.path): row.total_ns / of.steps
                for row in merged(of.ranges, lambda path: tuple(map(bare, path)))
            }
            for of in (before, after)
        )
    )


def kernel_changes(before: Analysis, after: Analysis) -> list[Change]:
    return changes(
        *({row.name: row.total_ns / of.steps for row in of.kernels} for of in (before, after))
    )
