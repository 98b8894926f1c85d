"""Tiny models of the families that `patch` knows, random in all weights, with open gates.

Of two rows, images late in the text, side by side, and padded tiles, in eval mode.
"""

import dataclasses
from collections.abc import Callable, Mapping

import torch
from patch_cases import open_gates
from torch import nn

from flamingo_fast.patching.state import is_patched
from flamingo_fast.testing import peers

VOCAB, IMAGE, EOC, DIM = 40, 39, 38, 32
FEATURES = 24
ROWS, TOKENS = 2, 10


@dataclasses.dataclass(frozen=True)
class Family:
    """A model and what is done with it.

    Attributes:
        make: raises ImportError if something is not installed.
        inputs: of a forward, by name; first dimension of all: `ROWS`.
        layers: class names of what is sharded, or recomputed, on its own.
        projections: names of linear layers that LoRA changes, of cross-attention among others.
    """

    name: str
    make: Callable[[], nn.Module]
    inputs: Callable[[], dict[str, torch.Tensor]]
    layers: tuple[str, ...]
    projections: tuple[str, ...]

    def is_installed(self) -> bool:
        try:
            self.make()
        except ImportError:
            return False
        return True

    def model(self) -> nn.Module:
        """The same weights each time."""
        torch.manual_seed(0)
        model = self.make()
        generator = torch.Generator().manual_seed(1)
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.data.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
        return open_gates(model).eval()

    def call(
        self, model: nn.Module, rows: slice = slice(None)
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits and a loss that is a mean over the rows."""
        inputs = self.inputs()
        dtype = next(each.dtype for each in model.parameters() if each.is_floating_point())
        inputs = {
            name: (each.to(dtype) if each.is_floating_point() else each)[rows]
            for name, each in inputs.items()
        }
        logits = model(**inputs).logits
        weights = torch.randn(logits.shape[1:], generator=torch.Generator().manual_seed(2))
        return logits, (logits * weights.to(logits)).sum((1, 2)).mean() / TOKENS


def _ids() -> torch.Tensor:
    ids = torch.randint(5, EOC, (ROWS, TOKENS), generator=torch.Generator().manual_seed(3))
    for row, places in enumerate([(2, 6), (4, 5)]):
        ids[row, list(places)] = IMAGE
    return ids


def _pixels(*shape: int) -> torch.Tensor:
    return torch.randn(ROWS, *shape, generator=torch.Generator().manual_seed(4))


_TEXT = {
    "vocab_size": VOCAB,
    "hidden_size": DIM,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


class Visual(nn.Module):
    """As OpenCLIP's `visual`: (pooled, tokens)."""

    def __init__(self) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, FEATURES, 4, 4)

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        tokens = self.proj(images).flatten(2).mT
        return tokens.mean(1), tokens


def _open_flamingo() -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    return peers.open_flamingo_model(
        Visual(),
        LlamaForCausalLM(LlamaConfig(**_TEXT)),
        "model.layers",
        vis_dim=FEATURES,
        eoc_token_id=EOC,
        media_token_id=IMAGE,
    )


def _open_flamingo_inputs() -> dict[str, torch.Tensor]:
    ids = _ids()
    return {
        "vision_x": _pixels(2, 1, 3, 8, 8),
        "lang_x": ids,
        "attention_mask": torch.ones_like(ids),
    }


def _idefics() -> nn.Module:
    from transformers import IdeficsConfig, IdeficsForVisionText2Text

    config = IdeficsConfig(
        **_TEXT,
        use_resampler=True,
        vision_config={
            "embed_dim": 24,
            "image_size": 8,
            "patch_size": 4,
            "intermediate_size": 32,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
        },
        perceiver_config={
            "use_resampler": True,
            "resampler_n_latents": 3,
            "resampler_depth": 2,
            "resampler_n_heads": 2,
            "resampler_head_dim": 8,
        },
    )
    return IdeficsForVisionText2Text(config)


