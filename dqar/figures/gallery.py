"""The committed pictures: which of them changed, and their gallery, slide by slide."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import nbformat

from dqar.figures.style import shows_the_same, words_of

NOTEBOOKS = Path(__file__).parents[2] / "notebooks"
PICTURES = (".png", ".gif")

CLAIMS = {
    # slide: its subject, and what the deck says there
    4: ("Entropy and SNR", "the formulas of attention entropy and SNR"),
    5: ("Reuse gate", "reuse where H < τ(p) and the SNR is in [0.5, 50]; τ(8) ≈ 2.0"),
    6: ("Quantized cache", "INT8 halves the cache of FP16; K in FP16 with V in INT8 as an option"),
    7: ("Learned policy", "a network of fewer than 0.5 M parameters, labelled by FID"),
    8: ("Layer schedule", "shallow layers stabilise first, deep ones last"),
    9: ("Controller", "the controller's loop"),
    10: ("Architecture", "a controller above policy, scheduler, stats, cache and quantizer"),
    11: ("Set-up", "DiT-XL/2 on an A100, COCO prompts, DPM-Solver++ in 50 steps"),
    12: ("Results", "−23.2 % time, −18.1 % memory, +0.6 FID, 47 reuses a run"),
    13: ("Quality", "FID 10.8 against 10.2; zero reuse in steps 0 to 15"),
    14: ("Over time", "entropy falls from 4.8 to 0.8, SNR grows from 0.1 to 201.5, reuse peaks at step 30"),
    15: ("Challenges", "five problems and their solutions"),
    16: ("Future work", "six directions"),
    17: ("Conclusions", "unified, principled, 23 % faster, drop-in, open"),
}


def publish(drawn: Path, committed: Path) -> list[str]:
    """Copies to ``committed`` what shows something else than what is there, and writes the gallery.

    A picture with the same pixels and words keeps its files, and so the date and commit of when it was first drawn.

    Returns:
        The files that were written, as paths below ``committed``.
    """
    changed = []
    for path in sorted(path for path in drawn.rglob("*") if path.is_file()):
        target = committed / path.relative_to(drawn)
        picture = next((path.with_suffix(kind) for kind in PICTURES if path.with_suffix(kind).exists()), None)
        if path.suffix in (*PICTURES, ".svg", ".json") and picture is not None:
            same = shows_the_same(target.with_suffix(picture.suffix), picture.read_bytes(), words_of(picture))
        else:
            same = target.exists() and target.read_bytes() == path.read_bytes()
        if not same or not target.exists():
            changed.append((path, target))
    for path, target in changed:
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, target)
    if any(committed.rglob("*.png")):
        (committed / "README.md").write_text(gallery(committed))
    return [str(target.relative_to(committed)) for _, target in changed]


def gallery(folder: Path) -> str:
    """Markdown: each slide's picture, what the deck claims, what was measured, and the command that draws it."""
    lines = [
        "# Figures",
        "",
        "Written by `dqar workbook --figures figures`; don't edit. `deck/` has one picture a slide, `appendix/` the"
        " rest. Beside each PNG lie an SVG, a JSON file (title, alternative text, hardware, seed, commit) and, for"
        " tables, Markdown and LaTeX. `dqar deck` makes a PowerPoint file of `deck/`.",
        "",
        "| slide | picture | the deck claims | measured | command |",
        "| --- | --- | --- | --- | --- |",
    ]
    for slide, (subject, claim) in CLAIMS.items():
        path = folder / f"deck/slide{slide:02}.png"
        if path.exists():
            said = words_of(path)
            picture = f"[<img src='deck/{path.name}' width='320' alt='{_quoted(said['alt'])}'>](deck/{path.name})"
            lines.append(f"| {slide}: {subject} | {picture} | {claim} | {said['title']} | {_command(path.stem)} |")
    lines += ["", "## Appendix", "", "| picture | finding | command |", "| --- | --- | --- |"]
    for path in sorted(path for path in (folder / "appendix").iterdir() if path.suffix in PICTURES):
        link = f"[{path.stem}](appendix/{path.name})"
        lines.append(f"| {link} | {words_of(path)['title']} | {_command(path.stem)} |")
    return "\n".join(lines) + "\n"


def _command(name: str) -> str:
    """The command of the notebook that draws ``name``; where several do, of the first."""
    for path in sorted(NOTEBOOKS.glob("[0-9]*.ipynb")):
        code = "\n".join(cell.source for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code")
        drawn = re.findall(r"\.(slide\d\d\w*|samples|denoising)\(", code)
        if name in drawn or any(
            name.startswith(f"{function}_") and len(function) > len("slide00") for function in drawn
        ):
            return f"`dqar workbook --only {path.name[:2]}`"
    return ""


def _quoted(text: str) -> str:
    return text.replace("'", "’").replace("|", "/")
