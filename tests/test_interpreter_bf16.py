"""bf16 in the interpreter against torch's own, and canaries for the day Triton gets it right."""

from collections.abc import Iterator

import pytest
import torch
import triton
import triton.language as tl
from interpreter_cases import assert_same, dot_kernel, exp_kernel
from triton.runtime.errors import InterpreterError
from triton.runtime.interpreter import InterpreterBuilder

from flamingo_fast.testing.interpreter_bf16 import correct_bf16, missing_patch_points


def random_bf16(count: int, seed: int) -> torch.Tensor:
    """Uniform bit patterns: subnormals, infinities and NaN among them."""
    generator = torch.Generator().manual_seed(seed)
    bits = torch.randint(-(2**15), 2**15, (count,), generator=generator, dtype=torch.int16)
    return bits.view(torch.bfloat16)


@triton.jit
def _arithmetic_kernel(X, Y, Z, OUT, BLOCK: tl.constexpr):
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    n = tl.num_programs(0) * BLOCK
    x, y, z = tl.load(X + offs), tl.load(Y + offs), tl.load(Z + offs)
    tl.store(OUT + 0 * n + offs, x + y)
    tl.store(OUT + 1 * n + offs, x - y)
    tl.store(OUT + 2 * n + offs, x * y)
    tl.store(OUT + 3 * n + offs, x / y)
    tl.store(OUT + 4 * n + offs, -x)
    tl.store(OUT + 5 * n + offs, tl.abs(x))
    tl.store(OUT + 6 * n + offs, tl.where(x > y, x, y))
    tl.store(OUT + 7 * n + offs, tl.fma(x, y, z))
    tl.store(OUT + 8 * n + offs, x * 2.7)
    tl.store(OUT + 9 * n + offs, x + tl.full((BLOCK,), -0.3, tl.bfloat16))
    tl.store(OUT + 10 * n + offs, tl.maximum(x, y, propagate_nan=tl.PropagateNan.ALL))
    tl.store(OUT + 11 * n + offs, tl.minimum(x, y, propagate_nan=tl.PropagateNan.ALL))
    tl.store(OUT + 12 * n + offs, tl.clamp(x, y, tl.maximum(y, z)))


@pytest.mark.filterwarnings("error")
def test_arithmetic_is_exact():
    x, y, z = (random_bf16(4096, seed) for seed in range(3))
    out = x.new_empty(13, 4096)
    _arithmetic_kernel[(8,)](x, y, z, out, BLOCK=512)
    constant = torch.tensor([2.7, -0.3]).bfloat16()
    expected = [
        x + y,
        x - y,
        x * y,
        x / y,
        -x,
        x.abs(),
        torch.where(x > y, x, y),
        (x.double() * y.double() + z.double()).float().bfloat16(),
        x * constant[0],
        x + constant[1],
        torch.maximum(x, y),
        torch.minimum(x, y),
    ]
    for row, reference in zip(out, expected, strict=False):
        assert_same(row, reference)
    numbers = ~(x.isnan() | y.isnan() | z.isnan())
    assert_same(out[12][numbers], x.clamp(y, torch.maximum(y, z))[numbers])


@triton.jit
def _comparison_kernel(X, Y, OUT, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK)
    x, y = tl.load(X + offs), tl.load(Y + offs)
    tl.store(OUT + 0 * BLOCK + offs, x < y)
    tl.store(OUT + 1 * BLOCK + offs, x <= y)
    tl.store(OUT + 2 * BLOCK + offs, x > y)
    tl.store(OUT + 3 * BLOCK + offs, x >= y)
    tl.store(OUT + 4 * BLOCK + offs, x == y)
    tl.store(OUT + 5 * BLOCK + offs, x != x)
    tl.store(OUT + 6 * BLOCK + offs, x.to(tl.int1))


