"""What a run writes: images, pipelines, checkpoints, its log, and what goes to trackers and to the Hub."""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from PIL import Image

from mnist_ddpm import MNISTDDPMPipeline
from mnist_ddpm.data import MNIST
from mnist_ddpm.hub import check_repository, publish, publish_checkpoint, write_card
from mnist_ddpm.images import image_grid
from mnist_ddpm.sampling import is_few_step, make_scheduler
from mnist_ddpm.training.arguments import TrainingArguments, arguments
from mnist_ddpm.training.checkpoints import (
    LOG,
    SAMPLES,
    TrainLog,
    atomic_write,
    check_output_dir,
    checkpoint_path,
    cut_back,
    explain_write_errors,
    grid_path,
    kept_pipeline_path,
    move_into_place,
    partial_path,
    prune_checkpoints,
    remove,
    remove_earlier_run,
    replace_files,
    save_image,
    write_manifest,
)

logger = logging.getLogger(__name__)


class Outputs:
    """The output folder of a run, its trackers and its repository; each file is written by the main process.

    Args:
        args: the run's arguments.
        accelerator: the run's Accelerator, which the trackers belong to.

    Raises:
        ValueError, OSError: the output folder can't be used.
        RuntimeError: the repository can't be pushed to.
    """

    def __init__(self, args: TrainingArguments, accelerator: Accelerator):
        self.args = args
        self.accelerator = accelerator
        self.is_main = accelerator.is_main_process
        self.folder = folder = Path(args.output_dir)
        if not self.is_main:
            return
        resumes = args.resume_from_checkpoint
        resumes_here = resumes == "latest" or (
            resumes and checkpoint_path(resumes, folder).resolve().parent == folder.resolve()
        )
        check_output_dir(folder, earlier_run_expected=bool(args.overwrite_output_dir or resumes_here))
        if args.push_to_hub:
            name = args.hub_model_id or folder.resolve().name
            private = args.hub_private_repo or None  # or as the namespace has it
            self.repo_id = check_repository(name, token=args.hub_token, private=private)

    def open(self, first_step: int) -> None:
        """Open the log and the tracker, both cut back to the first step."""
        if self.is_main:
            with explain_write_errors(self.folder):
                if self.args.overwrite_output_dir:
                    remove_earlier_run(self.folder)
                cut_back(self.folder, first_step)
                self.log = TrainLog(self.folder / LOG, first_step)
        kwargs = {"tensorboard": {"purge_step": first_step + 1}} if self.args.logger == "tensorboard" else {}
        config = {
            name: str(value) if isinstance(value, list | tuple) else value for name, value in self._shown().items()
        }
        self.accelerator.init_trackers("train", config=config, init_kwargs=kwargs)

    def save_images(self, pipeline: MNISTDDPMPipeline, done: int, interrupted: Callable[[], bool]) -> None:
        """Save a grid of sampled images, and send it to the tracker; not if a signal to stop comes."""
        if self.is_main and (grid := self._sample_grid(pipeline, interrupted)):
            save_image(grid, self.folder / SAMPLES)
            save_image(grid, grid_path(self.folder, done))  # last, as it tells that all is done
            for tracker in self.accelerator.trackers:
                kwargs = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
                tracker.log_images({"samples": np.asarray(grid.convert("RGB"))[None]}, step=done, **kwargs)

    def _sample_grid(self, pipeline: MNISTDDPMPipeline, interrupted: Callable[[], bool]) -> Image.Image | None:
        """Images from the same noise each time, by DDIM, which needs fewer steps than DDPM; None if interrupted.

        A few-step pipeline keeps its own scheduler. Where there are classes, each has a column.
        """
        scheduler = pipeline.scheduler
        if not is_few_step(scheduler):
            scheduler = make_scheduler("ddim", scheduler.config)
        pipeline = MNISTDDPMPipeline(unet=pipeline.unet, scheduler=scheduler)
        pipeline.set_progress_bar_config(disable=True)
        generator = torch.Generator().manual_seed(self.args.seed)

        def heed_signal(run: MNISTDDPMPipeline, *step: object) -> dict[str, torch.Tensor]:
            run._interrupt = interrupted()
            return {}

        count, classes = self.args.eval_batch_size, pipeline.unet.config.get("num_class_embeds")
        output: Any = pipeline(
            count,
            generator,
            num_inference_steps=self.args.ddpm_num_inference_steps,
            class_labels=torch.arange(count) % classes if classes else None,
            callback_on_step_end=heed_signal,
        )
        return None if interrupted() else image_grid(output.images, classes and min(classes, count))

    def save_pipeline(self, pipeline: MNISTDDPMPipeline) -> None:
        """Save the pipeline, so that at any moment either the old one or the new one is there."""
        if self.is_main:
            partial = partial_path(self.folder / "pipeline")
            remove(partial)
            pipeline.save_pretrained(partial)
            replace_files(partial, self.folder, last="model_index.json")

    def keep_pipeline(self, pipeline: MNISTDDPMPipeline, done: int) -> None:
        """Save the pipeline under the number of its step, where no later one takes its place."""
        if self.is_main:
            path = kept_pipeline_path(self.folder, done)
            path.parent.mkdir(exist_ok=True)
            with atomic_write(path) as partial:
                pipeline.save_pretrained(partial)

    def save_checkpoint(self, done: int, settings: dict[str, Any], schedule: dict[str, Any]) -> None:
        """Save all that it takes to resume here: weights, EMA, optimizer, step."""
        checkpoint = self.folder / f"checkpoint-{done}"
        partial = partial_path(checkpoint)
        if self.is_main:
            self.log.flush()
            remove(partial)
        self.accelerator.wait_for_everyone()
        try:
            self.accelerator.save_state(str(partial))
        except RuntimeError as error:  # what torch.save raises when it can't write
            raise OSError(str(error)) from error
        self.accelerator.wait_for_everyone()
        if self.is_main:
            write_manifest(partial, done, settings, schedule)
            move_into_place(partial, checkpoint)
            prune_checkpoints(self.folder, self.args.checkpoints_total_limit)

    def push_checkpoint(self, done: int) -> None:
        """Publish a checkpoint if asked to; where that fails, training continues."""
        strategy = self.args.hub_strategy
        if not (self.args.push_to_hub and strategy != "end" and self.is_main):
            return
        name = "last-checkpoint" if strategy == "checkpoint" else None
        try:
            publish_checkpoint(self.folder / f"checkpoint-{done}", self.repo_id, name, token=self.args.hub_token)
        except RuntimeError as error:
            logger.warning(f"Training continues, but {error}")

    def finish(self, pipeline: MNISTDDPMPipeline, stopped: bool) -> None:
        """Complete the folder, say what there is now, and publish it if asked to."""
        self.accelerator.end_training()
        if not self.is_main:
            return
        if stopped:
            logger.info("Stopped early. The same command with --resume_from_checkpoint latest resumes here.")
        if not (self.folder / "model_index.json").exists():  # resumed at its last step, in a folder that was empty
            self.save_pipeline(pipeline)
        if not (self.folder / SAMPLES).exists() and (grid := self._sample_grid(pipeline, lambda: False)):
            save_image(grid, self.folder / SAMPLES)  # stopped before the first images were due
        write_card(
            self.folder,
            dataset=self._dataset_id(),
            command=self.args.command,
            parameters=self._shown(),
        )
        logger.info(f"The pipeline is in {self.folder}, its latest samples in {self.folder / SAMPLES}")
        if not stopped and self.args.push_to_hub:
            url = publish(self.folder, self.repo_id, token=self.args.hub_token)
            logger.info(f"Published: {url}")

    def _dataset_id(self) -> str | None:
        """The Hub id of the data set, if it has one: what is here in `data/mnist` is a copy of that set."""
        name = self.args.dataset_name
        if name == MNIST:
            return "ylecun/mnist"
        return None if Path(name).exists() else name

    def _shown(self) -> dict[str, Any]:
        """The arguments to keep beside the results; the token isn't one of them."""
        values = {name: getattr(self.args, name) for name in arguments(type(self.args)) if name != "hub_token"}
        return {name: value for name, value in values.items() if value is not None}
