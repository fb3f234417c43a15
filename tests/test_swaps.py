"""Schedulers swapped for those of diffusers and back: equal tables, equal loops, no warning, live and saved.

The cases cover every pair of values of the axes below. The tolerance of the tables is diffusers' float32 rounding; the
loops are compared on float64 samples, where what differs is the rounding of those tables.
"""

import inspect
import itertools
import json
import logging
import random
import warnings
from contextlib import contextmanager

import diffusers
import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, DDPMPipeline, UNet2DConditionModel
from test_pipeline import tiny_foreign_unet

from mnist_ddpm import MNISTDDIMScheduler, MNISTDDPMScheduler

OURS = {"ddpm": MNISTDDPMScheduler, "ddim": MNISTDDIMScheduler}
THEIRS = {"ddpm": diffusers.DDPMScheduler, "ddim": diffusers.DDIMScheduler}
STEPS = 10

AXES = {
    "kind": ["ddpm", "ddim"],
    "saved": [False, True],
    "beta_schedule": ["linear", "scaled_linear", "squaredcos_cap_v2", "sigmoid", "trained"],
    "prediction_type": ["epsilon", "sample", "v_prediction"],
    "clipping": ["clip", "wide clip", "threshold", "none"],
    "timestep_spacing": ["leading", "trailing", "linspace"],
    "steps_offset": [0, 1],
    "num_train_timesteps": [1000, 400, STEPS],
    "variance_type": ["fixed_small", "fixed_large", "learned_range"],
    "eta": [0.0, 0.5, 1.0],
    "use_clipped_model_output": [False, True],
    "set_alpha_to_one": [True, False],
    "rescale_betas_zero_snr": [False, True],
}
CLIPPING = {
    "clip": {"clip_sample": True},
    "wide clip": {"clip_sample": True, "clip_sample_range": 1.5},
    "threshold": {"thresholding": True, "dynamic_thresholding_ratio": 0.8, "sample_max_value": 1.7},
    "none": {"clip_sample": False},
}


def is_valid(case):
    """What diffusers can do, and does right; its faults are the subject of test_peer_faults.py."""
    pure_noise = case["timestep_spacing"] != "leading" or case["num_train_timesteps"] == STEPS
    if case["kind"] == "ddpm" and (case["eta"], case["use_clipped_model_output"], case["set_alpha_to_one"]) != (
        *(0.0, False, True),
    ):
        return False  # options of DDIM
    if case["kind"] == "ddim":
        if case["beta_schedule"] == "sigmoid" or case["variance_type"] != "fixed_small":
            return False  # options of DDPM
        if case["timestep_spacing"] == "linspace" and case["num_train_timesteps"] != STEPS:
            return False  # fault: the previous timestep is t - T // n
        if case["eta"] == 1 and pure_noise and case["beta_schedule"] == "squaredcos_cap_v2":
            return False  # fault: NaN
        if case["eta"] > 0 and not case["set_alpha_to_one"]:
            return False  # noise in the last step: test_peer_faults.py
    if case["rescale_betas_zero_snr"] and case["prediction_type"] == "epsilon" and pure_noise:
        return False  # fault: a division by zero
    return not (
        case["timestep_spacing"] == "leading" and case["steps_offset"] and case["num_train_timesteps"] == STEPS
    )


def pairwise_cases():
    """Cases, each drawn around a pair of values that no earlier one has, until every possible pair has one."""
    draw, cases, covered = random.Random(0), [], set()
    pairs = [
        ((a, x), (b, y)) for a, b in itertools.combinations(AXES, 2) for x, y in itertools.product(AXES[a], AXES[b])
    ]
    for pair in pairs:
        if pair in covered:
            continue
        for _ in range(400):  # pairs that are impossible, like DDPM with eta = 1, find no case
            case = {axis: draw.choice(values) for axis, values in AXES.items()} | dict(pair)
            if is_valid(case):
                cases.append(case)
                covered |= set(itertools.combinations(case.items(), 2))
                break
    return cases


CASES = pairwise_cases()


