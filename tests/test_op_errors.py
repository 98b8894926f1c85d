"""Wrong arguments: the error names the argument, what it was and what was expected."""

import dataclasses

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import flamingo_fast as ff
from flamingo_fast import reference
from flamingo_fast.kernels.launch import Target, recording
from flamingo_fast.modules import GatedResidualNorm, LayerNorm, RMSNorm
from flamingo_fast.ops.dispatch import choose_impl

X = torch.randn(4, 8)
GATE, WEIGHT = torch.zeros(1), torch.ones(8)


def _gated(x=X, y=X, gate=GATE, weight=WEIGHT, bias=None, eps=1e-5, **kwargs):
    return ff.gated_residual_norm(x, y, gate, weight, bias, eps=eps, **kwargs)


LOCATIONS = torch.tensor([[False, True, True, False, False], [True, False, True, False, False]])
LAYOUT = ff.MediaLayout.from_media_locations(LOCATIONS, 2)
PACKED = ff.MediaLayout.packed(LOCATIONS, [0, 5, 10], 2)
Q, K = torch.randn(2, 5, 4, 8), torch.randn(4, 3, 2, 8)
STARTS = torch.zeros(2, 5, dtype=torch.int64)


def _attend(q=Q, k=K, v=None, layout=LAYOUT, **kwargs):
    return ff.masked_cross_attention(q, k, k if v is None else v, layout, **kwargs)


LATENTS, MEDIA = torch.randn(2, 5, 4, 8), torch.randn(2, 7, 2, 8)


def _latent(q=LATENTS, k_media=MEDIA, v_media=MEDIA, k_latents=None, v_latents=None, **kwargs):
    of_latents = torch.randn(2, 5, 2, 8)
    k_latents, v_latents = (of_latents if x is None else x for x in (k_latents, v_latents))
    return ff.latent_attention(q, k_media, v_media, k_latents, v_latents, **kwargs)


def _layout(locations=LOCATIONS, num_media=2, *args, **kwargs):
    return ff.MediaLayout.from_media_locations(locations, num_media, *args, **kwargs)


def _intervals(start=STARTS, end=STARTS + 1, num_media=2, per_token=1, **kwargs):
    return ff.MediaLayout.from_intervals(start, end, num_media, per_token, **kwargs)


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
    _assert_raises(call, error, words)


