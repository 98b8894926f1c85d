"""Images and videos of samples: from the bytes of files to frames in RGB.

Only the formats that samples have are tried: some of Pillow's others start programs. Pillow's own
limit, twice `PIL.Image.MAX_IMAGE_PIXELS`, holds beside `max_image_pixels`. Of a video that ends
early, the frames that are there are taken.
"""

import dataclasses
import io
from typing import TYPE_CHECKING

from flamingo_fast.models.extras import require
from flamingo_fast.models.processor import (
    MediaError,
    VideoTooLargeError,
    decode_video,
    to_rgb,
)
from flamingo_fast.training.bad_samples import BadSample
from flamingo_fast.training.samples import Limits, Medium

if TYPE_CHECKING:
    import PIL.Image

# JPEG has MPO, too: that of some cameras, with smaller images behind the first.
_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")
# What their files begin with.
_MAGIC = (
    *(b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"GIF87a", b"GIF89a"),
    *(b"II*\x00", b"MM\x00*"),
)
# JPEG can't have more. Of longer lines Pillow copies all it has read with every block it reads,
# which takes minutes where lines have tens of millions of pixels.
_MOST_SIDE = 65_535
# How Pillow says that data are missing, by its decoders.
_TRUNCATED = ("truncated", "unexpected end", "not enough data", "incomplete")


@dataclasses.dataclass(frozen=True)
class Decoded:
    """A medium's frames.

    Attributes:
        frames: PIL images in RGB; one of an image, at least one of a video.
        is_unusual: whether it is an image that had to be converted: CMYK, of 16 bits, or animated.
    """

    frames: "list[PIL.Image.Image]"
    is_unusual: bool


def decode(medium: Medium, limits: Limits, num_frames: int) -> Decoded:
    """Frames of an image or a video.

    Arguments:
        num_frames: of a video at most so many, evenly.

    Raises:
        BadSample: it can't be used.
        ImportError: Pillow, or for a video PyAV, is not installed.
    """
    if not medium.data:
        raise BadSample("empty_file", f"{medium.member}: expected bytes, got none")
    if medium.is_video:
        return Decoded(_frames(medium, limits, num_frames), False)
    pil = require("PIL.Image")
    try:
        with pil.open(io.BytesIO(medium.data), formats=_FORMATS) as image:
            return _decode_image(image, medium.member, limits)
    except (BadSample, MemoryError):
        raise
    except pil.UnidentifiedImageError:
        raise BadSample(*_unidentified(medium)) from None
    # Pillow has a limit of its own, and a lower one that warns, or raises by Python's filters.
    except (pil.DecompressionBombError, pil.DecompressionBombWarning) as error:
        raise BadSample("decompression_bomb", f"{medium.member}: {error}") from None
    # Broken files make Pillow's decoders raise nearly anything.
    except Exception as error:
        message = str(error).lower()
        is_cut = isinstance(error, EOFError) or any(each in message for each in _TRUNCATED)
        is_cut = is_cut or _ends_early(medium.data)
        reason = "truncated_image" if is_cut else "broken_image"
        raise BadSample(reason, f"{medium.member}: {type(error).__name__}: {error}") from None


def _decode_image(image: "PIL.Image.Image", member: str, limits: Limits) -> Decoded:
    # Before anything is decoded.
    pixels = image.width * image.height
    if pixels > limits.max_image_pixels:
        raise BadSample(
            "decompression_bomb",
            f"{member}: expected at most {limits.max_image_pixels} pixels, got {image.width} x "
            f"{image.height}",
        )
    if max(image.size) > _MOST_SIDE:
        raise BadSample(
            "decompression_bomb",
            f"{member}: expected sides of at most {_MOST_SIDE} pixels, got {image.width} x "
            f"{image.height}",
        )
    unusual = _what_is_unusual(image)
    if unusual is not None and (limits.unusual_images == "skip" or image.mode == "F"):
        raise BadSample("unusual_image", f"{member}: {unusual}")
    return Decoded([to_rgb(image)], unusual is not None)


def _what_is_unusual(image: "PIL.Image.Image") -> str | None:
    """Of an image that is not decoded yet, which forgets how its file has it."""
    if image.mode in ("CMYK", "LAB"):
        return f"{image.mode} colours"
    if image.mode == "F":
        return "pixels of floating point"
    # Colours of 16 bits become 8 when they are decoded; only the decoder's arguments tell.
    layout = [str(each) for tile in getattr(image, "tile", ()) for each in tile[3:]]
    if image.mode.startswith("I") or any(";16" in each for each in layout):
        return "more than 8 bits"
    if image.format != "MPO" and getattr(image, "is_animated", False):
        return "several frames"
    return None


def _unidentified(medium: Medium) -> tuple[str, str]:
    data = medium.data
    if data.startswith(_MAGIC) or _is_webp(data):
        return "truncated_image", f"{medium.member}: its header ends early or is broken"
    return "not_an_image", f"{medium.member}: it begins with {data[:16]!r}"


def _is_webp(data: bytes) -> bool:
    return data[:4] == b"RIFF" and data[8:12] == b"WEBP"


def _ends_early(data: bytes) -> bool:
    """Of the formats for which Pillow's messages don't say so."""
    if _is_webp(data):
        return int.from_bytes(data[4:8], "little") + 8 > len(data)
    return data.startswith(b"GIF8") and not data.endswith(b";")


def _frames(medium: Medium, limits: Limits, num_frames: int) -> "list[PIL.Image.Image]":
    require("av")
    try:
        frames = decode_video(
            medium.data, num_frames, medium.member, max_pixels=limits.max_image_pixels
        )
    except VideoTooLargeError as error:
        raise BadSample("decompression_bomb", str(error)) from None
    except MemoryError:
        raise
    # Besides its own errors, PyAV raises others where streams of broken files lack what it takes.
    except Exception as error:
        detail = str(error) if isinstance(error, MediaError) else f"{medium.member}: {error!r}"
        raise BadSample("broken_video", detail) from None
    if not frames:
        raise BadSample("broken_video", f"{medium.member}: expected at least a frame, got none")
    return frames
