"""Peers' models made faster in place: `patch`, `unpatch`, `patched`; `rules` has more."""

from flamingo_fast.patching import (
    flamingo_mini,
    flamingo_pytorch,
    idefics,
    idefics2,
    mllama,
    open_flamingo,
    otter,
    rules,
)
from flamingo_fast.patching.engine import patch, patched, unpatch
from flamingo_fast.patching.options import Options
from flamingo_fast.patching.report import PatchReport, ReportEntry
from flamingo_fast.patching.rules import Rule, register, unregister
from flamingo_fast.patching.state import PatchWarning
from flamingo_fast.patching.transformers_hooks import patch_on_load, register_attention

# In the order in which rules are asked.
for _family in (open_flamingo, flamingo_pytorch, flamingo_mini, otter, idefics, idefics2, mllama):
    rules.register(*_family.RULES)

__all__ = [
    "Options",
    "PatchReport",
    "PatchWarning",
    "ReportEntry",
    "Rule",
    "patch",
    "patch_on_load",
    "patched",
    "register",
    "register_attention",
    "unpatch",
    "unregister",
]
