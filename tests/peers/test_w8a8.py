import copy
import math

import pytest
import torch
from diffusers import UNet2DModel
from helpers import draw, embedded_pipeline, random_transformer
from torch import nn
from torchao.utils import should_reduce_range

from dqar import DQARConfig, apply_dqar
from dqar.measure.sampling import class_labels, noise_generators, sample
from dqar.models.profiles import get_profile
from dqar.peers.w8a8 import balance, measure_salience, quantize_transformer, step_weights, weight_bytes

PROFILE = get_profile("smoke", num_inference_steps=4, num_samples=2, batch_size=2)
CLOSED = DQARConfig(schedule="none")
OPEN_KV, OPEN_OUTPUT = (
    DQARConfig(entropy_threshold=math.inf, snr_range=(0, math.inf), schedule="static", reuse_target=target)
    for target in ("kv", "output")
)
BALANCED = ("attn1.to_out.0", "attn1.to_q", "ff.net.0.proj")


def inputs(dtype=torch.float32):
    generator = torch.Generator().manual_seed(7)
    latents = torch.randn(4, 1, 8, 8, generator=generator).to(dtype)
    return {"hidden_states": latents, "timestep": torch.tensor([3, 250, 600, 999]), "class_labels": torch.arange(4)}


@torch.no_grad()
def forward(transformer):
    return transformer(**inputs(transformer.dtype)).sample


def error(output, reference):
    return float((output.double() - reference.double()).norm() / reference.double().norm())


def layer_names(num_layers):
    return [f"transformer_blocks.{i}.{name}" for i in range(num_layers) for name in BALANCED]


def random_salience(transformer, seed=0):
    generator = torch.Generator().manual_seed(seed)
    names = layer_names(len(transformer.transformer_blocks))
    return {name: torch.rand(transformer.inner_dim, generator=generator) * 10 + 0.01 for name in names}


def linears(transformer):
    """The layers that are to be quantized, written out anew."""
    for block in transformer.transformer_blocks:
        attn, ff = block.attn1, block.ff.net
        yield from (attn.to_q, attn.to_k, attn.to_v, attn.to_out[0], ff[0].proj, ff[2])


def fake(x, largest, bits=8):
    """Rounding of numbers up to ``largest``, as torchao does it: in 8 bits, the scale is largest / 127.5."""
    half = 2 ** (bits - 1)
    scale = largest / (half - 0.5)
    return (x * (1 / scale)).round().clamp(-half, half - 1) * scale


@torch.no_grad()
def fake_quantized(transformer):
    """A copy whose linear layers round weights and inputs to 8 bit with one scale per tensor: no help against CSB."""
    transformer = copy.deepcopy(transformer)
    for linear in linears(transformer):
        linear.weight.copy_(fake(linear.weight, linear.weight.abs().max()))
        linear.register_forward_pre_hook(lambda _module, args: (fake(args[0], args[0].abs().max()),))
    return transformer


@pytest.mark.parametrize("options", [{}, {"attention_bias": False}, {"norm_elementwise_affine": True}])
def test_balance_is_the_identity_in_float64(options):
    transformer = random_transformer(**options).double()
    salience = random_salience(transformer)
    salience["transformer_blocks.1.attn1.to_q"][3] = 0  # a channel that never was anything but zero
    with torch.no_grad():
        transformer.transformer_blocks[2].ff.net[0].proj.weight[:, 5] = 0
    expected, before = forward(transformer), copy.deepcopy(transformer.state_dict())
    balance(transformer, salience)
    assert error(forward(transformer), expected) < 1e-10
    changed = {name for name, value in transformer.state_dict().items() if not torch.equal(value, before[name])}
    for name in ("attn1.to_q", "attn1.to_k", "attn1.to_v", "attn1.to_out.0", "ff.net.0.proj", "norm1.linear"):
        assert f"transformer_blocks.0.{name}.weight" in changed
    assert "transformer_blocks.0.norm1.linear.bias" in changed
    assert not any("net.2" in name or "emb" in name or "proj_out" in name for name in changed)


