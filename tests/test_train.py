"""`examples/train.py`, from the flags to the saved pipeline, on a few small images."""

import itertools
import json
import math
import os
import signal
import subprocess
import sys
import threading
import time

import datasets
import numpy as np
import pytest
import torch
import train
from accelerate.state import AcceleratorState
from loopback_hub import READER, USER, WRITER
from PIL import Image
from safetensors.torch import load_file

from mnist_ddpm import MNISTDDPMPipeline, MNISTUNet2DModel
from mnist_ddpm.likelihood import log_snr_betas
from mnist_ddpm.sampling import load_pipeline
from mnist_ddpm.training.checkpoints import list_checkpoints

NUM_IMAGES = 24
UNET = {"block_out_channels": (4, 8), "attention_head_dim": 4, "layers_per_block": 1, "norm_num_groups": 2}


@pytest.fixture(scope="session")
def workplace(tmp_path_factory):
    """A folder with images in Parquet files, and with U-Net configs."""
    folder = tmp_path_factory.mktemp("train")
    pixels = np.random.default_rng(0).integers(0, 256, (NUM_IMAGES, 8, 8), dtype=np.uint8)
    images = [Image.fromarray(image) for image in pixels]
    rows = {"image": images, "picture": images, "label": [0] * NUM_IMAGES}
    features = datasets.Features(
        {"image": datasets.Image(), "picture": datasets.Image(), "label": datasets.Value("int64")}
    )
    images = datasets.Dataset.from_dict(rows, features)
    for split, count in (("train", NUM_IMAGES), ("test", 16)):
        images.select(range(count)).to_parquet(folder / "images" / f"{split}-00000-of-00001.parquet")
    for size in (4, 8):
        MNISTUNet2DModel(sample_size=size, **UNET).save_config(folder / f"unet-{size}")
    return folder


@pytest.fixture
def make_trainer(workplace, tmp_path):
    """A run with some flags, of six steps of four images unless they say otherwise."""

    def make_trainer(*flags, output_dir=tmp_path / "run"):
        from mnist_ddpm.training.trainer import Trainer

        AcceleratorState._reset_state(reset_partial_state=True)
        defaults = {
            "--dataset_name": workplace / "images",
            "--cache_dir": workplace / "cache",
            "--model_config_name_or_path": workplace / "unet-8",
            "--output_dir": output_dir,
            "--mixed_precision": "no",
            "--train_batch_size": 4,
            "--lr_warmup_steps": 2,
            "--eval_batch_size": 2,
            "--ddpm_num_inference_steps": 2,
            "--logger": "none",
        } | ({} if "--num_epochs" in flags else {"--max_train_steps": 6})
        argv = [*(part for default in defaults.items() for part in default), *flags]
        return Trainer(train.parse_args(list(map(str, argv))))

    return make_trainer


@pytest.fixture
def run(make_trainer):
    """Train with some flags, for six steps of four images unless they say otherwise; returns the output folder."""

    def run(*flags, **kwargs):
        trainer = make_trainer(*flags, **kwargs)
        trainer.train()
        return trainer.output_dir

    return run


def read_log(output_dir):
    return [json.loads(line) for line in (output_dir / "train_log.jsonl").read_text().splitlines()]


def losses(output_dir):
    return [record["loss"] for record in read_log(output_dir)]


def saved_weights(output_dir):
    return load_file(output_dir / "unet" / "diffusion_pytorch_model.safetensors")


def weights_at(output_dir, step):
    return load_file(output_dir / f"checkpoint-{step}" / "model.safetensors")


def equal(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def content(folder):
    """Every file in a folder, as bytes; but for the manifest, and the state of the global generators."""
    left_out = ("manifest.json", "random_states_0.pkl")
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name not in left_out}


def all_saved_numbers(output_dir):
    """Every number of the pipeline and of the checkpoints, by file."""
    for path in output_dir.rglob("*.safetensors"):
        for tensor in load_file(path).values():
            yield path, tensor
    for path in [*output_dir.rglob("*.bin"), *output_dir.rglob("custom_checkpoint_*.pkl")]:
        for value in torch.utils._pytree.tree_leaves(torch.load(path)):
            if isinstance(value, float | torch.Tensor):
                yield path, torch.as_tensor(value)


def names(folder):
    return sorted(path.name for path in folder.iterdir())


# What a run leaves


