"""Small models of OpenFlamingo's own code, and batches for them."""

from typing import Any

import patch_cases
import pytest
import torch
from patch_models import FEATURES, Visual
from torch import nn

from flamingo_fast.testing import peers

transformers = pytest.importorskip("transformers")

EOC, IMAGE, VOCAB, PAD = 38, 39, 40, 1
FP32, BF16 = torch.float32, torch.bfloat16
LAYERS = {"gpt2": "transformer.h", "llama": "model.layers"}


def _lang_model(family: str, dim: int, depth: int) -> nn.Module:
    ids = {"vocab_size": VOCAB, "bos_token_id": 0, "eos_token_id": 2, "pad_token_id": PAD}
    if family == "gpt2":
        drop = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
        config = transformers.GPT2Config(n_embd=dim, n_layer=depth, n_head=4, **drop, **ids)
        return transformers.GPT2LMHeadModel(config)
    sizes = {"hidden_size": dim, "num_hidden_layers": depth, "num_attention_heads": 4}
    config = transformers.LlamaConfig(intermediate_size=2 * dim, **sizes, **ids)
    return transformers.LlamaForCausalLM(config)


def make_model(
    family: str = "llama", immediate: bool = True, dim: int = 32, depth: int = 3, every: int = 1
) -> Any:
    """Random in all weights, gates open, in eval mode."""
    torch.manual_seed(0)
    model: Any = peers.open_flamingo_model(
        Visual(),
        _lang_model(family, dim, depth),
        LAYERS[family],
        vis_dim=FEATURES,
        eoc_token_id=EOC,
        media_token_id=IMAGE,
        cross_attn_every_n_layers=every,
    )
    del model.perceiver.layers[2:]
    for parameter in model.parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=(1.5 if dim == 32 else 1) * dim**-0.5)
    for attn in attentions_of(model):
        attn.only_attend_immediate_media = immediate
    return patch_cases.open_gates(model).eval()


def attentions_of(model: nn.Module) -> list[Any]:
    """Each once: the model has its layers in several places."""
    names = ("to_q", "only_attend_immediate_media")
    return [each for each in model.modules() if all(hasattr(each, name) for name in names)]


def make_batch() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Ids, their mask and images: late, side by side, none, too many image tokens, padded left."""
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(5, EOC, (5, 11), generator=generator)
    for row, places in enumerate([(4, 8), (0, 1), (), (2, 5, 7), (6,)]):
        ids[row, list(places)] = IMAGE
    mask = torch.ones_like(ids)
    for row, padding in ((2, 3), (4, 4)):
        ids[row, :padding], mask[row, :padding] = PAD, 0
    return ids, mask, torch.randn(5, 2, 1, 3, 8, 8, generator=generator)


def call_model(model: Any) -> tuple[torch.Tensor, torch.Tensor]:
    ids, mask, images = make_batch()
    images = images.to(model.vision_encoder.proj.weight.dtype)
    logits = model(images, ids, attention_mask=mask).logits
    # OpenFlamingo's loss has fp32 inside, be the model in fp64.
    loss = nn.functional.cross_entropy(
        logits[:, :-1][mask[:, 1:] == 1], ids[:, 1:][mask[:, 1:] == 1]
    )
    return logits[mask == 1], loss
