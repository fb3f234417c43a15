"""Sampling from a saved pipeline: schedulers, seeds, progress, and the errors of what can't be loaded."""

import copy
import json
import logging
import re
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import LCMScheduler
from diffusers.utils import import_utils
from tqdm import TqdmWarning

from mnist_ddpm import PRETRAINED, MNISTDDPMPipeline, MNISTDDPMScheduler, MNISTUNet2DModel
from mnist_ddpm.sampling import (
    AUTO,
    MAX_SEARCHED_STEPS,
    SCHEDULERS,
    SEARCHED_TIMESTEPS,
    auto_scheduler,
    default_steps,
    few_timesteps,
    image_generators,
    is_few_step,
    load_pipeline,
    make_scheduler,
    sample,
    sample_tensor,
    sample_trajectory,
    step_options,
    weights_digest,
)


def small_pipeline(**kwargs) -> MNISTDDPMPipeline:
    """A small U-Net whose output is not zero."""
    torch.manual_seed(0)
    unet = MNISTUNet2DModel(
        sample_size=8,
        block_out_channels=(8, 16),
        layers_per_block=1,
        attention_head_dim=8,
        out_channels=2 if kwargs.get("variance_type") == "learned_range" else 1,
    )
    for weight in unet.parameters():
        torch.nn.init.normal_(weight, std=0.1)
    return MNISTDDPMPipeline(unet=unet, scheduler=MNISTDDPMScheduler(**kwargs))