def test_a_run_leaves_a_pipeline_samples_a_log_and_a_checkpoint(run):
    output_dir = run()
    assert {"checkpoint-6", "samples", "samples.png", "train_log.jsonl"} < set(names(output_dir))
    assert not list(output_dir.rglob("*.partial"))
    pipeline = MNISTDDPMPipeline.from_pretrained(output_dir)
    images = pipeline(3, torch.Generator().manual_seed(0), num_inference_steps=2, output_type="np").images
    assert images.shape == (3, 8, 8, 1)
    records = read_log(output_dir)
    assert [record["step"] for record in records] == [1, 2, 3, 4, 5, 6]
    assert all(record["loss"] > 0 and record["grad_norm"] > 0 for record in records)


def test_the_loss_falls(run):
    flags = ["--prediction_type", "epsilon", "--lr_scheduler", "constant"]
    curve = losses(run(*flags, "--max_train_steps", 60, "--train_batch_size", 24))
    assert np.mean(curve[-10:]) < 0.8 * np.mean(curve[:10])


@pytest.mark.parametrize(("inv_gamma", "power", "max_decay"), [(1, 1, 0.9999), (2, 0.75, 0.9999), (1, 1, 0.3)])
def test_the_average_of_the_weights_is_saved(run, inv_gamma, power, max_decay):
    flags = ["--ema_inv_gamma", inv_gamma, "--ema_power", power, "--ema_max_decay", max_decay]
    output_dir = run(*flags, "--checkpointing_steps", 1, "--checkpoints_total_limit", 9)
    average = weights_at(output_dir, 1)
    for step in range(2, 7):  # with gamma = power = 1 this is the plain mean
        decay = min(1 - (1 + (step - 1) / inv_gamma) ** -power, max_decay)
        weights = weights_at(output_dir, step)
        average = {name: decay * average[name] + (1 - decay) * weights[name] for name in weights}
    torch.testing.assert_close(saved_weights(output_dir), average, rtol=1e-5, atol=1e-7)


def test_without_an_average_the_weights_are_saved(run):
    output_dir = run("--no-use_ema")
    assert equal(saved_weights(output_dir), weights_at(output_dir, 6))


def test_samples_come_at_the_ends_of_epochs_and_early_in_the_first(run):
    output_dir = run("--max_train_steps", 29, "--save_images_epochs", 2, "--save_images_steps", 1)
    expected = [1, 2, 4, 12, 24, 29]  # an epoch is 6 steps
    assert names(output_dir / "samples") == [f"step-{step:08}.png" for step in expected]
    assert (output_dir / "samples.png").read_bytes() == (output_dir / "samples" / "step-00000029.png").read_bytes()


def test_pipelines_on_the_way_are_kept_with_the_weights_of_their_step(run, tmp_path):
    """An epoch is 6 steps. At a constant learning rate a run of 12 steps is the beginning of one of 29."""
    flags = ["--lr_scheduler", "constant", "--save_images_steps", 0, "--save_images_epochs", 9]
    output_dir = run(*flags, "--max_train_steps", 29, "--keep_model_epochs", 2)
    assert names(output_dir / "pipelines") == ["step-00000012", "step-00000024"]
    short = run(*flags, "--max_train_steps", 12, "--output_dir", tmp_path / "short")
    kept = output_dir / "pipelines" / "step-00000012"
    assert equal(saved_weights(kept), saved_weights(short))
    assert not equal(saved_weights(kept), saved_weights(output_dir))
    assert MNISTDDPMPipeline.from_pretrained(kept).scheduler.config == (
        MNISTDDPMPipeline.from_pretrained(output_dir).scheduler.config
    )


def test_eval_batch_size_is_the_number_of_images_in_the_grid(run):
    with Image.open(run("--eval_batch_size", 5, "--max_train_steps", 1) / "samples.png") as grid:
        assert grid.size == (3 * 8, 2 * 8)
        pixels = np.asarray(grid)
    assert pixels[8:, :16].any()
    assert not pixels[8:, 16:].any(), "the sixth place is empty"


def test_epochs_are_as_many_steps_as_hold_all_their_images(run):
    assert len(losses(run("--num_epochs", 2, "--train_batch_size", 7))) == 7  # 48 images: 6 batches of 7, and 6 more


