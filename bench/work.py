"""Bytes and floating-point operations of each op, in closed form.

Useful work only: every input read once, every output written once, parameters once; but where
norms are too wide for a backward in one pass, it reads its inputs twice. Left out are what an
implementation adds of its own accord (partial sums of parameter gradients, parameters that each
program loads again) and what a cache may save. dx of a gated residual is its incoming gradient
itself and moves nothing. `mode` is "fwd", "bwd" or "fwd_bwd"; `itemsize` is the bytes of an
activation and of a parameter; statistics saved for the backward are fp32.

`*_eager` is what the plain PyTorch composition moves on a GPU when each of its kernels reads its
inputs and writes its outputs once. That favours eager: its norm backward really reads its inputs
a second time for the parameter gradients. Its floating-point operations are counted as ours.
"""

import dataclasses
import math
from collections.abc import Iterable, Sequence

from flamingo_fast.layout import MediaLayout

Shape = Sequence[int]

# Columns up to which the kernels' norm backward reads its inputs once.
WIDEST_ONE_PASS = 4096


@dataclasses.dataclass(frozen=True)
class Work:
    """Bytes loaded and stored; operations on vector units and, apart, in matrix products."""

    loaded: int
    stored: int
    vector_flops: int
    matmul_flops: int = 0

    @property
    def bytes(self) -> int:
        return self.loaded + self.stored

    def __add__(self, other: "Work") -> "Work":
        return Work(
            self.loaded + other.loaded,
            self.stored + other.stored,
            self.vector_flops + other.vector_flops,
            self.matmul_flops + other.matmul_flops,
        )

    def __mul__(self, times: int) -> "Work":
        return Work(
            times * self.loaded,
            times * self.stored,
            times * self.vector_flops,
            times * self.matmul_flops,
        )


def of_mode(mode: str, fwd: Work, bwd: Work) -> Work:
    return {"fwd": fwd, "bwd": bwd, "fwd_bwd": fwd + bwd}[mode]


def _elementwise(shape: Shape, itemsize: int, loads: int, stores: int, flops: int) -> Work:
    """`loads`, `stores` and `flops` per element."""
    numel = math.prod(shape)
    return Work(loads * numel * itemsize, stores * numel * itemsize, flops * numel)


def squared_relu(shape: Shape, itemsize: int, mode: str) -> Work:
    fwd = _elementwise(shape, itemsize, loads=1, stores=1, flops=2)
    bwd = _elementwise(shape, itemsize, loads=2, stores=1, flops=3)
    return of_mode(mode, fwd, bwd)


def squared_relu_eager(shape: Shape, itemsize: int, mode: str) -> Work:
    """relu and square; their backward copies, doubles, multiplies and masks."""
    fwd = _elementwise(shape, itemsize, loads=2, stores=2, flops=2)
    bwd = _elementwise(shape, itemsize, loads=6, stores=4, flops=3)
    return of_mode(mode, fwd, bwd)


def gated_residual(shape: Shape, itemsize: int, mode: str) -> Work:
    """With a gate of shape (1,)."""
    gate = Work(itemsize, 0, 0)
    fwd = _elementwise(shape, itemsize, loads=2, stores=1, flops=2) + gate
    bwd = _elementwise(shape, itemsize, loads=2, stores=1, flops=3) + gate + Work(0, itemsize, 0)
    return of_mode(mode, fwd, bwd)


def gated_residual_eager(shape: Shape, itemsize: int, mode: str) -> Work:
    """A product and a sum; in the backward two products and a reduction."""
    fwd = _elementwise(shape, itemsize, loads=3, stores=2, flops=2)
    bwd = _elementwise(shape, itemsize, loads=4, stores=2, flops=3)
    return of_mode(mode, fwd, bwd)


