"""bf16 in Triton's interpreter, done right.

The interpreter keeps bf16 as uint16 bit patterns and, up to Triton 3.9 at least, adds, compares
and multiplies the patterns themselves; its fp32 -> bf16 cast truncates. Here every bf16 operation
is fp32 arithmetic followed by one round-to-nearest-even, as on a GPU:

* fp64 and integers become bf16 through fp32; that is torch's rule too.
* `tl.dot` of bf16, fp16 and fp32 into fp32 is summed in fp64 and rounded once: NumPy's own order
  of the terms depends on the CPU, on some of them also on the operands' strides, so that scores
  recomputed in a backward are other numbers than the forward's. A GPU goes through K in order.
* `tl.sum` and scans of bf16 round after every addition: a sum in pairs, a scan from the left.
  The GPU's order differs, so a kernel that wants accuracy sums in fp32.
* NaN is Triton's business and the same as for fp32: `tl.maximum` and `tl.max` drop NaN unless all
  operands are NaN (the interpreters of 3.6 and 3.7 keep it in `tl.maximum`), `x != x` is true.

exp, log, sqrt and the like need nothing: Triton refuses them for bf16; nor does clamp, which it
does in fp32. fp8 is as Triton has it.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import triton.language as tl
from triton.runtime.interpreter import (
    GridExecutor,
    InterpreterBuilder,
    ReduceOps,
    ScanOps,
    TensorHandle,
)

from flamingo_fast.testing.interpreter_patches import Replacements, missing_names, replaced


def widen(bits: np.ndarray) -> np.ndarray:
    """bf16 bit patterns (uint16) as fp32, exactly."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def narrow(values: np.ndarray) -> np.ndarray:
    """fp32 rounded to nearest even, as bf16 bit patterns (uint16); every NaN becomes 0x7fc0."""
    bits = values.astype(np.float32, copy=False).view(np.uint32)
    rounded = ((bits + (np.uint32(0x7FFF) + ((bits >> 16) & 1))) >> 16).astype(np.uint16)
    return np.where(np.isnan(values), np.uint16(0x7FC0), rounded)


def _is_bf16(operand: Any) -> bool:
    return isinstance(operand, TensorHandle) and operand.dtype.scalar == tl.bfloat16


def _widened(operand: Any) -> Any:
    return TensorHandle(widen(operand.data), tl.float32) if _is_bf16(operand) else operand


def _run_grid(stock: Callable[..., Any], executor: Any, *args: Any, **kwargs: Any) -> None:
    # A GPU does not warn of what IEEE arithmetic defines.
    with np.errstate(all="ignore"):
        stock(executor, *args, **kwargs)


def _elementwise(stock: Callable[..., Any], builder: Any, *operands: Any) -> TensorHandle:
    if not any(_is_bf16(operand) for operand in operands):
        return stock(builder, *operands)
    result = stock(builder, *(_widened(operand) for operand in operands))
    # Comparisons come back as bool data under the operands' dtype, which Triton then ignores.
    if result.data.dtype == np.bool_:
        return result
    return TensorHandle(narrow(result.data), tl.bfloat16)


def _dot(
    stock: Callable[..., Any],
    builder: Any,
    a: TensorHandle,
    b: TensorHandle,
    acc: TensorHandle,
    *rest: Any,
) -> TensorHandle:
    a, b = _widened(a), _widened(b)
    kinds = {operand.data.dtype for operand in (a, b)}
    if acc.data.dtype != np.float32 or not kinds <= {np.dtype(np.float16), np.dtype(np.float32)}:
        return stock(builder, a, b, acc, *rest)
    wide = (TensorHandle(each.data.astype(np.float64), tl.float64) for each in (a, b, acc))
    return TensorHandle(stock(builder, *wide, *rest).data.astype(np.float32), tl.float32)


def _cast(
    stock: Callable[..., Any], builder: Any, src: TensorHandle, dst_type: Any
) -> TensorHandle:
    if dst_type.scalar == tl.bfloat16:
        return src if _is_bf16(src) else TensorHandle(narrow(src.data), tl.bfloat16)
    return stock(builder, _widened(src), dst_type)


