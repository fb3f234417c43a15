"""The U-Net, searched: any config is built and runs, or is refused by an error that names what is wrong with it."""

import math
import tempfile

import pytest
import torch
from hypothesis import strategies as st
from strategies import ABSURD, NO_NUMBERS, arguments, attempt, half, searched

from mnist_ddpm import MNISTUNet2DModel
from mnist_ddpm.unet import _num_weights

NO_COUNTS = [*NO_NUMBERS, math.inf, -1, 0, 1.5, 2.0, True]
BAD = {
    "sample_size": [*NO_COUNTS, -8, 7, (8, 8, 8), (8,), ("8", "8"), (8, None), 2**20, 10**12, "88"],
    "in_channels": [*NO_COUNTS, 10**9, 10**400],
    "out_channels": [*NO_COUNTS, 10**9, 10**400],
    "patch_size": [*NO_COUNTS, 3, 10**9],
    "block_out_channels": [*NO_COUNTS, 8, "88", (), (0, 8), (7,), (8.0,), (8, "8"), (10**9,), (8,) * 60, (True,)],
    "down_block_types": [*NO_COUNTS, "DownBlock2D", ("CrossAttnDownBlock2D",), (), ([],), ({},), (None,)],
    "layers_per_block": [*NO_COUNTS, 65, 10**9, 10**400],
    "attention_head_dim": [*NO_COUNTS, 3, 10**9],
    "dropout": [*NO_NUMBERS, *ABSURD, 1, 1.0, True],
    "norm_num_groups": [*NO_COUNTS, 3, 10**9],
    "norm_eps": [*NO_NUMBERS, *ABSURD, 0, 0.0],
    "fourier_frequencies": [3, "3", (1.0,), ("1",), (-1,), (17,), (True,), (3, 3), (None,), ([],), 1j, math.nan],
}


@st.composite
def configs(draw):
    """Arguments of a small U-Net, all good."""
    groups = draw(st.sampled_from([1, 2, 4]))
    levels = draw(st.integers(1, 3))
    channels = [4 * draw(st.integers(1, 4)) for _ in range(levels)]
    kinds = [draw(st.sampled_from(["DownBlock2D", "AttnDownBlock2D"])) for _ in range(levels)]
    patch_size = draw(st.sampled_from([1, 2, 4]))
    size = st.integers(1, 2).map(lambda n: n * patch_size * 2 ** (levels - 1))
    return {
        "sample_size": draw(size | st.tuples(size, size) | st.tuples(size, size).map(list)),
        "in_channels": draw(st.integers(1, 3)),
        "out_channels": draw(st.integers(1, 3)),
        "patch_size": patch_size,
        "block_out_channels": draw(st.sampled_from([list, tuple]))(channels),
        "down_block_types": draw(st.sampled_from([list, tuple]))(kinds),
        "layers_per_block": draw(st.integers(1, 2)),
        "attention_head_dim": draw(st.sampled_from([1, 2, 4])),
        "dropout": draw(st.sampled_from([0, 0.0, 0.5])),
        "norm_num_groups": groups,
        "norm_eps": draw(st.sampled_from([1e-5, 1e-6, 1e-3])),
        "fourier_frequencies": draw(st.sampled_from([(), [0], (3, 7), [16, 5]])),
    }


DEFAULT = {"sample_size": 8, "block_out_channels": (8,), "down_block_types": ("DownBlock2D",), "attention_head_dim": 8}


