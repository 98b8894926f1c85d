"""What imports what: a bare import stays light, missing packages stop nothing else."""

import ast
import functools
import re
import subprocess
import sys
from pathlib import Path

import pytest
from fresh_venv import ROOT

import flamingo_fast

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


@functools.cache
def imported_by(program: str) -> frozenset[str]:
    """Modules that a fresh interpreter has after `program` and not before, the library's aside."""
    result = run_python(
        f"import sys; before = set(sys.modules)\n{program}\n"
        "print(*sorted(set(sys.modules) - before), file=sys.stderr)"
    )
    assert result.returncode == 0, result.stderr
    names = result.stderr.splitlines()[-1].split()
    return frozenset(n for n in names if n.partition(".")[0] not in sys.stdlib_module_names)


def test_a_bare_import_is_of_one_module() -> None:
    assert imported_by("import flamingo_fast") == {"flamingo_fast"}


@pytest.mark.parametrize("name", ["MediaLayout", "patch", "use_impl", "patching", "layout"])
def test_a_name_brings_pytorch_and_a_few_packages_of_ours(name: str) -> None:
    found = imported_by(f"import flamingo_fast; flamingo_fast.{name}")
    beyond = found - imported_by("import torch")
    packages = {".".join(module.split(".")[:2]) for module in beyond} - {"flamingo_fast"}
    allowed = {"layout", "modules", "ops", "patching", "ranges", "reference", "schedule"}
    assert packages <= {f"flamingo_fast.{each}" for each in (*allowed, "namespace", "watchers")}
    assert "torch" in found and hasattr(flamingo_fast, name)


def test_help_imports_the_command_and_what_prints_it() -> None:
    found = imported_by(
        "sys.argv = ['flamingo-fast', '--help']\n"
        "from flamingo_fast.cli import main\n"
        "try: main()\n"
        "except SystemExit as exit: assert not exit.code"
    )
    ours = {name for name in found if name.startswith("flamingo_fast")}
    commands = {f"flamingo_fast.cli.{file.stem}" for file in (PACKAGE / "cli").glob("[a-z]*.py")}
    assert ours == {"flamingo_fast", "flamingo_fast.cli"} | commands
    printing = {"typer", "rich", "click", "shellingham", "annotated_doc", "typing_extensions"}
    printing |= {"pygments", "markdown_it", "mdurl", "colorama"}
    assert {name.partition(".")[0] for name in found - ours} <= printing


def test_whatever_is_asked_for_first_all_names_are_there() -> None:
    result = run_python("""
import flamingo_fast, torch
assert set(flamingo_fast.__all__) <= set(dir(flamingo_fast))
flamingo_fast.squared_relu
assert set(flamingo_fast.__all__) <= set(vars(flamingo_fast))
assert len([name for name in dir(torch.ops.flamingo_fast) if name.endswith("_fwd")]) >= 7
try:
    flamingo_fast.nothing
except AttributeError as error:
    print(error)
""")
    expected = "module 'flamingo_fast' has no attribute 'nothing'\n"
    assert result.stdout == expected, result.stdout + result.stderr


def test_the_first_use_of_a_name_may_be_inside_compiled_code() -> None:
    result = run_python("""
import torch, flamingo_fast
function = lambda x: flamingo_fast.squared_relu(x, impl="torch")
compiled = torch.compile(function, fullgraph=True, backend="eager")
print(compiled(torch.tensor([-1.0, 3.0])).tolist())
""")
    assert result.stdout == "[0.0, 9.0]\n", result.stdout + result.stderr


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
    imports -= {f"flamingo_fast.{each}" for each in ("layout", "namespace", "schedule", "watchers")}
    # What MediaLayout.plot imports when it is called.
    imports -= {"matplotlib"}
    assert {name.partition(".")[0] for name in imports} - set(sys.stdlib_module_names) == {"torch"}
