"""For tests of the interpreter, and of what is launched in it."""

import torch
import triton
import triton.language as tl

from flamingo_fast.testing.guard import LaunchRecord, guard
from flamingo_fast.testing.inputs import random_tensor


def assert_same(got: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(got, expected, rtol=0, atol=0, equal_nan=True)


@triton.jit
def dot_kernel(A, B, OUT, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr):
    m, n, k = tl.arange(0, M), tl.arange(0, N), tl.arange(0, K)
    a = tl.load(A + m[:, None] * K + k[None, :])
    b = tl.load(B + k[:, None] * N + n[None, :])
    tl.store(OUT + m[:, None] * N + n[None, :], tl.dot(a, b, input_precision="ieee"))


@triton.jit
def exp_kernel(X, OUT):
    tl.store(OUT, tl.exp(tl.load(X)))


def launches_of(call, inputs: dict[str, torch.Tensor], backward: bool) -> list[LaunchRecord]:
    """Of the interpreted kernels of a function of q, k and v, or of its backward."""
    with guard() as forward:
        out = call(**inputs)
    if not backward:
        return forward.launches
    wanted = [tensor for tensor in inputs.values() if tensor.requires_grad]
    dout = random_tensor(tuple(out.shape), out.dtype, seed=9)
    with guard() as guarded:
        torch.autograd.grad(out, wanted, dout)
    return guarded.launches
