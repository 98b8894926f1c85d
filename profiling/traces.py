"""What a profiler recorded, whichever it was: ranges that nest, GPU work, steps; times in ns."""

import dataclasses
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

# Times of torch traces are sums of two rounded numbers: a range inside may end this much later.
_SLACK = 10


class ReportError(ValueError):
    """A file can't be reported on: it is not there, broken, or something else than expected."""


@dataclasses.dataclass(eq=False, slots=True)
class Range:
    """A named time of a thread. `parent` is the innermost one around it, None of a step."""

    name: str
    start: int
    end: int
    process: int
    thread: int
    parent: "Range | None" = None

    @property
    def ns(self) -> int:
        return self.end - self.start

    @property
    def root(self) -> "Range":
        found = self
        while found.parent is not None:
            found = found.parent
        return found

    @property
    def path(self) -> tuple[str, ...]:
        """Names from the outermost range to this one."""
        return (*(self.parent.path if self.parent else ()), self.name)

    @property
    def depth(self) -> int:
        return self.parent.depth + 1 if self.parent else 0


@dataclasses.dataclass(eq=False, slots=True)
class GpuWork:
    """A kernel, or a copy or fill of memory, whose name is then in brackets.

    Attributes:
        launch: thread and time of the call that started it, where they are known.
        range: the innermost range around that call.
    """

    name: str
    start: int
    end: int
    process: int
    device: int
    stream: int
    launch: tuple[int, int] | None = None
    range: Range | None = None

    @property
    def ns(self) -> int:
        return self.end - self.start


@dataclasses.dataclass(frozen=True)
class Trace:
    """Of one process.

    Attributes:
        steps: the ranges around each step, in order; they have no parents.
        notes: what was left out, and why.
    """

    path: Path
    tool: str
    ranges: list[Range]
    work: list[GpuWork]
    steps: list[Range]
    notes: list[str]


def assemble(
    path: Path,
    tool: str,
    ranges: Sequence[Range],
    work: Sequence[GpuWork],
    notes: Sequence[str],
    *,
    step: str,
    capture: str,
) -> Trace:
    """A trace of what a reader found: chooses process and steps, nests, attributes GPU work.

    Arguments:
        step, capture: names of the ranges around each step, and around what counts, if there are.

    Raises:
        ReportError: no range has the name `step`.
    """
    steps = [each for each in ranges if each.name == step and each.ns > 0]
    captures = [each for each in ranges if each.name == capture]
    if captures:
        steps = [each for each in steps if any(_holds(around, each) for around in captures)]
    if not steps:
        where = f" inside of a range {capture!r}" if captures else ""
        names = ", ".join(sorted({repr(each.name) for each in ranges})[:5]) or "no range"
        raise ReportError(f"{path}: expected ranges {step!r}{where} around steps, found {names}")
    notes = [*notes]
    processes = sorted({each.process for each in steps})
    if len(processes) > 1:
        notes.append(f"{len(processes)} processes have steps; this is the first one's.")
    steps = sorted((s for s in steps if s.process == processes[0]), key=lambda each: each.start)
    ranges = [each for each in ranges if each.process == processes[0] and each.name != capture]
    work = sorted(
        (each for each in work if each.process == processes[0]), key=lambda each: each.start
    )
    _nest(ranges, steps)
    _attribute(work, ranges, steps)
    return Trace(path, tool, ranges, work, steps, notes)


def _holds(outer: Range, inner: Range) -> bool:
    return (
        outer.process == inner.process
        and outer.start <= inner.start
        and inner.end <= outer.end + _SLACK
    )


def _by_thread(ranges: Iterable[Range]) -> dict[int, list[Range]]:
    """In the order of their starts, the longer of two first."""
    found: dict[int, list[Range]] = defaultdict(list)
    for each in sorted(ranges, key=lambda each: (each.start, -each.end)):
        found[each.thread].append(each)
    return found


def _nest(ranges: Sequence[Range], steps: Sequence[Range]) -> None:
    threads = _by_thread(ranges)
    for of_thread in threads.values():
        open_ranges: list[Range] = []
        for each in of_thread:
            while open_ranges and open_ranges[-1].end <= each.start:
                open_ranges.pop()
            # Not always the last one: start/end ranges of one thread may cross.
            each.parent = next((o for o in reversed(open_ranges) if _holds(o, each)), None)
            open_ranges.append(each)
    for each in steps:
        each.parent = None
    # Autograd runs a GPU's backward in a thread of its own, while the thread of the step waits.
    step_thread = steps[0].thread
    orphans = [
        each
        for thread, of_thread in threads.items()
        for each in of_thread
        if thread != step_thread and each.parent is None
    ]
    orphans.sort(key=lambda each: each.start)
    times = [(each.start, each.end) for each in orphans]
    for each, parent in zip(orphans, _innermost(threads[step_thread], times), strict=True):
        each.parent = parent


def _innermost(ranges: Sequence[Range], times: Iterable[tuple[int, int]]) -> Iterator[Range | None]:
    """For each time the range around it that began last; both are in the order of starts."""
    coming = iter(ranges)
    following = next(coming, None)
    open_ranges: list[Range] = []
    for start, end in times:
        while following is not None and following.start <= start:
            open_ranges.append(following)
            following = next(coming, None)
        open_ranges = [each for each in open_ranges if each.end > start]
        yield next((each for each in reversed(open_ranges) if end <= each.end + _SLACK), None)


def _attribute(work: Sequence[GpuWork], ranges: Sequence[Range], steps: Sequence[Range]) -> None:
    """To the range around the launch: of its thread, or else of the thread of the steps."""
    threads = _by_thread(ranges)
    launched: dict[int, list[tuple[int, GpuWork]]] = defaultdict(list)
    for each in work:
        if each.launch is not None:
            launched[each.launch[0]].append((each.launch[1], each))
    for thread, launches in launched.items():
        launches.sort(key=lambda pair: pair[0])
        times = [(time, time) for time, _ in launches]
        own = _innermost(threads.get(thread, ()), times)
        of_steps = _innermost(threads[steps[0].thread], times)
        for (_, each), mine, theirs in zip(launches, own, of_steps, strict=True):
            each.range = mine or theirs


Interval = tuple[int, int]


def union(intervals: Iterable[Interval], within: Interval) -> list[Interval]:
    """Disjoint, in order, cut to what lies `within`."""
    low, high = within
    found: list[Interval] = []
    for start, end in sorted(intervals):
        start, end = max(start, low), min(end, high)
        if start >= end:
            continue
        if found and start <= found[-1][1]:
            found[-1] = found[-1][0], max(end, found[-1][1])
        else:
            found.append((start, end))
    return found


def length(intervals: Iterable[Interval]) -> int:
    return sum(end - start for start, end in intervals)