def test_comparisons_are_exact():
    x, y = random_bf16(4096, 3), random_bf16(4096, 4)
    y[::3] = x[::3]
    x[:2] = torch.tensor([0.0, -0.0])
    out = torch.empty(7, 4096, dtype=torch.bool)
    _comparison_kernel[(1,)](x, y, out, BLOCK=4096)
    expected = [x < y, x <= y, x > y, x >= y, x == y, x != x, x.bool()]
    assert_same(out, torch.stack(expected))


@triton.jit
def _cast_kernel(X, OUT, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK)
    tl.store(OUT + offs, tl.load(X + offs).to(OUT.dtype.element_ty))


def cast(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    out = torch.empty_like(x, dtype=dtype)
    _cast_kernel[(1,)](x, out, BLOCK=x.numel())
    return out


def test_casts_from_fp32_round_to_nearest_even():
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(-(2**31), 2**31 - 1, (2**16,), generator=generator, dtype=torch.int64)
    x[:3] = torch.tensor([0x3F808000, 0x3F818000, 0x7F7FFFFF])  # Two ties; what rounds to infinity.
    x = x.to(torch.int32).view(torch.float32)
    assert_same(cast(x, torch.bfloat16), x.bfloat16())


@pytest.mark.parametrize(
    "dtype", [torch.float16, torch.float64, torch.int8, torch.int32, torch.int64, torch.uint8]
)
def test_casts_to_and_from_other_types(dtype):
    generator = torch.Generator().manual_seed(0)
    if dtype.is_floating_point:
        x = (torch.randn(4096, generator=generator, dtype=torch.float64) * 300).to(dtype)
        x[:4] = torch.tensor([1e-7, torch.inf, -torch.inf, torch.nan], dtype=dtype)
        back = random_bf16(4096, 5)
    else:
        limits = torch.iinfo(dtype)
        x = torch.randint(limits.min, limits.max, (4096,), generator=generator, dtype=dtype)
        back = torch.randint(0, 127, (4096,), generator=generator).bfloat16()
    assert_same(cast(x, torch.bfloat16), x.bfloat16())
    assert_same(cast(back, dtype), back.to(dtype))


@triton.jit
def _downcast_kernel(X, OUT, BLOCK: tl.constexpr, ROUNDING: tl.constexpr):
    offs = tl.arange(0, BLOCK)
    tl.store(OUT + offs, tl.load(X + offs).to(tl.bfloat16, fp_downcast_rounding=ROUNDING))


@pytest.mark.parametrize("rounding", ["rtne", "rtz"])
def test_rounding_mode_is_obeyed(rounding):
    x = torch.randn(1024, generator=torch.Generator().manual_seed(0))
    out = torch.empty(1024, dtype=torch.bfloat16)
    _downcast_kernel[(1,)](x, out, BLOCK=1024, ROUNDING=rounding)
    truncated = (x.view(torch.int32) >> 16).to(torch.int16).view(torch.bfloat16)
    assert_same(out, x.bfloat16() if rounding == "rtne" else truncated)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_dots_are_rounded_once(dtype):
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(32, 128, generator=generator).to(dtype)
    b = torch.randn(128, 16, generator=generator).to(dtype)
    out = torch.empty(32, 16)
    dot_kernel[(1,)](a, b, out, M=32, N=16, K=128)
    assert_same(out, (a.double() @ b.double()).float())


@triton.jit
def _multiply(a, b):
    return a * b


@triton.jit
def _reduction_kernel(X, ROWS, WHOLE, SCANS, M: tl.constexpr, N: tl.constexpr):
    m, n = tl.arange(0, M), tl.arange(0, N)
    x = tl.load(X + m[:, None] * N + n[None, :])
    tl.store(ROWS + 0 * M + m, tl.sum(x, axis=1))
    tl.store(ROWS + 1 * M + m, tl.max(x, axis=1))
    tl.store(ROWS + 2 * M + m, tl.min(x, axis=1))
    tl.store(ROWS + 3 * M + m, tl.argmax(x, axis=1))
    tl.store(ROWS + 4 * M + m, tl.reduce(x, 1, tl.standard._elementwise_max))
    tl.store(ROWS + 5 * M + m, tl.reduce(x, 1, _multiply))
    tl.store(WHOLE + 0, tl.sum(x))
    tl.store(WHOLE + 1, tl.max(x))
    square = m[:, None] * N + n[None, :]
    tl.store(SCANS + square, tl.cumsum(x, axis=1))
    tl.store(SCANS + M * N + square, tl.cumprod(x, axis=0))
    tl.store(SCANS + 2 * M * N + square, tl.cumsum(x, axis=0, reverse=True))


def test_reductions_and_scans():
    rows, cols = 4, 8
    # Values whose sums and products are exact in bf16, in any order.
    x = torch.tensor([1.0, -2.0, 0.5, 4.0, -1.0, 2.0, -0.5, 1.0]).repeat(rows).view(rows, cols)
    x[1] *= -1
    x = x.bfloat16()
    by_row, whole = x.new_empty(6, rows), x.new_empty(2)
    scans = x.new_empty(3, rows, cols)
    _reduction_kernel[(1,)](x, by_row, whole, scans, M=rows, N=cols)
    largest = x.amax(1)
    expected = [x.sum(1), largest, x.amin(1), x.argmax(1).bfloat16(), largest, x.float().prod(1)]
    assert_same(by_row, torch.stack([row.bfloat16() for row in expected]))
    assert_same(whole, torch.stack([x.sum(), x.max()]))
    reversed_sum = x.flip(0).cumsum(0).flip(0)
    assert_same(scans, torch.stack([x.cumsum(1), x.cumprod(0), reversed_sum]))


@triton.jit
def _sum_kernel(X, OUT, BLOCK: tl.constexpr):
    tl.store(OUT, tl.sum(tl.load(X + tl.arange(0, BLOCK)), axis=0))


def test_sums_round_after_each_addition():
    # The halves are added first, and 1 + 2**-8 is a tie that rounds down to 1.
    x = torch.tensor([1.0, -1.0, 2**-8, 2**-8]).bfloat16()
    out = x.new_empty(1)
    _sum_kernel[(1,)](x, out, BLOCK=4)
    assert out.item() == 2**-8
    assert x.sum().item() == 2**-7


def test_triton_refuses_transcendental_functions():
    x = torch.ones(1).bfloat16()
    with pytest.raises(InterpreterError, match="bf16"):
        exp_kernel[(1,)](x, torch.empty_like(x))


@triton.jit
def _add_and_multiply_kernel(X, OUT):
    x = tl.load(X)
    tl.store(OUT, x + x)
    tl.store(OUT + 1, x * x)


class TestStockInterpreter:
    """Canaries: each fails when Triton no longer needs, or no longer has, what is patched."""

    @pytest.fixture(autouse=True)
    def interpreter_bf16(self) -> Iterator[None]:
        """Overrides conftest's: here the interpreter is as Triton ships it."""
        yield

    def test_every_patch_point_exists(self):
        assert missing_patch_points() == []

    def test_everything_is_restored(self):
        before = dict(vars(InterpreterBuilder))
        with correct_bf16():
            with correct_bf16():
                pass
            assert vars(InterpreterBuilder) != before
        assert vars(InterpreterBuilder) == before

    def test_arithmetic_is_wrong(self):
        x = torch.tensor([3.0]).bfloat16()
        out = x.new_zeros(2)
        _add_and_multiply_kernel[(1,)](x, out)
        assert out[0] != 6
        assert out[1] != 9

    def test_casts_truncate(self):
        x = torch.tensor([0x3F80FFFF], dtype=torch.int32).view(torch.float32)
        assert cast(x, torch.bfloat16).item() == 1.0

    def test_dots_are_wrong(self):
        a = torch.ones(16, 16).bfloat16()
        out = torch.empty(16, 16)
        dot_kernel[(1,)](a, a, out, M=16, N=16, K=16)
        assert out[0, 0] != 16
