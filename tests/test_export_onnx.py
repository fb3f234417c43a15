"""examples/export_onnx.py: the file gives PyTorch's outputs for any batch size, or there is no file."""

import export_onnx
import numpy as np
import pytest
import torch

from mnist_ddpm import MNISTDDPMPipeline, MNISTDDPMScheduler, MNISTUNet2DModel

onnx = pytest.importorskip("onnx", reason="needs pip install -e '.[onnx]'")
onnxruntime = pytest.importorskip("onnxruntime", reason="needs pip install -e '.[onnx]'")
pytest.importorskip("onnxscript", reason="needs pip install -e '.[onnx]'")


def random_unet(**config):
    """A small U-Net whose layers all have an effect."""
    unet = MNISTUNet2DModel(sample_size=8, block_out_channels=(8, 16), **config).eval()
    generator = torch.Generator().manual_seed(0)
    for parameter in unet.parameters():
        torch.nn.init.normal_(parameter, std=0.2, generator=generator)
    return unet


def assert_equals_pytorch(content, unet):
    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
    for batch_size in (1, 3, 7):
        x_t = torch.randn(batch_size, unet.config.in_channels, 8, 8)
        inputs = {"sample": x_t, "timestep": torch.linspace(0, 999, batch_size)}
        if unet.config.num_class_embeds:
            inputs["class_labels"] = torch.arange(batch_size) % 4  # 3: no label
        (out_sample,) = session.run(["out_sample"], {name: value.numpy() for name, value in inputs.items()})
        with torch.no_grad():
            torch.testing.assert_close(torch.from_numpy(out_sample), unet(**inputs).sample, atol=1e-5, rtol=1e-5)


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """A saved pipeline's U-Net, and the file that the command line makes of it."""
    folder = tmp_path_factory.mktemp("exported")
    unet, output = random_unet(), folder / "new" / "unet.onnx"
    MNISTDDPMPipeline(unet, MNISTDDPMScheduler()).save_pretrained(folder / "pipeline")
    export_onnx.main(export_onnx.parse_args(["--model", str(folder / "pipeline"), "--output", str(output)]))
    return unet, output.read_bytes()


def test_equals_pytorch_for_any_batch_size(exported):
    unet, content = exported
    assert_equals_pytorch(content, unet)


def test_the_file_is_valid_and_holds_no_paths(exported):
    _, content = exported
    model = onnx.load_from_string(content)
    onnx.checker.check_model(model, full_check=True)
    assert [(entry.domain, entry.version) for entry in model.opset_import] == [("", 18)]
    assert b".py" not in content


def test_float16_weights_with_classes():
    unet = random_unet(num_class_embeds=3, fourier_frequencies=(3, 4), in_channels=2, out_channels=4)
    content, error = export_onnx.export(unet, "float16", opset=20)  # rounds the weights of `unet`
    assert 1e-5 < error < 1e-2
    assert_equals_pytorch(content, unet)
    model, count = onnx.load_from_string(content), {}
    assert model.opset_import[0].version == 20
    for tensor in model.graph.initializer:
        count[tensor.data_type] = count.get(tensor.data_type, 0) + int(np.prod(tensor.dims))
    assert count[onnx.TensorProto.FLOAT16] >= sum(parameter.numel() for parameter in unet.parameters())
    assert count.get(onnx.TensorProto.FLOAT, 0) <= 8  # the frequencies of the sinusoids, of 8 channels, aren't rounded


def test_refuses_a_file_that_differs_from_pytorch(exported, monkeypatch):
    unet, content = exported
    monkeypatch.setattr(export_onnx, "to_onnx", lambda unet, opset: onnx.load_from_string(content))
    _, error = export_onnx.export(unet)
    assert error < 1e-5
    for change in (0.1, float("nan")):
        other = random_unet()
        other.conv_in.bias.data[0] += change
        with pytest.raises(ValueError, match="dtype"):
            export_onnx.export(other)


def test_no_file_without_a_model(tmp_path):
    output = tmp_path / "unet.onnx"
    with pytest.raises(ValueError, match="model"):
        export_onnx.main(export_onnx.parse_args(["--model", str(tmp_path / "none"), "--output", str(output)]))
    assert not output.exists()
