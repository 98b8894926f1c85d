"""masked_cross_attention by PyTorch's attention under a dense mask: the baseline."""

import torch
import torch.nn.functional as F

from flamingo_fast.layout import MediaLayout


def sdpa_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    layout: MediaLayout,
    dense: bool,
    softmax_scale: float,
) -> torch.Tensor:
    """PyTorch's attention under a dense mask.

    A softmax over nothing is NaN, so rows that attend to nothing attend to all valid tokens; what
    they get is dropped afterwards, but for `dense`.
    """
    batch, media, num_keys = q.shape[0], layout.max_media, k.shape[1]
    exists = None
    if layout.media_total == batch * media:
        keys, values = (tensor.unflatten(0, (batch, media)) for tensor in (k, v))
        lengths = layout.media_seqlens
    else:
        index = layout.cu_media[:-1, None] + torch.arange(media, device=k.device)
        exists = (index < layout.cu_media[1:, None])[..., None]
        index = index.clamp(max=layout.media_total - 1)
        keys, values = k[index], v[index]
        lengths = None if layout.media_seqlens is None else layout.media_seqlens[index]
    valid = exists
    if lengths is not None:
        valid = torch.arange(num_keys, device=k.device) < lengths.view(batch, media, 1)
        valid = valid if exists is None else valid & exists
    mask = layout.to_mask()[..., None]
    if valid is not None:
        mask = mask & valid[:, None]
    mask = mask.expand(-1, -1, -1, num_keys).flatten(2)
    attends = mask.any(-1)
    kept, everything = attends, torch.ones_like(mask[:, :1])
    allowed = exists if dense else valid
    if allowed is not None:
        everything = allowed.expand(-1, -1, num_keys).flatten(1)[:, None]
    has_any = everything.any(-1)
    if dense:
        kept = attends | (~layout.past_last() & has_any)
    # Of a sample without a token any will do.
    everything = everything | ~has_any[..., None]
    mask = mask | (~attends[..., None] & everything)
    out = F.scaled_dot_product_attention(
        q.transpose(1, 2),
        keys.flatten(1, 2).transpose(1, 2),
        values.flatten(1, 2).transpose(1, 2),
        attn_mask=mask[:, None],
        scale=softmax_scale,
        enable_gqa=q.shape[2] != k.shape[2],
    )
    # Autocast may have had its way.
    return torch.where(kept[..., None, None], out.transpose(1, 2), 0).to(q.dtype)