def _assert_raises(call, error, words):
    with pytest.raises(error) as raised:
        call()
    message = str(raised.value)
    for word in words:
        assert word in message


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: _attend(q=None), TypeError, ["q", "tensor", "NoneType"]),
        (lambda: _attend(k=K.int()), TypeError, ["k", "floating-point", "int32"]),
        (lambda: _attend(layout=LOCATIONS), TypeError, ["layout", "MediaLayout", "Tensor"]),
        (lambda: _attend(q=Q[0]), ValueError, ["q", "(B, L, H, D)", "(5, 4, 8)"]),
        (lambda: _attend(q=Q[..., :0]), ValueError, ["q", "D >= 1", "(2, 5, 4, 0)"]),
        (lambda: _attend(q=Q[:1]), ValueError, ["layout", "1 x 5", "2 x 5"]),
        (lambda: _attend(q=Q[:, :4]), ValueError, ["layout", "2 x 4", "2 x 5"]),
        (lambda: _attend(layout=LAYOUT.last(1)), ValueError, ["layout", "2 x 5", "2 x 1"]),
        (lambda: _attend(k=K[0]), ValueError, ["k", "(B, N, R, Hkv, D)", "(3, 2, 8)"]),
        (lambda: _attend(k=K[:3]), ValueError, ["k", "(4,)", "(3, 3, 2, 8)"]),
        (
            lambda: _attend(k=K.view(4, 1, 3, 2, 8)),
            ValueError,
            ["k", "(2, 2)", "(4, 1, 3, 2, 8)"],
        ),
        (
            lambda: _attend(k=K.view(2, 2, 3, 2, 8), layout=_layout(num_media=[1, 3])),
            ValueError,
            ["k", "different numbers", "(2, 2, 3, 2, 8)"],
        ),
        (lambda: _attend(k=K[..., :4]), ValueError, ["k", "head_dim 8", "(4, 3, 2, 4)"]),
        (lambda: _attend(q=Q[:, :, :3]), ValueError, ["k", "divide", "3", "(4, 3, 2, 8)"]),
        (lambda: _attend(k=K[:, :, :0]), ValueError, ["k", "divide", "(4, 3, 0, 8)"]),
        (lambda: _attend(v=K[:, :2]), ValueError, ["v", "(4, 3, 2, 8)", "(4, 2, 2, 8)"]),
        (lambda: _attend(k=K.half()), TypeError, ["k", "float32", "float16"]),
        (lambda: _attend(v=K.double()), TypeError, ["v", "float32", "float64"]),
        (lambda: _attend(v=K.to("meta")), ValueError, ["v", "cpu", "meta"]),
        (
            lambda: _attend(q=Q.to("meta"), k=K.to("meta")),
            ValueError,
            ["layout", "meta", "cpu"],
        ),
        (lambda: _attend(softmax_scale=float("nan")), ValueError, ["softmax_scale", "nan"]),
        (lambda: _attend(softmax_scale="8"), ValueError, ["softmax_scale", "number", "'8'"]),
        (lambda: _attend(unattended="none"), ValueError, ["unattended", "dense", "none"]),
        (lambda: _attend(past_last="dense"), ValueError, ["past_last", "uniform", "dense"]),
        (lambda: _attend(impl="flash"), ValueError, ["impl", "sdpa", "flash_attn", "'flash'"]),
        (
            lambda: _attend(layout=PACKED, unattended="uniform"),
            ValueError,
            ["layout", "packed", "unattended", "uniform"],
        ),
        (lambda: ff.gated_residual(X, X, GATE, impl="sdpa"), ValueError, ["impl", "sdpa"]),
    ],
)
def test_errors_of_attention(call, error, words):
    _assert_raises(call, error, words)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"q": torch.randn(2, 5, 4, 264), "k": torch.randn(4, 3, 2, 264)}, ["256", "264"]),
        ({"q": Q.double(), "k": K.double()}, ["fp32", "fp64"]),
    ],
    ids=lambda value: "-".join(value),
)
def test_attention_that_the_kernels_do_not_take(arguments, words):
    """An error by name; "auto" finds another implementation."""
    _assert_raises(
        lambda: _attend(**arguments, impl="triton"), ff.BackendUnavailableError, ["triton", *words]
    )
    torch.testing.assert_close(_attend(**arguments), _attend(**arguments, impl="reference"))


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: _latent(q=None), TypeError, ["q", "tensor", "NoneType"]),
        (lambda: _latent(v_media=MEDIA.int()), TypeError, ["v_media", "floating", "int32"]),
        (lambda: _latent(v_latents=[1.0]), TypeError, ["v_latents", "tensor", "list"]),
        (lambda: _latent(q=LATENTS[0]), ValueError, ["q", "(B, R, H, D)", "(5, 4, 8)"]),
        (lambda: _latent(q=LATENTS[..., :0]), ValueError, ["q", "D >= 1", "(2, 5, 4, 0)"]),
        (lambda: _latent(q=LATENTS[:, :, :0]), ValueError, ["q", "H and D", "(2, 5, 0, 8)"]),
        (lambda: _latent(k_media=MEDIA[0]), ValueError, ["k_media", "(2, S, Hkv, 8)", "(7, 2, 8)"]),
        (lambda: _latent(k_media=MEDIA[:1]), ValueError, ["k_media", "(2, S", "(1, 7, 2, 8)"]),
        (lambda: _latent(k_media=MEDIA[..., :4]), ValueError, ["k_media", "8)", "(2, 7, 2, 4)"]),
        (lambda: _latent(k_media=MEDIA[:, :, :0]), ValueError, ["k_media", "divisor", "0, 8)"]),
        (lambda: _latent(q=LATENTS[:, :, :3]), ValueError, ["k_media", "divisor of q's 3"]),
        (lambda: _latent(v_media=MEDIA[:, :6]), ValueError, ["v_media", "(2, 7, 2, 8)", "(2, 6"]),
        (lambda: _latent(k_latents=MEDIA), ValueError, ["k_latents", "(2, 5, 2, 8)", "(2, 7"]),
        (lambda: _latent(v_latents=LATENTS), ValueError, ["v_latents", "(2, 5, 2, 8)", "4, 8)"]),
        (lambda: _latent(k_media=MEDIA.half()), TypeError, ["k_media", "float32", "float16"]),
        (lambda: _latent(v_media=MEDIA.double()), TypeError, ["v_media", "float32", "float64"]),
        (lambda: _latent(v_media=MEDIA.to("meta")), ValueError, ["v_media", "cpu", "meta"]),
        (lambda: _latent(media_seqlens=[7, 7]), TypeError, ["media_seqlens", "tensor", "list"]),
        (
            lambda: _latent(media_seqlens=torch.ones(2)),
            TypeError,
            ["media_seqlens", "integers", "float32"],
        ),
        (
            lambda: _latent(media_seqlens=torch.ones(3, dtype=torch.int64)),
            ValueError,
            ["media_seqlens", "(2,)", "(3,)"],
        ),
        (
            lambda: _latent(media_seqlens=torch.ones(2, dtype=torch.int64, device="meta")),
            ValueError,
            ["media_seqlens", "cpu", "meta"],
        ),
        (lambda: _latent(softmax_scale=float("inf")), ValueError, ["softmax_scale", "inf"]),
        (lambda: _latent(softmax_scale=True), ValueError, ["softmax_scale", "number", "True"]),
        (lambda: _latent(impl="flash"), ValueError, ["impl", "sdpa", "flash_attn", "'flash'"]),
        (
            lambda: _latent(
                *(x.double() for x in (LATENTS, MEDIA, MEDIA)),
                *[MEDIA[:, :5].double()] * 2,
                impl="triton",
            ),
            ff.BackendUnavailableError,
            ["triton", "fp32", "fp64"],
        ),
        (
            lambda: ff.latent_attention(*[torch.randn(1, 2, 1, 264)] * 5, impl="triton"),
            ff.BackendUnavailableError,
            ["triton", "256", "264"],
        ),
    ],
)
def test_errors_of_latent_attention(call, error, words):
    _assert_raises(call, error, words)


