"""What `patch` did, for people and for programs."""

import collections
import dataclasses
from collections.abc import Sequence
from typing import Any

from flamingo_fast.patching.options import Options


@dataclasses.dataclass(frozen=True)
class ReportEntry:
    """Of one module.

    Attributes:
        name: in the model, as `named_modules` has it; "" is the model itself.
        class_name: of its class.
        rule: that matched it, "family.what".
        patched: whether it was (or, in a dry run, would be).
        reason: why not, or "".
        source: the version whose code it has, as far as known; otherwise the fingerprint.
        notes: what to know of it, such as a bug of the peer's.
    """

    name: str
    class_name: str
    rule: str
    patched: bool
    reason: str
    source: str
    notes: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class PatchReport:
    """What `patch` replaced, what it left, and why; str() of it is for people, rich prints a table.

    Attributes:
        model: class of the model.
        entries: of all modules that a rule matched, in the model's order.
        options: of the patch.
        dry_run: nothing was changed.
    """

    model: str
    entries: tuple[ReportEntry, ...]
    options: Options
    dry_run: bool

    @property
    def patched(self) -> tuple[ReportEntry, ...]:
        return tuple(entry for entry in self.entries if entry.patched)

    @property
    def left(self) -> tuple[ReportEntry, ...]:
        return tuple(entry for entry in self.entries if not entry.patched)

    def to_dict(self) -> dict[str, Any]:
        """Of strings, booleans, lists and dictionaries, for JSON."""
        found = dataclasses.asdict(self)
        for entry in found["entries"]:
            entry["notes"] = list(entry["notes"])
        return found | {"entries": list(found["entries"])}

    def rows(self) -> list[tuple[str, ...]]:
        """A row for each kind of module and fate: modules, class, rule, fate, source."""
        groups: dict[tuple[str, ...], list[str]] = collections.defaultdict(list)
        for entry in self.entries:
            fate = ("would patch" if self.dry_run else "patched") if entry.patched else "left"
            fate += f": {entry.reason}" if entry.reason else ""
            groups[entry.class_name, entry.rule, fate, entry.source].append(entry.name)
        return [(_summary(names), *key) for key, names in groups.items()]

    def notes(self) -> list[str]:
        """Each once."""
        return list(dict.fromkeys(note for entry in self.entries for note in entry.notes))

    def __str__(self) -> str:
        lines = [self._headline()]
        lines += ["  " + " | ".join(row) for row in self.rows()]
        return "\n".join([*lines, *(f"  note: {note}" for note in self.notes())])

    def __rich__(self) -> Any:
        from rich.console import Group
        from rich.table import Table
        from rich.text import Text

        if not self.entries:
            return Text(self._headline())
        table = Table("modules", "class", "rule", "fate", "source", title=self._headline())
        for row in self.rows():
            table.add_row(*map(Text, row))
        return Group(table, *(Text(f"note: {note}") for note in self.notes()))

    def _headline(self) -> str:
        if not self.entries:
            return f"{self.model}: nothing in it that a rule knows"
        verb = "would be patched" if self.dry_run else "patched"
        return f"{self.model}: {len(self.patched)} modules {verb}, {len(self.left)} left"


def _summary(names: Sequence[str]) -> str:
    """Such as "model.layers.{3,8,13}.mlp (3)"."""
    shapes: dict[str, list[str]] = collections.defaultdict(list)
    for name in names:
        parts = name.split(".")
        numbers = [part for part in parts if part.isdigit()]
        shape = ".".join("{}" if part.isdigit() else part for part in parts)
        shapes[shape].append(".".join(numbers))
    found = []
    for shape, numbers in shapes.items():
        if len(numbers) == 1:
            text = shape
            for number in numbers[0].split("."):
                text = text.replace("{}", number, 1)
        elif shape.count("{}") == 1:
            text = shape.replace("{}", "{" + _ranges([int(each) for each in numbers]) + "}")
        else:
            text = shape.replace("{}", "*")
        found.append((text or "(the model)") + (f" ({len(numbers)})" if len(numbers) > 1 else ""))
    return ", ".join(found)


def _ranges(numbers: Sequence[int]) -> str:
    """Of sorted numbers: "0-7,9"."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)
