"""Pictures of many images, and images of files."""

import numpy as np
import pytest
import torch
from PIL import Image

from mnist_ddpm.images import image_grid, read_samples, save_trajectory


def gray(*levels: int) -> list[Image.Image]:
    return [Image.new("L", (2, 1), color=level) for level in levels]


def test_image_grid():
    np.testing.assert_array_equal(np.asarray(image_grid(gray(1, 2, 3))), [[1, 1, 2, 2], [3, 3, 0, 0]])
    np.testing.assert_array_equal(np.asarray(image_grid(gray(1, 2, 3), columns=1)), [[1, 1], [2, 2], [3, 3]])


@pytest.mark.parametrize(("num_steps", "shown"), [(3, [0, 1, 2]), (24, list(range(1, 24, 2)))])
def test_a_strip_shows_time_from_left_to_right(tmp_path, num_steps, shown):
    save_trajectory([gray(i, 100 + i) for i in range(num_steps)], tmp_path / "strip.png")
    strip = np.asarray(Image.open(tmp_path / "strip.png"))
    np.testing.assert_array_equal(strip[:, ::2], [shown, [100 + i for i in shown]])


def test_an_animation_shows_each_step(tmp_path):
    save_trajectory([gray(i, 100 + i) for i in range(3)], tmp_path / "steps.gif")
    animation = Image.open(tmp_path / "steps.gif")
    assert (animation.n_frames, animation.size) == (3, (4, 1))


@pytest.fixture
def images() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (12, 28, 28), dtype=np.uint8)


def save(folder, samples: np.ndarray) -> str:
    np.save(folder / "samples.npy", samples)
    return str(folder / "samples.npy")


def test_arrays_are_read_in_each_layout_as_bytes_or_as_fractions(tmp_path, images):
    expected = torch.from_numpy(images)[:, None]
    layouts = [images, images[:, None], images[..., None]]
    for samples in [*layouts, *(x / np.float32(255) for x in layouts), images / 255]:
        assert torch.equal(read_samples(save(tmp_path, samples)), expected)
    assert torch.equal(read_samples(save(tmp_path, images), num_images=5), expected[:5])


def test_a_folder_is_read_in_the_order_of_its_names(tmp_path, images):
    for i, image in enumerate(images):
        Image.fromarray(image).save(tmp_path / f"{i:06}.png")
    (tmp_path / "settings.json").write_text("{}", encoding="utf-8")
    assert torch.equal(read_samples(str(tmp_path)), torch.from_numpy(images)[:, None])
    assert torch.equal(read_samples(str(tmp_path), num_images=1), torch.from_numpy(images[:1])[:, None])


@pytest.mark.parametrize(
    "change",
    [
        lambda x: x.astype(np.int64),
        lambda x: x / 127.5 - 1,
        lambda x: np.where(x > 0, x / 255, np.nan),
        lambda x: x.reshape(12, 784),
        lambda x: np.stack([x, x, x], axis=1),
        lambda x: x[:0],
    ],
)
def test_other_arrays_are_rejected(tmp_path, images, change):
    with pytest.raises(ValueError, match="samples"):
        read_samples(save(tmp_path, change(images)))


def test_other_files_are_rejected(tmp_path, images):
    (tmp_path / "text.npy").write_text("seven", encoding="utf-8")
    np.savez(tmp_path / "many.npz", images=images)
    np.save(tmp_path / "pickled.npy", images.astype(object))
    for name in ("text.npy", "many.npz", "pickled.npy"):
        with pytest.raises(ValueError, match="samples"):
            read_samples(tmp_path / name)
    with pytest.raises(ValueError, match="samples must be 13 or more"):
        read_samples(save(tmp_path, images), num_images=13)
