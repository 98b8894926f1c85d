"""Shards of samples: of folders and lists of files, or of samples that a program makes.

What is written is what `samples` reads: pairs as KEY.jpg and KEY.txt, web pages as OBELICS has
them, with their images as KEY.0.jpg, KEY.1.png and so on.
"""

import contextlib
import csv
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any

from flamingo_fast.models.extras import require
from flamingo_fast.training.bad_samples import Outcomes
from flamingo_fast.training.checking import check_record
from flamingo_fast.training.config import KINDS
from flamingo_fast.training.samples import (
    IMAGE_SUFFIXES,
    VIDEO_SUFFIXES,
    Limits,
    Medium,
    Sample,
)
from flamingo_fast.training.shards import Record, write_index

_LISTS = (".csv", ".tsv", ".jsonl")


class SourceError(ValueError):
    """What is to be packed is not there, or is not what the kind needs."""


def write_shards(
    kind: str,
    source: str | Path,
    out: str | Path,
    *,
    limits: Limits | None = None,
    shard_bytes: int = 1_000_000_000,
    shard_samples: int = 10_000,
    progress: Callable[[int], None] = lambda count: None,
) -> Outcomes:
    """Packs files into a folder of shards; samples that can't be used are left out and counted.

    Arguments:
        kind: "interleaved", "image_text" or "video_text".
        source: a folder, with all that are in it: of pairs NAME.jpg and NAME.txt (or NAME.json with
            "caption"), of web pages NAME.json and the images that it names, relative to its folder.
            Or a list, .csv, .tsv (with columns "path" and "text") or .jsonl (with such fields, or
            of web pages a whole one in each line); its paths are relative to its folder.
        out: folder, which there must not be yet, or be empty. It is there when all is written.
        limits: None: `Limits()`.
        shard_bytes, shard_samples: a shard is full at either.
        progress: is called with how many more samples were looked at.

    Returns:
        What became of the samples. Examples have paths of the source.

    Raises:
        SourceError: there is no such source, or no sample of it can be used.
        FileExistsError: there is something in `out`.
        OSError: `out` can't be written; nothing is left of it.
        ImportError: a library of flamingo_fast[train] is not installed.
    """
    limits = limits or Limits()
    outcomes = Outcomes()

    def usable() -> Iterator[Sample]:
        for record in _records(kind, Path(source)):
            # One frame says whether a video can be decoded.
            sample = check_record(record, kind, limits, 1, outcomes)
            if sample is not None:
                yield sample
            progress(1)
        if outcomes.bad == outcomes.total:
            reasons = f"\n{outcomes.describe()}" if outcomes.total else ""
            raise SourceError(
                f"source: expected at least one sample that can be used in {source}, got none of "
                f"{outcomes.total}{reasons}"
            )

    write_samples(kind, usable(), out, shard_bytes=shard_bytes, shard_samples=shard_samples)
    return outcomes


