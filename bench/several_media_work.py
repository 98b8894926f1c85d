"""Bytes and floating-point operations of attention under any layout, counted as in `work.py`."""

import dataclasses
import itertools

import torch

from flamingo_fast.bench.work import Shape, Work, attention, masked_cross_attention_eager, of_mode
from flamingo_fast.layout import MediaLayout


def attention_of_layout(
    layout: MediaLayout,
    heads: int,
    kv_heads: int,
    head_dim: int,
    num_keys: int,
    itemsize: int,
    mode: str,
    *,
    dense: bool = False,
) -> Work:
    """Useful work: rows of q and out once, keys and values that any row attends to once a kv head.

    Of gradients, those of keys that none attends to are written too. The layout's own integers are
    left out, and what rows get that attend to nothing, unless that is, with `dense`, attention to
    everything.

    Arguments:
        layout: on a CPU.
        mode: as in `work.attention`.
    """
    pairs, keys_read = _pairs_and_keys(layout, num_keys, dense)
    rows = layout.batch_size * layout.seqlen * heads
    row_bytes = rows * head_dim * itemsize
    key_bytes = 2 * kv_heads * head_dim * itemsize
    read_bytes, all_bytes = keys_read * key_bytes, layout.media_total * num_keys * key_bytes
    return attention(row_bytes, read_bytes, all_bytes, pairs * heads, rows, head_dim, mode)


def _pairs_and_keys(layout: MediaLayout, num_keys: int, dense: bool) -> tuple[int, int]:
    """(row, key) pairs that attend, of one head, and keys that any row attends to."""
    valid = torch.full((layout.media_total,), num_keys)
    if layout.media_seqlens is not None:
        valid = layout.media_seqlens.clamp(0, num_keys)
    mask, silent_rows = layout.to_mask(), (~layout.attends()).sum(1).tolist()
    pairs = keys = 0
    for sample, (first, last) in enumerate(itertools.pairwise(layout.cu_media.tolist())):
        attends, lengths = mask[sample, :, : last - first], valid[first:last]
        pairs += int((attends * lengths).sum())
        read = int(lengths[attends.any(0)].sum())
        if dense and silent_rows[sample] > 0:
            read = (last - first) * num_keys
            pairs += silent_rows[sample] * read
        keys += read
    return pairs, keys


def transformers_attention(
    batch: int,
    seqlen: int,
    keys: int,
    heads: int,
    kv_heads: int,
    head_dim: int,
    itemsize: int,
    mode: str,
) -> Work:
    """transformers' eager attention: scores of all tokens and all `keys` of a sample.

    Four kernels read them and four write them: they are multiplied, scaled, masked, go through a
    softmax and are multiplied again. Backward it is six and three. 16-bit scores go through the
    softmax in fp32, and with the conversions move as many bytes as fp32 ones. Keys and values are
    repeated where heads share them, and out is transposed. The mask is left out.
    """
    score_bytes = 4 * batch * heads * seqlen * keys
    row_bytes = batch * seqlen * heads * head_dim * itemsize
    key_bytes = 2 * batch * keys * heads * head_dim * itemsize
    shared_bytes = key_bytes * kv_heads // heads
    scores = batch * heads * seqlen * keys
    product = 2 * scores * head_dim
    fwd = Work(4 * score_bytes + 2 * row_bytes + key_bytes, 4 * score_bytes + 2 * row_bytes, 0)
    fwd += Work(0, 0, 5 * scores, 2 * product)
    bwd = Work(6 * score_bytes + 3 * row_bytes + key_bytes, 3 * score_bytes, 0)
    bwd += Work(0, row_bytes + key_bytes, 7 * scores, 4 * product)
    if kv_heads < heads:
        fwd += Work(shared_bytes, key_bytes, 0)
        bwd += Work(key_bytes, shared_bytes, 0)
    return of_mode(mode, fwd, bwd)


def idefics_eager(shape: Shape, itemsize: int, mode: str) -> Work:
    """With one more kernel over the rows: those of tokens that attend to nothing are zeroed."""
    batch, seqlen, media, heads, head_dim, num_keys = shape
    of_attention = transformers_attention(
        batch, seqlen, media * num_keys, heads, heads, head_dim, itemsize, mode
    )
    return of_attention + _elementwise(batch * seqlen * heads * head_dim, itemsize, mode)


def all_previous_eager(shape: Shape, itemsize: int, mode: str) -> Work:
    """OpenFlamingo's class: as for one medium, without the mask after the softmax, but the rows of
    out and their gradient are transposed."""
    batch, seqlen, media, heads, head_dim, num_keys = shape
    eager = masked_cross_attention_eager(shape, itemsize, mode)
    masked = _elementwise(batch * heads * seqlen * media * num_keys, itemsize, mode)
    rows = _elementwise(batch * seqlen * heads * head_dim, itemsize, mode)
    return dataclasses.replace(
        eager,
        loaded=eager.loaded - masked.loaded + rows.loaded,
        stored=eager.stored - masked.stored + rows.stored,
    )


def _elementwise(numel: int, itemsize: int, mode: str) -> Work:
    """A kernel that reads and writes as many elements, and its backward, which does too."""
    moved = numel * itemsize * (2 if mode == "fwd_bwd" else 1)
    return Work(moved, moved, 0)
