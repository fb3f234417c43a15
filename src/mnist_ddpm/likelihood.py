"""The variational bound of DDPM on the likelihood of images, term by term, in bits per dimension.

What it takes to encode an 8-bit image x_0 by a diffusion model is at most (DDPM, arXiv 2006.11239, equation 5)

    L = L_T + L_{T-1} + ... + L_1 + L_0
    L_T      what is left of the image after the last forward step   KL(q(x_T | x_0) || N(0, I))
    L_{t-1}  the backward step from x_t to x_{t-1}                   KL(q(x_{t-1} | x_t, x_0) || p(x_{t-1} | x_t))
    L_0      the last step, to one of 256 values                     -log p(x_0 | x_1)

The code counts timesteps from 0: L_{t-1} is the term of timestep t - 1, and L_0, the decoder's, that of timestep 0.

p is what the sampler does: x0_hat is clipped as the config says (for the bound without clipping, turn `clip_sample`
off), and the steps are those between the scheduler's `timesteps`, all T of them unless `set_timesteps` chose some. The
one thing that sampling leaves open is the variance of the decoder, as the last step adds no noise. As in the code of
both papers it is the posterior's variance of the step before, with `"fixed_small"` and with `"fixed_large"`; with
`"learned_range"` the model says where it lies between that and beta, as in every other step (iDDPM, arXiv 2102.09672,
equation 15).
"""

import math
from collections import namedtuple
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.special import log_ndtr

from mnist_ddpm.schedulers import MNISTDDPMScheduler, check_signal

LN_2 = math.log(2)
HALF_BIN = 1 / 255  # half the distance of two of the 256 values in [-1, 1]

BoundRow = namedtuple("BoundRow", "snr_gain log_posterior_variance log_variance_ratio")


