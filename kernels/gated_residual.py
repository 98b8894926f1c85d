"""x + tanh(gate) * y and its backward: three elements moved per element each way.

The backward writes dy and, for the gate, one fp32 partial sum a program. dx is dout itself.
"""

import dataclasses
import functools

import torch
import triton
import triton.language as tl

from flamingo_fast.kernels.launch import cdiv, launch, next_power_of_2, target_of
from flamingo_fast.kernels.partials import Partials
from flamingo_fast.kernels.rows import RowTensor, as_rows, row_offsets
from flamingo_fast.kernels.tanh import tanh


@dataclasses.dataclass(frozen=True)
class GatedResidualConfig:
    BLOCK_M: int
    BLOCK_N: int
    num_warps: int
    programs_per_sm: int


@functools.cache
def config_for(width: int) -> GatedResidualConfig:
    """Sixteen elements a thread: two 128-bit accesses of each 16-bit tensor."""
    block_n = min(next_power_of_2(width), 512)
    return GatedResidualConfig(2048 // block_n, block_n, num_warps=4, programs_per_sm=8)


@dataclasses.dataclass(frozen=True)
class _Tiling:
    """Rows of `width` elements; when `flat`, the last row may end early, at element `numel`."""

    flat: bool
    numel: int
    rows: int
    width: int
    inner: int
    views: list[RowTensor]


def _tile(vector_gate: bool, *tensors: torch.Tensor) -> _Tiling:
    numel = tensors[0].numel()
    if not vector_gate and all(tensor.is_contiguous() for tensor in tensors):
        width = 512
        views = [RowTensor(tensor, width, 0) for tensor in tensors]
        return _Tiling(True, numel, cdiv(numel, width), width, 1, views)
    rows, width, inner, views = as_rows(*tensors)
    return _Tiling(False, numel, rows, width, inner, views)


@triton.jit
def _tile_mask(offs_m, offs_n, numel, rows, width, FLAT: tl.constexpr):
    if FLAT:
        return offs_m[:, None] * width + offs_n[None, :] < numel
    return (offs_m < rows)[:, None] & (offs_n < width)[None, :]


@triton.jit(do_not_specialize=["rows"])
def _gated_residual_fwd_kernel(
    X,
    Y,
    GATE,
    OUT,
    numel,
    rows,
    width,
    inner,
    stride_x_outer,
    stride_x_inner,
    stride_y_outer,
    stride_y_inner,
    FLAT: tl.constexpr,
    VECTOR_GATE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    col_blocks = tl.cdiv(width, BLOCK_N)
    pid = tl.program_id(0).to(tl.int64)
    offs_m = (pid // col_blocks) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = (pid % col_blocks) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask = _tile_mask(offs_m, offs_n, numel, rows, width, FLAT)
    if VECTOR_GATE:
        gate = tl.load(GATE + offs_n, mask=offs_n < width, other=0.0).to(tl.float32)[None, :]
    else:
        gate = tl.load(GATE).to(tl.float32)
    x_rows = row_offsets(offs_m, inner, stride_x_outer, stride_x_inner)
    y_rows = row_offsets(offs_m, inner, stride_y_outer, stride_y_inner)
    x = tl.load(X + x_rows[:, None] + offs_n[None, :], mask=mask, other=0.0).to(tl.float32)
    y = tl.load(Y + y_rows[:, None] + offs_n[None, :], mask=mask, other=0.0).to(tl.float32)
    out = x + tanh(gate) * y
    out_rows = offs_m * width
    tl.store(OUT + out_rows[:, None] + offs_n[None, :], out.to(OUT.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["rows", "rows_per_program"])
def _gated_residual_bwd_kernel(
    DOUT,
    Y,
    GATE,
    DY,
    PARTIALS,
    SCALARS,
    numel,
    rows,
    width,
    inner,
    rows_per_program,
    stride_dout_outer,
    stride_dout_inner,
    stride_y_outer,
    stride_y_inner,
    FLAT: tl.constexpr,
    VECTOR_GATE: tl.constexpr,
    NEED_DY: tl.constexpr,
    NEED_DGATE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    col_blocks = tl.cdiv(width, BLOCK_N)
    pid = tl.program_id(0).to(tl.int64)
    chunk = pid // col_blocks
    offs_n = (pid % col_blocks) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n = offs_n < width
    if NEED_DY:
        if VECTOR_GATE:
            gate = tl.load(GATE + offs_n, mask=mask_n, other=0.0).to(tl.float32)[None, :]
        else:
            gate = tl.load(GATE).to(tl.float32)
        tanh_gate = tanh(gate)
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    first = chunk * rows_per_program
    for start in range(first, tl.minimum(first + rows_per_program, rows), BLOCK_M):
        offs_m = start + tl.arange(0, BLOCK_M)
        mask = _tile_mask(offs_m, offs_n, numel, rows, width, FLAT)
        dout_rows = row_offsets(offs_m, inner, stride_dout_outer, stride_dout_inner)
        dout = tl.load(DOUT + dout_rows[:, None] + offs_n[None, :], mask=mask, other=0.0)
        dout = dout.to(tl.float32)
        if NEED_DY:
            dy = (tanh_gate * dout).to(DY.dtype.element_ty)
            tl.store(DY + (offs_m * width)[:, None] + offs_n[None, :], dy, mask=mask)
        if NEED_DGATE:
            y_rows = row_offsets(offs_m, inner, stride_y_outer, stride_y_inner)
            y = tl.load(Y + y_rows[:, None] + offs_n[None, :], mask=mask, other=0.0)
            acc += dout * y.to(tl.float32)
    if NEED_DGATE:
        if VECTOR_GATE:
            tl.store(PARTIALS + chunk * width + offs_n, tl.sum(acc, 0), mask=mask_n)
        else:
            tl.store(SCALARS + pid, tl.sum(acc))


def gated_residual_fwd(x: torch.Tensor, y: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
    gate = gate.contiguous()
    vector_gate = gate.numel() > 1
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    tiling = _tile(vector_gate, x, y)
    config = config_for(tiling.width)
    x_view, y_view = tiling.views
    grid = cdiv(tiling.rows, config.BLOCK_M) * cdiv(tiling.width, config.BLOCK_N)
    launch(
        _gated_residual_fwd_kernel,
        (grid,),
        x_view.tensor,
        y_view.tensor,
        gate,
        out,
        tiling.numel,
        tiling.rows,
        tiling.width,
        tiling.inner,
        x_view.stride_outer,
        x_view.stride_inner,
        y_view.stride_outer,
        y_view.stride_inner,
        FLAT=tiling.flat,
        VECTOR_GATE=vector_gate,
        BLOCK_M=config.BLOCK_M,
        BLOCK_N=config.BLOCK_N,
        num_warps=config.num_warps,
    )
    return out


def gated_residual_bwd(
    dout: torch.Tensor,
    y: torch.Tensor | None,
    gate: torch.Tensor,
    y_dtype: torch.dtype,
    need_dy: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(dy, dgate); dgate needs y. What is not needed comes back empty and costs nothing."""
    gate = gate.contiguous()
    vector_gate = gate.numel() > 1
    need_dgate = y is not None
    dy = torch.empty(dout.shape if need_dy else (0,), dtype=y_dtype, device=dout.device)
    if not need_dy and not need_dgate:
        return dy, dout.new_empty(0, dtype=torch.float32)
    tiling = _tile(vector_gate, dout, dout if y is None else y)
    config = config_for(tiling.width)
    col_blocks = cdiv(tiling.width, config.BLOCK_N)
    row_blocks = cdiv(tiling.rows, config.BLOCK_M)
    wanted = cdiv(target_of(dout).num_sms * config.programs_per_sm, col_blocks)
    blocks_per_program = max(cdiv(row_blocks, wanted), 1)
    chunks = cdiv(row_blocks, blocks_per_program)
    partials = Partials(
        dout,
        chunks,
        tiling.width,
        num_scalars=chunks * col_blocks,
        gate=gate if need_dgate else None,
    )
    dout_view, y_view = tiling.views
    launch(
        _gated_residual_bwd_kernel,
        (chunks * col_blocks,),
        dout_view.tensor,
        y_view.tensor,
        gate,
        dy,
        partials.rows,
        partials.scalars,
        tiling.numel,
        tiling.rows,
        tiling.width,
        tiling.inner,
        blocks_per_program * config.BLOCK_M,
        dout_view.stride_outer,
        dout_view.stride_inner,
        y_view.stride_outer,
        y_view.stride_inner,
        FLAT=tiling.flat,
        VECTOR_GATE=vector_gate,
        NEED_DY=need_dy,
        NEED_DGATE=need_dgate,
        BLOCK_M=config.BLOCK_M,
        BLOCK_N=config.BLOCK_N,
        num_warps=config.num_warps,
    )
    # Without slots nothing is launched.
    return dy, partials.sum()[2]
