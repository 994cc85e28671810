"""A drawing as an address, for a Markdown page that has no files beside it."""

from __future__ import annotations

import base64

_BACKGROUND = "#ffffff"


def as_data_uri(svg: str) -> str:
    """The SVG on white paper, as the address of a picture."""
    body = svg[svg.index("<svg") :]
    end = body.index(">") + 1
    paper = f'{body[:end]}<rect width="100%" height="100%" fill="{_BACKGROUND}"/>{body[end:]}'
    return "data:image/svg+xml;base64," + base64.b64encode(paper.encode("utf-8")).decode("ascii")
