"""Generation: what a cache gives against forwards without one, beams, stops, scores and work."""

import dataclasses
import functools
import re

import pytest
import torch
from attention_contract import HostSyncError, no_host_sync
from torch import nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

transformers = pytest.importorskip("transformers")
pytest.importorskip("timm")

from flamingo_fast.bench import decode  # noqa: E402
from flamingo_fast.models import generation  # noqa: E402
from flamingo_fast.models.beam_search import beam_search  # noqa: E402
from flamingo_fast.models.config import (  # noqa: E402
    ConditioningConfig,
    FlamingoConfig,
    LanguageModelConfig,
    ResamplerConfig,
)
from flamingo_fast.models.flamingo import Flamingo  # noqa: E402
from flamingo_fast.models.generation import Decoder, generate, score  # noqa: E402
from flamingo_fast.models.sampling import TOKENS_A_CHECK, Sampling, Stops  # noqa: E402
from flamingo_fast.models.vision import VisionEncoder  # noqa: E402

VOCAB, IMAGE, EOC, PAD = 60, 3, 4, 1
_LLAMA = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 48,
}
_GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 128}
_OPT = {"ffn_dim": 48, "word_embed_proj_dim": 32, "max_position_embeddings": 128}
HF_CONFIGS = {
    "gpt2": _GPT2,
    "llama": {**_LLAMA, "num_key_value_heads": 1},
    "opt": {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, **_OPT},
    "gpt_neox": {**_LLAMA, "use_parallel_residual": False},
    # A window that texts here are longer than.
    "mistral": {**_LLAMA, "num_key_value_heads": 1, "sliding_window": 6},
    "qwen2": {**_LLAMA, "num_key_value_heads": 2},
}
FAMILIES = ["chinchilla", *HF_CONFIGS]
KINDS = ["gated_xattn_dense", "vanilla_xattn", "grafting"]
every_kind = pytest.mark.parametrize("kind", KINDS)


class Patches(nn.Module):
    """A vision encoder that counts images."""

    def __init__(self):
        super().__init__()
        self.conv, self.num_images = nn.Conv2d(3, 24, 8, 8), 0

    def forward(self, images):
        self.num_images += len(images)
        return self.conv(images).flatten(2).mT


def lm_config(family):
    if family == "chinchilla":
        return LanguageModelConfig(vocab_size=VOCAB, dim=32, depth=2, heads=2, dim_head=16)
    ids = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": PAD}
    values = {"model_type": family, "vocab_size": VOCAB, **ids, **HF_CONFIGS[family]}
    return LanguageModelConfig(kind="huggingface", hf_config=values)


@functools.lru_cache
def flamingo(
    family="llama",
    kind="gated_xattn_dense",
    attend="previous",
    *,
    learnt=False,
    resampler_kind="perceiver",
):
    torch.manual_seed(0)
    sizes = {"heads": 2, "dim_head": 16}
    config = FlamingoConfig(
        resampler=ResamplerConfig(kind=resampler_kind, dim=32, depth=1, num_latents=4, **sizes),
        conditioning=ConditioningConfig(kind=kind, num_layers=2, attend=attend, **sizes),
        lm=lm_config(family),
        image_token_id=IMAGE,
        eoc_token_id=VOCAB if learnt else EOC,
        learnt_token_ids=(7, VOCAB) if learnt else (),
    )
    model = Flamingo(config, vision_encoder=VisionEncoder.from_module(Patches(), 24)).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("gate"):
            nn.init.constant_(parameter, 0.5)
        elif parameter.dim() > 1:
            nn.init.normal_(parameter, std=0.25)
    return model


def image_of(seed):
    return torch.randn(3, 16, 16, generator=torch.Generator().manual_seed(seed))


@dataclasses.dataclass
class Batch:
    """Rows of token ids, and the images of each."""

    rows: list
    images: list

    def __post_init__(self):
        longest = max(map(len, self.rows))
        self.ids = torch.tensor([[PAD] * (longest - len(row)) + row for row in self.rows])
        self.mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in self.rows])

    @property
    def prompt(self):
        return {"input_ids": self.ids, "images": self.images, "attention_mask": self.mask}


def mixed_batch():
    """Padded on the left, with one image; two images, at the first and in the middle; none."""
    rows = [[9, IMAGE, 11, 12], [IMAGE, 21, 22, IMAGE, 24, 25, 26], [31, 32, 33, 34, 35]]
    return Batch(rows, [[image_of(0)], [image_of(1), image_of(2)], []])


