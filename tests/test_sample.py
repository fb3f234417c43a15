import json
import random
import re
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import sample
import torch
from PIL import Image

from mnist_ddpm import MNISTDDPMPipeline, MNISTDDPMScheduler, MNISTUNet2DModel
from mnist_ddpm.images import image_grid


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A saved pipeline of a small U-Net whose output is not zero."""
    torch.manual_seed(0)
    unet = MNISTUNet2DModel(sample_size=8, block_out_channels=(8, 16), layers_per_block=1, attention_head_dim=8)
    for weight in unet.parameters():
        torch.nn.init.normal_(weight, std=0.1)
    folder = tmp_path_factory.mktemp("model")
    MNISTDDPMPipeline(unet=unet, scheduler=MNISTDDPMScheduler()).save_pretrained(folder)
    return str(folder)


def run(model, *flags):
    sample.main(
        sample.parse_args(["--model", model, "--num_inference_steps", "3", "--device", "cpu", *map(str, flags)])
    )


def pixels(path):
    return np.asarray(Image.open(path), dtype=np.int16)


@pytest.mark.parametrize("scheduler", sample.SCHEDULERS)
def test_writes_a_grid_with_every_scheduler(tmp_path, model, scheduler):
    flags = ("--num_images", 5, "--num_inference_steps", 6)  # PNDM needs at least 4
    run(model, "--output", tmp_path / "grid.png", "--scheduler", scheduler, *flags)
    grid = Image.open(tmp_path / "grid.png")
    assert grid.mode == "L"
    assert grid.size == (3 * 8, 2 * 8)
    assert pixels(tmp_path / "grid.png")[:8].std() > 10
    assert [path.name for path in tmp_path.iterdir()] == ["grid.png"]


def test_an_image_depends_on_the_seed_and_its_index_alone(tmp_path, model):
    def grid(name, *flags):
        run(model, "--output", tmp_path / name, "--scheduler", "ddpm", *flags)
        return pixels(tmp_path / name)

    four = grid("four.png", "--num_images", 4)
    # another batch size changes the order of sums, by less than one of 255 levels
    assert np.abs(grid("batches.png", "--num_images", 4, "--batch_size", 3) - four).max() <= 1
    assert np.abs(grid("two.png", "--num_images", 2) - four[:8]).max() <= 1
    assert np.abs(grid("seed.png", "--num_images", 4, "--seed", 1) - four).max() > 10


def test_neighboring_seeds_share_no_image():
    def seeds(seed):
        return {generator.initial_seed() for generator in sample.image_generators(seed, range(1000))}

    assert len(seeds(0)) == 1000
    assert not seeds(0) & seeds(1)


def test_options_reach_the_scheduler(tmp_path, model):
    for name, flags in {"plain": (), "eta": ("--eta", 1.0)}.items():
        run(model, "--output", tmp_path / f"{name}.png", *flags)
    assert np.abs(pixels(tmp_path / "plain.png") - pixels(tmp_path / "eta.png")).max() > 10
    with pytest.raises(ValueError, match="`noise_scale` is not for MNISTDDIMScheduler"):
        run(model, "--output", tmp_path / "noise_scale.png", "--noise_scale", 0.5)


@pytest.mark.parametrize(("steps", "columns"), [(3, 3), (30, 12)])
def test_trajectory_strip(tmp_path, model, steps, columns):
    run(
        model,
        *("--output", tmp_path / "grid.png", "--trajectory", tmp_path / "strip.png"),
        *("--num_images", 9, "--num_inference_steps", steps),
    )
    strip = pixels(tmp_path / "strip.png")
    assert strip.shape == (4 * 2 * 8, columns * 8)
    # the end of the first rows, x_t and the predicted x_0 alike, is the first image of the grid
    for row in (slice(0, 8), slice(8, 16)):
        assert np.abs(strip[row, -8:] - pixels(tmp_path / "grid.png")[:8, :8]).max() <= 1


def test_trajectory_animation(tmp_path, model):
    run(model, "--output", tmp_path / "grid.png", "--trajectory", tmp_path / "steps.gif", "--num_images", 2)
    animation = Image.open(tmp_path / "steps.gif")
    assert animation.n_frames == 3
    assert animation.size == (2 * 8, 2 * 8)


def whole_folder(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_output_dir_goes_on_where_it_was_stopped(tmp_path, model, capsys):
    flags = ("--output_dir", tmp_path, "--num_images", 5, "--batch_size", 2, "--eta", 1)
    run(model, *flags)
    undisturbed = whole_folder(tmp_path)
    assert sorted(undisturbed) == [*(f"00000{i}.png" for i in range(5)), "settings.json"]

    untouched = (tmp_path / "000000.png").stat().st_mtime_ns
    (tmp_path / "000003.png").unlink()
    (tmp_path / "image.partial").write_bytes(undisturbed["000003.png"][:50])  # a kill while it was written
    capsys.readouterr()
    run(model, *flags)
    assert whole_folder(tmp_path) == undisturbed
    assert (tmp_path / "000000.png").stat().st_mtime_ns == untouched
    assert "2 of 5 images to go" in capsys.readouterr().err


@pytest.mark.parametrize("left", [lambda png: b"", lambda png: bytes(len(png)), lambda png: png[:-1]])
def test_a_file_that_is_not_whole_is_sampled_again(tmp_path, model, left):
    flags = ("--output_dir", tmp_path, "--num_images", 2)
    run(model, *flags)
    undisturbed = whole_folder(tmp_path)
    (tmp_path / "000001.png").write_bytes(left(undisturbed["000001.png"]))  # as a machine that goes down may leave it
    run(model, *flags)
    assert whole_folder(tmp_path) == undisturbed


def test_output_dir_is_of_one_model_and_one_seed(tmp_path, model):
    flags = ("--output_dir", tmp_path / "images", "--num_images", 2)
    pipe = MNISTDDPMPipeline.from_pretrained(model)
    pipe.save_pretrained(tmp_path / "model")
    model = str(tmp_path / "model")
    run(model, *flags)
    with pytest.raises(ValueError, match=r"--output_dir: .*'seed': 0.*name another folder"):
        run(model, *flags, "--seed", 1)
    with torch.no_grad():
        pipe.unet.conv_in.weight[0] += 1
    pipe.save_pretrained(model)  # trained on, under the same name
    with pytest.raises(ValueError, match=r"--output_dir: .*other settings"):
        run(model, *flags)
    (tmp_path / "images" / "settings.json").write_text("{")
    with pytest.raises(ValueError, match=r"--output_dir: .*other settings \(unknown\)"):
        run(model, *flags)


@pytest.mark.slow
def test_output_dir_survives_kills(tmp_path, model):
    """SIGKILL at random moments of the writing; in the end the files are those of a run that was never killed."""
    settings = {"model": model, "num_images": 64, "batch_size": 8, "num_inference_steps": 5, "device": "cpu"}
    flags = [word for name, value in settings.items() for word in (f"--{name}", str(value))]
    command = [sys.executable, sample.__file__, *flags, "--output_dir"]
    subprocess.run([*command, tmp_path / "undisturbed"], check=True)
    killed, moments = tmp_path / "killed", random.Random(0)
    for _ in range(3):
        process = subprocess.Popen([*command, killed])
        written = len(list(killed.glob("*.png")))
        while len(list(killed.glob("*.png"))) == written:
            assert process.poll() is None
            time.sleep(0.001)
        time.sleep(0.02 * moments.random())
        process.kill()
        process.wait()
        for path in killed.glob("*.png"):
            Image.open(path).load()
    subprocess.run([*command, killed], check=True)
    assert whole_folder(killed) == whole_folder(tmp_path / "undisturbed")


def test_full_disk_is_an_error_that_says_what_to_do(tmp_path):
    """A limit on the size of files stands for the disk: the first image is small enough, the second one is not."""
    code = """
