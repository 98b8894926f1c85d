"""From image tokens to the intervals of media that text tokens attend to.

B batch, L text tokens.
"""

from collections.abc import Sequence

import torch

from flamingo_fast.layout.arguments import count_media, document_boundaries

ATTEND = ("previous", "next", "all_previous")


def several(max_media: int) -> int:
    """max_media_per_token where it is not told: 1 only if it is."""
    return max(max_media, 2)


def attend_modes(
    attend: str | Sequence[str], count: int, device: torch.device, of_what: str
) -> str | torch.Tensor:
    """`attend` if it is of all; or each one's place in ATTEND, (count,) int32."""
    names = [attend] if isinstance(attend, str) or not isinstance(attend, Sequence) else attend
    for each in names:
        if each not in ATTEND:
            raise ValueError(f"attend: expected one of {', '.join(ATTEND)}; got {each!r}")
    if isinstance(attend, str):
        return attend
    if len(names) != count:
        raise ValueError(f"attend: expected one for each of {count} {of_what}, got {len(names)}")
    if len(set(names)) <= 1:
        return names[0] if names else ATTEND[0]
    modes = torch.tensor([ATTEND.index(each) for each in names], dtype=torch.int32, device="cpu")
    return modes.to(device, non_blocking=True)


def by_token(modes: str | torch.Tensor) -> str | torch.Tensor:
    """Modes of samples, (B,) -> (B, 1)."""
    return modes[:, None] if isinstance(modes, torch.Tensor) else modes


def has_mode(attend: str | Sequence[str], name: str) -> bool:
    """Whether `name` is what any sample attends to."""
    return attend == name or (not isinstance(attend, str) and name in attend)


def media_per_token(attend: str | Sequence[str], max_media: int) -> int:
    """max_media_per_token."""
    return several(max_media) if has_mode(attend, "all_previous") else 1


def causal_intervals(
    text_time: torch.Tensor,
    media_locations: torch.Tensor,
    num_media: torch.Tensor,
    modes: str | torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(media_start, media_end); text_time: image tokens so far, num_media: there are.

    `modes`: of all tokens; or the places in ATTEND of each one's, broadcast to text_time.
    """
    is_next, is_all = (
        modes == ATTEND.index(name) if isinstance(modes, torch.Tensor) else modes == name
        for name in ("next", "all_previous")
    )
    if is_next is not False:
        text_time = text_time + (~media_locations & is_next)
    media_end = torch.minimum(text_time, num_media)
    if is_all is True:
        return torch.zeros_like(media_end), media_end
    media_start = torch.minimum((text_time - 1).clamp_(min=0), num_media)
    if is_all is not False:
        media_start = media_start.masked_fill(is_all, 0)
    return media_start, media_end


def packed_intervals(
    media_locations: torch.Tensor,
    cu_seqlens: torch.Tensor | Sequence[int],
    num_media: int | Sequence[int] | torch.Tensor,
    attend: str | Sequence[str],
    media_total: int | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, int, int]:
    """(media_start, media_end, cu_media, media_total, most media of a document).

    Arguments: those of `MediaLayout.packed`.
    """
    batch, seqlen = media_locations.shape
    device = media_locations.device
    cu_seqlens = document_boundaries(cu_seqlens, batch, seqlen, device)
    documents = len(cu_seqlens) - 1
    modes = attend_modes(attend, documents, device, "documents")
    cu_documents, media_total, most = count_media(num_media, documents, media_total, device)
    if batch == 0 and media_total > 0:
        raise ValueError(f"num_media: {media_total} media for a batch without rows")
    # The tokens after the last document are one more, without media.
    cu_seqlens = torch.cat([cu_seqlens, cu_seqlens.new_full((1,), batch * seqlen)])
    cu_documents = torch.cat([cu_documents, cu_documents[-1:]])
    row = torch.arange(batch * seqlen, dtype=torch.int32, device=device)
    document = torch.searchsorted(cu_seqlens[1:], row, right=True, out_int32=True)
    document.clamp_(max=documents)
    images = torch.zeros(batch * seqlen + 1, dtype=torch.int32, device=device)
    torch.cumsum(media_locations.flatten(), 0, out=images[1:])
    text_time = images[1:] - images[cu_seqlens[document]]
    if isinstance(modes, torch.Tensor):
        # What the last one attends to is not there.
        modes = torch.cat([modes, modes[-1:]])[document]
    media_start, media_end = causal_intervals(
        text_time, media_locations.flatten(), cu_documents.diff()[document], modes
    )
    starts = torch.arange(batch + 1, dtype=torch.int32, device=device) * seqlen
    first = torch.searchsorted(cu_seqlens[:-1].contiguous(), starts, out_int32=True)
    cu_media = cu_documents[first.clamp_(max=documents)]
    cu_media[-1] = media_total
    offset = cu_documents[document].view(batch, seqlen) - cu_media[:-1, None]
    media_start = media_start.view(batch, seqlen) + offset
    media_end = media_end.view(batch, seqlen) + offset
    return media_start, media_end, cu_media, media_total, most
