import logging
import warnings

import diffusers
import numpy as np
import pytest
import torch
from diffusers import ConfigMixin, DDIMScheduler, DDPMPipeline, DDPMScheduler, ModelMixin, PNDMScheduler, UNet2DModel
from diffusers.callbacks import PipelineCallback
from diffusers.configuration_utils import register_to_config
from diffusers.models.unets.unet_2d import UNet2DOutput

from mnist_ddpm import MNISTDDIMScheduler, MNISTDDPMPipeline, MNISTDDPMScheduler, MNISTUNet2DModel

MEAN, STD = 0.3, 0.2
FOREIGN_SCHEDULERS = [
    "DDPMScheduler",
    "DDIMScheduler",
    "PNDMScheduler",
    "DPMSolverMultistepScheduler",
    "DPMSolverSinglestepScheduler",
    "UniPCMultistepScheduler",
    "DEISMultistepScheduler",
    "EulerDiscreteScheduler",
    "EulerAncestralDiscreteScheduler",
    "HeunDiscreteScheduler",
    "KDPM2DiscreteScheduler",
    "LMSDiscreteScheduler",
    "SASolverScheduler",
]
SCHEDULERS = [
    MNISTDDPMScheduler,
    MNISTDDIMScheduler,
    *(getattr(diffusers, name) for name in FOREIGN_SCHEDULERS),
]


class GaussianOracle(ModelMixin, ConfigMixin):
    """The best predictor of the noise where the data is N(MEAN, STD^2), on linear betas of 1000 steps."""

    @register_to_config
    def __init__(self, sample_size: int = 8, in_channels: int = 1):
        super().__init__()
        self.anchor = torch.nn.Parameter(torch.zeros(()))  # gives the model a dtype and a device
        alpha_bars = torch.cumprod(1 - torch.linspace(1e-4, 2e-2, 1000, dtype=torch.float64), 0)
        # log of the noise-to-signal ratio: schedulers with fractional timesteps interpolate it linearly
        self.log_ratios = 0.5 * ((1 - alpha_bars) / alpha_bars).log()

    def forward(self, sample, timestep):
        log_ratio = np.interp(float(timestep), np.arange(1000), self.log_ratios)
        alpha_bar = 1 / (1 + np.exp(2 * log_ratio))
        variance = alpha_bar * STD**2 + 1 - alpha_bar
        return UNet2DOutput(sample=(1 - alpha_bar) ** 0.5 * (sample - alpha_bar**0.5 * MEAN) / variance)


def tiny_unet(**kwargs):
    """A small U-Net whose output is not zero."""
    torch.manual_seed(0)
    unet = MNISTUNet2DModel(
        **{"sample_size": 8, "block_out_channels": (8, 16), "layers_per_block": 1, "attention_head_dim": 8} | kwargs
    )
    for weight in unet.parameters():
        torch.nn.init.normal_(weight, std=0.1)
    return unet.eval()


def tiny_foreign_unet(**kwargs):
    torch.manual_seed(0)
    blocks = {"down_block_types": ("DownBlock2D", "DownBlock2D"), "up_block_types": ("UpBlock2D", "UpBlock2D")}
    sizes = {"block_out_channels": (8, 16), "layers_per_block": 1, "norm_num_groups": 4}
    return UNet2DModel(**{"sample_size": 8, "in_channels": 1, "out_channels": 1} | blocks | sizes | kwargs).eval()


def pipeline(scheduler=None, unet=None):
    pipe = MNISTDDPMPipeline(unet=unet or tiny_unet(), scheduler=scheduler or MNISTDDIMScheduler())
    pipe.set_progress_bar_config(disable=True)
    return pipe


def seeded(*seeds):
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    return generators if len(seeds) > 1 else generators[0]


def images(pipe, **kwargs):
    return pipe(**{"num_inference_steps": 4, "output_type": "pt"} | kwargs).images


# What it samples


