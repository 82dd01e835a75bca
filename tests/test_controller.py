import itertools
import math

import pytest
import torch
from situations import OPEN

from dqar import DQARConfig, DQARController, Probe, ReusePlan
from dqar.policy import ReusePolicy

BY_SCHEDULE = {"probe": Probe(snr_source="schedule")}
NORMALIZED = {"probe": Probe(entropy_unit="normalized"), "entropy_threshold": 0.7}


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
        ("snr", {"config": BY_SCHEDULE, "steps": [0, 1], "snr": 1.0, "snr_schedule": 0.1}),
        ("reuse", {"config": BY_SCHEDULE, "steps": [0, 1], "snr": 0.1, "snr_schedule": 1.0}),
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
            if not len(controller.trace):
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


CLOSED = {"entropy_threshold": 0, "snr_range": (9, 9), "schedule": "none"}


def run(config, entropies, layers=1, total=50, first=0, controller=None):
    """A run as ``dqar.attention`` makes it, with (cond, uncond) entropies step by step. The trace's table."""
    controller = controller or DQARController(layers, DQARConfig(**config))
    for step, pair in enumerate(entropies, first):
        controller.begin_step(step, total, snr=1.0, latent_norm=1.0)
        for layer in range(layers):
            given = {branch: controller.should_reuse(layer, branch) for branch in ("cond", "uncond")}
            measure = controller.wants_entropy(layer)
            for (branch, decision), entropy in zip(given.items(), pair, strict=True):
                entropy = torch.tensor([[entropy]]) if measure and not decision.shared else None
                if decision.use_cache:
                    controller.reuse(decision.entry)
                elif controller.wants_commit(layer):
                    controller.commit(layer, branch, keys=keys(), values=keys(1), entropy=entropy)
                else:
                    controller.keep(layer, {branch: slice(None)}, entropy, 16, {})
    return controller.trace.to_pandas()


def decisions(table, branch="uncond", layer=0):
    return " ".join(table[(table.branch == branch) & (table.layer == layer)].decision)


@pytest.mark.parametrize("options", [CLOSED, OPEN, {"policy": lambda x: torch.zeros(len(x))}])
def test_a_plan_is_followed_whatever_the_gate_says(options):
    cached = {(step, 0, "cond") for step in range(2, 8)} | {(3, 1, "uncond"), (5, 1, "cond"), (5, 1, "uncond")}
    config = {**options, "plan": ReusePlan(cached | {(0, 1, "cond")}, 2, 50), "max_reuse_streak": 1, "warmup": 9}
    table = run(config, [(9.0, 9.0)] * 9, layers=2)
    sites = {
        reason: {(row.step, row.layer, row.branch) for row in rows.itertuples()}
        for reason, rows in table.groupby("reason")
    }
    assert set(sites) == {"reuse", "plan", "no cache"}
    assert sites["reuse"] == cached and sites["no cache"] == {(0, 1, "cond")}
    assert set(table.decision[table.reason == "reuse"]) == {"reuse"}
    assert set(table.decision[table.reason != "reuse"]) == {"compute"}
    assert table[(table.layer == 0) & (table.branch == "cond")].age.tolist() == [0, 0, 1, 2, 3, 4, 5, 6, 0]


def test_a_planned_site_that_nothing_was_cached_for_is_computed():
    controller = DQARController(2, DQARConfig(plan=ReusePlan({(1, 0, "cond"), (1, 1, "cond"), (1, 0, "uncond")}, 2, 5)))
    controller.begin_step(0, 5)
    controller.commit(0, "cond", keys=keys(), values=keys(1))
    controller.commit(1, "cond")
    controller.begin_step(1, 5)
    assert controller.should_reuse(0, "cond").reason == "reuse"
    assert controller.should_reuse(1, "cond").reason == "no cache"  # an entry without tensors
    assert controller.should_reuse(0, "uncond").reason == "no cache"  # the other branch's entry is not its own
    assert controller.should_reuse(1, "uncond").reason == "plan"


