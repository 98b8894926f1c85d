"""Checkpoints of a run: complete or not there, whatever happens; any number of ranks."""

import errno
import os
import pickle
import random
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from fresh_venv import ROOT
from rank_cases import met, on_ranks
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from flamingo_fast.models.saving import CheckpointError
from flamingo_fast.training.checkpoints import Checkpoints, SaveError


def state_of(step: int) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(step)
    return {
        "model": {
            "weight": torch.randn(5, 3, generator=generator),
            "gate": torch.randn(1, generator=generator).bfloat16(),
        },
        "updates": torch.tensor(step),
    }


def zeros() -> dict[str, Any]:
    return {
        "model": {"weight": torch.zeros(5, 3), "gate": torch.zeros(1, dtype=torch.bfloat16)},
        "updates": torch.tensor(0),
    }


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_state_and_extra_come_back_and_old_checkpoints_go(tmp_path):
    checkpoints = Checkpoints(tmp_path / "run", keep=2)
    assert checkpoints.latest() is None
    for step in (5, 10, 15):
        path = checkpoints.save(step, state_of(step), {"lanes": {"0": [step, None]}})
        assert checkpoints.latest() == path
    assert names(tmp_path / "run") == ["step-00000010", "step-00000015"]
    for path, step in zip(checkpoints.all(), (10, 15), strict=True):
        state = zeros()
        assert checkpoints.load(state, path) == {"lanes": {"0": [step, None]}}
        torch.testing.assert_close(state, state_of(step), rtol=0, atol=0)
    assert checkpoints.load(zeros()) == {"lanes": {"0": [15, None]}}


