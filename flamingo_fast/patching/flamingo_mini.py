"""Rules of flamingo-mini (github.com/dhansmair/flamingo-mini) and what has its classes' structure.

Its cross-attention is OpenFlamingo's to the last image alone, with other names; and it returns the
media's keys and values, which it takes back while tokens are generated.

B batch, L text tokens, N media of a sample, R tokens of a medium, H heads, D head dim.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from flamingo_fast.layout import MediaLayout, values_are_at_hand
from flamingo_fast.modules.cross_attention import MediaKV
from flamingo_fast.ops.latent_attention import latent_attention
from flamingo_fast.patching.attention import (
    UNUSUAL,
    attend,
    attend_together,
    by_head,
    finish_block,
    layout_of,
    leave_unattended,
    leaves_one_medium,
    opened_gates,
    probe_inputs,
    project_both,
    project_media,
    random_like,
    refuses_block,
    trains_16_bits_on_cpu,
)
from flamingo_fast.patching.rules import Call, Rule, has, takes
from flamingo_fast.patching.state import options_of, own_forward, tell_once
from flamingo_fast.ranges import within


def _is_attention(module: nn.Module) -> bool:
    return (
        has(module, modules=("norm", "to_q", "to_kv", "to_out"))
        and all(hasattr(module, name) for name in ("heads", "scale", "n_visual"))
        and takes(module, "y", "media_locations", "visual_features", "previous_kv", "output_kv")
    )


def _is_block(module: nn.Module) -> bool:
    return (
        has(module, modules=("attn", "ffw"), tensors=("alpha_attn", "alpha_ffw"))
        and _is_attention(module.attn)  # type: ignore[arg-type]
        and takes(module, "y", "media_locations", "visual_features", "previous_kv", "output_kv")
    )


def _is_perceiver_attention(module: nn.Module) -> bool:
    return (
        has(module, modules=("norm_media", "norm_latents", "to_q", "to_k", "to_v", "to_out"))
        and all(hasattr(module, name) for name in ("heads", "scale"))
        and takes(module, "features", "latents")
    )


def _layout(
    attn: Any,
    y: torch.Tensor,
    media_locations: torch.Tensor,
    visual_features: torch.Tensor | None,
    previous_kv: MediaKV | None,
) -> MediaLayout | None:
    """None: of shapes or dtypes that are for the peer to take or refuse."""
    batch, tokens = y.shape[:2]
    locations = media_locations
    # Text without media may have zeros of the ids' dtype. On a GPU nothing keeps their layout, and
    # it takes longer than the peer's mask.
    if locations.dtype != torch.bool and not values_are_at_hand(locations):
        return None
    if previous_kv is None:
        assert visual_features is not None
        num_media = visual_features.shape[1]
        expected = (batch, num_media, attn.n_visual)
        fits = visual_features.dim() == 4 and visual_features.shape[:3] == expected
        fits = fits and locations.shape == (batch, tokens)
    else:
        num_media = previous_kv[0].shape[2] // attn.n_visual
        fits = previous_kv[0].shape[:3] == (batch, attn.heads, num_media * attn.n_visual)
        fits = fits and locations.shape[0] == batch and locations.shape[1] >= tokens
    if not fits or num_media == 0:
        return None
    if locations.shape[1] > tokens == 1:
        return layout_of(attn, locations, num_media, after=1)
    layout = layout_of(attn, locations, num_media)
    return layout if locations.shape[1] == tokens else layout.last(tokens)


def _would_copy(self: Any, previous_kv: MediaKV) -> bool:
    """Whether keys are no longer laid out by medium, as after a choice of beams.

    For one token it takes longer to copy them than to attend to all.
    """
    k = previous_kv[0]
    has_several = k.shape[2] > self.n_visual
    return (
        has_several
        and k.stride(0) != k.shape[2] * k.stride(2)
        and options_of(self).unattended is None
    )


def attention(
    self: Any,
    y: torch.Tensor,
    media_locations: torch.Tensor,
    visual_features: torch.Tensor,
    previous_kv: MediaKV | None = None,
    output_kv: bool = False,
) -> tuple[torch.Tensor, MediaKV | None]:
    """(B, L, dim), and with `output_kv` keys and values (B, H, N * R, D).

    Arguments:
        y: (B, L, dim).
        media_locations: (B, L), and longer with `previous_kv`: y are the last tokens.
        visual_features: (B, N, R, dim_visual).
        previous_kv: keys and values from before, in place of those of visual_features.
    """
    would_copy = previous_kv is not None and y.shape[1] == 1 and _would_copy(self, previous_kv)
    if would_copy or leaves_one_medium(self, y, visual_features.shape[1]):
        return own_forward(self)(
            y, media_locations, visual_features, previous_kv=previous_kv, output_kv=output_kv
        )
    layout = _layout(self, y, media_locations, visual_features, previous_kv)
    if layout is None:
        tell_once(self, UNUSUAL)
        return own_forward(self)(
            y, media_locations, visual_features, previous_kv=previous_kv, output_kv=output_kv
        )
    q = self.to_q(self.norm(y))
    if previous_kv is None:
        media_kv = project_media(self, visual_features)
    else:
        k, v = (each.transpose(1, 2).unflatten(1, (-1, self.n_visual)) for each in previous_kv)
        media_kv = k, v
    out = self.to_out(attend(self, q, media_kv, layout))
    if not output_kv:
        return out, None
    if previous_kv is None:
        k, v = (each.flatten(1, 2).transpose(1, 2) for each in media_kv)
        previous_kv = k, v
    return out, (previous_kv[0], previous_kv[1])


def block(
    self: Any,
    y: torch.Tensor,
    visual_features: torch.Tensor,
    media_locations: torch.Tensor,
    previous_kv: MediaKV | None = None,
    output_kv: bool = False,
) -> tuple[torch.Tensor, MediaKV | None]:
    """Arguments and results of `attention`, in another order."""
    if previous_kv is None and visual_features.dim() != 4:
        return own_forward(self)(y, visual_features, media_locations, previous_kv, output_kv)
    options = options_of(self)
    attended, kv = within(
        "attention",
        self.attn,
        y,
        media_locations,
        visual_features,
        previous_kv=previous_kv,
        output_kv=output_kv,
    )
    out = finish_block(y, attended, self.alpha_attn, self.ffw, self.alpha_ffw, options)
    if options.unattended == "zero_block":
        layout = _layout(self.attn, y, media_locations, visual_features, previous_kv)
        out = leave_unattended(y, out, layout)
    return out, kv


def perceiver_attention(self: Any, features: torch.Tensor, latents: torch.Tensor) -> torch.Tensor:
    """(B, R, dim) of features (B, S, dim) and latents (B, R, dim)."""
    is_usual = features.dim() == 3 and features.shape[::2] == latents.shape[::2]
    if not is_usual or trains_16_bits_on_cpu(features):
        return own_forward(self)(features, latents)
    features, latents = self.norm_media(features), self.norm_latents(latents)
    q = self.to_q(latents)
    if features.device.type == "cpu":
        both = torch.cat((features, latents), 1)
        return self.to_out(attend_together(self, q, self.to_k(both), self.to_v(both)))
    k = project_both(self.to_k, features, latents)
    v = project_both(self.to_v, features, latents)
    attended = latent_attention(
        *(by_head(each, self.heads) for each in (q, k[0], v[0], k[1], v[1])),
        softmax_scale=self.scale,
    )
    return self.to_out(attended.flatten(-2))


def _attention_probes(module: Any) -> Iterator[Call]:
    # As many media as image tokens, fewer, and more.
    for media in (3, 2, 4):
        y, visual, locations = probe_inputs(module, media, module.n_visual)
        yield (y, locations, visual), {"output_kv": True}
        # By medium, as `attention` returns them: copies of others take the module's own forward.
        width = module.to_q.out_features // module.heads
        kv = random_like(y, 2, 2, media * module.n_visual, module.heads, width)
        k, v = kv.transpose(2, 3)
        yield (y[:, -2:], locations, visual), {"previous_kv": (k, v)}
        yield (y[:, -1:], locations, visual), {"previous_kv": (k, v), "output_kv": True}


def _block_probes(module: Any) -> Iterator[Call]:
    with opened_gates(module, "alpha_attn", "alpha_ffw"):
        y, visual, locations = probe_inputs(module.attn, 3, module.attn.n_visual)
        yield (y, visual, locations), {"output_kv": True}


def _perceiver_probes(module: Any) -> Iterator[Call]:
    weight = module.to_k.weight
    features, latents = (random_like(weight, 2, tokens, weight.shape[1]) for tokens in (9, 4))
    yield (features, latents), {}


RULES: tuple[Rule, ...] = (
    Rule(
        name="flamingo_mini.attention",
        features=("cross_attention",),
        matches=_is_attention,
        forward=attention,
        known={
            "35d3565f3c72161d": "flamingo-mini e3da4bb",
            "760ff59ac453c755": "flamingo-mini 196c64b",
        },
        probes=_attention_probes,
    ),
    Rule(
        name="flamingo_mini.block",
        features=("cross_attention", "gated_residual"),
        matches=_is_block,
        forward=block,
        known={"b6356ad81593f7d6": "flamingo-mini e3da4bb"},
        refuses=refuses_block,
        probes=_block_probes,
    ),
    Rule(
        name="flamingo_mini.perceiver_attention",
        features=("resampler",),
        matches=_is_perceiver_attention,
        forward=perceiver_attention,
        known={"fe0fc14c8a4698de": "flamingo-mini e3da4bb"},
        probes=_perceiver_probes,
    ),
)
