"""Images from noise: the reverse process, with any U-Net and any scheduler for DDPM's betas.

A saved pipeline carries a copy of this file, which loads without this package: it needs torch and diffusers only.
"""

import copy
import importlib
import inspect
import json
import os
import shutil
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

import torch
from diffusers import ModelMixin, SchedulerMixin
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from diffusers.pipelines.pipeline_utils import DiffusionPipeline, ImagePipelineOutput
from diffusers.utils.torch_utils import randn_tensor, unwrap_module
from huggingface_hub import snapshot_download

# The schedulers whose `step` reads a learned variance from a prediction of 2C channels.
LEARNED = ("learned", "learned_range")
VARIANCE_SCHEDULERS = {"MNISTDDPMScheduler", "DDPMScheduler", "DDPMParallelScheduler", "UnCLIPScheduler"}
LOADING = threading.RLock()  # diffusers patches torch for all threads while it builds a model


class MNISTDDPMPipeline(DiffusionPipeline):
    """Unconditional image generation: start from N(0, I), and let the scheduler take each step of the U-Net.

    This is DDPM's Algorithm 2 (arXiv 2006.11239) with a DDPM scheduler. For DDIM and other solvers, swap the
    scheduler: `pipe.scheduler = DPMSolverMultistepScheduler.from_config(pipe.scheduler.config)`.

    Args:
        unet: `unet(sample, timestep).sample` predicts what the scheduler is configured for; its config has
            `in_channels` and `sample_size`. A learned variance (2C output channels) is used by DDPM schedulers only.
        scheduler: A scheduler of this package, or one of diffusers for DDPM's discrete betas: DDPM, DDIM, PNDM,
            DPM-Solver, UniPC, DEIS, SA-Solver, Euler, Heun, KDPM2, LMS. Flow matching and EDM need other models.
    """

    unet: Any
    scheduler: Any
    model_cpu_offload_seq = "unet"
    _callback_tensor_inputs = ("latents", "pred_original_sample")
    _interrupt = False
    num_timesteps = 0  # of the call that a callback belongs to

    def __init__(self, unet: ModelMixin, scheduler: SchedulerMixin):
        super().__init__()
        self.register_modules(unet=unet, scheduler=scheduler)

    @torch.no_grad()
    def __call__(
        self,
        batch_size: int = 1,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: torch.Tensor | None = None,
        num_inference_steps: int | None = None,
        timesteps: Sequence[int] | None = None,
        eta: float | None = None,
        use_clipped_model_output: bool | None = None,
        noise_scale: float | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable[..., dict[str, Any]] | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
    ) -> ImagePipelineOutput | tuple[Any]:
        """Generate images.

        The sample is float32 whatever the dtype of the U-Net: the same seed gives the same noise in each. A call works
        on a copy of the scheduler, so threads may share a pipeline (but not with `enable_model_cpu_offload`).

        Args:
            batch_size: How many images.
            generator: The source of randomness. One generator serves the whole batch. With a list, one per image,
                each image depends on its own seed only.
            latents: The noise to start from, N(0, I) of shape `(B, C, H, W)`. The sample is float64 if this is.
            num_inference_steps: How many steps, by default all `num_train_timesteps` of the scheduler. DDIM and the
                solvers need 50 or fewer.
            timesteps: The timesteps to visit instead, in decreasing order; only for schedulers that take them.
            eta: The weight of DDIM's noise, in [0, 1]; only for schedulers whose `step` takes it.
            use_clipped_model_output: Whether DDIM recomputes the noise from clipped x_0; only where `step` takes it.
            noise_scale: A factor on the noise of each DDPM step; only where `step` takes it.
            output_type: `"pil"` (a list; mode L for one channel), `"np"` (float32, `(B, H, W, C)` in [0, 1]) or
                `"pt"` (`(B, C, H, W)` in [0, 1]).
            return_dict: Whether to return an `ImagePipelineOutput` instead of a tuple.
            callback_on_step_end: Called as `callback(pipe, step_index, timestep, tensors)` after each step. It returns
                a dict, whose `latents` replace the sample. `pipe` has the scheduler of this call, and
                `pipe._interrupt = True` ends it after this step.
            callback_on_step_end_tensor_inputs: The `tensors`: `"latents"` (the sample), and `"pred_original_sample"`
                (the predicted x_0) if the scheduler returns it.

        Returns:
            An `ImagePipelineOutput` with `images`, or the tuple `(images,)`.

        Raises:
            ValueError: If an argument does not fit the scheduler, the U-Net or the batch size.
            RuntimeError: If the sample is no longer finite.
        """
        if isinstance(callback_on_step_end, PipelineCallback | MultiPipelineCallbacks):
            callback_on_step_end_tensor_inputs = callback_on_step_end.tensor_inputs
        call = copy.copy(self)  # swaps of components are for later calls
        call._interrupt = False
        channels = call.unet.config.in_channels
        allowed = ("pil", "np", "pt") if channels in (1, 3, 4) else ("np", "pt")
        if output_type not in allowed:
            raise ValueError(f"output_type must be one of {allowed} for {channels} channels, got {output_type!r}.")
        call._prepare_scheduler(num_inference_steps, timesteps)
        step = call.scheduler.step
        options: dict[str, Any] = {
            "eta": eta,
            "use_clipped_model_output": use_clipped_model_output,
            "noise_scale": noise_scale,
        }
        options = _given(step, options)
        if "generator" in inspect.signature(step).parameters:
            options["generator"] = generator

        sample = call._initial_noise(batch_size, generator, latents)
        finite = []
        for i, t in enumerate(call.progress_bar(call.scheduler.timesteps)):
            model_output = call._predict(sample, t)
            output = step(model_output, t, sample, **options)
            sample = output.prev_sample
            if callback_on_step_end is not None:
                tensors = call._callback_tensors(output, callback_on_step_end_tensor_inputs)
                sample = callback_on_step_end(call, i, t, tensors).get("latents", sample).to(sample)
            # read after the loop, so that no step waits for the device
            finite.append(torch.isfinite(model_output).all() & torch.isfinite(sample).all())
            if call._interrupt:
                break
        call._check_finite(torch.stack(finite))
        self.maybe_free_model_hooks()
        images = self._images(sample, output_type)
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def _initial_noise(self, batch_size: int, generator: Any, latents: torch.Tensor | None) -> torch.Tensor:
        """x_T for the scheduler: N(0, I), drawn in float32 or given, times the largest noise level."""
        size = self.unet.config.sample_size
        if size is None:
            raise ValueError("sample_size of the U-Net's config must be the size of its images, got None. Set it.")
        height, width = (size, size) if isinstance(size, int) else size
        shape = (batch_size, self.unet.config.in_channels, height, width)
        if isinstance(generator, list) and len(generator) != batch_size:
            raise ValueError(f"generator must be a list of {batch_size}, one per image, got {len(generator)}.")
        if latents is None:
            latents = randn_tensor(shape, generator=generator, device=self._execution_device, dtype=torch.float32)
        elif tuple(latents.shape) != shape:
            raise ValueError(f"latents must be of shape {shape}, got {tuple(latents.shape)}. Set batch_size to match.")
        dtype = torch.promote_types(latents.dtype, torch.float32)
        return latents.to(self._execution_device, dtype) * self.scheduler.init_noise_sigma

    def _predict(self, sample: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        """What the U-Net predicts for the sample: C channels, or 2C if the scheduler reads a variance."""
        model_input = self.scheduler.scale_model_input(sample, t).to(self.unet.dtype)
        model_output = self.unet(model_input, t).sample.to(sample.dtype)
        if model_output.shape[1] == 2 * sample.shape[1] and not _reads_variance(self.scheduler):
            model_output = model_output.chunk(2, dim=1)[0]
        return model_output

    def _images(self, sample: torch.Tensor, output_type: str) -> Any:
        """From a sample in [-1, 1] to images of the output type."""
        images: Any = (sample / 2 + 0.5).clamp(0, 1)
        if output_type != "pt":
            images = images.permute(0, 2, 3, 1).float().cpu().numpy()
        return self.numpy_to_pil(images) if output_type == "pil" else images

    def _prepare_scheduler(self, num_inference_steps: int | None, timesteps: Sequence[int] | None) -> None:
        """Replace the scheduler by a copy whose timesteps are set."""
        self.scheduler = scheduler = copy.deepcopy(self.scheduler)
        if not hasattr(scheduler, "alphas_cumprod") or scheduler.config.get("use_flow_sigmas"):
            remedy = "Use DDPM, DDIM, DPM-Solver, UniPC, Euler or Heun: flow matching and EDM need another model."
            raise ValueError(f"scheduler must be for DDPM's betas, got {type(scheduler).__name__}. {remedy}")
        if num_inference_steps is None and timesteps is None:
            num_inference_steps = scheduler.config.num_train_timesteps
        asked = {"num_inference_steps": num_inference_steps, "timesteps": timesteps}
        scheduler.set_timesteps(**_given(scheduler.set_timesteps, asked), device=self._execution_device)
        if hasattr(scheduler, "set_begin_index"):
            scheduler.set_begin_index(0)  # spares the search for each timestep, a wait for the device
        if scheduler.config.get("variance_type") in LEARNED and not _reads_variance(scheduler):
            scheduler.register_to_config(variance_type="fixed_small")  # else DPM-Solver keeps three channels only
        self.num_timesteps = len(scheduler.timesteps)

    def _callback_tensors(self, output: Any, names: Sequence[str]) -> dict[str, torch.Tensor]:
        """The tensors that a callback asks for."""
        tensors = {"latents": output.prev_sample}
        if getattr(output, "pred_original_sample", None) is not None:
            tensors["pred_original_sample"] = output.pred_original_sample
        if not set(names) <= set(tensors):
            allowed = f"{list(tensors)} with {type(self.scheduler).__name__}"
            raise ValueError(f"callback_on_step_end_tensor_inputs must be of {allowed}, got {list(names)}.")
        return {name: tensors[name] for name in names}

    def _check_finite(self, finite: torch.Tensor) -> None:
        """Raise if the sample was not finite at some step, with the step and the likely cause."""
        if finite.all():
            return
        step = int((~finite).int().argmax())
        broken = [name for name, weight in self.unet.named_parameters() if not torch.isfinite(weight).all()]
        cause = f"weights ({broken[0]} is not finite)" if broken else f"dtype ({self.unet.dtype})"
        raise RuntimeError(
            f"sample must be finite, got NaN or infinity from step {step + 1} of {len(self.scheduler.timesteps)} on "
            f"(timestep {self.scheduler.timesteps[step]:g}). Check the {cause} and the scheduler's config."
        )

    # Loading and saving

    @classmethod
    def from_pipe(cls, pipeline: DiffusionPipeline, **kwargs: Any) -> Self:
        """Make this pipeline from the components of another one; see `DiffusionPipeline.from_pipe`."""
        # diffusers keeps components of exactly the annotated class only
        return super().from_pipe(pipeline, **{"unet": pipeline.unet, **kwargs})

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike[str], **kwargs: Any) -> Self:
        """Load a saved pipeline from a folder or the Hub, with weights from safetensors only.

        Args:
            pretrained_model_name_or_path: A folder, or a repository `namespace/name`.
            kwargs: As for `DiffusionPipeline.from_pretrained`: `dtype`, `scheduler`, `unet`, `variant`, `revision`...

        Raises:
            ValueError: If `use_safetensors=False`.
            OSError: If there is no such pipeline, or it has no weights in safetensors.
        """
        _refuse_pickles("use_safetensors", kwargs.get("use_safetensors"))
        kwargs["use_safetensors"] = True
        with LOADING:
            return super().from_pretrained(os.fspath(pretrained_model_name_or_path), **kwargs)

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
    def download(cls, pretrained_model_name: str, **kwargs: Any) -> str:
        """Fetch configs and weights from the Hub, or find them in the cache; no code is fetched."""
        names = ("cache_dir", "force_download", "local_files_only", "token", "revision")
        options = {name: kwargs[name] for name in names if kwargs.get(name) is not None}
        components = [name for name in cls._get_signature_keys(cls)[0] if name not in kwargs]
        allowed = [cls.config_name, *(f"{name}/*.{kind}" for name in components for kind in ("json", "safetensors"))]
        try:
            return snapshot_download(pretrained_model_name, allow_patterns=allowed, **options)
        except Exception as error:  # whatever the network, the server and the client can do
            reason = error if isinstance(error, OSError) else type(error).__name__  # others may quote the token
            remedy = "check the name, the token and the network"
            raise OSError(f"cannot load {pretrained_model_name!r} from the Hub: {remedy} ({reason})") from None

    def save_pretrained(
        self, save_directory: str | os.PathLike[str], safe_serialization: bool = True, **kwargs: Any
    ) -> None:
        """Save a pipeline that loads with this package and without it: weights, configs, source files, model card.

        Args:
            save_directory: The folder. A `README.md` in it is kept.
            safe_serialization: True.
            kwargs: `variant` and `max_shard_size` of the weights. `push_to_hub=True` uploads the folder as well, with
                `repo_id` (by default the folder's name) and the options of `mnist_ddpm.hub.publish`.

        Raises:
            ValueError: If `safe_serialization=False`.
            RuntimeError: If the upload fails; the message gives the remedy.
        """
        _refuse_pickles("safe_serialization", safe_serialization)
        folder, hub = str(save_directory), _hub()
        if hub is None:
            return super().save_pretrained(folder, **kwargs)
        weights = {name: kwargs.pop(name, None) for name in ("variant", "max_shard_size")}
        super().save_pretrained(folder, **weights)
        return hub.finish_folder(folder, **kwargs)

    def push_to_hub(self, repo_id: str, **kwargs: Any) -> str:
        """Upload the pipeline to the Hub as `save_pretrained` does; returns the address of the commit."""
        hub = _hub()
        return super().push_to_hub(repo_id, **kwargs) if hub is None else hub.push_pipeline(self, repo_id, **kwargs)

    def save_config(self, save_directory: str | os.PathLike[str]) -> None:
        """Write `model_index.json`, and beside each config the source file of its class."""
        super().save_config(save_directory)
        folder = Path(save_directory)
        with _edited(folder / self.config_name) as index:
            index["_class_name"] = _copy_source(type(self), folder) or index["_class_name"]
            for name, component in self.components.items():
                index[name] = source = _copy_source(type(unwrap_module(component)), folder / name) or index[name]
                for path in (folder / name).glob("*config.json"):
                    with _edited(path) as config:
                        if name == "unet" and (folder / name / f"{source[0]}.py").exists():
                            # AutoModel looks in model_index.json first
                            index["auto_map"] = config["auto_map"] = {"AutoModel": ".".join(source)}


