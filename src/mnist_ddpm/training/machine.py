"""What suits the machine, CPU threads, mixed precision and `torch.compile`; and its signals to stop."""

import os
import signal
from collections.abc import Callable
from types import FrameType
from typing import Self

import torch
from torch import nn

MIN_STEPS_TO_COMPILE = 1000  # compilation takes about as long as some hundred steps


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
    if chosen == "fp16" and device.type == "cpu":
        raise ValueError("--mixed_precision fp16 needs a GPU: on a CPU, choose bf16 or no")
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
    try_out: Callable[[Callable[..., object]], None],
) -> tuple[Callable[..., object], str]:
    """`model` compiled, if that is requested or (None) if it pays and works; and a line to report.

    It pays on a GPU, for runs that are long enough. On a CPU a step is as fast without it.

    Args:
        model: the model, which stays as it is.
        requested: True, False, or None to decide here.
        steps: how many training steps the compiled model is for.
        device: where it runs.
        try_out: runs the compiled model, which compiles it.

    Raises:
        ValueError: it is requested and does not work.
    """
    if requested is False:
        return model, "off"
    if requested is None and device.type == "cpu":
        return model, "off (on a CPU it gains nothing)"
    if requested is None and steps < MIN_STEPS_TO_COMPILE:
        return model, f"off (it pays from {MIN_STEPS_TO_COMPILE:,} steps on)"
    compiled = torch.compile(model, dynamic=False)
    try:
        try_out(compiled)
    except Exception as error:  # whatever a missing or broken compiler raises
        reason = (str(error).strip().splitlines() or [repr(error)])[0]
        if requested:
            raise ValueError(f"--compile: torch.compile does not work here ({reason}): try --no-compile") from error
        return model, f"off, as it does not work here ({reason})"
    return compiled, "on"


class StopSignal:
    """Within it, SIGINT and SIGTERM are noted and not obeyed, so that a run can end in good order.

    The second of a kind has its usual effect.
    """

    SIGNALS = (signal.SIGINT, signal.SIGTERM)

    def __enter__(self) -> Self:  # noqa: D105
        self.received = False
        self._handlers = {number: signal.signal(number, self._receive) for number in self.SIGNALS}
        return self

    def __exit__(self, *exception: object) -> None:  # noqa: D105
        for number, handler in self._handlers.items():
            signal.signal(number, handler)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        """Note the signal, and leave the next of its kind to the handler that was there before."""
        self.received = True
        signal.signal(number, self._handlers[number])
