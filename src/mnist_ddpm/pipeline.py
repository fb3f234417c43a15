"""Images from noise: the reverse process, with any U-Net and any scheduler that speak diffusers' language.

A saved pipeline carries copies of the source files of its classes, so that diffusers loads it without this package.
This file, one of them, stands alone: torch, and diffusers with what it is built on.
"""

import copy
import inspect
import json
import math
import operator
import os
import re
import shlex
import shutil
import sys
import tempfile
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any, Self

import torch
from diffusers import ModelMixin, SchedulerMixin
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from diffusers.pipelines.pipeline_utils import DiffusionPipeline, ImagePipelineOutput
from diffusers.utils.torch_utils import randn_tensor, unwrap_module
from huggingface_hub import CommitOperationAdd, create_commit, create_repo, file_exists, get_token, snapshot_download

KINDS = {"_class_name": DiffusionPipeline, "scheduler": SchedulerMixin, "unet": ModelMixin}
MAX_CONFIG_BYTES = 5_000_000
MAX_VALUES = 2**30  # of the images of one call: 4 GiB in float32
LARGEST = {"eta": 1.0, "noise_scale": 1000.0}  # of the options of a step that are numbers
OUTPUT_TYPES = ("pil", "np", "pt")
PIL_CHANNELS = (1, 3, 4)
LOADING = threading.RLock()  # diffusers patches torch for all threads while it builds a model: one at a time


