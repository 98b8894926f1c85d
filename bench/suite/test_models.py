"""Whole models, for `pytest bench/suite --benchmark-only`: training steps of table 3's rows at its
smallest scale, a mini Flamingo's beside OpenFlamingo's classes, and peers' models before and after
`patch`."""

import functools

import pytest
import torch

from flamingo_fast.bench import end_to_end, patching, records
from flamingo_fast.bench.patching_models import PEERS, Sizes
from flamingo_fast.bench.registry import DTYPES
from flamingo_fast.bench.table3_measured import check_rows
from flamingo_fast.bench.table3_scales import SCALES
from flamingo_fast.bench.table3_steps import Step
from flamingo_fast.models.presets import table3_configs

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(scope="module", autouse=True)
def _threads() -> None:
    records.set_threads()


def _synchronized(call):
    def run() -> None:
        call()
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()

    return run


@pytest.mark.parametrize(
    "row", [pytest.param(row, id=f"{row}-micro-fp32") for row in check_rows([])]
)
def test_table3(benchmark, row: str) -> None:
    scale = SCALES["micro"]
    benchmark.group = "table3 micro"
    step = Step(scale.config(table3_configs()[row]), scale, DEVICE)
    benchmark.pedantic(_synchronized(step), rounds=7, warmup_rounds=1)


@pytest.mark.parametrize(
    "provider", [pytest.param(p, id=f"train-{p}-fp32") for p in end_to_end.NAMES]
)
def test_mini_flamingo(benchmark, provider: str) -> None:
    try:
        calls, wrong = end_to_end.train_calls(end_to_end.SIZES, end_to_end.TRAIN, DEVICE)
    except ImportError as error:
        pytest.skip(str(error))
    assert not wrong
    benchmark.group = "mini Flamingo, training step"
    benchmark.pedantic(_synchronized(calls[provider]), rounds=7, warmup_rounds=1)


@functools.lru_cache(maxsize=1)
def _calls(peer: str, case: str, dtype: str):
    found = next(each for each in PEERS[peer].cases if each.name == case)
    return patching.calls(PEERS[peer], found, Sizes(), DTYPES[dtype], DEVICE)


@pytest.mark.parametrize(
    ("peer", "case", "dtype", "provider"),
    [
        pytest.param(
            peer.name, case.name, dtype, name, id=f"{peer.name}.{case.name}-{dtype}-{name}"
        )
        for peer in PEERS.values()
        for case in peer.cases
        for dtype in ("fp32", "bf16")
        for name in ("unpatched", "patched")
    ],
)
def test_patch(benchmark, peer: str, case: str, dtype: str, provider: str) -> None:
    try:
        calls, wrong = _calls(peer, case, dtype)
    except ImportError as error:
        pytest.skip(str(error))
    assert not wrong
    benchmark.group = f"{peer}.{case} {dtype}"
    benchmark.pedantic(_synchronized(calls[provider]), rounds=5, warmup_rounds=1)
