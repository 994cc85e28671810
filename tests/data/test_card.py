"""The data card: what it tells, what it does when something is missing, and that rows cannot break out of it."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections import Counter
from html.parser import HTMLParser

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pesc.data.card import CardInputs, SourceFacts, built_data, render_card, write_card
from pesc.data.card.ledger import read_ledger, reason_label
from pesc.data.card.measures import measure_mixture, packed_lengths
from pesc.data.card.parts import Table, Texts, clip, escape, page_html, page_markdown, share
from pesc.data.card.sections import contamination_section, semantic_section, sources_section
from pesc.data.decontaminate import ContaminationTable, Hit, Item
from pesc.errors import DataError
from pesc.plan import Selection
from pesc.recipe import recipe_from_dict
from pesc.run import run_recipe
from pesc.store import Store
from tests.data.card_recipe import save_tokenizer, shared_recipe, small_recipe

SAMPLE = [r"magicoder\_evol\_instruct", r"magicoder\_oss\_instruct", "metamathqa", "sample-again", "slimorca"]
"""Data sets of the published sample, as markdown writes them; the last but one holds all of them once more."""


class Page(HTMLParser):
    """Tags and text of a page."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: Counter[str] = Counter()
        self.links: list[str] = []
        self.words = ""
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.tags[tag] += 1
        self.links += [value for name, value in attrs if name in ("href", "src", "xlink:href")]

    def handle_data(self, data):
        self.words += data


def table_rows(markdown: str, first_cell: str) -> list[list[str]]:
    """Cells of the table rows that begin with this cell."""
    lines = [re.split(r"(?<!\\)\|", line)[1:-1] for line in markdown.splitlines() if line.startswith("| ")]
    return [[cell.strip() for cell in cells] for cells in lines if cells[0].strip().startswith(first_cell)]


# --- a whole card -----------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """(store, recipe) of six rows, built to the blocks; two are equal, one is a benchmark question."""
    folder = tmp_path_factory.mktemp("card")
    questions = [
        "Name the largest moon of Jupiter.",
        "Name the largest moon of Jupiter.",
        "What is <b>seven</b> | eight?",
        "Why is the sky blue?",
        "Sum 3 and 4.",
    ]
    raw = small_recipe(folder, questions)
    rows = folder / "rows" / "rows.jsonl"
    lines = [json.loads(line) for line in rows.read_text().splitlines()]
    lines[1] = lines[0]
    rows.write_text("".join(json.dumps(line) + "\n" for line in [*lines, {"query": 7, "response": "x"}]))
    raw["sources"]["rows"]["license"] = "CC-BY-4.0"
    raw["mix"]["total"] = 3
    recipe, store = recipe_from_dict(raw), Store(folder / "store")
    run_recipe(recipe, store, Selection(until=("tokenize",)))
    return store, recipe


def test_a_card_has_all_sections_and_they_add_up(small):
    card = render_card(built_data(small[1], small[0]))
    titles = re.findall(r"^## (.*)$", card.markdown, re.MULTILINE)
    assert titles == [
        "Sources", "From rows read to rows kept", "Removed rows, by reason", "Duplicates", "The mixture", "Lengths and turns", "Tokens and packing", "Samples"
    ]  # fmt: skip
    assert table_rows(card.markdown, "rows (general)") == [["rows (general)", "6", "1 (16.7 %)", "1 (16.7 %)", "4 (66.7 %)"]]
    assert "Rows read = rows kept + rows in the ledger." in card.markdown
    assert table_rows(card.markdown, "exact duplicate") == [
        ["exact duplicate", "–", "1", "16.7 %"],
        ["exact duplicate", "rows", "1", "1"],
    ]
    assert table_rows(card.markdown, "general")[0] == ["general", "3", "4", "3", "100.0 %", "0", "0"]
    assert "CC-BY-4.0" in card.markdown
    assert Page(card.html).tags["svg"] == 4


def test_token_counts_are_those_of_the_blocks(small):
    inputs = built_data(small[1], small[0])
    stats = json.loads((inputs.objects["tokenize"] / "stats.json").read_text())
    lengths, blocks = packed_lengths(inputs.objects["tokenize"])
    assert lengths.sum() == blocks.sum() == stats["tokens"]
    assert len(lengths) == stats["rows"]
    assert table_rows(render_card(inputs).markdown, "all rows")[0][-1] == f"{stats['tokens']:,}"


def test_the_page_needs_no_script_and_no_network(small):
    page = Page(render_card(built_data(small[1], small[0])).html)
    assert page.tags["script"] == page.tags["link"] == page.tags["img"] == 0
    assert all(link.startswith("#") for link in page.links)
    assert page.tags["b"] == 4, "the four figures at the top; <b> of the row is text"
    assert "<b>seven</b>" in page.words


