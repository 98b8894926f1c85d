"""What CPU implementations of attention share: memory that is used again, and two questions."""

import functools
import math

import torch


@functools.cache
def has_fast_bf16() -> bool:
    """Whether products of bf16 take less time than those of fp32."""
    return torch.cpu._is_amx_tile_supported()


def valid_lengths(media_seqlens: torch.Tensor | None, num_media: int, num_keys: int) -> list[int]:
    """How many of its keys are valid, of each medium; all without media_seqlens."""
    if media_seqlens is None:
        return [num_keys] * num_media
    return media_seqlens.clamp(0, num_keys).tolist()


class Buffers:
    """Tensors by name; one of a name is in the memory of the one before."""

    def __init__(self) -> None:
        self._buffers: dict[str, torch.Tensor] = {}

    def take(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """Not initialised, contiguous."""
        numel = math.prod(shape)
        buffer = self._buffers.get(name)
        if buffer is None or buffer.numel() < numel:
            buffer = self._buffers[name] = torch.empty(numel, dtype=dtype)
        return buffer[:numel].view(shape)
