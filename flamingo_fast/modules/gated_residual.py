"""The tanh-gated residual, alone and with the norm that follows it."""

import torch
from torch import nn

from flamingo_fast.ops.checks import one_of
from flamingo_fast.ops.dispatch import check_impl
from flamingo_fast.ops.gated_residual import gated_residual
from flamingo_fast.ops.norm import NORMS, gated_residual_norm


class GatedResidual(nn.Module):
    """x + tanh(gate) * y with a learnt gate, 0 at first (Flamingo, figure 4).

    Arguments:
        dim: width of a vector gate; None for a scalar one. A scalar gate has shape (1,), since
            fully_shard takes no 0-d parameters.
        impl: which implementation runs; see `flamingo_fast.gated_residual`.
    """

    def __init__(self, dim: int | None = None, *, impl: str = "auto") -> None:
        super().__init__()
        self.gate = nn.Parameter(torch.zeros(1 if dim is None else dim))
        self.impl = check_impl(impl)

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """(..., width), (..., width) -> (..., width) of x's dtype."""
        return gated_residual(x, y, self.gate, impl=self.impl)

    def extra_repr(self) -> str:
        return f"gate={tuple(self.gate.shape)}, impl={self.impl!r}"


class GatedResidualNorm(nn.Module):
    """residual = x + tanh(gate) * y and norm(residual) in one pass.

    Arguments:
        dim: width of x.
        norm: "layer" or "rms".
        eps: added to the variance or mean square.
        bias: whether the norm has one; by default LayerNorm does and RMSNorm does not.
        vector_gate: a gate of shape (dim,) instead of (1,).
        impl: which implementation runs; see `flamingo_fast.gated_residual_norm`.
    """

    def __init__(
        self,
        dim: int,
        *,
        norm: str = "layer",
        eps: float = 1e-5,
        bias: bool | None = None,
        vector_gate: bool = False,
        impl: str = "auto",
    ) -> None:
        super().__init__()
        self.gate = nn.Parameter(torch.zeros(dim if vector_gate else 1))
        self.weight = nn.Parameter(torch.ones(dim))
        has_bias = norm == "layer" if bias is None else bias
        self.bias = nn.Parameter(torch.zeros(dim)) if has_bias else None
        self.norm = one_of("norm", norm, NORMS)
        self.eps = eps
        self.impl = check_impl(impl)

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(..., dim), (..., dim) -> (residual, normed), as `flamingo_fast.gated_residual_norm`."""
        return gated_residual_norm(
            x,
            y,
            self.gate,
            self.weight,
            self.bias,
            eps=self.eps,
            norm=self.norm,
            impl=self.impl,
        )

    def extra_repr(self) -> str:
        return (
            f"{self.weight.shape[0]}, norm={self.norm!r}, eps={self.eps}, "
            f"bias={self.bias is not None}, gate={tuple(self.gate.shape)}, impl={self.impl!r}"
        )
