"""The `torch` implementation of masked_cross_attention where a token attends to several media.

Rows go in blocks of consecutive ones that attend to the same keys, or nearly: a block has a mask
only where sets of media change every few rows. Keys that no row of a block attends to cost nothing,
and neighbouring media are one range of keys, read where they are.

The forward is PyTorch's flash kernel, by its own name: what else chooses between kernels looks at
the shape of the batch. So is the backward of long runs of rows without a mask, as in Mllama's
texts. Of others it takes longer than the matrix products that it consists of, so those are called
one by one: for each chunk of keys with each block of rows that attend to some of it.
"""

import dataclasses
import functools
import math
from collections.abc import Iterator

import torch

from flamingo_fast.ops.cpu_buffers import Buffers, has_fast_bf16
from flamingo_fast.ops.cpu_media_blocks import (
    Block,
    Part,
    Sample,
    cut_parts,
    gathered_keys,
    grouped_parts,
    joined_parts,
    samples_of,
)

# The forward's temporaries: rows of a block, keys that are gathered, elements of a mask.
_FORWARD_ROWS, _GATHERED_KEYS, _MASK_ELEMENTS = 512, 1024, 2**19
# The backward's: scores of a block of rows and a chunk of keys.
_SCORES, _CHUNK_KEYS = 2**20, 512
# Runs of blocks whose backward is the flash kernel's: rows, times the query heads of a key/value
# head, at least and at most, and keys of each of their ranges at least.
_LONG_ROWS, _LONGEST_ROWS, _LONG_KEYS = 1024, 8192, 1024
# Sums of more runs of 16-bit gradients are in fp32: each addition rounds.
_RUNS_SUMMED_IN_16_BITS = 2
# In place of -inf, so that rows without any key stay finite.
_MASKED = -1e30

_flash_attention = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
# First and end row, and ranges of keys.
_Run = tuple[int, int, list[tuple[int, int]]]


def _by_key(tensor: torch.Tensor) -> torch.Tensor:
    """(media_total * R, Hkv, D) with a last stride of 1: of all but odd strides a view."""
    return (tensor if tensor.stride(-1) == 1 else tensor.contiguous()).flatten(0, 1)


