"""OpenFlamingo's models and checkpoints as ours.

It published its weights as pickles, which PyTorch's loader of weights alone reads.
"""

import dataclasses
import os
import pickle
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from flamingo_fast.models.conditioning import find_layers
from flamingo_fast.models.config import (
    ConditioningConfig,
    FlamingoConfig,
    LanguageModelConfig,
    ResamplerConfig,
    VisionConfig,
)
from flamingo_fast.models.flamingo import Flamingo
from flamingo_fast.models.parts import vocab_size_of
from flamingo_fast.models.saving import (
    PARTS_FROM_ELSEWHERE,
    CheckpointError,
    aliases_of,
    check_nothing_on_meta,
    hf_config_of,
    opened_safetensors,
    some_of,
)
from flamingo_fast.modules.checkpoints import canonical_state_dict, load_peer_state_dict


def open_flamingo_config(
    lang_model: nn.Module,
    vision_features: int = 1024,
    cross_attn_every_n_layers: int = 1,
    *,
    image_token_id: int,
    eoc_token_id: int,
    vision: VisionConfig | None = None,
) -> FlamingoConfig:
    """The config of a model of OpenFlamingo 2.0 (`src/flamingo.py`, `src/helpers.py`).

    It trains blocks, resampler and the language model's input embedding; the config says that the
    language model is frozen, embedding included.

    Arguments:
        lang_model: of transformers, with OpenFlamingo's tokens in its embedding
            (`resize_token_embeddings`) or not: then they become `learnt_token_ids`.
        vision_features: width of the vision encoder's tokens: 1024 of CLIP ViT-L/14.
        cross_attn_every_n_layers: 1 of its 3B models, 2 of 4B, 4 of 9B.
        image_token_id, eoc_token_id: of "<image>" and "<|endofchunk|>".
        vision: the encoder, for the record: OpenFlamingo's features are OpenCLIP's, so give the
            model its `visual` by `VisionEncoder.from_module`. By default ViT-L/14 for 224 pixels.

    Raises:
        ConfigError: ids after the vocabulary that are not the next ones.
    """
    shared: dict[str, Any] = {"heads": 8, "dim_head": 64, "activation": "gelu", "bias": False}
    tokens = {image_token_id, eoc_token_id}
    vocab_size = vocab_size_of(lang_model)
    return FlamingoConfig(
        vision=vision or VisionConfig("clip_vit_l14", 224, pad_images=False),
        resampler=ResamplerConfig(dim=vision_features, max_num_frames=None, **shared),
        conditioning=ConditioningConfig(
            every=cross_attn_every_n_layers,
            first=cross_attn_every_n_layers - 1,
            media_norm=False,
            **shared,
        ),
        lm=LanguageModelConfig(kind="huggingface", hf_config=hf_config_of(lang_model)),
        image_token_id=image_token_id,
        eoc_token_id=eoc_token_id,
        learnt_token_ids=tuple(sorted(token for token in tokens if token >= vocab_size)),
        datasets=(),
        p_next=0,
    )


@dataclasses.dataclass(frozen=True)
class OpenFlamingoReport:
    """What `load_open_flamingo` found; str() of it is for people.

    Attributes:
        loaded: keys of the model that got weights.
        kept: keys of its language model and vision encoder that the checkpoint has nothing for:
            OpenFlamingo leaves frozen weights out.
        missing: of resampler and blocks ("resampler.latents", "blocks.3.attn_gate", the number
            being the layer's) and of learnt tokens, what the checkpoint lacks.
        unexpected: names in the checkpoint that the model has no place for.
        duplicates: names of copies that were dropped.
    """

    loaded: tuple[str, ...]
    kept: tuple[str, ...]
    missing: tuple[str, ...]
    unexpected: tuple[str, ...]
    duplicates: tuple[str, ...]

    def __str__(self) -> str:
        lines = [
            f"OpenFlamingo checkpoint: {len(self.loaded)} weights loaded, {len(self.kept)} kept as "
            f"they were, {len(self.missing)} missing, {len(self.unexpected)} unexpected; "
            f"{len(self.duplicates)} copies dropped"
        ]
        lines += [f"  missing: {name}" for name in self.missing]
        lines += [f"  unexpected: {name}" for name in self.unexpected]
        return "\n".join(lines)