import resource, sys
from pathlib import Path
import sample
from PIL import Image

resource.setrlimit(resource.RLIMIT_FSIZE, (500, 500))
sample.write_images(Path(sys.argv[1]), range(2), [Image.new("L", (8, 8)), Image.effect_noise((64, 64), 99)])
"""
    finished = subprocess.run(
        [sys.executable, "-c", code, tmp_path], cwd=Path(sample.__file__).parent, capture_output=True, text=True
    )
    last_line = finished.stderr.splitlines()[-1]
    assert re.search(r"--output_dir: image 1 can't be written \(.*File too large.*make room", last_line)
    assert sample.is_whole(tmp_path / "000000.png")
    assert not (tmp_path / "000001.png").exists()


def test_one_progress_bar_counts_the_images(tmp_path, model, capsys):
    run(model, "--output", tmp_path / "grid.png", "--num_images", 5, "--batch_size", 2)
    bar = capsys.readouterr().err.split("Loading pipeline components")[-1].split("\r")[-1]
    assert re.match(r"100%\|.*\| 5/5 images \[00:\d\d<00:00, +[\d.]+ images/s\]", bar)


def test_image_grid():
    images = [Image.new("L", (2, 1), color=i + 1) for i in range(3)]
    np.testing.assert_array_equal(np.asarray(image_grid(images)), [[1, 1, 2, 2], [3, 3, 0, 0]])
    np.testing.assert_array_equal(np.asarray(image_grid(images, columns=1)), [[1, 1], [2, 2], [3, 3]])
    with pytest.raises(ValueError, match="`images` must hold at least one"):
        image_grid([])
    with pytest.raises(ValueError, match="`columns` must be at least 1, got 0"):
        image_grid(images, columns=0)


# Errors


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--num_images", "0"], "--num_images must be at least 1, got 0"),
        (["--batch_size", "-1"], "--batch_size must be at least 1, got -1"),
        (["--output", "grid.jpg"], "--output must end in .png, got grid.jpg"),
        (["--trajectory", "strip.mp4"], "--trajectory must end in .png or .gif, got strip.mp4"),
        (["--trajectory", "strip.png", "--scheduler", "unipc"], "--trajectory needs a --scheduler that predicts x_0"),
        (["--scheduler", "magic"], "'magic'"),
    ],
)
def test_bad_flags_are_named(capsys, flags, message):
    with pytest.raises(SystemExit):
        sample.parse_args(["--model", "somewhere", *flags])
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--num_inference_steps", "1001"], "`num_inference_steps` must be an int from 1 to 1000.*got 1001"),
        (["--eta", "2"], "`eta` must be a finite number from 0 to 1, got 2.0"),
    ],
)
def test_bad_values_are_named(tmp_path, model, flags, message):
    with pytest.raises(ValueError, match=message):
        run(model, "--output", tmp_path / "grid.png", *flags)
    assert not (tmp_path / "grid.png").exists()


def test_missing_model_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"--model: there is no folder .*missing; name one"):
        run(str(tmp_path / "missing"), "--output", tmp_path / "grid.png")


def damaged(model, folder, damage):
    MNISTDDPMPipeline.from_pretrained(model).save_pretrained(folder)
    damage(folder / "unet" / "diffusion_pytorch_model.safetensors")
    return str(folder)


@pytest.mark.parametrize("kept", [0, 4, 100, 0.5, 0.999])
def test_weights_cut_short_are_an_error(tmp_path, model, kept):
    def cut(path):
        data = path.read_bytes()
        path.write_bytes(data[: kept if isinstance(kept, int) else int(kept * len(data))])

    (tmp_path / "grid.png").write_bytes(b"earlier")
    with pytest.raises(ValueError, match=r"--model: .* can't be loaded, it is missing or damaged"):
        run(damaged(model, tmp_path / "model", cut), "--output", tmp_path / "grid.png")
    assert (tmp_path / "grid.png").read_bytes() == b"earlier"


def test_nan_in_the_weights_is_an_error(tmp_path, model):
    pipe = MNISTDDPMPipeline.from_pretrained(model)
    with torch.no_grad():
        pipe.unet.conv_in.weight[0] = float("nan")
    pipe.save_pretrained(tmp_path / "model")
    (tmp_path / "grid.png").write_bytes(b"earlier")
    with pytest.raises(RuntimeError, match=r"weights are not finite \(1 tensors, 'conv_in.weight' first\)"):
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
        with pytest.raises(OSError, match=r"can't be written \(.*: name another file"):
            run("no/model", *flags)  # which is not even looked for


def test_command_line_says_what_is_wrong_in_one_line(tmp_path):
    command = [
        sys.executable,
        sample.__file__,
        "--model",
        str(tmp_path / "missing"),
        "--output",
        str(tmp_path / "g.png"),
    ]
    finished = subprocess.run(command, capture_output=True, text=True)
    assert finished.returncode == 1
    assert finished.stderr.strip().splitlines()[-1].startswith("error: --model: there is no folder")
    assert "Traceback" not in finished.stderr


def test_settings_are_noted_beside_the_images(tmp_path, model):
    run(model, "--output_dir", tmp_path, "--num_images", 1, "--scheduler", "ddpm", "--noise_scale", 0.5)
    assert json.loads((tmp_path / "settings.json").read_text()) == {
        "model": model,
        "scheduler": "ddpm",
        "num_inference_steps": 3,
        "eta": None,
        "noise_scale": 0.5,
        "seed": 0,
        "weights": sample.weights_digest(MNISTDDPMPipeline.from_pretrained(model)),
    }
