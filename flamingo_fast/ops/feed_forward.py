"""feed_forward: two linear layers around an activation, and the tanh-gated residual after them.

Saves its input and the first layer's output. The activation a is computed again in the backward,
and the gate's gradient takes no output of the second layer: the sum of dout * (a W^T) over tokens
and columns is that of (dout W) * a.
"""

import contextlib
from typing import Any

import torch
import torch.nn.functional as F

from flamingo_fast.ops.checks import check_floating, check_parameter, check_rows, one_of
from flamingo_fast.ops.cpu import as_matrix
from flamingo_fast.ops.dispatch import apply, autocast_dtype, choose_impl, differentiable_once
from flamingo_fast.ops.gated_residual import (
    gated_residual,
    gated_residual_backward_op,
    gated_residual_forward_op,
)
from flamingo_fast.ops.squared_relu import (
    squared_relu,
    squared_relu_backward_op,
    squared_relu_forward_op,
)

ACTIVATIONS = ("gelu", "squared_relu")


def _activate(hidden: torch.Tensor, activation: str, impl: str) -> torch.Tensor:
    return F.gelu(hidden) if activation == "gelu" else squared_relu_forward_op(hidden, impl)


def _activation_backward(
    hidden: torch.Tensor, dout: torch.Tensor, activation: str, impl: str
) -> torch.Tensor:
    """The memory of `dout`, the largest tensor of a feed-forward, may be that of the result."""
    if activation == "gelu":
        return torch.ops.aten.gelu_backward.grad_input(dout, hidden, grad_input=dout)
    return squared_relu_backward_op(hidden, dout, impl)


def _column_sums(rows: torch.Tensor) -> torch.Tensor:
    wide = torch.promote_types(rows.dtype, torch.float32)
    return rows.sum(0, dtype=wide).to(rows.dtype)


