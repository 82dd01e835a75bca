import ast
import functools
import importlib.util
import inspect
import itertools
import math
import sys
from pathlib import Path

import pytest
import torch
from diffusers import DPMSolverMultistepScheduler
from diffusers.hooks import (
    FasterCacheConfig,
    FirstBlockCacheConfig,
    MagCacheConfig,
    PyramidAttentionBroadcastConfig,
    SeaCacheConfig,
    TaylorSeerCacheConfig,
    TextKVCacheConfig,
    apply_faster_cache,
    apply_first_block_cache,
    apply_mag_cache,
    apply_pyramid_attention_broadcast,
    apply_sea_cache,
    apply_taylorseer_cache,
    apply_text_kv_cache,
)
from helpers import draw, embedded_pipeline, make_dit
from plain import of_second_order, reference

from dqar import apply_dqar
from dqar.measure.metrics import count_macs
from dqar.peers import diffusers_caches, registry, shared
from dqar.peers.registry import ALL_RIVALS, RIVALS, Peer
from dqar.peers.smoothcache import ChangeMeter, smoothcache_schedule

STEPS = 12
CALIBRATED = ("DBCache + TaylorSeer", "DBCache + DMD", "DBCache + FoCa")
PACKAGES = {"DBCache": "cache_dit", **dict.fromkeys(CALIBRATED, "cache_dit"), "SmoothCache": "SmoothCache"}
DBCACHE = {"Fn_compute_blocks": 1, "residual_diff_threshold": 1.0, "max_warmup_steps": 4}
# What a random model of 4 blocks needs for anything to be reused; the others' defaults do.
SETTINGS = {
    "First-Block-Cache": {"threshold": 1.0},
    "MagCache": {"threshold": 1.0, "calibration_images": 2},
    "DBCache": {**DBCACHE, "max_continuous_cached_steps": 2},
    **dict.fromkeys(CALIBRATED, {**DBCACHE, "max_continuous_cached_steps": 2}),
    "SmoothCache": {"threshold": 0.9, "calibration_images": 2},
    "L2P": {"calibration_images": 2},
    "Spectrum": {"first": 3},
    "LeMiCa": {"longest": 4, "calibration_images": 1},
    "BudCache": {"annealing": 10, "climbing": 5, "calibration_images": 1},
}


def peer(name, **settings):
    if name in PACKAGES:
        pytest.importorskip(PACKAGES[name])
    return Peer(name, tuple({**SETTINGS.get(name, {}), **settings}.items()))


def run(pipe, method, steps=STEPS, **options):
    with method.attach(pipe, steps):
        return draw(pipe, steps=steps, **options)


def macs_of(call):
    result = []
    return count_macs(lambda: result.append(call())), result[0]


def small_dit():
    return make_dit(scheduler=DPMSolverMultistepScheduler(timestep_spacing="leading"))


@functools.cache
def untouched_run(make=embedded_pipeline, guidance=3.0):
    """MACs and images of a run without any cache."""
    pipe = make()
    return macs_of(lambda: draw(pipe, steps=STEPS, guidance=guidance))


def attributes(pipe):
    """Everything that an adapter could leave behind on modules, scheduler and pipeline."""
    modules = {name: (set(vars(module)), dict(module._modules)) for name, module in pipe.transformer.named_modules()}
    hooks = {name: len(module._forward_pre_hooks) for name, module in pipe.transformer.named_modules()}
    return modules, hooks, set(vars(pipe.scheduler)), set(vars(pipe)), set(vars(type(pipe)))


@pytest.mark.filterwarnings("ignore:torch.meshgrid")
@pytest.mark.parametrize("name", RIVALS)
def test_saves_macs_repeats_and_leaves_no_trace(name):
    method, pipe = peer(name), embedded_pipeline()
    full, untouched = untouched_run()
    draw(pipe, steps=STEPS)  # which sets some of the scheduler's attributes
    before = attributes(pipe)
    with method.attach(pipe, STEPS):
        saved, first = macs_of(lambda: draw(pipe, steps=STEPS))
        other = draw(pipe, labels=(3,), seed=5, steps=STEPS)
        second = draw(pipe, steps=STEPS)
    assert saved < 0.9 * full
    assert not torch.equal(first, untouched) and first.isfinite().all()
    torch.testing.assert_close(first, untouched, rtol=0, atol=0.5 * untouched.abs().max().item())
    assert torch.equal(first, second)
    assert torch.equal(other, run(embedded_pipeline(), method, labels=(3,), seed=5))
    assert attributes(pipe) == before
    assert torch.equal(draw(pipe, steps=STEPS), untouched)


