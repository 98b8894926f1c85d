"""Fused kernels, drop-in modules and a full model for Flamingo (arXiv 2204.14198)."""

from flamingo_fast.layout import MediaLayout
from flamingo_fast.ops.dispatch import BackendUnavailableError, use_impl
from flamingo_fast.ops.gated_residual import gated_residual
from flamingo_fast.ops.latent_attention import latent_attention
from flamingo_fast.ops.masked_cross_attention import masked_cross_attention
from flamingo_fast.ops.norm import gated_residual_norm, layer_norm, rms_norm
from flamingo_fast.ops.squared_relu import squared_relu
from flamingo_fast.patching import PatchReport, patch, patched, unpatch

__version__ = "0.1.0"

__all__ = [
    "BackendUnavailableError",
    "MediaLayout",
    "PatchReport",
    "__version__",
    "gated_residual",
    "gated_residual_norm",
    "latent_attention",
    "layer_norm",
    "masked_cross_attention",
    "patch",
    "patched",
    "rms_norm",
    "squared_relu",
    "unpatch",
    "use_impl",
]
