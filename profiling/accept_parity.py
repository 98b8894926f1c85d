"""Every kernel on the device by the three-way rule: ours, eager PyTorch, and an fp64 oracle.

Cases are those of the benchmarks, at their small shapes, and at shapes that other launch
configurations have; but for decoding's, whose block is no tensor.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from flamingo_fast.bench import attention, latent, modules, ops, pairs, pairs_layer, several_media
from flamingo_fast.bench.registry import (
    DTYPES,
    Benchmark,
    Case,
    Shape,
    Unavailable,
    normal,
    shape_name,
)
from flamingo_fast.ops.dispatch import VARLEN_IMPLS
from flamingo_fast.profiling.accept_context import Context, synchronize
from flamingo_fast.testing.compare import Comparison, compare, outputs_and_gradients

_DECODE = "GatedCrossAttentionBlock_decode"
_GQA = f"{attention.NAME}_gqa"


def _grouped_inputs(shape: Shape, dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
    """Of masked_cross_attention with half as many heads of keys and values."""
    inputs = attention.BENCHMARKS[attention.NAME].make_inputs(shape, dtype, device)
    heads = max(inputs["q"].shape[2] // 2, 1)
    return inputs | {name: inputs[name][..., :heads, :].contiguous() for name in ("k", "v")}


# With projections, whose rounding all implementations share.
LAYERS: Mapping[str, Benchmark] = {
    **pairs_layer.BENCHMARKS,
    **{name: each for name, each in modules.BENCHMARKS.items() if name != _DECODE},
}
BENCHMARKS: Mapping[str, Benchmark] = {
    **ops.BENCHMARKS,
    **attention.BENCHMARKS,
    _GQA: dataclasses.replace(
        attention.BENCHMARKS[attention.NAME],
        name=_GQA,
        make_inputs=_grouped_inputs,
        tiny_shape=(1, 16, 1, 2, 16, 16),
    ),
    **several_media.BENCHMARKS,
    **pairs.BENCHMARKS,
    **latent.BENCHMARKS,
    **LAYERS,
}

# Tiles that don't fill, long media, wide heads, one token, splits over keys: what the launch
# configurations of a GPU tell apart.
_TEXTS: tuple[Shape, ...] = (
    (2, 300, 2, 4, 64, 64),
    (2, 300, 2, 4, 128, 64),
    (2, 300, 2, 4, 64, 257),
    (2, 300, 2, 4, 64, 5),
    (2, 1, 2, 4, 64, 64),
    (2, 1, 2, 4, 128, 64),
)
_ROWS: tuple[Shape, ...] = ((33, 1001), (7, 4096), (300, 64))
MORE_SHAPES: Mapping[str, tuple[Shape, ...]] = {
    **dict.fromkeys(ops.BENCHMARKS, _ROWS),
    attention.NAME: _TEXTS,
    _GQA: _TEXTS[:2],
    several_media.ALL_PREVIOUS: _TEXTS,
    several_media.MLLAMA: ((1, 1, 1, 8, 2, 128, 4, 101),),
    latent.NAME: (
        (4, 64, 256, 4, 4, 128, 256),
        (4, 64, 256, 4, 1, 64, 256),
        (1, 64, 4096, 4, 4, 64, 4096),
        (4, 64, 256, 4, 4, 64, 37),
    ),
}


@dataclasses.dataclass(frozen=True)
class Subject:
    """An op at a shape and dtype. `function` takes the tensors that have gradients, and an impl."""

    benchmark: Benchmark
    shape: Shape
    dtype: str
    device: torch.device

    def __str__(self) -> str:
        return f"{self.benchmark.name} {shape_name(self.shape)} {self.dtype}"

    def case(self) -> Case:
        return Case(self.benchmark, self.shape, self.dtype, self.device)


def subjects(
    device: torch.device,
    *,
    quick: bool,
    names: Sequence[str] = (*BENCHMARKS,),
    dtypes: Sequence[str] = (*DTYPES,),
) -> list[Subject]:
    """On a CPU, which interprets them, kernels have the smallest shapes."""
    found = []
    for name in names:
        benchmark = BENCHMARKS[name]
        shapes: list[Shape] = [benchmark.tiny_shape]
        if device.type != "cpu":
            shapes.append(benchmark.quick_shape)
        if not quick:
            shapes += MORE_SHAPES.get(name, ())
        found += [Subject(benchmark, each, dtype, device) for each in shapes for dtype in dtypes]
    return found


class Legs:
    """Outputs and gradients of one case, by name, of each implementation."""

    def __init__(self, subject: Subject) -> None:
        self.case = subject.case()
        self.benchmark = subject.benchmark
        self.leaves = {
            name: value
            for name, value in self.case.inputs.items()
            if isinstance(value, torch.Tensor) and value.is_floating_point()
        }
        self.douts = [
            normal(tuple(self.case.expected[name].shape), torch.float64, self.case.device, seed=100)
            for name in self.benchmark.outputs
        ]

    def _run(
        self, function: Callable[..., Any], dtype: torch.dtype | None = None, **options: Any
    ) -> dict[str, torch.Tensor]:
        def call(*tensors: torch.Tensor) -> Any:
            given = {**self.case.inputs, **dict(zip(self.leaves, tensors, strict=True))}
            return function(*given.values(), **options)

        # Incoming gradients as the case's dtype rounds them, the oracle's too.
        rounded: list[torch.Tensor | None] = [
            each.to(DTYPES[self.case.dtype]) for each in self.douts
        ]
        return outputs_and_gradients(call, self.leaves, self.benchmark.outputs, rounded, dtype)

    def ours(self, impl: str) -> dict[str, torch.Tensor]:
        return self._run(self.benchmark.ours, impl=impl)

    def eager(self) -> dict[str, torch.Tensor]:
        """The benchmark's baseline; where that isn't here, or pads, ours in PyTorch's ops."""
        try:
            function = self.benchmark.build_eager(self.case, False)
        except Unavailable:
            return self.ours("torch")
        return self._run(function) if callable(function) else self.ours("torch")

    def oracle(self) -> dict[str, torch.Tensor]:
        return self._run(self.benchmark.ours, torch.float64, impl="reference")

    def compare(self, ours: Mapping[str, torch.Tensor]) -> list[Comparison]:
        """One for each output and gradient; of layers without a drift, which is that of their
        products' sums."""
        eager, oracle = self.eager(), self.oracle()
        is_layer = self.benchmark.name in LAYERS
        scales = self._of_layer(ours, oracle) if is_layer else self._of_op(oracle)
        found = [
            compare(name, ours[name], eager[name], oracle[name], scales.get(name))
            for name in oracle
        ]
        return [dataclasses.replace(each, drift_ulp=0.0) for each in found] if is_layer else found

    def _of_op(self, oracle: Mapping[str, torch.Tensor]) -> dict[str, float]:
        """A scalar gate's gradient is one sum of dx * y, whose terms cancel."""
        if "dgate" not in oracle or self.leaves["gate"].numel() > 1:
            return {}
        terms = oracle["dx"] * self.leaves["y"].detach().double()
        return {"dgate": terms.norm().item()}

    def _of_layer(
        self, ours: Mapping[str, torch.Tensor], oracle: Mapping[str, torch.Tensor]
    ) -> dict[str, float]:
        """Sums over tokens cancel; products of other shapes add their terms in another order."""
        out = ours[self.benchmark.outputs[0]]
        steps = 2 * out.numel() ** 0.5 * out.abs().max().item()
        scales = {}
        for name, tensor in oracle.items():
            largest = tensor.abs().max().item()
            if name.endswith("gate") and tensor.numel() == 1:
                scales[name] = steps
            elif tensor.dim() == 1:
                scales[name] = 4 * largest
            elif out.is_cuda:
                scales[name] = 2 * largest
        return scales


