"""Layers for Hugging Face's `kernels`: each has the forward of a module, which lends its `self`.

`flamingo-fast export-kernels` writes them into a kernel repository. The library takes a layer that
has a forward with as many arguments of the same kinds as the module's and nothing else but the two
flags: no constructor, no other members. Annotations name what the module must have.

B batch, L text tokens, N media of a sample, S features of a medium, R latents or tokens of one.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import nn

from flamingo_fast.modules.media_layouts import layout_for
from flamingo_fast.ops.attention_gradients import unbind_kv
from flamingo_fast.ops.dispatch import autocast_dtype
from flamingo_fast.ops.gated_residual import gated_residual
from flamingo_fast.ops.latent_attention import latent_attention
from flamingo_fast.ops.masked_cross_attention import masked_cross_attention
from flamingo_fast.ops.norm import gated_residual_norm, layer_norm, rms_norm
from flamingo_fast.ops.squared_relu import squared_relu


class LayerNorm(nn.Module):
    """torch.nn.LayerNorm: (..., dim) -> (..., dim). Of several dimensions, PyTorch's own."""

    has_backward: bool = True
    can_torch_compile: bool = True

    normalized_shape: Sequence[int]
    weight: torch.Tensor | None
    bias: torch.Tensor | None
    eps: float

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        # Under autocast the op returns autocast's dtype, and PyTorch's fp32.
        if len(self.normalized_shape) != 1 or autocast_dtype(input) is not None:
            return F.layer_norm(
                input, list(self.normalized_shape), self.weight, self.bias, self.eps
            )
        return layer_norm(input, self.weight, self.bias, eps=self.eps)


class RMSNorm(nn.Module):
    """torch.nn.RMSNorm: (..., dim) -> (..., dim). Of several dimensions, PyTorch's own."""

    has_backward: bool = True
    can_torch_compile: bool = True

    normalized_shape: Sequence[int]
    weight: torch.Tensor | None
    eps: float | None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if len(self.normalized_shape) != 1 or autocast_dtype(x) is not None:
            return F.rms_norm(x, list(self.normalized_shape), self.weight, self.eps)
        # PyTorch's default is that of the dtype it computes in.
        computed_in = torch.promote_types(x.dtype, torch.float32)
        eps = torch.finfo(computed_in).eps if self.eps is None else self.eps
        return rms_norm(x, self.weight, eps=eps)


class LlamaRMSNorm(nn.Module):
    """transformers' LlamaRMSNorm and its many copies: (..., dim) -> (..., dim)."""

    has_backward: bool = True
    can_torch_compile: bool = True

    weight: torch.Tensor
    variance_epsilon: float

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        # Its product with a weight of another dtype promotes; autocast changes nothing in it.
        device = "cpu" if hidden_states.is_meta else hidden_states.device.type
        with torch.autocast(device, enabled=False):
            if self.weight.dtype != hidden_states.dtype:
                return self.weight * rms_norm(hidden_states, None, eps=self.variance_epsilon)
            return rms_norm(hidden_states, self.weight, eps=self.variance_epsilon)


class GatedResidual(nn.Module):
    """x + tanh(gate) * y: (..., dim), (..., dim) -> (..., dim)."""

    has_backward: bool = True
    can_torch_compile: bool = True

    gate: torch.Tensor

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return gated_residual(x, y, self.gate)


class GatedResidualNorm(nn.Module):
    """x + tanh(gate) * y and its norm: (..., dim), (..., dim) -> (residual, normed)."""

    has_backward: bool = True
    can_torch_compile: bool = True

    gate: torch.Tensor
    weight: torch.Tensor
    bias: torch.Tensor | None
    eps: float
    norm: str

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return gated_residual_norm(
            x, y, self.gate, self.weight, self.bias, eps=self.eps, norm=self.norm
        )


class SquaredReLU(nn.Module):
    """relu(x)**2, elementwise."""

    has_backward: bool = True
    can_torch_compile: bool = True

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return squared_relu(x)


class MaskedCrossAttention(nn.Module):
    """OpenFlamingo's MaskedCrossAttention: text attends to its media, (B, L, dim)."""

    has_backward: bool = True
    can_torch_compile: bool = True

    heads: int
    scale: float
    only_attend_immediate_media: bool
    norm: nn.Module
    to_q: nn.Module
    to_kv: nn.Module
    to_out: nn.Module

    def forward(
        self,
        x: torch.Tensor,
        media: torch.Tensor,
        media_locations: torch.Tensor | None = None,
        use_cached_media: bool = False,
    ) -> torch.Tensor:
        one = self.only_attend_immediate_media
        attend = "previous" if one else "all_previous"
        layout = layout_for(self, x, media, media_locations, use_cached_media, attend)
        q = self.to_q(self.norm(x)).unflatten(-1, (self.heads, -1))
        k, v = unbind_kv(self.to_kv(media).unflatten(-1, (2, self.heads, -1)))
        attended = masked_cross_attention(
            q,
            k,
            v,
            layout,
            unattended="zero" if one else "uniform",
            past_last="uniform",
            softmax_scale=self.scale,
        )
        return self.to_out(attended.flatten(-2))


class GatedCrossAttentionBlock(nn.Module):
    """OpenFlamingo's GatedCrossAttentionBlock: attention and feed-forward, each behind its gate.

    Its attention is another module, with a layer of its own.
    """

    has_backward: bool = True
    can_torch_compile: bool = True

    attn: nn.Module
    attn_gate: torch.Tensor
    ff: nn.Module
    ff_gate: torch.Tensor

    def forward(
        self,
        x: torch.Tensor,
        media: torch.Tensor,
        media_locations: torch.Tensor | None = None,
        use_cached_media: bool = False,
    ) -> torch.Tensor:
        attended = self.attn(
            x, media, media_locations=media_locations, use_cached_media=use_cached_media
        )
        x = gated_residual(x, attended, self.attn_gate)
        return gated_residual(x, self.ff(x), self.ff_gate)


class PerceiverAttention(nn.Module):
    """OpenFlamingo's PerceiverAttention: (B, N, S, dim), latents (B, N, R, dim) -> the latter."""

    has_backward: bool = True
    can_torch_compile: bool = True

    heads: int
    scale: float
    norm_media: nn.Module
    norm_latents: nn.Module
    to_q: nn.Module
    to_kv: nn.Module
    to_out: nn.Module

    def forward(self, x: torch.Tensor, latents: torch.Tensor) -> torch.Tensor:
        outer = x.shape[:-2]
        latents = self.norm_latents(latents)
        kv_media, kv_latents = (
            self.to_kv(source).unflatten(-1, (2, self.heads, -1)).flatten(0, -5)
            for source in (self.norm_media(x), latents)
        )
        attended = latent_attention(
            self.to_q(latents).unflatten(-1, (self.heads, -1)).flatten(0, -4),
            *unbind_kv(kv_media),
            *unbind_kv(kv_latents),
            softmax_scale=self.scale,
        )
        return self.to_out(attended.flatten(-2)).unflatten(0, outer)
