"""Models in folders, as Hugging Face lays them out.

A folder has config.json, a `FlamingoConfig`, and the weights by the model's own state-dict keys, in
model.safetensors, or in shards with model.safetensors.index.json. Pickles are refused, since
loading one may run any code.
"""

import contextlib
import dataclasses
import json
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from flamingo_fast.models.chinchilla import ChinchillaLM
from flamingo_fast.models.config import (
    ConfigError,
    FlamingoConfig,
    LanguageModelConfig,
)
from flamingo_fast.models.extras import require
from flamingo_fast.models.flamingo import Flamingo
from flamingo_fast.models.parts import make_lang_model
from flamingo_fast.models.vision import VisionEncoder

_CONFIG = "config.json"
_WEIGHTS = "model.safetensors"
_INDEX = "model.safetensors.index.json"
_SHARDS = "model-?????-of-?????.safetensors"
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
# Parts whose weights may come from elsewhere.
PARTS_FROM_ELSEWHERE = ("vision_encoder", "lang_model")
# What a language model's own config says of where and how it was saved.
_NOT_OF_THE_MODEL = ("dtype", "torch_dtype", "_name_or_path", "transformers_version")


class CheckpointError(ValueError):
    """A file of weights that is broken, or doesn't fit the model; says which, and what is wrong."""


def save_pretrained(
    model: Flamingo,
    folder: str | os.PathLike[str],
    *,
    max_shard_bytes: int = 5 * 10**9,
    trainable_only: bool = False,
    state_dict: Mapping[str, torch.Tensor] | None = None,
) -> None:
    """Writes config and weights, for `from_pretrained`.

    Weights that are tied are written once. All files are written under other names in the folder
    before one of them takes the place of an old one; what an earlier save left there is removed.

    Arguments:
        model: of which weights of any device and dtype are written as they are.
        folder: made if it is not there.
        max_shard_bytes: of a file, if its weights are more than one. Of each file in turn the
            weights that are not in the CPU's memory, or not contiguous, are copied to it.
        trainable_only: leaves the frozen weights of the vision encoder and of the language model
            out; then `from_pretrained` has them from where the config says, or from its arguments.
        state_dict: in place of the model's, with its keys; such as whole tensors of a model that is
            sharded. Of tied weights one is enough.

    Raises:
        ValueError: max_shard_bytes below 1; a model on the meta device.
        ImportError: safetensors is not installed.
    """
    if max_shard_bytes < 1:
        raise ValueError(f"max_shard_bytes: expected at least 1, got {max_shard_bytes}")
    save_file = require("safetensors.torch").save_file
    shards = _shards(_to_save(model, trainable_only, state_dict), max_shard_bytes)
    names = [_WEIGHTS]
    if len(shards) > 1:
        names = [f"model-{i:05}-of-{len(shards):05}.safetensors" for i in range(1, len(shards) + 1)]
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".saving-") as temporary:
        for name, shard in zip(names, shards, strict=True):
            contiguous = {key: tensor.contiguous() for key, tensor in shard.items()}
            save_file(contiguous, Path(temporary, name), metadata={"format": "pt"})
        texts = {_CONFIG: _config_to_save(model).to_json()}
        if len(shards) > 1:
            texts[_INDEX] = _index(names, shards)
        for name, text in texts.items():
            Path(temporary, name).write_text(text)
        # Without it a save that is cut off here can't leave old shards among new ones.
        (folder / _INDEX).unlink(missing_ok=True)
        for name in [*names, *reversed(texts)]:
            os.replace(Path(temporary, name), folder / name)
    for old in [*folder.glob(_SHARDS), folder / _WEIGHTS]:
        if old.name not in names:
            old.unlink(missing_ok=True)


