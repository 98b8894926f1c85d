"""The feed-forward of gated blocks and resamplers: norm, linear, activation, linear."""

from typing import Any

import torch
from torch import nn

from flamingo_fast.modules.activation import SquaredReLU
from flamingo_fast.modules.norm import LayerNorm, RMSNorm
from flamingo_fast.modules.options import check_dims, make_norm
from flamingo_fast.modules.plain import has_hooks, is_plain
from flamingo_fast.ops.checks import one_of
from flamingo_fast.ops.dispatch import check_impl
from flamingo_fast.ops.feed_forward import ACTIVATIONS, feed_forward
from flamingo_fast.ops.gated_residual import gated_residual


def activation_name(activation: nn.Module | None) -> str | None:
    """As `feed_forward` takes it; None: it takes no such activation."""
    if isinstance(activation, SquaredReLU):
        return "squared_relu"
    if isinstance(activation, nn.GELU) and activation.approximate == "none":
        return "gelu"
    return None


class FeedForward(nn.Sequential):
    """linear(activation(linear(norm(x)))), with OpenFlamingo's state-dict keys.

    For the backward are kept x, what is normed, and the first linear layer's output.

    Arguments:
        dim: width of x.
        mult: hidden width, in units of dim.
        activation: "gelu" (OpenFlamingo: the exact one) or "squared_relu" (Flamingo, A.1.4).
        norm: "layer" or "rms".
        bias: whether the linear layers have one.
        impl: "auto", "triton", "torch" or "reference".

    Raises:
        ValueError: a wrong argument, by name.
    """

    def __init__(
        self,
        dim: int,
        mult: float = 4,
        *,
        activation: str = "gelu",
        norm: str = "layer",
        bias: bool = False,
        impl: str = "auto",
    ) -> None:
        check_dims(dim=dim)
        hidden = int(dim * mult)
        if hidden < 1:
            raise ValueError(f"mult: expected a hidden width of at least 1, got {mult!r} x {dim}")
        super().__init__(
            make_norm(norm, dim, impl),
            nn.Linear(dim, hidden, bias=bias),
            nn.GELU()
            if one_of("activation", activation, ACTIVATIONS) == "gelu"
            else SquaredReLU(impl=impl),
            nn.Linear(hidden, dim, bias=bias),
        )
        self.impl = check_impl(impl)

    def __getitem__(self, index: Any) -> Any:
        """A module, or an nn.Sequential of a slice of them: it would not be a feed-forward."""
        if isinstance(index, slice):
            return nn.Sequential(*list(self)[index])
        return super().__getitem__(index)

    def is_plain(self) -> bool:
        """Whether `after_norm` does what this module would do after its norm."""
        return (
            type(self) is FeedForward
            and not has_hooks(self)
            and "forward" not in self.__dict__
            and is_plain(self[0])
            and isinstance(self[0], LayerNorm | RMSNorm)
            and self._activation() is not None
        )

    def _activation(self) -> str | None:
        """Its name; None where what follows the norm is not (or no longer) as it was made.

        Modules of a Sequential may be replaced, and others appended.
        """
        modules = tuple(self._modules.values())
        if len(modules) != 4 or not self._can_fuse(*modules[1:]):
            return None
        return activation_name(modules[2])

    def _can_fuse(self, up: Any, activation: Any, down: Any) -> bool:
        """Whether `after_norm` does what these modules would."""
        are_linear = isinstance(up, nn.Linear) and isinstance(down, nn.Linear)
        return are_linear and is_plain(up, activation, down)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(..., dim) -> (..., dim)."""
        return self.after_norm(self[0](x))

    def after_norm(
        self,
        normed: torch.Tensor,
        residual: torch.Tensor | None = None,
        gate: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """What follows the norm, and residual + tanh(gate) * it if these are given."""
        activation = self._activation()
        if activation is None:
            for module in list(self)[1:]:
                normed = module(normed)
            if residual is None or gate is None:
                return normed
            return gated_residual(residual, normed, gate, impl=self.impl)
        modules: list[Any] = list(self._modules.values())
        _, up, _, down = modules
        return feed_forward(
            normed,
            up.weight,
            up.bias,
            down.weight,
            down.bias,
            activation=activation,
            residual=residual,
            gate=gate,
            impl=self.impl,
        )
