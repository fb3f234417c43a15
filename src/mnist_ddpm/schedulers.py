"""DDPM and DDIM: how an image becomes noise, and how noise becomes an image again.

The symbols are those of DDPM (Ho et al., arXiv 2006.11239). DDIM (Song et al., arXiv 2010.02502) uses the same letters
for other things:

    here             DDPM             DDIM                     diffusers
    beta_t           beta_t           1 - alpha_t/alpha_{t-1}  betas[t]
    alpha_t          alpha_t          alpha_t/alpha_{t-1}      alphas[t]
    alpha_bar_t      bar alpha_t      alpha_t                  alphas_cumprod[t]
    alpha_bar_prev   bar alpha_{t-1}  alpha_{t-1}              alphas_cumprod[previous_timestep(t)]
    x0_hat           (15)             f_theta(x_t)             pred_original_sample
    eps_hat          eps_theta        eps_theta(x_t)           model_output of a model that predicts "epsilon"

Timesteps count from 0 to T - 1, as in diffusers; the papers count from 1 to T. `prev` is the timestep that is visited
next. Where sampling leaves timesteps out, `alpha_t = alpha_bar_t / alpha_bar_prev` and `beta_t = 1 - alpha_t` are of
the whole way from t to prev. The last step leads to the image itself, where `alpha_bar_prev = 1`.

All that depends on the chosen timesteps is worked out once, in float64; `step` takes the row of its timestep and
combines it with the sample in at least float32, whatever the dtype of the sample.
"""

import functools
import inspect
import json
import math
import operator
import os
from collections import Counter, namedtuple
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.schedulers.scheduling_utils import KarrasDiffusionSchedulers, SchedulerMixin
from diffusers.utils.outputs import BaseOutput
from diffusers.utils.torch_utils import randn_tensor

NO_SIGNAL = (
    "At a timestep whose alphas_cumprod is 0 (rescale_betas_zero_snr) x_0 can't be told from predicted noise. "
    'Take a model with prediction_type "v_prediction" or "sample", or leave that timestep out.'
)
Generators = torch.Generator | list[torch.Generator]

# What a config may ask for. The tables of a timestep take some 300 bytes, and iDDPM's 4000 timesteps are the most in
# use. With smaller betas, 1 - alpha_bar drowns in rounding; with a smaller alpha_bar, float32 can't hold 1/sqrt of it.
MAX_TRAIN_TIMESTEPS = 100_000
MAX_CONFIG_BYTES = 5_000_000
MIN_BETA, MIN_ALPHA_BAR = 1e-10, 1e-60
NUMBERS = {
    "num_train_timesteps": (int, 1, MAX_TRAIN_TIMESTEPS),
    "beta_start": (float, 0, 1),
    "beta_end": (float, 0, 1),
    "dynamic_thresholding_ratio": (float, 0, 1),
    "clip_sample_range": (float, 1e-6, 1e6),
    "sample_max_value": (float, 1e-6, 1e6),
    "steps_offset": (int, 0, MAX_TRAIN_TIMESTEPS),
}
SWITCHES = ("clip_sample", "thresholding", "rescale_betas_zero_snr", "set_alpha_to_one")
MAX_NOISE_SCALE = 1000.0
REAL = (int, float, np.integer, np.floating)
INTEGER_TYPES = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


@dataclass
class MNISTSchedulerOutput(BaseOutput):
    """What `step` returns.

    Args:
        prev_sample: the sample at the timestep that is visited next, shape `(B, C, H, W)`.
        pred_original_sample: the predicted x_0, after clipping, shape `(B, C, H, W)`.
    """

    prev_sample: torch.Tensor
    pred_original_sample: torch.Tensor


# Beta schedules: float64 tensors of shape (T,) -----------------------------------------------------------------------


def linear_betas(num_train_timesteps: int, beta_start: float = 1e-4, beta_end: float = 2e-2) -> torch.Tensor:
    """Betas in equal steps (DDPM, section 4)."""
    return torch.linspace(beta_start, beta_end, num_train_timesteps, dtype=torch.float64)


def scaled_linear_betas(num_train_timesteps: int, beta_start: float = 1e-4, beta_end: float = 2e-2) -> torch.Tensor:
    """Betas whose square roots go in equal steps, as in latent diffusion (arXiv 2112.10752)."""
    return linear_betas(num_train_timesteps, beta_start**0.5, beta_end**0.5) ** 2


def sigmoid_betas(num_train_timesteps: int, beta_start: float = 1e-4, beta_end: float = 2e-2) -> torch.Tensor:
    """Betas along a sigmoid from -6 to 6, as in GeoDiff (arXiv 2203.02923)."""
    return beta_start + (beta_end - beta_start) * torch.sigmoid(linear_betas(num_train_timesteps, -6, 6))


def cosine_betas(num_train_timesteps: int, s: float = 0.008, max_beta: float = 0.999) -> torch.Tensor:
    """Betas of `alpha_bar_t = f(t) / f(0)`, `f(t) = cos^2(((t/T + s)/(1 + s)) pi/2)` (iDDPM, equation 17)."""
    time = torch.arange(num_train_timesteps + 1, dtype=torch.float64) / num_train_timesteps
    f = torch.cos((time + s) / (1 + s) * math.pi / 2) ** 2
    return (1 - f[1:] / f[:-1]).clamp(0, max_beta)


BETA_SCHEDULES: dict[str, Callable[[int, float, float], torch.Tensor]] = {
    "linear": linear_betas,
    "scaled_linear": scaled_linear_betas,
    "squaredcos_cap_v2": lambda num_train_timesteps, beta_start, beta_end: cosine_betas(num_train_timesteps),
    "sigmoid": sigmoid_betas,
}


def rescale_zero_terminal_snr(betas: torch.Tensor) -> torch.Tensor:
    """Betas changed so that the last timestep is pure noise (arXiv 2305.08891, algorithm 1).

    `sqrt(alpha_bar)` is shifted to 0 at T - 1, then scaled to keep its value at 0.
    """
    root = torch.cumprod(1 - betas, dim=0).sqrt()
    alpha_bar = ((root - root[-1]) * root[0] / (root[0] - root[-1])) ** 2
    return 1 - alpha_bar / torch.cat([alpha_bar.new_ones(1), alpha_bar[:-1]])


