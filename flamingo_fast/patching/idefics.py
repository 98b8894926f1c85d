"""Idefics (the first) of transformers: text attends to images as `image_attention_mask` says.

B batch, T text tokens, N images of a sample, R tokens of an image, H heads, D head dim, W width.

The model's fast forward makes one layout for all layers, and what they have to know of images
reaches them beside the arguments that the model passes on to all layers. It leaves the peer's
forward a mask of one token, since of that one it makes B * T * N * R numbers.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from flamingo_fast.layout import MediaLayout, values_are_at_hand
from flamingo_fast.modules.plain import is_plain
from flamingo_fast.ops.masked_cross_attention import masked_cross_attention
from flamingo_fast.patching import idefics_perceiver
from flamingo_fast.patching.kept import current, generation
from flamingo_fast.patching.norms import rms_norm_rule
from flamingo_fast.patching.options import Options
from flamingo_fast.patching.parts import add_gated, add_gated_norm, checkpointed
from flamingo_fast.patching.remembered import may_remember
from flamingo_fast.patching.rules import Rule, functions_beside, has, is_a
from flamingo_fast.patching.state import (
    does_more,
    is_patched,
    options_of,
    own_forward,
    state_of,
    tell_once,
)
from flamingo_fast.patching.transformers_hooks import ATTENTION
from flamingo_fast.ranges import within

_LAYER = "idefics.cross_attention"
# The argument with the layout that layers get; attention of the text ignores it.
_IMAGES = "flamingo_fast_images"
# Implementations of attention that ignore arguments they don't know.
_ATTENTIONS = (None, "eager", "sdpa", ATTENTION)


@checkpointed
def forward_layer(
    self: Any,
    hidden_states: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    image_hidden_states: torch.Tensor | None = None,
    image_attention_mask: torch.Tensor | None = None,
    cross_attention_gate: torch.Tensor | None = None,
    *cache: Any,
    **kwargs: Any,
) -> torch.Tensor:
    """Gated cross-attention and feed-forward.

    Arguments:
        hidden_states: (B, T, W) of the text.
        image_hidden_states: (B, N * R, width of images).
        image_attention_mask, cross_attention_gate: used where the model's fast forward gave no
            layout; (B, 1, T, N * R), added to scores, and (B, T), 0 for tokens without images.
    """
    layout: MediaLayout | None = kwargs.pop(_IMAGES, None)
    caches = (*cache, *(kwargs.pop(name, None) for name in ("cache", "past_key_values")))
    if (
        image_hidden_states is None
        or cross_attention_gate is None
        or any(each is not None for each in caches)
    ):
        # It says what is wrong.
        return own_forward(self)(
            hidden_states,
            attention_mask,
            image_hidden_states,
            image_attention_mask,
            cross_attention_gate,
            next((each for each in caches if each is not None), None),
            **kwargs,
        )
    options = options_of(self)
    normed = self.input_layernorm(hidden_states)
    silent = None
    if layout is not None:
        attended = within("attention", _attend, self, normed, image_hidden_states, layout)
        if _leaves(options) or not _maps_zero_to_zero(self.cross_attn.o_proj):
            silent = ~layout.attends().to(normed.device)
    else:
        attended, _ = within(
            "attention",
            self.cross_attn,
            hidden_states=normed,
            key_value_states=image_hidden_states,
            attention_mask=image_attention_mask,
            **kwargs,
        )
        silent = cross_attention_gate == 0
    # Its attribute `config` is how much is dropped.
    attended = F.dropout(attended, p=self.config, training=self.training)
    if silent is not None:
        attended = attended.masked_fill(silent[:, :, None], 0.0)
    residual, normed = add_gated_norm(
        hidden_states,
        attended,
        self.alpha_cross_attn,
        self.post_attention_layernorm,
        options,
        self.act_cross_attn,
    )
    hidden = within("feed-forward", self.mlp, normed)
    hidden = F.dropout(hidden, p=self.config, training=self.training)
    out = add_gated(residual, hidden, self.alpha_dense, options, self.act_dense)
    if silent is not None and _leaves(options):
        return torch.where(silent[..., None], hidden_states, out)
    return out


def _leaves(options: Options) -> bool:
    """Whether tokens that attend to nothing leave the block as they came."""
    return options.unattended == "zero_block"


def _maps_zero_to_zero(o_proj: nn.Module) -> bool:
    return is_plain(o_proj) and o_proj.bias is None


def _attend(
    self: Any, normed: torch.Tensor, features: torch.Tensor, layout: MediaLayout
) -> torch.Tensor:
    """(B, T, W) of the normed text."""
    attention = self.cross_attn
    if layout.device != normed.device:
        layout = layout.to(normed.device)
    by_head = (attention.num_heads, attention.head_dim)
    q = attention.q_proj(normed).unflatten(-1, by_head)
    kept = current()
    weights = () if kept is None else tuple(_weights_of_kv(attention))
    found = None if kept is None else kept.recall(self, features, *weights)
    if found is None or found[0].dtype != q.dtype:
        by_image = (layout.max_media, features.shape[1] // layout.max_media)
        k, v = (
            project(features).unflatten(-1, by_head).unflatten(1, by_image)
            for project in (attention.k_proj, attention.v_proj)
        )
        # With weights in fp32, norms return that in autocast.
        k = attention.k_layer_norm(k).to(v.dtype) if attention.qk_layer_norms else k
        found = k, v
        if kept is not None:
            kept.keep(self, features, found, *weights)
    k, v = found
    if attention.qk_layer_norms:
        q = attention.q_layer_norm(q).to(v.dtype)
    attended = masked_cross_attention(q, k, v, layout, softmax_scale=attention.scaling)
    return attention.o_proj(attended.flatten(-2))


def _weights_of_kv(attention: Any) -> Iterator[torch.Tensor]:
    yield from attention.k_proj.parameters()
    yield from attention.v_proj.parameters()
    if attention.qk_layer_norms:
        yield from attention.k_layer_norm.parameters()


def forward_model(
    self: Any,
    input_ids: torch.Tensor | None = None,
    attention_mask: torch.Tensor | None = None,
    position_ids: torch.Tensor | None = None,
    cache: Any = None,
    inputs_embeds: torch.Tensor | None = None,
    pixel_values: torch.Tensor | None = None,
    image_encoder_embeddings: torch.Tensor | None = None,
    perceiver_embeddings: torch.Tensor | None = None,
    image_attention_mask: torch.Tensor | None = None,
    *args: Any,
    **kwargs: Any,
) -> Any:
    """Arguments of IdeficsModel; its image_attention_mask is (B, T, N), 0 or 1."""
    options = options_of(self)
    if cache is None and "past_key_values" in kwargs:
        # Its name before; the place is the same.
        cache = kwargs.pop("past_key_values")
    text = inputs_embeds if input_ids is None else input_ids
    given = (pixel_values, image_encoder_embeddings, perceiver_embeddings)
    may_keep = options.media_kv_cache and not self.training
    if (
        options.cross_attention
        and image_attention_mask is not None
        and text is not None
        and _fit(image_attention_mask, text, given)
        and not _falls_back(self)
    ):
        kwargs[_IMAGES] = _layout_of_mask(image_attention_mask)
        image_attention_mask = image_attention_mask[:, :1]
    arguments = (input_ids, attention_mask, position_ids, cache, inputs_embeds, *given)
    if not may_keep or not may_remember():
        return own_forward(self)(*arguments, image_attention_mask, *args, **kwargs)
    state: Any = state_of(self)
    with generation(state.memory, cache):
        return own_forward(self)(*arguments, image_attention_mask, *args, **kwargs)


def _fit(mask: torch.Tensor, text: torch.Tensor, given: Sequence[torch.Tensor | None]) -> bool:
    """Whether the mask has the text's tokens and the images', none of them broadcast."""
    images = [each for each in given if each is not None]
    if len(images) != 1 or mask.dim() != 3 or 0 in mask.shape or mask.shape[:2] != text.shape[:2]:
        return False
    batch, _, num_images = mask.shape
    (features,) = images
    if features.dim() == 3:
        return features.shape[0] == batch * num_images
    return features.shape[:2] == (batch, num_images)


def _falls_back(self: Any) -> bool:
    """Whether its layers' own attention has to run, with the dense mask."""
    implementation = getattr(self.config, "_attn_implementation", None)
    if implementation not in _ATTENTIONS:
        tell_once(self, f"attention is {implementation!r}, known are 'eager' and 'sdpa'")
        return True
    for layer in self.gated_cross_attn_layers:
        attention = layer.cross_attn
        # With dropout, the report's notes say so.
        if attention.training and attention.dropout > 0:
            return True
        if not is_patched(layer, _LAYER) or does_more(attention):
            tell_once(self, "there are hooks on its cross-attention, or a layer is not patched")
            return True
    return False


