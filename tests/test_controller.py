import math

import pytest
import torch

from dqar import DQARConfig, DQARController
from dqar.cache import CacheEntry, QuantizedCache
from dqar.policy import ReusePolicy

OPEN = {"entropy_threshold": math.inf, "snr_range": (0, math.inf), "schedule": "all"}


NORMALIZED = {"entropy_unit": "normalized", "entropy_threshold": 0.7}


def keys(seed=0):
    return torch.randn(2, 16, 8, generator=torch.Generator().manual_seed(seed))


def reason(config, *, steps, entropy=1.0, snr=1.0, prompt_length=None, layer=0, layers=4, total=50, **begin):
    """The reason given at the last of ``steps``, all computed ones committed with ``entropy``."""
    controller = DQARController(layers, DQARConfig(**config))
    for step in steps:
        controller.begin_step(step, total, snr=snr, prompt_length=prompt_length, **begin)
        decision = controller.should_reuse(layer)
        if decision.use_cache:
            controller.reuse(decision.entry)
        else:
            controller.commit(layer, keys=keys(), values=keys(1), entropy=entropy)
    return decision.reason


def test_slide_9s_loop():
    """The pseudocode's calls in its order, with attention computed by hand; entropy from the maps."""
    torch.manual_seed(0)
    controller = DQARController(
        num_layers=28, config=DQARConfig(entropy_threshold=3.0, snr_range=(0.5, 50.0), quantize_bits=8)
    )
    events = 0
    for step in range(10):
        x_0, x_t = torch.ones(1, 4), torch.ones(1, 4) * (1.5 if step else 9)
        controller.begin_step(step_index=step, total_steps=10, snr=2.0, prompt_length=64)
        for layer_id in range(28):
            decision = controller.should_reuse(layer_id=layer_id, branch="cond")
            query, key, value = torch.randn(3, 1, 2, 16, 8)
            if decision.use_cache and decision.entry:
                assert decision.entry.k.dequantize().shape == (1, 2, 16, 8)
                assert decision.entry.v.dequantize().shape == (1, 2, 16, 8)
                controller.reuse(decision.entry)
                events += 1
            else:
                attn_map = (query @ key.mT / 8**0.5).softmax(-1)
                controller.commit(
                    layer_id=layer_id,
                    branch="cond",
                    attn_map=attn_map,
                    keys=key,
                    values=value,
                    clean_latent=x_0,
                    noisy_latent=x_t,
                )
    table = controller.trace.to_pandas()
    assert len(table) == 280 and events == (table.decision == "reuse").sum() > 0
    early = table[(table.step < 3) & (table.decision == "reuse")]
    assert set(early.layer) <= {0, 1, 2}
    assert table[table.step == 0].snr.iloc[0] == pytest.approx(4 / 256, rel=1e-4)
    assert table.entropy.between(1.5, math.log(16)).all()


@pytest.mark.parametrize(
    "expected, options",
    [
        ("no cache", {"config": OPEN, "steps": [0]}),
        ("reuse", {"config": OPEN, "steps": [0, 1]}),
        ("warmup", {"config": {**OPEN, "warmup": 3}, "steps": [0, 1, 2]}),
        ("reuse", {"config": {**OPEN, "warmup": 3}, "steps": [0, 1, 2, 3]}),
        ("schedule", {"config": {}, "steps": [0, 1], "layer": 3, "layers": 28}),
        ("reuse", {"config": {}, "steps": [0, 1], "layer": 2, "layers": 28}),
        ("streak", {"config": {**OPEN, "max_reuse_streak": 2}, "steps": [0, 1, 2, 3]}),
        ("reuse", {"config": {**OPEN, "max_reuse_streak": 2}, "steps": [0, 1, 2, 3, 4]}),
        ("entropy", {"config": {}, "steps": [0, 1], "entropy": 2.0}),  # strictly less
        ("reuse", {"config": {}, "steps": [0, 1], "entropy": 1.999}),
        ("entropy", {"config": {}, "steps": [0, 1], "entropy": 1.0, "prompt_length": 8}),  # τ(8) = 0.71
        ("reuse", {"config": {}, "steps": [0, 1], "entropy": 0.7, "prompt_length": 8}),
        ("snr", {"config": {}, "steps": [0, 1], "snr": 0.49}),
        ("reuse", {"config": {}, "steps": [0, 1], "snr": 0.5}),
        ("reuse", {"config": {}, "steps": [0, 1], "snr": torch.tensor([1.0, 99.0])}),  # 50 on average
        ("snr", {"config": {}, "steps": [0, 1], "snr": 50.1}),
        ("snr", {"config": {}, "steps": [0, 1], "snr": None}),
        ("snr", {"config": {"snr_source": "schedule"}, "steps": [0, 1], "snr": 1.0, "snr_schedule": 0.1}),
        ("reuse", {"config": {"snr_source": "schedule"}, "steps": [0, 1], "snr": 0.1, "snr_schedule": 1.0}),
        ("reuse", {"config": NORMALIZED, "steps": [0, 1], "entropy": 1.9}),
        ("entropy", {"config": NORMALIZED, "steps": [0, 1], "entropy": 2.0}),
    ],
)  # fmt: skip
def test_every_reason(expected, options):
    assert reason(**options) == expected  # normalized: 16 tokens, 0.7 · ln 16 = 1.94


