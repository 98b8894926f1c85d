"""Beam search, with the results of transformers'."""

import torch

from flamingo_fast.models.decoder import Decoder, repeated_rows
from flamingo_fast.models.sampling import Stops

# Of beams that must not be chosen: transformers' number, finite so that orders stay defined.
_LOW = -1.0e9


def beam_search(
    decoder: Decoder,
    logits: torch.Tensor,
    stops: Stops,
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
    period = 1 if stops.strings else stops.period(device)
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
    logits = repeated_rows(logits, beams)
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


def _rows_of(tensor: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """(B, n, tokens) by index (B, m) -> (B, m, tokens)."""
    return tensor.gather(1, index[..., None].expand(-1, -1, tensor.shape[-1]))
