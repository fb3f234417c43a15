"""What a training run is told: every argument once, with its type, default, range and meaning."""

import argparse
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from types import NoneType
from typing import Any, Literal, NamedTuple, get_args, get_origin, get_type_hints

from mnist_ddpm.data import MNIST

Range = tuple[str, Callable[[Any], bool]]
COUNT: Range = ("at least 1", lambda n: n >= 1)
NOT_NEGATIVE: Range = ("at least 0", lambda x: x >= 0)
POSITIVE: Range = ("above 0", lambda x: x > 0)
FRACTION: Range = ("at least 0 and below 1", lambda x: 0 <= x < 1)

# arguments that a resumed run must share with the run that wrote its checkpoint
FIXED = (
    "seed", "label_dropout", "random_flip", "prediction_type", "variance_type", "ddpm_num_steps", "ddpm_beta_schedule",
    "ddpm_log_snr", "loss_type", "timestep_sampling", "logit_mean", "logit_std", "uniform_share", "snr_gamma",
    "optimizer", "muon_learning_rate", "muon_momentum", "learning_rate", "adam_beta1", "adam_beta2",
    "adam_weight_decay", "adam_epsilon", "max_grad_norm", "use_ema", "ema_inv_gamma", "ema_power", "ema_max_decay",
)  # fmt: skip
# arguments of the learning rate's schedule, which a resumed run may change
SCHEDULE = ("lr_scheduler", "lr_warmup_steps", "lr_decay_steps")


def _arg(default: Any, help: str = "", allowed: Range | None = None, flags: tuple[str, ...] = ()) -> Any:
    """A field with its meaning, the range of its values, and further names of its flag."""
    return field(default=default, metadata={"help": help, "allowed": allowed, "flags": flags})


