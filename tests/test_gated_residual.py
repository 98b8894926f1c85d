"""gated_residual and squared_relu against the oracle, and what they read, write and save."""

import pytest
import torch
from op_cases import OPS, Case, check

pytestmark = pytest.mark.matrix

CASES = [
    Case((63, 130)),
    Case((2, 7, 48), vector_gate=True),
    Case((3, 5, 3, 64), torch.bfloat16, x_layout="sliced", y_layout="padded"),
    Case((9, 130), torch.bfloat16, vector_gate=True, x_layout="transposed"),
    Case((130, 9), torch.float16, y_layout="transposed", dout_layout="padded"),
    Case((17, 1000), torch.bfloat16, parameter_dtype=torch.float32),
    Case((17, 520), torch.bfloat16, parameter_dtype=torch.float32, vector_gate=True),
    Case((5, 96), torch.float32, y_dtype=torch.bfloat16),
    Case((5, 96), torch.bfloat16, y_dtype=torch.float32, vector_gate=True),
    Case((5, 96), torch.float32, y_dtype=torch.float64),
    Case((5, 96), torch.float16, y_dtype=torch.bfloat16, vector_gate=True),
    Case((5, 96), x_layout="stepped", y_layout="expanded", parameter_layout="stepped"),
    Case((5, 96), vector_gate=True, parameter_layout="expanded"),
    Case((1, 1)),
    Case((40, 3), torch.bfloat16, vector_gate=True),
    Case((4, 5000), torch.float16, vector_gate=True),
    Case((0, 64)),
    Case((3, 0, 64), torch.bfloat16, vector_gate=True),
    Case((64,), vector_gate=True),
    Case((63, 130), frozen=("gate",)),
    Case((63, 130), frozen=("y", "x")),
    Case((63, 130), frozen=("y", "gate")),
]


@pytest.mark.parametrize("impl", ["torch", "triton"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_gated_residual_matches_oracle(case, impl, guarded):
    if impl == "triton" and case.y_dtype == torch.float64:
        impl = "reference"  # The kernels take no fp64; what "auto" takes instead has to.
    check(OPS["gated_residual"], case, impl)


@pytest.mark.parametrize("impl", ["torch", "triton"])
@pytest.mark.parametrize(
    "case",
    [
        Case((63, 130)),
        Case((2, 7, 48), torch.bfloat16, x_layout="padded", dout_layout="transposed"),
        Case((5000,), torch.float16),
        Case((0, 3)),
    ],
    ids=str,
)
def test_squared_relu_matches_oracle(case, impl, guarded):
    check(OPS["squared_relu"], case, impl)


@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_squared_relu_propagates_nan_and_infinity(impl, guarded):
    x = torch.tensor([float("nan"), float("inf"), -float("inf"), -0.0])
    out = OPS["squared_relu"].ours(x, impl=impl)
    torch.testing.assert_close(out, torch.relu(x).square(), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("vector_gate", [False, True], ids=["scalar", "vector"])
def test_many_rows(vector_gate, guarded):
    check(OPS["gated_residual"], Case((100_000, 2), vector_gate=vector_gate), "triton")
