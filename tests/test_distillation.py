"""Distillation: both objectives against what is known in closed form on Gaussian data, and runs of a few steps."""

import json
import math

import distill
import pytest
import torch
from accelerate.state import AcceleratorState
from diffusers import LCMScheduler
from safetensors.torch import load_file
from tiny_training import UNET, write_images
from torch import nn

from mnist_ddpm import MNISTDDIMScheduler, MNISTDDPMPipeline, MNISTDDPMScheduler, MNISTUNet2DModel
from mnist_ddpm.training.adversarial import AdversarialLoss, Discriminator, relativistic_loss
from mnist_ddpm.training.arguments import FIXED, arguments
from mnist_ddpm.training.batches import Batch
from mnist_ddpm.training.distillation import (
    AdversarialBatch,
    ConsistencyFunction,
    ConsistencyLoss,
    DistillationArguments,
    Distiller,
    GuidedTeacher,
    level_probabilities,
    level_timesteps,
)

T = 1000
SCHEDULER = MNISTDDPMScheduler(beta_schedule="cosine", prediction_type="v_prediction", clip_sample=False)
SAMPLER = LCMScheduler(clip_sample=False)  # Gaussian data have no limits
ALPHA_BAR = SCHEDULER.alphas_cumprod.double()
MEAN, STD = 0.3, 0.5  # of Gaussian data


def coefficients(x, t):
    """The roots of alpha_bar_t and of 1 - alpha_bar_t."""
    alpha_bar = ALPHA_BAR[t].to(x)[:, None, None, None]
    return alpha_bar.sqrt(), (1 - alpha_bar).sqrt()


def velocity(x_t, t, x_0):
    """What predicts x_0 from x_t."""
    a, b = coefficients(x_t, t)
    return (a * x_t - x_0) / b


def exact_map(x_t, t):
    """Where the probability-flow ODE of Gaussian data leads from x_t at t: an affine map."""
    a, b = coefficients(x_t, t)
    return MEAN + STD * (x_t - a * MEAN) / (a**2 * STD**2 + b**2).sqrt()


class Predictor(nn.Module):
    """A U-Net that predicts v such that x0_hat is a given function of x_t and t."""

    def __init__(self, x0_hat):
        super().__init__()
        self.x0_hat = x0_hat

    def forward(self, x_t, t, class_labels=None, return_dict=True):
        return (velocity(x_t, t, self.x0_hat(x_t, t)),)


def posterior_mean(x_t, t):
    """E[x_0 | x_t] of Gaussian data: the perfect teacher."""
    a, b = coefficients(x_t, t)
    return MEAN + a * STD**2 / (a**2 * STD**2 + b**2) * (x_t - a * MEAN)


class LinearStudent(Predictor):
    """A U-Net of two weights for each timestep: `x0_hat = slope x_t + offset`; the teacher's at first."""

    def __init__(self):
        super().__init__(lambda x_t, t: (self.weights[t] @ torch.stack([x_t.flatten(), torch.ones_like(t)])).diag())
        t = torch.arange(T)
        at = [posterior_mean(torch.full((T, 1, 1, 1), value, dtype=torch.float64), t).flatten() for value in (0, 1)]
        self.weights = nn.Parameter(torch.stack([at[1] - at[0], at[0]], dim=1).float())

    def forward(self, x_t, t, class_labels=None, return_dict=True):
        slope, offset = self.weights[t].T[..., None, None, None]
        return (velocity(x_t, t, slope * x_t + offset),)


def gaussian_batch(timesteps, generator):
    shape = (len(timesteps), 1, 1, 1)
    clean = MEAN + STD * torch.randn(shape, generator=generator)
    return Batch(clean, torch.randn(shape, generator=generator), timesteps)


def consistency_loss(num_levels, teacher=posterior_mean, clip_sample=False):
    function = ConsistencyFunction(SCHEDULER, LCMScheduler(clip_sample=clip_sample))
    ddim = MNISTDDIMScheduler.from_config(SCHEDULER.config)
    return ConsistencyLoss(function, Predictor(teacher), ddim, level_timesteps(T, num_levels))


