"""What the programs in `examples/` and `benchmarks/` share: where figures come from, and where they may go."""

import argparse
import os
import platform
import shlex
import tempfile
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
