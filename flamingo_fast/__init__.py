"""Fused kernels, drop-in modules and a full model for Flamingo (arXiv 2204.14198).

PyTorch, and what needs it, is imported when one of these names is first asked for, and the ops are
registered then: the command's --help need not wait for it.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
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

_NAMES = {
    "layout": ("MediaLayout",),
    "ops.dispatch": ("BackendUnavailableError", "use_impl"),
    "ops.gated_residual": ("gated_residual",),
    "ops.latent_attention": ("latent_attention",),
    "ops.masked_cross_attention": ("masked_cross_attention",),
    "ops.norm": ("gated_residual_norm", "layer_norm", "rms_norm"),
    "ops.squared_relu": ("squared_relu",),
    "patching": ("PatchReport", "patch", "patched", "unpatch"),
}
# What these import is at hand without an import of its own, too.
_SUBMODULES = ("layout", "modules", "ops", "patching", "ranges", "reference", "schedule")


def __getattr__(name: str) -> Any:
    if name in _SUBMODULES:
        return importlib.import_module(f"flamingo_fast.{name}")
    if name not in __all__:
        raise AttributeError(f"module 'flamingo_fast' has no attribute {name!r}")
    # All at once: whatever is asked for first, the same ops are registered.
    for module_name, names in _NAMES.items():
        module = importlib.import_module(f"flamingo_fast.{module_name}")
        globals().update({each: getattr(module, each) for each in names})
    return globals()[name]


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
