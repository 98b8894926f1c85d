"""layer_norm and rms_norm, alone or fused with the gated residual before them.

Saved for the backward: the input (the residual, where gated), one or two fp32 statistics a row,
and y where the gate needs a gradient.
"""

from typing import Any

import torch
import torch.nn.functional as F

from flamingo_fast import reference
from flamingo_fast.ops import cpu
from flamingo_fast.ops.checks import check_eps, check_like, check_parameter, check_rows, one_of
from flamingo_fast.ops.dispatch import (
    apply,
    autocast_dtype,
    differentiable_once,
    empty_gradient,
    register_op,
    resolve_impl,
)
from flamingo_fast.ops.gated_residual import gated_residual_backward_op

NORMS = ("layer", "rms")

_WIDEST_TRITON_ROW = 16384

_Optional = torch.Tensor | None


def _norm_forward(
    x: torch.Tensor,
    weight: _Optional,
    bias: _Optional,
    eps: float,
    rms: bool,
    out_dtype: torch.dtype,
    impl: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    if impl == "triton":
        from flamingo_fast.kernels.norm_forward import norm_fwd

        return norm_fwd(x, weight, bias, eps, rms, out_dtype)
    return cpu.norm(x, weight, bias, eps, rms, out_dtype)


def _fake_statistics(x: torch.Tensor, rms: bool) -> tuple[torch.Tensor, torch.Tensor]:
    dtype = torch.promote_types(x.dtype, torch.float32)
    mean = x.new_empty((0,) if rms else x.shape[:-1], dtype=dtype)
    return mean, x.new_empty(x.shape[:-1], dtype=dtype)


def _fake_norm_forward(
    x: torch.Tensor,
    weight: _Optional,
    bias: _Optional,
    eps: float,
    rms: bool,
    out_dtype: torch.dtype,
    impl: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return x.new_empty(x.shape, dtype=out_dtype), *_fake_statistics(x, rms)


def _norm_backward(*arguments: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Takes the arguments of the schema below, `impl` last."""
    *inputs, impl = arguments
    if impl == "triton":
        from flamingo_fast.kernels.norm_backward import norm_bwd

        return norm_bwd(*inputs)
    return cpu.norm_backward(*inputs)


def _fake_norm_backward(
    dnormed: torch.Tensor,
    x: torch.Tensor,
    weight: _Optional,
    bias: _Optional,
    mean: torch.Tensor,
    rstd: torch.Tensor,
    rms: bool,
    need_dx: bool,
    need_dweight: bool,
    need_dbias: bool,
    impl: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return (
        x.new_empty(x.shape if need_dx else (0,)),
        empty_gradient(weight, need_dweight, x),
        empty_gradient(bias, need_dbias, x),
    )


_norm_forward_op = register_op(
    "norm_fwd(Tensor x, Tensor? weight, Tensor? bias, float eps, bool rms, ScalarType out_dtype, "
    "str impl) -> (Tensor, Tensor, Tensor)",
    _norm_forward,
    _fake_norm_forward,
)
_norm_backward_op = register_op(
    "norm_bwd(Tensor dnormed, Tensor x, Tensor? weight, Tensor? bias, Tensor mean, Tensor rstd, "
    "bool rms, bool need_dx, bool need_dweight, bool need_dbias, str impl) "
    "-> (Tensor, Tensor, Tensor)",
    _norm_backward,
    _fake_norm_backward,
)


class _NormFn(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight: _Optional,
        bias: _Optional,
        eps: float,
        rms: bool,
        out_dtype: torch.dtype,
        impl: str,
    ) -> torch.Tensor:
        normed, mean, rstd = _norm_forward_op(x, weight, bias, eps, rms, out_dtype, impl)
        ctx.save_for_backward(x, weight, bias, mean, rstd)
        ctx.rms = rms
        ctx.impl = impl
        return normed

    @staticmethod
    @differentiable_once("layer_norm or rms_norm")
    def backward(ctx: Any, dnormed: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, weight, bias, mean, rstd = ctx.saved_tensors
        needs = ctx.needs_input_grad[:3]
        gradients = _norm_backward_op(
            dnormed, x, weight, bias, mean, rstd, ctx.rms, *needs, ctx.impl
        )
        return *_only(needs, gradients), None, None, None, None


def _only(
    needs: tuple[bool, ...], gradients: tuple[torch.Tensor, ...]
) -> tuple[torch.Tensor | None, ...]:
    return tuple(
        gradient if need else None for need, gradient in zip(needs, gradients, strict=True)
    )


def _gated_forward(
    x: torch.Tensor,
    y: torch.Tensor,
    gate: torch.Tensor,
    weight: _Optional,
    bias: _Optional,
    eps: float,
    rms: bool,
    out_dtype: torch.dtype,
    impl: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    if impl == "triton":
        from flamingo_fast.kernels.norm_forward import gated_residual_norm_fwd

        return gated_residual_norm_fwd(x, y, gate, weight, bias, eps, rms, out_dtype)
    residual = cpu.gated_residual(x, y, gate)
    return residual, *cpu.norm(residual, weight, bias, eps, rms, out_dtype)


def _fake_gated_forward(
    x: torch.Tensor,
    y: torch.Tensor,
    gate: torch.Tensor,
    weight: _Optional,
    bias: _Optional,
    eps: float,
    rms: bool,
    out_dtype: torch.dtype,
    impl: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    normed = x.new_empty(x.shape, dtype=out_dtype)
    return x.new_empty(x.shape), normed, *_fake_statistics(x, rms)


def _gated_backward(*arguments: Any) -> tuple[torch.Tensor, ...]:
    """Takes the arguments of the schema below, `impl` last."""
    *inputs, impl = arguments
    if impl == "triton":
        from flamingo_fast.kernels.norm_backward import gated_residual_norm_bwd

        return gated_residual_norm_bwd(*inputs)
    return cpu.gated_residual_norm_backward(*inputs)


def _fake_gated_backward(
    dresidual: _Optional,
    dnormed: torch.Tensor,
    residual: torch.Tensor,
    y: _Optional,
    gate: torch.Tensor,
    weight: _Optional,
    bias: _Optional,
    mean: torch.Tensor,
    rstd: torch.Tensor,
    rms: bool,
    y_dtype: torch.dtype,
    need_dx: bool,
    need_dy: bool,
    need_dweight: bool,
    need_dbias: bool,
    impl: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    return (
        residual.new_empty(residual.shape if need_dx else (0,)),
        residual.new_empty(residual.shape if need_dy else (0,), dtype=y_dtype),
        empty_gradient(gate, y is not None, residual),
        empty_gradient(weight, need_dweight, residual),
        empty_gradient(bias, need_dbias, residual),
    )


_gated_forward_op = register_op(
    "gated_residual_norm_fwd(Tensor x, Tensor y, Tensor gate, Tensor? weight, Tensor? bias, "
    "float eps, bool rms, ScalarType out_dtype, str impl) -> (Tensor, Tensor, Tensor, Tensor)",
    _gated_forward,
    _fake_gated_forward,
)
_gated_backward_op = register_op(
    "gated_residual_norm_bwd(Tensor? dresidual, Tensor dnormed, Tensor residual, Tensor? y, "
    "Tensor gate, Tensor? weight, Tensor? bias, Tensor mean, Tensor rstd, bool rms, "
    "ScalarType y_dtype, bool need_dx, bool need_dy, bool need_dweight, bool need_dbias, "
    "str impl) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _gated_backward,
    _fake_gated_backward,
)


class _GatedResidualNormFn(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        y: torch.Tensor,
        gate: torch.Tensor,
        weight: _Optional,
        bias: _Optional,
        eps: float,
        rms: bool,
        out_dtype: torch.dtype,
        impl: str,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        residual, normed, mean, rstd = _gated_forward_op(
            x, y, gate, weight, bias, eps, rms, out_dtype, impl
        )
        saved_y = y if ctx.needs_input_grad[2] else None
        ctx.save_for_backward(residual, saved_y, gate, weight, bias, mean, rstd)
        ctx.set_materialize_grads(False)
        if not any(ctx.needs_input_grad[:3]):
            ctx.mark_non_differentiable(residual)
        ctx.y_dtype = y.dtype
        ctx.rms = rms
        ctx.impl = impl
        return residual, normed

    @staticmethod
    @differentiable_once("gated_residual_norm")
    def backward(
        ctx: Any, dresidual: torch.Tensor | None, dnormed: torch.Tensor | None
    ) -> tuple[torch.Tensor | None, ...]:
        residual, y, gate, weight, bias, mean, rstd = ctx.saved_tensors
        needs = ctx.needs_input_grad[:5]
        need_dx, need_dy, need_dgate, need_dweight, need_dbias = needs
        if dnormed is not None:
            gradients = _gated_backward_op(
                dresidual,
                dnormed,
                residual,
                y,
                gate,
                weight,
                bias,
                mean,
                rstd,
                ctx.rms,
                ctx.y_dtype,
                need_dx,
                need_dy,
                need_dweight,
                need_dbias,
                ctx.impl,
            )
            return *_only(needs, gradients), None, None, None, None
        dy, dgate = None, None
        if dresidual is not None and (need_dy or need_dgate):
            dy, dgate = gated_residual_backward_op(
                dresidual, y, gate, ctx.y_dtype, need_dy, ctx.impl
            )
        return (
            dresidual if need_dx else None,
            dy if need_dy else None,
            dgate if need_dgate else None,
            *[None] * 6,
        )


def _normed_dtype(x: torch.Tensor) -> torch.dtype:
    """The dtype that the next projection wants: autocast's inside autocast, else x's."""
    return autocast_dtype(x) or x.dtype


def _is_best_in_torch(x: torch.Tensor, weight: _Optional, bias: _Optional) -> bool:
    """PyTorch's own LayerNorm can't be improved on in one dtype of 32 or 64 bits.

    With 16-bit x it adds up the gradients of weight and bias in 16 bits.
    """
    same = all(each is None or each.dtype == x.dtype for each in (weight, bias))
    return same and x.dtype.itemsize >= 4 and _normed_dtype(x) == x.dtype


def _check_norm(x: torch.Tensor, weight: _Optional, bias: _Optional, eps: float, impl: str) -> str:
    """Checks the arguments that all norms share; returns the implementation to run."""
    check_rows("x", x)
    width = x.shape[-1]
    for name, parameter in (("weight", weight), ("bias", bias)):
        if parameter is not None:
            check_parameter(name, parameter, x, [(width,)])
    check_eps(eps)
    too_wide = None
    if width > _WIDEST_TRITON_ROW:
        too_wide = f"the norm kernels take up to {_WIDEST_TRITON_ROW} columns, and x has {width}"
    return resolve_impl(impl, x, too_wide)


def layer_norm(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    *,
    eps: float,
    impl: str = "auto",
) -> torch.Tensor:
    """LayerNorm over the last dimension, statistics in fp32.

    Arguments:
        x: (..., width), fp32, fp16 or bf16 (fp64 outside Triton), any strides; in Triton up to
            16384 columns.
        weight, bias: (width,) or None. Their dtypes may differ from x's and never promote the
            result.
        eps: added to the variance, > 0.
        impl: "auto", "triton", "torch" or "reference".

    Returns:
        x's shape, contiguous; x's dtype, or autocast's inside autocast.

    Raises:
        TypeError, ValueError: a wrong argument, by name.
        BackendUnavailableError: `impl` can't run here.
    """
    impl = _check_norm(x, weight, bias, eps, impl)
    if impl == "reference":
        return reference.layer_norm(x, weight, bias, eps, _normed_dtype(x))
    if impl == "torch" and _is_best_in_torch(x, weight, bias):
        return F.layer_norm(x, x.shape[-1:], weight, bias, eps)
    return apply(_NormFn, x, weight, bias, float(eps), False, _normed_dtype(x), impl)


def rms_norm(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None = None,
    *,
    eps: float,
    impl: str = "auto",
) -> torch.Tensor:
    """RMSNorm over the last dimension; arguments, result and errors as `layer_norm`."""
    impl = _check_norm(x, weight, bias, eps, impl)
    if impl == "reference":
        return reference.rms_norm(x, weight, bias, eps, _normed_dtype(x))
    return apply(_NormFn, x, weight, bias, float(eps), True, _normed_dtype(x), impl)


def gated_residual_norm(
    x: torch.Tensor,
    y: torch.Tensor,
    gate: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None = None,
    *,
    eps: float,
    norm: str = "layer",
    impl: str = "auto",
) -> tuple[torch.Tensor, torch.Tensor]:
    """residual = x + tanh(gate) * y and norm(residual), in one pass over x and y.

    Arguments:
        x: (..., width), the residual stream: fp32, fp16 or bf16 (fp64 outside Triton), any
            strides; in Triton up to 16384 columns.
        y: x's shape; its dtype may differ.
        gate: (1,) or (width,).
        weight, bias: (width,) or None. Dtypes of gate, weight and bias never promote the results.
        eps: added to the variance or mean square, > 0.
        norm: "layer" or "rms".
        impl: "auto", "triton", "torch" or "reference".

    Returns:
        (residual, normed), contiguous, of x's shape. residual has x's dtype; normed too, or
        autocast's inside autocast. What is normalised is the residual as returned, after rounding.

    Raises:
        TypeError, ValueError: a wrong argument, by name.
        BackendUnavailableError: `impl` can't run here.
    """
    one_of("norm", norm, NORMS)
    impl = _check_norm(x, weight, bias, eps, impl)
    check_like("y", y, x)
    check_parameter("gate", gate, x, [(1,), (x.shape[-1],)])
    if impl == "reference":
        return reference.gated_residual_norm(x, y, gate, weight, bias, eps, norm, _normed_dtype(x))
    rms, dtype = norm == "rms", _normed_dtype(x)
    return apply(_GatedResidualNormFn, x, y, gate, weight, bias, float(eps), rms, dtype, impl)
