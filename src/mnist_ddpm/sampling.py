"""Samples of a saved pipeline, through any scheduler: image i is a function of the seed and of i alone."""

import hashlib
import os
import re
from collections.abc import Iterator, Sequence
from typing import Any

import diffusers
import numpy as np
import torch
from diffusers.utils import is_accelerate_available, logging, pt_to_pil
from PIL import Image
from safetensors import SafetensorError

import mnist_ddpm
from mnist_ddpm.pipeline import MNISTDDPMPipeline

SCHEDULERS = {
    "ddpm": "MNISTDDPMScheduler",
    "ddim": "MNISTDDIMScheduler",
    "deis": "DEISMultistepScheduler",
    "dpmsolver_multistep": "DPMSolverMultistepScheduler",
    "dpmsolver_singlestep": "DPMSolverSinglestepScheduler",
    "euler": "EulerDiscreteScheduler",
    "euler_ancestral": "EulerAncestralDiscreteScheduler",
    "heun": "HeunDiscreteScheduler",
    "kdpm2": "KDPM2DiscreteScheduler",
    "lms": "LMSDiscreteScheduler",
    "pndm": "PNDMScheduler",
    "sasolver": "SASolverScheduler",
    "sde_dpmsolver_multistep": "DPMSolverMultistepScheduler",
    "unipc": "UniPCMultistepScheduler",
}
"""Short names of the schedulers that sample a pipeline, and their classes in this package or in diffusers."""

AUTO = {5: "dpmsolver_multistep", 30: "sde_dpmsolver_multistep", 1000: "ddpm"}
"""Up to how many steps `"auto"` takes which scheduler: the one of the lowest FID, without guidance, in
`benchmarks/results/few_steps.json`, or in 50 steps one that is as good within the noise."""


def auto_scheduler(num_inference_steps: int, prediction_type: str = "v_prediction") -> str:
    """The name in `SCHEDULERS` that `"auto"` stands for in so many steps.

    For a model that predicts noise it is DDIM, which clips x0_hat: solvers don't, and in the first step, from a
    signal near 0, an error would grow without bound.
    """
    if prediction_type == "epsilon":
        return "ddim"
    return next((name for most, name in AUTO.items() if num_inference_steps <= most), [*AUTO.values()][-1])


SEARCHED_TIMESTEPS = (999, 955, 943, 891, 823, 771, 647, 475, 231, 83)
"""The timesteps of ten steps that `benchmarks/timestep_grid.py` found."""
MAX_SEARCHED_STEPS = 30
"""Up to how many steps `"auto"` takes them: better than equally spaced ones up to 20, where the measurement
`benchmarks/results/few_steps.json` has its last column before 50."""


def few_timesteps(num_inference_steps: int) -> list[int]:
    """`SEARCHED_TIMESTEPS` for another number of steps: points of the same curve, at equal distances.

    They are for 1,000 training timesteps on cosine betas, in descending order from 999, and distinct up to 100 steps.
    """
    curve = (*SEARCHED_TIMESTEPS, -1)
    at = np.linspace(0, len(curve) - 1, num_inference_steps, endpoint=False)
    timesteps: list[int] = np.interp(at, range(len(curve)), curve).round().astype(int).tolist()
    return timesteps


def step_options(pipe: MNISTDDPMPipeline, num_inference_steps: int, scheduler: str) -> dict[str, Any]:
    """The options of a call in so many steps, with a pipeline that was loaded with this scheduler.

    With `"auto"` in few steps they are `few_timesteps`, if the model predicts v on the noise schedule of the package.
    """
    schedule = {"prediction_type": "v_prediction", "beta_schedule": "squaredcos_cap_v2", "num_train_timesteps": 1000}
    schedule |= {"trained_betas": None, "rescale_betas_zero_snr": False}
    fits = all(pipe.scheduler.config.get(name, value) == value for name, value in schedule.items())
    fits = fits and not is_few_step(pipe.scheduler)
    if scheduler == "auto" and fits and num_inference_steps <= MAX_SEARCHED_STEPS:
        return {"timesteps": few_timesteps(num_inference_steps)}
    return {"num_inference_steps": num_inference_steps}


