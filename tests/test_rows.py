"""Documents of samples: tokens, windows of pages, media, what is random; and rows of them."""

import collections
import dataclasses
import json
import random
from collections.abc import Sequence
from pathlib import Path

import PIL.Image
import pytest
import torch

pytest.importorskip("webdataset")
pytest.importorskip("timm")
transformers = pytest.importorskip("transformers")

import stream_cases  # noqa: E402
from stream_cases import EOC, IMAGE, MODEL, plain_image, word_tokenizer, words  # noqa: E402
from tokenizer_cases import byte_tokenizer  # noqa: E402

from flamingo_fast.models.config import ConfigError, FlamingoConfig  # noqa: E402
from flamingo_fast.models.processor import FlamingoProcessor  # noqa: E402
from flamingo_fast.training.bad_samples import BadSample  # noqa: E402
from flamingo_fast.training.config import DatasetConfig  # noqa: E402
from flamingo_fast.training.rows import (  # noqa: E402
    Document,
    DocumentMaker,
    Draft,
    collate,
    gather,
)
from flamingo_fast.training.shards import Record  # noqa: E402
from flamingo_fast.training.throughput import documents_of  # noqa: E402
from flamingo_fast.training.transforms import Augmentation, Transform  # noqa: E402

TOKENIZERS = {
    "words": word_tokenizer,
    "words with a BOS": lambda: word_tokenizer(bos=True),
    "bytes": byte_tokenizer,
    # Slow, and puts an end behind every text.
    "ByT5": transformers.ByT5Tokenizer,
}


def make(
    config: DatasetConfig, tokenizer=None, eoc: str | None = "<EOC>", seed: int = 0, **model: object
) -> DocumentMaker:
    processor = FlamingoProcessor(
        stream_cases.colour, tokenizer or word_tokenizer(), "<image>", eoc
    )
    return DocumentMaker(config, dataclasses.replace(MODEL, **model), processor, seed=seed)


def pair(text: str) -> Record:
    return Record("key", "shard.tar", {"png": plain_image(7), "txt": text.encode()})


def page(parts: Sequence[str | int]) -> Record:
    """A page of texts, and of images by their colours."""
    document = {
        "images": [f"{part}.png" if isinstance(part, int) else None for part in parts],
        "texts": [part if isinstance(part, str) else None for part in parts],
    }
    images = {f"{part}.png": plain_image(part) for part in parts if isinstance(part, int)}
    return Record("key", "shard.tar", {"json": json.dumps(document).encode(), **images})


def pairs_config(**options: object) -> DatasetConfig:
    return stream_cases.dataset("none", **options)


def pages_config(**options: object) -> DatasetConfig:
    return stream_cases.dataset("none", kind="interleaved", **{"max_tokens": 100, **options})


def ids_of(text: str) -> list[int]:
    return [int(word[1:]) + 3 for word in text.split()]


def reds(maker: DocumentMaker, draft: Draft) -> list[int]:
    """Colours of a draft's images."""
    _, media, _ = maker.finish(draft)
    return [int(each.flatten()[0]) for each in media]


