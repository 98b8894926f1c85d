"""Squared ReLU, relu(x)**2, forward and backward: one read of each input, one write."""

import dataclasses

import torch
import triton
import triton.language as tl

from flamingo_fast.kernels.launch import cdiv, launch


@dataclasses.dataclass(frozen=True)
class SquaredReluConfig:
    BLOCK: int
    num_warps: int


CONFIG = SquaredReluConfig(BLOCK=2048, num_warps=4)


@triton.jit
def _squared_relu_fwd_kernel(X, OUT, numel, BLOCK: tl.constexpr):
    offs = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < numel
    x = tl.load(X + offs, mask=mask, other=0.0).to(tl.float32)
    # Not tl.maximum: it drops NaN.
    x = tl.where(x < 0, 0.0, x)
    tl.store(OUT + offs, (x * x).to(OUT.dtype.element_ty), mask=mask)


@triton.jit
def _squared_relu_bwd_kernel(X, DOUT, DX, numel, BLOCK: tl.constexpr):
    offs = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < numel
    x = tl.load(X + offs, mask=mask, other=0.0).to(tl.float32)
    dout = tl.load(DOUT + offs, mask=mask, other=0.0).to(tl.float32)
    x = tl.where(x < 0, 0.0, x)
    tl.store(DX + offs, (2.0 * x * dout).to(DX.dtype.element_ty), mask=mask)


def squared_relu_fwd(x: torch.Tensor) -> torch.Tensor:
    x = x.contiguous()
    out = torch.empty_like(x)
    grid = (cdiv(x.numel(), CONFIG.BLOCK),)
    launch(
        _squared_relu_fwd_kernel,
        grid,
        x,
        out,
        x.numel(),
        BLOCK=CONFIG.BLOCK,
        num_warps=CONFIG.num_warps,
    )
    return out


def squared_relu_bwd(x: torch.Tensor, dout: torch.Tensor) -> torch.Tensor:
    x, dout = x.contiguous(), dout.contiguous()
    dx = torch.empty_like(x)
    grid = (cdiv(x.numel(), CONFIG.BLOCK),)
    launch(
        _squared_relu_bwd_kernel,
        grid,
        x,
        dout,
        dx,
        x.numel(),
        BLOCK=CONFIG.BLOCK,
        num_warps=CONFIG.num_warps,
    )
    return dx