def default_steps(scheduler: Any) -> int:
    """How many steps to take where nobody says so: 50, or as many as suit a pipeline for few steps."""
    return min(4, scheduler.config.original_inference_steps) if is_few_step(scheduler) else 50


def guidance_options(
    pipe: MNISTDDPMPipeline, scale: float | None = None, interval: Sequence[float] | None = None
) -> dict[str, Any]:
    """The options that guide a pipeline; by default those that were measured best for the guide of the package.

    Near t = 0 the digit is decided, and guidance would turn black pixels dark gray.
    """
    if pipe.guide is not None:
        scale, interval = 1.5 if scale is None else scale, interval or [0.2, 1.0]  # a list, as in JSON
    given = {"guidance_scale": scale, "guidance_interval": interval}
    return {name: value for name, value in given.items() if value is not None}


def make_scheduler(name: str, config: Any) -> Any:
    """Make the scheduler of a name in `SCHEDULERS` from the config of another, with the options that suit it.

    Raises:
        ValueError: If there is no such name.
    """
    if name not in SCHEDULERS:
        raise ValueError(f"scheduler must be one of {', '.join(SCHEDULERS)}, got {name!r}.")
    options: dict[str, Any] = {}
    config = {key: value for key, value in config.items() if key != "algorithm_type"}  # means something else in each
    if name == "ddim" and config["prediction_type"] == "v_prediction":
        # DDIM steps by x0_hat and by the eps_hat of the same v. Clipping x0_hat alone makes black pixels a little
        # brighter at each step: most end at gray levels 1 to 8. The pipeline clamps the final image anyway.
        options["clip_sample"] = False
    if name == "sde_dpmsolver_multistep":
        options["algorithm_type"] = "sde-dpmsolver++"
    if name == "heun":
        # By default sigma falls from 20,000 to 6 in the first of 10 steps: digits come out speckled.
        options["use_karras_sigmas"] = True
    if name != "ddpm" and config.get("variance_type") == "learned_range":
        options["variance_type"] = "fixed_small"  # the others add no noise of a learned variance
    scheduler_class = getattr(mnist_ddpm, SCHEDULERS[name], None) or getattr(diffusers, SCHEDULERS[name])
    return scheduler_class.from_config({**config, **options})


def is_few_step(scheduler: Any) -> bool:
    """Whether a pipeline with this scheduler was distilled to few steps: other schedulers don't fit its U-Net."""
    return isinstance(scheduler, diffusers.LCMScheduler)


def load_pipeline(
    model: str | os.PathLike[str] | None = None,
    scheduler: str = "ddim",
    device: str | None = None,
    num_inference_steps: int | None = None,
) -> MNISTDDPMPipeline:
    """Load a saved pipeline with the scheduler of a name in `SCHEDULERS`.

    Args:
        model: A folder or a Hub id; None for the pipeline that comes with the package.
        scheduler: A name in `SCHEDULERS`; or `"auto"` for the one that is best at this number of steps, which for a
            pipeline that was distilled to few steps is its own.
        device: Where to; None for a GPU if there is one.
        num_inference_steps: How many steps `"auto"` is for, by default `default_steps`.

    Raises:
        ValueError: If there is no such pipeline or scheduler, or the pipeline is damaged.
    """
    model = str(mnist_ddpm.PRETRAINED if model is None else model)
    # the Hub is asked for its ids alone; without accelerate, diffusers would warn that it can't load in little memory
    options = {"local_files_only": not re.fullmatch(r"[\w.-]+/[\w.-]+", model)}
    try:
        pipe = MNISTDDPMPipeline.from_pretrained(model, low_cpu_mem_usage=is_accelerate_available(), **options)
    except (OSError, ValueError, SafetensorError) as error:
        raise ValueError(f"model must be the folder or Hub id of a pipeline, got {model!r}. {error}") from error
    if scheduler == "auto" and not is_few_step(pipe.scheduler):
        steps = num_inference_steps or default_steps(pipe.scheduler)
        scheduler = auto_scheduler(steps, pipe.scheduler.config["prediction_type"])
    if scheduler != "auto":
        pipe.scheduler = make_scheduler(scheduler, pipe.scheduler.config)
    pipe.to(("cuda" if torch.cuda.is_available() else "cpu") if device is None else device)
    return pipe


