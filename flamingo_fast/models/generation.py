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
import torch.nn.functional as F

from flamingo_fast.layout import MediaLayout
from flamingo_fast.models.cache import FlamingoCache
from flamingo_fast.models.conditioning import MediaContext
from flamingo_fast.models.extras import require
from flamingo_fast.models.media_inputs import Media, check_ids, check_length

if TYPE_CHECKING:
    from flamingo_fast.models.flamingo import Flamingo

# Tokens after which a GPU is waited for, to ask whether all rows are finished.
_TOKENS_A_CHECK = 16
# Of beams that must not be chosen: transformers' number, finite so that orders stay defined.
_LOW = -1.0e9
# Steps before a CUDA graph is captured: kernels are compiled and libraries have their workspaces.
_WARM_UP = 2


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
    sampling = _Sampling(temperature, top_k, top_p, generator)
    _at_least_one(max_new_tokens=max_new_tokens, num_beams=num_beams)
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
    stops = _Stops(stop_ids, strings, tokenizer, pad_token_id, logits.device)
    decoder = Decoder(
        model, cache, room=max_new_tokens, copies=num_beams, static_cache=static_cache
    )
    if num_beams > 1:
        tokens, lengths, scores = _beam_search(
            decoder, logits, stops, max_new_tokens, length_penalty, early_stopping
        )
        longest = int(lengths.max())
        tokens = tokens[:, :longest]
        if return_cache:
            mask = _until(lengths, longest)
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
        mask = _until(lengths, decoder.num_fed)
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
        _at_least_one(batch_size=batch_size)
    cache, logits = _prefill(model, input_ids, images, videos, attention_mask, num_media=num_media)
    by_prompt = _options(options, input_ids.shape[0], model)
    number = len(by_prompt[0])
    step = batch_size or number
    scores = [
        _score(model, cache, logits, [each[begin : begin + step] for each in by_prompt])
        for begin in range(0, number, step)
    ]
    total = torch.cat(scores, 1)
    if normalize:
        lengths = [[len(option) for option in each] for each in by_prompt]
        total = total / torch.tensor(lengths, device=total.device)
    return total


class Decoder:
    """One token after another of rows whose text so far is in a cache.

    Arguments:
        model: a `Flamingo`.
        cache: with B rows. It is left alone but for the language model's cache, which grows unless
            there are copies or static_cache: `move_to` gives it what was made.
        room: the most tokens that will be fed.
        copies: rows of each of the cache's rows in turn, as beams are. They share its media.
        static_cache: see `generate`.

    Attributes:
        context: the media that all tokens attend to.
        copies: the argument.
        num_fed: tokens so far.
    """

    def __init__(
        self,
        model: "Flamingo",
        cache: FlamingoCache,
        *,
        room: int,
        copies: int = 1,
        static_cache: bool = False,
    ) -> None:
        self.model, self.copies, self.num_fed = model, copies, 0
        self.context = MediaContext(
            cache.layout_after(model.config.conditioning.attend), media_kv=cache.media_kv
        )
        self._num_before, self._is_static = cache.seqlen, static_cache
        lm, graft = cache.lm, cache.graft
        if copies > 1 or static_cache:
            capacity = cache.seqlen + room if static_cache else None
            lm, graft = (
                None if each is None else _copied(each, copies, capacity) for each in (lm, graft)
            )
        self._cache: Any = dataclasses.replace(cache, lm=lm, graft=graft)
        self._mask: torch.Tensor | None = None
        if (cache.attention_mask == 0).any():
            _hide_from_reading(lm)
            # Static shapes need the tokens to come to be in the mask, hidden until they are there.
            mask = F.pad(cache.attention_mask, (0, room), value=0 if static_cache else 1)
            self._mask = _repeated(mask, copies)
        self._slot = torch.full((1,), cache.seqlen, device=cache.attention_mask.device)
        self._graph: torch.cuda.CUDAGraph | None = None
        self._graph_tokens = self._graph_logits = self._slot

    def __call__(self, tokens: torch.Tensor) -> torch.Tensor:
        """Logits (rows, V) after tokens (rows,), of memory that is free until the next call."""
        is_capturable = self._is_static and tokens.is_cuda
        if is_capturable and self._graph is None and self.num_fed >= _WARM_UP:
            self._graph_tokens = tokens.clone()
            self._graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self._graph):
                self._graph_logits = self._step(self._graph_tokens)
        self.num_fed += 1
        if self._graph is None:
            return self._step(tokens)
        self._graph_tokens.copy_(tokens)
        self._graph.replay()
        return self._graph_logits

    @torch.no_grad()
    def _step(self, tokens: torch.Tensor) -> torch.Tensor:
        mask = self._mask
        if mask is not None and self._is_static:
            mask.index_fill_(1, self._slot, 1)
            self._slot.add_(1)
        elif mask is not None:
            mask = mask[:, : self._num_before + self.num_fed]
        self._cache.attention_mask = mask
        with self.model.conditioning.of(self.context):
            hidden = self.model._hidden(tokens[:, None], None, self._cache)
        return self.model.logits(hidden)[:, -1]

    def reorder(self, rows: torch.Tensor) -> None:
        """Each row goes on from another of the same sample: rows (rows,) int64."""
        for cache in filter(None, (self._cache.lm, self._cache.graft)):
            for layer in cache.layers:
                if self._is_static:
                    # The tokens of the prompt are those of the other row, and addresses must stay.
                    for each in (layer.keys, layer.values):
                        new = each[:, :, self._num_before :]
                        new.copy_(new.index_select(0, rows))
                else:
                    layer.keys = layer.keys.index_select(0, rows)
                    layer.values = layer.values.index_select(0, rows)

    def move_to(self, cache: FlamingoCache) -> None:
        """Gives `cache` the language model's cache with the tokens that were fed."""
        lm, graft = self._cache.lm, self._cache.graft
        if self._is_static:
            seqlen = self._num_before + self.num_fed
            lm, graft = (
                None if each is None else _copied(each, seqlen=seqlen) for each in (lm, graft)
            )
        cache.lm, cache.graft = lm, graft