def verdict(comparisons: Sequence[Comparison]) -> str:
    """How near the worst tensor is to what is allowed.

    Raises:
        AssertionError: one is farther; names each that is.
    """
    if failed := [each for each in comparisons if not each.ok]:
        raise AssertionError("; ".join(map(str, failed)))
    shares = {each.name: each.max_error / each.max_limit for each in comparisons if each.max_limit}
    if not shares:
        return "all are zero"
    worst = max(shares, key=shares.__getitem__)
    return f"{len(comparisons)} tensors, worst {worst}: {shares[worst]:.0%} of what is allowed"


def parity(context: Context) -> None:
    """Kernels' outputs and all gradients, and that a second call gives the same bits."""
    from flamingo_fast.testing.guard import recorded

    every = subjects(context.device, quick=context.quick)

    def check(subject: Subject) -> str:
        legs = Legs(subject)
        with recorded() as launched:
            first = legs.ours("triton")
        again = legs.ours("triton")
        synchronize(context.device)
        if not launched.launches:
            raise AssertionError("no kernel was started")
        if others := [name for name in first if not torch.equal(first[name], again[name])]:
            raise AssertionError(f"other bits in a second call: {', '.join(others)}")
        return f"{verdict(legs.compare(first))}, {len(launched.launches)} launches"

    for index, subject in enumerate(mine := context.mine(every)):
        if context.seconds_left < 10:
            context.check(
                "all cases", False, f"{len(mine) - index} of {len(mine)} are left, out of time"
            )
            return
        context.attempt(str(subject), functools.partial(check, subject))
    if context.on_gpu:
        context.not_exercised("decoding's block and the largest shapes: bench compares those")
    else:
        context.not_exercised(
            "compiled kernels: Triton's interpreter ran them, at the smallest shapes"
        )


def _backend(legs: Legs, impl: str) -> str:
    return verdict(legs.compare(legs.ours(impl)))


def backends(context: Context) -> None:
    """Attention by other libraries' kernels, where they are; PyTorch's own runs anywhere."""
    names = (attention.NAME, pairs.NAME, latent.NAME)
    dtypes = ("bf16", "fp16")
    for subject in subjects(context.device, quick=context.quick, names=names, dtypes=dtypes):
        legs = Legs(subject)
        for impl in (*VARLEN_IMPLS, "sdpa", "torch"):
            context.attempt(
                f"{subject} {impl}",
                functools.partial(_backend, legs, impl),
            )
    if not context.on_gpu:
        context.not_exercised(f"{', '.join(VARLEN_IMPLS)}: they need a GPU")
