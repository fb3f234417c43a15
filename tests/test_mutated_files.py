"""Saved pipelines with one file changed: loaded with the same meaning, or refused by an error that names it.

Nothing that a file names is executed, and nothing is allocated that only a file asks for.
"""

import json
import math
import shutil
import struct
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import strategies as st
from safetensors import SafetensorError
from strategies import bounded, half, searched

from mnist_ddpm import (
    MNISTDDIMScheduler,
    MNISTDDPMPipeline,
    MNISTDDPMScheduler,
    MNISTUNet2DModel,
    pipeline,
    schedulers,
    unet,
)

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
        for path in (INDEX, SCHEDULER, UNET, WEIGHTS):
            shutil.copyfile(saved / path, folder / path)
        (folder / name).write_bytes(content)
        return folder

    return change


def meaning(pipe):
    """What a pipeline computes, and what it is configured as."""
    with torch.no_grad():
        output = pipe.unet.eval()(X, 7).sample
    # what has no effect on numbers (paths, versions, and names of other files) is left out
    configs = [{k: v for k, v in part.config.items() if k[0] != "_"} for part in (pipe.unet, pipe.scheduler)]
    return output, pipe.scheduler.alphas_cumprod, configs


def load(folder):
    """Load a pipeline, or name the file or argument that is refused."""
    try:
        return MNISTDDPMPipeline.from_pretrained(folder, disable_mmap=True), None
    except (ValueError, TypeError, OSError, SafetensorError) as error:
        return None, f"{type(error).__name__}: {error}"


# JSON ----------------------------------------------------------------------------------------------------------------

SCALARS = st.sampled_from(
    [None, True, False, 0, -1, 1, 2, 3, 0.5, 1e300, 10**12, 10**400, math.nan, math.inf, "", "1", "../x"]
)
VALUES = st.one_of(
    SCALARS, st.lists(SCALARS, max_size=3), st.dictionaries(st.sampled_from(["a", "b"]), SCALARS, max_size=2)
)
OPERATIONS = st.sampled_from(["replace", "delete", "add", "twice", "truncate", "raw"])
RAW = [
    b"",
    b"[]",
    b"7",
    b"null",
    b'"x"',
    b"{",
    b"\xff\xfe{}",
    b"[" * 200_000,
    b'{"a": ' * 100_000,
    b'{"a": 1' + b"0" * 5000 + b"}",
]
RAW += [b'{"sample_size": ' + b" " * 6_000_000 + b"4}", b"\0" * 100, b"version https://git-lfs.github.com/spec/v1\n"]


def mutated(text, operation, position, value):
    """The text of a JSON file with one thing changed, and the key that it is about."""
    content = json.loads(text)
    keys = sorted(content)
    key = keys[position % len(keys)]
    match operation:
        case "replace":
            return json.dumps(content | {key: value}), key
        case "delete":
            return json.dumps({k: v for k, v in content.items() if k != key}), key
        case "add":
            return json.dumps(content | {"other_key": value}), "other_key"
        case "twice":
            return text.rstrip()[:-1] + f", {json.dumps(key)}: {json.dumps(value)}}}", key
        case "truncate":
            return text[: position % (len(text.rstrip()) - 1)], None
        case "raw":
            return RAW[position % len(RAW)].decode("latin-1"), None


@searched(
    60,
    least_accepted=0,
    name=st.sampled_from([INDEX, SCHEDULER, UNET]),
    operation=OPERATIONS,
    position=st.integers(0, 2000),
    value=VALUES,
    examples=[
        *(
            {"name": name, "operation": "raw", "position": i, "value": None}
            for name in (INDEX, UNET)
            for i in range(len(RAW))
        ),
        *({"name": UNET, "operation": "replace", "position": i, "value": [10**9]} for i in range(14)),
        *({"name": SCHEDULER, "operation": "replace", "position": i, "value": 10**12} for i in range(17)),
    ],
)
def test_a_changed_config_keeps_its_meaning_or_is_refused(saved, changed, name, operation, position, value):
    text, key = mutated((saved / name).read_text(), operation, position, value)
    folder = changed(name, text.encode("latin-1"))
    pipe, refusal = load(folder)
    if refusal:
        words = {str(folder / name), Path(name).name, key or name}
        # what one value of a config leads to may be said of another
        words |= {INDEX: set(), SCHEDULER: {"betas"}, UNET: {*json.loads((saved / UNET).read_text()), "weights"}}[name]
        assert any(word in refusal for word in words), refusal
        return key or "file"
    # what was loaded is what Python's JSON and the constructors make of the file
    assert operation in ("replace", "delete", "add")
    kept = json.loads((folder / name).read_text())
    output, alpha_bar, configs = meaning(pipe)
    assert output.isfinite().all()
    assert alpha_bar.isfinite().all()
    config = {UNET: configs[0], SCHEDULER: configs[1]}.get(name, {})
    for other, expected in kept.items():
        if other in config and not (other == "num_train_timesteps" and config.get("trained_betas")):
            found = list(config[other]) if isinstance(config[other], tuple) else config[other]
            assert found == expected or expected is None, other
    return None


