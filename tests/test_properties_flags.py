"""Command lines, searched: flags are understood as they are written, or refused by one line that names the flag."""

import math

import evaluate
import numpy as np
import pytest
import sample
import torch
import train
from hypothesis import strategies as st
from PIL import Image
from strategies import arguments, attempt, searched

from mnist_ddpm import MNISTDDPMPipeline, MNISTDDPMScheduler, MNISTUNet2DModel
from mnist_ddpm.images import read_samples
from mnist_ddpm.sampling import SCHEDULERS

NO_INTS = ["", "one", "1.5", "nan", "inf", "1e3", "-1", "0x10", "9" * 30, "9" * 5000]
NO_COUNTS = [*NO_INTS, "0"]
NO_FLOATS = ["", "half", "nan", "-inf", "1,5", "1 2"]
NO_CHOICES = ["", "DDIM", "other", "1"]
FRACTION = st.floats(0, 0.99)
POSITIVE = st.floats(1e-6, 1e6)
COUNT = st.integers(1, 10_000)
NAMES = st.sampled_from(["run", "a/b", "../x", "with space", "-"])

TRAIN_GOOD = {
    "resolution": st.integers(1, 4096),
    "ddpm_num_steps": st.integers(100, 100_000),
    "ddpm_num_inference_steps": st.integers(1, 100),
    "ddpm_beta_schedule": st.sampled_from(["linear", "scaled_linear", "cosine", "squaredcos_cap_v2", "sigmoid"]),
    "prediction_type": st.sampled_from(["epsilon", "sample", "v_prediction"]),
    "num_epochs": COUNT,
    "max_train_steps": COUNT,
    "train_batch_size": COUNT,
    "gradient_accumulation_steps": COUNT,
    "learning_rate": POSITIVE,
    "lr_scheduler": st.sampled_from(["linear", "cosine", "constant"]),
    "lr_warmup_steps": st.integers(0, 1000),
    "snr_gamma": POSITIVE,
    "adam_beta1": FRACTION,
    "adam_beta2": FRACTION,
    "adam_weight_decay": st.floats(0, 1),
    "adam_epsilon": POSITIVE,
    "max_grad_norm": POSITIVE | st.just(math.inf),
    "ema_max_decay": FRACTION,
    "ema_power": POSITIVE,
    "seed": st.integers(0, 2**32 - 1),
    "mixed_precision": st.sampled_from(["auto", "no", "bf16", "fp16"]),
    "output_dir": NAMES,
    "save_images_steps": st.integers(0, 1000),
    "eval_batch_size": COUNT,
    "checkpoints_total_limit": COUNT,
    "logger": st.sampled_from(["tensorboard", "wandb", "none"]),
}
TRAIN_BAD = {
    **{
        name: [*NO_COUNTS, "9" * 12]
        for name in ("resolution", "ddpm_num_steps", "train_batch_size", "eval_batch_size")
    },
    **{name: NO_COUNTS for name in ("num_epochs", "max_train_steps", "gradient_accumulation_steps")},
    **{name: NO_COUNTS for name in ("ddpm_num_inference_steps", "checkpoints_total_limit")},
    **{name: [*NO_FLOATS, "0", "-1", "inf"] for name in ("learning_rate", "snr_gamma", "adam_epsilon", "ema_power")},
    **{name: [*NO_FLOATS, "1", "-0.1", "inf"] for name in ("adam_beta1", "adam_beta2", "ema_max_decay")},
    **{
        name: NO_CHOICES
        for name in ("ddpm_beta_schedule", "prediction_type", "lr_scheduler", "mixed_precision", "logger")
    },
    "lr_warmup_steps": NO_INTS,
    "save_images_steps": NO_INTS,
    "adam_weight_decay": [*NO_FLOATS, "-0.1", "inf"],
    "max_grad_norm": [*NO_FLOATS, "0", "-1"],
    "seed": [*NO_INTS, str(2**32)],
    "no_such_flag": ["1"],
}
SAMPLE_GOOD = {
    "num_images": COUNT,
    "batch_size": COUNT,
    "num_inference_steps": COUNT,
    "scheduler": st.sampled_from(sorted(SCHEDULERS)),
    "eta": st.floats(0, 1),
    "noise_scale": st.floats(0, 1),
    "seed": st.integers(0, 10**30),
    "output": st.sampled_from(["grid.png", "a/b.png"]),
    "output_dir": NAMES,
    "model": NAMES,
}
SAMPLE_BAD = {
    "num_images": [*NO_COUNTS[:7], "0", "-5"],
    **{name: [*NO_COUNTS[:7], "0", "-5"] for name in ("batch_size", "num_inference_steps")},
    "eta": ["", "half", "1,5"],
    "noise_scale": ["", "half", "1,5"],
    "seed": NO_INTS[:7],
    "output": ["", "grid.jpg", "grid"],
    "trajectory": ["", "strip.mp4", "strip"],
    "no_such_flag": ["1"],
}
EVALUATE_GOOD = {
    "num_images": COUNT,
    "seed": st.integers(0, 2**32 - 1),
    "num_inference_steps": COUNT,
    "scheduler": st.sampled_from(sorted(SCHEDULERS)),
    "batch_size": COUNT,
    "output": NAMES,
}
EVALUATE_BAD = {
    **{name: [*NO_COUNTS[:7], "0", "-5"] for name in ("num_images", "num_inference_steps", "batch_size")},
    "seed": NO_INTS[:7],
    "no_such_flag": ["1"],
}
PROGRAMS = {
    "train": (train, TRAIN_GOOD, TRAIN_BAD, []),
    "sample": (sample, SAMPLE_GOOD, SAMPLE_BAD, []),
    "evaluate": (evaluate, EVALUATE_GOOD, EVALUATE_BAD, ["--model=somewhere"]),
}
CASES = st.one_of([st.tuples(st.just(name), arguments(good, bad)) for name, (_, good, bad, _) in PROGRAMS.items()])