def config_of(case):
    """The arguments of diffusers' scheduler."""
    keys = ["prediction_type", "timestep_spacing", "steps_offset", "num_train_timesteps", "rescale_betas_zero_snr"]
    config = {key: case[key] for key in keys} | CLIPPING[case["clipping"]]
    # betas of one total for every T, so that the chain ends near pure noise
    scale = 1000 / case["num_train_timesteps"]
    config |= {"beta_start": min(1e-4 * scale, 0.01), "beta_end": min(2e-2 * scale, 0.7)}
    if case["beta_schedule"] == "trained":
        config["trained_betas"] = np.linspace(0.001, config["beta_end"], case["num_train_timesteps"]).tolist()
    else:
        config["beta_schedule"] = case["beta_schedule"]
    config |= {"set_alpha_to_one": case["set_alpha_to_one"]} if case["kind"] == "ddim" else {}
    config |= {"variance_type": case["variance_type"]} if case["kind"] == "ddpm" else {}
    return config


@contextmanager
def no_warning():
    """Fail on any warning, of Python or in diffusers' log."""
    records = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = records.append
    logger = logging.getLogger("diffusers")
    logger.addHandler(handler)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            warnings.simplefilter("ignore", DeprecationWarning)  # NumPy's, of how some of them copy tensors
            yield
    finally:
        logger.removeHandler(handler)
    assert not [record.getMessage() for record in records]


def swap(target, scheduler, saved, tmp_path=None):
    """`target.from_config` of a live scheduler, or of its saved config."""
    with no_warning():
        if not saved:
            return target.from_config(scheduler.config)
        scheduler.save_pretrained(tmp_path)
        return target.from_config(json.loads((tmp_path / "scheduler_config.json").read_text()))


def run(scheduler, case):
    """The x_prev of each step of a loop with a model that depends on x and t, and the last x0_hat."""
    scheduler.set_timesteps(STEPS)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 2, 3, 3, generator=generator, dtype=torch.float64)
    learned = case["variance_type"] == "learned_range"
    options = {key: case[key] for key in ("eta", "use_clipped_model_output")} if case["kind"] == "ddim" else {}
    trace = []
    for t in scheduler.timesteps:
        output = 0.9 * torch.sin(x + 0.01 * t)
        output = torch.cat([output, torch.cos(x)], dim=1) if learned else output
        output = output.float()  # diffusers draws noise in this dtype, ours in float32
        out = scheduler.step(output, t, x, generator=generator, **options)
        x = out.prev_sample
        trace.append(x)
    # diffusers draws noise in a last step that is not t = 0 (test_peer_faults.py): compare x0_hat there
    trace[-1] = out.pred_original_sample if scheduler.timesteps[-1] > 0 else trace[-1]
    return trace


def agree(a, b):
    """Whether two traces are equal, up to the rounding of float32 tables."""
    return all(((x - y).abs().max() <= 5e-5 * y.abs().max()).item() for x, y in zip(a, b, strict=True))


def same_tables(ours, theirs):
    return (
        ours.timesteps.equal(theirs.timesteps)
        and torch.allclose(ours.betas.float(), theirs.betas, rtol=0, atol=5e-6)
        and torch.allclose(ours.alphas_cumprod.float(), theirs.alphas_cumprod, rtol=0, atol=2e-6)
    )


@pytest.mark.parametrize("case", CASES, ids=range(len(CASES)))
def test_swap_table(case, tmp_path):
    theirs = THEIRS[case["kind"]](**config_of(case))
    ours = swap(OURS[case["kind"]], theirs, case["saved"], tmp_path)
    expected = run(theirs, case)
    assert agree(run(ours, case), expected)
    assert same_tables(ours, theirs)
    back = swap(THEIRS[case["kind"]], ours, case["saved"], tmp_path)
    assert agree(run(back, case), expected)
    # and on through the other of our two classes
    if case["variance_type"] != "learned_range":
        other = swap(OURS["ddim" if case["kind"] == "ddpm" else "ddpm"], ours, case["saved"], tmp_path)
        again = swap(OURS[case["kind"]], other, not case["saved"], tmp_path)
        assert agree(run(again, case), expected)


# Configs


def test_our_own_defaults():
    """Those of diffusers, but for the spacing, which begins at pure noise; DDIM's variance_type is our own."""
    for kind, ours in OURS.items():
        theirs = dict(THEIRS[kind]().config)
        expected = theirs | {"timestep_spacing": "trailing", "variance_type": "fixed_small"}
        config = ours(1000).config  # by position: a default as well
        assert {k: v for k, v in config.items() if k[0] != "_"} == {k: v for k, v in expected.items() if k[0] != "_"}
    assert diffusers.DDPMScheduler.from_config(MNISTDDPMScheduler(500).config).config.num_train_timesteps == 500


