"""FlamingoConfig: what it refuses and by which name, its JSON, the presets and table 3's rows."""

import csv
import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import pytest

from flamingo_fast.models.config import (
    ConditioningConfig,
    ConfigError,
    FlamingoConfig,
    LanguageModelConfig,
    ResamplerConfig,
    VisionConfig,
)
from flamingo_fast.models.presets import PRESETS, table3_configs

PARTS = {
    "vision": VisionConfig,
    "resampler": ResamplerConfig,
    "conditioning": ConditioningConfig,
    "lm": LanguageModelConfig,
}
TABLE3 = table3_configs()
CSV = Path(__file__).parents[1] / "bench" / "data" / "table3.csv"

FIELDS = [
    *(f"{part}.{field.name}" for part, cls in PARTS.items() for field in dataclasses.fields(cls)),
    *(field.name for field in dataclasses.fields(FlamingoConfig)),
]

# Path, a value of the right type, a part of what is said about it.
WRONG_VALUES = [
    ("vision.image_size", 0, "at least 1, got 0"),
    ("resampler.kind", "pool", "one of perceiver, mlp, transformer; got 'pool'"),
    ("resampler.dim", 0, "at least 1"),
    ("resampler.depth", -1, "at least 0"),
    ("resampler.heads", 0, "at least 1"),
    ("resampler.dim_head", 0, "at least 1"),
    ("resampler.num_latents", 0, "at least 1"),
    ("resampler.max_num_frames", 0, "at least 1"),
    ("resampler.max_num_media", 0, "at least 1"),
    ("resampler.ff_mult", 0.0, "above 0"),
    ("resampler.ff_mult", 0.0001, "a hidden width of at least 1, got 0.0001 x 1536"),
    ("resampler.activation", "silu", "gelu, squared_relu"),
    ("resampler.norm", "batch", "layer, rms"),
    ("conditioning.kind", "adapter", "gated_xattn_dense, vanilla_xattn, grafting"),
    ("conditioning.every", 0, "at least 1"),
    ("conditioning.every", "second", "single_in_middle"),
    ("conditioning.first", -1, "at least 0"),
    ("conditioning.first", 24, "24 layers, got 24"),
    ("conditioning.num_layers", 0, "at least 1"),
    ("conditioning.heads", 0, "at least 1"),
    ("conditioning.dim_head", 0, "at least 1"),
    ("conditioning.ff_mult", -1.0, "above 0"),
    ("conditioning.ff_mult", math.inf, "finite"),
    ("conditioning.activation", "silu", "gelu, squared_relu"),
    ("conditioning.norm", "batch", "layer, rms"),
    ("conditioning.attend", "last", "previous, next, all_previous"),
    ("conditioning.unattended", "nan", "zero, dense, uniform, zero_block"),
    ("conditioning.past_last", "dense", "zero, uniform"),
    ("conditioning.dim_media", 0, "at least 1"),
    ("conditioning.dim_media", 1535, "at least resampler.dim = 1536, got 1535"),
    ("lm.kind", "rnn", "chinchilla, huggingface"),
    ("lm.vocab_size", 0, "at least 1"),
    ("lm.dim", 0, "at least 1"),
    ("lm.depth", 0, "at least 1"),
    ("lm.heads", 0, "at least 1"),
    ("lm.dim_head", 0, "at least 1"),
    ("lm.ff_mult", math.nan, "finite"),
    ("lm.ff_mult", 0.0001, "a hidden width of at least 1, got 0.0001 x 2048"),
    ("image_token_id", -1, "at least 0"),
    ("eoc_token_id", -1, "at least 0"),
    ("eoc_token_id", 3, "another token than image_token_id, got 3"),
    ("learnt_token_ids", [4, 4], "different ids"),
    ("learnt_token_ids", [-4], "at least 0"),
    ("datasets", ["m3w", "coco"], "m3w, align, ltip, vtp, laion; got 'coco'"),
    ("datasets", ["m3w", "m3w"], "different ones"),
    ("optimisation", "alternate", "accumulation, round_robin"),
    ("p_next", -0.1, "a probability"),
    ("p_next", 1.1, "a probability"),
    ("p_next", math.nan, "a probability"),
]


def _nested(path: str, value: Any) -> dict[str, Any]:
    part, _, name = path.rpartition(".")
    return {part: {name: value}} if part else {name: value}


def _flat(config: FlamingoConfig) -> dict[str, Any]:
    values = dataclasses.asdict(config)
    flat = {f"{part}.{name}": each for part in PARTS for name, each in values.pop(part).items()}
    return flat | values


def _change_of(row: str) -> dict[str, Any]:
    baseline = _flat(FlamingoConfig.preset("flamingo-3b"))
    return {path: value for path, value in _flat(TABLE3[row]).items() if value != baseline[path]}


