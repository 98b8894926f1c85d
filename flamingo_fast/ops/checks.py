"""Argument checks of the public functions. They look at metadata only: never a device sync."""

import math
from collections.abc import Sequence

import torch

_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def check_floating(name: str, tensor: torch.Tensor) -> None:
    """`tensor` is a floating-point tensor of 16, 32 or 64 bits."""
    if not isinstance(tensor, torch.Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(tensor).__name__}")
    if tensor.dtype not in _DTYPES:
        raise TypeError(f"{name}: expected a floating-point tensor, got {tensor.dtype}")


def check_rows(name: str, tensor: torch.Tensor) -> None:
    """`tensor` is floating-point and has a last dimension of at least 1."""
    check_floating(name, tensor)
    if tensor.dim() == 0 or tensor.shape[-1] == 0:
        raise ValueError(f"{name}: expected shape (..., width), width >= 1; got {_shape(tensor)}")


def check_like(name: str, tensor: torch.Tensor, x: torch.Tensor) -> None:
    """`tensor` is floating-point and has x's shape and device."""
    check_floating(name, tensor)
    if tensor.shape != x.shape:
        raise ValueError(f"{name}: expected x's shape {_shape(x)}, got {_shape(tensor)}")
    _check_device(name, tensor, x)


def check_parameter(
    name: str, tensor: torch.Tensor, x: torch.Tensor, shapes: Sequence[tuple[int, ...]]
) -> None:
    """`tensor` is floating-point, on x's device and of one of `shapes`."""
    check_floating(name, tensor)
    if tuple(tensor.shape) not in shapes:
        expected = " or ".join(str(shape) for shape in dict.fromkeys(shapes))
        raise ValueError(
            f"{name}: expected shape {expected} for x of shape {_shape(x)}; got {_shape(tensor)}"
        )
    _check_device(name, tensor, x)


def check_eps(eps: float) -> None:
    """`eps` is a finite number above 0."""
    if not isinstance(eps, float | int):
        raise TypeError(f"eps: expected a number > 0, got {eps!r}")
    if not 0 < eps < math.inf:
        raise ValueError(f"eps: expected a finite number > 0, got {eps!r}")


def _check_device(name: str, tensor: torch.Tensor, x: torch.Tensor) -> None:
    if tensor.device != x.device:
        raise ValueError(f"{name}: expected x's device {x.device}, got {tensor.device}")


def _shape(tensor: torch.Tensor) -> tuple[int, ...]:
    return tuple(tensor.shape)
