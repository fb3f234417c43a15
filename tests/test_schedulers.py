"""The formulas of DDPM and DDIM, each against algebra that is written out here in float64."""

import copy
import pickle
from fractions import Fraction
from itertools import pairwise

import numpy as np
import pytest
import torch
from diffusers.configuration_utils import FrozenDict
from hypothesis import given, settings
from hypothesis import strategies as st

from mnist_ddpm import MNISTDDIMScheduler, MNISTDDPMScheduler, MNISTUNet2DModel
from mnist_ddpm import schedulers as module

BOTH = pytest.mark.parametrize("scheduler_class", [MNISTDDPMScheduler, MNISTDDIMScheduler])
F64 = {"rtol": 1e-12, "atol": 1e-12}
SHAPE = (3, 1, 4, 4)


def alpha_bars(T=1000, beta_start=1e-4, beta_end=2e-2):
    return torch.cumprod(1 - torch.linspace(beta_start, beta_end, T, dtype=torch.float64), dim=0)


def normal(seed=0, shape=SHAPE, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def close(actual, expected, **tolerance):
    torch.testing.assert_close(actual, expected, **(tolerance or F64))


# D3 to D5: the constants


def test_linear_betas_are_evenly_spaced():
    betas = MNISTDDPMScheduler().betas
    assert betas.dtype == torch.float64
    close(betas, torch.tensor([1e-4 + (2e-2 - 1e-4) * t / 999 for t in range(1000)], dtype=torch.float64))


@pytest.mark.parametrize("name", ["cosine", "squaredcos_cap_v2"])
def test_cosine_betas_follow_iddpm_equation_17(name):
    T, s = 100, 0.008
    f = [np.cos((t / T + s) / (1 + s) * np.pi / 2) ** 2 for t in range(T + 1)]
    expected = [min(1 - f[t] / f[t - 1], 0.999) for t in range(1, T + 1)]
    scheduler = MNISTDDPMScheduler(num_train_timesteps=T, beta_schedule=name)
    close(scheduler.betas, torch.tensor(expected, dtype=torch.float64))
    assert scheduler.betas[-1] == 0.999
    assert scheduler.config.beta_schedule == "squaredcos_cap_v2"


def test_scaled_linear_and_sigmoid_betas():
    ramp = torch.linspace(0, 1, 50, dtype=torch.float64)
    root = 0.1 + (0.2 - 0.1) * ramp
    close(module.BETA_SCHEDULES["scaled_linear"](50, 0.01, 0.04), root**2)
    close(module.BETA_SCHEDULES["sigmoid"](50, 0.01, 0.04), 0.01 + 0.03 / (1 + torch.exp(6 - 12 * ramp)))


def test_trained_betas_set_the_number_of_timesteps():
    betas = np.array([0.1, 0.2, 0.3])
    scheduler = MNISTDDPMScheduler(trained_betas=betas)
    close(scheduler.betas, torch.from_numpy(betas))
    assert scheduler.config.num_train_timesteps == len(scheduler) == 3
    assert scheduler.config.trained_betas == [0.1, 0.2, 0.3]


def test_zero_terminal_snr_keeps_the_first_and_removes_the_last_signal():
    root = alpha_bars().sqrt()
    expected = (root - root[-1]) * root[0] / (root[0] - root[-1])
    scheduler = MNISTDDPMScheduler(rescale_betas_zero_snr=True, prediction_type="v_prediction")
    close(scheduler.alphas_cumprod.sqrt(), expected, rtol=1e-9, atol=1e-9)
    assert scheduler.alphas_cumprod[-1] == 0


@BOTH
def test_constants_are_float64_and_one_is_put_in_front(scheduler_class):
    scheduler = scheduler_class()
    close(scheduler.alphas, 1 - scheduler.betas)
    close(scheduler.alphas_cumprod, alpha_bars())
    close(scheduler.alphas_cumprod_prev, torch.cat([torch.ones(1, dtype=torch.float64), alpha_bars()[:-1]]))
    assert scheduler.final_alpha_cumprod == 1
    assert scheduler.init_noise_sigma == 1
    assert scheduler.order == 1


# D1 and D2: the forward process


@BOTH
def test_sample_forward_is_the_closed_form(scheduler_class):
    scheduler, t = scheduler_class(), torch.tensor([0, 500, 999])
    x_0, noise = normal(0), normal(1)
    alpha_bar = alpha_bars()[t].view(3, 1, 1, 1)
    expected = alpha_bar.sqrt() * x_0 + (1 - alpha_bar).sqrt() * noise
    close(scheduler.sample_forward(x_0, t, noise), expected)
    close(scheduler.add_noise(x_0, noise, t), expected)
    close(scheduler.sample_forward(x_0, 500, noise)[1], expected[1])


def test_sample_forward_draws_normal_noise():
    scheduler = MNISTDDPMScheduler()
    x_t = scheduler.sample_forward(torch.zeros(1, 1, 300, 300), 999, generator=torch.Generator().manual_seed(0))
    std = (1 - alpha_bars()[999]).sqrt().item()
    # 90,000 values: the standard error of the mean is 0.0033, of the standard deviation 0.0024
    assert abs(x_t.mean().item()) < 0.015
    assert abs(x_t.std().item() - std) < 0.01
    assert x_t.min() < -3  # uniform noise would not get there


def test_chained_forward_steps_have_the_distribution_of_the_closed_form():
    """Each step is affine in x and noise: its two coefficients, read off, give the chain's mean and variance."""
    scheduler = MNISTDDPMScheduler(num_train_timesteps=200)
    one, zero = torch.ones(1, 1, dtype=torch.float64), torch.zeros(1, 1, dtype=torch.float64)
    mean, variance = 1.0, 0.0
    for t in range(200):
        a, b = scheduler.forward_step(one, t, zero).item(), scheduler.forward_step(zero, t, one).item()
        mean, variance = a * mean, a * a * variance + b * b
        assert mean == pytest.approx(scheduler.sample_forward(one, t, zero).item(), rel=1e-12)
        assert variance**0.5 == pytest.approx(scheduler.sample_forward(zero, t, one).item(), rel=1e-12)


def test_chained_samples_have_the_distribution_of_the_closed_form():
    scheduler, generator = MNISTDDPMScheduler(num_train_timesteps=50, beta_end=0.1), torch.Generator().manual_seed(0)
    x = torch.full((20_000, 1), 0.7)
    for t in range(50):
        x = scheduler.forward_step(x, t, generator=generator)
    alpha_bar = alpha_bars(50, beta_end=0.1)[-1].item()
    assert x.mean().item() == pytest.approx(0.7 * alpha_bar**0.5, abs=0.03)  # 4 standard errors
    assert x.var().item() == pytest.approx(1 - alpha_bar, abs=0.04)


def test_velocity_and_its_inverse():
    """v = sqrt(alpha_bar) eps - sqrt(1 - alpha_bar) x_0, from which x_0 and eps come back."""
    x_0, noise, t = normal(0), normal(1), torch.tensor([3, 400, 990])
    scheduler = MNISTDDPMScheduler(prediction_type="v_prediction", clip_sample=False)
    alpha_bar = alpha_bars()[t].view(3, 1, 1, 1)
    v = scheduler.get_velocity(x_0, noise, t)
    close(v, alpha_bar.sqrt() * noise - (1 - alpha_bar).sqrt() * x_0)
    close(scheduler.step(v, t, scheduler.add_noise(x_0, noise, t)).pred_original_sample, x_0)


# D6 to D8: DDPM's step


def bayes(alpha_bar_t, alpha_bar_prev, x_0, x_t):
    """Mean and variance of q(x_prev | x_t, x_0) by the product of two normal densities, precision by precision."""
    alpha = alpha_bar_t / alpha_bar_prev
    prior_mean, prior_variance = alpha_bar_prev**0.5 * x_0, 1 - alpha_bar_prev
    precision = 1 / prior_variance + alpha / (1 - alpha)
    return (prior_mean / prior_variance + alpha**0.5 * x_t / (1 - alpha)) / precision, 1 / precision


@pytest.mark.parametrize(
    ("timesteps", "t", "prev"),
    [
        ([999, 600, 400, 20], 999, 600),
        ([999, 600, 400, 20], 600, 400),
        (range(999, -1, -1), 1, 0),
        ([500, 499], 500, 499),
    ],
)
def test_backward_mean_and_variance_follow_bayes_rule(timesteps, t, prev):
    scheduler = MNISTDDPMScheduler(prediction_type="sample", clip_sample=False)
    scheduler.set_timesteps(timesteps=timesteps)
    x_0, x_t, z = normal(0), normal(1), normal(2)
    mean, variance = bayes(alpha_bars()[t], alpha_bars()[prev], x_0, x_t)
    close(scheduler.step(x_0, t, x_t, noise_scale=0).prev_sample, mean)
    close(scheduler.step(x_0, t, x_t, variance_noise=z).prev_sample, mean + variance**0.5 * z)
    close(scheduler.step(x_0, t, x_t, noise_scale=0.5, variance_noise=z).prev_sample, mean + variance**0.5 * z / 2)
    close(scheduler.sample_backward(x_t, t, x_0, noise_scale=0.0), mean)


@pytest.mark.parametrize("simple_var", [False, True])
def test_backward_step_is_the_document_s_d6_and_d7(simple_var):
    scheduler = MNISTDDPMScheduler(simple_var=simple_var, clip_sample=False)
    scheduler.set_timesteps(timesteps=[600, 400])
    alpha_bar_t, alpha_bar_prev = alpha_bars()[[600, 400]]
    beta_t = 1 - alpha_bar_t / alpha_bar_prev
    assert beta_t.item() == pytest.approx(0.868, abs=5e-4)  # the document's example
    x_t, eps, z = normal(0), normal(1), normal(2)
    mean = (x_t - beta_t / (1 - alpha_bar_t) ** 0.5 * eps) / (1 - beta_t) ** 0.5
    variance = beta_t if simple_var else beta_t * (1 - alpha_bar_prev) / (1 - alpha_bar_t)
    close(scheduler.step(eps, 600, x_t, variance_noise=z).prev_sample, mean + variance**0.5 * z)
    assert scheduler.simple_var is simple_var
    assert scheduler.config.variance_type == ("fixed_large" if simple_var else "fixed_small")


@pytest.mark.parametrize(
    ("t", "prev", "variance"), [(487, 486, 0.00979), (999, 998, 0.02), (420, 400, 0.14771), (980, 960, 0.32460)]
)
def test_variances_that_diffusers_own_tests_expect(t, prev, variance):
    x, z = torch.zeros(SHAPE), torch.ones(SHAPE)
    for scheduler, options in ((MNISTDDPMScheduler(), {}), (MNISTDDIMScheduler(), {"eta": 1.0})):
        scheduler.set_timesteps(timesteps=[t, prev])
        noise = scheduler.step(x, t, x, variance_noise=z, **options).prev_sample
        close(noise**2, torch.full(SHAPE, variance), rtol=0, atol=1e-5)


@pytest.mark.parametrize("v", [-1.0, 0.3, 1.0])
def test_learned_range_interpolates_the_log_variance(v):
    """iDDPM, equation 15, with fraction (v + 1) / 2 between the posterior's variance and beta_t."""
    scheduler = MNISTDDPMScheduler(variance_type="learned_range", prediction_type="sample")
    alpha_bar_t, alpha_bar_prev = alpha_bars()[[500, 499]]
    beta_t = 1 - alpha_bar_t / alpha_bar_prev
    posterior = beta_t * (1 - alpha_bar_prev) / (1 - alpha_bar_t)
    fraction = (v + 1) / 2
    std = torch.exp((fraction * torch.log(beta_t) + (1 - fraction) * torch.log(posterior)) / 2)
    x_t, z = normal(0), normal(1)
    output = torch.cat([torch.zeros_like(x_t), torch.full_like(x_t, v)], dim=1)
    noisy = scheduler.step(output, 500, x_t, variance_noise=z).prev_sample
    close(noisy - scheduler.step(output, 500, x_t, noise_scale=0).prev_sample, std * z)
    last = scheduler.step(output, torch.zeros(3, dtype=torch.long), x_t, variance_noise=z).prev_sample
    close(last, torch.zeros_like(x_t))


# D12: DDIM's step


@pytest.mark.parametrize("simple_var", [False, True])
@pytest.mark.parametrize("eta", [0.0, 0.4, 1.0])
def test_ddim_step_is_the_document_s_d12(eta, simple_var):
    scheduler = MNISTDDIMScheduler(clip_sample=False, simple_var=simple_var)
    scheduler.set_timesteps(timesteps=[700, 300, 100])
    a_t, a_prev = alpha_bars()[[700, 300]]
    x_t, eps, z = normal(0), normal(1), normal(2)
    sigma = eta * ((1 - a_prev) / (1 - a_t) * (1 - a_t / a_prev)) ** 0.5
    noise_std = eta * (1 - a_t / a_prev) ** 0.5 if simple_var else sigma
    x0_hat = (x_t - (1 - a_t) ** 0.5 * eps) / a_t**0.5
    expected = a_prev**0.5 * x0_hat + (1 - a_prev - sigma**2) ** 0.5 * eps + noise_std * z
    out = scheduler.step(eps, 700, x_t, eta=eta, variance_noise=z)
    close(out.prev_sample, expected)
    close(out.pred_original_sample, x0_hat)


@pytest.mark.parametrize("prediction_type", ["epsilon", "sample", "v_prediction"])
def test_ddim_at_eta_1_over_all_steps_is_ddpm_with_the_posterior_variance(prediction_type):
    kwargs = {"num_train_timesteps": 100, "beta_end": 0.1, "prediction_type": prediction_type}
    ddpm, ddim = MNISTDDPMScheduler(**kwargs), MNISTDDIMScheduler(**kwargs)
    x = y = normal(0)
    for t in range(99, -1, -1):
        z, output = normal(t + 1), 0.5 * normal(t + 1000)
        x = ddpm.step(output, t, x, variance_noise=z).prev_sample
        y = ddim.step(output, t, y, eta=1.0, variance_noise=z, use_clipped_model_output=True).prev_sample
        close(x, y, rtol=1e-10, atol=1e-10)


def test_the_three_predictions_of_one_model_give_one_step():
    x_0, eps, t = normal(0).clamp(-1, 1), normal(1), torch.tensor([10, 400, 900])
    a = alpha_bars()[t].view(3, 1, 1, 1)
    x_t = a**0.5 * x_0 + (1 - a) ** 0.5 * eps
    outputs = {"epsilon": eps, "sample": x_0, "v_prediction": a**0.5 * eps - (1 - a) ** 0.5 * x_0}
    for scheduler_class in (MNISTDDPMScheduler, MNISTDDIMScheduler):
        steps = [
            scheduler_class(prediction_type=name, clip_sample=False).step(output, t, x_t, variance_noise=normal(2))
            for name, output in outputs.items()
        ]
        for step in steps:
            close(step.pred_original_sample, x_0, rtol=1e-10, atol=1e-10)
            close(step.prev_sample, steps[0].prev_sample, rtol=1e-10, atol=1e-10)


# Clipping


@BOTH
def test_clipping_and_thresholding(scheduler_class):
    x_0 = 3 * normal(0)
    clipped = scheduler_class(prediction_type="sample", clip_sample_range=2.0).step(x_0, 500, normal(1))
    close(clipped.pred_original_sample, x_0.clamp(-2, 2))
    free = scheduler_class(prediction_type="sample", clip_sample=False).step(x_0, 500, normal(1))
    close(free.pred_original_sample, x_0)

    kwargs = {"thresholding": True, "dynamic_thresholding_ratio": 0.9, "sample_max_value": 4.0}
    out = scheduler_class(prediction_type="sample", **kwargs).step(x_0, 500, normal(1)).pred_original_sample
    for image, expected in zip(out, x_0, strict=True):
        s = np.clip(np.quantile(expected.abs().numpy(), 0.9), 1, 4)
        close(image, expected.clamp(-s, s) / s)


def test_use_clipped_model_output_derives_the_noise_again():
    scheduler = MNISTDDIMScheduler()
    scheduler.set_timesteps(timesteps=[700, 300])
    a_t, a_prev = alpha_bars()[[700, 300]]
    x_t, eps = 2 * normal(0), normal(1)
    x0_hat = ((x_t - (1 - a_t) ** 0.5 * eps) / a_t**0.5).clamp(-1, 1)
    derived = (x_t - a_t**0.5 * x0_hat) / (1 - a_t) ** 0.5
    plain = scheduler.step(eps, 700, x_t).prev_sample
    close(plain, a_prev**0.5 * x0_hat + (1 - a_prev) ** 0.5 * eps)
    corrected = scheduler.step(eps, 700, x_t, use_clipped_model_output=True).prev_sample
    close(corrected, a_prev**0.5 * x0_hat + (1 - a_prev) ** 0.5 * derived)


# Timesteps


@BOTH
@pytest.mark.parametrize(
    ("spacing", "expected"),
    [("trailing", [99, 74, 49, 24]), ("linspace", [99, 66, 33, 0]), ("leading", [76, 51, 26, 1])],
)
def test_timestep_spacings(scheduler_class, spacing, expected):
    scheduler = scheduler_class(num_train_timesteps=100, timestep_spacing=spacing, steps_offset=1)
    scheduler.set_timesteps(4)
    assert scheduler.timesteps.tolist() == expected
    assert scheduler.timesteps.dtype == torch.int64
    assert scheduler.num_inference_steps == 4
    assert [scheduler.previous_timestep(t) for t in expected] == [*expected[1:], -1]


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_spacings_are_exact_for_any_number_of_steps(data):
    T = data.draw(st.integers(1, 300))
    n = data.draw(st.integers(1, T))
    exact = {
        "trailing": [Fraction(T * (n - i), n) - 1 for i in range(n)],
        "linspace": [Fraction((T - 1) * (n - 1 - i), max(n - 1, 1)) for i in range(n)],
    }
    for spacing, expected in exact.items():
        scheduler = MNISTDDPMScheduler(num_train_timesteps=T, timestep_spacing=spacing)
        scheduler.set_timesteps(n)
        timesteps = scheduler.timesteps.tolist()
        assert len(timesteps) == n
        assert all(a > b for a, b in pairwise(timesteps))
        assert all(abs(t - e) <= Fraction(1, 2) for t, e in zip(timesteps, expected, strict=True))


@BOTH
def test_previous_timestep_of_any_timestep_is_the_largest_entry_below(scheduler_class):
    scheduler = scheduler_class()
    scheduler.set_timesteps(timesteps=[900, 500, 20])
    assert [scheduler.previous_timestep(t) for t in (999, 901, 900, 600, 500, 21, 20, 0)] == [
        *(900, 900, 500, 500, 20, 20, -1, -1)
    ]
    assert scheduler.previous_timestep(torch.tensor([900, 20])).tolist() == [500, -1]
    # a step from outside of the list leads to that entry as well
    x, output = normal(0), normal(1)
    a_t, a_prev = alpha_bars()[[600, 500]]
    scheduler = MNISTDDIMScheduler(prediction_type="sample", clip_sample=False)
    scheduler.set_timesteps(timesteps=[900, 500, 20])
    eps = (x - a_t**0.5 * output) / (1 - a_t) ** 0.5
    close(scheduler.step(output, 600, x).prev_sample, a_prev**0.5 * output + (1 - a_prev) ** 0.5 * eps)


@BOTH
def test_the_same_timesteps_asked_for_again_are_restored(scheduler_class):
    scheduler = scheduler_class()
    scheduler.set_timesteps(10)
    expected, scheduler.timesteps = scheduler.timesteps.clone(), scheduler.timesteps[3:]
    scheduler.set_timesteps(10)
    assert scheduler.timesteps.equal(expected)
    scheduler.register_to_config(timestep_spacing="leading", steps_offset=1)  # as some pipelines do
    scheduler.set_timesteps(10)
    assert scheduler.timesteps.tolist() == list(range(901, 0, -100))


@pytest.mark.parametrize("kwargs", [{}, {"simple_var": True}, {"variance_type": "learned_range"}])
@pytest.mark.parametrize("spacing", ["trailing", "leading", "linspace"])
def test_the_last_step_of_ddpm_has_no_noise(kwargs, spacing):
    scheduler = MNISTDDPMScheduler(prediction_type="sample", timestep_spacing=spacing, steps_offset=1, **kwargs)
    scheduler.set_timesteps(7)
    channels = 2 if "variance_type" in kwargs else 1
    x_0, t = normal(0, (3, channels, 4, 4)), scheduler.timesteps[-1]
    for timestep in (t, t.expand(3)):  # one for all, and one for each
        out = scheduler.step(x_0, timestep, normal(1), generator=torch.Generator().manual_seed(0))
        close(out.prev_sample, out.pred_original_sample)


@pytest.mark.parametrize("simple_var", [False, True])
def test_the_last_step_of_ddim_has_no_noise_wherever_it_leads(simple_var):
    scheduler = MNISTDDIMScheduler(set_alpha_to_one=False, simple_var=simple_var, prediction_type="sample")
    scheduler.set_timesteps(5)
    assert scheduler.final_alpha_cumprod == alpha_bars()[0]
    t, x_0, x_t = 199, normal(0).clamp(-1, 1), normal(1)
    a_t, a_prev = alpha_bars()[[199, 0]]
    eps = (x_t - a_t**0.5 * x_0) / (1 - a_t) ** 0.5
    expected = a_prev**0.5 * x_0 + (1 - a_prev) ** 0.5 * eps
    close(scheduler.step(x_0, t, x_t, eta=1.0, generator=torch.Generator().manual_seed(0)).prev_sample, expected)


# Randomness


@pytest.mark.parametrize("scheduler", [MNISTDDPMScheduler(), MNISTDDIMScheduler()])
def test_each_image_depends_on_its_own_generator_alone(scheduler):
    eta = {"eta": 1.0} if isinstance(scheduler, MNISTDDIMScheduler) else {}

    def step(seeds):
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        x, output = normal(0)[seeds], normal(1)[seeds]
        return scheduler.step(output, 500, x, generator=generators, **eta).prev_sample

    together = step([0, 1, 2])
    for seed in range(3):
        close(step([seed])[0], together[seed])
    close(step([2, 0]), together[[2, 0]])


@pytest.mark.parametrize("scheduler", [MNISTDDPMScheduler(), MNISTDDIMScheduler()])
def test_a_timestep_for_each_image_is_as_one_image_at_a_time(scheduler):
    scheduler.set_timesteps(10)
    x, output, z, t = normal(0), normal(1), normal(2), torch.tensor([99, 999, 499])
    eta = {"eta": 0.7} if isinstance(scheduler, MNISTDDIMScheduler) else {}
    batch = scheduler.step(output, t, x, variance_noise=z, **eta)
    for i in range(3):
        for timestep in (int(t[i]), t[i], t[i : i + 1]):
            one = scheduler.step(
                output[i : i + 1], timestep, x[i : i + 1], variance_noise=z[i : i + 1], **eta, return_dict=False
            )
            close(one[0], batch.prev_sample[i : i + 1])
            close(one[1], batch.pred_original_sample[i : i + 1])


def test_ddim_without_noise_leaves_the_generator_alone():
    generator = torch.Generator().manual_seed(0)
    before = generator.get_state()
    MNISTDDIMScheduler().step(normal(0), 500, normal(1), generator=generator)
    MNISTDDPMScheduler().step(normal(0), 500, normal(1), generator=generator, noise_scale=0)
    assert generator.get_state().equal(before)


# Precision


@BOTH
@pytest.mark.parametrize("per_image", [False, True])
@pytest.mark.parametrize("prediction_type", ["epsilon", "sample", "v_prediction"])
def test_half_precision_results_are_the_float64_ones_rounded(scheduler_class, prediction_type, per_image):
    scheduler = scheduler_class(prediction_type=prediction_type)
    scheduler.set_timesteps(20)
    eta = {"eta": 0.5} if scheduler_class is MNISTDDIMScheduler else {}
    for dtype in (torch.bfloat16, torch.float16):
        x, output, z = (normal(seed, dtype=torch.float32).to(dtype) for seed in range(3))
        for t in scheduler.timesteps:
            timestep = t.expand(3) if per_image else t
            low = scheduler.step(output, timestep, x, variance_noise=z, **eta)
            high = scheduler.step(output.double(), timestep, x.double(), variance_noise=z.double(), **eta)
            for name in ("prev_sample", "pred_original_sample"):
                assert low[name].dtype == dtype
                # half a unit in the last place, and what float32 makes of x - eps at the first timestep
                close(low[name].double(), high[name], rtol=0.51 * torch.finfo(dtype).eps, atol=1e-4)


def test_add_noise_in_half_precision_is_the_float64_one_rounded():
    scheduler, t = MNISTDDPMScheduler(), torch.arange(3)
    x_0, noise = (normal(seed).to(torch.bfloat16) for seed in range(2))
    low, high = scheduler.add_noise(x_0, noise, t), scheduler.add_noise(x_0.double(), noise.double(), t)
    assert low.dtype == torch.bfloat16
    close(low.double(), high, rtol=0.51 * torch.finfo(torch.bfloat16).eps, atol=1e-6)
    assert not (scheduler.add_noise(torch.zeros_like(x_0), noise, t) == 0).any()


@BOTH
def test_float32_is_within_its_rounding_of_float64(scheduler_class):
    scheduler, x, output, z = scheduler_class(clip_sample=False), normal(0), normal(1), normal(2)
    for t in (0, 1, 500, 998):
        low = scheduler.step(output.float(), t, x.float(), variance_noise=z.float()).prev_sample
        high = scheduler.step(output, t, x, variance_noise=z).prev_sample
        close(low.double(), high, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("per_image", [False, True])
@pytest.mark.parametrize("clip", [{"clip_sample": False}, {"clip_sample_range": 0.7}, {"thresholding": True}])
@pytest.mark.parametrize("prediction_type", ["epsilon", "sample", "v_prediction"])
@BOTH
def test_a_step_leaves_its_arguments_alone_and_has_the_gradient_of_its_values(
    scheduler_class, prediction_type, clip, per_image
):
    scheduler = scheduler_class(prediction_type=prediction_type, **clip)
    eta = {"eta": 0.7, "use_clipped_model_output": True} if scheduler_class is MNISTDDIMScheduler else {}
    t = torch.tensor([800, 30]) if per_image else 500
    arguments = [normal(seed, (2, 1, 2, 2)).requires_grad_() for seed in range(3)]
    before = [argument.detach().clone() for argument in arguments]

    def step(output, x, z):
        return tuple(scheduler.step(output, t, x, variance_noise=z, return_dict=False, **eta))

    assert torch.autograd.gradcheck(step, arguments)
    assert all(argument.equal(value) for argument, value in zip(arguments, before, strict=True))


@BOTH
def test_a_float32_model_does_not_round_a_float64_sample(scheduler_class):
    for prediction_type in ("epsilon", "sample", "v_prediction"):
        scheduler = scheduler_class(prediction_type=prediction_type, clip_sample=False)
        output, x = normal(0, dtype=torch.float32), normal(1)
        mixed = scheduler.step(output, 500, x, variance_noise=normal(2)).prev_sample
        close(mixed, scheduler.step(output.double(), 500, x, variance_noise=normal(2)).prev_sample)


def test_ddim_keeps_the_little_that_full_noise_leaves_of_eps_hat():
    """At eta = 1 the direction's share of the noise may be 1e-7: as a difference from 1 float32 would lose it."""
    scheduler = MNISTDDIMScheduler(beta_schedule="cosine", clip_sample=False, prediction_type="v_prediction")
    scheduler.set_timesteps(timesteps=[999, 900])
    x, output, z = (normal(seed) for seed in range(3))
    t = torch.full((3,), 999)
    low = scheduler.step(output.float(), t, x.float(), eta=1.0, variance_noise=z.float()).prev_sample
    high = scheduler.step(output, 999, x, eta=1.0, variance_noise=z).prev_sample
    close(low.double(), high, rtol=1e-6, atol=2e-6)


# encode


@pytest.mark.parametrize("prediction_type", ["epsilon", "sample", "v_prediction"])
def test_encode_step_undoes_a_step(prediction_type):
    """With the same eps_hat at both ends the two are exact inverses."""
    scheduler = MNISTDDIMScheduler(prediction_type=prediction_type, clip_sample=False)
    scheduler.set_timesteps(timesteps=[800, 300, 40])
    x_t, eps = normal(0), normal(1)
    for t in (800, 300, 40):
        a = alpha_bars()[t]

        def output(x, a=a):
            x_0 = (x - (1 - a) ** 0.5 * eps) / a**0.5
            return {"epsilon": eps, "sample": x_0, "v_prediction": a**0.5 * eps - (1 - a) ** 0.5 * x_0}[
                prediction_type
            ]

        x_prev = scheduler.step(output(x_t), t, x_t).prev_sample
        close(scheduler.encode_step(output(x_prev), t, x_prev), x_t, rtol=1e-9, atol=1e-9)


# As objects


@BOTH
def test_copies_and_pickles_step_alike(scheduler_class):
    scheduler = scheduler_class(beta_schedule="cosine", simple_var=True)
    scheduler.set_timesteps(7)
    x, output, z = normal(0), normal(1), normal(2)
    expected = scheduler.step(output, 999, x, variance_noise=z).prev_sample
    for other in (copy.deepcopy(scheduler), pickle.loads(pickle.dumps(scheduler))):
        assert other.config == scheduler.config
        assert other.timesteps.equal(scheduler.timesteps)
        close(other.step(output, 999, x, variance_noise=z).prev_sample, expected)


@BOTH
def test_save_and_load(scheduler_class, tmp_path):
    scheduler = scheduler_class(beta_schedule="cosine", simple_var=True, clip_sample_range=2.0)
    scheduler.save_pretrained(tmp_path)
    loaded = scheduler_class.from_pretrained(tmp_path)
    assert {k: v for k, v in loaded.config.items() if k != "_use_default_values"} == {
        k: v for k, v in scheduler.config.items() if k != "_use_default_values"
    }
    assert loaded.betas.equal(scheduler.betas)
    assert loaded.simple_var


@pytest.mark.parametrize("scheduler", [MNISTDDPMScheduler(), MNISTDDIMScheduler()])
def test_gradients_flow_through_a_step(scheduler):
    x, output = normal(0).requires_grad_(), normal(1).requires_grad_()
    scheduler.step(output, 500, x).prev_sample.sum().backward()
    assert x.grad.abs().sum() > 0
    assert output.grad.abs().sum() > 0


@pytest.mark.slow
@pytest.mark.parametrize("scheduler", [MNISTDDPMScheduler(), MNISTDDIMScheduler()])
def test_compiles_to_one_graph_without_recompiling(scheduler):
    scheduler.set_timesteps(5)
    eta = {"eta": 0.5} if isinstance(scheduler, MNISTDDIMScheduler) else {}
    unet = MNISTUNet2DModel(
        sample_size=8, block_out_channels=(8, 8), layers_per_block=1, norm_num_groups=4, attention_head_dim=8
    )

    def step(x, t, z):
        return scheduler.step(unet(x, t).sample, t, x, variance_noise=z, **eta).prev_sample

    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    x, z = (normal(seed, (2, 1, 8, 8), torch.float32) for seed in range(2))
    with torch.no_grad(), torch._dynamo.config.patch(error_on_recompile=True):
        for t in scheduler.timesteps:
            close(compiled(x, t, z), step(x, t, z), rtol=1e-4, atol=1e-4)


@pytest.mark.gpu
@pytest.mark.parametrize("scheduler", [MNISTDDPMScheduler(), MNISTDDIMScheduler()])
def test_a_loop_on_a_gpu_never_waits_for_it(scheduler):
    scheduler.set_timesteps(10, device="cuda")
    eta = {"eta": 0.5} if isinstance(scheduler, MNISTDDIMScheduler) else {}
    generator = torch.Generator("cuda").manual_seed(0)
    x = torch.randn(SHAPE, generator=generator, device="cuda")
    try:
        for i, t in enumerate(scheduler.timesteps):
            x = scheduler.step(0.5 * x, t, x, generator=generator, **eta).prev_sample
            x = scheduler.step(0.5 * x, t.expand(len(x)), x, generator=generator, **eta).prev_sample
            if i == 0:
                torch.cuda.set_sync_debug_mode("error")
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert x.isfinite().all()


# Configs and timesteps that are written to


@pytest.mark.parametrize("write", [setattr, lambda config, name, value: config.__setitem__(name, value)])
@BOTH
def test_a_config_that_is_written_to_takes_effect(scheduler_class, write):
    """As in diffusers, where attributes do; here items do as well, and a table made before does not survive."""
    scheduler, x, z = scheduler_class(), torch.full(SHAPE, 3.0), torch.ones(SHAPE)
    eta = {"eta": 1.0} if scheduler_class is MNISTDDIMScheduler else {}

    def step():
        return scheduler.step(x, 500, torch.zeros_like(x), variance_noise=z, **eta)

    assert (step().pred_original_sample == -1).all()
    write(scheduler.config, "prediction_type", "sample")
    write(scheduler.config, "clip_sample_range", 2.0)
    assert (step().pred_original_sample == 2).all()
    write(scheduler.config, "clip_sample", False)
    assert (step().pred_original_sample == 3).all()
    small = step().prev_sample
    write(scheduler.config, "variance_type", "fixed_large")
    assert scheduler.simple_var
    beta_t = scheduler.betas[500]
    posterior = beta_t * (1 - scheduler.alphas_cumprod[499]) / (1 - scheduler.alphas_cumprod[500])
    close(step().prev_sample - small, torch.full(SHAPE, (beta_t**0.5 - posterior**0.5).item()), rtol=0, atol=1e-6)
    write(scheduler.config, "thresholding", True)
    write(scheduler.config, "sample_max_value", 6.0)
    assert (step().pred_original_sample == 1).all()
    scheduler.set_timesteps(10)
    write(scheduler.config, "timestep_spacing", "leading")
    write(scheduler.config, "steps_offset", 1)
    scheduler.set_timesteps(10)
    assert scheduler.timesteps.tolist() == list(range(901, 0, -100))
    for other in (copy.deepcopy(scheduler), pickle.loads(pickle.dumps(scheduler))):
        assert other.config == scheduler.config
        assert other.config.steps_offset == other.config["steps_offset"] == 1
        write(other.config, "steps_offset", 0)
        other.set_timesteps(10)
        assert other.timesteps[0] == 900
    assert scheduler_class.from_config(scheduler.config).config.timestep_spacing == "leading"


@pytest.mark.parametrize("write", [setattr, lambda config, name, value: config.__setitem__(name, value)])
@BOTH
def test_writes_that_could_not_take_effect_are_refused(scheduler_class, write):
    scheduler, x = scheduler_class(), normal(0)
    for name, value in [("beta_schedule", "sigmoid"), ("num_train_timesteps", 10), ("trained_betas", [0.1])]:
        with pytest.raises(ValueError, match=name):
            write(scheduler.config, name, value)
    write(scheduler.config, "beta_end", 0.02)  # what it is already
    write(scheduler.config, "prediction_type", "noise")
    with pytest.raises(ValueError, match="prediction_type"):
        scheduler.step(x, 5, x)
    write(scheduler.config, "timestep_spacing", "even")
    with pytest.raises(ValueError, match="timestep_spacing"):
        scheduler.set_timesteps(5)


@BOTH
def test_a_config_that_a_pipeline_replaces_may_be_written_to(scheduler_class):
    scheduler = scheduler_class(timestep_spacing="leading")
    scheduler._internal_dict = FrozenDict({**scheduler.config, "steps_offset": 1})
    scheduler.config.clip_sample = False
    scheduler.register_to_config(clip_sample_range=3.0)
    scheduler.config["prediction_type"] = "sample"
    scheduler.set_timesteps(10)
    assert scheduler.timesteps[-1] == 1
    x = torch.full(SHAPE, 5.0)
    assert (scheduler.step(x, 901, x).pred_original_sample == 5).all()


@BOTH
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
def test_timesteps_that_are_assigned_are_those_that_are_visited(scheduler_class, dtype):
    expected = scheduler_class()
    expected.set_timesteps(timesteps=[999, 666, 333])
    x, output, z = normal(0), normal(1), normal(2)

    def loop(scheduler, timesteps):
        sample = x
        for t in timesteps:
            sample = scheduler.step(output, t, sample, variance_noise=z).prev_sample
        return sample

    scheduler = scheduler_class()
    scheduler.set_timesteps(50)
    loop(scheduler, [979])
    scheduler.timesteps = torch.tensor([999, 666, 333], dtype=dtype)
    assert [scheduler.previous_timestep(t) for t in (999, 666, 333)] == [666, 333, -1]
    close(loop(scheduler, scheduler.timesteps), loop(expected, expected.timesteps))
    # written to in place
    scheduler.timesteps[1:] = torch.tensor([500, 100])
    expected.set_timesteps(timesteps=[999, 500, 100])
    close(loop(scheduler, scheduler.timesteps), loop(expected, expected.timesteps))
    for wrong in ([3, 5], [5, 5], [1000, 3], [3, -1], [2.5]):
        with pytest.raises(ValueError, match="timesteps"):
            scheduler.timesteps = torch.tensor(wrong)
    assert scheduler.timesteps.tolist() == [999, 500, 100]


@BOTH
@pytest.mark.parametrize("generator", [lambda: torch.Generator(), lambda: [torch.Generator() for _ in range(3)]])
def test_a_seed_gives_the_same_noise_in_every_dtype(scheduler_class, generator):
    scheduler = scheduler_class()
    eta = {"eta": 1.0} if scheduler_class is MNISTDDIMScheduler else {}

    def seeded():
        made = generator()
        return [g.manual_seed(i) for i, g in enumerate(made)] if isinstance(made, list) else made.manual_seed(0)

    for draw in (
        lambda x: scheduler.step(0 * x, 500, 0 * x, generator=seeded(), **eta).prev_sample,
        lambda x: scheduler.sample_forward(0 * x, 500, generator=seeded()),
        lambda x: scheduler.forward_step(0 * x, 500, generator=seeded()),
    ):
        expected = draw(normal(0))
        assert expected.abs().max() > 0
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            close(draw(normal(0).to(dtype)).double(), expected, rtol=torch.finfo(dtype).eps, atol=1e-6)


@BOTH
def test_another_default_device_changes_nothing(scheduler_class):
    """Tables are made on the CPU: other devices need not have float64."""
    x, expected = normal(0), scheduler_class(beta_schedule="cosine")
    expected.set_timesteps(5)
    torch.set_default_device("meta")
    try:
        for config in ({"beta_schedule": "cosine"}, {"trained_betas": [0.1, 0.2]}, {"beta_schedule": "sigmoid"}):
            scheduler_class(**config, rescale_betas_zero_snr=True, prediction_type="v_prediction")
        scheduler = scheduler_class(beta_schedule="cosine")
        scheduler.set_timesteps(5)
        assert scheduler.timesteps.is_cpu
        assert scheduler.previous_timestep(999) == 799
        for t in (999, scheduler.timesteps[0], scheduler.timesteps[:3]):
            step, again = scheduler.step(x, t, x, variance_noise=x), scheduler.add_noise(x, x, t)
            close(step.prev_sample, expected.step(x, t, x, variance_noise=x).prev_sample)
            close(again, expected.add_noise(x, x, t))
        scheduler.timesteps = [999, 3]
        assert scheduler.step(x.to("meta"), 999, x.to("meta")).prev_sample.is_meta
    finally:
        torch.set_default_device(None)


def test_numbers_of_numpy_are_numbers(tmp_path):
    scheduler = MNISTDDIMScheduler(num_train_timesteps=np.int64(100), beta_end=np.float32(0.1))
    scheduler.set_timesteps(np.int64(5))
    x = normal(0)
    step = scheduler.step(x, np.int64(99), x, eta=np.float32(0.5), variance_noise=x)
    close(step.prev_sample, scheduler.step(x, 99, x, eta=0.5, variance_noise=x).prev_sample)
    scheduler.save_pretrained(tmp_path)
    assert MNISTDDIMScheduler.from_pretrained(tmp_path).betas.equal(scheduler.betas)


# Errors


@BOTH
@pytest.mark.parametrize(
    ("kwargs", "name"),
    [
        ({"beta_schedule": "quadratic"}, "beta_schedule"),
        ({"prediction_type": "noise"}, "prediction_type"),
        ({"timestep_spacing": "even"}, "timestep_spacing"),
        ({"variance_type": "other"}, "variance_type"),
        ({"variance_type": "learned"}, "variance_type"),
        ({"variance_type": "fixed_small", "simple_var": True}, "simple_var"),
        ({"beta_end": 2.0}, "betas"),
        ({"beta_start": 0.0}, "betas"),
        ({"beta_start": -0.1}, "betas"),
        ({"trained_betas": [0.1, 1.0, 0.1]}, "betas"),
        ({"trained_betas": [0.1, float("nan")]}, "betas"),
        ({"trained_betas": [1e-20, 0.1]}, "betas"),  # 1 - 1e-20 is 1 in float64: the coefficients would be 0 / 0
        ({"num_train_timesteps": 0}, "betas"),
        ({"num_train_timesteps": 1, "rescale_betas_zero_snr": True}, "betas"),
    ],
)
def test_bad_configs_are_refused(scheduler_class, kwargs, name):
    with pytest.raises(ValueError, match=name):
        scheduler_class(**kwargs)


@BOTH
@pytest.mark.parametrize(
    ("kwargs", "name"),
    [
        ({}, "num_inference_steps"),
        ({"num_inference_steps": 2, "timesteps": [3, 1]}, "num_inference_steps"),
        ({"num_inference_steps": 0}, "num_inference_steps"),
        ({"num_inference_steps": 101}, "num_inference_steps"),
        ({"num_inference_steps": 100}, "steps_offset"),
        ({"timesteps": [5, 5]}, "timesteps"),
        ({"timesteps": []}, "timesteps"),
        ({"timesteps": [100, 2]}, "timesteps"),
        ({"timesteps": [5, -1]}, "timesteps"),
        ({"timesteps": [5, 2.5]}, "timesteps"),
    ],
)
def test_bad_timesteps_are_refused(scheduler_class, kwargs, name):
    scheduler = scheduler_class(num_train_timesteps=100, timestep_spacing="leading", steps_offset=1)
    with pytest.raises(ValueError, match=name):
        scheduler.set_timesteps(**kwargs)
    assert len(scheduler.timesteps) == 100  # what was refused has changed nothing


@BOTH
@pytest.mark.parametrize("t", [-1, 1000, torch.tensor(1000), torch.tensor([0, 1, 1000]), torch.tensor([-1, 0, 1])])
def test_timesteps_out_of_range_are_refused(scheduler_class, t):
    scheduler, x = scheduler_class(), normal(0)
    for call in (lambda: scheduler.step(x, t, x), lambda: scheduler.add_noise(x, x, t)):
        with pytest.raises(ValueError, match="timestep must be"):
            call()


@BOTH
def test_arguments_that_do_not_fit_are_refused(scheduler_class):
    scheduler, x = scheduler_class(), normal(0)
    noisy = {"eta": 1.0} if scheduler_class is MNISTDDIMScheduler else {}
    other_option = {"noise_scale": 1.0} if noisy else {"eta": 1.0}
    cases = [
        (ValueError, "timestep", lambda: scheduler.step(x, torch.tensor(5.0), x)),
        (ValueError, "timestep", lambda: scheduler.step(x, 5.5, x)),
        (ValueError, "timestep", lambda: scheduler.step(x, torch.tensor([1, 2]), x)),
        (ValueError, "timestep", lambda: scheduler.step(x, torch.tensor([[1], [2], [3]]), x)),
        (TypeError, "integer", lambda: scheduler.set_timesteps(2.5)),
        (ValueError, "model_output", lambda: scheduler.step(x.repeat(1, 2, 1, 1), 5, x)),
        (ValueError, "model_output", lambda: scheduler.step(x[:1], 5, x)),
        (ValueError, "sample", lambda: scheduler.add_noise(x.long(), x, 5)),
        (ValueError, "noise", lambda: scheduler.add_noise(x, x.long(), 5)),
        (ValueError, "noise", lambda: scheduler.add_noise(x, x[:1], 5)),
        (ValueError, "noise", lambda: scheduler.step(x, 5, x, variance_noise=x[:1], **noisy)),
        (ValueError, "generator", lambda: scheduler.step(x, 5, x, generator=[torch.Generator()] * 2, **noisy)),
        (ValueError, "generator", lambda: scheduler.step(x, 5, x, generator=[torch.Generator()], **noisy)),
        (TypeError, next(iter(other_option)), lambda: scheduler.step(x, 5, x, **other_option)),
    ]
    for error, name, call in cases:
        with pytest.raises(error, match=name):
            call()


def test_options_out_of_range_are_refused():
    x = normal(0)
    for eta in (-0.1, 1.5, float("nan")):
        with pytest.raises(ValueError, match="eta"):
            MNISTDDIMScheduler().step(x, 5, x, eta=eta)
    with pytest.raises(ValueError, match="variance_type"):
        MNISTDDIMScheduler(variance_type="learned_range")
    with pytest.raises(ValueError, match="model_output"):
        MNISTDDPMScheduler(variance_type="learned_range").step(x, 5, x)


@BOTH
def test_predicted_noise_at_zero_signal_is_refused(scheduler_class):
    scheduler, x = scheduler_class(rescale_betas_zero_snr=True), normal(0)
    for call in (lambda: scheduler.set_timesteps(10), lambda: scheduler.step(x, 999, x)):
        with pytest.raises(ValueError, match="prediction_type"):
            call()
    scheduler.set_timesteps(timesteps=[998, 500])
    assert scheduler.step(x, 998, x).prev_sample.isfinite().all()
    # a model that predicts v has no such trouble
    scheduler = scheduler_class(rescale_betas_zero_snr=True, prediction_type="v_prediction")
    scheduler.set_timesteps(10)
    close(scheduler.step(x, 999, 0 * x).pred_original_sample, (-x).clamp(-1, 1))  # v = -x_0 where x_t = eps
