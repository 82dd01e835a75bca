import dataclasses
import math
import re

import pytest

from dqar import CacheFormat, DQARConfig, ForecastPlan, Probe, ReusePlan

GROUPS = {"cache": CacheFormat, "probe": Probe}


def configured(name, value):
    """A configuration with one field, or one of a group as in ``"cache.modulations"``."""
    group, _, field = name.rpartition(".")
    return DQARConfig(**({group: GROUPS[group](**{field: value})} if group else {field: value}))


def test_the_defaults_are_the_decks():
    config = DQARConfig()
    assert (config.entropy_threshold, config.snr_range, config.quantize_bits) == (2.0, (0.5, 50.0), 8)
    assert (config.schedule, config.reuse_target) == ("depth_aware", "kv")
    assert (config.cache, config.probe) == (CacheFormat(), Probe())


NUMBER, PAIR = "None or a number of 0 or more", "None or two numbers, 0 <= low <= high"
BITS, FLAG, SHARE = "choose one of 16, 8, 4, 2", "choose one of True, False", "a number from 0 to 1"


@pytest.mark.parametrize(
    "field, values, accepted",
    [
        ("entropy_threshold", (-1, math.nan, "2", True), NUMBER),
        ("snr_range", ((2, 1), 3, (-1, 1), (0, math.nan), (1,), (None, 1)), PAIR),
        ("quantize_bits", (3, 32, None), BITS),
        ("quantize_mode", ("per_row",), "choose one of 'per_tensor', 'per_channel', 'per_token'"),
        ("mixed_precision", ("yes", None), FLAG),
        ("balance", ("yes", None), FLAG),
        ("reuse_target", ("map", "blocks"), "choose one of 'kv', 'output', 'block', 'residual'"),
        ("schedule", ("spiral", None), "choose one of 'depth_aware', 'all', 'none', "),
        ("static_interval", (1, 2.0, True), "an int of 2 or more"),
        ("max_reuse_streak", (0, 1.5, None), "an int of 1 or more"),
        ("warmup", (-1, 1.5, None), "an int of 0 or more"),
        ("cooldown", (-1, 1.5, None), "an int of 0 or more"),
        ("share_below", (-0.1, math.nan, "0.1", True, None), "a number of 0 or more"),
        ("policy", (7, "policy.safetensors"), "None or a ReusePolicy"),
        ("policy_threshold", (1.1, -0.1, math.nan, None), SHARE),
        ("plan", ({(1, 0, "cond")}, frozenset(), "plan.json"), "None or a ReusePlan; apply_dqar(pipe, plan) takes"),
        ("cache", (None, 1, {"forecast_order": 1}, Probe()), "a CacheFormat"),
        ("probe", (None, "record", CacheFormat()), "a Probe"),
        ("cache.forecast_order", (-1, 3, 1.0, True, None), "an int from 0 to 2"),
        ("cache.keep_channels", (-1, 1.0, True), "an int of 0 or more"),
        ("cache.layer_bits", (8, "84", (8, 3), [4, None], (8.0,)), "None or 16, 8, 4 or 2 for each layer"),
        ("cache.cross_attention", ("yes", None), FLAG),
        ("cache.modulations", ("yes", None), FLAG),
        ("probe.entropy_unit", ("bits",), "choose one of 'nats', 'normalized'"),
        ("probe.snr_source", ("true",), "choose one of 'predicted', 'schedule'"),
        ("probe.interval", (0, 2.0, True), "an int of 1 or more"),
        ("probe.queries", (0, 1.5, True), "None or an int of 1 or more"),
        ("probe.record", ("yes", None), FLAG),
    ],
)
def test_a_wrong_value_is_named_with_its_field(field, values, accepted):
    for value in values:
        with pytest.raises(ValueError) as error:
            configured(field, value)
        assert str(error.value).startswith(f"{field}={value!r} is not accepted: {accepted}")


