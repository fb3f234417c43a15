"""The benchmarks: what they ask of training is understood, and they write what they say. To run them takes hours."""

import json

import epochs
import guidance
import likelihood
import pytest
import readme_tables
import recipes
import time_to_quality
import torch
from contenders import Course
from PIL import Image
from quality import loss_over_t
from tiny_training import UNET, write_workplace

from mnist_ddpm import MNISTDDPMPipeline, MNISTDDPMScheduler, MNISTUNet2DModel
from mnist_ddpm.training import TrainingArguments


def changed(arguments):
    """The names of arguments that differ from their defaults."""
    given, default = vars(TrainingArguments(**arguments)), vars(TrainingArguments())
    return {name for name in given if given[name] != default[name]}


@pytest.mark.parametrize("change", likelihood.CHANGES)
def test_choices_for_likelihood_are_arguments_of_training(change, tmp_path):
    arguments = likelihood.arguments_of(change, tmp_path)
    unet = MNISTUNet2DModel.from_config(MNISTUNet2DModel.load_config(arguments["model_config_name_or_path"]))
    assert (changed(arguments) == {"model_config_name_or_path"}) == (change == "none of them")
    assert (unet.config.patch_size == 1) == (change not in ("default U-Net, with Fourier features", "none of them"))


@pytest.mark.parametrize("change", recipes.CHANGES)
def test_recipes_are_arguments_and_networks_that_differ_from_the_default(change):
    arguments, unet_config = recipes.CHANGES[change]
    assert changed(arguments) == arguments.keys()
    same_network = MNISTUNet2DModel(**unet_config).config == MNISTUNet2DModel().config
    assert (not arguments and same_network) == (change == "none")


def test_only_those_that_train_can_sample(capsys):
    with pytest.raises(SystemExit):
        time_to_quality.parse_args(["--contenders", "ours", "stock", "--sampling_contenders", "ours", "tuned"])
    assert "--sampling_contenders" in capsys.readouterr().err


def test_error_over_t_of_a_network_that_predicts_nothing_is_the_power_of_v():
    torch.manual_seed(0)
    images = torch.randint(0, 256, (64, 1, 8, 8), dtype=torch.uint8)
    unet = MNISTUNet2DModel(sample_size=8, **UNET)
    for weight in unet.parameters():
        torch.nn.init.zeros_(weight)
    scheduler = MNISTDDPMScheduler(prediction_type="v_prediction")
    timesteps = torch.tensor([0, 500, 999])
    errors = loss_over_t(MNISTDDPMPipeline(unet=unet, scheduler=scheduler), images, timesteps)
    # v = sqrt(alpha_bar) z - sqrt(1 - alpha_bar) x_0
    alpha_bar = scheduler.alphas_cumprod[timesteps].float()
    power = alpha_bar + (1 - alpha_bar) * (images / 127.5 - 1).square().mean()
    torch.testing.assert_close(errors, power, rtol=0.1, atol=0)


def test_the_pipelines_of_a_training_are_scored_once_and_shown(tmp_path):
    workplace = write_workplace(tmp_path)
    for name in ("early", "late"):
        pipe = MNISTDDPMPipeline(MNISTUNet2DModel(sample_size=28, **UNET), MNISTDDPMScheduler())
        pipe.save_pretrained(tmp_path / name)
    output, picture = tmp_path / "epochs.json", tmp_path / "epochs.png"
    flags = ["--num_images", 20, "--num_inference_steps", 2, "--dataset_name", workplace / "images"]
    flags += ["--output", output, "--picture", picture]

    def measure(*pipelines):
        return epochs.main(epochs.parse_args([*pipelines, *map(str, flags)]))["epochs"]

    first = measure(f"1={tmp_path / 'early'}")
    both = measure(f"1={tmp_path / 'early'}", f"2.5={tmp_path / 'late'}")
    assert both["1"] == first["1"]  # with the same seconds: kept
    assert both["2.5"].keys() == {"pipeline", "ddpm", "ddim"}
    again = measure(f"2.5={tmp_path / 'early'}")  # another pipeline
    assert again["2.5"]["ddpm"] != both["2.5"]["ddpm"]
    measure(f"1={tmp_path / 'early'}", f"2.5={tmp_path / 'late'}")
    with Image.open(picture) as grid:
        assert grid.height * 16 == grid.width * 2
    assert "| 2.5 |" in readme_tables.section("epochs", tmp_path)