def from_pretrained(
    folder: str | os.PathLike[str],
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    lang_model: nn.Module | None = None,
    vision_encoder: VisionEncoder | None = None,
    config: FlamingoConfig | None = None,
) -> Flamingo:
    """The model that `save_pretrained` wrote, in eval mode.

    No weights are made before they are read, and they are read one by one. On a CPU, without
    `dtype`, they stay in the files until they are used: don't change the files meanwhile (saving
    a model to its own folder doesn't).

    Arguments:
        folder: of the files.
        device: of the weights; by default PyTorch's current one.
        dtype: of all weights of a floating point dtype; by default that of each in the files.
        lang_model, vision_encoder: in place of those that the config describes, and needed where it
            doesn't: `VisionEncoder.from_module`, language models of other classes than
            transformers'. They get the weights that the files have of them, in the dtype and on the
            device that they have, and keep the others.
        config: in place of the folder's, for what weights don't depend on. Position embeddings of
            a vision encoder are interpolated if vision.image_size is another.

    Raises:
        FileNotFoundError: no such folder, no config.json, no weights, a shard that is not there.
        ConfigError: config.json is none.
        CheckpointError: only pickles, which are not loaded; a file that is cut off or no
            safetensors; weights that the model lacks or that it lacks here, or of other shapes.
        ImportError: an extra that is not installed.
    """
    folder = Path(folder)
    if config is None:
        config = read_config(folder)
    files = _weight_files(folder)
    keys = {key for of_file in files.values() for key in of_file}
    device = torch.get_default_device() if device is None else torch.device(device)
    lm, vision = config.lm, config.vision
    if lang_model is None:
        lang_model = _part(
            "lang_model",
            keys,
            make_empty=lambda: _empty_lang_model(lm, device, dtype),
            make=lambda: make_lang_model(lm, device=device, dtype=dtype),
            is_elsewhere=lm.kind == "huggingface" and lm.name is not None and lm.is_pretrained,
        )
    if vision_encoder is None:
        without = dataclasses.replace(vision, is_pretrained=False)
        vision_encoder = _part(
            "vision_encoder",
            keys,
            make_empty=lambda: VisionEncoder(without, device=device, dtype=dtype),
            make=lambda: VisionEncoder(vision, device=device, dtype=dtype),
            is_elsewhere=vision.is_pretrained,
        )
    model = Flamingo(
        config, lang_model=lang_model, vision_encoder=vision_encoder, device="meta", dtype=dtype
    )
    if model.tokens is not None:
        model.tokens.token_ids = torch.tensor(model.tokens.ids, device=device)
    _check_keys(model, keys, folder)
    _read_weights(model, files, device, dtype)
    check_nothing_on_meta(model, f"{folder}: after loading, the model")
    return model.eval()


def _to_save(
    model: Flamingo, trainable_only: bool, state_dict: Mapping[str, torch.Tensor] | None
) -> dict[str, torch.Tensor]:
    if state_dict is None:
        check_nothing_on_meta(model, "model")
    state = model.state_dict() if state_dict is None else state_dict
    if trainable_only:
        frozen = _frozen_keys(model)
        state = {key: state[key] for key in state if key not in frozen}
    kept: dict[str, torch.Tensor] = {}
    seen = set()
    for key, tensor in state.items():
        place = (tensor.device, tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride())
        if tensor.numel() == 0 or place not in seen:
            kept[key] = tensor
        seen.add(place)
    return kept


def _frozen_keys(model: Flamingo) -> set[str]:
    """Frozen parameters of the parts that may come from elsewhere, and buffers of frozen parts."""
    frozen = set()
    for name in PARTS_FROM_ELSEWHERE:
        part = getattr(model, name)
        parameters = dict(part.named_parameters(remove_duplicate=False))
        is_frozen = not any(each.requires_grad for each in parameters.values())
        for key in part.state_dict():
            if is_frozen or (key in parameters and not parameters[key].requires_grad):
                frozen.add(f"{name}.{key}")
    return frozen


def _shards(state: Mapping[str, torch.Tensor], max_bytes: int) -> list[dict[str, torch.Tensor]]:
    shards: list[dict[str, torch.Tensor]] = [{}]
    size = 0
    for key, tensor in state.items():
        if shards[-1] and size + tensor.nbytes > max_bytes:
            shards.append({})
            size = 0
        shards[-1][key] = tensor
        size += tensor.nbytes
    return shards


def _index(names: Iterable[str], shards: Iterable[Mapping[str, torch.Tensor]]) -> str:
    by_name = dict(zip(names, shards, strict=True))
    total = sum(tensor.nbytes for shard in by_name.values() for tensor in shard.values())
    weight_map = {key: name for name, shard in by_name.items() for key in shard}
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    return json.dumps(index, indent=2) + "\n"


def _config_to_save(model: Flamingo) -> FlamingoConfig:
    lang_model: Any = model.lang_model
    if isinstance(lang_model, ChinchillaLM):
        lm = dataclasses.replace(lang_model.config, is_frozen=model.config.lm.is_frozen)
    else:
        lm = dataclasses.replace(
            model.config.lm, kind="huggingface", hf_config=hf_config_of(lang_model)
        )
    vision = dataclasses.replace(model.config.vision, is_frozen=model.vision_encoder.is_frozen)
    return dataclasses.replace(model.config, lm=lm, vision=vision)


