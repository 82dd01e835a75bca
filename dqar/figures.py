"""The deck's figures: one function each, tidy tables in, slide-ready pictures out, every one with its provenance."""

from __future__ import annotations

import json
import textwrap

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
import torch
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch

from dqar import architecture, experiments, stats
from dqar.calibrate import propose_gate
from dqar.results import Run, atomic_path, provenance

ACCENT = "#D55E00"
"""DQAR, in every figure."""
REUSE, COMPUTE = ACCENT, "#DCE3EA"
BLUE, GREEN, GREY = "#0072B2", "#009E73", "#555555"
BRANCHES = {"cond": BLUE, "uncond": GREEN}

# Slide 14's table: step, entropy (nats), SNR, reuse events.
SLIDE14 = pd.DataFrame(
    [
        (0, 4.8, 0.1, 0),
        (5, 4.2, 0.3, 0),
        (10, 3.5, 0.8, 0),
        (15, 2.8, 2.1, 5),
        (20, 2.1, 5.4, 18),
        (25, 1.7, 12.8, 42),
        (30, 1.4, 28.3, 55),
        (35, 1.2, 52.7, 48),
        (40, 1.0, 89.4, 35),
        (45, 0.9, 142.1, 22),
        (50, 0.8, 201.5, 12),
    ],
    columns=["step", "entropy", "snr", "events"],
)


def use_style() -> None:
    """16:9, readable from the back of a room."""
    sns.set_theme(context="talk", style="whitegrid", palette="colorblind")
    plt.rcParams.update(
        {
            "figure.figsize": (12.8, 7.2),
            "figure.constrained_layout.use": True,
            "axes.titleweight": "bold",
            "axes.titlesize": "medium",
            "svg.fonttype": "none",
            "font.family": "DejaVu Sans",
        }
    )


def save(run: Run, name: str, figure: Figure, table: pd.DataFrame, transparent: bool = False) -> Figure:
    """Writes ``name`` as PNG (2560 × 1440), SVG and JSON sidecar to the run's figures; closes and returns the figure.

    The footer and the sidecar say what was measured; ``table.attrs`` brings the provenance of a measured table.
    """
    source = table.attrs.get("provenance") or provenance(run.profile, run.seed)
    text = f"profile {source['profile']['name']} · {source['device']}, {source['dtype']} · seed {source['seed']}"
    figure.get_layout_engine().set(rect=(0, 0.035, 1, 0.965))
    figure.text(0.995, 0.008, f"{text} · {source['commit']} · {source['date'][:10]}", ha="right", size=10, color=GREY)
    for suffix, options in ((".png", {"dpi": 200}), (".svg", {"metadata": {"Date": None}})):
        with atomic_path(run.figures / f"{name}{suffix}") as path:
            figure.savefig(path, transparent=transparent, **options)
    title = figure.get_suptitle().replace("\n", " ") or (figure.axes[0].get_title() if figure.axes else "")
    with atomic_path(run.figures / f"{name}.json") as path:
        path.write_text(json.dumps({"figure": name, "title": title, **source}, indent=2) + "\n")
    plt.close(figure)
    return figure


