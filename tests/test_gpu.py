"""On a GPU: the same numbers as on a CPU, training that compiles and resumes. And `benchmarks/gpu.py`, rehearsed."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState
from gpu import SHARES
from tiny_training import write_workplace

from mnist_ddpm import PRETRAINED, MNISTDDPMPipeline
from mnist_ddpm.sampling import SCHEDULERS, make_scheduler, sample_tensor
from mnist_ddpm.training import Trainer, TrainingArguments

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def make_trainer(tmp_path):
    """Make a Trainer of a tiny U-Net."""
    workplace = write_workplace(tmp_path / "workplace")

    def make(name="run", **arguments):
        defaults = {
            "dataset_name": str(workplace / "images"),
            "model_config_name_or_path": str(workplace / "unet"),
            "output_dir": str(tmp_path / name),
            "train_batch_size": 8,
            "max_train_steps": 6,
            "lr_warmup_steps": 2,
            "eval_batch_size": 2,
            "ddpm_num_inference_steps": 2,
            "logger": "none",
            "compile": False,
        }
        AcceleratorState._reset_state(reset_partial_state=True)  # or the precision stays that of the first
        return Trainer(TrainingArguments(**defaults | arguments))

    return make


def losses(trainer):
    log = (trainer.output_dir / "train_log.jsonl").read_text(encoding="utf-8")
    return [json.loads(line)["loss"] for line in log.splitlines()]


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["ddpm", "ddim"])
def test_samples_are_those_of_the_cpu(name):
    images = []
    for device in ("cpu", "cuda"):
        pipe = MNISTDDPMPipeline.from_pretrained(PRETRAINED, dtype=torch.float32).to(device)
        pipe.scheduler = make_scheduler(name, pipe.scheduler.config)
        images.append(sample_tensor(pipe, 4, num_inference_steps=5).int())
    assert (images[0] - images[1]).abs().float().mean() < 0.5  # of 255 gray levels


@pytest.mark.gpu
@pytest.mark.parametrize("name", SCHEDULERS)
def test_each_scheduler_samples_there(name):
    pipe = MNISTDDPMPipeline.from_pretrained(PRETRAINED).to("cuda")
    pipe.scheduler = make_scheduler(name, pipe.scheduler.config)
    assert sample_tensor(pipe, 2, num_inference_steps=4).shape == (2, 1, 28, 28)


@pytest.mark.gpu
@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_training_resumes(make_trainer, optimizer):
    options = {"optimizer": optimizer, "mixed_precision": "no"}
    whole = make_trainer("whole", **options)
    whole.train()
    first = make_trainer("parts", checkpointing_steps=3, **options)
    first.should_stop = lambda done: done == 3
    first.train()
    parts = make_trainer("parts", resume_from_checkpoint="latest", **options)
    assert parts.first_step == 3
    parts.train()
    assert losses(parts) == pytest.approx(losses(whole), rel=1e-2)


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["no", "bf16", "fp16"])
def test_training_gives_finite_losses(make_trainer, precision):
    trainer = make_trainer(mixed_precision=precision)
    trainer.train()
    assert all(map(math.isfinite, losses(trainer)))


@pytest.mark.gpu
@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_compiled_training_has_the_losses_of_eager_training(make_trainer, mode):
    eager, compiled = (make_trainer(name, max_train_steps=8, mixed_precision="no") for name in ("eager", "compiled"))
    compiled.compiled_unet = torch.compile(compiled.unet, dynamic=False, mode=mode)
    for trainer in (eager, compiled):
        trainer.train()
    assert losses(compiled) == pytest.approx(losses(eager), rel=1e-2)


@pytest.mark.gpu
def test_training_step_does_not_wait(make_trainer):
    trainer = make_trainer()
    trainer.training_step(0)
    torch.cuda.set_sync_debug_mode("error")
    try:
        trainer.training_step(1)
    finally:
        torch.cuda.set_sync_debug_mode("default")


# The benchmark


def rehearse(folder, num_epochs):
    command = [sys.executable, str(ROOT / "benchmarks" / "gpu.py"), "--device", "cpu", "--toy", "--minutes", "20"]
    command += ["--output_dir", str(folder), "--num_epochs", str(num_epochs)]
    run = subprocess.run(command, capture_output=True, text=True, cwd=folder.parent, env=os.environ)
    result = json.loads((folder / "gpu.json").read_text(encoding="utf-8"))["gpu"]
    assert run.returncode == 0, run.stderr
    return result, run.stdout


@pytest.mark.slow
def test_rehearsal_of_the_benchmark_writes_all_parts_and_resumes(tmp_path):
    folder = tmp_path / "gpu-run"
    result, _ = rehearse(folder, num_epochs=1)
    assert SHARES.keys() <= result.keys()
    assert result["tests"]["returncode"] == 0
    assert "skipped" in result["tests"]["summary"]
    rows = result["speed"]["rows"]
    assert {(row["house"], row["work"]) for row in rows} == {
        (house, work) for house in ("ours", "diffusers") for work in ("training", "sampling")
    }
    assert all(row["images_per_second"] > 0 and row["tflops"] > 0 for row in rows)
    training = result["training"]
    assert (training["step"], training["calls"], len(training["kept"])) == (16, 1, 1)
    assert training["seconds"] >= training["seconds_without_compilation"] > 0
    assert (folder / training["decayed"]["pipeline"] / "model_index.json").exists()
    assert result["scores"]["step"] == training["decayed"]["step"] > 16
    assert {"fid", "two_sample_accuracy"} <= result["scores"]["ddim_2"]["scores"].keys()
    assert [point["step"] for point in result["quality"]["curve"]] == [16, training["decayed"]["step"]]

    again, output = rehearse(folder, num_epochs=2)
    assert not output.startswith("tests")
    assert (again["tests"], again["speed"]) == (result["tests"], result["speed"])
    assert (again["training"]["step"], again["training"]["calls"]) == (32, 2)
    assert again["training"]["kept"][0] == training["kept"][0]
    assert again["training"]["seconds"] > training["seconds"]
    assert len(again["quality"]["curve"]) == 3
    assert rehearse(folder, num_epochs=2)[1] == "", "there is nothing left to do"
