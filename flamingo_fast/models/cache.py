"""What a conversation has seen so far: of the language model, its own cache; of the media, keys and
values of each block, and where their tokens are in the text."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch

from flamingo_fast.layout import MediaLayout
from flamingo_fast.modules.cross_attention import MediaKV


@dataclasses.dataclass
class FlamingoCache:
    """Grows with each call of a model that it is given to; made by `Flamingo.new_cache`.

    Attributes:
        lm: the language model's, of transformers; of grafting, also the stack's.
        graft: of grafting, the cache of the stack's self-attention.
        attention_mask: (B, T) int64, of all tokens so far.
        media_locations: (B, T) bool.
        num_media: media of each sample.
        media_kv: keys and values of each block, (media_total, R, Hkv, D), sample after sample.
        media_seqlens: (media_total,) int32, valid tokens of each medium; None: all.
    """

    lm: Any
    graft: Any
    attention_mask: torch.Tensor
    media_locations: torch.Tensor
    num_media: list[int]
    media_kv: list[MediaKV]
    media_seqlens: torch.Tensor | None = None

    @property
    def seqlen(self) -> int:
        """T, the tokens of a row so far, padding among them."""
        return self.attention_mask.shape[1]

    def layout(self, num_tokens: int, attend: str | Sequence[str]) -> MediaLayout:
        """Of the last so many tokens."""
        return MediaLayout.from_media_locations(
            self.media_locations,
            self.num_media,
            attend,
            media_total=sum(self.num_media),
            media_seqlens=self.media_seqlens,
        ).last(num_tokens)

    def layout_after(self, attend: str) -> MediaLayout:
        """Of one token after all, as long as it is not an image token."""
        return MediaLayout.after_media(
            self.media_locations,
            self.num_media,
            1,
            attend,
            media_total=sum(self.num_media),
            media_seqlens=self.media_seqlens,
        )

    def add_tokens(self, attention_mask: torch.Tensor, media_locations: torch.Tensor) -> None:
        """(B, L) each, of the tokens of the next call."""
        self.attention_mask = torch.cat([self.attention_mask, attention_mask], 1)
        self.media_locations = torch.cat([self.media_locations, media_locations], 1)

    def add_media(
        self,
        media_kv: list[MediaKV],
        num_media: Sequence[int],
        media_seqlens: torch.Tensor | None,
    ) -> None:
        """Further media, which come after those that each sample has."""
        if not any(num_media):
            return
        if not any(self.num_media):
            self.media_kv, self.media_seqlens = media_kv, media_seqlens
        else:
            order = self._order(num_media, media_kv[0][0].device)
            length = max(self.media_kv[0][0].shape[1], media_kv[0][0].shape[1])
            self.media_seqlens = self._merged_seqlens(media_kv, media_seqlens, length, order)
            self.media_kv = [
                (_merge(k, new_k, length, order), _merge(v, new_v, length, order))
                for (k, v), (new_k, new_v) in zip(self.media_kv, media_kv, strict=True)
            ]
        self.num_media = [a + b for a, b in zip(self.num_media, num_media, strict=True)]

    def _order(self, num_new: Sequence[int], device: torch.device) -> torch.Tensor:
        """Where in [all media so far, all new ones] each sample's are."""
        order: list[int] = []
        old, new = 0, sum(self.num_media)
        for have, more in zip(self.num_media, num_new, strict=True):
            order += [*range(old, old + have), *range(new, new + more)]
            old, new = old + have, new + more
        return torch.tensor(order, dtype=torch.int64, device="cpu").to(device, non_blocking=True)

    def _merged_seqlens(
        self,
        media_kv: list[MediaKV],
        media_seqlens: torch.Tensor | None,
        length: int,
        order: torch.Tensor,
    ) -> torch.Tensor | None:
        have, new = self.media_kv[0][0], media_kv[0][0]
        same = have.shape[1] == new.shape[1]
        if same and self.media_seqlens is None and media_seqlens is None:
            return None
        parts = [
            torch.full((kv.shape[0],), kv.shape[1], dtype=torch.int32, device=kv.device)
            if seqlens is None
            else seqlens.to(kv.device, torch.int32)
            for kv, seqlens in ((have, self.media_seqlens), (new, media_seqlens))
        ]
        return torch.cat(parts)[order]


def _merge(have: torch.Tensor, new: torch.Tensor, length: int, order: torch.Tensor) -> torch.Tensor:
    padded = [
        torch.nn.functional.pad(each, (0, 0, 0, 0, 0, length - each.shape[1]))
        for each in (have, new)
    ]
    return torch.cat(padded)[order]
