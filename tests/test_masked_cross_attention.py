"""masked_cross_attention against the fp64 oracle and against the peers' own classes."""

import dataclasses
import functools
import sys

import pytest
import torch
from attention_cases import (
    BF16,
    FP16,
    HEAD_DIMS,
    MEMORY_LAYOUTS,
    AttentionCase,
    assert_bits_equal,
    cases,
    check,
    fast_impls,
    impls,
    run,
    run_on,
    with_nan,
)

import flamingo_fast as ff
from flamingo_fast.layout import MediaLayout
from flamingo_fast.schedule import chunk_rows
from flamingo_fast.testing import eager, peers
from flamingo_fast.testing.compare import assert_close_to_oracle, outputs_and_gradients
from flamingo_fast.testing.guard import guard
from flamingo_fast.testing.inputs import random_tensor

pytestmark = pytest.mark.matrix

PATTERNS = {
    "text_before_first": AttentionCase(images=((7, 15),)),
    "image_is_last_token": AttentionCase(images=((3, 23),)),
    "consecutive_images": AttentionCase(images=((4, 5, 6, 20),)),
    "one_image_for_the_row": AttentionCase(images=((0,),)),
    "no_image_token": AttentionCase(images=((),), num_media=2),
    "an_image_at_every_token": AttentionCase(seqlen=5, images=((0, 1, 2, 3, 4),)),
    "more_image_tokens_than_media": AttentionCase(images=((2, 9, 14), (3,)), num_media=2),
    "fewer_image_tokens_than_media": AttentionCase(images=((6,),), num_media=3),
    "ragged": AttentionCase(images=((3,), (), (0, 8, 9)), num_media=(1, 0, 3)),
    "only_the_last_sample_has_media": AttentionCase(images=((), (), (5,))),
    "dense": AttentionCase(images=((3,), (), (0, 8, 9)), num_media=3, dense_kv=True),
    "left_padding": AttentionCase(images=((18,), (11, 19), (0, 9)), num_media=2, dense_kv=True),
    "next": AttentionCase(images=((3, 4, 15), ()), num_media=(3, 1), attend="next"),
    "next_with_too_many_tokens": AttentionCase(images=((3, 9, 15),), num_media=2, attend="next"),
    "decode": AttentionCase(images=((3, 9), (), (23,)), num_media=2, last=1),
    "decode_of_one_token": AttentionCase(seqlen=1, images=((0,), ()), num_media=(1, 2)),
    "media_seqlens": AttentionCase(
        images=((3, 9, 14), (0,)), num_media=(3, 2), media_seqlens=(2, 0, 5, 1, 9)
    ),
    "no_valid_token": AttentionCase(images=((3, 9),), media_seqlens=(0, 0)),
}

SHAPES = {
    "medium_of_2048_rows": AttentionCase(
        seqlen=2048, images=((0,),), heads=1, num_keys=3, dtype=FP16
    ),
    "split_and_whole_media": AttentionCase(
        seqlen=500, images=((7, 300), (170, 171)), heads=1, num_keys=3, dtype=BF16
    ),
    "in_any_order": AttentionCase(images=((3, 9), (), (1, 2, 3)), num_media=3, shuffled=True),
    "in_any_order_gqa": AttentionCase(
        seqlen=9, images=((0, 4), (2,)), heads=6, kv_heads=2, shuffled=True, dtype=BF16
    ),
    "in_any_order_split": AttentionCase(seqlen=300, images=((7, 9),), shuffled=True, heads=1),
    "gqa_3": AttentionCase(images=((3, 9), (5,)), heads=6, kv_heads=2),
    "gqa_4": AttentionCase(images=((3, 9), (5,)), heads=8, kv_heads=2, dtype=BF16),
    "mqa_8": AttentionCase(images=((3, 9), (5,)), heads=8, kv_heads=1, dtype=FP16),
    "gqa_decode": AttentionCase(images=((3, 9), (5,)), heads=8, kv_heads=2, last=1),
    "gqa_split": AttentionCase(
        seqlen=300, images=((7,),), heads=3, kv_heads=1, num_keys=3, media_seqlens=(2,)
    ),
}