def test_a_plan_caches_only_what_it_reuses_next():
    controller = DQARController(3, DQARConfig(plan=ReusePlan({(2, 0, "cond"), (3, 1, "uncond")}, 3, 4)))
    committed = []
    for step in range(4):
        controller.begin_step(step, 4)
        committed.append([layer for layer in range(3) if controller.wants_commit(layer)])
    assert committed == [[], [0], [1], []]


@pytest.mark.parametrize(
    "threshold, expected", [(0, "reuse"), (0.5, "reuse"), (0.75, "reuse"), (0.7501, "policy"), (1, "policy")]
)
def test_the_policys_threshold_is_the_least_score_reused(threshold, expected):
    config = {"policy": lambda x: torch.full((len(x),), 0.75), "policy_threshold": threshold, "schedule": "all"}
    assert reason(config, steps=[0, 1], latent_norm=1.0) == expected


@pytest.mark.parametrize("pair", [(1.0, 1.25), (1.25, 1.0)])
@pytest.mark.parametrize("below, expected", [(0.25, "compute compute"), (0.2501, "compute share")])
def test_a_branch_shares_where_the_last_entropies_differ_by_less(pair, below, expected):
    table = run({"schedule": "none", "share_below": below}, [pair, (0.0, 9.0)])
    assert decisions(table) == expected
    assert decisions(table, "cond") == "compute compute"


def test_sharing_needs_both_entropies():
    controller = DQARController(1, DQARConfig(schedule="none", share_below=math.inf))
    for step, given in enumerate(({}, {"cond": 1.0}, {"uncond": 1.0}, {"cond": math.nan}, {"cond": 1.0}, {})):
        controller.begin_step(step, 9)
        assert controller.should_reuse(0, "cond").reason == "schedule"
        decision = controller.should_reuse(0, "uncond")
        assert decision.shared == (step in (3, 5))  # NaN is less than nothing
        assert not decision.use_cache and decision.entry is None
        assert decision.reason == ("shared" if decision.shared else "schedule")
        for branch, entropy in given.items():
            controller.commit(0, branch, entropy=entropy)


def test_layers_share_by_their_own_entropies():
    controller = DQARController(2, DQARConfig(schedule="none", share_below=0.1))
    controller.begin_step(0, 5)
    for layer, branch, entropy in ((0, "cond", 1.0), (0, "uncond", 2.0), (1, "cond", 2.0), (1, "uncond", 2.0)):
        controller.commit(layer, branch, entropy=entropy)
    controller.begin_step(1, 5)
    shared = {
        (layer, branch)
        for layer, branch in itertools.product((0, 1), ("cond", "uncond"))
        if controller.should_reuse(layer, branch).shared
    }
    assert shared == {(1, "uncond")}


@pytest.mark.parametrize("schedule, expected", [("all", "no cache"), ("none", "shared")])
def test_nothing_fresh_to_share_where_the_conditional_branch_is_reused(schedule, expected):
    controller = DQARController(1, DQARConfig(**{**OPEN, "schedule": schedule}, share_below=math.inf))
    controller.begin_step(0, 5)
    controller.commit(0, "cond", keys=keys(), values=keys(1), entropy=1.0)
    controller.commit(0, "uncond", entropy=1.0)  # its entropy is known, but nothing is cached
    controller.begin_step(1, 5)
    assert controller.should_reuse(0, "cond").use_cache == (schedule == "all")
    assert controller.should_reuse(0, "uncond").reason == expected


def test_a_branch_of_its_own_is_reused_before_it_shares():
    table = run({**OPEN, "share_below": math.inf}, [(1.0, 1.0)] * 9)
    assert decisions(table, "cond") == "compute reuse reuse reuse compute reuse reuse reuse compute"
    assert decisions(table, "uncond") == "compute reuse reuse reuse share reuse reuse reuse share"


@pytest.mark.parametrize("streak", [1, 2, 3])
def test_shares_in_a_row_are_limited(streak):
    table = run({"schedule": "none", "share_below": math.inf, "max_reuse_streak": streak}, [(1.0, 1.0)] * 9)
    expected = ["share" if step % (streak + 1) else "compute" for step in range(9)]
    assert decisions(table).split() == expected
    assert set(table.reason[table.decision == "share"]) == {"shared"}


