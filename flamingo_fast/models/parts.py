"""The parts of a model, made as a config says."""

import contextlib
import sys
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from flamingo_fast.models.chinchilla import ChinchillaLM
from flamingo_fast.models.config import (
    ConditioningConfig,
    ConfigError,
    FlamingoConfig,
    LanguageModelConfig,
    ResamplerConfig,
)
from flamingo_fast.models.extras import require
from flamingo_fast.modules import MLPResampler, PerceiverResampler, TransformerResampler

# What some language models do to logits after the last matrix product.
_LOGIT_CHANGES = ("final_logit_softcapping", "logit_scale", "logits_scaling")
# Names of learnt embeddings of positions.
_POSITION_EMBEDDINGS = ("wpe", "embed_positions", "position_embeddings")


def make_resampler(config: ResamplerConfig, features: int) -> nn.Module:
    """The resampler that the config says, of features so wide."""
    options: dict[str, Any] = {
        name: getattr(config, name)
        for name in ("dim", "depth", "ff_mult", "activation", "bias", "norm")
    }
    options |= {"max_num_frames": config.max_num_frames, "max_num_media": config.max_num_media}
    options["dim_media"] = None
    if config.project_features or features != config.dim:
        options["dim_media"] = features
    if config.kind == "mlp":
        return MLPResampler(**options)
    options |= {"heads": config.heads, "dim_head": config.dim_head}
    if config.kind == "transformer":
        return TransformerResampler(**options)
    return PerceiverResampler(num_latents=config.num_latents, **options)


def make_lang_model(
    config: LanguageModelConfig,
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> nn.Module:
    """The language model that the config says.

    Raises:
        ConfigError: neither a name nor a config of a causal language model of transformers.
    """
    if config.kind == "chinchilla":
        return ChinchillaLM(config, device=device, dtype=dtype)
    transformers = require("transformers")
    if config.name is not None and config.is_pretrained:
        with _named("lm.name", config.name):
            model = transformers.AutoModelForCausalLM.from_pretrained(config.name, dtype=dtype)
        return model.to(device)
    if config.hf_config is not None:
        where, value = "lm.hf_config", config.hf_config.get("model_type")
        hf_config = _hf_config(transformers, config.hf_config)
    elif config.name is not None:
        where, value = "lm.name", config.name
        with _named(where, value):
            hf_config = transformers.AutoConfig.from_pretrained(config.name)
    else:
        raise ConfigError(
            "lm.name, lm.hf_config: expected one of them where lm.kind is huggingface"
        )
    with _named(where, value), made_with(device=device, dtype=dtype):
        return transformers.AutoModelForCausalLM.from_config(hf_config)


@contextlib.contextmanager
def _named(where: str, value: str | None) -> Iterator[None]:
    """Inside, errors of transformers are those of a field."""
    try:
        yield
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"{where}: expected a causal language model of transformers, got {value!r} ({error})"
        ) from error


def _hf_config(transformers: Any, values: dict[str, Any]) -> Any:
    values = dict(values)
    try:
        return transformers.AutoConfig.for_model(values.pop("model_type"), **values)
    # transformers has errors of its own, which are not ValueErrors.
    except Exception as error:
        raise ConfigError(
            f"lm.hf_config: expected the config of a model of transformers, with its model_type "
            f"({type(error).__name__}: {error})"
        ) from error


@contextlib.contextmanager
def made_with(device: torch.device | str | None, dtype: torch.dtype | None) -> Iterator[None]:
    """Inside, modules are made there and of that dtype."""
    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype or default)
    try:
        with torch.device(device) if device is not None else contextlib.nullcontext():
            yield
    finally:
        torch.set_default_dtype(default)


def stack_config(
    config: LanguageModelConfig, conditioning: ConditioningConfig, dim: int
) -> LanguageModelConfig:
    """Of the layers that grafting adds: as those of the language model, where it is ours."""
    if config.kind == "chinchilla":
        return config
    return LanguageModelConfig(dim=dim, heads=conditioning.heads, dim_head=conditioning.dim_head)


def hidden_size(lang_model: Any) -> int:
    """Width of its hidden states."""
    config = lang_model.config
    return config.dim if isinstance(config, LanguageModelConfig) else config.hidden_size


def vocab_size_of(lang_model: Any) -> int:
    """Tokens that its embedding has, padding of the table among them."""
    return lang_model.get_input_embeddings().weight.shape[0]


def check_logits(lang_model: Any) -> None:
    """Whether its logits are a linear layer's of its last hidden states."""
    head = getattr(lang_model, "get_output_embeddings", lambda: None)()
    if head is None:
        raise ConfigError(
            f"lang_model: {type(lang_model).__name__} has no output embeddings; expected a causal "
            "language model, with its head"
        )
    for name in _LOGIT_CHANGES:
        if getattr(lang_model.config, name, None) not in (None, 1, 1.0):
            raise ConfigError(
                f"lang_model: {type(lang_model).__name__} changes its logits by {name}, which "
                "Flamingo doesn't; expected a model whose logits are a linear layer's"
            )


def max_tokens_of(lang_model: Any) -> int | None:
    """Tokens of a row at most, where positions have learnt embeddings (GPT-2, OPT)."""
    has_embeddings = any(
        name.rpartition(".")[2] in _POSITION_EMBEDDINGS for name, _ in lang_model.named_modules()
    )
    return lang_model.config.max_position_embeddings if has_embeddings else None


def inverts_masks(lang_model: Any) -> bool:
    """Whether a mask of four dimensions is 1 where it sees and 0 elsewhere: MPT of transformers 4.

    Others take bools, or what is added to scores.
    """
    module = sys.modules[type(getattr(lang_model, "base_model", lang_model)).__module__]
    return hasattr(module, "_prepare_4d_causal_attention_mask")


def check_token_ids(config: FlamingoConfig, vocab_size: int) -> None:
    """Whether the language model or `learnt_token_ids` has the config's tokens.

    Raises:
        ConfigError: neither does, by the field's name.
    """
    for name in ("image_token_id", "eoc_token_id"):
        token = getattr(config, name)
        if token is not None and token >= vocab_size and token not in config.learnt_token_ids:
            raise ConfigError(
                f"{name}: expected an id of the language model's {vocab_size} tokens or one of "
                f"learnt_token_ids, got {token}"
            )
