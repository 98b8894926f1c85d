"""`flamingo-fast train` and `finetune`: what they write and print, and what mistakes look like."""

import copy
import dataclasses
import errno
import io
import json
import os
import re
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

for _name in ("timm", "transformers", "safetensors", "webdataset", "yaml"):
    pytest.importorskip(_name)

import transformers  # noqa: E402
from rich.console import Console  # noqa: E402
from run_cases import (  # noqa: E402
    MODEL,
    WORDS,
    config,
    finish,
    hold,
    make_data,
    metrics,
    tokenizer,
    write_config,
)

from flamingo_fast.models.config import FlamingoConfig  # noqa: E402
from flamingo_fast.models.fields import ConfigError, from_dict  # noqa: E402
from flamingo_fast.models.flamingo import Flamingo  # noqa: E402
from flamingo_fast.models.folder import processor_of  # noqa: E402
from flamingo_fast.training import checkpoints, trainer  # noqa: E402
from flamingo_fast.training.parallel import Ranks  # noqa: E402
from flamingo_fast.training.progress import Metrics  # noqa: E402
from flamingo_fast.training.run_folder import Lock  # noqa: E402
from flamingo_fast.training.step import TrainStep  # noqa: E402

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    make_data(folder)
    return folder


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: Run) -> Run:
    """Runs a command on a config or a path; returns (exit code, stdout, stderr)."""
    monkeypatch.delenv("FLAMINGO_FAST_DEBUG", raising=False)

    def run(values: Any, *options: object, name: str = "train") -> Any:
        path = values
        if isinstance(values, dict):
            path = write_config(tmp_path / "config.yaml", values)
        return command(name, path, *options)

    return run


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return Flamingo.from_pretrained(folder).state_dict()


def steps_of(out: Path) -> list[int]:
    return [int(each.name[5:]) for each in sorted((out / "checkpoints").glob("step-*"))]


def test_trains_and_writes_what_other_commands_take(run: Run, data: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    code, printed, _ = run(config(data, out))
    assert code == 0
    assert printed.splitlines()[-1] == f"done: 6 steps; the model is in {out / 'model'}"
    lines = [line for line in printed.splitlines() if line.startswith("step ")]
    assert [line.partition(" |")[0] for line in lines] == [f"step {n} of 6" for n in (2, 4, 6)]
    assert "model.lm is frozen, and its weights are random" in printed
    for word in ("loss pages ", "pairs ", "tokens/s", "images/s", "% MFU", "GB", "left"):
        assert word in lines[-1]

    written = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in written] == [2, 4, 6]
    assert [line["lr"] for line in written] == [3e-3] * 3
    assert all(line["speed"]["mfu"] > 0 for line in written)
    assert written[-1]["samples"]["pages"] == 12 and written[-1]["bad_samples"]["pages"] == {}
    assert steps_of(out) == [2, 4, 6]
    assert json.loads((out / "bad_samples.json").read_text())["pages"]["counts"] == {"ok": 12}

    model_config, processor = processor_of(out / "model")
    assert (processor.image_token, processor.eoc_token) == ("<image>", "<EOC>")
    before = trainer.make_model(trainer.find_source(_train_config(config(data, out))), 0)
    after = weights(out / "model")
    for name, parameter in before.named_parameters():
        assert torch.equal(parameter, after[name]) != parameter.requires_grad, name
    assert model_config == before.config

    # Once more there is nothing to do.
    code, printed, _ = run(config(data, out))
    assert code == 0 and "goes on from" in printed and "done: 6 steps" in printed
    assert "step 6 of 6" not in printed


def _train_config(values: dict[str, Any]) -> Any:
    return from_dict(trainer.TrainConfig, values, "")


def _refused(outcome: tuple[int, str, str], because: str, code: int = 2) -> None:
    got, out, err = outcome
    assert because in err, err
    assert err.startswith("flamingo-fast: ") and err.count("\n") == 1
    assert (got, out) == (code, "")


def _with(values: dict[str, Any], path: str, value: Any) -> dict[str, Any]:
    values = copy.deepcopy(values)
    *parents, last = path.split(".")
    inner: Any = values
    for name in parents:
        inner = inner[int(name)] if isinstance(inner, list) else inner.setdefault(name, {})
    inner[last] = value
    return values


