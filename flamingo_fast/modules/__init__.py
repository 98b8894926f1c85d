"""nn.Modules on top of the ops."""

from flamingo_fast.modules.activation import SquaredReLU
from flamingo_fast.modules.blocks import GatedCrossAttentionBlock, VanillaCrossAttention
from flamingo_fast.modules.cross_attention import MaskedCrossAttention, project_media_kv
from flamingo_fast.modules.feed_forward import FeedForward
from flamingo_fast.modules.gated_residual import GatedResidual, GatedResidualNorm
from flamingo_fast.modules.norm import LayerNorm, RMSNorm
from flamingo_fast.modules.resampler import (
    MLPResampler,
    PerceiverAttention,
    PerceiverResampler,
    TransformerResampler,
)

__all__ = [
    "FeedForward",
    "GatedCrossAttentionBlock",
    "GatedResidual",
    "GatedResidualNorm",
    "LayerNorm",
    "MLPResampler",
    "MaskedCrossAttention",
    "PerceiverAttention",
    "PerceiverResampler",
    "RMSNorm",
    "SquaredReLU",
    "TransformerResampler",
    "VanillaCrossAttention",
    "project_media_kv",
]
