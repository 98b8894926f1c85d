"""Launch configurations of attention to several media a token, from shapes alone."""

import dataclasses
import functools

import torch

from flamingo_fast.kernels.attention_config import (
    AttentionConfig,
    block,
    fp32_config,
    has_wide_matrix_unit,
)
from flamingo_fast.kernels.launch import Target, cdiv
from flamingo_fast.kernels.tuned import tunable

# Keys of a split, at least. A program also reads its queries again, and writes the sums that are
# then read: beside reading so many keys for its rows that is at most a sixth.
_SPLIT_KEYS, _SPLIT_KEYS_OF_A_ROW = 1024, 16

# Programs of a sample from which on its keys are not split.
_ENOUGH_PROGRAMS = 64


@dataclasses.dataclass(frozen=True)
class KeySplits:
    """A split has `keys` keys of each of `media` media; both are constants of a kernel."""

    media: int
    keys: int
    count: int


@functools.cache
def key_splits(programs_per_sample: int, block_m: int, num_keys: int, max_media: int) -> KeySplits:
    """Where a split begins follows from num_keys alone; more media add splits, and change none.

    So a row's bits depend neither on the batch nor on how many media its other samples have.
    """
    if programs_per_sample >= _ENOUGH_PROGRAMS:
        return KeySplits(media=1, keys=num_keys, count=1)
    split_keys = max(_SPLIT_KEYS, _SPLIT_KEYS_OF_A_ROW * block_m)
    media, keys = max(split_keys // num_keys, 1), min(split_keys, num_keys)
    return KeySplits(media, keys, cdiv(max_media, media) * cdiv(num_keys, keys))


def tiles_cross_media(num_keys: int, block_n: int) -> bool:
    """Whether tiles of keys cross media, since tiles of one medium would be less than 4/5 full."""
    return num_keys % block_n != 0 and num_keys < 4 * block_n


def _rows_class(rows: int) -> int:
    """What is tuned alike: up to 16 rows, 32, 64, and more."""
    return block(rows, 128)


# A split's keys are whole tiles of any of these.
_TUNED = dict(
    fixed=("BLOCK_D",),
    bounds={"BLOCK_M": (16, 128), "BLOCK_N": (16, 128)},
    classes={"rows_per_sample": _rows_class},
)


@tunable("several_media_fwd", module="several_media_forward", **_TUNED)
def forward_config(
    rows_per_sample: int, num_keys: int, head_dim: int, dtype: torch.dtype, target: Target
) -> AttentionConfig:
    block_d = block(head_dim, 256)
    if dtype == torch.float32:
        return fp32_config(rows_per_sample, block_d)
    block_m = block(rows_per_sample, 128 if block_d <= 128 else 64)
    # 64 keys beside 128 rows of 128 numbers spill but where accumulators serve four warps at once.
    wide = block_d <= 64 or (block_d <= 128 and target.arch == "sm_90") or block_m == 16
    block_n = 64 if wide else 32
    cross_media = tiles_cross_media(num_keys, block_n)
    return _tuned_config(block_m, 32 if cross_media else block_n, block_d, cross_media, target)


@tunable("several_media_dq", module="several_media_backward", **_TUNED)
def dq_config(
    rows_per_sample: int, num_keys: int, head_dim: int, dtype: torch.dtype, target: Target
) -> AttentionConfig:
    block_d = block(head_dim, 256)
    if dtype == torch.float32:
        return fp32_config(rows_per_sample, block_d)
    wide = block_d <= 64 or (block_d <= 128 and has_wide_matrix_unit(target))
    block_m = block(rows_per_sample, 128 if wide else 64)
    return _tuned_config(block_m, 32, block_d, tiles_cross_media(num_keys, 32), target)


@tunable("several_media_dkv", module="several_media_backward", **_TUNED)
def dkv_config(
    rows_per_sample: int, num_keys: int, head_dim: int, dtype: torch.dtype, target: Target
) -> AttentionConfig:
    block_d = block(head_dim, 256)
    if dtype == torch.float32:
        return fp32_config(16, block_d)
    block_n = 64 if block_d <= 128 else 32
    cross_media = tiles_cross_media(num_keys, block_n)
    # A mask for each score takes registers, and fewer keys would read rows more often.
    most_rows = 16 if target.arch == "gfx942" or cross_media else 32
    return _tuned_config(block(rows_per_sample, most_rows), block_n, block_d, cross_media, target)


def _tuned_config(
    block_m: int, block_n: int, block_d: int, cross_media: bool, target: Target
) -> AttentionConfig:
    one_stage = target.arch == "gfx942" or block_d > 128 or cross_media
    return AttentionConfig(
        block_m,
        block_n,
        block_d,
        num_warps=4 if block_m == 16 and target.arch != "gfx942" and not cross_media else 8,
        num_stages=1 if one_stage else 2,
        max_registers=255,
    )
