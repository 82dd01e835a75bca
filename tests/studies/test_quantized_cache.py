"""Which configurations the study of few-bit caches compares."""

from types import SimpleNamespace

import pandas as pd

from dqar.config import CacheFormat
from dqar.measure.results import Run
from dqar.studies import quantized_cache
from dqar.studies.compare import Method


def test_a_configuration_is_compared_with_itself_unquantized_whatever_its_levels(tmp_path, monkeypatch):
    compared = []
    monkeypatch.setattr(quantized_cache, "draw", lambda *args, **options: None)
    monkeypatch.setattr(Method, "draw", lambda *args, **options: SimpleNamespace(images=None))
    monkeypatch.setattr(
        quantized_cache, "compare", lambda method, *args, **options: compared.append(method) or pd.DataFrame({"n": [1]})
    )
    monkeypatch.setattr(quantized_cache, "summarized", lambda table: table)
    fitted = quantized_cache.cached("output", 2, cache=CacheFormat(fitted=True, forecast_order=1))
    quantized_cache.quantization_quality(Run("smoke", 0, tmp_path), [fitted])
    plain, own = (method.config for method in compared)
    assert own == fitted
    assert plain == quantized_cache.cached("output", 16, cache=CacheFormat(fitted=False, forecast_order=1))


def test_the_quality_is_that_of_the_bits_alone_in_the_median_and_at_the_5th_percentile():
    decibels = [20.0, 30, 40, 50, 60]
    rows = pd.DataFrame({"method": "m", "mse": 0.1, "mse_cache": [10 ** (-x / 10) for x in decibels]})
    found = quantized_cache.summarized(rows).iloc[0]
    assert round(found["median"], 6) == 40 and round(found["5th percentile"], 6) == 22 and round(found.psnr, 6) == 10
