"""Learnt embeddings of a few tokens beside a frozen vocabulary (Flamingo, section 2.4)."""

from collections.abc import Sequence
from typing import Any

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
        embedding: the language model's, an nn.Embedding.
        head: its output embedding, a linear layer; its weight may be the embedding's.

    Attributes:
        weight: (tokens, dim), rows of the embedding, and of the output embedding if they are one.
        head_weight: rows of the output embedding if it is another, else None.
        num_tokens: ids that there are logits of.

    Raises:
        ConfigError: ids after the vocabulary that leave some out; an embedding that does more than
            look up rows; an output embedding whose bias would be left out.
    """

    token_ids: torch.Tensor

    def __init__(self, token_ids: Sequence[int], embedding: Any, head: Any) -> None:
        super().__init__()
        vocab_size, dim = embedding.weight.shape
        if type(embedding) is not nn.Embedding:
            raise ConfigError(
                "learnt_token_ids: expected a language model with an nn.Embedding, got "
                f"{type(embedding).__name__}, which may do more than look up rows"
            )
        if head.bias is not None and any(each < vocab_size for each in token_ids):
            raise ConfigError(
                f"learnt_token_ids: expected ids after the vocabulary of {vocab_size} tokens, as "
                f"the language model's output embedding has a bias; got {tuple(token_ids)}"
            )
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
        self.head_weight: nn.Parameter | None = None
        if head.weight is not embedding.weight:
            self.head_weight = nn.Parameter(torch.empty(len(self.ids), head.weight.shape[1]))
        self.register_buffer("token_ids", torch.tensor(self.ids), persistent=False)
        self._init_rows(self.weight, embedding.weight)
        if self.head_weight is not None:
            self._init_rows(self.head_weight, head.weight)

    @torch.no_grad()
    def _init_rows(self, rows: torch.Tensor, vocabulary: torch.Tensor) -> None:
        """Those of the vocabulary as they are there, the others the mean of all of its rows."""
        if vocabulary.is_meta or rows.is_meta:
            return
        mean = vocabulary.float().mean(0)
        for row, token in zip(rows, self.ids, strict=True):
            row.copy_(vocabulary[token] if token < self.vocab_size else mean)

    @property
    def output_weight(self) -> torch.Tensor:
        """Rows that make logits."""
        return self.weight if self.head_weight is None else self.head_weight

    def embed(self, input_ids: torch.Tensor, embedding: nn.Module) -> torch.Tensor:
        """(B, L) -> (B, L, dim)."""
        # Ids that don't exist go on to fail as they would without these tokens.
        beyond = (input_ids >= self.vocab_size) & (input_ids < self.num_tokens)
        embedded = embedding(input_ids.masked_fill(beyond, 0))
        matches = input_ids[..., None] == self.token_ids
        own = F.embedding(matches.int().argmax(-1), self.weight)
        return torch.where(matches.any(-1, keepdim=True), own.to(embedded.dtype), embedded)

    def extend(self, logits: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
        """Logits (..., vocab_size) of hidden states (..., dim), with these tokens': (..., all)."""
        own = F.linear(hidden, self.output_weight).to(logits.dtype)
        inside = sum(each < self.vocab_size for each in self.ids)
        logits = logits.index_copy(-1, self.token_ids[:inside], own[..., :inside])
        return torch.cat([logits, own[..., inside:]], -1)

    def extra_repr(self) -> str:
        return f"ids={self.ids}"
