"""OpenFlamingo: its cross-attention, gated blocks and Perceiver Resampler.

Of open_flamingo/src/helpers.py, and of what vendors or subclasses its classes. The text's forward
has its media and their places as attributes of layers, which stay as they are.

B batch, L text tokens, N media of a sample, F frames, S features of a frame, R tokens of a medium.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn

from flamingo_fast.layout import MediaLayout
from flamingo_fast.modules.media_layouts import layout_for
from flamingo_fast.modules.plain import has_hooks, is_plain
from flamingo_fast.modules.resampler import attend_to_medium, project_for_layers
from flamingo_fast.patching.attention import (
    attend,
    attend_together,
    finish_block,
    is_16_bits_on_cpu,
    leave_unattended,
    leaves_one_medium,
    opened_gates,
    project_both,
    project_media,
    random_like,
    refuses_block,
    trains_16_bits_on_cpu,
)
from flamingo_fast.patching.options import Options
from flamingo_fast.patching.rules import Call, Rule, has, takes
from flamingo_fast.patching.state import is_patched, options_of, own_forward, tell_once
from flamingo_fast.ranges import within

ATTENTION_NOTES = {
    True: (
        "with more image tokens than images, the text after the last attends to all images alike, "
        "as the peer's does; unattended='zero' gives it nothing"
    ),
    False: (
        "text before the first image attends to all images alike, as the peer's does; "
        "unattended='zero' gives it nothing"
    ),
}
_PERCEIVER_ATTENTION = "open_flamingo.perceiver_attention"
BROADCASTS = "media or media_locations that broadcast"


def is_attention(module: nn.Module) -> bool:
    """OpenFlamingo's or one after it: norm, projections, and which media text attends to."""
    return has(module, modules=("norm", "to_q", "to_kv", "to_out")) and all(
        hasattr(module, name) for name in ("heads", "scale", "only_attend_immediate_media")
    )


def is_block(module: nn.Module) -> bool:
    """Such an attention and a feed-forward, each with its gate."""
    if not has(module, modules=("attn", "ff"), tensors=("attn_gate", "ff_gate")):
        return False
    attn: Any = module.attn
    return is_attention(attn)


def is_perceiver_attention(module: nn.Module) -> bool:
    """Norms of features and latents, projections, and no feed-forward as Otter's has."""
    names = ("norm_media", "norm_latents", "to_q", "to_kv", "to_out")
    return has(module, modules=names) and all(
        hasattr(module, name) == is_there
        for name, is_there in (("heads", True), ("scale", True), ("feed_forward", False))
    )


def is_resampler(module: nn.Module) -> bool:
    """Latents, and layers of such an attention and a feed-forward."""
    if not has(module, modules=("layers", "norm"), tensors=("latents",)):
        return False
    layers: Any = module.layers
    return (
        isinstance(layers, nn.ModuleList)
        and len(layers) > 0
        and all(
            isinstance(layer, nn.ModuleList)
            and len(layer) == 2
            and is_perceiver_attention(layer[0])
            for layer in layers
        )
    )


def layout_of_call(
    user: nn.Module,
    attn: Any,
    x: torch.Tensor,
    media: torch.Tensor,
    media_locations: torch.Tensor | None,
    use_cached_media: bool = False,
) -> MediaLayout | None:
    """Which media x attends to; None where the peer would broadcast, or refuse.

    Arguments:
        user: the module that asks.
        attn: the attention.
        x, media, media_locations, use_cached_media: those of its forward.
    """
    if x.dim() != 3 or media.dim() != 4 or media.shape[0] != x.shape[0] or media.numel() == 0:
        return None
    if media_locations is not None and (
        media_locations.dtype != torch.bool
        or media_locations.dim() != 2
        or media_locations.shape[0] != x.shape[0]
        or (media_locations.shape[1] != x.shape[1] and not use_cached_media)
    ):
        return None
    which = "previous" if attn.only_attend_immediate_media else "all_previous"
    return layout_for(user, x, media, media_locations, use_cached_media, which)


def attend_to_media(
    self: Any, x: torch.Tensor, media: torch.Tensor, layout: MediaLayout
) -> torch.Tensor:
    """(B, L, dim) of text x (B, L, dim) and media (B, N, R, dim_visual)."""
    q = self.to_q(self.norm(x))
    media_kv = project_media(self, media, remember_for=q.dtype)
    unattended = "zero" if self.only_attend_immediate_media else "uniform"
    return self.to_out(attend(self, q, media_kv, layout, unattended))


