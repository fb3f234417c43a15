"""Editing, on Gaussian data: what the hidden part of an image must be, given the rest, is known."""

import itertools
import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.models.unets.unet_2d import UNet2DOutput
from PIL import Image
from test_pipeline import seeded, tiny_unet

from mnist_ddpm import MNISTDDIMScheduler, MNISTDDPMPipeline, MNISTDDPMScheduler
from mnist_ddpm.editing import MNISTImg2ImgPipeline, MNISTInpaintPipeline, repaint_schedule, slerp
from mnist_ddpm.sampling import SCHEDULERS, make_scheduler

# images of 1 x 3 pixels in [-1, 1]
MEAN = torch.tensor([0.1, -0.2, 0.0], dtype=torch.float64)
COVARIANCE = 0.04 * torch.tensor([[1.0, 0.8, 0.3], [0.8, 1.0, 0.5], [0.3, 0.5, 1.0]], dtype=torch.float64)
PREDICTION_TYPES = ["epsilon", "sample", "v_prediction"]
CONFIG = {"beta_schedule": "squaredcos_cap_v2", "clip_sample": False}


class Gaussian(ModelMixin, ConfigMixin):
    """The best predictor where the data is N(MEAN, COVARIANCE), of the noise, of x_0 or of v."""

    @register_to_config
    def __init__(self, prediction_type: str = "epsilon", sample_size: tuple = (1, 3), in_channels: int = 1):
        super().__init__()
        self.anchor = torch.nn.Parameter(torch.zeros((), dtype=torch.float64))  # gives the model a dtype
        alpha_bars = MNISTDDPMScheduler(**CONFIG).alphas_cumprod.double()
        self.log_ratios = 0.5 * ((1 - alpha_bars) / alpha_bars).log()  # of noise to signal

    def forward(self, sample, timestep):
        ratio = np.interp(float(timestep), np.arange(1000), self.log_ratios)  # timesteps may be fractions
        a, x = 1 / (1 + np.exp(2 * ratio)), sample.flatten(1)
        inverse = torch.linalg.inv(a * COVARIANCE + (1 - a) * torch.eye(3, dtype=torch.float64))
        eps = (1 - a) ** 0.5 * (x - a**0.5 * MEAN) @ inverse
        x_0 = MEAN + a**0.5 * (x - a**0.5 * MEAN) @ inverse @ COVARIANCE
        best = {"epsilon": eps, "sample": x_0, "v_prediction": a**0.5 * eps - (1 - a) ** 0.5 * x_0}
        return UNet2DOutput(sample=best[self.config.prediction_type].view_as(sample))


def pipeline(cls, prediction_type="epsilon", scheduler=MNISTDDPMScheduler, unet=None, **config):
    scheduler = scheduler(**CONFIG, **config, prediction_type=prediction_type)
    pipe = MNISTDDPMPipeline(unet or Gaussian(prediction_type), scheduler)
    pipe = cls.from_pipe(pipe, dtype=pipe.unet.dtype)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def data(count, seed=0):
    """Images of the distribution, in [0, 1]."""
    z = torch.randn(count, 3, generator=seeded(seed), dtype=torch.float64)
    x_0 = MEAN + z @ torch.linalg.cholesky(COVARIANCE).T
    return (x_0 / 2 + 0.5).view(count, 1, 1, 3)


# Inpainting


def inpainted(prediction_type="epsilon", count=1024, **options):
    """The hidden pixels of images whose middle one is 0.4, in [-1, 1]: 3 standard deviations above the mean."""
    image = torch.full((count, 1, 1, 3), 0.5, dtype=torch.float64)
    image[..., 1] = 0.7
    mask = torch.tensor([1.0, 0.0, 1.0]).view(1, 1, 1, 3)
    pipe = pipeline(MNISTInpaintPipeline, prediction_type, variance_type="fixed_large")
    images = pipe(image, mask, generator=seeded(0), output_type="pt", **options).images
    assert torch.equal(images[..., 1], image[..., 1]), "the known part is exactly as it was"
    return (images * 2 - 1).flatten(1)[:, [0, 2]]


