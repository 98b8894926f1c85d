"""Tiny runs: a tokenizer of words, shards of pictures with captions and of pages, a config."""

import contextlib
import io
import json
import multiprocessing
import os
import random
import signal
import tarfile
from pathlib import Path
from typing import Any
from unittest import mock

import PIL.Image
import torch
import transformers
import yaml
from rank_cases import free_port
from tokenizer_cases import word_tokenizer

from flamingo_fast.models.fields import from_dict
from flamingo_fast.training import checkpoints, trainer
from flamingo_fast.training.config import TrainConfig
from flamingo_fast.training.run_folder import Lock
from flamingo_fast.training.step import TrainStep

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
    return word_tokenizer(WORDS)


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


def make_data(folder: Path, *, pairs: int = 30, bad: int = 0) -> None:
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
    for index in range(12):
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


# Of a process that has imported what takes seconds: a run starts at once.
_PROCESSES = multiprocessing.get_context("forkserver")
_PROCESSES.set_forkserver_preload(
    [
        "flamingo_fast.training.trainer",
        *("timm.data", "timm.models.vision_transformer", "safetensors.torch", "webdataset"),
        *("transformers.cache_utils", "transformers.models.auto", "tokenizers", "yaml"),
        *("transformers.tokenization_utils_tokenizers", "transformers.utils", "PIL.Image"),
        *("torch.distributed.fsdp", "torch._dynamo"),
    ]
)


def start(values: dict[str, Any], *, ranks: int = 1, kill: str = "") -> list[Any]:
    """Processes that train, as torchrun starts them.

    Arguments:
        kill: where they kill themselves by SIGKILL, see `_killing`.
    """
    port = free_port()
    processes = [
        _PROCESSES.Process(target=_train, args=(rank, ranks, port, values, kill))
        for rank in range(ranks)
    ]
    for process in processes:
        process.start()
    return processes


def finish(processes: list[Any]) -> list[int]:
    """Their exit codes."""
    for process in processes:
        process.join(120)
    codes = [process.exitcode for process in processes]
    for process in processes:
        process.kill()
    return codes


def hold(folder: Path) -> Any:
    """A process that has the folder's lock until it is killed."""
    mine, theirs = _PROCESSES.Pipe()
    process = _PROCESSES.Process(target=_hold, args=(folder, theirs))
    process.start()
    mine.recv()
    return process


def _hold(folder: Path, ready: Any) -> None:
    lock = Lock(folder)
    ready.send(None)
    signal.pause()
    del lock


def _train(rank: int, ranks: int, port: int, values: dict[str, Any], kill: str) -> None:
    torch.set_num_threads(1)
    # Of what starts a process its processes start others, too: it would import all anew.
    multiprocessing.set_start_method("fork", force=True)
    if ranks > 1:
        os.environ |= {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(ranks),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
        }
    config = from_dict(TrainConfig, values, "")
    with _killing(kill) if kill else contextlib.nullcontext():
        trainer.train(config)


def _killing(where: str) -> Any:
    """Kills the process in the 5th step, or in the save after the 6th."""

    def dies_if(is_time: Any, original: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            if is_time(*args):
                os.kill(os.getpid(), signal.SIGKILL)
            return original(*args, **kwargs)

        return call

    targets: dict[str, tuple[Any, str, Any]] = {
        # Gradients are there, weights are as they were.
        "before the update": (TrainStep, "_update", lambda step, *_: step.steps == 5),
        # Nothing of it is on the disk; all of it is, but under another name.
        "before tensors": (
            checkpoints,
            "_dcp_save",
            lambda _, folder: folder.parent.name == ".saving-step-00000006",
        ),
        "before the rename": (
            checkpoints,
            "_sync",
            lambda folder: folder.name == ".saving-step-00000006",
        ),
    }
    owner, name, is_time = targets[where]
    return mock.patch.object(owner, name, dies_if(is_time, getattr(owner, name)))
