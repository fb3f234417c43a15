"""Score samples of MNIST digits: FID and KID, precision and recall, digits, confidence, copies, beside their floor.

The floor of a score is what real test images get against the training set. To score 10,000 samples takes about a
minute on 2 CPU cores. With --bits_per_dim, also the variational bound of a model on the test images.
"""

import argparse
import json
import os
import platform
import shlex
import sys
import time
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sample import SCHEDULERS, check_writable, load_pipeline, sample
from train import MNIST, batch, non_negative_int, num_timesteps, seed

if TYPE_CHECKING:
    import torch

DEFAULT_NUM_IMAGES = 10_000
TITLES = {
    "fid": "FID",
    "kid": "KID",
    "kid_std": "KID, std over subsets",
    "precision": "precision (k = 3)",
    "recall": "recall (k = 3)",
    "inception_fid": "FID, Inception",
    "inception_kid": "KID, Inception",
    "inception_kid_std": "KID, Inception, std over subsets",
    "inception_precision": "precision, Inception",
    "inception_recall": "recall, Inception",
    "confidence": "confidence, mean",
    "confident_share": "share with confidence >= 0.9",
    "nearest_distance": "nearest training image, mean",
    "nearest_distance_p01": "nearest training image, 1 % quantile",
}


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    argv = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--model", help="a saved pipeline to draw the samples from")
    source.add_argument(
        "--samples", help="a .npy file of samples, uint8 or floats in [0, 1]: (N, 28, 28), one channel"
    )
    parser.add_argument(
        "--num_images",
        type=non_negative_int,
        help=f"how many samples; by default {DEFAULT_NUM_IMAGES} of a model, or all of a file; 0: likelihood alone",
    )
    parser.add_argument("--seed", type=seed, default=0, help="of the samples, and of subsets of images")
    parser.add_argument("--classifier", help="a transformers image classifier; by default the one in the package")
    parser.add_argument("--inception", action="store_true", help="score the features of Inception v3 as well")
    parser.add_argument("--dataset_name", default=str(MNIST), help="a Hub id or a local folder with both splits")
    parser.add_argument("--output", default="scores.json", help="the JSON file to write")

    sampling = parser.add_argument_group("sampling, with --model")
    sampling.add_argument("--num_inference_steps", type=num_timesteps, default=50)
    sampling.add_argument("--scheduler", choices=SCHEDULERS, default="ddim")
    sampling.add_argument("--batch_size", type=batch, default=500)

    bound = parser.add_argument_group("likelihood, with --model")
    bound.add_argument(
        "--bits_per_dim", action="store_true", help="measure the variational bound on the test images as well"
    )
    bound.add_argument(
        "--num_timesteps_per_image",
        type=num_timesteps,
        help="estimate the bound from so many timesteps of each image, 10 for one; by default all, which takes long",
    )
    bound.add_argument(
        "--variance_type",
        choices=["fixed_small", "fixed_large"],
        help="variance of the backward steps; by default what the model was saved with",
    )
    args = parser.parse_args(argv)
    if args.bits_per_dim and args.model is None:
        parser.error("--bits_per_dim needs --model")
    if not args.bits_per_dim and (args.num_timesteps_per_image is not None or args.variance_type is not None):
        parser.error("--num_timesteps_per_image and --variance_type need --bits_per_dim")
    if args.num_images == 0 and not args.bits_per_dim:
        parser.error("--num_images must be at least 1, or 0 with --bits_per_dim")
    args.command = ["python", "examples/evaluate.py", *argv]
    return args


