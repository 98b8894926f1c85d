"""Attention of a resampler's latents to their medium's features and to themselves: backward.

Where one program holds all rows of a medium that share a key/value head, it is one pass: gradients
of a tile of keys are final where the tile is loaded, and dQ adds up in registers. Otherwise a pass
for dQ, which also writes the row sums of dO * O, and one for dK and dV, whose programs own a tile
of keys and walk the rows. Where keys are split, each split writes its dQ, and one more kernel adds
them in their order. Nothing is added atomically.
"""

import torch
import triton
import triton.language as tl

from flamingo_fast.kernels.latent_config import (
    SPLIT_KEYS,
    backward_config,
    dkv_config,
    key_splits,
    one_pass,
)
from flamingo_fast.kernels.latent_dkv import _latent_dkv_kernel, _store_keys
from flamingo_fast.kernels.latent_rows import (
    contiguous_rows,
    head_of,
    load_keys,
    load_rows,
    num_valid_keys,
)
from flamingo_fast.kernels.launch import cdiv, launch, target_of
from flamingo_fast.kernels.one_medium_forward import LOG2_E
from flamingo_fast.kernels.one_medium_rows import last_dim_contiguous


@triton.jit
def _gradients_of_keys(
    q,
    dout,
    lse,
    maximum,
    delta,
    dq,
    K,
    V,
    DK,
    DV,
    first,
    end,
    stride_k_key,
    stride_v_key,
    stride_dkv_key,
    softmax_scale,
    qk_scale,
    NEED_DQ: tl.constexpr,
    NEED_DKV: tl.constexpr,
    MASKED: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    NUM_STAGES: tl.constexpr,
):
    """Stores dK and dV of the keys of a head from `first` to `end`; dq with theirs added."""
    offs_n = tl.arange(0, BLOCK_N)
    for key in tl.range(first, end, BLOCK_N, num_stages=NUM_STAGES):
        k = load_keys(K, key, end, stride_k_key, MASKED, HEAD_DIM, BLOCK_N, BLOCK_D)
        v = load_keys(V, key, end, stride_v_key, MASKED, HEAD_DIM, BLOCK_N, BLOCK_D)
        scores = tl.dot(q, tl.trans(k), input_precision=INPUT_PRECISION) * qk_scale
        if q.dtype == tl.float32:
            scores -= maximum[:, None]
        p = tl.exp2(scores - lse[:, None])
        if MASKED:
            # That of a key of zeros may be infinite.
            p = tl.where((key + offs_n < end)[None, :], p, 0.0)
        dp = tl.dot(dout, tl.trans(v), input_precision=INPUT_PRECISION)
        ds = (p * (dp - delta[:, None])).to(q.dtype)
        if NEED_DKV:
            dv = tl.dot(tl.trans(p.to(dout.dtype)), dout, input_precision=INPUT_PRECISION)
            _store_keys(DV, dv, key, end, stride_dkv_key, HEAD_DIM, BLOCK_N, BLOCK_D)
            dk = tl.dot(tl.trans(ds), q, input_precision=INPUT_PRECISION) * softmax_scale
            _store_keys(DK, dk, key, end, stride_dkv_key, HEAD_DIM, BLOCK_N, BLOCK_D)
        if NEED_DQ:
            dq = tl.dot(ds, k, dq, input_precision=INPUT_PRECISION)
    return dq


