"""Fields of configs: dataclasses made from plain values, with errors that name the field."""

import dataclasses
import difflib
import math
import types
import typing
from typing import Any


class ConfigError(ValueError):
    """A field of a config, by its name, what it was and what was expected."""


def from_dict(cls: Any, values: Any, where: str) -> Any:
    """A config of plain values, as JSON and YAML have them; lists become tuples.

    Arguments:
        cls: a dataclass; fields of it may be dataclasses, or tuples of them.
        values: of its fields by name.
        where: what comes before the names of fields in errors.

    Raises:
        ConfigError: a field that there is not, that is missing or has a wrong value, by name.
    """
    if not isinstance(values, dict):
        raise ConfigError(f"{where or 'config'}: expected an object, got {values!r}")
    hints = typing.get_type_hints(cls)
    # Before what is missing: that may be there by another name.
    for name in values:
        if name not in hints:
            known = ", ".join(hints)
            close = difflib.get_close_matches(str(name), hints, 1)
            meant = f". Did you mean {close[0]}?" if close else ""
            raise ConfigError(
                f"{field_path(where, name)}: there is no such field; expected one of {known}{meant}"
            )
    for field in dataclasses.fields(cls):
        defaults = (field.default, field.default_factory)
        if field.name not in values and all(each is dataclasses.MISSING for each in defaults):
            raise ConfigError(f"{field_path(where, field.name)}: expected a value, it is missing")
    arguments = {}
    for name, value in values.items():
        path = field_path(where, name)
        if dataclasses.is_dataclass(hints[name]):
            value = from_dict(hints[name], value, path)
        elif typing.get_origin(hints[name]) is tuple and not isinstance(value, list | tuple):
            raise ConfigError(f"{path}: expected a list, got {value!r}")
        elif typing.get_origin(hints[name]) is tuple:
            value = tuple(value)
            element = typing.get_args(hints[name])[0]
            if dataclasses.is_dataclass(element):
                value = tuple(
                    from_dict(element, each, f"{path}[{index}]") for index, each in enumerate(value)
                )
        arguments[name] = value
    return cls(**arguments)


def field_path(where: str, name: str) -> str:
    """A field's name as an error has it; `where` is the path of its config, "" of the outermost."""
    return f"{where}.{name}" if where else name


def check_fields(config: Any, where: str) -> None:
    """Refuses a dataclass with a value that is not of its field's type; ints are floats, too."""
    for name, hint in typing.get_type_hints(type(config)).items():
        value = getattr(config, name)
        if not _is_of(value, hint):
            expected = getattr(hint, "__name__", None)
            if not isinstance(hint, type):
                expected = str(hint).replace("typing.", "")
            raise ConfigError(f"{field_path(where, name)}: expected {expected}, got {value!r}")


def _is_of(value: Any, hint: Any) -> bool:
    origin = typing.get_origin(hint)
    if origin in (typing.Union, types.UnionType):
        return any(_is_of(value, each) for each in typing.get_args(hint))
    if origin is tuple:
        element = typing.get_args(hint)[0]
        return isinstance(value, tuple) and all(_is_of(each, element) for each in value)
    if origin is dict:
        return isinstance(value, dict)
    if hint is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, hint)


def at_least(where: str, config: Any, least: int, *names: str) -> None:
    """Refuses fields of a config below `least`; None passes."""
    for name in names:
        value = getattr(config, name)
        if value is not None and value < least:
            raise ConfigError(
                f"{field_path(where, name)}: expected at least {least}, got {value!r}"
            )


def positive(path: str, value: float) -> None:
    """Refuses what is not a finite number above 0."""
    if not (math.isfinite(value) and value > 0):
        raise ConfigError(f"{path}: expected a finite number above 0, got {value!r}")


def hidden_width(path: str, mult: float, dim: int) -> None:
    """Refuses a feed-forward without a hidden feature; mult is in units of dim."""
    positive(path, mult)
    if int(dim * mult) < 1:
        raise ConfigError(f"{path}: expected a hidden width of at least 1, got {mult!r} x {dim}")


def one_of(path: str, value: str, known: tuple[str, ...]) -> None:
    """Refuses a name that is not known, and says which are."""
    if value not in known:
        raise ConfigError(f"{path}: expected one of {', '.join(known)}; got {value!r}")
