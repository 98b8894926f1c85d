"""How `flamingo-fast tune` finds launch configurations."""

import dataclasses
import functools
import inspect
import itertools
import json
import math
import subprocess
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from fresh_venv import ROOT

pytest.importorskip("triton")

from tuned_cases import (
    BF16,
    CPU,
    GPU,
    NORM,
    TEXT,
    entry_of,
    launches_of,
    other_config,
    requests,
    tuned_folder,
    write,
)

from flamingo_fast import cli
from flamingo_fast.kernels import tuned
from flamingo_fast.kernels.launch import INTERPRETER
from flamingo_fast.kernels.one_medium_config import OneMediumConfig
from flamingo_fast.ops.dispatch import BackendUnavailableError
from flamingo_fast.profiling import tune, tune_search
from flamingo_fast.profiling.tune_cases import TINY_CASES, Call, Case

pytestmark = pytest.mark.cpu


@pytest.fixture(autouse=True)
def cache(tmp_path):
    with tuned_folder(tmp_path) as folder:
        yield folder


def test_neighbours_differ_in_one_field_that_may_differ():
    config = OneMediumConfig(32, 64, 64, True, 4, 2)
    configs = list(tune_search.neighbours(tuned.TUNABLES["one_medium_bwd"], config))
    assert len(set(configs)) == len(configs)
    changed = [
        {name: value for name, value in vars(other).items() if value != getattr(config, name)}
        for other in configs
    ]
    assert changed == [
        {"BLOCK_M": 16},
        {"TRANSPOSE_DQ": False},
        {"num_warps": 2},
        {"num_warps": 8},
        {"num_stages": 1},
        {"num_stages": 3},
    ]


def test_what_no_block_fits_or_spills_is_pruned():
    usual = tune_search.Resources(registers=128, spills=0, shared_bytes=50_000, num_warps=4)
    pruned = functools.partial(tune_search.why_pruned, usual=usual)
    assert pruned(usual, arch="sm_90") is None
    spills = dataclasses.replace(usual, spills=4)
    assert pruned(spills, arch="sm_90") == "spills 4 registers, the heuristic's 0"
    assert tune_search.why_pruned(spills, spills, "sm_90") is None
    large = dataclasses.replace(usual, shared_bytes=200_000)
    assert pruned(large, arch="sm_90") is None
    assert "no block fits" in pruned(large, arch="sm_80")
    assert "no block fits" in pruned(
        dataclasses.replace(usual, registers=255, num_warps=16), arch="sm_90"
    )
    # Of an architecture whose limits nobody wrote down Triton itself raises.
    assert pruned(large, arch="sm_86") is None


class _Compiled:
    """What a JITFunction's warmup returns, of the numbers that a driver tells on loading."""

    def __init__(self, registers: int, spills: int, shared_bytes: int) -> None:
        self.metadata = types.SimpleNamespace(shared=shared_bytes)
        self._loaded = registers, spills

    def _init_handles(self) -> None:
        self.n_regs, self.n_spills = self._loaded


def test_on_a_gpu_the_compiled_kernel_tells_what_it_takes():
    from triton.compiler.compiler import CompiledKernel

    # What tuning takes of Triton that is private.
    code = inspect.getsource(CompiledKernel._init_handles)
    assert "self.n_regs" in code and "self.n_spills" in code

    search = tune_search.CaseSearch(NORM, BF16, CPU, planted(lambda _: 1.0), tune._TINY, math.inf)
    request = search.requests()["norm_fwd"]
    runs = [search._run("norm_fwd", config) for config in (request.heuristic, request.heuristic)]
    search._target = GPU

    def why(*numbers: int) -> str | None:
        for run, compiled in zip(runs, (_Compiled(*numbers), _Compiled(64, 0, 1024)), strict=True):
            kernel = types.SimpleNamespace(warmup=lambda *_, compiled=compiled, **__: compiled)
            run.launches = [dataclasses.replace(run.launches[0], kernel=kernel)]
        return search._why_pruned(*runs)

    assert why(64, 0, 1024) is None
    assert why(64, 8, 1024) == "spills 8 registers, the heuristic's 0"
    assert "no block fits" in why(64, 0, 250_000)


