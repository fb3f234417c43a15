"""The network of DDPM, from scratch: a U-Net that is told the timestep and predicts the noise, x_0 or v.

Data takes this way through it, at the default size::

    sample (B, 1, 28, 28)  --space to depth-->  (B, 4, 14, 14)  --conv_in-->  (B, 64, 14, 14)
    down   level 0  (B,  64, 14, 14)  residual blocks, each output kept as a skip
           level 1  (B, 128,  7,  7)  residual blocks, each output kept as a skip
    mid             (B, 128,  7,  7)  residual block, attention, residual block
    up     level 1, then level 0      join a skip, residual block (mirror of down)
    conv_out  (B, 4, 14, 14)  --depth to space-->  (B, 1, 28, 28), plus gains times the sample

What differs most from the network of DDPM (Ho et al., arXiv 2006.11239, appendix B): patches of `patch_size` pixels a
side become channels first, so that no convolution runs at full resolution. Attention is in the middle only, unless
`down_block_types` asks for more. The timestep scales and shifts the second norm of each residual block (iDDPM, arXiv
2102.09672, appendix A). The sample is added to the output: at high noise it is nearly all noise (EDM's skip
connection, arXiv 2206.00364, section 5, learned), and at low noise a pixel is black, or white, by Bayes' rule. Under
autocast the first and the last layers stay in float32: near t = 0 the noise is too small for bfloat16.
"""

import math
import os
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.models.attention import AttentionMixin, AttentionModuleMixin
from diffusers.models.attention_dispatch import dispatch_attention_fn
from diffusers.models.unets.unet_2d import UNet2DOutput
from torch import nn

DOWN_BLOCK_TYPES = ("DownBlock2D", "AttnDownBlock2D")


def zero_init(layer: Any) -> Any:
    """Set a layer's weight and bias to 0, so that the path that it ends adds nothing at the start of training."""
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)
    return layer


