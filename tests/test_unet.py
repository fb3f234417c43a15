"""The U-Net: shapes, gradients, errors, and what diffusers offers to models that keep its contract."""

import math
import warnings

import pytest
import torch
from diffusers import DDPMPipeline, DDPMScheduler
from diffusers.training_utils import EMAModel
from safetensors.torch import save_file

from mnist_ddpm import MNISTUNet2DModel
from mnist_ddpm.unet import ResidualBlock, SelfAttention, sinusoidal_embedding

TINY = {"sample_size": 8, "block_out_channels": (8, 16), "attention_head_dim": 8, "norm_num_groups": 4}


def tiny_unet(seed: int = 0, **kwargs) -> MNISTUNet2DModel:
    """A U-Net of a few thousand parameters, none of them 0, so that each path adds something to the output."""
    torch.manual_seed(seed)
    unet = MNISTUNet2DModel(**(TINY | kwargs)).eval()
    with torch.no_grad():
        for parameter in unet.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return unet


def images(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def test_it_runs_at_any_size_that_its_levels_allow():
    unet, x = tiny_unet(), images(1, 1, 16, 12)
    (out,) = unet(x, 3, return_dict=False)
    assert out.shape == (1, 1, 16, 12)
    assert torch.equal(out, unet(x, 3).sample)


@pytest.mark.parametrize(
    "timestep",
    [7, 7.0, torch.tensor(7), torch.tensor([7]), torch.tensor([7, 0, 999]), torch.tensor(7.0, dtype=torch.float64)],
    ids=["int", "float", "0-d", "one", "each", "float64"],
)
def test_each_image_is_denoised_at_its_own_timestep_in_any_form_and_apart_from_the_others(timestep):
    unet, x = tiny_unet(), images(3, 1, 8, 8)
    own = torch.as_tensor(timestep).expand(3).tolist()
    expected = torch.cat([unet(x[i : i + 1], int(own[i])).sample for i in range(3)])
    torch.testing.assert_close(unet(x, timestep).sample, expected, rtol=1e-5, atol=1e-5)
    assert (expected[0] - unet(x[:1], 500).sample).abs().max() > 1e-3


def test_the_time_embedding_is_that_of_the_attention_paper():
    dim, t = 8, 999
    angles = [t / 10_000 ** (i / (dim / 2)) for i in range(dim // 2)]
    expected = [math.cos(a) for a in angles] + [math.sin(a) for a in angles]
    embedding = sinusoidal_embedding(torch.tensor([t]), dim)[0]
    torch.testing.assert_close(embedding, torch.tensor(expected), rtol=0, atol=1e-4)


def test_before_training_the_prediction_is_zero_and_all_of_it_can_learn():
    torch.manual_seed(0)
    unet = MNISTUNet2DModel(**TINY)
    assert unet(images(2, 1, 8, 8), 3).sample.abs().max() == 0
    unet = tiny_unet()
    unet(images(2, 1, 8, 8), 3).sample.square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in unet.parameters())


def test_fourier_features_are_waves_of_the_sample_times_a_gain_of_the_timestep():
    features = tiny_unet(fourier_frequencies=(0, 5)).fourier_features
    x, emb = images(2, 1, 8, 8), images(2, features.gain.in_features)
    gain = emb.double() @ features.gain.weight.double().T + features.gain.bias.double()
    waves = [wave(2**n * math.pi * x.double()) for n in (0, 5) for wave in (torch.sin, torch.cos)]
    expected = torch.cat(waves, dim=1) * gain[:, :, None, None]
    torch.testing.assert_close(features(x, emb).double(), expected, rtol=1e-4, atol=1e-4)


def test_fourier_features_put_neighboring_gray_values_on_opposite_sides():
    """They are 2/255 apart, at n = 7 half a period and a bit; the waves' own precision is that of bfloat16."""
    grays = (torch.arange(256) / 127.5 - 1).view(1, 1, 16, 16)
    features = MNISTUNet2DModel(**TINY, fourier_frequencies=(7,)).fourier_features  # whose gain is 1 to begin with
    with torch.autocast("cpu", torch.bfloat16):
        points = features(grays, torch.zeros(1, features.gain.in_features)).flatten(2)[0].float()
    assert (points[:, 1:] - points[:, :-1]).norm(dim=0).min() > 1.9


@pytest.mark.parametrize("channels", [(8, 16), (24, 40), (30, 60), (4,), (5, 9), (8, 16, 32)])
def test_any_channels_fit_the_defaults(channels):
    MNISTUNet2DModel(sample_size=8, block_out_channels=channels)(images(2, 1, 8, 8), 3)
    kinds = ["AttnDownBlock2D"] * len(channels)
    unet = MNISTUNet2DModel(sample_size=8, block_out_channels=channels, down_block_types=kinds)
    assert {m.heads for m in unet.modules() if isinstance(m, SelfAttention)} == {1}


def test_the_gain_map_can_learn_bayes_rule_for_pixels_that_are_exactly_black():
    """Black with prior probability p, or any gray: the best v is (x + 1) / std times the posterior probability."""
    std, p, gain_map = 0.006, 0.8, MNISTUNet2DModel(**TINY, patch_size=1).gain_map
    x = torch.linspace(-1.05, -0.9, 64).view(1, 1, 8, 8)
    if_black = torch.distributions.Normal(-1.0, std).log_prob(x.double()).exp()
    posterior = p * if_black / (p * if_black + (1 - p) * 0.5)  # gray levels are uniform in [-1, 1]
    black_g, _, black_a, _ = range(4)
    with torch.no_grad():
        gain_map.conv.bias[black_g] = 1.0
        gain_map.conv.bias[black_a] = math.log(p / ((1 - p) * 0.5) / (std * math.sqrt(2 * math.pi)))
        gain_map.log_scale.bias[black_g] = -math.log(std)
        gain_map.log_scale.bias[black_a] = -math.log(2 * std**2)
    v = gain_map(torch.zeros(1, 8, 8, 8), torch.zeros(1, gain_map.log_scale.in_features), x)
    torch.testing.assert_close(v.double(), posterior * (x.double() + 1) / std, rtol=1e-3, atol=1e-3)


def test_under_autocast_the_first_and_the_last_layers_stay_in_float32():
    unet, dtypes = tiny_unet(), {}
    for name in ("conv_in", "conv_out", "sample_gain", "mid_block"):
        module = unet.mid_block[0].resnet.conv1 if name == "mid_block" else getattr(unet, name)
        module.register_forward_hook(lambda _module, _inputs, out, name=name: dtypes.update({name: out.dtype}))
    with torch.autocast("cpu", torch.bfloat16):
        out = unet(images(1, 1, 8, 8), 3).sample
    full, half = torch.float32, torch.bfloat16
    assert dtypes == {"conv_in": full, "conv_out": full, "sample_gain": full, "mid_block": half}
    assert out.dtype == full


@pytest.mark.parametrize(
    ("config", "match"),
    [
        ({"sample_size": 10}, "sample_size"),
        ({"sample_size": (8, 10)}, "sample_size"),
        ({"down_block_types": ("DownBlock2D",)}, "down_block_types"),
        ({"down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D")}, "down_block_types"),
        ({"attention_head_dim": 5}, "attention_head_dim"),
        ({"norm_num_groups": 3}, "num_groups"),
    ],
)
def test_a_config_that_cannot_be_built_is_named(config, match):
    with pytest.raises(ValueError, match=match):
        MNISTUNet2DModel(**(TINY | config))


# Classes


def test_a_label_adds_its_embedding_to_that_of_the_timestep():
    unet, x, t = tiny_unet(num_class_embeds=3), images(4, 1, 8, 8), torch.tensor([0, 500, 500, 999])
    assert unet.class_embedding.weight.shape == (4, 32)
    predicted = unet(x, t, torch.tensor([2, 0, 3, 1])).sample
    for i, label in enumerate([2, 0, None, 1]):
        torch.testing.assert_close(unet(x[i : i + 1], t[i], label).sample[0], predicted[i], rtol=1e-5, atol=1e-5)
    same = unet(x, t, 1).sample
    assert torch.equal(unet(x, t, torch.tensor([1, 1, 1, 1])).sample, same)
    with torch.no_grad():
        unet.class_embedding.weight[1] = unet.class_embedding.weight[3]
    assert torch.equal(unet(x, t, 1).sample, unet(x, t).sample)
    assert (unet(x, t, 1).sample - same).abs().max() > 1e-3


def test_before_training_a_conditional_model_is_the_unconditional_one():
    plain, x = tiny_unet(), images(3, 1, 8, 8)
    unet = MNISTUNet2DModel(**TINY, num_class_embeds=3).eval()
    report = unet.load_state_dict(plain.state_dict(), strict=False)
    assert report.missing_keys == ["class_embedding.weight"]
    for labels in (None, 0, torch.tensor([0, 2, 3])):
        assert torch.equal(unet(x, 7, labels).sample, plain(x, 7).sample)


@pytest.mark.parametrize(
    ("classes", "shape", "label", "match"),
    [
        (3, (2, 1, 8, 8), -1, "class_labels must be from 0 to 3"),
        (3, (2, 1, 8, 8), torch.tensor([0, 4]), "class_labels must be from 0 to 3"),
        (None, (1, 1, 8, 8), 1, "class_labels"),
        (None, (1, 1, 10, 8), None, "sample"),
        (None, (1, 3, 8, 8), None, "sample"),
        (None, (1, 8, 8), None, "sample"),
    ],
)
def test_a_call_that_makes_no_sense_is_an_error(classes, shape, label, match):
    with pytest.raises(ValueError, match=f"^{match}"):
        tiny_unet(num_class_embeds=classes)(torch.zeros(shape), 3, label)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_a_model_loaded_in_another_dtype_predicts_the_same_within_its_rounding(tmp_path, dtype):
    unet, x = tiny_unet(), images(2, 1, 8, 8)
    unet.save_pretrained(tmp_path)
    other = MNISTUNet2DModel.from_pretrained(tmp_path, torch_dtype=dtype)
    expected, actual = unet(x, 999).sample, other(x.to(dtype), 999).sample
    assert actual.dtype == dtype
    assert (actual.float() - expected).norm() < 20 * max(torch.finfo(dtype).eps, 1e-7) * expected.norm()


def test_weights_that_are_pickled_or_missing_are_refused(tmp_path):
    unet = tiny_unet()
    unet.save_config(tmp_path)
    state = unet.state_dict()
    torch.save(state, tmp_path / "diffusion_pytorch_model.bin")
    with pytest.raises(OSError, match="safetensors"):
        MNISTUNet2DModel.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="use_safetensors"):
        MNISTUNet2DModel.from_pretrained(tmp_path, use_safetensors=False)
    del state["conv_in.bias"]
    save_file(state, tmp_path / "diffusion_pytorch_model.safetensors")
    with pytest.raises(ValueError, match=r"^weights.*conv_in\.bias"):
        MNISTUNet2DModel.from_pretrained(tmp_path)


