"""Trainings to be compared: each makes one optimizer step at a time, and can be sampled from at any moment."""

from pathlib import Path
from typing import Any, ClassVar, Protocol

import torch
import torch.nn.functional as F
from diffusers import DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler, UNet2DModel
from diffusers.training_utils import EMAModel
from torch.utils.data import DataLoader

from mnist_ddpm import MNISTDDPMPipeline
from mnist_ddpm.sampling import make_scheduler
from mnist_ddpm.training import Trainer, TrainingArguments
from mnist_ddpm.training.batches import logit_normal_probabilities, stratified_timesteps
from mnist_ddpm.training.optimizers import MuonAdamW, hidden_matrices

# the U-Net that the Hugging Face diffusion course sets up for MNIST
PEER_UNET = {
    "sample_size": 28,
    "in_channels": 1,
    "out_channels": 1,
    "layers_per_block": 2,
    "block_out_channels": (32, 64, 64),
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
}


class Contender(Protocol):
    """A training that can be paused between any two steps."""

    batch_size: int
    bf16: bool

    def step(self) -> None:
        """Make one optimizer step."""

    def pipeline(self, sampler: str = "ddim") -> MNISTDDPMPipeline:
        """The pipeline as it would be saved now, with a sampler of its own house."""


class Ours:
    """What `Trainer` does with these arguments, a step at a time."""

    def __init__(self, output_dir: Path, **arguments: Any):
        self.trainer = Trainer(TrainingArguments(output_dir=str(output_dir), logger="none", **arguments))
        self.batch_size = self.trainer.batch_size
        self.bf16 = self.trainer.accelerator.mixed_precision == "bf16"
        self.steps = 0

    def step(self) -> None:
        """Make one optimizer step."""
        self.trainer.training_step(self.steps)
        self.steps += 1

    def pipeline(self, sampler: str = "ddim") -> MNISTDDPMPipeline:
        """The EMA, with our schedulers."""
        pipe = self.trainer.published_pipeline()
        return MNISTDDPMPipeline(unet=pipe.unet, scheduler=make_scheduler(sampler, pipe.scheduler.config))


class Course:
    """The training loop of the course, plain; `tuned` adds what makes it faster or better without changing the method.

    Args:
        images: uint8 (N, 1, 28, 28).
        device: where to train.
        tuned: channels_last, Muon, our timesteps, EMA, a warm-up and gradient clipping, and the settings below that
            differ.
        learning_rate: of AdamW.
        batch_size: images per step.
        compiled: use torch.compile.
        bf16: use bfloat16 autocast.
        seed: of everything random.
    """

    schedulers: ClassVar[dict[str, Any]] = {
        "ddpm": DDPMScheduler,
        "ddim": DDIMScheduler,
        "dpmsolver_multistep": DPMSolverMultistepScheduler,
    }

    def __init__(
        self,
        images: torch.Tensor,
        device: str,
        tuned: bool,
        learning_rate: float,
        batch_size: int = 64,
        compiled: bool = False,
        bf16: bool = False,
        seed: int = 0,
    ):
        torch.manual_seed(seed)
        self.device, self.batch_size, self.bf16, self.tuned = device, batch_size, bf16, tuned
        self.scheduler = DDPMScheduler(num_train_timesteps=1000, beta_schedule="squaredcos_cap_v2")
        self.unet = UNet2DModel(**PEER_UNET).to(device)
        if tuned:
            self.unet.to(memory_format=torch.channels_last)
        self.forward = torch.compile(self.unet) if compiled else self.unet
        self.optimizer: torch.optim.Optimizer
        if tuned:
            self.optimizer = MuonAdamW(*hidden_matrices(self.unet), lr=learning_rate)
        else:
            self.optimizer = torch.optim.AdamW(self.unet.parameters(), lr=learning_rate)
        p = logit_normal_probabilities(len(self.scheduler), uniform_share=0.3)
        self.cdf = p.cumsum(0).float().to(device) if tuned else None
        self.generator = torch.Generator(device).manual_seed(seed)
        warmup = torch.optim.lr_scheduler.LambdaLR(self.optimizer, lambda step: min(1.0, (step + 1) / 100))
        self.lr_scheduler = warmup if tuned else None
        self.ema = EMAModel(self.unet.parameters(), use_ema_warmup=True, power=0.75) if tuned else None
        self.sampled_unet = UNet2DModel(**PEER_UNET).to(device).eval()
        self.loader = DataLoader(images, batch_size, shuffle=True, drop_last=True)
        self.batches = iter(self.loader)

    def step(self) -> None:
        """Make one optimizer step."""
        clean_images = self._next_images().to(self.device).float() / 127.5 - 1
        noise = torch.randn_like(clean_images)
        timesteps = self._timesteps(len(clean_images))
        noisy_images = self.scheduler.add_noise(clean_images, noise, timesteps)
        with torch.autocast(torch.device(self.device).type, torch.bfloat16, enabled=self.bf16):
            prediction = self.forward(noisy_images, timesteps, return_dict=False)[0]
        F.mse_loss(prediction.float(), noise).backward()
        if self.lr_scheduler and self.ema:
            torch.nn.utils.clip_grad_norm_(self.unet.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self.lr_scheduler and self.ema:
            self.lr_scheduler.step()
            self.ema.step(self.unet.parameters())

    def _timesteps(self, count: int) -> torch.Tensor:
        """Timesteps for a batch: uniform, or where it is tuned as ours are."""
        if self.cdf is not None:
            return stratified_timesteps(count, self.cdf, self.generator)
        return torch.randint(0, len(self.scheduler), (count,), generator=self.generator, device=self.device)

    def _next_images(self) -> torch.Tensor:
        """The next batch; a new order of the images when all have been seen."""
        try:
            return next(self.batches)
        except StopIteration:
            self.batches = iter(self.loader)
            return next(self.batches)

    def pipeline(self, sampler: str = "ddim") -> MNISTDDPMPipeline:
        """The weights, or their EMA if there is one, with diffusers' schedulers."""
        self.sampled_unet.load_state_dict(self.unet.state_dict())
        if self.ema:
            self.ema.copy_to(self.sampled_unet.parameters())
        scheduler = self.schedulers[sampler].from_config(self.scheduler.config)
        return MNISTDDPMPipeline(unet=self.sampled_unet, scheduler=scheduler)