@pytest.fixture
def seen_logits(monkeypatch):
    """Logits (B, V) of each step."""
    seen, choose = [], Sampling.choose

    def see(sampling, logits):
        seen.append(logits.clone())
        return choose(sampling, logits)

    monkeypatch.setattr(Sampling, "choose", see)
    return seen


@torch.no_grad()
def uncached(model, row, images):
    """Logits (tokens, V) of a row on its own, and never an image token."""
    logits = model(torch.tensor([row]), [images] if images else None).logits[0]
    logits[:, IMAGE] = float("-inf")
    return logits


def assert_as_uncached(model, rows, images, sequences, logits):
    """Each of a call's tokens is the likeliest of a forward without cache, with its logits.

    rows are those before; logits a list of each step's, (B, V).
    """
    for index, (row, new) in enumerate(zip(rows, sequences, strict=True)):
        expected = uncached(model, row + new, images[index])[len(row) - 1 : -1]
        assert expected.argmax(-1).tolist() == new
        got = torch.stack([each[index] for each in logits[: len(new)]])
        torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-3)


def own_tokens(sequences, stop=None):
    """Rows without the padding after the token that they stopped at."""
    rows = sequences.tolist()
    return [row[: row.index(stop) + 1] if stop in row else row for row in rows]


def check_decoding(model, seen_logits, **options):
    batch = mixed_batch()
    output = generate(model, **batch.prompt, max_new_tokens=7, stop_token_ids=(), **options)
    rows = output.sequences.tolist()
    assert len({tuple(row) for row in rows}) == 3 and all(len(row) == 7 for row in rows)
    assert_as_uncached(model, batch.rows, batch.images, rows, seen_logits)


@every_kind
@pytest.mark.parametrize("family", FAMILIES)
def test_cached_decoding_is_uncached(family, kind, seen_logits):
    check_decoding(flamingo(family, kind), seen_logits)


@pytest.mark.parametrize(
    "family, kind", [("chinchilla", "grafting"), ("gpt2", "vanilla_xattn"), ("mistral", KINDS[0])]
)
def test_static_cache_is_uncached(family, kind, seen_logits):
    check_decoding(flamingo(family, kind), seen_logits, static_cache=True)


@pytest.mark.parametrize("attend", ["next", "all_previous"])
@every_kind
def test_other_attention_is_uncached(kind, attend, seen_logits):
    check_decoding(flamingo("gpt2", kind, attend), seen_logits)


@pytest.mark.parametrize("kind", ["gated_xattn_dense", "grafting"])
def test_learnt_tokens_are_uncached(kind, seen_logits):
    check_decoding(flamingo("llama", kind, learnt=True), seen_logits)


def converse(model, seen_logits, *turns, **first_turn):
    """Each turn's tokens are those of the whole conversation without a cache.

    Rows of the first turn end at different lengths: at a token that one of them makes.
    """
    rows, images = [[] for _ in turns[0].rows], [[] for _ in turns[0].rows]
    cache, stop = None, None
    lengths = set()
    for number, turn in enumerate(turns):
        options = {"max_new_tokens": 6, "stop_token_ids": ()}
        if number == 0:
            options |= first_turn
            free = generate(model, **turn.prompt, **options).sequences
            stop = next(
                row[at] for row in free.tolist() for at in (1, 2) if row[at] not in row[:at]
            )
            options["stop_token_ids"] = stop
        seen_logits.clear()
        output = generate(model, **turn.prompt, cache=cache, **options)
        cache = output.cache
        new = own_tokens(output.sequences, stop if number == 0 else None)
        lengths |= {len(row) for row in new} if number == 0 else set()
        rows = [row + more for row, more in zip(rows, turn.rows, strict=True)]
        images = [row + more for row, more in zip(images, turn.images, strict=True)]
        if seen_logits:
            assert_as_uncached(model, rows, images, new, seen_logits)
        rows = [row + more for row, more in zip(rows, new, strict=True)]
        # All of the conversation, and nothing but padding on the left.
        assert cache.seqlen == max(map(len, rows)) == cache.lm.get_seq_length()
        lengths_so_far = torch.tensor([len(row) for row in rows])
        expected = torch.arange(cache.seqlen) >= cache.seqlen - lengths_so_far[:, None]
        assert torch.equal(cache.attention_mask, expected.long())
        assert cache.num_media == [len(each) for each in images]
    assert len(lengths) > 1


# So that a row stops where it may.
SHORT_BEAMS = {"num_beams": 2, "length_penalty": -2.0}


