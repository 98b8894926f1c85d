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
        file = io.BytesIO()
        self.images[index].save(file, "PNG")
        return file.getvalue()


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
