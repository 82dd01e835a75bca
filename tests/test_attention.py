import functools
import gc
import math
import threading
import weakref

import accelerate
import pandas
import pytest
import torch
from diffusers import DiTPipeline, PixArtTransformer2DModel, UNet2DModel
from diffusers.hooks import HookRegistry, ModelHook
from helpers import draw, embedded_pipeline, entries_of, state
from situations import OPEN, Naive

from dqar import CacheFormat, DQARConfig, Probe, ReusePlan, apply_dqar, remove_dqar, stats
from dqar.models.pipelines import make_scheduler
from dqar.models.profiles import SCHEDULERS
from dqar.quantizer import quantize

CLOSED = {
    "by schedule": DQARConfig(schedule="none"),
    "by schedule, looking": DQARConfig(schedule="none", probe=Probe(record=True)),
    "by entropy": DQARConfig(entropy_threshold=0, snr_range=(0, math.inf), schedule="all"),
    "by entropy, output": DQARConfig(entropy_threshold=0, schedule="all", reuse_target="output"),
    "by snr": DQARConfig(entropy_threshold=math.inf, snr_range=(1e9, 1e9), schedule="all"),
    "by warmup": DQARConfig(**OPEN, warmup=1000),
    "by an empty plan": DQARConfig(**OPEN, plan=ReusePlan(frozenset(), 4, 8)),
    "by branches too different to share": DQARConfig(schedule="none", share_below=1e-12),
    "looking at every third step": DQARConfig(schedule="none", probe=Probe(record=True, interval=3)),
}
SHARING = {"schedule": "none", "share_below": math.inf}
COARSE = {**OPEN, "quantize_bits": 4, "quantize_mode": "per_tensor"}
KEPT = {"cache": CacheFormat(keep_channels=4)}


@functools.cache
def untouched(scheduler, labels, guidance):
    pipe = embedded_pipeline()
    pipe.scheduler = make_scheduler(scheduler, pipe.scheduler)
    return draw(pipe, labels, guidance=guidance)


@pytest.mark.parametrize(
    "scheduler, labels, guidance, gate",
    [
        *(("ddim", *run, gate) for gate in CLOSED for run in (((1, 2, 3), 3.0), ((4,), 3.0), ((1, 2), 1.0))),
        *((scheduler, (5,), 3.0, gate) for scheduler in SCHEDULERS for gate in ("by schedule, looking", "by snr")),
    ],
)
def test_closed_gate_is_bit_identical(pipe, scheduler, labels, guidance, gate):
    pipe.scheduler = make_scheduler(scheduler, pipe.scheduler)
    expected = untouched(scheduler, labels, guidance)
    with apply_dqar(pipe, CLOSED[gate]) as session:
        got = draw(pipe, labels, guidance=guidance)
    assert torch.equal(got, expected)
    table = session.trace.to_pandas()
    assert set(table.decision) == {"compute"}
    assert len(table) == 4 * 8 * (2 if guidance > 1 else 1)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_closed_gate_is_bit_identical_in_half_precision(pipe, dtype):
    pipe.transformer.to(dtype)
    expected = draw(pipe)
    with apply_dqar(pipe, CLOSED["by schedule, looking"]):
        assert torch.equal(draw(pipe), expected)


@pytest.mark.parametrize("target", ["kv", "output"])
def test_open_gate_reuses_and_changes_the_image(pipe, target):
    expected = draw(pipe)
    with apply_dqar(pipe, DQARConfig(**OPEN, reuse_target=target)) as session:
        got = draw(pipe)
    table = session.trace.to_pandas()
    assert not torch.equal(got, expected)
    assert (table.decision == "reuse").mean() == pytest.approx(6 / 8)  # computed at steps 0 and 4, the streak is 3
    assert set(table[table.decision == "compute"].step) == {0, 4}


@pytest.mark.parametrize("target", ["kv", "output"])
def test_reuse_equals_a_naive_one(target):
    """Against an independent implementation that stores what the modules returned, with an unquantized cache."""
    pipe = embedded_pipeline()
    config = DQARConfig(**{**OPEN, "schedule": "static"}, reuse_target=target, quantize_bits=16)
    with apply_dqar(pipe, config):
        got = draw(pipe)
    with Naive(pipe.transformer, target, streak=1):
        torch.testing.assert_close(got, draw(pipe), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "one, other",
    [
        ({"schedule": "linear"}, {"schedule": "linear_reverse"}),
        ({"schedule": "depth_aware"}, {"schedule": "all"}),
        ({"reuse_target": "kv"}, {"reuse_target": "output"}),
        ({"quantize_bits": 8}, {"quantize_bits": 2}),
        ({"quantize_bits": 16}, {"quantize_bits": 8}),
        ({"quantize_mode": "per_tensor"}, {"quantize_mode": "per_token"}),
        ({"quantize_mode": "per_channel"}, {"quantize_mode": "per_token"}),
        ({"mixed_precision": True}, {"mixed_precision": False}),
        ({"max_reuse_streak": 1}, {"max_reuse_streak": 3}),
        ({"warmup": 0}, {"warmup": 4}),
        ({"schedule": "static", "static_interval": 2}, {"schedule": "static", "static_interval": 3}),
        ({"entropy_threshold": 2.6}, {"entropy_threshold": 2.7}),
        ({"snr_range": (0, 1.0)}, {"snr_range": (0, math.inf)}),
        ({"snr_range": (0, 1.0)}, {"snr_range": (0, 1.0), "probe": Probe(snr_source="schedule")}),
        ({**COARSE, "balance": True}, COARSE),
        ({**COARSE, **KEPT}, COARSE),
        ({**COARSE, **KEPT}, {**COARSE, "cache": CacheFormat(keep_channels=5)}),
        ({**COARSE, **KEPT}, {**COARSE, **KEPT, "balance": True}),
        ({"cache": CacheFormat(layer_bits=(2, 8, 8, 8))}, {"cache": CacheFormat(layer_bits=(8, 8, 8, 2))}),
        ({"cache": CacheFormat(layer_bits=(4, 4, 4, 8))}, COARSE),
        ({**COARSE, **KEPT, "reuse_target": "output"}, {**COARSE, "reuse_target": "output"}),
        (SHARING, {"schedule": "none"}),
        ({**SHARING, "reuse_target": "output"}, SHARING),
        ({**SHARING, "max_reuse_streak": 1}, SHARING),
        ({**SHARING, "share_below": 0.03}, SHARING),
        ({"share_below": math.inf}, {}),
        ({"plan": ReusePlan({(3, 1, "cond")}, 4, 8)}, {"plan": ReusePlan({(3, 1, "uncond")}, 4, 8)}),
        ({"entropy_threshold": 2.65, "probe": Probe(interval=3)}, {"entropy_threshold": 2.65}),
    ],
)
def test_configurations_that_must_differ_do(pipe, one, other):
    images = []
    for options in (one, other):
        with apply_dqar(pipe, DQARConfig(**{**OPEN, **options})):
            images.append(draw(pipe))
    assert not torch.equal(*images)


