"""Many images as one picture."""

import math
from collections.abc import Sequence

from PIL import Image


def image_grid(images: Sequence[Image.Image], columns: int | None = None) -> Image.Image:
    """Arrange images of one size and mode in rows, left to right; empty cells are black.

    Args:
        images: At least one.
        columns: How many in a row; by default the grid is as square as possible.

    Returns:
        The grid, in the mode of the images.

    Example:
        >>> image_grid([Image.new("L", (28, 28))] * 10).size
        (112, 84)
    """
    columns = columns or math.ceil(math.sqrt(len(images)))
    width, height = images[0].size
    grid = Image.new(images[0].mode, (columns * width, math.ceil(len(images) / columns) * height))
    for i, image in enumerate(images):
        grid.paste(image, (i % columns * width, i // columns * height))
    return grid
