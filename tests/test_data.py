"""`mnist_ddpm.data`: what loads, what decodes to which pixels, and what is refused."""

import io

import datasets
import numpy as np
import psutil
import pytest
import torch
from PIL import Image

from mnist_ddpm.data import decode_images, load_split


def random_image(height=6, width=8, channels=1, seed=0):
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, channels), dtype=np.uint8)
    return Image.fromarray(pixels.squeeze())


def image_set(images, column="image"):
    return datasets.Dataset.from_dict({column: images, "label": [0] * len(images)}).cast_column(
        column, datasets.Image()
    )


# Decoding


@pytest.mark.parametrize("channels", [1, 3])
def test_pixels_come_back_as_they_were(channels):
    images = [random_image(channels=channels, seed=seed) for seed in range(5)]
    decoded = decode_images(image_set(images))
    assert decoded.dtype == torch.uint8
    assert decoded.shape == (5, channels, 6, 8)
    expected = np.stack([np.asarray(image).reshape(6, 8, channels) for image in images])
    np.testing.assert_array_equal(decoded.permute(0, 2, 3, 1).numpy(), expected)


def test_image_column_is_the_one_named():
    image = random_image()
    np.testing.assert_array_equal(decode_images(image_set([image], "picture"), "picture")[0, 0], np.asarray(image))


def test_bytes_without_a_type_are_images_too():
    buffer = io.BytesIO()
    random_image().save(buffer, "PNG")
    decoded = decode_images(datasets.Dataset.from_dict({"image": [buffer.getvalue()]}))
    np.testing.assert_array_equal(decoded[0, 0], np.asarray(random_image()))


def test_resolution_crops_the_center_and_resizes():
    # a white square of 8 x 8 in the middle of 8 x 16 is what remains, at any resolution
    pixels = np.zeros((8, 16), np.uint8)
    pixels[:, 4:12] = 255
    assert (decode_images(image_set([Image.fromarray(pixels)]), resolution=8) == 255).all()
    assert decode_images(image_set([random_image(), random_image(9, 5)]), resolution=4).shape == (2, 1, 4, 4)
    constant = Image.new("L", (16, 16), 7)
    assert (decode_images(image_set([constant]), resolution=4) == 7).all()


@pytest.mark.parametrize(("channels", "expected"), [(1, [76]), (3, [255, 0, 0]), (4, [255, 0, 0, 255])])
def test_channels_convert_the_color(channels, expected):
    red = Image.new("RGB", (2, 2), (255, 0, 0))  # luma of red: 0.299 * 255 = 76
    assert decode_images(image_set([red]), channels=channels)[0, :, 0, 0].tolist() == expected


def test_photos_are_turned_the_right_way_up():
    image = random_image(6, 8)
    exif = Image.Exif()
    exif[0x0112] = 8  # orientation: turned by 90 degrees, clockwise
    buffer = io.BytesIO()
    image.save(buffer, "PNG", exif=exif)
    decoded = decode_images(datasets.Dataset.from_dict({"image": [buffer.getvalue()]}))
    np.testing.assert_array_equal(decoded[0, 0], np.rot90(np.asarray(image)))


def test_no_such_column_names_the_columns():
    with pytest.raises(ValueError, match=r"image_column: .*'image'.*'picture', 'label'"):
        decode_images(image_set([random_image()], "picture"))


def test_column_without_images_is_refused():
    with pytest.raises(ValueError, match="image_column: the column 'label' holds no images"):
        decode_images(image_set([random_image()]), "label")


def test_mixed_sizes_need_a_resolution():
    with pytest.raises(ValueError, match="Image 2 has 8 x 7 pixels and those before it 8 x 6: set a resolution"):
        decode_images(image_set([random_image(), random_image(), random_image(7, 8)]))


def test_mixed_colors_need_channels():
    mixed = image_set([random_image(), random_image(channels=3)])
    with pytest.raises(ValueError, match="Image 1 has 3 channels and those before it have 1: pass channels"):
        decode_images(mixed)
    assert decode_images(mixed, channels=3).shape == (2, 3, 6, 8)


