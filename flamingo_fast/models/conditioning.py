"""Where a language model sees media: new layers between its own, by hooks.

The language model's modules, parameters and state-dict keys stay as they are, so its own `generate`
and quantised weights go on working. What its layers are to attend to is a `MediaContext`, set for
the length of a call.
"""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from flamingo_fast.layout import MediaLayout
from flamingo_fast.models.config import ConditioningConfig, ConfigError
from flamingo_fast.models.fields import hidden_width
from flamingo_fast.modules import (
    GatedCrossAttentionBlock,
    VanillaCrossAttention,
    project_media_kv,
)
from flamingo_fast.modules.cross_attention import MediaKV

# Names by which language models have the parts of a layer.
_LAYERS = ("layers", "h", "decoder.layers", "blocks", "model.layers")
_ATTENTIONS = ("self_attn", "attn", "attention", "self_attention")
# Layers that are x + attention(norm(x)), then x + feed_forward(norm(x)).
_SEQUENTIAL = (
    *("ChinchillaLayer", "GPT2Block", "OPTDecoderLayer", "GPTNeoXLayer"),
    *("LlamaDecoderLayer", "MistralDecoderLayer", "Qwen2DecoderLayer"),
)
_FIRST_NORMS = ("input_layernorm", "ln_1", "self_attn_layer_norm", "norm_attn", "attn_norm")


@dataclasses.dataclass
class MediaContext:
    """What the tokens of a call attend to.

    Attributes:
        layout: of the call's tokens, B rows.
        media: (media_total, R, dim_media); or None where media_kv is given.
        media_kv: keys and values of each block, made before.
        after: of one token that comes after them, for calls with one.
    """

    layout: MediaLayout
    media: torch.Tensor | None = None
    media_kv: list[MediaKV] | None = None
    after: MediaLayout | None = None
    _tiled: dict[tuple[int, bool], MediaLayout] = dataclasses.field(default_factory=dict)

    def attend(self, block: nn.Module, index: int, x: torch.Tensor, **options: Any) -> torch.Tensor:
        """`block` on x, (B * n, L, dim): each n rows in turn are of one sample, as beams are.

        Rows attend independently of each other, so the beams of a sample are one longer row: they
        share its keys and values.
        """
        rows, seqlen = x.shape[:2]
        layout = self.layout
        is_after = self.after is not None and seqlen == 1 != layout.seqlen
        if self.after is not None and is_after:
            layout = self.after
        batch = layout.batch_size
        copies = rows // max(batch, 1)
        if copies * batch != rows or seqlen != layout.seqlen:
            raise ValueError(
                f"hidden states: expected {layout.seqlen} tokens in each of {batch} rows (or a "
                f"multiple), as the media's layout has; got {tuple(x.shape[:2])}"
            )
        media_kv = None if self.media_kv is None else self.media_kv[index]
        if copies == 1:
            return block(x, self.media, layout=layout, media_kv=media_kv, **options)
        if (copies, is_after) not in self._tiled:
            self._tiled[copies, is_after] = MediaLayout.cat([layout] * copies, dim=1)
        folded = {
            name: each.reshape(batch, copies * seqlen, -1) if torch.is_tensor(each) else each
            for name, each in {"x": x, **options}.items()
        }
        out = block(
            media=self.media, layout=self._tiled[copies, is_after], media_kv=media_kv, **folded
        )
        return out.view(x.shape)


class Conditioning(nn.Module):
    """The new layers of a Flamingo model, and the context they work in.

    Arguments:
        config: which layers, and where.
        dim: the language model's width.
        depth: its layers.
        dim_media: width of media tokens.

    Attributes:
        blocks: one for each conditioned layer; of grafting one for each layer of the stack.
        layers: of grafting, the stack's layers of self-attention, else empty.
        layer_indices: which layers of the language model the blocks belong to.
        checkpoint_blocks: whether blocks are computed again in the backward.
    """

    def __init__(
        self,
        config: ConditioningConfig,
        dim: int,
        depth: int,
        dim_media: int,
        make_layer: Callable[[int], nn.Module] | None = None,
    ) -> None:
        super().__init__()
        self.config = config
        self.layer_indices = config.layers(depth)
        options: dict[str, Any] = {
            "dim": dim,
            "dim_visual": dim_media,
            "dim_head": config.dim_head,
            "heads": config.heads,
            "attend": config.attend,
            "unattended": config.unattended,
            "past_last": config.past_last,
            "media_norm": config.media_norm,
            "bias": config.bias,
            "norm": config.norm,
            "tanh_gating": config.tanh_gating,
        }
        is_graft = config.kind == "grafting"
        number = config.num_layers if is_graft else len(self.layer_indices)
        if config.kind == "vanilla_xattn":
            blocks: list[nn.Module] = [VanillaCrossAttention(**options) for _ in range(number)]
        else:
            hidden_width("conditioning.ff_mult", config.ff_mult, dim)
            options |= {"ff_mult": config.ff_mult, "activation": config.activation}
            blocks = [GatedCrossAttentionBlock(**options) for _ in range(number)]
        self.blocks = nn.ModuleList(blocks)
        self.layers = nn.ModuleList()
        if is_graft:
            assert make_layer is not None
            self.layers.extend(make_layer(index) for index in range(number))
        self.checkpoint_blocks = False
        self._context: MediaContext | None = None
        self._is_inside_checkpoint = False

    def project(self, media: torch.Tensor) -> list[MediaKV]:
        """Keys and values for each block, of media (media_total, R, dim_media)."""
        return project_media_kv(list(self.blocks), media)

    @contextlib.contextmanager
    def of(self, context: MediaContext | None) -> Iterator[None]:
        """Inside, the language model attends to the context's media."""
        previous, self._context = self._context, context
        try:
            yield
        finally:
            self._context = previous

    def for_checkpoint(
        self,
    ) -> tuple[contextlib.AbstractContextManager[None], contextlib.AbstractContextManager[None]]:
        """`context_fn` of torch.utils.checkpoint: what is computed again sees what it saw."""
        return self._inside_checkpoint(self._context), self._inside_checkpoint(self._context)

    @contextlib.contextmanager
    def _inside_checkpoint(self, context: MediaContext | None) -> Iterator[None]:
        """A block there is computed again with what is around it, and not once more by itself."""
        was_inside, self._is_inside_checkpoint = self._is_inside_checkpoint, True
        try:
            with self.of(context):
                yield
        finally:
            self._is_inside_checkpoint = was_inside

    def attend(self, index: int, x: torch.Tensor, **options: Any) -> torch.Tensor | None:
        """Block `index` on x; None where there is no context: the language model is on its own."""
        context, block = self._context, self.blocks[index]
        if context is None:
            return None
        is_checkpointed = self.checkpoint_blocks and not self._is_inside_checkpoint
        if is_checkpointed and torch.is_grad_enabled():
            return checkpoint(context.attend, block, index, x, use_reentrant=False, **options)
        return context.attend(block, index, x, **options)

    def attach(self, lang_model: nn.Module) -> None:
        """Puts the blocks into the language model.

        Raises:
            ConfigError: it has no layers, or none of the parts of one, that we know.
        """
        layers = find_layers(lang_model)
        for index, place in enumerate(self.layer_indices):
            layer = layers[place]
            if self.config.kind == "gated_xattn_dense":
                layer.register_forward_pre_hook(_BeforeLayer(self, index))
            else:
                _check_is_sequential(lang_model, layer)
                between = _AfterAttention(self, index)
                no_place = "so there is no place for vanilla_xattn"
                norm = _part(layer, _FIRST_NORMS, no_place)
                norm.register_forward_pre_hook(between.see_input)
                _part(layer, _ATTENTIONS, no_place).register_forward_hook(between)

    def extra_repr(self) -> str:
        return f"kind={self.config.kind!r}, layers={self.layer_indices}"


