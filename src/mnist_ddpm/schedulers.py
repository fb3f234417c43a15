"""DDPM and DDIM: how an image becomes noise, and how noise becomes an image again.

The symbols are DDPM's (arXiv 2006.11239). DDIM (arXiv 2010.02502) uses the same letters for other things:

    here             DDPM             DDIM                     diffusers
    beta_t           beta_t           1 - alpha_t/alpha_{t-1}  betas[t]
    alpha_t          alpha_t          alpha_t/alpha_{t-1}      alphas[t]
    alpha_bar_t      bar alpha_t      alpha_t                  alphas_cumprod[t]
    alpha_bar_prev   bar alpha_{t-1}  alpha_{t-1}              alphas_cumprod[previous_timestep(t)]
    x0_hat           (15)             f_theta(x_t)             pred_original_sample
    eps_hat          eps_theta        eps_theta(x_t)           model_output of a model that predicts "epsilon"

Timesteps count from 0 to T - 1, as in diffusers; the papers count from 1 to T. `prev` is the entry of `timesteps` that
is visited next. Where sampling skips timesteps, `alpha_t = alpha_bar_t / alpha_bar_prev` and `beta_t = 1 - alpha_t`
are those of the whole way from t to prev. The last step leads to the image itself, where `alpha_bar_prev = 1`.
Coefficients are tabulated in float64. A step reads a row, computes in at least float32 and casts the result alone.
"""

import inspect
import math
import operator
from collections import namedtuple
from collections.abc import Callable, Sequence
from typing import Any

import diffusers
import numpy as np
import torch
from diffusers.configuration_utils import ConfigMixin, FrozenDict, register_to_config
from diffusers.schedulers.scheduling_ddpm import DDPMSchedulerOutput as MNISTSchedulerOutput
from diffusers.schedulers.scheduling_utils import KarrasDiffusionSchedulers, SchedulerMixin
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

Timesteps = int | Tensor  # one for all images, or a tensor `(B,)`

# Beta schedules: float64 tensors of shape (T,) -----------------------------------------------------------------------


def linear_betas(num_train_timesteps: int, beta_start: float = 1e-4, beta_end: float = 2e-2) -> Tensor:
    """Betas in equal steps (DDPM, section 4)."""
    return torch.linspace(beta_start, beta_end, num_train_timesteps, dtype=torch.float64, device="cpu")


def cosine_betas(num_train_timesteps: int, s: float = 0.008, max_beta: float = 0.999) -> Tensor:
    """Betas of `alpha_bar_t = f(t) / f(0)`, `f(t) = cos^2(((t/T + s)/(1 + s)) pi/2)` (iDDPM, equation 17)."""
    time = torch.arange(num_train_timesteps + 1, dtype=torch.float64, device="cpu") / num_train_timesteps
    f = torch.cos((time + s) / (1 + s) * math.pi / 2) ** 2
    return (1 - f[1:] / f[:-1]).clamp(0, max_beta)


def rescale_zero_terminal_snr(betas: Tensor) -> Tensor:
    """Betas changed so that the last timestep is pure noise (arXiv 2305.08891, algorithm 1)."""
    root = torch.cumprod(1 - betas, dim=0).sqrt()
    alpha_bar = ((root - root[-1]) * root[0] / (root[0] - root[-1])) ** 2  # from root[0] as before to 0
    return 1 - alpha_bar / torch.cat([alpha_bar.new_ones(1), alpha_bar[:-1]])


BETA_SCHEDULES: dict[str, Callable[[int, float, float], Tensor]] = {
    "linear": linear_betas,
    "scaled_linear": lambda T, start, end: linear_betas(T, start**0.5, end**0.5) ** 2,  # arXiv 2112.10752
    "sigmoid": lambda T, start, end: start + (end - start) * linear_betas(T, -6, 6).sigmoid(),  # arXiv 2203.02923
    "squaredcos_cap_v2": lambda T, start, end: cosine_betas(T),
}