def four_turns():
    none = [[], [], []]
    second = [[IMAGE, 41], [42, IMAGE, 43, IMAGE, 44], [45, 46, 47]]
    images = [[image_of(3)], [image_of(4), image_of(5)], []]
    third = [[51, 52], [53], [54, IMAGE, 55]]
    return [
        mixed_batch(),
        Batch(second, images),
        Batch([[48], [49], [50]], none),
        Batch(third, [[], [], [image_of(6)]]),
    ]


@every_kind
@pytest.mark.parametrize("family", ["chinchilla", "gpt2"])
def test_images_in_mid_conversation(family, kind, seen_logits):
    converse(flamingo(family, kind), seen_logits, *four_turns())


@pytest.mark.parametrize("family", ["opt", "gpt_neox", "mistral", "qwen2", "llama"])
def test_conversations_of_other_families(family, seen_logits):
    converse(flamingo(family), seen_logits, *four_turns())


@pytest.mark.parametrize(
    "first_turn",
    [{"static_cache": True}, SHORT_BEAMS, {**SHORT_BEAMS, "static_cache": True}],
    ids=["static", "beams", "static_beams"],
)
@pytest.mark.parametrize("family", ["chinchilla", "llama"])
def test_a_conversation_goes_on_after(family, first_turn, seen_logits):
    converse(flamingo(family, "grafting"), seen_logits, *four_turns(), **first_turn)


def test_a_conversation_when_the_host_asks_late(seen_logits, monkeypatch):
    monkeypatch.setattr(Stops, "period", staticmethod(lambda device: 4))
    converse(flamingo("chinchilla"), seen_logits, *four_turns())


def test_videos_of_other_lengths(seen_logits):
    """Two turns whose media have different numbers of tokens."""
    model = flamingo("llama", resampler_kind="transformer")
    videos = [
        [[torch.randn(2, 3, 16, 16)], [torch.randn(1, 3, 16, 16)]],
        [[torch.randn(3, 3, 16, 16)], []],
    ]
    turns = [[[IMAGE, 11, 12], [13, IMAGE, 14]], [[15, IMAGE, 16], [17, 18, 19]]]
    rows, all_videos, cache = [[], []], [[], []], None
    for turn, some in zip(turns, videos, strict=True):
        output = generate(
            model,
            torch.tensor(turn),
            videos=some,
            cache=cache,
            max_new_tokens=4,
            stop_token_ids=(),
        )
        cache = output.cache
        for index, new in enumerate(output.sequences.tolist()):
            all_videos[index] += some[index]
            before = rows[index] + turn[index]
            with torch.no_grad():
                logits = model(torch.tensor([before + new]), videos=[all_videos[index]]).logits[0]
            logits[:, IMAGE] = float("-inf")
            assert logits[len(before) - 1 : -1].argmax(-1).tolist() == new
            rows[index] = before + new


def hf_beams(model, batch, **options):
    """transformers' own search, of the language model with our layers in it."""
    with model.conditioned(batch.ids, batch.images, attention_mask=batch.mask) as lang_model:
        output = lang_model.generate(
            batch.ids,
            attention_mask=batch.mask,
            do_sample=False,
            pad_token_id=PAD,
            suppress_tokens=[IMAGE],
            return_dict_in_generate=True,
            output_scores=True,
            **options,
        )
    return output.sequences[:, batch.ids.shape[1] :], output.sequences_scores


BEAMS = {
    "plain": {"num_beams": 3},
    "many": {"num_beams": 7},
    "short": {"num_beams": 4, "length_penalty": -1.0},
    "long": {"num_beams": 4, "length_penalty": 2.0},
    "early": {"num_beams": 4, "early_stopping": True},
    "never": {"num_beams": 4, "early_stopping": "never", "length_penalty": 2.0},
}