def save_table(
    run: Run, name: str, title: str, table: pd.DataFrame, widths: list[int], source: pd.DataFrame | None = None
) -> Figure:
    """Writes a table as Markdown and LaTeX and, drawn, as a figure; ``widths`` in characters a column."""
    for suffix, text in ((".md", table.to_markdown(index=False)), (".tex", _latex(table))):
        with atomic_path(run.figures / f"{name}{suffix}") as path:
            path.write_text(text + "\n")
    cells = [
        ["\n".join(textwrap.wrap(str(x), width)) for x, width in zip(row, widths, strict=True)]
        for row in [table.columns, *table.values]
    ]
    heights = [0.45 + max(cell.count("\n") + 1 for cell in row) for row in cells]
    total, size = sum(heights), min(18.0, 400 / sum(heights), 1560 / sum(widths))
    figure, axes = plt.subplots()
    axes.set(xlim=(0, sum(widths)), ylim=(total, 0))
    axes.axis("off")
    axes.set_title(title, loc="left")
    lefts = np.cumsum([0, *widths[:-1]])
    top = 0.0
    for number, (row, height) in enumerate(zip(cells, heights, strict=True)):
        if number % 2 == 0 and number:
            axes.axhspan(top, top + height, color="#F3F5F7", zorder=0)
        for left, cell in zip(lefts, row, strict=True):
            weight = "bold" if number == 0 else "normal"
            axes.text(left + 0.5, top + height / 2, cell, va="center", size=size, weight=weight, linespacing=1.15)
        axes.axhline(top + height, color="#B8C0C8", lw=2 if number == 0 else 0.6)
        top += height
    return save(run, name, figure, source if source is not None else table)


def headline(figure: Figure, text: str) -> None:
    """The finding, as the figure's title."""
    figure.suptitle("\n".join(textwrap.wrap(text, 80)), weight="bold", size=19.5)


def slide04_entropy_snr(run: Run, sites: pd.DataFrame) -> Figure:
    """Entropy of all layers and SNR against the denoising step."""
    figure, (left, right) = plt.subplots(1, 2)
    tokens = int(sites.tokens.iloc[0])
    for branch, color in BRANCHES.items():
        by_step = sites[sites.branch == branch].groupby("step").entropy
        quantiles = by_step.quantile([0.0, 0.25, 0.5, 0.75, 1.0]).unstack()
        left.plot(quantiles.index, quantiles[0.5], color=color, lw=3, label=f"{branch}, median of layers")
        left.fill_between(quantiles.index, quantiles[0.25], quantiles[0.75], color=color, alpha=0.3, lw=0)
        left.fill_between(quantiles.index, quantiles[0.0], quantiles[1.0], color=color, alpha=0.12, lw=0)
    left.axhline(np.log(tokens), color=GREY, ls="--")
    left.plot([], [], color=GREY, ls="--", label=f"uniform attention, ln {tokens} = {np.log(tokens):.2f}")
    left.set(xlabel="denoising step", ylabel="attention entropy (nats)")
    left.set_title(r"$H_t=-\frac{1}{HN}\sum_h\sum_{ij}A\,\ln A$")
    left.legend(loc="lower left", fontsize=14, title="bands: quartiles, range", title_fontsize=13)
    by_step = sites.groupby("step")[["snr", "snr_schedule"]].mean()
    right.plot(by_step.index, by_step.snr, color=ACCENT, lw=3, label=r"predicted $x_0$")
    right.plot(
        by_step.index, by_step.snr_schedule, color=GREY, lw=3, ls="--", label=r"schedule, $\bar\alpha/(1-\bar\alpha)$"
    )
    right.axhspan(0.5, 50, color=ACCENT, alpha=0.1, lw=0, label="the deck's window")
    right.set(xlabel="denoising step", ylabel="SNR", yscale="log")
    right.set_title(r"$\mathrm{SNR}_t=\|x_0\|^2/\|x_t-x_0\|^2$")
    right.legend(loc="upper left", fontsize=14)
    low, high = sites.entropy.min(), sites.entropy.max()
    headline(
        figure, f"Entropy stays between {low:.2f} and {high:.2f} nats; SNR grows {_times(by_step.snr)} over the run"
    )
    return save(run, "slide04_entropy_snr", figure, sites)


