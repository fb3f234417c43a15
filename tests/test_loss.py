"""The training loss: what is predicted, and with which weight, in closed form."""

import pytest
import torch

from mnist_ddpm import MNISTDDPMScheduler, VariationalBound
from mnist_ddpm.training.batches import Batch
from mnist_ddpm.training.loss import DiffusionLoss, min_snr_weights, prediction_target

T = 1000
PREDICTION_TYPES = ["epsilon", "sample", "v_prediction"]


def scheduler(prediction_type):
    return MNISTDDPMScheduler(
        num_train_timesteps=T, beta_schedule="squaredcos_cap_v2", prediction_type=prediction_type
    )


def cosine_alpha_bar():
    """Products of `1 - beta_t`, `beta_t = min(1 - f(t) / f(t - 1), 0.999)` (iDDPM, equation 17), in float64."""
    time = torch.arange(T + 1, dtype=torch.float64) / T
    f = torch.cos((time + 0.008) / 1.008 * torch.pi / 2) ** 2
    return (1 - (1 - f[1:] / f[:-1]).clamp(max=0.999)).cumprod(0)


def model_output(batch, channels):
    return torch.randn(len(batch.noise), channels, 4, 4, generator=torch.Generator().manual_seed(2))


def loss_of(output, noise_schedule, batch, loss_type="simple", snr_gamma=None):
    """The loss of a U-Net with this output."""
    return DiffusionLoss(noise_schedule, snr_gamma, torch.device("cpu"), loss_type)(lambda *a, **k: (output,), batch)


def random_batch(count=6):
    generator = torch.Generator().manual_seed(0)
    images, noise = torch.randn(2, count, 1, 4, 4, generator=generator)
    return Batch(images, noise, torch.linspace(0, T - 1, count).long())


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_target_is_what_the_prediction_type_says(prediction_type):
    batch = random_batch()
    alpha_bar = cosine_alpha_bar()[batch.timesteps][:, None, None, None]
    expected = {
        "epsilon": batch.noise,
        "sample": batch.clean_images,
        "v_prediction": (alpha_bar.sqrt() * batch.noise - (1 - alpha_bar).sqrt() * batch.clean_images).float(),
    }[prediction_type]
    torch.testing.assert_close(prediction_target(scheduler(prediction_type), batch), expected)


@pytest.mark.parametrize("snr_gamma", [None, 5.0])
@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_loss_is_the_weighted_squared_error_at_the_noisy_images(prediction_type, snr_gamma):
    batch, noise_schedule = random_batch(), scheduler(prediction_type)
    alpha_bar = cosine_alpha_bar()[batch.timesteps][:, None, None, None]
    seen = {}

    def unet(sample, timestep, class_labels, return_dict):
        seen.update(sample=sample, timestep=timestep)
        return (torch.full_like(sample, 0.5),)

    loss = DiffusionLoss(noise_schedule, snr_gamma, torch.device("cpu"))(unet, batch)
    noisy = alpha_bar.sqrt() * batch.clean_images + (1 - alpha_bar).sqrt() * batch.noise
    torch.testing.assert_close(seen["sample"], noisy.float())
    assert seen["timestep"] is batch.timesteps
    errors = (0.5 - prediction_target(noise_schedule, batch)).pow(2).mean(dim=(1, 2, 3))
    if snr_gamma is not None:
        errors = errors * min_snr_weights(noise_schedule, snr_gamma)[batch.timesteps]
    torch.testing.assert_close(loss, errors.mean())