def hf_config_of(lang_model: Any) -> dict[str, Any] | None:
    """What makes a language model of this class again; None: its config doesn't."""
    mapping = require("transformers").MODEL_FOR_CAUSAL_LM_MAPPING
    config = lang_model.config
    if type(config) not in mapping:
        return None
    classes = mapping[type(config)]
    if type(lang_model) not in (classes if isinstance(classes, tuple) else (classes,)):
        return None
    values = json.loads(config.to_json_string(use_diff=False))
    return {name: values[name] for name in values if name not in _NOT_OF_THE_MODEL}


def read_config(folder: Path) -> FlamingoConfig:
    """Of a folder that `save_pretrained` wrote.

    Raises:
        FileNotFoundError: no such folder, or no config.json in it.
        ConfigError: config.json is none.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"folder: expected one that save_pretrained wrote, got {folder}")
    path = folder / _CONFIG
    if not path.is_file():
        raise FileNotFoundError(f"{path}: expected the config of the model, there is no such file")
    try:
        return FlamingoConfig.from_file(path)
    except (ConfigError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: {error}") from None


def _weight_files(folder: Path) -> dict[Path, list[str]]:
    """The keys in each file."""
    if (folder / _INDEX).is_file():
        return _indexed_files(folder)
    if (folder / _WEIGHTS).is_file():
        with opened_safetensors(folder / _WEIGHTS) as file:
            return {folder / _WEIGHTS: list(file.keys())}
    pickles = sorted(each.name for each in folder.iterdir() if each.suffix in _PICKLES)
    if pickles:
        raise CheckpointError(
            f"{folder}: expected {_WEIGHTS}, got {', '.join(pickles)}. Loading a pickle may run "
            "any code that is in it, so these are not loaded. Where you trust them, load them "
            "yourself and save the model with save_pretrained; for OpenFlamingo's see "
            "load_open_flamingo"
        )
    shards = sorted(each.name for each in folder.glob(_SHARDS))
    found = f"; there is {shards[0]}, but not the index of such files" if shards else ""
    raise FileNotFoundError(f"{folder}: expected {_WEIGHTS} or {_INDEX}{found}")


def _indexed_files(folder: Path) -> dict[Path, list[str]]:
    path = folder / _INDEX
    try:
        weight_map = json.loads(path.read_text())["weight_map"]
        wanted: dict[str, list[str]] = {}
        for key, name in weight_map.items():
            wanted.setdefault(name, []).append(key)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"{path}: expected JSON with a weight_map from keys to files ({error!r})"
        ) from None
    outside = [name for name in wanted if Path(str(name)).name != name]
    if outside:
        raise CheckpointError(f"{path}: expected files of this folder, got {outside[0]}")
    missing = [name for name in wanted if not (folder / name).is_file()]
    if missing:
        raise FileNotFoundError(f"{path}: expected {', '.join(missing)} beside it, not there")
    files = {}
    for name, keys in wanted.items():
        with opened_safetensors(folder / name) as file:
            lacks = set(keys).difference(file.keys())
        if lacks:
            raise CheckpointError(
                f"{folder / name}: expected what {_INDEX} says is in it, lacks {some_of(lacks)}"
            )
        files[folder / name] = keys
    return files


@contextlib.contextmanager
def opened_safetensors(path: Path) -> Iterator[Any]:
    """The file, memory-mapped."""
    safetensors = require("safetensors")
    try:
        file = safetensors.safe_open(path, framework="pt")
    except safetensors.SafetensorError as error:
        raise CheckpointError(
            f"{path}: expected a whole file of safetensors, got one that is broken or cut off "
            f"({error})"
        ) from None
    with file:
        yield file


def _part(
    name: str,
    keys: set[str],
    *,
    make_empty: Callable[[], Any],
    make: Callable[[], Any],
    is_elsewhere: bool,
) -> Any:
    """Without weights if the files have them all; otherwise with them, if there is a source."""
    with _parameters_on_meta():
        empty = make_empty()
    if not is_elsewhere or not _missing(empty, keys, f"{name}."):
        return empty
    return make()


def _empty_lang_model(
    config: LanguageModelConfig, device: torch.device, dtype: torch.dtype | None
) -> nn.Module:
    if config.kind == "chinchilla":
        # It has no buffers, and its own way to allocate.
        return ChinchillaLM(config, device="meta", dtype=dtype)
    if config.hf_config is None and config.name is None:
        raise CheckpointError(
            "lang_model: expected to be given, since the config has neither lm.hf_config nor "
            "lm.name: its class is none that transformers makes"
        )
    return make_lang_model(
        dataclasses.replace(config, is_pretrained=False), device=device, dtype=dtype
    )


@contextlib.contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """Inside, parameters of new modules have no memory, but buffers do.

    Of buffers that no state dict has only their module knows the values.
    """

    def to_meta(module: nn.Module, name: str, parameter: nn.Parameter) -> nn.Parameter | None:
        # The same one again where it is tied.
        if parameter is None or parameter.is_meta:
            return None
        return nn.Parameter(parameter.detach().to("meta"), parameter.requires_grad)

    hook: Any = to_meta
    handle = register_module_parameter_registration_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def aliases_of(module: nn.Module) -> dict[str, list[str]]:
    """Of each parameter's name all names of that parameter."""
    groups: dict[int, list[str]] = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        groups.setdefault(id(parameter), []).append(name)
    return {name: names for names in groups.values() for name in names}


