"""The program that samples: what it writes, and that it resumes."""

import json
import random
import shutil
import subprocess
import sys
import time

import numpy as np
import pytest
import sample
import torch
from diffusers import LCMScheduler
from PIL import Image

import mnist_ddpm
from mnist_ddpm import MNISTDDPMPipeline, MNISTDDPMScheduler, MNISTUNet2DModel
from mnist_ddpm.sampling import SCHEDULERS, auto_scheduler, few_timesteps


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    """A saved pipeline of a small U-Net whose output is not zero."""
    torch.manual_seed(0)
    sizes = {"sample_size": 8, "block_out_channels": (8, 16), "layers_per_block": 1, "attention_head_dim": 8}
    unet = MNISTUNet2DModel(**sizes, num_class_embeds=3)
    for weight in unet.parameters():
        torch.nn.init.normal_(weight, std=0.1)
    torch.nn.init.normal_(unet.class_embedding.weight, std=2)
    folder, names = tmp_path_factory.mktemp("model"), {0: "dot", 1: "line", 2: "cross"}
    scheduler = MNISTDDPMScheduler(prediction_type="v_prediction")
    MNISTDDPMPipeline(unet=unet, scheduler=scheduler, id2label=names).save_pretrained(folder)
    return str(folder)


def run(model, *flags) -> None:
    always = ("--model", model, "--num_inference_steps", "3", "--device", "cpu")
    sample.main(sample.parse_args([*always, *map(str, flags)]))


def pixels(path) -> np.ndarray:
    return np.asarray(Image.open(path), dtype=np.int16)


def test_writes_a_grid_and_nothing_else(tmp_path, model):
    run(model, "--output", tmp_path / "grid.png", "--num_images", 5)
    assert pixels(tmp_path / "grid.png").shape == (2 * 8, 3 * 8)
    assert pixels(tmp_path / "grid.png")[:8].std() > 1
    assert [path.name for path in tmp_path.iterdir()] == ["grid.png"]


def few_step_model(folder, model, num_levels=2) -> str:
    """The same U-Net as a pipeline for few steps."""
    pipe = MNISTDDPMPipeline.from_pretrained(model)
    pipe.scheduler = LCMScheduler.from_config(pipe.scheduler.config, original_inference_steps=num_levels)
    pipe.save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize(
    ("flags", "scheduler"),
    [
        ((), auto_scheduler(3)),
        (("--num_inference_steps", 40), auto_scheduler(40)),
        (("--scheduler", "heun"), "heun"),
        (("--eta", 0.5), "ddim"),
        (("--noise_scale", 0.5), "ddpm"),
    ],
)
def test_the_scheduler_is_chosen_by_the_number_of_steps_unless_it_is_named(tmp_path, model, flags, scheduler):
    run(model, "--output_dir", tmp_path, "--num_images", 1, *flags)
    settings = json.loads((tmp_path / "settings.json").read_text(encoding="utf-8"))
    assert settings["scheduler"] == SCHEDULERS[scheduler]


def test_few_steps_are_at_the_searched_timesteps_unless_a_scheduler_is_needed(tmp_path, model):
    pipe = MNISTDDPMPipeline.from_pretrained(model)
    pipe.scheduler = MNISTDDPMScheduler(prediction_type="v_prediction", beta_schedule="cosine")
    pipe.save_pretrained(tmp_path / "model")
    for name, flags in {"plain": (), "eta": ("--eta", 0)}.items():
        for _ in range(2):  # the second resumes
            run(str(tmp_path / "model"), "--output_dir", tmp_path / name, "--num_images", 1, *flags)
    files = (tmp_path / name / "settings.json" for name in ("plain", "eta"))
    plain, eta = (json.loads(file.read_text(encoding="utf-8")) for file in files)
    assert plain["timesteps"] == few_timesteps(3)
    assert (eta["scheduler"], eta["num_inference_steps"], "timesteps" in eta) == ("MNISTDDIMScheduler", 3, False)


def test_a_pipeline_for_few_steps_keeps_its_scheduler_and_its_number_of_steps(tmp_path, model):
    model = few_step_model(tmp_path / "model", model)
    flags = ("--model", model, "--device", "cpu", "--output_dir", str(tmp_path / "images"), "--num_images", "1")
    sample.main(sample.parse_args(flags))
    settings = json.loads((tmp_path / "images" / "settings.json").read_text(encoding="utf-8"))
    assert (settings["scheduler"], settings["num_inference_steps"]) == ("LCMScheduler", 2)


def test_options_reach_the_scheduler(tmp_path, model):
    for name, flags in {"plain": (), "eta": ("--eta", 1.0), "seed": ("--seed", 1)}.items():
        run(model, "--output", tmp_path / f"{name}.png", "--num_images", 1, *flags)
    for name in ("eta", "seed"):
        assert np.abs(pixels(tmp_path / "plain.png") - pixels(tmp_path / f"{name}.png")).max() > 10
    with pytest.raises(ValueError, match="noise_scale"):
        run(model, "--output", tmp_path / "noise_scale.png", "--noise_scale", 0.5, "--scheduler", "ddim")


