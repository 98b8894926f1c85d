"""Tokenizers that need no file: of words, and of bytes."""

from collections.abc import Sequence
from typing import Any

import pytest

tokenizers = pytest.importorskip("tokenizers")
transformers = pytest.importorskip("transformers")


def word_tokenizer(words: Sequence[str], pre_tokenizer: Any = None, **special: str) -> Any:
    """Ids are places in `words`: the first is of padding, the third of what is not among them.

    Arguments:
        pre_tokenizer: what splits texts; by default at white space alone.
        special: tokens, by transformers' names.
    """
    vocabulary = {word: index for index, word in enumerate(words)}
    model = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token=words[2]))
    model.pre_tokenizer = pre_tokenizer or tokenizers.pre_tokenizers.WhitespaceSplit()
    special = {"pad_token": words[0], "unk_token": words[2]} | special
    return transformers.PreTrainedTokenizerFast(tokenizer_object=model, **special)


def byte_tokenizer() -> Any:
    """Byte-level BPE, which would split special tokens that are not added; no pad token."""
    model = tokenizers.Tokenizer(tokenizers.models.BPE())
    model.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        special_tokens=["</s>"], initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet()
    )
    model.train_from_iterator(["a cat", "two dogs", "Output: a cat."], trainer)
    return transformers.PreTrainedTokenizerFast(tokenizer_object=model, eos_token="</s>")