def test_tensorboard_gets_curves_and_samples(run):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    flags = ["--logger", "tensorboard", "--logging_dir", "curves", "--save_images_epochs", 5, "--save_images_steps", 3]
    output_dir = run(*flags, "--max_train_steps", 20, "--checkpointing_steps", 10, "--hub_token", "hf_secret")
    run(
        *flags,
        "--max_train_steps",
        30,
        "--resume_from_checkpoint",
        output_dir / "checkpoint-10",
        output_dir=output_dir,
    )
    events = EventAccumulator(str(output_dir / "curves" / "train"), size_guidance={"images": 0}).Reload()
    assert {"loss", "lr", "grad_norm", "images_per_second"} <= set(events.Tags()["scalars"])
    assert [event.step for event in events.Scalars("loss")] == [3, 10, 20, 30]
    assert [event.step for event in events.Images("samples")] == [3, 30], (
        "the one of step 20 went when step 10 came back"
    )
    assert events.Scalars("loss")[1].value == pytest.approx(np.mean(losses(output_dir)[3:10]))
    assert not any(b"hf_secret" in path.read_bytes() for path in output_dir.rglob("*") if path.is_file())


def test_pipeline_is_pushed_when_training_ends(run, hub):
    flags = ["--push_to_hub", "--hub_model_id", "digits", "--hub_token", WRITER, "--hub_private_repo"]
    output_dir = run(*flags, "--max_train_steps", 1)
    assert hub.repos["models", f"{USER}/digits"].private
    files = hub.files(f"{USER}/digits")
    assert files["samples.png"] == (output_dir / "samples.png").read_bytes()
    assert "| lr_warmup_steps | 2 |" in files["README.md"].decode()
    assert not any("checkpoint" in name or "log" in name for name in files)
    assert not any(WRITER.encode() in path.read_bytes() for path in output_dir.rglob("*") if path.is_file())


def test_token_that_may_not_write_is_found_before_training(run, hub, tmp_path):
    with pytest.raises(RuntimeError, match="cannot push to the repository 'user/digits'"):
        run("--push_to_hub", "--hub_model_id", "user/digits", "--hub_token", READER)
    assert not list(tmp_path.glob("run/*"))


# Flags


def test_help_and_mistakes_answer_without_torch():
    code = "import sys, train; train.parse_args([]); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=os.path.dirname(train.__file__)).returncode == 0


@pytest.mark.parametrize(
    ("flag", "value"),
    [
        ("--train_batch_size", "0"),
        ("--num_epochs", "1.5"),
        ("--learning_rate", "nan"),
        ("--learning_rate", "0"),
        ("--adam_beta1", "1"),
        ("--ema_max_decay", "-0.1"),
        ("--snr_gamma", "0"),
        ("--max_grad_norm", "0"),
        ("--seed", "-1"),
        ("--prediction_type", "noise"),
        ("--lr_scheduler", "step"),
        ("--logger", "pen"),
        ("--ddpm_num_inference_steps", "1001"),
        ("--mixed_precision", "int8"),
        ("--lerning_rate", "1"),
    ],
)
def test_values_out_of_range_are_refused_by_name(capsys, flag, value):
    with pytest.raises(SystemExit):
        train.parse_args([flag, value])
    assert flag in capsys.readouterr().err


def test_learning_rate_follows_its_schedule(run):
    def rates(*flags):
        output_dir = run("--learning_rate", 0.002, "--overwrite_output_dir", *flags)
        return [record["lr"] / 0.002 for record in read_log(output_dir)]

    assert rates("--lr_scheduler", "constant") == pytest.approx([1] * 6)
    assert rates("--lr_scheduler", "linear", "--lr_warmup_steps", 3) == pytest.approx(
        [0, 1 / 3, 2 / 3, 1, 2 / 3, 1 / 3]
    )
    half_cosine = [(1 + np.cos(np.pi * step / 4)) / 2 for step in range(4)]
    assert rates("--lr_scheduler", "cosine", "--lr_warmup_steps", 2) == pytest.approx([0, 0.5, *half_cosine])


def test_gradient_is_clipped_to_its_norm(run):
    """With SGD-like Adam (betas 0, a large epsilon) the first update is the clipped gradient itself, scaled."""
    flags = ["--adam_beta1", 0, "--adam_beta2", 0, "--adam_epsilon", 1e6, "--learning_rate", 1e6]
    flags += ["--lr_scheduler", "constant", "--checkpointing_steps", 1, "--adam_weight_decay", 0]
    norms = {}
    for max_grad_norm in ("inf", 0.01):
        output_dir = run(*flags, "--max_grad_norm", max_grad_norm, "--max_train_steps", 2, "--overwrite_output_dir")
        first, second = weights_at(output_dir, 1), weights_at(output_dir, 2)
        update = torch.cat([(second[name] - first[name]).flatten() for name in first]).norm().item()
        norms[max_grad_norm] = update, read_log(output_dir)[1]["grad_norm"]
    update, grad_norm = norms["inf"]
    assert update == pytest.approx(grad_norm, rel=1e-3)
    update, grad_norm = norms[0.01]
    assert grad_norm > 0.01
    assert update == pytest.approx(0.01, rel=1e-3)