def weights_digest(unet: torch.nn.Module) -> str:
    """Return what tells the weights of one U-Net from those of another that was saved under the same name."""
    digest = hashlib.sha256()
    for weight in unet.state_dict().values():
        digest.update(weight.cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()[:16]


def image_generators(seed: int, indices: Sequence[int]) -> list[torch.Generator]:
    """One generator per image: consecutive 32-bit seeds from a start that the seed is hashed to.

    The hash keeps the images of neighboring seeds apart. PyTorch's CPU generator uses 32 bits of a seed.
    """
    start = int(np.random.SeedSequence(seed).generate_state(1)[0])
    return [torch.Generator().manual_seed((start + i) % 2**32) for i in indices]


def sample(
    pipe: MNISTDDPMPipeline,
    indices: Sequence[int],
    seed: int = 0,
    batch_size: int = 64,
    class_labels: Sequence[int | str] = (),
    **kwargs: Any,
) -> Iterator[tuple[Sequence[int], Any]]:
    """Sample the images of these indices in batches, with one progress bar for all.

    Args:
        pipe: The pipeline.
        indices: Which images.
        seed: Of all of them.
        batch_size: Images at a time.
        class_labels: Numbers or names of classes, which the images have in turn: image i the (i mod n)-th of n.
        kwargs: For the pipeline's call: `num_inference_steps`, `eta`, `output_type`, ...

    Yields:
        The indices of each batch, and its images.
    """
    pipe.set_progress_bar_config(disable=True)
    with logging.tqdm(total=len(indices), unit=" images") as bar:

        def advance(run: Any, i: int, t: Any, tensors: dict[str, Any]) -> dict[str, Any]:
            done = start + len(batch) * (i + 1) // len(run.scheduler.timesteps)
            bar.update(done - bar.n)
            return {}

        for start in range(0, len(indices), batch_size):
            batch = indices[start : start + batch_size]
            options = {"callback_on_step_end": advance, "generator": image_generators(seed, batch), **kwargs}
            if class_labels:
                options["class_labels"] = [class_labels[i % len(class_labels)] for i in batch]
            (images,) = pipe(batch_size=len(batch), return_dict=False, **options)
            yield batch, images


def sample_tensor(
    pipe: MNISTDDPMPipeline, num_images: int, seed: int = 0, batch_size: int = 64, **kwargs: Any
) -> torch.Tensor:
    """Sample the first images; returns uint8 (N, C, H, W) on the CPU. The arguments are those of `sample`."""
    batches = sample(pipe, range(num_images), seed, batch_size, output_type="pt", **kwargs)
    return torch.cat([(images * 255).round().to("cpu", torch.uint8) for _, images in batches])


def sample_trajectory(
    pipe: MNISTDDPMPipeline, num_images: int, seed: int = 0, **kwargs: Any
) -> list[list[Image.Image]]:
    """Sample the first images; returns for each step x_t, x0_hat of the first image, x_t, x0_hat of the second, ..."""
    names = ("latents", "pred_original_sample")
    steps = []

    def keep(run: Any, i: int, t: Any, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        steps.append(pt_to_pil(torch.stack([tensors[name] for name in names], dim=1).flatten(0, 1)))
        return {}

    callback: dict[str, Any] = {"callback_on_step_end": keep, "callback_on_step_end_tensor_inputs": names}
    for _ in sample(pipe, range(num_images), seed, num_images, **kwargs, **callback):
        pass
    return steps