def _constant(_stock: Any, builder: Any, value: float) -> TensorHandle:
    return TensorHandle(narrow(np.array([value], dtype=np.float32)), tl.bfloat16)


def _min_max(stock: Callable[..., Any], ops: Any, operand: Any, *rest: Any, **kwargs: Any) -> Any:
    operand = operand[0] if isinstance(operand, tuple) else operand
    if not _is_bf16(operand.handle):
        return stock(ops, operand, *rest, **kwargs)
    widened = tl.core.tensor(_widened(operand.handle), operand.type.with_element_ty(tl.float32))
    results = stock(ops, widened, *rest, **kwargs)
    if isinstance(results, tuple):
        return _narrowed(results[0]), *results[1:]
    return _narrowed(results)


def _narrowed(tensor: Any) -> Any:
    if tensor.dtype != tl.float32:
        return tensor
    dtype = tensor.type.with_element_ty(tl.bfloat16) if tensor.type.is_block() else tl.bfloat16
    return tl.core.tensor(TensorHandle(narrow(tensor.handle.data), tl.bfloat16), dtype)


def _sum(stock: Callable[..., Any], ops: Any, operand: Any) -> Any:
    if not _is_bf16(operand.handle):
        return stock(ops, operand)
    values = widen(operand.handle.data)
    reduced_shape = (1,) * values.ndim
    if ops.axis is None:
        values = values.ravel()
    values = np.moveaxis(values, ops.axis or 0, 0)
    while len(values) > 1:
        half = len(values) // 2
        values = np.concatenate(
            [widen(narrow(values[:half] + values[half : 2 * half])), values[2 * half :]]
        )
    total = values[0]
    if ops.keep_dims:
        total = (
            total.reshape(reduced_shape) if ops.axis is None else np.expand_dims(total, ops.axis)
        )
    return ops.to_tensor(narrow(total), tl.bfloat16)


def _scan(combine: Callable[[np.ndarray, np.ndarray], np.ndarray]) -> Callable[..., Any]:
    def scan(stock: Callable[..., Any], ops: Any, operand: Any) -> Any:
        if not _is_bf16(operand.handle):
            return stock(ops, operand)
        values = np.moveaxis(widen(operand.handle.data), ops.axis, 0)
        for i in range(1, len(values)):
            values[i] = widen(narrow(combine(values[i - 1], values[i])))
        return [ops.to_tensor(narrow(np.moveaxis(values, 0, ops.axis)), tl.bfloat16)]

    return scan


_REPLACEMENTS: Replacements = {
    (GridExecutor, "__call__"): _run_grid,
    (InterpreterBuilder, "binary_op"): lambda stock, builder, lhs, rhs, op: _elementwise(
        lambda builder, lhs, rhs: stock(builder, lhs, rhs, op), builder, lhs, rhs
    ),
    (InterpreterBuilder, "unary_op"): lambda stock, builder, arg, op: _elementwise(
        lambda builder, arg: stock(builder, arg, op), builder, arg
    ),
    (InterpreterBuilder, "create_fma"): _elementwise,
    (InterpreterBuilder, "create_dot"): _dot,
    (InterpreterBuilder, "cast_impl"): _cast,
    (ReduceOps, "min_max"): _min_max,
    (ReduceOps, "sum"): _sum,
    (ScanOps, "cumsum"): _scan(np.add),
    (ScanOps, "cumprod"): _scan(np.multiply),
}
# Triton before 3.9 has no bf16 constants at all.
_ADDITIONS: Replacements = {(InterpreterBuilder, "get_bf16"): _constant}

_active = False


@contextlib.contextmanager
def correct_bf16() -> Iterator[None]:
    """Makes bf16 right in every kernel that is interpreted inside the block; may be nested."""
    global _active
    if _active:
        yield
        return
    with replaced({**_REPLACEMENTS, **_ADDITIONS}):
        _active = True
        try:
            yield
        finally:
            _active = False


def missing_patch_points() -> list[str]:
    """Names that `correct_bf16` replaces and this Triton does not have; empty when all is well."""
    return missing_names(_REPLACEMENTS)
