"""The dedup stage as a whole: the ledger, the counts, and what makes it fail."""

from __future__ import annotations

import json
import random
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import pyarrow.parquet as pq
import pytest

from pesc.data.config import DedupConfig
from pesc.data.dedup import build
from pesc.errors import DataError
from pesc.stage import StageContext
from tests.data.builders import run_stage, tree_bytes, write_jsonl

BENCHMARK = [
    {"q": "Which planet of the solar system has the largest number of known moons?"},
    {"q": "Predators eat"},
]


def pair(query: str, response: str, **more: object) -> dict[str, object]:
    return {"query": query, "response": response, **more}


def math_rows() -> list[object]:
    """40 clean rows, then one of each kind that must go."""
    draw = random.Random(0)
    clean = [pair(f"Question {n}: " + " ".join(draw.choices("abcdefghij", k=30)), f"Answer {n}.", type=f"t{n % 2}") for n in range(40)]
    long = " ".join(f"term{n}" for n in range(80))
    return [
        *clean,
        pair(long, "The answer is 7.", type="t0"),
        pair(long, "The answer is 8.", type="t0"),
        pair("  question 0: " + clean[0]["query"].partition(": ")[2].upper(), "ANSWER 0.", type="t0"),
        pair("Copy me.", "Copy me.", type="t0"),
        pair("Say it.", "I cannot help with that.", type="t0"),
        pair("Tell me: which planet of the solar system has the largest number of known moons?", "Saturn.", type="t1"),
    ]


CHOICES = [
    {"question": "Predators eat", "options": "A. lions\nB. bunnies", "answer": "B. bunnies"},
    {"question": "Where is ice cold and hard?", "options": "A. in fire\nB. at the pole", "answer": "B. at the pole"},
]


@pytest.fixture
def source(tmp_path):
    root = tmp_path / "source"
    write_jsonl(root / "math" / "a.jsonl", math_rows())
    write_jsonl(root / "choice.jsonl", CHOICES)
    write_jsonl(root / "bench.jsonl", BENCHMARK)
    return root


def config(**changes: object) -> DedupConfig:
    settings = {
        "datasets": {
            "maths": {"source": "s", "files": ["math/*"], "domain": "math", "stratify_by": "type"},
            "choice": {"source": "s", "files": ["choice.jsonl"], "domain": "general", "format": "multiple_choice"},
        },
        "benchmarks": {"moons": {"source": "s", "files": ["bench.jsonl"], "fields": ["q"]}},
    }
    return DedupConfig.model_validate({**settings, **changes})


def run(tmp_path, source, name="run", **changes):
    return run_stage(build, config(**changes), tmp_path / name, {"s": source})


def test_every_row_is_kept_or_in_the_ledger_with_its_reason(tmp_path, source):
    out, result = run(tmp_path, source)
    rows, ledger = pq.read_table(out / "rows.parquet").to_pylist(), pq.read_table(out / "removed.parquet").to_pylist()
    by_reason = {}
    for item in ledger:
        by_reason.setdefault(item["reason"], []).append(item)
    assert {reason: len(items) for reason, items in by_reason.items()} == {
        "near": 1,
        "exact": 1,
        "filter_copied_prompt": 1,
        "filter_refusal": 1,
        "contaminated: moons": 2,
    }
    assert len(rows) == 42
    assert result.metrics["read"] == len(rows) + len(ledger) == 48
    assert [item["row"] for item in by_reason["near"]] in ([41], [42])
    assert by_reason["near"][0]["kept_id"] in {row["id"] for row in rows}
    assert by_reason["near"][0]["score"] >= 0.8
    assert {item["dataset"] for item in by_reason["contaminated: moons"]} == {"maths", "choice"}
    assert all(item["file"] and item["excerpt"] for item in ledger)


