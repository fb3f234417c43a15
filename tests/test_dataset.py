"""data/mnist holds the original MNIST, byte for byte, in the layout of the Hub's `ylecun/mnist`."""

import hashlib
import re
import struct
from pathlib import Path

import datasets
import numpy as np
import pytest

DATA_DIR = Path(__file__).resolve().parent.parent / "data" / "mnist"
IDX_IMAGES, IDX_LABELS = 0x803, 0x801  # IDX magic numbers: unsigned bytes (8) of 3 dimensions, of 1 dimension
NUM_IMAGES = {"train": 60_000, "test": 10_000}


@pytest.fixture(scope="module")
def mnist(tmp_path_factory) -> datasets.DatasetDict:
    return datasets.load_dataset(str(DATA_DIR), cache_dir=str(tmp_path_factory.mktemp("datasets")))


@pytest.fixture(scope="module", params=NUM_IMAGES)
def raw(request, mnist) -> tuple[str, np.ndarray, np.ndarray]:
    """A split's name, images `(N, 28, 28)` and labels `(N,)`, uint8."""
    split = mnist[request.param]
    images = np.stack([np.asarray(image) for image in split["image"]])
    return request.param, images, np.array(split["label"], dtype=np.uint8)


def sums(data: bytes) -> tuple[str, ...]:
    """Size, MD5 and SHA-256, as the card writes them."""
    return f"{len(data):,}", hashlib.md5(data).hexdigest(), hashlib.sha256(data).hexdigest()


def sums_on_card(name: str) -> tuple[str, ...]:
    """Size, MD5 and SHA-256 from the row of the card's tables that begins with `name`."""
    card = (DATA_DIR / "README.md").read_text(encoding="utf-8")
    (row,) = re.findall(rf"^\| `?{name}`? \| ([\d,]+) \| `([0-9a-f]{{32}})` \| `([0-9a-f]{{64}})` \|$", card, re.M)
    return row


def test_layout_is_that_of_the_hub(mnist):
    assert datasets.get_dataset_config_names(str(DATA_DIR)) == ["mnist"]
    assert {split: len(rows) for split, rows in mnist.items()} == NUM_IMAGES
    for rows in mnist.values():
        assert rows.features == {
            "image": datasets.Image(),
            "label": datasets.ClassLabel(names=[str(digit) for digit in range(10)]),
        }
        assert rows[0]["image"].mode == "L"


def test_idx_files_put_together_again_and_raw_bytes_have_the_sums_on_the_card(raw):
    split, images, labels = raw
    idx, plain = {"train": ("train", "training"), "test": ("t10k", "test")}[split]
    images_file = struct.pack(">4I", IDX_IMAGES, *images.shape) + images.tobytes()
    labels_file = struct.pack(">2I", IDX_LABELS, *labels.shape) + labels.tobytes()
    assert sums(images_file) == sums_on_card(f"{idx}-images-idx3-ubyte")
    assert sums(labels_file) == sums_on_card(f"{idx}-labels-idx1-ubyte")
    assert sums(images.tobytes()) == sums_on_card(f"{plain} images")
    assert sums(labels.tobytes()) == sums_on_card(f"{plain} labels")


def test_counts_per_digit_are_those_on_the_card(raw):
    split, _, labels = raw
    counts = [*np.bincount(labels, minlength=10), len(labels)]
    row = "| ".join(f"{count:,} " for count in counts)
    assert f"| {split} | {row}|" in (DATA_DIR / "README.md").read_text(encoding="utf-8")