def planted(seconds: Callable[[Any], float]) -> Callable[[Callable[[], Any]], float]:
    """A clock by which a configuration takes what `seconds` says."""

    def sample(call):
        assert isinstance(call, tune_search.Run)
        return seconds(call.config)

    return sample


def tune_norm(seconds: Callable[[Any], float], cases: tuple[Case, ...] = (NORM,), **options: Any):
    options = {"ops": ("norm_fwd",), "quick": True} | options
    return tune.tune("cpu", cases=cases, sampler=planted(seconds), **options)


def test_tuning_ends_with_what_is_faster_and_kernels_use_it(cache, monkeypatch):
    lines = []
    result = tune_norm(
        lambda config: 1.0 if config.BLOCK_M == 64 else 0.5 if config.BLOCK_M == 32 else 2.0,
        progress=lines.append,
    )
    (entry,) = result["entries"]
    assert entry["config"] == entry["best"] == entry["heuristic"] | {"BLOCK_M": 32}
    assert (entry["heuristic_us"], entry["best_us"]) == (1e6, 5e5)
    assert entry["ratio"] == {"p20": 2.0, "p50": 2.0, "p80": 2.0}
    assert entry["is_complete"] and entry["tried"] == 2 and entry["refused"] == []
    assert (result["schema"], result["skipped"]) == (tuned.SCHEMA, [])
    assert result["timed"] == "in Triton's interpreter"
    file = cache / tuned.file_name(INTERPRETER)
    assert result["file"] == str(file)
    assert [path.name for path in cache.iterdir()] == [file.name]
    assert json.loads(file.read_text())["entries"] == result["entries"]
    assert lines == ["norm_fwd, norm, 32: M=32, 2.00 times as fast"]
    call = NORM.make(1, BF16, CPU)
    started = launches_of(monkeypatch, lambda: tune_search._call(call))
    assert started[0][1]["BLOCK_M"] == 32


SLOWER = {
    "all alike": lambda config: 1.0,
    "slower": lambda config: 1.0 if config.BLOCK_M == 64 else 1.5,
    "less than 3 % faster": lambda config: 1.0 if config.BLOCK_M == 64 else 0.975,
}


@pytest.mark.parametrize("seconds", SLOWER.values(), ids=SLOWER.keys())
def test_the_heuristic_stays_where_nothing_is_clearly_faster(seconds, monkeypatch):
    (entry,) = tune_norm(seconds)["entries"]
    assert entry["config"] is None
    assert entry["heuristic_us"] == 1e6
    started = launches_of(monkeypatch, lambda: tune_search._call(NORM.make(1, BF16, CPU)))
    assert started[0][1]["BLOCK_M"] == 64


def test_one_round_of_luck_is_not_enough():
    times = {32: iter([0.5, 0.5, 0.5] + [1.1, 0.9] * 50), 128: iter([2.0] * 100)}
    (entry,) = tune_norm(lambda config: next(times.get(config.BLOCK_M, iter([1.0]))))["entries"]
    assert entry["config"] is None


def test_faster_in_the_middle_but_not_in_four_of_five_rounds_is_not_enough():
    timing = tune_search.Timing(1.0, 0.9, tune_search.Quantiles(1.1, 1.02, 1.2, 15))
    assert not timing.is_faster
    quantiles = dataclasses.replace(timing.ratio, p20=1.031)
    assert dataclasses.replace(timing, ratio=quantiles).is_faster


def test_the_search_goes_on_from_the_best(monkeypatch):
    monkeypatch.setattr(tune, "_TINY", dataclasses.replace(tune._FULL, seconds=0.0, rounds=2))
    (entry,) = tune_norm(lambda config: config.BLOCK_M + config.num_warps)["entries"]
    # Three steps of one field, of which one is the best of each.
    assert entry["config"] == entry["heuristic"] | {"BLOCK_M": 8}
    assert (entry["heuristic_us"], entry["best_us"]) == (68e6, 12e6)


def spoilt(spoil: Callable[[torch.Tensor], torch.Tensor]) -> Case:
    """The norm's case, its results spoilt under any configuration but the heuristic's."""

    def make(batch: int, dtype: torch.dtype, device: torch.device) -> Call:
        call = NORM.make(batch, dtype, device)

        def function(*inputs, impl):
            residual, normed = call.function(*inputs, impl=impl)
            configs = tuned._forced.values() if impl == "triton" else ()
            return residual, spoil(normed) if any(x.BLOCK_M != 64 for x in configs) else normed

        return dataclasses.replace(call, function=function)

    return dataclasses.replace(NORM, make=make)


