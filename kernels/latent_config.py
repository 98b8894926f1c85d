"""Launch configurations of a resampler's attention, from shapes alone."""

import dataclasses

import torch

from flamingo_fast.kernels.attention_config import (
    AttentionConfig,
    block,
    fp32_config,
    has_wide_matrix_unit,
)
from flamingo_fast.kernels.launch import Target, cdiv
from flamingo_fast.kernels.tuned import tunable

# Media keys of a split. A program of 64 latents also reads its queries again and writes the sums
# that are then read: beside its keys and values that is a third, and on an H100 still faster than
# twice as many keys, for one medium of 8192 keys and 8 heads by 7 % forward, 30 % backward.
SPLIT_KEYS = 512

# Keys up to which, and programs of a medium from which on, keys are not split.
_FEW_KEYS, _ENOUGH_PROGRAMS = 1024, 64


def key_splits(programs_per_medium: int, num_keys: int) -> int:
    """How many programs share the keys of a block of rows; the last one has the latents too.

    From one medium's shapes, so that its bits do not depend on the batch.
    """
    if num_keys <= _FEW_KEYS or programs_per_medium >= _ENOUGH_PROGRAMS:
        return 1
    return cdiv(num_keys, SPLIT_KEYS)


def one_pass(rows_per_medium: int, head_dim: int, dtype: torch.dtype, target: Target) -> bool:
    """Whether one program of the backward holds all rows that share a key/value head.

    Then gradients of a tile of keys are final where they are computed, and no key is read twice.
    """
    wide = has_wide_matrix_unit(target) and dtype != torch.float32
    return head_dim <= 128 and rows_per_medium <= (128 if wide else 64)


# A split's keys are whole tiles of any of these.
_TUNED = dict(fixed=("BLOCK_D",), bounds={"BLOCK_M": (16, 128), "BLOCK_N": (16, 128)})


@tunable("latent_fwd", module="latent_forward", **_TUNED)
def forward_config(
    rows_per_medium: int, head_dim: int, dtype: torch.dtype, target: Target
) -> AttentionConfig:
    block_d = block(head_dim, 256)
    if dtype == torch.float32:
        return fp32_config(rows_per_medium, block_d)
    # On an H100 blocks of 64 rows that read the same keys, from its cache, are faster than of 128.
    one_block = block_d <= 128 and target.arch != "sm_90"
    block_m = block(rows_per_medium, 128 if one_block else 64)
    # 64 keys of 128 numbers spill where operands are in registers.
    wide = block_d <= 64 or (block_d <= 128 and has_wide_matrix_unit(target))
    block_n = 64 if wide and target.arch != "gfx942" else 32
    num_warps = 8 if block_m > 64 or block_d > 128 else 4
    return _tuned_config(block_m, block_n, block_d, num_warps, target)


def _refuses_backward(
    config: AttentionConfig,
    rows_per_medium: int,
    head_dim: int,
    dtype: torch.dtype,
    need_dkv: bool,
    target: Target,
) -> str | None:
    if need_dkv and config.BLOCK_M < rows_per_medium:
        return f"BLOCK_M: expected at least the {rows_per_medium} rows of one pass"
    return None


@tunable("latent_bwd", module="latent_backward", refuses=_refuses_backward, **_TUNED)
def backward_config(
    rows_per_medium: int, head_dim: int, dtype: torch.dtype, need_dkv: bool, target: Target
) -> AttentionConfig:
    """Of the one pass, and without need_dkv of the pass for dQ."""
    block_d = block(head_dim, 256)
    if dtype == torch.float32:
        config = fp32_config(rows_per_medium, block_d)
        block_m = block(rows_per_medium, 64) if need_dkv else config.BLOCK_M
        return dataclasses.replace(config, BLOCK_M=block_m, BLOCK_N=16)
    if block_d > 128:
        return _tuned_config(block(rows_per_medium, 32), 32, block_d, 8, target)
    if has_wide_matrix_unit(target):
        alone = target.arch == "sm_90" and not need_dkv
        block_m = block(rows_per_medium, 64 if alone else 128)
        narrow = need_dkv and block_m > 64
        few = block_m <= 64 and not (need_dkv and block_d > 64)
        config = _tuned_config(block_m, 32 if narrow else 64, block_d, 4 if few else 8, target)
        # A third stage would be faster by a sixth, and spill where keys are split.
        return dataclasses.replace(config, num_stages=2) if need_dkv and block_d > 64 else config
    block_n, num_warps = 32, 4
    if need_dkv and target.arch != "gfx942":
        block_n, num_warps = 16, 4 if block_d <= 64 else 8
    elif need_dkv and block_d > 64:
        # 32 keys leave room for one warp a SIMD of a CU, which nothing hides the loads of.
        block_n = 16
    return _tuned_config(block(rows_per_medium, 64), block_n, block_d, num_warps, target)


@tunable("latent_dkv", module="latent_backward", **_TUNED)
def dkv_config(
    rows_per_medium: int, head_dim: int, dtype: torch.dtype, target: Target
) -> AttentionConfig:
    block_d = block(head_dim, 256)
    if dtype == torch.float32:
        return fp32_config(16, block_d)
    block_m = block(rows_per_medium, 16 if target.arch == "gfx942" or block_d > 128 else 32)
    num_warps = 4 if target.arch == "sm_90" and block_d <= 128 else 8
    return _tuned_config(block_m, 64 if block_d <= 128 else 32, block_d, num_warps, target)


def _tuned_config(
    block_m: int, block_n: int, block_d: int, num_warps: int, target: Target
) -> AttentionConfig:
    num_stages = 3 if target.arch == "sm_90" else 2
    if target.arch == "gfx942" or block_d > 128:
        num_stages = 1
    return AttentionConfig(block_m, block_n, block_d, num_warps, num_stages, max_registers=255)
