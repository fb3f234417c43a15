"""The pipeline, searched: any arguments give the images that they ask for, or an error that names what is wrong."""

import math

import diffusers
import numpy as np
import pytest
import torch
from hypothesis import strategies as st
from PIL import Image
from strategies import NO_NUMBERS, arguments, attempt, searched

from mnist_ddpm import MNISTDDIMScheduler, MNISTDDPMPipeline, MNISTDDPMScheduler, MNISTUNet2DModel

T = 20
SIZE = {"sample_size": (4, 8), "in_channels": 3, "out_channels": 3}
SCHEDULERS = {
    "ddpm": MNISTDDPMScheduler(num_train_timesteps=T),
    "ddim": MNISTDDIMScheduler(num_train_timesteps=T),
    "euler_ancestral": diffusers.EulerAncestralDiscreteScheduler(num_train_timesteps=T),
}
AMOUNTS = {"ddpm": "noise_scale", "ddim": "eta", "euler_ancestral": None}


def make_unet():
    """A small U-Net whose output is not zero."""
    torch.manual_seed(0)
    unet = MNISTUNet2DModel(**SIZE, patch_size=1, block_out_channels=(8, 8), layers_per_block=1, attention_head_dim=8)
    for weight in unet.parameters():
        torch.nn.init.normal_(weight, std=0.1)
    return unet.eval()


UNET = make_unet()


def visits(n):
    return st.sets(st.integers(0, T - 1), min_size=1, max_size=n).map(lambda ts: sorted(ts, reverse=True))


def callback(pipe, i, t, tensors):
    """Turn the sample around."""
    return {"latents": -tensors["latents"]}


GOOD = {
    "batch_size": st.integers(1, 3),
    "amount": st.floats(0, 1) | st.sampled_from([0, 1]),
    "output_type": st.sampled_from(["pil", "np", "pt"]),
    "return_dict": st.booleans(),
    "callback_on_step_end": st.sampled_from([None, callback]),
    "callback_on_step_end_tensor_inputs": st.sampled_from([["latents"], ("latents", "pred_original_sample")]),
}
NO_COUNTS = [*NO_NUMBERS[1:], math.inf, -1, 0, 1.5, True, 10**12, 10**400]
BAD = {
    "batch_size": [None, *NO_COUNTS],
    "amount": [*NO_NUMBERS[1:], math.inf, -1, 1001, 10**400],
    "output_type": [None, "jpeg", 1, [], ["pil"], "PIL"],
    "callback_on_step_end": [1, "callback", [callback]],
    "callback_on_step_end_tensor_inputs": [None, "latents", 5, ["prompt"], [None], [[]], {"latents": 1}],
    "generator": [5, "cpu", [], [torch.Generator()] * 9, [None, 5], (torch.Generator(),), True],
    "latents": [
        0.0,
        [[0.0]],
        np.zeros((1, 3, 4, 8)),
        torch.zeros(9, 3, 4, 8),
        torch.zeros(3, 4, 8),
        torch.tensor(1.0),
    ],
    "num_inference_steps": [*NO_COUNTS, T + 1],
    "timesteps": ["51", 5, [], [5, 5], [1, 2], [T], [3, -1], [2.5], [[3, 2]], [10**30, 1], [None], {}],
}
# alone, besides what is good for one image
BAD_LATENTS = [torch.full((1, 3, 4, 8), value) for value in (math.nan, math.inf)]
BAD_LATENTS += [torch.zeros(1, 3, 4, 8, dtype=dtype) for dtype in (torch.int64, torch.complex64)]


def as_array(images):
    """Images of any output type, as `(B, H, W, C)` from 0 to 1."""
    if isinstance(images, torch.Tensor):
        return images.permute(0, 2, 3, 1).numpy()
    return np.stack(
        [np.asarray(image, dtype=np.float32) / 255 if isinstance(image, Image.Image) else image for image in images]
    )


