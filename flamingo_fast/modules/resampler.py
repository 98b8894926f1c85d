"""Resamplers: visual features of a medium, as tokens that text attends to.

B batch, N media of a sample, F frames of a medium, S features of a frame, R latents.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from flamingo_fast.modules.feed_forward import FeedForward
from flamingo_fast.modules.norm import fold_norm, without_parameters
from flamingo_fast.modules.options import check_dims, check_heads, make_norm, op_impl
from flamingo_fast.modules.plain import has_hooks, is_plain
from flamingo_fast.ops.attention_gradients import unbind_kv
from flamingo_fast.ops.dispatch import ATTENTION_IMPLS, check_impl
from flamingo_fast.ops.latent_attention import latent_attention
from flamingo_fast.ranges import within


class PerceiverAttention(nn.Module):
    """Latents attend to a medium's features and to themselves (Flamingo, appendix A.1.1).

    OpenFlamingo's and flamingo-pytorch's class of that name, arguments and state-dict keys.

    Arguments:
        dim: width of features and latents.
        dim_head, heads: of attention.
        kv_heads: key/value heads, a divisor of heads (Idefics2: 4 of 16); by default heads.
        bias: of the linear layers.
        norm: "layer" or "rms".
        impl: of attention, see `latent_attention`.

    Raises:
        ValueError: a wrong argument, by name.
    """

    def __init__(
        self,
        *,
        dim: int,
        dim_head: int = 64,
        heads: int = 8,
        kv_heads: int | None = None,
        bias: bool = False,
        norm: str = "layer",
        impl: str = "auto",
    ) -> None:
        super().__init__()
        check_dims(dim=dim, dim_head=dim_head)
        self.heads, self.dim_head = heads, dim_head
        self.kv_heads = check_heads(heads, kv_heads)
        self.impl = check_impl(impl, ATTENTION_IMPLS)
        self.norm_media = make_norm(norm, dim, op_impl(impl))
        self.norm_latents = make_norm(norm, dim, op_impl(impl))
        self.to_q = nn.Linear(dim, heads * dim_head, bias=bias)
        self.to_kv = nn.Linear(dim, 2 * self.kv_heads * dim_head, bias=bias)
        self.to_out = nn.Linear(heads * dim_head, dim, bias=bias)

    def forward(
        self,
        x: torch.Tensor,
        latents: torch.Tensor,
        *,
        media_seqlens: torch.Tensor | None = None,
        media_kv: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Attention alone, without the residual.

        Arguments:
            x: (..., S, dim), any number of dimensions before.
            latents: (..., R, dim), or with ones in place of x's first dimensions.
            media_seqlens: (...) integers, the valid features of each medium, its first ones.
            media_kv: (..., S, 2 * kv_heads * dim_head), `to_kv(norm_media(x))` made elsewhere.

        Returns:
            (..., R, dim).
        """
        outer = x.shape[:-2]
        normed = self.norm_latents(latents)
        if media_kv is None:
            media_kv = self.to_kv(self.norm_media(x))
        attended = attend_to_medium(
            self.to_q(normed),
            media_kv,
            self.to_kv(normed),
            outer,
            self.heads,
            self.kv_heads,
            media_seqlens=None if media_seqlens is None else media_seqlens.flatten(),
            impl=self.impl,
        )
        return self.to_out(attended).view(*outer, *latents.shape[-2:])

    def extra_repr(self) -> str:
        kv_heads = "" if self.kv_heads == self.heads else f", kv_heads={self.kv_heads}"
        return f"heads={self.heads}{kv_heads}, dim_head={self.dim_head}, impl={self.impl!r}"


