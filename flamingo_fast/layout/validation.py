"""Whether a layout's values are in bounds."""

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from flamingo_fast.layout.media_layout import MediaLayout


def validate(layout: "MediaLayout") -> None:
    """See `MediaLayout.validate`."""
    start, end, cu_media = layout.media_start.cpu(), layout.media_end.cpu(), layout.cu_media.cpu()
    num_media = cu_media.diff()
    if cu_media[0] != 0 or cu_media[-1] != layout.media_total or (num_media < 0).any():
        raise ValueError(
            f"cu_media: expected 0 to media_total {layout.media_total}, never falling; "
            f"got {cu_media.tolist()}"
        )
    if (num_media > layout.max_media).any():
        raise ValueError(f"num_media: at most {layout.max_media} expected, got {num_media.max()}")
    wrong = (start < 0) | (start > end) | (end > num_media[:, None])
    _refuse(layout, wrong, start, end, "expected 0 <= start <= end <= {n} media of the sample")
    limit = layout.max_media_per_token
    wrong = end - start > limit
    if layout.media_bits is not None:
        wrong = layout.to_mask().cpu().sum(2) > limit
    _refuse(layout, wrong, start, end, f"more than max_media_per_token {limit} media")
    if layout.media_seqlens is not None and (layout.media_seqlens.cpu() < 0).any():
        medium = int((layout.media_seqlens.cpu() < 0).nonzero()[0])
        raise ValueError(
            f"media_seqlens: medium {medium} has {int(layout.media_seqlens[medium])} tokens"
        )


def _refuse(
    layout: "MediaLayout",
    wrong: torch.Tensor,
    start: torch.Tensor,
    end: torch.Tensor,
    reason: str,
) -> None:
    if wrong.any():
        sample, token = wrong.nonzero()[0].tolist()
        num_media = int(layout.cu_media[sample + 1] - layout.cu_media[sample])
        raise ValueError(
            f"token {token} of sample {sample} attends to media "
            f"[{int(start[sample, token])}, {int(end[sample, token])}): "
            + reason.format(n=num_media)
        )
