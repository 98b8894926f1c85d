"""What a patched module keeps, and how its fast forward gets at it."""

import contextlib
import dataclasses
import functools
import types
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from flamingo_fast.modules.plain import has_hooks
from flamingo_fast.patching.options import Options

_STATE = "_flamingo_fast"


class PatchWarning(UserWarning):
    """A patched module did something by its own code, for this call."""


# Where a module's dictionary may have its forward; accelerate keeps beneath its own what it found.
_PLACES = ("forward", "_old_forward")


@dataclasses.dataclass
class Patched:
    """On each patched module.

    Attributes:
        rule: name of its rule.
        options: of the patch.
        forward: the fast one, a function.
        memory: what the fast forward remembers between calls; `unpatch` forgets it.
    """

    rule: str
    options: Options
    forward: Callable[..., Any]
    memory: dict[str, Any] = dataclasses.field(default_factory=dict)

    def __deepcopy__(self, memo: dict[int, Any]) -> "Patched":
        # A copied module may be changed on its own; what is remembered belongs to the first.
        return Patched(self.rule, self.options, self.forward)

    def __reduce__(self) -> Any:
        return Patched, (self.rule, self.options, self.forward)


def state_of(module: nn.Module) -> Patched | None:
    """None: it is not patched."""
    return getattr(module, _STATE, None)


def is_patched(module: nn.Module, *rules: str) -> bool:
    """Whether it is, by one of these rules if any are given, and nobody replaced its forward since.

    Hooks of accelerate may be around the fast forward.
    """
    state = state_of(module)
    return (
        state is not None
        and (not rules or state.rule in rules)
        and _place_of(module, state) is not None
    )


def does_more(module: nn.Module) -> bool:
    """Whether it has hooks, or a forward on the instance besides the class's and the fast one."""
    if has_hooks(module):
        return True
    forward = module.__dict__.get("forward")
    state = state_of(module)
    return not (
        forward is None
        or getattr(forward, "__func__", None) is type(module).forward
        or (state is not None and _is_fast(forward, state))
    )


def replaced_forward(module: nn.Module) -> Callable[..., Any] | None:
    """The code that others have put in place of a module's own, on the instance; or None.

    Hooks of accelerate are around the module's own code, and replace nothing.
    """
    forward = module.__dict__.get(_place(module))
    # transformers 4.57 leaves the class's own forward there, bound, whenever it recorded outputs.
    if getattr(forward, "__func__", None) is type(module).forward:
        return None
    state = state_of(module)
    return None if state is not None and _place_of(module, state) else forward


def options_of(module: nn.Module) -> Options:
    """Of the patch of a patched module."""
    return getattr(module, _STATE).options  # noqa: B009 - torch.compile follows it


def own_forward(module: nn.Module) -> Callable[..., Any]:
    """What a patched module did before it was patched."""
    return functools.partial(type(module).forward, module)


def attach(module: nn.Module, rule: str, options: Options, forward: Callable[..., Any]) -> None:
    """Patches one module that is not, and has no `replaced_forward`.

    Arguments:
        forward: called with the module and its arguments.
    """
    module.__dict__[_STATE] = Patched(rule, options, forward)
    # In the module's dictionary, not by another class: what asks for its class, by name or by
    # identity, finds it, and a class that FSDP makes of it later has nothing of ours.
    module.__dict__[_place(module)] = functools.partial(_run, forward, module)


def _run(forward: Callable[..., Any], module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    # Our operations have a backward, and nothing of torch.func's or of forward-mode AD.
    if not torch.compiler.is_compiling() and (
        torch._C._are_functorch_transforms_active() or torch.autograd.forward_ad._current_level >= 0
    ):
        return own_forward(module)(*args, **kwargs)
    return forward(module, *args, **kwargs)


def _is_fast(forward: object, state: Patched) -> bool:
    return isinstance(forward, functools.partial) and forward.args[:1] == (state.forward,)


def detach(module: nn.Module) -> None:
    """Undoes `attach`; a forward that others put there since stays, and may call the fast one."""
    state = state_of(module)
    assert state is not None
    place = _place_of(module, state)
    if place is None and _place(module) in module.__dict__:
        return
    del module.__dict__[_STATE]
    if place == "forward":
        del module.__dict__[place]
    elif place is not None:
        module.__dict__[place] = types.MethodType(type(module).forward, module)


@contextlib.contextmanager
def unpatched(model: nn.Module) -> Iterator[None]:
    """Inside, no module of the model is patched; afterwards those that were are again."""
    before = [
        (module, state, module.__dict__[place])
        for module in model.modules()
        if (state := state_of(module)) is not None and (place := _place_of(module, state))
    ]
    for module, _, _ in before:
        detach(module)
    try:
        yield
    finally:
        for module, state, fast in before:
            # Not what others put in its place meanwhile.
            if state_of(module) is None and replaced_forward(module) is None:
                # The very objects: torch.compile would compile again for others.
                module.__dict__[_STATE] = state
                module.__dict__[_place(module)] = fast


def _place(module: nn.Module) -> str:
    """Where a module's own code is called from."""
    return _PLACES["_hf_hook" in module.__dict__ and _PLACES[1] in module.__dict__]


def _place_of(module: nn.Module, state: Patched) -> str | None:
    """Where the fast forward is."""
    for place in _PLACES:
        if _is_fast(module.__dict__.get(place), state):
            return place
    return None


_told: set[tuple[str, str]] = set()


def tell_once(module: nn.Module, reason: str) -> None:
    """Warns that a call takes the module's own forward; once for each class and reason."""
    if torch.compiler.is_compiling():
        return
    key = (type(module).__name__, reason)
    if key not in _told:
        _told.add(key)
        warnings.warn(f"{key[0]}: {reason}; its own forward runs", PatchWarning, stacklevel=3)
