"""What fast forwards of models after OpenFlamingo share: layouts, media's keys, gated blocks.

B batch, L text tokens, N media of a sample, R tokens of a medium, H heads, D head dim.
"""

import contextlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from flamingo_fast.layout import MediaLayout, values_are_at_hand
from flamingo_fast.modules.cross_attention import MediaKV
from flamingo_fast.modules.media_layouts import shared_layout
from flamingo_fast.modules.plain import is_plain
from flamingo_fast.ops.attention_gradients import unbind_kv
from flamingo_fast.ops.masked_cross_attention import masked_cross_attention
from flamingo_fast.patching.options import Options
from flamingo_fast.patching.parts import add_gated, add_gated_norm
from flamingo_fast.patching.remembered import Remembered, may_remember
from flamingo_fast.patching.state import does_more, options_of, state_of
from flamingo_fast.ranges import within

# Why a layout is None, for `tell_once`.
UNUSUAL = "media or their locations of an unusual shape or dtype"


def layout_of(
    user: nn.Module,
    media_locations: torch.Tensor,
    num_media: int,
    attend: str = "previous",
    *,
    after: int | None = None,
) -> MediaLayout:
    """Which media text attends to; all layers of a model, which are given the same, share one.

    Arguments:
        user: the module that asks.
        media_locations: (B, L), bool or integers that are added up.
        attend: "previous" or "all_previous" as of `MediaLayout`; or Otter's "next", and
            "all_to_next": tokens after the last image token attend to nothing, whatever media
            there are.
        after: the layout is that of so many tokens after the last image token.
    """
    if media_locations.dtype != torch.bool and values_are_at_hand(media_locations):
        # Some peers give zeros of the ids' dtype to text without media.
        is_one = media_locations != 0
        if torch.equal(is_one.to(media_locations.dtype), media_locations):
            media_locations = is_one
    with_next = attend in ("next", "all_to_next")
    if media_locations.dtype == torch.bool and not with_next:
        return shared_layout(user, media_locations, num_media, after, attend)
    text_time = media_locations.cumsum(1)
    if with_next:
        count = text_time[:, -1:]
        text_time = text_time + ~media_locations
        text_time = text_time.masked_fill(text_time > count, 0)
    if after is not None:
        text_time = text_time[:, -1:].expand(-1, after)
    end = text_time.clamp(0, num_media)
    if attend in ("all_previous", "all_to_next"):
        return MediaLayout.from_intervals(torch.zeros_like(end), end, num_media, max(num_media, 2))
    return MediaLayout.from_intervals((text_time - 1).clamp(0, num_media), end, num_media, 1)


def attend(
    self: nn.Module,
    q: torch.Tensor,
    media_kv: MediaKV,
    layout: MediaLayout,
    unattended: str = "zero",
) -> torch.Tensor:
    """(B, L, H * D) of q (B, L, H * D) and keys and values (B, N, R, H, D).

    Arguments:
        self: a patched attention, with its `heads` and the `scale` of scores.
        unattended: what the peer gives to tokens that attend to nothing; its tokens after more
            image tokens than media get the mean of all values. Options may ask for zeros.
    """
    zero = options_of(self).unattended is not None
    attended = masked_cross_attention(
        by_head(q, self.heads),  # type: ignore[arg-type]
        *media_kv,
        layout,
        unattended="zero" if zero else unattended,
        past_last="zero" if zero else "uniform",
        softmax_scale=self.scale,  # type: ignore[arg-type]
    )
    return attended.flatten(-2)


def by_head(projected: torch.Tensor, heads: int) -> torch.Tensor:
    """(..., H, D) of (..., H * D)."""
    return projected.unflatten(-1, (heads, -1))


def project_media(
    self: nn.Module, media: torch.Tensor, remember_for: torch.dtype | None = None
) -> MediaKV:
    """Keys and values (B, N, R, H, D) of media (B, N, R, ...) by `self.to_kv`, keys first.

    Arguments:
        remember_for: the queries' dtype (under autocast it isn't that of the media), to keep them
            for the next call with this very tensor, where `media_kv_cache` says so.
    """
    to_kv: Any = self.to_kv
    state = state_of(self)
    assert state is not None
    remembered = None
    if remember_for and state.options.media_kv_cache and _may_keep(self):
        remembered = state.memory.setdefault("media_kv", Remembered())
        found = remembered.recall(media, *to_kv.parameters())
        if found is not None and found[0].dtype == remember_for:
            return found
    # In the shape in which hooks of to_kv are used to see it.
    projected = by_head(to_kv(media.flatten(1, 2)), 2).unflatten(-1, (self.heads, -1))
    found = unbind_kv(projected.unflatten(1, media.shape[1:3]))
    if remembered is not None:
        remembered.keep(found, media, *to_kv.parameters())
    return found


def _may_keep(self: nn.Module) -> bool:
    """Whether `to_kv` does the same in the next call, as long as its parameters are the same."""
    to_kv: Any = self.to_kv
    return (
        may_remember()
        # A checkpoint's first forward is without gradients, too, and keeps nothing.
        and not self.training
        # What LoRA and hooks did may be different.
        and is_plain(to_kv)
        # FSDP writes whole weights to the same memory, and doesn't count it as a change.
        and not getattr(to_kv, "_is_fsdp_managed_module", False)
    )


