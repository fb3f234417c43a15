"""Train ours and the peer for as long, in alternating slices, and score both along the way: time against FID.

The contenders:

- `ours`: our `Trainer` at its defaults, but for a constant learning rate, so that it may be stopped at any moment;
- `ours_decayed`: our `Trainer` at its defaults, whose learning rate falls to 0 over a run of `--decayed_steps`;
- `stock`: the Hugging Face diffusion course's U-Net for MNIST in a plain loop: DDPMScheduler, AdamW, float32;
- `tuned`: the same, as well tuned as ours: compiled, channels_last, bfloat16, Muon, our timesteps, EMA;
- `our_recipe`: our `Trainer` with the course's U-Net, to tell what the recipe brings from what the network brings.

Only training counts as time, not the scoring. The samples along the way are by DDPM. Afterwards each
samples in more and more steps, each time by the sampler that is best at that number of steps. A figure shows both.
"""

import argparse
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from contenders import PEER_UNET, Contender, Course, Ours
from diffusers import UNet2DModel
from quality import Quality, write_json

from mnist_ddpm.cli import provenance
from mnist_ddpm.data import load_mnist

ROOT = Path(__file__).resolve().parent.parent
ANYTIME = {"lr_scheduler": "constant_with_warmup", "max_train_steps": 10_000_000}
SAMPLERS = ("ddpm", "ddim", "dpmsolver_multistep")
NAMES = ("ours", "ours_decayed", "stock", "tuned", "our_recipe")


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    argv = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--contenders", nargs="+", choices=NAMES, default=list(NAMES))
    parser.add_argument("--minutes", nargs="+", type=float, default=[20.0], help="of training, for all or for each")
    parser.add_argument(
        "--decayed_steps", type=int, default=3000, help="of ours_decayed: a few more than it has time for"
    )
    parser.add_argument("--slice", type=float, default=30.0, help="seconds that one trains while the others wait")
    parser.add_argument(
        "--score_at", nargs="+", type=float, default=[1, 2, 5, 10, 20, 40, 60], help="minutes of training"
    )
    parser.add_argument("--num_images", type=int, default=1000, help="for each score")
    parser.add_argument("--num_inference_steps", type=int, default=50, help="of DDPM, for the curve")
    parser.add_argument(
        "--sampling_steps", nargs="*", type=int, default=[5, 10, 20, 50, 100, 1000], help="for the last part"
    )
    parser.add_argument(
        "--peer_sampling_steps", nargs="*", type=int, default=[5, 10, 20, 50], help="for the slow ones"
    )
    parser.add_argument("--samplers", nargs="+", choices=SAMPLERS, default=list(SAMPLERS), help="to choose from")
    parser.add_argument("--sampling_contenders", nargs="*", choices=NAMES, help="of those: the ones that sample (all)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results" / "time_to_quality.json")
    parser.add_argument("--picture", type=Path, default=ROOT / "assets" / "time_to_quality.png")
    args = parser.parse_args(argv)
    if len(args.minutes) not in (1, len(args.contenders)):
        parser.error(f"--minutes: one number, or one for each of {args.contenders}, got {args.minutes}")
    if len(args.minutes) == 1:
        args.minutes *= len(args.contenders)
    if args.sampling_contenders is None:
        args.sampling_contenders = args.contenders
    if not set(args.sampling_contenders) <= set(args.contenders):
        parser.error(f"--sampling_contenders: some of {args.contenders}, got {args.sampling_contenders}")
    args.command = ["python", "benchmarks/time_to_quality.py", *argv]
    return args


def make(name: str, args: argparse.Namespace, device: str, folder: Path) -> Contender:
    """A contender that has not begun yet."""
    options: dict[str, Any] = ANYTIME | {"seed": args.seed}
    match name:
        case "ours":
            return Ours(folder / name, **options)
        case "ours_decayed":
            return Ours(folder / name, max_train_steps=args.decayed_steps, seed=args.seed)
        case "our_recipe":
            UNet2DModel(**PEER_UNET).save_config(folder / "unet")
            return Ours(folder / name, model_config_name_or_path=str(folder / "unet"), **options)
    images = load_mnist("train")
    if name == "stock":
        return Course(images, device, tuned=False, learning_rate=4e-4, seed=args.seed)
    return Course(images, device, tuned=True, learning_rate=1e-3, compiled=True, bf16=True, seed=args.seed)


