"""`flamingo-fast profile run`: what is started for each tool, and sessions of torch.profiler."""

import json
import os
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

for _name in ("timm", "transformers"):
    pytest.importorskip(_name)

from fresh_venv import ROOT  # noqa: E402

from flamingo_fast import cli  # noqa: E402
from flamingo_fast.bench import patching, patching_models  # noqa: E402
from flamingo_fast.patching.state import is_patched  # noqa: E402
from flamingo_fast.profiling import run as profile_run  # noqa: E402
from flamingo_fast.profiling import session, targets  # noqa: E402

OP = "squared_relu:64x64:fp32:fwd"

# A tool that writes down how it was called, and then runs what it was given, as they all do.
FAKE = """#!{python}
import json, os, subprocess, sys
names = ("PYTHONPATH", "NSYS_NVTX_PROFILER_REGISTER_ONLY")
called = {{"arguments": sys.argv[1:], **{{name: os.environ.get(name) for name in names}}}}
open({file!r}, "w").write(json.dumps(called))
report = next((each for each in sys.argv if each.startswith("--output=")), None)
if report and not os.environ.get("WRITES_NOTHING"):
    open(report.partition("=")[2] + ".qdstrm", "w").write("recorded")
start = next(i for i, each in enumerate(sys.argv) if os.path.basename(each).startswith("python"))
sys.exit(subprocess.call(sys.argv[start:]))
"""


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Callable[[], Any]]:
    """Puts a tool in place; returns what reads how it was called."""

    def make(tool: str) -> Callable[[], Any]:
        file, program = tmp_path / "called.json", tmp_path / tool
        program.write_text(FAKE.format(python=sys.executable, file=str(file)))
        program.chmod(program.stat().st_mode | stat.S_IXUSR)
        monkeypatch.setenv(f"FLAMINGO_FAST_{tool.upper()}", str(program))
        return lambda: json.loads(file.read_text())

    return make


def _command(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["flamingo-fast", "profile", "run", *arguments])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    return int(ended.value.code or 0)


