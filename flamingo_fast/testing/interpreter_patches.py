"""Reaching into Triton's interpreter: replacing named parts of it, and telling which line runs.

All of this is private API of Triton. Every replaced name stands in a table of `Replacements`, so
`missing_names` can say at once what a new Triton has moved.
"""

import contextlib
import inspect
import os
import types
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import triton

# (owner, name) -> replacement. A replacement takes what it replaces, then the original arguments.
Replacements = Mapping[tuple[Any, str], Callable[..., Any]]

_ABSENT = object()
_NOT_KERNELS = tuple(
    os.path.dirname(os.path.abspath(path)) + os.sep for path in (triton.__file__, __file__)
)


@contextlib.contextmanager
def replaced(table: Replacements) -> Iterator[None]:
    """Puts the replacements in place, for the whole process, until the block ends."""
    saved = []
    try:
        for (owner, name), replacement in table.items():
            saved.append((owner, name, vars(owner).get(name, _ABSENT)))
            setattr(owner, name, _bound_to(replacement, getattr(owner, name, None)))
        yield
    finally:
        for owner, name, original in reversed(saved):
            if original is _ABSENT:
                delattr(owner, name)
            else:
                setattr(owner, name, original)


def _bound_to(replacement: Callable[..., Any], stock: Any) -> Callable[..., Any]:
    # Not functools.partial: as a class attribute that would not receive `self`.
    def bound(*args: Any, **kwargs: Any) -> Any:
        return replacement(stock, *args, **kwargs)

    return bound


def missing_names(table: Replacements) -> list[str]:
    """The names in `table` that this Triton does not have."""
    return [f"{owner.__name__}.{name}" for owner, name in table if not hasattr(owner, name)]


def kernel_line() -> str:
    """`file:line` of the innermost running frame that is neither Triton's nor this package's."""
    frame: types.FrameType | None = inspect.currentframe()
    while frame is not None:
        if not os.path.abspath(frame.f_code.co_filename).startswith(_NOT_KERNELS):
            return f"{frame.f_code.co_filename}:{frame.f_lineno}"
        frame = frame.f_back
    return "unknown line"
