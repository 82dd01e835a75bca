"""DQAR on a text-to-image model, through its own pipeline."""

import math

import pytest
import torch
from helpers import PROMPTS, make_pixart, state
from helpers import draw_text as draw
from situations import OPEN, Naive

from dqar import CacheFormat, DQARConfig, Probe, ReusePlan, apply_dqar, remove_dqar, stats
from dqar.measure import metrics

LOOK = DQARConfig(schedule="none", probe=Probe(record=True))


@pytest.fixture
def pipe():
    return make_pixart()


def calls_of(module):
    calls = []
    module.register_forward_hook(lambda _module, args, _output: calls.append(len(args[0])))
    return calls


@pytest.mark.parametrize("prompts", [PROMPTS, ("a cat",)])
@pytest.mark.parametrize("guidance", [4.5, 1.0])
@pytest.mark.parametrize(
    "config",
    [
        DQARConfig(schedule="none"),
        DQARConfig(schedule="none", cache=CacheFormat(cross_attention=False)),
        LOOK,
        DQARConfig(entropy_threshold=0, schedule="all", snr_range=(0, math.inf)),
        DQARConfig(plan=ReusePlan((), 3, 6)),
    ],
)
def test_closed_gate_is_bit_identical(pipe, prompts, guidance, config):
    expected = draw(pipe, prompts, guidance=guidance)
    with apply_dqar(pipe, config) as session:
        assert torch.equal(draw(pipe, prompts, guidance=guidance), expected)
        assert torch.equal(draw(pipe, prompts, guidance=guidance), expected)
    table = session.trace.to_pandas()
    assert set(table.decision) == {"compute"} and len(table) == 2 * 6 * 3 * (2 if guidance > 1 else 1)


@pytest.mark.parametrize("cached, computed", [(True, 1), (False, 6)])
def test_caption_keys_and_values_are_computed_once_a_run(pipe, cached, computed):
    blocks = pipe.transformer.transformer_blocks
    calls = [calls_of(layer) for block in blocks for layer in (block.attn2.to_k, block.attn2.to_v)]
    with apply_dqar(pipe, DQARConfig(schedule="none", cache=CacheFormat(cross_attention=cached))) as session:
        for _ in range(2):
            draw(pipe)
    assert all(batches == [4] * 2 * computed for batches in calls)
    cross = session.trace.to_pandas("cross_attention")
    assert len(cross) == len(session.trace.to_pandas()) == 2 * 6 * 3 * 2 and set(cross.reason) == {"caption"}
    assert set(cross.step[cross.decision == "compute"]) == set(range(computed))
    assert set(cross.bytes) == ({2 * 120 * 16 * 2 * 4} if cached else {0})  # images, tokens, channels, K and V, float32


def test_the_kept_captions_save_their_projections(pipe):
    def macs(cached):
        with apply_dqar(pipe, DQARConfig(schedule="none", cache=CacheFormat(cross_attention=cached))):
            return metrics.count_macs(lambda: draw(pipe))

    assert macs(False) - macs(True) == 5 * 3 * 2 * (4 * 120 * 16 * 16)  # steps, layers, K and V


@pytest.mark.parametrize("others", [("a dog", "a big cat"), ("the park",), (PROMPTS[1], PROMPTS[0])])
@pytest.mark.parametrize("config", [DQARConfig(schedule="none"), DQARConfig(**OPEN)])
def test_nothing_leaks_into_the_next_caption(pipe, others, config):
    with apply_dqar(pipe, config):
        alone = draw(pipe, others)
    with apply_dqar(pipe, config):
        draw(pipe)
        assert torch.equal(draw(pipe, others), alone)


def test_a_mask_alone_makes_another_condition(pipe):
    """The same embeddings, fewer of them attended to."""
    embeddings, mask, *_ = pipe.encode_prompt(PROMPTS[1], do_classifier_free_guidance=False)
    transformer, latents = pipe.transformer, torch.randn(1, 4, 8, 8)

    def forward(mask):
        inputs = {"encoder_hidden_states": embeddings, "encoder_attention_mask": mask}
        conditions = {"resolution": None, "aspect_ratio": None}
        with torch.no_grad():
            return transformer(latents, timestep=torch.tensor([500]), **inputs, added_cond_kwargs=conditions).sample

    shorter = mask.clone()
    shorter[:, 3:] = 0
    expected = forward(mask), forward(shorter)
    with apply_dqar(transformer, DQARConfig(schedule="none")) as session:
        assert torch.equal(forward(mask), expected[0]) and torch.equal(forward(shorter), expected[1])
    assert len(session.trace.to_pandas()) == 2 * 3 and not torch.equal(*expected)