def _raise(normed: torch.Tensor) -> torch.Tensor:
    raise RuntimeError("out of something\nand more")


_NOISE = itertools.cycle([0, 0, 2**-7])
REFUSED = {
    "wrong": (lambda normed: normed * 1.01, "not close to the oracle: normed: max error"),
    "not finite": (lambda normed: normed * float("nan"), "NOT FINITE"),
    # Of a candidate's three calls the first is recorded, the others are its results.
    "never the same": (
        lambda normed: normed + normed * next(_NOISE),
        "two results: normed",
    ),
    "raises": (_raise, "RuntimeError: out of something"),
}


@pytest.mark.parametrize(("spoil", "why"), REFUSED.values(), ids=REFUSED.keys())
def test_what_is_wrong_is_refused_however_fast(spoil, why):
    result = tune_norm(lambda config: config.BLOCK_M / 64, cases=(spoilt(spoil),))
    (entry,) = result["entries"]
    assert entry["config"] is None
    assert entry["best"] == entry["heuristic"]
    assert len(entry["refused"]) == entry["tried"] == 2
    assert all(why in refused["why"] for refused in entry["refused"])


def test_a_case_that_fails_is_skipped_alone():
    def make(*arguments: Any) -> Call:
        raise torch.cuda.OutOfMemoryError("no memory")

    broken = dataclasses.replace(NORM, name="broken", make=make)
    result = tune_norm(lambda config: 1.0, cases=(broken, NORM))
    assert result["skipped"] == [
        {
            "op": "norm_fwd",
            "case": "broken",
            "dtype": "bfloat16",
            "reason": "OutOfMemoryError: no memory",
        }
    ]
    assert [entry["case"] for entry in result["entries"]] == ["norm, 32"]


def test_without_a_budget_all_is_skipped_and_the_file_is_valid():
    result = tune_norm(lambda config: 1.0, budget_s=0, ops=())
    assert result["entries"] == []
    assert [one["reason"] for one in result["skipped"]] == ["the budget ended"] * 2
    content = json.loads(Path(result["file"]).read_text())
    assert tuned.entries_of(json.dumps(content), INTERPRETER) == []


@pytest.mark.parametrize("samples", [1, 5, 11])
def test_a_budget_that_ends_in_between_leaves_what_is_sure(samples, monkeypatch):
    """After the heuristic alone, within the candidates, and before the last measurement."""
    clock = [0.0]
    monkeypatch.setattr(tune_search.time, "monotonic", lambda: clock[0])

    def seconds(config):
        clock[0] += 1
        return config.BLOCK_M / 64

    result = tune_norm(seconds, budget_s=samples, ops=("norm",))
    entry = result["entries"][0]
    assert entry["op"] == "norm_fwd"
    assert entry["config"] is None and not entry["is_complete"]
    assert entry["best"] == entry["heuristic"]
    assert [one["op"] for one in result["skipped"]] == ["norm_bwd"]


def test_a_run_keeps_what_others_found(cache):
    other = requests(TEXT)["one_medium_fwd"]
    stale = entry_of(other, other.heuristic, source="old", dtype="float16")
    write([entry_of(other, other_config(other)), stale])
    result = tune_norm(lambda config: config.BLOCK_M / 64)
    assert [entry["op"] for entry in result["entries"]] == ["norm_fwd"]
    entries = json.loads(Path(result["file"]).read_text())["entries"]
    assert [entry["op"] for entry in entries] == ["norm_fwd", "one_medium_fwd"]
    result = tune_norm(lambda config: 1.0)
    entries = json.loads(Path(result["file"]).read_text())["entries"]
    assert [(entry["op"], entry["config"] is None) for entry in entries] == [
        ("norm_fwd", True),
        ("one_medium_fwd", False),
    ]


def test_a_broken_file_is_written_anew(cache):
    (cache / tuned.file_name(INTERPRETER)).write_text("{")
    result = tune_norm(lambda config: 1.0)
    assert json.loads(Path(result["file"]).read_text())["schema"] == tuned.SCHEMA


