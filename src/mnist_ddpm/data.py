"""Images for training: a data set from the Hub, a folder or a Parquet file, decoded once into one uint8 tensor."""

import io
import itertools
import math
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

if TYPE_CHECKING:
    from datasets import Dataset
    from PIL import Image

_COPY = Path(__file__).resolve().parents[2] / "data" / "mnist"  # beside src/ in a checkout of the repository
MNIST = str(_COPY) if _COPY.is_dir() else "ylecun/mnist"
"""The data set to train on by default: the copy in the repository, or the one on the Hub."""

MODE_OF_CHANNELS = {1: "L", 3: "RGB", 4: "RGBA"}
# PIL's modes with 8 bits or less a channel, and the channels that such an image has unless others are asked for
CHANNELS_OF_MODE = {"1": 1, "L": 1, "LA": 1, "P": 3, "RGB": 3, "RGBA": 3, "CMYK": 3, "YCbCr": 3}


def load_split(
    dataset_name: str, config_name: str | None = None, split: str = "train", cache_dir: str | None = None
) -> "Dataset":
    """Load one split of a data set.

    Args:
        dataset_name: a local folder (Parquet files in the Hub's layout, or images), a Parquet file, or the id of a
            data set on the Hub; what exists locally goes first.
        config_name: configuration (subset) of the data set; None where it has one only.
        split: name of the split; slices such as `"train[:1000]"` work too.
        cache_dir: where `datasets` keeps what it has prepared; None for its own place.

    Returns:
        The split, not yet decoded.

    Raises:
        FileNotFoundError: there is neither such a folder or file nor such a data set on the Hub.
        ValueError: it has no such configuration or split, or no data that `datasets` can read.
    """
    import datasets

    path = Path(dataset_name).expanduser()
    looks_local = path.is_absolute() or dataset_name.startswith((".", "~")) or len(path.parts) != 2
    if not path.exists() and (looks_local or path.suffix == ".parquet"):
        raise FileNotFoundError(
            f"dataset_name: there is no folder or file {dataset_name!r}. Name a folder of Parquet files or images, a "
            "Parquet file, or a data set on the Hub (`owner/name`)."
        )
    try:
        if path.is_file():
            base_split = split.split("[")[0]
            return datasets.load_dataset(
                "parquet", data_files={base_split: str(path)}, split=split, cache_dir=cache_dir
            )
        source = str(path) if path.exists() else dataset_name
        return datasets.load_dataset(source, config_name, split=split, cache_dir=cache_dir)
    except datasets.exceptions.DatasetNotFoundError as error:
        raise FileNotFoundError(
            f"dataset_name: {dataset_name!r} is no local folder, and on the Hub: {error}"
        ) from error
    except (ValueError, datasets.exceptions.DatasetGenerationError) as error:
        reason = error.__cause__ or error
        raise ValueError(
            f"{dataset_name!r} could not be loaded with config_name={config_name!r}, split={split!r}: {reason}"
        ) from error


