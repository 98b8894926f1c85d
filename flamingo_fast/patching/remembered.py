"""A result that is made once for a tensor that is given again, as media are while decoding."""

import weakref
from typing import Any

import torch


class Remembered:
    """The last result for one tensor, until that changes or nobody has it any more.

    For use without gradients and outside torch.compile; `may_remember` tells.
    """

    def __init__(self) -> None:
        self._source: weakref.ref[torch.Tensor] | None = None
        self._key: tuple[Any, ...] = ()
        self._value: Any = None

    def recall(self, source: torch.Tensor, *also: torch.Tensor) -> Any:
        """What was kept for this very tensor and these others, or None."""
        if self._source is None or self._source() is not source:
            return None
        return self._value if self._key == _versions(source, *also) else None

    def keep(self, value: Any, source: torch.Tensor, *also: torch.Tensor) -> None:
        """Until `source` dies; `also` are what else the value was made of, such as weights."""
        self._source = weakref.ref(source, self._forget)
        self._key, self._value = _versions(source, *also), value

    def _forget(self, source: Any) -> None:
        if self._source is source:
            self._source, self._key, self._value = None, (), None


def may_remember() -> bool:
    """Whether a result of now may be used in a later call."""
    return not torch.is_grad_enabled() and not torch.compiler.is_compiling()


def _versions(*tensors: torch.Tensor) -> tuple[Any, ...]:
    # What was made in inference mode counts no versions; there nothing writes to it by itself.
    return tuple(
        (each.data_ptr(), each.dtype, None if each.is_inference() else each._version)
        for each in tensors
    )