def test_undecodable_image_is_named():
    good = io.BytesIO()
    random_image(40, 40).save(good, "PNG")
    for broken in (b"no image", good.getvalue()[:200], b""):
        images = datasets.Dataset.from_dict({"image": [good.getvalue(), broken]})
        with pytest.raises(ValueError, match="Image 1 of the column 'image' can't be decoded"):
            decode_images(images)


def test_missing_image_is_named():
    with pytest.raises(ValueError, match="Image 1 of the column 'image' can't be decoded: it is missing"):
        decode_images(image_set([random_image(), None]))


def test_more_than_8_bits_are_refused():
    deep = Image.fromarray(np.full((4, 4), 40_000, np.uint16))
    with pytest.raises(ValueError, match="Image 0 has PIL's mode 'I;16', and only 8-bit images are taken"):
        decode_images(image_set([deep]))


def test_empty_set_is_refused():
    with pytest.raises(ValueError, match="The data set is empty"):
        decode_images(image_set([random_image()]).select([]))


def test_too_large_for_the_memory_is_refused_with_its_size():
    images = image_set([Image.new("L", (1, 1))]).select([0] * 100_000)
    resolution = round((2 * psutil.virtual_memory().total / len(images)) ** 0.5)
    with pytest.raises(
        MemoryError, match=rf"100,000 images of shape \(1, {resolution}, {resolution}\) take \d+\.\d GiB"
    ):
        decode_images(images, resolution=resolution)


@pytest.mark.parametrize(("argument", "value"), [("resolution", 0), ("channels", 2)])
def test_arguments_out_of_range_are_named(argument, value):
    with pytest.raises(ValueError, match=f"{argument} must be .*{value}"):
        decode_images(image_set([random_image()]), **{argument: value})


# Loading


@pytest.fixture
def cache_dir(tmp_path):
    return str(tmp_path / "cache")


def test_parquet_file_and_folder_in_the_hubs_layout(tmp_path, cache_dir):
    images = image_set([random_image(seed=seed) for seed in range(4)])
    folder = tmp_path / "set" / "data"
    folder.mkdir(parents=True)
    for split in ("train", "test"):
        images.to_parquet(folder / f"{split}-00000-of-00001.parquet")
    expected = decode_images(images)
    for name in (folder / "train-00000-of-00001.parquet", tmp_path / "set"):
        loaded = load_split(str(name), cache_dir=cache_dir)
        assert torch.equal(decode_images(loaded), expected)
    assert len(load_split(str(tmp_path / "set"), split="test[:3]", cache_dir=cache_dir)) == 3
    with pytest.raises(ValueError, match=r"could not be loaded with config_name=None, split='tain'.*train"):
        load_split(str(tmp_path / "set"), split="tain", cache_dir=cache_dir)
    with pytest.raises(ValueError, match=r"could not be loaded with config_name='other'"):
        load_split(str(tmp_path / "set"), "other", cache_dir=cache_dir)


def test_folder_of_images(tmp_path, cache_dir):
    folder = tmp_path / "pictures"
    folder.mkdir()
    for index in range(3):
        random_image(seed=index).save(folder / f"{index}.png")
    decoded = decode_images(load_split(str(folder), cache_dir=cache_dir))
    np.testing.assert_array_equal(decoded[:, 0], [np.asarray(random_image(seed=index)) for index in range(3)])


def test_folder_without_data_is_named(tmp_path, cache_dir):
    (tmp_path / "empty").mkdir()
    with pytest.raises((ValueError, FileNotFoundError), match="empty"):
        load_split(str(tmp_path / "empty"), cache_dir=cache_dir)


@pytest.mark.parametrize("name", ["/no/such/folder", "./nowhere", "nowhere", "no/such.parquet", "a/b/c"])
def test_missing_folder_is_named_without_asking_the_hub(name, monkeypatch):
    monkeypatch.setattr(datasets, "load_dataset", None)  # would raise another error
    with pytest.raises(FileNotFoundError, match=f"dataset_name: there is no folder or file '{name}'"):
        load_split(name)


def test_broken_parquet_file_is_named(tmp_path, cache_dir):
    path = tmp_path / "broken.parquet"
    path.write_bytes(b"PAR1 cut short")
    with pytest.raises(ValueError, match=r"broken\.parquet' could not be loaded"):
        load_split(str(path), cache_dir=cache_dir)