# Configs of others ---------------------------------------------------------------------------------------------------

STABLE_DIFFUSION = {
    "_class_name": "StableDiffusionPipeline",
    "_diffusers_version": "0.6.0",
    "feature_extractor": ["transformers", "CLIPImageProcessor"],
    "scheduler": ["diffusers", "PNDMScheduler"],
    "text_encoder": ["transformers", "CLIPTextModel"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "unet": ["diffusers", "UNet2DConditionModel"],
    "vae": ["diffusers", "AutoencoderKL"],
}
CONDITIONAL_UNET = {
    "_class_name": "UNet2DConditionModel",
    "act_fn": "silu",
    "attention_head_dim": 8,
    "block_out_channels": [320, 640, 1280, 1280],
    "cross_attention_dim": 768,
    "down_block_types": ["CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"],
    "in_channels": 4,
    "layers_per_block": 2,
    "norm_num_groups": 32,
    "out_channels": 4,
    "sample_size": 64,
}


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (INDEX, STABLE_DIFFUSION, "model_index.json: `feature_extractor` is no part of a MNISTDDPMPipeline"),
        (
            UNET,
            CONDITIONAL_UNET,
            "_class_name of the config must be MNISTUNet2DModel, but it is 'UNet2DConditionModel'",
        ),
        (UNET, CONDITIONAL_UNET | {"_class_name": "MNISTUNet2DModel"}, "down_block_types must be 4 of"),
        (SCHEDULER, CONDITIONAL_UNET, "config must be of a scheduler with a beta_schedule"),
        (
            SCHEDULER,
            {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0},
            "of a scheduler with a beta_schedule",
        ),
        (UNET, {"_class_name": "MNISTUNet2DModel", **CONFIG, "layers_per_block": 2}, "lacks weights"),
        (SCHEDULER, {"num_train_timesteps": 10**12}, "num_train_timesteps must be a number from 1 to 100000"),
        (
            UNET,
            {"_class_name": "MNISTUNet2DModel", **CONFIG, "block_out_channels": [10**9]},
            "block_out_channels, .* at most 1e",
        ),
        (
            UNET,
            {"_class_name": "MNISTUNet2DModel", **CONFIG, "sample_size": 10**12},
            "sample_size must be .* at most 4096",
        ),
    ],
)
def test_configs_of_others_and_sizes_beyond_measure_are_refused(changed, name, content, message):
    with bounded(), pytest.raises((ValueError, OSError), match=message):
        MNISTDDPMPipeline.from_pretrained(changed(name, json.dumps(content).encode()))


def test_a_repository_with_more_weights_than_its_config_is_refused(saved, changed, tmp_path):
    """With a level or a block less in the config, the rest of the weights would be another model's."""
    torch.manual_seed(0)
    MNISTUNet2DModel(**CONFIG, layers_per_block=2).save_pretrained(tmp_path)
    folder = changed(WEIGHTS, (tmp_path / "diffusion_pytorch_model.safetensors").read_bytes())
    with pytest.raises(ValueError, match=r"has weights too many: \d+, 'down_blocks.0.1"):
        MNISTDDPMPipeline.from_pretrained(folder)


# Code ----------------------------------------------------------------------------------------------------------------

ENTRIES = [
    ["canary", "Canary"],
    ["../canary", "Canary"],
    ["unet.canary", "Canary"],
    ["os", "system"],
    ["subprocess", "Popen"],
    ["builtins", "eval"],
    ["antigravity", "fly"],
    ["transformers", "CLIPTextModel"],
    ["diffusers", "AutoModel"],
    ["diffusers", "__version__"],
    ["diffusers.utils", "logging"],
    ["mnist_ddpm", "PRETRAINED"],
    ["mnist_ddpm.data", "load_split"],
    ["", ""],
    ["..", "x"],
]


