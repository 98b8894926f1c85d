"""Flamingo: a vision encoder, a resampler, and a language model that sees what they make.

B rows of text, L tokens, N media of a row, F frames of a medium, S features of a frame, R tokens of
a medium. Where rows are packed, documents take the place of rows in what is said of media.
"""

import contextlib
import dataclasses
import functools
import inspect
import os
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from flamingo_fast.layout import MediaLayout
from flamingo_fast.models.cache import FlamingoCache
from flamingo_fast.models.checkpointing import checkpoint_layers
from flamingo_fast.models.chinchilla import (
    ChinchillaLayer,
    ChinchillaLM,
    TiedHead,
    relative_context,
)
from flamingo_fast.models.conditioning import Conditioning, MediaContext, find_layers
from flamingo_fast.models.config import ConfigError, FlamingoConfig
from flamingo_fast.models.extras import require
from flamingo_fast.models.generation import GenerateOutput, generate, score
from flamingo_fast.models.media_inputs import (
    Features,
    Media,
    check_counts,
    check_ids,
    check_length,
    check_logits_to_keep,
    check_vocabulary,
    flat_features,
    flat_media,
)
from flamingo_fast.models.packed_rows import PackedRows
from flamingo_fast.models.parts import (
    check_logits,
    check_token_ids,
    hidden_size,
    made_with,
    make_lang_model,
    make_resampler,
    max_tokens_of,
    stack_config,
    vocab_size_of,
)
from flamingo_fast.models.resampling import dtype_of, places_of, resample
from flamingo_fast.models.tokens import LearntTokens
from flamingo_fast.models.vision import VisionEncoder
from flamingo_fast.modules.plain import is_plain, is_sharded
from flamingo_fast.ops.linear_cross_entropy import linear_cross_entropy
from flamingo_fast.ranges import call

_REDUCTIONS = ("mean", "sum")


@dataclasses.dataclass
class FlamingoOutput:
    """What a forward returns.

    Attributes:
        loss: scalar, fp32; where labels were given.
        logits: (B, L or logits_to_keep, tokens); where no labels were given, or if asked for.
    """

    loss: torch.Tensor | None = None
    logits: torch.Tensor | None = None