@pytest.mark.parametrize("name", RIVALS)
def test_a_run_that_was_cut_short_leaves_nothing_to_the_next_one(name):
    method, pipe = peer(name), embedded_pipeline()
    expected = run(pipe, method)

    def fail(_module, _args, kwargs):
        if kwargs["timestep"][0] < 500:
            raise KeyboardInterrupt

    with method.attach(pipe, STEPS):
        handle = pipe.transformer.register_forward_pre_hook(fail, with_kwargs=True)
        with pytest.raises(KeyboardInterrupt):
            draw(pipe, labels=(7, 8, 9), seed=3, steps=STEPS)
        handle.remove()
        assert torch.equal(draw(pipe, steps=STEPS), expected)


@pytest.mark.parametrize("name", RIVALS)
def test_on_a_dit_pipeline_with_dpm_solver(name):
    pipe, (full, untouched) = small_dit(), untouched_run(small_dit)
    with peer(name).attach(pipe, STEPS):
        saved, reused = macs_of(lambda: draw(pipe, steps=STEPS))
    assert saved < full and not torch.equal(reused, untouched)
    assert torch.equal(draw(pipe, steps=STEPS), untouched)


@pytest.mark.parametrize("name", [name for name in RIVALS if name != "FasterCache"])
def test_without_guidance(name):
    pipe, (full, untouched) = embedded_pipeline(), untouched_run(guidance=1.0)
    with peer(name).attach(pipe, STEPS):
        saved, reused = macs_of(lambda: draw(pipe, steps=STEPS, guidance=1.0))
    assert saved < full and not torch.equal(reused, untouched)


def test_faster_cache_needs_guidance(pipe):
    with pytest.raises(ValueError, match="needs guidance"):
        run(pipe, peer("FasterCache"), guidance=1.0)
    assert draw(pipe).isfinite().all()


def test_faster_cache_leaves_out_the_unconditional_half(pipe):
    labels = []
    embedder = pipe.transformer.transformer_blocks[0].norm1.emb.class_embedder
    embedder.register_forward_pre_hook(lambda _module, args: labels.append(args[0].tolist()))
    run(pipe, peer("FasterCache"))
    assert [1, 2] in labels and [10, 10] not in labels


# --- against references ----------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("from_end", [False, True])
def test_static_interval_against_plain_python(from_end):
    kept, computed = {}, set()

    def forecast(site, step, compute):
        counted = STEPS - 1 - step if from_end else step
        if step == 0 or counted % 5 == 0:
            computed.add(step)
            kept[site] = compute()
        return kept[site]

    pipe = embedded_pipeline()
    pipe.transformer.double()
    drawn = run(pipe, Peer("static interval", (("interval", 5), ("from_end", from_end))))
    torch.testing.assert_close(drawn, reference(pipe, forecast), rtol=1e-9, atol=1e-9)
    assert computed == ({0, 1, 6, 11} if from_end else {0, 5, 10})


