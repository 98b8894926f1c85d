"""What the benchmark's tests share."""

import csv
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from typer.testing import CliRunner, Result

from flamingo_fast.bench import plan
from flamingo_fast.bench.registry import Benchmark, Case
from flamingo_fast.cli import app

CPU = torch.device("cpu")
ATTENTION = plan.BENCHMARKS["masked_cross_attention"]


def small_shape(op: Benchmark) -> tuple[int, ...]:
    if op.name == "PerceiverResampler":
        # 64 rows: PyTorch adds up bf16 gradients of LayerNorm in bf16.
        return (1, 1, 2, 5, 64, 1)
    return {
        2: (16, 64),
        5: (5, 64, 2, 16, 8),
        6: (2, 300, 3, 2, 16, 8),
        7: (3, 6, 20, 4, 2, 16, 9),
        8: (2, 300, 3, 4, 2, 16, 2, 8),
    }[len(op.dims)]


def bench(*args: str) -> Result:
    # Wide enough for paths to stay on one line.
    return CliRunner().invoke(app, ["bench", *args], env={"COLUMNS": "400"})


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


# Attention


def attention_provider(name: str, case: Case, mode: str) -> Callable[..., Any]:
    return next(p for p in case.benchmark.providers if p.name == name).build(case, mode)
