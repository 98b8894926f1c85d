"""Samples of the three kinds, of what webdataset's shards hold.

image_text: KEY.jpg (or another of `IMAGE_SUFFIXES`) and KEY.txt, or KEY.json with "caption", as
img2dataset writes; the text file is taken where both are there. video_text: the same with KEY.mp4
(or another of `VIDEO_SUFFIXES`). interleaved: KEY.json and images as members KEY.NAME, the JSON

- as OBELICS has it: {"images": [NAME or null, ...], "texts": [text or null, ...]}, of one length,
  and exactly one of the two at each place; or
- as MMC4 has it: {"text_list": [text, ...], "image_info": [{"image_name": NAME,
  "matched_text_index": i}, ...]}: an image comes before its text. "image_base64" in place of a
  member, as OpenFlamingo's shards have it.

Other fields and members are left alone.
"""

import base64
import dataclasses
import json
from collections.abc import Sequence
from typing import Any

from flamingo_fast.training.bad_samples import REASONS, BadSample
from flamingo_fast.training.config import KINDS, DatasetConfig
from flamingo_fast.training.shards import Record

__all__ = [
    "IMAGE_SUFFIXES",
    "REASONS",
    "VIDEO_SUFFIXES",
    "BadSample",
    "Limits",
    "Medium",
    "Sample",
    "parse",
]

IMAGE_SUFFIXES = ("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff")
VIDEO_SUFFIXES = ("mp4", "webm", "mkv", "avi", "mov", "gif")

# Between texts that have no image between them.
_OBELICS_JOIN = "\n\n"
_MMC4_JOIN = " "


@dataclasses.dataclass(frozen=True)
class Limits:
    """What makes a sample a bad one; see `DatasetConfig`."""

    max_text_chars: int = DatasetConfig.max_text_chars
    max_image_pixels: int = DatasetConfig.max_image_pixels
    unusual_images: str = DatasetConfig.unusual_images

    @classmethod
    def of(cls, config: DatasetConfig) -> "Limits":
        return cls(config.max_text_chars, config.max_image_pixels, config.unusual_images)


@dataclasses.dataclass(frozen=True)
class Medium:
    """An image or a video as its file has it.

    Attributes:
        member: its name in the record, for messages.
        data: the file's bytes.
        is_video: whether it may have several frames.
    """

    member: str
    data: bytes
    is_video: bool


@dataclasses.dataclass(frozen=True)
class Sample:
    """A document or a pair.

    Attributes:
        key, shard: where it was.
        parts: text and media in their order. Texts have no white space around them, none is empty,
            and no two follow each other. Of a pair: a medium and its text.
    """

    key: str
    shard: str
    parts: tuple[str | Medium, ...]


def parse(record: Record, kind: str, limits: Limits) -> Sample:
    """A sample of a record; its media are not decoded yet.

    Arguments:
        kind: "interleaved", "image_text" or "video_text".

    Raises:
        BadSample: it can't be used.
    """
    if record.problem is not None:
        raise BadSample(*record.problem)
    if kind == "interleaved":
        parts = _document(record, limits)
    elif kind in KINDS:
        parts = _pair(record, kind == "video_text", limits)
    else:
        raise ValueError(f"kind: expected one of {', '.join(KINDS)}; got {kind!r}")
    return Sample(record.key, record.shard, parts)


def _pair(record: Record, is_video: bool, limits: Limits) -> tuple[str | Medium, ...]:
    what, suffixes = ("video", VIDEO_SUFFIXES) if is_video else ("image", IMAGE_SUFFIXES)
    found = [suffix for suffix in suffixes if suffix in record.members]
    names = ", ".join(sorted(record.members)) or "nothing"
    if not found:
        raise BadSample("missing_member", f"expected a member {' or '.join(suffixes)}, got {names}")
    if len(found) > 1:
        raise BadSample("duplicate_member", f"expected one {what}, got {', '.join(found)}")
    if "txt" in record.members:
        text = _utf8(record.members["txt"], "txt")
    elif "json" in record.members:
        text = _caption(_json_object(record.members["json"]))
    else:
        raise BadSample("missing_member", f"expected a member txt or json, got {names}")
    _check_texts([text], limits)
    return Medium(found[0], record.members[found[0]], is_video), text.strip()


def _caption(values: dict[str, Any]) -> str:
    text = values.get("caption")
    if not isinstance(text, str):
        raise BadSample("wrong_json_shape", f'expected text as "caption", got {_brief(text)}')
    return text


def _document(record: Record, limits: Limits) -> tuple[str | Medium, ...]:
    if "json" not in record.members:
        names = ", ".join(sorted(record.members)) or "nothing"
        raise BadSample("missing_member", f"expected a member json, got {names}")
    values = _json_object(record.members["json"])
    if "images" in values and "texts" in values:
        parts, join = _of_obelics(record, values), _OBELICS_JOIN
    elif "text_list" in values and "image_info" in values:
        parts, join = _of_mmc4(record, values), _MMC4_JOIN
    else:
        raise BadSample(
            "wrong_json_shape",
            'expected "images" and "texts", or "text_list" and "image_info", got '
            + _brief(list(values)),
        )
    _check_texts([part for part in parts if isinstance(part, str)], limits)
    return _joined(parts, join)


