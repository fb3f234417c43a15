"""How good the samples of a pipeline are: what the benchmarks that compare pipelines have in common."""

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from mnist_ddpm import MNISTDDPMPipeline
from mnist_ddpm.data import MNIST, decode_images, load_split
from mnist_ddpm.metrics import (
    ClassifierFeatures,
    class_scores,
    extract_features,
    frechet_distance,
    random_subset,
)
from mnist_ddpm.sampling import sample_tensor
from mnist_ddpm.training.batches import Batch
from mnist_ddpm.training.loss import DiffusionLoss


class Quality:
    """FID and the share of clear digits, on the features of the MNIST classifier, against all training images.

    Args:
        num_images: how many samples each pipeline is scored by; FID depends on it, so compare at equal numbers only.
        seed: of the noise that they begin with: sample i begins with the same noise in every pipeline.
        batch_size: samples at a time.
        device: where the pipelines are.
        dataset_name: of the real images.

    Attributes:
        floor: the same scores of as many real test images.
    """

    def __init__(
        self,
        num_images: int,
        seed: int = 0,
        batch_size: int = 250,
        device: str = "cpu",
        dataset_name: str = MNIST,
    ):
        self.num_images, self.seed, self.batch_size, self.device = num_images, seed, batch_size, device
        self.classifier = ClassifierFeatures.from_pretrained().to(device)
        self.reference = extract_features(self.classifier, decode_images(load_split(dataset_name, split="train")))
        test = decode_images(load_split(dataset_name, split="test"))
        self.floor = self.score(random_subset(test, num_images, seed))

    def score(self, images: torch.Tensor) -> dict[str, float]:
        """FID and the share of confidently read digits of uint8 images (N, 1, 28, 28)."""
        features = extract_features(self.classifier, images)
        confident_share = class_scores(self.classifier.logits(features))["confident_share"]
        return {"fid": frechet_distance(features, self.reference), "confident_share": float(confident_share)}

    def __call__(self, pipe: Any, bf16: bool, **options: Any) -> dict[str, float]:
        """Sample by a pipeline, called with `options`, and score it; with the samples per second that it gave."""
        start = time.perf_counter()
        with in_bf16(self.device, bf16):
            images = sample_tensor(pipe, self.num_images, self.seed, self.batch_size, **options)
        seconds = time.perf_counter() - start
        return {**self.score(images), "samples_per_second": self.num_images / seconds}


def earlier_figures(path: Path, key: str, settings: dict[str, Any]) -> dict[str, Any]:
    """What a result file has under `key` already, so that a run that was stopped resumes.

    Raises:
        ValueError: its figures were made with other settings.
    """
    if not path.exists():
        return {}
    earlier = json.loads(path.read_text(encoding="utf-8"))
    if earlier["settings"] != settings:
        raise ValueError(
            f"output must be a file of figures with {settings}, got {path} with {earlier['settings']}. Name another."
        )
    figures: dict[str, Any] = earlier[key]
    return figures


def write_json(result: dict[str, Any], path: Path) -> None:
    """Write what there is so far."""
    path.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


@torch.no_grad()
def loss_over_t(pipe: MNISTDDPMPipeline, images: torch.Tensor, timesteps: torch.Tensor, seed: int = 0) -> torch.Tensor:
    """The loss of training at each timestep, on the same images and noise for each pipeline.

    Args:
        pipe: a pipeline.
        images: uint8 (N, 1, 28, 28), that it was not trained on.
        timesteps: (M,)
        seed: of the noise.

    Returns:
        The mean squared error of what the U-Net predicts, (M,).
    """
    generator = torch.Generator().manual_seed(seed)
    loss = DiffusionLoss(pipe.scheduler, None, pipe.device)
    clean_images = (images / 127.5 - 1).to(pipe.device)
    losses = []
    for t in timesteps.to(pipe.device):
        noise = torch.randn(images.shape, generator=generator).to(pipe.device)
        losses.append(loss(pipe.unet, Batch(clean_images, noise, t.expand(len(images)))))
    return torch.stack(losses).cpu()


@contextmanager
def in_bf16(device: str, enabled: bool) -> Iterator[None]:
    """Networks compute in bfloat16, as in training; schedulers stay in float32."""
    with torch.autocast(torch.device(device).type, torch.bfloat16, enabled=enabled):
        yield
