"""Trace and reuse where attention isn't DiT's: joint with the caption (SD3.5, Flux); Latte."""

import dataclasses
import functools
import math

import pytest
import torch
from diffusers.hooks import apply_group_offloading
from diffusers.models.transformers.transformer_flux import FluxIPAdapterAttnProcessor
from planned import state, unchanged
from tiny import drawn, flux, flux_control, latte, sd3

from dqar import CacheFormat, DQARConfig, Probe, ReusePlan, apply_dqar, stats

STEPS, CPU = 6, torch.device("cpu")
MAKERS = {
    # As SD3.5 medium: normalised queries and keys, and a second attention to the image alone in the first blocks.
    "sd3": functools.partial(sd3, qk_norm="rms_norm", dual_attention_layers=(0,)),
    "flux": functools.partial(flux, num_layers=2),
    "latte": latte,
}
LAYERS = {
    "sd3": ["transformer_blocks.0.attn", "transformer_blocks.0.attn2", "transformer_blocks.1.attn"],
    "flux": [f"{kind}transformer_blocks.{i}.attn" for kind in ("", "single_") for i in (0, 1)],
    "latte": [f"transformer_blocks.{i}.attn1" for i in (0, 1)],
}
BRANCHES = {"sd3": ["uncond", "cond"], "flux": ["cond"], "latte": ["uncond", "cond"]}
TEXT = 5
"""Words of each caption."""
KEPT = {"quantize_bits": 16, "reuse_target": "output"}


def static(target="output", bits=16):
    open_gate = {"entropy_threshold": None, "snr_range": None, "schedule": "static"}
    return DQARConfig(**open_gate, reuse_target=target, quantize_bits=bits)


CLOSED = {
    "nothing asked": DQARConfig(schedule="none", reuse_target="output"),
    "recorded": DQARConfig(schedule="none", reuse_target="output", probe=Probe(record=True)),
    "by entropy": DQARConfig(entropy_threshold=0.0, snr_range=None, schedule="all", reuse_target="output"),
}

joint = pytest.mark.parametrize("name", ("sd3", "flux"))
families = pytest.mark.parametrize("name", MAKERS)


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    """Each pipeline as it is loaded from a folder, and its calls."""
    folder, made = tmp_path_factory.mktemp("pipelines"), {}

    def load(name):
        pipe, call = MAKERS[name]()
        if name not in made:
            for path, parameter in pipe.transformer.named_parameters():  # else attention is uniform, whatever is done
                if any(part in path for part in ("norm_q", "norm_k", "norm_added", "to_q", "to_k", "add_q", "add_k")):
                    parameter.data.mul_(10)
            made[name] = pipe.save_pretrained(folder / name)
        absent = {part: None for part, module in pipe.components.items() if module is None}
        pipe = type(pipe).from_pretrained(folder / name, **absent)
        pipe.set_progress_bar_config(disable=True)
        return pipe, call(0)

    return load


def draw(pipe, call):
    return drawn(pipe, call, steps=STEPS)


# --- the trace --------------------------------------------------------------------------------------------------------


@families
@pytest.mark.parametrize("config", CLOSED)
def test_a_closed_gate_changes_nothing(loaded, name, config):
    pipe, call = loaded(name)
    untouched, before = draw(pipe, call), state(pipe.transformer)
    processors = [module.processor for module in pipe.transformer.modules() if hasattr(module, "processor")]
    with apply_dqar(pipe, CLOSED[config]) as session:
        assert torch.equal(draw(pipe, call), untouched)
    table = session.trace.to_pandas()
    assert table.groupby(["step", "layer", "branch"]).size().eq(1).all()
    assert len(table) == STEPS * len(LAYERS[name]) * len(BRANCHES[name]) and set(table.decision) == {"compute"}
    assert list(table[(table.step == 0) & (table.branch == "cond")].attention) == LAYERS[name]
    assert table.entropy.notna().all() == (config != "nothing asked")
    assert torch.equal(draw(pipe, call), untouched) and unchanged(pipe.transformer, before)
    assert processors == [module.processor for module in pipe.transformer.modules() if hasattr(module, "processor")]


