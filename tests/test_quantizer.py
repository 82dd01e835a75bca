import itertools
import math

import pytest
import torch

from dqar.quantizer import quantize

BITS, MODES = (8, 4, 2), ("per_tensor", "per_channel", "per_token")


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("shape", [(2, 5, 7), (3,), (1, 1), (4, 3, 2, 9), (2, 333, 5)])
@pytest.mark.parametrize("scale_dtype", [torch.float32, torch.float16])
def test_error_is_at_most_half_a_step(bits, mode, shape, scale_dtype):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    kept = quantize(x, bits, mode, scale_dtype=scale_dtype)
    assert kept.scale.dtype == scale_dtype
    assert kept.dequantize().shape == x.shape and kept.dequantize().dtype == x.dtype
    assert ((kept.dequantize() - x).abs() <= kept.scale.double() / 2 * (1 + 1e-5)).all()


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("shape", [(0,), (0, 5), (3, 0), (2, 0, 4), ()])
@pytest.mark.parametrize("batch_dims", [0, 1])
def test_empty_and_scalar_tensors_keep_their_shape(bits, mode, shape, batch_dims):
    kept = quantize(torch.ones(shape), bits, mode, batch_dims=min(batch_dims, len(shape)))
    assert torch.equal(kept.dequantize(), torch.ones(shape))


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("mode", MODES)
def test_a_transposed_tensor_is_quantized_like_its_copy(bits, mode):
    x = torch.randn(2, 5, 7).transpose(1, 2)
    assert torch.equal(quantize(x, bits, mode).dequantize(), quantize(x.contiguous(), bits, mode).dequantize())


def test_values_beyond_float16_survive_float16_scales():
    x = torch.tensor([1e5, -3e4])
    torch.testing.assert_close(quantize(x, 8, scale_dtype=torch.float16).dequantize(), x, rtol=0, atol=1e5 / 254)


@pytest.mark.parametrize("bits, largest", [(8, 127), (4, 7), (2, 1)])
def test_the_formula_by_hand(bits, largest):
    x = torch.tensor([-1.0, -0.4, 0.0, 0.3, 0.9])
    expected = (x * largest).round() / largest  # max|x| = 1
    torch.testing.assert_close(quantize(x, bits).dequantize(), expected)


