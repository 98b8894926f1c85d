"""Arguments of a MediaLayout's constructors: checked, and as int32 on its device.

B batch, L text tokens.
"""

import contextlib
import itertools
from collections.abc import Sequence

import torch


def no_inference_tensors() -> contextlib.AbstractContextManager[None]:
    """Autograd can't save what inference mode made, and a layout may be used outside it again."""
    if not torch.compiler.is_compiling() and torch.is_inference_mode_enabled():
        return torch.inference_mode(False)
    return contextlib.nullcontext()


def values_are_at_hand(tensor: torch.Tensor) -> bool:
    """Whether its values can be read without waiting; FakeTensor and its like have none."""
    is_plain = type(tensor) is torch.Tensor or type(tensor) is torch.nn.Parameter
    return tensor.device.type == "cpu" and is_plain and not torch.compiler.is_compiling()


def document_boundaries(
    cu_seqlens: torch.Tensor | Sequence[int], batch: int, seqlen: int, device: torch.device
) -> torch.Tensor:
    """cu_seqlens of documents as int32 on `device`, validated where it is on a CPU."""
    if not isinstance(cu_seqlens, torch.Tensor):
        if not isinstance(cu_seqlens, Sequence) or not all(map(is_count, cu_seqlens)):
            raise TypeError(f"cu_seqlens: expected a tensor or integers >= 0, got {cu_seqlens!r}")
        cu_seqlens = torch.tensor(cu_seqlens, dtype=torch.int64, device="cpu")
    if not holds_integers(cu_seqlens):
        raise TypeError(f"cu_seqlens: expected integers, got {cu_seqlens.dtype}")
    # Differences of unsigned ones never are negative.
    cu_seqlens = cu_seqlens.long()
    if cu_seqlens.dim() != 1 or len(cu_seqlens) == 0:
        raise ValueError(
            f"cu_seqlens: expected shape (documents + 1,), got {tuple(cu_seqlens.shape)}"
        )
    _refuse_other_gpu("cu_seqlens", cu_seqlens, device)
    if values_are_at_hand(cu_seqlens):
        if cu_seqlens[0] != 0 or (cu_seqlens.diff() < 0).any() or cu_seqlens[-1] > batch * seqlen:
            raise ValueError(
                f"cu_seqlens: expected 0 to at most {batch * seqlen} tokens, never falling; "
                f"got {cu_seqlens.tolist()}"
            )
        first, last = cu_seqlens[:-1], cu_seqlens[1:] - 1
        split = (last >= first) & (first // max(seqlen, 1) != last // max(seqlen, 1))
        if split.any():
            document = int(split.nonzero()[0])
            raise ValueError(
                f"cu_seqlens: document {document}, tokens {int(first[document])} to "
                f"{int(last[document])}, is in two rows of {seqlen} tokens"
            )
    cu_seqlens = to_int32(cu_seqlens).to(device, non_blocking=True)
    return cu_seqlens.clamp_(0, batch * seqlen)


def check_integers(
    name: str,
    tensor: torch.Tensor,
    dim: int,
    *,
    dtypes: tuple[torch.dtype, ...] = (torch.int32, torch.int64),
    like: torch.Tensor | None = None,
) -> None:
    """Whether `tensor` has these dtypes, so many dimensions, and the shape and device of `like`.

    Raises:
        TypeError, ValueError: it has not, by `name`.
    """
    if not isinstance(tensor, torch.Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(tensor).__name__}")
    if tensor.dtype not in dtypes:
        expected = " or ".join(str(dtype) for dtype in dtypes)
        raise TypeError(f"{name}: expected {expected}, got {tensor.dtype}")
    if tensor.dim() != dim or (like is not None and tensor.shape != like.shape):
        expected = "(B, L)" if like is None else str(tuple(like.shape))
        raise ValueError(f"{name}: expected shape {expected}, got {tuple(tensor.shape)}")
    if like is not None and tensor.device != like.device:
        raise ValueError(f"{name}: expected device {like.device}, got {tensor.device}")


def count_media(
    num_media: int | Sequence[int] | torch.Tensor,
    batch: int,
    media_total: int | None,
    device: torch.device,
) -> tuple[torch.Tensor, int, int]:
    """(cu_media, media_total, max_media)."""
    if isinstance(num_media, int | float):
        check_count("num_media", num_media)
        cu_media = torch.arange(batch + 1, dtype=torch.int32, device=device) * num_media
        max_media = num_media
        total = batch * num_media
    elif isinstance(num_media, torch.Tensor) and num_media.device.type != "cpu":
        _check_counts(num_media, batch)
        if media_total is None:
            raise ValueError(
                "media_total: expected the sum of num_media, a tensor on "
                f"{num_media.device} whose values are not waited for"
            )
        check_count("media_total", media_total)
        _refuse_other_gpu("num_media", num_media, device)
        cu_media = torch.zeros(batch + 1, dtype=torch.int32, device=device)
        # What is beyond media_total does not exist.
        cu_media[1:] = num_media.long().cumsum(0).clamp_(0, media_total)
        return cu_media, media_total, media_total
    else:
        if isinstance(num_media, torch.Tensor):
            _check_counts(num_media, batch)
            counts = num_media.tolist()
        else:
            counts = list(num_media) if isinstance(num_media, Sequence) else []
        if len(counts) != batch or not all(map(is_count, counts)):
            raise ValueError(
                f"num_media: expected an integer >= 0, {batch} of them or a ({batch},) integer "
                f"tensor; got {num_media!r}"
            )
        cu_media = torch.tensor(
            list(itertools.accumulate(counts, initial=0)), dtype=torch.int32, device="cpu"
        )
        # Not device=device above, which waits for the copy.
        cu_media = cu_media.to(device, non_blocking=True)
        max_media = max(counts, default=0)
        total = sum(counts)
    if media_total not in (None, total):
        raise ValueError(f"media_total: num_media adds up to {total}, got {media_total}")
    return cu_media, total, max_media


def is_count(value: object) -> bool:
    """Whether it is an integer, no bool, of at least 0."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def check_count(name: str, value: object) -> None:
    """Refuses what is no count, by name."""
    if not is_count(value):
        raise ValueError(f"{name}: expected an integer >= 0, got {value!r}")


def _check_counts(num_media: torch.Tensor, batch: int) -> None:
    if not holds_integers(num_media):
        raise TypeError(f"num_media: expected integers, got {num_media.dtype}")
    if num_media.shape != (batch,):
        raise ValueError(f"num_media: expected shape ({batch},), got {tuple(num_media.shape)}")


def _refuse_other_gpu(name: str, values: torch.Tensor, device: torch.device) -> None:
    """A CPU would have to wait for them."""
    if values.device.type != "cpu" and values.device != device:
        raise ValueError(f"{name}: expected a CPU tensor or device {device}, got {values.device}")


def seqlens_of_media(
    media_seqlens: torch.Tensor | None, media_total: int, device: torch.device
) -> torch.Tensor | None:
    """media_seqlens as (media_total,) int32, a copy; None stays None.

    Raises:
        TypeError, ValueError: no integers, another shape or device.
    """
    if media_seqlens is None:
        return None
    if not isinstance(media_seqlens, torch.Tensor):
        raise TypeError(f"media_seqlens: expected a tensor, got {type(media_seqlens).__name__}")
    if not holds_integers(media_seqlens):
        raise TypeError(f"media_seqlens: expected integers, got {media_seqlens.dtype}")
    if media_seqlens.shape != (media_total,) or media_seqlens.device != device:
        raise ValueError(
            f"media_seqlens: expected shape ({media_total},) on {device}, "
            f"got {tuple(media_seqlens.shape)} on {media_seqlens.device}"
        )
    return to_int32(media_seqlens)


def holds_integers(tensor: torch.Tensor) -> bool:
    """Whether the dtype is one of integers; bool is none."""
    return not (tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.bool)


def to_int32(values: torch.Tensor) -> torch.Tensor:
    """A copy; what does not fit stays wrong, or long, instead of wrapping."""
    limits = torch.iinfo(torch.int32)
    # Limits of int32 are none of narrower dtypes, and PyTorch clamps no unsigned ones.
    return values.long().clamp(limits.min, limits.max).int()