LEFT_OUT = {
    "sd3": {"skip_guidance_layers": [1], "skip_layer_guidance_start": 0.0, "skip_layer_guidance_stop": 1.0},
    "latte": {"enable_temporal_attentions": False},
}


@pytest.mark.parametrize("name", LEFT_OUT)
@pytest.mark.parametrize("config", CLOSED)
def test_layers_that_a_call_leaves_out_have_no_rows(loaded, name, config):
    pipe, call = loaded(name)
    call = {**call, **LEFT_OUT[name]}
    untouched = draw(pipe, call)
    with apply_dqar(pipe, CLOSED[config]) as session:
        assert torch.equal(draw(pipe, call), untouched)
    # Skip-layer guidance adds a call of one branch from the second step on.
    rows = {"sd3": [12 + 5, 12 + 5, 12], "latte": [12, 12]}[name]
    counted = session.trace.to_pandas().attention.value_counts()
    assert [counted.get(path, 0) for path in LAYERS[name]] == rows


def normalised(x, norm):
    """RMS over the channels of each head."""
    if norm is None:
        return x
    return x * (x.square().mean(-1, keepdim=True) + norm.eps).rsqrt() * norm.weight.double()


def rotated(x, rotary):
    """Each pair of channels turned by its position's angle."""
    cos, sin = (part.double()[:, ::2] for part in rotary)
    pairs = torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous())
    return torch.view_as_real(pairs * torch.complex(cos, sin)).flatten(-2)


def naive_entropies(pipe, call, name):
    """By layer and step, of whole maps in float64: entropies ``[B, H, N]``, and which queries are the caption's."""
    seen = {path: [] for path in LAYERS[name]}

    def look(module, args, kwargs, path):
        given = dict(zip(("hidden_states", "encoder_hidden_states"), args, strict=False)) | kwargs
        image, caption = given["hidden_states"].double(), given.get("encoder_hidden_states")
        streams = [(image, ("to_q", "to_k"), ("norm_q", "norm_k"))]
        if caption is not None:
            added = caption.double(), ("add_q_proj", "add_k_proj"), ("norm_added_q", "norm_added_k")
            streams.insert(0 if name == "flux" else 1, added)
        joined = []
        for which in (0, 1):
            parts = []
            for x, projections, norms in streams:
                layer = getattr(module, projections[which])
                x = x @ layer.weight.double().T + layer.bias.double()
                x = x.unflatten(-1, (module.heads, -1)).transpose(1, 2)
                parts.append(normalised(x, getattr(module, norms[which])))
            whole = torch.cat(parts, 2)
            joined.append(whole if (rotary := given.get("image_rotary_emb")) is None else rotated(whole, rotary))
        weights = (joined[0] @ joined[1].mT / math.sqrt(joined[0].shape[-1])).softmax(-1)
        entropy = -torch.special.xlogy(weights, weights).sum(-1)
        positions = torch.arange(entropy.shape[-1])
        text = positions < TEXT if name == "flux" else positions >= image.shape[1]
        seen[path].append((entropy, text))

    handles = [
        pipe.transformer.get_submodule(path).register_forward_pre_hook(
            functools.partial(look, path=path), with_kwargs=True
        )
        for path in seen
    ]
    with torch.no_grad():
        draw(pipe, call)
    for handle in handles:
        handle.remove()
    return seen


