"""Training, from the arguments to the saved pipeline, on a few small images."""

import itertools
import json
import math
import os
import runpy
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import minimal
import numpy as np
import pytest
import torch
import train
from accelerate.state import AcceleratorState
from loopback_hub import READER, USER, WRITER
from PIL import Image
from safetensors.torch import load_file
from tiny_training import CLASSES, UNET, command_line, write_workplace

from mnist_ddpm import MNISTDDPMPipeline, MNISTUNet2DModel
from mnist_ddpm.likelihood import log_snr_betas
from mnist_ddpm.training import Trainer, TrainingArguments
from mnist_ddpm.training.checkpoints import list_checkpoints
from mnist_ddpm.training.optimizers import learning_rate_factor

OURS = {"_class_name": "MNISTUNet2DModel", **UNET}
PEERS = {"_class_name": "UNet2DModel", "block_out_channels": (4, 8), "layers_per_block": 1, "norm_num_groups": 2}
PEERS |= {"down_block_types": ("DownBlock2D",) * 2, "up_block_types": ("UpBlock2D",) * 2}
PEER_UNET = {"in_channels": 1, "out_channels": 1, "sample_size": 8, **PEERS}


@pytest.fixture(scope="session")
def workplace(tmp_path_factory):
    return write_workplace(tmp_path_factory.mktemp("train"))


@pytest.fixture
def make_trainer(workplace, tmp_path):
    """A run with some flags, of six steps of four images unless they say otherwise."""

    def make_trainer(*flags, output_dir=tmp_path / "run"):
        AcceleratorState._reset_state(reset_partial_state=True)
        return Trainer(train.parse_args(command_line(workplace, *flags, output_dir=output_dir)))

    return make_trainer


@pytest.fixture
def run(make_trainer):
    """Train with some flags, for six steps of four images unless they say otherwise; returns the output folder."""

    def run(*flags, **kwargs):
        trainer = make_trainer(*flags, **kwargs)
        trainer.train()
        return trainer.output_dir

    return run


@pytest.fixture(scope="session")
def whole(workplace, tmp_path_factory):
    """What a run without further flags leaves, to be read."""
    AcceleratorState._reset_state(reset_partial_state=True)
    output_dir = tmp_path_factory.mktemp("whole") / "run"
    flags = "--checkpointing_steps 3 --resume_from_checkpoint latest"  # of which there is none yet
    Trainer(train.parse_args(command_line(workplace, flags, output_dir=output_dir))).train()
    return output_dir