def test_weight_decay_shrinks_the_weights(run):
    flags = ["--learning_rate", 1e-9, "--lr_scheduler", "constant", "--max_train_steps", 2, "--checkpointing_steps", 1]
    output_dir = run(*flags, "--adam_weight_decay", 1e8)  # AdamW: times 1 - 1e-9 * 1e8 = 0.9
    first, second = weights_at(output_dir, 1), weights_at(output_dir, 2)
    torch.testing.assert_close(second, {name: 0.9 * value for name, value in first.items()}, rtol=1e-4, atol=1e-7)


def test_the_noise_schedule_is_saved_as_asked_for(run):
    flags = ["--prediction_type", "v_prediction", "--ddpm_num_steps", 100, "--ddpm_beta_schedule", "linear"]
    config = MNISTDDPMPipeline.from_pretrained(run(*flags, "--max_train_steps", 1)).scheduler.config
    assert (config.prediction_type, config.num_train_timesteps, config.beta_schedule) == (
        "v_prediction",
        100,
        "linear",
    )


def test_the_log_snr_is_trained_on_as_asked_for(run):
    flags = ["--ddpm_num_steps", 5, "--ddpm_log_snr", 6, -2, "--logger", "tensorboard"]  # which takes no lists
    scheduler = MNISTDDPMPipeline.from_pretrained(run(*flags, "--max_train_steps", 1)).scheduler
    torch.testing.assert_close(scheduler.betas, log_snr_betas(5, 6, -2))


@pytest.mark.parametrize("loss_type", ["hybrid", "vlb"])
def test_a_learned_variance_is_trained_saved_and_sampled_with(run, tmp_path, loss_type):
    MNISTUNet2DModel(sample_size=8, **UNET | {"out_channels": 2}).save_config(tmp_path / "unet")
    flags = ["--model_config_name_or_path", tmp_path / "unet", "--variance_type", "learned_range"]
    output_dir = run(*flags, "--loss_type", loss_type)
    pipe = MNISTDDPMPipeline.from_pretrained(output_dir)
    assert pipe.scheduler.config.variance_type == "learned_range"
    (prediction, variance) = saved_weights(output_dir)["conv_out.bias"].view(2, -1)
    assert (prediction != 0).any()
    assert (variance != 0).any()
    assert (output_dir / "samples.png").exists()
    for scheduler in ("ddpm", "ddim", "dpmsolver_multistep"):
        images = load_pipeline(str(output_dir), scheduler)(2, num_inference_steps=3, output_type="pt").images
        assert images.shape == (2, 1, 8, 8)
    with pytest.raises(ValueError, match="--variance_type learned_range needs 2 channels: change the config"):
        run(*flags[2:], "--loss_type", loss_type, "--overwrite_output_dir")


def test_vlb_trains_the_prediction_of_a_fixed_variance(run):
    output_dir = run("--loss_type", "vlb", "--variance_type", "fixed_large")
    assert MNISTDDPMPipeline.from_pretrained(output_dir).scheduler.simple_var
    assert (saved_weights(output_dir)["conv_out.bias"] != 0).any()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--variance_type learned_range", "needs --loss_type hybrid or vlb"),
        ("--loss_type hybrid", "needs --variance_type learned_range"),
        ("--ddpm_log_snr 6 -2 --ddpm_beta_schedule linear", "exclude each other"),
        ("--ddpm_log_snr 6", "--ddpm_log_snr"),
        ("--loss_type l1", "--loss_type"),
        ("--variance_type learned", "--variance_type"),
    ],
)
def test_losses_and_variances_that_do_not_go_together_are_refused(capsys, flags, message):
    with pytest.raises(SystemExit):
        train.parse_args(flags.split())
    assert message in capsys.readouterr().err


def test_snr_gamma_and_the_seed_change_the_loss(run):
    curves = [losses(run(*flags, "--overwrite_output_dir")) for flags in ([], ["--snr_gamma", 1], ["--seed", 1])]
    assert all(a != b for a, b in zip(curves[0], curves[1], strict=True))
    assert all(a != b for a, b in zip(curves[0], curves[2], strict=True))