class MNISTSchedulerBase(SchedulerMixin, ConfigMixin):
    """What DDPM and DDIM share: the forward process, the predicted x_0, the timesteps and the config."""

    def sample_forward(self, x_0: Tensor, t: Timesteps, noise: Tensor | None = None, generator: Any = None) -> Tensor:
        """Draw x_t from x_0: `x_t = sqrt(alpha_bar_t) x_0 + sqrt(1 - alpha_bar_t) eps` (DDPM, equation 4).

        Args:
            x_0: images in [-1, 1], shape `(B, C, H, W)`.
            t: timestep from 0 to T - 1, one for all or shape `(B,)`.
            noise: eps, shape `(B, C, H, W)`; drawn if None.
            generator: draws eps; one, or a list with one per image.

        Returns:
            x_t, shape `(B, C, H, W)`.
        """
        c, eps = self._coefficients(t, x_0), draw_noise(x_0, noise, generator)
        x_t = c.sqrt_alpha_bar_t * x_0 + c.sqrt_one_minus_alpha_bar_t * eps
        return x_t.to(x_0.dtype)

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Timesteps) -> Tensor:
        """`sample_forward` under diffusers' name."""
        return self.sample_forward(original_samples, timesteps, noise)

    def forward_step(self, x_prev: Tensor, t: Timesteps, noise: Tensor | None = None, generator: Any = None) -> Tensor:
        """Draw x_t from x_{t-1}: `x_t = sqrt(alpha_t) x_{t-1} + sqrt(beta_t) eps` (DDPM, equation 2).

        Args and result are those of `sample_forward`. The step is one of training, whichever timesteps are visited.
        """
        c, eps = self._coefficients(t, x_prev), draw_noise(x_prev, noise, generator)
        x_t = c.sqrt_alpha_t * x_prev + c.sqrt_beta_t * eps
        return x_t.to(x_prev.dtype)

    def get_velocity(self, sample: Tensor, noise: Tensor, timesteps: Timesteps) -> Tensor:
        """The target of "v_prediction": `v = sqrt(alpha_bar_t) eps - sqrt(1 - alpha_bar_t) x_0` (arXiv 2202.00512)."""
        c, eps = self._coefficients(timesteps, sample), draw_noise(sample, noise, None)
        v = c.sqrt_alpha_bar_t * eps - c.sqrt_one_minus_alpha_bar_t * sample
        return v.to(sample.dtype)

    def _predict_x0(self, output: Tensor, x_t: Tensor, c: "Row") -> Tensor:
        """x0_hat from what the model predicts (for eps: DDPM, equation 15), clipped as the config says."""
        match self.config["prediction_type"]:
            case "epsilon":
                check_signal(c.sqrt_alpha_bar_t)
                x0_hat = (x_t - c.sqrt_one_minus_alpha_bar_t * output) / c.sqrt_alpha_bar_t
            case "sample":
                x0_hat = output.to(c.sqrt_alpha_bar_t.dtype)
            case "v_prediction":
                x0_hat = c.sqrt_alpha_bar_t * x_t - c.sqrt_one_minus_alpha_bar_t * output
        if self.config["thresholding"]:
            # each image has a range of its own, a quantile of |x0_hat| (Imagen, arXiv 2205.11487, section 2.3)
            quantile = torch.quantile(x0_hat.abs().flatten(1), self.config["dynamic_thresholding_ratio"], dim=1)
            limit = quantile.clamp(1, self.config["sample_max_value"]).view(-1, *[1] * (x0_hat.ndim - 1))
            return x0_hat.clamp(-limit, limit) / limit
        limit = self.config["clip_sample_range"]
        return x0_hat.clamp(-limit, limit) if self.config["clip_sample"] else x0_hat

    def sample_backward(self, x_t: Tensor, t: Timesteps, model_output: Tensor, **options: Any) -> Any:
        """Draw x_prev from x_t: `step` in the words of `sample_forward`, with the options of `step`."""
        return self.step(model_output, t, x_t, **options).prev_sample

    def scale_model_input(self, sample: Tensor, timestep: Timesteps | None = None) -> Tensor:
        """The sample as it is; schedulers that scale the model's input do so here."""
        return sample

    def set_timesteps(
        self, num_inference_steps: int | None = None, device: Any = None, timesteps: Sequence[int] | None = None
    ) -> None:
        """Choose the timesteps that sampling visits.

        Args:
            num_inference_steps: their number, from 1 to T; the config's `timestep_spacing` places them.
            device: where `timesteps` are wanted, the CPU if None.
            timesteps: instead of their number, the timesteps themselves in descending order.
        """
        if (num_inference_steps is None) == (timesteps is None):
            raise ValueError("num_inference_steps or timesteps must be given, and not both.")
        if num_inference_steps is not None:
            spacing, offset = self.config["timestep_spacing"], self.config["steps_offset"]
            timesteps = spaced_timesteps(spacing, len(self), operator.index(num_inference_steps), offset)
        self.timesteps = timesteps
        self._timesteps = self.timesteps.to(device)
        self._table(self.timesteps.device, torch.float32)  # copied now, as a step should not wait for it
        self.num_inference_steps = len(self.timesteps)
        if self.config["prediction_type"] == "epsilon":
            check_signal(self.alphas_cumprod[int(self.timesteps[0])])

    @property
    def timesteps(self) -> Tensor:
        """The timesteps that sampling visits, int64 `(n,)`, descending. Another list may be assigned."""
        return self._timesteps

    @timesteps.setter
    def timesteps(self, timesteps: Any) -> None:
        timesteps = torch.as_tensor(timesteps, device=getattr(timesteps, "device", "cpu"))
        check_timesteps(timesteps, len(self))
        self._timesteps = timesteps.long()
        self._made_for = timesteps.to("cpu", torch.int64, copy=True)
        prev = next_visited(self._made_for, torch.arange(len(self), device="cpu"))
        alpha_bar, beta = self.alphas_cumprod.cpu(), self.betas.cpu()
        alpha_bar_prev = alpha_bar[prev].where(prev >= 0, self.final_alpha_cumprod.cpu())
        self._rows = tabulate(alpha_bar, alpha_bar_prev, beta, last=prev < 0)
        self._copies: dict[Any, Tensor] = {}
        self._table(self._timesteps.device, torch.float32)

    def previous_timestep(self, timestep: Timesteps) -> Any:
        """The timestep that is visited after the given one, -1 after the last; of the type and shape of the input."""
        prev = next_visited(self.timesteps, torch.as_tensor(timestep, device=self.timesteps.device).long())
        return prev.to(timestep.device) if isinstance(timestep, Tensor) else int(prev)

    def _table(self, *where: Any) -> Tensor:
        """The rows of all timesteps `(T, k)` on a device and in a dtype, copied there once."""
        if where not in self._copies:  # into a new dict, as another thread may be copying the old one
            self._copies = {**self._copies, where: torch.stack(self._rows, dim=1).to(*where)}
        return self._copies[where]

    def _coefficients(self, timestep: Timesteps, sample: Tensor) -> "Row":
        """The row of a timestep, as tensors `(1, 1, 1, 1)` or `(B, 1, 1, 1)` in at least float32."""
        if self._timesteps.is_cpu and not torch.compiler.is_compiling() and not self._timesteps.equal(self._made_for):
            self.timesteps = self._timesteps  # it was written to in place
        check_images("sample", sample, sample.shape)
        t = timestep if isinstance(timestep, Tensor) else torch.tensor(timestep, device="cpu")
        table = self._table(t.device, torch.promote_types(sample.dtype, torch.float32))
        rows = table.index_select(0, t.reshape(-1)).to(sample.device, non_blocking=sample.is_cuda)
        return Row(*rows.view(len(rows), *[1] * (sample.ndim - 1), -1).unbind(-1))

    num_inference_steps: int | None = None
    order, init_noise_sigma = 1, 1.0
    ignore_for_config = ["simple_var"]  # noqa: RUF012
    _compatibles = ["MNISTDDPMScheduler", "MNISTDDIMScheduler", *(s.name for s in KarrasDiffusionSchedulers)]  # noqa: RUF012

    def _set_up(self, simple_var: bool | None, set_alpha_to_one: bool = True) -> None:
        """Put the config in canonical form, then make the tables."""
        config = canonical({**self.config, "simple_var": simple_var, "_class_name": type(self).__name__})
        self._internal_dict = config
        for name, choices in CHOICES.items():
            check_choice(name, config[name], choices)
        self.betas = betas_of(config)
        self.alphas = 1 - self.betas
        self.alphas_cumprod = torch.cumprod(self.alphas, dim=0)
        self.alphas_cumprod_prev = torch.cat([self.betas.new_ones(1), self.alphas_cumprod[:-1]])
        self.final_alpha_cumprod = self.betas.new_tensor(1.0) if set_alpha_to_one else self.alphas_cumprod[0]
        self.timesteps = range(len(self) - 1, -1, -1)  # all of them, until set_timesteps is called

    def __setattr__(self, name: str, value: Any) -> None:
        """Keep a config that may be written to, where diffusers or a pipeline replaces it as a whole."""
        if name == "_internal_dict":
            live = LiveConfig({**value, **self._internal_dict} if "betas" in self.__dict__ else value)
            for key in value:
                live[key] = value[key]  # rejects other betas
            value = live
        super().__setattr__(name, value)

    @property
    def simple_var(self) -> bool:
        """Whether the backward noise has variance `beta_t` (`variance_type="fixed_large"`), not the posterior's."""
        return bool(self.config["variance_type"] == "fixed_large")

    def __len__(self) -> int:
        """T, the number of training timesteps."""
        return len(self.betas)

    @classmethod
    def extract_init_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """Read the config of any scheduler: a missing key means the default of the class that the config is from."""
        return super().extract_init_dict(with_defaults(cls, canonical(config_dict)), **canonical(kwargs))


