"""Gives a language model of Hugging Face eyes, trains what is new in it, and saves the result.

    python examples/wrap_an_lm.py                              # a tiny GPT-2 of random weights
    python examples/wrap_an_lm.py --lm gpt2 --out flamingo-gpt2  # from the hub

The language model stays frozen and keeps its state-dict keys. For real use: more pictures, and a
larger vision encoder with its weights, VisionConfig("clip_vit_l14", 224, is_pretrained=True).
"""

import argparse
import tempfile

import tiny
import torch
import transformers

from flamingo_fast.models.config import (
    ConditioningConfig,
    FlamingoConfig,
    LanguageModelConfig,
    ResamplerConfig,
    VisionConfig,
)
from flamingo_fast.models.flamingo import Flamingo
from flamingo_fast.models.processor import FlamingoProcessor
from flamingo_fast.models.saving import save_pretrained

IMAGE, EOC = "<image>", "<|endofchunk|>"
COLORS = ("red", "green", "blue")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--lm", help="a folder, or a name on the hub")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--out", help="folder for the model; by default one that is deleted again")
    arguments = parser.parse_args()

    torch.manual_seed(0)
    lang_model, tokenizer = language_model(arguments.lm)
    model, processor = wrap(lang_model, tokenizer)
    trainable = [each for each in model.parameters() if each.requires_grad]
    total = sum(each.numel() for each in model.parameters())
    print(f"{sum(each.numel() for each in trainable):,} of {total:,} parameters are trained")

    train(model, processor, trainable, arguments.steps)
    gates = [block.attn_gate.tanh().item() for block in model.conditioning.blocks]
    print("tanh(attn_gate) of each block:", " ".join(f"{gate:+.3f}" for gate in gates))

    with tempfile.TemporaryDirectory() as temporary:
        out = arguments.out or temporary
        save_pretrained(model, out)
        tokenizer.save_pretrained(out)
        again, _ = tiny.load(out)
    assert again.config.learnt_token_ids == model.config.learnt_token_ids
    if arguments.out:
        print(f"saved: flamingo-fast generate --model {out} --image FILE --prompt 'a '")


def language_model(
    name: str | None,
) -> tuple[torch.nn.Module, transformers.PreTrainedTokenizerBase]:
    if name is not None:
        tokenizer = transformers.AutoTokenizer.from_pretrained(name)
        return transformers.AutoModelForCausalLM.from_pretrained(name), tokenizer
    tokenizer = tiny.characters()
    config = transformers.GPT2Config(
        vocab_size=len(tokenizer), n_embd=64, n_layer=3, n_head=4, bos_token_id=1, eos_token_id=1
    )
    return transformers.GPT2LMHeadModel(config), tokenizer


def wrap(
    lang_model: torch.nn.Module, tokenizer: transformers.PreTrainedTokenizerBase
) -> tuple[Flamingo, FlamingoProcessor]:
    # Those that it has already stay as they are.
    tokenizer.add_tokens([EOC, IMAGE], special_tokens=True)
    eoc_id, image_id = tokenizer.convert_tokens_to_ids([EOC, IMAGE])
    config = FlamingoConfig(
        vision=VisionConfig("vit_mini", image_size=56),
        resampler=ResamplerConfig(dim=64, depth=2, heads=4, dim_head=16, num_latents=8),
        conditioning=ConditioningConfig(every=1, heads=4, dim_head=16),
        lm=LanguageModelConfig(kind="huggingface"),
        image_token_id=image_id,
        eoc_token_id=eoc_id,
        # Learnt beside the frozen embedding, whether it has a row for them or not.
        learnt_token_ids=(eoc_id, image_id),
    )
    return Flamingo(config, lang_model=lang_model), FlamingoProcessor.of(config, tokenizer)


def train(
    model: Flamingo, processor: FlamingoProcessor, trainable: list[torch.Tensor], steps: int
) -> None:
    prompts = [[tiny.picture(color), f"a {color} square{EOC}"] for color in COLORS]
    batch = processor(prompts, padding_side="right")
    ignored = (batch.attention_mask == 0) | (batch.input_ids == processor.image_token_id)
    labels = batch.input_ids.masked_fill(ignored, -100)
    optimizer = torch.optim.AdamW(trainable, lr=3e-3)
    model.train()
    for step in range(steps):
        output = model(
            batch.input_ids, videos=batch.media, attention_mask=batch.attention_mask, labels=labels
        )
        optimizer.zero_grad()
        output.loss.backward()
        torch.nn.utils.clip_grad_norm_(trainable, 1.0)
        optimizer.step()
        if step in (0, steps - 1):
            print(f"step {step}: loss {output.loss.item():.3f}")
    model.eval()


if __name__ == "__main__":
    main()