def test_split_column_and_resolution_say_which_images(run, workplace):
    output_dir = run(
        "--split", "test", "--image_column", "picture", "--save_images_epochs", 1, "--save_images_steps", 0
    )
    assert names(output_dir / "samples") == ["step-00000004.png", "step-00000006.png"]  # 16 images in 4 steps
    flags = ["--resolution", 4, "--model_config_name_or_path", workplace / "unet-4", "--overwrite_output_dir"]
    assert MNISTDDPMPipeline.from_pretrained(run(*flags, "--max_train_steps", 1)).unet.config.sample_size == 4


def test_diffusers_unet_trains_too(run, tmp_path):
    from diffusers import UNet2DModel

    blocks = {"down_block_types": ("DownBlock2D",) * 2, "up_block_types": ("UpBlock2D",) * 2}
    unet = UNet2DModel(8, 1, 1, block_out_channels=(4, 8), layers_per_block=1, norm_num_groups=2, **blocks)
    unet.save_config(tmp_path / "unet")
    output_dir = run("--model_config_name_or_path", tmp_path / "unet", "--max_train_steps", 1)
    assert isinstance(MNISTDDPMPipeline.from_pretrained(output_dir).unet, UNet2DModel)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_trains_close_to_float32(run, precision):
    """A rounding to bf16 is off by 2^-9 of a number at most, one to fp16 by 2^-12, and they are of either sign.

    So a loss, a mean over the numbers of a batch, stays within 1 %: five of the coarser roundings one way. The
    mean of the last ten losses stays within 0.2 %: one of them.
    """
    if precision == "fp16" and not torch.accelerator.is_available():
        pytest.skip("fp16 needs a GPU")
    flags = ["--max_train_steps", 40, "--train_batch_size", 24, "--lr_scheduler", "constant", "--overwrite_output_dir"]
    flags += ["--save_images_epochs", 100, "--save_images_steps", 0, "--save_model_epochs", 100]
    float32, half = (np.array(losses(run(*flags, "--mixed_precision", name))) for name in ("no", precision))
    assert (half != float32).any()
    np.testing.assert_allclose(half, float32, rtol=0.01)
    assert float32[-10:].mean() < 0.95 * float32[:10].mean()
    assert half[-10:].mean() == pytest.approx(float32[-10:].mean(), rel=0.002)


@pytest.mark.slow
def test_compiled_training_gives_the_same_losses(run):
    plain, compiled = losses(run()), losses(run("--compile", "--overwrite_output_dir"))
    np.testing.assert_allclose(compiled, plain, rtol=1e-4)


def test_accumulated_micro_batches_are_one_batch(run):
    whole = losses(run("--train_batch_size", 8))
    parts = losses(run("--train_batch_size", 2, "--gradient_accumulation_steps", 4, "--overwrite_output_dir"))
    np.testing.assert_allclose(parts, whole, rtol=1e-4)


# Resuming


def test_to_resume_and_to_overwrite_exclude_each_other(capsys):
    with pytest.raises(SystemExit):
        train.parse_args(["--overwrite_output_dir", "--resume_from_checkpoint", "latest"])
    assert "exclude each other" in capsys.readouterr().err


def test_resumed_run_ends_bit_identical(run, tmp_path):
    whole = run("--checkpointing_steps", 3, "--save_images_steps", 1)
    resumed = run("--resume_from_checkpoint", whole / "checkpoint-3", output_dir=tmp_path / "resumed")
    assert read_log(resumed) == read_log(whole)[3:]
    assert content(resumed / "checkpoint-6") == content(whole / "checkpoint-6")
    assert equal(saved_weights(resumed), saved_weights(whole))
    assert (resumed / "samples.png").read_bytes() == (whole / "samples.png").read_bytes()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_stopped_run_goes_on_to_the_same_end(run, tmp_path, caplog, number):
    flags = ["--max_train_steps", 100, "--eval_batch_size", 1, "--save_images_steps", 0, "--save_images_epochs", 10]
    whole = run(*flags, output_dir=tmp_path / "whole")

    def stop_when_it_trains():
        log = tmp_path / "run" / "train_log.jsonl"
        while not (log.exists() and log.stat().st_size):
            time.sleep(0.01)
        os.kill(os.getpid(), number)

    thread = threading.Thread(target=stop_when_it_trains)
    thread.start()
    stopped = run(*flags)
    thread.join()
    assert "--resume_from_checkpoint latest" in caplog.text
    steps = len(losses(stopped))
    assert steps < 100
    assert names(stopped / f"checkpoint-{steps}") == names(whole / "checkpoint-100")
    assert (stopped / "samples.png").exists()
    MNISTDDPMPipeline.from_pretrained(stopped)

    run(*flags, "--resume_from_checkpoint", "latest")
    assert (stopped / "train_log.jsonl").read_bytes() == (whole / "train_log.jsonl").read_bytes()
    assert content(stopped / "checkpoint-100") == content(whole / "checkpoint-100")
    assert content(stopped / "samples") == content(whole / "samples")


