"""`flamingo-fast accept`: stages that fail in every way, its files, and that nothing is needed."""

import importlib
import json
import os
import subprocess
import sys
import time
import types
from pathlib import Path

import pytest
import torch
from fresh_venv import ROOT

import flamingo_fast
from flamingo_fast.bench import records
from flamingo_fast.bench.timing import Quantiles
from flamingo_fast.profiling import (
    accept,
    accept_bench,
    accept_graphs,
    accept_results,
    accept_stages,
    tune,
)
from flamingo_fast.profiling.accept_context import Context
from flamingo_fast.profiling.accept_report import page, text_table
from flamingo_fast.profiling.accept_results import Check, Folder, Results, ResultsError, StageResult
from flamingo_fast.profiling.accept_stages import STAGES, Stage
from flamingo_fast.profiling.accept_tools import Skip, judge_sanitizer, session_error
from flamingo_fast.profiling.annotate import nvtx_domain
from flamingo_fast.profiling.processes import run_program

# Imports take seconds of it.
_LIMITS = {"hangs": 15.0}
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def planted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Processes of stages find the planted ones."""
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))


def _stages(*names: str, processes: int = 1) -> list[Stage]:
    return [
        Stage(name, f"{name} <here>", f"accept_planted:{name}", _LIMITS.get(name, 60), processes)
        for name in names
    ]


def _run(out: Path, *names: str, known: list[Stage] | None = None, **options: object) -> int:
    return accept.accept(
        device="cpu",
        quick=True,
        out=out,
        known=known or _stages(*names),
        show=lambda line: None,
        **options,
    )


def _context(folder: Path) -> Context:
    return Context(CPU, True, folder, folder / "events", time.monotonic() + 60)


def _read(out: Path) -> dict[str, StageResult]:
    values = json.loads((out / "results.json").read_text())
    accept_results.validate(values)
    return {each.name: each for each in Results.from_dict(values).stages}


def test_stages_fit_into_25_minutes() -> None:
    assert sum(stage.limit_s for stage in STAGES) < accept_stages.ALL_S == 25 * 60
    assert all(stage.limit_s <= accept_stages.LONGEST_S == 9 * 60 for stage in STAGES)
    assert STAGES[0].name == "doctor" and len({stage.name for stage in STAGES}) == len(STAGES)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("device", accept_graphs.TRAINING)
def test_the_captured_training_learns_at_each_size(device: str, dtype: torch.dtype) -> None:
    pytest.importorskip("transformers")
    dim, steps = accept_graphs.TRAINING[device]
    with flamingo_fast.use_impl("torch"):
        training = accept_graphs.Training(dim, dtype, torch.device("cpu"))
        losses = [training.step()[0].item() for _ in range(steps)]
        training.restart()
        again = [training.step()[0].item() for _ in range(steps)]
    assert losses[-1] < 0.9 * losses[0] and again == losses


def test_stages_are_there() -> None:
    for stage in STAGES:
        module, _, function = stage.target.partition(":")
        assert callable(getattr(__import__(module, fromlist=[function]), function))


_EXPECTED = {
    "passes": ("passed", ""),
    "fails": ("failed", "1 of 3 checks failed"),
    "raises": ("failed", "RuntimeError: in the middle"),
    "hangs": ("failed", "not done within 15 s"),
    "exits": ("failed", "exit code 7"),
    "is_killed": ("failed", "SIGKILL"),
    "lacks_a_package": ("skipped", "missing no_such_package"),
    "lacks_ours": ("failed", "missing flamingo_fast.no_such_module"),
    "checks_nothing": ("failed", "nothing was checked"),
}


@pytest.mark.slow
def test_no_stage_stops_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_LAUNCH_BLOCKING", "1")
    out = tmp_path / "out"
    assert _run(out, *_EXPECTED) == 1
    found = _read(out)
    assert list(found) == list(_EXPECTED)
    for name, (status, reason) in _EXPECTED.items():
        assert (found[name].status, reason in found[name].reason) == (status, True), found[name]
    # What was told before the end is kept.
    for name in ("raises", "hangs", "exits"):
        assert [check.name for check in found[name].checks] == ["before"]
    assert found["hangs"].seconds < 25
    wrong = {check.name: check for check in found["fails"].checks}
    assert wrong["wrong"].detail == "ZeroDivisionError: division by zero"
    assert wrong["lacking"].status == "skipped"
    log = (out / "log.txt").read_text()
    assert "accept_planted.py" in log and "time.sleep" not in log
    # Of the hang, where it was.
    assert "in hangs" in log
    assert found["passes"].environment["torch"] == torch.__version__
    assert len(found["passes"].checks) == 5
    assert found["passes"].tables[0].rows == [["shards", "1"]]
    text = text_table(Results.from_dict(json.loads((out / "results.json").read_text())))
    assert "FAILED fails: wrong: ZeroDivisionError" in text
    assert "not exercised, passes: a GPU" in text
    html = (out / "report.html").read_text()
    assert "passes &lt;here&gt;" in html and "<here>" not in html


def test_processes_share_cases(tmp_path: Path) -> None:
    assert _run(tmp_path, known=_stages("shares", processes=2)) == 0
    checks = {check.name: check.detail for check in _read(tmp_path)["shares"].checks}
    count = min(2, os.cpu_count() or 1)
    assert checks == {name: f"{index % count} of {count}" for index, name in enumerate("abc")}


def test_resume_merges(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    known = _stages("exits", "passes", "skips")
    assert _run(tmp_path, known=known, stages=["passes"]) == 0
    first = _read(tmp_path)["passes"]
    with pytest.raises(ValueError, match="--resume adds to them"):
        _run(tmp_path, known=known)
    assert _run(tmp_path, known=known, resume=True) == 1
    found = _read(tmp_path)
    assert list(found) == ["exits", "passes", "skips"]
    assert found["passes"] == first
    # One that is named runs again.
    assert _run(tmp_path, known=known, resume=True, stages=["skips"]) == 1
    assert _read(tmp_path)["skips"].started >= found["skips"].started
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(ValueError, match="resume: .* has results of device cpu"):
        accept.accept(device="cuda", resume=True, out=tmp_path, known=known)


def test_resume_after_a_kill_in_the_middle_of_writing(tmp_path: Path) -> None:
    Folder(tmp_path, resume=False).write(Results("", "cpu", True))
    for name in ("log.txt", "file0.bin"):
        (tmp_path / f"{name}.partial").write_bytes(b"half")
    (tmp_path / "thesis.tex").write_text("x")
    with pytest.raises(ResultsError, match="has thesis.tex$"):
        Folder(tmp_path, resume=True)
    assert (tmp_path / "log.txt.partial").exists()
    (tmp_path / "thesis.tex").unlink()
    Folder(tmp_path, resume=True)
    assert [each.name for each in tmp_path.iterdir()] == ["results.json"]


def test_a_stage_that_was_stopped_runs_again(tmp_path: Path) -> None:
    results = Results("", "cpu", True, [StageResult("passes", "", 60.0, "")])
    Folder(tmp_path, resume=False).write(results)
    assert results.failed
    assert _run(tmp_path, "passes", resume=True) == 0
    assert _read(tmp_path)["passes"].status == "passed"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "expected results of accept"),
        ("[]", "expected an object, got list"),
        ('{"schema": 2}', "schema: expected 1, got 2"),
        ('{"schema": 1}', "missing or unknown: command device quick stages"),
        (
            '{"schema": 1, "command": "", "device": "cpu", "quick": 1, "stages": []}',
            "results.quick: expected bool, got int",
        ),
        (
            '{"schema": 1, "command": "", "device": "tpu", "quick": true, "stages": []}',
            "results.device: expected one of cuda, cpu; got 'tpu'",
        ),
    ],
)
def test_other_results_are_refused(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "results.json").write_text(text)
    with pytest.raises(ResultsError) as error:
        _run(tmp_path, "passes", resume=True)
    assert message in str(error.value) and "resume" in str(error.value)
    assert (tmp_path / "results.json").read_text() == text


def test_schema_1_is_this() -> None:
    assert accept_results.SCHEMA == 1
    stage = accept_results.DESCRIPTION["stages"][0]
    assert list(accept_results.DESCRIPTION) == ["schema", "command", "device", "quick", "stages"]
    assert list(stage) == [
        *("name", "about", "status", "reason", "started", "seconds", "limit_s", "environment"),
        *("checks", "tables", "not_exercised", "files", "left_out"),
    ]
    result = StageResult("a", "b", 1.0, "", checks=[Check("c", "passed")])
    result.table("d", ["e"]).rows.append(["f"])
    values = Results("", "cpu", True, [result]).to_dict()
    accept_results.validate(values)
    assert Results.from_dict(json.loads(json.dumps(values))).to_dict() == values


def test_the_folder_stays_small(tmp_path: Path) -> None:
    assert _run(tmp_path, "leaves_files", "talks") == 0
    found, files = _read(tmp_path), [*tmp_path.iterdir()]
    assert len(files) == accept_results.MAX_FILES
    assert sum(each.stat().st_size for each in files) < accept_results.MAX_BYTES
    assert found["leaves_files"].files == [f"file{number}.bin" for number in (0, 2, 3, 4, 5)]
    reason = found["leaves_files"].reason
    for part in (
        "file1.bin: 64.0 MiB, there is room for 4.0",
        "file6.bin: the folder has 8 files",
        "absent.bin: ",
    ):
        assert part in reason
    assert all(len(check.detail) < 3000 for check in found["talks"].checks)
    log = (tmp_path / "log.txt").read_bytes()
    assert len(log) <= accept_results.MAX_LOG and b"the end of it" in log


def test_a_long_list_of_checks_is_cut(tmp_path: Path) -> None:
    checks = [Check(f"{i}", "failed" if i == 2999 else "passed", "x" * 1999) for i in range(3000)]
    results = Results("", "cpu", True, [StageResult("a", "", 1.0, "", checks=checks)])
    Folder(tmp_path, resume=False).write(results)
    stage = _read(tmp_path)["a"]
    assert (tmp_path / "results.json").stat().st_size <= 3 * 2**20
    assert stage.checks[0].name == "2999" and stage.left_out == 3000 - len(stage.checks) > 0
    assert "checks and rows are left out" in page(results)


def test_other_files_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("x")
    with pytest.raises(ResultsError, match="empty folder or one of accept's.*thesis.tex"):
        _run(tmp_path, "passes")
    assert [each.name for each in tmp_path.iterdir()] == ["thesis.tex"]
    with pytest.raises(ResultsError, match="out: can't write"):
        _run(tmp_path / "thesis.tex", "passes")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"stages": ["nothing"]}, "stage: expected some of passes; got 'nothing'"),
        ({"device": "tpu"}, "device: expected cuda or cpu, got 'tpu'"),
        ({"quick": False}, "expected --quick with cpu"),
        ({"resume": True, "out": None}, "resume: expected --out"),
    ],
)
def test_mistakes(tmp_path: Path, options: dict, message: str) -> None:
    given = {"device": "cpu", "quick": True, "out": tmp_path / "out", **options}
    with pytest.raises(ValueError) as error:
        accept.accept(known=_stages("passes"), **given)
    assert message in str(error.value)
    assert not (tmp_path / "out").exists()


def test_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit:
        accept.main(["--device", "cpu", "--out", str(tmp_path)])
    assert exit.value.code == 2
    assert "expected --quick with cpu" in capsys.readouterr().err


def test_interrupted(tmp_path: Path) -> None:
    """SIGTERM: what was told by then is there, and no process is left."""
    program = f"""
import sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
from pathlib import Path
from flamingo_fast.profiling import accept
from flamingo_fast.profiling.accept_stages import Stage
stage = Stage("hangs", "", "accept_planted:hangs", 60)
sys.exit(accept.accept(device="cpu", quick=True, out=Path({str(tmp_path)!r}), known=[stage]))
"""
    process = subprocess.Popen(
        [sys.executable, "-c", program], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    results = tmp_path / "results.json"
    for _ in range(600):
        if results.exists() and '"before"' in results.read_text():
            break
        time.sleep(0.1)
    process.terminate()
    out, _ = process.communicate(timeout=30)
    assert process.returncode == 1 and "interrupted: --resume goes on" in out
    stage = _read(tmp_path)["hangs"]
    assert (stage.status, stage.reason, len(stage.checks)) == ("running", "interrupted", 1)


@pytest.mark.slow
def test_nothing_need_be_installed(tmp_path: Path) -> None:
    """From a checkout, by Python itself, without what is not PyTorch, Triton or NumPy."""
    pytest.importorskip("triton")
    blocked = (
        *("typer", "rich", "click", "jinja2", "markupsafe", "pytest", "timm", "transformers"),
        *("matplotlib", "nvtx", "torchvision", "yaml", "webdataset", "safetensors"),
    )
    (tmp_path / "sitecustomize.py").write_text(
        f"import sys\nsys.modules.update(dict.fromkeys({blocked!r}))\n"
    )
    out = tmp_path / "out"
    stages = ("doctor", "table3")
    result = subprocess.run(
        [
            *(sys.executable, "-m", "flamingo_fast.profiling.accept", "--device", "cpu", "--quick"),
            *(f"--stage={name}" for name in stages),
            *("--out", str(out)),
        ],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=200,
    )
    found = _read(out)
    assert {name: each.status for name, each in found.items()} == {
        "doctor": "passed",
        "table3": "skipped",
    }, (result.stdout, (out / "log.txt").read_text())
    assert found["table3"].reason.startswith("missing ")
    assert result.returncode == 0
    assert "doctor  passed" in result.stdout


_DONE = '{"kind": "end", "status": "done"}'
_RACES = "RACECHECK SUMMARY: 2 hazards displayed (2 errors, 0 warnings)"


@pytest.mark.parametrize(
    ("code", "output", "told", "expected"),
    [
        (0, "== ERROR SUMMARY: 0 errors", _DONE, "== ERROR SUMMARY: 0 errors"),
        (99, "Invalid __global__ read\nERROR SUMMARY: 3 errors", _DONE, AssertionError),
        (99, f"Race reported\n{_RACES}", _DONE, AssertionError),
        (0, "ERROR SUMMARY: 0 errors", "", AssertionError),
        (1, "ERROR SUMMARY: 0 errors", _DONE, AssertionError),
        (0, "ERROR SUMMARY: 0 errors", '"failed"' + _DONE, AssertionError),
        (0, "", _DONE, AssertionError),
        (1, "Error: Device not supported", "", Skip),
        (99, "Warning: Unable to open x\nERROR SUMMARY: 3 errors", _DONE, AssertionError),
    ],
)
def test_what_compute_sanitizer_says(
    code: int, output: str, told: str, expected: str | type[Exception]
) -> None:
    if isinstance(expected, str):
        assert judge_sanitizer(code, output, told, with_tool=True) == expected
    else:
        with pytest.raises(expected):
            judge_sanitizer(code, output, told, with_tool=True)


def test_a_session_without_nvtx_is_skipped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "nvtx", None)
    with pytest.raises(ImportError) as missing:
        nvtx_domain()
    error = session_error(2, f"profile run: {missing.value}")
    assert type(error) is Skip and "missing nvtx" in str(error)


@pytest.mark.parametrize(
    ("entries", "skipped", "passes"),
    [
        ([{"op": "a"}], [], True),
        ([{"op": "a"}], [tune.BUDGET_ENDED], True),
        ([{"op": "a"}], ["RuntimeError: no"], False),
        ([], [tune.BUDGET_ENDED], False),
    ],
)
def test_what_tuning_has_to_find(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    entries: list[dict],
    skipped: list[str],
    passes: bool,
) -> None:
    def stand_in(device: object, *, out_dir: Path, **options: object) -> dict:
        (out_dir / "tuned-GPU.json").write_text("{}")
        return {"entries": entries, "skipped": [{"op": "b", "reason": each} for each in skipped]}

    monkeypatch.setattr(tune, "tune", stand_in)
    accept_bench.tuning(_context(tmp_path))
    events = [json.loads(line) for line in (tmp_path / "events").read_text().splitlines()]
    (check,) = [each for each in events if each["kind"] == "check"]
    assert (check["status"] == "passed") is passes
    assert [each["name"] for each in events if each["kind"] == "file"] == ["tuned-GPU.json"]


@pytest.mark.parametrize(
    ("failure", "passes"),
    [
        ("squared_relu 8192x4096 bf16 fwd, compile: TypeError: not a, but b", True),
        ("squared_relu 8192x4096 bf16 fwd, ours: RMS error 1", False),
        ("squared_relu 8192x4096 bf16: OutOfMemoryError: 2 GiB, of which 1 is free", False),
    ],
)
def test_ours_has_to_be_measured_in_all_cases(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failure: str, passes: bool
) -> None:
    value = Quantiles(50, 50, 50, 1)
    key = ("squared_relu", "ours", "fwd", "16x64", "bf16", "of_copy_ceiling", "%")
    results = types.SimpleNamespace(
        measurements=[records.Measurement(*key, value)],
        environment=records.environment(CPU),
        failures=[failure],
        is_interrupted=False,
    )
    monkeypatch.setattr(accept_bench.run, "run", lambda *_: results)
    monkeypatch.setattr(accept_bench.report, "tables", lambda _: [])
    arguments = (_context(tmp_path), "squared_relu", None, tmp_path / "results.csv")
    if passes:
        assert "wrong and without numbers: compile" in accept_bench._bench_op(*arguments)
    else:
        with pytest.raises(AssertionError, match=failure):
            accept_bench._bench_op(*arguments)


@pytest.mark.parametrize(
    ("module", "status", "detail"),
    [
        ("flamingo_fast.absent", "failed", "missing flamingo_fast.absent, a part of this project"),
        ("absent.inside", "skipped", "missing absent"),
    ],
)
def test_what_is_ours_must_be_there(tmp_path: Path, module: str, status: str, detail: str) -> None:
    context = _context(tmp_path)
    assert context.attempt("a", lambda: importlib.import_module(module)) == (status == "skipped")
    (check,) = map(json.loads, context.events.read_text().splitlines())
    assert (check["status"], check["detail"]) == (status, detail)


def test_what_takes_too_long_ends_with_all_that_it_started(tmp_path: Path) -> None:
    pid = tmp_path / "pid"
    child = f"import os, time; open({str(pid)!r}, 'w').write(str(os.getpid())); time.sleep(60)"
    parent = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"
    with (tmp_path / "log").open("wb") as log, pytest.raises(TimeoutError, match="within 2 s"):
        run_program([sys.executable, "-c", parent], log, limit_s=2.0)
    status = Path(f"/proc/{pid.read_text()}/stat")
    for _ in range(100):
        # It ends a little later, and stays while nobody asks for its exit code.
        if not status.exists() or status.read_text().rpartition(")")[2].split()[0] == "Z":
            return
        time.sleep(0.1)
    pytest.fail("it still runs")


@pytest.mark.parametrize(
    ("output", "kind", "text"),
    [
        ("ModuleNotFoundError: No module named 'nvtx'", Skip, "missing nvtx"),
        ("No module named 'flamingo_fast.profiling.x'", AssertionError, "exit code 1"),
        ("timm is not installed: pip install", Skip, "missing timm"),
        ("==ERROR== ERR_NVGPUCTRPERM - no\nNo kernels were profiled.", Skip, "ERR_NVGPUCTRPERM"),
        ("==ERROR== ERR_NVGPUCTRPERM - no", Skip, "ERR_NVGPUCTRPERM"),
        ("Segmentation fault", AssertionError, "Segmentation fault"),
    ],
)
def test_why_a_session_failed(output: str, kind: type[Exception], text: str) -> None:
    error = session_error(1, output)
    assert type(error) is kind and text in str(error)
