"""A repository for Hugging Face's `kernels`, made of the sources as they are.

The library loads a folder under a name that it chooses, and several of them into one process, ours
perhaps beside the installed package. So imports become relative, and ops are registered under the
id in the folder's metadata, which has a hash of the sources. Imports and that name are all that is
changed; what else is in the files stays, letter for letter.
"""

import ast
import base64
import hashlib
import importlib.metadata
import json
from collections.abc import Iterator, Mapping
from pathlib import Path

import flamingo_fast

PACKAGE = Path(flamingo_fast.__file__).parent
_NAME = "flamingo_fast"
_LAYERS = "hub/layers.py"
_TITLE = "Ops of Flamingo-style models (arXiv 2204.14198) and layers of them"
# One folder each, as kernel-builder has them of kernels without compiled code; all of the same
# files, but that two of them may be loaded into one process.
BACKENDS = ("cpu", "cuda", "rocm")


def export(folder: Path) -> list[Path]:
    """Writes the repository into `folder`, which is made if it isn't there.

    The same sources give the same bytes.

    Returns:
        The files, relative to `folder`.

    Raises:
        ValueError: `folder` is not empty, or no folder.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"dir: expected an empty folder, or none yet; got {folder}, which is not")
    files = repository()
    for name, text in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(text.encode())
    return [Path(name) for name in files]


def repository() -> dict[str, str]:
    """The text of every file of the repository by its path."""
    sources = _closure()
    names = {name: "layers.py" if name == _LAYERS else name for name in sources}
    package = {names[name]: _relative(text, names[name]) for name, text in sources.items()}
    package["__init__.py"] = _init()
    for folder in sorted({Path(name).parent for name in package} - {Path()}):
        package.setdefault(f"{folder.as_posix()}/__init__.py", "")
    package = dict(sorted(package.items()))
    digest = hashlib.sha256("\0".join(f"{name}\0{text}" for name, text in package.items()).encode())
    files = {"LICENSE": _licence(), "README.md": _readme(sources[_LAYERS])}
    for backend in BACKENDS:
        identifier = f"_{_NAME}_{backend}_{digest.hexdigest()[:12]}"
        of_backend = package | {"namespace.py": _named(package["namespace.py"], identifier)}
        of_backend["metadata.json"] = _metadata(identifier, backend, of_backend)
        files |= {f"build/torch-{backend}/{name}": text for name, text in of_backend.items()}
    return files


def _closure() -> dict[str, str]:
    """The layers, all ops, and what these import: texts by path in the package, in order."""
    left = [_LAYERS, *(f"ops/{path.name}" for path in (PACKAGE / "ops").glob("*.py"))]
    found: dict[str, str] = {}
    while left:
        name = left.pop()
        if name not in found:
            found[name] = (PACKAGE / name).read_text(encoding="utf-8")
            left += [file for node in _imports(found[name], name) for file in _files_of(node)]
    return dict(sorted(found.items()))


def _imports(text: str, name: str) -> Iterator[ast.ImportFrom]:
    """What a file imports of the package, inside functions too."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            if any(alias.name.partition(".")[0] == _NAME for alias in node.names):
                raise ValueError(f"{name}: expected `from {_NAME}... import`, line {node.lineno}")
        elif isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == _NAME:
            yield node


def _files_of(node: ast.ImportFrom) -> Iterator[str]:
    """The modules that an import names, as paths in the package."""
    module = "/".join((node.module or "").split(".")[1:])
    if module and (PACKAGE / f"{module}.py").is_file():
        yield f"{module}.py"
        return
    for alias in node.names:
        name = f"{module}/{alias.name}.py".lstrip("/")
        if not (PACKAGE / name).is_file():
            name = f"{module}/__init__.py"
        # That of the package itself has names of patching, too.
        if name.startswith("/"):
            raise ValueError(f"{node.module}: expected a module of that name, got {alias.name}")
        yield name


def _relative(text: str, name: str) -> str:
    """`text`, which is to be the file `name` of the package, without absolute imports of it."""
    lines = text.splitlines(keepends=True)
    dots = "." * len(Path(name).parts)
    for node in _imports(text, name):
        absolute = f"from {node.module} import"
        below = (node.module or "")[len(_NAME) + 1 :]
        line = lines[node.lineno - 1]
        if not line[node.col_offset :].startswith(absolute):
            raise ValueError(f"{name}: expected {absolute!r}, line {node.lineno}")
        relative = line[node.col_offset :].replace(absolute, f"from {dots}{below} import", 1)
        lines[node.lineno - 1] = line[: node.col_offset] + relative
    return "".join(lines)


