"""Where a training step's time goes: its parts, forward and backward, and what a prediction misses.

Measured in steps of their own, in which modules are watched; on a GPU these wait at each part's
ends, so that they take longer than others.
"""

import collections
import time
from collections.abc import Callable, Mapping

import torch
from torch import nn

from flamingo_fast.bench.table3_steps import Step
from flamingo_fast.models.flamingo import Flamingo
from flamingo_fast.models.work import Flops
from flamingo_fast.ranges import BACKWARD, Ranges, measured_by

PARTS = ("vision", "resampler", "conditioning", "lm")
_REST = "rest"
# In the order of a table: what a step does, one after another.
FORWARD = (*PARTS, "loss", "backward", "optimiser", _REST)


def parts_of(model: Flamingo) -> list[tuple[str, nn.Module]]:
    """A model's, by name; conditioning's blocks are called inside the language model."""
    conditioning = model.conditioning
    return [
        ("vision", model.vision_encoder),
        ("resampler", model.resampler),
        ("lm", model.lang_model.base_model),
        *(("conditioning", each) for each in (*conditioning.blocks, *conditioning.layers)),
    ]


def part_seconds(
    step: Step, repeats: int = 2, clock: Callable[[], float] = time.perf_counter
) -> dict[str, float]:
    """Of each part of a step, the mean of so many; `BACKWARD` names are parts of the backward.

    "backward" is what comes before the language model's: the loss's. "rest" is in no part, such as
    masks and learnt tokens.
    """
    seconds: dict[str, float] = collections.defaultdict(float)
    device = next(step.train_step.model.parameters()).device
    stack = [_REST]
    last = 0.0

    def settle() -> None:
        nonlocal last
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        now = clock()
        seconds[stack[-1]] += now - last
        last = now

    def push(name: str) -> None:
        settle()
        # A dataset's is that of what is in it.
        stack.append(name if name.removesuffix(BACKWARD) in FORWARD else stack[-1])

    def pop() -> None:
        settle()
        stack.pop()

    ranges = Ranges(push, pop)
    with measured_by(ranges), ranges.watch(parts_of(step.train_step.model)):
        for _ in range(repeats):
            last = clock()
            step()
            settle()
    return {name: each / repeats for name, each in seconds.items()}


def by_part(seconds: Mapping[str, float]) -> dict[str, float]:
    """Forward and backward together; the backward's own is the loss's."""
    found: dict[str, float] = collections.defaultdict(float)
    for name, each in seconds.items():
        name = name.removesuffix(BACKWARD)
        found["loss" if name == "backward" else name] += each
    return dict(found)


def in_order(seconds: Mapping[str, float]) -> dict[str, float]:
    """Forward parts, then the whole backward, then the update."""
    backward = sum(each for name, each in seconds.items() if name.endswith(BACKWARD))
    backward += seconds.get("backward", 0.0)
    return {name: backward if name == "backward" else seconds.get(name, 0.0) for name in FORWARD}


def explanation(
    seconds: Mapping[str, float],
    baseline_seconds: Mapping[str, float],
    flops: Flops,
    baseline_flops: Flops,
    gap: float,
) -> tuple[str, float] | None:
    """The part in which time most differs from operations, over the baseline's step, and by what.

    Of each part it is what the row's time has more than the baseline's, less the same of
    operations; over all parts that adds up to about `gap`, the difference of both ratios, as parts
    are of other steps. None: no part differs in its direction.
    """
    # The product that makes logits is the loss's time and the language model's operations.
    mine, base = (_with_loss(by_part(each)) for each in (seconds, baseline_seconds))
    total = sum(base.values())
    differences = {}
    for name in dict.fromkeys((*PARTS, *mine, *base)):
        measured = (mine.get(name, 0.0) - base.get(name, 0.0)) / total
        predicted = 0.0
        if name in PARTS:
            of_part = getattr(flops, name) - getattr(baseline_flops, name)
            predicted = of_part / baseline_flops.total
        differences[name] = measured - predicted
    name = max(differences, key=lambda each: differences[each] * gap)
    return (name, differences[name]) if differences[name] * gap > 0 else None


def _with_loss(parts: Mapping[str, float]) -> dict[str, float]:
    found = dict(parts)
    found["lm"] = found.get("lm", 0.0) + found.pop("loss", 0.0)
    return found