def _of_obelics(record: Record, values: dict[str, Any]) -> list[str | Medium]:
    images, texts = _list(values, "images"), _list(values, "texts")
    if len(images) != len(texts):
        raise BadSample(
            "wrong_json_shape",
            f"expected as many images as texts, got {len(images)} and {len(texts)}",
        )
    parts: list[str | Medium] = []
    for i, (name, text) in enumerate(zip(images, texts, strict=True)):
        if isinstance(name, str) and text is None:
            parts.append(_member(record, name))
        elif name is None and isinstance(text, str):
            parts.append(text)
        else:
            raise BadSample(
                "wrong_json_shape",
                f"expected either images[{i}] or texts[{i}], and the other null, got "
                f"{_brief(name)} and {_brief(text)}",
            )
    return parts


def _of_mmc4(record: Record, values: dict[str, Any]) -> list[str | Medium]:
    texts = _list(values, "text_list")
    before: list[list[Medium]] = [[] for _ in texts]
    for i, text in enumerate(texts):
        if not isinstance(text, str):
            raise BadSample(
                "wrong_json_shape", f"expected text as text_list[{i}], got {_brief(text)}"
            )
    for i, info in enumerate(_list(values, "image_info")):
        where = f"image_info[{i}]"
        if not isinstance(info, dict):
            raise BadSample(
                "wrong_json_shape", f"expected an object as {where}, got {_brief(info)}"
            )
        index = info.get("matched_text_index")
        if not isinstance(index, int) or isinstance(index, bool):
            raise BadSample(
                "wrong_json_shape",
                f"expected a whole number as {where}.matched_text_index, got {_brief(index)}",
            )
        # Python would take -1 for the last one.
        if not 0 <= index < len(texts):
            raise BadSample(
                "image_index_out_of_range",
                f"expected {where}.matched_text_index below {len(texts)}, got {index}",
            )
        before[index].append(_mmc4_image(record, info, where))
    return [part for images, text in zip(before, texts, strict=True) for part in (*images, text)]


def _mmc4_image(record: Record, info: dict[str, Any], where: str) -> Medium:
    name, encoded = info.get("image_name"), info.get("image_base64")
    if isinstance(encoded, str):
        try:
            data = base64.b64decode(encoded)
        except ValueError as error:
            raise BadSample(
                "wrong_json_shape", f"expected base64 as {where}.image_base64: {error}"
            ) from None
        return Medium(name if isinstance(name, str) else where, data, False)
    if not isinstance(name, str):
        raise BadSample(
            "wrong_json_shape", f"expected a name as {where}.image_name, got {_brief(name)}"
        )
    return _member(record, name)


def _member(record: Record, name: str) -> Medium:
    # Shards have names in lower case, folders as they are.
    data = record.members.get(name)
    if data is None:
        data = record.members.get(name.lower())
    if data is None:
        raise BadSample("missing_member", f"expected an image {_brief(name)}, which there is not")
    return Medium(name, data, False)


def _joined(parts: Sequence[str | Medium], join: str) -> tuple[str | Medium, ...]:
    """Without empty texts, and neighbouring ones as one."""
    found: list[str | Medium] = []
    for part in parts:
        if isinstance(part, str):
            part = part.strip()
            if not part:
                continue
            if found and isinstance(found[-1], str):
                part = found.pop() + join + part  # type: ignore[operator]
        found.append(part)
    return tuple(found)


def _check_texts(texts: Sequence[str], limits: Limits) -> None:
    """Of one sample, together."""
    chars = sum(map(len, texts))
    if chars > limits.max_text_chars:
        raise BadSample(
            "text_too_long", f"expected at most {limits.max_text_chars} characters, got {chars}"
        )
    for text in texts:
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise BadSample("text_not_utf8", str(error)) from None
    if not any(text.strip() for text in texts):
        raise BadSample("empty_text", f"expected text, got {chars} characters of white space")


def _utf8(data: bytes, member: str) -> str:
    try:
        # Some editors put a mark before the text.
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise BadSample("text_not_utf8", f"{member}: {error}") from None


def _json_object(data: bytes) -> dict[str, Any]:
    text = _utf8(data, "json")
    try:
        values = json.loads(text)
    # Of very deep ones and of numbers of thousands of digits, too.
    except (ValueError, RecursionError) as error:
        raise BadSample("invalid_json", f"json: {error}") from None
    if not isinstance(values, dict):
        raise BadSample("wrong_json_shape", f"expected an object, got {_brief(values)}")
    return values


def _list(values: dict[str, Any], name: str) -> list[Any]:
    found = values[name]
    if not isinstance(found, list):
        raise BadSample("wrong_json_shape", f"expected a list as {name!r}, got {_brief(found)}")
    return found


def _brief(value: Any) -> str:
    """Not more of a document than a message can hold."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