@pytest.mark.parametrize("name", SCHEDULERS)
@searched(
    25,
    case=arguments(GOOD, BAD, required=["batch_size"]),
    steps=st.integers(1, 3).map(lambda n: {"num_inference_steps": n}) | visits(3).map(lambda ts: {"timesteps": ts}),
    source=st.sampled_from(["one", "a list", "latents"]),
    seed=st.integers(0, 2**32 - 4),
    examples=[
        {
            "case": ({"batch_size": 1, name: value}, frozenset([name])),
            "steps": {"num_inference_steps": 2},
            "source": "one",
        }
        | {"seed": 0}
        for name, value in [
            ("batch_size", 10**12),
            ("callback_on_step_end", 1),
            ("callback_on_step_end_tensor_inputs", None),
            *(("latents", latents) for latents in BAD_LATENTS),
        ]
    ],
)
def test_a_call_gives_the_images_that_it_is_asked_for(name, case, steps, source, seed):
    values, wrong = dict(case[0]), set(case[1])
    pipe = MNISTDDPMPipeline(unet=UNET, scheduler=SCHEDULERS[name])
    pipe.set_progress_bar_config(disable=True)
    if "amount" in values and (AMOUNTS[name] or "amount" in wrong):  # any is wrong where the scheduler takes none
        amount = AMOUNTS[name] or "eta"
        values[amount] = values["amount"]
        wrong = {amount if each == "amount" else each for each in wrong}
    values.pop("amount", None)
    if name == "euler_ancestral" and "timesteps" in steps:  # which chooses its own
        steps = {"num_inference_steps": len(steps["timesteps"])}
    batch_size = values["batch_size"] if "batch_size" not in wrong else 1

    def call():
        """The arguments, with the randomness at its beginning."""
        generators = [torch.Generator().manual_seed(seed + i) for i in range(batch_size)]
        origin = {"generator": generators if source == "a list" else generators[0]}
        if source == "latents":
            origin["latents"] = torch.randn(batch_size, 3, 4, 8, generator=torch.Generator().manual_seed(seed))
        return {**origin, **steps, **values}

    result, named = attempt(lambda: pipe(**call()), wrong)
    if named:
        return named
    images = result.images if values.get("return_dict", True) else result[0]
    array = as_array(images)
    assert array.shape == (batch_size, 4, 8, 3)
    assert np.isfinite(array).all()
    assert array.min() >= 0
    assert array.max() <= 1
    again = pipe(**call() | {"return_dict": True}).images
    np.testing.assert_array_equal(as_array(again), array)
    return None


def test_latents_of_a_callback_are_checked():
    pipe = MNISTDDPMPipeline(unet=UNET, scheduler=SCHEDULERS["ddim"])
    pipe.set_progress_bar_config(disable=True)
    for latents in (None, 5, torch.zeros(1, 3, 4, 4), torch.zeros(1, 3, 4, 8, dtype=torch.int64)):
        with pytest.raises(ValueError, match="`latents` of `callback_on_step_end` must be a floating point tensor"):
            pipe(num_inference_steps=2, callback_on_step_end=lambda *args, latents=latents: {"latents": latents})


def test_a_prediction_that_clipping_would_hide_is_an_error():
    """Infinity, clipped to [-1, 1], would pass for an image."""
    unet = make_unet()
    unet.conv_out.register_forward_hook(lambda module, args, output: torch.full_like(output, math.inf))
    pipe = MNISTDDPMPipeline(unet=unet, scheduler=MNISTDDPMScheduler(num_train_timesteps=T, prediction_type="sample"))
    pipe.set_progress_bar_config(disable=True)
    with pytest.raises(RuntimeError, match="the prediction is not finite from step 1 of 2"):
        pipe(num_inference_steps=2)


@pytest.mark.parametrize("size", ["8", 0, -8, 1.5, (8, 8, 8), (8, None)])
def test_a_unet_whose_size_makes_no_image_is_refused(size):
    unet = make_unet()
    unet.register_to_config(sample_size=size)
    with pytest.raises(ValueError, match="the U-Net's config has no `sample_size`"):
        MNISTDDPMPipeline(unet=unet, scheduler=SCHEDULERS["ddim"])(num_inference_steps=1)