class VariationalBound:
    """The terms of the bound, in bits per dimension and differentiable in what the model predicts.

    Args:
        scheduler: says what the backward steps are: timesteps, variance, prediction type, clipping.

    Raises:
        ValueError: for predicted noise at a timestep that is all noise, from which x_0 can't be told.

    >>> bound = VariationalBound(MNISTDDPMScheduler())
    >>> x_0 = torch.full((1, 1, 28, 28), -1.0)
    >>> x_t = bound.scheduler.sample_forward(x_0, 0, noise=torch.zeros_like(x_0))
    >>> bound.term(torch.zeros_like(x_0), 0, x_t, x_0)  # a perfect prediction is not free: the variance costs
    tensor([0.5098])
    """

    def __init__(self, scheduler: MNISTDDPMScheduler):
        """Compute the coefficients of each timestep in float64."""
        self.scheduler = scheduler
        self.timesteps = scheduler.timesteps.flip(0).cpu()
        alpha_bar = scheduler.alphas_cumprod.numpy(force=True)
        self.last_alpha_bar = float(alpha_bar[self.timesteps[-1]])
        if scheduler.config["prediction_type"] == "epsilon":
            check_signal(scheduler.alphas_cumprod[self.timesteps[-1]])
        self.learned = scheduler.config["variance_type"] == "learned_range"
        self._unclipped = scheduler
        if scheduler.config["clip_sample"] or scheduler.config["thresholding"]:
            config = dict(scheduler.config)
            self._unclipped = MNISTDDPMScheduler.from_config(config, clip_sample=False, thresholding=False)

        previous = scheduler.previous_timestep(torch.arange(len(scheduler), device="cpu")).numpy()
        decoder = previous < 0
        alpha_bar_prev = np.where(decoder, 1.0, alpha_bar[previous])
        beta = 1 - alpha_bar / alpha_bar_prev
        posterior_variance = beta * (1 - alpha_bar_prev) / (1 - alpha_bar)
        # the decoder's, from the step before; a chain of one step has none, and beta is all there is
        first, *others = self.timesteps.tolist()
        posterior_variance[decoder] = posterior_variance[others[0]] if others else beta[first]
        self.log_beta_ratio = np.log(beta / posterior_variance)  # 0 or more: beta is the largest variance
        fixed_log_ratio = self.log_beta_ratio * (~decoder if scheduler.simple_var else 0)
        self._rows = BoundRow(
            # SNR_prev - SNR_t, SNR = alpha_bar / (1 - alpha_bar), in a form without cancellation
            snr_gain=beta * alpha_bar_prev / ((1 - alpha_bar) * np.where(decoder, np.inf, 1 - alpha_bar_prev)),
            log_posterior_variance=np.log(posterior_variance),
            log_variance_ratio=self.log_beta_ratio if self.learned else fixed_log_ratio,
        )
        self._copies: dict[tuple[torch.device, torch.dtype], torch.Tensor] = {}

    def prior_term(self, x_0: torch.Tensor) -> torch.Tensor:
        """L_T of each image: `1/2 (alpha_bar_T x_0^2 - alpha_bar_T - log(1 - alpha_bar_T))`, the mean over the pixels.

        Args:
            x_0: images in [-1, 1], shape `(B, C, H, W)`.

        Returns:
            Bits per dimension, shape `(B,)`. No model can change them.
        """
        constant = -self.last_alpha_bar - math.log1p(-self.last_alpha_bar)
        signal = x_0.square().flatten(1).mean(1)
        return (self.last_alpha_bar * signal + constant) / (2 * LN_2)

    def term(
        self, model_output: torch.Tensor, timestep: int | torch.Tensor, sample: torch.Tensor, x_0: torch.Tensor
    ) -> torch.Tensor:
        """L_{t-1} of each image, or L_0 where the timestep is the last one that is visited.

        Both Gaussians of L_{t-1} have their means on the line from x_t to x_0 and x0_hat, so that with
        `r = log(variance / posterior variance)` and `SNR = alpha_bar / (1 - alpha_bar)`

        `L_{t-1} = 1/2 (r + exp(-r) - 1 + exp(-r) (SNR_prev - SNR_t) (x_0 - x0_hat)^2)`

        (DDPM, equations 7 and 8; with r = 0 as in variational diffusion models, arXiv 2107.00630). L_0 is
        `discretized_gaussian_log_likelihood`. Gradients pass clipping as if it weren't there: what is out of range is
        pulled back, and not left alone.

        Args:
            model_output: what the model predicts for `sample`, shape `(B, C, H, W)`; `(B, 2C, H, W)` where the
                variance is learned.
            timestep: t, one for all or shape `(B,)`, of those that are visited.
            sample: x_t, shape `(B, C, H, W)`.
            x_0: the images, on the grid of 256 values in [-1, 1], shape `(B, C, H, W)`.

        Returns:
            Bits per dimension, shape `(B,)`, in at least float32.
        """
        x_t = sample.to(torch.promote_types(sample.dtype, torch.float32))
        x_0, model_output = x_0.to(x_t.dtype), model_output.to(x_t.dtype)
        x0_hat = self._predict_x0(model_output, timestep, x_t)
        t = torch.as_tensor(timestep, device=x_0.device).expand(len(x_0))
        c = self._rows_of(t, x_t)
        log_ratio = c.log_variance_ratio
        if self.learned:
            log_ratio = log_ratio * (model_output.chunk(2, dim=1)[1] + 1) / 2
        error = c.snr_gain * (x_0 - x0_hat).square()
        bits: torch.Tensor = (log_ratio + torch.expm1(-log_ratio) + torch.exp(-log_ratio) * error) / (2 * LN_2)
        at_decoder = t == self.timesteps[0].item()
        if not at_decoder.is_cpu or at_decoder.any():  # the decoder is slow, and waiting for a device is slower
            log_variance = c.log_posterior_variance + log_ratio
            decoder_bits = -discretized_gaussian_log_likelihood(x_0, x0_hat, log_variance) / LN_2
            bits = torch.where(at_decoder.view(-1, *[1] * (x_0.ndim - 1)), decoder_bits, bits)
        return bits.flatten(1).mean(1)

    def schedule_cost(self) -> dict[str, float]:
        """What the variances cost a model whose x0_hat is always right, in bits per dimension.

        Returns:
            `variance_mismatch`: the sum over t of `1/2 (log(v / w) + w / v - 1)`, w the posterior's variance and v
            that of the backward step (0 where they are the same, or where the model may make them the same);
            `background_decoder`: L_0 of a black (or white) pixel, with the decoder's smallest variance;
            `background_decoder_beta`: the same with the variance beta, the largest of `"learned_range"`.
        """
        decoder, *others = self.timesteps.tolist()
        mismatch = self.log_beta_ratio[others] if self.scheduler.simple_var else np.zeros(1)
        log_variance = torch.tensor([self._rows.log_posterior_variance[decoder]], dtype=torch.float64, device="cpu")
        log_variance = torch.cat([log_variance, log_variance + self.log_beta_ratio[decoder]])
        black = -torch.ones_like(log_variance)
        background = -discretized_gaussian_log_likelihood(black, black, log_variance) / LN_2
        return {
            "variance_mismatch": float((mismatch + np.expm1(-mismatch)).sum() / (2 * LN_2)),
            "background_decoder": background[0].item(),
            "background_decoder_beta": background[1].item(),
        }

    def _rows_of(self, t: torch.Tensor, x_t: torch.Tensor) -> BoundRow:
        """The coefficients of each image, `(B, 1, 1, 1)`, from a copy of the table that is made once for a device."""
        where = x_t.device, x_t.dtype
        if where not in self._copies:
            self._copies[where] = torch.from_numpy(np.stack(self._rows)).to(*where)
        # (3, B) to three times (B, 1, 1, 1)
        return BoundRow(*self._copies[where][:, t].view(3, -1, *[1] * (x_t.ndim - 1)))

    def _predict_x0(self, model_output: torch.Tensor, t: int | torch.Tensor, x_t: torch.Tensor) -> torch.Tensor:
        """The sampler's x0_hat, with the gradient of x0_hat before clipping."""
        x0_hat = _predicted_x0(self.scheduler, model_output, t, x_t)
        if self._unclipped is self.scheduler or not (torch.is_grad_enabled() and model_output.requires_grad):
            return x0_hat
        unclipped = _predicted_x0(self._unclipped, model_output, t, x_t)
        clipped: torch.Tensor = x0_hat.detach()
        return clipped + (unclipped - unclipped.detach())  # plus 0, whose gradient is that of unclipped


