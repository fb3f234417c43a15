"""The program that scores samples: what it reads, refuses, and writes."""

import json
import runpy
import sys
from pathlib import Path

import evaluate
import numpy as np
import pytest
import torch

from mnist_ddpm import MNISTDDIMScheduler, MNISTDDPMPipeline, MNISTUNet2DModel
from mnist_ddpm.data import decode_images, load_split

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def dataset(tmp_path_factory) -> str:
    """A data set of 200 training and 60 test images."""
    folder = tmp_path_factory.mktemp("dataset")
    for split, size in {"train": 200, "test": 60}.items():
        rows = load_split(str(ROOT / "data" / "mnist"), split=f"{split}[:{size}]")
        rows.to_parquet(str(folder / f"{split}-00000-of-00001.parquet"))
    return str(folder)


@pytest.fixture
def images() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (12, 28, 28), dtype=np.uint8)


def save(folder: Path, samples: np.ndarray) -> str:
    np.save(folder / "samples.npy", samples)
    return str(folder / "samples.npy")


def run(*argv: str) -> dict:
    return evaluate.main(evaluate.parse_args(list(argv)))


def test_samples_are_read_in_each_layout_as_bytes_or_as_fractions(tmp_path, images):
    expected = torch.from_numpy(images)[:, None]
    layouts = [images, images[:, None], images[..., None]]
    for samples in [*layouts, *(x / np.float32(255) for x in layouts), images / 255]:
        assert torch.equal(evaluate.load_samples(save(tmp_path, samples)), expected)
    assert torch.equal(evaluate.load_samples(save(tmp_path, images), num_images=5), expected[:5])


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda x: x.astype(np.int64), "expected uint8 or floats in .*, got int64"),
        (lambda x: x / 127.5 - 1, r"floats must be in \[0, 1\], got -1.0 to 1.0.*x / 2 \+ 0.5"),
        (lambda x: np.where(x > 0, x / 255, np.nan), r"floats must be in \[0, 1\], got nan"),
        (lambda x: x.reshape(12, 784), r"expected shape \(N, 28, 28\).*got \(12, 784\)"),
        (lambda x: np.stack([x, x, x], axis=1), r"expected shape \(N, 28, 28\).*got \(12, 3, 28, 28\)"),
        (lambda x: x[:0], r"expected shape \(N, 28, 28\).*got \(0, 28, 28\)"),
        (lambda x: x.astype(object), "can't be read"),
    ],
)
def test_other_samples_are_refused(tmp_path, images, change, match):
    with pytest.raises(ValueError, match=f"--samples: .*{match}"):
        evaluate.load_samples(save(tmp_path, change(images)))


def test_files_that_hold_no_samples_are_refused(tmp_path, images):
    (tmp_path / "text.npy").write_text("seven")
    np.savez(tmp_path / "many.npz", images=images)
    for name, match in {
        "text.npy": "can't be read",
        "none.npy": "can't be read",
        "many.npz": "several arrays",
    }.items():
        with pytest.raises(ValueError, match=f"--samples: .*{match}"):
            evaluate.load_samples(str(tmp_path / name))
    with pytest.raises(ValueError, match=r"--num_images: 13 asked for, .* holds 12"):
        evaluate.load_samples(save(tmp_path, images), num_images=13)


def test_scores_and_floor_are_printed_and_written_and_the_same_for_the_same_seed(tmp_path, dataset, capsys):
    samples = decode_images(load_split(dataset, split="train"))[100:150].numpy()
    argv = ["--samples", save(tmp_path, samples), "--dataset_name", dataset, "--output", str(tmp_path / "scores.json")]
    result = run(*argv)
    assert json.loads((tmp_path / "scores.json").read_text()) == result
    assert result["num_images"] == {"samples": 50, "floor": 50, "reference": 200}
    assert result["source"] == {"samples": argv[1]}
    assert result["command"] == f"python examples/evaluate.py {' '.join(argv)}"
    assert result["scores"]["nearest_distance"] == 0  # they are copies
    assert result["floor"]["nearest_distance"] > 0
    table = capsys.readouterr().out
    for title in (evaluate.TITLES["fid"], evaluate.TITLES["recall"], "share of class 9", "floor"):
        assert title in table
    assert set(result["scores"]) == set(result["floor"])
    assert set(result["scores"]) <= {*evaluate.TITLES, "class_shares"}

    again = run(*argv)
    assert (again["scores"], again["floor"]) == (result["scores"], result["floor"])
    other = run(*argv, "--seed", "1")
    assert other["floor"]["fid"] != result["floor"]["fid"]  # other test images


def test_samples_of_a_pipeline_depend_on_the_seed_and_not_on_the_batch_size(tmp_path):
    torch.manual_seed(0)
    unet = MNISTUNet2DModel(block_out_channels=(8, 8), layers_per_block=1, norm_num_groups=4, attention_head_dim=8)
    MNISTDDPMPipeline(unet, MNISTDDIMScheduler()).save_pretrained(tmp_path)
    argv = ["--model", str(tmp_path), "--num_images", "5", "--num_inference_steps", "2"]

    def draw(*more: str) -> torch.Tensor:
        return evaluate.draw_samples(evaluate.parse_args([*argv, *more]), "cpu")

    samples = draw()
    assert samples.shape == (5, 1, 28, 28)
    assert samples.dtype == torch.uint8
    rounding = 1  # batches of another size may round differently, by one step of 256 at most
    assert (draw("--batch_size", "2").int() - samples.int()).abs().max() <= rounding
    assert not torch.equal(draw("--seed", "1"), samples)


def test_an_output_that_cannot_be_written_is_refused_before_any_work(tmp_path, images):
    with pytest.raises(OSError, match="can't be written"):
        run("--samples", save(tmp_path, images), "--output", str(tmp_path))


def test_a_user_sees_one_line_for_bad_input(tmp_path, dataset, monkeypatch):
    program = ROOT / "examples" / "evaluate.py"
    argv = ["--samples", str(tmp_path / "none.npy"), "--dataset_name", dataset, "--output", str(tmp_path / "s.json")]
    monkeypatch.setattr(sys, "argv", [str(program), *argv])
    with pytest.raises(SystemExit, match=r"\Aerror: --samples: .*can't be read"):
        runpy.run_path(str(program), run_name="__main__")
    with pytest.raises(SystemExit):  # argparse: one of the two is needed
        evaluate.parse_args([])