def test_a_card_is_the_same_each_time(small, tmp_path):
    inputs = built_data(small[1], small[0])
    first, again = render_card(inputs), render_card(inputs)
    assert first == again
    page, text = write_card(inputs, tmp_path / "new" / "folder")
    assert page.read_text() == first.html
    assert text.read_text() == first.markdown


def test_a_changed_setting_leaves_its_sections_out_and_says_so(small):
    store, recipe = small
    changed = recipe.model_copy(update={"mix": recipe.mix.model_copy(update={"total": 2})})
    inputs = built_data(changed, store)
    assert set(inputs.objects) == {"dedup"}
    assert list(inputs.missing) == ["mix", "tokenize"]
    text = render_card(inputs).markdown
    assert table_rows(text, "mix") == [["mix", "config.total 3 → 2"]]
    assert "## From rows read to rows kept" in text
    assert "## The mixture" not in text


def test_without_anything_built_there_is_no_card(small, tmp_path):
    with pytest.raises(DataError, match=r"Nothing is built of the data of recipe 'small' in .*pesc run small --until tokenize"):
        built_data(small[1], Store(tmp_path / "empty"))


def test_an_object_without_statistics_is_a_sentence(tmp_path):
    with pytest.raises(DataError, match=r"has no readable stats\.json"):
        render_card(CardInputs("r", "", (), {"dedup": tmp_path}))


def test_no_torch_is_loaded(small, tmp_path):
    store, _ = small
    code = (
        "import sys; from pathlib import Path; from pesc.data.card import CardInputs, render_card; "
        f"render_card(CardInputs('r', '', (), {{'mix': Path({str(built_data(small[1], store).objects['mix'])!r})}})); "
        "print(*[m for m in ('torch', 'transformers', 'prefect') if m in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split() == []


def test_the_published_sample_is_accounted_for(shared_data, tmp_path):
    recipe = recipe_from_dict(shared_recipe(shared_data, save_tokenizer(tmp_path / "base")))
    store = Store(tmp_path / "store")
    run_recipe(recipe, store, Selection(until=("mix",)))
    inputs = built_data(recipe, store)
    text = render_card(inputs).markdown
    stats = json.loads((inputs.objects["dedup"] / "stats.json").read_text())
    assert stats["total"]["read"] == 1040
    assert "Rows read = rows kept + rows in the ledger." in text
    leak = table_rows(text, "gsm8k-leak (math)")[0]
    assert (leak[1], leak[-2], leak[-1]) == ("40", "40 (100.0 %)", "0 (0.0 %)")
    assert table_rows(text, "gsm8k")[1][:3] == ["gsm8k", "1,319", "40 (40 questions, 3.0 %; verbatim 40)"]
    header = table_rows(text, "Kind")[0]
    assert header == ["Kind", "Removed from", *(f"kept in {name}" for name in SAMPLE), "Sum"]
    copies = {row[1]: [int(cell) for cell in row[2:]] for row in table_rows(text, "exact duplicate") if row[1] in SAMPLE}
    total = {name: stats["datasets"][name.replace("\\", "")]["exact"] for name in SAMPLE}
    assert {name: numbers[-1] for name, numbers in copies.items()} == total
    assert all(sum(numbers[:-1]) == numbers[-1] for numbers in copies.values())
    assert "tokenize" in inputs.missing


# --- the ledger -------------------------------------------------------------------------------------------------------------------


def save_dedup(folder, kept, removed):
    """A dedup object: kept (id, data set, question), removed (id, data set, reason, kept_id)."""
    folder.mkdir(exist_ok=True)
    rows = [
        {"id": i, "dataset": d, "messages": [{"role": "system", "content": "be brief"}, {"role": "user", "content": q}]} for i, d, q in kept
    ]
    pq.write_table(pa.Table.from_pylist(rows), folder / "rows.parquet", row_group_size=2)
    lines = [
        {
            "id": i,
            "dataset": d,
            "file": "f.jsonl",
            "row": n,
            "reason": r,
            "kept_id": k,
            "score": 0.9 if k else None,
            "excerpt": f"text of {i}",
        }
        for n, (i, d, r, k) in enumerate(removed)
    ]
    schema = {
        "id": pa.string(),
        "dataset": pa.string(),
        "file": pa.string(),
        "row": pa.int64(),
        "reason": pa.string(),
        "kept_id": pa.string(),
    }
    schema = pa.schema([*schema.items(), ("score", pa.float64()), ("excerpt", pa.string())])
    pq.write_table(pa.Table.from_pylist(lines, schema=schema), folder / "removed.parquet", row_group_size=3)
    return folder


def test_duplicates_are_told_by_the_data_set_that_kept_the_row(tmp_path):
    kept = [("k1", "a", "first question"), ("k2", "b", "second question"), ("k3", "b", "third")]
    removed = [
        ("r1", "a", "exact", "k1"),
        ("r2", "b", "exact", "k1"),
        ("r3", "b", "near", "k2"),
        ("r4", "c", "near", "r5"),  # the row it resembles went in a later step
        ("r5", "a", "contaminated: quiz", None),
        ("r6", "c", "answer_disagrees: 3 and 4", None),
        ("r7", "c", "malformed: field 'x' is missing", None),
    ]
    ledger = read_ledger(save_dedup(tmp_path / "d", kept, removed))
    assert ledger.pairs == {"exact": {("a", "a"): 1, ("b", "a"): 1}, "near": {("b", "b"): 1, ("c", "a"): 1}}
    assert ledger.reasons == ["malformed", "answer_disagrees", "exact", "near", "contaminated"]
    assert ledger.counts["exact"] == {"a": 1, "b": 1}
    assert ledger.details["contaminated"] == {"quiz": 1}
    assert [(e.text, e.kept_dataset, e.kept_text) for e in ledger.examples["near"]] == [
        ("text of r3", "b", "second question"),
        ("text of r4", "a", ""),
    ]
    assert reason_label("answer_disagrees") == "answer disagrees"


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(st.sampled_from("ab"), st.sampled_from(["near", "exact", "filter_refusal", "malformed: x"])), max_size=30))
def test_every_ledger_row_is_counted_once(tmp_path_factory, lines):
    removed = [(f"r{n}", dataset, reason, "k" if reason in ("near", "exact") else None) for n, (dataset, reason) in enumerate(lines)]
    ledger = read_ledger(save_dedup(tmp_path_factory.mktemp("d"), [("k", "a", "q")], removed))
    assert sum(counter.total() for counter in ledger.counts.values()) == len(lines)
    assert {d: sum(counter[d] for counter in ledger.counts.values()) for d in "ab"} == {d: sum(x == d for x, _ in lines) for d in "ab"}
    assert all(1 <= len(examples) <= 4 for examples in ledger.examples.values())
    assert sum(pairs.total() for pairs in ledger.pairs.values()) == sum(r in ("near", "exact") for _, r in lines)