KEYS = [(1, torch.float32), (1, BF16), (5, FP16), (64, BF16), (64, torch.float32), (128, FP16)]

UNUSUAL_ROWS = {
    "uniform_before_the_first": AttentionCase(
        images=((7, 15), (), (2,)), num_media=(2, 3, 1), unattended="uniform"
    ),
    "uniform_past_the_last": AttentionCase(
        images=((2, 9, 14), (3,)), num_media=(2, 1), past_last="uniform"
    ),
    "both_uniform": AttentionCase(
        images=((2, 9, 14), (), (5,)), num_media=1, unattended="uniform", past_last="uniform"
    ),
    "uniform_over_valid_tokens": AttentionCase(
        images=((7, 15), (4, 9), (3,)),
        num_media=(2, 1, 1),
        media_seqlens=(2, 7, 3, 0),
        unattended="uniform",
        past_last="uniform",
        dtype=BF16,
    ),
    "uniform_gqa": AttentionCase(
        images=((7, 15), ()), num_media=2, heads=4, kv_heads=2, unattended="uniform", dtype=FP16
    ),
    "uniform_without_media": AttentionCase(
        images=((7,), ()), unattended="uniform", past_last="uniform"
    ),
    "uniform_decode": AttentionCase(
        images=((), (3, 4)), num_media=1, last=1, unattended="uniform", past_last="uniform"
    ),
}

EMPTY = {
    "no_media": AttentionCase(images=((2,), ()), num_media=0),
    "no_media_dense": AttentionCase(images=((2,), ()), num_media=0, dense_kv=True),
    "no_keys": AttentionCase(images=((2, 9),), num_keys=0),
    "no_tokens": AttentionCase(seqlen=0, images=((), ()), num_media=(2, 1)),
    "no_query": AttentionCase(images=((2, 9),), last=0),
    "no_samples": AttentionCase(images=(), num_media=2),
    "no_samples_dense": AttentionCase(images=(), num_media=2, dense_kv=True),
}


@impls
@cases(PATTERNS)
def test_patterns(case, impl, guarded):
    check(case, impl)


@pytest.mark.parametrize("dtype", [BF16, FP16], ids=str)
@impls
@cases({name: PATTERNS[name] for name in ("ragged", "media_seqlens", "decode")})
def test_patterns_in_16_bits(case, impl, dtype, guarded):
    check(dataclasses.replace(case, dtype=dtype, num_keys=11), impl)


@impls
@cases(SHAPES)
def test_shapes(case, impl, guarded):
    check(case, impl)


@pytest.mark.parametrize(("impl", "seqlen"), [("torch", 530), ("sdpa", 530), ("triton", 24)])
def test_512_media(impl, seqlen, guarded):
    """Media without a token need their gradients too: zeros."""
    check(AttentionCase(seqlen, num_media=512, heads=1, num_keys=3, dtype=FP16), impl)


def test_the_long_medium_is_split():
    layout = SHAPES["medium_of_2048_rows"].layout()
    assert (layout.work_items[:, 1:3].diff(dim=1) > 0).sum() == 2048 // chunk_rows(2048) > 1


@impls
@pytest.mark.parametrize(("head_dim", "dtype"), HEAD_DIMS)
def test_head_dims(head_dim, dtype, impl, guarded):
    check(AttentionCase(images=((5, 9),), head_dim=head_dim, dtype=dtype), impl)


@impls
@pytest.mark.parametrize(("num_keys", "dtype"), KEYS)
def test_keys_of_a_medium(num_keys, dtype, impl, guarded):
    check(AttentionCase(images=((5, 9),), num_keys=num_keys, dtype=dtype), impl)


