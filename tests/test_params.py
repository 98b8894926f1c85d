"""Parameter counts: the paper's, part by part; the command; and what the meta device costs."""

import csv
import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console
from torch import nn
from typer.testing import CliRunner

from flamingo_fast import cli
from flamingo_fast.models import params
from flamingo_fast.models.config import ConditioningConfig, FlamingoConfig
from flamingo_fast.models.params import (
    COMPONENTS,
    ParameterCounts,
    ParameterRow,
    count_of,
    count_parameters,
    footnotes,
    prints_as,
)

# Millions, of flamingo-3b: an encoder, a resampler and its projection, a block, and so on.
NFNET_F6, NFNET_F0, CLIP = 435.286116, 68.416284, 303.179776
RESAMPLER, LM, BLOCK = 193.724928, 1374.799872, 50.362370

# Totals in millions, of paper.md's set S2: keys and values from the language model's width.
TOTALS = {
    "baseline": 3212.5,
    "wo_video_text": 3212.5,
    "wo_image_text": 3212.5,
    "laion": 3212.5,
    "wo_m3w": 3212.5,
    "round_robin": 3212.5,
    "no_tanh_gating": 3212.5,
    "vanilla_xattn": 2406.9,
    "grafting": 3262.8,
    "single_in_middle": 2054.2,
    "every_4th": 2306.0,
    "every_2nd": 2608.2,
    "mlp": 3212.5,
    "transformer": 3212.5,
    "clip_vit_l14": 3077.3,
    "nfnet_f0": 2845.6,
    "lm_random_init": 3212.5,
    "lm_pretrained": 3212.5,
    "all_previous_images": 3212.5,
    "m3w_only": 3212.5,
    "vision_unfrozen": 3212.5,
}
PRESET_COUNTS = {
    "flamingo-3b": {"conditioning": 24 * BLOCK, "lm": LM, "total": 3212.5},
    "flamingo-9b": {"conditioning": 8 * 201.388, "lm": 7112.1, "total": 9352.2},
    "flamingo-80b": {"conditioning": 12 * 805.429, "lm": 70063.9, "total": 80358.1},
}


@pytest.fixture(scope="module")
def table3() -> dict[str, ParameterRow]:
    pytest.importorskip("timm")
    return {row.name: row for row in params.table3_rows()}


@pytest.fixture(scope="module")
def presets() -> dict[str, ParameterRow]:
    pytest.importorskip("timm")
    return {row.name: row for row in params.preset_rows()}


def _text(rows: list[ParameterRow]) -> str:
    console = Console(width=250)
    with console.capture() as captured:
        console.print(params.render(rows))
    return captured.get()


def _row(total: int, printed: str, name: str = "baseline") -> ParameterRow:
    return ParameterRow(name, ParameterCounts(0, 0, 0, total, 0, 0), {"total": printed})


@pytest.mark.parametrize("row, millions", TOTALS.items())
def test_totals_of_table_3(table3: dict[str, ParameterRow], row: str, millions: float) -> None:
    assert round(table3[row].counts.total / 1e6, 1) == millions


def test_every_row_of_the_data_is_counted(table3: dict[str, ParameterRow]) -> None:
    assert list(table3) == [row["row"] for row in params.read_table3()]
    assert set(table3) == {*TOTALS, "resampler_small", "resampler_large"}


