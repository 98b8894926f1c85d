"""What attention ops share: memory for gradients, how matrices are multiplied, and the scale."""

from typing import Any

import torch

from flamingo_fast.watchers import is_differentiated_otherwise


def input_precision() -> str:
    """Of fp32 matrix products in the kernels: what the user allows cuBLAS."""
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"


def positive_scale(q: torch.Tensor, softmax_scale: float) -> tuple[torch.Tensor, float]:
    """q and a scale above 0 of the same scores: the largest one is found before it is scaled."""
    if softmax_scale > 0:
        return q, softmax_scale
    return (q * 0, 1.0) if softmax_scale == 0 else (-q, -softmax_scale)


def new_dq(q: torch.Tensor, needed: bool) -> torch.Tensor:
    """Memory for dq; fp32 of no elements if it is not needed."""
    return q.new_empty(q.shape) if needed else q.new_empty(0, dtype=torch.float32)


def new_dkv(k: torch.Tensor, needed: bool, interleaved: bool) -> torch.Tensor:
    """Memory for dk and dv together; fp32 of no elements if they are not needed."""
    if not needed:
        return k.new_empty(0, dtype=torch.float32)
    media, num_keys, kv_heads, head_dim = k.shape
    if interleaved:
        return k.new_empty(media, num_keys, 2, kv_heads, head_dim)
    return k.new_empty(2, media, num_keys, kv_heads, head_dim)


def separate(dkv: torch.Tensor, interleaved: bool) -> torch.Tensor:
    """dk and dv, (2, media_total, R, Hkv, D)."""
    return dkv.movedim(2, 0) if interleaved else dkv


def of_one_projection(k: torch.Tensor, v: torch.Tensor) -> bool:
    """Whether k and v are halves of (media_total, R, 2, Hkv, D); dk and dv then become such too.

    Not under torch.compile, which can't trace a tensor's offset.
    """
    if torch.compiler.is_compiling():
        return False
    width = k.shape[2] * k.shape[3]
    return bool(
        k.stride() == v.stride()
        and k.stride()[1:] == (2 * width, k.shape[3], 1)
        and v.storage_offset() - k.storage_offset() == width
    )


def unbind_kv(projected: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """k and v of (..., R, 2, Hkv, D): its halves, whose gradients become one without a copy.

    PyTorch's `unbind` would copy both into a new tensor.
    """
    wants_grad = torch.is_grad_enabled() and projected.requires_grad
    if not wants_grad or is_differentiated_otherwise():
        k, v = projected.unbind(-3)
        return k, v
    return _UnbindKVFn.apply(projected)


class _UnbindKVFn(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, projected: torch.Tensor) -> tuple[torch.Tensor, ...]:
        ctx.shape = projected.shape
        return projected.unbind(-3)

    @staticmethod
    def backward(ctx: Any, dk: torch.Tensor, dv: torch.Tensor) -> torch.Tensor:
        strides, stride = [], 1
        for size in reversed(ctx.shape):
            strides.append(stride)
            stride *= size
        strides.reverse()
        are_halves = (
            not torch.is_grad_enabled()  # `as_strided` would have no second derivative.
            and all(type(x) is torch.Tensor and torch._C._has_storage(x) for x in (dk, dv))
            and dk.stride() == dv.stride() == (*strides[:-3], *strides[-2:])
            and dv.storage_offset() - dk.storage_offset() == strides[-3]
            and dk.untyped_storage().data_ptr() == dv.untyped_storage().data_ptr()
        )
        if are_halves:
            return dk.as_strided(ctx.shape, strides)
        return torch.stack([dk, dv], -3)
