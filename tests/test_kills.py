"""Runs of training that are killed in the midst of a write, or run out of space, and their bits at the end.

`tests/kills.py` kills many more; here it is run on a few.
"""

import re
import subprocess
import sys

import kills
import pytest

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="faults are injected by means of Linux")


@pytest.mark.slow
def test_a_few_kills_of_each_kind_change_nothing():
    command = [sys.executable, kills.__file__, "--count", "1"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=900)
    assert result.returncode == 0, result.stdout
    struck, skipped, failures = map(int, re.findall(r"\d+", result.stdout.splitlines()[-1]))
    assert struck >= 10
    assert (skipped, failures) == (1, 0)
