"""Wrong masks, masks of tiles and packed documents, each refused by its name."""

import pytest
import torch
from layout_cases import locations_of

from flamingo_fast.layout import MediaLayout

MASK = torch.tensor([[[1, 0, 0], [0, 1, 0]], [[0, 0, 0], [1, 1, 0]]])


@pytest.mark.parametrize(
    ("error", "message", "changed"),
    [
        (TypeError, "mask: expected a tensor, got list", {"mask": [[[1]]]}),
        (TypeError, "mask: expected bool or integers, got torch.float32", {"mask": MASK.float()}),
        (TypeError, "mask: expected bool or integers, got torch.complex", {"mask": MASK * 1j}),
        (ValueError, r"mask: expected shape \(B, L, N\), got \(2, 3\)", {"mask": MASK[0]}),
        (
            ValueError,
            r"mask: expected shape \(B, L, N\), got \(2, 2, 3, 1\)",
            {"mask": MASK[..., None]},
        ),
        (
            ValueError,
            "mask: token 1 of sample 1 attends to 2 media, more than max_media_per_token 1",
            {"max_media_per_token": 1},
        ),
        (
            ValueError,
            "mask: token 0 of sample 0 attends to 1 media, more than max_media_per_token 0",
            {"max_media_per_token": 0},
        ),
        (
            ValueError,
            "max_media_per_token: expected an integer >= 0, got -1",
            {"max_media_per_token": -1},
        ),
        (
            ValueError,
            "max_media_per_token: expected an integer >= 0, got True",
            {"max_media_per_token": True},
        ),
        (
            ValueError,
            "mask: token 1 of sample 1 attends to medium 1 of 1",
            {"num_media": [3, 1]},
        ),
        (ValueError, "num_media: expected at most 3, the mask's media, got 4", {"num_media": 4}),
        (ValueError, r"num_media: .* 2 of them .* got \[3\]", {"num_media": [3]}),
        (TypeError, "num_media: expected integers", {"num_media": torch.ones(2)}),
        (ValueError, "media_total: num_media adds up to 6, got 5", {"media_total": 5}),
        (TypeError, "media_seqlens: expected a tensor, got list", {"media_seqlens": [1] * 6}),
        (
            ValueError,
            r"media_seqlens: expected shape \(6,\) on cpu, got \(5,\) on cpu",
            {"media_seqlens": torch.ones(5, dtype=torch.int64)},
        ),
        (
            ValueError,
            "media_seqlens: medium 4 has -2 tokens",
            {"media_seqlens": torch.tensor([1, 1, 1, 1, -2, 1])},
        ),
    ],
)
def test_wrong_arguments_of_from_media_mask(error, message, changed):
    with pytest.raises(error, match=message):
        MediaLayout.from_media_mask(**{"mask": MASK} | changed)


@pytest.mark.parametrize(
    ("error", "message", "changed"),
    [
        (TypeError, "mask: expected a tensor, got int", {"mask": 3}),
        (
            TypeError,
            "mask: expected bool or integers, got torch.float64",
            {"mask": MASK[..., None].double()},
        ),
        (
            ValueError,
            r"mask: expected shape \(B, L, N, tiles\), got \(2, 2, 3\)",
            {"mask": MASK},
        ),
        (ValueError, "tokens_per_tile: expected an integer > 0, got 0", {"tokens_per_tile": 0}),
        (ValueError, "tokens_per_tile: expected an integer > 0, got -5", {"tokens_per_tile": -5}),
        (ValueError, "tokens_per_tile: expected an integer .* 1.5", {"tokens_per_tile": 1.5}),
        (
            ValueError,
            "mask: token 1 of sample 1 attends to 2 media, more than max_media_per_token 1",
            {"max_media_per_token": 1},
        ),
        (
            ValueError,
            "max_media_per_token: expected an integer >= 0, got 1.0",
            {"max_media_per_token": 1.0},
        ),
    ],
)
def test_wrong_arguments_of_from_tile_mask(error, message, changed):
    arguments = {"mask": MASK[..., None], "tokens_per_tile": 5} | changed
    with pytest.raises(error, match=message):
        MediaLayout.from_tile_mask(**arguments)


