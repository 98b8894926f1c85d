"""Attention of a resampler's latents, backward in two passes: the second one, for dK and dV.

Its programs own a tile of keys and walk the rows.
"""

import triton
import triton.language as tl

from flamingo_fast.kernels.latent_rows import head_of, load_keys, load_rows, num_valid_keys


@triton.jit
def _store_keys(
    X,
    values,
    first,
    end,
    stride_key,
    HEAD_DIM: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """A tile's gradients, (BLOCK_N, BLOCK_D), of the keys before `end`."""
    offs_n = tl.arange(0, BLOCK_N)
    offs_d = tl.arange(0, BLOCK_D)
    keys = (first + offs_n).to(tl.int64) * stride_key
    mask = (first + offs_n < end)[:, None] & (offs_d < HEAD_DIM)[None, :]
    tile = X + keys[:, None] + offs_d[None, :]
    tl.store(tile, values.to(X.dtype.element_ty), mask=mask)


@triton.jit
def _gradients_of_tile(
    Q,
    DOUT,
    LSE,
    MAXIMA,
    DELTA,
    K,
    V,
    DK,
    DV,
    medium,
    kv_head,
    first,
    valid,
    end,
    stride_dout_medium,
    stride_dout_latent,
    stride_dout_head,
    stride_q_medium,
    stride_q_latent,
    stride_q_head,
    stride_k_key,
    stride_v_key,
    stride_dkv_key,
    softmax_scale,
    qk_scale,
    MASKED: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
    LATENTS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    NUM_STAGES: tl.constexpr,
):
    """Stores dK and dV of a tile of a head's keys before `end`, zeros from `valid` on."""
    k = load_keys(K, first, valid, stride_k_key, MASKED, HEAD_DIM, BLOCK_N, BLOCK_D)
    v = load_keys(V, first, valid, stride_v_key, MASKED, HEAD_DIM, BLOCK_N, BLOCK_D)
    dk = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    dv = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    end_row = tl.where(first < valid, LATENTS * GROUP, 0)
    for row in tl.range(0, end_row, BLOCK_M, num_stages=NUM_STAGES):
        offs_m = row + tl.arange(0, BLOCK_M)
        mask_m = offs_m < LATENTS * GROUP
        q = load_rows(
            Q,
            medium,
            kv_head,
            offs_m,
            stride_q_medium,
            stride_q_latent,
            stride_q_head,
            LATENTS,
            GROUP,
            HEAD_DIM,
            BLOCK_D,
        )
        dout = load_rows(
            DOUT,
            medium,
            kv_head,
            offs_m,
            stride_dout_medium,
            stride_dout_latent,
            stride_dout_head,
            LATENTS,
            GROUP,
            HEAD_DIM,
            BLOCK_D,
        )
        lse = tl.load(LSE + offs_m, mask=mask_m, other=float("inf"))
        delta = tl.load(DELTA + offs_m, mask=mask_m, other=0.0)
        scores = tl.dot(k, tl.trans(q), input_precision=INPUT_PRECISION) * qk_scale
        if q.dtype == tl.float32:
            scores -= tl.load(MAXIMA + offs_m, mask=mask_m, other=0.0)[None, :]
        p = tl.exp2(scores - lse[None, :])
        dv = tl.dot(p.to(dout.dtype), dout, dv, input_precision=INPUT_PRECISION)
        dp = tl.dot(v, tl.trans(dout), input_precision=INPUT_PRECISION)
        ds = (p * (dp - delta[None, :])).to(q.dtype)
        dk = tl.dot(ds, q, dk, input_precision=INPUT_PRECISION)
    dk *= softmax_scale
    if MASKED:
        # A key that is not loaded is one of zeros, and gets anything.
        is_valid = (first + tl.arange(0, BLOCK_N) < valid)[:, None]
        dk = tl.where(is_valid, dk, 0.0)
        dv = tl.where(is_valid, dv, 0.0)
    _store_keys(DK, dk, first, end, stride_dkv_key, HEAD_DIM, BLOCK_N, BLOCK_D)
    _store_keys(DV, dv, first, end, stride_dkv_key, HEAD_DIM, BLOCK_N, BLOCK_D)


@triton.jit(do_not_specialize=["num_keys", "batch", "media_tiles"])
def _latent_dkv_kernel(
    DOUT,
    Q,
    K_MEDIA,
    V_MEDIA,
    K_LATENTS,
    V_LATENTS,
    LSE,
    DELTA,
    MEDIA_SEQLENS,
    DMEDIA,
    DLATENTS,
    softmax_scale,
    qk_scale,
    num_keys,
    batch,
    media_tiles,
    num_kv_heads,
    stride_dout_medium,
    stride_dout_latent,
    stride_dout_head,
    stride_q_medium,
    stride_q_latent,
    stride_q_head,
    stride_km_medium,
    stride_km_key,
    stride_km_head,
    stride_vm_medium,
    stride_vm_key,
    stride_vm_head,
    stride_kl_medium,
    stride_kl_key,
    stride_kl_head,
    stride_vl_medium,
    stride_vl_key,
    stride_vl_head,
    stride_dm_which,
    stride_dm_medium,
    stride_dm_key,
    stride_dm_head,
    stride_dl_which,
    stride_dl_medium,
    stride_dl_key,
    stride_dl_head,
    NEED_DMEDIA: tl.constexpr,
    NEED_DLATENTS: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
    MASK_MEDIA: tl.constexpr,
    LATENTS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    NUM_STAGES: tl.constexpr,
):
    tiles = media_tiles
    if NEED_DLATENTS:
        tiles += tl.cdiv(LATENTS, BLOCK_N)
    kv_head = tl.program_id(0) % num_kv_heads
    # Tiles of a medium read the same rows: one after the other.
    tile = tl.program_id(0) // num_kv_heads % tiles
    medium = tl.program_id(0) // num_kv_heads // tiles
    packed_row = (kv_head.to(tl.int64) * batch + medium) * (LATENTS * GROUP)
    num_packed_rows = tl.cast(num_kv_heads, tl.int64) * batch * (LATENTS * GROUP)
    lse = LSE + packed_row
    maxima = lse + num_packed_rows
    delta = DELTA + packed_row
    if NEED_DMEDIA:
        if tile < media_tiles:
            dk_media = head_of(DMEDIA, medium, kv_head, stride_dm_medium, stride_dm_head)
            _gradients_of_tile(
                Q,
                DOUT,
                lse,
                maxima,
                delta,
                head_of(K_MEDIA, medium, kv_head, stride_km_medium, stride_km_head),
                head_of(V_MEDIA, medium, kv_head, stride_vm_medium, stride_vm_head),
                dk_media,
                dk_media + stride_dm_which,
                medium,
                kv_head,
                tile * BLOCK_N,
                num_valid_keys(MEDIA_SEQLENS, medium, num_keys),
                num_keys,
                stride_dout_medium,
                stride_dout_latent,
                stride_dout_head,
                stride_q_medium,
                stride_q_latent,
                stride_q_head,
                stride_km_key,
                stride_vm_key,
                stride_dm_key,
                softmax_scale,
                qk_scale,
                MASK_MEDIA,
                INPUT_PRECISION,
                LATENTS,
                GROUP,
                HEAD_DIM,
                BLOCK_M,
                BLOCK_N,
                BLOCK_D,
                NUM_STAGES,
            )
    if NEED_DLATENTS:
        if tile >= media_tiles:
            dk_latents = head_of(DLATENTS, medium, kv_head, stride_dl_medium, stride_dl_head)
            _gradients_of_tile(
                Q,
                DOUT,
                lse,
                maxima,
                delta,
                head_of(K_LATENTS, medium, kv_head, stride_kl_medium, stride_kl_head),
                head_of(V_LATENTS, medium, kv_head, stride_vl_medium, stride_vl_head),
                dk_latents,
                dk_latents + stride_dl_which,
                medium,
                kv_head,
                (tile - media_tiles) * BLOCK_N,
                LATENTS,
                LATENTS,
                stride_dout_medium,
                stride_dout_latent,
                stride_dout_head,
                stride_q_medium,
                stride_q_latent,
                stride_q_head,
                stride_kl_key,
                stride_vl_key,
                stride_dl_key,
                softmax_scale,
                qk_scale,
                LATENTS % BLOCK_N != 0,
                INPUT_PRECISION,
                LATENTS,
                GROUP,
                HEAD_DIM,
                BLOCK_M,
                BLOCK_N,
                BLOCK_D,
                NUM_STAGES,
            )
