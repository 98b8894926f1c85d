"""What is benchmarked: an op, its inputs, and the providers that compute it.

A new op is one `Benchmark` in a table such as `ops.BENCHMARKS`; a new competitor is one
`Provider` in its `others`.
"""

import dataclasses
import os
import shutil
import sys
import sysconfig
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch._inductor.config

from flamingo_fast.bench.timing import MIN_ROUNDS
from flamingo_fast.bench.work import Work
from flamingo_fast.ops.dispatch import TRITON_INSTALLED

MODES = ("fwd", "fwd_bwd")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

Shape = tuple[int, ...]
Call = Callable[[], Any]


def shape_name(shape: Shape) -> str:
    return "x".join(map(str, shape))


class Unavailable(Exception):
    """A provider can't run here; the message says why."""


def of_peer(load: Callable[[], Any]) -> Any:
    """What `load` gives of a peer's package; raises Unavailable where that is not installed."""
    try:
        return load()
    except ImportError as error:
        raise Unavailable(str(error)) from None


@dataclasses.dataclass(frozen=True)
class Rearranged:
    """A function of the inputs in another arrangement than the reference's, such as padded.

    arrange: (name, value) of an input or of an output's incoming gradient, as `function` takes it;
        done before the clock starts.
    restore: (name, tensor) of what comes out, as in `Case.expected`; only the gate wants it.
    """

    function: Callable[..., Any]
    arrange: Callable[[str, Any], Any]
    restore: Callable[[str, torch.Tensor], torch.Tensor]


@dataclasses.dataclass(frozen=True)
class Floor:
    """What an op can't do without, alone: timed beside it, and compared with nothing."""

    call: Callable[[], object]


Function = Callable[..., Any] | Rearranged | Floor


@dataclasses.dataclass(frozen=True)
class Provider:
    """`build(case, mode)` returns a function of the case's inputs, or raises Unavailable.

    What it makes of the inputs beforehand, such as a mask, is not timed.
    """

    name: str
    build: Callable[["Case", str], Function]


def require_cpp() -> None:
    """Raises Unavailable if torch.compile can't build its C++ for a CPU."""
    # As Inductor chooses it; it takes all of $CXX for the name of one program.
    compiler = os.environ.get("CXX") or ("clang++" if sys.platform == "darwin" else "g++")
    if shutil.which(compiler) is None:
        raise Unavailable(
            f"torch.compile needs a C++ compiler on a CPU, and {compiler!r} is no executable; "
            "set CXX to one"
        )
    header = Path(sysconfig.get_path("include"), "Python.h")
    if not header.is_file():
        raise Unavailable(f"torch.compile needs Python's headers on a CPU, and {header} is missing")


def require_inductor(device: torch.device) -> None:
    """Raises Unavailable if torch.compile can't build what it generates for `device`."""
    if device.type == "cpu":
        require_cpp()
    if device.type == "cuda" and not TRITON_INSTALLED:
        raise Unavailable("torch.compile needs Triton on a GPU")
    # Precompiling headers takes an openssl program, which fails now and then.
    torch._inductor.config.cpp_cache_precompile_headers = False


def compile_afresh(function: Callable[..., Any]) -> Callable[..., Any]:
    # Else the graphs of earlier shapes count towards Dynamo's recompile limit, and a function that
    # reaches it silently runs in eager mode.
    torch.compiler.reset()
    return torch.compile(function, dynamic=False)


def _compiled(benchmark: "Benchmark") -> Provider:
    def build(case: "Case", mode: str) -> Function:
        require_inductor(case.device)
        eager = benchmark.build_eager(case, True)
        if isinstance(eager, Rearranged):
            return dataclasses.replace(eager, function=compile_afresh(eager.function))
        assert not isinstance(eager, Floor)
        return compile_afresh(eager)

    return Provider("compile", build)


def plain(function: Callable[..., Any]) -> Callable[["Case", bool], Callable[..., Any]]:
    """`Benchmark.build_eager` of a function of the inputs that needs nothing beforehand."""
    return lambda case, compiled: function


@dataclasses.dataclass(frozen=True)
class Benchmark:
    """One op. Its baseline, "eager", is the composition that a user would write.

    name: as in the results; for an op of ours the name of the function or a variant of it.
    dims: what the numbers of a shape are.
    outputs: names of what the op returns, in order.
    make_inputs: (shape, dtype, device) -> inputs by name, in the order the functions take them.
    build_eager: (case, compiled) -> the baseline, like a provider's `build`, or for torch.compile;
        raises Unavailable where it takes too much memory or time.
    ours: a function of the inputs that also takes `impl`, and with impl="reference" is the oracle.
    work, eager_work: (shape, itemsize, mode) -> useful work of the op, and of the baseline.
    fewest_rounds: of timing, where more take long.
    """

    name: str
    dims: tuple[str, ...]
    shapes: tuple[Shape, ...]
    quick_shape: Shape
    tiny_shape: Shape
    outputs: tuple[str, ...]
    make_inputs: Callable[[Shape, torch.dtype, torch.device], dict[str, Any]]
    build_eager: Callable[["Case", bool], Function]
    ours: Callable[..., Any]
    work: Callable[[Shape, int, str], Work]
    eager_work: Callable[[Shape, int, str], Work]
    others: tuple[Provider, ...] = ()
    fewest_rounds: int = MIN_ROUNDS

    @property
    def providers(self) -> tuple[Provider, ...]:
        """The baseline comes first."""
        return (
            Provider("eager", lambda case, mode: self.build_eager(case, False)),
            _compiled(self),
            Provider("ours", lambda case, mode: self.ours),
            *self.others,
        )