@pytest.mark.parametrize("scheduler", SCHEDULERS, ids=lambda cls: cls.__name__)
def test_samples_the_distribution_that_the_model_knows(scheduler):
    # 64 x 64 independent pixels: standard errors of 0.003 (mean) and 0.002 (deviation). The rest is discretization:
    # DDPM with the posterior variance converges most slowly, and still lacks 0.017 of the deviation at 200 steps.
    config = MNISTDDPMScheduler(clip_sample=False).config
    pipe = pipeline(scheduler.from_config(config), GaussianOracle())
    x_0 = images(pipe, batch_size=64, generator=seeded(0), num_inference_steps=200) * 2 - 1
    assert x_0.mean().item() == pytest.approx(MEAN, abs=0.01)
    assert x_0.std().item() == pytest.approx(STD, abs=0.02)


@pytest.mark.parametrize("size", [8, (4, 8)])
def test_size_and_channels_come_from_the_unet(size):
    pipe = pipeline(unet=tiny_unet(sample_size=size, in_channels=3, out_channels=3))
    height, width = (size, size) if isinstance(size, int) else size
    assert images(pipe, batch_size=2).shape == (2, 3, height, width)


def visited(pipe, **kwargs):
    steps = []
    images(pipe, callback_on_step_end=lambda pipe, i, t, tensors: steps.append((i, int(t))) or {}, **kwargs)
    return steps


def test_all_training_steps_or_those_that_are_given():
    pipe = pipeline(MNISTDDPMScheduler(num_train_timesteps=3))
    assert visited(pipe, num_inference_steps=None) == [(0, 2), (1, 1), (2, 0)]
    given = visited(pipeline(), num_inference_steps=None, timesteps=[900, 500, 20])
    assert given == [(0, 900), (1, 500), (2, 20)]


# Randomness


@pytest.mark.parametrize("scheduler", [MNISTDDPMScheduler, diffusers.EulerAncestralDiscreteScheduler])
def test_each_image_is_a_function_of_its_own_seed(scheduler):
    pipe = pipeline(scheduler())
    together = images(pipe, batch_size=3, generator=seeded(5, 6, 7))
    alone = [images(pipe, generator=[seeded(seed)]) for seed in (5, 6, 7)]
    # the convolutions add up in another order for another batch size
    torch.testing.assert_close(together, torch.cat(alone), atol=1e-5, rtol=0)
    assert (together[0] - together[1]).abs().max() > 0.01


def test_latents_are_the_noise_that_sampling_starts_from():
    pipe = pipeline()
    latents = torch.randn(2, 1, 8, 8, generator=seeded(3))
    torch.testing.assert_close(
        images(pipe, batch_size=2, latents=latents), images(pipe, batch_size=2, generator=seeded(3)), atol=0, rtol=0
    )


def test_ddim_with_all_the_noise_is_ddpm_where_both_use_the_clipped_image():
    """DDIM, section 5; what is drawn is the same, so that the images are, up to rounding."""
    ddpm, ddim = pipeline(MNISTDDPMScheduler()), pipeline(MNISTDDIMScheduler())
    expected = images(ddpm, generator=seeded(4))
    agreed = images(ddim, generator=seeded(4), eta=1.0, use_clipped_model_output=True)
    torch.testing.assert_close(agreed, expected, atol=1e-4, rtol=0)
    plain = images(ddim, generator=seeded(4), eta=1.0, use_clipped_model_output=False)
    assert (plain - expected).abs().max() > 0.01, "something was clipped"


def test_calls_do_not_disturb_each_other():
    # keeps the model outputs of earlier steps; predicted samples stay within the range of images
    pipe = pipeline(diffusers.DPMSolverMultistepScheduler(prediction_type="sample"))
    before = dict(vars(pipe.scheduler))
    first = images(pipe, generator=seeded(0))
    interrupted = images(pipe, generator=seeded(0), callback_on_step_end=interrupt_after(1))
    torch.testing.assert_close(images(pipe, generator=seeded(0)), first, atol=0, rtol=0)
    assert (interrupted - first).abs().max() > 0.01
    assert all(vars(pipe.scheduler)[name] is value for name, value in before.items())


# What it returns


def test_output_types_show_the_same_images():
    pipe = pipeline()
    pt, array, pil = (images(pipe, batch_size=2, generator=seeded(0), output_type=o) for o in ("pt", "np", "pil"))
    assert pt.min() >= 0
    assert pt.max() <= 1
    np.testing.assert_array_equal(array, pt.permute(0, 2, 3, 1).numpy())
    assert [image.mode for image in pil] == ["L", "L"]
    np.testing.assert_array_equal(np.stack(pil), (array[..., 0] * 255).round().astype(np.uint8))
    (as_tuple,) = pipe(2, seeded(0), num_inference_steps=4, return_dict=False)
    assert [image.tobytes() for image in as_tuple] == [image.tobytes() for image in pil]


