"""Kill training runs in the midst of writes, flushes and renames and at random; resume them; compare how they end.

`python tests/kills.py` does so at every kind of moment, which takes half an hour; `--count 1` at a few. Each run of
`examples/train.py` is a process of its own, forked from this one, which has imported what takes long.
"""

import argparse
import os
import random
import re
import runpy
import shutil
import signal
import sys
import tempfile
import threading
import time
import traceback
from pathlib import Path
from typing import NamedTuple

from faults import Injector, watch
from tiny_training import command_line, write_workplace

from mnist_ddpm.training.checkpoints import list_checkpoints

ROOT = Path(__file__).resolve().parent.parent
TRAIN = ROOT / "examples" / "train.py"
STEPS = 12
FLAGS = (  # an epoch is 4 steps; to resume from the first run on, as a supervisor would have it
    f"--max_train_steps {STEPS} --train_batch_size 6 --checkpointing_steps 2 --checkpoints_total_limit 2 "
    "--save_model_epochs 1 --save_images_steps 1 --eval_batch_size 4 --ddpm_num_inference_steps 4 "
    "--resume_from_checkpoint latest"
)
RANDOM = {"random kill": signal.SIGKILL, "random term": signal.SIGTERM, "random int": signal.SIGINT}


class Fault(NamedTuple):
    """What happens to a process, and when: at an operation (counted from 1), or after some seconds.

    Of the kind `"damage"`, to the newest checkpoint, between two processes.
    """

    kind: str
    at: float


class Outcome(NamedTuple):
    """How a process ended: exit code, and what it printed."""

    code: int
    output: str


def flags_of(output_dir: Path, workplace: Path) -> list[str]:
    """The flags of all runs, which differ in the folder only."""
    return command_line(workplace, FLAGS, output_dir=output_dir)


def train(output_dir: Path, workplace: Path, fault: Fault | None = None) -> Outcome:
    """Run `examples/train.py` in a process of its own until it ends, one way or another."""
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(read)
        os.dup2(write, 1)
        os.dup2(write, 2)
        os._exit(_run_script(flags_of(output_dir, workplace), output_dir, fault))
    os.close(write)
    timer = threading.Timer(fault.at, os.kill, (pid, RANDOM[fault.kind])) if fault and fault.kind in RANDOM else None
    if timer:
        timer.start()
    with open(read, errors="replace") as pipe:
        output = pipe.read()
    if timer:
        timer.cancel()
        timer.join()
    return Outcome(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), output)


def _run_script(argv: list[str], output_dir: Path, fault: Fault | None) -> int:
    """Within the forked process: run the script as `python examples/train.py` does; returns the exit code."""
    injected = fault is not None and fault.kind not in RANDOM
    watch(output_dir, Injector(fault.kind if injected else None, int(fault.at) if injected else None, output_dir))
    sys.argv = [str(TRAIN), *argv]
    try:
        runpy.run_path(str(TRAIN), run_name="__main__")
    except SystemExit as error:
        print(error, file=sys.stderr, flush=True)
        return int(error.code not in (None, 0))
    except BaseException:
        traceback.print_exc()
        return 1
    finally:
        sys.stdout.flush()
    return 0


def ending(run: Path) -> dict[str, bytes]:
    """What must be the same however a run came to its end: all files, but for those of checkpoints before the last."""
    return {
        name: path.read_bytes()
        for path in sorted(run.rglob("*"))
        if path.is_file()
        and not ((name := str(path.relative_to(run))).startswith("checkpoint-") and f"-{STEPS}/" not in name)
    }


