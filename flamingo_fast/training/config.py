"""TrainConfig: what is trained on what, and how; read from YAML.

"Section" and "appendix" are Flamingo's (arXiv 2204.14198).
"""

import dataclasses
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from flamingo_fast.models.config import OPTIMISATIONS
from flamingo_fast.models.extras import require
from flamingo_fast.models.fields import (
    ConfigError,
    at_least,
    check_fields,
    from_dict,
    one_of,
    positive,
)

KINDS = ("interleaved", "image_text", "video_text")
UNUSUAL_IMAGES = ("convert", "skip")
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
PRECISIONS = tuple(DTYPES)


@dataclasses.dataclass(frozen=True)
class DatasetConfig:
    """One dataset of the mixture.

    Attributes:
        name: in metrics and in progress.
        kind: "interleaved", "image_text" or "video_text".
        shards: tar files of webdataset's format; a path may have {000..127} and wildcards.
        batch_size: rows of a step, on all ranks together.
        weight: lambda, by which the mean loss of its tokens is multiplied (appendix B.1.2).
        max_tokens: of a row. The paper has 256 for web pages, 32 or 64 for pairs.
        max_images: of a web page, the first ones; the others are left out (section 2.4).
        num_frames: of a video at most so many, evenly.
        pack: whether a row holds several samples.
        shuffle: whether the order is another one in each epoch.
        augment: horizontal flips and colour (appendix B.1.2); not beside `features`.
        space_probability: with which a space is put before the text of a pair (appendix B.1.2).
        max_text_chars: longer texts are bad samples.
        max_image_pixels: larger images are bad samples.
        unusual_images: CMYK, 16-bit and animated ones: "convert" to RGB, 8 bits, the first frame,
            or "skip"; counted either way.
        max_bad_rate: a larger share of bad samples stops the training; it is looked at with each
            line of metrics, once there were a hundred samples.
        features: folder of `flamingo-fast data encode`, in place of running a frozen encoder.
    """

    name: str
    kind: str
    shards: tuple[str, ...]
    batch_size: int
    weight: float = 1.0
    max_tokens: int = 256
    max_images: int = 5
    num_frames: int = 8
    pack: bool = False
    shuffle: bool = True
    augment: bool = False
    space_probability: float = 0.5
    max_text_chars: int = 100_000
    max_image_pixels: int = 89_478_485
    unusual_images: str = "convert"
    max_bad_rate: float = 0.1
    features: str | None = None

    def __post_init__(self) -> None:
        # By its name, which says more than its place in the list.
        where = f"datasets.{self.name}" if isinstance(self.name, str) else "datasets"
        check_fields(self, where)
        one_of(f"{where}.kind", self.kind, KINDS)
        one_of(f"{where}.unusual_images", self.unusual_images, UNUSUAL_IMAGES)
        at_least(where, self, 1, "batch_size", "num_frames", "max_text_chars", "max_image_pixels")
        at_least(where, self, 2, "max_tokens")
        at_least(where, self, 0, "max_images")
        for name in ("space_probability", "max_bad_rate"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(
                    f"{where}.{name}: expected a number from 0 to 1, got {getattr(self, name)!r}"
                )
        if not (math.isfinite(self.weight) and self.weight >= 0):
            raise ConfigError(f"{where}.weight: expected at least 0, got {self.weight!r}")
        if not self.name or not self.shards:
            empty = "name" if not self.name else "shards"
            raise ConfigError(f"{where}.{empty}: expected at least one, got none")
        if self.augment and self.features is not None:
            raise ConfigError(
                f"{where}.augment: expected no augmentation of features that were made before"
            )


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """AdamW with the paper's settings (appendix B.1.2); betas and eps, not given, are PyTorch's.

    Attributes:
        lr: after a linear warm-up over `warmup_steps` from 0, constant.
        weight_decay: of all but the resampler.
        resampler_weight_decay: of the resampler.
        beta1, beta2: of the running means of gradients and of their squares.
        max_grad_norm: gradients are scaled down to this global norm.
    """

    lr: float = 1e-4
    warmup_steps: int = 5000
    weight_decay: float = 0.1
    resampler_weight_decay: float = 0.0
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    max_grad_norm: float = 1.0

    def __post_init__(self) -> None:
        check_fields(self, "optimizer")
        for name in ("lr", "eps", "max_grad_norm"):
            positive(f"optimizer.{name}", getattr(self, name))
        at_least("optimizer", self, 0, "warmup_steps", "weight_decay", "resampler_weight_decay")
        for name in ("beta1", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise ConfigError(
                    f"optimizer.{name}: expected a number from 0 to below 1, got "
                    f"{getattr(self, name)!r}"
                )


@dataclasses.dataclass(frozen=True)
class ParallelConfig:
    """How a model is spread over ranks, and what it keeps for the backward.

    Attributes:
        fsdp: whether parameters are sharded over data-parallel ranks; without effect on one.
        tensor_parallel: ranks that share each layer.
        reshard_after_forward: whether a layer's parameters are gathered again for the backward.
        activation_checkpointing: whether layers are computed again in the backward.
        compile: whether each layer goes through torch.compile.
    """

    fsdp: bool = True
    tensor_parallel: int = 1
    reshard_after_forward: bool = True
    activation_checkpointing: bool = False
    compile: bool = False

    def __post_init__(self) -> None:
        check_fields(self, "parallel")
        at_least("parallel", self, 1, "tensor_parallel")


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """A run.

    Attributes:
        model: a preset's name; a folder of `save_pretrained`, of a checkpoint, or of a run, whose
            last checkpoint it is then; a JSON file of a `FlamingoConfig`; or its fields, which
            replace those of a `preset` or of a `folder` of save_pretrained, named among them.
        tokenizer: a folder or a file of one, or a name that transformers finds.
        datasets: the mixture.
        steps: of the whole run. One has a batch of every dataset.
        out: folder of checkpoints, metrics and the trained model.
        optimisation: "accumulation" or "round_robin"; None: the model's.
        precision: "bf16": activations and frozen weights; trained weights and the optimiser are
            fp32 either way.
        micro_batch_size: rows of a forward; None: a batch's.
        checkpoint_every: steps; 0: only at the end and on SIGTERM.
        keep_checkpoints: of the last ones.
        log_every: steps between lines of metrics.
        num_workers: processes that read a dataset; 0: the one that trains.
        image_token, eoc_token: see `FlamingoProcessor`.
        seed: of weights, of the order of samples and of what is random in a step.
        device: "cpu", "cuda" or one GPU; None: a GPU if there is one. With torchrun each process of
            a machine has a GPU of its own.
        optimizer, parallel: see `OptimizerConfig` and `ParallelConfig`.
        unfreeze_vision: whether the vision encoder is trained too (section 3.2); `image_size`: of
            its images then or otherwise; None: the model's.
    """

    model: str | dict[str, Any]
    tokenizer: str
    datasets: tuple[DatasetConfig, ...]
    steps: int
    out: str
    optimisation: str | None = None
    optimizer: OptimizerConfig = dataclasses.field(default_factory=OptimizerConfig)
    parallel: ParallelConfig = dataclasses.field(default_factory=ParallelConfig)
    precision: str = "bf16"
    micro_batch_size: int | None = None
    checkpoint_every: int = 1000
    keep_checkpoints: int = 3
    log_every: int = 10
    num_workers: int = 0
    seed: int = 0
    device: str | None = None
    image_token: str = "<image>"
    eoc_token: str | None = "<EOC>"
    unfreeze_vision: bool = False
    image_size: int | None = None

    def __post_init__(self) -> None:
        check_fields(self, "")
        at_least("", self, 1, "steps", "micro_batch_size", "keep_checkpoints", "log_every")
        at_least("", self, 1, "image_size")
        at_least("", self, 0, "checkpoint_every", "num_workers", "seed")
        one_of("precision", self.precision, PRECISIONS)
        if self.optimisation is not None:
            one_of("optimisation", self.optimisation, OPTIMISATIONS)
        names = [each.name for each in self.datasets]
        if not names:
            raise ConfigError("datasets: expected at least one, got none")
        if len(set(names)) != len(names):
            raise ConfigError(f"datasets: expected different names, got {', '.join(names)}")

    @classmethod
    def from_yaml(
        cls, path: str | Path, defaults: Mapping[str, Any] | None = None
    ) -> "TrainConfig":
        """Of a file; fields that are not there have their defaults.

        Arguments:
            path: of the file. Paths in it are seen from the current folder.
            defaults: of fields, in place of the class's; such as `FINETUNING`.

        Raises:
            ConfigError: not YAML, a field that there is not, that is missing or has a wrong value,
                by its name.
            OSError: the file can't be read.
            ImportError: PyYAML is not installed.
        """
        values = _read_yaml(path)
        if isinstance(values, dict):
            values = merge(defaults or {}, values)
        return from_dict(cls, values, "")


FINETUNING: dict[str, Any] = {
    "unfreeze_vision": True,
    "image_size": 480,
    "optimizer": {"lr": 1e-5, "warmup_steps": 100},
}
"""Defaults of `flamingo-fast finetune`: a short schedule, a small learning rate and the vision
encoder unfrozen (section 3.2), images of 480 x 480 (appendix B.2.2). The optimizer's numbers are
ours."""


def merge(base: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
    """`base` with the values in place of its own; dicts in both are merged."""
    merged = dict(base)
    for name, value in values.items():
        if isinstance(value, dict) and isinstance(base.get(name), Mapping):
            value = merge(base[name], value)
        merged[name] = value
    return merged


def _read_yaml(path: str | Path) -> Any:
    yaml = require("yaml", "train")

    class Loader(yaml.SafeLoader):  # type: ignore[name-defined]
        """YAML 1.2's numbers: in 1.1's 1e-4 is text. A key that is there twice is an error."""

        def compose_mapping_node(self, anchor: Any) -> Any:
            # Of what is written: once it is constructed, `<<` has put other keys beside it.
            node = super().compose_mapping_node(anchor)
            seen = set()
            for key, _ in node.value:
                if not isinstance(key, yaml.ScalarNode):
                    continue
                if (key.tag, key.value) in seen:
                    line = key.start_mark.line + 1
                    raise ConfigError(f"{key.value}: expected it once, line {line}")
                seen.add((key.tag, key.value))
            return node

    # PyYAML takes what begins with a match.
    number = re.compile(r"[-+]?(\.\d+|\d+(\.\d*)?)[eE][-+]?\d+$")
    Loader.add_implicit_resolver("tag:yaml.org,2002:float", number, list("-+.0123456789"))
    try:
        return yaml.load(Path(path).read_text(), Loader)
    except ConfigError:
        raise
    # ValueError: bytes that are no UTF-8, a date that there is not.
    except (yaml.YAMLError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise ConfigError(f"{path}: expected YAML ({reason})") from None
