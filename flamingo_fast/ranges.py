"""Named stretches of a training step, for whoever measures them; with nobody they cost one check.

`span` marks a stretch of code; `call` one of the forward, and what is its part of the backward;
`within` one that is a part of a module; `Ranges.watch` calls of modules.
"""

import contextlib
import dataclasses
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves, tree_map

BACKWARD = " backward"
"""After a module's name: its part of the backward."""


class Ranges:
    """Stretches that lie within each other.

    Arguments:
        push: is told the name of one that begins.
        pop: is told that the innermost one ends.
        detailed: also tell of stretches `within` modules, and have the shape of what each of these
            and of the watched modules is given first in its name.
    """

    def __init__(
        self, push: Callable[[str], None], pop: Callable[[], None], *, detailed: bool = False
    ) -> None:
        self._push, self._pop = push, pop
        self.detailed = detailed
        self._depth = 0
        # Of the innermost `span`: what a backward left open lies above it.
        self._floor = 0

    def begin(self, name: str) -> None:
        self._push(name)
        self._depth += 1

    def end_above(self, depth: int) -> None:
        while self._depth > depth:
            self._depth -= 1
            self._pop()

    @contextlib.contextmanager
    def span(self, name: str) -> Iterator[None]:
        before, floor = self._depth, self._floor
        self.begin(name)
        self._floor = self._depth
        try:
            yield
        finally:
            self.end_above(before)
            self._floor = floor

    @contextlib.contextmanager
    def watch(self, modules: Iterable[tuple[str, nn.Module]]) -> Iterator[None]:
        """Inside, calls of these modules are stretches, and so is what is theirs of the backward.

        The latter ends with the gradient of the module's input. Where that has none, such as of
        pixels, it ends with the next one that isn't inside it, or with the `span` around the
        backward.
        """
        hooks = [hook for name, module in modules for hook in self._hooks(name, module)]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _hooks(self, name: str, module: nn.Module) -> Iterator[Any]:
        entered: list[tuple[str, int]] = []

        def before(module: nn.Module, args: Any, kwargs: Any) -> Any:
            full_name, level, given = self._enter(name, (args, kwargs))
            entered.append((full_name, level))
            return given

        def after(module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
            # A hook that raised before ours did not let it enter.
            return self._leave(*entered.pop(), output) if entered else None

        # Before and behind whatever other hooks do: new layers are called in one of them. Of a call
        # that raises, too, or a checkpoint's that is stopped when it has made what is needed.
        yield module.register_forward_pre_hook(before, with_kwargs=True, prepend=True)
        yield module.register_forward_hook(after, with_kwargs=True, always_call=True)

    def call(
        self, name: str, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """`function(*args, **kwargs)` as a stretch, forward and backward."""
        name, level, (args, kwargs) = self._enter(name, (args, kwargs))
        output = None
        try:
            output = function(*args, **kwargs)
        finally:
            output = self._leave(name, level, output)
        return output

    def _enter(self, name: str, given: Any) -> tuple[str, int, Any]:
        """The full name, the level that the stretch begins at, and what it is to be given."""
        level = self._depth - self._floor
        if self.detailed:
            name = _with_shape(name, given)
        self.begin(name)
        return name, level, _marked(given, lambda: self._above(level))

    def _leave(self, name: str, level: int, output: Any) -> Any:
        self._above(level)

        def begin() -> None:
            self._above(level)
            self.begin(name + BACKWARD)

        return _marked(output, begin)

    def _above(self, level: int) -> None:
        self.end_above(self._floor + level)


def _mark(tensor: torch.Tensor, call: Callable[[], None]) -> torch.Tensor:
    """The tensor, and a call when its gradient comes by.

    Autograd runs its nodes newest first: by then those made after this one have run. A tensor's own
    hooks run in the order they were given, so that of an input that is another's output the outer
    stretch would begin before the inner one ends. An autograd.Function's view would not let itself
    be changed in place.
    """
    view = tensor.view_as(tensor)
    node: Any = view.grad_fn
    node.register_prehook(lambda gradients: call())
    return view


def _marked(values: Any, call: Callable[[], None]) -> Any:
    """`values`, in which tensors with gradients call `call` in the backward."""
    return _mapped(values, call) if torch.is_grad_enabled() else values


def _mapped(value: Any, call: Callable[[], None]) -> Any:
    # The pytree module's tree_map takes ten times as long for these.
    if isinstance(value, torch.Tensor):
        return _mark(value, call) if value.requires_grad else value
    kind = type(value)
    if value is None or kind in _PLAIN:
        return value
    if kind is tuple or kind is list:
        return kind([_mapped(each, call) for each in value])
    if kind is dict:
        return {name: _mapped(each, call) for name, each in value.items()}
    # What a language model of ours returns. Others, such as layouts, keep what they have made.
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {each.name: getattr(value, each.name) for each in dataclasses.fields(value)}
        marked = {name: _mark(each, call) for name, each in fields.items() if _has_gradient(each)}
        return dataclasses.replace(value, **marked) if marked else value
    # Such as transformers' outputs.
    return tree_map(lambda each: _mark(each, call) if _has_gradient(each) else each, value)


_PLAIN = (bool, int, float, str)


def _with_shape(name: str, given: tuple[tuple[Any, ...], dict[str, Any]]) -> str:
    args, kwargs = given
    values = (*args, *kwargs.values())
    # Nearly always the first one is a tensor.
    first = next((each for each in values if isinstance(each, torch.Tensor)), None)
    if first is None:
        leaves = (each for each in tree_leaves(values) if isinstance(each, torch.Tensor))
        first = next(leaves, None)
    return name if first is None else f"{name} {tuple(first.shape)}"


def _has_gradient(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.requires_grad


_NOBODY: contextlib.AbstractContextManager[None] = contextlib.nullcontext()
_active: Ranges | None = None


@contextlib.contextmanager
def measured_by(ranges: Ranges) -> Iterator[None]:
    """Inside, every `span` is one of `ranges`."""
    global _active
    previous, _active = _active, ranges
    try:
        yield
    finally:
        _active = previous


def span(name: str) -> contextlib.AbstractContextManager[None]:
    """A stretch of code of this name."""
    return _NOBODY if _active is None else _active.span(name)


def call(name: str, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """`function(*args, **kwargs)`, a stretch of the forward that calls this, and of its backward.

    What `function` closes over has its backward outside.
    """
    if _active is None or torch.compiler.is_compiling():
        return function(*args, **kwargs)
    return _active.call(name, function, args, kwargs)


def within(name: str, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """`call` of a part of a module, only for whoever wants details."""
    if _active is None or not _active.detailed:
        return function(*args, **kwargs)
    return call(name, function, *args, **kwargs)
