"""What the app computes: sampling as a generator of frames, completions, interpolation. No page in here."""

import copy
import inspect
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch

from mnist_ddpm import MNISTDDPMPipeline
from mnist_ddpm.editing import MNISTImg2ImgPipeline, MNISTInpaintPipeline, slerp
from mnist_ddpm.sampling import image_generators, make_scheduler

SCHEDULERS = {"DDIM": "ddim", "DDPM": "ddpm", "DPM-Solver++": "dpmsolver_multistep", "UniPC": "unipc"}
"""The schedulers that show a predicted x_0 at each step, and their names in `mnist_ddpm.sampling`."""


class Frame(NamedTuple):
    """One moment of sampling: the timestep, the sample x_t there and the x_0 predicted from it; uint8 (B, H, W)."""

    t: int
    x_t: torch.Tensor
    x0_hat: torch.Tensor


def with_scheduler(pipe: MNISTDDPMPipeline, name: str) -> MNISTDDPMPipeline:
    """The same model with another scheduler; `pipe` keeps its own."""
    other = copy.copy(pipe)
    other.scheduler = make_scheduler(SCHEDULERS[name], pipe.scheduler.config)
    return other


def draw_noise(seed: int, num_images: int) -> torch.Tensor:
    """x_T of the first images of a seed: image i is a function of the seed and of i alone."""
    return torch.cat([torch.randn(1, 1, 28, 28, generator=g) for g in image_generators(seed, range(num_images))])


def to_pixels(x: torch.Tensor) -> torch.Tensor:
    """From [-1, 1], (B, 1, H, W), to uint8 (B, H, W)."""
    return ((x[:, 0] / 2 + 0.5).clamp(0, 1) * 255).round().to("cpu", torch.uint8)


@torch.no_grad()
def denoise(
    pipe: MNISTDDPMPipeline,
    noise: torch.Tensor,
    num_steps: int,
    digit: int | None = None,
    guidance_scale: float = 1.0,
    seed: int = 0,
) -> Iterator[Frame]:
    """The pipeline's loop, one frame before each step and one at the end: who stops asking has stopped the run."""
    call = copy.copy(pipe)
    call._prepare_scheduler(num_steps, None)  # a copy of the scheduler, which is of this run alone
    labels = None if digit is None else call._class_numbers(digit, len(noise))
    scales = call._guidance_scales(guidance_scale if digit is not None else 1.0, (0.0, 1.0), labels)
    options: dict[str, Any] = {}
    if "generator" in inspect.signature(call.scheduler.step).parameters:
        options["generator"] = image_generators(seed + 1, range(len(noise)))  # other noise than that at the start
    sample = call._initial_noise(len(noise), None, noise)
    for t, scale in zip(call.scheduler.timesteps, scales, strict=True):
        output = call.scheduler.step(call._predict(sample, t, labels, scale), t, sample, **options)
        yield Frame(int(t), to_pixels(sample), to_pixels(_predicted(output, call.scheduler)))
        sample = output.prev_sample
    yield Frame(0, to_pixels(sample), to_pixels(sample))


def _predicted(output: Any, scheduler: Any) -> torch.Tensor:
    """The x_0 that a step was taken by."""
    for name in ("pred_original_sample", "denoised"):  # DDPM and DDIM; LCM
        if (x0_hat := getattr(output, name, None)) is not None:
            return x0_hat
    return scheduler.model_outputs[-1]  # DPM-Solver++ and UniPC


def last(frames: Iterator[Frame]) -> torch.Tensor:
    """The images at the end, uint8 (B, H, W)."""
    *_, frame = frames
    return frame.x_t


def complete(
    pipe: MNISTDDPMPipeline, canvas: torch.Tensor, num_images: int, digit: int | None, guidance_scale: float, seed: int
) -> Iterator[torch.Tensor]:
    """Fill in the open pixels, those below 0, of a canvas (H, W) of gray levels 0 to 255; two images at a time."""
    inpaint = quiet(MNISTInpaintPipeline(**pipe.components))
    options = {"num_inference_steps": 25, "jump_n_sample": 3, "mask_image": (canvas < 0).float()[None, None]}
    yield from _in_pairs(inpaint, canvas, num_images, digit, guidance_scale, seed, options)


def redraw(
    pipe: MNISTDDPMPipeline,
    canvas: torch.Tensor,
    strength: float,
    num_images: int,
    digit: int | None,
    guidance_scale: float,
    seed: int,
) -> Iterator[torch.Tensor]:
    """Images that resemble a canvas, whose open pixels are black; two at a time."""
    edit = quiet(MNISTImg2ImgPipeline(**pipe.components))
    options = {"num_inference_steps": 25, "strength": strength}
    yield from _in_pairs(edit, canvas, num_images, digit, guidance_scale, seed, options)


def _in_pairs(
    edit: Any,
    canvas: torch.Tensor,
    num_images: int,
    digit: int | None,
    scale: float,
    seed: int,
    options: dict[str, Any],
) -> Iterator[torch.Tensor]:
    """Edit a canvas in several ways, so that the first are there soon; yields uint8 (2, H, W)."""
    if digit is not None:
        options |= {"class_labels": digit, "guidance_scale": scale}
    images = (canvas.clamp(min=0).float() / 255).expand(2, 1, -1, -1)
    generators = image_generators(seed, range(num_images))
    for i in range(0, num_images, 2):
        pair = edit(images, generator=generators[i : i + 2], output_type="pt", **options).images
        yield to_pixels(pair * 2 - 1)


def between(pipe: MNISTDDPMPipeline, ends: torch.Tensor, num_images: int, num_steps: int) -> Iterator[Frame]:
    """From one image to another, uint8 (2, H, W), through the noise that makes them (arXiv 2010.02502, 5.3)."""
    edit = quiet(MNISTImg2ImgPipeline(**pipe.components))
    first, second = edit.invert(ends[:, None].float() / 255, num_steps).split(1)
    noise = torch.cat([slerp(first, second, i / (num_images - 1)) for i in range(num_images)])
    yield from denoise(pipe, noise, num_steps)


def quiet(pipe: Any) -> Any:
    """A pipeline without progress bar: the page shows how far it is."""
    pipe.set_progress_bar_config(disable=True)
    return pipe