@pytest.fixture(scope="module", params=["fixed_small", "learned_range"])
def model(request, tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("model")
    small_pipeline(variance_type=request.param, prediction_type="v_prediction").save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_every_scheduler_samples_in_few_steps(model, scheduler):
    steps = 4 if scheduler == "pndm" else 3  # PNDM needs 4
    images = sample_tensor(load_pipeline(model, scheduler, "cpu"), 2, num_inference_steps=steps)
    assert images.shape == (2, 1, 8, 8)
    assert images.float().std() > 10
    assert not torch.equal(images[0], images[1])


def test_an_image_depends_on_the_seed_and_its_index_alone(model):
    pipe = load_pipeline(model, "ddpm", "cpu")

    def draw(*args: int) -> torch.Tensor:
        return sample_tensor(pipe, *args, num_inference_steps=3).int()

    four = draw(4)
    # another batch size changes the order of sums, by less than one of 255 levels
    assert (draw(4, 0, 3) - four).abs().max() <= 1
    assert (draw(2) - four[:2]).abs().max() <= 1
    assert (draw(4, 1) - four).abs().max() > 10


def test_neighboring_seeds_share_no_image():
    first, second = ({g.initial_seed() for g in image_generators(seed, range(1000))} for seed in (0, 1))
    assert len(first) == 1000
    assert not first & second


@pytest.mark.parametrize(("prediction_type", "clips"), [("v_prediction", False), ("epsilon", True)])
def test_ddim_does_not_clip_what_v_prediction_predicts(prediction_type, clips):
    config = MNISTDDPMScheduler(prediction_type=prediction_type).config
    assert make_scheduler("ddim", config).config.clip_sample == clips
    assert make_scheduler("ddpm", config).config.clip_sample


@pytest.mark.parametrize("name", SCHEDULERS)
def test_a_scheduler_does_not_keep_the_kind_of_solver_of_the_one_before(name):
    config = MNISTDDPMScheduler().config
    of_solver = make_scheduler("sde_dpmsolver_multistep", config).config
    assert make_scheduler(name, of_solver).config.get("algorithm_type") == make_scheduler(name, config).config.get(
        "algorithm_type"
    )


def test_heun_takes_small_steps_at_high_noise():
    scheduler = make_scheduler("heun", MNISTDDPMScheduler(beta_schedule="squaredcos_cap_v2").config)
    scheduler.set_timesteps(10)
    sigmas = scheduler.sigmas.unique().flip(0)
    assert sigmas[0] / sigmas[1] < 20  # 3,000 without Karras' sigmas


def test_auto_goes_by_the_number_of_steps(model):
    assert sorted(AUTO) == list(AUTO)
    names = list(AUTO.values())
    assert [auto_scheduler(most) for most in AUTO] == names
    assert [auto_scheduler(1), auto_scheduler(10**6)] == [names[0], names[-1]]
    for steps, name in AUTO.items():
        scheduler = load_pipeline(model, "auto", "cpu", steps).scheduler
        assert type(scheduler).__name__ == SCHEDULERS[name]
        sde = scheduler.config.get("algorithm_type") == "sde-dpmsolver++"
        assert sde == (name == "sde_dpmsolver_multistep")
    assert type(load_pipeline(model, "auto", "cpu").scheduler).__name__ == SCHEDULERS[auto_scheduler(50)]


def test_few_timesteps_lie_on_one_curve():
    assert few_timesteps(len(SEARCHED_TIMESTEPS)) == list(SEARCHED_TIMESTEPS)
    searched = Path(__file__).resolve().parent.parent / "benchmarks" / "results" / "timestep_grid.json"
    assert json.loads(searched.read_text(encoding="utf-8"))["grids"]["10"]["timesteps"] == list(SEARCHED_TIMESTEPS)
    for steps in range(1, MAX_SEARCHED_STEPS + 1):
        timesteps = few_timesteps(steps)
        assert len(timesteps) == steps
        assert timesteps[0] == 999
        assert timesteps == sorted(set(timesteps), reverse=True)
    assert few_timesteps(5) == list(SEARCHED_TIMESTEPS[::2])


def test_searched_timesteps_are_for_auto_in_few_steps_on_the_schedule_that_they_were_found_for():
    fitting = small_pipeline(prediction_type="v_prediction", beta_schedule="cosine")
    assert step_options(fitting, 5, "auto") == {"timesteps": few_timesteps(5)}
    assert step_options(fitting, MAX_SEARCHED_STEPS + 1, "auto") == {"num_inference_steps": MAX_SEARCHED_STEPS + 1}
    assert step_options(fitting, 5, "ddim") == {"num_inference_steps": 5}
    for other in ({"prediction_type": "epsilon"}, {"beta_schedule": "linear"}, {"trained_betas": [0.01] * 1000}):
        pipe = small_pipeline(**{"prediction_type": "v_prediction", "beta_schedule": "cosine"} | other)
        assert step_options(pipe, 5, "auto") == {"num_inference_steps": 5}
    fitting.scheduler = LCMScheduler.from_config(fitting.scheduler.config)
    assert step_options(fitting, 5, "auto") == {"num_inference_steps": 5}


def test_auto_clips_where_noise_is_predicted(tmp_path):
    small_pipeline(beta_schedule="cosine").save_pretrained(tmp_path)
    pipe = load_pipeline(tmp_path, "auto", "cpu", 3)
    assert pipe.scheduler.config.clip_sample
    assert auto_scheduler(3, "epsilon") == "ddim"


def test_a_pipeline_for_few_steps_keeps_its_scheduler_unless_another_is_named(tmp_path):
    pipe = small_pipeline(prediction_type="v_prediction")
    pipe.scheduler = LCMScheduler.from_config(pipe.scheduler.config, original_inference_steps=2)
    pipe.save_pretrained(tmp_path)
    kept = load_pipeline(tmp_path, "auto", "cpu").scheduler
    assert is_few_step(kept)
    assert default_steps(kept) == 2
    assert not is_few_step(load_pipeline(tmp_path, "ddim", "cpu").scheduler)


def test_images_move_along_a_trajectory_to_the_sample(model):
    pipe = load_pipeline(model, device="cpu")
    steps = sample_trajectory(pipe, 2, num_inference_steps=3)
    assert [len(images) for images in steps] == [4, 4, 4]
    final = sample_tensor(pipe, 2, num_inference_steps=3)
    for i, image in enumerate(steps[-1]):  # x_t and the predicted x_0 alike
        assert np.abs(np.asarray(image, dtype=int) - final[i // 2, 0].int().numpy()).max() <= 1


@pytest.mark.parametrize("scheduler", ["ddim", "heun"])
def test_the_progress_bar_counts_whole_images(model, capsys, scheduler):
    pipe = load_pipeline(model, scheduler, "cpu")
    capsys.readouterr()
    with warnings.catch_warnings(action="error", category=TqdmWarning):
        list(sample(pipe, range(5), batch_size=2, num_inference_steps=3))
    bars = capsys.readouterr().err.split("\r")
    assert re.match(r"100%\|.*\| 5/5 \[", bars[-1])
    assert not re.search(r"\d\.\d+/5", "".join(bars))


def test_a_fresh_install_prints_no_advice(monkeypatch, model):
    monkeypatch.setattr(import_utils, "_accelerate_available", False)
    records = []
    handler = logging.Handler()
    handler.emit = records.append
    logging.getLogger("diffusers").addHandler(handler)
    load_pipeline(model, device="cpu")
    logging.getLogger("diffusers").removeHandler(handler)
    assert [record.getMessage() for record in records] == []


def test_weights_are_told_apart():
    unet = small_pipeline().unet
    other = copy.deepcopy(unet)
    assert weights_digest(unet) == weights_digest(other)
    with torch.no_grad():
        other.conv_in.weight[0] += 1
    assert weights_digest(unet) != weights_digest(other)


def test_without_a_model_the_packaged_one_is_loaded():
    packaged = MNISTDDPMPipeline.from_pretrained(PRETRAINED)
    assert weights_digest(load_pipeline(device="cpu").unet) == weights_digest(packaged.unet)


# Errors


@pytest.mark.parametrize("model", ["", "no such folder", "a/b/c", "missing"])
def test_a_missing_model_is_an_error_without_a_network(model):
    with pytest.raises(ValueError, match="model"):
        load_pipeline(model)


def test_an_unknown_scheduler_is_an_error(model):
    with pytest.raises(ValueError, match="scheduler"):
        load_pipeline(model, "magic")


@pytest.mark.parametrize("kept", [0, 100, 0.999])
def test_weights_cut_short_are_an_error(tmp_path, kept):
    small_pipeline().save_pretrained(tmp_path)
    weights = tmp_path / "unet" / "diffusion_pytorch_model.safetensors"
    data = weights.read_bytes()
    weights.write_bytes(data[: kept if isinstance(kept, int) else int(kept * len(data))])
    with pytest.raises(ValueError, match="model"):
        load_pipeline(str(tmp_path))
