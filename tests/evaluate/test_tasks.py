"""Rows, choices and programs: from files and answers to what lm-eval scores."""

from __future__ import annotations

import gzip
import json
import string

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pesc.errors import EvaluationError
from pesc.evaluate.tasks import code
from pesc.evaluate.tasks.choices import parse_choice, split_options
from pesc.evaluate.tasks.rows import load_rows, read_rows, select_subset
from tests.evaluate.builders import PROBLEMS

ROWS = [{"question": "a", "subject": "high school physics"}, {"question": "b", "subject": "anatomy"}]


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.jsonl.gz", "rows.json", "rows.csv", "rows.parquet"])
def test_every_kind_of_file_gives_the_same_rows(tmp_path, name):
    path = tmp_path / name
    lines = "".join(json.dumps(row) + "\n" for row in ROWS)
    text = {"rows.json": json.dumps(ROWS), "rows.csv": "question,subject\na,high school physics\nb,anatomy\n"}.get(name, lines)
    if name.endswith(".parquet"):
        pq.write_table(pa.Table.from_pylist(ROWS), path)
    else:
        path.write_bytes(gzip.compress(text.encode()) if name.endswith(".gz") else text.encode())
    assert read_rows(path) == ROWS


def test_a_broken_line_is_named(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"a": 1}\n{"a": \n', encoding="utf-8")
    with pytest.raises(EvaluationError, match=r"rows\.jsonl, line 2 is not JSON"):
        read_rows(path)
    path.write_text('{"a": 1}\n3\n', encoding="utf-8")
    with pytest.raises(EvaluationError, match="row 2 is int"):
        read_rows(path)


def test_line_separators_inside_a_string_do_not_end_the_row(tmp_path):
    """GSM8K's training file has U+2028 inside a question, as JSON allows."""
    path = tmp_path / "rows.jsonl"
    path.write_text('{"question": "one\u2028two\x85three"}\n', encoding="utf-8")
    assert read_rows(path) == [{"question": "one\u2028two\x85three"}]


def test_an_unknown_kind_and_an_empty_file_are_refused(tmp_path):
    (tmp_path / "rows.xlsx").write_bytes(b"")
    with pytest.raises(EvaluationError, match="unknown kind"):
        read_rows(tmp_path / "rows.xlsx")
    (tmp_path / "rows.jsonl").write_text("\n", encoding="utf-8")
    with pytest.raises(EvaluationError, match="has no rows"):
        load_rows(files={"test": str(tmp_path / "rows.jsonl")})


def test_subsets_by_subject_and_whole_files_without_one():
    assert select_subset(ROWS, "high_school_physics") == ROWS[:1]
    assert select_subset(ROWS, None) == ROWS
    plain = [{"question": "a"}, {"question": "b"}]
    assert select_subset(plain, "main", ["main", "socratic"]) == plain
    assert select_subset([{"type": "open"}], "main", ["main", "socratic"]) == [{"type": "open"}], "a column about something else"


def test_a_file_that_lacks_a_subset_is_refused():
    """It is never asked with another subset's rows."""
    with pytest.raises(EvaluationError, match=r"no row of virology in its column subject \(2 of 3 subsets are there\)"):
        select_subset(ROWS, "virology", ["anatomy", "high_school_physics", "virology"])


_LINE = st.text(alphabet=string.ascii_letters + " .,;:()", min_size=1, max_size=30).map(str.strip).filter(bool)


@given(st.lists(_LINE, min_size=2, max_size=6))
def test_options_split_back(options):
    rendered = "\n".join(f"{string.ascii_uppercase[index]}. {option}" for index, option in enumerate(options))
    assert split_options(rendered) == options


def test_an_option_may_have_several_lines():
    assert split_options("A. x = 1\n y = 2\nB. Combine\nC. c\nD. d") == ["x = 1\n y = 2", "Combine", "c", "d"]


def test_the_answer_is_found_by_its_letter():
    row = {"question": " Why? ", "options": "A. sun\nB. sun light", "answer": "B. sun light"}
    assert parse_choice(row) == {"question": "Why?", "choices": ["sun", "sun light"], "gold": 1}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"question": "q", "choices": [], "answer": "A"}, "no 'options' field"),
        ({"question": "q", "options": "first\nsecond", "answer": "A"}, "not of the form"),
        ({"question": "q", "options": "A. x\nB. y", "answer": "C. z"}, "does not begin with the letter"),
    ],
)
def test_rows_of_another_form_are_refused(row, message):
    with pytest.raises(EvaluationError, match=message):
        parse_choice(row)


def test_right_and_wrong_answers_are_told_apart():
    answers = [[problem["canonical_solution"]] for problem in PROBLEMS]
    assert [code.score({}, [o]) for o in code.run_humaneval(answers, PROBLEMS)] == [{"pass@1": 1.0}] * 2
    assert [code.score({}, [o]) for o in code.run_humaneval(answers[::-1], PROBLEMS)] == [{"pass@1": 0.0}] * 2


def test_several_answers_give_a_share():
    outcome = code.run_humaneval([["    return a + b\n", "    return a\n", "    return None\n", "    return b + a\n"]], PROBLEMS[:1])
    assert code.score({}, outcome) == {"pass@1": 0.5}


def test_instruct_answers_end_with_their_code_block():
    assert code.run_humaneval_instruct([["    return a + b\n```\nThis adds."]], PROBLEMS[:1])[0][0]["status"] == "passed"


def test_mbpp_examples_solve_their_own_tests():
    examples = code.list_mbpp_examples()
    assert [outcome[0]["status"] for outcome in code.run_mbpp([[example["code"]] for example in examples], examples)] == ["passed"] * 3


def test_prompts_and_stops_are_lm_evals_own():
    """The code tasks differ from the stock ones in scoring only; the stock files are read as text, because importing them asks the hub."""
    from pathlib import Path

    import lm_eval
    from lm_eval.tasks import TaskManager
    from lm_eval.tasks._yaml_loader import load_yaml

    from pesc.evaluate.tasks import FOLDER

    assert TaskManager(include_path=str(FOLDER), include_defaults=False).all_tasks
    stock = Path(lm_eval.__file__).parent / "tasks"
    for ours, theirs in (
        ("pesc_humaneval", "humaneval/humaneval"),
        ("pesc_humaneval_instruct", "humaneval/humaneval_instruct"),
        ("pesc_mbpp", "mbpp/mbpp"),
    ):
        own, other = load_yaml(FOLDER / f"{ours}.yaml", resolve_func=False), load_yaml(stock / f"{theirs}.yaml", resolve_func=False)
        for key in (
            "doc_to_text",
            "doc_to_target",
            "target_delimiter",
            "gen_prefix",
            "generation_kwargs",
            "num_fewshot",
            "dataset_path",
            "dataset_name",
            "test_split",
        ):
            assert own.get(key) == other.get(key), (ours, key)