class MNISTDDPMPipeline(DiffusionPipeline):
    """Unconditional image generation: start from N(0, I), ask the U-Net for each step, let the scheduler take it.

    DDPM's Algorithm 2 (arXiv 2006.11239) with a DDPM scheduler; DDIM and the solvers of diffusers by swapping the
    scheduler: `pipe.scheduler = DPMSolverMultistepScheduler.from_config(pipe.scheduler.config)`.

    Args:
        unet: `unet(sample, timestep).sample` predicts what the scheduler is configured for; its config has
            `in_channels` and `sample_size`.
        scheduler: Any scheduler of this package or of diffusers.
    """

    model_cpu_offload_seq = "unet"
    _callback_tensor_inputs = ("latents", "pred_original_sample")
    _interrupt = False
    _num_timesteps = 0

    def __init__(self, unet: ModelMixin, scheduler: SchedulerMixin):
        super().__init__()
        self.register_modules(unet=unet, scheduler=scheduler)

    @property
    def num_timesteps(self) -> int:
        """The number of steps of the call that a callback belongs to."""
        return self._num_timesteps

    @property
    def interrupt(self) -> bool:
        """Whether a callback has ended its call early, by setting `_interrupt`."""
        return self._interrupt

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

        The sample is kept in float32 (or more) whatever the U-Net's dtype, so that the same seed starts from the same
        noise in each. Each call works on its own copy of the scheduler: calls do not disturb each other, in threads
        neither (but for `enable_model_cpu_offload`, which moves the U-Net at the end of each).

        Args:
            batch_size: How many images; all of them together hold at most 2**30 values.
            generator: Where the randomness comes from. One generator serves the whole batch; with a list, one per
                image, each image is a function of its own seed, whatever the batch.
            latents: Start from this noise, N(0, I) of shape `(B, C, H, W)`, instead of drawing it.
            num_inference_steps: How many steps, at most the scheduler's `num_train_timesteps`; None means all of them
                (1000 as a rule). DDIM and the solvers need far fewer: 50 or less.
            timesteps: The timesteps to visit, strictly decreasing within `[0, num_train_timesteps)`, instead of
                `num_inference_steps`.
            eta: DDIM's weight of the noise, in `[0, 1]`; only for schedulers whose `step` takes it.
            use_clipped_model_output: Whether DDIM works the noise out again where it clips x_0, so that both agree. It
                matters in hundreds of steps, where it is better on. Only for schedulers whose `step` takes it.
            noise_scale: Factor on the noise of each backward step, from 0 to 1000; only for schedulers whose `step`
                takes it.
            output_type: `"pil"` (a list; mode L for one channel), `"np"` (float32, `(B, H, W, C)` in `[0, 1]`) or
                `"pt"` (`(B, C, H, W)` in `[0, 1]`).
            return_dict: Whether to return an `ImagePipelineOutput` instead of a tuple.
            callback_on_step_end: Called as `callback(pipe, step_index, timestep, tensors)` after each step; the
                `latents` of the dict that it returns go on as the sample. `pipe` shares the U-Net with this pipeline
                and has the scheduler of this call; `pipe._interrupt = True` ends the call after this step.
            callback_on_step_end_tensor_inputs: What `tensors` holds: `"latents"` (the sample), and
                `"pred_original_sample"` (the predicted x_0) where the scheduler gives it.

        Returns:
            An `ImagePipelineOutput` with `images`, or the tuple `(images,)`.

        Raises:
            ValueError: If an argument is out of range, or is not for this scheduler.
            TypeError: If the callback returns no dict.
            RuntimeError: If the sample is no longer finite.
        """
        if isinstance(callback_on_step_end, PipelineCallback | MultiPipelineCallbacks):
            callback_on_step_end_tensor_inputs = callback_on_step_end.tensor_inputs
        run = copy.copy(self)  # what is swapped in this pipeline from now on is for the next call
        unet = run.unet
        shape = run._sample_shape(batch_size)
        run._check_outputs(output_type, callback_on_step_end, callback_on_step_end_tensor_inputs)

        run.scheduler = scheduler = copy.deepcopy(run.scheduler)
        run._interrupt = False
        device = run._execution_device
        _set_timesteps(scheduler, num_inference_steps, timesteps, device)
        run._num_timesteps = len(scheduler.timesteps)
        options = {"eta": eta, "use_clipped_model_output": use_clipped_model_output, "noise_scale": noise_scale}
        step_kwargs = _step_kwargs(scheduler, generator, options)
        sample = run._initial_noise(shape, generator, latents, device) * scheduler.init_noise_sigma

        takes_variance = scheduler.config.get("variance_type") in ("learned", "learned_range")
        finite = []
        for i, t in enumerate(run.progress_bar(scheduler.timesteps)):
            model_input = scheduler.scale_model_input(sample, t).to(unet.dtype)
            model_output = unet(model_input, t).sample.to(sample.dtype)
            if model_output.shape[1] == 2 * sample.shape[1] and not takes_variance:
                model_output = model_output.chunk(2, dim=1)[0]  # DDIM and the solvers have no use for the variance
            output = scheduler.step(model_output, t, sample, **step_kwargs)
            sample = output.prev_sample
            if callback_on_step_end is not None:
                tensors = _callback_tensors(scheduler, output, callback_on_step_end_tensor_inputs)
                edits = callback_on_step_end(run, i, t, tensors)
                if not isinstance(edits, dict):
                    raise TypeError(f"`callback_on_step_end` must return a dict (it may be empty), got {edits!r}")
                if "latents" in edits:
                    sample = _check_latents(edits["latents"], shape, " of `callback_on_step_end`").to(sample)
            # looked at after the loop: no wait for the device here
            finite.append(torch.isfinite(model_output).all() & torch.isfinite(sample).all())
            if run.interrupt:
                break
        run._check_finite(torch.stack(finite), scheduler)

        images: Any = (sample / 2 + 0.5).clamp(0, 1)
        if output_type != "pt":
            images = images.permute(0, 2, 3, 1).float().cpu().numpy()
        if output_type == "pil":
            images = self.numpy_to_pil(images)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def _sample_shape(self, batch_size: int) -> tuple[int, int, int, int]:
        """`(B, C, H, W)` by the U-Net's config."""
        if isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1:
            raise ValueError(f"`batch_size` must be an int of at least 1, got {batch_size!r}")
        size = self.unet.config.sample_size
        pair = [size, size] if isinstance(size, int) else size
        if not isinstance(pair, list | tuple) or len(pair) != 2 or not all(isinstance(n, int) and n > 0 for n in pair):
            raise ValueError(
                f"the U-Net's config has no `sample_size` of one or two positive ints, but {size!r}: build it with "
                "the size of its images"
            )
        shape = batch_size, self.unet.config.in_channels, pair[0], pair[1]
        if (most := MAX_VALUES // math.prod(shape[1:])) < batch_size:
            raise ValueError(
                f"`batch_size` must be at most {most} for images of shape {shape[1:]}, got {batch_size}: sample them "
                "in several calls"
            )
        return shape

    def _check_outputs(self, output_type: str, callback: Any, tensor_inputs: Sequence[str]) -> None:
        """Refuse what the call could not hand out, before any work."""
        if output_type not in OUTPUT_TYPES:
            raise ValueError(f"`output_type` must be one of {OUTPUT_TYPES}, got {output_type!r}")
        channels = self.unet.config.in_channels
        if output_type == "pil" and channels not in PIL_CHANNELS:
            raise ValueError(
                f"`output_type='pil'` needs {PIL_CHANNELS} channels, but the U-Net has {channels}: use 'np' or 'pt'"
            )
        if callback is not None and not callable(callback):
            raise ValueError(f"`callback_on_step_end` must be a function or None, got {callback!r}")
        names, known = tensor_inputs, self._callback_tensor_inputs
        if not isinstance(names, list | tuple) or any(name not in known for name in names):
            raise ValueError(f"`callback_on_step_end_tensor_inputs` may name {known}, got {names!r}")

    def _initial_noise(
        self,
        shape: tuple[int, int, int, int],
        generator: torch.Generator | list[torch.Generator] | None,
        latents: torch.Tensor | None,
        device: torch.device,
    ) -> torch.Tensor:
        """The given noise, or noise from the generator."""
        generators = generator if isinstance(generator, list) else [generator] * (generator is not None)
        if not all(isinstance(g, torch.Generator) for g in generators):
            raise ValueError(f"`generator` must be a torch.Generator, or a list of one per image, got {generator!r}")
        if isinstance(generator, list) and len(generator) != shape[0]:
            raise ValueError(
                f"`generator` is a list of {len(generator)} but `batch_size` is {shape[0]}: give one per image"
            )
        dtype = torch.promote_types(self.unet.dtype, torch.float32)
        if latents is None:
            return randn_tensor(shape, generator=generator, device=device, dtype=dtype)
        if not torch.isfinite(_check_latents(latents, shape)).all():
            raise ValueError("`latents` must be finite: it holds NaN or infinity")
        return latents.to(device, dtype)

    def _check_finite(self, finite: torch.Tensor, scheduler: Any) -> None:
        """Raise if the sample went wrong at some step, with the step and the likely cause."""
        if finite.all():
            return
        step = int((~finite).int().argmax())
        broken = [name for name, weight in self.unet.named_parameters() if not torch.isfinite(weight).all()]
        if broken:
            cause = f"the U-Net's weights are not finite ({len(broken)} tensors, {broken[0]!r} first)"
        else:
            cause = f"the weights are finite, so look at the dtype ({self.unet.dtype}) and the scheduler's config"
        raise RuntimeError(
            f"the sample or the prediction is not finite from step {step + 1} of {len(scheduler.timesteps)} on "
            f"(timestep {scheduler.timesteps[step]:g}, {type(scheduler).__name__}): {cause}"
        )

    # Loading and saving

    @classmethod
    def from_pipe(cls, pipeline: DiffusionPipeline, **kwargs: Any) -> Self:
        """Make this pipeline from another one's components; see `DiffusionPipeline.from_pipe`.

        The U-Net is handed over by name, because diffusers would otherwise drop it: it compares the exact class with
        the annotation, and any U-Net of the right interface is welcome here.
        """
        return super().from_pipe(pipeline, **{"unet": pipeline.unet, **kwargs})

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike[str], **kwargs: Any) -> Self:
        """Load a saved pipeline from a folder or the Hub, weights from safetensors only.

        Args:
            pretrained_model_name_or_path: A folder, or a repository `namespace/name`.
            kwargs: As for `DiffusionPipeline.from_pretrained`: `dtype`, `scheduler`, `unet`, `variant`, `revision`...

        Returns:
            The pipeline.

        Raises:
            ValueError: If `use_safetensors=False`: unpickling may run code.
            OSError: If there is no such pipeline, or it has no weights in safetensors.
        """
        if kwargs.get("use_safetensors") is False:
            raise ValueError("`use_safetensors` must be True: pickled weights may run code when they are loaded")
        kwargs["use_safetensors"] = True
        with LOADING:
            return super().from_pretrained(os.fspath(pretrained_model_name_or_path), **kwargs)

    @classmethod
    def _dict_from_json_file(cls, json_file: str | os.PathLike[str]) -> dict[str, Any]:
        return read_config(json_file)

    @classmethod
    def load_config(cls, pretrained_model_name_or_path: str | os.PathLike[str], *args: Any, **kwargs: Any) -> Any:
        """Read `model_index.json`; its entries for copied source files become the installed classes.

        Every entry must name what this pipeline is made of, in a module that is there: nothing is imported for it.
        """
        loaded = super().load_config(pretrained_model_name_or_path, *args, **kwargs)
        index = loaded[0] if isinstance(loaded, tuple) else loaded
        package = sys.modules.get(__name__.rpartition(".")[0])
        for name in KINDS:
            match index.get(name):
                case [str(), str(class_name)]:
                    if isinstance(installed := getattr(package, class_name, None), type):
                        index[name] = class_name if name == "_class_name" else [installed.__module__, class_name]
                case str() if name == "_class_name":
                    pass
                case entry:
                    raise ValueError(
                        f"{cls.config_name}: `{name}` must name a module and a class, got {entry!r}; is it a saved "
                        f"{cls.__name__}?"
                    )
        required, optional = cls._get_signature_keys(cls)
        if others := [name for name in index if not name.startswith("_") and name not in {*required, *optional}]:
            raise ValueError(f"{cls.config_name}: `{others[0]:.80}` is no part of a {cls.__name__}")
        for name, kind in KINDS.items():
            if isinstance(index[name], str):
                continue
            module, class_name = index[name]
            found = getattr(sys.modules.get(module), class_name, None)
            # a source file in the component's folder is diffusers' business, which runs it where it is trusted
            folder = Path(pretrained_model_name_or_path, "" if name == "_class_name" else name)
            copied = module.isidentifier() and (folder / f"{module}.py").is_file()
            if not copied and not (isinstance(found, type) and issubclass(found, kind)):
                raise ValueError(
                    f"{cls.config_name}: `{name}` must be a {kind.__name__} of diffusers, of this package or of a "
                    f"module that you have imported, got {index[name]!r:.200}"
                )
        return loaded

    @classmethod
    def download(cls, pretrained_model_name: str, **kwargs: Any) -> str:
        """Fetch configs and weights from the Hub, or find them in the cache; no code is fetched."""
        options = {
            name: kwargs[name]
            for name in ("cache_dir", "force_download", "local_files_only", "token", "revision")
            if kwargs.get(name) is not None
        }
        components = [name for name in ("unet", "scheduler") if name not in kwargs]
        allowed = [cls.config_name, *(f"{name}/*.{kind}" for name in components for kind in ("json", "safetensors"))]
        try:
            return snapshot_download(pretrained_model_name, allow_patterns=allowed, **options)
        except Exception as error:  # whatever the network, the server and the client can do
            reason = error if isinstance(error, OSError) else type(error).__name__  # others may quote the token
            raise OSError(
                f"cannot load {pretrained_model_name!r} from the Hub: check the name, the token and the network "
                f"({reason})"
            ) from None

    def save_config(self, save_directory: str | os.PathLike[str]) -> None:
        """Write `model_index.json`, and the source files that it names, each beside what it loads."""
        super().save_config(save_directory)
        folder = Path(save_directory)
        index = _forget_path(folder / self.config_name)
        _copy_source(index, "_class_name", type(self), folder)
        for name, component in self.components.items():
            for path in (folder / name).glob("*config.json"):
                _forget_path(path)
            _copy_source(index, name, type(unwrap_module(component)), folder / name)
        _write_json(folder / self.config_name, index)

    def save_pretrained(
        self,
        save_directory: str | os.PathLike[str],
        safe_serialization: bool = True,
        variant: str | None = None,
        max_shard_size: int | str | None = None,
        push_to_hub: bool = False,
        repo_id: str | None = None,
        **kwargs: Any,
    ) -> None:
        """Save a pipeline that loads with this package and without it: weights, configs, source files, model card.

        Args:
            save_directory: The folder, made if it is not there. A `README.md` that is there stays.
            safe_serialization: Must be True.
            variant: Part of the weights' file name, for instance `"fp16"`.
            max_shard_size: Split the weights into files of at most this size.
            push_to_hub: Whether to upload the pipeline to the Hub as well.
            repo_id: The repository to upload to, by default the folder's name.
            kwargs: `private`, `token`, `commit_message` and `create_pr`, as for `publish`.

        Raises:
            ValueError: If `safe_serialization=False`: pickled weights would not be loaded again.
            RuntimeError: If the upload fails; the message tells what to do.
        """
        if not safe_serialization:
            raise ValueError("`safe_serialization` must be True: pickled weights would not be loaded again")
        folder = Path(save_directory)
        super().save_pretrained(str(folder), variant=variant, max_shard_size=max_shard_size)
        if not (folder / CARD_FILE).exists():
            (folder / CARD_FILE).write_text(CARD)
        if push_to_hub:
            publish(folder, repo_id or folder.resolve().name, **kwargs)

    def push_to_hub(
        self, repo_id: str, safe_serialization: bool = True, variant: str | None = None, **kwargs: Any
    ) -> str:
        """Upload the pipeline to the Hub, as `save_pretrained` saves it.

        Args:
            repo_id: The repository, `name` or `namespace/name`; it is created if it is not there.
            safe_serialization: Must be True.
            variant: Part of the weights' file name, for instance `"fp16"`.
            kwargs: `private`, `token`, `commit_message` and `create_pr`, as for `publish`.

        Returns:
            The address of the commit.

        Raises:
            RuntimeError: If the upload fails; the message tells where the pipeline is then, and what to do.
        """
        folder = tempfile.mkdtemp(prefix="pipeline-")
        self.save_pretrained(folder, safe_serialization, variant)
        address = publish(folder, repo_id, **kwargs)
        shutil.rmtree(folder)  # not where publishing failed: its error says that the pipeline is safe there
        return address


