"""LayerNorm and RMSNorm of rows, alone or of a tanh-gated residual, in one pass.

residual = x + tanh(gate) * y; normed = norm(residual) * weight + bias. A gated forward reads x and
y and writes residual and normed; a plain one reads x and writes normed.
"""

import torch
import triton
import triton.language as tl

from flamingo_fast.kernels.launch import Target, launch, next_power_of_2, target_of
from flamingo_fast.kernels.norm_config import (
    MAX_REGISTERS,
    TUNED,
    NormConfig,
    load_gate,
    load_parameter,
)
from flamingo_fast.kernels.rows import as_rows, contiguous, row_offsets
from flamingo_fast.kernels.tanh import tanh
from flamingo_fast.kernels.tuned import tunable


@tunable("norm_fwd", module="norm_forward", **TUNED)
def forward_config(width: int, dtype: torch.dtype, target: Target) -> NormConfig:
    block_n = next_power_of_2(width)
    num_warps = {4096: 8, 8192: 16, 16384: 16}.get(block_n, 4)
    # As many programs as registers leave room for on an SM.
    return NormConfig(max(2048 // block_n, 1), block_n, num_warps, 24 // num_warps)


@triton.jit(do_not_specialize=["rows"])
def _norm_fwd_kernel(
    X,
    Y,
    GATE,
    WEIGHT,
    BIAS,
    RESIDUAL,
    NORMED,
    MEAN,
    RSTD,
    rows,
    width,
    inner,
    stride_x_outer,
    stride_x_inner,
    stride_y_outer,
    stride_y_inner,
    eps,
    RMS: tl.constexpr,
    GATED: tl.constexpr,
    VECTOR_GATE: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    KEEP_PARAMETERS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    offs_n = tl.arange(0, BLOCK_N)
    mask_n = offs_n < width
    if GATED and (KEEP_PARAMETERS or not VECTOR_GATE):
        tanh_gate = tanh(load_gate(GATE, offs_n, mask_n, VECTOR_GATE))
    if HAS_WEIGHT and KEEP_PARAMETERS:
        weight = load_parameter(WEIGHT, offs_n, mask_n)
    if HAS_BIAS and KEEP_PARAMETERS:
        bias = load_parameter(BIAS, offs_n, mask_n)
    for block in range(tl.program_id(0), tl.cdiv(rows, BLOCK_M), tl.num_programs(0)):
        offs_m = block * BLOCK_M + tl.arange(0, BLOCK_M)
        mask_m = offs_m < rows
        mask = mask_m[:, None] & mask_n[None, :]
        out_offs = (offs_m.to(tl.int64) * width)[:, None] + offs_n[None, :]
        x_rows = row_offsets(offs_m, inner, stride_x_outer, stride_x_inner)
        x = tl.load(X + x_rows[:, None] + offs_n[None, :], mask=mask, other=0.0).to(tl.float32)
        if GATED:
            y_rows = row_offsets(offs_m, inner, stride_y_outer, stride_y_inner)
            y = tl.load(Y + y_rows[:, None] + offs_n[None, :], mask=mask, other=0.0)
            if VECTOR_GATE and not KEEP_PARAMETERS:
                tanh_gate = tanh(load_gate(GATE, offs_n, mask_n, VECTOR_GATE))
            residual = (x + tanh_gate * y.to(tl.float32)).to(RESIDUAL.dtype.element_ty)
            tl.store(RESIDUAL + out_offs, residual, mask=mask)
            # The backward sees the rounded residual, so it is what must be normalised.
            x = residual.to(tl.float32)
        if not RMS:
            mean = tl.sum(x, 1) / width
            tl.store(MEAN + offs_m, mean, mask=mask_m)
            x = tl.where(mask_n[None, :], x - mean[:, None], 0.0)
        rstd = 1.0 / tl.sqrt_rn(tl.sum(x * x, 1) / width + eps)
        tl.store(RSTD + offs_m, rstd, mask=mask_m)
        normed = x * rstd[:, None]
        if HAS_WEIGHT:
            if not KEEP_PARAMETERS:
                weight = load_parameter(WEIGHT, offs_n, mask_n)
            normed = normed * weight
        if HAS_BIAS:
            if not KEEP_PARAMETERS:
                bias = load_parameter(BIAS, offs_n, mask_n)
            normed = normed + bias
        tl.store(NORMED + out_offs, normed.to(NORMED.dtype.element_ty), mask=mask)


def norm_fwd(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    eps: float,
    rms: bool,
    out_dtype: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(normed, mean, rstd); mean is empty for RMSNorm."""
    return _forward(x, None, None, weight, bias, eps, rms, out_dtype)[1:]


def gated_residual_norm_fwd(
    x: torch.Tensor,
    y: torch.Tensor,
    gate: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    eps: float,
    rms: bool,
    out_dtype: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """(residual, normed, mean, rstd); mean is empty for RMSNorm."""
    return _forward(x, y, gate, weight, bias, eps, rms, out_dtype)


def _forward(
    x: torch.Tensor,
    y: torch.Tensor | None,
    gate: torch.Tensor | None,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    eps: float,
    rms: bool,
    out_dtype: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    gated = y is not None
    gate, weight, bias = (contiguous(parameter) for parameter in (gate, weight, bias))
    rows, width, inner, views = as_rows(x, y) if gated else as_rows(x)
    x_view, y_view = views[0], views[-1]
    residual = torch.empty(x.shape if gated else (0,), dtype=x.dtype, device=x.device)
    normed = torch.empty(x.shape, dtype=out_dtype, device=x.device)
    rstd = torch.empty(x.shape[:-1], dtype=torch.float32, device=x.device)
    mean = torch.empty((0,) if rms else x.shape[:-1], dtype=torch.float32, device=x.device)
    target = target_of(x)
    config = forward_config(width, x.dtype, target)
    launch(
        _norm_fwd_kernel,
        (config.programs(rows, target),),
        x_view.tensor,
        y_view.tensor,
        x if gate is None else gate,
        x if weight is None else weight,
        x if bias is None else bias,
        residual,
        normed,
        mean,
        rstd,
        rows,
        width,
        inner,
        x_view.stride_outer,
        x_view.stride_inner,
        y_view.stride_outer,
        y_view.stride_inner,
        eps,
        RMS=rms,
        GATED=gated,
        VECTOR_GATE=gate is not None and gate.numel() > 1,
        HAS_WEIGHT=weight is not None,
        HAS_BIAS=bias is not None,
        KEEP_PARAMETERS=config.keep_parameters,
        BLOCK_M=config.BLOCK_M,
        BLOCK_N=config.BLOCK_N,
        num_warps=config.num_warps,
        max_registers=MAX_REGISTERS,
    )
    return residual, normed, mean, rstd
