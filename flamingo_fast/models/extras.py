"""Libraries of extras, and what to say where they are missing."""

import importlib
import sys
from typing import Any


def require(name: str, extra: str = "models") -> Any:
    """The module `name`.

    Raises:
        ImportError: it is not installed, or lacks that submodule; says how to install it.
    """
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        missing = error.name or name
        package = missing.partition(".")[0]
        reason = f"{package} is not installed: pip install"
        if (found := sys.modules.get(package)) is not None:
            version = getattr(found, "__version__", "as installed")
            reason = f"{package} {version} has no {missing}: pip install --upgrade"
        raise ImportError(f"{reason} 'flamingo_fast[{extra}]'") from error