def test_gradient_checkpointing_runs_the_blocks_again_and_changes_no_gradient():
    grads, calls = [], []
    for on in (False, True):
        unet = tiny_unet().train()
        unet.mid_block[0].resnet.register_forward_hook(lambda *_, on=on: calls.append(on))
        if on:
            unet.enable_gradient_checkpointing()
        unet(images(2, 1, 8, 8), 3).sample.square().sum().backward()
        grads.append([p.grad for p in unet.parameters()])
    assert unet.is_gradient_checkpointing
    assert calls == [False, True, True]
    torch.testing.assert_close(grads[0], grads[1], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("backend", ["native", "_native_math"])
def test_attention_backends(backend):
    unet, x = tiny_unet(), images(2, 1, 8, 8)
    expected = unet(x, 3).sample
    try:
        unet.set_attention_backend(backend)
        assert {p._attention_backend.value for p in unet.attn_processors.values()} == {backend}
        torch.testing.assert_close(unet(x, 3).sample, expected, rtol=1e-4, atol=1e-5)
    finally:
        unet.reset_attention_backend()


def test_attention_is_softmax_of_scaled_products():
    attention = SelfAttention(channels=16, head_dim=8, groups=4, eps=1e-5).eval()
    torch.nn.init.normal_(attention.to_out.weight)
    x = images(2, 16, 3, 5)
    tokens = attention.norm(x).flatten(2).transpose(1, 2)
    q, k, v = (
        layer(tokens).reshape(2, 15, 2, 8).transpose(1, 2)
        for layer in (attention.to_q, attention.to_k, attention.to_v)
    )
    mixed = torch.softmax(q @ k.transpose(-1, -2) / math.sqrt(8), dim=-1) @ v
    out = attention.to_out(mixed.transpose(1, 2).reshape(2, 15, 16)).transpose(1, 2).reshape(2, 16, 3, 5)
    torch.testing.assert_close(attention(x), x + out, rtol=1e-4, atol=1e-5)


def test_an_attention_processor_can_be_swapped():
    class Twice:
        def __call__(self, attn, x):
            return 2 * attn.to_v(x)

    unet = tiny_unet()
    unet.set_attn_processor(Twice())
    assert {type(p) for p in unet.attn_processors.values()} == {Twice}
    assert unet(images(1, 1, 8, 8), 3).sample.isfinite().all()


def test_layerwise_casting_keeps_norms_and_time_in_full_precision():
    unet, x = tiny_unet(num_class_embeds=3), images(2, 1, 8, 8)
    expected = unet(x, 3).sample
    unet.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    kept = {name for name, p in unet.named_parameters() if p.dtype == torch.float32}
    in_full = ("norm", "time_embedding", "class_embedding", "gain_map")
    assert kept == {name for name, _ in unet.named_parameters() if any(part in name for part in in_full)}
    actual = unet(x, 3).sample
    # float8_e4m3fn has 3 bits of mantissa
    assert 0 < (actual - expected).norm() < 2**-3 * expected.norm()


def test_the_blocks_that_must_not_be_split_exist():
    unet = tiny_unet()
    classes = {type(module).__name__ for module in unet.modules()}
    assert set(unet._no_split_modules) <= classes
    assert set(unet._repeated_blocks) <= classes


@pytest.mark.slow
def test_device_map_auto(tmp_path):
    unet, x = tiny_unet(), images(1, 1, 8, 8)
    unet.save_pretrained(tmp_path)
    again = MNISTUNet2DModel.from_pretrained(tmp_path, device_map="auto")
    torch.testing.assert_close(again(x, 3).sample.cpu(), unet(x, 3).sample, rtol=1e-4, atol=1e-5)


def test_ema_models_are_built_by_keywords_and_published_by_copying(tmp_path):
    unet = tiny_unet()
    ema = EMAModel(unet.parameters(), decay=0.5, model_cls=MNISTUNet2DModel, model_config=unet.config, foreach=True)
    ema.step(tiny_unet(seed=1).parameters())
    ema.save_pretrained(tmp_path / "ema")
    again = EMAModel.from_pretrained(tmp_path / "ema", MNISTUNet2DModel)
    ema.copy_to(unet.parameters())
    torch.testing.assert_close(list(again.shadow_params), [p.detach() for p in unet.parameters()])


@pytest.mark.slow
@pytest.mark.parametrize("label", [None, torch.tensor([0, 3])])
def test_it_compiles_into_one_graph_and_stays_compiled_over_timesteps(label):
    unet, x = tiny_unet(num_class_embeds=None if label is None else 3), images(2, 1, 8, 8)
    torch._dynamo.reset()
    compiled = torch.compile(unet, fullgraph=True, backend="inductor" if label is None else "eager")
    with torch.no_grad(), torch._dynamo.config.patch(error_on_recompile=True):
        for t in torch.tensor([999, 500, 0]):
            expected = unet(x, t, label).sample
            torch.testing.assert_close(compiled(x, t, label).sample, expected, rtol=1e-3, atol=1e-4)


@pytest.mark.slow
def test_repeated_blocks_compile():
    unet, x = tiny_unet(), images(2, 1, 8, 8)
    expected = unet(x, torch.tensor(3)).sample
    torch._dynamo.reset()
    unet.compile_repeated_blocks(fullgraph=True)
    assert any(isinstance(m, ResidualBlock) and m._compiled_call_impl is not None for m in unet.modules())
    with torch.no_grad():
        torch.testing.assert_close(unet(x, torch.tensor(3)).sample, expected, rtol=1e-3, atol=1e-4)


def test_torch_export():
    unet, x = tiny_unet(), images(2, 1, 8, 8)
    program = torch.export.export(unet, (x, torch.tensor([3, 5])), strict=False)
    t = torch.tensor([900, 0])
    torch.testing.assert_close(program.module()(x, t).sample, unet(x, t).sample, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("classes", [None, 3])
def test_it_runs_in_the_pipeline_of_diffusers_without_a_warning(classes):
    pipe = DDPMPipeline(unet=tiny_unet(num_class_embeds=classes), scheduler=DDPMScheduler())
    pipe.set_progress_bar_config(disable=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        out = pipe(batch_size=2, num_inference_steps=2, output_type="np").images
    assert out.shape == (2, 8, 8, 1)
