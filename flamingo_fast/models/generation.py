"""Text from a Flamingo model: greedy, sampled or by beams, and scores of given options.

B prompts, L their tokens, T tokens that a cache has, V token ids that there are logits of.

The work of a token doesn't grow with the media before it: their keys and values are made once, and
which of them it attends to is known before the first one, as image tokens are never generated. On a
GPU the host doesn't wait for a token: whether all rows are finished is asked every 16 of them.
"""

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from flamingo_fast.models.beam_search import beam_search
from flamingo_fast.models.cache import FlamingoCache
from flamingo_fast.models.decoder import Decoder, mask_until
from flamingo_fast.models.media_inputs import Media, check_ids, check_length
from flamingo_fast.models.sampling import Sampling, Stops
from flamingo_fast.models.scoring import options_of, score_options
from flamingo_fast.modules.options import check_dims

if TYPE_CHECKING:
    from flamingo_fast.models.flamingo import Flamingo


@dataclasses.dataclass
class GenerateOutput:
    """What `generate` returns.

    Attributes:
        sequences: (B, tokens) int64, the new tokens of each row with the one it stopped at; then
            pad_token_id up to the longest row's.
        cache: of the prompt and all of these tokens, for the next turn; None if not wanted.
        scores: (B,), of beams: the sum of log-probabilities over tokens ** length_penalty.
    """

    sequences: torch.Tensor
    cache: FlamingoCache | None = None
    scores: torch.Tensor | None = None


@torch.no_grad()
def generate(
    model: "Flamingo",
    input_ids: torch.Tensor,
    images: Media | None = None,
    videos: Media | None = None,
    attention_mask: torch.Tensor | None = None,
    *,
    num_media: Sequence[int] | None = None,
    max_new_tokens: int = 32,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    num_beams: int = 1,
    length_penalty: float = 1.0,
    early_stopping: bool | str = False,
    stop_token_ids: int | Sequence[int] | None = None,
    stop_strings: str | Sequence[str] | None = None,
    tokenizer: Any = None,
    streamer: Any = None,
    cache: FlamingoCache | None = None,
    return_cache: bool = True,
    generator: torch.Generator | None = None,
    pad_token_id: int | None = None,
    static_cache: bool = False,
) -> GenerateOutput:
    """New tokens after prompts.

    Each medium is encoded once, whatever the number of tokens, beams and turns. Image tokens are
    never generated.

    Arguments:
        model: a `Flamingo`.
        input_ids: (B, L) int64, padded on the left.
        images, videos, num_media: as of `Flamingo.forward`, those of these tokens.
        attention_mask: (B, L), 0 at padding.
        max_new_tokens: the most of each row.
        temperature: of sampling; 0: always the likeliest token.
        top_k: sample among so many likeliest tokens (and those as likely as the last of them).
        top_p: sample among the least number of likeliest tokens with this probability together.
        num_beams: more than 1: beam search with the results of transformers'.
        length_penalty, early_stopping: of beams, transformers' arguments.
        stop_token_ids: tokens to stop after; by default config.eoc_token_id. (): none.
        stop_strings: strings to stop after, in the new text. With beams or a streamer the host
            then waits for each token.
        tokenizer: its `decode`, for stop_strings.
        streamer: called with the new tokens, (B,) on the model's device, pad_token_id in rows that
            are finished; up to 15 more times after the last, as the host doesn't wait for them. Or
            a streamer of transformers, whose `put` gets the prompt and each token on the CPU.
        cache: of the conversation so far, what an earlier call returned. It is changed in place.
        return_cache: whether to have a cache of the new tokens too, which feeds the last one to the
            model; always where a cache is given.
        generator: of sampling.
        pad_token_id: by default the first of stop_token_ids, or 0.
        static_cache: whether the language model's cache has its full length from the beginning. All
            tokens then are the same work at the same addresses, which on a GPU becomes a CUDA graph
            after the first ones.

    Raises:
        TypeError, ValueError: a wrong argument, by name.
        ImportError: transformers is not installed.
    """
    strings = [stop_strings] if isinstance(stop_strings, str) else list(stop_strings or ())
    sampling = Sampling(temperature, top_k, top_p, generator)
    check_dims(max_new_tokens=max_new_tokens, num_beams=num_beams)
    if num_beams > 1 and temperature > 0:
        raise ValueError(
            f"temperature: expected 0 with num_beams = {num_beams}, got {temperature}; beams are "
            "not sampled"
        )
    if num_beams > 1 and streamer is not None:
        raise ValueError(f"streamer: expected None with num_beams = {num_beams}")
    if early_stopping not in (True, False, "never"):
        raise ValueError(f"early_stopping: expected a bool or 'never', got {early_stopping!r}")
    if strings and tokenizer is None:
        raise ValueError("tokenizer: expected one for stop_strings, got None")
    if "" in strings:
        raise ValueError("stop_strings: expected strings that are not empty")
    if stop_token_ids is None:
        eoc = model.config.eoc_token_id
        stop_token_ids = () if eoc is None else (eoc,)
    stop_ids = [stop_token_ids] if isinstance(stop_token_ids, int) else list(stop_token_ids)
    if pad_token_id is None:
        pad_token_id = stop_ids[0] if stop_ids else 0
    if not 0 <= pad_token_id < model.num_tokens:
        raise ValueError(
            f"pad_token_id: expected a token id below {model.num_tokens}, got {pad_token_id}"
        )
    return_cache = return_cache or cache is not None

    cache, logits = _prefill(
        model, input_ids, images, videos, attention_mask, num_media=num_media, cache=cache
    )
    # The last one is fed to the model only where a cache is to have it.
    total = cache.seqlen + max_new_tokens - (not return_cache)
    check_length(total, model.max_tokens, "max_new_tokens")
    stops = Stops(stop_ids, strings, tokenizer, pad_token_id, logits.device)
    decoder = Decoder(
        model, cache, room=max_new_tokens, copies=num_beams, static_cache=static_cache
    )
    if num_beams > 1:
        tokens, lengths, scores = beam_search(
            decoder, logits, stops, max_new_tokens, length_penalty, early_stopping
        )
        longest = int(lengths.max())
        tokens = tokens[:, :longest]
        if return_cache:
            mask = mask_until(lengths, longest)
            model(tokens, attention_mask=mask, cache=cache, logits_to_keep=1)
            _align_left(cache)
        return GenerateOutput(tokens, cache if return_cache else None, scores)
    tokens, lengths = _generate(
        decoder, logits, stops, max_new_tokens, sampling, streamer, input_ids
    )
    longest = int(lengths.max())
    if return_cache:
        if longest > decoder.num_fed:
            decoder(tokens[:, decoder.num_fed])
        decoder.move_to(cache)
        mask = mask_until(lengths, decoder.num_fed)
        cache.add_tokens(mask, torch.zeros_like(mask, dtype=torch.bool))
        _align_left(cache)
    return GenerateOutput(tokens[:, :longest], cache if return_cache else None)