# the coefficients of one timestep, or a table of all of them: float64, `(T,)` each
Row = namedtuple(
    "Row",
    "sqrt_alpha_bar_t sqrt_one_minus_alpha_bar_t sqrt_alpha_t sqrt_beta_t sqrt_alpha_bar_prev "
    "sqrt_one_minus_alpha_bar_prev x0_to_mean xt_to_mean small_std large_std log_variance_range kept_share",
)


def tabulate(alpha_bar_t: Tensor, alpha_bar_prev: Tensor, training_beta_t: Tensor, last: Tensor) -> Row:
    """The coefficients of all timesteps, each `(T,)`; no noise where the step is the last one."""
    alpha_t = alpha_bar_t / alpha_bar_prev
    beta_t = 1 - alpha_t
    posterior_variance = beta_t * (1 - alpha_bar_prev) / (1 - alpha_bar_t)
    return Row(
        sqrt_alpha_bar_t=alpha_bar_t.sqrt(),
        sqrt_one_minus_alpha_bar_t=(1 - alpha_bar_t).sqrt(),
        sqrt_alpha_t=(1 - training_beta_t).sqrt(),  # of a step of training, from t - 1
        sqrt_beta_t=training_beta_t.sqrt(),
        sqrt_alpha_bar_prev=alpha_bar_prev.sqrt(),
        sqrt_one_minus_alpha_bar_prev=(1 - alpha_bar_prev).sqrt(),
        x0_to_mean=alpha_bar_prev.sqrt() * beta_t / (1 - alpha_bar_t),
        xt_to_mean=alpha_t.sqrt() * (1 - alpha_bar_prev) / (1 - alpha_bar_t),
        small_std=posterior_variance.sqrt().masked_fill(last, 0),
        large_std=beta_t.sqrt().masked_fill(last, 0),
        log_variance_range=(beta_t / posterior_variance.where(~last, beta_t)).log(),
        # 1 - sigma^2 / (1 - alpha_bar_prev), with DDIM's sigma for eta = 1
        kept_share=(alpha_t * (1 - alpha_bar_prev) / (1 - alpha_bar_t)).masked_fill(last, 1),
    )