def test_parts_of_a_checkpoint_are_read(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    path = checkpoints.save(5, state_of(5), {"lanes": 3})
    assert checkpoints.extra(path) == {"lanes": 3}
    weight = torch.zeros(5, 3)
    with pytest.raises(CheckpointError, match="model.gate"):
        checkpoints.load({"model": {"weight": weight}}, path)
    checkpoints.load({"model": {"weight": weight}}, path, partial=True)
    torch.testing.assert_close(weight, state_of(5)["model"]["weight"], rtol=0, atol=0)
    with pytest.raises(CheckpointError, match="model.bias"):
        checkpoints.load({"model": {"bias": weight}}, path, partial=True)
    with pytest.raises(FileNotFoundError, match="no checkpoint"):
        checkpoints.extra(tmp_path / "absent")


def test_a_step_saved_again_takes_the_first_ones_place(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(5, state_of(1), {"which": "first"})
    checkpoints.save(5, state_of(2), {"which": "second"})
    state = zeros()
    assert checkpoints.load(state) == {"which": "second"}
    torch.testing.assert_close(state, state_of(2), rtol=0, atol=0)
    assert names(tmp_path) == ["step-00000005"]


def test_steps_of_more_digits_than_a_name_are_in_order(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=1)
    checkpoints.save(99_999_999, state_of(1), {})
    assert checkpoints.save(100_000_000, state_of(2), {}) == checkpoints.latest()


# Each file operation of saving steps 2, 2 again and 3, where step 1 is there: the process dies
# before it, then a new one looks. Forks, since importing PyTorch takes seconds.
KILLED = """
import os, signal, sys, torch
from pathlib import Path
sys.path.insert(0, "tests")
from test_checkpoints_training import Checkpoints, names, state_of, zeros

torch.set_num_threads(1)

def save_until_killed(folder, operation, done):
    checkpoints = Checkpoints(folder, keep=1)
    checkpoints.save(1, state_of(1), {"seed": 1})
    os.write(done, bytes([1]))
    left = operation

    def count(event, arguments):
        nonlocal left
        if event == "open" and not str(arguments[0]).startswith(str(folder)):
            return
        if event in ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir"):
            left -= 1
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(count)
    for step, seed in ((2, 2), (2, 3), (3, 4)):
        checkpoints.save(step, state_of(seed), {"seed": seed})
        os.write(done, bytes([seed]))

operation, left_over = 0, set()
while True:
    operation += 1
    folder = Path(sys.argv[1], str(operation))
    read, write = os.pipe()
    if not (child := os.fork()):
        save_until_killed(folder, operation, write)
        os._exit(0)
    os.close(write)
    status = os.waitpid(child, 0)[1]
    last = os.read(read, 100)[-1]
    os.close(read)
    left_over |= {name.partition("step")[0] for name in names(folder)}

    checkpoints = Checkpoints(folder, keep=1)
    state = zeros()
    seed = checkpoints.load(state)["seed"]
    # The one that was being saved may be complete already, but for what `save` does afterwards.
    assert last <= seed <= last + 1, (operation, last, seed)
    torch.testing.assert_close(state, state_of(seed), rtol=0, atol=0)
    checkpoints.save(4, state_of(5), {})
    assert names(folder) == ["step-00000004"], (operation, names(folder))
    if status == 0:
        break
    assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL
print(operation, *sorted(left_over))
"""


@pytest.mark.slow
def test_killed_before_any_file_operation_the_last_complete_one_is_there(tmp_path):
    result = subprocess.run(
        [sys.executable, "-c", KILLED, str(tmp_path)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode == 0, result.stderr
    operations, *left_over = result.stdout.split()
    assert int(operations) > 30
    # It was cut off in all phases.
    assert left_over == [".removing-", ".replaced-", ".saving-"]


def test_clean_removes_what_a_killed_save_left(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, state_of(1), {})
    shutil.copytree(tmp_path / "step-00000001", tmp_path / ".saving-step-00000002")
    shutil.copytree(tmp_path / "step-00000001", tmp_path / ".removing-step-00000000")
    (tmp_path / "metrics.jsonl").write_text("")
    # Reading does not clean: another process may be writing there.
    assert checkpoints.latest() == tmp_path / "step-00000001"
    assert len(names(tmp_path)) == 4
    checkpoints.clean()
    assert names(tmp_path) == ["metrics.jsonl", "step-00000001"]


def _limit_files(size: int) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))


@pytest.fixture
def small_files():
    """Makes the system refuse to write beyond 4 KiB of a file, as a full disk does."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda: _limit_files(4096)
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def _assert_the_first_survives(checkpoints: Checkpoints, reason: str) -> None:
    with pytest.raises(SaveError) as error:
        checkpoints.save(2, state_of(2) | {"large": torch.zeros(200_000)}, {})
    assert str(error.value) == f"can't save step 2 in {checkpoints.folder}: {reason}"
    assert names(checkpoints.folder) == ["step-00000001"]
    state = zeros()
    assert checkpoints.load(state) == {"seed": 1}
    torch.testing.assert_close(state, state_of(1), rtol=0, atol=0)


def test_a_write_that_fails_leaves_the_previous_one(tmp_path, small_files):
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, state_of(1), {"seed": 1})
    small_files()
    _assert_the_first_survives(checkpoints, os.strerror(errno.EFBIG))


def test_a_full_disk_leaves_the_previous_one(tmp_path):
    mount = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=512k", "none", str(tmp_path)], capture_output=True
    )
    if mount.returncode != 0:
        pytest.skip("may not mount a small file system")
    try:
        checkpoints = Checkpoints(tmp_path / "run")
        checkpoints.save(1, state_of(1), {"seed": 1})
        _assert_the_first_survives(checkpoints, os.strerror(errno.ENOSPC))
        checkpoints.save(2, state_of(2), {})
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: state.pop("updates"), "has updates, which are not of this run"),
        (lambda state: state.update(more=torch.zeros(1)), "expected more, which are not in it"),
        (
            lambda state: state.update({str(i): torch.zeros(1) for i in range(6)}),
            "expected 0, 1, 2, 3, 4 and 1 more, which are not in it",
        ),
        (
            lambda state: state["model"].update(weight=torch.zeros(3, 5)),
            r"model.weight: expected \(3, 5\) torch.float32, got \(5, 3\) torch.float32",
        ),
        (
            lambda state: state["model"].update(gate=torch.zeros(1)),
            r"model.gate: expected \(1,\) torch.float32, got \(1,\) torch.bfloat16",
        ),
    ],
)
def test_another_models_checkpoint_is_refused_by_name(change, message, tmp_path):
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, state_of(1), {})
    state = zeros()
    change(state)
    with pytest.raises(CheckpointError, match=message):
        checkpoints.load(state)
    assert not state["model"]["weight"].any()


def _truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:100])


class _RunsCode:
    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return os.system, ("true",)


@pytest.mark.parametrize(
    ("file", "damage"),
    [
        ("extra.json", Path.unlink),
        ("extra.json", _truncate),
        ("extra.json", lambda path: path.write_text("{}")),
        ("state/.metadata", _truncate),
        ("state/.metadata", lambda path: path.write_bytes(pickle.dumps(_RunsCode()))),
        ("state/__0_0.distcp", Path.unlink),
        ("state/__0_0.distcp", _truncate),
    ],
)
def test_a_broken_file_is_one_error_that_names_the_checkpoint(file, damage, tmp_path):
    checkpoints = Checkpoints(tmp_path)
    path = checkpoints.save(1, state_of(1), {"large": "x" * 200})
    damage(path / file)
    with pytest.raises(CheckpointError, match=r"step-00000001: broken checkpoint \(.+\)$"):
        checkpoints.load(zeros())


@pytest.fixture
def little_memory():
    """A broken pickle can ask for a great deal."""
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (used + 2**30, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, before)


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs Linux")
def test_whatever_bytes_are_others_it_is_loaded_or_one_error(tmp_path, little_memory):
    checkpoints = Checkpoints(tmp_path)
    path = checkpoints.save(1, state_of(1), {}) / "state" / ".metadata"
    good, chance = path.read_bytes(), random.Random(0)
    refused = 0
    for _ in range(300):
        data = bytearray(good)
        data[chance.randrange(len(data))] = chance.randrange(256)
        path.write_bytes(data)
        try:
            checkpoints.load(zeros())
        except CheckpointError as error:
            assert str(error).startswith(f"{tmp_path / 'step-00000001'}: ")
            assert "\n" not in str(error)
            refused += 1
    assert 100 < refused < 300


def test_nothing_to_load(tmp_path):
    with pytest.raises(FileNotFoundError, match="no checkpoint in"):
        Checkpoints(tmp_path / "nowhere").load(zeros())
    with pytest.raises(FileNotFoundError, match="no checkpoint .*step-9"):
        Checkpoints(tmp_path).load(zeros(), tmp_path / "step-9")


@pytest.mark.parametrize(
    ("step", "state", "extra", "error", "message"),
    [
        (-1, {}, {}, ValueError, "step: expected at least 0, got -1"),
        (1, {"a": {"b": 3}}, {}, TypeError, "state: a.b: expected a tensor, got int"),
        (
            1,
            {"a": {"b": torch.zeros(1)}, "a.b": torch.zeros(1)},
            {},
            ValueError,
            "expected different names, got a.b twice",
        ),
        (1, {}, {"a": {1, 2}}, TypeError, "set is not JSON serializable"),
    ],
)
def test_what_cannot_be_saved_is_refused(step, state, extra, error, message, tmp_path):
    with pytest.raises(error, match=message):
        Checkpoints(tmp_path).save(step, state, extra)
    assert names(tmp_path) == []


def test_keep_below_one_is_refused(tmp_path):
    with pytest.raises(ValueError, match="keep: expected at least 1, got 0"):
        Checkpoints(tmp_path, keep=0)


def _sharded(value: torch.Tensor, *placements: Any) -> DTensor:
    return distribute_tensor(value, init_device_mesh("cpu", (dist.get_world_size(),)), placements)


def _as_sharded(state: dict[str, Any]) -> dict[str, Any]:
    """The first rank has 3 rows of 5, and all of the gate; the update's number is no DTensor."""
    model = state["model"]
    return {
        "model": {
            "weight": _sharded(model["weight"], Shard(0)),
            "gate": _sharded(model["gate"], Shard(0)),
        },
        "replicated": _sharded(torch.arange(4), Replicate()),
        "updates": state["updates"],
    }


def _save_and_fail(checkpoints: Checkpoints) -> None:
    path = checkpoints.save(1, _as_sharded(state_of(1)), {"rank": dist.get_rank()})
    files = names(path / "state")
    assert {"__0_0.distcp", "__1_0.distcp"} <= set(files)
    # What goes wrong on one rank, here the second one's disk, then its state, is raised on both.
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    if dist.get_rank() == 1:
        _limit_files(4096)
    large = {"large": _sharded(torch.zeros(20_000), Shard(0))}
    with pytest.raises(SaveError, match=os.strerror(errno.EFBIG)):
        checkpoints.save(2, large, {})
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
    with pytest.raises(SaveError, match="can't save step 2"):
        Checkpoints("/dev/null/run").save(2, large, {})
    dist.barrier()
    assert names(checkpoints.folder) == ["step-00000001"]


def _load(checkpoints: Checkpoints) -> None:
    state = _as_sharded(zeros())
    assert checkpoints.load(state) == {"ranks": 1}
    expected = _as_sharded(state_of(2))
    for name in ("weight", "gate"):
        got = state["model"][name]
        assert got.placements == (Shard(0),)
        assert torch.equal(got.full_tensor(), expected["model"][name].full_tensor())
    assert state["updates"] == 2
    dist.barrier()
    if dist.get_rank() == 0:
        (checkpoints.folder / "step-00000002" / "state" / "__0_0.distcp").unlink()
    with pytest.raises(CheckpointError, match=r"broken checkpoint \(No such file"):
        checkpoints.load(_as_sharded(zeros()))


def _worker(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    checkpoints = Checkpoints(folder / "run")
    with met(rank, 2, folder / "first"):
        _save_and_fail(checkpoints)
    if rank == 0:
        state = zeros() | {"replicated": torch.zeros(4, dtype=torch.int64)}
        assert checkpoints.load(state) == {"rank": 0}
        expected = state_of(1) | {"replicated": torch.arange(4)}
        torch.testing.assert_close(state, expected, rtol=0, atol=0)
        checkpoints.save(2, state_of(2) | {"replicated": torch.arange(4)}, {"ranks": 1})
    with met(rank, 2, folder / "second"):
        _load(checkpoints)


def test_two_ranks_save_one_loads_and_saves_two_load(tmp_path):
    on_ranks(2, _worker, tmp_path)
