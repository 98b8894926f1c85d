"""layer_norm, rms_norm and gated_residual_norm against the oracle."""

import pytest
import torch
from op_cases import OPS, Case, check

pytestmark = pytest.mark.matrix

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32

PLAIN = [
    Case((63, 130)),
    Case((2, 3, 5, 96), BF16, x_layout="sliced", dout_layout="sliced"),
    Case((9, 130), FP16, x_layout="transposed", parameter_dtype=FP32),
    Case((33, 64), BF16, parameter_dtype=FP32, x_layout="padded"),
    Case((7, 1000), absent=("weight", "bias")),
    Case((7, 1000), BF16, absent=("bias",)),
    Case((7, 1000), absent=("weight",)),
    Case((5, 2), BF16),
    Case((7, 130), BF16, parameter_layout="stepped", x_layout="stepped"),
    Case((7, 130), FP32, parameter_dtype=BF16, parameter_layout="expanded"),
    Case((0, 64)),
    Case((48,), BF16),
    Case((63, 130), frozen=("weight", "bias")),
    Case((63, 130), frozen=("x",)),
    Case((63, 130), frozen=("x", "bias")),
    Case((21, 6000), frozen=("x", "weight")),
]
GATED = [
    Case((63, 130)),
    Case((2, 7, 48), BF16, vector_gate=True, parameter_dtype=FP32),
    Case((2, 3, 5, 96), BF16, x_layout="sliced", y_layout="padded", dout_layout="sliced"),
    Case((9, 1024), FP16, y_layout="transposed"),
    Case((6, 96), FP32, y_dtype=BF16),
    Case((6, 96), BF16, y_dtype=FP32, vector_gate=True),
    Case((7, 1000), absent=("weight", "bias")),
    Case((0, 64), vector_gate=True),
    Case((7, 130), BF16, vector_gate=True, parameter_layout="stepped", x_layout="expanded"),
    Case((7, 5000), vector_gate=True, parameter_layout="expanded"),
    Case((63, 130), BF16, unused=("residual",)),
    Case((63, 130), BF16, unused=("normed",), vector_gate=True),
    Case((63, 130), frozen=("gate",)),
    Case((63, 130), frozen=("gate", "weight", "bias")),
    Case((63, 130), frozen=("x", "y"), vector_gate=True),
    Case((63, 130), frozen=("x", "y", "gate")),
    Case((21, 6000), frozen=("x", "y"), vector_gate=True),
]
# (width, vector gate): each launch configuration, odd widths, both sides of the one-pass backward.
WIDTHS = [
    (1, False),
    (1024, True),
    (2047, False),
    (4096, False),
    (4095, True),
    (4097, False),
    (4098, True),
    (8192, False),
    (16384, False),
]


@pytest.mark.parametrize("impl", ["torch", "triton"])
@pytest.mark.parametrize("norm", ["layer_norm", "rms_norm"])
@pytest.mark.parametrize("case", PLAIN, ids=str)
def test_norm_matches_oracle(case, norm, impl, guarded):
    check(OPS[norm], case, impl)


@pytest.mark.parametrize("impl", ["torch", "triton"])
@pytest.mark.parametrize("norm", ["layer_norm", "rms_norm"])
@pytest.mark.parametrize("case", GATED, ids=str)
def test_gated_residual_norm_matches_oracle(case, norm, impl, guarded):
    check(OPS[f"gated_residual_{norm}"], case, impl)


@pytest.mark.parametrize(("width", "vector_gate"), WIDTHS)
def test_every_width(width, vector_gate, guarded):
    """Widths that are odd run RMSNorm, the others LayerNorm: the layouts are the same."""
    norm = "rms_norm" if width % 2 else "layer_norm"
    # 19 rows are two blocks of the kernel by columns.
    case = Case(
        (19 if width < 8192 else 3, width), BF16, parameter_dtype=FP32, vector_gate=vector_gate
    )
    check(OPS[f"gated_residual_{norm}"], case, "triton")


@pytest.mark.parametrize("rows", [1, 100_000])
def test_row_counts(rows, guarded):
    check(OPS["gated_residual_layer_norm"], Case((rows, 2)), "triton")


@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_constant_and_large_rows_stay_finite(impl, guarded):
    """The variance of a constant row is 0 and that of large values must not cancel."""
    x = torch.stack([torch.full((96,), 1000.0), 1e4 + torch.arange(96.0)]).requires_grad_()
    weight, bias = torch.ones(96), torch.zeros(96)
    normed = OPS["layer_norm"].ours(x, weight, bias, impl=impl)
    assert (normed[0] == 0).all()
    oracle = OPS["layer_norm"].reference(x.double(), weight.double(), bias.double())
    torch.testing.assert_close(normed[1].double(), oracle[1], rtol=1e-5, atol=1e-5)
    normed.sum().backward()
    assert x.grad.isfinite().all()
