"""Patches a model of transformers in place, and compares its outputs and times before and after.

    python examples/patch_a_model.py                           # an IDEFICS of random weights
    python examples/patch_a_model.py --images 16 --tokens 2048
    python examples/patch_a_model.py --family open_flamingo    # needs it: open-flamingo==2.0.1
    python examples/patch_a_model.py --plot layout.png         # which token attends to which image

Times alternate between the model with and without the patch; their medians are shown.
"""

import argparse
import contextlib
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from transformers import IdeficsConfig, IdeficsForVisionText2Text, LlamaConfig, LlamaForCausalLM

import flamingo_fast
from flamingo_fast.testing import peers

VOCAB, IMAGE, EOC, WIDTH, IMAGE_SIZE = 2000, 3, 4, 256, 56


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--family", choices=("idefics", "open_flamingo"), default="idefics")
    parser.add_argument("--images", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=256, help="of the prompt")
    parser.add_argument("--new-tokens", type=int, default=4, help="generated after it")
    parser.add_argument("--rounds", type=int, default=3, help="times that each is measured")
    parser.add_argument("--plot", type=Path, help="file of a picture; needs matplotlib")
    arguments = parser.parse_args()

    torch.manual_seed(0)
    # Images at equal distances in the text, of which each token sees the last one before it.
    seen = torch.arange(arguments.tokens) * arguments.images // arguments.tokens
    ids = torch.randint(EOC + 1, VOCAB, (1, arguments.tokens))
    pixels = torch.randn(1, arguments.images, 3, IMAGE_SIZE, IMAGE_SIZE)
    mask = torch.nn.functional.one_hot(seen, arguments.images)[None]
    if arguments.plot is not None:
        layout = flamingo_fast.MediaLayout.from_media_mask(mask, max_media_per_token=1)
        layout.plot().figure.savefig(arguments.plot)
    if arguments.family == "idefics":
        model = idefics()
        inputs = {"input_ids": ids, "pixel_values": pixels, "image_attention_mask": mask}
    else:
        model = open_flamingo()
        ids[0, seen.diff(prepend=torch.tensor([-1])) > 0] = IMAGE
        inputs = {"lang_x": ids, "vision_x": pixels[:, :, None]}
    inputs["attention_mask"] = torch.ones_like(ids)
    if arguments.family == "open_flamingo":
        # transformers 5 leaves out a mask of ones, and OpenFlamingo asks for one.
        inputs["attention_mask"][0, 0] = 0

    def logits() -> torch.Tensor:
        with torch.no_grad():
            return model(**inputs).logits

    def train() -> None:
        logits = model(**inputs).logits
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
        vocab_size=VOCAB,
        hidden_size=WIDTH,
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
            "image_size": IMAGE_SIZE,
        },
        perceiver_config={"resampler_depth": 2, "resampler_n_heads": 4},
    )
    return IdeficsForVisionText2Text(config).eval()


class Patches(torch.nn.Module):
    """In place of OpenCLIP's encoder: (pooled, tokens)."""

    def __init__(self) -> None:
        super().__init__()
        self.convolution = torch.nn.Conv2d(3, 128, 14, 14)

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        tokens = self.convolution(images).flatten(2).mT
        return tokens.mean(1), tokens


def open_flamingo() -> torch.nn.Module:
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=WIDTH,
        intermediate_size=768,
        num_attention_heads=4,
        num_hidden_layers=4,
    )
    model = peers.open_flamingo_model(
        Patches(),
        LlamaForCausalLM(config),
        "model.layers",
        vis_dim=128,
        eoc_token_id=EOC,
        media_token_id=IMAGE,
        cross_attn_every_n_layers=2,
    )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("gate"):
                parameter.fill_(1.0)
    return model.eval()


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
