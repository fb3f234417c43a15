"""A classifier two-sample test (arXiv 1610.06545): can a network learn to tell samples from real images?

FID and its company, on the features of a classifier of digits, do not see small errors of gray levels. This test does.
"""

import torch
import torch.nn.functional as F
from torch import nn


def two_sample_accuracy(
    images: torch.Tensor,
    real: torch.Tensor,
    seed: int = 0,
    num_epochs: int = 8,
    batch_size: int = 64,
    learning_rate: float = 2e-3,
    device: str | torch.device = "cpu",
) -> float:
    """Train a small network to tell two sets of images apart; returns its accuracy on images that it never saw.

    It is trained on a random half of each set and tested on the other halves: 0.5 means that it can't tell.

    Args:
        images: uint8 (N, C, H, W).
        real: uint8 (N, C, H, W), as many.
        seed: Of the halves, the weights and the batches.
        num_epochs: Passes over the halves to train on.
        batch_size: Images at a time.
        learning_rate: The peak of AdamW's one-cycle schedule.
        device: Where to train.

    Raises:
        RuntimeError: If the sets differ in size or shape.
    """
    generator = torch.Generator().manual_seed(seed)
    sets = torch.stack([images, real])  # of one size, or else a guess would be right more often than not
    halves = [part[torch.randperm(len(part), generator=generator)].tensor_split(2) for part in sets]
    train, test = (torch.cat(half).to(device).float() / 127.5 - 1 for half in zip(*halves, strict=True))
    train_labels, test_labels = (_labels(half).to(device) for half in zip(*halves, strict=True))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = _network(images.shape[1]).to(device)

    optimizer = torch.optim.AdamW(network.parameters(), weight_decay=0.01)
    batches_per_epoch = -(-len(train) // batch_size)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, num_epochs * batches_per_epoch)
    for _ in range(num_epochs):
        for batch in torch.randperm(len(train), generator=generator).tensor_split(batches_per_epoch):
            loss = F.binary_cross_entropy_with_logits(network(train[batch]).flatten(), train_labels[batch])
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            scheduler.step()

    network.eval()
    with torch.inference_mode():
        logits = torch.cat([network(batch).flatten() for batch in torch.split(test, 500)])
    return float(((logits > 0) == (test_labels > 0)).double().mean())


def two_sample_scores(
    images: torch.Tensor, real: torch.Tensor, seed: int = 0, device: str | torch.device = "cpu"
) -> dict[str, float]:
    """How well a network tells images from real ones, and how many of their pixels are black, white, or nearly so.

    Args:
        images: uint8 (N, C, H, W).
        real: uint8 (N, C, H, W), as many.
        seed: As in `two_sample_accuracy`.
        device: Where to train.

    Returns:
        `two_sample_accuracy`; `two_sample_accuracy_snapped`, the same after `snap_levels`; `pixels_0`,
        `pixels_1_to_8`, `pixels_247_to_254`, `pixels_255`, shares of the pixels of `images`.
    """
    ranges = {"pixels_0": (0, 0), "pixels_1_to_8": (1, 8), "pixels_247_to_254": (247, 254), "pixels_255": (255, 255)}
    return {
        "two_sample_accuracy": two_sample_accuracy(images, real, seed, device=device),
        "two_sample_accuracy_snapped": two_sample_accuracy(
            snap_levels(images), snap_levels(real), seed, device=device
        ),
        **{name: float(((a <= images) & (images <= b)).double().mean()) for name, (a, b) in ranges.items()},
    }


def snap_levels(images: torch.Tensor) -> torch.Tensor:
    """Set gray levels up to 12 to 0 and from 243 on to 255: what is left to tell images apart by is their shapes."""
    return images.masked_fill(images <= 12, 0).masked_fill(images >= 243, 255)


def _labels(half: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """1 for the images, 0 for the real ones."""
    return torch.cat([torch.ones(len(half[0])), torch.zeros(len(half[1]))])


def _network(channels: int) -> nn.Sequential:
    """Four convolutions, and a linear layer on the means of the last one's outputs."""
    layers: list[nn.Module] = []
    for width, stride in ((16, 1), (32, 2), (64, 2), (128, 2)):
        layers += [nn.Conv2d(channels, width, 3, stride, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
        channels = width
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 1))
