"""Tar files of samples, good and bad, for tests of training data."""

import io
import json
import random
import struct
import tarfile
import zlib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import numpy as np
import PIL.Image

Members = Mapping[str, bytes]
Records = Iterable[tuple[str, Members]]


def write_tar(path: Path, records: Records) -> str:
    with tarfile.open(path, "w") as tar:
        for key, members in records:
            for suffix, data in members.items():
                add_member(tar, f"{key}.{suffix}", data)
    return str(path)


def add_member(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(data)
    tar.addfile(info, io.BytesIO(data))


def picture(width: int = 12, height: int = 8, seed: int = 0) -> PIL.Image.Image:
    """Noise: it hardly compresses, so that files are cut within their pixels."""
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return PIL.Image.fromarray(pixels)


def encoded(image: PIL.Image.Image, format: str = "JPEG", **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def png_of_16_bit_colours() -> bytes:
    """Which Pillow reads, but does not write."""
    width, height = 5, 4

    def chunk(name: bytes, data: bytes) -> bytes:
        checksum = zlib.crc32(name + data)
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", checksum)

    header = struct.pack(">IIBBBBB", width, height, 16, 2, 0, 0, 0)
    rows = (b"\0" + bytes(range(6 * width))) * height
    return b"".join(
        (
            b"\x89PNG\r\n\x1a\n",
            chunk(b"IHDR", header),
            chunk(b"IDAT", zlib.compress(rows)),
            chunk(b"IEND", b""),
        )
    )


def animation(format: str = "GIF") -> bytes:
    frames = [picture(seed=1), picture(seed=2)]
    return encoded(picture(), format, save_all=True, append_images=frames)


def bomb() -> bytes:
    """A few hundred bytes, 160,000 pixels."""
    return encoded(PIL.Image.new("1", (400, 400)), "PNG")


# Of tests: `bomb` is over it.
MAX_PIXELS = 10_000
MAX_CHARS = 200
CAPTION = "two dogs on a red sofa"


def pair(image: bytes | None = None, text: bytes = CAPTION.encode()) -> dict[str, bytes]:
    return {"jpg": encoded(picture()) if image is None else image, "txt": text}


def page(image: bytes | None = None, text: str = CAPTION) -> dict[str, bytes]:
    """A web page as OBELICS has it: text, an image, and text."""
    document = {"images": [None, "0.jpg", None], "texts": ["Look:", None, text]}
    return {
        "0.jpg": encoded(picture()) if image is None else image,
        "json": json.dumps(document).encode(),
    }


def mmc4_page(index: int = 1) -> dict[str, bytes]:
    document = {
        "text_list": ["Look:", CAPTION],
        "image_info": [{"image_name": "0.jpg", "matched_text_index": index}],
    }
    return {"0.jpg": encoded(picture()), "json": json.dumps(document).encode()}


def _without(members: dict[str, bytes], name: str) -> dict[str, bytes]:
    return {each: data for each, data in members.items() if each != name}


def bad_samples(kind: str) -> dict[str, tuple[str, dict[str, bytes]]]:
    """Members of what is wrong in one way each, and the outcome; "image_text", "interleaved".

    Unusual images are converted where limits say so: the outcome is then "converted_image".
    """
    jpeg = encoded(picture())
    make = pair if kind == "image_text" else page
    found = {
        "truncated JPEG": ("truncated_image", make(jpeg[: len(jpeg) // 2])),
        "zero bytes": ("empty_file", make(b"")),
        "not an image": ("not_an_image", make(b"<html>404 Not Found</html>")),
        "decompression bomb": ("decompression_bomb", make(bomb())),
        "CMYK": ("unusual_image", make(encoded(picture().convert("CMYK")))),
        "16 bits": ("unusual_image", make(png_of_16_bit_colours())),
        "animated": ("unusual_image", make(animation())),
        "missing image": ("missing_member", _without(make(), "jpg" if make is pair else "0.jpg")),
    }
    if make is pair:
        named = {"jpg": jpeg}
        return found | {
            "missing text": ("missing_member", named),
            "invalid JSON": ("invalid_json", named | {"json": b'{"caption": "a'}),
            "JSON of another shape": ("wrong_json_shape", named | {"json": b'{"title": "a"}'}),
            "empty text": ("empty_text", make(text=b" \n")),
            "text over the limit": ("text_too_long", make(text=b"a" * (MAX_CHARS + 1))),
            "no UTF-8": ("text_not_utf8", make(text=b"caf\xe9")),
        }
    empty = {"images": ["0.jpg", None], "texts": [None, " "]}
    return found | {
        "missing JSON": ("missing_member", {"0.jpg": jpeg}),
        "invalid JSON": ("invalid_json", make() | {"json": make()["json"][:-1]}),
        "JSON of another shape": ("wrong_json_shape", make() | {"json": b'{"images": ["0.jpg"]}'}),
        "image index out of range": ("image_index_out_of_range", mmc4_page(index=2)),
        "empty text": ("empty_text", make() | {"json": json.dumps(empty).encode()}),
        "text over the limit": ("text_too_long", make(text="a" * (MAX_CHARS + 1))),
        "no UTF-8": ("text_not_utf8", make() | {"json": make()["json"].replace(b"two", b"tw\xf6")}),
    }


def mixed_records(kind: str, count: int) -> Iterator[tuple[str, str, Members]]:
    """Key, outcome ("ok" or of `bad_samples`) and members: every third is a bad one."""
    order = random.Random(0)
    good = pair() if kind == "image_text" else page()
    bad = list(bad_samples(kind).values())
    for i in range(count):
        outcome, members = bad[i // 3 % len(bad)] if i % 3 == 0 else ("ok", good)
        yield f"{order.randrange(1 << 40):012x}{i}", outcome, members