@pytest.mark.parametrize("name", [*PRESETS, *TABLE3])
def test_json_gives_the_same_config_back(name: str, tmp_path: Path) -> None:
    config = (PRESETS | TABLE3)[name]
    text = config.to_json()
    assert FlamingoConfig.from_json(text) == config
    assert FlamingoConfig.from_json(text).to_json() == text
    (tmp_path / "config.json").write_text(text)
    assert FlamingoConfig.from_file(tmp_path / "config.json") == config


def test_json_keeps_what_is_not_a_default() -> None:
    config = FlamingoConfig(
        vision=VisionConfig(encoder="vit_mini", is_pretrained=True),
        resampler=ResamplerConfig(max_num_frames=None, max_num_media=5, project_features=True),
        conditioning=ConditioningConfig(
            every=3, first=2, unattended="zero_block", past_last="zero", media_norm=False
        ),
        lm=LanguageModelConfig(
            kind="huggingface", hf_config={"model_type": "gpt2", "n_layer": 2, "x": [1, None]}
        ),
        eoc_token_id=None,
        learnt_token_ids=(50_257, 50_258),
        datasets=("laion",),
        p_next=0.0,
    )
    again = FlamingoConfig.from_json(config.to_json())
    assert again == config
    assert isinstance(again.learnt_token_ids, tuple)
    assert again != FlamingoConfig()


def test_fields_that_json_lacks_have_their_defaults() -> None:
    assert FlamingoConfig.from_json("{}") == FlamingoConfig()
    assert FlamingoConfig.from_json('{"lm": {"depth": 8}}') == FlamingoConfig(
        lm=LanguageModelConfig(depth=8)
    )


@pytest.mark.parametrize("config", [FlamingoConfig(), *(cls() for cls in PARTS.values())])
def test_nothing_can_be_assigned(config: Any) -> None:
    for field in dataclasses.fields(config):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(config, field.name, getattr(config, field.name))


@pytest.mark.parametrize("path", FIELDS)
def test_a_wrong_type_is_refused_by_name(path: str) -> None:
    wrong = object()
    part, _, name = path.rpartition(".")
    with pytest.raises(ConfigError) as error:
        PARTS.get(part, FlamingoConfig)(**{name: wrong})
    assert str(error.value).startswith(f"{path}: expected ")
    assert repr(wrong) in str(error.value)


@pytest.mark.parametrize(
    "path, value",
    [
        ("vision.image_size", True),
        ("vision.image_size", 320.0),
        ("vision.is_frozen", 1),
        ("resampler.ff_mult", True),
        ("resampler.ff_mult", "4"),
        ("resampler.dim", None),
        ("conditioning.every", 1.5),
        ("lm.hf_config", []),
        ("learnt_token_ids", [4, "5"]),
        ("datasets", "m3w"),
        ("p_next", None),
    ],
)
def test_nearly_the_right_type_is_refused_by_name(path: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=f"^{path}: expected "):
        FlamingoConfig.from_json(json.dumps(_nested(path, value)))


def test_a_block_left_alone_has_no_uniform_attention() -> None:
    with pytest.raises(
        ConfigError, match="conditioning.past_last: expected .* zero; got 'uniform'"
    ):
        ConditioningConfig(unattended="zero_block", past_last="uniform")


@pytest.mark.parametrize(
    "path, value, said", WRONG_VALUES, ids=[f"{path}={value}" for path, value, _ in WRONG_VALUES]
)
def test_a_wrong_value_is_refused_by_name(path: str, value: Any, said: str) -> None:
    with pytest.raises(ConfigError) as error:
        FlamingoConfig.from_json(json.dumps(_nested(path, value)))
    assert str(error.value).startswith(f"{path}: expected ")
    assert said in str(error.value)


@pytest.mark.parametrize(
    "text, said",
    [
        ('{"depth": 3}', "depth: there is no such field; expected one of vision, resampler, "),
        ('{"lm": {"width": 3}}', "lm.width: there is no such field; expected one of kind, "),
        ('{"lm": 3}', "lm: expected an object, got 3"),
        ("[]", "config: expected an object, got []"),
        ("", "config: expected JSON ("),
        ('{"lm": {"depth": 3}', "config: expected JSON ("),
    ],
)
def test_json_that_is_no_config_is_refused(text: str, said: str) -> None:
    with pytest.raises(ConfigError) as error:
        FlamingoConfig.from_json(text)
    assert str(error.value).startswith(said)


@pytest.mark.parametrize(
    "config, depth, layers",
    [
        (ConditioningConfig(), 3, (0, 1, 2)),
        (ConditioningConfig(every=4), 9, (0, 4, 8)),
        (ConditioningConfig(every=4, first=3), 9, (3, 7)),
        (ConditioningConfig(kind="vanilla_xattn", every=2), 4, (0, 2)),
        (ConditioningConfig(every="single_in_middle"), 24, (12,)),
        (ConditioningConfig(every="single_in_middle"), 1, (0,)),
        (ConditioningConfig(kind="grafting"), 24, ()),
    ],
)
def test_layers_with_a_block(
    config: ConditioningConfig, depth: int, layers: tuple[int, ...]
) -> None:
    assert config.layers(depth) == layers


