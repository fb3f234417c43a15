"""The parts of `gpu.py`, which starts this program: tests, speed, training, scores, quality."""

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import scheduler_step
import torch
from contenders import PEER_UNET, Course
from diffusers import DDIMPipeline, DDIMScheduler, UNet2DModel
from gpu import ROOT, SHARES, parse_args
from gpu_measures import DEVICE, WARMUP, Size, TimedTrainer, flops_per_image, free_memory, peak, seconds_per_step, toy
from quality import Quality, in_bf16, write_json

from mnist_ddpm import MNISTDDPMPipeline, MNISTDDPMScheduler, MNISTUNet2DModel
from mnist_ddpm.cli import provenance
from mnist_ddpm.data import decode_images, load_split
from mnist_ddpm.sampling import make_scheduler
from mnist_ddpm.training import TrainingArguments
from mnist_ddpm.training.checkpoints import kept_pipeline_path, list_checkpoints

BF16 = DEVICE == "cuda"


class Run:
    """One call of the program: its arguments, the figures so far, and what is left of the time."""

    def __init__(self, args: argparse.Namespace):
        self.args = args
        self.folder: Path = args.output_dir
        self.folder.mkdir(parents=True, exist_ok=True)
        self.path = self.folder / "gpu.json"
        self.result: dict[str, Any] = {}
        if self.path.exists():
            self.result = json.loads(self.path.read_text(encoding="utf-8"))["gpu"]
        self.size = toy(self.folder) if args.toy else Size()
        self.end = time.perf_counter() + 60 * args.minutes

    def write(self, part: str, figures: dict[str, Any]) -> None:
        """Write what there is of a part."""
        self.result[part] = figures | provenance(self.args)
        self.save()

    def save(self) -> None:
        """Write all that there is."""
        write_json({"gpu": self.result}, self.path)

    def pending(self) -> list[str]:
        """The parts that are not done."""
        done = {"tests": self.result.get("tests", {}).get("returncode") == 0, "speed": "speed" in self.result}
        training, scores = self.result.get("training", {}), self.result.get("scores", {})
        if training.get("epochs", 0) >= self.args.num_epochs and "decayed" in training:
            done["training"] = True
            of_these_weights = scores.get("step") == training["decayed"]["step"]
            done["scores"] = of_these_weights and self.score_names().keys() <= scores.keys()
            done["quality"] = len(self.result.get("quality", {}).get("curve", [])) == len(training["kept"]) + 1
        return [part for part in self.args.parts if not done.get(part)]

    def score_names(self) -> dict[str, str]:
        """The scheduler of each file of scores."""
        return {f"{scheduler}_{self.size.num_inference_steps}": scheduler for scheduler in ("ddim", "ddpm")}

    def all_parts(self) -> None:
        """Run what is pending, each part within its share of the time; an error ends a part, not the run."""
        pending = self.pending()
        for i, part in enumerate(pending):
            left = self.end - time.perf_counter()
            seconds = left * SHARES[part] / sum(SHARES[later] for later in pending[i:])
            print(f"{part}: {seconds:.0f} of {left:.0f} s", flush=True)
            start = time.perf_counter()
            self.result.setdefault("errors", {}).pop(part, None)
            try:
                getattr(self, part)(start + seconds)
            except Exception as error:
                traceback.print_exc()
                self.result["errors"][part] = repr(error)
            self.result.setdefault("seconds", {})[part] = round(time.perf_counter() - start, 1)
            self.save()

    # Tests -----------------------------------------------------------------------------------------------------------

    def tests(self, deadline: float) -> None:
        """The tests that are marked `gpu`; without a GPU, all are skipped."""
        files = [path for path in (ROOT / "tests").glob("test_*.py") if "mark.gpu" in path.read_text(encoding="utf-8")]
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "gpu", *map(str, files)]
        run = self.process(command, deadline)
        output = run.stdout + run.stderr
        (self.folder / "tests.txt").write_text(output, encoding="utf-8")
        lines = run.stdout.strip().splitlines() or [output.strip()]
        failed = [line for line in lines if line.startswith(("FAILED", "ERROR"))]
        self.write("tests", {"summary": lines[-1], "returncode": run.returncode, "failed": failed})
        if run.returncode:
            raise RuntimeError(f"tests must pass, got {lines[-1]}.")

    @staticmethod
    def process(command: list[str], deadline: float) -> subprocess.CompletedProcess[str]:
        """Run a command to its end or the deadline."""
        seconds = deadline - time.perf_counter()
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=seconds)

    # Speed -----------------------------------------------------------------------------------------------------------

    def speed(self, deadline: float) -> None:
        """Schedulers, then training and sampling in images per second; what there is no time for is named."""
        size = self.size
        flags = {
            "--device": DEVICE,
            "--rounds": size.scheduler_rounds,
            "--num_inference_steps": size.num_inference_steps,
            "--output": self.folder / "scheduler_step.json",
        }
        steps = scheduler_step.main(scheduler_step.parse_args([str(word) for flag in flags.items() for word in flag]))
        ratio = statistics.median(row["ratio"] for row in steps["rows"])
        figures: dict[str, Any] = {"scheduler_ratio": ratio, "peak_tflops": peak(), "rows": [], "left_out": []}
        if DEVICE == "cuda":
            figures["gpu"] = torch.cuda.get_device_name()
        images = decode_images(load_split(size.dataset_name, split=f"train[:{4 * size.batch_size}]"))
        course = partial(Course, images, DEVICE, learning_rate=1e-3, batch_size=size.batch_size)
        measurements: list[tuple[str, str, str, Callable[[], dict[str, Any]]]] = [
            *(("ours", "training", way, partial(self.our_training, options)) for way, options in size.ways.items()),
            ("ours", "sampling", "eager", partial(self.sampling, True, None)),
            ("ours", "sampling", "CUDA graphs", partial(self.sampling, True, size.ways["CUDA graphs"])),
            ("diffusers", "sampling", "eager", partial(self.sampling, False, None)),
            ("diffusers", "training", "float32, eager", lambda: self.training_speed(course(tuned=False))),
            (
                "diffusers",
                "training",
                "tuned",
                lambda: self.training_speed(course(tuned=True, compiled=not self.args.toy, bf16=BF16)),
            ),
            ("diffusers", "sampling", "CUDA graphs", partial(self.sampling, False, size.ways["CUDA graphs"])),
        ]
        for house, work, way, measure in measurements:
            row: dict[str, Any] = {"house": house, "work": work, "way": way}
            if time.perf_counter() > deadline:
                figures["left_out"].append(row)
                continue
            try:
                row |= measure()
            except Exception as error:  # a way that does not work here
                row["error"] = str(error).strip()[:500]
            figures["rows"].append(row)
            print(row, flush=True)
            self.write("speed", figures)
            free_memory()

    def arguments(self, output_dir: Path, **options: Any) -> TrainingArguments:
        """The arguments of the long training."""
        MNISTUNet2DModel(**self.size.unet).save_config(self.folder / "unet")
        defaults: dict[str, Any] = {
            "dataset_name": self.size.dataset_name,
            "model_config_name_or_path": str(self.folder / "unet"),
            "train_batch_size": self.size.batch_size,
            "muon_learning_rate": 0.02,
            "lr_scheduler": "constant_with_warmup",
            "lr_warmup_steps": 200,
            "compile": False,  # `TimedTrainer` sets up the fastest way
            "save_images_steps": 0,
            "save_images_epochs": self.args.num_epochs,
            "save_model_epochs": self.args.num_epochs,
            "checkpoints_total_limit": 1,
            "ddpm_num_inference_steps": self.size.num_inference_steps,
            "logger": "none",
            "seed": self.args.seed,
        }
        return TrainingArguments(output_dir=str(output_dir), command=self.args.command, **defaults | options)

    def our_training(self, way: dict[str, Any] | None) -> dict[str, Any]:
        """Steps of our Trainer, and what of a step goes to the optimizer and to the EMA."""
        split = f"train[:{4 * self.size.batch_size}]"
        arguments = self.arguments(self.folder / "trial", split=split, overwrite_output_dir=True, max_train_steps=1000)
        trainer = TimedTrainer(arguments, way)
        flops = flops_per_image(trainer.unet, training=True)
        row = self.timed(trainer.training_step, self.size.batch_size, flops)
        trainer.accelerator.backward(trainer.loss(trainer.compiled_unet, trainer.batches.micro_batches(0, 1)[0]))
        parts = {
            "optimizer": lambda step: trainer.optimizer.step(),
            "ema": lambda step: trainer.ema.step(trainer.unet.parameters()),
            "batch": lambda step: trainer.batches.micro_batches(step, 1),
        }
        seconds = {part: seconds_per_step(run, self.size.timed_steps)[1] for part, run in parts.items()}
        return row | {f"{part}_ms": 1000 * value for part, value in seconds.items()}

    def training_speed(self, course: Course) -> dict[str, Any]:
        """Steps of the course's training."""
        flops = flops_per_image(course.unet, training=True)
        return self.timed(lambda step: course.step(), course.batch_size, flops)

    def sampling(self, ours: bool, way: dict[str, Any] | None) -> dict[str, Any]:
        """DDIM, our pipeline and U-Net or diffusers' pipeline and the course's U-Net."""
        pipe: Any
        if ours:
            scheduler = MNISTDDPMScheduler(beta_schedule="squaredcos_cap_v2", prediction_type="v_prediction")
            unet = MNISTUNet2DModel(**self.size.unet)
            pipe = MNISTDDPMPipeline(unet=unet, scheduler=make_scheduler("ddim", scheduler.config))
        else:
            pipe = DDIMPipeline(UNet2DModel(**PEER_UNET), DDIMScheduler(beta_schedule="squaredcos_cap_v2"))
        pipe.unet.to(memory_format=torch.channels_last)
        pipe.to(DEVICE).set_progress_bar_config(disable=True)
        steps, batch_size = self.size.num_inference_steps, self.size.sampling_batch_size
        flops = steps * flops_per_image(pipe.unet, training=False)
        if way:
            pipe.unet.compile(**way)

        def sample(call: int) -> None:
            with in_bf16(DEVICE, BF16):
                pipe(batch_size=batch_size, num_inference_steps=steps, output_type="np")

        return self.timed(sample, batch_size, flops, steps=2, warmup=1)

    def timed(
        self, step: Callable[[int], Any], batch_size: int, flops: float, steps: int | None = None, warmup: int = WARMUP
    ) -> dict[str, Any]:
        """Images per second of steps that each take a batch, and the share of the chip's peak."""
        first, seconds = seconds_per_step(step, steps or self.size.timed_steps, warmup)
        tflops = flops * batch_size / seconds / 1e12
        return {
            "batch_size": batch_size,
            "images_per_second": batch_size / seconds,
            "first_seconds": first,
            "gflops_per_image": flops / 1e9,
            "tflops": tflops,
            "share_of_peak": tflops / peak() if peak() else None,
        }

    # Training --------------------------------------------------------------------------------------------------------

    def training(self, deadline: float) -> None:
        """Train in `run/` until the deadline or the last epoch; then, from there, let the learning rate fall to 0."""
        run, figures = self.folder / "run", self.result.get("training", {"kept": [], "calls": 0})
        way = self.fastest_way()
        arguments = self.arguments(
            run,
            num_epochs=self.args.num_epochs,
            keep_model_epochs=self.size.keep_epochs,
            checkpointing_steps=max(1, self.size.keep_epochs * self.num_images() // self.size.batch_size),
            resume_from_checkpoint="latest",
        )
        start = time.perf_counter()
        trainer = TimedTrainer(arguments, self.size.ways[way], start + 0.8 * (deadline - start))
        earlier = [point for point in [*figures["kept"], figures] if 0 < point.get("step", 0) <= trainer.first_step]
        base = max(earlier, key=lambda point: point["step"], default={})
        kept = [point for point in figures["kept"] if point["step"] <= trainer.first_step]

        def add(point: dict[str, float], base: dict[str, Any] = base) -> dict[str, Any]:
            spent = {name: base.get(name, 0.0) + point[name] for name in ("seconds", "seconds_without_compilation")}
            epochs = point["step"] * self.size.batch_size / trainer.num_images
            return {"step": point["step"], "epochs": epochs, **spent}

        def keep(point: dict[str, float]) -> None:
            kept.append(add(point))
            self.write("training", {**figures, "kept": kept, "calls": figures["calls"] + 1})

        trainer.on_keep = keep
        trainer.train()
        end = add(trainer.point())
        speed = trainer.images_per_second() or figures.get("images_per_second", 0.0)
        figures = {**end, "way": way, "kept": kept, "calls": figures["calls"] + 1, "images_per_second": speed}
        self.write("training", figures)
        if trainer.stop_signal.received:
            raise KeyboardInterrupt

        (checkpoint,) = list_checkpoints(run)[-1:]
        decay = int(speed / self.size.batch_size * (deadline - time.perf_counter()))  # steps that there is time for
        decay = max(1, min(end["step"] // 5, decay))
        folder = self.folder / f"decayed-{end['step']}"
        shutil.rmtree(folder, ignore_errors=True)  # of a call that was cut off
        options = {"resume_from_checkpoint": str(checkpoint), "lr_decay_steps": decay}
        del trainer
        free_memory()
        arguments = self.arguments(folder, max_train_steps=end["step"] + decay, **options)
        trainer = TimedTrainer(arguments, self.size.ways[way])
        trainer.train()
        self.write("training", figures | {"decayed": {**add(trainer.point(), end), "pipeline": folder.name}})

    def fastest_way(self) -> str:
        """The way of training that gave the most images per second."""
        rows = self.result.get("speed", {}).get("rows", [])
        speeds = {
            row["way"]: row["images_per_second"]
            for row in rows
            if (row["house"], row["work"]) == ("ours", "training") and "images_per_second" in row
        }
        return max(speeds, key=lambda way: speeds[way], default="eager")

    def num_images(self) -> int:
        """How many images there are to train on."""
        return len(load_split(self.size.dataset_name, split="train"))

    # Scores and quality ----------------------------------------------------------------------------------------------

    def scores(self, deadline: float) -> None:
        """Samples of the trained pipeline, by DDIM and DDPM, through `examples/evaluate.py`."""
        decayed = self.result.get("training", {}).get("decayed")
        if decayed is None:
            raise ValueError("training must be done before scores, got none. Run --parts training.")
        figures = self.result.get("scores", {})
        if figures.get("step") != decayed["step"]:
            figures = {"step": decayed["step"]}
        for name, scheduler in self.score_names().items():
            if name in figures:
                continue
            output = self.folder.resolve() / f"{name}.json"
            flags = {
                "--model": self.folder.resolve() / decayed["pipeline"],
                "--num_images": self.size.num_images,
                "--scheduler": scheduler,
                "--num_inference_steps": self.size.num_inference_steps,
                "--batch_size": 2500,
                "--dataset_name": Path(self.size.dataset_name).resolve(),
                "--seed": self.args.seed,
                "--output": output,
            }
            words = [str(word) for flag in flags.items() for word in flag]
            run = self.process([sys.executable, str(ROOT / "examples" / "evaluate.py"), *words], deadline)
            if run.returncode:
                raise RuntimeError(run.stderr[-2000:])
            result = json.loads(output.read_text(encoding="utf-8"))
            figures[name] = {of: result[of] for of in ("scores", "floor")}
            self.write("scores", figures)

    def quality(self, deadline: float) -> None:
        """FID of each pipeline that was kept, and the first whose FID is at most twice that of real images."""
        training = {"kept": []} | self.result.get("training", {})
        paths = {point["step"]: kept_pipeline_path(self.folder / "run", point["step"]) for point in training["kept"]}
        points = [*training["kept"], *filter(None, [training.get("decayed")])]
        paths |= {point["step"]: self.folder / point["pipeline"] for point in points if "pipeline" in point}
        quality = Quality(self.size.num_images, self.args.seed, 2500, DEVICE, self.size.dataset_name)
        earlier = {point["step"]: point for point in self.result.get("quality", {}).get("curve", [])}
        curve: list[dict[str, Any]] = []
        for point in points:
            if point["step"] in earlier:
                curve.append(earlier[point["step"]])
            elif time.perf_counter() < deadline:
                pipe = MNISTDDPMPipeline.from_pretrained(paths[point["step"]]).to(DEVICE)
                pipe.scheduler = make_scheduler("ddim", pipe.scheduler.config)
                curve.append(point | quality(pipe, BF16, num_inference_steps=self.size.num_inference_steps))
                print(curve[-1], flush=True)
            target = 2 * quality.floor["fid"]
            reached = next((scored for scored in curve if scored["fid"] <= target), None)
            self.write("quality", {"floor": quality.floor, "target_fid": target, "reached": reached, "curve": curve})


def main(args: argparse.Namespace) -> dict[str, Any]:
    """Run all parts."""
    if args.device == "cuda" and DEVICE != "cuda":
        sys.exit("error: device must be there, got cuda. Rehearse with --device cpu --toy.")
    run = Run(args)
    run.all_parts()
    return run.result


if __name__ == "__main__":
    try:
        arguments = parse_args()
        errors = main(arguments).get("errors", {})
        sys.exit(any(part in errors for part in arguments.parts))
    except KeyboardInterrupt:
        sys.exit("stopped; the same command resumes")
