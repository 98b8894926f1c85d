"""Fields of configs: dataclasses made from plain values, with errors that name the field."""

import dataclasses
import math
import types
import typing
from typing import Any


class ConfigError(ValueError):
    """A field of a config, by its name, what it was and what was expected."""


def from_dict(cls: Any, values: Any, where: str) -> Any:
    if not isinstance(values, dict):
        raise ConfigError(f"{where or 'config'}: expected an object, got {values!r}")
    hints = typing.get_type_hints(cls)
    arguments = {}
    for name, value in values.items():
        path = field_path(where, name)
        if name not in hints:
            known = ", ".join(hints)
            raise ConfigError(f"{path}: there is no such field; expected one of {known}")
        if dataclasses.is_dataclass(hints[name]):
            value = from_dict(hints[name], value, path)
        elif typing.get_origin(hints[name]) is tuple and isinstance(value, list):
            value = tuple(value)
            element = typing.get_args(hints[name])[0]
            if dataclasses.is_dataclass(element):
                value = tuple(
                    from_dict(element, each, f"{path}[{index}]") for index, each in enumerate(value)
                )
        arguments[name] = value
    return cls(**arguments)


def field_path(where: str, name: str) -> str:
    return f"{where}.{name}" if where else name


def check_fields(config: Any, where: str) -> None:
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
    for name in names:
        value = getattr(config, name)
        if value is not None and value < least:
            raise ConfigError(
                f"{field_path(where, name)}: expected at least {least}, got {value!r}"
            )


def positive(path: str, value: float) -> None:
    if not (math.isfinite(value) and value > 0):
        raise ConfigError(f"{path}: expected a finite number above 0, got {value!r}")


def one_of(path: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise ConfigError(f"{path}: expected one of {', '.join(known)}; got {value!r}")