@pytest.mark.parametrize("target", ["kv", "output"])
def test_reuse_equals_a_naive_one(pipe, target):
    config = DQARConfig(**{**OPEN, "schedule": "static"}, reuse_target=target, quantize_bits=16)
    plain = draw(pipe)
    with apply_dqar(pipe, config):
        got, again = draw(pipe), draw(pipe)
    assert torch.equal(got, again) and not torch.equal(got, plain)
    with Naive(pipe.transformer, target, streak=1):
        torch.testing.assert_close(got, draw(pipe), rtol=1e-4, atol=1e-4)


def test_removal_leaves_the_model_as_before(pipe):
    expected = draw(pipe)
    before = state(pipe)
    apply_dqar(pipe, DQARConfig(**OPEN))
    assert state(pipe) != before
    draw(pipe)
    remove_dqar(pipe)
    assert state(pipe) == before and torch.equal(draw(pipe), expected)


@pytest.mark.parametrize("given, expected", [(None, (3 + 9) / 2), (64, 64)])
def test_caption_tokens_drive_the_threshold(pipe, given, expected):
    with apply_dqar(pipe, DQARConfig(entropy_threshold=2.0), prompt_length=given) as session:
        draw(pipe)
        assert set(session.trace.to_pandas().threshold) == {stats.tau(2.0, expected)}
        session.trace.clear()
        draw(pipe, ("a dog",))
        assert set(session.trace.to_pandas().threshold) == {stats.tau(2.0, given or 3)}


def test_cross_attention_entropy_is_that_of_its_maps(pipe):
    attn = pipe.transformer.transformer_blocks[1].attn2
    seen = {}
    handles = [
        layer.register_forward_hook(lambda _m, _a, out, name=name: seen.setdefault(name, out))
        for name, layer in (("q", attn.to_q), ("k", attn.to_k))
    ]
    draw(pipe)
    for handle in handles:
        handle.remove()
    query, key = (seen[name].unflatten(-1, (2, 8)).transpose(1, 2).double() for name in "qk")
    masks = [pipe.encode_prompt(p, negative_prompt="", do_classifier_free_guidance=True)[1::2] for p in PROMPTS]
    tokens = [int(mask[1].sum()) for mask in masks] + [int(mask[0].sum()) for mask in masks]
    entropies = []
    for row, count in enumerate(tokens):
        weights = (query[row] @ key[row, :, :count].transpose(-1, -2) * 8**-0.5).softmax(-1)
        entropies.append(-torch.special.xlogy(weights, weights).sum(-1).mean(-1))
    with apply_dqar(pipe, LOOK) as session:
        draw(pipe)
    cross = session.trace.to_pandas("cross_attention")
    first = cross[(cross.step == 0) & (cross.layer == 1)].set_index("branch").entropy
    assert first["uncond"] == pytest.approx(torch.stack(entropies[:2]).mean().item(), abs=1e-5)
    assert first["cond"] == pytest.approx(torch.stack(entropies[2:]).mean().item(), abs=1e-5)
    assert (cross.entropy[cross.branch == "cond"] > 0).all()
    assert (cross.entropy[cross.branch == "uncond"] == 0).all()  # the empty prompt has one token


def test_the_snr_is_that_of_the_guided_prediction(pipe):
    """The latents' SNR at a step, by the x0 predicted at the step before, recomputed from outside."""
    seen = []
    step = pipe.scheduler.step

    def watched(model_output, timestep, sample, **kwargs):
        seen.append((model_output, sample, pipe.scheduler.sigmas[pipe.scheduler.step_index or 0]))
        return step(model_output, timestep, sample, **kwargs)

    pipe.scheduler.step = watched
    with apply_dqar(pipe, LOOK) as session:
        draw(pipe)
    output, latents, sigma = seen[1]
    alpha = (1 + sigma**2).rsqrt()
    clean = (latents - sigma * alpha * output) / alpha
    expected = stats.snr(clean, latents).mean().item()
    table = session.trace.to_pandas()
    assert table.snr[table.step == 1].iloc[0] == pytest.approx(expected, rel=1e-4)
