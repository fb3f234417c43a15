"""The arguments of training: one description for Python and for the command line."""

import dataclasses
import math

import pytest
import train

from mnist_ddpm.training import TrainingArguments
from mnist_ddpm.training.arguments import FIXED, SCHEDULE, arguments


def test_the_command_line_is_that_of_the_class():
    args = train.parse_args([])
    assert args == dataclasses.replace(TrainingArguments(), command=args.command)
    flags = ["--num_epochs", "3", "--no-use_ema", "--ddpm_log_snr", "6", "-2", "--snr_gamma", "5", "--channels", "3"]
    args = train.parse_args(flags)
    assert (args.num_epochs, args.use_ema, args.snr_gamma, args.channels) == (3, False, 5.0, 3)
    assert tuple(args.ddpm_log_snr) == (6, -2)
    assert args.command == ["accelerate", "launch", "examples/train.py", *flags]


def test_each_argument_is_described():
    names = {field.name for field in dataclasses.fields(TrainingArguments)} - {"command"}
    assert arguments().keys() == names > {*FIXED, *SCHEDULE}
    assert all(f"{name}: {argument.help}" in TrainingArguments.__doc__ for name, argument in arguments().items())
    assert all(argument.help.endswith((".", "0: never.")) for argument in arguments().values())


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("max_train_steps", -3),
        ("learning_rate", math.nan),
        ("label_dropout", 1.0),
        ("max_grad_norm", 0.0),
        ("seed", -1),
        ("channels", 2),
        ("lr_scheduler", "step"),
        ("ddpm_num_inference_steps", 1001),
    ],
)
def test_values_out_of_range_are_refused_by_name(capsys, name, value):
    with pytest.raises(ValueError, match=f"^{name} must be .*, got {value!r}"):
        TrainingArguments(**{name: value})
    with pytest.raises(SystemExit):
        train.parse_args([f"--{name}={value}"])
    assert name in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize(
    ("values", "name"),
    [
        ({"variance_type": "learned_range"}, "loss_type"),
        ({"loss_type": "hybrid"}, "variance_type"),
        ({"ddpm_log_snr": (6, -2), "ddpm_beta_schedule": "linear"}, "ddpm_log_snr"),
        ({"overwrite_output_dir": True, "resume_from_checkpoint": "latest"}, "overwrite_output_dir"),
    ],
)
def test_arguments_that_do_not_go_together_are_refused(values, name):
    with pytest.raises(ValueError, match=f"^{name} must"):
        TrainingArguments(**values)


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        ("--num_epochs 1.5", "--num_epochs"),
        ("--learning_rate x", "--learning_rate"),
        ("--ddpm_log_snr 6", "--ddpm_log_snr"),
        ("--lerning_rate 1", "unrecognized arguments: --lerning_rate 1 (did you mean --learning_rate?)"),
        ("--dataloader_num_workers=4", "--dataloader_num_workers=4 (the images are decoded once"),
        ("--zzz", "unrecognized arguments: --zzz"),
    ],
)
def test_what_is_no_flag_or_no_number_is_named(capsys, flags, named):
    with pytest.raises(SystemExit):
        train.parse_args(flags.split())
    assert named in capsys.readouterr().err.splitlines()[-1]


def test_the_command_of_diffusers_readme_means_the_same():
    command = (
        "--train_data_dir=flowers --resolution=64 --center_crop --random_flip --output_dir=ddpm-ema-flowers-64 "
        "--train_batch_size=16 --num_epochs=100 --gradient_accumulation_steps=1 --use_ema --learning_rate=1e-4 "
        "--lr_warmup_steps=500 --mixed_precision=no --push_to_hub"
    )
    args = train.parse_args(command.split())
    assert (args.dataset_name, args.resolution, args.learning_rate) == ("flowers", 64, 1e-4)
    assert args.center_crop and args.random_flip and args.push_to_hub  # noqa: PT018
