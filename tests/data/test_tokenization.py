"""Packed blocks read back as a trainer reads them."""

from __future__ import annotations

import json
import multiprocessing
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st

from pesc.data import token_shards, tokenization
from pesc.data.chat import CHATML, TEMPLATES
from pesc.data.config import TokenizeConfig
from pesc.data.encoding import IGNORED, RowEncoder
from pesc.data.tokenization import build
from pesc.errors import DataError
from pesc.stage import StageContext
from tests.data.builders import run_stage, save_mixture, tiny_tokenizer, tree_bytes

LLAMA2 = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}[INST] {{ m['content'] }} [/INST]{% else %} {{ m['content'] }} {{ eos_token }}"
    "{% endif %}{% endfor %}"
)
ROWS = [
    [("user", f"question {n} " + "fox " * (n % 7)), ("assistant", f"answer {n}"), ("user", "and?"), ("assistant", "dog " * (n % 5 + 1))]
    for n in range(60)
]
ROWS = [[(role, text.strip()) for role, text in row] for row in ROWS]


@pytest.fixture
def model(tmp_path):
    tiny_tokenizer(CHATML).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def run(tmp_path, model, rows=ROWS, name="run", **settings):
    inputs = {"mixture": save_mixture(tmp_path / f"{name}-mix", rows), "model": model}
    return run_stage(build, TokenizeConfig(**settings), tmp_path / name, inputs)


def read_blocks(out: Path, name: str = "blocks") -> list[dict]:
    """Every block of an object, as `datasets` reads it."""
    return [block for path in sorted(out.glob(f"{name}-*.arrow")) for block in Dataset.from_file(str(path))]


def unpack(out: Path, name: str = "blocks") -> list[tuple[list[int], list[int]]]:
    """(input_ids, labels) of each packed row, after checking the block's own bookkeeping."""
    rows = []
    for block in read_blocks(out, name):
        assert block["cu_seqlens"][0] == 0
        for start, end in pairwise(block["cu_seqlens"]):
            assert block["position_ids"][start:end] == list(range(end - start))
            rows.append((block["input_ids"][start:end], block["labels"][start:end]))
        assert block["cu_seqlens"][-1] == len(block["input_ids"]) == len(block["labels"]) == len(block["position_ids"])
    return rows


def supervised(tokenizer, row) -> str:
    return tokenizer.decode([label for label in row[1] if label != IGNORED])


def test_blocks_hold_every_row_and_only_the_answers_carry_loss(tmp_path, model):
    """Decoding where there is loss gives the answers and their end tokens, though the pad token is the end token."""
    out, result = run(tmp_path, model, context_length=128, heldout_prompts=6)
    tokenizer = tiny_tokenizer(CHATML)
    rows = unpack(out)
    expected = sorted("".join(f"{text}<|im_end|>" for role, text in row if role == "assistant") for row in ROWS[6:])
    assert sorted(supervised(tokenizer, row) for row in rows) == expected
    assert all(label in (IGNORED, token) for ids, labels in rows for token, label in zip(ids, labels, strict=True))
    assert result.metrics["rows"] == 54
    assert max(len(block["input_ids"]) for block in read_blocks(out)) <= 128


def test_the_file_is_an_arrow_stream_of_int32(tmp_path, model):
    out, _ = run(tmp_path, model, context_length=128)
    table = Dataset.from_file(str(out / "blocks-00000.arrow")).data.table
    assert {field.name: str(field.type) for field in table.schema} == dict.fromkeys(
        ("input_ids", "labels", "position_ids", "cu_seqlens"), "list<item: int32>"
    )


def test_prompts_are_of_rows_outside_the_blocks(tmp_path, model):
    out, _ = run(tmp_path, model, context_length=128, heldout_prompts=4)
    prompts = json.loads((out / "prompts.json").read_text())
    assert len(prompts) == 4
    tokenizer = tiny_tokenizer(CHATML)
    texts = [tokenizer.decode(ids) for ids, _ in unpack(out)]
    assert all(prompt.endswith("<|im_start|>assistant\n") for prompt in prompts)
    assert not any(text.startswith(prompt) for text in texts for prompt in prompts)


