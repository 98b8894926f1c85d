"""What imports what: a bare import stays light, missing packages stop nothing else, layers hold."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest
from fresh_venv import ROOT

PACKAGE = ROOT / "flamingo_fast"

# Lowest first; a module imports its own layer and those before it. `flamingo_fast` is the package's
# __init__.py, which offers what the layers before it have.
LAYERS = (
    {"reference", "schedule", "layout", "namespace", "nvtx", "ranges", "watchers", "gpus"},
    {"kernels"},
    {"ops"},
    {"modules"},
    {"models"},
    {"training", "patching"},
    {"flamingo_fast"},
    {"testing", "doctor", "hub"},
    {"bench", "profiling"},
    {"cli"},
)

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


def layer_of(module: str) -> int:
    parts = module.split(".")
    top = parts[1] if len(parts) > 1 else parts[0]
    ranks = [rank for rank, tops in enumerate(LAYERS) if top in tops]
    assert ranks, f"{module}: no layer; add {top!r} to LAYERS"
    return ranks[0]


def imported_modules(name: str, file: Path) -> set[str]:
    """The package's modules that `file` imports, inside functions too."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name}: relative import, line {node.lineno}"
            # `from flamingo_fast import reference` imports a module, not a name of __init__.py.
            submodules = {f"{node.module}.{alias.name}" for alias in node.names} & set(modules())
            found |= submodules or {node.module or ""}
    return {module for module in found if module.partition(".")[0] == "flamingo_fast"}


@pytest.mark.parametrize("name", sorted(set(modules()) - {"flamingo_fast"}))
def test_nothing_imports_upward(name: str) -> None:
    upward = {
        module
        for module in imported_modules(name, modules()[name])
        if layer_of(module) > layer_of(name)
    }
    assert not upward, f"{name} imports {sorted(upward)}, which are above it"


@pytest.mark.parametrize("name", ["reference", "layout", "schedule"])
def test_reference_imports_torch_only(name: str) -> None:
    tree = ast.parse((PACKAGE / f"{name}.py").read_text())
    imports = {
        alias.name
        for node in ast.walk(tree)
        if isinstance(node, ast.Import)
        for alias in node.names
    }
    imports |= {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    # What MediaLayout.plot imports when it is called.
    imports -= {f"flamingo_fast.{name}" for name in ("layout", "namespace", "schedule", "watchers")}
    imports -= {"matplotlib"}
    assert {name.partition(".")[0] for name in imports} - set(sys.stdlib_module_names) == {"torch"}
