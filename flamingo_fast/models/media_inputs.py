"""What a model is given: its checks, and media of all forms as one list."""

from collections.abc import Sequence
from typing import Any

import torch

# (B, N, ...), (media_total, ...), or each row's.
Media = torch.Tensor | Sequence[Sequence[torch.Tensor]]


def check_ids(
    input_ids: torch.Tensor, attention_mask: torch.Tensor | None, labels: torch.Tensor | None
) -> None:
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


def check_counts(name: str, tokens: list[int] | None, counts: list[int]) -> None:
    for row, (wanted, given) in enumerate(zip(tokens or (), counts, strict=False)):
        if wanted != given:
            raise ValueError(
                f"{name}: row {row} has {wanted} image tokens and {given} {name}; expected as many"
            )


def cat_frames(media: Sequence[torch.Tensor]) -> torch.Tensor:
    return torch.cat(list(media)) if media else torch.empty(0, 3, 1, 1)


def flat_media(
    name: str,
    values: Media,
    rows: int,
    tokens: list[int] | None,
    num_media: Sequence[int] | None,
) -> tuple[Any, list[int]]:
    """The media row after row, with a dimension of frames, and their number in each row."""
    has_frames = name == "videos"
    if not isinstance(values, torch.Tensor):
        if len(values) != rows:
            raise ValueError(f"{name}: expected a list for each of {rows} rows, got {len(values)}")
        flat = [each for row in values for each in row]
        if not has_frames:
            flat = [each[None] for each in flat]
        expected = "(F, 3, H, W)" if has_frames else "(3, H, W)"
        for each in flat:
            got = tuple(each.shape[0 if has_frames else 1 :])
            if each.dim() != 4 or each.shape[0] == 0:
                raise ValueError(f"{name}: expected tensors of shape {expected}, got one of {got}")
            if each.shape[1:] != flat[0].shape[1:]:
                first = tuple(flat[0].shape[0 if has_frames else 1 :])
                raise ValueError(f"{name}: expected images of one size, got {first} and {got}")
        return flat, [len(row) for row in values]
    sizes = 3 if name == "media" else 4 + has_frames
    if values.dim() == sizes:
        counts = num_media if num_media is not None else tokens
        if counts is None or values.shape[0] != sum(counts):
            raise ValueError(
                f"{name}: expected {sum(counts or ())} of them, as there are image tokens (or "
                f"num_media says), got {values.shape[0]}"
            )
        flat_values = values
    elif values.dim() == sizes + 1 and values.shape[0] == rows:
        counts = num_media if num_media is not None else tokens
        assert counts is not None
        for row, count in enumerate(counts):
            if count > values.shape[1]:
                raise ValueError(
                    f"{name}: row {row} has {count} image tokens and {values.shape[1]} {name}; "
                    "expected no more tokens"
                )
        flat_values = torch.cat([row[:count] for row, count in zip(values, counts, strict=True)])
    else:
        form = "(M, R, D)" if name == "media" else f"(M, {'F, ' if has_frames else ''}3, H, W)"
        raise ValueError(
            f"{name}: expected shape {form} or with {rows} rows before it, got "
            f"{tuple(values.shape)}"
        )
    if name == "images":
        flat_values = flat_values[:, None]
    return flat_values, list(counts)