def slide05_gate(run: Run, sites: pd.DataFrame) -> Figure:
    """The entropy-SNR plane: where the gates open, and how wrong a reuse would be there."""
    known = sites.dropna(subset=["change"])
    figure, (left, right) = plt.subplots(1, 2, width_ratios=(3, 2))
    points = left.scatter(known.snr, known.entropy, c=known.change.clip(upper=1), s=14, cmap="cividis_r", lw=0)
    figure.colorbar(points, ax=left, label="relative error of a reuse", pad=0.01)
    gate = propose_gate(sites)
    low, high = gate.snr_range
    inside = known[known.snr.between(low, high) & (known.entropy < gate.entropy_threshold)]
    left.set(xscale="log", xlabel="SNR (predicted $x_0$)", ylabel="attention entropy (nats)")
    bottom = min(1.8, known.entropy.min() - 0.1)
    left.set_ylim(bottom, np.log(sites.tokens.iloc[0]) + 0.1)
    for threshold, label, style in (
        (2.0, "deck's gate: H < 2.0", ":"),
        (gate.entropy_threshold, "calibrated gate", "-"),
    ):
        left.plot(
            [low, low, high, high], [bottom, threshold, threshold, bottom], ls=style, color=ACCENT, lw=3, label=label
        )
    left.legend(loc="lower right", fontsize=14)
    deck_opens = int((known.snr.between(low, high) & (known.entropy < 2.0)).sum())
    left.set_title(f"The deck's gate opens for {deck_opens:,} of {len(known):,} sites")
    relations = experiments.relations(sites)
    names = ["entropy", "entropy,\nsame step", "SNR", "SNR,\nsame layer"]
    values = list(relations.values())
    right.barh(names, values, color=[BLUE, BLUE, GREY, GREY])
    for y, value in enumerate(values):
        right.annotate(f"{value:+.2f}", (value, y), (6 if value >= 0 else -6, 0), textcoords="offset points",
                       va="center", ha="left" if value >= 0 else "right", size=15)  # fmt: skip
    right.invert_yaxis()
    right.axvline(0, color=GREY)
    right.set(xlim=(-1.1, 1.1), xlabel="Spearman's ρ")
    right.set_title("Does it predict the error?")
    headline(
        figure,
        f"Inside the calibrated gate a reuse errs by {inside.change.median():.0%} (median), "
        f"over all sites by {known.change.median():.0%}",
    )
    return save(run, "slide05_gate", figure, sites)


def slide05_tau(run: Run, sites: pd.DataFrame) -> Figure:
    """τ(p) of slide 5, the deck's example, and the entropies that this model really has."""
    figure, axes = plt.subplots()
    words = np.arange(1, 129)
    axes.plot(words, [stats.tau(2.0, int(p)) for p in words], color=ACCENT, lw=4, label=r"$\tau(p)=2.0\,\sqrt{p/64}$")
    axes.scatter([8], [2.0], s=160, color=GREY, marker="X", zorder=3, label="the deck's example: τ(8) ≈ 2.0")
    axes.scatter([8, 64], [stats.tau(2.0, 8), 2.0], s=120, color=ACCENT, zorder=3)
    axes.annotate(f"τ(8) = {stats.tau(2.0, 8):.2f}", (8, stats.tau(2.0, 8)), (14, -8), textcoords="offset points")
    axes.annotate("τ(64) = 2.00", (64, 2.0), (8, -24), textcoords="offset points")
    axes.axhspan(
        sites.entropy.min(), sites.entropy.max(), color=BLUE, alpha=0.2, lw=0, label="measured entropies, all sites"
    )
    axes.set(xlabel="prompt length p (words)", ylabel="entropy threshold (nats)", ylim=(0, None))
    axes.legend(loc="lower right")
    reached = next((int(p) for p in range(1, 100_000) if stats.tau(2.0, int(p)) > sites.entropy.min()), None)
    axes.set_title(f"On this model τ(p) first reaches a measured entropy at p = {reached} words")
    return save(run, "slide05_tau", figure, sites)