# --- parts ------------------------------------------------------------------------------------------------------------------------


def test_contamination_shows_each_kind_and_twins_apart():
    """The table that dedup writes, not one like it."""
    made = ContaminationTable([Item("quiz", f"question {number}") for number in range(100)])
    made.add("a", "1", "row one", [Hit(0, 1.0, "verbatim")])
    made.add("a", "2", "row two", [Hit(1, 0.7, "reworded")])
    made.add("b", "3", "row three", [Hit(2, 0.9, "number_twin")])
    section = contamination_section(made.summary({"a": 10, "b": 10, "c": 10}), {"a": {}, "b": {}, "c": {}})
    table, _, texts = section.parts
    assert table.header == ("Benchmark", "Questions", "a", "b", "Rows removed")
    assert table.rows == [["quiz", "100", "2\n2 questions, 2.0 %\nverbatim 1\nreworded 1", "0\n0 questions, 0.0 %\nnumber twin 1", "2"]]
    assert ("training row of b, coverage 0.9, number_twin", "row three") in texts.texts


def test_paraphrases_are_shown_when_they_were_looked_for():
    example = {"score": 0.97, "row": "Boil an egg?", "other": "How is an egg boiled?"}
    report = {"rows": 50, "threshold": 0.95, "pairs": {"a / b": {"count": 3, "examples": [example]}}, "benchmarks": {}}
    note, table, texts = semantic_section(report).parts
    assert "0.95 among 50" in note.text
    assert table.rows == [["a / b", "3"]]
    assert texts.texts == [("cosine 0.970", "Boil an egg?"), ("and", "How is an egg boiled?")]


def test_sources_show_what_a_moving_name_became():
    commit = "0123456789abcdef0123456789abcdef01234567"
    hub = SourceFacts("orca", "hub:datasets/o/s@main", "MIT", ("data set orca", "benchmark quiz"), commit, "main", "", 2, 3_000_000)
    missing = SourceFacts("code", "hub:datasets/c/d@main", "", ("data set code",))
    rows = sources_section((hub, missing)).parts[0].rows
    assert rows[0] == [
        "orca\nhub:datasets/o/s@main",
        "data set orca\nbenchmark quiz",
        "MIT",
        "0123456789ab\nasked for main",
        "–",
        "2\n3.0 MB",
    ]
    assert rows[1][2:] == ["not stated in the recipe", "not fetched yet", "–", "–"]


