"""Sample images from a saved pipeline: one grid, or a folder of files.

Image i is a function of --seed and i alone: neither the batch size nor the device changes its noise.
"""

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any

TRAJECTORY_IMAGES = 4


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--model", help="Folder or Hub id of a saved pipeline; by default one in the package.")
    parser.add_argument("--num_images", type=int, default=64)
    parser.add_argument("--batch_size", type=int, default=64, help="Images at a time.")
    parser.add_argument("--num_inference_steps", type=int, help="By default 50, or 4 for a pipeline for few steps.")
    parser.add_argument(
        "--scheduler",
        default="auto",
        help="ddpm, ddim, deis, dpmsolver_multistep, dpmsolver_singlestep, euler, euler_ancestral, heun, kdpm2, lms, "
        "pndm, sasolver, sde_dpmsolver_multistep, unipc, or auto: what is best at this number of steps, up to 30 at "
        "searched timesteps, which the others don't take. For --eta and --trajectory that is ddim, for --noise_scale "
        "ddpm; a pipeline for few steps keeps its own scheduler.",
    )
    parser.add_argument(
        "--class_labels",
        type=lambda label: int(label) if label.isdigit() else label,
        nargs="+",
        default=[],
        help="Numbers or names of classes: one for all images, or several, which the images have in turn.",
    )
    parser.add_argument(
        "--guidance_scale",
        type=float,
        help="Scale of guidance, by labels or by a guide; 1: none. By default 1.5 where there is a guide, else 1.",
    )
    parser.add_argument(
        "--guidance_interval",
        type=float,
        nargs=2,
        metavar=("LOW", "HIGH"),
        help="The t / T at which guidance acts. By default 0.2 to 1 if the pipeline has a guide, else 0 to 1.",
    )
    parser.add_argument("--eta", type=float, help="DDIM's weight of the noise, from 0 to 1.")
    parser.add_argument("--noise_scale", type=float, help="DDPM's factor on the noise of each step.")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", help="By default a GPU if there is one.")
    parser.add_argument("--output", type=Path, default=Path("grid.png"), help="The grid, a .png file.")
    parser.add_argument(
        "--output_dir",
        type=Path,
        help="Write each image to a .png file in this folder, instead of a grid. The same command resumes.",
    )
    parser.add_argument(
        "--trajectory",
        type=Path,
        help=f"Show how the first {TRAJECTORY_IMAGES} images come about, x_t beside the predicted x_0: a strip (.png) "
        "or an animation (.gif).",
    )
    args = parser.parse_args(argv)
    for name, least in {"num_images": 1, "batch_size": 1, "num_inference_steps": 1, "seed": 0}.items():
        if (value := getattr(args, name)) is not None and value < least:
            parser.error(f"--{name} must be at least {least}, got {value}.")
    if args.output.suffix != ".png":
        parser.error(f"--output must end in .png, got {args.output}.")
    if args.trajectory and args.trajectory.suffix not in (".png", ".gif"):
        parser.error(f"--trajectory must end in .png or .gif, got {args.trajectory}.")
    return args


def write_images(pipe: Any, args: argparse.Namespace, options: dict[str, Any]) -> None:
    """Write the images that the folder lacks; a file is there whole or not at all.

    Raises:
        ValueError: If the folder holds images of another model or other settings.
    """
    from mnist_ddpm.sampling import sample, weights_digest

    settings = {"model": args.model, "scheduler": type(pipe.scheduler).__name__, "seed": args.seed, **options}
    if "algorithm_type" in pipe.scheduler.config:  # DPM-Solver's: with noise or without
        settings["algorithm_type"] = pipe.scheduler.config.algorithm_type
    settings["weights"] = weights_digest(pipe.unet)
    if pipe.guide is not None:
        settings["guide"] = weights_digest(pipe.guide)
    file = args.output_dir / "settings.json"
    earlier = json.loads(file.read_text(encoding="utf-8")) if file.exists() else "unknown settings"
    if earlier != settings and any(args.output_dir.glob("*.png")):
        raise ValueError(
            f"--output_dir must hold no images of other settings, got {args.output_dir} with {earlier}. Name another."
        )
    file.write_text(json.dumps(settings, indent=2), encoding="utf-8")

    paths = [args.output_dir / f"{i:06}.png" for i in range(args.num_images)]
    missing = [i for i, path in enumerate(paths) if not path.exists()]
    print(f"{len(missing):,} of {args.num_images:,} images to sample", file=sys.stderr)
    partial = args.output_dir / "image.partial"
    for indices, images in sample(pipe, missing, args.seed, args.batch_size, **options):
        for i, image in zip(indices, images, strict=True):
            image.save(partial, format="PNG")
            os.replace(partial, paths[i])


def main(args: argparse.Namespace) -> None:
    """Sample by the command line, and write what it asks for."""
    from mnist_ddpm import PRETRAINED_CONDITIONAL
    from mnist_ddpm.cli import check_writable
    from mnist_ddpm.images import image_grid, save_trajectory
    from mnist_ddpm.sampling import (
        default_steps,
        guidance_options,
        is_few_step,
        load_pipeline,
        sample,
        sample_trajectory,
        step_options,
    )

    for path in (args.trajectory, args.output_dir / "settings.json" if args.output_dir else args.output):
        if path:
            check_writable(path)
    model = args.model or (PRETRAINED_CONDITIONAL if args.class_labels else None)
    scheduler = args.scheduler
    pipe = load_pipeline(model, scheduler, args.device, args.num_inference_steps)
    needed = "ddpm" if args.noise_scale is not None else "ddim" if args.eta is not None or args.trajectory else None
    if needed and scheduler == "auto" and not is_few_step(pipe.scheduler):
        scheduler = needed
        pipe = load_pipeline(model, scheduler, args.device)
    options = {name: getattr(args, name) for name in ("eta", "noise_scale")}
    options |= step_options(pipe, args.num_inference_steps or default_steps(pipe.scheduler), scheduler)
    options |= guidance_options(pipe, args.guidance_scale, args.guidance_interval)
    if args.class_labels:
        options["class_labels"] = args.class_labels
    if args.trajectory:
        steps = sample_trajectory(pipe, min(TRAJECTORY_IMAGES, args.num_images), args.seed, **options)
        save_trajectory(steps, args.trajectory)
    if args.output_dir:
        write_images(pipe, args, options)
    else:
        batches = sample(pipe, range(args.num_images), args.seed, args.batch_size, **options)
        columns = len(args.class_labels) if len(args.class_labels) > 1 else None
        image_grid([image for _, images in batches for image in images], columns).save(args.output)


if __name__ == "__main__":
    try:
        main(parse_args())
    except ModuleNotFoundError as error:
        sys.exit(f"error: {error}. Install what is missing: pip install -e .")
    except (ValueError, OSError, RuntimeError, AssertionError, ImportError) as error:  # AssertionError: torch, no CUDA
        sys.exit(f"error: {' '.join(str(error).split())}")
    except KeyboardInterrupt:
        sys.exit("stopped; with --output_dir, the same command resumes")
