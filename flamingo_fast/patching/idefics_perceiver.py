"""The perceiver resampler of transformers' Idefics.

B images, S features of an image, R latents, H heads, D head dim, W width.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import nn

from flamingo_fast.ops.latent_attention import latent_attention
from flamingo_fast.patching.attention import random_like
from flamingo_fast.patching.kept import current
from flamingo_fast.patching.rules import Call, Rule, has, is_a
from flamingo_fast.patching.state import does_more, options_of, own_forward
from flamingo_fast.ranges import within


def forward(self: nn.Module, context: torch.Tensor) -> torch.Tensor:
    """context (B, S, W) to (B, R, W)."""
    options = options_of(self)
    kept = current() if options.media_kv_cache and not self.training else None
    weights = () if kept is None else tuple(self.parameters())
    if kept is not None and (found := kept.recall(self, context, *weights)) is not None:
        return found
    resampled = _resample(self, context) if options.resampler else own_forward(self)(context)
    if kept is not None:
        kept.keep(self, context, resampled, *weights)
    return resampled


def _resample(self: Any, context: torch.Tensor) -> torch.Tensor:
    # Of all images the first block's latents are the same.
    latents = self.latents[None]
    for index, block in enumerate(self.blocks):
        latents = within(f"layer {index}", _layer, block, latents, context)
    return self.layer_norm(latents.expand(context.shape[0], -1, -1))


def _layer(block: Any, latents: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
    attn, ff = block
    if _is_plain(attn):
        attended = _attend(attn, context, latents)
    else:
        latents = latents.expand(context.shape[0], -1, -1)
        attended = attn(context, latents)
    latents = attended + latents
    return ff(latents) + latents


def _is_plain(attn: Any) -> bool:
    """Whether nobody looks at what is done otherwise: keys of images and latents on their own."""
    return not any(map(does_more, (attn, attn.k_proj, attn.v_proj)))


def _attend(attn: Any, context: torch.Tensor, latents: torch.Tensor) -> torch.Tensor:
    """context (B, S, W), latents (B or 1, R, W) to (B, R, W)."""
    context = attn.context_layer_norm(context)
    latents = attn.latents_layer_norm(latents)

    def by_head(projected: torch.Tensor) -> torch.Tensor:
        return projected.unflatten(-1, (attn.n_heads, attn.head_dim))

    q, k_media, v_media = (
        by_head(attn.q_proj(latents)),
        by_head(attn.k_proj(context)),
        by_head(attn.v_proj(context)),
    )
    k_latents, v_latents = by_head(attn.k_proj(latents)), by_head(attn.v_proj(latents))
    if attn.qk_layer_norms:
        q = attn.q_layer_norm(q).to(v_media.dtype)
        k_media, k_latents = (
            attn.k_layer_norm(each).to(v_media.dtype) for each in (k_media, k_latents)
        )
    of_latents = (each.expand(context.shape[0], -1, -1, -1) for each in (q, k_latents, v_latents))
    q, k_latents, v_latents = of_latents
    attended = latent_attention(
        q, k_media, v_media, k_latents, v_latents, softmax_scale=attn.qk_scale
    )
    return attn.output_proj(attended.flatten(-2))


def _matches(module: nn.Module) -> bool:
    return is_a(module, "IdeficsPerceiverResampler") and has(
        module, modules=("blocks", "layer_norm"), tensors=("latents",)
    )


def _code(module: nn.Module) -> Sequence[Callable[..., Any]]:
    blocks: Any = module.blocks
    attentions = dict.fromkeys(type(attn).forward for attn, _ in blocks)
    return (type(module).forward, *attentions)


def _probes(module: nn.Module) -> Iterator[Call]:
    latents: Any = module.latents
    yield (random_like(latents, 3, 5, latents.shape[-1]),), {}


RULE = Rule(
    name="idefics.perceiver",
    features=("resampler", "media_kv_cache"),
    matches=_matches,
    forward=forward,
    known={"2a87b8b417028cf5": "transformers 4.57.1, 5.24.0"},
    code=_code,
    probes=_probes,
)
