import dataclasses
import math

import pytest

from dqar import DQARConfig


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
