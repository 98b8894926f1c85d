"""Which media each text token attends to."""

from flamingo_fast.layout import tree
from flamingo_fast.layout.arguments import document_boundaries, values_are_at_hand
from flamingo_fast.layout.intervals import ATTEND
from flamingo_fast.layout.media_layout import MediaLayout

__all__ = ["ATTEND", "MediaLayout", "document_boundaries", "values_are_at_hand"]

tree.register()