def _named(text: str, identifier: str) -> str:
    """namespace.py with this name in it."""
    (value,) = (
        node.value
        for node in ast.parse(text).body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "NAMESPACE"
    )
    segment = ast.get_source_segment(text, value)
    assert segment is not None
    return text.replace(segment, json.dumps(identifier))


def _init() -> str:
    """The package's own __init__.py, of which layouts and ops are left, and the layers."""
    tree = ast.parse((PACKAGE / "__init__.py").read_text(encoding="utf-8"))
    kept = [
        node
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom)
        and (node.module or "").startswith((f"{_NAME}.layout", f"{_NAME}.ops."))
    ]
    names = [alias.name for node in kept for alias in node.names]
    names = sorted(["__version__", "layers", *names])
    lines = [f'"""{_TITLE}."""', "", "from . import layers"]
    for node in kept:
        node.module, node.level = (node.module or "")[len(_NAME) + 1 :], 1
        lines.append(ast.unparse(node))
    lines += ["", f'__version__ = "{flamingo_fast.__version__}"', "", "__all__ = ["]
    lines += [f'    "{name}",' for name in names] + ["]", ""]
    return "\n".join(lines)


def _metadata(identifier: str, backend: str, files: Mapping[str, str]) -> str:
    """metadata.json. The library's versions are whole numbers: it is given the first of ours."""
    digests = {
        name: base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        for name, text in sorted(files.items())
    }
    metadata = {
        "name": _NAME.replace("_", "-"),
        "id": identifier,
        "version": int(flamingo_fast.__version__.partition(".")[0]),
        "license": "Apache-2.0",
        "python-depends": [],
        "backend": {"type": backend},
        "digest": {"algorithm": "sha256", "files": digests},
    }
    return json.dumps(metadata, indent=2) + "\n"


def _licence() -> str:
    """Of the checkout, or of the installed distribution."""
    if (PACKAGE.parent / "pyproject.toml").is_file():
        return (PACKAGE.parent / "LICENSE").read_text(encoding="utf-8")
    distribution = importlib.metadata.distribution(_NAME)
    text = distribution.read_text("licenses/LICENSE") or distribution.read_text("LICENSE")
    if text is None:
        raise FileNotFoundError(f"LICENSE: expected it among the files of {_NAME}'s distribution")
    return text


def _readme(layers: str) -> str:
    rows = [
        f"| `{node.name}` | {(ast.get_docstring(node) or '').partition(chr(10))[0]} |"
        for node in ast.parse(layers).body
        if isinstance(node, ast.ClassDef)
    ]
    return _README.format(title=_TITLE, version=flamingo_fast.__version__, layers="\n".join(rows))


_README = """\
---
library_name: kernels
license: apache-2.0
tags:
- kernels
---

# flamingo-fast

{title}, for PyTorch 2.11 and
Python 3.10 or later: Triton kernels on a GPU, PyTorch calls on a CPU. Nothing is compiled
beforehand. Written by `flamingo-fast export-kernels`, version {version}.

```python
from pathlib import Path

import torch
from kernels import LocalLayerRepository, Mode, get_local_kernel, kernelize
from kernels import replace_kernel_forward_from_hub, use_kernel_mapping

here = Path(".")  # this folder; once it is on the Hub, LayerRepository and get_kernel

replace_kernel_forward_from_hub(torch.nn.RMSNorm, "RMSNorm")
model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.RMSNorm(64))
device = "cuda" if torch.cuda.is_available() else "cpu"
repository = LocalLayerRepository(here, layer_name="RMSNorm")
with use_kernel_mapping({{"RMSNorm": {{device: repository}}}}):
    model = kernelize(model, mode=Mode.TRAINING | Mode.TORCH_COMPILE, device=device)

ops = get_local_kernel(here)
x = torch.randn(2, 64)
out = ops.gated_residual(x, x, torch.zeros(1))
```

All layers have a backward and can be compiled (`has_backward`, `can_torch_compile`):

| layer | the forward of |
| --- | --- |
{layers}

Each takes the parameters, children and settings of the module that it is given to. What a layer
doesn't take, such as media that broadcast over samples, it refuses by name.

The functions `masked_cross_attention`, `latent_attention`, `gated_residual`, `gated_residual_norm`,
`layer_norm`, `rms_norm` and `squared_relu` say their shapes, dtypes and errors in their docstrings;
`MediaLayout` says which media each token of text attends to.
"""
