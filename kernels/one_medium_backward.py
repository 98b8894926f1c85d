"""Attention where a token attends to one medium, backward in one pass.

A row meets the keys of one medium only, all in the program that owns them: its dQ is final there,
while dK and dV add up in registers over the rows. No atomics, no second pass over the rows, and
neither the output nor a row sum of it is read: with all keys at hand, sum(p * dp) over the keys is
that row sum. Only a medium that was split into several work items writes fp32 sums of each, which a
second kernel adds in their order.
"""

import torch
import triton
import triton.language as tl

from flamingo_fast.kernels.launch import cdiv, launch, target_of
from flamingo_fast.kernels.one_medium_config import backward_config
from flamingo_fast.kernels.one_medium_forward import LOG2_E
from flamingo_fast.kernels.one_medium_rows import (
    contiguous_offsets,
    last_dim_contiguous,
    load_item,
    load_keys,
    load_rows,
    query_offsets,
    zero_rows,
)


@triton.jit(do_not_specialize=["media_total", "seqlen", "total_rows", "num_slots"])
def _one_medium_bwd_kernel(
    DOUT,
    Q,
    K,
    V,
    LSE,
    WORK_ITEMS,
    ROW_INDEX,
    MEDIA_SEQLENS,
    DQ,
    DKV,
    PARTIALS,
    softmax_scale,
    qk_scale,
    media_total,
    seqlen,
    total_rows,
    num_slots,
    num_kv_heads,
    stride_dout_batch,
    stride_dout_seqlen,
    stride_dout_head,
    stride_q_batch,
    stride_q_seqlen,
    stride_q_head,
    stride_k_medium,
    stride_k_key,
    stride_k_head,
    stride_v_medium,
    stride_v_key,
    stride_v_head,
    stride_dkv_which,
    stride_dkv_medium,
    stride_dkv_key,
    stride_dkv_head,
    NEED_DQ: tl.constexpr,
    NEED_DKV: tl.constexpr,
    TRANSPOSE_DQ: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
    GROUP: tl.constexpr,
    NUM_KEYS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
    NUM_STAGES: tl.constexpr,
):
    kv_head = tl.program_id(0) % num_kv_heads
    item = tl.program_id(0) // num_kv_heads
    medium, begin, end, slot = load_item(
        WORK_ITEMS, ROW_INDEX, item, media_total, seqlen, total_rows
    )
    if medium < 0:
        if NEED_DQ:
            zero_rows(
                DQ,
                ROW_INDEX,
                begin,
                end,
                kv_head,
                num_kv_heads,
                total_rows,
                GROUP,
                HEAD_DIM,
                BLOCK_M,
                BLOCK_D,
            )
        return
    num_valid = NUM_KEYS
    if MEDIA_SEQLENS is not None:
        num_valid = tl.minimum(tl.load(MEDIA_SEQLENS + medium), NUM_KEYS)
    # A decoding step attends to one of many media: of the others nothing is read.
    num_valid = tl.where(begin < end, num_valid, 0)
    k = load_keys(
        K,
        medium,
        kv_head,
        num_valid,
        stride_k_medium,
        stride_k_key,
        stride_k_head,
        HEAD_DIM,
        BLOCK_R,
        BLOCK_D,
    )
    v = load_keys(
        V,
        medium,
        kv_head,
        num_valid,
        stride_v_medium,
        stride_v_key,
        stride_v_head,
        HEAD_DIM,
        BLOCK_R,
        BLOCK_D,
    )
    offs_r = tl.arange(0, BLOCK_R)
    offs_d = tl.arange(0, BLOCK_D)
    mask_d = offs_d < HEAD_DIM
    lse_base = kv_head.to(tl.int64) * total_rows * GROUP
    dk = tl.zeros((BLOCK_R, BLOCK_D), tl.float32)
    dv = tl.zeros((BLOCK_R, BLOCK_D), tl.float32)
    end_m = end * GROUP
    for start in tl.range(begin * GROUP, end_m, BLOCK_M, num_stages=NUM_STAGES):
        offs_m = start + tl.arange(0, BLOCK_M)
        mask_m = offs_m < end_m
        mask = mask_m[:, None] & mask_d[None, :]
        rows = load_rows(ROW_INDEX, offs_m, mask_m, total_rows, GROUP)
        q_rows = query_offsets(
            ROW_INDEX,
            rows,
            begin,
            offs_m,
            kv_head,
            seqlen,
            stride_q_batch,
            stride_q_seqlen,
            stride_q_head,
            GROUP,
        )
        q = tl.load(Q + q_rows[:, None] + offs_d[None, :], mask=mask, other=0.0)
        dout_rows = query_offsets(
            ROW_INDEX,
            rows,
            begin,
            offs_m,
            kv_head,
            seqlen,
            stride_dout_batch,
            stride_dout_seqlen,
            stride_dout_head,
            GROUP,
        )
        dout = tl.load(DOUT + dout_rows[:, None] + offs_d[None, :], mask=mask, other=0.0)
        # p of the rows past the end is 0.
        lse = tl.load(LSE + lse_base + offs_m, mask=mask_m, other=float("inf"))
        scores = tl.dot(k, tl.trans(q), input_precision=INPUT_PRECISION) * qk_scale
        p = tl.exp2(scores - lse[None, :])
        if MEDIA_SEQLENS is not None or NUM_KEYS < BLOCK_R:
            p = tl.where((offs_r < num_valid)[:, None], p, 0.0)
        if Q.dtype.element_ty == tl.float32:
            # Of large scores lse is rounded by more than fp32 gradients may be.
            total = tl.sum(p, 0)
            p = p / tl.where(total == 0.0, 1.0, total)[None, :]
        dp = tl.dot(v, tl.trans(dout), input_precision=INPUT_PRECISION)
        ds = p * (dp - tl.sum(p * dp, 0)[None, :])
        ds = ds.to(q.dtype)
        if NEED_DKV:
            dv = tl.dot(p.to(dout.dtype), dout, dv, input_precision=INPUT_PRECISION)
            dk = tl.dot(ds, q, dk, input_precision=INPUT_PRECISION)
        if NEED_DQ:
            if TRANSPOSE_DQ:
                dq = tl.trans(tl.dot(tl.trans(k), ds, input_precision=INPUT_PRECISION))
            else:
                dq = tl.dot(tl.trans(ds), k, input_precision=INPUT_PRECISION)
            dq_rows = contiguous_offsets(rows, offs_m, kv_head, num_kv_heads, GROUP, HEAD_DIM)
            tl.store(
                DQ + dq_rows[:, None] + offs_d[None, :],
                (dq * softmax_scale).to(DQ.dtype.element_ty),
                mask=mask,
            )
    if NEED_DKV:
        dk *= softmax_scale
        mask = (offs_r < NUM_KEYS)[:, None] & mask_d[None, :]
        if (slot >= 0) & (slot < num_slots):
            sums = slot.to(tl.int64) * num_kv_heads + kv_head
            sums = sums * (2 * NUM_KEYS * HEAD_DIM)
            element = offs_r[:, None] * HEAD_DIM + offs_d[None, :]
            tl.store(PARTIALS + sums + element, dk, mask=mask)
            tl.store(PARTIALS + sums + NUM_KEYS * HEAD_DIM + element, dv, mask=mask)
        else:
            base = DKV + medium.to(tl.int64) * stride_dkv_medium
            base += kv_head.to(tl.int64) * stride_dkv_head
            keys = base + (offs_r.to(tl.int64) * stride_dkv_key)[:, None] + offs_d[None, :]
            tl.store(keys, dk.to(DKV.dtype.element_ty), mask=mask)
            tl.store(keys + stride_dkv_which, dv.to(DKV.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["media_total", "num_slots"])
def _sum_split_media_kernel(
    PARTIALS,
    SPLIT_MEDIA,
    DKV,
    media_total,
    num_slots,
    num_kv_heads,
    stride_dkv_which,
    stride_dkv_medium,
    stride_dkv_key,
    stride_dkv_head,
    NUM_KEYS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Adds the sums of a split medium's work items, in their order."""
    # Not tl.cdiv: before Triton 3.7 it is none of what constants can be made of.
    BLOCKS: tl.constexpr = (NUM_KEYS * HEAD_DIM + BLOCK - 1) // BLOCK
    pid = tl.program_id(0)
    which = pid // BLOCKS % 2
    kv_head = pid // (2 * BLOCKS) % num_kv_heads
    entry = SPLIT_MEDIA + pid // (2 * BLOCKS) // num_kv_heads * 3
    medium = tl.load(entry)
    first = tl.maximum(tl.load(entry + 1), 0)
    end = tl.minimum(tl.load(entry + 2), num_slots)
    if (medium < 0) | (medium >= media_total):
        return
    offs = pid % BLOCKS * BLOCK + tl.arange(0, BLOCK)
    mask = offs < NUM_KEYS * HEAD_DIM
    sums = ((first.to(tl.int64) * num_kv_heads + kv_head) * 2 + which) * (NUM_KEYS * HEAD_DIM)
    pointers = PARTIALS + sums + offs
    total = tl.zeros((BLOCK,), tl.float32)
    for _ in range(first, end):
        total += tl.load(pointers, mask=mask, other=0.0)
        pointers += num_kv_heads * (2 * NUM_KEYS * HEAD_DIM)
    base = DKV + which.to(tl.int64) * stride_dkv_which + medium.to(tl.int64) * stride_dkv_medium
    base += kv_head.to(tl.int64) * stride_dkv_head
    keys = (offs // HEAD_DIM).to(tl.int64) * stride_dkv_key + offs % HEAD_DIM
    tl.store(base + keys, total.to(DKV.dtype.element_ty), mask=mask)


def one_medium_bwd(
    dout: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    lse: torch.Tensor,
    work_items: torch.Tensor,
    split_media: torch.Tensor,
    num_slots: int,
    row_index: torch.Tensor | None,
    media_seqlens: torch.Tensor | None,
    softmax_scale: float,
    dq: torch.Tensor,
    dkv: torch.Tensor,
    input_precision: str,
) -> None:
    """Fills dq, contiguous, and dkv, (2, media_total, R, Hkv, D) of any strides.

    Either may have no elements: what is not needed is not computed.
    """
    batch, seqlen, heads, head_dim = q.shape
    media_total, num_keys, kv_heads, _ = k.shape
    group = heads // kv_heads
    dout, q, k, v = map(last_dim_contiguous, (dout, q, k, v))
    need_dkv = dkv.numel() > 0
    rows_per_medium = batch * seqlen * group / max(media_total, 1)
    config = backward_config(rows_per_medium, num_keys, head_dim, q.dtype, need_dkv, target_of(q))
    split = need_dkv and num_slots > 0
    partials = q.new_empty(
        (num_slots if split else 0, kv_heads, 2, num_keys, head_dim), dtype=torch.float32
    )
    dkv_strides = dkv.stride()[:4] if need_dkv else (0, 0, 0, 0)
    launch(
        _one_medium_bwd_kernel,
        (work_items.shape[0] * kv_heads,),
        dout,
        q,
        k,
        v,
        lse,
        work_items,
        row_index,
        media_seqlens,
        dq,
        dkv,
        partials,
        softmax_scale,
        softmax_scale * LOG2_E,
        media_total,
        seqlen,
        batch * seqlen,
        num_slots,
        kv_heads,
        *dout.stride()[:3],
        *q.stride()[:3],
        *k.stride()[:3],
        *v.stride()[:3],
        *dkv_strides,
        NEED_DQ=dq.numel() > 0,
        NEED_DKV=need_dkv,
        TRANSPOSE_DQ=config.TRANSPOSE_DQ,
        INPUT_PRECISION=input_precision,
        GROUP=group,
        NUM_KEYS=num_keys,
        HEAD_DIM=head_dim,
        BLOCK_M=config.BLOCK_M,
        BLOCK_R=config.BLOCK_R,
        BLOCK_D=config.BLOCK_D,
        NUM_STAGES=config.num_stages,
        num_warps=config.num_warps,
        max_registers=config.max_registers,
    )
    if split:
        block = 1024
        blocks = cdiv(num_keys * head_dim, block)
        launch(
            _sum_split_media_kernel,
            (split_media.shape[0] * kv_heads * 2 * blocks,),
            partials,
            split_media,
            dkv,
            media_total,
            num_slots,
            kv_heads,
            *dkv_strides,
            NUM_KEYS=num_keys,
            HEAD_DIM=head_dim,
            BLOCK=block,
            num_warps=4,
        )
