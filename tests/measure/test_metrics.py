import numpy as np
import pytest
import scipy.linalg
import torch
from helpers import random_transformer
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from dqar.measure import metrics


def test_psnr_by_hand():
    reference = torch.zeros(2, 1, 4, 4)
    images = torch.stack([torch.full((1, 4, 4), 0.1), torch.zeros(1, 4, 4)])
    assert metrics.psnr(images, reference).tolist() == pytest.approx([20.0, float("inf")])
    assert metrics.mean_psnr(images, reference) == pytest.approx(20 + 10 * np.log10(2))


@pytest.mark.parametrize("measure", [np.mean, np.median])
def test_the_interval_of_a_psnr_is_that_of_a_naive_bootstrap(measure):
    mse = 10 ** -np.random.default_rng(1).uniform(3, 5, 40)
    low, high = metrics.psnr_interval(mse, measure)
    rng = np.random.default_rng(2)
    trials = [-10 * np.log10(measure([mse[rng.integers(40)] for _ in mse])) for _ in range(2000)]
    assert [low, high] == pytest.approx(np.quantile(trials, [0.025, 0.975]), abs=0.25)
    assert low < -10 * np.log10(measure(mse)) < high
    assert metrics.psnr_interval(np.full(5, 1e-3)) == pytest.approx((30, 30))
    assert metrics.psnr_interval(np.zeros(5)) == (np.inf, np.inf)


def test_ssim_is_one_only_for_equal_images():
    images = torch.rand(3, 1, 8, 8)
    assert metrics.ssim(images, images).tolist() == pytest.approx([1.0] * 3)
    assert (metrics.ssim(images, images.flip(3)) < 0.9).all()


def test_frechet_distance_in_closed_form():
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(500, 6, generator=generator) @ torch.randn(6, 6, generator=generator)
    b = torch.randn(400, 6, generator=generator) + 1
    cov_a, cov_b = np.cov(a.numpy().T), np.cov(b.numpy().T)
    root = scipy.linalg.sqrtm(cov_a @ cov_b).real
    expected = ((a.mean(0) - b.mean(0)) ** 2).sum().item() + np.trace(cov_a + cov_b - 2 * root)
    assert metrics.frechet_distance(a, b) == pytest.approx(expected, rel=1e-5)
    assert metrics.frechet_distance(a, a) == pytest.approx(0, abs=1e-6)
    assert metrics.frechet_distance(a, a + 2) == pytest.approx(4 * 6, rel=1e-4)
    with pytest.raises(ValueError, match="finite"):
        metrics.frechet_distance(a * torch.nan, b)


def test_macs_of_a_dit_by_the_formula():
    """``12Nd² + 2N²d`` a block and sample, plus adaLN, embeddings and the output layers."""
    depth, width, tokens = 4, 16, 16
    model = random_transformer()
    inputs = {"timestep": torch.tensor([5]), "class_labels": torch.tensor([1])}
    with torch.no_grad():
        macs = metrics.count_macs(lambda: model(torch.randn(1, 1, 8, 8), **inputs))
    block = 12 * tokens * width**2 + 2 * tokens**2 * width
    conditioning = (depth + 1) * (256 * width + width**2) + depth * 6 * width**2 + 2 * width**2
    patches = tokens * 4 * width * 2
    assert macs == depth * block + conditioning + patches


def test_macs_are_those_of_torchs_own_counter():
    model = random_transformer()
    inputs = {"timestep": torch.tensor([5, 7]), "class_labels": torch.tensor([1, 2])}

    def call():
        return model(torch.randn(2, 1, 8, 8), **inputs)

    attention = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu  # which it has no formula for
    mapping = {attention: lambda q, k, v, *_args, **_kwargs: sdpa_flop_count(q, k, v)}
    with torch.no_grad(), FlopCounterMode(display=False, custom_mapping=mapping) as counter:
        call()
    with torch.no_grad():
        assert metrics.count_macs(call) == counter.get_total_flops() // 2


def test_interleaved_times_take_turns():
    order = []
    table = metrics.interleaved_times({"a": lambda: order.append("a"), "b": lambda: order.append("b")}, repeats=3)
    assert order == ["a", "b"] * 4
    assert len(table) == 6
    assert metrics.speedups(table, "a").loc["a"].tolist() == [1.0, 1.0, 1.0]
