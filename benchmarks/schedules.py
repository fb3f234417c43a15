"""Train with linear and with cosine betas side by side, under equal conditions, and see who wins and where in t.

Each run is one of `examples/train.py`, kept in `--runs_dir`. Then each model is measured on test images, its loss
and the terms of the variational bound over t, and by FID over the number of DDIM steps. What is trained or
measured already is kept: a comparison that was stopped resumes. The figure beside the JSON shows it all, with
alpha_bar and the SNR of both schedules.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from quality import Quality, earlier_figures, loss_over_t, write_json

from mnist_ddpm import MNISTDDIMScheduler, MNISTDDPMPipeline, MNISTDDPMScheduler
from mnist_ddpm.cli import provenance
from mnist_ddpm.data import load_mnist
from mnist_ddpm.likelihood import bits_per_dim
from mnist_ddpm.metrics import random_subset

ROOT = Path(__file__).resolve().parent.parent
SCHEDULES = {"linear": "linear", "cosine": "squaredcos_cap_v2"}
COLORS = {"linear": "tab:orange", "cosine": "tab:blue"}
NUM_TIMESTEPS = 50  # of each test image, for the loss and the bound
SETTINGS = ("max_train_steps", "train_flags", "sampling_steps", "num_images", "num_test_images", "seed")


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Read the command line; flags that are unknown here go to train.py."""
    argv = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--max_train_steps", type=int, default=3000)
    parser.add_argument("--sampling_steps", nargs="+", type=int, default=[5, 10, 20, 50, 100])
    parser.add_argument("--num_images", type=int, default=1000, help="samples for each FID")
    parser.add_argument("--num_test_images", type=int, default=500, help="for the loss and the bound")
    parser.add_argument("--runs_dir", type=Path, required=True, help="for the six trainings")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results" / "schedules.json")
    parser.add_argument("--picture", type=Path, default=ROOT / "assets" / "schedules.png")
    args, args.train_flags = parser.parse_known_args(argv)
    args.command, args.seed = ["python", "benchmarks/schedules.py", *argv], args.seeds[0]
    return args


def train(schedule: str, seed: int, args: argparse.Namespace) -> Path:
    """Train with a schedule and a seed, unless that has been done; returns the folder of the pipeline."""
    folder: Path = args.runs_dir / f"{schedule}-{seed}"
    if (folder / "model_index.json").exists() and (folder / f"checkpoint-{args.max_train_steps}").exists():
        return folder
    flags = {
        "--ddpm_beta_schedule": SCHEDULES[schedule],
        "--seed": seed,
        "--max_train_steps": args.max_train_steps,
        "--output_dir": folder,
        "--resume_from_checkpoint": "latest",
        "--checkpoints_total_limit": 1,
    }
    command = [sys.executable, str(ROOT / "examples" / "train.py"), *args.train_flags]
    subprocess.run([*command, *(str(word) for flag in flags.items() for word in flag)], check=True)
    return folder


def measure(folder: Path, quality: Quality, test_images: torch.Tensor, args: argparse.Namespace) -> dict[str, Any]:
    """All figures of one model."""
    pipe = MNISTDDPMPipeline.from_pretrained(folder)
    scheduler = MNISTDDPMScheduler.from_config(pipe.scheduler.config, simple_var=False)
    generator = torch.Generator().manual_seed(args.seed)
    bound = bits_per_dim(pipe.unet, scheduler, test_images, num_timesteps=NUM_TIMESTEPS, generator=generator)
    timesteps = torch.linspace(0, len(scheduler) - 1, NUM_TIMESTEPS).long()
    log = (folder / "train_log.jsonl").read_text(encoding="utf-8").splitlines()
    pipe.scheduler = MNISTDDIMScheduler.from_config(pipe.scheduler.config)
    return {
        "final_training_loss": sum(json.loads(line)["loss"] for line in log[-200:]) / min(200, len(log)),
        "test_loss": {
            "timesteps": timesteps.tolist(),
            "loss": loss_over_t(pipe, test_images, timesteps, args.seed).tolist(),
        },
        "bits_per_dim": {
            **bound.summary(),
            "timesteps": bound.timesteps.double().mean(0).tolist(),
            "terms": (bound.terms.mean(0)).tolist(),
        },
        "fid": {str(n): quality(pipe, bf16=True, num_inference_steps=n) for n in args.sampling_steps},
    }


def draw(result: dict[str, Any], path: Path) -> None:
    """The figure: schedules, loss, bound, FID."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(1, 5, figsize=(22, 4.2), layout="constrained")
    for name, beta_schedule in SCHEDULES.items():
        alpha_bar = MNISTDDPMScheduler(beta_schedule=beta_schedule).alphas_cumprod
        snr = alpha_bar / (1 - alpha_bar)
        panels[0].plot(alpha_bar, color=COLORS[name], label=name)
        panels[1].semilogy(snr, color=COLORS[name])
        for run in (run for key, run in result["runs"].items() if key.startswith(name)):
            panels[2].semilogy(run["test_loss"]["timesteps"], run["test_loss"]["loss"], color=COLORS[name], alpha=0.7)
            bits = run["bits_per_dim"]
            panels[3].semilogy(bits["timesteps"], bits["terms"], color=COLORS[name], alpha=0.7)
            steps = [int(n) for n in run["fid"]]
            fids = [scores["fid"] for scores in run["fid"].values()]
            panels[4].loglog(steps, fids, "o-", color=COLORS[name], alpha=0.7)
    titles = {
        "alpha_bar": "t",
        "signal-to-noise ratio": "t",
        "loss on test images": "t",
        "term of the bound, bits per dimension": "t",
        "FID": "DDIM steps",
    }
    for panel, (title, label) in zip(panels, titles.items(), strict=True):
        panel.set(title=title, xlabel=label)
        panel.grid(alpha=0.3)
    panels[0].legend()
    figure.savefig(path, dpi=80)
    plt.close(figure)


def main(args: argparse.Namespace) -> dict[str, Any]:
    """Train what isn't trained yet, measure, write, draw."""
    runs = {f"{schedule}-{seed}": train(schedule, seed, args) for seed in args.seeds for schedule in SCHEDULES}
    quality = Quality(args.num_images, args.seed)
    test_images = random_subset(load_mnist("test"), args.num_test_images, args.seed)
    settings = {name: getattr(args, name) for name in SETTINGS}
    result: dict[str, Any] = {
        "runs": earlier_figures(args.output, "runs", settings),
        "settings": settings,
        "floor": quality.floor,
        **provenance(args),
    }
    for name, folder in runs.items():
        if name in result["runs"]:
            continue
        result["runs"][name] = measured = measure(folder, quality, test_images, args)
        fids = ", ".join(f"{n}: {scores['fid']:.2f}" for n, scores in measured["fid"].items())
        print(f"{name:>9}  {measured['bits_per_dim']['total']:.3f} bits per dimension  FID by steps {fids}")
        write_json(result, args.output)
    draw(result, args.picture)
    return result


if __name__ == "__main__":
    main(parse_args())
