"""Samples of records: what is read of each kind, and the reason why one can't be used."""

import base64
import collections
import io
import json
from pathlib import Path

import pytest

pytest.importorskip("webdataset")
pytest.importorskip("av")

import av  # noqa: E402
import numpy as np  # noqa: E402
import PIL.Image  # noqa: E402
from shard_cases import (  # noqa: E402
    CAPTION,
    MAX_CHARS,
    MAX_PIXELS,
    animation,
    bad_samples,
    bomb,
    encoded,
    mixed_records,
    mmc4_page,
    page,
    pair,
    picture,
    png_of_16_bit_colours,
    write_tar,
)

from flamingo_fast.training.bad_samples import REASONS, Outcomes  # noqa: E402
from flamingo_fast.training.checking import check_record, check_shards  # noqa: E402
from flamingo_fast.training.config import DatasetConfig  # noqa: E402
from flamingo_fast.training.decoding import decode  # noqa: E402
from flamingo_fast.training.samples import BadSample, Limits, Medium, parse  # noqa: E402
from flamingo_fast.training.shards import Record, ShardSet  # noqa: E402

LIMITS = Limits(MAX_CHARS, MAX_PIXELS)
SKIP = Limits(MAX_CHARS, MAX_PIXELS, "skip")


def parts_of(kind, members, limits=LIMITS):
    return parse(Record("key", "s.tar", members), kind, limits).parts


def problem_of(kind, members):
    with pytest.raises(BadSample) as caught:
        parts_of(kind, members, LIMITS)
    return caught.value.reason, caught.value.detail


def document(**values):
    return json.dumps(values).encode()


def decoded(data, limits=LIMITS, is_video=False, num_frames=4):
    return decode(Medium("name", data, is_video), limits, num_frames)


def reason_of(data, limits=LIMITS, is_video=False):
    with pytest.raises(BadSample) as caught:
        decoded(data, limits, is_video)
    return caught.value.reason


def video(count=6, size=(32, 16), format="mp4", is_noise=False, codec="mpeg4"):
    file = io.BytesIO()
    with av.open(file, "w", format=format) as container:
        stream = container.add_stream(codec, rate=5)
        (stream.width, stream.height), stream.pix_fmt = size, "yuv420p"
        for i in range(count):
            pixels = np.full((size[1], size[0], 3), 40 * i % 256, np.uint8)
            if is_noise:
                pixels = np.asarray(picture(*size, seed=i))
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            for packet in stream.encode(frame):
                container.mux(packet)
        for packet in stream.encode():
            container.mux(packet)
    return file.getvalue()


@pytest.mark.parametrize("suffix", ["jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff"])
def test_pairs_of_images_and_text(suffix):
    format = {"jpg": "jpeg", "tif": "tiff"}.get(suffix, suffix)
    data = encoded(picture(), format)
    medium, text = parts_of("image_text", {suffix: data, "txt": b"\xef\xbb\xbf a cat\n"})
    assert (medium, text) == (Medium(suffix, data, False), "a cat")
    assert decoded(data).frames[0].size == (12, 8)


def test_a_caption_may_be_in_json_and_a_text_file_goes_first():
    members = {"jpg": b"x", "json": document(caption="of JSON", url="...")}
    assert parts_of("image_text", members)[1] == "of JSON"
    assert parts_of("image_text", members | {"txt": b"of text"})[1] == "of text"
    assert problem_of("image_text", members | {"json": document(caption=None)}) == (
        "wrong_json_shape",
        'expected text as "caption", got None',
    )


def test_pairs_have_one_medium_of_their_kind():
    members = {"mp4": b"x", "txt": b"a cat"}
    assert parts_of("video_text", members) == (Medium("mp4", b"x", True), "a cat")
    # A GIF is an image of pairs of images, and a video of those of videos.
    for kind in ("image_text", "video_text"):
        (medium, _) = parts_of(kind, {"gif": b"x", "txt": b"a cat", "seg.png": b"y"})
        assert medium.is_video == (kind == "video_text")
    assert problem_of("image_text", members)[1].endswith("got mp4, txt")
    assert problem_of("image_text", {"jpg": b"", "png": b"", "txt": b"a"}) == (
        "duplicate_member",
        "expected one image, got jpg, png",
    )


