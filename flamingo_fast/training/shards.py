"""Tar files of webdataset's format, read at any place.

A record is a run of members with one key, the name up to its first dot; what follows the dot, in
lower case, names the member (webdataset's `base_plus_ext` and `group_by_keys`).

Where records start is in an index beside each shard, NAME.tar.index, which `flamingo-fast data
pack` and `data index` write; without one, or with one of another size or time than the shard has,
the shard is read through once when it is opened. Files are local, and not compressed.
"""

import array
import bisect
import collections
import dataclasses
import glob
import hashlib
import io
import os
import re
import struct
import sys
import tarfile
import weakref
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from flamingo_fast.models.extras import require
from flamingo_fast.models.fields import ConfigError

# The order of a shuffled epoch jumps among so many shards at a time.
WINDOW_SHARDS = 16
_OPEN_SHARDS = 64

_INDEX_SUFFIX = ".index"
# Little-endian: magic and version, the shard's bytes, its time of change in ns; offsets follow.
_INDEX_HEADER = struct.Struct("<8sqq")
_INDEX_MAGIC = b"ffshard1"
_META_NAME = re.compile(r"__[^/]*__($|/)")
_REMOTE = re.compile(r"[a-z][a-z0-9+.-]*:", re.IGNORECASE)


@dataclasses.dataclass(frozen=True)
class Record:
    """Members of one key.

    Attributes:
        key: of the sample.
        shard: path of the tar file.
        members: what follows the key and a dot, in lower case, and the bytes.
        problem: a reason of `BadSample` and its detail, where the record itself is broken.
    """

    key: str
    shard: str
    members: Mapping[str, bytes]
    problem: tuple[str, str] | None = None


class ShardSet(Sequence[Record]):
    """All records of some shards, in the order of `paths` and of each file.

    Can be forked and pickled: nothing that processes share has a position.

    Arguments:
        paths: of tar files; {000..127} and wildcards are expanded, the latter in sorted order.

    Attributes:
        paths: of the shards.
        broken: what is wrong with those that can't be read in full; what can be read, is.
        unindexed: those that had to be read through, for want of an index that fits.

    Raises:
        ConfigError: a path that there is not or that is no local one, or no records at all.
        ImportError: webdataset is not installed.
    """

    def __init__(self, paths: Sequence[str]) -> None:
        self.paths = expand_paths(paths)
        self.broken: dict[str, str] = {}
        self.unindexed: list[str] = []
        self._scanned: dict[int, array.array[int]] = {}
        counts = []
        for i, path in enumerate(self.paths):
            count = _indexed_count(path)
            if count is None:
                offsets, problem = scan(path)
                count = max(len(offsets) - 1, 0)
                self._scanned[i] = offsets
                self.unindexed.append(path)
                if problem is not None:
                    self.broken[path] = problem
            counts.append(count)
        self._counts = counts
        self._starts = _cumulative(counts)
        self._files: collections.OrderedDict[int, _OpenShard] = collections.OrderedDict()
        self._orders: collections.OrderedDict[tuple[int, int], _EpochOrder] = (
            collections.OrderedDict()
        )
        if not len(self):
            reasons = "".join(f"; {path}: {what}" for path, what in list(self.broken.items())[:3])
            raise ConfigError(
                f"shards: expected at least one sample, got none in {', '.join(paths)}{reasons}"
            )

    def __len__(self) -> int:
        return self._starts[-1]

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_files": collections.OrderedDict()}

    # No slices: a list of them would hold the bytes of all their records.
    def __getitem__(self, index: int) -> Record:  # type: ignore[override]
        """A record; a broken one has a `problem`.

        Raises:
            IndexError: there are not so many.
        """
        if not 0 <= index < len(self):
            raise IndexError(f"index: expected 0 to {len(self) - 1}, got {index}")
        shard = bisect.bisect_right(self._starts, index) - 1
        place = index - self._starts[shard]
        path = self.paths[shard]
        try:
            start, data = self._open(shard).read(place)
        # Those but the first of an index that is broken, or another one by now.
        except (OSError, IndexError, ValueError, OverflowError) as error:
            return Record(f"#{place}", path, {}, ("broken_shard", str(error)))
        return _record(data, start, f"#{place}", path)

    @property
    def fingerprint(self) -> str:
        """Of what decides which record an index is: names of the shards and their counts."""
        names = [Path(path).name for path in self.paths]
        return hashlib.sha256(repr((names, self._counts)).encode()).hexdigest()[:16]

    def position_to_index(self, position: int, seed: int, shuffle: bool) -> int:
        """Which record is at a position of an endless order.

        Epochs follow each other: `position // len(self)` is one, and holds every record once. Its
        order is a function of `seed` and the epoch alone: shards are permuted, and records within
        windows of 16 shards, so that reading stays within a few files.

        Arguments:
            position: at least 0.
            shuffle: False: the order of `self` in each epoch.
        """
        epoch, place = divmod(position, len(self))
        if not shuffle:
            return place
        order = self._orders.get((seed, epoch))
        if order is None:
            order = self._orders[seed, epoch] = _EpochOrder(self._counts, seed, epoch)
            # Rows of a batch may lie on both sides of an epoch's end.
            if len(self._orders) > 2:
                self._orders.popitem(last=False)
        shard, place = order.find(place)
        return self._starts[shard] + place

    def _open(self, shard: int) -> "_OpenShard":
        found = self._files.get(shard)
        if found is None:
            offsets = self._scanned.get(shard)
            path = self.paths[shard]
            found = _OpenShard(path, _read_index(path) if offsets is None else offsets)
            self._files[shard] = found
            if len(self._files) > _OPEN_SHARDS:
                self._files.popitem(last=False)
        self._files.move_to_end(shard)
        return found


