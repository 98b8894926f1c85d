"""The memory of one interpreted launch: what its programs may touch, and what they did."""

import functools
import math
from collections.abc import Callable, Iterable
from typing import Any, Literal

import numpy as np
import torch

from flamingo_fast.testing.interpreter_patches import kernel_line

SECTOR = 32

# Pointers carry their argument's number above the 47 bits of a user-space address, so arithmetic
# on them keeps it and a lane that runs out of one tensor into another is still caught.
_TAG_SHIFT = 48
_ADDRESS_MASK = np.uint64((1 << _TAG_SHIFT) - 1)
_SEVERAL_PROGRAMS = -1


class GuardError(RuntimeError):
    """A kernel did what the guard forbids; the message names the kernel and `file:line`."""


class OutOfBoundsError(GuardError):
    """A lane that is not masked off touched memory outside its tensor argument."""


class RaceError(GuardError):
    """The result depends on the order in which programs, or lanes of one store, run."""


class NondeterminismError(GuardError):
    """An atomic on floats: its result depends on the order in which programs run."""


class _Storage:
    """The bytes behind arguments, and who touched each granule: program number + 1, or 0.

    The arrays are made at first use; zeroed pages that no program reaches cost nothing.
    """

    def __init__(self, base: int, num_bytes: int) -> None:
        self.base = base
        self.num_bytes = num_bytes
        self.granule = num_bytes or 1

    @functools.cached_property
    def writers(self) -> np.ndarray:
        return np.zeros(self.num_bytes // self.granule + 1, np.int32)

    @functools.cached_property
    def readers(self) -> np.ndarray:
        return np.zeros(self.num_bytes // self.granule + 1, np.int32)

    @functools.cached_property
    def loaded(self) -> np.ndarray:
        return np.zeros(self.num_bytes // SECTOR + 1, bool)

    @functools.cached_property
    def stored(self) -> np.ndarray:
        return np.zeros(self.num_bytes // SECTOR + 1, bool)


class _Argument:
    def __init__(self, name: str, tensor: torch.Tensor, storage: _Storage) -> None:
        self.storage = storage
        self.first = tensor.data_ptr()
        self.itemsize = tensor.element_size()
        self.is_floating_point = tensor.is_floating_point()
        steps = list(zip(tensor.shape, tensor.stride(), strict=True))
        elements = 1 + sum((size - 1) * stride for size, stride in steps) if tensor.numel() else 0
        distinct = math.prod(size for size, stride in steps if stride)
        self.extent = elements * self.itemsize
        self.description = (
            f"argument {name!r} ({tensor.dtype}, shape {tuple(tensor.shape)}, "
            f"strides {tensor.stride()}, {self.extent} bytes)"
        )
        # Which elements of the extent belong to the tensor; None: all.
        self.footprint: np.ndarray | None = None
        if elements > distinct:
            self.footprint = np.zeros(elements, bool)
            np.lib.stride_tricks.as_strided(self.footprint, tensor.shape, tensor.stride())[...] = (
                True
            )

    def distance(self, address: int) -> int:
        return max(self.first - address, address - (self.first + self.extent), 0)

    def contains(self, addresses: np.ndarray, num_bytes: int) -> np.ndarray:
        """For each address, whether the `num_bytes` from there on belong to the tensor."""
        offsets = addresses - self.first
        inside = (offsets >= 0) & (offsets + num_bytes <= self.extent)
        if self.footprint is not None:
            offsets = offsets[inside]
            first, last = offsets // self.itemsize, (offsets + num_bytes - 1) // self.itemsize
            inside[inside] = self.footprint[first] & self.footprint[last]
        return inside


class LaunchMemory:
    """Checks and records the accesses of one launch.

    Arguments:
        kernel: the kernel's name, for messages.
        tensors: (name, the object that the kernel receives, the host tensor behind it). Only these
            may be touched, and of a tensor that is a view only its own elements.
    """

    def __init__(self, kernel: str, tensors: Iterable[tuple[str, Any, torch.Tensor]]) -> None:
        self.kernel = kernel
        self.grid = (1, 1, 1)
        self.program = 0
        self._arguments: list[_Argument] = []
        self._storages: dict[int, _Storage] = {}
        self._tags: dict[int, np.uint64] = {}
        for name, received, tensor in tensors:
            untyped = tensor.untyped_storage()
            base = untyped.data_ptr()
            storage = self._storages.setdefault(base, _Storage(base, untyped.nbytes()))
            storage.granule = min(storage.granule, tensor.element_size())
            self._arguments.append(_Argument(name, tensor, storage))
            self._tags[id(received)] = np.uint64(len(self._arguments) << _TAG_SHIFT)

    def tag(self, received: Any) -> np.uint64:
        """What to add to the pointer that the kernel gets for `received`; `untag` takes it off."""
        return self._tags[id(received)]

    @staticmethod
    def untag(pointers: np.ndarray) -> np.ndarray:
        return pointers & _ADDRESS_MASK

    def access(
        self, kind: Literal["load", "store", "atomic"], pointers: np.ndarray, num_bytes: int
    ) -> None:
        """Checks and records one access of the current program.

        Atomics must be in bounds and not in an argument of floats; programs may share what they
        touch.

        Arguments:
            pointers: (lanes,), uint64, tagged; the lanes that are not masked off.
            num_bytes: what each lane touches. Less than an element counts as the whole element.
        """
        if pointers.size == 0:
            return
        tags = pointers >> np.uint64(_TAG_SHIFT)
        if (tags == tags[0]).all():
            self._access_tagged(kind, int(tags[0]), pointers, num_bytes)
            return
        for tag in np.unique(tags):
            self._access_tagged(kind, int(tag), pointers[tags == tag], num_bytes)

    def _access_tagged(self, kind: str, tag: int, pointers: np.ndarray, num_bytes: int) -> None:
        addresses = self.untag(pointers).astype(np.int64)
        if 1 <= tag <= len(self._arguments):
            argument = self._arguments[tag - 1]
            inside = argument.contains(addresses, num_bytes)
            if not inside.all():
                where = addresses[~inside] - argument.first
                raise self.error(
                    OutOfBoundsError,
                    f"{kind}: {where.size} of {addresses.size} lanes outside "
                    f"{argument.description}: byte offsets {where.min()} to {where.max()}",
                )
            self._record(kind, argument, addresses, num_bytes)
            return
        # A pointer without a tag was not derived from an argument: it comes from a table, say.
        for argument in self._arguments:
            inside = argument.contains(addresses, num_bytes)
            self._record(kind, argument, addresses[inside], num_bytes)
            addresses = addresses[~inside]
        if addresses.size:
            raise self.error(
                OutOfBoundsError,
                f"{kind}: {addresses.size} lanes outside every tensor argument"
                + self._nearest(int(addresses[0])),
            )

    def _nearest(self, address: int) -> str:
        if not self._arguments:
            return ""
        nearest = min(self._arguments, key=lambda argument: argument.distance(address))
        return f"; nearest, {nearest.distance(address)} bytes away: {nearest.description}"

    def _record(
        self, kind: str, argument: _Argument, addresses: np.ndarray, num_bytes: int
    ) -> None:
        storage = argument.storage
        offsets = addresses - storage.base
        granules = offsets // storage.granule
        if num_bytes > storage.granule:
            granules = granules[:, None] + np.arange(num_bytes // storage.granule)
            granules = granules.ravel()
        if kind != "store":
            storage.loaded[offsets // SECTOR] = True
        if kind != "load":
            storage.stored[offsets // SECTOR] = True
        if kind == "load":
            self._check_load(argument, granules)
        elif kind == "store":
            self._check_store(argument, granules)
        elif argument.is_floating_point and addresses.size:
            raise self.error(
                NondeterminismError,
                f"atomic: the result depends on the order of the programs: {argument.description}",
            )

    def _check_load(self, argument: _Argument, granules: np.ndarray) -> None:
        storage, me = argument.storage, self.program + 1
        # An argument that nothing was stored to has no array of writers yet.
        if "writers" in vars(storage):
            self._check_others(argument, storage.writers[granules], "loads what", "wrote")
        readers = storage.readers[granules]
        alone = (readers == 0) | (readers == me)
        storage.readers[granules] = me if alone.all() else np.where(alone, me, _SEVERAL_PROGRAMS)

    def _check_store(self, argument: _Argument, granules: np.ndarray) -> None:
        storage = argument.storage
        self._check_others(argument, storage.writers[granules], "writes what", "also writes")
        if "readers" in vars(storage):
            self._check_others(argument, storage.readers[granules], "writes what", "loads")
        if (granules[1:] <= granules[:-1]).any() and np.unique(granules).size < granules.size:
            raise self.error(
                RaceError, f"store: several lanes write one element of {argument.description}"
            )
        storage.writers[granules] = self.program + 1

    def _check_others(
        self, argument: _Argument, touched_by: np.ndarray, mine: str, theirs: str
    ) -> None:
        others = touched_by[(touched_by != 0) & (touched_by != self.program + 1)]
        if others.size:
            several = others[0] == _SEVERAL_PROGRAMS
            other = "another program" if several else f"program {self._coordinates(others[0] - 1)}"
            raise self.error(
                RaceError,
                f"{mine} {other} {theirs}: {others.size} elements of {argument.description}",
            )

    def _coordinates(self, program: int) -> tuple[int, ...]:
        return tuple(int(index) for index in np.unravel_index(program, self.grid))

    def error(self, error: Callable[[str], GuardError], message: str) -> GuardError:
        """`error` with the kernel, the program and the line put before the message."""
        program = self._coordinates(self.program)
        return error(f"{self.kernel}, program {program}, {kernel_line()}: {message}")

    def sectors(self) -> tuple[int, int]:
        """Bytes of the distinct 32-byte sectors loaded and stored, each counted once."""
        loaded = sum(int(storage.loaded.sum()) for storage in self._storages.values())
        stored = sum(int(storage.stored.sum()) for storage in self._storages.values())
        return loaded * SECTOR, stored * SECTOR
