import pytest
import torch

from dqar import CacheFormat, DQARConfig
from dqar.cache import QuantizedCache

MODES = ("per_tensor", "per_channel", "per_token")


def keys(seed=0):
    return torch.randn(2, 16, 8, generator=torch.Generator().manual_seed(seed))


def put(cache, layer_id=0, branch="cond", partners=None, **tensors):
    """The entry of one branch."""
    [entry] = cache.put(layer_id, {branch: slice(None)}, 0, tensors, partners)
    return entry


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
    entry = put(cache, k=k, v=v)
    scales = {16: 0}.get(options.get("quantize_bits"), 1 if options.get("mixed_precision") else 2) * 2 * 4
    assert cache.nbytes == entry.nbytes == per_value * (k.numel() + v.numel()) + scales
    torch.testing.assert_close(entry.v.dequantize(), v, atol=2.0, rtol=0)
    if options.get("mixed_precision"):
        torch.testing.assert_close(entry.k.dequantize(), k, rtol=1e-3, atol=1e-6)
    put(cache, k=k, v=v)
    assert len(cache) == 1
    cache.clear()
    assert cache.nbytes == 0


def test_the_cache_keeps_only_what_is_reused():
    for target, kept in (("kv", {"k", "v"}), ("output", {"output"})):
        cache = QuantizedCache(DQARConfig(reuse_target=target))
        entry = put(cache, k=keys(), v=keys(), output=keys())
        assert {name for name in ("k", "v", "output") if getattr(entry, name) is not None} == kept


@pytest.mark.parametrize("options", [{"quantize_mode": m} for m in MODES] + [{"mixed_precision": True}])
@pytest.mark.parametrize("bits", [8, 4, 2])
def test_an_entry_of_a_sample_is_the_same_alone_and_in_a_batch(options, bits):
    cache = QuantizedCache(DQARConfig(quantize_bits=bits, **options))
    batch = keys() * torch.tensor([1.0, 100.0])[:, None, None]
    together = put(cache, k=batch, v=batch)
    alone = put(cache, branch="uncond", k=batch[:1], v=batch[:1])
    assert torch.equal(together.k.dequantize()[:1], alone.k.dequantize())
    assert torch.equal(together.v.dequantize()[:1], alone.v.dequantize())


def test_a_new_entry_replaces_only_its_own_layer_and_branch():
    cache = QuantizedCache(DQARConfig())
    sites = [(0, "cond"), (0, "uncond"), (1, "cond")]
    entries = {site: put(cache, *site, k=keys(), v=keys()) for site in sites}
    entries[0, "uncond"] = put(cache, 0, "uncond", k=keys(), v=keys())
    assert len(cache) == 3
    assert all(cache.get(*site) is entries[site] for site in sites)
    assert cache.get(1, "uncond") is None


def test_an_entry_without_tensors_is_empty():
    cache = QuantizedCache(DQARConfig())
    entry = put(cache, output=keys())  # kv reuse needs keys and values
    assert entry.empty and entry.nbytes == cache.nbytes == 0


@pytest.mark.parametrize("bits", [8, 4, 2])
def test_unfit_values_are_refused(bits):
    with pytest.raises(ValueError, match="NaN or inf"):
        put(QuantizedCache(DQARConfig(quantize_bits=bits)), k=keys() * torch.nan, v=keys())


@pytest.mark.parametrize("options", [{"quantize_bits": 16}, {"mixed_precision": True}])
def test_an_entry_does_not_keep_the_whole_batch_alive(options):
    batch, cache = keys().half(), QuantizedCache(DQARConfig(**options))
    entry = put(cache, k=batch[:1], v=batch[1:])
    assert entry.k.data.untyped_storage().nbytes() == batch[:1].nbytes


PER_TENSOR = {"quantize_mode": "per_tensor", "quantize_bits": 4}


