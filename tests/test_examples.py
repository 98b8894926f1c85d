"""Each example runs on weights of chance, without a network."""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from fresh_venv import ROOT

EXAMPLES = ROOT / "examples"

pytestmark = pytest.mark.skipif(
    not all(map(importlib.util.find_spec, ("timm", "transformers", "safetensors", "PIL"))),
    reason="needs the models extra",
)


def run_example(name: str, *arguments: object, cwd: Path) -> str:
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    result = subprocess.run(
        [sys.executable, EXAMPLES / f"{name}.py", *map(str, arguments)],
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_an_lm_is_wrapped_and_its_folder_is_a_model_of_the_other_examples(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    out = run_example("wrap_an_lm", "--out", folder, cwd=tmp_path)
    losses = [float(each) for each in re.findall(r"loss ([\d.]+)", out)]
    assert len(losses) == 2 and losses[1] < losses[0]
    assert any(float(each) for each in re.findall(r"[+-]0\.\d+", out)), "gates didn't move"

    out = run_example("few_shot_captioning", "--model", folder, "--beams", 1, cwd=tmp_path)
    assert out.startswith("2 shots: ")


def test_few_shot_captioning(tmp_path: Path) -> None:
    out = run_example("few_shot_captioning", cwd=tmp_path)
    assert re.findall(r"^\d shots", out, re.M) == ["2 shots", "0 shots"]
    assert all(float(each) < 0 for each in re.findall(r"log p\(\w+\) = (.*)", out))
    assert len(re.findall(r"^log p", out, re.M)) == 3


def test_multi_turn_chat_computes_what_is_new(tmp_path: Path) -> None:
    out = run_example("multi_turn_chat", cwd=tmp_path)
    pattern = r"\[(\d+) new tokens and (\d+) new pictures; the cache has (\d+) and (\d+)\]"
    turns = [[int(each) for each in numbers] for numbers in re.findall(pattern, out)]
    assert [turn[1] for turn in turns] == [1, 0, 2]
    assert [turn[3] for turn in turns] == [1, 1, 3]
    so_far = 0
    for new, _, cached, _ in turns:
        assert so_far + new < cached <= so_far + new + 12
        so_far = cached


def test_video(tmp_path: Path) -> None:
    out = run_example("video", cwd=tmp_path)
    assert out.startswith("8 frames of (3, 64, 64) are 8 tokens\n")


@pytest.mark.parametrize("family", ["idefics", "open_flamingo"])
def test_a_patched_model_computes_the_same(family: str, tmp_path: Path) -> None:
    options = ("--family", family, "--tokens", 32, "--rounds", 1, "--plot", "layout.png")
    out = run_example("patch_a_model", *options, cwd=tmp_path)
    assert (tmp_path / "layout.png").read_bytes().startswith(b"\x89PNG")
    assert int(re.findall(r"(\d+) modules patched", out)[0]) > 0
    assert float(re.findall(r"logits differ by (\S+)", out)[0]) < 1e-4
    assert re.findall(r"^the same .*: (\w+)", out, re.M) == ["True", "True"]
    assert len(re.findall(r"ms  patched +[\d.]+ ms  [\d.]+ x", out)) == 3


def test_every_example_is_run() -> None:
    names = {file.stem for file in EXAMPLES.glob("*.py")} - {"tiny"}
    assert names == {
        *("few_shot_captioning", "multi_turn_chat", "patch_a_model", "video", "wrap_an_lm")
    }
