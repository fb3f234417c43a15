"""Schedulers, searched: any config and any call gives what the papers say.

The oracle is NumPy in float64: betas, then alpha_bar, then the posterior of DDPM (arXiv 2006.11239, equations 6 and 7)
or the step of DDIM (arXiv 2010.02502, equations 12 and 16).
"""

import json
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from mnist_ddpm import MNISTDDIMScheduler, MNISTDDPMScheduler

SCHEDULERS = {"ddpm": MNISTDDPMScheduler, "ddim": MNISTDDIMScheduler}
BOTH = pytest.mark.parametrize("kind", SCHEDULERS)
SHAPE = (3, 2, 4, 4)
TOLERANCE = {torch.float64: 1e-7, torch.float32: 1e-4, torch.bfloat16: 2e-2, torch.float16: 4e-3}


def searched(cases):
    """So many cases, the same each time."""
    return settings(max_examples=cases, derandomize=True, deadline=None, database=None)


# Configs -------------------------------------------------------------------------------------------------------------

BETA = st.floats(1e-4, 0.2)
GOOD = {
    "num_train_timesteps": st.integers(1, 60) | st.sampled_from([1, 2, 1000, np.int64(7)]),
    "beta_start": BETA,
    "beta_end": BETA,
    "beta_schedule": st.sampled_from(["linear", "scaled_linear", "cosine", "squaredcos_cap_v2", "sigmoid"]),
    "trained_betas": st.none() | st.lists(BETA, min_size=1, max_size=20) | st.just(np.array([0.1, 0.2], np.float32)),
    "variance_type": st.sampled_from([None, "fixed_small", "fixed_large"]),
    "clip_sample": st.booleans(),
    "prediction_type": st.sampled_from(["epsilon", "sample", "v_prediction"]),
    "thresholding": st.booleans(),
    "dynamic_thresholding_ratio": st.floats(0, 1) | st.sampled_from([0, 1]),
    "clip_sample_range": st.floats(0.1, 10),
    "sample_max_value": st.floats(0.1, 10) | st.just(1),
    "timestep_spacing": st.sampled_from(["trailing", "leading", "linspace"]),
    "steps_offset": st.integers(0, 2),
    "rescale_betas_zero_snr": st.booleans(),
    "set_alpha_to_one": st.booleans(),
}
CONFIGS = st.fixed_dictionaries({}, optional=GOOD)


def of_kind(kind, config):
    """The config without what the scheduler does not have."""
    return {name: value for name, value in config.items() if kind == "ddim" or name != "set_alpha_to_one"}


def oracle_betas(config):
    """The betas in NumPy's float64; NaN where there are none."""
    T, start, end = (
        config.get(*pair) for pair in [("num_train_timesteps", 1000), ("beta_start", 1e-4), ("beta_end", 0.02)]
    )
    ramp = np.arange(T) / max(T - 1, 1)
    time = np.arange(T + 1) / T
    f = np.cos((time + 0.008) / 1.008 * np.pi / 2) ** 2
    betas = {
        "linear": start + (end - start) * ramp,
        "scaled_linear": (start**0.5 + (end**0.5 - start**0.5) * ramp) ** 2,
        "squaredcos_cap_v2": np.minimum(1 - f[1:] / f[:-1], 0.999),
        "sigmoid": start + (end - start) / (1 + np.exp(6 - 12 * ramp)),
    }[config.get("beta_schedule", "linear").replace("cosine", "squaredcos_cap_v2")]
    if config.get("trained_betas") is not None:
        betas = np.array(config["trained_betas"], dtype=np.float64)
    if config.get("rescale_betas_zero_snr"):
        root = np.sqrt(np.cumprod(1 - betas))
        with np.errstate(invalid="ignore", divide="ignore"):
            root = (root - root[-1]) * root[0] / (root[0] - root[-1])
            betas = 1 - root**2 / np.append(1, root[:-1] ** 2)
    return betas


def possible(betas):
    """Whether each beta is a variance, and there is signal up to the last but one."""
    alpha_bar = np.cumprod(1 - betas)
    return bool(np.all((betas > 0) & (betas <= 1)) and np.all(alpha_bar[:-1] > 0))


def build(kind, config):
    """The scheduler of a config; betas that are refused are those that the oracle refuses."""
    config = of_kind(kind, config)
    if possible(oracle_betas(config)):
        return SCHEDULERS[kind](**config)
    with pytest.raises(ValueError, match="betas"):
        SCHEDULERS[kind](**config)
    return None


