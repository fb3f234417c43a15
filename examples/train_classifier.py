"""Train the MNIST classifier on whose features samples are scored (`src/mnist_ddpm/classifier`)."""

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

MAX_DEGREES, MAX_SCALE, MAX_SHIFT = 12.0, 0.1, 2.0  # of the augmentation: rotation, relative size, pixels
PREPROCESSOR = {
    "image_processor_type": "ViTImageProcessor",
    "do_resize": True,
    "size": {"height": 28, "width": 28},
    "do_rescale": True,
    "do_normalize": True,
    "image_mean": [0.5],
    "image_std": [0.5],
}
CARD = """---
license: apache-2.0
library_name: transformers
pipeline_tag: image-classification
datasets: [ylecun/mnist]
metrics: [accuracy]
---

# An MNIST classifier to score samples with

A ResNet of transformers with {num_parameters:,} parameters: gray images of 28 x 28 pixels in [-1, 1] in, the digits 0
to 9 out. `mnist_ddpm.metrics` takes its pooled features for FID, KID, precision and recall, and its probabilities for
the share of each digit and the confidence.

Accuracy: {test_accuracy:.2%} on the test images, {validation_accuracy:.2%} on the last {num_validation_images:,}
training images, which were held out. No choice was made on the test images. Trained in {minutes:.0f} minutes
({machine}) by

    {command}

with random rotation, scaling and shifts, AdamW, a one-cycle learning rate and plain cross-entropy: label smoothing
would cap the confidence.
"""


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    argv = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--dataset_name", help="Hub id or local folder with both splits; by default MNIST.")
    parser.add_argument("--output_dir", type=Path, default=Path("mnist-classifier"), help="For classifier and card.")
    parser.add_argument("--results", type=Path, help="A JSON file for accuracy, command, versions and machine.")
    parser.add_argument("--num_epochs", type=int, default=24)
    parser.add_argument("--train_batch_size", type=int, default=256)
    parser.add_argument("--learning_rate", type=float, default=3e-3, help="The peak of the one-cycle schedule.")
    parser.add_argument("--num_validation_images", type=int, default=5000, help="Held out from the end of train.")
    parser.add_argument("--mixed_precision", choices=("no", "bf16"), default="bf16")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    for name in ("num_epochs", "train_batch_size", "num_validation_images"):
        if (value := getattr(args, name)) < 1:
            parser.error(f"--{name} must be at least 1, got {value}.")
    args.command = ["python", "examples/train_classifier.py", *argv]
    return args


def build_classifier() -> Any:
    """Make a small ResNet: its stem takes 28 x 28 to 7 x 7 by strides of 4, its second stage to 4 x 4."""
    from transformers import ResNetConfig, ResNetForImageClassification

    config = ResNetConfig(
        num_channels=1,
        embedding_size=64,
        hidden_sizes=[64, 128],  # a third stage would see 2 x 2, too little to be worth its parameters
        depths=[2, 2],
        layer_type="basic",
        id2label={digit: str(digit) for digit in range(10)},
        label2id={str(digit): digit for digit in range(10)},
    )
    return ResNetForImageClassification(config)


def load_images(dataset_name: str | None, split: str) -> tuple[Any, Any]:
    """Read a split as pixel values (N, 1, 28, 28) in [-1, 1] and labels (N,)."""
    import torch

    from mnist_ddpm.data import MNIST, decode_images, load_split

    dataset = load_split(dataset_name or MNIST, split=split)
    return decode_images(dataset, resolution=28, channels=1) / 127.5 - 1, torch.tensor(dataset["label"])


