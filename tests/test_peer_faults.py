"""Where diffusers' own schedulers are wrong: what they do, and what ours do.

Each fault is there in the version below. In another version a fault that is gone is reported as a skipped test.
"""

import diffusers
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from mnist_ddpm import MNISTDDIMScheduler, MNISTDDPMScheduler

TESTED = "0.42.1"
SHAPE = (2, 1, 4, 4)


def expect_fault(seen, fault):
    """Diffusers still has the fault, or it is reported as mended."""
    if not seen and diffusers.__version__ != TESTED:
        pytest.skip(f"mended in diffusers {diffusers.__version__}: {fault}")
    assert seen, fault


def normal(seed, dtype=torch.float32):
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def noise_level_after(scheduler, t):
    """1 - alpha_bar where a step from t leads: with x0_hat = 0 only the noise of x_t is left, scaled."""
    x, zero = torch.ones(SHAPE, dtype=torch.float64), torch.zeros(SHAPE, dtype=torch.float64)
    x_prev = scheduler.step(zero, t, x).prev_sample
    return (x_prev**2 * (1 - scheduler.alphas_cumprod[t]))[0, 0, 0, 0].item()


@pytest.mark.parametrize(("spacing", "n"), [("linspace", 10), ("trailing", 7)])
def test_ddim_goes_to_the_timestep_that_is_visited_next(spacing, n):
    kwargs = {"timestep_spacing": spacing, "prediction_type": "sample"}
    ours, theirs = MNISTDDIMScheduler(**kwargs), diffusers.DDIMScheduler(**kwargs)
    ours.set_timesteps(n)
    theirs.set_timesteps(n)
    t, prev = ours.timesteps[-2:].tolist()
    expected = (1 - ours.alphas_cumprod[prev]).item()
    assert noise_level_after(ours, t) == pytest.approx(expected, rel=1e-9)
    wrong = (1 - ours.alphas_cumprod[t - 1000 // n]).item()
    assert wrong != pytest.approx(expected, rel=1e-3)
    expect_fault(noise_level_after(theirs, t) == pytest.approx(wrong, rel=1e-3), "the previous timestep is t - T // n")


@pytest.mark.parametrize("n", [5, 20, 100])
def test_ddim_where_the_stride_divides_t_is_as_in_diffusers(n):
    kwargs = {"timestep_spacing": "leading", "prediction_type": "sample"}
    ours, theirs = MNISTDDIMScheduler(**kwargs), diffusers.DDIMScheduler(**kwargs)
    ours.set_timesteps(n)
    theirs.set_timesteps(n)
    for t in ours.timesteps[:-1].tolist():
        assert noise_level_after(ours, t) == pytest.approx(noise_level_after(theirs, t), rel=2e-3)


@pytest.mark.parametrize("spacing", ["trailing", "linspace"])
def test_ddim_with_cosine_betas_and_eta_1_is_finite(spacing):
    """`1 - alpha_bar_prev - sigma^2` is never below 0, and rounding must not carry it there."""
    kwargs = {"timestep_spacing": spacing, "beta_schedule": "squaredcos_cap_v2"}
    steps = []
    for scheduler in (MNISTDDIMScheduler(**kwargs), diffusers.DDIMScheduler(**kwargs)):
        scheduler.set_timesteps(5)
        x = scheduler.step(normal(0), 999, normal(1), eta=1.0, generator=torch.Generator().manual_seed(0)).prev_sample
        steps.append(x.isfinite().all().item())
    assert steps[0]
    expect_fault(not steps[1], "NaN at t = 999")


def test_ddpm_with_fixed_large_adds_no_noise_in_the_last_step():
    kwargs = {"timestep_spacing": "trailing", "variance_type": "fixed_large", "prediction_type": "sample"}
    differences = []
    for scheduler in (MNISTDDPMScheduler(**kwargs), diffusers.DDPMScheduler(**kwargs)):
        scheduler.set_timesteps(10)
        out = scheduler.step(normal(0), scheduler.timesteps[-1], normal(1), generator=torch.Generator().manual_seed(0))
        differences.append((out.prev_sample - out.pred_original_sample).abs().max().item())
    assert differences[0] < 1e-6
    expect_fault(differences[1] > 0.1, "noise in the last step unless it is t = 0")


def test_ddim_that_ends_at_timestep_0_adds_no_noise_in_the_last_step():
    kwargs = {"timestep_spacing": "trailing", "set_alpha_to_one": False}
    differences = []
    for scheduler in (MNISTDDIMScheduler(**kwargs), diffusers.DDIMScheduler(**kwargs)):
        scheduler.set_timesteps(10)
        steps = [
            scheduler.step(
                normal(0), 99, normal(1), eta=1.0, generator=torch.Generator().manual_seed(seed)
            ).prev_sample
            for seed in range(2)
        ]
        differences.append((steps[0] - steps[1]).abs().max().item())
    assert differences[0] == 0
    expect_fault(differences[1] > 1e-3, "noise in the last step with set_alpha_to_one=False")


def test_trailing_gives_as_many_timesteps_as_asked_for():
    ours = MNISTDDPMScheduler()
    theirs = diffusers.DDPMScheduler(timestep_spacing="trailing")
    wrong = []
    for n in [*range(1, 130), *range(130, 1001, 37)]:
        ours.set_timesteps(n)
        theirs.set_timesteps(n)
        assert len(ours.timesteps) == n
        assert 0 <= ours.timesteps[-1] < ours.timesteps[0] + 1 == 1000
        if len(theirs.timesteps) != n:
            wrong.append(n)
            assert theirs.timesteps[-1] == -1
        else:
            # the two differ where T k / n ends in exactly one half, which floats may round either way
            halves = {1000 - 1000 * i // n for i in range(n) if 2000 * i % n == 0}
            different = (ours.timesteps != theirs.timesteps).nonzero().flatten().tolist()
            assert all(abs(ours.timesteps[i] - theirs.timesteps[i]) == 1 for i in different)
            assert len(different) <= len(halves)
    expect_fault(wrong[:4] == [61, 103, 121, 122], "one timestep too many")


@pytest.mark.parametrize("kind", ["DDPM", "DDIM"])
def test_zero_terminal_snr_with_predicted_noise_is_refused(kind):
    ours = {"DDPM": MNISTDDPMScheduler, "DDIM": MNISTDDIMScheduler}[kind](rescale_betas_zero_snr=True)
    with pytest.raises(ValueError, match="prediction_type"):
        ours.set_timesteps(10)
    kwargs = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing", "clip_sample": False}
    theirs = getattr(diffusers, f"{kind}Scheduler")(**kwargs)
    theirs.set_timesteps(10)
    x_0 = theirs.step(normal(0), 999, normal(1)).pred_original_sample
    expect_fault(not x_0.isfinite().any(), "a division by zero at T - 1")


def test_sampling_begins_at_the_last_timestep():
    ours, theirs = MNISTDDIMScheduler(), diffusers.DDIMScheduler()
    ours.set_timesteps(20)
    theirs.set_timesteps(20)
    assert ours.timesteps[0] == 999
    expect_fault(theirs.timesteps[0] == 950, "the default spacing never visits the last timestep")
    signal = theirs.alphas_cumprod[950].sqrt().item()
    assert signal > 1.5 * theirs.alphas_cumprod[999].sqrt().item()  # of which pure noise has none


def test_the_first_timesteps_have_noise_in_half_precision():
    x_0, noise, t = torch.zeros(10, 1), torch.ones(10, 1), torch.arange(10)
    expected = (1 - MNISTDDPMScheduler().alphas_cumprod[:10]).sqrt()
    for dtype in (torch.bfloat16, torch.float16):
        ours = MNISTDDPMScheduler().add_noise(x_0.to(dtype), noise.to(dtype), t).flatten()
        torch.testing.assert_close(ours.double(), expected, rtol=torch.finfo(dtype).eps, atol=0)
    theirs = diffusers.DDPMScheduler().add_noise(x_0.bfloat16(), noise.bfloat16(), t)
    expect_fault((theirs == 0).all().item(), "alpha_bar is rounded to bfloat16 before it is taken from 1")


def test_tables_are_float64_products():
    expected = torch.cumprod(1 - torch.linspace(1e-4, 2e-2, 1000, dtype=torch.float64), dim=0)
    torch.testing.assert_close(MNISTDDPMScheduler().alphas_cumprod, expected, rtol=1e-12, atol=0)
    theirs = diffusers.DDPMScheduler().alphas_cumprod
    error = ((1 - theirs[0]).double() / (1 - expected[0]) - 1).abs().item()
    expect_fault(error > 1e-4, "float32 tables: 1 - alpha_bar of the first timestep is off by more than 1e-4")


def test_diffusers_expected_sum_is_that_of_its_float32_tables():
    """Its own test_full_loop_with_noise expects 387.9466; with float64 tables it gives our 387.9672 as well."""
    index = torch.arange(768)
    x_0, noise = (i.reshape(3, 8, 8, 4).permute(3, 0, 1, 2) / 768 for i in (index, index.flip(0)))

    def loop(scheduler, alphas_cumprod):
        generator = torch.Generator().manual_seed(0)
        x = alphas_cumprod[1] ** 0.5 * x_0 + (1 - alphas_cumprod[1]) ** 0.5 * noise
        for t in (1, 0):
            x = scheduler.step(x * t / (t + 1), t, x.float(), generator=generator).prev_sample
        return x.abs().sum().item()

    ours, theirs = MNISTDDPMScheduler(), diffusers.DDPMScheduler()
    theirs_sum = loop(theirs, theirs.alphas_cumprod)
    theirs.alphas_cumprod = ours.alphas_cumprod
    assert loop(ours, ours.alphas_cumprod) == pytest.approx(loop(theirs, ours.alphas_cumprod), abs=1e-3)
    expect_fault(abs(theirs_sum - 387.9466) < 1e-3, "float32 tables")


def test_add_noise_leaves_the_tables_where_they_are():
    x = torch.zeros(SHAPE, device="meta")
    t = torch.zeros(2, dtype=torch.long)
    ours, theirs = MNISTDDPMScheduler(), diffusers.DDPMScheduler()
    for scheduler in (ours, theirs):
        assert scheduler.add_noise(x, x, t).device.type == "meta"
    assert ours.alphas_cumprod.device.type == "cpu"
    ours.set_timesteps(3)
    expect_fault(theirs.alphas_cumprod.device.type == "meta", "add_noise moves the table of the scheduler")


@pytest.mark.parametrize("kind", ["DDPM", "DDIM"])
def test_a_step_never_waits_for_a_device(kind):
    """After the first step; with stand-ins for a GPU's tensors, anything that needs to read a value of one raises."""
    ours = {"DDPM": MNISTDDPMScheduler, "DDIM": MNISTDDIMScheduler}[kind]()
    theirs = getattr(diffusers, f"{kind}Scheduler")()
    outcomes = []
    for scheduler in (ours, theirs):
        scheduler.set_timesteps(10)
        scheduler.step(normal(0), scheduler.timesteps[0], normal(1))
        with FakeTensorMode(allow_non_fake_inputs=True):
            scheduler.timesteps = torch.empty(10, dtype=torch.long, device="cuda")
            x, t = torch.empty(SHAPE, device="cuda"), torch.empty((), dtype=torch.long, device="cuda")
            try:
                outcomes.append(scheduler.step(x, t, x).prev_sample.device.type)
            except RuntimeError:  # of which kind depends on how PyTorch was built
                outcomes.append("read a value")
    assert outcomes[0] == "cuda"
    expect_fault(outcomes[1] == "read a value", "the step reads its timestep from the device")


@pytest.mark.parametrize("variance_type", ["fixed_large_log", "other"])
def test_variance_types_that_make_no_sense_are_refused(variance_type):
    with pytest.raises(ValueError, match="variance_type"):
        MNISTDDPMScheduler(variance_type=variance_type)
    theirs = diffusers.DDPMScheduler(variance_type=variance_type)
    x = theirs.step(normal(0), 500, normal(1)).prev_sample
    expected_nan = variance_type == "fixed_large_log"
    expect_fault(x.isnan().all().item() == expected_nan, "the root of a logarithm, or a silent default")


def test_an_offset_that_runs_out_of_range_is_refused():
    kwargs = {"timestep_spacing": "leading", "steps_offset": 1}
    with pytest.raises(ValueError, match="steps_offset"):
        MNISTDDPMScheduler(**kwargs).set_timesteps(1000)
    theirs = diffusers.DDPMScheduler(**kwargs)
    theirs.set_timesteps(1000)
    expect_fault(theirs.timesteps[0] == 1000, "a timestep that does not exist")


def test_values_of_the_source_survive_a_swap_live_as_well_as_saved():
    """PNDM spaces leading and ends at timestep 0; Euler goes by linspace."""
    source = diffusers.EulerDiscreteScheduler()
    saved = {k: v for k, v in source.config.items() if k != "_use_default_values"}
    for config in (source.config, saved):
        assert MNISTDDIMScheduler.from_config(config).config.timestep_spacing == "linspace"
    spacings = [
        diffusers.DDIMScheduler.from_config(config).config.timestep_spacing for config in (source.config, saved)
    ]
    expect_fault(spacings == ["leading", "linspace"], "a live config loses the values that were defaults")
