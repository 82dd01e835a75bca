"""The committed pictures: which of them changed, and their gallery, slide by slide."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import nbformat

from dqar.figures.style import CLAIMS, says_the_same, shows_the_same, words_of

NOTEBOOKS = Path(__file__).parents[2] / "notebooks"
PICTURES = (".png", ".gif")


def publish(drawn: Path, committed: Path) -> list[str]:
    """Copies to ``committed`` what shows something else than what is there, and writes the gallery.

    A picture with the same pixels and words keeps its files, and so the commit that it was first drawn at. One that
    says that something isn't measured yet has no title, and stays where it was drawn.

    Returns:
        The files that were written, as paths below ``committed``.
    """
    changed = []
    gaps = {path.with_suffix("") for path in drawn.rglob("*.json") if not words_of(path)["title"]}
    for path in sorted(path for path in drawn.rglob("*") if path.is_file() and path.with_suffix("") not in gaps):
        target = committed / path.relative_to(drawn)
        picture = next((path.with_suffix(kind) for kind in PICTURES if path.with_suffix(kind).exists()), None)
        if path.suffix == ".json" and picture is None:  # of a table that isn't drawn
            same = says_the_same(target, words_of(path))
        elif path.suffix in (*PICTURES, ".svg", ".json") and picture is not None:
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
    commands = _commands()
    lines = [
        "# Figures",
        "",
        "Written by `dqar workbook --figures figures`; don't edit. `deck/` has one picture a slide, `appendix/` the"
        " rest. Beside each PNG lie an SVG, a JSON file (title, alternative text, hardware, seed, the commits that it"
        " was measured and drawn at) and, for tables, Markdown and LaTeX. `dqar deck` makes a PowerPoint file of"
        " `deck/`.",
        "",
        "| slide | picture | the deck claims | measured | command |",
        "| --- | --- | --- | --- | --- |",
    ]
    for slide, (subject, claim) in CLAIMS.items():
        path = folder / f"deck/slide{slide:02}.png"
        if path.exists():
            said = words_of(path)
            picture = f"[<img src='deck/{path.name}' width='320' alt='{_quoted(said['alt'])}'>](deck/{path.name})"
            lines.append(
                f"| {slide}: {subject} | {picture} | {claim} | {said['title']} | {_command(path.stem, commands)} |"
            )
    lines += ["", "## Appendix", "", "| picture | finding | command |", "| --- | --- | --- |"]
    for path in _listed(folder / "appendix"):
        link = f"[{path.stem}](appendix/{path.name})"
        lines.append(f"| {link} | {words_of(path)['title']} | {_command(path.stem, commands)} |")
    return "\n".join(lines) + "\n"


def _listed(folder: Path) -> list[Path]:
    """Pictures, and the Markdown of tables that aren't drawn, by name."""
    paths = {path.stem: path for suffix in (".md", *PICTURES) for path in folder.glob(f"*{suffix}")}
    return [paths[name] for name in sorted(paths) if (folder / f"{name}.json").exists()]


def _commands() -> dict[str, str]:
    """By figure that a notebook draws, the command; where several notebooks do, of the first."""
    commands: dict[str, str] = {}
    for path in sorted(NOTEBOOKS.glob("[0-9]*.ipynb")):
        for figure in re.findall(r"\.(slide\d\d\w*|samples|denoising)\(", code_of(path)):
            commands.setdefault(figure, f"`dqar workbook --only {path.name[:2]}`")
    return commands


def _command(name: str, commands: dict[str, str]) -> str:
    """The command that draws ``name``, which may be one of several pictures of a figure: ``<figure>_<which>``."""
    several = (figure for figure in commands if name.startswith(f"{figure}_") and len(figure) > len("slide00"))
    return commands.get(name) or commands.get(next(several, ""), "")


def code_of(notebook: Path) -> str:
    """The source of its code cells."""
    cells = nbformat.read(notebook, as_version=4).cells
    return "\n".join(cell.source for cell in cells if cell.cell_type == "code")


def _quoted(text: str) -> str:
    return text.replace("'", "’").replace("|", "/")