def project_both(
    projection: nn.Module, media: torch.Tensor, latents: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """A projection's results of features (..., S, dim) and latents (..., R, dim).

    The peer puts the two together, which takes the memory again; so do we where hooks count calls,
    or LoRA's dropout draws numbers.
    """
    if is_plain(projection):
        return projection(media), projection(latents)
    both = projection(torch.cat((media, latents), -2))
    of_media, of_latents = both.split((media.shape[-2], latents.shape[-2]), -2)
    return of_media, of_latents


def attend_together(self: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """(M, R, H * D) of latents' q (..., R, H * D), and k and v (..., S + R, H * D).

    On a CPU features and latents that are put together take less time than `latent_attention`.

    Arguments:
        self: a patched attention, with its `heads` and the `scale` of scores.
    """
    q, k, v = (by_head(each, self.heads).flatten(0, -4).transpose(1, 2) for each in (q, k, v))
    attended = F.scaled_dot_product_attention(q, k, v, scale=self.scale)
    return attended.transpose(1, 2).flatten(-2)


def is_16_bits_on_cpu(x: torch.Tensor) -> bool:
    """Whether products of x with weights are of bf16 or fp16, on a CPU."""
    return x.device.type == "cpu" and (x.element_size() == 2 or torch.is_autocast_enabled("cpu"))


def trains_16_bits_on_cpu(x: torch.Tensor) -> bool:
    """Where no attention of PyTorch's or ours has the backward of matrix products alone."""
    return is_16_bits_on_cpu(x) and torch.is_grad_enabled()


def leaves_one_medium(self: nn.Module, x: torch.Tensor, num_media: int) -> bool:
    """Whether a cross-attention's own forward is the faster one: it does nothing in vain."""
    is_own_meaning = options_of(self).unattended is None
    return num_media == 1 and is_own_meaning and trains_16_bits_on_cpu(x)


def finish_block(
    x: torch.Tensor,
    attended: torch.Tensor,
    attn_gate: torch.Tensor,
    ff: Any,
    ff_gate: torch.Tensor,
    options: Options,
) -> torch.Tensor:
    """x + tanh(attn_gate) * attended, and then the gated feed-forward.

    Arguments:
        ff: any module, mostly an nn.Sequential; or an nn.ModuleList of what is called one after
            the other. The first in these may be a norm.
    """
    is_open = type(ff) is nn.Sequential and len(ff) > 0 and not does_more(ff)
    if not is_open and not isinstance(ff, nn.ModuleList):
        residual = add_gated(x, attended, attn_gate, options)
        fed = within("feed-forward", ff, residual)
        return add_gated(residual, fed, ff_gate, options)
    norm, *rest = ff
    residual, normed = add_gated_norm(x, attended, attn_gate, norm, options)
    fed = within("feed-forward", one_after_the_other, normed, rest)
    return add_gated(residual, fed, ff_gate, options)


def one_after_the_other(x: torch.Tensor, modules: Iterable[nn.Module]) -> torch.Tensor:
    """What the last of these modules makes of what the ones before made of x."""
    for module in modules:
        x = module(x)
    return x


def leave_unattended(
    x: torch.Tensor, out: torch.Tensor, layout: MediaLayout | None
) -> torch.Tensor:
    """x, bit for bit, of tokens that attend to nothing, and out of the others.

    Arguments:
        layout: None: the peer's own forward ran, and all is out.
    """
    if layout is None:
        return out
    return torch.where(layout.attends()[..., None], out, x)


def refuses_block(
    module: Any, options: Options, will_patch: Callable[[nn.Module], bool]
) -> str | None:
    """What a gated block adds to its attention, `attn`, are fused residuals, or "zero_block"."""
    if options.unattended == "zero_block" and not will_patch(module.attn):
        return "its attention is left, and unattended='zero_block' is of both"
    if options.gated_residual or options.unattended == "zero_block":
        return None
    return "gated_residual=False"


@contextlib.contextmanager
def opened_gates(module: nn.Module, *names: str) -> Iterator[None]:
    """For probes: gates start closed, and hide what is behind them."""
    kept: dict[str, Any] = {name: module._parameters[name] for name in names}
    try:
        for name, gate in kept.items():
            module._parameters[name] = nn.Parameter(torch.full_like(gate, 0.5))
        yield
    finally:
        module._parameters.update(kept)


def random_like(weight: torch.Tensor, *shape: int) -> torch.Tensor:
    """For probes: normal numbers of this shape, of the weight's dtype and device.

    Drawn on the CPU: that is the generator whose state `patch` gives back.
    """
    return torch.randn(shape, device="cpu").to(weight)


def probe_inputs(
    attn: Any, num_media: int, tokens_per_medium: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Text (2, 7, dim), so many media, and image tokens: late, side by side, more in one row."""
    weight = attn.to_kv.weight
    x = random_like(weight, 2, 7, attn.to_q.in_features)
    media = random_like(weight, 2, num_media, tokens_per_medium, weight.shape[1])
    locations = torch.tensor([[0, 1, 0, 1, 1, 0, 0], [0] * 4 + [1, 0, 0]], dtype=torch.bool)
    return x, media, locations.to(x.device)
