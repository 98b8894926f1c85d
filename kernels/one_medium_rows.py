"""Where a work item's query rows lie, and the rows of K and V that go with them.

A work item is (medium, first row, end row, slot) over the B * L rows of the batch; one without a
medium stands for rows that attend to nothing. The query heads that share a key/value head are
packed along the rows: packed row m is head m % GROUP of row m // GROUP.
"""

import torch
import triton
import triton.language as tl


def last_dim_contiguous(tensor: torch.Tensor) -> torch.Tensor:
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


@triton.jit
def load_item(WORK_ITEMS, item, media_total, seqlen, total_rows):
    """Medium (-1: none), sample, rows and slot. Whatever the layout holds, all are in bounds."""
    medium = tl.load(WORK_ITEMS + item * 4)
    medium = tl.where((medium < 0) | (medium >= media_total), -1, medium)
    begin = tl.maximum(tl.load(WORK_ITEMS + item * 4 + 1), 0)
    end = tl.minimum(tl.load(WORK_ITEMS + item * 4 + 2), total_rows)
    sample = begin // seqlen
    # The rows of a medium are of one sample; rows without one may run on into the next.
    end = tl.where(medium < 0, end, tl.minimum(end, (sample + 1) * seqlen))
    return medium, sample, begin, end, tl.load(WORK_ITEMS + item * 4 + 3)


@triton.jit
def query_offsets(
    offs_m, kv_head, sample, seqlen, stride_batch, stride_seqlen, stride_head, GROUP: tl.constexpr
):
    """Element offsets of packed rows in a tensor of any strides."""
    position = (offs_m // GROUP - sample * seqlen).to(tl.int64)
    head = (kv_head * GROUP + offs_m % GROUP).to(tl.int64)
    return sample.to(tl.int64) * stride_batch + position * stride_seqlen + head * stride_head


@triton.jit
def contiguous_offsets(offs_m, kv_head, num_kv_heads, GROUP: tl.constexpr, HEAD_DIM: tl.constexpr):
    """Element offsets of packed rows in a contiguous (B, L, H, D) tensor."""
    row = (offs_m // GROUP).to(tl.int64) * (num_kv_heads * GROUP)
    return (row + kv_head * GROUP + offs_m % GROUP) * HEAD_DIM


@triton.jit
def zero_rows(
    OUT,
    begin,
    end,
    kv_head,
    num_kv_heads,
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
        rows = contiguous_offsets(offs_m, kv_head, num_kv_heads, GROUP, HEAD_DIM)
        mask = (offs_m < end * GROUP)[:, None] & (offs_d < HEAD_DIM)[None, :]
        tl.store(OUT + rows[:, None] + offs_d[None, :], zeros, mask=mask)


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
