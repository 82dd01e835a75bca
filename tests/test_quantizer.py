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
