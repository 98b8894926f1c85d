"""Patches a model of transformers in place, and compares its outputs and times before and after.

    python examples/patch_a_model.py                           # an IDEFICS of random weights
    python examples/patch_a_model.py --images 16 --tokens 2048

Times alternate between the model with and without the patch; their medians are shown.
"""

import argparse
import contextlib
import statistics
import time
from collections.abc import Callable

import torch
from transformers import IdeficsConfig, IdeficsForVisionText2Text

import flamingo_fast


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--images", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=256, help="of the prompt")
    parser.add_argument("--new-tokens", type=int, default=4, help="generated after it")
    parser.add_argument("--rounds", type=int, default=3, help="times that each is measured")
    arguments = parser.parse_args()

    torch.manual_seed(0)
    model = idefics()
    inputs = prompt(model.config, arguments.images, arguments.tokens)

    def logits() -> torch.Tensor:
        with torch.no_grad():
            return model(**inputs).logits

    def train() -> None:
        logits, ids = model(**inputs).logits, inputs["input_ids"]
        torch.nn.functional.cross_entropy(logits[0, :-1], ids[0, 1:]).backward()
        model.zero_grad()

    def generate() -> torch.Tensor:
        return model.generate(
            **inputs,
            do_sample=False,
            min_new_tokens=arguments.new_tokens,
            max_new_tokens=arguments.new_tokens,
        )

    logits_before, tokens_before = logits(), generate()
    with flamingo_fast.patched(model) as report:  # or flamingo_fast.patch(model), to stay
        print(report, "\n")
        difference = (logits() - logits_before).abs().max() / logits_before.abs().max()
        print(f"logits differ by {difference:.1e} of the largest")
        print("the same tokens:", torch.equal(generate(), tokens_before))
    print("the same bits afterwards:", torch.equal(logits(), logits_before))

    for name, call in {"forward": logits, "backward too": train, "generate": generate}.items():
        before, after = times(model, call, arguments.rounds)
        print(f"{name:12}  {before:7.1f} ms  patched {after:7.1f} ms  {before / after:.2f} x")


def idefics() -> IdeficsForVisionText2Text:
    config = IdeficsConfig(
        vocab_size=2000,
        hidden_size=256,
        intermediate_size=768,
        num_attention_heads=4,
        num_hidden_layers=4,
        cross_layer_interval=2,
        # Gates of a model that was not trained are closed.
        alpha_initializer="ones",
        use_resampler=True,
        vision_config={
            "embed_dim": 128,
            "intermediate_size": 256,
            "num_attention_heads": 2,
            "num_hidden_layers": 2,
            "image_size": 56,
        },
        perceiver_config={"resampler_depth": 2, "resampler_n_heads": 4},
    )
    return IdeficsForVisionText2Text(config).eval()


def prompt(config: IdeficsConfig, num_images: int, num_tokens: int) -> dict[str, torch.Tensor]:
    """Images at equal distances in the text, of which each token sees the last one before it."""
    size = config.vision_config.image_size
    seen = torch.arange(num_tokens) * num_images // num_tokens
    return {
        "input_ids": torch.randint(3, config.vocab_size, (1, num_tokens)),
        "attention_mask": torch.ones(1, num_tokens, dtype=torch.long),
        "pixel_values": torch.randn(1, num_images, 3, size, size),
        "image_attention_mask": torch.nn.functional.one_hot(seen, num_images)[None],
    }


def times(model: torch.nn.Module, call: Callable, rounds: int) -> tuple[float, float]:
    """Median milliseconds without and with the patch."""
    found: dict[bool, list[float]] = {False: [], True: []}
    # The first round is a warm-up.
    for _ in range(rounds + 1):
        for is_patched, values in found.items():
            with flamingo_fast.patched(model) if is_patched else contextlib.nullcontext():
                start = time.perf_counter()
                call()
                values.append(1e3 * (time.perf_counter() - start))
    return statistics.median(found[False][1:]), statistics.median(found[True][1:])


if __name__ == "__main__":
    main()