def sinusoidal_embedding(timestep: torch.Tensor, dim: int, max_period: float = 10_000.0) -> torch.Tensor:
    """Embed timesteps `(B,)` as `(B, dim)` float32: cos, then sin, of `t * max_period^(-i / (dim / 2))`.

    The position encoding of "Attention Is All You Need" (arXiv 1706.03762, section 3.5), with t as the position.
    It is computed in float32 whatever the model's dtype: in bfloat16 t = 999 alone would be off by 1 rad.
    """
    exponent = torch.arange(dim // 2, dtype=torch.float32, device=timestep.device) / (dim // 2)
    angle = timestep.float()[:, None] * torch.exp(-math.log(max_period) * exponent)[None]
    return F.pad(torch.cat([angle.cos(), angle.sin()], dim=-1), (0, dim % 2))


class TimeEmbedding(nn.Module):
    """Timesteps `(B,)` to `(B, time_embed_dim)`: sinusoids, then two linear layers."""

    def __init__(self, dim: int, time_embed_dim: int):
        super().__init__()
        self.dim = dim
        self.linear_1 = nn.Linear(dim, time_embed_dim)
        self.linear_2 = nn.Linear(time_embed_dim, time_embed_dim)

    def forward(self, timestep: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """Embed `timestep`, shape `(B,)`; only the sinusoids are in float32, the rest is in `dtype`."""
        emb = sinusoidal_embedding(timestep, self.dim).to(dtype)
        return F.silu(self.linear_2(F.silu(self.linear_1(emb))))


class FourierFeatures(nn.Module):
    """`sin(2^n pi x)` and `cos(2^n pi x)` of the sample, each with a gain that depends on the timestep.

    They tell values apart that are close together, as far as the noise lets them (variational diffusion models, arXiv
    2107.00630). Where it doesn't, they are noise themselves, which the gain learns to turn down.
    """

    def __init__(self, in_channels: int, frequencies: Sequence[int], time_embed_dim: int):
        super().__init__()
        self.frequencies = frequencies
        self.gain = zero_init(nn.Linear(time_embed_dim, 2 * len(frequencies) * in_channels))
        nn.init.ones_(self.gain.bias)

    def forward(self, sample: torch.Tensor, emb: torch.Tensor) -> torch.Tensor:
        """Map samples `(B, C, H, W)` to features `(B, 2 C len(frequencies), H, W)`; the waves are in float32."""
        x = sample.to(torch.promote_types(sample.dtype, torch.float32))
        waves = [wave(2**n * math.pi * x) for n in self.frequencies for wave in (torch.sin, torch.cos)]
        return torch.cat(waves, dim=1).to(emb.dtype) * self.gain(emb)[:, :, None, None]


class PixelGain(nn.Module):
    """`exp(s) g sigmoid(a - exp(k) (x - l)^2) (x - l)`, for the two levels l at which pixels pile up: black and white.

    Bayes' rule at low noise: a pixel x is exactly black with probability `sigmoid(a - (x + 1)^2 / (2 std^2))`, where
    its neighbors give the prior log odds a. If it is, the best v is `(x + 1) / std`, a gain of up to 150; if it is
    gray, near 0. So g and a are for each pixel, s and k for each timestep, and l is a parameter.
    """

    def __init__(self, channels: int, out_channels: int, patch_size: int, time_embed_dim: int):
        super().__init__()
        self.out_channels, self.patch_size = out_channels, patch_size
        self.conv = zero_init(nn.Conv2d(channels, 4 * out_channels * patch_size**2, 3, padding=1))
        self.log_scale = zero_init(nn.Linear(time_embed_dim, 4))
        self.levels = nn.Parameter(torch.tensor([-1.0, 1.0]))

    def forward(self, h: torch.Tensor, emb: torch.Tensor, sample: torch.Tensor) -> torch.Tensor:
        """Map the last features, the time embedding and samples `(B, C, H, W)` to what they add, `(B, C, H, W)`."""
        maps = F.pixel_shuffle(self.conv(h), self.patch_size)
        g, a = maps.reshape(len(sample), 2, 2, *sample.shape[1:]).unbind(1)  # (B, levels, C, H, W)
        s, k = self.log_scale(emb).unflatten(1, (2, 2))[..., None, None, None].unbind(1)  # (B, levels, 1, 1, 1)
        u = sample[:, None] - self.levels.view(2, 1, 1, 1)
        return (s.exp() * g * torch.sigmoid(a - k.exp() * u.square()) * u).sum(dim=1)


class ResidualBlock(nn.Module):
    """`x + conv(silu(modulate(norm(conv(silu(norm(x)))))))`: the time embedding scales and shifts the second norm."""

    def __init__(self, channels: int, time_embed_dim: int, groups: int, eps: float, dropout: float):
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, channels, eps)
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.time_emb_proj = nn.Linear(time_embed_dim, 2 * channels)
        self.norm2 = nn.GroupNorm(groups, channels, eps)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = zero_init(nn.Conv2d(channels, channels, 3, padding=1))

    def forward(self, x: torch.Tensor, emb: torch.Tensor) -> torch.Tensor:
        """Map features `(B, C, H, W)`, at a time embedding `(B, time_embed_dim)`, to features of the same shape."""
        scale, shift = self.time_emb_proj(emb)[:, :, None, None].chunk(2, dim=1)
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.norm2(h) * (1 + scale) + shift
        return x + self.conv2(self.dropout(F.silu(h)))


class SelfAttentionProcessor:
    """Scaled dot-product attention by the backend that diffusers has been told to use."""

    _attention_backend = None

    def __call__(self, attn: "SelfAttention", x: torch.Tensor) -> torch.Tensor:
        """Map tokens `(B, H*W, C)` to what each gathers from all; the heads are `(B, H*W, heads, C / heads)`."""
        q, k, v = (layer(x).unflatten(-1, (attn.heads, -1)) for layer in (attn.to_q, attn.to_k, attn.to_v))
        return dispatch_attention_fn(q, k, v, backend=self._attention_backend).flatten(2)


class SelfAttention(nn.Module, AttentionModuleMixin):
    """`x + proj(attention(norm(x)))`, each position of the feature map attending to all."""

    _default_processor_cls = SelfAttentionProcessor
    _available_processors = (SelfAttentionProcessor,)
    _supports_qkv_fusion = False

    def __init__(self, channels: int, head_dim: int, groups: int, eps: float):
        super().__init__()
        self.heads = channels // head_dim
        self.norm = nn.GroupNorm(groups, channels, eps)
        self.to_q, self.to_k, self.to_v = (nn.Linear(channels, channels) for _ in range(3))
        self.to_out = zero_init(nn.Linear(channels, channels))
        self.processor = SelfAttentionProcessor()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map features `(B, C, H, W)` to features of the same shape."""
        tokens = self.norm(x).flatten(2).transpose(1, 2)  # (B, C, H, W) to (B, H*W, C)
        tokens = self.to_out(self.processor(self, tokens))
        return x + tokens.transpose(1, 2).unflatten(2, x.shape[2:])


class Stage(nn.Module):
    """A residual block, and attention behind it where the level has it."""

    def __init__(self, channels: int, time_dim: int, groups: int, eps: float, dropout: float, head_dim: int | None):
        super().__init__()
        self.resnet = ResidualBlock(channels, time_dim, groups, eps, dropout)
        self.attention = nn.Identity() if head_dim is None else SelfAttention(channels, head_dim, groups, eps)

    def forward(self, x: torch.Tensor, emb: torch.Tensor) -> torch.Tensor:
        """Map features `(B, C, H, W)`, at a time embedding `(B, time_embed_dim)`, to features of the same shape."""
        return self.attention(self.resnet(x, emb))


class MNISTUNet2DModel(ModelMixin, AttentionMixin, ConfigMixin):
    """U-Net that predicts, from a noisy sample and its timestep, the noise (or x_0, or v: whatever it was trained on).

    Args:
        sample_size: height and width in pixels, one number or a pair, each a multiple of
            `patch_size * 2 ** (len(block_out_channels) - 1)`. The model runs at any other such size too.
        in_channels: channels of the sample.
        out_channels: channels of the prediction; twice `in_channels` for schedulers with a learned variance.
        patch_size: side in pixels of the squares that become one position each.
        block_out_channels: channels of each level. Each level halves the resolution.
        down_block_types: for each level `"DownBlock2D"` (the default), or `"AttnDownBlock2D"` for one with attention.
        layers_per_block: residual blocks of a level on the way down, and again on the way up.
        attention_head_dim: channels of an attention head. By default there is one head.
        dropout: probability, in [0, 1), within the residual blocks.
        norm_num_groups: groups of the group norms; divides `block_out_channels`. By default 8 or less.
        norm_eps: epsilon of the group norms.
        fourier_frequencies: integers n; `sin(2^n pi x)` and `cos(2^n pi x)` join the channels of the sample. Empty by
            default; (3, 4, 5, 6, 7) for likelihood.
        pixel_gain: whether each pixel has a gain of its own, by Bayes' rule. Models of 0.1.0 have none.
        num_class_embeds: classes of the images; None for an unconditional model. Their embeddings are 0 at first.

    Raises:
        ValueError: for an unknown block type, and for sizes that do not divide as said above.

    Example:
        >>> unet = MNISTUNet2DModel(sample_size=8, block_out_channels=(8, 16))
        >>> unet(torch.zeros(2, 1, 8, 8), timestep=10).sample.shape
        torch.Size([2, 1, 8, 8])
    """

    _supports_gradient_checkpointing = True
    _no_split_modules = ["Stage"]  # noqa: RUF012 - diffusers wants these as lists
    _repeated_blocks = ["ResidualBlock", "SelfAttention"]  # noqa: RUF012
    _skip_layerwise_casting_patterns = ["norm", "time_embedding", "class_embedding", "gain_map"]  # noqa: RUF012

    @register_to_config
    def __init__(
        self,
        sample_size: int | tuple[int, int] = 28,
        in_channels: int = 1,
        out_channels: int = 1,
        patch_size: int = 2,
        block_out_channels: tuple[int, ...] = (64, 128),
        down_block_types: tuple[str, ...] | None = None,
        layers_per_block: int = 1,
        attention_head_dim: int | None = None,
        dropout: float = 0.0,
        norm_num_groups: int | None = None,
        norm_eps: float = 1e-5,
        fourier_frequencies: tuple[int, ...] = (),
        pixel_gain: bool = True,
        num_class_embeds: int | None = None,
    ):
        super().__init__()
        down_block_types = down_block_types or ("DownBlock2D",) * len(block_out_channels)
        norm_num_groups = norm_num_groups or math.gcd(8, *block_out_channels)
        config = {**self.config, "down_block_types": down_block_types, "norm_num_groups": norm_num_groups}
        self.register_to_config(**{k: tuple(v) if isinstance(v, list) else v for k, v in config.items()})  # from JSON
        _check_config(self.config)
        self.gradient_checkpointing = False

        time_embed_dim = 4 * block_out_channels[0]

        def stage(channels: int, kind: str) -> Stage:
            head_dim = (attention_head_dim or channels) if kind == "AttnDownBlock2D" else None
            return Stage(channels, time_embed_dim, norm_num_groups, norm_eps, dropout, head_dim)

        def by_level(make: Callable[[int, str], nn.Module]) -> Any:  # ModuleList's type can't say: lists of lists
            levels = zip(block_out_channels, down_block_types, strict=True)
            return nn.ModuleList(nn.ModuleList(make(*level) for _ in range(layers_per_block)) for level in levels)

        self.time_embedding = TimeEmbedding(block_out_channels[0], time_embed_dim)
        self.class_embedding = self.fourier_features = self.gain_map = None
        if num_class_embeds is not None:
            self.class_embedding = zero_init(nn.Embedding(num_class_embeds + 1, time_embed_dim))  # the last: no label
        if fourier_frequencies:
            self.fourier_features = FourierFeatures(in_channels, fourier_frequencies, time_embed_dim)
        input_channels = in_channels * (1 + 2 * len(fourier_frequencies))
        self.conv_in = nn.Conv2d(input_channels * patch_size**2, block_out_channels[0], 3, padding=1)
        self.down_blocks = by_level(stage)
        steps = list(pairwise(block_out_channels))  # from each level to the next
        self.downsamplers = nn.ModuleList(nn.Conv2d(fine, coarse, 3, stride=2, padding=1) for fine, coarse in steps)
        self.mid_block = nn.ModuleList(stage(block_out_channels[-1], kind) for kind in reversed(DOWN_BLOCK_TYPES))
        self.skip_joins = by_level(lambda channels, _: nn.Conv2d(2 * channels, channels, 1))
        self.up_blocks = by_level(stage)
        self.upsamplers = nn.ModuleList(nn.Conv2d(coarse, fine, 3, padding=1) for fine, coarse in steps)
        self.norm_out = nn.GroupNorm(norm_num_groups, block_out_channels[0], norm_eps)
        self.conv_out = zero_init(nn.Conv2d(block_out_channels[0], out_channels * patch_size**2, 3, padding=1))
        self.sample_gain = zero_init(nn.Linear(time_embed_dim, out_channels * in_channels))
        if pixel_gain:
            gained = min(in_channels, out_channels)
            self.gain_map = PixelGain(block_out_channels[0], gained, patch_size, time_embed_dim)

    def forward(
        self,
        sample: torch.Tensor,
        timestep: torch.Tensor | float | int,
        class_labels: torch.Tensor | int | None = None,
        return_dict: bool = True,
    ) -> UNet2DOutput | tuple[torch.Tensor]:
        """Predict from `sample` at `timestep`.

        Args:
            sample: noisy images x_t, shape `(B, in_channels, H, W)`.
            timestep: t from 0 to T - 1, one for all or one for each image, `(B,)`. Fractions are fine.
            class_labels: classes, one for all or one for each image, `(B,)`. None or `num_class_embeds`: no label.
            return_dict: False for a plain tuple.

        Returns:
            `UNet2DOutput` with `sample` of shape `(B, out_channels, H, W)`, or a tuple of that tensor.

        Raises:
            ValueError: for labels that the model doesn't know, and channels or a size that it can't take.
        """
        _check_sample(sample, class_labels, self.config)
        h, emb = self._enter(sample, timestep, class_labels)
        skips = []
        for level, blocks in enumerate(self.down_blocks):
            if level > 0:
                h = self.downsamplers[level - 1](h)
            for block in blocks:
                h = self._run(block, h, emb)
                skips.append(h)
        for block in self.mid_block:
            h = self._run(block, h, emb)
        for level in reversed(range(len(self.up_blocks))):
            for join, block in zip(self.skip_joins[level], self.up_blocks[level], strict=True):
                h = self._run(block, join(torch.cat([h, skips.pop()], dim=1)), emb)
            if level > 0:
                h = F.interpolate(self.upsamplers[level - 1](h), scale_factor=2.0, mode="nearest")

        with torch.autocast(sample.device.type, enabled=False):
            out = self._leave(h.to(sample.dtype), sample, emb)
        return UNet2DOutput(sample=out) if return_dict else (out,)

    def _enter(
        self, sample: torch.Tensor, timestep: torch.Tensor | float | int, class_labels: torch.Tensor | int | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The first features of noisy images, and the embedding of timestep and label `(B, time_embed_dim)`."""
        timestep = torch.as_tensor(timestep, dtype=torch.float32, device=sample.device).expand(len(sample))
        with torch.autocast(sample.device.type, enabled=False):
            emb = self.time_embedding(timestep, sample.dtype)
            if self.class_embedding is not None:
                label = self.config.num_class_embeds if class_labels is None else class_labels
                emb = emb + self.class_embedding(torch.as_tensor(label, device=sample.device).expand(len(sample)))
            h = sample
            if self.fourier_features is not None:
                h = torch.cat([h, self.fourier_features(sample, emb)], dim=1)
            return self.conv_in(F.pixel_unshuffle(h, self.config.patch_size)), emb

    def _leave(self, h: torch.Tensor, sample: torch.Tensor, emb: torch.Tensor) -> torch.Tensor:
        """The last features to the prediction `(B, out_channels, H, W)`."""
        h = F.silu(self.norm_out(h))
        out = F.pixel_shuffle(self.conv_out(h), self.config.patch_size)
        gain = self.sample_gain(emb).unflatten(1, (self.config.out_channels, self.config.in_channels))
        out = out + (gain[..., None, None] * sample[:, None]).sum(dim=2)
        if self.gain_map is not None:
            C = self.gain_map.out_channels  # those of a learned variance come after it
            out[:, :C] += self.gain_map(h, emb, sample[:, :C])
        return out

    def _run(self, block: nn.Module, x: torch.Tensor, emb: torch.Tensor) -> torch.Tensor:
        """Call a block, without keeping its activations where gradient checkpointing is on."""
        saves_memory = torch.is_grad_enabled() and self.gradient_checkpointing
        return self._gradient_checkpointing_func(block, x, emb) if saves_memory else block(x, emb)

    @classmethod
    def extract_init_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """Read the config of a U-Net of this class; in another model's, the same keys mean other things."""
        class_name = config_dict.get("_class_name", cls.__name__)
        if class_name not in [base.__name__ for base in cls.__mro__]:
            raise ValueError(f"_class_name of the config must be {cls.__name__}, got {class_name!r:.80}.")
        config = {key: value for key, value in config_dict.items() if key not in ("_use_default_values", "auto_map")}
        if "_diffusers_version" in config:  # a saved config; those of version 0.1.0 lack the key
            config.setdefault("pixel_gain", False)
        return super().extract_init_dict(config, **kwargs)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike[str], **kwargs: Any) -> Any:
        """Load a saved U-Net as `ModelMixin.from_pretrained` does, but from safetensors only and all of its weights.

        Raises:
            ValueError: `use_safetensors=False`, or weights that are missing or unexpected.
            OSError: there is no such model, or none in safetensors.
        """
        if kwargs.get("use_safetensors") is False:
            raise ValueError("use_safetensors must be True, got False. Pickled weights may run code.")
        report_wanted = kwargs.pop("output_loading_info", False)
        kwargs |= {"use_safetensors": True, "output_loading_info": True}
        unet, report = super().from_pretrained(pretrained_model_name_or_path, **kwargs)
        wrong = {key: report[key] for key in ("missing_keys", "unexpected_keys") if report[key]}
        if wrong:  # diffusers would leave what is missing random
            raise ValueError(f"weights of {pretrained_model_name_or_path} must be those of the config, got {wrong}.")
        return (unet, report) if report_wanted else unet