@dataclass
class TrainingArguments:
    """The arguments of `Trainer`; `examples/train.py` takes each of them as a flag.

    Raises:
        ValueError: an argument is out of its range, or two of them exclude each other.

    Example:
        >>> TrainingArguments(output_dir="digits", num_epochs=1).learning_rate
        0.002
    """

    # data
    dataset_name: str = _arg(
        MNIST,
        "Hub id, local folder (Parquet in the Hub's layout, or images) or Parquet file.",
        flags=("--train_data_dir",),
    )
    dataset_config_name: str | None = _arg(None, "Configuration of the data set, where it has more than one.")
    split: str = _arg("train", "Split to train on; slices such as train[:1000] work too.")
    image_column: str = _arg("image", "Column with the images.")
    label_column: str | None = _arg(
        None, "Column with the classes (label where each folder is a class), which the model is then told."
    )
    label_dropout: float = _arg(
        0.1, "Share of the images of each step whose class is hidden: the model learns to do without.", FRACTION
    )
    resolution: int | None = _arg(None, "Resize the shorter side of the images to this size.", COUNT)
    center_crop: bool = _arg(True, "Crop the center of images that are not square.")
    random_flip: bool = _arg(False, "Flip half of the images of each step horizontally.")
    channels: Literal[1, 3] | None = _arg(
        None, "1 makes all images gray, 3 RGB; by default as the U-Net's config or the images have it."
    )
    background: str = _arg("white", "Color below transparent images.")
    cache_dir: str | None = _arg(None, "Where `datasets` keeps what it has prepared.")

    # model
    model_config_name_or_path: str | None = _arg(
        None,
        "U-Net config (a folder or a Hub id), of an MNISTUNet2DModel or a UNet2DModel; by default the former as it "
        "comes, at the size of the images. The weights are new.",
    )
    init_from: str | None = _arg(
        None, "Saved pipeline or U-Net (a folder or a Hub id) to start from: its weights, and its config by default."
    )
    prediction_type: Literal["epsilon", "sample", "v_prediction"] = _arg(
        "v_prediction",
        "What the U-Net predicts: the noise, the image, or a mixture of both that is well posed at every t.",
    )
    variance_type: Literal["fixed_small", "fixed_large", "learned_range"] = _arg(
        "fixed_small", "Variance of the backward noise: the posterior's, beta, or learned between the two."
    )
    ddpm_num_steps: int = _arg(1000, "Training timesteps T.", COUNT)
    ddpm_beta_schedule: Literal["linear", "scaled_linear", "cosine", "squaredcos_cap_v2", "sigmoid"] = _arg(
        "squaredcos_cap_v2", "Schedule of the forward noise."
    )
    ddpm_log_snr: tuple[float, float] | None = _arg(
        None, "Instead of a beta schedule, for likelihood: a log SNR that falls from MAX to MIN in equal steps."
    )

    # training
    num_epochs: int = _arg(20, "Passes over the images.", COUNT)
    max_train_steps: int | None = _arg(None, "Optimizer steps; overrides --num_epochs.", COUNT)
    train_batch_size: int = _arg(64, "Per process and micro-batch.", COUNT)
    gradient_accumulation_steps: int = _arg(1, "Micro-batches of a step.", COUNT)
    optimizer: Literal["muon", "adamw"] = _arg(
        "muon", "Muon for the hidden weight matrices and AdamW for the rest, or AdamW for all."
    )
    muon_learning_rate: float = _arg(1e-2, "Of Muon.", POSITIVE)
    muon_momentum: float = _arg(0.95, "Of Muon.", FRACTION)
    learning_rate: float = _arg(2e-3, "Of AdamW.", POSITIVE)
    lr_scheduler: Literal[
        "linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup"
    ] = _arg("cosine", "How the learning rates change after the warm-up.")
    lr_warmup_steps: int = _arg(100, "Steps in which the learning rates rise from 0.", NOT_NEGATIVE)
    lr_decay_steps: int = _arg(
        0, "Over so many last steps the learning rates fall linearly to 0, whatever the schedule.", NOT_NEGATIVE
    )
    loss_type: Literal["simple", "vlb", "hybrid"] = _arg(
        "simple",
        "The squared error of the prediction; the variational bound in bits per dimension, with 10 times the squared "
        "error; or the squared error, with 0.001 of the bound for the learned variance alone (iDDPM).",
    )
    timestep_sampling: Literal["logit_normal", "uniform"] = _arg(
        "logit_normal", "How the timesteps of training are distributed."
    )
    logit_mean: float = _arg(0.0, "Mean of the logit of t / T.")
    logit_std: float = _arg(1.0, "Standard deviation of the logit of t / T.", POSITIVE)
    uniform_share: float = _arg(
        0.3, "Share of timesteps that are uniform instead, half in t, half in log(t + 1).", FRACTION
    )
    snr_gamma: float | None = _arg(None, "Min-SNR loss weights (arXiv 2303.09556) with this gamma.", POSITIVE)
    adam_beta1: float = _arg(0.9, "Of AdamW.", FRACTION)
    adam_beta2: float = _arg(0.99, "Of AdamW.", FRACTION)
    adam_weight_decay: float = _arg(0.0, "Of both optimizers.", NOT_NEGATIVE)
    adam_epsilon: float = _arg(1e-8, "Of AdamW.", POSITIVE)
    max_grad_norm: float = _arg(1.0, "Gradient norm to clip at; inf for none.", POSITIVE)
    use_ema: bool = _arg(True, "Save an exponential moving average of the weights.")
    ema_inv_gamma: float = _arg(1.0, "The EMA's decay is 1 - (1 + step / inv_gamma) ** -power.", POSITIVE)
    ema_power: float = _arg(0.75, "See --ema_inv_gamma.", POSITIVE)
    ema_max_decay: float = _arg(0.9999, "Upper limit of the EMA's decay.", FRACTION)
    seed: int = _arg(0, "Of everything random.", NOT_NEGATIVE)

    # machine
    mixed_precision: Literal["auto", "no", "bf16", "fp16"] = _arg(
        "auto", "auto: as Accelerate is configured, or else bf16 where the hardware computes in it."
    )
    compile: bool | None = _arg(
        None, "Use torch.compile; by default on a GPU, if it works and the run is long enough."
    )

    # output
    output_dir: str = _arg("mnist-ddpm", "For the pipeline, samples, checkpoints and logs.")
    overwrite_output_dir: bool = _arg(False, "Remove what an earlier run left there.")
    save_model_epochs: int = _arg(5, "Save the pipeline this often.", COUNT)
    keep_model_epochs: int | None = _arg(None, "Keep the pipeline of every so many epochs, in pipelines/.", COUNT)
    save_images_epochs: int = _arg(1, "Sample images this often.", COUNT)
    save_images_steps: int = _arg(
        100,
        "In the first epoch, sample images after this many steps, then after twice as many, and so on; 0: never.",
        NOT_NEGATIVE,
    )
    eval_batch_size: int = _arg(64, "Images to sample.", COUNT)
    ddpm_num_inference_steps: int = _arg(50, "DDIM steps to sample in.", COUNT)
    checkpointing_steps: int = _arg(500, "Save a checkpoint this often.", COUNT)
    checkpoints_total_limit: int | None = _arg(3, "Keep the newest ones only.", COUNT)
    resume_from_checkpoint: str | None = _arg(None, "Path of a checkpoint, or latest.")
    logger: Literal["tensorboard", "wandb", "none"] = _arg("tensorboard", "Where curves and samples go.")
    logging_dir: str = _arg("logs", "TensorBoard's folder, within --output_dir.")

    # Hub
    push_to_hub: bool = _arg(False, "Publish the pipeline when training ends.")
    hub_strategy: Literal["end", "checkpoint", "all_checkpoints"] = _arg(
        "end", "Besides the pipeline at the end, publish each checkpoint: as last-checkpoint, or under its own name."
    )
    hub_model_id: str | None = _arg(None, "Repository; by default the name of --output_dir.")
    hub_token: str | None = _arg(None, "By default the stored one (HF_TOKEN or `hf auth login`).")
    hub_private_repo: bool = _arg(False, "Create the repository as a private one.")

    command: list[str] = field(default_factory=list)
    """The command that started the run, for the model card."""

    def __post_init__(self) -> None:
        """Check each argument by itself, and those that depend on each other."""
        for name, meaning in arguments(type(self)).items():
            value = getattr(self, name)
            if value is None:
                continue
            if meaning.choices:
                require(
                    value in meaning.choices, f"{name} must be one of {', '.join(map(str, meaning.choices))}", value
                )
            elif meaning.allowed:
                in_words, is_allowed = meaning.allowed
                require(is_allowed(value), f"{name} must be {in_words}", value)
        learned = self.variance_type == "learned_range"
        require(
            self.ddpm_num_inference_steps <= self.ddpm_num_steps,
            f"ddpm_num_inference_steps must be at most ddpm_num_steps ({self.ddpm_num_steps})",
            self.ddpm_num_inference_steps,
        )
        require(
            not self.ddpm_log_snr or self.ddpm_beta_schedule == type(self).ddpm_beta_schedule,
            "ddpm_log_snr must not be given together with ddpm_beta_schedule",
            self.ddpm_log_snr,
        )
        require(
            not learned or self.loss_type != "simple",
            "loss_type must be hybrid or vlb, which train a variance, where variance_type is learned_range",
            self.loss_type,
        )
        require(
            learned or self.loss_type != "hybrid",
            "variance_type must be learned_range where loss_type is hybrid, whose second part trains the variance",
            self.variance_type,
        )
        require(
            not (self.overwrite_output_dir and self.resume_from_checkpoint),
            "overwrite_output_dir must not be given together with resume_from_checkpoint",
            self.overwrite_output_dir,
        )


