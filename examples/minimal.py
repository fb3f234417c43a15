"""The whole method on one screen: forward process, loss, training loop, sampling loop, a picture.

`python examples/minimal.py` trains for about five minutes on two CPU cores and writes 64 digits to minimal.png.
"""

import torch
import torch.nn.functional as F
from diffusers.utils import pt_to_pil
from torch.optim.lr_scheduler import OneCycleLR
from tqdm import trange

from mnist_ddpm import MNISTDDPMScheduler, MNISTUNet2DModel
from mnist_ddpm.data import load_mnist
from mnist_ddpm.images import image_grid

try:
    from mnist_ddpm.training.machine import choose_mixed_precision
    from mnist_ddpm.training.optimizers import MuonAdamW, hidden_matrices
except ModuleNotFoundError as error:
    raise SystemExit(f"error: {error}") from error


def train(unet, scheduler, images, num_steps, batch_size=64):
    """Train the U-Net to predict v, a mixture of noise and image (DDPM, Algorithm 1)."""
    bf16 = choose_mixed_precision("auto", images.device) == "bf16"  # where the CPU computes in it
    optimizer = MuonAdamW(*hidden_matrices(unet))
    learning_rate = OneCycleLR(optimizer, [0.01, 0.002], num_steps, pct_start=0.1, cycle_momentum=False)
    for _ in (bar := trange(num_steps)):
        x_0 = images[torch.randint(len(images), (batch_size,))] / 127.5 - 1  # pixels in [-1, 1]
        t = torch.randint(len(scheduler), (batch_size,))
        eps = torch.randn_like(x_0)
        alpha_bar_t = scheduler.alphas_cumprod[t].view(-1, 1, 1, 1).float()
        x_t = alpha_bar_t.sqrt() * x_0 + (1 - alpha_bar_t).sqrt() * eps  # DDPM, equation 4
        v = alpha_bar_t.sqrt() * eps - (1 - alpha_bar_t).sqrt() * x_0  # Salimans and Ho, appendix D
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            v_hat = unet(x_t, t).sample
        loss = F.mse_loss(v_hat.float(), v)  # DDPM, equation 14, with v in place of eps
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        learning_rate.step()
        bar.set_postfix(loss=f"{loss:.3f}")


@torch.no_grad()
def sample(unet, scheduler, num_images, num_steps=50):
    """Sample images: DDPM, Algorithm 2, in fewer steps."""
    x_t = torch.randn(num_images, 1, 28, 28)
    scheduler.set_timesteps(num_steps)
    for t in scheduler.timesteps:
        x_t = scheduler.step(unet(x_t, t).sample, t, x_t).prev_sample  # DDPM, equation 7
    return x_t


if __name__ == "__main__":
    torch.manual_seed(0)
    unet = MNISTUNet2DModel()
    scheduler = MNISTDDPMScheduler(beta_schedule="cosine", prediction_type="v_prediction")
    train(unet, scheduler, load_mnist("train"), num_steps=1500)
    image_grid(pt_to_pil(sample(unet, scheduler, num_images=64))).save("minimal.png")
