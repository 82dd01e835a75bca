import itertools
import math

import pandas as pd
import pytest
import torch

from dqar.figures import layers as figures
from dqar.measure import metrics
from dqar.measure.results import Run
from dqar.models.profiles import get_profile
from dqar.studies import conclusions, layers
from dqar.studies.compare import FULL
from dqar.studies.recording import Recording

PROFILE = get_profile("smoke", num_inference_steps=4, num_samples=2, images=2)
STEPS, LAYERS = 4, 28


def draw(seed=0):
    return FULL.draw(PROFILE, seed, num_samples=2).images


def maps_of(pipe, hidden):
    """Each layer's map, by diffusers' own formula."""
    attn = pipe.transformer.transformer_blocks[0].attn1
    query, key = (attn.head_to_batch_dim(layer(hidden)) for layer in (attn.to_q, attn.to_k))
    return attn.get_attention_scores(query, key)


def test_maps_overlap_as_a_naive_loop_finds():
    pipe = FULL.pipeline(PROFILE)
    attn = pipe.transformer.transformer_blocks[0].attn1
    hidden = torch.randn(2, 5, attn.to_q.in_features, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        attention_map = layers.attention_map(attn, hidden)
        torch.testing.assert_close(attention_map.flatten(0, 1), maps_of(pipe, hidden))
    one, other = torch.rand(2, 2, 3, 4, 4).softmax(-1)
    rows = list(layers.layer_pairs([(one, torch.tensor([3.0, 4.0])), (other, torch.tensor([3.0, 1.0]))]))
    expected, heads = [], []
    for i in range(3):
        by_head = [0.0, 0.0, 0.0]
        for b, j, q, k in itertools.product(range(2), range(3), range(4), range(4)):
            by_head[j] += min(one[b, i, q, k].item(), other[b, j, q, k].item()) / 8
        expected.append(max(by_head))
        heads.append(by_head.index(max(by_head)))
    assert (
        rows[0]["heads"] == heads
        and rows[0]["overlap"] == pytest.approx(sum(expected) / 3)
        and rows[0]["layer"] == 0
        and rows[1]["other"] == 0
    )
    assert rows[0]["output_change"] == pytest.approx(3 / 5)
    assert rows[1]["output_change"] == pytest.approx(3 / math.sqrt(10))


def test_a_map_that_was_taken_is_not_passed_on():
    rows = [(0, layer, layer - 1, overlap, [0]) for layer, overlap in ((1, 0.9), (2, 0.95), (3, 0.7), (4, 0.9))]
    table = pd.DataFrame([*rows, (0, 3, 1, 1.0, [0])], columns=["step", "layer", "other", "overlap", "heads"])
    assert set(layers.shared_maps(table, 0.8)) == {(0, 1), (0, 4)}
    assert set(layers.shared_maps(table, 0.0)) == {(0, 1), (0, 3)}
    assert not layers.shared_maps(table, 1.0)


def test_sharing_nothing_changes_nothing_and_a_shared_map_is_the_one_below():
    pipe, plain = FULL.pipeline(PROFILE), draw()
    with layers.sharing(pipe, {}):
        assert torch.equal(draw(), plain)
    site, heads = (2, 5), [1, 0, 3, 2]
    blocks, given, own = pipe.transformer.transformer_blocks, [], []
    with layers.sharing(pipe, {site: heads}):
        handles = [blocks[4].attn1.to_q.register_forward_hook(lambda _m, i, _o: given.append(i[0]))]
        handles += [blocks[5].attn1.to_v.register_forward_hook(lambda _m, i, _o: own.append(i[0]))]
        handles += [blocks[5].attn1.to_out[0].register_forward_hook(lambda _m, i, _o: own.append(i[0]))]
        shared = draw()
        for handle in handles:
            handle.remove()
    assert (shared != plain).any() and torch.equal(draw(), plain)
    below, (hidden, mixed) = given[2], own[4:6]
    attn4, attn5 = blocks[4].attn1, blocks[5].attn1
    with torch.no_grad():
        weights = maps = layers.attention_map(attn4, below)[:, heads]
        value = attn5.head_to_batch_dim(attn5.to_v(hidden))
        expected = attn5.batch_to_head_dim(weights.flatten(0, 1) @ value)
    assert maps.shape[1] == 4
    torch.testing.assert_close(mixed, expected)


def test_the_cheapest_sharing_saves_what_counting_says():
    pipe = FULL.pipeline(PROFILE)
    sites = {(step, layer): [0, 1, 2, 3] for step in range(STEPS) for layer in range(1, LAYERS, 2)}
    macs = metrics.count_macs(draw)
    with layers.sharing(pipe, sites):
        shared = metrics.count_macs(draw)
    width, tokens, branches, images = 96, 64, 2, 2
    a_layer = tokens * (2 * width * width + tokens * width)  # queries, keys and their products
    assert macs - shared == STEPS * 14 * branches * images * a_layer
    with layers.sharing(pipe, {}, interval=2):
        assert metrics.count_macs(draw) < shared


def test_sharing_is_recorded_and_drawn(tmp_path, monkeypatch):
    monkeypatch.setattr(layers, "THETAS", (0.0,))
    recording = Recording(PROFILE, tmp_path / "work", tmp_path / "out")
    table = layers.record_layers(recording)
    points = layers.summary(table).set_index("method")
    assert points.shared["every 1, θ = 0"] == 0.5 and points.shared["every 2, θ = 0"] == 0.25
    assert points.macs_speedup.loc["every 2, θ = 0"] == points.macs_speedup.max()
    run = Run({"name": "smoke", "num_inference_steps": STEPS, "num_samples": 2, "images": 2}, 0, tmp_path)
    overlaps = layers.similarity(run)
    assert len(overlaps) == STEPS * LAYERS * (LAYERS - 1) and overlaps.overlap.between(0, 1).all()
    title = figures.slide16_layers(run, table, overlaps).get_suptitle().replace("\n", " ")
    assert title.startswith("Sharing every other layer's map, the most there is, saves")
    verdict, words = conclusions.across_layers(pd.Series({"layer_change": 1.4, "change": 0.1}), table)
    assert verdict == "does not hold" and "outputs are 140% away from the layer before" in words
    assert conclusions.across_layers(pd.Series({"layer_change": 0.1, "change": 0.2}), None)[0] == "holds"
