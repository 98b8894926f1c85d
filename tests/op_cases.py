"""The op family's test cases: how ours, eager and the fp64 oracle are called, and with what."""

import dataclasses
import functools
from collections.abc import Callable

import torch

import flamingo_fast as ff
from flamingo_fast import reference
from flamingo_fast.testing import eager
from flamingo_fast.testing.compare import Comparison, assert_close_to_oracle, outputs_and_gradients
from flamingo_fast.testing.inputs import random_tensor

EPS = 1e-5


@dataclasses.dataclass(frozen=True)
class Op:
    """Functions of positional tensors; `ours` also takes impl=."""

    ours: Callable[..., torch.Tensor | tuple[torch.Tensor, ...]]
    eager: Callable[..., torch.Tensor | tuple[torch.Tensor, ...]]
    reference: Callable[..., torch.Tensor | tuple[torch.Tensor, ...]]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]


def _gated(norm: str) -> Op:
    return Op(
        functools.partial(ff.gated_residual_norm, eps=EPS, norm=norm),
        functools.partial(eager.gated_residual_norm, eps=EPS, norm=norm),
        functools.partial(reference.gated_residual_norm, eps=EPS, norm=norm),
        ("x", "y", "gate", "weight", "bias"),
        ("residual", "normed"),
    )


OPS = {
    "squared_relu": Op(
        ff.squared_relu, eager.squared_relu, reference.squared_relu, ("x",), ("out",)
    ),
    "gated_residual": Op(
        ff.gated_residual,
        eager.gated_residual,
        reference.gated_residual,
        ("x", "y", "gate"),
        ("out",),
    ),
    "layer_norm": Op(
        functools.partial(ff.layer_norm, eps=EPS),
        functools.partial(eager.layer_norm, eps=EPS),
        functools.partial(reference.layer_norm, eps=EPS),
        ("x", "weight", "bias"),
        ("normed",),
    ),
    "rms_norm": Op(
        functools.partial(ff.rms_norm, eps=EPS),
        functools.partial(eager.rms_norm, eps=EPS),
        functools.partial(reference.rms_norm, eps=EPS),
        ("x", "weight", "bias"),
        ("normed",),
    ),
    "gated_residual_layer_norm": _gated("layer"),
    "gated_residual_rms_norm": _gated("rms"),
}


@dataclasses.dataclass(frozen=True)
class Case:
    """One set of inputs. `frozen` names inputs without a gradient, `absent` those that are None."""

    shape: tuple[int, ...]
    dtype: torch.dtype = torch.float32
    y_dtype: torch.dtype | None = None
    parameter_dtype: torch.dtype | None = None
    vector_gate: bool = False
    x_layout: str = "contiguous"
    y_layout: str = "contiguous"
    dout_layout: str = "contiguous"
    parameter_layout: str = "contiguous"
    frozen: tuple[str, ...] = ()
    absent: tuple[str, ...] = ()
    unused: tuple[str, ...] = ()

    def __str__(self) -> str:
        def text(value: object) -> str:
            if isinstance(value, tuple):
                return "x".join(map(str, value))
            return str(value).removeprefix("torch.")

        changed = [
            f"{field.name}={text(getattr(self, field.name))}"
            for field in dataclasses.fields(self)[1:]
            if getattr(self, field.name) != field.default
        ]
        return "-".join([text(self.shape), *changed])

    def inputs(self, op: Op) -> dict[str, torch.Tensor | None]:
        """Random inputs of `op`, in its order; those that want a gradient require it."""
        width = self.shape[-1]
        parameter_dtype = self.parameter_dtype or self.dtype
        shapes = {
            "x": (self.shape, self.dtype, self.x_layout),
            "y": (self.shape, self.y_dtype or self.dtype, self.y_layout),
            "gate": ((width if self.vector_gate else 1,), parameter_dtype, self.parameter_layout),
            "weight": ((width,), parameter_dtype, self.parameter_layout),
            "bias": ((width,), parameter_dtype, self.parameter_layout),
        }
        inputs: dict[str, torch.Tensor | None] = {}
        for seed, name in enumerate(op.inputs):
            shape, dtype, layout = shapes[name]
            inputs[name] = None
            if name not in self.absent:
                inputs[name] = random_tensor(
                    shape,
                    dtype,
                    seed=seed,
                    layout=layout,
                    requires_grad=name not in self.frozen,
                )
        return inputs

    def output_gradients(self, op: Op) -> list[torch.Tensor | None]:
        return [
            None
            if name in self.unused
            else random_tensor(
                self.shape, torch.float64, seed=10 + index, layout=self.dout_layout
            ).to(self.dtype)
            for index, name in enumerate(op.outputs)
        ]


def check(op: Op, case: Case, impl: str) -> list[Comparison]:
    """Outputs and all gradients of `op` by the three-way rule."""
    inputs, gradients = case.inputs(op), case.output_gradients(op)
    run = functools.partial(
        outputs_and_gradients, output_names=op.outputs, output_gradients=gradients
    )
    ours = run(functools.partial(op.ours, impl=impl), inputs)
    same_precision = run(op.eager, inputs)
    oracle = run(op.reference, inputs, dtype=torch.float64)
    return assert_close_to_oracle(ours, same_precision, oracle, _scales(case, inputs, oracle))


def _scales(
    case: Case, inputs: dict[str, torch.Tensor | None], oracle: dict[str, torch.Tensor]
) -> dict[str, float]:
    """A scalar gate's gradient is one sum of terms dx * y, each rounded with the activations."""
    if "dgate" not in oracle or "dx" not in oracle or case.vector_gate:
        return {}
    terms = oracle["dx"] * inputs["y"].detach().double()
    rounding = torch.finfo(case.dtype).eps / torch.finfo(inputs["gate"].dtype).eps
    return {"dgate": terms.norm().item() * rounding}
