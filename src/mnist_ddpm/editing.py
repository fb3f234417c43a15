"""Images from images: image to image, inpainting, inversion and interpolation, with the components of a pipeline.

    from mnist_ddpm.editing import MNISTInpaintPipeline

    inpaint = MNISTInpaintPipeline.from_pipe(pipe)

They need no training of their own.
"""

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
from diffusers import DDIMScheduler, DDPMScheduler
from diffusers.image_processor import VaeImageProcessor
from diffusers.pipelines.pipeline_utils import ImagePipelineOutput
from diffusers.utils.torch_utils import randn_tensor

from mnist_ddpm.pipeline import MNISTDDPMPipeline, _given
from mnist_ddpm.schedulers import MNISTDDIMScheduler, MNISTDDPMScheduler


def repaint_schedule(num_steps: int, jump_length: int, jump_n_sample: int) -> list[int]:
    """The levels that RePaint visits, from `num_steps` (noise) to 0 (the image); arXiv 2201.09865, appendix B.

    A level is the number of steps that are left. Every `jump_length` levels down, the sample is noised `jump_length`
    levels up again, `jump_n_sample - 1` times.

    Example:
        >>> repaint_schedule(5, jump_length=2, jump_n_sample=2)
        [5, 4, 3, 5, 4, 3, 2, 1, 3, 2, 1, 0]
    """
    jumps = dict.fromkeys(range(1, num_steps - jump_length + 1, jump_length), jump_n_sample - 1)
    levels = [num_steps]
    while levels[-1] > 0:
        level = levels[-1] - 1
        levels.append(level)
        if jumps.get(level, 0) > 0:
            jumps[level] -= 1
            levels.append(level + jump_length)
    return levels


def slerp(first: torch.Tensor, second: torch.Tensor, weight: float) -> torch.Tensor:
    """From `first` (weight 0) to `second` (1) on a great circle: `(sin((1 - w) a) x + sin(w a) y) / sin(a)`.

    The norm of noise stays what it is, unlike on a straight line.
    """
    angle = torch.nn.functional.cosine_similarity(first.flatten(), second.flatten(), dim=0).clamp(-1, 1).acos()
    if angle.sin() < 1e-6:  # nearly parallel
        return torch.lerp(first, second, weight)
    return (((1 - weight) * angle).sin() * first + (weight * angle).sin() * second) / angle.sin()


class _EditingPipeline(MNISTDDPMPipeline):
    """What the pipelines here share: images come in, and what is saved is the plain pipeline."""

    def _begin(
        self,
        image: Any,
        generator: torch.Generator | list[torch.Generator] | None,
        num_inference_steps: int,
        class_labels: int | str | Sequence[int | str] | torch.Tensor | None = None,
        guidance_scale: float = 1.0,
        guidance_interval: tuple[float, float] = (0.0, 1.0),
        eta: float | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
    ) -> "_Edit":
        """Prepare one call; these are the options of all pipelines here."""
        call = copy.copy(self)
        x_0 = call._tensor(image) * 2 - 1
        call._check_counts(len(x_0), generator)
        call._prepare_scheduler(num_inference_steps, None)
        labels = None if class_labels is None else call._class_numbers(class_labels, len(x_0))
        scales = call._guidance_scales(guidance_scale, guidance_interval, labels)
        options = _given(call.scheduler.step, {"generator": generator, "eta": eta})
        return _Edit(call, x_0, generator, labels, scales, options, output_type, return_dict)

    def _tensor(self, image: Any) -> torch.Tensor:
        """Images in [0, 1] as a tensor `(B, C, H, W)` on the device."""
        gray = self.unet.config.in_channels == 1
        processor = VaeImageProcessor(do_resize=False, do_normalize=False, do_convert_grayscale=gray)
        pixels = processor.preprocess(image)
        x: torch.Tensor = pixels.to(self._execution_device, torch.promote_types(pixels.dtype, torch.float32))
        return x

    def _check_scheduler(self, is_fit: bool, wanted: str) -> None:
        """Reject a scheduler whose steps don't do for an edit."""
        if not is_fit:
            raise ValueError(f"scheduler must be {wanted}, got {type(self.scheduler).__name__}.")

    def save_pretrained(self, save_directory: Any, safe_serialization: bool = True, **kwargs: Any) -> None:
        """Save the pipeline as an `MNISTDDPMPipeline`, from which this one can be made again."""
        plain = MNISTDDPMPipeline(**self.components, id2label=self.config.get("id2label"))
        plain.save_pretrained(save_directory, safe_serialization, **kwargs)