def test_min_snr_weights_are_one_weight_on_x0_in_three_currencies():
    snr = cosine_alpha_bar() / (1 - cosine_alpha_bar())
    on_x0 = snr.clamp(max=5)  # arXiv 2303.09556, section 3.4
    expected = {"sample": on_x0, "epsilon": on_x0 / snr, "v_prediction": on_x0 / (snr + 1)}
    for prediction_type, weights in expected.items():
        actual = min_snr_weights(scheduler(prediction_type), 5.0)
        torch.testing.assert_close(actual, weights.float(), rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("snr_gamma", [1.0, 5.0])
def test_the_weighted_loss_of_one_x0_hat_does_not_depend_on_the_prediction_type(snr_gamma):
    """epsilon and v follow from x_0 and x_t, so the same x0_hat must cost the same in each."""
    batch = random_batch()
    alpha_bar = cosine_alpha_bar()[batch.timesteps][:, None, None, None]
    x0_hat = batch.clean_images.double() + 0.1 * torch.randn(6, 1, 4, 4, generator=torch.Generator().manual_seed(1))
    x_t = alpha_bar.sqrt() * batch.clean_images + (1 - alpha_bar).sqrt() * batch.noise
    eps_hat = (x_t - alpha_bar.sqrt() * x0_hat) / (1 - alpha_bar).sqrt()
    predictions = {
        "sample": x0_hat,
        "epsilon": eps_hat,
        "v_prediction": alpha_bar.sqrt() * eps_hat - (1 - alpha_bar).sqrt() * x0_hat,
    }
    losses = [
        loss_of(output, scheduler(kind), batch, snr_gamma=snr_gamma).item() for kind, output in predictions.items()
    ]
    assert losses == pytest.approx([losses[0]] * 3, rel=1e-3)


def test_no_weight_is_infinite_where_the_snr_is_0():
    noise_schedule = MNISTDDPMScheduler(prediction_type="v_prediction", rescale_betas_zero_snr=True)
    weights = min_snr_weights(noise_schedule, 5.0)
    assert weights[-1] == 0
    assert torch.isfinite(weights).all()


@pytest.mark.parametrize("loss_type", ["simple", "vlb"])
def test_half_precision_predictions_are_compared_in_float32(loss_type):
    batch = random_batch()
    output = model_output(batch, 1).bfloat16()
    half, full = (loss_of(x, scheduler("epsilon"), batch, loss_type) for x in (output, output.float()))
    assert (half.dtype, half) == (torch.float32, full)


# The bound


@pytest.mark.parametrize("variance_type", ["fixed_small", "fixed_large", "learned_range"])
def test_vlb_is_the_bound_in_bits_per_dimension_and_ten_squared_errors(variance_type):
    """With the timesteps of a batch that holds each of them once, the bound is the sum of the terms."""
    noise_schedule = MNISTDDPMScheduler(num_train_timesteps=6, beta_end=0.3, variance_type=variance_type)
    batch = random_batch()._replace(timesteps=torch.arange(6))
    output = model_output(batch, 2 if variance_type == "learned_range" else 1)
    loss = loss_of(output, noise_schedule, batch, "vlb")
    noisy = noise_schedule.add_noise(batch.clean_images, batch.noise, batch.timesteps)
    terms = VariationalBound(noise_schedule).term(output, batch.timesteps, noisy, batch.clean_images)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, terms.sum() + 10 * (output[:, :1] - batch.noise).square().mean())


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_in_the_hybrid_the_squared_error_trains_the_prediction_and_the_bound_the_variance(prediction_type):
    noise_schedule = MNISTDDPMScheduler(
        beta_schedule="cosine", prediction_type=prediction_type, variance_type="learned_range"
    )
    batch = random_batch()
    gradients = {}
    for loss_type in ("hybrid", "vlb"):
        output = model_output(batch, 2).requires_grad_()
        loss_of(output, noise_schedule, batch, loss_type).backward()
        gradients[loss_type] = output.grad.chunk(2, dim=1)
    prediction = model_output(batch, 2).chunk(2, dim=1)[0]
    simple = 2 * (prediction - prediction_target(noise_schedule, batch)) / prediction.numel()
    torch.testing.assert_close(gradients["hybrid"][0], simple)
    torch.testing.assert_close(gradients["hybrid"][1], 0.001 * gradients["vlb"][1])  # iDDPM, section 3.1
    assert (gradients["vlb"][1] != 0).any()
