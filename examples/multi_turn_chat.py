"""A conversation about pictures that come one by one: nothing is computed twice.

    python examples/multi_turn_chat.py                         # a tiny model of random weights
    python examples/multi_turn_chat.py --model FOLDER

The cache has keys and values of all text and of all pictures so far, so that each turn costs what
is new in it. The tiny model is untrained: what it says makes no sense.
"""

import argparse

import tiny

from flamingo_fast.models.cache import FlamingoCache
from flamingo_fast.models.generation import generate

TURNS = [
    [tiny.picture("red"), "User: what is this? Bot:"],
    ["User: is it round? Bot:"],
    [tiny.picture("blue"), "User: and this? ", tiny.picture("green"), "Or this? Bot:"],
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", help="a folder that save_pretrained wrote")
    arguments = parser.parse_args()
    model, processor = tiny.load(arguments.model)

    cache: FlamingoCache | None = None
    for parts in TURNS:
        batch = processor([parts])
        output = generate(
            model,
            batch.input_ids,
            videos=batch.media,
            attention_mask=batch.attention_mask,
            max_new_tokens=12,
            # What is said is shown as it is made; a row's last tokens may be padding.
            streamer=lambda tokens: print(processor.decode(tokens), end="", flush=True),
            cache=cache,
        )
        cache = output.cache
        new = f"{batch.input_ids.shape[1]} new tokens and {batch.num_media[0]} new pictures"
        print(f"\n  [{new}; the cache has {cache.seqlen} and {cache.num_media[0]}]")


if __name__ == "__main__":
    main()
