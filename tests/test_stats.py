import math

import pytest
import torch
from torch.nn import functional as F

from dqar import stats


def qkv(shape=(2, 3, 77, 72), factor=1.0, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return [(factor * torch.randn(shape, generator=generator)).to(dtype) for _ in range(3)]


def reference_entropy(query, key, scale=None):
    """Per head, float64, from the map."""
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    log_p = (query.double() @ key.double().mT * scale).log_softmax(-1)
    return -(log_p.exp() * log_p).sum(-1).mean(-1)


@pytest.mark.parametrize("shape", [(2, 3, 77, 72), (1, 2, 256, 24), (3, 1, 1, 8), (1, 5, 601, 16), (2, 40, 64, 8)])
@pytest.mark.parametrize("factor", [0.0, 1.0, 5.0, 30.0, 1000.0])
def test_fused_and_mapped_agree_with_float64(shape, factor):
    query, key, value = qkv(shape, factor)
    output, fused = stats.fused_attention_with_entropy(query, key, value)
    mapped = stats.attention_entropy((query @ key.mT * shape[-1] ** -0.5).softmax(-1), reduction="none")
    expected = reference_entropy(query, key)
    assert torch.equal(output, F.scaled_dot_product_attention(query, key, value))
    torch.testing.assert_close(fused.double(), expected, atol=1e-4, rtol=0)
    torch.testing.assert_close(mapped.double(), expected, atol=1e-4, rtol=0)


def test_uniform_attention_has_entropy_ln_n():
    query, key, value = qkv((1, 2, 250, 8))
    _, entropy = stats.fused_attention_with_entropy(torch.zeros_like(query), key, value)
    torch.testing.assert_close(entropy, torch.full((1, 2), math.log(250)))
    uniform = torch.full((1, 2, 250, 250), 1 / 250)
    torch.testing.assert_close(stats.attention_entropy(uniform), torch.tensor([math.log(250)]))


def test_one_hot_attention_has_entropy_zero():
    query = 1000 * torch.eye(64)[None, None]
    _, entropy = stats.fused_attention_with_entropy(query, query, query)
    assert entropy.item() == 0
    assert stats.attention_entropy(torch.eye(64)[None, None]).item() == 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_accumulates_in_float32(dtype):
    query, key, value = qkv(factor=2.0, dtype=dtype)
    output, entropy = stats.fused_attention_with_entropy(query, key, value)
    assert output.dtype == dtype and entropy.dtype == torch.float32
    torch.testing.assert_close(entropy.double(), reference_entropy(query, key), atol=1e-4, rtol=0)
    attn_map = (query.double() @ key.double().mT * 72**-0.5).softmax(-1).to(dtype)
    mapped, rounded = stats.attention_entropy(attn_map, reduction="none"), attn_map.double()
    assert mapped.dtype == torch.float32
    expected = -torch.special.xlogy(rounded, rounded.clamp_min(1e-6)).sum(-1).mean(-1)
    torch.testing.assert_close(mapped.double(), expected, atol=1e-4, rtol=0)


def test_scale_is_honoured():
    query, key, value = qkv()
    output, entropy = stats.fused_attention_with_entropy(query, key, value, scale=0.9)
    torch.testing.assert_close(entropy.double(), reference_entropy(query, key, 0.9), atol=1e-4, rtol=0)
    assert torch.equal(output, F.scaled_dot_product_attention(query, key, value, scale=0.9))


def test_cross_attention_shapes():
    query, (key, value, _) = qkv((1, 2, 33, 8))[0], qkv((1, 2, 71, 8), seed=1)
    _, entropy = stats.fused_attention_with_entropy(query, key, value)
    torch.testing.assert_close(entropy.double(), reference_entropy(query, key), atol=1e-4, rtol=0)


def test_subsampled_estimate_is_within_a_percent_but_not_exact():
    query, key, value = qkv((2, 16, 256, 72))
    exact = stats.fused_attention_with_entropy(query, key, value)[1]
    estimate = stats.fused_attention_with_entropy(query, key, value, num_queries=32)[1]
    assert 0 < ((estimate - exact).abs() / exact).max() < 0.01


@pytest.mark.parametrize("by", ["row", "column"])
def test_subsampled_queries_are_spread_over_rows_and_columns(by):
    query, key, value = qkv((1, 2, 256, 16))
    sharpness = torch.linspace(0, 2, 16)  # entropy falls from the first row (or column) of the image to the last
    query = query * (sharpness.repeat_interleave(16) if by == "row" else sharpness.repeat(16))[:, None]
    exact = stats.fused_attention_with_entropy(query, key, value)[1]
    estimate = stats.fused_attention_with_entropy(query, key, value, num_queries=32)[1]
    torch.testing.assert_close(estimate, exact, rtol=0.05, atol=0)


def test_sum_is_slide_4_to_the_letter():
    attn_map = torch.rand(2, 3, 5, 7, dtype=torch.float64).softmax(-1)
    expected = [
        -sum(a * math.log(a + 1e-6) for h in range(3) for i in range(5) for a in attn_map[b, h, i].tolist()) / 3
        for b in range(2)
    ]
    assert stats.attention_entropy(attn_map, reduction="sum").tolist() == pytest.approx(expected, rel=1e-12)
    mean = stats.attention_entropy(attn_map)
    assert (5 * mean).tolist() == pytest.approx(expected, rel=1e-4)


def test_wrong_maps_are_refused():
    with pytest.raises(ValueError, match=r"\(3, 4\)"):
        stats.attention_entropy(torch.zeros(3, 4))
    with pytest.raises(ValueError, match="'max'"):
        stats.attention_entropy(torch.zeros(1, 1, 2, 2), reduction="max")


def test_snr_by_hand():
    clean = torch.tensor([[3.0, 4.0], [1.0, 0.0]])
    noisy = torch.tensor([[3.0, 9.0], [1.0, 0.0]])
    assert stats.snr(clean, noisy).tolist() == pytest.approx([25 / 25, 1 / 1e-6], rel=1e-5)
    with pytest.raises(ValueError, match="same shape"):
        stats.snr(clean, noisy[:1])


def test_latent_norm_by_hand():
    latents = torch.stack([torch.full((2, 2, 2), 3.0), torch.ones(2, 2, 2)])
    assert stats.latent_norm(latents).tolist() == pytest.approx([math.sqrt(72), math.sqrt(8)])
    half = stats.latent_norm(torch.full((1, 4, 4, 4), 200.0).half())  # 64 · 200² overflows float16
    assert half.dtype == torch.float32 and half.tolist() == [1600.0]


def test_tau_by_hand():
    assert stats.tau(2.0, 8) == pytest.approx(0.70711, abs=1e-5)
    assert stats.tau(2.0, 64) == 2.0
    assert stats.tau(1.5, 256) == 3.0
