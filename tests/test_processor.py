"""FlamingoProcessor: prompts of text, images and videos as batches."""

import dataclasses
import struct
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("timm")
PIL = pytest.importorskip("PIL.Image")
transformers = pytest.importorskip("transformers")
av = pytest.importorskip("av")

import numpy as np  # noqa: E402
import tokenizer_cases  # noqa: E402
import tokenizers  # noqa: E402
from tokenizer_cases import byte_tokenizer  # noqa: E402

from flamingo_fast.models.config import (  # noqa: E402
    ConfigError,
    FlamingoConfig,
    ResamplerConfig,
    VisionConfig,
)
from flamingo_fast.models.processor import (  # noqa: E402
    FlamingoProcessor,
    Image,
    MediaError,
    Video,
)

WORDS = ["[PAD]", "[BOS]", "[UNK]", "a", "cat", "dog", "two", "Output", ":", "."]
SIZE = 28


def word_tokenizer(extra=(), **special):
    """Which splits at punctuation, too."""
    punctuation = tokenizers.pre_tokenizers.Whitespace()
    return tokenizer_cases.word_tokenizer([*WORDS, *extra], punctuation, **special)


TOKENIZERS = {
    "words": word_tokenizer,
    "bytes": byte_tokenizer,
    "slow": transformers.ByT5Tokenizer,
}


