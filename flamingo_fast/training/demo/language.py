"""The demo's language: what is said of digits, and a tokenizer of its words."""

import dataclasses
import random
from typing import Any

from flamingo_fast.models.extras import require

_ENGLISH = "zero one two three four five six seven eight nine".split()
_GERMAN = "null eins zwei drei vier fünf sechs sieben acht neun".split()
_SPANISH = "cero uno dos tres cuatro cinco seis siete ocho nueve".split()
NAMES: tuple[tuple[str, ...], ...] = tuple(zip(_ENGLISH, _GERMAN, _SPANISH, strict=True))
"""What each digit may be called."""
# Of lists of digits' texts: captions are learnt sooner.
_CAPTIONS_SHARE = 0.3
_DIGITS_OF_A_LIST = (2, 3, 5, 10)
ITEM, END = "-", "."
"""What text has before and after what is said of a digit, in a list."""
_WORDS = ("<pad>", "<unk>", ITEM, END, "a", "handwritten", "called")


@dataclasses.dataclass(frozen=True)
class Task:
    """What the texts of a document's images say.

    Attributes:
        name: of the dataset.
        prompt: the first words of every text, after which a model goes on.
        has_own_names: whether each document draws names for its digits, which nothing but earlier
            texts of it tells.
    """

    name: str
    prompt: str
    has_own_names: bool

    def texts(self, rng: random.Random) -> list[str]:
        """Of each digit, in a new document."""
        if self.has_own_names:
            return [f"called {rng.choice(names)}" for names in NAMES]
        return [f"a handwritten {names[0]}" for names in NAMES]

    def answer(self, text: str) -> str:
        """What comes after the prompt."""
        return text.removeprefix(self.prompt).strip()


CAPTIONS = Task("captions", "", has_own_names=False)
"""A handwritten seven is "a handwritten seven"."""
OWN_NAMES = Task("own_names", "called", has_own_names=True)
"""It is called "seven", "sieben" or "siete": in one document always the same."""
TASKS = (CAPTIONS, OWN_NAMES)


def make_tokenizer() -> Any:
    """A tokenizer of transformers, of words between spaces.

    Raises:
        ImportError: transformers is not installed.
    """
    tokenizers = require("tokenizers")
    words = [*_WORDS, *(name for names in NAMES for name in names)]
    vocabulary = {word: index for index, word in enumerate(words)}
    model = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<unk>"))
    model.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    return require("transformers").PreTrainedTokenizerFast(
        tokenizer_object=model, pad_token="<pad>", unk_token="<unk>"
    )


def corpus_document(rng: random.Random, items: int) -> str:
    """Text for a language model: a list of what is said of random digits.

    An item is as long as an image's text with `<image>` before it and `<EOC>` after it: distances
    in documents with images are then those that the language model knows. Often a list is of a few
    digits only. That a name comes again then pays at once, and is learnt in a fifth of the time.
    """
    task = CAPTIONS if rng.random() < _CAPTIONS_SHARE else OWN_NAMES
    texts = task.texts(rng)
    some = rng.sample(texts, rng.choice(_DIGITS_OF_A_LIST))
    return " ".join(f"{ITEM} {rng.choice(some)} {END}" for _ in range(items))