def at_call(number, act):
    """A hook that acts at one of its calls, counted from 1."""
    calls = itertools.count(1)
    return lambda *args: act(*args) if next(calls) == number else None


def test_signal_ends_the_sampling_of_images_which_come_after_the_resume(run, make_trainer, tmp_path):
    flags = ["--save_images_steps", 1, "--ddpm_num_inference_steps", 20]
    whole = run(*flags, output_dir=tmp_path / "whole")

    trainer = make_trainer(*flags)
    sampled = []
    trainer.pipeline.unet.register_forward_hook(lambda *_: sampled.append(1))
    trainer.pipeline.unet.register_forward_hook(at_call(3, lambda *_: os.kill(os.getpid(), signal.SIGTERM)))
    trainer.train()
    stopped = trainer.output_dir
    assert not (stopped / "samples").exists()
    assert [path.name for path in list_checkpoints(stopped)] == ["checkpoint-1"]
    assert len(sampled) == 3 + 20, "cut off, and then once for the first picture, as all else was saved"

    trainer = make_trainer(*flags, "--resume_from_checkpoint", "latest")
    trainer.pipeline.unet.register_forward_hook(at_call(3, lambda *_: os.kill(os.getpid(), signal.SIGINT)))
    trainer.train()  # cut off again, while the images of step 1 are sampled
    assert len(losses(stopped)) == 1
    assert not (stopped / "samples").exists()

    run(*flags, "--resume_from_checkpoint", "latest")
    assert content(stopped / "samples") == content(whole / "samples")
    assert content(stopped / "checkpoint-6") == content(whole / "checkpoint-6")
    assert (stopped / "train_log.jsonl").read_bytes() == (whole / "train_log.jsonl").read_bytes()


def test_signal_at_the_last_step_leaves_the_rest_to_the_resumed_run(run, make_trainer, tmp_path):
    flags = ["--save_images_steps", 0, "--ddpm_num_inference_steps", 20]
    whole = run(*flags, output_dir=tmp_path / "whole")
    trainer = make_trainer(*flags)
    trainer.pipeline.unet.register_forward_hook(at_call(3, lambda *_: os.kill(os.getpid(), signal.SIGTERM)))
    trainer.train()
    assert not (trainer.output_dir / "samples").exists()
    run(*flags, "--resume_from_checkpoint", "latest")
    for folder in ("samples", "checkpoint-6", "unet"):
        assert content(trainer.output_dir / folder) == content(whole / folder)


def test_images_are_without_dropout_and_leave_the_random_numbers_of_training_alone(make_trainer, tmp_path):
    MNISTUNet2DModel(sample_size=8, dropout=0.5, **UNET).save_config(tmp_path / "unet")
    pipeline = make_trainer("--model_config_name_or_path", tmp_path / "unet").published_pipeline()
    state = torch.get_rng_state()
    first, second = (
        pipeline(1, torch.Generator().manual_seed(0), num_inference_steps=2, output_type="pt").images for _ in range(2)
    )
    assert torch.equal(first, second)
    assert torch.equal(torch.get_rng_state(), state)


def test_complete_run_gets_its_pipeline_and_images_in_another_folder_too(run, tmp_path):
    whole = run()
    copy = run("--resume_from_checkpoint", whole / "checkpoint-6", output_dir=tmp_path / "copy")
    assert equal(saved_weights(copy), saved_weights(whole))
    MNISTDDPMPipeline.from_pretrained(copy)
    assert (copy / "samples.png").read_bytes() == (whole / "samples.png").read_bytes()


