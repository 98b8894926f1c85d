"""Table 3's predictions: operations by PyTorch's counter, ratios as known, the command."""

import csv
import dataclasses
import functools
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

pytest.importorskip("timm")
pytest.importorskip("transformers")

from flamingo_fast import cli, use_impl  # noqa: E402
from flamingo_fast.bench import table3  # noqa: E402
from flamingo_fast.models import flamingo  # noqa: E402
from flamingo_fast.models.config import (  # noqa: E402
    ConditioningConfig,
    ConfigError,
    FlamingoConfig,
    LanguageModelConfig,
    ResamplerConfig,
    VisionConfig,
)
from flamingo_fast.models.work import (  # noqa: E402
    DATASETS,
    Batch,
    Flops,
    pass_flops,
    passes,
    step_flops,
    vision_work,
)

TINY = FlamingoConfig(
    vision=VisionConfig("vit_mini", 28),
    resampler=ResamplerConfig(dim=24, depth=2, heads=2, dim_head=16, num_latents=4, ff_mult=3),
    conditioning=ConditioningConfig(heads=3, dim_head=8, dim_media=40, num_layers=2, first=1),
    lm=LanguageModelConfig(vocab_size=50, dim=40, depth=4, heads=2, dim_head=12, ff_mult=2),
    eoc_token_id=50,
    learnt_token_ids=(50,),
)
ONE_MEDIUM = Batch(samples=1, tokens=6, media=1)
VIDEO = Batch(samples=1, tokens=6, media=1, frames=3)
SEVERAL = Batch(samples=2, tokens=7, media=3)

# Of the rows of table 3 over the baseline: operations alone, and with a cost of parameters.
EXPECTED = {
    "wo_video_text": (0.923, 0.866),
    "wo_image_text": (0.602, 0.569),
    "laion": (1.000, 1.000),
    "wo_m3w": (0.475, 0.565),
    "round_robin": (1.000, 1.000),
    "no_tanh_gating": (1.000, 1.000),
    "vanilla_xattn": (0.765, 0.654),
    "grafting": (0.993, 1.007),
    "single_in_middle": (0.640, 0.488),
    "every_4th": (0.719, 0.600),
    "every_2nd": (0.812, 0.733),
    "mlp": (1.101, 1.068),
    "transformer": (1.105, 1.071),
    "clip_vit_l14": (0.960, 0.973),
    "nfnet_f0": (0.775, 0.849),
    "lm_random_init": (1.124, 1.403),
    "lm_pretrained": (1.124, 1.403),
}


def of_tiny(**changes):
    """TINY with other fields of its parts, given as "part.field"."""
    config = TINY
    for path, value in changes.items():
        part, _, name = path.partition("__")
        if name:
            value = dataclasses.replace(getattr(config, part), **{name: value})
        config = dataclasses.replace(config, **{part: value})
    return config


def counted(config, batch):
    """What PyTorch counts in a forward and a backward of the model, in its plain operations."""
    torch.manual_seed(0)
    model = flamingo.Flamingo(config)
    size = config.vision.image_size
    ids = torch.randint(5, 50, (batch.samples, batch.tokens))
    ids[:, : batch.media] = config.image_token_id
    labels = ids.roll(-1, 1)
    images = torch.randn(batch.samples, batch.media, batch.frames, 3, size, size)
    with (
        use_impl("reference"),
        # Fused attention counts the scores that its backward computes again.
        sdpa_kernel(SDPBackend.MATH),
        FlopCounterMode(display=False) as counter,
    ):
        logits = model(ids, videos=images).logits
        F.cross_entropy(logits.flatten(0, 1), labels.flatten()).backward()
    return counter.get_total_flops()


@pytest.mark.parametrize(
    "changes, batch",
    [
        pytest.param({}, ONE_MEDIUM, id="perceiver"),
        pytest.param({}, VIDEO, id="video"),
        pytest.param({"resampler__kind": "mlp"}, SEVERAL, id="mlp"),
        pytest.param({"resampler__kind": "transformer"}, SEVERAL, id="transformer"),
        pytest.param(
            {"conditioning__dim_media": None, "resampler__kind": "mlp", "resampler__dim": 64},
            SEVERAL,
            id="no projection",
        ),
        pytest.param({"resampler__project_features": True}, ONE_MEDIUM, id="projection"),
        pytest.param({"conditioning__every": 2}, ONE_MEDIUM, id="every 2nd"),
        pytest.param({"conditioning__every": "single_in_middle"}, ONE_MEDIUM, id="single"),
        pytest.param({"conditioning__kind": "vanilla_xattn"}, ONE_MEDIUM, id="vanilla"),
        pytest.param({"conditioning__kind": "grafting"}, ONE_MEDIUM, id="grafting"),
        pytest.param({"conditioning__tanh_gating": False}, ONE_MEDIUM, id="no gates"),
        pytest.param({"lm__is_frozen": False}, ONE_MEDIUM, id="language model trained"),
        pytest.param(
            {"lm__is_frozen": False, "resampler__kind": "mlp"}, SEVERAL, id="trained, several"
        ),
    ],
)
@pytest.mark.parametrize("learns_tokens", [True, False])
def test_operations_are_those_pytorch_counts(changes, batch, learns_tokens):
    """Learnt tokens, or none, decide down to where a frozen language model has gradients."""
    config = of_tiny(**changes)
    if not learns_tokens:
        config = dataclasses.replace(config, learnt_token_ids=(), eoc_token_id=None)
    assert pass_flops(config, batch).total == counted(config, batch)