@families
def test_entropies_are_those_of_whole_maps(loaded, name):
    pipe, call = loaded(name)
    expected = naive_entropies(pipe, call, name)
    with apply_dqar(pipe, CLOSED["recorded"]) as session:
        draw(pipe, call)
    table, heads = session.trace.to_pandas(), session.trace.heads_to_pandas()
    for row in table.itertuples():
        entropy, text = expected[row.attention][row.step]
        part = entropy.chunk(len(BRANCHES[name]))[BRANCHES[name].index(row.branch)]
        assert row.entropy == pytest.approx(part.mean().item(), abs=1e-5)
        assert row.tokens == entropy.shape[-1]
        own = heads[(heads.step == row.step) & (heads.layer == row.layer) & (heads.branch == row.branch)]
        assert own.entropy.tolist() == pytest.approx(part.mean((0, 2)).tolist(), abs=1e-5)
        if text.any():
            assert row.entropy_image == pytest.approx(part[..., ~text].mean().item(), abs=1e-5)
            assert row.entropy_text == pytest.approx(part[..., text].mean().item(), abs=1e-5)
            assert abs(row.entropy_image - row.entropy_text) > 1e-3
        else:
            assert table.loc[row.Index, ["entropy_image", "entropy_text"]].isna().all()
    by_modality = {"sd3": [True, False, True], "flux": [True] * 4, "latte": [False] * 2}
    assert table.groupby("layer").entropy_text.agg(lambda own: own.notna().all()).tolist() == by_modality[name]


@joint
def test_some_queries_estimate_each_modality(loaded, name):
    pipe, call = loaded(name)
    tables = []
    for queries in (None, 3):
        probe = Probe(record=True, queries=queries)
        with apply_dqar(pipe, DQARConfig(schedule="none", reuse_target="output", probe=probe)) as session:
            draw(pipe, call)
        tables.append(session.trace.to_pandas()[["entropy", "entropy_image", "entropy_text"]])
    difference = (tables[0] - tables[1]).abs()
    assert (difference.mean() < 0.1).all() and (difference.max() > 0).all()


def test_the_snr_is_that_of_the_latents_without_a_control_image():
    """The latents' SNR by the x0 predicted at the step before, recomputed from outside."""
    pipe, call = flux_control()
    seen, step = [], pipe.scheduler.step

    @functools.wraps(step)
    def watched(model_output, timestep, sample, **kwargs):
        seen.append((model_output, sample, pipe.scheduler.sigmas[pipe.scheduler.step_index or 0]))
        return step(model_output, timestep, sample, **kwargs)

    pipe.scheduler.step = watched
    with apply_dqar(pipe, CLOSED["recorded"]) as session:
        draw(pipe, call(0))
    output, latents, sigma = seen[2]
    expected = stats.snr(latents - sigma * output, latents).mean().item()
    table = session.trace.to_pandas()
    assert table.snr.notna().all() and table.snr[table.step == 2].iloc[0] == pytest.approx(expected, rel=1e-4)


# --- reuse ------------------------------------------------------------------------------------------------------------


def modules_of(pipe, path, target):
    """What a target keeps of one attention."""
    attn = pipe.transformer.get_submodule(path)
    if target == "kv":
        names = ("to_k", "to_v", "add_k_proj", "add_v_proj")
        return [module for name in names if (module := getattr(attn, name, None)) is not None]
    block = pipe.transformer.get_submodule(path.rpartition(".")[0])
    return {"output": [attn], "block": [attn, getattr(block, "ff", None)], "residual": [block]}[target]


def naive(pipe, call, name, kept_at, target="output"):
    """The run where ``kept_at(path, step, rows)`` of a module's outputs are those that it last computed."""
    last, calls, handles = {}, {}, []

    def hook(path, module, args, output):
        step = calls[module] = calls.get(module, -1) + 1
        streams = output if isinstance(output, tuple) else (output,)
        if target == "residual":
            streams = (output - args[0],)
        if step:
            kept = [kept_at(path, step, len(stream))[:, None, None] for stream in streams]
            streams = tuple(map(torch.where, kept, last[module], streams))
        last[module] = streams
        if target == "residual":
            reused = kept_at(path, step, len(output))[:, None, None]
            return torch.where(reused, args[0] + streams[0], output)
        return streams if isinstance(output, tuple) else streams[0]

    for path in LAYERS[name]:
        for module in modules_of(pipe, path, target):
            handles.append(module.register_forward_hook(functools.partial(hook, path)))
    result = draw(pipe, call)
    for handle in handles:
        handle.remove()
    return result


def odd_steps(_path, step, rows):
    return torch.full((rows,), step % 2 == 1)