class Race:
    """A contender, the training that it has had, and the scores that it reached."""

    def __init__(
        self, make: Callable[[], Contender], minutes: float, score_at: list[float], synchronize: Callable[[], None]
    ):
        start = time.perf_counter()
        self.contender = make()
        self.setup_seconds = time.perf_counter() - start
        self.synchronize = synchronize
        self.score_at = sorted({m for m in score_at if m < minutes} | {minutes})
        self.seconds, self.steps, self.first_step_seconds = 0.0, 0, 0.0
        self.curve: list[dict[str, float]] = []

    @property
    def finished(self) -> bool:
        """Whether it has had all of its time."""
        return len(self.curve) == len(self.score_at)

    def train(self, seconds: float) -> None:
        """Train for so long, or to the next score, if that comes first."""
        until = min(self.seconds + seconds, 60 * self.score_at[len(self.curve)])
        while self.seconds < until:
            start = time.perf_counter()
            self.contender.step()
            self.synchronize()
            elapsed = time.perf_counter() - start
            if self.steps == 0:  # compilation and the like: told apart
                self.first_step_seconds = elapsed
            else:
                self.seconds += elapsed
            self.steps += 1

    @property
    def score_due(self) -> bool:
        """Whether it has come to a moment to score at."""
        return not self.finished and self.seconds >= 60 * self.score_at[len(self.curve)]

    def result(self) -> dict[str, Any]:
        """What is written down."""
        return {
            "images_per_second": (self.steps - 1) * self.contender.batch_size / self.seconds,
            "steps": self.steps,
            "batch_size": self.contender.batch_size,
            "bf16": self.contender.bf16,
            "setup_seconds": self.setup_seconds,
            "first_step_seconds": self.first_step_seconds,
            "parameters": sum(p.numel() for p in self.contender.pipeline().unet.parameters()),
            "curve": self.curve,
        }


def main(args: argparse.Namespace) -> dict[str, Any]:
    """Train in turns, score, sample, draw; write after each score what there is."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    synchronize = torch.cuda.synchronize if device == "cuda" else lambda: None
    quality = Quality(args.num_images, args.seed, device=device)
    result: dict[str, Any] = {
        "contenders": {},
        "sampling": {},
        "floor": quality.floor,
        "num_images": args.num_images,
        "num_inference_steps": args.num_inference_steps,
        "threads": torch.get_num_threads(),
        **provenance(args),
    }

    with tempfile.TemporaryDirectory() as folder:
        minutes = zip(args.contenders, args.minutes, strict=True)
        races = {
            name: Race(partial(make, name, args, device, Path(folder)), m, args.score_at, synchronize)
            for name, m in minutes
        }
        while not all(race.finished for race in races.values()):
            for name, race in races.items():
                if race.finished:
                    continue
                race.train(args.slice)
                if race.score_due:
                    pipe = race.contender.pipeline("ddpm")
                    scores = quality(pipe, race.contender.bf16, num_inference_steps=args.num_inference_steps)
                    race.curve.append({"minutes": race.seconds / 60, "steps": race.steps, **scores})
                    result["contenders"][name] = race.result()
                    print(f"{name:>12} {race.seconds / 60:5.1f} min  {race.steps:>6} steps  FID {scores['fid']:.2f}")
                    write_json(result, args.output)

        for name in args.sampling_contenders:
            race = races[name]
            for steps in args.sampling_steps if name == "ours" else args.peer_sampling_steps:
                options = {"bf16": race.contender.bf16, "num_inference_steps": steps}
                points = [
                    {"num_inference_steps": steps, "sampler": sampler}
                    | quality(race.contender.pipeline(sampler), **options)
                    for sampler in args.samplers
                ]
                best = min(points, key=lambda point: point["fid"])
                result["sampling"].setdefault(name, []).append(best)
                print("{:>12} {num_inference_steps:>5} steps  {sampler}  FID {fid:.2f}".format(name, **best))
                write_json(result, args.output)
    draw(result, args.picture)
    return result


def draw(result: dict[str, Any], path: Path) -> None:
    """The figure: FID over minutes of training, and over samples per second."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.ticker import LogLocator

    figure, (training, sampling) = plt.subplots(1, 2, figsize=(11, 3.8), layout="constrained", sharey=True)
    for i, (name, contender) in enumerate(result["contenders"].items()):
        curve, points = contender["curve"], result["sampling"].get(name, [])
        fids = [point["fid"] for point in curve]
        training.loglog([point["minutes"] for point in curve], fids, "o-", color=f"C{i}", label=name)
        fids = [point["fid"] for point in points]
        sampling.loglog([point["samples_per_second"] for point in points], fids, "o", color=f"C{i}")
        for point in points:
            at = (point["samples_per_second"], point["fid"])
            sampling.annotate(str(point["num_inference_steps"]), at, (4, 4), textcoords="offset points")
    minutes = sorted({round(point["minutes"]) for c in result["contenders"].values() for point in c["curve"]})
    training.set_xticks(minutes, [str(m) for m in minutes])
    training.minorticks_off()
    sampling.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    sampling.xaxis.set_major_formatter("{x:g}")
    sampling.minorticks_off()
    for panel, label in ((training, "minutes of training"), (sampling, "samples per second; at the dots: steps")):
        panel.axhline(result["floor"]["fid"], color="gray", linestyle="--", label="real images")
        panel.set(xlabel=label)
        panel.grid(which="both", alpha=0.3)
    training.set_ylabel("FID")
    training.legend()
    figure.savefig(path, dpi=80)
    plt.close(figure)


if __name__ == "__main__":
    main(parse_args())
