"""Where a work item's query rows lie, and the rows of K and V that go with them.

A work item is (medium, first row, end row, slot) over the B * L rows of the batch, or over those
rows as ROW_INDEX sorts them; one without a medium stands for rows that attend to nothing. The query
heads that share a key/value head are packed along the rows: packed row m is head m % GROUP of row
m // GROUP.
"""

import torch
import triton
import triton.language as tl


def last_dim_contiguous(tensor: torch.Tensor) -> torch.Tensor:
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


@triton.jit
def load_item(WORK_ITEMS, ROW_INDEX, item, media_total, seqlen, total_rows):
    """Medium (-1: none), rows, slot; medium and rows in bounds whatever the layout holds."""
    medium = tl.load(WORK_ITEMS + item * 4)
    medium = tl.where((medium < 0) | (medium >= media_total), -1, medium)
    begin = tl.minimum(tl.maximum(tl.load(WORK_ITEMS + item * 4 + 1), 0), total_rows)
    end = tl.maximum(tl.minimum(tl.load(WORK_ITEMS + item * 4 + 2), total_rows), begin)
    if ROW_INDEX is None:
        # The rows of a medium are of one sample; rows without one may run on into the next.
        end_of_sample = (begin // seqlen + 1) * seqlen
        end = tl.where(medium < 0, end, tl.minimum(end, end_of_sample))
    return medium, begin, end, tl.load(WORK_ITEMS + item * 4 + 3)


@triton.jit
def load_rows(ROW_INDEX, offs_m, mask_m, total_rows, GROUP: tl.constexpr):
    """The rows, of the batch, of packed rows."""
    rows = offs_m // GROUP
    if ROW_INDEX is not None:
        rows = tl.load(ROW_INDEX + rows, mask=mask_m, other=0)
        rows = tl.minimum(tl.maximum(rows, 0), total_rows - 1)
    return rows


@triton.jit
def query_offsets(
    ROW_INDEX,
    rows,
    begin,
    offs_m,
    kv_head,
    seqlen,
    stride_batch,
    stride_seqlen,
    stride_head,
    GROUP: tl.constexpr,
):
    """Element offsets of packed rows in a (B, L, H, D) tensor of any strides."""
    # Without ROW_INDEX all rows of a medium are of the sample of the first: one division.
    sample = (begin if ROW_INDEX is None else rows) // seqlen
    position = (rows - sample * seqlen).to(tl.int64)
    head = (kv_head * GROUP + offs_m % GROUP).to(tl.int64)
    return sample.to(tl.int64) * stride_batch + position * stride_seqlen + head * stride_head


@triton.jit
def contiguous_offsets(
    rows, offs_m, kv_head, num_kv_heads, GROUP: tl.constexpr, HEAD_DIM: tl.constexpr
):
    """Element offsets of packed rows in a contiguous (B, L, H, D) tensor."""
    heads = rows.to(tl.int64) * (num_kv_heads * GROUP)
    return (heads + kv_head * GROUP + offs_m % GROUP) * HEAD_DIM


@triton.jit
def zero_rows(
    OUT,
    ROW_INDEX,
    begin,
    end,
    kv_head,
    num_kv_heads,
    total_rows,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Zeros in a contiguous (B, L, H, D) tensor."""
    offs_d = tl.arange(0, BLOCK_D)
    zeros = tl.zeros((BLOCK_M, BLOCK_D), OUT.dtype.element_ty)
    for start in range(begin * GROUP, end * GROUP, BLOCK_M):
        offs_m = start + tl.arange(0, BLOCK_M)
        mask_m = offs_m < end * GROUP
        rows = load_rows(ROW_INDEX, offs_m, mask_m, total_rows, GROUP)
        offsets = contiguous_offsets(rows, offs_m, kv_head, num_kv_heads, GROUP, HEAD_DIM)
        mask = mask_m[:, None] & (offs_d < HEAD_DIM)[None, :]
        tl.store(OUT + offsets[:, None] + offs_d[None, :], zeros, mask=mask)


@triton.jit
def load_keys(
    X,
    medium,
    kv_head,
    num_valid,
    stride_medium,
    stride_key,
    stride_head,
    HEAD_DIM: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """K or V of one medium and head, (BLOCK_R, BLOCK_D); zeros past `num_valid` keys."""
    offs_r = tl.arange(0, BLOCK_R)
    offs_d = tl.arange(0, BLOCK_D)
    base = X + medium.to(tl.int64) * stride_medium + kv_head.to(tl.int64) * stride_head
    mask = (offs_r < num_valid)[:, None] & (offs_d < HEAD_DIM)[None, :]
    keys = offs_r.to(tl.int64) * stride_key
    return tl.load(base + keys[:, None] + offs_d[None, :], mask=mask, other=0.0)