@pytest.mark.parametrize(
    "row, component, millions",
    [
        ("baseline", "vision", NFNET_F6),
        ("baseline", "resampler", RESAMPLER),
        ("baseline", "conditioning", 24 * BLOCK),
        ("baseline", "lm", LM),
        # <EOC>.
        ("baseline", "tokens", 2048 / 1e6),
        ("nfnet_f0", "vision", NFNET_F0),
        ("clip_vit_l14", "vision", CLIP),
        ("clip_vit_l14", "resampler", RESAMPLER - 2048 * 1536 / 1e6),
        ("no_tanh_gating", "conditioning", 24 * BLOCK - 48 / 1e6),
        ("vanilla_xattn", "conditioning", 24 * 16.793601),
        ("single_in_middle", "conditioning", BLOCK),
        ("every_4th", "conditioning", 6 * BLOCK),
        ("every_2nd", "conditioning", 12 * BLOCK),
        # Twelve layers of the language model's own kind, each with a block.
        ("grafting", "conditioning", 12 * (BLOCK + 13 * (2048**2 + 2048) / 1e6)),
        ("mlp", "resampler", RESAMPLER),
        ("transformer", "resampler", RESAMPLER),
    ],
)
def test_parts_of_table_3(
    table3: dict[str, ParameterRow], row: str, component: str, millions: float
) -> None:
    assert getattr(table3[row].counts, component) / 1e6 == pytest.approx(millions, abs=0.05)


def test_rows_differ_from_the_baseline_in_their_own_part_alone(
    table3: dict[str, ParameterRow],
) -> None:
    changed = {
        name: {
            component
            for component in COMPONENTS[:-1]
            if getattr(row.counts, component) != getattr(table3["baseline"].counts, component)
        }
        for name, row in table3.items()
    }
    expected: dict[str, set[str]] = {name: set() for name in table3}
    for name in ("mlp", "transformer", "resampler_small", "resampler_large"):
        expected[name] = {"resampler"}
    for name in ("no_tanh_gating", "vanilla_xattn", "grafting"):
        expected[name] = {"conditioning"}
    for name in ("single_in_middle", "every_4th", "every_2nd"):
        expected[name] = {"conditioning"}
    expected["nfnet_f0"] = {"vision"}
    # Features of another width are projected by another matrix.
    expected["clip_vit_l14"] = {"vision", "resampler"}
    assert changed == expected


def test_what_is_trained(table3: dict[str, ParameterRow]) -> None:
    def frozen(name: str) -> int:
        return table3[name].counts.total - table3[name].counts.trainable

    counts = table3["baseline"].counts
    assert frozen("baseline") == counts.vision + counts.lm
    assert frozen("lm_random_init") == frozen("lm_pretrained") == counts.vision
    assert frozen("vision_unfrozen") == counts.lm
    assert table3["baseline"].counts.trainable == pytest.approx(1402.4e6, abs=0.05e6)


def test_table_3_prints_as_the_papers_but_for_two_rows(table3: dict[str, ParameterRow]) -> None:
    misses = {name: row.misses() for name, row in table3.items() if row.misses()}
    assert set(misses) == {"single_in_middle", "nfnet_f0"}
    assert misses["single_in_middle"]["total"] == pytest.approx(4.2e6, abs=0.05e6)
    assert misses["nfnet_f0"]["total"] == pytest.approx(-4.4e6, abs=0.05e6)
    notes = footnotes(table3.values())
    single, nfnet = notes["single_in_middle", "total"], notes["nfnet_f0", "total"]
    assert "prints 2.1B, the paper 2.0B" in single
    assert "4.2 M parameters too many" in single
    assert "prints 2.8B, the paper 2.9B" in nfnet
    assert "4.4 M parameters too few" in nfnet
    # Each says what the other row has to do with it.
    assert "nfnet_f0 wants" in single
    assert "single_in_middle wants" in nfnet


@pytest.mark.parametrize("name", PRESET_COUNTS)
def test_presets_have_the_counts_of_table_5(presets: dict[str, ParameterRow], name: str) -> None:
    counts = presets[name].counts
    expected = {"vision": NFNET_F6, "resampler": RESAMPLER, **PRESET_COUNTS[name]}
    for component, millions in expected.items():
        assert getattr(counts, component) / 1e6 == pytest.approx(millions, abs=0.05), component


