"""From a diffusion model to one that samples in a few steps: consistency distillation, or adversarial fine-tuning.

Either way the student is a consistency function (arXiv 2303.01469, equation 5; for discrete timesteps as in latent
consistency models, arXiv 2310.04378), which maps a noisy image to an image in one step:

    f(x_t, t) = c_skip(t) x_t + c_out(t) x0_hat(x_t, t)

with x0_hat from what the U-Net predicts. diffusers' `LCMScheduler` computes the same f, so it runs the student as it
is: from noise to f, and in more steps `x_s = sqrt(alpha_bar_s) f(x_t, t) + sqrt(1 - alpha_bar_s) eps`, then f again.
"""

import copy
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

import torch
from diffusers import LCMScheduler
from torch import nn

from mnist_ddpm import MNISTDDIMScheduler, MNISTDDPMPipeline, MNISTDDPMScheduler
from mnist_ddpm.pipeline import extrapolate
from mnist_ddpm.sampling import guidance_options, make_scheduler, weights_digest
from mnist_ddpm.training.adversarial import AdversarialLoss, Discriminator
from mnist_ddpm.training.arguments import COUNT, FIXED, FRACTION, POSITIVE, TrainingArguments, _arg, require
from mnist_ddpm.training.batches import Batch
from mnist_ddpm.training.optimizers import make_optimizer
from mnist_ddpm.training.trainer import Objective, Trainer

SIGMA_DATA = 0.5  # of c_skip and c_out, as in LCMScheduler
HUBER_SCALE = 0.00054  # times the root of the number of pixels: c of the pseudo-Huber loss (iCT, arXiv 2310.14189)
# arguments of training that are of its loss, or that the saved pipeline answers
WITHOUT_EFFECT = (
    "model_config_name_or_path", "variance_type", "ddpm_log_snr", "loss_type", "timestep_sampling", "logit_mean",
    "logit_std", "uniform_share", "snr_gamma",
)  # fmt: skip


