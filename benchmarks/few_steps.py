"""FID against evaluations of the network: our schedulers and the solvers of diffusers, each with what suits it.

Cells that the output file has already, of the same model and settings, are kept: a run that was stopped resumes.
With `--student`, a distilled pipeline joins the table; with few images, the table shows its shape within minutes.
"""

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from diffusers import (
    DEISMultistepScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
    UniPCMultistepScheduler,
)
from quality import Quality, earlier_figures, write_json

from mnist_ddpm import PRETRAINED, MNISTDDIMScheduler, MNISTDDPMPipeline, MNISTDDPMScheduler
from mnist_ddpm.cli import provenance
from mnist_ddpm.sampling import few_timesteps, weights_digest

ROOT = Path(__file__).resolve().parent.parent
STUDENT = "distilled student"
STUDENT_STEPS = (1, 2, 4)


class Row(NamedTuple):
    """A sampler: its scheduler's class and options; evaluations a step; the timesteps, by the number of steps."""

    scheduler_class: Any
    options: dict[str, Any]
    order: int = 1
    timesteps: Callable[[int], list[int]] | None = None

    def num_inference_steps(self, evaluations: int) -> int:
        """The most steps for so many evaluations: a step of Heun's method takes 2, its last 1."""
        return (evaluations + self.order - 1) // self.order

    def call(self, evaluations: int) -> dict[str, Any]:
        """What the pipeline is called with: a number of steps, or the timesteps."""
        steps = self.num_inference_steps(evaluations)
        return {"timesteps": self.timesteps(steps)} if self.timesteps else {"num_inference_steps": steps}


def from_979(steps: int) -> list[int]:
    """Equally spaced timesteps without the last 20, where sigma is above 33: Heun's slopes differ too much there."""
    return [980 * n // steps - 1 for n in range(steps, 0, -1)]


# unless they say otherwise, all keep the spacing "trailing" of the package's weights: the first timestep is T - 1
ROWS = {
    "DDPM, posterior variance": Row(MNISTDDPMScheduler, {"variance_type": "fixed_small"}),
    "DDPM, variance beta_t": Row(MNISTDDPMScheduler, {"variance_type": "fixed_large"}),
    "DDIM": Row(MNISTDDIMScheduler, {"clip_sample": False}),
    "Euler": Row(EulerDiscreteScheduler, {}),
    "Heun, Karras sigmas": Row(HeunDiscreteScheduler, {"use_karras_sigmas": True}, order=2),
    "Heun, from t = 979": Row(HeunDiscreteScheduler, {}, order=2, timesteps=from_979),
    "DPM-Solver++ 2M": Row(DPMSolverMultistepScheduler, {"solver_order": 2}),
    "DPM-Solver++ 2M, Karras sigmas": Row(DPMSolverMultistepScheduler, {"solver_order": 2, "use_karras_sigmas": True}),
    "DPM-Solver++ 3M": Row(DPMSolverMultistepScheduler, {"solver_order": 3}),
    "SDE-DPM-Solver++ 2M": Row(DPMSolverMultistepScheduler, {"solver_order": 2, "algorithm_type": "sde-dpmsolver++"}),
    "UniPC, order 2": Row(UniPCMultistepScheduler, {"solver_order": 2}),
    "UniPC, order 3": Row(UniPCMultistepScheduler, {"solver_order": 3}),
    "DEIS, order 3": Row(DEISMultistepScheduler, {"solver_order": 3}),
    "DDPM, searched timesteps": Row(MNISTDDPMScheduler, {"variance_type": "fixed_small"}, timesteps=few_timesteps),
    "DPM-Solver++ 2M, searched timesteps": Row(
        DPMSolverMultistepScheduler, {"solver_order": 2}, timesteps=few_timesteps
    ),
    "SDE-DPM-Solver++ 2M, searched timesteps": Row(
        DPMSolverMultistepScheduler,
        {"solver_order": 2, "algorithm_type": "sde-dpmsolver++"},
        timesteps=few_timesteps,
    ),
}


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    argv = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=PRETRAINED, help="a saved pipeline; by default the package's own")
    parser.add_argument("--student", help="a distilled pipeline, for 1, 2 and 4 steps")
    parser.add_argument("--evaluations", nargs="+", type=int, default=[3, 5, 8, 10, 15, 20, 50])
    parser.add_argument(
        "--samplers", nargs="+", choices=ROWS, default=list(ROWS), metavar="ROW", help="by default all"
    )
    parser.add_argument("--num_images", type=int, default=5000, help="for each cell")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results" / "few_steps.json")
    parser.add_argument("--picture", type=Path, default=ROOT / "docs" / "few_steps.png")
    args = parser.parse_args(argv)
    args.command = ["python", "benchmarks/few_steps.py", *argv]
    return args


