"""Table 3 of Flamingo (arXiv 2204.14198): parameters and step times, predicted beside the paper's.

A step time in its sense is "the time spent to perform gradient updates on all training datasets".
Two predictions, both of ratios to the baseline's:

- flops: the step's operations alone (`models.work`), as on one accelerator that these bind;
- flops + parameters: beside them a cost for each trainable parameter in each pass over a dataset.
  What the paper trains on adds up gradients and states of parameters over many chips. The two
  coefficients are fitted to the paper's own times.
"""

import csv
import dataclasses
from collections.abc import Iterable
from pathlib import Path

from rich.console import Group
from rich.table import Table

from flamingo_fast.models.config import FlamingoConfig
from flamingo_fast.models.params import ParameterCounts, read_table3, table3_rows
from flamingo_fast.models.presets import table3_configs
from flamingo_fast.models.work import passes, step_flops

# Least squares of the relative errors of table 3's 18 step times.
SECONDS_PER_PFLOP = 0.474
SECONDS_PER_BILLION_TRAINABLE = 0.0997
"""In each pass over a dataset."""

BASELINE = "baseline"

# Chips as multiples of the baseline's, by which the paper multiplies the time (table 10). A cost
# that chips don't share, as that of parameters, is multiplied by it.
_CHIPS = {"vision_unfrozen": 4}


@dataclasses.dataclass(frozen=True)
class Prediction:
    """A row of the table.

    Attributes:
        group, row: as in bench/data/table3.csv.
        change: what the row changes, in the paper's words.
        parameters, trainable: of our model.
        passes: over datasets, in a step.
        flops: of a step.
        chips: as a multiple of the baseline's.
        paper_parameters: in billions, as printed.
        paper_seconds: of a step.
    """

    group: str
    row: str
    change: str
    parameters: int
    trainable: int
    passes: int
    flops: int
    chips: int
    paper_parameters: str
    paper_seconds: float

    @property
    def seconds(self) -> float:
        """By operations and parameters: on the paper's hardware, where it is to be compared."""
        per_pass = SECONDS_PER_BILLION_TRAINABLE * self.trainable / 1e9
        return SECONDS_PER_PFLOP * self.flops / 1e15 + per_pass * self.passes * self.chips


@dataclasses.dataclass(frozen=True)
class Ratios:
    """Step times of a row over the baseline's: the paper's and both predictions."""

    paper: float
    flops: float
    flops_and_parameters: float


def predict() -> list[Prediction]:
    """All rows of bench/data/table3.csv, in its order; without weights, in seconds.

    Raises:
        ImportError: timm is not installed.
    """
    counts = {row.name: row.counts for row in table3_rows()}
    configs = table3_configs()
    return [_prediction(row, configs[row["row"]], counts[row["row"]]) for row in read_table3()]


def _prediction(row: dict[str, str], config: FlamingoConfig, counts: ParameterCounts) -> Prediction:
    return Prediction(
        group=row["group"],
        row=row["row"],
        change=row["changed_value"],
        parameters=counts.total,
        trainable=counts.trainable,
        passes=len(passes(config)),
        flops=step_flops(config).total,
        chips=_CHIPS.get(row["row"], 1),
        paper_parameters=row["params_b"],
        paper_seconds=float(row["step_time_s"]),
    )


def ratios(predictions: Iterable[Prediction]) -> dict[str, Ratios]:
    """By row.

    Raises:
        ValueError: the baseline isn't among them.
    """
    rows = {each.row: each for each in predictions}
    if BASELINE not in rows:
        raise ValueError(f"predictions: expected one of {BASELINE}, got {', '.join(rows)}")
    base = rows[BASELINE]
    return {
        name: Ratios(
            each.paper_seconds / base.paper_seconds,
            each.flops / base.flops,
            each.seconds / base.seconds,
        )
        for name, each in rows.items()
    }


_NOTES = (
    "Predicted, not measured. PFLOP: matrix products and convolutions of one step, 2 for each "
    "multiply-add.",
    "flops: a step's operations alone.",
    f"flops + params: {SECONDS_PER_PFLOP} s for each PFLOP and {SECONDS_PER_BILLION_TRAINABLE} s "
    "for each billion of trainable parameters in each pass over a dataset, fitted to the paper's "
    "step times.",
)


def render(predictions: list[Prediction]) -> Group:
    """The rows as a table for a terminal, in the paper's groups, and what its columns are."""
    of_row = ratios(predictions)
    table = Table(
        title="Step time over the baseline's: printed and predicted", title_justify="left"
    )
    for name in ("", "row", "change"):
        table.add_column(name)
    for name in ("params (B)", "paper", "PFLOP", "paper's ratio", "flops", "flops + params"):
        table.add_column(name, justify="right")
    group = None
    for each in predictions:
        if group is not None and each.group != group:
            table.add_section()
        numbers = of_row[each.row]
        table.add_row(
            "" if each.group == group else each.group.replace("_", " "),
            each.row,
            each.change,
            f"{each.parameters / 1e9:.3f}",
            each.paper_parameters,
            f"{each.flops / 1e15:.3f}",
            f"{numbers.paper:.3f}",
            f"{numbers.flops:.3f}",
            f"{numbers.flops_and_parameters:.3f}",
        )
        group = each.group
    return Group(table, *_NOTES)


def write_csv(predictions: Iterable[Prediction], path: str | Path) -> None:
    """A line for each row.

    Raises:
        OSError: the file can't be written.
    """
    predictions = list(predictions)
    of_row = ratios(predictions)
    fields = [field.name for field in dataclasses.fields(Prediction)]
    added = ("seconds", "paper_ratio", "flops_ratio", "flops_and_parameters_ratio")
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, (*fields, *added), lineterminator="\n")
        writer.writeheader()
        for each in predictions:
            values = dataclasses.asdict(each)
            numbers = dataclasses.astuple(of_row[each.row])
            rounded = [f"{number:.4f}" for number in (each.seconds, *numbers)]
            writer.writerow(values | dict(zip(added, rounded, strict=True)))