def _missing(module: nn.Module, keys: set[str], prefix: str = "") -> list[str]:
    """Keys of the module that `keys`, with a prefix, lack, under all of their names."""
    aliases = aliases_of(module)
    return [
        prefix + key
        for key in module.state_dict()
        if not any(prefix + alias in keys for alias in aliases.get(key, [key]))
    ]


def _check_keys(model: Flamingo, keys: set[str], folder: Path) -> None:
    aliases, expected = aliases_of(model), model.state_dict()
    missing = [
        key
        for key in _missing(model, keys)
        # What is there already, of a part that was given.
        if any(expected[alias].is_meta for alias in aliases.get(key, [key]))
    ]
    unexpected = sorted(keys.difference(expected))
    if not missing and not unexpected:
        return
    message = f"{folder}: its weights don't fit the model."
    if missing:
        message += f" The files lack {some_of(missing)}."
    if unexpected:
        message += f" The model has no {some_of(unexpected)}."
    for name in PARTS_FROM_ELSEWHERE:
        if any(key.startswith(f"{name}.") for key in (*missing, *unexpected)):
            message += (
                f" Give {name} if the config doesn't describe it, or if it was saved with "
                "trainable_only."
            )
    raise CheckpointError(message)


def some_of(keys: Iterable[str]) -> str:
    """The first few of them, for an error."""
    keys = sorted(keys)
    more = f" and {len(keys) - 5} more" if len(keys) > 5 else ""
    return ", ".join(keys[:5]) + more


@torch.no_grad()
def _read_weights(
    model: Flamingo,
    files: Mapping[Path, list[str]],
    device: torch.device,
    dtype: torch.dtype | None,
) -> None:
    aliases = aliases_of(model)
    targets = model.state_dict(keep_vars=True)
    done: dict[str, torch.Tensor] = {}
    for path, keys in files.items():
        state: dict[str, torch.Tensor] = {}
        with opened_safetensors(path) as file:
            for key in keys:
                target = targets[key]
                names = aliases.get(key, [key])
                if target.is_meta:
                    tensor = _moved(file.get_tensor(key), device, dtype)
                else:
                    tensor = _moved(file.get_tensor(key), target.device, target.dtype)
                if names[0] in done:
                    if not torch.equal(tensor, done[names[0]]):
                        raise CheckpointError(
                            f"{path}: {key} is tied to {names[0]} in the model, but they differ"
                        )
                    continue
                if len(names) > 1:
                    # One object, so that they stay tied.
                    tensor = nn.Parameter(tensor, target.requires_grad)
                    done[names[0]] = tensor
                state |= dict.fromkeys(names, tensor)
        try:
            model.load_state_dict(state, strict=False, assign=True)
        except RuntimeError as error:
            raise CheckpointError(f"{path}: {error}") from None


def _moved(tensor: torch.Tensor, device: torch.device, dtype: torch.dtype | None) -> torch.Tensor:
    return tensor.to(device, dtype if tensor.is_floating_point() else None)


def check_nothing_on_meta(model: nn.Module, what: str) -> None:
    """Refuses a model with tensors that have no values; `what` it came from."""
    tensors = (*model.named_parameters(), *model.named_buffers())
    on_meta = [name for name, tensor in tensors if tensor.is_meta]
    if on_meta:
        raise CheckpointError(f"{what} has no values of {some_of(on_meta)}: they are on meta")
