"""The `torch` implementations: eager PyTorch on a CPU, in few calls over blocks that stay in cache.

Large tensors are walked in blocks of rows, so that what one call writes the next still finds in
the second-level cache. Sums over rows are kept in fp32 (fp64 for fp64 inputs).
"""

from collections.abc import Iterator

import torch

# 256 Ki elements: 1 MiB of fp32, half of the second-level cache of a current server core.
_BLOCK_ELEMENTS = 1 << 18


def as_matrix(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.reshape(-1, tensor.shape[-1])


def row_chunks(tensor: torch.Tensor) -> Iterator[tuple[int, int]]:
    """[start, stop) of blocks of rows."""
    width = tensor.shape[-1]
    rows = tensor.numel() // width
    step = max(_BLOCK_ELEMENTS // width, 1)
    for start in range(0, rows, step):
        yield start, min(start + step, rows)


def _wide_dtype(tensor: torch.Tensor) -> torch.dtype:
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def gated_residual(x: torch.Tensor, y: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
    tanh_gate = gate.to(_wide_dtype(gate)).tanh()
    if x.dtype == y.dtype:
        out = torch.addcmul(x, y, tanh_gate.to(x.dtype))
    else:
        out = (x + y * tanh_gate).to(x.dtype)
    return out.contiguous()


class GatedResidualBackward:
    """dy and dgate of a gated residual from blocks of its gradient."""

    def __init__(
        self,
        dout: torch.Tensor,
        y: torch.Tensor | None,
        gate: torch.Tensor,
        y_dtype: torch.dtype,
        need_dy: bool,
    ) -> None:
        self._y = None if y is None else as_matrix(y)
        self._gate = gate
        self._wide_gate = gate.to(torch.float64)
        tanh_gate = self._wide_gate.tanh()
        self._factor = tanh_gate.item() if gate.numel() == 1 else tanh_gate.to(_wide_dtype(gate))
        self._dy = dout.new_empty(dout.shape if need_dy else (0,), dtype=y_dtype)
        self._sum = dout.new_zeros(gate.shape, dtype=_wide_dtype(dout))

    def add(self, dout: torch.Tensor, start: int, stop: int) -> None:
        """Takes the gradient (stop - start, width) of rows [start, stop)."""
        if self._dy.numel():
            torch.mul(dout, self._factor, out=as_matrix(self._dy)[start:stop])
        if self._y is not None:
            product = dout * self._y[start:stop]
            if self._gate.numel() == 1:
                self._sum += product.sum(dtype=self._sum.dtype)
            else:
                self._sum += product.sum(0, dtype=self._sum.dtype)

    def gradients(self) -> tuple[torch.Tensor, torch.Tensor]:
        """(dy, dgate), empty where not wanted."""
        if self._y is None:
            return self._dy, self._gate.new_empty(0, dtype=torch.float32)
        # Not 1 - tanh**2, which cancels for large gates.
        slope = self._wide_gate.cosh().pow(-2)
        return self._dy, (self._sum * slope).to(self._gate.dtype)


def gated_residual_backward(
    dout: torch.Tensor,
    y: torch.Tensor | None,
    gate: torch.Tensor,
    y_dtype: torch.dtype,
    need_dy: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    backward = GatedResidualBackward(dout, y, gate, y_dtype, need_dy)
    rows = as_matrix(dout)
    for start, stop in row_chunks(dout):
        backward.add(rows[start:stop], start, stop)
    return backward.gradients()


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
    wide = _wide_dtype(x)
    if not rms:
        native_weight, native_bias = _native_parameter(weight, x), _native_parameter(bias, x)
        if native_weight is None and native_bias is not None:
            native_weight = torch.ones_like(native_bias)
        normed, mean, rstd = torch.native_layer_norm(
            x, x.shape[-1:], native_weight, native_bias, eps
        )
        shape = x.shape[:-1]
        return normed.to(out_dtype), mean.to(wide).view(shape), rstd.to(wide).view(shape)
    normed = torch.empty(x.shape, dtype=out_dtype)
    rstd = torch.empty(x.shape[:-1], dtype=wide)
    rows, out_rows, rstd_rows = as_matrix(x), as_matrix(normed), rstd.view(-1, 1)
    for start, stop in row_chunks(x):
        block = rows[start:stop].to(wide)
        length = torch.linalg.vector_norm(block, dim=-1, keepdim=True)
        block_rstd = length.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
        rstd_rows[start:stop] = block_rstd
        target = out_rows[start:stop]
        if weight is None and bias is None:
            torch.mul(block, block_rstd, out=target)
            continue
        block = block * block_rstd
        if weight is not None:
            torch.mul(block, weight, out=target if bias is None else block)
        if bias is not None:
            torch.add(block, bias, out=target)
    return normed, x.new_empty(0, dtype=wide), rstd


def _native_parameter(parameter: torch.Tensor | None, x: torch.Tensor) -> torch.Tensor | None:
    """native_layer_norm takes parameters of x's dtype, or fp32 ones beside 16-bit x."""
    if parameter is None or x.dtype in (torch.float32, torch.float64):
        return None if parameter is None else parameter.to(x.dtype)
    return parameter.float()


class NormBackward:
    """dx, dweight and dbias of a norm from blocks of the gradient of its output."""

    def __init__(
        self,
        x: torch.Tensor,
        weight: torch.Tensor | None,
        bias: torch.Tensor | None,
        mean: torch.Tensor,
        rstd: torch.Tensor,
        rms: bool,
        need_dweight: bool,
        need_dbias: bool,
    ) -> None:
        self._x = as_matrix(x)
        self._weight, self._bias = weight, bias
        self._mean = None if rms else mean.view(-1, 1)
        self._rstd = rstd.view(-1, 1)
        self._dweight = x.new_zeros(x.shape[-1] if need_dweight else 0, dtype=rstd.dtype)
        self._dbias = x.new_zeros(x.shape[-1] if need_dbias else 0, dtype=rstd.dtype)

    def dx(self, dnormed: torch.Tensor, start: int, stop: int) -> torch.Tensor:
        """Takes the gradient (stop - start, width) of rows [start, stop); returns that of the input."""
        x, rstd = self._x[start:stop], self._rstd[start:stop]
        if self._mean is not None:
            return self._layer_norm(dnormed, x, self._mean[start:stop], rstd)
        wide = rstd.dtype
        dnormed = dnormed.to(wide)
        xhat = x.to(wide) * rstd
        product = dnormed * xhat
        if self._dbias.numel():
            self._dbias += dnormed.sum(0)
        if self._dweight.numel():
            self._dweight += product.sum(0)
        if self._weight is not None:
            product, dnormed = product.mul_(self._weight), dnormed * self._weight
        correction = product.mean(-1, keepdim=True)
        return torch.addcmul(dnormed, xhat, correction, value=-1).mul_(rstd)

    def _layer_norm(
        self, dnormed: torch.Tensor, x: torch.Tensor, mean: torch.Tensor, rstd: torch.Tensor
    ) -> torch.Tensor:
        weight, bias = _native_parameter(self._weight, x), _native_parameter(self._bias, x)
        if self._dweight.numel() == 0 and self._dbias.numel() == 0:
            bias = None
        elif weight is None:
            weight = torch.ones_like(x[0])
        native_dtype = x.dtype if weight is None else weight.dtype
        dx, dweight, dbias = torch.ops.aten.native_layer_norm_backward(
            dnormed.to(x.dtype).contiguous(),
            x,
            x.shape[-1:],
            mean.to(native_dtype),
            rstd.to(native_dtype),
            weight,
            bias,
            [True, self._dweight.numel() > 0, self._dbias.numel() > 0],
        )
        if self._dweight.numel():
            self._dweight += dweight
        if self._dbias.numel():
            self._dbias += dbias
        return dx

    def parameter_gradients(self) -> tuple[torch.Tensor, torch.Tensor]:
        """(dweight, dbias) in their parameters' dtypes, empty where not wanted."""
        sums = ((self._dweight, self._weight), (self._dbias, self._bias))
        dweight, dbias = (
            total.to(parameter.dtype if parameter is not None and total.numel() else torch.float32)
            for total, parameter in sums
        )
        return dweight, dbias


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
    backward = NormBackward(x, weight, bias, mean, rstd, rms, need_dweight, need_dbias)
    dx = x.new_empty(x.shape if need_dx else (0,))
    dnormed_rows = as_matrix(dnormed)
    for start, stop in row_chunks(x):
        block = backward.dx(dnormed_rows[start:stop], start, stop)
        if need_dx:
            as_matrix(dx)[start:stop] = block
    return dx, *backward.parameter_gradients()


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
    """(dx, dy, dgate, dweight, dbias), empty where not wanted."""
    backward = NormBackward(residual, weight, bias, mean, rstd, rms, need_dweight, need_dbias)
    gated = GatedResidualBackward(residual, y, gate, y_dtype, need_dy)
    dx = residual.new_empty(residual.shape if need_dx else (0,))
    dnormed_rows = as_matrix(dnormed)
    dresidual_rows = None if dresidual is None else as_matrix(dresidual)
    for start, stop in row_chunks(residual):
        block = backward.dx(dnormed_rows[start:stop], start, stop)
        if dresidual_rows is not None:
            block += dresidual_rows[start:stop]
        if need_dx:
            as_matrix(dx)[start:stop] = block
        gated.add(block, start, stop)
    dy, dgate = gated.gradients()
    return dx, dy, dgate, *backward.parameter_gradients()
