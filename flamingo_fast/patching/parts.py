"""What fast forwards of several families share: norms and gated residuals of a peer's modules.

Fused operations read a peer's parameters past its modules. They do so only where a module is
nothing more than its class says; otherwise the peer's own modules are called, one by one.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from flamingo_fast.modules.norm import TorchLayerNorm
from flamingo_fast.ops.gated_residual import gated_residual
from flamingo_fast.ops.norm import gated_residual_norm
from flamingo_fast.patching.options import Options
from flamingo_fast.patching.state import does_more, is_patched

# (kind, weight, bias, eps) as the norms of `ops` have them.
Norm = tuple[str, torch.Tensor | None, torch.Tensor | None, float]

# What transformers' layers call a cache.
_CACHES = ("cache", "past_key_values", "layer_past")

# Rules of modules that are an RMS norm with `weight` and `variance_epsilon`.
RMS_NORM_RULES = ("idefics.rms_norm", "idefics2.rms_norm", "mllama.rms_norm")


def is_whole(*tensors: torch.Tensor | None) -> bool:
    """Whether they are ordinary tensors: not sharded, quantised, or of another subclass."""
    return all(each is None or type(each) in (nn.Parameter, torch.Tensor) for each in tensors)


def norm_of(module: nn.Module) -> Norm | None:
    """The norm that a module is, if its parameters may be read."""
    if does_more(module):
        return None
    if type(module) is TorchLayerNorm:
        if len(module.normalized_shape) != 1:
            return None
        found: Norm = ("layer", module.weight, module.bias, module.eps)
    elif is_patched(module, *RMS_NORM_RULES):
        found = ("rms", module.weight, None, module.variance_epsilon)  # type: ignore[assignment]
    else:
        return None
    return found if is_whole(found[1], found[2]) else None


def add_gated(
    x: torch.Tensor,
    y: torch.Tensor,
    gate: torch.Tensor,
    options: Options,
    tanh: nn.Module | None = None,
) -> torch.Tensor:
    """x + tanh(gate) * y, in the dtype that PyTorch's operators would give it.

    Arguments:
        x, y: (..., width).
        gate: one number, or `width` of them, with any dimensions of size 1 before.
        tanh: the peer's nn.Tanh, if it has one for this; its hooks see what they did.
    """
    if not options.gated_residual or not _can_fuse(x, y, gate) or _is_watched(tanh):
        return x + (gate.tanh() if tanh is None else tanh(gate)) * y
    return gated_residual(x, y, gate.reshape(-1))


def add_gated_norm(
    x: torch.Tensor,
    y: torch.Tensor,
    gate: torch.Tensor,
    norm: nn.Module,
    options: Options,
    tanh: nn.Module | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """residual = x + tanh(gate) * y and norm(residual); arguments as of `add_gated`."""
    found = norm_of(norm) if options.gated_residual and options.norm else None
    if (
        found is None
        or not _can_fuse(x, y, gate)
        or not _keeps_dtype(x, found)
        or _is_watched(tanh)
    ):
        residual = add_gated(x, y, gate, options, tanh)
        return residual, norm(residual)
    kind, weight, bias, eps = found
    return gated_residual_norm(x, y, gate.reshape(-1), weight, bias, eps=eps, norm=kind)


def _is_watched(tanh: nn.Module | None) -> bool:
    return tanh is not None and does_more(tanh)


# Elements; of fewer, fused operations take longer to call than to run: 33 us a gated layer.
_FEW, _FEW_IN_TRAINING = 1 << 16, 1 << 19


def are_few(x: torch.Tensor, few: int = _FEW) -> bool:
    """As in decoding on a CPU."""
    return (
        x.device.type == "cpu"
        and not torch.is_grad_enabled()
        and not torch.compiler.is_compiling()
        and x.numel() <= few
    )


def _are_few_in_training(x: torch.Tensor) -> bool:
    """On a CPU, whose fused backward is of several calls too."""
    is_on_cpu = x.device.type == "cpu" and not torch.compiler.is_compiling()
    return is_on_cpu and torch.is_grad_enabled() and x.numel() <= _FEW_IN_TRAINING


def _can_fuse(x: torch.Tensor, y: torch.Tensor, gate: torch.Tensor) -> bool:
    if are_few(x) or _are_few_in_training(x):
        return False
    promoted = torch.promote_types(torch.promote_types(x.dtype, y.dtype), gate.dtype)
    return (
        x.shape == y.shape
        and promoted == x.dtype
        and is_whole(gate)
        and gate.numel() in (1, x.shape[-1])
    )


def _keeps_dtype(x: torch.Tensor, norm: Norm) -> bool:
    """With weights of another dtype norms return that one, or refuse."""
    return norm[1] is None or norm[1].dtype == x.dtype


def checkpointed(forward: Callable[..., Any]) -> Callable[..., Any]:
    """A fast forward of a transformers' GradientCheckpointingLayer, checkpointed where that was.

    In transformers 5 the class's forward checkpoints itself, and a fast one takes its place; before
    the class's __call__ did, around either.
    """

    @functools.wraps(forward)
    def maybe_checkpointed(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if (
            getattr(self, "gradient_checkpointing", False)
            and self.training
            and torch.is_grad_enabled()
            and type(self).__call__ is nn.Module.__call__
        ):
            checkpoint: Any = self._gradient_checkpointing_func
            if not getattr(self, "_can_checkpoint_with_cache", False):
                # The backward runs the layer again, which would write to a cache twice.
                kwargs.update({name: None for name in _CACHES if name in kwargs})
            return checkpoint(functools.partial(forward, self, **kwargs), *args)
        return forward(self, *args, **kwargs)

    return maybe_checkpointed
