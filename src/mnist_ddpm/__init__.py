"""Unconditional diffusion on MNIST: DDPM and DDIM for Hugging Face diffusers."""

__version__ = "0.1.0"

from mnist_ddpm.metrics import CLASSIFIER
from mnist_ddpm.pipeline import MNISTDDPMPipeline
from mnist_ddpm.schedulers import MNISTDDIMScheduler, MNISTDDPMScheduler
from mnist_ddpm.unet import MNISTUNet2DModel

__all__ = [
    "CLASSIFIER",
    "MNISTDDIMScheduler",
    "MNISTDDPMPipeline",
    "MNISTDDPMScheduler",
    "MNISTUNet2DModel",
    "__version__",
]