class TestTokens:
    @pytest.mark.parametrize("name", TOKENIZERS)
    def test_they_are_those_of_a_prompt(self, name: str) -> None:
        tokenizer = TOKENIZERS[name]()
        maker = make(pages_config(), tokenizer)
        processor = FlamingoProcessor(stream_cases.colour, tokenizer, "<image>", "<EOC>")
        image = PIL.Image.new("RGB", (2, 2))
        prompt = ["w1 two", "<EOC>", image, "w3 dogs", "<EOC>", image, "w4", "<EOC>"]
        expected = processor([prompt]).input_ids[0].tolist()
        got = maker.draft(page(["w1 two", 1, "w3 dogs", 2, "w4"]), 0).ids
        assert got == expected[: len(expected) - (name == "ByT5")]

    @pytest.mark.parametrize("name", TOKENIZERS)
    @pytest.mark.parametrize("text", ["an <image> w1", "w1 <EOC> w2", "w1 </s>", "[BOS] w1"])
    def test_names_of_special_tokens_stay_text(self, name: str, text: str) -> None:
        tokenizer = TOKENIZERS[name]()
        maker = make(pairs_config(max_tokens=64), tokenizer)
        prefix = tokenizer("", add_special_tokens=True)["input_ids"][: name.endswith("BOS")]
        image, eoc = tokenizer.convert_tokens_to_ids(["<image>", "<EOC>"])
        ids = maker.draft(pair(text), 0).ids
        assert ids[: len(prefix) + 1] == [*prefix, image] and ids[-1] == eoc
        caption = ids[len(prefix) + 1 : -1]
        special = {*tokenizer.all_special_ids} - {tokenizer.unk_token_id}
        # A vocabulary of words has [BOS] as one, whatever it is asked.
        assert not special & {*caption} or (name.startswith("words") and "[BOS]" in text)
        assert image not in caption and eoc not in caption
        if name in ("bytes", "ByT5"):
            assert tokenizer.decode(caption) == text


class TestPairs:
    def test_a_pair_is_image_text_end(self) -> None:
        draft = make(pairs_config()).draft(pair(words([1, 2, 3])), 0)
        assert draft.ids == [IMAGE, 4, 5, 6, EOC]
        assert draft.attend == "previous" and len(draft.media) == 1

    def test_a_model_without_an_end_has_none(self) -> None:
        tokenizer = word_tokenizer()
        maker = make(pairs_config(max_tokens=4), tokenizer, None, eoc_token_id=None)
        assert maker.draft(pair(words(range(9))), 0).ids == [len(stream_cases.WORDS), 3, 4, 5]

    @pytest.mark.parametrize(("bos", "expected"), [(False, [0, 1, 2, 3]), (True, [0, 1, 2])])
    def test_a_long_caption_is_cut_and_keeps_its_end(self, bos: bool, expected: list[int]) -> None:
        draft = make(pairs_config(max_tokens=6), word_tokenizer(bos)).draft(
            pair(words(range(9))), 0
        )
        assert draft.ids == [*([1] if bos else []), IMAGE, *ids_of(words(expected)), EOC]

    def test_a_space_comes_first_as_often_as_it_is_told(self) -> None:
        def share(probability: float) -> float:
            config = pairs_config(space_probability=probability)
            tokenizer = byte_tokenizer()
            maker = make(config, tokenizer)
            texts = [tokenizer.decode(maker.draft(pair("a cat"), i).ids[1:-1]) for i in range(200)]
            assert {*texts} <= {"a cat", " a cat"}
            return texts.count(" a cat") / len(texts)

        assert (share(0.0), share(1.0)) == (0, 1)
        assert 0.4 < share(0.5) < 0.6

    def test_rows_without_room_for_text_are_refused(self) -> None:
        with pytest.raises(ConfigError, match="datasets.max_tokens: expected at least 4, .* got 3"):
            make(pairs_config(max_tokens=3), word_tokenizer(bos=True))


