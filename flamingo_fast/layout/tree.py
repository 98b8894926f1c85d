"""MediaLayout as a pytree of its tensors, as torch.compile, FSDP and checkpointing have it."""

import dataclasses
from collections.abc import Iterable
from typing import Any

import torch
from torch.utils import _pytree as pytree

from flamingo_fast.layout.media_layout import MediaLayout
from flamingo_fast.namespace import NAMESPACE

_TENSORS = [field.name for field in dataclasses.fields(MediaLayout)][:-5]
_SIZES = [field.name for field in dataclasses.fields(MediaLayout)][-5:]


def _flatten(layout: MediaLayout) -> tuple[list[torch.Tensor], list[Any]]:
    # A None would be a leaf too, and what is mapped over leaves takes tensors.
    present = [name for name in _TENSORS if getattr(layout, name) is not None]
    sizes = [getattr(layout, name) for name in _SIZES]
    return [getattr(layout, name) for name in present], [present, *sizes]


def _flatten_with_keys(
    layout: MediaLayout,
) -> tuple[list[tuple[pytree.KeyEntry, Any]], list[Any]]:
    leaves, context = _flatten(layout)
    keys: list[pytree.KeyEntry] = [pytree.GetAttrKey(name) for name in context[0]]
    return list(zip(keys, leaves, strict=True)), context


def _unflatten(leaves: Iterable[Any], context: list[Any]) -> MediaLayout:
    present, *sizes = context
    fields: dict[str, Any] = dict.fromkeys(_TENSORS)
    fields.update(zip(present, leaves, strict=True))
    fields.update(zip(_SIZES, sizes, strict=True))
    return MediaLayout(**fields)


def register() -> None:
    """Tells PyTorch that a MediaLayout is a pytree of its tensors."""
    pytree.register_pytree_node(
        MediaLayout,
        _flatten,
        _unflatten,
        serialized_type_name=f"{NAMESPACE}.MediaLayout",
        to_dumpable_context=list,
        from_dumpable_context=list,
        flatten_with_keys_fn=_flatten_with_keys,
    )