@pytest.mark.parametrize("period, static_cache", [(1, False), (4, True)], ids=["dynamic", "static"])
@pytest.mark.parametrize("options", BEAMS.values(), ids=BEAMS)
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_beams_are_those_of_transformers(family, options, period, static_cache, monkeypatch):
    monkeypatch.setattr(Stops, "period", staticmethod(lambda device: period))
    model, batch = flamingo(family), mixed_batch()
    # Many, so that beams end at different lengths.
    stops = list(range(5, VOCAB, 13))
    expected, scores = hf_beams(model, batch, max_new_tokens=9, eos_token_id=stops, **options)
    output = generate(
        model,
        **batch.prompt,
        max_new_tokens=9,
        stop_token_ids=stops,
        pad_token_id=PAD,
        static_cache=static_cache,
        **options,
    )
    assert output.sequences.tolist() == expected.tolist()
    torch.testing.assert_close(output.scores, scores)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_some_beams_end_before_others(family):
    """So that the test above is about more than running on."""
    stops, lengths = list(range(5, VOCAB, 13)), set()
    for options in BEAMS.values():
        output = generate(
            flamingo(family),
            **mixed_batch().prompt,
            max_new_tokens=9,
            stop_token_ids=stops,
            pad_token_id=PAD,
            **options,
        )
        lengths |= {len(row) for row in own_tokens(output.sequences, PAD)}
    assert len(lengths) > 2


def test_beams_differ_from_greedy_and_score_higher():
    model, batch = flamingo("gpt2"), mixed_batch()
    options = {"max_new_tokens": 6, "stop_token_ids": ()}
    greedy = generate(model, **batch.prompt, **options).sequences
    beams = generate(model, **batch.prompt, num_beams=6, length_penalty=0.0, **options)
    assert not torch.equal(greedy, beams.sequences)
    by_option = score(
        model,
        options=[
            [one.tolist(), two.tolist()] for one, two in zip(greedy, beams.sequences, strict=True)
        ],
        **batch.prompt,
    )
    assert (by_option[:, 1] >= by_option[:, 0]).all()
    torch.testing.assert_close(beams.scores, by_option[:, 1], atol=1e-4, rtol=1e-4)


def test_media_are_encoded_once():
    """By beams, by options, in a padded batch, and in a conversation."""
    model, batch = flamingo("llama"), mixed_batch()
    encoder = model.vision_encoder.model

    def count(function):
        before = encoder.num_images
        result = function()
        return encoder.num_images - before, result

    padded = torch.zeros(3, 5, 3, 16, 16)
    for row, images in enumerate(batch.images):
        for index, image in enumerate(images):
            padded[row, index] = image
    prompt = {**batch.prompt, "images": padded}
    number, first = count(lambda: generate(model, **prompt, num_beams=4, max_new_tokens=5))
    assert number == 3
    turn = four_turns()[1]
    number, _ = count(lambda: generate(model, **turn.prompt, cache=first.cache, num_beams=2))
    assert number == 3
    number, _ = count(lambda: score(model, options=[[[5, 6], [7]]] * 3, batch_size=1, **prompt))
    assert number == 3


def test_beams_share_media():
    model, batch = flamingo("llama"), mixed_batch()
    cache, _ = generation._prefill(model, num_media=None, videos=None, **batch.prompt)
    decoder = Decoder(model, cache, room=2, copies=4)
    assert decoder(torch.full((12,), 5)).shape == (12, VOCAB)
    for used, kept in zip(decoder.context.media_kv, cache.media_kv, strict=True):
        assert used[0] is kept[0] and kept[0].shape[0] == 3


def test_return_cache_saves_a_step(monkeypatch):
    steps, step = [], Decoder._step
    monkeypatch.setattr(Decoder, "_step", lambda self, ids: steps.append(1) or step(self, ids))
    for return_cache, number in ((True, 5), (False, 4)):
        steps.clear()
        output = generate(
            flamingo(),
            torch.tensor([[5, 6]]),
            max_new_tokens=5,
            stop_token_ids=(),
            return_cache=return_cache,
        )
        assert len(steps) == number and (output.cache is not None) == return_cache


def sampled(rows, **options):
    """So many first tokens after one prompt, and their probabilities without any option."""
    model, row = flamingo("gpt2"), [9, 11, 12]
    generator = torch.Generator().manual_seed(0)
    output = generate(
        model, torch.tensor([row] * rows), max_new_tokens=1, generator=generator, **options
    )
    return output.sequences[:, 0], uncached(model, row, [])[-1]


def truncated(logits, temperature=1.0, top_k=None, top_p=None):
    """Probabilities by id, from the definitions."""
    probabilities = (logits.double() / temperature).softmax(-1)
    order = probabilities.argsort(descending=True).tolist()
    kept = order[:top_k]
    if top_p is not None:
        total = sum(probabilities[kept])
        number = next(
            n for n in range(1, len(kept) + 1) if sum(probabilities[kept[:n]]) >= top_p * total
        )
        kept = kept[:number]
    result = torch.zeros_like(probabilities)
    result[kept] = probabilities[kept] / probabilities[kept].sum()
    return result


