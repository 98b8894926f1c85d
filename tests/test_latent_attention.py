"""latent_attention against the fp64 oracle and against the peers' own classes."""

import dataclasses
import itertools

import pytest
import torch
from attention_cases import assert_bits_equal
from latent_cases import (
    BF16,
    FP16,
    MEMORY_LAYOUTS,
    NAMES,
    LatentCase,
    cases,
    check,
    run,
)

import flamingo_fast as ff
from flamingo_fast import reference
from flamingo_fast.testing import eager, peers
from flamingo_fast.testing.compare import assert_close_to_oracle, outputs_and_gradients
from flamingo_fast.testing.inputs import random_tensor

pytestmark = pytest.mark.matrix

IMPLS = ["torch", "sdpa", "reference", "triton"]
every_impl = pytest.mark.parametrize("impl", IMPLS)
DTYPES = [torch.float32, BF16, FP16, torch.float64]

SHAPES = {
    "small": LatentCase(),
    "one_medium": LatentCase(batch=1),
    "one_latent": LatentCase(latents=1),
    "one_feature": LatentCase(features=1, batch=2),
    "no_features": LatentCase(features=0),
    "resampler": LatentCase(batch=2, latents=64, features=65, head_dim=64),
    "gqa_4": LatentCase(heads=8, kv_heads=2, head_dim=24, latents=5),
    "mqa": LatentCase(heads=3, kv_heads=1),
    "many_features": LatentCase(batch=1, latents=4, features=300),
    "lengths": LatentCase(media_seqlens=(4, 11, 1)),
    "lengths_beyond_int32": LatentCase(media_seqlens=(2**31, -(2**63), 2**63 - 1)),
    "lengths_none_and_too_long": LatentCase(media_seqlens=(0, 7, 90)),
    "equal_lengths": LatentCase(batch=4, media_seqlens=(5, 5, 5, 2)),
    "lengths_gqa": LatentCase(heads=4, kv_heads=2, media_seqlens=(3, 0, 11)),
    "lengths_of_no_features": LatentCase(features=0, media_seqlens=(0, 2, 0)),
}
EMPTY = {
    "no_media": LatentCase(batch=0),
    "no_media_lengths": LatentCase(batch=0, media_seqlens=()),
    "no_latents": LatentCase(latents=0),
}
# Where the CPU implementation takes other ways: long media, heads in parts, several groups.
LARGE = {
    "long": LatentCase(batch=2, latents=8, features=2100, media_seqlens=(2100, 2060)),
    "long_gqa": LatentCase(batch=1, latents=8, features=2050, heads=4, kv_heads=2),
    "long_chunks": LatentCase(batch=1, latents=64, features=6000, heads=4, head_dim=8),
    "heads_in_parts": LatentCase(batch=1, latents=48, features=20000, heads=6, head_dim=8),
    "groups": LatentCase(batch=15, latents=64, features=200, heads=8, head_dim=64),
}


@pytest.mark.parametrize(
    ("impl", "dtype"),
    [pair for pair in itertools.product(IMPLS, DTYPES) if pair != ("triton", torch.float64)],
    ids=lambda value: str(value).removeprefix("torch."),
)
@cases(SHAPES)
def test_shapes(case, impl, dtype, guarded):
    check(dataclasses.replace(case, dtype=dtype), impl)


@pytest.mark.parametrize("dtype", [torch.float32, BF16, FP16], ids=str)
@cases(LARGE)
def test_large_shapes(case, dtype):
    check(dataclasses.replace(case, dtype=dtype), "torch")


@every_impl
@cases(EMPTY)
def test_empty(case, impl, guarded):
    check(case, impl)


@pytest.mark.parametrize(
    ("head_dim", "dtype"), [(8, BF16), (40, FP16), (80, BF16), (96, torch.float32), (128, BF16)]
)
@every_impl
def test_head_dims(head_dim, dtype, impl, guarded):
    check(LatentCase(batch=2, head_dim=head_dim, dtype=dtype), impl)


@pytest.mark.parametrize("dtype", [torch.float32, BF16], ids=str)
@every_impl
@pytest.mark.parametrize("layouts", MEMORY_LAYOUTS, ids=str)
def test_memory_layouts(layouts, impl, dtype, guarded):
    check(LatentCase(**layouts, dtype=dtype), impl)


