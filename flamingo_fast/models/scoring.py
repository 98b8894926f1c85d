"""Scores of given options after prompts."""

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from flamingo_fast.layout import MediaLayout
from flamingo_fast.models.cache import FlamingoCache
from flamingo_fast.models.conditioning import MediaContext
from flamingo_fast.models.decoder import copied_cache, mask_until, repeated_rows
from flamingo_fast.models.media_inputs import check_length

if TYPE_CHECKING:
    from flamingo_fast.models.flamingo import Flamingo


def options_of(options: Sequence[Any], prompts: int, model: "Flamingo") -> list[list[list[int]]]:
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


def score_options(
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
    all_logits = repeated_rows(logits, copies)[:, None]
    num_fed = ids.shape[1] - 1
    if num_fed > 0:
        attend = model.config.conditioning.attend
        layout = MediaLayout.cat([cache.layout_after(attend)] * num_fed, dim=1)
        mask = torch.cat(
            [repeated_rows(cache.attention_mask, copies), mask_until(lengths - 1, num_fed)], 1
        )
        of_rows = dataclasses.replace(
            cache,
            lm=copied_cache(cache.lm, copies),
            graft=None if cache.graft is None else copied_cache(cache.graft, copies),
            attention_mask=mask,
        )
        with model.conditioning.of(MediaContext(layout, media_kv=cache.media_kv)):
            hidden = model._hidden(ids[:, :-1], None, of_rows)
        all_logits = torch.cat([all_logits, model.logits(hidden)], 1)
    log_probs = all_logits.to(wide).log_softmax(-1).gather(-1, ids[..., None])[..., 0]
    is_real = mask_until(lengths, ids.shape[1]) != 0
    return torch.where(is_real, log_probs, 0).sum(1).view(batch, copies)