def test_each_layers_shares_are_counted_alone():
    table = run({"schedule": "none", "share_below": math.inf, "max_reuse_streak": 2}, [(1.0, 1.0)] * 6, layers=3)
    for layer in range(3):
        assert decisions(table, layer=layer) == "compute share share compute share share"


def test_branches_that_part_stop_sharing():
    pairs = [(1.0, 1.0), (1.0, 7.0), (5.0, 7.0), (1.0, 1.0), (1.0, 1.0), (1.0, 1.0)]
    table = run({"schedule": "none", "share_below": 1.0}, pairs)
    # At step 3 cond was last measured 5.0, uncond 1.0 at step 0; the 7.0 of a shared site is never measured.
    assert decisions(table) == "compute share share compute share share"


def test_nothing_is_shared_in_the_warmup():
    table = run({"schedule": "none", "share_below": math.inf, "warmup": 3}, [(1.0, 1.0)] * 5)
    assert decisions(table) == "compute compute compute share share"


@pytest.mark.parametrize("interval, expected", [(1, "reuse"), (2, "entropy"), (3, "entropy"), (4, "entropy")])
def test_between_measurements_the_last_known_entropy_decides(interval, expected):
    table = run(
        {"schedule": "all", "probe": Probe(interval=interval), "max_reuse_streak": 9}, [(9.0, 9.0)] + [(1.0, 1.0)] * 5
    )
    cond = table[table.branch == "cond"]
    assert cond.reason[cond.step == 2].item() == expected
    assert cond.reason.tolist().index("reuse") == interval + 1  # the first step after the second measurement
    computed = cond[cond.decision == "compute"]
    assert set(computed.step[computed.entropy.notna()]) == {0, interval}


def test_an_entropy_measured_long_ago_still_opens_the_gate():
    table = run(
        {"schedule": "all", "probe": Probe(interval=10), "max_reuse_streak": 1}, [(1.0, 1.0)] + [(9.0, 9.0)] * 8
    )
    assert decisions(table, "cond") == "compute reuse compute reuse compute reuse compute reuse compute"
    assert table.entropy[table.step == 2].isna().all()


@pytest.mark.parametrize("interval", [1, 2, 3, 50])
@pytest.mark.parametrize(
    "options, ever", [({}, True), ({"schedule": "none"}, False), ({"plan": ReusePlan((), 2, 9)}, False)]
)
def test_entropy_is_wanted_at_every_nth_step_and_where_none_is_known(interval, options, ever):
    controller = DQARController(2, DQARConfig(probe=Probe(interval=interval), **options))
    for step in range(9):
        controller.begin_step(step, 9)
        assert controller.wants_entropy(0) == (ever and step % interval == 0)
        assert controller.wants_entropy(1) == ever  # never measured
        controller.commit(0, entropy=1.0 if controller.wants_entropy(0) else None)


@pytest.mark.parametrize("first, total", [(0, 50), (3, 50), (4, 40)])
def test_a_new_run_forgets_entropies_and_shares(first, total):
    config = {**OPEN, "schedule": "none", "share_below": math.inf, "probe": Probe(interval=10)}
    controller = DQARController(1, DQARConfig(**config))
    before = run({}, [(1.0, 1.0)] * 4, controller=controller)
    assert decisions(before) == "compute share share share"
    controller.trace.clear()
    again = run({}, [(1.0, 1.0)] * 4, controller=controller, first=first, total=total)
    assert decisions(again) == "compute share share share"
    assert again.entropy[again.step == first].notna().all()


def test_shares_are_traced_without_entropy():
    controller = DQARController(1, DQARConfig(schedule="none", share_below=math.inf))
    table = run({}, [(1.5, 2.5)] * 3, controller=controller)
    shares = table[table.decision == "share"]
    assert set(shares.branch) == {"uncond"} and set(shares.step) == {1, 2} and shares.entropy.isna().all()
    heads = controller.trace.heads_to_pandas()
    assert heads[heads.branch == "uncond"].step.tolist() == [0]
    assert heads[heads.branch == "cond"].step.tolist() == [0, 1, 2]