def test_balance_makes_activations_and_weights_equally_salient():
    """√(max|x| · max|w|) on either side; measured on the input that the salience came from."""
    transformer = random_transformer().double()
    peaks = {}

    def see(name):
        def hook(_module, args):
            peaks[name] = args[0].abs().flatten(0, -2).amax(0)

        return hook

    layers = layer_names(4)
    modules = dict(transformer.named_modules())
    for name in layers:
        modules[name].register_forward_pre_hook(see(name))
    forward(transformer)
    balance(transformer, dict(peaks))
    forward(transformer)
    for name in layers:
        shared = ["to_q", "to_k", "to_v"] if name.endswith("to_q") else [""]
        readers = [modules[name.removesuffix("to_q") + other if other else name] for other in shared]
        weight = torch.stack([reader.weight.abs().amax(0) for reader in readers]).amax(0)
        torch.testing.assert_close(peaks[name], weight, rtol=1e-9, atol=0)


@pytest.mark.parametrize("with_salience", [False, True])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 0.05), (torch.float16, 0.05), (torch.bfloat16, 0.1)])
def test_w8a8_is_close_and_leaves_the_original_alone(with_salience, dtype, tolerance):
    transformer = random_transformer().to(dtype)
    before, expected = copy.deepcopy(transformer.state_dict()), forward(transformer)
    salience = random_salience(transformer) if with_salience else None
    got = forward(quantize_transformer(transformer, salience))
    assert got.dtype == dtype
    assert 1e-4 < error(got, expected) < tolerance
    assert torch.equal(forward(transformer), expected)
    after = transformer.state_dict()
    assert list(after) == list(before) and all(torch.equal(after[name], before[name]) for name in before)


@torch.no_grad()
def test_torchao_scales_per_token_and_per_output_channel():
    """What the module says of torchao, against a quantized layer by hand."""
    transformer = random_transformer()
    linear, quantized = (next(linears(model)) for model in (transformer, quantize_transformer(transformer)))
    x = torch.randn(2, 5, 16) * torch.logspace(-2, 2, 5)[:, None]
    bits = 7 if should_reduce_range(x.device) else 8  # without VNNI, 8 bits overflow
    weight = fake(linear.weight, linear.weight.abs().amax(1, keepdim=True), bits)
    activation = fake(x, x.abs().amax(-1, keepdim=True), bits)
    expected = activation.double() @ weight.double().T + linear.bias.double()
    torch.testing.assert_close(quantized(x).double(), expected, rtol=1e-5, atol=1e-5)


def test_only_attention_and_feed_forward_layers_are_quantized():
    quantized = quantize_transformer(random_transformer())
    inside = {id(linear) for linear in linears(quantized)}
    for name, module in quantized.named_modules():
        if isinstance(module, nn.Linear):
            assert (type(module.weight.data) is not torch.Tensor) == (id(module) in inside), name


@pytest.mark.parametrize("quantizer", [fake_quantized, quantize_transformer])
def test_balancing_helps_against_a_salient_channel(quantizer):
    """Which takes the others' precision: by one scale per tensor, and in every token still by torchao's scales."""
    pipe = embedded_pipeline()
    with torch.no_grad():
        for block in pipe.transformer.transformer_blocks:
            block.norm1.linear.bias[16 + 5] += 100  # scale_msa of channel 5, and its
            block.norm1.linear.bias[4 * 16 + 5] += 100  # scale_mlp
            for linear in (block.attn1.to_q, block.attn1.to_k, block.attn1.to_v, block.ff.net[0].proj):
                linear.weight[:, 5] /= 50  # PTQ4DiT: where activations are salient, weights are not
    expected = forward(pipe.transformer)
    balanced = copy.deepcopy(pipe.transformer)
    balance(balanced, measure_salience(pipe, PROFILE, 0))
    without, with_csb = (error(forward(quantizer(model)), expected) for model in (pipe.transformer, balanced))
    assert with_csb < without / 3


