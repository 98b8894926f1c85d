"""The whole model against OpenFlamingo's own code around the same language model, vision encoder
and weights; and its checkpoints."""

import copy
import dataclasses
import os
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from fresh_venv import ROOT
from model_cases import flamingo
from module_cases import BF16, FP32, results
from open_flamingo_cases import (
    DIM,
    EOC,
    FAMILIES,
    FEATURES,
    IMAGE,
    PAD,
    VOCAB,
    Visual,
    logits_of_ours,
    logits_of_peer,
    loss_of_ours,
    loss_of_peer,
    make_batch,
    make_lang_model,
    make_ours,
    make_pair,
    make_peer,
    names_of,
)
from safetensors.torch import save_file
from torch import nn

from flamingo_fast.models.flamingo import Flamingo
from flamingo_fast.models.generation import generate
from flamingo_fast.models.open_flamingo import OpenFlamingoReport, load_open_flamingo
from flamingo_fast.models.saving import CheckpointError, from_pretrained, save_pretrained
from flamingo_fast.models.vision import VisionEncoder
from flamingo_fast.testing.compare import compare


@pytest.mark.parametrize("dtype", [FP32, BF16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("every", [1, 2])
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_loss_and_gradients(family: str, every: int, dtype: torch.dtype) -> None:
    ours, peer = make_pair(family, every)
    ours, peer = ours.to(dtype), peer.to(dtype)
    oracle = copy.deepcopy(peer).double()
    images = make_batch().images
    names = {f"d{theirs}": f"d{our}" for theirs, our in names_of(peer, ours).items()}
    found = results(ours, {"images": images}, loss_of_ours)
    eager, exact = (
        {names.get(name, name): tensor for name, tensor in each.items()}
        for each in (results(model, {"images": images}, loss_of_peer) for model in (peer, oracle))
    )
    trained = {f"d{name}" for name, each in ours.named_parameters() if each.requires_grad}
    assert {"out", *trained} == {"out", *names.values()} == found.keys() == exact.keys()
    with torch.no_grad():
        found["logits"] = logits_of_ours(ours, images)
        eager["logits"], exact["logits"] = (
            logits_of_peer(model, images) for model in (peer, oracle)
        )
    eps = torch.finfo(dtype).eps
    comparisons = []
    for name, tensor in found.items():
        # Not only a tensor's own rounding: that of all layers before it, in another order.
        largest = exact[name].abs().max().item()
        if name.endswith("gate"):
            # One number each, whose terms cancel, more or less than those of other gates.
            gates = [each for key, each in exact.items() if key.endswith("gate")]
            largest = 2 * torch.cat(gates).abs().max().item()
        scale = (16 if dtype is FP32 else 4) * largest
        if name == "out" and dtype is BF16:
            # One number in fp32, of logits in bf16: eager's may be right by luck.
            logits = exact["logits"]
            scale = logits.abs().max().item() * eps / torch.finfo(FP32).eps / len(logits) ** 0.5
        each = compare(name, tensor, eager[name], exact[name], scale)
        comparisons.append(dataclasses.replace(each, drift_ulp=0.0))
    failed = [each for each in comparisons if not each.ok]
    assert not failed, "\n".join(map(str, failed))


def test_images_count() -> None:
    """Or the comparison says nothing about what comes after the vision encoder."""
    ours, _ = make_pair("opt", 2)
    batch = make_batch()
    with torch.no_grad():
        first, second = (
            ours(batch.input_ids, images, attention_mask=batch.attention_mask).logits
            for images in (batch.images, -batch.images)
        )
    differs = (first - second).abs().amax(-1) > 0.1
    has_image = (batch.input_ids == IMAGE).cumsum(1) > 0
    # After its last image and the text of it, a row sees no other.
    assert torch.equal(differs, has_image)


LogProbs = Callable[[torch.Tensor], torch.Tensor]


def greedy(log_probs: LogProbs, prompt: torch.Tensor, steps: int, stop: int) -> list[int]:
    """Tokens up to `stop`, of a prompt (L,); log_probs maps (rows, L) to (rows, V)."""
    tokens: list[int] = []
    while len(tokens) < steps and stop not in tokens:
        text = torch.cat([prompt, torch.tensor(tokens, dtype=prompt.dtype)])
        tokens.append(int(log_probs(text[None])[0].argmax()))
    return tokens


def beam_search(
    log_probs: LogProbs, prompt: torch.Tensor, steps: int, stop: int, beams: int
) -> tuple[list[int], float]:
    """As transformers does without early stopping: of finished beams the best by its mean."""
    running: list[tuple[float, list[int]]] = [(0.0, [])]
    finished: list[tuple[float, list[int]]] = []
    for step in range(1, steps + 1):
        texts = [torch.cat([prompt, torch.tensor(beam, dtype=prompt.dtype)]) for _, beam in running]
        candidates = sorted(
            (
                (total + log_prob, [*beam, token])
                for (total, beam), row in zip(
                    running, log_probs(torch.stack(texts)).tolist(), strict=True
                )
                for token, log_prob in enumerate(row)
            ),
            reverse=True,
        )[: 2 * beams]
        for rank, (total, beam) in enumerate(candidates):
            if rank < beams and (beam[-1] == stop or step == steps):
                finished.append((total / step, beam))
        finished = sorted(finished, reverse=True)[:beams]
        running = [each for each in candidates if each[1][-1] != stop][:beams]
        if len(finished) == beams and running[0][0] / step <= finished[-1][0]:
            break
    score, best = finished[0]
    return best, score


def log_probs_of(peer: nn.Module, images: torch.Tensor) -> LogProbs:
    """By OpenFlamingo's forward on the whole text: its `generate` fails with transformers 5."""

    def log_probs(texts: torch.Tensor) -> torch.Tensor:
        vision_x = images[None, :, None].expand(len(texts), -1, 1, -1, -1, -1)
        with torch.no_grad():
            logits = peer(vision_x, texts, attention_mask=torch.ones_like(texts)).logits[:, -1]
        result = logits.log_softmax(-1)
        # Ours never makes image tokens up.
        result[:, IMAGE] = float("-inf")
        return result

    return log_probs


def prompts() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    rows = [torch.randint(5, VOCAB, (length,), generator=generator) for length in (7, 4, 5, 3)]
    for row, places in zip(rows, [(1, 4), (0,), (2, 3), ()], strict=True):
        row[list(places)] = IMAGE
    return rows


def left_padded(rows: list[torch.Tensor]) -> dict[str, torch.Tensor]:
    longest = max(map(len, rows))
    input_ids = torch.full((len(rows), longest), PAD)
    for padded, row in zip(input_ids, rows, strict=True):
        padded[longest - len(row) :] = row
    return {"input_ids": input_ids, "attention_mask": (input_ids != PAD).long()}


STEPS = 7


@pytest.mark.parametrize("every", [1, 2])
@pytest.mark.parametrize("family", FAMILIES)
def test_greedy(family: str, every: int) -> None:
    ours, peer = make_pair(family, every)
    images, rows = make_batch().images, prompts()
    whole = greedy(log_probs_of(peer, images[0]), rows[0], STEPS, EOC)
    # A stop token that does come up.
    for stop in (EOC, whole[3]):
        out = generate(
            ours,
            images=images,
            max_new_tokens=STEPS,
            stop_token_ids=stop,
            **left_padded(rows),
        )
        lengths = set()
        for tokens, row, each in zip(out.sequences.tolist(), rows, images, strict=True):
            wanted = greedy(log_probs_of(peer, each), row, STEPS, stop)
            assert tokens[: len(wanted)] == wanted
            assert set(tokens[len(wanted) :]) <= {stop}
            lengths.add(len(wanted))
    assert min(lengths) < STEPS


@pytest.mark.parametrize(("family", "beams"), [("gpt2", 2), ("opt", 3), ("llama", 4)])
def test_beam_search(family: str, beams: int) -> None:
    ours, peer = make_pair(family, 2)
    images, rows = make_batch().images, prompts()
    whole, _ = beam_search(log_probs_of(peer, images[0]), rows[0], STEPS, EOC, beams)
    for stop in (EOC, whole[2]):
        out = generate(
            ours,
            images=images,
            max_new_tokens=STEPS,
            num_beams=beams,
            stop_token_ids=stop,
            **left_padded(rows),
        )
        assert out.scores is not None
        lengths = set()
        for tokens, score, row, each in zip(
            out.sequences.tolist(), out.scores.tolist(), rows, images, strict=True
        ):
            wanted, expected = beam_search(log_probs_of(peer, each), row, STEPS, stop, beams)
            assert tokens[: len(wanted)] == wanted
            assert score == pytest.approx(expected, rel=1e-4)
            lengths.add(len(wanted))
    assert min(lengths) < STEPS


def as_saved_by_training(peer: nn.Module) -> dict[str, torch.Tensor]:
    """OpenFlamingo's `filter_state_dict_to_trainable`, of a model in DistributedDataParallel."""
    state = peer.state_dict()
    for name, parameter in peer.named_parameters():
        if "embed" not in name and not parameter.requires_grad:
            del state[name]
    left_out = (
        "lang_encoder.old_decoder_blocks",
        "lang_encoder.gated_cross_attn_layers",
        "vision_encoder",
    )
    return {
        f"module.{name}": tensor
        for name, tensor in state.items()
        if not any(each in name for each in left_out)
    }


def with_frozen_weights_of(ours: Flamingo, peer: nn.Module) -> Flamingo:
    """Which OpenFlamingo too has from elsewhere."""
    whole = copy.deepcopy(ours)
    load_open_flamingo(whole, peer.state_dict())
    ours.lang_model.load_state_dict(whole.lang_model.state_dict())
    ours.vision_encoder.load_state_dict(whole.vision_encoder.state_dict())
    return ours


def assert_same_logits(ours: Flamingo, peer: nn.Module) -> None:
    with torch.no_grad():
        found, expected = (
            logits_of_ours(ours, make_batch().images),
            logits_of_peer(peer, make_batch().images),
        )
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["zip", "before torch 1.6", "bare", "safetensors"])
@pytest.mark.parametrize("family", FAMILIES)
def test_training_checkpoint(family: str, kind: str, tmp_path: Path) -> None:
    peer = make_peer(family, 2)
    ours = with_frozen_weights_of(make_ours(family, 2), peer)
    with torch.no_grad():
        ours.lang_model.get_input_embeddings().weight.zero_()
    state = as_saved_by_training(peer)
    path = tmp_path / "checkpoint.pt"
    if kind == "safetensors":
        path = tmp_path / "checkpoint.safetensors"
        save_file({key: tensor.clone() for key, tensor in state.items()}, path)
    elif kind == "bare":
        torch.save(state, path)
    else:
        optimizer = torch.optim.AdamW([each for each in peer.parameters() if each.requires_grad])
        saved = {
            "epoch": 3,
            "model_state_dict": state,
            "optimizer_state_dict": optimizer.state_dict(),
        }
        torch.save(saved, path, _use_new_zipfile_serialization=kind == "zip")
    report = load_open_flamingo(ours, path)
    assert_same_logits(ours, peer)
    assert set(report.kept) | set(report.loaded) == set(ours.state_dict())
    assert any(key.startswith("vision_encoder.") for key in report.kept)
    assert not any("embed_tokens" in key or "wte" in key for key in report.kept)
    assert not report.missing and not report.unexpected


def test_whole_state_dict_has_copies() -> None:
    peer, ours = make_peer("llama", 1), make_ours("llama", 1)
    report = load_open_flamingo(ours, peer.state_dict())
    assert any("old_decoder_blocks" in name for name in report.duplicates)
    assert any("gated_cross_attn_layers" in name for name in report.duplicates)
    # Without the first names the second ones are used.
    state = {
        name: tensor
        for name, tensor in peer.state_dict().items()
        if "decoder_layer." not in name and "gated_cross_attn_layer." not in name
    }
    ours = make_ours("llama", 1)
    assert load_open_flamingo(ours, state).duplicates == ()
    assert_same_logits(ours, peer)


def test_names_of_wrappers() -> None:
    peer, ours = make_peer("llama", 1), make_ours("llama", 1)
    wrapped = "decoder_layer._checkpoint_wrapped_module."
    state = {
        f"module.{name.replace('decoder_layer.', wrapped)}": each
        for name, each in peer.state_dict().items()
        if "old_decoder_blocks" not in name and "gated_cross_attn_layers" not in name
    }
    load_open_flamingo(ours, state)
    assert_same_logits(ours, peer)


@pytest.mark.parametrize("family", ["gpt2", "opt"])
def test_new_tokens_beside_a_vocabulary_as_it_was(family: str) -> None:
    peer, ours = make_peer(family, 2), make_ours(family, 2, vocab_size=VOCAB)
    assert ours.config.learnt_token_ids == (EOC, IMAGE)
    assert set(load_open_flamingo(ours, peer.state_dict()).loaded) == set(ours.state_dict())
    embedding = peer.lang_encoder.get_input_embeddings().weight
    assert torch.equal(ours.lang_model.get_input_embeddings().weight, embedding[:VOCAB])
    assert torch.equal(ours.tokens.weight, embedding[VOCAB:])
    assert_same_logits(ours, peer)


def test_new_tokens_with_two_embeddings_have_rows_of_each() -> None:
    peer, ours = make_peer("llama", 2), make_ours("llama", 2, vocab_size=VOCAB)
    load_open_flamingo(ours, peer.state_dict())
    of_peer = peer.lang_encoder
    for rows, module in (
        (ours.tokens.weight, of_peer.get_input_embeddings()),
        (ours.tokens.head_weight, of_peer.get_output_embeddings()),
    ):
        assert torch.equal(rows, module.weight[VOCAB:])
    assert not torch.equal(ours.tokens.weight, ours.tokens.head_weight)


def test_new_tokens_with_one_embedding_that_is_two_in_the_checkpoint() -> None:
    peer, ours = make_peer("gpt2", 2), make_ours("gpt2", 2, vocab_size=VOCAB)
    state = peer.state_dict()
    (head,) = (key for key in state if key.endswith("lm_head.weight"))
    before = copy.deepcopy(ours.state_dict())
    with pytest.raises(CheckpointError, match="embeddings of the new tokens differ"):
        load_open_flamingo(ours, {**state, head: state[head] + 1})
    assert_unchanged(ours, before)


def assert_unchanged(model: nn.Module, before: dict[str, torch.Tensor]) -> None:
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())


