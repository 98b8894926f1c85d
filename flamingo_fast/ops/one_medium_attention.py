"""Attention where a token attends to one medium: the registered ops and their autograd.

The backward needs q, k, v and, for the kernels, the softmax's log-sum; not the output, and nothing
that grows with L * N.
"""

from typing import Any

import torch

from flamingo_fast.layout import MediaLayout
from flamingo_fast.ops import cpu_attention
from flamingo_fast.ops.attention_gradients import (
    input_precision,
    new_dkv,
    new_dq,
    of_one_projection,
    separate,
)
from flamingo_fast.ops.dispatch import apply, differentiable_once, register_op
from flamingo_fast.schedule import num_slots


def _forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    work_items: torch.Tensor,
    row_index: torch.Tensor | None,
    media_seqlens: torch.Tensor | None,
    softmax_scale: float,
    need_lse: bool,
    impl: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    if impl == "triton":
        from flamingo_fast.kernels.one_medium_forward import one_medium_fwd

        return one_medium_fwd(
            q,
            k,
            v,
            work_items,
            row_index,
            media_seqlens,
            softmax_scale,
            need_lse,
            input_precision(),
        )
    # Autocast would round the fp32 inputs of scaled_dot_product_attention to 16 bits.
    with torch.autocast("cpu", enabled=False):
        out = cpu_attention.one_medium_forward(
            q, k, v, work_items, row_index, media_seqlens, softmax_scale
        )
    return out, q.new_empty(0, dtype=torch.float32)


def _fake_forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    work_items: torch.Tensor,
    row_index: torch.Tensor | None,
    media_seqlens: torch.Tensor | None,
    softmax_scale: float,
    need_lse: bool,
    impl: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    batch, seqlen, heads, _ = q.shape
    kv_heads = k.shape[2]
    has_lse = need_lse and impl == "triton"
    lse_shape = (kv_heads, batch, seqlen, heads // kv_heads) if has_lse else (0,)
    return q.new_empty(q.shape), q.new_empty(lse_shape, dtype=torch.float32)


def _backward(
    dout: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    lse: torch.Tensor,
    work_items: torch.Tensor,
    split_media: torch.Tensor,
    row_index: torch.Tensor | None,
    media_seqlens: torch.Tensor | None,
    softmax_scale: float,
    need_dq: bool,
    need_dkv: bool,
    interleaved: bool,
    impl: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    dq, dkv = new_dq(q, need_dq), new_dkv(k, need_dkv, interleaved)
    dk_dv = separate(dkv, interleaved) if need_dkv else dkv
    if impl == "triton":
        from flamingo_fast.kernels.one_medium_backward import one_medium_bwd

        one_medium_bwd(
            dout,
            q,
            k,
            v,
            lse,
            work_items,
            split_media,
            num_slots(q.shape[0], q.shape[1]),
            row_index,
            media_seqlens,
            softmax_scale,
            dq,
            dk_dv,
            input_precision(),
        )
    else:
        cpu_attention.one_medium_backward(
            dout, q, k, v, work_items, row_index, media_seqlens, softmax_scale, dq, dk_dv
        )
    return dq, dkv


def _fake_backward(
    dout: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    lse: torch.Tensor,
    work_items: torch.Tensor,
    split_media: torch.Tensor,
    row_index: torch.Tensor | None,
    media_seqlens: torch.Tensor | None,
    softmax_scale: float,
    need_dq: bool,
    need_dkv: bool,
    interleaved: bool,
    impl: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    return new_dq(q, need_dq), new_dkv(k, need_dkv, interleaved)


_forward_op = register_op(
    "one_medium_attention_fwd(Tensor q, Tensor k, Tensor v, Tensor work_items, "
    "Tensor? row_index, Tensor? media_seqlens, float softmax_scale, bool need_lse, str impl) "
    "-> (Tensor, Tensor)",
    _forward,
    _fake_forward,
)
_backward_op = register_op(
    "one_medium_attention_bwd(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor lse, "
    "Tensor work_items, Tensor split_media, Tensor? row_index, Tensor? media_seqlens, "
    "float softmax_scale, bool need_dq, bool need_dkv, bool interleaved, str impl) "
    "-> (Tensor, Tensor)",
    _backward,
    _fake_backward,
)


class _OneMediumAttentionFn(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        work_items: torch.Tensor,
        split_media: torch.Tensor,
        row_index: torch.Tensor | None,
        media_seqlens: torch.Tensor | None,
        softmax_scale: float,
        need_lse: bool,
        impl: str,
    ) -> torch.Tensor:
        out, lse = _forward_op(
            q, k, v, work_items, row_index, media_seqlens, softmax_scale, need_lse, impl
        )
        ctx.save_for_backward(q, k, v, lse, work_items, split_media, row_index, media_seqlens)
        ctx.softmax_scale = softmax_scale
        ctx.impl = impl
        return out

    @staticmethod
    @differentiable_once("masked_cross_attention")
    def backward(ctx: Any, dout: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        q, k, v, lse, work_items, split_media, row_index, media_seqlens = ctx.saved_tensors
        need_dq, need_dk, need_dv = ctx.needs_input_grad[:3]
        interleaved = of_one_projection(k, v)
        dq, dkv = _backward_op(
            dout,
            q,
            k,
            v,
            lse,
            work_items,
            split_media,
            row_index,
            media_seqlens,
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
            *[None] * 7,
        )


def one_medium_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    layout: MediaLayout,
    softmax_scale: float,
    needs_grad: bool,
    impl: str,
) -> torch.Tensor:
    """impl "triton" or "torch", the latter on a CPU; k and v are (media_total, R, Hkv, D)."""
    return apply(
        _OneMediumAttentionFn,
        q,
        k,
        v,
        layout.work_items,
        layout.split_media,
        layout.row_index,
        layout.media_seqlens,
        softmax_scale,
        needs_grad,
        impl,
    )
