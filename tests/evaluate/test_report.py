"""The report from whatever is there: tables, page and plots, deterministic and self-contained."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

from pesc.errors import EvaluationError
from pesc.evaluate import tables
from pesc.evaluate.config import ReportConfig
from pesc.evaluate.records import data_funnel, parse_address
from pesc.evaluate.report import build, choose_samples, results_table
from pesc.markdown import markdown_table
from pesc.stage import StageContext
from tests.evaluate.builders import make_result, make_samples, write_evaluation


def write_json(path: Path, value) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value), encoding="utf-8")
    return path.parent


@pytest.fixture
def inputs(tmp_path):
    """Three arms, two benchmarks, training, proof and data counts; the dense arm lacks one benchmark."""
    root = tmp_path / "in"
    found = {
        "evaluate[sparse/mmlu]": write_evaluation(root / "a", [1] * 40 + [0] * 17, kind="pesc", available=14042),
        "evaluate[sparse/gsm8k]": write_evaluation(root / "b", [1] * 5 + [0] * 5, kind="pesc", task="gsm8k", metric="exact_match"),
        "evaluate[control/mmlu]": write_evaluation(root / "c", [1] * 30 + [0] * 27, available=14042),
        "evaluate[control/gsm8k]": write_evaluation(root / "d", [0] * 5 + [1] * 5, task="gsm8k", metric="exact_match"),
        "evaluate[base/mmlu]": write_evaluation(root / "e", [0] * 57, available=14042),
    }
    for arm in ("sparse", "control"):
        config = {"method": "pesc" if arm == "sparse" else "qlora"}
        facts = {"steps": 3, "tokens": 3000, "loss_first": 2.0, "loss_last": 1.5}
        groups = [{"group": "lora", "tensors": 2, "parameters": 640}]
        folder = write_json(root / f"train-{arm}" / "training.json", {"config": config, "trainable": groups, "facts": facts})
        lines = [{"step": step, "loss": 2.0 - step / 6, "lr": 1e-4} for step in range(1, 4)]
        if arm == "sparse":
            for line in lines:
                line |= {"balance": 0.01, "experts": {"max": [0.4, 0.5], "min": [0.1, 0.1], "entropy": [0.9, 0.8], "dead": [0, 1]}}
        (folder / "history.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
        looks = [
            {
                "step": step,
                "loss": 2.1,
                "domains": {d: {"loss": 2.3 - step / 9 - (d == "math") / 5, "tokens": 1234} for d in ("code", "math")},
            }
            for step in (0, 2, 3)
        ]
        (folder / "held_out.jsonl").write_text("".join(json.dumps(line) + "\n" for line in looks), encoding="utf-8")
        found[f"train[{arm}]"] = folder
    proof = {"tolerance": {"logits": 0.05}, "prompts": 2, "tokens": 30, "logits": {"max_difference": 0.01}, "routing": {"layer": 1.0}}
    found["merge[sparse]"] = write_json(root / "merge" / "proof.json", proof)
    counts = {"domain": "math", "read": 100, "malformed": 1, "exact": 9, "near": 5, "contaminated": 2, "kept": 80}
    contamination = {"mmlu": {"items": 57, "datasets": {"metamath": {"rows": 2, "items": 1}}}}
    found["dedup"] = write_json(root / "dedup" / "stats.json", {"datasets": {"metamath": counts}, "contamination": contamination})
    found["mix"] = write_json(
        root / "mix" / "stats.json", {"domains": {"math": {"wanted": 90, "available": 80, "drawn": 80, "shortfall": 10}}}
    )
    found["tokenize"] = write_json(
        root / "tok" / "stats.json", {"rows": 80, "tokens": 9000, "supervised_tokens": 4000, "blocks": 5, "context_length": 2048}
    )
    return found


def run(root: Path, inputs, **config) -> Path:
    out = root / "out"
    out.mkdir(parents=True)
    build(StageContext("report", ReportConfig(control_arm="control", **config), inputs, out, root / "work"))
    return out


def test_the_table_has_every_arm_and_marks_what_is_not_comparable(tmp_path, inputs):
    results = json.loads((run(tmp_path, inputs) / "results.json").read_text())
    lines = results_table(results).splitlines()
    assert lines[0] == "| benchmark | setting | sparse | control | base | GPT-3.5 |"
    assert lines[2] == "| MMLU | acc, 5-shot, 57 of 14,042 items | 70.2 [57.3, 80.5]‡ | 52.6 [39.9, 65.0]‡ | 0.0 [0.0, 6.3]‡ | 70.0† |"
    assert lines[3].startswith("| GSM8K | exact_match, 5-shot, 10 items | 50.0 [23.7, 76.3] | 50.0 [23.7, 76.3] | – | 57.1")


@pytest.fixture
def one_arm_limited(tmp_path):
    """Two arms on GSM8K: one was asked everything in a chat template, the other ten questions without."""
    full = write_evaluation(tmp_path / "full", [1] * 800 + [0] * 519, task="gsm8k", metric="exact_match", chat_template_sha256="0" * 64)
    part = write_evaluation(tmp_path / "part", [1] * 5 + [0] * 5, task="gsm8k", metric="exact_match", available=1319)
    return {"evaluate[control/gsm8k]": full, "evaluate[base/gsm8k]": part}


def test_one_limited_arm_beside_a_full_one_is_marked_in_its_own_cell(tmp_path, one_arm_limited):
    out = run(tmp_path, one_arm_limited)
    results = json.loads((out / "results.json").read_text())
    row = results_table(results).splitlines()[2]
    assert "| exact_match, 5-shot |" in row
    assert "50.0 [23.7, 76.3]‡ (10 of 1,319 items, no chat template)" in row
    assert re.search(r"60\.7 \[58\.0, 63\.3\] \(1,319 items, chat template\)", row)
    assert row.endswith("| 57.1(†) |")
    page = (out / "report.html").read_text()
    assert re.search(r"<td>50\.0‡<small>23\.7 – 76\.3<br>10 of 1,319 items, no chat template</small></td>", page)
    assert re.search(r"<td>60\.7<small>58\.0 – 63\.3<br>1,319 items, chat template</small></td>", page)
    for view in (page, (out / "report.md").read_text()):
        assert "‡ not every question was asked" in view
        assert "(†)" in view
        assert "base outperforms GPT-3.5" in re.sub("<[^>]*>", "", view)
        assert "nothing comparable: 1 figure not comparable†" in view


def test_limits_are_marked_in_pairs_verdicts_and_plots(tmp_path, inputs, monkeypatch):
    from pesc.evaluate import plots

    drawn = []
    monkeypatch.setattr(plots, "_svg", lambda figure, draw=plots._svg: (drawn.append(figure), draw(figure))[1])
    out = run(tmp_path, inputs)
    results = json.loads((out / "results.json").read_text())
    rows = {line.split(" | ")[1]: line for line in tables.paired_table(results).splitlines() if line.startswith("| sparse")}
    assert "| 57 of 14,042‡ |" in rows["MMLU"]
    assert "| 10 |" in rows["GSM8K"]
    assert "mean of 2‡" in rows
    assert "sparse against control: cannot tell" in tables.verdict_lines(results)[3]
    assert tables.verdict_lines(results)[3].endswith("1 of 2 benchmarks in part‡)")
    scores, bars, differences = drawn[:3]
    labels = [[label.get_text() for label in figure.axes[0].get_yticklabels()] for figure in (scores, differences)]
    assert labels == [["MMLU‡", "GSM8K"], ["MMLU‡", "GSM8K", "mean‡"]]
    hollow = [
        [line.get_markerfacecolor() == "none" for line in figure.axes[0].get_lines() if line.get_marker() in "oD" and len(line.get_xdata())]
        for figure in (scores, differences)
    ]
    assert [label.get_text() for label in bars.axes[0].get_xticklabels()] == ["MMLU‡", "GSM8K"]
    filled = {round(bar.get_x()): bar.get_facecolor()[3] for bar in bars.axes[0].patches}
    assert filled == {0: 0.0, 1: 1.0}
    assert [line.get_linestyle() for line in bars.axes[0].get_lines() if len(line.get_xdata()) == 2] == [":", ":"]
    assert True in hollow[0]
    assert False in hollow[0]
    assert hollow[1] == [True, False, True]
    page = (out / "report.html").read_text()
    assert "57 of 14,042‡" in page
    assert "1 of 2 benchmarks in part‡" in page


def test_a_comparable_figure_is_a_solid_line_across_the_bars(monkeypatch):
    from pesc.evaluate import plots
    from pesc.evaluate.baselines import load_baselines
    from pesc.evaluate.comparison import compare

    drawn = []
    monkeypatch.setattr(plots, "_svg", drawn.append)
    results = {("base", "gsm8k"): make_result([1] * 1319, task="gsm8k", metric="exact_match")}
    plots.plot_bars(compare(results, {}, ("base",), "", ("gpt-3.5",), load_baselines()), {"base": "dense"}, {})
    (line,) = [line for line in drawn[0].axes[0].get_lines() if list(line.get_ydata()) == [57.1, 57.1]]
    assert line.get_linestyle() == "-"


def test_a_radar_is_drawn_over_three_benchmarks_that_all_arms_have(tmp_path, monkeypatch):
    from pesc.evaluate import plots

    drawn = []
    monkeypatch.setattr(plots, "_svg", lambda figure, draw=plots._svg: (drawn.append(figure), draw(figure))[1])
    sets = {"mmlu": [1] * 6 + [0] * 4, "gsm8k": [1] * 3 + [0] * 7, "piqa": [1] * 8 + [0] * 2, "arc_easy": [1] * 10}
    inputs = {f"evaluate[base/{name}]": write_evaluation(tmp_path / name, right, task=name) for name, right in sets.items()}
    inputs["evaluate[control/mmlu]"] = write_evaluation(tmp_path / "control-mmlu", [1] * 10)
    assert not (run(tmp_path / "1", inputs) / "plots" / "radar.svg").exists()
    del inputs["evaluate[control/mmlu]"]
    drawn.clear()
    out = run(tmp_path / "2", inputs)
    (line,) = drawn[2].axes[0].get_lines()
    assert len(drawn[2].axes[0].collections) == 1, "its interval as a band"
    names = [label.get_text() for label in drawn[2].axes[0].get_xticklabels()]
    assert dict(zip(names, line.get_ydata().tolist(), strict=False)) == {"MMLU": 60, "GSM8K": 30, "ARC-Easy": 100, "PIQA": 80}
    assert line.get_ydata()[0] == line.get_ydata()[-1]
    for name in ("scores", "bars", "radar"):
        assert (out / "plots" / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    assert "The area has no meaning" in (out / "report.html").read_text()
    folders = {address[len("evaluate[base/") : -1]: folder for address, folder in inputs.items()}
    crowd = {f"evaluate[arm-{number}/{name}]": folder for number in range(plots.MOST_BANDS + 1) for name, folder in folders.items()}
    drawn.clear()
    run(tmp_path / "3", crowd)
    assert (len(drawn[2].axes[0].get_lines()), len(drawn[2].axes[0].collections)) == (plots.MOST_BANDS + 1, 0)


def test_what_could_not_have_been_seen_is_said(tmp_path, inputs):
    out = run(tmp_path, inputs)
    results = json.loads((out / "results.json").read_text())
    mean = results["comparison"]["paired_means"][0]
    sentence = f"cannot resolve less than {mean['resolves']:.1f} points"
    assert mean["resolves"] > 5
    assert sentence in (out / "report.html").read_text()
    assert sentence in (out / "report.md").read_text()
    assert "how much another seed would differ is not known" in (out / "report.html").read_text()


def test_pairs_verdicts_and_kinds(tmp_path, inputs):
    results = json.loads((run(tmp_path, inputs) / "results.json").read_text())
    assert [(a["arm"], a["kind"]) for a in results["arms"]] == [("sparse", "pesc"), ("control", "qlora"), ("base", "dense")]
    pairs = {(p["arm"], p["benchmark"]): p for p in results["comparison"]["paired"]}
    assert pairs["sparse", "mmlu"]["only_arm"] == 10
    assert pairs["sparse", "mmlu"]["p_value"] == pytest.approx(2 / 2**10)
    assert pairs["sparse", "mmlu"]["p_adjusted"] == pytest.approx(4 / 2**10)
    assert pairs["sparse", "gsm8k"]["difference"] == 0
    assert ("base", "gsm8k") not in pairs
    assert all(verdict["outperforms"] == "cannot tell" for verdict in results["comparison"]["verdicts"])
    assert results["funnel"][0]["removed"]["other reasons"] == 3


def test_two_runs_write_the_same_bytes(tmp_path, inputs):
    first, second = run(tmp_path / "1", inputs), run(tmp_path / "2", dict(reversed(inputs.items())))
    names = sorted(path.relative_to(first) for path in first.rglob("*") if path.is_file())
    assert {str(name) for name in names} >= {
        "results.json",
        "report.md",
        "report.html",
        "plots/scores.svg",
        "plots/scores.png",
        "plots/bars.svg",
        "plots/bars.png",
        "plots/training.svg",
        "plots/held-out.svg",
        "plots/routing-sparse.svg",
        "plots/data.svg",
    }
    for name in names:
        assert (first / name).read_bytes() == (second / name).read_bytes(), name


class _Page(HTMLParser):
    """Collects ids, references and links; void elements are closed by themselves."""

    def __init__(self, text: str):
        super().__init__()
        self.ids, self.fetched, self.open = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        found = dict(attributes)
        self.ids += [found["id"]] if "id" in found else []
        self.fetched += [
            value
            for key, value in attributes
            if key in {"src", "href", "xlink:href", "data"} and value and not value.startswith(("#", "data:"))
        ]
        if tag not in {"meta", "link", "br", "img", "hr"}:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        if tag not in {"meta", "link", "br", "img", "hr"}:
            self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_the_page_stands_alone_and_is_well_formed(tmp_path, inputs):
    text = (run(tmp_path, inputs) / "report.html").read_text()
    page = _Page(text)
    assert page.open == []
    assert page.fetched == []
    assert "<script" not in text
    repeated = {name for name in page.ids if page.ids.count(name) > 1}
    assert not repeated
    assert {"results", "paired", "published", "training", "data", "merge", "settings", "samples", "rules"} <= set(page.ids)
    assert set(re.findall(r'href="#([^"]+)"', text)) <= set(page.ids)
    assert str(tmp_path) not in text


def test_the_page_shows_each_domains_held_out_loss_before_and_after(tmp_path, inputs):
    out = run(tmp_path, inputs)
    row = r"control</td><td class=\"left\">math</td><td>1,234</td><td>2.1</td><td>1.767</td>"
    assert re.search(row, (out / "report.html").read_text())
    assert json.loads((out / "results.json").read_text())["training"]["sparse"]["held_out"][0]["step"] == 0
    for arm in ("sparse", "control"):
        (inputs[f"train[{arm}]"] / "held_out.jsonl").unlink()
    earlier = run(tmp_path / "earlier", inputs)
    assert not (earlier / "plots" / "held-out.svg").exists()


def test_one_evaluation_is_enough(tmp_path, inputs):
    out = run(tmp_path, {"evaluate[base/mmlu]": inputs["evaluate[base/mmlu]"]})
    page = (out / "report.html").read_text()
    assert "Training</h2>" not in page
    assert "Merge proof" not in page
    assert {path.name for path in (out / "plots").iterdir()} == {"scores.svg", "scores.png", "bars.svg", "bars.png"}


def test_records_with_missing_keys_do_not_stop_the_report(tmp_path, inputs):
    for stage in ("dedup", "mix", "tokenize"):
        write_json(inputs[stage] / "stats.json", {})
    write_json(inputs["merge[sparse]"] / "proof.json", {"prompts": 1})
    write_json(inputs["train[sparse]"] / "training.json", {})
    (inputs["train[control]"] / "training.json").unlink()
    out = run(tmp_path, inputs)
    assert "Merge proof" in (out / "report.html").read_text()


def test_html_in_answers_is_text(tmp_path, inputs):
    folder = inputs["evaluate[base/mmlu]"]
    text = (folder / "samples.jsonl").read_text().replace("Question 0?", "<script>alert(1)</script>")
    (folder / "samples.jsonl").write_text(text)
    page = (run(tmp_path, {"evaluate[base/mmlu]": folder}) / "report.html").read_text()
    assert "<script>" not in page
    assert "&lt;script&gt;alert(1)" in page


def test_nothing_to_show_and_unknown_columns_are_sentences(tmp_path, inputs):
    with pytest.raises(EvaluationError, match="no evaluation to show"):
        run(tmp_path / "1", {"dedup": inputs["dedup"]})
    with pytest.raises(EvaluationError, match=r"'gpt-4', which has no figures\. Did you mean 'gpt-3"):
        run(tmp_path / "2", inputs, baselines=("gpt-4",))
    (inputs["evaluate[base/mmlu]"] / "results.json").write_text('{"task": "mmlu"}')
    with pytest.raises(EvaluationError, match="unusable field"):
        run(tmp_path / "3", inputs)


def test_samples_show_disagreements_first():
    answers = {("a", "x"): make_samples([1, 1, 0, 1]), ("b", "x"): make_samples([1, 1, 1, 1])}
    chosen = choose_samples(answers, ("x",), {"a": "pesc", "b": "qlora"}, 2)
    assert [sample["doc_id"] for sample in chosen] == [2, 0]
    assert [answer["correct"] for answer in chosen[0]["answers"]] == [0, 1]


def test_the_report_needs_no_torch(tmp_path, inputs):
    heavy = "{'torch', 'transformers', 'lm_eval', 'datasets'}"
    code = f"import sys, pesc.evaluate.report, pesc.evaluate.plots, pesc.evaluate.config\nassert not {heavy} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[2])


def test_addresses():
    assert parse_address("evaluate[pesc/nq-open]") == ("evaluate", "pesc/nq-open")
    assert parse_address("dedup") == ("dedup", "")


def test_a_funnel_accounts_for_every_row():
    funnel = data_funnel({"datasets": {"a": {"read": 10, "kept": 4, "near": 1, "filter_refusal": 1, "filter_broken_python": 1}}})
    assert funnel[0]["removed"] == {"refusal": 1, "broken python": 1, "near duplicate": 1, "other reasons": 3}
    assert data_funnel(None) == data_funnel({}) == []


def test_numbers_are_written_for_reading():
    assert tables.format_p(0.0004) == "< 0.001"
    assert (tables.format_p(0.0312), tables.format_p(None), tables.format_signed(-1.26)) == ("0.031", "–", "−1.3")
    assert markdown_table(["a"], [["x|y\nz"]]).splitlines()[2] == "| x\\|y z |"


def test_each_layers_load_is_measured_by_its_own_experts():
    from pesc.evaluate.report import experts_by_layer

    assert experts_by_layer({"num_experts": 8}, 3) == {0: 8, 1: 8, 2: 8}
    assert experts_by_layer({"num_experts": 8, "layer_experts": [4, 0, 16]}, 2) == {0: 4, 2: 16}


def test_the_routing_plot_of_even_layers_of_any_size_is_all_ones(monkeypatch):
    from pesc.evaluate import plots

    seen = {}
    monkeypatch.setattr(plots.Figure, "colorbar", lambda self, image, **_: seen.update(values=image.get_array().tolist()))
    plots.plot_expert_load({"steps": [1, 2], "max": [[0.25, 1 / 16]] * 2}, {0: 4, 2: 16})
    assert seen["values"] == [[1.0, 1.0], [1.0, 1.0]]
