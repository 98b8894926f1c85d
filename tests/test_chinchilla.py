"""ChinchillaLM against loops over queries and keys in fp64, and against itself: cached, padded."""

import copy

import pytest
import torch
import torch.nn.functional as F
from chinchilla_cases import (
    CONFIG,
    EPS,
    FP64,
    VOCAB,
    attend,
    embedding_of_distance,
    make_cache,
    make_ids,
    make_lm,
    oracle_attention,
    oracle_lm,
    outputs_and_gradients,
)
from module_cases import BF16, FP32, check, inputs_of, randomized
from torch import nn
from torch._subclasses import FakeTensorMode

from flamingo_fast.models.chinchilla import (
    ChinchillaLayer,
    ChinchillaLM,
    RelativeAttention,
    relative_context,
)
from flamingo_fast.models.config import LanguageModelConfig
from flamingo_fast.testing.inputs import random_tensor


@pytest.mark.parametrize("by_row", [False, True])
@pytest.mark.parametrize("dim", [24, 9])
@pytest.mark.parametrize("length", [1, 2, 5])
def test_attention_is_transformer_xls(length, dim, by_row, monkeypatch):
    """Outputs and all gradients, of each of the two ways to the position scores."""
    monkeypatch.setattr(RelativeAttention, "_is_cheaper_by_row", lambda *_: by_row)
    attn = randomized(RelativeAttention(dim, 2, 8)).double()
    x = random_tensor((2, length, dim), FP64, seed=1)
    ours = outputs_and_gradients(attn, attend, x)
    oracle = outputs_and_gradients(attn, oracle_attention, x)
    for name, expected in oracle.items():
        torch.testing.assert_close(ours[name], expected, rtol=1e-9, atol=1e-11, msg=name)


def test_both_ways_to_position_scores_are_taken():
    """By row for a few new tokens among many, by distance for a whole text; never past a hook."""
    attn = RelativeAttention(24, 2, 8)
    assert attn._is_cheaper_by_row(1, 100, 24)
    assert not attn._is_cheaper_by_row(100, 100, 24)
    calls = []
    attn.to_position.register_forward_hook(lambda *_: calls.append(1))
    assert not attn._is_cheaper_by_row(1, 100, 24)
    attend(attn, torch.randn(1, 1, 24))
    assert calls