def attend_to_medium(
    q: torch.Tensor,
    media_kv: torch.Tensor,
    latents_kv: torch.Tensor,
    outer: Sequence[int],
    heads: int,
    kv_heads: int,
    **options: Any,
) -> torch.Tensor:
    """What latents, projected to q and latents_kv, attend to, for the output layer.

    Arguments:
        q: (..., R, heads * D), its first dimensions `outer` or ones in place of them.
        media_kv: (*outer, S, 2 * kv_heads * D), keys and then values of the medium.
        latents_kv: (..., R, 2 * kv_heads * D), as q.
        options: of `latent_attention`.

    Returns:
        (media of all of outer, R, heads * D).
    """
    dim_head = q.shape[-1] // heads

    def by_head(projected: torch.Tensor, heads: int) -> torch.Tensor:
        by_head = projected.unflatten(-1, (-1, heads, dim_head))
        by_head = by_head.expand(*outer, *by_head.shape[-4:])
        return by_head.flatten(0, -5) if outer else by_head[None]

    attended = latent_attention(
        by_head(q, heads).squeeze(2),
        *unbind_kv(by_head(media_kv, kv_heads)),
        *unbind_kv(by_head(latents_kv, kv_heads)),
        **options,
    )
    return attended.flatten(-2)


class _Resampler(nn.Module):
    """What all resamplers do with features before their layers.

    Arguments:
        dim: width of the layers.
        depth: their number.
        dim_media: width of the features, if it is another: a projection comes first (which the
            paper's parameter counts suggest).
        max_num_frames: learnt embeddings of so many frames; of more they are interpolated
            (Flamingo, appendix B.1.2: 8 in training, 30 in evaluation).
        max_num_media: learnt embeddings of the places of so many media, an OpenFlamingo option.
    """

    def __init__(
        self,
        dim: int,
        depth: int,
        dim_media: int | None,
        max_num_frames: int | None,
        max_num_media: int | None,
    ) -> None:
        super().__init__()
        sizes = {"dim": dim, "dim_media": dim_media}
        sizes |= {"max_num_frames": max_num_frames, "max_num_media": max_num_media}
        check_dims(**{name: size for name, size in sizes.items() if size is not None})
        check_dims(0, depth=depth)
        self.dim = dim
        self.media_proj = None if dim_media is None else nn.Linear(dim_media, dim)
        self.frame_embs = self.media_time_embs = None
        if max_num_frames is not None:
            self.frame_embs = nn.Parameter(torch.randn(max_num_frames, dim))
        if max_num_media is not None:
            self.media_time_embs = nn.Parameter(torch.randn(max_num_media, 1, dim))

    def _embed(
        self,
        x: torch.Tensor,
        media_seqlens: torch.Tensor | None,
        places: torch.Tensor | None,
    ) -> torch.Tensor:
        """(B, N, F * S, dim) of x; media_seqlens are only checked."""
        width = self.dim if self.media_proj is None else self.media_proj.in_features
        if x.dim() not in (3, 4, 5) or x.shape[-1] != width:
            raise ValueError(
                f"x: expected shape (B, N, F, S, {width}), (B, N, S, {width}) or (B, S, {width}); "
                f"got {tuple(x.shape)}"
            )
        if x.dim() == 3:
            x = x[:, None]
        if x.dim() == 4:
            x = x[:, :, None]
        num_media, num_frames = x.shape[1:3]
        if media_seqlens is not None and media_seqlens.shape != x.shape[:2]:
            raise ValueError(
                f"media_seqlens: expected shape {tuple(x.shape[:2])}, got "
                f"{tuple(media_seqlens.shape)}"
            )
        if places is not None and places.shape != x.shape[:2]:
            raise ValueError(
                f"places: expected shape {tuple(x.shape[:2])}, got {tuple(places.shape)}"
            )
        if self.media_proj is not None:
            x = self.media_proj(x)
        if self.frame_embs is not None:
            x = x + self._frame_embs(num_frames)[:, None]
        x = x.flatten(2, 3)
        if self.media_time_embs is not None and places is not None:
            x = x + self.media_time_embs[places]
        elif self.media_time_embs is not None:
            if num_media > self.media_time_embs.shape[0]:
                raise ValueError(
                    f"x: expected at most max_num_media = {self.media_time_embs.shape[0]} media, "
                    f"got {num_media}"
                )
            x = x + self.media_time_embs[:num_media]
        return x

    def _frame_embs(self, num_frames: int) -> torch.Tensor:
        """(F, dim); the first and the last frame keep theirs where the others are interpolated."""
        assert self.frame_embs is not None
        if num_frames <= self.frame_embs.shape[0]:
            return self.frame_embs[:num_frames]
        wide = self.frame_embs.to(torch.promote_types(self.frame_embs.dtype, torch.float32))
        between = F.interpolate(wide.mT[None], num_frames, mode="linear", align_corners=True)
        return between[0].mT.to(self.frame_embs.dtype)

    def extra_repr(self) -> str:
        sizes = {"dim": self.dim}
        embeddings = {"max_num_frames": self.frame_embs, "max_num_media": self.media_time_embs}
        sizes |= {name: len(each) for name, each in embeddings.items() if each is not None}
        return ", ".join(f"{name}={size}" for name, size in sizes.items())