def test_removal_leaves_nothing(pipe):
    draw(pipe)
    before, expected = state(pipe), draw(pipe)
    with apply_dqar(pipe, DQARConfig(**OPEN)) as session:
        entries = entries_of(pipe, session)
        draw(pipe)
        assert state(pipe) != before
        cached = [weakref.ref(entry.k.data) for entry in entries.values()]
        assert len(cached) == 8 and len(session.controller.cache) == 0
        entries.clear()
        gc.collect()
        assert all(ref() is None for ref in cached)  # at the run's end, before anything is decoded
    assert state(pipe) == before
    assert torch.equal(draw(pipe), expected)
    remove_dqar(pipe)  # a second time does nothing


class Counter:
    """A hook of accelerate's or of diffusers' that others may have put on the transformer before."""

    def __init__(self, transformer, kind):
        class Hook({"accelerate": accelerate.hooks.ModelHook, "diffusers": ModelHook}[kind]):
            def pre_forward(hook, _module, *args, **kwargs):
                self.calls += 1
                return args, kwargs

        self.calls = 0
        if kind == "accelerate":  # what CPU offload is made of
            accelerate.hooks.add_hook_to_module(transformer, Hook())
        else:
            HookRegistry.check_if_exists_or_initialize(transformer).register_hook(Hook(), "counter")


@pytest.mark.parametrize("kind", ["accelerate", "diffusers"])
def test_hooks_of_others_outlive_dqar(pipe, kind):
    counter = Counter(pipe.transformer, kind)
    for _ in range(2):
        with apply_dqar(pipe, DQARConfig(**OPEN)):
            draw(pipe, steps=2)
        draw(pipe, steps=2)
    assert counter.calls == 8


def test_a_schedulers_own_step_outlives_dqar(pipe):
    own = pipe.scheduler.step = functools.partial(pipe.scheduler.step)
    with apply_dqar(pipe, DQARConfig(**OPEN)):
        draw(pipe, steps=2)
        assert pipe.scheduler.step is not own
    assert pipe.scheduler.step is own
    with apply_dqar(pipe, DQARConfig(**OPEN)):
        draw(pipe, steps=2)
        above = pipe.scheduler.step = functools.partial(pipe.scheduler.step)
    assert pipe.scheduler.step is above
    draw(pipe, steps=2)


def test_two_runs_in_a_row_are_equal(pipe):
    with apply_dqar(pipe, DQARConfig(**OPEN)) as session:
        first, second = draw(pipe), draw(pipe)
    assert torch.equal(first, second)
    assert set(session.trace.to_pandas().run) == {0, 1}


@pytest.mark.parametrize("change", [{"labels": (5, 6, 7)}, {"labels": (3, 4)}, {"steps": 5}, {"guidance": 1.0}])
def test_a_changed_run_starts_from_an_empty_cache(pipe, change):
    with apply_dqar(pipe, DQARConfig(**OPEN)):
        expected = draw(pipe, **change)
    with apply_dqar(pipe, DQARConfig(**OPEN)):
        draw(pipe)
        assert torch.equal(draw(pipe, **change), expected)


def test_an_image_does_not_depend_on_its_batch(pipe):
    with apply_dqar(pipe, DQARConfig(**OPEN)):
        together, alone = draw(pipe, (1, 2)), draw(pipe, (1,))
    torch.testing.assert_close(together[:1], alone, rtol=1e-4, atol=1e-4)


def test_an_exception_leaves_the_model_usable(pipe):
    expected_plain = draw(pipe)
    with apply_dqar(pipe, DQARConfig(**OPEN)):
        expected = draw(pipe)
    calls = 0

    def fail(*_args):
        nonlocal calls
        calls += 1
        if calls == 3:
            raise KeyboardInterrupt

    with apply_dqar(pipe, DQARConfig(**OPEN)):
        handle = pipe.transformer.transformer_blocks[2].register_forward_hook(fail)
        with pytest.raises(KeyboardInterrupt):
            draw(pipe)
        handle.remove()
        assert torch.equal(draw(pipe), expected)
    assert torch.equal(draw(pipe), expected_plain)