@dataclass
class _Edit:
    """One call of a pipeline: a copy of it, x_0 in [-1, 1] `(B, C, H, W)`, and what each step takes."""

    pipe: _EditingPipeline
    x_0: torch.Tensor
    generator: Any
    labels: torch.Tensor | None
    scales: list[float]
    options: dict[str, Any]
    output_type: str
    return_dict: bool
    visited: list[Any] = field(default_factory=list)
    finite: list[torch.Tensor] = field(default_factory=list)

    def noise(self) -> torch.Tensor:
        """N(0, I) of the shape of x_0, drawn in float32."""
        device, shape = self.x_0.device, tuple(self.x_0.shape)
        noise = randn_tensor(shape, generator=self.generator, device=device, dtype=torch.float32)
        z: torch.Tensor = noise.to(self.x_0)
        return z

    def step(self, i: int, sample: torch.Tensor) -> torch.Tensor:
        """The sample after step i."""
        t = self.pipe.scheduler.timesteps[i]
        prediction = self.pipe._predict(sample, t, self.labels, self.scales[i])
        x_prev: torch.Tensor = self.pipe.scheduler.step(prediction, t, sample, **self.options).prev_sample
        self.visited.append(t)
        self.finite.append(x_prev.isfinite().all())
        return x_prev

    def finish(self) -> None:
        """Raise if a sample was not finite; free memory as the pipeline does."""
        self.pipe._check_finite(self.finite, self.visited)
        self.pipe.maybe_free_model_hooks()

    def images(self, sample: torch.Tensor) -> Any:
        """Images of the output type."""
        self.finish()
        images = VaeImageProcessor().postprocess(sample, output_type=self.output_type)
        return ImagePipelineOutput(images=images) if self.return_dict else (images,)


