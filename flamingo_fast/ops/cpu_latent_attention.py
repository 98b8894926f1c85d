"""The `torch` implementation of latent_attention: each medium by itself, from two sources of keys.

One call for a whole batch would choose its kernel by the size of the batch, and then a medium's
bits would depend on the others.
"""

from collections.abc import Iterator

import torch

from flamingo_fast.ops.cpu_buffers import Buffers

# Scores of the backward's buffers at most.
_SCORES = 2**20

_flash_attention = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu


def _by_head(rows: torch.Tensor, kv_heads: int) -> torch.Tensor:
    """(R, H, ...) as (Hkv, R, G, ...), a view."""
    return rows.unflatten(1, (kv_heads, -1)).transpose(0, 1)


def _packed(rows: torch.Tensor) -> torch.Tensor:
    """(Hkv, R, G, D) as (Hkv, R * G, D) with a last stride of 1: without groups mostly a view."""
    rows = rows.flatten(1, 2)
    return rows if rows.stride(-1) == 1 else rows.contiguous()


def _num_valid(media_seqlens: torch.Tensor | None, k_media: torch.Tensor) -> list[int]:
    if media_seqlens is None:
        return [k_media.shape[1]] * k_media.shape[0]
    return media_seqlens.clamp(0, k_media.shape[1]).tolist()


def latent_forward(
    q: torch.Tensor,
    k_media: torch.Tensor,
    v_media: torch.Tensor,
    k_latents: torch.Tensor,
    v_latents: torch.Tensor,
    media_seqlens: torch.Tensor | None,
    softmax_scale: float,
    need_lse: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`out`, contiguous, and the log-sum-exp of the scaled scores.

    Arguments:
        q: (B, R, H, D). k_media, v_media: (B, S, Hkv, D). k_latents, v_latents: (B, R, Hkv, D). Any
            strides.
        media_seqlens: (B,) int32 or None.

    Returns:
        lse: (B, H, R), contiguous, fp32 (fp64 of fp64); (0,) if it is not needed.
    """
    batch, latents, heads, _ = q.shape
    kv_heads = k_media.shape[2]
    wide = torch.promote_types(q.dtype, torch.float32)
    out = torch.empty(q.shape, dtype=q.dtype)
    lse = torch.empty((batch, heads, latents) if need_lse else (0,), dtype=wide)
    sources = [
        [x if x.stride(-1) == 1 else x.contiguous() for x in pair]
        for pair in ((k_media, v_media), (k_latents, v_latents))
    ]
    for medium, valid in enumerate(_num_valid(media_seqlens, k_media)):
        queries = _packed(_by_head(q[medium], kv_heads))[None]
        total: tuple[torch.Tensor, torch.Tensor] | None = None
        for (k, v), num_keys in zip(sources, (valid, latents), strict=True):
            if num_keys == 0:
                continue
            some_k, some_v = (x[medium, :num_keys].transpose(0, 1)[None] for x in (k, v))
            part, part_lse = _flash_attention(queries, some_k, some_v, scale=softmax_scale)
            if total is not None:
                before, before_lse = total
                both = torch.logaddexp(before_lse, part_lse)
                part = (
                    before * (before_lse - both).exp()[..., None]
                    + part * (part_lse - both).exp()[..., None]
                )
                part_lse = both
            total = part, part_lse
        assert total is not None  # There is at least one latent.
        rows = _by_head(out[medium], kv_heads)
        rows.copy_(total[0].view(rows.shape))
        if need_lse:
            sums = lse[medium].unflatten(0, (kv_heads, -1)).mT
            sums.copy_(total[1].view(sums.shape))
    return out, lse


def latent_backward(
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
    dq: torch.Tensor,
    dmedia: torch.Tensor,
    dlatents: torch.Tensor,
) -> None:
    """Fills dq, contiguous, and dk and dv of media and latents, (2, B, S or R, Hkv, D).

    Any of the three may have no elements: what is not needed is not computed. `out` and `lse` are
    what the forward returned; the other arguments are its own.
    """
    with torch.autocast("cpu", enabled=False):
        buffers = Buffers()
        for medium, valid in enumerate(_num_valid(media_seqlens, k_media)):
            _medium_backward(
                dout[medium],
                q[medium],
                out[medium],
                lse[medium],
                [
                    (
                        k_media[medium, :valid],
                        v_media[medium, :valid],
                        dmedia[:, medium, :valid] if dmedia.numel() > 0 else None,
                    ),
                    (
                        k_latents[medium],
                        v_latents[medium],
                        dlatents[:, medium] if dlatents.numel() > 0 else None,
                    ),
                ],
                softmax_scale,
                dq[medium] if dq.numel() > 0 else None,
                buffers,
            )
            if dmedia.numel() > 0:
                dmedia[:, medium, valid:].zero_()


def _medium_backward(
    dout: torch.Tensor,
    q: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    sources: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]],
    softmax_scale: float,
    dq: torch.Tensor | None,
    buffers: Buffers,
) -> None:
    """Sets dq and the gradients of the sources: keys, values, (keys, Hkv, D), and both gradients.

    Rows are (R, H, D), lse is (H, R).
    """
    wide = lse.dtype
    latents, heads, head_dim = q.shape
    kv_heads = sources[1][0].shape[1]
    shape = (kv_heads, latents, heads // kv_heads, head_dim)
    queries, douts = (
        buffers.take(name, shape, wide).copy_(_by_head(rows, kv_heads)).flatten(1, 2)
        for name, rows in (("q", q), ("dout", dout))
    )
    outs = _by_head(out, kv_heads).flatten(1, 2)
    delta = (douts * outs).sum(-1, keepdim=True)
    sums = lse.unflatten(0, (kv_heads, -1)).mT.flatten(1)[..., None]
    dq_sum = buffers.take("dq", queries.shape, wide).zero_()
    most_keys = max(_SCORES // (latents * heads), 16)
    for keys, values, gradients in sources:
        if gradients is None and dq is None:
            continue
        for begin, end in _ranges(keys.shape[0], most_keys):
            size = (kv_heads, end - begin, head_dim)
            some_k, some_v = (
                buffers.take(name, size, wide).copy_(x[begin:end].transpose(0, 1))
                for name, x in (("k", keys), ("v", values))
            )
            size = (kv_heads, queries.shape[1], end - begin)
            p, ds = (buffers.take(name, size, wide) for name in ("p", "ds"))
            torch.baddbmm(sums, queries, some_k.mT, beta=-1, alpha=softmax_scale, out=p)
            p.exp_()
            torch.baddbmm(delta, douts, some_v.mT, beta=-1, out=ds)
            ds.mul_(p)
            if dq is not None:
                torch.baddbmm(dq_sum, ds, some_k, alpha=softmax_scale, out=dq_sum)
            if gradients is not None:
                torch.bmm(p.mT, douts, out=some_v)
                torch.baddbmm(some_k, ds.mT, queries, beta=0, alpha=softmax_scale, out=some_k)
                for gradient, total in zip(gradients, (some_k, some_v), strict=True):
                    gradient[begin:end].copy_(total.transpose(0, 1))
    if dq is not None:
        rows = _by_head(dq, kv_heads)
        rows.copy_(dq_sum.view(rows.shape))


def _ranges(length: int, most: int) -> Iterator[tuple[int, int]]:
    for begin in range(0, length, most):
        yield begin, min(begin + most, length)