def test_table_5_prints_as_the_papers_but_for_one_total(presets: dict[str, ParameterRow]) -> None:
    misses = {(name, each) for name, row in presets.items() for each in row.misses()}
    assert misses == {("flamingo-9b", "total")}
    assert sum(len(row.printed) for row in presets.values()) == 15
    note = footnotes(presets.values())["flamingo-9b", "total"]
    assert "prints 9.4B, the paper 9.3B. It has 2.2 M parameters too many" in note
    assert "sum to 9.329B" in note
    printed = presets["flamingo-9b"].printed
    of_parts = {each: printed[each] for each in COMPONENTS if each not in ("tokens", "total")}
    units = {"M": 1e-3, "B": 1.0}
    assert sum(float(each[:-1]) * units[each[-1]] for each in of_parts.values()) == (
        pytest.approx(9.329)
    )


def test_the_mini_preset_is_small(presets: dict[str, ParameterRow]) -> None:
    counts = presets["flamingo-mini"].counts
    assert counts.total < 5e6
    assert counts.trainable == counts.total
    assert presets["flamingo-mini"].printed == {}


@pytest.mark.parametrize(
    "count, printed, same, distance",
    [
        (3_212_500_000, "3.2B", "3.2B", 0),
        (193_724_928, "194M", "194M", 0),
        (189_000_000, "194M", "189M", -4.5e6),
        (80_358_000_000, "80B", "80B", 0),
        (9_665_000_000, "10B", "10B", 0),
        (2_054_200_000, "2.0B", "2.1B", 4.2e6),
        (2_845_600_000, "2.9B", "2.8B", -4.4e6),
    ],
)
def test_prints_as_the_paper_does(count: int, printed: str, same: str, distance: float) -> None:
    assert prints_as(count, printed) == same
    misses = _row(count, printed).misses()
    assert misses == ({} if distance == 0 else {"total": pytest.approx(distance, abs=1)})


def test_a_miss_without_a_known_reason_has_a_footnote_too() -> None:
    row = _row(3_300_000_000, "3.2B")
    assert footnotes([row])["baseline", "total"] == (
        "baseline, total: prints 3.3B, the paper 3.2B. It has 50.0 M parameters too many to print "
        "the same."
    )
    assert "(3.2B *1)" in _text([row])
    assert "*1 baseline, total: prints 3.3B" in _text([row])
    assert "*1" not in _text([_row(3_200_000_000, "3.2B")])


def test_the_table_has_all_rows_and_marks(table3: dict[str, ParameterRow]) -> None:
    lines = _text(list(table3.values())).splitlines()
    for name in table3:
        assert any(line.startswith(f"│ {name} ") for line in lines), name
    marked = [line.split()[1] for line in lines if line.startswith("│") and "*" in line]
    assert marked == ["single_in_middle", "nfnet_f0"]
    assert sum(line.startswith("*") for line in lines) == 2


class _Parts(nn.Module):
    """What a Flamingo is to a count."""

    def __init__(self) -> None:
        super().__init__()
        self.vision_encoder = nn.Linear(3, 5, bias=False).requires_grad_(False)
        self.resampler = nn.Linear(5, 7, bias=False)
        self.conditioning = nn.Linear(7, 11, bias=False)
        self.lang_model = nn.ModuleList([nn.Linear(11, 13, bias=False) for _ in range(2)])
        self.tokens: nn.Module | None = nn.Embedding(2, 11)


def test_parameters_that_are_shared_are_counted_once() -> None:
    model = _Parts()
    assert count_of(model) == ParameterCounts(15, 35, 77, 2 * 143, 22, 35 + 77 + 2 * 143 + 22)
    model.lang_model[1].weight = model.lang_model[0].weight
    assert count_of(model) == ParameterCounts(15, 35, 77, 143, 22, 35 + 77 + 143 + 22)
    model.tokens = None
    assert count_of(model).total == 15 + 35 + 77 + 143


def test_parameters_outside_of_the_parts_are_refused_by_name() -> None:
    model = _Parts()
    model.extra = nn.Linear(1, 1, bias=False)
    with pytest.raises(ValueError, match=r"^model: extra.weight: in none of vision_encoder, "):
        count_of(model)


