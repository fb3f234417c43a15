import json
import sys
from pathlib import Path

import pytest
import torch
import versions
from packaging.version import Version

OUTCOMES = """
import pytest

@pytest.fixture
def broken():
    raise ValueError

def test_passes(): pass
def test_passes_too(): pass
def test_fails(): assert False
def test_errs(broken): pass
@pytest.mark.skip
def test_is_skipped(): pass
"""


def test_the_oldest_versions_are_the_lower_bounds():
    pins = dict(pin.split("==") for pin in versions.constraints("oldest"))
    assert {"torch", "diffusers", "accelerate", "datasets", "transformers", "huggingface_hub"} <= pins.keys()
    for requirement in versions.bounded():
        assert requirement.specifier.contains(pins[requirement.name])
        assert not requirement.specifier.contains(f"{pins[requirement.name]}.dev0", prereleases=True)


def test_the_newest_versions_are_not_constrained():
    assert versions.constraints("newest") == []


def test_what_is_installed_and_how_the_tests_ended_is_kept_for_each_set(tmp_path, monkeypatch):
    (tmp_path / "test_outcomes.py").write_text(OUTCOMES)
    report, output, inside = tmp_path / "report.xml", tmp_path / "versions.json", Path(sys.executable)
    monkeypatch.setattr(versions, "ROOT", tmp_path)
    versions.run_tests(inside, report)
    monkeypatch.undo()
    for name in ("newest", "oldest", "newest"):
        versions.record(versions.parse_args([name, "--output", str(output), "--pin", "torch==2.13.0"]), inside, report)
    runs = json.loads(output.read_text())["tested_versions"]
    assert runs.keys() == {"newest", "oldest"}
    run = runs["newest"]
    assert {name: run[name] for name in ("passed", "skipped", "failed")} == {"passed": 2, "skipped": 1, "failed": 2}
    assert run["command"] == "python benchmarks/versions.py newest --pin torch==2.13.0"
    assert run["installed"]["python"] == ".".join(map(str, sys.version_info[:3]))
    assert Version(run["installed"]["torch"]) == Version(torch.__version__)


def test_tests_that_can_not_run_are_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr(versions, "ROOT", tmp_path)  # where there are none
    with pytest.raises(RuntimeError, match="its exit status is 5"):
        versions.run_tests(Path(sys.executable), tmp_path / "report.xml")
