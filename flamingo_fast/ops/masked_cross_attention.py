"""masked_cross_attention: text attends to the tokens of the media that a MediaLayout gives it.

Where a token attends to one medium, a backward needs q, k, v and, for the kernels, the softmax's
log-sum; not the output, and nothing that grows with L * N.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from flamingo_fast import reference
from flamingo_fast.layout import MediaLayout
from flamingo_fast.ops import cpu_attention
from flamingo_fast.ops.checks import check_attention_inputs
from flamingo_fast.ops.dispatch import (
    ATTENTION_IMPLS,
    choose_impl,
    register_op,
)
from flamingo_fast.schedule import num_slots

UNATTENDED = ("zero", "dense", "uniform")
PAST_LAST = ("zero", "uniform")

_NAMES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}


def _input_precision() -> str:
    """Of fp32 matrix products in the kernels: what the user allows cuBLAS."""
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"


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
            _input_precision(),
        )
    # Its calls are not those of a model: autocast would round fp32 to 16 bits.
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


def _gradients(
    q: torch.Tensor, k: torch.Tensor, need_dq: bool, need_dkv: bool, interleaved: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Memory for dq and for dk and dv together; fp32 of no elements for what is not needed."""
    media_total, num_keys, kv_heads, head_dim = k.shape
    if interleaved:
        dkv_shape = (media_total, num_keys, 2, kv_heads, head_dim)
    else:
        dkv_shape = (2, media_total, num_keys, kv_heads, head_dim)
    dq = q.new_empty(q.shape) if need_dq else q.new_empty(0, dtype=torch.float32)
    return dq, k.new_empty(dkv_shape) if need_dkv else k.new_empty(0, dtype=torch.float32)