def test_torch_on_an_op(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    arguments = (OP, "--tool", "torch", "--out", str(out), "--device", "cpu", "--steps", "2")
    assert _command(monkeypatch, *arguments) == 0
    assert f"flamingo-fast profile report {out}" in capsys.readouterr().out
    found = json.loads((out / "session.json").read_text())
    assert found["schema"] == session.SCHEMA and found["target"] == OP and found["tool"] == "torch"
    assert found["device"] == "cpu" and len(found["step_s"]) == 2 and found["ceilings"] is None
    (kernel,) = found["work"]
    # 64 x 64 numbers of 4 bytes are read, and as many written.
    assert kernel["bytes"] == 2 * 64 * 64 * 4 and kernel["calls"] == 1

    from flamingo_fast.profiling.profile_report import report

    assert any(each.tables for each in report([out]).sections)


@pytest.mark.parametrize("by_script", [False, True])
def test_nsys_is_started_so(
    fake: Any, by_script: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("nvtx")
    called, out = fake("nsys"), tmp_path / "out"
    if by_script:
        script = [str(ROOT / "profiling" / "nsys.sh"), str(out), OP, "--device", "cpu"]
        values = {**os.environ, "PYTHON": sys.executable, "NSYS_TRACE": "nvtx,osrt"}
        subprocess.run(script, check=True, env=values, timeout=120)
    else:
        arguments = (OP, "--tool", "nsys", "--out", str(out), "--device", "cpu")
        assert _command(monkeypatch, *arguments) == 0
    found = called()
    tool, *rest = found["arguments"]
    assert tool == "profile" and found["NSYS_NVTX_PROFILER_REGISTER_ONLY"] == "0"
    flags = rest[: next(i for i, each in enumerate(rest) if "python" in os.path.basename(each))]
    assert set(flags) == {
        "--trace=nvtx,osrt",
        "--sample=none",
        "--cpuctxsw=none",
        "--capture-range=nvtx",
        "--nvtx-capture=capture@flamingo_fast",
        "--capture-range-end=stop",
        "--force-overwrite=true",
        f"--output={out / 'report'}",
    }
    assert json.loads((out / "session.json").read_text())["tool"] == "nsys"


def test_on_a_gpu_nsys_also_traces_that(tmp_path: Path) -> None:
    flags = profile_run.tool_command("nsys", "nsys", tmp_path, on_gpu=True)
    assert "--trace=cuda,nvtx,osrt,cudnn,cublas" in flags


@pytest.mark.parametrize("by_script", [False, True])
def test_ncu_is_started_so(fake: Any, by_script: bool, tmp_path: Path) -> None:
    """The tool's part; its session is that of a CPU here."""
    called, out = fake("ncu"), tmp_path / "out"
    if by_script:
        script = [str(ROOT / "profiling" / "ncu.sh"), str(out), OP, "--device", "cpu"]
        script += ["--steps", "2"]
        values = {
            **os.environ,
            "PYTHON": sys.executable,
            "NCU_ARGS": "--kernel-name regex:relu --launch-count 6",
        }
        subprocess.run(script, check=True, env=values, timeout=120)
        arguments = called()["arguments"]
        assert len(json.loads((out / "session.json").read_text())["step_s"]) == 2
    else:
        program = profile_run.find_tool("ncu")
        command = profile_run.tool_command(
            "ncu", program, out, on_gpu=True, kernel="relu", launches=6
        )
        arguments = command[1:]
    line = " ".join(arguments)
    for flags in (
        "--nvtx --nvtx-include flamingo_fast@capture",
        "--set full --import-source yes --clock-control base",
        "--kernel-name regex:relu",
        "--launch-count 6",
        f"--export {out / 'report'}",
    ):
        assert flags in line, flags


@pytest.mark.parametrize(
    "arguments, what",
    [
        (("nothing",), "expected train[:SCALE]"),
        (("train:huge",), "expected a scale of full, half, mini, micro; got 'huge'"),
        (("train:micro:fp32",), "expected nothing after the scale, got 'fp32'"),
        (("table3",), "expected table3:ROW[:SCALE]"),
        (("table3:row_99",), "expected a row of baseline"),
        (("squared_relu:3x3x3",), "squared_relu"),
        (("squared_relu:3x3:fp64",), "expected a dtype of fp32, bf16, fp16; got 'fp64'"),
        (("squared_relu:3x3:fp32:bwd",), "expected a mode of fwd, fwd_bwd; got 'bwd'"),
        (("open_flamingo.nothing",), "unknown family"),
        (("open_flamingo.train:half",), "expected a version of patched, unpatched; got 'half'"),
        ((OP, "--tool", "vtune"), "expected one of nsys, ncu, torch; got 'vtune'"),
        ((OP, "--device", "foo"), "device: expected cpu or cuda, got 'foo'"),
        ((OP, "--device", "meta"), "device: expected cpu or cuda, got 'meta'"),
        ((OP, "--device", "cuda"), "device: torch sees no GPU; expected cpu"),
        ((OP, "--tool", "ncu", "--device", "cpu"), "ncu measures kernels of a GPU"),
        ((OP, "--tool", "nsys"), "nsys is not in $PATH"),
    ],
)
def test_mistakes(
    arguments: tuple[str, ...],
    what: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    monkeypatch.delenv("FLAMINGO_FAST_NSYS", raising=False)
    monkeypatch.setenv("COLUMNS", "400")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert _command(monkeypatch, *arguments, "--out", str(tmp_path / "out")) == 2
    said = " ".join(capsys.readouterr().err.replace("│", " ").split())
    assert what in said and "Traceback" not in said
    assert not (tmp_path / "out").exists()


def test_a_target_that_fails_says_so(
    fake: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fake("nsys")
    pytest.importorskip("nvtx")
    monkeypatch.setenv("COLUMNS", "400")
    out = tmp_path / "out"
    # Three heads of keys for four of queries.
    target = "latent_attention:1x4x8x4x3x16x8:fp32"
    arguments = (target, "--tool", "nsys", "--out", str(out), "--device", "cpu")
    assert _command(monkeypatch, *arguments) == 1
    said = capsys.readouterr().err
    assert f"see {out / 'log.txt'}" in said and "exit code 1: ValueError" in said


def test_a_session_of_no_device_is_a_mistake(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        session.main([OP, "--device", "foo", "--out", str(tmp_path / "out")])
    assert ended.value.code == 2 and not (tmp_path / "out").exists()
    assert "device: expected cpu or cuda, got 'foo'" in capsys.readouterr().err


def test_a_tool_that_records_nothing_is_a_failure(
    fake: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("nvtx")
    fake("nsys")
    monkeypatch.setenv("WRITES_NOTHING", "1")
    with pytest.raises(
        profile_run.FailedSessionError, match="nsys wrote no report.nsys-rep or report"
    ):
        profile_run.run(OP, tool="nsys", out=tmp_path, device="cpu", steps=1, warmup=0)


def test_it_ends_after_its_time(tmp_path: Path) -> None:
    with pytest.raises(profile_run.FailedSessionError, match="torch: not done within 0 s"):
        profile_run.run(OP, tool="torch", out=tmp_path, device="cpu", timeout_s=0.05)


def test_what_is_left_out_of_a_name() -> None:
    build = targets.build_target
    cpu = torch.device("cpu")
    op = build("squared_relu", cpu)
    assert op.name.startswith("squared_relu:") and op.name.endswith(":fp32:fwd_bwd")
    assert op.model is None and op.case is not None
    step = build("table3:every_4th:micro", cpu)
    assert step.name == "table3:every_4th:micro" and step.model is not None
    decode = build("decode:micro", cpu)
    generated: Any = decode.step()
    assert decode.name == "decode:micro" and generated.sequences.shape == (1, 8)


def test_a_peers_model() -> None:
    for options in ("", ":unpatched", ":patched:bf16"):
        targets.check_target(f"open_flamingo.prefill_16{options}")
    cpu, sizes = torch.device("cpu"), patching_models.Sizes(hidden=64, layers=2, heads=2, shrink=32)
    ((peer, (case,)),) = patching_models.selected(("open_flamingo.prefill_16",), quick=False)
    case = case.shrunk(sizes)
    found = []
    for patched in (False, True):
        model, step = patching.one_call(peer, case, sizes, torch.float32, cpu, patched=patched)
        assert any(map(is_patched, model.modules())) is patched
        found.append(step()["logits"])
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-4)


def test_folders_are_new(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    first = profile_run.default_out(OP, "torch")
    first.mkdir(parents=True)
    second = profile_run.default_out(OP, "torch")
    assert first != second and first.parent == second.parent == Path("profiling", "reports")
