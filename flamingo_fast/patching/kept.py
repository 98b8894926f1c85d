"""What is made of media once and used for every token that is generated after them.

It belongs to a generation: it is kept for the cache of the text's keys and values that the model is
given, and goes with that.
"""

import contextlib
import contextvars
import weakref
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn

from flamingo_fast.patching.remembered import (
    is_like_sample,
    may_remember,
    sample_of,
    versions,
)


class Kept:
    """Results of modules for media, each for the last ones that it was given.

    Media are known by their memory, which is held so that no other tensor gets it: models make new
    views of it for each token.
    """

    def __init__(self) -> None:
        self._results: dict[nn.Module, _Result] = {}

    def recall(self, module: nn.Module, media: torch.Tensor, *weights: torch.Tensor) -> Any:
        """What was kept for this module, these media and weights, unchanged since; or None."""
        found = self._results.get(module)
        if found is None or type(media) is not torch.Tensor:
            return None
        is_same = found.key == _key(media, weights) and is_like_sample(media, found.sample)
        return found.value if is_same else None

    def keep(
        self, module: nn.Module, media: torch.Tensor, value: Any, *weights: torch.Tensor
    ) -> None:
        """In place of what was kept for this module."""
        if type(media) is torch.Tensor:
            self._results[module] = _Result(media, _key(media, weights), sample_of(media), value)


class _Result(NamedTuple):
    media: torch.Tensor
    key: tuple[Any, ...]
    sample: torch.Tensor | None
    value: Any


_current: contextvars.ContextVar[Kept | None] = contextvars.ContextVar("kept", default=None)


def current() -> Kept | None:
    """Of the generation whose model is being called; None without one, or with gradients."""
    return _current.get() if may_remember() else None


@contextlib.contextmanager
def generation(memory: dict[str, Any], cache: object) -> Iterator[None]:
    """Makes `current` what is kept for a cache.

    Arguments:
        memory: of the patched model.
        cache: of the text's keys and values, or None.
    """
    try:
        of_caches = memory.setdefault("kept", weakref.WeakKeyDictionary())
        kept = None if cache is None else of_caches.setdefault(cache, Kept())
    except TypeError:
        # Tuples, as caches once were.
        kept = None
    token = _current.set(kept)
    try:
        yield
    finally:
        _current.reset(token)


def _key(media: torch.Tensor, weights: Sequence[torch.Tensor]) -> tuple[Any, ...]:
    return media.device, tuple(media.shape), media.stride(), *versions(media, *weights)
