import dataclasses
import json
import math

import numpy as np
import pytest
import torch
from diffusers import DiTPipeline, PixArtAlphaPipeline
from helpers import draw, embedded_pipeline
from scipy.ndimage import correlate

from dqar import ForecastPlan, apply_dqar
from dqar.families import describe_model
from dqar.forecast.plan import extrapolation
from dqar.forecast.run import FinalHiddenStates, from_patches, to_patches
from dqar.measure import metrics
from dqar.models.pipelines import make_scheduler

COMPUTED = (0, 2, 3, 7)


def plan_for(pipe, computed=COMPUTED, steps=8, guidance=3.0, order=1):
    pipe.scheduler.set_timesteps(steps)
    return extrapolation(computed, pipe.scheduler.timesteps.tolist(), guidance, describe_model(pipe.transformer), order)


def by_hand(pipe, weights, readouts, labels=(1, 2), guidance=3.0, history=2, bits=16):
    """The planned run without dqar's session: a loop over the bare transformer, forecasts in float64."""
    states = []
    handle = pipe.transformer.proj_out_2.register_forward_hook(lambda _module, args, _out: states.append(args[0]))
    noise = [torch.randn(1, 1, 8, 8, generator=torch.Generator().manual_seed(i)) for i in range(len(labels))]
    latents, labels = torch.cat(noise), torch.tensor(labels)
    labels = torch.cat([labels, torch.full_like(labels, 10)])
    pipe.scheduler.set_timesteps(len(weights))
    conds, unconds = [], []
    for step, t in enumerate(pipe.scheduler.timesteps):
        if step in COMPUTED:
            with torch.no_grad():
                out = pipe.transformer(
                    torch.cat([latents] * 2), timestep=t.expand(len(labels)), class_labels=labels
                ).sample
            cond, uncond = out.chunk(2)
            conds, unconds = [cond, *conds][:history], [uncond, *unconds][:history]
        parts = [conds[0], unconds[0]]
        for number, outputs in enumerate((conds, unconds)):
            if not weights[step]:
                continue
            columns = [*outputs, latents]  # of which the newest is quantized after a computed step only
            side = math.isqrt(len(weights[step]) // len(columns) // 2)
            kernels = torch.tensor(weights[step]).double().view(2, len(columns), side, side)[number]
            part = sum(blurred(x, kernel) for kernel, x in zip(kernels, columns, strict=True))
            if readouts[step]:
                own = states[-1].chunk(2)[number].double()
                read = own @ torch.tensor(readouts[step]).double().view(2, own.shape[-1], 4)[number]
                read = read.view(len(latents), 4, 4, 2, 2, 1)  # put together as DiTTransformer2DModel does
                part = part + in_bits(torch.einsum("nhwpqc->nchpwq", read).reshape(part.shape), bits)
            parts[number] = part.float()
        guided = parts[1] + guidance * (parts[0] - parts[1])
        latents = pipe.scheduler.step(guided, t, latents).prev_sample
        if step in COMPUTED:
            conds[0], unconds[0] = in_bits(conds[0], bits), in_bits(unconds[0], bits)
    handle.remove()
    return latents


def in_bits(x, bits):
    """Slide 6's formula, with a float16 scale for each image and channel."""
    if bits == 16:
        return x
    largest = 2 ** (bits - 1) - 1
    scale = (x.float().abs().amax((2, 3), keepdim=True) / largest).half().float()
    return (x.float() / scale).round().clamp(-largest, largest) * scale


def blurred(x, kernel):
    """SciPy's correlation of each image with a kernel, zeros beyond the edges."""
    images = [correlate(image.double().numpy(), kernel.numpy(), mode="constant") for image in x[:, 0]]
    return torch.tensor(np.stack(images))[:, None]


def test_a_plan_that_computes_every_step_changes_nothing(pipe):
    untouched = draw(pipe)
    with apply_dqar(pipe, plan_for(pipe, range(8))):
        assert torch.equal(draw(pipe), untouched)
    assert torch.equal(draw(pipe), untouched)
    assert not hasattr(pipe.transformer, "_diffusers_hook") and "forward" not in vars(pipe.transformer)
    assert "step" not in vars(pipe.scheduler)


@pytest.mark.parametrize(("kernel", "reads"), [(1, False), (3, False), (1, True), (3, True)])
def test_a_planned_run_is_what_it_says(pipe, kernel, reads):
    """Random weights for every step, computed ones too: the same as a plain loop."""
    torch.manual_seed(0)
    plan = plan_for(pipe)
    tensors = [2 * (min(2, sum(c <= step for c in COMPUTED)) + 1) for step in range(1, 8)]
    rows = [(), *(tuple((0.3 / kernel * torch.randn(n * kernel**2)).tolist()) for n in tensors)]
    readouts = [
        (),
        *(tuple((0.05 * torch.randn(2 * 16 * 4)).tolist()) if reads and s != 4 else () for s in range(1, 8)),
    ]
    plan = ForecastPlan(rows, plan.computed, plan.timesteps, (3, 3), 2, plan.model, (kernel,) * 2, readouts=readouts)
    expected = by_hand(pipe, rows, readouts)
    assert torch.equal(expected, by_hand(pipe, rows, [()] * 8)) != reads
    with apply_dqar(pipe, plan) as session:
        first, again = draw(pipe), draw(pipe)
        other = draw(pipe, labels=(3,))
        after = draw(pipe)
    torch.testing.assert_close(first, expected, rtol=1e-4, atol=1e-4 * expected.abs().max().item())
    assert torch.equal(first, again) and torch.equal(first, after) and len(other) == 1
    trace = session.trace.to_pandas("model")
    assert len(trace) == (2 + 2 + 2 + 2) * 8 and len(session.trace.to_pandas()) == 0
    assert sorted(set(trace[trace.decision == "compute"].step)) == list(COMPUTED)
    # Two outputs, two images a branch, float32; a step's readout of one branch.
    outputs, steps_ahead = 2 * 2 * 64 * 4, 2 * 64 * 8
    assert trace[trace.step == 7].bytes.iloc[0] == outputs + reads * steps_ahead
    assert trace[trace.step == 4].bytes.iloc[0] == outputs + reads * 4 * steps_ahead
    assert not pipe.transformer.proj_out_2._forward_pre_hooks


def of_classes(pipe, classes=(1, 5)):
    """A plan with random weights and readouts, and some of their own for each of the classes."""
    plan, generator = plan_for(pipe), torch.Generator().manual_seed(0)
    tensors = [2 * (min(2, sum(c <= step for c in COMPUTED)) + 1) for step in range(1, 8)]

    def rows(scale):
        own = [(), *((scale * torch.randn(n * 9, generator=generator)).tolist() for n in tensors)]
        return own, [(), *((0.5 * scale * torch.randn(128, generator=generator)).tolist() for _ in range(7))]

    weights, readouts = rows(0.1)
    added = {label: rows(0.05) for label in classes}
    options = {"kernel": (3, 3), "readouts": readouts, "classes": added}
    return ForecastPlan(weights, plan.computed, plan.timesteps, (3, 3), 2, plan.model, **options)


def rows_of_class(plan, label):
    """Weights and readouts of one class, as a plan without classes has them."""
    added = plan.classes.get(label)
    if added is None:
        return plan.weights, plan.readouts
    both = zip((plan.weights, plan.readouts), added, strict=True)
    return tuple([np.add(a, b).tolist() for a, b in zip(*pair, strict=True)] for pair in both)


def test_each_class_has_weights_of_its_own(pipe):
    """Each image as a plain loop draws it with the weights of its class; class 2 wasn't calibrated, 10 is the null."""
    plan, labels = of_classes(pipe), (1, 2, 5, 1)
    expected = [by_hand(pipe, *rows_of_class(plan, label), labels)[i] for i, label in enumerate(labels)]
    with apply_dqar(pipe, plan):
        mixed, again = draw(pipe, labels), draw(pipe, labels)
        alone = [draw(pipe, (label,), seed=seed) for seed, label in enumerate(labels)]
    assert torch.equal(mixed, again)
    common = by_hand(pipe, plan.weights, plan.readouts, labels)
    tolerance = 1e-4 * common.abs().max().item()
    torch.testing.assert_close(mixed, torch.stack(expected), rtol=1e-4, atol=tolerance)
    torch.testing.assert_close(mixed, torch.cat(alone), rtol=1e-4, atol=tolerance)
    assert [torch.allclose(*pair, rtol=1e-4, atol=tolerance) for pair in zip(mixed, common, strict=True)] == [
        label == 2 for label in labels
    ]
    whole = dataclasses.replace(
        plan, computed=range(8), weights=[()] * 8, readouts=(), classes={1: ([()] * 8, [()] * 8)}
    )
    untouched = draw(pipe, labels)
    with apply_dqar(pipe, whole):
        assert torch.equal(draw(pipe, labels), untouched)


@pytest.mark.parametrize("first", ["cond", "uncond"])
def test_branches_in_two_calls_have_the_weights_of_one_class(pipe, first):
    plan, labels = of_classes(pipe), torch.tensor([1, 2])
    with apply_dqar(pipe, plan):
        together = draw(pipe)
    asked = {"cond": labels, "uncond": torch.full_like(labels, 10)}
    order = sorted(asked, key=lambda branch: branch != first)
    with apply_dqar(pipe, plan), torch.no_grad():
        pipe.scheduler.set_timesteps(8)
        latents = torch.cat([torch.randn(1, 1, 8, 8, generator=torch.Generator().manual_seed(i)) for i in range(2)])
        for t in pipe.scheduler.timesteps:
            out = {b: pipe.transformer(latents, timestep=t.expand(2), class_labels=asked[b]).sample for b in order}
            guided = out["uncond"] + 3 * (out["cond"] - out["uncond"])
            latents = pipe.scheduler.step(guided, t, latents).prev_sample
    torch.testing.assert_close(latents, together, rtol=1e-4, atol=1e-4 * together.abs().max().item())


def test_a_plan_of_classes_is_one_file_and_wrong_rows_are_named(pipe, tmp_path):
    plan, path = of_classes(pipe), tmp_path / "plan.json"
    plan.save(path)
    assert ForecastPlan.load(path) == plan != dataclasses.replace(plan, classes={})
    content = json.loads(path.read_text())
    del content["classes"]  # as plans were saved before
    path.write_text(json.dumps(content))
    assert ForecastPlan.load(path) == dataclasses.replace(plan, classes={})
    rows, readouts = plan.classes[5]
    short, endless = [*rows[:-1], rows[-1][1:]], [*readouts[:-1], (math.nan, *readouts[-1][1:])]
    for wrong in ((short, readouts), (rows, endless), (rows, readouts[1:])):
        with pytest.raises(ValueError, match="rows of class 5 are not accepted: finite, as long as those of all"):
            dataclasses.replace(plan, classes={5: wrong})


@pytest.mark.parametrize("bits", [8, 4])
def test_a_quantized_history_is_what_later_steps_see(pipe, bits):
    """The same loop, which rounds what it keeps: outputs after their step, and what is read of hidden states."""
    torch.manual_seed(0)
    plan = plan_for(pipe)
    tensors = [2 * (min(2, sum(c <= step for c in COMPUTED)) + 1) for step in range(1, 8)]
    rows = [(), *(tuple((0.1 * torch.randn(n * 9)).tolist()) for n in tensors)]
    readouts = [(), *(tuple((0.05 * torch.randn(2 * 16 * 4)).tolist()) for _ in range(7))]
    plan = ForecastPlan(
        rows, plan.computed, plan.timesteps, (3, 3), 2, plan.model, (3, 3), readouts=readouts, history_bits=bits
    )
    whole, expected = (by_hand(pipe, rows, readouts, bits=b) for b in (16, bits))
    with apply_dqar(pipe, plan) as session:
        drawn, again = draw(pipe), draw(pipe)
    assert torch.equal(drawn, again)
    assert (drawn - expected).abs().mean() < 0.02 * (whole - expected).abs().mean()  # nothing but a rounding that flips
    trace = session.trace.to_pandas("model")
    kept = 2 * (64 * bits // 8 + 2)  # two images of a branch, each with a float16 scale
    assert trace[trace.step == 7].bytes.iloc[0] == (2 + 1) * kept
    assert trace[trace.step == 3].bytes.iloc[0] == (2 + 4) * kept
    assert session.summary()["peak_cache_bytes"] == 2 * (2 + 4) * kept


def test_patches_are_those_of_the_model(dit_folder):
    """What the last layer makes of the hidden states, put together, is the output; four channels, patches of 2."""
    transformer = DiTPipeline.from_pretrained(dit_folder).transformer
    with torch.no_grad(), FinalHiddenStates([transformer]) as seen:
        latents, t = torch.randn(2, 4, 8, 8), torch.tensor([5, 5])
        output = transformer(latents, timestep=t, class_labels=torch.tensor([1, 2])).sample
        patches = transformer.proj_out_2(seen.take())
    assert torch.equal(from_patches(patches, output.shape), output)
    assert torch.equal(to_patches(output, patches.shape[1]), patches)
    assert not transformer.proj_out_2._forward_pre_hooks
    with pytest.raises(ValueError, match="Linear has no final linear layer"):
        FinalHiddenStates([torch.nn.Linear(1, 1)])


@pytest.mark.parametrize("order", [0, 1, 2])
def test_extrapolation_continues_a_polynomial(pipe, order):
    plan = plan_for(pipe, (0, 1, 4, 6), order=order)
    outputs = [1.0 + 2 * step - 0.5 * step**2 if order == 2 else 1.0 + 2 * step * (order > 0) for step in range(8)]
    for step, row in enumerate(plan.weights):
        done = [s for s in (6, 4, 1, 0) if s <= step][: order + 1]
        if row and len(done) == order + 1:
            cond, uncond = row[: len(done)], row[len(done) + 1 : -1]
            for own in (cond, uncond):
                assert sum(w * outputs[s] for w, s in zip(own, done, strict=True)) == pytest.approx(outputs[step])
    assert plan.weights[6] == () and plan.macs_speedup == 2


def test_orders_differ_and_skipped_steps_cost_nothing(pipe):
    full = metrics.count_macs(lambda: draw(pipe))
    images, macs = [], []
    for order in (0, 1, 2):
        with apply_dqar(pipe, plan_for(pipe, order=order)):
            macs.append(metrics.count_macs(lambda: images.append(draw(pipe))))
    assert macs == pytest.approx([full / 2] * 3, rel=2e-3)  # what a forecast takes counts too
    assert not torch.equal(images[0], images[1]) and not torch.equal(images[1], images[2])


def test_without_guidance_there_is_one_branch(pipe):
    untouched = draw(pipe, guidance=1.0)
    with apply_dqar(pipe, plan_for(pipe, range(8), guidance=1.0)):
        assert torch.equal(draw(pipe, guidance=1.0), untouched)
    plan = plan_for(pipe, guidance=1.0)
    assert [len(row) for row in plan.weights] == [0, 2, 0, 0, 3, 3, 3, 0]
    with apply_dqar(pipe, plan) as session:
        assert not torch.equal(draw(pipe, guidance=1.0), untouched)
    assert set(session.trace.to_pandas("model").branch) == {"cond"}


def test_a_planned_step_waits_for_no_number(pipe, monkeypatch):
    waits = []
    for name in ("item", "tolist", "__bool__", "__float__"):
        original = getattr(torch.Tensor, name)
        monkeypatch.setattr(torch.Tensor, name, lambda self, o=original, n=name: (waits.append(n), o(self))[1])

    def count(steps):
        with apply_dqar(pipe, plan_for(pipe, (0, 1, steps - 1), steps=steps)):
            waits.clear()
            draw(pipe, steps=steps)
            planned = len(waits)
        waits.clear()
        draw(pipe, steps=steps)
        return planned - len(waits)

    assert count(6) == count(12)


def test_a_saved_plan_is_the_same(pipe, tmp_path):
    plan = plan_for(pipe)
    plan.save(tmp_path / "plan.json")
    assert ForecastPlan.load(tmp_path / "plan.json") == plan
    quantized = dataclasses.replace(plan, history_bits=4)
    quantized.save(tmp_path / "plan.json")
    assert ForecastPlan.load(tmp_path / "plan.json") == quantized != plan
    assert [path.name for path in tmp_path.iterdir()] == ["plan.json"]


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: text[:-20],
        lambda text: text.replace("dqar-forecast-2", "dqar-plan-1"),
        lambda text: text.replace('"weights"', '"heights"'),
        lambda text: json.dumps({**json.loads(text), "computed": [0, 99]}),
        lambda text: "[]",
    ],
)
def test_a_damaged_file_is_named(pipe, tmp_path, damage):
    path = tmp_path / "plan.json"
    plan_for(pipe).save(path)
    path.write_text(damage(path.read_text()))
    with pytest.raises(ValueError, match="plan.json is truncated or no dqar-forecast-2 file"):
        ForecastPlan.load(path)


