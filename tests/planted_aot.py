"""Kernels with one fault each that only the ahead-of-time gate can see, beside sound ones.

Compiled in the gate's worker processes, which import this module by name.
"""

import functools
from collections.abc import Iterator

import torch
import triton
import triton.language as tl

from flamingo_fast.kernels.launch import launch
from flamingo_fast.testing.aot import KernelCase, Rules
from flamingo_fast.testing.inputs import meta_tensor


@triton.jit
def matmul(X, Y, OUT, k, BLOCK: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr):
    offs = tl.arange(0, BLOCK)
    offs_k = tl.arange(0, BLOCK_K)
    acc = tl.zeros((BLOCK, BLOCK), tl.float32)
    for start in range(0, k, BLOCK_K):
        x = tl.load(X + offs[:, None] * k + (start + offs_k)[None, :])
        y = tl.load(Y + (start + offs_k)[:, None] * BLOCK + offs[None, :])
        acc = tl.dot(x, y, acc, input_precision=PRECISION)
    tl.store(OUT + offs[:, None] * BLOCK + offs[None, :], acc)


@triton.jit
def softmax_row(X, OUT, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK)
    x = tl.load(X + offs)
    p = tl.exp(x - tl.max(x, 0))
    tl.store(OUT + offs, p / tl.sum(p, 0))


@triton.jit
def copy_rows(X, OUT, stride, BLOCK: tl.constexpr):
    offs = tl.program_id(0) * stride + tl.arange(0, BLOCK)
    tl.store(OUT + offs, tl.load(X + offs))


def _matmul(dtype: torch.dtype, block: int, precision: str | None, num_stages: int = 1) -> None:
    x, out = meta_tensor(block, 512, dtype=dtype), meta_tensor(block, block)
    launch(
        matmul,
        (1,),
        x,
        x.view(512, block),
        out,
        512,
        BLOCK=block,
        BLOCK_K=32,
        PRECISION=precision,
        num_warps=4,
        num_stages=num_stages,
    )


def _softmax_row(width: int) -> None:
    launch(softmax_row, (1,), meta_tensor(width), meta_tensor(width), BLOCK=width, num_warps=1)


def _copy_rows(x: torch.Tensor) -> None:
    launch(copy_rows, (x.shape[0],), x, x, x.stride(0), BLOCK=1024, num_warps=4)


def _copy_cases(device: str) -> Iterator[KernelCase]:
    flat = torch.empty(64 * 1024 + 1, dtype=torch.bfloat16, device=device)
    layouts = {
        "aligned": flat[:-1].view(64, 1024),
        "odd_stride": flat[: 64 * 1023].view(64, 1023),
        "odd_address": flat[1:].view(64, 1024),
        "stride_1": flat[:1024].as_strided((4, 1024), (1, 1)),
    }
    wide = Rules(loads_128bit=("copy_rows",), stores_128bit=("copy_rows",))
    for name, x in layouts.items():
        yield KernelCase(f"copy/{name}/{device}", functools.partial(_copy_rows, x), wide)


_MAY_SPILL = "a few registers, with some versions of Triton; not what is planted"

CASES = [
    # None is tl.dot's default.
    KernelCase(
        "dot/default",
        functools.partial(_matmul, torch.float32, 32, None),
        Rules(may_spill=_MAY_SPILL),
    ),
    KernelCase(
        "dot/default_allowed",
        functools.partial(_matmul, torch.float32, 32, None),
        Rules(may_spill=_MAY_SPILL, allow_tf32=True),
    ),
    KernelCase("dot/ieee", functools.partial(_matmul, torch.float32, 32, "ieee")),
    # Eight buffers of 16 KiB.
    KernelCase("dot/128_kib", functools.partial(_matmul, torch.bfloat16, 128, "ieee", 9)),
    KernelCase("softmax/spilling", functools.partial(_softmax_row, 8192)),
    KernelCase(
        "softmax/may_spill", functools.partial(_softmax_row, 8192), Rules(may_spill="planted")
    ),
    *_copy_cases("meta"),
    *_copy_cases("cpu"),
    KernelCase("does_not_compile", functools.partial(_matmul, torch.bfloat16, 24, "ieee")),
]