def _layout_of_mask(mask: torch.Tensor) -> MediaLayout:
    mask = mask.bool()
    one = mask.shape[2] == 1 or (
        values_are_at_hand(mask) and not bool((mask.sum(2, dtype=torch.int32) > 1).any())
    )
    return MediaLayout.from_media_mask(mask, 1 if one else None)


def _matches_layer(module: nn.Module) -> bool:
    return is_a(module, "IdeficsGatedCrossAttentionLayer") and has(
        module,
        modules=("cross_attn", "mlp", "input_layernorm", "post_attention_layernorm"),
        tensors=("alpha_cross_attn", "alpha_dense"),
    )


def _matches_model(module: nn.Module) -> bool:
    return is_a(module, "IdeficsModel") and has(
        module, modules=("gated_cross_attn_layers", "layers")
    )


def _code_of_layer(module: Any) -> Sequence[Callable[..., Any]]:
    attend = type(module.cross_attn).forward
    return (type(module).forward, attend, *functions_beside(attend, "eager_attention_forward"))


def _refuses_layer(
    module: Any, options: Options, will_patch: Callable[[nn.Module], bool]
) -> str | None:
    for name in ("act_cross_attn", "act_dense"):
        if type(getattr(module, name, None)) is not nn.Tanh:
            return f"its {name} is no nn.Tanh"
    return None if module.cross_attn.is_cross_attention else "its cross_attn is of the text"


