"""How a training gets better: scores and samples of the pipelines that it kept, by DDPM and by DDIM.

    python benchmarks/epochs.py 25=mnist-400/pipelines/step-00002930 50=mnist-400/pipelines/step-00005860

Each pipeline stands behind the number of its epochs. The picture has a row for each, from the same noise: DDPM, then
DDIM. Scores that the output file has of the same pipelines are kept.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

from figures import enlarged
from quality import Quality, earlier_figures, in_bf16, write_json

from mnist_ddpm import MNISTDDPMPipeline
from mnist_ddpm.cli import provenance
from mnist_ddpm.data import MNIST
from mnist_ddpm.images import image_grid
from mnist_ddpm.sampling import make_scheduler, sample

ROOT = Path(__file__).resolve().parent.parent
SAMPLERS = ("ddpm", "ddim")
COLUMNS = 8  # of each sampler


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    argv = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pipelines", nargs="+", metavar="EPOCHS=PIPELINE")
    parser.add_argument("--num_images", type=int, default=2000, help="samples for each score")
    parser.add_argument("--num_inference_steps", type=int, default=50)
    parser.add_argument("--dataset_name", default=MNIST, help="of the real images")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results" / "epochs.json")
    parser.add_argument("--picture", type=Path, default=ROOT / "docs" / "epochs.png")
    args = parser.parse_args(argv)
    args.command = ["python", "benchmarks/epochs.py", *argv]
    return args


def main(args: argparse.Namespace) -> dict[str, Any]:
    """Score and sample, and write what there is after each score."""
    settings = {name: getattr(args, name) for name in ("num_images", "num_inference_steps", "seed")}
    earlier = earlier_figures(args.output, "epochs", settings)
    quality = Quality(args.num_images, args.seed, dataset_name=args.dataset_name)
    rows: dict[str, dict[str, Any]] = {}
    result = {"epochs": rows, "settings": settings, "floor": quality.floor, **provenance(args)}
    options: dict[str, Any] = {"num_inference_steps": args.num_inference_steps}
    images: list[Any] = []
    for pair in args.pipelines:
        epochs, path = pair.split("=", 1)
        row = earlier.get(epochs, {})
        rows[epochs] = row = row if row.get("pipeline") == path else {"pipeline": path}
        pipe = MNISTDDPMPipeline.from_pretrained(path)
        for name in SAMPLERS:
            pipe.scheduler = make_scheduler(name, pipe.scheduler.config)
            with in_bf16("cpu", enabled=True):
                for _, batch in sample(pipe, range(COLUMNS), args.seed, COLUMNS, **options):
                    images += batch
            if name not in row:
                row[name] = quality(pipe, bf16=True, **options)
                print(epochs, name, row[name], flush=True)
                write_json(result, args.output)
    write_json(result, args.output)
    enlarged(image_grid(images, columns=len(SAMPLERS) * COLUMNS)).save(args.picture)
    return result


if __name__ == "__main__":
    main(parse_args())