@pytest.mark.parametrize("layout", ["transposed", "stepped", "projection"])
def test_memory_layouts_of_long_media(layout):
    check(LatentCase(1, features=2100, media_layout=layout, q_layout="padded"), "torch")


@every_impl
@pytest.mark.parametrize("softmax_scale", [0.0, -0.3, 1.0])
def test_softmax_scale(softmax_scale, impl, guarded):
    check(LatentCase(latents=16, features=40, softmax_scale=softmax_scale), impl)


# Beyond 2,048 features the CPU implementation takes another way, beyond 1,024 kernels split them.
LENGTHS = [(impl, n) for impl in IMPLS for n in ((11, 1030) if impl == "triton" else (11, 2100))]


@pytest.mark.parametrize(("impl", "features"), LENGTHS)
def test_large_scores(features, impl, guarded):
    """A softmax that picks one key; its gradients cancel to nothing, so only that they are finite.

    The scores of some keys are below the smallest exponent.
    """
    case = LatentCase(batch=2, features=features, softmax_scale=1e4)
    oracle = run(case.call_reference(), case, torch.float64)
    results = run(case.call(impl), case)
    torch.testing.assert_close(results["out"], oracle["out"].float(), rtol=1e-2, atol=1e-2)
    assert all(tensor.isfinite().all() for tensor in results.values())


@every_impl
@pytest.mark.parametrize(
    "frozen",
    [("q",), NAMES[1:3], NAMES[3:], NAMES[1:], ("q", *NAMES[3:]), ("v_media", "k_latents")],
    ids="-".join,
)
def test_frozen_inputs(frozen, impl, guarded):
    measured = {comparison.name for comparison in check(LatentCase(frozen=frozen), impl)}
    assert measured == {"out", *(f"d{name}" for name in NAMES if name not in frozen)}


@pytest.mark.parametrize("dtype", [torch.float32, BF16, FP16], ids=str)
# PyTorch's attention multiplies what its mask leaves out by 0.
@pytest.mark.parametrize(("impl", "features"), [each for each in LENGTHS if each[0] != "sdpa"])
def test_nan_of_what_is_not_valid_goes_nowhere(features, impl, dtype, guarded):
    case = LatentCase(features=features, media_seqlens=(4, 0, features - 2), dtype=dtype)
    inputs = case.inputs()
    clean = run(case.call(impl), case)
    padded = torch.arange(features) >= case.lengths()[:, None]
    for name in ("k_media", "v_media"):
        dirty = inputs[name].detach().clone()
        dirty[padded] = float("nan")
        inputs[name] = dirty.requires_grad_()
    results = run(case.call(impl), case, inputs=inputs)
    assert_bits_equal(results, clean)
    assert not results["dk_media"][padded].any() and not results["dv_media"][padded].any()


@pytest.mark.parametrize("name", NAMES)
@every_impl
def test_nan_of_a_medium_stays_with_it(name, impl, guarded):
    case = LatentCase()
    inputs = case.inputs()
    clean = run(case.call(impl), case)
    dirty = inputs[name].detach().clone()
    dirty[1, 2] = float("nan")
    results = run(case.call(impl), case, inputs=inputs | {name: dirty.requires_grad_()})
    assert results["dq"][1].isnan().any()
    for tensor in results:
        assert torch.equal(results[tensor][::2], clean[tensor][::2])


@pytest.mark.parametrize("impl", ["torch", "reference"])
@cases(
    {
        "mha": LatentCase(2, 3, 4, head_dim=3, dtype=torch.float64),
        "gqa": LatentCase(2, 3, 4, 4, 2, 2, dtype=torch.float64, media_seqlens=(3, 0)),
    }
)
def test_gradcheck(case, impl):
    assert torch.autograd.gradcheck(case.call(impl), tuple(case.inputs().values()))


@cases(SHAPES | EMPTY)
def test_eager_means_what_the_reference_means(case):
    """Else its errors would widen what the three-way rule lets pass."""
    double = dataclasses.replace(case, dtype=torch.float64)
    expected = run(double.call_reference(), double)
    for name, tensor in run(double.call_eager(), double).items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-11, atol=1e-12, msg=name)


