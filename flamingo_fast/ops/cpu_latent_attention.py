"""The `torch` implementation of latent_attention: groups of media that have as many features.

The forward reads both sources of keys where they are and merges two results, which took less time
than a copy of the keys. So does the backward in fp32: by PyTorch's flash kernel, or where that is
slower, for long media, by matrix products. Otherwise it copies keys and values to one place: with
two sources the softmax's own kernels, which make fewer passes over scores, are of no use, and
oneDNN's products of a few heads that are read where they are take twice as long.

A medium's bits do not depend on its group. MKL's products split sums by the number of matrices in a
call, so they are of one medium; so are all of long sums. Of functions only those are called that
give the same result wherever in a tensor a number is (not sigmoid, for one).
"""

import dataclasses
from collections.abc import Callable, Iterator

import torch

from flamingo_fast.ops.cpu_buffers import Buffers, has_fast_bf16, valid_lengths

# Memory at most, where there is more than one medium and head: of what a group's flash kernels
# return, and of what its matrix products read and write.
_FLASH_BYTES, _PRODUCT_BYTES = 8 << 20, 40 << 20
# Keys of the media of a group at most, where its backward is matrix products. Features at least of
# media that are not copied, and the scores that their backward has in memory.
_FEW_KEYS, _MANY_FEATURES, _SCORES = 512, 2048, 2**20
# Head dims up to which the flash kernel's fp32 backward is the faster one.
_FLASH_HEAD_DIM = 96
# PyTorch's flash kernel packs 16-bit keys if there are so many rows for each thread, whatever the
# number of media. With fewer that may decide.
_ROWS_OF_A_THREAD = 4

_flash_attention = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default
_softmax_backward = torch.ops.aten._softmax_backward_data.out


@dataclasses.dataclass
class _Source:
    """Keys and values, (n, Hkv, S or R, D), and memory for their gradients, None if not needed."""

    k: torch.Tensor
    v: torch.Tensor
    dk: torch.Tensor | None = None
    dv: torch.Tensor | None = None

    @classmethod
    def of(cls, *by_key: torch.Tensor) -> "_Source":
        """Of (n, S or R, Hkv, D)."""
        return cls(*(tensor.transpose(1, 2) for tensor in by_key))

    def of_heads(self, heads: slice) -> "_Source":
        return _Source(
            self.k[:, heads],
            self.v[:, heads],
            None if self.dk is None else self.dk[:, heads],
            None if self.dv is None else self.dv[:, heads],
        )


def _groups(
    k_media: torch.Tensor,
    media_seqlens: torch.Tensor | None,
    latents: int,
    most_of: Callable[[int], int],
) -> Iterator[tuple[int, int, int]]:
    """First and end medium of each group, and their valid features.

    Media of one key/value head are alone: the flash kernels leave the threads of a single head to
    MKL, which then may split sums.

    Arguments:
        most_of: how many media of a number of keys a group may have; less than 1 is 1.
    """
    batch, num_keys = k_media.shape[:2]
    lengths = valid_lengths(media_seqlens, batch, num_keys)
    begin = 0
    while begin < batch:
        end = begin + 1
        most = most_of(lengths[begin] + latents) if k_media.shape[2] > 1 else 1
        while end < min(begin + most, batch) and lengths[end] == lengths[begin]:
            end += 1
        yield begin, end, lengths[begin]
        begin = end


def _by_head(rows: torch.Tensor, kv_heads: int) -> torch.Tensor:
    """(n, R, H, D) as (n, Hkv, R, G, D), a view."""
    return rows.unflatten(2, (kv_heads, -1)).transpose(1, 2)


