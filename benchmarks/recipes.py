"""The search for the U-Net and the recipe: one change at a time, each trained on as many images, each scored.

Each row is a training by `Trainer` at its defaults but for one thing, with a warm-up over the first tenth of its steps
and a cosine decay to 0. Scores are FID, and the error of v on test images in each tenth of [0, T). "another seed" and
"none" should be alike: how far they are apart is what chance does. Rows that the output file has already are kept.
"""

import argparse
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from contenders import Ours
from quality import Quality, earlier_figures, loss_over_t, write_json

from mnist_ddpm import MNISTUNet2DModel
from mnist_ddpm.cli import provenance
from mnist_ddpm.data import load_mnist

ROOT = Path(__file__).resolve().parent.parent
TIMESTEPS_PER_TENTH = 5
# what is changed: arguments of training, and of the U-Net
CHANGES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "none": ({}, {}),
    "another seed": ({"seed": 1000}, {}),
    "AdamW": ({"optimizer": "adamw"}, {}),
    "Muon 0.005": ({"muon_learning_rate": 0.005}, {}),
    "Muon 0.02": ({"muon_learning_rate": 0.02}, {}),
    "uniform t": ({"timestep_sampling": "uniform"}, {}),
    "AdamW, uniform t": ({"optimizer": "adamw", "timestep_sampling": "uniform"}, {}),
    "no share of uniform t": ({"uniform_share": 0.0}, {}),
    "logit-normal(0.4, 1)": ({"logit_mean": 0.4}, {}),
    "logit-normal(-0.4, 1)": ({"logit_mean": -0.4}, {}),
    "min-SNR weights, gamma 5": ({"snr_gamma": 5.0}, {}),
    "batch 32": ({"train_batch_size": 32}, {}),
    "batch 128": ({"train_batch_size": 128}, {}),
    "batch 128, Muon 0.015": ({"train_batch_size": 128, "muon_learning_rate": 0.015}, {}),
    "batch 512": ({"train_batch_size": 512}, {}),
    "batch 512, Muon 0.03": ({"train_batch_size": 512, "muon_learning_rate": 0.03}, {}),
    "no EMA": ({"use_ema": False}, {}),
    "shorter EMA (power 2/3)": ({"ema_power": 0.6667}, {}),
    "longer EMA (power 0.85)": ({"ema_power": 0.85}, {}),
    "weight decay 0.01": ({"adam_weight_decay": 0.01}, {}),
    "weight decay 0.1": ({"adam_weight_decay": 0.1}, {}),
    "no pixel_gain": ({}, {"pixel_gain": False}),
    "channels (48, 96)": ({}, {"block_out_channels": (48, 96)}),
    "channels (96, 192)": ({}, {"block_out_channels": (96, 192)}),
    "2 layers": ({}, {"layers_per_block": 2}),
}


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    argv = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--changes", nargs="+", choices=CHANGES, default=list(CHANGES), metavar="CHANGE")
    parser.add_argument("--images", type=int, default=128_000, help="to train on, each")
    parser.add_argument("--num_images", type=int, default=2000, help="samples for each FID")
    parser.add_argument("--num_inference_steps", type=int, default=25, help="of DDIM")
    parser.add_argument("--num_test_images", type=int, default=500, help="for the error of v")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results" / "recipes.json")
    args = parser.parse_args(argv)
    args.command = ["python", "benchmarks/recipes.py", *argv]
    return args


def recipe(name: str, args: argparse.Namespace, quality: Quality) -> dict[str, Any]:
    """Train with a change and score: a row."""
    changes, unet_config = CHANGES[name]
    batch_size = changes.get("train_batch_size", 64)
    steps = args.images // batch_size
    options = {"max_train_steps": steps, "lr_warmup_steps": steps // 10, "seed": args.seed, **changes}
    with tempfile.TemporaryDirectory() as folder:
        MNISTUNet2DModel(**unet_config).save_config(folder)
        training = Ours(Path(folder, "run"), model_config_name_or_path=folder, **options)
        start = time.perf_counter()
        for _ in range(steps):
            training.step()
        images_per_second = steps * batch_size / (time.perf_counter() - start)
    pipe = training.pipeline("ddim")
    timesteps = torch.linspace(0, len(pipe.scheduler) - 1, 10 * TIMESTEPS_PER_TENTH).long()
    errors = loss_over_t(training.pipeline("ddpm"), load_mnist(f"test[:{args.num_test_images}]"), timesteps, args.seed)
    return {
        "arguments": changes,
        "unet": unet_config,
        "steps": steps,
        "training_images_per_second": images_per_second,
        "error": errors.mean().item(),
        "error_by_tenth_of_t": errors.view(10, -1).mean(dim=1).tolist(),
        **quality(pipe, training.bf16, num_inference_steps=args.num_inference_steps),
    }


def main(args: argparse.Namespace) -> dict[str, Any]:
    """Train and score each change, and write what there is after each."""
    settings = {
        name: getattr(args, name)
        for name in ("images", "num_images", "num_inference_steps", "num_test_images", "seed")
    }
    recipes = earlier_figures(args.output, "recipes", settings)
    quality = Quality(args.num_images, args.seed, device="cuda" if torch.cuda.is_available() else "cpu")
    result: dict[str, Any] = {
        "recipes": recipes,
        "settings": settings,
        "floor": quality.floor,
        "threads": torch.get_num_threads(),
        **provenance(args),
    }
    for name in args.changes:
        if name in recipes:
            continue
        recipes[name] = recipe(name, args, quality)
        result["recipes"] = {name: recipes[name] for name in CHANGES if name in recipes}
        print("{:26} {training_images_per_second:6.0f} images/s  FID {fid:7.2f}".format(name, **recipes[name]))
        write_json(result, args.output)
    return result


if __name__ == "__main__":
    main(parse_args())
