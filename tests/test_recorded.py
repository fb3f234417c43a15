"""Outputs recorded before the code was rearranged, at commit d38702a: a change that means to alter none must not.

`python tests/test_recorded.py` records them anew, for a change that means to.
"""

import json
import os
from pathlib import Path

import diffusers
import pytest
import torch
from safetensors.torch import load_file, save_file

from mnist_ddpm import MNISTDDIMScheduler, MNISTDDPMPipeline, MNISTDDPMScheduler
from mnist_ddpm.training import Trainer, TrainingArguments

HERE = Path(__file__).resolve().parent
SAVED, RECORDED = HERE / "saved-by-0.1.0", HERE / "recorded"
# the learning rate reaches its peak after 500 steps: in 20, kernels of other processors change losses by some 1e-6
TRAINING = {"max_train_steps": 20, "train_batch_size": 32, "optimizer": "adamw", "timestep_sampling": "uniform"}
TRAINING |= {"mixed_precision": "no", "compile": False, "logger": "none", "save_images_steps": 0}
TRAINING |= {"eval_batch_size": 1, "ddpm_num_inference_steps": 1, "lr_warmup_steps": 500}
TRAINING |= {"model_config_name_or_path": str(RECORDED / "unet")}  # that of 0.1.0, without `pixel_gain`
SCHEDULERS = {
    "ddpm": (MNISTDDPMScheduler, {}),
    "ddpm, fixed_large": (MNISTDDPMScheduler, {"variance_type": "fixed_large"}),
    "ddim": (MNISTDDIMScheduler, {}),
    "ddim, no clipping": (MNISTDDIMScheduler, {"clip_sample": False}),
    "dpm-solver": (diffusers.DPMSolverMultistepScheduler, {}),
    "euler": (diffusers.EulerDiscreteScheduler, {}),
    "unipc": (diffusers.UniPCMultistepScheduler, {}),
}


def draw(scheduler: str, folder: Path = SAVED) -> torch.Tensor:
    """Images of the pipeline that version 0.1.0 saved, through a scheduler."""
    pipe = MNISTDDPMPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    scheduler_class, changes = SCHEDULERS[scheduler]
    pipe.scheduler = scheduler_class.from_config(pipe.scheduler.config, **changes)
    options = {"eta": 0.5} if scheduler == "ddim" else {}
    generator = torch.Generator().manual_seed(0)
    return pipe(4, generator=generator, num_inference_steps=7, output_type="pt", **options).images


def train(output_dir: Path) -> list[dict[str, float]]:
    """The log of a training of 20 steps on one thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        Trainer(TrainingArguments(**TRAINING, output_dir=str(output_dir))).train()
    finally:
        torch.set_num_threads(threads)
    return [json.loads(line) for line in (output_dir / "train_log.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_samples_are_as_recorded(scheduler):
    torch.testing.assert_close(
        draw(scheduler), load_file(RECORDED / "samples.safetensors")[scheduler], rtol=0, atol=1e-5
    )


def test_training_is_as_recorded(tmp_path):
    for log, recorded in zip(train(tmp_path), json.loads((RECORDED / "training.json").read_text()), strict=True):
        assert log == pytest.approx(recorded, rel=1e-4)


if __name__ == "__main__":
    import tempfile

    RECORDED.mkdir(exist_ok=True)
    save_file({scheduler: draw(scheduler) for scheduler in SCHEDULERS}, RECORDED / "samples.safetensors")
    with tempfile.TemporaryDirectory() as folder:
        os.environ.setdefault("HF_HOME", folder)
        log = train(Path(folder, "run"))
    (RECORDED / "training.json").write_text("[\n" + ",\n".join(map(json.dumps, log)) + "\n]\n")
