"""Training at a size that takes a second: 24 images of 8 x 8 pixels and a U-Net of some thousand weights."""

from pathlib import Path

import datasets
import numpy as np
from PIL import Image

from mnist_ddpm import MNISTUNet2DModel

NUM_IMAGES = 24
CLASSES = ["dot", "line", "cross"]
UNET = {"block_out_channels": (4, 8), "attention_head_dim": 4, "layers_per_block": 1, "norm_num_groups": 2}


def write_images(folder: Path, size: int = 8, channels: int = 1) -> Path:
    """A data set of random images in Parquet files, one of them for each split."""
    shape = (NUM_IMAGES, size, size, 3)[: 3 + (channels == 3)]
    pixels = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    images = [Image.fromarray(image) for image in pixels]
    features = {"image": datasets.Image(), "picture": datasets.Image(), "label": datasets.ClassLabel(names=CLASSES)}
    rows = {"image": images, "picture": images, "label": [n % len(CLASSES) for n in range(NUM_IMAGES)]}
    dataset = datasets.Dataset.from_dict(rows, datasets.Features(features))
    for split, count in (("train", NUM_IMAGES), ("test", 16)):
        dataset.select(range(count)).to_parquet(folder / f"{split}-00000-of-00001.parquet")
    return folder


def write_workplace(folder: Path, **unet: object) -> Path:
    """A folder with a data set in `images`, and with the U-Net's config in `unet`."""
    write_images(folder / "images")
    MNISTUNet2DModel(**{"sample_size": 8} | UNET | unet).save_config(folder / "unet")
    return folder


def command_line(workplace: Path, *flags: object, **defaults: object) -> list[str]:
    """Flags of a short run on those images: six steps of four images unless the flags say otherwise."""
    words = [word for flag in flags for word in (flag.split() if isinstance(flag, str) else [str(flag)])]
    defaults = {
        "dataset_name": workplace / "images",
        "cache_dir": workplace / "cache",
        "model_config_name_or_path": workplace / "unet",
        "mixed_precision": "no",
        "train_batch_size": 4,
        "lr_warmup_steps": 2,
        "eval_batch_size": 2,
        "ddpm_num_inference_steps": 2,
        "logger": "none",
    } | defaults
    if "--num_epochs" not in words:
        defaults.setdefault("max_train_steps", 6)
    return [str(part) for name, value in defaults.items() for part in (f"--{name}", value)] + words
