"""The artifact of a routing: its table and its pictures, in one text that needs no file."""

import base64
import re
from dataclasses import replace
from uuid import uuid4

import numpy as np

from pesc import pipeline
from pesc.plan import Selection
from pesc.routing.config import RoutingConfig
from pesc.routing.measures import measure
from pesc.routing.results import write_result
from pesc.run import run_recipe
from pesc.stage import BuildResult
from tasks import reporting
from tasks.reporting import artifacts
from tests.routing.builders import make_observation


def build_routing(ctx):
    draw = np.random.default_rng(1)
    chosen = np.stack([draw.permutation(6)[:2] for _ in range(120)])
    seen = make_observation([chosen, chosen], np.repeat(np.arange(12), 10), np.arange(12) % 3)
    write_result(ctx.out, measure(seen, RoutingConfig(permutations=99)))
    (ctx.out / "data.json").write_text("{}")  # the fake of the report reads it
    return BuildResult()


def test_a_routing_is_an_artifact_with_its_pictures(fakes, store, tiny_recipe, monkeypatch):
    stage = replace(pipeline._BY_NAME["routing"], builder="tests.tasks.test_routing:build_routing")
    monkeypatch.setitem(pipeline._BY_NAME, "routing", stage)
    outcome = run_recipe(tiny_recipe(), store, Selection(until=("routing[pesc]",)))["routing[pesc]"]
    shown = {}
    monkeypatch.setattr(artifacts, "create_markdown_artifact", lambda text, key, **_: shown.update({key: text}) or uuid4())
    reporting.publish_routing(store, outcome)
    (text,) = shown.values()
    assert set(shown) == {"routing-pesc-experts-tiny"}
    assert "120 tokens of 12 rows" in text
    pictures = re.findall(r"!\[(\w+)\]\(data:image/svg\+xml;base64,([^)]+)\)", text)
    assert [name for name, _ in pictures] == ["domains", "load", "pairs", "specialisation"]
    assert all(b"<svg" in base64.b64decode(data) for _, data in pictures)