def project_for_layers(
    attentions: Sequence[Any],
    x: torch.Tensor,
    *,
    share: bool | None = None,
    merge: bool = False,
) -> list[torch.Tensor | None]:
    """What each layer's to_kv(norm_media(x)) is; None: it sees to that itself.

    Arguments:
        attentions: of all layers, with a LayerNorm or RMSNorm `norm_media` and a linear `to_kv`.
        x: (..., S, dim).
        share, merge: `PerceiverResampler`'s share_media_norm and merge_media_projections.
    """
    merge = merge and not torch.is_grad_enabled()
    if share is None and attentions:
        is_long = x.shape[:-1].numel() >= attentions[0].to_kv.out_features
        share = merge or (is_long and x.device.type == "cpu")
    if not share or not _may_share_norm(attentions):
        return [None] * len(attentions)
    xhat = without_parameters(attentions[0].norm_media, x)
    folded = [fold_norm(attn.norm_media, attn.to_kv) for attn in attentions]
    if not merge:
        return [F.linear(xhat, weight, bias) for weight, bias in folded]
    weights, biases = zip(*folded, strict=True)
    bias = None if biases[0] is None else torch.cat(biases)
    return list(F.linear(xhat, torch.cat(weights), bias).chunk(len(attentions), -1))


def _may_share_norm(attentions: Sequence[Any]) -> bool:
    """Whether their norms of media differ in parameters alone, and all weights may be read."""
    if len(attentions) < 2:
        return False
    kinds = set()
    for attn in attentions:
        norm, to_kv = attn.norm_media, attn.to_kv
        if has_hooks(attn) or not is_plain(norm, to_kv) or len(norm.normalized_shape) != 1:
            return False
        has_bias = to_kv.bias is not None or getattr(norm, "bias", None) is not None
        kinds.add((type(norm), norm.eps, to_kv.out_features, has_bias))
    return len(kinds) == 1


