"""Whole models of peers, with random weights and open gates, and what is done with them."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from flamingo_fast.testing import peers

_PATCH = 14
_GATE = 0.5
# What is no text; all other ids are less than the vocabulary's size less two.
_EOS = 2


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Of all models alike: a language model of this width and depth, and a small vision encoder.

    Attributes:
        vision, vision_layers: width and depth of the vision encoder.
        features: width of OpenFlamingo's images' features, that of its published models' encoder.
        image: pixels of an image's side, of 14 to a patch.
        tile, large_tile: the same of a tile of Mllama's, of 4 to an image.
        resampler: depth of resamplers, where it can be chosen.
        shrink: tokens of text, and images, are so many times fewer.
    """

    hidden: int = 1024
    layers: int = 8
    heads: int = 16
    intermediate: int = 2816
    vocab: int = 32000
    vision: int = 512
    vision_layers: int = 2
    features: int = 1024
    image: int = 112
    tile: int = 280
    large_tile: int = 560
    resampler: int = 6
    latents: int = 64
    shrink: int = 1

    @property
    def image_id(self) -> int:
        return self.vocab - 1

    @property
    def eoc_id(self) -> int:
        return self.vocab - 2


@dataclasses.dataclass(frozen=True)
class Case:
    """What is done with a model.

    Attributes:
        mode: "prefill", a forward without gradients that keeps what decoding needs; "decode", a
            new token of `generate` after that; "train", a forward and a backward of the loss.
        rows, tokens, images: of a batch; images are of a row. For a resampler alone `tokens` are
            the features of one of `rows` images.
        new_tokens: of "decode", timed after the first.
        slow: not in a quick run.
    """

    name: str
    mode: str
    rows: int
    tokens: int
    images: int
    new_tokens: int = 0
    slow: bool = False

    @property
    def shape(self) -> str:
        new = f"+{self.new_tokens}" if self.new_tokens else ""
        return f"{self.rows}x{self.tokens}{new}, {self.images} images"

    def shrunk(self, sizes: Sizes) -> "Case":
        return dataclasses.replace(
            self,
            tokens=max(self.tokens // sizes.shrink, 8),
            images=max(self.images // sizes.shrink, min(self.images, 2)),
            new_tokens=min(self.new_tokens, max(32 // sizes.shrink, 3)),
        )


def _logits(model: nn.Module, inputs: dict[str, Any]) -> torch.Tensor:
    return model(**inputs, use_cache=True).logits


def _loss(model: nn.Module, inputs: dict[str, Any]) -> torch.Tensor:
    labels = inputs["lang_x"] if "lang_x" in inputs else inputs["input_ids"]
    return model(**inputs, labels=labels).loss


@dataclasses.dataclass(frozen=True)
class Peer:
    """A model and its cases.

    Attributes:
        build: raises ImportError if it can't be had.
        inputs: of a case, by name, for the model's forward and `generate`.
        about: its sizes, for people.
        forward, loss: of the model and its inputs, what "prefill" returns, and what "train" does.
    """

    name: str
    build: Callable[[Sizes], nn.Module]
    inputs: Callable[[Case, Sizes, torch.dtype], dict[str, Any]]
    about: Callable[[Sizes], str]
    cases: tuple[Case, ...]
    forward: Callable[[nn.Module, dict[str, Any]], torch.Tensor] = _logits
    loss: Callable[[nn.Module, dict[str, Any]], torch.Tensor] = _loss


def open_gates(model: nn.Module) -> nn.Module:
    """Gates start closed; behind closed ones a mistake would show nowhere."""
    for name, parameter in model.named_parameters():
        if "gate" in name.rpartition(".")[2] or "alpha" in name:
            if parameter.numel() == 1 or parameter.shape[:2] == (1, 1):
                parameter.data.fill_(_GATE)
    return model


def token_ids(case: Case, sizes: Sizes) -> torch.Tensor:
    """(rows, tokens): a first token of text, and images at even distances after it."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(10, sizes.eoc_id, (case.rows, case.tokens), generator=generator)
    for index in range(case.images):
        ids[:, 1 + index * (case.tokens - 1) // case.images] = sizes.image_id
    return ids


def _pixels(case: Case, side: int, dtype: torch.dtype, *more: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    shape = (case.rows, case.images, *more, 3, side, side)
    return torch.randn(shape, generator=generator).to(dtype)


class Patches(nn.Module):
    """An encoder of images that is one convolution: tokens, or as OpenCLIP's (pooled, tokens)."""

    def __init__(self, width: int, pooled: bool) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, width, _PATCH, _PATCH)
        self.pooled = pooled

    def forward(self, images: torch.Tensor) -> Any:
        tokens = self.conv(images).flatten(2).mT
        return (tokens.mean(1), tokens) if self.pooled else tokens


def _patches(side: int) -> int:
    return (side // _PATCH) ** 2


def llama_config(sizes: Sizes) -> Any:
    """Of transformers.

    Raises:
        ImportError: it is not installed.
    """
    from transformers import LlamaConfig

    return LlamaConfig(
        vocab_size=sizes.vocab,
        hidden_size=sizes.hidden,
        intermediate_size=sizes.intermediate,
        num_hidden_layers=sizes.layers,
        num_attention_heads=sizes.heads,
        max_position_embeddings=8192,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=_EOS,
    )


def open_flamingo(sizes: Sizes) -> nn.Module:
    """OpenFlamingo's model around a Llama.

    Raises:
        ImportError: OpenFlamingo or transformers is not installed.
    """
    from transformers import AutoModelForCausalLM

    return peers.open_flamingo_model(
        Patches(sizes.features, pooled=True),
        AutoModelForCausalLM.from_config(llama_config(sizes)),
        "model.layers",
        vis_dim=sizes.features,
        eoc_token_id=sizes.eoc_id,
        media_token_id=sizes.image_id,
    )


def open_flamingo_inputs(case: Case, sizes: Sizes, dtype: torch.dtype) -> dict[str, Any]:
    ids = token_ids(case, sizes)
    mask = torch.ones_like(ids)
    if case.mode == "decode":
        # transformers 5 leaves a mask of ones out, and OpenFlamingo's forward wants one.
        mask[:, 0] = 0
    return {
        "vision_x": _pixels(case, sizes.image, dtype, 1),
        "lang_x": ids,
        "attention_mask": mask,
    }


def _flamingo_pytorch(sizes: Sizes) -> nn.Module:
    return peers.flamingo_pytorch_palm().FlamingoPaLM(
        dim=sizes.hidden,
        num_tokens=sizes.vocab,
        depth=sizes.layers,
        dim_head=sizes.hidden // sizes.heads,
        heads=sizes.heads,
        media_token_id=sizes.image_id,
        cross_attn_every=1,
        img_encoder=Patches(sizes.hidden, pooled=False),
        perceiver_num_latents=sizes.latents,
    )


def _flamingo_pytorch_inputs(case: Case, sizes: Sizes, dtype: torch.dtype) -> dict[str, Any]:
    return {"text": token_ids(case, sizes), "images": _pixels(case, sizes.image, dtype)}


def _flamingo_pytorch_forward(model: nn.Module, inputs: dict[str, Any]) -> torch.Tensor:
    return model(inputs["text"], images=inputs["images"])


def _flamingo_pytorch_loss(model: nn.Module, inputs: dict[str, Any]) -> torch.Tensor:
    logits = _flamingo_pytorch_forward(model, inputs)
    return nn.functional.cross_entropy(
        logits[:, :-1].flatten(0, 1), inputs["text"][:, 1:].flatten()
    )


def _idefics(interval: int) -> Callable[[Sizes], nn.Module]:
    def build(sizes: Sizes) -> nn.Module:
        import transformers

        config = transformers.IdeficsConfig(
            vocab_size=sizes.vocab,
            hidden_size=sizes.hidden,
            intermediate_size=sizes.intermediate,
            num_hidden_layers=sizes.layers,
            num_attention_heads=sizes.heads,
            max_position_embeddings=8192,
            alpha_initializer="ones",
            cross_layer_interval=interval,
            use_resampler=True,
            vision_config={
                "embed_dim": sizes.vision,
                "image_size": sizes.image,
                "patch_size": _PATCH,
                "intermediate_size": 4 * sizes.vision,
                "num_hidden_layers": sizes.vision_layers,
                "num_attention_heads": max(sizes.vision // 64, 1),
            },
            perceiver_config={
                "resampler_n_latents": sizes.latents,
                "resampler_depth": sizes.resampler,
                "resampler_n_heads": max(sizes.vision // 64, 1),
                "resampler_head_dim": min(sizes.vision, 64),
                "use_resampler": True,
            },
        )
        model = transformers.IdeficsForVisionText2Text(config)
        model.model.vision_model.requires_grad_(False)
        return model

    return build


def _idefics_inputs(case: Case, sizes: Sizes, dtype: torch.dtype) -> dict[str, Any]:
    ids = token_ids(case, sizes)
    mask = peers.idefics_image_attention_mask(ids, sizes.image_id, _EOS, case.images)
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "pixel_values": _pixels(case, sizes.image, dtype),
        "image_attention_mask": mask,
    }


_TILES = 4


def _mllama(side: Callable[[Sizes], int]) -> Callable[[Sizes], nn.Module]:
    def build(sizes: Sizes) -> nn.Module:
        import transformers

        config = transformers.MllamaConfig(
            vision_config={
                "hidden_size": sizes.vision // 2,
                "intermediate_size": 2 * sizes.vision,
                "num_hidden_layers": sizes.vision_layers,
                "num_global_layers": 1,
                "attention_heads": max(sizes.vision // 128, 1),
                "vision_output_dim": sizes.vision // 2 * 2,
                "image_size": side(sizes),
                "patch_size": _PATCH,
                "max_num_tiles": _TILES,
                "intermediate_layers_indices": [0],
            },
            text_config={
                "vocab_size": sizes.vocab,
                "hidden_size": sizes.hidden,
                "intermediate_size": sizes.intermediate,
                "num_hidden_layers": sizes.layers,
                "num_attention_heads": sizes.heads,
                "num_key_value_heads": max(sizes.heads // 4, 1),
                "cross_attention_layers": [sizes.layers // 2 - 1, sizes.layers - 1],
                "rope_scaling": {"rope_type": "default"},
                "pad_token_id": 0,
                "bos_token_id": 1,
                "eos_token_id": _EOS,
            },
            image_token_index=sizes.image_id,
        )
        model = transformers.MllamaForConditionalGeneration(config)
        model.model.vision_model.requires_grad_(False)
        return model

    return build


def _mllama_inputs(
    side: Callable[[Sizes], int],
) -> Callable[[Case, Sizes, torch.dtype], dict[str, Any]]:
    def inputs(case: Case, sizes: Sizes, dtype: torch.dtype) -> dict[str, Any]:
        # The id of an image may be past the embedding's end in a published model; not here.
        ids = token_ids(case, sizes)
        tiles = [[_TILES] * case.images] * case.rows
        # 2 x 2 tiles, number 6 in the list of supported aspect ratios from 1 on.
        return {
            "input_ids": ids,
            "attention_mask": torch.ones_like(ids),
            "pixel_values": _pixels(case, side(sizes), dtype, _TILES),
            "aspect_ratio_ids": torch.full((case.rows, case.images), 6),
            "aspect_ratio_mask": torch.ones(case.rows, case.images, _TILES, dtype=torch.int64),
            "cross_attention_mask": peers.mllama_cross_attention_mask(
                ids.tolist(), sizes.image_id, tiles, _TILES
            ),
        }

    return inputs


def _idefics2_perceiver(sizes: Sizes) -> nn.Module:
    from transformers.models.idefics2 import configuration_idefics2, modeling_idefics2

    config = configuration_idefics2.Idefics2PerceiverConfig(
        hidden_size=sizes.hidden,
        resampler_n_latents=sizes.latents,
        resampler_depth=min(sizes.resampler, 3),
        resampler_n_heads=sizes.heads,
        resampler_head_dim=96,
        num_key_value_heads=max(sizes.heads // 4, 1),
    )
    config._attn_implementation = "sdpa"
    module = modeling_idefics2.Idefics2PerceiverResampler(config)
    # They start as ones, all alike: each would get the same.
    nn.init.normal_(module.latents, generator=torch.Generator().manual_seed(2))
    return module


def _idefics2_inputs(case: Case, sizes: Sizes, dtype: torch.dtype) -> dict[str, Any]:
    """Images of different sizes: the first fills its row, the last half of it."""
    generator = torch.Generator().manual_seed(1)
    context = torch.randn(case.rows, case.tokens, sizes.hidden, generator=generator).to(dtype)
    lengths = torch.linspace(case.tokens, case.tokens // 2, case.rows).long()
    mask = torch.arange(case.tokens) < lengths[:, None]
    return {"context": context.requires_grad_(), "attention_mask": mask.long()}


def _idefics2_forward(model: nn.Module, inputs: dict[str, Any]) -> torch.Tensor:
    return model(**inputs)


def _idefics2_loss(model: nn.Module, inputs: dict[str, Any]) -> torch.Tensor:
    # Not the square's mean: after an RMS norm that is always the same.
    return model(**inputs).float().relu().mean()


def _common(sizes: Sizes) -> str:
    return f"{sizes.hidden} wide, {sizes.layers} layers, vocabulary {sizes.vocab}"


def _few_latents(sizes: Sizes) -> str:
    """Of models whose resampler is the peer's default."""
    return f"{_common(sizes)}; {_patches(sizes.image)} features an image, by one convolution"


def _open_flamingo_about(sizes: Sizes) -> str:
    return f"{_few_latents(sizes)}, {sizes.features} wide"


def _idefics_about(sizes: Sizes) -> str:
    return (
        f"{_common(sizes)}; vision encoder {sizes.vision} wide, {sizes.vision_layers} layers, "
        f"{_patches(sizes.image) + 1} features an image; resampler of {sizes.resampler} layers"
    )


def _mllama_about(side: Callable[[Sizes], int]) -> Callable[[Sizes], str]:
    return lambda sizes: (
        f"{_common(sizes)}, 2 of cross-attention; vision encoder {sizes.vision // 2} wide, "
        f"{sizes.vision_layers}+1 layers; {_TILES} tiles of {_patches(side(sizes)) + 1} tokens"
    )


def _idefics2_about(sizes: Sizes) -> str:
    return f"{sizes.hidden} wide, {min(sizes.resampler, 3)} layers; images of several sizes"


_PREFILL = Case("prefill_16", "prefill", 1, 2048, 16)
_SHORT = Case("prefill_1", "prefill", 1, 256, 1)
_TRAIN = Case("train", "train", 4, 256, 5)
_MODEL = (
    _PREFILL,
    _SHORT,
    Case("decode_16", "decode", 1, 512, 16, 32),
    Case("decode_1", "decode", 1, 64, 1, 32),
    _TRAIN,
)


def _tile(sizes: Sizes) -> int:
    return sizes.tile


def _large_tile(sizes: Sizes) -> int:
    return sizes.large_tile


PEERS: Mapping[str, Peer] = {
    peer.name: peer
    for peer in (
        Peer(
            "open_flamingo",
            open_flamingo,
            open_flamingo_inputs,
            _open_flamingo_about,
            _MODEL,
        ),
        Peer(
            "flamingo_pytorch",
            _flamingo_pytorch,
            _flamingo_pytorch_inputs,
            _few_latents,
            # Its resampler has embeddings of four images' places.
            (
                Case("prefill_4", "prefill", 1, 2048, 4),
                _SHORT,
                Case("train", "train", 4, 256, 4),
            ),
            forward=_flamingo_pytorch_forward,
            loss=_flamingo_pytorch_loss,
        ),
        Peer("idefics", _idefics(1), _idefics_inputs, _idefics_about, _MODEL),
        Peer("idefics_every_4", _idefics(4), _idefics_inputs, _idefics_about, _MODEL),
        Peer(
            "idefics2_perceiver",
            _idefics2_perceiver,
            _idefics2_inputs,
            _idefics2_about,
            (Case("forward", "prefill", 8, 512, 1), Case("train", "train", 8, 512, 1)),
            forward=_idefics2_forward,
            loss=_idefics2_loss,
        ),
        Peer(
            "mllama",
            _mllama(_tile),
            _mllama_inputs(_tile),
            _mllama_about(_tile),
            (
                Case("prefill_1", "prefill", 1, 2048, 1),
                Case("prefill_4", "prefill", 1, 2048, 4),
                Case("decode_1", "decode", 1, 64, 1, 32),
                Case("decode_4", "decode", 1, 512, 4, 32),
                Case("train", "train", 4, 256, 1),
            ),
        ),
        Peer(
            "mllama_large",
            _mllama(_large_tile),
            _mllama_inputs(_large_tile),
            _mllama_about(_large_tile),
            (
                Case("prefill_1", "prefill", 1, 4096, 1, slow=True),
                Case("decode_1", "decode", 1, 64, 1, 32),
            ),
        ),
    )
}


def build(peer: Peer, sizes: Sizes, dtype: torch.dtype, device: torch.device) -> nn.Module:
    """The same weights in every run, with open gates.

    Raises:
        ImportError: something is not installed.
    """
    torch.manual_seed(0)
    return open_gates(peer.build(sizes)).to(device, dtype)


def selected(names: tuple[str, ...], quick: bool) -> list[tuple[Peer, tuple[Case, ...]]]:
    """Peers with their cases, by names such as "idefics" or "idefics.decode_16"; of all if none.

    Raises:
        ValueError: an unknown name.
    """
    known = {f"{peer.name}.{case.name}" for peer in PEERS.values() for case in peer.cases}
    for name in names:
        if name not in PEERS and name not in known:
            raise ValueError(
                f"unknown family {name!r}; known: {', '.join(PEERS)}, "
                "and their cases, such as idefics.decode_16"
            )
    found = []
    for peer in PEERS.values():
        cases = tuple(
            case
            for case in peer.cases
            if f"{peer.name}.{case.name}" in names
            or ((not names or peer.name in names) and not (quick and case.slow))
        )
        if cases:
            found.append((peer, cases))
    return found