def test_aliases_are_understood_in_configs():
    config = {"_class_name": "MNISTDDPMScheduler", "beta_schedule": "cosine", "simple_var": True}
    scheduler = MNISTDDIMScheduler.from_config(config)
    assert (scheduler.config.beta_schedule, scheduler.config.variance_type) == ("squaredcos_cap_v2", "fixed_large")
    assert "simple_var" not in scheduler.config
    assert scheduler.config.timestep_spacing == "trailing"  # our own default
    for simple_var in (False, True):
        config = MNISTDDPMScheduler().config
        assert MNISTDDPMScheduler.from_config(config, simple_var=simple_var).simple_var is simple_var


@pytest.mark.parametrize(
    ("name", "config"),
    [
        ("variance_type", {"variance_type": "learned"}),
        ("variance_type", {"variance_type": "fixed_small_log"}),
        ("beta_schedule", {"beta_schedule": "laplace"}),
        ("prediction_type", {"prediction_type": "flow_prediction"}),
        *(("_class_name", {"_class_name": name}) for name in ("FlowMatchEulerDiscreteScheduler", "utils", 5)),
    ],
)
def test_configs_that_are_not_supported_are_rejected(name, config):
    for target in OURS.values():
        with pytest.raises(ValueError, match=name):
            target.from_config({"_class_name": "DDPMScheduler", **config})


NAMES = ["DDPM", "DDIM", "DDIMInverse", "DPMSolverMultistep", "UniPCMultistep", "HeunDiscrete", "PNDM"]


@pytest.mark.parametrize("saved", [False, True])
@pytest.mark.parametrize("kind", OURS)
@pytest.mark.parametrize("name", NAMES)
def test_swaps_with_other_schedulers_keep_every_value(name, kind, saved, tmp_path):
    other_class = getattr(diffusers, f"{name}Scheduler")
    values = {"num_train_timesteps": 500, "beta_schedule": "cosine", "prediction_type": "v_prediction"}
    values |= {"clip_sample": False, "timestep_spacing": "trailing", "simple_var": True, "steps_offset": 1}
    ours = OURS[kind](**values)
    other = swap(other_class, ours, saved, tmp_path)
    assert torch.allclose(other.betas, ours.betas.float(), rtol=1e-4, atol=1e-7)
    for target in OURS.values():
        back = swap(target, other, saved, tmp_path)
        shared = [key for key in back.config if key in ours.config and not key.startswith("_")]
        assert len(shared) >= 15
        assert {key: back.config[key] for key in shared} == {key: ours.config[key] for key in shared}


@pytest.mark.parametrize("name", ["DDPM", "DDIM", "EulerDiscrete", "PNDM", "DPMSolverMultistep", "UniPCMultistep"])
def test_live_and_saved_configs_of_others_give_the_same(name, tmp_path):
    other = getattr(diffusers, f"{name}Scheduler")(beta_schedule="scaled_linear")
    for target in OURS.values():
        live, saved = (swap(target, other, saved, tmp_path) for saved in (False, True))
        bare = target.from_config(
            {"_class_name": f"{name}Scheduler", "beta_schedule": "scaled_linear"}
        )  # keys missing
        for key in inspect.signature(target).parameters.keys() - {"simple_var"}:
            assert live.config[key] == saved.config[key] == bare.config[key], key
            if other.config.get(key) is not None:  # DPM-Solver has a variance_type of None
                assert live.config[key] == other.config[key], key


def test_ddim_keeps_a_learned_variance_for_ddpm():
    config = diffusers.DDPMScheduler(variance_type="learned_range").config
    learned, fixed = (
        MNISTDDIMScheduler.from_config(config),
        MNISTDDIMScheduler.from_config({**config, "variance_type": "fixed_small"}),
    )
    case = {"kind": "ddim", "eta": 1.0, "use_clipped_model_output": False, "variance_type": "fixed_small"}
    assert agree(run(learned, case), run(fixed, case))
    assert MNISTDDPMScheduler.from_config(learned.config).config.variance_type == "learned_range"