def write_samples(
    kind: str,
    samples: Iterable[Sample],
    out: str | Path,
    *,
    shard_bytes: int = 1_000_000_000,
    shard_samples: int = 10_000,
) -> list[Path]:
    """Writes samples as shards KIND-000000.tar and so on, each with its index.

    The same samples make the same bytes. Keys are numbers: shards split names at their first dot.

    Arguments:
        kind: "interleaved", "image_text" or "video_text".
        samples: of pairs, a medium and a text each; the medium's member is a suffix, such as "jpg".
        out: folder, which there must not be yet, or be empty. It is there when all is written.
        shard_bytes, shard_samples: a shard is full at either.

    Raises:
        FileExistsError: there is something in `out`.
        OSError: it can't be written; nothing is left of it.
        ValueError: a sample of pairs that is none.
    """
    if kind not in KINDS:
        raise ValueError(f"kind: expected one of {', '.join(KINDS)}; got {kind!r}")
    for argument, value in (("shard_bytes", shard_bytes), ("shard_samples", shard_samples)):
        if value < 1:
            raise ValueError(f"{argument}: expected at least 1, got {value}")
    out = Path(out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise FileExistsError(f"out: expected a new folder, got {out}, which there is already")
    # Replaced by its finished self, the folder that a process is in would be gone for it.
    if not out.name:
        raise FileExistsError(f"out: expected a new folder by its name, got {out}")
    partial = out.with_name(f"{out.name}.{os.getpid()}.partial")
    partial.mkdir(parents=True)
    try:
        _write(kind, samples, partial, shard_bytes, shard_samples)
        # In place of an empty folder, too.
        partial.rename(out)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return sorted(out.glob("*.tar"))


def _write(
    kind: str, samples: Iterable[Sample], folder: Path, shard_bytes: int, shard_samples: int
) -> None:
    members = _document_members if kind == "interleaved" else _pair_members
    writer = require("webdataset", "train").ShardWriter
    files: list[IO[bytes]] = []

    # Its own opener takes a path with a colon for an address.
    def opened(path: str) -> IO[bytes]:
        files.append(open(path, "wb"))
        return files[-1]

    def finish(path: str) -> None:
        file = files.pop()
        file.flush()
        os.fsync(file.fileno())
        file.close()
        write_index(path)

    pattern = str(folder / f"{kind}-").replace("%", "%%") + "%06d.tar"
    options: dict[str, Any] = {"mtime": 0, "format": "PAX_FORMAT", "encoder": False}
    with contextlib.ExitStack() as stack:
        stack.callback(lambda: [file.close() for file in files])
        shards = stack.enter_context(
            writer(
                pattern,
                maxcount=shard_samples,
                maxsize=shard_bytes,
                post=finish,
                verbose=0,
                opener=opened,
                **options,
            )
        )
        for i, sample in enumerate(samples):
            shards.write({"__key__": f"{i:09d}", **members(sample)})


def _pair_members(sample: Sample) -> dict[str, bytes]:
    match sample.parts:
        case (Medium(member, data), str(text)) if member in {*IMAGE_SUFFIXES, *VIDEO_SUFFIXES}:
            return {member: data, "txt": text.encode()}
    raise ValueError(
        f"samples: expected a pair of a medium with a suffix as its member and a text, got "
        f"{sample.parts!r:.200}"
    )


def _document_members(sample: Sample) -> dict[str, bytes]:
    members: dict[str, bytes] = {}
    images: list[str | None] = []
    texts: list[str | None] = []
    for part in sample.parts:
        if isinstance(part, str):
            images.append(None)
            texts.append(part)
        else:
            suffix = Path(part.member).suffix[1:].lower()
            name = f"{len(members)}.{suffix if suffix in IMAGE_SUFFIXES else 'img'}"
            members[name] = part.data
            images.append(name)
            texts.append(None)
    document = {"images": images, "texts": texts}
    return members | {"json": json.dumps(document, ensure_ascii=False).encode()}


def _records(kind: str, source: Path) -> Iterator[Record]:
    """What a source has, as if shards had it; its key is a path or a line."""
    is_document = kind == "interleaved"
    if source.is_dir():
        return _documents(source) if is_document else _pairs(kind, source)
    if not source.exists():
        raise SourceError(f"source: there is no file or folder {source}")
    if source.suffix == ".jsonl":
        return _lines(is_document, source)
    if source.suffix in _LISTS and not is_document:
        return _rows(source)
    lists = ".jsonl" if is_document else ", ".join(_LISTS)
    raise SourceError(f"source: expected a folder or a file of {lists}; got {source}")


def _pairs(kind: str, folder: Path) -> Iterator[Record]:
    media = VIDEO_SUFFIXES if kind == "video_text" else IMAGE_SUFFIXES
    samples: dict[Path, list[Path]] = {}
    for file in _files(folder):
        if file.suffix[1:].lower() in (*media, "txt", "json"):
            samples.setdefault(file.with_suffix(""), []).append(file)
    for name, files in samples.items():
        members: dict[str, bytes] = {}
        problem = None
        for file in files:
            suffix = file.suffix[1:].lower()
            if suffix in members:
                problem = ("duplicate_member", f"expected one .{suffix}, got several")
            try:
                members[suffix] = file.read_bytes()
            except OSError as error:
                problem = ("missing_member", f".{suffix}: {error.strerror}")
        yield Record(str(name.relative_to(folder)), str(folder), members, problem)


def _documents(folder: Path) -> Iterator[Record]:
    for file in _files(folder):
        if file.suffix.lower() == ".json":
            key = str(file.relative_to(folder))
            try:
                members = _Document(file.read_bytes(), file.parent, folder)
            except OSError as error:
                problem = ("missing_member", f".json: {error.strerror}")
                yield Record(key, str(folder), {}, problem)
            else:
                yield Record(key, str(folder), members)


def _files(folder: Path) -> list[Path]:
    """In a folder and those in it, but for hidden ones; in an order that all machines have."""
    found = (
        file
        for file in folder.rglob("*")
        if not any(part.startswith(".") for part in file.relative_to(folder).parts)
    )
    return sorted((file for file in found if file.is_file()), key=lambda file: file.as_posix())


class _Document(Mapping[str, bytes]):
    """A web page's JSON and the images that lie beside it, which are read when asked for.

    Arguments:
        root: images outside of it are none of the page's, whatever its JSON says.
    """

    def __init__(self, data: bytes, folder: Path, root: Path) -> None:
        self._data, self._folder, self._root = data, folder, root.resolve()

    def __getitem__(self, name: str) -> bytes:
        if name == "json":
            return self._data
        try:
            path = (self._folder / name).resolve()
            if path.is_relative_to(self._root):
                return path.read_bytes()
        # ValueError: a zero byte in the name.
        except (OSError, ValueError):
            pass
        raise KeyError(name)

    def __iter__(self) -> Iterator[str]:
        return iter(("json",))

    def __len__(self) -> int:
        return 1


def _lines(is_document: bool, source: Path) -> Iterator[Record]:
    with source.open("rb") as file:
        for number, line in enumerate(file, 1):
            key = f"line {number}"
            if not line.strip():
                continue
            if is_document:
                members = _Document(line, source.parent, source.parent)
                yield Record(key, str(source), members)
                continue
            try:
                values = json.loads(line)
            except UnicodeDecodeError as error:
                yield Record(key, str(source), {}, ("text_not_utf8", str(error)))
                continue
            except (ValueError, RecursionError) as error:
                yield Record(key, str(source), {}, ("invalid_json", str(error)))
                continue
            path, text = None, None
            if isinstance(values, dict):
                path, text = values.get("path"), values.get("text")
            if isinstance(path, str) and isinstance(text, str):
                yield _listed(key, source, path, text)
            else:
                detail = 'expected an object with text as "path" and "text"'
                yield Record(key, str(source), {}, ("wrong_json_shape", detail))


def _rows(source: Path) -> Iterator[Record]:
    delimiter = "\t" if source.suffix == ".tsv" else ","
    # Bytes that are no UTF-8 make their own sample a bad one, not all of them.
    with source.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
        rows = csv.DictReader(file, delimiter=delimiter)
        # Its default stops at a long text, which is a bad sample like any other.
        before = csv.field_size_limit(1 << 30)
        try:
            columns = rows.fieldnames or ()
            if not {"path", "text"} <= set(columns):
                names = ", ".join(f"{each!r:.100}" for each in columns) or "none"
                raise SourceError(
                    f"source: expected columns path and text in {source}, got {names}"
                )
            for row in rows:
                key = f"line {rows.line_num}"
                yield _listed(key, source, row["path"] or "", row["text"] or "")
        except csv.Error as error:
            raise SourceError(f"source: {source}, line {rows.line_num}: {error}") from None
        finally:
            csv.field_size_limit(before)


def _listed(key: str, source: Path, path: str, text: str) -> Record:
    try:
        data = (source.parent / path).read_bytes()
    except (OSError, ValueError) as error:
        what = getattr(error, "strerror", None) or str(error)
        return Record(key, str(source), {}, ("missing_member", f"{path!r}: {what}"))
    # Bytes that were no UTF-8, and halves of surrogate pairs, are still none; `parse` finds them.
    encoded = text.encode(errors="surrogatepass")
    return Record(key, str(source), {Path(path).suffix[1:].lower(): data, "txt": encoded})
