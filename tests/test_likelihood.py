"""The bound in bits per dimension, against what algebra says it is.

For data x_0 ~ N(m, C) the best x0_hat is known, and the variance that is left of x_0 once x_t is seen. Every term but
the decoder's is quadratic in (x_0, eps), so its mean over the four points x_0 = m +- sqrt(C), eps = +-1 is its
expectation, exactly.
"""

import math

import numpy as np
import pytest
import torch
from torch.special import log_ndtr, ndtr

from mnist_ddpm import MNISTDDPMScheduler, MNISTUNet2DModel, VariationalBound, bits_per_dim
from mnist_ddpm.likelihood import discretized_gaussian_log_likelihood, log_snr_betas

LN_2 = math.log(2)
MEAN = torch.tensor([0.3, -0.5, 0.0, 0.2], dtype=torch.float64).view(1, 1, 2, 2)
VARIANCE = torch.tensor([0.0, 0.04, 0.9, 0.5], dtype=torch.float64).view(1, 1, 2, 2)
GRID = torch.arange(256, dtype=torch.float64) / 127.5 - 1
SCHEDULES = ["linear", "cosine"]
UNCLIPPED = {"clip_sample": False}


def scheduler(T=20, **kwargs):
    betas = {} if "beta_schedule" in kwargs or "trained_betas" in kwargs else {"beta_end": 0.3}
    return MNISTDDPMScheduler(**{"num_train_timesteps": T, "prediction_type": "sample"} | betas | kwargs)


def snr(noise_schedule, t):
    alpha_bar = noise_schedule.alphas_cumprod[t]
    return (alpha_bar / (1 - alpha_bar)).item()


def sigma_points(alpha_bar):
    """x_0 and x_t, `(4, 1, 2, 2)`."""
    signs = torch.tensor([[1, 1], [1, -1], [-1, 1], [-1, -1]], dtype=torch.float64).view(4, 2, 1, 1, 1)
    x_0 = MEAN + VARIANCE.sqrt() * signs[:, 0]
    return x_0, alpha_bar**0.5 * x_0 + (1 - alpha_bar) ** 0.5 * signs[:, 1].expand_as(x_0)


def best_x0(x_t, alpha_bar):
    """E[x_0 | x_t], by Bayes' rule."""
    return MEAN + alpha_bar**0.5 * VARIANCE / (alpha_bar * VARIANCE + 1 - alpha_bar) * (x_t - alpha_bar**0.5 * MEAN)


def left_variance(alpha_bar):
    """Var[x_0 | x_t]."""
    return VARIANCE * (1 - alpha_bar) / (alpha_bar * VARIANCE + 1 - alpha_bar)


def as_predicted(x0_hat, x_t, alpha_bar, prediction_type):
    eps_hat = (x_t - alpha_bar**0.5 * x0_hat) / (1 - alpha_bar) ** 0.5
    v = alpha_bar**0.5 * eps_hat - (1 - alpha_bar) ** 0.5 * x0_hat
    return {"sample": x0_hat, "epsilon": eps_hat, "v_prediction": v}[prediction_type]


def posterior(noise_schedule, t):
    """Variance of q(x_{t-1} | x_t, x_0), and the weight of x_0 in its mean, by adding up precisions."""
    beta, alpha_bar_prev = noise_schedule.betas[t].item(), noise_schedule.alphas_cumprod[t - 1].item()
    variance = 1 / (1 / (1 - alpha_bar_prev) + (1 - beta) / beta)
    return variance, variance * alpha_bar_prev**0.5 / (1 - alpha_bar_prev)


def information(noise_schedule, t):
    """I(x_0; x_t) for the Gaussian data, in bits, the mean over the dimensions."""
    return (torch.log1p(snr(noise_schedule, t) * VARIANCE) / (2 * LN_2)).mean().item()


# L_{t-1}


