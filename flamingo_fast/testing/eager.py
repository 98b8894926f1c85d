"""What a user would write without this package: same-precision eager PyTorch.

The second leg of the three-way rule and the baseline of the benchmarks. Parameters are cast to
the activations' dtype, as in a model converted to that dtype.
"""

import torch
import torch.nn.functional as F


def squared_relu(x: torch.Tensor) -> torch.Tensor:
    return F.relu(x).square()


def gated_residual(x: torch.Tensor, y: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
    return x + gate.to(x.dtype).tanh() * y.to(x.dtype)


def _to(parameter: torch.Tensor | None, x: torch.Tensor) -> torch.Tensor | None:
    return None if parameter is None else parameter.to(x.dtype)


def layer_norm(
    x: torch.Tensor, weight: torch.Tensor | None, bias: torch.Tensor | None, eps: float
) -> torch.Tensor:
    return F.layer_norm(x, x.shape[-1:], _to(weight, x), _to(bias, x), eps)


def rms_norm(
    x: torch.Tensor, weight: torch.Tensor | None, bias: torch.Tensor | None, eps: float
) -> torch.Tensor:
    normed = F.rms_norm(x, x.shape[-1:], _to(weight, x), eps)
    return normed if bias is None else normed + bias.to(x.dtype)


def gated_residual_norm(
    x: torch.Tensor,
    y: torch.Tensor,
    gate: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    eps: float,
    norm: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    residual = gated_residual(x, y, gate)
    return residual, (rms_norm if norm == "rms" else layer_norm)(residual, weight, bias, eps)
