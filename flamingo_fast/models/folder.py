"""A folder with a model and its tokenizer, as what turns prompts into batches and text."""

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from flamingo_fast.models.config import FlamingoConfig
from flamingo_fast.models.extras import require
from flamingo_fast.models.processor import FlamingoProcessor, Image, Part
from flamingo_fast.models.saving import read_config

_IMAGE_TOKEN = "<image>"
_EOC_TOKEN = "<|endofchunk|>"


def processor_of(folder: str | os.PathLike[str]) -> tuple[FlamingoConfig, FlamingoProcessor]:
    """The config of a folder that `save_pretrained` wrote, and a processor with its tokenizer.

    The tokenizer is what its own `save_pretrained` wrote into the same folder. `<image>` and
    `<EOC>` are whatever it calls the config's tokens, or if it lacks them "<image>" and
    "<|endofchunk|>", OpenFlamingo's.

    Raises:
        FileNotFoundError: no such folder, or no config.json in it.
        ConfigError: config.json is none, or the tokenizer has other ids for its tokens.
        ValueError: no tokenizer that transformers can load.
        ImportError: an extra that is not installed.
    """
    folder = Path(folder)
    config = read_config(folder)
    tokenizer = _tokenizer_of(folder)
    return config, FlamingoProcessor.of(
        config,
        tokenizer,
        image_token=_name_of(tokenizer, config.image_token_id, _IMAGE_TOKEN),
        eoc_token=_name_of(tokenizer, config.eoc_token_id, _EOC_TOKEN),
    )


def prompt_parts(
    text: str, images: Sequence[str | os.PathLike[str]], image_token: str = _IMAGE_TOKEN
) -> list[Part]:
    """Parts of a prompt, for the processor: text with an image in place of each `image_token`.

    Of text without any the images come first.

    Raises:
        ValueError: another number of image tokens than of images.
    """
    pieces = re.split(f"({re.escape(image_token)})", text)
    places = pieces.count(image_token)
    parts: list[Part] = [Image(each) for each in images]
    if places == 0:
        return [*parts, text]
    if places != len(images):
        raise ValueError(
            f"prompt: expected {image_token} once for each of {len(images)} images, or nowhere; "
            f"got it {places} times"
        )
    media = iter(parts)
    return [next(media) if piece == image_token else piece for piece in pieces if piece]


def _tokenizer_of(folder: Path) -> Any:
    # transformers would look for one by the language model's name, or ask a hub.
    if not any(folder.glob("tokenizer*")):
        raise ValueError(
            f"{folder}: expected a tokenizer beside the model; save it there by "
            "tokenizer.save_pretrained"
        )
    try:
        return require("transformers").AutoTokenizer.from_pretrained(folder, local_files_only=True)
    # Of broken files it raises all kinds.
    except Exception as error:
        raise ValueError(f"{folder}: its tokenizer can't be loaded: {error}") from error


def _name_of(tokenizer: Any, token_id: int | None, default: str) -> str:
    if token_id is None or token_id >= len(tokenizer):
        return default
    return str(tokenizer.convert_ids_to_tokens(token_id))