def test_adapted_position_projection():
    """A projection of another class, as of LoRA or quantisation, is called, not read."""

    class Doubled(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    lm = make_lm(FP64)
    doubled = copy.deepcopy(lm)
    for layer in doubled.layers:
        layer.self_attn.to_position.weight.data.mul_(2)
    for layer in lm.layers:
        weight = layer.self_attn.to_position.weight
        layer.self_attn.to_position = Doubled(24, 16, bias=False, dtype=FP64)
        layer.self_attn.to_position.weight = weight
    found, expected = [], []
    for each, logits in ((lm, found), (doubled, expected)):
        cache = make_cache("dynamic")
        ids = make_ids(1, 12)
        for part in (ids[:, :11], ids[:, 11:]):
            logits.append(each(part, past_key_values=cache).logits)
    torch.testing.assert_close(torch.cat(found, 1), torch.cat(expected, 1))


def eager_layer(layer, x):
    normed = F.rms_norm(x, x.shape[-1:], layer.norm_attn.weight, EPS)
    x = x + eager_attention(layer.self_attn, normed, relative_context(x).sinusoids)
    norm, up, _, down = layer.mlp
    return x + down(F.gelu(up(F.rms_norm(x, x.shape[-1:], norm.weight, EPS))))


def eager_attention(attn, x, sinusoids):
    """What the paper's appendix B does, with each key's r gathered in place of shifted."""
    length = x.shape[1]
    q, k, v = attn.to_qkv(x).unflatten(-1, (3, attn.heads, -1)).unbind(2)
    r = attn.to_position(sinusoids).unflatten(-1, (attn.heads, -1))
    distances = torch.arange(length)[:, None] - torch.arange(length)
    r = r[length - 1 - distances.clamp(min=-1)]
    content = torch.einsum("bihe,bjhe->bhij", q + attn.content_bias, k)
    position = torch.einsum("bihe,ijhe->bhij", q + attn.position_bias, r)
    scores = (content + position) * attn.dim_head**-0.5
    wide = torch.promote_types(x.dtype, FP32)
    weights = scores.to(wide).masked_fill(distances < 0, float("-inf")).softmax(-1).to(x.dtype)
    return attn.to_out(torch.einsum("bhij,bjhe->bihe", weights, v).flatten(2))


@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
def test_layer_and_gradients(dtype):
    """The three-way rule."""
    layer = randomized(ChinchillaLayer(CONFIG), std=0.2).to(dtype)
    check(layer, layer, inputs_of(dtype, x=(2, 9, 24)), attend, eager_layer)


@pytest.mark.parametrize("side", ["left", "right", "both"])
def test_language_model_with_padding(side):
    lm = make_lm(FP64)
    ids = make_ids(2, 6)
    mask = torch.ones(2, 6, dtype=torch.int64)
    if side != "right":
        mask[0, :2] = 0
    if side != "left":
        mask[1, 4:] = 0
    expected = oracle_lm(lm, lm.model.embed_tokens(ids), mask)
    torch.testing.assert_close(lm(ids, attention_mask=mask).logits, expected)
    embeds = lm.get_input_embeddings()(ids)
    by_embeds = lm(inputs_embeds=embeds, attention_mask=mask.bool()).logits
    torch.testing.assert_close(by_embeds, expected)


def test_gradcheck():
    """Numerical derivatives, through padding."""
    attn = randomized(RelativeAttention(6, 2, 3)).double()
    mask = torch.tensor([[0, 1, 1, 1], [1, 1, 1, 0]])
    x = random_tensor((2, 4, 6), FP64, seed=1, requires_grad=True)
    names, parameters = zip(*attn.named_parameters(), strict=True)

    def call(x, *parameters):
        arguments = (x, relative_context(x, mask))
        return torch.func.functional_call(
            attn, dict(zip(names, parameters, strict=True)), arguments
        )

    assert torch.autograd.gradcheck(call, (x, *parameters))


@pytest.mark.parametrize("dtype", [FP32, FP64, BF16], ids=str)
def test_left_padding_changes_nothing(dtype):
    lm = make_lm(dtype)
    ids = make_ids(1, 6)
    alone = lm(ids).logits
    padded = torch.cat([make_ids(1, 5, seed=3), ids], 1)
    mask = torch.tensor([[0] * 5 + [1] * 6])
    logits = lm(padded, attention_mask=mask).logits
    assert logits.isfinite().all()
    torch.testing.assert_close(logits[:, 5:], alone)


def test_padding_is_finite_with_gradients():
    """Rows of padding alone among them."""
    lm = make_lm()
    mask = torch.ones(3, 7, dtype=torch.bool)
    mask[0] = False
    mask[1, :4] = False
    logits = lm(make_ids(3), attention_mask=mask).logits
    assert logits.isfinite().all()
    logits[mask].square().sum().backward()
    for name, parameter in lm.named_parameters():
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.any(), name


@pytest.mark.parametrize("kind", ["dynamic", "static"])
@pytest.mark.parametrize("chunks", [[1] * 9, [5, 1, 1, 1, 1], [4, 3, 2]], ids=str)
def test_cached_decoding(chunks, kind):
    """Logits of a batch, padded on the left, in parts: those of the whole text."""
    lm = make_lm()
    ids = make_ids(3, 9)
    mask = torch.ones(3, 9, dtype=torch.int64)
    mask[0, :3] = 0
    mask[2, :1] = 0
    expected = lm(ids, attention_mask=mask).logits
    cache = make_cache(kind)
    found, end = [], 0
    for number in chunks:
        end += number
        out = lm(ids[:, end - number : end], attention_mask=mask[:, :end], past_key_values=cache)
        assert out.past_key_values is cache
        found.append(out.logits)
    real = mask.bool()
    torch.testing.assert_close(torch.cat(found, 1)[real], expected[real], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_cached_decoding_without_a_mask(kind):
    lm = make_lm()
    ids = make_ids(2, 6)
    cache = make_cache(kind, length=6)
    found = [lm(ids[:, :3], past_key_values=cache).logits]
    found += [lm(ids[:, i : i + 1], past_key_values=cache).logits for i in range(3, 6)]
    torch.testing.assert_close(torch.cat(found, 1), lm(ids).logits, rtol=1e-4, atol=1e-5)


def test_static_cache_with_a_mask_of_its_length():
    """One shape for all steps, as a CUDA graph needs."""
    lm = make_lm()
    ids = make_ids(2, 6)
    mask = torch.ones(2, 10, dtype=torch.bool)
    mask[0, :2] = False
    cache = make_cache("static", length=10)
    found = [
        lm(ids[:, i : i + 1], attention_mask=mask, past_key_values=cache).logits for i in range(6)
    ]
    expected = lm(ids, attention_mask=mask[:, :6]).logits
    found = torch.cat(found, 1)
    torch.testing.assert_close(found[mask[:, :6]], expected[mask[:, :6]], rtol=1e-4, atol=1e-5)


def test_transformers_static_cache():
    transformers = pytest.importorskip("transformers")
    lm = make_lm()
    sizes = {"num_hidden_layers": CONFIG.depth, "num_attention_heads": CONFIG.heads}
    config = transformers.LlamaConfig(hidden_size=16, **sizes)
    cache = transformers.StaticCache(config=config, max_cache_len=8)
    ids = make_ids(1, 4)
    found = [lm(part, past_key_values=cache).logits for part in (ids[:, :3], ids[:, 3:])]
    torch.testing.assert_close(torch.cat(found, 1), lm(ids).logits, rtol=1e-4, atol=1e-5)


def test_use_cache_makes_one():
    pytest.importorskip("transformers")
    lm = make_lm()
    ids = make_ids(2, 5)
    assert lm(ids).past_key_values is None
    first = lm(ids[:, :4], use_cache=True)
    assert first.past_key_values.get_seq_length() == 4
    last = lm(ids[:, 4:], past_key_values=first.past_key_values).logits
    torch.testing.assert_close(last, lm(ids).logits[:, 4:], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_beams(kind):
    """After `reorder_cache` each row goes on from the row it was taken from."""
    lm = make_lm()
    ids = make_ids(3, 5)
    cache = make_cache(kind)
    lm(ids, past_key_values=cache)
    beams = torch.tensor([2, 0, 0])
    cache.reorder_cache(beams)
    last = make_ids(3, 1, seed=5)
    expected = lm(torch.cat([ids[beams], last], 1)).logits[:, -1:]
    found = lm(last, past_key_values=cache).logits
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_layers_of_their_own_stack():
    """As grafting has them: after a language model's, in its cache."""
    lm = make_lm()
    depth = CONFIG.depth
    stack = [randomized(ChinchillaLayer(CONFIG, depth + i), seed=i) for i in range(2)]
    ids = make_ids(2, 6)

    def run(ids, cache=None):
        hidden = lm.base_model(ids, past_key_values=cache).last_hidden_state
        context = relative_context(hidden, None, cache, layer_idx=depth)
        for layer in stack:
            hidden = layer(hidden, context)
        return hidden

    cache = make_cache("dynamic")
    found = torch.cat([run(ids[:, :4], cache), run(ids[:, 4:5], cache), run(ids[:, 5:], cache)], 1)
    torch.testing.assert_close(found, run(ids), rtol=1e-4, atol=1e-5)
    assert len(cache.layers) == depth + 2


@pytest.mark.parametrize(
    ("config", "millions"),
    [
        (LanguageModelConfig(), "1374.8"),
        (LanguageModelConfig(dim=4096, depth=32, heads=32), "7112.1"),
        (LanguageModelConfig(dim=8192, depth=80, heads=64), "70063.9"),
    ],
    ids=["1.4B", "7.1B", "70B"],
)
def test_parameter_counts(config, millions):
    """Those of Chinchilla's table A9 by the recipe that fits all of its rows."""
    lm = ChinchillaLM(config, device="meta")
    assert all(each.is_meta for each in lm.parameters())
    count = sum(each.numel() for each in lm.parameters())
    dim = config.dim
    # The feed-forward's 8 D^2 + 5 D, q, k, v and o, r; u and v, two norms.
    per_layer = 8 * dim**2 + 5 * dim + 4 * (dim**2 + dim) + dim**2 + 2 * dim + 2 * dim
    assert count == config.depth * per_layer + config.vocab_size * dim + dim
    assert f"{count / 1e6:.1f}" == millions


def test_meta_forward():
    lm = ChinchillaLM(CONFIG, device="meta")
    logits = lm(torch.zeros(2, 5, dtype=torch.int64, device="meta")).logits
    assert logits.is_meta and logits.shape == (2, 5, VOCAB)


def test_made_on_the_current_defaults():
    with torch.device("meta"):
        assert ChinchillaLayer(CONFIG).mlp[1].weight.is_meta
        assert ChinchillaLM(CONFIG).model.norm.weight.is_meta
    lm = ChinchillaLM(CONFIG, dtype=BF16)
    assert {each.dtype for each in lm.parameters()} == {BF16}
    assert not any(each.is_meta for each in lm.parameters())


def test_initialisation():
    """Nothing is left as the memory was; what is added to a residual is scaled by the depth."""
    config = LanguageModelConfig(vocab_size=99, dim=128, depth=8, heads=4, dim_head=32)
    torch.manual_seed(0)
    lm = ChinchillaLM(config)
    for name, parameter in lm.named_parameters():
        is_norm = "norm" in name or name.endswith("mlp.0.weight")
        if is_norm:
            assert (parameter == 1).all(), name
        elif name.endswith(".bias"):
            assert (parameter == 0).all(), name
        else:
            is_last = name.endswith(("to_out.weight", "mlp.3.weight"))
            expected = 0.02 / 4 if is_last else 0.02
            assert parameter.std().item() == pytest.approx(expected, rel=0.2), name


def test_output_embedding_is_the_inputs():
    lm = make_lm()
    head = lm.get_output_embeddings()
    assert head.weight is lm.get_input_embeddings().weight
    assert [name for name in lm.state_dict() if "embed" in name or "head" in name] == [
        "model.embed_tokens.weight"
    ]
    twin = copy.deepcopy(lm)
    assert twin.lm_head.weight is twin.model.embed_tokens.weight is not head.weight
    empty = ChinchillaLM(CONFIG, device="meta").to_empty(device=head.weight.device)
    empty.load_state_dict(lm.state_dict())
    ids = make_ids()
    assert torch.equal(empty(ids).logits, lm(ids).logits)
    assert torch.equal(head(lm.base_model(ids).last_hidden_state), lm(ids).logits)


def test_logits_to_keep():
    lm = make_lm()
    ids = make_ids(2, 5)
    logits = lm(ids).logits
    assert logits.shape == (2, 5, VOCAB)
    torch.testing.assert_close(lm(ids, logits_to_keep=2).logits, logits[:, 3:])
    assert lm(ids, logits_to_keep=9).logits.shape == logits.shape


def test_bf16():
    """As far from fp64 as the rounding of its weights and of what passes between layers."""
    lm = make_lm()
    ids = make_ids(2, 9)
    exact = copy.deepcopy(lm).to(BF16).double()(ids).logits
    logits = copy.deepcopy(lm).to(BF16)(ids).logits
    assert logits.dtype == BF16 and logits.isfinite().all()
    error = (logits.double() - exact).square().mean().sqrt() / exact.square().mean().sqrt()
    assert error < 2 * CONFIG.depth * torch.finfo(BF16).eps
    with torch.autocast(ids.device.type, BF16):
        mixed = lm(ids).logits
    assert mixed.dtype == BF16
    torch.testing.assert_close(mixed.float(), lm(ids).logits, rtol=0.05, atol=0.05)


def test_distant_positions_in_bf16():
    """Sinusoids are of exact distances, which bf16 could not count."""
    sinusoids = relative_context(torch.empty(1, 3000, 8, dtype=BF16)).sinusoids
    expected = torch.stack([embedding_of_distance(d, 8) for d in (2999, 2998, 0, -1)])
    found = sinusoids[[0, 1, 2999, 3000]].double()
    torch.testing.assert_close(found, expected, rtol=0, atol=4e-3)


@pytest.mark.parametrize("with_mask", [False, True])
def test_compile(with_mask):
    layer = randomized(ChinchillaLayer(CONFIG), std=0.2)
    mask = torch.tensor([[0, 0, 1, 1, 1, 1], [1] * 6]) if with_mask else None
    x = random_tensor((2, 6, 24), seed=1)

    def call(layer, x):
        return layer(x, relative_context(x, mask))

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    expected = outputs_and_gradients(layer, call, x)
    found = outputs_and_gradients(layer, compiled, x)
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], msg=name)


def test_compile_a_layer_given_a_context():
    layer = randomized(ChinchillaLayer(CONFIG), std=0.2)
    x = random_tensor((2, 6, 24), seed=1)
    context = relative_context(x)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, context), layer(x, context))


