"""One pipeline for many threads, and many pipelines: each caller gets bit for bit what its seeds give alone.

The callers are held at each step until all of them are there, so that they are surely under way at the same time.
"""

import threading
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import diffusers
import pytest
import torch

from mnist_ddpm import MNISTDDIMScheduler, MNISTDDPMPipeline, MNISTDDPMScheduler, MNISTUNet2DModel

CALLERS = 8
TIMEOUT = 60  # seconds: a caller that fails must not hold the others for ever
SCHEDULERS = [
    MNISTDDPMScheduler,
    MNISTDDIMScheduler,
    # these keep what earlier steps gave, and count their steps
    diffusers.DPMSolverMultistepScheduler,
    diffusers.PNDMScheduler,
    diffusers.HeunDiscreteScheduler,
]
STEPS = [4 + caller for caller in range(CALLERS)]
SHARED_STEPS = min(STEPS)


def tiny_unet(seed=0):
    """A small U-Net whose output is not zero."""
    torch.manual_seed(seed)
    unet = MNISTUNet2DModel(sample_size=8, block_out_channels=(8, 16), layers_per_block=1, attention_head_dim=8)
    for weight in unet.parameters():
        torch.nn.init.normal_(weight, std=0.1)
    return unet.eval()


def pipeline(scheduler, unet=None):
    return quiet(MNISTDDPMPipeline(unet=unet or tiny_unet(), scheduler=scheduler))


def quiet(pipe):
    pipe.set_progress_bar_config(disable=True)
    return pipe


def images(pipe, caller, **options):
    """What a caller asks for: its own seeds, its own number of images, its own number of steps unless told."""
    batch_size = 1 + caller % 3
    generator = [torch.Generator().manual_seed(100 * caller + i) for i in range(batch_size)]
    if "timesteps" not in options:
        options = {"num_inference_steps": STEPS[caller]} | options
    return pipe(batch_size=batch_size, generator=generator, output_type="pt", **options).images


def in_threads(call, steps=SHARED_STEPS, on_step=lambda pipe, caller, i: None):
    """`call(caller, callback_on_step_end=...)` for all callers at once, held together for so many steps."""
    barrier = threading.Barrier(CALLERS)

    def run(caller):
        def wait_for_all(pipe, i, t, tensors):
            if i < steps:
                barrier.wait(TIMEOUT)
                on_step(pipe, caller, i)
                barrier.wait(TIMEOUT)
            return {}

        try:
            return call(caller, callback_on_step_end=wait_for_all)
        except BaseException:
            barrier.abort()
            raise

    with ThreadPoolExecutor(CALLERS) as pool:
        calls = [pool.submit(run, caller) for caller in range(CALLERS)]
        failures = [call.exception() for call in calls]
    # the failure that broke the barrier, not those of the callers that waited there
    for failure in sorted(filter(None, failures), key=lambda error: isinstance(error, threading.BrokenBarrierError)):
        raise failure
    return [call.result() for call in calls]


def assert_equal(found, expected):
    for caller, (images, alone) in enumerate(zip(found, expected, strict=True)):
        assert torch.equal(images, alone), f"caller {caller}: off by {(images - alone).abs().max():.3g}"


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_callers_of_one_pipeline_do_not_disturb_each_other(scheduler):
    pipe = pipeline(scheduler())
    alone = [images(pipe, caller) for caller in range(CALLERS)]
    before = torch.get_rng_state()
    assert_equal(in_threads(partial(images, pipe)), alone)
    assert torch.equal(torch.get_rng_state(), before)  # all noise came from the callers' own generators


@pytest.mark.parametrize(
    ("scheduler", "option"), [(MNISTDDIMScheduler, "eta"), (MNISTDDPMScheduler, "noise_scale")], ids=["eta", "noise"]
)
def test_callers_of_one_pipeline_have_their_own_options(scheduler, option):
    pipe = pipeline(scheduler())
    options = [{option: caller / CALLERS} for caller in range(CALLERS)]
    options[3]["timesteps"] = [998, 700, 321, 7, 2]
    alone = [images(pipe, caller, **options[caller]) for caller in range(CALLERS)]
    assert_equal(in_threads(lambda caller, **callback: images(pipe, caller, **options[caller], **callback)), alone)


def test_an_interrupt_ends_its_own_call_alone_and_a_callback_sees_its_own_call():
    pipe, seen = pipeline(MNISTDDIMScheduler()), set()

    def interrupt_the_first(pipe, caller, i):
        seen.add((caller, pipe.num_timesteps, len(pipe.scheduler.timesteps)))
        if caller == 0 and i == SHARED_STEPS - 2:
            pipe._interrupt = True

    alone = [images(pipe, caller) for caller in range(CALLERS)]
    # callers are held for as many steps as all of them go
    calls = in_threads(partial(images, pipe), steps=SHARED_STEPS - 1, on_step=interrupt_the_first)
    assert_equal(calls[1:], alone[1:])
    assert not torch.equal(calls[0], alone[0])
    assert not pipe._interrupt
    assert seen == {(caller, steps, steps) for caller, steps in enumerate(STEPS)}


def test_what_is_swapped_while_calls_run_is_for_the_next_ones():
    pipe = pipeline(MNISTDDPMScheduler())
    other = pipeline(diffusers.PNDMScheduler(), tiny_unet(seed=1))
    alone = [images(pipe, caller) for caller in range(CALLERS)]

    def swap(_, caller, i):
        if caller == i:  # a new one at each step
            pipe.scheduler = (MNISTDDIMScheduler(), other.scheduler)[i % 2]
            pipe.unet = other.unet
            pipe.set_progress_bar_config(disable=True, desc=f"step {i}")

    assert_equal(in_threads(partial(images, pipe), on_step=swap), alone)
    assert_equal([images(pipe, 0)], [images(other, 0)])


def test_a_scheduler_that_is_in_use_may_be_copied():
    """A call copies the scheduler while, for instance, a training loop adds noise by it on a new dtype."""
    t = torch.zeros(2, dtype=torch.long)
    for use in (lambda s, x: s.add_noise(x, x, t), lambda s, x: s.step(x, t, x)):
        scheduler = MNISTDDPMScheduler()
        use(scheduler, torch.zeros(2, 1, 1, 1, dtype=torch.float32))
        copies = scheduler._copies
        copying = iter(copies.items())  # as copy.deepcopy goes through a dict
        next(copying)
        use(scheduler, torch.zeros(2, 1, 1, 1, dtype=torch.float64))
        assert len(list(copying)) == len(copies) - 1
        assert len(scheduler._copies) == len(copies) + 1


def test_pipelines_may_be_loaded_in_threads(tmp_path):
    """Loads at the same time would leave torch as diffusers patches it for a load: new weights without memory."""
    pipeline(MNISTDDIMScheduler()).save_pretrained(tmp_path)
    all_there = threading.Barrier(CALLERS)

    def load(_):
        all_there.wait(TIMEOUT)
        return MNISTDDPMPipeline.from_pretrained(tmp_path, disable_mmap=True)  # mapped weights differ in the last bits

    with ThreadPoolExecutor(CALLERS) as pool:
        pipes = list(pool.map(load, range(CALLERS)))
    assert torch.nn.Linear(1, 1).weight.device.type == "cpu"
    alone = MNISTDDPMPipeline.from_pretrained(tmp_path, disable_mmap=True)
    assert_equal([images(quiet(pipe), caller=0) for pipe in pipes], [images(quiet(alone), caller=0)] * CALLERS)