def test_a_budget_of_nothing_leaves_a_file(tmp_path):
    result = tune.tune("cpu", quick=True, out_dir=tmp_path / "new" / "folder", budget_s=0)
    assert len(result["skipped"]) == sum(len(case.ops) for case in TINY_CASES)
    assert Path(result["file"]).is_file()
    json.dumps(result)


WRONG = [
    (("foo",), {"quick": True}, ValueError, "device: expected a GPU or cpu, got 'foo'"),
    (("meta",), {"quick": True}, ValueError, "device: expected a GPU or cpu, got 'meta'"),
    (("cpu",), {}, ValueError, "device: cpu: expected quick"),
    (("cpu",), {"quick": True, "budget_s": -1}, ValueError, "budget: expected"),
    (("cpu",), {"quick": True, "budget_s": float("nan")}, ValueError, "budget: expected"),
    (("cpu",), {"quick": True, "ops": ("norm_fwd", "fwd")}, ValueError, "op: expected .*'fwd'"),
    (("cuda",), {}, BackendUnavailableError, "no GPU here"),
]


@pytest.mark.parametrize(("arguments", "options", "error", "message"), WRONG)
def test_wrong_arguments(arguments, options, error, message, monkeypatch, cache):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(error, match=message):
        tune.tune(*arguments, **options)
    assert not list(cache.iterdir())


def test_a_gpu_is_not_tuned_by_the_interpreter(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(ValueError, match="there are 1 GPUs, got 'cuda:1'"):
        tune.tune("cuda:1")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(BackendUnavailableError, match="TRITON_INTERPRET=1"):
        tune.tune("cuda")
    monkeypatch.delenv("TRITON_INTERPRET")
    with pytest.raises(BackendUnavailableError, match="need a GPU"):
        tune.tune("cpu", quick=True)


def run_command(monkeypatch: pytest.MonkeyPatch, *options: str) -> int:
    monkeypatch.setattr(sys, "argv", ["flamingo-fast", "tune", *options])
    with pytest.raises(SystemExit) as exit:
        cli.main()
    return exit.value.code or 0


def test_the_command_prints_a_table(tmp_path, monkeypatch, capsys):
    out = tmp_path / "out"
    options = ("--device", "cpu", "--quick", "--op", "norm_b", "--op", "norm_fwd")
    assert run_command(monkeypatch, *options, "--out", str(out)) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == [*"kernel shape dtype heuristic us best us ratio used".split()]
    assert [line.split()[0] for line in lines[1:3]] == ["norm_fwd", "norm_bwd"]
    assert lines[-2:] == [
        "Times are the interpreter's; no GPU reads this file.",
        str(out / tuned.file_name(INTERPRETER)),
    ]


@pytest.mark.parametrize("options", [("--op", "x"), ("--budget", "-1"), ("--device", "gpu")])
def test_users_mistakes_are_bad_usage(options, monkeypatch, capsys):
    assert run_command(monkeypatch, "--quick", "--device", "cpu", *options) == 2
    assert "Traceback" not in capsys.readouterr().err


def test_a_folder_that_can_not_be_is_one_line(tmp_path, monkeypatch, capsys):
    (tmp_path / "file").write_text("")
    out = str(tmp_path / "file" / "folder")
    assert run_command(monkeypatch, "--quick", "--device", "cpu", "--out", out) == 1
    error = capsys.readouterr().err
    assert error.startswith("flamingo-fast: ") and error.count("\n") == 1


def test_it_runs_uninstalled_with_torch_triton_and_numpy_alone(tmp_path):
    """In a process of its own, which chooses the interpreter itself."""
    blocked = ("typer", "rich", "jinja2", "matplotlib", "pytest", "transformers", "nvtx")
    options = ["--device", "cpu", "--quick", "--op", "norm_f", "--out", str(tmp_path)]
    program = (
        "import os, sys; os.environ.pop('TRITON_INTERPRET', None)\n"
        f"sys.modules.update(dict.fromkeys({blocked!r}))\n"
        "from flamingo_fast.profiling.tune import main\n"
        f"sys.exit(main({options!r}))"
    )
    result = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert result.returncode == 0, result.stderr
    assert "norm_fwd" in result.stdout
    (file,) = tmp_path.iterdir()
    assert json.loads(file.read_text())["entries"][0]["op"] == "norm_fwd"
