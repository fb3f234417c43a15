"""Analytic data: for Gaussian data the best prediction is known, and so is what sampling with it must give.

For x_0 ~ N(m, C) the best eps_hat given x_t is affine in x_t, so every step is affine too: the mean and covariance of
the samples follow from a recursion, without sampling. Data lie along the eigenvectors of C, one per coordinate here.
"""

import math
from itertools import pairwise

import pytest
import torch

from mnist_ddpm import MNISTDDIMScheduler, MNISTDDPMScheduler

MEAN = torch.tensor([0.3, -0.5, 0.0, 0.2], dtype=torch.float64)
VARIANCE = torch.tensor([0.0, 0.04, 1.0, 0.5], dtype=torch.float64)  # a point, a blob, pure noise, and between
SCHEDULES = ["linear", "scaled_linear", "cosine", "sigmoid"]


def best_eps(alpha_bar, mean=MEAN, variance=VARIANCE):
    """E[eps | x_t] by Bayes' rule: x_t has mean sqrt(a) m and variance a C + 1 - a."""
    return lambda x: (1 - alpha_bar) ** 0.5 * (x - alpha_bar**0.5 * mean) / (alpha_bar * variance + 1 - alpha_bar)


def moments(scheduler, n, **options):
    """Mean and variance of the samples, by recursion over the scheduler's own steps, which are affine in x and z."""
    scheduler.set_timesteps(n)
    mean, variance = torch.zeros(4, dtype=torch.float64), torch.ones(4, dtype=torch.float64)
    x, z = torch.tensor([[0.0, 1, 0], [0, 0, 1]], dtype=torch.float64)[:, :, None].expand(2, 3, 4)
    for t in scheduler.timesteps.tolist():
        eps = best_eps(scheduler.alphas_cumprod[t])(x)
        intercept, at_one, noisy = scheduler.step(eps, t, x, variance_noise=z, **options).prev_sample
        slope, noise_std = at_one - intercept, noisy - intercept
        mean, variance = slope * mean + intercept, slope**2 * variance + noise_std**2
    return mean, variance


def expected_moments(scheduler, n, noise_share, hat):
    """The same recursion from DDIM's equations 12 and 16; DDPM is the case noise_share = 1."""
    scheduler.set_timesteps(n)
    alpha_bars = torch.cumprod(1 - scheduler.betas, dim=0).tolist()
    timesteps = scheduler.timesteps.tolist()
    mean, variance = torch.zeros(4, dtype=torch.float64), torch.ones(4, dtype=torch.float64)
    for t, prev in zip(timesteps, [*timesteps[1:], None], strict=True):
        a, a_prev = alpha_bars[t], 1.0 if prev is None else alpha_bars[prev]
        fresh = noise_share**2 * (1 - a_prev) / (1 - a) * (1 - a / a_prev)
        # x_prev = sqrt(a_prev/a) x + c eps_hat(x), with eps_hat(x) = g (x - sqrt(a) m)
        g = (1 - a) ** 0.5 / (a * VARIANCE + 1 - a)
        c = (1 - a_prev - fresh) ** 0.5 - (a_prev * (1 - a) / a) ** 0.5
        mean = (a_prev / a) ** 0.5 * mean + c * g * (mean - a**0.5 * MEAN)
        noise = noise_share**2 * (1 - a / a_prev) if hat else fresh
        variance = ((a_prev / a) ** 0.5 + c * g) ** 2 * variance + (0 if prev is None else noise)
    return mean, variance


