"""`mnist_ddpm.data`: what loads, what decodes to which pixels, and what is rejected."""

import gzip
import io
import struct
import zipfile
import zlib

import datasets
import huggingface_hub
import numpy as np
import pytest
import torch
from PIL import Image

from mnist_ddpm.data import MNIST, decode_images, load_labels, load_mnist, load_split


def random_image(height=6, width=8, channels=1, seed=0):
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, channels), dtype=np.uint8)
    return Image.fromarray(pixels.squeeze())


def encode(image, file_format="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, file_format, **options)
    return buffer.getvalue()


def image_set(*images):
    """A data set of images, arrays or encoded files."""
    images = [Image.fromarray(image) if isinstance(image, np.ndarray) else image for image in images]
    rows = datasets.Dataset.from_dict({"image": images})
    return rows if rows.features["image"] == datasets.Value("binary") else rows.cast_column("image", datasets.Image())


def decode(*images, **options):
    return decode_images(image_set(*images), **options)


def png(depth, color_type, pixels, transparent=None):
    """One row of pixels as a PNG file, written by hand: Pillow writes neither all depths nor their transparency."""

    def chunk(name, data):
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    samples = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}[color_type]
    width = len(pixels) * 8 // (depth * samples)
    transparency = b"" if transparent is None else chunk(b"tRNS", transparent)
    header = chunk(b"IHDR", struct.pack(">2I5B", width, 1, depth, color_type, 0, 0, 0))
    palette = chunk(b"PLTE", bytes(range(255))) if color_type == 3 else b""
    body = chunk(b"IDAT", zlib.compress(b"\0" + pixels)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + header + palette + transparency + body


@pytest.fixture
def said(caplog):
    """What has been logged by the package."""
    return lambda: [record.getMessage() for record in caplog.records if record.name == "mnist_ddpm.data"]


# Pixels


@pytest.mark.parametrize("channels", [1, 3])
def test_pixels_come_back_as_they_were(channels):
    images = [random_image(channels=channels, seed=seed) for seed in range(5)]
    decoded = decode(*images)
    assert (decoded.dtype, decoded.shape) == (torch.uint8, (5, channels, 6, 8))
    expected = np.stack([np.asarray(image).reshape(6, 8, channels) for image in images])
    np.testing.assert_array_equal(decoded.permute(0, 2, 3, 1).numpy(), expected)


@pytest.mark.parametrize(
    ("mode", "color", "file_format", "expected"),
    [
        ("1", 1, "PNG", [255]),
        ("L", 9, "GIF", [9, 9, 9]),  # a palette
        ("LA", (9, 255), "PNG", [9]),
        ("P", 1, "PNG", [10, 20, 30]),
        ("PA", (1, 255), "TIFF", [10, 20, 30]),
        ("RGB", (1, 2, 3), "BMP", [1, 2, 3]),
        ("RGBA", (1, 2, 3, 255), "PNG", [1, 2, 3]),
        ("RGBA", (1, 2, 3, 4), "PNG", [1, 2, 3, 4]),  # where four channels are asked for
        ("RGBX", (1, 2, 3, 0), "TIFF", [1, 2, 3]),  # the fourth channel is none of transparency
        ("CMYK", (0, 255, 255, 0), "TIFF", [255, 0, 0]),
        ("YCbCr", (128, 128, 128), "JPEG", [128, 128, 128]),
    ],
)
def test_every_mode_has_its_pixels(said, mode, color, file_format, expected):
    """What is opaque loses its alpha without a word."""
    image = Image.new(mode, (2, 2), color if mode not in ("P", "PA") else 0)
    if mode in ("P", "PA"):
        image.putpalette([0, 0, 0, 10, 20, 30])
        image.paste(color, (0, 0, 2, 2))
    decoded = decode(encode(image, file_format), channels=4 if len(expected) == 4 else None)
    assert decoded[0, :, 1, 1].tolist() == expected
    assert not said()


def test_lab_is_converted_to_srgb_and_photos_are_turned_the_right_way_up():
    """L* = 50 is Y = ((50 + 16) / 116)^3 = 0.184, which sRGB encodes as 1.055 Y^(1 / 2.4) - 0.055 = 0.466."""
    decoded = decode(encode(Image.new("LAB", (2, 2), (round(50 * 2.55), 128, 128)), "TIFF"))[0, :, 0, 0]
    assert (decoded - 0.466 * 255).abs().max() <= 1.5
    image, exif = random_image(6, 8), Image.Exif()
    exif[0x0112] = 8  # orientation: turned by 90 degrees, clockwise
    np.testing.assert_array_equal(decode(encode(image, exif=exif))[0, 0], np.rot90(np.asarray(image)))


# Transparency


def over(color, alpha, background):
    """`alpha * color + (1 - alpha) * background`, alpha from 0 to 255."""
    return np.floor((np.asarray(color) * alpha + np.asarray(background) * (255 - alpha)) / 255 + 0.5)


@pytest.mark.parametrize(("background", "rgb"), [("white", [255] * 3), ("black", [0] * 3), ("#804020", [128, 64, 32])])
@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_transparent_images_are_composited(mode, background, rgb, said):
    """All 65,536 pairs of a level and an alpha."""
    alpha, level = np.divmod(np.arange(65_536).reshape(256, 256), 256)
    colors = [level] if mode == "LA" else [level, 255 - level, level // 2]
    image = Image.merge(mode, [Image.fromarray(channel.astype(np.uint8)) for channel in [*colors, alpha]])
    decoded = decode(encode(image), background=background, channels=3)[0]
    expected = [over(color, alpha, ground) for color, ground in zip(colors * (3 // len(colors)), rgb, strict=True)]
    np.testing.assert_array_equal(decoded, expected)
    assert said() == [f"1 of 1 images are transparent: composited on {background}."]


def test_resizing_comes_after_compositing():
    """The color of transparent pixels, here green, leaks nowhere."""
    pixels = np.zeros((8, 8, 4), np.uint8)
    pixels[..., 1] = 255
    pixels[:, 4:] = (0, 0, 0, 255)
    decoded = decode(pixels, resolution=4)[0]
    assert torch.equal(decoded[0], decoded[1])


PALETTE = [[3 * index, 3 * index + 1, 3 * index + 2] for index in range(85)]


@pytest.mark.parametrize(
    ("file", "expected"),
    [
        # a gray level or a color that is transparent, at the depth of the file; the second pixel has another one
        (png(1, 0, b"\x80", b"\0\1"), [[255], [0]]),
        (png(4, 0, b"\x12", b"\0\1"), [[255], [34]]),
        (png(16, 0, b"\x00\x05\x80\x80", b"\0\5"), [[255], [128]]),
        (png(8, 2, bytes([1, 2, 3, 1, 2, 4]), bytes([0, 1, 0, 2, 0, 3])), [[255] * 3, [1, 2, 4]]),
        (png(16, 2, b"\1\0\2\0\3\0\1\0\2\0\4\0", b"\1\0\2\0\3\0"), [[255] * 3, [1, 2, 4]]),
        # an alpha for each entry of the palette
        (png(8, 3, b"\1\2", b"\xff\x33"), [over(PALETTE[1], 51, 255), PALETTE[2]]),
        # an alpha for each pixel
        (png(16, 4, b"\0\0\0\0\x10\0\xff\xff"), [[255], [16]]),
        (png(16, 6, b"\0" * 8 + b"\1\0\2\0\3\0\xff\xff"), [[255] * 3, [1, 2, 3]]),
        (
            encode(Image.new("RGBA", (2, 1), (100, 0, 50, 51)), "WEBP", lossless=True),
            [over([100, 0, 50], 51, 255)] * 2,
        ),
        (encode(Image.new("L", (2, 1), 7), "GIF", transparency=7), [[255] * 3] * 2),
        (encode(Image.new("PA", (2, 1), (0, 0)), "TIFF"), [[255] * 3] * 2),
    ],
)
def test_every_kind_of_transparency_is_composited(file, expected, said):
    decoded = decode(file)[..., :2]  # then come bits up to a byte's end
    assert decoded[0, :, 0].T.tolist() == [list(color) for color in expected]
    assert any("composited on white" in line for line in said())


# More than 8 bits


LEVELS = np.array([[0, 1, 128, 129, 257, 12_345, 40_000, 65_535]])


@pytest.mark.parametrize(
    "file",
    [
        encode(Image.fromarray(LEVELS.astype(np.uint16))),
        encode(Image.fromarray(LEVELS.astype(np.uint16)), "TIFF"),
        encode(Image.fromarray(LEVELS.astype(">u2")), "TIFF"),
        encode(Image.fromarray(LEVELS.astype(np.int32)), "TIFF"),
        b"P5 8 1 65535\n" + LEVELS.astype(">u2").tobytes(),
    ],
    ids=["png", "tiff", "tiff-big-endian", "tiff-int32", "pgm"],
)
def test_16_bits_are_scaled_to_8_and_that_is_said(file, said):
    assert decode(file).flatten().tolist() == [round(level * 255 / 65_535) for level in LEVELS[0]]
    (line,) = said()
    assert "1 of 1 images have more than 8 bits per channel" in line


@pytest.mark.parametrize(
    ("dtype", "images", "expected"),
    [
        (np.int32, [[0, 17, 255]], [0, 17, 255]),
        (np.float32, [[0, 17, 255]], [0, 17, 255]),
        (np.float32, [[0, 0.2, 1]], [0, 51, 255]),
        (np.float32, [[0, 0, 0]], [0, 0, 0]),
        (np.float32, [[-1.0, 1.0]], None),
        (np.float32, [[0.0, 256.0]], None),
        (np.float32, [[0.0, np.nan]], None),
        (np.float32, [[0.0, 1.0], [0.0, 255.0]], None),
        (np.int32, [[-1, 5]], None),
        (np.int32, [[0, 65_536]], None),
        (np.int32, [[0, 65_535], [0, 255]], None),
    ],
)
def test_the_largest_value_says_which_one_is_white_if_it_can(dtype, images, expected, said):
    images = [np.array([levels], dtype) for levels in images]
    if expected is None:
        with pytest.raises(ValueError, match=rf"image_column .*image {len(images) - 1}"):
            decode(*images)
    else:
        assert decode(*images).flatten().tolist() == expected
        assert len(said()) == 1


# Sizes and colors that differ


def test_resolution_resizes_the_shorter_side_and_crops_the_center():
    """A white square of 8 x 8 in the middle of 8 x 16 is what remains. Resizing is bilinear, and antialiased.

    Halved, a pixel is a mean with the weights 1, 3, 3, 1, a triangle twice as wide; at an edge a 1 is cut off.
    """
    pixels = np.zeros((8, 16), np.uint8)
    pixels[:, 4:12] = 255
    assert (decode(pixels, resolution=8) == 255).all()
    assert decode(random_image(), random_image(9, 5), resolution=4).shape == (2, 1, 4, 4)
    expected = [(3 * 0 + 3 * 80 + 160) / 7, (80 + 3 * 160 + 3 * 240) / 7]
    decoded = decode(np.tile(np.uint8([0, 80, 160, 240]), (4, 1)), resolution=2)[0, 0]
    assert decoded[0].tolist() == decoded[1].tolist() == [round(level) for level in expected]


def test_longer_sides_round_and_crop_as_torchvision_does():
    """Resize gives int(4 * 11 / 8) = 5 and int(4 * 9 / 8) = 4; CenterCrop begins at round(0.5) = 0."""
    pixels = np.tile(np.arange(11, dtype=np.uint8) * 20, (8, 1))
    full = decode(pixels, resolution=4, center_crop=False)
    assert full.shape == (1, 1, 4, 5)
    assert torch.equal(decode(pixels, resolution=4), full[..., :4])
    assert decode(random_image(8, 9), resolution=4, center_crop=False).shape == (1, 1, 4, 4)


def test_mixed_sizes_and_colors_need_a_choice():
    sizes = [random_image(), random_image(), random_image(7, 8)]
    with pytest.raises(ValueError, match=r"\(1, 7, 8\) in image 2 and \(1, 6, 8\) before.*--resolution"):
        decode(*sizes)
    with pytest.raises(ValueError, match="center_crop"):
        decode(*sizes, resolution=14, center_crop=False)
    colors = [random_image(), random_image(channels=3)]
    with pytest.raises(ValueError, match="--channels"):
        decode(*colors)
    for channels in (1, 3):
        assert decode(*colors, channels=channels).shape == (2, channels, 6, 8)


@pytest.mark.parametrize(
    ("rows", "name"),
    [
        (image_set(random_image()).rename_column("image", "picture"), "image"),
        (datasets.Dataset.from_dict({"image": [3, 4]}), "image_column"),
        (image_set(random_image()).select([]), "image_column .*0 rows"),
        (image_set(random_image(), None), "image_column .*image 1"),
        *(
            (image_set(encode(random_image()), broken), "image_column .*image 1")
            for broken in (b"no image", encode(random_image(40, 40))[:200], b"")
        ),
    ],
)
def test_what_is_no_image_is_rejected(rows, name):
    with pytest.raises(ValueError, match=name):
        decode_images(rows)


# Labels


@pytest.mark.parametrize(
    ("feature", "values", "labels", "names"),
    [
        (datasets.ClassLabel(names=["b", "a"]), [1, 0, 1], [1, 0, 1], ["b", "a"]),
        (datasets.Value("int64"), [3, 0, 3], [3, 0, 3], ["0", "1", "2", "3"]),
        (datasets.Value("uint8"), [1, 0, 0], [1, 0, 0], ["0", "1"]),
        (datasets.Value("bool"), [True, False, True], [1, 0, 1], ["0", "1"]),
        (datasets.Value("string"), ["dog", "cat", "dog"], [1, 0, 1], ["cat", "dog"]),
        (datasets.Value("large_string"), ["b", "a", "c"], [1, 0, 2], ["a", "b", "c"]),
        (datasets.Value("float32"), [0.5, 1.0], None, None),
        (datasets.List(datasets.Value("int64")), [[0], [1]], None, None),
        (datasets.Value("int64"), [0, None], None, None),
        (datasets.Value("int64"), [0, -1], None, None),
        (datasets.ClassLabel(names=["a"]), [0, -1], None, None),
        (datasets.Value("string"), ["a", None], None, None),
    ],
)
@pytest.mark.parametrize("format_type", [None, "torch"])
def test_labels_and_names_of_classes(feature, values, labels, names, format_type):
    rows = datasets.Dataset.from_dict({"kind": values}, datasets.Features({"kind": feature})).with_format(format_type)
    if labels is None:
        with pytest.raises(ValueError, match="label_column"):
            load_labels(rows, "kind")
        return
    found, found_names = load_labels(rows, "kind")
    assert (found.dtype, found.tolist(), found_names) == (torch.int64, labels, names)


# Loading


@pytest.fixture
def cache_dir(tmp_path):
    return str(tmp_path / "cache")


def save_images(folder, *names):
    """Save an image under each name, and return their pixels, (N, 6, 8)."""
    images = [random_image(seed=seed) for seed in range(len(names))]
    for name, image in zip(names, images, strict=True):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        image.save(folder / name)
    return np.stack([np.asarray(image) for image in images])


def test_mnist_has_its_first_digit_whatever_torchs_default_device():
    with torch.device("meta"):
        images, labels = load_mnist("test[:2]"), load_labels(load_split(MNIST, split="test[:2]"))
    assert (images.shape, images.dtype) == ((2, 1, 28, 28), torch.uint8)
    assert images[0].sum() == 18_454  # a seven of 116 pixels
    assert (labels[0].tolist(), labels[1]) == ([7, 2], list("0123456789"))


def test_parquet_file_and_folder_in_the_hubs_layout(tmp_path, cache_dir):
    images = image_set(*(random_image(seed=seed) for seed in range(4)))
    folder = tmp_path / "set" / "data"
    folder.mkdir(parents=True)
    for split in ("train", "test"):
        images.to_parquet(folder / f"{split}-00000-of-00001.parquet")
    expected = decode_images(images)
    for name in (folder / "train-00000-of-00001.parquet", tmp_path / "set"):
        assert torch.equal(decode_images(load_split(str(name), cache_dir=cache_dir)), expected)
    assert len(load_split(str(tmp_path / "set"), split="test[:3]", cache_dir=cache_dir)) == 3
    assert len(load_split(folder / "test-00000-of-00001.parquet", split="test[1:]", cache_dir=cache_dir)) == 3
    for options in ({"split": "tain"}, {"config_name": "other"}):
        with pytest.raises(ValueError, match="dataset_name"):
            load_split(tmp_path / "set", **options, cache_dir=cache_dir)


@pytest.mark.parametrize("others", [[], ["README.md"], ["0.txt", "1.txt", "2.txt", "3.txt"], ["0.json", "labels.csv"]])
def test_folder_of_images_whatever_else_is_in_it(tmp_path, cache_dir, others):
    pixels = save_images(tmp_path / "set", "0.png", "1.PNG", "2.tiff")
    for name in others:
        (tmp_path / "set" / name).write_text("a caption", encoding="utf-8")
    decoded = decode_images(load_split(str(tmp_path / "set"), cache_dir=cache_dir))
    np.testing.assert_array_equal(decoded[:, 0], pixels)


def test_images_may_be_in_an_archive(tmp_path, cache_dir):
    pixels = save_images(tmp_path / "set", "0.png", "1.png")
    with zipfile.ZipFile(tmp_path / "set" / "more.zip", "w") as archive:
        archive.write(tmp_path / "set" / "1.png", "2.png")
    decoded = decode_images(load_split(tmp_path / "set", cache_dir=cache_dir))
    np.testing.assert_array_equal(decoded[:, 0], pixels[[0, 1, 1]])
    (tmp_path / "set" / "more.zip").write_bytes(b"PK\x03\x04 and more")
    assert str(tmp_path / "set" / "more.zip") in one_line(tmp_path / "set", cache_dir)


def test_folders_of_classes_and_of_splits(tmp_path, cache_dir):
    names = [f"{split}/{kind}/0.png" for split in ("train", "test") for kind in ("cat", "dog")]
    pixels = save_images(tmp_path / "set", *names)
    for name, options in (("set/train", {}), ("set", {"split": "train"})):
        rows = load_split(tmp_path / name, **options, cache_dir=cache_dir)
        np.testing.assert_array_equal(decode_images(rows)[:, 0], pixels[:2])
        labels, classes = load_labels(rows)
        assert (labels.tolist(), classes) == ([0, 1], ["cat", "dog"])


def test_names_that_mean_something_else_to_datasets(tmp_path, cache_dir, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "csv").mkdir()
    for name, folder in {"csv/train.parquet": "csv", "set[1].parquet": "set[1].parquet"}.items():
        image_set(random_image()).to_parquet(name)
        assert len(load_split(folder, cache_dir=cache_dir)) == 1


# MNIST's own files


def write_ubyte(path, array, compress=False):
    path.parent.mkdir(parents=True, exist_ok=True)
    data = struct.pack(f">4B{array.ndim}I", 0, 0, 8, array.ndim, *array.shape) + array.tobytes()
    path.write_bytes(gzip.compress(data) if compress else data)


RANDOM = np.random.default_rng(0).integers(0, 256, (8, 6, 5), dtype=np.uint8)
SPLITS = {"train": (RANDOM[:5], np.uint8([1, 0, 3, 1, 0])), "t10k": (RANDOM[5:], np.uint8([0, 1, 3]))}


def write_mnist(folder, suffixes=("",), separator="-"):
    for split, (images, labels) in SPLITS.items():
        for suffix in suffixes:
            write_ubyte(folder / f"{split}-images{separator}idx3-ubyte{suffix}", images, suffix == ".gz")
            write_ubyte(folder / f"{split}-labels{separator}idx1-ubyte{suffix}", labels, suffix == ".gz")


@pytest.mark.parametrize(("suffixes", "separator"), [(("",), "."), ((".gz",), "-"), (("", ".gz"), "-")])
def test_folder_of_ubyte_files(tmp_path, suffixes, separator):
    """torchvision's `MNIST/raw`, and the folders around it."""
    write_mnist(tmp_path / "MNIST" / "raw", suffixes, separator)
    for name in (tmp_path, tmp_path / "MNIST", tmp_path / "MNIST" / "raw"):
        for split, (images, labels) in zip(("train", "test"), SPLITS.values(), strict=True):
            rows = load_split(name, split=split)
            np.testing.assert_array_equal(decode_images(rows)[:, 0], images)
            assert load_labels(rows)[0].tolist() == labels.tolist()
            assert load_labels(rows)[1] == ["0", "1", "2", "3"]
    assert load_labels(load_split(tmp_path, split="train[1:3]+test[:1]"))[0].tolist() == [0, 3, 0]


@pytest.mark.parametrize(("suffix", "split"), [("", "train"), (".gz", "test"), ("", "train[:2]")])
def test_ubyte_file_is_the_split_that_is_asked_for(tmp_path, suffix, split):
    write_mnist(tmp_path, (suffix,))
    rows = load_split(tmp_path / f"t10k-images-idx3-ubyte{suffix}", split=split)
    expected = SPLITS["t10k"][0][: 2 if "[" in split else None]
    np.testing.assert_array_equal(decode_images(rows)[:, 0], expected)
    assert rows.column_names == ["image", "label"]
    write_ubyte(tmp_path / "pixels", RANDOM)  # of any name, without labels
    assert load_split(tmp_path / "pixels").column_names == ["image"]


# What can't be loaded


def one_line(name, cache_dir):
    """The error for a folder or file, which names it and what it may hold, in one line."""
    with pytest.raises(ValueError, match="dataset_name must be a folder of images") as error:
        load_split(name, cache_dir=cache_dir)
    assert str(name) in str(error.value)
    assert len(str(error.value).splitlines()) == 1
    return str(error.value)


@pytest.mark.parametrize("name", ["/no/such/folder", "./nowhere", "nowhere", "no/such.parquet", "a/b/c"])
def test_missing_folder_is_named_without_asking_the_hub(name, cache_dir, monkeypatch):
    monkeypatch.setattr(huggingface_hub, "HfApi", None)
    assert "No such file" in one_line(name, cache_dir)


def test_neither_folder_nor_data_set_on_the_hub_fails_at_once(hub, cache_dir, monkeypatch):
    monkeypatch.setattr(datasets, "load_dataset", None)  # which would try for long
    assert "no such folder" in one_line("data/typo", cache_dir)
    with hub.refusing_connections():
        one_line("data/typo", cache_dir)
        one_line("my data/typo", cache_dir)


def test_what_is_in_the_cache_needs_no_hub(cache_dir, tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub, "HfApi", None)
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **options: (args, options["split"]))
    (tmp_path / "cache" / "user___my_digits").mkdir(parents=True)
    assert load_split("user/MyDigits", cache_dir=cache_dir) == (("user/MyDigits", None), "train")


def ubyte(kind, *shape):
    """A file of MNIST's format without its values."""
    return struct.pack(f">4B{len(shape)}I", 0, 0, kind, len(shape), *shape)


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("picture", encode(random_image())),
        ("images.npy", b"\x93NUMPY\x01\x00"),
        ("images.npz", b"PK\x03\x04 and more"),
        ("images.csv.gz", gzip.compress(b"1,2,3")),
        ("broken.gz", b"\x1f\x8b\x08 no gzip"),
        ("empty.parquet", b""),
        ("broken.parquet", b"PAR1 cut short"),
        ("train-images-idx3-ubyte", ubyte(8, 2, 28, 28) + b"too short"),
        ("train-images-idx3-ubyte", ubyte(12, 1) + bytes(4)),  # integers
        ("train-labels-idx1-ubyte", ubyte(8, 2) + b"\0\1"),
        ("train-images-idx3-ubyte.gz", gzip.compress(ubyte(8, 1, 2, 2) + b"1234")[:-9]),
    ],
)
@pytest.mark.parametrize("in_folder", [False, True])
def test_files_and_folders_without_images(tmp_path, cache_dir, name, data, in_folder):
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / name).write_bytes(data)
    message = one_line(tmp_path / "set" if in_folder else tmp_path / "set" / name, cache_dir)
    assert name.removesuffix(".gz") in message or "images-idx3" not in name


def test_folders_that_are_not_what_they_seem(tmp_path, cache_dir):
    (tmp_path / "empty").mkdir()
    one_line(tmp_path / "empty", cache_dir)
    image_set(random_image()).save_to_disk(tmp_path / "saved")
    one_line(tmp_path / "saved", cache_dir)
    save_images(tmp_path / "set[1]", "0.png")
    assert "Rename the folder" in one_line(tmp_path / "set[1]", cache_dir)
    for name in ("MNIST", "FashionMNIST"):
        write_mnist(tmp_path / "both" / name / "raw")
    one_line(tmp_path / "both", cache_dir)
    for name in ("letters", "digits"):
        write_ubyte(tmp_path / "emnist" / f"emnist-{name}-train-images-idx3-ubyte", RANDOM)
    one_line(tmp_path / "emnist", cache_dir)
    write_ubyte(tmp_path / "labels" / "train-images-idx3-ubyte", RANDOM)
    write_ubyte(tmp_path / "labels" / "train-labels-idx1-ubyte", np.uint8([0, 1]))  # of another number of images
    one_line(tmp_path / "labels", cache_dir)
