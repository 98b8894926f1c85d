"""Attention where a token attends to several media, or to one of many tokens: forward.

A program owns a block of query rows and a key/value head, and walks tiles of keys of the media that
any of its rows attends to, with an online softmax. Where a sample has too few programs, as in
decoding, its keys are split: each split writes the sums of its own softmax, and a second kernel
combines them in their order. How they are split follows from R alone, so a row's result does not
depend on the batch.
"""

import torch
import triton
import triton.language as tl

from flamingo_fast.kernels.attention_config import lse_shape
from flamingo_fast.kernels.launch import cdiv, launch, next_power_of_2, target_of
from flamingo_fast.kernels.one_medium_forward import LOG2_E
from flamingo_fast.kernels.one_medium_rows import last_dim_contiguous
from flamingo_fast.kernels.several_media_config import (
    forward_config,
    key_splits,
    tiles_cross_media,
)
from flamingo_fast.kernels.several_media_masks import (
    first_tile,
    load_intervals,
    load_sample,
    load_word,
    media_of_block,
    next_tile,
    rows_and_keys,
    tile_columns,
)


@triton.jit(do_not_specialize=["media_total", "seqlen", "batch", "num_words"])
def _several_media_fwd_kernel(
    Q,
    K,
    V,
    OUT,
    LSE,
    MAXIMA,
    SUMS,
    MEDIA_START,
    MEDIA_END,
    MEDIA_BITS,
    CU_MEDIA,
    MEDIA_SEQLENS,
    qk_scale,
    media_total,
    seqlen,
    batch,
    num_words,
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
    DENSE: tl.constexpr,
    SPLIT: tl.constexpr,
    SPLIT_MEDIA: tl.constexpr,
    SPLIT_KEYS: tl.constexpr,
    STORE_LSE: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
    GROUP: tl.constexpr,
    NUM_KEYS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    CROSS_MEDIA: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    NUM_STAGES: tl.constexpr,
):
    # Last rows first: where tokens attend to all previous media, those take longest.
    kv_head = tl.program_id(0) % num_kv_heads
    sample = tl.program_id(0) // num_kv_heads % batch
    block = tl.cdiv(seqlen * GROUP, BLOCK_M) - 1 - tl.program_id(0) // num_kv_heads // batch
    offs_m = block * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_d = tl.arange(0, BLOCK_D)
    mask_m = offs_m < seqlen * GROUP
    mask_d = offs_d < HEAD_DIM
    tokens = offs_m // GROUP
    heads = kv_head * GROUP + offs_m % GROUP
    rows = sample * seqlen + tokens
    first_medium, num_media = load_sample(CU_MEDIA, sample, media_total)
    start, end, is_dense = load_intervals(MEDIA_START, MEDIA_END, rows, mask_m, num_media, DENSE)
    first_key = 0
    if SPLIT:
        PIECES: tl.constexpr = tl.cdiv(NUM_KEYS, SPLIT_KEYS)
        split = tl.program_id(1)
        first_key = split % PIECES * SPLIT_KEYS
        start = tl.maximum(start, split // PIECES * SPLIT_MEDIA)
        end = tl.minimum(end, (split // PIECES + 1) * SPLIT_MEDIA)
    all_keys = False
    if DENSE:
        all_keys = tl.max(is_dense.to(tl.int32), 0) > 0
    q_rows = sample.to(tl.int64) * stride_q_batch + tokens.to(tl.int64) * stride_q_seqlen
    q_rows += heads.to(tl.int64) * stride_q_head
    mask = mask_m[:, None] & mask_d[None, :]
    q = tl.load(Q + q_rows[:, None] + offs_d[None, :], mask=mask, other=0.0)
    k_head = K + kv_head.to(tl.int64) * stride_k_head + offs_d
    v_head = V + kv_head.to(tl.int64) * stride_v_head + offs_d
    maximum = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    first_word = tl.min(tl.where(start < end, start, num_media), 0) // 64
    end_word = (tl.max(tl.where(start < end, end, 0), 0) + 63) // 64
    for word in range(first_word, end_word):
        attended = load_word(MEDIA_BITS, rows, mask_m, start, end, is_dense, word, num_words, DENSE)
        word_medium = first_medium + word * 64
        media, num_tiles = media_of_block(
            MEDIA_SEQLENS,
            attended,
            word_medium,
            num_media - word * 64,
            first_key,
            all_keys,
            CROSS_MEDIA,
            SPLIT_KEYS,
            NUM_KEYS,
            BLOCK_N,
        )
        tile = first_tile(media, CROSS_MEDIA, NUM_KEYS, BLOCK_N)
        for _ in tl.range(0, num_tiles, num_stages=NUM_STAGES):
            bit, medium, key, mask_n, keys = tile_columns(
                MEDIA_SEQLENS,
                media,
                tile,
                word_medium,
                media_total,
                first_key,
                all_keys,
                CROSS_MEDIA,
                SPLIT_KEYS,
                NUM_KEYS,
                BLOCK_N,
            )
            k_keys = medium.to(tl.int64) * stride_k_medium + key.to(tl.int64) * stride_k_key
            v_keys = medium.to(tl.int64) * stride_v_medium + key.to(tl.int64) * stride_v_key
            mask_kv = mask_n[:, None] & mask_d[None, :]
            k = tl.load(k_head[None, :] + k_keys[:, None], mask=mask_kv, other=0.0)
            v = tl.load(v_head[None, :] + v_keys[:, None], mask=mask_kv, other=0.0)
            scores = tl.dot(q, tl.trans(k), input_precision=INPUT_PRECISION)
            attends, allowed = rows_and_keys(
                MEDIA_SEQLENS,
                attended,
                bit,
                medium,
                key,
                mask_n,
                is_dense,
                CROSS_MEDIA,
                DENSE,
                NUM_KEYS,
            )
            if MEDIA_SEQLENS is not None or NUM_KEYS % BLOCK_N != 0:
                scores = tl.where(allowed, scores, float("-inf"))
            largest = tl.maximum(maximum, tl.max(scores, 1) * qk_scale)
            largest = tl.where(attends, largest, maximum)
            p = tl.exp2(scores * qk_scale - tl.where(attends, largest, float("inf"))[:, None])
            alpha = tl.where(attends, tl.exp2(maximum - largest), 1.0)
            maximum = largest
            total = total * alpha + tl.sum(p, 1)
            acc = tl.dot(p.to(v.dtype), v, acc * alpha[:, None], input_precision=INPUT_PRECISION)
            media, tile = next_tile(media, tile, keys, CROSS_MEDIA, NUM_KEYS, BLOCK_N)
    # The sum of a row that attends to nothing may be NaN, from its query or from other rows' keys.
    total = tl.where(start < end, total, 0.0)
    packed_rows = (kv_head.to(tl.int64) * batch + sample) * seqlen * GROUP + offs_m
    if SPLIT:
        packed_rows += tl.program_id(1).to(tl.int64) * num_kv_heads * batch * seqlen * GROUP
        tl.store(MAXIMA + packed_rows, maximum, mask=mask_m)
        tl.store(SUMS + packed_rows, total, mask=mask_m)
        # Of splits that a row does not attend to nothing is read either.
        mask &= (total != 0.0)[:, None]
        tl.store(OUT + packed_rows[:, None] * HEAD_DIM + offs_d[None, :], acc, mask=mask)
    else:
        out_rows = (rows.to(tl.int64) * (num_kv_heads * GROUP) + heads) * HEAD_DIM
        _store_rows(
            OUT,
            LSE,
            out_rows,
            packed_rows,
            tl.cast(num_kv_heads, tl.int64) * batch * seqlen * GROUP,
            offs_d,
            mask_m,
            mask,
            maximum,
            total,
            acc,
            STORE_LSE,
        )


@triton.jit
def _store_rows(
    OUT,
    LSE,
    out_rows,
    packed_rows,
    num_packed_rows,
    offs_d,
    mask_m,
    mask,
    maximum,
    total,
    acc,
    STORE_LSE: tl.constexpr,
):
    nothing = total == 0.0
    total = tl.where(nothing, 1.0, total)
    out = tl.where(nothing[:, None], 0.0, acc / total[:, None])
    tl.store(OUT + out_rows[:, None] + offs_d[None, :], out.to(OUT.dtype.element_ty), mask=mask)
    if STORE_LSE:
        maximum = tl.where(nothing, 0.0, maximum)
        lse = tl.where(nothing, float("inf"), tl.log2(total))
        if OUT.dtype.element_ty == tl.float32:
            # Their sum, of large scores, is rounded by more than fp32 gradients may be.
            tl.store(LSE + num_packed_rows + packed_rows, maximum, mask=mask_m)
        else:
            lse += maximum
        tl.store(LSE + packed_rows, lse, mask=mask_m)


@triton.jit(do_not_specialize=["seqlen", "batch", "num_splits"])
def _combine_splits_kernel(
    ACCS,
    MAXIMA,
    SUMS,
    OUT,
    LSE,
    seqlen,
    batch,
    num_splits,
    num_kv_heads,
    STORE_LSE: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Adds the splits of each row, in their order."""
    num_packed_rows = tl.cast(num_kv_heads, tl.int64) * batch * seqlen * GROUP
    packed_rows = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_d = tl.arange(0, BLOCK_D)
    mask_m = packed_rows < num_packed_rows
    mask = mask_m[:, None] & (offs_d < HEAD_DIM)[None, :]
    maximum = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    split_rows = packed_rows
    for _ in range(0, num_splits):
        split_total = tl.load(SUMS + split_rows, mask=mask_m, other=0.0)
        split_maximum = tl.load(MAXIMA + split_rows, mask=mask_m, other=float("-inf"))
        attends = split_total != 0.0
        split_acc = tl.load(
            ACCS + split_rows[:, None] * HEAD_DIM + offs_d[None, :],
            mask=mask & attends[:, None],
            other=0.0,
        )
        largest = tl.maximum(maximum, split_maximum)
        old = tl.where(attends, tl.exp2(maximum - largest), 1.0)
        new = tl.where(attends, tl.exp2(split_maximum - largest), 0.0)
        total = total * old + split_total * new
        acc = acc * old[:, None] + split_acc * new[:, None]
        maximum = largest
        split_rows += num_packed_rows
    rows = packed_rows // GROUP
    kv_head = rows // (batch * seqlen)
    heads = kv_head * GROUP + packed_rows % GROUP
    out_rows = (rows % (batch * seqlen) * (num_kv_heads * GROUP) + heads) * HEAD_DIM
    _store_rows(
        OUT,
        LSE,
        out_rows,
        packed_rows,
        num_packed_rows,
        offs_d,
        mask_m,
        mask,
        maximum,
        total,
        acc,
        STORE_LSE,
    )


def several_media_fwd(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    media_start: torch.Tensor,
    media_end: torch.Tensor,
    media_bits: torch.Tensor | None,
    cu_media: torch.Tensor,
    media_seqlens: torch.Tensor | None,
    max_media: int,
    dense: bool,
    softmax_scale: float,
    need_lse: bool,
    input_precision: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(out, lse); out is contiguous. lse, in base 2, is (1 or 2, Hkv, B, L, H // Hkv): packed rows.

    lse is infinite for rows that attend to nothing, and empty if not needed. In fp32 it is without
    the largest score, which follows it. softmax_scale is above 0.
    """
    batch, seqlen, heads, head_dim = q.shape
    media_total, num_keys, kv_heads, _ = k.shape
    group = heads // kv_heads
    q, k, v = map(last_dim_contiguous, (q, k, v))
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = q.new_empty(lse_shape(q, kv_heads) if need_lse else (0,), dtype=torch.float32)
    config = forward_config(seqlen * group, num_keys, head_dim, q.dtype, target_of(q))
    blocks = cdiv(seqlen * group, config.BLOCK_M)
    splits = key_splits(blocks * kv_heads, config.BLOCK_M, num_keys, max_media)
    partial_shape = (splits.count, kv_heads, batch, seqlen, group)
    accs, maxima, sums = out, out, out
    if splits.count > 1:
        accs = q.new_empty((*partial_shape, head_dim), dtype=torch.float32)
        maxima, sums = (q.new_empty(partial_shape, dtype=torch.float32) for _ in range(2))
    launch(
        _several_media_fwd_kernel,
        (blocks * batch * kv_heads, splits.count),
        q,
        k,
        v,
        accs,
        lse,
        maxima,
        sums,
        media_start.contiguous(),
        media_end.contiguous(),
        None if media_bits is None else media_bits.contiguous(),
        cu_media,
        media_seqlens,
        softmax_scale * LOG2_E,
        media_total,
        seqlen,
        batch,
        0 if media_bits is None else media_bits.shape[2],
        kv_heads,
        *q.stride()[:3],
        *k.stride()[:3],
        *v.stride()[:3],
        DENSE=dense,
        SPLIT=splits.count > 1,
        SPLIT_MEDIA=splits.media,
        SPLIT_KEYS=splits.keys,
        STORE_LSE=need_lse,
        INPUT_PRECISION=input_precision,
        GROUP=group,
        NUM_KEYS=num_keys,
        HEAD_DIM=head_dim,
        CROSS_MEDIA=tiles_cross_media(num_keys, config.BLOCK_N),
        BLOCK_M=config.BLOCK_M,
        BLOCK_N=config.BLOCK_N,
        BLOCK_D=config.BLOCK_D,
        NUM_STAGES=config.num_stages,
        num_warps=config.num_warps,
        max_registers=config.max_registers,
    )
    if splits.count > 1:
        combine_splits(accs, maxima, sums, out, lse)
    return out, lse


def combine_splits(
    accs: torch.Tensor,
    maxima: torch.Tensor,
    sums: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
) -> None:
    """Fills out, (B, L, H, D), and lse if it has elements, from the softmax of each split.

    accs (splits, Hkv, B, L, H // Hkv, D), maxima and sums (splits, Hkv, B, L, H // Hkv), fp32.
    """
    splits, kv_heads, batch, seqlen, group, head_dim = accs.shape
    block_d = max(next_power_of_2(head_dim), 16)
    block_m = max(1024 // block_d, 1)
    launch(
        _combine_splits_kernel,
        (cdiv(batch * seqlen * kv_heads * group, block_m),),
        accs,
        maxima,
        sums,
        out,
        lse,
        seqlen,
        batch,
        splits,
        kv_heads,
        STORE_LSE=lse.numel() > 0,
        GROUP=group,
        HEAD_DIM=head_dim,
        BLOCK_M=block_m,
        BLOCK_D=block_d,
        num_warps=4,
    )
