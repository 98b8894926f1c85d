"""Gated blocks against OpenFlamingo's and flamingo-pytorch's, and what they keep in memory."""

import pytest
import torch
from module_cases import BF16, FP32, check, inputs_of, like, randomized, results, saved_bytes
from torch import nn

from flamingo_fast import MediaLayout, reference
from flamingo_fast.modules import (
    GatedCrossAttentionBlock,
    MaskedCrossAttention,
    VanillaCrossAttention,
    project_media_kv,
)
from flamingo_fast.testing import peers
from flamingo_fast.testing.compare import assert_close_to_oracle

DIM, VISUAL, HEADS = {"dim": 24}, {"dim_visual": 20}, {"heads": 2, "dim_head": 16}
SHAPES = {"x": (2, 7, 24), "media": (2, 3, 5, 20)}
every_dtype = pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)

# Text before the first image; an image first, and two together; no image; one more than media.
LOCATIONS = {
    "ordinary": [[0, 1, 0, 0, 1, 0, 0], [1, 0, 1, 1, 0, 0, 0]],
    "none": [[0] * 7, [0, 0, 1, 0, 0, 0, 0]],
    "too_many": [[1, 0, 1, 1, 0, 1, 0], [0, 1, 0, 0, 1, 0, 0]],
}


def locations(name):
    return torch.tensor(LOCATIONS[name], dtype=torch.bool)


def of_open_flamingo(name, dtype, **options):
    """The peer's module of that name, and ours with its weights."""
    options = DIM | VISUAL | HEADS | options
    peer = randomized(getattr(peers.open_flamingo(), name)(**options)).to(dtype)
    our_class = {"MaskedCrossAttention": MaskedCrossAttention}.get(name, GatedCrossAttentionBlock)
    return peer, like(peer, our_class(**options))


def block(dtype=FP32, **options):
    options = DIM | VISUAL | HEADS | options
    return randomized(GatedCrossAttentionBlock(**options)).to(dtype)


@every_dtype
@pytest.mark.parametrize("where", LOCATIONS)
@pytest.mark.parametrize("immediate", [True, False], ids=["immediate", "all_previous"])
@pytest.mark.parametrize("name", ["MaskedCrossAttention", "GatedCrossAttentionBlock"])
def test_open_flamingo(name, immediate, where, dtype):
    peer, ours = of_open_flamingo(name, dtype, only_attend_immediate_media=immediate)
    call = lambda module, x, media: module(x, media, locations(where))
    check(ours, peer, inputs_of(dtype, **SHAPES), call)


@every_dtype
@pytest.mark.parametrize("immediate", [True, False], ids=["immediate", "all_previous"])
@pytest.mark.parametrize("name", ["MaskedCrossAttention", "GatedCrossAttentionBlock"])
def test_flamingo_pytorch(name, immediate, dtype):
    options = {"dim": 20, **HEADS, "only_attend_immediate_media": immediate}
    peer = randomized(getattr(peers.flamingo_pytorch(), name)(**options)).to(dtype)
    our_class = {"MaskedCrossAttention": MaskedCrossAttention}.get(name, GatedCrossAttentionBlock)
    ours = like(peer, our_class(**options))
    inputs = inputs_of(dtype, x=(2, 7, 20), media=SHAPES["media"])
    for where in (locations("ordinary"), locations("too_many"), None):
        call = lambda module, x, media, where=where: module(x, media, media_locations=where)
        check(ours, peer, inputs, call)


@pytest.mark.parametrize("where", [*LOCATIONS, "all"])
@pytest.mark.parametrize("immediate", [True, False], ids=["immediate", "all_previous"])
def test_cached_media(immediate, where):
    """All text is after the last image of locations, whose length is another; or sees all media."""
    peer, ours = of_open_flamingo(
        "GatedCrossAttentionBlock", FP32, only_attend_immediate_media=immediate
    )
    places = None if where == "all" else locations(where)
    call = lambda module, x, media: module(x, media, places, use_cached_media=True)
    check(ours, peer, inputs_of(FP32, x=(2, 4, 24), media=SHAPES["media"]), call)


