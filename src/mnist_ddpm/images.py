"""Many images as one picture."""

import math
from collections.abc import Sequence

from PIL import Image


def image_grid(images: Sequence[Image.Image], columns: int | None = None) -> Image.Image:
    """Arrange images of one size and mode in rows, left to right; cells that are left over stay black.

    Args:
        images: At least one.
        columns: How many in a row; None makes the grid as square as can be.

    Returns:
        The grid, in the mode of the images.

    Raises:
        ValueError: If there are no images, or fewer than one column is asked for.

    Example:
        >>> image_grid([Image.new("L", (28, 28))] * 10).size
        (112, 84)
    """
    if not images:
        raise ValueError("`images` must hold at least one image")
    if columns is None:
        columns = math.ceil(math.sqrt(len(images)))
    if columns < 1:
        raise ValueError(f"`columns` must be at least 1, got {columns}")
    width, height = images[0].size
    grid = Image.new(images[0].mode, (columns * width, math.ceil(len(images) / columns) * height))
    for i, image in enumerate(images):
        grid.paste(image, (i % columns * width, i // columns * height))
    return grid