def test_wrong_tables_are_named():
    with pytest.raises(ValueError, match="step 0"):
        ForecastPlan([(), ()], {1}, [9, 1], (1, 1), 2, "model")
    with pytest.raises(ValueError, match="step 1 are not accepted: 4 finite"):
        ForecastPlan([(), (1.0,)], {0}, [9, 1], (2, 2), 2, "model")
    with pytest.raises(ValueError, match="step 1 are not accepted"):
        ForecastPlan([(), (1.0, float("nan"))], {0}, [9, 1], (1, 1), 2, "model")
    with pytest.raises(ValueError, match=r"history_bits=2 is not accepted: choose one of 16, 8, 4"):
        ForecastPlan([()], {0}, [9], (1, 1), 1, "model", history_bits=2)
    with pytest.raises(ValueError, match="history=0"):
        ForecastPlan([()], {0}, [9], (1, 1), 0, "model")
    with pytest.raises(ValueError, match=r"kernel=\(3, 2\)"):
        ForecastPlan([()], {0}, [9], (1, 1), 1, "model", (3, 2))
    with pytest.raises(ValueError, match=r"guidance=\(3.0, 2.0\)"):
        ForecastPlan([()], {0}, [9], (3, 2), 1, "model")
    for readouts in ([(), (1.0,), (1.0, 2.0)], [(), (math.inf,), ()], [()]):
        with pytest.raises(ValueError, match="readouts of .* are not accepted"):
            ForecastPlan([(), (1.0, 0.0), (1.0, 0.0)], {0}, [9, 5, 1], (1, 1), 1, "model", readouts=readouts)
    with pytest.raises(ValueError, match="step 0 is not accepted: a readout"):
        ForecastPlan([(), (1.0, 0.0)], {0}, [9, 1], (1, 1), 1, "model", readouts=[(1.0,), ()])
    with pytest.raises(ValueError, match="the 2 weights of step 1 are not accepted: 18 finite"):
        ForecastPlan([(), (1.0, 0.0)], {0}, [9, 1], (1, 1), 1, "model", (3, 3))


