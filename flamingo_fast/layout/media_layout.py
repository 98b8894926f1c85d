"""MediaLayout: which media each text token attends to, and the work that follows from it.

Dimension names: B batch, L text tokens, N media of a sample, R tokens of a medium.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch.utils import _pytree as pytree

from flamingo_fast.layout.arguments import (
    check_count,
    check_integers,
    count_media,
    is_count,
    no_inference_tensors,
    seqlens_of_media,
    to_int32,
    values_are_at_hand,
)
from flamingo_fast.layout.concatenation import concatenated
from flamingo_fast.layout.drawing import plot
from flamingo_fast.layout.intervals import (
    attend_modes,
    by_token,
    causal_intervals,
    has_mode,
    media_per_token,
    packed_intervals,
    several,
)
from flamingo_fast.layout.masks import (
    WORD,
    as_bool_mask,
    check_mask,
    images_of_tiles,
    intervals_of_mask,
    to_bits,
)
from flamingo_fast.layout.uniform import KEPT, uniform_rows
from flamingo_fast.layout.validation import validate
from flamingo_fast.schedule import one_medium_schedule, several_media_rows


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class MediaLayout:
    """Which media each text token attends to: an interval of its sample's media, or some in it.

    Make one with a `from_` method or `packed`, once for each forward pass and outside checkpointed
    regions: it holds the schedule of the kernels too. It is a pytree of its tensors, so it passes
    through torch.compile, FSDP, DDP and activation checkpointing. Nothing here waits for a GPU but
    `validate`, `==`, `plot` and `to` a CPU.

    Attributes:
        media_start, media_end: (B, L) int32; the token attends to media [start, end) of its
            sample. start == end: to none; of these, start == end == N is past the last medium:
            more image tokens came before it than there are media.
        cu_media: (B + 1,) int32; the media of sample b are cu_media[b]..cu_media[b + 1] of k and v.
        media_seqlens: (media_total,) int32 or None; the valid tokens of each medium, its first
            ones. A medium without any counts as nothing.
        media_bits: (B, L, words) int64 or None; where it is there, the token attends to those media
            m of the interval whose bit m % 64 of word m // 64 is set. They have valid tokens.
        media_rows: (media_total, 2) int32; first and end row of those that attend to the medium.
            Rows count through the batch. Where the media of later tokens go back, rows between
            those may not attend to it.
        work_items: (items, 4) int32, or None if a token attends to several media; medium, first
            row, end row, slot. A row is in exactly one item; medium -1 is for rows that attend to
            none. Longest first. A medium with many more rows than `schedule.chunk_rows(L)` has
            several items, each with a slot for its sums; otherwise the slot is -1.
        split_media: (entries, 3) int32, or None as before; medium, first slot, end slot of the
            media with several items; medium -1 in unused entries.
        row_index: (B * L,) int32 or None; the rows sorted by medium, those without one last, where
            work items count through them in this order.
        media_total: media of all samples.
        max_media: media of a sample at most.
        max_media_per_token: media a token attends to at most; it alone chooses the kernels. 1 is
            said by who makes the layout and never follows from a batch, whose other samples would
            otherwise change a sample's bits.
        is_packed: samples hold several documents, as `packed` makes them.
        tells_past_last: whether `past_last` tells such tokens from those that attend to nothing.
    """

    media_start: torch.Tensor
    media_end: torch.Tensor
    cu_media: torch.Tensor
    media_seqlens: torch.Tensor | None
    media_bits: torch.Tensor | None
    media_rows: torch.Tensor
    work_items: torch.Tensor | None
    split_media: torch.Tensor | None
    row_index: torch.Tensor | None
    media_total: int
    max_media: int
    max_media_per_token: int
    is_packed: bool
    tells_past_last: bool

    @classmethod
    def from_media_locations(
        cls,
        media_locations: torch.Tensor,
        num_media: int | Sequence[int] | torch.Tensor,
        attend: str | Sequence[str] = "previous",
        *,
        media_total: int | None = None,
        media_seqlens: torch.Tensor | None = None,
    ) -> "MediaLayout":
        """The image-causal layouts, from where the image tokens are.

        An image token itself attends to its image. With more image tokens than media, the tokens
        from the first image token too many on attend to none ("all_previous": to all). With "next"
        so do the tokens after the last image token. They are not past the last medium, as no image
        tokens without media came before them; where a sample has "next", of no token that is told.

        Arguments:
            media_locations: (B, L) bool, True at image tokens (OpenFlamingo's argument).
            num_media: media of every sample, or of each: B numbers, or a (B,) integer tensor.
            attend: "previous": the last medium before the token (Flamingo, section 2.3); "next":
                the first one after it (its appendix A.3.2, and Otter); "all_previous". Of all
                samples, or of each: B of them. With "all_previous" among them, kernels are those of
                several media a token for all.
            media_total: the sum of `num_media`, needed if that is a tensor on a GPU.
            media_seqlens: (media_total,) integers, valid tokens of each medium.

        Raises:
            TypeError, ValueError: a wrong argument, by name.
        """
        check_integers("media_locations", media_locations, 2, dtypes=(torch.bool,))
        with no_inference_tensors():
            text_time = media_locations.cumsum(1, dtype=torch.int32)
            return cls._causal(
                text_time, media_locations, num_media, attend, media_total, media_seqlens
            )

    @classmethod
    def after_media(
        cls,
        media_locations: torch.Tensor,
        num_media: int | Sequence[int] | torch.Tensor,
        num_tokens: int,
        attend: str | Sequence[str] = "previous",
        *,
        media_total: int | None = None,
        media_seqlens: torch.Tensor | None = None,
    ) -> "MediaLayout":
        """Of `num_tokens` tokens that come after all image tokens, as in decoding.

        Arguments:
            media_locations: (B, L) bool, of the text before; L may be 0.
            num_media, attend, media_total, media_seqlens: as for `from_media_locations`.
        """
        check_integers("media_locations", media_locations, 2, dtypes=(torch.bool,))
        if not is_count(num_tokens):
            raise ValueError(f"num_tokens: expected a number >= 0, got {num_tokens!r}")
        with no_inference_tensors():
            text_time = media_locations.sum(1, dtype=torch.int32)[:, None].expand(-1, num_tokens)
            none = torch.zeros((), dtype=torch.bool, device=media_locations.device)
            return cls._causal(text_time, none, num_media, attend, media_total, media_seqlens)

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
        check_integers("media_start", media_start, 2)
        check_integers("media_end", media_end, 2, like=media_start)
        check_count("max_media_per_token", max_media_per_token)
        device = media_start.device
        with no_inference_tensors():
            cu_media, media_total, max_media = count_media(
                num_media, media_start.shape[0], media_total, device
            )
            layout = cls._with_schedule(
                to_int32(media_start),
                to_int32(media_end),
                cu_media,
                seqlens_of_media(media_seqlens, media_total, device),
                media_total,
                max_media,
                max_media_per_token,
                in_order=False,
            )
        layout._validate_on_cpu()
        return layout

    @classmethod
    def from_media_mask(
        cls,
        mask: torch.Tensor,
        max_media_per_token: int | None = None,
        *,
        num_media: int | Sequence[int] | torch.Tensor | None = None,
        media_total: int | None = None,
        media_seqlens: torch.Tensor | None = None,
    ) -> "MediaLayout":
        """Any pattern, from a mask of media as transformers' IDEFICS has (image_attention_mask).

        A CPU mask is validated, others are not.

        Arguments:
            mask: (B, L, N), bool or integers (0: does not attend).
            max_media_per_token: N by default, at least 2. With 1, for one-hot masks, the layout
                takes the kernels of one medium a token.
            num_media: N by default; of samples with fewer media the mask's last columns are unused.
            media_total, media_seqlens: as for `from_media_locations`.

        Raises:
            TypeError, ValueError: a wrong argument, by name; a wrong value, by its token.
        """
        mask = as_bool_mask(mask, ("B", "L", "N"))
        batch, _, columns = mask.shape
        if max_media_per_token is None:
            max_media_per_token = several(columns)
        check_count("max_media_per_token", max_media_per_token)
        device = mask.device
        with no_inference_tensors():
            cu_media, media_total, max_media = count_media(
                columns if num_media is None else num_media, batch, media_total, device
            )
            check_mask(mask, cu_media, max_media_per_token)
            media_seqlens = seqlens_of_media(media_seqlens, media_total, device)
            media_start, media_end, media_bits = intervals_of_mask(
                mask, cu_media, media_total, media_seqlens, max_media_per_token
            )
            layout = cls._with_schedule(
                media_start,
                media_end,
                cu_media,
                media_seqlens,
                media_total,
                min(max_media, columns),
                max_media_per_token,
                in_order=False,
                media_bits=media_bits,
            )
        layout._validate_on_cpu()
        return layout

    @classmethod
    def from_tile_mask(
        cls, mask: torch.Tensor, tokens_per_tile: int, max_media_per_token: int | None = None
    ) -> "MediaLayout":
        """Images of several tiles, from transformers' mask for Mllama (cross_attention_mask).

        An image is a medium of tiles * tokens_per_tile tokens, and the tiles that nothing attends
        to, its last ones, are not valid tokens of it. Masks that give tokens some tiles of an image
        and not others are `from_media_mask(mask.flatten(2))`, where each tile is a medium. A CPU
        mask is validated, others are not.

        Arguments:
            mask: (B, L, N, tiles), bool or integers (0: does not attend).
            tokens_per_tile: of k and v: 1601 for Mllama at 560 pixels.
            max_media_per_token: as for `from_media_mask`.

        Raises:
            TypeError, ValueError: a wrong argument, by name; a wrong value, by its token.
        """
        attended, media_seqlens = images_of_tiles(mask, tokens_per_tile)
        return cls.from_media_mask(attended, max_media_per_token, media_seqlens=media_seqlens)

    @classmethod
    def packed(
        cls,
        media_locations: torch.Tensor,
        cu_seqlens: torch.Tensor | Sequence[int],
        num_media: int | Sequence[int] | torch.Tensor,
        attend: str | Sequence[str] = "previous",
        *,
        media_total: int | None = None,
        media_seqlens: torch.Tensor | None = None,
    ) -> "MediaLayout":
        """Several documents in each row of the batch; each attends to its own media only.

        Arguments:
            media_locations: (B, L) bool, True at image tokens.
            cu_seqlens: (documents + 1,) integers: document d has tokens cu_seqlens[d] to
                cu_seqlens[d + 1] of the batch's B * L tokens, all in one row. The first is 0;
                tokens from the last on attend to nothing. Padding between documents is a document
                without media.
            num_media: media of every document, or of each: numbers or a (documents,) tensor. k and
                v have them in the order of the documents.
            attend: as for `from_media_locations`, of all documents or of each.
            media_total, media_seqlens: as there.

        Raises:
            TypeError, ValueError: a wrong argument, by name.
        """
        check_integers("media_locations", media_locations, 2, dtypes=(torch.bool,))
        device = media_locations.device
        with no_inference_tensors():
            media_start, media_end, cu_media, media_total, most = packed_intervals(
                media_locations, cu_seqlens, num_media, attend, media_total
            )
            is_known = values_are_at_hand(cu_media) and len(media_locations)
            layout = cls._with_schedule(
                media_start,
                media_end,
                cu_media,
                seqlens_of_media(media_seqlens, media_total, device),
                media_total,
                int(cu_media.diff().max()) if is_known else media_total,
                media_per_token(attend, most),
                in_order=False,
                is_packed=True,
                tells_past_last=False,
            )
        layout._validate_on_cpu()
        return layout

    @classmethod
    def _causal(
        cls,
        text_time: torch.Tensor,
        media_locations: torch.Tensor,
        num_media: int | Sequence[int] | torch.Tensor,
        attend: str | Sequence[str],
        media_total: int | None,
        media_seqlens: torch.Tensor | None,
    ) -> "MediaLayout":
        """text_time: image tokens so far; media_locations: broadcast to it."""
        batch, device = len(text_time), text_time.device
        modes = attend_modes(attend, batch, device, "samples")
        cu_media, media_total, max_media = count_media(num_media, batch, media_total, device)
        media_start, media_end = causal_intervals(
            text_time, media_locations, cu_media.diff()[:, None], by_token(modes)
        )
        layout = cls._with_schedule(
            media_start,
            media_end,
            cu_media,
            seqlens_of_media(media_seqlens, media_total, device),
            media_total,
            max_media,
            media_per_token(attend, max_media),
            in_order=True,
            tells_past_last=not has_mode(attend, "next"),
        )
        if media_seqlens is not None:
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
        media_bits: torch.Tensor | None = None,
        is_packed: bool = False,
        tells_past_last: bool = True,
    ) -> "MediaLayout":
        """`in_order`: the media of a sample's tokens never go back, rows without one included."""
        work_items = split_media = row_index = None
        if max_media_per_token > 1:
            media_rows = several_media_rows(
                media_start, media_end, cu_media, media_total, max_media
            )
        else:
            work_items, split_media, row_index, media_rows = one_medium_schedule(
                media_start, media_end, cu_media, media_total, in_order
            )
        return cls(
            media_start,
            media_end,
            cu_media,
            media_seqlens,
            media_bits,
            media_rows,
            work_items,
            split_media,
            row_index,
            media_total,
            max_media,
            max_media_per_token,
            is_packed,
            tells_past_last,
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
        if self.media_seqlens is None or self.media_bits is not None:
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
        """(B, L) bool: whether more image tokens came before the token than there are media.

        Not told for packed documents, nor with "next" (`tells_past_last`): False.
        """
        if not self.tells_past_last:
            return torch.zeros_like(self.media_start, dtype=torch.bool)
        num_media = self.cu_media.diff()[:, None]
        return (self.media_start == num_media) & (self.media_end == num_media) & (num_media > 0)

    def uniform_rows(self, unattended: bool, past_last: bool) -> torch.Tensor | None:
        """(B, L) bool: tokens whose attention is to be uniform; None where no token's is known to.

        The same tensor for all layers that ask, unless a graph is captured: it may run on others.

        Arguments:
            unattended: of tokens that attend to nothing, those past the last medium aside.
            past_last: of these.
        """
        return uniform_rows(self, unattended, past_last)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != KEPT}

    def to_mask(self) -> torch.Tensor:
        """(B, L, max_media) bool: which media of its sample each token attends to."""
        media = torch.arange(self.max_media, dtype=torch.int32, device=self.device)
        inside = (media >= self.media_start[..., None]) & (media < self.media_end[..., None])
        if self.media_bits is not None:
            words = self.media_bits[..., media // WORD]
            inside = inside & (words >> media % WORD & 1).bool()
        if self.media_seqlens is None or self.media_total == 0:
            return inside
        flat = (self.cu_media[:-1, None] + media).clamp_(0, self.media_total - 1)
        return inside & (self.media_seqlens[flat] > 0)[:, None]

    def last(self, num_tokens: int) -> "MediaLayout":
        """The layout of the last `num_tokens` tokens of each row, as for decoding."""
        if not is_count(num_tokens) or num_tokens > self.seqlen:
            raise ValueError(
                f"num_tokens: expected 0 to {self.seqlen}, the layout's length; got {num_tokens!r}"
            )
        first = self.seqlen - num_tokens
        return self._with_tokens(
            self.media_start[:, first:],
            self.media_end[:, first:],
            None if self.media_bits is None else self.media_bits[:, first:],
            self.row_index is None,
        )

    def _with_tokens(
        self,
        media_start: torch.Tensor,
        media_end: torch.Tensor,
        media_bits: torch.Tensor | None,
        in_order: bool,
    ) -> "MediaLayout":
        with no_inference_tensors():
            return self._with_schedule(
                media_start,
                media_end,
                self.cu_media,
                self.media_seqlens,
                self.media_total,
                self.max_media,
                self.max_media_per_token,
                in_order,
                media_bits,
                self.is_packed,
                self.tells_past_last,
            )

    @staticmethod
    def cat(layouts: Sequence["MediaLayout"], dim: int = 0) -> "MediaLayout":
        """Concatenates along the batch (dim 0) or along the text (dim 1), there over equal media.

        Raises:
            ValueError: no layouts, another dim, or sizes that don't fit; along the text, on a CPU,
                also media that are not the same.
        """
        if isinstance(layouts, MediaLayout):
            raise TypeError("layouts: expected several of them, got one MediaLayout")
        layouts = list(layouts)
        for index, layout in enumerate(layouts):
            if not isinstance(layout, MediaLayout):
                raise TypeError(
                    f"layouts[{index}]: expected a MediaLayout, got {type(layout).__name__}"
                )
        return concatenated(layouts, dim)

    def _bits(self, max_media: int) -> torch.Tensor:
        mask = self.to_mask()
        return to_bits(torch.nn.functional.pad(mask, (0, max_media - mask.shape[2])))

    def _has_media_of(self, other: "MediaLayout") -> bool:
        seqlens, others = self.media_seqlens, other.media_seqlens
        if seqlens is None or others is None:
            same_seqlens = seqlens is others
        else:
            same_seqlens = torch.equal(seqlens, others)
        return same_seqlens and torch.equal(self.cu_media, other.cu_media)

    def to(self, device: torch.device | str | int | None) -> "MediaLayout":
        """With its tensors on another device; None leaves them, as Tensor.to does."""
        if device is None:
            return self
        device = torch.device(device)
        # The CPU would read before the values have come.
        non_blocking = device.type != "cpu"
        with no_inference_tensors():
            return pytree.tree_map(
                lambda tensor: tensor.to(device, non_blocking=non_blocking), self
            )

    def validate(self) -> None:
        """Checks the values; on a GPU it waits for them. Kernels never read out of bounds anyway.

        Raises:
            ValueError: names the first token, sample or medium that is wrong.
        """
        validate(self)

    def _validate_on_cpu(self) -> None:
        if values_are_at_hand(self.cu_media):
            self.validate()

    def __eq__(self, other: object) -> bool:
        """Whether tokens attend to the same media or are past them, whatever the schedules are."""
        if not isinstance(other, MediaLayout):
            return NotImplemented
        same_sizes = (self._sizes(), self.max_media_per_token, self.is_packed) == (
            other._sizes(),
            other.max_media_per_token,
            other.is_packed,
        )
        if not same_sizes or not self._has_media_of(other):
            return False
        if not torch.equal(self.past_last(), other.past_last()):
            return False
        if (self.media_bits is None) != (other.media_bits is None) or self.media_bits is not None:
            return torch.equal(self.to_mask(), other.to_mask())
        return torch.equal(self.media_start, other.media_start) and torch.equal(
            self.media_end, other.media_end
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
        bits = "" if self.media_bits is None else ", media_bits"
        packed = ", packed" if self.is_packed else ""
        return f"MediaLayout({self._sizes()}, {attended} a token{seqlens}{bits}{packed})"

    def plot(self, sample: int = 0, ax: Any = None) -> Any:
        """Draws what each token of one sample attends to; returns the matplotlib axes.

        Raises:
            ImportError: matplotlib is not installed (`pip install 'flamingo_fast[bench]'`).
            IndexError: there is no such sample.
        """
        return plot(self, sample, ax)