def _reads_variance(scheduler: Any) -> bool:
    """Whether `scheduler.step` splits a prediction of 2C channels; other schedulers keep the setting, but don't."""
    splits = any(base.__name__ in VARIANCE_SCHEDULERS for base in type(scheduler).__mro__)
    return splits and scheduler.config.get("variance_type") in LEARNED


def _given(method: Callable[..., Any], options: dict[str, Any]) -> dict[str, Any]:
    """The options that are not None, if a scheduler's method takes them."""
    given = {name: value for name, value in options.items() if value is not None}
    for name, value in given.items():
        if name not in inspect.signature(method).parameters:
            raise ValueError(f"{name} must be None for {method.__qualname__}, got {value!r}. Leave it out.")
    return given


def _refuse_pickles(name: str, value: bool | None) -> None:
    """Reject weights in pickles."""
    if value is False:
        raise ValueError(f"{name} must be True, got False. Pickled weights may run code when they are loaded.")


def _hub() -> Any:
    """`mnist_ddpm.hub`; None in a copy of this file, which uses diffusers' own methods."""
    return importlib.import_module("mnist_ddpm.hub") if __name__ == "mnist_ddpm.pipeline" else None


@contextmanager
def _edited(path: Path) -> Iterator[dict[str, Any]]:
    """Edit a config file; `_name_or_path`, which may be a path of this machine, is dropped."""
    content = json.loads(path.read_text(encoding="utf-8"))
    content.pop("_name_or_path", None)
    yield content
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _copy_source(component_class: type, folder: Path) -> list[str] | None:
    """Copy the file of a class of this package to a folder; returns its entry for `model_index.json`."""
    module = component_class.__module__
    if module.partition(".")[0] != __name__.partition(".")[0]:
        return None
    source = Path(inspect.getfile(component_class))
    shutil.copyfile(source, folder / source.name)
    return [source.stem, component_class.__name__]
