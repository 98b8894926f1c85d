"""Captions a picture after a few examples, and chooses among given answers.

    python examples/few_shot_captioning.py                     # a tiny model of random weights
    python examples/few_shot_captioning.py --model FOLDER --image cat.jpg

FOLDER is what `save_pretrained` of a model and of its tokenizer wrote. The tiny model is untrained:
what it says makes no sense.
"""

import argparse

import tiny

from flamingo_fast.models.generation import generate, score
from flamingo_fast.models.processor import Image

EXAMPLES = [("red", "a red square"), ("green", "a green square")]
ANSWERS = ["red", "green", "blue"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", help="a folder")
    parser.add_argument("--image", help="a file, in place of a blue square")
    parser.add_argument("--beams", type=int, default=3)
    arguments = parser.parse_args()
    model, processor = tiny.load(arguments.model)

    examples = [(tiny.picture(color), f"Output:{caption}") for color, caption in EXAMPLES]
    query = tiny.picture("blue") if arguments.image is None else Image(arguments.image)
    # Prompts of other lengths may share the batch: padding is on the left.
    prompts = [
        processor.few_shot(examples, (query, "Output:")),
        processor.few_shot([], (query, "Output:")),
    ]
    batch = processor(prompts)
    output = generate(
        model,
        batch.input_ids,
        videos=batch.media,
        attention_mask=batch.attention_mask,
        max_new_tokens=12,
        num_beams=arguments.beams,
    )
    for shots, text in zip(
        (len(EXAMPLES), 0), processor.batch_decode(output.sequences), strict=True
    ):
        print(f"{shots} shots: {text!r}")

    question = processor([[query, "Question: which colour? Answer:"]])
    options = [
        processor.tokenizer(answer, add_special_tokens=False)["input_ids"] for answer in ANSWERS
    ]
    scores = score(model, question.input_ids, options, videos=question.media)[0]
    for answer, log_likelihood in zip(ANSWERS, scores.tolist(), strict=True):
        print(f"log p({answer}) = {log_likelihood:.2f}")


if __name__ == "__main__":
    main()
