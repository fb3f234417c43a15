"""DDPM and DDIM for Hugging Face diffusers: images of MNIST from noise, with labels and without."""

from pathlib import Path

from mnist_ddpm.likelihood import VariationalBound, bits_per_dim
from mnist_ddpm.metrics import CLASSIFIER
from mnist_ddpm.pipeline import MNISTDDPMPipeline
from mnist_ddpm.schedulers import MNISTDDIMScheduler, MNISTDDPMScheduler
from mnist_ddpm.unet import MNISTUNet2DModel

__version__ = "0.2.0.dev0"

PRETRAINED = Path(__file__).parent / "pretrained"
"""The folder of the trained pipeline that comes with the package: `MNISTDDPMPipeline.from_pretrained(PRETRAINED)`."""
PRETRAINED_CONDITIONAL = Path(__file__).parent / "pretrained_conditional"
"""The folder of the pipeline that takes `class_labels`."""
PRETRAINED_FEW_STEP = Path(__file__).parent / "pretrained_few_step"
"""The folder of the pipeline that was distilled from the first, for `num_inference_steps` from 1 to 20, best to 4."""

__all__ = [
    "CLASSIFIER",
    "PRETRAINED",
    "PRETRAINED_CONDITIONAL",
    "PRETRAINED_FEW_STEP",
    "MNISTDDIMScheduler",
    "MNISTDDPMPipeline",
    "MNISTDDPMScheduler",
    "MNISTUNet2DModel",
    "VariationalBound",
    "__version__",
    "bits_per_dim",
]
