"""Small kernels with one bug each, switched on by `planted`, and what must catch it.

The line that goes wrong ends in `# caught here`. With planted=False a kernel is right, and nothing
may complain about it.
"""

import dataclasses
from collections.abc import Callable

import torch
import triton
import triton.language as tl

from flamingo_fast.testing.guard import (
    GuardError,
    IntegerOverflowError,
    NondeterminismError,
    OutOfBoundsError,
    Poison,
    RaceError,
)

BLOCK = 64


@triton.jit
def _off_by_one_kernel(X, OUT, numel, BLOCK: tl.constexpr, planted: tl.constexpr):
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    end = numel + 1 if planted else numel
    x = tl.load(X + offs, mask=offs < end, other=0.0)  # caught here
    tl.store(OUT + offs, x + x, mask=offs < numel)


@triton.jit
def _missing_mask_kernel(X, OUT, numel, BLOCK: tl.constexpr, planted: tl.constexpr):
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(X + offs, mask=offs < numel, other=0.0)
    if planted:
        tl.store(OUT + offs, x + x)  # caught here
    else:
        tl.store(OUT + offs, x + x, mask=offs < numel)


@triton.jit
def _missing_other_kernel(X, OUT, numel, BLOCK: tl.constexpr, planted: tl.constexpr):
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < numel
    x = tl.load(X + offs, mask=mask) if planted else tl.load(X + offs, mask=mask, other=0.0)
    tl.store(OUT + offs, tl.sum(x, axis=0) + 0.0 * x, mask=mask)


@triton.jit
def _unwritten_tile_kernel(X, OUT, numel, BLOCK: tl.constexpr, planted: tl.constexpr):
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    last = tl.num_programs(0) - 1 if planted else tl.num_programs(0)
    if tl.program_id(0) < last:
        x = tl.load(X + offs, mask=offs < numel, other=0.0)
        tl.store(OUT + offs, x + x, mask=offs < numel)


@triton.jit
def _two_writers_kernel(X, OUT, numel, BLOCK: tl.constexpr, planted: tl.constexpr):
    start = tl.program_id(0) * BLOCK
    offs = start + tl.arange(0, 2 * BLOCK)
    end = start + BLOCK + 1 if planted else start + BLOCK
    mask = offs < tl.minimum(end, numel)
    x = tl.load(X + offs, mask=mask, other=0.0)
    tl.store(OUT + offs, x + x, mask=mask)  # caught here


@triton.jit
def _colliding_lanes_kernel(X, OUT, numel, BLOCK: tl.constexpr, planted: tl.constexpr):
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < numel
    x = tl.load(X + offs, mask=mask, other=0.0)
    offs = offs // 2 * 2 if planted else offs
    tl.store(OUT + offs, x + x, mask=mask)  # caught here


@triton.jit
def _float_atomic_kernel(X, OUT, numel, BLOCK: tl.constexpr, planted: tl.constexpr):
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < numel
    x = tl.load(X + offs, mask=mask, other=0.0)
    if planted:
        tl.atomic_add(OUT + offs, x + x, mask=mask)  # caught here
    else:
        tl.store(OUT + offs, x + x, mask=mask)


@triton.jit
def _float_atomic_max_kernel(X, OUT, numel, BLOCK: tl.constexpr, planted: tl.constexpr):
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < numel
    x = tl.load(X + offs, mask=mask, other=0.0)
    if planted:
        tl.atomic_max(OUT + offs, x + x, mask=mask)  # caught here
    else:
        tl.store(OUT + offs, x + x, mask=mask)


@triton.jit
def _softmax_kernel(X, OUT, numel, BLOCK: tl.constexpr, planted: tl.constexpr):
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < numel
    if planted:
        x = tl.load(X + offs, mask=mask)
    else:
        x = tl.load(X + offs, mask=mask, other=float("-inf"))
    p = tl.where(mask, tl.exp(x - tl.max(x, axis=0)), 0.0)
    tl.store(OUT + offs, p / tl.sum(p, axis=0), mask=mask)