class MNISTDDPMScheduler(MNISTSchedulerBase):
    """DDPM: T small steps of noise forward, and as many or fewer steps back (Ho et al., arXiv 2006.11239).

    Every argument has diffusers' name and meaning, so that configs can be swapped; pass them by keyword.

    Args:
        num_train_timesteps: T, the number of timesteps of training; or that of `trained_betas`, the betas themselves.
        beta_start: the first beta; like `beta_end`, the last one, without effect on `"cosine"`.
        beta_schedule: `"linear"`, `"scaled_linear"`, `"cosine"` (in diffusers `"squaredcos_cap_v2"`) or `"sigmoid"`.
        variance_type: variance of the backward noise: `"fixed_small"`, the posterior's (the default); `"fixed_large"`,
            beta_t; or `"learned_range"`, between the two, as a model with 2C channels predicts (iDDPM, equation 15).
        clip_sample: whether x0_hat is clipped to `[-clip_sample_range, clip_sample_range]`.
        prediction_type: what the model predicts: `"epsilon"`, `"sample"` (x_0) or `"v_prediction"`.
        thresholding: whether x0_hat is clipped instead to the quantile `dynamic_thresholding_ratio` of its absolute
            values, from 1 to `sample_max_value`, and divided by it.
        timestep_spacing: `"trailing"` (begins at T - 1, where the sample is noise), `"linspace"` (both ends) or
            `"leading"` (ends at 0 and begins too late; the default of diffusers), to which `steps_offset` is added.
        rescale_betas_zero_snr: whether the betas are rescaled so that the last timestep is pure noise.
        simple_var: True is another word for `variance_type="fixed_large"`, False for `"fixed_small"`.

    >>> scheduler = MNISTDDPMScheduler(beta_schedule="cosine", simple_var=True)
    >>> scheduler.set_timesteps(4)
    >>> scheduler.timesteps.tolist()
    [999, 749, 499, 249]
    """

    @register_to_config
    def __init__(
        self, num_train_timesteps: int = 1000, beta_start: float = 1e-4, beta_end: float = 2e-2,
        beta_schedule: str = "linear", trained_betas: Sequence[float] | None = None, variance_type: str | None = None,
        clip_sample: bool = True, prediction_type: str = "epsilon",
        thresholding: bool = False, dynamic_thresholding_ratio: float = 0.995, clip_sample_range: float = 1.0,
        sample_max_value: float = 1.0, timestep_spacing: str = "trailing", steps_offset: int = 0,
        rescale_betas_zero_snr: bool = False, simple_var: bool | None = None,
    ):  # fmt: skip
        self._set_up(simple_var)

    def step(
        self, model_output: Tensor, timestep: Timesteps, sample: Tensor, generator: Any = None,
        return_dict: bool = True, noise_scale: float = 1.0, variance_noise: Tensor | None = None,
    ) -> Any:  # fmt: skip
        """Draw x_prev from x_t: `x_prev = mean + noise_scale sqrt(variance) z`, without noise in the last step.

        `mean = sqrt(alpha_bar_prev) beta_t / (1 - alpha_bar_t) x0_hat
        + sqrt(alpha_t) (1 - alpha_bar_prev) / (1 - alpha_bar_t) x_t` (DDPM, equation 7), which without clipping is
        `(x_t - beta_t / sqrt(1 - alpha_bar_t) eps_hat) / sqrt(alpha_t)` (equation 11). The variance is
        `beta_t (1 - alpha_bar_prev) / (1 - alpha_bar_t)` or, with `simple_var`, `beta_t`.

        Args:
            model_output: what the model predicts for `sample`, `(B, C, H, W)`; 2C channels for a learned variance.
            timestep: t, one for all or shape `(B,)`.
            sample: x_t, shape `(B, C, H, W)`.
            generator: draws z; one, or a list with one per image.
            return_dict: whether the result is a `MNISTSchedulerOutput` or a tuple.
            noise_scale: usually 1. With 0 samples collapse towards the mean of the data: use `MNISTDDIMScheduler`.
            variance_noise: z itself, shape `(B, C, H, W)`, instead of a generator.
        """
        c, x_t, variance_type = self._coefficients(timestep, sample), sample, self.config["variance_type"]
        if variance_type == "learned_range":
            check_images("model_output", model_output, (len(sample), 2 * sample.shape[1], *sample.shape[2:]))
            model_output, v = model_output.chunk(2, dim=1)
        check_images("model_output", model_output, sample.shape)
        x0_hat = self._predict_x0(model_output, x_t, c)
        x_prev = c.x0_to_mean * x0_hat + c.xt_to_mean * x_t
        if noise_scale:
            noise_std = c.large_std if variance_type == "fixed_large" else c.small_std
            if variance_type == "learned_range":  # between the two, on a scale of logs (iDDPM, equation 15)
                noise_std = noise_std * torch.exp((v.to(noise_std.dtype) + 1) / 2 * c.log_variance_range / 2)
            x_prev = x_prev + noise_scale * noise_std * draw_noise(sample, variance_noise, generator)
        results = x_prev.to(sample.dtype), x0_hat.to(sample.dtype)
        return MNISTSchedulerOutput(*results) if return_dict else results