@dataclasses.dataclass(frozen=True)
class _Sampling:
    temperature: float
    top_k: int | None
    top_p: float | None
    generator: torch.Generator | None

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < float("inf"):
            raise ValueError(f"temperature: expected at least 0, got {self.temperature}")
        if self.top_k is not None:
            _at_least_one(top_k=self.top_k)
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ValueError(f"top_p: expected above 0 and at most 1, got {self.top_p}")
        if self.temperature == 0 and not self.top_k is self.top_p is None:
            raise ValueError("temperature: expected above 0 with top_k or top_p, got 0")

    def choose(self, logits: torch.Tensor) -> torch.Tensor:
        """(rows, V) -> (rows,)."""
        if self.temperature == 0:
            return logits.argmax(-1)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32)) / self.temperature
        if self.top_k is not None:
            least = logits.topk(min(self.top_k, logits.shape[-1])).values[:, -1:]
            logits = logits.masked_fill(logits < least, float("-inf"))
        if self.top_p is not None:
            ordered, order = logits.sort(descending=True)
            probabilities = ordered.softmax(-1)
            # The first of them stays, however likely it is.
            is_beyond = probabilities.cumsum(-1) - probabilities >= self.top_p
            ordered = ordered.masked_fill(is_beyond, float("-inf"))
            logits = logits.scatter(-1, order, ordered)
        # The least of exponential variables with these rates: torch.multinomial may make the host
        # wait for a GPU, to check its argument.
        noise = torch.empty_like(logits).exponential_(generator=self.generator)
        noise.clamp_(min=torch.finfo(noise.dtype).tiny)
        return (logits.softmax(-1) / noise).argmax(-1)


class _Stops:
    """When a row is finished."""

    def __init__(
        self,
        token_ids: Sequence[int],
        strings: Sequence[str],
        tokenizer: Any,
        pad_token_id: int,
        device: torch.device,
    ) -> None:
        self.number = len(token_ids)
        self.strings, self.tokenizer, self.pad_token_id = strings, tokenizer, pad_token_id
        self._token_ids = torch.tensor(token_ids, dtype=torch.int64, device=device)
        self._num_checked = 0

    def are_at(self, tokens: torch.Tensor) -> torch.Tensor:
        """Bool, of tokens' shape."""
        return (tokens[..., None] == self._token_ids).any(-1)

    def have_strings(self, candidates: torch.Tensor) -> torch.Tensor:
        """Whether sequences (..., tokens) have a stop string: bool (...)."""
        found = [self._has_string(each) for each in candidates.flatten(0, -2).tolist()]
        return torch.tensor(found, device=candidates.device).view(candidates.shape[:-1])

    def cut_at_strings(
        self, tokens: torch.Tensor, lengths: torch.Tensor, finished: torch.Tensor, number: int
    ) -> None:
        """Ends rows at their first stop string, looking at `number` tokens; changes all three."""
        if not self.strings:
            return
        ids = tokens[:, :number].tolist()
        for row, (row_ids, length) in enumerate(zip(ids, lengths.tolist(), strict=True)):
            if length <= self._num_checked or not self._has_string(row_ids[:length]):
                continue
            end = self._num_checked + 1
            while not self._has_string(row_ids[:end]):
                end += 1
            lengths[row], finished[row] = end, True
            tokens[row, end:] = self.pad_token_id
        self._num_checked = number

    def _has_string(self, ids: list[int]) -> bool:
        text = self.tokenizer.decode(ids)
        return any(each in text for each in self.strings)


