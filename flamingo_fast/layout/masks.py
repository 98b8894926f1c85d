"""From masks of media, or of their tiles, to intervals and sets of media.

B batch, L text tokens, N media of a sample.
"""

import torch

from flamingo_fast.layout.arguments import holds_integers, is_count, values_are_at_hand

# Media in a word of media_bits.
WORD = 64


def as_bool_mask(mask: torch.Tensor, shape: tuple[str, ...]) -> torch.Tensor:
    """A mask of these dimensions as bool.

    Raises:
        TypeError, ValueError: it is none.
    """
    if not isinstance(mask, torch.Tensor):
        raise TypeError(f"mask: expected a tensor, got {type(mask).__name__}")
    if mask.dtype != torch.bool and not holds_integers(mask):
        raise TypeError(f"mask: expected bool or integers, got {mask.dtype}")
    if mask.dim() != len(shape):
        raise ValueError(f"mask: expected shape ({', '.join(shape)}), got {tuple(mask.shape)}")
    return mask if mask.dtype == torch.bool else mask != 0


def check_mask(mask: torch.Tensor, cu_media: torch.Tensor, max_media_per_token: int) -> None:
    """Whether a (B, L, N) bool mask fits its samples' media, if its values are at hand.

    Raises:
        ValueError: names the first token that attends to a medium that is not there, or to more
            than max_media_per_token.
    """
    if not values_are_at_hand(mask):
        return
    columns = mask.shape[2]
    num_media = cu_media.diff()
    if (num_media > columns).any():
        raise ValueError(
            f"num_media: expected at most {columns}, the mask's media, got {int(num_media.max())}"
        )
    exists = _exists(cu_media, columns)
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


def intervals_of_mask(
    mask: torch.Tensor,
    cu_media: torch.Tensor,
    media_total: int,
    media_seqlens: torch.Tensor | None,
    max_media_per_token: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """(media_start, media_end, media_bits) of a (B, L, N) bool mask."""
    columns = mask.shape[2]
    media = torch.arange(columns, dtype=torch.int32, device=mask.device)
    exists = _exists(cu_media, columns)
    if media_seqlens is not None and media_total > 0:
        flat = (cu_media[:-1, None] + media).clamp_(0, media_total - 1)
        exists = exists & (media_seqlens[flat] > 0)
    mask = mask & exists[:, None]
    attends = mask.any(2)
    media_start = torch.where(mask, media, columns).amin(2) if columns else attends.int()
    media_end = torch.where(mask, media, -1).amax(2) + 1 if columns else attends.int()
    media_start = torch.where(attends, media_start, 0)
    if max_media_per_token <= 1:
        return media_start, torch.where(attends, media_start + attends, 0), None
    return media_start, torch.where(attends, media_end, 0), to_bits(mask)


def images_of_tiles(mask: torch.Tensor, tokens_per_tile: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(B, L, N) bool of images, and the valid tokens of each image, (B * N,).

    Arguments:
        mask: (B, L, N, tiles), bool or integers.

    Raises:
        TypeError, ValueError: a wrong argument, by name; a token that attends to other tiles of an
            image than others do.
    """
    mask = as_bool_mask(mask, ("B", "L", "N", "tiles"))
    if not is_count(tokens_per_tile) or tokens_per_tile == 0:
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
    return attended, tiles.flatten() * tokens_per_tile


def to_bits(mask: torch.Tensor) -> torch.Tensor:
    """media_bits of a (B, L, N) mask."""
    words = -(-mask.shape[2] // WORD)
    padded = torch.nn.functional.pad(mask, (0, words * WORD - mask.shape[2]))
    bits = torch.arange(WORD, device=mask.device)
    return (padded.unflatten(2, (words, WORD)).long() << bits).sum(3)


def _exists(cu_media: torch.Tensor, columns: int) -> torch.Tensor:
    """(B, columns) bool: which columns of a mask are media of the sample."""
    media = torch.arange(columns, dtype=torch.int32, device=cu_media.device)
    return media < cu_media.diff()[:, None]
