"""What the programs in `examples/` and `benchmarks/` share: where figures come from, and where they may go."""

import argparse
import os
import platform
import shlex
import sys
import tempfile
import traceback
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from mnist_ddpm import __version__

PACKAGES = ("torch", "diffusers", "transformers", "torchmetrics")


def provenance(args: argparse.Namespace) -> dict[str, Any]:
    """Return what a figure depends on besides the code: command, seed, versions and machine.

    Args:
        args: A command line, with `seed` and the list of words `command`.
    """
    return {
        "command": shlex.join(args.command),
        "seed": args.seed,
        "versions": {"mnist-ddpm": __version__} | {name: version(name) for name in PACKAGES},
        "machine": torch.cuda.get_device_name() if torch.cuda.is_available() else f"{os.cpu_count()} x {_cpu_name()}",
    }


def _cpu_name() -> str:
    """Model name of the processor where the system has it (Linux), or else its architecture."""
    cpu_info = Path("/proc/cpuinfo")
    lines = cpu_info.read_text(encoding="utf-8").splitlines() if cpu_info.exists() else []
    return next((line.split(": ")[1] for line in lines if line.startswith("model name")), platform.machine())


def check_writable(path: Path) -> None:
    """Raise an OSError, before any work, if this file can't be written; makes its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab") if path.exists() else tempfile.TemporaryFile(dir=path.parent):
        pass


def run(main: Callable[[Any], None], parse_args: Callable[[], Any], install: str) -> None:
    """Run a program that trains. What its user can mend ends it with one line; `install` says how to get a module."""
    try:
        main(parse_args())
    except KeyboardInterrupt:
        sys.exit("error: interrupted. Resume from the last checkpoint with --resume_from_checkpoint latest.")
    except ModuleNotFoundError as error:
        sys.exit(f"error: {error}. {install}")
    except OSError as error:
        sys.exit(f"error: {error}")
    except (ValueError, RuntimeError, ArithmeticError, MemoryError) as error:
        *_, innermost = traceback.walk_tb(error.__traceback__)
        if not innermost[0].f_globals.get("__name__", "").startswith("mnist_ddpm."):
            raise  # not one of the errors that the package raises itself
        sys.exit(f"error: {error}")