@pytest.mark.parametrize("prediction_type", ["epsilon", "sample", "v_prediction"])
@pytest.mark.parametrize("variance_type", ["fixed_small", "fixed_large"])
@pytest.mark.parametrize("beta_schedule", SCHEDULES)
def test_terms_of_gaussian_data_are_the_divergences_of_gaussians(beta_schedule, variance_type, prediction_type):
    kwargs = {"beta_schedule": beta_schedule, "variance_type": variance_type, "prediction_type": prediction_type}
    noise_schedule = scheduler(**kwargs, **UNCLIPPED)
    bound = VariationalBound(noise_schedule)
    for t in range(1, 20):
        alpha_bar = noise_schedule.alphas_cumprod[t].item()
        x_0, x_t = sigma_points(alpha_bar)
        output = as_predicted(best_x0(x_t, alpha_bar), x_t, alpha_bar, prediction_type)
        q_variance, weight = posterior(noise_schedule, t)
        p_variance = q_variance if variance_type == "fixed_small" else noise_schedule.betas[t].item()
        squared_distance = weight**2 * left_variance(alpha_bar)
        divergence = 0.5 * (math.log(p_variance / q_variance) + (q_variance + squared_distance) / p_variance - 1)
        expected = divergence.mean().item() / LN_2
        assert bound.term(output, t, x_t, x_0).mean().item() == pytest.approx(expected, rel=1e-8)


def sum_of_terms(noise_schedule, output_of):
    """The sum of all L_{t-1} for the Gaussian data."""
    bound, total = VariationalBound(noise_schedule), 0.0
    for t in range(1, len(noise_schedule)):
        x_0, x_t = sigma_points(noise_schedule.alphas_cumprod[t].item())
        total += bound.term(output_of(x_t, t), t, x_t, x_0).mean().item()
    return total


@pytest.mark.parametrize("T", [2, 5, 60])
@pytest.mark.parametrize("beta_schedule", SCHEDULES)
def test_with_the_best_learned_variance_the_terms_sum_to_what_the_first_step_tells_of_the_image(beta_schedule, T):
    """With the backward step equal to the true one, all that is paid for x_1 is I(x_0; x_1) - I(x_0; x_T)."""
    noise_schedule = scheduler(T, beta_schedule=beta_schedule, variance_type="learned_range", **UNCLIPPED)

    def output_of(x_t, t):
        alpha_bar, beta = noise_schedule.alphas_cumprod[t].item(), noise_schedule.betas[t].item()
        prev_variance = noise_schedule.alphas_cumprod[t - 1] * (VARIANCE - 1) + 1  # of x_{t-1}
        best = 1 / (1 / prev_variance + (1 - beta) / beta)  # Var[x_{t-1} | x_t]
        smallest = posterior(noise_schedule, t)[0]
        v = 2 * torch.log(best / smallest) / math.log(beta / smallest) - 1  # iDDPM, equation 15
        return torch.cat([best_x0(x_t, alpha_bar), v.expand_as(x_t)], dim=1)

    expected = information(noise_schedule, 0) - information(noise_schedule, T - 1)
    assert sum_of_terms(noise_schedule, output_of) == pytest.approx(expected, rel=1e-9)


def test_with_a_fixed_variance_the_sum_falls_to_the_same_as_steps_are_added():
    """At first order, where the ends stay what they are: twice the steps, half the excess."""
    excesses = []
    for T in (25, 50, 100):
        alpha_bar = torch.linspace(6, -6, T, dtype=torch.float64).sigmoid()  # log SNR in equal steps
        betas = 1 - alpha_bar / torch.cat([torch.ones(1), alpha_bar[:-1]])
        noise_schedule = scheduler(trained_betas=betas.tolist(), **UNCLIPPED)
        total = sum_of_terms(noise_schedule, lambda x_t, t, s=noise_schedule: best_x0(x_t, s.alphas_cumprod[t].item()))
        excesses.append(total - information(noise_schedule, 0) + information(noise_schedule, T - 1))
    assert min(excesses) > 0
    assert excesses[1] / excesses[0] == pytest.approx(0.5, abs=0.06)
    assert excesses[2] / excesses[1] == pytest.approx(0.5, abs=0.03)


