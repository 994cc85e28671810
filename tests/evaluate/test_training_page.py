"""A training run as Markdown: numbers from its own records, curves as pictures that need no other file."""

from __future__ import annotations

import base64
import json
import re
import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest
from safetensors.numpy import save_file

from pesc.evaluate.training_page import count_experts, read_steps, training_markdown


@pytest.fixture
def trained(tmp_path):
    """A train object of two sparse layers of four experts, with a step left out and two looks at the held-out blocks."""
    folder = tmp_path / "object"
    folder.mkdir()
    save_file({f"model.layers.{n}.mlp.router.weight": np.zeros((4, 8), np.float32) for n in (3, 5)}, folder / "bank.safetensors")
    groups = [{"group": "router", "tensors": 2, "parameters": 64}]
    (folder / "training.json").write_text(json.dumps({"config": {"method": "pesc"}, "trainable": groups, "facts": {}}))
    lines = [{"step": s, "loss": 3.0 / s, "balance": 1.0, "experts": {"max": [0.4, 0.3], "entropy": [0.9, 1.0]}} for s in (1, 2, 3)]
    lines[1] |= {"loss": None, "skipped": "the loss is nan"}
    looks = [{"step": s, "loss": v, "domains": {"maths": {"loss": v, "tokens": 5}}} for s, v in ((0, 3.5), (3, 1.25))]
    for name, rows in (("history.jsonl", lines), ("held_out.jsonl", looks)):
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def write_events(path, *steps):
    rows = [{"event": "start"}, *({"event": "step", "step": s, "tokens_per_second": rate, "memory_bytes": 2e9} for s, rate in steps)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"event": "st\n')
    return path


def test_numbers_and_curves(trained, tmp_path):
    text = training_markdown("Training", trained, write_events(tmp_path / "events.jsonl", (1, 10.0), (2, 20.0), (2, 40.0), (3, 60.0)))
    assert "| loss of the first and the last step | 3.0000 → 1.0000 |" in text
    assert "| steps left out | 2 |" in text
    assert "| trained: router | 64 parameters |" in text
    assert "| tokens/s (median step) | 40 |" in text
    assert "| peak memory of rank 0, GB | 2.00 |" in text
    assert "| maths | 3.5000 | 1.2500 |" in text
    pictures = re.findall(r"!\[([^]]+)\]\(data:image/svg\+xml;base64,([^)]+)\)", text)
    assert [label.split(" by ")[0] for label, _ in pictures] == ["training loss", "held-out loss", "share of the busiest expert"]
    for _, data in pictures:
        root = ElementTree.fromstring(base64.b64decode(data))
        assert root.tag.endswith("svg")
        assert root[0].attrib["fill"] == "#ffffff"
    assert text == training_markdown("Training", trained, tmp_path / "events.jsonl")


def test_a_run_without_events_or_routers_has_what_it_has(trained, tmp_path):
    (trained / "bank.safetensors").unlink()
    (trained / "held_out.jsonl").unlink()
    text = training_markdown("Training", trained, tmp_path / "none.jsonl")
    assert text.count("![") == 1
    assert "tokens/s" not in text


def test_the_last_try_of_a_step_counts(tmp_path):
    events = write_events(tmp_path / "events.jsonl", (1, 1.0), (2, 2.0), (2, 3.0))
    assert [(step["step"], step["tokens_per_second"]) for step in read_steps(events)] == [(1, 1.0), (2, 3.0)]
    assert read_steps(tmp_path / "absent") == []


def test_experts_are_counted_by_the_routers_of_both_kinds(trained, tmp_path):
    assert count_experts(trained) == {3: 4, 5: 4}
    save_file({"model.layers.0.mlp.gate.weight": np.zeros((8, 4), np.float32)}, tmp_path / "weights.safetensors")
    assert count_experts(tmp_path) == {0: 8}


def test_what_is_no_training_is_said(tmp_path):
    with pytest.raises(FileNotFoundError, match="no training record"):
        training_markdown("Training", tmp_path, tmp_path / "none")