def slide06_quantization(run: Run, error: pd.DataFrame, quality: pd.DataFrame) -> Figure:
    """Error against bytes for each tensor, bit width and mode; and what the bits cost in the image."""
    figure, (left, right) = plt.subplots(1, 2)
    means = error.groupby(["tensor", "bits", "mode"], as_index=False)[["relative_error", "bytes_per_value"]].mean()
    sns.lineplot(means, x="bytes_per_value", y="relative_error", hue="mode", style="tensor", markers=True, ax=left,
                 markersize=12, lw=2, errorbar=None)  # fmt: skip
    left.set(xscale="log", yscale="log", xlabel="bytes per value, scales included", ylabel="relative error (RMS)")
    left.set_xticks([0.25, 0.5, 1.0, 2.0], ["0.25", "0.5", "1", "2 (FP16)"])
    left.minorticks_off()
    left.set_title("Error of the cached tensors")
    left.legend(fontsize=12, loc="lower left")
    shown = quality[quality.bits < 16].assign(kind=lambda t: t.target + ", " + t["mode"])
    sns.stripplot(shown, x="psnr_cache", y=shown.bits.map("INT{}".format), hue="target", ax=right, size=13, jitter=0.12,
                  palette={"kv": BLUE, "output": ACCENT}, order=["INT8", "INT4", "INT2"])  # fmt: skip
    right.set(xlabel="PSNR to unquantized reuse (dB)", ylabel="")
    right.legend(title="what is cached", fontsize=14, title_fontsize=14)
    right.set_title("Error in the image (a dot a mode)")
    best = shown.groupby("bits").psnr_cache.max()
    headline(
        figure,
        f"Best mode, dB to an unquantized cache: {best[8]:.0f} at 8 bits, {best[4]:.0f} at 4, {best[2]:.0f} at 2",
    )
    return save(run, "slide06_quantization", figure, quality)


def slide08_layer_step_maps(run: Run, maps: pd.DataFrame) -> Figure:
    """What each schedule did, as traced, at every step and layer."""
    methods = list(dict.fromkeys(maps.method))
    figure, axes = plt.subplots(2, 3, sharex=True, sharey=True)
    for ax, method in zip(axes.flat, methods, strict=True):
        grid = (maps[maps.method == method].pivot(index="layer", columns="step", values="decision") == "reuse").astype(
            int
        )
        ax.pcolormesh(grid.columns, grid.index, grid.values, cmap=ListedColormap([COMPUTE, REUSE]), vmin=0, vmax=1)
        ax.set_title(f"{method}: {grid.values.mean():.0%} reused", size=17)
        ax.grid(False)
    for ax in axes[1]:
        ax.set_xlabel("denoising step")
    for ax in axes[:, 0]:
        ax.set_ylabel("layer")
    headline(figure, "Six schedules, six different runs (orange: reused, at most three steps in a row)")
    return save(run, "slide08_layer_step_maps", figure, maps)


def slide08_quality_against_macs(run: Run, schedules: pd.DataFrame) -> Figure:
    """PSNR against MACs saved: schedules and reuse targets, and the plainest rival, fewer steps."""
    figure, axes = plt.subplots()
    table = schedules.assign(kind=[m.split(", ")[-1] if ", " in m else "fewer steps" for m in schedules.method])
    for kind, color, marker in (("kv", BLUE, "o"), ("output", ACCENT, "D"), ("fewer steps", GREY, "X")):
        part = table[table.kind == kind]
        axes.scatter(part.macs_speedup, part.psnr, color=color, marker=marker, s=170, zorder=3,
                     label=kind if kind == "fewer steps" else f"reuse of {kind}")  # fmt: skip
        offset = (10, -5) if kind == "kv" else (10, 6)  # the points of kv are near each other
        for row in part.itertuples():
            text, place = row.method.split(",")[0], (row.macs_speedup, row.psnr)
            axes.annotate(text, place, offset, textcoords="offset points", size=13, color=color)
    axes.set(xlabel="MACs: full compute / this (×, further right is cheaper)", ylabel="PSNR to full compute (dB)")
    axes.margins(0.12)
    axes.legend()
    rival = table[table.kind == "fewer steps"].sort_values("macs_speedup")
    ours = table[table.kind != "fewer steps"]
    ahead = int((ours.psnr > np.interp(ours.macs_speedup, rival.macs_speedup, rival.psnr)).sum())
    axes.set_title(f"{ahead} of {len(ours)} attention-only schedules beat fewer steps at equal MACs")
    return save(run, "slide08_quality_against_macs", figure, schedules)


