"""Launch configurations that were measured on this very device, in place of the heuristics'.

`flamingo-fast tune` writes them: a JSON file for a device and a Triton version, in
`$FLAMINGO_FAST_CACHE` or the user's cache folder. FLAMINGO_FAST_TUNED=0 leaves it unread; an
interpreter's, whose times say nothing of a GPU, is read under FLAMINGO_FAST_TUNED=interpreter only.
All is looked up once for each set of a heuristic's arguments: later calls read neither file nor
environment. Targets that nobody's device is (those of `recording`) have no file.
"""

import contextlib
import dataclasses
import functools
import hashlib
import inspect
import json
import os
import re
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import triton

from flamingo_fast.kernels.launch import Target

SCHEMA = "flamingo_fast.tuned/1"

# Of fields that have no bounds of their own.
_BOUNDS = {"num_warps": (1, 16), "num_stages": (1, 5), "programs_per_sm": (1, 32)}

Shape = dict[str, int]
Key = tuple[str, str, frozenset[tuple[str, int]]]


@dataclasses.dataclass(frozen=True)
class Request:
    """What a launcher asked a configuration for."""

    op: str
    shape: Shape
    dtype: torch.dtype
    target: Target
    heuristic: Any
    arguments: tuple[Any, ...]


@dataclasses.dataclass(frozen=True)
class Tunable:
    """A heuristic whose configurations may come from a file.

    op: its name there.
    heuristic: takes shapes, a dtype and, last, a target; returns a frozen dataclass.
    module: of kernels/, with the kernel; its code and what it imports are what was measured.
    fixed: fields that follow from the shape and are never another value.
    bounds: least and most of fields.
    classes: arguments that are not a key's part themselves, but what these make of them.
    refuses: why a configuration is wrong for these arguments though its fields are well formed.
    """

    op: str
    heuristic: Callable[..., Any]
    module: str
    fixed: tuple[str, ...]
    bounds: Mapping[str, tuple[int, int]]
    classes: Mapping[str, Callable[[Any], int]]
    refuses: Callable[..., str | None] | None

    def request(self, arguments: tuple[Any, ...]) -> Request:
        named = dict(zip(inspect.signature(self.heuristic).parameters, arguments, strict=True))
        dtype, target = named.pop("dtype"), named.pop("target")
        shape = {
            name: self.classes[name](value) if name in self.classes else value
            for name, value in named.items()
        }
        return Request(self.op, shape, dtype, target, self.heuristic(*arguments), arguments)

    @functools.cached_property
    def source(self) -> str:
        """Hash of the code that was measured."""
        return _source(self.module)

    def limits(self, name: str) -> tuple[int, int]:
        return self.bounds.get(name) or _BOUNDS[name]

    def problem(self, config: Any, request: Request) -> str | None:
        """Why `config` can't be launched for `request`; None if it can."""
        for field in dataclasses.fields(config):
            value, usual = getattr(config, field.name), getattr(request.heuristic, field.name)
            if field.name in self.fixed:
                if type(value) is not type(usual) or value != usual:
                    return f"{field.name}: expected {usual}, as of the shape; got {value!r}"
            elif field.type is bool:
                if type(value) is not bool:
                    return f"{field.name}: expected true or false, got {value!r}"
            elif field.name == "max_registers":
                if value is not None and not (type(value) is int and 24 <= value <= 255):
                    return f"{field.name}: expected null or 24 to 255, got {value!r}"
            elif why := _bad_number(field.name, value, self.limits(field.name)):
                return why
        return self.refuses(config, *request.arguments) if self.refuses else None

    def choose(self, arguments: tuple[Any, ...]) -> Any:
        if _asked is not None:
            request = self.request(arguments)
            _asked[self.op] = request
            return _forced.get(self.op, request.heuristic)
        target = arguments[-1]
        entries = _entries(target) if target.device else {}
        if not entries:
            return self.heuristic(*arguments)
        request = self.request(arguments)
        entry = entries.get(_key(self.op, str(request.dtype), request.shape))
        if entry is None or entry["source"] != self.source:
            return request.heuristic
        try:
            config = type(request.heuristic)(**entry["config"])
            why = self.problem(config, request)
        except TypeError as error:
            why = str(error)
        if why:
            _warn(path_of(target), f"{self.op}, {request.shape}: {why}")
            return request.heuristic
        return config


TUNABLES: dict[str, Tunable] = {}
_caches: list[Callable[[], None]] = []
# What `forced` says; None for the second outside it.
_forced: Mapping[str, Any] = {}
_asked: dict[str, Request] | None = None


