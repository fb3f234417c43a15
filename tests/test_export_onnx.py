"""examples/export_onnx.py: the file gives PyTorch's outputs for any batch size, or there is no file."""

import numpy as np
import pytest
import torch

from mnist_ddpm import MNISTDDPMPipeline, MNISTDDPMScheduler, MNISTUNet2DModel

for package in ("onnx", "onnxruntime", "onnxscript"):
    pytest.importorskip(package, reason="needs pip install -e '.[onnx]'")

import export_onnx
import onnx
import onnxruntime


def random_unet(**config):
    """A small U-Net whose layers all have an effect."""
    unet = MNISTUNet2DModel(sample_size=8, block_out_channels=(8, 16), **config).eval()
    generator = torch.Generator().manual_seed(0)
    for parameter in unet.parameters():
        torch.nn.init.normal_(parameter, std=0.2, generator=generator)
    return unet


def run(content, **inputs):
    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
    assert [value.name for value in session.get_inputs()] == list(inputs)
    (out_sample,) = session.run(["out_sample"], {name: value.numpy() for name, value in inputs.items()})
    return torch.from_numpy(out_sample)


@pytest.mark.parametrize(
    ("config", "opset"),
    [({}, 18), ({"num_class_embeds": 3, "fourier_frequencies": (3, 4), "in_channels": 2, "out_channels": 4}, 20)],
    ids=["plain", "classes, Fourier features, learned variance"],
)
@torch.no_grad()
def test_equals_pytorch_for_any_batch_size(config, opset):
    unet = random_unet(**config)
    content, error = export_onnx.export(unet, opset=opset)
    assert error < 1e-5
    assert [(entry.domain, entry.version) for entry in onnx.load_from_string(content).opset_import] == [("", opset)]
    for batch_size in (1, 3, 7):
        x_t = torch.randn(batch_size, config.get("in_channels", 1), 8, 8)
        inputs = {"sample": x_t, "timestep": torch.linspace(0, 999, batch_size)}
        if "num_class_embeds" in config:
            inputs["class_labels"] = torch.arange(batch_size) % 4  # 3: no label
        torch.testing.assert_close(run(content, **inputs), unet(**inputs).sample, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_float16_weights():
    unet = random_unet()
    full, _ = export_onnx.export(unet)
    half, error = export_onnx.export(unet, "float16")  # rounds the weights of `unet`
    assert 1e-5 < error < 1e-2
    weights = sum(parameter.numel() for parameter in unet.parameters())
    types = {t.data_type: 0 for t in onnx.load_from_string(half).graph.initializer}
    for tensor in onnx.load_from_string(half).graph.initializer:
        types[tensor.data_type] += int(np.prod(tensor.dims))
    assert types[onnx.TensorProto.FLOAT16] >= weights
    assert types.get(onnx.TensorProto.FLOAT, 0) < 100  # the frequencies of the sinusoids are not rounded
    assert len(half) < len(full) - weights
    inputs = {"sample": torch.randn(2, 1, 8, 8), "timestep": torch.tensor([999.0, 3.0])}
    torch.testing.assert_close(run(half, **inputs), unet(**inputs).sample, atol=1e-5, rtol=1e-5)


def test_refuses_weights_that_float16_does_not_hold():
    unet = random_unet()
    unet.conv_in.weight.data[0, 0, 0, 0] = 1e6
    with pytest.raises(ValueError, match="dtype"):
        export_onnx.export(unet, "float16")


def test_command_line(tmp_path):
    MNISTDDPMPipeline(random_unet(), MNISTDDPMScheduler()).save_pretrained(tmp_path / "pipeline")
    output = tmp_path / "new" / "unet.onnx"
    export_onnx.main(export_onnx.parse_args(["--model", str(tmp_path / "pipeline"), "--output", str(output)]))
    content = output.read_bytes()
    assert str(export_onnx.__file__).encode() not in content  # no paths of this machine
    onnx.checker.check_model(onnx.load_from_string(content), full_check=True)

    with pytest.raises(ValueError, match="model"):
        export_onnx.main(export_onnx.parse_args(["--model", str(tmp_path / "none"), "--output", str(output)]))
