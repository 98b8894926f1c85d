"""A decoder as Chinchilla is (arXiv 2203.15556): RMSNorm, relative positions, tied embedding.

Its attention is Transformer-XL's (Dai et al. 2019, arXiv 1901.02860, section 3.3): the score of
query i and key j is (q_i + u) k_j + (q_i + v) r_{i-j}. No position is absolute, so padding on the
left of a row changes nothing.

B batch, L tokens of a call, S keys (L and what the cache has), D dim, H heads, E dim_head.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint, noop_context_fn

from flamingo_fast.models.config import LanguageModelConfig
from flamingo_fast.models.extras import require
from flamingo_fast.models.media_inputs import check_logits_to_keep
from flamingo_fast.modules.feed_forward import FeedForward
from flamingo_fast.modules.options import make_norm
from flamingo_fast.modules.plain import is_plain

# Of GPT-2 (Radford et al. 2019, section 2.3) and of Transformer-XL's own code.
_INIT_STD = 0.02


@dataclasses.dataclass(frozen=True)
class RelativeContext:
    """What the self-attention of all layers needs in a call; made by `relative_context`.

    Attributes:
        sinusoids: (S + 1, D), the embeddings of distances, the longest first. The last is of -1,
            which no token may see: with it the rows of position scores are one longer than S, and a
            view of them in rows of S is what Transformer-XL calls the relative shift.
        unseen: bool (B or 1, 1, L, S), True where a token may not see a key; None: it may, always.
        cache: keys and values of earlier calls, a cache of transformers; or None.
        positions: (L,) int64, where in the cache the tokens go.
    """

    sinusoids: torch.Tensor
    unseen: torch.Tensor | None
    cache: Any = None
    positions: torch.Tensor | None = None


@dataclasses.dataclass
class ChinchillaOutput:
    """Hidden states after the last norm, (B, L, D), and the cache."""

    last_hidden_state: torch.Tensor
    past_key_values: Any = None


@dataclasses.dataclass
class ChinchillaLMOutput:
    """(B, L or logits_to_keep, V), and the cache."""

    logits: torch.Tensor
    past_key_values: Any = None


def relative_context(
    hidden: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    past_key_values: Any = None,
    *,
    layer_idx: int = 0,
    documents: torch.Tensor | None = None,
) -> RelativeContext:
    """What layers need beside hidden states: to be made once a call, for all of them.

    Arguments:
        hidden: (B, L, D), of which only shape, dtype and device matter.
        attention_mask: (B, S), 0 at padding, which nothing attends to but itself.
        past_key_values: a `DynamicCache` or `StaticCache` of transformers. Of a static one S is the
            most that it can hold; the mask may be shorter.
        layer_idx: the first of the layers, by its place in the cache.
        documents: (B, L) integers, which document of its row each token is of: it sees no other.
            None: rows are one each. Distances are what they would be in rows of their own.

    Raises:
        ValueError: attention_mask or documents have another shape; the cache has sliding windows;
            documents beside a cache.
    """
    batch, length, dim = hidden.shape
    if documents is not None and documents.shape != (batch, length):
        raise ValueError(
            f"documents: expected shape {(batch, length)}, got {tuple(documents.shape)}"
        )
    if documents is not None and past_key_values is not None:
        raise ValueError("documents: expected None beside past_key_values")
    past, num_keys = 0, length
    if past_key_values is not None:
        past, num_keys = _sizes(past_key_values, layer_idx, length)
    real = _real_keys(attention_mask, batch, length, num_keys, isinstance(past, int))
    keys = torch.arange(num_keys, device=hidden.device)
    queries = past + torch.arange(length, device=hidden.device)
    unseen = None
    if length > 1 or not isinstance(past, int):
        unseen = (keys > queries[:, None])[None, None]
    if real is not None:
        # The softmax of a token that sees nothing, not even itself, would be NaN.
        padding = ~real[:, None, None, :] & (keys != queries[:, None])
        unseen = padding if unseen is None else unseen | padding
    if documents is not None and unseen is not None:
        unseen = unseen | (documents[:, None, :, None] != documents[:, None, None, :])
    distances = past + length - 1 - torch.arange(num_keys + 1, device=hidden.device)
    sinusoids = _sinusoids(distances, dim, hidden.dtype)
    return RelativeContext(sinusoids, unseen, past_key_values, queries)


def _sizes(cache: Any, layer_idx: int, length: int) -> tuple[Any, int]:
    """Tokens in the cache, a tensor if it is static, and keys that it will return."""
    past = cache.get_seq_length(layer_idx)
    layer = cache.layers[layer_idx] if layer_idx < len(cache.layers) else None
    if getattr(layer, "is_sliding", False):
        raise ValueError(
            f"past_key_values: expected a cache of all tokens, got {type(layer).__name__}"
        )
    capacity = getattr(layer, "max_cache_len", None)
    if capacity is None:
        return past, past + length
    # It is an int until the first update, but there are keys after the tokens already.
    return torch.as_tensor(past), capacity


def _real_keys(
    attention_mask: torch.Tensor | None, batch: int, length: int, num_keys: int, is_exact: bool
) -> torch.Tensor | None:
    """Bool (B, S)."""
    if attention_mask is None:
        return None
    shape = tuple(attention_mask.shape)
    is_long_enough = len(shape) == 2 and length <= shape[1] <= num_keys
    if not is_long_enough or shape[0] != batch or (is_exact and shape[1] != num_keys):
        least = "" if is_exact else " or less, all tokens so far"
        raise ValueError(f"attention_mask: expected shape {(batch, num_keys)}{least}; got {shape}")
    return F.pad(attention_mask != 0, (0, num_keys - shape[1]))


def _sinusoids(distances: torch.Tensor, dim: int, dtype: torch.dtype) -> torch.Tensor:
    """(number, dim) of `dtype`: sines of all frequencies, then cosines, as in Transformer-XL."""
    wide = torch.promote_types(dtype, torch.float32)
    exponents = torch.arange(0, dim, 2, device=distances.device, dtype=wide) / dim
    angles = distances[:, None].to(wide) * 10_000**-exponents
    return torch.cat([angles.sin(), angles.cos()], 1)[:, :dim].to(dtype)


class RelativeAttention(nn.Module):
    """Causal self-attention with Transformer-XL's relative positions.

    u and v are `content_bias` and `position_bias`, r is `to_position` of sinusoids. The other
    linear layers have biases, as Chinchilla's parameter counts demand.

    Arguments:
        dim: D.
        heads, dim_head: H and E.
        layer_idx: the layer's place in a cache.
    """

    def __init__(self, dim: int, heads: int, dim_head: int, layer_idx: int = 0) -> None:
        super().__init__()
        self.heads, self.dim_head, self.layer_idx = heads, dim_head, layer_idx
        inner = heads * dim_head
        self.to_qkv = nn.Linear(dim, 3 * inner)
        self.to_position = nn.Linear(dim, inner, bias=False)
        self.to_out = nn.Linear(inner, dim)
        self.content_bias = nn.Parameter(torch.zeros(heads, dim_head))
        self.position_bias = nn.Parameter(torch.zeros(heads, dim_head))

    def forward(self, normed: torch.Tensor, context: RelativeContext) -> torch.Tensor:
        """(B, L, D) -> (B, L, D)."""
        qkv = self.to_qkv(normed).unflatten(-1, (3, self.heads, self.dim_head))
        q, k, v = qkv.unbind(2)
        bias = self._position_scores(q, context.sinusoids.to(q.dtype))
        if context.unseen is None:
            # Kernels want rows that are aligned.
            bias = bias.contiguous()
        else:
            bias = torch.where(context.unseen, float("-inf"), bias)
        k, v = k.transpose(1, 2), v.transpose(1, 2)
        if context.cache is not None:
            # Static layers of transformers 4 don't count: without positions they begin anew.
            options = {"cache_position": context.positions}
            k, v = context.cache.update(k, v, self.layer_idx, options)
        q = self._biased(q, self.content_bias).transpose(1, 2)
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
        return self.to_out(attended.transpose(1, 2).flatten(2))

    def _biased(self, q: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        """(B, L, H, E) with a bias (H, E)."""
        return q + bias.to(q.dtype)

    def _position_scores(self, q: torch.Tensor, sinusoids: torch.Tensor) -> torch.Tensor:
        """(B, H, L, S) of q (B, L, H, E), scaled; of keys after a query arbitrary, but finite."""
        batch, length = q.shape[:2]
        num_distances, dim = sinusoids.shape
        q = self._biased(q, self.position_bias) * self.dim_head**-0.5
        # By head the rows of the whole batch meet the same r, which is not repeated then.
        rows = q.permute(2, 0, 1, 3).reshape(self.heads, batch * length, self.dim_head)
        if self._is_cheaper_by_row(batch * length, num_distances, dim):
            # (q + v) W R^T from the left: in decoding r of all distances would be many times
            # the work of the rest of the layer.
            weight = self.to_position.weight.unflatten(0, (self.heads, self.dim_head))
            scores = F.linear(torch.bmm(rows, weight.to(rows.dtype)), sinusoids)
        else:
            r = self.to_position(sinusoids).unflatten(-1, (self.heads, self.dim_head))
            scores = torch.bmm(rows, r.permute(1, 2, 0))
        scores = scores.view(self.heads, batch, length * num_distances)
        # Query i meets key j at column j + L - 1 - i of its row.
        num_keys = num_distances - 1
        shifted = scores[..., length - 1 : length - 1 + length * num_keys]
        return shifted.unflatten(-1, (length, num_keys)).transpose(0, 1)

    def _is_cheaper_by_row(self, rows: int, distances: int, dim: int) -> bool:
        inner = self.heads * self.dim_head
        by_row = rows * (inner + self.heads * distances) * dim
        by_distance = distances * inner * dim + rows * distances * inner
        return by_row < by_distance and is_plain(self.to_position)

    def extra_repr(self) -> str:
        return f"heads={self.heads}, dim_head={self.dim_head}, layer_idx={self.layer_idx}"


class ChinchillaLayer(nn.Module):
    """x + self_attn(norm_attn(x)), then x + mlp(x), the norm of `mlp` being part of it.

    Arguments:
        config: its sizes: dim, heads, dim_head, ff_mult; depth is for the initialisation alone.
        layer_idx: its place in a cache.
        device, dtype: PyTorch's current defaults, if None.
    """

    def __init__(
        self,
        config: LanguageModelConfig,
        layer_idx: int = 0,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.depth = config.depth
        device = torch.get_default_device() if device is None else torch.device(device)
        # What they would be initialised to is not wanted, and takes longer than what is.
        with torch.device("meta"):
            self.norm_attn = make_norm("rms", config.dim, "auto")
            self.self_attn = RelativeAttention(config.dim, config.heads, config.dim_head, layer_idx)
            self.mlp = FeedForward(
                config.dim, config.ff_mult, activation="gelu", norm="rms", bias=True
            )
        _allocate(self, device, dtype)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """As in GPT-2: normal, biases 0, layers that a residual is added to scaled by their number.

        u and v are normal too, as in Transformer-XL's code.
        """
        residual_std = _INIT_STD * (2 * self.depth) ** -0.5
        attn, up, down = self.self_attn, self.mlp[1], self.mlp[3]
        for linear in (attn.to_qkv, attn.to_position, attn.to_out, up, down):
            is_last = linear is attn.to_out or linear is down
            nn.init.normal_(linear.weight, std=residual_std if is_last else _INIT_STD)
            if linear.bias is not None:
                nn.init.zeros_(linear.bias)
        nn.init.normal_(attn.content_bias, std=_INIT_STD)
        nn.init.normal_(attn.position_bias, std=_INIT_STD)
        self.norm_attn.reset_parameters()
        self.mlp[0].reset_parameters()

    def forward(self, hidden: torch.Tensor, context: RelativeContext) -> torch.Tensor:
        """(B, L, D) -> (B, L, D).

        Arguments:
            hidden: (B, L, D).
            context: `relative_context` of it. Its cache gets this layer's keys and values.
        """
        hidden = hidden + self.self_attn(self.norm_attn(hidden), context)
        return hidden + self.mlp(hidden)


def _allocate(module: nn.Module, device: torch.device, dtype: torch.dtype | None) -> None:
    """Memory for the parameters of a module made on "meta"."""
    for part in module.modules():
        for name, parameter in part.named_parameters(recurse=False):
            empty = torch.empty(parameter.shape, device=device, dtype=dtype)
            part.register_parameter(name, nn.Parameter(empty))


class ChinchillaModel(nn.Module):
    """Embedding, layers and the last norm.

    Attributes:
        checkpoint_layers: whether layers are computed again in the backward, each on its own; not
            in calls with a cache.
        checkpoint_context_fn: `context_fn` of torch.utils.checkpoint.
    """

    def __init__(self, config: LanguageModelConfig) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.dim)
        self.layers = nn.ModuleList(ChinchillaLayer(config, index) for index in range(config.depth))
        self.norm = make_norm("rms", config.dim, "auto")
        self.checkpoint_layers = False
        self.checkpoint_context_fn: Callable[[], Any] = noop_context_fn

    def reset_parameters(self) -> None:
        """See `ChinchillaLayer.reset_parameters`."""
        nn.init.normal_(self.embed_tokens.weight, std=_INIT_STD)
        self.norm.reset_parameters()
        layers: Any = self.layers
        for layer in layers:
            layer.reset_parameters()

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        past_key_values: Any = None,
        use_cache: bool = False,
        documents: torch.Tensor | None = None,
    ) -> ChinchillaOutput:
        """Hidden states of text, see `ChinchillaLM.forward`; `documents` as `relative_context`."""
        hidden = self._embed(input_ids, inputs_embeds)
        if use_cache and past_key_values is None:
            past_key_values = require("transformers.cache_utils").DynamicCache()
        context = relative_context(hidden, attention_mask, past_key_values, documents=documents)
        is_checkpointed = (
            self.checkpoint_layers and past_key_values is None and torch.is_grad_enabled()
        )
        for layer in self.layers:
            if is_checkpointed:
                hidden = checkpoint(
                    layer,
                    hidden,
                    context,
                    use_reentrant=False,
                    context_fn=self.checkpoint_context_fn,
                )
            else:
                hidden = layer(hidden, context)
        return ChinchillaOutput(self.norm(hidden), past_key_values)

    def _embed(
        self, input_ids: torch.Tensor | None, inputs_embeds: torch.Tensor | None
    ) -> torch.Tensor:
        if (input_ids is None) == (inputs_embeds is None):
            got = "neither" if input_ids is None else "both"
            raise ValueError(f"input_ids: expected either these or inputs_embeds, got {got}")
        if input_ids is not None:
            if input_ids.dim() != 2:
                raise ValueError(f"input_ids: expected shape (B, L), got {tuple(input_ids.shape)}")
            return self.embed_tokens(input_ids)
        assert inputs_embeds is not None
        dim = self.embed_tokens.embedding_dim
        if inputs_embeds.dim() != 3 or inputs_embeds.shape[-1] != dim:
            raise ValueError(
                f"inputs_embeds: expected shape (B, L, {dim}), got {tuple(inputs_embeds.shape)}"
            )
        return inputs_embeds


class TiedHead(nn.Module):
    """The output embedding: a linear layer whose weight is an nn.Embedding's.

    It has no parameter of its own: a state dict has the weight once, and what replaces the
    embedding's parameter (moving from "meta", sharding) leaves them tied.
    """

    bias = None

    def __init__(self, embedding: nn.Embedding) -> None:
        super().__init__()
        # In a tuple it is not registered as a submodule.
        self._embedding = (embedding,)
        self.in_features, self.out_features = embedding.embedding_dim, embedding.num_embeddings

    @property
    def weight(self) -> torch.Tensor:
        """The embedding's, (V, D)."""
        return self._embedding[0].weight

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """(..., D) -> (..., V)."""
        return F.linear(hidden, self.weight)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}"


