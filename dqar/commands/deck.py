"""``dqar deck``: a PowerPoint file and a PDF of the deck's slides, from figures that are drawn already."""

from __future__ import annotations

from pathlib import Path

from dqar.commands.parser import Parser
from dqar.figures.deck import Look, write_deck, write_pdf
from dqar.figures.gallery import NOTEBOOKS


def run(arguments: list[str]) -> int:
    """Writes ``deck.pptx`` and ``deck.pdf``; returns 0.

    Raises:
        ValueError: an argument isn't accepted.
        OSError: a figure is missing, or ``--out`` can't be written.
        RuntimeError: LibreOffice, which makes the PDF, isn't installed or fails; ``deck.pptx`` is written.
    """
    parser = Parser("deck", "Makes deck.pptx, with editable titles, tables, charts and notes, and deck.pdf.")
    parser.add_argument("--slide", type=int, action="append", metavar="N", help="only this slide; may be repeated")
    parser.add_argument("--dark", action="store_true", help="light on dark")
    parser.add_argument("--transparent", action="store_true", help="no backgrounds, for a template of your own")
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder to write to (default: out)")
    parser.add_argument("--figures", type=Path, default=NOTEBOOKS.parent / "figures", help="folder of the figures")
    options = parser.parse_args(arguments)
    deck = options.out / "deck.pptx"
    write_deck(options.figures, deck, options.slide, Look(options.dark, options.transparent))
    print(f"{deck}: {len(set(options.slide)) if options.slide else 'all'} slides")
    print(write_pdf(deck))
    return 0
