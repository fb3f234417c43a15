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


@pytest.fixture
def threads():
    """Two threads, and afterwards as many as before."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def cores():
    return len(os.sched_getaffinity(0))


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("launcher", ["ACCELERATE_DYNAMO_BACKEND", "TORCHELASTIC_RUN_ID"])
@pytest.mark.parametrize("local_processes", [1, 2, 1000])
def test_a_launchers_one_thread_becomes_a_fair_share_of_the_cores(monkeypatch, cores, launcher, local_processes):
    monkeypatch.setenv(launcher, "x")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(local_processes))
    report = set_cpu_threads()
    assert torch.get_num_threads() == max(1, cores // local_processes)
    assert report == f"{torch.get_num_threads()} CPU threads per process"


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize(("launched", "omp_num_threads"), [(True, "2"), (True, None), (False, "1"), (False, None)])
def test_threads_that_the_user_chose_are_kept(monkeypatch, launched, omp_num_threads):
    for name in ("ACCELERATE_DYNAMO_BACKEND", "TORCHELASTIC_RUN_ID", "OMP_NUM_THREADS"):
        monkeypatch.delenv(name, raising=False)
    if launched:
        monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "NO")
    if omp_num_threads:
        monkeypatch.setenv("OMP_NUM_THREADS", omp_num_threads)
    set_cpu_threads()
    assert torch.get_num_threads() == 2


def test_mixed_precision_that_is_asked_for_wins_then_accelerates_then_the_hardwares(monkeypatch):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    assert choose_mixed_precision("no", CPU) == "no"
    assert choose_mixed_precision("auto", CPU) == "bf16"
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    assert choose_mixed_precision("bf16", CPU) == "bf16"
    assert choose_mixed_precision("auto", CPU) in ("bf16", "no")
    assert choose_mixed_precision("auto", torch.device("meta")) == "no"


@pytest.mark.parametrize(("requested", "configured"), [("fp16", "no"), ("auto", "fp16")])
def test_fp16_on_a_cpu_is_refused(monkeypatch, requested, configured):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", configured)
    with pytest.raises(ValueError, match="mixed_precision"):
        choose_mixed_precision(requested, CPU)


class Broken(nn.Module):
    """A model that a compiler fails on."""

    def forward(self, x):
        raise RuntimeError("no compiler\nand more lines")


def try_out(model):
    model(torch.ones(1))


def test_compilation_is_left_out_where_it_does_not_pay():
    model = Broken()
    assert compile_model(model, False, 10**6, GPU, try_out) == (model, "off")
    assert compile_model(model, None, 10**6, CPU, try_out) == (model, "off (on a CPU it gains nothing)")
    too_few = MIN_STEPS_TO_COMPILE - 1
    assert compile_model(model, None, too_few, GPU, try_out) == (model, "off (it pays from 1,000 steps on)")


def test_compilation_that_fails_is_left_out_unless_asked_for():
    model = Broken()
    compiled, report = compile_model(model, None, MIN_STEPS_TO_COMPILE, GPU, try_out)
    assert compiled is model
    assert report.startswith("off, as it does not work here (no compiler")
    compiled, report = compile_model(model, True, 1, GPU, try_out)
    assert (compiled is model, report) == (False, "on")


@pytest.mark.slow
def test_compiled_model_computes_the_same():
    model = nn.Linear(3, 2)
    inputs = torch.randn(4, 3)
    compiled, report = compile_model(model, True, 1, CPU, lambda model: model(inputs).sum().backward())
    assert report == "on"
    assert compiled is not model
    torch.testing.assert_close(compiled(inputs), model(inputs))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_first_signal_of_a_kind_is_noted_and_the_second_obeyed(number):
    obeyed = []
    handler = signal.signal(number, lambda *_: obeyed.append(True))
    try:
        with StopSignal() as stop:
            assert not stop.received
            os.kill(os.getpid(), number)
            assert stop.received
            assert not obeyed
            os.kill(os.getpid(), number)
            assert obeyed
        os.kill(os.getpid(), number)
        assert len(obeyed) == 2, "afterwards all is as before"
    finally:
        signal.signal(number, handler)


def test_in_a_thread_signals_are_left_alone():
    """As in a program with a window or a web page, where Python lets only the main thread handle signals."""
    before = [signal.getsignal(number) for number in StopSignal.SIGNALS]

    def enter():
        with StopSignal() as stop:
            return stop.received, [signal.getsignal(number) for number in StopSignal.SIGNALS]

    with ThreadPoolExecutor() as threads:
        assert threads.submit(enter).result() == (False, before)


@pytest.mark.parametrize(("environment", "warned"), [({"MASTER_ADDR": "x"}, True), ({}, False)])
def test_one_process_where_more_were_asked_for_is_said(monkeypatch, caplog, environment, warned):
    """`accelerate launch --num_processes 2` on a CPU sets MASTER_ADDR, and starts one process."""
    for name in ("MASTER_ADDR", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    AcceleratorState._reset_state(reset_partial_state=True)
    make_accelerator(TrainingArguments(logger="none", mixed_precision="no"))
    assert ("torchrun --nproc_per_node 2" in caplog.text) == warned


def test_logger_that_is_not_installed_is_an_error_at_once(monkeypatch):
    monkeypatch.setattr("mnist_ddpm.training.machine.is_wandb_available", lambda: False)
    with pytest.raises(ValueError, match=r"logger must be installed, got 'wandb'.*pip install wandb"):
        make_accelerator(TrainingArguments(logger="wandb"))


def test_a_launchers_sigterm_after_ctrl_c_does_not_cut_the_run_short():
    with StopSignal() as stop:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.received
