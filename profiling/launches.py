"""Which of our kernels a benchmark's case launches, and on what, without running anything.

The case runs on a CPU as it would on a GPU, but for two things: launches are recorded, and PyTorch
computes no large float. What launches depend on, shapes and layouts, is then real and cheap.
"""

import contextlib
import dataclasses
import functools
import inspect
import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any
from unittest import mock

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from flamingo_fast.bench.registry import DTYPES, Benchmark, Shape
from flamingo_fast.kernels.launch import Launch, Target, recording
from flamingo_fast.modules import resampler
from flamingo_fast.ops import dispatch

# Masks and lengths are drawn as floats: those of this many elements are computed.
_SMALL = 2**16

_CPU = torch.device("cpu")


class _NoLargeFloats(TorchDispatchMode):
    """Operations on floats of many elements give memory that nobody wrote, of the right shape."""

    def __init__(self) -> None:
        super().__init__()
        self._shapes = FakeTensorMode()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        tensors = [each for each in tree_leaves((args, kwargs)) if isinstance(each, torch.Tensor)]
        is_cheap = len(tensors) > 0 and not any(map(_is_large_float, tensors))
        if func.namespace == "flamingo_fast" or func.is_view or is_cheap:
            return func(*args, **kwargs)
        if func._schema.is_mutable:
            return args[0] if "out" not in kwargs else kwargs["out"]
        with self._shapes as shapes:
            fake_args, fake_kwargs = tree_map_only(torch.Tensor, shapes.from_tensor, (args, kwargs))
            outputs = func(*fake_args, **fake_kwargs)
        # Drawn numbers, and the like.
        if not tensors and not any(map(_is_large_float, tree_leaves(outputs))):
            return func(*args, **kwargs)
        return tree_map_only(torch.Tensor, _unwritten, outputs)


def _is_large_float(value: Any) -> bool:
    is_float = isinstance(value, torch.Tensor) and value.is_floating_point()
    return is_float and value.numel() > _SMALL


def _unwritten(like: torch.Tensor) -> torch.Tensor:
    return torch.empty_strided(like.shape, like.stride(), dtype=like.dtype, device=like.device)


@contextlib.contextmanager
def _as_on_a_gpu() -> Iterator[None]:
    """Calls with impl="triton" reach the launchers, and modules do as for tensors of a GPU.

    In all threads: nothing else should call ops meanwhile.
    """
    project = resampler.project_for_layers

    def without_sharing(*inputs: Any, share: bool | None = None, **options: Any) -> Any:
        return project(*inputs, share=bool(share), **options)

    with (
        mock.patch.object(dispatch, "why_not_triton", lambda device: None),
        mock.patch.object(resampler, "project_for_layers", without_sharing),
    ):
        yield


def call_case(benchmark: Benchmark, shape: Shape, dtype: str, mode: str) -> None:
    """A call of a case inside `recording`: our kernels are launched, and nothing large is computed.

    Tensors are on the CPU: layouts have their values, and all else has none.

    Arguments:
        mode: "fwd" or "fwd_bwd".
    """
    with _as_on_a_gpu(), _NoLargeFloats():
        inputs = benchmark.make_inputs(shape, DTYPES[dtype], _CPU)
        leaves = [
            value.requires_grad_(mode != "fwd")
            for value in inputs.values()
            if isinstance(value, torch.Tensor) and value.is_floating_point()
        ]
        outputs = benchmark.ours(*inputs.values(), impl="triton")
        if mode != "fwd":
            outputs = outputs if isinstance(outputs, tuple) else (outputs,)
            torch.autograd.grad(outputs, leaves, [torch.empty_like(out) for out in outputs])


def launches_of(
    benchmark: Benchmark, shape: Shape, dtype: str, mode: str, target: Target
) -> list[Launch]:
    """What `call_case` launches on `target`, in order."""
    with recording(target) as launches:
        call_case(benchmark, shape, dtype, mode)
    return launches


@dataclasses.dataclass(frozen=True)
class Call:
    """A launch with its arguments by name: tensors, numbers and constants.

    Attributes:
        kernel: the function's name.
        before: the launch before it, if any: a second kernel of an op may depend on the first one.
    """

    kernel: str
    grid: tuple[int, ...]
    num_warps: int
    arguments: Mapping[str, Any]
    before: "Call | None" = None

    def __getitem__(self, name: str) -> Any:
        return self.arguments[name]

    @property
    def programs(self) -> int:
        return math.prod(self.grid)

    def num_bytes(self, *names: str) -> int:
        """Of the elements of tensors, those of an expanded dimension once; of none at all 0."""
        total = 0
        for tensor in (self[name] for name in names):
            if tensor is not None:
                sizes = zip(tensor.shape, tensor.stride(), strict=True)
                numel = math.prod(size if stride or not size else 1 for size, stride in sizes)
                total += numel * tensor.element_size()
        return total


def calls_of(launches: Iterable[Launch]) -> list[Call]:
    """The launches with their arguments by name."""
    calls: list[Call] = []
    for launch in launches:
        function = launch.kernel.fn
        named = dict(zip(_parameters(function), launch.args, strict=False)) | launch.constexprs
        before = dataclasses.replace(calls[-1], before=None) if calls else None
        name, warps = function.__name__, launch.options["num_warps"]
        calls.append(Call(name, launch.grid, warps, named, before))
    return calls


@functools.cache
def _parameters(function: Any) -> tuple[str, ...]:
    return tuple(inspect.signature(function).parameters)
