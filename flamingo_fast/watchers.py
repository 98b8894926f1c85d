"""Who else may want to see what a call does, so that shortcuts past PyTorch step aside."""

import torch


def is_watched() -> bool:
    """Whether there is a tracer, a mode, a transform or a profiler."""
    return bool(
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack()
        # A default device is one, too.
        or torch._C._len_torch_function_stack()
        or torch._C._are_functorch_transforms_active()
        or torch.autograd._profiler_enabled()
        or torch._C._get_tracing_state()
    )


def is_differentiated_otherwise() -> bool:
    """Whether an autograd.Function's backward is not all that may be asked of it."""
    return bool(
        torch.compiler.is_compiling()
        or torch._C._are_functorch_transforms_active()
        or torch._C._get_tracing_state()
        or torch.autograd.forward_ad._current_level >= 0
    )
