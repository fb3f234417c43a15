"""A training run: set up from its arguments, trained step by step, saved as it goes."""

import copy
import json
import logging
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

import torch
from accelerate.utils import set_seed
from diffusers.training_utils import EMAModel
from torch import nn
from tqdm.auto import tqdm

from mnist_ddpm import MNISTDDPMPipeline, MNISTDDPMScheduler
from mnist_ddpm.likelihood import log_snr_betas
from mnist_ddpm.training.arguments import FIXED, SCHEDULE, TrainingArguments, require
from mnist_ddpm.training.batches import Batch, TrainingBatches, load_images, timestep_probabilities
from mnist_ddpm.training.checkpoints import (
    check_settings,
    explain_write_errors,
    find_checkpoint,
    grid_path,
    list_checkpoints,
)
from mnist_ddpm.training.loss import DiffusionLoss
from mnist_ddpm.training.machine import StopSignal, compile_model, make_accelerator, set_cpu_threads
from mnist_ddpm.training.model import load_unet_config, make_unet
from mnist_ddpm.training.optimizers import learning_rate_factor, make_optimizer
from mnist_ddpm.training.outputs import Outputs

REPORT_STEPS = 10  # steps from one look at the losses to the next; a look waits for the device

logger = logging.getLogger(__name__)


# the loss of a U-Net on a micro-batch, a float32 scalar; further networks get their gradients from it too
Objective = Callable[[Any, Any], torch.Tensor]