def test_three_channels_are_rgb_and_two_have_no_pil_mode():
    rgb = pipeline(unet=tiny_unet(in_channels=3, out_channels=3))
    assert images(rgb, output_type="pil")[0].mode == "RGB"
    two = pipeline(unet=tiny_unet(in_channels=2, out_channels=2))
    assert images(two, output_type="np").shape == (1, 8, 8, 2)
    with pytest.raises(ValueError, match="output_type"):
        images(two, output_type="pil")


@pytest.mark.parametrize("scheduler", [MNISTDDPMScheduler, diffusers.EulerAncestralDiscreteScheduler])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_same_noise_in_every_dtype(dtype, scheduler):
    """Of the start and of each step: bfloat16 keeps 8 bits of a prediction, float64 all that float32 has."""
    pipe = pipeline(scheduler())
    expected = images(pipe, generator=seeded(0))
    sampled = images(pipe.to(dtype), generator=seeded(0))
    assert sampled.dtype == torch.float32
    torch.testing.assert_close(sampled, expected, atol=1e-4 if dtype == torch.float64 else 0.1, rtol=0)


def test_float64_latents_are_sampled_in_float64():
    latents = torch.randn(1, 1, 8, 8, generator=seeded(3), dtype=torch.float64)
    pipe = pipeline().to(torch.float64)
    sampled = images(pipe, latents=latents)
    assert sampled.dtype == torch.float64
    torch.testing.assert_close(images(pipe, latents=latents.float()).double(), sampled, atol=1e-4, rtol=0)


# A learned variance


FIXED, LEARNED = (MNISTDDPMScheduler(variance_type=kind).config for kind in ("fixed_small", "learned_range"))


@pytest.mark.parametrize(
    ("scheduler", "channels"),
    [*((name, 1) for name in (*FOREIGN_SCHEDULERS, "DDIMParallelScheduler")), ("DPMSolverMultistepScheduler", 4)],
)
def test_models_with_a_learned_variance_with_any_scheduler(scheduler, channels):
    unet = tiny_unet(in_channels=channels, out_channels=2 * channels)
    pipe = pipeline(getattr(diffusers, scheduler).from_config(LEARNED), unet)
    assert images(pipe).shape == (1, channels, 8, 8)


@pytest.mark.parametrize("steps", [1, 4])
@pytest.mark.parametrize("scheduler", ["DDIMScheduler", "EulerDiscreteScheduler"])
def test_schedulers_that_read_no_variance_get_the_mean(scheduler, steps):
    """The images are those of a model with the first half of the outputs, and the scheduler's config is untouched."""
    both = tiny_unet(out_channels=2)
    mean = tiny_unet()
    state = both.state_dict()
    for name, weight in mean.state_dict().items():  # the last layers are the only ones whose sizes differ
        state[name] = state[name][: len(weight)]
    mean.load_state_dict(state)
    scheduler = getattr(diffusers, scheduler)
    pipe, plain = pipeline(scheduler.from_config(LEARNED), both), pipeline(scheduler.from_config(FIXED), mean)
    sampled, expected = (images(p, generator=seeded(0), num_inference_steps=steps) for p in (pipe, plain))
    torch.testing.assert_close(sampled, expected, atol=1e-5, rtol=0)
    assert pipe.scheduler.config.variance_type == "learned_range"


@pytest.mark.parametrize("scheduler", ["DDPMScheduler", "DDPMParallelScheduler"])
def test_ddpm_reads_the_variance(scheduler):
    unet = tiny_unet(out_channels=2)
    ours = images(pipeline(MNISTDDPMScheduler.from_config(LEARNED), unet), generator=seeded(0))
    theirs = images(pipeline(getattr(diffusers, scheduler).from_config(LEARNED), unet), generator=seeded(0))
    torch.testing.assert_close(theirs, ours, atol=1e-3, rtol=0)  # the tables of diffusers are float32


# Callback


