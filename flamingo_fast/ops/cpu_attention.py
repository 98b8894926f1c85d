"""The `torch` implementation of masked_cross_attention where a token attends to one medium.

Each medium's own rows meet its own keys, a few library calls for each: nothing is padded, masked or
gathered. Rows go in blocks, so that temporaries stay small beside q.

The forward is PyTorch's flash kernel. Its backward takes several times as long as the matrix
products that it consists of, in bf16 most of all, so those are called one by one, in fp32: for so
few rows oneDNN's bf16 products gain nothing over fp32 ones but the rounding.
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F

from flamingo_fast.ops.cpu_buffers import valid_lengths

# The flash kernel's temporaries are one block of out; the backward's are four times that, in fp32.
_FORWARD_BLOCK, _BACKWARD_BLOCK = 512, 128
# Of a core of any CPU: temporaries that small cost nothing.
_CACHE_BYTES = 2**20

_softmax_backward = torch.ops.aten._softmax_backward_data.out


def _blocks(
    work_items: torch.Tensor, row_index: torch.Tensor | None, length: int
) -> list[tuple[int, int, int]]:
    """(medium, first row, number of rows): each row of the batch once, in the order of the rows.

    In that order, not in the schedule's, the processor prefetches them. Medium -1 is for rows that
    attend to nothing; `length` is the most rows of a block.
    """
    blocks = []
    for medium, begin, end, _ in work_items.tolist():
        if begin < end:
            runs = [(begin, end)] if row_index is None else _runs(row_index[begin:end].tolist())
            blocks += [
                (medium, start, min(length, stop - start))
                for first, stop in runs
                for start in range(first, stop, length)
            ]
    blocks.sort(key=lambda block: block[1])
    return blocks


def _runs(rows: list[int]) -> Iterator[tuple[int, int]]:
    """Ranges of consecutive numbers in a sorted list of at least one."""
    begin = previous = rows[0]
    for row in rows[1:]:
        if row != previous + 1:
            yield begin, previous + 1
            begin = row
        previous = row
    yield begin, previous + 1


def _rows_of_pairs(
    blocks: list[tuple[int, int, int]], q: torch.Tensor, k: torch.Tensor, num_valid: list[int]
) -> tuple[int, int] | None:
    """(First row, number of rows) in each sample, if those attend to a medium of their own and all
    others to nothing, as in image-text pairs, of which several go in one call. Else None.
    """
    batch, seqlen, heads, _ = q.shape
    num_media, num_keys, kv_heads, _ = k.shape
    found = [block for block in blocks if block[0] >= 0]
    if batch < 2 or not len(found) == batch == num_media or heads != kv_heads:
        return None
    _, first, rows = found[0]
    if found != [(sample, first + sample * seqlen, rows) for sample in range(batch)]:
        return None
    return (first, rows) if num_valid == [num_keys] * batch else None


def _heads_first(tensor: torch.Tensor, kv_heads: int) -> torch.Tensor:
    """A view (1, H, B * L, D) of (B, L, H, D); with fewer key/value heads (1, Hkv, B * L, G, D)."""
    rows = tensor.flatten(0, 1)
    if rows.shape[1] != kv_heads:
        rows = rows.unflatten(1, (kv_heads, -1))
    return rows.transpose(0, 1)[None]


def one_medium_forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    work_items: torch.Tensor,
    row_index: torch.Tensor | None,
    media_seqlens: torch.Tensor | None,
    softmax_scale: float,
) -> torch.Tensor:
    """Contiguous, of q's shape and dtype."""
    out = torch.empty(q.shape, dtype=q.dtype)
    kv_heads = k.shape[2]
    num_valid = valid_lengths(media_seqlens, *k.shape[:2])
    blocks = _blocks(work_items, row_index, _FORWARD_BLOCK)
    if pairs := _rows_of_pairs(blocks, q, k, num_valid):
        first, rows = pairs
        out[:, :first].zero_()
        out[:, first + rows :].zero_()
        of_samples = (q[:, first : first + rows], k, v, out[:, first : first + rows])
        each = max(_FORWARD_BLOCK // rows, 1)
        for query, key, value, target in zip(
            *(tensor.split(each) for tensor in of_samples), strict=True
        ):
            query, key, value = (tensor.transpose(1, 2) for tensor in (query, key, value))
            attended = F.scaled_dot_product_attention(query, key, value, scale=softmax_scale)
            target.copy_(attended.transpose(1, 2))
        return out
    lengths = [rows for *_, rows in blocks]
    queries = _heads_first(q, kv_heads).split(lengths, 2)
    outs = _heads_first(out, kv_heads).split(lengths, 2)
    keys, values = k.transpose(1, 2), v.transpose(1, 2)
    num_keys, has_groups = k.shape[1], q.shape[2] != kv_heads
    current = -1
    # A view costs as much as attention for a few rows: none that is not needed.
    for (medium, _, _), query, block_out in zip(blocks, queries, outs, strict=True):
        valid = num_valid[medium] if medium >= 0 else 0
        if valid == 0:
            block_out.zero_()
            continue
        if medium != current:
            current = medium
            medium_k, medium_v = keys.narrow(0, medium, 1), values.narrow(0, medium, 1)
            if valid < num_keys:
                medium_k, medium_v = medium_k.narrow(2, 0, valid), medium_v.narrow(2, 0, valid)
        if has_groups:
            query = query.flatten(2, 3)
        attended = F.scaled_dot_product_attention(query, medium_k, medium_v, scale=softmax_scale)
        block_out.copy_(attended.view(block_out.shape) if has_groups else attended)
    return out


def _backward_block(q: torch.Tensor, k: torch.Tensor) -> int:
    """Rows of a block whose buffers, beside dq, don't take more memory than q has."""
    num_keys, kv_heads, head_dim = k.shape[1:]
    itemsize = max(q.itemsize, 4)
    row_bytes = 2 * q.shape[2] * (head_dim + num_keys) * itemsize
    left = 3 * q.nbytes // 4 - 4 * kv_heads * num_keys * head_dim * itemsize
    return min(max(left // max(row_bytes, 1), 16), _BACKWARD_BLOCK)


class _Buffers:
    """fp32 (fp64) memory for the tensors of one block, reused for all.

    Arguments:
        rows: of a block, with those of a group of heads.
        media: of a block, whose heads come one after another.
    """

    def __init__(self, q: torch.Tensor, k: torch.Tensor, rows: int, media: int = 1) -> None:
        _, num_keys, kv_heads, self.head_dim = k.shape
        self.kv_heads = media * kv_heads
        self.dtype = torch.promote_types(q.dtype, torch.float32)
        self._rows = [
            q.new_empty(self.kv_heads * rows * self.head_dim, dtype=self.dtype) for _ in range(2)
        ]
        self._scores = [
            q.new_empty(self.kv_heads * rows * num_keys, dtype=self.dtype) for _ in range(2)
        ]
        self._keys = [
            q.new_empty(self.kv_heads * num_keys * self.head_dim, dtype=self.dtype)
            for _ in range(4)
        ]

    def _take(self, memory: list[torch.Tensor], rows: int, width: int) -> list[torch.Tensor]:
        numel = self.kv_heads * rows * width
        return [buffer[:numel].view(self.kv_heads, rows, width) for buffer in memory]

    def rows(self, num_rows: int) -> list[torch.Tensor]:
        return self._take(self._rows, num_rows, self.head_dim)

    def scores(self, num_rows: int, num_keys: int) -> list[torch.Tensor]:
        return self._take(self._scores, num_rows, num_keys)

    def keys(self, num_keys: int) -> list[torch.Tensor]:
        return self._take(self._keys, num_keys, self.head_dim)


def one_medium_backward(
    dout: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    work_items: torch.Tensor,
    row_index: torch.Tensor | None,
    media_seqlens: torch.Tensor | None,
    softmax_scale: float,
    dq: torch.Tensor,
    dkv: torch.Tensor,
) -> None:
    """Fills dq, contiguous, and dkv, (2, media_total, R, Hkv, D); either may have no elements."""
    need_dq, need_dkv = dq.numel() > 0, dkv.numel() > 0
    kv_heads = k.shape[2]
    group = q.shape[2] // kv_heads
    num_valid = valid_lengths(media_seqlens, *k.shape[:2])
    all_blocks = _blocks(work_items, row_index, _backward_block(q, k))
    if pairs := _rows_of_pairs(all_blocks, q, k, num_valid):
        _pairs_backward(dout, q, k, v, pairs, softmax_scale, dq, dkv)
        return
    q_rows, dout_rows = _heads_first(q, kv_heads), _heads_first(dout, kv_heads)
    dq_rows = _heads_first(dq, kv_heads) if need_dq else dq
    of_medium: dict[int, list[tuple[int, int]]] = {}
    for medium, start, rows in all_blocks:
        if medium >= 0 and num_valid[medium] > 0:
            of_medium.setdefault(medium, []).append((start, rows))
        elif need_dq:
            dq_rows.narrow(2, start, rows).zero_()
    for medium in range(k.shape[0]) if need_dkv else ():
        if medium not in of_medium:
            dkv[:, medium].zero_()
    longest = max((rows for blocks in of_medium.values() for _, rows in blocks), default=0)
    buffers = _Buffers(q, k, longest * group)
    for medium, blocks in of_medium.items():
        valid = num_valid[medium]
        medium_k, medium_v, dk, dv = buffers.keys(valid)
        medium_k.copy_(k[medium, :valid].transpose(0, 1))
        medium_v.copy_(v[medium, :valid].transpose(0, 1))
        so_far = 0
        for start, rows in blocks:
            queries, douts = buffers.rows(rows * group)
            for buffer, source in ((queries, q_rows), (douts, dout_rows)):
                block = source.narrow(2, start, rows)
                buffer.view(block.shape).copy_(block)
            scores = buffers.scores(rows * group, valid)
            of_keys = (dk, dv) if need_dkv else None
            _products(
                queries, douts, medium_k, medium_v, scores, softmax_scale, of_keys, so_far, need_dq
            )
            so_far = 1
            if need_dq:
                block = dq_rows.narrow(2, start, rows)
                block.copy_(queries.view(block.shape))
        if need_dkv:
            for gradient, total in zip(dkv[:, medium], (dk, dv), strict=True):
                gradient[:valid].copy_(total.transpose(0, 1))
                gradient[valid:].zero_()


def _products(
    queries: torch.Tensor,
    douts: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    scores: list[torch.Tensor],
    softmax_scale: float,
    of_keys: tuple[torch.Tensor, torch.Tensor] | None,
    so_far: int,
    need_dq: bool,
) -> None:
    """The backward of one block: fills dk and dv, or adds to them, and leaves dq in `queries`.

    Arguments:
        scores: two buffers for them.
        of_keys: dk, dv.
        so_far: 1 to add.
    """
    p, ds = scores
    torch.baddbmm(p, queries, keys.mT, beta=0, alpha=softmax_scale, out=p)
    torch.softmax(p, -1, out=p)
    torch.bmm(douts, values.mT, out=ds)
    if of_keys is not None:
        torch.baddbmm(of_keys[1], p.mT, douts, beta=so_far, out=of_keys[1])
    _softmax_backward(ds, p, -1, p.dtype, grad_input=ds)
    if of_keys is not None:
        dk = of_keys[0]
        torch.baddbmm(dk, ds.mT, queries, beta=so_far, alpha=softmax_scale, out=dk)
    if need_dq:
        torch.baddbmm(queries, ds, keys, beta=0, alpha=softmax_scale, out=queries)


def _pairs_backward(
    dout: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    pairs: tuple[int, int],
    softmax_scale: float,
    dq: torch.Tensor,
    dkv: torch.Tensor,
) -> None:
    """`one_medium_backward` of samples that have a medium each: a few samples in each call."""
    need_dq, need_dkv = dq.numel() > 0, dkv.numel() > 0
    first, rows = pairs
    batch, num_keys = k.shape[:2]
    # As many as the temporaries have room for, beside q or in a cache.
    itemsize = max(q.itemsize, 4)
    of_heads = 2 * rows * (q.shape[3] + num_keys) + 4 * num_keys * q.shape[3]
    room = max(3 * q.nbytes // 4, _CACHE_BYTES)
    several = max(min(room // (q.shape[2] * of_heads * itemsize), batch), 1)
    buffers: _Buffers | None = None
    of_rows = slice(first, first + rows)
    if need_dq:
        dq[:, :first].zero_()
        dq[:, first + rows :].zero_()
    for start in range(0, batch, several):
        of_samples = slice(start, min(start + several, batch))
        count = of_samples.stop - start
        if buffers is None or count != several:
            buffers = _Buffers(q, k, rows, count)
        queries, douts = buffers.rows(rows)
        keys, values, dk, dv = buffers.keys(num_keys)
        for buffer, source in (
            (queries, q[of_samples, of_rows]),
            (douts, dout[of_samples, of_rows]),
            (keys, k[of_samples]),
            (values, v[of_samples]),
        ):
            _by_sample(buffer, count).copy_(source)
        scores = buffers.scores(rows, num_keys)
        of_keys = (dk, dv) if need_dkv else None
        _products(queries, douts, keys, values, scores, softmax_scale, of_keys, 0, need_dq)
        if need_dq:
            dq[of_samples, of_rows] = _by_sample(queries, count)
        if need_dkv:
            for gradient, total in zip(dkv[:, of_samples], (dk, dv), strict=True):
                gradient.copy_(_by_sample(total, count))


def _by_sample(buffer: torch.Tensor, count: int) -> torch.Tensor:
    """A view (samples, rows, H, D) of (samples * H, rows, D)."""
    return buffer.unflatten(0, (count, -1)).transpose(1, 2)