def norm(
    shape: Shape, itemsize: int, mode: str, *, rms: bool = False, column_pass: bool = False
) -> Work:
    """LayerNorm with weight and bias, or RMSNorm with weight.

    `column_pass`: the backward reads its two inputs again for the parameter gradients, as the
    kernels do for rows too wide to keep those sums in registers.
    """
    rows, width = math.prod(shape[:-1]), shape[-1]
    statistics = (1 if rms else 2) * rows * 4
    parameters = (1 if rms else 2) * width * itemsize
    fwd = _elementwise(shape, itemsize, loads=1, stores=1, flops=4 if rms else 7)
    fwd += Work(parameters, statistics, 0)
    bwd = _elementwise(shape, itemsize, loads=2, stores=1, flops=9 if rms else 13)
    # The backward has no use for the bias.
    bwd += Work(statistics + width * itemsize, parameters, 0)
    if column_pass:
        bwd += _elementwise(shape, itemsize, loads=2, stores=0, flops=0)
    return of_mode(mode, fwd, bwd)


def gated_residual_norm(
    shape: Shape, itemsize: int, mode: str, *, rms: bool = False, column_pass: bool = False
) -> Work:
    """`norm` of a gated residual, both returned: y comes in and the residual goes out beside it.

    The backward reads both incoming gradients, the residual and y, and writes dx and dy.
    """
    gate = Work(itemsize, 0, 0)
    fwd = _elementwise(shape, itemsize, loads=1, stores=1, flops=2) + gate
    bwd = _elementwise(shape, itemsize, loads=2, stores=1, flops=4) + gate + Work(0, itemsize, 0)
    return of_mode(mode, fwd, bwd) + norm(shape, itemsize, mode, rms=rms, column_pass=column_pass)


def gated_residual_norm_eager(shape: Shape, itemsize: int, mode: str, *, rms: bool = False) -> Work:
    """The eager gated residual, the norm, and in the backward the sum of both gradients."""
    add_gradients = _elementwise(shape, itemsize, loads=2, stores=1, flops=1)
    return (
        gated_residual_eager(shape, itemsize, mode)
        + norm(shape, itemsize, mode, rms=rms)
        + of_mode(mode, Work(0, 0, 0), add_gradients)
    )


Linear = tuple[int, int, int]
"""(rows in, columns in, columns out) of a linear layer in a module."""


def linears(layers: Iterable[Linear], itemsize: int, mode: str) -> Work:
    """Forward one product of matrices each, backward two; without biases."""
    total = Work(0, 0, 0)
    for rows, columns, outputs in layers:
        source, weight, result = (
            itemsize * numel for numel in (rows * columns, columns * outputs, rows * outputs)
        )
        product = 2 * rows * columns * outputs
        fwd = Work(source + weight, result, 0, product)
        bwd = Work(source + weight + result, source + weight, 0, 2 * product)
        total += of_mode(mode, fwd, bwd)
    return total


def attention(
    row_bytes: int,
    read_bytes: int,
    written_bytes: int,
    scores: int,
    rows: int,
    head_dim: int,
    mode: str,
) -> Work:
    """Each tensor once. A score costs two products of D numbers forward, five backward (scores and
    weights again; dP, dV, dK, dQ), three for dQ alone.

    Arguments:
        row_bytes: of q, and of out.
        read_bytes: of keys and values.
        written_bytes: of their gradients.
        scores: (query, key) pairs of all heads.
        rows: of q, of all heads.
        mode: also "fwd_lse", a forward that saves the softmax's log-sum for the backward, and
            "bwd_dq", a backward that only q wants.
    """
    elements, lse, product = rows * head_dim, 4 * rows, 2 * scores * head_dim
    fwd = Work(row_bytes + read_bytes, row_bytes, 5 * scores + elements, 2 * product)
    fwd_lse = fwd + Work(0, lse, 0)
    loaded = 2 * row_bytes + read_bytes + lse
    bwd = Work(loaded, row_bytes + written_bytes, 7 * scores + elements, 5 * product)
    bwd_dq = Work(loaded, row_bytes, 7 * scores + elements, 3 * product)
    return {
        "fwd": fwd,
        "fwd_lse": fwd_lse,
        "bwd": bwd,
        "bwd_dq": bwd_dq,
        "fwd_bwd": fwd_lse + bwd,
    }[mode]


def masked_cross_attention(shape: Shape, itemsize: int, mode: str) -> Work:
    """Of (B, L, N, H, D, R), every token attending to one medium, as many key heads as query heads.

    Where there are more media than tokens, only as many are read. `mode`: as in `attention`.
    """
    batch, seqlen, media, heads, head_dim, num_keys = shape
    rows = batch * seqlen * heads
    row_bytes = rows * head_dim * itemsize
    medium_bytes = 2 * num_keys * heads * head_dim * itemsize
    key_bytes, read_bytes = batch * media * medium_bytes, batch * min(media, seqlen) * medium_bytes
    return attention(row_bytes, read_bytes, key_bytes, rows * num_keys, rows, head_dim, mode)


