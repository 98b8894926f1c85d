"""Whether a module's weights may be read past its forward.

Fused paths do so. They step aside where a module's own forward does more than its class says: LoRA
and quantised layers are other classes, hooks see or change what passes, and sharded weights are
whole only inside their own module's forward.
"""

import sys

import torch
from torch import nn
from torch.nn.modules import module as _nn_module

from flamingo_fast.modules.activation import SquaredReLU
from flamingo_fast.modules.norm import LayerNorm, RMSNorm, TorchLayerNorm

_PLAIN = (nn.Linear, TorchLayerNorm, LayerNorm, RMSNorm, nn.GELU, SquaredReLU)
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def has_hooks(module: nn.Module) -> bool:
    """Of its own, or of all modules."""
    return any([module.__dict__[name] for name in _HOOKS]) or _nn_module._has_any_global_hook()


def is_plain(*modules: nn.Module) -> bool:
    """Whether each is a linear layer, norm or activation and nothing more, with whole weights."""
    # Asked at every call, of classes without modules of their own: `parameters()` would search.
    for module in modules:
        if type(module) not in _PLAIN or "forward" in module.__dict__ or has_hooks(module):
            return False
        for parameter in module._parameters.values():
            if parameter is not None and type(parameter) not in (nn.Parameter, torch.Tensor):
                return False
    return True


def is_sharded(module: nn.Module) -> bool:
    """Whether parts of it are spread over ranks by FSDP2: all ranks call them, or none."""
    if not torch.distributed.is_available():
        return False
    # The import takes a second, and is done wherever something is sharded.
    fsdp = sys.modules.get("torch.distributed.fsdp")
    return fsdp is not None and any(isinstance(each, fsdp.FSDPModule) for each in module.modules())
