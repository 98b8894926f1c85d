"""Attention of a resampler's latents to their medium's features and to themselves: forward.

A program owns a block of query rows and a key/value head of a medium, and walks the keys of the
medium and then those of the latents in one online softmax, each where they lie. Long media with few
programs are split: each split writes the sums of its own softmax, and a second kernel combines them
in their order. How follows from one medium's shapes, so that its result is the same in any batch.
"""

import torch
import triton
import triton.language as tl

from flamingo_fast.kernels.attention_config import lse_shape
from flamingo_fast.kernels.latent_config import SPLIT_KEYS, forward_config, key_splits
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
from flamingo_fast.kernels.several_media_forward import _store_rows, combine_splits


@triton.jit
def _attend(
    q,
    maximum,
    total,
    acc,
    K,
    V,
    first,
    end,
    stride_k_key,
    stride_v_key,
    qk_scale,
    MASKED: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    NUM_STAGES: tl.constexpr,
):
    """The online softmax, (maximum, total, acc), after the keys of a head from `first` to `end`."""
    offs_n = tl.arange(0, BLOCK_N)
    for key in tl.range(first, end, BLOCK_N, num_stages=NUM_STAGES):
        k = load_keys(K, key, end, stride_k_key, MASKED, HEAD_DIM, BLOCK_N, BLOCK_D)
        v = load_keys(V, key, end, stride_v_key, MASKED, HEAD_DIM, BLOCK_N, BLOCK_D)
        scores = tl.dot(q, tl.trans(k), input_precision=INPUT_PRECISION)
        if MASKED:
            scores = tl.where((key + offs_n < end)[None, :], scores, float("-inf"))
        largest = tl.maximum(maximum, tl.max(scores, 1) * qk_scale)
        p = tl.exp2(scores * qk_scale - largest[:, None])
        alpha = tl.exp2(maximum - largest)
        maximum = largest
        total = total * alpha + tl.sum(p, 1)
        acc = tl.dot(p.to(v.dtype), v, acc * alpha[:, None], input_precision=INPUT_PRECISION)
    return maximum, total, acc


