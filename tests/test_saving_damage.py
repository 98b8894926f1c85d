"""from_pretrained of folders that are not whole, and files that are not what they should be."""

import os
import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from saving_cases import make_model

from flamingo_fast.models.config import ConfigError
from flamingo_fast.models.saving import CheckpointError, from_pretrained, save_pretrained


def _folder(tmp_path: Path, **options) -> Path:
    save_pretrained(make_model(), tmp_path, **options)
    return tmp_path


def test_no_folder(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"folder: expected.*nowhere"):
        from_pretrained(tmp_path / "nowhere")


def test_no_config(tmp_path: Path) -> None:
    folder = _folder(tmp_path)
    (folder / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"config\.json"):
        from_pretrained(folder)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", r"config\.json: config: expected JSON"),
        ('{"resampler": {"depht": 3}}', r"config\.json: resampler\.depht: there is no such field"),
        ('{"image_token_id": "x"}', r"config\.json: image_token_id: expected int"),
    ],
)
def test_bad_config(text: str, message: str, tmp_path: Path) -> None:
    folder = _folder(tmp_path)
    (folder / "config.json").write_text(text)
    with pytest.raises(ConfigError, match=message):
        from_pretrained(folder)


def test_no_weights(tmp_path: Path) -> None:
    folder = _folder(tmp_path)
    (folder / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"expected model\.safetensors or"):
        from_pretrained(folder)


class _Exploit:
    def __reduce__(self):
        return (os.mkdir, (str(self.path),))


@pytest.mark.parametrize("name", ["pytorch_model.bin", "checkpoint.pt", "model.pth"])
def test_pickles_are_refused_unread(name: str, tmp_path: Path) -> None:
    folder = _folder(tmp_path)
    (folder / "model.safetensors").unlink()
    exploit = _Exploit()
    exploit.path = tmp_path / "was here"
    (folder / name).write_bytes(pickle.dumps(exploit))
    with pytest.raises(CheckpointError, match=rf"{name}.*pickle may run any code"):
        from_pretrained(folder)
    assert not exploit.path.exists()


@pytest.mark.parametrize("left", [0.0, 0.0001, 0.5, 0.999])
def test_truncated_file(left: float, tmp_path: Path) -> None:
    folder = _folder(tmp_path)
    path = folder / "model.safetensors"
    os.truncate(path, int(left * path.stat().st_size))
    with pytest.raises(CheckpointError, match=r"model\.safetensors: expected a whole file"):
        from_pretrained(folder)


def test_truncated_shard(tmp_path: Path) -> None:
    folder = _folder(tmp_path, max_shard_bytes=100_000)
    path = sorted(folder.glob("model-*.safetensors"))[1]
    os.truncate(path, path.stat().st_size - 1)
    with pytest.raises(CheckpointError, match=f"{path.name}: expected a whole file"):
        from_pretrained(folder)


def test_missing_shard(tmp_path: Path) -> None:
    folder = _folder(tmp_path, max_shard_bytes=100_000)
    path = sorted(folder.glob("model-*.safetensors"))[1]
    path.unlink()
    with pytest.raises(FileNotFoundError, match=f"expected {path.name} beside it"):
        from_pretrained(folder)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{}", "weight_map"),
        ("[]", "weight_map"),
        ("{", "weight_map"),
        ('{"weight_map": {"a": 3}}', "files of this folder, got 3"),
        ('{"weight_map": {"a": "../a.safetensors"}}', "files of this folder"),
    ],
)
def test_bad_index(text: str, message: str, tmp_path: Path) -> None:
    folder = _folder(tmp_path, max_shard_bytes=100_000)
    (folder / "model.safetensors.index.json").write_text(text)
    with pytest.raises(CheckpointError, match=rf"index\.json: expected.*{message}"):
        from_pretrained(folder)


def test_a_shard_of_another_save(tmp_path: Path) -> None:
    folder = _folder(tmp_path, max_shard_bytes=100_000)
    first, second, *_ = sorted(folder.glob("model-*.safetensors"))
    second.write_bytes(first.read_bytes())
    with pytest.raises(CheckpointError, match=f"{second.name}: expected what .* lacks"):
        from_pretrained(folder)


def _edited(folder: Path, edit) -> Path:
    path = folder / "model.safetensors"
    state = load_file(path)
    edit(state)
    save_file(state, path)
    return folder


def test_missing_and_unexpected_keys(tmp_path: Path) -> None:
    def edit(state):
        state["resampler.latent"] = state.pop("resampler.latents")

    folder = _edited(_folder(tmp_path), edit)
    with pytest.raises(
        CheckpointError, match=r"files lack resampler\.latents\..* has no resampler\.latent\."
    ):
        from_pretrained(folder)


def test_many_missing_keys_are_counted(tmp_path: Path) -> None:
    folder = _edited(
        _folder(tmp_path),
        lambda state: [state.pop(key) for key in [*state] if key.startswith("conditioning.")],
    )
    with pytest.raises(CheckpointError, match=r"conditioning\..* and \d\d more"):
        from_pretrained(folder)


def test_another_shape(tmp_path: Path) -> None:
    folder = _edited(
        _folder(tmp_path), lambda state: state.update({"resampler.latents": torch.zeros(4, 16)})
    )
    with pytest.raises(
        CheckpointError, match=r"(?s)model\.safetensors: .*resampler\.latents.*\[4, 16\].*\[3, 16\]"
    ):
        from_pretrained(folder)
