"""Every way of installing and of not installing the package, and what its archives hold."""

import dataclasses
import importlib.util
import json
import re
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
from fresh_venv import ROOT, FreshVenv, copy_repository, create_venv, repository_files, run

# Uses each part that installs differently and prints where it came from.
PROBE = """
import importlib.resources, importlib.util, inspect, json
import torch
import flamingo_fast, flamingo_fast.bench

assert flamingo_fast.squared_relu(torch.tensor([-1.0, 3.0])).tolist() == [0.0, 9.0]
data = importlib.resources.files("flamingo_fast.bench") / "data"
assert (data / "table3.csv").read_text().startswith("group,row,")
kernel = importlib.util.find_spec("flamingo_fast.kernels.squared_relu")
if importlib.util.find_spec("triton"):
    import flamingo_fast.kernels.squared_relu as module
    # Triton compiles what inspect finds.
    assert "@triton.jit" in inspect.getsource(module)
print(json.dumps([flamingo_fast.__file__, kernel.origin]))
"""


def imported_from(venv: FreshVenv, cwd: Path, **environment: str) -> tuple[Path, Path]:
    """The real folders of flamingo_fast and flamingo_fast.kernels as seen from `cwd`."""
    package, kernel = json.loads(run(venv.python, "-c", PROBE, cwd=cwd, **environment))
    return Path(package).resolve().parent, Path(kernel).resolve().parent


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the repository. Nothing is built in it."""
    return copy_repository(tmp_path_factory.mktemp("repository") / "flamingo_fast")


@pytest.fixture
def venv(tmp_path: Path) -> FreshVenv:
    return create_venv(tmp_path / "venv")


@pytest.fixture
def elsewhere(tmp_path: Path) -> Path:
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    return folder


@dataclasses.dataclass(frozen=True)
class Archives:
    """`files` are those of the repository that both were made from."""

    files: list[Path]
    sdist: Path
    wheel: Path


@pytest.fixture(scope="module")
def archives(tmp_path_factory: pytest.TempPathFactory) -> Archives:
    """The sdist and the wheel built from that sdist."""
    folder = tmp_path_factory.mktemp("archives")
    checkout = copy_repository(folder / "checkout")
    files = repository_files(checkout)
    build = (sys.executable, "-m", "build", "--no-isolation", "--outdir", folder / "dist")
    run(*build, cwd=checkout)
    (sdist,) = (folder / "dist").glob("*.tar.gz")
    (wheel,) = (folder / "dist").glob("*.whl")
    return Archives(files, sdist, wheel)


def test_pip_install(venv: FreshVenv, tmp_path: Path, elsewhere: Path) -> None:
    checkout = copy_repository(tmp_path / "checkout")
    venv.pip_install(checkout, cwd=elsewhere)
    package, kernels = imported_from(venv, elsewhere)
    assert package.is_relative_to(venv.path.resolve())
    assert kernels == package / "kernels"
    # At the root the checkout comes first on sys.path.
    checkout_folders = (checkout / "flamingo_fast", checkout / "kernels")
    assert imported_from(venv, checkout) == checkout_folders


def test_editable_install(venv: FreshVenv, tmp_path: Path, elsewhere: Path) -> None:
    checkout = copy_repository(tmp_path / "checkout")
    venv.pip_install("--editable", checkout, cwd=elsewhere)
    checkout_folders = (checkout / "flamingo_fast", checkout / "kernels")
    assert imported_from(venv, elsewhere) == checkout_folders
    assert imported_from(venv, checkout) == checkout_folders
    # A file that came after the installation.
    (checkout / "kernels" / "added.py").write_text("VALUE = 7\n")
    program = "from flamingo_fast.kernels.added import VALUE; print(VALUE)"
    assert run(venv.python, "-c", program, cwd=elsewhere) == "7\n"


def test_wheel_of_sdist_installs(venv: FreshVenv, archives: Archives, elsewhere: Path) -> None:
    venv.pip_install(archives.wheel, cwd=elsewhere)
    package, _ = imported_from(venv, elsewhere)
    assert package.is_relative_to(venv.path.resolve())
    version = run(venv.path / "bin" / "flamingo-fast", "--version", cwd=elsewhere).strip()
    assert archives.wheel.name == f"flamingo_fast-{version}-py3-none-any.whl"


def test_uninstalled(venv: FreshVenv, tree: Path, elsewhere: Path) -> None:
    folders = (tree / "flamingo_fast", tree / "kernels")
    assert imported_from(venv, tree) == folders
    assert imported_from(venv, elsewhere, PYTHONPATH=str(tree)) == folders


def test_without_triton_installed(tmp_path: Path, tree: Path) -> None:
    venv = create_venv(tmp_path / "venv", without=("triton*",))
    assert imported_from(venv, tree) == (tree / "flamingo_fast", tree / "kernels")


def _install_hugging_face_kernels(venv: FreshVenv) -> Path:
    """Adds a distribution that transformers takes for Hugging Face's `kernels`; returns its module.

    The real one has versions that only some transformers look at; this one always suits.
    """
    (transformers,) = importlib.util.find_spec("transformers").submodule_search_locations
    source = (Path(transformers) / "utils" / "import_utils.py").read_text()
    least = re.search(r'KERNELS_MIN_VERSION = "(.+)"', source)
    if least is None:
        pytest.skip("transformers 4 does without a `kernels` that lacks what it looks for")
    version = least.group(1)
    packages = venv.path / "packages"
    module = packages / "kernels" / "__init__.py"
    module.parent.mkdir()
    module.write_text(
        "def __getattr__(name):\n"
        "    if name.startswith('__'):\n"
        "        raise AttributeError(name)\n"
        "    return type(name, (), {})\n"
    )
    metadata = packages / f"kernels-{version}.dist-info" / "METADATA"
    metadata.parent.mkdir()
    metadata.write_text(f"Metadata-Version: 2.1\nName: kernels\nVersion: {version}\n")
    return module


def test_beside_hugging_face_kernels(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    checkout = copy_repository(tmp_path / "checkout")
    venv = create_venv(tmp_path / "venv", without=("kernels", "kernels-*"))
    module = _install_hugging_face_kernels(venv)
    program = (
        "from transformers import OPTForCausalLM; import flamingo_fast, kernels; "
        "print(kernels.__file__)"
    )
    # Else transformers decorates its models with functions that this `kernels` lacks.
    hub = {"USE_HUB_KERNELS": "0", "HF_HUB_OFFLINE": "1"}
    assert run(venv.python, "-c", program, cwd=checkout, **hub).strip() == str(module)

    # What the missing __init__.py is for.
    (checkout / "kernels" / "__init__.py").touch()
    with pytest.raises(AssertionError, match="cannot import name .* from 'kernels'"):
        run(venv.python, "-c", program, cwd=checkout, **hub)


def _belongs_in_wheel(file: Path) -> bool:
    if file.parts[0] == "flamingo_fast":
        return file.suffix == ".py" or file.name == "py.typed"
    if file.parts[0] not in ("kernels", "bench", "profiling") or file.parts[1] == "suite":
        return False
    return file.suffix == ".py" or file.match("kernels/goldens/*.json") or file.match("data/*.csv")


def test_wheel_holds_the_package_and_its_data_only(archives: Archives) -> None:
    expected = {
        file if file.parts[0] == "flamingo_fast" else "flamingo_fast" / file
        for file in archives.files
        if _belongs_in_wheel(file)
    }
    with zipfile.ZipFile(archives.wheel) as wheel:
        names = [Path(name) for name in wheel.namelist()]
    metadata = {name for name in names if name.parts[0].endswith(".dist-info")}
    assert set(names) - metadata == expected
    assert {"METADATA", "LICENSE", "entry_points.txt"} <= {name.name for name in metadata}
    data = {name for name in expected if name.suffix in (".csv", ".json")}
    assert Path("flamingo_fast/bench/data/table3.csv") in data
    assert any(name.match("flamingo_fast/kernels/goldens/*.json") for name in data)


def test_sdist_holds_what_the_wheel_is_built_from(archives: Archives) -> None:
    with tarfile.open(archives.sdist) as sdist:
        tops = {Path(name).parts[1] for name in sdist.getnames() if "/" in name}
    assert tops - {"flamingo_fast.egg-info", "setup.cfg"} == {
        *("flamingo_fast", "pyproject.toml", "setup.py", "MANIFEST.in"),
        *("LICENSE", "README.md", "PKG-INFO"),
    }


def test_symlinks_are_relative_and_stay_inside() -> None:
    links = {
        file: (ROOT / file).readlink() for file in repository_files() if (ROOT / file).is_symlink()
    }
    for file, target in links.items():
        assert not target.is_absolute(), f"{file} -> {target}"
        assert (ROOT / file).resolve(strict=True).is_relative_to(ROOT), f"{file} -> {target}"
    assert {str(file) for file in links} >= {
        "flamingo_fast/kernels",
        "flamingo_fast/bench",
        "flamingo_fast/profiling",
    }


@pytest.mark.parametrize("folder", ["kernels", "bench", "profiling", "tests"])
def test_folders_are_no_packages(folder: str) -> None:
    assert not (ROOT / folder / "__init__.py").exists()


def test_nothing_mentions_a_machine() -> None:
    # In parts, so that this file passes.
    forbidden = ["../" + "shared", "pypi." + "org", "python" + "hosted"]
    forbidden += [f"/{folder}/" for folder in ("work", "root", "tmp", "home")]
    for file in repository_files():
        path = ROOT / file
        if path.is_symlink():
            continue
        text = path.read_text(encoding="utf-8", errors="replace")
        found = [word for word in forbidden if word in text]
        assert not found, f"{file} mentions {found}"


def test_ruff_bans_top_level_imports() -> None:
    source = "import bench.work\nimport flamingo_fast.kernels.launch\nfrom kernels import launch\n"
    result = subprocess.run(
        [sys.executable, "-m", "ruff", "check", "--output-format=concise", "--select=TID251", "-"],
        cwd=ROOT,
        input=source,
        capture_output=True,
        text=True,
    )
    banned = [line.split(":")[1] for line in result.stdout.splitlines() if "TID251" in line]
    assert banned == ["1", "3"], result.stdout + result.stderr