@impls
@pytest.mark.parametrize("layouts", MEMORY_LAYOUTS, ids=str)
def test_memory_layouts(layouts, impl, guarded):
    case = {"images": ((3, 9), (5, 20)), "num_keys": 7, "dtype": BF16} | layouts
    check(AttentionCase(**case), impl)


@impls
@cases(UNUSUAL_ROWS)
def test_rows_that_attend_to_nothing(case, impl, guarded):
    check(case, impl)


@impls
def test_rows_without_a_medium_between_media(impl, guarded):
    start = torch.tensor([[0, 0, 1, 1, 1, 2, 2], [0, 0, 1, 1, 2, 2, 3]])
    end = torch.tensor([[0, 1, 1, 1, 2, 2, 3], [1, 1, 1, 2, 2, 2, 3]])
    case = AttentionCase(7, num_media=3, batch=2)
    check(case, impl, MediaLayout.from_intervals(start, end, 3, 1))


@impls
@cases(EMPTY)
def test_empty(case, impl, guarded):
    check(case, impl)


@impls
@pytest.mark.parametrize("frozen", ["k v", "q", "v", "q k"])
def test_frozen_inputs(frozen, impl, guarded):
    names = frozen.split()
    case = AttentionCase(seqlen=150, images=((3, 9), (5,)), heads=1, frozen=tuple(names))
    measured = {comparison.name for comparison in check(case, impl)}
    assert measured == {"out", "dq", "dk", "dv"} - {f"d{name}" for name in names}


@impls
@pytest.mark.parametrize("softmax_scale", [0.0, -0.3, 3.0])
def test_softmax_scale(softmax_scale, impl, guarded):
    check(AttentionCase(images=((3, 9), (5,)), softmax_scale=softmax_scale), impl)


@impls
def test_large_scores(impl, guarded):
    """A softmax that picks one key; its gradients cancel to nothing, so only that they are finite.

    The scores of some keys are below the smallest exponent.
    """
    case = AttentionCase(images=((3, 9), (5,)), softmax_scale=1e4)
    oracle = case.call_reference()(*(each.double() for each in case.inputs().values()))
    results = run(case.call(impl), case)
    torch.testing.assert_close(results["out"], oracle.float(), rtol=1e-2, atol=1e-2)
    assert all(tensor.isfinite().all() for tensor in results.values())


@pytest.mark.parametrize(
    "case",
    [
        PATTERNS["ragged"],
        PATTERNS["media_seqlens"],
        AttentionCase(images=((3, 9),), head_dim=40, num_keys=5, dtype=BF16),
        AttentionCase(seqlen=300, images=((7,),), heads=3, kv_heads=1, num_keys=3, dtype=FP16),
    ],
    ids=str,
)
def test_masked_lanes_that_hold_huge_values(case):
    with guard(poison="huge") as guarded:
        check(case, "triton")
    assert guarded.launches


@pytest.mark.parametrize("seed", range(6))
@fast_impls
def test_random_positions(seed, impl, guarded):
    case = AttentionCase(
        seqlen=37,
        num_media=(4, 0, 9),
        batch=3,
        heads=1,
        seed=seed,
        attend=("previous", "next")[seed % 2],
    )
    check(case, impl)


@impls
def test_gradient_of_one_projection(impl, guarded):
    """k and v are halves of a projection: so are dk and dv, and nothing concatenates them."""
    case = AttentionCase(images=((3, 9), (5, 20)), kv_layout="projection")
    oracle = run(case.call_reference(), case, torch.float64)
    inputs = case.inputs()
    both = torch.stack([inputs["k"], inputs["v"]], 2).detach().requires_grad_()
    projection = both.flatten(2)
    k, v = (half.unflatten(-1, (2, 16)) for half in projection.chunk(2, -1))
    out = case.call(impl)(inputs["q"], k, v)
    dk, dv, d_both = torch.autograd.grad(out, (k, v, both), case.dout())
    expected = torch.stack([oracle["dk"], oracle["dv"]], 2)
    torch.testing.assert_close(d_both, expected.float(), rtol=1e-5, atol=1e-6)
    if impl != "sdpa":
        assert dk.stride() == dv.stride() == k.stride()
        assert dk.untyped_storage().data_ptr() == dv.untyped_storage().data_ptr()