# The student's function


@pytest.mark.parametrize("prediction_type", ["epsilon", "sample", "v_prediction"])
@pytest.mark.parametrize("t", [0, 1, 19, 499, 949])
@pytest.mark.parametrize("clip_sample", [False, True])
def test_the_function_is_that_of_diffusers(prediction_type, t, clip_sample):
    scheduler = MNISTDDPMScheduler.from_config(SCHEDULER.config, prediction_type=prediction_type)
    sampler = LCMScheduler.from_config(scheduler.config, clip_sample=clip_sample)
    sampler.set_timesteps(1)
    sampler.set_begin_index(0)
    x_t, output = torch.randn(2, 3, 1, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    timesteps = torch.full((3,), t)
    f = ConsistencyFunction(scheduler, sampler)(lambda *_, **__: (output,), x_t, timesteps)
    # diffusers' table is in float32, and so is our x0_hat's model output
    assert (f - sampler.step(output, torch.tensor(t), x_t).denoised).abs().max() < 1e-5 * (1 + f.abs().max())


def test_at_no_noise_the_function_is_the_identity():
    x = torch.randn(5, 1, 4, 4)
    function = ConsistencyFunction(SCHEDULER, SAMPLER)
    wild = Predictor(lambda x_t, t: 1e3 * torch.randn_like(x_t))
    assert torch.equal(function(wild, x, torch.zeros(5, dtype=torch.long)), x)


@pytest.mark.parametrize("num_levels", [1, 2, 4, 50, 1000])
def test_levels_are_the_timesteps_of_diffusers(num_levels):
    sampler = LCMScheduler.from_config(SCHEDULER.config, original_inference_steps=num_levels)
    sampler.set_timesteps(num_levels)
    timesteps = level_timesteps(T, num_levels)
    assert sampler.timesteps.tolist() == timesteps[::-1]
    sampler.set_timesteps(1)
    assert sampler.timesteps.tolist() == [T - 1]
    p = level_probabilities(T, timesteps, 0.7)
    assert p.sum().item() == pytest.approx(1)
    assert p.nonzero().flatten().tolist() == timesteps
    assert p[T - 1].item() == pytest.approx(0.7 if num_levels > 1 else 1)


# Consistency distillation


def test_consistency_loss_of_the_exact_map_falls_with_the_step_and_that_of_the_teacher_does_not():
    generator = torch.Generator().manual_seed(0)
    losses = {posterior_mean: [], exact_map: []}
    for num_levels in (10, 50, 250):
        levels = torch.tensor(level_timesteps(T, num_levels))
        batch = gaussian_batch(levels[torch.randint(num_levels, (4000,), generator=generator)], generator)
        for x0_hat, values in losses.items():
            # per step: the loss adds up over num_levels steps
            values.append(num_levels * consistency_loss(num_levels)(Predictor(x0_hat), batch).item())
    exact, mean = losses[exact_map], losses[posterior_mean]
    assert exact[0] > 5 * exact[1] > 25 * exact[2]
    assert mean[2] > 100 * exact[2]


def test_a_linear_student_learns_where_the_teachers_steps_lead():
    num_levels = 10
    levels = torch.tensor(level_timesteps(T, num_levels))
    loss, student = consistency_loss(num_levels), LinearStudent()
    optimizer = torch.optim.Adam(student.parameters(), lr=0.05)
    generator = torch.Generator().manual_seed(0)
    for step in range(800):
        optimizer.param_groups[0]["lr"] = 0.05 * (1 - step / 800)
        optimizer.zero_grad()
        loss(student, gaussian_batch(levels.repeat(8), generator)).backward()
        optimizer.step()
    x = torch.randn(200, 1, 1, 1, generator=generator)
    f = ConsistencyFunction(SCHEDULER, SAMPLER)(student, x, torch.full((200,), T - 1)).detach()
    end = x
    for t in loss.ddim.timesteps:
        (output,) = loss.teacher(end, t.expand(len(end)))
        end = loss.ddim.step(output, t, end).prev_sample
    assert (f - end).abs().max() < 0.02
    exact = exact_map(x, torch.full((200,), T - 1))
    assert (f - exact).abs().max() < 0.25  # ten steps are not the ODE
    assert (posterior_mean(x, torch.full((200,), T - 1)) - exact).abs().max() > 1  # where the student began


@pytest.mark.parametrize(("x0_hat", "target", "sign"), [(-0.9, -1, 1), (-1.1, -1, 0), (-1.1, -0.9, -1)])
def test_a_black_pixel_may_be_predicted_as_blacker_than_black_and_no_other(x0_hat, target, sign):
    loss = consistency_loss(10, lambda x_t, t: torch.full_like(x_t, target), clip_sample=True)
    (first, *_) = level_timesteps(T, 10)
    student = LinearStudent()
    student.weights.data.copy_(torch.tensor([0.0, x0_hat]))
    loss(student, gaussian_batch(torch.full((8,), first), torch.Generator().manual_seed(0))).backward()
    assert student.weights.grad[first, 1].round() == sign


# The adversarial losses


def test_the_relativistic_loss_is_antisymmetric_but_for_the_difference():
    real, fake = torch.randn(2, 6, 3, 2, 2, dtype=torch.float64)
    difference = relativistic_loss(real, fake) - relativistic_loss(fake, real)
    assert difference.item() == pytest.approx((fake - real).mean().item())
    assert relativistic_loss(real, real).item() == pytest.approx(math.log(2))
    assert relativistic_loss(real + 7, fake + 7).item() == pytest.approx(relativistic_loss(real, fake).item())


def unet_of(seed=0, **config):
    torch.manual_seed(seed)
    unet = MNISTUNet2DModel(**{"sample_size": 8} | UNET | config)
    for weight in unet.parameters():
        nn.init.normal_(weight, std=0.2)
    return unet


def adversarial_batch(size=4, shape=(1, 8, 8), labels=None, max_t=500):
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(6, size, *shape, generator=generator)
    levels = torch.tensor([T - 1, 249, 499, 749] * size)[:size]
    inputs = Batch(images[0], images[1], levels, labels)
    real = Batch(images[2], images[3], torch.randint(max_t, (size,), generator=generator), labels)
    return AdversarialBatch(inputs, real, images[4], images[5])


@pytest.mark.parametrize("classes", [None, 3])
def test_each_network_gets_the_gradients_of_its_own_loss(classes):
    unet = unet_of(num_class_embeds=classes)
    function, discriminator = ConsistencyFunction(SCHEDULER, SAMPLER), Discriminator(unet)
    labels = torch.tensor([0, 2, 1, 3]) if classes else None
    batch = adversarial_batch(labels=labels)
    AdversarialLoss(function, discriminator, 2.0, 0.1)(unet, batch).backward()

    inputs, real = batch.inputs, batch.real
    x_t = SCHEDULER.add_noise(inputs.clean_images, inputs.noise, inputs.timesteps)
    fake = SCHEDULER.add_noise(function(unet, x_t, inputs.timesteps, labels), batch.fake_noise, real.timesteps)
    noisy_real = SCHEDULER.add_noise(real.clean_images, real.noise, real.timesteps)
    of = {}
    for name, x in {"fake": fake, "real": noisy_real}.items():
        for shift in (0, 0.1):
            of[name, shift] = discriminator(x + shift * batch.perturbation, real.timesteps, labels)
    loss = relativistic_loss(of["fake", 0], of["real", 0])
    expected = torch.autograd.grad(loss, unet.parameters(), retain_graph=True, allow_unused=True)
    for weight, gradient in zip(unet.parameters(), expected, strict=True):
        torch.testing.assert_close(weight.grad, gradient)
    changes = torch.cat([of[name, 0.1][::4] - of[name, 0][::4] for name in ("real", "fake")])
    loss = relativistic_loss(of["real", 0], of["fake", 0]) + 2 * changes.square().mean()
    expected = torch.autograd.grad(loss, discriminator.parameters(), allow_unused=True)
    for weight, gradient in zip(discriminator.parameters(), expected, strict=True):
        torch.testing.assert_close(weight.grad, gradient)


class QuadraticDiscriminator(nn.Module):
    """Logits `w_1 x + w_2 x^2`, enough to tell two Gaussians apart."""

    def __init__(self):
        super().__init__()
        self.weights = nn.Parameter(torch.zeros(2))

    def forward(self, x_t, timesteps, class_labels=None):
        return self.weights[0] * x_t + self.weights[1] * x_t**2


def test_the_penalty_is_the_squared_gradient_of_a_linear_discriminator():
    """`E (D(x + s z) - D(x))^2 = s^2 |w|^2`."""
    discriminator = QuadraticDiscriminator()
    with torch.no_grad():
        discriminator.weights[0] = 3.0
    batch = adversarial_batch(20_000, (1, 1, 1))
    function = ConsistencyFunction(SCHEDULER, SAMPLER)
    losses = [
        AdversarialLoss(function, discriminator, weight, 0.1)(Predictor(posterior_mean), batch).item()
        for weight in (1.0, 2.0)
    ]
    assert losses[1] - losses[0] == pytest.approx(0.1**2 * 3**2, rel=0.05)


def test_an_adversarial_student_learns_the_mean_and_the_spread_of_gaussian_data():
    student, discriminator = LinearStudent(), QuadraticDiscriminator()
    loss = AdversarialLoss(ConsistencyFunction(SCHEDULER, SAMPLER), discriminator, 1.0, 0.1)
    groups = [{"params": student.parameters(), "lr": 0.01}, {"params": discriminator.parameters(), "lr": 0.02}]
    optimizer = torch.optim.AdamW(groups, betas=(0.0, 0.99), weight_decay=0.0)
    generator = torch.Generator().manual_seed(0)
    tail = []
    for step in range(600):
        inputs = gaussian_batch(torch.full((256,), T - 1), generator)
        real = gaussian_batch(torch.randint(500, (256,), generator=generator), generator)
        fake_noise, perturbation = torch.randn(2, 256, 1, 1, 1, generator=generator)
        optimizer.zero_grad()
        loss(student, AdversarialBatch(inputs, real, fake_noise, perturbation)).backward()
        optimizer.step()
        tail += [student.weights[T - 1].detach().clone()] if step >= 400 else []
    slope, offset = torch.stack(tail).mean(dim=0).tolist()  # as the EMA does
    assert offset == pytest.approx(MEAN, abs=0.05)
    assert abs(slope) == pytest.approx(STD, abs=0.05)


def test_a_discriminator_is_the_way_down_of_the_unet():
    unet = unet_of()
    discriminator = Discriminator(unet)
    x, t = torch.randn(2, 1, 8, 8), torch.tensor([3, 400])
    features = {}
    for name in ("down_blocks.1.0", "mid_block.1"):
        unet.get_submodule(name).register_forward_hook(
            lambda _, __, output, name=name: features.update({name: output})
        )
    unet(x, t)
    logits = discriminator(x, t)
    assert logits.shape == (2, 3, 4, 4)
    for head, name in enumerate(features, start=1):
        expected = discriminator.heads[head](features[name])
        torch.testing.assert_close(logits[:, head : head + 1, ::2, ::2], expected)
    assert not set(discriminator.parameters()) & set(unet.parameters())


# Runs


def test_a_guided_teacher_predicts_as_its_pipeline():
    pipe = MNISTDDPMPipeline(unet=unet_of(), scheduler=SCHEDULER, guide=unet_of(1))
    torch.nn.init.normal_(pipe.guide.conv_out.weight)
    teacher = GuidedTeacher(pipe.unet, pipe.guide, 2.0, (200, 999))
    x_t, timesteps, scales = torch.randn(3, 1, 8, 8), torch.tensor([199, 200, 999]), (1.0, 2.0, 2.0)
    with torch.no_grad():
        (predicted,) = teacher(x_t, timesteps, return_dict=False)
        expected = [pipe._predict(x_t[i : i + 1], timesteps[i], None, scales[i]) for i in range(3)]
    torch.testing.assert_close(predicted, torch.cat(expected))


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    """A data set and a saved pipeline."""
    folder = tmp_path_factory.mktemp("distill")
    write_images(folder / "images")
    MNISTDDPMPipeline(unet=unet_of(), scheduler=SCHEDULER, guide=unet_of(1)).save_pretrained(folder / "teacher")
    return folder


@pytest.fixture
def run(workplace):
    """Distill with some flags, for four steps of four images unless they say otherwise."""

    def run(output_dir, *flags, **values):
        values = {
            "init_from": workplace / "teacher", "dataset_name": workplace / "images", "mixed_precision": "no",
            "cache_dir": workplace / "cache", "train_batch_size": 4, "max_train_steps": 4, "eval_batch_size": 2,
            "logger": "none", "output_dir": output_dir, "checkpointing_steps": 2,
        } | values  # fmt: skip
        AcceleratorState._reset_state(reset_partial_state=True)
        words = [str(part) for name, value in values.items() for part in (f"--{name}", value)]
        distill.main(distill.parse_args([*words, *flags]))
        return output_dir

    return run


def state(checkpoint):
    """Every tensor of a checkpoint: weights, EMA, optimizer."""
    tensors = {}
    for path in sorted(checkpoint.glob("*.safetensors")):
        tensors |= {f"{path.name} {name}": tensor for name, tensor in load_file(path).items()}
    for path in [*checkpoint.glob("*.bin"), *checkpoint.glob("custom_checkpoint_*.pkl")]:
        leaves = torch.utils._pytree.tree_leaves(torch.load(path))
        tensors |= {f"{path.name} {i}": leaf for i, leaf in enumerate(leaves) if isinstance(leaf, torch.Tensor)}
    return tensors


OBJECTIVES = {"consistency": (), "adversarial": ("--num_levels", "4")}


@pytest.mark.parametrize(("objective", "flags"), OBJECTIVES.items())
def test_a_resumed_run_is_bit_identical(run, tmp_path, objective, flags):
    straight = run(tmp_path / "straight", *flags, objective=objective)
    resumed = run(tmp_path / "resumed", *flags, objective=objective, max_train_steps=2)
    run(resumed, *flags, "--resume_from_checkpoint", "latest", objective=objective)
    first, second = (state(folder / "checkpoint-4") for folder in (straight, resumed))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    early = state(straight / "checkpoint-2")
    networks = ("model.safetensors", "model_1.safetensors") if objective == "adversarial" else ("model.safetensors",)
    for network in networks:  # both are trained
        assert any(name.startswith(network) and not torch.equal(early[name], first[name]) for name in first)


@pytest.mark.parametrize(("objective", "flags"), OBJECTIVES.items())
def test_a_run_leaves_a_pipeline_for_few_steps(run, tmp_path, objective, flags):
    folder = run(tmp_path / "student", *flags, objective=objective)
    assert (folder / "samples.png").exists()
    card = (folder / "README.md").read_text(encoding="utf-8")
    assert "num_inference_steps=1)" in card
    assert "from_config" not in card
    pipe = MNISTDDPMPipeline.from_pretrained(folder)
    assert isinstance(pipe.scheduler, LCMScheduler)
    assert pipe.scheduler.config.prediction_type == "v_prediction"
    for steps in (1, 4):
        visited = []

        def note(pipe, i, t, tensors, visited=visited):
            visited.append(t.item())
            return {}

        generators = [torch.Generator().manual_seed(seed) for seed in range(3)]
        three = pipe(3, generators, num_inference_steps=steps, output_type="pt", callback_on_step_end=note).images
        again = pipe(1, torch.Generator().manual_seed(2), num_inference_steps=steps, output_type="pt").images
        assert visited[0] == T - 1
        assert len(visited) == steps
        torch.testing.assert_close(three[2:], again)  # noise of its own generator at each step
        assert not torch.equal(three[0], three[1])


def test_the_guide_leads_the_teacher_unless_the_scale_is_1(run, tmp_path):
    losses = []
    for i, flags in enumerate([(), ("--guidance_scale", "1.5"), ("--guidance_scale", "1")]):
        folder = run(tmp_path / str(i), *flags, objective="consistency", num_levels=50, max_train_steps=1)
        losses.append(json.loads((folder / "train_log.jsonl").read_text(encoding="utf-8"))["loss"])
    assert losses[0] == losses[1] != losses[2]
    with pytest.raises(ValueError, match="guidance_scale"):
        run(tmp_path / "again", "--guidance_scale", "2", init_from=folder, objective="consistency")


def test_a_student_may_be_distilled_again(run, tmp_path):
    student = run(tmp_path / "student")
    again = run(tmp_path / "again", init_from=student, objective="adversarial", num_levels=4)
    config = MNISTDDPMPipeline.from_pretrained(again).scheduler.config
    assert (config.original_inference_steps, config.clip_sample) == (4, False)


def test_the_teachers_process_is_kept(run, workplace, tmp_path):
    options = {"num_train_timesteps": 100, "beta_schedule": "linear", "prediction_type": "epsilon"}
    scheduler = MNISTDDPMScheduler(**options, clip_sample=False)
    MNISTDDPMPipeline(unet=unet_of(), scheduler=scheduler).save_pretrained(tmp_path / "teacher")
    student = run(tmp_path / "student", init_from=tmp_path / "teacher", objective="consistency")
    config = MNISTDDPMPipeline.from_pretrained(student).scheduler.config
    assert (config.num_train_timesteps, config.beta_schedule, config.prediction_type) == (100, "linear", "epsilon")
    assert config.clip_sample


# Errors, and the command line


@pytest.mark.parametrize(
    ("name", "flags"),
    [
        ("num_levels", {"num_levels": 3}),
        ("ddpm_num_inference_steps", {"ddpm_num_inference_steps": 21}),
        ("penalty_weight", {"penalty_weight": 0}),
        ("pure_noise_share", {"pure_noise_share": 1}),
    ],
)
def test_what_does_not_fit_is_an_error(run, tmp_path, capsys, name, flags):
    with pytest.raises((ValueError, SystemExit)) as error:
        run(tmp_path / "run", **flags)
    assert name in str(error.value) + capsys.readouterr().err
    assert not (tmp_path / "run" / "train_log.jsonl").exists()


def test_a_run_resumes_with_its_own_objective(run, tmp_path):
    folder = run(tmp_path / "run", max_train_steps=2)
    with pytest.raises(ValueError, match="objective"):
        run(folder, "--resume_from_checkpoint", "latest", objective="adversarial")


def test_a_run_resumes_with_its_own_teacher(run, tmp_path):
    MNISTDDPMPipeline(unet=unet_of(2), scheduler=SCHEDULER).save_pretrained(tmp_path / "another")
    folder = run(tmp_path / "run", objective="consistency", max_train_steps=2)
    with pytest.raises(ValueError, match="teacher"):
        run(folder, "--resume_from_checkpoint", "latest", objective="consistency", init_from=tmp_path / "another")


def test_arguments_of_training_that_have_no_effect_are_errors():
    for name, value in {"snr_gamma": 5.0, "uniform_share": 0.1, "loss_type": "vlb"}.items():
        with pytest.raises(ValueError, match=f"^{name} must be"):
            DistillationArguments(init_from="teacher", **{name: value})


def test_a_student_of_a_discriminator_is_trained_by_adamw():
    optimizers = {name: DistillationArguments(init_from="teacher", objective=name).optimizer for name in OBJECTIVES}
    assert optimizers == {"consistency": "muon", "adversarial": "adamw"}


def test_without_a_pipeline_there_is_nothing_to_distill(capsys):
    with pytest.raises(SystemExit):
        distill.parse_args([])
    assert "init_from" in capsys.readouterr().err


def test_the_command_line_is_that_of_the_class():
    args = distill.parse_args(["--init_from", "teacher", "--no-use_ema"])
    expected = DistillationArguments(init_from="teacher", use_ema=False, command=args.command)
    assert args == expected
    assert arguments(DistillationArguments).keys() >= {*Distiller.fixed, *FIXED}
    assert not distill.WITHOUT_FLAG - arguments(DistillationArguments).keys()