class TestPages:
    def test_an_end_comes_before_every_image_but_a_leading_one_and_at_last(self) -> None:
        maker = make(pages_config())
        assert maker.draft(page(["w1", 1, "w2", 2, 3, "w3"]), 0).ids == [
            *(4, EOC, IMAGE, 5, EOC, IMAGE, EOC, IMAGE, 6, EOC)
        ]
        assert maker.draft(page([1, "w1"]), 0).ids == [IMAGE, 4, EOC]

    def test_a_window_is_part_of_the_page_with_its_images(self) -> None:
        parts = [part for i in range(10) for part in (i, words(range(3 * i, 3 * i + 3)))]
        whole = make(pages_config(max_images=10)).draft(page(parts), 0).ids
        assert len(whole) == 50
        maker = make(pages_config(max_images=10, max_tokens=12))
        starts = collections.Counter()
        for position in range(300):
            draft = maker.draft(page(parts), position)
            places = [i for i in range(39) if whole[i : i + 12] == draft.ids]
            assert len(draft.ids) == 12 and len(places) == 1
            starts[places[0]] += 1
            shown = whole[: places[0]].count(IMAGE)
            assert reds(maker, draft) == list(range(shown, shown + draft.ids.count(IMAGE)))
        # Each of the 39 places about equally often, both ends too.
        assert len(starts) == 39 and max(starts.values()) < 25

    def test_images_after_the_first_ones_are_left_out_with_their_ends(self) -> None:
        record = page(["w0", 1, "w1", 2, "w2", 3, "w3", 4, "w4"])
        draft = make(pages_config(max_images=2)).draft(record, 0)
        assert draft.ids == [3, EOC, IMAGE, 4, EOC, IMAGE, 5, 6, 7, EOC]
        assert len(draft.media) == 2

        # The text after them moves up into the window, wherever that begins.
        maker = make(pages_config(max_images=1, max_tokens=8))
        drafts = {tuple(maker.draft(record, i).ids) for i in range(100)}
        assert (3, EOC, IMAGE, 4, 5, 6, 7, EOC) in drafts
        assert (EOC, IMAGE, 5, 6, 7, EOC) in drafts
        assert {each.count(IMAGE) for each in drafts} == {1}

    def test_a_row_begins_as_the_tokenizer_begins_a_text(self) -> None:
        maker = make(pages_config(max_tokens=6), word_tokenizer(bos=True))
        for position in range(20):
            ids = maker.draft(page([words(range(30))]), position).ids
            assert ids[0] == 1 and len(ids) == 6 and 1 not in ids[1:]

    def test_a_window_of_nothing_but_images_that_are_left_out_is_a_bad_sample(self) -> None:
        maker = make(pages_config(max_images=0), eoc=None)
        assert maker.draft(page([1, "w1", 2]), 0).ids == [4]
        maker = make(pages_config(max_images=0, max_tokens=4), eoc=None)
        with pytest.raises(BadSample, match="empty_text: expected text at token"):
            for position in range(100):
                maker.draft(page(["w1", *range(20)]), position)

    def test_text_attends_to_the_next_image_with_p_next(self) -> None:
        def share(p_next: float) -> float:
            maker = make(pages_config(), p_next=p_next)
            drawn = [maker.draft(page([1, "w1"]), i).attend for i in range(400)]
            assert {*drawn} <= {"next", "previous"}
            return drawn.count("next") / len(drawn)

        assert (share(0.0), share(1.0)) == (0, 1)
        assert 0.4 < share(0.5) < 0.6

    def test_a_model_that_attends_to_all_images_decides_itself(self) -> None:
        attend = dataclasses.replace(MODEL.conditioning, attend="all_previous")
        assert make(pages_config(), conditioning=attend).draft(page([1, "w1"]), 0).attend is None
        assert make(pairs_config(), conditioning=attend).draft(pair("w1"), 0).attend is None

    def test_what_is_random_depends_on_seed_name_and_position_alone(self) -> None:
        record = page([words(range(40))])

        def drafts(seed: int = 0, name: str = "a") -> list[list[int]]:
            maker = make(pages_config(max_tokens=8, name=name), seed=seed)
            random.seed(len(name))
            torch.manual_seed(seed)
            order = random.sample(range(20), 20)
            made = {position: maker.draft(record, position).ids for position in order}
            return [made[position] for position in range(20)]

        assert drafts() == drafts()
        assert drafts() != drafts(seed=1) and drafts() != drafts(name="b")


