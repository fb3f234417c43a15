"""Sample images from a saved pipeline: one grid, or any number of files.

Image i is a function of --seed and i alone: neither the batch size nor the device changes its noise.
"""

import argparse
import json
import re
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from checkpoints import written_aside

if TYPE_CHECKING:
    import torch
    from PIL import Image

    from mnist_ddpm import MNISTDDPMPipeline

SCHEDULERS = {
    "ddpm": "MNISTDDPMScheduler",
    "ddim": "MNISTDDIMScheduler",
    "deis": "DEISMultistepScheduler",
    "dpmsolver_multistep": "DPMSolverMultistepScheduler",
    "dpmsolver_singlestep": "DPMSolverSinglestepScheduler",
    "euler": "EulerDiscreteScheduler",
    "euler_ancestral": "EulerAncestralDiscreteScheduler",
    "heun": "HeunDiscreteScheduler",
    "kdpm2": "KDPM2DiscreteScheduler",
    "lms": "LMSDiscreteScheduler",
    "pndm": "PNDMScheduler",
    "sasolver": "SASolverScheduler",
    "unipc": "UniPCMultistepScheduler",
}
# The solvers of diffusers do not clip x_0. At T - 1 the cosine betas leave 5e-5 of it, and an error of eps would grow
# 20,000-fold there: so they begin a little later, all but one by their spacing.
LEADING = {"timestep_spacing": "leading"}
LATER_START = {"dpmsolver_singlestep": {"lambda_min_clipped": -5.1}}
PREDICT_X0 = ("ddpm", "ddim", "euler", "euler_ancestral", "heun", "kdpm2", "lms")  # their steps return it
TRAJECTORY_IMAGES, TRAJECTORY_MOMENTS = 4, 12
SETTINGS_FILE = "settings.json"


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument(
        "--model", help="Folder of a saved pipeline, or its Hub id; without it, the one that comes with the package."
    )
    parser.add_argument("--num_images", type=int, default=64)
    parser.add_argument("--batch_size", type=int, default=64, help="Images at a time.")
    parser.add_argument("--num_inference_steps", type=int, default=50)
    parser.add_argument("--scheduler", choices=SCHEDULERS, default="ddim")
    parser.add_argument("--eta", type=float, help="DDIM's weight of the noise, from 0 to 1.")
    parser.add_argument("--noise_scale", type=float, help="DDPM's factor on the noise of each step.")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", help="By default a GPU if there is one.")
    parser.add_argument("--output", type=Path, default=Path("grid.png"), help="The grid, a .png file.")
    parser.add_argument(
        "--output_dir",
        type=Path,
        help="Write each image to a .png file of this folder, instead of a grid; the same command goes on where it "
        "was stopped.",
    )
    parser.add_argument(
        "--trajectory",
        type=Path,
        help=f"Show how the first {TRAJECTORY_IMAGES} images come about, x_t beside the predicted x_0: a strip (.png) "
        "or an animation (.gif).",
    )
    args = parser.parse_args(argv)
    for name in ("num_images", "batch_size"):
        if (value := getattr(args, name)) < 1:
            parser.error(f"--{name} must be at least 1, got {value}")
    if args.output.suffix != ".png":
        parser.error(f"--output must end in .png, got {args.output}")
    if args.trajectory and args.trajectory.suffix not in (".png", ".gif"):
        parser.error(f"--trajectory must end in .png or .gif, got {args.trajectory}")
    if args.trajectory and args.scheduler not in PREDICT_X0:
        parser.error(
            f"--trajectory needs a --scheduler that predicts x_0 ({', '.join(PREDICT_X0)}), got {args.scheduler}"
        )
    return args


def load_pipeline(model: str | None, scheduler: str, device: str | None = None) -> "MNISTDDPMPipeline":
    """Load a saved pipeline (None: the one in the package) with the scheduler of a name in `SCHEDULERS`.

    Raises:
        ValueError: If there is no such pipeline, or it is damaged.
    """
    if model is not None and not Path(model).is_dir() and not re.fullmatch(r"[\w.-]+/[\w.-]+", model):
        raise ValueError(f"--model: there is no folder {model}; name one that train.py or save_pretrained wrote")

    import diffusers
    import torch
    from safetensors import SafetensorError

    import mnist_ddpm

    try:
        pipe = mnist_ddpm.MNISTDDPMPipeline.from_pretrained(model or mnist_ddpm.PRETRAINED)
    except (OSError, ValueError, SafetensorError) as error:
        raise ValueError(f"--model: {model} can't be loaded, it is missing or damaged ({error})") from error
    name, config = SCHEDULERS[scheduler], pipe.scheduler.config
    if hasattr(mnist_ddpm, name):
        pipe.scheduler = getattr(mnist_ddpm, name).from_config(config)
    else:
        pipe.scheduler = getattr(diffusers, name).from_config(config, **LATER_START.get(scheduler, LEADING))
    return pipe.to(device or ("cuda" if torch.cuda.is_available() else "cpu"))