def without(name: str) -> Callable[[dict[str, torch.Tensor]], None]:
    return lambda state: [state.pop(key) for key in [*state] if name in key] and None


BROKEN = {
    "no latents": (without("perceiver.latents"), r"missing: resampler\.latents"),
    "no gate": (without("layers.1.gated_cross_attn_layer.ff_gate"), r"missing: blocks\.1\.ff_gate"),
    "another name": (
        lambda state: state.update({"module.perceiver.new": torch.zeros(2)}),
        r"unexpected: resampler\.new",
    ),
    "of another part": (
        lambda state: state.update({"module.audio_encoder.weight": torch.zeros(2)}),
        r"unexpected: module\.audio_encoder\.weight",
    ),
    "another layer": (
        lambda state: state.update(
            {"module.lang_encoder.model.layers.9.decoder_layer.mlp.bias": torch.zeros(2)}
        ),
        r"unexpected: .*layers\.9\.decoder_layer",
    ),
    "latents of another shape": (
        lambda state: state.update({"module.perceiver.latents": torch.zeros(3, FEATURES)}),
        r"resampler\.latents: expected the module's shape \(64, 24\), got \(3, 24\)",
    ),
    "more tokens": (
        lambda state: state.update(
            {"module.lang_encoder.model.embed_tokens.weight": torch.zeros(41, DIM)}
        ),
        r"embed_tokens\.weight: expected the model's shape \(40, 32\).*resize_token_embeddings\(41",
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_checkpoint_that_does_not_fit_changes_nothing(name: str) -> None:
    edit, message = BROKEN[name]
    state = as_saved_by_training(make_peer("llama", 2))
    edit(state)
    ours = make_ours("llama", 2)
    before = copy.deepcopy(ours.state_dict())
    with pytest.raises(ValueError, match=message):
        load_open_flamingo(ours, state)
    assert_unchanged(ours, before)


def test_what_fits_if_not_strict() -> None:
    state = as_saved_by_training(make_peer("llama", 2))
    without("layers.3.gated_cross_attn_layer.ff_gate")(state)
    state["module.audio_encoder.weight"] = torch.zeros(2)
    ours = make_ours("llama", 2)
    report = load_open_flamingo(ours, state, strict=False)
    assert report.missing == ("blocks.3.ff_gate",)
    assert report.unexpected == ("module.audio_encoder.weight",)
    assert "conditioning.blocks.1.ff_gate" not in report.loaded
    assert torch.equal(ours.resampler.latents, state["module.perceiver.latents"])
    assert ours.conditioning.blocks[1].ff_gate == 0
    assert ours.conditioning.blocks[0].ff_gate != 0
    assert "1 missing, 1 unexpected" in str(report)
    assert "missing: blocks.3.ff_gate" in str(report)


def test_model_of_other_sizes() -> None:
    state = make_peer("llama", 2).state_dict()
    with pytest.raises(ValueError, match=r"missing: blocks\.0\.attn_gate"):
        load_open_flamingo(make_ours("llama", 1), state)


class _Exploit:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return (os.mkdir, (str(self.path),))


def test_code_in_a_checkpoint_is_not_run(tmp_path: Path) -> None:
    state = {"model_state_dict": as_saved_by_training(make_peer("llama", 2))}
    state["args"] = _Exploit(tmp_path / "was here")
    torch.save(state, tmp_path / "checkpoint.pt")
    with pytest.raises(CheckpointError, match=r"checkpoint\.pt: expected .* of weights alone"):
        load_open_flamingo(make_ours("llama", 2), tmp_path / "checkpoint.pt")
    assert not (tmp_path / "was here").exists()


@pytest.mark.parametrize("text", ["hello", "(a", "version https://of.a/pointer"])
def test_text_is_no_checkpoint(text: str, tmp_path: Path) -> None:
    (tmp_path / "checkpoint.pt").write_text(text)
    with pytest.raises(CheckpointError, match=r"checkpoint\.pt: expected a file that torch\.save"):
        load_open_flamingo(make_ours("llama", 2), tmp_path / "checkpoint.pt")


def test_a_model_of_another_kind_is_refused() -> None:
    with pytest.raises(ValueError, match="conditioning.kind: expected gated_.* got 'grafting'"):
        load_open_flamingo(flamingo("llama", "grafting"), {})


@pytest.mark.parametrize("left", [0.0, 0.5, 0.99])
def test_truncated_checkpoint(left: float, tmp_path: Path) -> None:
    path = tmp_path / "checkpoint.pt"
    torch.save(as_saved_by_training(make_peer("llama", 2)), path)
    os.truncate(path, int(left * path.stat().st_size))
    with pytest.raises(CheckpointError, match=r"checkpoint\.pt: expected a file that torch\.save"):
        load_open_flamingo(make_ours("llama", 2), path)


def test_no_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nothing.pt: expected a checkpoint"):
        load_open_flamingo(make_ours("llama", 2), tmp_path / "nothing.pt")


class _Tokenizer:
    """The part of transformers' tokenizers that the README's recipe needs."""

    def __init__(self) -> None:
        self.tokens = [str(each) for each in range(VOCAB)]
        self.pad_token = "1"

    def add_special_tokens(self, tokens: dict[str, list[str]]) -> None:
        self.tokens += tokens["additional_special_tokens"]

    def convert_tokens_to_ids(self, token: str) -> int:
        return self.tokens.index(token)

    def __len__(self) -> int:
        return len(self.tokens)


def test_readme_recipe(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    blocks = re.findall(r"^```python\n(.*?)^```", (ROOT / "README.md").read_text(), re.S | re.M)
    (block,) = (each for each in blocks if "load_open_flamingo(" in each)
    recipe: dict = {}
    exec(block, recipe)
    peer = make_peer("opt", 2)
    torch.save({"model_state_dict": as_saved_by_training(peer)}, tmp_path / "checkpoint.pt")
    # What comes from elsewhere has the weights that OpenFlamingo's model was made with.
    elsewhere = with_frozen_weights_of(make_ours("opt", 2), peer)
    lang_model = make_lang_model("opt", VOCAB)
    state = elsewhere.lang_model.state_dict()
    for name in ("model.decoder.embed_tokens.weight", "lm_head.weight"):
        state[name] = torch.zeros(VOCAB, DIM)
    lang_model.load_state_dict(state)
    model = recipe["from_open_flamingo"](
        tmp_path / "checkpoint.pt",
        _Tokenizer(),
        lang_model,
        copy.deepcopy(peer.vision_encoder),
        FEATURES,
        2,
    )
    assert "weights loaded" in capsys.readouterr().out
    assert_same_logits(model, peer)
    save_pretrained(model, tmp_path / "ours")
    encoder = VisionEncoder.from_module(Visual(), FEATURES)
    assert_same_logits(from_pretrained(tmp_path / "ours", vision_encoder=encoder), peer)


def test_report_of_nothing_wrong_is_one_line() -> None:
    report = OpenFlamingoReport(("a", "b"), ("c",), (), (), ())
    assert str(report).splitlines() == [
        "OpenFlamingo checkpoint: 2 weights loaded, 1 kept as they were, 0 missing, 0 unexpected; "
        "0 copies dropped"
    ]