@pytest.mark.parametrize(
    "options, message",
    [
        ({"mixed_precision": True, "reuse_target": "output"}, "mixed_precision=True .* only with reuse_target='kv'"),
        ({"mixed_precision": True, "quantize_bits": 16}, "mixed_precision=True .* only with quantize_bits 8, 4 or 2"),
        ({"balance": True, "reuse_target": "block"}, "balance=True .* only with reuse_target='kv'"),
        ({"balance": True, "quantize_bits": 16}, "balance=True .* only with quantize_bits 8, 4 or 2"),
        (
            {"cache": CacheFormat(forecast_order=1)},
            "cache.forecast_order=1 .* only with reuse_target 'output', 'block'",
        ),
        ({"cache": CacheFormat(fitted=True), "quantize_bits": 16}, "cache.fitted=True .* only with quantize_b"),
        ({"cache": CacheFormat(fitted=True, layer_bits=(16, 16))}, "cache.fitted=True .* or such cache.layer_bits"),
        ({"cache": CacheFormat(keep_channels=4), "quantize_bits": 16}, "cache.keep_channels=4 .* only with quantize_b"),
    ],
)
def test_fields_that_need_one_another_say_so(options, message):
    with pytest.raises(ValueError, match=message):
        DQARConfig(**options)


def test_bits_of_layers_take_the_place_of_quantize_bits():
    config = DQARConfig(quantize_bits=16, balance=True, cache=CacheFormat(fitted=True, layer_bits=[8, 2, 2]))
    assert config.cache.layer_bits == (8, 2, 2) and hash(config)
    assert [config.bits_of(layer) for layer in range(3)] == [8, 2, 2] and config.mean_bits == 4
    uniform = DQARConfig(quantize_bits=4)
    assert uniform.bits_of(27) == uniform.mean_bits == 4 and isinstance(uniform.mean_bits, int)


def test_a_forecast_plan_is_for_the_other_engine():
    plan = ForecastPlan([(), (1.0, 0.0)], {0}, [9, 1], (1.0, 1.0), 1, "model")
    with pytest.raises(ValueError, match=re.escape("apply_dqar(pipe, plan) takes a ForecastPlan")) as error:
        DQARConfig(plan=plan)
    assert len(str(error.value)) < 300  # no weights, no timesteps


def test_an_unknown_field_and_a_change_are_refused():
    with pytest.raises(TypeError, match="treshold"):
        DQARConfig(treshold=1)
    for config in (DQARConfig(), CacheFormat(), Probe()):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(config, next(iter(vars(config))), 3)


@pytest.mark.parametrize(
    "field, values",
    [
        ("entropy_threshold", (None, 0, 2, math.inf)),
        ("snr_range", (None, (0, 0), (0.5, 50.0), (0, math.inf))),
        ("share_below", (0, 0.5, math.inf)),
        ("policy_threshold", (0, 0.5, 1)),
        ("plan", (None, ReusePlan((), 1, 1), ReusePlan({(0, 0, "cond"), (49, 27, "uncond")}, 28, 50))),
        ("probe.interval", (1, 50)),
        ("cache.keep_channels", (0, 4)),
    ],
)
def test_the_ends_of_a_range_belong_to_it(field, values):
    group, _, name = field.rpartition(".")
    for value in values:
        config = configured(field, value)
        assert getattr(getattr(config, group) if group else config, name) == value


PLAN = {"plan": ReusePlan({(1, 0, "cond")}, 1, 2)}
NEITHER = ({"entropy_threshold": None, "snr_range": None}, {"entropy_threshold": math.inf, "snr_range": (0, math.inf)})


@pytest.mark.parametrize(
    "options, on_entropy, on_snr",
    [
        ({}, True, True),
        ({"schedule": "none"}, False, False),
        ({"entropy_threshold": None}, False, True),
        ({"entropy_threshold": math.inf}, False, True),
        ({"snr_range": None}, True, False),
        ({"snr_range": (0, math.inf)}, True, False),
        *((options, False, False) for options in NEITHER),
        *(({**options, "policy": abs}, True, True) for options in NEITHER),
        ({"policy": abs, "schedule": "none"}, False, False),
        (PLAN, False, False),
        ({"plan": ReusePlan((), 1, 2)}, False, False),
        ({**PLAN, "policy": abs}, False, False),
        ({**PLAN, "share_below": 0.1}, True, False),
        ({"share_below": 0.1, "schedule": "none"}, True, False),
        ({"share_below": 0.1, "entropy_threshold": None}, True, True),
    ],
)
def test_what_a_decision_looks_at(options, on_entropy, on_snr):
    config = DQARConfig(**options)
    assert (config.gates_on_entropy, config.gates_on_snr) == (on_entropy, on_snr)
    assert config.measures_entropy == on_entropy
    assert config.measures_latents == ("plan" not in options or on_entropy)
    looking = DQARConfig(**options, probe=Probe(record=True))
    assert looking.measures_entropy and looking.measures_latents
