"""Labels and guidance: what a guided step gives in closed form, which images get which label, and what is saved."""

import importlib
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
from diffusers import ConfigMixin, DDPMPipeline, DDPMScheduler, DiffusionPipeline, ModelMixin, UNet2DModel
from diffusers.configuration_utils import register_to_config
from diffusers.models.unets.unet_2d import UNet2DOutput
from loopback_hub import USER, WRITER
from test_pipeline import images, seeded, tiny_unet

import mnist_ddpm
from mnist_ddpm import MNISTDDIMScheduler, MNISTDDPMPipeline, MNISTDDPMScheduler, MNISTUNet2DModel
from mnist_ddpm.pipeline import extrapolate
from mnist_ddpm.sampling import make_scheduler

REPO = f"{USER}/digits"
MEANS, STD = (-0.6, 0.2), 0.3  # of two classes, which are equally frequent
ALPHA_BAR = torch.cumprod(1 - torch.linspace(1e-4, 2e-2, 1000, dtype=torch.float64), 0)
NAMES = {0: "zero", 1: "one", 2: "two"}


def class_eps(x, alpha_bar, mean):
    """E[eps | x_t, class] where the class is N(mean, STD^2)."""
    return (1 - alpha_bar) ** 0.5 * (x - alpha_bar**0.5 * mean) / (alpha_bar * STD**2 + 1 - alpha_bar)


def best_eps(x, alpha_bar):
    """E[eps | x_t]: those of the classes, each times its probability given x_t (Bayes' rule)."""
    variance = alpha_bar * STD**2 + 1 - alpha_bar
    log_odds = torch.stack([-((x - alpha_bar**0.5 * mean) ** 2) / (2 * variance) for mean in MEANS])
    return sum(p * class_eps(x, alpha_bar, mean) for p, mean in zip(log_odds.softmax(0), MEANS, strict=True))


class TwoClasses(ModelMixin, ConfigMixin):
    """The best predictor of the noise of each pixel, on linear betas of 1000 steps, for two classes or no label."""

    @register_to_config
    def __init__(self, sample_size: int = 4, in_channels: int = 1, num_class_embeds: int = 2):
        super().__init__()
        self.anchor = torch.nn.Parameter(torch.zeros((), dtype=torch.float64))  # gives the model a dtype

    def forward(self, sample, timestep, class_labels=None):
        a = ALPHA_BAR[int(timestep)]
        known = torch.stack([*(class_eps(sample, a, mean) for mean in MEANS), best_eps(sample, a)])
        labels = torch.full((len(sample),), 2) if class_labels is None else class_labels
        return UNet2DOutput(sample=known[labels, torch.arange(len(sample))])


def pipeline(unet=None, scheduler=None, **kwargs):
    scheduler = scheduler or MNISTDDIMScheduler(clip_sample=False)
    pipe = MNISTDDPMPipeline(unet or tiny_unet(num_class_embeds=3), scheduler, **kwargs)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def batch_sizes(*unets):
    """A list to which each call of these U-Nets adds its number of images."""
    sizes = []
    for unet in unets:
        unet.register_forward_pre_hook(lambda module, args: sizes.append(len(args[0])))
    return sizes


# Guidance


def one_step(pipe, t, x_t, **kwargs):
    """The sample after the one step from t to x_0."""
    sampled = []
    pipe(
        batch_size=len(x_t),
        latents=x_t,
        timesteps=[t],
        callback_on_step_end=lambda pipe, i, t, tensors: sampled.append(tensors["latents"]) or {},
        **kwargs,
    )
    return sampled[0]


@pytest.mark.parametrize("scale", [0.0, 1.0, 2.5])
@pytest.mark.parametrize("t", [100, 500, 900])
def test_a_guided_step_is_that_of_the_closed_form(t, scale):
    """Classifier-free guidance, arXiv 2207.12598: the one step of DDIM from t lands on x0_hat."""
    x_t, labels = torch.randn(3, 1, 4, 4, generator=seeded(0), dtype=torch.float64), [0, 1, 1]
    a, mean = ALPHA_BAR[t], torch.tensor(MEANS, dtype=torch.float64)[labels][:, None, None, None]
    eps = best_eps(x_t, a) + scale * (class_eps(x_t, a, mean) - best_eps(x_t, a))
    expected = (x_t - (1 - a) ** 0.5 * eps) / a**0.5
    actual = one_step(pipeline(TwoClasses()), t, x_t, class_labels=labels, guidance_scale=scale)
    torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("labels", [None, [0, 1, 1]])