@pytest.mark.parametrize(
    ("arguments", "kernel"),
    [
        ({}, "one_medium"),
        ({"k": torch.randn(4, 129, 2, 8)}, "several_media"),
        ({"q": torch.randn(2, 5, 4, 136), "k": torch.randn(4, 64, 2, 136)}, "several_media"),
        ({"unattended": "dense"}, "several_media"),
        ({"layout": _layout(attend="all_previous")}, "several_media"),
    ],
    ids=["one_medium", "129_keys", "fp32_64_keys_of_136", "dense", "all_previous"],
)
def test_which_kernels_attention_takes(arguments, kernel):
    with recording(Target("sm_90", num_sms=132)) as launches:
        _attend(**arguments, impl="triton")
    assert [launch.kernel.fn.__name__ for launch in launches] == [f"_{kernel}_fwd_kernel"]


@pytest.mark.parametrize("impl", ["varlen", "flash_attn", "xformers"])
@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({}, ["GPU", "cpu"]),
        ({"layout": _layout(attend="all_previous")}, ["2 media a token"]),
        ({"unattended": "dense"}, ['unattended="dense"']),
    ],
    ids=["cpu", "all_previous", "dense"],
)
def test_libraries_that_cannot_take_the_arguments(arguments, words, impl):
    """An error by name, never another implementation."""
    words = [f'impl="{impl}"', *words]
    _assert_raises(lambda: _attend(**arguments, impl=impl), ff.BackendUnavailableError, words)
    with ff.use_impl(impl):
        _assert_raises(lambda: _attend(**arguments), ff.BackendUnavailableError, words)


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: _layout([[True]]), TypeError, ["media_locations", "tensor", "list"]),
        (lambda: _layout(LOCATIONS.float()), TypeError, ["media_locations", "bool", "float32"]),
        (lambda: _layout(LOCATIONS[0]), ValueError, ["media_locations", "(B, L)", "(5,)"]),
        (lambda: _layout(attend="last"), ValueError, ["attend", "all_previous", "last"]),
        (lambda: _layout(num_media=-1), ValueError, ["num_media", ">= 0", "-1"]),
        (lambda: _layout(num_media=2.0), ValueError, ["num_media", "integer", "2.0"]),
        (lambda: _layout(num_media=True), ValueError, ["num_media", "integer", "True"]),
        (lambda: _layout(num_media=[2]), ValueError, ["num_media", "2 of them", "[2]"]),
        (lambda: _layout(num_media=[2, -3]), ValueError, ["num_media", ">= 0", "[2, -3]"]),
        (
            lambda: _layout(num_media=torch.ones(2)),
            TypeError,
            ["num_media", "integers", "float32"],
        ),
        (
            lambda: _layout(num_media=torch.ones(3, dtype=torch.int64)),
            ValueError,
            ["num_media", "(2,)", "(3,)"],
        ),
        (
            lambda: _layout(num_media=torch.ones(2, dtype=torch.int64, device="meta")),
            ValueError,
            ["media_total", "sum of num_media", "meta"],
        ),
        (lambda: _layout(media_total=5), ValueError, ["media_total", "4", "5"]),
        (
            lambda: _layout(media_seqlens=torch.ones(4)),
            TypeError,
            ["media_seqlens", "integers", "float32"],
        ),
        (
            lambda: _layout(media_seqlens=torch.ones(3, dtype=torch.int64)),
            ValueError,
            ["media_seqlens", "(4,)", "(3,)"],
        ),
        (
            lambda: _layout(media_seqlens=torch.ones(4, dtype=torch.int64, device="meta")),
            ValueError,
            ["media_seqlens", "cpu", "meta"],
        ),
        (
            lambda: _layout(media_seqlens=torch.tensor([3, 3, -2, 3])),
            ValueError,
            ["media_seqlens", "medium 2", "-2"],
        ),
        (lambda: _intervals(start=STARTS.float()), TypeError, ["media_start", "int", "float32"]),
        (lambda: _intervals(start=STARTS[0]), ValueError, ["media_start", "(B, L)", "(5,)"]),
        (lambda: _intervals(end=STARTS[:1]), ValueError, ["media_end", "(2, 5)", "(1, 5)"]),
        (lambda: _intervals(end=STARTS.to("meta")), ValueError, ["media_end", "cpu", "meta"]),
        (lambda: _intervals(per_token=-1), ValueError, ["max_media_per_token", ">= 0", "-1"]),
        (lambda: _intervals(per_token=0), ValueError, ["token 0 of sample 0", "[0, 1)", "0"]),
        (lambda: _intervals(end=STARTS + 3), ValueError, ["token 0 of sample 0", "[0, 3)", "2"]),
        (lambda: _intervals(start=STARTS - 1), ValueError, ["token 0", "[-1, 1)", "0 <= start"]),
        (lambda: LAYOUT.last(6), ValueError, ["num_tokens", "0 to 5", "6"]),
        (lambda: LAYOUT.last(-1), ValueError, ["num_tokens", "0 to 5", "-1"]),
        (lambda: ff.MediaLayout.cat([]), ValueError, ["layouts", "at least one"]),
        (lambda: ff.MediaLayout.cat([LAYOUT], dim=2), ValueError, ["dim", "0", "1", "2"]),
        (
            lambda: ff.MediaLayout.cat([LAYOUT, LAYOUT.last(2)]),
            ValueError,
            ["layouts[1]", "2 x 2", "2 x 5", "dim 0"],
        ),
        (
            lambda: ff.MediaLayout.cat([LAYOUT, _layout(num_media=3)], dim=1),
            ValueError,
            ["layouts[1]", "6 media", "4 media", "dim 1"],
        ),
        (
            lambda: ff.MediaLayout.cat([LAYOUT, _layout(LOCATIONS.to("meta"))]),
            ValueError,
            ["layouts[1]", "meta", "cpu"],
        ),
        (
            lambda: dataclasses.replace(LAYOUT, cu_media=LAYOUT.cu_media + 1).validate(),
            ValueError,
            ["cu_media", "[1, 3, 5]", "4"],
        ),
        (
            lambda: dataclasses.replace(LAYOUT, max_media=1).validate(),
            ValueError,
            ["num_media", "1", "2"],
        ),
    ],
)
def test_errors_of_layouts(call, error, words):
    _assert_raises(call, error, words)


