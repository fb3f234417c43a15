"""What suits the machine: processes, CPU threads, mixed precision, `torch.compile`; and its signals to stop."""

import logging
import os
import signal
import threading
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from types import FrameType
from typing import Any, Self

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import (
    ProjectConfiguration,
    is_tensorboard_available,
    is_wandb_available,
    parse_flag_from_env,
)
from torch import nn

from mnist_ddpm.training.arguments import TrainingArguments, require

logger = logging.getLogger(__name__)

MIN_STEPS_TO_COMPILE = 1000  # compilation takes about as long as some hundred steps


def make_accelerator(args: TrainingArguments) -> Accelerator:
    """The Accelerator, by Accelerate's own configuration and the arguments.

    Raises:
        ValueError: the logger is not installed, or the device can't compute in the precision.
    """
    installed = {"tensorboard": is_tensorboard_available(), "wandb": is_wandb_available(), "none": True}
    remedy = f"Run `pip install {args.logger}`, or pass --logger none."
    require(installed[args.logger], "logger must be installed", args.logger, remedy)
    # without a GPU, Accelerate joins the processes that a launcher started only if it is told to use the CPU
    cpu = parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.accelerator.is_available()
    state = PartialState(cpu=cpu, timeout=timedelta(hours=2))  # of waiting for the main process to prepare the data
    if "MASTER_ADDR" in os.environ and "WORLD_SIZE" not in os.environ:  # as `accelerate launch` leaves it there
        logger.warning(
            "More than one process was asked for, but on a CPU `accelerate launch` starts one. To start several: "
            "ACCELERATE_USE_CPU=true torchrun --nproc_per_node 2 examples/train.py"
        )
    return Accelerator(
        cpu=cpu,
        gradient_accumulation_steps=args.gradient_accumulation_steps,
        mixed_precision=choose_mixed_precision(args.mixed_precision, state.device),
        log_with=None if args.logger == "none" else args.logger,
        dynamo_backend="no" if args.compile is False else None,  # None: as the launcher says
        project_config=ProjectConfiguration(args.output_dir, logging_dir=str(Path(args.output_dir, args.logging_dir))),
    )


def set_cpu_threads() -> str:
    """Give each local process its share of the cores.

    `accelerate launch` and `torchrun` set OMP_NUM_THREADS=1 unless the user chose a number, which leaves all cores but
    one idle. Any other number is kept. (To train on one core all the same: `taskset -c 0 ...`.)
    """
    launched = "ACCELERATE_DYNAMO_BACKEND" in os.environ or "TORCHELASTIC_RUN_ID" in os.environ
    if launched and os.environ.get("OMP_NUM_THREADS") == "1":
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        torch.set_num_threads(max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))))
    return f"{torch.get_num_threads()} CPU threads per process"


def choose_mixed_precision(requested: str, device: torch.device) -> str:
    """`requested`; for `"auto"` what Accelerate is configured for, or else bf16 where the hardware computes in it.

    Raises:
        ValueError: fp16 on a CPU, where Accelerate would train in float32 without a word.
    """
    configured = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if requested == "auto" and configured == "no":
        return "bf16" if _computes_in_bf16(device) else "no"
    chosen = configured if requested == "auto" else requested
    on_gpu = device.type != "cpu"
    require(on_gpu or chosen != "fp16", "mixed_precision must be bf16 or no on a CPU", chosen, "It needs a GPU.")
    return chosen


def _computes_in_bf16(device: torch.device) -> bool:
    """Whether the hardware has instructions for bf16, without which it is slower than float32."""
    if device.type == "cpu":
        return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)


def compile_model(
    model: nn.Module,
    requested: bool | None,
    steps: int,
    device: torch.device,
    try_out: Callable[[nn.Module], None],
) -> tuple[nn.Module, str]:
    """`model` compiled, if that is requested or (None) if it pays and works; and a line to report.

    It pays on a GPU, for runs that are long enough. On a CPU a step is as fast without it.

    Args:
        model: the model, which stays as it is.
        requested: True, False, or None to decide here.
        steps: how many training steps the compiled model is for.
        device: where it runs.
        try_out: runs the compiled model, which compiles it.
    """
    if isinstance(model, torch._dynamo.OptimizedModule):
        return model, "on (by Accelerate)"
    if requested is False:
        return model, "off"
    if requested is None and device.type == "cpu":
        return model, "off (on a CPU it gains nothing)"
    if requested is None and steps < MIN_STEPS_TO_COMPILE:
        return model, f"off (it pays from {MIN_STEPS_TO_COMPILE:,} steps on)"
    compiled: Any = torch.compile(model, dynamic=False)
    if requested is None:
        try:
            try_out(compiled)
        except Exception as error:  # whatever a missing or broken compiler raises
            reason = (str(error).strip().splitlines() or [repr(error)])[0]
            return model, f"off, as it does not work here ({reason})"
    return compiled, "on"


class StopSignal:
    """Within it, SIGINT and SIGTERM are noted and not obeyed, so that a run can end in good order.

    The second of a kind has its usual effect. In a thread, which can't handle signals, none is noted.
    """

    SIGNALS = (signal.SIGINT, signal.SIGTERM)

    def __enter__(self) -> Self:  # noqa: D105
        self.received = False
        in_main_thread = threading.current_thread() is threading.main_thread()
        signals = self.SIGNALS if in_main_thread else ()
        self._handlers: dict[int, Any] = {number: signal.signal(number, self._receive) for number in signals}
        return self

    def __exit__(self, *exception: object) -> None:  # noqa: D105
        for number, handler in self._handlers.items():
            signal.signal(number, handler)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        """Note the signal, and leave the next of its kind to the handler that was there before."""
        self.received = True
        signal.signal(number, self._handlers[number])