def test_a_latent_projected_once_for_all_media_is_counted_for_each():
    """The paper says nothing of such savings; of a model that makes them PyTorch counts less."""
    batch = dataclasses.replace(ONE_MEDIUM, media=3)
    sizes = TINY.resampler
    latents = sizes.num_latents * sizes.dim * 3 * sizes.heads * sizes.dim_head
    # Forward and gradients of weights and inputs, of two media.
    assert pass_flops(TINY, batch).total - counted(TINY, batch) == 2 * 6 * latents


def test_a_vision_encoder_that_is_trained_costs_three_forwards():
    frozen = vision_work(TINY.vision)
    trained = vision_work(dataclasses.replace(TINY.vision, is_frozen=False))
    assert trained == dataclasses.replace(frozen, flops=3 * frozen.flops)
    config = of_tiny(vision__is_frozen=False, resampler__kind="mlp")
    ours, measured = pass_flops(config, SEVERAL).total, counted(config, SEVERAL)
    # Nobody wants a gradient of the pixels.
    pixels = 2 * 4 * 3 * 14 * 14 * 64 * SEVERAL.samples * SEVERAL.media
    assert ours - measured == pixels


@pytest.mark.parametrize(
    "encoder, image_size, gmacs",
    [("nfnet_f6", 320, 116.5), ("nfnet_f0", 320, 19.3), ("clip_vit_l14", 224, 81.0)],
)
def test_vision_encoders_of_the_paper(encoder, image_size, gmacs):
    work = vision_work(VisionConfig(encoder, image_size))
    assert work.flops / 2e9 == pytest.approx(gmacs, rel=0.01)


def test_passes_of_a_step():
    """Images, tokens and operations (in PFLOP) that the paper's batches come to."""
    config = FlamingoConfig.preset("flamingo-3b")
    web, *pairs, video = passes(config)
    assert DATASETS["laion"] == tuple(pairs)
    totals = []
    for batches in ([web], pairs, [video]):
        flops = sum((pass_flops(config, batch) for batch in batches), Flops())
        images = sum(each.samples * each.media * each.frames for each in batches)
        tokens = sum(each.samples * each.tokens for each in batches)
        text = (flops.lm + flops.conditioning) / 1e15
        totals.append((images, tokens, flops.vision / 1e15, text, flops.resampler / 1e15))
    assert totals == [
        (1280, 65536, *map(rounded, (0.298, 0.856, 0.126))),
        (1024, 49152, *map(rounded, (0.239, 0.631, 0.101))),
        (512, 4096, *map(rounded, (0.119, 0.051, 0.018))),
    ]


def rounded(value):
    return pytest.approx(value, abs=0.002)


def test_other_language_models_are_refused_by_name():
    config = of_tiny(lm__kind="huggingface")
    with pytest.raises(ConfigError, match=r"lm\.kind: expected chinchilla.*huggingface"):
        step_flops(config)


@pytest.fixture(scope="module")
def predictions():
    with pytest.MonkeyPatch.context() as patch:
        # Most rows have the same, which is most of the work of building their models.
        patch.setattr(flamingo, "VisionEncoder", functools.cache(flamingo.VisionEncoder))
        return table3.predict()


def test_every_row_is_predicted(predictions):
    rows = [each.row for each in predictions]
    assert rows[0] == "baseline"
    assert set(rows) == {*EXPECTED, "baseline"} | {
        *("resampler_small", "resampler_large", "all_previous_images", "m3w_only"),
        "vision_unfrozen",
    }
    for each in predictions:
        assert each.parameters / 1e9 == pytest.approx(float(each.paper_parameters), abs=0.06)


def test_ratios(predictions):
    found = table3.ratios(predictions)
    for row, (flops, flops_and_parameters) in EXPECTED.items():
        assert found[row].flops == pytest.approx(flops, abs=0.005), row
        assert found[row].flops_and_parameters == pytest.approx(flops_and_parameters, abs=0.005)
    assert found["every_4th"].paper == pytest.approx(1.02 / 1.74)


def fitted(predictions):
    return table3.Fit.to_paper(table3.of_table3(predictions))