def test_a_guide_takes_the_place_of_the_prediction_without_label(labels):
    """arXiv 2406.02507; here the guide adds 0.1 to each prediction, so that the difference is -0.1 everywhere."""

    class Shifted(TwoClasses):
        def forward(self, sample, timestep, class_labels=None):
            return UNet2DOutput(sample=super().forward(sample, timestep, class_labels).sample + 0.1)

    x_t, t = torch.randn(3, 1, 4, 4, generator=seeded(0), dtype=torch.float64), 500
    pipe = pipeline(TwoClasses(), guide=Shifted())
    plain = one_step(pipe, t, x_t, class_labels=labels)
    guided = one_step(pipe, t, x_t, class_labels=labels, guidance_scale=3.0)
    shift = -((1 - ALPHA_BAR[t]) ** 0.5) * (1 - 3.0) * 0.1 / ALPHA_BAR[t] ** 0.5
    torch.testing.assert_close(guided, plain + shift, rtol=1e-6, atol=1e-6)


def test_scale_1_is_no_guidance_bit_for_bit():
    unet = tiny_unet(num_class_embeds=3)
    sizes = batch_sizes(unet)
    guide = tiny_unet(num_class_embeds=3, block_out_channels=(8, 8))
    pipe, options = pipeline(unet, guide=guide), {"batch_size": 2, "class_labels": [0, 2]}
    plain = images(pipe, generator=seeded(0), **options)
    assert torch.equal(images(pipe, generator=seeded(0), guidance_scale=1.0, **options), plain)
    at_no_step = images(pipe, generator=seeded(0), guidance_scale=3.0, guidance_interval=(0.1, 0.11), **options)
    assert torch.equal(at_no_step, plain)
    assert set(sizes) == {2}
    assert not torch.equal(images(pipe, generator=seeded(0), guidance_scale=3.0, **options), plain)


def test_the_interval_is_a_part_of_training_time_and_both_halves_are_one_batch():
    unet = tiny_unet(num_class_embeds=3)
    sizes = batch_sizes(unet)
    options = {"class_labels": 1, "guidance_scale": 2.0, "num_inference_steps": None}
    images(pipeline(unet), timesteps=[900, 700, 500, 300, 0], guidance_interval=(0.3, 0.7), **options)
    assert sizes == [1, 2, 2, 2, 1]


def test_the_variance_is_that_of_the_label():
    strong, weak = (torch.randn(2, 2, 4, 4, generator=seeded(seed)) for seed in (0, 1))
    mean, variance = extrapolate(strong, weak, 3.0, 1).split(1, dim=1)
    torch.testing.assert_close(mean, 3 * strong[:, :1] - 2 * weak[:, :1])
    assert torch.equal(variance, strong[:, 1:])
    learned = {"variance_type": "learned_range"}
    unet = tiny_unet(num_class_embeds=3, out_channels=2)
    for scheduler in (MNISTDDPMScheduler(**learned), DDPMScheduler(**learned), MNISTDDIMScheduler()):
        pipe = pipeline(unet, scheduler, guide=tiny_unet(num_class_embeds=3))  # which has no variance
        assert images(pipe, class_labels=1, guidance_scale=2.0).shape == (1, 1, 8, 8)
        pipe.guide = None
        assert images(pipe, class_labels=1, guidance_scale=2.0).shape == (1, 1, 8, 8)


@pytest.mark.parametrize("scheduler", ["ddpm", "dpmsolver_multistep", "heun"])
def test_each_image_is_a_function_of_its_seed_and_its_label(scheduler):
    config = MNISTDDPMScheduler(prediction_type="v_prediction").config
    pipe, labels = pipeline(scheduler=make_scheduler(scheduler, config)), [2, 0, 1]
    torch.nn.init.normal_(pipe.unet.class_embedding.weight, std=2)
    options = {"guidance_scale": 2.0, "num_inference_steps": 6}
    together = images(pipe, batch_size=3, generator=seeded(5, 6, 7), class_labels=labels, **options)
    alone = [
        images(pipe, generator=[seeded(seed)], class_labels=label, **options)
        for seed, label in zip((5, 6, 7), labels, strict=True)
    ]
    # the convolutions add up in another order for another batch size
    torch.testing.assert_close(together, torch.cat(alone), atol=1e-3, rtol=0)
    other = images(pipe, batch_size=3, generator=seeded(5, 6, 7), class_labels=[2, 1, 1], **options)
    assert [(a - b).abs().max() > 1e-3 for a, b in zip(other, together, strict=True)] == [False, True, False]


# Labels