# Coefficients by timestep --------------------------------------------------------------------------------------------

ForwardRow = namedtuple("ForwardRow", "sqrt_alpha_bar_t sqrt_one_minus_alpha_bar_t sqrt_alpha_t sqrt_beta_t")
DDPMRow = namedtuple(
    "DDPMRow", "sqrt_alpha_bar_t sqrt_one_minus_alpha_bar_t x0_to_mean xt_to_mean noise_std log_variance_range"
)
DDIMRow = namedtuple(
    "DDIMRow",
    "sqrt_alpha_bar_t sqrt_one_minus_alpha_bar_t sqrt_alpha_bar_prev sqrt_one_minus_alpha_bar_prev "
    "kept_share noise_std",
)


class CoefficientTable:
    """A row of coefficients for each timestep, worked out when one is asked for, and copied once to each device."""

    def __init__(self, row_type: type, rows_of: Callable[[torch.Tensor], Any], num_train_timesteps: int):
        """Take the function from timesteps `(n,)` to their coefficients, a named tuple of float64 tensors `(n,)`."""
        self.row_type = row_type
        self.rows_of = rows_of
        self.num_train_timesteps = num_train_timesteps
        self.copies: dict[tuple[torch.device, torch.dtype], torch.Tensor] = {}

    @functools.cached_property
    def rows(self) -> Any:
        """The table on the host: a float64 array `(T, k)`."""
        return torch.stack(self.rows_of(torch.arange(self.num_train_timesteps)), dim=1).numpy()

    def on(self, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
        """The table `(T, k)` on a device, copied there once."""
        if (device, dtype) not in self.copies:
            # a new dict, as another thread may be going through the old one to copy it
            self.copies = {**self.copies, (device, dtype): torch.from_numpy(self.rows).to(device, dtype)}
        return self.copies[device, dtype]

    def at(self, timestep: int | torch.Tensor, sample: torch.Tensor) -> Any:
        """The row of a timestep: floats where the host knows it, else tensors `(1, 1, 1, 1)` or `(B, 1, 1, 1)`."""
        _check_images("sample", sample)
        if isinstance(timestep, torch.Tensor):
            _check_integers("timestep", timestep)
            if timestep.ndim > 1 or (timestep.ndim == 1 and len(timestep) not in (1, len(sample))):
                raise ValueError(
                    f"timestep must be one for all or one for each of {len(sample)} images, "
                    f"got shape {tuple(timestep.shape)}."
                )
            if timestep.ndim == 1 or not timestep.is_cpu or torch.compiler.is_compiling():
                _check_range(timestep, self.num_train_timesteps)
                dtype = torch.promote_types(sample.dtype, torch.float32)
                timesteps = timestep.to(sample.device, torch.int64).reshape(-1)
                if torch.compiler.is_compiling() and sample.is_cpu:
                    # in the graph itself: a table that is not there yet would be another graph than one that is
                    rows = torch.stack(self.rows_of(timesteps), dim=1).to(dtype)
                else:
                    rows = self.on(sample.device, dtype).index_select(0, timesteps)
                # (n, k) to k coefficients of (n, 1, 1, 1)
                return self.row_type(*rows.view(len(rows), *[1] * (sample.ndim - 1), -1).unbind(-1))
        t = _integer("timestep", timestep)
        _check_range(t, self.num_train_timesteps)
        return self.row_type(*self.rows[t].tolist())


def _check_range(timestep: int | torch.Tensor, num_train_timesteps: int) -> None:
    """Refuse a timestep out of range; one on a device is not looked at."""
    if not isinstance(timestep, torch.Tensor):
        lowest = highest = timestep
    elif timestep.is_cpu and timestep.numel() and not torch.compiler.is_compiling():
        lowest, highest = (int(bound) for bound in torch.aminmax(timestep))
    else:
        return
    if lowest < 0 or highest >= num_train_timesteps:
        wrong = lowest if lowest < 0 else highest
        raise ValueError(
            f"timestep must be from 0 to num_train_timesteps - 1 = {num_train_timesteps - 1}, got {wrong}."
        )


def _add_scaled(x: torch.Tensor, scale: Any, y: torch.Tensor) -> torch.Tensor:
    """`x + scale y`, for a scale that is a float or a tensor."""
    return torch.add(x, y, alpha=scale) if isinstance(scale, float) else torch.addcmul(x, scale, y)


def _add_scaled_(x: torch.Tensor, scale: Any, y: torch.Tensor) -> torch.Tensor:
    """`_add_scaled` into x itself, a tensor that nobody else has."""
    return x.add_(y, alpha=scale) if isinstance(scale, float) else x.addcmul_(scale, y)


def _mix(a: Any, x: torch.Tensor, b: Any, y: torch.Tensor) -> torch.Tensor:
    """`a x + b y`, in the dtype of x."""
    return _add_scaled_(a * x, b, y)


def _is_zero(coefficient: Any) -> bool:
    """Whether a coefficient is known on the host to be 0; a tensor is not looked at."""
    return isinstance(coefficient, float) and coefficient == 0


def _is_zero_on_host(coefficient: Any) -> bool:
    """Whether a coefficient, or one in a tensor on the host, is 0; a tensor on a device is not looked at."""
    if isinstance(coefficient, float):
        return coefficient == 0
    return coefficient.is_cpu and not torch.compiler.is_compiling() and bool((coefficient == 0).any())


def _upcast(x: torch.Tensor) -> torch.Tensor:
    """The tensor in at least float32."""
    return x if x.dtype in (torch.float32, torch.float64) else x.float()


def _cast(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """`x.to(dtype)`, without the microsecond that it takes to find that nothing is to be done."""
    return x if x.dtype == dtype else x.to(dtype)


def _noise_like(x: torch.Tensor, noise: torch.Tensor | None, generator: Generators | None) -> torch.Tensor:
    """The noise that was passed in, or normal noise from the generator."""
    if noise is None:
        if isinstance(generator, list) and len(generator) != len(x):
            raise ValueError(f"generator must be one or a list of {len(x)}, one per image; got {len(generator)}.")
        for each in generator if isinstance(generator, list) else [generator]:
            if not isinstance(each, torch.Generator | None):
                raise TypeError(f"generator must be a torch.Generator, or a list of one per image, got {generator!r}.")
        if generator is None or (isinstance(generator, torch.Generator) and generator.device == x.device):
            return torch.randn(x.shape, generator=generator, device=x.device, dtype=x.dtype)  # the same, in less time
        return randn_tensor(x.shape, generator=generator, device=x.device, dtype=x.dtype)
    if generator is not None:
        raise ValueError("Cannot pass both generator and noise: leave one of them out.")
    _check_images("noise", noise, x.shape)
    return noise


def _integer(name: str, value: Any) -> int:
    """The value as an int: of any integer type, but no truth value."""
    try:
        if not isinstance(value, bool):
            return operator.index(value)
    except TypeError:
        pass
    raise TypeError(f"{name} must be an integer, got {value!r}.")


def _integers(name: str, values: Any) -> list[int]:
    """The integers of any sequence, an array or a tensor included."""
    try:
        values = list(values)
    except TypeError:
        raise TypeError(f"{name} must be a sequence of integers, got {values!r}.") from None
    return [_integer(name, value) for value in values]


def _check_number(name: str, value: Any, lowest: float, highest: float, meaning: str = "") -> None:
    if isinstance(value, bool) or not isinstance(value, REAL) or not lowest <= value <= highest:  # NaN compares false
        raise ValueError(f"{name} must be a number from {lowest:g} to {highest:g}{meaning}, got {value!r}.")


def _check_images(name: str, x: Any, shape: Sequence[int] | None = None) -> None:
    if not isinstance(x, torch.Tensor) or not x.is_floating_point():
        got = x.dtype if isinstance(x, torch.Tensor) else type(x).__name__
        raise TypeError(f"{name} must be a floating point tensor, got {got}. Scale images to [-1, 1] first.")
    if x.ndim < 2 or (shape is not None and x.shape != shape):
        raise ValueError(f"{name} must have shape {tuple(shape) if shape else '(B, C, H, W)'}, got {tuple(x.shape)}.")


def _check_integers(name: str, x: torch.Tensor) -> None:
    if x.dtype not in INTEGER_TYPES:
        raise TypeError(f"{name} must be an integer, got {x.dtype}. Convert it by .long().")


def _check_choice(name: str, value: Any, allowed: Sequence[Any]) -> None:
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(map(str, allowed))}, got {value!r}.")


def _output(
    x_prev: torch.Tensor, x0_hat: torch.Tensor, dtype: torch.dtype, return_dict: bool
) -> MNISTSchedulerOutput | tuple[torch.Tensor, torch.Tensor]:
    """The results of a step, in the dtype of its sample."""
    results = _cast(x_prev, dtype), _cast(x0_hat, dtype)
    return MNISTSchedulerOutput(*results) if return_dict else results


# Configs -------------------------------------------------------------------------------------------------------------


def _canonical(config: dict[str, Any]) -> dict[str, Any]:
    """The config in diffusers' own keys and values, so that each of its schedulers understands it."""
    config = dict(config)
    if config.get("beta_schedule") == "cosine":
        config["beta_schedule"] = "squaredcos_cap_v2"
    simple_var = config.pop("simple_var", None)
    _check_choice("simple_var", simple_var, (None, True, False))
    if simple_var is not None:
        variance_type = "fixed_large" if simple_var else "fixed_small"
        if config.get("variance_type") not in (None, variance_type):
            raise ValueError(
                f"simple_var={simple_var} means variance_type={variance_type!r} and contradicts "
                f"variance_type={config['variance_type']!r}. Pass one of the two."
            )
        config["variance_type"] = variance_type
    if config.get("variance_type", "") is None:
        config["variance_type"] = "fixed_small"
    if (betas := config.get("trained_betas")) is not None:
        betas = betas.tolist() if isinstance(betas, np.ndarray | torch.Tensor) else betas
        if not isinstance(betas, list | tuple) or not 1 <= len(betas) <= MAX_TRAIN_TIMESTEPS:
            raise ValueError(f"trained_betas must be a list of 1 to {MAX_TRAIN_TIMESTEPS} numbers, got {betas!r:.80}.")
        for beta in betas:
            _check_number("trained_betas", beta, 0, 1)
        config["trained_betas"] = [float(beta) for beta in betas]
        config["num_train_timesteps"] = len(betas)
    return config


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


def _defaults_of(scheduler_class: type) -> dict[str, Any]:
    """The defaults in the signature of a scheduler's constructor."""
    parameters = inspect.signature(scheduler_class).parameters.values()
    return {p.name: p.default for p in parameters if p.default is not p.empty}


def _betas_of(config: dict[str, Any]) -> torch.Tensor:
    """The betas `(T,)` that a config asks for."""
    if config["trained_betas"] is not None:
        betas = torch.tensor(config["trained_betas"], dtype=torch.float64)
    else:
        schedule = BETA_SCHEDULES[config["beta_schedule"]]
        betas = schedule(config["num_train_timesteps"], config["beta_start"], config["beta_end"])
    if config["rescale_betas_zero_snr"]:
        betas = rescale_zero_terminal_snr(betas)
    alpha_bar = torch.cumprod(1 - betas, dim=0)
    pure_noise = alpha_bar < MIN_ALPHA_BAR
    pure_noise[-1] &= alpha_bar[-1] != 0  # the last timestep alone may be pure noise
    if not ((betas >= MIN_BETA) & (betas <= 1)).all() or pure_noise.any():
        raise ValueError(
            f"betas must lie above 0 (from {MIN_BETA:g} on) and leave some signal up to the last timestep (an "
            f"alpha_bar of {MIN_ALPHA_BAR:g}), got betas from {betas.min():.6g} to {betas.max():.6g} and an alpha_bar "
            f"of {alpha_bar[-1]:.6g}. Change beta_start and beta_end, num_train_timesteps, trained_betas, or "
            "rescale_betas_zero_snr."
        )
    return betas


# Schedulers ----------------------------------------------------------------------------------------------------------


class MNISTSchedulerBase(SchedulerMixin, ConfigMixin):
    """What DDPM and DDIM share: config, timesteps, the forward process, the predicted x_0."""

    order = 1
    init_noise_sigma = 1.0
    ignore_for_config = ["simple_var"]  # noqa: RUF012
    _compatibles = [scheduler.name for scheduler in KarrasDiffusionSchedulers]  # noqa: RUF012
    _variance_types: tuple[str, ...] = ("fixed_small", "fixed_large")
    _counterpart: type  # the class of diffusers with the same name
    _row_type: type

    step: Callable[..., Any]

    # Config

    def _set_up(self, simple_var: bool | None, set_alpha_to_one: bool = True) -> None:
        """Put the config in canonical form, then make the tables."""
        values = _canonical({**self.config, "simple_var": simple_var})
        for name, (kind, lowest, highest) in NUMBERS.items():
            if kind is int:
                values[name] = _integer(name, values[name])
            _check_number(name, values[name], lowest, highest)
            values[name] = values[name].item() if isinstance(values[name], np.generic) else values[name]  # for JSON
        if "_use_default_values" in values:
            # a key listed there gives way to the target's default in a swap: no value of ours may
            values["_use_default_values"] = []
        self.register_to_config(**values, _class_name=type(self).__name__)
        _check_choice("beta_schedule", values["beta_schedule"], tuple(BETA_SCHEDULES))
        _check_choice("prediction_type", values["prediction_type"], ("epsilon", "sample", "v_prediction"))
        _check_choice("timestep_spacing", values["timestep_spacing"], ("trailing", "leading", "linspace"))
        _check_choice("variance_type", values["variance_type"], self._variance_types)
        for name in set(SWITCHES) & set(values):
            _check_choice(name, values[name], (True, False))

        self.betas = _betas_of(values)
        self.alphas = 1 - self.betas
        self.alphas_cumprod = torch.cumprod(self.alphas, dim=0)
        self.alphas_cumprod_prev = torch.cat([self.betas.new_ones(1), self.alphas_cumprod[:-1]])
        self._ends_in_noise = bool(self.alphas_cumprod[-1] == 0)
        self.final_alpha_cumprod = self.betas.new_tensor(1.0) if set_alpha_to_one else self.alphas_cumprod[0]
        self._forward = CoefficientTable(ForwardRow, self._forward_rows, len(self))
        # until set_timesteps is called, sampling visits every timestep
        self.num_inference_steps: int | None = None
        self._request: int | None = None  # the number of steps that was asked for last, and by which config
        self._request_config = self.config
        self._visit(torch.arange(len(self) - 1, -1, -1))

    @classmethod
    def load_config(cls, *args: Any, **kwargs: Any) -> Any:
        """Read a config from a folder or the Hub."""
        token = str(kwargs.get("token"))
        if not (token.isascii() and token.isprintable()):  # the HTTP client's error would print it
            raise ValueError("token must be printable ASCII without line breaks: copy it again.")
        return super().load_config(*args, **kwargs)

    @classmethod
    def _dict_from_json_file(cls, json_file: str | os.PathLike[str]) -> dict[str, Any]:
        return read_config(json_file)

    @classmethod
    def extract_init_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """Read the config of any scheduler: a missing key means the default of the class that the config is from."""
        config = _canonical({key: value for key, value in config_dict.items() if key != "_use_default_values"})
        class_name = config.get("_class_name")
        if class_name is not None and class_name not in [ours.__name__ for ours in OUR_SCHEDULERS]:
            defaults = _defaults_of(cls._counterpart)
            other_class = getattr(diffusers, str(class_name), None)
            defaults_there = _defaults_of(other_class) if isinstance(other_class, type) else {}
            if "beta_schedule" not in defaults_there | config:
                raise ValueError(
                    f"config must be of a scheduler with a beta_schedule, but its _class_name is {class_name!r}."
                )
            defaults |= defaults_there
            config = {key: value for key, value in defaults.items() if key in _defaults_of(cls)} | config
        return super().extract_init_dict(config, **_canonical(kwargs))

    @classmethod
    def _get_compatibles(cls) -> list[type]:
        return [*super()._get_compatibles(), *OUR_SCHEDULERS]

    @property
    def simple_var(self) -> bool:
        """Whether the backward noise has variance `beta_t` (`variance_type="fixed_large"`), not the posterior's."""
        return bool(self.config["variance_type"] == "fixed_large")

    def __len__(self) -> int:
        """T, the number of training timesteps."""
        return int(self.config["num_train_timesteps"])

    # Timesteps

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        timesteps: Sequence[int] | None = None,
    ) -> None:
        """Choose the timesteps that sampling visits.

        Args:
            num_inference_steps: their number, from 1 to T; the config's `timestep_spacing` places them.
            device: where `timesteps` are wanted, the CPU if None.
            timesteps: instead of their number, the timesteps themselves in descending order.

        Raises:
            ValueError: if neither or both are given, or if a timestep is out of range or out of order.
        """
        if (num_inference_steps is None) == (timesteps is None):
            raise ValueError("Pass either num_inference_steps or timesteps, and not both.")
        if timesteps is None:
            num_inference_steps = _integer("num_inference_steps", num_inference_steps)
            if num_inference_steps == self._request and self.config is self._request_config:
                self._show(device)  # asked for again: the table of the steps is there
                return
            visited = self._space(num_inference_steps)
        else:  # Python's integers, until they are known to fit into 64 bits
            visited = np.array(_integers("timesteps", timesteps), dtype=object)
            if len(visited) == 0 or (np.diff(visited) >= 0).any():
                raise ValueError(f"timesteps must be in descending order, got {visited.tolist()}.")
        T = len(self)
        if visited[-1] < 0 or visited[0] >= T:
            raise ValueError(
                f"timesteps must be from 0 to num_train_timesteps - 1 = {T - 1}, got {visited[0]} to {visited[-1]}. "
                "Pass fewer num_inference_steps or, with leading spacing, a smaller steps_offset."
            )
        if self._ends_in_noise and visited[0] == T - 1 and self.config["prediction_type"] == "epsilon":
            raise ValueError(NO_SIGNAL)
        self.num_inference_steps = len(visited)
        self._visit(torch.from_numpy(visited.astype(np.int64, copy=False)), device)
        self._request, self._request_config = num_inference_steps, self.config

    def _space(self, n: int) -> Any:
        """The n timesteps of the config's `timestep_spacing`, in descending order."""
        T = len(self)
        if not 1 <= n <= T:
            raise ValueError(f"num_inference_steps must be from 1 to num_train_timesteps = {T}, got {n}.")
        spacing = self.config["timestep_spacing"]
        if spacing == "leading":
            return T // n * np.arange(n - 1, -1, -1) + self.config["steps_offset"]
        # one division of integers, so that halves are exact; they go to the even neighbor
        if spacing == "trailing":
            return np.rint(np.arange(float(n * T), 0, -T) / n).astype(np.int64) - 1
        return np.rint((T - 1) * np.arange(n - 1.0, -1, -1) / max(n - 1, 1)).astype(np.int64)

    def _visit(self, timesteps: torch.Tensor, device: str | torch.device | None = None) -> None:
        """Set the timesteps, a tensor `(n,)` in descending order."""
        self._visited = timesteps
        self._backward = CoefficientTable(self._row_type, self._backward_rows, len(self))
        self._show(device)

    def _show(self, device: str | torch.device | None) -> None:
        """Have `timesteps`, and the table of their steps, on a device."""
        self.timesteps = self._visited.to(device)
        if not self.timesteps.is_cpu:  # steps there are not to wait for a copy from the host
            self._backward.on(self.timesteps.device, torch.float32)

    def _previous(self, t: torch.Tensor) -> torch.Tensor:
        """The prev of each timestep `(n,)`: the largest visited one below it, -1 where there is none."""
        ascending = torch.cat([self._visited.new_tensor([-1]), self._visited.flip(0)])
        return ascending[torch.searchsorted(ascending, t) - 1]

    def _forward_rows(self, t: torch.Tensor) -> ForwardRow:
        """The coefficients of the forward process at timesteps `(n,)`."""
        alpha_bar_t, beta_t = self.alphas_cumprod.cpu()[t], self.betas.cpu()[t]
        return ForwardRow(
            sqrt_alpha_bar_t=alpha_bar_t.sqrt(),
            sqrt_one_minus_alpha_bar_t=(1 - alpha_bar_t).sqrt(),
            sqrt_alpha_t=(1 - beta_t).sqrt(),
            sqrt_beta_t=beta_t.sqrt(),
        )

    def _backward_rows(self, t: torch.Tensor) -> Any:
        """The coefficients of the steps from timesteps `(n,)` to their prev."""
        prev = self._previous(t)
        alpha_bar = torch.cat([self.alphas_cumprod, self.final_alpha_cumprod.view(1)]).cpu()  # at -1: the final one
        return self._tabulate(alpha_bar[t], alpha_bar[prev], last=prev < 0)

    def _tabulate(self, alpha_bar_t: torch.Tensor, alpha_bar_prev: torch.Tensor, last: torch.Tensor) -> Any:
        """The coefficients of steps in the letters of the formulas: all tensors are float64 `(n,)`."""
        raise NotImplementedError

    def previous_timestep(self, timestep: int | torch.Tensor) -> Any:
        """The timestep that is visited after the given one, -1 after the last; of the type and shape of the input."""
        if isinstance(timestep, torch.Tensor):
            _check_integers("timestep", timestep)
            _check_range(timestep, len(self))
            return self._previous(timestep.long().cpu()).to(timestep.device)
        _check_range(_integer("timestep", timestep), len(self))
        return int(self._previous(torch.tensor([timestep])))

    # Forward process

    def sample_forward(
        self,
        x_0: torch.Tensor,
        t: int | torch.Tensor,
        noise: torch.Tensor | None = None,
        generator: Generators | None = None,
    ) -> torch.Tensor:
        """Draw x_t from x_0: `x_t = sqrt(alpha_bar_t) x_0 + sqrt(1 - alpha_bar_t) eps` (DDPM, equation 4).

        Args:
            x_0: images in [-1, 1], shape `(B, C, H, W)`.
            t: timestep from 0 to T - 1, one for all or shape `(B,)`.
            noise: eps, shape `(B, C, H, W)`; drawn if None.
            generator: what draws it, one or a list with one for each image.

        Returns:
            x_t, shape `(B, C, H, W)`.
        """
        c, noise = self._forward.at(t, x_0), _noise_like(x_0, noise, generator)
        x_t = _mix(c.sqrt_alpha_bar_t, _upcast(x_0), c.sqrt_one_minus_alpha_bar_t, noise)
        return _cast(x_t, x_0.dtype)

    def add_noise(
        self, original_samples: torch.Tensor, noise: torch.Tensor, timesteps: int | torch.Tensor
    ) -> torch.Tensor:
        """`sample_forward` under diffusers' name."""
        return self.sample_forward(original_samples, timesteps, noise)

    def forward_step(
        self,
        x_prev: torch.Tensor,
        t: int | torch.Tensor,
        noise: torch.Tensor | None = None,
        generator: Generators | None = None,
    ) -> torch.Tensor:
        """Draw x_t from x_{t-1}: `x_t = sqrt(alpha_t) x_{t-1} + sqrt(beta_t) eps` (DDPM, equation 2).

        Args and result are those of `sample_forward`. The step is one of training, whichever timesteps are visited.
        """
        c, noise = self._forward.at(t, x_prev), _noise_like(x_prev, noise, generator)
        return _cast(_mix(c.sqrt_alpha_t, _upcast(x_prev), c.sqrt_beta_t, noise), x_prev.dtype)

    def get_velocity(self, sample: torch.Tensor, noise: torch.Tensor, timesteps: int | torch.Tensor) -> torch.Tensor:
        """What a "v_prediction" model predicts: `v = sqrt(alpha_bar_t) eps - sqrt(1 - alpha_bar_t) x_0`.

        Args and result are those of `add_noise` (progressive distillation, arXiv 2202.00512, appendix D).
        """
        c = self._forward.at(timesteps, sample)
        noise = _noise_like(sample, noise, None)
        return _cast(_mix(-c.sqrt_one_minus_alpha_bar_t, _upcast(sample), c.sqrt_alpha_bar_t, noise), sample.dtype)

    # Backward process

    def scale_model_input(self, sample: torch.Tensor, timestep: int | torch.Tensor | None = None) -> torch.Tensor:
        """The sample as it is; schedulers that scale the model's input do so here."""
        return sample

    def sample_backward(
        self, x_t: torch.Tensor, t: int | torch.Tensor, model_output: torch.Tensor, **options: Any
    ) -> Any:
        """Draw x_prev from x_t: `step` in the words of `sample_forward`, with the options of `step`."""
        return self.step(model_output, t, x_t, **options).prev_sample

    def _predict_x0(self, output: torch.Tensor, x_t: torch.Tensor, c: Any) -> torch.Tensor:
        """x0_hat from what the model predicts, clipped as the config says."""
        config = self.config
        if config["prediction_type"] == "epsilon":
            if self._ends_in_noise and _is_zero_on_host(c.sqrt_alpha_bar_t):
                raise ValueError(NO_SIGNAL)
            x0_hat = _add_scaled(x_t, -c.sqrt_one_minus_alpha_bar_t, output).div_(c.sqrt_alpha_bar_t)
        elif config["prediction_type"] == "sample":
            x0_hat = output
        else:
            x0_hat = _mix(c.sqrt_alpha_bar_t, x_t, -c.sqrt_one_minus_alpha_bar_t, output)
        if config["thresholding"]:
            # each image has a range of its own, a quantile of |x0_hat| (Imagen, arXiv 2205.11487, section 2.3)
            quantile = torch.quantile(x0_hat.abs().flatten(1), config["dynamic_thresholding_ratio"], dim=1)
            limit = quantile.clamp(1, config["sample_max_value"]).view(-1, *[1] * (x0_hat.ndim - 1))
            return x0_hat.clamp(-limit, limit) / limit
        if config["clip_sample"]:
            return x0_hat.clamp(-config["clip_sample_range"], config["clip_sample_range"])
        return x0_hat


