"""The network of DDPM, from scratch: a U-Net that is told the timestep and predicts the noise.

Data takes this way through it, at the default size::

    sample (B, 1, 28, 28)  --space to depth-->  (B, 4, 14, 14)  --conv_in-->  (B, 64, 14, 14)
    down   level 0  (B,  64, 14, 14)  residual blocks, each output kept as a skip
           level 1  (B, 128,  7,  7)  residual blocks, each output kept as a skip
    mid             (B, 128,  7,  7)  residual block, attention, residual block
    up     level 1, then level 0      join a skip, residual block (mirror of down)
    conv_out  (B, 4, 14, 14)  --depth to space-->  (B, 1, 28, 28), plus gain(t) * sample

Three things differ from the network of DDPM (Ho et al., arXiv 2006.11239, appendix B). Patches of `patch_size` pixels
a side become channels first, so that no convolution runs at full resolution. Attention is in the middle only, unless
`down_block_types` asks for more. And the sample itself is added to the output with a gain that depends on the
timestep: at high noise the noise is nearly the sample, and the blocks need not carry it (the skip connection that EDM,
arXiv 2206.00364, section 5, sets by formula, is learned here).
"""

import json
import math
import os
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.models.attention import AttentionMixin, AttentionModuleMixin
from diffusers.models.attention_dispatch import dispatch_attention_fn
from diffusers.utils import BaseOutput
from safetensors import SafetensorError, safe_open
from torch import nn

DOWN_BLOCK_TYPES = ("DownBlock2D", "AttnDownBlock2D")
# What a config may ask for, checked before anything is allocated. DDPM's largest U-Net has 256 million weights.
MAX_WEIGHTS, MAX_SAMPLE_SIZE, MAX_LAYERS_PER_BLOCK = 10**9, 4096, 64
MAX_FREQUENCY = 16  # a wave of period 2^-15, whose phase float32 gives to 0.02 rad where x is near 1
ONE_VALUE_EACH = "the groups of the coarsest level have one value each, of which a norm leaves nothing"
MAX_CONFIG_BYTES = 5_000_000
Layer = TypeVar("Layer", nn.Linear, nn.Conv2d)


@dataclass
class MNISTUNet2DOutput(BaseOutput):
    """What the U-Net returns.

    Args:
        sample: the prediction for the input sample, shape `(B, out_channels, H, W)`.
    """

    sample: torch.Tensor


def zero_init(layer: Layer) -> Layer:
    """Set a layer's weight and bias to 0, so that the path that it ends adds nothing at the start of training."""
    nn.init.zeros_(layer.weight)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)
    return layer