@torch.no_grad()
def score(
    model: "Flamingo",
    input_ids: torch.Tensor,
    options: Sequence[Any],
    images: Media | None = None,
    videos: Media | None = None,
    attention_mask: torch.Tensor | None = None,
    *,
    num_media: Sequence[int] | None = None,
    normalize: bool = False,
    batch_size: int | None = None,
) -> torch.Tensor:
    """Log-likelihood of each option after its prompt, as for closed-ended questions.

    Flamingo's section 3.2 and appendix B.1.3: the answer is the option with the highest. A prompt
    and its media are encoded once for all options.

    Arguments:
        model, input_ids, images, videos, attention_mask, num_media: as of `generate`.
        options: for each prompt its options, as many for all; each a list of token ids. Of one
            prompt also the list of its options.
        normalize: divide by the number of tokens.
        batch_size: options of each prompt at a time, each of which has a copy of the language
            model's cache. None: all.

    Returns:
        (B, options), fp32 at least.

    Raises:
        TypeError, ValueError: a wrong argument, by name.
    """
    if batch_size is not None:
        check_dims(batch_size=batch_size)
    cache, logits = _prefill(model, input_ids, images, videos, attention_mask, num_media=num_media)
    by_prompt = options_of(options, input_ids.shape[0], model)
    number = len(by_prompt[0])
    step = batch_size or number
    scores = [
        score_options(model, cache, logits, [each[begin : begin + step] for each in by_prompt])
        for begin in range(0, number, step)
    ]
    total = torch.cat(scores, 1)
    if normalize:
        lengths = [[len(option) for option in each] for each in by_prompt]
        total = total / torch.tensor(lengths, device=total.device)
    return total


