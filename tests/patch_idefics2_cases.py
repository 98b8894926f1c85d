"""A small Idefics2, its perceiver's config, and inputs of the whole model."""

import pytest
import torch
from torch import nn

pytest.importorskip("transformers")
from transformers.models.idefics2 import configuration_idefics2, modeling_idefics2  # noqa: E402

WIDTH, LATENTS, IMAGE = 32, 5, 30


def randomise(model: nn.Module) -> nn.Module:
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        values = torch.randn(parameter.shape, generator=generator)
        parameter.data.copy_(1 + 0.3 * values if parameter.dim() == 1 else 0.2 * values)
    return model


def config(
    heads: int = 4, kv_heads: int = 2, head_dim: int = 12, dropout: float = 0.0, width: int = WIDTH
) -> object:
    return configuration_idefics2.Idefics2PerceiverConfig(
        hidden_size=width,
        resampler_n_latents=LATENTS,
        resampler_depth=2,
        resampler_n_heads=heads,
        resampler_head_dim=head_dim,
        num_key_value_heads=kv_heads,
        attention_dropout=dropout,
    )


def whole_model(attention: str = "sdpa", depth: int = 2) -> nn.Module:
    cfg = configuration_idefics2.Idefics2Config(
        image_token_id=IMAGE,
        pad_token_id=0,
        text_config={
            "model_type": "mistral",
            "vocab_size": 48,
            "hidden_size": WIDTH,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "pad_token_id": 0,
            "bos_token_id": 1,
            "eos_token_id": 2,
        },
        vision_config={
            "image_size": 24,
            "patch_size": 4,
            "hidden_size": 16,
            "intermediate_size": 24,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
        },
        perceiver_config=config().to_dict() | {"resampler_depth": depth},
    )
    cfg._attn_implementation = attention
    return randomise(modeling_idefics2.Idefics2ForConditionalGeneration(cfg)).eval()


def whole_inputs(dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Two rows of two and one images, one of them padded right and below, one whole."""
    generator = torch.Generator().manual_seed(5)
    ids = torch.randint(3, IMAGE, (2, 24), generator=generator)
    ids[0, 3 : 3 + LATENTS] = ids[0, 10 : 10 + LATENTS] = ids[1, 6 : 6 + LATENTS] = IMAGE
    pixels = torch.randn(2, 2, 3, 24, 24, generator=generator)
    valid = torch.ones(2, 2, 24, 24, dtype=torch.bool)
    valid[0, 0, 16:], valid[0, 0, :, 12:], valid[1, 0, :, 20:] = False, False, False
    pixels[1, 1] = 0
    return {"input_ids": ids, "pixel_values": pixels.to(dtype), "pixel_attention_mask": valid}
