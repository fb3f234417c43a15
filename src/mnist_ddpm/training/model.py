"""The U-Net that a run trains: new or from saved weights, and fitting the images."""

import logging
from collections.abc import Callable
from typing import Any

import torch
from diffusers import ModelMixin, UNet2DModel

from mnist_ddpm import MNISTDDPMScheduler, MNISTUNet2DModel
from mnist_ddpm.training.arguments import TrainingArguments, require

logger = logging.getLogger(__name__)
UNETS = {"MNISTUNet2DModel": MNISTUNet2DModel, "UNet2DModel": UNet2DModel}


def load_unet_config(args: TrainingArguments) -> dict[str, Any]:
    """The U-Net's config that the arguments name; without one, our own U-Net as it comes.

    Raises:
        ValueError: the config is of another model.
        OSError: there is no such config.
    """
    argument = "model_config_name_or_path" if args.model_config_name_or_path else "init_from"
    source = getattr(args, argument)
    if source is None:
        return {"_class_name": "MNISTUNet2DModel"}
    config: dict[str, Any] = _of_unet_or_pipeline(source, MNISTUNet2DModel.load_config)
    name = config.get("_class_name")
    require(name in UNETS, f"{argument} must be the config of one of {', '.join(UNETS)}", name)
    return config


def make_unet(
    config: dict[str, Any],
    images: torch.Tensor,
    args: TrainingArguments,
    scheduler: MNISTDDPMScheduler,
    num_classes: int | None = None,
) -> ModelMixin:
    """The U-Net of a config; what the config leaves open is as the images and their classes are.

    Where the variance is learned, the U-Net returns twice as many channels: the prediction, and the variance. Weights
    that were trained for another diffusion process than the scheduler's are reported.

    Raises:
        ValueError: the config is for other images or classes, or the saved weights are of another U-Net.
        OSError: there are no saved weights.
    """
    channels, height, width = shape = tuple(images.shape[1:])
    out_channels = 2 * channels if args.variance_type == "learned_range" else channels
    size = height if height == width else (height, width)
    open_choices = {"sample_size": size, "in_channels": channels, "out_channels": out_channels}
    require(
        num_classes is None or config["_class_name"] == "MNISTUNet2DModel",
        "label_column must be None for a UNet2DModel, which has no embedding for a hidden label",
        args.label_column,
    )
    classes = config.get("num_class_embeds") or num_classes
    require(
        classes == num_classes,
        f"label_column must be a column of {classes} classes, as many as the U-Net's config has",
        args.label_column,
    )
    config = config | {"num_class_embeds": num_classes}
    reason = ""
    try:
        unet = UNETS[config["_class_name"]].from_config(
            open_choices | {k: v for k, v in config.items() if v is not None}
        )
        with torch.no_grad():  # one image shows whether the levels can halve this size
            output = unet.eval()(torch.zeros(1, *shape), 0).sample
        if unet.config.sample_size not in (size, (height, width), [height, width]):
            reason = f"It is for images of size {unet.config.sample_size}."
        elif len(output[0]) != out_channels:
            reason = f"It returns {len(output[0])} channels."
    except (ValueError, RuntimeError) as error:
        reason = f"Its levels may not be able to halve this size: {str(error).splitlines()[0]}"
    argument = "init_from" if args.init_from else "model_config_name_or_path"
    require(
        not reason,
        f"{argument} must be a U-Net that makes {out_channels} channels of images of shape {shape}",
        getattr(args, argument),
        f"{reason} Change --resolution, --channels or the config.",
    )
    if args.init_from:
        _load_weights(unet, args.init_from)
        _warn_of_another_process(args.init_from, scheduler)
    return unet.train()


def _load_weights(unet: torch.nn.Module, source: str) -> None:
    """Load saved weights; those of a class embedding may be missing, as they are where labels come in later."""
    config = _of_unet_or_pipeline(source, MNISTUNet2DModel.load_config)
    unet_class = UNETS.get(config.get("_class_name"), MNISTUNet2DModel)
    saved = _of_unet_or_pipeline(source, unet_class.from_pretrained).state_dict()
    own = {name: weight.shape for name, weight in unet.state_dict().items()}
    expected = {name: shape for name, shape in own.items() if name in saved or not name.startswith("class_embedding.")}
    found = {name: weight.shape for name, weight in saved.items()}
    differing = sorted({name for name, _ in found.items() ^ expected.items()})
    require(
        not differing,
        "init_from must hold the weights of the U-Net that is trained",
        source,
        f"These differ: {', '.join(differing[:3])}. Without --model_config_name_or_path, its own config is taken.",
    )
    unet.load_state_dict(saved, strict=False)


def _warn_of_another_process(source: str, scheduler: MNISTDDPMScheduler) -> None:
    """Say where saved weights were trained for another prediction type or noise schedule than a run's."""
    try:
        saved = MNISTDDPMScheduler.from_pretrained(source, subfolder="scheduler")
    except OSError:  # a U-Net by itself
        return
    kinds = [kind.config["prediction_type"] for kind in (saved, scheduler)]
    if kinds[0] != kinds[1]:
        logger.warning(f"{source} was trained with prediction_type {kinds[0]!r}, this run has {kinds[1]!r}")
    if not torch.equal(saved.betas, scheduler.betas):
        names = [f"{of.config['beta_schedule']}, {len(of)} timesteps" for of in (saved, scheduler)]
        logger.warning(f"{source} was trained with other betas ({names[0]}) than this run has ({names[1]})")


def _of_unet_or_pipeline(source: str, load: Callable[..., Any]) -> Any:
    """What is loaded from a saved pipeline's U-Net, or from a U-Net that was saved by itself."""
    try:
        return load(source, subfolder="unet")
    except OSError:
        return load(source)
