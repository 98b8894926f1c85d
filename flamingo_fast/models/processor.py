"""What a model takes, of prompts that interleave text, images and videos.

B prompts, L tokens of the longest, F frames of a medium, H and W their height and width.
"""

import dataclasses
import io
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import torch

from flamingo_fast.models.config import ConfigError, FlamingoConfig
from flamingo_fast.models.extras import require
from flamingo_fast.models.vision import data_config
from flamingo_fast.modules.options import check_dims

if TYPE_CHECKING:
    import PIL.Image

PADDING_SIDES = ("left", "right")
_NUM_FRAMES = 8
_MOST_ASPECT = 16
# FFmpeg's names of containers, for bytes of anywhere.
_VIDEO_FORMATS = ("mov", "matroska", "avi", "gif", "mpegts", "mpeg", "flv", "asf", "ogg")
_SIXTEEN_BITS = ("I", "I;16", "I;16B", "I;16L", "I;16N")


class MediaError(ValueError):
    """An image or video that can't be read or used; says where in the prompts it is."""


class VideoTooLargeError(MediaError):
    """A video whose frames have more pixels than they may."""


@dataclasses.dataclass(frozen=True)
class Image:
    """An image of a prompt.

    Attributes:
        source: a file's path, a PIL image, or a tensor (3, H, W): uint8, or floating point from 0
            to 1.
    """

    source: "str | os.PathLike[str] | PIL.Image.Image | torch.Tensor"


@dataclasses.dataclass(frozen=True)
class Video:
    """A video of a prompt.

    Attributes:
        source: a file's path, a tensor (F, 3, H, W): uint8, or floating point from 0 to 1; or a
            list of images, each what an `Image`'s source may be.
        num_frames: at most so many frames are taken, evenly; None: the processor's.
    """

    source: "str | os.PathLike[str] | torch.Tensor | Sequence[Any]"
    num_frames: int | None = None


Part: TypeAlias = "str | PIL.Image.Image | torch.Tensor | os.PathLike[str] | Image | Video"


