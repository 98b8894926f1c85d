"""The function feed_forward: values, gradients of every subset of inputs, what it keeps."""

import functools
import itertools

import pytest
import torch
import torch.nn.functional as F
from module_cases import BF16, FP32, randomized

from flamingo_fast.modules import FeedForward, SquaredReLU
from flamingo_fast.ops.feed_forward import feed_forward
from flamingo_fast.testing.compare import compare, outputs_and_gradients
from flamingo_fast.testing.inputs import random_tensor

INPUTS = ("x", "weight_up", "bias_up", "weight_down", "bias_down", "residual", "gate")
ROWS, WIDTH, HIDDEN = (2, 9), 12, 20
GATES = ("none", "scalar", "vector")
every_dtype = pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
every_impl = pytest.mark.parametrize("impl", ["torch", "triton", "reference"])


def inputs_of(gate="scalar", bias=True, dtype=FP32, frozen=()):
    shapes = {
        "x": (*ROWS, WIDTH),
        "weight_up": (HIDDEN, WIDTH),
        "bias_up": (HIDDEN,) if bias else None,
        "weight_down": (WIDTH, HIDDEN),
        "bias_down": (WIDTH,) if bias else None,
        "residual": None if gate == "none" else (*ROWS, WIDTH),
        "gate": {"none": None, "scalar": (1,), "vector": (WIDTH,)}[gate],
    }
    return {
        name: None
        if shape is None
        else random_tensor(shape, dtype, seed=seed, requires_grad=name not in frozen)
        for seed, (name, shape) in enumerate(shapes.items())
    }


def ours(x, up, bias_up, down, bias_down, residual, gate, **options):
    return feed_forward(x, up, bias_up, down, bias_down, residual=residual, gate=gate, **options)


def plain(x, up, bias_up, down, bias_down, residual, gate, *, activation="gelu"):
    hidden = F.linear(x, up, bias_up)
    hidden = F.gelu(hidden) if activation == "gelu" else hidden.relu().square()
    out = F.linear(hidden, down, bias_down)
    return out if gate is None else residual + gate.tanh() * out


def run(function, inputs, dtype=None, **options):
    dout = random_tensor((*ROWS, WIDTH), torch.float64, seed=99)
    function = functools.partial(function, **options)
    return outputs_and_gradients(function, inputs, ("out",), (dout,), dtype)


def check(inputs, impl, activation="gelu"):
    """The three-way rule; of the drift only the output's, which rounds once."""
    found = run(ours, inputs, impl=impl, activation=activation)
    eager = run(plain, inputs, activation=activation)
    oracle = run(plain, inputs, torch.float64, activation=activation)
    assert found.keys() == oracle.keys()
    # Sums over rows that cancel, as a random walk of steps of the outputs' size.
    scale = 4 * oracle["out"].abs().max().item()
    scales = dict.fromkeys(("dgate", "dbias_up", "dbias_down"), scale)
    for name, tensor in found.items():
        comparison = compare(name, tensor, eager[name], oracle[name], scales.get(name))
        assert comparison.finite, name
        assert comparison.max_error <= comparison.max_limit, str(comparison)
        assert comparison.rms_error <= comparison.rms_limit, str(comparison)
    return found


@every_dtype
@every_impl
@pytest.mark.parametrize("bias", [False, True], ids=["no_bias", "bias"])
@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("activation", ["gelu", "squared_relu"])
def test_values_and_gradients(activation, gate, bias, impl, dtype, guarded):
    check(inputs_of(gate, bias, dtype), impl, activation)


