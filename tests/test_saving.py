"""save_pretrained and from_pretrained: the same model again, without its weights in memory twice;
and what they refuse."""

import copy
import dataclasses
import json
import os
import pickle
import weakref
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from flamingo_fast.models import saving
from flamingo_fast.models.config import (
    ConditioningConfig,
    ConfigError,
    FlamingoConfig,
    LanguageModelConfig,
    ResamplerConfig,
    VisionConfig,
)
from flamingo_fast.models.flamingo import Flamingo
from flamingo_fast.models.saving import CheckpointError, from_pretrained, save_pretrained
from flamingo_fast.models.vision import VisionEncoder

transformers = pytest.importorskip("transformers")

VOCAB, DIM, IMAGE, EOC = 40, 32, 3, 40
SIZE = 28


def _config(**changes) -> FlamingoConfig:
    heads = {"heads": 2, "dim_head": 8}
    config = FlamingoConfig(
        vision=VisionConfig(encoder="vit_mini", image_size=SIZE),
        resampler=ResamplerConfig(dim=16, depth=1, num_latents=3, max_num_frames=2, **heads),
        conditioning=ConditioningConfig(every=2, dim_media=DIM, **heads),
        lm=LanguageModelConfig(vocab_size=VOCAB, dim=DIM, depth=3, is_pretrained=False, **heads),
        image_token_id=IMAGE,
        eoc_token_id=EOC,
        learnt_token_ids=(EOC,),
    )
    return dataclasses.replace(config, **changes)