def _one_program_a_block(
    kernel: triton.JITFunction,
) -> Callable[[torch.Tensor, bool], torch.Tensor]:
    def run(x: torch.Tensor, planted: bool) -> torch.Tensor:
        out = torch.empty_like(x)
        kernel[(triton.cdiv(x.numel(), BLOCK),)](x, out, x.numel(), BLOCK=BLOCK, planted=planted)
        return out

    return run


@triton.jit
def _halo_kernel(X, OUT, numel, BLOCK: tl.constexpr):
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    after = tl.load(X + offs + 1, mask=offs + 1 < numel, other=0.0)  # caught here
    x = tl.load(X + offs, mask=offs < numel, other=0.0)
    tl.store(OUT + offs, x + x + 0.0 * after, mask=offs < numel)  # caught here


def _halo_in_place(x: torch.Tensor, planted: bool) -> torch.Tensor:
    """A program loads what the next one overwrites: before or after, depending on the order."""
    x = x.clone()
    out = x if planted else torch.empty_like(x)
    _halo_kernel[(triton.cdiv(x.numel(), BLOCK),)](x, out, x.numel(), BLOCK=BLOCK)
    return out


@triton.jit
def _row_gap_kernel(X, OUT, width, stride, BLOCK: tl.constexpr, planted: tl.constexpr):
    row = tl.program_id(0)
    cols = tl.arange(0, BLOCK)
    end = stride if planted else width
    x = tl.load(X + row * stride + cols, mask=cols < end, other=0.0)  # caught here
    tl.store(OUT + row * width + cols, x + x, mask=cols < width)


def _row_gap(x: torch.Tensor, planted: bool) -> torch.Tensor:
    """Loads what lies between the rows of a view: inside its storage, outside the tensor."""
    rows = x.view(-1, 50)
    padded = rows.new_zeros(len(rows), 53)[:, :50].copy_(rows)
    out = torch.empty_like(x)
    _row_gap_kernel[(len(rows),)](padded, out, 50, 53, BLOCK=BLOCK, planted=planted)
    return out


@triton.jit
def _offset_overflow_kernel(
    X, OUT, numel, scale, ROWS: tl.constexpr, BLOCK: tl.constexpr, planted: tl.constexpr
):
    row = tl.program_id(0) * ROWS
    if not planted:
        row = row.to(tl.int64)
    row = row * scale // scale  # caught here
    offs = row * BLOCK + tl.arange(0, ROWS * BLOCK)
    x = tl.load(X + offs, mask=offs < numel, other=0.0)
    tl.store(OUT + offs, x + x, mask=offs < numel)


@triton.jit
def _shift_overflow_kernel(X, OUT, numel, BLOCK: tl.constexpr, planted: tl.constexpr):
    row = tl.program_id(0)
    if not planted:
        row = row.to(tl.int64)
    start = (row << 30) >> 30  # caught here
    offs = start * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(X + offs, mask=offs < numel, other=0.0)
    tl.store(OUT + offs, x + x, mask=offs < numel)


@triton.jit
def _narrowing_cast_kernel(X, OUT, numel, BLOCK: tl.constexpr, planted: tl.constexpr):
    start = tl.program_id(0).to(tl.int64) << 32
    if planted:
        start = start.to(tl.int32)  # caught here
    offs = (start.to(tl.int64) >> 32) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(X + offs, mask=offs < numel, other=0.0)
    tl.store(OUT + offs, x + x, mask=offs < numel)


def _offset_overflow(rows: int) -> Callable[[torch.Tensor, bool], torch.Tensor]:
    def run(x: torch.Tensor, planted: bool) -> torch.Tensor:
        out = torch.empty_like(x)
        grid = (triton.cdiv(x.numel(), rows * BLOCK),)
        _offset_overflow_kernel[grid](
            x, out, x.numel(), 2**30, ROWS=rows, BLOCK=BLOCK, planted=planted
        )
        return out

    return run


def _doubled(x: torch.Tensor) -> torch.Tensor:
    return x + x


def _block_sums(x: torch.Tensor) -> torch.Tensor:
    return torch.cat([block.sum().expand(block.shape) for block in x.split(BLOCK)])


def _block_softmax(x: torch.Tensor) -> torch.Tensor:
    return torch.cat([block.softmax(0) for block in x.split(BLOCK)])


