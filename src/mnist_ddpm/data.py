"""Images for training: a data set on the Hub, a folder or a file, decoded once into one uint8 tensor."""

import glob
import gzip
import itertools
import logging
import re
import zipfile
import zlib
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import suppress
from io import BytesIO
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

if TYPE_CHECKING:
    from datasets import Dataset
    from PIL import Image

logger = logging.getLogger(__name__)

_COPY = Path(__file__).resolve().parents[2] / "data" / "mnist"  # beside src/ in a checkout of the repository
MNIST = str(_COPY) if _COPY.is_dir() else "ylecun/mnist"
"""The data set to train on by default: the copy in the repository, or the one on the Hub."""

READABLE = (
    "a folder of images, of Parquet files or of one set of ubyte files (MNIST's), a Parquet or ubyte file, or a data "
    "set on the Hub"
)
MODE_OF_CHANNELS = {1: "L", 3: "RGB", 4: "RGBA"}
ERRORS = (OSError, SyntaxError, TypeError, ValueError, NotImplementedError)  # of pyarrow and Pillow
IMAGE_SUFFIXES = {".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"}
UBYTE = re.compile(r"images.*ubyte(\.gz)?$")  # train-images-idx3-ubyte, t10k-images.idx3-ubyte.gz


def load_mnist(split: str = "train") -> torch.Tensor:
    """Load the images of MNIST: the copy in the repository, or the one on the Hub.

    Args:
        split: `"train"` (60,000 images), `"test"` (10,000 images) or a slice such as `"train[:1000]"`.

    Returns:
        The images, uint8 of shape `(N, 1, 28, 28)`: white digits (255) on black (0).

    Example:
        >>> images = load_mnist("test[:8]")
        >>> images.shape, images.dtype
        (torch.Size([8, 1, 28, 28]), torch.uint8)
        >>> x_0 = images / 127.5 - 1  # the range in which the U-Net is trained
    """
    return decode_images(load_split(MNIST, split=split))


def load_split(
    dataset_name: str | PathLike[str],
    config_name: str | None = None,
    split: str = "train",
    cache_dir: str | None = None,
) -> "Dataset":
    """Load one split of a data set.

    A local path has priority over the Hub. A folder may hold images (one folder per class gives labels), Parquet
    files in the Hub's layout, or MNIST's original `ubyte` files, as torchvision keeps them in `MNIST/raw`.

    Args:
        dataset_name: local folder, Parquet file, `ubyte` file of images (may be gzipped), or Hub id. A single file is
            taken for the split that is asked for.
        config_name: configuration (subset) of the data set; None where it has only one.
        split: name of the split; slices such as `"train[:1000]"` work too.
        cache_dir: where `datasets` keeps its cache; None for its default.

    Returns:
        The split, not yet decoded. From `ubyte` files it has the column `image`, and `label` if labels are beside.

    Raises:
        ValueError: there is no such folder, file or data set on the Hub, no connection to the Hub, no images that can
            be read, or no such configuration or split.
    """
    import datasets

    path = Path(dataset_name).expanduser()
    try:
        if path.exists():
            return _load_local(path, config_name, split, cache_dir)
        _check_hub(str(dataset_name), path, cache_dir)
        return datasets.load_dataset(path.as_posix(), config_name, split=split, cache_dir=cache_dir)
    except Exception as error:  # of datasets, the formats that it reads, and the HTTP library of huggingface_hub
        reason = " ".join(str(error.__cause__ or error).split())
        if not path.exists() and not isinstance(error, FileNotFoundError):
            reason = f"There is no such folder, and on the Hub: {reason}"
        if set(str(path)) & set("[]*?"):
            reason += " Rename the folder: `datasets` takes [, ], * and ? in a path as a pattern."
        if broken := [str(file) for file in path.rglob("*.zip") if not zipfile.is_zipfile(file)]:
            reason += f" Remove {', '.join(broken)}."
        raise ValueError(
            f"dataset_name must be {READABLE}, got {str(dataset_name)!r} (config_name={config_name!r}, "
            f"split={split!r}). {reason}"
        ) from error


