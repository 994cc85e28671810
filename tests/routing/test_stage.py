"""`routing[ARM]` and the report's section of it; `pesc routing` as a user meets it."""

import json
import sys

import numpy as np
import pytest

from pesc import cli, pipeline
from pesc.evaluate.config import ReportConfig
from pesc.evaluate.report import build as build_report
from pesc.figures import png_bytes, svg_text
from pesc.routing import plots
from pesc.routing.config import RoutingConfig
from pesc.routing.measures import measure
from pesc.routing.results import NAME, RoutingResult, read_result
from pesc.routing.stage import build
from pesc.stage import StageContext
from tests.evaluate.builders import write_evaluation
from tests.models.builders import save_dense, save_sparse, save_tokenizer, tokens
from tests.routing.builders import make_observation, save_held_out


@pytest.fixture(scope="module")
def sparse(tmp_path_factory):
    root = tmp_path_factory.mktemp("routing")
    return save_sparse(save_dense(root / "dense"), root / "sparse")


@pytest.fixture(scope="module")
def blocks(tmp_path_factory):
    ids = tokens(12, 20).tolist()
    held_out = [(domain, ids[3 * number : 3 * number + 3]) for number, domain in enumerate(("code", "code", "math", "math"))]
    return save_held_out(tmp_path_factory.mktemp("blocks"), held_out)


def run(folder, sparse, blocks, **settings):
    for name in ("out", "work"):
        (folder / name).mkdir(parents=True)
    config = RoutingConfig(dtype="float32", permutations=99, **settings)
    built = build(StageContext("routing[pesc]", config, {"model": sparse, "blocks": blocks}, folder / "out", folder / "work"))
    return folder / "out", built


def test_two_runs_write_the_same_bytes_and_a_result_that_reads_back(tmp_path, sparse, blocks):
    first, built = run(tmp_path / "1", sparse, blocks)
    second, _ = run(tmp_path / "2", sparse, blocks)
    assert [path.name for path in first.iterdir()] == [NAME]
    assert (first / NAME).read_bytes() == (second / NAME).read_bytes()
    result = read_result(first)
    assert [(d.name, d.rows, d.tokens) for d in result.domains] == [("code", 6, 120), ("math", 6, 120)]
    assert built.metrics["tokens"] == result.num_tokens == 240
    assert built.metrics["p"] == result.overall.p
    assert [sum(map(sum, entry.pairs)) for entry in result.layers] == [480, 480]


def test_a_mixture_that_holds_nothing_out_is_a_hole_and_no_failure(tmp_path, sparse):
    (tmp_path / "empty").mkdir()
    out, _ = run(tmp_path / "run", sparse, tmp_path / "empty")
    assert read_result(out).hole.startswith("the mixture holds no rows out")
    assert plots.draw(read_result(out)) == {}


def test_every_sparse_arm_has_its_routing_unless_it_is_switched_off(tiny_recipe):
    arms = {
        "arms": {"pesc": {"method": "pesc"}, "whole": {"method": "upcycle-full"}, "qlora": {"method": "qlora"}, "base": {"method": "dense"}}
    }
    graph = pipeline.build_graph(tiny_recipe(**arms))
    nodes = {node.instance: node for node in graph.nodes if node.stage.name == "routing"}
    assert set(nodes) == {"pesc", "whole"}
    assert nodes["pesc"].inputs == {"model": "merge[pesc]", "blocks": "tokenize"}
    assert graph.by_address["report"].inputs["routing[pesc]"] == "routing[pesc]"
    off = pipeline.build_graph(tiny_recipe(**arms, routing={"enabled": False}))
    assert not any(node.stage.name == "routing" for node in off.nodes)


def test_the_report_shows_the_routing(tmp_path, sparse, blocks):
    out, _ = run(tmp_path / "routing", sparse, blocks)
    (tmp_path / "none").mkdir()
    hole, _ = run(tmp_path / "hole", sparse, tmp_path / "none")
    inputs = {"evaluate[pesc/mmlu]": write_evaluation(tmp_path / "a", [1] * 9, kind="pesc"), "routing[pesc]": out, "routing[second]": hole}
    (tmp_path / "report").mkdir()
    build_report(StageContext("report", ReportConfig(control_arm="pesc"), inputs, tmp_path / "report", tmp_path / "work"))
    page, text = (tmp_path / "report/report.html").read_text(), (tmp_path / "report/report.md").read_text()
    assert '<h2 id="routing">Routing</h2>' in page
    assert "240 tokens of 12 rows (code 6 rows and 120 tokens, math 6 rows and 120 tokens), 2 sparse layers, top-2." in page
    assert "Nothing was counted: the mixture holds no rows out" in page
    plots = tmp_path / "report/plots"
    assert page.count("<figure>") == len(list(plots.glob("*.svg")))
    assert len(list(plots.glob("experts-pesc-*.svg"))) == 4
    assert "## Routing" in text
    kept = json.loads((tmp_path / "report/results.json").read_text())["routing"]["pesc"]
    assert RoutingResult.model_validate(kept) == read_result(out)


def test_a_report_without_routing_says_nothing_of_it(tmp_path):
    inputs = {"evaluate[pesc/mmlu]": write_evaluation(tmp_path / "a", [1] * 9, kind="pesc")}
    (tmp_path / "report").mkdir()
    build_report(StageContext("report", ReportConfig(control_arm="pesc"), inputs, tmp_path / "report", tmp_path / "work"))
    assert "Routing" not in (tmp_path / "report/report.html").read_text() + (tmp_path / "report/report.md").read_text()


