"""What a card consists of, and its two forms: an HTML page through a template, and markdown.

A table cell is text; what follows its first line break is shown smaller (HTML) or in brackets (markdown).
"""

from __future__ import annotations

import re
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass, field

from pesc.data_uri import as_data_uri

_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")
_MARKUP = re.compile(r"([\\`*_\[\]#|~])")
_NARROW = 76
"""Characters of a line in a code block of the Prefect UI."""
CLIP = 1200
"""Characters of a text shown."""


@dataclass(frozen=True)
class Note:
    """A sentence or two."""

    text: str


@dataclass(frozen=True)
class Table:
    """Rows of cells; columns from `words` on hold numbers and are aligned to the right."""

    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    words: int = 1
    title: str = ""


@dataclass(frozen=True)
class Figure:
    """An SVG drawing; markdown shows its caption alone."""

    name: str
    svg: str
    caption: str


@dataclass(frozen=True)
class Texts:
    """Labelled texts under a summary line, folded on the page."""

    summary: str
    texts: Sequence[tuple[str, str]]


Part = Note | Table | Figure | Texts


@dataclass(frozen=True)
class Section:
    """A heading and what is below it."""

    anchor: str
    title: str
    parts: Sequence[Part] = field(default_factory=tuple)


def clip(text: str, length: int = CLIP) -> str:
    """The start of a text, without characters that steer a terminal or turn the reading direction."""
    text = _CONTROL.sub("\ufffd", text.replace("\r\n", "\n"))
    return text if len(text) <= length else f"{text[:length].rstrip()} … ({len(text) - length:,} more characters)"


def one_line(text: str, length: int = 90) -> str:
    """The start of a text on one line."""
    line = " ".join(_CONTROL.sub("\ufffd", text).split())
    return line if len(line) <= length else line[: length - 1] + "…"


def count(value: object) -> str:
    """`1,234`; a dash for nothing."""
    return f"{value:,}" if isinstance(value, int) else "–" if value is None else str(value)


def share(part: float, whole: float) -> str:
    """`12.3 %`; very small shares keep a digit that is not 0."""
    if not whole:
        return "–"
    percent = 100 * part / whole
    return f"{percent:.1f} %" if percent >= 0.05 or not percent else f"{percent:.2g} %"


def page_html(title: str, lead: str, facts: Sequence[tuple[str, str, str]], sections: Sequence[Section]) -> str:
    """The self-contained page.  facts: (what, value, remark) at its top."""
    from markupsafe import Markup

    from pesc.figures import inline, page_environment

    environment = page_environment("pesc.data.card")
    environment.filters["drawing"] = lambda figure: Markup(inline(figure.svg, figure.name, f"figure: {figure.name}"))
    environment.tests["part"] = lambda part, name: type(part).__name__ == name
    return environment.get_template("card.html.j2").render(title=title, lead=lead, facts=facts, sections=sections)


def page_markdown(
    title: str, lead: str, facts: Sequence[tuple[str, str, str]], sections: Sequence[Section], is_embedded: bool = False
) -> str:
    """The same as markdown.  is_embedded: figures are in it, and samples are folded."""
    lines = [f"# {escape(title)}", "", escape(lead), ""]
    lines += [*(f"- **{escape(name)}**: {escape(value)}{f' ({escape(remark)})' if remark else ''}" for name, value, remark in facts), ""]
    for section in sections:
        lines += [f"## {escape(section.title)}", ""]
        for part in section.parts:
            lines += [*(_embedded(part) if is_embedded else _markdown(part)), ""]
    return "\n".join(lines).rstrip("\n") + "\n"


def escape(text: str) -> str:
    """Text that means nothing to markdown or HTML."""
    text = text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return _MARKUP.sub(r"\\\1", text)


def _markdown(part: Part) -> list[str]:
    match part:
        case Note(text):
            return [escape(text)]
        case Figure():
            return [f"*{escape(part.caption)} (drawn on the page)*"]
        case Texts(summary, texts):
            shown = (["", f"{escape(label)}:", "", *_fenced(text)] for label, text in texts)
            return [f"**{escape(summary)}**", *(line for lines in shown for line in lines)]
        case Table():
            cells = [["---" if column < part.words else "--:" for column in range(len(part.header))]]
            cells = [[escape(cell) for cell in part.header], *cells, *([_cell(cell) for cell in row] for row in part.rows)]
            title = [f"### {escape(part.title)}", ""] if part.title else []
            return [*title, *("| " + " | ".join(row) + " |" for row in cells)]


def _embedded(part: Part) -> list[str]:
    match part:
        case Figure(name, svg, caption):
            return [f"![{escape(name)}]({as_data_uri(svg)})", "", f"*{escape(caption)}*"]
        case Texts(summary, texts):
            shown = ([f"{escape(label)}:", "", *_fenced(_wrapped(text)), ""] for label, text in texts)
            return [f"<details><summary>{escape(summary)}</summary>", "", *(line for lines in shown for line in lines), "</details>"]
        case _:
            return _markdown(part)


def _wrapped(text: str) -> str:
    """Lines that a narrow page shows whole."""
    return "\n".join("\n".join(textwrap.wrap(line, _NARROW, replace_whitespace=False)) or "" for line in text.split("\n"))


def _cell(text: str) -> str:
    first, *rest = [line for line in text.split("\n") if line] or [""]
    return escape(f"{first} ({'; '.join(rest)})" if rest else first)


def _fenced(text: str) -> list[str]:
    """A code block that its text cannot end."""
    longest = max(map(len, re.findall(r"`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return [f"{fence}text", text, fence]
