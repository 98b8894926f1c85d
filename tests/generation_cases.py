"""Small models, prompts with media, and what the tests of generation compare with."""

import dataclasses
import functools

import pytest
import torch
from torch import nn

pytest.importorskip("transformers")
pytest.importorskip("timm")
from flamingo_fast.models.config import (  # noqa: E402
    ConditioningConfig,
    FlamingoConfig,
    LanguageModelConfig,
    ResamplerConfig,
)
from flamingo_fast.models.flamingo import Flamingo  # noqa: E402
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
    "mpt": {"d_model": 32, "n_layers": 2, "n_heads": 2, "max_seq_len": 128},
}
# MPT has layers that vanilla_xattn doesn't know.
FAMILIES = ["chinchilla", *(family for family in HF_CONFIGS if family != "mpt")]
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


def even_batch():
    """Without padding."""
    return Batch([[9, IMAGE, 11, 12], [31, 32, 33, IMAGE]], [[image_of(0)], [image_of(1)]])


@torch.no_grad()
def uncached(model, row, images):
    """Logits (tokens, V) of a row on its own, and never an image token."""
    logits = model(torch.tensor([row]), [images] if images else None).logits[0]
    logits[:, IMAGE] = float("-inf")
    return logits


def own_tokens(sequences, stop=None):
    """Rows without the padding after the token that they stopped at."""
    rows = sequences.tolist()
    return [row[: row.index(stop) + 1] if stop in row else row for row in rows]


class Letters:
    """A tokenizer: each id is a letter or two."""

    def decode(self, ids, **_):
        return "".join(f"{chr(97 + id_ % 26)}{id_ // 26}" for id_ in ids)
