"""Features of a frozen vision encoder on disk: written, found, read in place of pixels."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("webdataset")
pytest.importorskip("timm")
pytest.importorskip("yaml")

import run_cases  # noqa: E402
import safetensors  # noqa: E402
import safetensors.torch  # noqa: E402
import shard_cases  # noqa: E402
import stream_cases  # noqa: E402
import yaml  # noqa: E402
from model_cases import tiny_config  # noqa: E402
from typer.testing import CliRunner  # noqa: E402

from flamingo_fast.cli import app  # noqa: E402
from flamingo_fast.models.config import ConfigError, VisionConfig  # noqa: E402
from flamingo_fast.models.fields import from_dict  # noqa: E402
from flamingo_fast.models.vision import VisionEncoder  # noqa: E402
from flamingo_fast.training.bad_samples import BadSample  # noqa: E402
from flamingo_fast.training.config import DatasetConfig, TrainConfig  # noqa: E402
from flamingo_fast.training.encoding import Encoded, encode_features  # noqa: E402
from flamingo_fast.training.features import (  # noqa: E402
    FeatureCache,
    FeatureError,
    FeatureWriter,
    entry_name,
    find_folder,
    fingerprint,
    folder_name,
)
from flamingo_fast.training.model_source import (  # noqa: E402
    find_source,
    make_model,
    make_vision_encoder,
)
from flamingo_fast.training.samples import Limits, Medium  # noqa: E402
from flamingo_fast.training.stream import Stream, StreamError  # noqa: E402
from flamingo_fast.training.trainer import train  # noqa: E402

VISION = VisionConfig(encoder="vit_mini", image_size=28)
LIMITS = Limits()


def encoder(seed: int = 0) -> VisionEncoder:
    torch.manual_seed(seed)
    return VisionEncoder(VISION)


def medium(data: bytes, is_video: bool = False) -> Medium:
    return Medium("jpg", data, is_video)


class TestEntries:
    def test_a_name_is_of_the_bytes_and_of_how_they_are_decoded(self) -> None:
        name = entry_name(medium(b"a"), LIMITS, 8)
        assert name == entry_name(Medium("other.png", b"a", False), LIMITS, 4)
        others = [
            entry_name(medium(b"b"), LIMITS, 8),
            entry_name(medium(b"a"), Limits(max_image_pixels=9), 8),
            entry_name(medium(b"a"), Limits(unusual_images="skip"), 8),
            entry_name(medium(b"a", is_video=True), LIMITS, 8),
            entry_name(medium(b"a", is_video=True), LIMITS, 4),
        ]
        assert len({name, *others}) == 6

    def test_what_was_written_is_read(self, tmp_path: Path) -> None:
        cache = FeatureCache(tmp_path)
        writer = FeatureWriter(cache, entries=3)
        media = [medium(bytes([i])) for i in range(5)]
        batch = torch.randn(5, 1, 4, 6)
        for i, each in enumerate(media[:4]):
            writer.add(entry_name(each, LIMITS, 8), batch[i], is_unusual=i == 1)
        writer.add_bad(entry_name(media[4], LIMITS, 8), BadSample("empty_file", "no bytes"))
        assert len(cache) == 3, "a file is full"
        assert all(entry_name(each, LIMITS, 8) in writer for each in media)
        writer.flush()

        for found in (cache, FeatureCache(tmp_path)):
            assert len(found) == 5
            for i in range(4):
                features = found.load(media[i], LIMITS, 8)
                assert torch.equal(features.features, batch[i]) and features.is_unusual == (i == 1)
            with pytest.raises(BadSample, match="empty_file: no bytes"):
                found.load(media[4], LIMITS, 8)
            with pytest.raises(FeatureError, match="no features of jpg .* data encode` again"):
                found.load(medium(b"other"), LIMITS, 8)

    def test_what_a_killed_run_left_is_no_entry(self, tmp_path: Path) -> None:
        (tmp_path / "ab.safetensors.partial").write_bytes(b"half")
        FeatureWriter(FeatureCache(tmp_path)).flush()
        assert list(tmp_path.iterdir()) == []

    @pytest.mark.parametrize("data", [b"", b"\xff" * 20, (2).to_bytes(8, "little") + b"{}"])
    def test_a_broken_file_is_named(self, tmp_path: Path, data: bytes) -> None:
        (tmp_path / "ab.safetensors").write_bytes(data)
        with pytest.raises(FeatureError, match=r"ab.safetensors: expected a file of features"):
            FeatureCache(tmp_path)

    def test_a_file_that_ends_early_is_named(self, tmp_path: Path) -> None:
        writer = FeatureWriter(FeatureCache(tmp_path))
        writer.add("a", torch.ones(1, 4, 6), is_unusual=False)
        writer.flush()
        (path,) = tmp_path.iterdir()
        path.write_bytes(path.read_bytes()[:-1])
        with pytest.raises(FeatureError, match="its end is missing"):
            FeatureCache(tmp_path)

    def test_a_full_disk_is_an_error_of_the_system(self, tmp_path: Path, monkeypatch) -> None:
        def save_file(tensors, path, metadata):
            Path(path).write_bytes(b"half")
            raise safetensors.SafetensorError("I/O error: No space left on device")

        monkeypatch.setattr("safetensors.torch.save_file", save_file)
        writer = FeatureWriter(FeatureCache(tmp_path))
        writer.add("a", torch.ones(1, 4, 6), is_unusual=False)
        with pytest.raises(OSError, match="can't write .*safetensors: .*No space left"):
            writer.flush()
        assert list(tmp_path.iterdir()) == []


class TestFolders:
    def test_one_is_of_weights_size_and_preprocessing(self) -> None:
        name = folder_name(VISION, fingerprint(encoder()))
        assert name.startswith("vit_mini-28px-")
        assert name == folder_name(VISION, fingerprint(encoder().to(torch.bfloat16)))
        larger = dataclasses.replace(VISION, image_size=56)
        others = [folder_name(VISION, fingerprint(encoder(1))), folder_name(larger, "0")]
        assert len({name, *others}) == 3
        with pytest.raises(ValueError, match="is on meta"):
            fingerprint(VisionEncoder(VISION, device="meta"))

    def test_it_is_found_by_its_encoder(self, tmp_path: Path) -> None:
        mine, other = fingerprint(encoder()), fingerprint(encoder(1))
        with pytest.raises(ConfigError, match="no folder .*x: make them by `flamingo-fast data"):
            find_folder(tmp_path / "x", VISION)
        with pytest.raises(ConfigError, match=r"expected a folder vit_mini-28px-\* .*, got none"):
            find_folder(tmp_path, VISION)
        folder = tmp_path / folder_name(VISION, mine)
        folder.mkdir()
        assert find_folder(tmp_path, VISION) == find_folder(folder, VISION) == folder
        assert find_folder(tmp_path, VISION, mine) == find_folder(folder, VISION, mine) == folder
        with pytest.raises(ConfigError, match="none of this vision encoder"):
            find_folder(tmp_path, VISION, other)
        (tmp_path / folder_name(VISION, other)).mkdir()
        with pytest.raises(ConfigError, match="name one of them"):
            find_folder(tmp_path, VISION)


def pages(folder: Path) -> DatasetConfig:
    """Every third sample is bad; images of the others differ."""
    records = []
    for i, (key, _, members) in enumerate(shard_cases.mixed_records("interleaved", 45)):
        good = shard_cases.encoded(shard_cases.picture(seed=i))
        records.append((key, {**members, "0.jpg": good} if i % 3 else members))
    path = shard_cases.write_tar(folder / "pages.tar", records)
    return stream_cases.dataset(
        path,
        name="pages",
        kind="interleaved",
        max_tokens=12,
        max_image_pixels=shard_cases.MAX_PIXELS,
        max_text_chars=shard_cases.MAX_CHARS,
    )


def batches(stream: Stream, count: int = 20) -> list:
    return [next(stream) for _ in range(count)]


def encode(config: DatasetConfig, out: Path, **options: Any) -> Encoded:
    return encode_features([config], VISION, encoder(), out, **options)


class TestEncoding:
    def test_training_on_features_sees_what_training_on_pixels_sees(self, tmp_path: Path) -> None:
        config = pages(tmp_path)
        seen: list[tuple[int, int]] = []
        done = encode(
            config,
            tmp_path / "features",
            batch_size=4,
            num_threads=2,
            progress=lambda *counts: seen.append(counts),
        )
        assert seen == [(1, 45)] * 45
        assert (done.samples, done.encoded) == (45, len(FeatureCache(done.folder)) - done.bad)
        assert done.bad == 4 and done.bad_samples > 5

        # With the encoder's own preprocessing.
        pixels = stream_cases.stream(config, image_transform=None)
        cached = stream_cases.stream(
            dataclasses.replace(config, features=str(tmp_path / "features")),
            num_workers=2,
            encoder_fingerprint=fingerprint(encoder()),
        )
        model = encoder()
        for batch, expected in zip(batches(cached), batches(pixels), strict=True):
            assert torch.equal(batch.input_ids, expected.input_ids)
            assert batch.num_media == expected.num_media and batch.pixels is None
            if expected.pixels is None:
                assert batch.features is None
                continue
            features = model(expected.pixels.flatten(0, 1))
            torch.testing.assert_close(torch.cat(batch.features), features, rtol=0, atol=1e-4)
        cached.close()
        assert cached.outcomes.counts == pixels.outcomes.counts
        assert cached.outcomes.counts["converted_image"] > 5

    def test_only_what_is_missing_is_encoded(self, tmp_path: Path) -> None:
        config = pages(tmp_path)
        done = encode(config, tmp_path / "features")
        again = encode(config, tmp_path / "features")
        assert (again.encoded, again.bad, again.present) == (0, 0, done.encoded + done.bad)
        assert again.bytes == done.bytes > 0

        path = next(done.folder.glob("*.safetensors"))
        path.rename(tmp_path / "kept")
        third = encode(config, tmp_path / "features")
        assert (third.encoded, third.bad) == (done.encoded, done.bad)

    def test_a_medium_without_features_names_its_sample(self, tmp_path: Path) -> None:
        config = pages(tmp_path)
        encode(config, tmp_path / "features")
        more = shard_cases.write_tar(tmp_path / "more.tar", [("new", shard_cases.page(b"other"))])
        config = dataclasses.replace(config, shards=(more,), features=str(tmp_path / "features"))
        message = r"pages: sample new of .*more.tar: FeatureError: .* `flamingo-fast data encode`"
        with pytest.raises(StreamError, match=message):
            next(stream_cases.stream(config))

    def test_an_encoder_that_is_trained_is_refused(self, tmp_path: Path) -> None:
        model = encoder()
        model.freeze(False)
        with pytest.raises(ConfigError, match="vision.is_frozen"):
            encode_features([pages(tmp_path)], VISION, model, tmp_path / "features")


def test_the_command(tmp_path: Path) -> None:
    config = tiny_config(vision=VISION)
    (tmp_path / "model.json").write_text(config.to_json())
    fields = {
        **dataclasses.asdict(pages(tmp_path)),
        "shards": [str(tmp_path / "pages.tar")],
    }
    run = {
        "model": str(tmp_path / "model.json"),
        "tokenizer": "none",
        "datasets": [fields],
        "steps": 1,
        "out": str(tmp_path / "run"),
        "precision": "fp32",
    }
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(json.loads(json.dumps(run))))
    arguments = ["data", "encode", str(path), "--out", str(tmp_path / "features")]
    for encoded in ("; 33 media encoded, 0 there before", "; 0 media encoded, 37 there before"):
        result = CliRunner().invoke(app, [*arguments, "--device", "cpu"])
        assert result.exit_code == 0, result.output
        assert "45 samples" in result.output and encoded in result.output, result.output
    (folder,) = (tmp_path / "features").iterdir()
    assert folder.name.startswith("vit_mini-28px-")

    for device in ("abacus", "meta"):
        result = CliRunner().invoke(app, [*arguments, "--device", device])
        assert result.exit_code == 2 and f"device: can't use {device}: " in result.output

    path.write_text(path.read_text().replace("kind: interleaved", "kind: none"))
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 2 and "kind" in result.output


@pytest.mark.parametrize("name", ["vit_mini", "nfnet_mini"])
def test_an_encoder_made_alone_has_the_models_weights(tmp_path: Path, name: str) -> None:
    values = run_cases.config(tmp_path, tmp_path)
    values["model"] = run_cases.MODEL | {"vision": {"encoder": name, "image_size": 32}}
    source = find_source(from_dict(TrainConfig, values, ""))
    expected = make_model(source, 3).vision_encoder
    alone = make_vision_encoder(source, 3)
    torch.testing.assert_close(alone.state_dict(), expected.state_dict(), rtol=0, atol=0)
    assert alone.is_frozen and alone.training == expected.training
    wrong = dataclasses.replace(source.config.vision, encoder="vit_micro")
    config = dataclasses.replace(source.config, vision=wrong)
    with pytest.raises(ConfigError, match=r"^model\.vision\.encoder: expected one of"):
        make_vision_encoder(dataclasses.replace(source, config=config), 3)


def test_a_run_on_features_has_the_losses_of_one_on_pixels(tmp_path: Path) -> None:
    run_cases.make_data(tmp_path)
    values = run_cases.config(tmp_path, tmp_path / "pixels", steps=4, log_every=1)
    for each in values["datasets"]:
        each["augment"] = False
    config = from_dict(TrainConfig, values, "")
    train(config)

    source = find_source(config)
    root = tmp_path / "features"
    for seed in (config.seed, config.seed + 1):
        model = make_model(source, seed).vision_encoder
        encode_features(config.datasets, source.config.vision, model, root / str(seed))

    def with_features(seed: int, out: str) -> TrainConfig:
        datasets = [
            dataclasses.replace(each, features=str(root / str(seed))) for each in config.datasets
        ]
        return dataclasses.replace(config, datasets=tuple(datasets), out=str(tmp_path / out))

    train(with_features(config.seed, "features-run"))
    lines = [run_cases.metrics(tmp_path / out) for out in ("features-run", "pixels")]
    losses = [[line["loss"] for line in each if "loss" in line] for each in lines]
    assert len(losses[0]) == len(losses[1]) == 4
    for got, expected in zip(*losses, strict=True):
        assert got == pytest.approx(expected, rel=1e-4)

    with pytest.raises(ConfigError, match="datasets.pages.features: .* none of this vision enc"):
        train(with_features(config.seed + 1, "other"))