TARGETS = [
    *((name, target) for name in MAKERS for target in ("output", "kv")),
    ("latte", "block"),
    ("latte", "residual"),
]


@pytest.mark.parametrize("name, target", TARGETS)
def test_a_static_schedule_returns_what_was_kept(loaded, name, target):
    pipe, call = loaded(name)
    untouched, expected = draw(pipe, call), naive(pipe, call, name, odd_steps, target)
    with apply_dqar(pipe, static(target)) as session:
        first, again = draw(pipe, call), draw(pipe, call)
    assert torch.equal(first, expected) and torch.equal(again, first) and not torch.equal(first, untouched)
    table = session.trace.to_pandas()
    assert set(table[table.decision == "reuse"].step) == {1, 3, 5}
    assert (table[table.step % 2 == 1].decision == "reuse").all()
    assert torch.equal(draw(pipe, call), untouched)


@pytest.mark.parametrize("name, target", TARGETS)
def test_each_layer_keeps_all_its_streams_in_its_own_bits(loaded, name, target):
    pipe, call = loaded(name)
    drawn, sizes, mixed = {}, {}, (4, *[16] * (len(LAYERS[name]) - 1))
    for bits in (4, 16, mixed, (16,) * len(mixed)):
        config = static(target, 8 if isinstance(bits, tuple) else bits)
        if isinstance(bits, tuple):
            config = dataclasses.replace(config, cache=CacheFormat(layer_bits=bits))
        with apply_dqar(pipe, config) as session:
            drawn[bits] = draw(pipe, call)
        table = session.trace.to_pandas()
        sizes[bits] = table[table.step == 1].groupby("layer").bytes.sum()
    assert torch.equal(drawn[16], drawn[(16,) * len(mixed)])
    assert not torch.equal(drawn[mixed], drawn[16]) and not torch.equal(drawn[mixed], drawn[4])
    assert sizes[mixed].tolist() == [sizes[4][0], *sizes[16][1:]]


@pytest.mark.parametrize("name", ("sd3", "latte"))
@pytest.mark.parametrize("branch, target", [("uncond", "output"), ("cond", "output"), ("cond", "kv")])
def test_one_branch_is_reused_and_the_other_computed(loaded, name, branch, target):
    pipe, call = loaded(name)
    sites = {(step, layer, branch) for step in (1, 3, 5) for layer in range(len(LAYERS[name]))}

    def half(_path, step, rows):
        own = torch.arange(rows) // (rows // 2) == BRANCHES[name].index(branch)
        return own & (step % 2 == 1)

    plan = ReusePlan(sites, len(LAYERS[name]), STEPS)
    config = DQARConfig(plan=plan, reuse_target=target, quantize_bits=16, probe=Probe(record=True))
    with apply_dqar(pipe, config) as session:
        got = draw(pipe, call)
    torch.testing.assert_close(got, naive(pipe, call, name, half, target), rtol=1e-4, atol=1e-5)
    assert not torch.equal(got, draw(pipe, call))
    reused = session.trace.to_pandas().query("decision == 'reuse'")
    assert set(reused.branch) == {branch} and len(reused) == len(sites)


@pytest.mark.parametrize("target", ("output", "kv"))
def test_the_unconditional_branch_shares_both_streams(loaded, target):
    pipe, call = loaded("sd3")
    handles, calls = [], {}

    def hook(module, _args, output):
        step = calls[module] = calls.get(module, -1) + 1
        if step not in (1, 2, 3, 5):  # nothing is known at step 0, and three shares in a row are enough
            return output
        streams = output if isinstance(output, tuple) else (output,)
        shared = tuple(torch.cat([stream.chunk(2)[1]] * 2) for stream in streams)
        return shared if isinstance(output, tuple) else shared[0]

    for path in LAYERS["sd3"]:
        handles += [module.register_forward_hook(hook) for module in modules_of(pipe, path, target)]
    expected = draw(pipe, call)
    for handle in handles:
        handle.remove()
    with apply_dqar(pipe, DQARConfig(schedule="none", share_below=99.0, reuse_target=target)) as session:
        got = draw(pipe, call)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
    assert not torch.equal(got, draw(pipe, call))
    shares = session.trace.to_pandas().query("decision == 'share'")
    assert set(shares.step) == {1, 2, 3, 5} and set(shares.branch) == {"uncond"}