def _predicted_x0(
    scheduler: MNISTDDPMScheduler, model_output: torch.Tensor, t: int | torch.Tensor, x_t: torch.Tensor
) -> torch.Tensor:
    """What a step without noise predicts as x_0."""
    x0_hat: torch.Tensor = scheduler.step(model_output, t, x_t, noise_scale=0.0, return_dict=False)[1]
    return x0_hat


def log_snr_betas(num_train_timesteps: int, log_snr_max: float, log_snr_min: float) -> torch.Tensor:
    """Betas of a log SNR that falls in equal steps, `log SNR = log(alpha_bar / (1 - alpha_bar))`: for likelihood.

    With many steps the bound depends on the two ends alone (variational diffusion models, arXiv 2107.00630), and the
    way between them decides what training at random timesteps looks at. L_{t-1} is 1/2 of the squared error of eps for
    each unit of log SNR, so that equal steps give all of the bound's parts about the same attention; a cosine spends
    most of the timesteps where next to nothing is left to be learned.

    Only the second step is a small one, such that the posterior's standard deviation there is a sixth of a bin of the
    decoder. That is the least variance that `"learned_range"` offers the decoder, for pixels that are known for sure;
    the most is that of the noise of the first step, for pixels of which nothing else is known.

    Args:
        num_train_timesteps: T, 3 or more.
        log_snr_max: at the first timestep, below 13 (at 9.7 the noise is as wide as a bin).
        log_snr_min: at the last timestep; what is left of the image there costs L_T.

    Returns:
        Betas, float64 `(T,)`: the `trained_betas` of a scheduler, which rejects those of a log SNR that doesn't fall.
    """
    # the posterior's precision is that of x_{t-1} given x_0 and that of x_t given x_{t-1}, added up
    first_beta = 1 / (1 + math.exp(log_snr_max))
    second_beta = 1 / (1 + (3 / HALF_BIN) ** 2 - 1 / first_beta)
    second_alpha_bar = (1 - first_beta) * (1 - second_beta)
    second_log_snr = math.log(second_alpha_bar / (1 - second_alpha_bar))
    log_snr = torch.linspace(second_log_snr, log_snr_min, num_train_timesteps - 1, dtype=torch.float64, device="cpu")
    log_alpha_bar = torch.nn.functional.logsigmoid(torch.cat([log_snr.new_tensor([log_snr_max]), log_snr]))
    return -torch.expm1(log_alpha_bar.diff(prepend=log_alpha_bar.new_zeros(1)))  # 1 - alpha_bar_t / alpha_bar_{t-1}