PSEUDOCODE = """\
controller = DQARController(num_layers=28, config)
for step in range(total_steps):
    controller.begin_step(step, total_steps, snr)
    for layer_id in range(num_layers):
        decision = controller.should_reuse(
            layer_id, branch)
        if decision.use_cache:
            K = decision.entry.k.dequantize()
            V = decision.entry.v.dequantize()
            controller.reuse(decision.entry)
            Q = fresh query
        else:
            Q, K, V = fresh projections
            controller.commit(layer_id, branch,
                keys=K, values=V, entropy=H)
        output = softmax(Q @ K.T / sqrt(d)) @ V"""


def slide09_controller(run: Run, gated: pd.DataFrame) -> Figure:
    """The controller's calls, and what it answered at every site of a real run."""
    figure, (left, right) = plt.subplots(1, 2, width_ratios=(1.08, 1))
    left.axis("off")
    left.add_patch(FancyBboxPatch((0, 0), 1, 1, boxstyle="round,pad=0.01", fc="#F3F5F7", ec="none"))
    left.text(0.02, 0.97, PSEUDOCODE, family="DejaVu Sans Mono", size=12.6, va="top", linespacing=1.5)
    left.set(xlim=(-0.02, 1.02), ylim=(-0.02, 1.02))
    left.set_title("What is called")
    method = "calibrated, kv"
    table = gated[(gated.method == method) & (gated.branch == "cond") & (gated.run == gated.run.min())]
    reasons = ["reuse", "entropy", "snr", "streak", "no cache", "schedule"]
    colors = [REUSE, BLUE, COMPUTE, GREEN, "#222222", "#FFFFFF"]
    grid = table.pivot(index="layer", columns="step", values="reason").map(reasons.index)
    right.pcolormesh(
        grid.columns, grid.index, grid.values, cmap=ListedColormap(colors), vmin=-0.5, vmax=len(reasons) - 0.5
    )
    present = [i for i in range(len(reasons)) if (grid.values == i).any()]
    handles = [plt.Rectangle((0, 0), 1, 1, fc=colors[i], ec=GREY) for i in present]
    names = {"reuse": "reused", "streak": "limit of 3 in a row", "snr": "SNR outside", "entropy": "entropy too high"}
    right.legend(handles, [names.get(reasons[i], reasons[i]) for i in present], fontsize=13, ncols=2,
                 loc="upper center", bbox_to_anchor=(0.5, -0.16))  # fmt: skip
    right.grid(False)
    right.set(xlabel="denoising step", ylabel="layer")
    right.set_title("What it answered")
    share = (table.decision == "reuse").mean()
    headline(figure, f"Every decision has a reason: {share:.0%} of the sites of this run were reused")
    return save(run, "slide09_controller", figure, gated)