def test_statistics_are_those_of_the_blocks(tmp_path, model):
    out, _ = run(tmp_path, model, context_length=128)
    stats, rows = json.loads((out / "stats.json").read_text()), unpack(out)
    assert stats["rows"] == len(rows) == stats["rows_in"] - stats["held_out"] - sum(stats["dropped"].values())
    assert stats["tokens"] == sum(len(ids) for ids, _ in rows)
    assert stats["supervised_tokens"] == sum(label != IGNORED for _, labels in rows for label in labels)
    blocks = len(read_blocks(out))
    assert stats["fill"] == pytest.approx(stats["tokens"] / (128 * blocks), abs=1e-6)


def test_the_same_mixture_gives_the_same_bytes(tmp_path, model):
    assert tree_bytes(run(tmp_path, model, context_length=64)[0]) == tree_bytes(run(tmp_path, model, name="again", context_length=64)[0])


@pytest.mark.parametrize("name", ["model", "chatml", "pesc"])
def test_a_template_that_is_not_the_models_own_goes_with_the_blocks(tmp_path, model, name):
    out, _ = run(tmp_path, model, chat_template=name)
    written = out / "chat_template.jinja"
    assert (written.read_text() if written.exists() else None) == TEMPLATES.get(name)


def test_workers_and_shards_do_not_show_in_the_bytes(tmp_path, model, monkeypatch):
    """In this process as one shard, and in two worker processes as nine shards that are asked for last first."""
    inputs = {"mixture": save_mixture(tmp_path / "mix", ROWS, {"code": ROWS[:9], "math": ROWS[9:20]}), "model": model}
    config = TokenizeConfig(context_length=64)
    here, _ = run_stage(build, config, tmp_path / "here", inputs)
    monkeypatch.setattr(tokenization, "cut_rows", partial(token_shards.cut_rows, shard_rows=7))
    asked = []
    with ProcessPoolExecutor(2, mp_context=multiprocessing.get_context("spawn")) as pool:

        def map_shards(function, items):
            asked.append(len(items))
            futures = [pool.submit(function, item) for item in reversed(items)]
            return [future.result() for future in reversed(futures)]

        workers, _ = run_stage(build, config, tmp_path / "workers", inputs, map_shards=map_shards)
    assert asked == [9, 3]
    assert tree_bytes(here) == tree_bytes(workers)
    assert {"blocks-00000.arrow", "heldout-00000.arrow", "prompts.json", "stats.json"} == set(tree_bytes(here))


def test_a_killed_attempt_leaves_nothing_in_the_result_and_a_finished_one_no_scratch(tmp_path, model):
    inputs = {"mixture": save_mixture(tmp_path / "mix", ROWS), "model": model}
    config = TokenizeConfig(context_length=64)
    expected = tree_bytes(run_stage(build, config, tmp_path / "first", inputs)[0])
    work, out = tmp_path / "work", tmp_path / "out"
    out.mkdir()
    killed = work / "tokens" / "mixture"
    (killed / "00000").mkdir(parents=True)
    for left_over in ("00000.arrow", "00000/ids.npy", "00007.arrow"):
        (killed / left_over).write_bytes(b"half a file")
    build(StageContext("tokenize", config, inputs, out, work))
    assert tree_bytes(out) == expected
    assert list(work.iterdir()) == []


def held_out_rows(name: str, count: int) -> list[list[tuple[str, str]]]:
    return [[("user", f"{name} question {n}"), ("assistant", f"{name} answer {n}")] for n in range(count)]


