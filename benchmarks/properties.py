"""Search for bad input at length: the property tests of `tests/`, with many times the cases that the test suite tries.

`python benchmarks/properties.py` writes to `benchmarks/results/properties.json`, for each test, the cases, how many
were accepted and checked against an oracle, what the errors of the others named, and failures (there should be none).
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

from mnist_ddpm.cli import provenance

ROOT = Path(__file__).resolve().parent.parent
TESTS = ["schedulers", "unet"]


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    argv = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--factor", type=int, default=10, help="how many times the cases of the test suite")
    parser.add_argument("--seed", type=int, default=0, help="of the search")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results" / "properties.json")
    args = parser.parse_args(argv)
    args.command = ["python", "benchmarks/properties.py", *argv]
    return args


def main(args: argparse.Namespace) -> dict[str, Any]:
    """Run the tests, sum up what they counted, print it, and write it down."""
    files = [f"tests/test_properties_{name}.py" for name in TESTS] + ["tests/test_mutated_files.py"]
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        counts = Path(folder, "counts.jsonl")
        environment = os.environ | {"PROPERTY_FACTOR": str(args.factor), "PROPERTY_REPORT": str(counts)}
        command = [sys.executable, "-m", "pytest", "-q", f"--hypothesis-seed={args.seed}", *files]
        status = subprocess.run(command, cwd=ROOT, env=environment).returncode
        rows = [json.loads(line) for line in counts.read_text().splitlines()]
    # of a mutated file hardly anything is accepted, as it should be
    searched = [row for row in rows if "mutated" not in row["test"]]
    result = {
        "cases": sum(row["cases"] for row in rows),
        "accepted_share": sum(row["accepted"] for row in searched) / sum(row["cases"] for row in searched),
        "refused": dict(sum((Counter(row["refused"]) for row in rows), Counter()).most_common()),
        "failures": [f"{row['test']}: {row['failure']}" for row in rows if row["failure"]],
        "passed": status == 0,
        "seconds": round(time.perf_counter() - start),
        "factor": args.factor,
        "tests": rows,
        **provenance(args),
    }
    print(f"{result['cases']} cases, {result['accepted_share']:.0%} of those on arguments accepted and checked")
    args.output.write_text(json.dumps(result, indent=1) + "\n")
    return result


if __name__ == "__main__":
    sys.exit(not main(parse_args())["passed"])
