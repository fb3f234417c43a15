"""What is random in a training step: a function of the seed and of global counters, and of nothing else."""

import math

import pytest
import torch

from mnist_ddpm.training.batches import (
    TrainingBatches,
    logit_normal_probabilities,
    stratified_timesteps,
    uniform_probabilities,
)

NUM_IMAGES, BATCH_SIZE, T = 10, 4, 1000
UNIFORM = uniform_probabilities(T)
# image n is constant, and of value n
IMAGES = torch.arange(NUM_IMAGES, dtype=torch.uint8)[:, None, None, None].expand(NUM_IMAGES, 1, 2, 3)


def batches(seed=0, batch_size=BATCH_SIZE, images=IMAGES, random_flip=False, **labels):
    return TrainingBatches(images, batch_size, UNIFORM, seed, torch.device("cpu"), random_flip, **labels)


def indices(batch):
    return ((batch.clean_images[:, 0, 0, 0] + 1) * 127.5).round().long().tolist()


def same(first, second):
    return all(a is b is None or torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_images_are_scaled_to_minus_1_to_1():
    ramp = torch.tensor([0, 51, 255], dtype=torch.uint8).reshape(3, 1, 1, 1)
    (batch,) = TrainingBatches(ramp, 3, UNIFORM, 0, torch.device("cpu")).micro_batches(0, 1)
    torch.testing.assert_close(batch.clean_images.flatten().sort().values, torch.tensor([-1.0, -0.6, 1.0]))


@pytest.mark.parametrize("batch_size", [1, 4, 10, 25])
def test_each_epoch_visits_each_image_once_across_the_borders_of_batches(batch_size):
    run = batches(batch_size=batch_size)
    steps = range(math.ceil(5 * NUM_IMAGES / batch_size))
    visited = [index for step in steps for index in indices(run.micro_batches(step, 1)[0])]
    epochs = [visited[start : start + NUM_IMAGES] for start in range(0, 5 * NUM_IMAGES, NUM_IMAGES)]
    assert all(sorted(epoch) == list(range(NUM_IMAGES)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 5, "each epoch has an order of its own"
    together = indices(batches(batch_size=5 * NUM_IMAGES).micro_batches(0, 1)[0])
    assert visited[: 5 * NUM_IMAGES] == together, "which does not depend on the batch size"


@pytest.mark.parametrize(("micro_batches", "processes"), [(2, 1), (1, 2), (2, 2), (4, 1), (1, 4)])
def test_a_step_is_the_same_however_it_is_divided(micro_batches, processes):
    images, labels = torch.randint(0, 256, (NUM_IMAGES, 1, 2, 3), dtype=torch.uint8), torch.arange(NUM_IMAGES)
    run = batches(images=images, random_flip=True, labels=labels, num_classes=NUM_IMAGES, label_dropout=0.5)
    (whole,) = run.micro_batches(7, 1)
    shares = [run.micro_batches(7, micro_batches, process, processes) for process in range(processes)]
    # micro-batch by micro-batch, and within it process by process
    parts = [shares[process][micro] for micro in range(micro_batches) for process in range(processes)]
    assert all(len(part.timesteps) == BATCH_SIZE // (micro_batches * processes) for part in parts)
    assert same(whole, [torch.cat(tensors) for tensors in zip(*parts, strict=True)])


def test_half_of_the_images_are_flipped_by_seed_and_step():
    images = torch.arange(3, dtype=torch.uint8).expand(1000, 1, 1, 3)  # 0 1 2, or flipped 2 1 0

    def flipped(seed, step, random_flip=True):
        (batch,) = batches(seed, 1000, images, random_flip).micro_batches(step, 1)
        assert (batch.clean_images[..., 1] == 1 / 127.5 - 1).all()
        return batch.clean_images[:, 0, 0, 0] > -1

    assert not flipped(0, 0, random_flip=False).any()
    assert abs(flipped(0, 0).float().mean() - 0.5) < 5 * 0.5 / 1000**0.5
    assert torch.equal(flipped(0, 3), flipped(0, 3))
    assert len({tuple(flipped(seed, step).tolist()) for seed in range(2) for step in range(2)}) == 4
    plain, flipping = (batches(random_flip=flip).micro_batches(5, 1)[0] for flip in (False, True))
    assert same(plain[1:], flipping[1:]), "noise and timesteps stay as they are"


def test_labels_go_with_their_images():
    run = batches(labels=torch.arange(NUM_IMAGES), num_classes=NUM_IMAGES)
    for step in range(5):
        (batch,) = run.micro_batches(step, 1)
        assert batch.class_labels.tolist() == indices(batch)
    assert batches().micro_batches(0, 1)[0].class_labels is None


@pytest.mark.parametrize("label_dropout", [0.0, 0.1, 0.5])
def test_labels_are_hidden_by_seed_and_step(label_dropout):
    def hidden(seed, step):
        labels = {"labels": torch.ones(NUM_IMAGES, dtype=torch.int64), "num_classes": 7}
        run = batches(seed, 10_000, label_dropout=label_dropout, **labels)
        plain, (batch,) = batches(seed, 10_000).micro_batches(step, 1)[0], run.micro_batches(step, 1)
        assert same(plain[:3], batch[:3]), "images, noise and timesteps stay as they are"
        assert set(batch.class_labels.tolist()) <= {1, 7}
        return batch.class_labels == 7

    standard_error = (label_dropout * (1 - label_dropout) / 10_000) ** 0.5
    assert abs(hidden(0, 0).float().mean() - label_dropout) <= 5 * standard_error
    assert torch.equal(hidden(0, 3), hidden(0, 3))
    drawn = {tuple(hidden(seed, step).tolist()) for seed in range(2) for step in range(2)}
    assert len(drawn) == (4 if label_dropout else 1)


def test_a_step_depends_on_the_seed_and_its_number_alone():
    run = batches()
    for step in range(5):
        run.micro_batches(step, 1)
    torch.manual_seed(0)
    state = torch.get_rng_state()
    first = run.micro_batches(5, 1)[0]
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(1)
    assert same(first, batches().micro_batches(5, 1)[0])
    drawn = [batches(seed).micro_batches(step, 1)[0] for seed in range(3) for step in range(3)]
    for name in ("noise", "timesteps"):
        assert len({tuple(getattr(batch, name).flatten().tolist()) for batch in drawn}) == len(drawn)


def test_noise_is_standard_normal():
    images = torch.zeros(1, 1, 28, 28, dtype=torch.uint8)
    (batch,) = TrainingBatches(images, 256, UNIFORM, 0, torch.device("cpu")).micro_batches(0, 1)
    count = batch.noise.numel()  # about 200,000: 5 standard errors
    assert abs(batch.noise.mean()) < 5 / count**0.5
    assert abs(batch.noise.var() - 1) < 5 * (2 / count) ** 0.5


@pytest.mark.parametrize(("count", "num_train_timesteps"), [(1000, 1000), (64, 1000), (50, 10), (1, 7), (3, 2)])
def test_timesteps_hold_one_of_each_equal_slice(count, num_train_timesteps):
    timesteps = stratified_timesteps(
        count, uniform_probabilities(num_train_timesteps).cumsum(0).float(), torch.Generator().manual_seed(0)
    )
    assert timesteps.shape == (count,)
    assert timesteps.dtype == torch.int64
    position = timesteps.sort().values.double()
    low = torch.arange(count, dtype=torch.float64) * num_train_timesteps / count
    assert (position >= low.floor()).all()
    assert (position <= (low + num_train_timesteps / count).clamp(max=num_train_timesteps - 1)).all()


def test_each_position_has_uniform_timesteps():
    num_train_timesteps, count, repeats = 5, 4, 4000
    generator = torch.Generator().manual_seed(0)
    cdf = uniform_probabilities(num_train_timesteps).cumsum(0).float()
    drawn = torch.stack([stratified_timesteps(count, cdf, generator) for _ in range(repeats)])
    for position in range(count):
        frequency = torch.bincount(drawn[:, position], minlength=num_train_timesteps) / repeats
        standard_error = (0.2 * 0.8 / repeats) ** 0.5
        assert (frequency - 0.2).abs().max() < 5 * standard_error


@pytest.mark.parametrize("uniform_share", [0.0, 0.3])
@pytest.mark.parametrize(("mean", "std"), [(0.0, 1.0), (0.4, 1.0), (-0.5, 0.7)])
def test_logit_normal_timesteps_are_those_of_sigmoid_of_a_normal(mean, std, uniform_share):
    with torch.device("meta"):  # torch's default device does not matter
        p = logit_normal_probabilities(T, mean, std, uniform_share)
    assert p.sum().item() == pytest.approx(1, abs=1e-12)
    generator = torch.Generator().manual_seed(0)
    count = 200_000
    t = torch.sigmoid(mean + std * torch.randn(count, generator=generator)) * T
    which, u = torch.rand(2, count, generator=generator)
    t = torch.where(which < uniform_share, u * T, t)
    t = torch.where(which < uniform_share / 2, torch.expm1(u * math.log1p(T)), t).long().clamp(max=T - 1)
    ours = stratified_timesteps(count, p.cumsum(0).float(), generator)
    for edge in (5, 50, 200, 500, 800, 950):  # two estimates of the distribution function, one stratified
        assert abs((t < edge).double().mean() - (ours < edge).double().mean()) < 5 * 0.5 / count**0.5


def test_small_timesteps_are_drawn_by_the_uniform_share():
    assert logit_normal_probabilities(T)[:20].sum() < 1e-4
    half = 0.25 * 0.02 / 2 + 0.25 * math.log(21) / math.log(1001) / 2
    assert logit_normal_probabilities(T, uniform_share=0.25)[:20].sum() == pytest.approx(half, rel=0.02)
