"""scikit-learn's handwritten digits: 1797 images of 8 x 8, which come with the package."""

import dataclasses
import io
import random
from typing import TYPE_CHECKING

from flamingo_fast.models.extras import require

if TYPE_CHECKING:
    import PIL.Image

# The images have 17 greys.
_WHITE = 16
# Pixels of varied images; how far they are turned and moved at most.
_LARGE, _DEGREES, _MOVE = 28, 10, 2


@dataclasses.dataclass(frozen=True)
class Digits:
    """Images and which digit each is.

    Attributes:
        images: grey, 8 x 8.
        labels: 0 to 9.
        train, test: indices; no image is in both.
    """

    images: "list[PIL.Image.Image]"
    labels: list[int]
    train: list[int]
    test: list[int]

    def png(self, index: int) -> bytes:
        """An image's file."""
        return _png(self.images[index])

    def varied_png(self, index: int, rng: random.Random) -> bytes:
        """The same, larger, a little turned and moved. Not mirrored: a digit is then none."""
        bicubic = require("PIL.Image").Resampling.BICUBIC
        large = self.images[index].resize((_LARGE, _LARGE), bicubic)
        angle = rng.uniform(-_DEGREES, _DEGREES)
        move = (rng.randint(-_MOVE, _MOVE), rng.randint(-_MOVE, _MOVE))
        return _png(large.rotate(angle, bicubic, translate=move))


def load_digits(seed: int, test: int = 360) -> Digits:
    """All images, of which `test` random ones are held out.

    Raises:
        ImportError: scikit-learn is not installed.
        ValueError: as many images as there are, or more, are to be held out.
    """
    found = require("sklearn.datasets", "demo").load_digits()
    labels = [int(label) for label in found.target]
    if not 0 < test < len(labels):
        raise ValueError(f"test: expected 1 to {len(labels) - 1} images, got {test}")
    greys = (found.images * (255 / _WHITE)).round().astype("uint8")
    images = [require("PIL.Image").fromarray(each) for each in greys]
    order = list(range(len(labels)))
    random.Random(seed).shuffle(order)
    return Digits(images, labels, sorted(order[test:]), sorted(order[:test]))


def _png(image: "PIL.Image.Image") -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()
