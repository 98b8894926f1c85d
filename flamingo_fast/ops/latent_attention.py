"""latent_attention: a resampler's latents attend to their medium's features and to themselves.

The backward needs the inputs, the output and the softmax's log-sum of each row.
"""

from typing import Any

import torch

from flamingo_fast import reference
from flamingo_fast.layout import MediaLayout
from flamingo_fast.ops import cpu_latent_attention
from flamingo_fast.ops.attention_gradients import (
    input_precision,
    new_dkv,
    new_dq,
    of_one_projection,
    positive_scale,
    separate,
)
from flamingo_fast.ops.checks import check_latent_inputs
from flamingo_fast.ops.dispatch import VARLEN_IMPLS, apply, differentiable_once, register_op
from flamingo_fast.ops.other_attention import choose_attention, library_attention
from flamingo_fast.ops.sdpa_attention import sdpa_attention


def _forward(
    q: torch.Tensor,
    k_media: torch.Tensor,
    v_media: torch.Tensor,
    k_latents: torch.Tensor,
    v_latents: torch.Tensor,
    media_seqlens: torch.Tensor | None,
    softmax_scale: float,
    need_lse: bool,
    impl: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    if impl == "triton":
        from flamingo_fast.kernels.latent_forward import latent_fwd

        return latent_fwd(
            q,
            k_media,
            v_media,
            k_latents,
            v_latents,
            media_seqlens,
            softmax_scale,
            need_lse,
            input_precision(),
        )
    return cpu_latent_attention.latent_forward(
        q, k_media, v_media, k_latents, v_latents, media_seqlens, softmax_scale, need_lse
    )


def _fake_forward(
    q: torch.Tensor,
    k_media: torch.Tensor,
    v_media: torch.Tensor,
    k_latents: torch.Tensor,
    v_latents: torch.Tensor,
    media_seqlens: torch.Tensor | None,
    softmax_scale: float,
    need_lse: bool,
    impl: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    batch, latents, heads, _ = q.shape
    dtype = torch.promote_types(q.dtype, torch.float32)
    shape: tuple[int, ...] = (0,)
    if need_lse and impl == "triton":
        from flamingo_fast.kernels.attention_config import lse_shape

        shape = lse_shape(q, k_media.shape[2])
    elif need_lse:
        shape = (batch, heads, latents)
    return q.new_empty(q.shape), q.new_empty(shape, dtype=dtype)


def _backward(
    dout: torch.Tensor,
    q: torch.Tensor,
    k_media: torch.Tensor,
    v_media: torch.Tensor,
    k_latents: torch.Tensor,
    v_latents: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    media_seqlens: torch.Tensor | None,
    softmax_scale: float,
    need_dq: bool,
    need_dmedia: bool,
    need_dlatents: bool,
    media_interleaved: bool,
    latents_interleaved: bool,
    impl: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    dq = new_dq(q, need_dq)
    dmedia = new_dkv(k_media, need_dmedia, media_interleaved)
    dlatents = new_dkv(k_latents, need_dlatents, latents_interleaved)
    arguments = (dout, q, k_media, v_media, k_latents, v_latents, out, lse, media_seqlens)
    gradients = (
        dq,
        separate(dmedia, media_interleaved) if need_dmedia else dmedia,
        separate(dlatents, latents_interleaved) if need_dlatents else dlatents,
    )
    if impl == "triton":
        from flamingo_fast.kernels.latent_backward import latent_bwd

        latent_bwd(*arguments, softmax_scale, *gradients, input_precision())
    else:
        cpu_latent_attention.latent_backward(*arguments, softmax_scale, *gradients)
    return dq, dmedia, dlatents


def _fake_backward(
    dout: torch.Tensor,
    q: torch.Tensor,
    k_media: torch.Tensor,
    v_media: torch.Tensor,
    k_latents: torch.Tensor,
    v_latents: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    media_seqlens: torch.Tensor | None,
    softmax_scale: float,
    need_dq: bool,
    need_dmedia: bool,
    need_dlatents: bool,
    media_interleaved: bool,
    latents_interleaved: bool,
    impl: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return (
        new_dq(q, need_dq),
        new_dkv(k_media, need_dmedia, media_interleaved),
        new_dkv(k_latents, need_dlatents, latents_interleaved),
    )


_forward_op = register_op(
    "latent_attention_fwd(Tensor q, Tensor k_media, Tensor v_media, Tensor k_latents, "
    "Tensor v_latents, Tensor? media_seqlens, float softmax_scale, bool need_lse, str impl) "
    "-> (Tensor, Tensor)",
    _forward,
    _fake_forward,
)
_backward_op = register_op(
    "latent_attention_bwd(Tensor dout, Tensor q, Tensor k_media, Tensor v_media, "
    "Tensor k_latents, Tensor v_latents, Tensor out, Tensor lse, Tensor? media_seqlens, "
    "float softmax_scale, bool need_dq, bool need_dmedia, bool need_dlatents, "
    "bool media_interleaved, bool latents_interleaved, str impl) -> (Tensor, Tensor, Tensor)",
    _backward,
    _fake_backward,
)


class _LatentAttentionFn(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: torch.Tensor,
        k_media: torch.Tensor,
        v_media: torch.Tensor,
        k_latents: torch.Tensor,
        v_latents: torch.Tensor,
        media_seqlens: torch.Tensor | None,
        softmax_scale: float,
        need_lse: bool,
        impl: str,
    ) -> torch.Tensor:
        inputs = (q, k_media, v_media, k_latents, v_latents, media_seqlens)
        out, lse = _forward_op(*inputs, softmax_scale, need_lse, impl)
        ctx.save_for_backward(*inputs, out, lse)
        ctx.softmax_scale = softmax_scale
        ctx.impl = impl
        return out

    @staticmethod
    @differentiable_once("latent_attention")
    def backward(ctx: Any, dout: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        q, k_media, v_media, k_latents, v_latents, media_seqlens, out, lse = ctx.saved_tensors
        need_dq, *need_media, need_dk_latents, need_dv_latents = ctx.needs_input_grad[:5]
        needed = (any(need_media), need_dk_latents or need_dv_latents)
        interleaved = (
            of_one_projection(k_media, v_media),
            of_one_projection(k_latents, v_latents),
        )
        dq, *dkv = _backward_op(
            dout,
            q,
            k_media,
            v_media,
            k_latents,
            v_latents,
            out,
            lse,
            media_seqlens,
            ctx.softmax_scale,
            need_dq,
            *needed,
            *interleaved,
            ctx.impl,
        )
        gradients = [dq if need_dq else None]
        for gradient, need, halves in zip(dkv, needed, interleaved, strict=True):
            gradients += separate(gradient, halves).unbind(0) if need else (None, None)
        wanted = ctx.needs_input_grad[:5]
        return (
            *(gradient if need else None for gradient, need in zip(gradients, wanted, strict=True)),
            *[None] * 4,
        )


def of_one_source(
    q: torch.Tensor,
    k_media: torch.Tensor,
    v_media: torch.Tensor,
    k_latents: torch.Tensor,
    v_latents: torch.Tensor,
    media_seqlens: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor, MediaLayout]:
    """Keys and values of both, the latents first: what is valid is then the first ones.

    The layout is that of one medium a sample, which all rows attend to.
    """
    batch, latents = q.shape[:2]
    start = torch.zeros(batch, latents, dtype=torch.int32, device=q.device)
    layout = MediaLayout.from_intervals(
        start,
        start + 1,
        1,
        1,
        media_seqlens=None
        if media_seqlens is None
        else media_seqlens.clamp(0, k_media.shape[1]) + latents,
    )
    k, v = torch.cat([k_latents, k_media], 1), torch.cat([v_latents, v_media], 1)
    return k, v, layout


def latent_attention(
    q: torch.Tensor,
    k_media: torch.Tensor,
    v_media: torch.Tensor,
    k_latents: torch.Tensor,
    v_latents: torch.Tensor,
    *,
    media_seqlens: torch.Tensor | None = None,
    softmax_scale: float | None = None,
    impl: str = "auto",
) -> torch.Tensor:
    """Latents attend to the features of their medium and to themselves, in one softmax.

    The attention of a Perceiver Resampler (Flamingo, section 2.1 and appendix A.1.1), without
    putting its two sources of keys and values together. B media, R latents of each, S features of
    each, H query heads, Hkv key/value heads, D head dim.

    Arguments:
        q: (B, R, H, D), fp32, fp16 or bf16 (fp64 outside Triton), any strides, as of all tensors.
        k_media, v_media: (B, S, Hkv, D) of q's dtype; H is a multiple of Hkv. S may be 0.
        k_latents, v_latents: (B, R, Hkv, D) of q's dtype.
        media_seqlens: (B,) integers, the valid features of each medium, its first ones: of short
            videos and padded images. Latents are always valid.
        softmax_scale: D ** -0.5 by default.
        impl: "auto", "triton", "torch" or "reference"; "sdpa", PyTorch's attention on the two
            sources put together, a baseline; "varlen" (torch.nn.attention.varlen), "flash_attn"
            (version 4 where it can run, otherwise 2) or "xformers", which do the same on a GPU.
            "torch" is for CPUs, and "sdpa" elsewhere.

    Returns:
        q's shape and dtype. A medium's result is the same, bit for bit, in any batch.

    Raises:
        TypeError, ValueError: a wrong argument, by name.
        BackendUnavailableError: `impl` can't run here.
    """
    tensors = (q, k_media, v_media, k_latents, v_latents)
    softmax_scale, media_seqlens = check_latent_inputs(*tensors, media_seqlens, softmax_scale)
    impl = choose_attention(impl, q)
    if impl == "reference" or q.numel() == 0:
        return reference.latent_attention(*tensors, media_seqlens, softmax_scale)
    if impl in ("sdpa", *VARLEN_IMPLS):
        k, v, layout = of_one_source(*tensors, media_seqlens)
        if impl == "sdpa":
            return sdpa_attention(q, k, v, layout, False, softmax_scale)
        attend_by_library = library_attention(impl, q, k, layout, False)
        return attend_by_library(q, k, v, layout, softmax_scale)
    # Inside the Function gradients are off, and inputs want them even under no_grad.
    needs_grad = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)
    q, softmax_scale = positive_scale(q, softmax_scale)
    return apply(
        _LatentAttentionFn,
        q,
        k_media,
        v_media,
        k_latents,
        v_latents,
        media_seqlens,
        softmax_scale,
        needs_grad,
        impl,
    )
