"""Packed rows of whole models: losses and gradients are those of each document in a row of its own.

And what training asks of a model beside: features in place of images, whose media each row attends
to, sums of losses, and text without media.
"""

import dataclasses

import pytest
import torch
import transformers
from attention_contract import autocast_or_none
from model_cases import DIM, FAMILIES, IMAGE, flamingo, hf_config, hf_model, open_gates
from torch import nn

from flamingo_fast.models.config import VisionConfig
from flamingo_fast.models.packed_rows import FAMILIES as PACKED_FAMILIES

KINDS = ["gated_xattn_dense", "vanilla_xattn", "grafting"]
ROW = 24
# Rows of documents, "i" being an image token and what each attends to: "p" previous or "n" next.
DOCUMENTS = [
    [("i....i...", "n"), ("......", "p"), ("i...", "p")],
    [("..i...i.i.", "p"), ("i......", "n"), ("i..", "p"), (".", "p")],
    [("ii....", "n")],
]
ATTEND = {"p": "previous", "n": "next"}


@dataclasses.dataclass
class Packed:
    """The same documents packed, and as rows of their own, padded at the end."""

    packed: dict
    padded: dict


def _packed(frames=lambda medium: 1, pad_documents=True):
    """`frames`: of each medium."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.zeros(len(DOCUMENTS), ROW, dtype=torch.int64)
    documents, cu_seqlens = [], [0]
    for row, texts in enumerate(DOCUMENTS):
        start = 0
        for text, attend in texts:
            tokens = torch.randint(5, 40, (len(text),), generator=generator)
            tokens[[token == "i" for token in text]] = IMAGE
            ids[row, start : start + len(text)] = tokens
            documents.append((tokens, ATTEND[attend]))
            start += len(text)
            cu_seqlens.append(row * ROW + start)
        if pad_documents or row + 1 < len(DOCUMENTS):
            documents.append((tokens[:0], "previous"))
            cu_seqlens.append((row + 1) * ROW)
    counts = [int((tokens == IMAGE).sum()) for tokens, _ in documents]
    media = [
        torch.randn(frames(medium), 3, 8, 8, generator=generator) for medium in range(sum(counts))
    ]
    if len({len(medium) for medium in media}) == 1:
        media = torch.stack(media)
    real = [index for index, (tokens, _) in enumerate(documents) if len(tokens)]
    alone = nn.utils.rnn.pad_sequence([documents[index][0] for index in real], batch_first=True)
    mask = nn.utils.rnn.pad_sequence(
        [torch.ones_like(documents[index][0]) for index in real], batch_first=True
    )
    # Image tokens and some others are not predicted.
    skipped = [IMAGE, 7, 8, 9]
    labels = ids.masked_fill(torch.isin(ids, torch.tensor(skipped)) | (ids == 0), -100)
    alone_labels = alone.masked_fill(torch.isin(alone, torch.tensor(skipped)) | (mask == 0), -100)
    packed = {
        "input_ids": ids,
        "labels": labels,
        "cu_seqlens": torch.tensor(cu_seqlens, dtype=torch.int32),
        "num_media": counts,
        "attend": [attend for _, attend in documents],
        "videos": media,
    }
    padded = {
        "input_ids": alone,
        "labels": alone_labels,
        "attention_mask": mask,
        "num_media": [counts[index] for index in real],
        "attend": [documents[index][1] for index in real],
        "videos": media,
    }
    return Packed(packed, padded)


def _gradients(model, arguments):
    model.zero_grad()
    loss = model(**arguments).loss
    loss.backward()
    return loss.detach(), {
        name: parameter.grad.clone()
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }


def _assert_same(model, case, rtol=1e-4):
    """Of gradients relative to the largest of each parameter."""
    expected, expected_gradients = _gradients(model, case.padded)
    loss, gradients = _gradients(model, case.packed)
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)
    assert gradients.keys() == expected_gradients.keys()
    for name, gradient in expected_gradients.items():
        largest = float(gradient.abs().max())
        torch.testing.assert_close(
            gradients[name],
            gradient,
            rtol=rtol,
            atol=rtol * largest,
            msg=lambda m, n=name: f"{n}: {m}",
        )
    return gradients


def _model(family, kind="gated_xattn_dense", **options):
    if (family, kind) == ("gpt_neox", "vanilla_xattn"):
        options["use_parallel_residual"] = False
    return open_gates(flamingo(family, kind, **options)).train()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", [*FAMILIES, "chinchilla"])
def test_packed_documents_are_as_rows_of_their_own(family, kind):
    _assert_same(_model(family, kind), _packed())


@pytest.mark.parametrize("family", ["mpt", "chinchilla"])
def test_a_whole_row_of_padding_may_be_left_out(family):
    """Tokens after the last document are one more."""
    _assert_same(_model(family), _packed(pad_documents=False))


@pytest.mark.parametrize("resampler", ["perceiver", "mlp", "transformer"])
def test_packed_videos_of_any_number_of_frames(resampler):
    model = _model("chinchilla", resampler={"kind": resampler, "max_num_frames": 2})
    gradients = _assert_same(model, _packed(frames=lambda medium: 1 + medium % 3))
    assert gradients["resampler.frame_embs"].abs().amin(1).all()


@pytest.mark.parametrize("family", ["llama", "chinchilla"])
def test_packed_rows_of_a_model_that_learns_more(family):
    """The vision encoder, tokens, embeddings of media's places in their document."""
    learnt = (IMAGE, 4, 40)
    model = _model(family, learnt_token_ids=learnt, resampler={"max_num_media": 3}, eoc_token_id=40)
    model.vision_encoder.freeze(False)
    gradients = _assert_same(model, _packed())
    assert all(gradient.any() for gradient in gradients.values())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", ["opt", "chinchilla"])
