import math

import pytest
import torch

from dqar import DQARConfig, DQARController
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
        ("reuse", {"config": {}, "steps": [0, 1], "snr": 50.0}),
        ("snr", {"config": {}, "steps": [0, 1], "snr": math.nan}),
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


@pytest.mark.parametrize("missing", ["snr", "latent_norm"])
def test_the_policy_asks_for_what_it_lacks(missing):
    begin = {"snr": 1.0, "latent_norm": 1.0, missing: None}
    with pytest.raises(ValueError, match="needs begin_step's snr and latent_norm"):
        reason({"policy": ReusePolicy(), "schedule": "all"}, steps=[0, 1], **begin)


def test_the_trace_says_what_was_decided_on():
    controller = DQARController(2, DQARConfig(**{**OPEN, "entropy_threshold": 2.0}))
    attn_map = torch.rand(2, 3, 16, 16, dtype=torch.float64).softmax(-1)
    for step in range(3):
        controller.begin_step(step, 5, snr=4.0, prompt_length=8, timestep=900.0 - step)
        decision = controller.should_reuse(1)
        controller.commit(1, keys=keys(), values=keys(1), attn_map=attn_map if step else attn_map * 0 + 1 / 16)
        if step == 0:  # uniform attention: ln 16 nats in each head
            assert controller.trace.to_pandas().entropy.item() == pytest.approx(math.log(16), abs=1e-5)
    table = controller.trace.to_pandas()
    assert decision.reason == "entropy"
    assert table.reason.tolist() == ["no cache", "entropy", "entropy"]
    assert table.threshold.tolist() == pytest.approx([2 * 8**-0.5] * 3)  # τ(8)
    assert table.timestep.tolist() == [900.0, 899.0, 898.0]
    heads = controller.trace.heads_to_pandas()
    expected = -(attn_map * attn_map.log()).sum(-1).mean((0, 2))
    assert heads[heads.step == 2].entropy.tolist() == pytest.approx(expected.tolist(), abs=1e-5)


@pytest.mark.parametrize(
    "entropy, heads",
    [(torch.tensor([[1.0, 2.0], [3.0, 4.0]]), [2.0, 3.0]), (torch.tensor([2.0, 3.0]), [2.0, 3.0]), (2.5, [2.5])],
)
@pytest.mark.parametrize("options", [{"keys": keys(), "values": keys(1)}, {}])
def test_entropy_may_be_given_by_sample_and_head_by_head_or_as_a_number(entropy, heads, options):
    controller = DQARController(1)
    controller.begin_step(0, 5)
    controller.commit(0, entropy=entropy, **options)
    assert controller.trace.heads_to_pandas().entropy.tolist() == heads
    assert controller.trace.to_pandas().entropy.tolist() == [2.5]


def test_a_reused_row_carries_its_source():
    controller = DQARController(1, DQARConfig(**OPEN))
    for step in range(4):
        controller.begin_step(step, 5, snr=1.0)
        decision = controller.should_reuse(0)
        if decision.use_cache:
            controller.reuse(decision.entry)
        else:
            controller.commit(0, keys=keys(), values=keys(1), entropy=1.25)
    table = controller.trace.to_pandas()
    assert table.age.tolist() == [0, 1, 2, 3]
    assert table.entropy.tolist() == [1.25] * 4
    # K and V of two images: 16 × 8 int8, and a float32 scale for each of 8 channels
    assert table.bytes.tolist() == [2 * 2 * (16 * 8 + 8 * 4)] * 4
    assert controller.cache.nbytes == table.bytes.iloc[-1]
