"""The three-way rule catches what it is there for, and nothing else."""

import re

import planted_bugs
import pytest
import torch

from flamingo_fast.testing.compare import (
    assert_close_to_oracle,
    assert_relative_error,
    compare,
    outputs_and_gradients,
)

BF16 = torch.bfloat16


def _values(count: int = 8000, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(count, generator=torch.Generator().manual_seed(0), dtype=dtype)


def test_bf16_truncated_instead_of_rounded_is_caught(guarded):
    """Truncation stays within twice the error of rounding; only its drift towards 0 tells."""
    x = _values(dtype=torch.float32)
    eager, oracle = x.to(BF16), x.double()
    rounded = compare("out", planted_bugs.to_bf16(x, planted=False), eager, oracle)
    assert rounded.ok and abs(rounded.drift_ulp) < 0.02
    truncated = compare("out", planted_bugs.to_bf16(x, planted=True), eager, oracle)
    assert truncated.max_error <= truncated.max_limit
    assert not truncated.ok and truncated.drift_ulp == pytest.approx(-0.5, abs=0.02)


@pytest.mark.parametrize("form", ["exp", "sigmoid"])
def test_tanh_that_cancels_is_caught(form, guarded):
    x = torch.logspace(-30, 1, 500)
    assert_relative_error("tanh", planted_bugs.tanh(x, "series"), x.double().tanh(), 1e-6)
    with pytest.raises(AssertionError, match="tanh: relative error"):
        assert_relative_error("tanh", planted_bugs.tanh(x, form), x.double().tanh(), 1e-6)


def test_relative_error_is_not_fooled_by_nan():
    oracle = torch.ones(3)
    with pytest.raises(AssertionError, match="relative error inf .* at element 1"):
        assert_relative_error("f", torch.tensor([1.0, float("nan"), 1.0]), oracle, 1e-6)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda out: out + 4e-6 * out.abs().max(),
        lambda out: torch.where(torch.arange(out.numel()) == 7, 0.0, out),
        lambda out: torch.where(torch.arange(out.numel()) == 7, float("nan"), out),
        lambda out: torch.where(torch.arange(out.numel()) == 7, float("inf"), out),
    ],
    ids=["shifted", "one zero", "one NaN", "one infinity"],
)
def test_wrong_values_are_caught_and_named(spoil):
    oracle = {"out": _values(100), "dx": _values(50)}
    right = {name: tensor.float() for name, tensor in oracle.items()}
    measured = assert_close_to_oracle(right, right, oracle)
    assert [comparison.name for comparison in measured] == ["out", "dx"]
    wrong = {**right, "dx": spoil(right["dx"])}
    with pytest.raises(AssertionError, match=r"dx: max error .* \(limit .*\), RMS") as raised:
        assert_close_to_oracle(wrong, right, oracle)
    assert not re.search(r"\bout:", str(raised.value))


def test_an_rms_error_hides_behind_no_maximum():
    """A single bad element of eager's raises the limit of the maximum, not much that of the RMS."""
    oracle = _values()
    eager, ours = oracle.float(), oracle.float() + 1e-2
    eager[0] += 0.1
    found = compare("out", ours, eager, oracle)
    assert found.max_error < found.max_limit and not found.ok


def test_one_element_of_fp32_may_be_further_off_than_all():
    oracle = _values()
    eager = oracle.float()
    roundings = torch.finfo(torch.float32).eps * oracle.abs().max()
    one, all_of_them = eager.clone(), eager + 6 * roundings
    one[7] += 12 * roundings
    assert compare("out", one, eager, oracle).ok
    assert not compare("out", all_of_them.float(), eager, oracle).ok
    one[7] += 8 * roundings
    assert not compare("out", one, eager, oracle).ok


def test_names_and_shapes_must_agree():
    one, two = {"x": torch.ones(2)}, {"y": torch.ones(2)}
    with pytest.raises(AssertionError, match="different tensors.*x.*y"):
        assert_close_to_oracle(one, one, two)
    with pytest.raises(AssertionError, match=r"x: ours has shape \(2,\), oracle \(1, 2\)"):
        assert_close_to_oracle(one, one, {"x": torch.ones(1, 2)})


def test_a_sum_that_cancels_has_a_scale_of_its_own():
    oracle, ours = torch.tensor([1e-3]).double(), torch.tensor([1e-3 + 1e-6])
    lucky = torch.tensor([1e-3])
    assert not compare("dgate", ours, lucky, oracle).ok
    assert compare("dgate", ours, lucky, oracle, scale=10.0).ok


def test_only_wanted_gradients_are_taken():
    inputs = {"x": torch.ones(3, requires_grad=True), "frozen": torch.ones(3), "absent": None}
    got = outputs_and_gradients(
        lambda x, frozen, absent: (2 * x, frozen), inputs, ["a", "b"], [torch.ones(3), None]
    )
    assert got.keys() == {"a", "b", "dx"} and (got["dx"] == 2).all()