class Trainer:
    """A training run. Another objective is a subclass with its own `make_...` methods.

    Args:
        args: what to train on, how, and where to save it.

    Raises:
        ValueError, OSError, MemoryError: what the arguments ask for can't be had; nothing has been written then.

    Example:
        `Trainer(TrainingArguments(output_dir="digits", num_epochs=1)).train()`
    """

    fixed: tuple[str, ...] = FIXED  # arguments that a resumed run must share with the run that wrote its checkpoint

    # Set-up ----------------------------------------------------------------------------------------------------------

    def __init__(self, args: TrainingArguments):
        logging.basicConfig(format="%(message)s")
        for name in ("accelerate.accelerator", "accelerate.checkpointing"):  # a line for each file of a checkpoint
            logging.getLogger(name).setLevel(logging.WARNING)
        self.args = args
        self.output_dir = Path(args.output_dir)
        self.accelerator = accelerator = make_accelerator(args)
        level = logging.INFO if accelerator.is_main_process else logging.ERROR
        logging.getLogger("mnist_ddpm.training").setLevel(level)
        self.outputs = Outputs(args, accelerator)
        threads = set_cpu_threads()
        set_seed(args.seed)

        unet_config = load_unet_config(args)
        channels = args.channels or unet_config.get("in_channels")
        images, labels, id2label = load_images(args, accelerator, channels)
        self.num_images = len(images)
        self.batch_size: int = args.train_batch_size * accelerator.num_processes * args.gradient_accumulation_steps
        self.total_steps = args.max_train_steps or math.ceil(args.num_epochs * self.num_images / self.batch_size)
        self.images, self.labels, self.num_classes = images, labels, len(id2label)
        self.scheduler = self.make_scheduler()
        unet = make_unet(unet_config, images, args, self.scheduler, len(id2label) or None)
        unet = unet.to(accelerator.device, memory_format=torch.channels_last)
        optimizer = make_optimizer(unet, args)
        self.further_networks: list[nn.Module] = []  # what is trained besides the U-Net
        self.further_settings: dict[str, Any] = {}  # what a resumed run must share besides `fixed`
        self.loss = self.make_objective(unet, optimizer)
        # what gets saved and sampled from, without dropout
        published_unet = copy.deepcopy(unet).eval()
        self.pipeline = MNISTDDPMPipeline(unet=published_unet, scheduler=self.make_sampler(), id2label=id2label)
        self.ema = self._make_ema(unet) if args.use_ema else None
        self.learning_rates = [group["lr"] for group in optimizer.param_groups]
        self.unet, self.optimizer, *_ = accelerator.prepare(unet, optimizer, *self.further_networks)
        accelerator.register_for_checkpointing(*filter(None, [self.ema]))

        settings = {name: getattr(args, name) for name in self.fixed} | {
            "images": images.shape,
            "images per step": self.batch_size,
            "U-Net": {key: value for key, value in unet.config.items() if not key.startswith("_")},
            **self.further_settings,
        }
        self.settings = json.loads(json.dumps(settings))  # as they will be read from a checkpoint
        self.schedule = {name: getattr(args, name) for name in SCHEDULE} | {"max_train_steps": self.total_steps}
        checkpoint, self.first_step = self._find_checkpoint()
        self.compiled_unet, compilation = compile_model(
            self.unet, args.compile, self.total_steps - self.first_step, accelerator.device, try_out=self._try_out
        )
        if checkpoint:
            accelerator.load_state(str(checkpoint))
            if self.ema:
                self.ema.to(accelerator.device)
        self.unreported: list[tuple[float, torch.Tensor]] = []  # learning rate; loss and gradient norm, on the device
        self.outputs.open(self.first_step)
        origin = f"weights from {args.init_from}" if args.init_from else "new weights (--init_from takes saved ones)"
        logger.info(
            f"{self.num_images:,} images of shape {tuple(images.shape[1:])} on {images.device}, U-Net of "
            f"{sum(p.numel() for p in unet.parameters()):,} parameters with "
            f"{'saved weights' if checkpoint else origin}, steps {self.first_step:,} to "
            f"{self.total_steps:,} of {self.batch_size} images"
        )
        logger.info(
            f"Device {accelerator.device}, {accelerator.num_processes} process(es), {threads}, mixed precision "
            f"{accelerator.mixed_precision}, torch.compile {compilation}"
        )

    def make_scheduler(self) -> Any:
        """The scheduler that adds the noise."""
        args = self.args
        betas = log_snr_betas(args.ddpm_num_steps, *args.ddpm_log_snr).tolist() if args.ddpm_log_snr else None
        return MNISTDDPMScheduler(
            num_train_timesteps=args.ddpm_num_steps,
            beta_schedule=args.ddpm_beta_schedule,
            trained_betas=betas,
            prediction_type=args.prediction_type,
            variance_type=args.variance_type,
            # v needs no clipping, which lifts black pixels (docs/theory.md); the bound is that of a clipped x0_hat
            clip_sample=args.prediction_type != "v_prediction" or args.loss_type != "simple",
        )

    def make_sampler(self) -> Any:
        """The scheduler that the pipeline is saved with."""
        return self.scheduler

    def make_objective(self, unet: nn.Module, optimizer: torch.optim.Optimizer) -> Objective:
        """What is minimized; makes its batches too, and gives `further_networks` to the optimizer if there are any."""
        p = timestep_probabilities(self.args)
        self.batches = self.make_batches(p)
        return DiffusionLoss(self.scheduler, self.args.snr_gamma, self.accelerator.device, self.args.loss_type, p)

    def make_batches(self, p: torch.Tensor, stream: int = 0) -> TrainingBatches:
        """Batches with timesteps of probabilities p, `(T,)`; those of other streams are independent of each other."""
        args, device = self.args, self.accelerator.device
        labels = (self.labels, self.num_classes, args.label_dropout)
        return TrainingBatches(self.images, self.batch_size, p, args.seed, device, args.random_flip, *labels, stream)

    def _make_ema(self, unet: nn.Module) -> EMAModel:
        """The moving average of the weights, of decay `1 - (1 + step / inv_gamma) ** -power` up to the maximum."""
        return EMAModel(
            unet.parameters(),
            decay=self.args.ema_max_decay,
            use_ema_warmup=True,
            inv_gamma=self.args.ema_inv_gamma,
            power=self.args.ema_power,
            foreach=True,
        )

    def _find_checkpoint(self) -> tuple[Path | None, int]:
        """The checkpoint to resume from, if the arguments ask for one and it is there, and the steps done."""
        if self.args.resume_from_checkpoint is None:
            return None, 0
        found = find_checkpoint(self.args.resume_from_checkpoint, self.output_dir)
        if found is None:
            logger.info(f"There is no checkpoint in {self.output_dir} yet: starting a new run")
            return None, 0
        checkpoint, manifest = found
        logger.info(f"Resuming from {checkpoint}")
        check_settings(manifest["settings"], self.settings, checkpoint)
        done: int = manifest["step"]
        require(
            done <= self.total_steps,
            f"max_train_steps must be at least {done}, the steps that {checkpoint} has done",
            self.total_steps,
            "Raise --max_train_steps or --num_epochs.",
        )
        before = manifest["schedule"]
        changes = [f"{name} {before[name]} -> {now}" for name, now in self.schedule.items() if before[name] != now]
        if changes:
            logger.info(f"The schedule of the learning rate changed: {', '.join(changes)}")
        return checkpoint, done

    def _try_out(self, unet: nn.Module) -> None:
        """Run `unet` forward and backward on a batch, and leave no trace."""
        batch = self.micro_batches(step=0)[0]
        try:
            self.accelerator.backward(self.loss(unet, batch))
        finally:
            self.optimizer.zero_grad()

    # Training --------------------------------------------------------------------------------------------------------

    def train(self) -> None:
        """Train to the last step, or until SIGINT or SIGTERM; publish the pipeline if asked to.

        Raises:
            FloatingPointError: a number is not finite; the last good checkpoint is kept.
            OSError: the output folder can't be written to; the last checkpoint is kept.
        """
        with explain_write_errors(self.output_dir):
            with StopSignal() as self.stop_signal, self._progress_bar() as self.progress:
                stopping = self._train()
            self.outputs.finish(self.published_pipeline(), stopped=stopping)

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
            stopping = self.should_stop(done)
            pipeline_due = stopping or self._every_epochs(self.args.save_model_epochs, done)
            kept_pipeline_due = self._completes_epochs(self.args.keep_model_epochs, done)
            checkpoint_due = stopping or done == self.total_steps or done % self.args.checkpointing_steps == 0
            if done % REPORT_STEPS == 0 or pipeline_due or kept_pipeline_due or checkpoint_due:
                self._report(done)
            if pipeline_due:
                self.outputs.save_pipeline(self.published_pipeline())
            if kept_pipeline_due:
                self.outputs.keep_pipeline(self.published_pipeline(), done)
            if checkpoint_due:
                self.outputs.save_checkpoint(done, self.settings, self.schedule)
                if not stopping:
                    self.outputs.push_checkpoint(done)
                self._restart_clock(done)
        return stopping

    def training_step(self, step: int) -> None:
        """One optimizer step, without a wait for the device."""
        factor = learning_rate_factor(step, self.total_steps, self.args)
        for group, rate in zip(self.optimizer.param_groups, self.learning_rates, strict=True):
            group["lr"] = rate * factor
        losses = []
        for batch in self.micro_batches(step):
            with self.accelerator.accumulate(self.unet):
                loss = self.loss(self.compiled_unet, batch)
                self.accelerator.backward(loss)
                losses.append(loss.detach())
                if self.accelerator.sync_gradients:
                    grad_norm = self.accelerator.clip_grad_norm_(self.unet.parameters(), self.args.max_grad_norm)
                self.optimizer.step()
                self.optimizer.zero_grad()
        figures = torch.stack([torch.stack(losses).mean(), grad_norm])
        self.unreported.append((self.learning_rates[0] * factor, figures))
        if self.ema:
            self.ema.step(self.unet.parameters())

    def micro_batches(self, step: int) -> Sequence[Any]:
        """This process's share of a step, as the objective takes it."""
        return self._share(self.batches, step)

    def _share(self, batches: TrainingBatches, step: int) -> list[Batch]:
        """This process's share of a step of these batches."""
        return batches.micro_batches(
            step,
            self.args.gradient_accumulation_steps,
            self.accelerator.process_index,
            self.accelerator.num_processes,
        )

    # When ------------------------------------------------------------------------------------------------------------

    def should_stop(self, done: int) -> bool:
        """Whether to stop; several processes ask each other now and then, so that all stop at the same step."""
        stop = self.stop_signal.received
        if self.accelerator.num_processes == 1:
            return stop
        if done % REPORT_STEPS and not self._images_due(done):
            return False
        return bool(self.accelerator.reduce(torch.tensor(float(stop), device=self.accelerator.device)).item())

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
            self.outputs.log.write(records)
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

    def _stop_at(self, step: float, reason: str) -> NoReturn:
        """Raise, with the step, the checkpoint to go back to, and the remedy."""
        checkpoints = list_checkpoints(self.output_dir)
        raise FloatingPointError(
            f"step {step}: {reason}. The last good checkpoint is {checkpoints[-1] if checkpoints else 'none'}. Try a "
            "lower --learning_rate, a lower --max_grad_norm, or --mixed_precision no."
        )

    def published_pipeline(self) -> MNISTDDPMPipeline:
        """The pipeline with the weights that are saved: the EMA, if there is one."""
        parameters = self.pipeline.unet.parameters()
        if self.ema:
            self.ema.copy_to(parameters)
        else:
            unet = self.accelerator.unwrap_model(self.unet, keep_torch_compile=False)
            self.pipeline.unet.load_state_dict(unet.state_dict())
        return self.pipeline

    def _make_up_for_images(self) -> bool:
        """Save the images that a signal to stop had cut off; returns whether there is one again."""
        done = self.first_step
        if done == 0 or not self._images_due(done):
            return False
        if not grid_path(self.output_dir, done).exists():
            self._save_images(done)
        return self.should_stop(done)

    def _save_images(self, done: int) -> None:
        """Save a grid of sampled images."""
        self.outputs.save_images(self.published_pipeline(), done, lambda: self.stop_signal.received)
        self._restart_clock(done)
