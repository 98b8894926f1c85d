"""Generation: what a cache gives against forwards without one, beams, stops, scores and work."""

import re

import pytest
import torch
from attention_contract import HostSyncError, no_host_sync
from generation_cases import (
    EOC,
    FAMILIES,
    IMAGE,
    KINDS,
    PAD,
    VOCAB,
    Batch,
    Letters,
    even_batch,
    every_kind,
    flamingo,
    image_of,
    mixed_batch,
    own_tokens,
    uncached,
)
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from flamingo_fast.bench import decode
from flamingo_fast.models import generation
from flamingo_fast.models.beam_search import beam_search
from flamingo_fast.models.generation import Decoder, generate, score
from flamingo_fast.models.sampling import TOKENS_A_CHECK, Sampling, Stops


@pytest.fixture
def seen_logits(monkeypatch):
    """Logits (B, V) of each step."""
    seen, choose = [], Sampling.choose

    def see(sampling, logits):
        seen.append(logits.clone())
        return choose(sampling, logits)

    monkeypatch.setattr(Sampling, "choose", see)
    return seen


def assert_as_uncached(model, rows, images, sequences, logits):
    """Each of a call's tokens is the likeliest of a forward without cache, with its logits.

    rows are those before; logits a list of each step's, (B, V).
    """
    for index, (row, new) in enumerate(zip(rows, sequences, strict=True)):
        expected = uncached(model, row + new, images[index])[len(row) - 1 : -1]
        assert expected.argmax(-1).tolist() == new
        got = torch.stack([each[index] for each in logits[: len(new)]])
        torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-3)


def check_decoding(model, seen_logits, batch=None, **options):
    batch = batch or mixed_batch()
    output = generate(model, **batch.prompt, max_new_tokens=7, stop_token_ids=(), **options)
    rows = output.sequences.tolist()
    assert len({tuple(row) for row in rows}) == len(batch.rows) and all(
        len(row) == 7 for row in rows
    )
    assert_as_uncached(model, batch.rows, batch.images, rows, seen_logits)


@every_kind
@pytest.mark.parametrize("family", FAMILIES)
def test_cached_decoding_is_uncached(family, kind, seen_logits):
    check_decoding(flamingo(family, kind), seen_logits)


@pytest.mark.parametrize("kind", ["gated_xattn_dense", "grafting"])
def test_cached_decoding_of_mpt_is_uncached(kind, seen_logits):
    check_decoding(flamingo("mpt", kind), seen_logits)


@pytest.mark.parametrize(
    "family, kind",
    [
        ("chinchilla", "grafting"),
        ("gpt2", "vanilla_xattn"),
        ("mistral", KINDS[0]),
        ("opt", KINDS[0]),
        ("llama", KINDS[0]),
        ("mpt", KINDS[0]),
    ],
)
def test_static_cache_is_uncached(family, kind, seen_logits):
    check_decoding(flamingo(family, kind), seen_logits, static_cache=True)


@pytest.mark.parametrize("family", ["gpt2", "llama", "opt", "mpt"])
def test_static_cache_without_padding_is_uncached(family, seen_logits):
    check_decoding(flamingo(family), seen_logits, even_batch(), static_cache=True)


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
        if options.get("num_beams", 1) == 1:
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


def on_meta(model, batch=None, **options):
    """A decoder after a prefill, and its logits: with no values that a host could read.

    The model goes there too, so it is a new one.
    """
    batch = batch or mixed_batch()
    cache, logits = generation._prefill(model, num_media=None, videos=None, **batch.prompt)
    decoder = Decoder(model, cache, room=20, **options)
    model.to("meta")
    decoder.context.layout = decoder.context.layout.to("meta")
    decoder.context.media_kv = pytree.tree_map(lambda each: each.to("meta"), cache.media_kv)
    decoder._mask = None if decoder._mask is None else decoder._mask.to("meta")
    decoder._slot = decoder._slot.to("meta")
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
        ("opt", "gated_xattn_dense", {"static_cache": True}, (0.0, None, None, None)),
        ("llama", "gated_xattn_dense", {}, (0.0, None, None, None)),
        ("llama", "gated_xattn_dense", {"copies": 4}, ()),
        ("gpt2", "gated_xattn_dense", {"copies": 4, "static_cache": True}, ()),
    ],
)
def test_no_host_sync_for_a_token(family, kind, options, sampling, new_flamingo):
    decoder, logits = on_meta(new_flamingo(family, kind), **options)
    tokens, lengths, *_ = run_on_meta(decoder, logits, 4, sampling)
    assert tokens.shape == (3, 4) and lengths.shape == (3,) and decoder.num_fed == 3


@pytest.mark.parametrize("family", ["chinchilla", "gpt2", "llama", "opt"])
def test_no_host_sync_without_padding(family, new_flamingo):
    decoder, logits = on_meta(new_flamingo(family), even_batch(), static_cache=True)
    run_on_meta(decoder, logits, 4, (0.0, None, None, None))
    assert decoder.num_fed == 3


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
    "top_k": ({**ONE, "temperature": 1.0, "top_k": 0}, "top_k: expected an int >= 1"),
    "greedy_top_k": ({**ONE, "top_k": 3}, "temperature: expected above 0 with top_k or top_p"),
    "greedy_top_p": ({**ONE, "top_p": 0.5}, "temperature: expected above 0 with top_k or top_p"),
    "num_beams": ({**ONE, "num_beams": 0}, "num_beams: expected an int >= 1, got 0"),
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
    with pytest.raises(ValueError, match="batch_size: expected an int >= 1, got 0"):
        score(flamingo(), **ONE, options=[[5]], batch_size=0)
