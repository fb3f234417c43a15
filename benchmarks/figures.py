"""Make the pictures of `docs/theory.md` and `docs/editing.md` from the package's model and MNIST.

No sample is selected; the images that are edited are.
"""

import argparse
import json
from io import BytesIO
from pathlib import Path
from typing import Any

import torch
from diffusers.utils import pt_to_pil
from PIL import Image, ImageDraw
from sampling_noise import ROWS

from mnist_ddpm import PRETRAINED, MNISTDDIMScheduler, MNISTDDPMPipeline, MNISTDDPMScheduler
from mnist_ddpm.data import load_mnist
from mnist_ddpm.editing import MNISTImg2ImgPipeline, MNISTInpaintPipeline
from mnist_ddpm.images import image_grid
from mnist_ddpm.sampling import image_generators, sample, sample_trajectory

ROOT = Path(__file__).resolve().parent.parent
COLUMNS = 12
# an angular 2, 3, 4 and 8: a list of strokes each, of points (x, y)
SKETCHES = (
    [[(8, 7), (19, 7), (8, 20), (20, 20)]],
    [[(9, 6), (19, 6), (13, 12), (19, 16), (17, 21), (9, 21)]],
    [[(9, 6), (8, 14), (20, 14)], [(17, 6), (17, 22)]],
    [[(14, 13), (9, 9), (14, 6), (19, 9), (9, 18), (14, 22), (19, 18), (14, 13)]],
)


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
        pipe.scheduler = scheduler_class.from_config(config, clip_sample=True, **scheduler_options)
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


def sketch_picture(pipe: MNISTDDPMPipeline, copies: int = 8) -> Image.Image:
    """Sketches, and what image to image makes of them: a row for each."""
    edit = MNISTImg2ImgPipeline.from_pipe(pipe)
    images = []
    for strokes in SKETCHES:
        sketch = Image.new("L", (28, 28))
        for points in strokes:
            ImageDraw.Draw(sketch).line(points, fill=255, width=2)
        images += [sketch, *edit([sketch] * copies, strength=0.6, generator=image_generators(0, range(copies))).images]
    return enlarged(image_grid(images, columns=1 + copies))


def inpainting_picture(pipe: MNISTDDPMPipeline, copies: int = 8) -> Image.Image:
    """Halves of test images, the rest gray, and how inpainting completes them: a row for each."""
    inpaint = MNISTInpaintPipeline.from_pipe(pipe)
    below, left = torch.zeros(2, 1, 1, 28, 28)
    below[:, :, 14:] = 1
    left[..., :14] = 1
    images = []
    for i, mask in ((12, below), (61, left)):
        digit = load_mnist("test[:100]")[i : i + 1] / 255
        images += pt_to_pil(torch.where(mask > 0, 0.4, digit) * 2 - 1)
        generators = image_generators(0, range(copies))
        images += inpaint(digit.expand(copies, -1, -1, -1), mask, generators, jump_length=10, jump_n_sample=5).images
    return enlarged(image_grid(images, columns=1 + copies))


def interpolation_picture(pipe: MNISTDDPMPipeline) -> Image.Image:
    """From a 3 of the test images to an 8, through the noise that makes them: a row for each pair."""
    scheduler = MNISTDDIMScheduler.from_config(pipe.scheduler.config, clip_sample=False)
    edit = MNISTImg2ImgPipeline.from_pipe(pipe, scheduler=scheduler)
    digits = load_mnist("test[:200]") / 255
    images = []
    for three, eight in ((30, 84), (68, 61), (44, 110)):
        ends = digits[three : three + 1], digits[eight : eight + 1]
        images += edit.interpolate(*ends, num_images=COLUMNS, num_inference_steps=25).images
    return enlarged(image_grid(images, columns=COLUMNS))


def enlarged(image: Image.Image) -> Image.Image:
    """Three times as large, in squares."""
    return image.resize((3 * image.width, 3 * image.height), Image.Resampling.NEAREST)


def curve_picture() -> Image.Image:
    """The loss of the training that began the package's weights, from `benchmarks/results/training.json`."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    training = json.loads((ROOT / "benchmarks" / "results" / "training.json").read_text(encoding="utf-8"))["training"]
    window, loss = training["loss_window"], training["loss"]
    figure, axes = plt.subplots(figsize=(6, 2.6), layout="constrained")
    axes.plot([window * (i + 1) for i in range(len(loss))], loss)
    axes.set(xlabel="steps", ylabel=f"loss, mean of {window} steps", yscale="log")
    axes.grid(which="both", alpha=0.3)
    figure.savefig(file := BytesIO(), dpi=80)
    plt.close(figure)
    return Image.open(file)


def main() -> None:
    """Write them to `docs/`."""
    pipe = MNISTDDPMPipeline.from_pretrained(PRETRAINED)
    pictures = {
        "forward": forward_picture,
        "noise": lambda: noise_picture(pipe),
        "backward": lambda: backward_picture(pipe),
        "curve": curve_picture,
        "sketch": lambda: sketch_picture(pipe),
        "inpainting": lambda: inpainting_picture(pipe),
        "interpolation": lambda: interpolation_picture(pipe),
    }
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", default=[*pictures], help=f"of {', '.join(pictures)}; by default all")
    for name in parser.parse_args().names:
        pictures[name]().save(ROOT / "docs" / f"{name}.png")


if __name__ == "__main__":
    main()