def test_the_columns_are_the_contract(tmp_path, source):
    out, _ = run(tmp_path, source)
    table = pq.read_table(out / "rows.parquet")
    assert [f"{field.name}: {field.type}" for field in table.schema] == [
        "id: string",
        "dataset: string",
        "domain: string",
        "stratum: string",
        "messages: list<element: struct<role: string, content: string>>",
        "approximate_tokens: int32",
    ]
    ledger = pq.read_table(out / "removed.parquet")
    assert ledger.column_names == ["id", "dataset", "file", "row", "reason", "kept_id", "score", "excerpt"]
    assert set(table.column("stratum").to_pylist()) == {"t0", "t1", ""}


def test_statistics_add_up_and_show_the_contamination(tmp_path, source):
    out, _ = run(tmp_path, source)
    stats = json.loads((out / "stats.json").read_text())
    for counts in (*stats["datasets"].values(), stats["total"]):
        numbers = {key: value for key, value in counts.items() if key != "domain"}
        assert numbers.pop("read") == sum(numbers.values())
    cells = stats["contamination"]["moons"]["datasets"]
    assert {name: (cell["rows"], cell["items"], cell["item_share"]) for name, cell in cells.items()} == {
        "choice": (1, 1, 0.5),
        "maths": (1, 1, 0.5),
    }
    assert cells["choice"]["examples"][0]["row"] == "Predators eat"


def test_the_rows_do_not_depend_on_their_order_or_their_files(tmp_path, source):
    out, _ = run(tmp_path, source)
    shuffled = math_rows()
    random.Random(5).shuffle(shuffled)
    (source / "math" / "a.jsonl").unlink()
    write_jsonl(source / "math" / "x.jsonl", shuffled[:20])
    write_jsonl(source / "math" / "y.jsonl", shuffled[20:])
    other, _ = run(tmp_path, source, "other")
    assert (out / "rows.parquet").read_bytes() == (other / "rows.parquet").read_bytes()
    assert (out / "stats.json").read_bytes() == (other / "stats.json").read_bytes()


def test_the_same_input_gives_the_same_bytes(tmp_path, source):
    assert tree_bytes(run(tmp_path, source)[0]) == tree_bytes(run(tmp_path, source, "again")[0])


def test_a_bad_row_is_quarantined_with_its_place(tmp_path, source):
    with (source / "math" / "a.jsonl").open("a") as stream:
        stream.write('{"query": "no answer"}\nnot json at all\n')
    out, _ = run(tmp_path, source, filters={"max_malformed_share": 0.1})
    bad = [item for item in pq.read_table(out / "removed.parquet").to_pylist() if item["reason"].startswith("malformed")]
    assert [(item["file"], item["row"]) for item in bad] == [("math/a.jsonl", 47), ("math/a.jsonl", 48)]
    assert "'response' is missing" in bad[0]["reason"]
    assert "not valid JSON" in bad[1]["reason"]


def test_too_many_bad_rows_fail_and_name_the_first(tmp_path, source):
    with (source / "math" / "a.jsonl").open("a") as stream:
        stream.write('{"query": "no answer"}\n')
    with pytest.raises(DataError, match=r"'maths': 1 of 47 rows .*math/a\.jsonl, row 47, field 'response' is missing"):
        run(tmp_path, source)


def test_rows_without_an_answer_are_no_conversations(tmp_path, source):
    """The test split of CommonsenseQA, as packaged."""
    write_jsonl(source / "choice.jsonl", [{"question": "Where is ice?", "options": "\nA. here\nB. there"}])
    with pytest.raises(DataError, match=r"'choice': 1 of 1 rows .*field 'answer' is missing"):
        run(tmp_path, source)


