"""Which implementation of attention runs, and that of other libraries' kernels."""

from collections.abc import Callable

import torch

from flamingo_fast.layout import MediaLayout
from flamingo_fast.ops.dispatch import ATTENTION_IMPLS, BackendUnavailableError, choose_impl


def choose_attention(impl: str, q: torch.Tensor) -> str:
    """`choose_impl` for q of (..., D); "torch" is for CPUs alone, and "sdpa" elsewhere."""
    not_in_triton = None
    if q.shape[-1] > 256:
        not_in_triton = f"the kernels take a head_dim up to 256, got {q.shape[-1]}"
    impl = choose_impl(impl, q, not_in_triton, ATTENTION_IMPLS)
    return "sdpa" if impl == "torch" and q.device.type != "cpu" else impl


def library_attention(
    impl: str, q: torch.Tensor, k: torch.Tensor, layout: MediaLayout, dense: bool
) -> Callable[..., torch.Tensor]:
    """The implementation of VARLEN_IMPLS, which takes q, k, v, layout and softmax_scale.

    Raises:
        BackendUnavailableError: it can't run here, or not with these.
    """
    # Imported here: it brings torch._dynamo, most of two seconds.
    from flamingo_fast.ops import varlen_attention

    if reason := varlen_attention.why_not(impl, q, k, layout, dense):
        raise BackendUnavailableError(f'impl="{impl}": {reason}')
    return varlen_attention.ADAPTERS[impl]