class MNISTImg2ImgPipeline(_EditingPipeline):
    """Image to image (SDEdit, arXiv 2108.01073): noise is added up to some level, and removed again.

    With DDIM, images can also be inverted: to the latents from which it makes them.
    """

    @torch.no_grad()
    def __call__(  # type: ignore[override]
        self,
        image: Any,
        strength: float = 0.6,
        generator: torch.Generator | list[torch.Generator] | None = None,
        num_inference_steps: int = 50,
        **options: Any,
    ) -> ImagePipelineOutput | tuple[Any]:
        """Make images that resemble others.

        Args:
            image: The others: an image or a list of them, or in [0, 1] an array `(B, H, W, C)` or a tensor
                `(B, C, H, W)`.
            strength: The share of the steps that are taken. 0 leaves the image as it is, 1 forgets it.
            generator: As for `MNISTDDPMPipeline`.
            num_inference_steps: The steps of strength 1.
            options: `class_labels`, `guidance_scale`, `guidance_interval`, `eta`, `output_type` and `return_dict`, as
                for `MNISTDDPMPipeline`.

        Raises:
            ValueError: If an argument does not fit the scheduler, the U-Net or the number of images.
        """
        if not 0 <= strength <= 1:
            raise ValueError(f"strength must be from 0 to 1, got {strength}.")
        edit = self._begin(image, generator, num_inference_steps, **options)
        scheduler = edit.pipe.scheduler
        edit.pipe._check_scheduler(not hasattr(scheduler, "prk_timesteps"), "one that can begin halfway, like DDIM")
        order = getattr(scheduler, "order", 1)  # timesteps that a step takes, of Heun for instance
        first, last = (num_inference_steps - round(strength * num_inference_steps)) * order, len(scheduler.timesteps)
        if hasattr(scheduler, "set_begin_index"):
            scheduler.set_begin_index(first)
        sample, noise = edit.x_0, edit.noise()
        if first == 0:
            sample = noise * scheduler.init_noise_sigma
        elif first < last:
            sample = scheduler.add_noise(sample, noise, scheduler.timesteps[first].expand(len(sample)))
        for i in edit.pipe.progress_bar(range(first, last)):
            sample = edit.step(i, sample)
        return edit.images(sample)

    @torch.no_grad()
    def invert(
        self,
        image: Any,
        num_inference_steps: int = 50,
        class_labels: int | str | Sequence[int | str] | torch.Tensor | None = None,
        num_iterations: int = 5,
    ) -> torch.Tensor:
        """The latents from which DDIM makes these images in the same number of steps.

        In angles, `sqrt(alpha_bar_t) = cos(phi_t)`, a step of DDIM is `x_prev = cos(d) x_t - sin(d) v(x_t, t)` with
        `d = phi_t - phi_prev` (arXiv 2202.00512, appendix D). Solved for x_t it is
        `x_t = (x_prev + sin(d) v(x_t, t)) / cos(d)`, which is iterated from `x_t = x_prev` on.

        Args:
            image: As for a call.
            num_inference_steps: How many steps.
            class_labels: As for a call.
            num_iterations: Predictions for each step; more are more exact.

        Returns:
            Latents, `(B, C, H, W)`, for `latents` of an `MNISTDDPMPipeline`.

        Raises:
            ValueError: If the scheduler is not DDIM without clipping, which can't be undone.
            RuntimeError: If the latents are no longer finite.
        """
        edit = self._begin(image, None, num_inference_steps, class_labels)
        call, sample, scheduler = edit.pipe, edit.x_0, edit.pipe.scheduler
        clips = scheduler.config.get("clip_sample") or scheduler.config.get("thresholding")
        is_exact = isinstance(scheduler, MNISTDDIMScheduler) and not clips
        call._check_scheduler(is_exact, "an MNISTDDIMScheduler with clip_sample=False, thresholding=False")
        steps = scheduler.timesteps.flip(0)
        alpha_bars = scheduler.alphas_cumprod.double()[steps.cpu()]
        phis = torch.cat([scheduler.final_alpha_cumprod.double().cpu()[None], alpha_bars.cpu()]).sqrt().acos().tolist()
        for t, (phi_prev, phi) in zip(call.progress_bar(steps), pairwise(phis), strict=True):
            cos, sin, previous = math.cos(phi - phi_prev), math.sin(phi - phi_prev), sample
            for _ in range(num_iterations):
                sample = (previous + sin * call._velocity(sample, t, edit.labels, phi)) / cos
            edit.visited.append(t)
            edit.finite.append(sample.isfinite().all())
        edit.finish()
        return sample

    def _velocity(self, x_t: torch.Tensor, t: torch.Tensor, labels: Any, phi: float) -> torch.Tensor:
        """The predicted v, `cos(phi) eps_hat - sin(phi) x0_hat`, from a prediction of any type."""
        cos, sin = math.cos(phi), math.sin(phi)
        prediction = self._predict(x_t, t, labels, 1.0)
        match self.scheduler.config.prediction_type:
            case "epsilon":
                return (prediction - sin * x_t) / cos
            case "sample":
                return (cos * x_t - prediction) / sin
            case _:
                return prediction

    @torch.no_grad()
    def interpolate(
        self,
        first: Any,
        second: Any,
        num_images: int = 8,
        num_inference_steps: int = 50,
        class_labels: int | str | None = None,
        output_type: str = "pil",
    ) -> ImagePipelineOutput | tuple[Any]:
        """Images on the way from one image to another, through the noise that makes them (arXiv 2010.02502, 5.3).

        Args:
            first: An image, which is the first of those returned.
            second: An image, which is the last.
            num_images: How many, with both ends.
            num_inference_steps: Steps of the inversion, and again of sampling.
            class_labels: One for all images.
            output_type: `"pil"`, `"np"` or `"pt"`.
        """
        ends = [self.invert(image, num_inference_steps, class_labels) for image in (first, second)]
        weights = torch.linspace(0, 1, num_images).tolist()
        latents = torch.cat([slerp(ends[0], ends[1], weight) for weight in weights])
        return super().__call__(
            num_images,
            latents=latents,
            num_inference_steps=num_inference_steps,
            class_labels=class_labels,
            output_type=output_type,
        )


