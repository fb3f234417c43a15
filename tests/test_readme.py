"""The documents work: their code, their commands, their links, the places of the equations, their tables."""

import importlib
import json
import re
import shlex
import shutil
from pathlib import Path

import pytest
import readme_tables
from huggingface_hub import ModelCard
from huggingface_hub.cli import hf
from loopback_hub import WRITER

import mnist_ddpm.hub
from mnist_ddpm import PRETRAINED, MNISTDDPMPipeline

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "README.md"
DOCUMENTS = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")),
    *(ROOT / folder / "README.md" for folder in ("examples", "benchmarks", "demo", "data/mnist")),
    *sorted((ROOT / "docs").glob("*.md")),
]
MINIMAL = (ROOT / "examples" / "minimal.py").read_text(encoding="utf-8")


def name_of(value: object) -> str:
    """A short id of a test case."""
    return str(value.relative_to(ROOT)) if isinstance(value, Path) else str(value) if isinstance(value, str) else ""


def blocks(document: Path, language: str) -> list[str]:
    """The fenced code blocks of a language."""
    return re.findall(rf"^```{language}\n(.*?)^```$", document.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)


def shell_lines(document: Path) -> list[str]:
    return [line for block in blocks(document, "bash") for line in block.splitlines()]


def script_calls() -> list[tuple[str, list[str]]]:
    """Each script of `examples/` with flags that a shell line of the documents calls, and its arguments."""
    calls = []
    for line in (line for document in DOCUMENTS for line in shell_lines(document)):
        words = shlex.split(line.rpartition("&&")[2])
        for i, word in enumerate(words):
            if (match := re.fullmatch(r"examples/(\w+)\.py", word)) and match[1] != "minimal":
                calls.append((match[1], words[i + 1 :]))
    return calls


@pytest.mark.parametrize(
    "document", [README, *(ROOT / "docs" / f"{name}.md" for name in ("sampling", "few_steps", "hub"))], ids=name_of
)
def test_code_runs(document, hub, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", WRITER)
    monkeypatch.chdir(tmp_path)
    names = {}
    for code in blocks(document, "python"):
        if code not in MINIMAL:  # which test_minimal.py runs
            exec(code, names)
    if document == README:
        assert names["image"].size == (28, 28)
        assert len(names["images"]) == 2
        assert "pipeline.py" in hub.files("user/mnist-ddpm")


@pytest.mark.parametrize(("script", "argv"), script_calls(), ids=name_of)
def test_commands_have_flags_that_exist(script, argv):
    importlib.import_module(script).parse_args(argv)


def test_commands_of_the_hub_run(hub, tmp_path, monkeypatch):
    lines = shell_lines(ROOT / "docs" / "hub.md")
    (push,) = (shlex.split(line) for line in lines if "-m mnist_ddpm.hub" in line)
    (download,) = (shlex.split(line) for line in lines if line.startswith("hf "))
    monkeypatch.setenv("HF_TOKEN", WRITER)
    monkeypatch.chdir(tmp_path)
    MNISTDDPMPipeline.from_pretrained(PRETRAINED).save_pretrained("mnist-ddpm")
    shutil.copy(ROOT / "benchmarks" / "results" / "ddpm_50.json", "scores.json")
    mnist_ddpm.hub.main(push[3:])
    card = ModelCard(hub.files("user/mnist-ddpm")["README.md"].decode())
    fid = json.loads(Path("scores.json").read_text(encoding="utf-8"))["scores"]["fid"]
    assert {result.metric_type: result.metric_value for result in card.data.eval_results}["fid"] == fid

    hub.repos["models", "user/mnist-ddpm"].commit({"last-checkpoint/manifest.json": b"{}", "README.md": b""})
    monkeypatch.setattr("sys.argv", download)
    with pytest.raises(SystemExit, match="0"):
        hf.main()
    assert [path.name for path in Path("mnist-ddpm/last-checkpoint").iterdir()] == ["manifest.json"]


@pytest.mark.parametrize("name", ["sample", "train", "test"])
def test_each_pasted_line_stands_alone(name):
    text = README.read_text(encoding="utf-8")
    (line,) = re.findall(rf"^<!-- line: {name} -->\n```bash\n(.*)\n```$", text, re.MULTILINE)
    environment = line.split()[3]
    assert line.startswith(f"python3 -m venv {environment} && {environment}/bin/pip install -q -c constraints.txt -e ")
    assert environment == (".venv-test" if name == "test" else ".venv")


@pytest.mark.parametrize("document", DOCUMENTS, ids=name_of)
def test_links_lead_somewhere(document):
    targets = re.findall(r"\]\(([^)#]+)", document.read_text(encoding="utf-8"))
    missing = [t for t in targets if not t.startswith("https://") and not (document.parent / t).exists()]
    assert missing == []


def test_equations_are_where_the_readme_says():
    rows = re.findall(r"^\|[^|]+\| (.+) in \[\w+\.py\]\((\S+)\) \|$", README.read_text(encoding="utf-8"), re.MULTILINE)
    assert len(rows) == 8
    for names, file in rows:
        code = (ROOT / file).read_text(encoding="utf-8")
        for name in re.findall(r"`(\w+)`", names):
            assert re.search(rf"^ *(def|class) {name}\b", code, re.MULTILINE), name


@pytest.mark.parametrize("document", readme_tables.DOCUMENTS, ids=name_of)
def test_tables_are_made_from_the_results(document):
    text = document.read_text(encoding="utf-8")
    assert readme_tables.updated(text) == text


def test_each_section_has_its_place_and_each_result_its_section():
    texts = [document.read_text(encoding="utf-8") for document in readme_tables.DOCUMENTS]
    places = [match["name"] for text in texts for match in readme_tables.SECTION.finditer(text)]
    assert sorted(places) == sorted(readme_tables.SECTIONS)
    keys = {key for key, _ in readme_tables.SECTIONS.values()}
    for path in readme_tables.RESULTS.glob("*.json"):
        assert len(json.loads(path.read_text(encoding="utf-8")).keys() & keys) == 1, path
