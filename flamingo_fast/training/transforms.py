"""How images become pixels: the encoder's preprocessing, and augmentation within it.

"Appendix" is Flamingo's (arXiv 2204.14198).
"""

import dataclasses
import random
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch

from flamingo_fast.models.extras import require
from flamingo_fast.models.processor import middle_of_thin

if TYPE_CHECKING:
    import PIL.Image

# By how much colours change at most; the paper gives no numbers.
_COLOUR = 0.2


@dataclasses.dataclass(frozen=True)
class Augmentation:
    """A flip and other colours (appendix B.1.2), the same for all frames of a medium.

    Attributes:
        flip: whether left and right change places.
        brightness, contrast, colour: factors, 1 for none.
    """

    flip: bool
    brightness: float
    contrast: float
    colour: float

    @classmethod
    def draw(cls, rng: random.Random) -> "Augmentation":
        low, high = 1 - _COLOUR, 1 + _COLOUR
        return cls(rng.random() < 0.5, *(rng.uniform(low, high) for _ in range(3)))

    def __call__(self, image: "PIL.Image.Image") -> "PIL.Image.Image":
        if self.flip:
            image = require("PIL.ImageOps").mirror(image)
        enhance = require("PIL.ImageEnhance")
        image = enhance.Brightness(image).enhance(self.brightness)
        image = enhance.Contrast(image).enhance(self.contrast)
        return enhance.Color(image).enhance(self.colour)


class Transform:
    """An image's pixels, with an augmentation within.

    Arguments:
        image_transform: a PIL image in RGB to (3, H, W). In a torchvision `Compose` an augmentation
            comes after the first part, which resizes: it takes less time there than before, and
            leaves the padding alone.
    """

    def __init__(self, image_transform: Callable[["PIL.Image.Image"], torch.Tensor]) -> None:
        self._whole = image_transform
        self._steps: Sequence[Callable[[Any], Any]] = getattr(
            image_transform, "transforms", [image_transform]
        )

    def __call__(
        self, image: "PIL.Image.Image", augmentation: Augmentation | None = None
    ) -> torch.Tensor:
        image = middle_of_thin(image)
        if augmentation is None:
            pixels: Any = self._whole(image)
        else:
            steps: list[Callable[[Any], Any]] = [*self._steps]
            steps.insert(1 if len(steps) > 1 else 0, augmentation)
            pixels = image
            for step in steps:
                pixels = step(pixels)
        if not isinstance(pixels, torch.Tensor) or pixels.dim() != 3 or len(pixels) != 3:
            got = tuple(pixels.shape) if isinstance(pixels, torch.Tensor) else type(pixels).__name__
            raise ValueError(f"image_transform: expected it to return (3, H, W), got {got}")
        return pixels
