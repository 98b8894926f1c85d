"""Tiny runs: a tokenizer of words, shards of pictures with captions and of pages, a config."""

import io
import json
import os
import random
import signal
import socket
import subprocess
import sys
import tarfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import PIL.Image
import tokenizers
import transformers
import yaml
from fresh_venv import ROOT

COLORS = ["red", "green", "blue", "white", "black", "yellow"]
WORDS = ["<pad>", "<s>", "<unk>", "<image>", "<EOC>", "a", "picture", "of", "then", *COLORS]

# Frozen language model and vision encoder, as the paper has them.
MODEL: dict[str, Any] = {
    "vision": {"encoder": "vit_mini", "image_size": 28},
    "resampler": {"dim": 16, "depth": 1, "heads": 2, "dim_head": 8, "num_latents": 4},
    "conditioning": {"heads": 2, "dim_head": 8},
    "lm": {"vocab_size": len(WORDS), "dim": 32, "depth": 2, "heads": 2, "dim_head": 16},
    "learnt_token_ids": [4],
}


def tokenizer() -> transformers.PreTrainedTokenizerFast:
    vocabulary = {word: index for index, word in enumerate(WORDS)}
    model = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<unk>"))
    model.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=model, pad_token="<pad>", unk_token="<unk>"
    )


def png(color: str) -> bytes:
    data = io.BytesIO()
    PIL.Image.new("RGB", (30, 20), color).save(data, "PNG")
    return data.getvalue()


def write_tar(path: Path, members: list[tuple[str, bytes]]) -> None:
    with tarfile.open(path, "w") as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


def make_data(folder: Path, *, pairs: int = 30, pages: int = 12, bad: int = 0) -> None:
    """A tokenizer, pairs.tar, of which the last `bad` have no text, and pages.tar."""
    tokenizer().save_pretrained(folder / "tokenizer")
    chosen = random.Random(0)
    members = []
    for index in range(pairs):
        color = chosen.choice(COLORS)
        members.append((f"{index:04}.png", png(color)))
        if index < pairs - bad:
            text = " ".join(["a picture of", *[color] * chosen.randint(1, 4)])
            members.append((f"{index:04}.txt", text.encode()))
    write_tar(folder / "pairs.tar", members)
    members = []
    for index in range(pages):
        colors = chosen.choices(COLORS, k=chosen.randint(0, 3))
        images: list[str | None] = [None]
        texts: list[str | None] = ["a"]
        for place, color in enumerate(colors):
            members.append((f"{index:04}.{place}.png", png(color)))
            images += [f"{place}.png", None]
            texts += [None, f"then {color}"]
        page = json.dumps({"images": images, "texts": texts})
        members.append((f"{index:04}.json", page.encode()))
    write_tar(folder / "pages.tar", members)


def config(data: Path, out: Path, **changes: Any) -> dict[str, Any]:
    """Of a run on them, as YAML has it."""
    return {
        "model": MODEL,
        "tokenizer": str(data / "tokenizer"),
        "datasets": [
            {
                "name": "pages",
                "kind": "interleaved",
                "shards": [str(data / "pages.tar")],
                "batch_size": 2,
                "max_tokens": 16,
            },
            {
                "name": "pairs",
                "kind": "image_text",
                "shards": [str(data / "pairs.tar")],
                "batch_size": 4,
                "max_tokens": 16,
                "weight": 0.2,
                "pack": True,
                "augment": True,
            },
        ],
        "steps": 6,
        "out": str(out),
        "optimizer": {"lr": 3e-3, "warmup_steps": 2},
        "precision": "fp32",
        "log_every": 2,
        "checkpoint_every": 2,
        "device": "cpu",
        **changes,
    }


def write_config(path: Path, values: dict[str, Any]) -> Path:
    path.write_text(yaml.safe_dump(values))
    return path


def metrics(out: Path) -> list[dict[str, Any]]:
    """Lines of a run's metrics without what differs from run to run."""
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name != "speed"} for line in lines]