def test_a_run_that_the_plan_was_not_made_for_is_refused(pipe):
    plan = plan_for(pipe)
    with apply_dqar(pipe, plan):
        with pytest.raises(ValueError, match="made for 8 steps, this run takes 5"):
            draw(pipe, steps=5)
        with pytest.raises(ValueError, match="guidance_scale=3, this run has 2"):
            draw(pipe, guidance=2.0)
    with pytest.raises(ValueError, match="made for DiTTransformer2DModel of 4 layers.* this is .* of 3 layers"):
        apply_dqar(embedded_pipeline(num_layers=3), plan)
    with (
        apply_dqar(pipe.transformer, plan),
        pytest.raises(ValueError, match="apply it to the pipelin"),
        torch.no_grad(),
    ):
        pipe.transformer(torch.randn(1, 1, 8, 8), timestep=torch.tensor([999]), class_labels=torch.tensor([1]))
    pipe.scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config, timestep_spacing="leading")
    with apply_dqar(pipe, plan), pytest.raises(ValueError, match="another spacing.*step 0"):
        draw(pipe)


def test_readouts_of_another_size_are_refused(pipe):
    plan = plan_for(pipe)
    plan = dataclasses.replace(plan, readouts=tuple((1.0,) * 12 if row else () for row in plan.weights))
    with apply_dqar(pipe, plan), pytest.raises(ValueError, match="128 numbers a step fit this model"):
        draw(pipe)