@pytest.mark.parametrize("impl", ["reference", "torch"])
@pytest.mark.parametrize(
    "case",
    [
        AttentionCase(7, images=((2, 5), (0,), ()), head_dim=3, num_keys=2, dtype=torch.float64),
        AttentionCase(
            6,
            images=((1, 3, 4), (2,)),
            num_media=(2, 1),
            heads=4,
            kv_heads=2,
            head_dim=2,
            num_keys=3,
            dtype=torch.float64,
            media_seqlens=(2, 3, 0),
            unattended="uniform",
            past_last="uniform",
        ),
        AttentionCase(
            5,
            images=((1, 3),),
            head_dim=2,
            num_keys=3,
            dtype=torch.float64,
            attend="all_previous",
            unattended="dense",
        ),
    ],
    ids=str,
)
def test_gradcheck(case, impl):
    assert torch.autograd.gradcheck(case.call(impl), tuple(case.inputs().values()))


@cases(PATTERNS | UNUSUAL_ROWS | EMPTY)
def test_eager_means_what_the_reference_means(case):
    """Else its errors would widen what the three-way rule lets pass."""
    double = dataclasses.replace(case, dtype=torch.float64)
    expected = run(double.call_reference(), double)
    for name, tensor in run(double.call_eager(), double).items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-11, atol=1e-12, msg=name)


@fast_impls
@pytest.mark.parametrize("names", ["k", "v", "k v"])
def test_nan_of_a_medium_stays_with_its_rows(names, impl, guarded):
    case = AttentionCase(images=((3, 9), (0, 15)), heads=1, past_last="uniform")
    inputs = case.inputs()
    clean = run_on(case, impl, inputs)
    inputs |= {name: with_nan(inputs[name], 2) for name in names.split()}
    dirty = run_on(case, impl, inputs)
    assert dirty["dq"][1, :15].isnan().all()
    for name, kept in (("out", (1, slice(15, None))), ("dq", (1, slice(15, None)))):
        assert torch.equal(dirty[name][0], clean[name][0])
        assert torch.equal(dirty[name][kept], clean[name][kept])
    for name in ("dk", "dv"):
        assert torch.equal(dirty[name][[0, 1, 3]], clean[name][[0, 1, 3]])


@fast_impls
def test_nan_of_a_query_stays_with_its_row_and_medium(impl, guarded):
    case = AttentionCase(images=((3, 9), (0, 15)), heads=1)
    inputs = case.inputs()
    clean = run_on(case, impl, inputs)
    dirty = run_on(case, impl, inputs | {"q": with_nan(inputs["q"], 1, 17)})
    other_rows = torch.ones(2, 24, dtype=torch.bool)
    other_rows[1, 17] = False
    assert dirty["dq"][1, 17].isnan().all()
    for name in ("out", "dq"):
        assert torch.equal(dirty[name][other_rows], clean[name][other_rows])
    for name in ("dk", "dv"):
        assert torch.equal(dirty[name][:3], clean[name][:3])


@fast_impls
def test_nan_of_rows_that_attend_to_nothing_goes_nowhere(impl, guarded):
    case = AttentionCase(images=((3, 9, 20), (5, 15)), num_media=2, heads=1)
    inputs = case.inputs()
    clean = run_on(case, impl, inputs)
    silent = ~case.layout().attends()
    assert silent.sum() == 3 + 4 + 5
    q, dout = with_nan(inputs["q"], silent), with_nan(case.dout(), silent)
    assert_bits_equal(run_on(case, impl, inputs | {"q": q}, dout), clean)