def attention(
    self: nn.Module,
    x: torch.Tensor,
    media: torch.Tensor,
    media_locations: torch.Tensor | None = None,
    use_cached_media: bool = False,
) -> torch.Tensor:
    """(B, L, dim) of text x (B, L, dim), media (B, N, R, dim_visual) and their places (B, L)."""
    if leaves_one_medium(self, x, media.shape[1]):
        return own_forward(self)(x, media, media_locations, use_cached_media)
    layout = None
    # Without media_locations it takes none but cached media.
    if media_locations is not None or use_cached_media:
        layout = layout_of_call(self, self, x, media, media_locations, use_cached_media)
    if layout is None:
        tell_once(self, BROADCASTS)
        return own_forward(self)(x, media, media_locations, use_cached_media)
    return attend_to_media(self, x, media, layout)


def finish(self: Any, x: torch.Tensor, attended: torch.Tensor, media: Any, *args: Any) -> Any:
    """A gated block after its attention.

    Arguments:
        x, media: of its forward.
        attended: (B, L, dim).
        args: media_locations and use_cached_media.
    """
    options = options_of(self)
    out = finish_block(x, attended, self.attn_gate, self.ff, self.ff_gate, options)
    if options.unattended != "zero_block":
        return out
    return leave_unattended(x, out, layout_of_call(self, self.attn, x, media, *args))


def block(
    self: Any,
    x: torch.Tensor,
    media: torch.Tensor,
    media_locations: torch.Tensor | None = None,
    use_cached_media: bool = False,
) -> torch.Tensor:
    """(B, L, dim); arguments as of `attention`."""
    attended = within(
        "attention",
        self.attn,
        x,
        media,
        media_locations=media_locations,
        use_cached_media=use_cached_media,
    )
    return finish(self, x, attended, media, media_locations, use_cached_media)


def perceiver_attention(
    self: Any,
    x: torch.Tensor,
    latents: torch.Tensor,
    media_kv: torch.Tensor | None = None,
) -> torch.Tensor:
    """(B, N, R, dim) of features x (B, N, S, dim) and latents (B, N, R, dim).

    Arguments:
        media_kv: (B, N, S, 2 * heads * D), keys and values of x made elsewhere.
    """
    outer = x.shape[:-2]
    if media_kv is None:
        if x.dim() != 4 or latents.shape[:-2] != outer or trains_16_bits_on_cpu(x):
            return own_forward(self)(x, latents)
        return latents_attend(self, self.norm_media(x), self.norm_latents(latents))
    latents = self.norm_latents(latents)
    kv = media_kv, self.to_kv(latents)
    return _attend_and_project(self, self.to_q(latents), kv, outer)


def latents_attend(self: Any, media: torch.Tensor, latents: torch.Tensor) -> torch.Tensor:
    """(B, N, R, dim) of features (B, N, S, dim) and latents (B, N, R, dim), both normed."""
    outer = media.shape[:-2]
    q = self.to_q(latents)
    if media.device.type != "cpu":
        return _attend_and_project(self, q, project_both(self.to_kv, media, latents), outer)
    k, v = self.to_kv(torch.cat((media, latents), -2)).chunk(2, -1)
    return self.to_out(attend_together(self, q, k, v).unflatten(0, outer))


def _attend_and_project(
    self: Any, q: torch.Tensor, kv: tuple[torch.Tensor, torch.Tensor], outer: torch.Size
) -> torch.Tensor:
    attended = attend_to_medium(q, *kv, outer, self.heads, self.heads, softmax_scale=self.scale)
    return self.to_out(attended.unflatten(0, outer))


def resample(self: Any, x: torch.Tensor) -> torch.Tensor:
    """(B, N, R, dim) of features x (B, N, S, dim), embeddings and all."""
    attentions = [attn for attn, _ in self.layers]
    # One's own forward takes no keys and values.
    is_own = not all(is_patched(attn, _PERCEIVER_ATTENTION) for attn in attentions)
    # In 16 bits a CPU takes longer for two products than it saves by one norm for all layers.
    share = False if is_own or is_16_bits_on_cpu(x) else None
    media_kv = project_for_layers(attentions, x, share=share)
    first = attentions[0]
    # Of all media the first layer's latents are the same.
    are_shared = media_kv[0] is not None and is_plain(first.to_q) and not has_hooks(first)
    latents = self.latents.expand(*((1, 1) if are_shared else x.shape[:2]), -1, -1)
    for index, (layer, kv) in enumerate(zip(self.layers, media_kv, strict=True)):
        latents = within(f"layer {index}", _layer, layer, latents, x, kv)
    return self.norm(latents)