@pytest.mark.parametrize("n", [1, 7, 50])
@pytest.mark.parametrize("simple_var", [False, True])
@pytest.mark.parametrize("beta_schedule", SCHEDULES)
def test_samples_have_the_moments_of_the_recursion(beta_schedule, simple_var, n):
    kwargs = {"beta_schedule": beta_schedule, "simple_var": simple_var, "clip_sample": False}
    cases = [(MNISTDDPMScheduler(**kwargs), {}, 1.0)]
    cases += [(MNISTDDIMScheduler(**kwargs), {"eta": eta}, eta) for eta in (0.0, 0.5, 1.0)]
    for scheduler, options, noise_share in cases:
        for actual, expected in zip(
            moments(scheduler, n, **options), expected_moments(scheduler, n, noise_share, simple_var), strict=True
        ):
            torch.testing.assert_close(actual, expected, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("beta_schedule", SCHEDULES)
def test_all_steps_sample_the_data_distribution(beta_schedule):
    """With T steps DDPM and DDIM give back the mean and the variance of the data."""
    kwargs = {"beta_schedule": beta_schedule, "clip_sample": False, "rescale_betas_zero_snr": False}
    for scheduler, options in [
        (MNISTDDPMScheduler(**kwargs), {}),
        (MNISTDDIMScheduler(**kwargs), {}),
        (MNISTDDIMScheduler(**kwargs), {"eta": 1.0}),
    ]:
        mean, variance = moments(scheduler, 1000, **options)
        # what is left of the start: sampling begins at N(0, 1), the forward process ends near it
        torch.testing.assert_close(mean, MEAN, rtol=0, atol=0.03)
        torch.testing.assert_close(variance, VARIANCE, rtol=0, atol=0.03)


def test_ddpm_without_noise_collapses():
    """Why noise_scale is not called eta: of the data's variance less than 1e-4 is left."""
    _, variance = moments(MNISTDDPMScheduler(clip_sample=False), 1000, noise_scale=0.0)
    assert (variance[1:] < 1e-4 * VARIANCE[1:]).all()
    _, variance = moments(MNISTDDIMScheduler(clip_sample=False), 1000)
    assert (variance[1:] > 0.9 * VARIANCE[1:]).all()


# The exact flow


def exact_flow(x_t, alpha_bar_t, alpha_bar_s=1.0):
    """Where DDIM's ODE carries x from noise level t to s: standard units of the marginal stay what they are."""
    std_t, std_s = ((a * VARIANCE + 1 - a) ** 0.5 for a in (alpha_bar_t, alpha_bar_s))
    return alpha_bar_s**0.5 * MEAN + std_s / std_t * (x_t - alpha_bar_t**0.5 * MEAN)


def flow_error(n, beta_schedule):
    scheduler = MNISTDDIMScheduler(beta_schedule=beta_schedule, clip_sample=False)
    scheduler.set_timesteps(n)
    x_T = torch.tensor([[1.0, -1.5, 0.5, 2.0]], dtype=torch.float64)
    x = x_T
    for t in scheduler.timesteps.tolist():
        x = scheduler.step(best_eps(scheduler.alphas_cumprod[t])(x), t, x).prev_sample
    return (x - exact_flow(x_T, scheduler.alphas_cumprod[999]))[:, 1:].abs().max().item()


@pytest.mark.parametrize("beta_schedule", SCHEDULES)
def test_ddim_converges_to_the_exact_flow_at_first_order(beta_schedule):
    """From 20 to 500 steps the error falls as 1/n: the slope of log error against log n is -1."""
    numbers = [20, 50, 100, 200, 500]
    x = torch.tensor(numbers, dtype=torch.float64).log()
    y = torch.tensor([flow_error(n, beta_schedule) for n in numbers], dtype=torch.float64).log()
    slope = ((x - x.mean()) * (y - y.mean())).sum() / ((x - x.mean()) ** 2).sum()
    assert 0.9 < -slope < 1.1


# DDPM, section 3.2: bounds of the backward variance


@pytest.mark.parametrize("n", [1000, 10])
def test_the_best_variance_lies_between_the_posterior_s_and_simple_var_s(n):
    """Var[x_prev | x_t] is the posterior's for data at a point, beta_t for variance 1, else between."""
    small, large = (MNISTDDPMScheduler(simple_var=on, clip_sample=False) for on in (False, True))
    x, z = torch.zeros(1, 1, dtype=torch.float64), torch.ones(1, 1, dtype=torch.float64)
    small.set_timesteps(n)
    large.set_timesteps(n)
    for t, prev in pairwise(small.timesteps.tolist()):
        lower, upper = (
            (s.step(x, t, x, variance_noise=z).prev_sample - s.step(x, t, x, noise_scale=0).prev_sample).item() ** 2
            for s in (small, large)
        )
        a, a_prev = small.alphas_cumprod[t].item(), small.alphas_cumprod[prev].item()

        def best(c, a=a, a_prev=a_prev):
            """x_prev ~ N(., v) and x_t = sqrt(a/a_prev) x_prev + noise of variance 1 - a/a_prev."""
            v = a_prev * c + 1 - a_prev
            return v * (1 - a / a_prev) / (a / a_prev * v + 1 - a / a_prev)

        assert best(0.0) == pytest.approx(lower, rel=1e-9)
        assert best(1.0) == pytest.approx(upper, rel=1e-9)
        for c in (0.01, 0.5, 0.99):
            assert lower < best(c) < upper


# encode


def decode(scheduler, x, mean=MEAN):
    for t in scheduler.timesteps.tolist():
        x = scheduler.step(best_eps(scheduler.alphas_cumprod[t], mean)(x), t, x).prev_sample
    return x


def encoder(scheduler):
    return lambda x, t: best_eps(scheduler.alphas_cumprod[t])(x)


def test_encoded_images_come_back_with_an_error_that_falls_with_the_steps():
    x_0 = torch.tensor([[0.3, -0.4, 0.9, 0.1]], dtype=torch.float64)
    errors = []
    for n in (10, 50, 250, 1000):
        scheduler = MNISTDDIMScheduler(clip_sample=False)
        scheduler.set_timesteps(n)
        noise = scheduler.encode(encoder(scheduler), x_0)
        errors.append((decode(scheduler, noise) - x_0)[:, 1:].abs().max().item())
    assert all(fine < 0.5 * coarse for coarse, fine in pairwise(errors))
    assert errors[-1] < 3e-3


def test_the_noise_of_an_image_is_that_of_the_exact_flow():
    scheduler = MNISTDDIMScheduler(clip_sample=False)
    scheduler.set_timesteps(1000)
    x_T = torch.tensor([[1.0, -1.5, 0.5, 2.0]], dtype=torch.float64)
    x_0 = exact_flow(x_T, scheduler.alphas_cumprod[999])
    noise = scheduler.encode(encoder(scheduler), x_0)
    torch.testing.assert_close(noise[:, 1:], x_T[:, 1:], rtol=0, atol=0.02)


def test_two_images_are_blended_in_noise_space():
    """Halfway on the arc between two noises lies an image of the data's distribution, not the mean of the two."""
    scheduler = MNISTDDIMScheduler(clip_sample=False)
    scheduler.set_timesteps(200)
    images = exact_flow(torch.randn(2, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64), 1e-9)
    first, second = scheduler.encode(encoder(scheduler), images)
    blend = (first + second) / math.sqrt(2)  # keeps the variance of independent noises
    image = decode(scheduler, blend[None])[0]
    expected = MEAN + ((images - MEAN).sum(0)) / math.sqrt(2)  # the flow is affine for Gaussian data
    torch.testing.assert_close(image[1:], expected[1:], rtol=0, atol=0.05)