def test_a_set_that_collapses_under_near_duplicates_fails_loudly(tmp_path, source):
    text = " ".join(f"word{n}" for n in range(100))
    write_jsonl(source / "math" / "a.jsonl", [pair(text, f"Answer {n}.", type="x") for n in range(10)])
    with pytest.raises(DataError, match=r"'maths' would lose 9 of 10 rows \(90.0%\) to near-duplicates.*resembles.*max_duplicate_share"):
        run(tmp_path, source)
    out, _ = run(tmp_path, source, "allowed", max_duplicate_share=0.95)
    assert json.loads((out / "stats.json").read_text())["datasets"]["maths"]["near"] == 9


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"benchmarks": {"b": {"source": "s", "files": ["bench.jsonl"], "fields": ["prompt"]}}}, r"'b': bench\.jsonl, row 1 .*'prompt'"),
        ({"benchmarks": {"b": {"source": "s", "files": ["nothing*"], "fields": ["q"]}}}, r"no file that matches 'nothing\*'"),
        ({"datasets": {"d": {"source": "s", "files": ["bench.jsonl"], "domain": "x"}}}, r"fields of no known format \(q\)"),
        (
            {"datasets": {"d": {"source": "s", "files": ["choice.jsonl"], "domain": "x", "stratify_by": "typ"}}},
            r"field 'typ' is missing \(stratify_by\)",
        ),
        ({"filters": {"min_answer_chars": 99999}}, r"No row is left of 48"),
    ],
)
def test_settings_that_do_not_fit_the_data_are_sentences(tmp_path, source, changes, says):
    with pytest.raises(DataError, match=says):
        run(tmp_path, source, **changes)


def test_max_rows_reads_from_the_start(tmp_path, source):
    datasets = {"maths": {"source": "s", "files": ["math/*"], "domain": "math", "max_rows": 5}}
    _, result = run(tmp_path, source, datasets=datasets)
    assert result.metrics["read"] == 5


def test_a_near_duplicate_of_a_contaminated_row_does_not_survive_it(tmp_path, source):
    """The longer row holds the benchmark's question; its shorter twin falls just short of the rule, and goes all the same."""
    story = " ".join(f"filler{n}" for n in range(100))
    question = BENCHMARK[0]["q"]
    twins = [pair(f"{story} {question}", "Saturn."), pair(f"{story} Which planet of the solar system?", "Saturn.")]
    write_jsonl(source / "math" / "a.jsonl", [*twins, pair("Unrelated.", "Yes.")])
    datasets = {"maths": {"source": "s", "files": ["math/*"], "domain": "math"}}
    out, _ = run(tmp_path, source, datasets=datasets)
    assert [row["messages"][0]["content"] for row in pq.read_table(out / "rows.parquet").to_pylist()] == ["Unrelated."]


def test_progress_is_reported(tmp_path, source):
    seen = []
    run_stage(build, config(), tmp_path / "run", {"s": source}, on_progress=seen.append)
    assert {item.message.split(":")[0] for item in seen} >= {"filtering", "near-duplicates", "writing"}
    assert all(0 <= item.done <= item.total for item in seen)


def many_files(tmp_path) -> object:
    """Rows with duplicates across five files, so that there are several batches."""
    root = tmp_path / "many"
    rows = math_rows() * 2
    for number in range(5):
        write_jsonl(root / f"{number}.jsonl", rows[number::5])
    write_jsonl(root / "bench.jsonl", BENCHMARK)
    return root


SMALL = {"datasets": {"maths": {"source": "s", "files": ["?.jsonl"], "domain": "math"}}}


def test_the_bytes_do_not_depend_on_batches_or_workers(tmp_path, monkeypatch):
    root = many_files(tmp_path)
    whole, _ = run(tmp_path, root, "whole", **SMALL)
    monkeypatch.setattr("pesc.data.dedup.BATCH_BYTES", 3000)
    with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as pool:
        settings = config(**SMALL)
        cut, _ = run_stage(build, settings, tmp_path / "cut", {"s": root}, map_shards=lambda function, items: pool.map(function, items))
    assert len(list((tmp_path / "cut" / "work" / "batches").iterdir())) > 3
    assert tree_bytes(whole) == tree_bytes(cut)


