"""Attention where a token attends to several media, or to one of many tokens: backward.

Two kernels, so that nothing is added atomically: dQ, whose programs own query rows and walk keys as
in the forward, and dK and dV, whose programs own keys of a medium and walk the rows that attend to
it. The first also writes the row sums of dO * O that both need.
"""

import torch
import triton
import triton.language as tl

from flamingo_fast.kernels.launch import cdiv, launch, target_of
from flamingo_fast.kernels.one_medium_forward import LOG2_E
from flamingo_fast.kernels.one_medium_rows import last_dim_contiguous
from flamingo_fast.kernels.several_media_config import dkv_config, dq_config, tiles_cross_media
from flamingo_fast.kernels.several_media_masks import (
    first_tile,
    load_intervals,
    load_sample,
    load_word,
    media_of_block,
    next_tile,
    num_valid_keys,
    rows_and_keys,
    tile_columns,
)


@triton.jit(do_not_specialize=["media_total", "seqlen", "batch", "num_words"])
def _several_media_dq_kernel(
    DOUT,
    Q,
    K,
    V,
    OUT,
    LSE,
    DELTA,
    MEDIA_START,
    MEDIA_END,
    MEDIA_BITS,
    CU_MEDIA,
    MEDIA_SEQLENS,
    DQ,
    softmax_scale,
    qk_scale,
    media_total,
    seqlen,
    batch,
    num_words,
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
    DENSE: tl.constexpr,
    NEED_DQ: tl.constexpr,
    NEED_DKV: tl.constexpr,
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
    kv_head = tl.program_id(0) % num_kv_heads
    sample = tl.program_id(0) // num_kv_heads % batch
    block = tl.cdiv(seqlen * GROUP, BLOCK_M) - 1 - tl.program_id(0) // num_kv_heads // batch
    offs_m = block * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_d = tl.arange(0, BLOCK_D)
    mask_m = offs_m < seqlen * GROUP
    mask_d = offs_d < HEAD_DIM
    mask = mask_m[:, None] & mask_d[None, :]
    tokens = offs_m // GROUP
    heads = kv_head * GROUP + offs_m % GROUP
    rows = sample * seqlen + tokens
    packed_rows = (kv_head.to(tl.int64) * batch + sample) * seqlen * GROUP + offs_m
    out_rows = (rows.to(tl.int64) * (num_kv_heads * GROUP) + heads) * HEAD_DIM
    dout_rows = sample.to(tl.int64) * stride_dout_batch + tokens.to(tl.int64) * stride_dout_seqlen
    dout_rows += heads.to(tl.int64) * stride_dout_head
    dout = tl.load(DOUT + dout_rows[:, None] + offs_d[None, :], mask=mask, other=0.0)
    out = tl.load(OUT + out_rows[:, None] + offs_d[None, :], mask=mask, other=0.0)
    delta = tl.sum(dout.to(tl.float32) * out.to(tl.float32), 1)
    if NEED_DKV:
        tl.store(DELTA + packed_rows, delta, mask=mask_m)
    if NEED_DQ:
        first_medium, num_media = load_sample(CU_MEDIA, sample, media_total)
        start, end, is_dense = load_intervals(
            MEDIA_START, MEDIA_END, rows, mask_m, num_media, DENSE
        )
        all_keys = False
        if DENSE:
            all_keys = tl.max(is_dense.to(tl.int32), 0) > 0
        q_rows = sample.to(tl.int64) * stride_q_batch + tokens.to(tl.int64) * stride_q_seqlen
        q_rows += heads.to(tl.int64) * stride_q_head
        q = tl.load(Q + q_rows[:, None] + offs_d[None, :], mask=mask, other=0.0)
        lse = tl.load(LSE + packed_rows, mask=mask_m, other=float("inf"))
        if Q.dtype.element_ty == tl.float32:
            num_packed_rows = tl.cast(num_kv_heads, tl.int64) * batch * seqlen * GROUP
            maximum = tl.load(LSE + num_packed_rows + packed_rows, mask=mask_m, other=0.0)
        k_head = K + kv_head.to(tl.int64) * stride_k_head + offs_d
        v_head = V + kv_head.to(tl.int64) * stride_v_head + offs_d
        dq = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
        first_word = tl.min(tl.where(start < end, start, num_media), 0) // 64
        end_word = (tl.max(tl.where(start < end, end, 0), 0) + 63) // 64
        for word in range(first_word, end_word):
            attended = load_word(
                MEDIA_BITS, rows, mask_m, start, end, is_dense, word, num_words, DENSE
            )
            word_medium = first_medium + word * 64
            media, num_tiles = media_of_block(
                MEDIA_SEQLENS,
                attended,
                word_medium,
                num_media - word * 64,
                0,
                all_keys,
                CROSS_MEDIA,
                NUM_KEYS,
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
                    0,
                    all_keys,
                    CROSS_MEDIA,
                    NUM_KEYS,
                    NUM_KEYS,
                    BLOCK_N,
                )
                k_keys = medium.to(tl.int64) * stride_k_medium + key.to(tl.int64) * stride_k_key
                v_keys = medium.to(tl.int64) * stride_v_medium + key.to(tl.int64) * stride_v_key
                mask_kv = mask_n[:, None] & mask_d[None, :]
                k = tl.load(k_head[None, :] + k_keys[:, None], mask=mask_kv, other=0.0)
                v = tl.load(v_head[None, :] + v_keys[:, None], mask=mask_kv, other=0.0)
                scores = tl.dot(q, tl.trans(k), input_precision=INPUT_PRECISION) * qk_scale
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
                if Q.dtype.element_ty == tl.float32:
                    scores -= maximum[:, None]
                if CROSS_MEDIA:
                    p = tl.exp2(scores - lse[:, None])
                else:
                    p = tl.exp2(scores - tl.where(attends, lse, float("inf"))[:, None])
                if MEDIA_SEQLENS is not None or NUM_KEYS % BLOCK_N != 0:
                    # That of a key of zeros may be infinite.
                    p = tl.where(allowed, p, 0.0)
                dp = tl.dot(dout, tl.trans(v), input_precision=INPUT_PRECISION)
                ds = (p * (dp - delta[:, None])).to(k.dtype)
                dq = tl.dot(ds, k, dq, input_precision=INPUT_PRECISION)
                media, tile = next_tile(media, tile, keys, CROSS_MEDIA, NUM_KEYS, BLOCK_N)
        # The delta of rows that attend to nothing may be NaN.
        dq = tl.where((lse == float("inf"))[:, None], 0.0, dq * softmax_scale)
        tl.store(DQ + out_rows[:, None] + offs_d[None, :], dq.to(DQ.dtype.element_ty), mask=mask)


@triton.jit
def _columns_of_sample(
    tile,
    first_medium,
    num_media,
    media_total,
    NUM_KEYS: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """(word, bit, key, exists, medium) of a tile's columns; no tile is of two words of media."""
    TILES_PER_WORD: tl.constexpr = (64 * NUM_KEYS + BLOCK_N - 1) // BLOCK_N
    word = tile // TILES_PER_WORD
    column = tile % TILES_PER_WORD * BLOCK_N + tl.arange(0, BLOCK_N)
    bit = column // NUM_KEYS
    key = column - bit * NUM_KEYS
    exists = (bit < 64) & (word * 64 + bit < num_media)
    medium = tl.minimum(first_medium + word * 64 + bit, media_total - 1)
    return word, tl.minimum(bit, 63), key, exists, medium


@triton.jit(do_not_specialize=["media_total", "seqlen", "batch", "num_words", "tiles_per_sample"])
def _several_media_dkv_kernel(
    DOUT,
    Q,
    K,
    V,
    LSE,
    DELTA,
    MEDIA_START,
    MEDIA_END,
    MEDIA_BITS,
    CU_MEDIA,
    MEDIA_SEQLENS,
    MEDIA_ROWS,
    DKV,
    softmax_scale,
    qk_scale,
    media_total,
    seqlen,
    batch,
    num_words,
    tiles_per_sample,
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
    DENSE: tl.constexpr,
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
    kv_head = tl.program_id(0) % num_kv_heads
    offs_n = tl.arange(0, BLOCK_N)
    offs_d = tl.arange(0, BLOCK_D)
    mask_d = offs_d < HEAD_DIM
    if CROSS_MEDIA:
        # Tiles of a sample's keys, a word of 64 media after the other.
        tile = tl.program_id(0) // num_kv_heads % tiles_per_sample
        sample = tl.program_id(0) // num_kv_heads // tiles_per_sample
        first_medium, num_media = load_sample(CU_MEDIA, sample, media_total)
        # All media are some sample's, whatever the layout holds.
        written = tl.where(sample == batch - 1, media_total - first_medium, num_media)
        word, bit, key, mask_n, medium = _columns_of_sample(
            tile, first_medium, written, media_total, NUM_KEYS, BLOCK_N
        )
        exists = mask_n
        begin = tl.load(MEDIA_ROWS + medium * 2, mask=mask_n, other=0)
        end = tl.load(MEDIA_ROWS + medium * 2 + 1, mask=mask_n, other=0)
        attended_n = mask_n & (begin < end)
        begin = tl.min(tl.where(attended_n, begin, batch * seqlen), 0)
        end = tl.max(tl.where(attended_n, end, 0), 0)
    else:
        BLOCKS: tl.constexpr = (NUM_KEYS + BLOCK_N - 1) // BLOCK_N
        key = tl.program_id(0) // num_kv_heads % BLOCKS * BLOCK_N + offs_n
        exists = True
        mask_n = key < NUM_KEYS
        medium = tl.program_id(0) // num_kv_heads // BLOCKS
        begin = tl.load(MEDIA_ROWS + medium * 2)
        end = tl.load(MEDIA_ROWS + medium * 2 + 1)
        attended_n = key < tl.where(begin < end, NUM_KEYS, 0)
        sample = tl.minimum(tl.maximum(begin, 0) // seqlen, batch - 1)
        first_medium, num_media = load_sample(CU_MEDIA, sample, media_total)
        of_sample = tl.maximum(medium - first_medium, 0)
        word = of_sample // 64
        bit = of_sample % 64
    # Of the sample's own tokens.
    sample_begin = sample * seqlen
    sample_end = sample_begin + seqlen
    begin = tl.minimum(tl.maximum(begin, sample_begin), sample_end) - sample_begin
    end = tl.minimum(tl.maximum(end, sample_begin), sample_end) - sample_begin
    valid_n = mask_n
    if MEDIA_SEQLENS is not None:
        valid_n &= key < num_valid_keys(MEDIA_SEQLENS, medium, exists, False, NUM_KEYS)
    loaded_n = valid_n & attended_n
    if DENSE:
        begin = 0
        end = seqlen
        loaded_n = mask_n
    # All rows of a block of keys without one that is attended to have no gradient.
    end = tl.where(tl.max(loaded_n.to(tl.int32), 0) > 0, end, begin)
    mask_kv = loaded_n[:, None] & mask_d[None, :]
    k_keys = medium.to(tl.int64) * stride_k_medium + key.to(tl.int64) * stride_k_key
    v_keys = medium.to(tl.int64) * stride_v_medium + key.to(tl.int64) * stride_v_key
    k_head = K + kv_head.to(tl.int64) * stride_k_head + offs_d
    v_head = V + kv_head.to(tl.int64) * stride_v_head + offs_d
    k = tl.load(k_head[None, :] + k_keys[:, None], mask=mask_kv, other=0.0)
    v = tl.load(v_head[None, :] + v_keys[:, None], mask=mask_kv, other=0.0)
    dk = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    dv = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    packed_base = (kv_head.to(tl.int64) * batch + sample) * seqlen * GROUP
    q_base = Q + sample.to(tl.int64) * stride_q_batch + offs_d
    dout_base = DOUT + sample.to(tl.int64) * stride_dout_batch + offs_d
    for first_row in tl.range(begin * GROUP, end * GROUP, BLOCK_M, num_stages=NUM_STAGES):
        offs_m = first_row + tl.arange(0, BLOCK_M)
        mask_m = offs_m < end * GROUP
        mask = mask_m[:, None] & mask_d[None, :]
        tokens = (offs_m // GROUP).to(tl.int64)
        heads = (kv_head * GROUP + offs_m % GROUP).to(tl.int64)
        q_rows = tokens * stride_q_seqlen + heads * stride_q_head
        q = tl.load(q_base[None, :] + q_rows[:, None], mask=mask, other=0.0)
        dout_rows = tokens * stride_dout_seqlen + heads * stride_dout_head
        dout = tl.load(dout_base[None, :] + dout_rows[:, None], mask=mask, other=0.0)
        rows = sample * seqlen + offs_m // GROUP
        row_start, row_end, is_dense = load_intervals(
            MEDIA_START, MEDIA_END, rows, mask_m, num_media, DENSE
        )
        attended = load_word(
            MEDIA_BITS, rows, mask_m, row_start, row_end, is_dense, word, num_words, DENSE
        )
        lse = tl.load(LSE + packed_base + offs_m, mask=mask_m, other=float("inf"))
        delta = tl.load(DELTA + packed_base + offs_m, mask=mask_m, other=0.0)
        scores = tl.dot(k, tl.trans(q), input_precision=INPUT_PRECISION) * qk_scale
        if Q.dtype.element_ty == tl.float32:
            num_packed_rows = tl.cast(num_kv_heads, tl.int64) * batch * seqlen * GROUP
            maxima = LSE + num_packed_rows + packed_base + offs_m
            scores -= tl.load(maxima, mask=mask_m, other=0.0)[None, :]
        if CROSS_MEDIA:
            attends = ((attended[None, :] >> bit[:, None].to(tl.int64)) & 1) != 0
            p = tl.where(attends, tl.exp2(scores - lse[None, :]), 0.0)
        else:
            attends = ((attended >> bit.to(tl.int64)) & 1) != 0
            p = tl.exp2(scores - tl.where(attends, lse, float("inf"))[None, :])
        if MEDIA_SEQLENS is not None and DENSE:
            p = tl.where(valid_n[:, None] | is_dense[None, :], p, 0.0)
        dv = tl.dot(p.to(dout.dtype), dout, dv, input_precision=INPUT_PRECISION)
        dp = tl.dot(v, tl.trans(dout), input_precision=INPUT_PRECISION)
        ds = (p * (dp - delta[None, :])).to(q.dtype)
        dk = tl.dot(ds, q, dk, input_precision=INPUT_PRECISION)
    dk *= softmax_scale
    # What is not loaded is a key of zeros, and gets anything.
    dk = tl.where(loaded_n[:, None], dk, 0.0)
    dv = tl.where(loaded_n[:, None], dv, 0.0)
    mask = mask_n[:, None] & mask_d[None, :]
    dkv_keys = medium.to(tl.int64) * stride_dkv_medium + key.to(tl.int64) * stride_dkv_key
    dkv_head = DKV + kv_head.to(tl.int64) * stride_dkv_head + offs_d
    dkv = dkv_head[None, :] + dkv_keys[:, None]
    tl.store(dkv, dk.to(DKV.dtype.element_ty), mask=mask)
    tl.store(dkv + stride_dkv_which, dv.to(DKV.dtype.element_ty), mask=mask)
    if CROSS_MEDIA:
        # Counts on a GPU may leave the last sample more media than any should have.
        last_tile = tl.cdiv(tl.maximum(written, 0), 64) * tl.cdiv(64 * NUM_KEYS, BLOCK_N)
        last_tile = tl.where(sample == batch - 1, last_tile, 0)
        for more in range(tile + tiles_per_sample, last_tile, tiles_per_sample):
            _, _, key, mask_n, medium = _columns_of_sample(
                more, first_medium, written, media_total, NUM_KEYS, BLOCK_N
            )
            dkv_keys = medium.to(tl.int64) * stride_dkv_medium
            dkv_keys += key.to(tl.int64) * stride_dkv_key
            dkv = dkv_head[None, :] + dkv_keys[:, None]
            mask = mask_n[:, None] & mask_d[None, :]
            tl.store(dkv, 0.0, mask=mask)
            tl.store(dkv + stride_dkv_which, 0.0, mask=mask)


def several_media_bwd(
    dout: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    media_start: torch.Tensor,
    media_end: torch.Tensor,
    media_bits: torch.Tensor | None,
    media_rows: torch.Tensor,
    cu_media: torch.Tensor,
    media_seqlens: torch.Tensor | None,
    max_media: int,
    dense: bool,
    softmax_scale: float,
    dq: torch.Tensor,
    dkv: torch.Tensor,
    input_precision: str,
) -> None:
    """Fills dq, contiguous, and dkv, (2, media_total, R, Hkv, D) of any strides.

    Either may have no elements: what is not needed is not computed. `out` is contiguous.
    """
    batch, seqlen, heads, head_dim = q.shape
    media_total, num_keys, kv_heads, _ = k.shape
    group = heads // kv_heads
    need_dkv = dkv.numel() > 0
    dout, q, k, v = map(last_dim_contiguous, (dout, q, k, v))
    delta = q.new_empty(lse.shape[1:] if need_dkv else (0,), dtype=torch.float32)
    masks = (
        media_start.contiguous(),
        media_end.contiguous(),
        None if media_bits is None else media_bits.contiguous(),
        cu_media,
        media_seqlens,
    )
    sizes = (
        softmax_scale,
        softmax_scale * LOG2_E,
        media_total,
        seqlen,
        batch,
        0 if media_bits is None else media_bits.shape[2],
    )
    strides = [stride for tensor in (dout, q, k, v) for stride in tensor.stride()[:3]]
    shared = dict(
        DENSE=dense,
        INPUT_PRECISION=input_precision,
        GROUP=group,
        NUM_KEYS=num_keys,
        HEAD_DIM=head_dim,
    )
    config = dq_config(seqlen * group, num_keys, head_dim, q.dtype, target_of(q))
    launch(
        _several_media_dq_kernel,
        (cdiv(seqlen * group, config.BLOCK_M) * batch * kv_heads,),
        dout,
        q,
        k,
        v,
        out,
        lse,
        delta,
        *masks,
        dq,
        *sizes,
        kv_heads,
        *strides,
        NEED_DQ=dq.numel() > 0,
        NEED_DKV=need_dkv,
        CROSS_MEDIA=tiles_cross_media(num_keys, config.BLOCK_N),
        BLOCK_M=config.BLOCK_M,
        BLOCK_N=config.BLOCK_N,
        BLOCK_D=config.BLOCK_D,
        NUM_STAGES=config.num_stages,
        num_warps=config.num_warps,
        max_registers=config.max_registers,
        **shared,
    )
    if not need_dkv:
        return
    config = dkv_config(seqlen * group, num_keys, head_dim, q.dtype, target_of(q))
    cross_media = tiles_cross_media(num_keys, config.BLOCK_N)
    tiles = media_total * cdiv(num_keys, config.BLOCK_N)
    tiles_per_sample = 0
    if cross_media:
        words, rest = divmod(max(max_media, 1), 64)
        tiles_per_sample = words * cdiv(64 * num_keys, config.BLOCK_N)
        tiles_per_sample += cdiv(rest * num_keys, config.BLOCK_N)
        tiles = batch * tiles_per_sample
    launch(
        _several_media_dkv_kernel,
        (tiles * kv_heads,),
        dout,
        q,
        k,
        v,
        lse,
        delta,
        *masks,
        media_rows,
        dkv,
        *sizes,
        tiles_per_sample,
        kv_heads,
        *strides,
        *dkv.stride()[:4],
        CROSS_MEDIA=cross_media,
        BLOCK_M=config.BLOCK_M,
        BLOCK_N=config.BLOCK_N,
        BLOCK_D=config.BLOCK_D,
        NUM_STAGES=config.num_stages,
        num_warps=config.num_warps,
        max_registers=config.max_registers,
        **shared,
    )