def test_latest_passes_over_a_checkpoint_cut_short(run, caplog):
    output_dir = run("--checkpointing_steps", 2)
    whole = {step: content(output_dir / f"checkpoint-{step}") for step in (2, 4, 6)}
    log = (output_dir / "train_log.jsonl").read_bytes()
    weights = output_dir / "checkpoint-6" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    run("--checkpointing_steps", 2, "--resume_from_checkpoint", "latest")
    assert "checkpoint-6 is damaged: model.safetensors is not what was written. Passing over it." in caplog.text
    assert (output_dir / "train_log.jsonl").read_bytes() == log
    assert {step: content(output_dir / f"checkpoint-{step}") for step in (2, 4, 6)} == whole


def test_latest_without_a_checkpoint_starts_a_new_run(run):
    assert len(losses(run("--resume_from_checkpoint", "latest"))) == 6


def test_finished_run_can_be_trained_on(run):
    run("--lr_scheduler", "constant")
    output_dir = run("--lr_scheduler", "constant", "--resume_from_checkpoint", "latest", "--max_train_steps", 8)
    assert len(losses(output_dir)) == 8


def test_resuming_with_other_settings_is_refused(run):
    output_dir = run("--max_train_steps", 1)
    before = content(output_dir / "checkpoint-1")
    with pytest.raises(ValueError, match=r"--learning_rate 0\.1 \(there: 0\.\d+\), images per step 2 \(there: 4\)"):
        run("--learning_rate", 0.1, "--train_batch_size", 2, "--resume_from_checkpoint", "latest")
    assert content(output_dir / "checkpoint-1") == before


def test_checkpoints_beyond_the_limit_go(run):
    output_dir = run("--checkpointing_steps", 1, "--checkpoints_total_limit", 2)
    assert [path.name for path in list_checkpoints(output_dir)] == ["checkpoint-5", "checkpoint-6"]


# Bad input


def test_earlier_run_is_not_overwritten_unless_asked_to(run, tmp_path):
    output_dir = run()
    before = {path: path.read_bytes() for path in output_dir.rglob("*") if path.is_file()}
    with pytest.raises(ValueError, match=r"--output_dir: .* holds an earlier run"):
        run()
    with pytest.raises(ValueError, match=r"--output_dir: .* holds an earlier run"):
        run("--resume_from_checkpoint", run(output_dir=tmp_path / "other") / "checkpoint-6")
    with pytest.raises(FileNotFoundError, match="no folder or file"):
        run("--overwrite_output_dir", "--dataset_name", "/no/such/folder")
    assert {path: path.read_bytes() for path in output_dir.rglob("*") if path.is_file()} == before
    run("--overwrite_output_dir", "--max_train_steps", 2, "--seed", 1)
    assert [path.name for path in list_checkpoints(output_dir)] == ["checkpoint-2"]
    assert names(output_dir / "samples") == ["step-00000002.png"]


def test_output_folder_that_cannot_be_written_is_named(run, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match=r"--output_dir: .*file/run can't be written to"):
        run(output_dir=tmp_path / "file" / "run")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--dataset_name", "/no/such/folder"], "there is no folder or file '/no/such/folder'"),
        (["--image_column", "img"], "image_column: .* no column 'img'. Its columns are: 'image', 'picture', 'label'"),
        (["--split", "tain"], "split='tain'"),
        (["--dataset_config_name", "large"], "config_name='large'"),
        (["--resolution", "4"], r"--model_config_name_or_path: the U-Net takes images of shape \(1, 8, 8\)"),
        (["--mixed_precision", "fp16"], "fp16"),
        (["--resume_from_checkpoint", "nowhere"], "--resume_from_checkpoint: there is no folder 'nowhere'"),
    ],
)
def test_bad_input_is_named_and_nothing_is_written(run, tmp_path, flags, message):
    if "fp16" in flags and torch.accelerator.is_available():
        pytest.skip("a GPU can do fp16")
    with pytest.raises((ValueError, OSError), match=message):
        run(*flags)
    assert not list(tmp_path.glob("run/*"))


def test_config_of_another_model_is_named(run, tmp_path):
    (tmp_path / "config.json").write_text('{"_class_name": "AutoencoderKL"}')
    with pytest.raises(
        ValueError, match="--model_config_name_or_path: the config is of a AutoencoderKL, not of one of"
    ):
        run("--model_config_name_or_path", tmp_path)


def test_missing_config_is_named(run, tmp_path):
    with pytest.raises(OSError, match=r"--model_config_name_or_path: .*nowhere"):
        run("--model_config_name_or_path", tmp_path / "nowhere")


# Numbers that go wrong