def expand_paths(paths: Sequence[str]) -> list[str]:
    """Files of paths with {000..127} and wildcards.

    Raises:
        ConfigError: one that there is not, or that is not local; braces that don't match.
    """
    braces = require("braceexpand", "train")
    found: list[str] = []
    for pattern in paths:
        if _REMOTE.match(pattern) and not os.path.exists(pattern):
            raise ConfigError(f"shards: expected a local path, got {pattern!r}")
        # A file may have such characters in its name.
        try:
            expanded = [pattern] if os.path.exists(pattern) else list(braces.braceexpand(pattern))
        except braces.UnbalancedBracesError:
            raise ConfigError(f"shards: expected braces in pairs, got {pattern!r}") from None
        for path in expanded:
            files = [path] if os.path.exists(path) else sorted(glob.glob(path, recursive=True))
            if not files:
                raise ConfigError(f"shards: there is no file {path}")
            found += files
    for path in found:
        if os.path.isdir(path):
            raise ConfigError(f"shards: expected a tar file, got the folder {path}")
    return found


def scan(path: str) -> "tuple[array.array[int], str | None]":
    """Reads a shard's headers.

    Returns:
        Where records start, and at last where the last one ends; nothing where there are none. And
        what is wrong with the file, None where nothing is.
    """
    starts = array.array("q")
    end, problem, current = 0, None, None
    try:
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            try:
                with tarfile.open(fileobj=file, mode="r:") as tar:
                    # Not its iterator, which keeps what it has read.
                    while (member := tar.next()) is not None:
                        tar.members.clear()  # type: ignore[attr-defined]
                        _check_size(member)
                        name = _key_and_suffix(member)
                        if name is not None and name[0] != current:
                            current = name[0]
                            starts.append(member.offset)
                        end = min(tar.offset, size)
                    problem = _what_follows(file, tar.offset, size)
            except (tarfile.TarError, ValueError, EOFError) as error:
                problem, end = f"not read after byte {end} of {size}: {error}", size
    except OSError as error:
        problem = error.strerror or str(error)
    if starts:
        starts.append(end)
    return starts, problem


def write_index(path: str | Path) -> str | None:
    """Writes a shard's index beside it, NAME.tar.index.

    A shard that is broken gets none, so that this is found again whenever it is opened.

    Returns:
        What is wrong with the shard; None: nothing.
    """
    before = os.stat(path)
    offsets, problem = scan(str(path))
    target = Path(f"{path}{_INDEX_SUFFIX}")
    if problem is not None:
        target.unlink(missing_ok=True)
        return problem
    partial = Path(f"{target}.{os.getpid()}.partial")
    # Its time of before: a shard that changes meanwhile has another.
    header = _INDEX_HEADER.pack(_INDEX_MAGIC, before.st_size, before.st_mtime_ns)
    partial.write_bytes(header + _swapped(offsets).tobytes())
    partial.replace(target)
    return None


@dataclasses.dataclass
class _OpenShard:
    """Reads by offsets without moving the file's position, which forked processes share."""

    path: str
    offsets: "array.array[int]"

    def __post_init__(self) -> None:
        self.file: IO[bytes] = open(self.path, "rb", buffering=0)
        # Left to its own end the file warns that nobody closed it.
        weakref.finalize(self, self.file.close)

    def read(self, place: int) -> tuple[int, bytes]:
        start, end = self.offsets[place], self.offsets[place + 1]
        return start, os.pread(self.file.fileno(), end - start, start)


class _EpochOrder:
    """Where the records of an epoch are."""

    def __init__(self, counts: Sequence[int], seed: int, epoch: int) -> None:
        def by_hash(shard: int) -> bytes:
            return hashlib.blake2b(f"{seed} {epoch} {shard}".encode(), digest_size=8).digest()

        self.shards = sorted(range(len(counts)), key=by_hash)
        self.starts = _cumulative([counts[shard] for shard in self.shards])
        self.name = f"{seed} {epoch}"

    def find(self, place: int) -> tuple[int, int]:
        """The shard at a place of the epoch, and which of its records."""
        first = (bisect.bisect_right(self.starts, place) - 1) // WINDOW_SHARDS * WINDOW_SHARDS
        start = self.starts[first]
        end = self.starts[min(first + WINDOW_SHARDS, len(self.shards))]
        key = hashlib.blake2b(f"{self.name} window {first}".encode(), digest_size=16).digest()
        place = start + permuted(place - start, end - start, key)
        rank = bisect.bisect_right(self.starts, place) - 1
        return self.shards[rank], place - self.starts[rank]