class TestAugmentation:
    def test_it_is_another_one_for_each_position_and_medium(self) -> None:
        maker = make(pages_config(augment=True))

        def pixels(position: int) -> list[torch.Tensor]:
            return maker.finish(maker.draft(page([9, 9, "w1"]), position))[1]

        assert torch.equal(pixels(0)[0], pixels(0)[0])
        assert not torch.equal(pixels(0)[0], pixels(0)[1])
        assert not torch.equal(pixels(0)[0], pixels(1)[0])

    def test_it_comes_after_an_image_is_resized_and_before_it_is_padded(self) -> None:
        from timm.data import create_transform

        transform = create_transform((3, 8, 8), crop_mode="border", crop_pct=1.0)
        image = PIL.Image.new("RGB", (64, 32))
        image.paste((255, 0, 0), (0, 0, 32, 32))
        plain = Transform(transform)(image)
        flipped = Transform(transform)(image, Augmentation(True, 1.0, 1.0, 1.0))
        assert torch.equal(flipped, plain.flip(-1)) and not torch.equal(flipped, plain)
        darker = Transform(transform)(image, Augmentation(False, 0.8, 1.0, 1.0))
        assert torch.equal(darker[:, :2], plain[:, :2]), "the mean colour is above the image"
        assert (darker[0, 3] < plain[0, 3])[:4].all()

    @pytest.mark.parametrize("crop_mode", ["border", "center"])
    @pytest.mark.parametrize("size", [(1, 40_000), (40_000, 2)])
    def test_a_ruled_line_is_an_image_too(self, size: tuple[int, int], crop_mode: str) -> None:
        from timm.data import create_transform

        transform = create_transform((3, 28, 28), crop_mode=crop_mode, crop_pct=1.0)
        image = PIL.Image.new("RGB", size, (255, 0, 0))
        pixels = Transform(transform)(image, Augmentation(True, 1.0, 1.0, 1.0))
        assert pixels.shape == (3, 28, 28) and pixels[0, 14, 14] > 0 > pixels[1, 14, 14]

    def test_a_transform_that_returns_something_else_is_named(self) -> None:
        with pytest.raises(ValueError, match=r"image_transform: expected .* got \(8, 8\)"):
            Transform(lambda image: torch.zeros(8, 8))(PIL.Image.new("RGB", (8, 8)))


def document(*ids: int, attend: str = "previous") -> Document:
    return Document(list(ids), ids.count(IMAGE), attend)


def batch_of(rows: list[list[Document]], media: list[torch.Tensor], pack: bool, **options: object):
    fields = {"max_tokens": 7, "image_token_id": IMAGE, "pad_token_id": 0, "has_features": False}
    # As of two worker processes.
    split = sum(each.num_media for each in rows[0])
    parts = [gather(rows[:1], media[:split]), gather(rows[1:], media[split:])]
    return collate(parts, pack=pack, **{**fields, **options})


ROWS = [
    [document(IMAGE, 5, 6, EOC), document(7, IMAGE, EOC, attend="next")],
    [document(IMAGE, 8, IMAGE, 9)],
]


