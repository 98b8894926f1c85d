"""Tensors as rows: how row-wise kernels reach (..., width) tensors of other strides without a copy.

Leading dimensions collapse to two levels, `outer` x `inner`. That covers contiguous tensors, padded
rows and slices of a fused projection, such as q of a (batch, seqlen, 3, heads, head_dim) tensor.
"""

import dataclasses
import math
from collections.abc import Sequence

import torch
import triton
import triton.language as tl


@triton.jit
def row_offsets(rows, inner, stride_outer, stride_inner):
    """Element offsets of `rows`, in 64 bits."""
    outer, within = (rows // inner).to(tl.int64), (rows % inner).to(tl.int64)
    return outer * stride_outer + within * stride_inner


@dataclasses.dataclass(frozen=True)
class RowTensor:
    """Row r starts at element (r // inner) * stride_outer + (r % inner) * stride_inner."""

    tensor: torch.Tensor
    stride_outer: int
    stride_inner: int


def _collapse(tensor: torch.Tensor) -> list[tuple[int, int]]:
    """The leading dimensions as few (size, stride) pairs, outermost first."""
    levels: list[tuple[int, int]] = []
    for size, stride in zip(tensor.shape[:-1], tensor.stride()[:-1], strict=True):
        if size == 1:
            continue
        if levels and levels[-1][1] == size * stride:
            levels[-1] = (levels[-1][0] * size, stride)
        else:
            levels.append((size, stride))
    return levels


def as_rows(*tensors: torch.Tensor) -> tuple[int, int, int, list[RowTensor]]:
    """(rows, width, inner, views) of tensors of one shape; unreachable ones are copied."""
    shape = tensors[0].shape
    width = shape[-1]
    rows = math.prod(shape[:-1])
    if all(tensor.is_contiguous() for tensor in tensors):
        return rows, width, 1, [RowTensor(tensor, width, 0) for tensor in tensors]
    inner = 1
    collapsed: list[tuple[torch.Tensor, list[tuple[int, int]]]] = []
    for tensor in tensors:
        levels = _collapse(tensor)
        reachable = width == 1 or tensor.stride(-1) == 1
        if len(levels) == 2 and inner == 1:
            inner = levels[1][0]
        if not reachable or len(levels) > 2 or (len(levels) == 2 and levels[1][0] != inner):
            tensor, levels = tensor.contiguous(), [(rows, width)]
        collapsed.append((tensor, levels))
    views = [RowTensor(tensor, *_level_strides(levels, inner)) for tensor, levels in collapsed]
    return rows, width, inner, views


def contiguous(parameter: torch.Tensor | None) -> torch.Tensor | None:
    """Kernels read parameters without strides, and a gate may be a column of something."""
    return None if parameter is None else parameter.contiguous()


def _level_strides(levels: Sequence[tuple[int, int]], inner: int) -> tuple[int, int]:
    if len(levels) == 2:
        return levels[0][1], levels[1][1]
    stride = levels[0][1] if levels else 0
    return (stride, 0) if inner == 1 else (stride * inner, stride)