def transform(image):
    """Pixels as they are."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float()


def processor(tokenizer=None, image_transform=transform, **options):
    return FlamingoProcessor(image_transform, tokenizer or word_tokenizer(), **options)


def image_of(color=(10, 20, 30), size=(4, 3)):
    return PIL.new("RGB", size, color)


def picture(*shape, dtype=torch.uint8):
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
    return pixels if dtype == torch.uint8 else pixels.to(dtype) / 255


def pixels_of(part, **options):
    (media,) = processor(**options)([[part]]).media
    (pixels,) = media
    return pixels


@pytest.mark.parametrize("tokenizer", TOKENIZERS)
def test_tokens_that_are_added(tokenizer):
    tokenizer = TOKENIZERS[tokenizer]()
    before = len(tokenizer)
    found = processor(tokenizer)
    assert (found.eoc_token_id, found.image_token_id) == (before, before + 1)
    again = processor(tokenizer)
    assert (again.eoc_token_id, again.image_token_id) == (before, before + 1)
    assert len(tokenizer) == before + 2
    plain = tokenizer("a cat", add_special_tokens=False)["input_ids"]
    ids = found([["a cat", image_of(), "a cat<|endofchunk|>"]]).input_ids[0].tolist()
    assert ids[: 2 * len(plain) + 2] == [*plain, before + 1, *plain, before]


def test_tokens_of_the_vocabulary_keep_their_ids():
    tokenizer = word_tokenizer(extra=["<image>", "<EOC>"])
    found = processor(tokenizer, eoc_token="<EOC>")
    assert (found.image_token_id, found.eoc_token_id) == (len(WORDS), len(WORDS) + 1)
    assert len(tokenizer) == len(WORDS) + 2
    ids = found([["cat", image_of(), "dog<EOC>"]]).input_ids.tolist()
    assert ids == [[4, len(WORDS), 5, len(WORDS) + 1]]


def test_no_end_of_chunk():
    found = processor(eoc_token=None)
    assert found.eoc_token_id is None and found.image_token_id == len(WORDS)
    assert found.few_shot([["a"]], ["b"]) == ["a", "b"]


@pytest.mark.parametrize("side", ["left", "right"])
def test_batch(side):
    """Rows of text alone, of an image and of several media."""
    found = processor()
    prompts = [
        ["a cat"],
        [image_of((1, 1, 1)), "a dog."],
        [image_of((2, 2, 2)), image_of((3, 3, 3)), "two"],
    ]
    batch = found(prompts, padding_side=side, return_tensors="pt")
    image = found.image_token_id
    rows = [[3, 4], [image, 3, 5, 9], [image, image, 6]]
    for row, ids, mask in zip(rows, batch.input_ids, batch.attention_mask, strict=True):
        padding = [0] * (4 - len(row))
        ones = [1] * len(row)
        assert ids.tolist() == (padding + row if side == "left" else row + padding)
        assert mask.tolist() == (padding + ones if side == "left" else ones + padding)
    assert batch.input_ids.dtype == batch.attention_mask.dtype == torch.int64
    assert batch.num_media == [0, 1, 2]
    assert batch.pixel_values.shape == (3, 1, 3, 3, 4)
    assert batch.pixel_values[:, 0, 0, 0, 0].tolist() == [1, 2, 3]
    assert [len(media) for media in batch.media] == batch.num_media
    assert torch.equal(batch.media[2][1], batch.pixel_values[2])


def test_left_padding_is_the_default():
    batch = processor()([["a"], ["a cat"]])
    assert batch.attention_mask.tolist() == [[0, 1], [1, 1]]


def test_media_of_different_numbers_of_frames():
    batch = processor()([[image_of()], [Video([image_of()] * 3), image_of()]])
    assert [each.shape[0] for each in batch.pixel_values] == [1, 3, 1]
    assert [[len(each) for each in media] for media in batch.media] == [[1], [3, 1]]
    moved = batch.to("meta", torch.bfloat16)
    assert all(each.is_meta and each.dtype == torch.bfloat16 for each in moved.pixel_values)


def test_text_alone():
    batch = processor()([["a cat"], ["dog"]])
    assert batch.pixel_values is None and batch.media == [[], []] and batch.num_media == [0, 0]
    assert batch.to("cpu", torch.bfloat16).input_ids.dtype == torch.int64


def test_to():
    batch = processor()([[image_of(), "a"]])
    moved = batch.to("meta", torch.bfloat16)
    assert moved.input_ids.is_meta and moved.attention_mask.is_meta
    assert moved.pixel_values.is_meta and moved.pixel_values.dtype == torch.bfloat16
    assert moved.input_ids.dtype == torch.int64
    assert batch.to(dtype=torch.float64).pixel_values.dtype == torch.float64
    assert batch.to("meta").pixel_values.dtype == torch.float32


def test_padding_is_no_token_of_ours():
    """Of a tokenizer without a pad token, or with one of ours there."""
    assert processor(byte_tokenizer()).pad_token_id == 0
    tokenizer = word_tokenizer(extra=["<image>"], pad_token="<image>")
    batch = processor(tokenizer)([[image_of(), "a"], ["a"]])
    assert batch.input_ids.tolist() == [[len(WORDS), 3], [0, 3]]


def test_few_shot():
    found = processor()
    images = [image_of((i, i, i)) for i in range(3)]
    prompt = found.few_shot(
        [(images[0], "Output: a cat."), (images[1], "Output: a dog.")], (images[2], "Output:")
    )
    batch = found([prompt])
    image, eoc = found.image_token_id, found.eoc_token_id
    first, second = [image, 7, 8, 3, 4, 9, eoc], [image, 7, 8, 3, 5, 9, eoc]
    assert batch.input_ids.tolist() == [[*first, *second, image, 7, 8]]
    assert batch.pixel_values[:, 0, 0, 0, 0].tolist() == [0, 1, 2]


@pytest.mark.parametrize("tokenizer", TOKENIZERS)
def test_decode(tokenizer):
    found = processor(TOKENIZERS[tokenizer]())
    batch = found([["a cat", image_of(), "<|endofchunk|>"], ["a"]])
    assert found.decode(batch.input_ids[0]).strip() == "a cat"
    assert found.decode(batch.input_ids[0].tolist()).strip() == "a cat"
    if found.tokenizer.pad_token is not None:
        assert [text.strip() for text in found.batch_decode(batch.input_ids)] == ["a cat", "a"]


def test_images_of_every_kind_are_the_same(tmp_path):
    pixels = picture(3, 5, 6)
    image = PIL.fromarray(pixels.permute(1, 2, 0).numpy())
    path = tmp_path / "image.png"
    image.save(path)
    opened = PIL.open(path)
    floats = [picture(3, 5, 6, dtype=dtype) for dtype in (torch.float32, torch.float64)]
    sources = [image, pixels, *floats, path, opened]
    for part in [*sources, Image(str(path)), *map(Image, sources)]:
        assert torch.equal(pixels_of(part), pixels[None].float())


def test_a_string_is_text_even_if_a_file_has_that_name(tmp_path, monkeypatch):
    image_of().save(tmp_path / "cat.png")
    monkeypatch.chdir(tmp_path)
    batch = processor()([["cat.png"]])
    assert batch.num_media == [0]


def palette():
    image = PIL.new("P", (4, 3), 1)
    image.putpalette([0, 0, 0, 200, 100, 50])
    return image


def transparent_palette():
    image = palette()
    image.info["transparency"] = 1
    return image


def sixteen_bits(low, high):
    return PIL.fromarray(np.array([[low, high]], dtype=np.uint16))


@pytest.mark.parametrize(
    "image, suffix, expected",
    [
        (PIL.new("CMYK", (4, 3), (0, 255, 255, 0)), "tif", (255, 0, 0)),
        (PIL.new("L", (4, 3), 77), "png", (77, 77, 77)),
        (PIL.new("1", (4, 3), 1), "png", (255, 255, 255)),
        (palette(), "png", (200, 100, 50)),
        (transparent_palette(), "png", (255, 255, 255)),
        (PIL.new("RGBA", (4, 3), (9, 9, 9, 0)), "png", (255, 255, 255)),
        (PIL.new("RGBA", (4, 3), (200, 100, 50, 255)), "png", (200, 100, 50)),
        (PIL.new("LA", (4, 3), (0, 51)), "png", (204, 204, 204)),
        (sixteen_bits(257 * 99, 257 * 99), "png", (99, 99, 99)),
        (sixteen_bits(200, 300), "tif", (1, 1, 1)),
        (PIL.new("I", (4, 3), 65535), "tif", (255, 255, 255)),
    ],
    ids=lambda value: getattr(value, "mode", None),
)
def test_conversions_to_rgb(tmp_path, image, suffix, expected):
    path = tmp_path / f"image.{suffix}"
    image.save(path)
    for part in [image, path]:
        pixels = pixels_of(part)
        assert pixels[0, :, 0, 0].tolist() == list(expected)
        assert (pixels == pixels[..., :1, :1]).all()


@pytest.mark.parametrize("suffix", ["gif", "webp"])
def test_of_animated_images_the_first_frame(tmp_path, suffix):
    path = tmp_path / f"image.{suffix}"
    frames = [image_of(color, (16, 16)) for color in [(255, 0, 0), (0, 0, 255)]]
    frames[0].save(path, save_all=True, append_images=frames[1:], lossless=True)
    assert pixels_of(path).mean((0, 2, 3)).tolist() == [255, 0, 0]


def test_orientation(tmp_path):
    image = image_of(size=(4, 2))
    image.putpixel((0, 0), (255, 255, 255))
    exif = PIL.Exif()
    exif[0x0112] = 6  # to be turned clockwise
    image.save(tmp_path / "image.png", exif=exif)
    pixels = pixels_of(tmp_path / "image.png")
    assert pixels.shape == (1, 3, 4, 2) and pixels[0, 0, 0, 1] == 255


def broken_images():
    pixels = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    image = PIL.fromarray(pixels)
    yield "text.png", b"no image"
    yield "empty.jpg", b""
    for suffix in ("png", "jpeg", "webp", "gif", "tiff"):
        yield f"half.{suffix}", (image, 0.5)
    yield "header.png", (image, 20)


BROKEN = dict(broken_images())


@pytest.mark.parametrize("name", BROKEN)
def test_broken_images(tmp_path, name):
    content = BROKEN[name]
    path = tmp_path / name
    if isinstance(content, tuple):
        image, kept = content
        image.save(path)
        whole = path.read_bytes()
        content = whole[: kept if kept > 1 else int(len(whole) * kept)]
    path.write_bytes(content)
    with pytest.raises(MediaError, match=rf"prompts\[1\]\[2\]: .*{name} can't be read"):
        processor()([["a"], ["a", image_of(), path]])


def test_a_broken_image_that_its_owner_opened(tmp_path):
    path = tmp_path / "image.png"
    PIL.effect_noise((64, 64), 50).save(path)
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(MediaError, match=r"prompts\[0\]\[0\]: image can't be read"):
        processor()([[PIL.open(path)]])


def test_too_large_an_image(tmp_path, monkeypatch):
    image_of(size=(30, 30)).save(tmp_path / "image.png")
    monkeypatch.setattr(PIL, "MAX_IMAGE_PIXELS", 400)
    message = r"prompts\[0\]\[0\]: .*image.png can't be read: .*decompression bomb"
    with pytest.raises(MediaError, match=message):
        processor()([[tmp_path / "image.png"]])


def test_want_of_memory_is_not_the_files_fault():
    def fails(image):
        raise MemoryError

    class Large(PIL.Image):
        getexif = fails

    with pytest.raises(MemoryError):
        processor()([[Large()]])


NAN = torch.tensor([[[float("nan")]]] * 3)


@pytest.mark.parametrize(
    "part, error, message",
    [
        (Path("nowhere.png"), MediaError, "there is no file nowhere.png"),
        (Image("nowhere.png"), MediaError, "there is no file nowhere.png"),
        (Video("nowhere.mp4"), MediaError, "there is no file nowhere.mp4"),
        (PIL.new("F", (4, 3)), MediaError, "8 or 16 bits, got floating point"),
        (PIL.new("I", (4, 3), 70000), MediaError, "16 bits, got values from 70000"),
        (torch.zeros(1, 4, 4), MediaError, r"\(3, H, W\), got \(1, 4, 4\)"),
        (torch.zeros(3, 0, 4), MediaError, r"\(3, H, W\), got \(3, 0, 4\)"),
        (torch.zeros(2, 3, 4, 4), MediaError, "make a Video"),
        (torch.full((3, 2, 2), -0.5), MediaError, "from 0 to 1, .* from -0.5 to -0.5"),
        (torch.full((3, 2, 2), 1.5), MediaError, "from 0 to 1, .* from 1.5 to 1.5"),
        (NAN, MediaError, "from 0 to 1, .* nan"),
        (torch.zeros(3, 2, 2, dtype=torch.int64), MediaError, "uint8 .* got torch.int64"),
        (Video(torch.zeros(3, 4, 4)), MediaError, r"\(F, 3, H, W\), got \(3, 4, 4\)"),
        (Video(torch.zeros(0, 3, 4, 4)), MediaError, "at least one frame"),
        (Video([]), MediaError, "at least one frame"),
        (Video([torch.zeros(3, 2, 2), torch.ones(1, 2, 2)]), MediaError, "frame 1: .*3, H, W"),
        (Video([3]), TypeError, "frame 0: .* got int"),
        (Video(3), TypeError, "as a video, got int"),
        (Video("nowhere.mp4", num_frames=0), ValueError, ".num_frames: .*int >= 1, got 0"),
        (3, TypeError, "expected text, a PIL image, .* got int"),
        (None, TypeError, "expected text, a PIL image, .* got NoneType"),
        (np.zeros((3, 4, 4)), TypeError, "expected text, a PIL image, .* got ndarray"),
        ("an <image> here", ValueError, "expected text without <image>, .*'an <image> here'"),
    ],
)
def test_wrong_parts(part, error, message):
    with pytest.raises(error, match=message) as caught:
        processor()([["a"], ["a", part]])
    assert str(caught.value).startswith("prompts[1][1]")


@pytest.mark.parametrize(
    "prompts, options, error, message",
    [
        ([], {}, ValueError, "prompts: expected at least one"),
        ([["a"], []], {}, ValueError, r"prompts\[1\]: expected at least a token, got ''"),
        (["a"], {}, TypeError, r"prompts\[0\]: expected a list of parts, got str"),
        ([["a"], image_of()], {}, TypeError, r"prompts\[1\]: expected a list of parts, got Image"),
        ([["a"]], {"padding_side": "both"}, ValueError, "padding_side: .* 'left' or 'right'"),
        ([["a"]], {"return_tensors": "np"}, ValueError, "return_tensors: expected 'pt', got 'np'"),
    ],
)
def test_wrong_prompts(prompts, options, error, message):
    with pytest.raises(error, match=message):
        processor()(prompts, **options)


def test_wrong_arguments():
    with pytest.raises(ValueError, match="eoc_token: .*'<image>'"):
        processor(eoc_token="<image>")
    with pytest.raises(ValueError, match="num_frames: .*got 0"):
        processor(num_frames=0)
    for image_transform in [lambda image: torch.zeros(1, 4, 4), lambda image: image]:
        with pytest.raises(ValueError, match=r"image_transform: expected it to return \(3, H, W\)"):
            processor(image_transform=image_transform)([[image_of()]])


def gray(value, size=(32, 32)):
    return np.full((*size, 3), value, dtype=np.uint8)


def write_video(path, frames, *, without_frame=False):
    """Of MPEG-4; optionally with a packet that holds no frame."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=5, bit_rate=10**7)
        stream.height, stream.width = frames[0].shape[:2]
        stream.pix_fmt = "yuv420p"
        frames = [av.VideoFrame.from_ndarray(each, format="rgb24") for each in frames]
        packets = [packet for each in [*frames, None] for packet in stream.encode(each)]
        for i, packet in enumerate(packets):
            if without_frame and i == 3:
                # A picture that is "not coded", which is skipped.
                empty = av.Packet(b"\x00\x00\x01\xb6\x50\x00")
                empty.stream, empty.time_base = stream, packet.time_base
                empty.pts, empty.dts = packet.pts, packet.dts
                container.mux(empty)
            container.mux(packet)


