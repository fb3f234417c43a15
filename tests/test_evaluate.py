"""The program that scores samples: what it reads, refuses, and writes."""

import json
import runpy
import sys
from pathlib import Path

import evaluate
import numpy as np
import pytest
import torch

from mnist_ddpm import MNISTDDIMScheduler, MNISTDDPMPipeline, MNISTDDPMScheduler, MNISTUNet2DModel, bits_per_dim
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


def save_model(folder: Path, **kwargs) -> list[str]:
    """Save a small pipeline of 8 timesteps; returns the flags for its likelihood alone."""
    torch.manual_seed(0)
    channels = 2 if kwargs.get("variance_type") == "learned_range" else 1
    unet = MNISTUNet2DModel(
        block_out_channels=(8, 8), layers_per_block=1, norm_num_groups=4, attention_head_dim=8, out_channels=channels
    )
    scheduler = MNISTDDPMScheduler(num_train_timesteps=8, beta_end=0.5, **kwargs)
    MNISTDDPMPipeline(unet, scheduler).save_pretrained(folder / "model")
    return [
        "--model",
        str(folder / "model"),
        "--num_images",
        "0",
        "--bits_per_dim",
        "--output",
        str(folder / "b.json"),
    ]


@pytest.mark.parametrize("num_timesteps", [None, 3])
@pytest.mark.parametrize("variance_type", ["fixed_small", "learned_range"])
def test_the_bound_and_its_parts_are_printed_and_written(tmp_path, dataset, capsys, variance_type, num_timesteps):
    argv = [*save_model(tmp_path, variance_type=variance_type), "--dataset_name", dataset, "--batch_size", "7"]
    argv += ["--num_timesteps_per_image", "3"] if num_timesteps else []
    result = run(*argv)
    assert json.loads((tmp_path / "b.json").read_text()) == result
    bound = result["bits_per_dim"]
    pipe = MNISTDDPMPipeline.from_pretrained(tmp_path / "model")
    images = decode_images(load_split(dataset, split="test"))
    generator = torch.Generator().manual_seed(0)
    expected = bits_per_dim(pipe.unet, pipe.scheduler, images, num_timesteps, 7, generator)
    assert bound["total"] == pytest.approx(expected.total)
    assert bound["standard_error"] == pytest.approx(expected.standard_error)
    assert (bound["num_images"], bound["num_timesteps_per_image"]) == (60, num_timesteps or 8)
    assert bound["L_T"] + bound["sum of L_{t-1}"] + bound["L_0"] == pytest.approx(bound["total"])
    assert bound["L_T"] + sum(bound["quarters of t"]) == pytest.approx(bound["total"])
    printed = capsys.readouterr()
    assert f"{bound['total']:.4f}" in printed.out
    assert f"{bound['schedule_cost']['background_decoder']:.4f}" in printed.out
    assert "scores" not in result
    assert f"{60 * (num_timesteps or 8):.0f}/{60 * (num_timesteps or 8):.0f}" in printed.err  # the progress bar


def test_the_bound_with_another_variance_costs_a_constant_more(tmp_path, dataset):
    argv = [*save_model(tmp_path), "--dataset_name", dataset]
    small, large = run(*argv)["bits_per_dim"], run(*argv, "--variance_type", "fixed_large")["bits_per_dim"]
    assert (small["variance_type"], large["variance_type"]) == ("fixed_small", "fixed_large")
    assert small["schedule_cost"]["variance_mismatch"] == 0
    assert large["schedule_cost"]["variance_mismatch"] > 0
    assert large["L_0"] == pytest.approx(small["L_0"])  # the decoder's variance is the same


@pytest.mark.parametrize(
    ("argv", "match"),
    [
        (["--samples", "x.npy", "--bits_per_dim"], "--bits_per_dim needs --model"),
        (["--model", "x", "--num_timesteps_per_image", "3"], "need --bits_per_dim"),
        (["--model", "x", "--variance_type", "fixed_large"], "need --bits_per_dim"),
        (["--model", "x", "--num_images", "0"], "--num_images must be at least 1"),
        (["--model", "x", "--bits_per_dim", "--num_timesteps_per_image", "0"], "--num_timesteps_per_image"),
    ],
)
def test_flags_of_the_bound_that_mean_nothing_are_refused(argv, match, capsys):
    with pytest.raises(SystemExit):
        evaluate.parse_args(argv)
    assert match in capsys.readouterr().err


def test_more_timesteps_than_there_are_is_an_error(tmp_path, dataset):
    with pytest.raises(ValueError, match=r"num_timesteps must be from 2 .* to 8"):
        run(*save_model(tmp_path), "--dataset_name", dataset, "--num_timesteps_per_image", "9")


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