@pytest.mark.parametrize("mode, scales", [("per_tensor", 1), ("per_channel", 7), ("per_token", 10)])
def test_scales_are_shared_as_the_mode_says(mode, scales):
    assert quantize(torch.randn(2, 5, 7), 8, mode).scale.numel() == scales


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("size", [0, 1, 3, 64, 65, 66, 67])
def test_packing_is_real_and_exact(bits, size):
    largest = 2 ** (bits - 1) - 1
    x = torch.randint(-largest, largest + 1, (size,)).float()
    if size:
        x[0] = largest  # a scale of exactly 1
    kept = quantize(x, bits)
    assert torch.equal(kept.dequantize(), x)
    assert kept.data.untyped_storage().nbytes() == -(-size * bits // 8)
    assert kept.nbytes == kept.data.untyped_storage().nbytes() + kept.scale.untyped_storage().nbytes()


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("scale_dtype", [torch.float32, torch.float16])
def test_zeros_stay_zeros(bits, scale_dtype):
    x = torch.zeros(3, 5)
    x[1] = 1e-9
    kept = quantize(x, bits, "per_token", scale_dtype=scale_dtype)
    assert kept.scale.dtype == scale_dtype and (kept.scale > 0).all()
    assert torch.equal(kept.dequantize()[0], x[0]) and kept.dequantize().isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_comes_back_as_it_was(dtype):
    kept = quantize(torch.randn(4, 6).to(dtype), 8)
    assert kept.dequantize().dtype == dtype


def test_channels_with_outliers_need_scales_of_their_own():
    x = torch.randn(1, 100, 8)
    x[..., 0] *= 100
    error = {mode: (quantize(x, 4, mode).dequantize() - x)[..., 1:].norm().item() for mode in MODES}
    assert error["per_channel"] < 0.2 * error["per_tensor"]


@pytest.mark.parametrize("mode", MODES)
def test_batch_mates_do_not_matter_with_batch_dims(mode):
    x = torch.randn(3, 10, 4) * torch.tensor([1.0, 10, 100])[:, None, None]
    together = quantize(x, 4, mode, batch_dims=1).dequantize()
    alone = torch.cat([quantize(x[i : i + 1], 4, mode, batch_dims=1).dequantize() for i in range(3)])
    assert torch.equal(together, alone)


@pytest.mark.parametrize(
    "x, bits, mode, message",
    [
        (torch.ones(2), 3, "per_tensor", "bits=3"),
        (torch.ones(2), 16, "per_tensor", "bits=16"),
        (torch.ones(2), 8, "per_row", "'per_row'"),
        (torch.tensor([1.0, torch.nan]), 8, "per_tensor", "NaN or inf"),
        (torch.tensor([1.0, torch.inf]), 8, "per_tensor", "NaN or inf"),
        (torch.ones(2).int(), 8, "per_tensor", "int32"),
    ],
)
def test_bad_input_is_named(x, bits, mode, message):
    with pytest.raises(ValueError, match=message):
        quantize(x, bits, mode)


def uneven(*shape, seed=0):
    """Channels of very different size, in no order, and a partner whose channels differ otherwise."""
    generator = torch.Generator().manual_seed(seed)
    sizes = torch.logspace(-1, 1, shape[-1])[torch.randperm(shape[-1], generator=generator)]
    return torch.randn(shape, generator=generator) * sizes, torch.rand(shape[-1], generator=generator) + 0.05


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("mode, shared", [("per_tensor", (0, 1, 2)), ("per_channel", (0, 1)), ("per_token", (2,))])
def test_balanced_error_is_at_most_half_a_step_of_the_balanced_scale(bits, mode, shared):
    x, partner = uneven(2, 20, 8)
    factor = (x.double().abs().amax((0, 1)) / partner.double()).sqrt()
    step = (x.double() / factor).abs().amax(shared, keepdim=True) / (2 ** (bits - 1) - 1)
    kept = quantize(x, bits, mode, partner=partner)
    torch.testing.assert_close(kept.balance.double().flatten(), factor, rtol=1e-6, atol=0)
    torch.testing.assert_close(kept.scale.double(), step, rtol=1e-5, atol=0)
    bound = step * factor / 2 * (1 + 1e-4)
    assert ((kept.dequantize() - x).abs() <= bound).all()
    if mode != "per_channel":
        assert not ((quantize(x, bits, mode).dequantize() - x).abs() <= bound).all()


@pytest.mark.parametrize("bits", BITS)
def test_a_scale_per_channel_makes_balancing_pointless(bits):
    x, partner = uneven(2, 20, 8)
    balanced = quantize(x, bits, "per_channel", partner=partner).dequantize()
    torch.testing.assert_close(balanced, quantize(x, bits, "per_channel").dequantize(), rtol=1e-5, atol=1e-6)


def test_balancing_saves_the_product_from_a_channel_that_is_large_on_one_side_only():
    generator = torch.Generator().manual_seed(0)
    query, key = torch.randn(2, 100, 16, generator=generator)
    key[:, 3], query[:, 3] = key[:, 3] * 100, query[:, 3] / 100
    product = query.double() @ key.double().T

    def error(**options):
        return (query.double() @ quantize(key, 4, **options).dequantize().double().T - product).norm() / product.norm()

    assert error() > 0.9  # one scale rounds all other channels to zero
    assert error(partner=query.abs().amax(0)) < 0.2


@pytest.mark.parametrize("bits", BITS)
def test_balancing_has_nothing_to_do_where_both_sides_are_large_in_the_same_channels(bits):
    x, other = uneven(2, 20, 8)
    plain = quantize(x, bits).dequantize()
    same = quantize(x, bits, partner=x.abs().amax((0, 1)) * 0.3).dequantize()
    torch.testing.assert_close(same, plain, rtol=1e-5, atol=1e-6)
    assert not torch.allclose(quantize(x, bits, partner=other).dequantize(), plain, rtol=1e-2)


def test_a_partner_may_have_any_shape_that_fits():
    x, partner = uneven(2, 20, 8)
    options = {"bits": 4, "batch_dims": 1}
    expected = quantize(x, partner=partner, **options).dequantize()
    for shape in ((1, 8), (1, 1, 8)):
        assert torch.equal(quantize(x, partner=partner.view(shape), **options).dequantize(), expected)
    assert torch.equal(quantize(x, partner=partner.expand(2, 1, 8), **options).dequantize(), expected)
    other = torch.stack([partner, partner.flip(0)])[:, None]
    got = quantize(x, partner=other, **options).dequantize()
    assert torch.equal(got[0], expected[0]) and not torch.equal(got[1], expected[1])


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_kept_channels_come_back_and_leave_the_rest_better(bits, mode, dtype):
    x = uneven(2, 20, 8)[0].to(dtype)
    salient = x.double().abs().amax((0, 1)).argsort(descending=True)[:3]
    rest = [channel for channel in range(8) if channel not in salient]
    kept = quantize(x, bits, mode, keep_channels=3)
    got, plain = kept.dequantize(), quantize(x, bits, mode).dequantize()
    assert set(kept.kept_channels.flatten().tolist()) == set(salient.tolist())
    assert kept.kept.dtype == (torch.float16 if dtype == torch.float32 else dtype)
    assert torch.equal(got[..., salient], x[..., salient].to(kept.kept.dtype).to(dtype))
    assert torch.equal(got[..., rest], quantize(x.index_fill(-1, salient, 0), bits, mode).dequantize()[..., rest])
    errors = [(y.double() - x.double())[..., rest].norm() for y in (got, plain)]
    assert errors[0] == errors[1] if mode == "per_channel" else errors[0] < 0.9 * errors[1]


@pytest.mark.parametrize("mode", MODES)
def test_kept_and_balanced_go_together(mode):
    x, partner = uneven(2, 20, 8)
    both = quantize(x, 4, mode, partner=partner, keep_channels=2)
    salient = x.abs().amax((0, 1)).topk(2).indices
    expected = quantize(x.index_fill(-1, salient, 0), 4, mode, partner=partner).dequantize()
    expected[..., salient] = x[..., salient].half().float()
    torch.testing.assert_close(both.dequantize(), expected)


@pytest.mark.parametrize("bits, data", [(8, 160), (4, 80), (2, 40)])
@pytest.mark.parametrize("mode, scales", [("per_tensor", 2), ("per_channel", 16), ("per_token", 20)])
def test_bytes_count_all_that_is_stored(bits, data, mode, scales):
    x, partner = uneven(2, 10, 8)
    kept = quantize(x, bits, mode, batch_dims=1, partner=partner, keep_channels=3)
    parts = (kept.data, kept.scale, kept.balance, kept.kept, kept.kept_channels)
    # float32 scales and balance, two bytes for each of 3 channels' values and for its number
    assert kept.nbytes == data + 4 * scales + 4 * 2 * 8 + 2 * 2 * 10 * 3 + 2 * 2 * 3
    assert kept.nbytes == sum(part.untyped_storage().nbytes() for part in parts)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("keep_channels", [0, 2])
def test_zeros_on_either_side_stay_finite(bits, mode, keep_channels):
    x, partner = uneven(2, 20, 8)
    x[..., 2], x[1, :, 5], x[1, 7], partner[4] = 0, 0, 0, 0
    for values, other in ((x, partner), (x * 0, partner), (x, partner * 0), (x * 0, partner * 0)):
        kept = quantize(values, bits, mode, batch_dims=1, partner=other, keep_channels=keep_channels)
        got = kept.dequantize()
        assert got.isfinite().all() and (got[values == 0] == 0).all()
        assert ((got - values).abs() <= kept.scale * kept.balance / 2 * (1 + 1e-4) + values.abs() * 2**-11).all()


@pytest.mark.parametrize("keep_channels", [8, 9, 1000])
@pytest.mark.parametrize("options", [{}, {"partner": torch.ones(8)}])
def test_as_many_kept_channels_as_there_are_leave_nothing_to_quantize(keep_channels, options):
    x, _ = uneven(2, 20, 8)
    got = quantize(x, 2, keep_channels=keep_channels, **options).dequantize()
    assert torch.equal(got, x.half().float())


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("options", [{"keep_channels": 2}, {"partner": True}, {"keep_channels": 2, "partner": True}])
def test_batch_mates_change_neither_balance_nor_kept_channels(mode, options):
    x = torch.stack([uneven(20, 8, seed=seed)[0] * 10**seed for seed in range(3)])
    partners = torch.stack([uneven(1, 8, seed=seed)[1] for seed in range(3)])[:, None]

    def stored(rows):
        extra = {"partner": partners[rows]} if "partner" in options else {}
        return quantize(x[rows], 4, mode, batch_dims=1, **{**options, **extra})

    together = stored(slice(0, 3))
    alone = torch.cat([stored(slice(i, i + 1)).dequantize() for i in range(3)])
    assert torch.equal(together.dequantize(), alone)
    if "keep_channels" in options:
        assert len({frozenset(numbers) for numbers in together.kept_channels.flatten(1).tolist()}) == 3


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", [(5, 7), (2, 5, 7), (4, 3, 2, 9)])
def test_balancing_keeps_dtype_and_shape(bits, mode, dtype, shape):
    x, partner = uneven(*shape)
    x, partner = x.to(dtype).transpose(0, -2), partner.to(dtype)
    got = quantize(x, bits, mode, partner=partner, keep_channels=1).dequantize()
    assert got.dtype == dtype and got.shape == x.shape
    exact = quantize(x.float(), bits, mode, partner=partner.float(), keep_channels=1).dequantize()
    torch.testing.assert_close(got.float(), exact, rtol=2 * torch.finfo(dtype).eps, atol=0)


def test_float16_channels_at_the_end_of_the_range_survive_balancing():
    x = torch.full((4, 3), 65504.0).half() * torch.tensor([1.0, 1e-3, 1e-6]).half()
    kept = quantize(x, 8, partner=torch.tensor([6e-8, 1.0, 65504.0]).half())
    bound = kept.scale.double() * kept.balance.double() / 2 + x.double() * 2**-11
    assert ((kept.dequantize().double() - x.double()).abs() <= bound).all()


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("mode", ["per_tensor", "per_channel", "per_token"])
@pytest.mark.parametrize("options", [{}, {"keep_channels": 1}, {"keep_channels": 3, "partner": torch.ones(8)}])
def test_one_bad_value_is_found_whatever_the_options(value, mode, options):
    x = torch.randn(2, 5, 8)
    x[1, 2, 3] = value
    with pytest.raises(ValueError, match="NaN or inf"):
        quantize(x, 8, mode, batch_dims=1, **options)


# --- fitted levels ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits, error", [(8, 0.00936), (4, 0.1074), (2, 0.3448)])
def test_fitted_levels_reach_the_best_uniform_quantizer_of_gaussian_data(bits, error):
    """Root of the least mean squared error of evenly spaced levels (Max 1960, and 40.57 dB for 256 levels)."""
    x = torch.randn(100_000, generator=torch.Generator().manual_seed(0))
    kept = quantize(x, bits, fitted=True)
    assert ((kept.dequantize() - x).norm() / x.norm()).item() == pytest.approx(error, rel=0.03)
    assert len(kept.dequantize().unique()) >= (2**bits if bits < 8 else 240)


@pytest.mark.parametrize("mode", MODES)
def test_fitted_levels_are_the_best_that_a_search_finds(mode):
    torch.manual_seed(4)
    x = torch.distributions.StudentT(3.0).sample((2, 16, 16)) + 3
    fitted_error = (quantize(x, 2, mode, batch_dims=1, fitted=True).dequantize() - x).square().sum().item()
    groups = {"per_tensor": x.flatten(1), "per_channel": x.mT.flatten(0, 1), "per_token": x.flatten(0, 1)}[mode]
    least = 0.0
    for group in groups:
        low, high = group.min(), group.max()
        scales = torch.linspace(1e-3, 1, 120)[:, None, None] * (high - low)
        offsets = torch.linspace(0, 1, 120)[None, :, None] * (high - low) + low
        levels = ((group - offsets) / scales).round().clamp(-2, 1) * scales + offsets
        least += (levels - group).square().sum(-1).min().item()
    assert fitted_error < 1.2 * least


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fitted_levels_are_never_far_worse_than_the_slides(bits, mode, dtype):
    generator = torch.Generator().manual_seed(2)
    for x in (torch.randn(2, 40, 24, generator=generator), torch.randn(2, 40, 24, generator=generator) ** 5):
        x = x.to(dtype)
        plain, fitted = (quantize(x, bits, mode, batch_dims=1, fitted=f).dequantize() for f in (False, True))
        assert fitted.dtype == dtype and (fitted - x).norm() <= 1.02 * (plain - x).norm() + 1e-3 * x.norm()


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("shape", [(2, 5, 7), (2, 0, 4), (2, 1, 1), (2, 3)])
def test_fitted_constants_come_back(bits, mode, shape):
    x = torch.full(shape, -1.25)
    kept = quantize(x, bits, mode, batch_dims=1, fitted=True, scale_dtype=torch.float16)
    torch.testing.assert_close(kept.dequantize(), x, atol=1e-3, rtol=0)


def test_fitted_levels_cost_an_offset_and_are_cut_by_rows():
    x = torch.randn(3, 64, 10, generator=torch.Generator().manual_seed(3)) + torch.arange(10)
    kept = quantize(x, 2, "per_channel", batch_dims=1, fitted=True, scale_dtype=torch.float16)
    assert kept.nbytes == x.numel() // 4 + 3 * 10 * (2 + 2)
    part = kept.rows(slice(1, 3)).clone()
    assert torch.equal(part.dequantize(), kept.dequantize()[1:]) and part.nbytes == kept.nbytes * 2 // 3
    alone = quantize(x[1:2], 2, "per_channel", batch_dims=1, fitted=True, scale_dtype=torch.float16)
    assert torch.equal(alone.dequantize(), kept.dequantize()[1:2])


# --- levels that keep a product --------------------------------------------------------------------------------------


def products(heads=2, width=12, tokens=40, seed=5):
    """Keys and values ``[2, tokens, channels]``; queries ``[2, heads, tokens, width]`` that mostly look in one
    direction, as those of a trained model do, and their map."""
    generator = torch.Generator().manual_seed(seed)
    keys, values, queries = torch.randn(3, 2, tokens, heads * width, generator=generator)
    queries = by_head(queries + 3 * torch.randn(2, 1, heads * width, generator=generator), heads)
    return keys, values, queries, (queries @ by_head(keys, heads).mT / width**0.5).softmax(-1)


def by_head(x, heads):
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def error_of_product(kept, x, factor, over_tokens):
    error = by_head((kept.dequantize() - x).double(), factor.shape[1])
    return (factor.double() @ (error if over_tokens else error.mT)).square().sum().item()


def eliminated(x, scale, offset, factor, bits, rounds=8):
    """Integers of one head's rows ``[N, d]``, group by group: the nearest to the real numbers that are best for it if
    later ones could be any real number. In float64, by eliminating those, without any factorization."""
    weight = factor.double().mT @ factor.double()
    weight = weight + 0.01 * weight.diagonal().mean() * torch.eye(len(weight))
    order, size = weight.diagonal().argsort(descending=True).tolist(), -(-len(weight) // rounds)
    groups = [order[first : first + size] for first in range(0, len(order), size)]
    q, error = torch.zeros_like(x), torch.zeros_like(x)
    for number, now in enumerate(groups):
        done, free = sum(groups[:number], []), sum(groups[number + 1 :], [])
        left = weight[done + now][:, done + now]
        if free:
            mixed = weight[free][:, done + now]
            left = left - mixed.mT @ torch.linalg.solve(weight[free][:, free], mixed)
        own = slice(len(done), None)
        shift = torch.linalg.solve(left[own, own], left[own, : len(done)] @ error[:, done].mT).mT
        wanted = (x[:, now] - shift - offset[:, now]) / scale[:, now]
        q[:, now] = wanted.round().clamp(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
        error[:, now] = q[:, now] * scale[:, now] + offset[:, now] - x[:, now]
    return q


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("width", [1, 5, 12, 24])
@pytest.mark.parametrize("over_tokens", [False, True])
def test_levels_that_keep_a_product_are_those_of_a_plain_elimination(bits, mode, width, over_tokens):
    keys, values, queries, attention_map = products(width=width)
    x, factor = (values, attention_map) if over_tokens else (keys, queries)
    options = {"batch_dims": 1, "fitted": True, "scale_dtype": torch.float16, "over_tokens": over_tokens}
    kept, plain = (quantize(x, bits, mode, factor=own, **options) for own in (factor, None))
    assert torch.equal(kept.scale, plain.scale) and torch.equal(kept.offset, plain.offset)
    assert kept.nbytes == plain.nbytes and kept.data.shape == plain.data.shape
    parts = (x, kept.scale, kept.offset, kept.dequantize())
    own = [part.double().expand(x.shape)[1, :, width:] for part in parts]  # the second sample's second head
    x, scale, offset, found = [part.mT for part in own] if over_tokens else own
    found = ((found - offset) / scale).round()
    agree = found == eliminated(x, scale, offset, factor[1, 1], bits)
    assert agree.double().mean() > 0.99  # float32 may round a tie the other way


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("over_tokens, gain", [(False, 3), (True, 1)])  # random maps have no pattern to use
def test_levels_that_keep_a_product_do_so_in_the_same_bytes(bits, over_tokens, gain):
    keys, values, queries, attention_map = products()
    x, factor = (values, attention_map) if over_tokens else (keys, queries)
    plain, kept, sampled = (
        quantize(x, bits, "per_channel", batch_dims=1, fitted=True, factor=own, over_tokens=over_tokens)
        for own in (None, factor, factor[:, :, ::2])
    )
    assert plain.nbytes == kept.nbytes == sampled.nbytes
    errors = [error_of_product(own, x, factor, over_tokens) for own in (plain, sampled, kept)]
    assert errors[0] > errors[1] > errors[2] and 10 * math.log10(errors[0] / errors[2]) > gain


@pytest.mark.parametrize("bits, most", [(4, 0.27), (2, 0.16)])
def test_bytes_at_the_size_of_dit_xl_2_stay_within_slide_16s_budget(bits, most):
    x = torch.randn(1, 256, 1152, generator=torch.Generator().manual_seed(0))
    options = {"batch_dims": 1, "fitted": True, "scale_dtype": torch.float16, "over_tokens": True}
    kept = quantize(x, bits, "per_channel", factor=torch.randn(1, 16, 32, 256).softmax(-1), **options)
    assert kept.nbytes == 256 * 1152 * bits // 8 + 1152 * (2 + 2) and kept.nbytes / (2 * x.numel()) <= most


def test_levels_that_keep_a_product_come_near_to_the_best_of_all():
    keys, _, queries, _ = products(heads=1, width=4, tokens=24)
    kept = quantize(keys, 2, "per_channel", batch_dims=1, fitted=True, factor=queries)
    every = torch.tensor(list(itertools.product((-2.0, -1.0, 0.0, 1.0), repeat=4)))
    levels = every[:, None, None] * kept.scale + kept.offset  # [256, 2, 1, 4]
    least = ((levels - keys) @ queries[:, 0].mT).square().sum(-1).min(0).values.sum().item()
    assert error_of_product(kept, keys, queries, over_tokens=False) < 1.5 * least


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("over_tokens", [False, True])
def test_batch_mates_do_not_matter_to_levels_that_keep_a_product(mode, over_tokens):
    keys, values, queries, attention_map = products()
    x, factor = (values, attention_map) if over_tokens else (keys, queries)
    together, alone = (
        quantize(x[rows], 4, mode, batch_dims=1, fitted=True, factor=factor[rows], over_tokens=over_tokens).dequantize()
        for rows in (slice(0, 2), slice(1, 2))
    )
    assert torch.equal(together[1:], alone)


def test_a_product_with_zero_leaves_the_nearest_levels():
    keys, _, queries, _ = products()
    plain, kept = (quantize(keys, 4, "per_channel", batch_dims=1, fitted=True, factor=x) for x in (None, queries * 0))
    assert torch.equal(plain.dequantize(), kept.dequantize())


@pytest.mark.parametrize(
    "changes",
    [
        {"fitted": False},
        {"keep_channels": 1},
        {"partner": torch.ones(24)},
        {"over_tokens": True},
        {"factor": torch.ones(2, 5, 40, 12)},
        {"factor": torch.ones(40, 12)},
    ],
)
def test_a_factor_that_does_not_fit_is_named(changes):
    keys, _, queries, _ = products()
    with pytest.raises(ValueError, match=r"factor=\[.* is not accepted: as x is multiplied by head, of fitted levels"):
        quantize(keys, 4, **{"fitted": True, "factor": queries, **changes})
