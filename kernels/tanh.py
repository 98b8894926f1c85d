"""tanh and its derivative in fp32, right to 1e-6 from 1e-30 to 10: gates start at 0.

`2 * sigmoid(2x) - 1` and `(1 - e) / (1 + e)` cancel near 0, and `1 - tanh(x)**2` cancels for
large |x|; libdevice's tanh can't run in Triton's interpreter.
"""

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)
# ln(2) in two parts, the first of 9 bits, so that its product with a small integer is exact.
LN2_HI = tl.constexpr(0.693359375)
LN2_LO = tl.constexpr(-2.12194440e-4)


@triton.jit
def _exp_minus_2_abs(x):
    """exp(-2|x|). One exp2 of 2|x|log2(e) is not enough: rounding that argument costs over 1e-6."""
    a = 2.0 * tl.abs(x)
    # Beyond 80 the value vanishes beside 1; tl.minimum would drop NaN.
    a = tl.where(a > 80.0, 80.0, a)
    n = tl.floor(a * LOG2_E + 0.5)
    r = (a - n * LN2_HI) - n * LN2_LO
    return tl.exp2(-n) * tl.exp2(-r * LOG2_E)


@triton.jit
def tanh(x):
    x2 = x * x
    near_0 = x * (
        1.0 + x2 * (-0.33333334 + x2 * (0.13333334 + x2 * (-0.053968254 + x2 * 0.021869488)))
    )
    e = _exp_minus_2_abs(x)
    far = (1.0 - e) / (1.0 + e)
    return tl.where(tl.abs(x) < 0.25, near_0, tl.where(x < 0, -far, far))


@triton.jit
def tanh_grad(x):
    """d tanh(x) / dx."""
    e = _exp_minus_2_abs(x)
    return 4.0 * e / ((1.0 + e) * (1.0 + e))
