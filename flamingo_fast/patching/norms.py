"""Rules of transformers' RMS norms: y = weight * (x / rms(x)), one class a model."""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from flamingo_fast.ops.dispatch import autocast_dtype
from flamingo_fast.ops.norm import rms_norm
from flamingo_fast.patching.attention import random_like
from flamingo_fast.patching.parts import are_few, is_whole
from flamingo_fast.patching.rules import Call, Rule, has, is_a
from flamingo_fast.patching.state import own_forward

# Elements; of fewer, PyTorch's function takes less than the peers' operators and than the op.
_FEW = 1 << 18


def forward(self: Any, hidden_states: torch.Tensor) -> torch.Tensor:
    """x (..., width) to its shape and dtype."""
    weight, eps = self.weight, self.variance_epsilon
    if not is_whole(weight) or weight.dtype != hidden_states.dtype:
        return own_forward(self)(hidden_states)
    device = hidden_states.device.type
    in_autocast = autocast_dtype(hidden_states) is not None
    if are_few(hidden_states, _FEW):
        if in_autocast:
            return own_forward(self)(hidden_states)
        return F.rms_norm(hidden_states, weight.shape, weight, eps)
    if in_autocast:
        # The op would return autocast's dtype, and the peers' return x's.
        with torch.autocast(device, enabled=False):
            return rms_norm(hidden_states, weight, eps=eps)
    return rms_norm(hidden_states, weight, eps=eps)


def rms_norm_rule(family: str, class_name: str, known: Mapping[str, str]) -> Rule:
    """The rule of a family's class, and of classes that inherit from one of this name."""

    def matches(module: nn.Module) -> bool:
        return (
            is_a(module, class_name)
            and has(module, tensors=("weight",))
            and isinstance(getattr(module, "variance_epsilon", None), float)
        )

    return Rule(
        name=f"{family}.rms_norm",
        features=("norm",),
        matches=matches,
        forward=forward,
        known=known,
        probes=_probes,
    )


def _probes(module: nn.Module) -> Iterator[Call]:
    weight: Any = module.weight
    shape = (2, _FEW // len(weight) + 1, len(weight))
    yield (random_like(weight, *shape),), {}
