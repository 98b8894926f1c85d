"""Activations of the feed-forward."""

import torch
from torch import nn

from flamingo_fast.ops.dispatch import check_impl
from flamingo_fast.ops.squared_relu import squared_relu


class SquaredReLU(nn.Module):
    """relu(x)**2, elementwise; see `flamingo_fast.squared_relu`."""

    def __init__(self, *, impl: str = "auto") -> None:
        super().__init__()
        self.impl = check_impl(impl)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return squared_relu(x, impl=self.impl)
