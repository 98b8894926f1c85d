"""Bytes and floating-point operations of each op, in closed form.

Useful work only: every input read once, every output written once, parameters once; but where
norms are too wide for a backward in one pass, it reads its inputs twice. Left out are what an
implementation adds of its own accord (partial sums of parameter gradients, parameters that each
program loads again) and what a cache may save. dx of a gated residual is its incoming gradient
itself and moves nothing. `mode` is "fwd", "bwd" or "fwd_bwd"; `itemsize` is the bytes of an
activation and of a parameter; statistics saved for the backward are fp32.

`*_eager` is what the plain PyTorch composition moves on a GPU when each of its kernels reads its
inputs and writes its outputs once. That favours eager: its norm backward really reads its inputs
a second time for the parameter gradients. Its floating-point operations are counted as ours.
"""

import dataclasses
import math
from collections.abc import Sequence

Shape = Sequence[int]

# Columns up to which the kernels' norm backward reads its inputs once.
WIDEST_ONE_PASS = 4096


@dataclasses.dataclass(frozen=True)
class Work:
    """Bytes loaded and stored; operations on vector units and, apart, in matrix products."""

    loaded: int
    stored: int
    vector_flops: int
    matmul_flops: int = 0

    @property
    def bytes(self) -> int:
        return self.loaded + self.stored

    def __add__(self, other: "Work") -> "Work":
        return Work(
            self.loaded + other.loaded,
            self.stored + other.stored,
            self.vector_flops + other.vector_flops,
            self.matmul_flops + other.matmul_flops,
        )


def _of_mode(mode: str, fwd: Work, bwd: Work) -> Work:
    return {"fwd": fwd, "bwd": bwd, "fwd_bwd": fwd + bwd}[mode]


def _elementwise(shape: Shape, itemsize: int, loads: int, stores: int, flops: int) -> Work:
    """`loads`, `stores` and `flops` per element."""
    numel = math.prod(shape)
    return Work(loads * numel * itemsize, stores * numel * itemsize, flops * numel)


def squared_relu(shape: Shape, itemsize: int, mode: str) -> Work:
    fwd = _elementwise(shape, itemsize, loads=1, stores=1, flops=2)
    bwd = _elementwise(shape, itemsize, loads=2, stores=1, flops=3)
    return _of_mode(mode, fwd, bwd)


def squared_relu_eager(shape: Shape, itemsize: int, mode: str) -> Work:
    """relu and square; their backward copies, doubles, multiplies and masks."""
    fwd = _elementwise(shape, itemsize, loads=2, stores=2, flops=2)
    bwd = _elementwise(shape, itemsize, loads=6, stores=4, flops=3)
    return _of_mode(mode, fwd, bwd)


def gated_residual(shape: Shape, itemsize: int, mode: str) -> Work:
    """With a gate of shape (1,)."""
    gate = Work(itemsize, 0, 0)
    fwd = _elementwise(shape, itemsize, loads=2, stores=1, flops=2) + gate
    bwd = _elementwise(shape, itemsize, loads=2, stores=1, flops=3) + gate + Work(0, itemsize, 0)
    return _of_mode(mode, fwd, bwd)


def gated_residual_eager(shape: Shape, itemsize: int, mode: str) -> Work:
    """A product and a sum; in the backward two products and a reduction."""
    fwd = _elementwise(shape, itemsize, loads=3, stores=2, flops=2)
    bwd = _elementwise(shape, itemsize, loads=4, stores=2, flops=3)
    return _of_mode(mode, fwd, bwd)


def norm(
    shape: Shape, itemsize: int, mode: str, *, rms: bool = False, column_pass: bool = False
) -> Work:
    """LayerNorm with weight and bias, or RMSNorm with weight.

    `column_pass`: the backward reads its two inputs again for the parameter gradients, as the
    kernels do for rows too wide to keep those sums in registers.
    """
    rows, width = math.prod(shape[:-1]), shape[-1]
    statistics = (1 if rms else 2) * rows * 4
    parameters = (1 if rms else 2) * width * itemsize
    fwd = _elementwise(shape, itemsize, loads=1, stores=1, flops=4 if rms else 7)
    fwd += Work(parameters, statistics, 0)
    bwd = _elementwise(shape, itemsize, loads=2, stores=1, flops=9 if rms else 13)
    # The backward has no use for the bias.
    bwd += Work(statistics + width * itemsize, parameters, 0)
    if column_pass:
        bwd += _elementwise(shape, itemsize, loads=2, stores=0, flops=0)
    return _of_mode(mode, fwd, bwd)


def gated_residual_norm(
    shape: Shape, itemsize: int, mode: str, *, rms: bool = False, column_pass: bool = False
) -> Work:
    """`norm` of a gated residual, both returned: y comes in and the residual goes out beside it.

    The backward reads both incoming gradients, the residual and y, and writes dx and dy.
    """
    gate = Work(itemsize, 0, 0)
    fwd = _elementwise(shape, itemsize, loads=1, stores=1, flops=2) + gate
    bwd = _elementwise(shape, itemsize, loads=2, stores=1, flops=4) + gate + Work(0, itemsize, 0)
    return _of_mode(mode, fwd, bwd) + norm(shape, itemsize, mode, rms=rms, column_pass=column_pass)


def gated_residual_norm_eager(shape: Shape, itemsize: int, mode: str, *, rms: bool = False) -> Work:
    """The eager gated residual, the norm, and in the backward the sum of both gradients."""
    add_gradients = _elementwise(shape, itemsize, loads=2, stores=1, flops=1)
    return (
        gated_residual_eager(shape, itemsize, mode)
        + norm(shape, itemsize, mode, rms=rms)
        + _of_mode(mode, Work(0, 0, 0), add_gradients)
    )
