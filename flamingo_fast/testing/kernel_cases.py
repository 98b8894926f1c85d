"""Launches that the ahead-of-time gate compiles: every kernel, every launch configuration.

Add a kernel's cases here; `flamingo-fast kernels --case NAME --update` then writes their goldens.
"""

import functools
from collections.abc import Iterator

import torch

from flamingo_fast.kernels.gated_residual import gated_residual_bwd, gated_residual_fwd
from flamingo_fast.kernels.norm_backward import gated_residual_norm_bwd, norm_bwd
from flamingo_fast.kernels.norm_forward import gated_residual_norm_fwd, norm_fwd
from flamingo_fast.kernels.squared_relu import squared_relu_bwd, squared_relu_fwd
from flamingo_fast.testing.aot import KernelCase, Rules
from flamingo_fast.testing.attention_kernel_cases import attention_cases
from flamingo_fast.testing.inputs import meta_tensor
from flamingo_fast.testing.latent_kernel_cases import latent_cases

ROWS = 8192
# One for each power of two that a launch configuration depends on.
WIDTHS = (64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def _rules(kernel: str, x: torch.Tensor, *, only_loads: tuple[str, ...] = ()) -> Rules:
    """From 1024 columns on, threads must move 16 bytes at a time; some kernels only write sums."""
    may_spill = ""
    if x.dtype == torch.float32:
        may_spill = "launch configurations are tuned for 16-bit types"
    elif x.shape[-1] == 1:
        may_spill = "nobody's width; compiled because a size of 1 is specialised"
    if x.shape[-1] < 1024:
        return Rules(may_spill=may_spill)
    return Rules(may_spill=may_spill, loads_128bit=(kernel, *only_loads), stores_128bit=(kernel,))


def _squared_relu_cases() -> Iterator[KernelCase]:
    for name, dtype in DTYPES.items():
        x = meta_tensor(ROWS, 4096, dtype=dtype)
        yield KernelCase(
            f"squared_relu_fwd/{name}",
            functools.partial(squared_relu_fwd, x),
            _rules("_squared_relu_fwd_kernel", x),
        )
        yield KernelCase(
            f"squared_relu_bwd/{name}",
            functools.partial(squared_relu_bwd, x, x),
            _rules("_squared_relu_bwd_kernel", x),
        )


def _gated_residual_cases() -> Iterator[KernelCase]:
    # Contiguous tensors under a scalar gate are cut into tiles of one size, whatever their width.
    for name, dtype in DTYPES.items():
        yield from _gated_residual(
            f"scalar_gate/{name}", meta_tensor(ROWS, 4096, dtype=dtype), meta_tensor(1)
        )
    for width in (64, 128, 256, 512, 1024):
        for name in ("bf16", "fp32"):
            x = meta_tensor(ROWS, width, dtype=DTYPES[name])
            yield from _gated_residual(f"vector_gate/{name}/{width}", x, meta_tensor(width))
    odd = meta_tensor(ROWS, 1001, dtype=torch.bfloat16)
    yield from _gated_residual("vector_gate/bf16/1001", odd, meta_tensor(1001))
    padded = meta_tensor(ROWS, 4096 + 64, dtype=torch.bfloat16)[:, :4096]
    yield from _gated_residual("scalar_gate/bf16/4096_padded", padded, meta_tensor(1))


def _gated_residual(name: str, x: torch.Tensor, gate: torch.Tensor) -> Iterator[KernelCase]:
    yield KernelCase(
        f"gated_residual_fwd/{name}",
        functools.partial(gated_residual_fwd, x, x, gate),
        _rules("_gated_residual_fwd_kernel", x),
    )
    yield KernelCase(
        f"gated_residual_bwd/{name}",
        functools.partial(gated_residual_bwd, x, x, gate, y_dtype=x.dtype, need_dy=True),
        _rules("_gated_residual_bwd_kernel", x),
    )


def _norm_cases() -> Iterator[KernelCase]:
    for width in WIDTHS:
        for name in ("bf16", "fp32"):
            x = meta_tensor(ROWS, width, dtype=DTYPES[name])
            parameter, gate = meta_tensor(width), meta_tensor(1)
            yield from _norm(f"rms/{name}/{width}", x, parameter, None)
            yield from _gated_norm(f"layer/{name}/{width}", x, gate, parameter, parameter)
            yield from _gated_norm(
                f"layer_vector_gate/{name}/{width}", x, parameter, parameter, parameter
            )
    x = meta_tensor(ROWS, 2048, dtype=torch.float16)
    yield from _gated_norm(
        "layer/fp16/2048", x, meta_tensor(1), meta_tensor(2048), meta_tensor(2048)
    )
    x = meta_tensor(ROWS, 2048, dtype=torch.bfloat16)
    yield from _norm("layer/bf16/2048", x, meta_tensor(2048), meta_tensor(2048))
    # As in a model converted to bf16, parameters and all.
    parameter = meta_tensor(2048, dtype=torch.bfloat16)
    gate = meta_tensor(1, dtype=torch.bfloat16)
    yield from _gated_norm("rms/bf16_parameters/2048", x, gate, parameter, None)
    odd = meta_tensor(ROWS, 1001, dtype=torch.bfloat16)
    yield from _gated_norm("layer_vector_gate/bf16/1001", odd, *[meta_tensor(1001)] * 3)
    one = meta_tensor(ROWS, 1, dtype=torch.bfloat16)
    yield from _norm("layer/bf16/1", one, meta_tensor(1), meta_tensor(1))
    # The norm of q in a fused projection: heads are rows, and no stride is the width.
    qkv = meta_tensor(4, 2048, 3, 16, 128, dtype=torch.bfloat16)
    yield from _norm("rms/bf16/128_heads", qkv[:, :, 0], meta_tensor(128), None)


def _statistics(x: torch.Tensor) -> torch.Tensor:
    return meta_tensor(*x.shape[:-1])


def _norm(
    name: str, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
) -> Iterator[KernelCase]:
    rms = name.startswith("rms")
    yield KernelCase(
        f"norm_fwd/{name}",
        functools.partial(norm_fwd, x, weight, bias, eps=1e-5, rms=rms, out_dtype=x.dtype),
        _rules("_norm_fwd_kernel", x),
    )
    yield KernelCase(
        f"norm_bwd/{name}",
        functools.partial(
            norm_bwd,
            meta_tensor(*x.shape, dtype=x.dtype),
            x,
            weight,
            bias,
            mean=_statistics(x),
            rstd=_statistics(x),
            rms=rms,
            need_dx=True,
            need_dweight=True,
            need_dbias=bias is not None,
        ),
        _rules("_norm_bwd_kernel", x, only_loads=("_norm_bwd_columns_kernel",)),
    )


def _gated_norm(
    name: str,
    x: torch.Tensor,
    gate: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
) -> Iterator[KernelCase]:
    rms = name.startswith("rms")
    yield KernelCase(
        f"gated_residual_norm_fwd/{name}",
        functools.partial(
            gated_residual_norm_fwd,
            x,
            x,
            gate,
            weight,
            bias,
            eps=1e-5,
            rms=rms,
            out_dtype=x.dtype,
        ),
        _rules("_norm_fwd_kernel", x),
    )
    yield KernelCase(
        f"gated_residual_norm_bwd/{name}",
        functools.partial(
            gated_residual_norm_bwd,
            x,
            x,
            x,
            x,
            gate,
            weight,
            bias,
            mean=_statistics(x),
            rstd=_statistics(x),
            rms=rms,
            y_dtype=x.dtype,
            need_dx=True,
            need_dy=True,
            need_dweight=True,
            need_dbias=bias is not None,
        ),
        _rules("_norm_bwd_kernel", x, only_loads=("_norm_bwd_columns_kernel",)),
    )


CASES = [
    *_squared_relu_cases(),
    *_gated_residual_cases(),
    *_norm_cases(),
    *attention_cases(),
    *latent_cases(),
]
