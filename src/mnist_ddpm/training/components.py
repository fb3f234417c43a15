"""The parts of a training run, built from the flags of `train.py`."""

import argparse
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import ProjectConfiguration, parse_flag_from_env
from diffusers import ModelMixin, UNet2DModel
from diffusers.training_utils import EMAModel

from mnist_ddpm import MNISTDDPMScheduler, MNISTUNet2DModel
from mnist_ddpm.data import decode_images, load_split
from mnist_ddpm.likelihood import log_snr_betas
from mnist_ddpm.training.batches import logit_normal_probabilities, uniform_probabilities
from mnist_ddpm.training.machine import choose_mixed_precision
from mnist_ddpm.training.optimizers import MuonAdamW, hidden_matrices

UNETS = {"MNISTUNet2DModel": MNISTUNet2DModel, "UNet2DModel": UNet2DModel}


def make_accelerator(args: argparse.Namespace) -> Accelerator:
    """The Accelerator, by Accelerate's own configuration and the flags."""
    # without a GPU, Accelerate joins the processes that a launcher started only if it is told to use the CPU
    cpu = parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.accelerator.is_available()
    state = PartialState(cpu=cpu, timeout=timedelta(hours=2))  # of waiting for the main process to prepare the data
    logging_dir = Path(args.output_dir, args.logging_dir)
    return Accelerator(
        cpu=cpu,
        gradient_accumulation_steps=args.gradient_accumulation_steps,
        mixed_precision=choose_mixed_precision(args.mixed_precision, state.device),
        log_with=None if args.logger == "none" else args.logger,
        project_config=ProjectConfiguration(project_dir=args.output_dir, logging_dir=str(logging_dir)),
    )


def load_unet_config(args: argparse.Namespace) -> dict[str, Any]:
    """The U-Net's config that the flags name; without one, our own U-Net as it comes.

    Raises:
        ValueError: the config is of another model.
        OSError: there is no such config.
    """
    if args.model_config_name_or_path is None:
        return {"_class_name": "MNISTUNet2DModel"}
    try:
        config: dict[str, Any] = MNISTUNet2DModel.load_config(args.model_config_name_or_path)
    except OSError as error:
        raise OSError(f"--model_config_name_or_path: {error}") from error
    if config.get("_class_name") not in UNETS:
        raise ValueError(
            f"--model_config_name_or_path: the config is of a {config.get('_class_name')}, not of one of "
            f"{', '.join(UNETS)}"
        )
    return config


def load_images(args: argparse.Namespace, accelerator: Accelerator, channels: int | None) -> torch.Tensor:
    """All images, uint8 `(N, C, H, W)`: on the training device, or on the host if they would fill half of its memory.

    Raises:
        ValueError: the data set holds no images, or not all of the same kind.
        OSError: there is no such data set.
        MemoryError: the images fit nowhere.
    """
    with accelerator.main_process_first():
        dataset = load_split(args.dataset_name, args.dataset_config_name, args.split, args.cache_dir)
    images = decode_images(dataset, args.image_column, args.resolution, channels)
    if accelerator.device.type == "cuda" and images.numel() > torch.cuda.mem_get_info(accelerator.device)[0] // 2:
        return images.pin_memory()
    return images.to(accelerator.device)


def make_unet(config: dict[str, Any], images: torch.Tensor, variance_type: str = "fixed_small") -> ModelMixin:
    """The U-Net of a config, new; what the config leaves open is as the images are.

    Where the variance is learned, the U-Net returns twice as many channels: the prediction, and the variance.

    Raises:
        ValueError: the config is for other images.
    """
    channels, height, width = images.shape[1:]
    unet_class = UNETS[config["_class_name"]]
    size = height if height == width else (height, width)
    out_channels = 2 * channels if variance_type == "learned_range" else channels
    unet = unet_class.from_config(
        {"sample_size": size, "in_channels": channels, "out_channels": out_channels} | config
    )
    size = unet.config.sample_size
    expected = (unet.config.in_channels, *((size, size) if isinstance(size, int) else size))
    if expected != (channels, height, width) or unet.config.out_channels != out_channels:
        raise ValueError(
            f"--model_config_name_or_path: the U-Net takes images of shape {expected} and returns "
            f"{unet.config.out_channels} channels, but the images have the shape {(channels, height, width)} and "
            f"--variance_type {variance_type} needs {out_channels} channels: change the config, or --resolution"
        )
    return unet


def make_scheduler(args: argparse.Namespace) -> MNISTDDPMScheduler:
    """The noise schedule."""
    betas = log_snr_betas(args.ddpm_num_steps, *args.ddpm_log_snr).tolist() if args.ddpm_log_snr else None
    return MNISTDDPMScheduler(
        num_train_timesteps=args.ddpm_num_steps,
        beta_schedule=args.ddpm_beta_schedule,
        trained_betas=betas,
        prediction_type=args.prediction_type,
        variance_type=args.variance_type,
    )


def timestep_probabilities(args: argparse.Namespace) -> torch.Tensor:
    """p(t) of the timesteps that training draws, `(T,)`."""
    if args.timestep_sampling == "uniform":
        return uniform_probabilities(args.ddpm_num_steps)
    return logit_normal_probabilities(args.ddpm_num_steps, args.logit_mean, args.logit_std, args.uniform_share)


def make_optimizer(unet: torch.nn.Module, args: argparse.Namespace) -> torch.optim.Optimizer:
    """AdamW, or Muon for the hidden weight matrices and AdamW for the rest."""
    adam = {"lr": args.learning_rate, "betas": (args.adam_beta1, args.adam_beta2), "eps": args.adam_epsilon}
    if args.optimizer == "adamw":
        return torch.optim.AdamW(unet.parameters(), weight_decay=args.adam_weight_decay, fused=True, **adam)
    return MuonAdamW(
        *hidden_matrices(unet),
        muon_lr=args.muon_learning_rate,
        momentum=args.muon_momentum,
        weight_decay=args.adam_weight_decay,
        **adam,
    )


def make_ema(unet: torch.nn.Module, args: argparse.Namespace) -> EMAModel | None:
    """The moving average of the weights, of decay `1 - (1 + step / inv_gamma) ** -power` up to the maximum."""
    if not args.use_ema:
        return None
    return EMAModel(
        unet.parameters(),
        decay=args.ema_max_decay,
        use_ema_warmup=True,
        inv_gamma=args.ema_inv_gamma,
        power=args.ema_power,
        foreach=True,
    )