@pytest.mark.parametrize(
    "labels", ["one", ["one", "one"], [1, "one"], 1, np.int64(1), np.array([1, 1]), torch.tensor([1, 1]), (1, 1)]
)
def test_labels_are_numbers_or_names(labels):
    pipe = pipeline(TwoClasses(), id2label={0: "zero", 1: "one"})
    expected = images(pipe, batch_size=2, generator=seeded(0), class_labels=torch.tensor([1, 1]))
    assert torch.equal(images(pipe, batch_size=2, generator=seeded(0), class_labels=labels), expected)
    assert not torch.equal(images(pipe, batch_size=2, generator=seeded(0)), expected)


def test_without_labels_a_conditional_model_is_an_unconditional_one():
    conditional, plain = tiny_unet(num_class_embeds=3), tiny_unet()
    plain.load_state_dict(conditional.state_dict(), strict=False)
    with torch.no_grad():
        conditional.class_embedding.weight[3] = 0
    expected = images(pipeline(plain), generator=seeded(0))
    assert torch.equal(images(pipeline(conditional), generator=seeded(0)), expected)
    theirs = DDPMPipeline(unet=conditional, scheduler=DDPMScheduler())
    theirs.set_progress_bar_config(disable=True)
    assert theirs(num_inference_steps=2, output_type="np").images.shape == (1, 8, 8, 1)


@pytest.mark.parametrize(
    ("unet", "arguments"),
    [
        ({"num_class_embeds": 3}, {"class_labels": 3}),
        ({"num_class_embeds": 3}, {"class_labels": -1}),
        ({"num_class_embeds": 3}, {"class_labels": "three"}),
        ({"num_class_embeds": 3}, {"class_labels": [0, 1]}),
        ({}, {"class_labels": 0}),
        ({"num_class_embeds": 3}, {"guidance_scale": 2.0}),
        ({}, {"guidance_scale": 2.0}),
        ({"num_class_embeds": 3}, {"guidance_interval": (200, 800), "class_labels": 0}),
        ({"num_class_embeds": 3}, {"guidance_interval": (0.8, 0.2), "class_labels": 0}),
    ],
)
def test_bad_arguments_are_named(unet, arguments):
    with pytest.raises(ValueError, match=f"^{next(iter(arguments))} must be"):
        images(pipeline(tiny_unet(**unet), id2label=NAMES), **arguments)


def test_diffusers_unet_has_no_embedding_of_no_label():
    blocks = {"block_out_channels": (8, 8), "norm_num_groups": 4, "num_class_embeds": 3, "layers_per_block": 1}
    blocks |= {"down_block_types": ("DownBlock2D",) * 2, "up_block_types": ("UpBlock2D",) * 2}
    pipe = pipeline(UNet2DModel(sample_size=8, in_channels=1, out_channels=1, **blocks), id2label=NAMES)
    assert images(pipe, class_labels=2).shape == (1, 1, 8, 8)
    with pytest.raises(ValueError, match=r"^guidance_scale must be 1 without a guide"):
        images(pipe, class_labels=2, guidance_scale=2.0)


# Components


def guided_pipeline():
    return pipeline(guide=tiny_unet(num_class_embeds=3, block_out_channels=(8, 8)), id2label=NAMES)


def guided_images(pipe):
    pipe.set_progress_bar_config(disable=True)
    return images(pipe, generator=seeded(0), class_labels="two", guidance_scale=1.5)


def test_save_and_load_with_a_guide_and_names(tmp_path):
    pipe = guided_pipeline()
    pipe.save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    assert index["guide"] == ["unet", "MNISTUNet2DModel"]
    assert index["id2label"] == {"0": "zero", "1": "one", "2": "two"}
    loaded = [
        MNISTDDPMPipeline.from_pretrained(tmp_path),
        DiffusionPipeline.from_pretrained(tmp_path, trust_remote_code=True),
    ]
    assert type(loaded[0].guide) is MNISTUNet2DModel
    assert loaded[0].config.id2label == NAMES
    for other in loaded:
        torch.testing.assert_close(guided_images(other), guided_images(pipe), atol=1e-3, rtol=0)
    assert MNISTDDPMPipeline.from_pretrained(tmp_path, guide=None).guide is None


def test_without_them_a_saved_pipeline_is_as_it_was(tmp_path):
    pipeline(tiny_unet()).save_pretrained(tmp_path)
    assert not {"guide", "id2label"} & set(json.loads((tmp_path / "model_index.json").read_text()))
    loaded = MNISTDDPMPipeline.from_pretrained(tmp_path)
    assert loaded.guide is None
    loaded.guide = tiny_unet()
    assert images(loaded, guidance_scale=2.0).shape == (1, 1, 8, 8)


