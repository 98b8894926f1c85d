"""`flamingo-fast data`: files are packed into shards, and shards are checked."""

import base64
import dataclasses
import functools
import json
import os
from pathlib import Path

import pytest

pytest.importorskip("webdataset")
pytest.importorskip("av")

from shard_cases import animation, encoded, mixed_records, picture, write_tar  # noqa: E402

from flamingo_fast.cli import data as data_command  # noqa: E402
from flamingo_fast.training.samples import Limits, Medium, Sample, parse  # noqa: E402
from flamingo_fast.training.shards import ShardSet  # noqa: E402
from flamingo_fast.training.writers import SourceError, write_samples, write_shards  # noqa: E402


@pytest.fixture
def run(command):
    """Runs `flamingo-fast data` with arguments; returns (exit code, stdout, stderr)."""
    return functools.partial(command, "data")


def samples_in(folder, kind):
    shards = ShardSet([f"{folder}/*.tar"])
    assert not shards.unindexed
    return [parse(record, kind, Limits()) for record in shards]


def put(folder, files):
    for name, data in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data if isinstance(data, bytes) else data.encode())
    return folder


def image(seed, format="JPEG"):
    return encoded(picture(seed=seed), format)


@pytest.fixture
def pairs(tmp_path):
    return put(
        tmp_path / "pairs",
        {
            "a.b.jpg": image(1),
            "a.b.txt": "a cat",
            "deep/er/x.PNG": image(2, "PNG"),
            "deep/er/x.json": json.dumps({"caption": "two dogs"}),
            "lost.jpg": image(3),
            "alone.txt": "nothing",
            "bad.jpg": "no image",
            "bad.txt": "a cat",
            "notes.md": "of no sample",
            ".hidden/y.jpg": image(4),
        },
    )


def test_pairs_of_a_folder_are_packed(run, pairs, tmp_path):
    out = tmp_path / "out"
    code, stdout, _ = run("pack", "image_text", pairs, out, "--max-bad-rate", 0.6)
    assert code == 0
    assert "5 samples, 3 of them bad" in stdout and f"wrote 1 shard to {out}" in stdout
    assert [sample.parts for sample in samples_in(out, "image_text")] == [
        (Medium("jpg", image(1), False), "a cat"),
        (Medium("png", image(2, "PNG"), False), "two dogs"),
    ]
    rows = {line.split("│")[1].strip(): line for line in stdout.splitlines() if "│" in line}
    assert "alone" in rows["missing_member"] and "bad" in rows["not_an_image"]


def test_too_many_bad_samples_exit_with_1(run, pairs, tmp_path):
    code, _, err = run("pack", "image_text", pairs, tmp_path / "out")
    assert code == 1
    assert "60.00% of the samples are bad, more than max-bad-rate, 10.00%" in err
    assert len(samples_in(tmp_path / "out", "image_text")) == 2


def test_what_there_is_already_is_not_overwritten(run, pairs, tmp_path):
    out = put(tmp_path / "out", {"mine.txt": "mine"})
    code, _, err = run("pack", "image_text", pairs, out)
    assert code == 2 and "expected a new folder" in err
    assert os.listdir(out) == ["mine.txt"]
    (out / "mine.txt").unlink()
    assert run("pack", "image_text", pairs, out, "--max-bad-rate", 1)[0] == 0


@pytest.mark.parametrize("suffix", ["csv", "tsv", "jsonl"])
def test_lists_of_files_are_packed(run, tmp_path, suffix):
    folder = put(tmp_path / "list", {"images/a.jpg": image(1), "b.png": image(2, "PNG")})
    elsewhere = put(tmp_path / "elsewhere", {"c.jpg": image(3)}) / "c.jpg"
    rows = [
        ("images/a.jpg", 'a "cat", or'),
        ("b.png", "é"),
        (str(elsewhere), "b" * 200_000),
        ("gone.jpg", "a cat"),
        (str(elsewhere), "two\nlines"),
    ]
    if suffix == "jsonl":
        lines = [json.dumps({"path": path, "text": text}) for path, text in rows]
        lines += ["", "{", json.dumps({"path": "b.png"}), json.dumps([1])]
    else:
        tab = "\t" if suffix == "tsv" else ","
        lines = [f"id{tab}path{tab}text"]
        for path, text in rows:
            quoted = text.replace('"', '""')
            lines.append(f'1{tab}{path}{tab}"{quoted}"')
    text = "\n".join(lines).encode()
    if suffix != "jsonl":
        text += f"\n1{tab}b.png{tab}caf".encode() + b"\xe9"
    source = put(folder, {f"list.{suffix}": text}) / f"list.{suffix}"
    outcomes = write_shards("image_text", source, tmp_path / "out", limits=Limits(100_000))
    found = [sample.parts[1] for sample in samples_in(tmp_path / "out", "image_text")]
    assert found == ['a "cat", or', "é", "two\nlines"]
    expected = {"ok": 3, "text_too_long": 1, "missing_member": 1}
    if suffix == "jsonl":
        assert outcomes.counts == expected | {"invalid_json": 1, "wrong_json_shape": 2}
        assert outcomes.examples["invalid_json"][0].key == "line 7"
    else:
        assert outcomes.counts == expected | {"text_not_utf8": 1}


