"""What a training step takes of one dataset.

B rows, L tokens, F frames of a medium, S features of a frame.
"""

import dataclasses
from typing import Any

import torch

IGNORED = -100


@dataclasses.dataclass
class Batch:
    """Rows of one dataset, on one device.

    A row holds one document; or, where `cu_seqlens` is there, several, which don't see each other.

    Attributes:
        input_ids: (B, L) int64.
        labels: (B, L) int64, -100 where nothing is to be predicted: padding, `<image>`, and the
            first token of a document. Not shifted.
        attention_mask: (B, L) int64, 0 at padding, which is on the right; None where rows are
            packed.
        cu_seqlens: (documents + 1,) int32 on the CPU, as `MediaLayout.packed` takes it: document d
            has tokens cu_seqlens[d] to cu_seqlens[d + 1] of the batch's B * L. Padding at the end
            of a row is a document without media.
        num_media: media of each row; of each document, where rows are packed.
        attend: "previous" or "next" of each of them (Flamingo's p_next); None: as the model says.
        pixels: (media_total, F, 3, H, W) in the order of rows, or a list of (F, 3, H, W) where F
            differs; None: there are no media, or features are given.
        features: in place of pixels, what a frozen vision encoder made of them: a list of
            (F, S, width), empty where there are no media. None: the encoder is to run.
    """

    input_ids: torch.Tensor
    labels: torch.Tensor
    attention_mask: torch.Tensor | None
    cu_seqlens: torch.Tensor | None
    num_media: list[int]
    attend: list[str] | None
    pixels: torch.Tensor | list[torch.Tensor] | None
    features: list[torch.Tensor] | None

    @property
    def num_rows(self) -> int:
        return self.input_ids.shape[0]

    def to(
        self, device: torch.device | str, dtype: torch.dtype | None = None, **options: Any
    ) -> "Batch":
        """The same on a device; `dtype` is of pixels and features alone.

        Arguments:
            options: of `torch.Tensor.to`, such as non_blocking.
        """

        def moved(name: str, value: Any) -> Any:
            if isinstance(value, list):
                return [moved(name, each) for each in value]
            # Boundaries of documents are looked at by the host.
            if not isinstance(value, torch.Tensor) or name == "cu_seqlens":
                return value
            is_media = name in ("pixels", "features")
            return value.to(device, dtype if is_media else None, **options)

        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return Batch(**{name: moved(name, value) for name, value in fields.items()})

    def loss_tokens(self) -> torch.Tensor:
        """How many tokens are predicted, int64 scalar."""
        return (self.labels[:, 1:] != IGNORED).sum()