@searched(
    75,
    case=CASES,
    examples=[
        {"case": (program, ({name: value}, frozenset([name])))}
        for program, name, value in [
            ("train", "ddpm_num_steps", "1000000000000"),
            ("train", "ddpm_beta_schedule", "other"),
            ("train", "eval_batch_size", "1000000000000"),
            ("train", "resolution", "1000000000"),
            ("sample", "num_images", "0"),
            ("sample", "seed", "-1"),
            ("sample", "num_inference_steps", "0"),
            ("evaluate", "seed", "-1"),
        ]
    ],
)
def test_flags_mean_what_they_say_or_are_refused(capsys, case):
    program, (values, wrong) = case
    module, _, _, always = PROGRAMS[program]
    try:
        args = module.parse_args([*always, *(f"--{name}={value}" for name, value in values.items())])
    except SystemExit:
        args = None
    if args is None:
        *_, line = capsys.readouterr().err.strip().splitlines()
        named = [name for name in sorted(wrong) if f"--{name}" in line]
        assert ": error: " in line
        assert named, line
        return named[0]
    assert not wrong, values
    for name, value in values.items():
        assert str(getattr(args, name)) == str(value) or getattr(args, name) == value
    return None


# Runs


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A saved pipeline of a small U-Net whose output is not zero."""
    torch.manual_seed(0)
    unet = MNISTUNet2DModel(
        sample_size=4, block_out_channels=(8,), down_block_types=("DownBlock2D",), attention_head_dim=8
    )
    for weight in unet.parameters():
        torch.nn.init.normal_(weight, std=0.1)
    folder = tmp_path_factory.mktemp("model")
    MNISTDDPMPipeline(unet=unet, scheduler=MNISTDDPMScheduler(num_train_timesteps=20)).save_pretrained(folder)
    return str(folder)


RUN_GOOD = {
    "num_images": st.integers(1, 3),
    "batch_size": st.integers(1, 4),
    "seed": st.integers(0, 10**30),
    "num_inference_steps": st.integers(1, 4),
    "amount": st.floats(0, 1),
}
RUN_BAD = {
    "num_inference_steps": [21, 10**12],
    "amount": ["nan", "inf", "-1", "1e9"],
    "model": ["", "no such folder", "a/b/c", "/", "~"],
}


@searched(
    12,
    scheduler=st.sampled_from(["ddpm", "ddim"]),
    case=arguments(RUN_GOOD, RUN_BAD, required=["num_inference_steps", "num_images"]),
    examples=[
        {"scheduler": "ddim", "case": ({"num_inference_steps": 1, "num_images": 1, name: value}, frozenset([name]))}
        for name, value in [
            ("model", ""),
            ("amount", "nan"),
        ]
    ],
)
def test_a_run_of_sample_writes_images_or_says_what_is_wrong(model, tmp_path_factory, scheduler, case):
    values, wrong = dict(case[0]), set(case[1])
    amount = {"ddpm": "noise_scale", "ddim": "eta"}[scheduler]
    if "amount" in values:
        values[amount] = values.pop("amount")
        wrong = {amount if name == "amount" else name for name in wrong}
    output = tmp_path_factory.mktemp("run") / "grid.png"
    flags = {"scheduler": scheduler, "output": output, "model": model, "device": "cpu"} | values
    args = sample.parse_args([f"--{name}={value}" for name, value in flags.items()])
    _, named = attempt(lambda: sample.main(args), wrong)
    if named:
        assert not output.exists()
        return named
    columns = math.ceil(math.sqrt(values["num_images"]))
    pixels = np.asarray(Image.open(output))
    assert pixels.shape == (math.ceil(values["num_images"] / columns) * 4, columns * 4)
    return None


@pytest.mark.parametrize("flags", [["--samples="], ["--samples=missing.npy"]])
def test_samples_of_an_empty_name_are_not_those_of_the_package(flags):
    args = evaluate.parse_args(flags)
    with pytest.raises(FileNotFoundError):
        read_samples(args.samples)