@pytest.mark.parametrize(
    "call",
    [
        lambda: reference.gated_residual_norm(X, X, GATE, None, None, 1e-5, "RMS"),
        lambda: reference.masked_cross_attention(Q, K, K, LAYOUT, "typo", "zero", 1.0),
        lambda: reference.masked_cross_attention(Q, K, K, LAYOUT, "zero", "dense", 1.0),
    ],
    ids=["norm", "unattended", "past_last"],
)
def test_a_reference_takes_no_name_for_another(call):
    with pytest.raises(KeyError):
        call()


def test_auto_is_an_implementation_that_the_op_has():
    with FakeTensorMode(allow_non_fake_inputs=True):
        on_gpu = torch.empty(1, device="cuda")
    assert choose_impl("auto", on_gpu) == "triton"
    assert choose_impl("auto", on_gpu, known=("auto", "torch", "reference")) == "torch"


def test_use_impl_sdpa_is_of_attention_only(monkeypatch):
    calls = []
    real = torch.nn.functional.scaled_dot_product_attention

    def counted(*args, **kwargs):
        calls.append(kwargs["attn_mask"].shape)
        return real(*args, **kwargs)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", counted)
    with ff.use_impl("sdpa"):
        out = _attend()
        squared = ff.squared_relu(X)
    assert calls == [(2, 1, 5, 6)]
    torch.testing.assert_close(out, _attend(impl="reference"))
    assert torch.equal(squared, ff.squared_relu(X))


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