def test_a_killed_run_goes_on_with_the_batches_it_has(tmp_path, monkeypatch):
    root = many_files(tmp_path)
    monkeypatch.setattr("pesc.data.dedup.BATCH_BYTES", 3000)
    whole, _ = run(tmp_path, root, "whole", **SMALL)

    def stop_after_two(function, items):
        yield from map(function, items[:2])
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_stage(build, config(**SMALL), tmp_path / "killed", {"s": root}, map_shards=stop_after_two)
    made = []

    def note(function, items):
        made.extend(item for item in items if not (getattr(item, "out", None) and item.out.exists()))
        return map(function, items)

    out, work = tmp_path / "killed" / "out", tmp_path / "killed" / "work"
    before = {path.name for path in (work / "batches").iterdir()}
    build(StageContext("test", config(**SMALL), {"s": root}, out, work, map_shards=note))
    assert len(before) == 2
    assert not before & {item.out.name for item in made if hasattr(item, "out")}
    assert tree_bytes(out) == tree_bytes(whole)


def test_a_question_keeps_at_most_so_many_rows(tmp_path, source):
    draw = random.Random(1)
    rows = [pair(" ".join(draw.choices("abcdefghij", k=40)), f"Answer {n}.", original=f"question {n % 3}") for n in range(30)]
    write_jsonl(source / "math" / "a.jsonl", rows)
    capped = {"maths": {"source": "s", "files": ["math/*"], "domain": "math", "group_by": "original", "max_per_group": 4}}
    out, _ = run(tmp_path, source, datasets=capped)
    ledger = pq.read_table(out / "removed.parquet").to_pylist()
    assert {item["reason"] for item in ledger} == {"group_cap"}
    gone = {item["row"] for item in ledger}
    assert [sum(row % 3 == group for row in gone) for group in range(3)] == [6, 6, 6]
    random.Random(2).shuffle(rows)
    write_jsonl(source / "math" / "a.jsonl", rows)
    again, _ = run(tmp_path, source, "again", datasets=capped)
    assert (out / "rows.parquet").read_bytes() == (again / "rows.parquet").read_bytes()


def test_the_system_prompt_can_be_the_stratum(tmp_path, source):
    turns = [("system", "Be brief."), ("human", "Why?"), ("gpt", "So.")]
    chats = [[{"from": role, "value": text} for role, text in turns[skip:]] for skip in (0, 1)]
    write_jsonl(source / "chat.jsonl", [{"conversations": chat} for chat in chats])
    datasets = {"chat": {"source": "s", "files": ["chat.jsonl"], "domain": "general", "stratify_by": "system"}}
    out, _ = run(tmp_path, source, datasets=datasets, near_duplicate_threshold=1.0)
    assert sorted(pq.read_table(out / "rows.parquet")["stratum"].to_pylist()) == ["", "Be brief."]


def test_equal_rows_of_two_strata_leave_the_same_one_in_any_order(tmp_path, source):
    rows = [pair("Why is the sky blue?", "Light scatters.", type=name, original=f"q{name}") for name in "xyz"]
    settings = {"maths": {"source": "s", "files": ["math/*"], "domain": "math", "stratify_by": "type"}}
    outputs = []
    for name, order in (("one", rows), ("other", rows[::-1])):
        write_jsonl(source / "math" / "a.jsonl", order)
        outputs.append((run(tmp_path, source, name, datasets=settings)[0] / "rows.parquet").read_bytes())
    assert outputs[0] == outputs[1]


def test_rows_without_a_group_are_not_one_group(tmp_path, source):
    draw = random.Random(1)
    rows = [pair(" ".join(draw.choices("abcdefghij", k=40)), f"Answer {n}.", original=None if n % 2 else "") for n in range(6)]
    write_jsonl(source / "math" / "a.jsonl", rows)
    capped = {"maths": {"source": "s", "files": ["math/*"], "domain": "math", "group_by": "original", "max_per_group": 1}}
    _, result = run(tmp_path, source, datasets=capped)
    assert result.metrics["kept"] == 6