def discretized_gaussian_log_likelihood(
    x_0: torch.Tensor, mean: torch.Tensor, log_variance: torch.Tensor
) -> torch.Tensor:
    """The log probability of pixels under a Gaussian that is cut into 256 bins (DDPM, equation 13).

    Each bin is 2/255 wide, with its value in the middle; the bins of -1 and 1 extend to infinity.

    Args:
        x_0: pixels, on the grid of 256 values in [-1, 1], any shape.
        mean: of the Gaussian, of the same shape.
        log_variance: of the Gaussian, of a shape that broadcasts to it.

    Returns:
        Natural logarithms, of the shape and dtype of `x_0`; finite far out in the tails too.
    """
    # mirrored where x_0 lies above the mean, so that no upper tail is taken as 1 minus a number near 1
    side = torch.where(x_0 > mean, -1.0, 1.0).to(x_0.dtype)
    center, inverse_std = side * (x_0 - mean), torch.exp(-0.5 * log_variance)
    log_upper = log_ndtr((center + HALF_BIN) * inverse_std)
    log_lower = log_ndtr((center - HALF_BIN) * inverse_std)
    # log(exp(upper) - exp(lower)); a bin too narrow for the dtype counts as just wide enough
    gap = (log_lower - log_upper).clamp(max=-torch.finfo(x_0.dtype).eps)
    inside = log_upper + torch.log(-torch.expm1(gap))
    # x_0 is -1 or 1, with a tolerance that is wide for rounding and narrow for the next value, 2/255 away
    lower_edge, upper_edge = x_0 < -1 + HALF_BIN, x_0 > 1 - HALF_BIN
    tail = log_ndtr(torch.where(lower_edge, x_0 - mean + HALF_BIN, mean - x_0 + HALF_BIN) * inverse_std)
    return torch.where(lower_edge | upper_edge, tail, inside)


