"""Keep what a run of `examples/train.py` or `examples/distill.py` cost and how its loss fell, from its log."""

import argparse
import json
import statistics
import sys
from pathlib import Path
from typing import Any

from mnist_ddpm.cli import provenance

ROOT = Path(__file__).resolve().parent.parent


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    argv = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("run", type=Path, help="The run's --output_dir.")
    parser.add_argument("--training_command", required=True, help="The command that made the run.")
    parser.add_argument("--training_machine", required=True, help="The machine that it ran on.")
    parser.add_argument("--seconds", type=int, required=True, help="How long it trained.")
    parser.add_argument("--batch_size", type=int, required=True, help="Images of a step.")
    parser.add_argument("--kind", choices=("training", "distillation"), default="training", help="What it was.")
    parser.add_argument("--window", type=int, default=250, help="Steps to average the loss over.")
    parser.add_argument("--output", type=Path, help="By default benchmarks/results/KIND.json.")
    args = parser.parse_args(argv)
    args.output = args.output or ROOT / "benchmarks" / "results" / f"{args.kind}.json"
    args.command, args.seed = ["python", "benchmarks/training_curve.py", *argv], None
    return args


def main(args: argparse.Namespace) -> dict[str, Any]:
    """Read `train_log.jsonl`, and write the summary."""
    log = (args.run / "train_log.jsonl").read_text(encoding="utf-8")
    losses = [json.loads(line)["loss"] for line in log.splitlines()]
    windows = [losses[i : i + args.window] for i in range(0, len(losses), args.window)]
    origin = provenance(args)
    result = {
        args.kind: {
            "command": args.training_command,
            "machine": args.training_machine,
            "steps": len(losses),
            "images": len(losses) * args.batch_size,
            "seconds": args.seconds,
            "images_per_second": round(len(losses) * args.batch_size / args.seconds),
            "loss_window": args.window,
            "loss": [round(statistics.fmean(window), 5) for window in windows],
        },
        "versions": origin["versions"],
    }
    args.output.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    return result


if __name__ == "__main__":
    main(parse_args())
