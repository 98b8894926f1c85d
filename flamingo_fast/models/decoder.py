"""One token after another, of rows whose text so far is in a cache.

B prompts, T tokens that a cache has, V token ids that there are logits of.
"""

import dataclasses
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F

from flamingo_fast.models.cache import FlamingoCache
from flamingo_fast.models.conditioning import MediaContext
from flamingo_fast.models.extras import require

if TYPE_CHECKING:
    from flamingo_fast.models.flamingo import Flamingo


# Steps before a CUDA graph is captured: kernels are compiled and libraries have their workspaces.
_WARM_UP = 2


class Decoder:
    """One token after another of rows whose text so far is in a cache.

    Arguments:
        model: a `Flamingo`.
        cache: with B rows. It is left alone but for the language model's cache, which grows unless
            there are copies or static_cache: `move_to` gives it what was made.
        room: the most tokens that will be fed.
        copies: rows of each of the cache's rows in turn, as beams are. They share its media.
        static_cache: see `generate`.

    Attributes:
        context: the media that all tokens attend to.
        copies: the argument.
        num_fed: tokens so far.
    """

    def __init__(
        self,
        model: "Flamingo",
        cache: FlamingoCache,
        *,
        room: int,
        copies: int = 1,
        static_cache: bool = False,
    ) -> None:
        self.model, self.copies, self.num_fed = model, copies, 0
        self.context = MediaContext(
            cache.layout_after(model.config.conditioning.attend), media_kv=cache.media_kv
        )
        self._num_before, self._is_static = cache.seqlen, static_cache
        lm, graft = cache.lm, cache.graft
        if copies > 1 or static_cache:
            capacity = cache.seqlen + room if static_cache else None
            lm, graft = (
                None if each is None else copied_cache(each, copies, capacity)
                for each in (lm, graft)
            )
        self._cache: Any = dataclasses.replace(cache, lm=lm, graft=graft)
        self._mask: torch.Tensor | None = None
        is_padded = bool((cache.attention_mask == 0).any())
        if is_padded and not static_cache and not _makes_masks(model.lang_model):
            _hide_from_reading(lm)
        # Without a mask some models would read from a GPU how full a static cache is, to make one.
        if is_padded or static_cache:
            # Static shapes need the tokens to come to be in the mask, hidden until they are there.
            mask = F.pad(cache.attention_mask, (0, room), value=0 if static_cache else 1)
            self._mask = repeated_rows(mask, copies)
        self._slot = torch.full((1,), cache.seqlen, device=cache.attention_mask.device)
        self._graph: torch.cuda.CUDAGraph | None = None
        self._graph_tokens = self._graph_logits = self._slot

    def __call__(self, tokens: torch.Tensor) -> torch.Tensor:
        """Logits (rows, V) after tokens (rows,), of memory that is free until the next call."""
        is_capturable = self._is_static and tokens.is_cuda
        if is_capturable and self._graph is None and self.num_fed >= _WARM_UP:
            self._graph_tokens = tokens.clone()
            self._graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self._graph):
                self._graph_logits = self._step(self._graph_tokens)
        self.num_fed += 1
        if self._graph is None:
            return self._step(tokens)
        self._graph_tokens.copy_(tokens)
        self._graph.replay()
        return self._graph_logits

    @torch.no_grad()
    def _step(self, tokens: torch.Tensor) -> torch.Tensor:
        mask = self._mask
        if mask is not None and self._is_static:
            mask.index_fill_(1, self._slot, 1)
        elif mask is not None:
            mask = mask[:, : self._num_before + self.num_fed]
        self._cache.attention_mask = mask
        with self.model.conditioning.of(self.context):
            slot = self._slot if self._is_static else None
            hidden = self.model._hidden(tokens[:, None], None, self._cache, slot=slot)
        if self._is_static:
            self._slot.add_(1)
        return self.model.logits(hidden)[:, -1]

    def reorder(self, rows: torch.Tensor) -> None:
        """Each row goes on from another of the same sample: rows (rows,) int64."""
        for cache in filter(None, (self._cache.lm, self._cache.graft)):
            for layer in cache.layers:
                if self._is_static:
                    # The tokens of the prompt are those of the other row, and addresses must stay.
                    for each in (layer.keys, layer.values):
                        new = each[:, :, self._num_before :]
                        new.copy_(new.index_select(0, rows))
                else:
                    layer.keys = layer.keys.index_select(0, rows)
                    layer.values = layer.values.index_select(0, rows)

    def move_to(self, cache: FlamingoCache) -> None:
        """Gives `cache` the language model's cache with the tokens that were fed."""
        lm, graft = self._cache.lm, self._cache.graft
        if self._is_static:
            seqlen = self._num_before + self.num_fed
            lm, graft = (
                None if each is None else copied_cache(each, seqlen=seqlen) for each in (lm, graft)
            )
        cache.lm, cache.graft = lm, graft


def copied_cache(
    cache: Any, copies: int = 1, capacity: int | None = None, *, seqlen: int | None = None
) -> Any:
    """A copy of a language model's cache.

    Arguments:
        cache: of transformers.
        copies: rows for each row, in turn.
        capacity: of a static one, in tokens; None: it grows.
        seqlen: how many tokens of `cache`; None: all.
    """
    utils = require("transformers.cache_utils")
    if capacity is None:
        new = utils.DynamicCache()
    else:
        new = utils.Cache(layers=[utils.StaticLayer(capacity) for _ in cache.layers])
    for index, layer in enumerate(cache.layers):
        keys, values = (each[:, :, :seqlen] for each in (layer.keys, layer.values))
        new.update(repeated_rows(keys, copies), repeated_rows(values, copies), index)
    return new


def _makes_masks(lang_model: torch.nn.Module) -> bool:
    """Whether it has code of its own for masks, as OPT has in transformers 4."""
    return any(hasattr(each, "_update_causal_mask") for each in lang_model.modules())


def _hide_from_reading(cache: Any) -> None:
    """Keeps transformers from asking whether there is padding, for which a GPU is waited for.

    It does so for each token, to leave the mask out if not, but not where a cache says that it may
    be compiled. Not for models that make masks of their own: theirs would be as long as the
    capacity of such a cache, which one that grows hasn't.
    """
    for layer in cache.layers:
        layer.is_compileable = True


def repeated_rows(tensor: torch.Tensor, copies: int) -> torch.Tensor:
    """Each row so many times in turn; repeat_interleave may wait for a GPU."""
    if copies == 1:
        return tensor
    return tensor[:, None].expand(-1, copies, *tensor.shape[1:]).flatten(0, 1)


def mask_until(lengths: torch.Tensor, seqlen: int) -> torch.Tensor:
    """(B, seqlen) int64, 1 at the first `lengths` tokens of each row."""
    return (torch.arange(seqlen, device=lengths.device) < lengths[:, None]).long()
