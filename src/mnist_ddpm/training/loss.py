"""The loss of DDPM: the simplified one, the variational bound, or both."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from mnist_ddpm import MNISTDDPMScheduler
from mnist_ddpm.likelihood import VariationalBound
from mnist_ddpm.training.batches import Batch, uniform_probabilities

VLB_WEIGHT = 0.001  # of the bound in "hybrid": lambda of L_hybrid (iDDPM, arXiv 2102.09672, equation 16)
SIMPLE_WEIGHT = 10.0  # of the squared error in "vlb"


class DiffusionLoss:
    """What training minimizes, for any prediction type: DDPM's Algorithm 1 (arXiv 2006.11239), or iDDPM's losses.

    - `"simple"`: the squared error of what the U-Net predicts from noisy images, by DDPM's equation 14.
    - `"hybrid"`: `simple + 0.001 bound`, where the bound trains the variance alone (iDDPM, equation 16).
    - `"vlb"`: `bound + 10 simple`. The bound is of the sampler, which clips x0_hat; what lies beyond costs it nothing,
      so that without the squared error predictions for black pixels run off and take the gray ones along.

    The bound is that of `likelihood.py` in bits per dimension (without L_T, which no training changes), estimated from
    the batch: the mean of its terms at random timesteps, each divided by p(t), which keeps it unbiased.

    Args:
        scheduler: adds the noise; its prediction type and its variance type say what the U-Net is to predict.
        snr_gamma: gamma of min-SNR weights of the squared error; None to weight all timesteps alike.
        device: where the batches are.
        loss_type: one of the above.
        timestep_probabilities: p(t) by which the batches draw timesteps, `(T,)`; None for uniform ones.
    """

    def __init__(
        self,
        scheduler: MNISTDDPMScheduler,
        snr_gamma: float | None,
        device: torch.device,
        loss_type: str = "simple",
        timestep_probabilities: torch.Tensor | None = None,
    ):
        self.scheduler = scheduler
        self.loss_type = loss_type
        self.bound = VariationalBound(scheduler) if loss_type != "simple" else None
        p = uniform_probabilities(len(scheduler)) if timestep_probabilities is None else timestep_probabilities
        self.bound_weights = (1 / p).float().to(device)
        self.weights = None if snr_gamma is None else min_snr_weights(scheduler, snr_gamma).to(device)

    def __call__(self, unet: Callable[..., Any], batch: Batch) -> torch.Tensor:
        """The mean over the batch, a float32 scalar."""
        noisy_images = self.scheduler.add_noise(batch.clean_images, batch.noise, batch.timesteps)
        output = unet(noisy_images, batch.timesteps, batch.class_labels, return_dict=False)[0].float()
        prediction = output[:, : batch.noise.shape[1]]  # what follows where the variance is learned is the variance
        simple = self._simple(prediction, batch)
        if self.loss_type == "simple":
            return simple
        if self.loss_type == "vlb":
            return self._bound(output, noisy_images, batch) + SIMPLE_WEIGHT * simple
        output = torch.cat([prediction.detach(), output[:, prediction.shape[1] :]], dim=1)
        return simple + VLB_WEIGHT * self._bound(output, noisy_images, batch)

    def _simple(self, prediction: torch.Tensor, batch: Batch) -> torch.Tensor:
        """The squared error, weighted if asked for."""
        target = prediction_target(self.scheduler, batch)
        if self.weights is None:
            return F.mse_loss(prediction, target)
        errors = F.mse_loss(prediction, target, reduction="none").mean(dim=(1, 2, 3))
        return (self.weights[batch.timesteps] * errors).mean()

    def _bound(self, output: torch.Tensor, noisy_images: torch.Tensor, batch: Batch) -> torch.Tensor:
        """The bound without L_T, in bits per dimension."""
        assert self.bound is not None  # for "simple" this is not called
        terms = self.bound.term(output, batch.timesteps, noisy_images, batch.clean_images)
        return (self.bound_weights[batch.timesteps] * terms).mean()


def prediction_target(scheduler: MNISTDDPMScheduler, batch: Batch) -> torch.Tensor:
    """What the U-Net is to predict, `(B, C, H, W)`."""
    match scheduler.config.prediction_type:
        case "epsilon":
            return batch.noise
        case "sample":
            return batch.clean_images
        case _:
            velocity: torch.Tensor = scheduler.get_velocity(batch.clean_images, batch.noise, batch.timesteps)
            return velocity


def min_snr_weights(scheduler: MNISTDDPMScheduler, snr_gamma: float) -> torch.Tensor:
    """The weight of the squared error at each timestep, `(T,)` (min-SNR, arXiv 2303.09556, section 3.4).

    It is `min(SNR, gamma)` for the error of x_0, with `SNR = alpha_bar / (1 - alpha_bar)`. The same error is SNR times
    as large in terms of epsilon, and SNR + 1 times in terms of v, so there the weight is divided by that.
    """
    alpha_bar = scheduler.alphas_cumprod.double()
    snr = alpha_bar / (1 - alpha_bar)
    match scheduler.config.prediction_type:
        case "epsilon":
            weights = (snr_gamma / snr).clamp(max=1)  # min(SNR, gamma) / SNR, also where SNR is 0
        case "sample":
            weights = snr.clamp(max=snr_gamma)
        case "v_prediction":
            weights = snr.clamp(max=snr_gamma) / (snr + 1)
    return weights.float()