def _separate(dkv: torch.Tensor, interleaved: bool) -> torch.Tensor:
    """dk and dv, (2, media_total, R, Hkv, D)."""
    return dkv.movedim(2, 0) if interleaved else dkv


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
    dq, dkv = _gradients(q, k, need_dq, need_dkv, interleaved)
    separate = _separate(dkv, interleaved) if need_dkv else dkv
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
            separate,
            _input_precision(),
        )
    else:
        cpu_attention.one_medium_backward(
            dout, q, k, v, work_items, row_index, media_seqlens, softmax_scale, dq, separate
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
    return _gradients(q, k, need_dq, need_dkv, interleaved)


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
    @once_differentiable
    def backward(ctx: Any, dout: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        q, k, v, lse, work_items, split_media, row_index, media_seqlens = ctx.saved_tensors
        need_dq, need_dk, need_dv = ctx.needs_input_grad[:3]
        interleaved = _of_one_projection(k, v)
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
        dk, dv = _separate(dkv, interleaved).unbind(0) if need_dk or need_dv else (None, None)
        return (
            dq if need_dq else None,
            dk if need_dk else None,
            dv if need_dv else None,
            *[None] * 7,
        )


def _of_one_projection(k: torch.Tensor, v: torch.Tensor) -> bool:
    """Whether k and v are halves of (media_total, R, 2, Hkv, D); dk and dv then become such too."""
    width = k.shape[2] * k.shape[3]
    return (
        k.stride() == v.stride()
        and k.stride()[1:] == (2 * width, k.shape[3], 1)
        and v.storage_offset() - k.storage_offset() == width
    )


def _sdpa(
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


def _mean_of_values(v: torch.Tensor, layout: MediaLayout, num_heads: int) -> torch.Tensor:
    """(B, H, D): of all valid tokens of the sample's media; 0 where there are none."""
    num_keys = v.shape[1]
    if layout.media_seqlens is not None:
        lengths = layout.media_seqlens.clamp(0, num_keys)
        tokens = torch.arange(num_keys, device=v.device) < lengths[:, None]
        v = torch.where(tokens[..., None, None], v, 0)
    else:
        lengths = torch.full_like(v[:, 0, 0, 0], num_keys, dtype=torch.int32)
    sums = v.sum(1, dtype=torch.promote_types(v.dtype, torch.float32))
    media = layout.cu_media[:-1, None] + torch.arange(layout.max_media, device=v.device)
    of_sample = media < layout.cu_media[1:, None]
    # Gathered, not multiplied with zeros and ones: what is not finite stays in its sample.
    media = media.clamp(0, layout.media_total - 1)
    total = torch.where(of_sample[..., None, None], sums[media], 0).sum(1)
    count = torch.where(of_sample, lengths[media], 0).sum(1).clamp(min=1)
    mean = (total / count[:, None, None]).to(v.dtype)
    return mean.repeat_interleave(num_heads // v.shape[2], 1)


def _not_in_triton(
    q: torch.Tensor, k: torch.Tensor, layout: MediaLayout, dense: bool
) -> str | None:
    if layout.max_media_per_token > 1:
        return (
            f"the layout has up to {layout.max_media_per_token} media a token, the kernels take 1"
        )
    if dense:
        return 'unattended="dense" has tokens that attend to several media'
    num_keys, head_dim = k.shape[1], q.shape[3]
    if num_keys > 128:
        return f"the kernels take up to 128 tokens a medium, got {num_keys}"
    if q.dtype not in _NAMES:
        return None  # fp64 has a reason of its own.
    most = (128, 64 * 128) if q.dtype == torch.float32 else (256, 64 * 256)
    if head_dim > most[0] or _padded(num_keys) * _padded(head_dim) > most[1]:
        return (
            f"in {_NAMES[q.dtype]} the kernels take a head_dim up to {most[0]} and {most[1]} "
            f"numbers of a medium's keys (sizes as powers of 2); got {num_keys} keys of {head_dim}"
        )
    return None


def _padded(size: int) -> int:
    return max(1 << (size - 1).bit_length(), 16)


def masked_cross_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    layout: MediaLayout,
    *,
    unattended: str = "zero",
    past_last: str = "zero",
    softmax_scale: float | None = None,
    impl: str = "auto",
) -> torch.Tensor:
    """Each text token attends to all tokens of its media (Flamingo, section 2.3 and figure 4).

    B batch, L text tokens, N media of a sample, R tokens of a medium, H query heads, Hkv key/value
    heads, D head dim.

    Arguments:
        q: (B, L, H, D), fp32, fp16 or bf16 (fp64 outside Triton), any strides.
        k, v: (media_total, R, Hkv, D), or (B, N, R, Hkv, D) where every sample has N media; q's
            dtype, any strides; H is a multiple of Hkv.
        layout: which media each token attends to; see `MediaLayout`.
        unattended: what a token gets that attends to nothing: "zero" (OpenFlamingo, IDEFICS);
            "dense", attention to everything (transformers' Mllama); "uniform", the mean of the
            sample's values (OpenFlamingo with all previous media).
        past_last: the same for tokens after more image tokens than there are media: "zero" or
            "uniform" (OpenFlamingo).
        softmax_scale: D ** -0.5 by default.
        impl: "auto", "triton", "torch", "sdpa" (PyTorch's attention under a dense mask, a baseline)
            or "reference". "torch" is for one medium a token on a CPU, and "sdpa" elsewhere.

    Returns:
        q's shape and dtype. A sample's result is the same, bit for bit, in any batch.

    Raises:
        TypeError, ValueError: a wrong argument, by name.
        BackendUnavailableError: `impl` can't run here.
    """
    softmax_scale = check_attention_inputs(q, k, v, layout, softmax_scale)
    for name, value, known in (
        ("unattended", unattended, UNATTENDED),
        ("past_last", past_last, PAST_LAST),
    ):
        if value not in known:
            raise ValueError(f"{name}: expected one of {', '.join(known)}; got {value!r}")
    if k.dim() == 5:
        k, v = k.flatten(0, 1), v.flatten(0, 1)
    dense = unattended == "dense"
    reason = _not_in_triton(q, k, layout, dense)
    impl = choose_impl(impl, q, reason, ATTENTION_IMPLS)
    if impl == "torch" and (q.device.type != "cpu" or layout.max_media_per_token > 1 or dense):
        impl = "sdpa"
    if impl == "reference" or q.numel() == 0 or k.numel() == 0:
        return reference.masked_cross_attention(
            q, k, v, layout, unattended, past_last, softmax_scale
        )
    if impl == "sdpa":
        out = _sdpa(q, k, v, layout, dense, softmax_scale)
    else:
        # Inside the Function gradients are off, and inputs want them even under no_grad.
        needs_grad = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v))
        out = _OneMediumAttentionFn.apply(
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
    if "uniform" in (unattended, past_last):
        after = layout.past_last()
        rows = torch.zeros_like(after)
        if unattended == "uniform":
            rows = ~layout.attends() & ~after
        if past_last == "uniform":
            rows = rows | after
        mean = _mean_of_values(v, layout, q.shape[2])
        out = torch.where(rows[..., None, None], mean[:, None], out)
    return out
