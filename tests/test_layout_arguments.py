"""MediaLayout's wrong arguments, each refused by its name."""

import pytest
import torch
from layout_cases import LOCATIONS, START

from flamingo_fast.layout import MediaLayout


@pytest.mark.parametrize(
    ("error", "message", "changed"),
    [
        (TypeError, "media_locations: expected a tensor, got list", {"media_locations": [[True]]}),
        (
            TypeError,
            "media_locations: expected torch.bool, got torch.int64",
            {"media_locations": LOCATIONS.long()},
        ),
        (
            ValueError,
            r"media_locations: expected shape \(B, L\), got \(4,\)",
            {"media_locations": LOCATIONS[0]},
        ),
        (
            ValueError,
            "attend: expected one of previous, next, all_previous; got 'last'",
            {"attend": "last"},
        ),
        (ValueError, "attend: expected one of .*; got 'last'", {"attend": ["next", "last"]}),
        (ValueError, "attend: expected one for each of 2 samples, got 1", {"attend": ["next"]}),
        (ValueError, "attend: expected one of .*; got None", {"attend": None}),
        (ValueError, "num_media: expected an integer >= 0, got -1", {"num_media": -1}),
        (ValueError, r"num_media: expected .* 2 of them .* got \[2\]", {"num_media": [2]}),
        (ValueError, r"num_media: .* got \[2, -1\]", {"num_media": [2, -1]}),
        (ValueError, "num_media: expected an integer .* got 2.5", {"num_media": 2.5}),
        (ValueError, "num_media: expected an integer .* got True", {"num_media": True}),
        (
            TypeError,
            "num_media: expected integers, got torch.float32",
            {"num_media": torch.ones(2)},
        ),
        (
            ValueError,
            r"num_media: expected shape \(2,\), got \(3,\)",
            {"num_media": torch.tensor([1, 1, 1])},
        ),
        (ValueError, "media_total: num_media adds up to 4, got 5", {"media_total": 5}),
        (
            TypeError,
            "media_seqlens: expected integers, got torch.float32",
            {"media_seqlens": torch.ones(4)},
        ),
        (TypeError, "media_seqlens: expected .*got list", {"media_seqlens": [1, 1, 1, 1]}),
        (
            ValueError,
            r"media_seqlens: expected shape \(4,\) on cpu, got \(3,\) on cpu",
            {"media_seqlens": torch.tensor([1, 1, 1])},
        ),
        (
            ValueError,
            "media_seqlens: medium 2 has -3 tokens",
            {"media_seqlens": torch.tensor([1, 0, -3, -1])},
        ),
    ],
)
def test_wrong_arguments_of_from_media_locations(error, message, changed):
    arguments = {"media_locations": LOCATIONS, "num_media": 2} | changed
    with pytest.raises(error, match=message):
        MediaLayout.from_media_locations(**arguments)


@pytest.mark.parametrize(
    ("error", "message", "changed"),
    [
        (
            TypeError,
            "media_start: expected torch.int32 or torch.int64, got torch.float32",
            {"media_start": START.float()},
        ),
        (
            ValueError,
            r"media_end: expected shape \(2, 4\), got \(2, 3\)",
            {"media_end": START[:, 1:]},
        ),
        (
            ValueError,
            "media_end: expected device cpu, got meta",
            {"media_end": START.to("meta")},
        ),
        (
            ValueError,
            "max_media_per_token: expected an integer >= 0, got -2",
            {"max_media_per_token": -2},
        ),
        (
            ValueError,
            "max_media_per_token: expected an integer >= 0, got 1.5",
            {"max_media_per_token": 1.5},
        ),
        (ValueError, r"num_media: .* got \[1, 1, 1\]", {"num_media": [1, 1, 1]}),
    ],
)
def test_wrong_arguments_of_from_intervals(error, message, changed):
    arguments = {
        "media_start": START,
        "media_end": START,
        "num_media": 3,
        "max_media_per_token": 1,
    } | changed
    with pytest.raises(error, match=message):
        MediaLayout.from_intervals(**arguments)


def test_valid_tokens_below_0_after_the_media():
    with pytest.raises(ValueError, match="media_seqlens: medium 1 has -3 tokens"):
        MediaLayout.after_media(LOCATIONS, 1, 1, media_seqlens=torch.tensor([2, -3]))


@pytest.mark.parametrize(
    "dtype", [torch.int8, torch.uint8, torch.int16, torch.uint16, torch.uint32]
)
def test_integers_of_any_dtype(dtype):
    cu_seqlens, seqlens = torch.tensor([0, 3, 4]), torch.tensor([9, 0, 5])
    expected = MediaLayout.packed(LOCATIONS[:1], cu_seqlens, [2, 1], media_seqlens=seqlens)
    layout = MediaLayout.packed(
        LOCATIONS[:1], cu_seqlens.to(dtype), [2, 1], media_seqlens=seqlens.to(dtype)
    )
    assert layout == expected
