"""Sizes, timers and a timed Trainer for the parts of `gpu.py`."""

import gc
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from mnist_ddpm.data import MNIST, load_split
from mnist_ddpm.training import Trainer, TrainingArguments

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# dense bf16 TFLOP/s by NVIDIA's data sheets; the first name that is part of the device's
PEAKS = {"H200": 989, "H100 PCIe": 756, "H100 NVL": 835, "H100": 989, "A100": 312, "L40S": 362, "L4": 121}
WAYS: dict[str, dict[str, Any] | None] = {
    "eager": None,
    "compile": {"dynamic": False},
    "CUDA graphs": {"dynamic": False, "mode": "reduce-overhead"},
}
WARMUP = 4  # steps in which torch.compile compiles, and CUDA graphs are recorded


@dataclass
class Size:
    """How much of everything; by default what a GPU is for."""

    dataset_name: str = MNIST
    unet: dict[str, Any] = field(default_factory=dict)
    ways: dict[str, dict[str, Any] | None] = field(default_factory=lambda: WAYS)
    batch_size: int = 512
    sampling_batch_size: int = 1000
    num_inference_steps: int = 50
    num_images: int = 10_000
    timed_steps: int = 30
    scheduler_rounds: int = 50
    keep_epochs: int = 25


def toy(folder: Path) -> Size:
    """A rehearsal: 96 images of MNIST, a U-Net of some thousand weights, and `torch.compile` without a compiler."""
    images = folder / "images"
    if not images.exists():
        images.mkdir(parents=True)
        for split, count in (("train", 64), ("test", 32)):
            load_split(MNIST, split=f"{split}[:{count}]").to_parquet(images / f"{split}-00000-of-00001.parquet")
    return Size(
        dataset_name=str(images),
        unet={"block_out_channels": (8, 16), "norm_num_groups": 4},
        ways={way: options and {"backend": "eager"} for way, options in WAYS.items()},
        batch_size=4,
        sampling_batch_size=2,
        num_inference_steps=2,
        num_images=32,
        timed_steps=1,
        scheduler_rounds=1,
        keep_epochs=1,
    )


class TimedTrainer(Trainer):
    """A Trainer with its U-Net compiled in a given way, that stops at a deadline as if a signal came; and its seconds.

    Args:
        args: of the Trainer.
        way: options of `torch.compile`; None for none of it.
        deadline: when to stop, by `time.perf_counter`.
    """

    def __init__(self, args: TrainingArguments, way: dict[str, Any] | None, deadline: float = float("inf")):
        super().__init__(args)
        if way:
            self.compiled_unet = torch.compile(self.unet, **way)
        self.deadline = deadline
        self.on_keep: Callable[[dict[str, float]], None] = lambda point: None

    def train(self) -> None:
        """As that of the Trainer."""
        self.start = self.warm = self.now = time.perf_counter()
        self.done = self.first_step
        super().train()

    def should_stop(self, done: int) -> bool:
        """Whether to stop; notes the time on the way."""
        self.done = done
        if done == self.first_step + WARMUP:
            synchronize()
            self.warm = time.perf_counter()
        stop = super().should_stop(done) or time.perf_counter() > self.deadline
        kept = self._completes_epochs(self.args.keep_model_epochs, done)
        if kept or stop or done == self.total_steps:
            synchronize()
            self.now = time.perf_counter()
        if kept:
            self.on_keep(self.point())
        return stop

    def point(self) -> dict[str, float]:
        """The seconds of this call's training so far, with and without compilation."""
        warm_steps = self.done - self.first_step - WARMUP
        excess = 0.0
        if warm_steps > 0:
            excess = self.warm - self.start - WARMUP * (self.now - self.warm) / warm_steps
        seconds = self.now - self.start
        return {"step": self.done, "seconds": seconds, "seconds_without_compilation": seconds - max(0.0, excess)}

    def images_per_second(self) -> float:
        """Of this call's training, without compilation; 0 if there was nothing to do."""
        steps = self.done - self.first_step
        return steps * self.batch_size / self.point()["seconds_without_compilation"] if steps else 0.0


def seconds_per_step(step: Callable[[int], Any], steps: int, warmup: int = WARMUP) -> tuple[float, float]:
    """Seconds of the first steps together, and of each later one."""
    start = time.perf_counter()
    for i in range(warmup):
        step(i)
    synchronize()
    warm = time.perf_counter()
    for i in range(warmup, warmup + steps):
        step(i)
    synchronize()
    return warm - start, (time.perf_counter() - warm) / steps


def flops_per_image(unet: Any, training: bool) -> float:
    """Floating-point operations for one image: forward, or forward and backward."""
    shape = (2, unet.config.in_channels, unet.config.sample_size, unet.config.sample_size)
    x, t = torch.zeros(shape, device=DEVICE), torch.zeros(2, dtype=torch.long, device=DEVICE)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH), torch.set_grad_enabled(training):
        output = unet(x, t).sample
        if training:
            output.sum().backward()
    unet.zero_grad()
    return counter.get_total_flops() / len(x)


def peak() -> int | None:
    """The chip's dense bf16 TFLOP/s, where they are known."""
    name = torch.cuda.get_device_name() if DEVICE == "cuda" else ""
    return next((tflops for chip, tflops in PEAKS.items() if chip in name), None)


def free_memory() -> None:
    """Give back what the last measurement held, and forget what it compiled."""
    torch._dynamo.reset()
    gc.collect()
    if DEVICE == "cuda":
        torch.cuda.empty_cache()


def synchronize() -> None:
    """Wait for the GPU, if there is one."""
    if DEVICE == "cuda":
        torch.cuda.synchronize()