@dataclasses.dataclass(frozen=True)
class PlantedBug:
    """`run(x, planted)` gives `expected(x)` if not planted.

    error None: the output tells, under a guard with this `poison`.
    """

    run: Callable[[torch.Tensor, bool], torch.Tensor]
    error: type[GuardError] | None
    expected: Callable[[torch.Tensor], torch.Tensor] = _doubled
    poison: Poison = "nan"


PLANTED_BUGS = {
    "off_by_one_load": PlantedBug(_one_program_a_block(_off_by_one_kernel), OutOfBoundsError),
    "missing_mask": PlantedBug(_one_program_a_block(_missing_mask_kernel), OutOfBoundsError),
    "gap_between_rows": PlantedBug(_row_gap, OutOfBoundsError),
    "missing_other": PlantedBug(_one_program_a_block(_missing_other_kernel), None, _block_sums),
    "softmax_without_other": PlantedBug(
        _one_program_a_block(_softmax_kernel), None, _block_softmax, poison="huge"
    ),
    "unwritten_tile": PlantedBug(_one_program_a_block(_unwritten_tile_kernel), None),
    "two_writers": PlantedBug(_one_program_a_block(_two_writers_kernel), RaceError),
    "colliding_lanes": PlantedBug(_one_program_a_block(_colliding_lanes_kernel), RaceError),
    "halo_in_place": PlantedBug(_halo_in_place, RaceError),
    # 4 * 2**30 wraps to 0: every program reads and writes the first rows, all in bounds.
    "overflow_in_bounds": PlantedBug(_offset_overflow(rows=4), IntegerOverflowError),
    "overflow_out_of_bounds": PlantedBug(_offset_overflow(rows=1), IntegerOverflowError),
    "shift_overflow": PlantedBug(
        _one_program_a_block(_shift_overflow_kernel), IntegerOverflowError
    ),
    "narrowing_cast": PlantedBug(
        _one_program_a_block(_narrowing_cast_kernel), IntegerOverflowError
    ),
    "float_atomic": PlantedBug(_one_program_a_block(_float_atomic_kernel), NondeterminismError),
    "float_atomic_max": PlantedBug(
        _one_program_a_block(_float_atomic_max_kernel), NondeterminismError
    ),
}


@triton.jit
def _to_bf16_kernel(X, OUT, numel, BLOCK: tl.constexpr, planted: tl.constexpr):
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(X + offs, mask=offs < numel, other=0.0)
    if planted:
        high_half = (x.to(tl.uint32, bitcast=True) >> 16).to(tl.uint16)
        rounded = high_half.to(tl.bfloat16, bitcast=True)
    else:
        rounded = x.to(tl.bfloat16)
    tl.store(OUT + offs, rounded, mask=offs < numel)


def to_bf16(x: torch.Tensor, planted: bool) -> torch.Tensor:
    """fp32 to bf16; planted: truncated instead of rounded."""
    out = torch.empty_like(x, dtype=torch.bfloat16)
    grid = (triton.cdiv(x.numel(), BLOCK),)
    _to_bf16_kernel[grid](x, out, x.numel(), BLOCK=BLOCK, planted=planted)
    return out


@triton.jit
def _tanh_kernel(X, OUT, numel, BLOCK: tl.constexpr, FORM: tl.constexpr):
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(X + offs, mask=offs < numel, other=0.0)
    e = tl.exp(-2.0 * tl.abs(x))
    y = (1.0 - e) / (1.0 + e)
    y = tl.where(x < 0, -y, y)
    if FORM == "sigmoid":
        y = 2.0 * tl.sigmoid(2.0 * x) - 1.0
    if FORM == "series":
        x2 = x * x
        odd = 1.0 + x2 * (-1 / 3 + x2 * (2 / 15 + x2 * (-17 / 315 + x2 * (62 / 2835))))
        y = tl.where(tl.abs(x) < 0.25, x * odd, y)
    tl.store(OUT + offs, y, mask=offs < numel)


def tanh(x: torch.Tensor, form: str) -> torch.Tensor:
    """tanh of fp32. `form`: "exp" and "sigmoid" cancel near 0, "series" does not."""
    out = torch.empty_like(x)
    _tanh_kernel[(triton.cdiv(x.numel(), BLOCK),)](x, out, x.numel(), BLOCK=BLOCK, FORM=form)
    return out
