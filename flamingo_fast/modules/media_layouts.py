"""Layouts by OpenFlamingo's arguments, made once for all layers that are given the same."""

import dataclasses
import weakref
from typing import Any

import torch
from torch import nn

from flamingo_fast.layout import MediaLayout, values_are_at_hand
from flamingo_fast.watchers import is_watched


def layout_for(
    user: nn.Module,
    x: torch.Tensor,
    media: torch.Tensor,
    media_locations: torch.Tensor | None,
    use_cached_media: bool,
    attend: str,
) -> MediaLayout:
    """The layout that OpenFlamingo's arguments say; with locations one for all layers of a model.

    Arguments:
        user: the module that asks.
        x: (B, L, ...).
        media: (B, N, R, ...).
        media_locations, use_cached_media: those of `MaskedCrossAttention.forward`.
        attend: "previous", "next" or "all_previous".

    Raises:
        TypeError, ValueError: a wrong argument, by name.
    """
    batch, seqlen = x.shape[:2]
    num_media = media.shape[1]
    if media.shape[0] != batch or media.dim() < 4:
        raise ValueError(
            f"media: expected {batch} samples of media (B, N, R, ...) as x has, or a layout; "
            f"got shape {tuple(media.shape)}"
        )
    if media_locations is None:
        start = torch.zeros(batch, seqlen, dtype=torch.int32, device=x.device)
        return MediaLayout.from_intervals(start, start + num_media, num_media, max(num_media, 1))
    if not use_cached_media:
        if media_locations.shape[:2] != x.shape[:2]:
            raise ValueError(
                f"media_locations: expected shape {(batch, seqlen)}, x's, got "
                f"{tuple(media_locations.shape)} (use_cached_media takes another length)"
            )
    return shared_layout(
        user, media_locations, num_media, seqlen if use_cached_media else None, attend
    )


@dataclasses.dataclass
class _LastLayout:
    """The last layout on a GPU, what it was made of, and the modules that had it.

    All layers of a model are given the same locations, and a layout is a hundred small kernels.
    """

    media_locations: weakref.ref[torch.Tensor]
    key: tuple[Any, ...]
    layout: MediaLayout
    users: weakref.WeakSet[nn.Module]


_last_layout: _LastLayout | None = None

# On a CPU: a copy of the locations, what else the layout was made of, and the layout.
_last_on_cpu: tuple[torch.Tensor, tuple[Any, ...], MediaLayout] | None = None


def shared_layout(
    user: nn.Module,
    media_locations: torch.Tensor,
    num_media: int,
    seqlen_after: int | None,
    attend: str,
) -> MediaLayout:
    """The layout of the text with the media or, with `seqlen_after`, of so many tokens after it.

    Arguments:
        user: the module that asks.
        media_locations: (B, L) bool.
        num_media: N.
        attend: "previous", "next" or "all_previous".
    """
    global _last_layout, _last_on_cpu

    def make() -> MediaLayout:
        if seqlen_after is None:
            return MediaLayout.from_media_locations(media_locations, num_media, attend)
        return MediaLayout.after_media(media_locations, num_media, seqlen_after, attend)

    if is_watched():
        return make()
    if values_are_at_hand(media_locations):
        # Not by the tensor and its version: NumPy may have changed it, and to compare is cheap.
        made_of = (media_locations.dtype, num_media, seqlen_after, attend)
        kept = _last_on_cpu
        if kept is None or kept[1] != made_of or not torch.equal(kept[0], media_locations):
            _last_on_cpu = kept = media_locations.clone(), made_of, make()
        return kept[2]
    # Changes of an inference tensor are not counted; and a graph must make its own, of what its
    # locations will hold then.
    if (
        not media_locations.is_cuda
        or media_locations.is_inference()
        or torch.cuda.is_current_stream_capturing()
    ):
        return make()
    stream = torch.cuda.current_stream(media_locations.device)
    key = (media_locations._version, num_media, seqlen_after, attend, stream)
    last = _last_layout
    if last is None or last.media_locations() is not media_locations or last.key != key:
        last = None
    # A module that asks again is in another pass over the layers. Not all that writes to memory in
    # between is counted as a version: collectives, replayed graphs and `.data` aren't.
    if last is None or user in last.users:
        last = _LastLayout(weakref.ref(media_locations), key, make(), weakref.WeakSet())
        _last_layout = last
    last.users.add(user)
    return last.layout