@pytest.mark.parametrize("bias, expected", [(9.0, "reuse"), (-9.0, "policy")])
def test_the_policy_decides_in_place_of_the_rule(bias, expected):
    policy = ReusePolicy()
    torch.nn.init.constant_(policy.layers[-1].bias, bias)
    got = reason({"policy": policy, "schedule": "all"}, steps=[0, 1], entropy=99.0, snr=1e6, latent_norm=3.0)
    assert got == expected


def test_the_policy_sees_slide_7s_features():
    seen = []
    policy = ReusePolicy()
    policy.register_forward_hook(lambda _m, args, _o: seen.append(args[0]))
    reason(
        {"policy": policy, "schedule": "all"}, steps=[0, 10], entropy=1.5, snr=4.0, latent_norm=7.0, prompt_length=32
    )
    expected = torch.tensor([[1.5, math.log(4.0), math.log(7.0), 10 / 49, 0.25]])
    torch.testing.assert_close(seen[0], expected)


def test_a_new_run_starts_from_an_empty_cache():
    for again in ((0, 50), (1, 50), (2, 40)):
        controller = DQARController(2, DQARConfig(**OPEN))
        for step, total in ((0, 50), (1, 50), again):
            controller.begin_step(step, total)
            if not controller.trace.rows:
                controller.commit(0, keys=keys(), values=keys(1))
        assert controller.should_reuse(0).reason == "no cache"


def test_branches_are_separate():
    controller = DQARController(2, DQARConfig(**OPEN))
    controller.begin_step(0, 5)
    controller.commit(0, "cond", keys=keys(), values=keys(1))
    controller.begin_step(1, 5)
    assert controller.should_reuse(0, "cond").use_cache
    assert not controller.should_reuse(0, "uncond").use_cache
    assert not controller.should_reuse(1, "cond").use_cache


def test_bad_calls_are_named():
    controller = DQARController(2)
    with pytest.raises(RuntimeError, match="begin_step"):
        controller.should_reuse(0)
    controller.begin_step(0, 5)
    with pytest.raises(ValueError, match="layer_id=2 is not accepted: an int from 0 to 1"):
        controller.should_reuse(2)
    with pytest.raises(ValueError, match="branch='both'"):
        controller.commit(0, "both")
    with pytest.raises(ValueError, match="step_index=5"):
        controller.begin_step(5, 5)
    with pytest.raises(ValueError, match="num_layers=0"):
        DQARController(0)


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
    entry = CacheEntry(0, "cond", {})
    cache.put(entry, k, v)
    scales = {16: 0}.get(options.get("quantize_bits"), 1 if options.get("mixed_precision") else 2) * 2 * 4
    assert cache.nbytes == entry.nbytes == per_value * (k.numel() + v.numel()) + scales
    torch.testing.assert_close(entry.v.dequantize(), v, atol=2.0, rtol=0)
    if options.get("mixed_precision"):
        torch.testing.assert_close(entry.k.dequantize(), k, rtol=1e-3, atol=1e-6)
    cache.put(CacheEntry(0, "cond", {}), k, v)
    assert len(cache) == 1
    cache.clear()
    assert cache.nbytes == 0


def test_the_cache_keeps_only_what_is_reused():
    for target, kept in (("kv", {"k", "v"}), ("output", {"output"})):
        cache = QuantizedCache(DQARConfig(reuse_target=target))
        entry = CacheEntry(0, "cond", {})
        cache.put(entry, keys(), keys(), keys())
        assert {name for name in ("k", "v", "output") if getattr(entry, name) is not None} == kept


def test_the_policy_has_slide_7s_size_and_survives_its_file(tmp_path):
    policy = ReusePolicy()
    sizes = {name: p.numel() for name, p in policy.named_parameters()}
    assert sum(n for name, n in sizes.items() if "weight" in name) == 4480
    assert sum(sizes.values()) == 4609
    policy.mean.fill_(0.3)
    policy.save(tmp_path / "policy.safetensors", {"data": "test"})
    features = torch.randn(7, 5)
    assert torch.equal(ReusePolicy.load(tmp_path / "policy.safetensors")(features), policy(features))
    assert ((policy(features) > 0) & (policy(features) < 1)).all()


def test_a_truncated_policy_file_is_named(tmp_path):
    path = tmp_path / "policy.safetensors"
    ReusePolicy().save(path)
    path.write_bytes(path.read_bytes()[:500])
    with pytest.raises(ValueError, match=r"policy\.safetensors is not a readable policy file"):
        ReusePolicy.load(path)