def permuted(place: int, count: int, key: bytes) -> int:
    """Where a permutation of `count` has `place`, without a list of all the others.

    A Feistel network of four rounds over the next even power of two, walked until it is back below
    `count`; its hash makes it the same on every machine and in every version.
    """
    half = max(1, ((count - 1).bit_length() + 1) // 2)
    mask = (1 << half) - 1
    while True:
        left, right = place >> half, place & mask
        for turn in range(4):
            digest = hashlib.blake2b(
                right.to_bytes(8, "little") + bytes([turn]), digest_size=8, key=key
            ).digest()
            left, right = right, left ^ (int.from_bytes(digest, "little") & mask)
        place = left << half | right
        if place < count:
            return place


def _cumulative(counts: Sequence[int]) -> list[int]:
    starts = [0]
    for count in counts:
        starts.append(starts[-1] + count)
    return starts


def _check_size(member: tarfile.TarInfo) -> None:
    """tarfile goes back by a negative size, and then around for ever."""
    if member.size < 0:
        raise tarfile.ReadError(f"{member.name}: expected a size of at least 0, got {member.size}")


def _key_and_suffix(member: tarfile.TarInfo) -> tuple[str, str] | None:
    """None of what is no part of a sample: folders, names without a dot, webdataset's own."""
    if not member.isreg() or _META_NAME.match(member.name):
        return None
    key, suffix = require("webdataset.tariterators", "train").base_plus_ext(member.name)
    return None if key is None else (key, suffix.lower())


def _record(data: bytes, start: int, fallback: str, shard: str) -> Record:
    """Of the bytes of its members and their headers, which were at `start` of the shard."""
    key, members = None, {}
    problem = None
    # A file may end within the zeros that fill the last block of a member.
    padded = data + bytes(-len(data) % tarfile.BLOCKSIZE)
    try:
        with tarfile.open(fileobj=io.BytesIO(padded), mode="r:") as tar:
            for member in tar:
                _check_size(member)
                name = _key_and_suffix(member)
                if name is None:
                    continue
                key, suffix = name
                content = data[member.offset_data : member.offset_data + member.size]
                if len(content) < member.size:
                    problem = ("broken_shard", f"the file ends within {member.name}")
                elif suffix in members and problem is None:
                    problem = ("duplicate_member", f"expected one {member.name}, got several")
                members[suffix] = content
    except (tarfile.TarError, ValueError, EOFError) as error:
        problem = problem or ("broken_shard", f"at byte {start}: {error}")
    if key is None and problem is None:
        problem = ("broken_shard", f"expected a member of a tar file at byte {start}")
    return Record(fallback if key is None else key, shard, members, problem)


def _what_follows(file: IO[bytes], offset: int, size: int) -> str | None:
    """What is wrong with the end of a tar file; tarfile takes anything for it but the first."""
    file.seek(offset)
    block = file.read(tarfile.BLOCKSIZE)
    if len(block) < tarfile.BLOCKSIZE:
        return f"cut off: it ends at byte {size} without the mark of an archive's end"
    if block.count(0) < len(block):
        return f"broken header at byte {offset} of {size}; what follows is not read"
    while block:
        if block.count(0) < len(block):
            return f"data after the archive's end at byte {offset}; it is not read"
        block = file.read(1 << 20)
    return None


def _indexed_count(path: str) -> int | None:
    """How many records the index has; None: there is none of this shard as it is."""
    try:
        status = os.stat(path)
        with open(f"{path}{_INDEX_SUFFIX}", "rb") as file:
            header = file.read(_INDEX_HEADER.size)
            length = os.fstat(file.fileno()).st_size - _INDEX_HEADER.size
    except OSError:
        return None
    expected = (_INDEX_MAGIC, status.st_size, status.st_mtime_ns)
    if len(header) < _INDEX_HEADER.size or _INDEX_HEADER.unpack(header) != expected or length % 8:
        return None
    return max(length // 8 - 1, 0)


def _read_index(path: str) -> "array.array[int]":
    offsets = array.array("q")
    offsets.frombytes(Path(f"{path}{_INDEX_SUFFIX}").read_bytes()[_INDEX_HEADER.size :])
    return _swapped(offsets)


def _swapped(offsets: "array.array[int]") -> "array.array[int]":
    """From little-endian or to it."""
    if sys.byteorder == "big":
        offsets = offsets[:]
        offsets.byteswap()
    return offsets
