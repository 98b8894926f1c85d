"""A Triton interpreter that fails where a GPU would silently go wrong.

    with guard() as g:
        out = flamingo_fast.squared_relu(x, impl="triton")
    g.total().bytes_loaded

It patches private parts of the interpreter for the whole process; `missing_patch_points` names what
a new Triton has moved. TRITON_INTERPRET=1 must be set before Triton is imported.

Not seen: integer sums and scans (tl.sum, tl.cumsum) that wrap, and a store and a load of one
element by different lanes of one program without a barrier, which on a GPU is a race.
"""

import contextlib
import dataclasses
import inspect
from collections.abc import Callable, Iterator
from typing import Any, Literal
from unittest import mock

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter
from triton.runtime.errors import InterpreterError
from triton.runtime.interpreter import (
    GridExecutor,
    InterpretedFunction,
    InterpreterBuilder,
    TensorHandle,
)

from flamingo_fast.kernels import launch
from flamingo_fast.testing import interpreter_bf16
from flamingo_fast.testing.interpreter_patches import Replacements, missing_names, replaced
from flamingo_fast.testing.launch_memory import (
    GuardError,
    LaunchMemory,
    NondeterminismError,
    OutOfBoundsError,
    RaceError,
)

__all__ = [
    "Guard",
    "GuardError",
    "IntegerOverflowError",
    "LaunchRecord",
    "NondeterminismError",
    "OutOfBoundsError",
    "Poison",
    "RaceError",
    "guard",
    "missing_patch_points",
    "recorded",
]


Poison = Literal["nan", "huge"]


class IntegerOverflowError(GuardError):
    """A signed integer of 32 bits or fewer wrapped, even if the wrapped offset is in bounds."""


@dataclasses.dataclass
class LaunchRecord:
    """What one launch, or several, did.

    `bytes_*` count every lane that is not masked off; `sectors_*` are the bytes of the distinct
    32-byte sectors touched, which is what reaches DRAM if caches never miss twice. Atomics count
    as a load and a store. A dot of (M, K) and (K, N) counts 2 M N K.
    """

    kernel: str
    grid: tuple[int, int, int]
    bytes_loaded: int = 0
    bytes_stored: int = 0
    sectors_loaded: int = 0
    sectors_stored: int = 0
    dot_flops: int = 0


_COUNTERS = ("bytes_loaded", "bytes_stored", "sectors_loaded", "sectors_stored", "dot_flops")


@dataclasses.dataclass
class _Launch:
    record: LaunchRecord
    memory: LaunchMemory
    order: np.ndarray


