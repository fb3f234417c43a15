"""What is installed: names, version, and dependencies that say exactly what is imported and where."""

import ast
import subprocess
import sys
import tomllib
from importlib.metadata import packages_distributions, version
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import mnist_ddpm

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "src" / "mnist_ddpm"
STANDALONE = {"torch", "numpy", "diffusers", "huggingface_hub", "safetensors"}  # diffusers, and what it is built on


def project() -> dict:
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def requirements(*extras: str) -> dict[str, Requirement]:
    """The requirements of the package itself and of some extras, by canonical name."""
    lists = [project()["dependencies"], *(project()["optional-dependencies"][extra] for extra in extras)]
    parsed = [Requirement(line) for lines in lists for line in lines]
    return {canonicalize_name(r.name): r for r in parsed if r.name != project()["name"]}


def imported(path: Path, late: bool) -> set[str]:
    """The modules outside the standard library that a file imports at its top level, or anywhere; "" if relative."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    modules = set()
    for node in ast.walk(tree) if late else tree.body:
        if isinstance(node, ast.Import):
            modules |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            modules.add("" if node.level else node.module.partition(".")[0])
    return modules - sys.stdlib_module_names


def distributions(modules: set[str]) -> set[str]:
    """The distributions that these modules come from; those of this repository come from none."""
    installed = packages_distributions()
    names = {canonicalize_name(installed[module][0]) for module in modules if module in installed}
    return names - {project()["name"]}


def test_version_is_the_one_that_is_installed():
    assert mnist_ddpm.__version__ == version("mnist-ddpm")


def test_public_names_exist_once():
    names = mnist_ddpm.__all__
    assert len(names) == len(set(names))
    assert all(hasattr(mnist_ddpm, name) for name in names)


def test_package_is_typed():
    assert (Path(mnist_ddpm.__file__).parent / "py.typed").exists()


@pytest.mark.parametrize("path", sorted(PACKAGE.glob("*.py")), ids=lambda path: path.stem)
def test_imports_are_declared(path):
    assert distributions(imported(path, late=False)) <= requirements().keys()
    assert distributions(imported(path, late=True)) <= requirements("train", "eval").keys()


@pytest.mark.parametrize("folder", ["examples", "benchmarks", "demo", "docs", "tests"])
def test_imports_outside_of_the_package_are_declared(folder):
    modules = set().union(*(imported(path, late=True) for path in (ROOT / folder).glob("*.py")))
    assert distributions(modules) <= requirements(*project()["optional-dependencies"]).keys()


@pytest.mark.parametrize("name", ["schedulers", "unet", "pipeline"])
def test_files_that_published_repositories_copy_stand_alone(name):
    assert imported(PACKAGE / f"{name}.py", late=True) <= STANDALONE


@pytest.mark.slow
def test_import_brings_none_of_the_extras():
    code = "import sys, mnist_ddpm; print(*({'datasets', 'torchmetrics', 'tensorboard'} & sys.modules.keys()))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == ""


def test_constraints_pin_every_requirement_within_its_bounds():
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = [Requirement(line) for line in lines if line and not line.startswith("#")]
    pinned = {canonicalize_name(pin.name): str(pin.specifier).removeprefix("==") for pin in pins}
    assert pinned["torch"] == "2.13.0"
    for name, requirement in requirements(*project()["optional-dependencies"]).items():
        assert requirement.specifier.contains(pinned[name]), f"{name} {pinned[name]} is not {requirement.specifier}"
    assert f"sdk_version: {pinned['gradio']}\n" in (ROOT / "demo" / "README.md").read_text(encoding="utf-8")


def test_space_installs_what_the_package_needs():
    lines = (ROOT / "demo" / "requirements.txt").read_text(encoding="utf-8").splitlines()
    assert [line for line in lines if line[0] not in "#-"] == project()["dependencies"]
