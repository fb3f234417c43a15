"""Train a diffusion model on MNIST, or on any set of images: `accelerate launch examples/train.py`.

The flags are those of diffusers' `train_unconditional.py`; what a run does with them is in `trainer.py`.
"""

import argparse
import math
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
MNIST = HERE.parent / "data" / "mnist"


def number(kind: type, allowed: Callable[[Any], bool], range_in_words: str) -> Callable[[str], Any]:
    """A type for argparse: numbers of a kind and a range."""

    def parse(text: str) -> Any:
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not allowed(value):
            raise argparse.ArgumentTypeError(f"{text!r} is not {range_in_words}")
        return value

    return parse


positive_int = number(int, lambda n: 1 <= n < 2**31, "an integer of at least 1, below 2**31")
non_negative_int = number(int, lambda n: 0 <= n < 2**31, "an integer of at least 0, below 2**31")
# what schedulers, U-Nets and grids of images go up to
num_timesteps = number(int, lambda n: 1 <= n <= 100_000, "an integer from 1 to 100,000")
pixels = number(int, lambda n: 1 <= n <= 4096, "an integer from 1 to 4096")
grid_size = number(int, lambda n: 1 <= n <= 10_000, "an integer from 1 to 10,000")
batch = number(int, lambda n: 1 <= n <= 1_000_000, "an integer from 1 to 1,000,000")
seed = number(int, lambda n: 0 <= n < 2**32, "an integer in [0, 2**32)")
positive = number(float, lambda x: 0 < x < math.inf, "a number above 0")
positive_or_inf = number(float, lambda x: x > 0, "a number above 0, or inf")
non_negative = number(float, lambda x: 0 <= x < math.inf, "a number of at least 0")
finite = number(float, math.isfinite, "a finite number")
fraction = number(float, lambda x: 0 <= x < 1, "a number in [0, 1)")


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Read the flags."""
    argv = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(
        description="Train a diffusion model on images.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        allow_abbrev=False,  # the command is kept beside the results, but for --hub_token
    )
    flag = argparse.BooleanOptionalAction

    data = parser.add_argument_group("data")
    data.add_argument(
        "--dataset_name",
        default=str(MNIST),
        help="Hub id, local folder (Parquet in the Hub's layout, or images) or Parquet file.",
    )
    data.add_argument("--dataset_config_name", help="Configuration of the data set, where it has more than one.")
    data.add_argument("--split", default="train", help="Split to train on; slices such as train[:1000] work too.")
    data.add_argument("--image_column", default="image", help="Column with the images.")
    data.add_argument("--resolution", type=pixels, help="Resize and center-crop the images to this size.")
    data.add_argument("--cache_dir", help="Where `datasets` keeps what it has prepared.")

    model = parser.add_argument_group("model")
    model.add_argument(
        "--model_config_name_or_path",
        help="U-Net config (a folder or a Hub id), of an MNISTUNet2DModel or a UNet2DModel; by default the former as "
        "it comes, at the size of the images.",
    )
    model.add_argument(
        "--prediction_type",
        default="v_prediction",
        choices=["epsilon", "sample", "v_prediction"],
        help="What the U-Net predicts: the noise, the image, or a mixture of both that is well posed at every t.",
    )
    model.add_argument(
        "--variance_type",
        default="fixed_small",
        choices=["fixed_small", "fixed_large", "learned_range"],
        help="Variance of the backward noise: the posterior's, beta, or learned between the two.",
    )
    model.add_argument("--ddpm_num_steps", type=num_timesteps, default=1000, help="Training timesteps T.")
    model.add_argument(
        "--ddpm_beta_schedule",
        default="squaredcos_cap_v2",
        choices=["linear", "scaled_linear", "cosine", "squaredcos_cap_v2", "sigmoid"],
    )
    model.add_argument(
        "--ddpm_log_snr",
        type=finite,
        nargs=2,
        metavar=("MAX", "MIN"),
        help="Instead of a beta_schedule, for likelihood: a log SNR that falls from MAX to MIN in equal steps.",
    )

    training = parser.add_argument_group("training")
    training.add_argument("--num_epochs", type=positive_int, default=20)
    training.add_argument("--max_train_steps", type=positive_int, help="Overrides --num_epochs.")
    training.add_argument("--train_batch_size", type=batch, default=64, help="Per process and micro-batch.")
    training.add_argument("--gradient_accumulation_steps", type=positive_int, default=1)
    training.add_argument(
        "--optimizer",
        default="muon",
        choices=["muon", "adamw"],
        help="Muon for the hidden weight matrices and AdamW for the rest, or AdamW for all.",
    )
    training.add_argument("--muon_learning_rate", type=positive, default=1e-2)
    training.add_argument("--muon_momentum", type=fraction, default=0.95)
    training.add_argument("--learning_rate", type=positive, default=2e-3, help="Of AdamW.")
    training.add_argument(
        "--lr_scheduler",
        default="cosine",
        choices=["linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup"],
    )
    training.add_argument("--lr_warmup_steps", type=non_negative_int, default=500)
    training.add_argument(
        "--loss_type",
        default="simple",
        choices=["simple", "vlb", "hybrid"],
        help="The squared error of the prediction; the variational bound in bits per dimension, with 10 times the "
        "squared error; or the squared error, with 0.001 of the bound for the learned variance alone (iDDPM).",
    )
    training.add_argument(
        "--timestep_sampling",
        default="logit_normal",
        choices=["logit_normal", "uniform"],
        help="How the timesteps of training are distributed.",
    )
    training.add_argument("--logit_mean", type=finite, default=0.0, help="Mean of the logit of t / T.")
    training.add_argument("--logit_std", type=positive, default=1.0, help="Standard deviation of the logit of t / T.")
    training.add_argument(
        "--uniform_share", type=fraction, default=0.2, help="Share of uniform timesteps among logit-normal ones."
    )
    training.add_argument(
        "--snr_gamma", type=positive, help="Min-SNR loss weights (arXiv 2303.09556) with this gamma."
    )
    training.add_argument("--adam_beta1", type=fraction, default=0.9)
    training.add_argument("--adam_beta2", type=fraction, default=0.99)
    training.add_argument("--adam_weight_decay", type=non_negative, default=0.0)
    training.add_argument("--adam_epsilon", type=positive, default=1e-8)
    training.add_argument(
        "--max_grad_norm", type=positive_or_inf, default=1.0, help="Gradient norm to clip at; inf for none."
    )
    training.add_argument("--use_ema", action=flag, default=True, help="Save an exponential moving average.")
    training.add_argument("--ema_inv_gamma", type=positive, default=1.0)
    training.add_argument("--ema_power", type=positive, default=0.75)
    training.add_argument("--ema_max_decay", type=fraction, default=0.9999)
    training.add_argument("--seed", type=seed, default=0)

    machine = parser.add_argument_group("machine")
    machine.add_argument(
        "--mixed_precision",
        default="auto",
        choices=["auto", "no", "bf16", "fp16"],
        help="auto: as Accelerate is configured, or else bf16 where the hardware computes in it.",
    )
    machine.add_argument(
        "--compile",
        action=flag,
        help="Use torch.compile; by default on a GPU, if it works and the run is long enough.",
    )

    output = parser.add_argument_group("output")
    output.add_argument("--output_dir", default="mnist-ddpm", help="For the pipeline, samples, checkpoints and logs.")
    output.add_argument("--overwrite_output_dir", action="store_true", help="Remove what an earlier run left there.")
    output.add_argument("--save_model_epochs", type=positive_int, default=5, help="Save the pipeline this often.")
    output.add_argument(
        "--keep_model_epochs", type=positive_int, help="Keep the pipeline of every so many epochs, in pipelines/."
    )
    output.add_argument("--save_images_epochs", type=positive_int, default=1, help="Sample images this often.")
    output.add_argument(
        "--save_images_steps",
        type=non_negative_int,
        default=100,
        help="In the first epoch, sample images after this many steps, then after twice as many, and so on; 0: never.",
    )
    output.add_argument("--eval_batch_size", type=grid_size, default=64, help="Images to sample.")
    output.add_argument("--ddpm_num_inference_steps", type=num_timesteps, default=50, help="DDIM steps to sample in.")
    output.add_argument("--checkpointing_steps", type=positive_int, default=500)
    output.add_argument("--checkpoints_total_limit", type=positive_int, default=3, help="Keep the newest ones only.")
    output.add_argument("--resume_from_checkpoint", help="Path of a checkpoint, or latest.")
    output.add_argument("--logger", default="tensorboard", choices=["tensorboard", "wandb", "none"])
    output.add_argument("--logging_dir", default="logs", help="TensorBoard's folder, within --output_dir.")

    hub = parser.add_argument_group("hub")
    hub.add_argument("--push_to_hub", action="store_true", help="Publish the pipeline when training ends.")
    hub.add_argument(
        "--hub_strategy",
        default="end",
        choices=["end", "checkpoint", "all_checkpoints"],
        help="Besides the pipeline at the end, publish each checkpoint: as last-checkpoint, or under its own name.",
    )
    hub.add_argument("--hub_model_id", help="Repository; by default the name of --output_dir.")
    hub.add_argument("--hub_token", help="By default the stored one (HF_TOKEN or `hf auth login`).")
    hub.add_argument("--hub_private_repo", action="store_true", help="Create the repository as a private one.")

    args = parser.parse_args(argv)
    if args.ddpm_num_inference_steps > args.ddpm_num_steps:
        parser.error(
            f"--ddpm_num_inference_steps {args.ddpm_num_inference_steps} must not be above --ddpm_num_steps "
            f"{args.ddpm_num_steps}"
        )
    if args.ddpm_log_snr and args.ddpm_beta_schedule != parser.get_default("ddpm_beta_schedule"):
        parser.error("--ddpm_log_snr and --ddpm_beta_schedule exclude each other")
    learned = args.variance_type == "learned_range"
    if args.loss_type == "simple" and learned:
        parser.error("--variance_type learned_range needs --loss_type hybrid or vlb: simple does not train a variance")
    if args.loss_type == "hybrid" and not learned:
        parser.error("--loss_type hybrid needs --variance_type learned_range: its second part trains the variance")
    if args.overwrite_output_dir and args.resume_from_checkpoint:
        parser.error("--overwrite_output_dir and --resume_from_checkpoint exclude each other")
    args.command = ["accelerate", "launch", "examples/train.py", *argv]
    return args


def main(args: argparse.Namespace) -> None:
    """Train by the flags."""
    from mnist_ddpm.training.trainer import Trainer  # here, so that --help need not wait for torch

    Trainer(args).train()


if __name__ == "__main__":
    try:
        main(parse_args())
    except KeyboardInterrupt:
        sys.exit("error: interrupted: --resume_from_checkpoint latest goes on from the last checkpoint")
    except Exception as error:
        raised_in = Path(traceback.extract_tb(error.__traceback__)[-1].filename).resolve().parent
        if raised_in != HERE and "mnist_ddpm" not in (raised_in.name, raised_in.parent.name):
            raise  # not one of the errors that these files foresee and explain
        sys.exit(f"error: {error}")
