"""A graph of actions as Mermaid draws it, small enough to be read in the UI.

Actions that stand for the same thing are one box (`download × 4`, `evaluate[pesc] × 3`), and an arrow that a longer way implies is left out.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

Edges = Mapping[str, Iterable[str]]
"""Address -> addresses that it reads."""


def draw_graph(edges: Edges, notes: Mapping[str, str] | None = None, marked: Iterable[str] = ()) -> str:
    """A fenced Mermaid graph, top to bottom, in the order of `edges`.  notes: a second line in the box of an action that stands alone."""
    edges = {address: [source for source in sources if source in edges] for address, sources in edges.items()}
    groups = _groups(edges)
    members: dict[str, list[str]] = {}
    for address in edges:
        members.setdefault(groups[address], []).append(address)
    arrows = _without_detours({
        group: list(dict.fromkeys(groups[source] for address in inside for source in edges[address] if groups[source] != group))
        for group, inside in members.items()
    })  # fmt: skip
    names, bold = {group: f"n{number}" for number, group in enumerate(members)}, set(marked)
    lines = ["```mermaid", "graph TB", "  classDef run stroke-width:3px,stroke:#d97706"]
    for group, inside in members.items():
        mark = ":::run" if bold.intersection(inside) else ""
        lines.append(f'  {names[group]}["{_label(inside, notes or {})}"]{mark}')
        lines += [f"  {names[source]} --> {names[group]}" for source in arrows[group]]
    return "\n".join([*lines, "```"])


def _groups(edges: Edges) -> dict[str, str]:
    """Address -> the group that it is drawn with: downloads by the stages that read them, benchmarks by their arm, all others alone."""
    readers: dict[str, set[str]] = {address: set() for address in edges}
    for address, sources in edges.items():
        for source in sources:
            readers[source].add(_stage(address))
    found = {}
    for address in edges:
        if _stage(address) == "download":
            found[address] = f"download {sorted(readers[address])}"
        elif _stage(address) == "evaluate":
            found[address] = f"{address.partition('/')[0].rstrip(']')}]"
        else:
            found[address] = address
    return found


def _stage(address: str) -> str:
    return address.partition("[")[0]


def _label(inside: list[str], notes: Mapping[str, str]) -> str:
    if len(inside) == 1:
        note = notes.get(inside[0], "")
        return f"{inside[0]}<br/>{note}" if note else inside[0]
    arm = inside[0].partition("[")[2].partition("/")
    name = f"{_stage(inside[0])}[{arm[0]}]" if arm[1] else _stage(inside[0])
    return f"{name} × {len(inside)}"


def _without_detours(arrows: dict[str, list[str]]) -> dict[str, list[str]]:
    """The arrows that no longer way implies.  `arrows` has no circle."""
    above: dict[str, set[str]] = {}

    def ancestors(group: str) -> set[str]:
        if group not in above:
            above[group] = set().union(*({source} | ancestors(source) for source in arrows[group]))
        return above[group]

    return {
        group: [source for source in sources if not any(source in ancestors(other) for other in sources if other != source)]
        for group, sources in arrows.items()
    }
