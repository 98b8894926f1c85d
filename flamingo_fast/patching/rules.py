"""What can be patched: one `Rule` for each kind of module, and the list of them all."""

import dataclasses
import functools
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from torch import nn

from flamingo_fast.patching.options import FEATURES, Options

# Positional and keyword arguments of a forward.
Call = tuple[tuple[Any, ...], dict[str, Any]]


def _nothing(*_: Any) -> None:
    return None


def _own_forward_alone(module: nn.Module) -> Sequence[Callable[..., Any]]:
    return (type(module).forward,)


@dataclasses.dataclass(frozen=True)
class Rule:
    """How modules of one kind are patched.

    Attributes:
        name: unique, "family.what".
        features: of `Options`; the rule applies where any of them is wanted.
        matches: whether a module is of this kind, by what it has, such as the names of its children
            and parameters; it sees every module of a model, so it must take any.
        forward: the fast forward, called with the module and the arguments of its own. A function
            that can be imported by its name, so that a patched model can be pickled. It finds the
            options by `state.options_of`, and what it takes the place of by `state.own_forward`.
        known: versions whose code it equals, by the fingerprint of `code`.
        code: the functions whose work `forward` does; by default the module's own forward.
        refuses: why a module of this kind is left alone, or None. Called with the module, the
            options, and `will_patch`, which says of a module in it whether that is patched.
        notes: what the report says of a module, for example of a peer's bug; or nothing.
        probes: small calls that tell whether `forward` does what an unknown version does
            (`patch(unknown="probe")`); or None, if it can't be told so.
    """

    name: str
    features: tuple[str, ...]
    matches: Callable[[nn.Module], bool]
    forward: Callable[..., Any]
    known: Mapping[str, str]
    code: Callable[[nn.Module], Sequence[Callable[..., Any]]] = _own_forward_alone
    refuses: Callable[[nn.Module, Options, Callable[[nn.Module], bool]], str | None] = _nothing
    notes: Callable[[nn.Module, Options], Sequence[str] | None] = _nothing
    probes: Callable[[nn.Module], Iterator[Call]] | None = None

    def __post_init__(self) -> None:
        if unknown := set(self.features) - set(FEATURES):
            raise ValueError(f"features: expected some of {FEATURES}, got {sorted(unknown)}")


_rules: dict[str, Rule] = {}


def register(*rules: Rule, overwrite: bool = False) -> None:
    """Adds rules, after those that are there: the first that matches a module is taken.

    Raises:
        ValueError: a name that is taken, unless `overwrite`.
    """
    added: dict[str, Rule] = {}
    for rule in rules:
        if (rule.name in _rules or rule.name in added) and not overwrite:
            raise ValueError(f"rules: there is a rule {rule.name!r}; overwrite=True replaces it")
        added[rule.name] = rule
    _rules.update(added)


def unregister(name: str) -> None:
    """Takes a rule away.

    Raises:
        KeyError: there is none of this name.
    """
    del _rules[name]


def rule_of(module: nn.Module) -> Rule | None:
    """The first that matches."""
    return next((rule for rule in _rules.values() if rule.matches(module)), None)


def has(module: nn.Module, modules: Sequence[str] = (), tensors: Sequence[str] = ()) -> bool:
    """Whether it has children and parameters (or buffers) of these names, of their kinds."""
    return all(isinstance(getattr(module, name, None), nn.Module) for name in modules) and all(
        name in module._parameters or name in module._buffers for name in tensors
    )


def is_a(module: nn.Module, class_name: str) -> bool:
    """Whether its class, or one that this inherits from, has this name."""
    return any(cls.__name__ == class_name for cls in type(module).__mro__)


def functions_beside(forward: Callable[..., Any], *names: str) -> tuple[Callable[..., Any], ...]:
    """Functions of these names in the forward's own file, as far as there are any."""
    of_file = getattr(inspect.unwrap(forward), "__globals__", {})
    return tuple(of_file[name] for name in names if name in of_file)


def own_code(*names: str) -> Callable[[nn.Module], Sequence[Callable[..., Any]]]:
    """For `Rule.code`: a module's own forward, and functions of these names in its file."""

    def code(module: nn.Module) -> Sequence[Callable[..., Any]]:
        forward = type(module).forward
        return (forward, *functions_beside(forward, *names))

    return code


def takes(module: nn.Module, *names: str) -> bool:
    """Whether the forward of its class has arguments of these names."""
    return _arguments(type(module).forward).issuperset(names)


@functools.cache
def _arguments(forward: Callable[..., Any]) -> frozenset[str]:
    try:
        return frozenset(inspect.signature(forward).parameters)
    except (TypeError, ValueError):
        return frozenset()