def test_the_hidden_part_is_distributed_as_given_the_known_one():
    """The conditional mean and covariance of a normal distribution, up to RePaint's error at 100 steps.

    1024 samples: standard errors of 0.004 (mean) and 0.001 (covariance). Without resampling the mean is far off.
    """
    hidden, known = [0, 2], [1]
    gain = COVARIANCE[hidden][:, known] @ torch.linalg.inv(COVARIANCE[known][:, known])
    mean = MEAN[hidden] + gain @ (0.4 - MEAN[known])
    covariance = COVARIANCE[hidden][:, hidden] - gain @ COVARIANCE[known][:, hidden]
    x = inpainted(num_inference_steps=100, jump_length=1, jump_n_sample=10)
    torch.testing.assert_close(x.mean(dim=0), mean, rtol=0, atol=0.05)
    torch.testing.assert_close(torch.cov(x.T), covariance, rtol=0, atol=0.004)
    once = inpainted(num_inference_steps=100, jump_n_sample=1)
    assert ((once.mean(dim=0) - mean).abs() > 0.1).all()


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES[1:])
def test_inpainting_does_not_depend_on_the_prediction_type(prediction_type):
    options = {"count": 4, "num_inference_steps": 10, "jump_length": 2, "jump_n_sample": 2}
    torch.testing.assert_close(inpainted(prediction_type, **options), inpainted(**options), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("jump_length", "jump_n_sample"), [(1, 1), (1, 3), (2, 2), (5, 4), (10, 10)])
def test_the_schedule_goes_one_level_down_or_a_jump_up(jump_length, jump_n_sample):
    levels = repaint_schedule(20, jump_length, jump_n_sample)
    moves = [new - level for level, new in itertools.pairwise(levels)]
    assert (levels[0], levels[-1], set(moves) - {-1, jump_length}) == (20, 0, set())
    assert moves.count(jump_length) == (jump_n_sample - 1) * len(range(1, 21 - jump_length, jump_length))


# Image to image


@pytest.mark.parametrize("name", sorted({*SCHEDULERS} - {"pndm"}))
def test_strength_0_is_the_image_and_strength_1_is_generation(name):
    pipe = pipeline(MNISTImg2ImgPipeline, unet=tiny_unet())
    pipe.scheduler = make_scheduler(name, pipe.scheduler.config)
    image, options = torch.rand(2, 1, 8, 8, generator=seeded(1)), {"num_inference_steps": 6, "output_type": "pt"}
    assert torch.equal(pipe(image, 0.0, seeded(0), **options).images, ((image * 2 - 1) / 2 + 0.5).clamp(0, 1))
    plain = MNISTDDPMPipeline.from_pipe(pipe)
    expected = plain(2, seeded(0), **options).images
    torch.testing.assert_close(pipe(image, 1.0, seeded(0), **options).images, expected, rtol=0, atol=1e-4)
    assert pipe(image, 0.5, seeded(0), **options).images.isfinite().all()


@pytest.mark.parametrize("name", sorted({*SCHEDULERS} - {"pndm"}))
@pytest.mark.parametrize("strength", [0.3, 0.7])
def test_images_of_the_distribution_stay_in_it(name, strength):
    """Noised to any level and denoised by the best predictor, they have its mean and covariance again."""
    pipe = pipeline(MNISTImg2ImgPipeline, variance_type="fixed_large")
    pipe.scheduler = make_scheduler(name, pipe.scheduler.config)
    images = pipe(data(2048), strength, seeded(0), num_inference_steps=50, output_type="pt").images
    x = (images * 2 - 1).flatten(1)
    torch.testing.assert_close(x.mean(dim=0), MEAN, rtol=0, atol=0.02)
    tolerance = 0.3 if name == "euler_ancestral" else 0.15  # the former still lacks 0.23 of the variance at 50 steps
    torch.testing.assert_close(torch.cov(x.T), COVARIANCE, rtol=0, atol=tolerance * 0.04)