def _generate(
    decoder: Decoder,
    logits: torch.Tensor,
    stops: Stops,
    max_new_tokens: int,
    sampling: Sampling,
    streamer: Any,
    input_ids: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens (B, max_new_tokens), and how many of each row are its own, (B,)."""
    rows = logits.shape[0]
    image_token_id = decoder.model.config.image_token_id
    is_transformers = hasattr(streamer, "put")
    is_waiting = is_transformers or bool(stops.strings and streamer is not None)
    period = 1 if is_waiting else stops.period(logits.device)
    tokens = logits.new_full((rows, max_new_tokens), stops.pad_token_id, dtype=torch.int64)
    lengths = logits.new_zeros(rows, dtype=torch.int64)
    finished = logits.new_zeros(rows, dtype=torch.bool)
    if is_transformers:
        streamer.put(input_ids.cpu())
    for step in range(max_new_tokens):
        if step > 0:
            logits = decoder(tokens[:, step - 1])
        logits[:, image_token_id] = float("-inf")
        chosen = torch.where(finished, stops.pad_token_id, sampling.choose(logits))
        tokens[:, step] = chosen
        lengths += ~finished
        finished = finished | stops.are_at(chosen)
        if streamer is not None:
            (streamer.put(chosen.cpu()) if is_transformers else streamer(chosen))
        if (step + 1) % period == 0:
            stops.cut_at_strings(tokens, lengths, finished, step + 1)
            if finished.all():
                break
    stops.cut_at_strings(tokens, lengths, finished, max_new_tokens)
    if is_transformers:
        streamer.end()
    return tokens, lengths


@torch.no_grad()
def _prefill(
    model: "Flamingo",
    input_ids: torch.Tensor,
    images: Media | None,
    videos: Media | None,
    attention_mask: torch.Tensor | None,
    *,
    num_media: Sequence[int] | None,
    cache: FlamingoCache | None = None,
) -> tuple[FlamingoCache, torch.Tensor]:
    """A cache with the prompts, padded on the left at most; and logits (B, V) after them."""
    check_ids(input_ids, attention_mask, None)
    batch, seqlen = input_ids.shape
    if batch == 0 or seqlen == 0:
        raise ValueError(
            f"input_ids: expected at least a row and a token, got shape {tuple(input_ids.shape)}"
        )
    is_padded = False
    if attention_mask is not None:
        is_padded = _check_padding(attention_mask)
    if cache is None:
        cache = model.new_cache(batch, input_ids.device)
    elif cache.attention_mask.shape[0] != batch:
        raise ValueError(
            f"cache: expected one of input_ids' {batch} rows, got one of "
            f"{cache.attention_mask.shape[0]}"
        )
    is_ragged = is_padded and cache.seqlen > 0
    if is_ragged:
        # Padding between a row's text so far and its new tokens would be distance to some language
        # models: it comes after these.
        assert attention_mask is not None
        order = (attention_mask == 0).int().argsort(dim=1, stable=True)
        input_ids, attention_mask = input_ids.gather(1, order), attention_mask.gather(1, order)
    output = model(
        input_ids,
        images,
        videos,
        attention_mask,
        num_media=num_media,
        cache=cache,
        logits_to_keep=0 if is_ragged else 1,
    )
    logits = output.logits
    if is_ragged:
        assert attention_mask is not None
        last = (attention_mask != 0).sum(1) - 1
        logits = logits[torch.arange(batch, device=last.device), last]
        _align_left(cache)
        return cache, logits
    return cache, logits[:, -1]


def _check_padding(attention_mask: torch.Tensor) -> bool:
    """Whether there is any."""
    is_real = attention_mask != 0
    wrong = (~is_real[:, -1] | (is_real[:, :-1] & ~is_real[:, 1:]).any(1)).tolist()
    if any(wrong):
        row = wrong.index(True)
        raise ValueError(
            f"attention_mask: expected padding on the left alone, as new tokens come after the "
            f"last; got {attention_mask[row].tolist()} in row {row}"
        )
    return not bool(is_real.all())


def _align_left(cache: FlamingoCache) -> None:
    """Moves padding to the left of each row, and leaves out what all rows have there.

    Keys and values are of positions that they had when they were made, and relative ones stay.
    """
    is_real = cache.attention_mask != 0
    seqlen = int(is_real.sum(1).max())
    if bool((is_real[:, 1:] >= is_real[:, :-1]).all()) and seqlen == cache.seqlen:
        return
    order = is_real.int().argsort(dim=1, stable=True)[:, cache.seqlen - seqlen :]
    cache.attention_mask = cache.attention_mask.gather(1, order)
    cache.media_locations = cache.media_locations.gather(1, order)
    for each in filter(None, (cache.lm, cache.graft)):
        for layer in each.layers:
            layer.keys = _tokens_of(layer.keys, order)
            layer.values = _tokens_of(layer.values, order)


def _tokens_of(states: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
    """Tokens (B, new T) of keys or values (B, H, T, D)."""
    _, heads, _, dim = states.shape
    return states.gather(2, order[:, None, :, None].expand(-1, heads, -1, dim))
