"""Interleaved timing: every provider runs once a round, so a drifting machine hits all alike."""

import dataclasses
import gc
import math
import random
import statistics
import time
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence

import torch

MIN_ROUNDS = 15
# Rounds next to each other are alike: what 95 % of them say, another run doesn't often enough.
_CONFIDENCE = 0.99
MAX_ROUNDS = 200
# What MIN_ROUNDS may take where fewer are allowed.
_LONG_S = 10.0
# More than the last-level cache of any GPU that Triton supports.
_FLUSH_BYTES = 512 * 2**20
# No GPU that PyTorch supports runs faster: so many cycles last at least a second.
_HIGHEST_CLOCK_HZ = 3e9
_LONGEST_IDLE_S = 0.05

Sampler = Callable[[Callable[[], object]], float]


@dataclasses.dataclass(frozen=True)
class Quantiles:
    """Median, 20th and 80th percentile of so many samples."""

    p50: float
    p20: float
    p80: float
    samples: int

    @classmethod
    def of(cls, values: Iterable[float]) -> "Quantiles":
        """Of two values or more, with linear interpolation between them."""
        values = list(values)
        deciles = statistics.quantiles(values, n=10, method="inclusive")
        return cls(statistics.median(values), deciles[1], deciles[7], len(values))


@dataclasses.dataclass(frozen=True)
class Interval:
    """Between which a median is, with the probability `confidence`."""

    low: float
    high: float
    confidence: float

    @classmethod
    def of_median(cls, samples: Sequence[float]) -> "Interval":
        """Of independent samples of any distribution: two of them, by their ranks.

        The narrowest with a confidence of 0.99, as near around the median as there is one; of
        fewer than eight samples it is all of them, and less sure.
        """
        ordered, count = sorted(samples), len(samples)
        for skipped in range((count - 1) // 2, -1, -1):
            # The median is outside if at most `skipped` samples are on one of its sides.
            outside = 2 * sum(math.comb(count, k) for k in range(skipped + 1)) / 2**count
            if 1 - outside >= _CONFIDENCE or not skipped:
                return cls(ordered[skipped], ordered[-1 - skipped], 1 - outside)
        raise ValueError("samples: expected at least one, got none")


def paired_ratios(baseline: Sequence[float], other: Sequence[float]) -> Quantiles:
    """How many times faster `other` is: quantiles of the ratios of samples from the same round."""
    return Quantiles.of(b / o for b, o in zip(baseline, other, strict=True))


def wall_clock(device: torch.device, repeats: int = 1, *, synchronize: bool = False) -> Sampler:
    """Seconds of one of `repeats` calls on the CPU's clock; on a GPU what starting it costs, or
    with `synchronize` all of it."""

    def sample(call: Callable[[], object]) -> float:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        start = time.perf_counter()
        for _ in range(repeats):
            # The result is held until the clock has stopped: freeing it is not the op's work.
            result = call()
        if synchronize and device.type == "cuda":
            torch.cuda.synchronize(device)
        elapsed = time.perf_counter() - start
        del result
        return elapsed / repeats

    return sample


def device_clock(device: torch.device) -> Sampler:
    """Seconds of one call: on a GPU between two events, after its caches were overwritten."""
    if device.type != "cuda":
        return wall_clock(device)
    flush = torch.empty(_FLUSH_BYTES, dtype=torch.int8, device=device)
    # What starting a call took when it took longest.
    starting: weakref.WeakKeyDictionary[Callable[[], object], float] = weakref.WeakKeyDictionary()

    def attempt(call: Callable[[], object], idle_s: float) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        # While the GPU is busy here the CPU starts the call, so launch gaps don't count.
        torch.cuda._sleep(int(idle_s * _HIGHEST_CLOCK_HZ))
        flush.zero_()
        start.record()
        before = time.perf_counter()
        result = call()
        starting[call] = max(time.perf_counter() - before, starting.get(call, 0.0))
        end.record()
        end.synchronize()
        del result
        return start.elapsed_time(end) / 1e3

    def sample(call: Callable[[], object]) -> float:
        if call not in starting:
            attempt(call, 0.0)
            starting.pop(call)  # It has loaded kernels.
            attempt(call, 0.0)
        # A call that waits for the GPU waits for the idling, too: that must end somewhere.
        idle_s = min(1.5 * starting[call], _LONGEST_IDLE_S)
        seconds = attempt(call, idle_s)
        if starting[call] < idle_s or idle_s == _LONGEST_IDLE_S:
            return seconds
        return attempt(call, min(1.5 * starting[call], _LONGEST_IDLE_S))

    return sample


def interleaved(
    calls: Mapping[str, Callable[[], object]],
    sample: Sampler,
    *,
    budget_s: float,
    fewest_rounds: int = MIN_ROUNDS,
    wanted_rounds: int = MIN_ROUNDS,
) -> dict[str, list[float]]:
    """Samples of each call in seconds; the i-th of all calls are from the same round.

    As many rounds as fit into `budget_s`, but at least `wanted_rounds` (as far as these fit into
    10 s, but always `fewest_rounds`) and at most MAX_ROUNDS, each in a new order, after one that
    warms up. Compilation must be over.
    """
    start = time.perf_counter()
    for call in calls.values():
        sample(call)
    round_s = time.perf_counter() - start
    least = max(min(wanted_rounds, int(_LONG_S / round_s)), fewest_rounds)
    rounds = min(max(int(budget_s / round_s), least), MAX_ROUNDS)
    order = list(calls)
    shuffle = random.Random(0).shuffle
    samples: dict[str, list[float]] = {name: [] for name in calls}
    gc.collect()
    gc.disable()
    try:
        for _ in range(rounds):
            shuffle(order)
            for name in order:
                samples[name].append(sample(calls[name]))
    finally:
        gc.enable()
    return samples
