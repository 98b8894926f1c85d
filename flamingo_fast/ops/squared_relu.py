"""squared_relu: relu(x)**2. Saves x only; the backward recomputes the mask."""

from typing import Any

import torch

from flamingo_fast import reference
from flamingo_fast.ops import cpu
from flamingo_fast.ops.checks import check_floating
from flamingo_fast.ops.dispatch import apply, differentiable_once, register_op, resolve_impl


def _forward(x: torch.Tensor, impl: str) -> torch.Tensor:
    if impl == "triton":
        from flamingo_fast.kernels.squared_relu import squared_relu_fwd

        return squared_relu_fwd(x)
    return cpu.squared_relu(x)


def _backward(x: torch.Tensor, dout: torch.Tensor, impl: str) -> torch.Tensor:
    if impl == "triton":
        from flamingo_fast.kernels.squared_relu import squared_relu_bwd

        return squared_relu_bwd(x, dout)
    return cpu.squared_relu_backward(x, dout)


squared_relu_forward_op = register_op(
    "squared_relu_fwd(Tensor x, str impl) -> Tensor",
    _forward,
    lambda x, impl: x.new_empty(x.shape),
)
squared_relu_backward_op = register_op(
    "squared_relu_bwd(Tensor x, Tensor dout, str impl) -> Tensor",
    _backward,
    lambda x, dout, impl: x.new_empty(x.shape),
)


class _SquaredReluFn(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, impl: str) -> torch.Tensor:
        ctx.save_for_backward(x)
        ctx.impl = impl
        return squared_relu_forward_op(x, impl)

    @staticmethod
    @differentiable_once("squared_relu")
    def backward(ctx: Any, dout: torch.Tensor) -> tuple[torch.Tensor, None]:
        (x,) = ctx.saved_tensors
        return squared_relu_backward_op(x, dout, ctx.impl), None


def squared_relu(x: torch.Tensor, *, impl: str = "auto") -> torch.Tensor:
    """relu(x)**2 (Flamingo, appendix A.1.4).

    Arguments:
        x: (...), fp32, fp16 or bf16 (fp64 with impl "torch" or "reference"), any strides.
        impl: "auto", "triton", "torch" or "reference".

    Returns:
        (...), x's dtype, contiguous.

    Raises:
        TypeError, ValueError: a wrong argument, by name.
        BackendUnavailableError: `impl` can't run here.
    """
    check_floating("x", x)
    impl = resolve_impl(impl, x)
    if impl == "reference":
        return reference.squared_relu(x)
    return apply(_SquaredReluFn, x, impl)
