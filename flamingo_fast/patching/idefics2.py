"""To be written."""

from flamingo_fast.patching.rules import Rule

RULES: tuple[Rule, ...] = ()
