"""What each op means, in plain PyTorch: the oracles of the tests and impl="reference".

Arguments are those of the ops of the same names, and are not checked; k and v have 4 dimensions.
Every function computes in fp32 (fp64 for fp64 inputs), rounds once an output and returns contiguous
tensors, by default of x's dtype. Nothing here imports Triton.
"""

import torch

from flamingo_fast.layout import MediaLayout


def _upcast(tensor: torch.Tensor) -> torch.Tensor:
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def squared_relu(x: torch.Tensor) -> torch.Tensor:
    """relu(x)**2, of x's dtype: the activation of the paper's feed-forwards (appendix A.1.4)."""
    return torch.relu(_upcast(x)).square().to(x.dtype).contiguous()


def gated_residual(x: torch.Tensor, y: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
    """x + tanh(gate) * y (Flamingo, figure 4); x's shape and dtype."""
    # Autograd's 1 - tanh**2 cancels for large gates: at 10 nothing of it is left in fp32.
    tanh_gate = torch.tanh(gate.double()).to(_upcast(x).dtype)
    return (_upcast(x) + tanh_gate * _upcast(y)).to(x.dtype).contiguous()


def layer_norm(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    eps: float,
    out_dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """(x - mean) / sqrt(var + eps) * weight + bias over the last dimension (biased variance)."""
    wide = _upcast(x)
    wide = wide - wide.mean(-1, keepdim=True)
    wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return _affine(wide, weight, bias).to(out_dtype or x.dtype).contiguous()


def rms_norm(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    eps: float,
    out_dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """x / sqrt(mean(x**2) + eps) * weight + bias over the last dimension."""
    wide = _upcast(x)
    wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return _affine(wide, weight, bias).to(out_dtype or x.dtype).contiguous()


def _affine(
    xhat: torch.Tensor, weight: torch.Tensor | None, bias: torch.Tensor | None
) -> torch.Tensor:
    if weight is not None:
        xhat = xhat * _upcast(weight)
    if bias is not None:
        xhat = xhat + _upcast(bias)
    return xhat


def gated_residual_norm(
    x: torch.Tensor,
    y: torch.Tensor,
    gate: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    eps: float,
    norm: str,
    out_dtype: torch.dtype | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(residual, norm(residual)), the residual rounded to x's dtype before it is normalised.

    `norm` is "layer" or "rms"; of normed alone the dtype is out_dtype, by default x's.
    """
    normalise = {"layer": layer_norm, "rms": rms_norm}[norm]
    residual = gated_residual(x, y, gate)
    return residual, normalise(residual, weight, bias, eps, out_dtype)


def masked_cross_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    layout: MediaLayout,
    unattended: str,
    past_last: str,
    softmax_scale: float,
) -> torch.Tensor:
    """softmax(q k^T * scale) v over the tokens of the media that `layout` gives each row.

    Rows that attend to nothing: "zero"; "dense": over all tokens of the sample's media, valid or
    not; "uniform": the mean over the valid ones. k and v are (media_total, R, Hkv, D); out has q's
    shape and dtype.
    """
    keys, values, exists, valid = _by_sample(k, v, layout, keep_invalid=unattended == "dense")
    attends = layout.attends()
    rows_past_last = layout.past_last() & ~attends
    before = ~attends & ~rows_past_last
    mask = layout.to_mask()[..., None] & valid[:, None]
    if unattended == "dense":
        mask = mask | (before[..., None, None] & exists[:, None])
    mask, valid = mask.flatten(2)[:, None, None], valid.flatten(1)
    wide_q = _upcast(q).unflatten(2, (k.shape[2], q.shape[2] // k.shape[2]))
    scores = torch.einsum("blhgd,bshd->bhgls", wide_q, keys) * softmax_scale
    scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    weights = torch.softmax(scores, -1) * mask
    # Looked up: another name would be "zero", silently.
    before_is_uniform = {"zero": False, "dense": False, "uniform": True}[unattended]
    past_last_is_uniform = {"zero": False, "uniform": True}[past_last]
    for is_uniform, rows in (
        (before_is_uniform, before),
        (past_last_is_uniform, rows_past_last),
    ):
        if is_uniform:
            mean = valid.to(scores.dtype) / valid.sum(-1, keepdim=True).clamp(min=1)
            weights = torch.where(rows[:, None, None, :, None], mean[:, None, None, None], weights)
    out = torch.einsum("bhgls,bshd->blhgd", weights.to(values.dtype), values)
    return out.flatten(2, 3).to(q.dtype).contiguous()


def latent_attention(
    q: torch.Tensor,
    k_media: torch.Tensor,
    v_media: torch.Tensor,
    k_latents: torch.Tensor,
    v_latents: torch.Tensor,
    media_seqlens: torch.Tensor | None,
    softmax_scale: float,
) -> torch.Tensor:
    """softmax(q k^T * scale) v over a medium's valid features and its latents.

    q (B, R, H, D), media (B, S, Hkv, D), latents (B, R, Hkv, D), media_seqlens (B,); out has q's
    shape and dtype.
    """
    num_keys, kv_heads = k_media.shape[1:3]
    features = torch.arange(num_keys, device=q.device)
    valid = torch.ones(q.shape[0], num_keys, dtype=torch.bool, device=q.device)
    if media_seqlens is not None:
        valid = features < media_seqlens[:, None]
    keys, values = (
        # What is not valid need not be finite.
        torch.cat([torch.where(valid[..., None, None], _upcast(media), 0), _upcast(latents)], 1)
        for media, latents in ((k_media, k_latents), (v_media, v_latents))
    )
    wide_q = _upcast(q).unflatten(2, (kv_heads, q.shape[2] // kv_heads))
    scores = torch.einsum("brhgd,bshd->bhgrs", wide_q, keys) * softmax_scale
    allowed = torch.cat([valid, valid.new_ones(q.shape[:2])], 1)
    scores = scores.masked_fill(~allowed[:, None, None, None], float("-inf"))
    out = torch.einsum("bhgrs,bshd->brhgd", torch.softmax(scores, -1), values)
    return out.flatten(2, 3).to(q.dtype).contiguous()


def _by_sample(
    k: torch.Tensor, v: torch.Tensor, layout: MediaLayout, keep_invalid: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Keys, values (B, max_media * R, Hkv, D); exists, valid (B, max_media, R).

    Keys and values are 0 where there is no medium and, but for `keep_invalid`, no valid token.
    """
    num_keys = k.shape[1]
    media = torch.arange(layout.max_media, device=k.device)
    first, end = layout.cu_media[:-1, None], layout.cu_media[1:, None]
    exists = valid = (first + media < end)[..., None].expand(-1, -1, num_keys)
    flat = (first + media).clamp(max=max(layout.media_total - 1, 0))
    if layout.media_seqlens is not None:
        tokens = torch.arange(num_keys, device=k.device)
        valid = exists & (tokens < layout.media_seqlens[flat][..., None])
    kept = (exists if keep_invalid else valid)[..., None, None]
    keys, values = (torch.where(kept, _upcast(tensor)[flat], 0).flatten(1, 2) for tensor in (k, v))
    return keys, values, exists, valid
