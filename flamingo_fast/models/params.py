"""How many parameters a Flamingo model has, part by part, beside what the paper prints.

"Table" is Flamingo's (arXiv 2204.14198). Nothing here makes memory for weights: models are built on
the meta device.
"""

import csv
import dataclasses
import functools
import importlib.resources
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from rich.console import Group
from rich.table import Table
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from flamingo_fast.models.config import FlamingoConfig, VisionConfig
from flamingo_fast.models.presets import PRESETS, table3_configs
from flamingo_fast.models.vision import VisionEncoder

_CHILDREN = {
    "vision": "vision_encoder",
    "resampler": "resampler",
    "conditioning": "conditioning",
    "lm": "lang_model",
    "tokens": "tokens",
}
COMPONENTS = (*_CHILDREN, "total")

# Table 5; "conditioning" is its column GATED XATTN-DENSE.
_TABLE_5 = {
    "flamingo-3b": {"conditioning": "1.2B", "lm": "1.4B", "total": "3.2B"},
    "flamingo-9b": {"conditioning": "1.6B", "lm": "7.1B", "total": "9.3B"},
    "flamingo-80b": {"conditioning": "10B", "lm": "70B", "total": "80B"},
}
_TABLE_5_OF_ALL = {"vision": "435M", "resampler": "194M"}

_DRAWS = (torch.ops.aten.normal_.default, torch.ops.aten.uniform_.default)

_UNITS = {"M": 10**6, "B": 10**9}

_REASONS = {
    "single_in_middle": (
        "Language model, encoder or resampler would have to be smaller, and nfnet_f0 wants them "
        "larger"
    ),
    "nfnet_f0": (
        "Language model, resampler or blocks would have to be larger, and single_in_middle wants "
        "them smaller"
    ),
    "flamingo-9b": (
        "All of its parts print as the paper's, whose printed parts sum to 9.329B: what rounding "
        "took from the parts makes the next tenth"
    ),
}


@dataclasses.dataclass(frozen=True)
class ParameterCounts:
    """Parameters of the parts of a model; of those that parts share the first has them.

    Attributes:
        vision: the vision encoder.
        resampler: with the projection of features.
        conditioning: blocks that are new in the language model; of grafting the whole stack.
        lm: the language model as it was.
        tokens: embeddings that are learnt, of tokens beside the frozen ones.
        trainable: of all these, what gets gradients.
    """

    vision: int
    resampler: int
    conditioning: int
    lm: int
    tokens: int
    trainable: int

    @property
    def total(self) -> int:
        return self.vision + self.resampler + self.conditioning + self.lm + self.tokens


def count_parameters(config: FlamingoConfig) -> ParameterCounts:
    """Of the model a config describes, which is built on the meta device.

    Raises:
        ConfigError: the config doesn't make a model.
        ImportError: an extra that is not installed.
    """
    from flamingo_fast.models.flamingo import Flamingo

    with _WithoutInit():
        vision_encoder = _vision_encoder(config.vision)
        return count_of(Flamingo(config, vision_encoder=vision_encoder, device="meta"))


@functools.lru_cache(maxsize=4)
def _vision_encoder(config: VisionConfig) -> VisionEncoder:
    """Most rows of table 3 have the same, which takes seconds to make."""
    return VisionEncoder(config, device="meta")