def test_low_strength_keeps_more_of_the_image():
    pipe, image = pipeline(MNISTImg2ImgPipeline), data(64)
    images = [pipe(image, strength, seeded(0), output_type="pt").images for strength in (0.1, 0.4, 0.8)]
    kept = [(edited - image).abs().mean() for edited in images]
    assert 0 < kept[0] < kept[1] < kept[2]


# Inversion


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_latents_of_inversion_give_the_images_back(prediction_type):
    pipe, image = pipeline(MNISTImg2ImgPipeline, prediction_type, MNISTDDIMScheduler), data(8)
    latents = pipe.invert(image, num_inference_steps=20, num_iterations=20)
    plain = MNISTDDPMPipeline.from_pipe(pipe, dtype=torch.float64)
    images = plain(8, latents=latents, num_inference_steps=20, output_type="pt").images
    torch.testing.assert_close(images, image, rtol=0, atol=1e-6)
    rough = pipe.invert(image, num_inference_steps=20, num_iterations=1)
    images = plain(8, latents=rough, num_inference_steps=20, output_type="pt").images
    assert 1e-4 < (images - image).abs().max() < 0.1


def test_inversion_begins_at_the_noise_level_where_sampling_ends():
    options = {"scheduler": MNISTDDIMScheduler, "set_alpha_to_one": False, "timestep_spacing": "leading"}
    pipe, image = pipeline(MNISTImg2ImgPipeline, "v_prediction", **options), data(8)
    latents = pipe.invert(image, num_inference_steps=20, num_iterations=20)
    plain = MNISTDDPMPipeline.from_pipe(pipe, dtype=torch.float64)
    images = plain(8, latents=latents, num_inference_steps=20, output_type="pt").images
    torch.testing.assert_close(images, image, rtol=0, atol=1e-6)


def test_latents_of_inversion_are_noise():
    """The exact flow maps N(MEAN, COVARIANCE) to N(0, I)."""
    pipe = pipeline(MNISTImg2ImgPipeline, scheduler=MNISTDDIMScheduler)
    x = pipe.invert(data(4096), num_inference_steps=500, num_iterations=3).flatten(1)
    torch.testing.assert_close(x.mean(dim=0), torch.zeros(3, dtype=x.dtype), rtol=0, atol=0.1)
    torch.testing.assert_close(torch.cov(x.T), torch.eye(3, dtype=x.dtype), rtol=0, atol=0.1)


def test_interpolation_goes_from_one_image_to_the_other():
    pipe, (first, second) = pipeline(MNISTImg2ImgPipeline, scheduler=MNISTDDIMScheduler), data(2)
    images = pipe.interpolate(first[None], second[None], num_images=5, output_type="pt").images
    assert images.shape == (5, 1, 1, 3)
    torch.testing.assert_close(images[[0, -1]].double(), torch.stack([first, second]), rtol=0, atol=1e-3)
    one = pipe.interpolate(first[None], second[None], num_images=1, output_type="pt").images
    torch.testing.assert_close(one, images[:1])


def test_slerp_keeps_the_norm():
    first, second = (torch.nn.functional.normalize(torch.randn(1, 50, generator=seeded(n))) for n in (0, 1))
    for weight in (0.0, 0.25, 0.5, 1.0):
        assert slerp(first, second, weight).norm().item() == pytest.approx(1, abs=1e-5)
    torch.testing.assert_close(slerp(first, second, 0.0), first)
    torch.testing.assert_close(slerp(first, second, 1.0), second)
    torch.testing.assert_close(slerp(first, first, 0.3), first)


# Arguments and components


def test_labels_and_guidance_are_for_edited_images_too():
    unet = tiny_unet(num_class_embeds=3)
    mask = torch.zeros(1, 1, 8, 8)
    mask[..., 4:] = 1
    image, options = torch.rand(2, 1, 8, 8), {"num_inference_steps": 4, "output_type": "pt", "guidance_scale": 2.0}
    for cls, arguments in ((MNISTImg2ImgPipeline, [0.5]), (MNISTInpaintPipeline, [mask])):
        pipe = pipeline(cls, "v_prediction", unet=unet)
        drawn = [
            pipe(image, *arguments, seeded(0, 1), class_labels=labels, **options).images for labels in ([0, 1], [0, 2])
        ]
        torch.testing.assert_close(drawn[0][0], drawn[1][0], rtol=0, atol=1e-4)
        assert not torch.equal(drawn[0][1], drawn[1][1])


