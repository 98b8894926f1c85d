"""Argument checks of the public functions. They look at metadata only: never a device sync."""

import math
from collections.abc import Sequence

import torch

from flamingo_fast.layout import MediaLayout
from flamingo_fast.layout.arguments import to_int32

_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def one_of(name: str, value: str, known: Sequence[str]) -> str:
    """`value` itself, if it is one of `known`."""
    if value not in known:
        raise ValueError(f"{name}: expected one of {', '.join(known)}; got {value!r}")
    return value


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
    name: str,
    tensor: torch.Tensor,
    x: torch.Tensor,
    shapes: Sequence[tuple[int, ...]],
    of: str = "x",
) -> None:
    """`tensor` is floating-point, on x's device and of one of `shapes`; `of` is x's name."""
    check_floating(name, tensor)
    # Not `in`: of sizes that may change, torch.compile of PyTorch 2.11 finds nothing in a list.
    if all(tensor.shape != shape for shape in shapes):
        expected = " or ".join(str(shape) for shape in dict.fromkeys(shapes))
        raise ValueError(
            f"{name}: expected shape {expected} for {of} of shape {_shape(x)}; got {_shape(tensor)}"
        )
    _check_device(name, tensor, x)


def check_eps(eps: float) -> None:
    """`eps` is a finite number above 0."""
    if not isinstance(eps, float | int):
        raise TypeError(f"eps: expected a number > 0, got {eps!r}")
    if not 0 < eps < math.inf:
        raise ValueError(f"eps: expected a finite number > 0, got {eps!r}")


def check_attention_inputs(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    layout: MediaLayout,
    softmax_scale: float | None,
) -> float:
    """q (B, L, H, D), k and v (media_total, R, Hkv, D) or (B, N, R, Hkv, D), all as `layout` says.

    Returns:
        softmax_scale, by default D ** -0.5.
    """
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        check_floating(name, tensor)
    if not isinstance(layout, MediaLayout):
        raise TypeError(f"layout: expected a MediaLayout, got {type(layout).__name__}")
    if q.dim() != 4 or q.shape[2] == 0 or q.shape[3] == 0:
        raise ValueError(f"q: expected shape (B, L, H, D), H and D >= 1; got {_shape(q)}")
    if q.shape[:2] != layout.media_start.shape:
        raise ValueError(
            f"layout: expected one of q's {q.shape[0]} x {q.shape[1]} tokens, got {layout!r}"
        )
    if k.dim() not in (4, 5):
        raise ValueError(
            f"k: expected shape (media_total, R, Hkv, D) or (B, N, R, Hkv, D), got {_shape(k)}"
        )
    if k.dim() == 5 and layout.media_total != layout.batch_size * layout.max_media:
        raise ValueError(
            "k: expected shape (media_total, R, Hkv, D), since the samples of the layout have "
            "different numbers of media, or numbers that are on a GPU; "
            f"got {_shape(k)} (k.flatten(0, 1))"
        )
    media = (layout.batch_size, layout.max_media) if k.dim() == 5 else (layout.media_total,)
    if k.shape[: len(media)] != media:
        raise ValueError(f"k: expected the layout's media {media} first, got {_shape(k)}")
    if k.shape[-1] != q.shape[3] or k.shape[-2] == 0 or q.shape[2] % k.shape[-2]:
        raise ValueError(
            f"k: expected heads that divide q's {q.shape[2]}, and its head_dim {q.shape[3]}; "
            f"got {_shape(k)}"
        )
    if v.shape != k.shape:
        raise ValueError(f"v: expected k's shape {_shape(k)}, got {_shape(v)}")
    for name, tensor in (("k", k), ("v", v)):
        if tensor.dtype != q.dtype:
            raise TypeError(f"{name}: expected q's dtype {q.dtype}, got {tensor.dtype}")
        _check_device(name, tensor, q)
    if layout.device != q.device:
        raise ValueError(f"layout: expected q's device {q.device}, got {layout.device}")
    return _softmax_scale(softmax_scale, q)


def check_latent_inputs(
    q: torch.Tensor,
    k_media: torch.Tensor,
    v_media: torch.Tensor,
    k_latents: torch.Tensor,
    v_latents: torch.Tensor,
    media_seqlens: torch.Tensor | None,
    softmax_scale: float | None,
) -> tuple[float, torch.Tensor | None]:
    """q (B, R, H, D), media (B, S, Hkv, D), latents (B, R, Hkv, D), media_seqlens (B,).

    Returns:
        softmax_scale, by default D ** -0.5, and media_seqlens as int32.
    """
    keys = {
        "k_media": k_media,
        "v_media": v_media,
        "k_latents": k_latents,
        "v_latents": v_latents,
    }
    for name, tensor in {"q": q, **keys}.items():
        check_floating(name, tensor)
    if q.dim() != 4 or q.shape[2] == 0 or q.shape[3] == 0:
        raise ValueError(f"q: expected shape (B, R, H, D), H and D >= 1; got {_shape(q)}")
    batch, latents, heads, head_dim = q.shape
    if (
        k_media.dim() != 4
        or k_media.shape[0] != batch
        or k_media.shape[3] != head_dim
        or k_media.shape[2] == 0
        or heads % k_media.shape[2]
    ):
        raise ValueError(
            f"k_media: expected shape ({batch}, S, Hkv, {head_dim}), Hkv a divisor of q's {heads} "
            f"heads; got {_shape(k_media)}"
        )
    of_latents = (batch, latents, *k_media.shape[2:])
    for name, tensor in keys.items():
        expected = _shape(k_media) if name.endswith("media") else of_latents
        if _shape(tensor) != expected:
            raise ValueError(f"{name}: expected shape {expected}, got {_shape(tensor)}")
        if tensor.dtype != q.dtype:
            raise TypeError(f"{name}: expected q's dtype {q.dtype}, got {tensor.dtype}")
        _check_device(name, tensor, q)
    if media_seqlens is not None:
        check_integer_tensor("media_seqlens", media_seqlens, (batch,), q)
        if media_seqlens.dtype != torch.int32:
            media_seqlens = to_int32(media_seqlens)
    return _softmax_scale(softmax_scale, q), media_seqlens


def check_integer_tensor(
    name: str, tensor: torch.Tensor, shape: tuple[int, ...], x: torch.Tensor
) -> None:
    """`tensor` is of integers, of `shape` and on x's device."""
    if not isinstance(tensor, torch.Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(tensor).__name__}")
    if tensor.dtype not in (torch.int8, torch.uint8, torch.int16, torch.int32, torch.int64):
        raise TypeError(f"{name}: expected integers, got {tensor.dtype}")
    if _shape(tensor) != shape:
        raise ValueError(f"{name}: expected shape {shape}, got {_shape(tensor)}")
    _check_device(name, tensor, x)


def _softmax_scale(softmax_scale: float | None, q: torch.Tensor) -> float:
    if softmax_scale is None:
        return q.shape[3] ** -0.5
    if (
        isinstance(softmax_scale, bool)
        or not isinstance(softmax_scale, float | int)
        or not math.isfinite(softmax_scale)
    ):
        raise ValueError(f"softmax_scale: expected a finite number, got {softmax_scale!r}")
    return float(softmax_scale)


def _check_device(name: str, tensor: torch.Tensor, x: torch.Tensor) -> None:
    if tensor.device != x.device:
        raise ValueError(f"{name}: expected device {x.device}, got {tensor.device}")


def _shape(tensor: torch.Tensor) -> tuple[int, ...]:
    return tuple(tensor.shape)