def augment(pixel_values: Any, generator: Any) -> Any:
    """Rotate, scale and shift each image of (B, 1, H, W) in [-1, 1] by its own uniform amounts."""
    import torch
    import torch.nn.functional as F

    batch_size, height = len(pixel_values), pixel_values.shape[-2]
    angle, scale, shift_x, shift_y = torch.rand(4, batch_size, generator=generator) * 2 - 1
    angle, scale = angle * torch.pi * MAX_DEGREES / 180, 1 + scale * MAX_SCALE
    cos, sin = angle.cos() / scale, angle.sin() / scale
    shift_x, shift_y = shift_x * 2 * MAX_SHIFT / height, shift_y * 2 * MAX_SHIFT / height  # affine_grid spans [-1, 1]
    matrices = torch.stack([cos, -sin, shift_x, sin, cos, shift_y], dim=1).view(batch_size, 2, 3)
    grid = F.affine_grid(matrices.to(pixel_values.device), list(pixel_values.shape), align_corners=False)
    return F.grid_sample(pixel_values + 1, grid, align_corners=False) - 1  # what enters from outside is black


def train(model: Any, pixel_values: Any, labels: Any, args: argparse.Namespace) -> None:
    """Train on pixel values (N, 1, 28, 28) and labels (N,)."""
    import torch
    from tqdm.auto import trange

    device, generator = model.device, torch.Generator().manual_seed(args.seed)
    steps_per_epoch = len(labels) // args.train_batch_size
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.learning_rate, weight_decay=0.05)
    steps = args.num_epochs * steps_per_epoch
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=args.learning_rate, total_steps=steps)
    model.train()
    for step in trange(steps, desc="train", unit="step"):
        if step % steps_per_epoch == 0:
            order = torch.randperm(len(labels), generator=generator).split(args.train_batch_size)
        batch = order[step % steps_per_epoch]
        x = augment(pixel_values[batch].to(device), generator).contiguous(memory_format=torch.channels_last)
        with torch.autocast(device.type, torch.bfloat16, enabled=args.mixed_precision == "bf16"):
            loss = model(x, labels=labels[batch].to(device)).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()


def accuracy(model: Any, pixel_values: Any, labels: Any, batch_size: int = 1000) -> float:
    """Share of the images that are given their label, in float32."""
    import torch

    model.eval()
    with torch.inference_mode():
        classes = [model(x.to(model.device)).logits.argmax(dim=1).cpu() for x in pixel_values.split(batch_size)]
    return float((torch.cat(classes) == labels).double().mean())


def main(args: argparse.Namespace) -> dict[str, Any]:
    """Train, score on the test images, save; returns what `--results` gets."""
    import torch

    from mnist_ddpm.cli import check_writable, provenance

    for path in (args.output_dir / "README.md", args.results):
        if path:
            check_writable(path)
    torch.manual_seed(args.seed)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = build_classifier().to(device, memory_format=torch.channels_last)
    pixel_values, labels = load_images(args.dataset_name, "train")
    num_train = len(labels) - args.num_validation_images
    start = time.perf_counter()
    train(model, pixel_values[:num_train], labels[:num_train], args)
    seconds = time.perf_counter() - start
    test_images = load_images(args.dataset_name, "test")
    result = {
        "test_accuracy": accuracy(model, *test_images),
        "validation_accuracy": accuracy(model, pixel_values[num_train:], labels[num_train:]),
        "num_parameters": model.num_parameters(),
        "num_test_images": len(test_images[1]),
        "num_validation_images": args.num_validation_images,
        "seconds": seconds,
        **provenance(args),
    }
    print(f"test accuracy {result['test_accuracy']:.2%}, validation accuracy {result['validation_accuracy']:.2%}")
    # what AutoModelForImageClassification and AutoImageProcessor load, and the card
    model.save_pretrained(args.output_dir)
    preprocessor = json.dumps(PREPROCESSOR, indent=2) + "\n"
    (args.output_dir / "preprocessor_config.json").write_text(preprocessor, encoding="utf-8")
    (args.output_dir / "README.md").write_text(CARD.format(**result, minutes=seconds / 60), encoding="utf-8")
    if args.results:
        args.results.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    return result


if __name__ == "__main__":
    try:
        main(parse_args())
    except ModuleNotFoundError as error:
        sys.exit(f"error: {error}. Install what is missing: pip install -e '.[eval]'")
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