class Flamingo(nn.Module):
    """A Flamingo model (arXiv 2204.14198), each row of its table 3 by its config.

    Arguments:
        config: what it is made of.
        lang_model: a causal language model of transformers in place of the one config.lm names. It
            is changed in place: hooks on its layers. Its state-dict keys stay.
        vision_encoder: in place of config.vision's: a `VisionEncoder`, see its `from_module`.
        device, dtype: of what is made here; "meta" makes no memory.

    Attributes:
        vision_encoder, resampler, lang_model, conditioning: its parts; conditioning has the blocks.
        tokens: embeddings that are learnt, `LearntTokens`; or None.
        max_tokens: of a row, padding among them, where the language model has learnt embeddings of
            so many positions; or None.

    Raises:
        ConfigError: parts that don't fit together, by the field's name.
        ImportError: an extra that is not installed.
    """

    lang_model: Any

    def __init__(
        self,
        config: FlamingoConfig,
        *,
        lang_model: nn.Module | None = None,
        vision_encoder: VisionEncoder | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.config = config
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        if vision_encoder is None:
            vision_encoder = VisionEncoder(config.vision, **factory)
        if lang_model is None:
            lang_model = make_lang_model(config.lm, **factory)
        depth = len(find_layers(lang_model))
        check_logits(lang_model)
        dim = hidden_size(lang_model)
        vocab_size = vocab_size_of(lang_model)
        check_token_ids(config, vocab_size)
        dim_media = config.conditioning.dim_media or config.resampler.dim
        with made_with(**factory):
            self.vision_encoder = vision_encoder
            self.resampler = make_resampler(config.resampler, vision_encoder.features)
            self.conditioning = Conditioning(
                config.conditioning,
                dim,
                depth,
                dim_media,
                functools.partial(
                    ChinchillaLayer, stack_config(config.lm, config.conditioning, dim)
                ),
            )
            self.lang_model = lang_model
            self.tokens: LearntTokens | None = None
            if config.learnt_token_ids:
                self.tokens = LearntTokens(
                    config.learnt_token_ids,
                    self.lang_model.get_input_embeddings(),
                    self.lang_model.get_output_embeddings(),
                ).to(device=device, dtype=dtype)
        self.dim_media = dim_media
        self.conditioning.attach(lang_model)
        parameters = inspect.signature(self._base_model.forward).parameters
        self._takes_positions = "position_ids" in parameters
        self._takes_slots = "cache_position" in parameters
        self.max_tokens = max_tokens_of(self.lang_model)
        # transformers' name of it until 5.23, and ours.
        self._cache_name = "cache" if "cache" in parameters else "past_key_values"
        if config.lm.is_frozen:
            lang_model.requires_grad_(False)
        self.train(self.training)

    @property
    def _base_model(self) -> Any:
        return self.lang_model.base_model

    @property
    def num_tokens(self) -> int:
        """Token ids that there are logits of."""
        return vocab_size_of(self.lang_model) if self.tokens is None else self.tokens.num_tokens

    def train(self, mode: bool = True) -> "Flamingo":
        """Frozen parts stay in eval mode: no dropout, no batch statistics."""
        super().train(mode)
        if self.config.lm.is_frozen:
            self.lang_model.eval()
            # Those of transformers check their own mode before they checkpoint; what is in them
            # stays in eval mode.
            for layer in find_layers(self.lang_model):
                layer.training = mode and getattr(layer, "gradient_checkpointing", False)
        return self

    def checkpoint(self, enable: bool = True) -> None:
        """Activation checkpointing of each new layer, and of each of the language model's.

        Raises:
            ConfigError: the language model's layers can't.
        """
        self.conditioning.checkpoint_blocks = enable
        if isinstance(self.lang_model, ChinchillaLM):
            self.lang_model.model.checkpoint_layers = enable
            self.lang_model.model.checkpoint_context_fn = self.conditioning.for_checkpoint
            return
        checkpoint_layers(
            find_layers(self.lang_model),
            enable,
            is_frozen=self.config.lm.is_frozen,
            context_fn=self.conditioning.for_checkpoint,
        )
        self.train(self.training)

    def forward(
        self,
        input_ids: torch.Tensor,
        images: Media | None = None,
        videos: Media | None = None,
        attention_mask: torch.Tensor | None = None,
        media_locations: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        *,
        num_media: Sequence[int] | None = None,
        media: torch.Tensor | tuple[torch.Tensor, torch.Tensor | None] | None = None,
        features: Features | None = None,
        cu_seqlens: torch.Tensor | Sequence[int] | None = None,
        attend: str | Sequence[str] | None = None,
        loss_reduction: str = "mean",
        cache: FlamingoCache | None = None,
        return_logits: bool | None = None,
        logits_to_keep: int = 0,
    ) -> FlamingoOutput:
        """Loss or logits of text with media.

        Of a padded batch of media only those are encoded whose image tokens are there. Text without
        any still runs what has gradients or is sharded over ranks (FSDP2): other ranks, which have
        media, wait for it, and parameters get gradients of 0. A vision encoder then sees an image
        of config.vision.image_size.

        Arguments:
            input_ids: (B, L) int64; an image token where each medium is.
            images: (B, N, 3, H, W), the first of each row being its media and the others padding;
                or (media_total, 3, H, W), row after row, with num_media; or a list of all of them,
                or of each row's.
            videos: the same with frames, (B, N, F, 3, H, W) and so on; not beside images. In lists
                their numbers of frames may differ.
            attention_mask: (B, L), 1 at tokens and 0 at padding on either side; with a cache, of
                these tokens alone; not of packed rows.
            media_locations: (B, L) bool, True at image tokens; by default where they are.
            labels: (B, L) int64, input_ids or -100 where nothing is to be predicted. They are
                shifted here.
            num_media: media of each row, if known. Otherwise image tokens are counted, which on a
                GPU waits for it.
            media: in place of images or videos, what `encode` returned; or its tokens alone, if all
                are valid, (media_total, R, dim_media) or (B, N, R, dim_media).
            features: in place of them, what the vision encoder returned for each frame, row after
                row: (media_total, F, S, width), or a list of (F, S, width). The encoder does not
                run; an empty list says so of text alone.
            cu_seqlens: (documents + 1,) integers, best on the CPU: rows are packed, as
                `MediaLayout.packed` has it. Documents see neither others' text nor their media, and
                positions begin anew in each. Padding is a document without media, and nothing is
                predicted of a document's first token. Forms of media that have something of each
                row have it of each document: (documents, N, 3, H, W), lists and num_media.
            attend: "previous", "next" or "all_previous" media, of all rows or of each (Flamingo's
                p_next, appendix A.3.2), in place of config.conditioning.attend.
            loss_reduction: "mean" or "sum" of the losses of predicted tokens.
            cache: of the text before, see `new_cache`; without gradients, and not of packed rows.
            return_logits: by default where there are no labels.
            logits_to_keep: logits of so many last tokens; 0: of all.

        Raises:
            TypeError, ValueError: a wrong argument, by name; more image tokens than media; packed
                rows for a language model that can't keep documents apart (`packed_rows.FAMILIES`
                can), or whose sliding window is shorter than a document.
        """
        check_ids(input_ids, attention_mask, labels)
        check_vocabulary(input_ids, self.num_tokens)
        if loss_reduction not in _REDUCTIONS:
            raise ValueError(
                f"loss_reduction: expected {' or '.join(_REDUCTIONS)}, got {loss_reduction!r}"
            )
        check_logits_to_keep(logits_to_keep)
        packed = self._packed(input_ids, cu_seqlens, attention_mask, cache)
        if attention_mask is not None and media_locations is None:
            media_locations = (input_ids == self.config.image_token_id) & (attention_mask != 0)
        elif media_locations is None:
            media_locations = input_ids == self.config.image_token_id
        if media_locations.shape != input_ids.shape or media_locations.dtype != torch.bool:
            raise ValueError(
                f"media_locations: expected bool of shape {tuple(input_ids.shape)}, got "
                f"{media_locations.dtype} of {tuple(media_locations.shape)}"
            )
        check_length(input_ids.shape[1] + (cache.seqlen if cache else 0), self.max_tokens)
        given = {"images": images, "videos": videos, "media": media, "features": features}
        encoded, counts, seqlens = self._media_of(given, media_locations, num_media, packed)
        if cache is not None and attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        attend = self.config.conditioning.attend if attend is None else attend
        if cache is None:
            layout = self._layout(media_locations, counts, seqlens, attend, packed)
            context = self._context(layout, encoded)
        else:
            assert attention_mask is not None
            context = self._next_context(
                encoded, counts, seqlens, attention_mask, media_locations, attend, cache
            )
        with self.conditioning.of(context):
            hidden = self._hidden(input_ids, attention_mask, cache, packed)
        output = FlamingoOutput()
        if labels is not None:
            labels = labels if packed is None else packed.labels(labels)
            output.loss = call("loss", self._loss, hidden, labels, loss_reduction)
        if return_logits or (return_logits is None and labels is None):
            output.logits = self.logits(hidden[:, -logits_to_keep:])
        return output

    def generate(self, input_ids: torch.Tensor, *args: Any, **kwargs: Any) -> GenerateOutput:
        """New tokens: see `flamingo_fast.models.generation.generate`."""
        return generate(self, input_ids, *args, **kwargs)

    def score(
        self, input_ids: torch.Tensor, options: Sequence[Any], *args: Any, **kwargs: Any
    ) -> torch.Tensor:
        """Log-likelihoods of options: see `flamingo_fast.models.generation.score`."""
        return score(self, input_ids, options, *args, **kwargs)

    def save_pretrained(self, folder: str | os.PathLike[str], **options: Any) -> None:
        """Safetensors and config.json: see `flamingo_fast.models.saving.save_pretrained`."""
        # That file makes models, so it imports this one.
        from flamingo_fast.models.saving import save_pretrained

        save_pretrained(self, folder, **options)

    @classmethod
    def from_pretrained(cls, folder: str | os.PathLike[str], **options: Any) -> "Flamingo":
        """A saved model: see `flamingo_fast.models.saving.from_pretrained`."""
        from flamingo_fast.models.saving import from_pretrained

        return from_pretrained(folder, **options)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Of the language model's last hidden states, (B, L, dim) -> (B, L, num_tokens)."""
        logits = self.lang_model.get_output_embeddings()(hidden)
        return logits if self.tokens is None else self.tokens.extend(logits, hidden)

    def encode(
        self,
        media: torch.Tensor | Sequence[torch.Tensor],
        num_media: Sequence[int] | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Tokens of media, which all blocks attend to.

        Arguments:
            media: (media_total, F, 3, H, W); or a list of (F, 3, H, W), of any F.
            num_media: media of each row, which only learnt embeddings of their places need.

        Returns:
            (media_total, R, dim_media), and the valid tokens of each, (media_total,) int32, or None
            if all are.
        """
        frames = [len(each) for each in media]
        if not frames:
            like = media if isinstance(media, torch.Tensor) else next(self.resampler.parameters())
            return self.resample(self._features_of_none(like.device), num_media)
        pixels = media.flatten(0, 1) if isinstance(media, torch.Tensor) else torch.cat(list(media))
        features = self.vision_encoder(pixels)
        if len(set(frames)) == 1:
            return self.resample(features.unflatten(0, (len(frames), frames[0])), num_media)
        return self.resample(features.split(frames), num_media)

    def _features_of_none(self, device: torch.device) -> torch.Tensor:
        """(0, 1, S, width): where gradients or other ranks wait for the encoder, it runs."""
        encoder = self.vision_encoder
        if (torch.is_grad_enabled() and not encoder.is_frozen) or is_sharded(encoder):
            size = self.config.vision.image_size
            return encoder(torch.zeros(0, 3, size, size, device=device))[:, None]
        return torch.zeros(0, 1, 1, encoder.features, dtype=dtype_of(encoder), device=device)

    def resample(
        self, features: Features, num_media: Sequence[int] | None = None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """As `encode`, of what the vision encoder returned for each frame.

        Arguments:
            features: (media_total, F, S, width), or a list of (F, S, width), of any F.
            num_media: see `encode`.
        """
        config = self.config.resampler
        tokens, seqlens = resample(
            self.resampler,
            features,
            places_of(num_media, len(features), config.max_num_media),
            width=self.vision_encoder.features,
            max_num_frames=config.max_num_frames,
            keeps_length=config.kind != "perceiver",
        )
        repeats = -(-self.dim_media // tokens.shape[-1])
        if repeats > 1:
            tokens = torch.cat([tokens] * repeats, -1)[..., : self.dim_media]
        return tokens, seqlens

    def new_cache(self, batch: int, device: torch.device | None = None) -> FlamingoCache:
        """An empty cache for `forward`, of `batch` rows."""
        cache_class = require("transformers").DynamicCache
        device = device or self.lang_model.get_input_embeddings().weight.device
        with torch.no_grad():
            none, _ = self.encode(torch.empty(0, 1, 3, 1, 1, device=device))
            media_kv = self.conditioning.project(none)
        return FlamingoCache(
            lm=cache_class(),
            graft=cache_class() if self.config.conditioning.kind == "grafting" else None,
            attention_mask=torch.empty(batch, 0, dtype=torch.int64, device=device),
            media_locations=torch.empty(batch, 0, dtype=torch.bool, device=device),
            num_media=[0] * batch,
            media_kv=media_kv,
        )

    @contextlib.contextmanager
    def conditioned(
        self,
        input_ids: torch.Tensor,
        images: Media | None = None,
        videos: Media | None = None,
        attention_mask: torch.Tensor | None = None,
    ) -> Iterator[nn.Module]:
        """Inside, the language model itself sees these media, its own `generate` too.

        Its prompt must be input_ids, or each row of it several times in turn, as beams are; tokens
        after it come one by one. Gradients are off. Yields the language model.

        Raises:
            ConfigError: of grafting and learnt_token_ids, which change more than layers.
        """
        if self.config.conditioning.kind == "grafting" or self.tokens is not None:
            raise ConfigError(
                "conditioned: expected a model that changes nothing but layers; grafting and "
                "learnt_token_ids do: use Flamingo.generate"
            )
        with torch.no_grad():
            cache = self.new_cache(input_ids.shape[0])
            mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
            locations = (input_ids == self.config.image_token_id) & (mask != 0)
            given = {"images": images, "videos": videos}
            encoded, counts, seqlens = self._media_of(given, locations, None)
            cache.add_media(self.conditioning.project(encoded), counts, seqlens)
            cache.add_tokens(mask, locations)
            attend = self.config.conditioning.attend
            context = MediaContext(
                cache.layout(cache.seqlen, attend),
                media_kv=cache.media_kv,
                after=cache.layout_after(attend),
            )
            with self.conditioning.of(context):
                yield self.lang_model

    def _packed(
        self,
        input_ids: torch.Tensor,
        cu_seqlens: torch.Tensor | Sequence[int] | None,
        attention_mask: torch.Tensor | None,
        cache: FlamingoCache | None,
    ) -> PackedRows | None:
        if cu_seqlens is None:
            return None
        for name, value in (("attention_mask", attention_mask), ("cache", cache)):
            if value is not None:
                reason = ", padding being a document without media" if name != "cache" else ""
                raise ValueError(f"{name}: expected None beside cu_seqlens{reason}")
        batch, seqlen = input_ids.shape
        return PackedRows.of(cu_seqlens, batch, seqlen, input_ids.device)

    def _media_of(
        self,
        arguments: dict[str, Any],
        media_locations: torch.Tensor,
        num_media: Sequence[int] | None,
        packed: PackedRows | None = None,
    ) -> tuple[torch.Tensor, list[int], torch.Tensor | None]:
        """Encoded media, those of each row or document, and their valid tokens."""
        given = {name: each for name, each in arguments.items() if each is not None}
        if len(given) > 1:
            raise ValueError(f"{', '.join(given)}: expected one of them")
        name, values = next(iter((given or {"images": None}).items()))
        each = "row" if packed is None else "document"
        number = media_locations.shape[0] if packed is None else packed.num_documents
        if num_media is not None and len(num_media) != number:
            raise ValueError(f"num_media: expected {number} numbers, got {list(num_media)}")
        tokens = seqlens = None
        if media_locations.device.type == "cpu" or (num_media is None and values is not None):
            if packed is None:
                tokens = media_locations.sum(1).tolist()
            else:
                *tokens, after = packed.count(media_locations)
                if after:
                    raise ValueError(
                        f"cu_seqlens: expected no image tokens after the last document, got {after}"
                    )
        if name == "media" and isinstance(values, tuple) and len(values) == 2:
            values, seqlens = values
        flat: Any = []
        counts = [0] * number
        if name == "features":
            width = self.vision_encoder.features
            flat, counts = flat_features(values, width, tokens, num_media)
        elif values is not None:
            flat, counts = flat_media(name, values, number, tokens, num_media, each)
        check_counts(name, tokens, counts, each)
        if values is None and any(num_media or ()):
            raise ValueError(f"num_media: expected 0, as no media are given; got {num_media}")
        if name == "media":
            return flat, counts, seqlens
        if name != "features" and len(flat) == 0:
            flat = torch.empty(0, 1, 3, 1, 1, device=media_locations.device)
        encode = self.resample if name == "features" else self.encode
        encoded, seqlens = encode(flat, counts)
        return encoded, counts, seqlens

    def _layout(
        self,
        media_locations: torch.Tensor,
        counts: list[int],
        seqlens: torch.Tensor | None,
        attend: str | Sequence[str],
        packed: PackedRows | None,
    ) -> MediaLayout:
        options: dict[str, Any] = {"media_total": sum(counts), "media_seqlens": seqlens}
        if packed is None:
            return MediaLayout.from_media_locations(media_locations, counts, attend, **options)
        return MediaLayout.packed(media_locations, packed.cu_seqlens, counts, attend, **options)

    def _context(self, layout: MediaLayout, media: torch.Tensor) -> MediaContext:
        if torch.is_grad_enabled():
            return MediaContext(layout, media=media)
        return MediaContext(layout, media_kv=self.conditioning.project(media))

    def _next_context(
        self,
        media: torch.Tensor,
        counts: list[int],
        seqlens: torch.Tensor | None,
        attention_mask: torch.Tensor,
        media_locations: torch.Tensor,
        attend: str | Sequence[str],
        cache: FlamingoCache,
    ) -> MediaContext:
        """Of tokens that come after those in the cache, which gets them."""
        if torch.is_grad_enabled():
            raise ValueError(
                "cache: expected no gradients (torch.no_grad): media are kept for good"
            )
        cache.add_media(self.conditioning.project(media), counts, seqlens)
        cache.add_tokens(attention_mask, media_locations)
        return MediaContext(cache.layout(media_locations.shape[1], attend), media_kv=cache.media_kv)

    def _hidden(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None,
        cache: FlamingoCache | None,
        packed: PackedRows | None = None,
        slot: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """(B, L, dim): what the language model's head takes.

        slot: (L,) int64, where in a static cache the tokens go.
        """
        mask = attention_mask if cache is None else cache.attention_mask
        arguments: dict[str, Any] = {"attention_mask": mask, "use_cache": cache is not None}
        if cache is not None:
            arguments[self._cache_name] = cache.lm
        if slot is not None and self._takes_slots:
            # Models of transformers 4 would read from a GPU how full the cache is.
            arguments["cache_position"] = slot
        documents = None if packed is None else packed.documents
        if packed is not None and isinstance(self.lang_model, ChinchillaLM):
            arguments["documents"] = documents
        elif packed is not None:
            arguments["attention_mask"] = packed.mask(self.lang_model)
            if self._takes_positions:
                arguments["position_ids"] = packed.positions
        if mask is not None and self._takes_positions:
            positions = mask.cumsum(1).sub_(1).clamp_(min=0)
            arguments["position_ids"] = positions[:, -input_ids.shape[1] :]
        if self.tokens is None:
            arguments["input_ids"] = input_ids
        else:
            embedding = self.lang_model.get_input_embeddings()
            arguments["inputs_embeds"] = self.tokens.embed(input_ids, embedding)
        hidden = self._base_model(**arguments).last_hidden_state
        if self.config.conditioning.kind != "grafting":
            return hidden
        stack_cache = None if cache is None else cache.graft
        context = relative_context(hidden, mask, stack_cache, documents=documents)
        is_checkpointed = self.conditioning.checkpoint_blocks and torch.is_grad_enabled()
        for index, layer in enumerate(self.conditioning.layers):
            if is_checkpointed:
                hidden = checkpoint(layer, hidden, context, use_reentrant=False)
            else:
                hidden = layer(hidden, context)
            attended = self.conditioning.attend(index, hidden)
            hidden = hidden if attended is None else attended
        return hidden

    def _loss(self, hidden: torch.Tensor, labels: torch.Tensor, reduction: str) -> torch.Tensor:
        shifted = F.pad(labels[:, 1:], (0, 1), value=-100)
        head: Any = self.lang_model.get_output_embeddings()
        if not isinstance(head, TiedHead) and not is_plain(head):
            logits = self.logits(hidden).flatten(0, 1)
            wide = torch.promote_types(logits.dtype, torch.float32)
            return F.cross_entropy(logits.to(wide), shifted.flatten(), reduction=reduction)
        return linear_cross_entropy(
            hidden,
            head.weight,
            head.bias,
            shifted,
            extra_weight=None if self.tokens is None else self.tokens.output_weight,
            extra_ids=None if self.tokens is None else self.tokens.token_ids,
            reduction=reduction,
        )