def _generate(
    decoder: Decoder,
    logits: torch.Tensor,
    stops: _Stops,
    max_new_tokens: int,
    sampling: _Sampling,
    streamer: Any,
    input_ids: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens (B, max_new_tokens), and how many of each row are its own, (B,)."""
    rows = logits.shape[0]
    image_token_id = decoder.model.config.image_token_id
    is_transformers = hasattr(streamer, "put")
    is_waiting = is_transformers or bool(stops.strings and streamer is not None)
    period = 1 if is_waiting else _period(logits.device)
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


def _beam_search(
    decoder: Decoder,
    logits: torch.Tensor,
    stops: _Stops,
    max_new_tokens: int,
    length_penalty: float,
    early_stopping: bool | str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Of each row the best tokens (B, max_new_tokens), their number (B,) and their score (B,).

    transformers' `GenerationMixin._beam_search`, which it equals: candidates are twice as many as
    beams, so that enough are left if those finish; only the best of them may finish.
    """
    batch, vocab_size = logits.shape
    beams, device = decoder.copies, logits.device
    wide = torch.promote_types(logits.dtype, torch.float32)
    number = min(max(2, 1 + stops.number) * beams, beams * vocab_size)
    period = 1 if stops.strings else _period(device)
    stop_early = early_stopping is True
    running = torch.full((batch, beams, max_new_tokens), stops.pad_token_id, device=device)
    running_scores = torch.full((batch, beams), _LOW, dtype=wide, device=device)
    # All beams are the prompt: its best tokens are those of one of them.
    running_scores[:, 0] = 0
    best, best_scores = running, torch.full_like(running_scores, _LOW)
    lengths = torch.zeros_like(running[:, :, 0])
    is_finished = torch.zeros_like(lengths, dtype=torch.bool)
    may_improve = torch.ones((batch, 1), dtype=torch.bool, device=device)
    is_of_best = torch.arange(number, device=device) < beams
    first_rows = torch.arange(batch, device=device)[:, None] * beams
    logits = _repeated(logits, beams)
    for step in range(max_new_tokens):
        log_probs = logits.to(wide).log_softmax(-1)
        log_probs[:, decoder.model.config.image_token_id] = float("-inf")
        sums = (log_probs.view(batch, beams, vocab_size) + running_scores[..., None]).flatten(1)
        sums, index = sums.topk(number)
        parents, ids = index // vocab_size, index % vocab_size
        candidates = _rows_of(running, parents)
        candidates[:, :, step] = ids
        stopped = stops.are_at(ids)
        if stops.strings:
            stopped |= stops.have_strings(candidates[:, :, : step + 1])
        if step + 1 == max_new_tokens:
            stopped = torch.ones_like(stopped)

        alive = sums + stopped * _LOW
        order = alive.topk(beams).indices
        running, running_scores = _rows_of(candidates, order), alive.gather(1, order)

        are_full = is_finished.all(-1, keepdim=True) & stop_early
        just_finished = stopped & is_of_best
        scores = sums / (step + 1) ** length_penalty
        scores = scores + are_full * _LOW
        scores = scores + ~may_improve * _LOW
        scores = scores + ~just_finished * _LOW
        scores, chosen = torch.cat([best_scores, scores], 1).topk(beams)
        best_scores = scores
        best = _rows_of(torch.cat([best, candidates], 1), chosen)
        is_finished = torch.cat([is_finished, just_finished], 1).gather(1, chosen)
        new_lengths = torch.full_like(ids, step + 1)
        lengths = torch.cat([lengths, new_lengths], 1).gather(1, chosen)

        length = max_new_tokens if early_stopping == "never" and length_penalty > 0 else step + 1
        hoped_for = running_scores[:, :1] / length**length_penalty
        worst = torch.where(is_finished, best_scores.min(1, keepdim=True).values, _LOW)
        may_improve = may_improve & (hoped_for > worst).any(-1, keepdim=True)
        if step + 1 == max_new_tokens:
            break
        # Of a row that can't improve nothing changes any more: steps too many do no harm.
        if (step + 1) % period == 0:
            is_over = ~may_improve.any() | stopped.all() | (is_finished.all() & stop_early)
            if is_over:
                break
        decoder.reorder((first_rows + parents.gather(1, order)).flatten())
        logits = decoder(running[:, :, step].flatten())
    return best[:, 0], lengths[:, 0], best_scores[:, 0]


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


def _copied(
    cache: Any, copies: int = 1, capacity: int | None = None, *, seqlen: int | None = None
) -> Any:
    """A copy of a language model's cache.

    Arguments:
        cache: of transformers.
        copies: rows for each row, in turn.
        capacity: of a static one, in tokens; None: it grows.
        seqlen: how many tokens of `cache`; None: all.
    """
    utils = require("transformers.cache_utils")
    if capacity is None:
        new = utils.DynamicCache()
    else:
        new = utils.Cache(layers=[utils.StaticLayer(capacity) for _ in cache.layers])
    for index, layer in enumerate(cache.layers):
        keys, values = (each[:, :, :seqlen] for each in (layer.keys, layer.values))
        new.update(_repeated(keys, copies), _repeated(values, copies), index)
    return new


def _hide_from_reading(cache: Any) -> None:
    """Keeps transformers from asking whether there is padding, for which a GPU is waited for.

    It does so for each token, to leave the mask out if not, but not where a cache says that it may
    be compiled.
    """
    for layer in cache.layers:
        layer.is_compileable = True


def _repeated(tensor: torch.Tensor, copies: int) -> torch.Tensor:
    """Each row so many times in turn; repeat_interleave may wait for a GPU."""
    if copies == 1:
        return tensor
    return tensor[:, None].expand(-1, copies, *tensor.shape[1:]).flatten(0, 1)


def _rows_of(tensor: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """(B, n, tokens) by index (B, m) -> (B, m, tokens)."""
    return tensor.gather(1, index[..., None].expand(-1, -1, tensor.shape[-1]))


def _until(lengths: torch.Tensor, seqlen: int) -> torch.Tensor:
    """(B, seqlen) int64, 1 at the first `lengths` tokens of each row."""
    return (torch.arange(seqlen, device=lengths.device) < lengths[:, None]).long()


def _period(device: torch.device) -> int:
    """Tokens between questions whether all is finished: a CPU is never waited for."""
    return 1 if device.type == "cpu" else _TOKENS_A_CHECK


def _at_least_one(**values: int) -> None:
    for name, value in values.items():
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ValueError(f"{name}: expected an integer of at least 1, got {value!r}")


def _options(options: Sequence[Any], prompts: int, model: "Flamingo") -> list[list[list[int]]]:
    """The token ids of each option of each prompt."""
    if len(options) and prompts == 1 and all(_is_ids(each) for each in options):
        options = [options]
    by_prompt = [[[int(id_) for id_ in option] for option in each] for each in options]
    if len(by_prompt) != prompts or not by_prompt[0]:
        raise ValueError(f"options: expected some for each of {prompts} prompts, got {options!r}")
    if len({len(each) for each in by_prompt}) > 1:
        raise ValueError(
            f"options: expected as many for each prompt, got {[len(each) for each in by_prompt]}"
        )
    for prompt, each in enumerate(by_prompt):
        for option in each:
            if not option or not all(0 <= id_ < model.num_tokens for id_ in option):
                raise ValueError(
                    f"options: expected token ids below {model.num_tokens}, at least one; got "
                    f"{option} for prompt {prompt}"
                )
            if model.config.image_token_id in option:
                raise ValueError(f"options: expected no image tokens, got {option}")
    return by_prompt


def _is_ids(option: Any) -> bool:
    if isinstance(option, torch.Tensor):
        return option.dim() == 1
    return all(isinstance(each, int) for each in option)


def _score(
    model: "Flamingo",
    cache: FlamingoCache,
    logits: torch.Tensor,
    options: list[list[list[int]]],
) -> torch.Tensor:
    """(B, options), sums of log-probabilities after prompts in a cache that had these logits."""
    batch, copies = len(options), len(options[0])
    longest = max(len(option) for each in options for option in each)
    check_length(cache.seqlen + longest - 1, model.max_tokens, "options")
    flat = [torch.tensor(option) for each in options for option in each]
    ids = torch.nn.utils.rnn.pad_sequence(flat, batch_first=True).to(logits.device)
    lengths = torch.tensor([len(option) for option in flat]).to(logits.device)
    wide = torch.promote_types(logits.dtype, torch.float32)
    all_logits = _repeated(logits, copies)[:, None]
    num_fed = ids.shape[1] - 1
    if num_fed > 0:
        attend = model.config.conditioning.attend
        layout = MediaLayout.cat([cache.layout_after(attend)] * num_fed, dim=1)
        mask = torch.cat([_repeated(cache.attention_mask, copies), _until(lengths - 1, num_fed)], 1)
        of_rows = dataclasses.replace(
            cache,
            lm=_copied(cache.lm, copies),
            graft=None if cache.graft is None else _copied(cache.graft, copies),
            attention_mask=mask,
        )
        with model.conditioning.of(MediaContext(layout, media_kv=cache.media_kv)):
            hidden = model._hidden(ids[:, :-1], None, of_rows)
        all_logits = torch.cat([all_logits, model.logits(hidden)], 1)
    log_probs = all_logits.to(wide).log_softmax(-1).gather(-1, ids[..., None])[..., 0]
    is_real = _until(lengths, ids.shape[1]) != 0
    return torch.where(is_real, log_probs, 0).sum(1).view(batch, copies)
