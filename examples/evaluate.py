"""Score samples of MNIST digits beside real ones, and measure the likelihood of test images.

Scores: FID and KID, precision and recall, classes, confidence, copies, a classifier two-sample test, gray levels.
Beside each stands its real-data baseline: what real test images get. 10,000 samples take some minutes on a CPU.
With --bits_per_dim, also the variational bound of a model on the test images.
"""

import argparse
import json
import sys
import time
from itertools import pairwise
from pathlib import Path
from typing import Any


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    argv = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--model", help="a saved pipeline to draw the samples from")
    source.add_argument(
        "--samples",
        help="a folder of images, or a .npy file: uint8 or floats in [0, 1], (N, 28, 28) with or without one channel",
    )
    parser.add_argument(
        "--num_images",
        type=int,
        help="how many samples; by default 10,000 of a model, or all there are; 0: likelihood alone",
    )
    parser.add_argument("--seed", type=int, default=0, help="of the samples, and of subsets of images")
    parser.add_argument("--classifier", help="a transformers image classifier; by default the one in the package")
    parser.add_argument("--inception", action="store_true", help="score the features of Inception v3 as well")
    parser.add_argument("--dataset_name", help="a Hub id or a local folder with both splits; by default MNIST")
    parser.add_argument("--output", type=Path, default=Path("scores.json"), help="the JSON file to write")

    sampling = parser.add_argument_group("sampling, with --model")
    sampling.add_argument("--num_inference_steps", type=int, help="by default 50, or 4 for a pipeline for few steps")
    sampling.add_argument("--scheduler", default="auto", help="a name that sample.py takes; by default auto, as there")
    sampling.add_argument(
        "--guidance_scale", type=float, help="scale of guidance by the pipeline's guide; 1: none; by default 1.5"
    )
    sampling.add_argument(
        "--guidance_interval", type=float, nargs=2, metavar=("LOW", "HIGH"), help="t / T of guidance; by default 0.2 1"
    )
    sampling.add_argument("--bf16", action="store_true", help="sample under bfloat16 autocast")
    sampling.add_argument("--batch_size", type=int, default=500)

    bound = parser.add_argument_group("likelihood, with --model")
    bound.add_argument("--bits_per_dim", action="store_true", help="measure the variational bound as well")
    bound.add_argument(
        "--num_timesteps_per_image",
        type=int,
        help="estimate the bound from so many timesteps of each image; by default all, which takes long",
    )
    bound.add_argument(
        "--variance_type",
        choices=["fixed_small", "fixed_large"],
        help="variance of the backward steps; by default what the model was saved with",
    )
    args = parser.parse_args(argv)
    least = {"num_images": 0 if args.bits_per_dim else 1, "seed": 0, "num_inference_steps": 1, "batch_size": 1}
    for name, minimum in least.items():
        if (value := getattr(args, name)) is not None and value < minimum:
            parser.error(f"--{name} must be at least {minimum}, got {value}.")
    if args.bits_per_dim and args.model is None:
        parser.error("--bits_per_dim must be used with --model.")
    args.command = ["python", "examples/evaluate.py", *argv]
    return args


def score_samples(args: argparse.Namespace, device: str) -> dict[str, Any]:
    """Score samples, and the baseline: as many real test images."""
    import torch

    from mnist_ddpm import metrics
    from mnist_ddpm.images import read_samples
    from mnist_ddpm.sampling import default_steps, guidance_options, load_pipeline, sample_tensor, step_options
    from mnist_ddpm.two_sample import two_sample_scores

    start = time.perf_counter()
    options: dict[str, Any] = {}
    if args.samples is not None:
        samples = read_samples(args.samples, args.num_images)
    else:
        pipe = load_pipeline(args.model, args.scheduler, device, args.num_inference_steps)
    classifier = metrics.ClassifierFeatures.from_pretrained(args.classifier or metrics.CLASSIFIER).to(device)
    inception = metrics.InceptionFeatures().to(device) if args.inception else None
    train, test = real_images(args, "train"), real_images(args, "test")
    if args.model is not None:
        steps = args.num_inference_steps or default_steps(pipe.scheduler)
        options = step_options(pipe, steps, args.scheduler)
        options |= guidance_options(pipe, args.guidance_scale, args.guidance_interval)
        with torch.autocast(device, torch.bfloat16, enabled=args.bf16):
            samples = sample_tensor(pipe, args.num_images or 10_000, args.seed, args.batch_size, **options)
    drawn = time.perf_counter()

    test = metrics.random_subset(test, len(samples), args.seed)  # FID and its company depend on the number of images
    scorer = metrics.Scorer(train, classifier, inception)
    scores, baseline = scorer(samples, args.seed), scorer(test, args.seed)
    some_samples, some_train = (metrics.random_subset(images, len(test), args.seed) for images in (samples, train))
    scores |= two_sample_scores(some_samples, test, args.seed, device)
    baseline |= two_sample_scores(test, some_train, args.seed, device)
    print_table({"samples": scores, "real": baseline})
    source = ("samples",) if args.samples is not None else ("model", "scheduler")
    return {
        "scores": scores,
        "floor": baseline,
        "source": {name: getattr(args, name) for name in source} | options,
        "num_images": {"samples": len(samples), "floor": len(test), "reference": len(train)},
        "seconds": {"samples": drawn - start, "scores": time.perf_counter() - drawn},
    }


