"""Sample images from a saved pipeline: one grid, or any number of files.

Image i is a function of --seed and i alone: neither the batch size nor the device changes its noise.
"""

import argparse
import hashlib
import json
import os
import re
import sys
import tempfile
from array import array
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mnist_ddpm.training.checkpoints import written_aside

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
PREDICT_X0 = ("ddpm", "ddim", "euler", "euler_ancestral", "heun", "kdpm2", "lms")  # their steps return it
TRAJECTORY_IMAGES, TRAJECTORY_MOMENTS = 4, 12
SETTINGS_FILE, PARTIAL_FILE = "settings.json", "image.partial"
MAX_GRID, MAX_FILES = 10_000, 1_000_000  # images
PNG_END = b"\0\0\0\0IEND\xaeB`\x82"  # the last chunk, always the same


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
    for name, least in {"num_images": 1, "batch_size": 1, "num_inference_steps": 1, "seed": 0}.items():
        if (value := getattr(args, name)) < least:
            parser.error(f"--{name} must be at least {least}, got {value}")
    most, remedy = (MAX_FILES, "") if args.output_dir else (MAX_GRID, ": --output_dir takes more")
    if args.num_images > most:
        parser.error(f"--num_images must be at most {most:,}, got {args.num_images:,}{remedy}")
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
        ValueError: If there is no such pipeline, it is damaged, or there is no such device.
    """
    if model is not None and not (model and Path(model).is_dir()) and not re.fullmatch(r"[\w.-]+/[\w.-]+", model):
        raise ValueError(f"--model: there is no folder {model}; name one that train.py or save_pretrained wrote")

    import diffusers
    import torch
    from safetensors import SafetensorError

    import mnist_ddpm

    try:
        pipe = mnist_ddpm.MNISTDDPMPipeline.from_pretrained(mnist_ddpm.PRETRAINED if model is None else model)
    except (OSError, ValueError, SafetensorError) as error:
        raise ValueError(f"--model: {model} can't be loaded, it is missing or damaged ({error})") from error
    name, config = SCHEDULERS[scheduler], dict(pipe.scheduler.config)
    if scheduler != "ddpm" and config.get("variance_type") == "learned_range":
        config["variance_type"] = "fixed_small"  # the others draw no noise of a learned variance
    scheduler_class = getattr(mnist_ddpm, name, None) or getattr(diffusers, name)
    pipe.scheduler = scheduler_class.from_config(config)
    device = ("cuda" if torch.cuda.is_available() else "cpu") if device is None else device
    try:
        torch.zeros((), device=device).item()
    except (RuntimeError, AssertionError) as error:  # the latter where PyTorch is built without CUDA
        raise ValueError(f"--device: {device!r} can't be used here ({str(error).splitlines()[0]})") from error
    return pipe.to(device)


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
    from diffusers.utils import logging

    pipe.set_progress_bar_config(disable=True)  # one bar for all images, not one for each batch
    bar_format = "{percentage:3.0f}%|{bar}| {n:.0f}/{total_fmt} images [{elapsed}<{remaining}, {rate_fmt}]"
    with logging.tqdm(total=len(indices), unit=" images", bar_format=bar_format) as bar:

        def advance(run: Any, i: int, t: Any, tensors: dict[str, Any]) -> dict[str, Any]:
            bar.update(len(batch) / run.num_timesteps)
            return {}

        for start in range(0, len(indices), batch_size):
            batch = indices[start : start + batch_size]
            options = {"callback_on_step_end": advance, "generator": image_generators(seed, batch)} | kwargs
            yield batch, pipe(batch_size=len(batch), **options).images
            bar.update(start + len(batch) - bar.n)  # to a whole number


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


def check_settings(output_dir: Path, settings: dict[str, Any]) -> None:
    """Note what the images of a folder are made with; raise a ValueError if the ones there are made otherwise."""
    path = output_dir / SETTINGS_FILE
    try:
        earlier = json.loads(path.read_text())
    except (OSError, ValueError):
        earlier = "unknown"
    if earlier != settings and any(entry.name.endswith(".png") for entry in os.scandir(output_dir)):
        raise ValueError(f"--output_dir: {output_dir} holds images of other settings ({earlier}): name another folder")
    with written_aside(path) as partial:
        partial.write_text(json.dumps(settings, indent=2))


def weights_digest(pipe: "MNISTDDPMPipeline") -> str:
    """What tells the weights of one U-Net from those of another that has been saved under the same name."""
    import torch

    digest = hashlib.sha256()
    for weight in pipe.unet.state_dict().values():
        digest.update(weight.cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()[:16]


def image_path(output_dir: Path, i: int) -> Path:
    """The file of image i."""
    return output_dir / f"{i:06}.png"


def is_whole(path: Path) -> bool:
    """Whether there is an image in this file, down to its end: a machine that goes down may leave less."""
    try:
        with path.open("rb", buffering=0) as file:
            file.seek(-len(PNG_END), os.SEEK_END)
            return file.read() == PNG_END
    except OSError:  # there is no such file, or it is too short
        return False


def unfinished(output_dir: Path, num_images: int, batch_size: int) -> Sequence[int]:
    """The indices of all batches in which an image is missing.

    Whole batches, because an image differs in its last bits with the number of its neighbors: a run that was stopped
    ends with the very files of one that was not.
    """
    batches = (range(start, min(start + batch_size, num_images)) for start in range(0, num_images, batch_size))
    missing = (batch for batch in batches if not all(is_whole(image_path(output_dir, i)) for i in batch))
    return array("q", (i for batch in missing for i in batch))


def write_images(output_dir: Path, indices: Iterable[int], images: "Iterable[Image.Image]") -> None:
    """Write a file for each image, which is there whole or not at all.

    The files are not flushed to the disk, which would take longer than to sample them: see `is_whole`.

    Raises:
        OSError: If one can't be written.
    """
    partial = output_dir / PARTIAL_FILE
    for i, image in zip(indices, images, strict=True):
        try:
            image.save(partial, format="PNG")
            os.replace(partial, image_path(output_dir, i))
        except OSError as error:
            raise OSError(
                f"--output_dir: image {i} can't be written ({error}), the images before it are there: make room, and "
                "the same command goes on"
            ) from error


def main(args: argparse.Namespace) -> None:
    """Sample by the command line, and write what it asks for."""
    output = args.output_dir / SETTINGS_FILE if args.output_dir else args.output
    for path in filter(None, (args.trajectory, output)):
        check_writable(path)
    pipe = load_pipeline(args.model, args.scheduler, args.device)
    options = {name: getattr(args, name) for name in ("num_inference_steps", "eta", "noise_scale")}

    if args.trajectory:
        steps = sample_trajectory(pipe, min(TRAJECTORY_IMAGES, args.num_images), args.seed, **options)
        save_trajectory(steps, args.trajectory)

    if args.output_dir:
        settings = {name: getattr(args, name) for name in ("model", "scheduler", "seed")} | options
        check_settings(args.output_dir, settings | {"weights": weights_digest(pipe)})
        (args.output_dir / PARTIAL_FILE).unlink(missing_ok=True)  # of a run that was killed
        indices = unfinished(args.output_dir, args.num_images, args.batch_size)
        print(f"{len(indices):,} of {args.num_images:,} images to go", file=sys.stderr)
        for batch, images in sample(pipe, indices, args.seed, args.batch_size, **options):
            write_images(args.output_dir, batch, images)
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
    except KeyboardInterrupt:
        sys.exit("stopped; with --output_dir, the same command goes on")