def interrupt_after(step):
    def callback(pipe, i, t, tensors):
        pipe._interrupt = i == step
        return tensors

    return callback


def test_callback_edits_the_sample_and_sees_the_predicted_image():
    seen = []

    def paint(run, i, t, tensors):
        assert (run.num_timesteps, len(run.scheduler.timesteps), run.unet) == (4, 4, pipe.unet)
        seen.append((i, tensors))
        return {"latents": torch.full_like(tensors["latents"], 0.5)} if i == 3 else tensors

    pipe, names = pipeline(), ["latents", "pred_original_sample"]
    painted = images(pipe, callback_on_step_end=paint, callback_on_step_end_tensor_inputs=names)
    torch.testing.assert_close(painted, torch.full((1, 1, 8, 8), 0.75))
    assert [(i, *tensors) for i, tensors in seen] == [(i, *names) for i in range(4)]
    # DDIM's last step lands on the predicted x_0
    torch.testing.assert_close(seen[3][1]["pred_original_sample"], seen[3][1]["latents"], atol=1e-5, rtol=0)


def test_callback_may_end_the_call():
    pipe = pipeline()
    first = visited(pipe)[:2]
    steps = []
    stop = interrupt_after(1)
    images(pipe, callback_on_step_end=lambda pipe, i, t, x: steps.append((i, int(t))) or stop(pipe, i, t, x))
    assert steps == first
    assert not pipe._interrupt


def test_official_callbacks_bring_their_own_tensor_inputs():
    class Invert(PipelineCallback):
        tensor_inputs = ("latents", "pred_original_sample")

        def callback_fn(self, pipeline, step_index, timestep, callback_kwargs):
            return {"latents": -callback_kwargs["pred_original_sample"]}

    pipe = pipeline()
    plain, inverted = (
        images(pipe, generator=seeded(0), num_inference_steps=1, callback_on_step_end=callback)
        for callback in (None, Invert(0.5))
    )
    torch.testing.assert_close(inverted, 1 - plain)


# Components


def test_from_pipe_takes_over_either_unet():
    ours = pipeline()
    assert MNISTDDPMPipeline.from_pipe(ours).unet is ours.unet
    foreign = DDPMPipeline(unet=tiny_foreign_unet(), scheduler=DDPMScheduler())
    pipe = MNISTDDPMPipeline.from_pipe(foreign, scheduler=MNISTDDIMScheduler())
    assert pipe.unet is foreign.unet
    assert isinstance(pipe.scheduler, MNISTDDIMScheduler)


@pytest.mark.parametrize(
    "prepare",
    [
        lambda pipe: pipe.enable_model_cpu_offload(device="cpu"),
        lambda pipe: pipe.enable_group_offload(onload_device=torch.device("cpu"), offload_type="leaf_level"),
        lambda pipe: setattr(pipe, "unet", torch.compile(pipe.unet, backend="eager")),
    ],
    ids=["model offload", "group offload", "compiled"],
)
def test_offloaded_and_compiled_models_give_the_same_images(prepare):
    pipe = pipeline()
    expected = images(pipe, generator=seeded(0))
    prepare(pipe)
    torch.testing.assert_close(images(pipe, generator=seeded(0)), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("unet", [tiny_unet, tiny_foreign_unet])
def test_save_and_load(tmp_path, unet):
    pipe = pipeline(MNISTDDPMScheduler(num_train_timesteps=100), unet())
    pipe.save_pretrained(tmp_path)
    loaded = MNISTDDPMPipeline.from_pretrained(tmp_path)
    assert loaded.scheduler.config.num_train_timesteps == 100
    assert type(loaded.unet) is type(pipe.unet)
    loaded.set_progress_bar_config(disable=True)
    # memory-mapped weights are not aligned, which changes the order of sums
    torch.testing.assert_close(
        images(loaded, generator=seeded(0)), images(pipe, generator=seeded(0)), atol=1e-4, rtol=0
    )
    assert MNISTDDPMPipeline.from_pretrained(tmp_path, dtype=torch.bfloat16).unet.dtype is torch.bfloat16


# Arguments


def test_numpy_numbers_are_numbers():
    arguments = {"batch_size": 2, "num_inference_steps": 5, "eta": 0.5}
    from_numpy = {"batch_size": np.int64(2), "num_inference_steps": np.int64(5), "eta": np.float32(0.5)}
    torch.testing.assert_close(
        images(pipeline(), generator=seeded(0, 1), **from_numpy),
        images(pipeline(), generator=seeded(0, 1), **arguments),
    )


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("batch_size", {"batch_size": 0}),
        ("batch_size", {"batch_size": 3, "generator": seeded(0, 1)}),
        ("batch_size", {"batch_size": 2, "generator": [seeded(0)]}),
        ("batch_size", {"latents": torch.zeros(2, 1, 8, 8)}),
        ("noise_scale", {"noise_scale": 1.0}),
        ("output_type", {"output_type": "jpeg"}),
    ],
)
def test_bad_arguments_are_named(name, arguments):
    with pytest.raises(ValueError, match=f"^{name} must be"):
        images(pipeline(), **arguments)