@pytest.mark.parametrize(("experts", "top_k", "domains"), [(2, 1, 1), (8, 2, 3), (26, 4, 7)])
def test_pictures_of_any_shape_repeat_byte_by_byte(experts, top_k, domains):
    draw = np.random.default_rng(1)
    row_of, names = np.repeat(np.arange(24), 10), [f"a domain of a long name {number}" for number in range(domains)]
    chosen = [np.stack([draw.permutation(experts)[:top_k] for _ in row_of]) for _ in range(3)]
    seen = make_observation(chosen, row_of, np.arange(24) % domains, tuple(names), experts)
    result = measure(seen, RoutingConfig(permutations=99))
    texts = [{name: svg_text(figure) for name, figure in plots.draw(result, 2).items()} for _ in range(2)]
    assert texts[0] == texts[1]
    assert set(texts[0]) == {"domains", "load"} | ({"specialisation"} if domains > 1 else set()) | ({"pairs"} if experts > 2 else set())
    images = [{name: png_bytes(figure) for name, figure in plots.draw(result, 2).items()} for _ in range(2)]
    assert images[0] == images[1]
    assert all(image.startswith(b"\x89PNG") and b"Software" not in image for image in images[0].values())


@pytest.fixture
def pesc(monkeypatch, capsys):
    """A function that runs the command in this process: exit code, stdout, stderr."""

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["pesc", "routing", *map(str, arguments), "--device", "cpu", "--permutations", "99"])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        out, err = capsys.readouterr()
        return ended.value.code or 0, out, err

    return call


def test_the_command_prints_and_writes_what_the_stage_counts(pesc, tmp_path, sparse, blocks):
    expected = read_result(run(tmp_path / "stage", sparse, blocks)[0])
    code, out, err = pesc(sparse, sparse, "--blocks", blocks, "--layer", 1, "--json", "--out", tmp_path / "new/routing")
    assert code == 0, err
    found = json.loads(out)
    assert RoutingResult.model_validate(found["routing"]) == RoutingResult.model_validate(found["other"]) == expected
    assert [entry["plain"]["same_set"] for entry in found["agreement"]["layers"]] == [1.0, 1.0]
    assert read_result(tmp_path / "new/routing") == expected
    names = {path.name for path in (tmp_path / "new/routing").iterdir()}
    drawn = ("domains", "load", "pairs", "specialisation", "agreement")
    assert names == {"routing.json", "routing.md", "agreement.json", *(f"{n}.{kind}" for n in drawn for kind in ("svg", "png"))}


def test_texts_with_domains_are_routed(pesc, tmp_path, sparse):
    save_tokenizer(sparse)
    rows = [{"text": "def f(x): return x" * (1 + n), "domain": "code"} for n in range(4)]
    rows += [{"messages": [{"role": "user", "content": "2 + 2 = ?"}], "domain": "math"}] * 3
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    code, out, err = pesc(sparse, "--texts", tmp_path / "rows.jsonl", "--max-tokens", 40)
    assert code == 0, err
    assert "2 of 7 texts are cut to 40 tokens." in err
    assert f"{18 + 36 + 40 + 40 + 3 * len('user: 2 + 2 = ?x')} tokens of 7 rows (code 4 rows and 134 tokens, math 3 rows" in out
    assert "layer  busiest  entropy" in out


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("{", "row 1: is not JSON"),
        ('["text"]', "row 1: must be an object with `text` or `messages`"),
        ('{"text": "a", "messages": []}', "row 1: must be an object with `text` or `messages`, one of the two"),
        ('{"text": 3}', "row 1: `text` must be a text"),
        ('{"text": "a", "domain": 3}', "row 1: `domain` must be a name"),
        ('{"messages": [{"role": 3}]}', "row 1: `messages` must be a list of objects with `role` and `content`, both text"),
        ("", "has no rows: write one JSON object a line"),
    ],
)
def test_a_bad_row_is_a_sentence_that_names_it(pesc, tmp_path, sparse, row, message):
    save_tokenizer(sparse)
    (tmp_path / "rows.jsonl").write_text(row + "\n")
    code, out, err = pesc(sparse, "--texts", tmp_path / "rows.jsonl", "--out", tmp_path / "out")
    assert (code, out) == (1, "")
    assert err.startswith("pesc: ")
    assert message in err
    assert not (tmp_path / "out").exists()


def test_mistakes_are_sentences(pesc, tmp_path, sparse, blocks):
    dense = save_dense(tmp_path / "dense")
    (tmp_path / "full").mkdir()
    (tmp_path / "full/file").write_text("")
    for arguments, message in (
        ((dense, "--blocks", blocks), "is dense: it has no router, so there is no routing to look at. Give a sparse model"),
        ((sparse, dense, "--blocks", blocks), "is dense: it has no router"),
        ((sparse,), "There are no rows to route: give texts with --texts"),
        ((sparse, "--blocks", blocks, "--texts", "x"), "--texts and --blocks are both given"),
        ((sparse, "--texts", tmp_path / "none.jsonl"), "none.jsonl cannot be read (No such file"),
        ((sparse, "--texts", "x", "--tokens", "answers"), "--tokens answers needs --blocks"),
        ((sparse, "--blocks", blocks, "--layer", 2), "--layer is 2, but"),
        ((sparse, "--blocks", tmp_path / "none"), "There is no directory"),
        ((sparse, "--blocks", blocks, "--out", tmp_path / "full"), "is not empty: give a new directory"),
        (("demo:merge[pesc]",), "merge[pesc] is not in the store"),
        (("demo:merge[pesk]",), "has no action 'merge[pesk]'"),
    ):
        code, out, err = pesc(*arguments)
        assert (code, out) == (1, ""), arguments
        assert message in err, err
        assert "Traceback" not in err
        assert len(err.strip().splitlines()) == 1
