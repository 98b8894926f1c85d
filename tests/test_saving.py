"""save_pretrained and from_pretrained: the same model again, without its weights in memory twice;
and what they refuse."""

import dataclasses
import json
import os
import weakref
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from saving_cases import (
    SIZE,
    assert_same_state,
    files_in,
    logits_of,
    make_config,
    make_hugging_face,
    make_inputs,
    make_model,
    randomized,
)
from torch import nn

from flamingo_fast.models import saving
from flamingo_fast.models.config import (
    ConditioningConfig,
    LanguageModelConfig,
    ResamplerConfig,
    VisionConfig,
)
from flamingo_fast.models.flamingo import Flamingo
from flamingo_fast.models.saving import CheckpointError, from_pretrained, save_pretrained
from flamingo_fast.models.vision import VisionEncoder

transformers = pytest.importorskip("transformers")

CHANGES = {
    "baseline": {},
    "nfnet": {"vision": VisionConfig(encoder="nfnet_mini", image_size=32)},
    "mlp": {"resampler": ResamplerConfig(kind="mlp", dim=16, depth=1, max_num_frames=None)},
    "vanilla_xattn": {
        "conditioning": ConditioningConfig(kind="vanilla_xattn", heads=2, dim_head=8)
    },
    "grafting": {
        "conditioning": ConditioningConfig(kind="grafting", num_layers=2, heads=2, dim_head=8)
    },
    "no learnt tokens": {"eoc_token_id": 4, "learnt_token_ids": ()},
}


@pytest.mark.parametrize("name", CHANGES)
def test_round_trip(name: str, tmp_path: Path) -> None:
    model = make_model(make_config(**CHANGES[name]))
    if name == "no learnt tokens":
        inputs = make_inputs()
        inputs["input_ids"][:, 7] = 4
    else:
        inputs = make_inputs()
    save_pretrained(model, tmp_path)
    assert files_in(tmp_path) == ["config.json", "model.safetensors"]
    loaded = from_pretrained(tmp_path)
    assert loaded.config == model.config
    assert not loaded.training
    ours, theirs = model.state_dict(), loaded.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    assert torch.equal(logits_of(loaded, **inputs), logits_of(model, **inputs))


@pytest.mark.parametrize("family", ["gpt2", "opt", "llama", "gpt_neox", "mistral", "qwen2"])
def test_language_models_of_transformers_need_no_name(family: str, tmp_path: Path) -> None:
    # The config still says "chinchilla": the object is what counts.
    model = make_model(lang_model=make_hugging_face(family))
    save_pretrained(model, tmp_path)
    loaded = from_pretrained(tmp_path)
    assert type(loaded.lang_model) is type(model.lang_model)
    assert loaded.config.lm.kind == "huggingface"
    assert_same_state(loaded, model)
    # Buffers that no state dict has, rotary frequencies among them.
    theirs = dict(loaded.named_buffers())
    for name, buffer in model.named_buffers():
        assert torch.equal(buffer, theirs[name]), name


def test_tied_weights_are_one_in_the_file_and_after_loading(tmp_path: Path) -> None:
    model = make_model(lang_model=make_hugging_face("gpt2"))
    save_pretrained(model, tmp_path)
    keys = load_file(tmp_path / "model.safetensors").keys()
    tied = {"lang_model.transformer.wte.weight", "lang_model.lm_head.weight"}
    assert tied <= model.state_dict().keys()
    assert len(tied & keys) == 1
    loaded = from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert loaded.lang_model.lm_head.weight is loaded.lang_model.transformer.wte.weight


def test_weights_are_written_as_given(tmp_path: Path) -> None:
    model = make_model(lang_model=make_hugging_face("gpt2"))
    state = {name: each.bfloat16() for name, each in model.state_dict().items()}
    # As they are gathered from ranks: copies, one of those that are tied.
    del state["lang_model.lm_head.weight"]
    save_pretrained(model, tmp_path, state_dict=state)
    saved = load_file(tmp_path / "model.safetensors")
    assert saved.keys() == state.keys()
    assert all(torch.equal(saved[name], state[name]) for name in state)
    loaded = from_pretrained(tmp_path)
    assert loaded.lang_model.lm_head.weight is loaded.lang_model.transformer.wte.weight


