"""Bits by layer: what each is measured to do, and the choice under a budget, against every combination there is."""

import itertools

import numpy as np
import pandas as pd
import pytest
from helpers import image_pipeline

from dqar import CacheFormat, DQARConfig, apply_dqar
from dqar.measure import bits
from dqar.measure.sampling import OPEN, sample
from dqar.models.profiles import get_profile
from dqar.quantizer import quantize

LAYERS, STEPS = 4, 6
PROFILE = get_profile("digits", num_inference_steps=STEPS, batch_size=2)


def half(target="output", **options):
    """Every second step reused."""
    fields = {**vars(OPEN), "schedule": "static", "reuse_target": target, "cache": CacheFormat(**options)}
    return DQARConfig(**fields)


def errors_of(mse, sizes):
    widths = sorted({bits for row in mse for bits in row})
    rows = [
        {"layer": layer, "bits": width, "image": image, "mse": row[width] * (1 + image), "bytes": sizes[layer][width]}
        for layer, row in enumerate(mse)
        for width in widths
        for image in (0, 1)
    ]
    return pd.DataFrame(rows)


@pytest.mark.parametrize("seed", range(6))
def test_the_choice_is_the_best_of_all_combinations_under_the_budget(seed):
    generator, widths = np.random.default_rng(seed), (2, 4, 8, 16)
    scale = 10 ** generator.uniform(-9, -3, 5)  # some layers matter a million times as much
    mse = [{b: 0.0 if b == 16 else s * 4.0**-b * generator.uniform(0.5, 2) for b in widths} for s in scale]
    sizes = [{b: n * b + 16 for b in widths} for n in generator.integers(50, 200, 5)]
    total = sum(row[16] for row in sizes)
    for share in (0.2, 0.3, 0.45, 0.6, 1.0):
        chosen = bits.choose_bits(errors_of(mse, sizes), share * total)
        kept = [
            (sum(row[b] for row, b in zip(mse, combination, strict=True)), combination)
            for combination in itertools.product(widths, repeat=5)
            if sum(row[b] for row, b in zip(sizes, combination, strict=True)) <= share * total
        ]
        found = sum(row[b] for row, b in zip(mse, chosen, strict=True))
        assert found == pytest.approx(min(kept)[0], rel=1e-6) and chosen in {combination for _, combination in kept}


def test_a_budget_below_the_fewest_bits_is_refused():
    errors = errors_of([{2: 1e-4, 4: 1e-6}] * 3, [{2: 40, 4: 72}] * 3)
    assert bits.choose_bits(errors, 120) == (2, 2, 2)
    with pytest.raises(ValueError, match="budget=119 is not accepted: at least 120 bytes an image"):
        bits.choose_bits(errors, 119)


def test_a_layers_error_is_that_of_hooks_which_quantize_it_alone():
    pipe = image_pipeline()
    table = bits.layer_errors(pipe, PROFILE, 3, half(), num_samples=3)
    assert len(table) == LAYERS * 4 * 3 and (table.mse[table.bits == 16] == 0).all()
    assert (table.mse[table.bits < 16] > 0).all()
    drawn = {}
    for layer, width in ((None, 16), (2, 4)):
        handles = [
            block.attn1.register_forward_hook(every_second(width if layer == number else 16))
            for number, block in enumerate(pipe.transformer.transformer_blocks)
        ]
        drawn[width] = sample(pipe, PROFILE, 3, num_samples=2).images
        for handle in handles:
            handle.remove()
    expected = (drawn[4] - drawn[16]).double().square().flatten(1).mean(1)
    own = table[(table.layer == 2) & (table.bits == 4) & (table.image < 2)]
    assert own.mse.tolist() == pytest.approx(expected.tolist(), rel=2e-2)
    sizes = table.groupby(["layer", "bits"]).bytes.agg(["min", "max"])  # the same for every image
    assert (sizes["min"] == sizes["max"]).all()
    values, scales = 2 * 16 * 16, 2 * 16 * 4  # two branches, 16 tokens of 16 channels, a float32 scale each
    assert sizes["max"][0].to_dict() == {16: 4 * values} | {b: values * b // 8 + scales for b in (8, 4, 2)}


def every_second(width, at=None):
    """A hook that returns at every second step what the step before did, in so many bits (written at step ``at``)."""
    kept, steps = [], itertools.count()

    def hook(_module, _args, output):
        step = next(steps) % STEPS
        if step % 2:
            return kept.pop()
        few = width < 16 and at in (None, step)
        kept.append(quantize(output, width, "per_channel", batch_dims=1).dequantize() if few else output)
        return output

    return hook


def test_a_steps_error_is_that_of_hooks_which_quantize_what_it_writes():
    pipe = image_pipeline()
    table = bits.step_errors(pipe, PROFILE, 3, half(), num_samples=2)
    assert set(table.step) == {0, 2, 4} and len(table) == 3 * 3 * 2 and (table.mse > 0).all()
    drawn = {}
    for at in (2, None):
        handles = [
            block.attn1.register_forward_hook(every_second(16 if at is None else 4, at))
            for block in pipe.transformer.transformer_blocks
        ]
        drawn[at] = sample(pipe, PROFILE, 3, num_samples=2).images
        for handle in handles:
            handle.remove()
    expected = (drawn[2] - drawn[None]).double().square().flatten(1).mean(1)
    own = table[(table.step == 2) & (table.bits == 4)]
    assert own.mse.tolist() == pytest.approx(expected.tolist(), rel=2e-2)


@pytest.mark.parametrize("target", ["kv", "block"])
def test_layers_and_steps_are_measured_whatever_is_reused(target):
    pipe = image_pipeline()
    layers = bits.layer_errors(pipe, PROFILE, 0, half(target, fitted=True), num_samples=2)
    steps = bits.step_errors(pipe, PROFILE, 0, half(target, fitted=True), num_samples=2)
    for table in (layers, steps):
        means = table[table.bits < 16].groupby("bits").mse.mean()
        assert means[2] > means[4] > means[8] > 0


def test_calibrated_bits_keep_the_share_and_are_measured_on_other_images(monkeypatch):
    pipe, drawn = image_pipeline(), []
    monkeypatch.setattr(bits, "sample", lambda *own, **options: drawn.append(options) or sample(*own, **options))
    config, table = bits.calibrate_bits(pipe, PROFILE, 0, half(fitted=True), share=0.3, num_samples=2)
    assert len(config.cache.layer_bits) == LAYERS and config.cache.fitted and len(set(config.cache.layer_bits)) > 1
    assert [options.get("first_image", 0) for options in drawn[-3:]] == [2, 2, 2]
    assert table.share[0] <= 0.3 and table.share[1] <= table.share[0] and table.bits[1] == 2
    with apply_dqar(pipe, config) as session:
        sample(pipe, PROFILE, 0, num_samples=2)
        trace = session.trace.to_pandas()
    kept = trace.groupby(["run", "step"]).bytes.sum().max() / 2
    assert table.share[0] == pytest.approx(kept / (LAYERS * 2 * 16 * 16 * 2))


@pytest.mark.parametrize("share, accepted", [(0, "more than 0"), (1.5, "at most 1"), (0.01, "the fewest bits take 0.")])
def test_a_share_out_of_reach_is_refused(share, accepted):
    with pytest.raises(ValueError, match=f"bytes={share} is not accepted: .*{accepted}"):
        bits.calibrate_bits(image_pipeline(), PROFILE, 0, half(), share, num_samples=1)
