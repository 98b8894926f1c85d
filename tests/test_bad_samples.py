"""Counts of bad samples, their examples, and where they become too many."""

import dataclasses
import json
import os
import pickle
from pathlib import Path
from typing import ClassVar

import pytest

pytest.importorskip("webdataset")
pytest.importorskip("PIL")

from shard_cases import MAX_CHARS, MAX_PIXELS, mixed_records, write_tar  # noqa: E402

from flamingo_fast.training.bad_samples import (  # noqa: E402
    REASONS,
    BadSample,
    BadSamplesError,
    Outcomes,
)
from flamingo_fast.training.checking import check_shards  # noqa: E402
from flamingo_fast.training.samples import Limits  # noqa: E402
from flamingo_fast.training.shards import ShardSet  # noqa: E402


def outcomes_of(ok=0, bad=0, reason="empty_text", converted=0):
    found = Outcomes()
    for i in range(ok):
        found.add_used(f"ok{i}", "a.tar")
    for i in range(converted):
        found.add_used(f"cmyk{i}", "a.tar", is_converted=True)
    for i in range(bad):
        found.add_bad(f"bad{i}", "a.tar", BadSample(reason, f"detail {i}"))
    return found


def test_bad_samples_say_why():
    error = BadSample("empty_text", "two\nlines of \udcff" + "a" * 1000)
    assert (error.reason, error.detail[:16]) == ("empty_text", "two lines of ?aa")
    assert len(error.detail) == 200
    assert str(error) == f"empty_text: {error.detail}"
    # Workers hand them to the process that trains.
    again = pickle.loads(pickle.dumps(error))
    assert (again.reason, again.detail) == (error.reason, error.detail)
    with pytest.raises(ValueError, match="reason: expected one of missing_member, .*; got 'odd'"):
        BadSample("odd", "")


def test_outcomes_add_up():
    found = outcomes_of(ok=5, bad=7, converted=2)
    assert found.counts == {"ok": 5, "converted_image": 2, "empty_text": 7}
    assert (found.total, found.bad) == (14, 7)
    assert [each.key for each in found.examples["empty_text"]] == ["bad0", "bad1", "bad2"]
    assert "ok" not in found.examples


def test_outcomes_are_merged_in_order():
    found = outcomes_of(ok=1, bad=2)
    other = outcomes_of(bad=2, reason="not_an_image")
    other.merge(outcomes_of(bad=5))
    other.broken_shards["b.tar"] = "empty file"
    found.merge(other)
    assert found.counts == {"ok": 1, "empty_text": 7, "not_an_image": 2}
    assert [each.key for each in found.examples["empty_text"]] == ["bad0", "bad1", "bad0"]
    assert found.broken_shards == {"b.tar": "empty file"}
    # What was merged is its own.
    found.add_bad("x", "a.tar", BadSample("not_an_image", ""))
    assert other.counts["not_an_image"] == 2 and len(other.examples["not_an_image"]) == 2


def test_outcomes_go_through_json():
    found = outcomes_of(ok=3, bad=4, converted=1)
    found.broken_shards["b.tar"] = "empty file"
    again = Outcomes.from_dict(json.loads(json.dumps(found.to_dict())))
    assert again == found
    assert again != outcomes_of(ok=3, bad=4, converted=1)
    again.add_used("x", "a.tar")
    assert again.counts["ok"] == 4


def test_a_rate_that_is_too_high_stops_with_the_list():
    found = outcomes_of(ok=90, bad=10)
    found.check(0.1)
    found.add_bad("last", "b.tar", BadSample("not_an_image", "it begins with b'<html>'"))
    with pytest.raises(BadSamplesError) as caught:
        found.check(0.1, name="pairs")
    assert str(caught.value).splitlines() == [
        "pairs: 11 of 101 samples are bad (10.9%), more than max_bad_rate, 10.0%",
        "empty_text: 10",
        "  a.tar, bad0: detail 0",
        "  a.tar, bad1: detail 1",
        "  a.tar, bad2: detail 2",
        "not_an_image: 1",
        "  b.tar, last: it begins with b'<html>'",
    ]
    # Of so few, the rate says little.
    outcomes_of(ok=1, bad=98).check(0.1)
    with pytest.raises(BadSamplesError, match="2 of 3"):
        outcomes_of(ok=1, bad=2).check(0.1, min_samples=1)
    # Converted ones are used.
    outcomes_of(converted=200).check(0.0)


def test_reasons_are_documented():
    for reason in REASONS:
        assert reason in BadSample.__doc__


@dataclasses.dataclass(frozen=True)
class CountedLimits(Limits):
    """Count how often they are pickled; `ends`: unpickling them ends the process."""

    pickled: ClassVar[list[None]] = []
    ends: ClassVar[bool] = False

    def __reduce__(self):
        self.pickled.append(None)
        return (os._exit, (1,)) if self.ends else (Limits, dataclasses.astuple(self))


# Each worker imports torch.
@pytest.mark.slow
def test_shards_are_checked_alike_by_any_number_of_workers(tmp_path: Path):
    records = [(key, members) for key, _, members in mixed_records("image_text", 600)]
    shards = ShardSet([write_tar(tmp_path / "a.tar", records)])
    seen = []
    limits = CountedLimits(MAX_CHARS, MAX_PIXELS)
    here = check_shards(shards, "image_text", limits, progress=seen.append)
    assert seen == [256, 256, 88]
    there = check_shards(shards, "image_text", limits, num_workers=2)
    assert there.to_dict() == here.to_dict()
    assert there.bad and there.counts["converted_image"]
    # Once a process, not with each of three tasks.
    assert len(limits.pickled) == 2


@pytest.mark.slow
def test_a_worker_that_ended_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(CountedLimits, "ends", True)
    shards = ShardSet([write_tar(tmp_path / "a.tar", [("a", {"txt": b"a"})])])
    with pytest.raises(ChildProcessError, match="^a process that reads ended; there may be too"):
        check_shards(shards, "image_text", CountedLimits(), num_workers=1)