def test_activation_checkpointing_of_packed_rows(family, kind):
    model, case = _model(family, kind), _packed()
    expected, expected_gradients = _gradients(model, case.packed)
    model.checkpoint()
    loss, gradients = _gradients(model, case.packed)
    assert torch.equal(loss, expected)
    for name, gradient in gradients.items():
        assert torch.equal(gradient, expected_gradients[name]), name


@pytest.mark.parametrize("family", ["qwen2", "chinchilla"])
@torch.no_grad()
def test_logits_of_packed_rows(family):
    """Without gradients; and a document's neighbours make no difference to a bit of it."""
    model, case = _model(family).eval(), _packed()
    packed, padded = (
        {name: each for name, each in arguments.items() if name != "labels"}
        for arguments in (case.packed, case.padded)
    )
    logits = model(**packed).logits.flatten(0, 1)
    is_text = packed["input_ids"].flatten() != 0
    expected = model(**padded).logits[padded["attention_mask"] != 0]
    torch.testing.assert_close(logits[is_text], expected, rtol=1e-4, atol=1e-5)
    changed = packed["input_ids"].clone()
    changed[0, 6:9] = 11
    others = model(**{**packed, "input_ids": changed}).logits.flatten(0, 1)
    assert not torch.equal(others[6:9], logits[6:9])
    assert torch.equal(others[9:], logits[9:])


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", PACKED_FAMILIES)
@torch.no_grad()
def test_language_models_that_keep_documents_apart(family, attention):
    sizes = {"gptj": {"n_embd": DIM, "n_layer": 2, "n_head": 4, "rotary_dim": 8}}
    sizes["phi3"] = {"pad_token_id": 0}
    options = sizes.get(family, {})
    mapping = transformers.AutoModelForCausalLM._model_mapping
    if attention == "sdpa" and not mapping[type(hf_config(family, **options))]._supports_sdpa:
        pytest.skip("this transformers has no such attention of it")
    model = _model(None, lang_model=hf_model(family, attn_implementation=attention, **options))
    case = _packed()
    expected = model(**case.padded).loss
    torch.testing.assert_close(model(**case.packed).loss, expected, rtol=1e-5, atol=0)