class _WithoutInit(TorchDispatchMode):
    """Random numbers are not drawn: on the meta device they take long and make nothing."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func in _DRAWS and args[0].is_meta:
            return args[0]
        return func(*args, **(kwargs or {}))


def count_of(model: nn.Module) -> ParameterCounts:
    """Of a `Flamingo` that is there.

    Raises:
        ValueError: it has parameters outside of its parts.
    """
    left = {id(parameter): parameter for parameter in model.parameters()}
    counts = {}
    trainable = sum(each.numel() for each in left.values() if each.requires_grad)
    for component, name in _CHILDREN.items():
        child = getattr(model, name)
        own = [] if child is None else list(child.parameters())
        counts[component] = sum(
            each.numel() for each in own if left.pop(id(each), None) is not None
        )
    if left:
        names = [name for name, each in model.named_parameters() if id(each) in left]
        raise ValueError(f"model: {', '.join(names)}: in none of {', '.join(_CHILDREN.values())}")
    return ParameterCounts(**counts, trainable=trainable)


@dataclasses.dataclass(frozen=True)
class ParameterRow:
    """A model's counts beside the paper's.

    Attributes:
        name: of the preset, or of the row of table 3.
        counts: ours.
        printed: what the paper prints, such as "3.2B", by component; not of all there is one.
    """

    name: str
    counts: ParameterCounts
    printed: dict[str, str]

    def misses(self) -> dict[str, float]:
        """Components that print otherwise than in the paper, and by how many parameters.

        Above 0: so many too many to print the same; below 0: so many too few.
        """
        apart = {
            each: _apart(getattr(self.counts, each), self.printed[each]) for each in self.printed
        }
        return {component: distance for component, distance in apart.items() if distance}


def prints_as(count: int, printed: str) -> str:
    """`count` in the unit and with the decimals of `printed`: 1374799872 as "1.4B"."""
    decimals = len(printed[:-1].partition(".")[2])
    return f"{count / _UNITS[printed[-1]]:.{decimals}f}{printed[-1]}"


def _apart(count: int, printed: str) -> float:
    if prints_as(count, printed) == printed:
        return 0
    unit, decimals = _UNITS[printed[-1]], len(printed[:-1].partition(".")[2])
    half = unit / 10**decimals / 2
    middle = float(printed[:-1]) * unit
    return count - (middle + half if count > middle else middle - half)


def preset_rows(names: Iterable[str] = tuple(PRESETS)) -> list[ParameterRow]:
    """Presets beside table 5.

    Raises:
        ConfigError: an unknown preset.
    """
    rows = []
    for name in names:
        printed = _TABLE_5.get(name)
        counts = count_parameters(FlamingoConfig.preset(name))
        rows.append(ParameterRow(name, counts, printed | _TABLE_5_OF_ALL if printed else {}))
    return rows


def table3_rows() -> list[ParameterRow]:
    """Rows of `table3_configs` beside bench/data/table3.csv."""
    printed = {row["row"]: f"{row['params_b']}B" for row in read_table3()}
    # Many rows differ in their training alone.
    counts: dict[str, ParameterCounts] = {}
    rows = []
    for name, config in table3_configs().items():
        model = dataclasses.replace(
            config, datasets=(), optimisation=FlamingoConfig.optimisation
        ).to_json()
        if model not in counts:
            counts[model] = count_parameters(config)
        rows.append(ParameterRow(name, counts[model], {"total": printed[name]}))
    return rows


def read_table3() -> list[dict[str, str]]:
    """The rows of bench/data/table3.csv, by its columns."""
    file = importlib.resources.files("flamingo_fast") / "bench" / "data" / "table3.csv"
    return list(csv.DictReader(file.read_text().splitlines()))


def footnotes(rows: Iterable[ParameterRow]) -> dict[tuple[str, str], str]:
    """Why a row's component prints otherwise than in the paper, by both names."""
    notes = {}
    for row in rows:
        for component, distance in row.misses().items():
            count, printed = getattr(row.counts, component), row.printed[component]
            ours = prints_as(count, printed)
            note = (
                f"{row.name}, {component}: prints {ours}, the paper {printed}. It has "
                f"{abs(distance) / 1e6:.1f} M parameters too {'many' if distance > 0 else 'few'} "
                f"to print the same."
            )
            if component == "total" and row.name in _REASONS:
                note = f"{note} {_REASONS[row.name]}."
            notes[row.name, component] = note
    return notes


def render(rows: list[ParameterRow]) -> Group:
    """The rows as a table for a terminal, and what is to be said about them."""
    notes = footnotes(rows)
    numbers = {key: number for number, key in enumerate(notes, 1)}
    table = Table(
        title="Parameters in millions; in brackets what the paper prints", title_justify="left"
    )
    table.add_column("model")
    for title in (*COMPONENTS, "trainable"):
        table.add_column(title, justify="right")
    for row in rows:
        cells = []
        for component in COMPONENTS:
            cell = _millions(getattr(row.counts, component))
            if component in row.printed:
                number = numbers.get((row.name, component))
                cell += f" ({row.printed[component]}{f' *{number}' if number else ''})"
            cells.append(cell)
        table.add_row(row.name, *cells, _millions(row.counts.trainable))
    return Group(table, *(f"*{numbers[key]} {note}" for key, note in notes.items()))


def _millions(count: int) -> str:
    return f"{count / 1e6:,.1f}"


def write_csv(rows: Iterable[ParameterRow], path: str | Path) -> None:
    """A line for each row: its counts, what the paper prints, and the footnote if they differ.

    Raises:
        OSError: the file can't be written.
    """
    rows = list(rows)
    notes = footnotes(rows)
    printed = [f"paper_{component}" for component in COMPONENTS if component != "tokens"]
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(
            file, ("model", *COMPONENTS, "trainable", *printed, "note"), lineterminator="\n"
        )
        writer.writeheader()
        for row in rows:
            values: dict[str, Any] = {"model": row.name, "trainable": row.counts.trainable}
            values |= {each: getattr(row.counts, each) for each in COMPONENTS}
            values |= {f"paper_{component}": text for component, text in row.printed.items()}
            values["note"] = " ".join(note for (name, _), note in notes.items() if name == row.name)
            writer.writerow(values)
