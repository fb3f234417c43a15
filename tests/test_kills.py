"""Runs of training that are killed in the midst of a write, or run out of space, and their bits at the end.

`tests/kills.py` kills many more; here it is run on a few.
"""

import random
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
    result = subprocess.run(
        [sys.executable, kills.__file__, "--count", "1"], capture_output=True, text=True, timeout=900
    )
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


@pytest.mark.parametrize("way", range(6))
def test_damage_is_in_one_file_of_the_newest_checkpoint(tmp_path, way):
    for step in (3, 10):
        for name in "ab":
            file = tmp_path / f"checkpoint-{step}" / name
            file.parent.mkdir(exist_ok=True)
            file.write_bytes(b"0123")
    kills.damage(tmp_path, way)
    files = list(tmp_path.glob("*/*"))
    assert [path.parent.name for path in files if path.read_bytes() != b"0123"] == ["checkpoint-10"] * (way % 3 < 2)
    assert len(files) == 4 - (way % 3 == 2)


def test_plan_strikes_each_sort_of_operation_and_spreads_what_it_is_limited_to():
    operations = [f"{verb} checkpoint-{step}/file" for step in range(9) for verb in ("create", "flush", "rename")]
    chains = kills.plan(operations, 1.0, random.Random(0), None)
    killed = [
        operations[int(fault.at) - 1].split()[0] for (fault, *rest) in chains if fault.kind == "kill" and not rest
    ]
    assert sorted(killed) == ["create", "flush", "rename"]
    assert len(kills.plan(operations, 1.0, random.Random(0), 1)) == 10
