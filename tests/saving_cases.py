"""Small models, and what is compared of them and of their files."""

import copy
import dataclasses
from pathlib import Path

import pytest
import torch
from torch import nn

from flamingo_fast.models.config import (
    ConditioningConfig,
    FlamingoConfig,
    LanguageModelConfig,
    ResamplerConfig,
    VisionConfig,
)
from flamingo_fast.models.flamingo import Flamingo

transformers = pytest.importorskip("transformers")

VOCAB, DIM, IMAGE, EOC = 40, 32, 3, 40
SIZE = 28


def make_config(**changes) -> FlamingoConfig:
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


def make_hugging_face(family: str, **changes) -> nn.Module:
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


def randomized(model: Flamingo, seed: int = 0) -> Flamingo:
    """Other values than a new model has, gates open."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return model.eval()


def make_model(config: FlamingoConfig | None = None, **parts) -> Flamingo:
    return randomized(Flamingo(config or make_config(), **parts))


def make_inputs(seed: int = 0, size: int = SIZE) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    input_ids = torch.randint(5, VOCAB, (2, 9), generator=generator)
    input_ids[0, 1] = input_ids[1, 2] = input_ids[1, 5] = IMAGE
    input_ids[:, 7] = EOC
    images = torch.randn((2, 2, 3, size, size), generator=generator)
    return {"input_ids": input_ids, "images": images}


def logits_of(model: Flamingo, **inputs) -> torch.Tensor:
    # Of a copy, whose weights PyTorch aligns: on some CPUs the bits of a product depend on where
    # weights begin in memory, and a file that is mapped has them anywhere.
    with torch.no_grad():
        return copy.deepcopy(model)(**(inputs or make_inputs())).logits


def files_in(folder: Path) -> list[str]:
    return sorted(each.name for each in folder.iterdir())


def assert_same_state(loaded: Flamingo, model: Flamingo) -> None:
    ours, theirs = model.state_dict(), loaded.state_dict()
    assert ours.keys() == theirs.keys()
    for key, tensor in ours.items():
        assert tensor.dtype == theirs[key].dtype, key
        assert torch.equal(tensor, theirs[key]), key
    assert {name for name, each in loaded.named_parameters() if each.requires_grad} == {
        name for name, each in model.named_parameters() if each.requires_grad
    }
    assert torch.equal(logits_of(loaded), logits_of(model))