def masked_cross_attention_eager(shape: Shape, itemsize: int, mode: str) -> Work:
    """Scores of all tokens and all keys, which six kernels read and five write.

    They are multiplied, masked, have their largest taken and subtracted, go through the softmax,
    are masked again and multiplied. Backward it is seven and four. The mask is left out.
    """
    batch, seqlen, media, heads, head_dim, num_keys = shape
    row_bytes = batch * seqlen * heads * head_dim * itemsize
    key_bytes = batch * media * num_keys * heads * head_dim * itemsize
    scores = batch * heads * seqlen * media * num_keys
    score_bytes, product = scores * itemsize, 2 * scores * head_dim
    fwd = Work(6 * score_bytes + 2 * row_bytes + 2 * key_bytes, 5 * score_bytes + 2 * row_bytes, 0)
    fwd += Work(0, 0, 5 * scores, 2 * product)
    bwd = Work(7 * score_bytes + 4 * row_bytes + 2 * key_bytes, 4 * score_bytes, 0)
    bwd += Work(0, 2 * row_bytes + 2 * key_bytes, 7 * scores, 4 * product)
    return of_mode(mode, fwd, bwd)


def one_medium_item_work(
    layout: MediaLayout,
    heads: int,
    kv_heads: int,
    head_dim: int,
    num_keys: int,
    itemsize: int,
    mode: str,
    block_m: int,
) -> list[Work]:
    """What the program of each work item and one key/value head does, in the schedule's order.

    `mode` is "fwd", "fwd_lse", "bwd" or "bwd_dq". K and V are read again for every item of a split
    medium. Products are of whole tiles of `block_m` rows, keys and head_dim padded as in the
    kernels. The layout's own integers are left out.
    """
    group = heads // kv_heads
    row_bytes = head_dim * itemsize
    keys_bytes = 2 * num_keys * row_bytes
    sums_bytes = 2 * num_keys * head_dim * 4
    saves_lse = 4 if mode == "fwd_lse" else 0
    num_dots = {"fwd": 2, "fwd_lse": 2, "bwd": 5, "bwd_dq": 3}[mode]
    row_flops = num_dots * 2 * _padded(num_keys) * _padded(head_dim)
    lengths = None if layout.media_seqlens is None else layout.media_seqlens.tolist()
    works = []
    assert layout.work_items is not None, "a token attends to several media"
    for medium, begin, end, slot in layout.work_items.tolist():
        rows = (end - begin) * group
        work = Work(0, rows * (row_bytes + saves_lse), 0)
        if medium >= 0:
            valid = num_keys if lengths is None else min(lengths[medium], num_keys)
            valid = valid if rows else 0
            row_loads = row_bytes if mode.startswith("fwd") else 2 * row_bytes + 4
            flops = -(-rows // block_m) * block_m * row_flops
            work += Work(2 * valid * row_bytes + rows * row_loads, 0, 0, flops)
            if mode == "bwd":
                work += Work(0, keys_bytes if slot < 0 else sums_bytes, 0)
        works.append(work)
    return works


def masked_cross_attention_kernel_work(
    layout: MediaLayout,
    heads: int,
    kv_heads: int,
    head_dim: int,
    num_keys: int,
    itemsize: int,
    mode: str,
    block_m: int,
) -> Work:
    """What the kernels do for `layout`: all items and heads, and the sums of split media."""
    total = Work(0, 0, 0)
    for item in one_medium_item_work(
        layout, heads, kv_heads, head_dim, num_keys, itemsize, mode, block_m
    ):
        total += item
    numel = 2 * num_keys * head_dim
    if mode == "bwd" and layout.split_media is not None:
        for medium, first_slot, end_slot in layout.split_media.tolist():
            if medium >= 0:
                total += Work((end_slot - first_slot) * numel * 4, numel * itemsize, 0)
    return total * kv_heads


def _padded(size: int) -> int:
    return max(1 << (size - 1).bit_length(), 16)