def sinusoidal_embedding(timestep: torch.Tensor, dim: int, max_period: float = 10_000.0) -> torch.Tensor:
    """Embed timesteps `(B,)` as `(B, dim)` float32: cos, then sin, of `t * max_period^(-i / (dim / 2))`.

    The position encoding of "Attention Is All You Need" (arXiv 1706.03762, section 3.5), with t as the position.
    It is computed in float32 whatever the model's dtype: in bfloat16 t = 999 alone would be off by 1 rad.
    """
    exponent = torch.arange(dim // 2, dtype=torch.float32, device=timestep.device) / (dim // 2)
    angle = timestep.float()[:, None] * torch.exp(-math.log(max_period) * exponent)[None]
    return torch.cat([angle.cos(), angle.sin()], dim=-1)


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
        """Map tokens `(B, H*W, C)` to what each gathers from all, the same shape."""
        # (B, H*W, C) to (B, H*W, heads, C / heads), the layout of diffusers' dispatcher
        q, k, v = (layer(x).unflatten(-1, (attn.heads, -1)) for layer in (attn.to_q, attn.to_k, attn.to_v))
        return dispatch_attention_fn(q, k, v, backend=self._attention_backend).flatten(2)


class SelfAttention(nn.Module, AttentionModuleMixin):
    """`x + proj(attention(norm(x)))`, each position of the feature map attending to all."""

    _default_processor_cls = SelfAttentionProcessor
    _available_processors = (SelfAttentionProcessor,)
    _supports_qkv_fusion = False
    processor: Callable[["SelfAttention", torch.Tensor], torch.Tensor]

    def __init__(self, channels: int, head_dim: int, groups: int, eps: float):
        super().__init__()
        self.heads = channels // head_dim
        self.norm = nn.GroupNorm(groups, channels, eps)
        self.to_q = nn.Linear(channels, channels)
        self.to_k = nn.Linear(channels, channels)
        self.to_v = nn.Linear(channels, channels)
        self.to_out = zero_init(nn.Linear(channels, channels))
        self.processor = SelfAttentionProcessor()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map features `(B, C, H, W)` to features of the same shape."""
        tokens = self.norm(x).flatten(2).transpose(1, 2)  # (B, C, H, W) to (B, H*W, C)
        tokens = self.to_out(self.processor(self, tokens))
        return x + tokens.transpose(1, 2).unflatten(2, x.shape[2:])


class Stage(nn.Module):
    """A residual block, and attention behind it where the level has it."""

    def __init__(
        self, channels: int, time_embed_dim: int, groups: int, eps: float, dropout: float, head_dim: int | None
    ):
        super().__init__()
        self.resnet = ResidualBlock(channels, time_embed_dim, groups, eps, dropout)
        self.attention = nn.Identity() if head_dim is None else SelfAttention(channels, head_dim, groups, eps)

    def forward(self, x: torch.Tensor, emb: torch.Tensor) -> torch.Tensor:
        """Map features `(B, C, H, W)`, at a time embedding `(B, time_embed_dim)`, to features of the same shape."""
        return self.attention(self.resnet(x, emb))


class MNISTUNet2DModel(ModelMixin, AttentionMixin, ConfigMixin):
    """U-Net that predicts, from a noisy sample and its timestep, the noise (or x_0, or v: whatever it was trained on).

    Args:
        sample_size: height and width in pixels, one number or a pair, each a multiple of
            `patch_size * 2 ** (len(block_out_channels) - 1)`, up to 4096. The model runs at any other such size too.
        in_channels: channels of the sample.
        out_channels: channels of the prediction; twice `in_channels` for schedulers with a learned variance.
        patch_size: side in pixels of the squares that become one position each, with `patch_size**2` times the
            channels.
        block_out_channels: channels of each level; each level halves the resolution of the one before.
        down_block_types: for each level `"DownBlock2D"`, or `"AttnDownBlock2D"` for one with attention. The way up
            is the mirror of the way down.
        layers_per_block: residual blocks of a level on the way down, and again on the way up; at most 64.
        attention_head_dim: channels of one attention head; divides the channels of each level with attention, and of
            the last.
        dropout: probability, in [0, 1), within the residual blocks.
        norm_num_groups: groups of the group norms; divides each of `block_out_channels`. A group needs more than one
            value to norm: fewer groups than channels where the coarsest level is a single position.
        norm_eps: epsilon of the group norms, above 0 and at most 1.
        fourier_frequencies: different integers n from 0 to 16, for each of which `sin(2^n pi x)` and `cos(2^n pi x)`
            of the sample join its channels at the entrance. None by default; for likelihood (3, 4, 5, 6, 7).

    Raises:
        ValueError: a value outside of what is said above, or sizes that make more than 10**9 weights, of which nothing
            is allocated; the message names the argument and what is allowed.

    Example:
        >>> unet = MNISTUNet2DModel(sample_size=8, block_out_channels=(8, 16), attention_head_dim=8)
        >>> unet(torch.zeros(2, 1, 8, 8), timestep=10).sample.shape
        torch.Size([2, 1, 8, 8])
    """

    _supports_gradient_checkpointing = True
    _no_split_modules = ["Stage"]  # noqa: RUF012 - diffusers wants these as lists
    _repeated_blocks = ["ResidualBlock", "SelfAttention"]  # noqa: RUF012
    _skip_layerwise_casting_patterns = ["norm", "time_embedding"]  # noqa: RUF012

    # lists of lists by level, which is more than ModuleList's type can say
    down_blocks: Any
    skip_joins: Any
    up_blocks: Any

    @register_to_config
    def __init__(
        self,
        sample_size: int | tuple[int, int] = 28,
        in_channels: int = 1,
        out_channels: int = 1,
        patch_size: int = 2,
        block_out_channels: tuple[int, ...] = (64, 128),
        down_block_types: tuple[str, ...] = ("DownBlock2D", "DownBlock2D"),
        layers_per_block: int = 1,
        attention_head_dim: int = 128,
        dropout: float = 0.0,
        norm_num_groups: int = 8,
        norm_eps: float = 1e-5,
        fourier_frequencies: tuple[int, ...] = (),
    ):
        super().__init__()
        # JSON knows no tuples
        pairs_and_levels = {
            "sample_size": sample_size,
            "block_out_channels": block_out_channels,
            "down_block_types": down_block_types,
            "fourier_frequencies": fourier_frequencies,
        }
        self.register_to_config(**{k: tuple(v) if isinstance(v, list) else v for k, v in pairs_and_levels.items()})
        _check_config(self.config)
        self.gradient_checkpointing = False

        time_embed_dim = 4 * block_out_channels[0]
        patch_area = patch_size**2

        def stage(channels: int, attention: bool) -> Stage:
            head_dim = attention_head_dim if attention else None
            return Stage(channels, time_embed_dim, norm_num_groups, norm_eps, dropout, head_dim)

        def stages() -> nn.ModuleList:
            levels = zip(block_out_channels, down_block_types, strict=True)
            return nn.ModuleList(
                nn.ModuleList(stage(channels, kind == "AttnDownBlock2D") for _ in range(layers_per_block))
                for channels, kind in levels
            )

        self.time_embedding = TimeEmbedding(block_out_channels[0], time_embed_dim)
        self.fourier_features = (
            FourierFeatures(in_channels, fourier_frequencies, time_embed_dim) if fourier_frequencies else None
        )
        self.conv_in = nn.Conv2d(_input_channels(self.config) * patch_area, block_out_channels[0], 3, padding=1)
        self.down_blocks = stages()
        self.downsamplers = nn.ModuleList(
            nn.Conv2d(fine, coarse, 3, stride=2, padding=1) for fine, coarse in pairwise(block_out_channels)
        )
        self.mid_block = nn.ModuleList([stage(block_out_channels[-1], True), stage(block_out_channels[-1], False)])
        self.skip_joins = nn.ModuleList(
            nn.ModuleList(nn.Conv2d(2 * channels, channels, 1) for _ in range(layers_per_block))
            for channels in block_out_channels
        )
        self.up_blocks = stages()
        self.upsamplers = nn.ModuleList(
            nn.Conv2d(coarse, fine, 3, padding=1) for fine, coarse in pairwise(block_out_channels)
        )
        self.norm_out = nn.GroupNorm(norm_num_groups, block_out_channels[0], norm_eps)
        self.conv_out = zero_init(nn.Conv2d(block_out_channels[0], out_channels * patch_area, 3, padding=1))
        self.sample_gain = zero_init(nn.Linear(time_embed_dim, out_channels * in_channels))

    @classmethod
    def _dict_from_json_file(cls, json_file: str | os.PathLike[str]) -> dict[str, Any]:
        return read_config(json_file)

    @classmethod
    def extract_init_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """Read the config of a U-Net of this class; of another model's, the keys that are alike mean other things."""
        class_name = config_dict.get("_class_name", cls.__name__)
        if class_name not in [base.__name__ for base in cls.__mro__]:
            raise ValueError(f"_class_name of the config must be {cls.__name__}, but it is {class_name!r:.80}.")
        config = {key: value for key, value in config_dict.items() if key != "_use_default_values"}  # the same here
        return super().extract_init_dict(config, **kwargs)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike[str], **kwargs: Any) -> Any:
        """Load a saved U-Net from a folder or the Hub: from safetensors only, and all of its weights.

        Args:
            pretrained_model_name_or_path: a folder, or a repository `namespace/name`.
            kwargs: as for `ModelMixin.from_pretrained`: `subfolder`, `torch_dtype`, `variant`, `device_map`...

        Returns:
            The U-Net, in evaluation mode; with `output_loading_info=True` a pair, the second being diffusers' report.

        Raises:
            ValueError: `use_safetensors=False` (unpickling may run code), a token that no HTTP header can carry, or
                weights that are missing from the file, which diffusers would leave random, that the U-Net of the
                config does not have, or (in a folder) that are no floating point numbers.
            OSError: there is no such model, or none in safetensors.
        """
        if kwargs.get("use_safetensors") is False:
            raise ValueError("use_safetensors must be True: pickled weights may run code when they are loaded.")
        token = str(kwargs.get("token"))
        if not (token.isascii() and token.isprintable()):  # the HTTP client's error would print it
            raise ValueError("token must be printable ASCII without line breaks: copy it again.")
        _check_weight_types(Path(pretrained_model_name_or_path, kwargs.get("subfolder") or ""))
        report_wanted = kwargs.pop("output_loading_info", False)
        kwargs |= {"use_safetensors": True, "output_loading_info": True}
        unet, report = super().from_pretrained(pretrained_model_name_or_path, **kwargs)
        for key, fault in {"missing_keys": "lacks weights", "unexpected_keys": "has weights too many"}.items():
            if names := report[key]:
                raise ValueError(
                    f"{pretrained_model_name_or_path} {fault}: {len(names)}, {min(names)!r} first. It is damaged, or "
                    "its config is of another model."
                )
        return (unet, report) if report_wanted else unet

    def forward(
        self,
        sample: torch.Tensor,
        timestep: torch.Tensor | float | int,
        class_labels: None = None,
        return_dict: bool = True,
    ) -> MNISTUNet2DOutput | tuple[torch.Tensor]:
        """Predict from `sample` at `timestep`.

        Args:
            sample: noisy images x_t, shape `(B, in_channels, H, W)`.
            timestep: t, one for all (a number, or a tensor of shape `()` or `(1,)`) or one for each image, `(B,)`;
                counted as in diffusers, 0 to T - 1. Fractions are fine.
            class_labels: must be None, the model is unconditional. (It is there because diffusers' pipelines pass it.)
            return_dict: False for a plain tuple.

        Returns:
            `MNISTUNet2DOutput` with `sample` of shape `(B, out_channels, H, W)`, or a tuple of that tensor.

        Raises:
            ValueError: for `class_labels`, and for shapes other than the above.
        """
        if class_labels is not None:
            raise ValueError("class_labels must be None: MNISTUNet2DModel is unconditional.")
        self._check_sample(sample)
        emb = self.time_embedding(self._timesteps(timestep, sample), sample.dtype)

        features = sample
        if self.fourier_features is not None:
            features = torch.cat([sample, self.fourier_features(sample, emb)], dim=1)
        h = self.conv_in(F.pixel_unshuffle(features, self.config.patch_size))
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

        h = F.pixel_shuffle(self.conv_out(F.silu(self.norm_out(h))), self.config.patch_size)
        gain = self.sample_gain(emb).unflatten(1, (self.config.out_channels, self.config.in_channels))
        out = h + (gain[..., None, None] * sample[:, None]).sum(dim=2)
        return MNISTUNet2DOutput(sample=out) if return_dict else (out,)

    def _run(self, block: nn.Module, x: torch.Tensor, emb: torch.Tensor) -> torch.Tensor:
        """Call a block, without keeping its activations where gradient checkpointing is on."""
        if torch.is_grad_enabled() and self.gradient_checkpointing:
            return self._gradient_checkpointing_func(block, x, emb)
        return block(x, emb)

    def _check_sample(self, sample: torch.Tensor) -> None:
        """Raise unless `sample` is `(B, in_channels, H, W)` with sizes that the levels can halve."""
        multiple = _size_multiple(self.config)
        if not isinstance(sample, torch.Tensor) or not sample.is_floating_point():
            got = sample.dtype if isinstance(sample, torch.Tensor) else type(sample).__name__
            raise TypeError(f"sample must be a floating point tensor, but it is {got}.")
        if sample.ndim != 4 or sample.shape[1] != self.config.in_channels:
            raise ValueError(
                f"sample must have shape (B, {self.config.in_channels}, H, W), but it has {tuple(sample.shape)}."
            )
        if not _can_normalize(self.config, sample.shape[2:]):
            raise ValueError(
                f"sample is too small for norm_num_groups: {ONE_VALUE_EACH}, and it has {tuple(sample.shape)}."
            )
        if sample.shape[2] % multiple or sample.shape[3] % multiple:
            raise ValueError(
                f"sample has height {sample.shape[2]} and width {sample.shape[3]}, but both must be multiples of "
                f"{multiple} (patch_size * 2 ** (levels - 1))."
            )

    @staticmethod
    def _timesteps(timestep: torch.Tensor | float | int, sample: torch.Tensor) -> torch.Tensor:
        """One float32 timestep per image, `(B,)`."""
        if not isinstance(timestep, torch.Tensor) and not _is_real(timestep):
            raise TypeError(f"timestep must be a finite number, or a tensor of numbers, but it is {timestep!r:.80}.")
        t = torch.as_tensor(timestep, dtype=torch.float32, device=sample.device)
        if t.ndim > 1 or t.numel() not in (1, sample.shape[0]):
            raise ValueError(
                f"timestep must be a number, or a tensor of shape () or (B,) = ({sample.shape[0]},), but it has shape "
                f"{tuple(t.shape)}."
            )
        return t.expand(sample.shape[0])