@pytest.mark.parametrize("kind", ["gated_xattn_dense", "vanilla_xattn", "grafting"])
def test_a_model_with_weights_has_as_many(kind: str) -> None:
    pytest.importorskip("timm")
    from flamingo_fast.models.flamingo import Flamingo

    config = dataclasses.replace(
        FlamingoConfig.preset("flamingo-mini"),
        conditioning=ConditioningConfig(
            kind=kind, num_layers=2, heads=2, dim_head=16, dim_media=128
        ),
        learnt_token_ids=(1000,),
    )
    assert count_of(Flamingo(config, device="cpu")) == count_parameters(config)


@pytest.mark.skipif(sys.platform != "linux", reason="reads a process's peak from /proc")
def test_the_largest_preset_is_built_in_30_s_and_2_gb() -> None:
    pytest.importorskip("timm")
    program = """
import json, time
from pathlib import Path
import timm
from flamingo_fast.models.config import FlamingoConfig
from flamingo_fast.models.flamingo import Flamingo
start = time.perf_counter()
model = Flamingo(FlamingoConfig.preset("flamingo-80b"), device="meta")
seconds = time.perf_counter() - start
status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
print(json.dumps({
    "seconds": seconds,
    "peak_kib": int(status["VmHWM"].split()[0]),
    "on_meta": all(each.is_meta for each in model.parameters()),
    "parameters": sum(each.numel() for each in model.parameters()),
}))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    measured = json.loads(done.stdout)
    assert measured["on_meta"]
    assert measured["parameters"] > 80e9
    assert measured["seconds"] < 30
    assert measured["peak_kib"] * 1024 < 2e9


def test_the_command_counts_a_preset(tmp_path: Path) -> None:
    pytest.importorskip("timm")
    file = tmp_path / "params.csv"
    result = CliRunner().invoke(
        cli.app, ["params", "--preset", "flamingo-mini", "--csv", str(file)]
    )
    assert result.exit_code == 0, result.output
    counts = count_parameters(FlamingoConfig.preset("flamingo-mini"))
    assert "flamingo-mini" in result.output
    assert f"{counts.total / 1e6:.1f}" in result.output
    with file.open(newline="") as lines:
        (row,) = csv.DictReader(lines)
    assert row["model"] == "flamingo-mini"
    for component in (*COMPONENTS, "trainable"):
        assert int(row[component]) == getattr(counts, component), component
    assert row["paper_total"] == row["note"] == ""


def test_the_command_writes_table_3(
    table3: dict[str, ParameterRow], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(params, "table3_rows", lambda: list(table3.values()))
    file = tmp_path / "table3.csv"
    result = CliRunner().invoke(cli.app, ["params", "--table3", "--csv", str(file)])
    assert result.exit_code == 0, result.output
    with file.open(newline="") as lines:
        rows = {row["model"]: row for row in csv.DictReader(lines)}
    assert list(rows) == list(table3)
    assert {name: int(row["total"]) for name, row in rows.items()} == {
        name: row.counts.total for name, row in table3.items()
    }
    assert rows["grafting"]["paper_total"] == "3.3B"
    assert {name for name, row in rows.items() if row["note"]} == {"single_in_middle", "nfnet_f0"}


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["--preset", "flamingo-4b"], "flamingo-4b"),
        (["--preset", "flamingo-3b", "--table3"], "--preset"),
        (["--table3", "--csv", "absent/params.csv"], "csv"),
    ],
)
def test_bad_usage_exits_with_2_before_counting(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, arguments: list[str], said: str
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(params, "count_parameters", lambda _: pytest.fail("counted"))
    result = CliRunner().invoke(cli.app, ["params", *arguments])
    assert result.exit_code == 2
    assert said in result.output
    assert "Traceback" not in result.output
    assert isinstance(result.exception, SystemExit)
