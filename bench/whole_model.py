"""A whole model with random weights on this machine: how long it takes, and how much memory."""

import dataclasses
import resource
import time
from collections.abc import Callable
from typing import Any

import torch

from flamingo_fast.bench.tables import Table
from flamingo_fast.models.config import FlamingoConfig
from flamingo_fast.models.flamingo import Flamingo
from flamingo_fast.models.generation import generate

_NEW_TOKENS = 8
_TEXT = 32


@dataclasses.dataclass(frozen=True)
class Step:
    """Seconds of a step, and the most memory that the process had until its end, in bytes."""

    name: str
    seconds: float
    peak_bytes: int


def run(preset: str, dtype: torch.dtype, device: torch.device) -> list[Step]:
    """Builds the model, and runs a forward and a generation of 8 tokens: one image, 32 tokens."""
    steps: list[Step] = []

    def timed(name: str, call: Callable[[], Any]) -> Any:
        start = time.perf_counter()
        result = call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        steps.append(Step(name, time.perf_counter() - start, _peak_bytes(device)))
        return result

    config = FlamingoConfig.preset(preset)
    model = timed("build", lambda: Flamingo(config, device=device, dtype=dtype).eval())
    size = config.vision.image_size
    image = torch.zeros(1, 1, 3, size, size, device=device)
    generator = torch.Generator().manual_seed(0)
    # Ids 10 and up are no special tokens.
    ids = torch.randint(10, config.lm.vocab_size, (1, _TEXT), generator=generator).to(device)
    ids[0, 0] = config.image_token_id

    def forward() -> Any:
        with torch.no_grad():
            return model(ids, image)

    timed("forward", forward)
    timed(
        f"generate {_NEW_TOKENS} tokens",
        lambda: generate(model, ids, image, max_new_tokens=_NEW_TOKENS, stop_token_ids=()),
    )
    return steps


def table(preset: str, dtype: torch.dtype, steps: list[Step]) -> Table:
    """A row for each step."""
    name = str(dtype).removeprefix("torch.")
    rows = [[each.name, f"{each.seconds:.2f}", f"{each.peak_bytes / 1e9:.1f}"] for each in steps]
    return Table(f"{preset}, {name}", ("step", "seconds", "peak memory, GB"), rows, 1)


def _peak_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
