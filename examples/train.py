"""Train a diffusion model on MNIST, or on any set of images.

`python examples/train.py` trains in one process, `accelerate launch examples/train.py` as Accelerate is configured.
Each flag is an argument of `mnist_ddpm.training.TrainingArguments`; the run itself is `mnist_ddpm.training.Trainer`.
"""

import argparse
import difflib
import sys

INSTALL = "In a checkout: pip install -e '.[train]'"
try:
    from mnist_ddpm.cli import run
    from mnist_ddpm.training import Trainer, TrainingArguments
    from mnist_ddpm.training.arguments import add_flag, arguments
except ModuleNotFoundError as error:
    sys.exit(f"error: {error}. {INSTALL}")

NOT_TAKEN = {  # flags of diffusers' train_unconditional.py
    "--dataloader_num_workers": "the images are decoded once and kept in memory",
    "--preserve_input_precision": "images have 8 bits",
    "--enable_xformers_memory_efficient_attention": "PyTorch's own attention needs no switch",
    "--local_rank": "the launcher sets it",
}


def parse_args(argv: list[str] | None = None) -> TrainingArguments:
    """Read the flags."""
    argv = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(
        description="Train a diffusion model on images.",
        epilog="The flags of diffusers' train_unconditional.py work, but for "
        + ", ".join(f"{flag} ({reason})" for flag, reason in NOT_TAKEN.items()),
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        allow_abbrev=False,  # the command is kept beside the results, but for --hub_token
    )
    for name, argument in arguments().items():
        add_flag(parser, name, argument)
    values, unknown = parser.parse_known_args(argv)
    if unknown:
        flag = unknown[0].split("=")[0]
        closest = difflib.get_close_matches(flag, [f"--{name}" for name in arguments()], n=1)
        hint = NOT_TAKEN.get(flag, "".join(f"did you mean {name}?" for name in closest))
        parser.error(f"unrecognized arguments: {' '.join(unknown)}" + f" ({hint})" * bool(hint))
    try:
        return TrainingArguments(**vars(values), command=["accelerate", "launch", "examples/train.py", *argv])
    except ValueError as error:
        parser.error(str(error))


def main(args: TrainingArguments) -> None:
    """Train."""
    Trainer(args).train()


if __name__ == "__main__":
    run(main, parse_args, INSTALL)