def several_media_forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    media_start: torch.Tensor,
    media_end: torch.Tensor,
    cu_media: torch.Tensor,
    media_seqlens: torch.Tensor | None,
    media_bits: torch.Tensor | None,
    dense: bool,
    softmax_scale: float,
    need_lse: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`out`, contiguous, of q's shape and dtype, and the log-sum-exp of the scaled scores.

    Arguments:
        q: (B, L, H, D). k, v: (media_total, R, Hkv, D). Any strides.
        media_start, media_end, cu_media, media_seqlens: those of `MediaLayout`.
        media_bits: (B, L, words) int64 or None; bit m % 64 of word m // 64 is set if the row
            attends to medium m of its sample, of those from media_start to media_end.
        dense: rows that attend to nothing attend to all tokens of their sample, valid or not, but
            for rows past the last medium.

    Returns:
        lse: (B, L, H) fp32 (fp64 of fp64), inf for rows that attend to nothing; (0,) if it is not
            needed.
    """
    wide = torch.promote_types(q.dtype, torch.float32)
    out = torch.zeros(q.shape, dtype=q.dtype)
    lse = torch.full(q.shape[:3] if need_lse else (0,), math.inf, dtype=wide)
    keys, values = _by_key(k), _by_key(v)
    layout = (media_start, media_end, cu_media, media_seqlens, media_bits, dense)
    for sample in samples_of(*layout, k.shape[1], _FORWARD_ROWS):
        queries = sample.of(q, k.shape[2])
        sums = sample.of(lse, k.shape[2]) if need_lse else None
        attended = sample.of(out, k.shape[2])
        for block in sample.blocks:
            rows = slice(block.begin, block.end)
            block_out, block_lse = _attend(
                queries[rows], keys, values, sample, block, softmax_scale
            )
            attended[rows] = block_out
            if sums is not None:
                sums[rows] = block_lse
        if sample.rows is not None:
            out[sample.index, sample.rows] = attended.flatten(1, 2)
            if sums is not None:
                lse[sample.index, sample.rows] = sums.flatten(1, 2)
    return out, lse


def _attend(
    queries: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    sample: Sample,
    block: Block,
    softmax_scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(rows, Hkv, G, D) and (rows, Hkv, G) of a block."""
    heads_first = queries.transpose(0, 1)
    packed = heads_first.flatten(1, 2)[None]
    wide = torch.promote_types(queries.dtype, torch.float32)
    if packed.stride(-1) != 1:
        packed = packed.contiguous()
    num_rows, group = packed.shape[2], queries.shape[2]
    parts = sample.parts_of(block)
    limit = _GATHERED_KEYS
    if block.mixed:
        limit = max(_MASK_ELEMENTS // num_rows, 1)
        if len(joined_parts(parts)) > 1:
            limit = min(limit, _GATHERED_KEYS)
        parts = cut_parts(parts, limit)
    else:
        parts = joined_parts(parts)
    total: tuple[torch.Tensor, torch.Tensor] | None = None
    for some in grouped_parts(parts, limit):
        attends = sample.columns(block, some, group)
        mask = None
        if attends is not None:
            mask = torch.zeros(attends.shape, dtype=wide).masked_fill_(~attends, _MASKED)[
                None, None
            ]
        out, lse = _flash_attention(
            packed,
            gathered_keys(keys, some).transpose(0, 1)[None],
            gathered_keys(values, some).transpose(0, 1)[None],
            attn_mask=mask,
            scale=softmax_scale,
        )
        if total is not None:
            before, before_lse = total
            both = torch.logaddexp(before_lse, lse)
            out = (
                before * (before_lse - both).exp()[..., None] + out * (lse - both).exp()[..., None]
            )
            lse = both
        total = out, lse
    assert total is not None  # A block attends to something.
    out, lse = total
    return (
        out.view(heads_first.shape).transpose(0, 1),
        lse.view(heads_first.shape[:3]).transpose(0, 1),
    )


def several_media_backward(
    dout: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    media_start: torch.Tensor,
    media_end: torch.Tensor,
    cu_media: torch.Tensor,
    media_seqlens: torch.Tensor | None,
    media_bits: torch.Tensor | None,
    dense: bool,
    softmax_scale: float,
    dq: torch.Tensor,
    dkv: torch.Tensor,
) -> None:
    """Fills dq, contiguous, and dkv, (2, media_total, R, Hkv, D); either may have no elements.

    `out` and `lse` are what the forward returned; the other arguments are its own.
    """
    need_dq, need_dkv = dq.numel() > 0, dkv.numel() > 0
    wide = torch.promote_types(q.dtype, torch.float32)
    kv_heads = k.shape[2]
    keys, values = _by_key(k), _by_key(v)
    dq.zero_()
    gradients = dkv.flatten(1, 2) if need_dkv else None
    wide_gradients: torch.Tensor | None = None
    written: list[tuple[int, int]] = []
    buffers = Buffers()
    layout = (media_start, media_end, cu_media, media_seqlens, media_bits, dense)
    most_rows = max(_SCORES // (_CHUNK_KEYS * q.shape[2]), 1)
    for sample in samples_of(*layout, k.shape[1], most_rows):
        dq_sum = sample.of(dq, kv_heads) if need_dq else None
        in_place = q.dtype == wide and sample.rows is None
        if dq_sum is not None and not in_place:
            dq_sum = torch.zeros(dq_sum.shape, dtype=wide)
        queries, douts, outs, lses = (sample.of(x, kv_heads) for x in (q, dout, out, lse))
        long_runs = _long_runs(sample, queries.shape[2]) if q.dtype != torch.float16 else []
        attended = sample.attended()
        written += attended
        sums = gradients
        if sums is not None and long_runs:
            if len(long_runs) > _RUNS_SUMMED_IN_16_BITS and sums.dtype != wide:
                if wide_gradients is None:
                    wide_gradients = torch.empty(sums.shape, dtype=wide)
                sums = wide_gradients
            for begin, end in attended:
                sums[:, begin:end].zero_()
        for begin, end, ranges in long_runs:
            _long_run_backward(
                douts[begin:end],
                queries[begin:end],
                outs[begin:end],
                lses[begin:end],
                ranges,
                keys,
                values,
                softmax_scale,
                None if dq_sum is None else dq_sum[begin:end],
                sums,
            )
        others = [
            block
            for block in sample.blocks
            if not any(begin <= block.begin < end for begin, end, _ in long_runs)
        ]
        if others:
            _sample_backward(
                dataclasses.replace(sample, blocks=others),
                queries,
                douts,
                lses,
                _row_sums(douts, outs, most_rows),
                keys,
                values,
                softmax_scale,
                dq_sum,
                sums,
                buffers,
                adds=bool(long_runs),
            )
        if gradients is not None and sums is not None and sums is not gradients:
            for begin, end in attended:
                gradients[:, begin:end].copy_(sums[:, begin:end])
        if dq_sum is not None and not in_place:
            rows = slice(None) if sample.rows is None else sample.rows
            dq[sample.index, rows] = dq_sum.flatten(1, 2).to(q.dtype)
    if gradients is not None:
        ends = [0, *(end for _, end in written)]
        begins = [*(begin for begin, _ in written), gradients.shape[1]]
        for begin, end in zip(ends, begins, strict=True):
            gradients[:, begin:end].zero_()


def _long_runs(sample: Sample, group: int) -> list[_Run]:
    """Of blocks that attend to the same keys, cut where they would take much memory."""
    most_rows = max(_LONGEST_ROWS // group, 1)
    runs: list[_Run] = []
    for block in sample.blocks:
        if block.mixed:
            continue
        begin = block.begin
        ranges = [(first, end) for _, first, end in joined_parts(sample.parts_of(block))]
        if runs:
            before, end, same = runs[-1]
            if (end, same) == (begin, ranges) and block.end - before <= most_rows:
                begin = before
                runs.pop()
        runs.append((begin, block.end, ranges))
    return [
        (begin, end, ranges)
        for begin, end, ranges in runs
        if (end - begin) * group >= _LONG_ROWS
        and all(end - first >= _LONG_KEYS for first, end in ranges)
    ]


def _long_run_backward(
    dout: torch.Tensor,
    q: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    ranges: list[tuple[int, int]],
    keys: torch.Tensor,
    values: torch.Tensor,
    softmax_scale: float,
    dq: torch.Tensor | None,
    dkv: torch.Tensor | None,
) -> None:
    """Adds to dq and dkv. Rows are (rows, Hkv, G, D), lse is (rows, Hkv, G)."""
    by_head = [x.transpose(0, 1).flatten(1, 2)[None] for x in (dout, q, out, lse)]
    douts, queries, outs, log_sums = by_head
    for begin, end in ranges:
        some_keys, some_values = (x[begin:end].transpose(0, 1)[None] for x in (keys, values))
        gradients = _flash_backward(
            douts, queries, some_keys, some_values, outs, log_sums, 0.0, False, scale=softmax_scale
        )
        if dq is not None:
            rows = dq.transpose(0, 1)
            rows += gradients[0].view(rows.shape)
        if dkv is not None:
            for total, gradient in zip(dkv, gradients[1:], strict=True):
                total[begin:end] += gradient[0].transpose(0, 1)


def _row_sums(left: torch.Tensor, right: torch.Tensor, num_rows: int) -> torch.Tensor:
    """The sums of left * right over the last dimension, in fp32 or fp64."""
    wide = torch.promote_types(left.dtype, torch.float32)
    blocks = zip(left.split(num_rows), right.split(num_rows), strict=True)
    return torch.cat([(some.to(wide) * other).sum(-1) for some, other in blocks])


def _sample_backward(
    sample: Sample,
    q: torch.Tensor,
    dout: torch.Tensor,
    lse: torch.Tensor,
    delta: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    softmax_scale: float,
    dq: torch.Tensor | None,
    dkv: torch.Tensor | None,
    buffers: Buffers,
    adds: bool,
) -> None:
    """Adds to dq, (rows, Hkv, G, D) in fp32 or fp64; sets dkv, (2, keys, Hkv, D), or adds to it.

    Passes over the scores cost as much as the products. So what is subtracted from scores, and from
    their gradients, is columns of the products' factors, beside columns of ones.
    """
    wide = lse.dtype
    narrow = torch.bfloat16 if q.dtype == torch.bfloat16 and has_fast_bf16() else wide
    _, kv_heads, group, head_dim = q.shape
    # Rounded to bf16, a sum takes two columns: what is left of it is in the second.
    sums = 1 if narrow == wide else 2

    def with_columns(name: str, rows: int, more: int, dtype: torch.dtype) -> torch.Tensor:
        # Rows that begin at multiples of 64 bytes.
        memory = buffers.take(name, (kv_heads, rows, (head_dim + more + 31) // 32 * 32), dtype)
        return memory[..., : head_dim + more]

    for chunk, blocks in _chunks(sample):
        num_keys = sum(end - begin for _, begin, end in chunk)
        chunk_k = with_columns("k", num_keys, 1, wide)
        chunk_v = with_columns("v", num_keys, sums, narrow)
        dk, dv = (buffers.take(name, (kv_heads, num_keys, head_dim), wide) for name in ("dk", "dv"))
        ranges = []
        column = 0
        for _, begin, end in joined_parts(chunk):
            columns = slice(column, column + end - begin)
            ranges.append((slice(begin, end), columns))
            column = columns.stop
        for of_chunk, columns in ranges:
            chunk_k[:, columns, :head_dim].copy_(keys[of_chunk].transpose(0, 1))
            chunk_v[:, columns, :head_dim].copy_(values[of_chunk].transpose(0, 1))
        chunk_k[..., head_dim:] = 1
        chunk_v[..., head_dim:] = 1
        dk.zero_()
        dv.zero_()
        k_narrow = chunk_k[..., :head_dim]
        if narrow != wide:
            k_narrow = buffers.take("k_narrow", k_narrow.shape, narrow).copy_(k_narrow)
        for block in blocks:
            rows = slice(block.begin, block.end)
            num_rows = (block.end - block.begin) * group
            queries = with_columns("q", num_rows, 1, wide)
            douts = with_columns("dout", num_rows, sums, narrow)
            for buffer, source in ((queries, q[rows]), (douts, dout[rows])):
                by_token = buffer.unflatten(1, (-1, group))[..., :head_dim]
                by_token.copy_(source.transpose(0, 1))
            block_lse, block_delta = (x[rows].transpose(0, 1).flatten(1, 2) for x in (lse, delta))
            torch.div(block_lse, -softmax_scale, out=queries[..., head_dim])
            douts[..., head_dim] = -block_delta
            if sums == 2:
                douts[..., head_dim + 1] = -block_delta - douts[..., head_dim]
            of_heads, q_narrow = douts[..., :head_dim], queries[..., :head_dim]
            if narrow != wide:
                q_narrow = buffers.take("q_narrow", q_narrow.shape, narrow).copy_(q_narrow)
            for columns, parts in _ranges(chunk, block):
                shape = (kv_heads, num_rows, columns.stop - columns.start)
                p = buffers.take("p", shape, wide)
                torch.baddbmm(
                    p, queries, chunk_k[:, columns].mT, beta=0, alpha=softmax_scale, out=p
                )
                p.exp_()
                attends = sample.columns(block, parts, group)
                if attends is not None:
                    p.masked_fill_(~attends, 0)
                if narrow != wide:
                    p = buffers.take("p_narrow", shape, narrow).copy_(p)
                ds = torch.bmm(douts, chunk_v[:, columns].mT, out=buffers.take("ds", shape, narrow))
                ds.mul_(p)
                if dkv is not None:
                    _add_product(dv[:, columns], p.mT, of_heads, buffers)
                    _add_product(dk[:, columns], ds.mT, q_narrow, buffers)
                if dq is not None:
                    product = torch.bmm(
                        ds,
                        k_narrow[:, columns],
                        out=buffers.take("dq", q_narrow.shape, narrow),
                    )
                    block_dq = dq[rows].transpose(0, 1)
                    block_dq.add_(product.view(block_dq.shape), alpha=softmax_scale)
        if dkv is not None:
            dk.mul_(softmax_scale)
            for of_chunk, columns in ranges:
                for gradient, total in zip(dkv, (dk, dv), strict=True):
                    total = total[:, columns].transpose(0, 1)
                    if adds:
                        gradient[of_chunk] += total
                    else:
                        gradient[of_chunk].copy_(total)


def _add_product(
    total: torch.Tensor, left: torch.Tensor, right: torch.Tensor, buffers: Buffers
) -> None:
    """total += left @ right; a product of narrow tensors is rounded to their type first."""
    if left.dtype == total.dtype:
        torch.baddbmm(total, left, right, out=total)
    else:
        total.add_(torch.bmm(left, right, out=buffers.take("product", total.shape, left.dtype)))


def _chunks(sample: Sample) -> Iterator[tuple[list[Part], list[Block]]]:
    """Chunks of the keys that any row attends to, with the blocks that may attend to them.

    Padding has chunks of its own: what is not finite in it stays with the dense rows.
    """
    attended = functools.reduce(lambda media, block: media | block.media, sample.blocks, 0)
    parts = [part for part in sample.parts if attended >> part[0] & 1]
    of_dense = [block for block in sample.blocks if block.dense]
    for some, blocks in ((parts, sample.blocks), (sample.padding if of_dense else [], of_dense)):
        for chunk in grouped_parts(cut_parts(some, _CHUNK_KEYS), _CHUNK_KEYS):
            yield chunk, blocks


def _ranges(chunk: list[Part], block: Block) -> Iterator[tuple[slice, list[Part]]]:
    """Ranges of a chunk's columns that a block attends to, and their parts."""
    begin = column = 0
    parts: list[Part] = []
    for part in chunk:
        if not block.attends(part[0]):
            if parts:
                yield slice(begin, column), parts
            parts = []
        elif not parts:
            begin = column
        column += part[2] - part[1]
        if block.attends(part[0]):
            parts.append(part)
    if parts:
        yield slice(begin, column), parts
