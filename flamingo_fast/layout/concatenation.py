"""Layouts after one another: samples of a batch, or tokens of a text."""

import dataclasses
import itertools
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from flamingo_fast.layout.arguments import no_inference_tensors, values_are_at_hand

if TYPE_CHECKING:
    from flamingo_fast.layout.media_layout import MediaLayout


def concatenated(layouts: list["MediaLayout"], dim: int) -> "MediaLayout":
    """See `MediaLayout.cat`."""
    if not layouts:
        raise ValueError("layouts: expected at least one")
    if dim not in (0, 1):
        raise ValueError(f"dim: expected 0 (batch) or 1 (text), got {dim!r}")
    first = layouts[0]
    for index, layout in enumerate(layouts):
        same = (
            layout.seqlen == first.seqlen
            if dim == 0
            else (layout.batch_size, layout.media_total) == (first.batch_size, first.media_total)
        )
        same = same and layout.is_packed == first.is_packed
        if not same or layout.device != first.device:
            raise ValueError(
                f"layouts[{index}]: {layout._sizes()} does not fit layouts[0]: "
                f"{first._sizes()}, along dim {dim}"
            )
        if dim == 1 and values_are_at_hand(first.cu_media) and not layout._has_media_of(first):
            raise ValueError(f"layouts[{index}]: its media are not those of layouts[0]")
    with no_inference_tensors():
        start, end = (
            torch.cat([getattr(layout, name) for layout in layouts], dim)
            for name in ("media_start", "media_end")
        )
        per_token = max(layout.max_media_per_token for layout in layouts)
        tells_past_last = all(layout.tells_past_last for layout in layouts)
        max_media = max(layout.max_media for layout in layouts)
        bits = None
        if per_token > 1 and any(layout.media_bits is not None for layout in layouts):
            bits = torch.cat([layout._bits(max_media) for layout in layouts], dim)
            end = torch.where(bits.ne(0).any(2), end, start)
        if dim == 1:
            combined = dataclasses.replace(
                first, max_media_per_token=per_token, tells_past_last=tells_past_last
            )
            return combined._with_tokens(start, end, bits, in_order=False)
        offsets = itertools.accumulate((layout.media_total for layout in layouts), initial=0)
        cu_media = torch.cat(
            [first.cu_media[:1]]
            + [
                layout.cu_media[1:] + offset
                for layout, offset in zip(layouts, offsets, strict=False)
            ]
        )
        return first._with_schedule(
            start,
            end,
            cu_media,
            _seqlens(layouts),
            sum(layout.media_total for layout in layouts),
            max_media,
            per_token,
            in_order=all(layout.row_index is None for layout in layouts),
            media_bits=bits,
            is_packed=first.is_packed,
            tells_past_last=tells_past_last,
        )


def _seqlens(layouts: Sequence["MediaLayout"]) -> torch.Tensor | None:
    if all(layout.media_seqlens is None for layout in layouts):
        return None
    whole = torch.iinfo(torch.int32).max
    return torch.cat(
        [
            layout.cu_media.new_full((layout.media_total,), whole)
            if layout.media_seqlens is None
            else layout.media_seqlens
            for layout in layouts
        ]
    )