def grays_of(frames):
    """Which multiple of 10 each frame's value is."""
    return (frames.mean((1, 2, 3)) / 10).round().int().tolist()


@pytest.mark.parametrize("suffix", ["mp4", "mkv"])
@pytest.mark.parametrize(
    "count, num_frames, taken",
    [
        (20, 4, [2, 7, 12, 17]),
        (20, 1, [10]),
        (5, 8, [0, 1, 2, 3, 4]),
        (20, None, [1, 3, 6, 8, 11, 13, 16, 18]),
    ],
)
def test_frames_of_a_video_are_even(tmp_path, count, num_frames, taken, suffix):
    path = tmp_path / f"video.{suffix}"
    arrays = [gray(10 * i) for i in range(count)]
    write_video(path, arrays)
    tensor = torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2)
    images = [PIL.fromarray(each) for each in arrays]
    for source in [path, str(path), tensor, images, tuple(images)]:
        assert grays_of(pixels_of(Video(source, num_frames))) == taken


@pytest.mark.parametrize("num_frames, taken", [(8, range(5)), (5, range(5)), (1, [3])])
def test_frames_of_a_video_with_an_empty_packet(tmp_path, num_frames, taken):
    """Six packets hold five frames: none is missing for that."""
    path = tmp_path / "video.mkv"
    write_video(path, [gray(10 * i) for i in range(5)], without_frame=True)
    assert grays_of(pixels_of(Video(path, num_frames))) == list(taken)


