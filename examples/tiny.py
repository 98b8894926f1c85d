"""What the examples run on if they are given no model: weights of chance, and what fits them."""

import dataclasses

import PIL.Image
import PIL.ImageDraw
import tokenizers
import torch
import transformers

from flamingo_fast.models.config import FlamingoConfig
from flamingo_fast.models.flamingo import Flamingo
from flamingo_fast.models.folder import processor_of
from flamingo_fast.models.processor import FlamingoProcessor
from flamingo_fast.models.saving import from_pretrained


def load(folder: str | None = None) -> tuple[Flamingo, FlamingoProcessor]:
    """The model in a folder of `save_pretrained`, with its tokenizer; by default a tiny one."""
    if folder is not None:
        config, processor = processor_of(folder)
        return from_pretrained(folder, config=config), processor
    torch.manual_seed(0)
    tokenizer = characters()
    config = FlamingoConfig.preset("flamingo-mini")
    lm = dataclasses.replace(config.lm, vocab_size=len(tokenizer))
    config = dataclasses.replace(config, lm=lm)
    return Flamingo(config).eval(), FlamingoProcessor.of(config, tokenizer)


def characters() -> transformers.PreTrainedTokenizerFast:
    """A tokenizer of single characters. <image> and <|endofchunk|> are tokens 3 and 4."""
    special = ["<pad>", "<s>", "<unk>", "<image>", "<|endofchunk|>"]
    tokens = special + [chr(code) for code in range(32, 127)]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    model = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<unk>"))
    model.pre_tokenizer = tokenizers.pre_tokenizers.Split(tokenizers.Regex("."), "isolated")
    model.decoder = tokenizers.decoders.Fuse()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=model, pad_token="<pad>", unk_token="<unk>"
    )


def picture(color: str, position: int = 20) -> PIL.Image.Image:
    """A square on white, at that distance from the left."""
    image = PIL.Image.new("RGB", (96, 64), "white")
    PIL.ImageDraw.Draw(image).rectangle((position, 20, position + 24, 44), color)
    return image
