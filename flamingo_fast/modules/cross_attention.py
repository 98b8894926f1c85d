"""MaskedCrossAttention: text attends to its media.

B batch, L text tokens, N media of a sample, R tokens of a medium, H heads, Hkv key/value heads, D
head dim.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from flamingo_fast.layout import ATTEND, MediaLayout
from flamingo_fast.modules.media_layouts import layout_for
from flamingo_fast.modules.options import check_dims, check_heads, make_norm, op_impl
from flamingo_fast.modules.plain import is_plain
from flamingo_fast.ops.attention_gradients import unbind_kv
from flamingo_fast.ops.checks import one_of
from flamingo_fast.ops.dispatch import ATTENTION_IMPLS, check_impl
from flamingo_fast.ops.masked_cross_attention import (
    PAST_LAST,
    UNATTENDED,
    masked_cross_attention,
)

MediaKV = tuple[torch.Tensor, torch.Tensor]


class MaskedCrossAttention(nn.Module):
    """Text attends to the latents of its media (Flamingo, section 2.3), without the residual.

    OpenFlamingo's class of that name (open_flamingo/src/helpers.py), arguments and state-dict keys;
    flamingo-pytorch's too, where dim_visual is dim. Keyword options are for what the paper and
    other models do differently.

    Arguments:
        dim: width of the text.
        dim_visual: width of the media; by default dim.
        dim_head, heads: of attention.
        only_attend_immediate_media: attend to the last medium before a token; otherwise to all
            before it.
        attend: "previous", "next" or "all_previous", in place of that argument.
        unattended: what tokens get that attend to nothing, see `masked_cross_attention`; by default
            what OpenFlamingo does: "zero", but "uniform" with all previous media.
        past_last: the same of tokens after more image tokens than media; by default OpenFlamingo's
            "uniform", and "zero" in packed rows.
        media_norm: a norm of the media (Flamingo, section 3.1.2 of v1), `norm_media`.
        kv_heads: key/value heads, a divisor of heads; by default heads.
        bias: of the linear layers.
        norm: "layer" or "rms".
        impl: of attention, see `masked_cross_attention`.

    Raises:
        ValueError: a wrong argument, by name.
    """

    def __init__(
        self,
        *,
        dim: int,
        dim_visual: int | None = None,
        dim_head: int = 64,
        heads: int = 8,
        only_attend_immediate_media: bool = True,
        attend: str | None = None,
        unattended: str | None = None,
        past_last: str | None = None,
        media_norm: bool = False,
        kv_heads: int | None = None,
        bias: bool = False,
        norm: str = "layer",
        impl: str = "auto",
    ) -> None:
        super().__init__()
        dim_visual = dim if dim_visual is None else dim_visual
        check_dims(dim=dim, dim_visual=dim_visual, dim_head=dim_head)
        self.heads, self.dim_head = heads, dim_head
        self.kv_heads = check_heads(heads, kv_heads)
        default = "previous" if only_attend_immediate_media else "all_previous"
        self.attend = one_of("attend", default if attend is None else attend, ATTEND)
        default = "uniform" if self.attend == "all_previous" else "zero"
        self.unattended = one_of(
            "unattended", default if unattended is None else unattended, UNATTENDED
        )
        self.past_last = None if past_last is None else one_of("past_last", past_last, PAST_LAST)
        self.impl = check_impl(impl, ATTENTION_IMPLS)
        self.norm = make_norm(norm, dim, op_impl(impl))
        self.norm_media = make_norm(norm, dim_visual, op_impl(impl)) if media_norm else None
        self.to_q = nn.Linear(dim, heads * dim_head, bias=bias)
        self.to_kv = nn.Linear(dim_visual, 2 * self.kv_heads * dim_head, bias=bias)
        self.to_out = nn.Linear(heads * dim_head, dim, bias=bias)

    def forward(
        self,
        x: torch.Tensor,
        media: torch.Tensor | None = None,
        media_locations: torch.Tensor | None = None,
        use_cached_media: bool = False,
        *,
        layout: MediaLayout | None = None,
        media_kv: MediaKV | None = None,
        return_media_kv: bool = False,
    ) -> torch.Tensor | tuple[torch.Tensor, MediaKV]:
        """Attention alone: the residual and its gate are the block's.

        Arguments:
            x: (B, L, dim).
            media: (B, N, R, dim_visual), or (media_total, R, dim_visual) with `layout`; may be None
                where media_kv is given.
            media_locations: (B, L) bool, True at image tokens. None: all text attends to all media.
            use_cached_media: all of x comes after the last image token of media_locations, whose
                length may be another.
            layout: which media each token attends to, in place of media_locations; make it once for
                all layers of a model.
            media_kv: keys and values that `project_media` returned, as for decoding.
            return_media_kv: return these too.

        Returns:
            (B, L, dim); with return_media_kv, and the keys and values.

        Raises:
            TypeError, ValueError: a wrong argument, by name.
        """
        attended, media_kv = self.attend_to(
            x, media, media_locations, use_cached_media, layout=layout, media_kv=media_kv
        )
        out = self.to_out(attended)
        return (out, media_kv) if return_media_kv else out

    def attend_to(
        self,
        x: torch.Tensor,
        media: torch.Tensor | None,
        media_locations: torch.Tensor | None,
        use_cached_media: bool,
        *,
        layout: MediaLayout | None,
        media_kv: MediaKV | None,
    ) -> tuple[torch.Tensor, MediaKV]:
        """What `forward` gives to `to_out`, (B, L, heads * dim_head), and the keys and values."""
        of_media = media_or_kv(media, media_kv)
        # Before media are projected: their shape is checked there.
        if layout is None:
            layout = self.make_layout(x, of_media, media_locations, use_cached_media)
        if media_kv is None:
            media_kv = self.project_media(of_media)
        past_last = self.past_last
        if past_last is None:
            past_last = "zero" if layout.is_packed else "uniform"
        q = self.to_q(self.norm(x)).unflatten(-1, (self.heads, self.dim_head))
        attended = masked_cross_attention(
            q,
            *media_kv,
            layout,
            unattended=self.unattended,
            past_last=past_last,
            impl=self.impl,
        )
        return attended.flatten(-2), media_kv

    def project_media(self, media: torch.Tensor) -> MediaKV:
        """Keys and values, (..., R, Hkv, D) each, of media (..., R, dim_visual)."""
        if self.norm_media is not None:
            media = self.norm_media(media)
        return self.split_kv(self.to_kv(media))

    def split_kv(self, projected: torch.Tensor) -> MediaKV:
        """Keys and values of what `to_kv` returns: views."""
        return unbind_kv(projected.unflatten(-1, (2, self.kv_heads, self.dim_head)))

    def make_layout(
        self,
        x: torch.Tensor,
        media: torch.Tensor,
        media_locations: torch.Tensor | None,
        use_cached_media: bool = False,
    ) -> MediaLayout:
        """The layout that OpenFlamingo's arguments say; see `layout_for`."""
        return layout_for(self, x, media, media_locations, use_cached_media, self.attend)

    def extra_repr(self) -> str:
        kv_heads = "" if self.kv_heads == self.heads else f", kv_heads={self.kv_heads}"
        return (
            f"heads={self.heads}{kv_heads}, dim_head={self.dim_head}, attend={self.attend!r}, "
            f"unattended={self.unattended!r}, impl={self.impl!r}"
        )


