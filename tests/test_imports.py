"""What imports what: a bare import stays light, missing packages stop nothing else."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest
from fresh_venv import ROOT

PACKAGE = ROOT / "flamingo_fast"

EXTRAS = (
    *("timm", "torchvision", "transformers", "safetensors", "tokenizers", "PIL", "av"),
    *("webdataset", "yaml", "sklearn"),
    *("matplotlib", "pytest", "pytest_benchmark"),
    *("nvtx", "flash_attn", "xformers", "liger_kernel", "einops", "einops_exts"),
    *("peft", "accelerate"),
)


def modules() -> dict[str, Path]:
    """Every module of the package by name, the linked folders' too; not bench.suite's."""
    found = {}
    for top in (PACKAGE, *filter(Path.is_symlink, PACKAGE.iterdir())):
        for file in top.rglob("*.py"):
            relative = file.relative_to(PACKAGE.parent).with_suffix("")
            if relative.parts[1:3] != ("bench", "suite"):
                found[".".join(relative.parts).removesuffix(".__init__")] = file
    return found


def run_python(program: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=120
    )


def test_bare_import_is_light() -> None:
    heavy = {"triton", "typer", "rich", *EXTRAS}
    result = run_python(f"import sys, flamingo_fast; print(sorted({heavy!r} & set(sys.modules)))")
    assert result.stdout == "[]\n", result.stdout + result.stderr


def _import_all_without(blocked: tuple[str, ...], names: list[str]) -> None:
    result = run_python(
        "import importlib, sys\n"
        f"sys.modules.update(dict.fromkeys({blocked!r}))\n"
        f"for name in {names!r}: importlib.import_module(name)\n"
    )
    assert result.returncode == 0, result.stderr


def test_everything_imports_without_the_extras() -> None:
    pytest.importorskip("triton")
    _import_all_without(EXTRAS, sorted(modules()))


def test_all_but_device_code_and_its_harness_imports_without_triton() -> None:
    need_triton = ("flamingo_fast.kernels.", "flamingo_fast.testing.")
    names = sorted(name for name in modules() if not name.startswith(need_triton))
    _import_all_without(("triton", *EXTRAS), names)


def test_without_triton_ops_run_and_triton_is_refused_by_name() -> None:
    result = run_python("""
import sys
sys.modules["triton"] = None
import torch, flamingo_fast
x = torch.tensor([-1.0, 3.0])
for impl in ("auto", "torch", "reference"):
    assert flamingo_fast.squared_relu(x, impl=impl).tolist() == [0.0, 9.0]
try:
    flamingo_fast.squared_relu(x, impl="triton")
except flamingo_fast.BackendUnavailableError as error:
    print(error)
""")
    assert "Triton is not installed" in result.stdout, result.stdout + result.stderr


def test_the_contract_of_layers_has_every_linked_folder() -> None:
    """import-linter leaves out what has no __init__.py, silently, unless it is named."""
    config = (ROOT / "pyproject.toml").read_text()
    roots = config[config.index("root_packages = [") :].partition("]")[0]
    links = {f"flamingo_fast.{link.name}" for link in PACKAGE.iterdir() if link.is_symlink()}
    assert set(re.findall(r'"(.+?)"', roots)) == {"flamingo_fast"} | links


@pytest.mark.parametrize("name", ["reference", "layout", "schedule"])
def test_reference_imports_torch_only(name: str) -> None:
    own = f"flamingo_fast.{name}"
    files = [file for module, file in modules().items() if f"{module}.".startswith(f"{own}.")]
    nodes = [node for file in files for node in ast.walk(ast.parse(file.read_text()))]
    imports = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    imports |= {node.module for node in nodes if isinstance(node, ast.ImportFrom)}
    imports = {module for module in imports if not f"{module}.".startswith(f"{own}.")}
    imports -= {"flamingo_fast.layout", "flamingo_fast.schedule", "flamingo_fast.watchers"}
    # What MediaLayout.plot imports when it is called.
    imports -= {"matplotlib"}
    assert {name.partition(".")[0] for name in imports} - set(sys.stdlib_module_names) == {"torch"}
