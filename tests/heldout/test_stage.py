"""`heldout[ARM]`: each row's loss is the cross-entropy of its answer, of dense and sparse models alike."""

import json

import numpy as np
import pytest
import torch

import pesc.models
from pesc import pipeline
from pesc.errors import DataError, EvaluationError, ModelError
from pesc.heldout.config import HeldOutConfig
from pesc.heldout.losses import measure
from pesc.heldout.results import NAME, read_result
from pesc.heldout.stage import build
from pesc.routing.rows import Row
from pesc.stage import Execution, StageContext
from tests.models.builders import fill_bank, save_dense, save_sparse, tokens
from tests.routing.builders import save_held_out

ROWS = [("code", 0, 5), ("code", 1, 12), ("math", 2, 3), ("math", 3, 7)]
"""Domain, row of ids, tokens of the question."""


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    return save_dense(tmp_path_factory.mktemp("heldout") / "dense")


@pytest.fixture(scope="module")
def blocks(tmp_path_factory):
    ids = tokens(4, 20).tolist()
    rows = {domain: [] for domain, *_ in ROWS}
    for domain, number, asked in ROWS:
        rows[domain].append((ids[number], [-100] * asked + ids[number][asked:]))
    return save_held_out(tmp_path_factory.mktemp("blocks"), rows.items())


def run(folder, model, blocks, **settings):
    for name in ("out", "work"):
        (folder / name).mkdir(parents=True)
    inputs = {"model": model, "blocks": blocks}
    built = build(StageContext("heldout[arm]", HeldOutConfig(**settings), inputs, folder / "out", folder / "work", Execution(device="cpu")))
    return read_result(folder / "out"), built


def test_a_rows_loss_is_the_cross_entropy_of_its_answer(tmp_path, dense, blocks):
    from transformers import AutoModelForCausalLM

    found, built = run(tmp_path, dense, blocks)
    model = AutoModelForCausalLM.from_pretrained(dense, dtype=torch.float32)
    ids = tokens(4, 20)
    with torch.inference_mode():
        logs = model(ids).logits.double().log_softmax(-1)
    for (domain, number, asked), row in zip(ROWS, found.rows, strict=True):
        expected = -sum(logs[number, place - 1, ids[number, place]].item() for place in range(asked, 20))
        assert (row.domain, row.tokens) == (domain, 20 - asked)
        assert row.loss == pytest.approx(expected, rel=1e-5)
    code = sum(row.loss for row in found.rows[:2]) / (15 + 8)
    assert found.loss("code") == pytest.approx(code) == built.metrics["domains"]["code"]
    assert found.mean == pytest.approx((found.loss("code") + found.loss("math")) / 2)
    assert found.parameters == sum(parameter.numel() for parameter in model.parameters())


def test_a_crafted_model_has_the_losses_of_the_dense_one_and_a_trained_one_has_not(tmp_path, dense, blocks):
    from transformers import AutoModelForCausalLM

    pesc.models.register()
    crafted, trained = save_sparse(dense, tmp_path / "crafted"), tmp_path / "trained"
    torch.manual_seed(0)
    fill_bank(AutoModelForCausalLM.from_pretrained(crafted)).save_pretrained(trained)
    first, second, third = (run(tmp_path / name, model, blocks)[0] for name, model in (("1", dense), ("2", crafted), ("3", trained)))
    assert [row.loss for row in first.rows] == pytest.approx([row.loss for row in second.rows], rel=1e-6)
    assert [row.loss for row in first.rows] != pytest.approx([row.loss for row in third.rows], rel=1e-3)
    assert first.rows_sha256 == second.rows_sha256 == third.rows_sha256


def test_two_runs_write_the_same_bytes(tmp_path, dense, blocks):
    run(tmp_path / "1", dense, blocks)
    run(tmp_path / "2", dense, blocks)
    assert [path.name for path in (tmp_path / "1" / "out").iterdir()] == [NAME]
    assert (tmp_path / "1" / "out" / NAME).read_bytes() == (tmp_path / "2" / "out" / NAME).read_bytes()


def test_a_mixture_that_holds_nothing_out_and_a_model_that_diverged_are_sentences(tmp_path, dense):
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"mix\.held_out above 0"):
        run(tmp_path / "1", dense, tmp_path / "empty")

    class Diverged:
        device = torch.device("cpu")
        config = type("config", (), {"num_hidden_layers": 1})
        parameters = staticmethod(lambda: iter(()))

        def forward(self, **_):
            return type("output", (), {"logits": torch.full((1, 4, 9), torch.nan)})

        __call__ = forward

    row = Row(np.arange(4), np.array([False, False, True, True]), "code")
    with pytest.raises(ModelError, match="the training diverged"):
        measure(Diverged(), [row], "heldout[arm]", lambda *_args, **_fields: None)
    with pytest.raises(DataError, match="no held-out row has a supervised token"):
        measure(Diverged(), [Row(np.arange(4), np.array([True, False, False, False]), "code")], "it", lambda *_args, **_fields: None)


def test_every_arm_has_its_losses_where_they_are_asked_for(tiny_recipe):
    arms = {"arms": {"pesc": {"method": "pesc"}, "qlora": {"method": "qlora"}, "base": {"method": "dense"}}}
    assert not [node for node in pipeline.build_graph(tiny_recipe(**arms)).nodes if node.stage.name == "heldout"]
    graph = pipeline.build_graph(tiny_recipe(**arms, heldout={"enabled": True}))
    nodes = {node.instance: node for node in graph.nodes if node.stage.name == "heldout"}
    assert {name: node.inputs["model"] for name, node in nodes.items()} == {
        "pesc": "merge[pesc]", "qlora": "merge[qlora]", "base": "download[base]"
    }  # fmt: skip
    report = graph.by_address["report"]
    assert {f"heldout[{name}]" for name in nodes} <= set(report.inputs)
    assert "heldout[pesc]" in graph.may_fail


def test_a_file_of_another_schema_is_refused(tmp_path):
    (tmp_path / NAME).write_text(json.dumps({"rows": []}))
    with pytest.raises(EvaluationError, match=r"no usable heldout\.json"):
        read_result(tmp_path)
