"""Tokens of media from the features of their frames, which may be of different numbers.

F frames of a medium, S features of a frame, R tokens of a medium.
"""

from collections.abc import Sequence

import torch
from torch import nn

from flamingo_fast.models.media_inputs import Features
from flamingo_fast.modules.plain import is_sharded


def resample(
    resampler: nn.Module,
    features: Features,
    places: Sequence[int] | None,
    *,
    width: int,
    max_num_frames: int | None,
    keeps_length: bool,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Tokens of each medium, and how many of them are valid, or None if all are.

    Arguments:
        resampler: of `flamingo_fast.modules`.
        features: (media_total, F, S, width), or a list of (F, S, width), of any F.
        places: each medium's among those of its row; None: the resampler has no embeddings of them.
        max_num_frames: that it has embeddings of; None: it has none.
        keeps_length: whether it makes a token of each feature.

    Returns:
        (media_total, R, dim), and (media_total,) int32 or None.

    Raises:
        ValueError: frames of different numbers, more than max_num_frames, and a sharded resampler.
    """
    dtype = dtype_of(resampler)
    if isinstance(features, torch.Tensor):
        return _resampled(resampler, features.to(dtype), places), None
    if not features:
        device = next(resampler.parameters()).device
        none = torch.empty(0, 1, 1, width, dtype=dtype, device=device)
        return _resampled(resampler, none, places), None
    features = [each.to(dtype) for each in features]
    frames = [len(each) for each in features]
    if len(set(frames)) == 1:
        return _resampled(resampler, torch.stack(features), places), None
    if not is_sharded(resampler):
        return _resampled_in_groups(resampler, features, frames, places)
    if max_num_frames is not None and max(frames) > max_num_frames:
        raise ValueError(
            f"videos: expected at most {max_num_frames} frames where they have different numbers "
            "and the resampler is sharded, as embeddings of more depend on the number; got "
            f"{frames}"
        )
    tokens, seqlens = _resampled_in_one_call(resampler, features, frames, places)
    return tokens, seqlens if keeps_length else None


def places_of(
    num_media: Sequence[int] | None, media_total: int, max_num_media: int | None
) -> list[int] | None:
    """Each medium's place among those of its row, of which so many have embeddings; None: none."""
    if max_num_media is None:
        return None
    num_media = num_media or ()
    if sum(num_media) != media_total:
        raise ValueError(
            f"num_media: expected the numbers of {media_total} media, as their places have "
            f"embeddings; got {num_media}"
        )
    if max(num_media, default=0) > max_num_media:
        raise ValueError(
            f"num_media: expected at most resampler.max_num_media = {max_num_media} in a row, got "
            f"{list(num_media)}"
        )
    return [place for count in num_media for place in range(count)]


def dtype_of(module: nn.Module) -> torch.dtype:
    """Of its parameters."""
    return next((each.dtype for each in module.parameters()), torch.get_default_dtype())


def _resampled(
    resampler: nn.Module,
    features: torch.Tensor,
    places: Sequence[int] | None,
    seqlens: torch.Tensor | None = None,
) -> torch.Tensor:
    """(n, F, S, width) -> (n, R, dim)."""
    index = None
    if places is not None:
        index = torch.tensor(places, dtype=torch.int64, device="cpu")[:, None]
        index = index.to(features.device, non_blocking=True)
    seqlens = None if seqlens is None else seqlens[:, None]
    return resampler(features[:, None], places=index, media_seqlens=seqlens).flatten(0, 1)


def _resampled_in_one_call(
    resampler: nn.Module,
    features: list[torch.Tensor],
    frames: list[int],
    places: Sequence[int] | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Padded, with their lengths: ranks that share the resampler make as many calls."""
    lengths = torch.tensor(frames, dtype=torch.int32, device="cpu") * features[0].shape[1]
    seqlens = lengths.to(features[0].device, non_blocking=True)
    padded = torch.nn.utils.rnn.pad_sequence(features, batch_first=True)
    return _resampled(resampler, padded, places, seqlens), seqlens


def _resampled_in_groups(
    resampler: nn.Module,
    features: list[torch.Tensor],
    frames: list[int],
    places: Sequence[int] | None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Those of one F go together: embeddings of frames depend on F."""
    out: dict[int, torch.Tensor] = {}
    for number in sorted(set(frames)):
        group = [index for index, each in enumerate(frames) if each == number]
        of_group = None if places is None else [places[index] for index in group]
        tokens = _resampled(resampler, torch.stack([features[index] for index in group]), of_group)
        out |= dict(zip(group, tokens, strict=True))
    by_medium = [out[index] for index in range(len(frames))]
    lengths = [len(each) for each in by_medium]
    seqlens = None
    if len(set(lengths)) > 1:
        seqlens = torch.tensor(lengths, dtype=torch.int32, device="cpu")
        seqlens = seqlens.to(by_medium[0].device, non_blocking=True)
    return torch.nn.utils.rnn.pad_sequence(by_medium, batch_first=True), seqlens