def test_pictures_come_in_as_pil_images_too():
    pipe = pipeline(MNISTInpaintPipeline, unet=tiny_unet())
    image = Image.linear_gradient("L").resize((8, 8))
    mask = Image.new("L", (8, 8), 0)
    mask.paste(255, (4, 0, 8, 8))
    (filled,) = pipe(image, mask, seeded(0), num_inference_steps=3).images
    assert filled.size == (8, 8)
    assert filled.crop((0, 0, 4, 8)).tobytes() == image.crop((0, 0, 4, 8)).tobytes()


def test_what_is_saved_is_the_plain_pipeline(tmp_path):
    pipe = pipeline(MNISTImg2ImgPipeline, unet=tiny_unet())
    pipe.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "model_index.json").read_text())["_class_name"] == ["pipeline", "MNISTDDPMPipeline"]
    assert type(MNISTImg2ImgPipeline.from_pretrained(tmp_path)) is MNISTImg2ImgPipeline


def test_what_cannot_be_edited_is_named():
    image = torch.rand(1, 1, 8, 8)
    edit, inpaint = (pipeline(cls, unet=tiny_unet()) for cls in (MNISTImg2ImgPipeline, MNISTInpaintPipeline))
    with pytest.raises(ValueError, match=r"^strength must be"):
        edit(image, 1.5)
    with pytest.raises(TypeError, match="noise_scale"):
        edit(image, noise_scale=0.5)
    with pytest.raises(RuntimeError, match=r"^sample must be finite"):
        pipeline(MNISTImg2ImgPipeline, scheduler=MNISTDDIMScheduler, unet=tiny_unet())(image, eta=2.0)
    with pytest.raises(ValueError, match=r"^scheduler must be an MNISTDDIMScheduler with clip_sample=False"):
        edit.invert(image)
    edit.scheduler = MNISTDDIMScheduler(clip_sample=False, thresholding=True)
    with pytest.raises(ValueError, match="thresholding=False"):
        edit.invert(image)
    unet = tiny_unet()
    torch.nn.init.constant_(unet.conv_out.bias, float("inf"))
    with pytest.raises(RuntimeError, match=r"^sample must be finite"):
        pipeline(MNISTImg2ImgPipeline, scheduler=MNISTDDIMScheduler, unet=unet).invert(image)
    for count, (pipe, arguments) in itertools.product((1, 3), ((edit, []), (inpaint, [image]))):
        with pytest.raises(ValueError, match=r"^batch_size must .* fit generator"):
            pipe(image.expand(2, -1, -1, -1), *arguments, generator=[seeded(n) for n in range(count)])
    with pytest.raises(ValueError, match=r"^mask_image must be"):
        inpaint(image, image.expand(2, -1, -1, -1))
    for pipe, name, arguments in ((edit, "pndm", []), (inpaint, "euler", [image])):
        pipe.scheduler = make_scheduler(name, pipe.scheduler.config)
        with pytest.raises(ValueError, match=r"^scheduler must be"):
            pipe(image, *arguments)


@pytest.mark.slow
def test_the_code_of_the_guide_runs():
    guide = Path(__file__).resolve().parent.parent / "docs" / "editing.md"
    names = {}
    for code in re.findall(r"^```python\n(.*?)^```$", guide.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE):
        exec(code, names)
    assert [len(names[name]) for name in ("similar", "completed", "between")] == [4, 4, 6]
    three = (names["three"][0, 0] * 255).numpy()
    differences = np.abs(np.asarray(names["again"][0], dtype=float) - three)
    assert differences.max() < 16
    assert differences.mean() < 1
    assert (np.asarray(names["completed"][0])[:14] == three[:14]).all()