def score(pipe: MNISTDDPMPipeline, quality: Quality, call: dict[str, Any]) -> dict[str, Any]:
    """The scores of a pipeline that is called so, with the evaluations of its U-Net that an image took."""
    calls = 0

    def count(*_: Any) -> None:
        nonlocal calls
        calls += 1

    hook = pipe.unet.register_forward_hook(count)
    try:
        scores = quality(pipe, bf16=True, **call)
    finally:
        hook.remove()
    num_batches = -(-quality.num_images // quality.batch_size)
    return {**scores, **call, "evaluations": calls / num_batches}


def picture(result: dict[str, Any], path: Path) -> None:
    """Draw FID over evaluations, a line for each sampler."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
    for i, (name, cells) in enumerate(result["few_steps"].items()):
        points = sorted((cell["evaluations"], cell["fid"]) for cell in cells.values())
        student = name == STUDENT
        style = {"color": "black", "linewidth": 2} if student else {"linestyle": ("-", "--", ":")[i // 10 % 3]}
        axes.plot(*zip(*points, strict=True), marker="o" if student else ".", label=name, **style)
    axes.axhline(result["floor"]["fid"], color="gray", linewidth=1, label="real-data baseline")
    axes.set(xlabel="evaluations of the network", ylabel="FID", xscale="log", yscale="log")
    ticks = sorted({int(n) for cells in result["few_steps"].values() for n in cells})
    axes.set_xticks(ticks, labels=[str(n) for n in ticks], minor=False)
    axes.set_xticks([], minor=True)
    axes.grid(alpha=0.3)
    figure.legend(loc="outside right upper", fontsize="small")
    figure.savefig(path, dpi=100)
    plt.close(figure)


def main(args: argparse.Namespace) -> dict[str, Any]:
    """Fill the table, cell by cell, the quick columns first, and draw it."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    quality = Quality(args.num_images, args.seed, device=device)
    pipe = MNISTDDPMPipeline.from_pretrained(args.model).to(device)
    settings = {"weights": weights_digest(pipe.unet), "num_images": args.num_images, "seed": args.seed}
    earlier = earlier_figures(args.output, "few_steps", settings)
    result: dict[str, Any] = {
        "few_steps": earlier,
        "settings": settings,
        "floor": quality.floor,
        **provenance(args),
    }
    if args.output.exists():  # of a student that this run doesn't name
        result["student"] = json.loads(args.output.read_text(encoding="utf-8")).get("student")

    def fill(name: str, evaluations: int, of: MNISTDDPMPipeline, call: dict[str, Any]) -> None:
        cells = result["few_steps"].setdefault(name, {})
        earlier = cells.get(str(evaluations), {})
        if any(earlier.get(name) != value for name, value in call.items()):
            cells[str(evaluations)] = cell = score(of, quality, call)
            print(f"{name:34} {cell['evaluations']:4g} evaluations  FID {cell['fid']:8.2f}", flush=True)
            write_json(result, args.output)

    if args.student:
        student = MNISTDDPMPipeline.from_pretrained(args.student).to(device)
        digest = weights_digest(student.unet)
        if result.get("student") != digest:
            result["few_steps"].pop(STUDENT, None)
        result["student"] = digest
        for steps in STUDENT_STEPS:
            fill(STUDENT, steps, student, {"num_inference_steps": steps})
    config = pipe.scheduler.config
    for evaluations in sorted(args.evaluations):
        for name in args.samplers:
            row = ROWS[name]
            pipe.scheduler = row.scheduler_class.from_config(config, **row.options)
            fill(name, evaluations, pipe, row.call(evaluations))
    write_json(result, args.output)
    picture(result, args.picture)
    return result


if __name__ == "__main__":
    main(parse_args())
