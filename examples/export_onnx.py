"""Export the U-Net of a saved pipeline to ONNX, and check the file against PyTorch.

    sample        float32 (batch, C, H, W)   x_t
    timestep      float32 (batch,)           t
    class_labels  int64 (batch,)             only where the U-Net has num_class_embeds, which stands for no label
    out_sample    float32 (batch, C, H, W)   the prediction: v, epsilon or x_0, as the scheduler's config says

With --dtype float16 the file holds its weights as float16 and casts them to float32 when it is loaded. It has half the
size; inputs, outputs and all that is computed stay float32. The weights in the package are float16 already.
"""

import argparse
import logging
import sys
import warnings
from pathlib import Path
from typing import Any

TOLERANCE = {"float32": 1e-4, "float16": 1e-2}  # absolute for outputs up to 1, relative for larger ones


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="Folder or Hub id of a saved pipeline; by default the one in the package.")
    parser.add_argument("--output", type=Path, default=Path("unet.onnx"), help="The file. Default: %(default)s.")
    parser.add_argument("--opset", type=int, default=18, help="Version of ONNX's operators. Default: %(default)s.")
    parser.add_argument("--dtype", choices=TOLERANCE, default="float32", help="Of the weights. Default: %(default)s.")
    return parser.parse_args(argv)


def inputs_of(unet: Any, batch_size: int) -> dict[str, Any]:
    """Inputs of the U-Net by name: noise, timesteps from 0 to 999, and a class for each image if it has classes."""
    import torch

    size, classes = unet.config.sample_size, unet.config.get("num_class_embeds")
    shape = (batch_size, unet.config.in_channels, *([size, size] if isinstance(size, int) else size))
    inputs = {
        "sample": torch.randn(shape, generator=torch.Generator().manual_seed(0)),
        "timestep": torch.linspace(999, 0, batch_size),
        "class_labels": torch.arange(batch_size) % (classes or 1),
    }
    return inputs if classes else {name: inputs[name] for name in ("sample", "timestep")}


def to_onnx(unet: Any, opset: int) -> Any:
    """The U-Net as an `onnx.ModelProto` whose batch size is free."""
    import torch

    class Prediction(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.unet = unet

        def forward(self, sample: Any, timestep: Any, class_labels: Any = None) -> Any:
            return self.unet(sample, timestep, class_labels).sample

    inputs = inputs_of(unet, 2)
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)  # it warns that torchvision isn't there
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        program = torch.export.export(
            Prediction().eval(),
            tuple(inputs.values()),
            dynamic_shapes=[{0: torch.export.Dim.AUTO}] * len(inputs),
            strict=True,  # without it, len(sample) would be a constant
        )
        names: Any = {"input_names": list(inputs), "output_names": ["out_sample"]}
        model = torch.onnx.export(program, opset_version=opset, verbose=False, **names).model_proto
    for value in (*model.graph.input, *model.graph.output):
        value.type.tensor_type.shape.dim[0].dim_param = "batch"
    for part in (model, model.graph, *model.graph.node, *model.graph.input, *model.graph.output):
        part.ClearField("metadata_props")  # paths and source lines of the machine that exported
    model.graph.ClearField("value_info")
    return model


def store_as_float16(model: Any) -> None:
    """Store as float16, with a cast in front, all constants that float16 holds exactly: those are the weights."""
    import numpy as np
    from onnx import TensorProto, helper, numpy_helper

    casts = []
    for constant in model.graph.initializer:
        name, values = constant.name, numpy_helper.to_array(constant)
        if values.dtype == np.float32 and (values.astype(np.float16) == values).all():
            constant.CopyFrom(numpy_helper.from_array(values.astype(np.float16), f"{name}.float16"))
            casts.append(helper.make_node("Cast", [f"{name}.float16"], [name], to=TensorProto.FLOAT))
    nodes = [*casts, *model.graph.node]
    model.graph.ClearField("node")
    model.graph.node.extend(nodes)


def export(unet: Any, dtype: str = "float32", opset: int = 18) -> tuple[bytes, float]:
    """Export a U-Net in float32, whose weights are rounded in place where `dtype` is float16.

    Returns:
        The content of the file, and how far its outputs are from PyTorch's before rounding.

    Raises:
        ValueError: If they are further away than `TOLERANCE`.
    """
    import onnxruntime
    import torch

    cases = [inputs_of(unet, batch_size) for batch_size in (1, 5)]
    with torch.no_grad():
        expected = [unet(**inputs).sample for inputs in cases]
    if dtype == "float16":
        unet.to(torch.float16).to(torch.float32)
    model = to_onnx(unet, opset)
    if dtype == "float16":
        store_as_float16(model)
    content = model.SerializeToString()
    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
    errors = []
    for inputs, wanted in zip(cases, expected, strict=True):
        (out_sample,) = session.run(None, {name: value.numpy() for name, value in inputs.items()})
        errors.append(((torch.from_numpy(out_sample) - wanted).abs() / wanted.abs().clamp(min=1)).max())
    error = torch.stack(errors).max().item()
    if not error <= TOLERANCE[dtype]:  # rejects NaN too
        raise ValueError(f"dtype must give PyTorch's outputs to {TOLERANCE[dtype]:g}, got {dtype} with {error:.1e}.")
    return content, error


def main(args: argparse.Namespace) -> None:
    """Export by the command line; the file is there whole and checked, or not at all."""
    from mnist_ddpm.cli import check_writable
    from mnist_ddpm.sampling import load_pipeline

    check_writable(args.output)
    content, error = export(load_pipeline(args.model, device="cpu").unet, args.dtype, args.opset)
    args.output.write_bytes(content)
    print(f"{args.output}: {len(content):,} bytes, opset {args.opset}, within {error:.1e} of PyTorch")


if __name__ == "__main__":
    try:
        main(parse_args())
    except ModuleNotFoundError as error:
        sys.exit(f"error: {error}. Install what is missing: pip install -e '.[onnx]'")
    except (ValueError, OSError, RuntimeError) as error:
        sys.exit(f"error: {' '.join(str(error).split())}")