def test_videos_are_packed(run, tmp_path):
    source = put(
        tmp_path / "videos",
        {"a.gif": animation(), "a.txt": "noise", "b.mp4": "no video", "b.txt": "none"},
    )
    code, stdout, _ = run("pack", "video_text", source, tmp_path / "out", "--max-bad-rate", 0.5)
    assert code == 0 and "broken_video" in stdout
    (sample,) = samples_in(tmp_path / "out", "video_text")
    assert sample.parts == (Medium("gif", animation(), True), "noise")


def test_web_pages_of_a_folder_are_packed(tmp_path):
    mmc4 = {
        "text_list": ["A cat.", "A dog."],
        "image_info": [
            {"image_name": "x.webp", "matched_text_index": 1, "image_base64": None},
            {"image_base64": base64.b64encode(image(2)).decode(), "matched_text_index": 1},
        ],
    }
    outside = {"images": ["../../secret.jpg", None], "texts": [None, "a"]}
    put(tmp_path, {"secret.jpg": image(9)})
    source = put(
        tmp_path / "pages",
        {
            "one/p.json": json.dumps({"images": ["i/Cat.JPG", None], "texts": [None, "a"]}),
            "one/i/Cat.JPG": image(1),
            "two.json": json.dumps(mmc4),
            "x.webp": image(3, "WEBP"),
            "three/q.json": json.dumps(outside),
        },
    )
    outcomes = write_shards("interleaved", source, tmp_path / "out")
    # JSON of others must not make a shard of what else there is on a machine.
    assert outcomes.counts == {"ok": 2, "missing_member": 1}
    assert [sample.parts for sample in samples_in(tmp_path / "out", "interleaved")] == [
        (Medium("0.jpg", image(1), False), "a"),
        (
            "A cat.",
            Medium("0.webp", image(3, "WEBP"), False),
            Medium("1.img", image(2), False),
            "A dog.",
        ),
    ]


def test_a_web_page_that_cannot_be_read_is_a_bad_sample(tmp_path, monkeypatch):
    document = json.dumps({"images": ["x.jpg", None], "texts": [None, "hi"]})
    folder = put(tmp_path / "in", {"a.json": document, "b.json": document, "x.jpg": image(1)})
    read = Path.read_bytes

    def read_bytes(path):
        if path.name == "a.json":
            raise PermissionError(13, "Permission denied")
        return read(path)

    monkeypatch.setattr(Path, "read_bytes", read_bytes)
    outcomes = write_shards("interleaved", folder, tmp_path / "out")
    assert outcomes.counts == {"ok": 1, "missing_member": 1}
    assert outcomes.examples["missing_member"][0].detail == ".json: Permission denied"


def test_web_pages_of_lines_are_packed(tmp_path):
    lines = [
        json.dumps({"images": [None, "a.jpg"], "texts": ["é", None]}),
        json.dumps({"images": [None], "texts": ["text alone"]}),
    ]
    source = put(tmp_path / "in", {"a.jpg": image(1), "pages.jsonl": "\n".join(lines)})
    outcomes = write_shards("interleaved", source / "pages.jsonl", tmp_path / "out")
    assert outcomes.counts == {"ok": 2}
    assert [sample.parts for sample in samples_in(tmp_path / "out", "interleaved")] == [
        ("é", Medium("0.jpg", image(1), False)),
        ("text alone",),
    ]