def media_or_kv(media: torch.Tensor | None, media_kv: MediaKV | None) -> torch.Tensor:
    """What has the media's shape up to their tokens: keys, if there are some."""
    of_media = media if media_kv is None else media_kv[0]
    if of_media is None:
        raise ValueError("media: expected a tensor where media_kv is not given")
    return of_media


def project_media_kv(
    layers: Sequence[nn.Module], media: torch.Tensor, *, merge: bool | None = None
) -> list[MediaKV]:
    """Keys and values of the media for all gated layers of a model, in one matrix product.

    For inference: once a sequence, before the first layer; each layer then takes its own as
    `media_kv`. Layers with a norm of the media, or whose weights may not be read (LoRA, quantised,
    sharded or hooked layers), project on their own.

    Arguments:
        layers: `MaskedCrossAttention`s, or blocks with one as `attn`.
        media: (..., R, dim_visual).
        merge: whether to; by default where gradients are off and not on a CPU, which copies weights
            in more time than it saves.

    Returns:
        (k, v), (..., R, Hkv, D) each, of each layer.
    """
    attentions: list[Any] = [getattr(layer, "attn", layer) for layer in layers]
    if merge is None:
        merge = not torch.is_grad_enabled() and media.device.type != "cpu"
    together = [
        attention
        for attention in attentions
        if merge and attention.norm_media is None and is_plain(attention.to_kv)
    ]
    if len(together) < 2:
        return [attention.project_media(media) for attention in attentions]
    weights = torch.cat([attention.to_kv.weight for attention in together])
    biases = [attention.to_kv.bias for attention in together]
    bias = None
    if any(each is not None for each in biases):
        bias = torch.cat(
            [
                attention.to_kv.weight.new_zeros(attention.to_kv.out_features)
                if attention.to_kv.bias is None
                else attention.to_kv.bias
                for attention in together
            ]
        )
    projected = F.linear(media, weights, bias).split(
        [attention.to_kv.out_features for attention in together], -1
    )
    of_layer = {
        id(attention): attention.split_kv(part)
        for attention, part in zip(together, projected, strict=True)
    }
    return [
        of_layer[id(attention)] if id(attention) in of_layer else attention.project_media(media)
        for attention in attentions
    ]