def load_samples(path: str, num_images: int | None = None) -> "torch.Tensor":
    """Read digits that any program made.

    Args:
        path: A .npy file: uint8, or floats in [0, 1], of shape (N, H, W), (N, 1, H, W) or (N, H, W, 1).
        num_images: Take so many from its beginning, None for all.

    Returns:
        uint8 (N, 1, H, W).

    Raises:
        ValueError: If the file holds something else, or fewer images.
    """
    import numpy as np
    import torch

    try:
        images = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise ValueError(f"--samples: {path} can't be read ({error}); write numbers there by numpy.save") from error
    if not isinstance(images, np.ndarray):
        raise ValueError(f"--samples: {path} holds several arrays; save one by numpy.save")
    if images.ndim == 4 and 1 in (images.shape[1], images.shape[3]):
        images = images.squeeze(1 if images.shape[1] == 1 else 3)
    if images.ndim != 3 or len(images) == 0:
        raise ValueError(
            f"--samples: expected shape (N, 28, 28), (N, 1, 28, 28) or (N, 28, 28, 1), got {images.shape} in {path}"
        )
    if np.issubdtype(images.dtype, np.floating):
        if not (images.min() >= 0 and images.max() <= 1):  # NaN compares false
            raise ValueError(
                f"--samples: floats must be in [0, 1], got {images.min()} to {images.max()} in {path}; map [-1, 1] "
                "there by x / 2 + 0.5, and look for NaN"
            )
        images = (images * 255).round().astype(np.uint8)
    if images.dtype != np.uint8:
        raise ValueError(f"--samples: expected uint8 or floats in [0, 1], got {images.dtype} in {path}")
    if num_images is not None and num_images > len(images):
        raise ValueError(f"--num_images: {num_images} asked for, {path} holds {len(images)}")
    return torch.from_numpy(images[:num_images]).unsqueeze(1)


def draw_samples(args: argparse.Namespace, device: str) -> "torch.Tensor":
    """Draw uint8 samples (N, 1, 28, 28) from a saved pipeline; image i depends on the seed and on i alone."""
    import torch

    pipe = load_pipeline(args.model, args.scheduler, device)
    indices = range(args.num_images or DEFAULT_NUM_IMAGES)
    options = {"num_inference_steps": args.num_inference_steps, "output_type": "pt"}
    batches = sample(pipe, indices, args.seed, args.batch_size, **options)
    return torch.cat([(images * 255).round().to("cpu", torch.uint8) for _, images in batches])


def provenance(args: argparse.Namespace) -> dict[str, Any]:
    """What a figure depends on besides the code: command, seed, versions and machine."""
    import torch

    packages = ("mnist-ddpm", "torch", "diffusers", "transformers", "torchmetrics")
    return {
        "command": shlex.join(args.command),
        "seed": args.seed,
        "versions": {name: version(name) for name in packages},
        "machine": torch.cuda.get_device_name() if torch.cuda.is_available() else f"{os.cpu_count()} x {cpu_name()}",
    }


def cpu_name() -> str:
    """Model name of the processor where the system tells it (Linux), or else its architecture."""
    cpu_info = Path("/proc/cpuinfo")
    lines = cpu_info.read_text().splitlines() if cpu_info.exists() else []
    return next((line.split(": ")[1] for line in lines if line.startswith("model name")), platform.machine())


def table(scores: dict[str, Any], floor: dict[str, Any]) -> str:
    """Lay the scores out beside their floor."""
    rows = [(title, scores[name], floor[name]) for name, title in TITLES.items() if name in scores]
    shares = zip(scores["class_shares"], floor["class_shares"], strict=True)
    rows += [(f"share of class {i}", share, floor_share) for i, (share, floor_share) in enumerate(shares)]
    width = max(len(title) for title, _, _ in rows)
    lines = [f"{title:<{width}}  {value:>10.4f}  {floor_value:>10.4f}" for title, value, floor_value in rows]
    return "\n".join([f"{'':<{width}}  {'samples':>10}  {'floor':>10}", *lines])