SAMPLINGS = [
    {"temperature": 1.0},
    {"temperature": 0.5},
    {"temperature": 1.0, "top_k": 4},
    {"temperature": 2.0, "top_p": 0.6},
    {"temperature": 1.5, "top_p": 0.05},
    {"temperature": 1.5, "top_k": 6, "top_p": 0.7},
]


@pytest.mark.parametrize("options", SAMPLINGS, ids=str)
def test_samples_have_the_distribution(options):
    number = 4000
    tokens, logits = sampled(number, **options)
    expected = truncated(logits, **options)
    frequencies = torch.bincount(tokens, minlength=VOCAB) / number
    assert not frequencies[expected == 0].any()
    deviation = (expected * (1 - expected) / number).sqrt()
    assert ((frequencies - expected).abs() <= 5 * deviation + 1e-9).all()
    if "top_k" not in options and "top_p" not in options:
        assert (frequencies > 0).sum() > 10


def test_samples_are_those_of_the_generator():
    draws = [sampled(50, temperature=1.0)[0] for _ in range(2)]
    assert torch.equal(*draws) and len(set(draws[0].tolist())) > 3
    greedy, logits = sampled(3)
    assert torch.equal(greedy, logits.argmax().expand(3))
    assert torch.equal(sampled(20, temperature=1.0, top_k=1)[0], logits.argmax().expand(20))


class Letters:
    """A tokenizer: each id is a letter or two."""

    def decode(self, ids, **_):
        return "".join(f"{chr(97 + id_ % 26)}{id_ // 26}" for id_ in ids)


@pytest.mark.parametrize("period", [1, 4, 16])
@pytest.mark.parametrize("num_beams", [1, 3])
def test_stop_strings(num_beams, period, monkeypatch):
    """The string spans two tokens; what was generated after it goes, from the cache too."""
    monkeypatch.setattr(Stops, "period", staticmethod(lambda device: period))
    model, batch = flamingo("gpt2"), mixed_batch()
    options = {"max_new_tokens": 10, "stop_token_ids": (), "num_beams": num_beams}
    options["pad_token_id"] = PAD
    free = generate(model, **batch.prompt, **options).sequences.tolist()
    text = Letters().decode(free[1][2:4])
    strings = {"stop_strings": ["never here", text[1:3]], "tokenizer": Letters()}
    output = generate(model, **batch.prompt, **options, **strings)
    if num_beams == 1:
        for row, whole in zip(output.sequences.tolist(), free, strict=True):
            texts = [Letters().decode(whole[:number]) for number in range(11)]
            end = next((n for n, each in enumerate(texts) if text[1:3] in each), 10)
            length = min(end, 10)
            assert row[:length] == whole[:length] and set(row[length:]) <= {PAD}
    ends = [(each != PAD).nonzero().max().item() + 1 for each in output.sequences]
    assert min(ends) < 10
    for row, end in zip(output.sequences.tolist(), ends, strict=True):
        assert text[1:3] not in Letters().decode(row[: end - 1])
        assert text[1:3] in Letters().decode(row[:end]) or end == 10
    lengths = [len(row) + end for row, end in zip(batch.rows, ends, strict=True)]
    assert output.cache.attention_mask.sum(1).tolist() == lengths


@pytest.mark.parametrize("options", [{}, {"temperature": 1.0}, SHORT_BEAMS], ids=str)
def test_asking_late_changes_nothing(options, monkeypatch):
    model, batch = flamingo("gpt2"), mixed_batch()
    results, stops = [], [18, 19, 40, 52]
    for period in (1, 16):
        monkeypatch.setattr(Stops, "period", staticmethod(lambda device, period=period: period))
        output = generate(
            model,
            **batch.prompt,
            **options,
            stop_token_ids=stops,
            max_new_tokens=20,
            pad_token_id=PAD,
            generator=torch.Generator().manual_seed(2),
        )
        results.append((output.sequences.tolist(), output.cache.attention_mask.tolist()))
    assert results[0] == results[1] and len(results[0][0][0]) < 20


def test_streaming():
    model, batch = flamingo("llama"), mixed_batch()
    streamed = []
    output = generate(
        model, **batch.prompt, streamer=streamed.append, pad_token_id=PAD, max_new_tokens=8
    )
    assert torch.equal(torch.stack(streamed, 1), output.sequences)
    assert output.sequences[2].tolist() == [37, EOC, *[PAD] * 6]