class _FeedForwardFn(torch.autograd.Function):
    """`residual` and `gate` are both there or both None; weights are (columns out, columns in)."""

    @staticmethod
    def forward(
        ctx: Any,
        residual: torch.Tensor | None,
        gate: torch.Tensor | None,
        x: torch.Tensor,
        weight_up: torch.Tensor,
        bias_up: torch.Tensor | None,
        weight_down: torch.Tensor,
        bias_down: torch.Tensor | None,
        activation: str,
        impl: str,
    ) -> torch.Tensor:
        hidden = F.linear(x, weight_up, bias_up)
        out = F.linear(_activate(hidden, activation, impl), weight_down, bias_down)
        _, need_dgate, *of_hidden, _ = ctx.needs_input_grad[:7]
        ctx.save_for_backward(
            gate,
            x if ctx.needs_input_grad[3] else None,
            hidden if need_dgate or any(of_hidden) else None,
            weight_up,
            weight_down,
            bias_down,
        )
        ctx.activation = activation
        ctx.impl = impl
        if residual is None or gate is None:
            return out
        return gated_residual_forward_op(residual, out, gate, impl)

    @staticmethod
    @differentiable_once("feed_forward")
    def backward(ctx: Any, dout: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        gate, x, hidden, weight_up, weight_down, bias_down = ctx.saved_tensors
        needs = ctx.needs_input_grad
        need_dgate, need_dx, need_up, need_bias_up, need_down, need_bias_down = needs[1:7]
        dresidual = dout if needs[0] else None
        activation, impl = ctx.activation, ctx.impl
        rows = as_matrix(dout).to(weight_down.dtype)
        # The factor tanh(gate) of everything goes where matrices are narrow: a scalar one to the
        # ends, and a vector's, which is one of dout's columns, to dout.
        is_vector = gate is not None and gate.numel() > 1

        def scaled(tensor: torch.Tensor) -> torch.Tensor:
            if gate is None:
                return tensor
            return gated_residual_backward_op(tensor, None, gate, tensor.dtype, True, impl)[0]

        def dgate_of(gradient: torch.Tensor, product: torch.Tensor) -> torch.Tensor:
            return gated_residual_backward_op(gradient, product, gate, product.dtype, False, impl)[
                1
            ]

        # What is None here is not used below: mypy can't tell.
        activated: Any = None
        column_sums: Any = None
        scaled_rows: Any = None
        dhidden: Any = None
        dgate: Any = None
        dx = dweight_up = dbias_up = dweight_down = dbias_down = None
        if need_down or need_dgate:
            activated = as_matrix(_activate(hidden, activation, impl))
        if need_bias_down or (need_dgate and bias_down is not None):
            column_sums = _column_sums(rows)
        if need_dgate and is_vector:
            # Not (dout W) * a, whose sums are not those of dout's columns.
            dgate = dgate_of(activated.mT @ rows, weight_down.mT)
        if need_down or is_vector:
            scaled_rows = scaled(rows)
        if need_down:
            dweight_down = scaled_rows.mT @ activated
        if need_bias_down:
            dbias_down = scaled(column_sums[None])[0]
        if need_dx or need_up or need_bias_up or (need_dgate and not is_vector):
            dactivated = (scaled_rows if is_vector else rows) @ weight_down
            if need_dgate and not is_vector:
                dgate = dgate_of(dactivated, activated)
            dhidden = _activation_backward(as_matrix(hidden), dactivated, activation, impl)
            del dactivated
        del activated
        if need_dgate and bias_down is not None:
            dgate += dgate_of(column_sums[None], bias_down[None])

        def rescaled(tensor: torch.Tensor) -> torch.Tensor:
            return tensor if is_vector else scaled(tensor)

        if need_up:
            dweight_up = dhidden.mT @ rescaled(as_matrix(x))
        if need_bias_up:
            dbias_up = rescaled(_column_sums(dhidden)[None])[0]
        if need_dx:
            dx = rescaled(dhidden @ weight_up).view(*dout.shape[:-1], weight_up.shape[1])
        return (
            dresidual,
            dgate,
            dx,
            dweight_up,
            dbias_up,
            dweight_down,
            dbias_down,
            None,
            None,
        )


def feed_forward(
    x: torch.Tensor,
    weight_up: torch.Tensor,
    bias_up: torch.Tensor | None,
    weight_down: torch.Tensor,
    bias_down: torch.Tensor | None,
    *,
    activation: str = "gelu",
    residual: torch.Tensor | None = None,
    gate: torch.Tensor | None = None,
    impl: str = "auto",
) -> torch.Tensor:
    """residual + tanh(gate) * linear(activation(linear(x))), or without residual and gate.

    The feed-forward of a GATED XATTN-DENSE block (Flamingo, figure 4), x being normed already.

    Arguments:
        x: (..., width), fp32, fp16 or bf16 (fp64 outside Triton).
        weight_up: (hidden, width); bias_up: (hidden,) or None.
        weight_down: (width_out, hidden); bias_down: (width_out,) or None. Inside autocast weights
            and x are cast to its dtype, but for fp64 x.
        activation: "gelu" (the exact one: OpenFlamingo) or "squared_relu" (the paper).
        residual: (..., width_out), of any dtype; with gate.
        gate: (1,) or (width_out,); with residual.
        impl: "auto", "triton", "torch" or "reference", of what is not a matrix product.

    Returns:
        (..., width_out) of x's dtype, or of residual's.

    Raises:
        TypeError, ValueError: a wrong argument, by name.
        BackendUnavailableError: `impl` can't run here.
    """
    check_rows("x", x)
    one_of("activation", activation, ACTIVATIONS)
    if (residual is None) != (gate is None):
        raise ValueError("residual, gate: expected both or neither")
    dtype = autocast_dtype(x)
    width_before = x.shape[-1:]
    for name, weight, bias in (("up", weight_up, bias_up), ("down", weight_down, bias_down)):
        check_floating(f"weight_{name}", weight)
        check_parameter(f"weight_{name}", weight, x, [(*weight.shape[:1], *width_before)])
        width_before = weight.shape[:1]
        if bias is not None:
            check_parameter(f"bias_{name}", bias, x, [tuple(width_before)])
        for kind, tensor in (("weight", weight), ("bias", bias)):
            if tensor is not None and tensor.dtype != x.dtype and dtype is None:
                raise TypeError(f"{kind}_{name}: expected x's dtype {x.dtype}, got {tensor.dtype}")
    if residual is not None and gate is not None:
        width_out = weight_down.shape[0]
        check_parameter("residual", residual, x, [(*x.shape[:-1], width_out)])
        check_parameter("gate", gate, residual, [(1,), (width_out,)], of="residual")
    impl = choose_impl(impl, x)
    if impl == "reference" or (impl == "torch" and x.device.type != "cpu"):
        between = F.linear(x, weight_up, bias_up)
        between = F.gelu(between) if activation == "gelu" else squared_relu(between, impl=impl)
        out = F.linear(between, weight_down, bias_down)
        if residual is None or gate is None:
            return out
        return gated_residual(residual, out, gate, impl=impl)
    in_own_dtype: contextlib.AbstractContextManager[Any] = contextlib.nullcontext()
    if dtype is not None:
        in_own_dtype = torch.autocast(x.device.type, enabled=False)
        x = x.to(dtype)
        weight_up, weight_down = weight_up.to(dtype), weight_down.to(dtype)
        bias_up = None if bias_up is None else bias_up.to(dtype)
        bias_down = None if bias_down is None else bias_down.to(dtype)
    with in_own_dtype:
        return apply(
            _FeedForwardFn,
            residual,
            gate,
            x,
            weight_up,
            bias_up,
            weight_down,
            bias_down,
            activation,
            impl,
        )
