"""Streams: the same rows on any number of ranks and workers, exact states, bad samples, workers."""

import collections
import json
import multiprocessing
import os
import pickle
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import PIL.Image
import pytest
import torch

pytest.importorskip("webdataset")
pytest.importorskip("timm")

import shard_cases  # noqa: E402
import stream_cases  # noqa: E402
from fresh_venv import ROOT  # noqa: E402
from stream_cases import assert_same, dataset, stream, write_pairs  # noqa: E402

from flamingo_fast.models.config import ConfigError  # noqa: E402
from flamingo_fast.training.batch import Batch  # noqa: E402
from flamingo_fast.training.config import DatasetConfig  # noqa: E402
from flamingo_fast.training.stream import Stream, StreamError, merge_states  # noqa: E402
from flamingo_fast.training.throughput import documents_of  # noqa: E402


def lengths(count: int = 90) -> list[int]:
    return [1 + (7 * i) % 11 for i in range(count)]


def with_bad_images(folder: Path, count: int = 90) -> str:
    """Every third image is cut off, which is found after its text was put into a row."""
    records = stream_cases.pairs(lengths(count))
    for key, members in records[::3]:
        members["png"] = members["png"][:40] + key.encode()
    return shard_cases.write_tar(folder / "some-bad.tar", records)


def take(streams: Sequence[Stream], batches: int) -> list[list[Batch]]:
    """Batches of each rank, as several steps would have them."""
    return [[next(each) for each in streams] for _ in range(batches)]


def rows_of(batch: Batch) -> list[tuple[list[int], list[float]]]:
    """Tokens of each row and colours of its images; padding is as long as a rank's rows are."""
    pixels = [] if batch.pixels is None else batch.pixels[:, 0, :, 0, 0].tolist()
    media = iter(pixels)
    rows = batch.input_ids.tolist()
    if batch.attention_mask is not None:
        rows = [row[:n] for row, n in zip(rows, batch.attention_mask.sum(1), strict=True)]
    return [(row, [next(media) for _ in range(row.count(stream_cases.IMAGE))]) for row in rows]


def rows(steps: list[list[Batch]]) -> list[list[tuple[list[int], list[float]]]]:
    return [[row for batch in of_ranks for row in rows_of(batch)] for of_ranks in steps]


def ranks(config: DatasetConfig, world_size: int, **options: object) -> list[Stream]:
    return [
        stream(config, rank=rank, world_size=world_size, **options) for rank in range(world_size)
    ]


def merged(streams: Sequence[Stream]) -> dict:
    """What a checkpoint would have."""
    return json.loads(json.dumps(merge_states([each.state_dict() for each in streams])))


class TestRows:
    @pytest.mark.parametrize(
        ("world_size", "num_workers"), [(2, 0), (4, 0), (1, 2), (2, 2), (1, 9)]
    )
    def test_ranks_and_workers_do_not_matter(
        self, tmp_path: Path, world_size: int, num_workers: int
    ) -> None:
        config = dataset(with_bad_images(tmp_path), pack=True, augment=True)
        alone = [stream(config)]
        expected = rows(take(alone, 12))
        others = ranks(config, world_size, num_workers=num_workers)
        got = rows(take(others, 12))
        assert got == expected
        states = merged(others), merged(alone)
        assert states[0]["lanes"] == states[1]["lanes"]
        assert states[0]["outcomes"]["counts"] == states[1]["outcomes"]["counts"]
        for each in others:
            each.close()

    def test_a_batch_of_workers_is_the_same_in_every_field(self, tmp_path: Path) -> None:
        shards = write_pairs(tmp_path, lengths())
        for pack in (False, True):
            config = dataset(shards, pack=pack)
            alone, shared = stream(config), stream(config, num_workers=3)
            for _ in range(5):
                assert_same(next(shared), next(alone))
            shared.close()

    def test_an_epoch_has_every_sample_once_in_another_order(self, tmp_path: Path) -> None:
        config = dataset(write_pairs(tmp_path, [1] * 48))
        orders = []
        for name in ("a", "b"):
            found = stream(dataset(config.shards[0], name=name))
            for _ in range(2):
                ids = torch.cat([next(found).input_ids[:, 1] for _ in range(12)]).tolist()
                assert sorted(ids) == list(range(3, 51))
                orders.append(ids)
            assert found.epoch == 2.0
        assert len(set(map(tuple, orders))) == 4

    def test_without_shuffling_it_is_that_of_the_shards(self, tmp_path: Path) -> None:
        found = stream(dataset(write_pairs(tmp_path, [1] * 10), shuffle=False))
        ids = torch.cat([next(found).input_ids[:, 1] for _ in range(5)]).tolist()
        assert ids == [3 + i % 10 for i in range(20)]

    def test_ranks_that_cannot_share_a_batch_are_refused(self, tmp_path: Path) -> None:
        config = dataset(write_pairs(tmp_path, [1] * 10))
        with pytest.raises(ConfigError, match="batch_size: expected a multiple of 3 ranks, got 4"):
            stream(config, world_size=3)