def test_images_have_the_labels_in_turn_and_a_column_for_each(tmp_path, model):
    labels = {"all": [2, 0], "names": ["cross", "dot"], "first": ["2"], "second": ["dot"]}
    flags = ("--num_images", 5, "--guidance_scale", 2, "--batch_size", 3)
    for name, values in labels.items():
        run(model, "--output", tmp_path / f"{name}.png", *flags, "--class_labels", *values)
    grids = {name: pixels(tmp_path / f"{name}.png") for name in labels}
    assert grids["all"].shape == (3 * 8, 2 * 8)
    assert np.array_equal(grids["names"], grids["all"])
    cells = {
        name: grid.reshape(len(grid) // 8, 8, -1, 8).swapaxes(1, 2).reshape(-1, 8, 8) for name, grid in grids.items()
    }
    for i in range(5):
        expected, other = (cells[name][i] for name in (("first", "second"), ("second", "first"))[i % 2])
        assert np.abs(cells["all"][i] - expected).max() <= 1
        assert np.abs(cells["all"][i] - other).max() > 10


def test_a_guide_leads_unless_the_scale_is_1(tmp_path, model):
    pipe = MNISTDDPMPipeline.from_pretrained(model)
    guide = MNISTUNet2DModel.from_config(pipe.unet.config)
    MNISTDDPMPipeline(pipe.unet, pipe.scheduler, guide=guide).save_pretrained(tmp_path / "guided")
    flags = {"default": (), "as_default": ("--guidance_scale", 1.5), "off": ("--guidance_scale", 1)}
    for name, words in flags.items():
        run(str(tmp_path / "guided"), "--output", tmp_path / f"{name}.png", "--num_images", 1, *words)
    run(model, "--output", tmp_path / "without.png", "--num_images", 1)
    images = {name: pixels(tmp_path / f"{name}.png") for name in (*flags, "without")}
    assert np.array_equal(images["default"], images["as_default"])
    assert np.array_equal(images["off"], images["without"])
    assert np.abs(images["default"] - images["off"]).max() > 10


def test_labels_without_a_model_are_sampled_by_the_conditional_weights(tmp_path, model, monkeypatch):
    monkeypatch.setattr(mnist_ddpm, "PRETRAINED_CONDITIONAL", model)
    flags = ("--num_images", 1, "--class_labels", 2, "--guidance_scale", 2, "--output")
    run(model, *flags, tmp_path / "expected.png")
    words = [*map(str, flags), str(tmp_path / "grid.png"), "--num_inference_steps", "3", "--device", "cpu"]
    sample.main(sample.parse_args(words))
    assert np.array_equal(pixels(tmp_path / "grid.png"), pixels(tmp_path / "expected.png"))


def test_a_trajectory_is_shown_beside_the_grid(tmp_path, model):
    flags = ("--output", tmp_path / "grid.png", "--num_images", 9)
    run(model, *flags, "--trajectory", tmp_path / "strip.png")
    strip = pixels(tmp_path / "strip.png")
    assert strip.shape == (4 * 2 * 8, 3 * 8)
    assert np.abs(strip[:8, -8:] - pixels(tmp_path / "grid.png")[:8, :8]).max() <= 1
    run(model, *flags, "--trajectory", tmp_path / "steps.gif")
    assert Image.open(tmp_path / "steps.gif").n_frames == 3


def test_output_dir_resumes(tmp_path, model, capsys):
    flags = ("--output_dir", tmp_path, "--num_images", 5, "--batch_size", 2, "--eta", 1)
    run(model, *flags)
    files = {path.name: pixels(path) for path in tmp_path.glob("*.png")}
    assert sorted(path.name for path in tmp_path.iterdir()) == [*(f"00000{i}.png" for i in range(5)), "settings.json"]

    untouched = (tmp_path / "000000.png").stat().st_mtime_ns
    (tmp_path / "000003.png").unlink()
    (tmp_path / "image.partial").write_bytes(b"half")  # a kill while it was written
    capsys.readouterr()
    run(model, *flags)
    for name, image in files.items():  # the size of a batch changes the order of sums
        assert np.abs(pixels(tmp_path / name) - image).max() <= 1
    assert (tmp_path / "000000.png").stat().st_mtime_ns == untouched
    assert "1 of 5 images" in capsys.readouterr().err


def test_output_dir_is_of_one_model_and_one_seed(tmp_path, model):
    flags = ("--output_dir", tmp_path / "images", "--num_images", 2)
    shutil.copytree(model, tmp_path / "model")
    model = str(tmp_path / "model")
    run(model, *flags)
    with pytest.raises(ValueError, match="--output_dir"):
        run(model, *flags, "--seed", 1)
    pipe = MNISTDDPMPipeline.from_pretrained(model)
    with torch.no_grad():
        pipe.unet.conv_in.weight[0] += 1
    pipe.save_pretrained(model)  # trained further, under the same name
    with pytest.raises(ValueError, match="--output_dir"):
        run(model, *flags)
    labels = ("--output_dir", tmp_path / "labels", "--num_images", 1, "--class_labels")
    run(model, *labels, 2)
    with pytest.raises(ValueError, match="--output_dir"):
        run(model, *labels, 1)
    pipe.guide = pipe.unet
    pipe.save_pretrained(model)
    with pytest.raises(ValueError, match="--output_dir"):
        run(model, *labels, 2)
    (tmp_path / "images" / "settings.json").unlink()
    with pytest.raises(ValueError, match="--output_dir"):
        run(model, *flags)


def test_settings_stand_beside_the_images(tmp_path, model):
    run(model, "--output_dir", tmp_path, "--num_images", 1, "--scheduler", "ddpm", "--noise_scale", 0.5)
    settings = json.loads((tmp_path / "settings.json").read_text(encoding="utf-8"))
    assert len(settings.pop("weights")) == 16
    options = {"num_inference_steps": 3, "eta": None, "noise_scale": 0.5}
    assert settings == {"model": model, "scheduler": "MNISTDDPMScheduler", "seed": 0, **options}


@pytest.mark.slow
def test_output_dir_survives_kills(tmp_path, model):
    """SIGKILL at random moments of the writing: all files are whole, and in the end all are there."""
    settings = {"model": model, "num_images": 64, "batch_size": 8, "num_inference_steps": 5, "device": "cpu"}
    flags = [word for name, value in settings.items() for word in (f"--{name}", str(value))]
    command, moments = [sys.executable, sample.__file__, *flags, "--output_dir", tmp_path], random.Random(0)
    for _ in range(3):
        process = subprocess.Popen(command)
        written = len(list(tmp_path.glob("*.png")))
        while len(list(tmp_path.glob("*.png"))) == written:
            assert process.poll() is None
            time.sleep(0.001)
        time.sleep(0.02 * moments.random())
        process.kill()
        process.wait()
        for path in tmp_path.glob("*.png"):
            Image.open(path).load()
    subprocess.run(command, check=True)
    assert len(list(tmp_path.glob("*.png"))) == 64


# Errors


@pytest.mark.parametrize(
    ("flag", "value"),
    [
        ("--num_images", "0"),
        ("--batch_size", "-1"),
        ("--num_inference_steps", "0"),
        ("--seed", "-1"),
        ("--output", "grid.jpg"),
        ("--trajectory", "strip.mp4"),
    ],
)
def test_bad_flags_are_named(capsys, flag, value):
    with pytest.raises(SystemExit):
        sample.parse_args([flag, value])
    assert f"{flag} must" in capsys.readouterr().err


def test_an_earlier_grid_is_kept_when_sampling_fails(tmp_path, model):
    pipe = MNISTDDPMPipeline.from_pretrained(model)
    with torch.no_grad():
        pipe.unet.conv_in.weight[0] = float("nan")
    pipe.save_pretrained(tmp_path / "model")
    (tmp_path / "grid.png").write_bytes(b"earlier")
    with pytest.raises(RuntimeError, match=r"conv_in\.weight"):
        run(str(tmp_path / "model"), "--output", tmp_path / "grid.png")
    assert (tmp_path / "grid.png").read_bytes() == b"earlier"


def test_outputs_are_checked_before_any_work(tmp_path):
    (tmp_path / "file").touch()
    (tmp_path / "folder.png").mkdir()
    for flags in (
        ["--output", tmp_path / "file" / "grid.png"],
        ["--output", tmp_path / "folder.png"],
        ["--output_dir", tmp_path / "file"],
        ["--output", tmp_path / "grid.png", "--trajectory", tmp_path / "file" / "strip.png"],
    ):
        with pytest.raises(OSError, match="output"):
            run("no/model", *flags)  # which is not even looked for


def program(*argv) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, *map(str, argv)], capture_output=True, text=True)


def test_a_copy_runs_alone_and_errors_are_one_line(tmp_path):
    copy = shutil.copy(sample.__file__, tmp_path)
    finished = program(copy, "--model", tmp_path / "missing", "--output", tmp_path / "grid.png")
    assert finished.returncode == 1
    assert finished.stderr.strip().splitlines()[-1].startswith("error: model must")
    assert "Traceback" not in finished.stderr


def test_help_does_not_wait_for_torch():
    code = "import runpy, sys; sys.argv = ['sample.py', '--help']\n"
    code += f"try: runpy.run_path({sample.__file__!r}, run_name='__main__')\n"
    code += "except SystemExit: print('torch' in sys.modules)"
    assert program("-c", code).stdout.splitlines()[-1] == "False"


def test_a_missing_package_is_one_line_with_its_remedy():
    code = "import runpy, sys; sys.modules['mnist_ddpm'] = None; sys.argv = ['sample.py']\n"
    finished = program("-c", code + f"runpy.run_path({sample.__file__!r}, run_name='__main__')")
    assert "pip install -e ." in finished.stderr
    assert "Traceback" not in finished.stderr
