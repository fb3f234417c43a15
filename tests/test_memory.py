"""The peak memory of sampling and of training, each in a process of its own (its largest resident set)."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
# a process begins with the resident set of its parent: one that has imported nothing starts each
MEASURE = """
import resource, subprocess, sys
subprocess.run(sys.argv[1:], check=True)
print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)
"""


def peak_memory(*command: object) -> int:
    """Run a Python script to its end; returns the largest memory that it held, in MiB."""
    words = [sys.executable, "-c", MEASURE, sys.executable, *map(str, command)]
    shell = ["sh", "-c", '"$@" && true', "sh", *words]  # which hands on nothing of what this process holds
    lines = subprocess.run(shell, check=True, capture_output=True, text=True).stdout.splitlines()
    return int(lines[-1]) >> (20 if sys.platform == "darwin" else 10)


pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="needs getrusage")


@pytest.mark.slow
def test_many_samples_take_no_more_memory_than_few(tmp_path):
    peaks = []
    for num_images in (256, 4096):
        folder = tmp_path / str(num_images)
        flags = ["--num_images", num_images, "--num_inference_steps", 1, "--output_dir", folder]
        peaks.append(peak_memory(EXAMPLES / "sample.py", *flags))
        assert sum(entry.name.endswith(".png") for entry in os.scandir(folder)) == num_images
    assert peaks[1] < 1.1 * peaks[0], "MiB"


@pytest.mark.slow
def test_training_takes_less_than_a_gibibyte(tmp_path):
    flags = ["--max_train_steps", 20, "--ddpm_num_inference_steps", 2, "--logger", "none", "--no-compile"]
    assert peak_memory(EXAMPLES / "train.py", *flags, "--output_dir", tmp_path / "run") < 1024
