"""gated_residual: x + tanh(gate) * y. Saves y only where the gate needs a gradient; dx is dout."""

from typing import Any

import torch

from flamingo_fast import reference
from flamingo_fast.ops import cpu
from flamingo_fast.ops.checks import check_like, check_parameter, check_rows
from flamingo_fast.ops.dispatch import (
    apply,
    differentiable_once,
    empty_gradient,
    register_op,
    resolve_impl,
)


def _forward(x: torch.Tensor, y: torch.Tensor, gate: torch.Tensor, impl: str) -> torch.Tensor:
    if impl == "triton":
        from flamingo_fast.kernels.gated_residual import gated_residual_fwd

        return gated_residual_fwd(x, y, gate)
    return cpu.gated_residual(x, y, gate)


def _backward(
    dout: torch.Tensor,
    y: torch.Tensor | None,
    gate: torch.Tensor,
    y_dtype: torch.dtype,
    need_dy: bool,
    impl: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    if impl == "triton":
        from flamingo_fast.kernels.gated_residual import gated_residual_bwd

        return gated_residual_bwd(dout, y, gate, y_dtype, need_dy)
    return cpu.gated_residual_backward(dout, y, gate, y_dtype, need_dy)


def _fake_backward(
    dout: torch.Tensor,
    y: torch.Tensor | None,
    gate: torch.Tensor,
    y_dtype: torch.dtype,
    need_dy: bool,
    impl: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    dy = dout.new_empty(dout.shape if need_dy else (0,), dtype=y_dtype)
    return dy, empty_gradient(gate, y is not None, dout)


gated_residual_forward_op = register_op(
    "gated_residual_fwd(Tensor x, Tensor y, Tensor gate, str impl) -> Tensor",
    _forward,
    lambda x, y, gate, impl: x.new_empty(x.shape),
)
gated_residual_backward_op = register_op(
    "gated_residual_bwd(Tensor dout, Tensor? y, Tensor gate, ScalarType y_dtype, bool need_dy, "
    "str impl) -> (Tensor, Tensor)",
    _backward,
    _fake_backward,
)


class _GatedResidualFn(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, y: torch.Tensor, gate: torch.Tensor, impl: str
    ) -> torch.Tensor:
        ctx.save_for_backward(y if ctx.needs_input_grad[2] else None, gate)
        ctx.y_dtype = y.dtype
        ctx.impl = impl
        return gated_residual_forward_op(x, y, gate, impl)

    @staticmethod
    @differentiable_once("gated_residual")
    def backward(ctx: Any, dout: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        y, gate = ctx.saved_tensors
        need_dx, need_dy, need_dgate, _ = ctx.needs_input_grad
        dy, dgate = None, None
        if need_dy or need_dgate:
            dy, dgate = gated_residual_backward_op(dout, y, gate, ctx.y_dtype, need_dy, ctx.impl)
        return (
            dout if need_dx else None,
            dy if need_dy else None,
            dgate if need_dgate else None,
            None,
        )


def gated_residual(
    x: torch.Tensor, y: torch.Tensor, gate: torch.Tensor, *, impl: str = "auto"
) -> torch.Tensor:
    """x + tanh(gate) * y (Flamingo, figure 4).

    Arguments:
        x: (..., width), the residual stream: fp32, fp16 or bf16 (fp64 outside Triton), any strides.
        y: x's shape; its dtype may differ.
        gate: (1,) or (width,); its dtype may differ and never promotes the result.
        impl: "auto", "triton", "torch" or "reference".

    Returns:
        x's shape and dtype, contiguous.

    Raises:
        TypeError, ValueError: a wrong argument, by name.
        BackendUnavailableError: `impl` can't run here.
    """
    check_rows("x", x)
    check_like("y", y, x)
    check_parameter("gate", gate, x, [(1,), (x.shape[-1],)])
    impl = resolve_impl(impl, x)
    if impl == "reference":
        return reference.gated_residual(x, y, gate)
    return apply(_GatedResidualFn, x, y, gate, impl)
