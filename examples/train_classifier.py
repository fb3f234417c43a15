"""Train the MNIST classifier on whose features samples are scored (`src/mnist_ddpm/classifier`)."""

import argparse
import json
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from evaluate import provenance
from train import MNIST, non_negative_int, positive_int

if TYPE_CHECKING:
    import torch
    from transformers import ResNetForImageClassification

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

| images | accuracy |
|---|---|
| test, {num_test_images:,} | {test_accuracy:.2%} |
| validation, the last {num_validation_images:,} of the training images | {validation_accuracy:.2%} |

Trained in {minutes:.0f} minutes ({machine}) by

    {command}

The recipe was fixed beforehand, and no choice was made on the test images:

- the training images without the validation images, each rotated by up to {max_degrees:g} degrees, scaled by up to
  {max_scale:.0%} and shifted by up to {max_shift:g} pixels, anew each time
- AdamW, one-cycle learning rate up to {learning_rate:g}, batch size {train_batch_size}, {num_epochs} epochs,
  {mixed_precision} autocast; the weights of the last step
- plain cross-entropy, for label smoothing would cap the confidence
"""


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    argv = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dataset_name", default=str(MNIST), help="a Hub id or a local folder with both splits")
    parser.add_argument("--output_dir", default="mnist-classifier", help="where the classifier and its card go")
    parser.add_argument("--results", help="a JSON file for accuracy, command, versions and machine")
    parser.add_argument("--num_epochs", type=positive_int, default=24)
    parser.add_argument("--train_batch_size", type=positive_int, default=256)
    parser.add_argument("--learning_rate", type=float, default=3e-3, help="the peak of the one-cycle schedule")
    parser.add_argument(
        "--num_validation_images", type=positive_int, default=5000, help="held out from the end of `train`"
    )
    parser.add_argument("--mixed_precision", choices=("no", "bf16"), default="bf16")
    parser.add_argument("--seed", type=non_negative_int, default=0)
    args = parser.parse_args(argv)
    args.command = ["python", "examples/train_classifier.py", *argv]
    return args


def build_classifier() -> "ResNetForImageClassification":
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


def load_images(dataset_name: str, split: str) -> tuple["torch.Tensor", "torch.Tensor"]:
    """Read a split as pixel values (N, 1, 28, 28) in [-1, 1] and labels (N,)."""
    import torch

    from mnist_ddpm.data import decode_images, load_split

    dataset = load_split(dataset_name, split=split)
    images = decode_images(dataset, resolution=28, channels=1)
    return images / 127.5 - 1, torch.tensor(dataset["label"])


def augment(pixel_values: "torch.Tensor", generator: "torch.Generator") -> "torch.Tensor":
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


def train(
    model: "ResNetForImageClassification",
    images: tuple["torch.Tensor", "torch.Tensor"],
    validation_images: tuple["torch.Tensor", "torch.Tensor"],
    args: argparse.Namespace,
) -> float:
    """Train on pixel values and labels; returns the accuracy on the validation images after the last epoch."""
    import torch
    from tqdm.auto import tqdm

    (pixel_values, labels), device = images, model.device
    generator = torch.Generator().manual_seed(args.seed)
    steps_per_epoch = len(labels) // args.train_batch_size
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.learning_rate, weight_decay=0.05)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=args.learning_rate, total_steps=args.num_epochs * steps_per_epoch
    )
    with tqdm(total=args.num_epochs * steps_per_epoch, desc="train", unit="step") as progress:
        for _ in range(args.num_epochs):
            model.train()
            order = torch.randperm(len(labels), generator=generator)[: steps_per_epoch * args.train_batch_size]
            for indices in order.split(args.train_batch_size):
                x = augment(pixel_values[indices].to(device), generator).contiguous(memory_format=torch.channels_last)
                with torch.autocast(device.type, torch.bfloat16, enabled=args.mixed_precision == "bf16"):
                    loss = model(x, labels=labels[indices].to(device)).loss
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
                scheduler.step()
                progress.update()
            validation_accuracy = accuracy(model, *validation_images)
            progress.set_postfix(loss=f"{loss.item():.4f}", validation_accuracy=f"{validation_accuracy:.4f}")
    return validation_accuracy


def accuracy(
    model: "ResNetForImageClassification", pixel_values: "torch.Tensor", labels: "torch.Tensor", batch_size: int = 1000
) -> float:
    """Share of the images that are given their label, in float32."""
    import torch

    model.eval()
    with torch.inference_mode():
        hits = sum(
            int((model(x.to(model.device)).logits.argmax(dim=1).cpu() == y).sum())
            for x, y in zip(pixel_values.split(batch_size), labels.split(batch_size), strict=True)
        )
    return hits / len(labels)


def save(model: "ResNetForImageClassification", result: dict[str, Any], args: argparse.Namespace) -> None:
    """Write what `AutoModelForImageClassification` and `AutoImageProcessor` load, the card, and the result."""
    output_dir = Path(args.output_dir)
    model.save_pretrained(output_dir)
    (output_dir / "preprocessor_config.json").write_text(json.dumps(PREPROCESSOR, indent=2) + "\n")
    card = CARD.format(
        **(vars(args) | result),
        minutes=result["seconds"] / 60,
        max_degrees=MAX_DEGREES,
        max_scale=MAX_SCALE,
        max_shift=MAX_SHIFT,
    )
    (output_dir / "README.md").write_text(card)
    if args.results:
        Path(args.results).write_text(json.dumps(result, indent=2) + "\n")


def main(args: argparse.Namespace) -> dict[str, Any]:
    """Train, score on the test images, save; returns what `--results` gets."""
    import torch

    torch.manual_seed(args.seed)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = build_classifier().to(device, memory_format=torch.channels_last)
    pixel_values, labels = load_images(args.dataset_name, "train")
    num_train = len(labels) - args.num_validation_images
    start = time.perf_counter()
    validation_accuracy = train(
        model, (pixel_values[:num_train], labels[:num_train]), (pixel_values[num_train:], labels[num_train:]), args
    )
    seconds = time.perf_counter() - start
    test_images = load_images(args.dataset_name, "test")
    result = {
        "test_accuracy": accuracy(model, *test_images),
        "validation_accuracy": validation_accuracy,
        "num_parameters": model.num_parameters(),
        "num_test_images": len(test_images[1]),
        "num_validation_images": args.num_validation_images,
        "seconds": seconds,
        **provenance(args),
    }
    print(f"test accuracy {result['test_accuracy']:.2%}, validation accuracy {validation_accuracy:.2%}")
    save(model, result, args)
    return result


if __name__ == "__main__":
    try:
        main(parse_args())
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
