"""Rules of Otter (github.com/Luodian/Otter), its copy of Flamingo, and what has their structure.

OpenFlamingo's first version, with feed-forwards that are lists, and attention to the next image.

B batch, L text tokens, N media of a sample, R tokens of a medium, S features of a medium.
"""

import inspect
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import nn

from flamingo_fast.layout import MediaLayout
from flamingo_fast.patching import open_flamingo
from flamingo_fast.patching.attention import (
    UNUSUAL,
    finish_block,
    layout_of,
    leave_unattended,
    leaves_one_medium,
    one_after_the_other,
    opened_gates,
    probe_inputs,
    refuses_block,
    trains_16_bits_on_cpu,
)
from flamingo_fast.patching.options import Options
from flamingo_fast.patching.rules import Call, Rule, has, takes
from flamingo_fast.patching.state import options_of, own_forward, tell_once
from flamingo_fast.ranges import within


def _is_attention(module: nn.Module) -> bool:
    return open_flamingo.is_attention(module) and takes(
        module, "x", "media", "media_locations", "attend_previous"
    )


def _is_block(module: nn.Module) -> bool:
    return (
        has(module, modules=("attn", "feed_forward"), tensors=("attn_gate", "ff_gate"))
        and _is_attention(module.attn)  # type: ignore[arg-type]
        and takes(module, "x", "media", "media_locations", "attend_previous")
    )


def _is_perceiver_block(module: nn.Module) -> bool:
    names = ("norm_media", "norm_latents", "to_q", "to_kv", "to_out", "feed_forward")
    return (
        has(module, modules=names)
        and all(hasattr(module, name) for name in ("heads", "scale"))
        and takes(module, "x", "latents")
    )


def _layout(
    attn: Any,
    x: torch.Tensor,
    media: torch.Tensor,
    media_locations: torch.Tensor | None,
    attend_previous: bool,
) -> MediaLayout | None:
    """None: of shapes or dtypes that are for the peer to take or refuse."""
    if media.dim() != 4 or media.shape[0] != x.shape[0] or media.shape[1] == 0:
        return None
    num_media = media.shape[1]
    if media_locations is None:
        start = torch.zeros(x.shape[:2], dtype=torch.int32, device=x.device)
        return MediaLayout.from_intervals(start, start + num_media, num_media, num_media)
    if media_locations.dtype != torch.bool or media_locations.shape != x.shape[:2]:
        return None
    which = "previous" if attn.only_attend_immediate_media else "all_previous"
    if not attend_previous:
        which = "next" if attn.only_attend_immediate_media else "all_to_next"
    return layout_of(attn, media_locations, num_media, which)


def attention(
    self: Any,
    x: torch.Tensor,
    media: torch.Tensor,
    media_locations: torch.Tensor | None = None,
    attend_previous: bool = True,
) -> torch.Tensor:
    """(B, L, dim) of x (B, L, dim).

    Arguments:
        media: (B, N, R, dim_visual).
        media_locations: (B, L) bool; None: all attend to all media.
        attend_previous: False: to the image that follows.
    """
    if leaves_one_medium(self, x, media.shape[1]):
        return own_forward(self)(x, media, media_locations, attend_previous)
    layout = _layout(self, x, media, media_locations, attend_previous)
    if layout is None:
        tell_once(self, UNUSUAL)
        return own_forward(self)(x, media, media_locations, attend_previous)
    return open_flamingo.attend_to_media(self, x, media, layout)


def block(
    self: Any,
    x: torch.Tensor,
    media: torch.Tensor,
    media_locations: torch.Tensor | None = None,
    attend_previous: bool = True,
) -> torch.Tensor:
    """Arguments and result of `attention`."""
    options = options_of(self)
    attended = within(
        "attention",
        self.attn,
        x,
        media,
        media_locations=media_locations,
        attend_previous=attend_previous,
    )
    out = finish_block(x, attended, self.attn_gate, self.feed_forward, self.ff_gate, options)
    if options.unattended != "zero_block":
        return out
    layout = _layout(self.attn, x, media, media_locations, attend_previous)
    return leave_unattended(x, out, layout)


def perceiver_block(self: Any, x: torch.Tensor, latents: torch.Tensor) -> torch.Tensor:
    """(B, N, R, dim) of features x (B, N, S, dim) and latents (B, N, R, dim)."""
    if x.dim() != 4 or x.shape[:-2] != latents.shape[:-2] or trains_16_bits_on_cpu(x):
        return own_forward(self)(x, latents)
    attended = open_flamingo.latents_attend(self, self.norm_media(x), self.norm_latents(latents))
    residual = attended + latents
    return one_after_the_other(residual, self.feed_forward) + residual


def _refuses_attention(
    module: nn.Module, options: Options, will_patch: Callable[[nn.Module], bool]
) -> str | None:
    own = inspect.unwrap(type(module).forward)
    if getattr(own, "__globals__", {}).get("XFORMERS_AVAIL"):
        return "it attends to all media by xformers, without its mask"
    return None


def _notes(module: Any, options: Options) -> Sequence[str]:
    # Of OtterLMMixin, which finds image tokens among the ids of each call alone.
    found = [
        "with a key/value cache, text generated after the first new token sees no media: Otter "
        "looks for image tokens in the new ids alone"
    ]
    if not module.only_attend_immediate_media and options.unattended is None:
        found.append("text before the first image attends to all media, as in Otter")
    return found


def _attention_probes(module: Any) -> Iterator[Call]:
    # As many media as image tokens, fewer, and more.
    for num_media in (3, 2, 4):
        x, media, locations = probe_inputs(module, num_media, 3)
        yield (x, media, locations), {}
        yield (x, media, locations, False), {}
        # Decoding: media that were projected before, and no image token among the new ones.
        yield (x[:, :1], media, locations[:, :1]), {}
        yield (x, media), {}


def _block_probes(module: Any) -> Iterator[Call]:
    with opened_gates(module, "attn_gate", "ff_gate"):
        for attend_previous in (True, False):
            yield probe_inputs(module.attn, 3, 3), {"attend_previous": attend_previous}


# The same code in the wheel of otter-ai 0.0.0a8.
_VERSION = "Otter e5c67b2"

RULES: tuple[Rule, ...] = (
    Rule(
        name="otter.attention",
        features=("cross_attention",),
        matches=_is_attention,
        forward=attention,
        known={"86879e73940f3aaf": _VERSION, "5618081e3bd315e9": f"{_VERSION}, its Flamingo"},
        refuses=_refuses_attention,
        notes=_notes,
        probes=_attention_probes,
    ),
    Rule(
        name="otter.block",
        features=("cross_attention", "gated_residual"),
        matches=_is_block,
        forward=block,
        known={"bfd12f06d051bac5": _VERSION},
        refuses=refuses_block,
        probes=_block_probes,
    ),
    Rule(
        name="otter.perceiver_block",
        features=("resampler",),
        matches=_is_perceiver_block,
        forward=perceiver_block,
        known={"e197934b703d8e00": _VERSION},
        probes=open_flamingo.perceiver_attention_probes,
    ),
)
