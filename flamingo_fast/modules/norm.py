"""LayerNorm and RMSNorm with the parameters and state-dict keys of torch.nn's."""

import torch
from torch import nn
from torch.nn.modules import normalization

from flamingo_fast.ops.checks import check_floating
from flamingo_fast.ops.dispatch import check_impl
from flamingo_fast.ops.norm import layer_norm, rms_norm

# PyTorch's: Liger's patches replace what torch.nn has of this name.
TorchLayerNorm = normalization.LayerNorm


class LayerNorm(TorchLayerNorm):
    """torch.nn.LayerNorm over the last dimension, through `flamingo_fast.layer_norm`.

    (..., dim) -> (..., dim) of x's dtype; inside autocast, of autocast's dtype.
    """

    def __init__(
        self, dim: int, eps: float = 1e-5, *, impl: str = "auto", **kwargs: object
    ) -> None:
        super().__init__(_one_dim(dim), eps, **kwargs)  # type: ignore[arg-type]
        self.impl = check_impl(impl)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return layer_norm(x, self.weight, self.bias, eps=self.eps, impl=self.impl)

    def without_parameters(self, x: torch.Tensor) -> torch.Tensor:
        """What `forward` multiplies by the weight."""
        return layer_norm(x, None, None, eps=self.eps, impl=self.impl)


class RMSNorm(nn.RMSNorm):
    """torch.nn.RMSNorm over the last dimension, through `flamingo_fast.rms_norm`.

    (..., dim) -> (..., dim) of x's dtype; inside autocast, of autocast's dtype. eps=None is the
    machine epsilon of fp32 (fp64 for fp64 x), as in torch.nn.RMSNorm.
    """

    def __init__(
        self, dim: int, eps: float | None = None, *, impl: str = "auto", **kwargs: object
    ) -> None:
        super().__init__(_one_dim(dim), eps, **kwargs)  # type: ignore[arg-type]
        self.impl = check_impl(impl)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return rms_norm(x, self.weight, eps=self._eps_of(x), impl=self.impl)

    def without_parameters(self, x: torch.Tensor) -> torch.Tensor:
        """What `forward` multiplies by the weight."""
        return rms_norm(x, None, eps=self._eps_of(x), impl=self.impl)

    def _eps_of(self, x: torch.Tensor) -> float:
        check_floating("x", x)
        # Not x's own dtype: torch.nn.RMSNorm too takes the epsilon of what it computes in.
        computed_in = torch.promote_types(x.dtype, torch.float32)
        return torch.finfo(computed_in).eps if self.eps is None else self.eps


def without_parameters(norm: TorchLayerNorm | RMSNorm, x: torch.Tensor) -> torch.Tensor:
    """What a norm, ours or torch.nn.LayerNorm, multiplies by its weight."""
    if isinstance(norm, LayerNorm | RMSNorm):
        return norm.without_parameters(x)
    return layer_norm(x, None, None, eps=norm.eps)


def fold_norm(
    norm: TorchLayerNorm | RMSNorm, linear: nn.Linear
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Weight and bias of linear(norm(x)) as one linear layer of `without_parameters(norm, x)`."""
    weight: torch.Tensor = linear.weight
    bias: torch.Tensor | None = linear.bias
    norm_weight, norm_bias = norm.weight, getattr(norm, "bias", None)
    if norm_bias is not None:
        shift = torch.mv(weight, norm_bias.to(weight.dtype))
        bias = shift if bias is None else shift + bias
    return weight if norm_weight is None else weight * norm_weight.to(weight.dtype), bias


def _one_dim(dim: int) -> int:
    if not isinstance(dim, int) or dim < 1:
        raise ValueError(f"dim: expected an int >= 1 (only the last dimension), got {dim!r}")
    return dim
