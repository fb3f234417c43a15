"""Run the tests on the oldest or on the newest versions that pyproject.toml admits, in an environment made for that.

`python .ci/versions.py oldest --python python3.11` takes the lower bounds, `newest` whatever pip finds without any
constraint. Dependencies without a bound are the newest in both.
"""

import argparse
import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def lower_bounds() -> list[str]:
    """Each requirement in pyproject.toml that has a lower bound, those of the extras included, pinned to it."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    lines = sum(project["optional-dependencies"].values(), project["dependencies"])
    return sorted({line.replace(">=", "==") for line in lines if ">=" in line})


def main() -> int:
    """Make the environment, run all tests, those marked slow too; returns the exit status of pytest."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("versions", choices=["oldest", "newest"])
    parser.add_argument("--python", default=sys.executable, help="the interpreter to make the environment with")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run([args.python, "-m", "venv", folder], check=True)
        inside, constraints = Path(folder, "bin", "python"), Path(folder, "constraints.txt")
        constraints.write_text("\n".join(lower_bounds() if args.versions == "oldest" else []), encoding="utf-8")
        subprocess.run([inside, "-m", "pip", "install", "-q", "-c", constraints, "-e", f"{ROOT}[test]"], check=True)
        subprocess.run([inside, "-m", "pip", "list"], check=True)
        return subprocess.run([inside, "-m", "pytest", "-q"], cwd=ROOT).returncode


if __name__ == "__main__":
    sys.exit(main())