def test_untied_weights_stay_apart(tmp_path: Path) -> None:
    model = make_model(lang_model=make_hugging_face("llama"))
    save_pretrained(model, tmp_path)
    loaded = from_pretrained(tmp_path)
    assert loaded.lang_model.lm_head.weight is not loaded.lang_model.model.embed_tokens.weight
    assert_same_state(loaded, model)


def test_weights_tied_in_the_model_that_differ_in_the_files(tmp_path: Path) -> None:
    model = make_model(lang_model=make_hugging_face("gpt2"))
    save_pretrained(model, tmp_path)
    path = tmp_path / "model.safetensors"
    state = load_file(path)
    both = ("lang_model.lm_head.weight", "lang_model.transformer.wte.weight")
    (one,) = (key for key in both if key in state)
    (other,) = (key for key in both if key not in state)
    state[other] = state[one].clone()
    save_file(state, path)
    assert_same_state(from_pretrained(tmp_path), model)
    state[other][0, 0] += 1
    save_file(state, path)
    with pytest.raises(CheckpointError, match=f"({'|'.join(both)}) is tied to"):
        from_pretrained(tmp_path)


def test_shards(tmp_path: Path) -> None:
    model = make_model()
    save_pretrained(model, tmp_path, max_shard_bytes=100_000)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    shards = sorted(set(index["weight_map"].values()))
    assert len(shards) > 2
    assert shards[0] == f"model-00001-of-{len(shards):05}.safetensors"
    assert files_in(tmp_path) == sorted([*shards, "config.json", "model.safetensors.index.json"])
    states = {name: load_file(tmp_path / name) for name in shards}
    for key, name in index["weight_map"].items():
        assert key in states[name]
    sizes = [[each.nbytes for each in state.values()] for state in states.values()]
    # One weight may be more than a shard is to have.
    assert all(sum(each) <= 100_000 or len(each) == 1 for each in sizes)
    assert index["metadata"]["total_size"] == sum(map(sum, sizes))
    with safe_open(tmp_path / shards[0], framework="pt") as file:
        assert file.metadata() == {"format": "pt"}
    assert_same_state(from_pretrained(tmp_path), model)


def test_weights_tied_across_shards(tmp_path: Path) -> None:
    model = make_model(lang_model=make_hugging_face("opt"))
    save_pretrained(model, tmp_path, max_shard_bytes=1)
    assert_same_state(from_pretrained(tmp_path), model)


def test_a_later_save_leaves_nothing_of_an_earlier_one(tmp_path: Path) -> None:
    save_pretrained(make_model(), tmp_path, max_shard_bytes=100_000)
    whole, sharded = randomized(make_model(), 1), randomized(make_model(), 2)
    (tmp_path / "notes.txt").write_text("mine")
    save_pretrained(whole, tmp_path)
    assert files_in(tmp_path) == ["config.json", "model.safetensors", "notes.txt"]
    assert_same_state(from_pretrained(tmp_path), whole)
    save_pretrained(sharded, tmp_path, max_shard_bytes=200_000)
    assert "model.safetensors" not in files_in(tmp_path)
    assert_same_state(from_pretrained(tmp_path), sharded)


def test_a_model_saves_to_the_folder_that_it_is_mapped_from(tmp_path: Path) -> None:
    model = make_model()
    save_pretrained(model, tmp_path)
    loaded = randomized(from_pretrained(tmp_path), 5)
    expected = logits_of(loaded)
    save_pretrained(loaded, tmp_path)
    assert torch.equal(logits_of(loaded), expected)
    assert torch.equal(logits_of(from_pretrained(tmp_path)), expected)