def load_open_flamingo(
    model: Flamingo,
    checkpoint: str | os.PathLike[str] | Mapping[str, Any],
    *,
    strict: bool = True,
) -> OpenFlamingoReport:
    """Copies an OpenFlamingo model's weights into ours; all or nothing.

    Arguments:
        model: as `open_flamingo_config` describes; it keeps its dtype and device.
        checkpoint: a state dict of OpenFlamingo's `Flamingo`, whole or as its training saves it,
            with or without "model_state_dict" around it; or the path of one, as PyTorch saves it
            (read with weights_only=True) or as safetensors. Of its embedding, which has more tokens
            than the language model had, the rows go to the language model's, or those after its
            vocabulary to `learnt_token_ids`.
        strict: whether missing and unexpected names are an error.

    Raises:
        TypeError: the state dict is no mapping of names to tensors.
        FileNotFoundError: no such file.
        CheckpointError: a file that can't be read so; an embedding of another size.
        ValueError: a model of another kind of conditioning; names that don't fit, if strict; shapes
            that don't. Nothing was copied then.
    """
    check_nothing_on_meta(model, "model")
    kind = model.config.conditioning.kind
    if kind != "gated_xattn_dense":
        raise ValueError(
            f"conditioning.kind: expected gated_xattn_dense, which OpenFlamingo has, got {kind!r}"
        )
    if not isinstance(checkpoint, Mapping):
        checkpoint = _read_open_flamingo(Path(checkpoint))
    sorted_out = canonical_state_dict(checkpoint, "open_flamingo")
    places: dict[str, torch.Tensor] = {}
    unexpected = []
    targets = {key: tensor for key, tensor in model.state_dict().items() if _is_elsewhere(key)}
    for name, tensor in sorted_out.other.items():
        found = _places(model, targets, name, tensor)
        if not found:
            unexpected.append(name)
        for key, value in found.items():
            if not torch.equal(places.setdefault(key, value), value):
                raise CheckpointError(
                    f"checkpoint: {name}: input and output embeddings of the new tokens differ, "
                    "which are one in the language model"
                )
    missing = []
    if model.tokens is not None and "tokens.weight" not in places:
        missing.append("tokens.weight")
    if strict and (missing or unexpected):
        raise CheckpointError(
            "checkpoint: doesn't fit the model; nothing was copied. Missing: "
            f"{some_of(missing) or 'nothing'}; unexpected: {some_of(unexpected) or 'nothing'}"
        )
    blocks = dict(zip(model.conditioning.layer_indices, model.conditioning.blocks, strict=True))
    peer_report = load_peer_state_dict(
        checkpoint,
        resampler=model.resampler,
        blocks=blocks,
        peer="open_flamingo",
        strict=strict,
    )
    model.load_state_dict(places, strict=False)
    aliases = aliases_of(model)
    loaded = {alias for key in places for alias in aliases.get(key, [key])}
    lacks = {_own_key(model, name) for name in peer_report.missing}
    own = {key for key in model.state_dict() if key.startswith(("resampler.", "conditioning."))}
    loaded |= own - lacks
    return OpenFlamingoReport(
        loaded=tuple(key for key in model.state_dict() if key in loaded),
        kept=tuple(key for key in targets if key not in loaded),
        missing=(*peer_report.missing, *missing),
        unexpected=(*peer_report.unexpected, *unexpected),
        duplicates=peer_report.duplicates,
    )


def _is_elsewhere(key: str) -> bool:
    return key.startswith(tuple(f"{name}." for name in PARTS_FROM_ELSEWHERE))


def _own_key(model: Flamingo, name: str) -> str:
    """The model's key of what a report calls "blocks.3.attn_gate"."""
    match = re.fullmatch(r"blocks\.(\d+)\.(.+)", name)
    if match is None:
        return name
    index = model.conditioning.layer_indices.index(int(match[1]))
    return f"conditioning.blocks.{index}.{match[2]}"


def _read_open_flamingo(path: Path) -> Mapping[str, Any]:
    if not path.is_file():
        raise FileNotFoundError(f"{path}: expected a checkpoint of OpenFlamingo, not there")
    if path.suffix == ".safetensors":
        with opened_safetensors(path) as file:
            return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    try:
        return torch.load(
            path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path)
        )
    # Of text that begins as opcodes do the unpickler looks up what is not there.
    except (pickle.UnpicklingError, RuntimeError, EOFError, LookupError) as error:
        raise CheckpointError(
            f"{path}: expected a file that torch.save wrote, of weights alone, got one that is "
            f"broken or has other objects in it, which are not loaded ({error})"
        ) from None


def _places(
    model: Flamingo, targets: Mapping[str, torch.Tensor], name: str, tensor: torch.Tensor
) -> dict[str, torch.Tensor]:
    """Our keys, and the values, of what belongs to neither resampler nor blocks; may be none."""
    key = _key_of(model, name)
    if key not in targets:
        return {}
    if targets[key].shape == tensor.shape:
        return {key: tensor}
    lang_model: Any = model.lang_model
    tokens, vocab_size = model.tokens, vocab_size_of(lang_model)
    is_embedding = targets[key].shape[:1] == (vocab_size,) and key.startswith("lang_model.")
    if is_embedding and tokens is not None and tensor.shape[0] == tokens.num_tokens:
        rows = torch.tensor(tokens.ids, device=tensor.device)
        head = lang_model.get_output_embeddings().weight
        is_head = tokens.head_weight is not None and model.get_parameter(key) is head
        own = "tokens.head_weight" if is_head else "tokens.weight"
        return {key: tensor[:vocab_size], own: tensor[rows]}
    hint = ""
    if is_embedding:
        hint = (
            f". Call lang_model.resize_token_embeddings({tensor.shape[0]}) before the model is made"
        )
    raise CheckpointError(
        f"checkpoint: {name}: expected the model's shape {tuple(targets[key].shape)}, got "
        f"{tuple(tensor.shape)}{hint}"
    )


def _key_of(model: Flamingo, name: str) -> str:
    # Wrappers of FSDP, checkpointing and torch.compile.
    name = ".".join(word for word in name.split(".") if not word.startswith("_"))
    match = re.fullmatch(r"(?:.*\.)?(vision_encoder|lang_encoder|lang_model)\.(.+)", name)
    if match is None:
        return name
    part, key = match[1], match[2]
    if part == "vision_encoder":
        return f"vision_encoder.model.{key}"
    layers = find_layers(model.lang_model)
    where = next(path for path, each in model.lang_model.named_modules() if each is layers)
    key = re.sub(r"^old_decoder_blocks\.", f"{where}.", key)
    key = re.sub(rf"^({re.escape(where)}\.\d+)\.decoder_layer\.", r"\1.", key)
    return f"lang_model.{key}"