def test_salience_turns_balancing_on():
    transformer = random_transformer()
    salience, balanced = random_salience(transformer), copy.deepcopy(transformer)
    balance(balanced, salience)
    got = forward(quantize_transformer(transformer, salience))
    assert torch.equal(got, forward(quantize_transformer(balanced)))
    assert not torch.equal(got, forward(quantize_transformer(transformer)))


def test_step_weights_by_hand():
    """Spearman without ties is 1 − 6 Σd² / n(n² − 1), d the difference of ranks."""
    steps = torch.rand(5, 12, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    weight = torch.rand(12, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    rank = weight.argsort().argsort()
    distances = torch.stack([(step.argsort().argsort() - rank).square().sum() for step in steps]).double()
    rho = 1 - 6 * distances / (12 * 143)
    expected = torch.exp(-rho) / torch.exp(-rho).sum()
    torch.testing.assert_close(step_weights(steps, weight), expected, rtol=1e-12, atol=0)


def test_a_step_unlike_the_weights_counts_more():
    weight = torch.arange(1.0, 9.0)
    weights = step_weights(torch.stack([weight, weight.flip(0), torch.ones(8)]), weight)
    e = torch.e
    expected = torch.tensor([1 / e, e, 1], dtype=torch.float64) / (e + 1 / e + 1)  # ρ = 1, −1, and none
    torch.testing.assert_close(weights, expected)
    assert weights[1] > weights[2] > weights[0]


@pytest.mark.parametrize("batch_size", [1, 2])
def test_salience_against_one_measured_by_hand(batch_size):
    """Peaks of every step in float64, seen in a run that is no part of ``measure_salience``."""
    pipe = embedded_pipeline()
    seen, expected = {}, {}
    modules = dict(pipe.transformer.named_modules())
    layers = {
        f"transformer_blocks.{i}.{name}": modules[f"transformer_blocks.{i}.{name}"]
        for i in range(4)
        for name in BALANCED
    }
    handles = [
        layer.register_forward_hook(lambda module, args, _output: seen.setdefault(module, []).append(args[0]))
        for layer in layers.values()
    ]
    numbers = torch.arange(3)
    pipe(
        class_labels=class_labels(pipe, numbers).tolist(),
        guidance_scale=PROFILE.guidance_scale,
        num_inference_steps=4,
        generator=noise_generators(5, numbers),
        output_type="pt",
    )
    for handle in handles:
        handle.remove()
    for name, layer in layers.items():
        steps = torch.stack([x.double().abs().amax((0, 1)) for x in seen[layer]])
        assert len(steps) == 4
        names = [name.replace("to_q", other) for other in ("to_q", "to_k", "to_v")]
        weight = torch.stack([modules[other].weight.detach().double().abs().amax(0) for other in names]).amax(0)
        expected[name] = (step_weights(steps, weight)[:, None] * steps).sum(0)
        assert error(steps.mean(0), expected[name]) > 1e-4  # SSC isn't the plain mean
    before = copy.deepcopy(pipe.transformer.state_dict())
    profile = get_profile("smoke", num_inference_steps=4, batch_size=batch_size)
    got = measure_salience(pipe, profile, 5, num_samples=3)
    assert got.keys() == expected.keys()
    for name in got:
        assert got[name].dtype == torch.float32
        torch.testing.assert_close(got[name].double(), expected[name], rtol=1e-5, atol=1e-5)
    assert not any(module._forward_pre_hooks for module in pipe.transformer.modules())
    assert all(torch.equal(value, before[name]) for name, value in pipe.transformer.state_dict().items())


def test_weight_bytes():
    transformer = random_transformer(num_attention_heads=8, attention_head_dim=16, num_layers=2)
    quantized = quantize_transformer(transformer)
    stored = (*transformer.parameters(), *transformer.buffers())
    assert weight_bytes(transformer) == sum(4 * tensor.numel() for tensor in stored)
    before = sum(weight_bytes(linear) for linear in linears(transformer))
    after = sum(weight_bytes(linear) for linear in linears(quantized))
    assert after / before == pytest.approx(0.25, rel=0.06)
    assert weight_bytes(transformer) - weight_bytes(quantized) == before - after
    # int8 weights; a float32 scale, an int8 zero point and a float32 bias for each output
    expected = sum(
        linear.in_features * linear.out_features + 9 * linear.out_features for linear in linears(transformer)
    )
    assert after == expected


@pytest.mark.parametrize("config", [CLOSED, OPEN_KV, OPEN_OUTPUT])
def test_a_quantized_pipeline_samples_with_and_without_dqar(pipe, config):
    full = draw(pipe)  # latents, since the images of a random model are black and white
    pipe.transformer = quantize_transformer(pipe.transformer, measure_salience(pipe, PROFILE, 1))
    quantized = draw(pipe)
    assert 1e-4 < error(quantized, full) < 0.05
    images = sample(pipe, PROFILE, 0).images
    with_dqar = sample(pipe, PROFILE, 0, config)
    decisions = set(with_dqar.trace.to_pandas().decision)
    if config.schedule == "none":
        assert decisions == {"compute"}
        assert torch.equal(with_dqar.images, images)
    else:
        assert decisions == {"compute", "reuse"}


UNET = {"block_out_channels": (32,), "down_block_types": ("DownBlock2D",), "up_block_types": ("UpBlock2D",)}


@torch.no_grad()
def test_pixart_is_quantized_and_balanced_where_a_factor_can_be_folded(pixart):
    transformer, generator = pixart.transformer.double(), torch.Generator().manual_seed(0)
    tokens = torch.randn(2, 5, 16, generator=generator, dtype=torch.float64)
    latents = torch.randn(2, 4, 8, 8, generator=generator, dtype=torch.float64)

    def run(model):
        asked = {"timestep": torch.tensor([10, 700]), "encoder_hidden_states": tokens}
        kwargs = {"added_cond_kwargs": {"resolution": None, "aspect_ratio": None}}
        return model(latents.to(model.dtype), **asked, **kwargs).sample

    before = run(transformer)
    names = [f"transformer_blocks.{i}.attn1.to_out.0" for i in range(len(transformer.transformer_blocks))]
    salience = {name: torch.rand(16, generator=generator) * 10 + 0.01 for name in names}
    balanced = copy.deepcopy(transformer)
    balance(balanced, salience)
    assert error(run(balanced), before) < 1e-12
    changed = balanced.transformer_blocks[0].attn1.to_v.weight
    assert not torch.equal(changed, transformer.transformer_blocks[0].attn1.to_v.weight)
    tokens = tokens.float()
    quantized = quantize_transformer(transformer.float(), salience)
    assert 1e-4 < error(run(quantized), before) < 0.1


@pytest.mark.parametrize(
    "model, given",
    [
        (lambda: nn.Linear(2, 2), "a Linear with transformer_blocks of no kind"),
        (lambda: UNet2DModel(**UNET), "a UNet2DModel"),
    ],
)
def test_other_models_are_refused(model, given):
    with pytest.raises(ValueError, match=f"{given}.*not accepted.*ada_norm_zero"):
        quantize_transformer(model())


def test_what_cannot_be_quantized_is_refused(pipe):
    with pytest.raises(ValueError, match="quantized already"):
        quantize_transformer(quantize_transformer(pipe.transformer))
    with apply_dqar(pipe), pytest.raises(ValueError, match="hooks"):
        quantize_transformer(pipe.transformer)
    quantize_transformer(pipe.transformer)


def test_salience_of_another_model_is_refused():
    transformer = random_transformer()
    before = copy.deepcopy(transformer.state_dict())
    right = random_salience(transformer)
    wrong = {
        "missing": random_salience(random_transformer(num_layers=3)),
        "not a layer": random_salience(random_transformer(num_layers=5)),
        "32.* channels": random_salience(random_transformer(attention_head_dim=16)),
        "NaN": right | {"transformer_blocks.3.attn1.to_q": torch.full((16,), torch.nan)},
    }
    for message, salience in wrong.items():
        with pytest.raises(ValueError, match=message):
            balance(transformer, salience)
    assert all(torch.equal(value, before[name]) for name, value in transformer.state_dict().items())
