"""What is made of media once and used for every token that is generated after them.

It belongs to a generation: it is kept for the cache of the text's keys and values that the model is
given, and goes with that.
"""

import contextlib
import contextvars
import weakref
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from flamingo_fast.patching.remembered import may_remember


class Kept:
    """Results of modules for media, each for the last ones that it was given.

    Media are known by their memory, which is held so that no other tensor gets it: models make new
    views of it for each token.
    """

    def __init__(self) -> None:
        self._results: dict[nn.Module, tuple[torch.Tensor, tuple[Any, ...], Any]] = {}

    def recall(self, module: nn.Module, media: torch.Tensor) -> Any:
        """What was kept for this module and these media, unchanged since; or None."""
        found = self._results.get(module)
        if found is None or type(media) is not torch.Tensor:
            return None
        return found[2] if found[1] == _memory(media) else None

    def keep(self, module: nn.Module, media: torch.Tensor, result: Any) -> None:
        """In place of what was kept for this module."""
        if type(media) is torch.Tensor:
            self._results[module] = media, _memory(media), result


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


def _memory(tensor: torch.Tensor) -> tuple[Any, ...]:
    # What was made in inference mode counts no versions.
    version = None if tensor.is_inference() else tensor._version
    layout = tuple(tensor.shape), tensor.stride()
    return tensor.data_ptr(), tensor.device, tensor.dtype, *layout, version
