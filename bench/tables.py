"""Tables for the terminal, for markdown and for a page."""

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import rich.table


@dataclasses.dataclass(frozen=True)
class Table:
    """Columns from `first_number` on are numbers. `notes` stand below.

    `has_groups`: on the terminal a line parts rows whose first cells differ, if some are alike.
    """

    title: str
    headers: Sequence[str]
    rows: Sequence[Sequence[str]]
    first_number: int
    notes: Sequence[str] = ()
    has_groups: bool = True

    def rich(self) -> "rich.table.Table":
        """A section for each value of the first column."""
        # Here alone: what is measured needs no terminal.
        import rich.box
        import rich.table

        table = rich.table.Table(
            title=self.title,
            title_justify="left",
            box=rich.box.SIMPLE_HEAD,
            caption="\n".join(self.notes),
            caption_justify="left",
        )
        for index, header in enumerate(self.headers):
            number = index >= self.first_number
            # Names that are too long are broken, for their ends tell variants apart.
            table.add_column(
                header, justify="right" if number else "left", no_wrap=number, overflow="fold"
            )
        # Where each row has another one a line between all of them says nothing.
        has_groups = self.has_groups and len({row[0] for row in self.rows}) < len(self.rows)
        for index, row in enumerate(self.rows):
            following = self.rows[index + 1 : index + 2]
            is_last = any(next_row[0] != row[0] for next_row in following)
            table.add_row(*row, end_section=has_groups and is_last)
        return table

    def markdown(self) -> str:
        numbers = len(self.headers) - self.first_number
        rule = ["---"] * self.first_number + ["---:"] * numbers
        headers = [header.replace("\n", " ") for header in self.headers]
        # A bar or an end of line in a cell would end it.
        rows = [[" ".join(cell.split()).replace("|", r"\|") for cell in row] for row in self.rows]
        lines = ["| " + " | ".join(cells) + " |" for cells in (headers, rule, *rows)]
        return "\n".join([f"## {self.title}", "", *lines, *bullets(self.notes)])


def bullets(notes: Sequence[str]) -> list[str]:
    return ["", *(f"- {note}" for note in notes)] if notes else []


def digits(value: float) -> str:
    """Three significant digits, without an exponent."""
    return f"{value:.0f}" if value >= 100 else f"{value:#.3g}".removesuffix(".")
