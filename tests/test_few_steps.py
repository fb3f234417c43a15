"""The benchmark of few steps: evaluations are counted, a run that was stopped resumes, the table names what wins."""

import json

import few_steps
import pytest
import readme_tables
import timestep_grid
import torch

from mnist_ddpm import PRETRAINED_FEW_STEP, MNISTDDPMPipeline, MNISTDDPMScheduler, MNISTUNet2DModel
from mnist_ddpm.metrics import ClassifierFeatures, class_scores, extract_features
from mnist_ddpm.sampling import sample_tensor


class StandIn:
    """Scores without a classifier: the calls are what is tested."""

    batch_size, calls = 2, 0
    floor = {"fid": 0.5, "confident_share": 1.0}  # noqa: RUF012

    def __init__(self, num_images, seed, device):
        self.num_images, self.seed = num_images, seed

    def __call__(self, pipe, bf16, **options):
        images = sample_tensor(pipe, self.num_images, self.seed, self.batch_size, **options)
        type(self).calls += 1
        return {"fid": images.float().std().item(), "confident_share": 0.0, "samples_per_second": 1.0}


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Run the benchmark on a tiny pipeline; returns the result, and how many cells were computed."""
    torch.manual_seed(0)
    unet = MNISTUNet2DModel(sample_size=8, block_out_channels=(4, 8))
    scheduler = MNISTDDPMScheduler(beta_schedule="cosine", prediction_type="v_prediction", timestep_spacing="trailing")
    MNISTDDPMPipeline(unet=unet, scheduler=scheduler).save_pretrained(tmp_path / "model")
    monkeypatch.setattr(few_steps, "Quality", StandIn)

    def run(*flags):
        StandIn.calls = 0
        flags = (*flags, "--model", tmp_path / "model", "--num_images", 3)
        outputs = ("--output", tmp_path / "few_steps.json", "--picture", tmp_path / "few_steps.png")
        result = few_steps.main(few_steps.parse_args([str(word) for word in (*flags, *outputs)]))
        assert json.loads((tmp_path / "few_steps.json").read_text(encoding="utf-8")) == result
        return result, StandIn.calls

    return run


def test_evaluations_are_those_of_the_network(run):
    result, _ = run("--evaluations", 5, 8)
    assert result["few_steps"].keys() == few_steps.ROWS.keys()
    for name, cells in result["few_steps"].items():
        for budget, cell in cells.items():
            assert cell["evaluations"] <= int(budget)
            assert cell["evaluations"] >= int(budget) - (name.startswith("Heun"))
    heun = result["few_steps"]["Heun, Karras sigmas"]
    assert [cell["num_inference_steps"] for cell in heun.values()] == [3, 4]
    later = result["few_steps"]["Heun, from t = 979"]
    assert [cell["timesteps"][0] for cell in later.values()] == [979, 979]
    assert [len(cell["timesteps"]) for cell in later.values()] == [3, 4]


def test_a_run_resumes_and_takes_in_a_student(run, tmp_path):
    first, computed = run("--evaluations", 3)
    assert computed == len(few_steps.ROWS)
    again, computed = run("--evaluations", 3)
    assert computed == 0
    assert again["few_steps"] == first["few_steps"]
    with_student, computed = run("--evaluations", 3, "--student", tmp_path / "model")
    assert computed == 3
    assert list(with_student["few_steps"][few_steps.STUDENT]) == ["1", "2", "4"]
    assert (tmp_path / "few_steps.png").exists()
    with pytest.raises(ValueError, match="output"):
        run("--evaluations", 3, "--seed", 1)


def test_the_table_and_the_lines_name_the_best(run, tmp_path):
    run("--evaluations", 3, 5)
    table = readme_tables.section("few_steps", tmp_path)
    assert table.count("**") == 2 * 2
    cells = json.loads((tmp_path / "few_steps.json").read_text(encoding="utf-8"))["few_steps"]
    lines = readme_tables.section("few_steps_best", tmp_path).splitlines()
    for line, n in zip(lines, ("3", "5"), strict=True):
        best = min(cells, key=lambda name: cells[name][n]["fid"])
        assert line.startswith(f"- {n}: {best} (FID ")


@pytest.mark.parametrize("steps", [1, 4])
def test_the_packaged_student_draws_digits_of_many_kinds(steps):
    files = [path for path in PRETRAINED_FEW_STEP.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 4.2e6
    assert {path.suffix for path in files} <= {".json", ".md", ".safetensors"}
    pipe = MNISTDDPMPipeline.from_pretrained(PRETRAINED_FEW_STEP)
    assert pipe.unet.dtype == torch.float32
    images = sample_tensor(pipe, 50, num_inference_steps=steps)
    classifier = ClassifierFeatures.from_pretrained()
    scores = class_scores(classifier.logits(extract_features(classifier, images)))
    assert scores["confident_share"] > 0.6  # noise is all of one class
    assert (images == 0).float().mean() > 0.7  # of real images: 0.81
    assert sum(share > 0 for share in scores["class_shares"]) >= 7


def test_the_search_for_timesteps_finds_the_best_ones():
    best = [999, 640, 300, 100]

    def error(timesteps):
        assert timesteps[0] == 999
        assert timesteps == sorted(timesteps, reverse=True)
        return sum((a - b) ** 2 for a, b in zip(timesteps, best, strict=True))

    found = timestep_grid.search(error, [999, 749, 499, 249])
    assert all(abs(a - b) <= min(timestep_grid.MOVES) for a, b in zip(found, best, strict=True))
