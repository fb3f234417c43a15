"""What the README files show works: their code, their commands, their links, their figures."""

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
READMES = [
    *(ROOT / name for name in ("README.md", "examples/README.md", "data/mnist/README.md", "benchmarks/README.md")),
    ROOT / "docs" / "theory.md",
]


def blocks(readme: Path, language: str) -> list[str]:
    """The fenced code blocks of a language."""
    return re.findall(rf"^```{language}\n(.*?)^```$", readme.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)


def script_calls() -> list[tuple[str, list[str]]]:
    """Each script of `examples/` that a shell line of the README files calls, with its arguments."""
    lines = [line for readme in READMES for block in blocks(readme, "bash") for line in block.splitlines()]
    calls = []
    for line in lines:
        words = shlex.split(line.rpartition("&&")[2])
        for i, word in enumerate(words):
            if match := re.fullmatch(r"examples/(\w+)\.py", word):
                calls.append((match[1], words[i + 1 :]))
    return calls


def test_code_runs(hub, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", WRITER)
    monkeypatch.chdir(tmp_path)
    names = {}
    for code in blocks(ROOT / "README.md", "python"):
        exec(code, names)
    assert names["image"].size == (28, 28)
    assert len(names["images"]) == 2
    assert names["x_prev"].shape == names["x_0"].shape
    assert names["unet"].num_parameters() == names["pipe"].unet.num_parameters()
    assert "pipeline.py" in hub.files("user/mnist-ddpm")


@pytest.mark.parametrize(("script", "argv"), script_calls(), ids=lambda value: value if isinstance(value, str) else "")
def test_commands_have_flags_that_exist(script, argv):
    importlib.import_module(script).parse_args(argv)


def test_commands_of_the_hub_run(hub, tmp_path, monkeypatch):
    lines = [line for block in blocks(ROOT / "README.md", "bash") for line in block.splitlines()]
    (push,) = (shlex.split(line) for line in lines if "-m mnist_ddpm.hub" in line)
    (download,) = (shlex.split(line) for line in lines if "bin/hf" in line)
    monkeypatch.setenv("HF_TOKEN", WRITER)
    monkeypatch.chdir(tmp_path)
    MNISTDDPMPipeline.from_pretrained(PRETRAINED).save_pretrained("mnist-ddpm")
    shutil.copy(ROOT / "benchmarks" / "results" / "ddim_50.json", "scores.json")
    mnist_ddpm.hub.main(push[3:])
    card = hub.files("user/mnist-ddpm")["README.md"].decode()
    fid = json.loads(Path("scores.json").read_text())["scores"]["fid"]
    assert {"fid": fid}.items() <= {r.metric_type: r.metric_value for r in ModelCard(card).data.eval_results}.items()

    hub.repos["models", "user/mnist-ddpm"].commit({"last-checkpoint/manifest.json": b"{}", "README.md": b""})
    monkeypatch.setattr("sys.argv", download)
    with pytest.raises(SystemExit, match="0"):
        hf.main()
    assert [str(path) for path in Path("mnist-ddpm/last-checkpoint").rglob("*")] == [
        "mnist-ddpm/last-checkpoint/manifest.json"
    ]


@pytest.mark.parametrize("name", ["sample", "train", "test"])
def test_each_line_stands_alone(name):
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    (line,) = re.findall(rf"^<!-- line: {name} -->\n```bash\n(.*)\n```$", text, re.MULTILINE)
    assert line.startswith("python3 -m venv .venv")
    assert "-c constraints.txt" in line


def test_the_tests_have_an_environment_of_their_own():
    lines = [line for line in blocks(ROOT / "README.md", "bash") if line.startswith("python3 -m venv")]
    sample, train, test = (line.split()[3] for line in lines)
    assert sample == train != test


@pytest.mark.parametrize("readme", READMES, ids=lambda path: path.parent.name)
def test_links_lead_somewhere(readme):
    targets = re.findall(r"\]\(([^)#]+)", readme.read_text(encoding="utf-8"))
    missing = [t for t in targets if not t.startswith("https://") and not (readme.parent / t).exists()]
    assert missing == []


@pytest.mark.parametrize("path", readme_tables.DOCUMENTS, ids=lambda path: path.parent.name)
def test_figures_are_those_of_the_results(path):
    text = path.read_text(encoding="utf-8")
    assert readme_tables.updated(text, ROOT / "benchmarks" / "results") == text


def test_each_result_has_its_place_in_one_document():
    texts = [path.read_text(encoding="utf-8") for path in readme_tables.DOCUMENTS]
    places = [match["name"] for text in texts for match in readme_tables.SECTION.finditer(text)]
    assert sorted(places) == sorted(readme_tables.SECTIONS)
    kinds = [kind for kinds in readme_tables.SECTIONS.values() for kind in kinds]
    assert sorted(kinds) == sorted(readme_tables.KINDS)
    for path in (ROOT / "benchmarks" / "results").glob("*.json"):
        assert len(json.loads(path.read_text()).keys() & set(kinds)) == 1, path


def test_tables_show_each_kind_of_result(tmp_path):
    origin = {"command": "python x.py", "machine": "a machine", "versions": {"torch": "2.13.0", "diffusers": "0.42.1"}}
    score = {"fid": 12.345, "kid": 0.5, "precision": 0.25, "recall": 0.75, "confident_share": 0.875}
    timing = {"scheduler": "DDPM", "shape": [1, 1, 28, 28], "device": "cpu"}
    files = {
        "ddim": origin
        | {
            "scores": score | {"class_shares": [0.05, 0.15, *[0.1] * 8]},
            "floor": score | {"fid": 1.5},
            "num_images": {"samples": 1000},
        },
        "every_scheduler": origin
        | {
            "schedulers": {"lms": {"class": "LMSDiscreteScheduler", "confident_share": 0.5, "confidence": 0.625}},
            "num_images": 200,
            "num_inference_steps": 50,
        },
        "classifier": origin | {"test_accuracy": 0.99, "num_test_images": 10_000},
        "training": {
            "training": {
                "command": "train",
                "machine": "a machine",
                "steps": 1000,
                "seconds": 120,
                "images_per_second": 512,
                "loss_window": 500,
                "loss": [0.5, 0.25],
            },
            "versions": origin["versions"],
        },
        "scheduler_step": {
            "rows": [timing | {"work": "step", "ratio": 0.25}, timing | {"work": "loop", "ratio": 0.5}],
            "machine": {"cpu": "a CPU", "threads": 2, "gpu": None},
        },
        "memory": origin
        | {
            "sampling_memory": [{"num_images": 100_000, "peak_bytes": 512 * 2**20}],
            "training_memory": {"steps": 20, "peak_bytes": 1536 * 2**20},
            "batch_size": {"sampling": 64},
        },
        "versions": {
            "tested_versions": {
                name: {"installed": {"python": python}, "passed": passed, "skipped": 2, "failed": 0}
                | {"command": f"python y.py {name}", "machine": "Linux"}
                for name, python, passed in (("newest", "3.13.0", 1001), ("oldest", "3.11.7", 999))
            }
        },
        "properties": origin | {"cases": 1234, "accepted_share": 0.75, "failures": []},
        "noise": origin
        | {
            "noise_table": {"DDIM, eta 1": {"10": {"fid": 12.5}, "1000": {"fid": 1.25}}},
            "settings": {"num_images": 500},
            "floor": {"fid": 0.5},
        },
        "schedules": origin
        | {
            "runs": {
                f"{name}-0": {"bits_per_dim": {"total": bits, "L_0": 0.5}, "fid": {"5": {"fid": 20.0}}}
                for name, bits in (("linear", 2.0), ("cosine", 1.5))
            }
        },
        "likelihood": origin
        | {
            "likelihood": {"all of them": {"total": 1.25, "standard_error": 0.125, "L_0": 0.5, "L_T": 0.25}},
            "settings": {"max_train_steps": 1000},
        },
        "bits": origin
        | {
            "bits_per_dim": {"total": 1.0, "standard_error": 0.25, "L_T": 0.0, "sum of L_{t-1}": 0.5, "L_0": 0.5}
            | {"num_images": 10_000, "variance_type": "fixed_small"},
            "command": "python x.py --model digits",
        },
        "recipes": origin
        | {
            "recipes": {
                name: {"training_images_per_second": 500.0, "fid": fid, "confident_share": 0.75}
                for name, fid in (("none", 20.0), ("another seed", 22.0), ("linear betas", 40.0), ("no average", 10.0))
            },
            "settings": {"minutes": 3.0, "num_images": 1000, "num_inference_steps": 20},
            "threads": 2,
            "floor": {"fid": 0.5},
        },
        "race": origin
        | {
            "contenders": {
                name: {"parameters": 2e6, "batch_size": 10}
                | {"curve": [{"minutes": m + 0.01, "steps": 6 * speed * m, "fid": 500.0 / m} for m in scored_at]}
                for name, speed, scored_at in (("ours", 400, [10]), ("stock", 40, [10, 60]), ("tuned", 50, [10]))
            },
            "sampling": {
                name: [
                    {"num_inference_steps": steps, "samples_per_second": speed / steps, "fid": 100 / steps}
                    for steps in (10, 50, 1000)
                ]
                for name, speed in (("ours", 1000.0), ("stock", 50.0))
            },
            "threads": 2,
            "num_images": 1000,
            "num_inference_steps": 50,
            "floor": {"fid": 0.5},
        },
    }
    for name, result in files.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(result))
    text = "".join(readme_tables.section(name, tmp_path) for name in readme_tables.SECTIONS)
    assert "| ddim | 1,000 | 12.35 / 1.50 | 0.5000 / 0.5000 |" in text
    assert "5.0% to 15.0%" in text
    assert "| `LMSDiscreteScheduler` | 50.0% | 0.625 |" in text
    assert "99.00% of the 10,000 test images" in text
    assert "1,000 steps in 2 minutes, 512 images per second; mean loss of the last 500 steps 0.2500" in text
    assert text.count("`python x.py` (a machine; torch 2.13.0, diffusers 0.42.1)") == 10
    assert "1,234, of which 75% were accepted" in text
    assert "| training, 20 steps | 1,536 |" in text
    assert "| sampling 100,000 images to files | 512 |" in text
    assert "|  | oldest | newest |" in text
    assert "| python | 3.11.7 | 3.13.0 |" in text
    assert "| tests passed | 999 | 1001 |" in text
    assert "- `python y.py oldest` (Linux)" in text
    assert "| DDPM, 1 x 1 x 28 x 28, cpu | 0.25 | 0.50 |" in text
    assert "(a CPU, threads: 2)" in text
    assert "|  | 10 steps | 1000 steps |" in text
    assert "| DDIM, eta 1 | 12.50 | 1.25 |" in text
    assert "| linear, seed 0 | 2.000 | 0.500 | 20.00 |\n| cosine, seed 0 | 1.500 | 0.500 | 20.00 |" in text
    assert "| all of them | 1.250 +- 0.125 | 0.500 | 0.250 |" in text
    assert "| `digits`, fixed_small | 10,000 | 1.000 | 0.250 | 0.000 | 0.500 | 0.500 |" in text
    assert (
        "| another seed | 500 | 22.00 | 75% | as good |\n| linear betas | 500 | 40.00 | 75% | worse |\n"
        "| no average | 500 | 10.00 | 75% | better |" in text
    )
    assert "| `ours` | 2.0 M | 400 | 10.0 | 50.0 |  |\n| `stock` | 2.0 M | 40 | 1.0 | 50.0 | 8.3 |" in text
    assert "| `ours` | 10 | 100.0 | 10.00 |" in text
    assert "| training images per second, times `tuned` | at least 3 | 8.0 |" in text
    assert "| FID after 10 minutes | below 8.3, `stock` after 60 | 50.0 |" in text
    assert "| samples per second in 50 steps, times `stock` | at least 10 | 20.0 |" in text
    assert "| FID in 10 steps, times that in 1000 | at most 2 | 100.00 |" in text
