r"""All that a GPU is needed for, by one command and within minutes: tests, speed, a long training, its scores.

    python benchmarks/gpu.py --minutes 9 --output_dir gpu-run

The parts, each within its share of the time; `gpu.json` is written after each of them, and after each number:

- `tests`: the tests that need a GPU;
- `speed`: schedulers (`scheduler_step.json`), sampling and training, ours and diffusers', and the share of the chip's
  peak;
- `training`: 400 epochs at batch size 512, eager, by torch.compile or by CUDA graphs, whichever is fastest. It stops
  when its time is over, with a checkpoint in `run/`; then the learning rate falls to 0, in `decayed-STEP/`;
- `scores`: 10,000 samples of the pipeline in `decayed-STEP/`, by `examples/evaluate.py` (`ddim_50.json`, ...);
- `quality`: FID along the training; seconds of training to twice the FID of real images.

--parts names those to run. The same command keeps the parts that are done, and resumes the training; with --num_epochs
1200, up to there. `--device cpu --toy` rehearses all of it. No part needs a network. Wheels of missing packages
may travel along, in a folder that --wheels names. For a machine with Python 3.12, torch, accelerate, transformers,
torchmetrics, pyarrow and pandas, but without diffusers, datasets and pytest:

    pip download -c constraints.txt --no-deps --only-binary=:all: --python-version 3.12 -d wheels \
        diffusers datasets dill multiprocess xxhash importlib_metadata pytest iniconfig pluggy
"""

import argparse
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SHARES = {"tests": 2, "speed": 3, "training": 8, "scores": 2.5, "quality": 1.5}  # of the time, for each part


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    argv = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=9.0, help="for all parts")
    parser.add_argument("--parts", nargs="+", choices=SHARES, default=[*SHARES], help="which; by default all")
    parser.add_argument("--num_epochs", type=int, help="of training; by default 400, or 2 with --toy")
    parser.add_argument("--output_dir", type=Path, default=Path("gpu-run"))
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--toy", action="store_true", help="rehearse at toy size")
    parser.add_argument(
        "--wheels", type=Path, help="a folder of wheels to install, without a network, for this run alone"
    )
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    args.num_epochs = args.num_epochs or (2 if args.toy else 400)
    args.command = ["python", "benchmarks/gpu.py", *argv]
    return args


def install(wheels: Path) -> Path:
    """Install wheels into a folder beside them, unless it is there; returns that folder."""
    folder = wheels.resolve() / "site"
    if not folder.exists():
        pip = [sys.executable, "-m", "pip", "install", "-q", "--no-index", "--no-deps", "--target", str(folder)]
        subprocess.run([*pip, *map(str, wheels.glob("*.whl"))], check=True)
    return folder


def main(args: argparse.Namespace) -> None:
    """Run the parts in a process of their own, which finds the wheels, the package and no GPU where none is wanted."""
    paths = [install(args.wheels)] if args.wheels else []
    paths += [ROOT / "src", *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, paths)), "HF_HUB_OFFLINE": "1"}
    if args.device == "cpu":
        environment["CUDA_VISIBLE_DEVICES"] = ""
    parts = Path(__file__).with_name("gpu_parts.py")
    os.execve(sys.executable, [sys.executable, str(parts), *args.command[2:]], environment)


if __name__ == "__main__":
    main(parse_args())