def test_guidance_is_measured_row_by_row_by_labels_and_by_guides(tmp_path, monkeypatch, capsys):
    images, digits = torch.randint(0, 256, (40, 1, 28, 28), dtype=torch.uint8), torch.arange(40) % 10
    monkeypatch.setattr(guidance, "real_images", lambda split: (images, digits))
    for name, classes in {"conditional": 10, "plain": None, "weak": None}.items():
        unet = MNISTUNet2DModel(sample_size=28, num_class_embeds=classes, **UNET)
        MNISTDDPMPipeline(unet, MNISTDDPMScheduler(prediction_type="v_prediction")).save_pretrained(tmp_path / name)

    def measured(key, *flags):
        sizes = ("--num_images", 20, "--num_inference_steps", 2, "--output", tmp_path / f"{key}.json")
        rows = guidance.main(guidance.parse_args([str(flag) for flag in (*sizes, *flags)]))[key]
        assert json.loads((tmp_path / f"{key}.json").read_text(encoding="utf-8"))[key] == json.loads(json.dumps(rows))
        return [(row["guide"], row["guidance_scale"], tuple(row["guidance_interval"])) for row in rows]

    flags = ("--model", tmp_path / "conditional", "--scales", 1, 2, "--guidance_interval", 0.2, 0.8)
    assert measured("guidance", *flags) == [("", 1, (0, 1)), ("", 2, (0.2, 0.8))]
    flags = ("--model", tmp_path / "plain", "--scales", 1, 2, "--guides")
    first = measured("guides", *flags, f"weak={tmp_path / 'weak' / 'unet'}")
    assert first == [("", 1, (0, 1)), ("weak", 2, (0, 1))]
    assert capsys.readouterr().out.count("recall") == 4
    assert measured("guides", *flags, f"other={tmp_path / 'plain'}") == [*first, ("other", 2, (0, 1))]
    assert capsys.readouterr().out.count("recall") == 1
    assert "| real test images |  |" in readme_tables.section("guidance", tmp_path)
    assert "| weak | 0." in readme_tables.section("guides", tmp_path)
    with pytest.raises(ValueError, match="model must"):
        guidance.main(
            guidance.parse_args(["--model", str(tmp_path / "plain"), "--output", str(tmp_path / "none.json")])
        )


@pytest.mark.parametrize("tuned", [False, True])
@pytest.mark.slow
def test_the_course_trains_and_samples_by_its_own_schedulers(tuned):
    course = Course(torch.zeros(8, 1, 28, 28, dtype=torch.uint8), "cpu", tuned, learning_rate=1e-3, batch_size=2)
    before = [weight.clone() for weight in course.unet.parameters()]
    for _ in range(2):
        course.step()
    assert all((a != b).any() for a, b in zip(before, course.unet.parameters(), strict=True))
    for sampler in time_to_quality.SAMPLERS:
        pipe = course.pipeline(sampler)
        assert type(pipe.scheduler).__module__.startswith("diffusers.")
        assert pipe(1, num_inference_steps=2, output_type="pt").images.isfinite().all()


@pytest.mark.slow
def test_a_recipe_is_written_and_kept(tmp_path):
    output = tmp_path / "recipes.json"
    argv = "--changes none --images 128 --num_images 20 --num_inference_steps 2 --num_test_images 2"
    argv = [*argv.split(), "--output", str(output)]
    first = recipes.main(recipes.parse_args(argv))
    assert first["recipes"]["none"]["steps"] == 2
    assert len(first["recipes"]["none"]["error_by_tenth_of_t"]) == 10
    again = recipes.main(recipes.parse_args(argv))
    assert again["recipes"] == first["recipes"] == json.loads(output.read_text(encoding="utf-8"))["recipes"]
