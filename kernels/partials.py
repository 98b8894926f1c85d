"""Gradients of parameters, second step: adding the partial sums of programs in a fixed order.

Programs write fp32 partials (num_partials, slots, width): one slot for each of weight, bias and
vector gate whose gradient is wanted. Those of a scalar gate are a tensor of their own.
"""

import dataclasses
import functools

import torch
import triton
import triton.language as tl

from flamingo_fast.kernels.launch import cdiv, launch, next_power_of_2
from flamingo_fast.kernels.rows import contiguous
from flamingo_fast.kernels.tanh import tanh_grad


@dataclasses.dataclass(frozen=True)
class PartialsConfig:
    BLOCK_M: int
    BLOCK_N: int
    BLOCK_SCALARS: int
    num_warps: int


@functools.cache
def config_for(width: int) -> PartialsConfig:
    """Blocks narrow enough for the sums of 2048 columns to occupy 64 programs."""
    block_n = min(max(next_power_of_2(width) // 64, 32), 128)
    return PartialsConfig(BLOCK_M=2048 // block_n, BLOCK_N=block_n, BLOCK_SCALARS=1024, num_warps=4)


@triton.jit(do_not_specialize=["num_partials", "num_scalars"])
def _sum_partials_kernel(
    PARTIALS,
    SCALARS,
    DWEIGHT,
    DBIAS,
    DGATE,
    GATE,
    num_partials,
    num_scalars,
    width,
    slots,
    WEIGHT_SLOT: tl.constexpr,  # -1: not wanted
    BIAS_SLOT: tl.constexpr,
    VECTOR_GATE_SLOT: tl.constexpr,
    SCALAR_GATE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_SCALARS: tl.constexpr,
):
    slot = tl.program_id(1)
    if slot == slots:
        if SCALAR_GATE and tl.program_id(0) == 0:
            offs = tl.arange(0, BLOCK_SCALARS)
            sums = tl.zeros((BLOCK_SCALARS,), tl.float32)
            for start in range(0, num_scalars, BLOCK_SCALARS):
                mask = start + offs < num_scalars
                sums += tl.load(SCALARS + start + offs, mask=mask, other=0.0)
            dgate = tl.sum(sums) * tanh_grad(tl.load(GATE).to(tl.float32))
            tl.store(DGATE, dgate.to(DGATE.dtype.element_ty))
    else:
        offs_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
        offs_m = tl.arange(0, BLOCK_M).to(tl.int64)
        mask_n = offs_n < width
        acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for start in range(0, num_partials, BLOCK_M):
            rows = (start + offs_m) * slots + slot
            mask = (start + offs_m < num_partials)[:, None] & mask_n[None, :]
            offs = rows[:, None] * width + offs_n[None, :]
            acc += tl.load(PARTIALS + offs, mask=mask, other=0.0)
        total = tl.sum(acc, 0)
        if WEIGHT_SLOT >= 0:
            if slot == WEIGHT_SLOT:
                tl.store(DWEIGHT + offs_n, total.to(DWEIGHT.dtype.element_ty), mask=mask_n)
        if BIAS_SLOT >= 0:
            if slot == BIAS_SLOT:
                tl.store(DBIAS + offs_n, total.to(DBIAS.dtype.element_ty), mask=mask_n)
        if VECTOR_GATE_SLOT >= 0:
            if slot == VECTOR_GATE_SLOT:
                gate = tl.load(GATE + offs_n, mask=mask_n, other=0.0).to(tl.float32)
                dgate = total * tanh_grad(gate)
                tl.store(DGATE + offs_n, dgate.to(DGATE.dtype.element_ty), mask=mask_n)


class Partials:
    """The partial sums of one launch, and which gradients they are of.

    Arguments:
        like: a tensor on the device.
        programs: how many rows of partials are written.
        width: of weight, bias and vector gate.
        num_scalars: how many partials of a scalar gate are written; by default one a program.
        weight, bias, gate: the parameters whose gradients are wanted.
    """

    def __init__(
        self,
        like: torch.Tensor,
        programs: int,
        width: int,
        *,
        num_scalars: int | None = None,
        weight: torch.Tensor | None = None,
        bias: torch.Tensor | None = None,
        gate: torch.Tensor | None = None,
    ) -> None:
        self._parameters = weight, bias, gate
        self.scalar_gate = gate is not None and gate.numel() == 1
        vector_gate = gate is not None and not self.scalar_gate
        self.weight_slot = 0 if weight is not None else -1
        self.bias_slot = int(weight is not None) if bias is not None else -1
        self.slots = sum(wanted for wanted in (weight is not None, bias is not None, vector_gate))
        self.vector_gate_slot = self.slots - 1 if vector_gate else -1
        self.rows = like.new_empty((programs, self.slots, width), dtype=torch.float32)
        num_scalars = programs if num_scalars is None else num_scalars
        self.scalars = like.new_empty(num_scalars if self.scalar_gate else 0, dtype=torch.float32)

    @property
    def wanted(self) -> bool:
        return self.slots > 0 or self.scalar_gate

    def sum(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(dweight, dbias, dgate) in their parameters' dtypes; empty where not wanted."""
        # One empty tensor for all would make outputs of an op alias each other.
        dweight, dbias, dgate = (
            self.rows.new_empty(0) if parameter is None else parameter.new_empty(parameter.shape)
            for parameter in self._parameters
        )
        gate = contiguous(self._parameters[2])
        programs, _, width = self.rows.shape
        config = config_for(width)
        launch(
            _sum_partials_kernel,
            (cdiv(width, config.BLOCK_N), self.slots + self.scalar_gate),
            self.rows,
            self.scalars,
            dweight,
            dbias,
            dgate,
            self.rows if gate is None else gate,
            programs,
            self.scalars.numel(),
            width,
            self.slots,
            WEIGHT_SLOT=self.weight_slot,
            BIAS_SLOT=self.bias_slot,
            VECTOR_GATE_SLOT=self.vector_gate_slot,
            SCALAR_GATE=self.scalar_gate,
            BLOCK_M=config.BLOCK_M,
            BLOCK_N=config.BLOCK_N,
            BLOCK_SCALARS=config.BLOCK_SCALARS,
            num_warps=config.num_warps,
        )
        return dweight, dbias, dgate
