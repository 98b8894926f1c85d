"""A result that is made once for a tensor that is given again, as media are while decoding."""

import weakref
from typing import Any

import torch

from flamingo_fast.layout import values_are_at_hand


class Remembered:
    """The last result for one tensor, until that changes or nobody has it any more.

    For use without gradients and outside torch.compile; `may_remember` tells.
    """

    def __init__(self) -> None:
        self._source: weakref.ref[torch.Tensor] | None = None
        self._key: tuple[Any, ...] = ()
        self._sample: torch.Tensor | None = None
        self._value: Any = None

    def recall(self, source: torch.Tensor, *also: torch.Tensor) -> Any:
        """What was kept for this very tensor and these others, or None."""
        if self._source is None or self._source() is not source or _is_captured(source):
            return None
        if self._key != versions(source, *also) or not is_like_sample(source, self._sample):
            return None
        return self._value

    def keep(self, value: Any, source: torch.Tensor, *also: torch.Tensor) -> None:
        """Until `source` dies; `also` are what else the value was made of, such as weights."""
        if _is_captured(source):
            return
        # Not a method of self, which would keep self and the value until a garbage collection.
        me = weakref.ref(self)
        self._source = weakref.ref(source, lambda dead: _forget(me(), dead))
        self._key, self._value = versions(source, *also), value
        self._sample = sample_of(source)


def _forget(remembered: Remembered | None, source: Any) -> None:
    if remembered is not None and remembered._source is source:
        remembered._source, remembered._key = None, ()
        remembered._value = remembered._sample = None


def _is_captured(source: torch.Tensor) -> bool:
    """A graph has to make its own, of what the source will hold then."""
    return source.is_cuda and torch.cuda.is_current_stream_capturing()


def may_remember() -> bool:
    """Whether a result of now may be used in a later call."""
    return not torch.is_grad_enabled() and not torch.compiler.is_compiling()


def versions(*tensors: torch.Tensor) -> tuple[Any, ...]:
    """What is another once PyTorch has written to one of them, or one has other memory."""
    # What was made in inference mode counts no versions.
    return tuple(
        (each.data_ptr(), each.dtype, None if each.is_inference() else each._version)
        for each in tensors
    )


def sample_of(media: torch.Tensor) -> torch.Tensor | None:
    """A value of each token of media (..., width); None: they can't be read without waiting.

    Writes in inference mode, through NumPy or to `.data` count as no version.
    """
    return media[..., 0].clone() if values_are_at_hand(media) else None


def is_like_sample(media: torch.Tensor, sample: torch.Tensor | None) -> bool:
    """Whether media have the values that they had in `sample_of`."""
    return sample is None or torch.equal(media[..., 0], sample)
