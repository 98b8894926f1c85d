"""The modules: parameters, state-dict keys, and the functions they call."""

import pytest
import torch
from torch import nn

import flamingo_fast as ff
from flamingo_fast.modules import GatedResidual, GatedResidualNorm, LayerNorm, RMSNorm, SquaredReLU


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (LayerNorm(48), nn.LayerNorm(48)),
        (LayerNorm(48, bias=False), nn.LayerNorm(48, bias=False)),
        (LayerNorm(48, elementwise_affine=False), nn.LayerNorm(48, elementwise_affine=False)),
        (RMSNorm(48), nn.RMSNorm(48)),
        (RMSNorm(48, 1e-3), nn.RMSNorm(48, 1e-3)),
    ],
    ids=str,
)
@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_norms_replace_those_of_torch(ours, theirs, impl, guarded):
    for parameter in theirs.parameters():
        nn.init.normal_(parameter)
    ours.load_state_dict(theirs.state_dict())
    ours.impl = impl
    assert isinstance(ours, type(theirs).__mro__[0])
    x = torch.randn(5, 48)
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_rms_norm_has_the_default_eps_of_torch(dtype):
    x = (torch.randn(5, 48) * 1e-4).to(dtype)
    ours, theirs = RMSNorm(48, dtype=dtype)(x), nn.RMSNorm(48, dtype=dtype)(x)
    torch.testing.assert_close(ours, theirs)


def test_norms_take_the_last_dimension_only():
    for norm in (LayerNorm, RMSNorm):
        with pytest.raises(ValueError, match=r"dim.*\(4, 8\)"):
            norm((4, 8))


@pytest.mark.parametrize("dim", [None, 48])
def test_gated_residual_starts_as_the_identity(dim):
    module = GatedResidual(dim)
    assert module.gate.shape == (dim or 1,)
    x, y = torch.randn(2, 5, 48)
    assert torch.equal(module(x, y), x)
    module(x, y).backward(y)
    expected = y.square().sum(0) if dim else y.square().sum().reshape(1)
    torch.testing.assert_close(module.gate.grad, expected)


@pytest.mark.parametrize("norm", ["layer", "rms"])
@pytest.mark.parametrize("vector_gate", [False, True])
def test_gated_residual_norm_has_the_parameters_of_its_function(norm, vector_gate):
    module = GatedResidualNorm(48, norm=norm, vector_gate=vector_gate, eps=1e-3)
    assert set(module.state_dict()) == {"gate", "weight"} | ({"bias"} if norm == "layer" else set())
    for parameter in module.parameters():
        nn.init.normal_(parameter)
    x, y = torch.randn(2, 5, 48)
    expected = ff.gated_residual_norm(
        x, y, module.gate, module.weight, module.bias, eps=1e-3, norm=norm
    )
    for got, want in zip(module(x, y), expected, strict=True):
        assert torch.equal(got, want)


def test_squared_relu():
    x = torch.randn(5, 48)
    assert torch.equal(SquaredReLU()(x), ff.squared_relu(x))
