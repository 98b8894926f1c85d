"""Stretches of a training step: how they lie within each other, forward and backward."""

import pytest
import torch
from torch import nn

pytest.importorskip("timm")

from table3_cases import SMALLEST  # noqa: E402

from flamingo_fast.bench.table3_parts import (  # noqa: E402
    by_part,
    explanation,
    in_order,
    part_seconds,
    parts_of,
)
from flamingo_fast.bench.table3_steps import Step  # noqa: E402
from flamingo_fast.models.presets import table3_configs  # noqa: E402
from flamingo_fast.models.work import Flops  # noqa: E402
from flamingo_fast.ranges import Ranges, measured_by, span  # noqa: E402


class Log:
    """Names as they begin, indented by how deep they lie, and whether all ended."""

    def __init__(self):
        self.lines, self.depth = [], 0
        self.ranges = Ranges(self.push, self.pop)

    def push(self, name):
        self.lines.append("  " * self.depth + name)
        self.depth += 1

    def pop(self):
        self.depth -= 1
        assert self.depth >= 0


class Double(nn.Module):
    def forward(self, x, *, other=None):
        return {"out": [x * 2]}


class Outer(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = Double(), Double()

    def forward(self, x):
        x = self.first(x)["out"][0] + 1
        return self.second(x)["out"][0]


def test_modules_within_each_other_forward_and_backward():
    log, outer = Log(), Outer()
    x = torch.ones(2, requires_grad=True)
    watched = [("outer", outer), ("first", outer.first), ("second", outer.second)]
    with measured_by(log.ranges), log.ranges.watch(watched):
        with span("step"):
            loss = (outer(x * 3) ** 2).sum()
            with span("backward"):
                loss.backward()
    assert log.lines == [
        "step",
        "  outer",
        "    first",
        "    second",
        "  backward",
        "    outer backward",
        "      second backward",
        "      first backward",
    ]
    assert log.depth == 0
    expected = x.grad.clone()
    x.grad = None
    # Nothing is left of it, neither hooks nor who is told.
    (outer(x * 3) ** 2).sum().backward()
    torch.testing.assert_close(x.grad, expected)
    assert len(log.lines) == 8 and not outer._forward_hooks and not outer._forward_pre_hooks


def test_a_backward_whose_input_has_no_gradient_ends_with_the_next_or_the_span():
    log = Log()
    encoder, head = nn.Linear(2, 2), nn.Linear(2, 2)
    with measured_by(log.ranges), log.ranges.watch([("encoder", encoder), ("head", head)]):
        for _ in range(2):
            loss = head(encoder(torch.ones(1, 2))).sum()
            with span("backward"):
                loss.backward()
            with span("optimiser"):
                pass
    once = ["encoder", "head", "backward", "  head backward", "  encoder backward", "optimiser"]
    assert log.lines == once * 2 and log.depth == 0


def test_without_anyone_a_span_is_nothing():
    assert span("a") is span("b")
    log = Log()
    with pytest.raises(RuntimeError), measured_by(log.ranges), span("a"):
        raise RuntimeError
    assert log.depth == 0
    with span("b"):
        assert log.lines == ["a"]


@pytest.mark.parametrize("row", ["baseline", "grafting", "vision_unfrozen", "round_robin", "mlp"])
def test_parts_of_a_step_add_up_to_it(row):
    """By a clock that ticks once a reading: each stretch costs as many ticks as it has ends."""
    step = Step(SMALLEST.config(table3_configs()[row]), SMALLEST, torch.device("cpu"))
    ticks = 0

    def clock():
        nonlocal ticks
        ticks += 1
        return float(ticks)

    parts = part_seconds(step, 2, clock)
    # The first of the readings of a step is its start.
    assert sum(parts.values()) * 2 == ticks - 2 * 1
    names = {"vision", "resampler", "conditioning", "lm", "loss", "optimiser", "rest", "backward"}
    backward = {"resampler backward", "conditioning backward", "lm backward", "loss backward"}
    backward |= {"vision backward"} if row == "vision_unfrozen" else set()
    assert set(parts) == names | backward
    assert sum(in_order(parts).values()) == pytest.approx(sum(parts.values()))
    assert sum(by_part(parts).values()) == pytest.approx(sum(parts.values()))
    blocks = len(step.train_step.model.conditioning.blocks)
    layers = len(step.train_step.model.conditioning.layers)
    assert sum(name == "conditioning" for name, _ in parts_of(step.train_step.model)) == (
        blocks + layers
    )


def test_watching_changes_no_weights():
    config = SMALLEST.config(table3_configs()["every_2nd"])
    steps = [Step(config, SMALLEST, torch.device("cpu")) for _ in range(2)]
    part_seconds(steps[0], 2)
    for _ in range(2):
        steps[1]()
    for one, other in zip(*(each.train_step.model.parameters() for each in steps), strict=True):
        assert torch.equal(one, other)


def test_the_part_that_explains_a_difference():
    base = {"vision": 1.0, "lm": 2.0, "lm backward": 4.0, "optimiser": 1.0, "backward": 2.0}
    mine = {**base, "optimiser": 4.0, "lm backward": 5.0}
    flops, base_flops = Flops(vision=2, lm=9), Flops(vision=2, lm=8)
    # Of the baseline's 10 s the row has 4 more; by operations 1 of 10.
    part, difference = explanation(mine, base, flops, base_flops, 0.3)
    assert part == "optimiser" and difference == pytest.approx(0.3)
    part, difference = explanation(base, base, Flops(vision=4, lm=8), base_flops, -0.2)
    assert part == "vision" and difference == pytest.approx(-0.2)
    # Steps whose parts were measured may be other than those that were timed.
    assert explanation(base, base, Flops(vision=4, lm=8), base_flops, 0.2) is None
    # Logits' products are the loss's time and the language model's operations.
    logits = {**base, "loss": 3.0}
    assert explanation(logits, base, Flops(vision=2, lm=11), base_flops, 0.0001) is None
