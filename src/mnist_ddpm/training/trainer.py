"""A training run: set up from the flags of `train.py`, trained step by step, saved as it goes."""

import argparse
import copy
import json
import logging
import math
import time
from pathlib import Path
from typing import NoReturn

import numpy as np
import torch
from accelerate.logging import get_logger
from accelerate.utils import set_seed
from diffusers.optimization import get_scheduler
from PIL import Image
from torch import nn
from tqdm.auto import tqdm

from mnist_ddpm import MNISTDDIMScheduler, MNISTDDPMPipeline
from mnist_ddpm.data import MNIST
from mnist_ddpm.hub import check_repository, publish, publish_checkpoint, write_card
from mnist_ddpm.images import image_grid
from mnist_ddpm.training.batches import Batch, TrainingBatches
from mnist_ddpm.training.checkpoints import (
    LOG,
    SAMPLES,
    TrainLog,
    check_output_dir,
    check_settings,
    cut_back,
    explained,
    find_checkpoint,
    grid_path,
    kept_pipeline_path,
    list_checkpoints,
    move_into_place,
    partial_path,
    prune_checkpoints,
    remove,
    remove_earlier_run,
    replace_files,
    write_manifest,
    written_aside,
)
from mnist_ddpm.training.components import (
    load_images,
    load_unet_config,
    make_accelerator,
    make_ema,
    make_optimizer,
    make_scheduler,
    make_unet,
    timestep_probabilities,
)
from mnist_ddpm.training.loss import DiffusionLoss
from mnist_ddpm.training.machine import StopSignal, compile_model, set_cpu_threads

REPORT_STEPS = 10  # steps from one look at the losses to the next; a look waits for the device

# flags that a resumed run must share with the run that wrote its checkpoint
FIXED_FLAGS = (
    "seed", "prediction_type", "variance_type", "ddpm_num_steps", "ddpm_beta_schedule", "ddpm_log_snr", "loss_type",
    "timestep_sampling", "logit_mean", "logit_std", "uniform_share", "snr_gamma", "optimizer", "muon_learning_rate",
    "muon_momentum", "learning_rate", "adam_beta1", "adam_beta2", "adam_weight_decay", "adam_epsilon", "max_grad_norm",
    "use_ema", "ema_inv_gamma", "ema_power", "ema_max_decay",
)  # fmt: skip

logger = get_logger(__name__, log_level="INFO")