def test_pipelines_in_two_threads_share_nothing():
    pipes = [embedded_pipeline(seed) for seed in (0, 1)]
    expected, got = [], {}
    for pipe in pipes:
        with apply_dqar(pipe, DQARConfig(**OPEN)):
            expected.append(draw(pipe))
    sessions = [apply_dqar(pipe, DQARConfig(**OPEN)) for pipe in pipes]
    threads = [threading.Thread(target=lambda i=i: got.update({i: draw(pipes[i])})) for i in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for i in (0, 1):
        assert torch.equal(got[i], expected[i])
        assert len(sessions[i].trace) == 4 * 8 * 2


def denoise(pipe, label=1, steps=6):
    """One image without guidance, a step at a time, with positional arguments."""
    pipe.scheduler.set_timesteps(steps)
    latents = torch.randn(1, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    for t in pipe.scheduler.timesteps:
        with torch.no_grad():
            noise = pipe.transformer(latents, t[None], torch.tensor([label])).sample
        latents = pipe.scheduler.step(noise, t, latents).prev_sample
        yield latents


def test_interleaved_pipelines_share_nothing():
    pipes = [embedded_pipeline(seed) for seed in (0, 1)]
    expected = []
    for pipe in pipes:
        with apply_dqar(pipe, DQARConfig(**OPEN)):
            expected.append(draw(pipe, (1,), steps=6, guidance=1.0))
    with apply_dqar(pipes[0], DQARConfig(**OPEN)), apply_dqar(pipes[1], DQARConfig(**OPEN)):
        *_, got = zip(*map(denoise, pipes), strict=True)  # a step of one, a step of the other
    assert torch.equal(got[0], expected[0]) and torch.equal(got[1], expected[1])


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_pipelines_may_share_a_scheduler(order):
    pipes = [embedded_pipeline(seed) for seed in (0, 1)]
    pipes[1].scheduler = pipes[0].scheduler
    expected = []
    for pipe in pipes:
        with apply_dqar(pipe, DQARConfig(**OPEN)) as session:
            expected.append((draw(pipe), session.trace.to_pandas()))
    before = state(pipes[0])
    sessions = [apply_dqar(pipe, DQARConfig(**OPEN)) for pipe in pipes]
    got = [draw(pipe) for pipe in pipes]
    for i in (0, 1):
        assert torch.equal(got[i], expected[i][0])
        pandas.testing.assert_frame_equal(sessions[i].trace.to_pandas(), expected[i][1])
    first, last = order
    sessions[first].remove()
    sessions[last].trace.clear()
    assert torch.equal(draw(pipes[last]), expected[last][0])
    assert sessions[last].trace.to_pandas().snr.tolist() == expected[last][1].snr.tolist()
    sessions[last].remove()
    assert state(pipes[0]) == before


@pytest.mark.parametrize("target, projections", [("kv", {"to_q", "to_out"}), ("output", set())])
def test_reuse_computes_no_more_than_it_needs(pipe, monkeypatch, target, projections):
    seen = []
    for block in pipe.transformer.transformer_blocks:
        attn = block.attn1
        for name, module in {"to_q": attn.to_q, "to_k": attn.to_k, "to_v": attn.to_v, "to_out": attn.to_out[0]}.items():
            module.register_forward_hook(lambda *_args, name=name: seen.append(name))
    sdpa = torch.nn.functional.scaled_dot_product_attention
    monkeypatch.setattr(
        torch.nn.functional, "scaled_dot_product_attention", lambda *a, **k: (seen.append("sdpa"), sdpa(*a, **k))[1]
    )
    with apply_dqar(pipe, DQARConfig(**OPEN, reuse_target=target)) as session:
        draw(pipe, steps=2)
    computed, reused = (session.trace.to_pandas().decision == d for d in ("compute", "reuse"))
    assert computed.sum() == reused.sum() == 8
    attention = set() if target == "output" else {"sdpa"}
    for name in ("to_q", "to_k", "to_v", "to_out", "sdpa"):
        assert seen.count(name) == (8 if name in projections | attention else 4), name


def test_traced_entropy_equals_that_of_the_maps(pipe):
    """Per head and branch, from float64 maps of the projections' own outputs."""
    by_hand, queries = {}, {}
    for layer, block in enumerate(pipe.transformer.transformer_blocks):
        block.attn1.to_q.register_forward_hook(lambda _m, _a, out, layer=layer: queries.update({layer: out}))

        def see_key(_m, _a, out, layer=layer):
            q, k = (x.double().unflatten(-1, (2, 8)).transpose(1, 2) for x in (queries[layer], out))
            p = (q @ k.mT / math.sqrt(8)).softmax(-1)
            entropy = -(p * p.log()).sum(-1).mean(-1)
            for branch, half in zip(("cond", "uncond"), entropy.chunk(2), strict=True):
                by_hand.setdefault((layer, branch), []).append(half.mean(0))

        block.attn1.to_k.register_forward_hook(see_key)
    with apply_dqar(pipe, DQARConfig(schedule="none", probe=Probe(record=True))) as session:
        draw(pipe, steps=3)
    heads = session.trace.heads_to_pandas()
    assert len(heads) == 3 * 4 * 2 * 2
    for row in heads.itertuples():
        assert row.entropy == pytest.approx(by_hand[row.layer, row.branch][row.step][row.head].item(), abs=1e-5)
    assert heads.groupby("branch").entropy.mean().nunique() == 2


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_traced_snr_is_that_of_the_predicted_clean_latents(pipe, scheduler):
    """Against DDIM's and Euler's own ``pred_original_sample``, DPM-Solver++'s ``convert_model_output``, and by hand."""
    pipe.scheduler = make_scheduler(scheduler, pipe.scheduler)
    expected, own_step = [], pipe.scheduler.step

    def step(model_output, t, sample, **kwargs):
        scaled = pipe.scheduler.scale_model_input(sample, t)
        if scheduler.startswith("dpm-solver++"):
            if pipe.scheduler.step_index is None:
                pipe.scheduler._init_step_index(t)
            clean = pipe.scheduler.convert_model_output(model_output, sample=sample)
            result = own_step(model_output, t, sample, **kwargs)
        elif scheduler.startswith(("unipc", "deis", "sa-solver")):  # sigma is noise over signal
            sigma = pipe.scheduler.sigmas[len(expected)]
            clean = sample * (1 + sigma**2).sqrt() - sigma * model_output
            result = own_step(model_output, t, sample, **kwargs)
        else:
            result = own_step(model_output, t, sample, **kwargs)
            clean = result.pred_original_sample
        ratio = clean.double().square().sum((1, 2, 3)) / (scaled - clean).double().square().sum((1, 2, 3))
        expected.append(ratio.mean().item())
        return result

    pipe.scheduler.step = step
    draw(pipe)
    del pipe.scheduler.step
    with apply_dqar(pipe, DQARConfig(schedule="none")) as session:
        draw(pipe)
    table = session.trace.to_pandas()
    # At t = 0, where the other spacings end, noisy and clean differ by 1e-4: float32 leaves three digits of that.
    tolerance = 5e-3 if pipe.scheduler.timesteps[-1] == 0 else 1e-3
    assert table.groupby("step").snr.first().tolist() == pytest.approx(expected, rel=tolerance)
    alpha_bar = pipe.scheduler.alphas_cumprod[int(pipe.scheduler.timesteps[0])].item()
    assert table.snr_schedule.iloc[0] == pytest.approx(alpha_bar / (1 - alpha_bar), rel=1e-3)


def test_branches_have_caches_of_their_own(pipe):
    with apply_dqar(pipe, DQARConfig(**OPEN)) as session:
        entries = entries_of(pipe, session)
        draw(pipe)
        cond, uncond = entries[1, "cond"], entries[1, "uncond"]
        assert cond.k.data.shape == uncond.k.data.shape == (2, 16, 16)
        assert not torch.equal(cond.k.data, uncond.k.data)


def test_prompt_length_scales_the_threshold(pipe):
    with apply_dqar(pipe, DQARConfig(), prompt_length=8) as session:
        draw(pipe, steps=2)
    assert session.trace.to_pandas().threshold.unique().tolist() == pytest.approx([0.70711], abs=1e-5)


def test_entropy_queries_estimate_what_all_of_them_give(pipe):
    entropies = []
    for queries in (None, 4):
        with apply_dqar(pipe, DQARConfig(schedule="none", probe=Probe(record=True, queries=queries))) as session:
            draw(pipe)
        entropies.append(session.trace.to_pandas().entropy)
    assert not entropies[0].equals(entropies[1])
    assert entropies[1].mean() == pytest.approx(entropies[0].mean(), rel=0.05)


def test_equal_latents_are_guidance_only_with_the_null_class(pipe):
    latents = torch.randn(1, 1, 8, 8).repeat(2, 1, 1, 1)
    for labels, branches in (((1, 2), {"cond"}), ((1, 10), {"cond", "uncond"})):
        pipe.scheduler.set_timesteps(4)
        with apply_dqar(pipe, DQARConfig()) as session, torch.no_grad():
            pipe.transformer(latents, timestep=torch.tensor([750, 750]), class_labels=torch.tensor(labels))
        assert set(session.trace.to_pandas().branch) == branches


def test_traced_bytes_are_those_of_the_cache(pipe):
    with apply_dqar(pipe, DQARConfig(**OPEN)) as session:
        entries = entries_of(pipe, session)
        draw(pipe)
        table = session.trace.to_pandas()
        # K and V, two images: 16 tokens of 16 int8 channels and a float32 scale a channel
        assert set(table.bytes) == {2 * 2 * (16 * 16 + 16 * 4)}
        assert sum(entry.nbytes for entry in entries.values()) == table[table.step == 7].bytes.sum()


def test_the_real_dit_pipeline(dit_folder):
    pipe = DiTPipeline.from_pretrained(dit_folder)
    pipe.set_progress_bar_config(disable=True)
    expected = draw(pipe)
    with apply_dqar(pipe, DQARConfig(schedule="none", probe=Probe(record=True))) as session:
        assert torch.equal(draw(pipe), expected)
    assert set(session.trace.to_pandas().branch) == {"cond", "uncond"}
    with apply_dqar(pipe, DQARConfig(**OPEN, reuse_target="output")) as session:
        changed = draw(pipe)
    assert not torch.equal(changed, expected)
    assert (session.trace.to_pandas().decision == "reuse").mean() == pytest.approx(6 / 8)
    assert torch.equal(draw(pipe), expected)


def test_a_bare_transformer(pipe):
    transformer, scheduler = pipe.transformer, pipe.scheduler
    scheduler.set_timesteps(8)

    def loop():
        latents = torch.randn(1, 1, 8, 8, generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            for t in scheduler.timesteps:
                noise = transformer(latents, timestep=t[None], class_labels=torch.tensor([1])).sample
                latents = scheduler.step(noise, t, latents).prev_sample
        return latents

    expected = loop()
    with apply_dqar(transformer, DQARConfig(**OPEN)) as session:
        first, second = loop(), loop()
    assert not torch.equal(first, expected)
    assert torch.equal(second, first)  # the timestep went up: a new run
    table = session.trace.to_pandas()
    assert set(table.total_steps[table.step > 0]) == {8} and set(table.run) == {0, 1}
    assert set(table.decision[table.step < 2]) == {"compute"} and set(table.decision[table.step == 2]) == {"reuse"}
    with pytest.warns(UserWarning, match="bare transformer knows no SNR"), apply_dqar(transformer, DQARConfig()):
        assert torch.equal(loop(), expected)
    remove_dqar(transformer)


def test_positional_arguments_are_as_good_as_named_ones(pipe):
    pipe.scheduler.set_timesteps(4)
    for target in (pipe, pipe.transformer):
        with apply_dqar(target, DQARConfig(**OPEN)) as session, torch.no_grad():
            for step, label in ((0, 1), (1, 1), (2, 7)):
                t = pipe.scheduler.timesteps[step : step + 1]
                pipe.transformer(torch.randn(1, 1, 8, 8), t, torch.tensor([label]))
            assert session.trace.to_pandas().reason.iloc[-1] == "no cache"  # another label, another run


def test_masked_attention_is_refused(pipe):
    mask = torch.ones(6, 1, 16)
    pipe.transformer.transformer_blocks[1].register_forward_pre_hook(
        lambda _module, args, kwargs: (args, {**kwargs, "attention_mask": mask}), with_kwargs=True
    )
    with apply_dqar(pipe, DQARConfig()), pytest.raises(ValueError, match="layer 1 was given attention_mask"):
        draw(pipe)


def test_pixart_stacks_the_unconditional_half_first():
    torch.manual_seed(0)
    model = PixArtTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        num_layers=3,
        sample_size=8,
        cross_attention_dim=16,
        caption_channels=12,
        use_additional_conditions=False,
    ).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    half, prompts, keys = torch.randn(1, 4, 8, 8), torch.randn(2, 5, 12), []
    inputs = {"encoder_hidden_states": prompts, "added_cond_kwargs": {}}
    model.transformer_blocks[1].attn1.to_k.register_forward_hook(lambda _m, _a, out: keys.append(out))
    with torch.no_grad():
        expected = model(half.repeat(2, 1, 1, 1), timestep=torch.tensor([600, 600]), **inputs).sample
        with apply_dqar(model, DQARConfig(**OPEN, quantize_bits=16)) as session:
            for t in (900, 600):
                got = model(half.repeat(2, 1, 1, 1), timestep=torch.tensor([t, t]), **inputs).sample
            assert torch.equal(got, expected)  # a bare model's first step is never cached
            for branch, rows in (("uncond", slice(0, 1)), ("cond", slice(1, 2))):
                assert torch.equal(session.controller.cache.get(1, branch).k.dequantize(), keys[-1][rows])


def test_nan_latents_stop_before_the_first_layer(pipe):
    with apply_dqar(pipe, DQARConfig()), pytest.raises(FloatingPointError, match="step 0, before layer 0"):
        latents, labels = torch.full((2, 1, 8, 8), math.nan), torch.ones(2).long()
        with torch.no_grad():
            pipe.transformer(latents, timestep=torch.tensor([9, 9]), class_labels=labels)


@pytest.mark.parametrize("bad_step", [2, 7])
def test_nan_inside_names_step_and_layer(pipe, bad_step):
    calls = 0

    def spoil(_module, _args, output):
        nonlocal calls
        calls += 1
        return output * math.nan if calls > bad_step else output

    with apply_dqar(pipe, DQARConfig(**OPEN)):
        pipe.transformer.transformer_blocks[2].ff.register_forward_hook(spoil)
        with pytest.raises(FloatingPointError, match=f"step {bad_step}, first in layer 2"):
            draw(pipe)


def test_a_batch_that_changes_in_mid_run_is_computed(pipe):
    pipe.scheduler.set_timesteps(8)
    inputs = [
        {"hidden_states": torch.randn(n, 1, 8, 8), "timestep": t.expand(n), "class_labels": torch.ones(n).long()}
        for n, t in zip((3, 2), pipe.scheduler.timesteps, strict=False)
    ]
    with torch.no_grad():
        expected = [pipe.transformer(**given).sample for given in inputs]
        with apply_dqar(pipe, DQARConfig(**OPEN)):
            assert all(
                torch.equal(pipe.transformer(**given).sample, e) for given, e in zip(inputs, expected, strict=True)
            )


def test_models_without_supported_attention_are_refused(pipe):
    unet = UNet2DModel(
        sample_size=8, block_out_channels=(32,), down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",)
    )
    for model in (unet, torch.nn.Linear(2, 2)):
        with pytest.raises(ValueError, match=f"{type(model).__name__} has no attention that DQAR can take over"):
            apply_dqar(model)
    pipe.transformer.transformer_blocks[1].attn1.set_processor(lambda *_args, **_kwargs: None)
    with pytest.raises(ValueError, match="layer 1 has the attention processor function"):
        apply_dqar(pipe)


def test_applying_twice_is_an_error(pipe):
    with apply_dqar(pipe), pytest.raises(ValueError, match="already applied"):
        apply_dqar(pipe)


def see_rows(pipe, layer=0):
    """Batch rows that went through each projection of a layer, call by call."""
    attn, rows = pipe.transformer.transformer_blocks[layer].attn1, {"q": [], "k": [], "v": [], "out": []}
    for name, module in {"q": attn.to_q, "k": attn.to_k, "v": attn.to_v, "out": attn.to_out[0]}.items():
        module.register_forward_hook(lambda _m, _a, out, name=name: rows[name].append(len(out)))
    return rows


@pytest.mark.parametrize("target", ["kv", "output"])
def test_shared_sites_are_the_unconditional_ones_only(pipe, target):
    expected, before, rows = draw(pipe), state(pipe), see_rows(pipe)
    with apply_dqar(pipe, DQARConfig(**SHARING, reuse_target=target)) as session:
        first, second = draw(pipe), draw(pipe)
    assert torch.equal(first, second) and not torch.equal(first, expected)
    table = session.trace.to_pandas()
    shares = table[table.decision == "share"]
    # Nothing is known at step 0, and three shares in a row are enough.
    sites = {(step, layer, "uncond") for step in (1, 2, 3, 5, 6, 7) for layer in range(4)}
    assert set(zip(shares.step, shares.layer, shares.branch, strict=True)) == sites and len(shares) == 2 * len(sites)
    assert set(table.decision) == {"compute", "share"} and len(table) == 2 * 8 * 4 * 2
    halved = [4, 2, 2, 2] * 4  # two images
    assert rows["k"] == rows["v"] == halved
    assert rows["q"] == rows["out"] == ([4] * 16 if target == "kv" else halved)
    assert state(pipe) == before and torch.equal(draw(pipe), expected)


@pytest.mark.parametrize("target", ["kv", "output"])
def test_sharing_equals_a_naive_one(target):
    """Against hooks that overwrite the unconditional half of what the modules return."""
    pipe = embedded_pipeline()
    outputs = []
    for block in pipe.transformer.transformer_blocks:
        block.attn1.register_forward_hook(lambda _m, _a, out: outputs.append(out))
    with apply_dqar(pipe, DQARConfig(**SHARING, reuse_target=target)):
        got = draw(pipe)
    for number, output in enumerate(outputs):
        shared = number // 4 not in (0, 4)
        assert torch.equal(*output.chunk(2)) == (shared and target == "output")
    calls = {}

    def hook(module, _args, output):
        step = calls[module] = calls.get(module, -1) + 1
        return torch.cat([output[:2], output[:2]]) if step not in (0, 4) else None

    for block in pipe.transformer.transformer_blocks:
        for module in (block.attn1,) if target == "output" else (block.attn1.to_k, block.attn1.to_v):
            module.register_forward_hook(hook)
    torch.testing.assert_close(got, draw(pipe), rtol=1e-5, atol=1e-5)


def test_branches_share_where_their_traced_entropies_say_so(pipe):
    below = 0.03
    with apply_dqar(pipe, DQARConfig(schedule="none", share_below=below, max_reuse_streak=100)) as session:
        draw(pipe)
    table, last, decisions = session.trace.to_pandas(), {}, set()
    for (_step, layer), rows in table.groupby(["step", "layer"]):
        cond, uncond = (rows[rows.branch == branch].iloc[0] for branch in ("cond", "uncond"))
        expected = layer in last and abs(last[layer][0] - last[layer][1]) < below
        assert (uncond.decision == "share") == expected
        last[layer] = (cond.entropy, last[layer][1] if expected else uncond.entropy)
        decisions.add(uncond.decision)
    assert decisions == {"compute", "share"}


@pytest.mark.parametrize("target", ["kv", "output"])
def test_what_was_shared_is_cached_for_its_own_branch(pipe, target):
    config = DQARConfig(**OPEN, share_below=math.inf, quantize_bits=16, reuse_target=target)
    with apply_dqar(pipe, config) as session:
        entries = entries_of(pipe, session)
        draw(pipe)
        cond, uncond = entries[1, "cond"], entries[1, "uncond"]
        for one, other in (
            ((cond.k, uncond.k), (cond.v, uncond.v)) if target == "kv" else ((cond.output, uncond.output),)
        ):
            assert torch.equal(one.data, other.data) and one.data.data_ptr() != other.data.data_ptr()
    table = session.trace.to_pandas()
    assert set(table[table.decision == "share"].step) == {4}
    assert (table.decision == "reuse").mean() == pytest.approx(6 / 8)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_sharing_and_balancing_in_half_precision(pipe, dtype):
    pipe.transformer.to(dtype)
    plain = draw(pipe)
    others = {"balance": True, "cache": CacheFormat(keep_channels=2)}
    for options in ({"share_below": math.inf}, others, {"cache": CacheFormat(fitted=True)}):
        with apply_dqar(pipe, DQARConfig(**COARSE, **options)):
            got = draw(pipe)
        assert got.isfinite().all() and not torch.equal(got, plain)


def test_nothing_is_shared_without_guidance(pipe):
    expected = draw(pipe, guidance=1.0)
    with apply_dqar(pipe, DQARConfig(**SHARING)) as session:
        assert torch.equal(draw(pipe, guidance=1.0), expected)
    assert set(session.trace.to_pandas().decision) == {"compute"}


def test_entropy_is_measured_at_every_nth_step_only(pipe):
    tables = []
    for interval in (1, 3):
        config = DQARConfig(schedule="none", probe=Probe(record=True, interval=interval))
        with apply_dqar(pipe, config) as session:
            draw(pipe)
        tables.append(session.trace.to_pandas())
    every, third = tables
    measured = third.step.isin([0, 3, 6])
    assert third.entropy[measured].tolist() == every.entropy[measured].tolist()
    assert third.entropy[~measured].isna().all() and every.entropy.notna().all()


def test_between_measurements_nothing_is_measured(pipe, monkeypatch):
    calls, measure = [], stats.query_entropy
    monkeypatch.setattr(stats, "query_entropy", lambda *args: (calls.append(1), measure(*args))[1])
    for interval, expected in ((1, 8), (3, 3), (8, 1)):
        calls.clear()
        config = DQARConfig(entropy_threshold=0, snr_range=(0, math.inf), probe=Probe(interval=interval))
        with apply_dqar(pipe, config):
            draw(pipe)
        assert len(calls) == 4 * expected


@pytest.mark.parametrize("target", ["kv", "output"])
@pytest.mark.parametrize("branch, half", [("cond", slice(0, 2)), ("uncond", slice(2, 4))])
def test_a_plan_of_one_site_changes_that_site_alone(target, branch, half):
    """Against hooks that put one half of step 2's result in the place of step 3's."""
    pipe = embedded_pipeline()
    plain = draw(pipe)
    config = DQARConfig(plan=ReusePlan({(3, 1, branch)}, 4, 8), reuse_target=target, quantize_bits=16)
    with apply_dqar(pipe, config) as session:
        first, second = draw(pipe), draw(pipe)
    table = session.trace.to_pandas()
    reused = table[table.decision == "reuse"]
    sites = list(zip(reused.run, reused.step, reused.layer, reused.branch, strict=True))
    assert sites == [(0, 3, 1, branch), (1, 3, 1, branch)]
    assert set(table.reason[table.decision == "compute"]) == {"plan"}
    assert torch.equal(first, second) and not torch.equal(first, plain)
    kept, calls = {}, {}

    def hook(module, _args, output):
        step = calls[module] = calls.get(module, -1) + 1
        if step == 3:
            output = output.clone()
            output[half] = kept[module][half]
        kept[module] = output
        return output

    attn = pipe.transformer.transformer_blocks[1].attn1
    for module in (attn,) if target == "output" else (attn.to_k, attn.to_v):
        module.register_forward_hook(hook)
    torch.testing.assert_close(first, draw(pipe), rtol=1e-5, atol=1e-5)


def test_a_run_can_be_planned_after_another(pipe):
    """What a gate decided, decided beforehand: the same image, and nothing is measured for it."""
    with apply_dqar(pipe, DQARConfig(**{**OPEN, "entropy_threshold": 2.65})) as session:
        expected = draw(pipe)
    table = session.trace.to_pandas()
    reused = table[table.decision == "reuse"]
    plan = ReusePlan.from_trace(table, "DDIMScheduler")
    assert plan.sites == set(zip(reused.step, reused.layer, reused.branch, strict=True)) and 0 < len(plan.sites) < 48
    with apply_dqar(pipe, DQARConfig(plan=plan)) as session:
        got = draw(pipe)
    again = session.trace.to_pandas()
    assert torch.equal(got, expected) and again.entropy.isna().all()
    assert again.decision.tolist() == table.decision.tolist()


@pytest.mark.parametrize("target", ["kv", "output"])
def test_kept_channels_bring_the_image_closer_to_unquantized_reuse(pipe, target):
    def image(**options):
        with apply_dqar(pipe, DQARConfig(**{**COARSE, "reuse_target": target, **options})):
            return draw(pipe).double()

    exact = image(quantize_bits=16)
    errors = [(image(cache=CacheFormat(keep_channels=kept)) - exact).norm().item() for kept in (0, 8, 16)]
    assert errors[1] < 0.9 * errors[0]
    assert errors[2] < 0.01 * errors[0]  # all of them: half precision is all that is lost


def test_balancing_brings_the_image_closer_where_keys_have_outliers(pipe):
    for block in pipe.transformer.transformer_blocks:
        for module, factor in ((block.attn1.to_q, 1 / 64), (block.attn1.to_k, 64)):  # which leaves Q·Kᵀ as it was
            for parameter in module.parameters():
                parameter.data[3::8] *= factor

    def image(**options):
        with apply_dqar(pipe, DQARConfig(**{**COARSE, **options})):
            return draw(pipe).double()

    exact = image(quantize_bits=16)
    errors = [(image(balance=balance) - exact).norm().item() for balance in (False, True)]
    assert errors[1] < 0.5 * errors[0]


def test_keys_and_values_are_balanced_against_queries_and_the_next_weights(pipe):
    projected, attn = {"q": [], "k": [], "v": []}, pipe.transformer.transformer_blocks[1].attn1
    for name, module in {"q": attn.to_q, "k": attn.to_k, "v": attn.to_v}.items():
        module.register_forward_hook(lambda _m, _a, out, name=name: projected[name].append(out.double()))
    with apply_dqar(pipe, DQARConfig(**COARSE, balance=True)) as session:
        entries = entries_of(pipe, session)
        draw(pipe, steps=2)
        peaks = {name: outputs[0].abs().amax(1) for name, outputs in projected.items()}
        weights = attn.to_out[0].weight.detach().double().abs().amax(0)
        for branch, half in (("cond", slice(0, 2)), ("uncond", slice(2, 4))):
            entry = entries[1, branch]
            key, value = peaks["k"][half] / peaks["q"][half], peaks["v"][half] / weights
            torch.testing.assert_close(entry.k.balance.double()[:, 0], key.sqrt(), rtol=1e-5, atol=0)
            torch.testing.assert_close(entry.v.balance.double()[:, 0], value.sqrt(), rtol=1e-5, atol=0)


def test_fitted_levels_of_keys_and_values_keep_their_products(pipe):
    attn, found = pipe.transformer.transformer_blocks[1].attn1, {}
    for name, module in {"q": attn.to_q, "k": attn.to_k, "v": attn.to_v}.items():
        module.register_forward_hook(lambda _m, _a, out, name=name: found.setdefault(name, out))
    with apply_dqar(pipe, DQARConfig(**COARSE, cache=CacheFormat(fitted=True))) as session:
        entries = entries_of(pipe, session)
        draw(pipe, steps=2)
        query, key = (found[name].unflatten(-1, (attn.heads, -1)).transpose(1, 2).double() for name in "qk")
        factors = {"k": query, "v": (query @ key.mT / math.sqrt(query.shape[-1])).softmax(-1)}
        options = {"batch_dims": 1, "fitted": True, "scale_dtype": torch.float16}
        for branch, half in (("cond", slice(0, 2)), ("uncond", slice(2, 4))):
            for name, factor in factors.items():
                x, kept = found[name][half], entries[1, branch].part(name)
                of_product, nearest = (
                    quantize(x, 4, "per_tensor", factor=own, over_tokens=name == "v", **options)
                    for own in (factor[half], None)
                )
                assert (kept.dequantize() == of_product.dequantize()).double().mean() > 0.99
                assert not torch.equal(kept.dequantize(), nearest.dequantize()) and kept.nbytes == nearest.nbytes


@pytest.mark.parametrize(
    "options, extras",
    [
        ({"reuse_target": "output"}, {"fitted": True}),
        ({"reuse_target": "block", "schedule": "static"}, {"forecast_order": 2}),
        ({"reuse_target": "residual"}, {"keep_channels": 2}),
        ({"reuse_target": "kv"}, {"fitted": True}),
        ({"reuse_target": "kv", "mixed_precision": True, "balance": True, "quantize_mode": "per_tensor"}, {}),
    ],
)
def test_the_same_bits_in_every_layer_are_uniform_bits(pipe, options, extras):
    drawn, traces = [], []
    mixed = {"quantize_bits": 8, "cache": CacheFormat(**extras, layer_bits=(4, 4, 4, 4))}
    for bits in ({"quantize_bits": 4, "cache": CacheFormat(**extras)}, mixed):
        with apply_dqar(pipe, DQARConfig(**{**OPEN, **options, **bits})) as session:
            drawn.append(draw(pipe))
        traces.append(session.trace.to_pandas())
    assert torch.equal(*drawn)
    pandas.testing.assert_frame_equal(*traces)


@pytest.mark.parametrize("target", ["kv", "output"])
def test_each_layer_reuses_what_its_own_bits_leave(target):
    """Against hooks that quantize what the modules returned, layer by layer."""
    widths = (2, 16, 8, 4)
    config = {**OPEN, "schedule": "static", "reuse_target": target}
    pipe = embedded_pipeline()
    with apply_dqar(pipe, DQARConfig(**config, cache=CacheFormat(layer_bits=widths))) as session:
        got = draw(pipe)
    for layer, block in enumerate(pipe.transformer.transformer_blocks):
        for module in (block.attn1.to_k, block.attn1.to_v) if target == "kv" else (block.attn1,):
            module.register_forward_hook(every_second(widths[layer]))
    torch.testing.assert_close(got, draw(pipe), rtol=1e-5, atol=1e-5)
    table = session.trace.to_pandas()
    sizes = table[table.step == 7].groupby("layer").bytes.sum()
    assert sizes[1] > sizes[2] > sizes[3] > sizes[0] > 0


def every_second(bits):
    """A hook that returns at every second step what the step before did, in so many bits."""
    kept, steps = [], iter(range(1000))

    def hook(_module, _args, output):
        if next(steps) % 2:
            return kept.pop()
        kept.append(output if bits == 16 else quantize(output, bits, "per_channel", batch_dims=1).dequantize())
        return output

    return hook


@pytest.mark.parametrize("widths", [(), (8,), (8, 8, 8, 8, 4)])
def test_bits_of_another_number_of_layers_are_refused_before_the_first_image(pipe, widths):
    before = state(pipe)
    with pytest.raises(ValueError) as error:
        apply_dqar(pipe, DQARConfig(cache=CacheFormat(layer_bits=widths)))
    number = f"the model has 4 layers, these are {len(widths)}"
    assert str(error.value) == f"cache.layer_bits={widths} is not accepted: {number}" and state(pipe) == before


@pytest.mark.parametrize(
    "options",
    [
        {**COARSE, "cache": CacheFormat(fitted=True), "share_below": math.inf, "probe": Probe(interval=3)},
        {"plan": ReusePlan({(2, 0, "cond"), (3, 2, "uncond")}, 4, 8), "cache": CacheFormat(fitted=True)},
        {**COARSE, "balance": True, "cache": CacheFormat(keep_channels=2)},
        {**COARSE, "balance": True, "share_below": math.inf, "probe": Probe(interval=3)},
        {**COARSE, "reuse_target": "output", "cache": CacheFormat(keep_channels=2), "share_below": math.inf},
        {"plan": ReusePlan({(2, 0, "cond"), (3, 2, "uncond")}, 4, 8), "balance": True},
    ],
)
def test_every_new_option_is_repeatable_traced_and_taken_off(pipe, options):
    plain, before = draw(pipe), state(pipe)
    with apply_dqar(pipe, DQARConfig(**options)) as session:
        entries = entries_of(pipe, session)
        first = draw(pipe)
        table = session.trace.to_pandas()
        cached = {entry.layer_id: 0 for entry in entries.values()}
        for entry in entries.values():
            cached[entry.layer_id] += entry.nbytes
        last = table[(table.step == 7) & (table.decision == "reuse")]
        assert last.groupby("layer").bytes.sum().to_dict() == ({} if "plan" in options else cached)
        second = draw(pipe)
    assert torch.equal(first, second) and not torch.equal(first, plain)
    assert table.groupby(["step", "layer", "branch"]).size().eq(1).all() and len(table) == 8 * 4 * 2
    assert state(pipe) == before and torch.equal(draw(pipe), plain)


@pytest.mark.parametrize("weight", ["attn1.to_q", "attn1.to_k", "attn1.to_v", "attn1.to_out.0"])
@pytest.mark.parametrize(
    "options", [{"balance": True, "cache": CacheFormat(keep_channels=2)}, {"cache": CacheFormat(fitted=True)}]
)
def test_nan_weights_are_named_whatever_weighs_what_is_cached(pipe, weight, options):
    with apply_dqar(pipe, DQARConfig(**COARSE, **options)):
        pipe.transformer.transformer_blocks[1].get_submodule(weight).weight.data[0, 0] = math.nan
        with pytest.raises(FloatingPointError, match="NaN or inf at step 0, first in layer 1"):
            draw(pipe)