def test_cached_media_of_no_text():
    peer, ours = of_open_flamingo("MaskedCrossAttention", FP32)
    nowhere = torch.zeros(2, 0, dtype=torch.bool)
    call = lambda module, x, media: module(x, media, nowhere, use_cached_media=True)
    check(ours, peer, inputs_of(FP32, **SHAPES), call)


@pytest.mark.parametrize("immediate", [True, False], ids=["immediate", "all_previous"])
def test_decoding_with_keys_and_values(immediate):
    """A prompt, then token by token: OpenFlamingo's block on the whole text."""
    peer, ours = of_open_flamingo(
        "GatedCrossAttentionBlock", FP32, only_attend_immediate_media=immediate
    )
    inputs = inputs_of(FP32, **SHAPES)
    where = locations("ordinary")

    def step_by_step(module, x, media):
        out, media_kv = module(x[:, :5], media, where[:, :5], return_media_kv=True)
        assert [tuple(tensor.shape) for tensor in media_kv] == [(2, 3, 5, 2, 16)] * 2
        steps = [
            module(x[:, i : i + 1], None, where[:, :5], use_cached_media=True, media_kv=media_kv)
            for i in (5, 6)
        ]
        return torch.cat([out, *steps], 1)

    check(ours, peer, inputs, step_by_step, lambda module, x, media: module(x, media, where))


@pytest.mark.parametrize("our_class", [MaskedCrossAttention, GatedCrossAttentionBlock])
@pytest.mark.parametrize("attend", ["previous", "next", "all_previous"])
def test_a_layout_in_place_of_locations(our_class, attend):
    ours = randomized(our_class(**DIM, **VISUAL, **HEADS, attend=attend))
    inputs = inputs_of(FP32, **SHAPES)
    layout = MediaLayout.from_media_locations(locations("too_many"), 3, attend)
    by_places = lambda module, x, media: module(x, media, locations("too_many"))
    by_layout = lambda module, x, media: module(x, media, layout=layout)
    other = results(ours, inputs, by_layout)
    for name, tensor in results(ours, inputs, by_places).items():
        assert torch.equal(tensor, other[name]), name


def test_a_layout_of_packed_documents():
    ours = block()
    layout = MediaLayout.packed(locations("ordinary")[:1], [0, 3, 7], 1)
    x, media = inputs_of(FP32, x=(1, 7, 24), media=(2, 5, 20)).values()
    out = ours(x, media, layout=layout)
    for tokens, medium in ((slice(0, 3), 0), (slice(3, 7), 1)):
        where = locations("ordinary")[:1, tokens]
        alone = ours(x[:, tokens], media[None, medium : medium + 1], where)
        torch.testing.assert_close(out[:, tokens], alone, rtol=1e-5, atol=1e-5)


@every_dtype
@pytest.mark.parametrize("where", LOCATIONS)
@pytest.mark.parametrize("our_class", [GatedCrossAttentionBlock, VanillaCrossAttention])
def test_zero_block_leaves_text_without_media_alone(our_class, where, dtype):
    options = DIM | VISUAL | HEADS
    ours = randomized(our_class(**options, unattended="zero_block", bias=True)).to(dtype)
    plain = like(ours, our_class(**options, unattended="zero", past_last="zero", bias=True))
    inputs = inputs_of(dtype, **SHAPES)
    attends = MediaLayout.from_media_locations(locations(where), 3).attends()
    found = results(ours, inputs, lambda module, x, media: module(x, media, locations(where)))
    assert torch.equal(found["out"][~attends], inputs["x"][~attends])
    assert not attends.all() and (found["out"][attends] != inputs["x"][attends]).any()

    def chosen(module, x, media):
        return torch.where(attends[..., None], module(x, media, locations(where)), x)

    expected = results(plain, inputs, chosen)
    for name, tensor in found.items():
        assert torch.equal(tensor, expected[name]), name