@pytest.mark.parametrize("failing", range(3))
def test_a_save_that_fails_changes_nothing(failing: int, tmp_path: Path, monkeypatch) -> None:
    model = make_model()
    save_pretrained(model, tmp_path, max_shard_bytes=100_000)
    before = {each.name: each.read_bytes() for each in tmp_path.iterdir()}
    calls = []

    def save(tensors, path, metadata):
        calls.append(path)
        if len(calls) > failing:
            raise OSError("No space left on device")
        save_file(tensors, path, metadata)

    monkeypatch.setattr("safetensors.torch.save_file", save)
    with pytest.raises(OSError, match="No space left"):
        save_pretrained(randomized(make_model(), 1), tmp_path, max_shard_bytes=100_000)
    assert len(calls) == failing + 1
    assert {each.name: each.read_bytes() for each in tmp_path.iterdir()} == before


def test_a_save_that_is_cut_off_between_files_is_noticed(tmp_path: Path, monkeypatch) -> None:
    save_pretrained(make_model(), tmp_path, max_shard_bytes=100_000)
    replace, calls = os.replace, []

    def cut_off(source, target):
        calls.append(target)
        if len(calls) > 1:
            raise KeyboardInterrupt
        replace(source, target)

    monkeypatch.setattr(os, "replace", cut_off)
    with pytest.raises(KeyboardInterrupt):
        save_pretrained(randomized(make_model(), 1), tmp_path, max_shard_bytes=100_000)
    with pytest.raises(FileNotFoundError, match="not the index of such files"):
        from_pretrained(tmp_path)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_dtype(dtype: torch.dtype, tmp_path: Path) -> None:
    model = make_model(lang_model=make_hugging_face("llama"))
    save_pretrained(model, tmp_path)
    loaded = from_pretrained(tmp_path, dtype=dtype)
    assert {each.dtype for each in loaded.parameters()} == {dtype}
    # Rounded, its angles would be wrong after a few hundred tokens.
    assert loaded.lang_model.model.rotary_emb.inv_freq.dtype == torch.float32
    for key, tensor in loaded.state_dict().items():
        assert torch.equal(tensor, model.state_dict()[key].to(dtype)), key
    assert logits_of(loaded).isfinite().all()


def test_dtype_of_the_files_by_default(tmp_path: Path) -> None:
    model = make_model().bfloat16()
    model.vision_encoder.float()
    save_pretrained(model, tmp_path)
    assert_same_state(from_pretrained(tmp_path), model)


def test_device(tmp_path: Path) -> None:
    model = make_model()
    save_pretrained(model, tmp_path)
    loaded = from_pretrained(tmp_path, device="cpu")
    assert {each.device.type for each in (*loaded.parameters(), *loaded.buffers())} == {"cpu"}
    assert_same_state(loaded, model)
    with pytest.raises(CheckpointError, match=r"after loading.*on meta"):
        from_pretrained(tmp_path, device="meta")


def _anonymous_bytes() -> int:
    """Memory of this process that is in no file."""
    for line in Path("/proc/self/smaps_rollup").read_text().splitlines():
        if line.startswith("Anonymous:"):
            return 1024 * int(line.split()[1])
    raise AssertionError("no Anonymous in smaps_rollup")


@pytest.mark.skipif(not Path("/proc/self/smaps_rollup").exists(), reason="Linux's own file")
def test_on_a_cpu_weights_stay_in_the_files(tmp_path: Path) -> None:
    sizes = {"vocab_size": 40_000, "dim": 512, "heads": 2, "dim_head": 8, "depth": 1}
    config = make_config(
        lm=LanguageModelConfig(is_pretrained=False, **sizes),
        eoc_token_id=4,
        learnt_token_ids=(),
        conditioning=ConditioningConfig(heads=2, dim_head=8),
    )
    model = Flamingo(config)
    total = sum(each.nbytes for each in model.parameters())
    assert total > 80e6
    save_pretrained(model, tmp_path)
    before = _anonymous_bytes()
    loaded = from_pretrained(tmp_path)
    assert _anonymous_bytes() - before < total / 8
    assert torch.equal(
        loaded.lang_model.get_input_embeddings().weight, model.lang_model.model.embed_tokens.weight
    )