class Trainer:
    """One run of `train.py`.

    Raises:
        ValueError, OSError, MemoryError: what the flags ask for can't be had; nothing has been written then.
    """

    # Set-up ----------------------------------------------------------------------------------------------------------

    def __init__(self, args: argparse.Namespace):
        logging.basicConfig(format="%(message)s")
        for name in ("accelerate.accelerator", "accelerate.checkpointing"):  # a line for each file of a checkpoint
            logging.getLogger(name).setLevel(logging.WARNING)
        self.args = args
        self.output_dir = Path(args.output_dir)
        self.accelerator = accelerator = make_accelerator(args)
        if accelerator.is_main_process:
            resumes = args.resume_from_checkpoint
            goes_on_here = resumes and (
                resumes == "latest" or Path(resumes).resolve().parent == self.output_dir.resolve()
            )
            check_output_dir(self.output_dir, earlier_run_expected=bool(args.overwrite_output_dir or goes_on_here))
            if args.push_to_hub:
                name = args.hub_model_id or self.output_dir.resolve().name
                private = args.hub_private_repo or None  # or as the namespace has it
                self.repo_id = check_repository(name, token=args.hub_token, private=private)
        threads = set_cpu_threads()
        set_seed(args.seed)

        unet_config = load_unet_config(args)
        images = load_images(args, accelerator, channels=unet_config.get("in_channels"))
        self.num_images = len(images)
        self.batch_size = args.train_batch_size * accelerator.num_processes * args.gradient_accumulation_steps
        self.total_steps = args.max_train_steps or math.ceil(args.num_epochs * self.num_images / self.batch_size)
        probabilities = timestep_probabilities(args)
        self.batches = TrainingBatches(images, self.batch_size, probabilities, args.seed, accelerator.device)

        self.scheduler = make_scheduler(args)
        self.loss = DiffusionLoss(self.scheduler, args.snr_gamma, accelerator.device, args.loss_type, probabilities)
        unet = make_unet(unet_config, images, args.variance_type)
        unet = unet.to(accelerator.device, memory_format=torch.channels_last)
        # what gets saved and sampled from, without dropout
        self.pipeline = MNISTDDPMPipeline(unet=copy.deepcopy(unet).eval(), scheduler=self.scheduler)
        self.ema = make_ema(unet, args)
        optimizer = make_optimizer(unet, args)
        # not prepared by Accelerate, which would step it once for each process
        self.lr_scheduler = get_scheduler(
            args.lr_scheduler, optimizer, num_warmup_steps=args.lr_warmup_steps, num_training_steps=self.total_steps
        )
        self.unet, self.optimizer = accelerator.prepare(unet, optimizer)
        accelerator.register_for_checkpointing(*filter(None, [self.lr_scheduler, self.ema]))

        unet_settings = {key: value for key, value in unet.config.items() if not key.startswith("_")}
        self.settings = {f"--{name}": getattr(args, name) for name in FIXED_FLAGS} | {
            "images": list(images.shape),
            "images per step": self.batch_size,
            "U-Net": json.loads(json.dumps(unet_settings)),  # as it will be read from a checkpoint
        }
        checkpoint, self.first_step = self._find_checkpoint()
        self.compiled_unet, compilation = compile_model(
            self.unet, args.compile, self.total_steps - self.first_step, accelerator.device, try_out=self._try_out
        )
        if checkpoint:
            accelerator.load_state(str(checkpoint))
            if self.ema:
                self.ema.to(accelerator.device)
        self.unreported: list[tuple[float, torch.Tensor]] = []  # learning rate; loss and gradient norm, on the device
        with explained(self.output_dir):
            self._open_logs()
        logger.info(
            f"{self.num_images:,} images of shape {tuple(images.shape[1:])} on {images.device}, U-Net of "
            f"{sum(p.numel() for p in unet.parameters()):,} parameters, steps {self.first_step:,} to "
            f"{self.total_steps:,} of {self.batch_size} images"
        )
        logger.info(
            f"Device {accelerator.device}, {accelerator.num_processes} process(es), {threads}, mixed precision "
            f"{accelerator.mixed_precision}, torch.compile {compilation}"
        )

    def _find_checkpoint(self) -> tuple[Path | None, int]:
        """The checkpoint to resume from, if the flags ask for one and it is there, and the steps done."""
        if self.args.resume_from_checkpoint is None:
            return None, 0
        found = find_checkpoint(self.args.resume_from_checkpoint, self.output_dir)
        if found is None:
            logger.info(f"There is no checkpoint in {self.output_dir} yet: starting a new run")
            return None, 0
        checkpoint, manifest = found
        check_settings(manifest["settings"], self.settings, checkpoint)
        logger.info(f"Resuming from {checkpoint}")
        return checkpoint, manifest["step"]

    def _try_out(self, unet: nn.Module) -> None:
        """Run `unet` forward and backward on a batch, and leave no trace."""
        batch = self._micro_batches(step=0)[0]
        self.accelerator.backward(self.loss(unet, batch))
        self.optimizer.zero_grad()

    def _open_logs(self) -> None:
        """Open the log and the tracker, both cut back to the first step."""
        if self.accelerator.is_main_process:
            if self.args.overwrite_output_dir:
                remove_earlier_run(self.output_dir)
            cut_back(self.output_dir, self.first_step)
            self.log = TrainLog(self.output_dir / LOG, self.first_step)
        kwargs = {"tensorboard": {"purge_step": self.first_step + 1}} if self.args.logger == "tensorboard" else {}
        config = {name: str(value) if isinstance(value, list) else value for name, value in self._flags().items()}
        self.accelerator.init_trackers("train", config=config, init_kwargs=kwargs)

    # Training --------------------------------------------------------------------------------------------------------

    def train(self) -> None:
        """Train to the last step, or until SIGINT or SIGTERM; publish the pipeline if asked to.

        Raises:
            FloatingPointError: a number is not finite; the last good checkpoint is kept.
            OSError: the output folder can't be written to; the last checkpoint is kept.
        """
        with explained(self.output_dir):
            with StopSignal() as self.stop_signal, self._progress_bar() as self.progress:
                stopping = self._train()
            self.accelerator.end_training()
            if self.accelerator.is_main_process:
                self._finish(stopping)

    def _train(self) -> bool:
        """Train to the last step, or until a signal to stop; returns whether there was one."""
        self._restart_clock(self.first_step)
        stopping = self._make_up_for_images()
        for step in range(self.first_step, self.total_steps):
            if stopping:
                break
            self.training_step(step)
            done = step + 1
            self.progress.update()

            if self._images_due(done):
                self._report(done)  # stops the run where a number is not finite, before that is saved
                self._save_images(done)
            stopping = self._agree_to_stop(done)
            pipeline_due = stopping or self._every_epochs(self.args.save_model_epochs, done)
            kept_pipeline_due = self._completes_epochs(self.args.keep_model_epochs, done)
            checkpoint_due = stopping or done == self.total_steps or done % self.args.checkpointing_steps == 0
            if done % REPORT_STEPS == 0 or pipeline_due or kept_pipeline_due or checkpoint_due:
                self._report(done)
            if pipeline_due:
                self._save_pipeline()
            if kept_pipeline_due:
                self._keep_pipeline(done)
            if checkpoint_due:
                self._save_checkpoint(done)
            if checkpoint_due and not stopping:
                self._push_checkpoint(done)
        return stopping

    def training_step(self, step: int) -> None:
        """One optimizer step, without a wait for the device."""
        losses = []
        for batch in self._micro_batches(step):
            with self.accelerator.accumulate(self.unet):
                loss = self.loss(self.compiled_unet, batch)
                self.accelerator.backward(loss)
                losses.append(loss.detach())
                if self.accelerator.sync_gradients:
                    grad_norm = self.accelerator.clip_grad_norm_(self.unet.parameters(), self.args.max_grad_norm)
                self.optimizer.step()
                self.optimizer.zero_grad()
        figures = torch.stack([torch.stack(losses).mean(), grad_norm])
        self.unreported.append((self.lr_scheduler.get_last_lr()[0], figures))
        self.lr_scheduler.step()
        if self.ema:
            self.ema.step(self.unet.parameters())

    def _micro_batches(self, step: int) -> list[Batch]:
        """This process's share of a step."""
        return self.batches.micro_batches(
            step,
            self.args.gradient_accumulation_steps,
            self.accelerator.process_index,
            self.accelerator.num_processes,
        )

    # When ------------------------------------------------------------------------------------------------------------

    def _agree_to_stop(self, done: int) -> bool:
        """Whether to stop; several processes ask each other now and then, so that all stop at the same step."""
        stop = self.stop_signal.received
        if self.accelerator.num_processes == 1:
            return stop
        if done % REPORT_STEPS and not self._images_due(done):
            return False
        return self.accelerator.reduce(torch.tensor(float(stop), device=self.accelerator.device)).item() > 0

    def _images_due(self, done: int) -> bool:
        """At the ends of epochs, and in the first epoch after s, 2 s, 4 s, ... steps."""
        if self._every_epochs(self.args.save_images_epochs, done):
            return True
        in_first_epoch = done * self.batch_size < self.num_images
        multiple, rest = divmod(done, self.args.save_images_steps) if self.args.save_images_steps else (0, 0)
        return in_first_epoch and rest == 0 and multiple.bit_count() == 1

    def _every_epochs(self, epochs: int, done: int) -> bool:
        """Whether the last step completed this many epochs, or that many again; always at the end of the run."""
        return done == self.total_steps or self._completes_epochs(epochs, done)

    def _completes_epochs(self, epochs: int | None, done: int) -> bool:
        """Whether the last step completed a multiple of this many epochs; never where there is no number."""
        if epochs is None:
            return False
        period = epochs * self.num_images
        return done * self.batch_size // period > (done - 1) * self.batch_size // period

    # Reporting and saving --------------------------------------------------------------------------------------------

    def _progress_bar(self) -> tqdm:
        """The one progress bar, on the main process."""
        main = self.accelerator.is_main_process
        return tqdm(total=self.total_steps, initial=self.first_step, unit="step", disable=not main, dynamic_ncols=True)

    def _restart_clock(self, done: int) -> None:
        """Measure images per second from here on."""
        self.clock = (time.perf_counter(), done)

    def _report(self, done: int) -> None:
        """Log the steps up to `done` that have not been reported yet.

        Raises:
            FloatingPointError: a loss, a gradient or a weight is not finite.
        """
        if not self.unreported:
            return
        rates, figures = zip(*self.unreported, strict=True)
        self.unreported = []
        means = self.accelerator.reduce(torch.stack(figures), reduction="mean").tolist()
        records = [
            {"step": step, "loss": loss, "grad_norm": grad_norm, "lr": rate}
            for step, (loss, grad_norm), rate in zip(range(done - len(means) + 1, done + 1), means, rates, strict=True)
        ]
        for record in records:
            self._check_finite(record)
        self._check_weights(done)
        if self.accelerator.is_main_process:
            self.log.write(records)
        start, start_step = self.clock
        summary = {
            "loss": sum(loss for loss, _ in means) / len(means),
            "grad_norm": records[-1]["grad_norm"],
            "lr": records[-1]["lr"],
            "images_per_second": (done - start_step) * self.batch_size / (time.perf_counter() - start),
        }
        self.accelerator.log(summary, step=done)
        self.progress.set_postfix(loss=f"{summary['loss']:.4f}", img_per_s=f"{summary['images_per_second']:.0f}")
        self._restart_clock(done)

    def _check_finite(self, record: dict[str, float]) -> None:
        """Raise if the loss or the gradient of a step is not finite.

        In fp16 a gradient overflows now and then; its step is skipped, and the scale halved, but hardly ever below 1.
        """
        scaler = self.accelerator.scaler
        finite = math.isfinite(record["grad_norm"]) or (scaler is not None and scaler.get_scale() >= 1)
        if math.isfinite(record["loss"]) and finite:
            return
        self._stop_at(record["step"], f"the loss is {record['loss']}, the gradient's norm {record['grad_norm']}")

    def _check_weights(self, done: int) -> None:
        """Raise if the weights are not finite: an update may overflow where loss and gradient did not."""
        if not torch.stack([weight.isfinite().all() for weight in self.unet.state_dict().values()]).all():
            self._stop_at(done, "the weights became infinite or NaN")

    def _stop_at(self, step: int, reason: str) -> NoReturn:
        """Raise, with the step, the checkpoint to go back to, and the remedy."""
        checkpoints = list_checkpoints(self.output_dir)
        raise FloatingPointError(
            f"step {step}: {reason}. The last good checkpoint is {checkpoints[-1] if checkpoints else 'none'}. Try a "
            "lower --learning_rate, a lower --max_grad_norm, or --mixed_precision no."
        )

    def published_pipeline(self) -> MNISTDDPMPipeline:
        """The pipeline with the weights as they are to be saved: averaged, if there is an average."""
        parameters = self.pipeline.unet.parameters()
        if self.ema:
            self.ema.copy_to(parameters)
        else:
            self.pipeline.unet.load_state_dict(self.accelerator.unwrap_model(self.unet).state_dict())
        return self.pipeline

    def _make_up_for_images(self) -> bool:
        """Save the images that a signal to stop had cut off; returns whether there is one again."""
        done = self.first_step
        if done == 0 or not self._images_due(done):
            return False
        if not grid_path(self.output_dir, done).exists():
            self._save_images(done)
        return self._agree_to_stop(done)

    def _save_images(self, done: int) -> None:
        """Save a grid of sampled images, and send it to the tracker; not if a signal to stop comes."""
        if self.accelerator.is_main_process and (grid := self._sample_grid()):
            save_image(grid, self.output_dir / SAMPLES)
            save_image(grid, grid_path(self.output_dir, done))  # last, as it tells that all is done
            for tracker in self.accelerator.trackers:
                kwargs = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
                tracker.log_images({"samples": np.asarray(grid.convert("RGB"))[None]}, step=done, **kwargs)
        self._restart_clock(done)

    def _sample_grid(self, stoppable: bool = True) -> Image.Image | None:
        """Images from the same noise each time, by DDIM, which needs far fewer steps than DDPM.

        If it is stoppable, None once there is a signal to stop.
        """
        # DDIM takes no learned variance, and without noise needs none
        scheduler = MNISTDDIMScheduler.from_config(self.scheduler.config, variance_type="fixed_small")
        pipeline = MNISTDDPMPipeline(unet=self.published_pipeline().unet, scheduler=scheduler)
        pipeline.set_progress_bar_config(disable=True)
        generator = torch.Generator().manual_seed(self.args.seed)

        def heed_signal(run: MNISTDDPMPipeline, *step: object) -> dict[str, torch.Tensor]:
            run._interrupt = stoppable and self.stop_signal.received
            return {}

        images = pipeline(
            self.args.eval_batch_size,
            generator,
            num_inference_steps=self.args.ddpm_num_inference_steps,
            callback_on_step_end=heed_signal,
        ).images
        return None if stoppable and self.stop_signal.received else image_grid(images)

    def _save_pipeline(self) -> None:
        """Save the pipeline, so that at any moment either the old one or the new one is there."""
        if self.accelerator.is_main_process:
            partial = partial_path(self.output_dir / "pipeline")
            remove(partial)
            self.published_pipeline().save_pretrained(partial)
            replace_files(partial, self.output_dir, last="model_index.json")

    def _keep_pipeline(self, done: int) -> None:
        """Save the pipeline under the number of its step, where no later one takes its place."""
        if self.accelerator.is_main_process:
            path = kept_pipeline_path(self.output_dir, done)
            path.parent.mkdir(exist_ok=True)
            with written_aside(path) as partial:
                self.published_pipeline().save_pretrained(partial)

    def _save_checkpoint(self, done: int) -> None:
        """Save all that it takes to go on from here: weights, average, optimizer, step."""
        checkpoint = self.output_dir / f"checkpoint-{done}"
        partial = partial_path(checkpoint)
        if self.accelerator.is_main_process:
            self.log.flush()
            remove(partial)
        self.accelerator.wait_for_everyone()
        try:
            self.accelerator.save_state(str(partial))
        except RuntimeError as error:  # what torch.save raises when it can't write
            raise OSError(str(error)) from error
        self.accelerator.wait_for_everyone()
        if self.accelerator.is_main_process:
            write_manifest(partial, done, self.settings)
            move_into_place(partial, checkpoint)
            prune_checkpoints(self.output_dir, self.args.checkpoints_total_limit)
        self._restart_clock(done)

    def _push_checkpoint(self, done: int) -> None:
        """Publish a checkpoint if asked to; where that fails, training goes on."""
        strategy = self.args.hub_strategy
        if not (self.args.push_to_hub and strategy != "end" and self.accelerator.is_main_process):
            return
        name = "last-checkpoint" if strategy == "checkpoint" else None
        try:
            checkpoint = self.output_dir / f"checkpoint-{done}"
            publish_checkpoint(checkpoint, self.repo_id, name, token=self.args.hub_token)
        except RuntimeError as error:
            logger.warning(f"Training goes on, but {error}")
        self._restart_clock(done)

    def _finish(self, stopped: bool) -> None:
        """Complete the folder, say what there is now, and publish it if asked to."""
        if stopped:
            logger.info("Stopped early. The same command with --resume_from_checkpoint latest goes on from here.")
        if not (self.output_dir / "model_index.json").exists():  # resumed at its last step, in a folder that was empty
            self._save_pipeline()
        if not (self.output_dir / SAMPLES).exists() and (grid := self._sample_grid(stoppable=False)):
            save_image(grid, self.output_dir / SAMPLES)  # stopped before the first images were due
        write_card(self.output_dir, dataset=self._dataset_id(), command=self.args.command, parameters=self._flags())
        logger.info(f"The pipeline is in {self.output_dir}, its latest samples in {self.output_dir / SAMPLES}")
        if not stopped and self.args.push_to_hub:
            url = publish(self.output_dir, self.repo_id, token=self.args.hub_token)
            logger.info(f"Published: {url}")

    def _dataset_id(self) -> str | None:
        """The Hub id of the data set, if it has one: what is here in `data/mnist` is a copy of that set."""
        name = self.args.dataset_name
        if name == MNIST:
            return "ylecun/mnist"
        return None if Path(name).exists() else name

    def _flags(self) -> dict[str, object]:
        """The flags to keep beside the results; the token isn't one of them."""
        left_out = ("command", "hub_token")
        return {name: value for name, value in vars(self.args).items() if name not in left_out and value is not None}


def save_image(image: Image.Image, path: Path) -> None:
    """Save an image as PNG, whole or not at all."""
    path.parent.mkdir(exist_ok=True)
    with written_aside(path) as partial:
        image.save(partial, format="PNG")
