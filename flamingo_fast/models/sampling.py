"""Which token comes next, and when a row is finished.

V token ids that there are logits of.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch

from flamingo_fast.modules.options import check_dims

# Tokens after which a GPU is waited for, to ask whether all rows are finished.
TOKENS_A_CHECK = 16


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How a token is chosen: arguments of `generate`."""

    temperature: float
    top_k: int | None
    top_p: float | None
    generator: torch.Generator | None

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < float("inf"):
            raise ValueError(f"temperature: expected at least 0, got {self.temperature}")
        if self.top_k is not None:
            check_dims(top_k=self.top_k)
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


class Stops:
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

    @staticmethod
    def period(device: torch.device) -> int:
        """Tokens between questions whether all is finished: a CPU is never waited for."""
        return 1 if device.type == "cpu" else TOKENS_A_CHECK

    def _has_string(self, ids: list[int]) -> bool:
        text = self.tokenizer.decode(ids)
        return any(each in text for each in self.strings)
