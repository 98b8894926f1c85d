"""transformers' Mllama: cross-attention under a layout of tiles, its masks, gated residuals, norms.

B batch, L text tokens, N images of a sample, R tokens of a tile, H heads, Hkv key/value heads, D
head dim. The model's mask of tiles, (B, L, N, tiles), stays as it is: the dense one that it makes
of it for its cross-attention layers, (B, 1, L, N * tiles * R), is never made.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from flamingo_fast.layout import MediaLayout, values_are_at_hand
from flamingo_fast.ops.masked_cross_attention import masked_cross_attention
from flamingo_fast.patching.norms import rms_norm_rule
from flamingo_fast.patching.options import Options
from flamingo_fast.patching.parts import add_gated, add_gated_norm
from flamingo_fast.patching.rules import Rule, has, is_a, own_code
from flamingo_fast.patching.state import is_patched, options_of, own_forward, tell_once
from flamingo_fast.patching.transformers_hooks import ATTENTION
from flamingo_fast.ranges import within

_OLD, _NEW = "transformers 4.57.1", "transformers 5.24.0"
_BOTH = f"{_OLD} to 5.24.0"

# Attention that does no more than attend; under another name there may be anything.
_KNOWN_ATTENTION = ("eager", "sdpa", "flex_attention", ATTENTION)

_CAUSAL = (
    "without cross_attention_mask, transformers attends causally to the images under sdpa "
    "(transformers #48172) and to all of them under eager; patched, always to all"
)
_DENSE = (
    "tokens before the first image attend to all images (transformers #39379), as unpatched; "
    "unattended='zero_block' corrects it"
)
_DROPOUT = "attention dropout in training: such calls take the model's own masks and attention"


class TileMask(NamedTuple):
    """What cross-attention layers are given in place of the dense mask: a pytree.

    Attributes:
        num_tiles: columns of the mask: of all images of a sample.
        tokens_per_tile: R.
        layout: of tiles as media; None where there is one text token.
        bias: for one text token, what is added to the scores, (B, 1, 1, keys); None: nothing.
        first_tile, end_tile: the keys that there are of for one text token; no sample attends to
            others.
    """

    num_tiles: int
    tokens_per_tile: int
    layout: MediaLayout | None
    bias: torch.Tensor | None
    first_tile: int
    end_tile: int


def _tile_mask(
    attends: torch.Tensor, tokens_per_tile: int, dtype: torch.dtype, options: Options
) -> TileMask:
    """Of (B, L, tiles) bool."""
    num_tiles = attends.shape[2]
    if attends.shape[1] != 1:
        layout = MediaLayout.from_media_mask(attends)
        return TileMask(num_tiles, tokens_per_tile, layout, None, 0, num_tiles)
    # Of one token the dense mask is small, and a layout takes longer than what it saves.
    rows = attends.any(2, keepdim=True)
    bias = None
    first, end = 0, num_tiles
    is_whole = False
    if values_are_at_hand(attends):
        if options.unattended is None:
            wanted = attends | ~rows
        else:
            wanted = attends
        columns = wanted.any(0)[0].tolist()
        if any(columns):
            first = columns.index(True)
            end = num_tiles - columns[::-1].index(True)
        wanted = wanted[:, :, first:end]
        is_whole = bool(wanted.all())
    if not is_whole:
        masked = (~attends & rows)[:, None, :, first:end].repeat_interleave(tokens_per_tile, 3)
        bias = torch.zeros(masked.shape, dtype=dtype, device=masked.device)
        bias = bias.masked_fill_(masked, torch.finfo(dtype).min)
    return TileMask(num_tiles, tokens_per_tile, None, bias, first, end)


def model_forward(
    self: Any,
    input_ids: torch.Tensor | None = None,
    pixel_values: torch.Tensor | None = None,
    aspect_ratio_mask: torch.Tensor | None = None,
    aspect_ratio_ids: torch.Tensor | None = None,
    attention_mask: torch.Tensor | None = None,
    cross_attention_mask: torch.Tensor | None = None,
    *args: Any,
    **kwargs: Any,
) -> Any:
    """MllamaModel's, without the dense mask."""
    before = (input_ids, pixel_values, aspect_ratio_mask, aspect_ratio_ids, attention_mask)
    text = input_ids if input_ids is not None else kwargs.get("inputs_embeds")
    if cross_attention_mask is None or text is None or args or _needs_dense_mask(self, kwargs):
        return own_forward(self)(*before, cross_attention_mask, *args, **kwargs)
    mask = cross_attention_mask
    if mask.shape[1] != text.shape[1]:
        mask = _of_these_tokens(mask, text.shape[1], kwargs)
    # Whatever else is no 1 masks, as in transformers.
    attends = mask.flatten(2) == 1
    rows = attends.any(2)
    row_mask = None
    if not (values_are_at_hand(rows) and bool(rows.all())):
        row_mask = rows[:, None, :, None].to(self.dtype)
    tiles = _tile_mask(attends, self.vision_model.num_patches, self.dtype, options_of(self))
    return own_forward(self)(*before, None, tile_mask=(tiles, row_mask), **kwargs)


