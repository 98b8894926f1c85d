"""The whole model: where media come in, what is encoded, what is learnt, and what is refused."""

import collections
import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from model_cases import FAMILIES, IMAGE, flamingo, hf_model, open_gates, stub_encoder, tiny_config
from torch import nn
from torch._subclasses import FakeTensorMode

from flamingo_fast.models.conditioning import find_layers
from flamingo_fast.models.config import ConditioningConfig, ConfigError, LanguageModelConfig
from flamingo_fast.models.flamingo import Flamingo
from flamingo_fast.modules import PerceiverResampler

KINDS = ["gated_xattn_dense", "vanilla_xattn", "grafting"]
GATED = KINDS[:2]


def text(*rows):
    return torch.tensor(rows)


IDS = text([5, IMAGE, 7, 8, IMAGE, 9, 10], [6, 7, 8, IMAGE, 9, 11, 12])


def images(*shape, seed=0):
    return torch.randn(*shape, 3, 8, 8, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("kind", GATED)
@pytest.mark.parametrize("family", [*FAMILIES, "chinchilla"])
@torch.no_grad()
def test_with_closed_gates_it_is_the_language_model(family, kind):
    if (family, kind) == ("gpt_neox", "vanilla_xattn"):
        model = flamingo("gpt_neox", kind, use_parallel_residual=False)
    else:
        model = flamingo(family, kind)
    alone = copy.deepcopy(model.lang_model)
    expected = alone(input_ids=IDS).logits
    assert torch.equal(model(IDS, images(2, 2)).logits, expected)
    open_gates(model)
    moved, others = (model(IDS, images(2, 2, seed=seed)).logits for seed in (0, 1))
    # What comes before the first image sees none.
    assert torch.equal(moved[0, 0], others[0, 0])
    assert not torch.equal(moved[0, 1], others[0, 1])
    assert not torch.equal(moved[0, 1], expected[0, 1])


@pytest.mark.parametrize("family", FAMILIES)
def test_the_language_model_stays_itself(family):
    """Its keys, its outputs on its own, and its own generate, with media and without."""
    lang_model = hf_model(family)
    keys = list(lang_model.state_dict())
    prompt = IDS[:1]
    options = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
    options |= {"pad_token_id": 0, "suppress_tokens": [IMAGE]}
    before = lang_model.generate(prompt, **options)
    model = open_gates(flamingo(lang_model=lang_model))
    assert list(lang_model.state_dict()) == keys
    assert torch.equal(lang_model.generate(prompt, **options), before)
    with model.conditioned(prompt, images(1, 2)) as conditioned:
        assert conditioned is lang_model
        greedy = lang_model.generate(prompt, **options)
        beams = lang_model.generate(prompt, num_beams=3, **options)
    tokens = prompt
    for _ in range(4):
        logits = model(tokens, images(1, 2)).logits[:, -1]
        logits[:, [IMAGE, lang_model.config.eos_token_id]] = -torch.inf
        tokens = torch.cat([tokens, logits.argmax(-1, keepdim=True)], 1)
    assert torch.equal(greedy, tokens)
    assert beams.shape == greedy.shape
    assert torch.equal(lang_model.generate(prompt, **options), before)


def test_beams_of_the_language_models_own_generate_see_their_sample():
    """Rows in turn of one sample: as if each had its own copy of the media."""
    model = open_gates(flamingo("llama"))
    ids = IDS.repeat_interleave(3, 0)
    with model.conditioned(IDS, images(2, 2)) as lang_model:
        found = lang_model(input_ids=ids).logits
    pixels = images(2, 2).repeat_interleave(3, 0)
    torch.testing.assert_close(found, model(ids, pixels).logits, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("every", [1, 2, "single_in_middle"])
def test_where_blocks_are(kind, every):
    model = flamingo("chinchilla", kind, every=every, num_layers=3)
    indices = {1: (0, 1, 2, 3), 2: (0, 2), "single_in_middle": (2,)}[every]
    if kind == "grafting":
        assert len(model.conditioning.blocks) == len(model.conditioning.layers) == 3
        assert model.conditioning.layer_indices == ()
    else:
        assert model.conditioning.layer_indices == indices
        assert len(model.conditioning.blocks) == len(indices)


@pytest.mark.parametrize("kind", KINDS)
def test_by_hand(kind):
    """Layer by layer, from the language model's own parts."""
    model = open_gates(flamingo("chinchilla", kind, every=2)).double()
    lang_model, blocks = model.lang_model, model.conditioning.blocks
    pixels = images(2, 2).double()
    latents = [model.resampler(model.vision_encoder(row)[None, :, None])[0] for row in pixels]
    latents = torch.stack(latents)
    locations = IDS == IMAGE
    from flamingo_fast.models.chinchilla import relative_context

    hidden = lang_model.model.embed_tokens(IDS)
    context = relative_context(hidden)
    for index, layer in enumerate(lang_model.layers):
        block = blocks[index // 2] if kind != "grafting" and index % 2 == 0 else None
        if block is None:
            hidden = layer(hidden, context)
        elif kind == "gated_xattn_dense":
            hidden = layer(block(hidden, latents, locations), context)
        else:
            hidden = hidden + layer.self_attn(layer.norm_attn(hidden), context)
            hidden = block(hidden, latents, locations)
            hidden = hidden + layer.mlp(hidden)
    hidden = lang_model.model.norm(hidden)
    if kind == "grafting":
        for layer, block in zip(model.conditioning.layers, blocks, strict=True):
            hidden = block(layer(hidden, context), latents, locations)
    torch.testing.assert_close(model(IDS, pixels).logits, hidden @ lang_model.lm_head.weight.T)


class _Counting(nn.Module):
    def __init__(self):
        super().__init__()
        self.projection = nn.Linear(3 * 8 * 8, 4 * 12)
        self.images = 0

    def forward(self, x):
        self.images += len(x)
        return self.projection(x.flatten(1)).unflatten(1, (4, 12))


def test_only_real_media_are_encoded():
    counting = _Counting()
    model = open_gates(flamingo("llama", encoder=counting))
    ids = text([5, IMAGE, 7, 8], [6, 7, 8, 9])
    padded = images(2, 5)
    out = model(ids, padded).logits
    assert counting.images == 1
    assert torch.equal(out, model(ids, [[padded[0, 0]], []]).logits)
    torch.testing.assert_close(out[1:], model(ids[1:]).logits, rtol=1e-4, atol=1e-5)


def test_forms_of_media():
    model = open_gates(flamingo("llama"))
    pixels = images(2, 2)
    expected = model(IDS, pixels).logits
    flat = torch.cat([pixels[0], pixels[1, :1]])
    for form in (flat, [[*pixels[0]], [pixels[1, 0]]]):
        assert torch.equal(model(IDS, form).logits, expected)
    assert torch.equal(model(IDS, flat, num_media=[2, 1]).logits, expected)
    assert torch.equal(model(IDS, videos=pixels[:, :, None]).logits, expected)
    media, seqlens = model.encode(flat[:, None])
    assert seqlens is None
    assert torch.equal(model(IDS, media=media).logits, expected)
    assert torch.equal(model(IDS, media=(media, None)).logits, expected)


def test_text_without_media_as_lists_on_a_gpu():
    with FakeTensorMode(), torch.no_grad():
        with torch.device("cuda"):
            model, ids = flamingo("chinchilla"), torch.ones(1, 5, dtype=torch.int64)
        encoded, _ = model.encode([])
        assert (encoded.shape, encoded.device.type) == ((0, 3, 16), "cuda")
        logits = model(ids, [[]], num_media=[0]).logits
        assert (logits.shape, logits.device.type) == ((1, 5, 40), "cuda")


@pytest.mark.parametrize("resampler", ["perceiver", "mlp", "transformer"])
def test_videos_of_any_number_of_frames(resampler):
    model = open_gates(flamingo("llama", resampler={"kind": resampler, "max_num_frames": 4}))
    videos = [[images(3, seed=1), images(2, seed=2)], [images(5, seed=3)]]
    out = model(IDS, videos=videos).logits
    for row in range(2):
        alone = model(IDS[row : row + 1], videos=videos[row : row + 1]).logits
        torch.testing.assert_close(out[row : row + 1], alone, rtol=1e-4, atol=1e-5)
    encoded = model.encode([video for row in videos for video in row], [2, 1])
    assert torch.equal(model(IDS, media=encoded).logits, out)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("family", [*FAMILIES, "chinchilla"])
@torch.no_grad()
def test_padding_changes_nothing(family, side):
    model = open_gates(flamingo(family))
    row = IDS[:1]
    expected = model(row, images(1, 2)).logits
    padding, mask = row.new_zeros(1, 3), torch.ones_like(row)
    order = (padding, row) if side == "left" else (row, padding)
    masks = (torch.zeros_like(padding), mask) if side == "left" else (mask, padding)
    out = model(torch.cat(order, 1), images(1, 2), attention_mask=torch.cat(masks, 1)).logits
    real = out[:, 3:] if side == "left" else out[:, :7]
    torch.testing.assert_close(real, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", ["gpt2", "chinchilla"])
def test_loss_and_gradients(family, kind):
    """Of cross entropy over all logits; and of activation checkpointing."""
    model = open_gates(flamingo(family, kind)).train()
    labels = IDS.clone()
    labels[0, 4:] = -100

    def gradients():
        model.zero_grad()
        loss = model(IDS, images(2, 2), labels=labels).loss
        loss.backward()
        found = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
        return loss.detach(), found

    loss, found = gradients()
    assert not any(p.requires_grad for p in model.lang_model.parameters())
    assert not any(p.requires_grad for p in model.vision_encoder.parameters())
    assert all(gradient is not None for gradient in found.values())
    model.zero_grad()
    logits = model(IDS, images(2, 2)).logits[:, :-1].flatten(0, 1)
    plain = F.cross_entropy(logits, labels[:, 1:].flatten())
    torch.testing.assert_close(loss, plain.detach())
    plain.backward()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(found[name], parameter.grad, rtol=1e-3, atol=1e-6)
    runs = _runs_of_layers(model)
    gradients()
    assert set(runs.values()) == {1}
    runs.clear()
    model.checkpoint()
    again, checkpointed = gradients()
    assert torch.equal(again, loss)
    for name, gradient in checkpointed.items():
        assert torch.equal(gradient, found[name]), name
    # Of grafting nothing in the language model gets a gradient, or has anything to keep.
    assert {name: count for name, count in runs.items() if count != 2} == (
        {"lang_model": 1} if kind == "grafting" else {}
    )
    model.checkpoint(False)
    runs.clear()
    gradients()
    assert set(runs.values()) == {1}


def _runs_of_layers(model):
    """How often the attention of the last layer of each kind is called."""
    runs = collections.Counter()
    last = {
        "lang_model": find_layers(model.lang_model)[-1],
        "blocks": model.conditioning.blocks[-1],
    }
    if len(model.conditioning.layers):
        last["layers"] = model.conditioning.layers[-1]
    for name, layer in last.items():
        attention = layer.self_attn if hasattr(layer, "self_attn") else layer.attn
        attention.register_forward_hook(lambda *_, name=name: runs.update([name]))
    return runs


@pytest.mark.parametrize("kind", KINDS)
def test_a_checkpointed_frozen_language_model_keeps_no_graph_before_the_first_block(kind):
    """And generates from its cache, and can be pickled."""
    model = open_gates(flamingo("gpt2", kind, every="single_in_middle")).train()
    model.checkpoint()
    embedded = []
    layers = find_layers(model.lang_model)

    def see(layer, args, output):
        # Layers of transformers 4 return tuples.
        hidden = output[0] if isinstance(output, tuple) else output
        embedded.append(hidden.requires_grad)

    handle = layers[1].register_forward_hook(see)
    model(IDS, images(2, 2), labels=IDS).loss.backward()
    handle.remove()
    assert embedded == [False]
    assert not any(each.training for each in layers[0].children())
    expected = copy.deepcopy(model).eval().generate(IDS, images(2, 2), max_new_tokens=3)
    found = pickle.loads(pickle.dumps(model)).generate(IDS, images(2, 2), max_new_tokens=3)
    assert torch.equal(found.sequences, expected.sequences)


def test_checkpoints_of_two_passes_see_their_own_media():
    model = open_gates(flamingo("gpt2")).train()
    first, second = images(2, 2), images(2, 2, seed=5)

    def gradients():
        model.zero_grad()
        loss = model(IDS, first, labels=IDS).loss + 2 * model(IDS, second, labels=IDS).loss
        loss.backward()
        return [p.grad for p in model.parameters() if p.requires_grad]

    expected = gradients()
    model.checkpoint()
    for found, gradient in zip(gradients(), expected, strict=True):
        assert torch.equal(found, gradient)


def test_learnt_tokens_beside_a_frozen_vocabulary():
    """One in it, two after it: rows of their own in embedding and logits, and their gradients."""
    model = open_gates(flamingo("llama", learnt_token_ids=(4, 40, 41), eoc_token_id=40)).train()
    weight = model.lang_model.get_input_embeddings().weight
    head = model.lang_model.get_output_embeddings().weight
    for rows, vocabulary in ((model.tokens.weight, weight), (model.tokens.head_weight, head)):
        assert torch.equal(rows[0], vocabulary[4])
        torch.testing.assert_close(rows[1], vocabulary.mean(0))
    # Nothing has been learnt yet: it is the language model, with a column for each new token.
    ids = text([5, 4, 9])
    expected = model.lang_model(input_ids=ids).logits
    closed = flamingo("llama", learnt_token_ids=(4, 40, 41), eoc_token_id=40)
    torch.testing.assert_close(closed(ids).logits[..., :40], expected)
    with torch.no_grad():
        for seed, rows in enumerate(model.tokens.parameters()):
            rows.normal_(generator=torch.Generator().manual_seed(seed))
    ids = text([5, IMAGE, 40, 4, 41, 9])
    out = model(ids, images(1, 1), labels=ids, return_logits=True)
    assert out.logits.shape[-1] == model.num_tokens == 42
    extended = copy.deepcopy(model.lang_model)
    extended.resize_token_embeddings(42, mean_resizing=False)
    with torch.no_grad():
        extended.get_input_embeddings().weight[[4, 40, 41]] = model.tokens.weight
        extended.get_output_embeddings().weight[[4, 40, 41]] = model.tokens.head_weight
    extended_model = open_gates(flamingo(lang_model=extended, eoc_token_id=40))
    for name in ("resampler", "conditioning"):
        getattr(extended_model, name).load_state_dict(getattr(model, name).state_dict())
    expected = extended_model(ids, images(1, 1), labels=ids, return_logits=True)
    torch.testing.assert_close(out.logits, expected.logits, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(out.loss, expected.loss)
    out.loss.backward()
    for rows in model.tokens.parameters():
        assert (rows.grad != 0).any(-1).all()
    assert weight.grad is None


@torch.no_grad()
def test_quantised_weights():
    quantised = torch.ao.quantization.quantize_dynamic(hf_model("llama"), {nn.Linear}, torch.qint8)
    model = flamingo(lang_model=quantised)
    expected = quantised(input_ids=IDS).logits
    assert torch.equal(model(IDS, images(2, 2)).logits, expected)
    loss = model(IDS, images(2, 2), labels=IDS).loss
    plain = F.cross_entropy(expected[:, :-1].flatten(0, 1), IDS[:, 1:].flatten())
    torch.testing.assert_close(loss, plain)
    open_gates(model)
    moved = model(IDS, images(2, 2)).logits
    assert not torch.equal(moved[:, -1], expected[:, -1])
    first = moved[:, -1].index_fill(-1, text(IMAGE), -torch.inf).argmax(-1)
    generated = model.generate(IDS, images(2, 2), max_new_tokens=3, stop_token_ids=()).sequences
    assert torch.equal(generated[:, 0], first)


@torch.no_grad()
def test_bf16():
    model = open_gates(flamingo("llama"))
    expected = model(IDS, images(2, 2)).logits
    found = model.to(torch.bfloat16)(IDS, images(2, 2)).logits
    assert found.dtype == torch.bfloat16
    assert (found.float() - expected).norm() < 0.05 * expected.norm()


def test_frozen_parts_stay_in_eval_mode():
    model = flamingo("gpt2").train()
    assert model.resampler.training
    assert not model.lang_model.training and not model.vision_encoder.model.training


def test_an_unfrozen_language_model_learns():
    model = open_gates(flamingo("chinchilla", lm={"is_frozen": False})).train()
    model(IDS, images(2, 2), labels=IDS).loss.backward()
    assert all(p.grad is not None for p in model.lang_model.parameters())
    assert model.lang_model.training


def test_media_wider_than_what_the_resampler_makes():
    model = flamingo("llama", dim_media=40)
    media, _ = model.encode(images(2, 1))
    assert media.shape == (2, 3, 40)
    assert torch.equal(media[..., 16:32], media[..., :16])
    assert torch.equal(media[..., 32:], media[..., :8])


def test_places_of_media_have_embeddings():
    model = flamingo("llama", resampler={"max_num_media": 3})
    assert isinstance(model.resampler, PerceiverResampler)
    media, _ = model.encode(images(3, 1), [2, 1])
    alone, _ = model.encode(images(3, 1)[2:], [1])
    torch.testing.assert_close(media[2:], alone)
    with pytest.raises(ValueError, match="num_media: expected the numbers of 3 media"):
        model.encode(images(3, 1))
    with pytest.raises(ValueError, match=r"num_media: .*max_num_media = 3 in a row, got \[0, 4\]"):
        model(text([5] * 4, [IMAGE] * 4), images(4))


ERRORS = {
    "more tokens than images": (
        lambda m: m(IDS, images(2, 1)),
        "images: row 0 has 2 image tokens and 1 images",
    ),
    "tokens without images": (lambda m: m(IDS), "images: row 0 has 2 image tokens and 0 images"),
    "lists of other lengths": (
        lambda m: m(IDS, [[images()], [images()]]),
        "images: row 0 has 2 image tokens and 1 images",
    ),
    "lists for other rows": (lambda m: m(IDS, [[images()]]), "images: expected a list for each"),
    "flat images of another number": (lambda m: m(IDS, images(4)), "images: expected 3 of them"),
    "both": (lambda m: m(IDS, images(2, 2), images(2, 2, 1)), "images, videos: expected one"),
    "num_media": (
        lambda m: m(IDS, images(3), num_media=[3]),
        r"num_media: expected 2 numbers, got \[3\]",
    ),
    "shape": (lambda m: m(IDS, images(1, 1, 1)), "images: expected shape"),
    "frames": (lambda m: m(IDS, [[images(2)] * 2, [images(2)]]), r"expected tensors of shape \(3"),
    "ids": (lambda m: m(IDS.float(), images(2, 2)), "input_ids: expected integers"),
    "mask": (
        lambda m: m(IDS, images(2, 2), attention_mask=torch.ones(2, 3)),
        "attention_mask: expected input_ids' shape",
    ),
    "labels": (lambda m: m(IDS, images(2, 2), labels=IDS[0]), "labels: expected input_ids' shape"),
    "locations": (
        lambda m: m(IDS, images(2, 2), media_locations=torch.ones(2, 7)),
        "media_locations: expected bool",
    ),
    "id after the vocabulary": (
        lambda m: m(text([5, 40])),
        "input_ids: expected ids of 40 tokens, got 40",
    ),
    "negative id": (lambda m: m(text([5, -1])), "input_ids: expected ids of 40 tokens, got -1"),
    "images of two sizes": (
        lambda m: m(IDS, [[images(), torch.zeros(3, 4, 4)], [images()]]),
        r"images: expected images of one size, got \(3, 8, 8\) and \(3, 4, 4\)",
    ),
    "video without frames": (
        lambda m: m(IDS, videos=[[images(0)] * 2, [images(1)]]),
        r"videos: expected tensors of shape \(F, 3, H, W\), got one of \(0, 3, 8, 8\)",
    ),
    "bytes": (
        lambda m: m(IDS, torch.zeros(2, 2, 3, 8, 8, dtype=torch.uint8)),
        "expected normalised ones of a floating point dtype",
    ),
    "media that are no tensor": (
        lambda m: m(IDS, media=[torch.zeros(3, 16)] * 3),
        "media: expected a tensor or the pair that encode returned, got list",
    ),
    "negative logits_to_keep": (
        lambda m: m(IDS, images(2, 2), logits_to_keep=-1),
        "logits_to_keep: expected at least 0, got -1",
    ),
    "gradients with a cache": (
        lambda m: m(IDS, images(2, 2), cache=m.new_cache(2)),
        "cache: expected no gradients",
    ),
}


@pytest.mark.parametrize(("call", "message"), ERRORS.values(), ids=ERRORS.keys())
def test_wrong_inputs(call, message):
    with pytest.raises((TypeError, ValueError), match=message):
        call(flamingo("llama"))


@torch.no_grad()
def test_more_tokens_than_the_language_model_has_positions():
    model, ids = flamingo("gpt2", n_positions=8), IDS[:1, 2:4]
    model.generate(ids, max_new_tokens=7, stop_token_ids=(), return_cache=False)
    with pytest.raises(ValueError, match="max_new_tokens: expected rows of at most 8 tokens, .* 9"):
        model.generate(ids, max_new_tokens=7, stop_token_ids=())
    with pytest.raises(ValueError, match="input_ids: expected rows of at most 8 tokens, .* 10"):
        model(ids.repeat(1, 5))
    assert flamingo("llama").max_tokens is flamingo("chinchilla").max_tokens is None


def test_parts_that_do_not_fit():
    with pytest.raises(ConfigError, match="LlamaDecoderLayer, .*; got PhiDecoderLayer"):
        flamingo("phi", "vanilla_xattn")
    with pytest.raises(ConfigError, match="GPT2Model has no output embeddings"):
        flamingo(lang_model=hf_model("gpt2").transformer)
    with pytest.raises(ConfigError, match="learnt_token_ids: expected ids after the vocabulary"):
        flamingo("phi", learnt_token_ids=(4,))
    with pytest.raises(ConfigError, match="expected a language model with an nn.Embedding"):
        flamingo("gemma3_text", learnt_token_ids=(4,))
    config = tiny_config(lm=LanguageModelConfig(kind="huggingface", hf_config={"n_layer": 1}))
    with pytest.raises(ConfigError, match="lm.hf_config: expected the config of a model"):
        Flamingo(config, vision_encoder=stub_encoder())
    config = tiny_config(
        lm=LanguageModelConfig(
            kind="huggingface", hf_config={"model_type": "clip"}, is_pretrained=False
        )
    )
    with pytest.raises(ConfigError, match="lm.hf_config: expected a causal .* got 'clip'"):
        Flamingo(config, vision_encoder=stub_encoder())
    for is_pretrained in (False, True):
        config = tiny_config(
            lm=LanguageModelConfig(
                kind="huggingface", name="/nonexistent/x", is_pretrained=is_pretrained
            )
        )
        with pytest.raises(ConfigError, match="lm.name: expected a causal .* got '/nonexistent/x'"):
            Flamingo(config, vision_encoder=stub_encoder())
    config = tiny_config(conditioning=ConditioningConfig(ff_mult=0.03))
    with pytest.raises(ConfigError, match="conditioning.ff_mult: .* got 0.03 x 32"):
        Flamingo(config, vision_encoder=stub_encoder())
    with pytest.raises(ConfigError, match="vanilla_xattn goes between"):
        flamingo("gpt_neox", "vanilla_xattn")
    with pytest.raises(ConfigError, match="image_token_id: expected an id of the language model's"):
        flamingo("llama", image_token_id=40)
    with pytest.raises(ConfigError, match="learnt_token_ids: expected those after the vocabulary"):
        flamingo("llama", learnt_token_ids=(42,))
    with pytest.raises(ConfigError, match="MambaBlock has none of self_attn"):
        flamingo(lang_model=hf_model("mamba"))
    with pytest.raises(ConfigError, match="has no layers that we know"):
        flamingo(lang_model=nn.Linear(2, 2))
    config = tiny_config(lm=LanguageModelConfig(kind="huggingface"))
    with pytest.raises(ConfigError, match="lm.name, lm.hf_config: expected one of them"):
        Flamingo(config, vision_encoder=stub_encoder())
    with pytest.raises(ConfigError, match="changes its logits by final_logit_softcapping"):
        flamingo(lang_model=hf_model("gemma2"))