def image_generators(seed: int, indices: Sequence[int]) -> "list[torch.Generator]":
    """One generator per image: consecutive 32-bit seeds from a start that the seed is hashed to.

    The hash keeps the images of neighboring seeds apart; 32 bits are what PyTorch's CPU generator takes in.
    """
    import numpy as np
    import torch

    start = int(np.random.SeedSequence(seed).generate_state(1)[0])
    return [torch.Generator().manual_seed((start + i) % 2**32) for i in indices]


def sample(
    pipe: "MNISTDDPMPipeline", indices: Sequence[int], seed: int, batch_size: int, **kwargs: Any
) -> "Iterator[tuple[Sequence[int], Any]]":
    """Sample the images of these indices in batches; yields the indices of each batch, and its images."""
    for start in range(0, len(indices), batch_size):
        batch = indices[start : start + batch_size]
        pipe.set_progress_bar_config(desc=f"{start + 1} to {start + len(batch)} of {len(indices)} images")
        yield batch, pipe(batch_size=len(batch), generator=image_generators(seed, batch), **kwargs).images


def sample_trajectory(
    pipe: "MNISTDDPMPipeline", num_images: int, seed: int, **kwargs: Any
) -> "list[list[Image.Image]]":
    """Sample the first images; returns for each step x_t, x_0 of the first image, x_t, x_0 of the second, ..."""
    import torch
    from diffusers.utils import pt_to_pil

    names = ("latents", "pred_original_sample")
    steps = []

    def keep(pipe: Any, i: int, t: torch.Tensor, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        steps.append(pt_to_pil(torch.stack([tensors[name] for name in names], dim=1).flatten(0, 1)))
        return {}

    callback = {"callback_on_step_end": keep, "callback_on_step_end_tensor_inputs": names}
    for _ in sample(pipe, range(num_images), seed, batch_size=num_images, **kwargs, **callback):
        pass
    return steps


def save_trajectory(steps: "list[list[Image.Image]]", path: Path) -> None:
    """Write an animation in two columns, or a strip with time from left to right."""
    from mnist_ddpm.images import image_grid

    with written_aside(path) as partial:
        if path.suffix == ".gif":
            first, *others = [image_grid(images, columns=2) for images in steps]
            durations = [80] * len(others) + [2000]  # milliseconds; the last one stays
            first.save(partial, format="GIF", save_all=True, append_images=others, duration=durations, loop=0)
        else:
            moments = min(len(steps), TRAJECTORY_MOMENTS)
            shown = [steps[round((i + 1) * len(steps) / moments) - 1] for i in range(moments)]
            rows = zip(*shown, strict=True)
            image_grid([image for row in rows for image in row], columns=moments).save(partial, format="PNG")


def check_writable(path: Path) -> None:
    """Raise an OSError, before any work, if this file can't be written."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=path.parent).close()
        if path.is_dir():
            raise IsADirectoryError("it is a folder")
    except OSError as error:
        raise OSError(f"{path} can't be written ({error}): name another file") from error


def check_settings(output_dir: Path, args: argparse.Namespace) -> None:
    """Note what the images of a folder are made with; raise a ValueError if the ones there are made otherwise."""
    names = ("model", "scheduler", "num_inference_steps", "eta", "noise_scale", "seed")
    settings = {name: getattr(args, name) for name in names}
    path = output_dir / SETTINGS_FILE
    check_writable(path)
    earlier = json.loads(path.read_text()) if path.exists() else "unknown"
    if earlier != settings and any(output_dir.glob("*.png")):
        raise ValueError(f"--output_dir: {output_dir} holds images of other settings ({earlier}): name another folder")
    with written_aside(path) as partial:
        partial.write_text(json.dumps(settings, indent=2))


def main(args: argparse.Namespace) -> None:
    """Sample by the command line, and write what it asks for."""
    for path in filter(None, (args.trajectory, not args.output_dir and args.output)):
        check_writable(path)
    if args.output_dir:
        check_settings(args.output_dir, args)
    pipe = load_pipeline(args.model, args.scheduler, args.device)
    options = {name: getattr(args, name) for name in ("num_inference_steps", "eta", "noise_scale")}

    if args.trajectory:
        steps = sample_trajectory(pipe, min(TRAJECTORY_IMAGES, args.num_images), args.seed, **options)
        save_trajectory(steps, args.trajectory)

    if args.output_dir:
        paths = [args.output_dir / f"{i:06}.png" for i in range(args.num_images)]
        missing = [i for i, path in enumerate(paths) if not path.exists()]
        for indices, images in sample(pipe, missing, args.seed, args.batch_size, **options):
            for i, image in zip(indices, images, strict=True):
                with written_aside(paths[i]) as partial:
                    image.save(partial, format="PNG")
    else:
        from mnist_ddpm.images import image_grid

        batches = sample(pipe, range(args.num_images), args.seed, args.batch_size, **options)
        grid = image_grid([image for _, images in batches for image in images])
        with written_aside(args.output) as partial:
            grid.save(partial, format="PNG")


if __name__ == "__main__":
    try:
        main(parse_args())
    except (ValueError, OSError, RuntimeError) as error:
        sys.exit(f"error: {error}")
