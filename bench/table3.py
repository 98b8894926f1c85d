"""Table 3 of Flamingo (arXiv 2204.14198): parameters and step times, predicted beside the paper's.

A step time in its sense is "the time spent to perform gradient updates on all training datasets".
Two predictions, both of ratios to the baseline's:

- flops: the step's operations alone (`models.work`), as on one accelerator that these bind;
- flops + parameters: beside them a cost for each trainable parameter in each pass over a dataset.
  What the paper trains on adds up gradients and states of parameters over many chips. The two
  coefficients are fitted to the paper's own times, here and anew each time.
"""

import csv
import dataclasses
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from flamingo_fast.bench.agreement import Agreement
from flamingo_fast.models.config import FlamingoConfig
from flamingo_fast.models.params import ParameterCounts, read_table3, table3_rows
from flamingo_fast.models.presets import table3_configs
from flamingo_fast.models.work import passes, step_flops

if TYPE_CHECKING:
    from rich.console import Group

BASELINE = "baseline"
# By construction they do what the baseline does: they show what the machine's noise is.
CONTROLS = ("laion", "no_tanh_gating")
# Of other tables of the paper's: no coefficient is fitted to them.
EXTRA = "extra"

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
        paper_score: "Overall score"; none of other tables' rows.
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
    paper_score: float | None = None

    @property
    def costs(self) -> tuple[float, float]:
        """What each coefficient is multiplied by: PFLOP, and billions of trainable parameters in
        all passes and on each of the chips by which the paper multiplies."""
        return self.flops / 1e15, self.trainable / 1e9 * self.passes * self.chips


@dataclasses.dataclass(frozen=True)
class Fit:
    """Step times by operations and parameters, fitted to the paper's own.

    Attributes:
        seconds_per_billion_trainable: in each pass over a dataset.
    """

    seconds_per_pflop: float
    seconds_per_billion_trainable: float

    @classmethod
    def to_paper(cls, rows: Sequence[Prediction]) -> "Fit":
        """Least squares of the relative errors of the rows' printed times.

        Raises:
            ValueError: fewer than two rows, or whose two costs are all in one proportion.
        """
        relative = [
            (each.costs[0] / each.paper_seconds, each.costs[1] / each.paper_seconds)
            for each in rows
        ]
        flops, parameters = sum(f for f, _ in relative), sum(p for _, p in relative)
        of_flops, of_parameters = sum(f * f for f, _ in relative), sum(p * p for _, p in relative)
        both = sum(f * p for f, p in relative)
        determinant = of_flops * of_parameters - both**2
        if determinant <= 1e-12 * of_flops * of_parameters:
            raise ValueError(
                "rows: expected at least two that differ in parameters over operations; got "
                f"{', '.join(each.row for each in rows) or 'none'}"
            )
        return cls(
            (of_parameters * flops - both * parameters) / determinant,
            (of_flops * parameters - both * flops) / determinant,
        )

    def seconds(self, row: Prediction) -> float:
        """Of a step on the paper's hardware, where it is to be compared."""
        flops, parameters = row.costs
        return self.seconds_per_pflop * flops + self.seconds_per_billion_trainable * parameters


def of_table3(predictions: Iterable[Prediction]) -> list[Prediction]:
    """Table 3's own 18 rows."""
    return [each for each in predictions if each.group != EXTRA]


def differing(predictions: Iterable[Prediction]) -> list[Prediction]:
    """Those of table 3 that by construction do something else than its baseline."""
    return [each for each in of_table3(predictions) if each.row not in (BASELINE, *CONTROLS)]


def leave_one_out(predictions: Sequence[Prediction]) -> float:
    """Mean absolute error of the ratios of `differing` rows, each by a fit to all others."""
    rows = of_table3(predictions)
    errors = []
    for row in differing(rows):
        fit = Fit.to_paper([each for each in rows if each.row != row.row])
        base = next(each for each in rows if each.row == BASELINE)
        ratio = fit.seconds(row) / fit.seconds(base)
        errors.append(abs(ratio - row.paper_seconds / base.paper_seconds))
    return statistics.fmean(errors)


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
        paper_score=float(row["overall_score"]) if row["overall_score"] else None,
    )


def ratios(predictions: Iterable[Prediction]) -> dict[str, Ratios]:
    """By row.

    Raises:
        ValueError: the baseline isn't among them, or too few rows to fit to.
    """
    rows = {each.row: each for each in predictions}
    if BASELINE not in rows:
        raise ValueError(f"predictions: expected one of {BASELINE}, got {', '.join(rows)}")
    base, fit = rows[BASELINE], Fit.to_paper(of_table3(rows.values()))
    return {
        name: Ratios(
            each.paper_seconds / base.paper_seconds,
            each.flops / base.flops,
            fit.seconds(each) / fit.seconds(base),
        )
        for name, each in rows.items()
    }


def agreements(predictions: Sequence[Prediction]) -> dict[str, Agreement]:
    """Of each prediction's ratios with the paper's, over `differing` rows."""
    of_row = ratios(predictions)
    rows = [of_row[each.row] for each in differing(predictions)]
    paper = [each.paper for each in rows]
    return {
        "flops": Agreement.of([each.flops for each in rows], paper),
        "flops + params": Agreement.of([each.flops_and_parameters for each in rows], paper),
    }


def left_out(predictions: Sequence[Prediction]) -> str:
    """In words, how far off the fit is of rows that it was not made with."""
    error = leave_one_out(predictions)
    return f"a row that its fit leaves out is off by {error:.3f} on average"


def _notes(predictions: Sequence[Prediction]) -> list[str]:
    fit = Fit.to_paper(of_table3(predictions))
    of = agreements(predictions)
    return [
        "Predicted, not measured. PFLOP: matrix products and convolutions of one step, 2 for each "
        "multiply-add.",
        f"flops: a step's operations alone. Against the paper's ratios: {of['flops']}.",
        f"flops + params: fitted to the paper's step times: {fit.seconds_per_pflop:.3f} s for each "
        f"PFLOP and {fit.seconds_per_billion_trainable:.4f} s for each billion of trainable "
        f"parameters in each pass over a dataset. Against the paper's ratios: "
        f"{of['flops + params']}; {left_out(predictions)}.",
    ]


def render(predictions: list[Prediction]) -> "Group":
    """The rows as a table for a terminal, in the paper's groups, and what its columns are."""
    # Here alone: what is measured needs no terminal.
    from rich.console import Group
    from rich.table import Table

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
    return Group(table, *_notes(predictions))


def write_csv(predictions: Iterable[Prediction], path: str | Path) -> None:
    """A line for each row.

    Raises:
        OSError: the file can't be written.
    """
    predictions = list(predictions)
    of_row, fit = ratios(predictions), Fit.to_paper(of_table3(predictions))
    fields = [field.name for field in dataclasses.fields(Prediction)]
    added = ("seconds", "paper_ratio", "flops_ratio", "flops_and_parameters_ratio")
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, (*fields, *added), lineterminator="\n")
        writer.writeheader()
        for each in predictions:
            values = dataclasses.asdict(each)
            numbers = dataclasses.astuple(of_row[each.row])
            rounded = [f"{number:.4f}" for number in (fit.seconds(each), *numbers)]
            writer.writerow(values | dict(zip(added, rounded, strict=True)))