def _check_weight_types(folder: Path) -> None:
    """Raise a ValueError if a weights file of a folder holds integers; what can't be read is left to the loader."""
    for path in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(path, "pt") as file:
                types = {name: file.get_slice(name).get_dtype() for name in file.keys()}  # noqa: SIM118
        except (SafetensorError, OSError):
            continue
        if integers := {name: dtype for name, dtype in types.items() if not dtype.startswith(("F", "BF"))}:
            raise ValueError(f"{path} must hold floating point weights, but it has {integers}: it is damaged.")


def read_config(json_file: str | os.PathLike[str]) -> dict[str, Any]:
    """Read a config file of at most 5 MB, in which no key stands twice; the same in each file that stands alone."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        content = dict(pairs)
        if len(content) < len(pairs):
            key, _ = Counter(key for key, _ in pairs).most_common(1)[0]
            raise ValueError(f"the key {key!r:.80} stands there more than once")
        return content

    try:
        if os.path.getsize(json_file) > MAX_CONFIG_BYTES:
            raise ValueError(f"it has more than {MAX_CONFIG_BYTES} bytes")
        config = json.loads(Path(json_file).read_text(encoding="utf-8"), object_pairs_hook=unique)
        if not isinstance(config, dict):
            raise ValueError("it holds no JSON object")
    except (ValueError, RecursionError) as error:
        raise OSError(f"{json_file} is not a valid JSON file of a config: {error}") from None
    return config


def _size_multiple(config: Any) -> int:
    """What the height and width of a sample must be multiples of."""
    return config.patch_size * 2 ** (len(config.block_out_channels) - 1)


def _check_config(config: Any) -> None:
    """Raise a ValueError that names the first argument of the U-Net that it cannot be built with."""

    def require(condition: bool, name: str, allowed: str) -> None:
        if not condition:
            raise ValueError(f"{name} must be {allowed}, but it is {config[name]!r:.80}.")

    def positive(value: Any) -> bool:
        return isinstance(value, int) and not isinstance(value, bool) and value > 0

    for name in ("in_channels", "out_channels", "patch_size", "layers_per_block", "attention_head_dim"):
        require(positive(config[name]), name, "a positive integer")
    require(config.layers_per_block <= MAX_LAYERS_PER_BLOCK, "layers_per_block", f"at most {MAX_LAYERS_PER_BLOCK}")
    channels = config.block_out_channels
    require(
        isinstance(channels, tuple) and len(channels) > 0 and all(map(positive, channels)),
        "block_out_channels",
        "positive integers, one per level",
    )
    require(channels[0] % 2 == 0, "block_out_channels", "even at the first level (its sinusoids come in pairs)")
    kinds = config.down_block_types
    require(
        isinstance(kinds, tuple) and len(kinds) == len(channels) and all(kind in DOWN_BLOCK_TYPES for kind in kinds),
        "down_block_types",
        f"{len(channels)} of {DOWN_BLOCK_TYPES}, one for each of block_out_channels",
    )
    attended = [c for c, kind in zip(channels, kinds, strict=True) if kind == "AttnDownBlock2D"] + [channels[-1]]
    require(
        all(c % config.attention_head_dim == 0 for c in attended),
        "attention_head_dim",
        f"a divisor of the channels that have attention, {sorted(set(attended))}",
    )
    require(
        positive(config.norm_num_groups) and all(c % config.norm_num_groups == 0 for c in channels),
        "norm_num_groups",
        f"a positive divisor of each of block_out_channels, {channels}",
    )
    require(_is_real(config.dropout) and 0.0 <= config.dropout < 1.0, "dropout", "a probability in [0, 1)")
    require(_is_real(config.norm_eps) and 0.0 < config.norm_eps <= 1.0, "norm_eps", "positive, and at most 1")
    frequencies = config.fourier_frequencies
    require(
        isinstance(frequencies, tuple)
        and all(isinstance(n, int) and not isinstance(n, bool) and 0 <= n <= MAX_FREQUENCY for n in frequencies)
        and len(set(frequencies)) == len(frequencies),
        "fourier_frequencies",
        f"different integers from 0 to {MAX_FREQUENCY}",
    )
    levels = MAX_SAMPLE_SIZE.bit_length()
    require(len(channels) <= levels, "block_out_channels", f"at most {levels} levels")
    sizes = (config.sample_size,) * 2 if isinstance(config.sample_size, int) else config.sample_size
    multiple = _size_multiple(config)
    require(
        isinstance(sizes, tuple)
        and len(sizes) == 2
        and all(positive(size) and size % multiple == 0 and size <= MAX_SAMPLE_SIZE for size in sizes),
        "sample_size",
        f"a positive multiple of {multiple} (patch_size * 2 ** (levels - 1)), at most {MAX_SAMPLE_SIZE}, or a pair",
    )
    require(_can_normalize(config, sizes), "norm_num_groups", f"smaller, as else {ONE_VALUE_EACH}")
    if (weights := _num_weights(config)) > MAX_WEIGHTS:
        raise ValueError(
            f"block_out_channels, layers_per_block, in_channels and out_channels must make at most {MAX_WEIGHTS:.0e} "
            f"weights, but they make {weights:.1e}: {channels}, {config.layers_per_block}, {config.in_channels} and "
            f"{config.out_channels}."
        )


def _input_channels(config: Any) -> int:
    """Channels that enter the network for each pixel: those of the sample, and its Fourier features."""
    channels: int = config.in_channels * (1 + 2 * len(config.fourier_frequencies))
    return channels


def _can_normalize(config: Any, sizes: Sequence[int]) -> bool:
    """Whether the groups of the coarsest level have more than one value each, which alone would always become 0."""
    one_position = all(size == _size_multiple(config) for size in sizes)
    return not (one_position and config.block_out_channels[-1] == config.norm_num_groups)


def _num_weights(config: Any) -> int:
    """The weights that a U-Net of this config has, without biases and norms."""
    channels, time_embed_dim = config.block_out_channels, 4 * config.block_out_channels[0]

    def stage(c: int, attention: bool) -> int:
        return 2 * 9 * c**2 + 2 * c * time_embed_dim + 4 * c**2 * attention

    levels = zip(channels, config.down_block_types, strict=True)
    blocks = sum(2 * stage(c, kind == "AttnDownBlock2D") + 2 * c**2 for c, kind in levels)
    return (
        config.layers_per_block * blocks
        + sum(2 * 9 * fine * coarse for fine, coarse in pairwise(channels))
        + stage(channels[-1], True)
        + stage(channels[-1], False)
        + time_embed_dim * (channels[0] + time_embed_dim)
        + 9 * channels[0] * config.patch_size**2 * (_input_channels(config) + config.out_channels)
        + time_embed_dim * (_input_channels(config) - config.in_channels + config.in_channels * config.out_channels)
    )


def _is_real(value: Any) -> bool:
    """Whether a value is a finite number."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
