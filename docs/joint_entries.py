"""What griffe is told of docstrings: an entry of several names, `k, v: ...`, is one of each.

Griffe has no such entries: it would take the names together for that of one parameter.
"""

import re
from typing import Any

import griffe

_SECTION = re.compile(r"^(Arguments|Attributes):\n((?:    .*\n|\n)+)", re.M)
_ENTRY = re.compile(r"^    (\w+(?:, \w+)+): (.*)$", re.M)


def split_entries(docstring: str) -> str:
    """The last name has the text, as that may go on over lines; the others name the last."""

    def of_entry(found: re.Match[str]) -> str:
        first, *others = found.group(1).split(", ")
        before = "".join(f"    {name}: see `{others[-1]}`.\n" for name in (first, *others[:-1]))
        return f"{before}    {others[-1]}: {found.group(2)}"

    def of_section(found: re.Match[str]) -> str:
        return f"{found.group(1)}:\n{_ENTRY.sub(of_entry, found.group(2))}"

    return _SECTION.sub(of_section, docstring + "\n").removesuffix("\n")


class JointEntries(griffe.Extension):
    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = split_entries(obj.docstring.value)