@pytest.mark.parametrize("name, kind", [("flux", ""), ("flux", "single_")])
def test_each_kind_of_attention_is_reused_by_itself(loaded, name, kind):
    pipe, call = loaded(name)
    own = [path.startswith(f"{kind}transformer_blocks") for path in LAYERS[name]]
    sites = {(s, layer, b) for s in (1, 3, 5) for layer in range(4) if own[layer] for b in BRANCHES[name]}
    with apply_dqar(pipe, DQARConfig(**KEPT, plan=ReusePlan(sites, 4, STEPS))) as session:
        got = draw(pipe, call)
    chosen = dict(zip(LAYERS[name], own, strict=True))
    expected = naive(pipe, call, name, lambda path, step, rows: torch.full((rows,), chosen[path] and step % 2 > 0))
    assert torch.equal(got, expected) and not torch.equal(got, draw(pipe, call))
    assert not torch.equal(got, naive(pipe, call, name, odd_steps))
    reused = session.trace.to_pandas().query("decision == 'reuse'")
    assert set(reused.attention) == {path for path in LAYERS[name] if chosen[path]}


@families
def test_kept_outputs_are_quantized_and_counted(loaded, name):
    pipe, call = loaded(name)
    results = {}
    for bits in (16, 8, 2):
        with apply_dqar(pipe, static(bits=bits)) as session:
            results[bits] = draw(pipe, call), session.trace.to_pandas()
    error = {bits: (image - results[16][0]).square().mean().item() for bits, (image, _) in results.items()}
    assert 0 < error[8] < error[2]
    table = results[16][1].query("step == 2 and branch == 'cond'")
    tokens = 2 * 16 if name == "latte" else table.tokens  # two frames of 16 tokens, or 16 tokens of two frames
    assert (table.bytes == tokens * 16 * 4).all()  # channels, float32


OFFLOAD = {
    "model": lambda pipe: pipe.enable_model_cpu_offload(device="cpu"),
    "leaves": lambda pipe: apply_group_offloading(pipe.transformer, CPU, CPU, offload_type="leaf_level"),
}


@pytest.mark.parametrize(
    "name, how, target",
    [*((name, "model", "output") for name in MAKERS), ("sd3", "leaves", "output"), ("flux", "leaves", "kv")],
)
def test_an_offloaded_pipeline_does_the_same(loaded, name, how, target):
    pipe, call = loaded(name)
    with apply_dqar(pipe, static(target)) as session:
        in_memory = draw(pipe, call)
    rows = session.trace.to_pandas()[["step", "layer", "branch", "decision", "bytes"]]
    OFFLOAD[how](pipe)
    untouched, expected = draw(pipe, call), naive(pipe, call, name, odd_steps, target)
    with apply_dqar(pipe, static(target)) as session:
        assert torch.equal(draw(pipe, call), expected)
    torch.testing.assert_close(expected, in_memory)  # weights elsewhere in memory: other last bits
    assert session.trace.to_pandas()[rows.columns].equals(rows)
    with apply_dqar(pipe, CLOSED["recorded"]):
        assert torch.equal(draw(pipe, call), untouched)
    assert torch.equal(draw(pipe, call), untouched) and not torch.equal(untouched, expected)


@joint
@pytest.mark.parametrize("target", ("output", "kv"))
def test_others_hooks_see_every_call(loaded, name, target):
    pipe, call = loaded(name)
    seen = []
    for path in LAYERS[name]:
        pipe.transformer.get_submodule(path).register_forward_hook(lambda _module, _args, output: seen.append(output))
    expected = naive(pipe, call, name, odd_steps, target)
    outside = [*seen]
    seen.clear()
    with apply_dqar(pipe, static(target)):
        assert torch.equal(draw(pipe, call), expected)
    assert len(seen) == len(outside) == STEPS * len(LAYERS[name])
    if target == "kv":
        torch.testing.assert_close(seen, outside, rtol=0, atol=0)