@pytest.mark.parametrize("micro_batches", [1, 2])
def test_gradient_that_is_not_finite_is_found_before_it_is_saved(make_trainer, micro_batches):
    """In step 7, of a loss that is finite; the checkpoint of step 8 would hold what came of it."""
    flags = ["--checkpointing_steps", 2, "--max_train_steps", 30, "--save_model_epochs", 1]
    flags += ["--train_batch_size", 4 // micro_batches, "--gradient_accumulation_steps", micro_batches]
    trainer = make_trainer(*flags)
    parameter = next(trainer.unet.parameters())
    parameter.register_hook(at_call(7 * micro_batches, lambda gradient: gradient * math.nan))
    with pytest.raises(FloatingPointError, match=r"step 7: the loss is 0\.\d+, .* norm nan.* is .*checkpoint-6\. Try"):
        trainer.train()
    assert names(trainer.output_dir / "samples") == ["step-00000006.png"]
    saved = list(all_saved_numbers(trainer.output_dir))
    assert len({path for path, _ in saved}) == 1 + 3 * 4, "the pipeline, and four files in each of three checkpoints"
    assert all(tensor.isfinite().all() for _, tensor in saved)


def test_loss_that_is_not_finite_is_found_within_ten_steps_and_the_first_one_named(make_trainer):
    flags = ["--max_train_steps", 50, "--save_images_steps", 0, "--save_images_epochs", 9, "--save_model_epochs", 9]
    trainer = make_trainer(*flags)

    def spoil(unet, args, output):
        return (output[0] * math.inf,)

    trainer.unet.register_forward_hook(at_call(13, spoil))
    with pytest.raises(FloatingPointError, match=r"step 13: the loss is inf.* The last good checkpoint is none"):
        trainer.train()
    assert trainer.progress.n == 20
    assert len(losses(trainer.output_dir)) == 10
    assert not list(trainer.output_dir.glob("**/*.safetensors"))


def test_weights_that_an_update_makes_infinite_are_not_saved(run, tmp_path):
    """The loss and the gradient of the step are finite then."""
    with pytest.raises(FloatingPointError, match=r"step 1: the weights became infinite or NaN.* checkpoint is none"):
        run("--learning_rate", 1e39, "--lr_scheduler", "constant", "--checkpointing_steps", 1)
    assert not list((tmp_path / "run").glob("**/*.safetensors"))
    assert not (tmp_path / "run" / "samples").exists()


def test_in_fp16_a_gradient_may_overflow_but_not_on_and_on(make_trainer):
    """Where all of them do, every step is skipped and its loss stays finite, but the scale falls without end."""
    trainer = make_trainer()
    record = {"step": 5, "loss": 0.5, "grad_norm": math.inf}
    trainer.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=1.0)
    trainer._check_finite(record)
    trainer.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=0.5)
    with pytest.raises(FloatingPointError, match=r"step 5: .* norm inf"):
        trainer._check_finite(record)


def test_training_step_does_not_wait_for_the_device(make_trainer):
    """No loss, gradient or weight is read; where there is a GPU, CUDA itself looks for any other wait."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Reads(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            assert not (func is torch.ops.aten._local_scalar_dense.default and args[0].is_floating_point())
            return func(*args, **kwargs or {})

    trainer = make_trainer("--no-compile")
    trainer.training_step(0)  # makes the optimizer's state, and the tables on the device
    if torch.cuda.is_available():
        torch.cuda.set_sync_debug_mode("error")
    try:
        with Reads():
            trainer.training_step(1)
    finally:
        if torch.cuda.is_available():
            torch.cuda.set_sync_debug_mode("default")
    with pytest.raises(AssertionError), Reads():
        trainer.unreported[0][1][0].item()


def test_loss_that_is_not_finite_stops_the_run_with_the_step_named(run, tmp_path):
    flags = ["--lr_scheduler", "constant", "--checkpointing_steps", 1, "--max_train_steps", 50]
    with pytest.raises(FloatingPointError, match=r"step \d+: the loss is (nan|inf).*checkpoint-\d+\. Try a lower"):
        run(*flags, "--learning_rate", 1e30, "--checkpoints_total_limit", 9)
    assert not (tmp_path / "run" / "model_index.json").exists(), "the pipeline of an epoch is saved after the check"


def test_a_user_sees_one_line_and_not_a_traceback():
    command = [sys.executable, train.__file__, "--dataset_name", "/no/such/folder", "--output_dir", "/dev/null/run"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 1
    assert result.stderr.strip().splitlines()[-1].startswith("error: --output_dir: /dev/null/run can't be written to")
    assert "Traceback" not in result.stderr