def test_streamers_of_transformers():
    texts = []

    class Streamer(transformers.TextStreamer):
        def on_finalized_text(self, text, stream_end=False):
            texts.append((text, stream_end))

    model, batch = flamingo("llama"), mixed_batch()
    row, images = batch.rows[1], [batch.images[1]]
    free = generate(model, torch.tensor([row]), images, max_new_tokens=14).sequences[0]
    stop = free[-1].item()
    assert stop not in free[:-1]
    options = {"max_new_tokens": 20, "stop_token_ids": stop}
    for skip_prompt in (True, False):
        texts.clear()
        streamer = Streamer(Letters(), skip_prompt=skip_prompt)
        generate(model, torch.tensor([row]), images, streamer=streamer, **options)
        new = free.tolist()
        assert "".join(text for text, _ in texts) == Letters().decode(
            new if skip_prompt else row + new
        )
        assert [is_end for _, is_end in texts].count(True) == 1 and len(texts) >= len(new)


def on_meta(model, **options):
    """A decoder after a prefill, and its logits: with no values that a host could read.

    The model goes there too, so it is a new one.
    """
    batch = mixed_batch()
    cache, logits = generation._prefill(model, num_media=None, videos=None, **batch.prompt)
    decoder = Decoder(model, cache, room=20, **options)
    model.to("meta")
    decoder.context.layout = decoder.context.layout.to("meta")
    decoder.context.media_kv = pytree.tree_map(lambda each: each.to("meta"), cache.media_kv)
    decoder._mask, decoder._slot = decoder._mask.to("meta"), decoder._slot.to("meta")
    for each in filter(None, (decoder._cache.lm, decoder._cache.graft)):
        for layer in each.layers:
            layer.keys, layer.values = layer.keys.to("meta"), layer.values.to("meta")
            layer.device = torch.device("meta")
            if "cumulative_length" in vars(layer):
                layer.cumulative_length = layer.cumulative_length.to("meta")
    return decoder, logits.to("meta")


@pytest.fixture
def new_flamingo():
    flamingo.cache_clear()
    yield flamingo
    flamingo.cache_clear()


def run_on_meta(decoder, logits, tokens, sampling):
    stops = Stops([EOC, 9], [], None, PAD, torch.device("cpu"))
    stops._token_ids = stops._token_ids.to("meta")
    with no_host_sync():
        if decoder.copies > 1:
            return beam_search(decoder, logits, stops, tokens, 1.0, False)
        chosen = Sampling(*sampling)
        return generation._generate(decoder, logits, stops, tokens, chosen, [].append, None)


@pytest.mark.parametrize(
    "family, kind, options, sampling",
    [
        ("chinchilla", "grafting", {}, (0.7, 5, 0.9, None)),
        ("chinchilla", "grafting", {"static_cache": True}, (0.0, None, None, None)),
        ("gpt2", "vanilla_xattn", {"static_cache": True}, (0.7, 5, 0.9, None)),
        ("llama", "gated_xattn_dense", {}, (0.0, None, None, None)),
        ("llama", "gated_xattn_dense", {"copies": 4}, ()),
        ("gpt2", "gated_xattn_dense", {"copies": 4, "static_cache": True}, ()),
    ],
)
def test_no_host_sync_for_a_token(family, kind, options, sampling, new_flamingo):
    decoder, logits = on_meta(new_flamingo(family, kind), **options)
    tokens, lengths, *_ = run_on_meta(decoder, logits, 4, sampling)
    assert tokens.shape == (3, 4) and lengths.shape == (3,) and decoder.num_fed == 3


@pytest.mark.parametrize("copies", [1, 3])
def test_the_host_asks_rarely(copies, new_flamingo, monkeypatch):
    assert TOKENS_A_CHECK == 16
    monkeypatch.setattr("flamingo_fast.models.sampling.TOKENS_A_CHECK", 3)
    decoder, logits = on_meta(new_flamingo("llama"), copies=copies)
    with pytest.raises(HostSyncError, match="_local_scalar_dense"):
        run_on_meta(decoder, logits, 9, (0.0, None, None, None))
    assert decoder.num_fed == 2


def test_masks_of_transformers_would_be_read(monkeypatch, new_flamingo):
    """What the cache has to hide from it: the test of host syncs would notice."""
    monkeypatch.setattr("flamingo_fast.models.decoder._hide_from_reading", lambda cache: None)
    decoder, logits = on_meta(new_flamingo("llama"))
    with pytest.raises(HostSyncError):
        run_on_meta(decoder, logits, 3, (0.0, None, None, None))


