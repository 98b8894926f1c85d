"""Launch configurations of attention where a token attends to one medium, from shapes alone."""

import dataclasses

import torch

from flamingo_fast.kernels.attention_config import has_wide_matrix_unit
from flamingo_fast.kernels.launch import Target, next_power_of_2
from flamingo_fast.kernels.tuned import tunable
from flamingo_fast.schedule import TILE_ROWS


@dataclasses.dataclass(frozen=True)
class OneMediumConfig:
    """BLOCK_M counts packed query rows; TRANSPOSE_DQ computes dQ as the transpose of K^T dS^T."""

    BLOCK_M: int
    BLOCK_R: int
    BLOCK_D: int
    TRANSPOSE_DQ: bool
    num_warps: int
    num_stages: int
    max_registers: int | None = None


def _block(size: int) -> int:
    return max(next_power_of_2(size), 16)


def _block_m(rows: float) -> int:
    """Half a tile of each medium is wasted, so tiles are small beside its rows.

    From shapes: the rows that a medium really has are on the GPU, and nobody waits to read them.
    """
    return TILE_ROWS if rows > 24 else 16


def _refuses(config: OneMediumConfig, *arguments: object) -> str | None:
    *_, target = arguments
    # With tiles of 16 rows Triton 3.6 makes a race of it, seen on an H100.
    if config.num_stages == 1 and target.arch == "sm_90" and torch.float32 not in arguments:
        return "num_stages: 1 is wrong on sm_90"
    return None


_FIXED = ("BLOCK_R", "BLOCK_D")
_TUNED = dict(bounds={"BLOCK_M": (16, TILE_ROWS)}, refuses=_refuses)


@tunable(
    "one_medium_fwd",
    module="one_medium_forward",
    fixed=(*_FIXED, "TRANSPOSE_DQ"),
    classes={"rows_per_sample": _block_m},
    **_TUNED,
)
def forward_config(
    rows_per_sample: int, num_keys: int, head_dim: int, dtype: torch.dtype, target: Target
) -> OneMediumConfig:
    """Not from the number of media, a mean over the batch: a row's bits must not depend on that."""
    block_r, block_d = _block(num_keys), _block(head_dim)
    if dtype == torch.float32:
        return OneMediumConfig(16, block_r, block_d, True, num_warps=8, num_stages=1)
    # What has more than 64 keys of 128 elements spills on sm_100 with 4 warps.
    num_warps = 8 if block_r * block_d > 64 * 128 and target.arch == "sm_100" else 4
    block_m = _block_m(rows_per_sample)
    # Never one on sm_90: see _refuses.
    num_stages = 1 if target.arch == "gfx942" else 2
    return OneMediumConfig(block_m, block_r, block_d, True, num_warps, num_stages)


@tunable(
    "one_medium_bwd",
    module="one_medium_backward",
    fixed=_FIXED,
    classes={"rows_per_medium": _block_m},
    **_TUNED,
)
def backward_config(
    rows_per_medium: float,
    num_keys: int,
    head_dim: int,
    dtype: torch.dtype,
    need_dkv: bool,
    target: Target,
) -> OneMediumConfig:
    """Two blocks an SM for 64 keys of up to 128 elements, on sm_80 and sm_90 too.

    The fp32 sums of dK and dV fill 128 registers a thread at 64 keys of 128 elements with 4 warps.
    128 keys take 8 warps, at 64 elements too where matrix instructions read registers, and with
    them one block an SM.
    """
    block_r, block_d = _block(num_keys), _block(head_dim)
    if dtype == torch.float32:
        return OneMediumConfig(16, block_r, block_d, False, num_warps=8, num_stages=1)
    block_m = _block_m(rows_per_medium)
    wide = has_wide_matrix_unit(target)
    if block_d > 128 or (block_r * block_d > 64 * 64 and not wide):
        block_m = 16  # 32 rows spill
    num_warps = 4 if block_r * block_d <= 64 * 128 else 8
    if need_dkv and block_r > 64 and not wide:
        num_warps = 8
    # On sm_100 a second stage doubles the code and spills in the dQ-only kernel.
    num_stages = 1 if target.arch in ("sm_100", "gfx942") else 2
    # For a third block an SM ptxas would spill.
    max_registers = 255 if target.arch == "sm_100" and block_r > 64 else None
    return OneMediumConfig(block_m, block_r, block_d, wide, num_warps, num_stages, max_registers)