@dataclass(frozen=True)
class BitsPerDim:
    """The bound on N images, from k timesteps of each; all in bits per dimension.

    Args:
        prior: L_T of each image, shape `(N,)`.
        timesteps: those whose terms were computed, ascending, the decoder's first, shape `(N, k)`.
        terms: the terms of the bound there, shape `(N, k)`.
        weights: how many timesteps each of the k stands for, shape `(k,)`: all 1 where k is T.
    """

    prior: torch.Tensor
    timesteps: torch.Tensor
    terms: torch.Tensor
    weights: torch.Tensor

    @property
    def per_image(self) -> torch.Tensor:
        """The bound of each image, or its estimate, shape `(N,)`."""
        return self.prior + self.terms @ self.weights

    @property
    def total(self) -> float:
        """The bound, the mean over the images."""
        return self.per_image.mean().item()

    @property
    def standard_error(self) -> float:
        """The standard error of `total` by the spread over the images: of which images, timesteps and noise there are.

        Infinite for a single image, which tells nothing of the spread.
        """
        n = len(self.prior)
        return self.per_image.std().item() / math.sqrt(n) if n > 1 else math.inf

    @property
    def decoder(self) -> float:
        """L_0."""
        return self.terms[:, 0].mean().item()

    @property
    def diffusion(self) -> float:
        """The sum of all L_{t-1}."""
        return (self.terms[:, 1:] @ self.weights[1:]).mean().item()

    def summary(self) -> dict[str, float]:
        """The total, its standard error, and the three parts that it is the sum of, by their names in formulas."""
        return {
            "total": self.total,
            "standard_error": self.standard_error,
            "L_T": self.prior.mean().item(),
            "sum of L_{t-1}": self.diffusion,
            "L_0": self.decoder,
        }

    def between(self, start: int, stop: int) -> float:
        """The sum of the terms of timesteps from `start` to `stop - 1`; L_0 is one of them, L_T is not."""
        inside = (self.timesteps >= start) & (self.timesteps < stop)
        return ((self.terms * inside) @ self.weights).mean().item()

    def by_timestep(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The timesteps that were visited, ascending, and the mean term at each, both of shape `(n,)`."""
        flat = self.timesteps.flatten()
        counts = flat.bincount()
        visited = counts.nonzero().squeeze(1)
        return visited, flat.bincount(self.terms.flatten())[visited] / counts[visited]


def _runs(alpha_bar: Any, k: int) -> Any:
    """The edges `(k + 1,)` of k runs of n timesteps: the decoder's alone, then runs that weigh as equal as can be.

    A step weighs what it would tell of data of variance 1: the difference of `log(1 + SNR) = -log(1 - alpha_bar)`.
    """
    n = len(alpha_bar)
    if k == 1:
        return np.array([0, n])
    information = -np.log1p(-alpha_bar)
    share = (information[0] - information) / (information[0] - information[-1])
    j = np.arange(k - 1)
    edges = 1 + np.searchsorted(share, j / (k - 1))
    # no run is empty: the edges ascend, and leave room for those that follow
    edges = np.minimum(np.maximum.accumulate(edges - j) + j, n - (k - 1) + j)
    return np.concatenate([[0], edges, [n]])


@torch.no_grad()
def bits_per_dim(
    model: Callable[[torch.Tensor, torch.Tensor], Any],
    scheduler: MNISTDDPMScheduler,
    images: torch.Tensor,
    num_timesteps: int | None = None,
    batch_size: int = 256,
    generator: torch.Generator | None = None,
    progress: Callable[[int], object] | None = None,
) -> BitsPerDim:
    """The bound on images, over all timesteps or estimated from some.

    Of `num_timesteps` one is always the decoder's. The others come one from each of as many runs of the remaining
    timesteps, each uniform in its run and weighted by its length, the runs short where the terms are large. So the
    estimate is unbiased, and the images are independent of each other. All timesteps are the special case of runs of
    length 1. The noise is drawn once for each term.

    Args:
        model: a U-Net, or any function of x_t and t `(B,)` that predicts what the scheduler's config says.
        scheduler: the noise schedule and the backward steps.
        images: uint8, shape `(N, C, H, W)`.
        num_timesteps: k for each image, from 2 to T; None for all T.
        batch_size: images at a time.
        generator: what draws timesteps and noise, on the CPU.
        progress: is told after each batch how many more terms there are, `tqdm.update` for one; there are N k in all.

    Returns:
        The terms and their sums, on the CPU in float64.

    Raises:
        TypeError: for images that are not uint8.
        ValueError: for a `num_timesteps` out of range.
    """
    bound = VariationalBound(scheduler)
    n, num_visited = len(images), len(bound.timesteps)
    k = num_visited if num_timesteps is None else num_timesteps
    if images.dtype != torch.uint8:
        raise TypeError(f"images must be uint8, got {images.dtype}. The bound is one of 8-bit images.")
    if not min(2, num_visited) <= k <= num_visited:
        raise ValueError(f"num_timesteps must be from 2 (one of them for L_0) to {num_visited}, got {k}.")

    edges = torch.from_numpy(_runs(scheduler.alphas_cumprod[bound.timesteps].numpy(), k))
    lengths = edges.diff()
    places = edges[:-1] + (torch.rand(n, k, generator=generator, dtype=torch.float64) * lengths).long()
    timesteps = bound.timesteps[places]

    device = getattr(model, "device", images.device)
    dtype = torch.float32 if device.type == "mps" else torch.float64  # Apple's MPS has no float64
    terms, prior = torch.empty(n, k, dtype=torch.float64), torch.empty(n, dtype=torch.float64)
    for start in range(0, n, batch_size):
        part = slice(start, min(start + batch_size, n))
        x_0 = images[part].to(device, dtype) / 127.5 - 1
        prior[part] = bound.prior_term(x_0).to("cpu", torch.float64)
        for j in range(k):
            t = timesteps[part, j].to(device)
            x_t = scheduler.sample_forward(x_0, t, generator=generator)
            output = model(x_t.to(getattr(model, "dtype", dtype)), t)
            terms[part, j] = bound.term(getattr(output, "sample", output), t, x_t, x_0).to("cpu", torch.float64)
            if progress is not None:
                progress(len(x_0))
    return BitsPerDim(prior=prior, timesteps=timesteps, terms=terms, weights=lengths.double())
