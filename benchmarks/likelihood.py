"""What each choice of a training for likelihood is worth, in bits per dimension: one of them changed at a time.

Each row is a training of as many steps, few of them, then the variational bound on test images, estimated
from the same images. Rows that the output file has already are kept: a comparison that was stopped resumes.
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from contenders import Ours
from quality import earlier_figures, write_json

from mnist_ddpm.cli import provenance
from mnist_ddpm.data import load_mnist
from mnist_ddpm.likelihood import bits_per_dim
from mnist_ddpm.metrics import random_subset

ROOT = Path(__file__).resolve().parent.parent
UNET = json.loads((ROOT / "examples" / "likelihood" / "config.json").read_text(encoding="utf-8"))
ARGUMENTS = {
    "ddpm_num_steps": 256,
    "ddpm_log_snr": (9.0, -5.0),
    "variance_type": "learned_range",
    "loss_type": "vlb",
    "max_grad_norm": 10.0,
}

# what is chosen otherwise, in the arguments of training and in the U-Net; None: as it is by default
CHANGES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "all of them": ({}, {}),
    "no Fourier features": ({}, {"fourier_frequencies": None}),
    "default U-Net, with Fourier features": (
        {},
        dict.fromkeys(("patch_size", "block_out_channels", "down_block_types")),
    ),
    "T = 64": ({"ddpm_num_steps": 64}, {}),
    "T = 1000": ({"ddpm_num_steps": 1000}, {}),
    "T = 1000, cosine betas": ({"ddpm_num_steps": 1000, "ddpm_log_snr": None}, {}),
    "T = 1000, linear betas": (
        {"ddpm_num_steps": 1000, "ddpm_log_snr": None, "ddpm_beta_schedule": "linear"},
        {},
    ),
    "fixed_small": ({"variance_type": "fixed_small"}, {}),
    "fixed_large": ({"variance_type": "fixed_large"}, {}),
    "loss hybrid": ({"loss_type": "hybrid"}, {}),
    "epsilon-prediction": ({"prediction_type": "epsilon"}, {}),
    "none of them": (dict.fromkeys(ARGUMENTS), dict.fromkeys(UNET)),
}


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    argv = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--changes", nargs="+", choices=CHANGES, default=list(CHANGES), metavar="CHANGE")
    parser.add_argument("--max_train_steps", type=int, default=300)
    parser.add_argument("--num_images", type=int, default=500, help="of the test set, to measure")
    parser.add_argument("--num_timesteps_per_image", type=int, default=24)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results" / "likelihood.json")
    args = parser.parse_args(argv)
    args.command = ["python", "benchmarks/likelihood.py", *argv]
    return args


def arguments_of(change: str, folder: Path) -> dict[str, Any]:
    """The arguments of training for all choices but those changed; writes the U-Net's config to a folder."""
    argument_changes, unet_changes = CHANGES[change]
    unet = {key: value for key, value in (UNET | unet_changes).items() if value is not None}
    config = json.dumps(unet | {"_class_name": UNET["_class_name"]})
    (folder / "config.json").write_text(config, encoding="utf-8")
    arguments = {name: value for name, value in (ARGUMENTS | argument_changes).items() if value is not None}
    return arguments | {"model_config_name_or_path": str(folder)}


def main(args: argparse.Namespace) -> dict[str, Any]:
    """Train and measure each, and write what there is after each."""
    settings = {name: getattr(args, name) for name in ("max_train_steps", "num_images", "num_timesteps_per_image")}
    settings |= {"seed": args.seed, "arguments": ARGUMENTS, "unet": UNET}
    result: dict[str, Any] = {
        "likelihood": earlier_figures(args.output, "likelihood", settings),
        "settings": settings,
        **provenance(args),
    }
    test_images = random_subset(load_mnist("test"), args.num_images, args.seed)
    for name in args.changes:
        if name in result["likelihood"]:
            continue
        with tempfile.TemporaryDirectory() as folder:
            options = {"max_train_steps": args.max_train_steps, "lr_warmup_steps": 50, "seed": args.seed}
            training = Ours(Path(folder) / "training", **options, **arguments_of(name, Path(folder)))
            for _ in range(args.max_train_steps):
                training.step()
            pipe = training.trainer.published_pipeline()
        generator = torch.Generator().manual_seed(args.seed)
        bound = bits_per_dim(pipe.unet, pipe.scheduler, test_images, args.num_timesteps_per_image, generator=generator)
        result["likelihood"][name] = bound.summary()
        print(f"{name:22} {bound.total:.3f} +- {bound.standard_error:.3f} bits per dimension")
        write_json(result, args.output)
    return result


if __name__ == "__main__":
    main(parse_args())