def read_config(json_file: str | os.PathLike[str]) -> dict[str, Any]:
    """Read a config file of at most 5 MB, in which no key stands twice; the same in each file that stands alone."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        content = dict(pairs)
        if len(content) < len(pairs):
            key, _ = Counter(key for key, _ in pairs).most_common(1)[0]
            raise ValueError(f"the key {key!r:.80} stands there more than once")
        return content

    try:
        if os.path.getsize(json_file) > MAX_CONFIG_BYTES:
            raise ValueError(f"it has more than {MAX_CONFIG_BYTES} bytes")
        config = json.loads(Path(json_file).read_text(encoding="utf-8"), object_pairs_hook=unique)
        if not isinstance(config, dict):
            raise ValueError("it holds no JSON object")
    except (ValueError, RecursionError) as error:
        raise OSError(f"{json_file} is not a valid JSON file of a config: {error}") from None
    return config


def _set_timesteps(
    scheduler: Any, num_inference_steps: int | None, timesteps: Sequence[int] | None, device: torch.device
) -> None:
    """Check the steps that were asked for, and prepare the scheduler for them."""
    num_train_timesteps = scheduler.config.num_train_timesteps
    if timesteps is not None:
        if num_inference_steps is not None:
            raise ValueError("`num_inference_steps` and `timesteps` exclude each other: give one of them")
        if "timesteps" not in _parameters(scheduler.set_timesteps):
            raise ValueError(
                f"`timesteps` is not for {type(scheduler).__name__}, which chooses its own: use `num_inference_steps`"
            )
        try:
            visited = [operator.index(t) for t in timesteps]
        except TypeError:
            raise ValueError(f"`timesteps` must be ints, got {timesteps!r}") from None
        falls = all(t > t_prev for t, t_prev in pairwise(visited))
        if not visited or not falls or visited[0] >= num_train_timesteps or visited[-1] < 0:
            raise ValueError(
                f"`timesteps` must not be empty and strictly decrease within [0, {num_train_timesteps}), got {visited}"
            )
        scheduler.set_timesteps(timesteps=visited, device=device)
    else:
        steps = num_train_timesteps if num_inference_steps is None else num_inference_steps
        if isinstance(steps, bool) or not isinstance(steps, int) or not 1 <= steps <= num_train_timesteps:
            raise ValueError(
                f"`num_inference_steps` must be an int from 1 to {num_train_timesteps} "
                f"(the scheduler's `num_train_timesteps`), got {steps!r}"
            )
        scheduler.set_timesteps(steps, device=device)
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(0)  # spares the search for each timestep, a wait for the device


def _step_kwargs(scheduler: Any, generator: Any, options: dict[str, Any]) -> dict[str, Any]:
    """What `scheduler.step` is given besides the tensors: the generator, if it knows one, and what was asked for."""
    known = _parameters(scheduler.step)
    step_kwargs: dict[str, Any] = {"generator": generator} if "generator" in known else {}
    for name, value in options.items():
        if value is None:
            continue
        if name not in known:
            raise ValueError(
                f"`{name}` is not for {type(scheduler).__name__}, whose step has no such thing: leave it out"
            )
        if name in LARGEST:
            if not isinstance(value, int | float) or not 0 <= value <= LARGEST[name]:  # NaN compares false
                raise ValueError(f"`{name}` must be a finite number from 0 to {LARGEST[name]:g}, got {value!r}")
        elif not isinstance(value, bool):
            raise ValueError(f"`{name}` must be True or False, got {value!r}")
        step_kwargs[name] = value
    return step_kwargs


def _check_latents(latents: Any, shape: tuple[int, int, int, int], source: str = "") -> torch.Tensor:
    """Latents that fit a sample, or an error."""
    given = tuple(latents.shape) if isinstance(latents, torch.Tensor) else type(latents).__name__
    if given != shape or not latents.is_floating_point():
        raise ValueError(
            f"`latents`{source} must be a floating point tensor of shape {shape} (`batch_size`, then the U-Net's "
            f"channels and size), got {given}"
        )
    return latents


def _callback_tensors(scheduler: Any, output: Any, names: Sequence[str]) -> dict[str, torch.Tensor]:
    """The tensors that a callback asked for."""
    tensors = {"latents": output.prev_sample, "pred_original_sample": getattr(output, "pred_original_sample", None)}
    if "pred_original_sample" in names and tensors["pred_original_sample"] is None:
        raise ValueError(
            "`callback_on_step_end_tensor_inputs` names 'pred_original_sample', "
            f"which {type(scheduler).__name__} does not give: leave it out"
        )
    return {name: tensors[name] for name in names}


def _parameters(function: Callable[..., Any]) -> set[str]:
    """The names of a function's parameters."""
    return set(inspect.signature(function).parameters)


