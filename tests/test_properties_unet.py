"""The U-Net, searched: each config is built, runs, trains all of its weights, and survives saving."""

import tempfile

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mnist_ddpm import MNISTUNet2DModel


@st.composite
def configs(draw):
    """Arguments of a small U-Net."""
    groups = draw(st.sampled_from([1, 2, 4]))
    levels = draw(st.integers(1, 3))
    channels = [4 * draw(st.integers(1, 4)) for _ in range(levels)]
    kinds = [draw(st.sampled_from(["DownBlock2D", "AttnDownBlock2D"])) for _ in range(levels)]
    patch_size = draw(st.sampled_from([1, 2, 4]))
    size = st.integers(2, 3).map(lambda n: n * patch_size * 2 ** (levels - 1))
    return {
        "sample_size": draw(size | st.tuples(size, size) | st.tuples(size, size).map(list)),
        "in_channels": draw(st.integers(1, 3)),
        "out_channels": draw(st.integers(1, 3)),
        "patch_size": patch_size,
        "block_out_channels": draw(st.sampled_from([list, tuple]))(channels),
        "down_block_types": draw(st.sampled_from([list, tuple]))(kinds),
        "layers_per_block": draw(st.integers(1, 2)),
        "attention_head_dim": draw(st.sampled_from([None, 1, 2, 4])),
        "dropout": draw(st.sampled_from([0, 0.0, 0.5])),
        "norm_num_groups": groups,
        "norm_eps": draw(st.sampled_from([1e-5, 1e-6, 1e-3])),
        "fourier_frequencies": draw(st.sampled_from([(), [0], (3, 7), [16, 5]])),
        "pixel_gain": draw(st.booleans()),
        "num_class_embeds": draw(st.sampled_from([None, 1, 10])),
    }


@settings(max_examples=25, derandomize=True, deadline=None, database=None)
@given(config=configs(), dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16]))
def test_any_config_runs_and_survives_saving(config, dtype):
    torch.manual_seed(0)
    unet = MNISTUNet2DModel(**config)
    with torch.no_grad():
        for parameter in unet.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))  # none is 0: each path adds to the output
    unet = unet.to(dtype).eval()
    size = config["sample_size"]
    x = torch.randn(2, config["in_channels"], *([size, size] if isinstance(size, int) else size), dtype=dtype)
    t = torch.tensor([0, 999])
    output = unet(x, t).sample
    assert output.shape == (2, config["out_channels"], *x.shape[2:])
    assert output.isfinite().all()
    output.float().square().sum().backward()
    assert not [name for name, p in unet.named_parameters() if p.grad is None or not p.grad.isfinite().all()]
    with tempfile.TemporaryDirectory() as folder:
        unet.save_pretrained(folder)
        loaded = MNISTUNet2DModel.from_pretrained(folder, torch_dtype=dtype, disable_mmap=True)
    assert all(loaded.config[name] == unet.config[name] for name in config)
    with torch.no_grad():
        torch.testing.assert_close(loaded(x, t).sample, output, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["UNet2DModel", 5, None])
def test_the_config_of_another_model_is_refused(name):
    with pytest.raises(ValueError, match="_class_name"):
        MNISTUNet2DModel.from_config({"_class_name": name, "sample_size": 8})
