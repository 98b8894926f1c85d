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

from flamingo_fast.namespace import NAMESPACE
from flamingo_fast.schedule import one_medium_schedule, several_media_rows
from flamingo_fast.watchers import is_watched

ATTEND = ("previous", "next", "all_previous")

# Media in a word of media_bits.
_WORD = 64


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
        _check_integers("media_locations", media_locations, 2, dtypes=(torch.bool,))
        batch = media_locations.shape[0]
        device = media_locations.device
        with _no_inference_tensors():
            modes = _attend_modes(attend, batch, device, "samples")
            cu_media, media_total, max_media = _count_media(num_media, batch, media_total, device)
            text_time = media_locations.cumsum(1, dtype=torch.int32)
            media_start, media_end = _intervals(
                text_time, media_locations, cu_media.diff()[:, None], _by_token(modes)
            )
            layout = cls._with_schedule(
                media_start,
                media_end,
                cu_media,
                _seqlens(media_seqlens, media_total, device),
                media_total,
                max_media,
                _per_token(attend, max_media),
                in_order=True,
                tells_past_last=not _has(attend, "next"),
            )
        if media_seqlens is not None:
            layout._validate_on_cpu()
        return layout

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
        _check_integers("media_locations", media_locations, 2, dtypes=(torch.bool,))
        if not _is_count(num_tokens):
            raise ValueError(f"num_tokens: expected a number >= 0, got {num_tokens!r}")
        batch, device = media_locations.shape[0], media_locations.device
        with _no_inference_tensors():
            modes = _by_token(_attend_modes(attend, batch, device, "samples"))
            cu_media, media_total, max_media = _count_media(num_media, batch, media_total, device)
            text_time = media_locations.sum(1, dtype=torch.int32)[:, None].expand(-1, num_tokens)
            none = torch.zeros((), dtype=torch.bool, device=device)
            media_start, media_end = _intervals(text_time, none, cu_media.diff()[:, None], modes)
            return cls._with_schedule(
                media_start,
                media_end,
                cu_media,
                _seqlens(media_seqlens, media_total, device),
                media_total,
                max_media,
                _per_token(attend, max_media),
                in_order=True,
                tells_past_last=not _has(attend, "next"),
            )

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
        mask = _as_bool_mask(mask, ("B", "L", "N"))
        batch, _, columns = mask.shape
        if max_media_per_token is None:
            max_media_per_token = _several(columns)
        elif not _is_count(max_media_per_token):
            raise ValueError(
                f"max_media_per_token: expected an integer >= 0, got {max_media_per_token!r}"
            )
        device = mask.device
        with _no_inference_tensors():
            cu_media, media_total, max_media = _count_media(
                columns if num_media is None else num_media, batch, media_total, device
            )
            media = torch.arange(columns, dtype=torch.int32, device=device)
            exists = media < cu_media.diff()[:, None]
            if values_are_at_hand(mask):
                if (cu_media.diff() > columns).any():
                    raise ValueError(
                        f"num_media: expected at most {columns}, the mask's media, "
                        f"got {int(cu_media.diff().max())}"
                    )
                _refuse_mask(mask, exists, max_media_per_token)
            media_seqlens = _seqlens(media_seqlens, media_total, device)
            if media_seqlens is not None and media_total > 0:
                flat = (cu_media[:-1, None] + media).clamp_(0, media_total - 1)
                exists = exists & (media_seqlens[flat] > 0)
            mask = mask & exists[:, None]
            attends = mask.any(2)
            media_start = torch.where(mask, media, columns).amin(2) if columns else attends.int()
            media_end = torch.where(mask, media, -1).amax(2) + 1 if columns else attends.int()
            media_start = torch.where(attends, media_start, 0)
            if max_media_per_token <= 1:
                media_end = media_start + attends
            layout = cls._with_schedule(
                media_start,
                torch.where(attends, media_end, 0),
                cu_media,
                media_seqlens,
                media_total,
                min(max_media, columns),
                max_media_per_token,
                in_order=False,
                media_bits=_to_bits(mask) if max_media_per_token > 1 else None,
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
        mask = _as_bool_mask(mask, ("B", "L", "N", "tiles"))
        if not _is_count(tokens_per_tile) or tokens_per_tile == 0:
            raise ValueError(f"tokens_per_tile: expected an integer > 0, got {tokens_per_tile!r}")
        attended = mask.any(3)
        tiles = mask.any(1).sum(2)
        if values_are_at_hand(mask):
            valid = torch.arange(mask.shape[3], device=mask.device) < tiles[..., None]
            wrong = (mask != (attended[..., None] & valid[:, None])).any(3)
            if wrong.any():
                sample, token, image = wrong.nonzero()[0].tolist()
                raise ValueError(
                    f"mask: token {token} of sample {sample} attends to tiles "
                    f"{mask[sample, token, image].int().tolist()} of image {image}; expected all "
                    f"of its first {int(tiles[sample, image])} or none "
                    "(from_media_mask(mask.flatten(2)) takes tiles as media)"
                )
        media_seqlens = tiles.flatten() * tokens_per_tile
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
        _check_integers("media_locations", media_locations, 2, dtypes=(torch.bool,))
        batch, seqlen = media_locations.shape
        device = media_locations.device
        with _no_inference_tensors():
            cu_seqlens = document_boundaries(cu_seqlens, batch, seqlen, device)
            documents = len(cu_seqlens) - 1
            modes = _attend_modes(attend, documents, device, "documents")
            cu_documents, media_total, most = _count_media(
                num_media, documents, media_total, device
            )
            if batch == 0 and media_total > 0:
                raise ValueError(f"num_media: {media_total} media for a batch without rows")
            # The tokens after the last document are one more, without media.
            cu_seqlens = torch.cat([cu_seqlens, cu_seqlens.new_full((1,), batch * seqlen)])
            cu_documents = torch.cat([cu_documents, cu_documents[-1:]])
            row = torch.arange(batch * seqlen, dtype=torch.int32, device=device)
            document = torch.searchsorted(cu_seqlens[1:], row, right=True, out_int32=True)
            document.clamp_(max=documents)
            images = torch.zeros(batch * seqlen + 1, dtype=torch.int32, device=device)
            torch.cumsum(media_locations.flatten(), 0, out=images[1:])
            text_time = images[1:] - images[cu_seqlens[document]]
            if isinstance(modes, torch.Tensor):
                # What the last one attends to is not there.
                modes = torch.cat([modes, modes[-1:]])[document]
            media_start, media_end = _intervals(
                text_time, media_locations.flatten(), cu_documents.diff()[document], modes
            )
            starts = torch.arange(batch + 1, dtype=torch.int32, device=device) * seqlen
            first = torch.searchsorted(cu_seqlens[:-1].contiguous(), starts, out_int32=True)
            cu_media = cu_documents[first.clamp_(max=documents)]
            cu_media[-1] = media_total
            offset = cu_documents[document].view(batch, seqlen) - cu_media[:-1, None]
            layout = cls._with_schedule(
                media_start.view(batch, seqlen) + offset,
                media_end.view(batch, seqlen) + offset,
                cu_media,
                _seqlens(media_seqlens, media_total, device),
                media_total,
                int(cu_media.diff().max())
                if values_are_at_hand(cu_media) and batch
                else media_total,
                _per_token(attend, most),
                in_order=False,
                is_packed=True,
                tells_past_last=False,
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
        if not unattended and not self.tells_past_last:
            return None
        made_of = (self.media_start, self.media_end, self.cu_media)
        is_cuda = self.media_start.is_cuda
        may_keep = not (
            is_watched()  # Tracers' tensors end with the trace.
            or any(tensor.is_inference() for tensor in made_of)  # Their changes are not counted.
            or (is_cuda and torch.cuda.is_current_stream_capturing())
        )
        kept: dict[Any, torch.Tensor | None] = {}
        if may_keep:
            state: list[Any] = [tensor._version for tensor in made_of]
            state.append(torch.cuda.current_stream(self.device) if is_cuda else None)
            found = self.__dict__.get("_uniform_rows")
            if found is None or found[0] != state:
                found = self.__dict__["_uniform_rows"] = state, kept
            kept = found[1]
        if (unattended, past_last) not in kept:
            with _no_inference_tensors():
                after = self.past_last()
                rows = torch.zeros_like(after)
                if unattended:
                    rows = ~self.attends() & ~after
                if past_last:
                    rows = rows | after
                is_needed = not values_are_at_hand(rows) or bool(rows.any())
            kept[unattended, past_last] = rows if is_needed else None
        return kept[unattended, past_last]

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_uniform_rows"}

    def to_mask(self) -> torch.Tensor:
        """(B, L, max_media) bool: which media of its sample each token attends to."""
        media = torch.arange(self.max_media, dtype=torch.int32, device=self.device)
        inside = (media >= self.media_start[..., None]) & (media < self.media_end[..., None])
        if self.media_bits is not None:
            words = self.media_bits[..., media // _WORD]
            inside = inside & (words >> media % _WORD & 1).bool()
        if self.media_seqlens is None or self.media_total == 0:
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
            same = same and layout.is_packed == first.is_packed
            if not same or layout.device != first.device:
                raise ValueError(
                    f"layouts[{index}]: {layout._sizes()} does not fit layouts[0]: "
                    f"{first._sizes()}, along dim {dim}"
                )
            if dim == 1 and values_are_at_hand(first.cu_media) and not layout._has_media_of(first):
                raise ValueError(f"layouts[{index}]: its media are not those of layouts[0]")
        with _no_inference_tensors():
            start, end = (
                torch.cat([getattr(layout, name) for layout in layouts], dim)
                for name in ("media_start", "media_end")
            )
            per_token = max(layout.max_media_per_token for layout in layouts)
            tells_past_last = all(layout.tells_past_last for layout in layouts)
            max_media = max(layout.max_media for layout in layouts)
            bits = None
            if per_token > 1 and any(layout.media_bits is not None for layout in layouts):
                bits = torch.cat([layout._bits(max_media) for layout in layouts], dim)
                end = torch.where(bits.ne(0).any(2), end, start)
            if dim == 1:
                combined = dataclasses.replace(
                    first, max_media_per_token=per_token, tells_past_last=tells_past_last
                )
                return combined._with_tokens(start, end, bits, in_order=False)
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
                max_media,
                per_token,
                in_order=all(layout.row_index is None for layout in layouts),
                media_bits=bits,
                is_packed=first.is_packed,
                tells_past_last=tells_past_last,
            )

    def _bits(self, max_media: int) -> torch.Tensor:
        mask = self.to_mask()
        return _to_bits(torch.nn.functional.pad(mask, (0, max_media - mask.shape[2])))

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

    def to(self, device: torch.device | str | int | None) -> "MediaLayout":
        """With its tensors on another device; None leaves them, as Tensor.to does."""
        if device is None:
            return self
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
        limit = self.max_media_per_token
        wrong = end - start > limit
        if self.media_bits is not None:
            wrong = self.to_mask().cpu().sum(2) > limit
        self._refuse(wrong, start, end, f"more than max_media_per_token {limit} media")
        if self.media_seqlens is not None and (self.media_seqlens.cpu() < 0).any():
            medium = int((self.media_seqlens.cpu() < 0).nonzero()[0])
            raise ValueError(
                f"media_seqlens: medium {medium} has {int(self.media_seqlens[medium])} tokens"
            )

    def _validate_on_cpu(self) -> None:
        if values_are_at_hand(self.cu_media):
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
        if (self.media_bits is None) != (other.media_bits is None) or self.media_bits is not None:
            same = torch.equal(self.to_mask(), other.to_mask())
            return same and torch.equal(self.past_last(), other.past_last())
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


_TENSORS = [field.name for field in dataclasses.fields(MediaLayout)][:-5]
_SIZES = [field.name for field in dataclasses.fields(MediaLayout)][-5:]


def _flatten(layout: MediaLayout) -> tuple[list[torch.Tensor], list[Any]]:
    # A None would be a leaf too, and what is mapped over leaves takes tensors.
    present = [name for name in _TENSORS if getattr(layout, name) is not None]
    sizes = [getattr(layout, name) for name in _SIZES]
    return [getattr(layout, name) for name in present], [present, *sizes]


def _flatten_with_keys(
    layout: MediaLayout,
) -> tuple[list[tuple[pytree.KeyEntry, Any]], list[Any]]:
    leaves, context = _flatten(layout)
    keys: list[pytree.KeyEntry] = [pytree.GetAttrKey(name) for name in context[0]]
    return list(zip(keys, leaves, strict=True)), context


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
    serialized_type_name=f"{NAMESPACE}.MediaLayout",
    to_dumpable_context=list,
    from_dumpable_context=list,
    flatten_with_keys_fn=_flatten_with_keys,
)


def _no_inference_tensors() -> contextlib.AbstractContextManager[None]:
    """Autograd can't save what inference mode made, and a layout may be used outside it again."""
    if not torch.compiler.is_compiling() and torch.is_inference_mode_enabled():
        return torch.inference_mode(False)
    return contextlib.nullcontext()


def values_are_at_hand(tensor: torch.Tensor) -> bool:
    """Whether its values can be read without waiting; FakeTensor and its like have none."""
    is_plain = type(tensor) is torch.Tensor or type(tensor) is torch.nn.Parameter
    return tensor.device.type == "cpu" and is_plain and not torch.compiler.is_compiling()


def _several(max_media: int) -> int:
    """max_media_per_token where it is not told: 1 only if it is."""
    return max(max_media, 2)


def _attend_modes(
    attend: str | Sequence[str], count: int, device: torch.device, of_what: str
) -> str | torch.Tensor:
    """`attend` if it is of all; or each one's place in ATTEND, (count,) int32."""
    names = [attend] if isinstance(attend, str) or not isinstance(attend, Sequence) else attend
    for each in names:
        if each not in ATTEND:
            raise ValueError(f"attend: expected one of {', '.join(ATTEND)}; got {each!r}")
    if isinstance(attend, str):
        return attend
    if len(names) != count:
        raise ValueError(f"attend: expected one for each of {count} {of_what}, got {len(names)}")
    if len(set(names)) <= 1:
        return names[0] if names else ATTEND[0]
    modes = torch.tensor([ATTEND.index(each) for each in names], dtype=torch.int32, device="cpu")
    return modes.to(device, non_blocking=True)


def _by_token(modes: str | torch.Tensor) -> str | torch.Tensor:
    return modes[:, None] if isinstance(modes, torch.Tensor) else modes


def _has(attend: str | Sequence[str], name: str) -> bool:
    return attend == name or (not isinstance(attend, str) and name in attend)


def _per_token(attend: str | Sequence[str], max_media: int) -> int:
    """max_media_per_token."""
    return _several(max_media) if _has(attend, "all_previous") else 1


def _intervals(
    text_time: torch.Tensor,
    media_locations: torch.Tensor,
    num_media: torch.Tensor,
    modes: str | torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(media_start, media_end); text_time: image tokens so far, num_media: there are.

    `modes`: of all tokens; or the places in ATTEND of each one's, broadcast to text_time.
    """
    is_next, is_all = (
        modes == ATTEND.index(name) if isinstance(modes, torch.Tensor) else modes == name
        for name in ("next", "all_previous")
    )
    if is_next is not False:
        text_time = text_time + (~media_locations & is_next)
    media_end = torch.minimum(text_time, num_media)
    if is_all is True:
        return torch.zeros_like(media_end), media_end
    media_start = torch.minimum((text_time - 1).clamp_(min=0), num_media)
    if is_all is not False:
        media_start = media_start.masked_fill(is_all, 0)
    return media_start, media_end


def _as_bool_mask(mask: torch.Tensor, shape: tuple[str, ...]) -> torch.Tensor:
    if not isinstance(mask, torch.Tensor):
        raise TypeError(f"mask: expected a tensor, got {type(mask).__name__}")
    if mask.dtype != torch.bool and not _holds_integers(mask):
        raise TypeError(f"mask: expected bool or integers, got {mask.dtype}")
    if mask.dim() != len(shape):
        raise ValueError(f"mask: expected shape ({', '.join(shape)}), got {tuple(mask.shape)}")
    return mask if mask.dtype == torch.bool else mask != 0


def _refuse_mask(mask: torch.Tensor, exists: torch.Tensor, max_media_per_token: int) -> None:
    missing = (mask & ~exists[:, None]).nonzero()
    if len(missing):
        sample, token, medium = missing[0].tolist()
        raise ValueError(
            f"mask: token {token} of sample {sample} attends to medium {medium} of "
            f"{int(exists[sample].sum())}"
        )
    count = mask.sum(2)
    over = (count > max_media_per_token).nonzero()
    if len(over):
        sample, token = over[0].tolist()
        raise ValueError(
            f"mask: token {token} of sample {sample} attends to {int(count[sample, token])} media, "
            f"more than max_media_per_token {max_media_per_token}"
        )


def _to_bits(mask: torch.Tensor) -> torch.Tensor:
    """media_bits of a (B, L, N) mask."""
    words = -(-mask.shape[2] // _WORD)
    padded = torch.nn.functional.pad(mask, (0, words * _WORD - mask.shape[2]))
    bits = torch.arange(_WORD, device=mask.device)
    return (padded.unflatten(2, (words, _WORD)).long() << bits).sum(3)


def document_boundaries(
    cu_seqlens: torch.Tensor | Sequence[int], batch: int, seqlen: int, device: torch.device
) -> torch.Tensor:
    """cu_seqlens of documents as int32 on `device`, validated where it is on a CPU."""
    if not isinstance(cu_seqlens, torch.Tensor):
        if not isinstance(cu_seqlens, Sequence) or not all(map(_is_count, cu_seqlens)):
            raise TypeError(f"cu_seqlens: expected a tensor or integers >= 0, got {cu_seqlens!r}")
        cu_seqlens = torch.tensor(cu_seqlens, dtype=torch.int64, device="cpu")
    if not _holds_integers(cu_seqlens):
        raise TypeError(f"cu_seqlens: expected integers, got {cu_seqlens.dtype}")
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
    cu_seqlens = _to_int32(cu_seqlens).to(device, non_blocking=True)
    return cu_seqlens.clamp_(0, batch * seqlen)


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
        _refuse_other_gpu("num_media", num_media, device)
        cu_media = torch.zeros(batch + 1, dtype=torch.int32, device=device)
        # What is beyond media_total does not exist.
        cu_media[1:] = num_media.cumsum(0).clamp_(0, media_total)
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


def _refuse_other_gpu(name: str, values: torch.Tensor, device: torch.device) -> None:
    """A CPU would have to wait for them."""
    if values.device.type != "cpu" and values.device != device:
        raise ValueError(f"{name}: expected a CPU tensor or device {device}, got {values.device}")


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
