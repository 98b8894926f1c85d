"""Runs that are killed or stopped go on as if they had not been."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

for _name in ("timm", "transformers", "safetensors", "webdataset", "yaml"):
    pytest.importorskip(_name)

from fresh_venv import ROOT  # noqa: E402
from run_cases import (  # noqa: E402
    config,
    finish,
    make_data,
    metrics,
    start,
    write_config,
)
from safetensors.torch import load_file  # noqa: E402

STEPS = 8
# Of resuming on another number of ranks, and of all that adds in another order.
ROUNDING = {"rtol": 1e-4, "atol": 1e-5}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    make_data(folder)
    return folder


def run_of(data: Path, out: Path, **changes: Any) -> dict[str, Any]:
    """Lines of metrics and checkpoints don't coincide."""
    return config(data, out, **{"steps": STEPS, "log_every": 2, "checkpoint_every": 3, **changes})


def streams(out: Path) -> dict[str, Any]:
    """Where the last checkpoint's streams are: which samples come next, what became of others."""
    last = sorted((out / "checkpoints").iterdir())[-1]
    return json.loads((last / "extra.json").read_text())["extra"]["streams"]


def weights(out: Path) -> dict[str, torch.Tensor]:
    return load_file(out / "model" / "model.safetensors")


def assert_same(out: Path, expected: Path, **tolerance: float) -> None:
    tolerance = tolerance or {"rtol": 0, "atol": 0}
    assert streams(out) == streams(expected)
    torch.testing.assert_close(weights(out), weights(expected), **tolerance)
    lines, others = metrics(out), metrics(expected)
    if not any(tolerance.values()):
        assert lines == others
    for line, other in zip(lines, others, strict=True):
        for name in ("loss", "grad_norm"):
            torch.testing.assert_close(line.pop(name), other.pop(name), **tolerance)
        assert line == other


@pytest.fixture(scope="module")
def whole(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of one process that nothing happened to."""
    out = tmp_path_factory.mktemp("whole")
    assert finish(start(run_of(data, out))) == [0]
    return out


@pytest.fixture(scope="module")
def whole_of_two(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same on two ranks."""
    out = tmp_path_factory.mktemp("two")
    assert finish(start(run_of(data, out), ranks=2)) == [0, 0]
    return out


@pytest.mark.parametrize("kill", ["before the update", "before tensors", "before the rename"])
def test_killed_it_goes_on_as_if_it_had_not_been(data: Path, whole: Path, tmp_path: Path, kill):
    assert finish(start(run_of(data, tmp_path), kill=kill)) == [-signal.SIGKILL]
    assert sorted(each.name for each in (tmp_path / "checkpoints").glob("step-*")) == [
        "step-00000003"
    ]
    # A line that a write was cut off in.
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "lo')
    assert finish(start(run_of(data, tmp_path))) == [0]
    assert_same(tmp_path, whole)


@pytest.mark.slow
@pytest.mark.parametrize("kill", ["before the update", "before the rename"])
def test_killed_on_two_ranks_it_goes_on(
    data: Path, whole_of_two: Path, tmp_path: Path, kill: str
) -> None:
    # The other rank may notice before it kills itself.
    assert finish(start(run_of(data, tmp_path), ranks=2, kill=kill))[0] == -signal.SIGKILL
    assert finish(start(run_of(data, tmp_path), ranks=2)) == [0, 0]
    assert_same(tmp_path, whole_of_two)


@pytest.mark.slow
def test_another_number_of_ranks_goes_on(
    data: Path, whole: Path, whole_of_two: Path, tmp_path: Path
) -> None:
    """One rank, then two, then one: the same samples, and losses but for rounding."""
    assert_same(whole_of_two, whole, **ROUNDING)
    for steps, ranks in ((3, 1), (6, 2), (STEPS, 1)):
        run = run_of(data, tmp_path, steps=steps, log_every=1)
        assert finish(start(run, ranks=ranks)) == [0] * ranks
    assert streams(tmp_path) == streams(whole)
    torch.testing.assert_close(weights(tmp_path), weights(whole), **ROUNDING)


@pytest.mark.slow
def test_bf16_and_reading_processes_go_on_too(data: Path, tmp_path: Path) -> None:
    outs = [tmp_path / "whole", tmp_path / "killed"]
    options = {"precision": "bf16", "num_workers": 1, "optimisation": "round_robin"}
    assert finish(start(run_of(data, outs[0], **options))) == [0]
    killed = start(run_of(data, outs[1], **options), kill="before the update")
    assert finish(killed) == [-signal.SIGKILL]
    # How many processes read changes nothing.
    assert finish(start(run_of(data, outs[1], **options | {"num_workers": 2}))) == [0]
    assert_same(outs[1], outs[0])
    assert {each.dtype for each in weights(outs[1]).values()} == {torch.bfloat16}


def wait_for(path: Path) -> None:
    deadline = time.monotonic() + 120
    while not (path.exists() and path.stat().st_size):
        assert time.monotonic() < deadline, f"{path} did not come"
        time.sleep(0.1)


def test_a_signal_on_one_rank_stops_both_after_the_same_step(data: Path, tmp_path: Path) -> None:
    run = run_of(data, tmp_path, steps=10_000, log_every=1, checkpoint_every=0)
    processes = start(run, ranks=2)
    wait_for(tmp_path / "metrics.jsonl")
    os.kill(processes[1].pid, signal.SIGTERM)
    assert finish(processes) == [0, 0]
    last = metrics(tmp_path)[-1]["step"]
    assert [each.name for each in (tmp_path / "checkpoints").glob("*")] == [f"step-{last:08}"]
    assert not (tmp_path / "model").exists()


@pytest.mark.slow
def test_torchrun_trains_stops_by_sigterm_and_goes_on(
    data: Path, whole_of_two: Path, tmp_path: Path
) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2"]
    command += ["--standalone", "-m", "flamingo_fast.cli", "train"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    out = tmp_path / "out"
    run = run_of(data, out, checkpoint_every=0, steps=10_000)
    path = write_config(tmp_path / "config.yaml", run)
    process = subprocess.Popen([*command, path], env=environment, cwd=tmp_path)
    try:
        wait_for(out / "metrics.jsonl")
        process.send_signal(signal.SIGTERM)
        process.wait(120)
    finally:
        process.kill()
    (checkpoint,) = (out / "checkpoints").glob("*")
    last = int(checkpoint.name.removeprefix("step-"))
    assert finish(start(run | {"steps": last + 2}, ranks=2)) == [0, 0]
    assert metrics(out)[-1]["step"] == last + 2
    common = min(len(metrics(out)), STEPS // 2)
    assert metrics(out)[: common - 1] == metrics(whole_of_two)[: common - 1]
