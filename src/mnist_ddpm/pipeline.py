"""Images from noise: the reverse process, with any U-Net and any scheduler for DDPM's betas.

A saved pipeline carries a copy of this file, which loads without this package: it needs torch and diffusers only.
"""

import copy
import importlib
import inspect
import json
import logging
import os
import shutil
import sys
import threading
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Self

import torch
from diffusers import HeunDiscreteScheduler, ModelMixin, SchedulerMixin
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from diffusers.image_processor import VaeImageProcessor
from diffusers.pipelines.pipeline_utils import DiffusionPipeline, ImagePipelineOutput
from diffusers.utils.torch_utils import randn_tensor, unwrap_module

# The schedulers whose `step` reads a learned variance from a prediction of 2C channels.
LEARNED = ("learned", "learned_range")
VARIANCE_SCHEDULERS = {"MNISTDDPMScheduler", "DDPMScheduler", "DDPMParallelScheduler", "UnCLIPScheduler"}
LOADING = threading.RLock()  # diffusers patches torch for all threads while it builds a model
# diffusers 0.42 warns at each `.to(dtype)` of modules to keep in float32, even if there are none
logging.getLogger("diffusers.models.modeling_utils").addFilter(lambda log: "in float32: []" not in log.getMessage())


class MNISTDDPMPipeline(DiffusionPipeline):
    """Image generation: start from N(0, I), and let the scheduler take each step of the U-Net.

    This is DDPM's Algorithm 2 (arXiv 2006.11239) with a DDPM scheduler. For DDIM and other solvers, swap the
    scheduler: `pipe.scheduler = DPMSolverMultistepScheduler.from_config(pipe.scheduler.config)`.

    Args:
        unet: `unet(sample, timestep).sample` predicts what the scheduler is configured for; its config has
            `in_channels` and `sample_size`. A learned variance (2C output channels) is used by DDPM schedulers only.
        scheduler: A scheduler of this package, or one of diffusers for DDPM's discrete betas: DDPM, DDIM, PNDM,
            DPM-Solver, UniPC, DEIS, SA-Solver, Euler, Heun, KDPM2, LMS. Flow matching and EDM need other models.
        guide: A weaker U-Net, from whose prediction `guidance_scale` leads away.
        id2label: The names of the classes by their numbers.
    """

    unet: Any
    scheduler: Any
    guide: Any
    model_cpu_offload_seq = "guide->unet"
    _optional_components = ["guide"]  # noqa: RUF012 - diffusers wants a list
    _callback_tensor_inputs = ("latents", "pred_original_sample")
    _interrupt = False
    num_timesteps = 0  # of the call that a callback belongs to

    def __init__(self, unet: ModelMixin, scheduler: SchedulerMixin, guide: ModelMixin = None, id2label: Any = None):
        super().__init__()
        self.register_modules(unet=unet, scheduler=scheduler, guide=guide)
        if id2label:  # whose keys are strings in JSON
            self.register_to_config(id2label={int(number): name for number, name in id2label.items()})

    @torch.no_grad()
    def __call__(
        self,
        batch_size: int = 1,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: torch.Tensor | None = None,
        num_inference_steps: int | None = None,
        timesteps: Sequence[int] | None = None,
        class_labels: int | str | Sequence[int | str] | torch.Tensor | None = None,
        guidance_scale: float = 1.0,
        guidance_interval: tuple[float, float] = (0.0, 1.0),
        eta: float | None = None,
        use_clipped_model_output: bool | None = None,
        noise_scale: float | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable[..., dict[str, Any]] | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
    ) -> ImagePipelineOutput | tuple[Any]:
        """Generate images; returns an `ImagePipelineOutput` with `images`, or the tuple `(images,)`.

        The sample is float32 whatever the dtype of the U-Net: the same seed gives the same noise in each. A call works
        on a copy of the scheduler, so threads may share a pipeline (but not with `enable_model_cpu_offload`).

        Args:
            batch_size: How many images, 1 or more.
            generator: The source of randomness: one for all, or a list. With a list, each image depends on its own.
            latents: The noise to start from, N(0, I) of shape `(B, C, H, W)`. The sample is float64 if they are.
            num_inference_steps: How many steps, by default all of training. DDIM and the solvers need 50 or fewer.
            timesteps: The timesteps to visit instead, in decreasing order; only for schedulers that take them.
            class_labels: Numbers or names of classes, one for all images or one for each. None: no label.
            guidance_scale: s in `weak + s (strong - weak)` of predictions: the U-Net's is the strong one, the guide's
                the weak one (arXiv 2406.02507), or without a guide the U-Net's without label (arXiv 2207.12598).
            guidance_interval: Where s acts (arXiv 2404.07724): `low <= t / T <= high`, of T training timesteps.
            eta: The weight of DDIM's noise, in [0, 1]; only for schedulers whose `step` takes it.
            use_clipped_model_output: Whether DDIM recomputes the noise from clipped x_0; only where `step` takes it.
            noise_scale: A factor on the noise of each DDPM step; only where `step` takes it.
            output_type: `"pil"` (mode L for one channel), or in [0, 1] `"np"` (B, H, W, C) or `"pt"` (B, C, H, W).
            return_dict: Whether to return an `ImagePipelineOutput` instead of a tuple.
            callback_on_step_end: Called as `callback(pipe, step_index, timestep, tensors)` after each step; `latents`
                of the dict it returns replace the sample. `pipe._interrupt = True` ends the call, which `pipe` is of.
            callback_on_step_end_tensor_inputs: The `tensors`: `latents`, `pred_original_sample` (which may be None).

        Raises:
            ValueError: If an argument does not fit the scheduler, the U-Net or the batch size.
            RuntimeError: If the sample is no longer finite.
        """
        if isinstance(callback_on_step_end, PipelineCallback | MultiPipelineCallbacks):
            callback_on_step_end_tensor_inputs = callback_on_step_end.tensor_inputs
        call = copy.copy(self)  # swaps of components are for later calls
        channels = call.unet.config.in_channels
        allowed = ("pil", "np", "pt") if channels in (1, 3, 4) else ("np", "pt")
        if output_type not in allowed:
            raise ValueError(f"output_type must be one of {allowed} for {channels} channels, got {output_type!r}.")
        call._prepare_scheduler(num_inference_steps, timesteps)
        options = {"eta": eta, "use_clipped_model_output": use_clipped_model_output, "noise_scale": noise_scale}
        options = _given(call.scheduler.step, options | {"generator": generator})
        labels = None if class_labels is None else call._class_numbers(class_labels, batch_size)
        scales = call._guidance_scales(guidance_scale, guidance_interval, labels)
        sample = call._initial_noise(batch_size, generator, latents)
        finite = []
        for i, t in enumerate(call.progress_bar(call.scheduler.timesteps)):
            model_output = call._predict(sample, t, labels, scales[i])
            output = call.scheduler.step(model_output, t, sample, **options)
            sample = output.prev_sample
            if callback_on_step_end is not None:
                tensors = {"latents": sample, "pred_original_sample": getattr(output, "pred_original_sample", None)}
                tensors = {name: tensors[name] for name in callback_on_step_end_tensor_inputs}
                sample = callback_on_step_end(call, i, t, tensors).get("latents", sample).to(sample)
            finite.append(torch.isfinite(model_output).all() & torch.isfinite(sample).all())  # read after the loop
            if call._interrupt:
                break
        call._check_finite(finite, call.scheduler.timesteps)
        self.maybe_free_model_hooks()
        images = VaeImageProcessor().postprocess(sample, output_type=output_type)
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def _initial_noise(self, batch_size: int, generator: Any, latents: torch.Tensor | None) -> torch.Tensor:
        """x_T for the scheduler: N(0, I), drawn in float32 or given, times the largest noise level."""
        self._check_counts(batch_size, generator, latents)
        if latents is None:
            size = self.unet.config.sample_size
            shape = batch_size, self.unet.config.in_channels, *([size, size] if isinstance(size, int) else size)
            latents = randn_tensor(shape, generator=generator, device=self._execution_device, dtype=torch.float32)
        dtype = torch.promote_types(latents.dtype, torch.float32)
        return latents.to(self._execution_device, dtype) * self.scheduler.init_noise_sigma

    def _check_counts(self, batch_size: int, generator: Any, latents: torch.Tensor | None = None) -> None:
        """Reject another number of generators or latents than of images; diffusers takes some of them."""
        counts = {len(given) for given in (generator, latents) if isinstance(given, list | torch.Tensor)}
        if batch_size < 1 or counts - {batch_size}:
            raise ValueError(f"batch_size must be >= 1 and fit generator and latents, got {batch_size}, {counts}.")

    def _class_numbers(self, class_labels: Any, batch_size: int) -> torch.Tensor:
        """The class of each image, `(B,)`, from numbers and names."""
        classes, names = self.unet.config.get("num_class_embeds") or 0, self.config.get("id2label", {})
        given = class_labels.tolist() if hasattr(class_labels, "tolist") else class_labels
        given = [given] * batch_size if isinstance(given, int | str) else given
        numbers = [{name: number for number, name in names.items()}.get(label, label) for label in given]
        if len(numbers) != batch_size or not set(numbers) <= set(range(classes)):
            allowed = f"class_labels must be 1 or {batch_size} of {classes} classes {[*names.values()]}"
            raise ValueError(f"{allowed}, got {class_labels!r:.80}.")
        return torch.tensor(numbers, device=self._execution_device)

    def _guidance_scales(self, scale: float, interval: tuple[float, float], labels: Any) -> list[float]:
        """The guidance scale of each step."""
        low, high = interval
        if not 0 <= low <= high <= 1:
            raise ValueError(f"guidance_interval must be two numbers t / T from 0 to 1, got {interval}.")
        if scale != 1 and self.guide is None:
            rows = getattr(getattr(self.unet, "class_embedding", None), "num_embeddings", float("inf"))
            if labels is None or rows <= self.unet.config.num_class_embeds:  # UNet2DModel has no row for "no label"
                needed = "a guide, or class_labels and an embedding of no label"
                raise ValueError(f"guidance_scale must be 1 without {needed}, got {scale}.")
        times = [t / self.scheduler.config.num_train_timesteps for t in self.scheduler.timesteps.tolist()]
        return [scale if low <= time <= high else 1.0 for time in times]

    def _predict(self, sample: torch.Tensor, t: torch.Tensor, labels: Any, scale: float) -> torch.Tensor:
        """The prediction for the sample, guided: C channels, or 2C if the scheduler reads a variance."""
        x, channels, unets = self.scheduler.scale_model_input(sample, t), sample.shape[1], [self.unet]
        if scale != 1 and self.guide is not None:
            unets.append(self.guide)
        elif scale != 1:  # with labels and without in one batch: num_class_embeds stands for none
            x = x.repeat(2, 1, 1, 1)
            labels = torch.cat([labels, torch.full_like(labels, self.unet.config.num_class_embeds)])
        options = {} if labels is None else {"class_labels": labels}
        outputs = [unet(x.to(unet.dtype), t, **options).sample.to(sample.dtype) for unet in unets]
        strong, *weak = [part for output in outputs for part in output.split(len(sample))]
        output = extrapolate(strong, weak[0], scale, channels) if weak else strong
        return output if self.scheduler.config.get("variance_type") in LEARNED else output[:, :channels]

    def _prepare_scheduler(self, num_inference_steps: int | None, timesteps: Sequence[int] | None) -> None:
        """Replace the scheduler by a copy whose timesteps are set."""
        self.scheduler = scheduler = copy.deepcopy(self.scheduler)
        if num_inference_steps is None and timesteps is None:
            num_inference_steps = scheduler.config.num_train_timesteps
        n: Any = num_inference_steps if timesteps is None else len(timesteps)
        required = [p for p in inspect.signature(scheduler.step).parameters.values() if p.default is p.empty]
        too_few = n < 4 and scheduler.config.get("skip_prk_steps") is False  # PNDM begins with 4 of Runge-Kutta
        of_ddpm = hasattr(scheduler, "alphas_cumprod") and not scheduler.config.get("use_flow_sigmas")
        if not of_ddpm or len(required) > 3 or too_few:  # RePaint's `step` needs an image
            got = f"got {type(scheduler).__name__} in {n} steps. Use DDPM, DDIM, DPM-Solver, UniPC, Euler or Heun."
            raise ValueError(f"scheduler must be for DDPM's betas, from noise alone and in so many steps, {got}")
        asked = {"num_inference_steps": num_inference_steps, "timesteps": timesteps}
        scheduler.set_timesteps(**_given(scheduler.set_timesteps, asked), device=self._execution_device)
        if hasattr(scheduler, "set_begin_index"):
            scheduler.set_begin_index(0)  # spares the search for each timestep, a wait for the device
        reads_variance = any(base.__name__ in VARIANCE_SCHEDULERS for base in type(scheduler).__mro__)
        if scheduler.config.get("variance_type") in LEARNED and not reads_variance:
            scheduler.register_to_config(variance_type="fixed_small")  # it keeps the setting, and splits nothing
        if isinstance(scheduler, HeunDiscreteScheduler) and scheduler.sigmas[0] > 1000 * scheduler.sigmas[1] > 0:
            remedy = "Set timesteps below 980 or, in many steps, use_karras_sigmas=True."
            warnings.warn(f"Heun speckles images in so few steps. {remedy}", stacklevel=4)
        self.num_timesteps = len(scheduler.timesteps)

    def _check_finite(self, finite: list[torch.Tensor], timesteps: Sequence[Any]) -> None:
        """Raise if the sample was not finite at some step, with the step and the likely cause."""
        steps = [i for i, is_finite in enumerate(finite) if not is_finite]
        if steps:
            broken = [name for name, weight in self.unet.named_parameters() if not torch.isfinite(weight).all()]
            causes = f"dtype ({self.unet.dtype}), eta (0 to 1) and the scheduler's config"
            cause = f"weights ({broken[0]})" if broken else causes
            where = f"step {steps[0] + 1} of {len(timesteps)} on (timestep {timesteps[steps[0]]:g})"
            raise RuntimeError(f"sample must be finite, got NaN or infinity from {where}. Check the {cause}.")

    # Loading and saving

    @classmethod
    def from_pipe(cls, pipeline: DiffusionPipeline, **kwargs: Any) -> Self:
        """Make this pipeline from the components of another one, whose U-Nets may be of any class."""
        unets = {name: pipeline.components.get(name) for name in ("unet", "guide")}
        return super().from_pipe(pipeline, **{**unets, **kwargs})

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike[str], **kwargs: Any) -> Self:
        """Load a saved pipeline from a folder or the Hub as `DiffusionPipeline` does, but from safetensors only.

        Raises:
            ValueError: If `use_safetensors=False`.
            OSError: If there is no such pipeline, or it has no weights in safetensors.
        """
        _check_safe("use_safetensors", kwargs.pop("use_safetensors", True))
        with LOADING:
            return super().from_pretrained(os.fspath(pretrained_model_name_or_path), use_safetensors=True, **kwargs)

    @classmethod
    def _dict_from_json_file(cls, json_file: str | os.PathLike[str]) -> dict[str, Any]:
        """Read `model_index.json`. Installed classes stand for the copies in the repository, whose code isn't run."""
        index = super()._dict_from_json_file(json_file)
        package = sys.modules.get(__name__.rpartition(".")[0])
        for name, entry in index.items():
            installed = getattr(package, str(entry[1]), None) if isinstance(entry, list) and len(entry) == 2 else None
            if isinstance(installed, type):
                index[name] = entry[1] if name == "_class_name" else [installed.__module__, entry[1]]
        return index

    @classmethod
    def extract_init_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """Read the components from `model_index.json`; `auto_map` is for `AutoModel`."""
        return super().extract_init_dict({k: v for k, v in config_dict.items() if k != "auto_map"}, **kwargs)

    @classmethod
    def download(cls, repo_id: str, **kwargs: Any) -> str:
        """Fetch configs and weights from the Hub, or find them in the cache; no code is fetched."""
        hub = _hub()
        return super().download(repo_id, **kwargs) if hub is None else hub.download(cls, repo_id, **kwargs)

    def save_pretrained(self, save_directory: str | Path, safe_serialization: bool = True, **kwargs: Any) -> None:
        """Save a pipeline that loads with this package and without it: weights, configs, source files, model card.

        `push_to_hub=True` uploads the folder as well, with `repo_id` (by default the folder's name) and the options of
        `mnist_ddpm.hub.publish`. A `README.md` in the folder is kept.

        Raises:
            ValueError: If `safe_serialization=False`.
            RuntimeError: If the upload fails; the message gives the remedy.
        """
        _check_safe("safe_serialization", safe_serialization)
        self.register_modules(guide=self.guide)  # diffusers misses one that is set where there was none
        folder, hub = str(save_directory), _hub()
        if hub is None:
            return super().save_pretrained(folder, **kwargs)
        super().save_pretrained(folder, **{name: kwargs.pop(name, None) for name in ("variant", "max_shard_size")})
        return hub.finish_folder(folder, **kwargs)

    def push_to_hub(self, repo_id: str, **kwargs: Any) -> str:
        """Upload the pipeline to the Hub as `save_pretrained` does; returns the address of the commit."""
        hub = _hub()
        return super().push_to_hub(repo_id, **kwargs) if hub is None else hub.push_pipeline(self, repo_id, **kwargs)

    def save_config(self, save_directory: str | os.PathLike[str]) -> None:
        """Write `model_index.json`, and beside each config the source file of its class."""
        super().save_config(save_directory)
        folder = Path(save_directory)
        index: dict[str, Any] = {"_class_name": _copy_source(type(self), folder)}
        for name, component in self.components.items():
            index[name] = source = _copy_source(type(unwrap_module(component)), folder / name)
            auto_map = {"AutoModel": ".".join(source)} if source and name == "unet" else None
            index["auto_map"] = index.get("auto_map") or auto_map  # AutoModel looks there first
            for path in (folder / name).glob("*config.json"):
                _edit(path, {"auto_map": auto_map})
        _edit(folder / self.config_name, index)


