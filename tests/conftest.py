"""A Hub of the tests' own: nothing that a test does reaches the real one, its cache, or anybody's token."""

import os
import tempfile

import pytest
from browser import browser, page  # noqa: F401 - fixtures
from loopback_hub import LoopbackHub

HUB = LoopbackHub()
HF_HOME = tempfile.TemporaryDirectory()
# set here, before any test imports huggingface_hub, which reads them once
for name in ("HF_TOKEN", "HF_HUB_OFFLINE", "HF_HUB_CACHE", "HF_MODULES_CACHE"):
    os.environ.pop(name, None)
os.environ |= {"HF_ENDPOINT": HUB.url, "HF_HOME": HF_HOME.name}
os.environ |= {"HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}  # which go to servers of their own


@pytest.fixture
def hub():
    """The loopback Hub, empty."""
    HUB.reset()
    yield HUB
    assert not HUB.unknown, "huggingface_hub asked for what the loopback Hub does not know"


def pytest_runtest_setup(item):
    """Skip tests that are marked `gpu` where there is none."""
    if item.get_closest_marker("gpu"):
        import torch

        if not torch.cuda.is_available():
            pytest.skip("needs a GPU")