def test_seconds(predictions):
    """The coefficients predict rows that they were not fitted to, chips and all."""
    seconds = {each.row: fitted(predictions).seconds(each) for each in predictions}
    assert seconds["baseline"] == pytest.approx(1.71, abs=0.01)
    assert seconds["vision_unfrozen"] == pytest.approx(4.71, abs=0.02)
    assert seconds["m3w_only"] == pytest.approx(0.75, abs=0.01)


def test_coefficients_are_a_least_squares_fit(predictions):
    rows = [each for each in predictions if each.group != "extra"]
    assert len(rows) == 18
    costs = [(each.flops / 1e15, each.trainable / 1e9 * each.passes) for each in rows]
    times = torch.tensor([each.paper_seconds for each in rows], dtype=torch.float64)
    relative = torch.tensor(costs, dtype=torch.float64) / times[:, None]
    expected = torch.linalg.lstsq(relative, torch.ones_like(times)[:, None]).solution[:, 0]
    assert dataclasses.astuple(fitted(predictions)) == pytest.approx(expected.tolist(), rel=1e-9)


def test_a_fit_finds_the_coefficients_that_made_the_times(predictions):
    made = table3.Fit(0.3, 0.2)
    rows = [
        dataclasses.replace(each, paper_seconds=made.seconds(each))
        for each in table3.of_table3(predictions)
    ]
    assert dataclasses.astuple(table3.Fit.to_paper(rows)) == pytest.approx((0.3, 0.2))
    assert table3.leave_one_out(rows) == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize("names", [[], ["baseline"], ["baseline", "no_tanh_gating"]])
def test_rows_that_no_fit_can_tell_apart_are_refused(predictions, names):
    rows = [each for each in predictions if each.row in names]
    if names:
        rows = [dataclasses.replace(each, trainable=rows[0].trainable) for each in rows]
    with pytest.raises(ValueError, match="rows: expected at least two"):
        table3.Fit.to_paper(rows)


def test_predictions_agree_with_the_paper(predictions):
    of = table3.agreements(predictions)
    assert of["flops"].rows == of["flops + params"].rows == 15
    assert of["flops + params"].spearman >= 0.98 and of["flops + params"].error <= 0.025
    assert of["flops"].spearman >= 0.95
    assert of["flops + params"].error < table3.leave_one_out(predictions) < 0.03


def test_a_wider_model_is_predicted_to_take_longer():
    """Predictions are counted from the config: twice as many heads, twice their products."""
    config = FlamingoConfig.preset("flamingo-3b")
    heads = config.conditioning.heads
    wider = dataclasses.replace(
        config, conditioning=dataclasses.replace(config.conditioning, heads=2 * heads)
    )
    inner = heads * config.conditioning.dim_head
    added = 0
    for batch in passes(config):
        rows, media = batch.samples * batch.tokens, batch.samples * batch.media * 64
        products = 2 * rows * config.lm.dim * inner + 2 * media * 2048 * inner
        scores = 2 * batch.samples * batch.tokens * batch.media * 64 * inner
        added += 24 * 6 * (products + scores)
    assert step_flops(wider).total - step_flops(config).total == added


def test_ratios_without_the_baseline_are_refused(predictions):
    with pytest.raises(ValueError, match="baseline"):
        table3.ratios(predictions[1:])


def test_command(
    predictions,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(table3, "predict", lambda: predictions)
    file = tmp_path / "table3.csv"
    monkeypatch.setattr(sys, "argv", ["flamingo-fast", "table3", "--csv", str(file)])
    with pytest.raises(SystemExit) as exit:
        cli.main()
    assert not exit.value.code
    out = capsys.readouterr().out
    line = next(line for line in out.splitlines() if "vanilla_xattn" in line)
    cells = [cell.strip() for cell in line.strip("│").split("│")]
    assert cells[0] == "iv xattn architecture"
    assert cells[3:] == ["2.407", "2.4", "1.863", "0.667", "0.764", "0.654"]
    assert "Predicted, not measured" in out

    with file.open(newline="") as lines:
        rows = {row["row"]: row for row in csv.DictReader(lines)}
    assert list(rows) == [each.row for each in predictions]
    baseline = next(each for each in predictions if each.row == "baseline")
    assert int(rows["baseline"]["flops"]) == baseline.flops
    assert float(rows["baseline"]["flops_ratio"]) == 1
    assert float(rows["vanilla_xattn"]["flops_and_parameters_ratio"]) == pytest.approx(
        0.654, abs=0.005
    )


def test_a_csv_that_cannot_be_written_is_refused_before_counting(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(table3, "predict", lambda: pytest.fail("counted"))
    file = tmp_path / "absent" / "x.csv"
    monkeypatch.setattr(sys, "argv", ["flamingo-fast", "table3", "--csv", str(file)])
    with pytest.raises(SystemExit) as exit:
        cli.main()
    assert exit.value.code == 2
    assert "csv" in capsys.readouterr().err
