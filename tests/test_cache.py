import pytest
import torch

from dqar import CacheFormat, DQARConfig
from dqar.cache import CacheEntry, QuantizedCache

MODES = ("per_tensor", "per_channel", "per_token")


def keys(seed=0):
    return torch.randn(2, 16, 8, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(
    "options, per_value",
    [
        ({"quantize_bits": 16}, 4.0),  # the model's own float32
        ({"quantize_bits": 8, "quantize_mode": "per_tensor"}, 1.0),
        ({"quantize_bits": 4, "quantize_mode": "per_tensor"}, 0.5),
        ({"quantize_bits": 2, "quantize_mode": "per_tensor"}, 0.25),
        ({"quantize_mode": "per_tensor", "mixed_precision": True}, 1.5),  # K two bytes, V one
    ],
)
def test_the_cache_counts_every_byte(options, per_value):
    cache = QuantizedCache(DQARConfig(**options))
    k, v = keys(), keys(1)
    entry = CacheEntry(0, "cond")
    cache.put(entry, k, v)
    scales = {16: 0}.get(options.get("quantize_bits"), 1 if options.get("mixed_precision") else 2) * 2 * 4
    assert cache.nbytes == entry.nbytes == per_value * (k.numel() + v.numel()) + scales
    torch.testing.assert_close(entry.v.dequantize(), v, atol=2.0, rtol=0)
    if options.get("mixed_precision"):
        torch.testing.assert_close(entry.k.dequantize(), k, rtol=1e-3, atol=1e-6)
    cache.put(CacheEntry(0, "cond"), k, v)
    assert len(cache) == 1
    cache.clear()
    assert cache.nbytes == 0


def test_the_cache_keeps_only_what_is_reused():
    for target, kept in (("kv", {"k", "v"}), ("output", {"output"})):
        cache = QuantizedCache(DQARConfig(reuse_target=target))
        entry = CacheEntry(0, "cond")
        cache.put(entry, keys(), keys(), keys())
        assert {name for name in ("k", "v", "output") if getattr(entry, name) is not None} == kept


@pytest.mark.parametrize("options", [{"quantize_mode": m} for m in MODES] + [{"mixed_precision": True}])
@pytest.mark.parametrize("bits", [8, 4, 2])
def test_an_entry_of_a_sample_is_the_same_alone_and_in_a_batch(options, bits):
    cache = QuantizedCache(DQARConfig(quantize_bits=bits, **options))
    batch = keys() * torch.tensor([1.0, 100.0])[:, None, None]
    together, alone = CacheEntry(0, "cond"), CacheEntry(0, "uncond")
    cache.put(together, batch, batch)
    cache.put(alone, batch[:1], batch[:1])
    assert torch.equal(together.k.dequantize()[:1], alone.k.dequantize())
    assert torch.equal(together.v.dequantize()[:1], alone.v.dequantize())


def test_a_new_entry_replaces_only_its_own_layer_and_branch():
    cache = QuantizedCache(DQARConfig())
    sites = [(0, "cond"), (0, "uncond"), (1, "cond")]
    entries = {site: CacheEntry(*site) for site in sites}
    for entry in entries.values():
        cache.put(entry, keys(), keys())
    entries[0, "uncond"] = CacheEntry(0, "uncond")
    cache.put(entries[0, "uncond"], keys(), keys())
    assert len(cache) == 3
    assert all(cache.get(*site) is entries[site] for site in sites)
    assert cache.get(1, "uncond") is None


def test_an_entry_without_tensors_is_empty():
    cache = QuantizedCache(DQARConfig())
    entry = CacheEntry(0, "cond")
    cache.put(entry, output=keys())  # kv reuse needs keys and values
    assert entry.empty and entry.nbytes == cache.nbytes == 0


@pytest.mark.parametrize("bits", [8, 4, 2])
def test_unfit_values_are_refused(bits):
    with pytest.raises(ValueError, match="NaN or inf"):
        QuantizedCache(DQARConfig(quantize_bits=bits)).put(CacheEntry(0, "cond"), keys() * torch.nan, keys())


@pytest.mark.parametrize("options", [{"quantize_bits": 16}, {"mixed_precision": True}])
def test_an_entry_does_not_keep_the_whole_batch_alive(options):
    batch, cache = keys().half(), QuantizedCache(DQARConfig(**options))
    entry = CacheEntry(0, "cond")
    cache.put(entry, batch[:1], batch[1:])
    assert entry.k.data.untyped_storage().nbytes() == batch[:1].nbytes


PER_TENSOR = {"quantize_mode": "per_tensor", "quantize_bits": 4}


@pytest.mark.parametrize("balance, kept", [(True, 0), (False, 3), (True, 3)])
def test_the_cache_counts_balance_and_kept_channels(balance, kept):
    cache = QuantizedCache(DQARConfig(**PER_TENSOR, balance=balance, cache=CacheFormat(keep_channels=kept)))
    entry, partner = CacheEntry(0, "cond"), torch.rand(2, 1, 8)
    cache.put(entry, keys(), keys(1), key_partner=partner, value_partner=partner)
    plain = 2 * 16 * 8 // 2 + 2 * 4  # two images of 16 tokens and 8 channels, a float32 scale each
    extra = 2 * 8 * 4 * balance + 2 * 16 * kept * 2 + 2 * kept * 2
    assert entry.k.nbytes == entry.v.nbytes == plain + extra and cache.nbytes == 2 * (plain + extra)


def test_keys_and_values_are_balanced_against_their_own_partners():
    def put(config, **partners):
        entry = CacheEntry(0, "cond")
        QuantizedCache(config).put(entry, keys(), keys(1), **partners)
        return entry

    partners = {"key_partner": torch.rand(2, 1, 8) + 0.1, "value_partner": torch.rand(8) + 0.1}
    entry = put(DQARConfig(**PER_TENSOR, balance=True), **partners)
    for x, stored, partner in ((keys(), entry.k, "key_partner"), (keys(1), entry.v, "value_partner")):
        torch.testing.assert_close(stored.balance, (x.abs().amax(1, keepdim=True) / partners[partner]).sqrt())
    plain, unasked = put(DQARConfig(**PER_TENSOR)), put(DQARConfig(**PER_TENSOR), **partners)
    assert torch.equal(plain.k.dequantize(), unasked.k.dequantize())
    assert not torch.equal(plain.k.dequantize(), entry.k.dequantize())
    assert not torch.equal(plain.v.dequantize(), entry.v.dequantize())


def test_mixed_precision_balances_and_keeps_channels_of_values_only():
    config = DQARConfig(**PER_TENSOR, mixed_precision=True, balance=True, cache=CacheFormat(keep_channels=2))
    entry = CacheEntry(0, "cond")
    QuantizedCache(config).put(entry, keys(), keys(1), key_partner=torch.ones(8), value_partner=torch.ones(8))
    assert torch.equal(entry.k.dequantize(), keys().half().float())
    assert entry.v.balance is not None and entry.v.kept.shape == (2, 16, 2)


def test_outputs_keep_channels_too():
    config = DQARConfig(**PER_TENSOR, reuse_target="output", cache=CacheFormat(keep_channels=2))
    entry = CacheEntry(0, "cond")
    QuantizedCache(config).put(entry, output=keys())
    assert entry.output.kept.shape == (2, 16, 2)