class MNISTDDIMScheduler(MNISTSchedulerBase):
    """DDIM: the same models as DDPM in fewer steps, with as much noise as wanted (Song et al., arXiv 2010.02502).

    Args:
        set_alpha_to_one: whether the last step leads to the image itself, and not to the noise level of timestep 0.
        variance_type: `"fixed_small"` (the default): the noise of eta = 1 has the posterior's variance.
            `"fixed_large"`: the paper's sigma-hat, more noise than the rest of the step makes room for.
            `"learned_range"`: as `"fixed_small"`; `step` is to get the first C channels of the model's output.

    All other arguments are those of `MNISTDDPMScheduler`.
    """

    @register_to_config
    def __init__(
        self, num_train_timesteps: int = 1000, beta_start: float = 1e-4, beta_end: float = 2e-2,
        beta_schedule: str = "linear", trained_betas: Sequence[float] | None = None, variance_type: str | None = None,
        clip_sample: bool = True, set_alpha_to_one: bool = True, prediction_type: str = "epsilon",
        thresholding: bool = False, dynamic_thresholding_ratio: float = 0.995, clip_sample_range: float = 1.0,
        sample_max_value: float = 1.0, timestep_spacing: str = "trailing", steps_offset: int = 0,
        rescale_betas_zero_snr: bool = False, simple_var: bool | None = None,
    ):  # fmt: skip
        self._set_up(simple_var, set_alpha_to_one)

    def step(
        self, model_output: Tensor, timestep: Timesteps, sample: Tensor, eta: float = 0.0,
        use_clipped_model_output: bool = False, generator: Any = None, variance_noise: Tensor | None = None,
        return_dict: bool = True,
    ) -> Any:  # fmt: skip
        """Go from x_t to x_prev (DDIM, equation 12), without noise in the last step.

        `x_prev = sqrt(alpha_bar_prev) x0_hat + sqrt(1 - alpha_bar_prev - sigma^2) eps_hat + sigma z`,
        `sigma^2 = eta^2 (1 - alpha_bar_prev) / (1 - alpha_bar_t) beta_t` (equation 16). With `simple_var` the noise is
        `eta sqrt(beta_t) z`, the paper's sigma-hat, and the rest as before.

        `eta` goes from 0, no noise, to 1, the noise of DDPM. With `use_clipped_model_output` eps_hat is computed again
        from the clipped x0_hat; with eta = 1 the step is then DDPM's. All else is as in `MNISTDDPMScheduler.step`.
        """
        c, x_t = self._coefficients(timestep, sample), sample
        check_images("model_output", model_output, sample.shape)
        x0_hat = self._predict_x0(model_output, x_t, c)
        eps_hat = self._predict_eps(model_output, x_t, c)
        if use_clipped_model_output:
            eps_hat = (x_t - c.sqrt_alpha_bar_t * x0_hat) / c.sqrt_one_minus_alpha_bar_t
        direction = c.sqrt_one_minus_alpha_bar_prev
        if eta:  # sqrt(1 - alpha_bar_prev - sigma^2), without cancellation
            direction = direction * (1 - eta**2 + eta**2 * c.kept_share) ** 0.5
        x_prev = c.sqrt_alpha_bar_prev * x0_hat + direction * eps_hat
        if eta:
            noise_std = c.large_std if self.simple_var else c.small_std
            x_prev = x_prev + eta * noise_std * draw_noise(sample, variance_noise, generator)
        results = x_prev.to(sample.dtype), x0_hat.to(sample.dtype)
        return MNISTSchedulerOutput(*results) if return_dict else results

    def _predict_eps(self, output: Tensor, x_t: Tensor, c: "Row") -> Tensor:
        """eps_hat from what the model predicts."""
        match self.config["prediction_type"]:
            case "sample":
                return (x_t - c.sqrt_alpha_bar_t * output) / c.sqrt_one_minus_alpha_bar_t
            case "v_prediction":
                return c.sqrt_one_minus_alpha_bar_t * x_t + c.sqrt_alpha_bar_t * output
        return output

    def encode_step(self, model_output: Tensor, timestep: Timesteps, sample: Tensor) -> Tensor:
        """Go from x_prev to x_t (DDIM, section 4.3): `step` with eta = 0 backwards, as if both had the same eps_hat.

        `x_t = sqrt(alpha_bar_t) x0_hat + sqrt(1 - alpha_bar_t) eps_hat` with `x0_hat = (x_prev - sqrt(1 -
        alpha_bar_prev) eps_hat) / sqrt(alpha_bar_prev)`, not clipped. `timestep` is t, where the step leads.
        """
        c, x_prev = self._coefficients(timestep, sample), sample
        check_images("model_output", model_output, sample.shape)
        eps_hat = self._predict_eps(model_output, x_prev, c)
        x0_hat = (x_prev - c.sqrt_one_minus_alpha_bar_prev * eps_hat) / c.sqrt_alpha_bar_prev
        x_t = c.sqrt_alpha_bar_t * x0_hat + c.sqrt_one_minus_alpha_bar_t * eps_hat
        return x_t.to(sample.dtype)

    @torch.no_grad()
    def encode(self, model: Callable[[Tensor, Tensor], Any], sample: Tensor) -> Tensor:
        """The noise, at the first of `timesteps`, that DDIM with eta = 0 turns into these images by this model."""
        for t in self.timesteps.flip(0):
            output = model(sample, t)
            sample = self.encode_step(getattr(output, "sample", output), t, sample)
        return sample