def extrapolate(strong: torch.Tensor, weak: torch.Tensor, scale: Any, channels: int) -> torch.Tensor:
    """`weak + s (strong - weak)`: guidance. A learned variance, in further channels, stays that of `strong`."""
    guided = weak[:, :channels] + scale * (strong[:, :channels] - weak[:, :channels])
    return torch.cat([guided, strong[:, channels:]], dim=1)


def _given(method: Callable[..., Any], options: dict[str, Any]) -> dict[str, Any]:
    """The options that are not None, which a scheduler's method must take; no generator if it draws nothing."""
    takes = inspect.signature(method).parameters
    given = {k: v for k, v in options.items() if v is not None and (k in takes or k != "generator")}
    for name in given.keys() - takes.keys():
        raise ValueError(f"{name} must be None for {method.__qualname__}, got {given[name]!r}. Leave it out.")
    return given


def _check_safe(name: str, value: bool | None) -> None:
    """Reject pickled weights."""
    if value is False:
        raise ValueError(f"{name} must be True, got False. Pickled weights may run code.")


def _hub() -> Any:
    """`mnist_ddpm.hub`; None in a copy of this file, which uses diffusers' own methods."""
    return importlib.import_module("mnist_ddpm.hub") if __name__ == "mnist_ddpm.pipeline" else None


def _edit(path: Path, changes: dict[str, Any]) -> None:
    """Edit a config file: changes that are not None, no `_name_or_path` of this machine, no component that is None."""
    content = json.loads(path.read_text(encoding="utf-8")) | {k: v for k, v in changes.items() if v is not None}
    content = {k: v for k, v in content.items() if k != "_name_or_path" and v != [None, None]}
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _copy_source(component_class: type, folder: Path) -> list[str] | None:
    """Copy the file of a class of this package to a folder; returns its entry for `model_index.json`."""
    module = component_class.__module__
    if module.partition(".")[0] != __name__.partition(".")[0]:
        return None
    source = Path(inspect.getfile(component_class))
    shutil.copyfile(source, folder / source.name)
    return [source.stem, component_class.__name__]