def test_web_pages_of_obelics():
    members = {
        "a.jpg": b"1",
        "b.png": b"2",
        "json": document(
            images=[None, "a.jpg", "B.PNG", None, None, None],
            texts=[" Two dogs. ", None, None, "\n", "A cat.", "The end.\n"],
        ),
    }
    assert parts_of("interleaved", members) == (
        "Two dogs.",
        Medium("a.jpg", b"1", False),
        Medium("B.PNG", b"2", False),
        "A cat.\n\nThe end.",
    )
    assert parts_of("interleaved", {"json": document(images=[None], texts=["a"])}) == ("a",)


def test_web_pages_of_mmc4():
    info = [
        {"image_name": "b.jpg", "matched_text_index": 2, "matched_sim": 0.3},
        {"image_name": "a.jpg", "matched_text_index": 0},
        {"image_base64": base64.b64encode(b"3").decode(), "matched_text_index": 2},
    ]
    texts = ["A cat.", "It sleeps.", "A dog.", "It", "barks."]
    members = {"a.jpg": b"1", "b.jpg": b"2", "json": document(text_list=texts, image_info=info)}
    assert parts_of("interleaved", members) == (
        Medium("a.jpg", b"1", False),
        "A cat. It sleeps.",
        Medium("b.jpg", b"2", False),
        Medium("image_info[2]", b"3", False),
        "A dog. It barks.",
    )


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([1, 2], "expected an object, got [1, 2]"),
        ({"images": ["a.jpg"], "texts": []}, "got 1 and 0"),
        ({"images": ["a.jpg"], "texts": ["a"]}, "and the other null, got 'a.jpg' and 'a'"),
        ({"images": [None], "texts": [None]}, "got None and None"),
        ({"images": [3], "texts": [None]}, "got 3 and None"),
        ({"images": "a.jpg", "texts": []}, "expected a list as 'images', got 'a.jpg'"),
        ({"text_list": [1], "image_info": []}, "expected text as text_list[0], got 1"),
        ({"text_list": ["a"], "image_info": [1]}, "expected an object as image_info[0], got 1"),
        (
            {"text_list": ["a"], "image_info": [{"image_name": "a.jpg"}]},
            "expected a whole number as image_info[0].matched_text_index, got None",
        ),
        (
            {"text_list": ["a"], "image_info": [{"matched_text_index": 0}]},
            "expected a name as image_info[0].image_name, got None",
        ),
        (
            {"text_list": ["a"], "image_info": [{"matched_text_index": 0, "image_base64": "é"}]},
            "expected base64 as image_info[0].image_base64",
        ),
        ({"texts": "a" * 1000}, "got ['texts']"),
    ],
)
def test_json_of_another_shape(values, message):
    members = {"a.jpg": b"1", "json": json.dumps(values).encode()}
    reason, detail = problem_of("interleaved", members)
    assert reason == "wrong_json_shape"
    assert message in detail
    assert len(detail) <= 200


@pytest.mark.parametrize("index", [-1, 2, 1 << 70])
def test_images_of_texts_that_there_are_not(index):
    reason, detail = problem_of("interleaved", mmc4_page(index))
    assert reason == "image_index_out_of_range"
    assert detail == f"expected image_info[0].matched_text_index below 2, got {index}"


@pytest.mark.parametrize(
    "data",
    [b"", b"{", b"[" * 100_000, b'{"images": [' + b"1" * 5000 + b"]}", b'{"a": 1} {"a": 2}'],
)
def test_invalid_json(data):
    assert problem_of("interleaved", {"json": data})[0] == "invalid_json"


def test_texts_that_are_no_utf8():
    assert problem_of("image_text", pair(text=b"caf\xe9"))[0] == "text_not_utf8"
    # JSON can say what no UTF-8 can hold; tokenizers would fail on it.
    surrogate = b'{"images": [null], "texts": ["a \\ud83d"]}'
    assert problem_of("interleaved", {"json": surrogate})[0] == "text_not_utf8"
    assert parts_of("interleaved", {"json": surrogate.replace(b"d83d", b"d83d\\ude00")}) == (
        "a 😀",
    )


