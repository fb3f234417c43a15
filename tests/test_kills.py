"""Runs of training that are killed in the midst of a write, or run out of space, and their bits at the end.

`tests/kills.py` kills many more; here it is run on a few.
"""

import re
import shlex
import subprocess
import sys

import kills
import pytest
from tiny_training import write_workplace

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="faults are injected by means of Linux")


@pytest.mark.slow
def test_a_few_kills_of_each_kind_change_nothing():
    command = [sys.executable, kills.__file__, "--count", "1"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=900)
    assert result.returncode == 0, result.stdout
    struck, skipped, failures = map(int, re.findall(r"\d+", result.stdout.splitlines()[-1]))
    assert struck >= 10
    assert (skipped, failures) == (1, 0)


@pytest.mark.slow
def test_disk_that_is_really_full(tmp_path):
    """A small file system for the output folder, which grows once training has failed on it."""
    mount = "mount -t tmpfs -o size=600k none"
    disk, whole = tmp_path / "disk", tmp_path / "whole"
    disk.mkdir()
    if subprocess.run(["unshare", "-rm", "sh", "-c", f"{mount} {disk}"], capture_output=True).returncode:
        pytest.skip("file systems can't be mounted here")
    workplace = write_workplace(tmp_path / "workplace")
    train = shlex.join([sys.executable, str(kills.TRAIN), *kills.flags_of(disk, workplace)])
    more = f"mount -o remount,size=64m {disk}"
    script = f"{mount} {disk}; {train}; echo first: $?; {more}; {train} && cp -r {disk} {whole}"
    result = subprocess.run(["unshare", "-rm", "sh", "-c", script], capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    assert "first: 1" in result.stdout
    assert "output_dir must be writable" in result.stderr
    assert "Traceback" not in result.stderr
    assert "Resuming from" in result.stderr
    alone = tmp_path / "alone" / "disk"
    subprocess.run([sys.executable, kills.TRAIN, *kills.flags_of(alone, workplace)], check=True)
    assert kills.ending(whole) == kills.ending(alone)
