"""Where the rows and the keys of a resampler's attention lie.

The query heads that share a key/value head are packed along the latents of a medium: packed row m
is head m % GROUP of latent m // GROUP. Keys are first those of a medium, then its latents.
"""

import triton
import triton.language as tl


@triton.jit
def load_rows(
    X,
    medium,
    kv_head,
    offs_m,
    stride_medium,
    stride_latent,
    stride_head,
    LATENTS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Packed rows of a (B, R, H, D) tensor, (BLOCK_M, BLOCK_D); zeros past the last one."""
    offs_d = tl.arange(0, BLOCK_D)
    latents = (offs_m // GROUP).to(tl.int64)
    heads = (kv_head * GROUP + offs_m % GROUP).to(tl.int64)
    rows = X + medium.to(tl.int64) * stride_medium + latents * stride_latent + heads * stride_head
    mask = (offs_m < LATENTS * GROUP)[:, None] & (offs_d < HEAD_DIM)[None, :]
    return tl.load(rows[:, None] + offs_d[None, :], mask=mask, other=0.0)


@triton.jit
def contiguous_rows(
    medium,
    kv_head,
    num_kv_heads,
    offs_m,
    LATENTS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
):
    """Element offsets of packed rows in a contiguous (B, R, H, D) tensor."""
    latents = medium.to(tl.int64) * LATENTS + offs_m // GROUP
    heads = kv_head * GROUP + offs_m % GROUP
    return (latents * (num_kv_heads * GROUP) + heads) * HEAD_DIM


@triton.jit
def head_of(X, medium, kv_head, stride_medium, stride_head):
    """Where the keys of one medium and head begin in a (B, S, Hkv, D) tensor."""
    return X + medium.to(tl.int64) * stride_medium + kv_head.to(tl.int64) * stride_head


@triton.jit
def num_valid_keys(MEDIA_SEQLENS, medium, num_keys):
    """In bounds whatever the lengths are."""
    valid = num_keys
    if MEDIA_SEQLENS is not None:
        valid = tl.minimum(tl.maximum(tl.load(MEDIA_SEQLENS + medium), 0), num_keys).to(tl.int32)
    return valid


@triton.jit
def load_keys(
    X,
    first,
    end,
    stride_key,
    MASKED: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """A tile of a head's keys or values, (BLOCK_N, BLOCK_D); where MASKED zeros from `end` on."""
    offs_n = tl.arange(0, BLOCK_N)
    offs_d = tl.arange(0, BLOCK_D)
    keys = (first + offs_n).to(tl.int64) * stride_key
    mask = (offs_d < HEAD_DIM)[None, :]
    if MASKED:
        mask &= (first + offs_n < end)[:, None]
    return tl.load(X + keys[:, None] + offs_d[None, :], mask=mask, other=0.0)