# Publishing

CARD_FILE, PICTURE_FILE = "README.md", "samples.png"
CARD_REPO_ID = "namespace/name"  # what a card says until its repository has a name
CARD = """---
library_name: diffusers
pipeline_tag: unconditional-image-generation
license: apache-2.0
tags:
- unconditional-image-generation
- diffusion
- ddpm
- ddim
---

# namespace/name

Images from noise by a U-Net and a scheduler of [diffusers](https://huggingface.co/docs/diffusers): a denoising
diffusion probabilistic model ([DDPM](https://arxiv.org/abs/2006.11239)), which can be sampled in fewer steps as
[DDIM](https://arxiv.org/abs/2010.02502). Made with the package `mnist-ddpm`.

## Use

With `mnist-ddpm` installed; no code of this repository is run:

```python
from mnist_ddpm import MNISTDDIMScheduler, MNISTDDPMPipeline

pipe = MNISTDDPMPipeline.from_pretrained("namespace/name")
pipe.scheduler = MNISTDDIMScheduler.from_config(pipe.scheduler.config)
images = pipe(batch_size=16, num_inference_steps=50).images
```

Without it, by the copies of its source files in this repository, which `trust_remote_code=True` allows to run:

```python
from diffusers import DDIMScheduler, DiffusionPipeline

pipe = DiffusionPipeline.from_pretrained("namespace/name", trust_remote_code=True)
pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
images = pipe(batch_size=16, num_inference_steps=50).images
```

The parts by themselves:

```python
from mnist_ddpm import MNISTDDPMScheduler, MNISTUNet2DModel

unet = MNISTUNet2DModel.from_pretrained("namespace/name", subfolder="unet")
scheduler = MNISTDDPMScheduler.from_pretrained("namespace/name", subfolder="scheduler")
```
"""
REMEDIES = {  # by the status of the response; None where there is none
    None: "the Hub could not be reached or broke off: check the network and try again",
    401: "the token is missing, wrong or expired: create one that may write at https://huggingface.co/settings/tokens",
    403: "the token may not write there: use a token with write access to that namespace, or another repository name",
    404: "no such repository or namespace: check the name, and that the token may see it",
    409: "the Hub reports a conflict with another change: try again, or use another repository name",
    500: "the Hub is in trouble: try again later",
}


