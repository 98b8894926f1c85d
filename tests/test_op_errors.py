"""Wrong arguments: the error names the argument, what it was and what was expected."""

import pytest
import torch

import flamingo_fast as ff
from flamingo_fast.modules import GatedResidualNorm, LayerNorm, RMSNorm

X = torch.randn(4, 8)
GATE, WEIGHT = torch.zeros(1), torch.ones(8)


def _gated(x=X, y=X, gate=GATE, weight=WEIGHT, bias=None, eps=1e-5, **kwargs):
    return ff.gated_residual_norm(x, y, gate, weight, bias, eps=eps, **kwargs)


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: ff.squared_relu([1.0]), TypeError, ["x", "tensor", "list"]),
        (lambda: ff.squared_relu(X.int()), TypeError, ["x", "floating-point", "int32"]),
        (lambda: ff.gated_residual(X, X[:2], GATE), ValueError, ["y", "(4, 8)", "(2, 8)"]),
        (
            lambda: ff.gated_residual(X, X, torch.tensor(0.0)),
            ValueError,
            ["gate", "(1,) or (8,)", "()"],
        ),
        (lambda: ff.gated_residual(X, X, torch.zeros(4)), ValueError, ["gate", "(8,)", "(4,)"]),
        (lambda: ff.gated_residual(X[0, 0], X[0, 0], GATE), ValueError, ["x", "(..., width)"]),
        (lambda: ff.gated_residual(X, X.bool(), GATE), TypeError, ["y", "bool"]),
        (lambda: ff.gated_residual(X, X.to("meta"), GATE), ValueError, ["y", "cpu", "meta"]),
        (lambda: ff.gated_residual(X, X, GATE.to("meta")), ValueError, ["gate", "cpu", "meta"]),
        (lambda: _gated(weight=torch.ones(4)), ValueError, ["weight", "(8,)", "(4,)"]),
        (lambda: _gated(bias=torch.ones(1, 8)), ValueError, ["bias", "(8,)", "(1, 8)"]),
        (lambda: _gated(weight=WEIGHT.long()), TypeError, ["weight", "int64"]),
        (lambda: _gated(eps=0.0), ValueError, ["eps", "> 0", "0.0"]),
        (lambda: _gated(eps=float("nan")), ValueError, ["eps", "> 0", "nan"]),
        (lambda: _gated(eps=None), TypeError, ["eps", "number", "None"]),
        (lambda: GatedResidualNorm(8, norm="batch"), ValueError, ["norm", "rms", "batch"]),
        (lambda: LayerNorm(8, impl="fast"), ValueError, ["impl", "triton", "fast"]),
        (lambda: RMSNorm(8)(None), TypeError, ["x", "tensor", "NoneType"]),
        (lambda: _gated(norm="batch"), ValueError, ["norm", "layer", "rms", "batch"]),
        (lambda: _gated(impl="cuda"), ValueError, ["impl", "triton", "cuda"]),
        (lambda: ff.layer_norm(X[:, :0], None, None, eps=1e-5), ValueError, ["x", "(4, 0)"]),
        (lambda: ff.rms_norm(X, WEIGHT, eps=-1.0), ValueError, ["eps", "-1.0"]),
        (lambda: ff.use_impl("fast").__enter__(), ValueError, ["impl", "reference", "fast"]),
        (
            lambda: ff.squared_relu(X.double(), impl="triton"),
            ff.BackendUnavailableError,
            ["fp32", "fp64"],
        ),
        (
            lambda: ff.rms_norm(torch.ones(1, 16385), None, eps=1e-5, impl="triton"),
            ff.BackendUnavailableError,
            ["16384", "16385"],
        ),
    ],
)
def test_error_names_argument_value_and_expectation(call, error, words):
    with pytest.raises(error) as raised:
        call()
    message = str(raised.value)
    for word in words:
        assert word in message


def test_triton_on_a_cpu_without_the_interpreter(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET")
    with pytest.raises(ff.BackendUnavailableError, match="need a GPU.*'cpu'.*TRITON_INTERPRET=1"):
        ff.squared_relu(X, impl="triton")


def test_auto_takes_rows_wider_than_the_kernels_do():
    x = torch.randn(2, 20000)
    normed = ff.rms_norm(x, None, eps=1e-5)
    torch.testing.assert_close(normed, torch.nn.functional.rms_norm(x, (20000,), eps=1e-5))


def test_checks_read_no_values():
    """On the meta device nothing can be read, so a check that synchronised would raise."""
    x = X.to("meta")
    residual, normed = _gated(x, x, GATE.to("meta"), WEIGHT.to("meta"))
    assert residual.shape == normed.shape == X.shape
