"""What is random in a training step: which images, which timesteps, which noise, which labels are hidden.

All of it is a function of the seed and of global counters, so that it is the same whatever the number of processes, of
accumulated micro-batches or of restarts, and there is no state of a random number generator to save.
"""

import math
from typing import NamedTuple

import numpy as np
import torch
from accelerate import Accelerator

from mnist_ddpm.data import decode_images, load_labels, load_split
from mnist_ddpm.training.arguments import TrainingArguments

ORDER_STREAM, NOISE_STREAM, FLIP_STREAM, LABEL_STREAM = range(4)  # what is drawn, each independent of the others


class Batch(NamedTuple):
    """Images in [-1, 1] and noise, both `(B, C, H, W)` in float32; for each a timestep and a class, `(B,)`."""

    clean_images: torch.Tensor
    noise: torch.Tensor
    timesteps: torch.Tensor
    class_labels: torch.Tensor | None = None  # where one is hidden, the number of classes


class TrainingBatches:
    """The batches of a run; they run on across the borders of epochs, so that no image is left out.

    Args:
        images: uint8 `(N, C, H, W)`, on the training device or on the host.
        batch_size: images of one optimizer step, over all processes and micro-batches.
        timestep_probabilities: p(t) for each timestep, `(T,)`.
        seed: of the order of the images, the timesteps and the noise.
        device: where the batches are made.
        random_flip: flip each image horizontally with probability 1/2.
        labels: the class of each image, int64 `(N,)`; None for none.
        num_classes: how many classes there are.
        label_dropout: the probability with which a label is hidden.
        stream: batches of other streams of the same seed are independent of these.
    """

    def __init__(
        self,
        images: torch.Tensor,
        batch_size: int,
        timestep_probabilities: torch.Tensor,
        seed: int,
        device: torch.device,
        random_flip: bool = False,
        labels: torch.Tensor | None = None,
        num_classes: int = 0,
        label_dropout: float = 0.0,
        stream: int = 0,
    ):
        self.images = images
        self.batch_size = batch_size
        self.cdf = timestep_probabilities.cumsum(0).float().to(device)
        self.seed = seed
        self.device = device
        self.random_flip = random_flip
        self.labels = None if labels is None else labels.to(images.device)
        self.num_classes = num_classes
        self.label_dropout = label_dropout
        self.stream = stream
        self._orders: dict[int, torch.Tensor] = {}

    def micro_batches(
        self, step: int, num_micro_batches: int, process: int = 0, num_processes: int = 1
    ) -> list[Batch]:
        """What one process computes in `step` (counted from 0): its share, in micro-batches.

        What is random is drawn for the whole step, on each process the same, and then divided.
        """
        generator = self._generator(NOISE_STREAM, step, self.device)
        timesteps = stratified_timesteps(self.batch_size, self.cdf, generator)
        shape = (self.batch_size, *self.images.shape[1:])
        noise = torch.randn(shape, generator=generator, device=self.device)
        flips, hidden = self._draw(FLIP_STREAM, step) < 0.5, self._draw(LABEL_STREAM, step) < self.label_dropout
        columns = (self._indices(step), flips, hidden, noise, timesteps)
        parts = zip(*(column.chunk(num_micro_batches * num_processes) for column in columns), strict=True)
        return [
            Batch(self._clean_images(index, flip), noise, timesteps, self._class_labels(index, hidden))
            for index, flip, hidden, noise, timesteps in list(parts)[process::num_processes]
        ]

    def _clean_images(self, index: torch.Tensor, flip: torch.Tensor) -> torch.Tensor:
        """Images in [-1, 1] on the training device, those flipped that are to be."""
        images = self._to_device(self.images[index]).float() / 127.5 - 1
        return torch.where(flip[:, None, None, None], images.flip(-1), images) if self.random_flip else images

    def _class_labels(self, index: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor | None:
        """The classes of images, on the training device; None where there are none."""
        if self.labels is None:
            return None
        return self._to_device(self.labels[index]).masked_fill(hidden, self.num_classes)

    def _draw(self, stream: int, step: int) -> torch.Tensor:
        """A number in [0, 1) for each image of `step`."""
        generator = self._generator(stream, step, self.device)
        return torch.rand(self.batch_size, generator=generator, device=self.device)

    def _indices(self, step: int) -> torch.Tensor:
        """Which images `step` trains on: sample n of the run is the (n mod N)-th in the order of epoch n // N."""
        num_images = len(self.images)
        first, end = step * self.batch_size, (step + 1) * self.batch_size
        epochs = range(first // num_images, (end - 1) // num_images + 1)
        self._orders = {
            epoch: self._orders[epoch] if epoch in self._orders else self._order(epoch) for epoch in epochs
        }
        start = epochs[0] * num_images
        return torch.cat([self._orders[epoch] for epoch in epochs])[first - start : end - start]

    def _order(self, epoch: int) -> torch.Tensor:
        """A random order of all images, where they are: once for an epoch, as the host waits for the device here."""
        generator = self._generator(ORDER_STREAM, epoch, torch.device("cpu"))
        return torch.randperm(len(self.images), generator=generator).to(self.images.device)

    def _to_device(self, data: torch.Tensor) -> torch.Tensor:
        """Images or labels on the training device, without a wait for it."""
        from_host_to_gpu = data.device.type == "cpu" and self.device.type == "cuda"
        return data.pin_memory().to(self.device, non_blocking=True) if from_host_to_gpu else data.to(self.device)

    def _generator(self, stream: int, counter: int, device: torch.device) -> torch.Generator:
        """A generator whose seed is a hash of the run's seed, the streams and the counter."""
        words = [self.seed, 4 * self.stream + stream, counter]  # four streams of draws in each stream of batches
        seed = np.random.SeedSequence(words).generate_state(1, np.uint32).item()
        return torch.Generator(device).manual_seed(seed)


def load_images(
    args: TrainingArguments, accelerator: Accelerator, channels: int | None
) -> tuple[torch.Tensor, torch.Tensor | None, dict[int, str]]:
    """All images, uint8 `(N, C, H, W)`; where there is a `label_column`, the class of each, `(N,)`, and their names.

    The images are on the training device, or on the host if they would fill half of its memory.

    Raises:
        ValueError: the data set holds no images or labels, or the images are not all of the same kind.
        OSError: there is no such data set.
        MemoryError: the images fit nowhere.
    """
    with accelerator.main_process_first():
        dataset = load_split(args.dataset_name, args.dataset_config_name, args.split, args.cache_dir)
    labels, names = load_labels(dataset, args.label_column) if args.label_column else (None, [])
    images = decode_images(
        dataset, args.image_column, args.resolution, channels, center_crop=args.center_crop, background=args.background
    )
    if accelerator.device.type != "cuda" or images.numel() <= torch.cuda.mem_get_info(accelerator.device)[0] // 2:
        images = images.to(accelerator.device)
    return images, labels, dict(enumerate(names))


def timestep_probabilities(args: TrainingArguments) -> torch.Tensor:
    """p(t) of the timesteps that training draws, `(T,)`."""
    if args.timestep_sampling == "uniform":
        return uniform_probabilities(args.ddpm_num_steps)
    return logit_normal_probabilities(args.ddpm_num_steps, args.logit_mean, args.logit_std, args.uniform_share)


def uniform_probabilities(num_train_timesteps: int) -> torch.Tensor:
    """The same p(t) for each timestep, float64 `(T,)` (DDPM, Algorithm 1)."""
    return torch.full((num_train_timesteps,), 1 / num_train_timesteps, dtype=torch.float64, device="cpu")


def logit_normal_probabilities(
    num_train_timesteps: int, mean: float = 0.0, std: float = 1.0, uniform_share: float = 0.0
) -> torch.Tensor:
    """p(t) where the logit of t / T is normal (Stable Diffusion 3, arXiv 2403.03206, section 3.1), float64 `(T,)`.

    Most of the training goes to the middle, where the error is hardest to reduce. Timesteps near 0 and T are hardly
    ever drawn: `uniform_share` of the draws are uniform instead, half of them in t and half in log(t + 1).
    """
    borders = torch.linspace(0, 1, num_train_timesteps + 1, dtype=torch.float64, device="cpu")
    logit_normal: torch.Tensor = torch.special.ndtr((torch.logit(borders) - mean) / std).diff()
    log_uniform = torch.log1p(borders * num_train_timesteps).diff() / math.log1p(num_train_timesteps)
    both = (uniform_probabilities(num_train_timesteps) + log_uniform) / 2
    return (1 - uniform_share) * logit_normal + uniform_share * both


def stratified_timesteps(count: int, cdf: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Timesteps `(count,)`, each distributed by its `cdf` `(T,)`, but stratified.

    They are the quantiles of numbers u in [0, 1), one in each of `count` equal slices, shuffled. This lowers the
    variance of the loss, as the one offset for all slices does in VDM (arXiv 2107.00630, appendix I.1).
    """
    device = generator.device
    offsets = torch.rand(count, generator=generator, device=device)
    slices = torch.randperm(count, generator=generator, device=device)
    u = (slices + offsets) / count
    return torch.searchsorted(cdf, u, right=True).clamp_(max=len(cdf) - 1)  # rounding may reach T