def tunable(
    op: str,
    *,
    module: str,
    fixed: tuple[str, ...] = (),
    bounds: Mapping[str, tuple[int, int]] = {},
    classes: Mapping[str, Callable[[Any], int]] = {},
    refuses: Callable[..., str | None] | None = None,
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Makes a heuristic a function that looks into the tuned file first; see `Tunable`.

    No argument of a forward's may follow from the batch: a row's result must not depend on what is
    beside it. That of the one-medium backward has the batch's mean of rows a medium.
    """

    def decorate(heuristic: Callable[..., Any]) -> Callable[..., Any]:
        one = Tunable(op, heuristic, module, fixed, bounds, classes, refuses)

        # Bounded: a batch's mean may be another number each time.
        @functools.lru_cache(maxsize=8192)
        @functools.wraps(heuristic)
        def config(*arguments: Any) -> Any:
            return one.choose(arguments)

        TUNABLES[op] = one
        _caches.append(config.cache_clear)
        return config

    return decorate


@contextlib.contextmanager
def forced(configs: Mapping[str, Any] | None = None) -> Iterator[dict[str, Request]]:
    """Inside, ops have these configurations, all others the heuristics'; files are not read.

    Yields what launchers asked for, by op, the last of each.
    """
    global _forced, _asked
    previous = _forced, _asked
    _forced, _asked = configs or {}, {}
    _clear()
    try:
        yield _asked
    finally:
        _forced, _asked = previous
        _clear()


def forget() -> None:
    """Files and the environment are looked at again: for who has changed them in this process."""
    _entries.cache_clear()
    _warned.clear()
    _clear()


def _clear() -> None:
    for clear in _caches:
        clear()


def folder() -> Path:
    """Where tuned files are read from."""
    if cache := os.environ.get("FLAMINGO_FAST_CACHE"):
        return Path(cache)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "flamingo_fast"


def file_name(target: Target) -> str:
    device = re.sub(r"[^A-Za-z0-9.]+", "-", target.device)
    return f"tuned-{device}-triton-{triton.__version__}.json"


def path_of(target: Target) -> Path:
    return folder() / file_name(target)


def header(target: Target) -> dict[str, Any]:
    """What a file must say to be read for `target`."""
    return {
        "schema": SCHEMA,
        "device": target.device,
        "arch": target.arch,
        "num_sms": target.num_sms,
        "triton": triton.__version__,
    }


def entries_of(text: str, target: Target) -> list[dict[str, Any]]:
    """Of a file's text; none of a file of another device or Triton version.

    Raises:
        ValueError: the text is no such file.
    """
    content = json.loads(text)
    schema = content.get("schema") if isinstance(content, dict) else type(content).__name__
    if schema != SCHEMA:
        raise ValueError(f"schema: expected {SCHEMA!r}, got {schema!r}")
    if any(content.get(name) != value for name, value in header(target).items()):
        return []
    entries = content.get("entries")
    if not isinstance(entries, list) or not all(map(_is_entry, entries)):
        raise ValueError(
            "entries: expected a list of objects with op, shape, dtype, source, config"
        )
    return entries


def _is_entry(entry: Any) -> bool:
    return (
        isinstance(entry, dict)
        and all(isinstance(entry.get(name), str) for name in ("op", "dtype", "source"))
        and isinstance(entry.get("shape"), dict)
        and all(isinstance(value, int) for value in entry["shape"].values())
        and isinstance(entry.get("config", ""), dict | None)
    )


def _key(op: str, dtype: str, shape: Shape) -> Key:
    return op, dtype.removeprefix("torch."), frozenset(shape.items())


def key_of(entry: Mapping[str, Any]) -> Key:
    """What an entry is found by."""
    return _key(entry["op"], entry["dtype"], entry["shape"])


@functools.cache
def _entries(target: Target) -> dict[Key, dict[str, Any]]:
    """Those whose configuration is not the heuristic's."""
    wanted = os.environ.get("FLAMINGO_FAST_TUNED", "1")
    if wanted == "0" or (target.arch == "interpreter" and wanted != "interpreter"):
        return {}
    try:
        path = path_of(target)
    except RuntimeError:  # Nobody's home.
        return {}
    try:
        entries = entries_of(path.read_text(encoding="utf-8"), target)
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        _warn(path, str(error))
        return {}
    return {key_of(entry): entry for entry in entries if entry["config"] is not None}


_warned: set[Path] = set()


def _warn(path: Path, why: str) -> None:
    if path not in _warned:
        _warned.add(path)
        warnings.warn(
            f"{path} is not used: {why}; `flamingo-fast tune` writes it anew",
            RuntimeWarning,
            stacklevel=2,
        )


def _bad_number(name: str, value: Any, limits: tuple[int, int]) -> str | None:
    least, most = limits
    is_power = name.startswith("BLOCK_") or name == "num_warps"
    if type(value) is int and least <= value <= most and not (is_power and value & (value - 1)):
        return None
    return (
        f"{name}: expected {'a power of two ' if is_power else ''}{least} to {most}, got {value!r}"
    )


@functools.cache
def _source(module: str) -> str:
    """Of the files of a module of kernels/ and of those that it imports."""
    here, texts, left = Path(__file__).parent, {}, [module]
    while left:
        name = left.pop()
        # Of this file's own changes no kernel is another.
        if name in texts or name == "tuned":
            continue
        text = (here / f"{name}.py").read_text(encoding="utf-8")
        # In an exported copy imports are relative, and all else is the same.
        texts[name] = re.sub(r"^from \.\.", "from flamingo_fast.", text, flags=re.MULTILINE)
        left += re.findall(r"^from flamingo_fast\.kernels\.(\w+) import", texts[name], re.MULTILINE)
    code = "\0".join(f"{name}\0{text}" for name, text in sorted(texts.items()))
    return hashlib.sha256(code.encode()).hexdigest()[:16]