@fast_impls
@pytest.mark.parametrize("unattended", ["zero", "uniform"])
def test_nan_of_padded_keys_goes_nowhere(unattended, impl, guarded):
    case = AttentionCase(
        images=((3, 9), (5, 15)),
        heads=1,
        num_keys=6,
        media_seqlens=(4, 6, 0, 1),
        unattended=unattended,
    )
    inputs = case.inputs()
    clean = run_on(case, impl, inputs)
    padded = torch.arange(6) >= torch.tensor(case.media_seqlens)[:, None]
    dirty = {name: with_nan(inputs[name], padded) for name in ("k", "v")}
    results = run_on(case, impl, inputs | dirty)
    assert_bits_equal(results, clean)
    assert not results["dk"][padded].any() and not results["dv"][padded].any()


@fast_impls
def test_nan_of_another_sample_does_not_reach_uniform_rows(impl, guarded):
    case = AttentionCase(
        images=((3, 9), (5,)), num_media=1, heads=1, unattended="uniform", past_last="uniform"
    )
    inputs = case.inputs()
    clean = run_on(case, impl, inputs)
    results = run_on(case, impl, inputs | {"v": with_nan(inputs["v"], 1)})
    assert torch.equal(results["out"][0], clean["out"][0])
    assert torch.equal(results["dq"][0], clean["dq"][0])
    assert torch.equal(results["dv"][0], clean["dv"][0])


PEERS = {"open_flamingo": peers.open_flamingo, "flamingo_pytorch": peers.flamingo_pytorch}
DIM, HEADS, HEAD_DIM, KEYS_OF_A_MEDIUM = 24, 2, 16, 5


def _peer_attention(peer: str, dtype: torch.dtype, immediate: bool):
    dim_visual = {"dim_visual": DIM} if peer == "open_flamingo" else {}
    torch.manual_seed(0)
    attention = PEERS[peer]().MaskedCrossAttention(
        dim=DIM,
        dim_head=HEAD_DIM,
        heads=HEADS,
        only_attend_immediate_media=immediate,
        **dim_visual,
    )
    for parameter in attention.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return attention.to(dtype)


def _in_its_place(attention, x, media, function):
    """The peer's forward, but for what is between its projections."""
    q = attention.to_q(attention.norm(x)).unflatten(-1, (HEADS, HEAD_DIM))
    k, v = attention.to_kv(media).chunk(2, dim=-1)
    k, v = (tensor.unflatten(-1, (HEADS, HEAD_DIM)) for tensor in (k, v))
    return attention.to_out(function(q, k, v).flatten(2))


def _ours_in_its_place(attention, x, media, layout, impl, **choices):
    ours = functools.partial(ff.masked_cross_attention, layout=layout, impl=impl, **choices)
    return _in_its_place(attention, x, media, ours)


def _assert_same_as_peer(peer, immediate, locations, num_media, ours, impl, dtype, x_rows, **more):
    """The three-way rule: eager is the peer's module, and the oracle is that in fp64.

    ours: a function of the peer's module, x and media; more: arguments of the peer's forward.
    """
    batch = locations.shape[0]
    inputs = {
        "x": random_tensor((batch, x_rows, DIM), dtype, seed=1, requires_grad=True),
        "media": random_tensor(
            (batch, num_media, KEYS_OF_A_MEDIUM, DIM), dtype, seed=2, requires_grad=True
        ),
    }
    dout = random_tensor((batch, x_rows, DIM), dtype, seed=3)
    attention = _peer_attention(peer, dtype, immediate)
    names = [name for name, _ in attention.named_parameters()]
    inputs |= {name: parameter.detach() for name, parameter in attention.named_parameters()}
    for name in names:
        inputs[name].requires_grad_()

    def with_weights(function):
        def call(x, media, *weights):
            module = _Stateless(attention, dict(zip(names, weights, strict=True)))
            return module(function, x, media)

        return call

    def theirs(module, x, media):
        return module(x, media, media_locations=locations, **more)

    results = [
        outputs_and_gradients(with_weights(function), inputs, ("out",), (dout,), wanted)
        for function, wanted in (
            (functools.partial(ours, impl=impl), None),
            (theirs, None),
            (theirs, torch.float64),
        )
    ]
    assert_close_to_oracle(*results)