def test_number_of_frames_of_the_processor():
    assert len(pixels_of(Video([image_of()] * 9), num_frames=2)) == 2
    assert len(pixels_of(Video([image_of()] * 9, num_frames=3), num_frames=2)) == 3


@pytest.mark.parametrize(
    "right, down, corner",
    [((0, -1), (1, 0), (-1, 0)), ((0, 1), (-1, 0), (0, -1)), ((-1, 0), (0, -1), (-1, -1))],
    ids=["anticlockwise", "clockwise", "upside down"],
)
def test_videos_are_turned_as_they_say(tmp_path, right, down, corner):
    """By the matrix of an MP4's track, which says where right and down go, as (x, y).

    The bright corner at the upper left goes to another.
    """
    frame = gray(0, (32, 64))
    frame[:16, :16] = 255
    path = tmp_path / "video.mp4"
    write_video(path, [frame])
    content = bytearray(path.read_bytes())
    matrix = content.index(b"tkhd") + 4 + 40
    rows = [(*right, 0), (*down, 0)]
    content[matrix : matrix + 24] = struct.pack(
        ">6i", *(each << 16 for row in rows for each in row)
    )
    path.write_bytes(content)
    pixels = pixels_of(Video(path))[0, 0]
    assert pixels.shape == ((32, 64) if right == (-1, 0) else (64, 32))
    corners = {(row, column): pixels[row, column] for row in (0, -1) for column in (0, -1)}
    assert max(corners, key=corners.get) == corner


