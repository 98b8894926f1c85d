"""Keys and values of one projection: their gradients become one, without a copy where it can be."""

import pytest
import torch
from torch.autograd import forward_ad

from flamingo_fast.ops.attention_gradients import unbind_kv

SHAPE = (2, 3, 5, 2, 4, 8)


def _both() -> torch.Tensor:
    return torch.randn(SHAPE, requires_grad=True)


def test_halves_of_one_gradient_are_that_gradient():
    both, gradient = _both(), torch.randn(SHAPE)
    k, v = unbind_kv(both)
    assert torch.equal(k, both[..., 0, :, :]) and torch.equal(v, both[..., 1, :, :])
    (found,) = torch.autograd.grad((k, v), both, gradient.unbind(-3))
    assert torch.equal(found, gradient)
    assert found.data_ptr() == gradient.data_ptr()


@pytest.mark.parametrize("kind", ["apart", "swapped", "permuted", "other_offset", "one_alone"])
def test_any_other_gradients(kind):
    both = _both()
    dk, dv = torch.randn(SHAPE).unbind(-3)
    if kind == "apart":
        dk = dk.clone()
    elif kind == "swapped":
        dk, dv = dv, dk
    elif kind == "permuted":
        dk, dv = (x.transpose(-1, -2).contiguous().transpose(-1, -2) for x in (dk, dv))
    elif kind == "other_offset":
        dk = torch.randn(3, *SHAPE)[0].unbind(-3)[0]
    k, v = unbind_kv(both)
    outs, gradients = ((v,), (dv,)) if kind == "one_alone" else ((k, v), (dk, dv))
    (found,) = torch.autograd.grad(outs, both, gradients)
    expected = torch.stack([torch.zeros_like(dv) if kind == "one_alone" else dk, dv], -3)
    assert torch.equal(found, expected)


def test_second_derivatives():
    both = _both()

    def of_halves(projected):
        k, v = unbind_kv(projected)
        return (k.sin() * v.exp()).sum()

    def of_indices(projected):
        return (projected[..., 0, :, :].sin() * projected[..., 1, :, :].exp()).sum()

    found, expected = (
        torch.autograd.functional.hvp(function, both, torch.ones_like(both))[1]
        for function in (of_halves, of_indices)
    )
    torch.testing.assert_close(found, expected)


def test_forward_mode_derivatives():
    both, tangent = torch.randn(SHAPE, requires_grad=True), torch.randn(SHAPE)
    with forward_ad.dual_level():
        k, v = unbind_kv(forward_ad.make_dual(both, tangent))
        found = torch.stack([forward_ad.unpack_dual(x).tangent for x in (k, v)], -3)
    assert torch.equal(found, tangent)


def test_what_wants_no_gradient():
    k, v = unbind_kv(torch.randn(SHAPE))
    assert k.grad_fn is None and v.shape == (2, 3, 5, 4, 8)
