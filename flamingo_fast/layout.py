"""MediaLayout: which media each text token attends to, and the work that follows from it.

Dimension names: B batch, L text tokens, N media of a sample, R tokens of a medium.
"""

import contextlib
import dataclasses
import itertools
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch.utils import _pytree as pytree

ATTEND = ("previous", "next", "all_previous")

# The most rows of a tile of any kernel; pieces of split media are multiples of it.
_TILE_ROWS = 32


def chunk_rows(seqlen: int) -> int:
    """Rows of a piece of a split medium at most, in rows of `seqlen` text tokens.

    A medium is split from five quarters of this on. Of the media of random image positions the
    longest has several times the mean, and a GPU waits for it; but each piece of a split medium
    reads K and V again, and its fp32 sums of dK and dV are written and read. A sixteenth of a row
    keeps both, and the memory for those sums, small.
    """
    # Not by bit_length: torch.compile would make a graph for every sixteen tokens.
    rows = 128
    while 16 * rows < seqlen:
        rows *= 2
    return rows


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class MediaLayout:
    """Which media each text token attends to: an interval of its sample's media.

    Make one with `from_media_locations` or `from_intervals`, once for each forward pass and outside
    checkpointed regions: it holds the schedule of the kernels too. It is a pytree of its tensors,
    so it passes through torch.compile, FSDP, DDP and activation checkpointing. Nothing here waits
    for a GPU but `validate`, `==`, `plot` and `to` a CPU.

    Attributes:
        media_start, media_end: (B, L) int32; the token attends to media [start, end) of its
            sample. start == end: to none; of these, start == end == N is past the last medium:
            more image tokens came before it than there are media.
        cu_media: (B + 1,) int32; the media of sample b are cu_media[b]..cu_media[b + 1] of k and v.
        media_seqlens: (media_total,) int32 or None; the valid tokens of each medium, its first
            ones. A medium without any counts as nothing.
        work_items: (items, 4) int32; medium, first row, end row, slot. Rows count through the
            batch. A row is in exactly one item; medium -1 is for rows that attend to none. Longest
            first. A medium with many more rows than `chunk_rows(L)` has several items, each with a
            slot for its sums; otherwise the slot is -1.
        split_media: (entries, 3) int32; medium, first slot, end slot of the media with several
            items; medium -1 in unused entries.
        row_index: (B * L,) int32 or None; the rows sorted by medium, those without one last, where
            work items count through them in this order.
        media_total: media of all samples.
        max_media: media of a sample at most.
        max_media_per_token: media a token attends to at most; it alone chooses the kernels.
    """

    media_start: torch.Tensor
    media_end: torch.Tensor
    cu_media: torch.Tensor
    media_seqlens: torch.Tensor | None
    work_items: torch.Tensor
    split_media: torch.Tensor
    row_index: torch.Tensor | None
    media_total: int
    max_media: int
    max_media_per_token: int

    @classmethod
    def from_media_locations(
        cls,
        media_locations: torch.Tensor,
        num_media: int | Sequence[int] | torch.Tensor,
        attend: str = "previous",
        *,
        media_total: int | None = None,
        media_seqlens: torch.Tensor | None = None,
    ) -> "MediaLayout":
        """The image-causal layouts, from where the image tokens are.

        An image token itself attends to its image. With more image tokens than media, the tokens
        from the first image token too many on attend to none ("all_previous": to all). With "next"
        so do the tokens after the last image token; they are past the last medium too.

        Arguments:
            media_locations: (B, L) bool, True at image tokens (OpenFlamingo's argument).
            num_media: media of every sample, or of each: B numbers, or a (B,) integer tensor.
            attend: "previous": the last medium before the token (Flamingo, section 2.3); "next":
                the first one after it (its appendix A.3.2, and Otter); "all_previous".
            media_total: the sum of `num_media`, needed if that is a tensor on a GPU.
            media_seqlens: (media_total,) integers, valid tokens of each medium.

        Raises:
            TypeError, ValueError: a wrong argument, by name.
        """
        _check_integers("media_locations", media_locations, 2, dtypes=(torch.bool,))
        if attend not in ATTEND:
            raise ValueError(f"attend: expected one of {', '.join(ATTEND)}; got {attend!r}")
        batch = media_locations.shape[0]
        device = media_locations.device
        with _no_inference_tensors():
            cu_media, media_total, max_media = _count_media(num_media, batch, media_total, device)
            text_time = media_locations.cumsum(1, dtype=torch.int32)
            if attend == "next":
                text_time += ~media_locations
            limit = (cu_media[1:] - cu_media[:-1])[:, None]
            media_end = torch.minimum(text_time, limit)
            if attend == "all_previous":
                media_start = torch.zeros_like(media_end)
            else:
                media_start = torch.minimum((text_time - 1).clamp_(min=0), limit)
            layout = cls._with_schedule(
                media_start,
                media_end,
                cu_media,
                _seqlens(media_seqlens, media_total, device),
                media_total,
                max_media,
                max_media if attend == "all_previous" else 1,
                in_order=True,
            )
        if media_seqlens is not None:
            layout._validate_on_cpu()
        return layout

    @classmethod
    def from_intervals(
        cls,
        media_start: torch.Tensor,
        media_end: torch.Tensor,
        num_media: int | Sequence[int] | torch.Tensor,
        max_media_per_token: int,
        *,
        media_total: int | None = None,
        media_seqlens: torch.Tensor | None = None,
    ) -> "MediaLayout":
        """Any interval of media for each token; CPU tensors are validated, others are not.

        Arguments:
            media_start, media_end: (B, L) integers.
            num_media, media_total, media_seqlens: as for `from_media_locations`.

        Raises:
            TypeError, ValueError: a wrong argument, by name; a wrong value, by its token.
        """
        _check_integers("media_start", media_start, 2)
        _check_integers("media_end", media_end, 2, like=media_start)
        if not _is_count(max_media_per_token):
            raise ValueError(
                f"max_media_per_token: expected an integer >= 0, got {max_media_per_token!r}"
            )
        device = media_start.device
        with _no_inference_tensors():
            cu_media, media_total, max_media = _count_media(
                num_media, media_start.shape[0], media_total, device
            )
            layout = cls._with_schedule(
                _to_int32(media_start),
                _to_int32(media_end),
                cu_media,
                _seqlens(media_seqlens, media_total, device),
                media_total,
                max_media,
                max_media_per_token,
                in_order=False,
            )
        layout._validate_on_cpu()
        return layout

    @classmethod
    def _with_schedule(
        cls,
        media_start: torch.Tensor,
        media_end: torch.Tensor,
        cu_media: torch.Tensor,
        media_seqlens: torch.Tensor | None,
        media_total: int,
        max_media: int,
        max_media_per_token: int,
        in_order: bool,
    ) -> "MediaLayout":
        """`in_order`: the media of a sample's tokens never go back, rows without one included."""
        work_items, split_media, row_index = _schedule(
            media_start, media_end, cu_media, media_total, in_order
        )
        return cls(
            media_start,
            media_end,
            cu_media,
            media_seqlens,
            work_items,
            split_media,
            row_index,
            media_total,
            max_media,
            max_media_per_token,
        )

    @property
    def batch_size(self) -> int:
        return self.media_start.shape[0]

    @property
    def seqlen(self) -> int:
        return self.media_start.shape[1]

    @property
    def device(self) -> torch.device:
        return self.media_start.device

    def attends(self) -> torch.Tensor:
        """(B, L) bool: whether the token attends to anything."""
        if self.media_seqlens is None:
            return self.media_end > self.media_start
        # Media with tokens among the first i of the flat axis.
        counts = torch.zeros(self.media_total + 1, dtype=torch.int32, device=self.device)
        counts[1:] = (self.media_seqlens > 0).cumsum(0)
        first = self.cu_media[:-1, None]
        start, end = (
            counts[(first + bound).clamp_(0, self.media_total)]
            for bound in (self.media_start, self.media_end)
        )
        return end > start

    def past_last(self) -> torch.Tensor:
        """(B, L) bool: whether more image tokens came before the token than there are media."""
        num_media = (self.cu_media[1:] - self.cu_media[:-1])[:, None]
        return (self.media_start == num_media) & (self.media_end == num_media) & (num_media > 0)

    def to_mask(self) -> torch.Tensor:
        """(B, L, max_media) bool: which media of its sample each token attends to."""
        media = torch.arange(self.max_media, dtype=torch.int32, device=self.device)
        inside = (media >= self.media_start[..., None]) & (media < self.media_end[..., None])
        if self.media_seqlens is None:
            return inside
        if self.media_total == 0:
            return inside
        flat = (self.cu_media[:-1, None] + media).clamp_(0, self.media_total - 1)
        return inside & (self.media_seqlens[flat] > 0)[:, None]

    def last(self, num_tokens: int) -> "MediaLayout":
        """The layout of the last `num_tokens` tokens of each row, as for decoding."""
        if not _is_count(num_tokens) or num_tokens > self.seqlen:
            raise ValueError(
                f"num_tokens: expected 0 to {self.seqlen}, the layout's length; got {num_tokens!r}"
            )
        first = self.seqlen - num_tokens
        return self._with_tokens(
            self.media_start[:, first:], self.media_end[:, first:], self.row_index is None
        )

    def _with_tokens(
        self, media_start: torch.Tensor, media_end: torch.Tensor, in_order: bool
    ) -> "MediaLayout":
        with _no_inference_tensors():
            return self._with_schedule(
                media_start,
                media_end,
                self.cu_media,
                self.media_seqlens,
                self.media_total,
                self.max_media,
                self.max_media_per_token,
                in_order,
            )

    @staticmethod
    def cat(layouts: Sequence["MediaLayout"], dim: int = 0) -> "MediaLayout":
        """Concatenates along the batch (dim 0) or along the text (dim 1), there over equal media.

        Raises:
            ValueError: no layouts, another dim, or sizes that don't fit; along the text, on a CPU,
                also media that are not the same.
        """
        layouts = list(layouts)
        if not layouts:
            raise ValueError("layouts: expected at least one")
        if dim not in (0, 1):
            raise ValueError(f"dim: expected 0 (batch) or 1 (text), got {dim!r}")
        first = layouts[0]
        for index, layout in enumerate(layouts):
            if not isinstance(layout, MediaLayout):
                raise TypeError(
                    f"layouts[{index}]: expected a MediaLayout, got {type(layout).__name__}"
                )
            same = (
                layout.seqlen == first.seqlen
                if dim == 0
                else (layout.batch_size, layout.media_total)
                == (first.batch_size, first.media_total)
            )
            if not same or layout.device != first.device:
                raise ValueError(
                    f"layouts[{index}]: {layout._sizes()} does not fit layouts[0]: "
                    f"{first._sizes()}, along dim {dim}"
                )
            if dim == 1 and first.device.type == "cpu" and not layout._has_media_of(first):
                raise ValueError(f"layouts[{index}]: its media are not those of layouts[0]")
        with _no_inference_tensors():
            start, end = (
                torch.cat([getattr(layout, name) for layout in layouts], dim)
                for name in ("media_start", "media_end")
            )
            if dim == 1:
                combined = dataclasses.replace(
                    first, max_media_per_token=max(layout.max_media_per_token for layout in layouts)
                )
                return combined._with_tokens(start, end, in_order=False)
            offsets = itertools.accumulate((layout.media_total for layout in layouts), initial=0)
            cu_media = torch.cat(
                [first.cu_media[:1]]
                + [
                    layout.cu_media[1:] + offset
                    for layout, offset in zip(layouts, offsets, strict=False)
                ]
            )
            return MediaLayout._with_schedule(
                start,
                end,
                cu_media,
                MediaLayout._cat_seqlens(layouts),
                sum(layout.media_total for layout in layouts),
                max(layout.max_media for layout in layouts),
                max(layout.max_media_per_token for layout in layouts),
                in_order=all(layout.row_index is None for layout in layouts),
            )

    def _has_media_of(self, other: "MediaLayout") -> bool:
        seqlens, others = self.media_seqlens, other.media_seqlens
        if seqlens is None or others is None:
            same_seqlens = seqlens is others
        else:
            same_seqlens = torch.equal(seqlens, others)
        return same_seqlens and torch.equal(self.cu_media, other.cu_media)

    @staticmethod
    def _cat_seqlens(layouts: Sequence["MediaLayout"]) -> torch.Tensor | None:
        if all(layout.media_seqlens is None for layout in layouts):
            return None
        whole = torch.iinfo(torch.int32).max
        return torch.cat(
            [
                layout.cu_media.new_full((layout.media_total,), whole)
                if layout.media_seqlens is None
                else layout.media_seqlens
                for layout in layouts
            ]
        )

    def to(self, device: torch.device | str) -> "MediaLayout":
        device = torch.device(device)
        # The CPU would read before the values have come.
        non_blocking = device.type != "cpu"
        with _no_inference_tensors():
            return pytree.tree_map(
                lambda tensor: tensor.to(device, non_blocking=non_blocking), self
            )

    def validate(self) -> None:
        """Checks the values; on a GPU it waits for them. Kernels never read out of bounds anyway.

        Raises:
            ValueError: names the first token, sample or medium that is wrong.
        """
        start, end, cu_media = self.media_start.cpu(), self.media_end.cpu(), self.cu_media.cpu()
        num_media = cu_media.diff()
        if cu_media[0] != 0 or cu_media[-1] != self.media_total or (num_media < 0).any():
            raise ValueError(
                f"cu_media: expected 0 to media_total {self.media_total}, never falling; "
                f"got {cu_media.tolist()}"
            )
        if (num_media > self.max_media).any():
            raise ValueError(f"num_media: at most {self.max_media} expected, got {num_media.max()}")
        wrong = (start < 0) | (start > end) | (end > num_media[:, None])
        self._refuse(wrong, start, end, "expected 0 <= start <= end <= {n} media of the sample")
        wrong = end - start > self.max_media_per_token
        limit = self.max_media_per_token
        self._refuse(wrong, start, end, f"more than max_media_per_token {limit} media")
        if self.media_seqlens is not None and (self.media_seqlens.cpu() < 0).any():
            medium = int((self.media_seqlens.cpu() < 0).nonzero()[0])
            raise ValueError(
                f"media_seqlens: medium {medium} has {int(self.media_seqlens[medium])} tokens"
            )

    def _validate_on_cpu(self) -> None:
        if self.device.type == "cpu" and not torch.compiler.is_compiling():
            self.validate()

    def _refuse(
        self, wrong: torch.Tensor, start: torch.Tensor, end: torch.Tensor, reason: str
    ) -> None:
        if wrong.any():
            sample, token = wrong.nonzero()[0].tolist()
            num_media = int(self.cu_media[sample + 1] - self.cu_media[sample])
            raise ValueError(
                f"token {token} of sample {sample} attends to media "
                f"[{int(start[sample, token])}, {int(end[sample, token])}): "
                + reason.format(n=num_media)
            )

    def __eq__(self, other: object) -> bool:
        """Whether the same tokens attend to the same media, whatever the schedules are."""
        if not isinstance(other, MediaLayout):
            return NotImplemented
        same_sizes = (self._sizes(), self.max_media_per_token) == (
            other._sizes(),
            other.max_media_per_token,
        )
        return (
            same_sizes
            and self._has_media_of(other)
            and torch.equal(self.media_start, other.media_start)
            and torch.equal(self.media_end, other.media_end)
        )

    __hash__ = None  # type: ignore[assignment]

    def _sizes(self) -> str:
        return (
            f"{self.batch_size} x {self.seqlen} tokens, {self.media_total} media on {self.device}"
        )

    def __repr__(self) -> str:
        per_token = self.max_media_per_token
        attended = "one medium" if per_token == 1 else f"up to {per_token} media"
        seqlens = "" if self.media_seqlens is None else ", media_seqlens"
        return f"MediaLayout({self._sizes()}, {attended} a token{seqlens})"

    def plot(self, sample: int = 0, ax: Any = None) -> Any:
        """Draws what each token of one sample attends to; returns the matplotlib axes.

        Raises:
            ImportError: matplotlib is not installed (`pip install 'flamingo_fast[bench]'`).
            IndexError: there is no such sample.
        """
        try:
            from matplotlib import pyplot as plt
        except ImportError:
            raise ImportError(
                "MediaLayout.plot needs matplotlib: pip install 'flamingo_fast[bench]'"
            ) from None
        if not 0 <= sample < self.batch_size:
            raise IndexError(f"sample: expected 0 to {self.batch_size - 1}, got {sample}")
        num_media = int(self.cu_media[sample + 1] - self.cu_media[sample])
        mask = self.to_mask()[sample, :, :num_media].cpu()
        if ax is None:
            ax = plt.figure(figsize=(8, 1.5 + min(num_media, 24) / 6), layout="constrained").gca()
        extent = (-0.5, self.seqlen - 0.5, max(num_media, 1) - 0.5, -0.5)
        image = mask.T.numpy() if num_media else torch.zeros(1, max(self.seqlen, 1)).numpy()
        ax.imshow(
            image, aspect="auto", interpolation="nearest", cmap="Blues", vmin=0, extent=extent
        )
        ax.set_xlabel("text token")
        ax.set_ylabel("medium")
        ax.yaxis.get_major_locator().set_params(integer=True)
        silent = int((~self.attends()[sample]).sum())
        ax.set_title(f"sample {sample}: {self.seqlen} tokens, {silent} attend to nothing")
        return ax