def test_text_in_two_documents_is_not_predicted_across_them():
    """Whatever the labels say: the first token of a row is not either."""
    model = _model("chinchilla")
    ids = torch.tensor([[5, 6, 7, 8, 9, 10]])
    packed = model(ids, labels=ids, cu_seqlens=[0, 4, 6], num_media=[0, 0], loss_reduction="sum")
    alone = [model(part, labels=part, loss_reduction="sum").loss for part in ids.split([4, 2], 1)]
    torch.testing.assert_close(packed.loss, sum(alone))


@pytest.mark.parametrize("family", ["llama", "chinchilla"])
def test_each_row_attends_to_the_media_it_is_told(family):
    model = _model(family)
    ids = torch.tensor([[5, IMAGE, 7, 8, IMAGE, 9], [6, 7, IMAGE, IMAGE, 9, 11]])
    images = torch.randn(2, 2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    for attend in (["previous", "next"], ["next", "all_previous"], "next"):
        each = [attend] * 2 if isinstance(attend, str) else attend
        logits = model(ids, images, attend=attend).logits
        for row in range(2):
            alone = model(ids[row : row + 1], images[row : row + 1], attend=each[row]).logits
            torch.testing.assert_close(logits[row : row + 1], alone, rtol=1e-4, atol=1e-5)
    by_default = model(ids, images).logits
    assert torch.equal(model(ids, images, attend="previous").logits, by_default)
    following = model(ids, images, attend="next").logits
    # Before the first image, the next is the first: what the second is makes no difference there.
    others = images.clone()
    others[:, 1] += 1
    changed = model(ids, others, attend="next").logits
    assert not torch.equal(following[:, 0], by_default[:, 0])
    assert torch.equal(changed[:, 0], following[:, 0])
    assert not torch.equal(changed[0, 2], following[0, 2])


def test_after_the_last_image_the_next_is_none():
    """It is no image token too many, for which `past_last` is."""
    model = _model("chinchilla", num_layers=1)
    block = model.conditioning.blocks[0].attn
    assert block.past_last is None
    ids = torch.tensor([[5, IMAGE, 7, 8]])
    seen = []
    block.to_out.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    model(ids, torch.ones(1, 1, 3, 8, 8), attend=["next"])
    assert seen[0][0, :2].any(1).all() and not seen[0][0, 2:].any()


@pytest.mark.parametrize("family", ["llama", "chinchilla"])
def test_sums_of_losses(family):
    model, case = _model(family), _packed()
    count = (case.padded["labels"][:, 1:] != -100).sum()
    for arguments in (case.packed, case.padded):
        mean = model(**arguments).loss
        torch.testing.assert_close(model(**arguments, loss_reduction="sum").loss, mean * count)
    head = model.lang_model.get_output_embeddings()
    expected = model(**case.packed, loss_reduction="sum").loss
    if family == "llama":
        # A head with a hook is called, and all logits are there at once.
        head.register_forward_hook(lambda *_: None)
        torch.testing.assert_close(model(**case.packed, loss_reduction="sum").loss, expected)


class _Counting(nn.Module):
    """An encoder of images of 8 x 8 alone."""

    def __init__(self):
        super().__init__()
        self.projection = nn.Linear(3 * 8 * 8, 4 * 12)
        self.calls = []

    def forward(self, x):
        self.calls.append(len(x))
        return self.projection(x.flatten(1)).unflatten(1, (4, 12))


@pytest.mark.parametrize("frames", [1, 2, None])
def test_features_in_place_of_videos(frames):
    encoder = _Counting()
    model = _model("chinchilla", encoder=encoder, resampler={"max_num_frames": 2})
    case = _packed(frames=lambda medium: frames or 1 + medium % 3)
    expected, gradients = _gradients(model, case.packed)
    features = [model.vision_encoder(each) for each in case.packed["videos"]]
    forms = [features] if frames is None else [features, torch.stack(features)]
    for form in forms:
        encoder.calls.clear()
        loss, found = _gradients(model, {**case.packed, "videos": None, "features": form})
        assert encoder.calls == []
        torch.testing.assert_close(loss, expected)
        for name, gradient in found.items():
            torch.testing.assert_close(gradient, gradients[name], rtol=1e-4, atol=1e-6)
    per_document = [[] for _ in case.packed["num_media"]]
    media = iter(case.packed["videos"])
    for document, count in zip(per_document, case.packed["num_media"], strict=True):
        document.extend(next(media) for _ in range(count))
    nested = {**case.packed, "videos": per_document, "num_media": None}
    torch.testing.assert_close(model(**nested).loss, expected)


@pytest.mark.parametrize("is_packed", [False, True])
@pytest.mark.parametrize(
    ("kind", "resampler"), list(zip(KINDS, ["perceiver", "mlp", "transformer"], strict=True))
)
def test_text_alone_gives_every_parameter_a_gradient(kind, resampler, is_packed):
    """Of 0 in what makes media: ranks that have some add theirs."""
    encoder = _Counting()
    model = _model(
        "chinchilla",
        kind,
        encoder=encoder,
        resampler={"kind": resampler, "max_num_frames": 2, "max_num_media": 3},
        learnt_token_ids=(4,),
    )
    model.config = dataclasses.replace(model.config, vision=VisionConfig(image_size=8))
    ids = torch.tensor([[5, 6, 4, 8, 9, 10], [6, 4, 5, 8, 7, 10]])
    text = {"input_ids": ids, "labels": ids}
    if is_packed:
        text |= {"cu_seqlens": [0, 2, 6, 12], "num_media": [0, 0, 0]}
    _gradients(model, text)
    assert encoder.calls == []
    model.vision_encoder.freeze(False)
    for checkpointed in (False, True):
        model.checkpoint(checkpointed)
        encoder.calls.clear()
        _, gradients = _gradients(model, text)
        assert encoder.calls == [1]
        for name, gradient in gradients.items():
            makes_media = name.startswith(("vision_encoder", "resampler")) or "to_kv" in name
            assert not (makes_media and gradient.any()), name
            assert gradient.isfinite().all(), name
        assert gradients["tokens.weight"].any()
    with torch.no_grad():
        encoder.calls.clear()
        model(**text)
        assert encoder.calls == []


@pytest.mark.parametrize("family", ["llama", "chinchilla"])
def test_nothing_waits_for_a_device(family, monkeypatch):
    """There are no values on "meta" that anything could wait for."""
    monkeypatch.setattr(torch, "autocast", autocast_or_none)
    model = flamingo(family).to("meta").train()
    arguments = {
        name: each.to("meta") if name in ("input_ids", "labels", "videos") else each
        for name, each in _packed().packed.items()
    }
    model(**arguments, loss_reduction="sum").loss.backward()
    assert all(each.grad is not None for each in model.resampler.parameters())


@pytest.mark.parametrize("resampler", ["perceiver", "mlp", "transformer"])
def test_where_ranks_share_it_videos_are_resampled_in_one_call(resampler, monkeypatch):
    """However many numbers of frames there are: other ranks have others."""
    model = _model("chinchilla", resampler={"kind": resampler, "max_num_frames": 3})
    case = _packed(frames=lambda medium: 1 + medium % 3)
    expected, gradients = _gradients(model, case.packed)
    calls = []
    model.resampler.register_forward_pre_hook(lambda *_: calls.append(1))
    monkeypatch.setattr("flamingo_fast.models.resampling.is_sharded", lambda module: True)
    loss, found = _gradients(model, case.packed)
    assert calls == [1]
    torch.testing.assert_close(loss, expected)
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, gradients[name], rtol=1e-3, atol=1e-5)
    with pytest.raises(ValueError, match="videos: expected at most 3 frames where they have diff"):
        model(**_packed(frames=lambda medium: 3 + medium % 2).packed)