def test_the_length_of_texts_is_counted_in_characters_of_a_sample():
    text = "é" * MAX_CHARS
    assert parts_of("image_text", pair(text=text.encode()))[1] == text
    assert problem_of("image_text", pair(text=text.encode() + b"a")) == (
        "text_too_long",
        "expected at most 200 characters, got 201",
    )
    texts = ["a" * 150, "a" * 51]
    values = document(images=[None, None], texts=texts)
    assert problem_of("interleaved", {"json": values})[0] == "text_too_long"


def test_limits_are_of_a_dataset():
    config = DatasetConfig(
        "pairs", "image_text", ("a.tar",), 1, max_text_chars=1, max_image_pixels=2
    )
    assert Limits.of(config) == Limits(1, 2, "convert")
    with pytest.raises(ValueError, match="kind: expected one of .*; got 'images'"):
        parts_of("images", {})


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF"])
def test_images_that_end_early(format):
    """Wherever it is: it is used, if nothing of its pixels is missing, or said to be cut."""
    data = encoded(picture(40, 30), format)
    assert decoded(data).is_unusual is False
    reasons = collections.Counter()
    for end in range(1, len(data), 61):
        try:
            decoded(data[:end])
        except BadSample as error:
            reasons[error.reason] += 1
    # A few bytes do not tell what they are the beginning of.
    assert reasons["not_an_image"] <= 2
    assert set(reasons) <= {"truncated_image", "not_an_image"}
    assert reason_of(data[: len(data) // 2]) == "truncated_image"


def test_images_that_are_none():
    assert reason_of(b"") == "empty_file"
    assert reason_of(b"hello") == "not_an_image"
    # Of formats that Pillow knows; it would start a program.
    assert reason_of(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n") == "not_an_image"
    png = bytearray(encoded(picture(40, 30), "PNG"))
    png[500:530] = bytes(30)
    assert reason_of(bytes(png)) == "broken_image"


def test_decompression_bombs_are_found_before_they_are_decoded(monkeypatch):
    data = bomb()
    assert decoded(data, Limits(max_image_pixels=160_000)).frames[0].size == (400, 400)
    monkeypatch.setattr(PIL.Image.Image, "convert", None)
    assert reason_of(data, Limits(max_image_pixels=159_999)) == "decompression_bomb"
    # Pillow's own limit holds, too.
    monkeypatch.setattr(PIL.Image, "MAX_IMAGE_PIXELS", 70_000)
    assert reason_of(data, Limits(max_image_pixels=1 << 30)) == "decompression_bomb"
    assert reason_of(video(1, (128, 128)), is_video=True) == "decompression_bomb"


UNUSUAL = {
    "CMYK": lambda: encoded(picture().convert("CMYK")),
    "16 bits, grey": lambda: encoded(
        PIL.Image.fromarray(np.full((8, 12), 51 * 257, np.uint16)), "PNG"
    ),
    "16 bits, colours": lambda: png_of_16_bit_colours(),
    "GIF": lambda: animation(),
    "PNG": lambda: animation("PNG"),
    "WebP": lambda: animation("WEBP"),
    "pages": lambda: animation("TIFF"),
}


@pytest.mark.parametrize("name", UNUSUAL)
def test_unusual_images_are_converted_or_skipped(name):
    data = UNUSUAL[name]()
    found = decoded(data)
    assert found.is_unusual
    assert [frame.mode for frame in found.frames] == ["RGB"]
    if name == "16 bits, grey":
        assert found.frames[0].getpixel((0, 0)) == (51, 51, 51)
    if name in ("PNG", "pages"):
        assert np.array_equal(found.frames[0], picture())
    assert reason_of(data, SKIP) == "unusual_image"


def test_usual_images_are_not_unusual():
    transparent = picture().convert("RGBA")
    for image in (picture().convert("L"), transparent, picture().quantize(8)):
        assert decoded(encoded(image, "PNG"), SKIP).is_unusual is False
    # Cameras put smaller images behind the one that was taken.
    camera = encoded(picture(), "MPO", save_all=True, append_images=[picture()])
    assert len(decoded(camera, SKIP).frames) == 1


def test_images_that_nothing_says_how_to_convert_are_skipped():
    pixels = PIL.Image.fromarray(np.full((8, 12), 0.5, np.float32))
    assert reason_of(encoded(pixels, "TIFF")) == "unusual_image"


def test_frames_of_videos():
    found = decoded(video(), is_video=True, num_frames=3)
    assert [frame.size for frame in found.frames] == [(32, 16)] * 3
    # The middles of three spans of six frames.
    shades = [np.asarray(frame).mean() for frame in found.frames]
    assert np.allclose(shades, [40, 120, 200], atol=8)
    assert len(decoded(video(2), is_video=True).frames) == 2
    assert len(decoded(animation(), is_video=True).frames) == 3
    # Of one that ends early, those that are there.
    data = video(20, format="matroska", is_noise=True)
    assert 1 < len(decoded(data[: len(data) * 2 // 3], is_video=True, num_frames=20).frames) < 20
    for data in (b"no video" * 99, encoded(picture())[:200], video()[:300]):
        assert reason_of(data, is_video=True) == "broken_video"


def test_images_with_a_very_long_side_are_bombs():
    too_long, longest = (encoded(PIL.Image.new("L", (65_536 - i, 1)), "PNG") for i in range(2))
    assert reason_of(too_long, Limits()) == "decompression_bomb"
    assert decoded(longest, Limits()).frames[0].size == (65_535, 1)


def test_only_containers_of_videos_are_tried():
    """FFmpeg reads a JPEG too, and waits twenty seconds at a port where an SDP file says so."""
    session = b"v=0\nc=IN IP4 127.0.0.1\nm=video 5004 RTP/AVP 96\na=rtpmap:96 H264/90000\n"
    for data in (encoded(picture()), session):
        assert reason_of(data, is_video=True) == "broken_video"
    for format in ("mp4", "mov", "matroska", "webm", "avi", "mpegts"):
        codec = "libvpx" if format == "webm" else "mpeg4"
        assert len(decoded(video(6, format=format, codec=codec), is_video=True).frames) > 1


def test_frames_that_become_too_large_on_the_way_are_a_bomb():
    small, large = (video(9, size, "mpegts", True, "mpeg2video") for size in ((32, 32), (320, 160)))
    assert len(decoded(small, is_video=True).frames) > 1
    assert reason_of(small + large, is_video=True) == "decompression_bomb"


def test_a_broken_record_is_a_bad_sample():
    record = Record("key", "s.tar", pair(), ("broken_shard", "the file ends within key.jpg"))
    with pytest.raises(BadSample, match="broken_shard: the file ends within key.jpg"):
        parse(record, "image_text", LIMITS)


@pytest.mark.parametrize("kind", ["image_text", "interleaved"])
@pytest.mark.parametrize("unusual_images", ["convert", "skip"])
def test_each_of_the_bad_kinds_has_its_reason(kind, unusual_images):
    limits = Limits(MAX_CHARS, MAX_PIXELS, unusual_images)
    for name, (expected, members) in bad_samples(kind).items():
        outcomes = Outcomes()
        check_record(Record(name, "s.tar", members), kind, limits, 4, outcomes)
        if expected == "unusual_image" and unusual_images == "convert":
            expected = "converted_image"
        assert dict(outcomes.counts) == {expected: 1}, name


@pytest.mark.parametrize(
    "kind", [pytest.param("interleaved", marks=pytest.mark.slow), "image_text"]
)
def test_of_10_000_samples_a_third_of_them_bad_none_is_lost(tmp_path: Path, kind):
    count = 10_000 if kind == "interleaved" else 1_000
    expected = collections.Counter()
    shards = []
    records = mixed_records(kind, count)
    for i in range(5):
        chunk = []
        for _ in range(count // 5):
            key, outcome, members = next(records)
            expected[outcome] += 1
            chunk.append((key, members))
        shards.append(write_tar(tmp_path / f"{i}.tar", chunk))
    outcomes = check_shards(ShardSet(shards), kind, SKIP)
    assert outcomes.counts == expected
    assert outcomes.total == count
    assert outcomes.bad == -(-count // 3)
    expected_kinds = {outcome for outcome, _ in bad_samples(kind).values()}
    assert set(outcomes.counts) == {"ok"} | expected_kinds and expected_kinds <= set(REASONS)
    assert all(len(examples) == 3 for examples in outcomes.examples.values())


def test_usable_samples_are_what_they_are():
    for kind, members in (("image_text", pair()), ("interleaved", page())):
        assert parts_of(kind, members)[-1] == CAPTION
