"""Time the schedulers against diffusers' own, in the same run, turn by turn.

`python benchmarks/scheduler_step.py` writes medians and ratios to `benchmarks/results/scheduler_step.json`. A ratio is
our time over theirs: below 1 ours is faster. `loop` is `set_timesteps`, where ours makes its tables, and all steps.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import torch
from quality import write_json

from mnist_ddpm import MNISTDDIMScheduler, MNISTDDPMScheduler
from mnist_ddpm.cli import provenance

SHAPES = [(1, 1, 28, 28), (16, 1, 28, 28), (256, 1, 28, 28), (1, 4, 64, 64), (4, 4, 64, 64)]
TARGET = 1.0  # to be reached by ours over theirs


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    argv = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "scheduler_step.json")
    parser.add_argument("--rounds", type=int, default=200, help="turns that each of the two takes")
    parser.add_argument("--num_inference_steps", type=int, default=50, help="steps of the loop")
    parser.add_argument("--device", default=None, help="cpu or cuda; both where there is a GPU if not given")
    parser.add_argument(
        "--num_threads", type=int, default=None, help="threads of PyTorch on the CPU; its default if None"
    )
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    if args.rounds < 1:
        parser.error(f"argument --rounds: must be 1 or more, got {args.rounds}")
    args.command = ["python", "benchmarks/scheduler_step.py", *argv]
    return args


def interleaved_medians(calls: list[Callable[[], Any]], rounds: int, sync: Callable[[], None]) -> list[float]:
    """Median seconds of each call, taken in turns so that what else the machine does falls on all alike."""
    times: list[list[float]] = [[] for _ in calls]
    for round_number in range(rounds + 3):
        # who comes first changes from round to round
        for call, record in list(zip(calls, times, strict=True))[:: 1 if round_number % 2 else -1]:
            sync()
            start = time.perf_counter()
            call()
            sync()
            if round_number >= 3:  # the first rounds warm up
                record.append(time.perf_counter() - start)
    return [statistics.median(record) for record in times]


def workloads(shape: tuple[int, ...], device: Any, num_inference_steps: int, seed: int) -> dict[str, Any]:
    """What is timed: functions of a scheduler that is set to `num_inference_steps`."""
    generator = torch.Generator(device).manual_seed(seed)
    sample = torch.randn(shape, generator=generator, device=device)
    output = torch.randn(shape, generator=generator, device=device)
    timesteps = torch.randint(0, 1000, shape[:1], generator=generator, device=device)

    def step(scheduler: Any) -> None:
        scheduler.step(output, scheduler.timesteps[num_inference_steps // 2], sample, generator=generator)

    def add_noise(scheduler: Any) -> None:
        scheduler.add_noise(sample, output, timesteps)

    def loop(scheduler: Any) -> None:
        scheduler.set_timesteps(num_inference_steps, device=device)
        x = sample
        for t in scheduler.timesteps:
            x = scheduler.step(output, t, x, generator=generator).prev_sample

    return {"step": step, "add_noise": add_noise, "loop": loop}


def main(args: argparse.Namespace) -> dict[str, Any]:
    """Time everything, print it, and write it down."""
    if args.num_threads is not None:
        torch.set_num_threads(args.num_threads)
    devices = [args.device] if args.device else ["cpu"] + ["cuda"] * torch.cuda.is_available()
    pairs = {
        "DDPM": (MNISTDDPMScheduler, diffusers.DDPMScheduler),
        "DDIM": (MNISTDDIMScheduler, diffusers.DDIMScheduler),
    }
    rows = []
    for device in devices:
        sync = torch.cuda.synchronize if device.startswith("cuda") else lambda: None
        for name, (ours_class, theirs_class) in pairs.items():
            for shape in SHAPES:
                theirs = theirs_class(timestep_spacing="trailing")
                ours = ours_class.from_config(theirs.config)
                for scheduler in (ours, theirs):
                    scheduler.set_timesteps(args.num_inference_steps, device=device)
                for work, run in workloads(shape, device, args.num_inference_steps, args.seed).items():
                    # a loop is as many steps: fewer rounds measure it as well
                    rounds = max(args.rounds // 10, 5) if work == "loop" else args.rounds
                    calls = [lambda s=scheduler, run=run: run(s) for scheduler in (ours, theirs)]
                    ours_time, theirs_time = interleaved_medians(calls, rounds, sync)
                    rows.append(
                        {
                            "device": device,
                            "scheduler": name,
                            "shape": list(shape),
                            "work": work,
                            "ours_us": round(ours_time * 1e6, 2),
                            "diffusers_us": round(theirs_time * 1e6, 2),
                            "ratio": round(ours_time / theirs_time, 3),
                            "target": TARGET,
                        }
                    )
                    row = rows[-1]
                    mark = "" if row["ratio"] <= row["target"] else f"  above {row['target']}"
                    print(
                        f"{device} {name} {'x'.join(map(str, shape)):>12} {work:>13} "
                        f"{row['ours_us']:>10} us {row['diffusers_us']:>10} us  ratio {row['ratio']}{mark}"
                    )
    report = {
        "rows": rows,
        "reached": all(row["ratio"] <= row["target"] for row in rows),
        "threads": torch.get_num_threads(),
        **provenance(args),
    }
    args.output.parent.mkdir(parents=True, exist_ok=True)
    write_json(report, args.output)
    return report


if __name__ == "__main__":
    main(parse_args())
