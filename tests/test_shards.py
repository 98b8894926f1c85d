"""Shards: records at any place, indices, broken files and the order of reading."""

import collections
import gzip
import multiprocessing
import os
import pickle
import tarfile
from pathlib import Path

import pytest

pytest.importorskip("webdataset")

from shard_cases import add_member, write_tar  # noqa: E402

from flamingo_fast.models.fields import ConfigError  # noqa: E402
from flamingo_fast.training.shards import (  # noqa: E402
    WINDOW_SHARDS,
    ShardSet,
    permuted,
    write_index,
)


def records_of(shard: int, count: int):
    return [
        (f"{i:04d}", {"jpg": bytes([shard, i]) * 350, "txt": f"{shard} {i}".encode()})
        for i in range(count)
    ]


def shards_in(folder: Path, counts=(3, 2, 4)) -> list[str]:
    return [
        write_tar(folder / f"s-{i:03d}.tar", records_of(i, count)) for i, count in enumerate(counts)
    ]


def texts(shards: ShardSet) -> list[str]:
    return [record.members["txt"].decode() for record in shards]


def test_records_are_read_in_the_order_of_files(tmp_path: Path) -> None:
    shards = ShardSet(shards_in(tmp_path))
    assert len(shards) == 9
    assert texts(shards) == [f"{s} {i}" for s, n in enumerate((3, 2, 4)) for i in range(n)]
    record = shards[4]
    assert (record.key, record.shard) == ("0001", str(tmp_path / "s-001.tar"))
    assert record.members == records_of(1, 2)[1][1] and record.problem is None
    for index in (-1, 9):
        with pytest.raises(IndexError, match=f"expected 0 to 8, got {index}"):
            shards[index]


def test_names_are_split_as_webdataset_splits_them(tmp_path: Path) -> None:
    long = "folder/" + "k" * 150
    names = [
        *("a/x.JPG", "a/x.seg.png", "a/x.txt"),
        # None of these is part of a sample.
        *("README", "__meta__/info.json", "._x.txt"),
        *("b.d/y.jpg", f"{long}.txt", "ünï.txt"),
    ]
    for format in (tarfile.PAX_FORMAT, tarfile.GNU_FORMAT):
        path = tmp_path / "s.tar"
        with tarfile.open(path, "w", format=format) as tar:
            folder = tarfile.TarInfo("a")
            folder.type = tarfile.DIRTYPE
            tar.addfile(folder)
            for name in names:
                add_member(tar, name, name.encode())
        found = {record.key: set(record.members) for record in ShardSet([str(path)])}
        assert found == {
            "a/x": {"jpg", "seg.png", "txt"},
            "b.d/y": {"jpg"},
            long: {"txt"},
            "ünï": {"txt"},
        }


def test_two_members_of_a_name_are_a_problem(tmp_path: Path) -> None:
    path = tmp_path / "s.tar"
    with tarfile.open(path, "w") as tar:
        for name in ("a.txt", "a.jpg", "a.TXT", "b.txt"):
            add_member(tar, name, b"x")
    first, second = ShardSet([str(path)])
    assert first.problem == ("duplicate_member", "expected one a.TXT, got several")
    assert second.problem is None


def test_an_index_saves_reading_the_shards(tmp_path: Path) -> None:
    paths = shards_in(tmp_path)
    without = ShardSet(paths)
    assert without.unindexed == paths
    assert [write_index(path) for path in paths] == [None] * 3
    with_index = ShardSet(paths)
    assert with_index.unindexed == []
    assert list(with_index) == list(without)
    assert with_index.fingerprint == without.fingerprint


def test_a_stale_or_broken_index_is_noticed(tmp_path: Path) -> None:
    paths = shards_in(tmp_path)
    for path in paths:
        write_index(path)
    # Of the same size, and other records.
    os.rename(paths[0], tmp_path / "before.tar")
    write_tar(tmp_path / "s-000.tar", [(key, {"txt": b"x", "gif": b"y"}) for key in "ab"])
    with open(paths[0], "ab") as file:
        file.write(bytes((tmp_path / "before.tar").stat().st_size - file.tell()))
    index = Path(f"{paths[1]}.index")
    index.write_bytes(index.read_bytes()[:-3])
    Path(f"{paths[2]}.index").write_bytes(b"")
    shards = ShardSet(paths)
    assert shards.unindexed == paths
    assert [record.key for record in shards][:3] == ["a", "b", "0000"]
    assert len(shards) == 8


