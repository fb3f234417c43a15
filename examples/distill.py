"""Distill a saved pipeline into a student that makes images in 1 to 4 steps, or another number.

`python examples/distill.py --init_from src/mnist_ddpm/pretrained --output_dir few-steps`

Each flag is an argument of `mnist_ddpm.training.distillation.DistillationArguments`; the run is a training run, with
its checkpoints, EMA and pictures: `--resume_from_checkpoint latest` resumes it.
"""

import argparse
import sys

INSTALL = "In a checkout: pip install -e '.[train]'"
try:
    from mnist_ddpm.cli import run
    from mnist_ddpm.training.arguments import add_flag, arguments
    from mnist_ddpm.training.distillation import WITHOUT_EFFECT, DistillationArguments, Distiller
except ModuleNotFoundError as error:
    sys.exit(f"error: {error}. {INSTALL}")

# these are taken from the saved pipeline
WITHOUT_FLAG = {*WITHOUT_EFFECT, "prediction_type", "ddpm_num_steps", "ddpm_beta_schedule"}


def parse_args(argv: list[str] | None = None) -> DistillationArguments:
    """Read the flags."""
    argv = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        allow_abbrev=False,  # the command is kept beside the results, but for --hub_token
    )
    for name, argument in arguments(DistillationArguments).items():
        if name not in WITHOUT_FLAG:
            add_flag(parser, name, argument)
    values = vars(parser.parse_args(argv))
    try:
        return DistillationArguments(**values, command=["python", "examples/distill.py", *argv])
    except ValueError as error:
        parser.error(str(error))


def main(args: DistillationArguments) -> None:
    """Distill."""
    Distiller(args).train()


if __name__ == "__main__":
    run(main, parse_args, INSTALL)