@torch.no_grad()
def test_taylorseer_against_plain_python():
    pipe = embedded_pipeline()
    pipe.transformer.double()
    drawn = run(pipe, Peer("TaylorSeer", (("interval", 3), ("order", 2), ("first_enhance", 2))))
    forecast = of_second_order(lambda x: x, lambda x: x**2 / 2)
    torch.testing.assert_close(drawn, reference(pipe, forecast), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("interval", [2, 3, 5])
def test_taylorseer_of_order_0_is_the_static_interval(pipe, interval):
    static = run(pipe, Peer("static interval", (("interval", interval),)))
    taylor = run(pipe, Peer("TaylorSeer", (("interval", interval), ("order", 0), ("first_enhance", 1))))
    assert torch.equal(static, taylor)


def test_interval_1_computes_everything(pipe):
    untouched = draw(pipe, steps=STEPS)
    for name in ("static interval", "TaylorSeer", "TaylorSeer, diffusers", "HiCache"):
        assert torch.equal(run(pipe, Peer(name, (("interval", 1),))), untouched)


def test_diffusers_taylorseer_has_the_published_formula_on_its_own_schedule(pipe):
    """Warm-up 3 and interval 2 give both the same schedule: steps 0, 1, 2, then every second one."""
    pipe.transformer.double()
    published = run(pipe, Peer("TaylorSeer", (("interval", 2), ("order", 1), ("first_enhance", 3))))
    theirs = run(pipe, Peer("TaylorSeer, diffusers", (("interval", 2), ("order", 1), ("warmup", 3))))
    torch.testing.assert_close(theirs, published, rtol=1e-9, atol=1e-9)


def test_smoothcache_schedule():
    # From step 0, two steps may be skipped; from 3, one; from 5, none; 6 and 7 remain.
    changes = [[0.1, 0.9, 0.9, 0.1, 0.9, 0.9, 0.9], [0.2, 0.9, 0.9, 0.9, 0.9, 0.9]]
    assert smoothcache_schedule(changes, 0.3, 8) == [1, 0, 0, 1, 0, 1, 1, 1]
    assert smoothcache_schedule(changes, 0.0, 8) == [1] * 8
    # The last step is computed whatever its change.
    assert smoothcache_schedule([[0.0] * 7, [0.0] * 6], 0.3, 8) == [1, 0, 0, 1, 0, 0, 1, 1]


def test_smoothcache_measures_the_relative_l1_change():
    outputs = iter(torch.tensor([[1.0, 1.0], [2.0, 2.0], [2.0, 4.0]]))
    module = torch.nn.Identity()
    module.forward = lambda: next(outputs)
    meter = ChangeMeter(module, 2)
    for _ in range(3):
        module()
    assert meter.changes == [[pytest.approx(2 / 4), pytest.approx(2 / 6)], [pytest.approx(4 / 6)]]


def test_calibration_is_done_once_per_model_and_sampler(pipe):
    calls = []
    pipe.transformer.register_forward_hook(lambda *_: calls.append(1))
    for threshold in (0.5, 1.0):
        with peer("MagCache", threshold=threshold).attach(pipe, STEPS):
            pass
    assert len(calls) == STEPS


def test_flow_sigma_has_the_signal_to_noise_ratio_of_the_step(pipe):
    for timestep in (0, 500, 999):
        sigma = diffusers_caches.flow_sigma(pipe.scheduler, timestep)
        alpha_bar = float(pipe.scheduler.alphas_cumprod[timestep])
        assert ((1 - sigma) / sigma) ** 2 == pytest.approx(alpha_bar / (1 - alpha_bar), rel=1e-4)


# --- settings --------------------------------------------------------------------------------------------------------


def test_unknown_names_and_settings():
    pipe = embedded_pipeline()
    with pytest.raises(ValueError, match="'TeaCache' is unknown: choose one of static interval"):
        Peer("TeaCache").attach(pipe, STEPS)
    for name in RIVALS:
        with pytest.raises(ValueError, match="setting 'depth' of .* is unknown: choose from"):
            Peer(name, (("depth", 3),)).attach(pipe, STEPS)
    for name in ALL_RIVALS.keys() - RIVALS.keys():
        with pytest.raises(ValueError, match="can't run on DiT") as error:
            Peer(name).attach(pipe, STEPS)
        assert ALL_RIVALS[name].unusable in str(error.value)


@pytest.mark.parametrize(
    "name, setting, value",
    [
        ("static interval", "interval", 0),
        ("TaylorSeer", "order", -1),
        ("TaylorSeer", "first_enhance", 0),
        ("TaylorSeer, diffusers", "interval", "3"),
        ("TaylorSeer-Lite, diffusers", "warmup", 0),
        ("PAB", "skip_range", 0),
        ("First-Block-Cache", "threshold", -0.1),
        ("MagCache", "retention_ratio", 2),
        ("SeaCache", "residual_order", 2),
        ("FasterCache", "uncond_skip_range", 0),
        ("DBCache", "Fn_compute_blocks", 5),
        ("DBCache + TaylorSeer", "taylorseer_order", 0),
        ("DBCache + DMD", "dmd_history", 3),
        ("DBCache + FoCa", "max_warmup_steps", -1),
        ("DBCache", "calibrator", "Heun"),
        ("SmoothCache", "components", ("attn",)),
        ("L2P", "speedup", 0.5),
        ("Spectrum", "ridge", 0.0),
        ("HiCache", "contraction", 0.0),
        ("LeMiCa", "longest", 0),
        ("BudCache", "annealing", 0),
    ],
)
def test_settings_out_of_range(pipe, name, setting, value):
    untouched = draw(pipe)
    with pytest.raises(ValueError, match=setting), peer(name, **{setting: value}).attach(pipe, STEPS):
        pass
    assert torch.equal(draw(pipe), untouched)


@pytest.mark.parametrize("rival", RIVALS.values(), ids=RIVALS)
def test_a_sweep_is_of_settings_that_the_rival_takes(rival):
    assert 0 < len(rival.sweep) <= 14 and len({tuple(settings.items()) for settings in rival.sweep}) == len(rival.sweep)
    hash(Peer(rival.name, tuple(rival.sweep[0].items())))
    calibrated = {"guidance_scale": 2.0} if rival.calibration_images else {}
    for settings in rival.sweep:
        inspect.signature(rival.adapter).bind(None, STEPS, **settings, **calibrated)


def test_another_number_of_steps(pipe):
    with Peer("static interval").attach(pipe, STEPS), pytest.raises(ValueError, match="8 steps, but attached for 12"):
        draw(pipe, steps=8)


def test_one_thing_at_a_time(pipe):
    untouched = draw(pipe, steps=STEPS)
    with (
        Peer("static interval").attach(pipe, STEPS),
        pytest.raises(ValueError, match="take them off first"),
        Peer("PAB").attach(pipe, STEPS),
    ):
        pass
    with (
        apply_dqar(pipe),
        pytest.raises(ValueError, match="take them off first"),
        Peer("PAB").attach(pipe, STEPS),
    ):
        pass
    assert torch.equal(draw(pipe, steps=STEPS), untouched)


@pytest.mark.parametrize("name", PACKAGES)
def test_a_package_that_is_missing(pipe, name, monkeypatch):
    monkeypatch.setitem(sys.modules, PACKAGES[name], None)
    settings = tuple(SETTINGS[name].items())
    with (
        pytest.raises(ImportError, match=r"needs .*cache.*: pip install -e \.\[peers\]"),
        Peer(name, settings).attach(pipe, STEPS),
    ):
        pass
    assert draw(pipe).isfinite().all()


def test_packages_say_nothing(pipe, capsys):
    for name in PACKAGES:
        run(pipe, peer(name))
    assert capsys.readouterr() == ("", "")


def test_nothing_optional_is_loaded_before_it_is_needed():
    for path in Path(registry.__file__).parent.glob("*.py"):
        for node in ast.parse(path.read_text()).body:
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) else []
            assert not {name.split(".")[0] for name in names} & {"cache_dit", "SmoothCache"}, path


