"""The two-sample test: a coin toss for two halves of one set, near certainty for what anybody sees."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from mnist_ddpm.data import decode_images, load_split
from mnist_ddpm.two_sample import snap_levels, two_sample_accuracy, two_sample_scores

DATA = str(Path(__file__).parent.parent / "data" / "mnist")


@pytest.fixture(scope="module")
def real() -> torch.Tensor:
    """400 real digits in a random order."""
    images = decode_images(load_split(DATA, split="train[:400]"))
    return images[torch.randperm(400, generator=torch.Generator().manual_seed(0))]


def faint(images: torch.Tensor) -> torch.Tensor:
    """What nobody sees: the black pixels at gray levels from 1 to 8."""
    levels = torch.randint(1, 9, images.shape, generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    return torch.where(images == 0, levels, images)


def blurred(images: torch.Tensor) -> torch.Tensor:
    return F.avg_pool2d(images.float(), 3, stride=1, padding=1).round().byte()


def noise(images: torch.Tensor) -> torch.Tensor:
    return torch.randint(256, images.shape, generator=torch.Generator().manual_seed(0), dtype=torch.uint8)


def test_two_halves_of_one_set_cannot_be_told_apart(real):
    accuracy = two_sample_accuracy(real[:200], real[200:], num_epochs=4)
    assert accuracy == pytest.approx(0.5, abs=0.125)  # 200 tosses of a fair coin: standard deviation 0.035


@pytest.mark.parametrize("change", [faint, blurred, noise])
def test_what_differs_is_told_apart(real, change):
    assert two_sample_accuracy(change(real[:200]), real[200:], batch_size=32) > 0.9


def test_snapped_levels_hide_what_nobody_sees_but_not_the_shapes(real):
    torch.testing.assert_close(
        snap_levels(torch.tensor([0, 12, 13, 242, 243, 255], dtype=torch.uint8)),
        torch.tensor([0, 0, 13, 242, 255, 255], dtype=torch.uint8),
    )
    assert torch.equal(snap_levels(faint(real)), snap_levels(real))
    assert two_sample_accuracy(snap_levels(blurred(real[:200])), snap_levels(real[200:]), batch_size=32) > 0.9


def test_shares_of_pixels():
    images = torch.tensor([0, 0, 1, 8, 9, 246, 247, 254, 255, 255], dtype=torch.uint8).view(2, 1, 1, 5)
    scores = two_sample_scores(images, images)
    shares = {name: share for name, share in scores.items() if name.startswith("pixels")}
    assert shares == {"pixels_0": 0.2, "pixels_1_to_8": 0.2, "pixels_247_to_254": 0.2, "pixels_255": 0.2}


def test_the_accuracy_depends_on_the_seed_alone_and_leaves_the_global_generator(real):
    images, others = blurred(real[:60]), real[60:120]
    state = torch.get_rng_state()
    first = two_sample_accuracy(images, others, num_epochs=2)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(5)
    assert two_sample_accuracy(images, others, num_epochs=2) == first


def test_sets_of_different_sizes_are_rejected(real):
    with pytest.raises(RuntimeError, match="equal size"):
        two_sample_accuracy(real[:10], real[:20])
