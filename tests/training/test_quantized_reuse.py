"""Tuning sees what reuse computes: the real cache's values to the bit, with the gradients of an identity."""

import dataclasses

import pytest
import torch
from helpers import embedded_pipeline, random_transformer

from dqar import apply_dqar, quantizer
from dqar.models.data import load_split
from dqar.training import quantized_reuse
from dqar.training.quantized_reuse import TuningRecipe, cache_config, reused_outputs, through_cache, tune, tuning_loss

LABELS = torch.tensor([3, 10, 7])
TINY = TuningRecipe(4, num_inference_steps=6, num_steps=4, batch_size=4, learning_rate=1e-2, warmup_steps=0)


def tensor(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(autouse=True)
def small_model(monkeypatch):
    """Stands for the shipped model: four random layers."""
    monkeypatch.setattr(quantized_reuse, "load_embedded", lambda _name: embedded_pipeline())


@pytest.mark.parametrize("bits", [8, 4, 2])
def test_values_are_the_quantizers_and_gradients_an_identitys(bits):
    x, weight = tensor(3, 16, 8).requires_grad_(), tensor(3, 16, 8, seed=1)
    given = through_cache({"output": x, "feed_forward": 2 * x}, cache_config(bits))
    for name, values in (("output", x), ("feed_forward", 2 * x)):
        scales = torch.float32 if bits == 8 else torch.float16
        options = {"batch_dims": 1, "fitted": bits != 8, "scale_dtype": scales}
        expected = quantizer.quantize(values.detach(), bits, "per_channel", **options).dequantize()
        assert torch.equal(given[name], expected) and not torch.equal(given[name], values)
    (weight * given["output"]).sum().backward()
    assert torch.equal(x.grad, weight)


@pytest.mark.parametrize("bits", [16, 8, 4, 2])
def test_both_steps_are_what_dqar_computes(bits):
    pipe, config = embedded_pipeline(), cache_config(bits)
    pipe.scheduler.set_timesteps(6)
    steps, noisy = pipe.scheduler.timesteps[:2], (tensor(3, 1, 8, 8), tensor(3, 1, 8, 8, seed=1))
    timesteps = tuple(t.expand(3) for t in steps)
    trained = reused_outputs(pipe.transformer, noisy, timesteps, LABELS, config)
    with torch.no_grad():
        full = [pipe.transformer(x, t, LABELS).sample for x, t in zip(noisy, timesteps, strict=True)]
        with apply_dqar(pipe, config) as session:
            drawn = []
            for x, t in zip(noisy, timesteps, strict=True):
                drawn.append(pipe.transformer(x, t, LABELS).sample)
                pipe.scheduler.step(drawn[-1], t[0], x)
            decisions = session.trace.to_pandas().groupby("step").decision.unique()
    assert [list(row) for row in decisions] == [["compute"], ["reuse"]]
    torch.testing.assert_close(trained[0], drawn[0])
    torch.testing.assert_close(trained[1], drawn[1])
    assert torch.equal(full[0], drawn[0]) and not torch.allclose(full[1], drawn[1], atol=1e-3)


def test_the_second_steps_error_reaches_what_the_first_step_computed():
    model, timesteps = random_transformer(), (torch.full((3,), 900), torch.full((3,), 700))
    _, second = reused_outputs(
        model, (tensor(3, 1, 8, 8), tensor(3, 1, 8, 8, seed=1)), timesteps, LABELS, cache_config(2)
    )
    second.square().sum().backward()
    for block in model.transformer_blocks:
        for weight in (block.attn1.to_q.weight, block.attn1.to_v.weight, block.ff.net[2].weight):
            assert weight.grad.abs().max() > 0
    assert not any(hasattr(module, "_dqar_handler") for module in model.modules())


def test_without_reuse_there_is_nothing_to_learn(monkeypatch):
    def both_computed(model, hidden_states, timesteps, labels, _config):
        return tuple(model(x, t, labels, return_dict=False)[0] for x, t in zip(hidden_states, timesteps, strict=True))

    images, labels = load_split("digits", "train")
    arguments = (TINY, random_transformer(), random_transformer(), images, labels, 0)
    assert tuning_loss(*arguments) > 0
    monkeypatch.setattr(quantized_reuse, "reused_outputs", both_computed)
    assert tuning_loss(*arguments) == 0


def weights(recipe, out):
    return torch.cat([p.detach().flatten() for p in tune(recipe, out).parameters()])


def test_seeds_reproduce_a_tuning_and_each_cache_makes_its_own_model(tmp_path):
    before = torch.cat([p.detach().flatten() for p in random_transformer().parameters()])
    once = weights(TINY, tmp_path / "once")
    assert torch.equal(once, weights(TINY, tmp_path / "twice")) and torch.equal(once, weights(TINY, tmp_path / "once"))
    others = [dataclasses.replace(TINY, seed=1), *(dataclasses.replace(TINY, bits=bits) for bits in (16, 2))]
    models = [before, once, *(weights(recipe, tmp_path / str(i)) for i, recipe in enumerate(others))]
    for i, one in enumerate(models):
        assert not any(torch.equal(one, other) for other in models[:i])


def test_tuning_brings_reuse_nearer_to_full_compute(tmp_path):
    recipe = dataclasses.replace(TINY, bits=2, num_steps=30, batch_size=16, learning_rate=3e-3)
    images, labels = load_split("digits", "train")
    shipped, tuned = random_transformer(), tune(recipe, tmp_path)
    with torch.no_grad():
        losses = [
            sum(float(tuning_loss(recipe, model, shipped, images, labels, step)) for step in range(100, 104))
            for model in (shipped, tuned)
        ]
    assert losses[1] < 0.9 * losses[0]


@pytest.mark.parametrize("bits", [3, 0, 32])
def test_unknown_bits_are_refused_before_anything_is_made(bits, tmp_path):
    with pytest.raises(ValueError, match=f"^quantize_bits={bits} is not accepted: choose one of 16, 8, 4, 2$"):
        tune(TuningRecipe(bits), tmp_path / "work")
    assert not (tmp_path / "work").exists()