def normal(
    shape: Shape, dtype: torch.dtype, device: torch.device, *, mean: float = 0.0, seed: int
) -> torch.Tensor:
    """The same unit-variance numbers in every run on a device."""
    generator = torch.Generator(device).manual_seed(seed)
    return torch.randn(shape, generator=generator, device=device).add_(mean).to(dtype)


class Case:
    """One benchmark at one shape and dtype: the inputs that all its providers share.

    `inputs` has them by name, in the functions' order; `expected` the reference's outputs by name
    and its gradients as "d" + input name.
    """

    def __init__(
        self, benchmark: Benchmark, shape: Shape, dtype: str, device: torch.device
    ) -> None:
        self.benchmark, self.shape, self.dtype, self.device = benchmark, shape, dtype, device
        self.inputs = benchmark.make_inputs(shape, DTYPES[dtype], device)
        self._leaves = {
            name: value.requires_grad_()
            for name, value in self.inputs.items()
            if isinstance(value, torch.Tensor) and value.is_floating_point()
        }
        self.expected = self._expected()

    def __str__(self) -> str:
        return f"{self.benchmark.name} {shape_name(self.shape)} {self.dtype}"

    def _expected(self) -> dict[str, torch.Tensor]:
        outputs = _as_tuple(self.benchmark.ours(*self.inputs.values(), impl="reference"))
        # A mean other than 0 keeps the gate's gradient, a sum over everything, from cancelling
        # to something whose relative error means nothing.
        self._douts = tuple(
            normal(tuple(out.shape), out.dtype, out.device, mean=0.5, seed=100 + index)
            for index, out in enumerate(outputs)
        )
        grads = torch.autograd.grad(outputs, tuple(self._leaves.values()), self._douts)
        return self.named((*(out.detach() for out in outputs), *grads))

    def named(self, results: tuple[torch.Tensor, ...]) -> dict[str, torch.Tensor]:
        """What a call of either mode returned, by name.

        Raises:
            ValueError: there are neither as many tensors as outputs, nor as many as with gradients.
        """
        outputs = self.benchmark.outputs
        names = (*outputs, *(f"d{name}" for name in self._leaves))
        if len(results) not in (len(outputs), len(names)):
            raise ValueError(f"{len(results)} tensors, expected {', '.join(outputs)}")
        return dict(zip(names, results, strict=False))

    def call(self, function: Function, mode: str) -> Call:
        """Runs `function` forward, or forward and backward of a fixed incoming gradient."""
        if isinstance(function, Floor):
            return function.call
        call, inputs, douts = self._arranged(function)
        if mode == "fwd":
            return lambda: _as_tuple(call(*inputs.values()))
        leaves = tuple(inputs[name].requires_grad_() for name in self._leaves)

        def forward_and_backward() -> tuple[torch.Tensor, ...]:
            outputs = _as_tuple(call(*inputs.values()))
            return *outputs, *torch.autograd.grad(outputs, leaves, douts)

        return forward_and_backward

    def forward(self, function: Callable[..., Any] | Rearranged) -> tuple[Call, list[Any]]:
        """A call of `function` that keeps what its backward needs, and its inputs."""
        call, inputs, _ = self._arranged(function)
        for name in self._leaves:
            inputs[name].requires_grad_()
        return lambda: _as_tuple(call(*inputs.values())), list(inputs.values())

    def _arranged(
        self, function: Callable[..., Any] | Rearranged
    ) -> tuple[Callable[..., Any], dict[str, Any], tuple[torch.Tensor, ...]]:
        """The function itself, its inputs by name and the incoming gradients."""
        inputs = {
            name: value.detach() if isinstance(value, torch.Tensor) else value
            for name, value in self.inputs.items()
        }
        if not isinstance(function, Rearranged):
            return function, inputs, self._douts
        inputs = {name: function.arrange(name, value) for name, value in inputs.items()}
        douts = tuple(map(function.arrange, self.benchmark.outputs, self._douts))
        return function.function, inputs, douts

    def results(self, function: Function, mode: str) -> dict[str, torch.Tensor]:
        """What a call returns, by name, arranged as in `expected`."""
        results = self.named(self.call(function, mode)())
        if isinstance(function, Rearranged):
            return {name: function.restore(name, tensor) for name, tensor in results.items()}
        return results

    def work(self, mode: str) -> Work:
        return self.benchmark.work(self.shape, DTYPES[self.dtype].itemsize, mode)


def _as_tuple(outputs: Any) -> tuple[torch.Tensor, ...]:
    return outputs if isinstance(outputs, tuple) else (outputs,)