def slide10_architecture(run: Run) -> Figure:
    """The package as it is: modules by level, arrows from the code's own imports."""
    graph = architecture.import_graph()
    core = {"plan", "config", "stats", "kernels", "scheduler", "quantizer", "cache", "policy", "trace", "controller"}
    core |= {"attention", "forecast", "families", "gate", "modulations", "noise", "run", "sites", "takeover"}
    inner = {name: graph[name] & core for name in sorted(core)}
    outer = {name: graph[name] - core for name in graph.keys() - core}
    figure, panels = plt.subplots(1, 2, width_ratios=(3, 4))
    for axes, own, color, size in zip(panels, (inner, outer), (ACCENT, BLUE), (14, 14), strict=True):
        place = _places(architecture.levels(own))
        axes.axis("off")
        axes.set(xlim=(0, 1), ylim=(-0.8, max(y for _, y in place.values()) + 0.5))
        for name, (x, y) in place.items():
            axes.text(x, y, name, ha="center", va="center", size=size, weight="bold", zorder=2, color="white",
                      bbox={"boxstyle": "round,pad=0.4", "fc": color, "ec": "white"})  # fmt: skip
        if own is inner:  # the others' arrows would hide more than they show
            for name, imports in inner.items():
                # An import that another one implies is left out, as in every layered picture.
                implied = {deeper for other in imports for deeper in _below(inner, other)}
                for other in imports - implied:
                    arrow = {"arrowstyle": "->", "color": GREY, "lw": 2, "shrinkA": 20, "shrinkB": 20}
                    axes.annotate("", place[other], place[name], zorder=1, arrowprops=arrow)
    panels[0].set_title(f"The core: {len(inner)} modules", size=18)
    panels[1].set_title(f"Around it: {len(outer)}, importing only downwards", size=18)
    known = sorted(name for name, imports in graph.items() if name in core and imports - core)
    text = f"but for {', '.join(known)} " if known else ""
    headline(figure, f"{len(graph)} modules, no circle: {text}the core imports nothing that measures, draws or trains")
    return save(run, "slide10_architecture", figure, pd.DataFrame())


def _places(levels: dict[str, int]) -> dict[str, tuple[float, float]]:
    """x from 0 to 1, and the level as y; every second one of a crowded row, and of lone ones, makes room."""
    place = {}
    for j in range(max(levels.values()) + 1):
        row = sorted(name for name in levels if levels[name] == j)
        for i, name in enumerate(row):
            aside = 0.17 * (-1) ** j if len(row) == 1 else 0
            place[name] = ((i + 0.5) / len(row) + aside, j - 0.5 * (i % 2 and len(row) > 3))
    return place


def slide11_configuration(run: Run) -> Figure:
    """Slide 11's configuration table beside this run's."""
    profile, source = run.profile, provenance(run.profile, run.seed)
    transformer = experiments.transformer_facts(run)
    rows = [
        ("Model", "DiT-XL/2 (28 layers, 675M params)", transformer["model"]),
        ("Hardware", "NVIDIA A100 80GB", f"{source['device']}, {source['threads']} threads, {source['dtype']}"),
        (
            "Dataset",
            "COCO-2017 validation (128 prompts)",
            f"{transformer['classes']} class labels, {profile.num_samples} images",
        ),
        ("Resolution", "256×256", transformer["resolution"]),
        ("Sampler", "DPM-Solver++ (50 steps)", f"{profile.scheduler} ({profile.num_inference_steps} steps)"),
        ("CFG scale", "7.5", f"{profile.guidance_scale:g}"),
        ("Batch size", "1", f"{profile.batch_size} (timing: 4)"),
        (
            "Baselines",
            "FP16 DiT; static reuse; PTQ4DiT",
            "FP32, FP16, BF16; every 2nd step; W8A8 with and without CSB; fewer steps",
        ),
        ("Metrics", "ms/step; MB RSS; reuse events; FID", "the same, with FD-digits for FID; MACs, PSNR, SSIM, class"),
    ]
    table = pd.DataFrame(rows, columns=["Parameter", "The deck", f"This run ({profile.name})"])
    return save_table(run, "slide11_configuration", "What the deck ran, and what was run here", table, [14, 38, 58])


def slide12_gates(run: Run, gates: pd.DataFrame) -> Figure:
    """What the gates cost and save on this model, in one table."""
    table = pd.DataFrame(
        {
            "Gate": gates.method,
            "Sites reused": gates.sites_reused.map("{:.1%}".format),
            "PSNR (dB)": gates.psnr.map(lambda x: "identical" if np.isinf(x) else f"{x:.1f}"),
            "MAC speedup": gates.macs_speedup.map("{:.2f}×".format),
            "Speedup (quartiles)": [
                f"{r.speedup:.2f}× ({r.speedup_low:.2f} to {r.speedup_high:.2f})" for r in gates.itertuples()
            ],
            "ms/step": gates.ms_per_step.map("{:.1f}".format),
        }
    )
    return save_table(
        run, "slide12_gates", "The gate, measured beside full compute", table, [24, 14, 12, 14, 28, 10], gates
    )


