"""Which tokens are generated: by beams, sampled, up to a stop; and streamed."""

import pytest
import torch
from generation_cases import (
    EOC,
    IMAGE,
    PAD,
    VOCAB,
    Letters,
    flamingo,
    mixed_batch,
    own_tokens,
    uncached,
)

from flamingo_fast.models import generation
from flamingo_fast.models.generation import Decoder, generate, score
from flamingo_fast.models.sampling import Stops

transformers = pytest.importorskip("transformers")


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


def test_beams_share_media():
    model, batch = flamingo("llama"), mixed_batch()
    cache, _ = generation._prefill(model, num_media=None, videos=None, **batch.prompt)
    decoder = Decoder(model, cache, room=2, copies=4)
    assert decoder(torch.full((12,), 5)).shape == (12, VOCAB)
    for used, kept in zip(decoder.context.media_kv, cache.media_kv, strict=True):
        assert used[0] is kept[0] and kept[0].shape[0] == 3


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