def test_held_out_rows_become_blocks_of_their_domain_and_no_training_row_goes(tmp_path, model):
    """Also where a row of one domain is dropped: the domain of each block is that of its rows."""
    held_out = {"math": held_out_rows("math", 7), "code": held_out_rows("code", 5)}
    held_out["math"][2] = [("user", "<|im_end|>"), ("assistant", "refused")]
    inputs = {"mixture": save_mixture(tmp_path / "mix", ROWS, held_out), "model": model}
    out, result = run_stage(build, TokenizeConfig(context_length=64), tmp_path / "run", inputs)
    tokenizer = tiny_tokenizer(CHATML)
    blocks = read_blocks(out, "heldout")
    assert [block["domain"] for block in blocks] == sorted(block["domain"] for block in blocks)
    for domain, count in (("code", 5), ("math", 6)):
        texts = [tokenizer.decode(block["input_ids"]) for block in blocks if block["domain"] == domain]
        assert sum(text.count("<|im_start|>assistant") for text in texts) == count
        assert all(f"{domain} question" in text for text in texts)
    answers = sorted(supervised(tokenizer, row) for row in unpack(out, "heldout"))
    assert answers == sorted(f"{row[1][1]}<|im_end|>" for rows in held_out.values() for row in rows if row[1][1] != "refused")
    stats = json.loads((out / "stats.json").read_text())
    assert stats["heldout"]["math"]["rows"] == 6
    assert sum(counts["blocks"] for counts in stats["heldout"].values()) == len(blocks)
    assert sum(counts["tokens"] for counts in stats["heldout"].values()) == sum(len(block["input_ids"]) for block in blocks)
    assert result.metrics["rows"] == stats["rows_in"] == len(ROWS)
    assert len(unpack(out)) == len(ROWS)