def test_nan_is_found_at_the_end_of_a_planned_run(pipe):
    broken = plan_for(pipe)
    pipe.transformer.transformer_blocks[2].attn1.to_v.weight.data[0, 0] = float("nan")
    with apply_dqar(pipe, broken), pytest.raises((FloatingPointError, ValueError), match="NaN|nan"):
        draw(pipe)


def test_through_the_real_dit_pipeline(dit_folder):
    """Eight output channels, of which four are noise; the plan's guided forecast survives the pipeline's guidance."""
    pipe = DiTPipeline.from_pretrained(dit_folder)
    pipe.set_progress_bar_config(disable=True)
    pipe.scheduler = make_scheduler("dpm-solver++", pipe.scheduler)

    def images():
        return pipe([1, 2], 4.0, torch.Generator().manual_seed(0), 6, output_type="np").images

    untouched = images()
    with apply_dqar(pipe, plan_for(pipe, range(6), 6, 4.0)):
        assert (images() == untouched).all()
    plan = plan_for(pipe, (0, 1, 3, 5), 6, 4.0)
    with apply_dqar(pipe, plan):
        planned = images()
        assert (planned == images()).all() and (planned != untouched).any()
    assert (images() == untouched).all()


def test_through_the_pixart_pipeline(pixart_folder):
    pipe = PixArtAlphaPipeline.from_pretrained(pixart_folder)
    pipe.set_progress_bar_config(disable=True)

    def images():
        options = {"clean_caption": False, "use_resolution_binning": False, "height": 8, "width": 8}
        generator = torch.Generator().manual_seed(0)
        return pipe("a cat", num_inference_steps=6, generator=generator, output_type="np", **options).images

    untouched = images()
    with apply_dqar(pipe, plan_for(pipe, range(6), 6, 4.5)):
        assert (images() == untouched).all()
    with apply_dqar(pipe, plan_for(pipe, (0, 1, 3, 5), 6, 4.5)):
        assert (images() != untouched).any()
    assert (images() == untouched).all()