def publish(
    folder: str | os.PathLike[str],
    repo_id: str,
    *,
    token: str | None = None,
    private: bool | None = None,
    commit_message: str | None = None,
    create_pr: bool = False,
) -> str:
    """Upload a saved pipeline to the Hub: what belongs to it, and nothing else that its folder holds.

    Args:
        folder: What `MNISTDDPMPipeline.save_pretrained` wrote.
        repo_id: The repository, `name` or `namespace/name`; it is created if it is not there. A card that is there
            is replaced only by one that says more than how to load the pipeline.
        token: A Hub token that may write; None means the stored one.
        private: Whether the repository is private, if it is created; None means as its namespace has it.
        commit_message: The title of the commit.
        create_pr: Whether to open a pull request instead of changing the main branch.

    Returns:
        The address of the commit.

    Raises:
        ValueError: If `folder` holds no saved pipeline.
        RuntimeError: If the upload fails; the message gives the remedy, and the command that pushes the folder again.
    """
    folder = Path(folder).resolve()
    if not (folder / MNISTDDPMPipeline.config_name).is_file():
        raise ValueError(f"`folder` must hold what `save_pretrained` writes, but {folder} has no model_index.json")
    command = [sys.executable, "-m", "mnist_ddpm.hub", str(folder), repo_id]
    if __name__ != "mnist_ddpm.pipeline":  # a copy, used where the package may be missing
        command = ["hf", "upload", repo_id, str(folder), "."]
    command += ["--private"] * bool(private) + ["--create-pr"] * create_pr
    token_first = " (set HF_TOKEN first)" if token else ""
    advice = f"The pipeline is safe in {folder}; push it again{token_first} with: {shlex.join(command)}"
    with pushing_to(repo_id, token, advice):
        repo_id = create_repo(repo_id, private=private, token=token, exist_ok=True).repo_id
        card = (folder / CARD_FILE).read_text() if (folder / CARD_FILE).exists() else CARD
        names = [MNISTDDPMPipeline.config_name, Path(__file__).name, PICTURE_FILE]
        names += [f"{name}/*.{kind}" for name in ("scheduler", "unet") for kind in ("json", "py", "safetensors")]
        files = [file for name in names for file in sorted(folder.glob(name))]
        operations = [CommitOperationAdd(file.relative_to(folder).as_posix(), file) for file in files]
        if card != CARD or not file_exists(repo_id, CARD_FILE, token=token):
            operations.append(CommitOperationAdd(CARD_FILE, card.replace(CARD_REPO_ID, repo_id).encode()))
        commit = create_commit(
            repo_id,
            operations,
            commit_message=commit_message or "Upload MNISTDDPMPipeline",
            token=token,
            create_pr=create_pr,
        )
    return commit.commit_url


