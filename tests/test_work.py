"""The work of the kernels, as the guard measures it: launches, and bytes against closed forms.

What reaches DRAM are the distinct 32-byte sectors of a launch. Bytes loaded also count what each
program reads again, such as its weight, which caches serve; those are known exactly.
"""

import pytest
import torch
from op_cases import EPS

import flamingo_fast as ff
from flamingo_fast.bench import work
from flamingo_fast.kernels.launch import INTERPRETER
from flamingo_fast.kernels.norm_backward import backward_config
from flamingo_fast.kernels.norm_forward import forward_config
from flamingo_fast.ops.gated_residual import gated_residual_backward_op
from flamingo_fast.testing.guard import LaunchRecord, guard

pytestmark = pytest.mark.matrix

BF16 = torch.bfloat16


def _assert_within_2_percent(what: str, measured: int, formula: int) -> None:
    assert abs(measured - formula) <= 0.02 * formula, f"{what}: {measured} B, formula {formula} B"


def _assert_dram_bytes(launches: list[LaunchRecord], loaded: int, stored: int) -> None:
    _assert_within_2_percent("loaded", sum(each.sectors_loaded for each in launches), loaded)
    _assert_within_2_percent("stored", sum(each.sectors_stored for each in launches), stored)


def _run(function, shape: tuple[int, int], names: str, backward: bool) -> list[LaunchRecord]:
    """The launches of a bf16 forward or of its backward, all gradients wanted."""
    shapes = {"x": shape, "y": shape, "gate": (1,), "vector_gate": shape[1:]}
    inputs = [
        torch.randn(shapes.get(name, shape[1:]), dtype=BF16, requires_grad=True)
        for name in names.split()
    ]
    with guard() as forward:
        outputs = function(*inputs)
    if not backward:
        return forward.launches
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    gradients = [torch.randn(shape, dtype=BF16) for _ in outputs]
    with guard() as guarded:
        torch.autograd.grad(outputs, inputs, gradients)
    return guarded.launches


def _gated_norm(norm: str):
    def function(x, y, gate, weight, bias=None):
        return ff.gated_residual_norm(x, y, gate, weight, bias, eps=EPS, norm=norm, impl="triton")

    return function


PARAMETERS = {"layer": "x y gate weight bias", "rms": "x y gate weight"}


@pytest.mark.parametrize("norm", ["layer", "rms"])
@pytest.mark.parametrize("shape", [(96, 1024), (60, 2560), (12, 16384)])
def test_gated_residual_norm_forward(shape, norm):
    """Two elements in and two out per element; one launch; a program reads its parameters once."""
    formula = work.gated_residual_norm(shape, 2, "fwd", rms=norm == "rms")
    launches = _run(_gated_norm(norm), shape, PARAMETERS[norm], backward=False)
    assert [launch.kernel for launch in launches] == ["_norm_fwd_kernel"]
    _assert_dram_bytes(launches, formula.loaded, formula.stored)
    elements, parameters = 2 * 2 * shape[0] * shape[1], 1 if norm == "rms" else 2
    _assert_within_2_percent("stored", launches[0].bytes_stored, elements)
    config = forward_config(shape[1], BF16, INTERPRETER)
    programs = config.programs(shape[0], INTERPRETER)
    readings = programs if config.keep_parameters else shape[0]
    parameter_bytes = 2 * (readings * parameters * shape[1] + programs)
    assert launches[0].bytes_loaded == elements + parameter_bytes


@pytest.mark.parametrize("norm", ["layer", "rms"])
@pytest.mark.parametrize("shape", [(96, 1024), (60, 2560)])
def test_gated_residual_norm_backward_in_one_pass(shape, norm):
    """Four elements in, two out, and of each program fp32 partial sums, both ways."""
    formula = work.gated_residual_norm(shape, 2, "bwd", rms=norm == "rms")
    launches = _run(_gated_norm(norm), shape, PARAMETERS[norm], backward=True)
    assert [each.kernel for each in launches] == ["_norm_bwd_kernel", "_sum_partials_kernel"]
    rows_of_sums = 1 if norm == "rms" else 2
    programs = backward_config(shape[1], BF16, INTERPRETER).programs(shape[0], INTERPRETER)
    partials = programs * (rows_of_sums * shape[1] + 1) * 4
    _assert_dram_bytes(launches, formula.loaded + partials, formula.stored + partials)


@pytest.mark.parametrize("names", ["x y gate weight bias", "x y vector_gate weight bias"])
def test_gated_residual_norm_backward_of_wide_rows(names):
    """Above the one-pass width, the columns kernel reads two inputs again, or four."""
    shape = (40, 5120)
    launches = _run(_gated_norm("layer"), shape, names, backward=True)
    gate_sums = [] if "vector" in names else ["_sum_partials_kernel"]
    assert [each.kernel for each in launches] == [
        "_norm_bwd_kernel",
        *gate_sums,
        "_norm_bwd_columns_kernel",
        "_sum_partials_kernel",
    ]
    formula = work.gated_residual_norm(shape, 2, "bwd", column_pass=True)
    element_bytes = 2 * shape[0] * shape[1]
    if "vector" in names:
        # dx and y come again for the gate, but the row kernel does not read y.
        loaded, sums = formula.loaded + element_bytes, 3
    else:
        loaded, sums = formula.loaded, 2
    partials = sums * shape[1] * 4
    _assert_dram_bytes(launches, loaded + partials, formula.stored + partials)


@pytest.mark.parametrize("shape", [(96, 1024), (61, 333)])
def test_gated_residual(shape):
    """Two elements in and one out, forward and backward."""

    def function(x, y, gate):
        return ff.gated_residual(x, y, gate, impl="triton")

    for mode, backward in (("fwd", False), ("bwd", True)):
        formula = work.gated_residual(shape, 2, mode)
        launches = _run(function, shape, "x y gate", backward)
        _assert_dram_bytes(launches, formula.loaded, formula.stored)
        assert len(launches) == 1 + backward


def test_a_residual_whose_y_and_gate_are_frozen():
    """Its gradient is the one that comes in."""
    x, y = torch.randn(61, 333, requires_grad=True), torch.randn(61, 333)
    residual, _ = _gated_norm("layer")(x, y, torch.ones(1), torch.ones(333))
    dout = torch.randn(61, 333)
    with guard() as guarded:
        (dx,) = torch.autograd.grad(residual, x, dout)
        dy, dgate = gated_residual_backward_op(dout, None, torch.ones(1), BF16, False, "triton")
    assert guarded.launches == []
    assert torch.equal(dx, dout)
    assert dy.numel() == dgate.numel() == 0


def test_squared_relu():
    shape = (61, 333)
    for mode, backward in (("fwd", False), ("bwd", True)):
        formula = work.squared_relu(shape, 2, mode)
        launches = _run(lambda x: ff.squared_relu(x, impl="triton"), shape, "x", backward)
        _assert_dram_bytes(launches, formula.loaded, formula.stored)
        assert len(launches) == 1
