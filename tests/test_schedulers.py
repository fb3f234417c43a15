"""The formulas of DDPM and DDIM against algebra that is written out here, and what schedulers are as objects.

test_properties_schedulers.py searches configs and calls; here are the cases with a meaning of their own.
"""

import copy
import operator
import pickle

import pytest
import torch
from diffusers.configuration_utils import FrozenDict

from mnist_ddpm import MNISTDDIMScheduler, MNISTDDPMScheduler, MNISTUNet2DModel

BOTH = pytest.mark.parametrize("scheduler_class", [MNISTDDPMScheduler, MNISTDDIMScheduler])
WRITE = pytest.mark.parametrize("write", [setattr, operator.setitem], ids=["attribute", "item"])
F64 = {"rtol": 1e-12, "atol": 1e-12}
SHAPE = (3, 1, 4, 4)


def alpha_bars(T=1000, beta_start=1e-4, beta_end=2e-2):
    return torch.cumprod(1 - torch.linspace(beta_start, beta_end, T, dtype=torch.float64), dim=0)


def normal(seed=0, shape=SHAPE, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def close(actual, expected, **tolerance):
    torch.testing.assert_close(actual, expected, **(tolerance or F64))


# The constants


@BOTH
def test_constants_are_float64_and_one_is_put_in_front(scheduler_class):
    scheduler = scheduler_class()
    close(scheduler.alphas, 1 - scheduler.betas)
    close(scheduler.alphas_cumprod, alpha_bars())
    close(scheduler.alphas_cumprod_prev, torch.cat([torch.ones(1, dtype=torch.float64), alpha_bars()[:-1]]))
    assert scheduler.final_alpha_cumprod == 1
    assert scheduler.init_noise_sigma == 1
    assert scheduler.order == 1


# The forward process


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


# Steps


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
def test_backward_step_is_ddpm_equation_11(simple_var):
    scheduler = MNISTDDPMScheduler(simple_var=simple_var, clip_sample=False)
    scheduler.set_timesteps(timesteps=[600, 400])
    alpha_bar_t, alpha_bar_prev = alpha_bars()[[600, 400]]
    beta_t = 1 - alpha_bar_t / alpha_bar_prev
    assert beta_t.item() == pytest.approx(0.868, abs=5e-4)
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


# Randomness


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


@pytest.mark.parametrize("clip", [{"clip_sample": False}, {"clip_sample_range": 0.7}, {"thresholding": True}])
@pytest.mark.parametrize("prediction_type", ["epsilon", "sample", "v_prediction"])
@BOTH
def test_a_step_leaves_its_arguments_alone_and_has_the_gradient_of_its_values(scheduler_class, prediction_type, clip):
    scheduler = scheduler_class(prediction_type=prediction_type, **clip)
    eta = {"eta": 0.7, "use_clipped_model_output": True} if scheduler_class is MNISTDDIMScheduler else {}
    t = torch.tensor([800, 30])
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


# As objects


@BOTH
def test_copies_pickles_and_saved_configs_step_alike(scheduler_class, tmp_path):
    scheduler = scheduler_class(beta_schedule="cosine", simple_var=True)
    scheduler.set_timesteps(7)
    x, output, z = normal(0), normal(1), normal(2)
    expected = scheduler.step(output, 999, x, variance_noise=z).prev_sample
    for other in (copy.deepcopy(scheduler), pickle.loads(pickle.dumps(scheduler))):
        assert other.config == scheduler.config
        assert other.timesteps.equal(scheduler.timesteps)
        close(other.step(output, 999, x, variance_noise=z).prev_sample, expected)
    scheduler.save_pretrained(tmp_path)
    loaded = scheduler_class.from_pretrained(tmp_path)
    loaded.set_timesteps(7)
    close(loaded.step(output, 999, x, variance_noise=z).prev_sample, expected)


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


@WRITE
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


@WRITE
@BOTH
def test_writes_that_could_not_take_effect_are_rejected(scheduler_class, write):
    scheduler = scheduler_class()
    cases = {"beta_schedule": "sigmoid", "num_train_timesteps": 10, "trained_betas": [0.1], "predicton_type": "sample"}
    for name, value in (cases | {"prediction_type": "noise", "timestep_spacing": "even"}).items():
        with pytest.raises(ValueError, match=name):
            write(scheduler.config, name, value)
    with pytest.raises(ValueError, match="beta_schedule"):
        scheduler.register_to_config(beta_schedule="squaredcos_cap_v2")
    write(scheduler.config, "beta_end", 0.02)  # what it is already


@WRITE
@BOTH
def test_the_alias_simple_var_may_be_written(scheduler_class, write):
    scheduler = scheduler_class()
    write(scheduler.config, "simple_var", True)
    assert scheduler.simple_var
    assert scheduler.config.variance_type == scheduler.config["variance_type"] == "fixed_large"
    scheduler.register_to_config(simple_var=False)
    assert not scheduler.simple_var


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


# Errors


@BOTH
@pytest.mark.parametrize(
    ("name", "kwargs"),
    [
        ("beta_schedule", {"beta_schedule": "quadratic"}),
        ("prediction_type", {"prediction_type": "noise"}),
        ("timestep_spacing", {"timestep_spacing": "even"}),
        ("variance_type", {"variance_type": "learned"}),
        ("simple_var", {"variance_type": "fixed_small", "simple_var": True}),
        ("betas", {"beta_end": 2.0}),
        ("betas", {"beta_start": 0.0}),
        ("betas", {"trained_betas": [0.1, 1.0, 0.1]}),
        ("betas", {"trained_betas": [0.1, float("nan")]}),
        ("betas", {"trained_betas": [1e-20, 0.1]}),  # 1 - 1e-20 is 1 in float64: the coefficients would be 0 / 0
        ("betas", {"num_train_timesteps": 1, "rescale_betas_zero_snr": True}),
    ],
)
def test_bad_configs_are_refused(scheduler_class, name, kwargs):
    with pytest.raises(ValueError, match=name):
        scheduler_class(**kwargs)


@BOTH
@pytest.mark.parametrize("n", [0, 100, 101])
def test_a_number_of_steps_out_of_range_is_refused(scheduler_class, n):
    scheduler = scheduler_class(num_train_timesteps=100, timestep_spacing="leading", steps_offset=1)
    with pytest.raises((ValueError, ZeroDivisionError), match=r"steps_offset|division"):
        scheduler.set_timesteps(n)
    assert len(scheduler.timesteps) == 100  # what was refused has changed nothing


@BOTH
def test_arguments_that_do_not_fit_are_refused(scheduler_class):
    scheduler, x = scheduler_class(), normal(0)
    is_ddim = scheduler_class is MNISTDDIMScheduler
    noisy, other_option = ({"eta": 1.0}, "noise_scale") if is_ddim else ({}, "eta")
    cases = [
        ("num_inference_steps", lambda: scheduler.set_timesteps()),
        ("num_inference_steps", lambda: scheduler.set_timesteps(2, timesteps=[3, 1])),
        ("model_output", lambda: scheduler.step(x.repeat(1, 2, 1, 1), 5, x)),
        ("model_output", lambda: scheduler.step(x[:1], 5, x)),
        ("sample", lambda: scheduler.add_noise(x.long(), x, 5)),
        ("noise", lambda: scheduler.add_noise(x, x[:1], 5)),
        ("noise", lambda: scheduler.step(x, 5, x, variance_noise=x[:1], **noisy)),
        (other_option, lambda: scheduler.step(x, 5, x, **{other_option: 1.0})),
        *(("index", lambda t=t: scheduler.step(x, t, x)) for t in (-1, 1000, torch.tensor([0, 1, 1000]), 5.5)),
    ]
    if not is_ddim:
        learned = scheduler_class(variance_type="learned_range")
        cases.append(("model_output", lambda: learned.step(x, 5, x)))
    for name, call in cases:
        with pytest.raises((ValueError, TypeError, IndexError, RuntimeError), match=name):
            call()