def test_compile_decoding_with_a_static_cache():
    """One graph for every step: nothing depends on how many tokens there are."""
    lm = make_lm()
    ids = make_ids(1, 7)
    cache = make_cache("static", length=8)
    torch._dynamo.reset()
    graphs = []

    def backend(graph, _):
        graphs.append(graph)
        return graph

    step = torch.compile(
        lambda ids: lm(ids, past_key_values=cache).logits, fullgraph=True, backend=backend
    )
    with torch.no_grad():
        found = [lm(ids[:, :3], past_key_values=cache).logits]
        found += [step(ids[:, i : i + 1]) for i in range(3, 7)]
        torch.testing.assert_close(torch.cat(found, 1), lm(ids).logits, rtol=1e-4, atol=1e-5)
    assert len(graphs) == 1


def test_checkpointing():
    """Same gradients, and layers run again; what hooks put before a layer too."""
    lm = make_lm()
    counts = [0] * CONFIG.depth

    def counting(index):
        def hook(layer, args):
            counts[index] += 1
            return (2 * args[0], *args[1:])

        return hook

    for index, layer in enumerate(lm.layers):
        layer.register_forward_pre_hook(counting(index))
    embeds = random_tensor((2, 6, 24), seed=1)

    def call(lm, x):
        return lm(inputs_embeds=x).logits

    expected = outputs_and_gradients(lm, call, embeds)
    assert counts == [1] * CONFIG.depth
    lm.model.checkpoint_layers = True
    found = outputs_and_gradients(lm, call, embeds)
    assert counts == [3] * CONFIG.depth
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], msg=name)
    with torch.no_grad():
        call(lm, embeds)
    assert counts == [4] * CONFIG.depth


