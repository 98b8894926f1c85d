"""Attention where a token attends to one medium, forward.

A program owns a work item (up to chunk_rows rows of one medium) and a key/value head: it loads the
medium's K and V once and walks the rows. All keys of a row are in one tile, so the softmax needs no
running maximum. Scores are computed transposed, keys along the M axis of the matrix instructions:
those are then full with 16 or 32 rows a tile, and a medium has few rows.
"""

import torch
import triton
import triton.language as tl

from flamingo_fast.kernels.launch import launch, target_of
from flamingo_fast.kernels.one_medium_config import forward_config
from flamingo_fast.kernels.one_medium_rows import (
    contiguous_offsets,
    last_dim_contiguous,
    load_item,
    load_keys,
    load_rows,
    query_offsets,
    zero_rows,
)

LOG2_E = 1.4426950408889634


@triton.jit(do_not_specialize=["media_total", "seqlen", "total_rows"])
def _one_medium_fwd_kernel(
    Q,
    K,
    V,
    OUT,
    LSE,
    WORK_ITEMS,
    ROW_INDEX,
    MEDIA_SEQLENS,
    qk_scale,
    media_total,
    seqlen,
    total_rows,
    num_kv_heads,
    stride_q_batch,
    stride_q_seqlen,
    stride_q_head,
    stride_k_medium,
    stride_k_key,
    stride_k_head,
    stride_v_medium,
    stride_v_key,
    stride_v_head,
    STORE_LSE: tl.constexpr,
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
    lse_base = kv_head.to(tl.int64) * total_rows * GROUP
    medium, begin, end, _ = load_item(WORK_ITEMS, ROW_INDEX, item, media_total, seqlen, total_rows)
    if medium < 0:
        zero_rows(
            OUT,
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
        if STORE_LSE:
            for start in range(begin * GROUP, end * GROUP, BLOCK_M):
                offs_m = start + tl.arange(0, BLOCK_M)
                nothing = tl.full((BLOCK_M,), float("inf"), tl.float32)
                tl.store(LSE + lse_base + offs_m, nothing, mask=offs_m < end * GROUP)
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
        scores = tl.dot(k, tl.trans(q), input_precision=INPUT_PRECISION) * qk_scale
        if MEDIA_SEQLENS is not None or NUM_KEYS < BLOCK_R:
            scores = tl.where((offs_r < num_valid)[:, None], scores, float("-inf"))
        largest = tl.max(scores, 0)
        if MEDIA_SEQLENS is not None:
            # Without a valid key the scores are all -inf, and -inf - -inf is NaN.
            largest = tl.where(largest == float("-inf"), 0.0, largest)
        p = tl.exp2(scores - largest[None, :])
        total = tl.sum(p, 0)
        out = tl.dot(tl.trans(v), p.to(v.dtype), input_precision=INPUT_PRECISION)
        if MEDIA_SEQLENS is not None:
            out = out * tl.where(total == 0.0, 0.0, 1.0 / total)[None, :]
        else:
            out = out * (1.0 / total)[None, :]
        out_rows = contiguous_offsets(rows, offs_m, kv_head, num_kv_heads, GROUP, HEAD_DIM)
        tl.store(
            OUT + out_rows[:, None] + offs_d[None, :],
            tl.trans(out).to(OUT.dtype.element_ty),
            mask=mask,
        )
        if STORE_LSE:
            lse = largest + tl.log2(total)
            if MEDIA_SEQLENS is not None:
                # The backward's exp2(score - lse) is then 0.
                lse = tl.where(total == 0.0, float("inf"), lse)
            tl.store(LSE + lse_base + offs_m, lse, mask=mask_m)


def one_medium_fwd(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    work_items: torch.Tensor,
    row_index: torch.Tensor | None,
    media_seqlens: torch.Tensor | None,
    softmax_scale: float,
    need_lse: bool,
    input_precision: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(out, lse); out is contiguous. lse, in base 2, is (Hkv, B, L, H // Hkv): packed rows.

    lse is in the order of row_index, infinite for rows that attend to nothing, and empty if not
    needed.
    """
    batch, seqlen, heads, head_dim = q.shape
    media_total, num_keys, kv_heads, _ = k.shape
    group = heads // kv_heads
    q, k, v = map(last_dim_contiguous, (q, k, v))
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse_shape = (kv_heads, batch, seqlen, group) if need_lse else (0,)
    lse = torch.empty(lse_shape, dtype=torch.float32, device=q.device)
    config = forward_config(seqlen * group, num_keys, head_dim, q.dtype, target_of(q))
    launch(
        _one_medium_fwd_kernel,
        (work_items.shape[0] * kv_heads,),
        q,
        k,
        v,
        out,
        lse,
        work_items,
        row_index,
        media_seqlens,
        softmax_scale * LOG2_E,
        media_total,
        seqlen,
        batch * seqlen,
        kv_heads,
        *q.stride()[:3],
        *k.stride()[:3],
        *v.stride()[:3],
        STORE_LSE=need_lse,
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
    return out, lse