def plan(operations: list[str], seconds: float, rng: random.Random, count: int | None) -> list[list[Fault]]:
    """Chains of faults, each for a run that is resumed after each of them; `count` of each kind at most.

    The operations and the seconds are those of a run that is left alone.
    """
    numbers: dict[str, list[int]] = {}
    for number, operation in enumerate(operations, start=1):
        numbers.setdefault(re.sub(r"\d+", "N", operation), []).append(number)
    each = {label: rng.choice(some) for label, some in numbers.items()}  # one of each sort
    writes = [number for label, number in each.items() if label.startswith(("create", "write"))]
    anywhere = sorted(rng.sample(range(1, len(operations)), 12))
    moments = {"kill": each.values(), "tear": writes, "full": writes}
    moments |= dict.fromkeys(("tear log", "term", "int", "term twice"), anywhere)
    chains = [[[Fault(kind, n)] for n in some] for kind, some in moments.items()]
    # while a run that was killed cleans up, and at the begin of what it writes
    chains.append([[Fault("kill", rng.choice(anywhere)), Fault("kill", n)] for n in range(1, 21)])
    chains.append([[Fault("kill", n), Fault("damage", i)] for i, n in enumerate(anywhere[-6:])])
    chains.append([[Fault(kind, rng.uniform(0, seconds)) for _ in range(3)] for kind in RANDOM for _ in range(6)])
    return [chain for of_kind in chains for chain in of_kind[:: -(-len(of_kind) // (count or len(of_kind)))]]


def damage(run: Path, way: int) -> None:
    """Cut a file of the newest checkpoint short, change it, or remove it."""
    files = sorted(list_checkpoints(run)[-1].iterdir())
    file = files[way % len(files)]
    content = file.read_bytes()
    match way % 3:
        case 0:
            file.write_bytes(content[: len(content) // 2])
        case 1:
            file.write_bytes(bytes([content[0] ^ 1]) + content[1:])
        case 2:
            file.unlink()


def check_outcome(fault: Fault, outcome: Outcome) -> list[str]:
    """What is wrong with how a process ended on a fault."""
    killed, torn = {-signal.SIGKILL}, {-signal.SIGXFSZ}
    allowed = {"kill": killed, "random kill": killed, "tear": torn, "tear log": torn, "full": {1}}
    # told to stop, it leaves with 0; or at once, before it trains
    problems = [] if outcome.code in allowed.get(fault.kind, {-signal.SIGTERM, 1}) | {0} else [f"code {outcome.code}"]
    if fault.kind == "full" and outcome.code:
        named = re.search(r"^error: output_dir must be writable", outcome.output, re.MULTILINE)
        problems += [] if named and "Traceback" not in outcome.output else ["no one-line error that names output_dir"]
    return problems


def main(count: int | None, seed: int = 0) -> bool:
    """Kill, resume, compare; returns whether all runs ended as one that was left alone."""
    import torch

    import mnist_ddpm.training  # noqa: F401

    torch.set_num_threads(1)
    struck, skipped, failures = 0, 0, 0
    with tempfile.TemporaryDirectory() as temporary:
        scratch = Path(temporary)
        workplace = write_workplace(scratch / "workplace", dropout=0.1)
        train(scratch / "first" / "run", workplace)  # fills the cache of the data set
        start = time.monotonic()
        whole = train(scratch / "whole" / "run", workplace)
        seconds = time.monotonic() - start
        assert whole.code == 0, whole.output
        expected = ending(scratch / "whole" / "run")
        operations = re.findall(r"^operation \d+: (.*)$", whole.output, re.MULTILINE)
        for number, faults in enumerate(plan(operations, seconds, random.Random(seed), count)):
            run = scratch / str(number) / "run"
            outcomes, problems = [], []
            for fault in faults:
                if fault.kind == "damage":
                    damage(run, int(fault.at))
                    continue
                outcomes.append(outcome := train(run, workplace, fault))
                problems += check_outcome(fault, outcome)
                struck += "Stopped early" in outcome.output or outcome.code != 0
            outcomes.append(train(run, workplace))
            ended = ending(run)
            problems += [name for name in expected | ended if expected.get(name) != ended.get(name)]
            skipped += sum(outcome.output.count("Skipping") for outcome in outcomes)
            failed = bool(problems or outcomes[-1].code)
            failures += failed
            print("; ".join(f"{kind} at {at:g}" for kind, at in faults), problems or "", flush=True)
            if failed:
                print(*(re.sub(r"\noperation .*\n", "", outcome.output)[-1000:] for outcome in outcomes), sep="\n")
            shutil.rmtree(run)
    print(f"{struck} kills, {skipped} damaged checkpoints skipped, {failures} failures")
    return not failures


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, help="runs of each kind at most; without it, all of them")
    sys.exit(not main(parser.parse_args().count))