class Recorder(TorchDispatchMode):
    """The operations of a step with the shapes of their tensors."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        leaves = pytree.tree_leaves((args, kwargs))
        shapes = [tuple(each.shape) for each in leaves if isinstance(each, torch.Tensor)]
        self.calls.append((str(func), shapes))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("family", ["chinchilla", "gpt2", "llama"])
def test_steps_of_a_static_cache_are_the_same(family):
    """Operations, shapes and addresses: what a CUDA graph replays."""
    model, batch = flamingo(family, "grafting"), mixed_batch()
    for static_cache in (True, False):
        cache, _ = generation._prefill(model, num_media=None, videos=None, **batch.prompt)
        decoder = Decoder(model, cache, room=6, static_cache=static_cache)
        recorded, addresses = [], []
        for token in range(6):
            with Recorder() as recorder:
                decoder(torch.full((3,), 5 + token))
            recorded.append(recorder.calls)
            layers = [*decoder._cache.lm.layers, *decoder._cache.graft.layers]
            addresses.append([layer.keys.data_ptr() for layer in layers])
        same = all(each == recorded[0] for each in recorded)
        assert same == static_cache
        assert (addresses.count(addresses[0]) == 6) == static_cache


@every_kind
def test_decode_work_is_independent_of_media(kind):
    """In FLOPs; without the media cache it grows by the same for each medium."""
    work = decode.decode_work(flamingo("chinchilla", kind), (1, 4, 8))
    assert len(set(work[decode.CACHED])) == 1
    one, four, eight = work[decode.RECOMPUTED]
    projections = 2 * 2 * 4 * 32 * 64  # Of two layers: 4 tokens of 32 to keys and values of 32.
    assert four - one == 3 * projections and eight - four == 4 * projections
    assert one - projections == work[decode.CACHED][0]


def test_decode_work_of_all_previous_media_grows():
    work = decode.decode_work(flamingo("chinchilla", attend="all_previous"), (1, 4, 8))
    one, four, eight = work[decode.CACHED]
    of_medium = 2 * 4 * 4 * 32
    assert four - one == 3 * of_medium and eight - four == 4 * of_medium


def test_plot_of_decode_work(tmp_path):
    pytest.importorskip("matplotlib")
    path = tmp_path / "decode.png"
    work = decode.plot_decode_work(path, numbers=(1, 3))
    assert path.read_bytes().startswith(b"\x89PNG")
    assert set(work) == {decode.CACHED, decode.RECOMPUTED}
    with pytest.raises(ValueError, match="seqlen: expected more than 5 tokens, got 5"):
        decode.decode_flops(flamingo(), 5, seqlen=5)


OPTIONS = [
    [[5], [6, 7, 8], [9, 10]],
    [[11, 12], [13], [14, 15, 16, 17]],
    [[18, 19], [20, 21, 22], [23]],
]


@pytest.mark.parametrize("batch_size", [None, 2])
@pytest.mark.parametrize(
    "family, kind", [("chinchilla", "grafting"), ("gpt2", "vanilla_xattn"), ("mistral", KINDS[0])]
)
def test_scores_are_sums_of_log_probabilities(family, kind, batch_size):
    model, batch = flamingo(family, kind), mixed_batch()
    scores = score(model, options=OPTIONS, batch_size=batch_size, **batch.prompt)
    assert scores.shape == (3, 3)
    for index, (row, options) in enumerate(zip(batch.rows, OPTIONS, strict=True)):
        for number, option in enumerate(options):
            images = batch.images[index]
            with torch.no_grad():
                output = model(torch.tensor([row + option]), [images] if images else None)
            log_probs = output.logits[0, len(row) - 1 : -1].log_softmax(-1)
            expected = log_probs[range(len(option)), option].sum()
            torch.testing.assert_close(scores[index, number], expected, atol=2e-5, rtol=2e-5)


def test_scores_of_one_prompt_and_of_a_token():
    model, row = flamingo("chinchilla"), torch.tensor([[9, 11, 12]])
    scores = score(model, row, OPTIONS[0])
    normalised = score(model, row, [[torch.tensor(each) for each in OPTIONS[0]]], normalize=True)
    torch.testing.assert_close(normalised, scores / torch.tensor([[1, 3, 2]]))
    # Each token on its own is a distribution.
    every = [[id_] for id_ in range(VOCAB) if id_ != IMAGE]
    total = score(model, row, every).exp().sum()
    assert 0.5 < total <= 1 + 1e-5


def prompt_of(*rows):
    return {"input_ids": torch.tensor(rows)}


ONE = prompt_of([5, 6])
BAD = {
    "temperature": ({**ONE, "temperature": -0.1}, "temperature: expected at least 0, got -0.1"),
    "infinite": ({**ONE, "temperature": float("inf")}, "temperature: expected at least 0"),
    "top_p": ({**ONE, "temperature": 1.0, "top_p": 0.0}, "top_p: expected above 0"),
    "top_p_over": ({**ONE, "temperature": 1.0, "top_p": 1.1}, "top_p: .*got 1.1"),
    "top_k": ({**ONE, "temperature": 1.0, "top_k": 0}, "top_k: expected an integer of at least 1"),
    "greedy_top_k": ({**ONE, "top_k": 3}, "temperature: expected above 0 with top_k or top_p"),
    "greedy_top_p": ({**ONE, "top_p": 0.5}, "temperature: expected above 0 with top_k or top_p"),
    "num_beams": ({**ONE, "num_beams": 0}, "num_beams: expected an integer of at least 1, got 0"),
    "sampled": ({**ONE, "num_beams": 2, "temperature": 1.0}, "temperature: expected 0 with num"),
    "streamed": ({**ONE, "num_beams": 2, "streamer": print}, "streamer: expected None with num"),
    "early": ({**ONE, "num_beams": 2, "early_stopping": "yes"}, "early_stopping: .*got 'yes'"),
    "tokenizer": ({**ONE, "stop_strings": "a"}, "tokenizer: expected one for stop_strings"),
    "empty": (
        {**ONE, "stop_strings": ["a", ""], "tokenizer": Letters()},
        "stop_strings: expected strings that are not empty",
    ),
    "max_new_tokens": ({**ONE, "max_new_tokens": 0}, "max_new_tokens: .*got 0"),
    "no_rows": ({"input_ids": torch.zeros(0, 3).long()}, "input_ids: .*got shape (0, 3)"),
    "no_tokens": ({"input_ids": torch.zeros(2, 0).long()}, "input_ids: .*got shape (2, 0)"),
    "floats": ({"input_ids": torch.zeros(2, 3)}, "input_ids: expected integers"),
    "right": (
        {**prompt_of([5, 6], [7, 0]), "attention_mask": torch.tensor([[1, 1], [1, 0]])},
        "attention_mask: expected padding on the left .*got [1, 0] in row 1",
    ),
    "hole": (
        {**prompt_of([5, 0, 6]), "attention_mask": torch.tensor([[1, 0, 1]])},
        "attention_mask: expected padding on the left",
    ),
    "nothing": (
        {**prompt_of([5, 6], [0, 0]), "attention_mask": torch.tensor([[1, 1], [0, 0]])},
        "attention_mask: .*in row 1",
    ),
    "pad_token_id": ({**ONE, "pad_token_id": -1}, "pad_token_id: expected a token id below 60"),
    "images": ({**prompt_of([5, IMAGE])}, "images: row 0 has 1 image tokens and 0 images"),
}


@pytest.mark.parametrize("arguments, message", BAD.values(), ids=BAD)
def test_wrong_arguments_of_generate(arguments, message):
    message = re.escape(message).replace(r"\.\*", ".*")
    with pytest.raises(ValueError, match=message):
        generate(flamingo(), **arguments)


def test_a_cache_of_other_rows():
    cache = generate(flamingo(), **ONE, max_new_tokens=1).cache
    with pytest.raises(ValueError, match="cache: expected one of input_ids' 2 rows, got one of 1"):
        generate(flamingo(), **prompt_of([5], [6]), cache=cache)


@pytest.mark.parametrize(
    "options, message",
    [
        ([], "options: expected some for each of 1 prompts"),
        ([[[5]], [[6]]], "options: expected some for each of 1 prompts"),
        ([[]], "options: expected token ids below 60, at least one; got []"),
        ([[5], [60]], "options: expected token ids below 60, at least one; got [60]"),
        ([[5, IMAGE]], "options: expected no image tokens, got [5, 3]"),
    ],
)
def test_wrong_options(options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        score(flamingo(), **ONE, options=options)


def test_wrong_options_of_several_prompts():
    with pytest.raises(ValueError, match="options: expected as many for each prompt, got .1, 2."):
        score(flamingo(), **prompt_of([5], [6]), options=[[[5]], [[6], [7]]])
    with pytest.raises(ValueError, match="batch_size: expected an integer of at least 1, got 0"):
        score(flamingo(), **ONE, options=[[5]], batch_size=0)