def test_whatever_is_read_before_a_shard_ends_early_is_used(tmp_path: Path) -> None:
    whole = Path(shards_in(tmp_path, (3,))[0]).read_bytes()
    expected = records_of(0, 3)
    path = tmp_path / "cut.tar"
    # A record has a header and 700 bytes in two blocks, and a header and 3 bytes.
    for end in (*range(513, 3 * 2560, 211), 3 * 2560, 3 * 2560 + 100):
        path.write_bytes(whole[:end])
        shards = ShardSet([str(path)])
        assert str(path) in shards.broken
        assert len(shards) == min(3, (end - 512) // 2560 + 1)
        for i, record in enumerate(shards):
            complete = i * 2560 + 2048 + 3 <= end
            if complete:
                assert (record.key, record.members, record.problem) == (*expected[i], None)
            else:
                assert record.problem or set(record.members) < {"jpg", "txt"}
        # None, so that it is told of whenever it is opened.
        assert write_index(path) is not None
        assert not Path(f"{path}.index").exists()


def test_broken_shards_are_told_of_beside_good_ones(tmp_path: Path) -> None:
    (good,) = shards_in(tmp_path, (2,))
    whole = Path(good).read_bytes()
    header = bytearray(whole)
    header[2560 : 2560 + 20] = b"\xff" * 20
    negative = tarfile.TarInfo("0000.txt").tobuf(tarfile.GNU_FORMAT)
    negative = negative[:124] + b"\xff" * 11 + b"\x00" + b" " * 12 + b"        " + negative[156:]
    checksum = f"{sum(negative):06o}\0 ".encode()
    negative = negative[:148] + checksum + negative[156:]
    broken = {
        "empty": (b"", 0, "empty file"),
        "text": (b"no tar file " * 100, 0, "not read"),
        "gzip": (gzip.compress(whole), 0, "not read"),
        "header": (bytes(header), 1, "broken header at byte 2560"),
        "two": (whole + whole, 2, "data after the archive's end"),
        "no end": (whole[: 2 * 2560], 2, "without the mark"),
        "negative": (negative + whole, 0, "expected a size of at least 0, got -"),
    }
    for name, (data, count, message) in broken.items():
        path = tmp_path / f"{name}.tar"
        path.write_bytes(data)
        shards = ShardSet([str(path), good])
        assert len(shards) == count + 2, name
        assert list(shards.broken) == [str(path)] and message in shards.broken[str(path)], name
        assert texts(shards)[-2:] == ["0 0", "0 1"]
    with pytest.raises(ConfigError, match="expected at least one sample, got none.*empty file"):
        ShardSet([str(tmp_path / "empty.tar")])


def test_a_shard_that_goes_away_or_changes_is_a_problem_of_its_records(tmp_path: Path) -> None:
    paths = shards_in(tmp_path)
    shards = ShardSet(paths)
    os.remove(paths[0])
    Path(paths[1]).write_bytes(b"\xff" * 100_000)
    assert shards[0].problem[0] == "broken_shard" and "No such file" in shards[0].problem[1]
    assert shards[3].problem[0] == "broken_shard"
    assert shards[5].members["txt"] == b"2 0"


@pytest.mark.parametrize("places", [bytes(8), bytes(11), bytes(8) + b"\xff" * 7 + b"\x7f"])
def test_an_index_that_changes_is_a_problem_of_its_records(tmp_path: Path, places: bytes) -> None:
    (path,) = shards_in(tmp_path, [2])
    write_index(path)
    shards = ShardSet([path])
    index = Path(f"{path}.index")
    index.write_bytes(index.read_bytes()[:24] + places)
    assert shards[0].problem[0] == "broken_shard"


def test_paths_are_expanded(tmp_path: Path) -> None:
    paths = shards_in(tmp_path)
    assert ShardSet([f"{tmp_path}/s-{{000..002}}.tar"]).paths == paths
    assert ShardSet([f"{tmp_path}/s-*.tar"]).paths == paths
    assert ShardSet([paths[2], f"{tmp_path}/s-00[01].tar"]).paths == [paths[2], *paths[:2]]
    for path, message in (
        (f"{tmp_path}/s-{{000..003}}.tar", "there is no file .*s-003.tar"),
        (f"{tmp_path}/t-*.tar", "there is no file"),
        (f"{tmp_path}/s-{{000..003.tar", "expected braces in pairs, got "),
        ("s3://bucket/s-000.tar", "expected a local path, got 's3://bucket/s-000.tar'"),
        ("pipe:cat s.tar", "expected a local path"),
        (str(tmp_path), "got the folder"),
    ):
        with pytest.raises(ConfigError, match=f"shards: {message}|shards: expected.*{message}"):
            ShardSet([path])


def test_processes_can_share_one(tmp_path: Path) -> None:
    shards = ShardSet(shards_in(tmp_path, (50, 50)))
    expected = texts(shards)
    assert texts(pickle.loads(pickle.dumps(shards))) == expected
    global _shared
    _shared = shards
    # With files that are open: a position of theirs would be shared.
    with multiprocessing.get_context("fork").Pool(2) as pool:
        assert pool.map(_shared_text_at, range(100), chunksize=1) == expected


def _shared_text_at(index: int) -> str:
    return _shared[index].members["txt"].decode()


@pytest.mark.parametrize("count", [1, 2, 3, 5, 16, 17, 63, 1000])
def test_permuted_is_a_permutation(count: int) -> None:
    found = [permuted(i, count, b"key") for i in range(count)]
    assert sorted(found) == list(range(count))
    if count > 10:
        assert found != [permuted(i, count, b"other") for i in range(count)] != list(range(count))


def test_every_epoch_holds_every_record_once_in_an_order_of_its_own(tmp_path: Path) -> None:
    paths = shards_in(tmp_path, (7, 0, 5, 9))
    shards = ShardSet(paths)
    orders = [[shards.position_to_index(21 * e + i, 5, True) for i in range(21)] for e in range(4)]
    orders.append([shards.position_to_index(i, 6, True) for i in range(21)])
    assert all(sorted(order) == list(range(21)) for order in orders)
    assert len(set(map(tuple, orders))) == 5
    # A function of seed and position alone: of another object, asked in another order.
    again = ShardSet(paths)
    for position in (70, 3, 50, 20, 21):
        epoch, place = divmod(position, 21)
        assert again.position_to_index(position, 5, True) == orders[epoch][place]
    assert [shards.position_to_index(i, 5, False) for i in (0, 20, 21, 43)] == [0, 20, 0, 1]


def test_the_order_is_the_same_in_every_version(tmp_path: Path) -> None:
    """A run that goes on with another version of Python must not read other samples."""
    shards = ShardSet(shards_in(tmp_path, (7, 5, 9)))
    found = [shards.position_to_index(i, 0, True) for i in range(8)]
    assert found == [16, 9, 12, 3, 6, 17, 15, 0]


def test_shuffled_reading_stays_within_a_window_of_shards(tmp_path: Path) -> None:
    count = 40
    shards = ShardSet(shards_in(tmp_path, (6,) * count))
    order = [shards.position_to_index(i, 0, True) // 6 for i in range(6 * count)]
    windows = [order[i : i + 6 * WINDOW_SHARDS] for i in range(0, len(order), 6 * WINDOW_SHARDS)]
    seen = [set(window) for window in windows]
    assert [len(each) for each in seen] == [16, 16, 8]
    assert collections.Counter(x for each in seen for x in each).most_common(1)[0][1] == 1
    # And does not go through them one after another.
    assert len(set(order[:6])) > 2
