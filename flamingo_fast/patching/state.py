"""What a patched module keeps, and how its fast forward gets at it."""

import copy
import dataclasses
import functools
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from flamingo_fast.patching.options import Options

_STATE = "_flamingo_fast"


class PatchWarning(UserWarning):
    """A patched module did something by its own code, for this call."""


@dataclasses.dataclass
class Patched:
    """On each patched module.

    Attributes:
        rule: name of its rule.
        options: of the patch.
        previous: what "forward" was in the module's own dictionary, None for nothing: the class's.
        memory: what the fast forward remembers between calls; `unpatch` forgets it.
    """

    rule: str
    options: Options
    previous: Callable[..., Any] | None = None
    memory: dict[str, Any] = dataclasses.field(default_factory=dict)

    def __deepcopy__(self, memo: dict[int, Any]) -> "Patched":
        # A copied module may be changed on its own; what is remembered belongs to the first.
        return Patched(self.rule, self.options, copy.deepcopy(self.previous, memo))

    def __reduce__(self) -> Any:
        return Patched, (self.rule, self.options, self.previous)


def state_of(module: nn.Module) -> Patched | None:
    """None: it is not patched."""
    return getattr(module, _STATE, None)


def is_patched(module: nn.Module, *rules: str) -> bool:
    """Whether it is, by one of these rules if any are given."""
    state = state_of(module)
    return state is not None and (not rules or state.rule in rules)


def options_of(module: nn.Module) -> Options:
    """Of the patch of a patched module."""
    return getattr(module, _STATE).options  # noqa: B009 - torch.compile follows it


def own_forward(module: nn.Module) -> Callable[..., Any]:
    """What a patched module did before it was patched."""
    previous = getattr(module, _STATE).previous  # noqa: B009
    if previous is not None:
        return previous
    return functools.partial(type(module).forward, module)


def attach(module: nn.Module, rule: str, options: Options, forward: Callable[..., Any]) -> None:
    """Patches one module that is not: `forward` is called with it and its arguments."""
    previous = module.__dict__.get("forward")
    # transformers 4.57 leaves the class's own forward there, bound, whenever it recorded outputs.
    if getattr(previous, "__func__", None) is type(module).forward:
        previous = None
    module.__dict__[_STATE] = Patched(rule, options, previous)
    # In the module's dictionary, not by another class: what asks for its class, by name or by
    # identity, finds it, and a class that FSDP makes of it later has nothing of ours.
    module.forward = functools.partial(forward, module)


def detach(module: nn.Module) -> None:
    """Undoes `attach`."""
    state = module.__dict__.pop(_STATE)
    if state.previous is None:
        module.__dict__.pop("forward", None)
    else:
        module.forward = state.previous


_told: set[tuple[str, str]] = set()


def tell_once(module: nn.Module, reason: str) -> None:
    """Warns that a call takes the module's own forward; once for each class and reason."""
    if torch.compiler.is_compiling():
        return
    key = (type(module).__name__, reason)
    if key not in _told:
        _told.add(key)
        warnings.warn(f"{key[0]}: {reason}; its own forward runs", PatchWarning, stacklevel=3)