@dataclasses.dataclass
class ProcessorOutput:
    """A batch.

    Attributes:
        input_ids: (B, L) int64.
        attention_mask: (B, L) int64, 1 for tokens and 0 for padding.
        pixel_values: the media of all prompts, one prompt's after another's: (media, F, 3, H, W),
            or where numbers of frames differ a list of (F, 3, H, W). None: there are no media.
        num_media: how many of them each prompt has.
    """

    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    pixel_values: torch.Tensor | list[torch.Tensor] | None
    num_media: list[int]

    @property
    def media(self) -> list[list[torch.Tensor]]:
        """Media of each prompt, (F, 3, H, W) each: views of `pixel_values`."""
        media = iter(() if self.pixel_values is None else self.pixel_values)
        return [[next(media) for _ in range(count)] for count in self.num_media]

    def to(
        self, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> "ProcessorOutput":
        """The same on a device; `dtype` is of the pixels alone."""
        pixels = self.pixel_values
        if isinstance(pixels, list):
            pixels = [each.to(device, dtype) for each in pixels]
        elif pixels is not None:
            pixels = pixels.to(device, dtype)
        input_ids, attention_mask = self.input_ids.to(device), self.attention_mask.to(device)
        return ProcessorOutput(input_ids, attention_mask, pixels, self.num_media)


class FlamingoProcessor:
    """Turns prompts into batches, and tokens into text.

    Adds `eoc_token` and then `image_token` to the tokenizer (OpenFlamingo's order) where it lacks
    them; their ids are then the next after its vocabulary.

    Arguments:
        image_transform: maps a PIL image in RGB to a tensor (3, H, W), of one size.
        tokenizer: any of Hugging Face's.
        image_token: what text has in place of a medium.
        eoc_token: what ends the text of a medium; None: nothing does.
        num_frames: of a video at most so many frames are taken.

    Attributes:
        image_token_id, eoc_token_id: of the two tokens.
        pad_token_id: the tokenizer's, or another token's: the attention mask is 0 there.

    Raises:
        ValueError: a wrong argument, by name.
    """

    def __init__(
        self,
        image_transform: Callable[["PIL.Image.Image"], torch.Tensor],
        tokenizer: Any,
        image_token: str = "<image>",
        eoc_token: str | None = "<|endofchunk|>",
        *,
        num_frames: int = _NUM_FRAMES,
    ) -> None:
        if eoc_token == image_token:
            raise ValueError(f"eoc_token: expected another than image_token, got {eoc_token!r}")
        check_dims(num_frames=num_frames)
        self.image_transform = image_transform
        self.tokenizer = tokenizer
        self.image_token, self.eoc_token = image_token, eoc_token
        self.num_frames = num_frames
        added = require("transformers").AddedToken
        tokens = [each for each in (eoc_token, image_token) if each is not None]
        # Those that the vocabulary has too: it may split them, and text with them, elsewhere.
        tokenizer.add_tokens(
            [added(each, special=True, normalized=False) for each in tokens], special_tokens=True
        )
        self.image_token_id: int = tokenizer.convert_tokens_to_ids(image_token)
        self.eoc_token_id: int | None = None
        if eoc_token is not None:
            self.eoc_token_id = tokenizer.convert_tokens_to_ids(eoc_token)
        self._own_ids = {self.image_token_id, self.eoc_token_id}
        candidates = (tokenizer.pad_token_id, tokenizer.eos_token_id, *range(3))
        self.pad_token_id: int = next(
            each for each in candidates if each is not None and each not in self._own_ids
        )

    @classmethod
    def of(
        cls,
        config: FlamingoConfig,
        tokenizer: Any,
        *,
        image_token: str = "<image>",
        eoc_token: str | None = "<|endofchunk|>",
        num_frames: int | None = None,
        image_transform: Callable[["PIL.Image.Image"], torch.Tensor] | None = None,
        **transform: Any,
    ) -> "FlamingoProcessor":
        """For a model.

        Arguments:
            config: of the model; `config.vision` says how images are transformed.
            tokenizer, image_token: see the class.
            eoc_token: see the class; without effect where `config.eoc_token_id` is None.
            num_frames: see the class; None: as many as the resampler has embeddings for, or 8.
            image_transform: see the class; None: as `config.vision` says.
            transform: arguments of `timm.data.create_transform` that replace those.

        Raises:
            ConfigError: the tokens have other ids in the tokenizer than in the config, or timm
                does not know the vision encoder.
        """
        if image_transform is None:
            create_transform = require("timm.data").create_transform
            image_transform = create_transform(**data_config(config.vision) | transform)
        if num_frames is None:
            num_frames = config.resampler.max_num_frames or _NUM_FRAMES
        if config.eoc_token_id is None:
            eoc_token = None
        found = cls(image_transform, tokenizer, image_token, eoc_token, num_frames=num_frames)
        for name, token in (("image_token_id", image_token), ("eoc_token_id", eoc_token)):
            expected, got = getattr(config, name), getattr(found, name)
            if expected != got:
                raise ConfigError(
                    f"{name}: expected the tokenizer's id of {token!r}, {got}, got {expected}"
                )
        return found

    def __call__(
        self,
        prompts: Sequence[Sequence[Part]],
        *,
        padding_side: str = "left",
        return_tensors: str = "pt",
    ) -> ProcessorOutput:
        """A batch of prompts.

        Arguments:
            prompts: of each a list of its parts: text, and media in between, which become an
                `image_token`. A string is always text; images are PIL images, tensors (3, H, W)
                (uint8, or floating point from 0 to 1), paths or `Image`s; videos are `Video`s.
                Images become RGB whatever they are: of several frames the first, transparent ones
                on white, turned as their EXIF orientation says.
            padding_side: "left" for generation, "right" for training.
            return_tensors: "pt", the only one there is.

        Raises:
            MediaError: a file that is missing or broken, too large an image, or a wrong tensor.
            TypeError: a prompt is no list, or a part of another type.
            ValueError: no prompts, an empty one, text with `image_token`, or a wrong argument.
            ImportError: a video is a file, and PyAV is not installed.
        """
        if padding_side not in PADDING_SIDES:
            expected = " or ".join(map(repr, PADDING_SIDES))
            raise ValueError(f"padding_side: expected {expected}, got {padding_side!r}")
        if return_tensors != "pt":
            raise ValueError(f"return_tensors: expected 'pt', got {return_tensors!r}")
        rows, media, num_media = [], [], []
        for i, prompt in enumerate(prompts):
            if not isinstance(prompt, list | tuple):
                raise TypeError(
                    f"prompts[{i}]: expected a list of parts, got {type(prompt).__name__}"
                )
            text, of_prompt = self._parts(prompt, f"prompts[{i}]")
            ids = self.tokenizer(text)["input_ids"]
            if not ids:
                raise ValueError(f"prompts[{i}]: expected at least a token, got {text!r}")
            rows.append(ids)
            media += of_prompt
            num_media.append(len(of_prompt))
        if not rows:
            raise ValueError("prompts: expected at least one, got none")
        input_ids, attention_mask = self._pad(rows, padding_side)
        pixels: torch.Tensor | list[torch.Tensor] | None = media or None
        if len({each.shape for each in media}) == 1:
            pixels = torch.stack(media)
        return ProcessorOutput(input_ids, attention_mask, pixels, num_media)

    def few_shot(self, examples: Iterable[Sequence[Part]], query: Sequence[Part]) -> list[Part]:
        """A prompt of examples and a query (section 3.2, as OpenFlamingo writes it).

        Arguments:
            examples: parts of each, such as (image, "Output: A cat."); `eoc_token` ends each.
            query: parts of what is to be continued, such as (image, "Output:").
        """
        end = () if self.eoc_token is None else (self.eoc_token,)
        return [part for example in examples for part in (*example, *end)] + list(query)

    def decode(self, ids: torch.Tensor | Sequence[int]) -> str:
        """Text of one row of tokens, without special ones."""
        row = ids.tolist() if isinstance(ids, torch.Tensor) else ids
        # Not all tokenizers count tokens that were added among their special ones.
        kept = [each for each in row if each not in self._own_ids]
        return self.tokenizer.decode(kept, skip_special_tokens=True)

    def batch_decode(self, ids: torch.Tensor | Sequence[Sequence[int]]) -> list[str]:
        """`decode` of each row."""
        return [self.decode(each) for each in ids]

    def _pad(self, rows: list[list[int]], side: str) -> tuple[torch.Tensor, torch.Tensor]:
        length = max(map(len, rows))
        input_ids = torch.full((len(rows), length), self.pad_token_id)
        attention_mask = torch.zeros_like(input_ids)
        for i, row in enumerate(rows):
            at = slice(length - len(row), None) if side == "left" else slice(len(row))
            input_ids[i, at] = torch.tensor(row)
            attention_mask[i, at] = 1
        return input_ids, attention_mask

    def _parts(self, prompt: Sequence[Part], where: str) -> tuple[str, list[torch.Tensor]]:
        texts, media = [], []
        for j, part in enumerate(prompt):
            at = f"{where}[{j}]"
            if isinstance(part, str):
                if self.image_token in part:
                    raise ValueError(
                        f"{at}: expected text without {self.image_token}, which stands for a "
                        f"medium: put the image itself between parts of text; got {part!r}"
                    )
                texts.append(part)
            else:
                texts.append(self.image_token)
                media.append(self._medium(part, at))
        return "".join(texts), media

    def _medium(self, part: Any, where: str) -> torch.Tensor:
        """(F, 3, H, W) of a part that is no text."""
        if not isinstance(part, Video):
            return self._pixels(part.source if isinstance(part, Image) else part, where)[None]
        source = part.source
        num_frames = self.num_frames if part.num_frames is None else part.num_frames
        check_dims(**{f"{where}.num_frames": num_frames})
        if isinstance(source, str | os.PathLike):
            frames: Sequence[Any] = decode_video(Path(source), num_frames, where)
        elif isinstance(source, torch.Tensor):
            if source.dim() != 4 or source.shape[1] != 3:
                raise MediaError(
                    f"{where}: expected a video of shape (F, 3, H, W), got {tuple(source.shape)}"
                )
            frames = [source[i] for i in _evenly(len(source), num_frames)]
        elif isinstance(source, list | tuple):
            frames = [source[i] for i in _evenly(len(source), num_frames)]
        else:
            raise TypeError(
                f"{where}: expected a path, a tensor or a list of images as a video, got "
                f"{type(source).__name__}"
            )
        if not frames:
            raise MediaError(f"{where}: expected a video of at least one frame, got none")
        pixels = [self._pixels(each, f"{where}, frame {k}") for k, each in enumerate(frames)]
        return torch.stack(pixels)

    def _pixels(self, source: Any, where: str) -> torch.Tensor:
        image = _load_image(source, where)
        pixels = self.image_transform(middle_of_thin(image))
        if not isinstance(pixels, torch.Tensor) or pixels.dim() != 3 or len(pixels) != 3:
            got = tuple(pixels.shape) if isinstance(pixels, torch.Tensor) else type(pixels).__name__
            raise ValueError(f"image_transform: expected it to return (3, H, W), got {got}")
        return pixels


def _evenly(count: int, most: int) -> list[int]:
    """Indices of at most so many of `count`: the middles of as many equal spans."""
    taken = min(count, most)
    return [(2 * i + 1) * count // (2 * taken) for i in range(taken)]


def _load_image(source: Any, where: str) -> "PIL.Image.Image":
    """An image in RGB of what an `Image`'s source may be."""
    pil = require("PIL.Image")
    if isinstance(source, torch.Tensor):
        return _of_tensor(source, where)
    if isinstance(source, pil.Image):
        name, opened = "image", source
    elif isinstance(source, str | os.PathLike):
        name, opened = str(source), None
        if not os.path.exists(source):
            raise MediaError(f"{where}: there is no file {name}")
    else:
        raise TypeError(
            f"{where}: expected text, a PIL image, a tensor, a path, an Image or a Video; got "
            f"{type(source).__name__}"
        )
    try:
        if opened is not None:
            return to_rgb(opened)
        with pil.open(source) as opened:
            return to_rgb(opened)
    except MemoryError:
        raise
    # Broken files make Pillow's decoders raise nearly anything.
    except Exception as error:
        hint = "; of a video make a Video" if isinstance(error, pil.UnidentifiedImageError) else ""
        raise MediaError(f"{where}: {name} can't be read: {error}{hint}") from error


def _of_tensor(pixels: torch.Tensor, where: str) -> "PIL.Image.Image":
    if pixels.dim() != 3 or len(pixels) != 3 or not pixels.numel():
        raise MediaError(
            f"{where}: expected an image of shape (3, H, W), got {tuple(pixels.shape)}"
            + ("; of a video make a Video" if pixels.dim() == 4 else "")
        )
    if pixels.is_floating_point():
        if not bool(((pixels >= 0) & (pixels <= 1)).all()):
            raise MediaError(
                f"{where}: expected values from 0 to 1, not yet normalised, got some from "
                f"{pixels.min():.3g} to {pixels.max():.3g}"
            )
        pixels = (pixels.float() * 255).round().to(torch.uint8)
    if pixels.dtype != torch.uint8:
        raise MediaError(f"{where}: expected uint8 or floating point, got {pixels.dtype}")
    return require("PIL.Image").fromarray(pixels.cpu().permute(1, 2, 0).contiguous().numpy())


def to_rgb(image: "PIL.Image.Image") -> "PIL.Image.Image":
    """An image of any kind in RGB of 8 bits, its first frame, turned as its EXIF says.

    Transparent ones are put on white.

    Raises:
        ValueError: pixels of floating point, or of more than 16 bits.
        Exception: nearly any, where the image's file is broken.
    """
    image = require("PIL.ImageOps").exif_transpose(image)
    if image.mode in _SIXTEEN_BITS:
        # Pillow's own conversion cuts all above 255.
        numpy = require("numpy")
        wide = numpy.asarray(image).astype("float32")
        if wide.min() < 0 or wide.max() > 65535:
            raise ValueError(f"expected 16 bits, got values from {wide.min():g} to {wide.max():g}")
        image = require("PIL.Image").fromarray((wide / 257).round().astype("uint8"))
    elif image.mode == "F":
        raise ValueError("expected pixels of 8 or 16 bits, got floating point")
    elif image.has_transparency_data:
        image = image.convert("RGBA")
        background = require("PIL.Image").new("RGBA", image.size, "white")
        image = require("PIL.Image").alpha_composite(background, image)
    return image.convert("RGB")


def middle_of_thin(image: "PIL.Image.Image") -> "PIL.Image.Image":
    """An image; of one more than 16 times as long as wide, such as a ruled line, its middle.

    Resizing would leave such a line no pixel of its width, or, where the shorter side is to be as
    long as the input's, make gigabytes of it.
    """
    width, height = image.size
    most = _MOST_ASPECT * min(width, height)
    if max(width, height) <= most:
        return image
    left, top = max(width - most, 0) // 2, max(height - most, 0) // 2
    return image.crop((left, top, left + min(width, most), top + min(height, most)))


def decode_video(
    source: Path | bytes, num_frames: int, where: str, max_pixels: int | None = None
) -> "list[PIL.Image.Image]":
    """Frames of a video in RGB, evenly.

    Arguments:
        source: its file, or the bytes of one.
        num_frames: at most so many.
        where: for messages.
        max_pixels: of a frame at most; None: as many as there are.

    Raises:
        MediaError: a file that there is not, or one that can't be decoded; `VideoTooLargeError`:
            of larger frames.
        ImportError: PyAV is not installed.
    """
    av = require("av")
    name = "video" if isinstance(source, bytes) else str(source)
    if not isinstance(source, bytes) and not source.exists():
        raise MediaError(f"{where}: there is no file {name}")
    try:
        with _open_video(source) as container:
            if not container.streams.video:
                raise MediaError(f"{where}: {name} has no video")
            context = container.streams.video[0].codec_context
            # PyAV before 18 crashes where it decodes without one.
            if context is None:
                raise MediaError(f"{where}: {name} can't be read: there is no decoder for it")
            _check_pixels(context, where, max_pixels)
            count = sum(1 for packet in container.demux(video=0) if packet.size)
        frames, seen = _frames_at(source, _evenly(count, num_frames), where, max_pixels)
        if len(frames) < min(count, num_frames):
            # Some packets held no frame.
            frames, _ = _frames_at(source, _evenly(seen, num_frames), where, max_pixels)
        return frames
    except (av.FFmpegError, EOFError) as error:
        raise MediaError(f"{where}: {name} can't be read: {error}") from error


def _open_video(source: Path | bytes) -> Any:
    """A container; from the start each time."""
    av = require("av")
    if not isinstance(source, bytes):
        return av.open(str(source))
    # Others of FFmpeg's formats, such as SDP, make it wait at a network port.
    options = {"format_whitelist": ",".join(_VIDEO_FORMATS)}
    return av.open(io.BytesIO(source), container_options=options)


def _check_pixels(frame: Any, where: str, max_pixels: int | None) -> None:
    if max_pixels is not None and frame.width * frame.height > max_pixels:
        raise VideoTooLargeError(
            f"{where}: expected at most {max_pixels} pixels, got {frame.width} x {frame.height}"
        )


def _frames_at(
    source: Path | bytes, indices: list[int], where: str, max_pixels: int | None
) -> "tuple[list[PIL.Image.Image], int]":
    """The frames at `indices`, and how many were decoded until the last of them."""
    frames, seen, wanted = [], 0, set(indices)
    with _open_video(source) as container:
        for frame in container.decode(video=0):
            # Some formats let the size change on the way.
            _check_pixels(frame, where, max_pixels)
            if seen in wanted:
                # Phones write frames as the sensor lies, and how to turn them.
                frames.append(frame.to_image().rotate(frame.rotation, expand=True))
            seen += 1
            if len(frames) == len(indices):
                break
    return frames, seen
