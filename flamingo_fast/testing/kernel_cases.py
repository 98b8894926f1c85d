"""Launches that the ahead-of-time gate compiles: every kernel, every launch configuration.

Add a kernel's cases here; `flamingo-fast kernels --case NAME --update` then writes their goldens.
"""

import functools
from collections.abc import Iterator

import torch

from flamingo_fast.kernels.gated_residual import gated_residual_bwd, gated_residual_fwd
from flamingo_fast.kernels.norm_backward import gated_residual_norm_bwd, norm_bwd
from flamingo_fast.kernels.norm_forward import gated_residual_norm_fwd, norm_fwd
from flamingo_fast.kernels.one_medium_backward import one_medium_bwd
from flamingo_fast.kernels.one_medium_forward import one_medium_fwd
from flamingo_fast.kernels.squared_relu import squared_relu_bwd, squared_relu_fwd
from flamingo_fast.testing.aot import KernelCase, Rules

ROWS = 8192
# One for each power of two that a launch configuration depends on.
WIDTHS = (64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def _meta(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


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
        x = _meta(ROWS, 4096, dtype=dtype)
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
        yield from _gated_residual(f"scalar_gate/{name}", _meta(ROWS, 4096, dtype=dtype), _meta(1))
    for width in (64, 128, 256, 512, 1024):
        for name in ("bf16", "fp32"):
            x = _meta(ROWS, width, dtype=DTYPES[name])
            yield from _gated_residual(f"vector_gate/{name}/{width}", x, _meta(width))
    odd = _meta(ROWS, 1001, dtype=torch.bfloat16)
    yield from _gated_residual("vector_gate/bf16/1001", odd, _meta(1001))
    padded = _meta(ROWS, 4096 + 64, dtype=torch.bfloat16)[:, :4096]
    yield from _gated_residual("scalar_gate/bf16/4096_padded", padded, _meta(1))


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
            x = _meta(ROWS, width, dtype=DTYPES[name])
            parameter, gate = _meta(width), _meta(1)
            yield from _norm(f"rms/{name}/{width}", x, parameter, None)
            yield from _gated_norm(f"layer/{name}/{width}", x, gate, parameter, parameter)
            yield from _gated_norm(
                f"layer_vector_gate/{name}/{width}", x, parameter, parameter, parameter
            )
    x = _meta(ROWS, 2048, dtype=torch.float16)
    yield from _gated_norm("layer/fp16/2048", x, _meta(1), _meta(2048), _meta(2048))
    x = _meta(ROWS, 2048, dtype=torch.bfloat16)
    yield from _norm("layer/bf16/2048", x, _meta(2048), _meta(2048))
    # As in a model converted to bf16, parameters and all.
    parameter = _meta(2048, dtype=torch.bfloat16)
    gate = _meta(1, dtype=torch.bfloat16)
    yield from _gated_norm("rms/bf16_parameters/2048", x, gate, parameter, None)
    odd = _meta(ROWS, 1001, dtype=torch.bfloat16)
    yield from _gated_norm("layer_vector_gate/bf16/1001", odd, *[_meta(1001)] * 3)
    one = _meta(ROWS, 1, dtype=torch.bfloat16)
    yield from _norm("layer/bf16/1", one, _meta(1), _meta(1))
    # The norm of q in a fused projection: heads are rows, and no stride is the width.
    qkv = _meta(4, 2048, 3, 16, 128, dtype=torch.bfloat16)
    yield from _norm("rms/bf16/128_heads", qkv[:, :, 0], _meta(128), None)


def _statistics(x: torch.Tensor) -> torch.Tensor:
    return _meta(*x.shape[:-1])


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
            _meta(*x.shape, dtype=x.dtype),
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


def _attention_cases() -> Iterator[KernelCase]:
    """Rows of 2048 tokens have tiles of 32 rows, decoding has tiles of 16."""
    tuned = [("bf16", head_dim) for head_dim in (64, 80, 96, 128)] + [("fp16", 128)]
    for name, head_dim in tuned:
        yield from _attention(f"{name}/64x{head_dim}", DTYPES[name], head_dim=head_dim)
    for head_dim in (64, 128):
        variant = functools.partial(_attention, dtype=torch.bfloat16, head_dim=head_dim)
        yield from variant(f"bf16/64x{head_dim}_decode", seqlen=1)
        yield from variant(f"bf16/64x{head_dim}_seqlens", seqlens=True)
        yield from variant(f"bf16/64x{head_dim}_sorted", sorted_rows=True)
        yield from variant(f"bf16/64x{head_dim}_gqa", group=4)
        yield from variant(f"bf16/128x{head_dim}", num_keys=128)
        yield from variant(
            f"bf16/128x{head_dim}_sorted_gqa", num_keys=128, sorted_rows=True, group=4
        )
    yield from _attention("bf16/100x64", torch.bfloat16, num_keys=100)
    yield from _attention("bf16/5x16", torch.bfloat16, num_keys=5, head_dim=16)
    yield from _attention("bf16/64x40_gqa", torch.bfloat16, head_dim=40, group=6)
    yield from _attention("bf16/64x256", torch.bfloat16, head_dim=256)
    yield from _attention("bf16/16x256", torch.bfloat16, num_keys=16, head_dim=256)
    yield from _attention("fp32/128x64", torch.float32, num_keys=128)
    for head_dim in (64, 128):
        yield from _attention(f"fp32/64x{head_dim}", torch.float32, head_dim=head_dim)
    yield from _attention("fp32_tf32/64x64", torch.float32, input_precision="tf32")


def _attention(
    name: str,
    dtype: torch.dtype,
    *,
    seqlen: int = 2048,
    num_keys: int = 64,
    head_dim: int = 64,
    group: int = 1,
    seqlens: bool = False,
    sorted_rows: bool = False,
    input_precision: str = "ieee",
) -> Iterator[KernelCase]:
    batch, media, kv_heads = 8, 256, 8
    q = _meta(batch, seqlen, kv_heads * group, head_dim, dtype=dtype)
    # As halves of one projection.
    k, v = _meta(media, num_keys, 2, kv_heads, head_dim, dtype=dtype).unbind(2)
    dkv = _meta(media, num_keys, 2, kv_heads, head_dim, dtype=dtype).movedim(2, 0)
    lse = _meta(kv_heads, batch, seqlen, group)
    work_items = _meta(media + 9, 4, dtype=torch.int32)
    split_media = _meta(16, 3, dtype=torch.int32)
    media_seqlens = _meta(media, dtype=torch.int32) if seqlens else None
    row_index = _meta(batch * seqlen, dtype=torch.int32) if sorted_rows else None
    scale = head_dim**-0.5
    forward = functools.partial(
        one_medium_fwd,
        q,
        k,
        v,
        work_items,
        row_index,
        media_seqlens,
        scale,
        input_precision=input_precision,
    )
    backward = functools.partial(
        one_medium_bwd,
        q,
        q,
        k,
        v,
        lse,
        work_items,
        split_media,
        num_slots=32,
        row_index=row_index,
        media_seqlens=media_seqlens,
        softmax_scale=scale,
        input_precision=input_precision,
    )
    rules = _attention_rules(dtype, num_keys, head_dim, input_precision)
    yield KernelCase(f"one_medium_fwd/{name}", functools.partial(forward, need_lse=True), rules)
    yield KernelCase(
        f"one_medium_fwd_inference/{name}", functools.partial(forward, need_lse=False), rules
    )
    yield KernelCase(
        f"one_medium_bwd/{name}",
        functools.partial(backward, dq=_meta(*q.shape, dtype=dtype), dkv=dkv),
        rules,
    )
    yield KernelCase(
        f"one_medium_bwd_dq/{name}",
        functools.partial(backward, dq=_meta(*q.shape, dtype=dtype), dkv=_meta(0)),
        rules,
    )


def _attention_rules(
    dtype: torch.dtype, num_keys: int, head_dim: int, input_precision: str
) -> Rules:
    kernels = ("_one_medium_fwd_kernel", "_one_medium_bwd_kernel")
    wide = kernels if head_dim >= 64 else ()
    if dtype == torch.float32:
        return Rules(
            allow_tf32=input_precision == "tf32",
            may_spill="launch configurations are tuned for 16-bit types",
            loads_128bit=wide,
            stores_128bit=wide,
        )
    may_spill = "head dims above 128 are right, not tuned" if head_dim > 128 else ""
    # Tiles are powers of two; of fewer than 64 wgmma has no form.
    fills_warp_group = num_keys > 32 and head_dim > 32
    # Sums of dK and dV over 128 keys take the registers of a whole SM.
    two_blocks = kernels if num_keys <= 64 else kernels[:1]
    return Rules(
        may_spill=may_spill,
        loads_128bit=wide,
        stores_128bit=wide,
        tensor_cores=kernels,
        wgmma=kernels if fills_warp_group else (),
        two_blocks=two_blocks if head_dim <= 128 else (),
    )


CASES = [
    *_squared_relu_cases(),
    *_gated_residual_cases(),
    *_norm_cases(),
    *_attention_cases(),
]
