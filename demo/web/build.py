"""Build the page: export the models, write what JavaScript needs of their schedulers, and copy page and WebAssembly.

The folder can be served by any static host: no headers are needed, and no request goes to another host.
"""

import argparse
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import mnist_ddpm
from mnist_ddpm.sampling import load_pipeline

HERE = Path(__file__).parent
PAGE = ("index.html", "style.css", "app.js", "ddim.js", "model.js", "noise.js", "worker.js")
ONNXRUNTIME = HERE / "node_modules" / "onnxruntime-web"
WASM = ("ort.wasm.bundle.min.mjs", "ort-wasm-simd-threaded.wasm")  # the smallest: CPU only
STEPS = (2, 5, 10, 20, 50)


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=Path("site"), help="Default: %(default)s.")
    parser.add_argument(
        "--model",
        default=mnist_ddpm.PRETRAINED_CONDITIONAL,
        help="Folder or Hub id of a saved pipeline; by default the one with classes in the package.",
    )
    parser.add_argument(
        "--few_step_model",
        default=mnist_ddpm.PRETRAINED_FEW_STEP,
        help="Folder or Hub id of a pipeline that samples in 1 step; by default the one in the package.",
    )
    return parser.parse_args(argv)


def describe(pipe: Any, steps: tuple[int, ...], **entries: Any) -> dict[str, Any]:
    """An entry of models.json: what ddim.js reads of a pipeline's DDIM scheduler, and the page of its U-Net.

    Raises:
        ValueError: If the page can't sample the pipeline.
    """
    config, scheduler = pipe.unet.config, pipe.scheduler
    if config.in_channels != 1 or config.out_channels != 1 or scheduler.config.thresholding:
        got = f"got {config.in_channels}, {config.out_channels} and thresholding={scheduler.config.thresholding}"
        raise ValueError(f"model must have 1 channel in and out and no thresholding, {got}.")
    size = config.sample_size
    classes = config.get("num_class_embeds") or 0
    names = pipe.config.get("id2label") or {}
    timesteps = {}
    for n in steps:
        scheduler.set_timesteps(n)
        timesteps[n] = scheduler.timesteps.tolist()
    return {
        **entries,
        "shape": [1, *([size, size] if isinstance(size, int) else size)],
        "classes": [str(names.get(i, i)) for i in range(classes)],
        "prediction_type": scheduler.config.prediction_type,
        "clip": scheduler.config.clip_sample_range if scheduler.config.clip_sample else None,
        "alphas_cumprod": scheduler.alphas_cumprod.tolist(),
        "final_alpha_cumprod": scheduler.final_alpha_cumprod.item(),
        "timesteps": timesteps,
    }


def main(args: argparse.Namespace) -> None:
    """Build by the command line."""
    lock = json.loads((HERE / "package-lock.json").read_text(encoding="utf-8"))
    wanted = lock["packages"]["node_modules/onnxruntime-web"]["version"]
    installed = ONNXRUNTIME / "package.json"
    if not installed.exists() or json.loads(installed.read_text(encoding="utf-8"))["version"] != wanted:
        subprocess.run(["npm", "ci", "--ignore-scripts", "--no-audit", "--no-fund"], cwd=HERE, check=True)

    (args.output_dir / "ort").mkdir(parents=True, exist_ok=True)
    entries = []
    models = ((args.few_step_model, (1,), "few_step.onnx"), (args.model, STEPS, "unet.onnx"))
    for model, steps, file in models:  # the first draws at once
        pipe = load_pipeline(model, device="cpu")
        if steps == (1,):
            pipe.scheduler.config.timestep_spacing = "trailing"  # LCM's first timestep is T - 1 too
        entries.append(describe(pipe, steps, file=file))
        export = [sys.executable, HERE.parents[1] / "examples" / "export_onnx.py", "--dtype", "float16"]
        subprocess.run([*export, "--model", str(model), "--output", args.output_dir / file], check=True)

    (args.output_dir / "models.json").write_text(json.dumps(entries), encoding="utf-8")
    for name in PAGE:
        shutil.copyfile(HERE / name, args.output_dir / name)
    for name in WASM:
        shutil.copyfile(ONNXRUNTIME / "dist" / name, args.output_dir / "ort" / name)
    print(f"python -m http.server --directory {args.output_dir}")


if __name__ == "__main__":
    try:
        main(parse_args())
    except (ValueError, OSError) as error:
        sys.exit(f"error: {' '.join(str(error).split())}")
    except subprocess.CalledProcessError as error:
        sys.exit(error.returncode)