# diffusers looks up the class that a config is from in its own namespace; where it finds none, a swap warns of keys
diffusers.MNISTDDPMScheduler, diffusers.MNISTDDIMScheduler = MNISTDDPMScheduler, MNISTDDIMScheduler


def spaced_timesteps(spacing: str, T: int, n: int, offset: int) -> Any:
    """The n timesteps of a `timestep_spacing`, in descending order."""
    if spacing == "leading":
        return T // n * np.arange(n - 1, -1, -1) + offset
    # one division of integers, so that halves are exact; they go to the even neighbor
    if spacing == "trailing":
        return np.rint(np.arange(float(n * T), 0, -T) / n).astype(np.int64) - 1
    return np.rint((T - 1) * np.arange(n - 1.0, -1, -1) / max(n - 1, 1)).astype(np.int64)


def next_visited(timesteps: Tensor, t: Tensor) -> Tensor:
    """The prev of each timestep: the largest of the descending `timesteps` below it, -1 where there is none."""
    ascending = torch.cat([timesteps.new_tensor([-1]), timesteps.flip(0)])
    return ascending[torch.searchsorted(ascending, t) - 1]


def draw_noise(x: Tensor, noise: Tensor | None, generator: Any) -> Tensor:
    """The noise that was passed in, or normal noise in float32, so that a seed gives the same in every dtype."""
    if noise is not None:
        check_images("noise", noise, x.shape)
        return noise
    return randn_tensor(x.shape, generator=generator, device=x.device, dtype=torch.float32)