@searched(
    40,
    config=configs(),
    wrong=half(arguments({}, BAD)),
    saved=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.float32, torch.float64, torch.bfloat16]),
    examples=[
        {"config": DEFAULT, "wrong": ({name: value}, frozenset([name])), "saved": False, "dtype": torch.float32}
        for name, value in [
            ("block_out_channels", 8),
            ("block_out_channels", (10**9,)),
            ("sample_size", None),
            ("sample_size", 10**12),
            ("down_block_types", ([],)),
            ("layers_per_block", 10**9),
            ("in_channels", 10**9),
            ("dropout", "1"),
            ("norm_eps", math.inf),
        ]
    ],
)
def test_a_config_is_built_and_runs_or_is_refused(config, wrong, saved, dtype):
    values, names = wrong or ({}, frozenset())
    sizes = config["sample_size"] if isinstance(config["sample_size"], (list, tuple)) else [config["sample_size"]]
    coarsest = {size // (config.get("patch_size", 2) * 2 ** (len(config["block_out_channels"]) - 1)) for size in sizes}
    if not names and coarsest == {1} and config["block_out_channels"][-1] == config.get("norm_num_groups", 8):
        names = {"norm_num_groups"}  # a single value in each group
    torch.manual_seed(0)
    unet, named = attempt(lambda: MNISTUNet2DModel(**config | values), names)
    if named:
        return named
    with torch.no_grad():
        for parameter in unet.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))  # none is 0: each path adds to the output
    unet = unet.to(dtype).eval()
    size = config["sample_size"]
    x = torch.randn(2, config["in_channels"], *([size, size] if isinstance(size, int) else size), dtype=dtype)
    output = unet(x, torch.tensor([0, 999])).sample
    assert output.shape == (2, config["out_channels"], *x.shape[2:])
    assert output.isfinite().all()
    output.float().square().sum().backward()
    unreached = [name for name, p in unet.named_parameters() if p.grad is None or not p.grad.isfinite().all()]
    assert not unreached
    assert sum(p.numel() for p in unet.parameters() if p.ndim > 1) == _num_weights(unet.config)
    if saved:
        with tempfile.TemporaryDirectory() as folder:
            unet.save_pretrained(folder)
            loaded = MNISTUNet2DModel.from_pretrained(folder, torch_dtype=dtype, disable_mmap=True)
        assert {k: v for k, v in loaded.config.items() if k[0] != "_"} == {
            k: v for k, v in unet.config.items() if k[0] != "_"
        }
        with torch.no_grad():
            torch.testing.assert_close(loaded(x, torch.tensor([0, 999])).sample, output, rtol=1e-4, atol=1e-4)
    return None


UNET = MNISTUNet2DModel(**DEFAULT).eval()
NO_IMAGES = [None, 1.0, [[0.0]], torch.zeros(1, 1, 8, 8).numpy(), torch.zeros(1, 1, 8, 8, dtype=torch.int64)]
NO_IMAGES += [torch.zeros(1, 1, 8, 8, dtype=torch.complex64), torch.zeros(8, 8), torch.zeros(1, 2, 8, 8)]
NO_IMAGES += [torch.zeros(1, 1, 7, 8), torch.tensor(1.0)]
NO_TIMES = [None, "1", [1], math.nan, math.inf, 1j, True, torch.zeros(2), torch.zeros(1, 1)]


@searched(
    30,
    batch=st.integers(1, 3),
    size=st.sampled_from([4, 8, 10]),
    timestep=st.integers(0, 999) | st.floats(0, 999) | st.integers(0, 999).map(torch.tensor),
    wrong=half(
        st.sampled_from(NO_IMAGES).map(lambda x: {"sample": x})
        | st.sampled_from(NO_TIMES).map(lambda t: {"timestep": t})
    ),
    examples=[
        {"batch": 1, "size": 8, "timestep": 0, "wrong": wrong}
        for wrong in ({"timestep": math.nan}, {"timestep": "1"}, {"sample": NO_IMAGES[4]}, {"sample": None})
    ]
    + [{"batch": 1, "size": 2, "timestep": 0, "wrong": None}],
)
def test_a_call_predicts_or_is_refused(batch, size, timestep, wrong):
    wrong = wrong or {}
    call = {"sample": torch.zeros(batch, 1, size, size), "timestep": timestep} | wrong
    if batch == 2 and isinstance(wrong.get("timestep"), torch.Tensor) and wrong["timestep"].shape == (2,):
        wrong = {}  # one for each
    names = set(wrong) | ({"norm_num_groups"} if size == 2 and "sample" not in wrong else set())  # a value in a group
    with torch.no_grad():
        output, named = attempt(lambda: UNET(**call), names)
    if named:
        return named
    assert output.sample.shape == (batch, 1, size, size)
    assert output.sample.isfinite().all()
    return None


@pytest.mark.parametrize("name", ["UNet2DModel", "UNet2DConditionModel", ["unet", "Other"], 5, None])
def test_the_config_of_another_model_is_refused(name):
    with pytest.raises(ValueError, match="_class_name of the config must be MNISTUNet2DModel"):
        MNISTUNet2DModel.from_config({"_class_name": name, "sample_size": 8})