def _text(model, **options):
    ids = torch.tensor([[5, IMAGE, 7, 8], [6, 7, 8, 9]])
    return model(ids, **{"cu_seqlens": [0, 4, 8], "num_media": [1, 0], **options})


REFUSED = {
    "attention_mask": (
        {"attention_mask": torch.ones(2, 4, dtype=torch.int64)},
        "attention_mask: expected None beside cu_seqlens, padding being a document without media",
    ),
    "two_rows": (
        {"cu_seqlens": [0, 5, 8]},
        "cu_seqlens: document 0, tokens 0 to 4, is in two rows",
    ),
    "documents": ({"num_media": [1]}, r"num_media: expected 2 numbers, got \[1\]"),
    "no_media": ({}, "images: document 0 has 1 image tokens and 0 images; expected as many"),
    "other_media": (
        {"images": torch.zeros(1, 3, 8, 8), "num_media": [0, 1]},
        "images: document 0 has 1 image tokens and 0 images",
    ),
    "a_number": (
        {"cu_seqlens": torch.tensor(4)},
        r"cu_seqlens: expected shape \(documents \+ 1,\), got \(\)",
    ),
    "after": (
        {"cu_seqlens": [0, 0, 0], "num_media": [0, 0]},
        "cu_seqlens: expected no image tokens after the last document, got 1",
    ),
    "attend": ({"attend": ["next"]}, "attend: expected one for each of 2 documents, got 1"),
    "reduction": ({"loss_reduction": "none"}, "loss_reduction: expected mean or sum, got 'none'"),
    "width": (
        {"features": [torch.zeros(1, 4, 13)]},
        r"features: expected \(F, S, 12\) of each medium, got \(1, 4, 13\)",
    ),
    "sizes": (
        {"features": [torch.zeros(1, 4, 12), torch.zeros(1, 5, 12)], "num_media": [2, 0]},
        r"features: expected as many of each frame, got \(1, 4, 12\) and \(1, 5, 12\)",
    ),
    "few_features": ({"features": []}, r"features: expected 1 of them.*got 0"),
    "two_kinds": (
        {"features": [torch.zeros(1, 4, 12)], "images": torch.zeros(1, 3, 8, 8)},
        "images, features: expected one of them",
    ),
}


