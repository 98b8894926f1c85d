"""feed_forward: two linear layers around an activation, and the tanh-gated residual after them.

Saves its input and the first layer's output. The activation is computed again in the backward, and
what the gate's gradient needs is not the output of the second layer but sums that the gradient of
its weight consists of anyway: of dout * y the sum over tokens is that of weight * (dout^T a).
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from flamingo_fast.ops.checks import check_like, check_parameter, check_rows
from flamingo_fast.ops.dispatch import choose_impl
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


def check_activation(activation: str) -> str:
    """`activation` itself, if it names one."""
    if activation not in ACTIVATIONS:
        raise ValueError(
            f"activation: expected one of {', '.join(ACTIVATIONS)}; got {activation!r}"
        )
    return activation


def _activate(hidden: torch.Tensor, activation: str, impl: str) -> torch.Tensor:
    return F.gelu(hidden) if activation == "gelu" else squared_relu_forward_op(hidden, impl)


def _activation_backward(
    hidden: torch.Tensor, dout: torch.Tensor, activation: str, impl: str
) -> torch.Tensor:
    if activation == "gelu":
        return torch.ops.aten.gelu_backward(dout, hidden)
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
    @once_differentiable
    def backward(ctx: Any, dout: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        gate, x, hidden, weight_up, weight_down, bias_down = ctx.saved_tensors
        needs = ctx.needs_input_grad
        need_dgate, need_dx, need_up, need_bias_up, need_down, need_bias_down = needs[1:7]
        need_dhidden = need_dx or need_up or need_bias_up
        rows = dout.flatten(0, -2).to(weight_down.dtype)
        activated = None
        if need_down or need_dgate:
            activated = _activate(hidden, ctx.activation, ctx.impl).flatten(0, -2)
        dgate, dactivated, dweight_down, dbias_down = _gated_product_backward(
            rows,
            activated,
            weight_down,
            bias_down,
            gate,
            ctx.impl,
            need_dgate,
            need_dhidden,
            need_down,
            need_bias_down,
        )
        del activated
        dx = dweight_up = dbias_up = None
        if dactivated is not None:
            dhidden = _activation_backward(
                hidden.flatten(0, -2), dactivated, ctx.activation, ctx.impl
            )
            del dactivated
            if need_up:
                dweight_up = dhidden.mT @ x.flatten(0, -2)
            if need_bias_up:
                dbias_up = _column_sums(dhidden)
            if need_dx:
                dx = (dhidden @ weight_up).view(*dout.shape[:-1], -1)
        return (
            dout if needs[0] else None,
            dgate,
            dx,
            dweight_up,
            dbias_up,
            dweight_down,
            dbias_down,
            None,
            None,
        )


def _gated_product_backward(
    dout: torch.Tensor,
    activated: torch.Tensor | None,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    gate: torch.Tensor | None,
    impl: str,
    need_dgate: bool,
    need_dactivated: bool,
    need_dweight: bool,
    need_dbias: bool,
) -> tuple[torch.Tensor | None, ...]:
    """(dgate, dactivated, dweight, dbias) of tanh(gate) * (activated @ weight.mT + bias).

    Arguments:
        dout: (rows, width).
        activated: (rows, hidden); None if neither gate nor weight need a gradient.
    """
    dgate = dactivated = dweight = dbias = None
    if gate is None:
        if need_dactivated:
            dactivated = dout @ weight
        if need_dweight:
            assert activated is not None
            dweight = dout.mT @ activated
        return None, dactivated, dweight, _column_sums(dout) if need_dbias else None

    def through_gate(
        gradient: torch.Tensor, factor: torch.Tensor | None, dtype: torch.dtype
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return gated_residual_backward_op(gradient, factor, gate, dtype, True, impl)

    of_products: list[torch.Tensor] = []
    if need_dgate or need_dweight:
        assert activated is not None
        if gate.numel() > 1:
            # The columns of a vector gate are those of dout.
            product, of_product = through_gate(activated.mT @ dout, weight.mT, weight.dtype)
            dweight = product.mT
        elif need_dweight:
            dweight, of_product = through_gate(dout.mT @ activated, weight, weight.dtype)
        else:
            dactivated, of_product = through_gate(dout @ weight, activated, dout.dtype)
        of_products.append(of_product)
    if need_dbias or (need_dgate and bias is not None):
        assert bias is not None
        dbias, of_bias = through_gate(_column_sums(dout)[None], bias[None], bias.dtype)
        dbias = dbias[0]
        of_products.append(of_bias)
    if need_dactivated and dactivated is None:
        dactivated = through_gate(dout, None, dout.dtype)[0] @ weight
    if need_dgate:
        dgate = of_products[0] if len(of_products) == 1 else of_products[0] + of_products[1]
    return (
        dgate,
        dactivated if need_dactivated else None,
        dweight if need_dweight else None,
        dbias if need_dbias else None,
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
            and x are cast to its dtype.
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
    check_activation(activation)
    if (residual is None) != (gate is None):
        raise ValueError("residual, gate: expected both or neither")
    width, hidden = x.shape[-1], weight_up.shape[0]
    check_parameter("weight_up", weight_up, x, [(hidden, width)])
    check_parameter("weight_down", weight_down, x, [(weight_down.shape[0], hidden)])
    if residual is not None and gate is not None:
        check_like("residual", residual, x[..., :1].expand(*x.shape[:-1], weight_down.shape[0]))
        check_parameter("gate", gate, residual, [(1,), (residual.shape[-1],)])
    impl = choose_impl(impl, x)
    if impl == "reference" or (impl == "torch" and x.device.type != "cpu"):
        between = F.linear(x, weight_up, bias_up)
        between = F.gelu(between) if activation == "gelu" else squared_relu(between, impl=impl)
        out = F.linear(between, weight_down, bias_down)
        if residual is None or gate is None:
            return out
        return gated_residual(residual, out, gate, impl=impl)
    device_type = x.device.type
    if not x.is_meta and torch.is_autocast_enabled(device_type):
        dtype = torch.get_autocast_dtype(device_type)
        x = x.to(dtype)
        weight_up, weight_down = weight_up.to(dtype), weight_down.to(dtype)
        bias_up = None if bias_up is None else bias_up.to(dtype)
        bias_down = None if bias_down is None else bias_down.to(dtype)
        with torch.autocast(device_type, enabled=False):
            return _FeedForwardFn.apply(
                residual, gate, x, weight_up, bias_up, weight_down, bias_down, activation, impl
            )
    return _FeedForwardFn.apply(
        residual, gate, x, weight_up, bias_up, weight_down, bias_down, activation, impl
    )
