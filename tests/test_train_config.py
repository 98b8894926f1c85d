"""TrainConfig: what it reads of YAML, and what it refuses, by which name."""

import dataclasses
import re
from pathlib import Path
from typing import Any

import pytest

yaml = pytest.importorskip("yaml")

from fresh_venv import ROOT  # noqa: E402

from flamingo_fast.models.config import ConfigError  # noqa: E402
from flamingo_fast.training.config import (  # noqa: E402
    FINETUNING,
    DatasetConfig,
    OptimizerConfig,
    ParallelConfig,
    TrainConfig,
)
from flamingo_fast.training.model_source import find_source  # noqa: E402

VALID = """
model: flamingo-mini
tokenizer: tokenizer
steps: 3
out: out
optimizer: {lr: 3e-4, warmup_steps: 0}
datasets:
  - {name: m3w, kind: interleaved, shards: ["m3w-{000..127}.tar"], batch_size: 4}
  - {name: ltip, kind: image_text, shards: [a.tar, b.tar], batch_size: 8, weight: .2e+0}
"""


@pytest.fixture
def read(tmp_path: Path):
    def read(text: str, **options: Any) -> TrainConfig:
        (tmp_path / "config.yaml").write_text(text)
        return TrainConfig.from_yaml(tmp_path / "config.yaml", **options)

    return read


def changed(path: str, value: Any) -> str:
    """VALID with another value at the path."""
    values = yaml.safe_load(VALID.replace("3e-4", "3.0e-4").replace(".2e+0", "0.2"))
    *parents, last = path.split(".")
    inner = values
    for name in parents:
        inner = inner[int(name)] if isinstance(inner, list) else inner.setdefault(name, {})
    inner[int(last) if isinstance(inner, list) else last] = value
    return yaml.safe_dump(values)


def test_reads_yaml(read) -> None:
    config = read(VALID)
    assert config.optimizer == OptimizerConfig(lr=3e-4, warmup_steps=0)
    assert config.parallel == ParallelConfig()
    assert config.datasets[0] == DatasetConfig(
        name="m3w", kind="interleaved", shards=("m3w-{000..127}.tar",), batch_size=4
    )
    assert config.datasets[1].weight == 0.2
    assert (config.seed, config.precision, config.optimisation) == (0, "bf16", None)


def test_numbers_are_yaml_1_2s(read) -> None:
    for text in ("1e-4", "1E-4", "1.e-4", "+1.0e-4", ".1e-3"):
        assert read(VALID.replace("3e-4", text)).optimizer.lr == pytest.approx(1e-4)
    with pytest.raises(ConfigError, match=r"^optimizer\.lr: expected float, got '1e-4'$"):
        read(VALID.replace("3e-4", "'1e-4'"))


def test_text_that_begins_as_a_number_is_text(read) -> None:
    assert read(VALID.replace("out: out", "out: 1e-4-run")).out == "1e-4-run"
    assert read(VALID.replace("name: ltip", "name: 3e8_pairs")).datasets[1].name == "3e8_pairs"


def test_fields_may_be_taken_from_another_dataset(read) -> None:
    merging = (
        VALID.replace("- {name: m3w", "- &m3w {name: m3w")
        + """
  - {<<: *m3w, name: m3w-again, weight: 0.5}
"""
    )
    first, _, third = read(merging).datasets
    assert third == dataclasses.replace(first, name="m3w-again", weight=0.5)


def test_defaults_are_merged(read) -> None:
    config = read(VALID, defaults=FINETUNING)
    assert config.optimizer == OptimizerConfig(lr=3e-4, warmup_steps=0)
    assert (config.unfreeze_vision, config.image_size) == (True, 480)
    config = read(VALID.replace("lr: 3e-4, ", ""), defaults=FINETUNING)
    assert config.optimizer.lr == 1e-5