@triton.jit(do_not_specialize=["num_keys", "batch"])
def _latent_bwd_kernel(
    DOUT,
    Q,
    K_MEDIA,
    V_MEDIA,
    K_LATENTS,
    V_LATENTS,
    OUT,
    LSE,
    DELTA,
    MEDIA_SEQLENS,
    DQ,
    DMEDIA,
    DLATENTS,
    softmax_scale,
    qk_scale,
    num_keys,
    batch,
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
    NEED_DQ: tl.constexpr,
    NEED_DMEDIA: tl.constexpr,
    NEED_DLATENTS: tl.constexpr,
    STORE_DELTA: tl.constexpr,
    SPLIT: tl.constexpr,
    SPLIT_KEYS: tl.constexpr,
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
    BLOCKS: tl.constexpr = (LATENTS * GROUP + BLOCK_M - 1) // BLOCK_M
    kv_head = tl.program_id(0) % num_kv_heads
    block = tl.program_id(0) // num_kv_heads % BLOCKS
    medium = tl.program_id(0) // num_kv_heads // BLOCKS
    offs_m = block * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_d = tl.arange(0, BLOCK_D)
    mask_m = offs_m < LATENTS * GROUP
    mask = mask_m[:, None] & (offs_d < HEAD_DIM)[None, :]
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
    out_rows = contiguous_rows(medium, kv_head, num_kv_heads, offs_m, LATENTS, GROUP, HEAD_DIM)
    out = tl.load(OUT + out_rows[:, None] + offs_d[None, :], mask=mask, other=0.0)
    delta = tl.sum(dout.to(tl.float32) * out.to(tl.float32), 1)
    packed_rows = (kv_head.to(tl.int64) * batch + medium) * (LATENTS * GROUP) + offs_m
    num_packed_rows = tl.cast(num_kv_heads, tl.int64) * batch * (LATENTS * GROUP)
    if STORE_DELTA:
        if tl.program_id(1) == 0:
            tl.store(DELTA + packed_rows, delta, mask=mask_m)
    if NEED_DQ or NEED_DMEDIA or NEED_DLATENTS:
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
        # p of the rows past the last one is 0.
        lse = tl.load(LSE + packed_rows, mask=mask_m, other=float("inf"))
        maximum = lse
        if Q.dtype.element_ty == tl.float32:
            maximum = tl.load(LSE + num_packed_rows + packed_rows, mask=mask_m, other=0.0)
        first = 0
        valid = num_valid_keys(MEDIA_SEQLENS, medium, num_keys)
        end = num_keys
        end_latent = LATENTS
        if SPLIT:
            first = tl.program_id(1) * SPLIT_KEYS
            end = tl.minimum(end, first + SPLIT_KEYS)
            end_latent = tl.where(tl.program_id(1) == tl.num_programs(1) - 1, LATENTS, 0)
        valid = tl.minimum(valid, end)
        dq = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
        if NEED_DQ or NEED_DMEDIA:
            dk_media = head_of(DMEDIA, medium, kv_head, stride_dm_medium, stride_dm_head)
            dq = _gradients_of_keys(
                q,
                dout,
                lse,
                maximum,
                delta,
                dq,
                head_of(K_MEDIA, medium, kv_head, stride_km_medium, stride_km_head),
                head_of(V_MEDIA, medium, kv_head, stride_vm_medium, stride_vm_head),
                dk_media,
                dk_media + stride_dm_which,
                first,
                valid,
                stride_km_key,
                stride_vm_key,
                stride_dm_key,
                softmax_scale,
                qk_scale,
                NEED_DQ,
                NEED_DMEDIA,
                MASK_MEDIA,
                INPUT_PRECISION,
                HEAD_DIM,
                BLOCK_N,
                BLOCK_D,
                NUM_STAGES,
            )
            if NEED_DMEDIA and MEDIA_SEQLENS is not None:
                zeros = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
                for key in range(tl.maximum(first, valid), end, BLOCK_N):
                    _store_keys(
                        dk_media, zeros, key, end, stride_dm_key, HEAD_DIM, BLOCK_N, BLOCK_D
                    )
                    _store_keys(
                        dk_media + stride_dm_which,
                        zeros,
                        key,
                        end,
                        stride_dm_key,
                        HEAD_DIM,
                        BLOCK_N,
                        BLOCK_D,
                    )
        if NEED_DQ or NEED_DLATENTS:
            dk_latents = head_of(DLATENTS, medium, kv_head, stride_dl_medium, stride_dl_head)
            dq = _gradients_of_keys(
                q,
                dout,
                lse,
                maximum,
                delta,
                dq,
                head_of(K_LATENTS, medium, kv_head, stride_kl_medium, stride_kl_head),
                head_of(V_LATENTS, medium, kv_head, stride_vl_medium, stride_vl_head),
                dk_latents,
                dk_latents + stride_dl_which,
                0,
                end_latent,
                stride_kl_key,
                stride_vl_key,
                stride_dl_key,
                softmax_scale,
                qk_scale,
                NEED_DQ,
                NEED_DLATENTS,
                LATENTS % BLOCK_N != 0,
                INPUT_PRECISION,
                HEAD_DIM,
                BLOCK_N,
                BLOCK_D,
                NUM_STAGES,
            )
        if NEED_DQ:
            dq *= softmax_scale
            if SPLIT:
                out_rows += tl.program_id(1) * (num_packed_rows * HEAD_DIM)
            dq_rows = DQ + out_rows[:, None] + offs_d[None, :]
            tl.store(dq_rows, dq.to(DQ.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["num_splits"])
def _sum_splits_kernel(PARTIALS, DQ, numel, num_splits, BLOCK: tl.constexpr):
    """Adds the dQ of each split, in their order."""
    offs = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < numel
    total = tl.zeros((BLOCK,), tl.float32)
    pointers = PARTIALS + offs
    for _ in range(0, num_splits):
        total += tl.load(pointers, mask=mask, other=0.0)
        pointers += numel
    tl.store(DQ + offs, total.to(DQ.dtype.element_ty), mask=mask)


def latent_bwd(
    dout: torch.Tensor,
    q: torch.Tensor,
    k_media: torch.Tensor,
    v_media: torch.Tensor,
    k_latents: torch.Tensor,
    v_latents: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    media_seqlens: torch.Tensor | None,
    softmax_scale: float,
    dq: torch.Tensor,
    dmedia: torch.Tensor,
    dlatents: torch.Tensor,
    input_precision: str,
) -> None:
    """Fills dq, contiguous, dmedia, (2, B, S, Hkv, D), and dlatents, (2, B, R, Hkv, D).

    Each may have no elements: what is not needed is not computed. The last two have any strides,
    and `out` is contiguous.
    """
    batch, latents, heads, head_dim = q.shape
    num_keys, kv_heads = k_media.shape[1:3]
    group = heads // kv_heads
    needs = dq.numel() > 0, dmedia.numel() > 0, dlatents.numel() > 0
    need_dq, need_dmedia, need_dlatents = needs
    need_dkv = need_dmedia or need_dlatents
    if not any(needs):
        return
    inputs = tuple(map(last_dim_contiguous, (dout, q, k_media, v_media, k_latents, v_latents)))
    strides = [stride for tensor in inputs for stride in tensor.stride()[:3]]
    for gradient in (dmedia, dlatents):
        strides += gradient.stride()[:4] if gradient.numel() > 0 else (0,) * 4
    rows = latents * group
    in_one_pass = one_pass(rows, head_dim, q.dtype, target_of(q))
    two_passes = need_dkv and not in_one_pass
    delta = q.new_empty(lse.shape[1:] if two_passes else (0,), dtype=torch.float32)
    shared = dict(INPUT_PRECISION=input_precision, LATENTS=latents, GROUP=group, HEAD_DIM=head_dim)
    config = backward_config(rows, head_dim, q.dtype, need_dkv and in_one_pass, target_of(q))
    blocks = cdiv(rows, config.BLOCK_M)
    splits = key_splits(blocks * kv_heads, num_keys)
    if two_passes and not need_dq:
        splits = 1  # nothing but delta
    sums = dq
    if need_dq and splits > 1:
        sums = q.new_empty((splits, *q.shape), dtype=torch.float32)
    launch(
        _latent_bwd_kernel,
        (batch * blocks * kv_heads, splits),
        *inputs,
        out,
        lse,
        delta,
        media_seqlens,
        sums,
        dmedia,
        dlatents,
        softmax_scale,
        softmax_scale * LOG2_E,
        num_keys,
        batch,
        kv_heads,
        *strides,
        NEED_DQ=need_dq,
        NEED_DMEDIA=need_dmedia and in_one_pass,
        NEED_DLATENTS=need_dlatents and in_one_pass,
        STORE_DELTA=two_passes,
        SPLIT=splits > 1,
        SPLIT_KEYS=SPLIT_KEYS,
        MASK_MEDIA=media_seqlens is not None or num_keys % config.BLOCK_N != 0,
        BLOCK_M=config.BLOCK_M,
        BLOCK_N=config.BLOCK_N,
        BLOCK_D=config.BLOCK_D,
        NUM_STAGES=config.num_stages,
        num_warps=config.num_warps,
        max_registers=config.max_registers,
        **shared,
    )
    if need_dq and splits > 1:
        block = 1024
        launch(
            _sum_splits_kernel,
            (cdiv(dq.numel(), block),),
            sums,
            dq,
            dq.numel(),
            splits,
            BLOCK=block,
            num_warps=4,
        )
    if not two_passes:
        return
    config = dkv_config(rows, head_dim, q.dtype, target_of(q))
    media_tiles = cdiv(num_keys, config.BLOCK_N) if need_dmedia else 0
    latent_tiles = cdiv(latents, config.BLOCK_N) if need_dlatents else 0
    launch(
        _latent_dkv_kernel,
        (batch * (media_tiles + latent_tiles) * kv_heads,),
        *inputs,
        lse,
        delta,
        media_seqlens,
        dmedia,
        dlatents,
        softmax_scale,
        softmax_scale * LOG2_E,
        num_keys,
        batch,
        media_tiles,
        kv_heads,
        *strides,
        NEED_DMEDIA=need_dmedia,
        NEED_DLATENTS=need_dlatents,
        MASK_MEDIA=media_seqlens is not None or num_keys % config.BLOCK_N != 0,
        BLOCK_M=config.BLOCK_M,
        BLOCK_N=config.BLOCK_N,
        BLOCK_D=config.BLOCK_D,
        NUM_STAGES=config.num_stages,
        num_warps=config.num_warps,
        max_registers=config.max_registers,
        **shared,
    )