@pytest.mark.parametrize("gate", GATES)
def test_every_subset_of_gradients(gate):
    """As with all of them."""
    there = [name for name, tensor in inputs_of(gate).items() if tensor is not None]
    whole = run(ours, inputs_of(gate), impl="torch")
    for count in range(1, len(there)):
        for frozen in list(itertools.combinations(there, count))[:: 1 if gate == "none" else 3]:
            found = run(ours, inputs_of(gate, frozen=frozen), impl="torch")
            assert found.keys() == {"out", *(f"d{name}" for name in there if name not in frozen)}
            for name, tensor in found.items():
                torch.testing.assert_close(tensor, whole[name], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("frozen", [("x", "residual"), INPUTS[1:5], ("gate",), INPUTS[:3]])
@pytest.mark.parametrize("gate", ["scalar", "vector"])
def test_frozen_inputs_of_kernels(gate, frozen, guarded):
    check(inputs_of(gate, frozen=frozen), "triton")


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("activation", ["gelu", "squared_relu"])
def test_gradcheck(activation, gate):
    inputs = {
        name: None if tensor is None else tensor.detach().double().requires_grad_()
        for name, tensor in inputs_of(gate).items()
    }
    function = functools.partial(ours, activation=activation, impl="torch")
    there = {name: tensor for name, tensor in inputs.items() if tensor is not None}

    def of_those(*tensors):
        return function(*(inputs | dict(zip(there, tensors, strict=True))).values())

    assert torch.autograd.gradcheck(of_those, tuple(there.values()), fast_mode=True)


def kept_tensors(frozen=(), gate="scalar"):
    """Shapes of what the backward keeps, without the inputs."""
    inputs = inputs_of(gate, frozen=frozen)
    names = {tensor.data_ptr(): name for name, tensor in inputs.items() if tensor is not None}
    kept = []

    def keep(tensor):
        kept.append(names.get(tensor.data_ptr(), tuple(tensor.shape)))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        out = ours(*inputs.values(), impl="torch")
    assert out.requires_grad
    return set(kept)


def test_what_is_kept():
    """The input and the first layer's output: no activation, and no output of the second."""
    parameters = {"weight_up", "weight_down", "bias_down", "gate"}
    hidden = (*ROWS, HIDDEN)
    assert kept_tensors() == {*parameters, "x", hidden}
    assert kept_tensors(gate="vector") == {*parameters, "x", hidden}
    # Weights alone ask for the input.
    assert kept_tensors(frozen=INPUTS[1:5]) == {*parameters, hidden}
    assert kept_tensors(frozen=("weight_up",)) == {*parameters, hidden}
    # Of the residual's gradient alone, which is dout's, nothing is needed.
    assert kept_tensors(frozen=[name for name in INPUTS if name != "residual"]) <= parameters
    assert kept_tensors(frozen=[name for name in INPUTS if name != "bias_down"]) <= parameters


def test_autocast():
    inputs = inputs_of()
    with torch.autocast("cpu", BF16):
        found = run(ours, inputs, impl="torch")
        eager = run(plain, inputs)
    oracle = run(plain, inputs, torch.float64)
    assert {name: tensor.dtype for name, tensor in found.items()} == dict.fromkeys(oracle, FP32)
    with torch.autocast("cpu", BF16):
        # Weights in bf16, as of eager; both rounded there.
        assert ours(*inputs_of("none").values(), impl="torch").dtype == BF16
    for name, tensor in found.items():
        error, limit = ((x - oracle[name]).square().mean().sqrt() for x in (tensor, eager[name]))
        assert error <= 2 * (limit + 2**-8 * oracle[name].square().mean().sqrt()), name


@pytest.mark.parametrize("impl", ["torch", "reference"])
def test_autocast_leaves_fp64(impl):
    inputs = {
        name: tensor.double() for name, tensor in inputs_of("none").items() if tensor is not None
    }
    arguments = (*inputs.values(), None, None)
    expected = ours(*arguments, impl=impl)
    with torch.autocast("cpu", BF16):
        assert torch.equal(ours(*arguments, impl=impl), expected)
        assert plain(*arguments).dtype == expected.dtype
        with pytest.raises(TypeError, match="weight_up: expected x's dtype torch.float64, got"):
            ours(arguments[0], arguments[1].float(), *arguments[2:], impl=impl)


@pytest.mark.parametrize("gate", GATES)
def test_compiled(gate):
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    inputs = inputs_of(gate)
    expected = run(ours, inputs, impl="torch", activation="squared_relu")
    for name, tensor in run(compiled, inputs, impl="torch", activation="squared_relu").items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_no_double_backward(impl):
    inputs = inputs_of()
    out = ours(*inputs.values(), impl=impl)
    (dx,) = torch.autograd.grad(out.sum(), inputs["x"], create_graph=True)
    with pytest.raises(RuntimeError, match="feed_forward: its gradients have no gradients"):
        dx.sum().backward()


@pytest.mark.parametrize("rows", [(), (0,), (3, 0)], ids=str)
def test_few_rows(rows):
    inputs = inputs_of() | {
        name: torch.randn(*rows, WIDTH, requires_grad=True) for name in ("x", "residual")
    }
    out = ours(*inputs.values(), impl="torch")
    out.sum().backward()
    assert out.shape == (*rows, WIDTH)
    assert all(tensor.grad.shape == tensor.shape for tensor in inputs.values())


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": [1.0]}, TypeError, "x: expected a tensor, got list"),
        ({"x": torch.ones(2, 9, 11)}, ValueError, r"weight_up: expected shape \(20, 11\)"),
        ({"weight_down": torch.ones(12, 19)}, ValueError, r"weight_down: .*\(12, 20\)"),
        ({"weight_up": torch.ones(20)}, ValueError, "weight_up: expected shape"),
        ({"weight_down": torch.ones(20)}, ValueError, "weight_down: expected shape"),
        ({"weight_up": None}, TypeError, "weight_up: expected a tensor"),
        ({"bias_up": torch.ones(12)}, ValueError, r"bias_up: expected shape \(20,\)"),
        ({"bias_down": torch.ones(20)}, ValueError, r"bias_down: expected shape \(12,\)"),
        (
            {"gate": torch.ones(11)},
            ValueError,
            r"gate: expected shape \(1,\) or \(12,\) for residual of shape \(2, 9, 12\);",
        ),
        ({"gate": None}, ValueError, "residual, gate: expected both or neither"),
        (
            {"weight_down": torch.ones(5, 20), "bias_down": None},
            ValueError,
            r"residual: expected shape \(2, 9, 5\) for x of shape \(2, 9, 12\); got \(2, 9, 12\)",
        ),
        ({"weight_up": torch.ones(20, 12, dtype=BF16)}, TypeError, "weight_up: expected x's dtype"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else None,
)
def test_wrong_arguments_by_name(change, error, message):
    with pytest.raises(error, match=message):
        ours(*(inputs_of() | change).values())


def test_wrong_options_by_name():
    inputs = inputs_of()
    with pytest.raises(ValueError, match="activation: expected one of gelu, squared_relu; got 'r'"):
        ours(*inputs.values(), activation="r")
    with pytest.raises(ValueError, match="impl: expected one of"):
        ours(*inputs.values(), impl="sdpa")


@pytest.mark.parametrize(
    "change",
    [
        lambda ff: ff.append(torch.nn.Dropout(0.0)),
        lambda ff: ff.__setitem__(2, SquaredReLU()),
        lambda ff: ff.__setitem__(2, torch.nn.GELU(approximate="tanh")),
        lambda ff: ff.__setitem__(0, torch.nn.Identity()),
        lambda ff: ff.__setitem__(3, torch.nn.Identity()),
        lambda ff: ff.__delitem__(2),
    ],
    ids=["appended", "squared_relu", "tanh_gelu", "no_norm", "no_linear", "no_activation"],
)
def test_a_changed_module_does_what_its_modules_do(change):
    ff = randomized(FeedForward(12))
    change(ff)
    x = torch.randn(5, 12)
    torch.testing.assert_close(ff(x), torch.nn.Sequential(*ff)(x), rtol=1e-5, atol=1e-5)


def test_slices_are_sequences_of_modules():
    ff = randomized(FeedForward(12))
    assert type(ff[1:3]) is torch.nn.Sequential
    assert list(ff[1:3]) == [ff[1], ff[2]]
    assert ff[-1] is ff[3]
