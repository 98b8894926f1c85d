"""Libraries of extras, and what to say where they are missing."""

import importlib
from typing import Any


def require(name: str, extra: str = "models") -> Any:
    """The module `name`.

    Raises:
        ImportError: it is not installed; says how to install it.
    """
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        missing = str(error.name).partition(".")[0]
        raise ImportError(
            f"{missing} is not installed: pip install 'flamingo_fast[{extra}]'"
        ) from error
