"""The `torch` implementations: eager PyTorch on a CPU, in few calls that allocate little.

New memory costs more than arithmetic here: the kernel clears each page of a large temporary. So
what needs temporaries walks blocks of rows and reuses their buffers. The smallest block stays in
the second-level cache. Large tensors take larger ones: that costs up to a tenth on an idle machine,
but threads meet after every call, and beside another busy process a meeting can cost milliseconds.

Sums over rows are kept in fp32 (fp64 for fp64 inputs).
"""

from collections.abc import Iterator

import torch

_WANTED_BLOCKS = 32
_SMALLEST_BLOCK, _LARGEST_BLOCK = 1 << 18, 1 << 20


def as_matrix(tensor: torch.Tensor) -> torch.Tensor:
    """(..., width) as (rows, width), also of one row without a dimension of its own and of none."""
    return tensor.reshape(-1, tensor.shape[-1])


def _block_length(rows: torch.Tensor) -> int:
    elements = min(max(rows.numel() // _WANTED_BLOCKS, _SMALLEST_BLOCK), _LARGEST_BLOCK)
    return max(elements // rows.shape[1], 1)


class _Scratch:
    """Memory for one block of rows."""

    def __init__(self, rows: torch.Tensor, dtype: torch.dtype) -> None:
        length = min(_block_length(rows), rows.shape[0])
        self._memory = rows.new_empty((length, rows.shape[1]), dtype=dtype)

    def of(self, block: slice) -> torch.Tensor:
        return self._memory[: block.stop - block.start]


class _WideRows:
    """The rows of a tensor as `dtype`, converted block by block where they are not.

    A block of converted rows is valid until the next one is taken.
    """

    def __init__(self, tensor: torch.Tensor, dtype: torch.dtype) -> None:
        self.rows = as_matrix(tensor)
        self.scratch = None if tensor.dtype == dtype else _Scratch(self.rows, dtype)

    def __getitem__(self, block: slice) -> torch.Tensor:
        rows = self.rows[block]
        return rows if self.scratch is None else self.scratch.of(block).copy_(rows)

    def blocks(self) -> Iterator[slice]:
        length = _block_length(self.rows)
        for start in range(0, self.rows.shape[0], length):
            yield slice(start, min(start + length, self.rows.shape[0]))


def squared_relu(x: torch.Tensor) -> torch.Tensor:
    """Contiguous, of x's dtype."""
    return torch.relu(x.contiguous()).square_()


def squared_relu_backward(x: torch.Tensor, dout: torch.Tensor) -> torch.Tensor:
    """dx, contiguous, of x's dtype."""
    dx = torch.relu(x.contiguous())
    # 2 * relu(x) * dout in one call.
    return torch.addcmul(x.new_zeros(()), dx, dout, value=2, out=dx)


def _keeps_gates(dtype: torch.dtype) -> bool:
    """Whether a vector gate may be rounded to `dtype`.

    To bf16, as a bf16 model does; not to fp16, where it vanishes at the start of its training.
    """
    return dtype != torch.float16


def gated_residual(x: torch.Tensor, y: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
    """Contiguous, of x's dtype."""
    tanh_gate = gate.double().tanh()
    if x.dtype == y.dtype and gate.numel() == 1:
        # As `value` the factor is not rounded to a 16-bit dtype.
        out = torch.addcmul(x, y, x.new_ones(1), value=tanh_gate.item())
    elif x.dtype == y.dtype and _keeps_gates(x.dtype):
        out = torch.addcmul(x, y, tanh_gate.to(x.dtype))
    else:
        wide = torch.promote_types(torch.promote_types(x.dtype, y.dtype), torch.float32)
        out = torch.addcmul(x.to(wide), y.to(wide), tanh_gate.to(wide)).to(x.dtype)
    return out.contiguous()


def gated_residual_backward(
    dout: torch.Tensor,
    y: torch.Tensor | None,
    gate: torch.Tensor,
    y_dtype: torch.dtype,
    need_dy: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(dy, dgate); dgate needs y. What is not needed comes back empty."""
    wide = torch.promote_types(torch.promote_types(dout.dtype, y_dtype), torch.float32)
    wide_gate = gate.double()
    tanh_gate = wide_gate.tanh()
    is_scalar = gate.numel() == 1
    dy = dout.new_empty(dout.shape if need_dy else (0,), dtype=y_dtype)
    dy_in_blocks = need_dy and not (dout.dtype == y_dtype and (is_scalar or _keeps_gates(y_dtype)))
    if need_dy and not dy_in_blocks:
        # A Python number multiplies in fp32 without promoting bf16.
        torch.mul(dout, tanh_gate.item() if is_scalar else tanh_gate.to(y_dtype), out=dy)
    total = dout.new_zeros(gate.shape, dtype=wide)
    if dy_in_blocks or y is not None:
        factor = tanh_gate.to(wide)
        dout_rows = _WideRows(dout, wide)
        y_rows = None if y is None else _WideRows(y, wide)
        products = (y_rows and y_rows.scratch) or _Scratch(dout_rows.rows, wide)
        for block in dout_rows.blocks():
            wide_dout = dout_rows[block]
            if dy_in_blocks:
                torch.mul(wide_dout, factor, out=as_matrix(dy)[block])
            if y_rows is not None:
                product = torch.mul(wide_dout, y_rows[block], out=products.of(block))
                # Not torch.dot, which adds up long vectors one after the other.
                total += product.sum() if is_scalar else product.sum(0)
    if y is None:
        return dy, gate.new_empty(0, dtype=torch.float32)
    # Not 1 - tanh**2, which cancels for large gates.
    return dy, (total * wide_gate.cosh().pow(-2)).to(gate.dtype)


def norm(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    eps: float,
    rms: bool,
    out_dtype: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(normed, mean, rstd); mean is empty for RMSNorm."""
    x = x.contiguous()
    wide = torch.promote_types(x.dtype, torch.float32)
    if not rms:
        native_weight, native_bias = _native_parameters(weight, bias, x)
        normed, mean, rstd = torch.native_layer_norm(
            x, x.shape[-1:], native_weight, native_bias, eps
        )
        return normed.to(out_dtype), mean.view(x.shape[:-1]), rstd.view(x.shape[:-1])
    if x.dtype == out_dtype == wide or x.numel() <= _SMALLEST_BLOCK:
        return _rms_at_once(x.to(wide), weight, bias, eps, out_dtype)
    normed = torch.empty(x.shape, dtype=out_dtype)
    rstd = torch.empty(x.shape[:-1], dtype=wide)
    rows, normed_rows, rstd_rows = _WideRows(x, wide), as_matrix(normed), rstd.view(-1, 1)
    scratch = _Scratch(rows.rows, wide)
    for block in rows.blocks():
        wide_x, out = rows[block], normed_rows[block]
        length = torch.linalg.vector_norm(wide_x, dim=-1, keepdim=True)
        rstd_rows[block] = length.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
        if weight is None and bias is None:
            torch.mul(wide_x, rstd_rows[block], out=out)
            continue
        xhat = torch.mul(wide_x, rstd_rows[block], out=scratch.of(block))
        if weight is not None:
            torch.mul(xhat, weight, out=out if bias is None else xhat)
        if bias is not None:
            torch.add(xhat, bias, out=out)
    return normed, x.new_empty(0, dtype=wide), rstd


def _rms_at_once(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    eps: float,
    out_dtype: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """RMSNorm of fp32 (fp64) rows: there are no temporaries where nothing is converted, and of few
    rows views of blocks would cost as much as arithmetic."""
    length = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    rstd = length.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
    normed = x * rstd
    if weight is not None:
        normed.mul_(weight)
    if bias is not None:
        normed.add_(bias)
    return normed.to(out_dtype), x.new_empty(0), rstd.squeeze(-1)


def _native_parameters(
    weight: torch.Tensor | None, bias: torch.Tensor | None, x: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Parameters in fp32 (fp64 beside fp64 x); native_layer_norm then returns such statistics."""
    wide = torch.promote_types(x.dtype, torch.float32)
    native_weight = torch.ones(x.shape[-1], dtype=wide) if weight is None else weight.to(wide)
    return native_weight, None if bias is None else bias.to(wide)


def norm_backward(
    dnormed: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    mean: torch.Tensor,
    rstd: torch.Tensor,
    rms: bool,
    need_dx: bool,
    need_dweight: bool,
    need_dbias: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(dx, dweight, dbias); what is not needed comes back empty."""
    nothing = x.new_empty(0)
    # In 16 bits PyTorch also adds up the parameters' gradients in 16 bits, which can be off by a
    # quarter after 2048 rows.
    if not rms and x.dtype == rstd.dtype:
        needs = [need_dx, need_dweight, need_dbias]
        dx, dweight, dbias = _native_backward(dnormed, x, weight, bias, mean, rstd, needs)
    else:
        dweight, dbias = _parameter_gradients(dnormed, x, mean, rstd, need_dweight, need_dbias)
        if not need_dx:
            dx = nothing
        elif rms:
            dx = _rms_dx(dnormed, x, weight, rstd)
        else:
            needs = [True, False, False]
            dx, _, _ = _native_backward(dnormed, x, weight, bias, mean, rstd, needs)
    return (
        dx if need_dx else nothing,
        _to_parameter(dweight, weight, need_dweight),
        _to_parameter(dbias, bias, need_dbias),
    )


def _native_backward(
    dnormed: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    mean: torch.Tensor,
    rstd: torch.Tensor,
    needs: list[bool],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """LayerNorm's (dx, dweight, dbias) where `needs` says so."""
    native_weight, native_bias = _native_parameters(weight, bias, x)
    return torch.ops.aten.native_layer_norm_backward(
        dnormed.to(x.dtype).contiguous(),
        x.contiguous(),
        x.shape[-1:],
        mean,
        rstd,
        native_weight,
        native_bias,
        needs,
    )


def _rms_dx(
    dnormed: torch.Tensor, x: torch.Tensor, weight: torch.Tensor | None, rstd: torch.Tensor
) -> torch.Tensor:
    """rstd * (g - xhat * mean(g * xhat)) with g = dnormed * weight."""
    wide = rstd.dtype
    if x.numel() <= _SMALLEST_BLOCK:
        rstd, wide_x, gradient = rstd.unsqueeze(-1), x.to(wide), dnormed.to(wide)
        if weight is not None:
            gradient = gradient * weight
        correction = (gradient * wide_x).sum(-1, keepdim=True)
        correction.mul_(rstd.square()).div_(x.shape[-1])
        return gradient.sub(wide_x * correction).mul_(rstd).to(x.dtype)
    dx = x.new_empty(x.shape)
    rows, dnormed_rows, dx_rows = _WideRows(x, wide), _WideRows(dnormed, wide), as_matrix(dx)
    scaled, scratch = (_Scratch(rows.rows, wide) for _ in range(2))
    rstd = rstd.view(-1, 1)
    for block in rows.blocks():
        wide_x, gradient = rows[block], dnormed_rows[block]
        if weight is not None:
            gradient = torch.mul(gradient, weight.to(wide), out=scaled.of(block))
        product = torch.mul(gradient, wide_x, out=scratch.of(block))
        correction = product.sum(-1, keepdim=True).mul_(rstd[block].square()).div_(x.shape[-1])
        torch.mul(wide_x, correction, out=product)
        torch.sub(gradient, product, out=product)
        torch.mul(product, rstd[block], out=dx_rows[block])
    return dx


def _parameter_gradients(
    dnormed: torch.Tensor,
    x: torch.Tensor,
    mean: torch.Tensor,
    rstd: torch.Tensor,
    need_dweight: bool,
    need_dbias: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(dweight, dbias) of a norm in fp32 or fp64; an empty mean is RMSNorm's.

    Sums over rows are matrix products, which are faster, with what each row is scaled by: dbias is
    1 @ dnormed, and dweight is rstd @ (dnormed * x) - (rstd * mean) @ dnormed.
    """
    wide = rstd.dtype
    if not need_dweight and not need_dbias:
        return x.new_empty(0), x.new_empty(0)
    rows, dnormed_rows = _WideRows(x, wide), _WideRows(dnormed, wide)
    rstd = rstd.view(1, -1)
    shift = torch.zeros_like(rstd) if mean.numel() == 0 else -rstd * mean.view(1, -1)
    scales = torch.cat([shift, torch.ones_like(rstd)])
    scaled = x.new_zeros((2, x.shape[-1]), dtype=wide)
    dweight = scaled.new_zeros((1, x.shape[-1]))
    # Over the converted rows, where there are such: less memory stays longer in cache.
    products = rows.scratch or _Scratch(rows.rows, wide)
    for block in rows.blocks():
        gradient = dnormed_rows[block]
        if need_dbias or mean.numel():
            torch.addmm(scaled, scales[:, block], gradient, out=scaled)
        if need_dweight:
            product = torch.mul(gradient, rows[block], out=products.of(block))
            torch.addmm(dweight, rstd[:, block], product, out=dweight)
    return dweight[0] + scaled[0], scaled[1]


def _to_parameter(
    total: torch.Tensor, parameter: torch.Tensor | None, needed: bool
) -> torch.Tensor:
    """In the parameter's dtype; ops return an unwanted gradient as fp32 of no elements."""
    if parameter is None or not needed:
        return torch.empty(0)
    return total.to(parameter.dtype)


def gated_residual_norm_backward(
    dresidual: torch.Tensor | None,
    dnormed: torch.Tensor,
    residual: torch.Tensor,
    y: torch.Tensor | None,
    gate: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    mean: torch.Tensor,
    rstd: torch.Tensor,
    rms: bool,
    y_dtype: torch.dtype,
    need_dx: bool,
    need_dy: bool,
    need_dweight: bool,
    need_dbias: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """(dx, dy, dgate, dweight, dbias); dgate needs y. What is not needed comes back empty."""
    need_sum = need_dx or need_dy or y is not None
    dx, dweight, dbias = norm_backward(
        dnormed, residual, weight, bias, mean, rstd, rms, need_sum, need_dweight, need_dbias
    )
    if need_sum and dresidual is not None:
        dx += dresidual
    dy, dgate = gated_residual_backward(dx, y, gate, y_dtype, need_dy)
    return dx if need_dx else dx.new_empty(0), dy, dgate, dweight, dbias
