"""Small datasets, a tokenizer and streams of them, for tests of training data."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import PIL.Image
import tokenizer_cases
import tokenizers
import torch
import transformers
from shard_cases import encoded, write_tar

from flamingo_fast.models.config import FlamingoConfig, VisionConfig
from flamingo_fast.training.batch import Batch
from flamingo_fast.training.config import DatasetConfig, TrainConfig
from flamingo_fast.training.stream import Stream, make_stream

WORDS = ["[PAD]", "[BOS]", "[UNK]", *(f"w{i}" for i in range(50))]
EOC, IMAGE = len(WORDS), len(WORDS) + 1
MODEL = FlamingoConfig(
    vision=VisionConfig(encoder="vit_mini", image_size=28), image_token_id=IMAGE, eoc_token_id=EOC
)


def word_tokenizer(bos: bool = False) -> transformers.PreTrainedTokenizerFast:
    """Ids are places in `WORDS`; with `bos` it puts a [BOS] before every text."""
    tokenizer = tokenizer_cases.word_tokenizer(WORDS, bos_token="[BOS]")
    if bos:
        tokenizer.backend_tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
            single="[BOS] $A", special_tokens=[("[BOS]", WORDS.index("[BOS]"))]
        )
    return tokenizer


def words(ids: Sequence[int]) -> str:
    """Words of captions by their numbers: word i is `w{i}`, its id is i + 3."""
    return " ".join(f"w{each}" for each in ids)


def plain_image(value: int) -> bytes:
    """A PNG of one colour."""
    return encoded(PIL.Image.new("RGB", (6, 4), (value, 0, 255 - value)), "PNG")


def colour(image: PIL.Image.Image) -> torch.Tensor:
    """A transform for tests: the mean colour from 0 to 255, as an image of one pixel."""
    return torch.from_numpy(np.asarray(image, dtype=np.float32).mean((0, 1)))[:, None, None]


def pairs(lengths: Sequence[int]) -> list[tuple[str, dict[str, bytes]]]:
    """Pair i has a caption of lengths[i] times the word i % 50, and an image of red i % 256."""
    return [
        (f"{i:05d}", {"png": plain_image(i % 256), "txt": words([i % 50] * length).encode()})
        for i, length in enumerate(lengths)
    ]


def write_pairs(folder: Path, lengths: Sequence[int]) -> str:
    """Three shards of `pairs`; returns the pattern of their paths."""
    records = pairs(lengths)
    size = -(-len(records) // 3)
    for i in range(3):
        write_tar(folder / f"pairs-{i}.tar", records[i * size : (i + 1) * size])
    return str(folder / "pairs-*.tar")


def dataset(shards: str, **options: object) -> DatasetConfig:
    fields = {"name": "pairs", "kind": "image_text", "batch_size": 4, "max_tokens": 16}
    return DatasetConfig(shards=(shards,), **{**fields, "space_probability": 0.0, **options})


def stream(
    config: DatasetConfig,
    *,
    num_workers: int = 0,
    seed: int = 0,
    model: FlamingoConfig = MODEL,
    tokenizer: object = None,
    image_transform: object = colour,
    **options: object,
) -> Stream:
    train = TrainConfig(
        model="none",
        tokenizer="none",
        datasets=(config,),
        steps=1,
        out="none",
        seed=seed,
        num_workers=num_workers,
    )
    tokenizer = word_tokenizer() if tokenizer is None else tokenizer
    return make_stream(config, train, model, tokenizer, image_transform=image_transform, **options)


def assert_same(batch: Batch, expected: Batch) -> None:
    for field in dataclasses.fields(Batch):
        got, wanted = getattr(batch, field.name), getattr(expected, field.name)
        if isinstance(wanted, torch.Tensor):
            assert torch.equal(got, wanted), field.name
        elif isinstance(wanted, list) and wanted and isinstance(wanted[0], torch.Tensor):
            assert len(got) == len(wanted) and all(map(torch.equal, got, wanted)), field.name
        else:
            assert got == wanted, field.name