def decode_images(
    dataset: "Dataset",
    image_column: str = "image",
    resolution: int | None = None,
    channels: int | None = None,
    center_crop: bool = True,
    background: str = "white",
) -> torch.Tensor:
    """Decode every image of a data set, once.

    Transparent images are composited, `alpha * color + (1 - alpha) * background`, unless 4 channels are asked for.
    16 bits are scaled to 8. Gray in 32-bit integers must be in 0..255 or 0..65535, and in floats in 0..1 or 0..255,
    the same in all images. What is composited or scaled is logged. There is no random crop.

    Args:
        dataset: data set with a column of images (encoded bytes, or paths).
        image_column: its name.
        resolution: pixels to which the shorter side is resized (bilinear, antialiased); None for images of one size.
        channels: 1 (gray), 3 (RGB) or 4 (RGBA). None for what the images have, gray or RGB, all of them the same.
        center_crop: crop to `resolution` x `resolution` pixels, as diffusers' `--center_crop` does; False keeps the
            longer side.
        background: color below transparent images, by name or as `"#rrggbb"`.

    Returns:
        The images, uint8 of shape `(N, C, H, W)`, in the order of the data set.

    Raises:
        ValueError: there is no such column, no image in it, one that can't be decoded, or images that differ in size
            or color without `resolution` or `channels`.
    """
    from PIL import Image, ImageColor

    color = ImageColor.getrgb(background)[:3]
    seen: Counter[str] = Counter()
    for index, (name, image) in enumerate(_open_images(dataset, image_column, seen)):
        target = channels or (1 if Image.getmodebase(image.mode) == "L" else 3)
        if target != 4 and image.has_transparency_data:
            image = _composite(image, color, seen)
        pixels = _pixels(image.convert(MODE_OF_CHANNELS[target]), resolution, center_crop)
        if index == 0:
            images = torch.empty(len(dataset), *pixels.shape, dtype=torch.uint8, device="cpu")
        elif pixels.shape != images.shape[1:]:
            raise ValueError(
                f"dataset must hold images of one shape (channels, height, width), got {pixels.shape} in {name} and "
                f"{tuple(images.shape[1:])} before. Pass resolution=28 (--resolution 28) with center_crop for one "
                "size, channels=1 (--channels 1) for gray or channels=3 (--channels 3) for RGB."
            )
        images[index] = torch.from_numpy(pixels)
    if seen["transparent"]:
        logger.warning(f"{seen['transparent']} of {len(images)} images are transparent: composited on {background}.")
    if seen["deep"]:
        logger.warning(
            f"{seen['deep']} of {len(images)} images have more than 8 bits per channel: scaled to 8 bits, "
            f"where the largest value is {images.amax()}."
        )
    return images


def load_labels(dataset: "Dataset", label_column: str = "label") -> tuple[torch.Tensor, list[str]]:
    """Read the class of each image.

    Args:
        dataset: data set with a column of labels: a `ClassLabel`, integers from 0, or strings.
        label_column: name of that column.

    Returns:
        The labels, int64 of shape `(N,)`, and the names of the classes: of the `ClassLabel`, the numbers from 0 to the
        largest label, or the strings in alphabetical order.

    Raises:
        ValueError: there is no such column, it holds something else, or a label is missing.

    Example:
        >>> labels, names = load_labels(load_split(MNIST, split="test[:3]"))
        >>> labels, names[7]
        (tensor([7, 2, 1]), '7')
    """
    import datasets

    feature = dataset.select_columns(label_column).features[label_column]
    values = dataset.with_format(None)[label_column][:]
    kind = getattr(feature, "dtype", "")  # int64 for a ClassLabel
    is_text = kind in ("string", "large_string")
    is_number = re.fullmatch(r"u?int\d+|bool", kind)
    rejected = [value for value in values if value is None or not (is_text or (is_number and value >= 0))]
    if rejected:
        raise ValueError(
            f"label_column must hold integers from 0 or strings, got {rejected[0]!r} in {label_column!r} ({feature})."
        )
    if is_text:
        names = sorted(set(values))
        values = [names.index(value) for value in values]
    elif isinstance(feature, datasets.ClassLabel):
        names = feature.names
    else:
        names = [str(label) for label in range(1 + max(values, default=0))]
    return torch.tensor(values, dtype=torch.int64, device="cpu"), names


# Folders and files


