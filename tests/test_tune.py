"""Tuned launch configurations: what kernels read, and how `flamingo-fast tune` finds them."""

import dataclasses
import functools
import inspect
import itertools
import json
import math
import shutil
import subprocess
import sys
import types
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from fresh_venv import ROOT

pytest.importorskip("triton")

from flamingo_fast import cli
from flamingo_fast.kernels import launch, tuned
from flamingo_fast.kernels.latent_config import LatentConfig, backward_config
from flamingo_fast.kernels.launch import INTERPRETER, Target, recording
from flamingo_fast.kernels.one_medium_config import OneMediumConfig, forward_config
from flamingo_fast.ops.dispatch import BackendUnavailableError
from flamingo_fast.profiling import tune, tune_search
from flamingo_fast.profiling.tune_cases import CASES, TINY_CASES, Call, Case
from flamingo_fast.testing.aot import TARGETS
from flamingo_fast.testing.compare import assert_close_to_oracle
from flamingo_fast.testing.kernel_cases import CASES as KERNEL_CASES

pytestmark = pytest.mark.cpu

BF16, CPU = torch.bfloat16, torch.device("cpu")
GPU = Target("sm_90", 132, "GPU of a test")
TEXT, _, _, NORM, _ = TINY_CASES

Entry = dict[str, Any]


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """A folder of tuned files, which the interpreter reads too."""
    monkeypatch.setenv("FLAMINGO_FAST_CACHE", str(tmp_path))
    monkeypatch.setenv("FLAMINGO_FAST_TUNED", "interpreter")
    tuned.forget()
    yield tmp_path
    monkeypatch.undo()
    tuned.forget()


def requests(case: Case, batch: int = 1) -> dict[str, tuned.Request]:
    with tuned.forced() as asked, recording(INTERPRETER):
        tune_search._call(case.make(batch, BF16, CPU))
    return asked


def other_config(request: tuned.Request) -> Any:
    """A valid one that is not the heuristic's, in tiles if it can be."""
    one = tuned.TUNABLES[request.op]
    configs = tune_search.neighbours(one, request.heuristic)
    return next(config for config in configs if one.problem(config, request) is None)


def entry_of(request: tuned.Request, config: Any, **changes: Any) -> Entry:
    entry = {
        "op": request.op,
        "shape": request.shape,
        "dtype": str(request.dtype).removeprefix("torch."),
        "source": tuned.TUNABLES[request.op].source,
        "config": config if isinstance(config, dict | None) else dataclasses.asdict(config),
    }
    return entry | changes


def write(entries: list[Entry], target: Target = INTERPRETER, **changes: Any) -> None:
    content = tuned.header(target) | {"entries": entries} | changes
    tuned.path_of(target).write_text(json.dumps(content))
    tuned.forget()


def launches_of(monkeypatch: pytest.MonkeyPatch, run: Callable[[], Any]) -> list[tuple]:
    """(kernel's name, constants, options) of what is really started."""
    started, stock = [], launch.start

    def start(kernel, grid, arguments, constexprs, options, index):
        started.append((kernel.__name__, constexprs, options))
        stock(kernel, grid, arguments, constexprs, options, index)

    with monkeypatch.context() as patch:
        patch.setattr(launch, "start", start)
        run()
    return started


def test_every_tunable_op_is_tuned_and_timed_by_its_kernel():
    asked = {}
    for case in TINY_CASES:
        asked |= requests(case)
    assert asked.keys() == tune_search.KERNELS.keys() == tuned.TUNABLES.keys()
    assert {op for case in CASES for op in case.ops} == asked.keys()


@pytest.mark.parametrize("case", TINY_CASES, ids=lambda case: case.name)
def test_a_tuned_file_changes_what_is_launched_and_no_result(case, monkeypatch):
    asked = requests(case)
    configs = {op: other_config(request) for op, request in asked.items()}
    call, results = case.make(1, BF16, CPU), []

    def run():
        results.append(tune_search._call(call))

    usual = launches_of(monkeypatch, run)
    write([entry_of(asked[op], config) for op, config in configs.items()])
    started = launches_of(monkeypatch, run)
    for op, config in configs.items():
        kernel = tune_search.KERNELS[op][0]
        before, now = (
            [each[1:] for each in launches if each[0] == kernel] for launches in (usual, started)
        )
        assert len(now) == 1 and now != before, op
        constants, options = now[0]
        assert options["num_warps"] == config.num_warps
        for name in ("BLOCK_M", "BLOCK_N"):
            assert constants.get(name) == getattr(config, name, None), (op, name)
    assert_close_to_oracle(
        results[1], results[0], tune_search._call(call, "reference", torch.float64)
    )