PAPER = {
    **{"heads": 16, "dim_head": 4, "activation": "squared_relu", "media_norm": True, "bias": True},
    **{"vector_gates": True},
}
VARIANTS = {
    "paper": PAPER,
    "rms": PAPER | {"norm": "rms", "kv_heads": 4, "vector_gates": False, "bias": False},
    "no_gates": {"tanh_gating": False, "media_norm": True, "ff_mult": 1.5},
    "dense": {"unattended": "dense", "attend": "all_previous"},
}


class Oracle(nn.Module):
    """A gated block of the reference's functions and PyTorch's, with our block's parameters."""

    def __init__(self, ours):
        super().__init__()
        for name, module in ours.named_children():
            self.add_module(name, module)
        self.attn_gate, self.ff_gate = ours.attn_gate, getattr(ours, "ff_gate", None)

    def _norm(self, norm, x):
        if norm is None:
            return x
        if norm.__class__.__name__ == "RMSNorm":
            return nn.functional.rms_norm(x, x.shape[-1:], norm.weight, norm.eps)
        return nn.functional.layer_norm(x, x.shape[-1:], norm.weight, norm.bias, norm.eps)

    def forward(self, x, media, layout):
        attn = self.attn
        heads = (attn.heads, attn.kv_heads)
        q = attn.to_q(self._norm(attn.norm, x)).unflatten(-1, (heads[0], -1))
        k, v = attn.to_kv(self._norm(attn.norm_media, media)).chunk(2, -1)
        k, v = (tensor.flatten(0, 1).unflatten(-1, (heads[1], -1)) for tensor in (k, v))
        choice = {"unattended": attn.unattended, "past_last": attn.past_last or "uniform"}
        out = reference.masked_cross_attention(
            q, k, v, layout, **choice, softmax_scale=attn.dim_head**-0.5
        )
        x = x + self._gated(attn.to_out(out.flatten(2)), self.attn_gate)
        if not hasattr(self, "ff"):
            return x
        hidden = self.ff[1](self._norm(self.ff[0], x))
        is_gelu = isinstance(self.ff[2], nn.GELU)
        hidden = nn.functional.gelu(hidden) if is_gelu else hidden.relu().square()
        return x + self._gated(self.ff[3](hidden), self.ff_gate)

    def _gated(self, out, gate):
        return out if gate is None else gate.tanh() * out


