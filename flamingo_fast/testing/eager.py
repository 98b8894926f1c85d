"""What a user would write without this package: same-precision eager PyTorch.

The second leg of the three-way rule and the baseline of the benchmarks. Parameters are cast to
the activations' dtype, as in a model converted to that dtype.
"""

import torch
import torch.nn.functional as F

from flamingo_fast.layout import MediaLayout


def squared_relu(x: torch.Tensor) -> torch.Tensor:
    """relu(x)**2: two passes; (...) -> (...)."""
    return F.relu(x).square()


def gated_residual(x: torch.Tensor, y: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
    """x + tanh(gate) * y, rounded after each step; (..., width) and gate (1,) or (width,)."""
    return x + gate.to(x.dtype).tanh() * y.to(x.dtype)


def _to(parameter: torch.Tensor | None, x: torch.Tensor) -> torch.Tensor | None:
    return None if parameter is None else parameter.to(x.dtype)


def layer_norm(
    x: torch.Tensor, weight: torch.Tensor | None, bias: torch.Tensor | None, eps: float
) -> torch.Tensor:
    """torch.nn.functional's; weight and bias (width,) or None."""
    return F.layer_norm(x, x.shape[-1:], _to(weight, x), _to(bias, x), eps)


def rms_norm(
    x: torch.Tensor, weight: torch.Tensor | None, bias: torch.Tensor | None, eps: float
) -> torch.Tensor:
    """torch.nn.functional's, and a bias that it does not have; weight (width,) or None."""
    normed = F.rms_norm(x, x.shape[-1:], _to(weight, x), eps)
    return normed if bias is None else normed + bias.to(x.dtype)


def gated_residual_norm(
    x: torch.Tensor,
    y: torch.Tensor,
    gate: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    eps: float,
    norm: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(residual, normed) of `gated_residual` and the norm that `norm` names, "layer" or "rms"."""
    residual = gated_residual(x, y, gate)
    return residual, (rms_norm if norm == "rms" else layer_norm)(residual, weight, bias, eps)


def masked_cross_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    layout: MediaLayout,
    *,
    unattended: str = "zero",
    past_last: str = "zero",
    softmax_scale: float | None = None,
) -> torch.Tensor:
    """As OpenFlamingo: scores of all tokens and all keys, masked before and after the softmax.

    Arguments are those of `flamingo_fast.masked_cross_attention`. Samples with fewer media than
    the others are padded.
    """
    keys, values, exists, valid = _dense_media(q, k, v, layout)
    softmax_scale = q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
    attends = layout.attends()
    after = layout.past_last()
    before = ~attends & ~after
    mask = layout.to_mask()[..., None].expand(*layout.media_start.shape, *keys.shape[1:3])
    mask = mask.flatten(2)
    if valid is not None:
        mask = mask & valid[:, None]
    everything = torch.ones_like(mask[:, :1]) if valid is None else valid[:, None]
    if unattended == "dense":
        mask = mask | (before[..., None] & exists)
    scores = torch.einsum("blhd,bshd->bhls", q * softmax_scale, keys.flatten(1, 2))
    scores = scores.masked_fill(~mask[:, None], -torch.finfo(q.dtype).max)
    if scores.shape[-1] > 0:
        scores = scores - scores.amax(-1, keepdim=True).detach()
    weights = scores.softmax(-1)
    weights = weights.masked_fill(~mask.any(-1)[:, None, :, None], 0.0)
    for choice, rows in ((unattended, before), (past_last, after)):
        if choice == "uniform":
            counted = everything.to(torch.promote_types(q.dtype, torch.float32))
            mean = counted / counted.sum(-1, keepdim=True).clamp(min=1)
            weights = torch.where(rows[:, None, :, None], mean[:, None].to(q.dtype), weights)
    return torch.einsum("bhls,bshd->blhd", weights, values.flatten(1, 2))


def latent_attention(
    q: torch.Tensor,
    k_media: torch.Tensor,
    v_media: torch.Tensor,
    k_latents: torch.Tensor,
    v_latents: torch.Tensor,
    *,
    media_seqlens: torch.Tensor | None = None,
    softmax_scale: float | None = None,
) -> torch.Tensor:
    """As OpenFlamingo: both sources put together, scores of all, their largest subtracted.

    Arguments are those of `flamingo_fast.latent_attention`. OpenFlamingo has neither lengths nor
    fewer key/value heads.
    """
    softmax_scale = q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
    valid = None
    if media_seqlens is not None:
        features = torch.arange(k_media.shape[1], device=q.device)
        valid = features < media_seqlens[:, None]
        k_media, v_media = (x.masked_fill(~valid[..., None, None], 0) for x in (k_media, v_media))
        valid = torch.cat([valid, valid.new_ones(q.shape[:2])], 1)
    k, v = torch.cat([k_media, k_latents], 1), torch.cat([v_media, v_latents], 1)
    group = q.shape[2] // k.shape[2]
    if group > 1:
        k, v = (tensor.repeat_interleave(group, dim=2) for tensor in (k, v))
    scores = torch.einsum("brhd,bshd->bhrs", q * softmax_scale, k)
    if valid is not None:
        scores = scores.masked_fill(~valid[:, None, None], -torch.finfo(q.dtype).max)
    scores = scores - scores.amax(-1, keepdim=True).detach()
    return torch.einsum("bhrs,bshd->brhd", scores.softmax(-1), v)


def _dense_media(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, layout: MediaLayout
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Keys and values, (B, N, R, H, D); those that exist, (B, 1, N * R), and
    that are valid, (B, N * R), None if all."""
    batch, media = layout.batch_size, layout.max_media
    if k.dim() == 5:
        k, v = k.flatten(0, 1), v.flatten(0, 1)
    index = layout.cu_media[:-1, None] + torch.arange(media, device=k.device)
    real = index < layout.cu_media[1:, None]
    lengths = layout.media_seqlens
    exists = real[..., None].expand(*real.shape, k.shape[1]).flatten(1)[:, None]
    valid = None
    if layout.media_total != batch * media or lengths is not None:
        index = torch.where(real, index, 0)
        tokens = torch.arange(k.shape[1], device=k.device)
        valid = real[..., None].expand(*real.shape, k.shape[1])
        if lengths is not None:
            valid = valid & (tokens < lengths[index][..., None])
        valid = valid.flatten(1)
    if layout.media_total != batch * media:
        k, v = k[index], v[index]
    else:
        k, v = (tensor.unflatten(0, (batch, media)) for tensor in (k, v))
    group = q.shape[2] // k.shape[3]
    if group > 1:
        k, v = (tensor.repeat_interleave(group, dim=3) for tensor in (k, v))
    return k, v, exists, valid