class _BeforeLayer:
    """GATED XATTN-DENSE: what enters the layer goes through the block first."""

    def __init__(self, conditioning: Conditioning, index: int) -> None:
        self.conditioning, self.index = conditioning, index

    def __call__(self, layer: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        if not args:
            raise RuntimeError(
                f"{type(layer).__name__}: expected hidden states as the first positional argument"
            )
        out = self.conditioning.attend(self.index, args[0])
        return None if out is None else (out, *args[1:])


class _AfterAttention:
    """VANILLA XATTN: added to what self-attention returns, of the sum that the layer then makes.

    A layer is x + attention(norm(x)), then the feed-forward of that. Both the sum and what the
    feed-forward is added to must have the media in them, so the attention's output gets them. x is
    seen where the first norm sees it: inside what activation checkpointing repeats.
    """

    def __init__(self, conditioning: Conditioning, index: int) -> None:
        self.conditioning, self.index = conditioning, index
        self._x: torch.Tensor | None = None

    def see_input(self, norm: nn.Module, args: tuple[Any, ...]) -> None:
        if self.conditioning._context is not None:
            self._x = args[0]

    def __call__(self, attention: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        if self.conditioning._context is None or self._x is None:
            return None
        attended, *rest = output if isinstance(output, tuple) else (output,)
        x, self._x = self._x, None
        out = self.conditioning.attend(self.index, x + attended, residual=attended)
        return (out, *rest) if isinstance(output, tuple) else out


def find_layers(lang_model: nn.Module) -> nn.ModuleList:
    """A language model's layers.

    Raises:
        ConfigError: nothing in it looks like them.
    """
    base = getattr(lang_model, "base_model", lang_model)
    for path in _LAYERS:
        found: Any = base
        for name in path.split("."):
            found = getattr(found, name, None)
        if isinstance(found, nn.ModuleList) and len(found) > 0:
            # Of layers without (state-space models) neither caches nor padding are what we expect.
            _part(found[0], _ATTENTIONS, "so it is no layer that we know")
            return found
    raise ConfigError(
        f"lang_model: {type(lang_model).__name__} has no layers that we know; expected its base "
        f"model to have a ModuleList named {', '.join(_LAYERS)}"
    )


def _part(layer: nn.Module, names: tuple[str, ...], consequence: str) -> nn.Module:
    for name in names:
        found = getattr(layer, name, None)
        if isinstance(found, nn.Module):
            return found
    raise ConfigError(
        f"lang_model: {type(layer).__name__} has none of {', '.join(names)}, {consequence}"
    )


def _check_is_sequential(lang_model: nn.Module, layer: nn.Module) -> None:
    """Whether the feed-forward comes after self-attention, and norms before each of them.

    Of layers that we don't know nobody can tell: in others attention returns the sum already
    (BLOOM), or is normed afterwards (Gemma 3).
    """
    if type(layer).__name__ not in _SEQUENTIAL:
        raise ConfigError(
            "conditioning.kind: vanilla_xattn goes between the self-attention and the feed-forward "
            f"of {', '.join(_SEQUENTIAL)}; got {type(layer).__name__}"
        )
    config = getattr(lang_model, "config", None)
    is_parallel = getattr(config, "use_parallel_residual", False)
    is_post_norm = getattr(config, "do_layer_norm_before", True) is False
    if is_parallel or is_post_norm:
        reason = "side by side" if is_parallel else "with norms after them"
        raise ConfigError(
            f"conditioning.kind: vanilla_xattn goes between self-attention and feed-forward, and "
            f"{type(layer).__name__} has these {reason}"
        )