class MNISTDDPMScheduler(MNISTSchedulerBase):
    """DDPM: T small steps of noise forward, and as many or fewer steps back (Ho et al., arXiv 2006.11239).

    Every argument has diffusers' name and meaning, so that configs can be swapped; pass them by keyword.

    Args:
        num_train_timesteps: T, the number of timesteps of training, from 1 to 100,000.
        beta_start: the first beta; without effect on `"cosine"`.
        beta_end: the last beta; without effect on `"cosine"`.
        beta_schedule: `"linear"`, `"scaled_linear"`, `"cosine"` (in diffusers `"squaredcos_cap_v2"`) or `"sigmoid"`.
        trained_betas: the betas themselves, each 1e-10 or more; their number is T.
        variance_type: variance of the backward noise: `"fixed_small"`, the posterior's (the default); `"fixed_large"`,
            beta_t; or `"learned_range"`, between the two, as a model with 2C channels says (iDDPM, equation 15).
        clip_sample: whether x0_hat is clipped to `[-clip_sample_range, clip_sample_range]`.
        prediction_type: what the model predicts: `"epsilon"`, `"sample"` (x_0) or `"v_prediction"`.
        thresholding: whether x0_hat is clipped by dynamic thresholding instead.
        dynamic_thresholding_ratio: the quantile of |x0_hat| that sets the range of an image.
        clip_sample_range: half the width of the range of `clip_sample`.
        sample_max_value: the largest range that dynamic thresholding may set; below 1 it is the range.
        timestep_spacing: `"trailing"` (begins at T - 1, where the sample is noise), `"linspace"` (both ends) or
            `"leading"` (ends at 0 and begins too late; the default of diffusers).
        steps_offset: added to the timesteps of `"leading"`.
        rescale_betas_zero_snr: whether the betas are rescaled so that the last timestep is pure noise.
        simple_var: the document's word: True is `variance_type="fixed_large"`, False `"fixed_small"`.

    Raises:
        ValueError: for a value that is unknown, out of range or contradicts another, and for betas outside of (0, 1].
        TypeError: for a number of timesteps that is no integer.

    >>> scheduler = MNISTDDPMScheduler(beta_schedule="cosine", simple_var=True)
    >>> scheduler.set_timesteps(4)
    >>> scheduler.timesteps.tolist()
    [999, 749, 499, 249]
    """

    _variance_types = ("fixed_small", "fixed_large", "learned_range")
    _counterpart = diffusers.DDPMScheduler
    _row_type = DDPMRow

    @register_to_config
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        beta_start: float = 1e-4,
        beta_end: float = 2e-2,
        beta_schedule: str = "linear",
        trained_betas: Sequence[float] | None = None,
        variance_type: str | None = None,
        clip_sample: bool = True,
        prediction_type: str = "epsilon",
        thresholding: bool = False,
        dynamic_thresholding_ratio: float = 0.995,
        clip_sample_range: float = 1.0,
        sample_max_value: float = 1.0,
        timestep_spacing: str = "trailing",
        steps_offset: int = 0,
        rescale_betas_zero_snr: bool = False,
        simple_var: bool | None = None,
    ):
        """Set up the full chain of T timesteps."""
        self._set_up(simple_var)

    def _tabulate(self, alpha_bar_t: torch.Tensor, alpha_bar_prev: torch.Tensor, last: torch.Tensor) -> Any:
        alpha_t = alpha_bar_t / alpha_bar_prev
        beta_t = 1 - alpha_t
        posterior_variance = beta_t * (1 - alpha_bar_prev) / (1 - alpha_bar_t)
        variance = beta_t if self.simple_var else posterior_variance
        return DDPMRow(
            sqrt_alpha_bar_t=alpha_bar_t.sqrt(),
            sqrt_one_minus_alpha_bar_t=(1 - alpha_bar_t).sqrt(),
            x0_to_mean=alpha_bar_prev.sqrt() * beta_t / (1 - alpha_bar_t),
            xt_to_mean=alpha_t.sqrt() * (1 - alpha_bar_prev) / (1 - alpha_bar_t),
            noise_std=variance.sqrt().masked_fill(last, 0),
            log_variance_range=(beta_t / posterior_variance.where(~last, beta_t)).log(),
        )

    def step(
        self,
        model_output: torch.Tensor,
        timestep: int | torch.Tensor,
        sample: torch.Tensor,
        generator: Generators | None = None,
        return_dict: bool = True,
        noise_scale: float = 1.0,
        variance_noise: torch.Tensor | None = None,
    ) -> MNISTSchedulerOutput | tuple[torch.Tensor, torch.Tensor]:
        """Draw x_prev from x_t: `x_prev = mean + noise_scale sqrt(variance) z`, without noise in the last step.

        `mean = sqrt(alpha_bar_prev) beta_t / (1 - alpha_bar_t) x0_hat
        + sqrt(alpha_t) (1 - alpha_bar_prev) / (1 - alpha_bar_t) x_t` (DDPM, equation 7), which without clipping is
        `(x_t - beta_t / sqrt(1 - alpha_bar_t) eps_hat) / sqrt(alpha_t)` (equation 11). The variance is
        `beta_t (1 - alpha_bar_prev) / (1 - alpha_bar_t)` or, with `simple_var`, `beta_t`.

        Args:
            model_output: what the model predicts for `sample`, shape `(B, C, H, W)`; `(B, 2C, H, W)` where the
                variance is learned.
            timestep: t, one for all or shape `(B,)`.
            sample: x_t, shape `(B, C, H, W)`.
            generator: what draws z, one or a list with one for each image.
            return_dict: whether the result is a `MNISTSchedulerOutput` or a tuple.
            noise_scale: 1 as a rule, 0 for a result without chance. But a DDPM without noise collapses towards the
                mean of the data: for good samples without chance use `MNISTDDIMScheduler`.
            variance_noise: z itself, shape `(B, C, H, W)`, instead of a generator.

        Returns:
            x_prev and x0_hat, both of the shape and dtype of `sample`.

        Raises:
            ValueError: for a timestep or a `noise_scale` (0 to 1000) out of range, or a shape that does not fit.
            TypeError: for images that are no floating point tensors, and a timestep that is no integer.
        """
        _check_number("noise_scale", noise_scale, 0, MAX_NOISE_SCALE, " (0: no noise, 1 as a rule)")
        noise_scale = float(noise_scale)
        c = self._backward.at(timestep, sample)
        learned = self.config["variance_type"] == "learned_range"
        if learned:
            _check_images("model_output", model_output, (len(sample), 2 * sample.shape[1], *sample.shape[2:]))
            model_output, v = model_output.chunk(2, dim=1)
        _check_images("model_output", model_output, sample.shape)
        x_t = _upcast(sample)
        x0_hat = self._predict_x0(_cast(model_output, x_t.dtype), x_t, c)
        x_prev = _mix(c.x0_to_mean, x0_hat, c.xt_to_mean, x_t)
        if noise_scale and not _is_zero(c.noise_std):
            z = _upcast(_noise_like(model_output, variance_noise, generator))
            if learned:
                # from the posterior's standard deviation to that of the variance at (v + 1) / 2 in the range of logs
                z = z * torch.exp(c.log_variance_range * (_upcast(v) + 1) / 4)
            _add_scaled_(x_prev, noise_scale * c.noise_std, z)
        return _output(x_prev, x0_hat, sample.dtype, return_dict)