def test_a_traced_run_becomes_a_plan_for_its_size(loaded, tmp_path):
    pipe, call = loaded("flux")
    with apply_dqar(pipe, static()) as session:
        expected = draw(pipe, call)
    ReusePlan.from_trace(session.trace.to_pandas()).save(tmp_path / "plan.json")
    plan = ReusePlan.load(tmp_path / "plan.json")
    with apply_dqar(pipe, DQARConfig(**KEPT, plan=plan)):
        assert torch.equal(draw(pipe, call), expected)
        with pytest.raises(ValueError, match="made for 32 packed latents, these are 64 packed"):
            draw(pipe, {**call, "height": 32})


# --- what is refused --------------------------------------------------------------------------------------------------


@joint
def test_what_joint_attention_has_no_sites_for_is_refused(loaded, name):
    pipe, _ = loaded(name)
    before = state(pipe.transformer)
    for target in ("block", "residual"):
        with pytest.raises(
            ValueError, match=f"reuse_target='{target}'.* transformer_blocks.0.attn,.* 'kv' or 'output'"
        ):
            apply_dqar(pipe, DQARConfig(reuse_target=target))
    with pytest.raises(ValueError, match="balance=True is not accepted for transformer_blocks.0.attn"):
        apply_dqar(pipe, DQARConfig(reuse_target="kv", balance=True))
    assert unchanged(pipe.transformer, before)


def test_another_processor_is_refused_by_name(loaded):
    pipe, call = loaded("sd3")
    with apply_dqar(pipe, static()):
        draw(pipe, call)
        pipe.transformer.fuse_qkv_projections()
        with pytest.raises(
            ValueError, match="layer 0 has the .* FusedJointAttnProcessor2_0.*diffusers' JointAttnProcessor2_0"
        ):
            draw(pipe, call)
    pipe, call = loaded("flux")
    last = pipe.transformer.single_transformer_blocks[1].attn
    last.set_processor(FluxIPAdapterAttnProcessor(16, 16))
    with pytest.raises(
        ValueError, match="layer 3 has the .* FluxIPAdapterAttnProcessor.*place of diffusers' FluxAttnProcessor"
    ):
        apply_dqar(pipe, static())


def test_fused_projections_have_no_keys_and_values_to_keep(loaded):
    """Flux's processor serves both, so that its class doesn't tell; outputs can be kept all the same."""
    pipe, call = loaded("flux")
    pipe.transformer.fuse_qkv_projections()
    with apply_dqar(pipe, static("kv")), pytest.raises(ValueError, match="layer 0 has .* fused ones"):
        draw(pipe, call)
    expected = naive(pipe, call, "flux", odd_steps)
    with apply_dqar(pipe, static()):
        assert torch.equal(draw(pipe, call), expected)


@pytest.mark.filterwarnings("ignore:flex_attention called without")
def test_attention_out_of_sight_has_no_entropy(loaded):
    """Another backend: refused where its entropy is asked for, reused where it isn't."""
    pipe, call = loaded("flux")
    pipe.transformer.set_attention_backend("flex")
    with apply_dqar(pipe, CLOSED["recorded"]), pytest.raises(ValueError, match="layer 0 calls .* 0 times.*'native'"):
        draw(pipe, call)
    expected = naive(pipe, call, "flux", odd_steps)
    with apply_dqar(pipe, static()):
        assert torch.equal(draw(pipe, call), expected)
    pipe.transformer.set_attention_backend("native")  # diffusers makes the last chosen one every model's


@joint
def test_a_broken_layer_is_named(loaded, name):
    pipe, call = loaded(name)
    pipe.transformer.transformer_blocks[1].ff.net[2].weight.data[0, 0] = math.nan
    layer = LAYERS[name].index("transformer_blocks.1.attn")
    with apply_dqar(pipe, static()), pytest.raises(FloatingPointError, match=f"step 0, first in layer {layer}"):
        draw(pipe, call)