_TENSORS = [field.name for field in dataclasses.fields(MediaLayout)][:-3]
_SIZES = [field.name for field in dataclasses.fields(MediaLayout)][-3:]


def _flatten(layout: MediaLayout) -> tuple[list[torch.Tensor], list[Any]]:
    # A None would be a leaf too, and what is mapped over leaves takes tensors.
    present = [name for name in _TENSORS if getattr(layout, name) is not None]
    sizes = [getattr(layout, name) for name in _SIZES]
    return [getattr(layout, name) for name in present], [present, *sizes]


def _unflatten(leaves: Iterable[Any], context: list[Any]) -> MediaLayout:
    present, *sizes = context
    fields: dict[str, Any] = dict.fromkeys(_TENSORS)
    fields.update(zip(present, leaves, strict=True))
    fields.update(zip(_SIZES, sizes, strict=True))
    return MediaLayout(**fields)


pytree.register_pytree_node(
    MediaLayout,
    _flatten,
    _unflatten,
    serialized_type_name="flamingo_fast.MediaLayout",
    to_dumpable_context=list,
    from_dumpable_context=list,
)


def _no_inference_tensors() -> contextlib.AbstractContextManager[None]:
    """Autograd can't save what inference mode made, and a layout may be used outside it again."""
    if not torch.compiler.is_compiling() and torch.is_inference_mode_enabled():
        return torch.inference_mode(False)
    return contextlib.nullcontext()


