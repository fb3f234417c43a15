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


IMAGES = np.random.default_rng(0).integers(0, 256, (12, 28, 28), dtype=np.uint8)


def save(folder, samples: np.ndarray) -> str:
    np.save(folder / "samples.npy", samples)
    return str(folder / "samples.npy")


def test_arrays_are_read_in_each_layout_as_bytes_or_as_fractions(tmp_path):
    expected = torch.from_numpy(IMAGES)[:, None]
    layouts = [IMAGES, IMAGES[:, None], IMAGES[..., None]]
    for samples in [*layouts, *(x / np.float32(255) for x in layouts), IMAGES / 255]:
        assert torch.equal(read_samples(save(tmp_path, samples)), expected)
    assert torch.equal(read_samples(save(tmp_path, IMAGES), num_images=5), expected[:5])


def test_a_folder_is_read_in_the_order_of_its_names(tmp_path):
    for i, image in enumerate(IMAGES):
        Image.fromarray(image).save(tmp_path / f"{i:06}.png")
    (tmp_path / "settings.json").write_text("{}", encoding="utf-8")
    for count in (None, 1):
        assert torch.equal(read_samples(str(tmp_path), count), torch.from_numpy(IMAGES[:count])[:, None])


@pytest.mark.parametrize(
    "samples",
    [
        IMAGES.astype(np.int64),
        IMAGES / 127.5 - 1,
        np.where(IMAGES > 0, IMAGES / 255, np.nan),
        IMAGES.reshape(12, 784),
        np.stack([IMAGES] * 3, axis=1),
        IMAGES[:0],
        IMAGES[:1],
    ],
)
def test_other_arrays_are_rejected(tmp_path, samples):
    with pytest.raises(ValueError, match="samples must be 2 or more"):
        read_samples(save(tmp_path, samples), num_images=2)


def test_other_files_are_rejected(tmp_path):
    (tmp_path / "text.npy").write_text("seven", encoding="utf-8")
    np.savez(tmp_path / "many.npz", images=IMAGES)
    np.save(tmp_path / "pickled.npy", IMAGES.astype(object))
    for name, match in {"text.npy": "pickle", "many.npz": "samples", "pickled.npy": "pickle"}.items():
        with pytest.raises(ValueError, match=match):
            read_samples(tmp_path / name)
