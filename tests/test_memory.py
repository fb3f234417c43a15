import shlex
import subprocess
import sys
from pathlib import Path

import memory
import pytest

MIB = 2**20


def test_peak_is_that_of_the_process():
    code = f"import memory; print(memory.peak_memory(['-c', 'held = bytearray({300 * MIB}); del held']))"
    # by way of a shell, which begins with what this process holds and hands nothing of it on
    command = f"{shlex.join([sys.executable, '-c', code])} && true"
    folder = Path(memory.__file__).parent
    run = subprocess.run(command, shell=True, cwd=folder, capture_output=True, text=True, check=True)
    assert 300 < int(run.stdout) / MIB < 350


def test_a_process_that_fails_is_an_error():
    with pytest.raises(RuntimeError, match="failed with status 3"):
        memory.peak_memory(["-c", "import sys; sys.exit(3)"])


def test_a_peak_that_is_the_parents_is_an_error():
    held = bytearray(100 * MIB)
    with pytest.raises(RuntimeError, match="begins with what its parent holds"):
        memory.peak_memory(["-c", "pass"])
    del held
