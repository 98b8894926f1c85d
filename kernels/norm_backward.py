"""Backward of the norms, alone or of a tanh-gated residual.

A program walks rows with its weight in registers and keeps fp32 sums for the gradients of weight,
bias and gate: one pass over the incoming gradients, the normalised input and y, which writes dx
and dy. Above `WIDEST_KEPT` columns the sums would spill; then the row kernel writes dx and dy, and
a second kernel reads its inputs again, by columns. The sum for a scalar gate never moves there.
"""

import dataclasses

import torch
import triton
import triton.language as tl

from flamingo_fast.kernels.launch import Target, cdiv, launch, next_power_of_2, target_of
from flamingo_fast.kernels.norm_config import (
    MAX_REGISTERS,
    TUNED,
    WIDEST_KEPT,
    NormConfig,
    load_gate,
    load_parameter,
)
from flamingo_fast.kernels.partials import Partials
from flamingo_fast.kernels.rows import RowTensor, as_rows, contiguous, row_offsets
from flamingo_fast.kernels.tanh import tanh
from flamingo_fast.kernels.tuned import tunable


@tunable("norm_bwd", module="norm_backward", **TUNED)
def backward_config(width: int, dtype: torch.dtype, target: Target) -> NormConfig:
    """As many programs as an SM holds, at most two: each adds a row of fp32 partials both ways."""
    block_n = next_power_of_2(width)
    num_warps = 8 if block_n <= 2048 else 16
    return NormConfig(max(2048 // block_n, 1), block_n, num_warps, 16 // num_warps)


@dataclasses.dataclass(frozen=True)
class ColumnsConfig:
    BLOCK_M: int
    BLOCK_N: int
    num_warps: int


COLUMNS = ColumnsConfig(BLOCK_M=16, BLOCK_N=128, num_warps=4)


@triton.jit(do_not_specialize=["rows"])
def _norm_bwd_kernel(
    DRESIDUAL,
    DNORMED,
    X,
    Y,
    GATE,
    WEIGHT,
    MEAN,
    RSTD,
    DX,
    DY,
    PARTIALS,
    SCALARS,
    rows,
    width,
    slots,
    inner,
    stride_dresidual_outer,
    stride_dresidual_inner,
    stride_dnormed_outer,
    stride_dnormed_inner,
    stride_x_outer,
    stride_x_inner,
    stride_y_outer,
    stride_y_inner,
    RMS: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    HAS_DRESIDUAL: tl.constexpr,
    VECTOR_GATE: tl.constexpr,
    NEED_DX: tl.constexpr,
    NEED_DY: tl.constexpr,
    WEIGHT_SLOT: tl.constexpr,
    BIAS_SLOT: tl.constexpr,
    VECTOR_GATE_SLOT: tl.constexpr,
    SCALAR_GATE: tl.constexpr,
    KEEP_PARAMETERS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    offs_n = tl.arange(0, BLOCK_N)
    mask_n = offs_n < width
    inv_width = 1.0 / width
    if HAS_WEIGHT and KEEP_PARAMETERS:
        weight = load_parameter(WEIGHT, offs_n, mask_n)
    if NEED_DY and (KEEP_PARAMETERS or not VECTOR_GATE):
        tanh_gate = tanh(load_gate(GATE, offs_n, mask_n, VECTOR_GATE))
    if WEIGHT_SLOT >= 0:
        dweight = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    if BIAS_SLOT >= 0:
        dbias = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    if VECTOR_GATE_SLOT >= 0:
        dgate = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    if SCALAR_GATE:
        dgate = tl.zeros((BLOCK_M,), tl.float32)
    for block in range(tl.program_id(0), tl.cdiv(rows, BLOCK_M), tl.num_programs(0)):
        offs_m = block * BLOCK_M + tl.arange(0, BLOCK_M)
        mask_m = offs_m < rows
        mask = mask_m[:, None] & mask_n[None, :]
        out_offs = (offs_m.to(tl.int64) * width)[:, None] + offs_n[None, :]
        x_rows = row_offsets(offs_m, inner, stride_x_outer, stride_x_inner)
        xhat = tl.load(X + x_rows[:, None] + offs_n[None, :], mask=mask, other=0.0).to(tl.float32)
        dnormed_rows = row_offsets(offs_m, inner, stride_dnormed_outer, stride_dnormed_inner)
        dnormed = tl.load(DNORMED + dnormed_rows[:, None] + offs_n[None, :], mask=mask, other=0.0)
        dnormed = dnormed.to(tl.float32)
        rstd = tl.load(RSTD + offs_m, mask=mask_m, other=0.0)
        if not RMS:
            mean = tl.load(MEAN + offs_m, mask=mask_m, other=0.0)
            xhat = tl.where(mask_n[None, :], xhat - mean[:, None], 0.0)
        xhat = xhat * rstd[:, None]
        if WEIGHT_SLOT >= 0:
            dweight += dnormed * xhat
        if BIAS_SLOT >= 0:
            dbias += dnormed
        if NEED_DX or NEED_DY or VECTOR_GATE_SLOT >= 0 or SCALAR_GATE:
            if HAS_WEIGHT:
                if not KEEP_PARAMETERS:
                    weight = load_parameter(WEIGHT, offs_n, mask_n)
                dnormed = dnormed * weight
            dx = dnormed - xhat * (tl.sum(dnormed * xhat, 1) * inv_width)[:, None]
            if not RMS:
                dx = dx - (tl.sum(dnormed, 1) * inv_width)[:, None]
            dx = dx * rstd[:, None]
            if HAS_DRESIDUAL:
                dresidual_rows = row_offsets(
                    offs_m, inner, stride_dresidual_outer, stride_dresidual_inner
                )
                dresidual = tl.load(
                    DRESIDUAL + dresidual_rows[:, None] + offs_n[None, :], mask=mask, other=0.0
                )
                dx += dresidual.to(tl.float32)
            if NEED_DX:
                tl.store(DX + out_offs, dx.to(DX.dtype.element_ty), mask=mask)
            if NEED_DY:
                if VECTOR_GATE and not KEEP_PARAMETERS:
                    tanh_gate = tanh(load_gate(GATE, offs_n, mask_n, VECTOR_GATE))
                dy = tanh_gate * dx
                tl.store(DY + out_offs, dy.to(DY.dtype.element_ty), mask=mask)
            if VECTOR_GATE_SLOT >= 0 or SCALAR_GATE:
                y_rows = row_offsets(offs_m, inner, stride_y_outer, stride_y_inner)
                y = tl.load(Y + y_rows[:, None] + offs_n[None, :], mask=mask, other=0.0)
                # Lanes past the row hold dx != 0 for LayerNorm, but y is 0 there.
                product = dx * y.to(tl.float32)
                if SCALAR_GATE:
                    dgate += tl.sum(product, 1)
                else:
                    dgate += product
    pid = tl.program_id(0).to(tl.int64)
    partials = PARTIALS + pid * slots * width
    if WEIGHT_SLOT >= 0:
        tl.store(partials + WEIGHT_SLOT * width + offs_n, tl.sum(dweight, 0), mask=mask_n)
    if BIAS_SLOT >= 0:
        tl.store(partials + BIAS_SLOT * width + offs_n, tl.sum(dbias, 0), mask=mask_n)
    if VECTOR_GATE_SLOT >= 0:
        tl.store(partials + VECTOR_GATE_SLOT * width + offs_n, tl.sum(dgate, 0), mask=mask_n)
    if SCALAR_GATE:
        tl.store(SCALARS + pid, tl.sum(dgate))


@triton.jit(do_not_specialize=["rows", "rows_per_program"])
def _norm_bwd_columns_kernel(
    DNORMED,
    X,
    DX,
    Y,
    MEAN,
    RSTD,
    PARTIALS,
    rows,
    width,
    slots,
    inner,
    rows_per_program,
    stride_dnormed_outer,
    stride_dnormed_inner,
    stride_x_outer,
    stride_x_inner,
    stride_y_outer,
    stride_y_inner,
    RMS: tl.constexpr,
    WEIGHT_SLOT: tl.constexpr,
    BIAS_SLOT: tl.constexpr,
    VECTOR_GATE_SLOT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    col_blocks = tl.cdiv(width, BLOCK_N)
    pid = tl.program_id(0).to(tl.int64)
    chunk = pid // col_blocks
    offs_n = (pid % col_blocks) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n = offs_n < width
    if WEIGHT_SLOT >= 0:
        dweight = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    if BIAS_SLOT >= 0:
        dbias = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    if VECTOR_GATE_SLOT >= 0:
        dgate = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    first = chunk * rows_per_program
    for start in range(first, tl.minimum(first + rows_per_program, rows), BLOCK_M):
        offs_m = start + tl.arange(0, BLOCK_M)
        mask_m = offs_m < rows
        mask = mask_m[:, None] & mask_n[None, :]
        if WEIGHT_SLOT >= 0 or BIAS_SLOT >= 0:
            dnormed_rows = row_offsets(offs_m, inner, stride_dnormed_outer, stride_dnormed_inner)
            dnormed = tl.load(
                DNORMED + dnormed_rows[:, None] + offs_n[None, :], mask=mask, other=0.0
            )
            dnormed = dnormed.to(tl.float32)
        if WEIGHT_SLOT >= 0:
            x_rows = row_offsets(offs_m, inner, stride_x_outer, stride_x_inner)
            xhat = tl.load(X + x_rows[:, None] + offs_n[None, :], mask=mask, other=0.0)
            xhat = xhat.to(tl.float32)
            if not RMS:
                xhat = xhat - tl.load(MEAN + offs_m, mask=mask_m, other=0.0)[:, None]
            rstd = tl.load(RSTD + offs_m, mask=mask_m, other=0.0)
            dweight += dnormed * (xhat * rstd[:, None])
        if BIAS_SLOT >= 0:
            dbias += dnormed
        if VECTOR_GATE_SLOT >= 0:
            dx = tl.load(DX + (offs_m * width)[:, None] + offs_n[None, :], mask=mask, other=0.0)
            y_rows = row_offsets(offs_m, inner, stride_y_outer, stride_y_inner)
            y = tl.load(Y + y_rows[:, None] + offs_n[None, :], mask=mask, other=0.0)
            dgate += dx.to(tl.float32) * y.to(tl.float32)
    partials = PARTIALS + chunk * slots * width + offs_n
    if WEIGHT_SLOT >= 0:
        tl.store(partials + WEIGHT_SLOT * width, tl.sum(dweight, 0), mask=mask_n)
    if BIAS_SLOT >= 0:
        tl.store(partials + BIAS_SLOT * width, tl.sum(dbias, 0), mask=mask_n)
    if VECTOR_GATE_SLOT >= 0:
        tl.store(partials + VECTOR_GATE_SLOT * width, tl.sum(dgate, 0), mask=mask_n)


def norm_bwd(
    dnormed: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    mean: torch.Tensor,
    rstd: torch.Tensor,
    rms: bool,
    need_dx: bool,
    need_dweight: bool,
    need_dbias: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(dx, dweight, dbias); what is not needed comes back empty and costs nothing."""
    dx, _, _, dweight, dbias = _backward(
        _Saved(x, None, None, weight, bias, mean, rstd, rms),
        None,
        dnormed,
        x.dtype,
        need_dx,
        False,
        need_dweight,
        need_dbias,
    )
    return dx, dweight, dbias


def gated_residual_norm_bwd(
    dresidual: torch.Tensor | None,
    dnormed: torch.Tensor,
    residual: torch.Tensor,
    y: torch.Tensor | None,
    gate: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    mean: torch.Tensor,
    rstd: torch.Tensor,
    rms: bool,
    y_dtype: torch.dtype,
    need_dx: bool,
    need_dy: bool,
    need_dweight: bool,
    need_dbias: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """(dx, dy, dgate, dweight, dbias); dgate needs y. What is not needed comes back empty."""
    saved = _Saved(residual, y, gate, weight, bias, mean, rstd, rms)
    return _backward(saved, dresidual, dnormed, y_dtype, need_dx, need_dy, need_dweight, need_dbias)


@dataclasses.dataclass(frozen=True)
class _Saved:
    """What the forward leaves for the backward; x is the residual where there is a gate."""

    x: torch.Tensor
    y: torch.Tensor | None
    gate: torch.Tensor | None
    weight: torch.Tensor | None
    bias: torch.Tensor | None
    mean: torch.Tensor
    rstd: torch.Tensor
    rms: bool


@dataclasses.dataclass(frozen=True)
class _BackwardRows:
    """The backward's big inputs as rows; an absent one repeats x and is never read."""

    rows: int
    width: int
    inner: int
    dresidual: RowTensor
    dnormed: RowTensor
    x: RowTensor
    y: RowTensor


def _backward_rows(
    saved: _Saved, dresidual: torch.Tensor | None, dnormed: torch.Tensor
) -> _BackwardRows:
    optional = [tensor for tensor in (dresidual, saved.y) if tensor is not None]
    rows, width, inner, (x, dnormed_view, *rest) = as_rows(saved.x, dnormed, *optional)
    return _BackwardRows(
        rows,
        width,
        inner,
        dresidual=x if dresidual is None else rest[0],
        dnormed=dnormed_view,
        x=x,
        y=x if saved.y is None else rest[-1],
    )


def _backward(
    saved: _Saved,
    dresidual: torch.Tensor | None,
    dnormed: torch.Tensor,
    y_dtype: torch.dtype,
    need_dx: bool,
    need_dy: bool,
    need_dweight: bool,
    need_dbias: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    view = _backward_rows(saved, dresidual, dnormed)
    x, gate, weight = saved.x, contiguous(saved.gate), contiguous(saved.weight)
    target = target_of(x)
    wanted = {
        "weight": saved.weight if need_dweight else None,
        "bias": saved.bias if need_dbias else None,
        "gate": gate if saved.y is not None else None,
    }
    vector_gate = gate is not None and gate.numel() > 1
    in_one_pass = view.width <= WIDEST_KEPT
    by_rows, by_columns = wanted, {}
    return_dx = need_dx
    if not in_one_pass:
        by_rows = {} if vector_gate else {"gate": wanted["gate"]}
        by_columns = {**wanted, "gate": wanted["gate"] if vector_gate else None}
        # The columns kernel reads dx for a vector gate.
        need_dx = need_dx or by_columns["gate"] is not None
    config = backward_config(view.width, x.dtype, target)
    programs = config.programs(view.rows, target)
    partials = Partials(x, programs, view.width, **by_rows)
    dx = torch.empty(x.shape if need_dx else (0,), dtype=x.dtype, device=x.device)
    dy = torch.empty(x.shape if need_dy else (0,), dtype=y_dtype, device=x.device)
    if need_dx or need_dy or partials.wanted:
        launch(
            _norm_bwd_kernel,
            (programs,),
            view.dresidual.tensor,
            view.dnormed.tensor,
            view.x.tensor,
            view.y.tensor,
            x if gate is None else gate,
            x if weight is None else weight,
            saved.mean,
            saved.rstd,
            dx,
            dy,
            partials.rows,
            partials.scalars,
            view.rows,
            view.width,
            partials.slots,
            view.inner,
            view.dresidual.stride_outer,
            view.dresidual.stride_inner,
            view.dnormed.stride_outer,
            view.dnormed.stride_inner,
            view.x.stride_outer,
            view.x.stride_inner,
            view.y.stride_outer,
            view.y.stride_inner,
            RMS=saved.rms,
            HAS_WEIGHT=weight is not None,
            HAS_DRESIDUAL=dresidual is not None,
            VECTOR_GATE=vector_gate,
            NEED_DX=need_dx,
            NEED_DY=need_dy,
            WEIGHT_SLOT=partials.weight_slot,
            BIAS_SLOT=partials.bias_slot,
            VECTOR_GATE_SLOT=partials.vector_gate_slot,
            SCALAR_GATE=partials.scalar_gate,
            KEEP_PARAMETERS=config.keep_parameters,
            BLOCK_M=config.BLOCK_M,
            BLOCK_N=config.BLOCK_N,
            num_warps=config.num_warps,
            max_registers=MAX_REGISTERS,
        )
    dweight, dbias, dgate = partials.sum()
    if not in_one_pass:
        dweight, dbias, dgate_by_columns = _backward_columns(saved, view, dx, by_columns, target)
        dgate = dgate_by_columns if vector_gate else dgate
    return dx if return_dx else dx.new_empty(0), dy, dgate, dweight, dbias


def _backward_columns(
    saved: _Saved,
    view: _BackwardRows,
    dx: torch.Tensor,
    wanted: dict[str, torch.Tensor | None],
    target: Target,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(dweight, dbias, dgate of a vector gate), empty where not wanted."""
    col_blocks = cdiv(view.width, COLUMNS.BLOCK_N)
    row_blocks = cdiv(view.rows, COLUMNS.BLOCK_M)
    # Eight programs an SM, of at least 16 row blocks: their partials stay below 2 % of the reads.
    chunks = max(min(8 * target.num_sms // col_blocks, row_blocks // 16), 1)
    blocks_per_program = max(cdiv(row_blocks, chunks), 1)
    chunks = cdiv(row_blocks, blocks_per_program)
    partials = Partials(dx, chunks, view.width, **wanted)
    if partials.wanted:
        launch(
            _norm_bwd_columns_kernel,
            (chunks * col_blocks,),
            view.dnormed.tensor,
            view.x.tensor,
            dx,
            view.y.tensor,
            saved.mean,
            saved.rstd,
            partials.rows,
            view.rows,
            view.width,
            partials.slots,
            view.inner,
            blocks_per_program * COLUMNS.BLOCK_M,
            view.dnormed.stride_outer,
            view.dnormed.stride_inner,
            view.x.stride_outer,
            view.x.stride_inner,
            view.y.stride_outer,
            view.y.stride_inner,
            RMS=saved.rms,
            WEIGHT_SLOT=partials.weight_slot,
            BIAS_SLOT=partials.bias_slot,
            VECTOR_GATE_SLOT=partials.vector_gate_slot,
            BLOCK_M=COLUMNS.BLOCK_M,
            BLOCK_N=COLUMNS.BLOCK_N,
            num_warps=COLUMNS.num_warps,
        )
    return partials.sum()