def _check_config(config: Any) -> None:
    """Reject sizes that do not divide, of which torch says nothing or in riddles."""
    channels, kinds, head_dim = config.block_out_channels, config.down_block_types, config.attention_head_dim
    if len(kinds) != len(channels) or not set(kinds) <= set(DOWN_BLOCK_TYPES):
        raise ValueError(f"down_block_types must be {len(channels)} of {DOWN_BLOCK_TYPES}, got {kinds}.")
    attended = [c for c, kind in zip(channels, kinds, strict=True) if kind == "AttnDownBlock2D"] + [channels[-1]]
    if head_dim is not None and any(c % head_dim for c in attended):
        raise ValueError(f"attention_head_dim must divide {attended}, got {head_dim}. Leave it out for one head.")
    sizes = (config.sample_size,) if isinstance(config.sample_size, int) else config.sample_size
    if any(size % _size_multiple(config) for size in sizes):
        raise ValueError(f"sample_size must be a multiple of {_size_multiple(config)}, got {config.sample_size}.")


def _check_sample(sample: torch.Tensor, class_labels: torch.Tensor | int | None, config: Any) -> None:
    """Reject samples of other channels, sizes that the levels can't halve, and labels that are not of the model."""
    k = _size_multiple(config)
    if sample.ndim != 4 or sample.shape[1] != config.in_channels or any(size % k for size in sample.shape[2:]):
        raise ValueError(f"sample must be (B, {config.in_channels}, {k} n, {k} m), got {tuple(sample.shape)}.")
    if class_labels is not None:
        labels, last = torch.as_tensor(class_labels), config.num_class_embeds
        on_host = labels.device.type == "cpu" and not torch.compiler.is_compiling()  # elsewhere a look would wait
        if last is None or (on_host and not ((labels >= 0) & (labels <= last)).all()):
            allowed = "None, as the model has no classes" if last is None else f"from 0 to {last}"
            raise ValueError(f"class_labels must be {allowed}, got {class_labels!r:.80}.")


def _size_multiple(config: Any) -> int:
    """What the height and width of a sample must be multiples of."""
    return config.patch_size * 2 ** (len(config.block_out_channels) - 1)