@pytest.mark.parametrize(
    ("path", "value", "because"),
    [
        ("stepz", 3, "stepz: there is no such field"),
        ("optimizer.lr", "fast", "optimizer.lr: expected float, got 'fast'"),
        ("device", "tpu", "device: expected"),
        ("device", "meta", "device: expected cpu or cuda, got 'meta'"),
        ("parallel.tensor_parallel", 2, "parallel.tensor_parallel: expected a divisor of the 1 "),
        ("model", "flamingo-4b", "model: expected a preset (flamingo-3b, "),
        ("model", "no/such/folder", "model: expected a preset"),
        ("model.lm.width", 3, "model.lm.width: there is no such field"),
        ("model.lm.depth", 0, "model.lm.depth: expected at least 1"),
        ("model.vision.encoder", "vit_micro", "model.vision.encoder: expected one of"),
        ("model.image_token_id", 7, "model.image_token_id: expected the tokenizer's id of"),
        ("model.lm.vocab_size", 9, "tokenizer: expected at most the model's 9 tokens"),
        ("model", {"preset": "x"}, "model.preset: expected one of flamingo-3b"),
        ("model", {"preset": "flamingo-mini", "folder": "x"}, "model: expected one of preset and"),
        ("tokenizer", "./absent", "tokenizer: ./absent can't be loaded: there is no such file"),
        ("tokenizer", "a/tokenizer.json", "can't be loaded: there is no such file"),
        ("image_token", "<EOC>", "eoc_token: expected another than image_token"),
        ("datasets.0.shards", ["absent.tar"], "datasets.pages.shards: "),
        ("datasets.0.max_tokens", 2, "datasets.pages.max_tokens: expected at least"),
        ("datasets.0.features", "absent", "datasets.pages.features: "),
    ],
)
def test_a_bad_config_is_one_line_that_names_the_key(
    run: Run, data: Path, tmp_path: Path, path: str, value: Any, because: str
) -> None:
    _refused(run(_with(config(data, tmp_path / "out"), path, value)), because)
    assert not (tmp_path / "out" / "metrics.jsonl").exists()


def test_a_broken_file_of_features_is_one_line(run: Run, data: Path, tmp_path: Path) -> None:
    folder = tmp_path / "features" / "vit_mini-28px-0"
    folder.mkdir(parents=True)
    (folder / "a.safetensors").write_bytes(b"")
    values = config(data, tmp_path / "out")
    values["datasets"][0]["features"] = str(tmp_path / "features")
    _refused(run(values), "a.safetensors: expected a file of features", code=1)