def _last_contiguous(tensor: torch.Tensor) -> torch.Tensor:
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def _join(both: torch.Tensor, media: _Source, latents: _Source) -> None:
    """Copies keys and values to (2, n, Hkv, R + S, D)."""
    num_latents = latents.k.shape[2]
    for part, source in (
        (both[:, :, :, :num_latents], latents),
        (both[:, :, :, num_latents:], media),
    ):
        part[0].copy_(source.k)
        part[1].copy_(source.v)


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
    batch, latents, heads, head_dim = q.shape
    kv_heads = k_media.shape[2]
    wide = torch.promote_types(q.dtype, torch.float32)
    out = torch.empty(q.shape, dtype=q.dtype)
    lse = torch.empty((batch, heads, latents) if need_lse else (0,), dtype=wide)
    rows = latents * heads // kv_heads
    most = 1
    if q.dtype == wide or rows >= _ROWS_OF_A_THREAD * torch.get_num_threads():
        most = _FLASH_BYTES // (2 * latents * heads * head_dim * q.itemsize)
    for begin, end, valid in _groups(k_media, media_seqlens, latents, lambda keys: most):
        queries = _last_contiguous(_by_head(q[begin:end], kv_heads).flatten(2, 3))
        parts = [
            _flash_attention(
                queries,
                *(_last_contiguous(x.transpose(1, 2)) for x in source),
                scale=softmax_scale,
            )
            for source in (
                (k_latents[begin:end], v_latents[begin:end]),
                (k_media[begin:end, :valid], v_media[begin:end, :valid]),
            )
            if source[0].shape[1] > 0
        ]
        target = _by_head(out[begin:end], kv_heads)
        outs = [part.view(target.shape) for part, _ in parts]
        sums = parts[0][1]
        if len(parts) == 1:
            target.copy_(outs[0])
        else:
            of_latents, of_media = outs
            largest = torch.maximum(sums, parts[1][1])
            total, share = ((x - largest).exp_() for _, x in parts)
            total += share
            share = share.div_(total).to(q.dtype).view(*target.shape[:-1], 1)
            torch.lerp(of_latents, of_media, share, out=target)
            sums = total.log_().add_(largest)
        if need_lse:
            group_lse = lse[begin:end].unflatten(1, (kv_heads, -1)).mT
            group_lse.copy_(sums.view(group_lse.shape))
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
    _, latents, heads, head_dim = q.shape
    kv_heads = k_media.shape[2]
    rows = latents * heads // kv_heads
    wide = torch.promote_types(q.dtype, torch.float32)
    dtype = torch.bfloat16 if q.dtype == torch.bfloat16 and has_fast_bf16() else wide
    by_flash = q.dtype == wide and head_dim <= _FLASH_HEAD_DIM
    need_dq, need_dmedia, need_dlatents = (x.numel() > 0 for x in (dq, dmedia, dlatents))

    def most_media(keys: int) -> int:
        if keys - latents >= _MANY_FEATURES:
            return 1
        if by_flash:
            return _FLASH_BYTES // (2 * keys * kv_heads * head_dim * q.itemsize)
        few_keys = dtype != wide and keys <= _FEW_KEYS
        return most_heads(keys) // kv_heads if few_keys else 1

    def most_heads(keys: int) -> int:
        head_numel = 2 * keys * head_dim + rows * (2 * keys + 3 * head_dim)
        return max(_PRODUCT_BYTES // (head_numel * dtype.itemsize), 1)

    buffers = Buffers()
    for begin, end, valid in _groups(k_media, media_seqlens, latents, most_media):
        queries, douts, outs = (_by_head(x[begin:end], kv_heads) for x in (q, dout, out))
        media = _Source.of(
            k_media[begin:end, :valid],
            v_media[begin:end, :valid],
            *(dmedia[:, begin:end, :valid] if need_dmedia else ()),
        )
        of_latents = _Source.of(
            k_latents[begin:end],
            v_latents[begin:end],
            *(dlatents[:, begin:end] if need_dlatents else ()),
        )
        group_dq = _by_head(dq[begin:end], kv_heads) if need_dq else None
        if need_dmedia:
            dmedia[:, begin:end, valid:].zero_()
        of_sources = None
        if valid >= _MANY_FEATURES and q.dtype == wide:
            of_sources = _long_backward
        elif by_flash:
            of_sources = _sources_backward
        if of_sources is not None:
            group_lse = lse[begin:end].unflatten(1, (kv_heads, -1)).mT
            sources = [x for x in (of_latents, media) if need_dq or x.dk is not None]
            rows_of_group = (douts, queries, outs, group_lse)
            of_sources(*rows_of_group, sources, softmax_scale, group_dq, buffers)
            continue
        # Of about the same size: threads share the heads of a call.
        size = -(-kv_heads // -(-kv_heads // most_heads(valid + latents)))
        for first in range(0, kv_heads, size):
            some = slice(first, first + size)
            _joined_backward(
                douts[:, some],
                queries[:, some],
                media.of_heads(some),
                of_latents.of_heads(some),
                softmax_scale,
                None if group_dq is None else group_dq[:, some],
                dtype,
                buffers,
            )


def _joined_backward(
    dout: torch.Tensor,
    q: torch.Tensor,
    media: _Source,
    latents: _Source,
    softmax_scale: float,
    dq: torch.Tensor | None,
    dtype: torch.dtype,
    buffers: Buffers,
) -> None:
    """Sets dq and the sources' gradients. Rows are (n, Hkv, R, G, D).

    The softmax's own kernels make fewer passes over the scores than it takes with `lse`.
    """
    num_latents, head_dim = q.shape[2], q.shape[4]
    num_keys = num_latents + media.k.shape[2]
    shape = (2, *q.shape[:2], num_keys, head_dim)
    both = buffers.take("both", shape, dtype)
    _join(both, media, latents)
    keys, values = both.flatten(1, 2)
    queries, douts = (
        buffers.take(name, x.shape, dtype).copy_(x).flatten(2, 3).flatten(0, 1)
        for name, x in (("q", q), ("dout", dout))
    )
    p, ds = (buffers.take(name, (*queries.shape[:2], num_keys), dtype) for name in ("p", "ds"))
    torch.baddbmm(p, queries, keys.mT, beta=0, alpha=softmax_scale, out=p)
    torch.softmax(p, -1, out=p)
    torch.bmm(douts, values.mT, out=ds)
    _softmax_backward(ds, p, -1, dtype, grad_input=ds)
    if dq is not None:
        rows = buffers.take("dq", queries.shape, dtype)
        torch.baddbmm(rows, ds, keys, beta=0, alpha=softmax_scale, out=rows)
        dq.copy_(rows.view(dq.shape))
    begin = num_latents if latents.dk is None else 0
    end = num_latents if media.dk is None else num_keys
    if begin == end:
        return
    # Keys and values have been read.
    dk, dv = buffers.take("both", (*shape[:3], end - begin, head_dim), dtype)
    torch.bmm(p[..., begin:end].mT, douts, out=dv.flatten(0, 1))
    of_p = ds[..., begin:end].mT
    torch.baddbmm(
        dk.flatten(0, 1), of_p, queries, beta=0, alpha=softmax_scale, out=dk.flatten(0, 1)
    )
    for source, columns in (
        (latents, slice(0, num_latents - begin)),
        (media, slice(num_latents - begin, end - begin)),
    ):
        if source.dk is not None and source.dv is not None:
            source.dk.copy_(dk[:, :, columns])
            source.dv.copy_(dv[:, :, columns])


def _sources_backward(
    dout: torch.Tensor,
    q: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    sources: list[_Source],
    softmax_scale: float,
    dq: torch.Tensor | None,
    buffers: Buffers,
) -> None:
    """The same without a copy of keys. lse is (n, Hkv, R, G)."""
    rows = [_last_contiguous(x.flatten(2, 3)) for x in (dout, q, out)]
    total = None
    for source in sources:
        keys = [_last_contiguous(x) for x in (source.k, source.v)]
        if keys[0].shape[2] == 0:
            continue
        some_dq, dk, dv = _flash_backward(
            *rows[:2], *keys, rows[2], lse.flatten(2, 3), 0.0, False, scale=softmax_scale
        )
        total = some_dq if total is None else total.add_(some_dq)
        if source.dk is not None and source.dv is not None:
            source.dk.copy_(dk)
            source.dv.copy_(dv)
    if dq is not None and total is not None:
        dq.copy_(total.view(dq.shape))


def _long_backward(
    dout: torch.Tensor,
    q: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    sources: list[_Source],
    softmax_scale: float,
    dq: torch.Tensor | None,
    buffers: Buffers,
) -> None:
    """The same for one medium; gradients are written where they belong."""
    queries, douts, outs = (x[0].flatten(1, 2) for x in (q, dout, out))
    sums = lse[0].flatten(1)[..., None]
    delta = (douts * outs).sum(-1, keepdim=True)
    total = buffers.take("dq", queries.shape, q.dtype)
    some_keys = max(_SCORES // (queries.shape[0] * queries.shape[1]), 16)
    beta = 0
    for source in sources:
        for begin in range(0, source.k.shape[2], some_keys):
            some = slice(begin, begin + some_keys)
            keys, values = source.k[0, :, some], source.v[0, :, some]
            shape = (*queries.shape[:2], keys.shape[1])
            p, ds = (buffers.take(name, shape, q.dtype) for name in ("p", "ds"))
            torch.baddbmm(p, queries, keys.mT, beta=0, alpha=softmax_scale, out=p)
            p.sub_(sums).exp_()
            torch.bmm(douts, values.mT, out=ds)
            ds.sub_(delta).mul_(p)
            if dq is not None:
                torch.baddbmm(total, ds, keys, beta=beta, alpha=softmax_scale, out=total)
                beta = 1
            if source.dk is not None and source.dv is not None:
                dk, dv = source.dk[0, :, some], source.dv[0, :, some]
                torch.bmm(p.mT, douts, out=dv)
                torch.baddbmm(dk, ds.mT, queries, beta=0, alpha=softmax_scale, out=dk)
    if dq is not None:
        dq.copy_(total.view(dq.shape))