class TestStates:
    @pytest.mark.parametrize("pack", [False, True])
    @pytest.mark.parametrize(("before", "after"), [((2, 0), (1, 2)), ((1, 2), (4, 0))])
    def test_a_loaded_state_goes_on_as_if_nothing_had_been(
        self, tmp_path: Path, pack: bool, before: tuple[int, int], after: tuple[int, int]
    ) -> None:
        config = dataset(with_bad_images(tmp_path), pack=pack, augment=True)
        alone = [stream(config)]
        expected = rows(take(alone, 17))

        first = ranks(config, before[0], num_workers=before[1])
        assert rows(take(first, 7)) == expected[:7]
        # Workers are ahead of it.
        state = merged(first)
        second = ranks(config, after[0], num_workers=after[1])
        for each in second:
            each.load_state_dict(state)
        assert merged(second) == state
        assert rows(take(second, 10)) == expected[7:]
        end = merged(second)
        assert end["lanes"] == merged(alone)["lanes"] and end["batches"] == 17
        assert end["outcomes"]["counts"] == merged(alone)["outcomes"]["counts"]
        for each in (*first, *second):
            each.close()

    @pytest.mark.parametrize("num_workers", [0, 2])
    def test_a_stream_can_go_back(self, tmp_path: Path, num_workers: int) -> None:
        found = stream(
            dataset(write_pairs(tmp_path, lengths()), pack=True), num_workers=num_workers
        )
        take([found], 3)
        state = merged([found])
        expected = rows(take([found], 4))
        found.load_state_dict(state)
        assert rows(take([found], 2)) == expected[:2]
        found.close()
        assert rows(take([found], 2)) == expected[2:], "after close the next batch is the next"
        found.close()

    def test_a_copy_of_a_lane_makes_the_same_rows(self, tmp_path: Path) -> None:
        """As processes that are spawned have."""
        found = stream(dataset(write_pairs(tmp_path, lengths()), pack=True))
        next(found)
        lane = found._lanes[1]
        copy = pickle.loads(pickle.dumps(lane))
        for _ in range(3):
            assert copy.next_row()[0] == lane.next_row()[0]
        assert copy.state == lane.state

    def test_states_that_do_not_fit_are_refused(self, tmp_path: Path) -> None:
        shards = write_pairs(tmp_path, lengths())
        state = merged([stream(dataset(shards))])
        for other, what in (
            (dataset(shards, name="other"), "dataset 'other', got 'pairs'"),
            (dataset(shards, batch_size=8), "batch_size 8, got 4"),
            (dataset(str(tmp_path / "pairs-0.tar")), "shards"),
        ):
            with pytest.raises(ValueError, match=f"expected a state of {what}"):
                stream(other).load_state_dict(state)
        parts = [each.state_dict() for each in ranks(dataset(shards), 2)]
        with pytest.raises(ValueError, match="all 4 lanes, 2 are missing"):
            stream(dataset(shards)).load_state_dict(parts[0])
        with pytest.raises(ValueError, match="lanes 0, 1 are in two of them"):
            merge_states([parts[0], parts[0]])
        with pytest.raises(ValueError, match="expected one batches, got 0 and 1"):
            merge_states([parts[0], parts[1] | {"batches": 1}])