def test_shards_are_full_at_a_count_or_a_size(tmp_path):
    samples = [Sample("", "", (Medium("jpg", image(i), False), f"number {i}")) for i in range(10)]
    size = len(image(0))
    by_count = write_samples("image_text", samples, tmp_path / "100 % a:b", shard_samples=4)
    by_size = write_samples("image_text", samples, tmp_path / "size", shard_bytes=5 * size)
    assert [path.name for path in by_count] == [f"image_text-00000{i}.tar" for i in range(3)]
    assert len(by_size) == 2
    for paths in (by_count, by_size):
        shards = ShardSet([str(path) for path in paths])
        assert [record.key for record in shards] == [f"{i:09d}" for i in range(10)]
    again = write_samples("image_text", samples, tmp_path / "again", shard_samples=4)
    assert [path.read_bytes() for path in again] == [path.read_bytes() for path in by_count]
    for wrong in ((Medium("jpg", b"", False),), ("a", "b"), (Medium("a.jpg", b"", False), "b")):
        with pytest.raises(ValueError, match="samples: expected a pair"):
            write_samples("image_text", [Sample("", "", wrong)], tmp_path / "wrong")


def test_nothing_is_left_where_packing_fails(tmp_path):
    def samples():
        yield Sample("", "", (Medium("jpg", image(0), False), "a"))
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write_samples("image_text", samples(), tmp_path / "out")
    source = put(tmp_path / "source", {"a.jpg": "no image", "a.txt": "a"})
    with pytest.raises(SourceError, match="got none of 1\nnot_an_image: 1"):
        write_shards("image_text", source, tmp_path / "out")
    assert os.listdir(tmp_path) == ["source"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("pack", "images", "pairs", "out"), "kind: expected one of interleaved, image_text"),
        (("pack", "image_text", "gone", "out"), "source: there is no file or folder gone"),
        (("pack", "interleaved", "list.csv", "out"), "a file of .jsonl; got list.csv"),
        (("pack", "image_text", "list.csv", "out"), "columns path and text in list.csv, got 'url'"),
        (("pack", "image_text", "long.csv", "out"), "in long.csv, got 'a.png', 'xxxx"),
        (("pack", "image_text", "empty", "out"), "got none of 0"),
        (("pack", "image_text", "../pairs", "."), "out: expected a new folder by its name, got ."),
        (("pack", "image_text", "pairs", "out", "--unusual-images", "keep"), "convert or skip"),
        (("pack", "image_text", "pairs", "out", "--shard-size", "0"), "'--shard-size'"),
        (("check", "image_text", "gone.tar"), "shards: there is no file gone.tar"),
        (("check", "image_text", "list.csv"), "expected at least one sample"),
        (("index", "gone.tar"), "shards: there is no file gone.tar"),
    ],
)
def test_bad_usage_exits_with_2(run, pairs, tmp_path, monkeypatch, arguments, message):
    put(tmp_path, {"list.csv": "url\nx\n", "long.csv": "a.png," + "x" * 200_000})
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty" if arguments[-1] == "." else tmp_path)
    code, _, err = run(*arguments)
    assert code == 2
    assert message in " ".join(err.replace("│", " ").split())
    assert "Traceback" not in err
    assert not (tmp_path / "out").exists()


def test_limits_are_by_default_a_configs():
    given = [getattr(data_command, f"_{each.name.upper()}") for each in dataclasses.fields(Limits)]
    assert tuple(given) == dataclasses.astuple(Limits())


def test_check_reads_everything(run, tmp_path):
    records = [(key, members) for key, _, members in mixed_records("interleaved", 60)]
    good = write_tar(tmp_path / "a.tar", records)
    cut = tmp_path / "b.tar"
    cut.write_bytes(Path(good).read_bytes()[:3000])
    options = ("--max-text-chars", 200, "--max-image-pixels", 10_000, "--max-bad-rate", 0.5)
    code, stdout, _ = run("check", "interleaved", good, cut, *options)
    assert code == 0
    assert "62 samples, " in stdout
    assert f"broken shard {cut}: " in stdout
    for outcome in ("ok", "converted_image", "truncated_image", "image_index_out_of_range"):
        assert f" {outcome} " in stdout
    options = (*options[:-1], 0.1, "--unusual-images", "skip")
    code, stdout, err = run("check", "interleaved", good, *options)
    assert code == 1
    assert "unusual_image" in stdout and "more than max-bad-rate" in err


def test_index_makes_opening_quick(run, tmp_path):
    good = write_tar(tmp_path / "a.tar", [("a", {"txt": b"x"})])
    assert ShardSet([good]).unindexed
    assert run("index", good)[:2] == (0, "indexed 1 of 1 shards\n")
    assert not ShardSet([good]).unindexed
    (tmp_path / "b.tar").write_bytes(b"no tar")
    code, stdout, _ = run("index", f"{tmp_path}/*.tar")
    assert code == 1 and "indexed 1 of 2 shards" in stdout