def test_checkpointing_leaves_calls_with_a_cache():
    lm = make_lm()
    lm.model.checkpoint_layers = True
    ids = make_ids(1, 5)
    cache = make_cache("dynamic")
    lm(ids, past_key_values=cache).logits.sum().backward()
    assert cache.get_seq_length() == 5


def test_frozen_layers_pass_gradients():
    """To what comes before, as to gated blocks below."""
    lm = make_lm().requires_grad_(False)
    embeds = random_tensor((1, 4, 24), seed=1, requires_grad=True)
    lm(inputs_embeds=embeds).logits.sum().backward()
    assert embeds.grad.abs().sum(-1).all()
    assert all(each.grad is None for each in lm.parameters())


def test_one_token_and_no_rows():
    lm = make_lm(FP64)
    ids = make_ids(1, 1)
    torch.testing.assert_close(lm(ids).logits, oracle_lm(lm, lm.model.embed_tokens(ids)))
    for length in (1, 4):
        none = torch.zeros(0, length, dtype=torch.int64)
        assert lm(none).logits.shape == (0, length, VOCAB)
        assert lm(none, attention_mask=none).logits.shape == (0, length, VOCAB)


@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_no_values_are_read(kind):
    """FakeTensors have none: a host sync would fail."""
    with FakeTensorMode():
        lm = ChinchillaLM(CONFIG)
        cache = make_cache(kind)
        for new, total in ((5, 5), (1, 6)):
            ids = torch.zeros(2, new, dtype=torch.int64)
            mask = torch.ones(2, total, dtype=torch.int64)
            out = lm(ids, attention_mask=mask, past_key_values=cache)
            assert out.logits.shape == (2, new, VOCAB)


