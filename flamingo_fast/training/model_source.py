"""What the model of a run is made of: a preset, a file, a folder, a checkpoint; its tokenizer."""

import dataclasses
from pathlib import Path
from typing import Any

import torch

from flamingo_fast.models.config import ConfigError, FlamingoConfig
from flamingo_fast.models.extras import require
from flamingo_fast.models.fields import from_dict
from flamingo_fast.models.flamingo import Flamingo
from flamingo_fast.models.presets import PRESETS
from flamingo_fast.models.processor import FlamingoProcessor
from flamingo_fast.models.saving import CheckpointError, from_pretrained
from flamingo_fast.models.vision import VisionEncoder
from flamingo_fast.training.checkpoints import Checkpoints
from flamingo_fast.training.config import TrainConfig, merge
from flamingo_fast.training.optimizer import trained_buffers

CHECKPOINTS = "checkpoints"
"""The folder of checkpoints in that of a run."""


@dataclasses.dataclass(frozen=True)
class ModelSource:
    """What a model is made of.

    Attributes:
        config: of the model as it is to be trained.
        folder: of `save_pretrained`, that has its weights; or None.
        checkpoint: of a run, that has the weights which that run trained; or None.
        base: what the model of that run was made of, and `base_seed`, from which seed; of a
            checkpoint alone.
    """

    config: FlamingoConfig
    folder: Path | None = None
    checkpoint: Path | None = None
    base: "ModelSource | None" = None
    base_seed: int = 0

    @property
    def path(self) -> Path | None:
        """Where the weights are."""
        return self.checkpoint or self.folder


def find_source(train: TrainConfig) -> ModelSource:
    """What `train.model` names, with `unfreeze_vision` and `image_size`; reads no weights.

    Raises:
        ConfigError: it names nothing, or a field of it is wrong, by name.
    """
    source = _find(train.model)
    vision = dataclasses.replace(
        source.config.vision,
        is_frozen=source.config.vision.is_frozen and not train.unfreeze_vision,
        image_size=train.image_size or source.config.vision.image_size,
    )
    return dataclasses.replace(source, config=dataclasses.replace(source.config, vision=vision))


def make_model(source: ModelSource, seed: int) -> Flamingo:
    """The model, on the CPU, of the files' dtypes or else fp32; what has no weights is drawn.

    Arguments:
        source: of `find_source`.
        seed: the same one gives the same weights, on every rank.

    Raises:
        ConfigError: model: parts that don't fit together.
        CheckpointError, FileNotFoundError: files of weights that are broken or not there.
    """
    torch.manual_seed(seed)
    with torch.device("cpu"):
        if source.folder is not None:
            return from_pretrained(source.folder, device="cpu", config=source.config)
        if source.checkpoint is None:
            try:
                return Flamingo(source.config)
            except ConfigError as error:
                raise ConfigError(f"model.{error}") from None
        assert source.base is not None
        model = make_model(source.base, source.base_seed)
        _load_trained(model, source.checkpoint)
        _change_vision(model, source.config)
        return model


def make_vision_encoder(source: ModelSource, seed: int) -> VisionEncoder:
    """The vision encoder of `make_model`, without the other parts where they can be spared.

    Raises:
        ConfigError, CheckpointError, FileNotFoundError: as `make_model`.
    """
    if source.path is not None:
        return make_model(source, seed).vision_encoder
    # A model's first part: it has the same weights.
    torch.manual_seed(seed)
    with torch.device("cpu"):
        try:
            return VisionEncoder(source.config.vision)
        except ConfigError as error:
            raise ConfigError(f"model.{error}") from None


def random_parts(source: ModelSource) -> list[str]:
    """Parts that stay as chance made them: frozen, and with no weights from anywhere."""
    config = source.config
    if source.base is not None:
        return random_parts(source.base)
    if source.folder is not None:
        return []
    has_weights = {
        "lm": config.lm.kind == "huggingface" and config.lm.is_pretrained and bool(config.lm.name),
        "vision": config.vision.is_pretrained,
    }
    return [
        f"model.{name}"
        for name, part in (("vision", config.vision), ("lm", config.lm))
        if part.is_frozen and not has_weights[name]
    ]


def load_tokenizer(name: str) -> Any:
    """A tokenizer of a folder, of a file (tokenizer.json), or that transformers finds by name.

    Raises:
        ConfigError: tokenizer: there is none, or it can't be loaded.
        ImportError: transformers is not installed.
    """
    transformers = require("transformers")
    path = Path(name)
    try:
        if path.is_file():
            return transformers.PreTrainedTokenizerFast(tokenizer_file=str(path))
        # By the name of a folder or file that isn't there a hub would be asked, again and again.
        is_path = path.is_absolute() or name.startswith(".") or path.suffix == ".json"
        if is_path and not path.is_dir():
            raise FileNotFoundError("there is no such file or folder")
        return transformers.AutoTokenizer.from_pretrained(name, local_files_only=path.is_dir())
    # Of broken files it raises all kinds.
    except Exception as error:
        reason = " ".join(str(error).split())
        raise ConfigError(f"tokenizer: {name} can't be loaded: {reason}") from None