def test_a_batch_that_the_ranks_cannot_share_is_refused(
    run: Run, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ranks = Ranks(torch.device("cpu"), dp_size=4)
    monkeypatch.setattr(trainer, "make_ranks", lambda *_: ranks)
    because = "datasets.pages.batch_size: expected a multiple of the 4 data-parallel ranks, got 2"
    _refused(run(config(data, tmp_path)), because)


def test_a_config_that_is_not_there_or_no_yaml_is_refused(run: Run, tmp_path: Path) -> None:
    _refused(run(tmp_path / "absent.yaml"), "CONFIG: ")
    (tmp_path / "tabs.yaml").write_text("steps:\n\t- 1")
    _refused(run(tmp_path / "tabs.yaml"), "tabs.yaml: expected YAML (")


@pytest.fixture(scope="module")
def finished(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two steps, which nothing changes."""
    out = tmp_path_factory.mktemp("finished")
    trainer.train(_train_config(config(data, out, steps=2)))
    return out


@pytest.mark.parametrize(
    ("path", "value", "because"),
    [
        ("seed", 1, "seed: expected 0, of the checkpoint that is gone on from, got 1. Put it"),
        ("model.lm.depth", 3, "model: expected "),
        ("datasets.0.batch_size", 4, "datasets.pages.batch_size: expected 2, of the checkpoint"),
        ("datasets.0.name", "web", "datasets: expected ['pages', 'pairs'], of the checkpoint"),
        ("optimizer.lr", 1.0, "or give --accept-changes to go on all the same, another out, or "),
    ],
)
def test_another_config_does_not_go_on(
    run: Run, data: Path, finished: Path, path: str, value: Any, because: str
) -> None:
    _refused(run(_with(config(data, finished), path, value)), because)
    assert steps_of(finished) == [2]


def test_other_data_does_not_go_on(run: Run, data: Path, finished: Path) -> None:
    other = str(data / "pairs.tar")
    values = _with(config(data, finished), "datasets.0.shards", [other])
    _refused(run(values), "datasets.pages: expected a state of shards ")


def test_what_changes_no_result_may_change_and_what_fits_if_told(
    run: Run, data: Path, tmp_path: Path
) -> None:
    values = config(data, tmp_path, steps=2)
    assert run(values)[0] == 0
    values |= {"steps": 3, "micro_batch_size": 1, "log_every": 1, "keep_checkpoints": 1}
    assert run(values)[0] == 0
    assert steps_of(tmp_path) == [3]
    values |= {"steps": 4, "optimizer": {"lr": 1e-3, "warmup_steps": 0}}
    assert run(values)[0] == 2
    assert run(values, "--accept-changes")[0] == 0
    assert [line["lr"] for line in metrics(tmp_path)][1:] == [3e-3, 1e-3]


@pytest.mark.parametrize("earlier", ["fields", "a path"])
def test_a_model_in_a_file_is_its_fields(
    run: Run,
    data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    earlier: str,
) -> None:
    """From whatever folder, and if the file is another one by now; of runs with its path, too."""
    monkeypatch.chdir(tmp_path)
    model = from_dict(FlamingoConfig, MODEL, "")
    Path("model.json").write_text(model.to_json())
    assert run(config(data, tmp_path / "out", model="model.json", steps=1))[0] == 0
    if earlier == "a path":
        (extra,) = (tmp_path / "out" / "checkpoints").glob("*/extra.json")
        values = json.loads(extra.read_text())
        values["extra"]["config"]["model"] = "model.json"
        extra.write_text(json.dumps(values))
    else:
        monkeypatch.chdir("/")
    values = config(data, tmp_path / "out", model=str(tmp_path / "model.json"), steps=2)
    assert run(values)[0] == 0
    (tmp_path / "model.json").write_text(dataclasses.replace(model, p_next=0.0).to_json())
    _refused(run(values), "model: expected {")
    (tmp_path / "model.json").unlink()
    tuning = finetuning(data, tmp_path / "tuned", steps=1)
    assert run(tuning, "--from", tmp_path / "out", name="finetune")[0] == 0


def test_a_checkpoint_whose_model_is_gone_is_named(
    run: Run, data: Path, finished: Path, tmp_path: Path
) -> None:
    values = finetuning(data, tmp_path / "second", steps=1)
    shutil.copytree(finished / "model", tmp_path / "gone")
    assert run(values, "--from", tmp_path / "gone", name="finetune")[0] == 0
    shutil.rmtree(tmp_path / "gone")
    values["out"] = str(tmp_path / "third")
    outcome = run(values, "--from", tmp_path / "second", name="finetune")
    _refused(outcome, f"of a run, got {tmp_path / 'second'} (model: expected a preset")


def test_fresh_starts_over(run: Run, data: Path, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    assert run(config(data, tmp_path, steps=4))[0] == 0
    first = metrics(tmp_path)
    assert run(config(data, tmp_path, steps=2, seed=1), "--fresh")[0] == 0
    assert steps_of(tmp_path) == [2]
    (line,) = metrics(tmp_path)
    assert line["step"] == 2 and line["loss"] != first[0]["loss"]
    assert (tmp_path / "notes.txt").exists()


def test_a_folder_that_another_run_writes_to_is_refused(tmp_path: Path) -> None:
    holder = hold(tmp_path)
    try:
        with pytest.raises(OSError, match="out: another run writes to"):
            Lock(tmp_path)
    finally:
        holder.kill()
    finish([holder])
    Lock(tmp_path)


def test_a_folder_that_cannot_be_written_is_refused(run: Run, data: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    _refused(run(config(data, tmp_path / "file")), "out: can't write ", code=1)


def test_too_many_bad_samples_stop_it_with_the_list(run: Run, tmp_path: Path) -> None:
    make_data(tmp_path, pairs=60, bad=30)
    values = config(tmp_path, tmp_path / "out", steps=20, log_every=10, checkpoint_every=0)
    values["datasets"] = values["datasets"][1:]
    code, printed, err = run(values)
    assert code == 1
    assert re.match(r"flamingo-fast: pairs: \d+ of \d+ samples are bad \(\d+", err)
    assert "missing_member" in err and "pairs.tar, 00" in err
    assert "bad samples in pairs" in printed
    steps = steps_of(tmp_path / "out")
    assert run(values)[0] == 1 and steps_of(tmp_path / "out") == steps
    # Who finds so many right goes on.
    values["datasets"][0]["max_bad_rate"] = 0.9
    assert run(values)[0] == 0
    (counts,) = json.loads((tmp_path / "out" / "bad_samples.json").read_text()).values()
    assert (
        counts["counts"]["missing_member"]
        == metrics(tmp_path / "out")[-1]["bad_samples"]["pairs"]["missing_member"]
    )


def test_a_full_disk_is_one_line_and_the_last_checkpoint_is_there(
    run: Run, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = checkpoints._dcp_save

    def full(tensors: Any, folder: Path) -> None:
        if folder.parent.name.endswith("4"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write(tensors, folder)

    monkeypatch.setattr(checkpoints, "_dcp_save", full)
    code, _, err = run(config(data, tmp_path))
    assert code == 1
    assert err.startswith("flamingo-fast: can't save step 4 in ") and err.count("\n") == 1
    assert steps_of(tmp_path) == [2]
    monkeypatch.undo()
    assert trainer.train(_train_config(config(data, tmp_path))).steps == 6
    assert [line["step"] for line in metrics(tmp_path)] == [2, 4, 6]


def test_updates_that_are_not_finite_are_counted(
    run: Run, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = TrainStep._loss_sum
    monkeypatch.setattr(TrainStep, "_loss_sum", lambda *a: original(*a) * float("nan"))
    code, printed, _ = run(config(data, tmp_path, steps=2))
    assert code == 0 and "2 updates skipped: NaN or infinity" in printed
    (line,) = metrics(tmp_path)
    assert line["skipped"] == 2 and line["loss"]["pages"] == "nan"


def test_interrupts(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first lets a step end, a second one doesn't."""
    handler = signal.getsignal(signal.SIGINT)
    original = TrainStep._update
    times = 1

    def interrupted(self: TrainStep, *arguments: Any) -> Any:
        for _ in range(times):
            signal.raise_signal(signal.SIGINT)
        return original(self, *arguments)

    monkeypatch.setattr(TrainStep, "_update", interrupted)
    result = trainer.train(_train_config(config(data, tmp_path)))
    assert (result.steps, result.is_complete, result.model) == (1, False, None)
    assert steps_of(tmp_path) == [1] and result.checkpoint == tmp_path / "checkpoints/step-00000001"
    times = 2
    with pytest.raises(KeyboardInterrupt):
        trainer.train(_train_config(config(data, tmp_path)))
    assert signal.getsignal(signal.SIGINT) is handler


def test_a_language_model_of_transformers_is_trained_around(
    run: Run, data: Path, tmp_path: Path
) -> None:
    sizes = {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 16}
    gpt2 = transformers.GPT2Config(vocab_size=len(WORDS), **sizes)
    transformers.GPT2LMHeadModel(gpt2).save_pretrained(tmp_path / "gpt2")
    lm = {"kind": "huggingface", "name": str(tmp_path / "gpt2")}
    values = config(data, tmp_path / "out", model=MODEL | {"lm": lm}, steps=2)
    code, printed, err = run(values)
    assert code == 0, err
    assert "model.lm" not in printed
    assert (tmp_path / "out" / "model" / "model.safetensors").exists()
    processor_of(tmp_path / "out" / "model")

    values["datasets"][1]["max_tokens"] = 17
    values["out"] = str(tmp_path / "long")
    with pytest.raises(ConfigError, match="^datasets.pairs.max_tokens: .* model's 16, got 17"):
        trainer.train(_train_config(values))


def finetuning(data: Path, out: Path, **changes: Any) -> dict[str, Any]:
    values = config(data, out, **{"steps": 2, "image_size": 42, **changes})
    for name in ("model", "optimizer"):
        del values[name]
    return values


def test_finetuning_trains_vision_at_another_size(
    run: Run, data: Path, finished: Path, tmp_path: Path
) -> None:
    values = finetuning(data, tmp_path / "out")
    del values["tokenizer"]
    code, printed, err = run(values, "--from", finished / "model", name="finetune")
    assert code == 0, err
    model = FlamingoConfig.from_file(tmp_path / "out" / "model" / "config.json")
    assert (model.vision.is_frozen, model.vision.image_size) == (False, 42)
    before, after = weights(finished / "model"), weights(tmp_path / "out" / "model")
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    # Of 3 x 3 patches, not 2 x 2, and a class token.
    assert after["vision_encoder.model.pos_embed"].shape[1] == 3 * 3 + 1
    assert any(name.startswith("vision_encoder.model.blocks") for name in changed)
    assert not any(name.startswith("lang_model") for name in changed)
    lines = metrics(tmp_path / "out")
    assert lines[-1]["lr"] == pytest.approx(1e-5 * 2 / 100)


def test_finetuning_goes_on_from_a_checkpoints_weights(
    run: Run, data: Path, finished: Path, tmp_path: Path
) -> None:
    """Of a run, of its checkpoint, or of its model: the same here, where all is fp32.

    The tokenizer is that of the run's model, each time.
    """
    lines = []
    for index, source in enumerate(("", "checkpoints/step-00000002", "model")):
        out = tmp_path / str(index)
        # The frozen weights are those of the earlier run's seed.
        values = finetuning(data, out, seed=3)
        del values["tokenizer"]
        code, _, err = run(values, "--from", finished / source, name="finetune")
        assert code == 0, err
        lines.append(metrics(out))
    assert lines[0] == lines[1] == lines[2]


def test_finetuning_takes_no_tokenizer_of_another_model(
    run: Run, data: Path, finished: Path, tmp_path: Path
) -> None:
    source = tmp_path / "models" / "bare"
    shutil.copytree(finished / "model", source, ignore=shutil.ignore_patterns("tokenizer*"))
    shutil.copytree(finished / "model", tmp_path / "model")
    values = finetuning(data, tmp_path / "out")
    del values["tokenizer"]
    outcome = run(values, "--from", source, name="finetune")
    _refused(outcome, "tokenizer: expected a value, it is missing")


def test_finetuned_models_are_finetuned(run: Run, data: Path, tmp_path: Path) -> None:
    """A checkpoint with vision weights in it, of a run that began with a folder in bf16."""
    outs = [tmp_path / name for name in ("first", "second", "third")]
    assert run(config(data, outs[0], steps=1, precision="bf16"))[0] == 0
    values = finetuning(data, outs[1], precision="bf16")
    assert run(values, "--from", outs[0] / "model", name="finetune")[0] == 0
    values = finetuning(data, outs[2], precision="bf16", image_size=28)
    values["optimizer"] = {"lr": 1e-2, "warmup_steps": 0}
    code, _, err = run(values, "--from", outs[1], name="finetune")
    assert code == 0, err
    first, third = weights(outs[0] / "model"), weights(outs[2] / "model")
    assert third["vision_encoder.model.pos_embed"].shape[1] == 5
    for name in ("lang_model.model.embed_tokens.weight", "resampler.latents"):
        is_trained = name.startswith("resampler")
        assert torch.equal(first[name], third[name]) != is_trained, name


def test_finetuning_of_nothing_is_refused(run: Run, data: Path, tmp_path: Path) -> None:
    values = finetuning(data, tmp_path / "out")
    (tmp_path / "empty").mkdir()
    (tmp_path / "started" / "checkpoints").mkdir(parents=True)
    for folder in ("empty", "started"):
        outcome = run(values, "--from", tmp_path / folder, name="finetune")
        _refused(outcome, "model: expected a folder of save_pretrained, of a checkpoint or of a ")
    outcome = run(values | {"model": MODEL}, "--from", tmp_path / "empty", name="finetune")
    _refused(outcome, "model: expected none beside --from")


def test_metrics_after_the_checkpoint_are_cut_off(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    first = Metrics(path, 0)
    for step in (1, 2, 3):
        first.write({"step": step, "loss": {"a": float("nan")}})
    lines = path.read_text().splitlines()
    assert lines[0] == '{"step": 1, "loss": {"a": "nan"}}'
    path.write_text("\n".join(lines)[:-4])
    Metrics(path, 2)
    assert path.read_text().splitlines() == lines[:2]
    path.write_text("\n".join(lines))
    Metrics(path, 5).write({"step": 6})
    assert path.read_text().splitlines() == [*lines[:2], '{"step": 6}']


def test_a_terminal_has_a_bar_and_a_table(data: Path, tmp_path: Path) -> None:
    console = Console(force_terminal=True, width=120, record=True, file=io.StringIO())
    trainer.train(_train_config(config(data, tmp_path, steps=2)), console=console)
    text = console.export_text()
    for word in ("dataset", "loss", "bad samples", "pages", "MFU", "time left", "2/2"):
        assert word in text, word


def test_a_tokenizer_may_be_one_file(data: Path) -> None:
    loaded = trainer.load_tokenizer(str(data / "tokenizer" / "tokenizer.json"))
    assert loaded.get_vocab() == tokenizer().get_vocab() and len(loaded) == len(WORDS)
