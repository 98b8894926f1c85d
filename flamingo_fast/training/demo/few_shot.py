"""How often a model says the right thing of images it has not seen, after examples.

B prompts, S shots.
"""

import dataclasses
import random
from collections.abc import Sequence

import torch

from flamingo_fast.models.flamingo import Flamingo
from flamingo_fast.models.generation import generate
from flamingo_fast.models.processor import FlamingoProcessor
from flamingo_fast.training.demo.digits import Digits
from flamingo_fast.training.demo.language import Task
from flamingo_fast.training.rows import ChunkTokenizer

# Longer than any answer with its <EOC>.
_MAX_NEW_TOKENS = 5
_PROMPTS_OF_A_BATCH = 60


@dataclasses.dataclass(frozen=True)
class Answer:
    """What a model said of a held-out image.

    Attributes:
        index: of the image.
        said, expected: without the prompt.
    """

    index: int
    said: str
    expected: str

    @property
    def is_right(self) -> bool:
        return self.said == self.expected


def accuracy(answers: Sequence[Answer]) -> float:
    """The share of exact matches."""
    return sum(each.is_right for each in answers) / len(answers)


@torch.no_grad()
def ask(
    model: Flamingo,
    processor: FlamingoProcessor,
    digits: Digits,
    pixels: torch.Tensor,
    task: Task,
    shots: int,
    *,
    shuffle_images: bool = False,
    seed: int = 0,
) -> list[Answer]:
    """Answers of every held-out image, after examples of training images.

    Greedily, until `<EOC>`; all images of a prompt are encoded once.

    Arguments:
        model: in eval mode.
        processor: its tokenizer and tokens.
        digits: whose held-out images are asked for.
        pixels: (images, 3, H, W), of all of them.
        task: what texts say.
        shots: examples in each prompt.
        shuffle_images: the control: examples' images change places among all prompts, and so do
            those that are asked for. Texts stay.
        seed: of examples, names and the shuffle.
    """
    rng = random.Random(f"{seed}/{task.name}/{shots}")
    tokenize = ChunkTokenizer(processor)
    image, end = processor.image_token_id, processor.eoc_token_id
    assert end is not None
    rows, examples, expected = [], [], []
    for index in digits.test:
        texts = task.texts(rng)
        of_row = rng.choices(digits.train, k=shots)
        parts: list[str | int] = []
        for example in of_row:
            parts += [image, texts[digits.labels[example]], end]
        rows.append(tokenize([*parts, image, *filter(None, [task.prompt])]))
        examples += of_row
        expected.append(task.answer(texts[digits.labels[index]]))
    queries = list(digits.test)
    if shuffle_images:
        rng.shuffle(examples)
        rng.shuffle(queries)

    said = []
    for start in range(0, len(rows), _PROMPTS_OF_A_BATCH):
        stop = min(start + _PROMPTS_OF_A_BATCH, len(rows))
        media = [
            each
            for row in range(start, stop)
            for each in (*examples[row * shots : (row + 1) * shots], queries[row])
        ]
        # All texts of a task have as many words, so there is no padding.
        output = generate(
            model,
            torch.tensor(rows[start:stop]),
            pixels[media],
            num_media=[shots + 1] * (stop - start),
            max_new_tokens=_MAX_NEW_TOKENS,
            pad_token_id=processor.pad_token_id,
            return_cache=False,
        )
        said += processor.batch_decode(output.sequences)
    return [Answer(*each) for each in zip(digits.test, said, expected, strict=True)]
