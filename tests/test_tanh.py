"""tanh of a gate and its slope: relative error at most 1e-6 from 1e-30 to 10, everywhere."""

import pytest
import torch
import triton
import triton.language as tl

import flamingo_fast as ff
from flamingo_fast.kernels.tanh import tanh, tanh_grad
from flamingo_fast.testing.compare import assert_relative_error

LIMIT = 1e-6


@triton.jit
def _tanh_kernel(X, TANH, GRAD, numel, BLOCK: tl.constexpr):
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < numel
    x = tl.load(X + offs, mask=mask, other=0.0)
    tl.store(TANH + offs, tanh(x), mask=mask)
    tl.store(GRAD + offs, tanh_grad(x), mask=mask)


def _gates() -> torch.Tensor:
    gates = torch.cat([torch.logspace(-30, 1, 2000), torch.linspace(0.2, 10, 1500)])
    return torch.cat([gates, -gates])


def test_kernel_functions_keep_relative_accuracy(guarded):
    gates = _gates()
    value, grad = torch.empty_like(gates), torch.empty_like(gates)
    _tanh_kernel[(triton.cdiv(gates.numel(), 512),)](gates, value, grad, gates.numel(), BLOCK=512)
    assert_relative_error("tanh", value, gates.double().tanh(), LIMIT)
    assert_relative_error("tanh_grad", grad, gates.double().cosh() ** -2, LIMIT)


def test_kernel_functions_at_the_ends(guarded):
    gates = torch.tensor([0.0, float("inf"), -float("inf"), float("nan"), 1e30, 88.0])
    value, grad = torch.empty_like(gates), torch.empty_like(gates)
    _tanh_kernel[(1,)](gates, value, grad, gates.numel(), BLOCK=8)
    torch.testing.assert_close(value, gates.tanh(), rtol=0, atol=0, equal_nan=True)
    assert grad[0] == 1 and grad[3].isnan()
    assert (grad[[1, 2, 4, 5]] < 1e-30).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("impl", ["torch", "triton", "reference"])
def test_a_small_fp32_gate_does_not_vanish_beside_16_bits(impl, dtype, guarded):
    """1e-9 is 0 in fp16; times 1000 it is not."""
    x, y = torch.zeros(4, 8, dtype=dtype), torch.full((4, 8), 1000.0, dtype=dtype)
    for gate in (torch.full((1,), 1e-9), torch.full((8,), 1e-9)):
        out = ff.gated_residual(x, y, gate, impl=impl)
        torch.testing.assert_close(out, torch.full_like(out, 1e-6), rtol=0.02, atol=0)


@pytest.mark.parametrize("impl", ["torch", "triton", "reference"])
def test_gated_residual_keeps_relative_accuracy(impl, guarded):
    """x = 0 and y = 1 make output and dy tanh(gate), and dgate its slope."""
    gates = _gates()[::7].clone()
    x = torch.zeros(1, gates.numel())
    y = torch.ones(1, gates.numel(), requires_grad=True)
    gate = gates.clone().requires_grad_()
    out = ff.gated_residual(x, y, gate, impl=impl)
    dy, dgate = torch.autograd.grad(out.sum(), [y, gate])
    assert_relative_error("tanh(gate)", out.detach()[0], gates.double().tanh(), LIMIT)
    assert_relative_error("dy", dy[0], gates.double().tanh(), LIMIT)
    assert_relative_error("dgate", dgate, gates.double().cosh() ** -2, LIMIT)
