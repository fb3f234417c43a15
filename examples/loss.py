"""The loss of DDPM, for any prediction type, with weights by the timestep if asked for."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from batches import Batch

from mnist_ddpm import MNISTDDPMScheduler


class DiffusionLoss:
    """The squared error of what the U-Net predicts from noisy images: DDPM's Algorithm 1 (arXiv 2006.11239).

    Args:
        scheduler: adds the noise; its prediction type says what the U-Net is to predict.
        snr_gamma: gamma of min-SNR weights; None to weight all timesteps alike.
        device: where the batches are.
    """

    def __init__(self, scheduler: MNISTDDPMScheduler, snr_gamma: float | None, device: torch.device):
        self.scheduler = scheduler
        self.weights = None if snr_gamma is None else min_snr_weights(scheduler, snr_gamma).to(device)

    def __call__(self, unet: Callable[..., Any], batch: Batch) -> torch.Tensor:
        """The mean over the batch, a float32 scalar."""
        noisy_images = self.scheduler.add_noise(batch.clean_images, batch.noise, batch.timesteps)
        prediction = unet(noisy_images, batch.timesteps, return_dict=False)[0]
        target = prediction_target(self.scheduler, batch)
        if self.weights is None:
            return F.mse_loss(prediction.float(), target)
        errors = F.mse_loss(prediction.float(), target, reduction="none").mean(dim=(1, 2, 3))
        return (self.weights[batch.timesteps] * errors).mean()


def prediction_target(scheduler: MNISTDDPMScheduler, batch: Batch) -> torch.Tensor:
    """What the U-Net is to predict, `(B, C, H, W)`."""
    match scheduler.config.prediction_type:
        case "epsilon":
            return batch.noise
        case "sample":
            return batch.clean_images
        case "v_prediction":
            return scheduler.get_velocity(batch.clean_images, batch.noise, batch.timesteps)


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
