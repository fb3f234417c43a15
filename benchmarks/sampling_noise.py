"""FID of one model by the noise of its sampling and by the number of steps: DDPM's two variances and none, DDIM's eta.

The counterpart of Table 1 of DDIM (arXiv 2010.02502). Cells that the output file has already, of the same model and
settings, are kept: a run that was stopped resumes.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

import torch
from quality import Quality, earlier_figures, write_json

from mnist_ddpm import PRETRAINED, MNISTDDIMScheduler, MNISTDDPMPipeline, MNISTDDPMScheduler
from mnist_ddpm.cli import provenance
from mnist_ddpm.sampling import weights_digest

ROOT = Path(__file__).resolve().parent.parent
# scheduler, what its config says about the variance, and what a call of the pipeline says about the noise
ROWS: dict[str, tuple[type[MNISTDDPMScheduler | MNISTDDIMScheduler], dict[str, Any], dict[str, Any]]] = {
    "DDPM, simple_var off (posterior variance)": (MNISTDDPMScheduler, {"simple_var": False}, {}),
    "DDPM, simple_var on (beta_t)": (MNISTDDPMScheduler, {"simple_var": True}, {}),
    "DDPM, noise_scale 0": (MNISTDDPMScheduler, {}, {"noise_scale": 0.0}),
    "DDIM, eta 0": (MNISTDDIMScheduler, {}, {"eta": 0.0}),
    "DDIM, eta 0, noise of the clipped x_0": (
        MNISTDDIMScheduler,
        {},
        {"eta": 0.0, "use_clipped_model_output": True},
    ),
    "DDIM, eta 0.5": (MNISTDDIMScheduler, {}, {"eta": 0.5}),
    "DDIM, eta 1": (MNISTDDIMScheduler, {}, {"eta": 1.0}),
    "DDIM, sigma-hat": (MNISTDDIMScheduler, {"simple_var": True}, {"eta": 1.0}),
}


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    argv = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=PRETRAINED, help="a saved pipeline; by default the package's own")
    parser.add_argument("--steps", nargs="+", type=int, default=[10, 20, 50, 100, 1000])
    parser.add_argument("--num_images", type=int, default=1000, help="for each cell")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results" / "sampling_noise.json")
    args = parser.parse_args(argv)
    args.command = ["python", "benchmarks/sampling_noise.py", *argv]
    return args


def main(args: argparse.Namespace) -> dict[str, Any]:
    """Fill the table, cell by cell, the quick columns first."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    quality = Quality(args.num_images, args.seed, device=device)
    pipe = MNISTDDPMPipeline.from_pretrained(args.model).to(device)
    settings = {"weights": weights_digest(pipe.unet), "num_images": args.num_images, "seed": args.seed}
    earlier = earlier_figures(args.output, "noise_table", settings)
    result: dict[str, Any] = {
        "noise_table": {name: earlier.get(name, {}) for name in ROWS},
        "settings": settings,
        "floor": quality.floor,
        **provenance(args),
    }

    config = pipe.scheduler.config
    for steps in sorted(args.steps):
        for name, (scheduler_class, scheduler_options, call_options) in ROWS.items():
            cells = result["noise_table"][name]
            if str(steps) in cells:
                continue
            pipe.scheduler = scheduler_class.from_config(config, clip_sample=True, **scheduler_options)
            cells[str(steps)] = scores = quality(pipe, bf16=True, num_inference_steps=steps, **call_options)
            print(f"{name:42} {steps:>5} steps  FID {scores['fid']:8.2f}  clear {scores['confident_share']:.1%}")
            write_json(result, args.output)
    return result


if __name__ == "__main__":
    main(parse_args())
