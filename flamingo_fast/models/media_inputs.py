"""What a model is given: its checks, and media of all forms as one list."""

from collections.abc import Sequence
from typing import Any

import torch

# (B, N, ...), (media_total, ...), all of them, or each row's.
Media = torch.Tensor | Sequence[torch.Tensor] | Sequence[Sequence[torch.Tensor]]
# (media_total, F, S, width), or all of them.
Features = torch.Tensor | Sequence[torch.Tensor]


def check_ids(
    input_ids: torch.Tensor, attention_mask: torch.Tensor | None, labels: torch.Tensor | None
) -> None:
    """Refuses what is not integers of shape (B, L), and others of another shape."""
    if input_ids.dim() != 2 or input_ids.dtype not in (torch.int64, torch.int32):
        raise ValueError(
            f"input_ids: expected integers of shape (B, L), got {input_ids.dtype} of "
            f"{tuple(input_ids.shape)}"
        )
    for name, each in (("attention_mask", attention_mask), ("labels", labels)):
        if each is not None and each.shape != input_ids.shape:
            raise ValueError(
                f"{name}: expected input_ids' shape {tuple(input_ids.shape)}, got "
                f"{tuple(each.shape)}"
            )


def check_vocabulary(input_ids: torch.Tensor, num_tokens: int) -> None:
    """Whether there are such tokens; on a GPU, which nobody waits for, the embedding fails."""
    if input_ids.device.type != "cpu" or input_ids.numel() == 0:
        return
    least, most = (int(each) for each in input_ids.aminmax())
    if least < 0 or most >= num_tokens:
        wrong = least if least < 0 else most
        raise ValueError(f"input_ids: expected ids of {num_tokens} tokens, got {wrong}")


def check_length(num_tokens: int, max_tokens: int | None, name: str = "input_ids") -> None:
    """Whether a row of so many tokens has positions in the language model."""
    if max_tokens is not None and num_tokens > max_tokens:
        raise ValueError(
            f"{name}: expected rows of at most {max_tokens} tokens, for so many positions the "
            f"language model has embeddings; got {num_tokens}"
        )


def check_logits_to_keep(number: int) -> None:
    """Whether it is a number of last tokens, or 0."""
    if number < 0:
        raise ValueError(f"logits_to_keep: expected at least 0, got {number}")


def check_counts(
    name: str, tokens: list[int] | None, counts: Sequence[int], each: str = "row"
) -> None:
    """`each`: what they are counts of."""
    for index, (wanted, given) in enumerate(zip(tokens or (), counts, strict=False)):
        if wanted != given:
            raise ValueError(
                f"{name}: {each} {index} has {wanted} image tokens and {given} {name}; expected as "
                "many"
            )


def _counts_of_flat(
    name: str, number: int, tokens: list[int] | None, num_media: Sequence[int] | None
) -> list[int]:
    """Those of each row, of so many media row after row."""
    counts = num_media if num_media is not None else tokens
    if counts is None or number != sum(counts):
        raise ValueError(
            f"{name}: expected {sum(counts or ())} of them, as there are image tokens (or "
            f"num_media says), got {number}"
        )
    return list(counts)


def flat_media(
    name: str,
    values: Media,
    rows: int,
    tokens: list[int] | None,
    num_media: Sequence[int] | None,
    each: str = "row",
) -> tuple[Any, list[int]]:
    """The media row after row, with a dimension of frames, and their number in each row.

    Arguments:
        name: of the argument: "images", "videos" or "media".
        tokens: image tokens of each row, if they were counted.
        each: what rows are called.
    """
    has_frames = name == "videos"
    if not isinstance(values, torch.Tensor) and name == "media":
        raise TypeError(
            "media: expected a tensor or the pair that encode returned, got "
            f"{type(values).__name__}"
        )
    if not isinstance(values, torch.Tensor):
        return _flat_lists(name, values, rows, tokens, num_media, each)
    sizes = 3 if name == "media" else 4 + has_frames
    if values.dim() == sizes:
        counts = _counts_of_flat(name, values.shape[0], tokens, num_media)
        flat_values = values
    elif values.dim() == sizes + 1 and values.shape[0] == rows:
        given = num_media if num_media is not None else tokens
        assert given is not None
        counts = list(given)
        for row, count in enumerate(counts):
            if count > values.shape[1]:
                raise ValueError(
                    f"{name}: {each} {row} has {count} image tokens and {values.shape[1]} {name}; "
                    "expected no more tokens"
                )
        flat_values = torch.cat([row[:count] for row, count in zip(values, counts, strict=True)])
    else:
        form = "(M, R, D)" if name == "media" else f"(M, {'F, ' if has_frames else ''}3, H, W)"
        raise ValueError(
            f"{name}: expected shape {form} or with {rows} {each}s before it, got "
            f"{tuple(values.shape)}"
        )
    if name == "images":
        flat_values = flat_values[:, None]
    return flat_values, counts


def _flat_lists(
    name: str,
    values: Any,
    rows: int,
    tokens: list[int] | None,
    num_media: Sequence[int] | None,
    each: str,
) -> tuple[list[torch.Tensor], list[int]]:
    has_frames = name == "videos"
    # A row may be a tensor too, of one more dimension.
    if all(isinstance(one, torch.Tensor) and one.dim() == 3 + has_frames for one in values) and (
        len(values) > 0 or rows == 0
    ):
        flat, counts = list(values), _counts_of_flat(name, len(values), tokens, num_media)
    elif len(values) != rows:
        raise ValueError(f"{name}: expected a list for each of {rows} {each}s, got {len(values)}")
    else:
        flat, counts = [one for row in values for one in row], [len(row) for row in values]
    if not has_frames:
        flat = [one[None] for one in flat]
    expected = "(F, 3, H, W)" if has_frames else "(3, H, W)"
    for one in flat:
        got = tuple(one.shape[0 if has_frames else 1 :])
        if one.dim() != 4 or one.shape[0] == 0:
            raise ValueError(f"{name}: expected tensors of shape {expected}, got one of {got}")
        if one.shape[1:] != flat[0].shape[1:]:
            first = tuple(flat[0].shape[0 if has_frames else 1 :])
            raise ValueError(f"{name}: expected images of one size, got {first} and {got}")
    return flat, counts


def flat_features(
    values: Features, width: int, tokens: list[int] | None, num_media: Sequence[int] | None
) -> tuple[Features, list[int]]:
    """What an encoder of features so wide made of media, checked, and their number in each row."""
    shape = f"(F, S, {width})"
    for one in values:
        got = tuple(one.shape)
        if one.dim() != 3 or one.shape[-1] != width or one.shape[0] == 0:
            raise ValueError(f"features: expected {shape} of each medium, got {got}")
        if one.shape[1] != values[0].shape[1]:
            raise ValueError(
                f"features: expected as many of each frame, got {tuple(values[0].shape)} and {got}"
            )
    return values, _counts_of_flat("features", len(values), tokens, num_media)