class _Stateless:
    """Calls function(module, ...) with other weights in the module's place."""

    def __init__(self, module: torch.nn.Module, weights: dict[str, torch.Tensor]) -> None:
        self.module, self.weights = module, weights

    def __call__(self, function, *inputs):
        with torch.nn.utils.stateless._reparametrize_module(self.module, self.weights):
            return function(self.module, *inputs)


def _locations(positions: tuple[tuple[int, ...], ...]) -> torch.Tensor:
    return AttentionCase(20, images=positions).media_locations()


@fast_impls
@pytest.mark.parametrize("dtype", [torch.float32, BF16], ids=str)
@pytest.mark.parametrize("peer", PEERS)
def test_same_as_the_peer_with_the_previous_medium(peer, dtype, impl, guarded):
    """Also a row without an image, and one with more image tokens than media."""
    locations = _locations(((3, 11), (), (0, 5, 12), (19,)))

    def ours(attention, x, media, impl):
        layout = MediaLayout.from_media_locations(locations, 2)
        return _ours_in_its_place(attention, x, media, layout, impl, past_last="uniform")

    _assert_same_as_peer(peer, True, locations, 2, ours, impl, dtype, 20)


@impls
@pytest.mark.parametrize("peer", PEERS)
def test_same_as_the_peer_with_all_previous_media(peer, impl, guarded):
    """Text before the first image then gets the mean of all media."""
    locations = _locations(((3, 11), (), (0, 5, 12), (19,)))

    def ours(attention, x, media, impl):
        layout = MediaLayout.from_media_locations(locations, 2, "all_previous")
        return _ours_in_its_place(attention, x, media, layout, impl, unattended="uniform")

    _assert_same_as_peer(peer, False, locations, 2, ours, impl, torch.float32, 20)


@fast_impls
@pytest.mark.parametrize("rows", [1, 3])
def test_same_as_open_flamingo_with_cached_media(rows, impl, guarded):
    """All new tokens come after the last image token of the prompt."""
    locations = _locations(((3, 11), (), (0, 5, 12), (19,)))

    def ours(attention, x, media, impl):
        last = MediaLayout.from_media_locations(locations, 2).last(1)
        layout = MediaLayout.cat([last] * rows, dim=1)
        return _ours_in_its_place(attention, x, media, layout, impl, past_last="uniform")

    _assert_same_as_peer(
        "open_flamingo",
        True,
        locations,
        2,
        ours,
        impl,
        torch.float32,
        rows,
        use_cached_media=True,
    )


@pytest.mark.parametrize("peer", PEERS)
def test_eager_is_the_peer(peer):
    """The baseline of the benchmarks is the peer's composition, from q, k and v on."""
    locations = _locations(((3, 11), (), (0, 5)))
    attention = _peer_attention(peer, torch.float32, True)
    x = random_tensor((3, 20, DIM), seed=1)
    media = random_tensor((3, 2, KEYS_OF_A_MEDIUM, DIM), seed=2)
    layout = MediaLayout.from_media_locations(locations, 2)
    out = _in_its_place(
        attention, x, media, functools.partial(eager.masked_cross_attention, layout=layout)
    )
    torch.testing.assert_close(out, attention(x, media, locations), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("missing", ["open_flamingo", "einops_exts"])
def test_an_absent_peer_is_an_error_that_says_how_to_install_it(missing, monkeypatch):
    monkeypatch.delitem(sys.modules, "open_flamingo.src.helpers", raising=False)
    if missing == "open_flamingo":
        monkeypatch.setattr(peers.importlib.util, "find_spec", lambda name: None)
    else:
        monkeypatch.setitem(sys.modules, missing, None)
    how = f"{missing} is not installed: pip install --no-deps open-flamingo==2.0.1 && .* einops"
    with pytest.raises(ImportError, match=how):
        peers.open_flamingo()
