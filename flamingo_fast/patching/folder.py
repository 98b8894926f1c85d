"""A model of transformers in a folder, for a report of what `patch` would do."""

import json
import os
from pathlib import Path
from typing import Any

import torch
from torch import nn

from flamingo_fast.models.extras import require

_IN_PYTHON = "build it in Python and print flamingo_fast.patch(model, dry_run=True)"
# Of a FlamingoConfig.
_OURS = {"conditioning", "lm", "resampler", "vision"}


class FolderError(ValueError):
    """A folder with no model that can be built from its config; says why, and what to do."""


def model_of(folder: str | os.PathLike[str], *, with_weights: bool = False) -> nn.Module:
    """The model of a folder that transformers' `save_pretrained` wrote. Nothing is downloaded.

    Arguments:
        folder: with config.json; code in it is not run.
        with_weights: read them, too; otherwise the model is on the meta device.

    Raises:
        FolderError: another kind of folder, or a class that the installed transformers lacks.
        ImportError: an extra that is not installed.
    """
    path = Path(folder, "config.json")
    values = _read(path)
    transformers = require("transformers")
    cls = _class_of(path, values, transformers)
    try:
        if with_weights:
            return cls.from_pretrained(folder, local_files_only=True, dtype="auto").eval()
        config = transformers.AutoConfig.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False
        )
        with torch.device("meta"):
            return cls(config).eval()
    except ImportError:
        raise
    # Of configs that are wrong it raises all kinds.
    except Exception as error:
        reason = str(error).strip().partition("\n")[0]
        raise FolderError(
            f"{folder}: transformers {transformers.__version__} can't make a {cls.__name__} of it: "
            f"{type(error).__name__}: {reason}"
        ) from error


def _read(path: Path) -> dict[str, Any]:
    folder = path.parent
    if not folder.is_dir():
        got = "nothing"
        if folder.exists():
            got = f"a file; a checkpoint such as OpenFlamingo's names no model: {_IN_PYTHON}"
        raise FolderError(
            f"{folder}: expected a folder of transformers' save_pretrained, got {got}"
        )
    if not path.is_file():
        hint = ""
        if (folder / "adapter_config.json").is_file():
            hint = "; it has an adapter of PEFT: give the folder of the model that it adapts"
        elif any(each.suffix in (".pt", ".pth") for each in folder.iterdir()):
            hint = f"; of a checkpoint such as OpenFlamingo's, {_IN_PYTHON}"
        raise FolderError(f"{path}: expected the model's config, there is no such file{hint}")
    try:
        values = json.loads(path.read_text())
    except ValueError as error:
        raise FolderError(f"{path}: expected JSON ({error})") from None
    if not isinstance(values, dict):
        raise FolderError(f"{path}: expected a JSON object, got {type(values).__name__}")
    if values.keys() >= _OURS:
        raise FolderError(
            f"{folder}: a model of flamingo_fast's own save_pretrained, whose modules are the fast "
            "ones already"
        )
    return values


def _class_of(path: Path, values: dict[str, Any], transformers: Any) -> Any:
    names = values.get("architectures")
    if not isinstance(names, list) or not names or not isinstance(names[0], str):
        raise FolderError(
            f"{path}: expected the model's class as architectures, got {names!r}; {_IN_PYTHON}"
        )
    cls = getattr(transformers, names[0], None)
    if not isinstance(cls, type) or not hasattr(cls, "from_pretrained"):
        where = "; code in the folder is not run" if "auto_map" in values else ""
        raise FolderError(
            f"{path}: transformers {transformers.__version__} has no class {names[0]}{where}; "
            + _IN_PYTHON
        )
    return cls