@pytest.mark.parametrize("case", REFUSED.values(), ids=REFUSED.keys())
def test_refused(case):
    options, message = case
    if "attend" in options:
        options = {**options, "images": torch.zeros(1, 3, 8, 8)}
    with pytest.raises(ValueError, match=message):
        _text(_model("chinchilla"), **options)


def test_packed_rows_and_a_cache_are_refused():
    model = _model("chinchilla")
    with torch.no_grad(), pytest.raises(ValueError, match="cache: expected None beside cu_seqlens"):
        _text(model, cache=model.new_cache(2))


def test_language_models_that_may_not_are_refused_by_name():
    images = torch.zeros(1, 3, 8, 8)
    expected = "cu_seqlens: expected None, as it is not known whether BloomForCausalLM can keep"
    with pytest.raises(ValueError, match=expected):
        _text(_model("bloom"), images=images)
    with pytest.raises(ValueError, match="attn_implementation sdpa or eager; got LlamaForCausalLM"):
        _text(_model("llama", attn_implementation="flex_attention"), images=images)
    sliding = _model("mistral", sliding_window=3)
    message = "documents of at most 3 tokens, as many as the sliding window of MistralForCausalLM"
    with pytest.raises(ValueError, match=message):
        _text(sliding, images=images)
    shorter = {"cu_seqlens": [0, 2, 4, 7, 8], "num_media": [1, 0, 0, 0]}
    alone = _model("mistral", sliding_window=None)
    out = _text(sliding, images=images, **shorter).logits
    torch.testing.assert_close(out, _text(alone, images=images, **shorter).logits)
