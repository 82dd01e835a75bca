import dataclasses
import math

import pandas as pd
import pytest
import torch
from helpers import draw as draw_latents
from helpers import embedded_pipeline
from torch.nn import functional as F

from dqar import DQARConfig, ReusePlan
from dqar.config import CacheFormat
from dqar.forecast.plan import ForecastPlan
from dqar.measure.sampling import OPEN
from dqar.models.profiles import get_profile
from dqar.peers.registry import Peer
from dqar.studies import challenges
from dqar.studies.compare import FULL, Method, check_again, compare, compare_all, draw, only, summarize

PROFILE = get_profile("smoke", batch_size=4, num_samples=3)


@pytest.fixture(scope="module")
def reference():
    return draw(FULL, PROFILE, 0)


def test_the_reference_is_not_drawn_again_and_is_itself(reference):
    same = compare(FULL, reference, PROFILE, 0)
    assert (same.mse == 0).all() and (same.macs_speedup == 1).all() and same.image.tolist() == [0, 1, 2]
    assert (same.predicted == same.label).all() and same.features[0].shape == (64,)


def test_rows_are_what_the_images_say(reference):
    plan = ReusePlan({(step, layer, "cond") for step in (1, 3) for layer in range(28)}, 28, 8)
    method = Method("half", config=DQARConfig(plan=plan, reuse_target="output", cache=CacheFormat(modulations=False)))
    half = compare(method, reference, PROFILE, 0, beside={"other": 1 - reference.images})
    assert (half.events == 56).all() and (half.sites_reused == 56 / (8 * 28 * 2)).all() and (half.mse > 0).all()
    assert (half.mse_other > half.mse).all() and (half.cache_bytes > 0).all() and (half.target == "output").all()
    site = 4 * 64 * 96**2 + 2 * 64**2 * 96  # the projections, and the products with 64 keys
    assert half.macs[0] == reference.macs - 56 * site
    assert half.macs_speedup[0] == reference.macs / half.macs[0]


@pytest.mark.parametrize("balanced", ["plain", "balanced"])
def test_integer_products_are_counted_like_others(reference, balanced):
    table = compare(Method("W8A8", w8a8=balanced), reference, PROFILE, 0)
    assert (table.macs_speedup == 1).all() and table.mse.between(0, 1e-3, inclusive="neither").all()


def test_a_rivals_calibration_is_no_part_of_its_cost(reference):
    settings = (("threshold", 0.0), ("guidance_scale", 2.0))
    table = compare(Method("MagCache", peer=Peer("MagCache", settings)), reference, PROFILE, 0)
    assert (table.macs == reference.macs).all() and table.cache_bytes.isna().all()


def test_a_rival_that_decides_for_a_batch_gets_small_ones():
    sizes = []
    profile = dataclasses.replace(PROFILE, batch_size=12, num_inference_steps=4)
    method = Method("First-Block-Cache", peer=Peer("First-Block-Cache"))
    pipe = method.pipeline(profile)
    handle = pipe.transformer.register_forward_pre_hook(
        lambda _module, args, kwargs: sizes.append(len(kwargs["timestep"])), with_kwargs=True
    )
    method.draw(profile, 0, num_samples=7)
    handle.remove()
    assert set(sizes) == {10, 4}


def test_a_methods_columns_are_those_that_apply():
    assert FULL.columns() == {"method": "full compute", "family": "full compute"}
    config = dataclasses.replace(OPEN, schedule="static", static_interval=3, quantize_bits=4)
    columns = Method("a", "b", config, scheduler="ddim", budget=2, dtype=torch.float16).columns()
    assert columns == {
        **{"method": "a", "family": "b", "budget": 2, "target": "kv", "schedule": "static", "interval": 3, "order": 0},
        **{"bits": 4, "mode": "per_channel", "scheduler": "ddim", "dtype": "float16"},
    }


def test_a_method_says_when_what_was_fitted_for_it_was_made(tmp_path):
    plan = ForecastPlan(((),), frozenset({0}), (1.0,), (1.0, 1.0), 1, "", (), {"date": "Monday"})
    assert Method("a", config=plan).columns()["made"] == "Monday"
    (tmp_path / "provenance.json").write_text('{"date": "Tuesday"}')
    assert Method("a", solver=tmp_path).made == "Tuesday"
    assert FULL.made is None and Method("a", solver=tmp_path / "other").made is None


def test_methods_are_summarized_one_by_one():
    methods = (FULL, Method("4 steps", "fewer steps", num_inference_steps=4))
    table = compare_all(methods, PROFILE, 0)
    assert table.method.tolist() == ["full compute", "4 steps"] and table.psnr[0] == math.inf and table.psnr[1] < 40
    assert table.macs_speedup.tolist() == [1, 2] and table.images.tolist() == [3, 3]
    assert only(table, family="fewer steps", steps=4).method == "4 steps"
    assert only(table, family="DQAR plan").isna().all() and only(table, nothing=1).isna().all()


def test_decibels_are_of_the_mean_error():
    rows = pd.DataFrame({"method": ["b", "b", "a"], "mse": [0.01, 0.03, 0.1], "mse_converged": 1.0})
    table = summarize(rows)
    assert table.method.tolist() == ["b", "a"] and table.psnr.tolist() == pytest.approx([16.9897, 10])
    assert table.psnr_converged.tolist() == [0, 0]


def test_what_was_recorded_otherwise_is_named(reference):
    method = Method("4 steps", num_inference_steps=4)
    recorded = compare(method, reference, PROFILE, 0)
    table = check_again([method], recorded, PROFILE, 0, number=2)
    assert table.live[0] == pytest.approx(table.recorded[0], abs=0.1)
    with pytest.warns(UserWarning, match="4 steps: recorded"):
        check_again([method], recorded.assign(mse=recorded.mse * 10), PROFILE, 0, number=2)


def test_whole_maps_give_the_same_images_and_the_exact_entropy():
    pipe = embedded_pipeline()
    pipe.transformer.double()
    plain = draw_latents(pipe)
    attention = pipe.transformer.transformer_blocks[2].attn1
    before = attention.processor
    with challenges.whole_maps(pipe):
        torch.testing.assert_close(draw_latents(pipe), plain, rtol=1e-4, atol=1e-4)
        entropy = attention.processor.entropy
        assert entropy.shape == (4, 2) and (entropy > 0).all() and (entropy < math.log(16)).all()
    assert attention.processor is before and torch.equal(draw_latents(pipe), plain)
    x = torch.randn(2, 16, 16, dtype=torch.float64)
    processor = challenges.MapProcessor()
    query, key, value = (
        layer(x).unflatten(-1, (2, 8)).transpose(1, 2) for layer in (attention.to_q, attention.to_k, attention.to_v)
    )
    expected = attention.to_out[0](F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2))
    torch.testing.assert_close(processor(attention, x), expected, rtol=1e-4, atol=1e-4)
    probabilities = (query @ key.mT * attention.scale).softmax(-1)
    exact = -(probabilities * probabilities.log()).sum(-1).mean(-1)
    torch.testing.assert_close(processor.entropy, exact, rtol=1e-4, atol=1e-4)