@triton.jit(do_not_specialize=["num_keys", "batch"])
def _latent_fwd_kernel(
    Q,
    K_MEDIA,
    V_MEDIA,
    K_LATENTS,
    V_LATENTS,
    OUT,
    LSE,
    MAXIMA,
    SUMS,
    MEDIA_SEQLENS,
    qk_scale,
    num_keys,
    batch,
    num_kv_heads,
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
    SPLIT: tl.constexpr,
    SPLIT_KEYS: tl.constexpr,
    STORE_LSE: tl.constexpr,
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
    # Blocks of a medium's rows read the same keys: one after the other.
    block = tl.program_id(0) // num_kv_heads % BLOCKS
    medium = tl.program_id(0) // num_kv_heads // BLOCKS
    offs_m = block * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_d = tl.arange(0, BLOCK_D)
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
    first = 0
    end = num_valid_keys(MEDIA_SEQLENS, medium, num_keys)
    end_latent = LATENTS
    if SPLIT:
        first = tl.program_id(1) * SPLIT_KEYS
        end = tl.minimum(end, first + SPLIT_KEYS)
        end_latent = tl.where(tl.program_id(1) == tl.num_programs(1) - 1, LATENTS, 0)
    maximum = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    maximum, total, acc = _attend(
        q,
        maximum,
        total,
        acc,
        head_of(K_MEDIA, medium, kv_head, stride_km_medium, stride_km_head),
        head_of(V_MEDIA, medium, kv_head, stride_vm_medium, stride_vm_head),
        first,
        end,
        stride_km_key,
        stride_vm_key,
        qk_scale,
        MASK_MEDIA,
        INPUT_PRECISION,
        HEAD_DIM,
        BLOCK_N,
        BLOCK_D,
        NUM_STAGES,
    )
    maximum, total, acc = _attend(
        q,
        maximum,
        total,
        acc,
        head_of(K_LATENTS, medium, kv_head, stride_kl_medium, stride_kl_head),
        head_of(V_LATENTS, medium, kv_head, stride_vl_medium, stride_vl_head),
        0,
        end_latent,
        stride_kl_key,
        stride_vl_key,
        qk_scale,
        LATENTS % BLOCK_N != 0,
        INPUT_PRECISION,
        HEAD_DIM,
        BLOCK_N,
        BLOCK_D,
        NUM_STAGES,
    )
    mask_m = offs_m < LATENTS * GROUP
    mask = mask_m[:, None] & (offs_d < HEAD_DIM)[None, :]
    packed_rows = (kv_head.to(tl.int64) * batch + medium) * (LATENTS * GROUP) + offs_m
    num_packed_rows = tl.cast(num_kv_heads, tl.int64) * batch * (LATENTS * GROUP)
    if SPLIT:
        packed_rows += tl.program_id(1) * num_packed_rows
        tl.store(MAXIMA + packed_rows, maximum, mask=mask_m)
        tl.store(SUMS + packed_rows, total, mask=mask_m)
        # Of a split without valid keys nothing is read either.
        mask &= (total != 0.0)[:, None]
        tl.store(OUT + packed_rows[:, None] * HEAD_DIM + offs_d[None, :], acc, mask=mask)
    else:
        _store_rows(
            OUT,
            LSE,
            contiguous_rows(medium, kv_head, num_kv_heads, offs_m, LATENTS, GROUP, HEAD_DIM),
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


def latent_fwd(
    q: torch.Tensor,
    k_media: torch.Tensor,
    v_media: torch.Tensor,
    k_latents: torch.Tensor,
    v_latents: torch.Tensor,
    media_seqlens: torch.Tensor | None,
    softmax_scale: float,
    need_lse: bool,
    input_precision: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(out, lse); out is contiguous. lse, in base 2, is (1 or 2, Hkv, B, R, H // Hkv): packed rows.

    q (B, R, H, D), media (B, S, Hkv, D), latents (B, R, Hkv, D), media_seqlens (B,) int32. lse is
    empty if not needed. In fp32 it is without the largest score, which follows it. softmax_scale is
    above 0.
    """
    batch, latents, heads, head_dim = q.shape
    num_keys, kv_heads = k_media.shape[1:3]
    group = heads // kv_heads
    q, *sources = map(last_dim_contiguous, (q, k_media, v_media, k_latents, v_latents))
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = q.new_empty(lse_shape(q, kv_heads) if need_lse else (0,), dtype=torch.float32)
    config = forward_config(latents * group, head_dim, q.dtype, target_of(q))
    blocks = cdiv(latents * group, config.BLOCK_M)
    splits = key_splits(blocks * kv_heads, num_keys)
    accs, maxima, sums = out, out, out
    if splits > 1:
        partial_shape = (splits, kv_heads, batch, latents, group)
        accs = q.new_empty((*partial_shape, head_dim), dtype=torch.float32)
        maxima, sums = (q.new_empty(partial_shape, dtype=torch.float32) for _ in range(2))
    launch(
        _latent_fwd_kernel,
        (batch * blocks * kv_heads, splits),
        q,
        *sources,
        accs,
        lse,
        maxima,
        sums,
        media_seqlens,
        softmax_scale * LOG2_E,
        num_keys,
        batch,
        kv_heads,
        *(stride for tensor in (q, *sources) for stride in tensor.stride()[:3]),
        SPLIT=splits > 1,
        SPLIT_KEYS=SPLIT_KEYS,
        STORE_LSE=need_lse,
        INPUT_PRECISION=input_precision,
        MASK_MEDIA=media_seqlens is not None or num_keys % config.BLOCK_N != 0,
        LATENTS=latents,
        GROUP=group,
        HEAD_DIM=head_dim,
        BLOCK_M=config.BLOCK_M,
        BLOCK_N=config.BLOCK_N,
        BLOCK_D=config.BLOCK_D,
        NUM_STAGES=config.num_stages,
        num_warps=config.num_warps,
        max_registers=config.max_registers,
    )
    if splits > 1:
        combine_splits(accs, maxima, sums, out, lse)
    return out, lse
