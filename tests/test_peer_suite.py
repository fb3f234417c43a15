"""Diffusers' own scheduler tests, with our classes in place of theirs.

They are not part of its package: clone https://github.com/huggingface/diffusers and name the clone in the environment
variable `DIFFUSERS_REPOSITORY`. Their configs assume the spacing `leading`; everything else is as it stands there.
"""

import importlib
import importlib.util
import os
import sys
import unittest

import pytest

from mnist_ddpm import MNISTDDIMScheduler, MNISTDDPMScheduler

REPOSITORY = os.environ.get("DIFFUSERS_REPOSITORY")
OURS = {"DDPM": MNISTDDPMScheduler, "DDIM": MNISTDDIMScheduler}
BETAS = "one of its schedules ends at beta = 2, which is no variance: refused"
PRIVATE = "calls the private _get_variance; test_schedulers.py finds the same numbers in the noise of a step"
DEPARTURES = {
    "DDPM": {
        "test_betas": BETAS,
        "test_variance": PRIVATE,
        "test_variance_type": "passes an unknown variance_type, which diffusers takes in silence: refused",
        "test_full_loop_with_noise": "expects 387.9466, a sum of float32 tables; float64 ones give 387.9672 "
        "(test_peer_faults.py)",
    },
    "DDIM": {"test_betas": BETAS, "test_variance": PRIVATE},
}
if not importlib.util.find_spec("torchsde"):
    for departures in DEPARTURES.values():
        departures["test_compatibles"] = (
            "imports every scheduler, one of which needs torchsde: fails for diffusers too"
        )


@pytest.mark.slow
@pytest.mark.skipif(not REPOSITORY, reason="DIFFUSERS_REPOSITORY does not name a clone of diffusers")
@pytest.mark.parametrize("kind", OURS)
def test_diffusers_own_tests(kind, monkeypatch):
    for name in [name for name in sys.modules if name.split(".")[0] == "tests"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.syspath_prepend(REPOSITORY)
    module = importlib.import_module(f"tests.schedulers.test_scheduler_{kind.lower()}")

    class Case(getattr(module, f"{kind}SchedulerTest")):
        scheduler_classes = (OURS[kind],)

        def get_scheduler_config(self, **kwargs):
            return super().get_scheduler_config(**{"timestep_spacing": "leading", **kwargs})

    result = unittest.TestResult()
    unittest.defaultTestLoader.loadTestsFromTestCase(Case).run(result)
    failed = {test.id().rsplit(".", 1)[-1]: trace for test, trace in result.failures + result.errors}
    assert result.testsRun > 20
    assert failed.keys() == DEPARTURES[kind].keys(), "\n".join(failed.values())