def slide14_temporal_evolution(run: Run, sites: pd.DataFrame, gated: pd.DataFrame) -> Figure:
    """Entropy, SNR and reuse events by step, beside slide 14's."""
    figure, axes = plt.subplots(3, 1, sharex=True)
    by_step = sites.groupby("step")[["entropy", "snr"]].mean()
    for ax, column, label in ((axes[0], "entropy", "entropy (nats)"), (axes[1], "snr", "SNR")):
        ax.plot(by_step.index, by_step[column], color=BLUE, lw=4, label="measured")
        ax.plot(SLIDE14.step, SLIDE14[column], color=GREY, lw=2, ls=":", marker="o", ms=6, label="the deck's claim")
        ax.set_ylabel(label)
    axes[1].set_yscale("log")
    axes[1].axhspan(0.5, 50, color=ACCENT, alpha=0.12, lw=0)
    axes[0].legend(loc="lower left", fontsize=13)
    per_image = gated.groupby(["method", "step"]).apply(
        lambda g: (g.decision == "reuse").sum() / g.run.nunique(), include_groups=False
    )
    calibrated, deck = per_image["calibrated, kv"], per_image["deck's gate, kv"]
    axes[2].bar(calibrated.index, calibrated, color=ACCENT, label="calibrated gate")
    axes[2].plot(deck.index, deck, color="#222222", lw=3, label=f"the deck's gate: {deck.sum():.0f} in all")
    axes[2].plot(SLIDE14.step, SLIDE14.events, color=GREY, lw=2, ls=":", marker="o", ms=6)
    axes[2].set(xlabel="denoising step", ylabel="reuse events")
    axes[2].legend(loc="upper left", fontsize=14)
    figure.align_ylabels(axes)
    change = by_step.entropy.iloc[-1] - by_step.entropy.iloc[0]
    falls = (by_step.entropy.diff().dropna() <= 0).mean()
    headline(
        figure,
        f"Entropy moves by {change:+.2f} nats and falls in {falls:.0%} of the steps; reuse peaks at step "
        f"{int(calibrated.idxmax())}",
    )
    return save(run, "slide14_temporal_evolution", figure, sites)


def slide14_table(run: Run, sites: pd.DataFrame, gated: pd.DataFrame) -> Figure:
    """Slide 14's table with the measured columns beside the claimed ones."""
    last = run.profile.num_inference_steps - 1
    by_step = sites.groupby("step")[["entropy", "snr"]].mean()
    reuse = gated[gated.decision == "reuse"]
    rows = []
    for claim in SLIDE14.itertuples():
        step = min(claim.step, last)
        events = [
            f"{(reuse[(reuse.method == m) & (reuse.step == step)].groupby('run').size().mean()):.0f}"
            if len(reuse[(reuse.method == m) & (reuse.step == step)])
            else "0"
            for m in ("deck's gate, kv", "calibrated, kv")
        ]
        measured = (f"{by_step.entropy[step]:.2f}", f"{by_step.snr[step]:.3g}")
        rows.append((step, claim.entropy, measured[0], claim.snr, measured[1], claim.events, *events))
    columns = [
        "step",
        "H claimed",
        "H measured",
        "SNR claimed",
        "SNR measured",
        "events claimed",
        "deck's gate",
        "calibrated",
    ]
    table = pd.DataFrame(rows, columns=columns).drop_duplicates("step")
    title = f"Slide 14, claimed and measured (the last step of {last + 1} is number {last})"
    return save_table(run, "slide14_table", title, table.astype(str), [7, 13, 13, 14, 15, 16, 14, 13], sites)