def _hugging_face(family: str, **changes) -> nn.Module:
    sizes = {"vocab_size": VOCAB, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    if family == "gpt2":
        config = transformers.GPT2Config(n_embd=DIM, n_layer=3, n_head=2, n_positions=64, **sizes)
    else:
        sizes |= {"hidden_size": DIM, "num_hidden_layers": 3, "num_attention_heads": 2, **changes}
        if family == "opt":
            config = transformers.OPTConfig(ffn_dim=64, word_embed_proj_dim=DIM, **sizes)
        else:
            make = {
                "llama": transformers.LlamaConfig,
                "gpt_neox": transformers.GPTNeoXConfig,
                "mistral": transformers.MistralConfig,
                "qwen2": transformers.Qwen2Config,
            }[family]
            if family in ("mistral", "qwen2"):
                sizes["num_key_value_heads"] = 1
            config = make(intermediate_size=64, **sizes)
    return transformers.AutoModelForCausalLM.from_config(config)


def _randomized(model: Flamingo, seed: int = 0) -> Flamingo:
    """Other values than a new model has, gates open."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return model.eval()


def _model(config: FlamingoConfig | None = None, **parts) -> Flamingo:
    return _randomized(Flamingo(config or _config(), **parts))


def _inputs(seed: int = 0, size: int = SIZE) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    input_ids = torch.randint(5, VOCAB, (2, 9), generator=generator)
    input_ids[0, 1] = input_ids[1, 2] = input_ids[1, 5] = IMAGE
    input_ids[:, 7] = EOC
    images = torch.randn((2, 2, 3, size, size), generator=generator)
    return {"input_ids": input_ids, "images": images}


def _logits(model: Flamingo, **inputs) -> torch.Tensor:
    # Of a copy, whose weights PyTorch aligns: on some CPUs the bits of a product depend on where
    # weights begin in memory, and a file that is mapped has them anywhere.
    with torch.no_grad():
        return copy.deepcopy(model)(**(inputs or _inputs())).logits


def _files(folder: Path) -> list[str]:
    return sorted(each.name for each in folder.iterdir())


def _assert_same(loaded: Flamingo, model: Flamingo) -> None:
    ours, theirs = model.state_dict(), loaded.state_dict()
    assert ours.keys() == theirs.keys()
    for key, tensor in ours.items():
        assert tensor.dtype == theirs[key].dtype, key
        assert torch.equal(tensor, theirs[key]), key
    assert {name for name, each in loaded.named_parameters() if each.requires_grad} == {
        name for name, each in model.named_parameters() if each.requires_grad
    }
    assert torch.equal(_logits(loaded), _logits(model))


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
    model = _model(_config(**CHANGES[name]))
    if name == "no learnt tokens":
        inputs = _inputs()
        inputs["input_ids"][:, 7] = 4
    else:
        inputs = _inputs()
    save_pretrained(model, tmp_path)
    assert _files(tmp_path) == ["config.json", "model.safetensors"]
    loaded = from_pretrained(tmp_path)
    assert loaded.config == model.config
    assert not loaded.training
    ours, theirs = model.state_dict(), loaded.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    assert torch.equal(_logits(loaded, **inputs), _logits(model, **inputs))


@pytest.mark.parametrize("family", ["gpt2", "opt", "llama", "gpt_neox", "mistral", "qwen2"])
def test_language_models_of_transformers_need_no_name(family: str, tmp_path: Path) -> None:
    # The config still says "chinchilla": the object is what counts.
    model = _model(lang_model=_hugging_face(family))
    save_pretrained(model, tmp_path)
    loaded = from_pretrained(tmp_path)
    assert type(loaded.lang_model) is type(model.lang_model)
    assert loaded.config.lm.kind == "huggingface"
    _assert_same(loaded, model)
    # Buffers that no state dict has, rotary frequencies among them.
    theirs = dict(loaded.named_buffers())
    for name, buffer in model.named_buffers():
        assert torch.equal(buffer, theirs[name]), name


def test_tied_weights_are_one_in_the_file_and_after_loading(tmp_path: Path) -> None:
    model = _model(lang_model=_hugging_face("gpt2"))
    save_pretrained(model, tmp_path)
    keys = load_file(tmp_path / "model.safetensors").keys()
    tied = {"lang_model.transformer.wte.weight", "lang_model.lm_head.weight"}
    assert tied <= model.state_dict().keys()
    assert len(tied & keys) == 1
    loaded = from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert loaded.lang_model.lm_head.weight is loaded.lang_model.transformer.wte.weight


def test_weights_are_written_as_given(tmp_path: Path) -> None:
    model = _model(lang_model=_hugging_face("gpt2"))
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
    model = _model(lang_model=_hugging_face("llama"))
    save_pretrained(model, tmp_path)
    loaded = from_pretrained(tmp_path)
    assert loaded.lang_model.lm_head.weight is not loaded.lang_model.model.embed_tokens.weight
    _assert_same(loaded, model)


def test_weights_tied_in_the_model_that_differ_in_the_files(tmp_path: Path) -> None:
    model = _model(lang_model=_hugging_face("gpt2"))
    save_pretrained(model, tmp_path)
    path = tmp_path / "model.safetensors"
    state = load_file(path)
    both = ("lang_model.lm_head.weight", "lang_model.transformer.wte.weight")
    (one,) = (key for key in both if key in state)
    (other,) = (key for key in both if key not in state)
    state[other] = state[one].clone()
    save_file(state, path)
    _assert_same(from_pretrained(tmp_path), model)
    state[other][0, 0] += 1
    save_file(state, path)
    with pytest.raises(CheckpointError, match=f"({'|'.join(both)}) is tied to"):
        from_pretrained(tmp_path)


def test_shards(tmp_path: Path) -> None:
    model = _model()
    save_pretrained(model, tmp_path, max_shard_bytes=100_000)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    shards = sorted(set(index["weight_map"].values()))
    assert len(shards) > 2
    assert shards[0] == f"model-00001-of-{len(shards):05}.safetensors"
    assert _files(tmp_path) == sorted([*shards, "config.json", "model.safetensors.index.json"])
    states = {name: load_file(tmp_path / name) for name in shards}
    for key, name in index["weight_map"].items():
        assert key in states[name]
    sizes = [[each.nbytes for each in state.values()] for state in states.values()]
    # One weight may be more than a shard is to have.
    assert all(sum(each) <= 100_000 or len(each) == 1 for each in sizes)
    assert index["metadata"]["total_size"] == sum(map(sum, sizes))
    with safe_open(tmp_path / shards[0], framework="pt") as file:
        assert file.metadata() == {"format": "pt"}
    _assert_same(from_pretrained(tmp_path), model)


def test_weights_tied_across_shards(tmp_path: Path) -> None:
    model = _model(lang_model=_hugging_face("opt"))
    save_pretrained(model, tmp_path, max_shard_bytes=1)
    _assert_same(from_pretrained(tmp_path), model)


def test_a_later_save_leaves_nothing_of_an_earlier_one(tmp_path: Path) -> None:
    save_pretrained(_model(), tmp_path, max_shard_bytes=100_000)
    whole, sharded = _randomized(_model(), 1), _randomized(_model(), 2)
    (tmp_path / "notes.txt").write_text("mine")
    save_pretrained(whole, tmp_path)
    assert _files(tmp_path) == ["config.json", "model.safetensors", "notes.txt"]
    _assert_same(from_pretrained(tmp_path), whole)
    save_pretrained(sharded, tmp_path, max_shard_bytes=200_000)
    assert "model.safetensors" not in _files(tmp_path)
    _assert_same(from_pretrained(tmp_path), sharded)


def test_a_model_saves_to_the_folder_that_it_is_mapped_from(tmp_path: Path) -> None:
    model = _model()
    save_pretrained(model, tmp_path)
    loaded = _randomized(from_pretrained(tmp_path), 5)
    expected = _logits(loaded)
    save_pretrained(loaded, tmp_path)
    assert torch.equal(_logits(loaded), expected)
    assert torch.equal(_logits(from_pretrained(tmp_path)), expected)


@pytest.mark.parametrize("failing", range(3))
def test_a_save_that_fails_changes_nothing(failing: int, tmp_path: Path, monkeypatch) -> None:
    model = _model()
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
        save_pretrained(_randomized(_model(), 1), tmp_path, max_shard_bytes=100_000)
    assert len(calls) == failing + 1
    assert {each.name: each.read_bytes() for each in tmp_path.iterdir()} == before


def test_a_save_that_is_cut_off_between_files_is_noticed(tmp_path: Path, monkeypatch) -> None:
    save_pretrained(_model(), tmp_path, max_shard_bytes=100_000)
    replace, calls = os.replace, []

    def cut_off(source, target):
        calls.append(target)
        if len(calls) > 1:
            raise KeyboardInterrupt
        replace(source, target)

    monkeypatch.setattr(os, "replace", cut_off)
    with pytest.raises(KeyboardInterrupt):
        save_pretrained(_randomized(_model(), 1), tmp_path, max_shard_bytes=100_000)
    with pytest.raises(FileNotFoundError, match="not the index of such files"):
        from_pretrained(tmp_path)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_dtype(dtype: torch.dtype, tmp_path: Path) -> None:
    model = _model(lang_model=_hugging_face("llama"))
    save_pretrained(model, tmp_path)
    loaded = from_pretrained(tmp_path, dtype=dtype)
    assert {each.dtype for each in loaded.parameters()} == {dtype}
    # Rounded, its angles would be wrong after a few hundred tokens.
    assert loaded.lang_model.model.rotary_emb.inv_freq.dtype == torch.float32
    for key, tensor in loaded.state_dict().items():
        assert torch.equal(tensor, model.state_dict()[key].to(dtype)), key
    assert _logits(loaded).isfinite().all()


def test_dtype_of_the_files_by_default(tmp_path: Path) -> None:
    model = _model().bfloat16()
    model.vision_encoder.float()
    save_pretrained(model, tmp_path)
    _assert_same(from_pretrained(tmp_path), model)


def test_device(tmp_path: Path) -> None:
    model = _model()
    save_pretrained(model, tmp_path)
    loaded = from_pretrained(tmp_path, device="cpu")
    assert {each.device.type for each in (*loaded.parameters(), *loaded.buffers())} == {"cpu"}
    _assert_same(loaded, model)
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
    config = _config(
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
    model = _model()
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
    model = _model(lang_model=_hugging_face("llama"))
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
    save_pretrained(_model(), tmp_path)
    from_pretrained(tmp_path)
    assert not nn.Linear(2, 2).weight.is_meta


def test_trainable_only(tmp_path: Path) -> None:
    lang_model = _hugging_face("gpt2")
    model = _model(lang_model=lang_model)
    save_pretrained(model, tmp_path, trainable_only=True)
    keys = load_file(tmp_path / "model.safetensors").keys()
    assert keys == {
        key
        for key in model.state_dict()
        if key.startswith(("resampler.", "conditioning.", "tokens."))
    }
    encoder, alone = model.vision_encoder, model.lang_model
    again = _hugging_face("gpt2")
    again.load_state_dict(alone.state_dict())
    loaded = from_pretrained(tmp_path, lang_model=again, vision_encoder=encoder)
    assert loaded.lang_model is again
    _assert_same(loaded, model)
    with pytest.raises(CheckpointError, match=r"files lack .*Give vision_encoder.*Give lang_model"):
        from_pretrained(tmp_path)


def test_trainable_only_of_a_language_model_with_a_name(tmp_path: Path) -> None:
    _hugging_face("llama").save_pretrained(tmp_path / "lm")
    lm = LanguageModelConfig(kind="huggingface", name=str(tmp_path / "lm"))
    model = Flamingo(_config(lm=lm))
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
    assert torch.equal(_logits(loaded), _logits(model))


def test_trainable_only_keeps_what_is_trained_of_any_part(tmp_path: Path) -> None:
    config = _config(vision=VisionConfig(encoder="vit_mini", image_size=SIZE, is_frozen=False))
    model = _model(config)
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
            "lang_model": OfMine(_hugging_face("llama").config),
            "vision_encoder": VisionEncoder.from_module(_Stub(), 24),
        }

    model = _model(**parts())
    save_pretrained(model, tmp_path)
    loaded = from_pretrained(tmp_path, **parts())
    _assert_same(loaded, model)
    with pytest.raises(CheckpointError, match="lang_model: expected to be given"):
        from_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="Give vision_encoder"):
        from_pretrained(tmp_path, lang_model=parts()["lang_model"])


def test_given_parts_keep_their_dtype(tmp_path: Path) -> None:
    model = _model(lang_model=_hugging_face("gpt2"))
    save_pretrained(model, tmp_path)
    given = _hugging_face("gpt2").bfloat16()
    loaded = from_pretrained(tmp_path, lang_model=given)
    assert {each.dtype for each in loaded.lang_model.parameters()} == {torch.bfloat16}
    weight = model.lang_model.transformer.h[0].mlp.c_fc.weight
    assert torch.equal(given.transformer.h[0].mlp.c_fc.weight, weight.bfloat16())
    assert given.lm_head.weight is given.transformer.wte.weight
    assert loaded.tokens.weight.dtype == torch.float32


def test_higher_resolution_loads_the_same_checkpoint(tmp_path: Path) -> None:
    """The paper, table 2: fine-tuning unfreezes the vision encoder at 480 pixels instead of 320."""
    model = _model()
    save_pretrained(model, tmp_path)
    vision = VisionConfig(encoder="vit_mini", image_size=3 * SIZE // 2, is_frozen=False)
    loaded = from_pretrained(tmp_path, config=dataclasses.replace(model.config, vision=vision))
    assert loaded.vision_encoder.model.pos_embed.shape[1] == 1 + 3 * 3
    assert model.vision_encoder.model.pos_embed.shape[1] == 1 + 2 * 2
    class_token = loaded.vision_encoder.model.pos_embed[:, 0]
    assert torch.equal(class_token, model.vision_encoder.model.pos_embed[:, 0])
    logits = loaded.train()(**_inputs(size=3 * SIZE // 2)).logits
    logits.square().mean().backward()
    assert loaded.vision_encoder.model.pos_embed.grad.abs().sum() > 0
    # Interpolated here or there are the same features, of the images that the old encoder takes.
    ours, theirs = (
        each.vision_encoder.eval()(_inputs(size=3 * SIZE // 2)["images"][0])
        for each in (loaded, model)
    )
    torch.testing.assert_close(ours, theirs)


def _folder(tmp_path: Path, **options) -> Path:
    save_pretrained(_model(), tmp_path, **options)
    return tmp_path


def test_no_folder(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"folder: expected.*nowhere"):
        from_pretrained(tmp_path / "nowhere")


def test_no_config(tmp_path: Path) -> None:
    folder = _folder(tmp_path)
    (folder / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"config\.json"):
        from_pretrained(folder)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", r"config\.json: config: expected JSON"),
        ('{"resampler": {"depht": 3}}', r"config\.json: resampler\.depht: there is no such field"),
        ('{"image_token_id": "x"}', r"config\.json: image_token_id: expected int"),
    ],
)
def test_bad_config(text: str, message: str, tmp_path: Path) -> None:
    folder = _folder(tmp_path)
    (folder / "config.json").write_text(text)
    with pytest.raises(ConfigError, match=message):
        from_pretrained(folder)


def test_no_weights(tmp_path: Path) -> None:
    folder = _folder(tmp_path)
    (folder / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"expected model\.safetensors or"):
        from_pretrained(folder)


class _Exploit:
    def __reduce__(self):
        return (os.mkdir, (str(self.path),))


@pytest.mark.parametrize("name", ["pytorch_model.bin", "checkpoint.pt", "model.pth"])
def test_pickles_are_refused_unread(name: str, tmp_path: Path) -> None:
    folder = _folder(tmp_path)
    (folder / "model.safetensors").unlink()
    exploit = _Exploit()
    exploit.path = tmp_path / "was here"
    (folder / name).write_bytes(pickle.dumps(exploit))
    with pytest.raises(CheckpointError, match=rf"{name}.*pickle may run any code"):
        from_pretrained(folder)
    assert not exploit.path.exists()


@pytest.mark.parametrize("left", [0.0, 0.0001, 0.5, 0.999])
def test_truncated_file(left: float, tmp_path: Path) -> None:
    folder = _folder(tmp_path)
    path = folder / "model.safetensors"
    os.truncate(path, int(left * path.stat().st_size))
    with pytest.raises(CheckpointError, match=r"model\.safetensors: expected a whole file"):
        from_pretrained(folder)


def test_truncated_shard(tmp_path: Path) -> None:
    folder = _folder(tmp_path, max_shard_bytes=100_000)
    path = sorted(folder.glob("model-*.safetensors"))[1]
    os.truncate(path, path.stat().st_size - 1)
    with pytest.raises(CheckpointError, match=f"{path.name}: expected a whole file"):
        from_pretrained(folder)


def test_missing_shard(tmp_path: Path) -> None:
    folder = _folder(tmp_path, max_shard_bytes=100_000)
    path = sorted(folder.glob("model-*.safetensors"))[1]
    path.unlink()
    with pytest.raises(FileNotFoundError, match=f"expected {path.name} beside it"):
        from_pretrained(folder)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{}", "weight_map"),
        ("[]", "weight_map"),
        ("{", "weight_map"),
        ('{"weight_map": {"a": 3}}', "files of this folder, got 3"),
        ('{"weight_map": {"a": "../a.safetensors"}}', "files of this folder"),
    ],
)
def test_bad_index(text: str, message: str, tmp_path: Path) -> None:
    folder = _folder(tmp_path, max_shard_bytes=100_000)
    (folder / "model.safetensors.index.json").write_text(text)
    with pytest.raises(CheckpointError, match=rf"index\.json: expected.*{message}"):
        from_pretrained(folder)


def test_a_shard_of_another_save(tmp_path: Path) -> None:
    folder = _folder(tmp_path, max_shard_bytes=100_000)
    first, second, *_ = sorted(folder.glob("model-*.safetensors"))
    second.write_bytes(first.read_bytes())
    with pytest.raises(CheckpointError, match=f"{second.name}: expected what .* lacks"):
        from_pretrained(folder)


def _edited(folder: Path, edit) -> Path:
    path = folder / "model.safetensors"
    state = load_file(path)
    edit(state)
    save_file(state, path)
    return folder


def test_missing_and_unexpected_keys(tmp_path: Path) -> None:
    def edit(state):
        state["resampler.latent"] = state.pop("resampler.latents")

    folder = _edited(_folder(tmp_path), edit)
    with pytest.raises(
        CheckpointError, match=r"files lack resampler\.latents\..* has no resampler\.latent\."
    ):
        from_pretrained(folder)


def test_many_missing_keys_are_counted(tmp_path: Path) -> None:
    folder = _edited(
        _folder(tmp_path),
        lambda state: [state.pop(key) for key in [*state] if key.startswith("conditioning.")],
    )
    with pytest.raises(CheckpointError, match=r"conditioning\..* and \d\d more"):
        from_pretrained(folder)


def test_another_shape(tmp_path: Path) -> None:
    folder = _edited(
        _folder(tmp_path), lambda state: state.update({"resampler.latents": torch.zeros(4, 16)})
    )
    with pytest.raises(
        CheckpointError, match=r"(?s)model\.safetensors: .*resampler\.latents.*\[4, 16\].*\[3, 16\]"
    ):
        from_pretrained(folder)


def test_a_model_on_meta_is_not_saved(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"model has no values of .* and \d+ more"):
        save_pretrained(Flamingo(_config(), device="meta"), tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_buffers_that_stay_on_meta_are_an_error(tmp_path: Path) -> None:
    def parts(values: torch.Tensor) -> VisionEncoder:
        stub = _Stub()
        stub.register_buffer("scale", values, persistent=False)
        return VisionEncoder.from_module(stub, 24)

    save_pretrained(_model(vision_encoder=parts(torch.ones(3))), tmp_path)
    with pytest.raises(CheckpointError, match=r"no values of vision_encoder\.model\.scale"):
        from_pretrained(tmp_path, vision_encoder=parts(torch.ones(3, device="meta")))


def test_shard_size_is_checked(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="max_shard_bytes: expected at least 1, got 0"):
        save_pretrained(_model(), tmp_path, max_shard_bytes=0)


def test_nothing_of_this_machine_is_in_the_config(tmp_path: Path) -> None:
    lang_model = _hugging_face("gpt2")
    lang_model.save_pretrained(tmp_path / "lm")
    lang_model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "lm")
    assert str(tmp_path) in lang_model.config._name_or_path
    save_pretrained(_model(lang_model=lang_model), tmp_path / "flamingo")
    assert str(tmp_path) not in (tmp_path / "flamingo" / "config.json").read_text()