@pytest.mark.parametrize(
    ("path", "value", "said"),
    [
        ("stepz", 3, "stepz: there is no such field; expected one of model, .* mean steps"),
        ("steps", "3", "steps: expected int, got '3'"),
        ("steps", 3.5, "steps: expected int, got 3.5"),
        ("steps", True, "steps: expected int, got True"),
        ("steps", 0, "steps: expected at least 1, got 0"),
        ("seed", -1, "seed: expected at least 0"),
        ("model", 3, "model: expected .*, got 3"),
        ("precision", "fp16", "precision: expected one of bf16, fp32; got 'fp16'"),
        ("optimisation", "sgd", "optimisation: expected one of accumulation, round_robin"),
        ("micro_batch_size", 0, "micro_batch_size: expected at least 1"),
        ("optimizer", 3, "optimizer: expected an object, got 3"),
        ("optimizer.learning_rate", 3, "optimizer.learning_rate: there is no such field"),
        ("optimizer.lr", float("inf"), "optimizer.lr: expected a finite number above 0"),
        ("optimizer.beta1", 1.0, "optimizer.beta1: expected a number from 0 to below 1"),
        ("parallel.tensor_parallel", 0, "parallel.tensor_parallel: expected at least 1"),
        ("datasets", [], "datasets: expected at least one"),
        ("datasets", {"name": "a"}, "datasets: expected a list, got"),
        ("datasets.1", 3, r"datasets\[1\]: expected an object, got 3"),
        ("datasets.1.name", "m3w", "datasets: expected different names, got m3w, m3w"),
        ("datasets.1.batch", 3, r"datasets\[1\]\.batch: there is no such field"),
        ("datasets.1.kind", "text", "datasets.ltip.kind: expected one of interleaved, "),
        ("datasets.1.shards", "a.tar", r"datasets\[1\]\.shards: expected a list, got 'a.tar'"),
        ("datasets.1.shards", [], "datasets.ltip.shards: expected at least one"),
        ("datasets.1.batch_size", 0, "datasets.ltip.batch_size: expected at least 1"),
        ("datasets.1.max_tokens", 1, "datasets.ltip.max_tokens: expected at least 2"),
        ("datasets.1.weight", float("nan"), "datasets.ltip.weight: expected at least 0"),
        ("datasets.1.max_bad_rate", 1.5, "datasets.ltip.max_bad_rate: expected a number from"),
    ],
)
def test_wrong_values_are_refused_by_name(read, path: str, value: Any, said: str) -> None:
    with pytest.raises(ConfigError, match=f"^{said}") as error:
        read(changed(path, value))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["model", "tokenizer", "datasets", "steps", "out"])
def test_what_has_no_default_is_missed_by_name(read, name: str) -> None:
    values = yaml.safe_load(VALID)
    del values[name]
    with pytest.raises(ConfigError, match=f"^{name}: expected a value, it is missing$"):
        read(yaml.safe_dump(values))


def test_a_name_that_is_none_comes_before_what_is_missing(read) -> None:
    with pytest.raises(ConfigError, match=r"^stepz: there is no such field; .* Did you mean steps"):
        read(VALID.replace("steps:", "stepz:"))


def test_a_field_of_a_dataset_is_missed_by_name(read) -> None:
    with pytest.raises(ConfigError, match=r"^datasets\[1\]\.batch_size: .* missing"):
        read(VALID.replace("batch_size: 8, ", ""))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "config: expected an object, got None"),
        ("[1]", "config: expected an object"),
        ("steps: [1", "config.yaml: expected YAML"),
        ("steps: 1\nout: a\nsteps: 2\n", "steps: expected it once, line 3"),
        ("datasets: [{name: a, name: b}]", "name: expected it once, line 1"),
        ("out: 2024-13-45", r"config.yaml: expected YAML \(month must be in 1..12"),
    ],
)
def test_what_is_no_config_is_refused(read, text: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said) as error:
        read(text)
    assert "\n" not in str(error.value)


def test_every_field_is_documented() -> None:
    for cls in (DatasetConfig, OptimizerConfig, ParallelConfig, TrainConfig):
        doc = cls.__doc__ or ""
        # What dataclasses write where there is no docstring: the signature.
        assert not doc.startswith(f"{cls.__name__}("), cls.__name__
        for field in dataclasses.fields(cls):
            assert re.search(rf"\b{field.name}\b", doc), f"{cls.__name__}.{field.name}"


@pytest.mark.parametrize("path", sorted((ROOT / "examples").glob("*.yaml")), ids=lambda x: x.stem)
def test_examples_are_configs(path: Path) -> None:
    is_tuning = path.stem.startswith("finetune")
    defaults = FINETUNING | {"model": "flamingo-3b"} if is_tuning else None
    config = TrainConfig.from_yaml(path, defaults)
    if isinstance(config.model, dict) or is_tuning:
        source = find_source(config)
        assert source.config.vision.image_size == (480 if is_tuning else 224)
        assert source.config.vision.is_frozen != is_tuning