# --- what the docstrings say of the methods as they come -------------------------------------------------------------


def does_nothing(pipe, apply):
    """Whether a cache that is applied leaves the images and MACs of a run as they are."""
    full, untouched = untouched_run()
    apply(pipe.transformer)
    macs, images = macs_of(lambda: draw(pipe, steps=STEPS))
    return macs == full and torch.equal(images, untouched)


def test_unusable_taylorseer_as_it_comes_matches_nothing(pipe):
    assert ALL_RIVALS["TaylorSeer, diffusers' defaults"].unusable
    assert does_nothing(pipe, lambda model: apply_taylorseer_cache(model, TaylorSeerCacheConfig()))


def test_unusable_text_kv_cache_matches_nothing(pipe):
    assert ALL_RIVALS["Text KV cache"].unusable
    assert does_nothing(pipe, lambda model: apply_text_kv_cache(model, TextKVCacheConfig()))


def test_unusable_dbprune_raises(pipe):
    cache_dit = pytest.importorskip("cache_dit")
    assert ALL_RIVALS["DBPrune"].unusable
    config = cache_dit.DBPruneConfig(Fn_compute_blocks=1, max_warmup_steps=2, residual_diff_threshold=1.0)
    with shared.quiet("CACHE_DIT"):
        cache_dit.enable_cache(pipe.transformer, cache_config=config)
        with pytest.raises(TypeError, match="_process_block_outputs"):
            draw(pipe)


def test_sea_cache_as_it_comes_computes_everything(pipe):
    assert does_nothing(pipe, lambda model: apply_sea_cache(model, SeaCacheConfig()))


@pytest.mark.parametrize(
    "apply",
    [
        lambda model: apply_first_block_cache(model, FirstBlockCacheConfig()),
        lambda model: apply_taylorseer_cache(
            model, TaylorSeerCacheConfig(cache_identifiers=[r"transformer_blocks\.\d+\.attn1"])
        ),
    ],
    ids=["First-Block-Cache", "TaylorSeer"],
)
def test_as_they_come_they_lack_a_cache_context(pipe, apply):
    apply(pipe.transformer)
    with pytest.raises(ValueError, match="No cache context is set"):
        draw(pipe)


