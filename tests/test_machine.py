"""What suits the machine, and its signals to stop."""

import os
import signal
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from accelerate.state import AcceleratorState
from torch import nn

from mnist_ddpm.training import TrainingArguments
from mnist_ddpm.training.machine import (
    MIN_STEPS_TO_COMPILE,
    StopSignal,
    choose_mixed_precision,
    compile_model,
    make_accelerator,
    set_cpu_threads,
)

CPU = torch.device("cpu")
GPU = torch.device("cuda")  # only its type is looked at


CORES = len(os.sched_getaffinity(0))


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        # a launcher's one thread becomes a fair share of the cores
        *(
            ({launcher: "x", "OMP_NUM_THREADS": "1", "LOCAL_WORLD_SIZE": str(processes)}, max(1, CORES // processes))
            for launcher in ("ACCELERATE_DYNAMO_BACKEND", "TORCHELASTIC_RUN_ID")
            for processes in (1, 2, 1000)
        ),
        # what the user chose is kept
        ({"ACCELERATE_DYNAMO_BACKEND": "NO", "OMP_NUM_THREADS": "2"}, 3),
        ({"ACCELERATE_DYNAMO_BACKEND": "NO"}, 3),
        ({"OMP_NUM_THREADS": "1"}, 3),
        ({}, 3),
    ],
)
def test_cpu_threads(monkeypatch, environment, expected):
    for name in ("ACCELERATE_DYNAMO_BACKEND", "TORCHELASTIC_RUN_ID", "OMP_NUM_THREADS", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        assert set_cpu_threads() == f"{expected} CPU threads per process"
        assert torch.get_num_threads() == expected
    finally:
        torch.set_num_threads(before)


def test_mixed_precision_that_is_asked_for_wins_then_accelerates_then_the_hardwares(monkeypatch):
    for configured in ("bf16", "no", "fp16"):
        monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", configured)
        assert choose_mixed_precision("no", CPU) == "no"
        assert choose_mixed_precision("bf16", CPU) == "bf16"
        with pytest.raises(ValueError, match="mixed_precision"):
            choose_mixed_precision("fp16", CPU)
    with pytest.raises(ValueError, match="mixed_precision"):
        choose_mixed_precision("auto", CPU)
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    assert choose_mixed_precision("auto", CPU) == "bf16"
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    assert choose_mixed_precision("auto", CPU) in ("bf16", "no")
    assert choose_mixed_precision("auto", torch.device("meta")) == "no"


class Broken(nn.Module):
    """A model that a compiler fails on."""

    def forward(self, x):
        raise RuntimeError("no compiler\nand more lines")


@pytest.mark.parametrize(
    ("requested", "steps", "device", "report"),
    [
        (False, 10**6, GPU, "off"),
        (None, 10**6, CPU, "off (on a CPU it gains nothing)"),
        (None, MIN_STEPS_TO_COMPILE - 1, GPU, "off (it pays from 1,000 steps on)"),
        (None, MIN_STEPS_TO_COMPILE, GPU, "off, as it does not work here (no compiler)"),
        (True, 1, GPU, "on"),
    ],
)
def test_compilation_is_left_out_where_it_does_not_pay_or_fails_unless_asked_for(requested, steps, device, report):
    model = Broken()
    compiled, found = compile_model(model, requested, steps, device, lambda model: model(torch.ones(1)))
    assert (compiled is model, found) == (report != "on", report)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_first_signal_of_a_kind_is_noted_and_the_second_obeyed(number):
    obeyed = []
    handlers = {other: signal.signal(other, lambda *_: obeyed.append(True)) for other in StopSignal.SIGNALS}
    try:
        with StopSignal() as stop:
            assert not stop.received
            for other in StopSignal.SIGNALS:  # a launcher's SIGTERM after Ctrl-C does not cut the run short
                os.kill(os.getpid(), other)
            assert (stop.received, len(obeyed)) == (True, 0)
            os.kill(os.getpid(), number)
            assert len(obeyed) == 1
        os.kill(os.getpid(), number)
        assert len(obeyed) == 2, "afterwards all is as before"
    finally:
        for other, handler in handlers.items():
            signal.signal(other, handler)


def test_in_a_thread_signals_are_left_alone():
    """As in a program with a window or a web page, where Python lets only the main thread handle signals."""
    before = [signal.getsignal(number) for number in StopSignal.SIGNALS]

    def enter():
        with StopSignal() as stop:
            return stop.received, [signal.getsignal(number) for number in StopSignal.SIGNALS]

    with ThreadPoolExecutor() as threads:
        assert threads.submit(enter).result() == (False, before)


@pytest.mark.parametrize("warned", [True, False])
def test_one_process_where_more_were_asked_for_is_said(monkeypatch, caplog, warned):
    """`accelerate launch --num_processes 2` on a CPU sets MASTER_ADDR, and starts one process."""
    for name in ("MASTER_ADDR", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    if warned:
        monkeypatch.setenv("MASTER_ADDR", "x")
    AcceleratorState._reset_state(reset_partial_state=True)
    make_accelerator(TrainingArguments(logger="none", mixed_precision="no"))
    assert ("torchrun --nproc_per_node 2" in caplog.text) == warned
    assert "[RANK" not in caplog.text


def test_logger_that_is_not_installed_is_an_error_at_once(monkeypatch):
    monkeypatch.setattr("mnist_ddpm.training.machine.is_wandb_available", lambda: False)
    with pytest.raises(ValueError, match=r"logger must be installed, got 'wandb'.*pip install wandb"):
        make_accelerator(TrainingArguments(logger="wandb"))
