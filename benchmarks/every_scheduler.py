"""Sample one model through each scheduler that `examples/sample.py` takes, and let a classifier read the digits."""

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

from mnist_ddpm.cli import provenance
from mnist_ddpm.sampling import SCHEDULERS, load_pipeline, sample_tensor

ROOT = Path(__file__).resolve().parent.parent
ROW = 16  # images of each scheduler in the picture


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    argv = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--model", help="Folder of a saved pipeline, or its Hub id; without it, the package's own.")
    parser.add_argument("--num_images", type=int, default=200, help="Of each scheduler.")
    parser.add_argument("--num_inference_steps", type=int, default=50)
    parser.add_argument("--batch_size", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results" / "every_scheduler.json")
    parser.add_argument("--picture", type=Path, default=ROOT / "assets" / "schedulers.png")
    args = parser.parse_args(argv)
    args.command = ["python", "benchmarks/every_scheduler.py", *argv]
    return args


def main(args: argparse.Namespace) -> dict[str, Any]:
    """Sample, classify, and write the figures and a picture with one row for each scheduler."""
    from diffusers.utils import pt_to_pil

    from mnist_ddpm.images import image_grid
    from mnist_ddpm.metrics import ClassifierFeatures, class_scores, extract_features

    classifier = ClassifierFeatures.from_pretrained()
    rows, scores = [], {}
    for name, class_name in SCHEDULERS.items():
        pipe = load_pipeline(args.model, name)
        start = time.perf_counter()
        steps = args.num_inference_steps
        images = sample_tensor(pipe, args.num_images, args.seed, args.batch_size, num_inference_steps=steps)
        seconds = time.perf_counter() - start
        features = extract_features(classifier, images)
        scores[name] = {"class": class_name, **class_scores(classifier.logits(features)), "seconds": seconds}
        rows += pt_to_pil(images[:ROW] / 127.5 - 1)
        print(f"{name:22} share with confidence >= 0.9: {scores[name]['confident_share']:.3f}  {seconds:.0f} s")

    result = {
        "schedulers": scores,
        "num_images": args.num_images,
        "num_inference_steps": args.num_inference_steps,
        **provenance(args),
    }
    args.output.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    image_grid(rows, columns=ROW).save(args.picture)
    return result


if __name__ == "__main__":
    main(parse_args())
