"""What `export-kernels` writes, by itself and as Hugging Face's `kernels` uses it."""

import ast
import importlib.util
import json
import sys
from importlib import metadata
from pathlib import Path

import pytest
import torch
from fresh_venv import ROOT, create_venv, run
from packaging.version import Version
from typer.testing import CliRunner

import flamingo_fast
from flamingo_fast.cli import app
from flamingo_fast.hub.export import BACKENDS, export

# Where `make install` puts that library: in the environment, transformers would find it.
HUB = Path(sys.prefix) / "hub"
CHECKS = (
    *("training", "inference", "autocast", "compiled"),
    *("beside_each_other", "triton_kernels", "metadata", "readme"),
)


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("export") / "repository"
    result = CliRunner().invoke(app, ["export-kernels", str(folder)])
    assert result.exit_code == 0, result.output
    return folder


@pytest.fixture(scope="module")
def results(repository: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str | None]:
    """What tests/hub_checks.py says in an environment that has the library."""
    pytest.importorskip("triton")
    pytest.importorskip("transformers")
    if Version(metadata.version("huggingface_hub")) < Version("1.10"):
        pytest.skip("kernels takes huggingface_hub 1.10, and transformers 4 an older one")
    if not (HUB / "kernels").is_dir():
        pytest.skip(f"Hugging Face's kernels is not in {HUB}: `make install` puts it there")
    venv = create_venv(tmp_path_factory.mktemp("venv") / "venv", without=("kernels", "kernels-*"))
    for path in HUB.glob("kernels*"):
        (venv.path / "packages" / path.name).symlink_to(path)
    environment = {
        "PYTHONPATH": str(ROOT),
        "PYTHONDONTWRITEBYTECODE": "1",
        "OMP_NUM_THREADS": "1",
        "USE_HUB_KERNELS": "0",
        "HF_HUB_OFFLINE": "1",
    }
    checks = ROOT / "tests" / "hub_checks.py"
    printed = run(venv.python, checks, repository, cwd=venv.path, **environment)
    return json.loads(printed.splitlines()[-1])


@pytest.mark.parametrize("check", CHECKS)
def test_in_hugging_face_kernels(check: str, results: dict[str, str | None]) -> None:
    assert set(results) == set(CHECKS)
    assert results[check] is None, results[check]


def _files(folder: Path) -> dict[Path, bytes]:
    return {
        path.relative_to(folder): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and path.suffix != ".pyc"
    }


def test_same_bytes_twice(repository: Path, tmp_path: Path) -> None:
    written = export(tmp_path)
    files = _files(tmp_path)
    assert set(files) == set(written)
    assert files == _files(repository)
    assert files[Path("LICENSE")] == (ROOT / "LICENSE").read_bytes()


def test_imports_are_relative(repository: Path) -> None:
    """Of the repository, and of others only PyTorch, Triton and what is optional."""
    known = {*sys.stdlib_module_names, "torch", "triton", "matplotlib", "xformers"}
    for path in repository.rglob("*.py"):
        depth = len(path.relative_to(repository / "build").parts) - 1
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                assert {alias.name.partition(".")[0] for alias in node.names} <= known, path
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                assert (node.module or "").partition(".")[0] in known, path
            elif isinstance(node, ast.ImportFrom):
                assert node.level <= depth, path


def test_holds_ops_and_what_they_need(repository: Path) -> None:
    for backend in BACKENDS:
        variant = repository / "build" / f"torch-{backend}"
        files = {path.relative_to(variant).as_posix() for path in variant.rglob("*.py")}
        ops = {f"ops/{path.name}" for path in (ROOT / "flamingo_fast" / "ops").glob("*.py")}
        kernels = {f"kernels/{path.name}" for path in (ROOT / "kernels").glob("*.py")}
        assert files >= ops | kernels | {"__init__.py", "layers.py"}
        tops = {name.partition("/")[0] for name in files if "/" in name}
        assert tops == {"ops", "kernels", "layout", "modules"}
        assert {name for name in files if name.startswith("modules/")} == {
            *("modules/__init__.py", "modules/media_layouts.py"),
        }


def test_loads_under_any_name(repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = repository / "build" / "torch-rocm" / "__init__.py"
    spec = importlib.util.spec_from_file_location("any_name", file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "any_name", module)
    spec.loader.exec_module(module)
    assert module.__version__ == flamingo_fast.__version__
    assert all(hasattr(module, name) for name in module.__all__)
    x, gate = torch.randn(3, 8), torch.randn(1)
    out = module.gated_residual(x, x, gate)
    assert torch.equal(out, flamingo_fast.gated_residual(x, x, gate))
    for name in [name for name in sys.modules if name.startswith("any_name.")]:
        monkeypatch.delitem(sys.modules, name)


def test_layers_say_what_they_can(repository: Path) -> None:
    """`kernelize` would go by the defaults of what is missing: a backward, but no torch.compile."""
    text = (repository / "build" / "torch-cpu" / "layers.py").read_text()
    layers = [node for node in ast.parse(text).body if isinstance(node, ast.ClassDef)]
    assert layers
    readme = (repository / "README.md").read_text()
    for layer in layers:
        flags = {
            ast.unparse(node.target): ast.unparse(node.value)
            for node in layer.body
            if isinstance(node, ast.AnnAssign) and node.value is not None
        }
        assert flags == {"has_backward": "True", "can_torch_compile": "True"}, layer.name
        assert f"| `{layer.name}` |" in readme


def test_refuses_a_folder_with_files(tmp_path: Path) -> None:
    (tmp_path / "mine").touch()
    result = CliRunner().invoke(app, ["export-kernels", str(tmp_path)])
    assert result.exit_code == 2
    assert "expected an empty folder" in " ".join(result.output.replace("│", " ").split())
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]
    result = CliRunner().invoke(app, ["export-kernels", str(tmp_path / "mine")])
    assert result.exit_code == 2
    with pytest.raises(ValueError, match="dir: expected an empty folder"):
        export(tmp_path)
