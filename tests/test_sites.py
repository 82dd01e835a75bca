"""Sites of attention and feed-forward, and forecasts of them from a cached history."""

import gc
import itertools
import math
import weakref

import pytest
import torch
from diffusers.hooks import HookRegistry, ModelHook
from helpers import draw, draw_text, embedded_pipeline, entries_of, sites_of, state
from situations import OPEN
from torch.utils._python_dispatch import TorchDispatchMode

from dqar import CacheFormat, DQARConfig, DQARController, Probe, ReusePlan, apply_dqar, remove_dqar
from dqar.cache import QuantizedCache, recall
from dqar.measure import metrics
from dqar.models.pipelines import make_scheduler
from dqar.models.profiles import SCHEDULERS
from dqar.plan import lagrange_weights

BLOCK = {**OPEN, "reuse_target": "block"}
LINE, PARABOLA = ({"cache": CacheFormat(forecast_order=order)} for order in (1, 2))
STATIC = {**BLOCK, "schedule": "static"}
CLOSED = {
    "by schedule, looking": {"schedule": "none", "probe": Probe(record=True)},
    "by entropy": {"entropy_threshold": 0, "schedule": "all"},
    "by snr": {**OPEN, "snr_range": (1e9, 1e9)},
    "by warmup": {**OPEN, "warmup": 1000},
    "by cooldown": {**OPEN, "cooldown": 1000},
    "by warmup and cooldown": {**OPEN, "warmup": 3, "cooldown": 5},
    "by an empty plan": {"plan": ReusePlan((), 4, 8)},
    "by branches too different to share": {"schedule": "none", "share_below": 1e-12},
}
UNEVEN = {(step, layer, "cond") for step in (1, 4, 6, 7) for layer in (0, 2)} | {
    (step, layer, "uncond") for step in (2, 5, 6) for layer in (1, 2, 3)
}
"""Step, layer and branch of sites that leave histories with gaps."""


def parts(block, target):
    return {"output": (block.attn1,), "block": (block.attn1, block.ff), "residual": (block,)}[target]


class Naive:
    """Forward hooks that put a polynomial, solved for in float64, in the place of what the modules computed."""

    def __init__(self, transformer, sites, target, order, branches=("cond", "uncond")):
        self.sites, self.order, self.branches = sites, order, branches
        for layer, block in enumerate(transformer.transformer_blocks):
            for module in parts(block, target):
                module.register_forward_hook(self.hook(layer, target == "residual"))

    def hook(self, layer, whole):
        computed = {branch: [] for branch in self.branches}
        steps = iter(range(1000))

        def replace(_module, args, output):
            base = args[0] if whole else 0
            step, halves = next(steps), list((output - base).chunk(2))
            for i, branch in enumerate(self.branches):
                if (step, layer, branch) in self.sites:
                    halves[i] = self.polynomial(computed[branch][-self.order - 1 :], step).to(output.dtype)
                else:
                    computed[branch].append((step, halves[i].double()))
            return torch.cat(halves) + base

        return replace

    @staticmethod
    def polynomial(computed, step):
        powers = torch.arange(len(computed))
        steps = torch.tensor([float(step) for step, _ in computed], dtype=torch.float64)
        values = torch.stack([value for _, value in computed])
        coefficients = torch.linalg.solve(steps[:, None] ** powers, values.flatten(1))
        weights = torch.tensor(float(step), dtype=torch.float64) ** powers
        return (weights @ coefficients.to(weights)).view_as(values[0])