def test_push_and_download_with_a_guide_and_without(hub):
    pipe = guided_pipeline()
    pipe.push_to_hub(REPO, token=WRITER)
    published = set(hub.files(REPO))
    parts = ("config.json", "unet.py", "diffusion_pytorch_model.safetensors")
    assert {f"{name}/{file}" for name in ("unet", "guide") for file in parts} < published
    torch.testing.assert_close(
        guided_images(MNISTDDPMPipeline.from_pretrained(REPO)), guided_images(pipe), atol=1e-3, rtol=0
    )
    assert MNISTDDPMPipeline.from_pretrained(REPO, guide=None).guide is None

    card = hub.files(REPO)["README.md"].decode()
    assert "zero, one, two. " in card
    assert "## Guide\n" in card
    names = {}
    for code in re.findall(r"```python\n(.*?)^```$", card, re.DOTALL | re.MULTILINE):
        exec(code.replace("num_inference_steps=50", "num_inference_steps=2"), names)
    assert len(names["images"]) == 4
    hub.repos["models", REPO].commit({"README.md": b"own words"})
    pipe.push_to_hub(REPO, token=WRITER)
    assert hub.files(REPO)["README.md"] == b"own words"


def test_a_new_process_without_the_package_takes_labels_and_a_guide(tmp_path):
    pipe = guided_pipeline()
    pipe.save_pretrained(tmp_path)
    torch.save(guided_images(pipe), tmp_path / "expected.pt")
    code = f"""
import sys
sys.modules["mnist_ddpm"] = None
import torch
from diffusers import DiffusionPipeline
pipe = DiffusionPipeline.from_pretrained({str(tmp_path)!r}, trust_remote_code=True)
options = {{"class_labels": "two", "guidance_scale": 1.5, "num_inference_steps": 4, "output_type": "pt"}}
images = pipe(generator=torch.Generator().manual_seed(0), **options).images
torch.testing.assert_close(images, torch.load({str(tmp_path / "expected.pt")!r}), atol=1e-3, rtol=0)
"""
    subprocess.run([sys.executable, "-c", code], check=True, env=os.environ | {"HF_MODULES_CACHE": str(tmp_path)})


def test_from_pipe_takes_over_guide_and_names():
    pipe = guided_pipeline()
    other = MNISTDDPMPipeline.from_pipe(pipe)
    assert (other.unet, other.guide, other.config.id2label) == (pipe.unet, pipe.guide, NAMES)
    assert MNISTDDPMPipeline.from_pipe(pipe, guide=None).guide is None
    assert MNISTDDPMPipeline.from_pipe(DDPMPipeline(unet=pipe.unet, scheduler=DDPMScheduler())).guide is None
    assert torch.equal(guided_images(other), guided_images(pipe))


def test_a_guide_moves_with_the_pipeline():
    pipe = guided_pipeline()
    expected = guided_images(pipe)
    pipe.enable_model_cpu_offload(device="cpu")
    torch.testing.assert_close(guided_images(pipe), expected, atol=1e-5, rtol=0)
    pipe = guided_pipeline().to(torch.bfloat16)
    pipe.scheduler = diffusers.DPMSolverMultistepScheduler.from_config(pipe.scheduler.config)
    assert pipe.guide.dtype is torch.bfloat16
    assert guided_images(pipe).dtype is torch.float32


# The guide in docs/labels.md


def blocks(language):
    guide = Path(__file__).resolve().parent.parent / "docs" / "labels.md"
    return re.findall(rf"^```{language}\n(.*?)^```$", guide.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)


def test_the_code_of_the_guide_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    unet = tiny_unet(num_class_embeds=10)
    for name in ("conditional", "weaker"):
        pipeline(unet, id2label={n: str(n) for n in range(10)}).save_pretrained(name)
    monkeypatch.setattr(mnist_ddpm, "PRETRAINED_CONDITIONAL", tmp_path / "conditional")
    names = {}
    for code in blocks("python"):
        exec(code, names)
    assert (len(names["sevens"]), len(names["each"])) == (4, 10)
    assert names["pipe"].guide is not None
    assert names["plain"].guide is None


def test_the_commands_of_the_guide_have_flags_that_exist():
    lines = [line for block in blocks("bash") for line in block.splitlines()]
    for line in lines:
        _, script, *argv = shlex.split(line)
        importlib.import_module(Path(script).stem).parse_args(argv)
    assert len(lines) == 5