class TestBatches:
    def test_packed(self) -> None:
        media = [torch.full((1, 3, 2, 2), float(i)) for i in range(4)]
        batch = batch_of(ROWS, media, pack=True)
        x = -100
        assert batch.input_ids.tolist() == [
            [IMAGE, 5, 6, EOC, 7, IMAGE, EOC],
            [IMAGE, 8, IMAGE, 9, 0, 0, 0],
        ]
        assert batch.labels.tolist() == [[x, 5, 6, EOC, x, x, EOC], [x, 8, x, 9, x, x, x]]
        assert batch.cu_seqlens.tolist() == [0, 4, 7, 11, 14]
        assert batch.cu_seqlens.dtype == torch.int32 and batch.attention_mask is None
        assert batch.num_media == [1, 1, 2, 0]
        assert batch.attend == ["previous", "next", "previous", "previous"]
        assert torch.equal(batch.pixels, torch.stack(media))
        assert batch.loss_tokens() == 6

    def test_unpacked_rows_are_as_long_as_the_longest(self) -> None:
        rows = [[ROWS[0][1]], ROWS[1]]
        media = [torch.full((1, 3, 2, 2), float(i)) for i in range(3)]
        batch = batch_of(rows, media, pack=False)
        assert batch.input_ids.tolist() == [[7, IMAGE, EOC, 0], [IMAGE, 8, IMAGE, 9]]
        assert batch.labels.tolist() == [[-100, -100, EOC, -100], [-100, 8, -100, 9]]
        assert batch.attention_mask.tolist() == [[1, 1, 1, 0], [1, 1, 1, 1]]
        assert batch.cu_seqlens is None and batch.num_media == [1, 2]
        assert batch.attend == ["next", "previous"]

    def test_videos_of_other_lengths_are_a_list(self) -> None:
        media = [torch.full((1 + i, 3, 2, 2), float(i)) for i in range(4)]
        batch = batch_of(ROWS, media, pack=True)
        assert isinstance(batch.pixels, list)
        assert all(map(torch.equal, batch.pixels, media)) and len(batch.pixels) == 4

    def test_features_take_the_place_of_pixels(self) -> None:
        media = [torch.full((1, 5, 6), float(i)) for i in range(4)]
        batch = batch_of(ROWS, media, pack=True, has_features=True)
        assert batch.pixels is None and len(batch.features) == 4
        assert all(map(torch.equal, batch.features, media))

    def test_text_alone_has_neither(self) -> None:
        batch = batch_of([[document(5, 6)], [document(7)]], [], pack=False)
        assert batch.pixels is None and batch.features is None and batch.num_media == [0, 0]

    def test_text_alone_of_a_dataset_with_features_does_not_run_the_encoder(self) -> None:
        batch = batch_of([[document(5, 6)]], [], pack=False, has_features=True)
        assert batch.pixels is None and batch.features == []

    def test_media_of_other_sizes_are_refused(self) -> None:
        media = [torch.zeros(1, 3, 2, 2), torch.zeros(1, 3, 2, 4)]
        with pytest.raises(ValueError, match=r"media: .* got \(3, 2, 2\), \(3, 2, 4\)"):
            gather([[ROWS[0][0]], [ROWS[0][1]]], media)


def test_images_and_their_tokens_stay_together(tmp_path: Path) -> None:
    """Each caption of `write_pairs` has one word, and its image the colour that goes with it."""
    shards = stream_cases.write_pairs(tmp_path, [1 + i % 5 for i in range(50)])
    batch = next(stream_cases.stream(stream_cases.dataset(shards, pack=True, max_tokens=20)))
    ids = batch.input_ids.flatten().tolist()
    documents = [
        ids[start:end]
        for start, end in zip(batch.cu_seqlens, batch.cu_seqlens[1:], strict=False)
        if ids[start] == IMAGE
    ]
    assert len(documents) == len(batch.pixels) == len(documents_of(batch)) > 8
    assert [each[1] - 3 for each in documents] == batch.pixels[:, 0, 0, 0, 0].int().tolist()


def test_frames_of_a_video(tmp_path: Path) -> None:
    av = pytest.importorskip("av")
    path = tmp_path / "video.mp4"
    with av.open(str(path), "w") as container:
        track = container.add_stream("mpeg4", rate=5)
        track.width, track.height, track.pix_fmt = 32, 32, "yuv420p"
        for i in range(10):
            image = PIL.Image.new("RGB", (32, 32), (20 * i, 0, 0))
            for packet in track.encode(av.VideoFrame.from_image(image)):
                container.mux(packet)
        for packet in track.encode():
            container.mux(packet)
    record = Record("key", "shard.tar", {"mp4": path.read_bytes(), "txt": b"w1"})
    maker = make(pairs_config(kind="video_text", num_frames=4, augment=True))
    found, (video,), _ = maker.finish(maker.draft(record, 0))
    assert found.num_media == 1 and found.ids == [IMAGE, 4, EOC] and video.shape == (4, 3, 1, 1)
    # Colours change alike in all frames, so that it still gets brighter.
    assert (video[:, 0, 0, 0].diff() > 10).all()


def test_another_model_is_refused() -> None:
    config = stream_cases.dataset("none")
    with pytest.raises(ConfigError, match="image_token_id"):
        stream_cases.stream(config, model=FlamingoConfig(image_token_id=7, eoc_token_id=EOC))