class Guard:
    """What `guard` yields: `launches`, one record per finished launch in order, and their total."""

    def __init__(self, shuffle_seed: int | None, poison: Poison | None) -> None:
        self.launches: list[LaunchRecord] = []
        self._shuffle_seed = shuffle_seed
        self._poison = poison
        self._kernel = ""
        self._launch: _Launch

    def total(self, kernel: str = "") -> LaunchRecord:
        """The counters summed over the launches of `kernel`, by default of all; no grid."""
        launches = [launch for launch in self.launches if kernel in ("", launch.kernel)]
        sums = {name: sum(getattr(launch, name) for launch in launches) for name in _COUNTERS}
        return LaunchRecord(kernel, (0, 0, 0), **sums)

    def _replacements(self) -> Replacements:
        return {
            (GridExecutor, "__call__"): self._run_grid,
            (GridExecutor, "_init_args_hst"): self._host_arguments,
            (interpreter, "_implicit_cvt"): self._to_kernel_argument,
            (InterpreterBuilder, "set_grid_dim"): self._set_grid,
            (InterpreterBuilder, "set_grid_idx"): self._set_program,
            (InterpreterBuilder, "create_masked_load"): self._load,
            (InterpreterBuilder, "create_masked_store"): self._store,
            (InterpreterBuilder, "create_atomic_rmw"): self._atomic_rmw,
            (InterpreterBuilder, "create_atomic_cas"): self._atomic_cas,
            (InterpreterBuilder, "create_dot"): self._dot,
            (InterpreterBuilder, "create_add"): self._checked(np.add, "+"),
            (InterpreterBuilder, "create_sub"): self._checked(np.subtract, "-"),
            (InterpreterBuilder, "create_mul"): self._checked(np.multiply, "*"),
            (InterpreterBuilder, "create_shl"): self._checked(_shifted, "<<"),
            (InterpreterBuilder, "create_int_cast"): self._int_cast,
        }

    def _run_grid(
        self, stock: Callable[..., Any], executor: Any, *args: Any, **kwargs: Any
    ) -> None:
        self._kernel = executor.fn.__name__
        try:
            stock(executor, *args, **kwargs)
        except InterpreterError as error:
            cause: BaseException | None = error
            while cause is not None and not isinstance(cause, GuardError):
                cause = cause.__cause__
            if cause is None:
                raise
            # Each level of device functions has wrapped the error in the repr of the one below.
            raise cause from None
        record = self._launch.record
        record.sectors_loaded, record.sectors_stored = self._launch.memory.sectors()
        self.launches.append(record)

    def _host_arguments(
        self, stock: Callable[..., Any], executor: Any, args: Any, kwargs: dict[str, Any]
    ) -> Any:
        # The kernel works on these copies (for tensors on the CPU: on the same memory).
        host_args, host_kwargs = stock(executor, args, kwargs)
        by_name = inspect.getcallargs(executor.fn, *host_args, **host_kwargs)
        tensors = [entry for name, value in by_name.items() for entry in _tensors_in(name, value)]
        self._launch = _Launch(
            LaunchRecord(self._kernel, (1, 1, 1)),
            LaunchMemory(self._kernel, tensors),
            np.arange(1),
        )
        return host_args, host_kwargs

    def _to_kernel_argument(self, stock: Callable[..., Any], value: Any) -> Any:
        argument = stock(value)
        if hasattr(value, "data_ptr"):
            argument.handle.data = argument.handle.data + self._launch.memory.tag(value)
        return argument

    def _set_grid(self, stock: Callable[..., Any], builder: Any, *grid: int) -> None:
        stock(builder, *grid)
        launch = self._launch
        launch.record.grid = launch.memory.grid = (grid[0], grid[1], grid[2])
        launch.order = np.arange(grid[0] * grid[1] * grid[2])
        if self._shuffle_seed is not None:
            np.random.default_rng(self._shuffle_seed).shuffle(launch.order)

    def _set_program(self, stock: Callable[..., Any], builder: Any, x: int, y: int, z: int) -> None:
        launch = self._launch
        _, size_y, size_z = launch.memory.grid
        program = int(launch.order[(x * size_y + y) * size_z + z])
        launch.memory.program = program
        stock(builder, program // (size_y * size_z), program // size_z % size_y, program % size_z)

    def _access(
        self, kind: Literal["load", "store", "atomic"], pointers: TensorHandle, mask: Any
    ) -> TensorHandle:
        """Checks and counts one access; returns the pointers without their tags."""
        active = pointers.data[np.broadcast_to(mask, pointers.data.shape)]
        num_bytes = max(1, pointers.get_element_ty().primitive_bitwidth // 8)
        self._launch.memory.access(kind, active, num_bytes)
        record = self._launch.record
        if kind != "store":
            record.bytes_loaded += active.size * num_bytes
        if kind != "load":
            record.bytes_stored += active.size * num_bytes
        return TensorHandle(LaunchMemory.untag(pointers.data), pointers.dtype)

    def _load(
        self,
        stock: Callable[..., Any],
        builder: Any,
        ptrs: TensorHandle,
        mask: Any,
        other: TensorHandle | None,
        *rest: Any,
        **kwargs: Any,
    ) -> TensorHandle:
        active = np.asarray(mask.data)
        if other is None and self._poison is not None and not active.all():
            other = _poisoned(ptrs, self._poison)
        return stock(builder, self._access("load", ptrs, active), mask, other, *rest, **kwargs)

    def _store(
        self,
        stock: Callable[..., Any],
        builder: Any,
        ptrs: TensorHandle,
        value: TensorHandle,
        mask: Any,
        *rest: Any,
        **kwargs: Any,
    ) -> None:
        ptrs = self._access("store", ptrs, np.asarray(mask.data))
        return stock(builder, ptrs, value, mask, *rest, **kwargs)

    def _atomic_rmw(
        self,
        stock: Callable[..., Any],
        builder: Any,
        operation: Any,
        ptr: TensorHandle,
        value: TensorHandle,
        mask: TensorHandle,
        *rest: Any,
    ) -> TensorHandle:
        self._refuse_float_atomic(value)
        ptr = self._access("atomic", ptr, mask.data)
        return stock(builder, operation, ptr, value, mask, *rest)

    def _atomic_cas(
        self,
        stock: Callable[..., Any],
        builder: Any,
        ptr: TensorHandle,
        expected: TensorHandle,
        value: TensorHandle,
        *rest: Any,
    ) -> TensorHandle:
        self._refuse_float_atomic(value)
        return stock(builder, self._access("atomic", ptr, True), expected, value, *rest)

    def _refuse_float_atomic(self, value: TensorHandle) -> None:
        # tl.atomic_max and tl.atomic_min of floats get here as integers: LaunchMemory sees those.
        if value.dtype.scalar.is_floating():
            raise self._launch.memory.error(
                NondeterminismError,
                f"atomic on {value.dtype.scalar}: the result depends on the order of the programs",
            )

    def _dot(
        self,
        stock: Callable[..., Any],
        builder: Any,
        a: TensorHandle,
        b: TensorHandle,
        acc: TensorHandle,
        *rest: Any,
    ) -> TensorHandle:
        self._launch.record.dot_flops += 2 * acc.data.size * a.data.shape[-1]
        return stock(builder, a, b, acc, *rest)

    def _checked(
        self, operation: Callable[[np.ndarray, np.ndarray], np.ndarray], symbol: str
    ) -> Callable[..., TensorHandle]:
        """An integer operation that refuses to wrap. Unsigned ones may: hashes rely on it."""

        def checked(
            stock: Callable[..., Any], builder: Any, lhs: TensorHandle, rhs: TensorHandle
        ) -> TensorHandle:
            dtype = lhs.data.dtype
            if dtype.kind == "i" and dtype.itemsize < 8:
                exact = operation(lhs.data.astype(np.int64), rhs.data.astype(np.int64))
                self._refuse_wrapping(exact, dtype, f"{lhs.dtype.scalar} {symbol}")
            return stock(builder, lhs, rhs)

        return checked

    def _int_cast(
        self, stock: Callable[..., Any], builder: Any, src: TensorHandle, dst_type: Any, *rest: Any
    ) -> TensorHandle:
        # Narrower and unsigned results are truncated on purpose: packing, hashes.
        if (src.dtype.scalar, dst_type.scalar) == (tl.int64, tl.int32):
            self._refuse_wrapping(src.data, np.dtype(np.int32), "cast of int64 to int32")
        return stock(builder, src, dst_type, *rest)

    def _refuse_wrapping(self, exact: np.ndarray, dtype: np.dtype, what: str) -> None:
        limits = np.iinfo(dtype)
        wrapped = (exact < limits.min) | (exact > limits.max)
        if wrapped.any():
            raise self._launch.memory.error(
                IntegerOverflowError,
                f"{what} wraps in {wrapped.sum()} of {wrapped.size} "
                f"lanes: the exact result is {exact[wrapped][0]}",
            )


def _shifted(values: np.ndarray, places: np.ndarray) -> np.ndarray:
    """values << places for int64 that hold int32. Places that int32 does not have count as 32."""
    return values << np.minimum(places.astype(np.uint64), 32).astype(np.int64)


def _tensors_in(name: str, value: Any) -> Iterator[tuple[str, Any, torch.Tensor]]:
    if isinstance(value, tuple):
        for index, item in enumerate(value):
            yield from _tensors_in(f"{name}[{index}]", item)
    elif isinstance(value, interpreter.TensorDescriptor):
        yield from _tensors_in(name, value.base)
    elif hasattr(value, "data_ptr"):
        yield name, value, interpreter._unwrap_tensor(value)


def _poisoned(ptrs: TensorHandle, poison: Poison) -> TensorHandle:
    """Integers: half of the largest, an offset out of bounds that a small sum can't wrap."""
    dtype = ptrs.get_element_ty()
    np_dtype = interpreter._get_np_dtype(dtype)
    value: Any
    if dtype == tl.bfloat16:
        value = 0x7FC0 if poison == "nan" else 0x7F7F
    elif np_dtype.kind == "f":
        value = np.nan if poison == "nan" else np.finfo(np_dtype).max
    elif np_dtype.kind == "b":
        value = True
    else:
        # fp8 is stored as uint8; all bits set is a NaN in the common formats.
        value = np.iinfo(np_dtype).max // (1 if dtype.is_floating() else 2)
    return TensorHandle(np.full(ptrs.data.shape, value, np_dtype), dtype)


@contextlib.contextmanager
def _poisoned_empties() -> Iterator[None]:
    """`torch.empty` and its kin give NaN (integers: the largest value); fake tensors stay."""
    enabled = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    fill = torch._C._get_deterministic_fill_uninitialized_memory()
    torch.use_deterministic_algorithms(True, warn_only=warn_only or not enabled)
    torch._C._set_deterministic_fill_uninitialized_memory(True)
    try:
        yield
    finally:
        torch._C._set_deterministic_fill_uninitialized_memory(fill)
        torch.use_deterministic_algorithms(enabled, warn_only=warn_only)


_active = False


@contextlib.contextmanager
def guard(*, shuffle_seed: int | None = 0, poison: Poison | None = "nan") -> Iterator[Guard]:
    """Guards every kernel that is interpreted inside the block, however deep it is called.

    Inside, bf16 is right (see `interpreter_bf16`), programs run in a shuffled order, and these
    raise, naming the kernel, the program and the line:

    * OutOfBoundsError: a lane touches memory outside the tensor argument that its pointer comes
      from. Of an argument that is a view, the elements between its own are outside too.
    * RaceError: programs write one element, or one writes what another loads; lanes of one store
      write one element. Integer atomics are exempt.
    * IntegerOverflowError: +, -, * or << wraps in a signed integer of 32 bits or fewer, or a cast
      of int64 to int32 changes the value.
    * NondeterminismError: an atomic on floats, or on an argument of floats.

    Arguments:
        shuffle_seed: seeds the order of the programs; None: the interpreter's own order.
        poison: what lanes hold that a load without `other` masks off: "nan", or "huge", the largest
            finite value (fp8: NaN); integers a large value with both; None: whatever they hold.
            Both exist because neither shows every bug: tl.max and tl.maximum drop NaN, so a
            softmax that forgot other=-inf passes with it; "huge" is lost in a product with 0 and
            in a reciprocal, which NaN survives. Unless None, memory from `torch.empty`
            and its kin holds NaN (integers: a large value).

    Raises:
        RuntimeError: guards are nested, or Triton was imported without TRITON_INTERPRET=1.
    """
    global _active
    if _active:
        raise RuntimeError("guard() is already active; guards can't be nested")
    if not isinstance(tl.cdiv, InterpretedFunction):
        raise RuntimeError(
            "guard() needs Triton's interpreter: set TRITON_INTERPRET=1 before Triton is imported"
        )
    current = Guard(shuffle_seed, poison)
    with contextlib.ExitStack() as stack:
        stack.enter_context(interpreter_bf16.correct_bf16())
        stack.enter_context(replaced(current._replacements()))
        if poison is not None:
            stack.enter_context(_poisoned_empties())
        _active = True
        try:
            yield current
        finally:
            _active = False


@contextlib.contextmanager
def recorded(**options: object) -> Iterator[Guard]:
    """What `guard` yields, of compiled kernels: their launches are listed, and nothing checked."""
    current = Guard(shuffle_seed=None, poison=None)
    stock = launch.start

    def start(kernel: Any, grid: tuple[int, ...], *arguments: Any) -> None:
        x, y, z = (*grid, 1, 1)[:3]
        current.launches.append(LaunchRecord(kernel.__name__, (x, y, z)))
        stock(kernel, grid, *arguments)

    with mock.patch.object(launch, "start", start):
        yield current


def missing_patch_points() -> list[str]:
    """Names of the interpreter that the guard replaces and this Triton does not have."""
    return interpreter_bf16.missing_patch_points() + missing_names(
        Guard(shuffle_seed=None, poison=None)._replacements()
    )
