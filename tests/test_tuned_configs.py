"""Tuned launch configurations as kernels read them."""

import dataclasses
import json
import shutil
import warnings
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

from tuned_cases import (
    BF16,
    CPU,
    GPU,
    entry_of,
    launches_of,
    other_config,
    requests,
    tuned_folder,
    write,
)

from flamingo_fast.kernels import launch, tuned
from flamingo_fast.kernels.attention_config import AttentionConfig
from flamingo_fast.kernels.latent_config import backward_config
from flamingo_fast.kernels.launch import INTERPRETER, Target, recording
from flamingo_fast.kernels.one_medium_config import OneMediumConfig, forward_config
from flamingo_fast.profiling import tune_search
from flamingo_fast.profiling.tune_cases import CASES, TINY_CASES
from flamingo_fast.testing.aot import TARGETS
from flamingo_fast.testing.compare import assert_close_to_oracle
from flamingo_fast.testing.kernel_cases import CASES as KERNEL_CASES

pytestmark = pytest.mark.cpu


@pytest.fixture(autouse=True)
def cache(tmp_path):
    with tuned_folder(tmp_path) as folder:
        yield folder


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
    few_rows = AttentionConfig(16, 32, 64, 4, 2)
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