@pytest.mark.parametrize("case", TINY_CASES, ids=lambda case: case.name)
def test_with_a_tuned_file_a_samples_bits_do_not_depend_on_the_batch(case):
    """Nor does the key, of which the first follows."""
    one, three = requests(case), requests(case, 3)
    assert {op: request.shape for op, request in one.items()} == {
        op: request.shape for op, request in three.items()
    }
    write([entry_of(request, other_config(request)) for request in one.values()])
    batch, alone = case.make(3, BF16, CPU), case.make(1, BF16, CPU)
    everything = batch.function(*batch.inputs.values(), impl="triton")
    for sample in range(3):
        inputs = [
            tensor if name in ("gate", "weight", "bias") else tensor.chunk(3)[sample]
            for name, tensor in batch.inputs.items()
        ]
        results = alone.function(*inputs, impl="triton")
        for of_all, of_one in zip(_tuple(everything), _tuple(results), strict=True):
            assert torch.equal(of_all[sample], of_one[0])


def _tuple(results: torch.Tensor | tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    return results if isinstance(results, tuple) else (results,)


ARGUMENTS = (2048, 64, 64, BF16)
HEURISTIC = OneMediumConfig(32, 64, 64, True, 4, 2)
TUNED = dataclasses.replace(HEURISTIC, num_warps=8, num_stages=3)


def request_for(target: Target = GPU) -> tuned.Request:
    return tuned.TUNABLES["one_medium_fwd"].request((*ARGUMENTS, target))


def chosen(target: Target = GPU) -> OneMediumConfig:
    return forward_config(*ARGUMENTS, target)


def count_reads(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    read, stock = [], Path.read_text
    monkeypatch.setattr(
        Path,
        "read_text",
        lambda path, **options: (
            read.append(path) if path.name.startswith("tuned-") else None,
            stock(path, **options),
        )[1],
    )
    return read


def test_the_key_is_shape_dtype_and_device():
    assert chosen() == HEURISTIC
    write([entry_of(request_for(), TUNED)], GPU)
    assert chosen() == TUNED
    # As many rows in the sense of the heuristic.
    assert forward_config(25, 64, 64, BF16, GPU) == TUNED
    others = [(24, 64, 64, BF16), (2048, 32, 64, BF16), (2048, 64, 80, BF16)]
    for arguments in (*others, (2048, 64, 64, torch.float16)):
        assert forward_config(*arguments, GPU).num_warps == 4, arguments
    for changes in ({"device": "another"}, {"num_sms": 114}, {"arch": "sm_80"}):
        assert chosen(dataclasses.replace(GPU, **changes)).num_warps == 4


def test_a_file_is_opened_once(monkeypatch):
    read = count_reads(monkeypatch)
    write([entry_of(request_for(), TUNED)], GPU)
    for rows in range(1, 200):
        forward_config(rows, 64, 64, BF16, GPU)
        backward_config(rows, 64, BF16, True, GPU)
    assert read == [tuned.path_of(GPU)]
    # No file is looked for once, too.
    other = dataclasses.replace(GPU, device="without a file")
    for rows in range(1, 200):
        forward_config(rows, 64, 64, BF16, other)
    assert read[1:] == [tuned.path_of(other)]


@pytest.mark.parametrize("target", [GPU, INTERPRETER])
def test_files_can_be_switched_off(target, monkeypatch):
    read = count_reads(monkeypatch)
    write([entry_of(request_for(target), TUNED)], target)
    monkeypatch.setenv("FLAMINGO_FAST_TUNED", "0")
    tuned.forget()
    assert chosen(target).num_warps == 4
    assert read == []


def test_the_interpreter_reads_its_file_only_if_told_to(monkeypatch):
    for target in (GPU, INTERPRETER):
        write([entry_of(request_for(target), TUNED)], target)
    monkeypatch.delenv("FLAMINGO_FAST_TUNED")
    tuned.forget()
    assert chosen(INTERPRETER).num_warps == 4
    assert chosen(GPU) == TUNED


def test_what_is_compiled_for_another_gpu_has_the_heuristics():
    write([entry_of(request_for(), TUNED)], GPU)
    assert chosen() == TUNED
    assert chosen(Target(GPU.arch, GPU.num_sms)) == HEURISTIC
    with recording(GPU) as launches:
        recorded = launch.target_of(torch.empty(0))
        assert chosen(recorded) == HEURISTIC
        q, kv = torch.empty(1, 2048, 1, 64, dtype=BF16), torch.empty(1, 64, 1, 64, dtype=BF16)
        from flamingo_fast.kernels.one_medium_forward import one_medium_fwd

        items = torch.zeros(1, 4, dtype=torch.int32)
        one_medium_fwd(q, kv, kv, items, None, None, 1.0, False, "ieee")
    assert launches[0].options["num_warps"] == 4


STALE = {
    "triton": {"triton": "3.0.0"},
    "device": {"device": "another"},
    "arch": {"arch": "sm_80"},
    "num_sms": {"num_sms": 66},
}


@pytest.mark.parametrize("changes", STALE.values(), ids=STALE.keys())
def test_a_file_of_something_else_is_silently_left(changes):
    write([entry_of(request_for(), TUNED)], GPU, **changes)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert chosen() == HEURISTIC
    assert not caught


@pytest.mark.parametrize("entry", [{"source": "0123"}, {"config": None}, {"op": "gone"}])
def test_an_entry_of_other_code_or_without_a_configuration_is_silently_left(entry):
    write([entry_of(request_for(), TUNED) | entry], GPU)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert chosen() == HEURISTIC
    assert not caught


def test_a_gpu_never_uses_the_interpreters_file():
    write([entry_of(request_for(INTERPRETER), TUNED)], INTERPRETER)
    assert chosen(INTERPRETER) == TUNED
    shutil.copy(tuned.path_of(INTERPRETER), tuned.path_of(GPU))
    assert chosen() == HEURISTIC


CORRUPT = {
    "half": ('{"schema": "flamingo_', "Unterminated string"),
    "empty": ("", "Expecting value"),
    "a list": ("[]", "got 'list'"),
    "another schema": ('{"schema": "flamingo_fast.tuned/2"}', r"expected .*tuned/1'.*tuned/2'"),
    "no entries": ({"entries": 1}, "entries: expected a list"),
    "no dtype": ({"entries": [{"op": "x", "shape": {}}]}, "entries: expected a list"),
    "text of a shape": (
        {"entries": [{"op": "", "dtype": "", "source": "", "config": {}, "shape": {"a": "b"}}]},
        "entries: expected a list",
    ),
    "no UTF-8": (b"\xff\xfe", "can't decode"),
}


@pytest.mark.parametrize(("content", "message"), CORRUPT.values(), ids=CORRUPT.keys())
def test_a_corrupt_file_is_warned_of_once(content, message):
    if isinstance(content, dict):
        content = json.dumps(tuned.header(GPU) | content)
    path = tuned.path_of(GPU)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    tuned.forget()
    with pytest.warns(RuntimeWarning, match=message) as caught:
        for rows in (8, 2048):
            assert forward_config(rows, 64, 64, BF16, GPU).num_warps == 4
            backward_config(rows, 64, BF16, True, GPU)
    assert len(caught) == 1
    assert str(path) in str(caught[0].message)


def test_a_file_that_can_not_be_read_is_warned_of():
    tuned.path_of(GPU).mkdir()
    tuned.forget()
    with pytest.warns(RuntimeWarning, match="directory"):
        assert chosen() == HEURISTIC


INVALID = [
    ({"BLOCK_M": 24}, "BLOCK_M: expected a power of two 16 to 32, got 24"),
    ({"BLOCK_M": 64}, "BLOCK_M: expected"),
    ({"BLOCK_M": 8}, "BLOCK_M: expected"),
    ({"BLOCK_M": "32"}, "BLOCK_M: expected"),
    ({"BLOCK_M": True}, "BLOCK_M: expected"),
    ({"BLOCK_M": 32.0}, "BLOCK_M: expected"),
    ({"BLOCK_R": 128}, "BLOCK_R: expected 64, as of the shape; got 128"),
    ({"BLOCK_D": None}, "BLOCK_D: expected 64"),
    ({"TRANSPOSE_DQ": 1}, "TRANSPOSE_DQ: expected True"),
    ({"num_warps": 3}, "num_warps: expected a power of two"),
    ({"num_warps": 32}, "num_warps: expected"),
    ({"num_stages": 0}, "num_stages: expected 1 to 5, got 0"),
    ({"max_registers": 8}, "max_registers: expected null or 24 to 255, got 8"),
    ({"speed": 11}, "unexpected keyword argument 'speed'"),
]


@pytest.mark.parametrize(("changes", "message"), INVALID, ids=lambda value: str(value)[:24])
def test_an_invalid_configuration_is_warned_of_and_not_used(changes, message):
    write([entry_of(request_for(), dataclasses.asdict(TUNED) | changes)], GPU)
    with pytest.warns(RuntimeWarning, match=message):
        assert chosen() == HEURISTIC
    assert chosen() == HEURISTIC


def test_a_configuration_without_a_field_is_not_used():
    write([entry_of(request_for(), {"BLOCK_M": 32})], GPU)
    with pytest.warns(RuntimeWarning, match="missing .* required"):
        assert chosen() == HEURISTIC


def test_configurations_that_are_wrong_for_the_kernel_are_refused():
    one = tuned.TUNABLES["one_medium_fwd"]
    stage = dataclasses.replace(HEURISTIC, num_stages=1)
    assert one.problem(stage, request_for()) == "num_stages: 1 is wrong on sm_90"
    assert one.problem(stage, request_for(Target("sm_80", 108, "A100"))) is None
    one = tuned.TUNABLES["latent_bwd"]
    few_rows = LatentConfig(16, 32, 64, 4, 2)
    request = one.request((64, 64, BF16, True, GPU))
    assert "at least the 64 rows" in one.problem(few_rows, request)
    assert one.problem(few_rows, one.request((64, 64, BF16, False, GPU))) is None


def test_all_heuristics_are_valid_themselves():
    """Else bounds would say what no kernel does."""
    seen = set()
    for arch in TARGETS:
        for case in KERNEL_CASES:
            with tuned.forced() as asked, recording(Target(arch, 100)):
                case.run()
            for op, request in asked.items():
                seen.add((op, arch))
                problem = tuned.TUNABLES[op].problem(request.heuristic, request)
                assert problem is None, (case.name, arch, op, problem)
    assert len(seen) == len(TARGETS) * len(tuned.TUNABLES)


def test_what_a_configuration_was_measured_with_is_all_code_of_the_kernel(tmp_path, monkeypatch):
    copy = tmp_path / "kernels"
    shutil.copytree(Path(tuned.__file__).parent, copy)
    monkeypatch.setattr(tuned, "__file__", str(copy / "tuned.py"))

    def sources() -> list[str]:
        tuned._source.cache_clear()
        return [tuned._source(module) for module in ("norm_backward", "latent_forward")]

    before = sources()
    (copy / "tanh.py").write_text((copy / "tanh.py").read_text() + "\n")
    changed = sources()
    assert changed[0] != before[0] and changed[1] == before[1]
    (copy / "several_media_masks.py").write_text("")
    (copy / "tuned.py").write_text("")
    again = sources()
    monkeypatch.undo()
    tuned._source.cache_clear()
    assert again[0] == changed[0] and again[1] != changed[1]


def test_where_files_are_read_from(monkeypatch, tmp_path):
    assert tuned.folder() == tmp_path
    monkeypatch.delenv("FLAMINGO_FAST_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert tuned.folder() == tmp_path / "xdg" / "flamingo_fast"
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert tuned.folder() == tmp_path / "home" / ".cache" / "flamingo_fast"
    assert tuned.file_name(GPU).startswith("tuned-GPU-of-a-test-triton-")


def test_neighbours_differ_in_one_field_that_may_differ():
    configs = list(tune_search.neighbours(tuned.TUNABLES["one_medium_bwd"], HEURISTIC))
    assert len(set(configs)) == len(configs)
    changed = [
        {name: value for name, value in vars(config).items() if value != getattr(HEURISTIC, name)}
        for config in configs
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


def test_on_a_gpu_the_compiled_kernel_tells_what_it_takes(monkeypatch):
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


def test_run_tuning_is_all_of_it(tmp_path):
    result = tune.run_tuning("cpu", True, tmp_path / "new" / "folder", 0)
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