def test_faster_cache_as_it_comes_halves_all_inputs_but_the_labels(pipe):
    config = FasterCacheConfig(tensor_format="BCHW", current_timestep_callback=lambda: 300)
    with shared.quiet("diffusers.hooks.faster_cache"):
        apply_faster_cache(pipe.transformer, config)
    with pytest.raises(RuntimeError, match="must match the size"):
        draw(pipe)


def test_pab_as_it_comes_keeps_what_the_run_before_left(pipe):
    config = PyramidAttentionBroadcastConfig(
        spatial_attention_block_skip_range=3, current_timestep_callback=lambda: 300
    )
    apply_pyramid_attention_broadcast(pipe.transformer, config)
    assert not torch.equal(draw(pipe), draw(pipe))


def test_mag_cache_as_it_comes_needs_ratios(pipe):
    with pytest.raises(ValueError, match="mag_ratios"):
        apply_mag_cache(pipe.transformer, MagCacheConfig())


def test_cache_dit_as_it_comes_fails_on_dit(pipe):
    cache_dit = pytest.importorskip("cache_dit")
    with shared.quiet("CACHE_DIT"):
        with pytest.raises(ValueError, match="EmbeddedDiTPipeline is not officially supported"):
            cache_dit.enable_cache(pipe, cache_config=cache_dit.DBCacheConfig())
        adapter = cache_dit.BlockAdapter(
            transformer=pipe.transformer,
            blocks=pipe.transformer.transformer_blocks,
            forward_pattern=cache_dit.ForwardPattern.Pattern_3,
        )
        cache_dit.enable_cache(adapter, cache_config=cache_dit.DBCacheConfig(Fn_compute_blocks=1))
        with pytest.raises(AttributeError, match="norm1"):
            draw(pipe)


def test_smoothcache_comes_without_its_calibration():
    pytest.importorskip("SmoothCache")
    assert importlib.util.find_spec("SmoothCache.calibration") is None


def test_dbcache_forecasts_with_each_calibrator(pipe):
    # Exponentials take four residuals at even distances: steps 3, 5, 7, 9, and the last is forecast.
    even = {"max_continuous_cached_steps": 1, "residual_diff_threshold": 10.0}
    methods = [peer("DBCache", **even), *(peer(name, **even) for name in CALIBRATED)]
    methods.append(peer("DBCache + TaylorSeer", **even, taylorseer_order=2))
    drawn = [run(pipe, method) for method in methods]
    assert all(math.isfinite(images.norm()) for images in drawn)
    for one, other in itertools.combinations(drawn, 2):
        assert not torch.equal(one, other)


@pytest.mark.parametrize("name", CALIBRATED)
def test_dbcache_that_reuses_nothing_draws_bit_identical_images(pipe, name):
    untouched = draw(pipe, steps=STEPS)
    assert torch.equal(run(pipe, peer(name, residual_diff_threshold=0.0)), untouched)


def residual_forecasts(config, values, computed):
    """What a calibrator of cache-dit makes of a scalar residual that is computed at some steps only."""
    from cache_dit.caching.cache_contexts.calibrators import Calibrator

    calibrator, forecasts = Calibrator(config), {}
    for step, value in enumerate(values):
        calibrator.mark_step_begin()
        if step in computed:
            calibrator.update(torch.full((1, 3), value, dtype=torch.float64))
        else:
            forecasts[step] = calibrator.approximate()[0, 0].item()
    return forecasts


def test_the_dmd_calibrator_continues_exponentials():
    cache_dit = pytest.importorskip("cache_dit")
    values = [3.0 * 0.8**step for step in range(12)]
    forecasts = residual_forecasts(cache_dit.DMDCalibratorConfig(), values, {0, 2, 4, 6, 8})
    assert [forecasts[step] for step in (7, 9, 10, 11)] == pytest.approx([values[s] for s in (7, 9, 10, 11)], rel=1e-4)


def test_the_foca_calibrator_goes_too_far_where_computed_steps_are_apart():
    cache_dit = pytest.importorskip("cache_dit")
    line = [float(step) for step in range(8)]
    near = residual_forecasts(cache_dit.FoCaCalibratorConfig(), line, {0, 1, 2, 3})
    apart = residual_forecasts(cache_dit.FoCaCalibratorConfig(), line, {0, 2, 4, 6})
    assert near[4] == 4.0 and apart[3] == 4.0 and apart[7] == 7.5