@contextmanager
def pushing_to(repo_id: str, token: str | None, advice: str = "") -> Iterator[None]:
    """Make of whatever goes wrong with a push one error: the repository, the reason, the remedy, and never the token.

    Raises:
        RuntimeError: Instead of what was raised, or if there is no usable token; it ends with the advice.
    """
    try:
        token = token or get_token()
        if token is None:
            raise ValueError("no Hub token: set HF_TOKEN or log in with `hf auth login`")
        if not re.fullmatch(r"[!-~]+", token):  # the HTTP client's own error would print it
            raise ValueError("the token must be printable ASCII without spaces or line breaks: copy it again")
        yield
    except Exception as error:  # whatever the network, the server and the client can do
        status = getattr(getattr(error, "response", None), "status_code", None)
        remedy = REMEDIES.get(status and min(status, 500), "the Hub refused: check the name")
        first, *_ = str(error).strip().splitlines() or [""]
        details = f"{type(error).__name__}: {first} {getattr(error, 'server_message', None) or ''}".strip()
        reason = str(error) if isinstance(error, ValueError) else f"{remedy} ({details})"
        # `from None`: the traceback of the HTTP client may show the request's headers, the token among them
        raise RuntimeError(f"cannot push to the repository {repo_id!r}: {reason}\n{advice}".strip()) from None


def _forget_path(config_file: Path) -> dict[str, Any]:
    """Drop from a config where it was loaded from, which may be a path of this machine; returns the config."""
    config: dict[str, Any] = json.loads(config_file.read_text())
    config.pop("_name_or_path", None)
    _write_json(config_file, config)
    return config


def _write_json(path: Path, content: dict[str, Any]) -> None:
    """Write a config as diffusers does."""
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")


def _copy_source(index: dict[str, Any], name: str, component_class: type, folder: Path) -> None:
    """Copy the file of a class of this package to a folder, and name both in the index as diffusers reads it."""
    module = component_class.__module__
    if module.partition(".")[0] == __name__.partition(".")[0]:
        source = Path(inspect.getfile(sys.modules[module]))
        shutil.copyfile(source, folder / source.name)
        index[name] = [source.stem, component_class.__name__]