@pytest.mark.parametrize("max_shard_bytes", [10**9, 100_000])
def test_weights_are_converted_one_by_one(
    max_shard_bytes: int, tmp_path: Path, monkeypatch
) -> None:
    model = make_model()
    save_pretrained(model, tmp_path, max_shard_bytes=max_shard_bytes)
    alive: list[weakref.ref] = []
    most = 0
    move = saving._moved

    def watched(tensor, device, dtype):
        nonlocal most
        alive.append(weakref.ref(tensor))
        most = max(most, sum(each() is not None for each in alive))
        return move(tensor, device, dtype)

    monkeypatch.setattr(saving, "_moved", watched)
    from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert len(alive) == len(model.state_dict())
    # The one that is being converted, and the one before until its name is taken.
    assert most <= 2


def test_no_weights_are_made_before_they_are_read(tmp_path: Path, monkeypatch) -> None:
    model = make_model(lang_model=make_hugging_face("llama"))
    save_pretrained(model, tmp_path)
    made = []
    read = saving._read_weights

    def watched(model, *arguments):
        made.extend(name for name, each in model.named_parameters() if not each.is_meta)
        read(model, *arguments)

    monkeypatch.setattr(saving, "_read_weights", watched)
    from_pretrained(tmp_path)
    assert not made


def test_new_modules_have_memory_again_afterwards(tmp_path: Path) -> None:
    save_pretrained(make_model(), tmp_path)
    from_pretrained(tmp_path)
    assert not nn.Linear(2, 2).weight.is_meta


def test_trainable_only(tmp_path: Path) -> None:
    lang_model = make_hugging_face("gpt2")
    model = make_model(lang_model=lang_model)
    save_pretrained(model, tmp_path, trainable_only=True)
    keys = load_file(tmp_path / "model.safetensors").keys()
    assert keys == {
        key
        for key in model.state_dict()
        if key.startswith(("resampler.", "conditioning.", "tokens."))
    }
    encoder, alone = model.vision_encoder, model.lang_model
    again = make_hugging_face("gpt2")
    again.load_state_dict(alone.state_dict())
    loaded = from_pretrained(tmp_path, lang_model=again, vision_encoder=encoder)
    assert loaded.lang_model is again
    assert_same_state(loaded, model)
    with pytest.raises(CheckpointError, match=r"files lack .*Give vision_encoder.*Give lang_model"):
        from_pretrained(tmp_path)


def test_trainable_only_of_a_language_model_with_a_name(tmp_path: Path) -> None:
    make_hugging_face("llama").save_pretrained(tmp_path / "lm")
    lm = LanguageModelConfig(kind="huggingface", name=str(tmp_path / "lm"))
    model = Flamingo(make_config(lm=lm))
    # As OpenFlamingo trains it.
    model.lang_model.get_input_embeddings().requires_grad_(True)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    save_pretrained(model, tmp_path / "flamingo", trainable_only=True)
    keys = load_file(tmp_path / "flamingo" / "model.safetensors").keys()
    assert [key for key in keys if key.startswith("lang_model.")] == [
        "lang_model.model.embed_tokens.weight"
    ]
    loaded = from_pretrained(tmp_path / "flamingo", vision_encoder=model.vision_encoder)
    assert torch.equal(logits_of(loaded), logits_of(model))


def test_trainable_only_keeps_what_is_trained_of_any_part(tmp_path: Path) -> None:
    config = make_config(vision=VisionConfig(encoder="vit_mini", image_size=SIZE, is_frozen=False))
    model = make_model(config)
    save_pretrained(model, tmp_path, trainable_only=True)
    keys = load_file(tmp_path / "model.safetensors").keys()
    assert {key for key in model.state_dict() if key.startswith("vision_encoder.")} <= keys
    assert not any(key.startswith("lang_model.") for key in keys)


