"""The data card: what a mixture is made of, what was thrown out and why, as one HTML page and one markdown document.

    inputs = built_data(recipe, store)        # built.py: manifests and objects of what has been built so far
    card = render_card(inputs)                # sections.py and below: tables, figures, samples
    card.html, card.markdown

Map
    built.py      recipe + store -> CardInputs            parts.py      tables, notes, figures, samples; their markdown
    ledger.py     what the removal ledger tells           measures.py   lengths, turns, samples, from the mixture and the blocks
    figures.py    SVG                                     sections.py   CardInputs -> sections; mixing.py the later half of them

A card is a view: it is no stage, and its bytes depend on the objects and manifests alone.  A stage that has not been built is named, and
its sections are left out.  Everything that comes from rows is escaped, in both forms.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from pesc.data.card.built import DATA_STAGES, CardInputs, SourceFacts, built_data

__all__ = ["DATA_STAGES", "Card", "CardInputs", "SourceFacts", "built_data", "render_card", "write_card"]


@dataclass(frozen=True)
class Card:
    """The forms of a data card."""

    html: str
    """Self-contained: no script, no network."""
    markdown: str
    embedded: str
    """Markdown with the figures in it and the samples folded, for a page that has no files beside it (the Prefect UI)."""


def render_card(inputs: CardInputs) -> Card:
    """Every form.  Raises DataError when an object lacks the files that its stage writes."""
    from pesc.data.card.parts import page_html, page_markdown
    from pesc.data.card.sections import headline, sections_of

    sections = sections_of(inputs)
    title, lead, facts = headline(inputs)
    embedded = page_markdown(title, lead, facts, sections, is_embedded=True)
    return Card(page_html(title, lead, facts, sections), page_markdown(title, lead, facts, sections), embedded)


def write_card(inputs: CardInputs, out: Path) -> tuple[Path, Path]:
    """Write card.html and card.md below `out` (made if need be); returns their paths.

    Raises DataError as `render_card` does, and for a directory that cannot be written.
    """
    from pesc.errors import DataError
    from pesc.store.disk import write_atomic

    card = render_card(inputs)
    page, text = out / "card.html", out / "card.md"
    try:
        write_atomic(page, card.html.encode())
        write_atomic(text, card.markdown.encode())
    except OSError as error:
        raise DataError(f"The data card cannot be written to {out} ({error.strerror}). Give another directory.") from None
    return page, text
