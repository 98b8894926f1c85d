"""What launches of attention to several media and of latents share; imports no Triton."""

import dataclasses

import torch

from flamingo_fast.kernels.launch import Target, next_power_of_2


@dataclasses.dataclass(frozen=True)
class AttentionConfig:
    """BLOCK_M counts packed query rows, BLOCK_N keys of one medium or of one source."""

    BLOCK_M: int
    BLOCK_N: int
    BLOCK_D: int
    num_warps: int
    num_stages: int
    max_registers: int | None = None


def block(size: int, most: int) -> int:
    """The tile of `size` rows, keys or columns: a power of two, 16 to `most`."""
    return min(max(next_power_of_2(size), 16), most)


def fp32_config(rows: int, block_d: int) -> AttentionConfig:
    """Of a pass over the keys of so many packed rows."""
    block_m = block(rows, 32 if block_d <= 64 else 16)
    block_n = 32 if block_d <= 128 else 16
    return AttentionConfig(block_m, block_n, block_d, num_warps=8, num_stages=1)


def has_wide_matrix_unit(target: Target) -> bool:
    """wgmma and tcgen05 read operands from shared memory; mma.sync and MFMA from registers.

    There the queries, an operand of each tile, stay in registers, in two layouts.
    """
    return target.arch in ("sm_90", "sm_100")


def lse_shape(q: torch.Tensor, kv_heads: int) -> tuple[int, ...]:
    """Of q (B, L, H, D): packed rows. In fp32 the largest score is there too, beside the rest."""
    batch, seqlen, heads, _ = q.shape
    return (2 if q.dtype == torch.float32 else 1, kv_heads, batch, seqlen, heads // kv_heads)