@pytest.mark.parametrize("balance, kept", [(True, 0), (False, 3), (True, 3)])
def test_the_cache_counts_balance_and_kept_channels(balance, kept):
    cache = QuantizedCache(DQARConfig(**PER_TENSOR, balance=balance, cache=CacheFormat(keep_channels=kept)))
    partner = torch.rand(2, 1, 8)
    entry = put(cache, partners={"k": partner, "v": partner}, k=keys(), v=keys(1))
    plain = 2 * 16 * 8 // 2 + 2 * 4  # two images of 16 tokens and 8 channels, a float32 scale each
    extra = 2 * 8 * 4 * balance + 2 * 16 * kept * 2 + 2 * kept * 2
    assert entry.k.nbytes == entry.v.nbytes == plain + extra and cache.nbytes == 2 * (plain + extra)


def test_keys_and_values_are_balanced_against_their_own_partners():
    def stored(config, partners=None):
        return put(QuantizedCache(config), partners=partners, k=keys(), v=keys(1))

    partners = {"k": torch.rand(2, 1, 8) + 0.1, "v": torch.rand(8) + 0.1}
    entry = stored(DQARConfig(**PER_TENSOR, balance=True), partners)
    for x, part, partner in ((keys(), entry.k, partners["k"]), (keys(1), entry.v, partners["v"])):
        torch.testing.assert_close(part.balance, (x.abs().amax(1, keepdim=True) / partner).sqrt())
    plain, unasked = stored(DQARConfig(**PER_TENSOR)), stored(DQARConfig(**PER_TENSOR), partners)
    assert torch.equal(plain.k.dequantize(), unasked.k.dequantize())
    assert not torch.equal(plain.k.dequantize(), entry.k.dequantize())
    assert not torch.equal(plain.v.dequantize(), entry.v.dequantize())


def test_mixed_precision_balances_and_keeps_channels_of_values_only():
    config = DQARConfig(**PER_TENSOR, mixed_precision=True, balance=True, cache=CacheFormat(keep_channels=2))
    ones = torch.ones(8)
    entry = put(QuantizedCache(config), partners={"k": ones, "v": ones}, k=keys(), v=keys(1))
    assert torch.equal(entry.k.dequantize(), keys().half().float())
    assert entry.v.balance is not None and entry.v.kept.shape == (2, 16, 2)


def test_outputs_keep_channels_too():
    config = DQARConfig(**PER_TENSOR, reuse_target="output", cache=CacheFormat(keep_channels=2))
    entry = put(QuantizedCache(config), output=keys())
    assert entry.output.kept.shape == (2, 16, 2)


@pytest.mark.parametrize(
    "target, options",
    [
        ("kv", {}),
        ("kv", {"mixed_precision": True}),
        ("output", {"cache": {"fitted": True}}),
        ("block", {"cache": {"keep_channels": 2}}),
        ("residual", {"cache": {"forecast_order": 1}}),
    ],
)
def test_each_layer_is_kept_in_its_own_bits(target, options):
    """Against a cache that has these bits in all layers."""

    def config(**bits):
        extras = {"layer_bits": bits.pop("layer_bits", None), **options.get("cache", {})}
        return DQARConfig(**{**options, **bits, "reuse_target": target, "cache": CacheFormat(**extras)})

    tensors = {name: keys(seed) for seed, name in enumerate(("k", "v", "output", "feed_forward"))}
    widths = (8, 16, 2, 4)
    mixed, total = QuantizedCache(config(layer_bits=widths)), 0
    for layer, bits in enumerate(widths):
        entry = put(mixed, layer, **tensors)
        if bits == 16:
            assert all(torch.equal(kept.dequantize(), tensors[name]) for name, kept in entry.stored.items())
            total += sum(tensors[name].nbytes for name in entry.stored)
            continue
        uniform = put(QuantizedCache(config(quantize_bits=bits)), **tensors)
        assert entry.stored.keys() == uniform.stored.keys() and entry.nbytes == uniform.nbytes
        for name, kept in entry.stored.items():
            assert torch.equal(kept.dequantize(), uniform.stored[name].dequantize())
        total += uniform.nbytes
    assert mixed.nbytes == total