def test_videos_and_images_in_one_prompt(tmp_path):
    write_video(tmp_path / "video.mp4", [gray(10 * i) for i in range(4)])
    found = processor(num_frames=2)
    batch = found([["a", Video(tmp_path / "video.mp4"), "cat", Video([image_of()] * 2), "dog"]])
    image = found.image_token_id
    assert batch.input_ids.tolist() == [[3, image, 4, image, 5]]
    assert batch.num_media == [2]
    assert [len(each) for each in batch.pixel_values] == [2, 2]


def test_broken_videos(tmp_path):
    path = tmp_path / "video.mp4"
    write_video(path, [gray(10 * i) for i in range(4)])
    whole = path.read_bytes()
    for content in [b"no video" * 100, b"", whole[: len(whole) // 2]]:
        path.write_bytes(content)
        with pytest.raises(MediaError, match=r"prompts\[0\]\[1\]: .*video.mp4 can't be read"):
            processor()([["a", Video(path)]])


def test_a_file_without_video(tmp_path):
    path = tmp_path / "sound.wav"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("pcm_s16le", rate=8000, layout="mono")
        sound = av.AudioFrame.from_ndarray(np.zeros((1, 800), np.int16), layout="mono")
        sound.sample_rate = 8000
        for each in [sound, None]:
            container.mux(stream.encode(each))
    with pytest.raises(MediaError, match=r"prompts\[0\]\[0\]: .*sound.wav has no video"):
        processor()([[Video(path)]])


def test_a_video_without_pyav(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(ImportError, match=r"av is not installed: pip install"):
        processor()([[Video(tmp_path / "video.mp4")]])
    assert processor()([[Video([image_of()])]]).num_media == [1]


def config_of(tokenizer, name="nfnet_mini", **options):
    eoc, image = len(tokenizer), len(tokenizer) + 1
    vision = VisionConfig(encoder=name, image_size=SIZE)
    options = {"image_token_id": image, "eoc_token_id": eoc} | options
    return FlamingoConfig(vision=vision, **options)


@pytest.mark.parametrize("name", ["nfnet_mini", "vit_mini"])
def test_of_a_config(name):
    """A gray image is (value - mean) / std everywhere, at the config's size."""
    tokenizer = word_tokenizer()
    found = FlamingoProcessor.of(config_of(tokenizer, name), tokenizer)
    batch = found([[image_of((51, 51, 51), (90, 90)), "a cat"]])
    assert batch.pixel_values.shape == (1, 1, 3, SIZE, SIZE)
    mean, std = {
        "nfnet_mini": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
        "vit_mini": (
            (0.48145466, 0.4578275, 0.40821073),
            (0.26862954, 0.26130258, 0.27577711),
        ),
    }[name]
    expected = (0.2 - torch.tensor(mean)) / torch.tensor(std)
    torch.testing.assert_close(
        batch.pixel_values[0, 0], expected[:, None, None].expand(3, SIZE, SIZE)
    )


def test_images_padded_as_the_paper_does():
    """A wide image keeps its shape, on its mean colour."""
    tokenizer = word_tokenizer()
    config = config_of(tokenizer)
    found = FlamingoProcessor.of(config, tokenizer)
    wide = image_of((255, 255, 255), (56, 28))
    pixels = found([[wide]]).pixel_values[0, 0, 0]
    assert pixels.shape == (SIZE, SIZE)
    assert (pixels[:6].abs() < 0.02).all() and (pixels[-6:].abs() < 0.02).all()
    assert (pixels[8:-8] > 2).all()
    squashed = dataclasses.replace(config.vision, pad_images=False)
    found = FlamingoProcessor.of(dataclasses.replace(config, vision=squashed), tokenizer)
    assert (found([[wide]]).pixel_values > 2).all()


def test_a_ruled_line_is_an_image_too():
    """Resized as others are, it would be less than a pixel wide."""
    tokenizer = word_tokenizer()
    found = FlamingoProcessor.of(config_of(tokenizer), tokenizer)
    pixels = found([[image_of((255, 255, 255), (5000, 1))]]).pixel_values[0, 0, 0]
    assert pixels.shape == (SIZE, SIZE) and (pixels > 2).any()


def test_frames_of_a_config():
    tokenizer = word_tokenizer()
    config = config_of(tokenizer)
    for max_num_frames, expected in [(8, 8), (3, 3), (None, 8)]:
        config = dataclasses.replace(
            config, resampler=ResamplerConfig(max_num_frames=max_num_frames)
        )
        assert FlamingoProcessor.of(config, tokenizer).num_frames == expected
    assert FlamingoProcessor.of(config, tokenizer, num_frames=5).num_frames == 5


def test_a_config_without_end_of_chunk():
    tokenizer = word_tokenizer()
    config = config_of(tokenizer, image_token_id=len(tokenizer), eoc_token_id=None)
    assert FlamingoProcessor.of(config, tokenizer).eoc_token is None


@pytest.mark.parametrize("name", ["image_token_id", "eoc_token_id"])
def test_a_config_with_other_ids(name):
    tokenizer = word_tokenizer()
    config = config_of(tokenizer, **{name: 3})
    with pytest.raises(ConfigError, match=rf"{name}: expected the tokenizer's id .*, got 3"):
        FlamingoProcessor.of(config, tokenizer)
