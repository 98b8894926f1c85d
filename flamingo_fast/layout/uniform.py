"""Which tokens' attention is to be uniform, found once for all layers that ask.

B batch, L text tokens.
"""

from typing import TYPE_CHECKING, Any

import torch

from flamingo_fast.layout.arguments import no_inference_tensors, values_are_at_hand
from flamingo_fast.watchers import is_watched

if TYPE_CHECKING:
    from flamingo_fast.layout.media_layout import MediaLayout

# The attribute of a layout with what was found; no field, and not pickled.
KEPT = "_uniform_rows"


def uniform_rows(layout: "MediaLayout", unattended: bool, past_last: bool) -> torch.Tensor | None:
    """See `MediaLayout.uniform_rows`."""
    if not unattended and not layout.tells_past_last:
        return None
    made_of = (layout.media_start, layout.media_end, layout.cu_media)
    is_cuda = layout.media_start.is_cuda
    may_keep = not (
        is_watched()  # Tracers' tensors end with the trace.
        or any(tensor.is_inference() for tensor in made_of)  # Their changes are not counted.
        or (is_cuda and torch.cuda.is_current_stream_capturing())
    )
    kept: dict[Any, torch.Tensor | None] = {}
    if may_keep:
        state: list[Any] = [tensor._version for tensor in made_of]
        state.append(torch.cuda.current_stream(layout.device) if is_cuda else None)
        found = layout.__dict__.get(KEPT)
        if found is None or found[0] != state:
            found = layout.__dict__[KEPT] = state, kept
        kept = found[1]
    if (unattended, past_last) not in kept:
        with no_inference_tensors():
            after = layout.past_last()
            rows = torch.zeros_like(after)
            if unattended:
                rows = ~layout.attends() & ~after
            if past_last:
                rows = rows | after
            is_needed = not values_are_at_hand(rows) or bool(rows.any())
        kept[unattended, past_last] = rows if is_needed else None
    return kept[unattended, past_last]
