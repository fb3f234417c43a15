"""Run the tests on the oldest or on the newest versions that pyproject.toml admits, in an environment made for that.

The oldest are the lower bounds; the newest are what pip finds without any constraint. Dependencies without a bound are
the newest in both, tools that only the tests need among them.
"""

import argparse
import json
import platform
import shlex
import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parent.parent


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    argv = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("versions", choices=["oldest", "newest"])
    parser.add_argument("--python", default=sys.executable, help="the interpreter to make the environment with")
    parser.add_argument("--pin", nargs="*", default=[], help="what to take all the same, such as torch==2.13.0")
    parser.add_argument(
        "--folder", type=Path, help="make the environment here, or use the one that is here, and keep it"
    )
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results" / "versions.json")
    args = parser.parse_args(argv)
    flags = [args.versions, *(["--pin", *args.pin] if args.pin else [])]
    args.command = shlex.join(["python", "benchmarks/versions.py", *flags])
    return args


def bounded() -> list[Requirement]:
    """The requirements in pyproject.toml that have a lower bound, those of the extras included."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    lines = [
        *project["dependencies"],
        *(line for extra in project["optional-dependencies"].values() for line in extra),
    ]
    requirements = {requirement.name: requirement for requirement in map(Requirement, lines)}
    return [requirement for requirement in requirements.values() if ">=" in str(requirement.specifier)]


def constraints(versions: str) -> list[str]:
    """What pip is told: each lower bound as the version to take, or nothing."""
    return [str(requirement).replace(">=", "==") for requirement in bounded()] if versions == "oldest" else []


def set_up(python: str, folder: Path, constraints: list[str]) -> Path:
    """Make an environment, or complete the one that is there; returns its interpreter."""
    subprocess.run([python, "-m", "venv", folder], check=True)
    inside = folder / "bin" / "python"
    file = folder / "constraints.txt"
    file.write_text("".join(f"{line}\n" for line in constraints))
    subprocess.run([inside, "-m", "pip", "install", "--quiet", "-c", file, "-e", f"{ROOT}[test]"], check=True)
    return inside


def run_tests(inside: Path, report: Path) -> None:
    """Run all tests, those that are marked slow included; failures are for the report."""
    finished = subprocess.run([inside, "-m", "pytest", "-q", f"--junitxml={report}"], cwd=ROOT)
    if finished.returncode not in (0, 1):  # 1: some tests failed
        raise RuntimeError(f"pytest could not run the tests: its exit status is {finished.returncode}")


def counts(report: Path) -> dict[str, int]:
    """How many tests passed, were skipped, or failed, by pytest's report."""
    (suite,) = ElementTree.parse(report).getroot().iter("testsuite")
    tests, skipped, failures, errors = (int(suite.attrib[name]) for name in ("tests", "skipped", "failures", "errors"))
    failed = failures + errors
    return {"passed": tests - skipped - failed, "skipped": skipped, "failed": failed}


def installed(inside: Path) -> dict[str, str]:
    """The versions in an environment: Python's, and those of the requirements that have a bound and are there."""
    listed = subprocess.run([inside, "-m", "pip", "list", "--format=json"], check=True, capture_output=True, text=True)
    found = {package["name"].replace("-", "_"): package["version"] for package in json.loads(listed.stdout)}
    python = subprocess.run([inside, "--version"], check=True, capture_output=True, text=True).stdout.split()[1]
    names = [requirement.name for requirement in bounded()]
    return {"python": python} | {name: found[key] for name in names if (key := name.replace("-", "_")) in found}


def record(args: argparse.Namespace, inside: Path, report: Path) -> dict[str, Any]:
    """Write the figures of this run beside those of the other."""
    row = {
        "installed": installed(inside),
        **counts(report),
        "command": args.command,
        "machine": f"{platform.system()} {platform.machine()}",
    }
    runs = json.loads(args.output.read_text())["tested_versions"] if args.output.exists() else {}
    runs[args.versions] = row
    args.output.write_text(json.dumps({"tested_versions": runs}, indent=2) + "\n")
    return row


def main(args: argparse.Namespace) -> dict[str, Any]:
    """Make the environment, run the tests, and write what came of it."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.folder or Path(temporary) / "venv"
        inside = set_up(args.python, folder, [*constraints(args.versions), *args.pin])
        report = Path(temporary) / "report.xml"
        run_tests(inside, report)
        return record(args, inside, report)


if __name__ == "__main__":
    try:
        row = main(parse_args())
    except (OSError, RuntimeError, subprocess.CalledProcessError) as error:
        sys.exit(f"error: {error}")
    print(json.dumps(row, indent=2))
    sys.exit(1 if row["failed"] else 0)
