"""Muon and AdamW in one optimizer."""

import copy

import pytest
import torch
from diffusers import UNet2DModel
from diffusers.optimization import get_scheduler
from torch import nn

from mnist_ddpm import MNISTUNet2DModel
from mnist_ddpm.training import TrainingArguments
from mnist_ddpm.training.optimizers import MuonAdamW, hidden_matrices, learning_rate_factor, orthogonalize


def parameter(*shape, seed=0):
    p = nn.Parameter(torch.randn(shape, generator=torch.Generator().manual_seed(seed)))
    p.grad = torch.randn(shape, generator=torch.Generator().manual_seed(seed + 1))
    return p


@pytest.mark.parametrize("shape", [(3, 16, 64), (2, 64, 16), (1, 32, 32)])
def test_orthogonalize_keeps_singular_vectors_and_brings_singular_values_near_1(shape):
    matrices = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    U, _, Vh = torch.linalg.svd(matrices, full_matrices=False)
    core = U.mT @ orthogonalize(matrices).float() @ Vh.mT  # diagonal in the basis of the singular vectors
    diagonal = core.diagonal(dim1=1, dim2=2)
    assert (core - torch.diag_embed(diagonal)).abs().max() < 0.05  # bfloat16
    alone = torch.cat([orthogonalize(matrix[None]) for matrix in matrices])
    torch.testing.assert_close(orthogonalize(matrices), alone, rtol=0, atol=0.02)
    assert (diagonal > 0.5).all()
    assert (diagonal < 1.3).all()


@pytest.mark.parametrize("kind", ["Muon", "AdamW"])
def test_each_part_is_that_of_torch(kind):
    shape = (24, 16) if kind == "Muon" else (7,)
    ours, theirs = parameter(*shape), parameter(*shape)
    if kind == "Muon":
        settings = {"lr": 0.02, "momentum": 0.9, "weight_decay": 0.1}
        reference = torch.optim.Muon([theirs], nesterov=True, adjust_lr_fn="original", **settings)
        optimizer = MuonAdamW([ours], [], muon_lr=0.02, momentum=0.9, weight_decay=0.1)
    else:
        settings = {"lr": 1e-2, "betas": (0.8, 0.9), "eps": 1e-6, "weight_decay": 0.1}
        optimizer, reference = MuonAdamW([], [ours], **settings), torch.optim.AdamW([theirs], **settings)
    for step in range(5):
        ours.grad = theirs.grad = parameter(*shape, seed=step).grad
        optimizer.step()
        reference.step()
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-3 if kind == "Muon" else 1e-6)


def test_a_kernel_is_a_matrix_of_its_output_channels():
    kernel, matrix = parameter(8, 4, 3, 3), parameter(8, 36)
    kernel.data, kernel.grad = matrix.data.view(8, 4, 3, 3).clone(), matrix.grad.view(8, 4, 3, 3).clone()
    kernel.data = kernel.data.to(memory_format=torch.channels_last)
    MuonAdamW([kernel], []).step()
    MuonAdamW([matrix], []).step()
    torch.testing.assert_close(kernel.flatten(1), matrix)


def test_the_step_does_not_depend_on_the_scale_of_the_gradient():
    small, large = parameter(8, 12), parameter(8, 12)
    large.grad = 1024 * large.grad  # a power of 2, so that bfloat16 rounds both alike
    MuonAdamW([small], []).step()
    MuonAdamW([large], []).step()
    torch.testing.assert_close(small, large, rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    "name", ["linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup"]
)
def test_schedules_are_those_of_diffusers(name):
    optimizer = torch.optim.SGD([parameter(1)], lr=1.0)
    reference = get_scheduler(name, optimizer, num_warmup_steps=3, num_training_steps=20).lr_lambdas[0]
    args = TrainingArguments(lr_scheduler=name, lr_warmup_steps=3)
    factors = [learning_rate_factor(step, 20, args) for step in range(20)]
    assert factors == pytest.approx([reference(step) for step in range(20)], abs=1e-6)


def test_the_last_steps_fall_linearly_to_0():
    args = TrainingArguments(lr_scheduler="constant_with_warmup", lr_warmup_steps=2, lr_decay_steps=4)
    factors = [learning_rate_factor(step, 9, args) for step in range(10)]
    assert factors == [0, 0.5, 1, 1, 1, 1, 0.75, 0.5, 0.25, 0]


def test_a_saved_state_resumes_bit_for_bit():
    def step(optimizer, parameters, number):
        for p in parameters:
            p.grad = parameter(*p.shape, seed=number).grad
        optimizer.step()

    whole = [parameter(8, 4, 3, 3), parameter(8, 8), parameter(8)]
    optimizer = MuonAdamW(whole[:2], whole[2:])
    step(optimizer, whole, 1)
    resumed = copy.deepcopy(whole)
    resumed_optimizer = MuonAdamW(resumed[:2], resumed[2:])
    resumed_optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    step(optimizer, whole, 2)
    step(resumed_optimizer, resumed, 2)
    assert all(torch.equal(a, b) for a, b in zip(whole, resumed, strict=True))


def test_a_saved_state_goes_to_the_device_of_the_parameters():
    saved = [parameter(8, 8), parameter(8)]
    optimizer = MuonAdamW(saved[:1], saved[1:])
    optimizer.step()
    elsewhere = [nn.Parameter(p.to("meta")) for p in saved]
    resumed = MuonAdamW(elsewhere[:1], elsewhere[1:])
    resumed.load_state_dict(optimizer.state_dict())
    assert {value.device.type for state in resumed.state.values() for value in state.values()} == {"meta"}


CHANNELS = {"sample_size": 8, "in_channels": 1, "out_channels": 1, "block_out_channels": (32, 32)}


@pytest.mark.parametrize("unet", [MNISTUNet2DModel, UNet2DModel])
def test_hidden_matrices_of_a_unet(unet):
    blocks = {"down_block_types": ("DownBlock2D", "AttnDownBlock2D"), "up_block_types": ("AttnUpBlock2D", "UpBlock2D")}
    unet = unet.from_config(CHANNELS | blocks | {"num_class_embeds": 3})
    matrices, others = hidden_matrices(unet)
    assert len(matrices) + len(others) == len(list(unet.parameters()))
    names = {id(p): name for name, p in unet.named_parameters()}
    assert all(p.ndim >= 2 for p in matrices)
    in_adamw = {names[id(p)] for p in others}
    ends = ("conv_in", "conv_out", "sample_gain", "gain_map.conv", "gain_map.log_scale", "class_embedding")
    assert {f"{end}.weight" for end in ends} & set(names.values()) <= in_adamw
    assert {"conv_in.weight", "conv_out.weight", "time_embedding.linear_1.weight"} <= in_adamw
    assert not [name for name in in_adamw if "conv1.weight" in name or "to_q.weight" in name]