def _layer(
    layer: Any, latents: torch.Tensor, x: torch.Tensor, media_kv: torch.Tensor | None
) -> torch.Tensor:
    attn, ff = layer
    shared = {} if media_kv is None else {"media_kv": media_kv}
    latents = latents + attn(x, latents, **shared)
    return latents + ff(latents)


def resampler(self: Any, x: torch.Tensor) -> torch.Tensor:
    """(B, N, R, dim) of features x (B, N, F, S, dim)."""
    if x.dim() != 5:
        return own_forward(self)(x)
    num_media, num_frames = x.shape[1:3]
    if self.frame_embs is not None:
        x = x + self.frame_embs[:num_frames, None]
    x = x.flatten(2, 3)
    if self.media_time_embs is not None:
        x = x + self.media_time_embs[:num_media]
    return resample(self, x)


def attention_notes(module: nn.Module, options: Options) -> Sequence[str]:
    """What the peer's attention does, and may not be meant to."""
    if options.unattended is not None:
        return ()
    return (ATTENTION_NOTES[bool(module.only_attend_immediate_media)],)


def refuses_resampler(module: Any, options: Options, will_patch: Any) -> str | None:
    """Its attentions are given the keys and values of media."""
    if all(will_patch(attn) for attn, _ in module.layers):
        return None
    return "its attentions are left"


def attention_probes(module: Any, takes_cached: bool = True) -> Iterator[Call]:
    """Of an attention: text before images, several, side by side, none, and more than there are."""
    width, weight = module.norm.normalized_shape[-1], module.to_q.weight
    locations = torch.zeros(3, 9, dtype=torch.bool, device=weight.device)
    for row, places in enumerate([(2, 3), (0, 4, 7), ()]):
        locations[row, list(places)] = True
    media = random_like(weight, 3, 2, 5, module.to_kv.in_features)
    yield (random_like(weight, 3, 9, width), media, locations), {}
    for count in (1, 2) if takes_cached else ():
        x = random_like(weight, 3, count, width)
        yield (x, media), {"media_locations": locations, "use_cached_media": True}


def block_probes(module: Any, takes_cached: bool = True) -> Iterator[Call]:
    """Those of its attention, with its gates open."""
    with opened_gates(module, "attn_gate", "ff_gate"):
        yield from attention_probes(module.attn, takes_cached)


def perceiver_attention_probes(module: Any) -> Iterator[Call]:
    """Of an attention of latents: several media of several samples."""
    weight = module.to_q.weight
    x, latents = (random_like(weight, 2, 3, count, weight.shape[1]) for count in (7, 4))
    yield (x, latents), {}


def _resampler_probes(module: Any) -> Iterator[Call]:
    latents = module.latents
    for num_media, num_frames in ((2, 1), (1, 2)):
        if module.frame_embs is None or len(module.frame_embs) >= num_frames:
            shape = (2, num_media, num_frames, 5, latents.shape[1])
            yield (random_like(latents, *shape),), {}


def code_of_resampler(module: Any) -> Sequence[Any]:
    """Its own forward and its attentions'."""
    return type(module).forward, type(module.layers[0][0]).forward


_VERSION = "OpenFlamingo 2.0.1"

RULES: tuple[Rule, ...] = (
    Rule(
        name="open_flamingo.attention",
        features=("cross_attention",),
        matches=lambda module: is_attention(module) and takes(module, "use_cached_media"),
        forward=attention,
        known={"7b86e4909f278c49": _VERSION},
        notes=attention_notes,
        probes=attention_probes,
    ),
    Rule(
        name="open_flamingo.block",
        features=("cross_attention", "gated_residual", "norm"),
        matches=lambda module: is_block(module) and takes(module, "use_cached_media"),
        forward=block,
        known={"93c0c4137a015c44": _VERSION},
        refuses=refuses_block,
        probes=block_probes,
    ),
    # flamingo-pytorch's differ in names alone.
    Rule(
        name=_PERCEIVER_ATTENTION,
        features=("resampler",),
        matches=is_perceiver_attention,
        forward=perceiver_attention,
        known={"49ab557c59190486": _VERSION, "ff3ffa9725b65d9f": "flamingo-pytorch 0.1.2"},
        probes=perceiver_attention_probes,
    ),
    Rule(
        name="open_flamingo.resampler",
        features=("resampler",),
        matches=lambda module: (
            is_resampler(module)
            and hasattr(module, "frame_embs")
            and hasattr(module, "media_time_embs")
        ),
        forward=resampler,
        known={"866cf73162671291": _VERSION},
        code=code_of_resampler,
        refuses=refuses_resampler,
        probes=_resampler_probes,
    ),
)