class MNISTInpaintPipeline(_EditingPipeline):
    """Inpainting (RePaint, arXiv 2201.09865): part of an image is kept, the rest is made anew to fit."""

    @torch.no_grad()
    def __call__(  # type: ignore[override]
        self,
        image: Any,
        mask_image: Any,
        generator: torch.Generator | list[torch.Generator] | None = None,
        num_inference_steps: int = 50,
        jump_length: int = 5,
        jump_n_sample: int = 5,
        **options: Any,
    ) -> ImagePipelineOutput | tuple[Any]:
        """Fill in the masked part of images.

        At each level the known part is replaced by `sqrt(alpha_bar) x_0 + sqrt(1 - alpha_bar) z`. So that the new part
        gets to know it, the sample goes back to a higher noise level now and then, and down again.

        Args:
            image: An image or a list of them, or in [0, 1] an array `(B, H, W, C)` or a tensor `(B, C, H, W)`.
            mask_image: White (1) where it is made anew, black (0) where it is kept; one for all or one for each.
            generator: As for `MNISTDDPMPipeline`.
            num_inference_steps: Steps without those that are taken again.
            jump_length: How many steps are gone back at a time. Longer jumps change more of the shape. Short ones, in
                many steps, are exact: the new part is distributed as it is given the known one.
            jump_n_sample: How often each stretch of steps is taken.
            options: As for `MNISTImg2ImgPipeline`.

        Raises:
            ValueError: If an argument does not fit the scheduler, the U-Net or the number of images.
        """
        edit = self._begin(image, generator, num_inference_steps, **options)
        call, x_0, scheduler = edit.pipe, edit.x_0, edit.pipe.scheduler
        kinds = MNISTDDPMScheduler | MNISTDDIMScheduler | DDPMScheduler | DDIMScheduler
        call._check_scheduler(isinstance(scheduler, kinds), "DDPM or DDIM, which remember no earlier steps")
        hidden = call._tensor(mask_image)[:, :1] >= 0.5
        if len(hidden) not in (1, len(x_0)):
            raise ValueError(f"mask_image must be 1 mask or {len(x_0)}, as many as images, got {len(hidden)}.")
        timesteps, n = scheduler.timesteps, len(scheduler.timesteps)
        # by level: 0 is the image
        alpha_bars = [1.0, *scheduler.alphas_cumprod.double()[timesteps.cpu()].flip(0).tolist()]
        sample = edit.noise()
        levels = repaint_schedule(n, jump_length, jump_n_sample)
        for level, new in pairwise(call.progress_bar(levels)):
            if new > level:  # q(x_new | x_level)
                kept = alpha_bars[new] / alpha_bars[level]
                sample = kept**0.5 * sample + (1 - kept) ** 0.5 * edit.noise()
                continue
            sample, known = edit.step(n - level, sample), x_0
            if new > 0:
                known = alpha_bars[new] ** 0.5 * x_0 + (1 - alpha_bars[new]) ** 0.5 * edit.noise()
            sample = torch.where(hidden, sample, known)
        return edit.images(sample)
