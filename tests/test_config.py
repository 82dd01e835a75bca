import dataclasses
import math

import pytest

from dqar import DQARConfig, ReusePlan


def test_the_defaults_are_the_decks():
    config = DQARConfig()
    assert (config.entropy_threshold, config.snr_range, config.quantize_bits) == (2.0, (0.5, 50.0), 8)
    assert (config.schedule, config.reuse_target) == ("depth_aware", "kv")


@pytest.mark.parametrize(
    "field, value",
    [
        ("entropy_threshold", -1),
        ("entropy_threshold", math.nan),
        ("entropy_threshold", "2"),
        ("snr_range", (2, 1)),
        ("snr_range", 3),
        ("snr_range", (-1, 1)),
        ("quantize_bits", 3),
        ("quantize_bits", 32),
        ("quantize_mode", "per_row"),
        ("mixed_precision", "yes"),
        ("reuse_target", "map"),
        ("schedule", "spiral"),
        ("static_interval", 1),
        ("max_reuse_streak", 0),
        ("max_reuse_streak", 1.5),
        ("warmup", -1),
        ("policy", 7),
        ("entropy_unit", "bits"),
        ("snr_source", "true"),
        ("entropy_queries", 0),
        ("balance", "yes"),
        ("balance", None),
        ("keep_channels", -1),
        ("keep_channels", 1.0),
        ("keep_channels", True),
        ("share_below", -0.1),
        ("share_below", math.nan),
        ("share_below", "0.1"),
        ("share_below", True),
        ("policy_threshold", 1.1),
        ("policy_threshold", -0.1),
        ("policy_threshold", math.nan),
        ("policy_threshold", None),
        ("entropy_interval", 0),
        ("entropy_interval", 2.0),
        ("entropy_interval", True),
        ("plan", {(1, 0, "cond")}),
        ("plan", frozenset()),
        ("plan", "plan.json"),
    ],
)
def test_a_wrong_value_is_named_with_its_field(field, value):
    with pytest.raises(ValueError) as error:
        DQARConfig(**{field: value})
    assert f"{field}={value!r} is not accepted: " in str(error.value)


def test_mixed_precision_needs_keys_and_bits():
    for options in ({"reuse_target": "output"}, {"quantize_bits": 16}):
        with pytest.raises(ValueError, match="mixed_precision=True"):
            DQARConfig(mixed_precision=True, **options)


def test_an_unknown_field_and_a_change_are_refused():
    with pytest.raises(TypeError, match="treshold"):
        DQARConfig(treshold=1)
    with pytest.raises(dataclasses.FrozenInstanceError):
        DQARConfig().warmup = 3


def test_what_needs_no_look_measures_nothing():
    assert DQARConfig().measures_entropy
    assert not DQARConfig(schedule="none").measures_entropy
    assert not DQARConfig(entropy_threshold=math.inf).measures_entropy
    assert DQARConfig(schedule="none", record_entropy=True).measures_entropy
    assert DQARConfig(entropy_threshold=math.inf, policy=abs).measures_entropy  # a policy's feature


@pytest.mark.parametrize("options", [{"reuse_target": "output"}, {"quantize_bits": 16}])
def test_balance_needs_keys_and_bits(options):
    assert DQARConfig(balance=True, quantize_bits=2).balance
    with pytest.raises(ValueError, match="balance=True is not accepted: only with"):
        DQARConfig(balance=True, **options)


def test_kept_channels_need_others_that_are_quantized():
    assert DQARConfig(keep_channels=4, reuse_target="output").keep_channels == 4
    with pytest.raises(ValueError, match="keep_channels=4 is not accepted: only with quantize_bits 8, 4 or 2"):
        DQARConfig(keep_channels=4, quantize_bits=16)


@pytest.mark.parametrize(
    "field, values",
    [
        ("share_below", (0, 0.5, math.inf)),
        ("policy_threshold", (0, 0.5, 1)),
        ("entropy_interval", (1, 50)),
        ("plan", (None, ReusePlan((), 1, 1), ReusePlan({(0, 0, "cond"), (49, 27, "uncond")}, 28, 50))),
    ],
)
def test_the_ends_of_a_range_belong_to_it(field, values):
    assert all(getattr(DQARConfig(**{field: value}), field) == value for value in values)


PLAN = {"plan": ReusePlan({(1, 0, "cond")}, 1, 2)}


@pytest.mark.parametrize(
    "options, on_entropy, on_snr",
    [
        ({}, True, True),
        ({"schedule": "none"}, False, False),
        ({"entropy_threshold": math.inf}, False, True),
        ({"snr_range": (0, math.inf)}, True, False),
        ({"entropy_threshold": math.inf, "snr_range": (0, math.inf), "policy": abs}, True, True),
        ({"policy": abs, "schedule": "none"}, False, False),
        (PLAN, False, False),
        ({"plan": ReusePlan((), 1, 2)}, False, False),
        ({**PLAN, "policy": abs}, False, False),
        ({**PLAN, "share_below": 0.1}, True, False),
        ({"share_below": 0.1, "schedule": "none"}, True, False),
        ({"share_below": 0.1, "entropy_threshold": math.inf}, True, True),
    ],
)
def test_what_a_decision_looks_at(options, on_entropy, on_snr):
    config = DQARConfig(**options)
    assert (config.gates_on_entropy, config.gates_on_snr) == (on_entropy, on_snr)
    assert config.measures_entropy == on_entropy
    assert config.measures_latents == ("plan" not in options or on_entropy)
    looking = DQARConfig(**options, record_entropy=True)
    assert looking.measures_entropy and looking.measures_latents
