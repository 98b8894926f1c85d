"""Vision encoders: counts, shapes, freezing, and checkpoints of other image sizes."""

import copy
import dataclasses

import pytest
import torch
from torch import nn

timm = pytest.importorskip("timm")

from flamingo_fast.models.config import ConfigError, VisionConfig  # noqa: E402
from flamingo_fast.models.vision import VisionEncoder, data_config  # noqa: E402

MINIS = ["nfnet_mini", "vit_mini"]
every_mini = pytest.mark.parametrize("name", MINIS)


def encoder_of(name, image_size=56, seed=0, device=None, dtype=None, **options):
    torch.manual_seed(seed)
    config = VisionConfig(encoder=name, image_size=image_size, **options)
    encoder = VisionEncoder(config, device=device, dtype=dtype)
    # At its start a block of an NFNet adds nothing, and positions nearly nothing.
    for key, parameter in encoder.named_parameters():
        if parameter.device.type != "meta" and key.endswith(("skipinit_gain", "pos_embed")):
            nn.init.normal_(parameter)
    return encoder


def images_of(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(
    "name, image_size, count, tokens, features",
    [
        ("nfnet_f6", 320, 435_286_116, 100, 3072),
        ("nfnet_f0", 320, 68_416_284, 100, 3072),
        ("clip_vit_l14", 224, 303_179_776, 257, 1024),
        ("clip_vit_l14", 320, 303_413_248, 1 + 23 * 23, 1024),
        ("resnet18", 96, 11_176_512, 9, 512),
        ("swin_tiny_patch4_window7_224.ms_in1k", 224, 27_519_354, 49, 768),
        ("vit_base_patch16_siglip_224", 224, 85_797_120, 196, 768),
    ],
)
def test_counts_and_shapes(name, image_size, count, tokens, features):
    """The paper's encoders have the parameters that its counts suggest; others are timm's own."""
    encoder = encoder_of(name, image_size, device="meta")
    assert {each.device.type for each in encoder.parameters()} == {"meta"}
    assert sum(each.numel() for each in encoder.parameters()) == count
    assert encoder.features == features
    images = torch.empty(2, 3, image_size, image_size, device="meta")
    assert encoder(images).shape == (2, tokens, features)


@every_mini
@pytest.mark.parametrize("height, width", [(56, 56), (64, 96), (100, 30)])
def test_any_resolution(name, height, width):
    step, extra = (32, 0) if name == "nfnet_mini" else (14, 1)
    features = encoder_of(name)(images_of(2, 3, height, width))
    assert features.shape[1] == -(-height // step) * -(-width // step) + extra
    assert features.isfinite().all()
    assert not torch.allclose(features[0], features[1], atol=1e-3)


def test_features_of_an_nfnet_are_in_row_major_order():
    """Pixels of one corner reach the features there, and not those at the other end."""
    encoder = encoder_of("nfnet_mini").double()
    for gain in (each for key, each in encoder.named_parameters() if "skipinit" in key):
        nn.init.zeros_(gain)
    images = images_of(1, 3, 64, 256).double()
    changed = images.clone()
    changed[:, :, 40:, :8] += 1
    differs = (encoder(images) != encoder(changed)).any(-1).view(2, 8)
    assert differs[1, 0] and not differs[:, 4:].any()
    theirs = encoder.model.forward_features(images)
    torch.testing.assert_close(encoder(images)[0, 9], theirs[0, :, 1, 1])


def test_tokens_of_a_transformer_are_timms():
    encoder = encoder_of("vit_mini")
    images = images_of(2, 3, 56, 56)
    assert torch.equal(encoder(images), encoder.model.forward_features(images))


@every_mini
def test_no_images(name):
    encoder = encoder_of(name, is_frozen=False)
    assert encoder(images_of(0, 3, 56, 56)).shape[::2] == (0, encoder.features)


@every_mini
def test_frozen_it_has_no_graph_and_stays_in_eval_mode(name):
    encoder = nn.Sequential(encoder_of(name)).train()[0]
    assert not any(module.training for module in encoder.model.modules())
    assert not any(each.requires_grad for each in encoder.parameters())
    features = encoder(images_of(1, 3, 56, 56).requires_grad_())
    assert not features.requires_grad


@every_mini
def test_unfrozen_gradients_reach_every_weight(name):
    """And are the same where activations are recomputed."""
    encoder = encoder_of(name, is_frozen=False).double().train()
    assert encoder.model.training
    images = images_of(2, 3, 56, 56).double()

    def gradients():
        features = encoder(images)
        weights = torch.linspace(-1, 1, features.numel(), dtype=features.dtype)
        (features.flatten() * weights).sum().backward()
        found = {key: each.grad for key, each in encoder.named_parameters()}
        encoder.zero_grad()
        return found

    plain = gradients()
    assert [key for key, each in plain.items() if each is None or not each.any()] == []
    encoder.set_grad_checkpointing()
    for key, each in gradients().items():
        torch.testing.assert_close(each, plain[key])


def test_freezing_and_unfreezing():
    encoder = encoder_of("vit_mini").train()
    encoder.freeze(False)
    assert encoder.model.training and encoder(images_of(1, 3, 56, 56)).requires_grad
    encoder.freeze()
    assert not encoder.model.training and not encoder(images_of(1, 3, 56, 56)).requires_grad


def plane(side):
    """(side, side, 64), of what grows with the row, and thrice as fast with the column."""
    at = (torch.arange(side) + 0.5) / side
    return (at[:, None] + 3 * at)[..., None] * torch.linspace(-1, 1, 64)


@pytest.mark.parametrize("prefix", ["", "vision_encoder."])
def test_an_unfrozen_encoder_of_larger_images_loads_the_same_checkpoint(prefix):
    """Position embeddings that lie on a plane are the same plane at a higher resolution."""
    small = encoder_of("vit_mini", 112)
    with torch.no_grad():
        small.model.pos_embed[0, 1:] = plane(8).flatten(0, 1)
    saved = {prefix + key: each for key, each in small.state_dict().items()}

    large = encoder_of("vit_mini", 224, seed=1, is_frozen=False)
    owner = nn.ModuleDict({prefix[:-1]: large}) if prefix else large
    owner.load_state_dict(saved)

    assert saved[prefix + "model.pos_embed"].shape == (1, 65, 64)
    found = large.model.pos_embed
    assert found.requires_grad and found.shape == (1, 257, 64)
    assert torch.equal(found[:, 0], small.model.pos_embed[:, 0])
    # Near its ends the interpolation has no neighbours.
    inner = slice(5, 11)
    torch.testing.assert_close(
        found[0, 1:].view(16, 16, 64)[inner, inner], plane(16)[inner, inner], rtol=0, atol=1e-5
    )
    for key, each in small.model.named_parameters():
        if key != "pos_embed":
            assert torch.equal(large.model.get_parameter(key), each)

    images = images_of(1, 3, 224, 224)
    torch.testing.assert_close(large(images), small(images))


def test_an_nfnet_of_larger_images_loads_the_same_checkpoint():
    small, large = encoder_of("nfnet_mini", 64), encoder_of("nfnet_mini", 128, seed=1)
    large.load_state_dict(small.state_dict())
    images = images_of(1, 3, 128, 128)
    assert torch.equal(large(images), small(images))


def test_position_embeddings_of_another_model_are_refused():
    encoder = encoder_of("vit_mini")
    saved = encoder.state_dict()
    saved["model.pos_embed"] = torch.zeros(1, 15, 64)
    with pytest.raises(RuntimeError, match="size mismatch for model.pos_embed"):
        encoder.load_state_dict(saved)


def test_position_embeddings_of_a_module_of_ones_own():
    module = nn.Module()
    module.pos_embed = nn.Parameter(torch.zeros(1, 4, 5))
    saved = {"model.pos_embed": torch.zeros(1, 9, 5)}
    with pytest.raises(RuntimeError, match="size mismatch for model.pos_embed"):
        VisionEncoder.from_module(module, 5).load_state_dict(saved)


def test_copies():
    encoder = encoder_of("vit_mini")
    copied = copy.deepcopy(encoder)
    copied.load_state_dict(encoder_of("vit_mini", 112, seed=1).state_dict())
    images = images_of(1, 3, 56, 56)
    assert not torch.equal(copied(images), encoder(images))


@every_mini
def test_dtype(name):
    wide, narrow = encoder_of(name), encoder_of(name, dtype=torch.bfloat16)
    assert {each.dtype for each in narrow.parameters()} == {torch.bfloat16}
    images = images_of(2, 3, 56, 56)
    features = narrow(images)
    assert features.dtype == torch.bfloat16
    assert torch.equal(features, narrow(images.bfloat16()))
    narrow.load_state_dict(wide.state_dict())
    error = (narrow(images) - wide(images)).norm() / wide(images).norm()
    assert error < 0.05


def test_device_of_a_context():
    with torch.device("meta"):
        encoder = encoder_of("vit_mini")
    assert encoder.model.pos_embed.is_meta


@pytest.mark.parametrize("device, loads", [(None, True), ("meta", False)])
def test_weights_are_loaded_if_asked_for(monkeypatch, device, loads):
    create, asked = timm.create_model, []

    def without_network(name, pretrained, **options):
        asked.append((name, pretrained))
        return create(name, **options)

    monkeypatch.setattr(timm, "create_model", without_network)
    for is_pretrained in [True, False]:
        encoder_of("resnet18.tv_in1k", device=device, is_pretrained=is_pretrained)
    assert asked == [("resnet18.tv_in1k", loads), ("resnet18.tv_in1k", False)]


class Tokens(nn.Module):
    """Patches of 8x8 pixels, and their mean, as OpenCLIP's `visual` returns them."""

    def __init__(self, outputs="tokens"):
        super().__init__()
        self.conv = nn.Conv2d(3, 5, 8, 8)
        self.dropout = nn.Dropout()
        self.outputs = outputs

    def forward(self, images):
        tokens = self.dropout(self.conv(images)).flatten(2).mT
        pooled = tokens.mean(1)
        return {"tokens": tokens, "pooled": pooled, "both": (pooled, tokens)}[self.outputs]


@pytest.mark.parametrize("outputs", ["tokens", "both"])
def test_a_module_of_ones_own(outputs):
    module = Tokens(outputs)
    encoder = VisionEncoder.from_module(module, 5).train()
    images = images_of(2, 3, 16, 24)
    assert torch.equal(encoder(images), module.conv(images).flatten(2).mT)
    assert not encoder(images).requires_grad and not module.conv.weight.requires_grad
    unfrozen = VisionEncoder.from_module(copy.deepcopy(module), 5, is_frozen=False).train()
    assert unfrozen(images).requires_grad and unfrozen.model.dropout.training
    loaded = VisionEncoder.from_module(Tokens(outputs), 5)
    loaded.load_state_dict(encoder.state_dict())
    assert torch.equal(loaded(images), encoder(images))


@pytest.mark.parametrize("outputs, features", [("pooled", 5), ("tokens", 6)])
def test_a_module_that_makes_no_such_tokens(outputs, features):
    encoder = VisionEncoder.from_module(Tokens(outputs), features)
    with pytest.raises(ValueError, match=rf"Tokens: expected .*\(n, S, {features}\), got \(2, "):
        encoder(images_of(2, 3, 16, 24))


def test_a_module_without_checkpointing():
    encoder = VisionEncoder.from_module(Tokens(), 5)
    with pytest.raises(ValueError, match="set_grad_checkpointing, got Tokens"):
        encoder.set_grad_checkpointing()


@pytest.mark.parametrize(
    "images, message",
    [
        (torch.zeros(3, 56, 56), r"images: expected shape \(n, 3, H, W\), got \(3, 56, 56\)"),
        (torch.zeros(2, 1, 56, 56), r"images: .* got \(2, 1, 56, 56\)"),
        (torch.zeros(2, 3, 56, 56, dtype=torch.uint8), "images: .* got torch.uint8"),
    ],
    ids=["shape", "channels", "dtype"],
)
def test_wrong_images(images, message):
    with pytest.raises(ValueError, match=message):
        encoder_of("vit_mini")(images)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"encoder": "nfnet_f8"}, r"vision.encoder: .*; got 'nfnet_f8'. Close to it: .*nfnet_f6"),
        ({"encoder": "resnet18.nowhere"}, "vision.encoder: .*tv_in1k.*'resnet18.nowhere'"),
        ({"encoder": "vit_mini", "is_pretrained": True}, "vision.is_pretrained: .* vit_mini"),
        ({"encoder": "vit_mini", "image_size": 7}, "vision.image_size: .* 14, .* vit_mini, got 7"),
    ],
    ids=["name", "weights", "mini", "small"],
)
def test_wrong_configs(options, message):
    with pytest.raises(ConfigError, match=message):
        VisionEncoder(VisionConfig(**options), device="meta")


@pytest.mark.parametrize(
    "name, mean, crop_mode",
    [
        ("nfnet_f6", 0.485, "squash"),
        ("nfnet_mini", 0.485, "squash"),
        ("clip_vit_l14", 0.48145466, "center"),
        ("vit_mini", 0.48145466, "center"),
    ],
)
def test_preprocessing(name, mean, crop_mode):
    config = VisionConfig(encoder=name, image_size=56)
    found = data_config(config)
    assert found["input_size"] == (3, 56, 56)
    assert found["mean"][0] == mean and found["crop_mode"] == "border"
    as_in_timm = data_config(dataclasses.replace(config, pad_images=False))
    assert as_in_timm == found | {key: as_in_timm[key] for key in ("crop_mode", "crop_pct")}
    assert as_in_timm["crop_mode"] == crop_mode
    with pytest.raises(ConfigError, match="vision.encoder"):
        data_config(dataclasses.replace(config, encoder="nowhere"))