class ConsistencyFunction:
    """f(x_t, t) of a U-Net, with the coefficients of `LCMScheduler`; f(x, 0) = x.

    Args:
        scheduler: the noise schedule, and what the U-Net predicts.
        sampler: whose `timestep_scaling` is taken, and `clip_sample`: whether x0_hat is clipped. Gradients pass as if
            it were not, so that a clipped pixel that should be gray gets one.
    """

    def __init__(self, scheduler: MNISTDDPMScheduler, sampler: LCMScheduler):
        self.scheduler = MNISTDDPMScheduler.from_config(scheduler.config, clip_sample=False, thresholding=False)
        self.scaling: float = sampler.config.timestep_scaling
        self.limit: float = sampler.config.clip_sample_range if sampler.config.clip_sample else float("inf")

    def __call__(
        self, unet: Any, x_t: torch.Tensor, timesteps: torch.Tensor, class_labels: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Images `(B, C, H, W)` from noisy ones at timesteps `(B,)`."""
        output = unet(x_t, timesteps, class_labels, return_dict=False)[0].float()
        x0_hat = self.scheduler._predict_x0(output, x_t, self.scheduler._coefficients(timesteps, x_t))
        x0_hat = x0_hat.detach().clamp(-self.limit, self.limit) + (x0_hat - x0_hat.detach())
        t = (self.scaling * timesteps.float())[:, None, None, None]
        c_skip = SIGMA_DATA**2 / (t**2 + SIGMA_DATA**2)
        c_out = t / (t**2 + SIGMA_DATA**2).sqrt()
        images: torch.Tensor = c_skip * x_t + c_out * x0_hat
        return images


class GuidedTeacher(nn.Module):
    """A teacher that is led away from its guide (arXiv 2406.02507), as `MNISTDDPMPipeline` does with it.

    Args:
        unet: the strong network.
        guide: the weak one.
        scale: s in `weak + s (strong - weak)`.
        interval: timesteps at which s acts, both ends included.
    """

    def __init__(self, unet: nn.Module, guide: nn.Module, scale: float, interval: tuple[float, float]):
        super().__init__()
        self.unet, self.guide, self.scale, self.interval = unet, guide, scale, interval

    def forward(self, x_t: torch.Tensor, t: torch.Tensor, *args: Any, **kwargs: Any) -> tuple[torch.Tensor]:
        """The prediction for noisy images `(B, C, H, W)` at timesteps `(B,)`."""
        strong, weak = (network(x_t, t, *args, **kwargs)[0] for network in (self.unet, self.guide))
        low, high = self.interval
        s = torch.where((low <= t) & (t <= high), self.scale, 1.0)[:, None, None, None]
        return (extrapolate(strong, weak, s, x_t.shape[1]),)


class ConsistencyLoss:
    """Consistency distillation: f is to be the same at x_t and where a DDIM step of the teacher leads from there.

    `d(f(x_t, t), f(x_prev, prev))`, without a gradient through the second f, which is 0 if f follows the teacher's
    path to its end (arXiv 2303.01469, Algorithm 2). As in iCT (arXiv 2310.14189), the second f is no EMA, and d is the
    pseudo-Huber distance `sqrt(|a - b|^2 + c^2) - c`.

    Args:
        function: f.
        teacher: the U-Net to distill.
        ddim: its scheduler, whose timesteps are set here.
        timesteps: those that t is from, in ascending order; prev is the one before. Before the first comes the clean
            image, where f is the identity.
        autocast: the context that the teacher runs in.
    """

    def __init__(
        self,
        function: ConsistencyFunction,
        teacher: nn.Module,
        ddim: MNISTDDIMScheduler,
        timesteps: Sequence[int],
        autocast: Callable[[], AbstractContextManager[Any]] = nullcontext,
    ):
        self.function, self.ddim, self.autocast = function, ddim, autocast
        self.teacher = teacher.eval().requires_grad_(False)
        self.ddim.set_timesteps(timesteps=sorted(timesteps, reverse=True))

    def __call__(self, unet: Any, batch: Batch) -> torch.Tensor:
        """The mean over the batch, a float32 scalar."""
        t, labels = batch.timesteps, batch.class_labels
        x_t = self.ddim.add_noise(batch.clean_images, batch.noise, t)
        with torch.no_grad():
            with self.autocast():
                output = self.teacher(x_t, t, labels, return_dict=False)[0].float()
            x_prev = self.ddim.step(output, t, x_t).prev_sample
            target = self.function(unet, x_prev, self.ddim.previous_timestep(t).clamp(min=0), labels)
        squares = (self.function(unet, x_t, t, labels) - target).square().sum(dim=(1, 2, 3))
        c = HUBER_SCALE * x_t[0].numel() ** 0.5
        loss: torch.Tensor = ((squares + c**2).sqrt() - c).mean()
        return loss


class AdversarialBatch(NamedTuple):
    """What an adversarial step takes: images to make f's input of, real images to compare with, and more noise."""

    inputs: Batch
    real: Batch
    fake_noise: torch.Tensor
    perturbation: torch.Tensor


@dataclass
class DistillationArguments(TrainingArguments):
    """The arguments of `Distiller`: those of training, with other defaults, and some more.

    What the U-Net predicts, and the noise schedule, are those of the saved pipeline.
    """

    objective: Literal["consistency", "adversarial"] = _arg(
        "consistency",
        "Follow the teacher's DDIM steps; or learn from real images, against a discriminator.",
    )
    num_levels: int = _arg(
        20, "Timesteps at which the student is trained, equally spaced: the most steps that it can take.", COUNT
    )
    guidance_scale: float | None = _arg(
        None, "Of a teacher with a guide, for consistency; 1: none. By default as examples/sample.py.", POSITIVE
    )
    pure_noise_share: float = _arg(
        0.7, "Share of the adversarial training at the last of them, T - 1: pure noise.", FRACTION
    )
    discriminator_lr_ratio: float = _arg(2.0, "The discriminator's learning rates over the student's.", POSITIVE)
    discriminator_noise: float = _arg(
        0.5, "The discriminator sees images at timesteps t, uniform below this share of T.", FRACTION
    )
    penalty_weight: float = _arg(1.0, "Of the penalty on the discriminator's change under small noise.", POSITIVE)
    penalty_std: float = _arg(0.1, "Standard deviation of that noise.", POSITIVE)

    optimizer: Literal["muon", "adamw"] | None = _arg(  # type: ignore[assignment]
        None, "See training; by default muon for consistency, and adamw against a discriminator."
    )
    muon_momentum: float = _arg(0.5, "Of Muon.", FRACTION)
    learning_rate: float = _arg(1e-4, "Of AdamW.", POSITIVE)
    lr_scheduler: Literal[
        "linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup"
    ] = _arg("constant", "How the learning rates change after the warm-up.")
    adam_beta1: float = _arg(0.0, "Of AdamW.", FRACTION)
    max_grad_norm: float = _arg(float("inf"), "Gradient norm to clip at; inf for none.", POSITIVE)
    ema_max_decay: float = _arg(0.999, "Upper limit of the EMA's decay.", FRACTION)
    ddpm_num_inference_steps: int = _arg(1, "Steps to sample in.", COUNT)

    def __post_init__(self) -> None:
        """Choose the optimizer; check what training does not."""
        self.optimizer = self.optimizer or ("muon" if self.objective == "consistency" else "adamw")
        super().__post_init__()
        for name in WITHOUT_EFFECT:
            default = getattr(DistillationArguments, name)
            require(
                getattr(self, name) == default, f"{name} must be {default}, as it has no effect", getattr(self, name)
            )
        require(self.init_from is not None, "init_from must be the saved pipeline to distill", self.init_from)
        require(
            self.guidance_scale is None or self.objective == "consistency",
            "guidance_scale must be None without --objective consistency",
            self.guidance_scale,
        )
        require(
            self.ddpm_num_inference_steps <= self.num_levels,
            f"ddpm_num_inference_steps must be at most num_levels ({self.num_levels})",
            self.ddpm_num_inference_steps,
        )


class Distiller(Trainer):
    """A run that makes a student of a saved pipeline: a `Trainer` with another objective.

    The saved pipeline has diffusers' `LCMScheduler`: call it with `num_inference_steps` from 1 to `num_levels`.

    Args:
        args: what to distill, on which images, how, and where to save the student.

    Raises:
        ValueError, OSError, MemoryError: as for `Trainer`.

    Example:
        `Distiller(DistillationArguments(init_from="digits", output_dir="fast-digits")).train()`
    """

    fixed = (
        "objective", "num_levels", "guidance_scale", "pure_noise_share", "discriminator_lr_ratio",
        "discriminator_noise", "penalty_weight", "penalty_std", *FIXED,
    )  # fmt: skip
    args: DistillationArguments

    def __init__(self, args: DistillationArguments):
        config = MNISTDDPMScheduler.load_config(args.init_from, subfolder="scheduler")
        same = {
            "prediction_type": config["prediction_type"],
            "ddpm_num_steps": config["num_train_timesteps"],
            "ddpm_beta_schedule": config["beta_schedule"],
        }
        super().__init__(replace(args, **same))

    def make_scheduler(self) -> Any:
        """The teacher's."""
        return MNISTDDPMScheduler.from_pretrained(self.args.init_from, subfolder="scheduler")

    def make_sampler(self) -> Any:
        """The scheduler whose timesteps are those that the student is trained at.

        A student by consistency clips x0_hat: a black pixel may be predicted as blacker than black. Without clipping,
        half of them would be a little too bright. A discriminator would push a clipped pixel out of range for ever.
        """
        options = {
            "original_inference_steps": self.args.num_levels,
            "clip_sample": self.args.objective == "consistency",
            "thresholding": False,
        }
        config = {key: value for key, value in self.scheduler.config.items() if key != "variance_type"}  # it has none
        return LCMScheduler.from_config(config, **options)

    def make_objective(self, unet: nn.Module, optimizer: torch.optim.Optimizer) -> Objective:
        """The chosen loss; the discriminator joins the optimizer."""
        args, T = self.args, len(self.scheduler)
        require(self.accelerator.num_processes == 1, "num_processes must be 1", self.accelerator.num_processes)
        require(T % args.num_levels == 0, f"num_levels must divide the {T} timesteps", args.num_levels)
        timesteps = level_timesteps(T, args.num_levels)
        function = ConsistencyFunction(self.scheduler, self.make_sampler())
        if args.objective == "consistency":
            self.batches = self.make_batches(level_probabilities(T, timesteps, 1 / args.num_levels))
            teacher, ddim = self.make_teacher(unet), make_scheduler("ddim", self.scheduler.config)
            self.further_settings = {"teacher": weights_digest(teacher)}
            return ConsistencyLoss(function, teacher, ddim, timesteps, self.accelerator.autocast)
        self.batches = self.make_batches(level_probabilities(T, timesteps, args.pure_noise_share))
        noised = max(1, round(args.discriminator_noise * T))
        p = torch.zeros(T, dtype=torch.float64)
        p[:noised] = 1 / noised
        self.further_batches = [self.make_batches(p, stream) for stream in (1, 2, 3)]
        discriminator: nn.Module = Discriminator(unet).to(self.accelerator.device)
        for group in make_optimizer(discriminator, args).param_groups:
            optimizer.add_param_group({**group, "lr": args.discriminator_lr_ratio * group["lr"]})
        self.further_networks = [discriminator]
        return AdversarialLoss(function, discriminator, args.penalty_weight, args.penalty_std)

    def make_teacher(self, unet: nn.Module) -> nn.Module:
        """A copy of the U-Net at the start, led by the saved pipeline's guide if it has one."""
        saved = MNISTDDPMPipeline.from_pretrained(str(self.args.init_from))
        guidance = guidance_options(saved, self.args.guidance_scale)
        scale, (low, high) = guidance.get("guidance_scale", 1.0), guidance.get("guidance_interval", (0.0, 1.0))
        teacher = copy.deepcopy(unet)
        if scale == 1:
            return teacher
        require(saved.guide is not None, "guidance_scale must be 1 without a guide", scale)
        T = len(self.scheduler)
        return GuidedTeacher(teacher, saved.guide, scale, (low * T, high * T)).to(self.accelerator.device)

    def micro_batches(self, step: int) -> Sequence[Any]:
        """This process's share of a step; an adversarial one takes more than a batch."""
        inputs = self._share(self.batches, step)
        if self.args.objective == "consistency":
            return inputs
        further = zip(*(self._share(batches, step) for batches in self.further_batches), strict=True)
        return [
            AdversarialBatch(batch, real, fake.noise, perturbation.noise)
            for batch, (real, fake, perturbation) in zip(inputs, further, strict=True)
        ]


def level_timesteps(T: int, num_levels: int) -> list[int]:
    """The timesteps of `LCMScheduler` with this many `original_inference_steps`, in ascending order; T - 1 is last."""
    k = T // num_levels
    return [k * n - 1 for n in range(1, num_levels + 1)]


def level_probabilities(T: int, timesteps: Sequence[int], last_share: float) -> torch.Tensor:
    """p(t), float64 `(T,)`: `last_share` at the last of these timesteps, and the rest equally at the others."""
    p = torch.zeros(T, dtype=torch.float64)
    p[list(timesteps)] = (1 - last_share) / max(1, len(timesteps) - 1)
    p[timesteps[-1]] = last_share
    return p / p.sum()