class TestBadSamples:
    @pytest.mark.slow
    @pytest.mark.parametrize(("kind", "pack"), [("image_text", True), ("interleaved", False)])
    def test_ten_thousand_a_third_of_them_bad(self, tmp_path: Path, kind: str, pack: bool) -> None:
        """In every way: none is lost, and the reasons are those that were put in."""
        records = list(shard_cases.mixed_records(kind, 10_000))
        outcomes = [outcome for _, outcome, _ in records]
        for i in range(4):
            part = records[i * 2500 : (i + 1) * 2500]
            members = ((key, members) for key, _, members in part)
            shard_cases.write_tar(tmp_path / f"mixed-{i}.tar", members)
        config = dataset(
            str(tmp_path / "mixed-{0..3}.tar"),
            kind=kind,
            pack=pack,
            max_tokens=64,
            batch_size=8,
            max_image_pixels=shard_cases.MAX_PIXELS,
            max_text_chars=shard_cases.MAX_CHARS,
            unusual_images="skip",
        )
        found = stream(config, num_workers=2)
        while found.epoch < 1:
            next(found)
        found.close()
        expected: collections.Counter[str] = collections.Counter()
        pending = 0
        for first, lane in found._lanes.items():
            done = set(range(first, lane.state.position, 8)) - set(lane.state.pending)
            pending += len(lane.state.pending)
            for position in done:
                index = found._shards.position_to_index(position, lane._order_seed, True)
                expected[outcomes[index]] += 1
        assert found.outcomes.counts == expected
        assert set(expected) == set(outcomes)
        read = sum(lane.state.position - first for first, lane in found._lanes.items()) // 8
        assert found.outcomes.total + pending == read >= 10_000
        assert found.outcomes.bad / found.outcomes.total == pytest.approx(1 / 3, abs=0.01)

    def test_a_row_is_filled_up_again(self, tmp_path: Path) -> None:
        found = stream(dataset(with_bad_images(tmp_path), pack=True, max_tokens=24))
        batches = [next(found) for _ in range(10)]
        assert found.outcomes.counts["truncated_image"] > 20
        assert found.outcomes.counts["ok"] == sum(map(len, map(documents_of, batches)))
        padding = sum(int((batch.input_ids == 0).sum()) for batch in batches)
        assert padding < 0.05 * 10 * 4 * 24

    @pytest.mark.parametrize("num_workers", [0, 1])
    def test_nothing_but_bad_ones_stops_it(self, tmp_path: Path, num_workers: int) -> None:
        records = [("a", {"txt": b"w1"}), ("b", {"png": b"", "txt": b"w2"})]
        found = stream(
            dataset(shard_cases.write_tar(tmp_path / "bad.tar", records)), num_workers=num_workers
        )
        with pytest.raises(
            StreamError, match="pairs: 1000 bad samples, one after another"
        ) as error:
            next(found)
        assert "missing_member: 500" in str(error.value) and "empty_file: 500" in str(error.value)

    def test_they_stop_it_in_a_row_that_has_documents_too(self, tmp_path: Path) -> None:
        records = [*stream_cases.pairs([3]), *((f"b{i}", {"txt": b"w1"}) for i in range(1000))]
        path = shard_cases.write_tar(tmp_path / "bad.tar", records)
        found = stream(dataset(path, batch_size=1, pack=True, shuffle=False))
        with pytest.raises(StreamError, match="1000 bad samples, one after another"):
            next(found)

    def test_a_broken_shard_is_in_the_outcomes_of_each_rank(self, tmp_path: Path) -> None:
        path = Path(shard_cases.write_tar(tmp_path / "cut.tar", stream_cases.pairs([1] * 20)))
        path.write_bytes(path.read_bytes()[:-20_000])
        found = stream(dataset(str(path)))
        next(found)
        assert "cut off" in found.outcomes.broken_shards[str(path)]