def test_prompts_are_dealt_over_the_domains_of_the_held_out_rows(tmp_path, model):
    held_out = {"math": held_out_rows("math", 1), "code": held_out_rows("code", 9), "general": held_out_rows("general", 3)}
    held_out["general"][0] = [("user", "x " * 200), ("assistant", "over the context")]
    inputs = {"mixture": save_mixture(tmp_path / "mix", ROWS, held_out), "model": model}
    out, _ = run_stage(build, TokenizeConfig(context_length=64, heldout_prompts=6), tmp_path / "run", inputs)
    prompts = json.loads((out / "prompts.json").read_text())
    expected = ["code question 0", "math question 0", "code question 1", "general question 1", "code question 2", "general question 2"]
    assert prompts == [f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n" for question in expected]


def test_where_no_prompt_fits_the_context_the_shortest_is_kept(tmp_path, model):
    held_out = {"code": [[("user", "x " * length), ("assistant", "a")] for length in (99, 80, 90)]}
    inputs = {"mixture": save_mixture(tmp_path / "mix", ROWS, held_out), "model": model}
    out, _ = run_stage(build, TokenizeConfig(context_length=64), tmp_path / "run", inputs)
    (prompt,) = json.loads((out / "prompts.json").read_text())
    assert prompt.count("x ") == 80
    assert not list(out.glob("heldout-*"))


def test_overlong_rows_are_cut_or_dropped_and_never_without_loss(tmp_path, model):
    long_answer = [("user", "short"), ("assistant", "x " * 200 + "end")]
    long_question = [("user", "x " * 200 + "end"), ("assistant", "short")]
    rows = [*ROWS[:9], long_answer, long_question]
    out, _ = run(tmp_path, model, rows, context_length=64, heldout_prompts=1)
    stats = json.loads((out / "stats.json").read_text())
    assert stats["dropped"] == {"overlong": 0, "no_answer_left": 1, "template": 0}
    assert stats["truncated"] == 1
    packed = unpack(out)
    assert all(any(label != IGNORED for label in labels) for _, labels in packed)
    assert sum(len(ids) == 64 for ids, _ in packed) == 1
    out, _ = run(tmp_path, model, rows, name="drop", context_length=64, overlong="drop", heldout_prompts=1)
    assert json.loads((out / "stats.json").read_text())["dropped"]["overlong"] == 2


def test_nothing_left_is_a_sentence(tmp_path, model):
    with pytest.raises(DataError, match="No row is left to train on"):
        run(tmp_path, model, [[("user", "x " * 99), ("assistant", "y")]] * 3, context_length=16)


def test_a_directory_without_a_tokenizer_is_a_sentence(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="no usable tokenizer"):
        run(tmp_path, tmp_path / "empty")


@pytest.mark.parametrize(("template", "adds_bos"), [(LLAMA2, True), (LLAMA2, False), (CHATML, True)])
def test_there_is_one_bos(template, adds_bos):
    tokenizer = tiny_tokenizer(template, adds_bos=adds_bos)
    (row,) = RowEncoder(tokenizer, TokenizeConfig()).encode([ROWS[3]]).rows
    assert list(row.ids).count(tokenizer.bos_token_id) == 1
    assert row.ids[0] == tokenizer.bos_token_id
    answers = [text for role, text in ROWS[3] if role == "assistant"]
    decoded = tokenizer.decode(row.labels()[row.labels() != IGNORED])
    assert decoded.replace(" ", "") == "".join(f"{answer}<|im_end|>" for answer in answers).replace(" ", "")


def test_no_bos_is_added_where_the_tokenizer_adds_none():
    tokenizer = tiny_tokenizer(CHATML)
    (row,) = RowEncoder(tokenizer, TokenizeConfig()).encode([ROWS[3]]).rows
    assert tokenizer.bos_token_id not in row.ids


def test_a_template_that_ends_nothing_gets_the_end_token_with_loss():
    tokenizer = tiny_tokenizer(
        "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
    )
    (row,) = RowEncoder(tokenizer, TokenizeConfig()).encode([[("user", "a"), ("assistant", "naïve 🦊")]]).rows
    assert row.ids[-1] == tokenizer.eos_token_id == row.labels()[-1]
    assert tokenizer.decode(row.labels()[row.labels() != IGNORED]) == "naïve 🦊<|im_end|>"


ENCODER_TOKENIZER = tiny_tokenizer(CHATML)
ENCODER = RowEncoder(ENCODER_TOKENIZER, TokenizeConfig(context_length=4096))
text = st.text(alphabet=st.characters(codec="utf-8", exclude_categories=["Cs"]), min_size=1, max_size=40).map(str.strip).filter(bool)


@settings(deadline=None, max_examples=150)
@given(st.lists(st.tuples(text, text), min_size=1, max_size=3))
def test_decoding_the_loss_gives_the_answers_for_any_text(rounds):
    messages = [turn for question, answer in rounds for turn in (("user", question), ("assistant", answer))]
    (row,) = ENCODER.encode([messages]).rows
    labels = row.labels()
    assert ENCODER_TOKENIZER.decode(labels[labels != IGNORED]) == "".join(f"{answer}<|im_end|>" for _, answer in rounds)
    assert np.array_equal(row.ids, ENCODER_TOKENIZER(ENCODER.renderer.render(messages).text, add_special_tokens=False)["input_ids"])


@pytest.mark.slow
def test_the_real_model_becomes_a_plain_directory_and_answers(smollm2):
    """In a process of its own: it loads without GGUF, holds bf16 weights, and knows the capital of France."""
    names = {path.name for path in smollm2.iterdir()}
    assert names >= {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "chat_template.jinja"}
    assert "transformers_version" not in (smollm2 / "config.json").read_text()
    program = (
        "import sys, torch; from transformers import AutoModelForCausalLM, AutoTokenizer\n"
        "t = AutoTokenizer.from_pretrained(sys.argv[1]); m = AutoModelForCausalLM.from_pretrained(sys.argv[1])\n"
        "assert type(m).__name__ == 'LlamaForCausalLM' and m.dtype == torch.bfloat16 and m.num_parameters() == 134515008\n"
        "x = t.apply_chat_template([{'role': 'user', 'content': 'What is the capital of France?'}], add_generation_prompt=True,"
        " return_tensors='pt', return_dict=True)\n"
        "print(t.decode(m.generate(**x, max_new_tokens=12, do_sample=False)[0][x['input_ids'].shape[1]:]))"
    )
    done = subprocess.run([sys.executable, "-c", program, str(smollm2)], capture_output=True, text=True, check=True, timeout=300)
    assert "Paris" in done.stdout


@pytest.mark.slow
def test_real_rows_round_trip_through_the_real_tokenizer(tmp_path, smollm2, real_conversations):
    """Multi-turn and single-turn rows: where there is loss, and nowhere else, stand the answers and their end tokens."""
    from transformers import AutoTokenizer

    rows = [*real_conversations(), *real_conversations("instructions_extra/glaive_toolcall_en_demo.json")]
    out, _ = run(tmp_path, smollm2, rows, context_length=16384, heldout_prompts=1)
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    assert tokenizer.pad_token_id == tokenizer.eos_token_id
    expected = sorted("".join(f"{content}<|im_end|>" for role, content in row if role == "assistant") for row in rows[1:])
    assert sorted(supervised(tokenizer, row) for row in unpack(out)) == expected
    stats = json.loads((out / "stats.json").read_text())
    assert stats["dropped"] == {"overlong": 0, "no_answer_left": 0, "template": 0}
    assert stats["straddling_tokens"] == 0
