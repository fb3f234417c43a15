"""The program that scores samples: what it reads, refuses, and writes."""

import json
import runpy
import sys
from pathlib import Path

import evaluate
import numpy as np
import pytest
import sample
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


def save(folder: Path, samples: np.ndarray) -> str:
    np.save(folder / "samples.npy", samples)
    return str(folder / "samples.npy")


def tiny_unet(**kwargs) -> MNISTUNet2DModel:
    torch.manual_seed(0)
    return MNISTUNet2DModel(block_out_channels=(8, 8), layers_per_block=1, **kwargs)


def run(*argv: str) -> dict:
    return evaluate.main(evaluate.parse_args(list(argv)))


def test_scores_and_baseline_are_printed_and_written_and_the_same_for_the_same_seed(tmp_path, dataset, capsys):
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
    for name in ("fid", "recall", "class_shares 9", "two_sample_accuracy_snapped", "pixels_1_to_8", "real"):
        assert name in table
    assert f"{result['scores']['fid']:.4f}" in table
    assert set(result["scores"]) == set(result["floor"])
    test_images = decode_images(load_split(dataset, split="test"))
    assert result["floor"]["pixels_0"] == pytest.approx(float((test_images == 0).double().mean()), abs=0.01)

    again = run(*argv)
    assert (again["scores"], again["floor"]) == (result["scores"], result["floor"])
    other = run(*argv, "--seed", "1")
    assert other["floor"]["fid"] != result["floor"]["fid"]  # other test images


def test_a_folder_that_sample_writes_is_scored(tmp_path, dataset):
    MNISTDDPMPipeline(tiny_unet(), MNISTDDIMScheduler()).save_pretrained(tmp_path / "model")
    argv = ["--model", str(tmp_path / "model"), "--num_images", "5", "--num_inference_steps", "2"]
    sample.main(sample.parse_args([*argv, "--output_dir", str(tmp_path / "images"), "--device", "cpu"]))
    always = ["--dataset_name", dataset, "--output", str(tmp_path / "s.json")]
    of_folder, of_model = run("--samples", str(tmp_path / "images"), *always), run(*argv, *always)
    assert of_folder["num_images"] == of_model["num_images"]
    for name in ("fid", "nearest_distance", "pixels_0"):
        assert of_folder["scores"][name] == pytest.approx(of_model["scores"][name], rel=1e-3)


def test_a_guide_leads_unless_the_scale_is_1(tmp_path, dataset):
    unet, guide = tiny_unet(), tiny_unet()
    for i, network in enumerate((unet, guide)):
        torch.nn.init.normal_(network.conv_out.weight, std=0.1 * (i + 1))
    MNISTDDPMPipeline(unet, MNISTDDIMScheduler(), guide=guide).save_pretrained(tmp_path / "model")
    argv = ["--model", str(tmp_path / "model"), "--num_images", "5", "--num_inference_steps", "2"]
    argv += ["--dataset_name", dataset, "--output", str(tmp_path / "s.json")]
    results = [run(*argv, *flags) for flags in ([], ["--guidance_scale", "1"], ["--bf16"])]
    assert [result["source"]["guidance_scale"] for result in results] == [1.5, 1, 1.5]
    assert len({result["scores"]["nearest_distance"] for result in results}) == 3


def save_model(folder: Path, **kwargs) -> list[str]:
    """Save a small pipeline of 8 timesteps; returns the flags for its likelihood alone."""
    unet = tiny_unet(out_channels=2 if kwargs.get("variance_type") == "learned_range" else 1)
    scheduler = MNISTDDPMScheduler(num_train_timesteps=8, beta_end=0.5, **kwargs)
    MNISTDDPMPipeline(unet, scheduler).save_pretrained(folder / "model")
    argv = ["--model", str(folder / "model"), "--output", str(folder / "b.json")]
    return [*argv, "--num_images", "0", "--bits_per_dim"]


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
        ("--samples x.npy --bits_per_dim", "--bits_per_dim must"),
        ("--model x --num_images 0", "--num_images must"),
        ("--model x --batch_size 0", "--batch_size must"),
        ("--model x --seed -1", "--seed must"),
        ("", "one of the arguments --model --samples"),
    ],
)
def test_bad_flags_are_named(argv, match, capsys):
    with pytest.raises(SystemExit):
        evaluate.parse_args(argv.split())
    assert match in capsys.readouterr().err


def test_more_timesteps_than_there_are_is_an_error(tmp_path, dataset):
    with pytest.raises(ValueError, match="num_timesteps"):
        run(*save_model(tmp_path), "--dataset_name", dataset, "--num_timesteps_per_image", "9")


@pytest.mark.parametrize(
    ("samples", "output", "missing", "match"),
    [
        ("samples.npy", ".", None, "directory"),
        ("none.npy", "s.json", None, r"none\.npy"),
        ("samples.npy", "s.json", "transformers", r"pip install -e '\.\[eval\]'"),
    ],
)
def test_a_user_sees_one_line_for_bad_input_before_any_work(tmp_path, monkeypatch, samples, output, missing, match):
    save(tmp_path, np.zeros((2, 28, 28), dtype=np.uint8))
    argv = ["evaluate.py", "--samples", str(tmp_path / samples), "--output", str(tmp_path / output)]
    monkeypatch.setattr(sys, "argv", argv)
    if missing:
        monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(SystemExit, match=rf"\Aerror: .*{match}"):
        runpy.run_path(str(ROOT / "examples" / "evaluate.py"), run_name="__main__")
