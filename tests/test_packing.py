"""Packing: the choice of documents, and how little of a row is padding."""

import itertools
import random
from pathlib import Path

import pytest

pytest.importorskip("webdataset")
pytest.importorskip("timm")

import stream_cases  # noqa: E402

from flamingo_fast.layout import MediaLayout  # noqa: E402
from flamingo_fast.training.batch import Batch  # noqa: E402
from flamingo_fast.training.packing import fullest  # noqa: E402


@pytest.mark.parametrize("with_first", [False, True])
def test_the_fullest_row_is_that_of_a_search_over_all_subsets(with_first: bool) -> None:
    rng = random.Random(0)
    for _ in range(300):
        lengths = [rng.randint(1, 12) for _ in range(rng.randint(1, 7))]
        room = rng.randint(lengths[0], 30)
        subsets = [
            subset
            for size in range(len(lengths) + 1)
            for subset in itertools.combinations(range(len(lengths)), size)
            if sum(lengths[i] for i in subset) <= room and (0 in subset or not with_first)
        ]
        best = max(sum(lengths[i] for i in subset) for subset in subsets)
        chosen = fullest(lengths, room, with_first=with_first)
        assert tuple(chosen) in subsets
        assert sum(lengths[i] for i in chosen) == best


def test_of_equally_full_rows_the_earliest_documents_are_taken() -> None:
    assert fullest([3, 2, 3, 2], 5) == [0, 1]
    assert fullest([1, 4, 4], 4, with_first=True) == [0]
    assert fullest([5], 4) == [] == fullest([], 4)


def test_a_first_document_that_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match="lengths: expected the first to be at most 4, got 5"):
        fullest([5, 1], 4, with_first=True)


def captions(mean: float, most: int, count: int) -> list[int]:
    """Lengths of captions: lognormal, from 1 to `most`, scaled to the mean."""
    rng = random.Random(0)
    draws = [rng.lognormvariate(0, 0.6) for _ in range(count)]
    low, high = 0.0, mean * 4
    for _ in range(40):
        scale = (low + high) / 2
        lengths = [min(max(round(scale * each), 1), most) for each in draws]
        low, high = (scale, high) if sum(lengths) < mean * count else (low, scale)
    return lengths


def padding(batches: list[Batch]) -> float:
    """Share of tokens that belong to no document."""
    tokens = sum(batch.input_ids.numel() for batch in batches)
    pad = stream_cases.WORDS.index("[PAD]")
    return sum(int((batch.input_ids == pad).sum()) for batch in batches) / tokens


# Mean tokens as appendix A.3.3 has them; rows of 32 or 64 as section 2.4 and v1 3.2.2.
@pytest.mark.parametrize(("mean", "max_tokens"), [(12.4, 32), (20.5, 64), (12.4, 256)])
def test_less_than_a_twentieth_of_packed_rows_is_padding(
    tmp_path: Path, mean: float, max_tokens: int
) -> None:
    # A caption has an image and an end beside its tokens.
    lengths = captions(mean, min(max_tokens, 64) - 2, 1000)
    assert sum(lengths) / len(lengths) == pytest.approx(mean, rel=0.02)
    shards = stream_cases.write_pairs(tmp_path, lengths)
    shares = {}
    for pack in (False, True):
        config = stream_cases.dataset(shards, max_tokens=max_tokens, pack=pack, batch_size=8)
        stream = stream_cases.stream(config)
        batches = []
        while stream.epoch < 0.9:
            batches.append(next(stream))
        shares[pack] = padding(batches)
    print(f"mean {mean}, rows of {max_tokens}: padding {shares[True]:.2%}, not {shares[False]:.2%}")
    assert shares[True] < 0.05 < shares[False]


def test_packed_batches_are_what_layouts_take(tmp_path: Path) -> None:
    shards = stream_cases.write_pairs(tmp_path, captions(5, 12, 60))
    batch = next(stream_cases.stream(stream_cases.dataset(shards, pack=True, max_tokens=20)))
    assert batch.cu_seqlens is not None and batch.attend is not None
    layout = MediaLayout.packed(
        batch.input_ids == stream_cases.IMAGE,
        batch.cu_seqlens,
        batch.num_media,
        batch.attend,
        media_total=len(batch.pixels),
    )
    # Every token of a document sees the one medium of it, so no document has two.
    seen = layout.media_end - layout.media_start
    padding = batch.input_ids == stream_cases.WORDS.index("[PAD]")
    assert seen.eq(1).equal(~padding)
