"""Whether a peer's code is a version that we know: by its source, not by a version number.

Vendored copies have no version, and a new release mostly has the old code.
"""

import ast
import functools
import hashlib
import inspect
import textwrap
from collections.abc import Callable, Iterable
from typing import Any

# What says nothing of what is done, and what not every version of Python has.
_LEFT_OUT = {
    *("annotation", "returns", "decorator_list", "ctx"),
    *("kind", "type_comment", "type_params", "simple"),
}


def fingerprint(functions: Iterable[Callable[..., Any]]) -> str | None:
    """16 hex digits of the functions' source, or None where there is none to read.

    The same for other comments, docstrings, annotations of types, decorators and layout, and in
    every version of Python.
    """
    parts = [_structure(inspect.unwrap(getattr(each, "__func__", each))) for each in functions]
    if None in parts:
        return None
    return hashlib.sha256("\n".join(map(str, parts)).encode()).hexdigest()[:16]


@functools.cache
def _structure(function: Callable[..., Any]) -> str | None:
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    except (OSError, TypeError, SyntaxError):
        return None
    (definition,) = tree.body
    return _dump(definition) if isinstance(definition, ast.FunctionDef) else None


def _dump(node: Any) -> str:
    if isinstance(node, list):
        return "[" + ",".join(map(_dump, node)) + "]"
    if not isinstance(node, ast.AST):
        return repr(node)
    fields = []
    for name, value in ast.iter_fields(node):
        if name == "body" and isinstance(node, ast.FunctionDef) and ast.get_docstring(node):
            value = value[1:]
        if name not in _LEFT_OUT and value not in (None, []):
            fields.append(f"{name}={_dump(value)}")
    return f"{type(node).__name__}({','.join(fields)})"
