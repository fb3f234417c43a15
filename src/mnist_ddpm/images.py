"""Many images as one picture, and in files: grids, strips, GIFs; folders and arrays of samples."""

import math
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image


def image_grid(images: Sequence[Image.Image], columns: int | None = None) -> Image.Image:
    """Arrange images of one size and mode in rows, left to right; cells that are left over stay black.

    Args:
        images: At least one.
        columns: How many in a row; None makes the grid as square as can be.

    Returns:
        The grid, in the mode of the images.

    Example:
        >>> image_grid([Image.new("L", (28, 28))] * 10).size
        (112, 84)
    """
    if columns is None:
        columns = math.ceil(math.sqrt(len(images)))
    width, height = images[0].size
    grid = Image.new(images[0].mode, (columns * width, math.ceil(len(images) / columns) * height))
    for i, image in enumerate(images):
        grid.paste(image, (i % columns * width, i // columns * height))
    return grid


def save_trajectory(steps: Sequence[Sequence[Image.Image]], path: Path, columns: int = 12) -> None:
    """Show how images come about: an animation (.gif), or else a strip with time from left to right.

    Args:
        steps: For each step the same number of images.
        path: The file; an animation shows each step in a grid of two columns.
        columns: How many steps a strip shows, at most.
    """
    if path.suffix == ".gif":
        first, *others = [image_grid(images, columns=2) for images in steps]
        durations = [80] * len(others) + [2000]  # milliseconds; the last one stays
        first.save(path, save_all=True, append_images=others, duration=durations, loop=0)
    else:
        columns = min(len(steps), columns)
        shown = [steps[round((i + 1) * len(steps) / columns) - 1] for i in range(columns)]
        image_grid([image for row in zip(*shown, strict=True) for image in row], columns).save(path)


def read_samples(path: str | Path, num_images: int | None = None) -> torch.Tensor:
    """Read gray images that any program made.

    Args:
        path: A folder of images; or a .npy file, uint8 or floats in [0, 1], (N, H, W), (N, 1, H, W) or (N, H, W, 1).
        num_images: How many from the beginning; None for all.

    Returns:
        uint8 (N, 1, H, W).

    Raises:
        ValueError: If there is something else, or too few images.
        OSError: If there is no such file.
    """
    from mnist_ddpm.data import decode_images, load_split

    if os.path.isdir(path):
        images = decode_images(load_split(str(path)), channels=1).squeeze(1).numpy()
    else:
        images = np.asarray(np.load(path, allow_pickle=False))
    if images.ndim == 4 and 1 in (images.shape[1], images.shape[3]):
        images = images.squeeze(1 if images.shape[1] == 1 else 3)
    is_fraction = np.issubdtype(images.dtype, np.floating) and images.size and images.min() >= 0 and images.max() <= 1
    least = num_images or 1
    if images.ndim != 3 or len(images) < least or not (images.dtype == np.uint8 or is_fraction):
        raise ValueError(
            f"samples must be {least} or more, uint8 or floats in [0, 1] without NaN, of shape (N, H, W), "
            f"(N, 1, H, W) or (N, H, W, 1), got {images.dtype} of shape {images.shape} in {path}."
        )
    images = images[:num_images]
    return torch.from_numpy((images * 255).round().astype(np.uint8) if is_fraction else images).unsqueeze(1)
