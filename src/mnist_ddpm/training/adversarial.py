"""A diffusion model becomes a generator in one step: the discriminator, and what both minimize.

Real images are the only teacher (arXiv 2506.09376). The generator begins as the diffusion model, the discriminator as
a copy of its way down, which knows noisy images: both are close to what they are to become.
"""

import copy
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call

from mnist_ddpm import MNISTUNet2DModel
from mnist_ddpm.training.arguments import require

if TYPE_CHECKING:
    from mnist_ddpm.training.distillation import AdversarialBatch, ConsistencyFunction

WAY_UP = ("skip_joins", "up_blocks", "upsamplers", "norm_out", "conv_out", "sample_gain", "gain_map")
PENALTY_EVERY = 4  # images; on each, the penalty would make training 30 % slower


class Discriminator(nn.Module):
    """A U-Net's way down and middle, with a 1 x 1 convolution at each level: how real each place of an image looks.

    Args:
        unet: whose layers are copied.

    Raises:
        ValueError: the U-Net is not an `MNISTUNet2DModel`.
    """

    def __init__(self, unet: Any):
        super().__init__()
        require(isinstance(unet, MNISTUNet2DModel), "init_from must hold an MNISTUNet2DModel", type(unet).__name__)
        self.unet = copy.deepcopy(unet)
        for name in WAY_UP:
            delattr(self.unet, name)
        channels = unet.config.block_out_channels
        self.heads = nn.ModuleList(nn.Conv2d(c, 1, 1) for c in (*channels, channels[-1]))

    def forward(
        self, x_t: torch.Tensor, timesteps: torch.Tensor, class_labels: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Logits `(B, heads, h, w)`, maps of the finest level's size, of noisy images `(B, C, H, W)`."""
        h, emb = self.unet._enter(x_t, timesteps, class_labels)
        logits = []
        for level, blocks in enumerate(self.unet.down_blocks):
            if level > 0:
                h = self.unet.downsamplers[level - 1](h)
            for block in blocks:
                h = block(h, emb)
            logits.append(self.heads[level](h).float())
        for block in self.unet.mid_block:
            h = block(h, emb)
        logits.append(self.heads[-1](h).float())
        size = logits[0].shape[2:]
        return torch.cat([F.interpolate(of_head, size) for of_head in logits], dim=1)


def relativistic_loss(higher: torch.Tensor, lower: torch.Tensor) -> torch.Tensor:
    """`-log sigmoid(D(higher) - D(lower))`: small where the first logits exceed the second (RpGAN, arXiv 2501.05441).

    The discriminator minimizes it with real images first, the generator with its own first.
    """
    return F.softplus(lower - higher).mean()


class AdversarialLoss:
    """Generator and discriminator against each other, both on images with noise (arXiv 2506.09376, section 3).

    The generator's loss is `R(D(fake), D(real))` with the relativistic loss R, the discriminator's
    `R(D(real), D(fake)) + w |D(x + delta z) - D(x)|^2` with noise z. The last term is a penalty on the gradients of D
    at real and at generated images (R1 and R2), as a difference (arXiv 2501.08316), for every fourth image.

    The sum is returned. The fake images of the second are detached, and so is D in the first: each network gets the
    gradients of its own loss, and one optimizer steps both.

    Args:
        function: what makes an image of a noisy one.
        discriminator: D.
        penalty_weight: w.
        penalty_std: delta.
    """

    def __init__(
        self,
        function: "ConsistencyFunction",
        discriminator: nn.Module,
        penalty_weight: float,
        penalty_std: float,
    ):
        self.function, self.scheduler = function, function.scheduler
        self.discriminator = discriminator
        self.penalty_weight, self.penalty_std = penalty_weight, penalty_std

    def __call__(self, unet: Any, batch: "AdversarialBatch") -> torch.Tensor:
        """The mean over the batch, a float32 scalar."""
        inputs, real = batch.inputs, batch.real
        x_t = self.scheduler.add_noise(inputs.clean_images, inputs.noise, inputs.timesteps)
        images = self.function(unet, x_t, inputs.timesteps, inputs.class_labels)
        fake = self.scheduler.add_noise(images, batch.fake_noise, real.timesteps)
        noisy_real = self.scheduler.add_noise(real.clean_images, real.noise, real.timesteps)

        seen, timesteps = torch.cat([noisy_real, fake.detach()]), real.timesteps.repeat(2)
        labels = None
        if real.class_labels is not None and inputs.class_labels is not None:
            labels = torch.cat([real.class_labels, inputs.class_labels])
        logits = self.discriminator(seen, timesteps, labels)
        of_real, of_fake = logits.chunk(2)
        some = slice(None, None, PENALTY_EVERY)
        shifted = seen[some] + self.penalty_std * batch.perturbation.repeat(2, 1, 1, 1)[some]
        changes = self.discriminator(shifted, timesteps[some], None if labels is None else labels[some]) - logits[some]
        penalty = changes.square().mean()
        loss_of_discriminator = relativistic_loss(of_real, of_fake) + self.penalty_weight * penalty

        frozen = {name: weight.detach() for name, weight in self.discriminator.named_parameters()}
        of_fake = functional_call(self.discriminator, frozen, (fake, real.timesteps, inputs.class_labels))
        loss: torch.Tensor = loss_of_discriminator + relativistic_loss(of_fake, of_real.detach())
        return loss