def test_no_layer_with_a_block_is_refused() -> None:
    with pytest.raises(ConfigError, match="^conditioning.first: expected one of .* 3 layers"):
        ConditioningConfig(first=3).layers(3)


def test_an_unknown_preset_is_refused_with_those_there_are() -> None:
    with pytest.raises(ConfigError) as error:
        FlamingoConfig.preset("flamingo-4b")
    assert str(error.value) == (
        "preset: expected one of flamingo-3b, flamingo-9b, flamingo-80b, flamingo-mini; "
        "got 'flamingo-4b'"
    )


@pytest.mark.parametrize(
    "name, dim, depth, heads, blocks",
    [
        ("flamingo-3b", 2048, 24, 16, 24),
        ("flamingo-9b", 4096, 32, 32, 8),
        ("flamingo-80b", 8192, 80, 64, 12),
    ],
)
def test_presets_have_the_papers_sizes(
    name: str, dim: int, depth: int, heads: int, blocks: int
) -> None:
    config = FlamingoConfig.preset(name)
    lm, conditioning, resampler = config.lm, config.conditioning, config.resampler
    assert (lm.dim, lm.depth, lm.heads, lm.dim_head, lm.ff_mult) == (dim, depth, heads, 128, 4)
    assert (lm.vocab_size, lm.is_frozen, lm.is_pretrained) == (32_000, True, True)
    layers = conditioning.layers(depth)
    assert (len(layers), layers[0]) == (blocks, 0)
    assert (conditioning.heads, conditioning.dim_head, conditioning.ff_mult) == (heads, 128, 4)
    assert conditioning.activation == resampler.activation == "squared_relu"
    assert (resampler.dim, resampler.depth, resampler.heads) == (1536, 6, 16)
    assert (resampler.dim_head, resampler.num_latents, resampler.max_num_frames) == (128, 64, 8)
    assert (config.vision.encoder, config.vision.image_size) == ("nfnet_f6", 320)
    assert config.p_next == 0.5
    assert config.learnt_token_ids == (config.eoc_token_id,)


def test_table3_has_a_config_for_each_row_of_the_data() -> None:
    with CSV.open(newline="") as lines:
        rows = [row["row"] for row in csv.DictReader(lines)]
    assert list(TABLE3) == rows
    assert len(rows) == 23


@pytest.mark.parametrize(
    "row, change",
    [
        ("baseline", {}),
        ("wo_video_text", {"datasets": ("m3w", "align", "ltip")}),
        ("wo_image_text", {"datasets": ("m3w", "vtp")}),
        ("laion", {"datasets": ("m3w", "laion", "vtp")}),
        ("wo_m3w", {"datasets": ("align", "ltip", "vtp")}),
        ("round_robin", {"optimisation": "round_robin"}),
        ("no_tanh_gating", {"conditioning.tanh_gating": False}),
        ("vanilla_xattn", {"conditioning.kind": "vanilla_xattn"}),
        ("grafting", {"conditioning.kind": "grafting"}),
        ("single_in_middle", {"conditioning.every": "single_in_middle"}),
        ("every_4th", {"conditioning.every": 4}),
        ("every_2nd", {"conditioning.every": 2}),
        ("clip_vit_l14", {"vision.encoder": "clip_vit_l14", "vision.image_size": 224}),
        ("nfnet_f0", {"vision.encoder": "nfnet_f0"}),
        ("lm_random_init", {"lm.is_frozen": False, "lm.is_pretrained": False}),
        ("lm_pretrained", {"lm.is_frozen": False}),
        ("all_previous_images", {"conditioning.attend": "all_previous"}),
        ("m3w_only", {"datasets": ("m3w",)}),
        ("vision_unfrozen", {"vision.is_frozen": False}),
    ],
)
def test_a_row_changes_what_the_paper_says_and_nothing_else(
    row: str, change: dict[str, Any]
) -> None:
    assert _change_of(row) == change


@pytest.mark.parametrize(
    "row, kind",
    [
        ("mlp", "mlp"),
        ("transformer", "transformer"),
        ("resampler_small", "perceiver"),
        ("resampler_large", "perceiver"),
    ],
)
def test_rows_of_the_resampler_change_its_kind_and_size_alone(row: str, kind: str) -> None:
    change = _change_of(row)
    assert change
    assert set(change) <= {"resampler.kind", "resampler.depth", "resampler.ff_mult"}
    assert TABLE3[row].resampler.kind == kind
