"""Launch configurations of attention to several media a token, from shapes alone."""

import dataclasses

import torch
import triton

from flamingo_fast.kernels.launch import Target

# Keys of a split. Beside reading them, writing and reading the sums of a split of 16 rows is 3 %.
_SPLIT_KEYS = 1024

# Programs of a sample from which on its keys are not split.
_ENOUGH_PROGRAMS = 64


@dataclasses.dataclass(frozen=True)
class SeveralMediaConfig:
    """BLOCK_M counts packed query rows, BLOCK_N keys of one medium."""

    BLOCK_M: int
    BLOCK_N: int
    BLOCK_D: int
    num_warps: int
    num_stages: int
    max_registers: int | None = None


@dataclasses.dataclass(frozen=True)
class KeySplits:
    """A split has `keys` keys of each of `media` media; both are constants of a kernel."""

    media: int
    keys: int
    count: int


def key_splits(programs_per_sample: int, num_keys: int, max_media: int) -> KeySplits:
    """Where a split begins follows from num_keys alone; more media add splits, and change none.

    So a row's bits depend neither on the batch nor on how many media its other samples have.
    """
    if programs_per_sample >= _ENOUGH_PROGRAMS:
        return KeySplits(media=1, keys=num_keys, count=1)
    media, keys = max(_SPLIT_KEYS // num_keys, 1), min(_SPLIT_KEYS, num_keys)
    return KeySplits(media, keys, triton.cdiv(max_media, media) * triton.cdiv(num_keys, keys))


def _block(size: int, most: int) -> int:
    return min(max(triton.next_power_of_2(size), 16), most)


def forward_config(
    rows_per_sample: int, num_keys: int, head_dim: int, dtype: torch.dtype, target: Target
) -> SeveralMediaConfig:
    block_d = _block(head_dim, 256)
    if dtype == torch.float32:
        block_m, block_n = _block(rows_per_sample, 32), _block(num_keys, 32)
        return SeveralMediaConfig(block_m, block_n, block_d, num_warps=8, num_stages=1)
    block_m = _block(rows_per_sample, 128 if block_d <= 128 else 64)
    block_n = _block(num_keys, 64 if block_d <= 128 else 32)
    num_warps = 8 if block_m * block_d > 64 * 128 else 4
    num_stages = 1 if target.arch == "gfx942" else 2
    return SeveralMediaConfig(block_m, block_n, block_d, num_warps, num_stages)


def dq_config(
    rows_per_sample: int, num_keys: int, head_dim: int, dtype: torch.dtype, target: Target
) -> SeveralMediaConfig:
    return forward_config(rows_per_sample, num_keys, head_dim, dtype, target)


def dkv_config(
    rows_per_sample: int, num_keys: int, head_dim: int, dtype: torch.dtype, target: Target
) -> SeveralMediaConfig:
    block_d = _block(head_dim, 256)
    if dtype == torch.float32:
        block_m, block_n = _block(rows_per_sample, 16), _block(num_keys, 32)
        return SeveralMediaConfig(block_m, block_n, block_d, num_warps=8, num_stages=1)
    block_m = _block(rows_per_sample, 64 if block_d <= 64 else 32)
    block_n = _block(num_keys, 64)
    num_warps = 8 if block_n * block_d > 64 * 64 else 4
    num_stages = 1 if target.arch == "gfx942" else 2
    return SeveralMediaConfig(block_m, block_n, block_d, num_warps, num_stages)
