"""Peak memory of training and of sampling on MNIST, each in a process of its own (the largest resident set)."""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
EXAMPLES = ROOT / "examples"
MARGIN = 0.1  # by which the peaks of few and many images may differ: the allocator's doing, it does not go on growing


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    argv = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--num_images", type=int, nargs="+", default=[1000, 10_000], help="To sample.")
    parser.add_argument("--batch_size", type=int, default=64, help="Images to sample at a time.")
    parser.add_argument("--num_inference_steps", type=int, default=1)
    parser.add_argument("--max_train_steps", type=int, default=20, help="Else train.py is at its defaults.")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results" / "memory.json")
    args = parser.parse_args(argv)
    args.command, args.seed = ["python", "benchmarks/memory.py", *argv], 0
    return args


def peak_memory(command: list[str | Path]) -> int:
    """Run a Python script to its end; returns the largest memory that it held, in bytes.

    Raises:
        RuntimeError: If it fails.
    """
    process = subprocess.Popen([sys.executable, *command])
    _, status, usage = os.wait4(process.pid, 0)
    if status != 0:
        raise RuntimeError(f"{' '.join(map(str, command))} failed with status {os.waitstatus_to_exitcode(status)}")
    if usage.ru_maxrss <= resource.getrusage(resource.RUSAGE_SELF).ru_maxrss:
        raise RuntimeError(
            "a process begins with what its parent holds, and this one holds too much: import less here"
        )
    return usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def training(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """The peak of a short training run, with its samples, checkpoint and saved pipeline at the end."""
    flags = ["--max_train_steps", str(args.max_train_steps), "--output_dir", folder / "run"]
    return {"peak_bytes": peak_memory([EXAMPLES / "train.py", *flags]), "steps": args.max_train_steps}


def sampling(args: argparse.Namespace, folder: Path, num_images: int) -> dict[str, Any]:
    """The peak of sampling so many images to files."""
    options = {name: getattr(args, name) for name in ("batch_size", "num_inference_steps")} | {
        "num_images": num_images
    }
    flags = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    images = folder / f"{num_images}"
    peak = peak_memory([EXAMPLES / "sample.py", *flags, "--output_dir", images])
    files = sum(entry.name.endswith(".png") for entry in os.scandir(images))
    if files != num_images:
        raise RuntimeError(f"{num_images} images were asked for, {files} are there")
    return {"peak_bytes": peak, "num_images": num_images}


def main(args: argparse.Namespace) -> dict[str, Any]:
    """Measure, write the figures, and see that many images take no more memory than few."""
    with tempfile.TemporaryDirectory() as name:
        result = {
            "training_memory": training(args, Path(name)),
            "sampling_memory": [sampling(args, Path(name), num_images) for num_images in args.num_images],
            "batch_size": {"sampling": args.batch_size},
        }
    from mnist_ddpm.cli import provenance  # only now, as it imports torch: see `peak_memory`

    result |= provenance(args)
    args.output.write_text(json.dumps(result, indent=2) + "\n")
    peaks = [row["peak_bytes"] for row in result["sampling_memory"]]
    if max(peaks) > (1 + MARGIN) * min(peaks):
        raise RuntimeError(f"the peak memory of sampling differs by more than {MARGIN:.0%}: {peaks} bytes")
    return result


if __name__ == "__main__":
    try:
        main(parse_args())
    except (OSError, RuntimeError) as error:
        sys.exit(f"error: {error}")