def _refuses_model(
    module: Any, options: Options, will_patch: Callable[[nn.Module], bool]
) -> str | None:
    left = [layer for layer in module.gated_cross_attn_layers if not will_patch(layer)]
    if not options.cross_attention:
        return None
    return f"{len(left)} of its cross-attention layers are left" if left else None


def _notes_of_model(module: Any, options: Options) -> Sequence[str]:
    if any(layer.cross_attn.dropout > 0 for layer in module.gated_cross_attn_layers):
        return ["attention dropout: in training mode Idefics' own attention runs"]
    return []


RULES: tuple[Rule, ...] = (
    rms_norm_rule("idefics", "IdeficsRMSNorm", {"b5a15c016629f37a": "transformers 4.57.1, 5.24.0"}),
    idefics_perceiver.RULE,
    Rule(
        name=_LAYER,
        features=("cross_attention", "gated_residual"),
        matches=_matches_layer,
        forward=forward_layer,
        known={
            "57c99bc90c0338b1": "transformers 5.24.0",
            "e90c0d854b051fe3": "transformers 4.57.1",
        },
        code=_code_of_layer,
        refuses=_refuses_layer,
    ),
    Rule(
        name="idefics.model",
        features=("cross_attention", "media_kv_cache"),
        matches=_matches_model,
        forward=forward_model,
        known={
            "8f6f6779e03f9290": "transformers 5.24.0",
            "20af54fb5de62531": "transformers 4.57.1",
        },
        refuses=_refuses_model,
        notes=_notes_of_model,
    ),
)
