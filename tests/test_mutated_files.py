"""Saved pipelines with one file changed: they load and give finite numbers, or an error; nothing they name is run."""

import contextlib
import json
import shutil
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mnist_ddpm import MNISTDDPMPipeline, MNISTDDPMScheduler, MNISTUNet2DModel

INDEX, SCHEDULER, UNET = "model_index.json", "scheduler/scheduler_config.json", "unet/config.json"
WEIGHTS = "unet/diffusion_pytorch_model.safetensors"
CONFIG = {"sample_size": 4, "block_out_channels": (8,), "down_block_types": ("DownBlock2D",), "attention_head_dim": 8}
X = torch.linspace(-1, 1, 16).view(1, 1, 4, 4)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """The folder of a saved pipeline."""
    torch.manual_seed(0)
    unet = MNISTUNet2DModel(**CONFIG, layers_per_block=1)
    for weight in unet.parameters():
        torch.nn.init.normal_(weight, std=0.1)
    folder = tmp_path_factory.mktemp("saved")
    MNISTDDPMPipeline(unet=unet, scheduler=MNISTDDPMScheduler(num_train_timesteps=20)).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def changed(saved, tmp_path_factory):
    """A copy of it, with one file changed."""
    folder = tmp_path_factory.mktemp("changed") / "model"

    def change(name, content):
        shutil.copytree(saved, folder, dirs_exist_ok=True)
        (folder / name).write_bytes(content)
        return folder

    return change


def prediction(pipe):
    """What the U-Net of a pipeline predicts."""
    with torch.no_grad():
        return pipe.unet.eval()(X, 7).sample


@settings(max_examples=30, derandomize=True, deadline=None, database=None)
@given(
    name=st.sampled_from([SCHEDULER, UNET]),
    position=st.integers(0, 30),
    value=st.sampled_from([None, True, 0, -1, 2, 0.5, 1e300, "", "../x", [], [0], {"a": 1}]),
)
def test_a_changed_config_gives_numbers_or_an_error(saved, changed, name, position, value):
    content = json.loads((saved / name).read_text(encoding="utf-8"))
    key = sorted(content)[position % len(content)]
    folder = changed(name, json.dumps(content | {key: value}).encode())
    try:
        pipe = MNISTDDPMPipeline.from_pretrained(folder)
        output = prediction(pipe)
    except Exception:
        return
    assert output.isfinite().all()
    assert pipe.scheduler.alphas_cumprod.isfinite().all()


def test_a_repository_with_more_weights_than_its_config_is_rejected(changed, tmp_path):
    """With a block less in the config, the other weights would be another model's."""
    MNISTUNet2DModel(**CONFIG, layers_per_block=2).save_pretrained(tmp_path)
    folder = changed(WEIGHTS, (tmp_path / "diffusion_pytorch_model.safetensors").read_bytes())
    with pytest.raises(ValueError, match="weights"):
        MNISTDDPMPipeline.from_pretrained(folder)


def test_a_repository_with_fewer_weights_than_its_config_is_rejected(saved, changed):
    config = json.loads((saved / UNET).read_text(encoding="utf-8")) | {"layers_per_block": 2}
    with pytest.raises(ValueError, match="weights"):
        MNISTDDPMPipeline.from_pretrained(changed(UNET, json.dumps(config).encode()))


ENTRIES = [
    ["canary", "Canary"],
    ["../canary", "Canary"],
    ["os", "system"],
    ["builtins", "eval"],
    ["antigravity", "fly"],
    ["mnist_ddpm.data", "load_split"],
]


@pytest.mark.parametrize("name", ["unet", "scheduler", "_class_name"])
@pytest.mark.parametrize("entry", ENTRIES, ids=".".join)
def test_no_code_is_run_that_an_index_names(saved, changed, monkeypatch, name, entry):
    """Neither of a module that could be imported, nor of a file in or beside the folder."""
    index = json.loads((saved / INDEX).read_text(encoding="utf-8")) | {name: entry}
    folder = changed(INDEX, json.dumps(index).encode())
    trace = folder.parent / "trace"
    canary = f"open({str(trace)!r}, 'w').close()\nclass Canary: pass\n"
    for place in (folder, folder / "unet", folder / "scheduler", folder.parent):
        (place / "canary.py").write_text(canary, encoding="utf-8")
    monkeypatch.syspath_prepend(folder)
    before = set(sys.modules)
    with contextlib.suppress(Exception):
        MNISTDDPMPipeline.from_pretrained(folder)
    assert not trace.exists()
    assert not {"canary", "antigravity"} & (set(sys.modules) - before)
