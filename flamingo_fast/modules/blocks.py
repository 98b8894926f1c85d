"""What a gated layer adds to a language model: GATED XATTN-DENSE, and cross-attention alone.

B batch, L text tokens, N media of a sample, R tokens of a medium.
"""

import dataclasses
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from flamingo_fast.layout import MediaLayout
from flamingo_fast.modules.cross_attention import MaskedCrossAttention, MediaKV, media_or_kv
from flamingo_fast.modules.feed_forward import FeedForward
from flamingo_fast.modules.norm import RMSNorm
from flamingo_fast.modules.options import op_impl
from flamingo_fast.modules.plain import has_hooks, is_plain
from flamingo_fast.ops.gated_residual import gated_residual
from flamingo_fast.ops.norm import gated_residual_norm
from flamingo_fast.ranges import within


def _gate(dim: int, tanh_gating: bool, vector_gates: bool) -> nn.Parameter | None:
    return nn.Parameter(torch.zeros(dim if vector_gates else 1)) if tanh_gating else None


@dataclasses.dataclass(frozen=True)
class _Folded:
    """Output layers times tanh(gate), and what tells whether they still are."""

    identity: tuple[Any, ...]
    weight_out: torch.Tensor
    bias_out: torch.Tensor | None
    weight_down: torch.Tensor
    bias_down: torch.Tensor | None

    def __deepcopy__(self, memo: dict[int, Any]) -> None:
        """A copied block has other parameters than these were made of."""

    def __reduce__(self) -> tuple[Any, ...]:
        return type(None), ()