@BOTH
@searched(60)
@given(config=CONFIGS)
def test_a_config_makes_the_tables_of_the_papers(kind, config):
    config = of_kind(kind, config)
    scheduler = build(kind, config)
    assume(scheduler is not None)
    betas = oracle_betas(config)
    np.testing.assert_allclose(scheduler.betas, betas, rtol=1e-7, atol=1e-14)
    np.testing.assert_allclose(scheduler.alphas_cumprod, np.cumprod(1 - betas), rtol=1e-7, atol=1e-14)
    for name in set(config) & {"prediction_type", "clip_sample_range", "timestep_spacing", "thresholding"}:
        assert scheduler.config[name] == config[name]
    again = SCHEDULERS[kind].from_config(json.loads(scheduler.to_json_string()))
    assert torch.equal(again.betas, scheduler.betas)
    assert {k: v for k, v in again.config.items() if k[0] != "_"} == {
        k: v for k, v in scheduler.config.items() if k[0] != "_"
    }


# Timesteps -----------------------------------------------------------------------------------------------------------


def nearest(fraction):
    """The nearest integer, halves to the even one."""
    return round(fraction)


def spaced(spacing, T, n, offset):
    """The timesteps of a spacing, in exact fractions."""
    return {
        "trailing": [nearest(Fraction(T * (n - i), n)) - 1 for i in range(n)],
        "linspace": [nearest(Fraction((T - 1) * (n - 1 - i), max(n - 1, 1))) for i in range(n)],
        "leading": [T // n * (n - 1 - i) + offset for i in range(n)],
    }[spacing]


LISTS = st.sets(st.integers(0, 49), min_size=1).map(lambda ts: sorted(ts, reverse=True))
FORMS = st.sampled_from([list, tuple, np.array, torch.tensor])
REQUESTS = st.one_of(
    st.integers(1, 49).map(lambda n: ({"num_inference_steps": n}, [])),
    st.integers(1, 49).map(lambda n: ({"num_inference_steps": np.int32(n)}, [])),
    st.tuples(LISTS, FORMS).map(lambda pair: ({"timesteps": pair[1](pair[0])}, pair[0])),
)


@BOTH
@searched(30)
@given(spacing=GOOD["timestep_spacing"], offset=st.integers(0, 1), asked=REQUESTS)
def test_timesteps_are_those_asked_for(kind, spacing, offset, asked):
    scheduler = SCHEDULERS[kind](num_train_timesteps=50, timestep_spacing=spacing, steps_offset=offset)
    request, listed = asked
    scheduler.set_timesteps(**request)
    expected = listed or spaced(spacing, 50, int(request["num_inference_steps"]), offset)
    assert scheduler.timesteps.tolist() == expected
    for t in range(50):
        assert scheduler.previous_timestep(t) == max([other for other in expected if other < t], default=-1)
    assert scheduler.previous_timestep(torch.tensor(expected, dtype=torch.uint8)).tolist() == [*expected[1:], -1]


# Steps ---------------------------------------------------------------------------------------------------------------


def column(values, sample):
    """Values by image, to be combined with images."""
    return np.asarray(values, dtype=np.float64).reshape(-1, *[1] * (sample.ndim - 1))


def oracle_x0_eps(config, alpha_bar_t, x_t, output):
    """x_0 and the noise, from what the model predicts."""
    a, b = np.sqrt(alpha_bar_t), np.sqrt(1 - alpha_bar_t)
    match config.get("prediction_type", "epsilon"):
        case "epsilon":
            x_0, eps = (x_t - b * output) / a, output
        case "sample":
            x_0, eps = output, (x_t - a * output) / b
        case "v_prediction":
            x_0, eps = a * x_t - b * output, a * output + b * x_t
    if config.get("thresholding"):
        quantiles = np.quantile(
            np.abs(x_0).reshape(len(x_0), -1), config.get("dynamic_thresholding_ratio", 0.995), axis=1
        )
        limit = column(np.clip(quantiles, 1, config.get("sample_max_value", 1.0)), x_0)
        x_0 = np.clip(x_0, -limit, limit) / limit
    elif config.get("clip_sample", True):
        x_0 = np.clip(x_0, -config.get("clip_sample_range", 1.0), config.get("clip_sample_range", 1.0))
    return x_0, eps


def oracle_step(kind, config, timesteps, t, x_t, output, z, amount=None, use_clipped_model_output=False):
    """x_prev and x_0 by the papers; t has one entry, or one for each image."""
    alpha_bar = np.cumprod(1 - oracle_betas(config))
    prev = np.array([max([other for other in timesteps if other < each], default=-1) for each in t])
    final = 1.0 if config.get("set_alpha_to_one", True) else alpha_bar[0]
    a_t = column(alpha_bar[t], x_t)
    a_prev = column(np.where(prev >= 0, alpha_bar[prev], final), x_t)
    is_last = column(prev < 0, x_t)
    beta = 1 - a_t / a_prev
    posterior_variance = (1 - a_prev) / (1 - a_t) * beta
    x_0, eps = oracle_x0_eps(config, a_t, x_t, output)
    large = config.get("variance_type") == "fixed_large"
    if kind == "ddpm":
        mean = np.sqrt(a_prev) * beta / (1 - a_t) * x_0 + np.sqrt(a_t / a_prev) * (1 - a_prev) / (1 - a_t) * x_t
        std = np.sqrt(beta if large else posterior_variance)
        return mean + (1.0 if amount is None else amount) * np.where(is_last, 0, std) * z, x_0
    eta = amount or 0.0
    sigma = np.where(is_last, 0, eta * np.sqrt(posterior_variance))
    noise_std = np.where(is_last, 0, eta * np.sqrt(beta)) if large else sigma
    eps = (x_t - np.sqrt(a_t) * x_0) / np.sqrt(1 - a_t) if use_clipped_model_output else eps
    return np.sqrt(a_prev) * x_0 + np.sqrt(np.maximum(1 - a_prev - sigma**2, 0)) * eps + noise_std * z, x_0


def same(actual, expected, scale=0.0):
    """Compare with what float64 gives, up to the rounding of the dtype."""
    tolerance = TOLERANCE[actual.dtype] * max(np.abs(expected).max(initial=0), scale, 1e-3)
    expected = torch.from_numpy(expected).to(actual.dtype)  # infinite where the dtype can't hold it
    torch.testing.assert_close(actual, expected, rtol=TOLERANCE[actual.dtype], atol=tolerance)


def noise(seed, dtype, shape=SHAPE):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


INTEGER_TYPES = st.sampled_from([torch.int64, torch.int32])
TIMESTEP = st.integers(0, 19)
TIMESTEPS = st.one_of(
    TIMESTEP,
    TIMESTEP.map(np.int64),
    st.builds(torch.tensor, TIMESTEP | st.lists(TIMESTEP, min_size=3, max_size=3), dtype=INTEGER_TYPES),
    st.builds(torch.tensor, st.lists(TIMESTEP, min_size=1, max_size=1), dtype=INTEGER_TYPES),
)
AMOUNTS = st.floats(0, 1) | st.sampled_from([0, 1, np.float32(0.5)])
SOURCES = {
    "one generator": lambda: {"generator": torch.Generator().manual_seed(5)},
    "a list": lambda: {"generator": [torch.Generator().manual_seed(seed) for seed in range(3)]},
    "given": lambda: {"variance_noise": noise(2, torch.float32)},
}


def drawn(source):
    """The noise that a source gives, drawn here."""
    if "variance_noise" in source:
        return source["variance_noise"]
    if isinstance(source["generator"], list):
        return torch.cat([torch.randn(1, *SHAPE[1:], generator=g.clone_state()) for g in source["generator"]])
    return torch.randn(SHAPE, generator=source["generator"].clone_state())


@BOTH
@searched(60)
@given(
    config=CONFIGS.map(lambda config: config | {"num_train_timesteps": 20, "trained_betas": None}),
    n=st.none() | st.integers(1, 6),
    timestep=TIMESTEPS,
    amount=AMOUNTS,
    source=st.sampled_from(sorted(SOURCES)),
    dtype=st.sampled_from(sorted(TOLERANCE, key=str)),
    use_clipped_model_output=st.booleans(),
)
def test_a_step_is_that_of_the_paper(kind, config, n, timestep, amount, source, dtype, use_clipped_model_output):
    config = of_kind(kind, config)
    scheduler = build(kind, config)
    assume(scheduler is not None)
    no_signal = config.get("rescale_betas_zero_snr") and config.get("prediction_type", "epsilon") == "epsilon"
    if n and not no_signal:
        scheduler.set_timesteps(n)
    timesteps = scheduler.timesteps.tolist()
    t = np.atleast_1d(np.asarray(timestep)).astype(int)
    source = SOURCES[source]()
    sample, output, z = noise(0, dtype), noise(1, dtype), drawn(source)

    options = {"noise_scale": amount} if kind == "ddpm" else {"eta": amount}
    options |= {"use_clipped_model_output": use_clipped_model_output} if kind == "ddim" else {}
    if no_signal and 19 in t:
        with pytest.raises(ValueError, match="prediction_type"):
            scheduler.step(output, timestep, sample, **source, **options)
        return
    result = scheduler.step(output, timestep, sample, **source, **options)
    arrays = (x.double().numpy() for x in (sample, output, z))
    clipped = kind == "ddim" and use_clipped_model_output
    x_prev, x_0 = oracle_step(kind, config, timesteps, t, *arrays, amount, clipped)
    assert result.prev_sample.dtype == result.pred_original_sample.dtype == dtype
    same(result.pred_original_sample, x_0)
    same(result.prev_sample, x_prev)


# Forward -------------------------------------------------------------------------------------------------------------

CALLS = {
    "sample_forward": lambda s, x, e, t: s.sample_forward(x, t, e),
    "add_noise": lambda s, x, e, t: s.add_noise(x, e, t),
    "forward_step": lambda s, x, e, t: s.forward_step(x, t, e),
    "get_velocity": lambda s, x, e, t: s.get_velocity(x, e, t),
}


@searched(50)
@given(
    config=st.fixed_dictionaries(
        {"num_train_timesteps": st.just(20)}, optional={k: GOOD[k] for k in ("beta_schedule", "beta_end")}
    ),
    call=st.sampled_from(sorted(CALLS)),
    timestep=TIMESTEPS,
    dtype=st.sampled_from(sorted(TOLERANCE, key=str)),
)
def test_the_forward_process_is_that_of_the_paper(config, call, timestep, dtype):
    scheduler = MNISTDDPMScheduler(**config)
    x_0, eps = noise(0, dtype), noise(1, dtype)
    result = CALLS[call](scheduler, x_0, eps, timestep)
    t = np.atleast_1d(np.asarray(timestep)).astype(int)
    betas = oracle_betas(config)
    a, beta = (column(values[t], result) for values in (np.cumprod(1 - betas), betas))
    x, e = x_0.double().numpy(), eps.double().numpy()
    match call:
        case "forward_step":
            expected = np.sqrt(1 - beta) * x + np.sqrt(beta) * e  # DDPM, equation 2
        case "get_velocity":
            expected = np.sqrt(a) * e - np.sqrt(1 - a) * x
        case _:
            expected = np.sqrt(a) * x + np.sqrt(1 - a) * e  # DDPM, equation 4
    assert result.dtype == dtype
    same(result, expected)


@searched(20)
@given(
    config=st.fixed_dictionaries({}, optional={k: GOOD[k] for k in ("prediction_type", "beta_schedule")}),
    n=st.integers(2, 20),
    timestep=TIMESTEPS,
)
def test_encoding_undoes_a_step_without_noise(config, n, timestep):
    """DDIM, section 4.3: with the same eps_hat, the step back leads to where the step came from."""
    scheduler = MNISTDDIMScheduler(**config | {"num_train_timesteps": 20, "clip_sample": False})
    scheduler.set_timesteps(n)
    x_t, eps = noise(0, torch.float64), noise(1, torch.float64)
    t = np.atleast_1d(np.asarray(timestep)).astype(int)
    a = column(scheduler.alphas_cumprod.numpy()[t], x_t)
    prev = np.array([max([o for o in scheduler.timesteps.tolist() if o < each], default=-1) for each in t])
    a_prev = column(np.where(prev >= 0, scheduler.alphas_cumprod.numpy()[prev], 1.0), x_t)
    x_0 = (x_t.numpy() - np.sqrt(1 - a) * eps.numpy()) / np.sqrt(a)
    x_prev = torch.from_numpy(np.sqrt(a_prev) * x_0 + np.sqrt(1 - a_prev) * eps.numpy())

    def output(x):
        """What a model says whose noise is eps at x, taken for x_t."""
        at_x = (x.numpy() - np.sqrt(1 - a) * eps.numpy()) / np.sqrt(a)
        outputs = {"epsilon": eps.numpy(), "sample": at_x, "v_prediction": None}
        outputs["v_prediction"] = (eps.numpy() - np.sqrt(1 - a) * x.numpy()) / np.sqrt(a)
        return torch.from_numpy(np.ascontiguousarray(outputs[config.get("prediction_type", "epsilon")]))

    same(scheduler.step(output(x_t), timestep, x_t).prev_sample, x_prev.numpy())
    same(scheduler.encode_step(output(x_prev), timestep, x_prev), x_t.numpy())
