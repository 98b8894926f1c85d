"""`flamingo-fast patch`: the report of a model in a folder, and what users' mistakes look like."""

import functools
import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from patch_models import FAMILIES
from torch import nn

pytest.importorskip("transformers")

import flamingo_fast  # noqa: E402
from flamingo_fast.patching import Rule, register, unregister  # noqa: E402

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(command: Run, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Runs `flamingo-fast patch`; returns (exit code, stdout, stderr)."""
    # Errors are folded to the terminal's width.
    monkeypatch.setenv("COLUMNS", "1000")
    return functools.partial(command, "patch")


def model_and_config(family: str, folder: Path) -> nn.Module:
    """A model, and the folder gets its config alone."""
    model = FAMILIES[family].make()
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(folder)
    return model


@pytest.mark.parametrize("family", ["idefics", "mllama"])
def test_the_report_of_a_config_is_that_of_the_model(run: Run, tmp_path: Path, family: str) -> None:
    model = model_and_config(family, tmp_path)
    code, out, _ = run("--dry-run", "--json", tmp_path)
    assert code == 0
    assert json.loads(out) == flamingo_fast.patch(model, dry_run=True).to_dict()
    assert any(each["patched"] for each in json.loads(out)["entries"])

    code, out, _ = run(
        *("--dry-run", "--json", "--no-norm", "--no-media-kv-cache", "--unattended", "zero_block"),
        tmp_path,
    )
    options = {"norm": False, "media_kv_cache": False, "unattended": "zero_block"}
    assert json.loads(out) == flamingo_fast.patch(model, dry_run=True, **options).to_dict()
    assert [each.name for each in tmp_path.iterdir()] == ["config.json"]


def test_the_table(run: Run, tmp_path: Path) -> None:
    model_and_config("mllama", tmp_path)
    code, out, _ = run("--dry-run", tmp_path)
    assert code == 0
    for words in ("MllamaForConditionalGeneration: ", "would be patched", "mllama.rms_norm"):
        assert words in out, out


@pytest.fixture
def rule():
    rule = Rule(
        name="test.embedding",
        features=("norm",),
        matches=lambda module: type(module) is nn.Embedding,
        forward=lambda self, ids: self.weight[ids],
        known={},
        probes=lambda module: iter([((torch.tensor([0, 3]),), {})]),
    )
    register(rule)
    yield rule
    unregister(rule.name)


def test_probing_reads_the_weights(run: Run, tmp_path: Path, rule: Rule) -> None:
    FAMILIES["mllama"].make().save_pretrained(tmp_path)

    def found(*options: str) -> dict[str, bool]:
        code, out, _ = run("--dry-run", "--json", tmp_path, *options)
        assert code == 0
        entries = json.loads(out)["entries"]
        return {each["name"]: each["patched"] for each in entries if each["rule"] == rule.name}

    tried = found("--unknown", "probe")
    assert tried and all(tried.values())
    assert found() == dict.fromkeys(tried, False)


def _file(folder: Path) -> Path:
    (folder / "checkpoint.pt").touch()
    return folder / "checkpoint.pt"


def _open_flamingo(folder: Path) -> Path:
    return _file(folder).parent


def _adapter(folder: Path) -> Path:
    (folder / "adapter_config.json").write_text("{}")
    return folder


def _config(text: str) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        (folder / "config.json").write_text(text)
        (folder / "code.py").write_text("raise SystemExit('ran')")
        return folder

    return make


OURS = '{"vision": {}, "resampler": {}, "conditioning": {}, "lm": {}}'
CODE = (
    '{"architectures": ["Other"], "model_type": "other", "auto_map": {"AutoConfig": "code.Other"}}'
)
NEWER = '{"architectures": ["MllamaForConditionalGeneration"], "model_type": "mllama9"}'
WRONG = '{"architectures": ["MllamaModel"], "model_type": "mllama", "text_config": 3}'
MISTAKES = {
    "nothing": (lambda folder: folder / "absent", "absent: expected a folder .*, got nothing"),
    "file": (_file, r"checkpoint.pt: expected a folder .*, got a file.*patch\(model, dry_run=True"),
    "no config": (lambda folder: folder, "config.json: expected the model's config, there is no"),
    "open_flamingo": (_open_flamingo, "checkpoint such as OpenFlamingo's, build it in Python"),
    "adapter": (_adapter, "adapter of PEFT: give the folder of the model"),
    "ours": (_config(OURS), "of flamingo_fast's own save_pretrained"),
    "no JSON": (_config("{"), "config.json: expected JSON"),
    "a list": (_config("[]"), "expected a JSON object, got list"),
    "no class": (
        _config('{"model_type": "mllama"}'),
        "expected the model's class as architectures",
    ),
    "code": (_config(CODE), r"transformers [\d.]+ has no class Other; code in the folder is not"),
    "no model": (_config('{"architectures": ["pipeline"]}'), "has no class pipeline"),
    "newer": (_config(NEWER), "can't make a MllamaForConditionalGeneration of it: .*mllama9"),
    "wrong": (_config(WRONG), "can't make a MllamaModel of it"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_folders_of_other_kinds(run: Run, tmp_path: Path, mistake: str) -> None:
    make, words = MISTAKES[mistake]
    code, out, err = run("--dry-run", make(tmp_path))
    assert (code, out) == (2, "")
    assert "Traceback" not in err
    assert re.search(words, " ".join(err.split())), err


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ((), "dry-run: expected; patching changes a model in memory"),
        (("--dry-run", "--unattended", "dense"), "unattended: expected one of None, 'zero'"),
        (("--dry-run", "--unknown", "try"), "unknown: expected one of leave, probe; got 'try'"),
        (("--dry-run", "--unknown", "probe"), "MllamaForConditionalGeneration of it: OSError"),
    ],
)
def test_bad_options(run: Run, tmp_path: Path, options: tuple[str, ...], words: str) -> None:
    model_and_config("mllama", tmp_path)
    code, out, err = run(*options, tmp_path)
    assert (code, out) == (2, "")
    assert words in " ".join(err.split())
