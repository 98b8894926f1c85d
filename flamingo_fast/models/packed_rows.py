"""Rows of several documents, which don't see each other: see `MediaLayout.packed`.

B rows, L tokens of a row.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch

from flamingo_fast.layout import document_boundaries, values_are_at_hand
from flamingo_fast.models.chinchilla import ChinchillaLM
from flamingo_fast.models.parts import inverts_masks

# Language models of transformers that take a token's place from `position_ids` alone (MPT has
# distances), and what it sees from the mask alone. There are others whose mask is of two dimensions
# whatever they are given, and those with states or convolutions.
FAMILIES = (
    *("gpt2", "opt", "gpt_neox", "gptj", "llama", "mistral", "qwen2", "qwen3", "phi", "phi3"),
    *("gemma", "mpt", "olmo", "olmo2", "stablelm", "starcoder2", "smollm3"),
)
# Others make masks of their own, or none.
_ATTENTIONS = ("sdpa", "eager")


@dataclasses.dataclass(frozen=True)
class PackedRows:
    """Where documents are in the rows of a call.

    Attributes:
        cu_seqlens: (documents + 1,) int32 on the rows' device.
        documents: (B, L) int32, which each token is of. Those after the last one are one more, or
            of several rows one in each.
        positions: (B, L) int64, of each token in its document.
        num_documents: without the one after the last.
        longest: tokens of a document at most; L, where nobody waits for the values.
    """

    cu_seqlens: torch.Tensor
    documents: torch.Tensor
    positions: torch.Tensor
    num_documents: int
    longest: int

    @classmethod
    def of(
        cls,
        cu_seqlens: torch.Tensor | Sequence[int],
        batch: int,
        seqlen: int,
        device: torch.device,
    ) -> "PackedRows":
        """From the argument of `MediaLayout.packed`; nothing waits for a GPU.

        Raises:
            TypeError, ValueError: boundaries that are none, by name.
        """
        boundaries = document_boundaries(cu_seqlens, batch, seqlen, device)
        longest, given = seqlen, cu_seqlens
        if not isinstance(given, torch.Tensor):
            given = torch.tensor(given, dtype=torch.int64, device="cpu")
        if values_are_at_hand(given) and len(given) > 1:
            longest = int(given.long().diff().max())
        token = torch.arange(batch * seqlen, dtype=torch.int32, device=device)
        documents = torch.searchsorted(boundaries[1:].contiguous(), token, right=True)
        # The tokens after the last document begin anew in each row.
        row_start = token - token % max(seqlen, 1)
        positions = token - torch.maximum(boundaries[documents], row_start)
        return cls(
            boundaries,
            documents.int().view(batch, seqlen),
            positions.long().view(batch, seqlen),
            len(boundaries) - 1,
            longest,
        )

    def count(self, media_locations: torch.Tensor) -> list[int]:
        """Image tokens of each document and of the tokens after them; a GPU is waited for."""
        document = self.documents.flatten()
        counts = document.new_zeros(self.num_documents + 1)
        return counts.index_add_(0, document, media_locations.flatten().int()).tolist()

    def labels(self, labels: torch.Tensor) -> torch.Tensor:
        """As they are, but what nothing in its document comes before is not to be predicted."""
        return labels.masked_fill(self.positions == 0, -100)

    def mask(self, lang_model: Any) -> torch.Tensor:
        """What attention of a language model of transformers takes: (B, 1, L, L).

        Raises:
            ValueError: the language model would see other documents, or not all of its own.
        """
        config, name = lang_model.config, type(lang_model).__name__
        if config.model_type not in FAMILIES:
            raise ValueError(
                f"cu_seqlens: expected None, as it is not known whether {name} can keep documents "
                f"of a row apart; {ChinchillaLM.__name__} and these of transformers can: "
                f"{', '.join(FAMILIES)}"
            )
        attention = config._attn_implementation
        if attention not in _ATTENTIONS:
            raise ValueError(
                f"cu_seqlens: expected None, or a language model with attn_implementation "
                f"{' or '.join(_ATTENTIONS)}; got {name} with {attention!r}"
            )
        window = getattr(config, "sliding_window", None)
        if window is not None and self.longest > window:
            raise ValueError(
                f"cu_seqlens: expected documents of at most {window} tokens, as many as the "
                f"sliding window of {name} has; got one of {self.longest}"
            )
        documents = self.documents
        length = documents.shape[1]
        seen = torch.ones(length, length, dtype=torch.bool, device=documents.device).tril_()
        seen = (seen & (documents[:, :, None] == documents[:, None]))[:, None]
        if attention == "sdpa":
            return seen
        dtype = lang_model.get_input_embeddings().weight.dtype
        if inverts_masks(lang_model):
            return seen.to(dtype)
        unseen = torch.zeros(seen.shape, dtype=dtype, device=seen.device)
        return unseen.masked_fill_(~seen, torch.finfo(dtype).min)
