"""The peers' own code, as they published it: a second oracle, and a baseline of the benchmarks.

Of each only the file with the attention classes is loaded, under its own module name: the package
of open_flamingo imports a library of vision models and one of tokenizers.
"""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

OPEN_FLAMINGO = "open-flamingo==2.0.1"
FLAMINGO_PYTORCH = "flamingo-pytorch==0.1.2"


def open_flamingo() -> ModuleType:
    """OpenFlamingo's `src/helpers.py`: MaskedCrossAttention, GatedCrossAttentionBlock,
    PerceiverAttention, PerceiverResampler.

    Raises:
        ImportError: it, or what it imports, is not installed; says how to install it.
    """
    return _load("open_flamingo.src.helpers", OPEN_FLAMINGO)


def flamingo_pytorch() -> ModuleType:
    """flamingo-pytorch's `flamingo_pytorch.py`, with the classes that `open_flamingo` has.

    Raises:
        ImportError: it, or what it imports, is not installed; says how to install it.
    """
    return _load("flamingo_pytorch.flamingo_pytorch", FLAMINGO_PYTORCH)


def _load(name: str, requirement: str) -> ModuleType:
    if name in sys.modules:
        return sys.modules[name]
    package, *path = name.split(".")
    found = importlib.util.find_spec(package)
    if found is None or not found.submodule_search_locations:
        raise ImportError(_how_to_install(package, requirement))
    (folder, *_) = found.submodule_search_locations
    spec = importlib.util.spec_from_file_location(name, Path(folder, *path[:-1], f"{path[-1]}.py"))
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except ModuleNotFoundError as error:
        raise ImportError(_how_to_install(str(error.name), requirement)) from error
    # torch.compile looks classes up by their module's name.
    sys.modules[name] = module
    return module


def _how_to_install(missing: str, requirement: str) -> str:
    return (
        f"{missing} is not installed: pip install --no-deps {requirement} && "
        "pip install einops einops-exts"
    )
