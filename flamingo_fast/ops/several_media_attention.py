"""Attention where a token attends to several media, or has any mask of them: ops and autograd.

The backward needs q, k, v, the output and the softmax's log-sum of each row.
"""

from typing import Any

import torch

from flamingo_fast.layout import MediaLayout
from flamingo_fast.ops import cpu_several_media
from flamingo_fast.ops.attention_gradients import (
    input_precision,
    new_dkv,
    new_dq,
    of_one_projection,
    positive_scale,
    separate,
)
from flamingo_fast.ops.dispatch import apply, differentiable_once, register_op


def _forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    media_start: torch.Tensor,
    media_end: torch.Tensor,
    media_bits: torch.Tensor | None,
    cu_media: torch.Tensor,
    media_seqlens: torch.Tensor | None,
    max_media: int,
    dense: bool,
    softmax_scale: float,
    need_lse: bool,
    impl: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    if impl == "triton":
        from flamingo_fast.kernels.several_media_forward import several_media_fwd

        return several_media_fwd(
            q,
            k,
            v,
            media_start,
            media_end,
            media_bits,
            cu_media,
            media_seqlens,
            max_media,
            dense,
            softmax_scale,
            need_lse,
            input_precision(),
        )
    # Autocast of bf16 refuses to put fp16 keys together, and one of fp16 those of bf16.
    with torch.autocast("cpu", enabled=False):
        return cpu_several_media.several_media_forward(
            q,
            k,
            v,
            media_start,
            media_end,
            cu_media,
            media_seqlens,
            media_bits,
            dense,
            softmax_scale,
            need_lse,
        )


def _fake_forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    media_start: torch.Tensor,
    media_end: torch.Tensor,
    media_bits: torch.Tensor | None,
    cu_media: torch.Tensor,
    media_seqlens: torch.Tensor | None,
    max_media: int,
    dense: bool,
    softmax_scale: float,
    need_lse: bool,
    impl: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    dtype = torch.float32
    shape: tuple[int, ...] = (0,)
    if need_lse and impl == "triton":
        from flamingo_fast.kernels.attention_config import lse_shape

        shape = lse_shape(q, k.shape[2])
    elif need_lse:
        shape, dtype = q.shape[:3], torch.promote_types(q.dtype, dtype)
    return q.new_empty(q.shape), q.new_empty(shape, dtype=dtype)


def _backward(
    dout: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    media_start: torch.Tensor,
    media_end: torch.Tensor,
    media_bits: torch.Tensor | None,
    media_rows: torch.Tensor,
    cu_media: torch.Tensor,
    media_seqlens: torch.Tensor | None,
    max_media: int,
    dense: bool,
    softmax_scale: float,
    need_dq: bool,
    need_dkv: bool,
    interleaved: bool,
    impl: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    dq, dkv = new_dq(q, need_dq), new_dkv(k, need_dkv, interleaved)
    dk_dv = separate(dkv, interleaved) if need_dkv else dkv
    if impl == "triton":
        from flamingo_fast.kernels.several_media_backward import several_media_bwd

        several_media_bwd(
            dout,
            q,
            k,
            v,
            out,
            lse,
            media_start,
            media_end,
            media_bits,
            media_rows,
            cu_media,
            media_seqlens,
            max_media,
            dense,
            softmax_scale,
            dq,
            dk_dv,
            input_precision(),
        )
    else:
        cpu_several_media.several_media_backward(
            dout,
            q,
            k,
            v,
            out,
            lse,
            media_start,
            media_end,
            cu_media,
            media_seqlens,
            media_bits,
            dense,
            softmax_scale,
            dq,
            dk_dv,
        )
    return dq, dkv


def _fake_backward(
    dout: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    media_start: torch.Tensor,
    media_end: torch.Tensor,
    media_bits: torch.Tensor | None,
    media_rows: torch.Tensor,
    cu_media: torch.Tensor,
    media_seqlens: torch.Tensor | None,
    max_media: int,
    dense: bool,
    softmax_scale: float,
    need_dq: bool,
    need_dkv: bool,
    interleaved: bool,
    impl: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    return new_dq(q, need_dq), new_dkv(k, need_dkv, interleaved)


_forward_op = register_op(
    "several_media_attention_fwd(Tensor q, Tensor k, Tensor v, Tensor media_start, "
    "Tensor media_end, Tensor? media_bits, Tensor cu_media, Tensor? media_seqlens, "
    "SymInt max_media, bool dense, float softmax_scale, bool need_lse, str impl) "
    "-> (Tensor, Tensor)",
    _forward,
    _fake_forward,
)
_backward_op = register_op(
    "several_media_attention_bwd(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor out, "
    "Tensor lse, Tensor media_start, Tensor media_end, Tensor? media_bits, Tensor media_rows, "
    "Tensor cu_media, Tensor? media_seqlens, SymInt max_media, bool dense, float softmax_scale, "
    "bool need_dq, bool need_dkv, bool interleaved, str impl) -> (Tensor, Tensor)",
    _backward,
    _fake_backward,
)


class _SeveralMediaAttentionFn(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        media_start: torch.Tensor,
        media_end: torch.Tensor,
        media_bits: torch.Tensor | None,
        media_rows: torch.Tensor,
        cu_media: torch.Tensor,
        media_seqlens: torch.Tensor | None,
        max_media: int,
        dense: bool,
        softmax_scale: float,
        need_lse: bool,
        impl: str,
    ) -> torch.Tensor:
        out, lse = _forward_op(
            q,
            k,
            v,
            media_start,
            media_end,
            media_bits,
            cu_media,
            media_seqlens,
            max_media,
            dense,
            softmax_scale,
            need_lse,
            impl,
        )
        ctx.save_for_backward(
            q,
            k,
            v,
            out,
            lse,
            media_start,
            media_end,
            media_bits,
            media_rows,
            cu_media,
            media_seqlens,
        )
        ctx.max_media = max_media
        ctx.dense = dense
        ctx.softmax_scale = softmax_scale
        ctx.impl = impl
        return out

    @staticmethod
    @differentiable_once("masked_cross_attention")
    def backward(ctx: Any, dout: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        q, k, v, *saved = ctx.saved_tensors
        need_dq, need_dk, need_dv = ctx.needs_input_grad[:3]
        interleaved = of_one_projection(k, v)
        dq, dkv = _backward_op(
            dout,
            q,
            k,
            v,
            *saved,
            ctx.max_media,
            ctx.dense,
            ctx.softmax_scale,
            need_dq,
            need_dk or need_dv,
            interleaved,
            ctx.impl,
        )
        dk, dv = separate(dkv, interleaved).unbind(0) if need_dk or need_dv else (None, None)
        return (
            dq if need_dq else None,
            dk if need_dk else None,
            dv if need_dv else None,
            *[None] * 11,
        )


def several_media_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    layout: MediaLayout,
    dense: bool,
    softmax_scale: float,
    needs_grad: bool,
    impl: str,
) -> torch.Tensor:
    """impl "triton" or "torch", the latter on a CPU; k and v are (media_total, R, Hkv, D)."""
    q, softmax_scale = positive_scale(q, softmax_scale)
    media_end = layout.media_end
    if dense and layout.media_seqlens is not None:
        media_end = torch.where(layout.attends(), media_end, layout.media_start)
    return apply(
        _SeveralMediaAttentionFn,
        q,
        k,
        v,
        layout.media_start,
        media_end,
        layout.media_bits,
        layout.media_rows,
        layout.cu_media,
        layout.media_seqlens,
        layout.max_media,
        dense,
        softmax_scale,
        needs_grad,
        impl,
    )