def _check_hub(dataset_name: str, path: Path, cache_dir: str | None) -> None:
    """Fail at once if neither the disk nor the Hub has such a data set: `load_dataset` tries for half a minute."""
    import datasets
    from datasets.naming import camelcase_to_snakecase
    from huggingface_hub import HfApi

    if len(path.parts) != 2 or path.is_absolute() or dataset_name[0] in ".~" or path.suffix == ".parquet":
        path.stat()  # no id: the error is that there is no such file
    owner, name = path.parts
    cache = Path(cache_dir or datasets.config.HF_DATASETS_CACHE).expanduser()
    if not (cache / f"{owner}___{camelcase_to_snakecase(name)}").exists():
        HfApi().dataset_info(path.as_posix(), timeout=10)


def _load_local(path: Path, config_name: str | None, split: str, cache_dir: str | None) -> "Dataset":
    """Load a split from a folder or a file, by what is in it."""
    import datasets

    if path.is_file():
        name = split.split("[")[0]  # whichever split is asked for
        with path.open("rb") as file:
            if file.read(4) != b"PAR1":
                return _take({name: _load_ubyte(path)}, split)
        data_files = {name: glob.escape(str(path.absolute()))}
        return datasets.load_dataset("parquet", data_files=data_files, split=split, cache_dir=cache_dir)
    files = list(path.rglob("*"))
    suffixes = {file.suffix.lower() for file in files}
    # torchvision keeps a file both packed and unpacked
    ubytes = {file.with_suffix(file.suffix.removesuffix(".gz")) for file in files if UBYTE.search(file.name)}
    splits = {"test" if re.search("t10k|test", file.name) else "train": file for file in ubytes}
    if splits and len(splits) == len(ubytes):
        return _take({name: _load_ubyte(file) for name, file in splits.items()}, split)
    if not config_name and suffixes & IMAGE_SUFFIXES and not suffixes & {".md", ".parquet"}:
        # named, since `datasets` goes by the most frequent kind of file, which captions or annotations may be
        return datasets.load_dataset("imagefolder", data_dir=str(path), split=split, cache_dir=cache_dir)
    path = path.absolute()  # "csv" alone would name a format
    return datasets.load_dataset(str(path), config_name, split=split, cache_dir=cache_dir)


def _take(splits: "Mapping[str, Dataset]", split: str) -> "Dataset":
    """A split, or slices of splits, as `load_dataset` understands them."""
    import datasets

    parts = datasets.ReadInstruction.from_spec(split).to_absolute({name: len(rows) for name, rows in splits.items()})
    return datasets.concatenate_datasets([splits[part.splitname].select(range(part.from_, part.to)) for part in parts])


def _load_ubyte(path: Path) -> "Dataset":
    """Load a file of images, with the labels that are beside it."""
    import datasets

    images = _read_ubyte(path, 3)
    header = b"P5 %d %d 255\n" % images.shape[:0:-1]  # PGM: width, height, white, and the pixels as they are
    rows: dict[str, list[Any]] = {"image": [{"bytes": header + image.tobytes(), "path": None} for image in images]}
    features = {"image": datasets.Image()}
    name = path.name.removesuffix(".gz").replace("images", "labels").replace("idx3", "idx1")
    if "images" in path.name and any(path.parent.glob(f"{name}*")):
        labels = _read_ubyte(path.with_name(name), 1)
        rows["label"] = labels.tolist()
        features["label"] = datasets.ClassLabel(names=[str(label) for label in range(labels.max() + 1)])
    return datasets.Dataset.from_dict(rows, datasets.Features(features))


def _read_ubyte(path: Path, ndim: int) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """Read MNIST's format, gzipped or not: 0, 0, type, number of dimensions; the dimensions; the values."""
    data = (path if path.exists() else path.with_name(f"{path.name}.gz")).read_bytes()
    with suppress(OSError, EOFError, ValueError, zlib.error):  # where it is cut short
        if data[:2] == b"\x1f\x8b":
            data = gzip.decompress(data)
        if data[:4] == bytes([0, 0, 8, ndim]):  # 8 for unsigned bytes
            shape = np.frombuffer(data, ">u4", count=ndim, offset=4)
            return np.frombuffer(data, np.uint8, offset=4 + shape.nbytes).reshape(shape)
    raise ValueError(f"{path} is neither a Parquet file nor a whole ubyte file of {ndim} dimensions.")


# Images