def _of_these_tokens(mask: torch.Tensor, seqlen: int, kwargs: dict[str, Any]) -> torch.Tensor:
    """Of a mask of all tokens so far, or more, the rows of those that are given now."""
    position = kwargs.get("cache_position")
    if position is not None:
        return mask[:, position]
    cache = kwargs.get("cache", kwargs.get("past_key_values"))
    begin = 0 if cache is None else int(cache.get_seq_length())
    return mask[:, begin : begin + seqlen]


def _needs_dense_mask(self: Any, kwargs: dict[str, Any]) -> bool:
    """Whether something in the layers may do what is not done under a `TileMask`."""
    text = self.language_model
    attentions = kwargs.get("output_attentions")
    if attentions is None:
        attentions = any(
            getattr(config, "output_attentions", False) for config in (self.config, text.config)
        )
    if attentions:
        tell_once(self, "output_attentions")
        return True
    if text.config._attn_implementation not in _KNOWN_ATTENTION:
        tell_once(self, f"attention {text.config._attn_implementation!r}")
        return True
    if not is_patched(text, "mllama.text_model"):
        return True
    for layer in _cross_layers(text):
        # Parts of a model may have been unpatched since.
        if not is_patched(layer, "mllama.cross_layer") or not is_patched(
            layer.cross_attn, "mllama.cross_attention"
        ):
            return True
        if layer.cross_attn.training and layer.cross_attn.dropout > 0:
            return True
    return False


def _cross_layers(text: Any) -> list[Any]:
    return [text.layers[index] for index in text.cross_attention_layers if index < len(text.layers)]


def text_model_forward(self: Any, *args: Any, tile_mask: Any = None, **kwargs: Any) -> Any:
    """MllamaTextModel's; it hands what it is given for masks to its layers."""
    if tile_mask is not None:
        tiles, rows = tile_mask
        kwargs.update(cross_attention_mask=tiles, full_text_row_masked_out_mask=rows)
    return own_forward(self)(*args, **kwargs)