@cases(
    {
        "mha": LatentCase(2, 3, 4, head_dim=5, dtype=torch.float64),
        "gqa": LatentCase(3, 2, 4, 4, 2, 3, dtype=torch.float64, media_seqlens=(3, 0, 9)),
        "scale": LatentCase(1, 2, 0, head_dim=3, dtype=torch.float64, softmax_scale=-2.0),
    }
)
def test_the_reference_by_loops(case):
    q, *sources = (tensor.detach() for tensor in case.inputs().values())
    scale = case.head_dim**-0.5 if case.softmax_scale is None else case.softmax_scale
    lengths = case.media_seqlens or (case.features,) * case.batch
    group = case.heads // (case.kv_heads or case.heads)
    expected = torch.empty_like(q)
    for medium, row, head in itertools.product(*map(range, q.shape[:3])):
        valid = min(lengths[medium], case.features)
        k_media, v_media, k_latents, v_latents = (x[medium, :, head // group] for x in sources)
        keys, values = [*k_media[:valid], *k_latents], [*v_media[:valid], *v_latents]
        weights = [(q[medium, row, head].dot(key) * scale).exp() for key in keys]
        terms = [weight * value for weight, value in zip(weights, values, strict=True)]
        expected[medium, row, head] = sum(terms) / sum(weights)
    out = reference.latent_attention(q, *sources, case.lengths(), scale)
    torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-13)


PEERS = {"open_flamingo": peers.open_flamingo, "flamingo_pytorch": peers.flamingo_pytorch}
DIM, HEADS, HEAD_DIM = 24, 2, 16


def _peer_attention(peer: str, dtype: torch.dtype) -> torch.nn.Module:
    torch.manual_seed(0)
    attention = PEERS[peer]().PerceiverAttention(dim=DIM, dim_head=HEAD_DIM, heads=HEADS)
    for parameter in attention.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return attention.to(dtype)


def _in_its_place(attention, media, latents, function):
    """The peer's forward, but for what is between its projections."""
    media, latents = attention.norm_media(media), attention.norm_latents(latents)
    keys = [
        half.flatten(0, 1).unflatten(-1, (HEADS, HEAD_DIM))
        for source in (media, latents)
        for half in attention.to_kv(source).chunk(2, dim=-1)
    ]
    q = attention.to_q(latents).flatten(0, 1).unflatten(-1, (HEADS, HEAD_DIM))
    return attention.to_out(function(q, *keys).flatten(2).unflatten(0, latents.shape[:2]))


@pytest.mark.parametrize("dtype", [torch.float32, BF16], ids=str)
@pytest.mark.parametrize("peer", PEERS)
@every_impl
def test_same_as_the_peer(peer, impl, dtype, guarded):
    """The three-way rule: eager is the peer's module, and the oracle is that in fp64."""
    attention = _peer_attention(peer, dtype)
    shapes = {"media": (2, 5, 9, DIM), "latents": (2, 5, 8, DIM)}
    inputs = {
        name: random_tensor(shape, dtype, seed=seed, requires_grad=True)
        for seed, (name, shape) in enumerate(shapes.items())
    }
    names = [name for name, _ in attention.named_parameters()]
    inputs |= {name: tensor.detach() for name, tensor in attention.named_parameters()}
    for name in names:
        inputs[name].requires_grad_()

    def ours(media, latents):
        return _in_its_place(
            attention, media, latents, lambda *tensors: ff.latent_attention(*tensors, impl=impl)
        )

    def results(function, wanted):
        def with_weights(media, latents, *weights):
            named = dict(zip(names, weights, strict=True))
            with torch.nn.utils.stateless._reparametrize_module(attention, named):
                return function(media, latents)

        dout = random_tensor(shapes["latents"], torch.float64, seed=9)
        return outputs_and_gradients(with_weights, inputs, ("out",), (dout,), wanted)

    assert_close_to_oracle(
        results(ours, None), results(attention, None), results(attention, torch.float64)
    )


@pytest.mark.parametrize("peer", PEERS)
def test_eager_is_the_peer(peer):
    """The baseline of the benchmarks is the peer's composition, from q, k and v on."""
    attention = _peer_attention(peer, torch.float32)
    media, latents = random_tensor((2, 3, 9, DIM), seed=1), random_tensor((2, 3, 5, DIM), seed=2)
    out = _in_its_place(attention, media, latents, eager.latent_attention)
    torch.testing.assert_close(out, attention(media, latents), rtol=1e-6, atol=1e-6)
