"""`examples/train.py` in processes of its own: how many there are does not change what is learned."""

import json
import os
import re
import signal
import subprocess
import sys
import time

import numpy as np
import psutil
import pytest
import train
from tiny_training import command_line, write_workplace

from mnist_ddpm.training.checkpoints import list_checkpoints

pytestmark = pytest.mark.slow
# Gradients summed in another order differ by 1e-7. Newton-Schulz in bfloat16 rounds a few entries of an update the
# other way then, by 2^-8 of their size: after 20 steps, losses and gradients differ by up to some 1e-3.
TOLERANCES = {"adamw": 1e-5, "muon": 1e-2}


@pytest.fixture
def command(tmp_path):
    """The command that trains on a few small images, in a number of processes, with some flags."""
    workplace = write_workplace(tmp_path / "workplace")

    def command(processes, *flags):
        launcher = f"-m torch.distributed.run --standalone --nproc_per_node {processes}".split()
        flags = command_line(workplace, "--no-compile", *flags, eval_batch_size=1, lr_warmup_steps=500)
        return [sys.executable, *launcher, train.__file__, *flags]

    return command


ENVIRONMENT = os.environ | {"ACCELERATE_USE_CPU": "true"}


def run(command):
    result = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    return result.stderr


def read_log(output_dir):
    return [json.loads(line) for line in (output_dir / "train_log.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("optimizer", TOLERANCES)
def test_one_and_two_processes_learn_the_same(command, tmp_path, optimizer):
    """20 steps of 8 images, as 1 x 8 and as 2 x 2 x 2 images, and one process resuming from where two had come to."""
    flags = "--max_train_steps 20 --lr_scheduler constant --checkpointing_steps 10 --random_flip --label_column label"
    flags += f" --label_dropout 0.5 --optimizer {optimizer}"
    run(command(1, flags, "--train_batch_size 8 --output_dir", tmp_path / "one"))
    split = "--train_batch_size 2 --gradient_accumulation_steps 2 --output_dir"
    assert "2 process(es)" in run(command(2, flags, split, tmp_path / "two"))
    resume = ["--resume_from_checkpoint", tmp_path / "two" / "checkpoint-10"]
    run(command(1, flags, "--train_batch_size 8", *resume, "--output_dir", tmp_path / "resumed"))

    one, two, resumed = (read_log(tmp_path / name) for name in ("one", "two", "resumed"))
    assert [record["step"] for record in two] == list(range(1, 21))
    for key in ("loss", "grad_norm", "lr"):
        np.testing.assert_allclose([r[key] for r in two], [r[key] for r in one], rtol=TOLERANCES[optimizer])
        np.testing.assert_allclose([r[key] for r in resumed], [r[key] for r in one[10:]], rtol=TOLERANCES[optimizer])


def test_two_processes_stop_where_a_number_is_not_finite(command, tmp_path):
    """Both raise, with the step; none is left to wait for the other."""
    flags = "--train_batch_size 4 --max_train_steps 50 --learning_rate 1e30 --optimizer adamw --lr_warmup_steps 3"
    words = command(2, flags, "--output_dir", tmp_path / "run")
    result = subprocess.run(words, env=ENVIRONMENT, capture_output=True, text=True, timeout=300)
    assert result.returncode == 1
    assert len(re.findall(r"error: step \d+: .*? The last good checkpoint is none", result.stderr)) == 2, result.stderr
    assert "[RANK" not in result.stderr
    assert not list(tmp_path.glob("run/**/*.safetensors"))


def test_run_of_two_processes_resumes_when_one_of_them_was_killed(command, tmp_path):
    """To the same bits as a run of two processes that nothing happened to; the other one does not hang."""
    flags = "--train_batch_size 4 --max_train_steps 60 --checkpointing_steps 5 --checkpoints_total_limit 2"
    flags += " --resume_from_checkpoint latest --output_dir"
    run(command(2, flags, tmp_path / "whole"))
    with subprocess.Popen(command(2, flags, tmp_path / "run"), env=ENVIRONMENT, stderr=subprocess.PIPE) as launcher:
        while launcher.poll() is None and not list_checkpoints(tmp_path / "run"):
            time.sleep(0.1)
        os.kill(psutil.Process(launcher.pid).children()[1].pid, signal.SIGKILL)
        launcher.communicate(timeout=120)
    assert launcher.returncode == 1
    assert len(read_log(tmp_path / "run")) < 60
    assert "Resuming from" in run(command(2, flags, tmp_path / "run"))
    last = "checkpoint-60"
    for name in ("train_log.jsonl", "samples.png", f"{last}/model.safetensors", f"{last}/optimizer.bin"):
        assert (tmp_path / "run" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name


def test_two_processes_stop_at_the_same_step(command, tmp_path):
    output_dir = tmp_path / "run"
    words = command(2, "--train_batch_size 4 --max_train_steps 100_000 --output_dir", output_dir)
    with subprocess.Popen(words, env=ENVIRONMENT, stderr=subprocess.PIPE, text=True) as process:
        log = output_dir / "train_log.jsonl"
        while process.poll() is None and not (log.exists() and log.stat().st_size):
            time.sleep(0.1)
        process.terminate()  # the launcher, which passes it on
        _, stderr = process.communicate(timeout=120)
    assert "Stopped early" in stderr, stderr
    (checkpoint,) = list_checkpoints(output_dir)
    assert checkpoint.name == f"checkpoint-{len(read_log(output_dir))}"
