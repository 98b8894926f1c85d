"""What each op means, in plain PyTorch: the oracles of the tests and impl="reference".

Every function computes in fp32 (fp64 for fp64 inputs), rounds once an output and returns contiguous
tensors. Nothing here imports Triton.
"""

import torch


def _upcast(tensor: torch.Tensor) -> torch.Tensor:
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def squared_relu(x: torch.Tensor) -> torch.Tensor:
    """relu(x)**2, of x's dtype: the activation of the paper's feed-forwards (appendix A.1.4)."""
    return torch.relu(_upcast(x)).square().to(x.dtype).contiguous()


def gated_residual(x: torch.Tensor, y: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
    """x + tanh(gate) * y (Flamingo, figure 4); x's shape and dtype."""
    # Autograd's 1 - tanh**2 cancels for large gates: at 10 nothing of it is left in fp32.
    tanh_gate = torch.tanh(gate.double()).to(_upcast(x).dtype)
    return (_upcast(x) + tanh_gate * _upcast(y)).to(x.dtype).contiguous()


def layer_norm(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    eps: float,
    out_dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """(x - mean) / sqrt(var + eps) * weight + bias over the last dimension (biased variance)."""
    wide = _upcast(x)
    wide = wide - wide.mean(-1, keepdim=True)
    wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return _affine(wide, weight, bias).to(out_dtype or x.dtype).contiguous()


def rms_norm(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    eps: float,
    out_dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """x / sqrt(mean(x**2) + eps) * weight + bias over the last dimension."""
    wide = _upcast(x)
    wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return _affine(wide, weight, bias).to(out_dtype or x.dtype).contiguous()


def _affine(
    xhat: torch.Tensor, weight: torch.Tensor | None, bias: torch.Tensor | None
) -> torch.Tensor:
    if weight is not None:
        xhat = xhat * _upcast(weight)
    if bias is not None:
        xhat = xhat + _upcast(bias)
    return xhat


def gated_residual_norm(
    x: torch.Tensor,
    y: torch.Tensor,
    gate: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    eps: float,
    norm: str,
    out_dtype: torch.dtype | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(residual, norm(residual)), the residual rounded to x's dtype before it is normalised."""
    residual = gated_residual(x, y, gate)
    normalise = rms_norm if norm == "rms" else layer_norm
    return residual, normalise(residual, weight, bias, eps, out_dtype)