def test_errors():
    lm = make_lm()
    ids = make_ids(2, 5)
    embeds = lm.get_input_embeddings()(ids)
    with pytest.raises(ValueError, match="input_ids: expected either .* got neither"):
        lm()
    with pytest.raises(ValueError, match="input_ids: expected either .* got both"):
        lm(ids, inputs_embeds=embeds)
    with pytest.raises(ValueError, match=r"input_ids: expected shape \(B, L\), got \(5,\)"):
        lm(ids[0])
    with pytest.raises(ValueError, match=r"inputs_embeds: .*\(B, L, 24\), got \(2, 5, 23\)"):
        lm(inputs_embeds=embeds[..., 1:])
    with pytest.raises(ValueError, match="logits_to_keep: expected at least 0, got -1"):
        lm(ids, logits_to_keep=-1)
    with pytest.raises(IndexError):
        lm(torch.full((1, 1), VOCAB))


@pytest.mark.parametrize("shape", [(2, 4), (2, 6), (1, 5), (5,), (2, 1, 5, 5)], ids=str)
def test_mask_of_a_wrong_shape(shape):
    lm = make_lm()
    with pytest.raises(ValueError, match=r"attention_mask: expected shape \(2, 5\); got"):
        lm(make_ids(2, 5), attention_mask=torch.ones(shape))


def test_mask_of_new_tokens_alone():
    """It must be of all tokens, those in the cache too."""
    lm = make_lm()
    cache = make_cache("dynamic")
    lm(make_ids(2, 3), past_key_values=cache)
    with pytest.raises(ValueError, match=r"attention_mask: expected shape \(2, 4\); got \(2, 1\)"):
        lm(make_ids(2, 1), attention_mask=torch.ones(2, 1), past_key_values=cache)


def test_sliding_windows():
    cache_utils = pytest.importorskip("transformers.cache_utils")
    layers = [cache_utils.DynamicSlidingWindowLayer(4) for _ in range(CONFIG.depth)]
    cache = cache_utils.Cache(layers=layers)
    with pytest.raises(ValueError, match="past_key_values: .*DynamicSlidingWindowLayer"):
        make_lm()(make_ids(), past_key_values=cache)


def test_mask_longer_than_a_static_cache():
    with pytest.raises(ValueError, match=r"\(2, 8\) or less, all tokens so far; got \(2, 9\)"):
        cache = make_cache("static", length=8)
        make_lm()(make_ids(2, 3), attention_mask=torch.ones(2, 9), past_key_values=cache)
