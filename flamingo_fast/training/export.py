"""A trained model as a folder that `Flamingo.from_pretrained` and the commands take."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from flamingo_fast.models.flamingo import Flamingo
from flamingo_fast.models.saving import aliases_of, save_pretrained
from flamingo_fast.training.checkpoints import is_first_rank, on_first_rank
from flamingo_fast.training.pieces import whole


def export(model: Flamingo, tokenizer: Any, folder: Path, dtype: torch.dtype) -> None:
    """Writes a model, sharded or not, and its tokenizer; all ranks call it.

    Arguments:
        model: whose weights are put together on the first rank's CPU.
        tokenizer: with the model's tokens.
        folder: made if it is not there.
        dtype: of all floating point parameters, as the model computes; fp32 weights are in
            checkpoints.

    Raises:
        OSError: it can't be written.
    """
    state = _whole_state(model, dtype)

    def write() -> None:
        with _as_os_errors(folder):
            save_pretrained(model, folder, state_dict=state)
            tokenizer.save_pretrained(folder)

    on_first_rank(write)


@torch.no_grad()
def _whole_state(model: Flamingo, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """On the first rank; the others help."""
    # Taken first: it puts what a forward has left gathered back into shards.
    state = model.state_dict()
    aliases = aliases_of(model)
    by_name = {}
    for name, tensor in state.items():
        # Of tied weights the first name is enough.
        if aliases.get(name, [name])[0] != name:
            continue
        tensor = whole(tensor)
        if is_first_rank():
            is_parameter = name in aliases and tensor.is_floating_point()
            by_name[name] = tensor.to("cpu", dtype if is_parameter else None)
    return by_name


@contextlib.contextmanager
def _as_os_errors(folder: Path) -> Iterator[None]:
    """safetensors has an error of its own for a full disk."""
    try:
        yield
    except OSError:
        raise
    except Exception as error:
        if type(error).__name__ != "SafetensorError":
            raise
        raise OSError(f"can't write {folder}: {' '.join(str(error).split())}") from error
