"""Rules of transformers' Idefics2: its perceiver, and its RMS norms.

N images, P patches of each, R latents, H query heads, Hkv key/value heads, D head dim.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from flamingo_fast.layout import values_are_at_hand
from flamingo_fast.modules.plain import has_hooks
from flamingo_fast.ops.latent_attention import latent_attention
from flamingo_fast.patching.attention import project_both, random_like
from flamingo_fast.patching.norms import rms_norm_rule
from flamingo_fast.patching.options import Options
from flamingo_fast.patching.rules import Call, Rule, has, is_a, own_code
from flamingo_fast.patching.state import is_patched, own_forward, tell_once
from flamingo_fast.patching.transformers_hooks import ATTENTION

_ATTENTION = "idefics2.perceiver_attention"
# Attention functions that all compute the same.
_IMPLEMENTATIONS = ("eager", "sdpa", "flex_attention", ATTENTION)
_DROPOUT = "attention dropout in training"


def attention_forward(
    self: Any,
    latents: torch.Tensor,
    context: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    position_ids: torch.Tensor | None = None,
    past_key_values: Any = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Latents (N, R, width) attend to the context (N, P, width) and to themselves.

    Arguments:
        attention_mask: what the perceiver's fast forward gives, (N,) integers, the valid patches
            of each image, its first ones; or the peer's.
    """
    # transformers 4 calls it past_key_values.
    cache = (past_key_values, kwargs.get("cache"), *(getattr(self, each, None) for each in _CACHES))
    reason = _why_not(self, kwargs)
    if reason is not None:
        tell_once(self, reason)
    is_dense = attention_mask is not None and attention_mask.dim() != 1
    if reason is not None or is_dense or any(each is not None for each in cache):
        return own_forward(self)(
            latents, context, attention_mask, position_ids, past_key_values, **kwargs
        )

    keys = project_both(self.k_proj, context, latents)
    values = project_both(self.v_proj, context, latents)
    q, k_media, v_media, k_latents, v_latents = (
        each.unflatten(-1, (-1, self.head_dim))
        for each in (self.q_proj(latents), keys[0], values[0], keys[1], values[1])
    )
    attended = latent_attention(
        q,
        k_media,
        v_media,
        k_latents,
        v_latents,
        media_seqlens=attention_mask,
        softmax_scale=self.scaling,
    )
    return self.o_proj(attended.flatten(-2)), None


_CACHES = ("cache", "past_key_values")


def perceiver_forward(
    self: Any, context: torch.Tensor, attention_mask: torch.Tensor, **kwargs: Any
) -> torch.Tensor:
    """context (N, P, width), attention_mask (N, P), 0 at padding, to (N, R, width)."""
    attentions = [layer.self_attn for layer in self.layers]
    reasons = [_why_not(attn, kwargs) for attn in attentions]
    reason = next((each for each in reasons if each is not None), None)
    if reason is not None:
        tell_once(self, reason)
    if reason is not None or not all(is_patched(attn, _ATTENTION) for attn in attentions):
        return own_forward(self)(context, attention_mask, **kwargs)
    context, media_seqlens = _valid_first(context, attention_mask.to(context.device, torch.bool))
    latents = self.latents.expand(context.shape[0], -1, -1)
    for layer in self.layers:
        latents = layer(latents, context, attention_mask=media_seqlens, position_ids=None, **kwargs)
    return self.norm(latents)


def _why_not(attn: Any, kwargs: dict[str, Any]) -> str | None:
    if kwargs.get("output_attentions"):
        return "output_attentions"
    if attn.training and attn.attention_dropout > 0:
        return _DROPOUT
    name = attn.config._attn_implementation
    if name not in _IMPLEMENTATIONS and not name.startswith("flash_attention"):
        return f"the attention implementation {name!r}"
    if name == "eager" and has_hooks(attn):
        return "hooks on its attention may look at weights"
    return None


def _valid_first(
    context: torch.Tensor, mask: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The context with each image's valid patches first, and their numbers; None: all are.

    Attention does not depend on the order of its keys. Patches that are padding in all images are
    left out, where the mask's values are at hand.
    """
    lengths = mask.sum(1)
    longest = mask.shape[1]
    if values_are_at_hand(mask):
        if mask.all():
            return context, None
        longest = int(lengths.max())
        if not (mask[:, 1:] & ~mask[:, :-1]).any():
            return context[:, :longest], lengths
    order = torch.argsort(~mask, dim=1, stable=True)[:, :longest]
    order = order + torch.arange(len(mask), device=mask.device)[:, None] * mask.shape[1]
    # The quickest of PyTorch's ways to take rows, and its backward needs no atomic additions.
    return F.embedding(order, context.flatten(0, 1)), lengths


def _is_perceiver_attention(module: nn.Module) -> bool:
    return is_a(module, "Idefics2PerceiverAttention") and has(
        module, ("q_proj", "k_proj", "v_proj", "o_proj")
    )


def _is_perceiver(module: nn.Module) -> bool:
    return is_a(module, "Idefics2PerceiverResampler") and has(
        module, ("layers", "norm"), ("latents",)
    )


def _perceiver_code(perceiver: nn.Module) -> Sequence[Callable[..., Any]]:
    layers: Any = perceiver.layers
    kinds = dict.fromkeys(type(layer) for layer in layers)
    return type(perceiver).forward, *(kind.forward for kind in kinds)


def _perceiver_refuses(
    perceiver: nn.Module, options: Options, will_patch: Callable[[nn.Module], bool]
) -> str | None:
    layers: Any = perceiver.layers
    if not all(will_patch(layer.self_attn) for layer in layers):
        return "its attentions are left alone"
    return None


def _notes(attn: Any, options: Options) -> Sequence[str]:
    if attn.attention_dropout > 0:
        return ("Idefics2 perceiver: with attention dropout, its own forward runs in training",)
    return ()


def _attention_probes(attn: nn.Module) -> Iterator[Call]:
    weight: Any = attn.get_parameter("q_proj.weight")
    latents, context = (random_like(weight, 2, n, weight.shape[1]) for n in (3, 5))
    yield (), {"latents": latents, "context": context}


def _perceiver_probes(perceiver: nn.Module) -> Iterator[Call]:
    latents: Any = perceiver.latents
    context = random_like(latents, 3, 6, latents.shape[1])
    masks = torch.tensor([[1] * 6, [1, 0, 1, 1, 0, 0], [0] * 6], device=latents.device).bool()
    yield (), {"context": context, "attention_mask": torch.ones_like(masks)}
    yield (), {"context": context, "attention_mask": masks}


RULES: tuple[Rule, ...] = (
    rms_norm_rule(
        "idefics2",
        "Idefics2RMSNorm",
        {"f5c95295c0f85e5a": "transformers 4.57.1 to 5.24.0"},
    ),
    Rule(
        name=_ATTENTION,
        features=("resampler",),
        matches=_is_perceiver_attention,
        forward=attention_forward,
        known={
            "cfb80fa62ba0fe6a": "transformers 4.57.1",
            "9d76705374c07903": "transformers 5.24.0",
        },
        code=own_code("eager_attention_forward", "repeat_kv"),
        notes=_notes,
        probes=_attention_probes,
    ),
    Rule(
        name="idefics2.perceiver",
        features=("resampler",),
        matches=_is_perceiver,
        forward=perceiver_forward,
        known={
            "183989baed3c8a8b": "transformers 4.57.1",
            "e365b042be395a2a": "transformers 5.24.0",
        },
        code=_perceiver_code,
        refuses=_perceiver_refuses,
        probes=_perceiver_probes,
    ),
)
