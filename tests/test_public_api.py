"""The public names and their parameters are those of public_api.txt: none changes unnoticed.

Public is what a package exports and what the documentation imports from modules; of training and
testing, which export nothing, what their modules define. Annotations are left out, as their text
depends on Python's version.
"""

import difflib
import functools
import importlib
import inspect
import pkgutil
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

pytest.importorskip("triton")

API = Path(__file__).with_name("public_api.txt")
UPDATE = "PYTHONPATH=. python tests/test_public_api.py"
# The first one that has a class lists its methods.
MODULES = (
    *("flamingo_fast", "flamingo_fast.layout", "flamingo_fast.reference", "flamingo_fast.ranges"),
    *("flamingo_fast.modules", "flamingo_fast.modules.checkpoints"),
    "flamingo_fast.ops.linear_cross_entropy",
    *(
        "flamingo_fast.models",
        "flamingo_fast.models.work",
        "flamingo_fast.models.cache",
        "flamingo_fast.models.folder",
    ),
    *("flamingo_fast.models.generation", "flamingo_fast.models.open_flamingo"),
    *("flamingo_fast.models.processor", "flamingo_fast.models.saving"),
    *("flamingo_fast.patching", "flamingo_fast.patching.rules"),
    "flamingo_fast.profiling.annotate",
)
OF_MODULES = ("flamingo_fast.testing", "flamingo_fast.training")


def public_modules() -> Iterator[ModuleType]:
    for name in MODULES:
        yield importlib.import_module(name)
    for name in OF_MODULES:
        package = importlib.import_module(name)
        for found in pkgutil.iter_modules(package.__path__, f"{name}."):
            if not found.ispkg:
                yield importlib.import_module(found.name)


def names_in(module: ModuleType) -> list[str]:
    if hasattr(module, "__all__"):
        return sorted(module.__all__)
    return sorted(
        name
        for name, value in vars(module).items()
        if not name.startswith("_") and getattr(value, "__module__", None) == module.__name__
    )


def text_of_default(value: Any) -> str:
    if isinstance(value, type) or inspect.isroutine(value):
        return value.__qualname__
    if isinstance(value, Path):
        # Where the package lies is no part of it.
        return f".../{value.name}"
    if isinstance(value, (set, frozenset)):
        return "{" + ", ".join(sorted(map(repr, value))) + "}"
    return repr(value)


def parameters_of(function: Any, leave_out: int = 0) -> str:
    """As in its definition, without annotations; `leave_out` of the first ones."""
    parts, is_marked = [], False
    for parameter in list(inspect.signature(function).parameters.values())[leave_out:]:
        text = {parameter.VAR_POSITIONAL: "*", parameter.VAR_KEYWORD: "**"}.get(parameter.kind, "")
        text += parameter.name
        if parameter.kind is parameter.VAR_POSITIONAL:
            is_marked = True
        if parameter.kind is parameter.KEYWORD_ONLY and not is_marked:
            parts.append("*")
            is_marked = True
        if parameter.default is not parameter.empty:
            text += f"={text_of_default(parameter.default)}"
        parts.append(text)
    return f"({', '.join(parts)})"


def is_ours(value: Any) -> bool:
    return getattr(value, "__module__", "").partition(".")[0] == "flamingo_fast"


def lines_of_class(name: str, cls: type) -> Iterator[str]:
    """Its constructor, if that is ours, and what it and our own bases define."""
    bases = [base for base in cls.__mro__ if is_ours(base)]
    members = {key: value for base in reversed(bases) for key, value in vars(base).items()}
    made_by = members.get("__init__") or members.get("__new__")
    yield name + ("" if made_by is None else parameters_of(made_by, 1))
    for key, value in sorted(members.items()):
        if key.startswith("_"):
            continue
        if isinstance(value, (classmethod, staticmethod)):
            is_bound = isinstance(value, classmethod)
            yield f"{name}.{key}{parameters_of(value.__func__, is_bound)}"
        elif inspect.isfunction(value):
            yield f"{name}.{key}{parameters_of(value, 1)}"
        elif isinstance(value, (property, functools.cached_property)):
            yield f"{name}.{key}"


def lines() -> Iterator[str]:
    seen: set[type] = set()
    for module in public_modules():
        for name in names_in(module):
            value, full = getattr(module, name), f"{module.__name__}.{name}"
            if isinstance(value, type) and value not in seen:
                seen.add(value)
                yield from lines_of_class(full, value)
            elif inspect.isroutine(value):
                yield full + parameters_of(value)
            else:
                yield full


def test_public_api() -> None:
    expected, found = API.read_text().splitlines(), list(lines())
    changes = "\n".join(difflib.unified_diff(expected, found, "public_api.txt", "now", "", "", 0))
    assert not changes, (
        f"the public API changed:\n{changes}\nIf that is meant, say so in CHANGELOG.md and run: "
        f"{UPDATE}"
    )


if __name__ == "__main__":
    API.write_text("".join(f"{line}\n" for line in lines()))