# --- whole runs ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("labels, guidance", [((1, 2, 3), 3.0), ((4,), 1.0)])
@pytest.mark.parametrize("gate", CLOSED)
@pytest.mark.parametrize("target, order", [("block", 2), ("residual", 0)])
def test_closed_gate_is_bit_identical(pipe, labels, guidance, gate, order, target):
    expected = draw(pipe, labels, guidance=guidance)
    with apply_dqar(
        pipe, DQARConfig(**CLOSED[gate], reuse_target=target, cache=CacheFormat(forecast_order=order))
    ) as session:
        assert torch.equal(draw(pipe, labels, guidance=guidance), expected)
    table = session.trace.to_pandas()
    assert set(table.decision) == {"compute"} and len(table) == 4 * 8 * (2 if guidance > 1 else 1)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(pipe, dtype):
    pipe.transformer.to(dtype)
    expected = draw(pipe)
    with apply_dqar(pipe, DQARConfig(schedule="none", reuse_target="block")):
        assert torch.equal(draw(pipe), expected)
    for bits in (16, 8):
        with apply_dqar(pipe, DQARConfig(**STATIC, cache=CacheFormat(forecast_order=1), quantize_bits=bits)):
            got = draw(pipe)
        assert got.dtype == expected.dtype and got.isfinite().all() and not torch.equal(got, expected)


