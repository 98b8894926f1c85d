"""Tiny whole models: language models of transformers with random weights, and a stub encoder."""

import dataclasses

import torch
import transformers
from torch import nn

from flamingo_fast.models.config import (
    ConditioningConfig,
    FlamingoConfig,
    LanguageModelConfig,
    ResamplerConfig,
)
from flamingo_fast.models.flamingo import Flamingo
from flamingo_fast.models.vision import VisionEncoder

IMAGE = 3
VOCAB, DIM = 40, 32

_SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": DIM,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_GROUPED = {**_SIZES, "num_key_value_heads": 2}
FAMILIES = {
    "gpt2": {
        "vocab_size": VOCAB,
        "n_embd": DIM,
        "n_layer": 4,
        "n_head": 4,
        "n_positions": 64,
        **{name: _SIZES[name] for name in ("pad_token_id", "bos_token_id", "eos_token_id")},
    },
    "opt": {**_SIZES, "ffn_dim": 48, "word_embed_proj_dim": DIM},
    "gpt_neox": _SIZES,
    "llama": _GROUPED,
    "mistral": _GROUPED,
    "qwen2": _GROUPED,
}


def hf_config(family: str, **options: object) -> transformers.PretrainedConfig:
    sizes = FAMILIES.get(family, {**_GROUPED, "head_dim": 8})
    return transformers.AutoConfig.for_model(family, **{**sizes, **options})


def hf_model(family: str, **options: object) -> nn.Module:
    """A causal language model of transformers, random, in eval mode."""
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(hf_config(family, **options))
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1 and "position" not in name:
            nn.init.normal_(parameter, std=0.3)
    return model.eval()


class _Stub(nn.Module):
    """Features of the four quarters of an image of 8 x 8."""

    def __init__(self) -> None:
        super().__init__()
        self.projection = nn.Linear(48, 12)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.projection(nn.functional.unfold(x, 4, stride=4).mT)


def stub_encoder(module: nn.Module | None = None) -> VisionEncoder:
    torch.manual_seed(1)
    return VisionEncoder.from_module(_Stub() if module is None else module, 12)


def tiny_config(**options: object) -> FlamingoConfig:
    parts = {
        "resampler": ResamplerConfig(dim=16, depth=2, heads=2, dim_head=8, num_latents=3),
        "conditioning": ConditioningConfig(heads=2, dim_head=8, num_layers=2),
        "lm": LanguageModelConfig(vocab_size=VOCAB, dim=DIM, depth=4, heads=4, dim_head=8),
    }
    return FlamingoConfig(image_token_id=IMAGE, **{**parts, **options})


def flamingo(
    family: str | None = None,
    kind: str = "gated_xattn_dense",
    *,
    lang_model: nn.Module | None = None,
    encoder: nn.Module | None = None,
    resampler: dict[str, object] | None = None,
    lm: dict[str, object] | None = None,
    learnt_token_ids: tuple[int, ...] = (),
    image_token_id: int = IMAGE,
    eoc_token_id: int | None = 4,
    every: int | str = 1,
    num_layers: int = 2,
    dim_media: int | None = None,
    **lm_options: object,
) -> Flamingo:
    """A tiny model in eval mode, of random weights, with closed gates."""
    base = tiny_config()
    config = dataclasses.replace(
        base,
        resampler=dataclasses.replace(base.resampler, **(resampler or {})),
        conditioning=dataclasses.replace(
            base.conditioning, kind=kind, every=every, num_layers=num_layers, dim_media=dim_media
        ),
        lm=dataclasses.replace(base.lm, **(lm or {})),
        image_token_id=image_token_id,
        eoc_token_id=eoc_token_id,
        learnt_token_ids=learnt_token_ids,
    )
    if lang_model is None and family != "chinchilla":
        assert family is not None
        lang_model = hf_model(family, **lm_options)
    torch.manual_seed(2)
    model = Flamingo(config, lang_model=lang_model, vision_encoder=stub_encoder(encoder))
    if family == "chinchilla":
        for parameter in model.lang_model.parameters():
            if parameter.dim() > 1:
                nn.init.normal_(parameter, std=0.2)
    return model.eval()


def open_gates(model: Flamingo) -> Flamingo:
    """Gates of 0.5, and weights that make what comes through them matter."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.conditioning.named_parameters():
            if name.endswith("gate"):
                parameter.fill_(0.5)
            elif parameter.dim() > 1:
                noise = torch.randn(parameter.shape, generator=generator, device="cpu")
                parameter.copy_(noise * 0.2)
    return model