def measure_bound(args: argparse.Namespace, device: str) -> dict[str, Any]:
    """Measure the variational bound on the test images."""
    import torch
    from tqdm.auto import tqdm

    from mnist_ddpm import VariationalBound, bits_per_dim
    from mnist_ddpm.sampling import load_pipeline

    pipe, test = load_pipeline(args.model, "ddpm", device), real_images(args, "test")
    options = {} if args.variance_type is None else {"variance_type": args.variance_type}
    scheduler = pipe.scheduler.from_config(pipe.scheduler.config, **options)
    terms_per_image = args.num_timesteps_per_image or len(scheduler)
    generator = torch.Generator().manual_seed(args.seed)
    start = time.perf_counter()
    with tqdm(total=len(test) * terms_per_image, unit=" terms", unit_scale=True) as bar:
        bound = bits_per_dim(pipe.unet, scheduler, test, terms_per_image, args.batch_size, generator, bar.update)
    quarters = [i * len(scheduler) // 4 for i in range(5)]
    parts = {
        **bound.summary(),
        "quarters of t": [bound.between(*ends) for ends in pairwise(quarters)],
        "schedule_cost": VariationalBound(scheduler).schedule_cost(),
    }
    print_table({"bits per dim": parts})
    return {
        **parts,
        "variance_type": scheduler.config["variance_type"],
        "num_images": len(test),
        "num_timesteps_per_image": terms_per_image,
        "seconds": time.perf_counter() - start,
    }


def real_images(args: argparse.Namespace, split: str) -> Any:
    """Read a split as uint8 (N, 1, H, W)."""
    from mnist_ddpm.data import MNIST, decode_images, load_split

    return decode_images(load_split(args.dataset_name or MNIST, split=split), channels=1)


def print_table(columns: dict[str, dict[str, Any]]) -> None:
    """Print scores under their names in the JSON file, side by side."""

    def flat(scores: dict[str, Any]) -> dict[str, float]:
        nested = {k: dict(enumerate(v)) if isinstance(v, list) else v for k, v in scores.items()}
        parts = [{f"{k} {i}": x for i, x in v.items()} if isinstance(v, dict) else {k: v} for k, v in nested.items()]
        return {name: value for part in parts for name, value in part.items()}

    values = [flat(scores) for scores in columns.values()]
    print(f"{'':<32}", *(f"{title:>12}" for title in columns))
    for name in values[0]:
        print(f"{name:<32}", *(f"{scores[name]:>12.4f}" for scores in values))


def main(args: argparse.Namespace) -> dict[str, Any]:
    """Score samples, measure the bound, or both, and print tables; returns what the JSON file gets."""
    import torch

    from mnist_ddpm.cli import check_writable, provenance

    check_writable(args.output)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    result = {} if args.num_images == 0 else score_samples(args, device)
    if args.bits_per_dim:
        result["bits_per_dim"] = measure_bound(args, device)
    result |= provenance(args)
    args.output.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    return result


if __name__ == "__main__":
    try:
        main(parse_args())
    except ModuleNotFoundError as error:
        sys.exit(f"error: {error}" + ". Install what is missing: pip install -e '.[eval]'" * bool(error.name))
    except (ValueError, OSError, RuntimeError, ArithmeticError) as error:
        sys.exit(f"error: {error}")