class ChinchillaLM(nn.Module):
    """A causal language model of the Chinchilla family, called as transformers' are.

    Its parameter count is depth * 13 D (D + 1) + (V + 1) D where H * E = D and ff_mult = 4, which
    fits all models of Chinchilla's table A9: 1.3748 B for Flamingo-3B, 7.112 B and 70.06 B.

    Arguments:
        config: of kind "chinchilla".
        device, dtype: PyTorch's current defaults, if None. On "meta" there are no weights.

    Attributes:
        config: the argument.
        model: the decoder without the output embedding, also `base_model`.
    """

    def __init__(
        self,
        config: LanguageModelConfig,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.config = config
        device = torch.get_default_device() if device is None else torch.device(device)
        with torch.device("meta"):
            self.model = ChinchillaModel(config)
        _allocate(self, device, dtype)
        self.model.reset_parameters()
        self.lm_head = TiedHead(self.model.embed_tokens)

    @property
    def base_model(self) -> ChinchillaModel:
        return self.model

    @property
    def layers(self) -> nn.ModuleList:
        return self.model.layers

    def get_input_embeddings(self) -> nn.Embedding:
        return self.model.embed_tokens

    def get_output_embeddings(self) -> TiedHead:
        return self.lm_head

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        past_key_values: Any = None,
        use_cache: bool = False,
        logits_to_keep: int = 0,
    ) -> ChinchillaLMOutput:
        """Logits of text.

        Arguments:
            input_ids: (B, L) integers; or
            inputs_embeds: (B, L, D), what the embedding would return.
            attention_mask: (B, tokens in the cache + L), 0 at padding on either side; None: none.
            past_key_values: a `DynamicCache` or `StaticCache` of transformers, which gets this
                call's keys and values.
            use_cache: whether to make a `DynamicCache` if there is none.
            logits_to_keep: logits of so many last tokens; 0: of all.

        Raises:
            ValueError: a wrong argument, by name.
            ImportError: use_cache without transformers.
        """
        check_logits_to_keep(logits_to_keep)
        output = self.model(input_ids, inputs_embeds, attention_mask, past_key_values, use_cache)
        logits = self.lm_head(output.last_hidden_state[:, -logits_to_keep:])
        return ChinchillaLMOutput(logits, output.past_key_values)
