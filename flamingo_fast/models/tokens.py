"""Learnt embeddings of a few tokens beside a frozen vocabulary (Flamingo, section 2.4)."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import nn

from flamingo_fast.models.config import ConfigError


class LearntTokens(nn.Module):
    """Rows of their own for some token ids, in the embedding and in the logits.

    An id of the vocabulary has its row in place of the language model's; the ids after the
    vocabulary extend it, in order.

    Arguments:
        token_ids: which.
        vocab_size: of the language model.
        dim: width of its embeddings.

    Raises:
        ConfigError: ids after the vocabulary that leave some out.
    """

    token_ids: torch.Tensor

    def __init__(self, token_ids: Sequence[int], vocab_size: int, dim: int) -> None:
        super().__init__()
        beyond = sorted(each for each in token_ids if each >= vocab_size)
        if beyond != list(range(vocab_size, vocab_size + len(beyond))):
            raise ConfigError(
                f"learnt_token_ids: expected those after the vocabulary to be {vocab_size} and the "
                f"next ones, got {beyond}"
            )
        # In the order that extends the logits.
        self.ids = (*sorted(each for each in token_ids if each < vocab_size), *beyond)
        self.vocab_size = vocab_size
        self.num_tokens = vocab_size + len(beyond)
        self.weight = nn.Parameter(torch.empty(len(self.ids), dim))
        self.register_buffer("token_ids", torch.tensor(self.ids), persistent=False)

    @torch.no_grad()
    def init_from(self, embedding: torch.Tensor) -> None:
        """The vocabulary's rows as the model has them, the others the mean of all of its rows."""
        if embedding.is_meta:
            return
        mean = embedding.float().mean(0)
        for row, token in zip(self.weight, self.ids, strict=True):
            row.copy_(embedding[token] if token < self.vocab_size else mean)

    def embed(self, input_ids: torch.Tensor, embedding: nn.Module) -> torch.Tensor:
        """(B, L) -> (B, L, dim)."""
        embedded = embedding(input_ids.clamp(max=self.vocab_size - 1))
        matches = input_ids[..., None] == self.token_ids
        own = F.embedding(matches.int().argmax(-1), self.weight)
        return torch.where(matches.any(-1, keepdim=True), own.to(embedded.dtype), embedded)

    def extend(self, logits: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
        """Logits (..., vocab_size) of hidden states (..., dim), with these tokens': (..., all)."""
        own = F.linear(hidden, self.weight).to(logits.dtype)
        inside = sum(each < self.vocab_size for each in self.ids)
        logits = logits.index_copy(-1, self.token_ids[:inside], own[..., :inside])
        return torch.cat([logits, own[..., inside:]], -1)

    def extra_repr(self) -> str:
        return f"ids={self.ids}"