def _fold(linear: nn.Linear, gate: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Weight and bias of tanh(gate) * linear, rounded once."""
    wide = torch.promote_types(gate.dtype, torch.float32)
    factor = gate.to(wide).tanh().expand(linear.out_features)
    weight = (factor[:, None] * linear.weight.to(wide)).to(linear.weight.dtype)
    bias = None if linear.bias is None else (factor * linear.bias.to(wide)).to(linear.bias.dtype)
    return weight, bias


def _identity(block: "GatedCrossAttentionBlock") -> tuple[Any, ...]:
    """Changes with the parameters that are folded, in place or by new ones."""
    down: Any = block.ff[3]
    parameters = (
        block.attn_gate,
        block.ff_gate,
        block.attn.to_out.weight,
        block.attn.to_out.bias,
        down.weight,
        down.bias,
    )
    return tuple(
        # What was made in inference mode counts no versions: it never equals itself.
        (each.data_ptr(), object() if each.is_inference() else each._version, each.dtype)
        for each in parameters
        if each is not None
    )


class _GatedLayer(nn.Module):
    """Cross-attention with its gate, and the choice of leaving tokens without media alone."""

    attn_gate: nn.Parameter | None

    def __init__(
        self, dim: int, unattended: str | None, tanh_gating: bool, vector_gates: bool, attn: Any
    ) -> None:
        super().__init__()
        self.leaves_unattended = unattended == "zero_block"
        options = {"unattended": unattended}
        if self.leaves_unattended:
            past_last = attn.get("past_last")
            if past_last not in (None, "zero"):
                raise ValueError(
                    "past_last: expected None or 'zero' beside unattended='zero_block', got "
                    f"{past_last!r}"
                )
            options = {"unattended": "zero", "past_last": "zero"}
        self.attn = MaskedCrossAttention(dim=dim, **{**attn, **options})
        self.attn_gate = _gate(dim, tanh_gating, vector_gates)
        self.impl = op_impl(self.attn.impl)

    def _attend(
        self,
        x: torch.Tensor,
        media: torch.Tensor | None,
        media_locations: torch.Tensor | None,
        use_cached_media: bool,
        layout: MediaLayout | None,
        media_kv: MediaKV | None,
        needs_kv: bool,
    ) -> tuple[torch.Tensor, MediaKV | None, MediaLayout | None]:
        if layout is None and self.leaves_unattended:
            layout = self._make_layout(x, media, media_kv, media_locations, use_cached_media)
        attended = within(
            "attention",
            self.attn,
            x,
            media,
            media_locations=media_locations,
            use_cached_media=use_cached_media,
            layout=layout,
            media_kv=media_kv,
            return_media_kv=needs_kv,
        )
        if needs_kv:
            attended, media_kv = attended
        return attended, media_kv, layout

    def _make_layout(
        self,
        x: torch.Tensor,
        media: torch.Tensor | None,
        media_kv: MediaKV | None,
        media_locations: torch.Tensor | None,
        use_cached_media: bool,
    ) -> MediaLayout:
        of_media = media_or_kv(media, media_kv)
        return self.attn.make_layout(x, of_media, media_locations, use_cached_media)

    def _finish(
        self,
        x: torch.Tensor,
        out: torch.Tensor,
        media_kv: MediaKV | None,
        layout: MediaLayout | None,
        return_media_kv: bool,
    ) -> Any:
        if self.leaves_unattended and layout is not None:
            out = torch.where(layout.attends()[..., None], out, x)
        return (out, media_kv) if return_media_kv else out

    def extra_repr(self) -> str:
        gates = "none" if self.attn_gate is None else tuple(self.attn_gate.shape)
        zero_block = ", unattended='zero_block'" if self.leaves_unattended else ""
        return f"gates={gates}{zero_block}, impl={self.impl!r}"


class GatedCrossAttentionBlock(_GatedLayer):
    """GATED XATTN-DENSE (Flamingo, figure 4): gated cross-attention, then a gated feed-forward.

    OpenFlamingo's class of that name (open_flamingo/src/helpers.py), arguments and state-dict keys;
    flamingo-pytorch's too. The paper's is heads=16, dim_head=128, activation="squared_relu",
    media_norm=True, bias=True.

    Kept for the backward are, beside the attention's, x, the residual after it, what is normed, and
    the first linear layer's output of the feed-forward: nothing grows with L x N.

    Arguments:
        dim, dim_visual, dim_head, heads, kv_heads, media_norm, impl: see `MaskedCrossAttention`.
        only_attend_immediate_media, attend, past_last: see there.
        bias, norm: see there; also of the feed-forward.
        ff_mult: hidden width of the feed-forward, in units of dim.
        unattended: as of `MaskedCrossAttention`; "zero_block" leaves tokens that attend to nothing
            as they are, bit for bit, feed-forward and all (Meta's Mllama and torchtune), those past
            the last medium too.
        activation: "gelu" (OpenFlamingo) or "squared_relu" (Flamingo, appendix A.1.4).
        tanh_gating: without it, row iii of Flamingo's table 3, there are no gates.
        vector_gates: gates of shape (dim,) in place of (1,) (IDEFICS).

    Raises:
        ValueError: a wrong argument, by name.
    """

    ff_gate: nn.Parameter | None

    def __init__(
        self,
        *,
        dim: int,
        dim_visual: int | None = None,
        dim_head: int = 64,
        heads: int = 8,
        ff_mult: float = 4,
        only_attend_immediate_media: bool = True,
        attend: str | None = None,
        unattended: str | None = None,
        past_last: str | None = None,
        activation: str = "gelu",
        media_norm: bool = False,
        kv_heads: int | None = None,
        bias: bool = False,
        norm: str = "layer",
        tanh_gating: bool = True,
        vector_gates: bool = False,
        impl: str = "auto",
    ) -> None:
        attn = {
            "dim_visual": dim_visual,
            "dim_head": dim_head,
            "heads": heads,
            "only_attend_immediate_media": only_attend_immediate_media,
            "attend": attend,
            "past_last": past_last,
            "media_norm": media_norm,
            "kv_heads": kv_heads,
            "bias": bias,
            "norm": norm,
            "impl": impl,
        }
        super().__init__(dim, unattended, tanh_gating, vector_gates, attn)
        self.ff = FeedForward(
            dim, ff_mult, activation=activation, norm=norm, bias=bias, impl=self.impl
        )
        self.ff_gate = _gate(dim, tanh_gating, vector_gates)
        self._folded: _Folded | None = None

    def fold_gates(self, fold: bool = True) -> None:
        """Keeps copies of the output layers with the gates multiplied in, for inference.

        A gated residual is then the end of a matrix product. The parameters and the state dict stay
        as they are. The copies are used where gradients are off, outside torch.compile, as long as
        parameters are what they were and no hooks, LoRA, quantisation or sharding are in the way;
        otherwise the block does what it does without them. What is written through `.data` PyTorch
        doesn't count as a change: fold again.

        Raises:
            ValueError: the block has no gates, or weights that may not be read.
        """
        self._folded = None
        if not fold:
            return
        if self.attn_gate is None or self.ff_gate is None:
            raise ValueError("tanh_gating: this block has no gates to fold")
        if not self._may_fold():
            raise ValueError("this block has weights that are hooked, sharded or not of nn.Linear")
        down: Any = self.ff[3]
        with torch.no_grad():
            self._folded = _Folded(
                _identity(self),
                *_fold(self.attn.to_out, self.attn_gate),
                *_fold(down, self.ff_gate),
            )

    def _may_fold(self) -> bool:
        ff: Any = self.ff
        return (
            isinstance(ff, FeedForward)
            and ff.is_plain()
            and type(self.attn) is MaskedCrossAttention
            and "forward" not in self.attn.__dict__
            and not has_hooks(self.attn)
            and is_plain(self.attn.to_out)
        )

    def _folded_weights(self) -> "_Folded | None":
        folded = self._folded
        if folded is None or torch.is_grad_enabled() or torch.compiler.is_compiling():
            return None
        return folded if self._may_fold() and folded.identity == _identity(self) else None

    def _forward_folded(
        self,
        folded: "_Folded",
        x: torch.Tensor,
        media: torch.Tensor | None,
        media_locations: torch.Tensor | None,
        use_cached_media: bool,
        layout: MediaLayout | None,
        media_kv: MediaKV | None,
        return_media_kv: bool,
    ) -> Any:
        if layout is None and self.leaves_unattended:
            layout = self._make_layout(x, media, media_kv, media_locations, use_cached_media)
        attended, media_kv = within(
            "attention",
            self.attn.attend_to,
            x,
            media,
            media_locations,
            use_cached_media,
            layout=layout,
            media_kv=media_kv,
        )
        residual = x + F.linear(attended, folded.weight_out, folded.bias_out)
        out = within("feed-forward", self._folded_feed_forward, residual, folded)
        return self._finish(x, out, media_kv, layout, return_media_kv)

    def _folded_feed_forward(self, residual: torch.Tensor, folded: "_Folded") -> torch.Tensor:
        norm, up, activation, _ = self.ff
        hidden = activation(up(norm(residual)))
        return residual + F.linear(hidden, folded.weight_down, folded.bias_down)

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
    ) -> Any:
        """(B, L, dim) -> (B, L, dim); arguments, results and errors of `MaskedCrossAttention`."""
        if folded := self._folded_weights():
            return self._forward_folded(
                folded,
                x,
                media,
                media_locations,
                use_cached_media,
                layout,
                media_kv,
                return_media_kv,
            )
        attended, media_kv, layout = self._attend(
            x, media, media_locations, use_cached_media, layout, media_kv, return_media_kv
        )
        if self.attn_gate is None or self.ff_gate is None:
            residual = x + attended
            out = residual + within("feed-forward", self.ff, residual)
        elif isinstance(self.ff, FeedForward) and self.ff.is_plain():
            norm: Any = self.ff[0]
            is_rms = isinstance(norm, RMSNorm)
            residual, normed = gated_residual_norm(
                x,
                attended,
                self.attn_gate,
                norm.weight,
                None if is_rms else norm.bias,
                eps=norm.eps,
                norm="rms" if is_rms else "layer",
                impl=self.impl,
            )
            out = within("feed-forward", self.ff.after_norm, normed, residual, self.ff_gate)
        else:
            residual = gated_residual(x, attended, self.attn_gate, impl=self.impl)
            fed = within("feed-forward", self.ff, residual)
            out = gated_residual(residual, fed, self.ff_gate, impl=self.impl)
        return self._finish(x, out, media_kv, layout, return_media_kv)


class VanillaCrossAttention(_GatedLayer):
    """x + tanh(attn_gate) * cross-attention: no feed-forward of its own (Flamingo, table 3 row iv).

    In the paper it stands between the frozen self-attention and the frozen feed-forward of a layer
    (section 4.4.2 of v1), as in the original Transformer's decoder.

    Arguments and errors: those of `GatedCrossAttentionBlock` without the feed-forward's.
    """

    def __init__(
        self,
        *,
        dim: int,
        unattended: str | None = None,
        tanh_gating: bool = True,
        vector_gates: bool = False,
        **attn: Any,
    ) -> None:
        super().__init__(dim, unattended, tanh_gating, vector_gates, attn)

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
        residual: torch.Tensor | None = None,
    ) -> Any:
        """(B, L, dim) -> (B, L, dim); arguments, results and errors of `MaskedCrossAttention`.

        Arguments:
            residual: what the gated attention is added to in place of x, of its shape.
        """
        attended, media_kv, layout = self._attend(
            x, media, media_locations, use_cached_media, layout, media_kv, return_media_kv
        )
        residual = x if residual is None else residual
        if self.attn_gate is None:
            out = residual + attended
        else:
            out = gated_residual(residual, attended, self.attn_gate, impl=self.impl)
        return self._finish(residual, out, media_kv, layout, return_media_kv)