def write_config(folder, **config):
    """A U-Net's config with what is given, and no more."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


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


def test_a_run_leaves_a_pipeline_samples_a_log_and_a_checkpoint(whole):
    assert {"checkpoint-6", "samples", "samples.png", "train_log.jsonl"} < set(names(whole))
    assert not list(whole.rglob("*.partial"))
    pipeline = MNISTDDPMPipeline.from_pretrained(whole)
    images = pipeline(3, torch.Generator().manual_seed(0), num_inference_steps=2, output_type="np").images
    assert images.shape == (3, 8, 8, 1)
    records = read_log(whole)
    assert [record["step"] for record in records] == [1, 2, 3, 4, 5, 6]
    assert all(record["loss"] > 0 and record["grad_norm"] > 0 for record in records)


@pytest.mark.parametrize(("inv_gamma", "power", "max_decay"), [(1, 1, 0.9999), (2, 0.75, 0.9999), (1, 1, 0.3)])
def test_the_average_of_the_weights_is_saved(run, inv_gamma, power, max_decay):
    flags = f"--ema_inv_gamma {inv_gamma} --ema_power {power} --ema_max_decay {max_decay}"
    output_dir = run(flags, "--checkpointing_steps 1 --checkpoints_total_limit 9")
    average = weights_at(output_dir, 1)
    for step in range(2, 7):  # with gamma = power = 1 this is the plain mean
        decay = min(1 - (1 + (step - 1) / inv_gamma) ** -power, max_decay)
        weights = weights_at(output_dir, step)
        average = {name: decay * average[name] + (1 - decay) * weights[name] for name in weights}
    torch.testing.assert_close(saved_weights(output_dir), average, rtol=1e-5, atol=1e-7)


def test_without_an_average_the_weights_are_saved(run):
    output_dir = run("--no-use_ema --checkpointing_steps 1 --checkpoints_total_limit 2")
    assert [path.name for path in list_checkpoints(output_dir)] == ["checkpoint-5", "checkpoint-6"]
    assert equal(saved_weights(output_dir), weights_at(output_dir, 6))


def test_samples_come_at_the_ends_of_epochs_and_early_in_the_first(run):
    output_dir = run("--max_train_steps 29 --save_images_epochs 2 --save_images_steps 1 --eval_batch_size 5")
    expected = [1, 2, 4, 12, 24, 29]  # an epoch is 6 steps
    assert names(output_dir / "samples") == [f"step-{step:08}.png" for step in expected]
    assert (output_dir / "samples.png").read_bytes() == (output_dir / "samples" / "step-00000029.png").read_bytes()
    with Image.open(output_dir / "samples.png") as grid:
        assert grid.size == (3 * 8, 2 * 8)
        assert np.asarray(grid)[8:, :16].any()
        assert not np.asarray(grid)[8:, 16:].any(), "the sixth place is empty"


def test_pipelines_on_the_way_are_kept_with_the_weights_of_their_step(run, tmp_path):
    """An epoch is 6 steps. At a constant learning rate a run of 12 steps is the beginning of one of 29."""
    flags = "--lr_scheduler constant --save_images_steps 0 --save_images_epochs 9"
    output_dir = run(flags, "--max_train_steps 29 --keep_model_epochs 2")
    assert names(output_dir / "pipelines") == ["step-00000012", "step-00000024"]
    short = run(flags, "--max_train_steps 12", output_dir=tmp_path / "short")
    kept = output_dir / "pipelines" / "step-00000012"
    assert equal(saved_weights(kept), saved_weights(short))
    assert not equal(saved_weights(kept), saved_weights(output_dir))
    scheduler, expected = (MNISTDDPMPipeline.from_pretrained(folder).scheduler for folder in (kept, output_dir))
    assert scheduler.config == expected.config


def test_epochs_are_as_many_steps_as_hold_all_their_images(run):
    assert len(losses(run("--num_epochs 2 --train_batch_size 7"))) == 7  # 48 images: 6 batches of 7, and 6 more


def test_tensorboard_gets_curves_and_samples(run):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    flags = "--logger tensorboard --logging_dir curves --save_images_epochs 5 --save_images_steps 3"
    output_dir = run(flags, "--max_train_steps 20 --checkpointing_steps 10 --hub_token hf_secret")
    run(flags, "--max_train_steps 30 --resume_from_checkpoint", output_dir / "checkpoint-10", output_dir=output_dir)
    events = EventAccumulator(str(output_dir / "curves" / "train"), size_guidance={"images": 0}).Reload()
    assert {"loss", "lr", "grad_norm", "images_per_second"} <= set(events.Tags()["scalars"])
    assert [event.step for event in events.Scalars("loss")] == [3, 10, 20, 30]
    # the one of step 20 went when step 10 came back
    assert [event.step for event in events.Images("samples")] == [3, 30]
    assert events.Scalars("loss")[1].value == pytest.approx(np.mean(losses(output_dir)[3:10]))
    assert not any(b"hf_secret" in path.read_bytes() for path in output_dir.rglob("*") if path.is_file())


def test_pipeline_is_pushed_when_training_ends(run, hub):
    flags = f"--push_to_hub --hub_model_id digits --hub_token {WRITER} --hub_private_repo"
    output_dir = run(flags, "--max_train_steps 1")
    assert hub.repos["models", f"{USER}/digits"].private
    files = hub.files(f"{USER}/digits")
    assert files["samples.png"] == (output_dir / "samples.png").read_bytes()
    assert "| lr_warmup_steps | 2 |" in files["README.md"].decode()
    assert not any("checkpoint" in name or "log" in name for name in files)
    assert not any(WRITER.encode() in path.read_bytes() for path in output_dir.rglob("*") if path.is_file())


def test_token_that_may_not_write_is_found_before_training(run, hub, tmp_path):
    with pytest.raises(RuntimeError, match="cannot push to the repository 'user/digits'"):
        run(f"--push_to_hub --hub_model_id user/digits --hub_token {READER}")
    assert not list(tmp_path.glob("run/*"))


# What the arguments do


def test_gradient_is_clipped_to_its_norm(run):
    """With SGD-like Adam (betas 0, a large epsilon) the first update is the clipped gradient itself, scaled."""
    flags = "--optimizer adamw --adam_beta1 0 --adam_beta2 0 --adam_epsilon 1e6 --learning_rate 1e6"
    flags += " --lr_scheduler constant --checkpointing_steps 1 --max_train_steps 2 --overwrite_output_dir"
    for max_grad_norm in (math.inf, 0.01):
        output_dir = run(flags, f"--max_grad_norm {max_grad_norm}")
        first, second = weights_at(output_dir, 1), weights_at(output_dir, 2)
        update = torch.cat([(second[name] - first[name]).flatten() for name in first]).norm().item()
        grad_norm = read_log(output_dir)[1]["grad_norm"]
        assert grad_norm > 0.01
        assert update == pytest.approx(min(grad_norm, max_grad_norm), rel=1e-3)


def test_the_noise_schedule_is_saved_as_asked_for(run):
    flags = "--max_train_steps 1 --overwrite_output_dir --logger tensorboard"  # which takes no lists
    output_dir = run(flags, "--prediction_type epsilon --ddpm_num_steps 100 --ddpm_beta_schedule linear")
    config = MNISTDDPMPipeline.from_pretrained(output_dir).scheduler.config
    assert (config.prediction_type, config.num_train_timesteps, config.beta_schedule) == ("epsilon", 100, "linear")
    scheduler = MNISTDDPMPipeline.from_pretrained(run(flags, "--ddpm_num_steps 5 --ddpm_log_snr 6 -2")).scheduler
    torch.testing.assert_close(scheduler.betas, log_snr_betas(5, 6, -2))


@pytest.mark.parametrize(
    ("loss_type", "variance_type"), [("hybrid", "learned_range"), ("vlb", "learned_range"), ("vlb", "fixed_large")]
)
def test_the_variance_is_trained_saved_and_sampled_with(run, tmp_path, loss_type, variance_type):
    channels = 2 if variance_type == "learned_range" else 1
    config = write_config(tmp_path / "unet", **OURS, sample_size=8, out_channels=channels)
    flags = f"--variance_type {variance_type} --loss_type {loss_type}"
    output_dir = run(flags, "--model_config_name_or_path", config)
    pipe = MNISTDDPMPipeline.from_pretrained(output_dir)
    assert pipe.scheduler.config.variance_type == variance_type
    assert (saved_weights(output_dir)["conv_out.bias"].view(channels, -1) != 0).any(dim=1).all()
    assert (output_dir / "samples.png").exists()
    assert pipe(2, num_inference_steps=3, output_type="pt").images.shape == (2, 1, 8, 8)


def test_snr_gamma_and_the_seed_change_the_loss(run, whole):
    for flags in ("--snr_gamma 1", "--seed 1"):
        assert all(a != b for a, b in zip(losses(whole), losses(run(flags, "--overwrite_output_dir")), strict=True))


def test_split_column_and_resolution_say_which_images(run, tmp_path):
    output_dir = run("--split test --image_column picture --save_images_epochs 1 --save_images_steps 0")
    assert names(output_dir / "samples") == ["step-00000004.png", "step-00000006.png"]  # 16 images in 4 steps
    flags = ["--resolution 4 --overwrite_output_dir --model_config_name_or_path", write_config(tmp_path, **OURS)]
    assert MNISTDDPMPipeline.from_pretrained(run(*flags, "--max_train_steps 1")).unet.config.sample_size == 4


@pytest.mark.parametrize(
    ("config", "channels"), [(OURS, 1), (OURS, 3), (OURS | {"sample_size": None}, 1), (PEERS, 1), (PEERS, 3)]
)
def test_what_a_config_leaves_open_is_as_the_images_have_it(run, tmp_path, config, channels):
    flags = f"--channels {channels} --max_train_steps 1 --model_config_name_or_path"
    unet = MNISTDDPMPipeline.from_pretrained(run(flags, write_config(tmp_path, **config))).unet
    assert unet.config._class_name == config["_class_name"]
    assert (unet.config.in_channels, unet.config.out_channels, unet.config.sample_size) == (channels, channels, 8)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_trains_close_to_float32(run, precision):
    """A rounding to bf16 is off by 2^-9 of a number at most, one to fp16 by 2^-12, and they are of either sign.

    So a loss, a mean over the numbers of a batch, stays within 1 %: five of the coarser roundings one way. The
    mean of the last ten losses stays within 0.2 %: one of them.
    """
    if precision == "fp16" and not torch.accelerator.is_available():
        pytest.skip("fp16 needs a GPU")
    flags = "--max_train_steps 40 --train_batch_size 24 --lr_scheduler constant --overwrite_output_dir"
    flags += " --save_images_epochs 100 --save_images_steps 0 --save_model_epochs 100 --mixed_precision"
    float32, half = (np.array(losses(run(flags, name))) for name in ("no", precision))
    assert (half != float32).any()
    np.testing.assert_allclose(half, float32, rtol=0.01)
    assert float32[-10:].mean() < 0.95 * float32[:10].mean()
    assert half[-10:].mean() == pytest.approx(float32[-10:].mean(), rel=0.002)


def test_accelerates_own_compilation_is_reported_saved_and_resumed(run, caplog, monkeypatch, tmp_path):
    """As of `accelerate launch --dynamo_backend eager`; --no-compile wins over it."""
    flags = "--no-use_ema --checkpointing_steps 3"
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "EAGER")
    plain = run(flags, "--no-compile")
    assert "torch.compile off" in caplog.text
    compiled = run(flags, output_dir=tmp_path / "compiled")
    assert "torch.compile on (by Accelerate)" in caplog.text
    assert losses(compiled) == pytest.approx(losses(plain), rel=1e-4)
    assert saved_weights(compiled).keys() == saved_weights(plain).keys()
    resumed = run(flags, "--resume_from_checkpoint", compiled / "checkpoint-3", output_dir=tmp_path / "resumed")
    assert losses(resumed) == losses(compiled)[3:]


def test_training_in_a_thread(make_trainer):
    with ThreadPoolExecutor() as threads:
        threads.submit(make_trainer("--max_train_steps 1").train).result()


@pytest.mark.slow
def test_compiled_training_gives_the_same_losses(run, whole):
    np.testing.assert_allclose(losses(run("--compile")), losses(whole), rtol=1e-4)


def test_accumulated_micro_batches_are_one_batch(run):
    together = losses(run("--train_batch_size 8"))
    parts = losses(run("--train_batch_size 2 --gradient_accumulation_steps 4 --overwrite_output_dir"))
    np.testing.assert_allclose(parts, together, rtol=1e-4)


# Starting from saved weights


@pytest.mark.parametrize("saved", ["", "unet"], ids=["pipeline", "U-Net"])
@pytest.mark.parametrize("config", [None, "unet"], ids=["its config", "a config"])
def test_a_run_starts_from_saved_weights(whole, workplace, tmp_path, saved, config, caplog):
    args = train.parse_args(command_line(workplace, "--init_from", whole / saved, output_dir=tmp_path / "run"))
    args.model_config_name_or_path = config and str(workplace / config)
    trainer = Trainer(args)
    assert equal(trainer.unet.state_dict(), saved_weights(whole))
    assert equal(trainer.published_pipeline().unet.state_dict(), saved_weights(whole))
    assert f"weights from {whole / saved}" in caplog.text
    assert "was trained with" not in caplog.text


def test_weights_of_another_process_are_named(make_trainer, whole, caplog):
    make_trainer("--prediction_type epsilon --ddpm_beta_schedule linear --init_from", whole)
    assert "was trained with prediction_type 'v_prediction', this run has 'epsilon'" in caplog.text
    assert "other betas (squaredcos_cap_v2, 1000 timesteps) than this run has (linear, 1000 timesteps)" in caplog.text


def test_weights_of_another_log_snr_are_named(make_trainer, whole, caplog):
    make_trainer("--ddpm_log_snr 9 -5 --init_from", whole)
    assert "was trained with other betas" in caplog.text


# Labels


def test_a_run_with_labels_leaves_a_conditional_pipeline(run):
    output_dir = run("--label_column label --label_dropout 0.5 --eval_batch_size 8")
    pipe = MNISTDDPMPipeline.from_pretrained(output_dir)
    assert pipe.config.id2label == dict(enumerate(CLASSES))
    embedding = pipe.unet.class_embedding.weight
    assert embedding.shape[0] == 4
    assert (embedding != 0).any(dim=1).all(), "each class and 'no label' has been trained"
    with Image.open(output_dir / "samples.png") as grid:
        assert grid.size == (3 * 8, 3 * 8), "a column for each class"
    card = (output_dir / "README.md").read_text(encoding="utf-8")
    assert "dot, line, cross" in card
    assert 'class_labels="dot"' in card
    options = {"num_inference_steps": 2, "output_type": "pt", "guidance_scale": 2.0}
    assert pipe(3, class_labels=CLASSES, **options).images.shape == (3, 1, 8, 8)
    with pytest.raises(ValueError, match=r"^label_column must be a column of 3 classes.* got None"):
        run("--overwrite_output_dir --model_config_name_or_path", output_dir)


def test_a_conditional_model_starts_from_an_unconditional_one(whole, workplace, tmp_path):
    args = train.parse_args(command_line(workplace, "--label_column label --init_from", whole))
    args.model_config_name_or_path, args.output_dir = None, str(tmp_path / "run")
    weights = Trainer(args).unet.state_dict()
    assert (weights.pop("class_embedding.weight") == 0).all()
    assert equal(weights, saved_weights(whole))


# Resuming


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_resumed_run_ends_bit_identical(run, tmp_path, optimizer):
    flags = f"--optimizer {optimizer} --random_flip --label_column label --label_dropout 0.5"
    whole = run(flags, "--checkpointing_steps 3 --save_images_steps 1")
    resumed = run(flags, "--resume_from_checkpoint", whole / "checkpoint-3", output_dir=tmp_path / "resumed")
    assert read_log(resumed) == read_log(whole)[3:]
    assert content(resumed / "checkpoint-6") == content(whole / "checkpoint-6")
    assert equal(saved_weights(resumed), saved_weights(whole))
    assert (resumed / "samples.png").read_bytes() == (whole / "samples.png").read_bytes()
    end = content(whole / "checkpoint-6")  # a checkpoint may be named as in the scripts of diffusers
    assert content(run(flags, "--resume_from_checkpoint checkpoint-3") / "checkpoint-6") == end


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_stopped_run_resumes_to_the_same_end(run, tmp_path, caplog, number):
    flags = "--max_train_steps 100 --eval_batch_size 1 --save_images_steps 0 --save_images_epochs 10"
    whole = run(flags, output_dir=tmp_path / "whole")

    def stop_when_it_trains():
        log = tmp_path / "run" / "train_log.jsonl"
        while not (log.exists() and log.stat().st_size):
            time.sleep(0.01)
        os.kill(os.getpid(), number)

    thread = threading.Thread(target=stop_when_it_trains)
    thread.start()
    stopped = run(flags)
    thread.join()
    assert "--resume_from_checkpoint latest" in caplog.text
    steps = len(losses(stopped))
    assert steps < 100
    assert names(stopped / f"checkpoint-{steps}") == names(whole / "checkpoint-100")
    assert (stopped / "samples.png").exists()
    MNISTDDPMPipeline.from_pretrained(stopped)

    run(flags, "--resume_from_checkpoint latest")
    assert (stopped / "train_log.jsonl").read_bytes() == (whole / "train_log.jsonl").read_bytes()
    assert content(stopped / "checkpoint-100") == content(whole / "checkpoint-100")
    assert content(stopped / "samples") == content(whole / "samples")


def at_call(number, act):
    """A hook that acts at one of its calls, counted from 1."""
    calls = itertools.count(1)
    return lambda *args: act(*args) if next(calls) == number else None


@pytest.mark.parametrize(("save_images_steps", "stopped_at"), [(1, 1), (0, 6)])
def test_signal_ends_the_sampling_of_images_which_come_after_the_resume(
    run, make_trainer, tmp_path, save_images_steps, stopped_at
):
    flags = f"--save_images_steps {save_images_steps} --ddpm_num_inference_steps 20"
    whole = run(flags, output_dir=tmp_path / "whole")
    stopped = tmp_path / "run"
    for resume, number in (("", signal.SIGTERM), ("--resume_from_checkpoint latest", signal.SIGINT)):
        trainer = make_trainer(flags, resume)
        act = at_call(3, lambda *_, number=number: os.kill(os.getpid(), number))
        trainer.pipeline.unet.register_forward_hook(act)
        trainer.train()  # cut off while the images of a step are sampled, and then again
        assert not (stopped / "samples").exists()
        assert [path.name for path in list_checkpoints(stopped)] == [f"checkpoint-{stopped_at}"]
        assert len(losses(stopped)) == stopped_at
    run(flags, "--resume_from_checkpoint latest")
    for folder in ("samples", "checkpoint-6", "unet"):
        assert content(stopped / folder) == content(whole / folder)
    assert (stopped / "train_log.jsonl").read_bytes() == (whole / "train_log.jsonl").read_bytes()


def test_images_are_without_dropout_and_leave_the_random_numbers_of_training_alone(make_trainer, tmp_path):
    config = write_config(tmp_path, **OURS, dropout=0.5)
    pipe = make_trainer("--model_config_name_or_path", config).published_pipeline()
    state, options = torch.get_rng_state(), {"num_inference_steps": 2, "output_type": "pt"}
    first, second = (pipe(1, torch.Generator().manual_seed(0), **options).images for _ in range(2))
    assert torch.equal(first, second)
    assert torch.equal(torch.get_rng_state(), state)


def test_complete_run_gets_its_pipeline_and_images_in_another_folder_too(run, whole):
    copy = run("--resume_from_checkpoint", whole / "checkpoint-6")
    assert equal(saved_weights(copy), saved_weights(whole))
    MNISTDDPMPipeline.from_pretrained(copy)
    assert (copy / "samples.png").read_bytes() == (whole / "samples.png").read_bytes()


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
@pytest.mark.parametrize(
    ("schedule", "more"),
    [
        ("linear", {"max_train_steps": 12}),
        ("constant_with_warmup", {"max_train_steps": 9, "lr_decay_steps": 3}),
    ],
)
def test_finished_run_resumes_with_the_learning_rate_of_the_schedule_that_now_holds(
    run, caplog, optimizer, schedule, more
):
    flags = f"--optimizer {optimizer} --lr_scheduler {schedule}"
    run(flags)
    longer = " ".join(f"--{name} {value}" for name, value in more.items())
    output_dir = run(flags, longer, "--resume_from_checkpoint latest")
    args, steps = TrainingArguments(lr_scheduler=schedule, lr_warmup_steps=2, **more), more["max_train_steps"]
    peak = 0.01 if optimizer == "muon" else 0.002
    rates = [peak * learning_rate_factor(step, steps, args) for step in range(6, steps)]
    assert [record["lr"] for record in read_log(output_dir)[6:]] == pytest.approx(rates)
    assert "The schedule of the learning rate changed: " in caplog.text
    assert f"max_train_steps 6 -> {steps}" in caplog.text


def test_optimizer_uses_the_learning_rate_of_the_log(run):
    """AdamW with betas 0 and a weight decay moves a weight by its rate alone, whatever was saved."""
    flags = "--optimizer adamw --adam_beta1 0 --adam_beta2 0 --adam_epsilon 1e9"
    flags += " --adam_weight_decay 100 --checkpointing_steps 1 --checkpoints_total_limit 9"
    run(flags, "--lr_scheduler linear --max_train_steps 4")
    output_dir = run(flags, "--lr_scheduler constant --max_train_steps 8 --resume_from_checkpoint latest")
    before, after = (weights_at(output_dir, step)["conv_in.weight"] for step in (4, 5))
    torch.testing.assert_close(after, (1 - 0.002 * 100) * before, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize(
    ("flag", "name"),
    [
        ("--max_train_steps 3", "max_train_steps must be at least 6"),
        ("--learning_rate 0.1", "learning_rate must be"),
        ("--optimizer adamw", "optimizer must be"),
        ("--random_flip", "random_flip must be"),
        ("--train_batch_size 2", "images per step must be 4 "),
    ],
)
def test_resuming_with_fewer_steps_or_other_settings_is_refused(run, whole, tmp_path, flag, name):
    with pytest.raises(ValueError, match=f"^{name}"):
        run(flag, "--resume_from_checkpoint", whole / "checkpoint-6")
    assert not list(tmp_path.glob("run/*"))


# Bad input


def test_earlier_run_is_not_overwritten_unless_asked_to(run, whole, tmp_path):
    output_dir = run("--max_train_steps 3")
    before = {path: path.read_bytes() for path in output_dir.rglob("*") if path.is_file()}
    for flags in ([], ["--resume_from_checkpoint", whole / "checkpoint-6"]):
        with pytest.raises(ValueError, match="output_dir must not hold an earlier run"):
            run(*flags)
    with pytest.raises(ValueError, match="dataset_name"):
        run("--overwrite_output_dir --dataset_name /no/such/folder")
    assert {path: path.read_bytes() for path in output_dir.rglob("*") if path.is_file()} == before
    run("--overwrite_output_dir --max_train_steps 2 --seed 1")
    assert [path.name for path in list_checkpoints(output_dir)] == ["checkpoint-2"]
    assert names(output_dir / "samples") == ["step-00000002.png"]


LEVELS = {"block_out_channels": (8,) * 4, "norm_num_groups": 1, "layers_per_block": 1}  # as of diffusers' own
FOUR_LEVELS = {"down_block_types": ("DownBlock2D",) * 4, "up_block_types": ("UpBlock2D",) * 4, **LEVELS}


@pytest.mark.parametrize(
    ("flags", "config", "match"),
    [
        ("--dataset_name /no/such/folder", None, "dataset_name"),
        ("--image_column img", None, "'img'"),
        ("--split tain", None, "split='tain'"),
        ("--dataset_config_name large", None, "config_name='large'"),
        ("--resolution 4", None, "model_config_name_or_path .* --resolution"),
        ("--mixed_precision fp16", None, "mixed_precision"),
        ("--resume_from_checkpoint nowhere", None, "resume_from_checkpoint"),
        ("--init_from /no/where", None, "/no/where"),
        ("--model_config_name_or_path /no/where", None, "/no/where"),
        ("--label_column labels", None, r"labels.*Current columns"),
        ("", {"_class_name": "AutoencoderKL"}, "model_config_name_or_path must .* got 'AutoencoderKL'"),
        ("--label_column label", PEER_UNET, "^label_column must be None for a UNet2DModel"),
        ("--label_column label", OURS | {"num_class_embeds": 4}, "^label_column must be a column of 4 classes"),
        ("--variance_type learned_range --loss_type vlb", PEER_UNET, "must be a U-Net that makes 2 channels"),
        ("--resolution 15", PEERS, r"images of shape \(1, 15, 15\).*--resolution"),
        ("--resolution 15", OURS, r"images of shape \(1, 15, 15\).*--resolution"),
        ("--resolution 28", PEERS | FOUR_LEVELS, r"images of shape \(1, 28, 28\).*--resolution"),
        ("--resolution 28", OURS | LEVELS, r"images of shape \(1, 28, 28\).*--resolution"),
    ],
)
def test_bad_input_is_named_and_nothing_is_written(run, tmp_path, flags, config, match):
    if "fp16" in flags and torch.accelerator.is_available():
        pytest.skip("a GPU can do fp16")
    more = ["--model_config_name_or_path", write_config(tmp_path, **config)] if config else []
    with pytest.raises((ValueError, OSError), match=match):
        run(flags, *more)
    assert not list(tmp_path.glob("run/*"))


def test_output_folder_that_cannot_be_written_is_named(run, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="output_dir must be writable"):
        run(output_dir=tmp_path / "file" / "run")


def test_weights_of_another_unet_are_named(run, tmp_path):
    MNISTUNet2DModel(sample_size=8, **UNET | {"layers_per_block": 2}).save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match=r"init_from must .* Without --model_config_name_or_path"):
        run("--init_from", tmp_path / "other")


# Numbers that go wrong


@pytest.mark.parametrize("micro_batches", [1, 2])
def test_gradient_that_is_not_finite_is_found_before_it_is_saved(make_trainer, micro_batches):
    """In step 7, of a loss that is finite; the checkpoint of step 8 would hold what came of it."""
    flags = "--checkpointing_steps 2 --max_train_steps 30 --save_model_epochs 1"
    flags += f" --train_batch_size {4 // micro_batches} --gradient_accumulation_steps {micro_batches}"
    trainer = make_trainer(flags)
    parameter = next(trainer.unet.parameters())
    parameter.register_hook(at_call(7 * micro_batches, lambda gradient: gradient * math.nan))
    with pytest.raises(FloatingPointError, match=r"step 7: the loss is 0\.\d+, .* norm nan.* is .*checkpoint-6\. Try"):
        trainer.train()
    assert names(trainer.output_dir / "samples") == ["step-00000006.png"]
    saved = list(all_saved_numbers(trainer.output_dir))
    assert len({path for path, _ in saved}) == 1 + 3 * 3, "the pipeline, and three files in each of three checkpoints"
    assert all(tensor.isfinite().all() for _, tensor in saved)


def test_loss_that_is_not_finite_is_found_within_ten_steps_and_the_first_one_named(make_trainer):
    trainer = make_trainer("--max_train_steps 50 --save_images_steps 0 --save_images_epochs 9 --save_model_epochs 9")
    trainer.unet.register_forward_hook(at_call(13, lambda unet, args, output: (output[0] * math.inf,)))
    with pytest.raises(FloatingPointError, match=r"step 13: the loss is inf.* The last good checkpoint is none"):
        trainer.train()
    assert (trainer.progress.n, len(losses(trainer.output_dir))) == (20, 10)
    assert not list(trainer.output_dir.glob("**/*.safetensors"))


def test_weights_that_an_update_makes_infinite_are_not_saved(run, tmp_path):
    """The loss and the gradient of the step are finite then."""
    with pytest.raises(FloatingPointError, match=r"step 1: the weights became infinite or NaN.* checkpoint is none"):
        run("--learning_rate 1e39 --lr_scheduler constant --checkpointing_steps 1")
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


def test_a_user_sees_one_line_and_not_a_traceback(monkeypatch):
    AcceleratorState._reset_state(reset_partial_state=True)
    argv = [train.__file__, "--dataset_name", "/no/such/folder", "--output_dir", "/dev/null/run"]
    monkeypatch.setattr(sys, "argv", argv)
    with pytest.raises(SystemExit, match=r"\Aerror: output_dir must be writable, got /dev/null/run"):
        runpy.run_path(train.__file__, run_name="__main__")


def test_without_the_extras_one_line_says_what_to_install():
    code = (
        "import runpy, sys\nsys.modules['accelerate'] = None\nfor path in sys.argv[1:]:\n    try:\n"
        "        runpy.run_path(path, run_name='__main__')\n    except SystemExit as error:\n        print(error)"
    )
    command = [sys.executable, "-c", code, train.__file__, minimal.__file__]
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    for line, remedy in zip(lines, ("pip install -e '.[train]'", "pip install 'mnist-ddpm[train]'"), strict=True):
        assert line.startswith("error: ")
        assert "accelerate" in line
        assert remedy in line