def slide04_head_map(run: Run, heads: pd.DataFrame) -> Figure:
    """Entropy of every head, layer by layer, over the run."""
    table = heads[heads.branch == "cond"]
    count = table["head"].nunique()
    figure, axes = plt.subplots(1, count, sharey=True)
    low, high = table.entropy.min(), table.entropy.max()
    for head, ax in enumerate(np.atleast_1d(axes)):
        grid = table[table["head"] == head].pivot(index="layer", columns="step", values="entropy")
        mesh = ax.pcolormesh(grid.columns, grid.index, grid.values, vmin=low, vmax=high, cmap="cividis")
        ax.set(title=f"head {head}", xlabel="step")
        ax.grid(False)
    np.atleast_1d(axes)[0].set_ylabel("layer")
    figure.colorbar(mesh, ax=axes, label="entropy (nats)")
    between = table.groupby(["layer", "head"]).entropy.mean().std()
    within = table.groupby(["layer", "head"]).entropy.std().mean()
    headline(figure, f"Heads differ by {between:.2f} nats, steps of one head by {within:.2f} (std, cond)")
    return save(run, "slide04_head_map", figure, heads)


def slide15_overhead(run: Run, overhead: pd.DataFrame) -> Figure:
    """What one attention costs when its entropy is measured too, at DiT-XL/2's shape."""
    figure, axes = plt.subplots()
    table = overhead[overhead.method != "plain"].sort_values("cost")
    spread = [table.cost - table.cost_low, table.cost_high - table.cost]
    axes.barh(
        table.method, table.cost, xerr=spread, color=[ACCENT if m != "maps" else GREY for m in table.method], capsize=6
    )
    axes.axvline(1, color="#222222", lw=2)
    for y, row in enumerate(table.itertuples()):
        error = f", error up to {row.max_error:.1%}" if row.max_error else ", exact"
        axes.annotate(f"{row.cost:.2f}×{error}", (row.cost_high, y), (10, 0), textcoords="offset points", va="center")
    axes.set(
        xlabel="time of one attention with entropy / without (×; median, quartiles)",
        xlim=(0, table.cost_high.max() * 1.5),
    )
    fused = table.set_index("method").cost["fused entropy"]
    headline(figure, f"With exact entropy an attention takes {fused:.2f}× as long (B2 H16 N256 D72), no map kept")
    return save(run, "slide15_overhead", figure, overhead)


def samples_grid(run: Run, images: dict[str, torch.Tensor]) -> Figure:
    """The same seeds under each method, and below each its difference from full compute, five times amplified."""
    methods = list(images)
    reference = images[methods[0]]
    rows = [(m, images[m], False) for m in methods]
    rows = [
        row
        for m, x, _ in rows
        for row in ([(m, x, False)] + ([("5 × difference", x, True)] if m != methods[0] else []))
    ]
    figure, axes = plt.subplots(len(rows), len(reference), squeeze=False)
    for (name, x, is_difference), line in zip(rows, axes, strict=True):
        for image, original, ax in zip(x, reference, line, strict=True):
            picture = (0.5 + 5 * (image - original)).clamp(0, 1) if is_difference else image
            options = {"cmap": "coolwarm" if is_difference else "gray_r", "vmin": 0, "vmax": 1}
            ax.imshow(picture.permute(1, 2, 0), **options)
            ax.set(xticks=[], yticks=[])
        line[0].set_ylabel(name.replace(", ", ",\n"), rotation=0, ha="right", va="center", size=13)
    headline(figure, "Same seeds: full compute and reuse")
    return save(run, "samples", figure, pd.DataFrame())


def _below(graph: dict[str, set[str]], name: str) -> set[str]:
    return graph[name].union(*(_below(graph, other) for other in graph[name]))


def _times(series: pd.Series) -> str:
    return f"{series.iloc[-1] / series.iloc[0]:,.0f}-fold"


def _latex(table: pd.DataFrame) -> str:
    return table.style.hide(axis="index").to_latex(hrules=True).replace("%", r"\%").replace("_", r"\_")


use_style()