class Argument(NamedTuple):
    """What there is to know of an argument: its type without None, its choices, range, default, meaning and flags."""

    kind: Any
    choices: tuple[Any, ...]
    allowed: Range | None
    default: Any
    help: str
    flags: tuple[str, ...]


def arguments(cls: type[TrainingArguments] = TrainingArguments) -> dict[str, Argument]:
    """All arguments by name, but for the command."""
    hints = get_type_hints(cls)
    described = {}
    for f in fields(cls):
        if f.metadata:
            options = get_args(hints[f.name])
            kind = options[options[0] is NoneType] if NoneType in options else hints[f.name]
            choices = get_args(kind) if get_origin(kind) is Literal else ()
            kind = type(choices[0]) if choices else kind
            described[f.name] = Argument(kind, choices, default=f.default, **f.metadata)
    return described


def add_flag(parser: argparse.ArgumentParser, name: str, argument: Argument) -> None:
    """Add the flag of an argument."""
    flags = [f"--{name}", *argument.flags]
    options = {"default": argument.default, "help": argument.help}
    if argument.kind is bool:
        parser.add_argument(*flags, action=argparse.BooleanOptionalAction, **options)
    elif argument.kind == tuple[float, float]:
        parser.add_argument(*flags, type=float, nargs=2, metavar=("MAX", "MIN"), **options)
    elif argument.choices:
        parser.add_argument(
            *flags, type=argument.kind, metavar=f"{{{','.join(map(str, argument.choices))}}}", **options
        )
    else:
        parser.add_argument(*flags, type=argument.kind, **options)


def require(condition: bool, rule: str, value: object, remedy: str = "") -> None:
    """Raise a ValueError, `rule, got value. remedy`, if a condition does not hold."""
    if not condition:
        raise ValueError(f"{rule}, got {value!r}. {remedy}".rstrip())


TrainingArguments.__doc__ = f"{TrainingArguments.__doc__}\n    Args:\n" + "".join(
    f"        {name}: {argument.help}\n" for name, argument in arguments().items()
)
