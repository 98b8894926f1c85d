"""The memory-bound op family: gated residuals, norms, squared ReLU."""

import functools
import importlib
import importlib.metadata
from collections.abc import Callable
from typing import Any

import torch

import flamingo_fast
from flamingo_fast.bench import work
from flamingo_fast.bench.registry import (
    Benchmark,
    Case,
    Provider,
    Shape,
    Unavailable,
    normal,
    plain,
)
from flamingo_fast.testing import eager

EPS = 1e-5


def _inputs(
    names: str, shape: Shape, dtype: torch.dtype, device: torch.device
) -> dict[str, torch.Tensor]:
    """Parameters have the activations' dtype: a baseline with fp32 ones would promote to fp32."""
    width = shape[-1:]
    make = {
        "x": lambda: normal(shape, dtype, device, seed=0),
        "y": lambda: normal(shape, dtype, device, mean=0.5, seed=1),
        "gate": lambda: torch.full((1,), 0.5, dtype=dtype, device=device),
        "weight": lambda: normal(width, dtype, device, mean=1.0, seed=2),
        "bias": lambda: normal(width, dtype, device, seed=3),
    }
    return {name: make[name]() for name in names.split()}


# PyTorch's LayerNorm on a CPU adds up 16-bit parameter gradients in 16 bits; this is the eager
# composition whose gradients are right.
def _layer_norm_in_fp32(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    return eager.layer_norm(x.float(), weight, bias, EPS).to(x.dtype)


def _gated_residual_layer_norm_in_fp32(
    x: torch.Tensor,
    y: torch.Tensor,
    gate: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    residual = eager.gated_residual(x, y, gate)
    return residual, _layer_norm_in_fp32(residual, weight, bias)


def _liger(function: str, compute: Callable[..., Any]) -> Provider:
    """`compute(liger, *inputs)`; `function` is of liger_kernel.transformers.functional."""

    def build(case: Case, mode: str) -> Callable[..., Any]:
        if case.device.type != "cuda":
            raise Unavailable("Liger's kernels need a GPU")
        try:
            functional = importlib.import_module("liger_kernel.transformers.functional")
        except ImportError:
            raise Unavailable("not installed (pip install liger-kernel)") from None
        if not hasattr(functional, function):
            version = importlib.metadata.version("liger-kernel")
            raise Unavailable(f"liger-kernel {version} has no {function}")
        return functools.partial(compute, getattr(functional, function))

    return Provider("liger", build)


def _norm_work(
    formula: Callable[..., work.Work], shape: Shape, itemsize: int, mode: str, *, rms: bool
) -> work.Work:
    column_pass = shape[-1] > work.WIDEST_ONE_PASS
    return formula(shape, itemsize, mode, rms=rms, column_pass=column_pass)


# Liger's norms by default write dx over the incoming gradient, which here is used again.
def _liger_rms_norm(liger, x, weight):  # type: ignore[no-untyped-def]
    return liger(x, weight, EPS, in_place=False)


def _liger_gated_residual_rms_norm(liger, x, y, gate, weight):  # type: ignore[no-untyped-def]
    normed, residual = liger(gate.tanh() * y, x, weight, EPS, in_place=False)
    return residual, normed


def _liger_gated_residual_layer_norm(liger, x, y, gate, weight, bias):  # type: ignore[no-untyped-def]
    residual = x + gate.tanh() * y
    return residual, liger(residual, weight, bias, EPS)


_rowwise = functools.partial(
    Benchmark,
    dims=("rows", "width"),
    shapes=((2048, 2048), (8192, 4096)),
    quick_shape=(512, 1024),
    tiny_shape=(1, 64),
)

BENCHMARKS = {
    benchmark.name: benchmark
    for benchmark in (
        _rowwise(
            name="gated_residual",
            outputs=("out",),
            make_inputs=functools.partial(_inputs, "x y gate"),
            build_eager=plain(eager.gated_residual),
            ours=flamingo_fast.gated_residual,
            work=work.gated_residual,
            eager_work=work.gated_residual_eager,
        ),
        _rowwise(
            name="gated_residual_layer_norm",
            outputs=("residual", "normed"),
            make_inputs=functools.partial(_inputs, "x y gate weight bias"),
            build_eager=plain(functools.partial(eager.gated_residual_norm, eps=EPS, norm="layer")),
            ours=functools.partial(flamingo_fast.gated_residual_norm, eps=EPS, norm="layer"),
            work=functools.partial(_norm_work, work.gated_residual_norm, rms=False),
            eager_work=work.gated_residual_norm_eager,
            others=(
                Provider("eager_fp32", lambda case, mode: _gated_residual_layer_norm_in_fp32),
                _liger("liger_layer_norm", _liger_gated_residual_layer_norm),
            ),
        ),
        _rowwise(
            name="gated_residual_rms_norm",
            outputs=("residual", "normed"),
            make_inputs=functools.partial(_inputs, "x y gate weight"),
            build_eager=plain(
                functools.partial(eager.gated_residual_norm, bias=None, eps=EPS, norm="rms")
            ),
            ours=functools.partial(flamingo_fast.gated_residual_norm, eps=EPS, norm="rms"),
            work=functools.partial(_norm_work, work.gated_residual_norm, rms=True),
            eager_work=functools.partial(work.gated_residual_norm_eager, rms=True),
            others=(_liger("liger_fused_add_rms_norm", _liger_gated_residual_rms_norm),),
        ),
        _rowwise(
            name="layer_norm",
            outputs=("out",),
            make_inputs=functools.partial(_inputs, "x weight bias"),
            build_eager=plain(functools.partial(eager.layer_norm, eps=EPS)),
            ours=functools.partial(flamingo_fast.layer_norm, eps=EPS),
            work=functools.partial(_norm_work, work.norm, rms=False),
            eager_work=work.norm,
            others=(
                Provider("eager_fp32", lambda case, mode: _layer_norm_in_fp32),
                _liger("liger_layer_norm", lambda liger, *inputs: liger(*inputs, EPS)),
            ),
        ),
        _rowwise(
            name="rms_norm",
            outputs=("out",),
            make_inputs=functools.partial(_inputs, "x weight"),
            build_eager=plain(functools.partial(eager.rms_norm, bias=None, eps=EPS)),
            ours=functools.partial(flamingo_fast.rms_norm, eps=EPS),
            work=functools.partial(_norm_work, work.norm, rms=True),
            eager_work=functools.partial(work.norm, rms=True),
            others=(_liger("liger_rms_norm", _liger_rms_norm),),
        ),
        _rowwise(
            name="squared_relu",
            outputs=("out",),
            make_inputs=functools.partial(_inputs, "x"),
            build_eager=plain(eager.squared_relu),
            ours=flamingo_fast.squared_relu,
            work=work.squared_relu,
            eager_work=work.squared_relu_eager,
            others=(_liger("liger_relu_squared", lambda liger, x: liger(x)),),
        ),
    )
}