def test_options_of_another_scheduler_are_rejected():
    with pytest.raises(ValueError, match=r"^eta must be"):
        images(pipeline(MNISTDDPMScheduler()), eta=0.0)
    with pytest.raises(ValueError, match=r"^timesteps must be"):
        images(pipeline(PNDMScheduler()), num_inference_steps=None, timesteps=[9, 7, 5, 1])
    with pytest.raises(RuntimeError, match=r"^sample must be finite.* eta"):
        images(pipeline(DDIMScheduler()), eta=2.0)


FLOW = {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}


@pytest.mark.parametrize(
    "scheduler",
    [
        diffusers.FlowMatchEulerDiscreteScheduler(),
        diffusers.DPMSolverMultistepScheduler(**FLOW),
        diffusers.UniPCMultistepScheduler(**FLOW),
        diffusers.EDMEulerScheduler(),
        diffusers.CMStochasticIterativeScheduler(),
        diffusers.IPNDMScheduler(),
        diffusers.RePaintScheduler(),
        PNDMScheduler(),
    ],
    ids=lambda scheduler: type(scheduler).__name__,
)
def test_schedulers_for_other_models_and_steps_are_rejected(scheduler):
    with pytest.raises(ValueError, match=r"^scheduler must be .* in 3 steps. Use DDPM"):
        images(pipeline(scheduler), num_inference_steps=3)


@pytest.mark.parametrize("karras", [False, True])
def test_heun_in_few_steps_is_right_or_says_what_to_do(karras):
    """The noise level falls from 20,291 to 6.4 in the first of 10 steps, on cosine betas."""
    config = MNISTDDPMScheduler(beta_schedule="cosine", clip_sample=False).config
    pipe = pipeline(diffusers.HeunDiscreteScheduler.from_config(config, use_karras_sigmas=karras))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        images(pipe, num_inference_steps=10)
        images(pipe, num_inference_steps=50)
    assert ["use_karras_sigmas=True" in str(w.message) for w in caught if "Heun" in str(w.message)] == [True][karras:]


def test_nan_is_an_error_that_names_the_weight_or_the_step():
    unet = tiny_unet()
    with torch.no_grad():
        unet.conv_in.bias[0] = float("nan")
    with pytest.raises(RuntimeError, match=r"^sample must be finite.* step 1 of 4 .*conv_in.bias"):
        images(pipeline(unet=unet))

    def spoil(pipe, i, t, tensors):
        return {"latents": tensors["latents"] * float("nan")} if i == 2 else tensors

    with pytest.raises(RuntimeError, match=r"^sample must be finite.* step 3 of 4 .*dtype"):
        images(pipeline(DDIMScheduler()), callback_on_step_end=spoil)
    # infinity that is clipped to [-1, 1] would pass for an image
    unet = tiny_unet()
    unet.conv_out.register_forward_hook(lambda module, args, output: torch.full_like(output, float("inf")))
    with pytest.raises(RuntimeError, match=r"^sample must be finite"):
        images(pipeline(MNISTDDPMScheduler(prediction_type="sample"), unet))


def test_no_warning_of_modules_to_keep_in_float32(caplog):
    logger = logging.getLogger("diffusers")
    logger.addHandler(caplog.handler)
    try:
        pipeline().to(torch.bfloat16)
    finally:
        logger.removeHandler(caplog.handler)
    assert "float32" not in caplog.text