@settings(deadline=None)
@given(st.text(), st.text(alphabet="`~|<>&\\*_#[]!\n x"))
def test_text_cannot_leave_its_cell_or_its_block(cell, block):
    table = Table(("a", "b"), [[clip(cell), clip(block)]])
    text = page_markdown("t", "l", [], [])
    lines = page_markdown("t", "l", [], [type("S", (), {"title": "s", "parts": (table, Texts("x", [("label", block)]))})()])
    rows = [line for line in lines.removeprefix(text).split("\n") if line.startswith("| ")][:3]
    assert all(len(re.findall(r"(?<!\\)(?:\\\\)*\|", row)) == 3 for row in rows)
    fence = re.search(r"^(`{3,})text\n", lines, re.MULTILINE)
    assert fence
    body = lines[fence.end() :]
    assert body.startswith(f"{block}\n{fence[1]}\n")
    assert fence[1] not in block
    assert "<" not in escape(cell + block)


@settings(max_examples=30, deadline=None)
@given(st.text())
def test_text_is_text_on_the_page(text):
    section = type("S", (), {"anchor": "s", "title": text, "parts": (Table(("a",), [[text]]), Texts(text, [(text, clip(text))]))})()
    page, plain = (Page(page_html("t", "l", [("a", value, value)], [section])) for value in (text, "x"))
    assert page.tags - Counter(small=99) == plain.tags - Counter(small=99)


def test_a_shown_text_cannot_steer_the_reader():
    assert clip("a\x00b\x1b[31mc\u202ed") == "a\ufffdb\ufffd[31mc\ufffdd"
    assert clip("x" * 1300).endswith("x … (100 more characters)")


@pytest.mark.parametrize(("part", "whole", "text"), [(1, 3, "33.3 %"), (0, 5, "0.0 %"), (1, 100_000, "0.001 %"), (1, 0, "–")])
def test_a_share_that_is_not_nothing_does_not_look_like_nothing(part, whole, text):
    assert share(part, whole) == text


# --- measures ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("column", ["seq_lens", "cu_seqlens", "position_ids"])
@pytest.mark.parametrize("form", ["stream", "file"])
def test_row_lengths_come_from_whichever_column_the_blocks_have(tmp_path, column, form):
    blocks = [[3, 5], [8], [1, 1, 4]]
    values = {
        "seq_lens": blocks,
        "cu_seqlens": [np.cumsum([0, *lengths]).tolist() for lengths in blocks],
        "position_ids": [[place for length in lengths for place in range(length)] for lengths in blocks],
    }
    table = pa.table({"input_ids": [[0] * sum(lengths) for lengths in blocks], column: values[column]})
    (tmp_path / "blocks").mkdir()
    make = pa.ipc.new_stream if form == "stream" else pa.ipc.new_file
    for name, part in (("blocks-00000.arrow", table.slice(0, 1)), ("blocks-00001.arrow", table.slice(1))):
        with make(str(tmp_path / "blocks" / name), table.schema) as writer:
            writer.write_table(part, max_chunksize=1)
    rows, sizes = packed_lengths(tmp_path)
    assert rows.tolist() == [3, 5, 8, 1, 1, 4]
    assert sizes.tolist() == [8, 8, 6]


def test_without_blocks_there_are_no_token_lengths(tmp_path):
    assert packed_lengths(tmp_path) is None


@pytest.mark.parametrize("counted", [True, False])
def test_turns_system_prompts_and_lengths_are_counted_by_domain(tmp_path, counted):
    turn = lambda role, text: {"role": role, "content": text}  # noqa: E731
    rows = [
        ("general", [turn("system", "s"), turn("user", "hé"), turn("assistant", "abc")]),
        ("code", [turn("user", "a"), turn("assistant", "b"), turn("user", "c"), turn("assistant", "d")]),
        ("general", [turn("user", "a"), turn("assistant", "b")]),
    ]
    table = pa.Table.from_pylist(
        [
            {
                "id": str(n),
                "dataset": "d",
                "domain": domain,
                "stratum": "",
                "messages": messages,
                **({"approximate_tokens": 10 + n} if counted else {}),
            }
            for n, (domain, messages) in enumerate(rows)
        ]
    )
    pq.write_table(table, tmp_path / "mixture.parquet")
    measures = measure_mixture(tmp_path)
    assert {name: dict(item.turns) for name, item in measures.domains.items()} == {"code": {2: 1}, "general": {1: 2}}
    assert {name: item.with_system for name, item in measures.domains.items()} == {"code": 0, "general": 1}
    assert measures.domains["general"].lengths.tolist() == ([10, 12] if counted else [6, 2])
    assert measures.unit == ("tokens, approximately" if counted else "characters")
    assert [len(found) for found in measures.samples.values()] == [1, 2]
