"""nn.Modules on top of the ops."""

from flamingo_fast.modules.activation import SquaredReLU
from flamingo_fast.modules.gated_residual import GatedResidual, GatedResidualNorm
from flamingo_fast.modules.norm import LayerNorm, RMSNorm

__all__ = ["GatedResidual", "GatedResidualNorm", "LayerNorm", "RMSNorm", "SquaredReLU"]