def decode_images(
    dataset: "Dataset", image_column: str = "image", resolution: int | None = None, channels: int | None = None
) -> torch.Tensor:
    """Decode every image of a data set, once.

    Args:
        dataset: data set with a column of images (encoded bytes or paths to files).
        image_column: name of that column.
        resolution: height and width in pixels; each image is resized, its shorter side to `resolution`, and its
            center is cropped. None keeps the images as they are, which must then all have one size.
        channels: 1 (gray), 3 (RGB) or 4 (RGBA). None for what the images have, gray or RGB, all of them the same.

    Returns:
        The images, uint8 of shape `(N, C, H, W)`, in the order of the data set.

    Raises:
        ValueError: there is no such column, no image in it, or images that can't be decoded, or that differ in size
            or in color without `resolution` or `channels` to make them one.
        MemoryError: the images would not fit in the memory that is free; the message says how large they are.
    """
    if resolution is not None and resolution < 1:
        raise ValueError(f"resolution must be a positive number of pixels or None, but it is {resolution}.")
    if channels is not None and channels not in MODE_OF_CHANNELS:
        raise ValueError(f"channels must be one of {list(MODE_OF_CHANNELS)} or None, but it is {channels}.")
    if len(dataset) == 0:
        raise ValueError("The data set is empty: there is no image to train on.")

    images: torch.Tensor | None = None
    for index, image in enumerate(_open_images(dataset, image_column)):
        found = _channels(image, index)
        if images is None:
            target = channels or found
        elif channels is None and found != target:
            raise ValueError(
                f"Image {index} has {found} channels and those before it have {target}: pass channels=1 (gray) or "
                "channels=3 (RGB) to have them all alike."
            )
        pixels = _pixels(image, MODE_OF_CHANNELS[target], resolution)
        if images is None:
            images = _allocate(len(dataset), *pixels.shape)
        elif pixels.shape != images.shape[1:]:
            (height, width), (first_height, first_width) = pixels.shape[1:], images.shape[2:]
            raise ValueError(
                f"Image {index} has {width} x {height} pixels and those before it {first_width} x {first_height}: set "
                "a resolution (--resolution in examples/train.py) to have them all resized and cropped."
            )
        images[index] = torch.from_numpy(pixels)
    assert images is not None  # the data set isn't empty
    return images


def _open_images(dataset: "Dataset", image_column: str) -> "Iterator[Image.Image]":
    """Open the images one by one, decoded and the right way up."""
    import datasets
    from PIL import Image, ImageOps

    if image_column not in dataset.column_names:
        raise ValueError(
            f"image_column: the data set has no column {image_column!r}. Its columns are: "
            f"{', '.join(map(repr, dataset.column_names))}."
        )
    try:
        encoded = dataset.select_columns(image_column).cast_column(image_column, datasets.Image(decode=False))
        batches = encoded.with_format("arrow").iter(batch_size=1000)
        rows = (row for batch in batches for row in batch[image_column].to_pylist())
        first = next(rows)
    except (TypeError, ValueError, NotImplementedError) as error:  # whatever pyarrow makes of it
        raise ValueError(
            f"image_column: the column {image_column!r} holds no images, but {dataset.features[image_column]}."
        ) from error
    for index, row in enumerate(itertools.chain([first], rows)):
        try:
            if row is None:
                raise ValueError("it is missing")
            image = Image.open(io.BytesIO(row["bytes"]) if row["bytes"] is not None else row["path"])
            ImageOps.exif_transpose(image, in_place=True)
        except (OSError, SyntaxError, TypeError, ValueError, Image.DecompressionBombError) as error:
            raise ValueError(f"Image {index} of the column {image_column!r} can't be decoded: {error}") from error
        yield image


def _channels(image: "Image.Image", index: int) -> int:
    """The channels of an image, gray or RGB."""
    if image.mode not in CHANNELS_OF_MODE:
        raise ValueError(
            f"Image {index} has PIL's mode {image.mode!r}, and only 8-bit images are taken: convert it to one of "
            f"{', '.join(CHANNELS_OF_MODE)}."
        )
    return CHANNELS_OF_MODE[image.mode]


def _pixels(image: "Image.Image", mode: str, resolution: int | None) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """An image as an array of shape `(C, H, W)`."""
    from PIL import Image, ImageOps

    if image.mode != mode:
        image = image.convert(mode)
    if resolution is not None and image.size != (resolution, resolution):
        image = ImageOps.fit(image, (resolution, resolution), Image.Resampling.LANCZOS)
    pixels = np.array(image)  # (H, W) or (H, W, C)
    return pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)


def _allocate(*shape: int) -> torch.Tensor:
    """An empty uint8 tensor, if the memory for it is there."""
    import psutil

    needed, free = math.prod(shape), psutil.virtual_memory().available
    if needed > free:
        raise MemoryError(
            f"{shape[0]:,} images of shape {shape[1:]} take {needed / 2**30:.1f} GiB, and {free / 2**30:.1f} GiB of "
            "memory are free: use a lower resolution, or a slice of the split such as 'train[:10000]'."
        )
    return torch.empty(shape, dtype=torch.uint8)