@pytest.mark.parametrize("order", [0, 1, 2])
@pytest.mark.parametrize("target", ["output", "block", "residual"])
@pytest.mark.parametrize("how", ["plan", "every third step", "streaks"])
def test_reuse_equals_a_naive_one(target, order, how):
    """In float64, with an unquantized cache."""
    config = {
        "plan": {"plan": ReusePlan(UNEVEN, 4, 10)},
        "every third step": {**OPEN, "schedule": "static", "static_interval": 3, "warmup": 2, "cooldown": 2},
        "streaks": {**OPEN, "schedule": "depth_aware", "max_reuse_streak": 2},
    }[how]
    pipe = embedded_pipeline()
    pipe.transformer.to(torch.float64)
    plain = draw(pipe, steps=10)
    with apply_dqar(
        pipe, DQARConfig(**config, reuse_target=target, cache=CacheFormat(forecast_order=order), quantize_bits=16)
    ) as session:
        got, again = draw(pipe, steps=10), draw(pipe, steps=10)
    assert torch.equal(got, again) and not torch.equal(got, plain)
    sites = sites_of(session.trace.to_pandas())
    assert sites == UNEVEN if how == "plan" else len(sites) > 8
    Naive(pipe.transformer, sites, target, order)
    torch.testing.assert_close(got, draw(pipe, steps=10), rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_quantized_forecasts_stay_close(scheduler):
    pipe = embedded_pipeline()
    pipe.scheduler = make_scheduler(scheduler, pipe.scheduler)

    def image(bits):
        with apply_dqar(pipe, DQARConfig(**STATIC, cache=CacheFormat(forecast_order=1), quantize_bits=bits)):
            return draw(pipe).double()

    exact, plain = image(16), draw(pipe).double()
    errors = [(image(bits) - exact).norm() / (exact - plain).norm() for bits in (8, 4)]
    assert 0 < errors[0] < 0.2 * errors[1]


@pytest.mark.parametrize(
    "one, other",
    [
        ({}, {"reuse_target": "output"}),
        ({}, {"reuse_target": "kv"}),
        ({}, {"reuse_target": "residual"}),
        ({"reuse_target": "residual"}, {"reuse_target": "residual", **LINE}),
        ({}, LINE),
        (LINE, PARABOLA),
        (LINE, {**LINE, "reuse_target": "output"}),
        ({**LINE, "quantize_bits": 8}, {**LINE, "quantize_bits": 4}),
        ({**LINE, "quantize_mode": "per_tensor"}, LINE),
        ({"quantize_bits": 16}, {"quantize_bits": 8}),
        ({"cooldown": 0}, {"cooldown": 1}),
        ({"cooldown": 4}, {"cooldown": 1}),
        ({"cooldown": 4}, {"warmup": 4}),
    ],
)
def test_configurations_that_must_differ_do(pipe, one, other):
    images = []
    for options in (one, other):
        with apply_dqar(pipe, DQARConfig(**{**STATIC, "max_reuse_streak": 1, **options})):
            images.append(draw(pipe))
    assert not torch.equal(*images)


def test_whole_blocks_come_off_again(pipe):
    before, expected = state(pipe), draw(pipe)
    x = torch.randn(4, 16, 16)
    with apply_dqar(pipe, DQARConfig(**{**STATIC, "reuse_target": "residual"})):
        first = draw(pipe)
        assert torch.equal(draw(pipe), first) and not torch.equal(first, expected)
        attention = pipe.transformer.transformer_blocks[0].attn1  # called by itself, it computes
        assert torch.equal(attention(x), attention.processor(attention, x))
    assert state(pipe) == before and torch.equal(draw(pipe), expected)


@pytest.mark.parametrize("order", [0, 2])
def test_removal_leaves_nothing(pipe, order):
    before, expected = state(pipe), draw(pipe)
    with apply_dqar(pipe, DQARConfig(**STATIC, cache=CacheFormat(forecast_order=order))) as session:
        entries = entries_of(pipe, session)
        draw(pipe)
        cached = [weakref.ref(entry.feed_forward.data) for entry in entries.values()]
        cached += [weakref.ref(past.output.data) for entry in entries.values() for past in entry.history]
        assert len(cached) == 8 * (1 + order) and len(session.controller.cache) == 0
        entries.clear()
        gc.collect()
        assert all(ref() is None for ref in cached)  # at the run's end, before anything is decoded
    assert state(pipe) == before and torch.equal(draw(pipe), expected)
    remove_dqar(pipe)


@pytest.mark.parametrize("order", [0, 1, 2])
def test_what_no_forecast_draws_on_is_freed(pipe, order):
    with apply_dqar(pipe, DQARConfig(**STATIC, cache=CacheFormat(forecast_order=order))) as session:
        newest, alive = [], []

        def look(*_):
            newest.append(weakref.ref(session.controller.cache.get(0, "cond").stored["feed_forward"].data))
            alive[:] = [ref() is not None for ref in newest]

        pipe.transformer.proj_out_2.register_forward_pre_hook(look)
        draw(pipe, steps=10)  # computed at every second step, of which order + 1 are kept
        assert alive == [step // 2 >= 4 - order for step in range(10)]


def test_hooks_of_others_outlive_dqar(pipe):
    class Count(ModelHook):
        calls = 0

        def pre_forward(self, module, *args, **kwargs):
            self.calls += 1
            return args, kwargs

    hook, ff = Count(), pipe.transformer.transformer_blocks[1].ff
    HookRegistry.check_if_exists_or_initialize(ff).register_hook(hook, "count")
    with apply_dqar(pipe, DQARConfig(**STATIC)):
        draw(pipe, steps=4)
    draw(pipe, steps=4)
    assert hook.calls == 2 + 4 and list(ff._diffusers_hook.hooks) == ["count"]


@pytest.mark.parametrize("order", [0, 2])
@pytest.mark.parametrize("change", [{"labels": (5, 6, 7)}, {"labels": (3, 4)}, {"steps": 5}, {"guidance": 1.0}])
def test_nothing_leaks_into_the_next_run(pipe, change, order):
    config = DQARConfig(**STATIC, cache=CacheFormat(forecast_order=order))
    with apply_dqar(pipe, config):
        expected = draw(pipe, **change)
    with apply_dqar(pipe, config):
        first = draw(pipe)
        assert torch.equal(draw(pipe, **change), expected)
        assert torch.equal(draw(pipe), first)


@pytest.mark.parametrize("bits", [16, 4])
def test_an_image_does_not_depend_on_its_batch(pipe, bits):
    with apply_dqar(pipe, DQARConfig(**STATIC, cache=CacheFormat(forecast_order=2), quantize_bits=bits)):
        together, alone = draw(pipe, (1, 2)), draw(pipe, (1,))
    torch.testing.assert_close(together[:1], alone, rtol=1e-3, atol=1e-3)


def test_an_exception_leaves_the_model_usable(pipe):
    plain, config = draw(pipe), DQARConfig(**STATIC, cache=CacheFormat(forecast_order=1))
    with apply_dqar(pipe, config):
        expected = draw(pipe)
        calls = []

        def fail(*_args):
            calls.append(1)
            if len(calls) == 3:
                raise KeyboardInterrupt

        handle = pipe.transformer.transformer_blocks[2].norm3.register_forward_hook(fail)  # between the two
        with pytest.raises(KeyboardInterrupt):
            draw(pipe)
        handle.remove()
        assert torch.equal(draw(pipe), expected)
    assert torch.equal(draw(pipe), plain)


@pytest.mark.parametrize("order", [0, 1])
@pytest.mark.parametrize("target", ["block", "residual"])
def test_shared_sites_share_the_feed_forward(order, target):
    pipe = embedded_pipeline()
    config = DQARConfig(
        schedule="none",
        share_below=math.inf,
        reuse_target=target,
        cache=CacheFormat(forecast_order=order),
        probe=Probe(record=True),
    )
    with apply_dqar(pipe, config) as session:
        got = draw(pipe)
    table = session.trace.to_pandas()
    assert set(table.step[table.decision == "share"]) == {1, 2, 3, 5, 6, 7}
    calls = {}

    def hook(module, args, output):
        step = calls[module] = calls.get(module, -1) + 1
        base = args[0] if target == "residual" else torch.zeros_like(output)
        change = output - base
        return base + torch.cat([change[:2], change[:2]]) if step not in (0, 4) else None

    for block in pipe.transformer.transformer_blocks:
        for module in parts(block, target):
            module.register_forward_hook(hook)
    torch.testing.assert_close(got, draw(pipe), rtol=1e-5, atol=1e-5)


def test_what_was_shared_is_cached_for_its_own_branch(pipe):
    with apply_dqar(
        pipe, DQARConfig(**BLOCK, share_below=math.inf, quantize_bits=16, cache=CacheFormat(forecast_order=1))
    ) as session:
        entries = entries_of(pipe, session)
        draw(pipe)
    cond, uncond = entries[1, "cond"], entries[1, "uncond"]
    assert uncond.step == 4
    for name in ("output", "feed_forward"):
        one, other = getattr(cond, name).data, getattr(uncond, name).data
        assert torch.equal(one, other) and one.data_ptr() != other.data_ptr()
        assert not torch.equal(getattr(cond.history[0], name).data, getattr(uncond.history[0], name).data)
        assert one.untyped_storage().nbytes() == one.nbytes  # not the whole batch's


@pytest.mark.parametrize("order", [0, 1, 2])
def test_a_run_can_be_planned_after_another(pipe, order):
    options = {"reuse_target": "block", "cache": CacheFormat(forecast_order=order)}
    with apply_dqar(pipe, DQARConfig(**{**OPEN, "entropy_threshold": 2.65}, **options, cooldown=1)) as session:
        expected = draw(pipe)
    table = session.trace.to_pandas()
    plan = ReusePlan.from_trace(table, "DDIMScheduler")
    assert plan.sites == sites_of(table) and plan.sites
    with apply_dqar(pipe, DQARConfig(plan=plan, **options)) as session:
        assert torch.equal(draw(pipe), expected)
    assert session.trace.to_pandas().decision.tolist() == table.decision.tolist()


PROJECTIONS = ("attn1.to_q", "attn1.to_k", "attn1.to_v", "ff.net.2")
LAYERS = ("attn1.to_v", "attn1.to_out.0", "ff.net.0.proj", "ff.net.2")
WITH_FEED_FORWARD = (("block", 8, 0), ("block", 16, 1), ("residual", 8, 1), ("residual", 16, 0))


@pytest.mark.parametrize(
    "target, bits, order, weight",
    [
        *itertools.product(("kv", "output"), (8, 16), (0,), PROJECTIONS),
        *((target, bits, order, w) for target, bits, order in WITH_FEED_FORWARD for w in LAYERS),
    ],
)
def test_nan_weights_name_step_and_layer(pipe, target, bits, order, weight):
    plain = draw(pipe, steps=2)
    weights = pipe.transformer.transformer_blocks[1].get_submodule(weight).weight.data
    good = weights[0, 0].item()
    cache = CacheFormat(forecast_order=order)
    with apply_dqar(pipe, DQARConfig(**OPEN, reuse_target=target, quantize_bits=bits, cache=cache)):
        weights[0, 0] = math.nan
        with pytest.raises(FloatingPointError, match="NaN or inf at step 0, first in layer 1"):
            draw(pipe, steps=2)
    weights[0, 0] = good
    assert torch.equal(draw(pipe, steps=2), plain)


def test_a_feed_forward_in_chunks_is_refused(pipe):
    plain, block = draw(pipe), pipe.transformer.transformer_blocks[2]
    block.set_chunk_feed_forward(8, 1)
    with apply_dqar(pipe, DQARConfig(**STATIC)), pytest.raises(ValueError, match="layer 2's feed-forward .* whole"):
        draw(pipe)
    block.set_chunk_feed_forward(None, 0)
    assert torch.equal(draw(pipe), plain)


def test_a_feed_forward_called_by_itself_is_computed(pipe):
    x, ff = torch.randn(2, 16, 16), pipe.transformer.transformer_blocks[0].ff
    expected = ff(x)
    with apply_dqar(pipe, DQARConfig(**STATIC)):
        draw(pipe)
        assert torch.equal(ff(x), expected)


def test_a_block_without_feed_forward_is_refused(pipe):
    pipe.transformer.transformer_blocks[3].ff = torch.nn.Identity()
    with pytest.raises(ValueError, match="layer 3 has no diffusers `ff`"):
        apply_dqar(pipe, DQARConfig(**STATIC))
    assert not hasattr(pipe.transformer, "_diffusers_hook")
    with apply_dqar(pipe, DQARConfig(**OPEN, reuse_target="output")):
        draw(pipe, steps=2)


# --- what it costs ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cooldown, reused_steps, order", [(0, 4, 0), (3, 2, 1)])
@pytest.mark.parametrize("target", ["output", "block", "residual"])
def test_macs_drop_as_by_closed_form(pipe, target, cooldown, reused_steps, order):
    full = metrics.count_macs(lambda: draw(pipe))
    options = {"cooldown": cooldown, "cache": CacheFormat(order, modulations=False)}
    config = DQARConfig(**{**STATIC, "reuse_target": target, **options})
    with apply_dqar(pipe, config):
        got = metrics.count_macs(lambda: draw(pipe))
    tokens = width = 16
    site = 4 * tokens * width**2 + 2 * tokens**2 * width
    site += 0 if target == "output" else 8 * tokens * width**2
    if target == "residual":  # adaLN: the block's own embedding of the timestep, and six modulations
        site += 256 * width + width**2 + 6 * width**2
    assert full - got == reused_steps * 4 * 4 * site  # layers, two images in two branches


@pytest.mark.parametrize("order", [0, 1, 2])
@pytest.mark.parametrize("bits", [16, 8, 4])
@pytest.mark.parametrize("target", ["output", "block", "residual"])
def test_bytes_of_the_history_are_counted(pipe, target, bits, order):
    config = DQARConfig(
        **{**STATIC, "reuse_target": target}, quantize_bits=bits, cache=CacheFormat(forecast_order=order)
    )
    with apply_dqar(pipe, config) as session:
        entries = entries_of(pipe, session)
        draw(pipe, steps=10)
        table = session.trace.to_pandas()
    kept = sum(entry.nbytes for entry in entries.values())
    # Two images of 16 tokens and 16 channels, float32; or with a float32 scale a channel and image.
    one = {16: 2 * 256 * 4, 8: 2 * (256 + 16 * 4), 4: 2 * (128 + 16 * 4)}[bits] * (2 if target == "block" else 1)
    counts = [min(step // 2, order) + 1 for step in range(10)]
    site = table[(table.layer == 2) & (table.branch == "uncond")]
    assert site.bytes.tolist() == [n * one for n in counts]
    assert kept == table[table.step == 9].bytes.sum() == 8 * counts[-1] * one


@pytest.mark.parametrize("bits", [8, 4])
def test_an_entrys_bytes_are_those_of_its_tensors(bits):
    cache = QuantizedCache(DQARConfig(reuse_target="block", quantize_bits=bits, cache=CacheFormat(2, 2)))
    for step in range(5):
        x = torch.randn(2, 16, 8)
        cache.put(0, {"cond": slice(None)}, step, dict(output=x, feed_forward=x))
    entry = cache.get(0, "cond")
    chain = (entry, *entry.history)
    tensors = [
        part
        for past in chain
        for stored in (past.output, past.feed_forward)
        for part in (stored.data, stored.scale, stored.kept, stored.kept_channels)
    ]
    assert cache.nbytes == entry.nbytes == sum(tensor.nbytes for tensor in tensors)
    assert [past.step for past in chain] == [4, 3, 2]
    assert entry.nbytes == 6 * (2 * 16 * 8 * bits // 8 + 2 * 8 * 4 + 2 * 16 * 2 * 2 + 2 * 2 * 2)


# --- forecasts -------------------------------------------------------------------------------------------------------


def cached(order, steps, function, bits=16, dtype=torch.float32):
    """The newest entry of a cache that was given ``function(step)``, ``[2, 16, 8]``, at ``steps``."""
    cache = QuantizedCache(
        DQARConfig(reuse_target="block", cache=CacheFormat(forecast_order=order), quantize_bits=bits)
    )
    for step in steps:
        value = function(step).to(dtype)
        cache.put(3, {"cond": slice(None)}, step, dict(output=value, feed_forward=-value))
    return cache.get(3, "cond")


@pytest.mark.parametrize("steps", [(0, 1, 2), (0, 3, 4), (1, 2, 9), (4, 20, 21), (0, 1, 2, 3, 7)])
@pytest.mark.parametrize("degree, order", [(0, 0), (0, 2), (1, 1), (1, 2), (2, 2)])
def test_polynomials_in_the_step_are_forecast_exactly(steps, degree, order):
    a, b, c = torch.randn(3, 2, 16, 8, dtype=torch.float64)

    def function(step):
        return a + (b * step if degree > 0 else 0) + (c * step**2 if degree > 1 else 0)

    entry = cached(order, steps, function, dtype=torch.float64)
    for ahead in (1, 2, 5):
        step = steps[-1] + ahead
        torch.testing.assert_close(recall([entry], step, "output"), function(step), rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(recall([entry], step, "feed_forward"), -function(step), rtol=1e-9, atol=1e-9)


def test_what_a_higher_degree_leaves():
    def at_4(order, steps, degree):
        return recall([cached(order, steps, lambda step: torch.ones(1, 1, 1) * step**degree)], 4, "output").item()

    assert at_4(1, (1, 3), 2) == 13  # the line through (1, 1) and (3, 9)
    assert at_4(0, (1, 3), 2) == 9
    assert at_4(2, (1, 2, 3), 3) == 58


@pytest.mark.parametrize("order", [0, 1, 2])
def test_a_history_grows_to_its_order(order):
    for computed in range(1, 6):
        entry = cached(order, range(0, 2 * computed, 2), lambda step: torch.full((1, 2, 2), float(step)))
        assert [past.step for past in entry.history] == list(range(2 * computed - 4, -1, -2))[:order]
        assert all(past.history == () for past in entry.history)


def test_a_step_that_is_computed_twice_counts_once():
    values = iter([0.0, 5.0, 1.0])
    entry = cached(1, (2, 3, 3), lambda _step: torch.full((1, 1, 1), next(values)))
    assert [past.step for past in entry.history] == [2]
    assert recall([entry], 5, "output").item() == 3.0


def test_an_entry_without_tensors_is_no_part_of_a_history():
    cache = QuantizedCache(DQARConfig(reuse_target="block", cache=CacheFormat(forecast_order=2)))
    x = torch.ones(1, 2, 2)
    cache.put(0, {"cond": slice(None)}, 0, dict(output=x, feed_forward=x))
    cache.put(0, {"cond": slice(None)}, 1, dict(output=x))  # half a site
    assert cache.get(0, "cond").empty
    cache.put(0, {"cond": slice(None)}, 2, dict(output=3 * x, feed_forward=x))
    entry = cache.get(0, "cond")
    assert not entry.empty and [past.step for past in entry.history] == [0]
    torch.testing.assert_close(recall([entry], 4, "output"), 5 * x)


def test_histories_of_sites_are_apart():
    cache = QuantizedCache(DQARConfig(reuse_target="output", cache=CacheFormat(forecast_order=1), quantize_bits=16))
    for step in (0, 1):
        for layer, branch, slope in ((0, "cond", 1.0), (0, "uncond", 2.0), (1, "cond", 3.0)):
            cache.put(layer, {branch: slice(None)}, step, dict(output=torch.full((1, 1, 1), slope * step)))
    assert [recall([cache.get(*site)], 2, "output").item() for site in ((0, "cond"), (0, "uncond"), (1, "cond"))] == [
        2,
        4,
        6,
    ]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_forecast_in_half_precision_is_rounded_once(dtype):
    torch.manual_seed(0)
    values = torch.randn(3, 2, 16, 8).to(dtype)
    entry = cached(2, (0, 1, 4), lambda step: values[{0: 0, 1: 1, 4: 2}[step]], dtype=dtype)
    exact = sum(w * v.double() for w, v in zip(lagrange_weights((0, 1, 4), 7), values, strict=True))
    got = recall([entry], 7, "output")
    assert got.dtype == dtype
    torch.testing.assert_close(got.double(), exact, rtol=torch.finfo(dtype).eps, atol=1e-5)


@pytest.mark.parametrize("order", [0, 1, 2])
def test_a_forecast_leaves_the_cache_alone(order):
    entry = cached(order, (0, 1, 2), lambda step: torch.full((1, 2, 2), float(step)))
    first = recall([entry], 3, "output")
    recall([entry], 5, "output").add_(7) if order else None
    assert torch.equal(recall([entry], 3, "output"), first)


def test_weights_add_up_to_one():
    assert lagrange_weights((5,), 9) == [1]
    assert lagrange_weights((5, 3), 7) == [2, -1]
    assert lagrange_weights((2, 1, 0), 3) == [3, -3, 1]


class Operations(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.__name__.split(".")[0])
        return func(*args, **(kwargs or {}))


def test_a_forecast_is_one_sum_and_waits_for_nothing():
    entry = cached(2, (0, 1, 2), lambda step: torch.full((2, 16, 8), float(step)))
    with Operations() as seen:
        recall([entry], 3, "output")
    assert [name for name in seen.names if name != "promote_types"] == ["mul", "add_", "add_"]
    quantized = cached(2, (0, 1, 2), lambda step: torch.full((2, 16, 8), float(step)), bits=4)
    with Operations() as seen:
        recall([quantized], 3, "output")
    assert not {"_local_scalar_dense", "equal", "nonzero"} & set(seen.names) and seen.names.count("add_") == 2


# --- decisions -------------------------------------------------------------------------------------------------------


def test_first_and_last_steps_compute(pipe):
    with apply_dqar(pipe, DQARConfig(**BLOCK, warmup=2, cooldown=3, max_reuse_streak=9)) as session:
        draw(pipe)
    table = session.trace.to_pandas()
    reasons = table.groupby("step").reason.unique()
    assert [*map(list, reasons)] == [["warmup"]] * 2 + [["reuse"]] * 3 + [["cooldown"]] * 3
    assert (table.bytes[table.step.isin([0, 4, 5, 6, 7])] > 0).tolist() == [False] * 8 + [True] * 8 + [False] * 24


@pytest.mark.parametrize("schedule", ["all", "none"])
def test_nothing_is_shared_in_the_cooldown(schedule):
    controller = DQARController(1, DQARConfig(**{**OPEN, "schedule": schedule}, share_below=math.inf, cooldown=2))
    for step in range(5):
        controller.begin_step(step, 5)
        decisions = [controller.should_reuse(0, branch) for branch in ("cond", "uncond")]
        assert any(d.use_cache or d.shared for d in decisions) == (step in (1, 2))
        assert ("cooldown" in [d.reason for d in decisions]) == (step > 2)
        for branch, decision in zip(("cond", "uncond"), decisions, strict=True):
            if not decision.use_cache:
                controller.commit(0, branch, keys=torch.ones(1, 4, 2), values=torch.ones(1, 4, 2), entropy=1.0)


@pytest.mark.parametrize(
    "order, expected", [(0, {4: [0], 6: [1]}), (1, {3: [0], 4: [0], 5: [1], 6: [1]}), (2, {2: [0], 3: [0]})]
)
def test_only_what_a_forecast_draws_on_is_cached(order, expected):
    plan = ReusePlan({(5, 0, "cond"), (7, 1, "uncond")}, 2, 9)
    controller = DQARController(
        2, DQARConfig(plan=plan, reuse_target="output", cache=CacheFormat(forecast_order=order))
    )
    committed = {}
    for step in range(9):
        controller.begin_step(step, 9)
        committed[step] = [layer for layer in (0, 1) if controller.wants_commit(layer)]
    if order == 2:
        assert committed == {0: [], 1: [], 2: [0], 3: [0], 4: [0, 1], 5: [1], 6: [1], 7: [], 8: []}
    else:
        assert committed == {step: expected.get(step, []) for step in range(9)}


def test_a_site_is_committed_through_the_controller():
    controller = DQARController(1, DQARConfig(**BLOCK, cache=CacheFormat(forecast_order=1), quantize_bits=16))
    for step in range(3):
        controller.begin_step(step, 5)
        decision = controller.should_reuse(0)
        if step < 2:
            x = torch.full((1, 4, 2), float(step))
            controller.commit(0, output=x, feed_forward=10 * x)
    assert decision.reason == "reuse" and decision.entry.nbytes == 4 * 8 * 4
    assert recall([decision.entry], 2, "output").unique().item() == 2
    assert recall([decision.entry], 2, "feed_forward").unique().item() == 20


# --- text models -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", [0, 1, 2])
@pytest.mark.parametrize("target", ["block", "residual"])
def test_pixart(pixart, order, target):
    plain, names = draw_text(pixart), {name: set(vars(m)) for name, m in pixart.transformer.named_modules()}
    options = {"reuse_target": target, "cache": CacheFormat(forecast_order=order), "quantize_bits": 16}
    with apply_dqar(pixart, DQARConfig(schedule="none", **options)):
        assert torch.equal(draw_text(pixart), plain)
    sites = {(step, layer, branch) for step, layer, branch in UNEVEN if step < 6 and layer < 3} | {(5, 1, "cond")}
    with apply_dqar(pixart, DQARConfig(plan=ReusePlan(sites, 3, 6), **options)) as session:
        got, again = draw_text(pixart), draw_text(pixart)
    assert torch.equal(got, again) and not torch.equal(got, plain)
    assert sites_of(session.trace.to_pandas()) == sites
    crossed, own = (len(session.trace.to_pandas(module)) for module in ("cross_attention", "self_attention"))
    assert own == 2 * 6 * 3 * 2 and own - crossed == (4 if target == "residual" else 0)  # both branches reused
    assert {name: set(vars(module)) for name, module in pixart.transformer.named_modules()} == names
    assert torch.equal(draw_text(pixart), plain)
    Naive(pixart.transformer, sites, target, order, ("uncond", "cond"))
    torch.testing.assert_close(got, draw_text(pixart), rtol=1e-3, atol=1e-3)
