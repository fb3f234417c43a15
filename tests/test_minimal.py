"""`examples/minimal.py` trains and samples; the README shows its middle."""

from pathlib import Path

import minimal
import torch

from mnist_ddpm import MNISTDDPMScheduler, MNISTUNet2DModel

ROOT = Path(__file__).resolve().parent.parent


def test_trains_and_samples_a_tiny_unet():
    torch.manual_seed(0)
    unet = MNISTUNet2DModel(block_out_channels=(8, 16))
    scheduler = MNISTDDPMScheduler(beta_schedule="cosine", prediction_type="v_prediction")
    images = torch.randint(0, 256, (16, 1, 28, 28), dtype=torch.uint8)
    before = [parameter.clone() for parameter in unet.parameters()]
    minimal.train(unet, scheduler, images, num_steps=3, batch_size=4)
    assert not all(torch.equal(a, b) for a, b in zip(before, unet.parameters(), strict=True))
    samples = minimal.sample(unet, scheduler, num_images=4, num_steps=2)
    assert samples.shape == (4, 1, 28, 28)
    assert samples.isfinite().all()


def test_is_one_screen_and_its_middle_is_in_the_readme():
    code = (ROOT / "examples" / "minimal.py").read_text(encoding="utf-8")
    assert len(code.splitlines()) <= 60
    middle = code[code.index("def train(") : code.index("if __name__")].strip()
    assert middle in (ROOT / "README.md").read_text(encoding="utf-8")