@pytest.mark.parametrize("name", ["unet", "scheduler", "_class_name"])
@pytest.mark.parametrize("entry", ENTRIES, ids=".".join)
def test_no_code_is_run_that_an_index_names(saved, changed, monkeypatch, name, entry):
    """Neither of a module that could be imported, nor of a file in or beside the folder."""
    index = json.loads((saved / INDEX).read_text()) | {name: entry}
    folder = changed(INDEX, json.dumps(index).encode())
    trace = folder.parent / "trace"
    canary = f"open({str(trace)!r}, 'w').close()\nclass Canary: pass\n"
    for place in (folder, folder / "unet", folder / "scheduler", folder.parent):
        (place / "canary.py").write_text(canary)
    monkeypatch.syspath_prepend(folder)
    before = set(sys.modules)
    with pytest.raises((ValueError, OSError), match=r"model_index.json: |trust_remote_code"):
        MNISTDDPMPipeline.from_pretrained(folder)
    assert not trace.exists()
    assert not {"canary", "antigravity"} & (set(sys.modules) - before)


@pytest.mark.parametrize("name", ["../outside", "/etc/passwd", ".."])
def test_components_outside_of_the_folder_are_refused(saved, changed, name):
    index = json.loads((saved / INDEX).read_text()) | {name: ["diffusers", "UNet2DModel"]}
    with pytest.raises(ValueError, match=r"model_index.json: `.*` is no part of a MNISTDDPMPipeline"):
        MNISTDDPMPipeline.from_pretrained(changed(INDEX, json.dumps(index).encode()))


# Weights -------------------------------------------------------------------------------------------------------------

HUGE = st.sampled_from([0, -1, 1, 3, 2**31, 2**60, 2**63, 2**64 - 1, 10**30, "8", None, [], 1.5])
CHANGES = ["length", "truncate", "shape", "dtype", "data_offsets", "rename", "garbage"]


def with_header(data, change, position, value):
    """A safetensors file with one thing changed in its header."""
    (length,) = struct.unpack("<Q", data[:8])
    header, rest = json.loads(data[8 : 8 + length]), data[8 + length :]
    names = sorted(name for name in header if name != "__metadata__")
    entry = header[names[position % len(names)]]
    match change:
        case "length":
            number = value if isinstance(value, int) and 0 <= value < 2**64 else length + 1
            return struct.pack("<Q", number) + data[8:]
        case "truncate":
            return data[: position * len(data) // 1000]
        case "garbage":
            return data[:8] + bytes(position % 256 for _ in range(length)) + rest
        case "shape":
            entry["shape"] = [value] * (1 + position % 3) if value != [] else []
        case "dtype":
            entry["dtype"] = ["F64", "I32", "BOOL", "F4", "X", 5, None, "U32"][position % 8]
        case "data_offsets":
            entry["data_offsets"] = [value, entry["data_offsets"][1]][:: 1 if position % 2 else -1]
        case "rename":
            header[str(value)] = header.pop(names[position % len(names)])
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + rest


@searched(
    40,
    least_accepted=0,
    change=st.sampled_from(CHANGES),
    position=st.integers(0, 999),
    value=HUGE,
    control=half(st.just(True)),
    examples=[
        {"change": "length", "position": 0, "value": 2**60, "control": None},
        {"change": "shape", "position": 2, "value": 2**31, "control": None},
        {"change": "data_offsets", "position": 0, "value": 2**63, "control": None},
        {"change": "truncate", "position": 0, "value": 0, "control": None},
        {"change": "dtype", "position": 1, "value": 0, "control": None},
    ],
)
def test_changed_weights_are_refused(saved, changed, change, position, value, control):
    data = (saved / WEIGHTS).read_bytes()
    pipe, refusal = load(changed(WEIGHTS, data if control else with_header(data, change, position, value)))
    if not refusal:
        original, _ = load(saved)
        torch.testing.assert_close(meaning(pipe)[0], meaning(original)[0])  # a shape of 1 may stand for itself
        return None
    assert not control
    assert "diffusion_pytorch_model.safetensors" in refusal or "weights" in refusal or "shape" in refusal, refusal
    return change


def test_the_reader_of_configs_is_the_same_in_each_file():
    texts = [Path(module.__file__).read_text() for module in (pipeline, schedulers, unet)]
    assert len({text.partition("def read_config(")[2].partition("return config\n")[0] for text in texts}) == 1
    assert all("def read_config(" in text for text in texts)
    assert len({module.MAX_CONFIG_BYTES for module in (pipeline, schedulers, unet)}) == 1


@pytest.mark.parametrize("load_part", [MNISTDDPMScheduler, MNISTDDIMScheduler, MNISTUNet2DModel])
@pytest.mark.parametrize("raw", [b"{", b"[]", b'{"a": 1, "a": 2}', b"[" * 100_000])
def test_parts_by_themselves_refuse_what_is_no_config(changed, load_part, raw):
    part = UNET if load_part is MNISTUNet2DModel else SCHEDULER
    folder = Path(changed(part, raw))
    with pytest.raises(OSError, match=rf"{folder / part} is not a valid JSON file of a config"):
        load_part.from_pretrained(folder, subfolder=part.partition("/")[0])
