"""OpenFlamingo's own model and ours, small, and batches for both."""

import re
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from module_cases import randomized
from patch_open_flamingo_cases import FEATURES, Visual
from torch import nn

from flamingo_fast.models.flamingo import Flamingo
from flamingo_fast.models.open_flamingo import load_open_flamingo, open_flamingo_config
from flamingo_fast.models.vision import VisionEncoder
from flamingo_fast.testing import peers

transformers = pytest.importorskip("transformers")

# OpenFlamingo's own tokens are the next ones after the vocabulary.
VOCAB, EOC, IMAGE, ALL = 38, 38, 39, 40
DIM, PAD = 32, 1
LAYERS = {"gpt2": "transformer.h", "opt": "model.decoder.layers", "llama": "model.layers"}
FAMILIES = list(LAYERS)


def make_lang_model(family: str, vocab_size: int = ALL) -> nn.Module:
    options = {"vocab_size": vocab_size, "bos_token_id": 0, "eos_token_id": 2, "pad_token_id": PAD}
    if family == "gpt2":
        config = transformers.GPT2Config(n_embd=DIM, n_layer=4, n_head=2, n_positions=64, **options)
    else:
        options |= {"hidden_size": DIM, "num_hidden_layers": 4, "num_attention_heads": 2}
        if family == "opt":
            config = transformers.OPTConfig(ffn_dim=64, word_embed_proj_dim=DIM, **options)
        else:
            config = transformers.LlamaConfig(intermediate_size=64, **options)
    return transformers.AutoModelForCausalLM.from_config(config)


def make_peer(family: str, every: int) -> nn.Module:
    """OpenFlamingo's model, random weights in all of it, gates open."""
    peer = peers.open_flamingo_model(
        Visual(),
        make_lang_model(family),
        LAYERS[family],
        vis_dim=FEATURES,
        eoc_token_id=EOC,
        media_token_id=IMAGE,
        cross_attn_every_n_layers=every,
    )
    return randomized(peer, std=0.2).eval()


def make_ours(family: str, every: int, vocab_size: int = ALL) -> Flamingo:
    """Ours without its weights; the embedding is trained, as OpenFlamingo's is."""
    lang_model = make_lang_model(family, vocab_size)
    config = open_flamingo_config(
        lang_model, FEATURES, every, image_token_id=IMAGE, eoc_token_id=EOC
    )
    encoder = VisionEncoder.from_module(Visual(), FEATURES)
    model = Flamingo(config, lang_model=lang_model, vision_encoder=encoder)
    model.lang_model.get_input_embeddings().requires_grad_(True)
    return model.eval()


def make_pair(family: str, every: int) -> tuple[Flamingo, nn.Module]:
    peer, ours = make_peer(family, every), make_ours(family, every)
    report = load_open_flamingo(ours, peer.state_dict())
    assert set(report.loaded) == set(ours.state_dict())
    assert not (report.kept or report.missing or report.unexpected)
    return ours, peer


def make_batch() -> SimpleNamespace:
    """Rows with images after text, at once and side by side, without any, and padding."""
    generator = torch.Generator().manual_seed(3)
    input_ids = torch.randint(5, VOCAB, (4, 11), generator=generator)
    attention_mask = torch.ones_like(input_ids)
    for row, places in enumerate([(2, 6), (0,), (3, 4), ()]):
        input_ids[row, list(places)] = IMAGE
    input_ids[0, 5] = EOC
    for row, padding in ((1, 4), (3, 2)):
        input_ids[row, -padding:] = PAD
        attention_mask[row, -padding:] = 0
    images = torch.randn((4, 2, 3, 8, 8), generator=generator)
    labels = torch.where(
        (attention_mask == 0) | (input_ids == IMAGE) | (input_ids == PAD), -100, input_ids
    )
    return SimpleNamespace(
        input_ids=input_ids, attention_mask=attention_mask, images=images, labels=labels
    )


def names_of(peer: nn.Module, ours: Flamingo) -> dict[str, str]:
    """Of each parameter that OpenFlamingo trains, our name."""
    names = {}
    for name, parameter in peer.named_parameters():
        if not parameter.requires_grad:
            continue
        block = re.fullmatch(r"lang_encoder\..+\.(\d+)\.gated_cross_attn_layer\.(.+)", name)
        if block:
            index = ours.conditioning.layer_indices.index(int(block[1]))
            names[name] = f"conditioning.blocks.{index}.{block[2]}"
        elif name.startswith("perceiver."):
            names[name] = name.replace("perceiver.", "resampler.", 1)
        else:
            names[name] = name.replace("lang_encoder.", "lang_model.", 1)
    return names


def logits_of_ours(model: Flamingo, images: torch.Tensor) -> torch.Tensor:
    batch = make_batch()
    out = model(batch.input_ids, images, attention_mask=batch.attention_mask)
    return out.logits[batch.attention_mask == 1]


def output_of_peer(peer: nn.Module, images: torch.Tensor) -> Any:
    batch = make_batch()
    return peer(
        images[:, :, None].to(peer.vision_encoder.proj.weight.dtype),
        batch.input_ids,
        attention_mask=batch.attention_mask,
        labels=batch.labels,
    )


def logits_of_peer(peer: nn.Module, images: torch.Tensor) -> torch.Tensor:
    return output_of_peer(peer, images).logits[make_batch().attention_mask == 1]


def loss_of_ours(model: Flamingo, images: torch.Tensor) -> torch.Tensor:
    batch = make_batch()
    out = model(batch.input_ids, images, attention_mask=batch.attention_mask, labels=batch.labels)
    assert out.logits is None
    return out.loss


def loss_of_peer(peer: nn.Module, images: torch.Tensor) -> torch.Tensor:
    out = output_of_peer(peer, images)
    if out.logits.dtype != torch.float64:
        return out.loss
    # transformers' own has fp32 inside.
    logits, labels = out.logits[:, :-1].flatten(0, 1), make_batch().labels[:, 1:].flatten()
    return nn.functional.cross_entropy(logits, labels)
