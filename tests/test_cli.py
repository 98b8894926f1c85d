"""The command itself: exit codes, what users' mistakes look like, and `doctor`."""

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import flamingo_fast
from flamingo_fast import cli, doctor
from flamingo_fast.testing import aot_gate

Command = Callable[..., tuple[int, str, str]]


def _backends(report: str) -> dict[str, dict[str, str]]:
    return {backend["name"]: backend for backend in json.loads(report)["backends"]}


def test_version(command: Command) -> None:
    assert command("--version") == (0, f"{flamingo_fast.__version__}\n", "")


@pytest.mark.parametrize("arguments", [("nothing",), ("doctor", "--nothing"), ("doctor", "extra")])
def test_bad_usage_exits_with_2(command: Command, arguments: tuple[str, ...]) -> None:
    code, out, err = command(*arguments)
    assert (code, out) == (2, "")
    assert arguments[-1] in err
    assert "Traceback" not in err


def test_no_command_shows_the_commands(command: Command) -> None:
    code, out, err = command()
    assert code == 2
    assert "doctor" in out + err


def test_a_json_file_that_cannot_be_written_is_refused_before_compiling(
    command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(aot_gate, "run_gate", lambda *_, **__: pytest.fail("compiled"))
    for file in (tmp_path / "absent" / "x.json", tmp_path):
        code, out, err = command("kernels", "--json", str(file))
        assert (code, out) == (2, "")
        assert "json" in err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "error",
    [
        flamingo_fast.BackendUnavailableError("no GPU"),
        ImportError("matplotlib is not installed"),
        PermissionError("results: read-only"),
    ],
)
def test_expected_errors_are_one_line(
    command: Command, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def fail() -> None:
        raise error

    monkeypatch.delenv("FLAMINGO_FAST_DEBUG", raising=False)
    monkeypatch.setattr(doctor, "examine", fail)
    assert command("doctor") == (1, "", f"flamingo-fast: {error}\n")

    monkeypatch.setenv("FLAMINGO_FAST_DEBUG", "1")
    monkeypatch.setattr(sys, "argv", ["flamingo-fast", "doctor"])
    with pytest.raises(type(error)):
        cli.main()


def test_doctor_tries_the_backends(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    code, out, _ = command("doctor", "--json")
    report, backends = json.loads(out), _backends(out)
    assert code == 0
    assert report["versions"]["torch"] == torch.__version__
    assert report["devices"][0].startswith("cpu: ")
    assert backends["torch"] == {
        "name": "torch",
        "status": "usable",
        "detail": "squared_relu ran on cpu",
    }
    assert backends["reference"]["status"] == "usable"
    interpreter = backends["triton in its interpreter"]
    assert (interpreter["status"] == "usable") == (report["versions"]["triton"] is not None)


def test_doctor_says_why_a_backend_is_unavailable(
    command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setitem(sys.modules, "nvtx", None)
    for name in ("xformers", "torch.nn.attention.varlen"):
        monkeypatch.setitem(sys.modules, name, None)
    code, out, _ = command("doctor", "--json")
    backends = _backends(out)
    assert code == 0
    assert backends["triton on a GPU"]["detail"] == "torch sees no GPU"
    varlen = backends["torch.nn.attention.varlen"]
    assert varlen["detail"] == "not installed (torch 2.11 or later has it)"
    assert backends["nvtx"]["detail"] == "not installed (pip install 'flamingo_fast[profile]')"
    assert "flamingo_fast[gpu]" in backends["xformers"]["detail"]
    assert backends["triton in its interpreter"]["status"] == "unavailable"

    code, out, _ = command("doctor")
    assert code == 0
    # Rich would take an extra's name for markup.
    assert "[profile]" in "".join(out.split())


@pytest.mark.parametrize("result", [[0.0, 8.9], RuntimeError("no kernel image\nmore")])
def test_doctor_exits_with_1_if_a_backend_is_broken(
    command: Command, monkeypatch: pytest.MonkeyPatch, result: list[float] | Exception
) -> None:
    def squared_relu(x: torch.Tensor, *, impl: str) -> torch.Tensor:
        if isinstance(result, Exception):
            raise result
        return torch.tensor(result)

    monkeypatch.setattr(flamingo_fast, "squared_relu", squared_relu)
    code, out, _ = command("doctor", "--json")
    broken = _backends(out)["torch"]
    assert code == 1
    assert broken["status"] == "broken"
    assert broken["detail"].startswith(("ArithmeticError: ", "RuntimeError: no kernel image"))
    assert "\n" not in broken["detail"]