class PerceiverResampler(_Resampler):
    """R latents for each medium, whatever the number of its features (Flamingo, section 2.1).

    OpenFlamingo's class of that name (open_flamingo/src/helpers.py), arguments and state-dict keys.
    The paper's is dim=1536, heads=16, dim_head=128 (v1, table 13), activation="squared_relu".

    Arguments:
        dim: width of features and latents.
        depth: layers.
        dim_head, heads, kv_heads: of attention.
        num_latents: R.
        max_num_media, max_num_frames: learnt embeddings of media's places and of frames, which are
            interpolated for more frames; None: no such embeddings.
        ff_mult: hidden width of the feed-forwards, in units of dim.
        dim_media: width of the features, if it is not dim; they are projected then.
        activation: "gelu" (OpenFlamingo) or "squared_relu" (the paper).
        bias: of the linear layers.
        norm: "layer" or "rms".
        impl: of attention, see `latent_attention`.

    Attributes:
        share_media_norm: whether the media are normed once for all layers; the parameters of a
            layer's norm are multiplied into its projection to keys and values, a matrix. None: on
            a CPU, if the media have at least as many features as it has rows; on an H100 it takes
            3 to 9 % longer to make these matrices than to norm again. If the weights of any layer
            may not be read (LoRA, quantised, sharded or hooked), each norms and projects itself.
        merge_media_projections: whether they also are projected to keys and values of all layers in
            one matrix product, where no gradient is wanted. It helps neither: the matrices are
            joined first.

    Raises:
        ValueError: a wrong argument, by name.
    """

    def __init__(
        self,
        *,
        dim: int,
        depth: int = 6,
        dim_head: int = 64,
        heads: int = 8,
        num_latents: int = 64,
        max_num_media: int | None = None,
        max_num_frames: int | None = None,
        ff_mult: float = 4,
        kv_heads: int | None = None,
        dim_media: int | None = None,
        activation: str = "gelu",
        bias: bool = False,
        norm: str = "layer",
        impl: str = "auto",
    ) -> None:
        super().__init__(dim, depth, dim_media, max_num_frames, max_num_media)
        check_dims(num_latents=num_latents)
        self.latents = nn.Parameter(torch.randn(num_latents, dim))
        self.layers = nn.ModuleList(
            nn.ModuleList(
                [
                    PerceiverAttention(
                        dim=dim,
                        dim_head=dim_head,
                        heads=heads,
                        kv_heads=kv_heads,
                        bias=bias,
                        norm=norm,
                        impl=impl,
                    ),
                    FeedForward(
                        dim,
                        ff_mult,
                        activation=activation,
                        norm=norm,
                        bias=bias,
                        impl=op_impl(impl),
                    ),
                ]
            )
            for _ in range(depth)
        )
        self.norm = make_norm(norm, dim, op_impl(impl))
        self.share_media_norm: bool | None = None
        self.merge_media_projections = False

    def forward(
        self,
        x: torch.Tensor,
        *,
        media_seqlens: torch.Tensor | None = None,
        places: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Resamples.

        Arguments:
            x: (B, N, F, S, dim or dim_media), or (B, N, S, dim) of images, or (B, S, dim) of one.
            media_seqlens: (B, N) integers, the valid features of each medium among its F * S, the
                first ones: of short videos and padded images.
            places: (B, N) integers, which of the embeddings of media's places each has; by default
                in their order.

        Returns:
            (B, N, R, dim).

        Raises:
            TypeError, ValueError: a wrong argument, by name.
        """
        x = self._embed(x, media_seqlens, places)
        layers: Any = self.layers
        media_kv = project_for_layers(
            [attn for attn, _ in layers],
            x,
            share=self.share_media_norm,
            merge=self.merge_media_projections,
        )
        # Of all media the first layer's latents are the same.
        latents = self.latents.expand(*(1,) * (x.dim() - 2), -1, -1)
        for index, (layer, kv) in enumerate(zip(layers, media_kv, strict=True)):
            latents = within(f"layer {index}", _layer, layer, latents, x, media_seqlens, kv)
        latents = self.norm(latents)
        return latents.expand(*x.shape[:2], -1, -1)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, num_latents={len(self.latents)}"


class MLPResampler(_Resampler):
    """Feed-forwards on each feature; as many tokens come out as go in (Flamingo, table 3 row vi).

    The paper gives it the Perceiver Resampler's number of parameters, and no dimensions (section
    4.4.2 of v1): `depth` layers of norm, linear, activation, linear with residuals.

    Arguments and errors: those of `PerceiverResampler` that it has.
    """

    def __init__(
        self,
        *,
        dim: int,
        depth: int = 6,
        ff_mult: float = 4,
        max_num_media: int | None = None,
        max_num_frames: int | None = None,
        dim_media: int | None = None,
        activation: str = "gelu",
        bias: bool = False,
        norm: str = "layer",
        impl: str = "auto",
    ) -> None:
        super().__init__(dim, depth, dim_media, max_num_frames, max_num_media)
        options: dict[str, Any] = {"activation": activation, "norm": norm, "bias": bias}
        impl = op_impl(impl)
        self.layers = nn.ModuleList(
            FeedForward(dim, ff_mult, impl=impl, **options) for _ in range(depth)
        )
        self.norm = make_norm(norm, dim, impl)

    def forward(
        self,
        x: torch.Tensor,
        *,
        media_seqlens: torch.Tensor | None = None,
        places: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """(B, N, F, S, dim) -> (B, N, F * S, dim); of padding, any value: see `MediaLayout`."""
        x = self._embed(x, media_seqlens, places)
        for index, ff in enumerate(self.layers):
            x = within(f"layer {index}", lambda x, ff=ff: x + ff(x), x)
        return self.norm(x)


class SelfAttention(nn.Module):
    """Tokens attend to all tokens of their medium, without the residual.

    Arguments: those of `PerceiverAttention` that it has; impl is of the norm alone.
    """

    def __init__(
        self, *, dim: int, dim_head: int, heads: int, bias: bool, norm: str, impl: str
    ) -> None:
        super().__init__()
        check_dims(dim=dim, dim_head=dim_head, heads=heads)
        self.heads, self.dim_head = heads, dim_head
        self.norm = make_norm(norm, dim, op_impl(impl))
        self.to_qkv = nn.Linear(dim, 3 * heads * dim_head, bias=bias)
        self.to_out = nn.Linear(heads * dim_head, dim, bias=bias)

    def forward(self, x: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        """(M, T, dim) -> (M, T, dim); mask (M, 1, 1, T) bool, True at keys that are valid."""
        qkv = self.to_qkv(self.norm(x)).unflatten(-1, (3, self.heads, self.dim_head))
        q, k, v = qkv.transpose(1, 3).unbind(2)
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return self.to_out(attended.transpose(1, 2).flatten(2))


class TransformerResampler(_Resampler):
    """A Transformer encoder over a medium's features, all of which come out (table 3 row vi).

    The paper gives it the Perceiver Resampler's number of parameters, and no dimensions (section
    4.4.2 of v1): `depth` layers of self-attention and feed-forward, norms first.

    Arguments and errors: those of `PerceiverResampler` that it has.
    """

    def __init__(
        self,
        *,
        dim: int,
        depth: int = 6,
        dim_head: int = 64,
        heads: int = 8,
        ff_mult: float = 4,
        max_num_media: int | None = None,
        max_num_frames: int | None = None,
        dim_media: int | None = None,
        activation: str = "gelu",
        bias: bool = False,
        norm: str = "layer",
        impl: str = "auto",
    ) -> None:
        super().__init__(dim, depth, dim_media, max_num_frames, max_num_media)
        attention: dict[str, Any] = {"dim": dim, "dim_head": dim_head, "heads": heads}
        options: dict[str, Any] = {"norm": norm, "bias": bias, "impl": op_impl(impl)}
        self.layers = nn.ModuleList(
            nn.ModuleList(
                [
                    SelfAttention(**attention, **options),
                    FeedForward(dim, ff_mult, activation=activation, **options),
                ]
            )
            for _ in range(depth)
        )
        self.norm = make_norm(norm, dim, op_impl(impl))

    def forward(
        self,
        x: torch.Tensor,
        *,
        media_seqlens: torch.Tensor | None = None,
        places: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """(B, N, F, S, dim) -> (B, N, F * S, dim); no valid feature attends to padding."""
        x = self._embed(x, media_seqlens, places)
        outer = x.shape[:2]
        x = x.flatten(0, 1)
        mask = None
        if media_seqlens is not None:
            # The first one always: a softmax over nothing would be NaN.
            valid = media_seqlens.flatten().clamp(min=1)
            mask = (torch.arange(x.shape[1], device=x.device) < valid[:, None])[:, None, None]
        layers: Any = self.layers
        for index, layer in enumerate(layers):
            x = within(f"layer {index}", _self_attention_layer, layer, x, mask)
        return self.norm(x).unflatten(0, outer)


def _layer(
    layer: Any,
    latents: torch.Tensor,
    x: torch.Tensor,
    media_seqlens: torch.Tensor | None,
    media_kv: torch.Tensor | None,
) -> torch.Tensor:
    attn, ff = layer
    latents = latents + attn(x, latents, media_seqlens=media_seqlens, media_kv=media_kv)
    return latents + ff(latents)


def _self_attention_layer(layer: Any, x: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    attn, ff = layer
    x = x + attn(x, mask)
    return x + ff(x)