def make_processor(train: TrainConfig, config: FlamingoConfig, tokenizer: Any) -> FlamingoProcessor:
    """What knows the tokens of the run; adds `image_token` and `eoc_token` to the tokenizer.

    Raises:
        ConfigError: the tokenizer has other ids for them than the model.
    """
    try:
        processor = FlamingoProcessor.of(
            config, tokenizer, image_token=train.image_token, eoc_token=train.eoc_token
        )
    except ConfigError as error:
        raise ConfigError(f"model.{error}") from None
    except ValueError as error:
        raise ConfigError(str(error)) from None
    return processor


def _find(model: str | dict[str, Any]) -> ModelSource:
    if isinstance(model, dict):
        return _of_fields(model)
    path = Path(model)
    if path.is_dir():
        return _of_folder(path)
    try:
        if path.is_file():
            return ModelSource(FlamingoConfig.from_file(path))
    except (ConfigError, UnicodeDecodeError) as error:
        raise ConfigError(f"model: {path}: {error}") from None
    if model in PRESETS:
        return ModelSource(FlamingoConfig.preset(model))
    raise ConfigError(
        f"model: expected a preset ({', '.join(PRESETS)}), a folder or a JSON file, got {model!r}"
    )


def _of_fields(values: dict[str, Any]) -> ModelSource:
    values = dict(values)
    preset, folder = values.pop("preset", None), values.pop("folder", None)
    if preset is not None and folder is not None:
        raise ConfigError("model: expected one of preset and folder, got both")
    source = ModelSource(FlamingoConfig())
    if folder is not None:
        source = _find(str(folder))
        if source.folder is None:
            raise ConfigError(
                f"model.folder: expected one that save_pretrained wrote, got {folder!r}"
            )
    try:
        if preset is not None:
            source = ModelSource(FlamingoConfig.preset(preset))
        fields = merge(dataclasses.asdict(source.config), values)
        return dataclasses.replace(source, config=from_dict(FlamingoConfig, fields, ""))
    except ConfigError as error:
        raise ConfigError(f"model.{error}") from None


def _of_folder(path: Path) -> ModelSource:
    if (path / "config.json").is_file():
        try:
            return ModelSource(FlamingoConfig.from_file(path / "config.json"), folder=path)
        except (ConfigError, UnicodeDecodeError) as error:
            raise ConfigError(f"model: {path / 'config.json'}: {error}") from None
    checkpoint: Path | None = path
    if (path / CHECKPOINTS).is_dir():
        checkpoint = Checkpoints(path / CHECKPOINTS).latest()
    try:
        if checkpoint is None:
            raise FileNotFoundError(f"no checkpoint in {path / CHECKPOINTS}")
        recorded = Checkpoints(checkpoint.parent).extra(checkpoint)["config"]
        earlier = from_dict(TrainConfig, recorded, "")
        base = find_source(earlier)
    except (FileNotFoundError, CheckpointError, ConfigError, KeyError) as error:
        raise ConfigError(
            f"model: expected a folder of save_pretrained, of a checkpoint or of a run, got {path} "
            f"({error})"
        ) from None
    return ModelSource(base.config, checkpoint=checkpoint, base=base, base_seed=earlier.seed)


def _load_trained(model: Flamingo, checkpoint: Path) -> None:
    """The weights that a run trained, from its checkpoint's fp32."""
    parameters = {name: each for name, each in model.named_parameters() if each.requires_grad}
    trained = {name: torch.empty(each.shape) for name, each in parameters.items()}
    trained |= trained_buffers(model)
    Checkpoints(checkpoint.parent).load({"weights": trained}, checkpoint, partial=True)
    for name, parameter in parameters.items():
        parameter.data = trained[name]


def _change_vision(model: Flamingo, config: FlamingoConfig) -> None:
    """Another image size, whose position embeddings are interpolated; frozen or not."""
    old = model.vision_encoder
    if config.vision.image_size != model.config.vision.image_size:
        vision = dataclasses.replace(config.vision, is_pretrained=False)
        model.vision_encoder = VisionEncoder(vision, dtype=next(old.parameters()).dtype)
        model.vision_encoder.load_state_dict(old.state_dict())
    model.vision_encoder.freeze(config.vision.is_frozen)
    model.config = config
    model.train(model.training)