# Config swaps --------------------------------------------------------------------------------------------------------

CHOICES = {
    "beta_schedule": tuple(BETA_SCHEDULES),
    "prediction_type": ("epsilon", "sample", "v_prediction"),
    "timestep_spacing": ("trailing", "leading", "linspace"),
    "variance_type": ("fixed_small", "fixed_large", "learned_range"),
}


class LiveConfig(FrozenDict):
    """A config whose attributes are its items: a write to either takes effect from the next call on."""

    def __setitem__(self, name: str, value: Any) -> None:
        """Write both, if there is such a key and such a choice, and the betas were not made from another value."""
        if name == "simple_var":
            name, value = "variance_type", "fixed_large" if value else "fixed_small"
        is_change = name not in self or not np.array_equal(self[name], value)
        if is_change and name[0] != "_" and "_FrozenDict__frozen" in self.__dict__:  # all items of diffusers are there
            made = ("num_train_timesteps", "set_alpha_to_one", *(key for key in self if "beta" in key))
            free = [key for key in self if key not in made and key[0] != "_"]
            check_choice("key of a config", name, free, "Make another scheduler for other betas.")
            check_choice(name, value, CHOICES.get(name, [value]))
        super().__setitem__(name, value)
        self.__dict__[name] = value

    def __setattr__(self, name: str, value: Any) -> None:
        """Write both; what diffusers keeps beside the items begins with an underscore."""
        (super().__setattr__ if name[0] == "_" else self.__setitem__)(name, value)

    def __reduce__(self) -> Any:
        """Copy and pickle as a whole: a single item can't be added."""
        return LiveConfig, (dict(self),)


