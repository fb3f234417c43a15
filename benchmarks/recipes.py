"""The search for the U-Net and the recipe: one change at a time, each trained for as long, each scored.

Each row is `examples/train.py` with the defaults but for one thing; the number of steps is what fits the time, by the
speed of its first steps, so that the learning rate comes down to 0 as in a real run. "another seed" and "none" should
be alike: how far they are apart is what chance does. Rows that the output file has already are kept: a search that was
stopped goes on.
"""

import argparse
import json
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from contenders import TrainScript
from quality import Quality, earlier_figures

from mnist_ddpm import MNISTUNet2DModel
from mnist_ddpm.cli import provenance

ROOT = Path(__file__).resolve().parent.parent
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SPEED_STEPS = 30  # after which the speed is known
ATTENTION = {"down_block_types": ("DownBlock2D", "AttnDownBlock2D")}

# what is changed: flags of train.py, and arguments of the U-Net
CHANGES: dict[str, tuple[list[str], dict[str, Any]]] = {
    "none": ([], {}),
    "another seed": (["--seed", "1000"], {}),
    "epsilon-prediction": (["--prediction_type", "epsilon"], {}),
    "sample-prediction": (["--prediction_type", "sample"], {}),
    "linear betas": (["--ddpm_beta_schedule", "linear"], {}),
    "min-SNR weights, gamma 5": (["--snr_gamma", "5"], {}),
    "learning rate 5e-4": (["--learning_rate", "5e-4"], {}),
    "learning rate 1e-3": (["--learning_rate", "1e-3"], {}),
    "learning rate 4e-3": (["--learning_rate", "4e-3"], {}),
    "Adam's beta_2 0.999": (["--adam_beta2", "0.999"], {}),
    "batch size 32": (["--train_batch_size", "32"], {}),
    "batch size 128": (["--train_batch_size", "128"], {}),
    "no average": (["--no-use_ema"], {}),
    "shorter average (power 2/3)": (["--ema_power", "0.6667"], {}),
    "longer average (power 0.85)": (["--ema_power", "0.85"], {}),
    "no gradient clipping": (["--max_grad_norm", "inf"], {}),
    "float32": (["--mixed_precision", "no"], {}),
    "no patch stem": ([], {"patch_size": 1}),
    "patches of 4 x 4, one level": (
        [],
        {"patch_size": 4, "block_out_channels": (128,), "down_block_types": ("DownBlock2D",)},
    ),
    "2 layers per block": ([], {"layers_per_block": 2}),
    "narrower (48, 96)": ([], {"block_out_channels": (48, 96), "attention_head_dim": 96}),
    "wider (96, 192)": ([], {"block_out_channels": (96, 192), "attention_head_dim": 192}),
    "attention at every 7 x 7 block": ([], ATTENTION),
    "the same, heads of 32": ([], {**ATTENTION, "attention_head_dim": 32}),
}


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    argv = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--changes", nargs="+", choices=CHANGES, default=list(CHANGES), metavar="CHANGE")
    parser.add_argument("--minutes", type=float, default=3.0, help="of training, each")
    parser.add_argument("--num_images", type=int, default=1000, help="for each score")
    parser.add_argument("--num_inference_steps", type=int, default=20, help="of DDIM")
    parser.add_argument("--jobs", type=int, default=1, help="trainings at a time, on a share of the threads")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results" / "recipes.json")
    args = parser.parse_args(argv)
    args.command = ["python", "benchmarks/recipes.py", *argv]
    return args


def train(name: str, args: argparse.Namespace, folder: Path) -> tuple[TrainScript, float]:
    """Train with a change for the given time; returns the training, and its steps per second."""
    flags, unet_config = CHANGES[name]
    MNISTUNet2DModel(**unet_config).save_config(folder / "unet")
    flags = ["--seed", str(args.seed), "--model_config_name_or_path", str(folder / "unet"), *flags]

    trial = TrainScript([*flags, "--max_train_steps", str(SPEED_STEPS)], folder / "trial")
    trial.step()
    start = time.perf_counter()
    for _ in range(SPEED_STEPS - 1):
        trial.step()
    seconds_per_step = (time.perf_counter() - start) / (SPEED_STEPS - 1)

    steps = max(1, round(60 * args.minutes / seconds_per_step))
    training = TrainScript([*flags, "--max_train_steps", str(steps)], folder / "training")
    start = time.perf_counter()
    for _ in range(steps):
        training.step()
    return training, steps / (time.perf_counter() - start)


def recipe(name: str, args: argparse.Namespace) -> dict[str, Any]:
    """Train with a change and score: a row."""
    with tempfile.TemporaryDirectory() as folder:
        training, steps_per_second = train(name, args, Path(folder))
        quality = Quality(args.num_images, args.seed, device=DEVICE)
        scores = quality(training.pipeline(), training.bf16, num_inference_steps=args.num_inference_steps)
    return {
        "flags": CHANGES[name][0],
        "unet": CHANGES[name][1],
        "steps": training.steps,
        "training_images_per_second": steps_per_second * training.batch_size,
        **scores,
    }


def main(args: argparse.Namespace) -> dict[str, Any]:
    """Train and score each change, and write what there is after each."""
    threads = max(1, torch.get_num_threads() // args.jobs)
    settings = {name: getattr(args, name) for name in ("minutes", "num_images", "num_inference_steps", "seed", "jobs")}
    recipes = earlier_figures(args.output, "recipes", settings)
    result: dict[str, Any] = {
        "recipes": recipes,
        "settings": settings,
        "floor": Quality(args.num_images, args.seed, device=DEVICE).floor,
        "threads": threads,
        **provenance(args),
    }
    new_process = {"mp_context": get_context("spawn"), "max_tasks_per_child": 1}  # an Accelerator's state is for life
    with ProcessPoolExecutor(args.jobs, initializer=torch.set_num_threads, initargs=(threads,), **new_process) as pool:
        rows = {pool.submit(recipe, name, args): name for name in args.changes if name not in recipes}
        for row in as_completed(rows):
            name = rows[row]
            recipes[name] = row.result()
            result["recipes"] = {name: recipes[name] for name in CHANGES if name in recipes}
            print("{:32} {training_images_per_second:6.0f} images/s  FID {fid:7.2f}".format(name, **recipes[name]))
            args.output.write_text(json.dumps(result, indent=2) + "\n")
    return result


if __name__ == "__main__":
    main(parse_args())