class MNISTDDIMScheduler(MNISTSchedulerBase):
    """DDIM: the same models as DDPM in fewer steps, with as much noise as wanted (Song et al., arXiv 2010.02502).

    Args:
        set_alpha_to_one: whether the last step leads to the image itself, and not to the noise level of timestep 0.
        variance_type: `"fixed_small"` (the default): the noise of eta = 1 has the posterior's variance.
            `"fixed_large"`: the paper's sigma-hat, more noise than the rest of the step makes room for.

    All other arguments are those of `MNISTDDPMScheduler`.

    >>> scheduler = MNISTDDIMScheduler.from_config(MNISTDDPMScheduler().config)
    >>> scheduler.set_timesteps(timesteps=[999, 600, 200])
    >>> scheduler.previous_timestep(600), scheduler.previous_timestep(200)
    (200, -1)
    """

    _counterpart = diffusers.DDIMScheduler
    _row_type = DDIMRow

    @register_to_config
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        beta_start: float = 1e-4,
        beta_end: float = 2e-2,
        beta_schedule: str = "linear",
        trained_betas: Sequence[float] | None = None,
        variance_type: str | None = None,
        clip_sample: bool = True,
        set_alpha_to_one: bool = True,
        prediction_type: str = "epsilon",
        thresholding: bool = False,
        dynamic_thresholding_ratio: float = 0.995,
        clip_sample_range: float = 1.0,
        sample_max_value: float = 1.0,
        timestep_spacing: str = "trailing",
        steps_offset: int = 0,
        rescale_betas_zero_snr: bool = False,
        simple_var: bool | None = None,
    ):
        """Set up the full chain of T timesteps."""
        self._set_up(simple_var, set_alpha_to_one)

    def _tabulate(self, alpha_bar_t: torch.Tensor, alpha_bar_prev: torch.Tensor, last: torch.Tensor) -> Any:
        beta_t = 1 - alpha_bar_t / alpha_bar_prev
        # of the noise in x_prev the share that sigma^2 of eta = 1 leaves to eps_hat; 1 where no noise is drawn
        kept_share = (1 - beta_t) * (1 - alpha_bar_prev) / (1 - alpha_bar_t)
        sigma = ((1 - alpha_bar_prev) / (1 - alpha_bar_t) * beta_t).sqrt()
        return DDIMRow(
            sqrt_alpha_bar_t=alpha_bar_t.sqrt(),
            sqrt_one_minus_alpha_bar_t=(1 - alpha_bar_t).sqrt(),
            sqrt_alpha_bar_prev=alpha_bar_prev.sqrt(),
            sqrt_one_minus_alpha_bar_prev=(1 - alpha_bar_prev).sqrt(),
            kept_share=kept_share.masked_fill(last, 1),
            noise_std=(beta_t.sqrt() if self.simple_var else sigma).masked_fill(last, 0),
        )

    def step(
        self,
        model_output: torch.Tensor,
        timestep: int | torch.Tensor,
        sample: torch.Tensor,
        eta: float = 0.0,
        use_clipped_model_output: bool = False,
        generator: Generators | None = None,
        variance_noise: torch.Tensor | None = None,
        return_dict: bool = True,
    ) -> MNISTSchedulerOutput | tuple[torch.Tensor, torch.Tensor]:
        """Go from x_t to x_prev (DDIM, equation 12), without noise in the last step.

        `x_prev = sqrt(alpha_bar_prev) x0_hat + sqrt(1 - alpha_bar_prev - sigma^2) eps_hat + sigma z`,
        `sigma^2 = eta^2 (1 - alpha_bar_prev) / (1 - alpha_bar_t) beta_t` (equation 16). With `simple_var` the noise is
        `eta sqrt(beta_t) z`, the paper's sigma-hat, and the rest as before.

        Args:
            model_output: what the model predicts for `sample`, shape `(B, C, H, W)`.
            timestep: t, one for all or shape `(B,)`.
            sample: x_t, shape `(B, C, H, W)`.
            eta: from 0, no noise, to 1, the noise of DDPM.
            use_clipped_model_output: whether eps_hat is worked out again from the clipped x0_hat. With eta = 1 the
                step is DDPM's where this is so or nothing is clipped.
            generator: what draws z, one or a list with one for each image.
            variance_noise: z itself, shape `(B, C, H, W)`, instead of a generator.
            return_dict: whether the result is a `MNISTSchedulerOutput` or a tuple.

        Returns:
            x_prev and x0_hat, both of the shape and dtype of `sample`.

        Raises:
            ValueError: for a timestep or an eta out of range, or a shape that does not fit.
            TypeError: for images that are no floating point tensors, and a timestep that is no integer.
        """
        _check_number("eta", eta, 0, 1, " (0: no noise, 1: the noise of DDPM)")
        eta = float(eta)
        c = self._backward.at(timestep, sample)
        _check_images("model_output", model_output, sample.shape)
        x_t = _upcast(sample)
        output = _cast(model_output, x_t.dtype)
        x0_hat = self._predict_x0(output, x_t, c)
        if use_clipped_model_output:
            eps_hat = _add_scaled(x_t, -c.sqrt_alpha_bar_t, x0_hat).div_(c.sqrt_one_minus_alpha_bar_t)
        else:
            eps_hat = self._predict_eps(output, x_t, c)
        direction = c.sqrt_one_minus_alpha_bar_prev * (1 - eta**2 + eta**2 * c.kept_share) ** 0.5
        x_prev = _mix(c.sqrt_alpha_bar_prev, x0_hat, direction, eps_hat)
        if eta and not _is_zero(c.noise_std):
            z = _upcast(_noise_like(model_output, variance_noise, generator))
            _add_scaled_(x_prev, eta * c.noise_std, z)
        return _output(x_prev, x0_hat, sample.dtype, return_dict)

    def encode_step(
        self, model_output: torch.Tensor, timestep: int | torch.Tensor, sample: torch.Tensor
    ) -> torch.Tensor:
        """Go from x_prev to x_t: `step` with eta = 0 backwards, as if eps_hat were the same at x_prev and x_t.

        `x_t = sqrt(alpha_bar_t) x0_hat + sqrt(1 - alpha_bar_t) eps_hat` with
        `x0_hat = (x_prev - sqrt(1 - alpha_bar_prev) eps_hat) / sqrt(alpha_bar_prev)` (DDIM, section 4.3). There is no
        clipping: a step that clips can't be undone.

        Args:
            model_output: what the model predicts for `sample` and `timestep`, shape `(B, C, H, W)`.
            timestep: t, where the step leads, one for all or shape `(B,)`.
            sample: x_prev, shape `(B, C, H, W)`.

        Returns:
            x_t, of the shape and dtype of `sample`.
        """
        c = self._backward.at(timestep, sample)
        _check_images("model_output", model_output, sample.shape)
        x_prev = _upcast(sample)
        eps_hat = self._predict_eps(_cast(model_output, x_prev.dtype), x_prev, c)
        x0_hat = _add_scaled(x_prev, -c.sqrt_one_minus_alpha_bar_prev, eps_hat).div_(c.sqrt_alpha_bar_prev)
        return _cast(_mix(c.sqrt_alpha_bar_t, x0_hat, c.sqrt_one_minus_alpha_bar_t, eps_hat), sample.dtype)

    @torch.no_grad()
    def encode(self, model: Callable[[torch.Tensor, torch.Tensor], Any], sample: torch.Tensor) -> torch.Tensor:
        """The noise from which DDIM with eta = 0 makes these images, through the visited timesteps in reverse.

        Args:
            model: a U-Net, or any function of x and t that predicts what the config says.
            sample: images in [-1, 1], shape `(B, C, H, W)`.

        Returns:
            x at the first of `timesteps`, shape `(B, C, H, W)`: the `latents` of a pipeline.
        """
        for t in self.timesteps.flip(0):
            output = model(sample, t)
            sample = self.encode_step(getattr(output, "sample", output), t, sample)
        return sample

    def _predict_eps(self, output: torch.Tensor, x_t: torch.Tensor, c: Any) -> torch.Tensor:
        """eps_hat from what the model predicts."""
        if self.config["prediction_type"] == "epsilon":
            return output
        if self.config["prediction_type"] == "sample":
            return _add_scaled(x_t, -c.sqrt_alpha_bar_t, output).div_(c.sqrt_one_minus_alpha_bar_t)
        return _mix(c.sqrt_one_minus_alpha_bar_t, x_t, c.sqrt_alpha_bar_t, output)


OUR_SCHEDULERS = (MNISTDDPMScheduler, MNISTDDIMScheduler)
# diffusers looks up the class that a config is from in its own namespace; where it finds none, a swap warns of keys
for _scheduler in OUR_SCHEDULERS:
    setattr(diffusers, _scheduler.__name__, _scheduler)
