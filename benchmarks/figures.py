"""Make the pictures of `docs/theory.md` from the package's own model, its training's log, and MNIST."""

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from diffusers.utils import pt_to_pil
from PIL import Image
from sampling_noise import ROWS

from mnist_ddpm import PRETRAINED, MNISTDDPMPipeline, MNISTDDPMScheduler
from mnist_ddpm.data import load_mnist
from mnist_ddpm.images import image_grid
from mnist_ddpm.sampling import sample, sample_trajectory

ROOT = Path(__file__).resolve().parent.parent
COLUMNS = 12


def forward_picture() -> Image.Image:
    """Two test images on their way to noise: rows 1 and 3 by linear betas, rows 2 and 4 by cosine betas."""
    x_0 = load_mnist("test[:2]").float() / 127.5 - 1
    noise = torch.randn(x_0.shape, generator=torch.Generator().manual_seed(0))
    timesteps = torch.linspace(0, 999, COLUMNS).long()
    rows = []
    for i in range(len(x_0)):
        for beta_schedule in ("linear", "cosine"):
            scheduler = MNISTDDPMScheduler(beta_schedule=beta_schedule)
            copies, same_noise = x_0[i].expand(COLUMNS, -1, -1, -1), noise[i].expand(COLUMNS, -1, -1, -1)
            rows += pt_to_pil(scheduler.sample_forward(copies, timesteps, same_noise).clamp(-1, 1))
    return image_grid(rows, columns=COLUMNS)


def noise_picture(pipe: MNISTDDPMPipeline, num_inference_steps: int = 50) -> Image.Image:
    """The same starting noise by each kind of backward noise, a row for each of `sampling_noise.ROWS`."""
    config = pipe.scheduler.config
    images: list[Any] = []
    for scheduler_class, scheduler_options, call_options in ROWS.values():
        pipe.scheduler = scheduler_class.from_config(config, **scheduler_options)
        options = {"num_inference_steps": num_inference_steps, **call_options}
        for _, batch in sample(pipe, range(COLUMNS), seed=0, batch_size=COLUMNS, **options):
            images += batch
    pipe.scheduler = MNISTDDPMScheduler.from_config(config)
    return image_grid(images, columns=COLUMNS)


def backward_picture(pipe: MNISTDDPMPipeline) -> Image.Image:
    """x_t, and below it the x_0 predicted from it, on the way back through all T steps, for two samples."""
    steps = sample_trajectory(pipe, 2, seed=0)
    moments = torch.linspace(0, len(steps) - 1, COLUMNS).long().tolist()
    return image_grid(
        [steps[moment][row] for row in range(4) for moment in moments],
        columns=COLUMNS,
    )


def curve_picture(path: Path) -> None:
    """The loss of the training that made the package's weights, from `benchmarks/results/training.json`."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    training = json.loads((ROOT / "benchmarks" / "results" / "training.json").read_text(encoding="utf-8"))["training"]
    window, loss = training["loss_window"], training["loss"]
    figure, axes = plt.subplots(figsize=(6, 2.6), layout="constrained")
    axes.plot([window * (i + 1) for i in range(len(loss))], loss)
    axes.set(xlabel="steps", ylabel=f"loss, mean of {window} steps", yscale="log")
    axes.grid(which="both", alpha=0.3)
    figure.savefig(path, dpi=80)
    plt.close(figure)


def main() -> None:
    """Write all of them to `docs/`."""
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    folder = ROOT / "docs"
    pipe = MNISTDDPMPipeline.from_pretrained(PRETRAINED)
    forward_picture().save(folder / "forward.png")
    noise_picture(pipe).save(folder / "noise.png")
    backward_picture(pipe).save(folder / "backward.png")
    curve_picture(folder / "curve.png")


if __name__ == "__main__":
    main()