@pytest.mark.parametrize(
    ("error", "message", "changed"),
    [
        (TypeError, "media_locations: expected a tensor", {"media_locations": [[True]]}),
        (TypeError, "media_locations: expected torch.bool", {"media_locations": torch.ones(2, 4)}),
        (
            ValueError,
            r"media_locations: expected shape \(B, L\), got \(4,\)",
            {"media_locations": torch.zeros(4, dtype=torch.bool)},
        ),
        (ValueError, "attend: expected one of previous, next, all.*'all'", {"attend": "all"}),
        (ValueError, "attend: expected one for each of 2 documents", {"attend": ["next"] * 3}),
        (TypeError, "cu_seqlens: expected a tensor or integers >= 0, got 8", {"cu_seqlens": 8}),
        (
            TypeError,
            r"cu_seqlens: expected a tensor or integers >= 0, got \[0, 4.0, 8\]",
            {"cu_seqlens": [0, 4.0, 8]},
        ),
        (
            TypeError,
            "cu_seqlens: expected integers, got torch.float32",
            {"cu_seqlens": torch.tensor([0.0, 4.0, 8.0])},
        ),
        (
            ValueError,
            r"cu_seqlens: expected shape \(documents \+ 1,\), got \(0,\)",
            {"cu_seqlens": []},
        ),
        (
            ValueError,
            r"cu_seqlens: expected shape \(documents \+ 1,\), got \(1, 3\)",
            {"cu_seqlens": torch.tensor([[0, 4, 8]])},
        ),
        (
            ValueError,
            r"cu_seqlens: expected 0 to at most 8 tokens, never falling; got \[1, 4, 8\]",
            {"cu_seqlens": [1, 4, 8]},
        ),
        (ValueError, r"cu_seqlens: .* never falling; got \[0, 5, 4\]", {"cu_seqlens": [0, 5, 4]}),
        (ValueError, r"cu_seqlens: .* at most 8 .* \[0, 4, 9\]", {"cu_seqlens": [0, 4, 9]}),
        (
            ValueError,
            r"cu_seqlens: .* at most 8 .* \[0, 4, 2147483648\]",
            {"cu_seqlens": [0, 4, 2**31]},
        ),
        (
            ValueError,
            r"cu_seqlens: .* \[0, 4, 4294967304\]",
            {"cu_seqlens": torch.tensor([0, 4, 2**32 + 8])},
        ),
        (
            ValueError,
            "cu_seqlens: document 1, tokens 3 to 5, is in two rows of 4 tokens",
            {"cu_seqlens": [0, 3, 6]},
        ),
        (
            ValueError,
            "cu_seqlens: document 0, tokens 0 to 7, is in two rows of 4 tokens",
            {"cu_seqlens": [0, 8, 8]},
        ),
        (ValueError, r"num_media: .* 2 of them .* got \[1, 1, 1\]", {"num_media": [1, 1, 1]}),
        (ValueError, "num_media: expected an integer >= 0, got -1", {"num_media": -1}),
        (
            ValueError,
            r"num_media: expected shape \(2,\), got \(1,\)",
            {"num_media": torch.tensor([1])},
        ),
        (
            ValueError,
            "cu_seqlens: expected a CPU tensor or device cpu, got meta",
            {"cu_seqlens": torch.zeros(3, dtype=torch.int64, device="meta")},
        ),
        (
            ValueError,
            "num_media: expected a CPU tensor or device cpu, got meta",
            {"num_media": torch.zeros(2, dtype=torch.int64, device="meta"), "media_total": 2},
        ),
        (
            ValueError,
            "num_media: 2 media for a batch without rows",
            {"media_locations": torch.zeros(0, 4, dtype=torch.bool), "cu_seqlens": [0, 0, 0]},
        ),
        (ValueError, "media_total: num_media adds up to 2, got 3", {"media_total": 3}),
        (
            ValueError,
            r"media_seqlens: expected shape \(2,\) on cpu, got \(2,\) on meta",
            {"media_seqlens": torch.ones(2, dtype=torch.int64, device="meta")},
        ),
        (
            ValueError,
            "media_seqlens: medium 1 has -1 tokens",
            {"media_seqlens": torch.tensor([2, -1])},
        ),
    ],
)
def test_wrong_arguments_of_packed(error, message, changed):
    arguments = {
        "media_locations": locations_of("i...", ".i.."),
        "cu_seqlens": [0, 4, 8],
        "num_media": 1,
    } | changed
    with pytest.raises(error, match=message):
        MediaLayout.packed(**arguments)