def score_samples(args: argparse.Namespace, device: str, test: "torch.Tensor") -> dict[str, Any]:
    """Draw or read the samples, score them and the floor, and print a table."""
    from mnist_ddpm import metrics
    from mnist_ddpm.data import decode_images, load_split

    classifier = metrics.ClassifierFeatures.from_pretrained(args.classifier or metrics.CLASSIFIER).to(device)
    inception = metrics.InceptionFeatures().to(device) if args.inception else None
    train = decode_images(load_split(args.dataset_name, split="train"), channels=1)
    start = time.perf_counter()
    samples = load_samples(args.samples, args.num_images) if args.samples is not None else draw_samples(args, device)
    drawn = time.perf_counter()
    # FID and its company depend on how many images there are: the floor has as many, as long as there are so many
    test = metrics.random_subset(test, len(samples), args.seed)

    scorer = metrics.Scorer(train, classifier, inception)
    scores, floor = scorer(samples, args.seed), scorer(test, args.seed)
    print(table(scores, floor))
    source = ("samples",) if args.samples is not None else ("model", "scheduler", "num_inference_steps")
    return {
        "scores": scores,
        "floor": floor,
        "source": {name: getattr(args, name) for name in source},
        "num_images": {"samples": len(samples), "floor": len(test), "reference": len(train)},
        "seconds": {"samples": drawn - start, "scores": time.perf_counter() - drawn},
    }


def measure_bound(args: argparse.Namespace, device: str, test: "torch.Tensor") -> dict[str, Any]:
    """Measure the variational bound on the test images, and print its parts."""
    import torch
    from tqdm.auto import tqdm

    from mnist_ddpm import VariationalBound, bits_per_dim

    pipe = load_pipeline(args.model, "ddpm", device)
    options = {} if args.variance_type is None else {"variance_type": args.variance_type}
    scheduler = pipe.scheduler.from_config(pipe.scheduler.config, **options)
    num_timesteps = len(scheduler)
    terms_per_image = args.num_timesteps_per_image or num_timesteps
    generator = torch.Generator().manual_seed(args.seed)
    start = time.perf_counter()
    with tqdm(total=len(test) * terms_per_image, unit=" terms", unit_scale=True) as bar:
        bound = bits_per_dim(pipe.unet, scheduler, test, terms_per_image, args.batch_size, generator, bar.update)
    quarters = [i * num_timesteps // 4 for i in range(5)]
    result = {
        **bound.summary(),
        "quarters of t": [bound.between(*ends) for ends in pairwise(quarters)],
        "schedule_cost": VariationalBound(scheduler).schedule_cost(),
        "variance_type": scheduler.config["variance_type"],
        "num_images": len(test),
        "num_timesteps_per_image": terms_per_image,
        "seconds": time.perf_counter() - start,
    }
    print(bound_table(result))
    return result


def bound_table(bound: dict[str, Any]) -> str:
    """Lay out the parts of the bound."""
    cost = bound["schedule_cost"]
    quarters = zip(("first", "second", "third", "last"), bound["quarters of t"], strict=True)
    rows = {
        "bits per dimension, at most": bound["total"],
        "  standard error": bound["standard_error"],
        "  L_T": bound["L_T"],
        "  sum of L_{t-1}": bound["sum of L_{t-1}"],
        "  L_0": bound["L_0"],
        **{f"  L_0 and L_{{t-1}}, {name} quarter of t": part for name, part in quarters},
        f"of it for {bound['variance_type']}, by no model to be lowered": cost["variance_mismatch"],
        "L_0 of a black pixel, at the decoder's smallest variance": cost["background_decoder"],
    }
    width = max(map(len, rows))
    return "\n".join(f"{title:<{width}}  {value:>10.4f}" for title, value in rows.items())


def main(args: argparse.Namespace) -> dict[str, Any]:
    """Score samples, measure the bound, or both, and print tables; returns what the JSON file gets."""
    import torch

    from mnist_ddpm.data import decode_images, load_split

    check_writable(Path(args.output))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    test = decode_images(load_split(args.dataset_name, split="test"), channels=1)
    result = {} if args.num_images == 0 else score_samples(args, device, test)
    if args.bits_per_dim:
        result["bits_per_dim"] = measure_bound(args, device, test)
    result |= provenance(args)
    Path(args.output).write_text(json.dumps(result, indent=2) + "\n")
    return result


if __name__ == "__main__":
    try:
        main(parse_args())
    except (ValueError, OSError, ArithmeticError, RuntimeError) as error:
        sys.exit(f"error: {error}")