@every_dtype
@pytest.mark.parametrize("impl", ["torch", "reference"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_variants(variant, impl, dtype):
    ours = block(dtype, **VARIANTS[variant], impl=impl)
    layout = MediaLayout.from_media_locations(locations("too_many"), 3, ours.attn.attend)
    call = lambda module, x, media: module(x, media, layout=layout)
    check(ours, Oracle(ours), inputs_of(dtype, **SHAPES), call)


@pytest.mark.parametrize("variant", ["paper", "rms", "dense"])
def test_variants_by_kernels(variant, guarded):
    ours = block(**VARIANTS[variant], impl="triton")
    layout = MediaLayout.from_media_locations(locations("ordinary"), 3, ours.attn.attend)
    call = lambda module, x, media: module(x, media, layout=layout)
    check(ours, Oracle(ours), inputs_of(FP32, **SHAPES), call)


@every_dtype
@pytest.mark.parametrize(
    "options", [{}, {"tanh_gating": False}, {"vector_gates": True, "media_norm": True}], ids=str
)
def test_vanilla_cross_attention(options, dtype):
    ours = VanillaCrossAttention(**DIM, **VISUAL, **HEADS, **options)
    randomized(ours).to(dtype)
    layout = MediaLayout.from_media_locations(locations("too_many"), 3)
    call = lambda module, x, media: module(x, media, layout=layout)
    check(ours, Oracle(ours), inputs_of(dtype, **SHAPES), call)


def test_gates_start_closed():
    x, media = inputs_of(FP32, **SHAPES).values()
    for our_class in (GatedCrossAttentionBlock, VanillaCrossAttention):
        ours = our_class(**DIM, **VISUAL)
        assert torch.equal(ours(x, media, locations("ordinary")), x)


class Lora(nn.Linear):
    """As LoRA libraries' layers: its own forward, and the base layer's weights."""

    def forward(self, x):
        return super().forward(x) + x.mean(-1, keepdim=True)


def as_lora(linear):
    lora = Lora(linear.in_features, linear.out_features, linear.bias is not None)
    lora.load_state_dict(linear.state_dict())
    return lora


@pytest.mark.cpu
@every_dtype
def test_keys_and_values_of_all_layers_at_once(dtype):
    layers = [block(dtype), block(dtype, heads=4, kv_heads=1, bias=True), block(dtype).attn]
    media = inputs_of(dtype, media=SHAPES["media"])["media"]
    merged = project_media_kv(layers, media, merge=True)
    double = [block(dtype).double(), block(dtype, heads=4, kv_heads=1, bias=True).double()]
    alone = project_media_kv(layers, media, merge=False)
    oracle = project_media_kv([*double, block(dtype).double().attn], media.double(), merge=False)
    named = [
        {f"{name}{i}": x for i, kv in enumerate(each) for name, x in zip("kv", kv, strict=True)}
        for each in (merged, alone, oracle)
    ]
    assert_close_to_oracle(*named)
    x = inputs_of(dtype, x=SHAPES["x"])["x"]
    for layer, kv, own in zip(layers, merged, alone, strict=True):
        assert torch.equal(own[0], layer(x, media, return_media_kv=True)[1][0])
        out, whole = layer(x, media_kv=kv), layer(x, media)
        torch.testing.assert_close(out, whole, rtol=0.05, atol=0.05 if dtype == BF16 else 1e-5)


@pytest.mark.parametrize("kind", ["hooked", "lora", "media_norm"])
def test_layers_that_project_on_their_own(kind):
    own = block(media_norm=kind == "media_norm")
    calls = []
    if kind == "hooked":
        own.attn.to_kv.register_forward_hook(lambda *_: calls.append(1))
    elif kind == "lora":
        own.attn.to_kv = as_lora(own.attn.to_kv)
    media = inputs_of(FP32, media=SHAPES["media"])["media"]
    got = project_media_kv([block(), own, block()], media, merge=True)[1]
    assert len(calls) == (kind == "hooked")
    for one, other in zip(got, own.attn.project_media(media), strict=True):
        assert torch.equal(one, other)


class Wrapper(nn.Module):
    def __init__(self, inner, calls):
        super().__init__()
        self.inner, self.calls = inner, calls

    def forward(self, *arguments, **options):
        self.calls.append(1)
        return self.inner(*arguments, **options)


def _hook(calls):
    return lambda *_: calls.append(1)


def _replace_forward(module, calls):
    forward = module.forward

    def counted(*arguments, **options):
        calls.append(1)
        return forward(*arguments, **options)

    module.forward = counted


CHANGES = {
    "hook_on_ff": lambda ours, calls: ours.ff.register_forward_hook(_hook(calls)),
    "hook_on_norm": lambda ours, calls: ours.ff[0].register_forward_pre_hook(_hook(calls)),
    "hook_on_linear": lambda ours, calls: ours.ff[1].register_forward_hook(_hook(calls)),
    "wrapped_ff": lambda ours, calls: setattr(ours, "ff", Wrapper(ours.ff, calls)),
    "wrapped_linear": lambda ours, calls: ours.ff.__setitem__(1, Wrapper(ours.ff[1], calls)),
    "own_forward_of_ff": lambda ours, calls: _replace_forward(ours.ff, calls),
    "own_forward_of_linear": lambda ours, calls: _replace_forward(ours.ff[3], calls),
    "appended": lambda ours, calls: ours.ff.append(Wrapper(nn.Identity(), calls)),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_feed_forward_is_called(change):
    ours = block()
    x, media = inputs_of(FP32, **SHAPES).values()
    before = ours(x, media, locations("ordinary"))
    calls = []
    CHANGES[change](ours, calls)
    after = ours(x, media, locations("ordinary"))
    assert calls == [1]
    torch.testing.assert_close(after, before, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("change", [*CHANGES, "own_forward_of_attn", "wrapped_attn"])
def test_folded_gates_step_aside(change):
    ours = block()
    x, media = inputs_of(FP32, **SHAPES).values()
    ours.fold_gates()
    calls = []
    if change == "own_forward_of_attn":
        _replace_forward(ours.attn, calls)
    elif change == "wrapped_attn":
        ours.attn = Wrapper(ours.attn, calls)
    else:
        CHANGES[change](ours, calls)
    with torch.no_grad():
        folded = ours(x, media, locations("ordinary"))
    assert calls == [1]
    assert torch.equal(folded, ours(x, media, locations("ordinary")))


@pytest.mark.parametrize("where", ["attn.to_kv", "ff.1", "ff.3"])
def test_lora_layers_are_called(where):
    ours = block()
    x, media = inputs_of(FP32, **SHAPES).values()
    parent, _, name = where.rpartition(".")
    parent = ours.get_submodule(parent)
    setattr(parent, name, as_lora(getattr(parent, name)))
    expected = Oracle(ours)(x, media, MediaLayout.from_media_locations(locations("ordinary"), 3))
    out = ours(x, media, locations("ordinary"))
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)


def _of_training(num_media, dtype=BF16):
    """The shape (4, 256, 5) of OpenFlamingo's training, half as wide in everything."""
    x = torch.randn(2, 128, 256, dtype=dtype, requires_grad=True)
    media = torch.randn(2, num_media, 32, 128, dtype=dtype, requires_grad=True)
    where = torch.zeros(2, 128, dtype=torch.bool)
    where[:, :: 128 // num_media + 1] = True
    return x, media, where


def _kept_bytes(module, *arguments):
    return saved_bytes(lambda: module(*arguments), module.parameters())


@every_dtype
def test_memory_kept_for_the_backward(dtype):
    options = {"dim": 256, "dim_visual": 128, "heads": 4, "dim_head": 32}
    ours = randomized(GatedCrossAttentionBlock(**options)).to(dtype)
    peer = randomized(peers.open_flamingo().GatedCrossAttentionBlock(**options)).to(dtype)
    five, ten = _of_training(5, dtype), _of_training(10, dtype)
    kept = _kept_bytes(ours, *five)
    assert sum(kept.values()) <= 0.6 * sum(_kept_bytes(peer, *five).values())
    # Twice the media: only what is of their size grows, not by more than theirs and their k and v.
    itemsize = five[0].element_size()
    media_and_kv = 2 * 5 * 32 * (128 + 2 * 4 * 32) * itemsize
    growth = sum(_kept_bytes(ours, *ten).values()) - sum(kept.values())
    assert growth <= media_and_kv + 4096
    scores = 2 * 128 * 5 * 32 * itemsize
    assert sum(_kept_bytes(peer, *ten).values()) - sum(_kept_bytes(peer, *five).values()) > scores


def test_a_frozen_block_keeps_nothing_for_gradients_of_weights():
    ours = block()
    x, media = inputs_of(FP32, **SHAPES).values()
    trained = _kept_bytes(ours, x, media, locations("ordinary"))
    frozen = ours.requires_grad_(False)
    kept = _kept_bytes(frozen, x, media, locations("ordinary"))
    # The media, attention's output, and what is normed are of weight gradients only.
    assert sum(trained.values()) - sum(kept.values()) >= 4 * (media.numel() + 2 * x.numel())
    assert media.untyped_storage().data_ptr() not in kept


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "media: expected a tensor where media_kv"),
        ({"media": (3, 3, 5, 20)}, "media: expected 2 samples"),
        ({"media": (2, 5, 20)}, "media: expected 2 samples"),
        ({"media": (2, 3, 5, 20), "places": 6}, r"media_locations: .*\(2, 7\).*\(2, 6\)"),
    ],
)
@pytest.mark.parametrize("unattended", [None, "zero_block"])
def test_wrong_arguments_by_name(arguments, message, unattended):
    ours = block(unattended=unattended)
    media = torch.randn(arguments["media"]) if "media" in arguments else None
    where = torch.zeros(2, arguments.get("places", 7), dtype=torch.bool)
    with pytest.raises(ValueError, match=message):
        ours(torch.randn(SHAPES["x"]), media, where)