def num_slots(batch: int, seqlen: int) -> int:
    """Work items of split media at most: two for each whole chunk of a medium."""
    chunk = chunk_rows(seqlen)
    return 2 * batch * (seqlen // chunk) if seqlen > chunk + chunk // 4 else 0


def _check_integers(
    name: str,
    tensor: torch.Tensor,
    dim: int,
    *,
    dtypes: tuple[torch.dtype, ...] = (torch.int32, torch.int64),
    like: torch.Tensor | None = None,
) -> None:
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


def _count_media(
    num_media: int | Sequence[int] | torch.Tensor,
    batch: int,
    media_total: int | None,
    device: torch.device,
) -> tuple[torch.Tensor, int, int]:
    """(cu_media, media_total, max_media)."""
    if isinstance(num_media, int | float):
        if not _is_count(num_media):
            raise ValueError(f"num_media: expected an integer >= 0, got {num_media!r}")
        cu_media = torch.arange(batch + 1, dtype=torch.int32, device=device) * num_media
        max_media = num_media
        total = batch * num_media
    elif isinstance(num_media, torch.Tensor) and num_media.device.type != "cpu":
        _check_counts(num_media, batch)
        if media_total is not None and not _is_count(media_total):
            raise ValueError(f"media_total: expected an integer >= 0, got {media_total!r}")
        if media_total is None:
            raise ValueError(
                "media_total: expected the sum of num_media, a tensor on "
                f"{num_media.device} whose values are not waited for"
            )
        cu_media = torch.zeros(batch + 1, dtype=torch.int32, device=device)
        # What is beyond media_total does not exist.
        cu_media[1:] = num_media.to(device).cumsum(0).clamp_(0, media_total)
        return cu_media, media_total, media_total
    else:
        if isinstance(num_media, torch.Tensor):
            _check_counts(num_media, batch)
            counts = num_media.tolist()
        else:
            counts = list(num_media) if isinstance(num_media, Sequence) else []
        if len(counts) != batch or not all(map(_is_count, counts)):
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


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _check_counts(num_media: torch.Tensor, batch: int) -> None:
    if not _holds_integers(num_media):
        raise TypeError(f"num_media: expected integers, got {num_media.dtype}")
    if num_media.shape != (batch,):
        raise ValueError(f"num_media: expected shape ({batch},), got {tuple(num_media.shape)}")


def _seqlens(
    media_seqlens: torch.Tensor | None, media_total: int, device: torch.device
) -> torch.Tensor | None:
    if media_seqlens is None:
        return None
    if not isinstance(media_seqlens, torch.Tensor):
        raise TypeError(f"media_seqlens: expected a tensor, got {type(media_seqlens).__name__}")
    if not _holds_integers(media_seqlens):
        raise TypeError(f"media_seqlens: expected integers, got {media_seqlens.dtype}")
    if media_seqlens.shape != (media_total,) or media_seqlens.device != device:
        raise ValueError(
            f"media_seqlens: expected shape ({media_total},) on {device}, "
            f"got {tuple(media_seqlens.shape)} on {media_seqlens.device}"
        )
    return _to_int32(media_seqlens)


def _holds_integers(tensor: torch.Tensor) -> bool:
    return not (tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.bool)


def _to_int32(values: torch.Tensor) -> torch.Tensor:
    """A copy; what does not fit stays wrong, or long, instead of wrapping."""
    limits = torch.iinfo(torch.int32)
    return values.clamp(limits.min, limits.max).to(torch.int32, copy=True)


def _schedule(
    media_start: torch.Tensor,
    media_end: torch.Tensor,
    cu_media: torch.Tensor,
    media_total: int,
    in_order: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """(work_items, split_media, row_index), by sorted searches: nothing is read back.

    Segments are the rows of each medium, then runs of rows without one. Their number and that of
    their pieces are bounds from shapes.
    """
    batch, seqlen = media_start.shape
    rows, chunk, device = batch * seqlen, chunk_rows(seqlen), media_start.device
    media = torch.arange(media_total, dtype=torch.int32, device=device)
    first, attends = cu_media[:-1, None], media_end > media_start
    row_index = None
    if in_order:
        # Sorted as they are: 2 * g + 1 for rows of medium g, 2 * g for rows just before those.
        keys = (2 * (first + media_start) + attends).flatten()
        wanted = torch.cat([2 * media + 1, 2 * cu_media])
    else:
        flat = first + media_start
        # Values that nobody validated: a row that attends to what there is not attends to nothing.
        exists = attends & (flat >= 0) & (flat < media_total)
        keys, order = torch.sort(torch.where(exists, flat, media_total).flatten(), stable=True)
        row_index = order.int()
        wanted = torch.arange(media_total + 1, dtype=torch.int32, device=device)
    begin = torch.searchsorted(keys, wanted, out_int32=True)
    end = torch.searchsorted(keys, wanted, right=True, out_int32=True)
    if in_order:
        # The rows between two samples once, even if the samples between them have no media.
        end[media_total:-1] = torch.where(
            cu_media[1:] == cu_media[:-1], begin[media_total:-1], end[media_total:-1]
        )
    num_segments = len(wanted)
    medium = torch.full_like(begin, -1)
    medium[:media_total] = media
    pieces = torch.where(
        end - begin > chunk + chunk // 4,
        (end - begin + (chunk - 1)) // chunk,
        (end > begin).int(),
    )
    # Media without rows have an item too, which writes their gradients: zeros.
    pieces[:media_total].clamp_(min=1)
    cu_items = pieces.cumsum(0, dtype=torch.int32)
    item = torch.arange(num_segments + rows // chunk, dtype=torch.int32, device=device)
    segment = torch.searchsorted(cu_items, item, right=True, out_int32=True)
    used = segment < num_segments
    segment = torch.where(used, segment, 0)
    piece = item - (cu_items - pieces)[segment]
    # Of equal size, but for whole tiles of the kernels.
    piece_rows = (end - begin + (pieces - 1)) // pieces.clamp(min=1)
    piece_rows = (piece_rows + (_TILE_ROWS - 1)) // _TILE_ROWS * _TILE_ROWS
    item_begin = begin[segment] + piece * piece_rows[segment]
    item_end = torch.minimum(item_begin + piece_rows[segment], end[segment])
    is_split = pieces[:media_total] > 1
    cu_slots = torch.where(is_split, pieces[:media_total], 0).cumsum(0, dtype=torch.int32)
    first_slot = torch.full_like(pieces, -1)
    first_slot[:media_total] = torch.where(is_split, cu_slots - pieces[:media_total], -1)
    slot = torch.where(first_slot[segment] >= 0, first_slot[segment] + piece, -1)
    items = torch.stack(
        [
            torch.where(used, medium[segment], -1),
            torch.where(used, item_begin, 0),
            torch.where(used, item_end, 0),
            torch.where(used, slot, -1),
        ],
        1,
    )
    longest_first = torch.sort(items[:, 2] - items[:, 1], descending=True, stable=True).indices
    entries = batch * (seqlen // chunk) if num_slots(batch, seqlen) else 0
    entry = torch.arange(1, min(entries, media_total) + 1, dtype=torch.int32, device=device)
    index = torch.searchsorted(is_split.cumsum(0, dtype=torch.int32), entry, out_int32=True)
    found = index < media_total
    index = torch.where(found, index, 0)
    split_media = torch.stack(
        [torch.where(found, index, -1), first_slot[index], cu_slots[index]], 1
    )
    return items[longest_first], split_media, row_index
