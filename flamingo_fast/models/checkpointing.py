"""Activation checkpointing of the layers of transformers' language models."""

import functools
from collections.abc import Iterable
from typing import Any

from torch import nn
from torch.utils.checkpoint import checkpoint

from flamingo_fast.models.config import ConfigError


def checkpoint_layers(
    layers: Iterable[Any], enable: bool, *, is_frozen: bool, context_fn: Any
) -> None:
    """Has each layer checkpoint its activations, or no longer.

    Arguments:
        layers: of a language model of transformers.
        is_frozen: whether they stay in eval mode.
        context_fn: of `torch.utils.checkpoint.checkpoint`.

    Raises:
        ConfigError: a layer that can't.
    """
    for layer in layers:
        if not hasattr(layer, "gradient_checkpointing"):
            raise ConfigError(f"lang_model: {type(layer).__name__} has no activation checkpointing")
        # Not gradient_checkpointing_enable, which also makes the embedding's output require
        # gradients, and so everything up to the first block.
        layer.gradient_checkpointing = enable
        function = _in_eval_mode if is_frozen else _called
        layer._gradient_checkpointing_func = functools.partial(
            _checkpointed, function, layer, context_fn
        )


def _checkpointed(caller: Any, layer: nn.Module, context_fn: Any, function: Any, *args: Any) -> Any:
    return checkpoint(caller, layer, function, *args, use_reentrant=False, context_fn=context_fn)


def _called(layer: nn.Module, function: Any, *args: Any) -> Any:
    return function(*args)


def _in_eval_mode(layer: nn.Module, function: Any, *args: Any) -> Any:
    """A layer that was told to train, to be checkpointed, has no dropout of its own (OPT's has)."""
    layer.training, was_training = False, layer.training
    try:
        return function(*args)
    finally:
        layer.training = was_training
