"""The graph of a recipe as the UI draws it: few boxes, no arrow that a longer way implies."""

from __future__ import annotations

import re

from hypothesis import given
from hypothesis import strategies as st

from pesc.pipeline import build_graph
from pesc.recipe import load_recipe
from tasks.reporting.drawing import draw_graph


def read(text: str) -> tuple[dict[str, str], set[tuple[str, str]]]:
    """Label by name, and the arrows as pairs of labels."""
    labels = dict(re.findall(r'^  (n\d+)\["([^"]+)"\]', text, flags=re.MULTILINE))
    arrows = re.findall(r"^  (n\d+) --> (n\d+)$", text, flags=re.MULTILINE)
    return labels, {(labels[source], labels[target]) for source, target in arrows}


def edges_of(name: str) -> dict[str, list[str]]:
    return {node.address: list(node.inputs.values()) for node in build_graph(load_recipe(name)).nodes}


def test_the_demo_s_twenty_four_actions_are_sixteen_boxes():
    labels, arrows = read(draw_graph(edges_of("demo")))
    assert sorted(labels.values()) == sorted([
        "download[smollm2]", "download × 2", "download × 2", "dedup", "mix", "tokenize", "upcycle[pesc]", "train[pesc]", "merge[pesc]", "evaluate[pesc] × 3",
        "routing[pesc]", "train[qlora]", "merge[qlora]", "evaluate[qlora] × 3", "evaluate[base] × 3", "report",
    ])  # fmt: skip
    assert {target for source, target in arrows if source == "tokenize"} == {"train[pesc]", "train[qlora]"}
    assert {source for source, target in arrows if target == "report"} == {
        "evaluate[pesc] × 3", "evaluate[qlora] × 3", "evaluate[base] × 3", "routing[pesc]"
    }  # fmt: skip


def test_what_will_run_is_marked_and_a_box_of_its_own_has_its_note():
    text = draw_graph({"mix": [], "tokenize": ["mix"]}, {"mix": "3f2a91bc"}, ["tokenize"])
    assert '["mix<br/>3f2a91bc"]\n' in text
    assert '["tokenize"]:::run' in text
    assert text.startswith("```mermaid\ngraph TB\n")
    assert text.endswith("\n```")


def test_inputs_that_are_not_shown_have_no_arrow():
    assert read(draw_graph({"mix": ["dedup"]})) == ({"n0": "mix"}, set())


@given(st.lists(st.lists(st.integers(0, 7), max_size=4), min_size=1, max_size=8))
def test_the_arrows_left_lead_wherever_all_of_them_led(reads):
    names = [f"s{number}" for number in range(len(reads))]
    edges = {name: [names[i] for i in chosen if i < number] for number, (name, chosen) in enumerate(zip(names, reads, strict=True))}
    _, arrows = read(draw_graph(edges))
    assert reachable(arrows) == reachable({(source, name) for name, sources in edges.items() for source in sources})
    for arrow in arrows:
        assert reachable(arrows - {arrow}) != reachable(arrows), "one that says nothing"


def reachable(arrows: set[tuple[str, str]]) -> set[tuple[str, str]]:
    known = set(arrows)
    while True:
        more = {(a, d) for a, b in known for c, d in known if b == c} - known
        if not more:
            return known
        known |= more