def test_ddim_honors_the_variance_type_that_diffusers_ddim_ignores():
    """A departure: with eta above 0 a config of fixed_large means sigma-hat, and not the posterior's variance."""
    config = diffusers.DDPMScheduler(variance_type="fixed_large", clip_sample=False).config
    ours, theirs = MNISTDDIMScheduler.from_config(config), diffusers.DDIMScheduler.from_config(config)
    case = {"kind": "ddim", "use_clipped_model_output": False, "variance_type": "fixed_large"}
    assert agree(run(ours, case | {"eta": 0.0}), run(theirs, case | {"eta": 0.0}))
    assert not agree(run(ours, case | {"eta": 1.0}), run(theirs, case | {"eta": 1.0}))


# Pipelines


def stable_diffusion(pipeline_class, scheduler):
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 16),
        layers_per_block=1,
        cross_attention_dim=8,
        norm_num_groups=4,
        attention_head_dim=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
    )
    vae = AutoencoderKL(
        block_out_channels=(8, 8),
        norm_num_groups=4,
        latent_channels=4,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
    )
    pipe = pipeline_class(
        vae, None, None, unet, scheduler, safety_checker=None, feature_extractor=None, requires_safety_checker=False
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


SD_CONFIG = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}
SD_CONFIG |= {"clip_sample": False}


@pytest.mark.parametrize("kwargs", [{}, {"variance_type": "fixed_large"}, {"beta_schedule": "squaredcos_cap_v2"}])
def test_ddpm_pipeline_gives_the_same_images(kwargs):
    pipe = DDPMPipeline(tiny_foreign_unet(), diffusers.DDPMScheduler(**kwargs))
    pipe.set_progress_bar_config(disable=True)

    def images():
        return pipe(2, generator=torch.Generator().manual_seed(0), num_inference_steps=10, output_type="np").images

    expected = images()
    for target in (MNISTDDPMScheduler, MNISTDDIMScheduler):
        pipe.scheduler = target.from_config(pipe.scheduler.config)
        assert images().shape == expected.shape
        if target is MNISTDDPMScheduler:
            np.testing.assert_allclose(images(), expected, atol=1e-4)


@pytest.mark.parametrize("kind", OURS)
@pytest.mark.parametrize("name", ["StableDiffusionPipeline", "StableDiffusionImg2ImgPipeline"])
def test_stable_diffusion_gives_the_same_images(name, kind):
    pipe = stable_diffusion(getattr(diffusers, name), THEIRS[kind](**SD_CONFIG))
    torch.manual_seed(1)
    embeds = torch.randn(1, 4, 8)
    kwargs = {"prompt_embeds": embeds, "negative_prompt_embeds": -embeds, "num_inference_steps": 5}
    kwargs |= (
        {"image": torch.rand(1, 3, 16, 16), "strength": 0.8} if "Img2Img" in name else {"height": 16, "width": 16}
    )
    for eta in (0.0, 1.0):

        def images(eta=eta):
            return pipe(**kwargs, eta=eta, generator=torch.Generator().manual_seed(0), output_type="np").images

        pipe.scheduler = THEIRS[kind].from_config(pipe.scheduler.config)
        expected = images()
        with no_warning():
            pipe.scheduler = OURS[kind].from_config(pipe.scheduler.config)
        np.testing.assert_allclose(images(), expected, atol=1e-4)


def test_a_pipeline_that_rewrites_the_config_is_obeyed():
    """Stable Diffusion sets steps_offset and clip_sample in the config of the scheduler that it is given."""
    scheduler = MNISTDDIMScheduler(timestep_spacing="leading")
    with pytest.warns(FutureWarning, match="steps_offset|clip_sample"):
        stable_diffusion(diffusers.StableDiffusionPipeline, scheduler)
    scheduler.set_timesteps(5)
    assert scheduler.timesteps.tolist() == [801, 601, 401, 201, 1]
    x = torch.full((1, 1, 2, 2), 3.0)
    assert scheduler.step(torch.zeros_like(x), 801, x).pred_original_sample.min() > 3


def test_ddim_pipeline_runs():
    """It rebuilds its scheduler as diffusers' own DDIM, from our config without a warning."""
    with no_warning():
        pipe = diffusers.DDIMPipeline(tiny_foreign_unet(), MNISTDDIMScheduler(beta_schedule="cosine"))
    pipe.set_progress_bar_config(disable=True)
    assert pipe.scheduler.config.beta_schedule == "squaredcos_cap_v2"
    assert pipe(num_inference_steps=3, output_type="np").images.shape == (1, 8, 8, 1)
