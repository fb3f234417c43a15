"""Search the timesteps at which a solver in few steps ends closest to where many steps lead from the same noise.

The first timestep stays T - 1; the others move one at a time, by less and less, as long as the error falls. The error
is the root mean square over the pixels of samples, in 8 bits, on [-1, 1]; networks compute in bfloat16 where the
others do. FID plays no part: `few_steps.py` scores the result.
"""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from diffusers import DPMSolverMultistepScheduler
from quality import in_bf16, write_json

from mnist_ddpm import PRETRAINED, MNISTDDPMPipeline
from mnist_ddpm.cli import provenance
from mnist_ddpm.sampling import sample_tensor, weights_digest

ROOT = Path(__file__).resolve().parent.parent
MOVES = (64, 32, 16, 8)


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    argv = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=PRETRAINED, help="a saved pipeline; by default the package's own")
    parser.add_argument("--evaluations", nargs="+", type=int, default=[5, 8, 10])
    parser.add_argument("--reference_steps", type=int, default=100)
    parser.add_argument("--num_images", type=int, default=128)
    parser.add_argument("--seed", type=int, default=1, help="of the noise: another one than that of the scores")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results" / "timestep_grid.json")
    args = parser.parse_args(argv)
    args.command = ["python", "benchmarks/timestep_grid.py", *argv]
    return args


def search(error: Callable[[list[int]], float], timesteps: list[int], moves: tuple[int, ...] = MOVES) -> list[int]:
    """Timesteps in descending order, the first of them fixed, that no such move of a single one makes better."""
    best = error(timesteps)
    for size in moves:
        improved = True
        while improved:
            improved = False
            for i in range(1, len(timesteps)):
                for move in (-size, size):
                    moved = [*timesteps[:i], timesteps[i] + move, *timesteps[i + 1 :]]
                    if moved[-1] < 0 or moved != sorted({*moved}, reverse=True):
                        continue
                    at = error(moved)
                    if at < best:
                        best, timesteps, improved = at, moved, True
    return timesteps


def main(args: argparse.Namespace) -> dict[str, Any]:
    """Search for each number of evaluations."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    pipe = MNISTDDPMPipeline.from_pretrained(args.model).to(device)
    pipe.scheduler = DPMSolverMultistepScheduler.from_config(pipe.scheduler.config, solver_order=2)
    T = pipe.scheduler.config.num_train_timesteps

    def images(**options: Any) -> torch.Tensor:
        with in_bf16(device, True):
            return sample_tensor(pipe, args.num_images, args.seed, args.num_images, **options) / 127.5 - 1

    reference = images(num_inference_steps=args.reference_steps)

    def error(timesteps: list[int]) -> float:
        return (images(timesteps=timesteps) - reference).square().mean().sqrt().item()

    result: dict[str, Any] = {"grids": {}, "weights": weights_digest(pipe.unet), **provenance(args)}
    for n in args.evaluations:
        trailing = [round(T * i / n) - 1 for i in range(n, 0, -1)]
        found = search(error, trailing)
        result["grids"][n] = {"timesteps": found, "error": error(found), "error_of_trailing": error(trailing)}
        print(n, result["grids"][n], flush=True)
        write_json(result, args.output)
    return result


if __name__ == "__main__":
    main(parse_args())