def failing(image: PIL.Image.Image) -> torch.Tensor:
    raise RuntimeError("no\nsuch pixel")


def sleeping(image: PIL.Image.Image) -> torch.Tensor:
    time.sleep(0.05)
    return stream_cases.colour(image)


def is_running(pid: int) -> bool:
    """Also False of a process that ended, and whose new parent did not ask for it yet."""
    try:
        return ") Z " not in Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False


class TestWorkers:
    @pytest.mark.parametrize("num_workers", [0, 2])
    def test_an_error_names_the_dataset_and_the_sample(
        self, tmp_path: Path, num_workers: int
    ) -> None:
        config = dataset(write_pairs(tmp_path, lengths()), shuffle=False)
        found = stream(config, num_workers=num_workers, image_transform=failing)
        message = r"pairs: sample 00000 of .*pairs-0.tar: RuntimeError: no such pixel$"
        with pytest.raises(StreamError, match=message):
            next(found)
        assert not multiprocessing.active_children()

    def test_a_worker_that_is_killed_is_an_error(self, tmp_path: Path) -> None:
        found = stream(dataset(write_pairs(tmp_path, lengths())), num_workers=2)
        next(found)
        os.kill(multiprocessing.active_children()[0].pid, signal.SIGKILL)
        with pytest.raises(StreamError, match="pairs: a process .* ended by SIGKILL"):
            for _ in range(4):
                next(found)
        assert not multiprocessing.active_children()

    def test_workers_live_on_when_all_of_a_job_gets_sigterm(self, tmp_path: Path) -> None:
        config = dataset(write_pairs(tmp_path, lengths()))
        found, alone = stream(config, num_workers=2), stream(config)
        assert_same(next(found), next(alone))
        for process in multiprocessing.active_children():
            os.kill(process.pid, signal.SIGTERM)
            os.kill(process.pid, signal.SIGINT)
        for _ in range(6):
            assert_same(next(found), next(alone))
        found.close()
        assert not multiprocessing.active_children()

    @pytest.mark.slow
    def test_workers_may_be_spawned(self, tmp_path: Path) -> None:
        config = dataset(write_pairs(tmp_path, lengths()), pack=True)
        lanes = stream(config)
        spawned = Stream(
            lanes._shards,
            lanes._maker,
            image_token_id=stream_cases.IMAGE,
            num_workers=1,
            start_method="spawn",
        )
        for _ in range(4):
            assert_same(next(spawned), next(lanes))
        spawned.close()

    @pytest.mark.slow
    @pytest.mark.parametrize("end", ["exit", "kill"])
    def test_they_end_with_their_parent(self, tmp_path: Path, end: str) -> None:
        program = f"""
import multiprocessing, os, signal, stream_cases, test_stream
config = stream_cases.dataset({write_pairs(tmp_path, lengths())!r})
found = stream_cases.stream(config, num_workers=2, image_transform=test_stream.sleeping)
next(found)
print(*(each.pid for each in multiprocessing.active_children()), flush=True)
if {end!r} == "kill":
    os.kill(os.getpid(), signal.SIGKILL)
"""
        environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}"}
        result = subprocess.run(
            [sys.executable, "-c", program],
            capture_output=True,
            text=True,
            env=environment,
            timeout=120,
        )
        assert result.returncode == (0 if end == "exit" else -signal.SIGKILL), result.stderr
        workers = [int(each) for each in result.stdout.split()]
        assert len(workers) == 2
        deadline = time.monotonic() + 30
        while any(map(is_running, workers)):
            assert time.monotonic() < deadline, "workers are still there"
            time.sleep(0.1)