def cross_layer_forward(self: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
    """MllamaCrossAttentionDecoderLayer's."""
    # What comes seventh is not the same in all versions.
    if len(args) > 6:
        return own_forward(self)(*args, **kwargs)
    return _cross_layer(self, *args, **kwargs)


def _cross_layer(
    self: Any,
    hidden_states: torch.Tensor,
    cross_attention_states: torch.Tensor | None,
    cross_attention_mask: torch.Tensor | TileMask | None,
    attention_mask: torch.Tensor | None,
    full_text_row_masked_out_mask: torch.Tensor | None,
    position_ids: torch.Tensor | None = None,
    *,
    use_cache: bool | None = False,
    position_embeddings: Any = None,
    **kwargs: Any,
) -> torch.Tensor:
    options = options_of(self)
    attended, _ = within(
        "attention",
        self.cross_attn,
        hidden_states=self.input_layernorm(hidden_states),
        attention_mask=cross_attention_mask,
        cross_attention_states=cross_attention_states,
        **kwargs,
    )
    rows = full_text_row_masked_out_mask
    if rows is not None:
        rows = rows[:, 0]
        if options.unattended is not None:
            attended = attended.masked_fill(rows == 0, 0)
    residual, normed = add_gated_norm(
        hidden_states,
        attended,
        self.cross_attn_attn_gate,
        self.post_attention_layernorm,
        options,
    )
    fed = within("feed-forward", self.mlp, normed)
    if rows is not None:
        fed = rows * fed
    return add_gated(residual, fed, self.cross_attn_mlp_gate, options)


def cross_attention_forward(
    self: Any, *args: Any, **kwargs: Any
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """MllamaTextCrossAttention's; under a mask that is no `TileMask`, its own."""
    mask = args[3] if len(args) > 3 else kwargs.get("attention_mask")
    if isinstance(mask, TileMask):
        return _attend_to_tiles(self, *args, **kwargs), None
    if mask is None and self.config._attn_implementation == "sdpa":
        kwargs.setdefault("is_causal", False)
    return own_forward(self)(*args, **kwargs)


def _attend_to_tiles(
    self: Any,
    hidden_states: torch.Tensor,
    cross_attention_states: torch.Tensor | None = None,
    cache: Any = None,
    attention_mask: Any = None,
    use_cache: bool | None = None,
    *,
    past_key_values: Any = None,
    **kwargs: Any,
) -> torch.Tensor:
    mask: TileMask = attention_mask
    if cache is None:
        cache = past_key_values
    batch, seqlen, _ = hidden_states.shape
    q = self.q_norm(self.q_proj(hidden_states).view(batch, seqlen, -1, self.head_dim))
    if cross_attention_states is None:
        kept = cache.layers[self.layer_idx]
        k, v = kept.keys, kept.values
    else:
        k, v = (
            project(cross_attention_states).view(batch, -1, self.num_key_value_heads, self.head_dim)
            for project in (self.k_proj, self.v_proj)
        )
        k, v = self.k_norm(k).transpose(1, 2), v.transpose(1, 2)
        if cache is not None:
            # Its arguments are those of the version.
            position = kwargs.get("cache_position")
            more = {"kwargs": kwargs} if position is None else {}
            also = () if position is None else ({"cache_position": position},)
            k, v = cache.update(k, v, self.layer_idx, *also, **more)
    if k.shape[2] != mask.num_tiles * mask.tokens_per_tile:
        raise ValueError(
            f"cross_attention_mask: {mask.num_tiles} tiles of {mask.tokens_per_tile} tokens, but "
            f"there are {k.shape[2]} tokens of images"
        )
    # Norms may have made them fp32; attention is what autocast rounds the inputs of.
    device = q.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else q.dtype
    q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
    if mask.layout is None:
        first, end = (tile * mask.tokens_per_tile for tile in (mask.first_tile, mask.end_tile))
        out = F.scaled_dot_product_attention(
            q.view(batch, k.shape[1], -1, self.head_dim),
            k[:, :, first:end],
            v[:, :, first:end],
            attn_mask=mask.bias,
            scale=self.scaling,
        )
    else:
        shape = (mask.num_tiles, mask.tokens_per_tile)
        out = masked_cross_attention(
            q,
            k.transpose(1, 2).unflatten(1, shape),
            v.transpose(1, 2).unflatten(1, shape),
            mask.layout,
            unattended="dense" if options_of(self).unattended is None else "zero",
            softmax_scale=self.scaling,
        )
    return self.o_proj(out.reshape(batch, seqlen, -1))


def vision_layer_forward(
    self: Any,
    hidden_states: torch.Tensor | None = None,
    attention_mask: torch.Tensor | None = None,
    *,
    hidden_state: torch.Tensor | None = None,
) -> torch.Tensor:
    """MllamaVisionEncoderLayer's, where it is gated; `hidden_state` is what 4.57 names it."""
    x: Any = hidden_states if hidden_state is None else hidden_state
    options = options_of(self)
    attended, _ = self.self_attn(self.input_layernorm(x), attention_mask=attention_mask)
    residual, normed = add_gated_norm(
        x, attended, self.gate_attn, self.post_attention_layernorm, options
    )
    return add_gated(residual, self.mlp(normed), self.gate_ffn, options)


def _is_cross_attention(module: nn.Module) -> bool:
    return is_a(module, "MllamaTextCrossAttention") and has(
        module, ("q_proj", "k_proj", "v_proj", "o_proj", "q_norm", "k_norm")
    )


def _is_cross_layer(module: nn.Module) -> bool:
    return has(
        module,
        ("cross_attn", "input_layernorm", "mlp", "post_attention_layernorm"),
        ("cross_attn_attn_gate", "cross_attn_mlp_gate"),
    )


def _is_text_model(module: nn.Module) -> bool:
    return is_a(module, "MllamaTextModel") and has(module, ("layers", "rotary_emb"))


def _is_model(module: nn.Module) -> bool:
    return is_a(module, "MllamaModel") and has(module, ("vision_model", "language_model"))


def _is_gated_vision_layer(module: nn.Module) -> bool:
    return has(
        module,
        ("self_attn", "mlp", "input_layernorm", "post_attention_layernorm"),
        ("gate_attn", "gate_ffn"),
    )


def _refuses_cross_layer(
    module: Any, options: Options, will_patch: Callable[[nn.Module], bool]
) -> str | None:
    if options.cross_attention and not will_patch(module.cross_attn):
        return "its attention is left alone"
    return None


def _refuses_text_model(
    module: Any, options: Options, will_patch: Callable[[nn.Module], bool]
) -> str | None:
    layers = _cross_layers(module)
    if all(will_patch(layer) and will_patch(layer.cross_attn) for layer in layers):
        return None
    return "some of its cross-attention layers are left alone"


def _refuses_model(
    module: Any, options: Options, will_patch: Callable[[nn.Module], bool]
) -> str | None:
    return None if will_patch(module.language_model) else "its language model is left alone"


def _attention_notes(module: Any, options: Options) -> list[str]:
    notes = [_CAUSAL]
    if module.dropout > 0:
        notes.append(_DROPOUT)
    return notes


RULES: tuple[Rule, ...] = (
    rms_norm_rule("mllama", "MllamaTextRMSNorm", {"f5c95295c0f85e5a": _BOTH}),
    Rule(
        name="mllama.cross_attention",
        features=("cross_attention",),
        matches=_is_cross_attention,
        forward=cross_attention_forward,
        known={"71de840163a3e782": _NEW, "a72bc54afe6431c7": _OLD},
        code=own_code("eager_attention_forward", "repeat_kv"),
        notes=_attention_notes,
    ),
    Rule(
        name="mllama.cross_layer",
        features=("cross_attention", "gated_residual"),
        matches=_is_cross_layer,
        forward=cross_layer_forward,
        known={"9df69982f3d1c1bb": _NEW, "bc3293ac8eb83a36": _OLD},
        refuses=_refuses_cross_layer,
    ),
    Rule(
        name="mllama.vision_layer",
        features=("gated_residual",),
        matches=_is_gated_vision_layer,
        forward=vision_layer_forward,
        known={"2d6d78a38e083e5d": _NEW, "0862c60c790c37d9": _OLD},
    ),
    Rule(
        name="mllama.text_model",
        features=("cross_attention",),
        matches=_is_text_model,
        forward=text_model_forward,
        known={"ec0fb4e905a95daa": _NEW, "d03551a2032dfa20": _OLD},
        refuses=_refuses_text_model,
    ),
    Rule(
        name="mllama.model",
        features=("cross_attention",),
        matches=_is_model,
        forward=model_forward,
        known={"c72607bf3dd76a0e": _NEW, "d8208a0fb6629a77": _OLD},
        code=own_code("_prepare_cross_attention_mask"),
        refuses=_refuses_model,
        notes=lambda module, options: [_DENSE] if options.unattended is None else [],
    ),
)