def _idefics_inputs() -> dict[str, torch.Tensor]:
    ids = _ids()
    seen = (ids == IMAGE).cumsum(1)
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "pixel_values": _pixels(2, 3, 8, 8),
        "image_attention_mask": (seen[..., None] == torch.tensor([1, 2])).long(),
    }


def _mllama() -> nn.Module:
    from transformers import MllamaConfig, MllamaForConditionalGeneration

    text = {
        **_TEXT,
        "num_hidden_layers": 3,
        "num_key_value_heads": 2,
        "cross_attention_layers": [1, 2],
        "rope_scaling": {"rope_type": "default"},
        "max_position_embeddings": 64,
    }
    vision = {
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_global_layers": 1,
        "attention_heads": 2,
        "vision_output_dim": 32,
        "image_size": 8,
        "patch_size": 4,
        "intermediate_layers_indices": [0],
    }
    config = MllamaConfig(vision_config=vision, text_config=text, image_token_index=IMAGE)
    return MllamaForConditionalGeneration(config)


def _mllama_inputs() -> dict[str, torch.Tensor]:
    ids = _ids()
    # Of two images, of one and two tiles; the second, in row 1, comes right after the first.
    tiles = torch.tensor([1, 2])
    there = torch.arange(4) < tiles[:, None]
    seen = (ids == IMAGE).cumsum(1)
    attended = (seen[..., None] == torch.tensor([1, 2])) | (seen[..., None] == torch.tensor([9, 2]))
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "pixel_values": _pixels(2, 4, 3, 8, 8),
        "aspect_ratio_ids": tiles.expand(ROWS, 2).clone(),
        "aspect_ratio_mask": there.long().expand(ROWS, 2, 4).clone(),
        "cross_attention_mask": (attended[..., None] & there).long(),
    }


FAMILIES: dict[str, Family] = {
    family.name: family
    for family in (
        Family(
            "open_flamingo",
            _open_flamingo,
            _open_flamingo_inputs,
            ("GatedCrossAttentionBlock", "LlamaDecoderLayer", "PerceiverResampler"),
            ("to_q", "to_kv"),
        ),
        Family(
            "idefics",
            _idefics,
            _idefics_inputs,
            ("IdeficsGatedCrossAttentionLayer", "IdeficsDecoderLayer", "IdeficsPerceiverResampler"),
            ("q_proj", "v_proj"),
        ),
        Family(
            "mllama",
            _mllama,
            _mllama_inputs,
            (
                "MllamaCrossAttentionDecoderLayer",
                "MllamaSelfAttentionDecoderLayer",
                "MllamaVisionEncoderLayer",
            ),
            ("q_proj", "v_proj"),
        ),
    )
}


# In the names of modules that `recompute` wraps.
WRAPPED = "_checkpoint_wrapped_module"


def recompute(model: nn.Module) -> None:
    """Has layers run again in backward: transformers' by themselves, others in wrappers."""
    if hasattr(model, "gradient_checkpointing_enable"):
        model.gradient_checkpointing_enable({"use_reentrant": False})
        return
    from torch.distributed.algorithms._checkpoint import checkpoint_wrapper

    checkpoint_wrapper.apply_activation_checkpointing(
        model, check_fn=lambda module: hasattr(module, "_use_gradient_checkpointing")
    )


def assert_close(ours: Mapping[str, torch.Tensor], theirs: Mapping[str, torch.Tensor]) -> None:
    """In fp32; of gradients the largest of all says what is small."""
    assert ours.keys() == theirs.keys()
    largest = max(float(each.abs().max()) for name, each in theirs.items() if name[:2] == "d ")
    for name, each in theirs.items():
        atol = 1e-5 * (largest if name[:2] == "d " else 1)
        torch.testing.assert_close(
            ours[name], each, rtol=1e-4, atol=atol, msg=lambda text, name=name: f"{name}: {text}"
        )


def patched_names(model: nn.Module) -> set[str]:
    """What is patched, by the names that it has without PEFT's wrapper."""
    return {
        name.removeprefix("base_model.model.")
        for name, module in model.named_modules()
        if is_patched(module)
    }