def canonical(config: dict[str, Any]) -> dict[str, Any]:
    """The config in diffusers' own keys and values, so that each of its schedulers understands it."""
    config = {key: value.item() if isinstance(value, np.generic) else value for key, value in config.items()}
    if "_use_default_values" in config:  # a key that is listed there would give way to the target's default in a swap
        config["_use_default_values"] = []
    if config.get("beta_schedule") == "cosine":
        config["beta_schedule"] = "squaredcos_cap_v2"
    simple_var = config.pop("simple_var", None)
    if simple_var is not None:
        kind, remedy = "fixed_large" if simple_var else "fixed_small", "Or leave out simple_var."
        check_choice("variance_type", config.get("variance_type"), [None, kind], remedy)
        config["variance_type"] = kind
    elif config.get("variance_type", "") is None:
        config["variance_type"] = "fixed_small"
    if config.get("trained_betas") is not None:
        config["trained_betas"] = [float(beta) for beta in config["trained_betas"]]
        config["num_train_timesteps"] = len(config["trained_betas"])
    return config


def with_defaults(cls: type[MNISTSchedulerBase], config: dict[str, Any]) -> dict[str, Any]:
    """The config with the defaults of the class that it is from, as far as `cls` has the keys."""
    name = config.get("_class_name", cls.__name__)
    source = cls if name == cls.__name__ else getattr(diffusers, str(name), None)
    theirs = inspect.signature(source).parameters if isinstance(source, type) else {}
    if "beta_schedule" not in {**theirs, **config}:
        raise ValueError(f"_class_name must be of a scheduler with a beta_schedule, got {name!r}.")
    shared = inspect.signature(cls).parameters.keys() & theirs.keys() - {"simple_var"}
    return {key: theirs[key].default for key in shared} | config


def betas_of(config: dict[str, Any]) -> Tensor:
    """The betas `(T,)` that a config asks for; rejected are those that are no variances or leave no signal."""
    if config["trained_betas"] is not None:
        betas = torch.tensor(config["trained_betas"], dtype=torch.float64, device="cpu")
    else:
        schedule = BETA_SCHEDULES[config["beta_schedule"]]
        betas = schedule(config["num_train_timesteps"], config["beta_start"], config["beta_end"])
    betas = rescale_zero_terminal_snr(betas) if config["rescale_betas_zero_snr"] else betas
    if not (len(betas) and (1 - betas < 1).all() and (betas <= 1).all() and (1 - betas[:-1]).prod()):
        raise ValueError(f"betas must lie in (0, 1] and leave some signal at T - 2, got {betas.tolist()!s:.80}.")
    return betas


# Checks --------------------------------------------------------------------------------------------------------------


def check_choice(name: str, value: Any, choices: Sequence[Any], remedy: str = "") -> None:
    """Reject what is none of the choices."""
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(str, choices))}, got {value!r}. {remedy}".strip())


def check_signal(alpha_bar: Tensor) -> None:
    """Reject timesteps without signal, from which predicted noise does not lead to x_0."""
    if alpha_bar.is_cpu and not torch.compiler.is_compiling() and not alpha_bar.all():
        raise ValueError("prediction_type must not be 'epsilon' where alphas_cumprod is 0. Take 'v_prediction'.")


def check_timesteps(timesteps: Tensor, T: int) -> None:
    """Reject a list of timesteps that is out of range or out of order; one on a device is not looked at."""
    is_list = timesteps.ndim == 1 and len(timesteps) > 0 and not timesteps.is_floating_point()
    if timesteps.is_cpu and not (is_list and timesteps[0] < T and timesteps[-1] >= 0 and (timesteps.diff() < 0).all()):
        got = f"got {timesteps.tolist()!s:.80}. Sort the list, or lower num_inference_steps or steps_offset."
        raise ValueError(f"timesteps must be integers in descending order, from {T - 1} at most to 0, {got}")


def check_images(name: str, x: Tensor, shape: Sequence[int]) -> None:
    """Reject images of integers, and a shape that would broadcast."""
    if not x.is_floating_point() or x.shape != torch.Size(shape):
        raise ValueError(f"{name} must be floating point of shape {tuple(shape)}, got {x.dtype} of {tuple(x.shape)}.")