def _open_images(dataset: "Dataset", image_column: str, seen: "Counter[str]") -> "Iterator[tuple[str, Image.Image]]":
    """Open the images one by one, with a name for messages."""
    import datasets
    from datasets.utils.file_utils import xopen
    from PIL import Image

    encoded = dataset.select_columns(image_column)
    name = f"{len(dataset)} rows of {image_column!r} of type {dataset.features[image_column]}"
    try:
        encoded = encoded.cast_column(image_column, datasets.Image(decode=False)).with_format("arrow")
        rows = (row for batch in encoded.iter(batch_size=1000) for row in batch[image_column].to_pylist())
        for index, row in enumerate(itertools.chain([next(rows)], rows)):  # one row at least
            name = f"image {index}" + (f" ({row['path']})" if row and row["path"] else "")
            data = row["bytes"]
            if data is None:
                with xopen(row["path"], "rb") as file:  # which may be in an archive
                    data = file.read()
            yield name, _open(data, seen)
    except (StopIteration, *ERRORS, Image.DecompressionBombError) as error:
        raise ValueError(f"image_column must hold images, got {name}, which can't be decoded: {error}") from error


def _open(data: bytes, seen: "Counter[str]") -> "Image.Image":
    """Open an image, the right way up, with 8 bits per channel; what Pillow loses on the way is put right."""
    from PIL import Image, ImageCms, ImageOps

    image: Any = Image.open(BytesIO(data))
    rawmode = image.tile[0][3] if image.format == "PNG" else ""
    match rawmode, image.info.get("transparency"):  # the level that is transparent, at the depth of the file
        case "1" | "L;2" | "L;4", int(level):
            image.info["transparency"] = min(255, level * {"1": 255, "L;2": 85, "L;4": 17}[rawmode])
        case "RGB;16B", tuple(levels):
            image.info["transparency"] = tuple(level >> 8 for level in levels)
    ImageOps.exif_transpose(image, in_place=True)
    seen["deep"] += rawmode in ("RGB;16B", "LA;16B", "RGBA;16B") or image.mode[0] in "IF"
    if rawmode == "LA;16B":
        image = image.convert("LA")
    elif image.mode == "LAB":
        lab, srgb = ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB")
        image = ImageCms.profileToProfile(image, lab, srgb, outputMode="RGB")
    return _to_8_bits(image, seen) if image.mode[0] in "IF" else image


def _to_8_bits(image: "Image.Image", seen: "Counter[str]") -> "Image.Image":
    """Scale gray levels of 16 bits; of 32-bit integers and floats the largest value says which one is white."""
    from PIL import Image

    values = np.asarray(image, dtype=np.float64)
    lowest, largest = values.min(), values.max()
    mode = "I;16" if image.format == "PPM" and image.mode == "I" else image.mode  # scaled to 16 bits by Pillow
    whites = {"I": (255, 65535), "F": (1, 255)}.get(mode, (65535,))
    white = next((white for white in whites if lowest >= 0 and largest <= white), None)
    if white is None or (len(whites) > 1 and largest > 0 and seen.setdefault(mode, white) != white):
        unclear = (
            f"its values, {lowest:g} to {largest:g}, don't say which of {whites} is white (the same in all images)"
        )
        raise ValueError(f"{unclear}. Save it with 8 bits.")
    scaled = Image.fromarray(np.rint(values * (255 / white)).astype(np.uint8))
    if (transparent := image.info.get("transparency")) is not None:
        scaled.putalpha(Image.fromarray(np.where(values == transparent, 0, 255).astype(np.uint8)))
    return scaled


def _composite(image: "Image.Image", color: tuple[int, ...], seen: "Counter[str]") -> "Image.Image":
    """Composite a transparent image on a color: alpha * image + (1 - alpha) * color."""
    from PIL import Image

    rgba = image.convert("RGBA")
    seen["transparent"] += rgba.getchannel("A").getextrema() != (255, 255)
    ground = Image.new("RGBA", image.size, color)
    ground.alpha_composite(rgba)
    return ground.convert("RGB")


def _pixels(image: "Image.Image", resolution: int | None, center_crop: bool) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """An image as an array of shape `(C, H, W)`, resized and cropped as torchvision's Resize and CenterCrop do."""
    from PIL import Image

    if resolution is not None:
        width, height = (int(resolution * side / min(image.size)) for side in image.size)
        image = image.resize((width, height), Image.Resampling.BILINEAR)
        if center_crop:
            left, top = round((width - resolution) / 2), round((height - resolution) / 2)
            image = image.crop((left, top, left + resolution, top + resolution))
    pixels = np.array(image)  # (H, W) or (H, W, C)
    return pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)