class _Stub(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.proj = nn.Linear(3 * 49, 24)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        patches = images.unfold(2, 7, 7).unfold(3, 7, 7).flatten(-2)
        return self.proj(patches.movedim(1, -2).flatten(1, 2).flatten(-2))


def test_parts_that_no_config_describes_are_given(tmp_path: Path) -> None:
    class OfMine(transformers.LlamaForCausalLM):
        pass

    def parts() -> dict[str, nn.Module]:
        return {
            "lang_model": OfMine(make_hugging_face("llama").config),
            "vision_encoder": VisionEncoder.from_module(_Stub(), 24),
        }

    model = make_model(**parts())
    save_pretrained(model, tmp_path)
    loaded = from_pretrained(tmp_path, **parts())
    assert_same_state(loaded, model)
    with pytest.raises(CheckpointError, match="lang_model: expected to be given"):
        from_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="Give vision_encoder"):
        from_pretrained(tmp_path, lang_model=parts()["lang_model"])


def test_given_parts_keep_their_dtype(tmp_path: Path) -> None:
    model = make_model(lang_model=make_hugging_face("gpt2"))
    save_pretrained(model, tmp_path)
    given = make_hugging_face("gpt2").bfloat16()
    loaded = from_pretrained(tmp_path, lang_model=given)
    assert {each.dtype for each in loaded.lang_model.parameters()} == {torch.bfloat16}
    weight = model.lang_model.transformer.h[0].mlp.c_fc.weight
    assert torch.equal(given.transformer.h[0].mlp.c_fc.weight, weight.bfloat16())
    assert given.lm_head.weight is given.transformer.wte.weight
    assert loaded.tokens.weight.dtype == torch.float32


def test_higher_resolution_loads_the_same_checkpoint(tmp_path: Path) -> None:
    """The paper, table 2: fine-tuning unfreezes the vision encoder at 480 pixels instead of 320."""
    model = make_model()
    save_pretrained(model, tmp_path)
    vision = VisionConfig(encoder="vit_mini", image_size=3 * SIZE // 2, is_frozen=False)
    loaded = from_pretrained(tmp_path, config=dataclasses.replace(model.config, vision=vision))
    assert loaded.vision_encoder.model.pos_embed.shape[1] == 1 + 3 * 3
    assert model.vision_encoder.model.pos_embed.shape[1] == 1 + 2 * 2
    class_token = loaded.vision_encoder.model.pos_embed[:, 0]
    assert torch.equal(class_token, model.vision_encoder.model.pos_embed[:, 0])
    logits = loaded.train()(**make_inputs(size=3 * SIZE // 2)).logits
    logits.square().mean().backward()
    assert loaded.vision_encoder.model.pos_embed.grad.abs().sum() > 0
    # Interpolated here or there are the same features, of the images that the old encoder takes.
    ours, theirs = (
        each.vision_encoder.eval()(make_inputs(size=3 * SIZE // 2)["images"][0])
        for each in (loaded, model)
    )
    torch.testing.assert_close(ours, theirs)


def test_a_model_on_meta_is_not_saved(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"model has no values of .* and \d+ more"):
        save_pretrained(Flamingo(make_config(), device="meta"), tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_buffers_that_stay_on_meta_are_an_error(tmp_path: Path) -> None:
    def parts(values: torch.Tensor) -> VisionEncoder:
        stub = _Stub()
        stub.register_buffer("scale", values, persistent=False)
        return VisionEncoder.from_module(stub, 24)

    save_pretrained(make_model(vision_encoder=parts(torch.ones(3))), tmp_path)
    with pytest.raises(CheckpointError, match=r"no values of vision_encoder\.model\.scale"):
        from_pretrained(tmp_path, vision_encoder=parts(torch.ones(3, device="meta")))


def test_shard_size_is_checked(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="max_shard_bytes: expected at least 1, got 0"):
        save_pretrained(make_model(), tmp_path, max_shard_bytes=0)


def test_nothing_of_this_machine_is_in_the_config(tmp_path: Path) -> None:
    lang_model = make_hugging_face("gpt2")
    lang_model.save_pretrained(tmp_path / "lm")
    lang_model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "lm")
    assert str(tmp_path) in lang_model.config._name_or_path
    save_pretrained(make_model(lang_model=lang_model), tmp_path / "flamingo")
    assert str(tmp_path) not in (tmp_path / "flamingo" / "config.json").read_text()