@pytest.mark.parametrize("timesteps", [None, [19, 13, 4, 2, 0], [17, 3]])
@pytest.mark.parametrize("beta_schedule", SCHEDULES)
def test_a_constant_error_costs_the_difference_of_the_ends(beta_schedule, timesteps):
    """Each term is 1/2 error^2 (SNR_prev - SNR_t), and the sum telescopes, whatever timesteps are visited."""
    noise_schedule = scheduler(beta_schedule=beta_schedule, **UNCLIPPED)
    if timesteps:
        noise_schedule.set_timesteps(timesteps=timesteps)
    images = torch.arange(0, 252, 7, dtype=torch.uint8).view(9, 1, 2, 2)
    x_0 = images.double() / 127.5 - 1
    result = bits_per_dim(lambda x_t, t: x_0 + 0.05, noise_schedule, images)
    first, last = (timesteps[-1], timesteps[0]) if timesteps else (0, 19)
    expected = 0.05**2 / 2 * (snr(noise_schedule, first) - snr(noise_schedule, last)) / LN_2
    assert result.diffusion == pytest.approx(expected, rel=1e-9)
    assert result.timesteps[0].tolist() == (timesteps[::-1] if timesteps else list(range(20)))


def test_a_learned_variance_lies_between_the_posterior_s_and_beta():
    learned = VariationalBound(scheduler(variance_type="learned_range"))
    x_0, x_t = torch.rand(2, 3, 1, 2, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for v, variance_type in [(-1.0, "fixed_small"), (1.0, "fixed_large")]:
        fixed = VariationalBound(scheduler(variance_type=variance_type))
        for t in range(1, 20):
            output = torch.cat([x_t, torch.full_like(x_t, v)], dim=1)
            torch.testing.assert_close(learned.term(output, t, x_t, x_0), fixed.term(x_t, t, x_t, x_0))


# L_0


@pytest.mark.parametrize("log_std", [-14, -6, -4, -1, 2, 9])
@pytest.mark.parametrize("mean", [-50.0, -1.0, -0.3, 0.0, 0.7, 1.0, 1.1])
def test_the_probabilities_of_the_256_values_sum_to_one(mean, log_std):
    means = torch.full_like(GRID, mean, requires_grad=True)
    log_variances = torch.full_like(GRID, 2.0 * log_std, requires_grad=True)
    log_probabilities = discretized_gaussian_log_likelihood(GRID, means, log_variances)
    assert log_probabilities.exp().sum().item() == pytest.approx(1, abs=1e-9)
    assert torch.isfinite(log_probabilities).all()
    log_probabilities.sum().backward()
    assert torch.isfinite(means.grad).all()
    assert torch.isfinite(log_variances.grad).all()


@pytest.mark.parametrize(("mean", "std"), [(0.99, 0.02), (-0.7, 0.03), (0.1, 0.5), (5.0, 1.0), (-0.2, 20.0)])
def test_log_probabilities_are_right_far_out(mean, std):
    """Against the integral of the density over each bin, by 40 Gauss-Legendre nodes, as a log of a sum of logs."""
    nodes, weights = map(torch.from_numpy, np.polynomial.legendre.leggauss(40))
    z = (GRID[1:-1, None] + nodes / 255 - mean) / std
    log_density = -(z**2) / 2 - math.log(math.sqrt(2 * math.pi) * std)
    expected = torch.logsumexp(log_density + weights.log() - math.log(255), dim=1)
    log_variance = torch.tensor(2 * math.log(std), dtype=torch.float64)
    actual = discretized_gaussian_log_likelihood(GRID, torch.full_like(GRID, mean), log_variance)
    torch.testing.assert_close(actual[1:-1], expected, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(actual[0], log_ndtr((GRID[0] + 1 / 255 - mean) / std), rtol=1e-9, atol=0)
    torch.testing.assert_close(actual[-1], log_ndtr((mean - GRID[-1] + 1 / 255) / std), rtol=1e-9, atol=0)
    half = discretized_gaussian_log_likelihood(GRID.float(), torch.full((256,), mean), log_variance.float())
    torch.testing.assert_close(half.double(), actual, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("v", [None, -3.0, -1.0, 0.5, 1.0])
@pytest.mark.parametrize("variance_type", ["fixed_small", "fixed_large", "learned_range"])
def test_the_decoder_s_variance_is_the_posterior_s_of_the_step_before_unless_learned(variance_type, v):
    noise_schedule = scheduler(variance_type=variance_type)
    x_0 = GRID.view(-1, 1, 1, 1)
    output, log_variance = x_0.flip(0), math.log(posterior(noise_schedule, 1)[0])
    if variance_type == "learned_range":
        output = torch.cat([output, torch.full_like(x_0, v := v or 0.0)], dim=1)
        log_variance = (v + 1) / 2 * math.log(noise_schedule.betas[0]) + (1 - v) / 2 * log_variance
    log_variance = torch.tensor(log_variance, dtype=torch.float64)
    expected = -discretized_gaussian_log_likelihood(x_0, x_0.flip(0), log_variance) / LN_2
    for t in (0, torch.tensor(0), torch.tensor([0]), torch.zeros(256, dtype=torch.long)):
        torch.testing.assert_close(VariationalBound(noise_schedule).term(output, t, x_0, x_0), expected.flatten())


# L_T


@pytest.mark.parametrize("beta_schedule", SCHEDULES)
def test_prior_term_is_the_divergence_of_the_last_x_from_pure_noise(beta_schedule):
    noise_schedule = scheduler(beta_schedule=beta_schedule)
    alpha_bar = noise_schedule.alphas_cumprod[-1]
    x_0 = torch.rand(3, 2, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    last = torch.distributions.Normal(alpha_bar.sqrt() * x_0, (1 - alpha_bar).sqrt())
    divergence = torch.distributions.kl_divergence(last, torch.distributions.Normal(0.0, 1.0))
    expected = divergence.mean(dim=(1, 2, 3)) / LN_2
    torch.testing.assert_close(VariationalBound(noise_schedule).prior_term(x_0), expected, rtol=1e-6, atol=1e-12)


def test_where_the_last_timestep_is_all_noise_nothing_is_left_of_the_image():
    noise_schedule = scheduler(rescale_betas_zero_snr=True, prediction_type="v_prediction")
    images = torch.randint(0, 256, (5, 1, 2, 2), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    result = bits_per_dim(lambda x_t, t: 0.1 * x_t, noise_schedule, images)
    assert (result.prior == 0).all()
    assert torch.isfinite(result.terms).all()
    with pytest.raises(ValueError, match="prediction_type"):
        VariationalBound(scheduler(rescale_betas_zero_snr=True, prediction_type="epsilon"))


# The whole bound


def expected_bound(images, noise_schedule):
    """The bound of 8-bit images under the predictor of Gaussian data, integrated over the noise; per dimension."""
    x_0 = images.double() / 127.5 - 1
    alpha_bars = noise_schedule.alphas_cumprod.tolist()
    total = 0.5 * (alpha_bars[-1] * x_0**2 - alpha_bars[-1] - math.log(1 - alpha_bars[-1]))
    for t, alpha_bar in enumerate(alpha_bars):
        # x0_hat is affine in eps
        bias = best_x0(alpha_bar**0.5 * x_0, alpha_bar) - x_0
        slope = best_x0((1 - alpha_bar) ** 0.5, alpha_bar) - best_x0(0.0, alpha_bar)
        if t > 0:
            variance, weight = posterior(noise_schedule, t)
            total += weight**2 * (bias**2 + slope**2) / (2 * variance)
        else:
            std = posterior(noise_schedule, 1)[0] ** 0.5
            for eps, share in zip(*np.polynomial.hermite_e.hermegauss(30), strict=True):
                z = -(bias + slope * eps).abs() / std
                upper, lower = (torch.erfc(-(z + end / (255 * std)) / 2**0.5) / 2 for end in (1, -1))
                total -= share / math.sqrt(2 * math.pi) * (upper - lower).log()
    return (total / LN_2).mean(dim=(1, 2, 3))


def gaussian_images():
    """Three images, gray all over, near the middle of the Gaussian data: no bin is an open one."""
    draws = torch.randn(3, 1, 2, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    return ((MEAN + 0.5 * VARIANCE.sqrt() * draws + 1) * 127.5).round().to(torch.uint8)


def gaussian_model(noise_schedule):
    def model(x_t, t):
        return best_x0(x_t, noise_schedule.alphas_cumprod[t].view(-1, 1, 1, 1))

    return model


@pytest.mark.parametrize("num_timesteps", [None, 3])
def test_the_bound_is_that_of_theory_and_its_estimate_too(num_timesteps):
    """The same images many times over: the mean over the noise (and the timesteps) is the expectation."""
    noise_schedule = scheduler(8, trained_betas=[0.002, 0.004, 0.01, 0.03, 0.1, 0.2, 0.4, 0.6], **UNCLIPPED)
    images, copies = gaussian_images(), 3000
    generator = torch.Generator().manual_seed(0)
    result = bits_per_dim(
        gaussian_model(noise_schedule), noise_schedule, images.repeat(copies, 1, 1, 1), num_timesteps, 9000, generator
    )
    per_image = result.per_image.view(copies, 3)
    z = (per_image.mean(0) - expected_bound(images, noise_schedule)) / (per_image.std(0) / copies**0.5)
    assert z.abs().max() < 4
    assert result.total == pytest.approx(result.prior.mean().item() + result.diffusion + result.decoder)
    assert result.between(0, 8) == pytest.approx(result.diffusion + result.decoder)
    assert result.between(0, 1) == pytest.approx(result.decoder)


def known_terms(noise_schedule, error):
    """A model with an error that depends on t alone, and the terms that it must have for t > 0."""
    x_0 = torch.zeros(1, 1, 1, 1, dtype=torch.float64) / 127.5 - 1
    ratios = [snr(noise_schedule, t) for t in range(len(noise_schedule))]
    terms = [error(t) ** 2 / 2 * (ratios[t - 1] - ratios[t]) / LN_2 for t in range(1, len(ratios))]
    return lambda x_t, t: x_0 + error(t.double().view(-1, 1, 1, 1)), terms


@pytest.mark.parametrize("k", [2, 5, 19])
def test_the_estimate_is_unbiased_with_an_honest_error(k):
    """Each image is one estimate of the same sum: from timesteps alone, as its terms do not depend on the noise."""
    noise_schedule = scheduler(**UNCLIPPED)
    model, terms = known_terms(noise_schedule, lambda t: 0.02 * (1 + t))
    images = torch.zeros(4000, 1, 1, 1, dtype=torch.uint8)
    generator = torch.Generator().manual_seed(k)
    result = bits_per_dim(model, noise_schedule, images, k, 4000, generator)
    exact = bits_per_dim(model, noise_schedule, images[:1])
    assert exact.diffusion == pytest.approx(sum(terms), rel=1e-9)
    assert abs(result.total - exact.total) < 4 * result.standard_error
    assert (result.timesteps[:, 0] == 0).all()
    assert (result.timesteps.diff() > 0).all()
    assert result.weights.sum() == 20
    # each part of t is estimated without bias as well, whether or not it is cut where the runs are
    for start, stop in [(1, 5), (5, 12), (12, 20)]:
        inside = (result.timesteps >= start) & (result.timesteps < stop)
        parts = (result.terms * inside) @ result.weights
        error = 4 * parts.std().item() / 4000**0.5 + 1e-9
        assert abs(result.between(start, stop) - sum(terms[start - 1 : stop - 1])) < error
    timesteps, means = result.by_timestep()
    assert timesteps.tolist() == list(range(20))
    torch.testing.assert_close(means[1:], torch.tensor(terms, dtype=torch.float64), rtol=1e-9, atol=0)

    # the error that 50 images tell of themselves is the spread of the estimates from 50 images
    groups = [result.per_image[i : i + 50] for i in range(0, 4000, 50)]
    told = torch.stack([group.std() / 50**0.5 for group in groups]).mean()
    spread = torch.stack([group.mean() for group in groups]).std()
    assert told.item() == pytest.approx(spread.item(), rel=0.35)


@pytest.mark.parametrize("variance_type", ["fixed_small", "fixed_large", "learned_range"])
def test_a_chain_of_one_step_is_decoded_with_its_beta(variance_type):
    noise_schedule = scheduler(trained_betas=[0.3], variance_type=variance_type)
    images = gaussian_images()
    x_0 = images.double() / 127.5 - 1
    output = torch.cat([x_0, x_0], dim=1) if variance_type == "learned_range" else x_0
    result = bits_per_dim(lambda x_t, t: output, noise_schedule, images)
    assert result.terms.shape == (3, 1)
    assert result.diffusion == 0
    log_variance = torch.tensor(math.log(0.3), dtype=torch.float64)
    expected = -discretized_gaussian_log_likelihood(x_0, x_0, log_variance).mean().item() / LN_2
    assert result.decoder == pytest.approx(expected)


# Clipping


def test_x0_hat_is_clipped_as_the_sampler_clips_it():
    x_0 = torch.full((1, 1, 2, 2), -1.0, dtype=torch.float64)
    for t in (0, 1, 19):
        clipped, unclipped = VariationalBound(scheduler()), VariationalBound(scheduler(**UNCLIPPED))
        assert clipped.term(x_0 - 0.5, t, x_0, x_0) == clipped.term(x_0, t, x_0, x_0)
        assert unclipped.term(x_0 - 0.5, t, x_0, x_0) != clipped.term(x_0, t, x_0, x_0)
    expected = 0.5**2 / 2 * (snr(clipped.scheduler, 4) - snr(clipped.scheduler, 5)) / LN_2
    assert unclipped.term(x_0 - 0.5, 5, x_0, x_0).item() == pytest.approx(expected)


def test_gradients_pull_back_what_is_out_of_range_unless_it_is_right_there():
    bound = VariationalBound(scheduler())
    x_0 = torch.tensor([-1.0, 0.5, 0.5, 1.0], dtype=torch.float64).view(4, 1, 1, 1)
    output = torch.tensor([-1.5, -1.5, 1.5, 1.5], dtype=torch.float64).view(4, 1, 1, 1).requires_grad_()
    bound.term(output, 5, x_0, x_0).sum().backward()
    gain = (snr(bound.scheduler, 4) - snr(bound.scheduler, 5)) / LN_2
    # the error is that of the clipped value
    expected = torch.tensor([0.0, -1.5 * gain, 0.5 * gain, 0.0], dtype=torch.float64)
    torch.testing.assert_close(output.grad.flatten(), expected)


@pytest.mark.parametrize("variance_type", ["fixed_large", "learned_range"])
def test_gradients_are_those_of_finite_differences(variance_type):
    bound = VariationalBound(scheduler(variance_type=variance_type, **UNCLIPPED))
    generator = torch.Generator().manual_seed(0)
    x_0 = GRID[torch.randint(256, (4, 1, 1, 2), generator=generator)]
    output = x_0 + 0.1 * torch.randn(x_0.shape, generator=generator, dtype=torch.float64)
    if variance_type == "learned_range":
        output = torch.cat([output, torch.randn(x_0.shape, generator=generator, dtype=torch.float64)], dim=1)
    t = torch.tensor([0, 1, 7, 19])
    assert torch.autograd.gradcheck(lambda output: bound.term(output, t, x_0, x_0), output.requires_grad_())


# What the schedule costs


def test_schedule_cost_of_the_variance_is_the_bound_of_a_perfect_model():
    for variance_type in ("fixed_small", "fixed_large"):
        bound = VariationalBound(scheduler(variance_type=variance_type))
        x_0 = torch.full((1, 1, 2, 2), -1.0, dtype=torch.float64)
        terms = [bound.term(x_0, t, x_0, x_0).item() for t in range(20)]
        cost = bound.schedule_cost()
        assert cost["variance_mismatch"] == pytest.approx(sum(terms[1:]), abs=1e-12)
        assert cost["background_decoder"] == pytest.approx(terms[0])
    ratios = [posterior(bound.scheduler, t)[0] / bound.scheduler.betas[t].item() for t in range(1, 20)]
    expected = sum(0.5 * (-math.log(ratio) + ratio - 1) for ratio in ratios) / LN_2
    assert cost["variance_mismatch"] == pytest.approx(expected)


def test_linear_betas_charge_every_black_pixel_half_a_bit():
    """Its bin ends 1/255 above -1: with standard deviation s that is -log2 Phi(1 / (255 s))."""
    cost = VariationalBound(MNISTDDPMScheduler()).schedule_cost()
    posterior_variance = 1e-4 * (beta := 1e-4 + 1.99e-2 / 999) / (1 - (1 - 1e-4) * (1 - beta))
    for name, variance in [("background_decoder", posterior_variance), ("background_decoder_beta", 1e-4)]:
        probability = ndtr(torch.tensor(1 / 255 / variance**0.5, dtype=torch.float64)).item()
        assert cost[name] == pytest.approx(-math.log2(probability), rel=1e-6)
    assert cost["background_decoder"] == pytest.approx(0.51, abs=0.005)


@pytest.mark.parametrize("T", [3, 100, 4000])
@pytest.mark.parametrize("ends", [(9.0, -5.0), (12.9, 0.0)])
def test_log_snr_betas_go_from_end_to_end_in_equal_steps(T, ends):
    noise_schedule = scheduler(trained_betas=log_snr_betas(T, *ends).tolist(), variance_type="learned_range")
    log_snr = torch.logit(noise_schedule.alphas_cumprod)
    assert (log_snr[0].item(), log_snr[-1].item()) == pytest.approx(ends, abs=1e-8)
    steps = log_snr.diff()
    torch.testing.assert_close(steps[1:], steps[1:].mean().expand(T - 2), rtol=1e-5, atol=0)
    assert posterior(noise_schedule, 1)[0] ** 0.5 == pytest.approx(2 / 255 / 6, rel=1e-6)
    # a known pixel that is black costs the decoder little: its bin ends 3 standard deviations away
    cost = VariationalBound(noise_schedule).schedule_cost()["background_decoder"]
    assert cost == pytest.approx(-math.log2(ndtr(torch.tensor(3.0, dtype=torch.float64))), rel=1e-4)


# Models and input


def tiny_unet(**kwargs):
    torch.manual_seed(0)
    unet = MNISTUNet2DModel(
        sample_size=8, block_out_channels=(4, 8), attention_head_dim=4, layers_per_block=1, norm_num_groups=2, **kwargs
    )
    torch.nn.init.normal_(unet.conv_out.weight, std=0.05)
    return unet.eval()


@pytest.mark.parametrize("variance_type", ["fixed_small", "learned_range"])
def test_a_unet_is_measured_in_its_own_dtype_and_all_else_in_float64(variance_type):
    unet = tiny_unet(out_channels=2 if variance_type == "learned_range" else 1)
    noise_schedule = MNISTDDPMScheduler(beta_schedule="cosine", variance_type=variance_type)
    images = torch.randint(0, 256, (6, 1, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))

    def measure(dtype, **kwargs):
        generator = torch.Generator().manual_seed(0)
        return bits_per_dim(unet.to(dtype), noise_schedule, images, 4, generator=generator, **kwargs)

    done = []
    float32, again = measure(torch.float32), measure(torch.float32, progress=done.append)
    assert torch.equal(float32.per_image, again.per_image)
    assert sum(done) == 6 * 4
    assert float32.terms.dtype == float32.prior.dtype == torch.float64
    assert float32.terms.shape == float32.timesteps.shape == (6, 4)
    assert measure(torch.bfloat16).total == pytest.approx(float32.total, rel=0.05)
    assert not any(p.grad is not None for p in unet.parameters())


def test_what_would_be_silently_wrong_is_refused():
    images = torch.zeros(2, 1, 4, 4, dtype=torch.uint8)
    with pytest.raises(TypeError, match="images"):
        bits_per_dim(lambda x_t, t: x_t, scheduler(), images / 255)
    for k in (1, 21):
        with pytest.raises(ValueError, match="num_timesteps"):
            bits_per_dim(lambda x_t, t: x_t, scheduler(), images, k)
    with pytest.raises(ValueError, match="model_output"):
        bits_per_dim(lambda x_t, t: x_t[..., :2], scheduler(), images)
    for ends in ((-5.0, 9.0), (math.nan, -5.0)):
        with pytest.raises(ValueError, match="betas"):
            scheduler(trained_betas=log_snr_betas(100, *ends).tolist())


def test_tables_do_not_depend_on_the_default_device():
    torch.set_default_device("meta")
    try:
        cost = VariationalBound(MNISTDDPMScheduler()).schedule_cost()
        betas = log_snr_betas(8, 5, -5)
    finally:
        torch.set_default_device(None)
    assert cost == VariationalBound(MNISTDDPMScheduler()).schedule_cost()
    assert torch.equal(betas, log_snr_betas(8, 5, -5))
