"""What the demo computes, without its page: the same images as the pipeline's, from runs that share nothing."""

import itertools

import pytest
import steps
import torch
from diffusers import LCMScheduler

from mnist_ddpm import MNISTDDPMPipeline, MNISTUNet2DModel
from mnist_ddpm.sampling import image_generators, load_pipeline


@pytest.fixture(scope="module")
def pipe():
    return steps.quiet(load_pipeline())


def conditional(seed=0) -> MNISTDDPMPipeline:
    """The packaged weights with classes, each of which shifts the embedding of t at random."""
    pipe = load_pipeline()
    unet = MNISTUNet2DModel.from_config(pipe.unet.config, num_class_embeds=10)
    weights = {**unet.state_dict(), **pipe.unet.state_dict()}
    (name,) = weights.keys() - pipe.unet.state_dict().keys()
    weights[name] = torch.randn(weights[name].shape, generator=torch.Generator().manual_seed(seed)) / 4
    unet.load_state_dict(weights)
    return steps.quiet(MNISTDDPMPipeline(unet.eval(), pipe.scheduler))


@pytest.mark.parametrize("name", steps.SCHEDULERS)
def test_frames_end_with_the_images_of_the_pipeline(pipe, name):
    pipe = steps.with_scheduler(pipe, name)
    noise = steps.draw_noise(3, 2)
    frames = [*steps.denoise(pipe, noise, 6, seed=3)]
    images = pipe(2, latents=noise, num_inference_steps=6, generator=image_generators(4, range(2)), output_type="pt")
    assert torch.equal(frames[-1].x_t, steps.to_pixels(images.images * 2 - 1))
    assert torch.equal(frames[0].x_t, steps.to_pixels(noise))
    assert [frame.t for frame in frames] == sorted((frame.t for frame in frames), reverse=True)
    assert len(frames) == 7
    errors = [(frame.x0_hat.int() - frames[-1].x_t.int()).abs().float().mean() for frame in frames]
    assert errors[0] > errors[3] > errors[5]  # the prediction gets better


@pytest.mark.parametrize("num_steps", [1, 4])
def test_few_step_model_is_sampled_by_its_own_scheduler(pipe, num_steps):
    few_steps = MNISTDDPMPipeline(pipe.unet, LCMScheduler.from_config(pipe.scheduler.config))
    noise = steps.draw_noise(0, 2)
    generator = image_generators(1, range(2))
    images = few_steps(2, generator, noise, num_inference_steps=num_steps, output_type="pt").images
    assert torch.equal(steps.last(steps.denoise(few_steps, noise, num_steps)), steps.to_pixels(images * 2 - 1))


def test_digit_and_guidance_are_those_of_the_pipeline():
    pipe, noise = conditional(), steps.draw_noise(0, 2)
    image = steps.last(steps.denoise(pipe, noise, 4, digit=7, guidance_scale=2.0))
    options = {"latents": noise, "num_inference_steps": 4, "output_type": "pt"}
    expected = pipe(2, class_labels=7, guidance_scale=2.0, **options).images
    assert torch.equal(image, steps.to_pixels(expected * 2 - 1))
    assert not torch.equal(image, steps.last(steps.denoise(pipe, noise, 4)))


@pytest.mark.parametrize("name", ["DDPM", "DPM-Solver++"])
def test_runs_that_take_turns_do_not_disturb_each_other(pipe, name):
    pipe = steps.with_scheduler(pipe, name)
    runs = [(1, 5), (2, 8)]
    alone = [steps.last(steps.denoise(pipe, steps.draw_noise(seed, 1), n, seed=seed)) for seed, n in runs]
    both = (steps.denoise(pipe, steps.draw_noise(seed, 1), n, seed=seed) for seed, n in runs)
    turns = [pair for pair in itertools.zip_longest(*both)]
    assert torch.equal(turns[5][0].x_t, alone[0])
    assert torch.equal(turns[8][1].x_t, alone[1])


def test_image_of_a_seed_does_not_depend_on_how_many_there_are():
    assert torch.equal(steps.draw_noise(5, 3)[:2], steps.draw_noise(5, 2))


def test_completions_keep_what_is_known_and_differ_elsewhere(pipe):
    canvas = torch.full((28, 28), -1)
    canvas[10:13, 8:20] = torch.tensor([[0], [128], [255]])
    first, second = next(steps.complete(pipe, canvas, 2, None, 1.0, seed=0))
    known = canvas >= 0
    assert torch.equal(first[known].int(), canvas[known].int())
    assert torch.equal(second[known].int(), canvas[known].int())
    assert not torch.equal(first, second)


@pytest.mark.parametrize(("strength", "near"), [(0.1, True), (1.0, False)])
def test_strength_says_how_much_is_redrawn(pipe, strength, near):
    digit = steps.last(steps.denoise(pipe, steps.draw_noise(6, 1), 20))[0].int()
    images = next(steps.redraw(pipe, digit, strength, 2, None, 1.0, seed=0))
    assert ((images.int() - digit).abs().float().mean() < 8) == near


def test_interpolation_begins_and_ends_with_the_given_digits(pipe):
    ends = steps.last(steps.denoise(pipe, torch.cat([steps.draw_noise(seed, 1) for seed in (12, 6)]), 20))
    row = steps.last(steps.between(pipe, ends, num_images=3, num_steps=20))
    assert (row[[0, 2]].int() - ends.int()).abs().float().mean() < 4
    assert (row[1].int() - ends[0].int()).abs().float().mean() > 20
