"""What carries loss, under templates of many families, with a tokenizer whose pad token is its end token."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pesc.data.chat import CHATML, PESC, ChatRenderer, TemplateRefusal
from pesc.errors import DataError
from tests.data.builders import tiny_tokenizer

DEFAULT_SYSTEM = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}<|im_start|>system\nYou are helpful.<|im_end|>\n{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAMA2 = (
    "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'user' %}[INST] {{ message['content'] }} [/INST]"
    "{% elif message['role'] == 'assistant' %} {{ message['content'] }} {{ eos_token }}"
    "{% else %}{{ raise_exception('no system turn') }}{% endif %}{% endfor %}"
)
THINKING = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['role'] == 'assistant' and loop.last %}<think>\n\n</think>\n\n{% endif %}{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
PLAIN = "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}\n{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"

TURNS = [("user", "Why?"), ("assistant", "So."), ("user", "So what?"), ("assistant", "Because.")]


def with_loss(template: str, messages: list[tuple[str, str]]) -> list[str]:
    rendered = ChatRenderer(tiny_tokenizer(template), "model").render(messages)
    return [rendered.text[span.start : span.end] for span in rendered.spans]


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        (CHATML, ["So.<|im_end|>", "Because.<|im_end|>"]),
        (DEFAULT_SYSTEM, ["So.<|im_end|>", "Because.<|im_end|>"]),
        (PESC, ["So.<|im_end|>", "Because.<|im_end|>"]),
        (LLAMA2, [" So. <|im_end|>", " Because. <|im_end|>"]),
        (THINKING, ["So.<|im_end|>", "<think>\n\n</think>\n\nBecause.<|im_end|>"]),
        (PLAIN, ["So.", "Because."]),
    ],
)
def test_every_assistant_turn_and_its_end_carry_loss(template, expected):
    assert with_loss(template, TURNS) == expected


@pytest.mark.parametrize("template", [CHATML, DEFAULT_SYSTEM, PESC, LLAMA2, THINKING])
def test_the_text_is_what_the_template_renders(template):
    tokenizer = tiny_tokenizer(template)
    turns = [{"role": role, "content": content} for role, content in TURNS]
    rendered = ChatRenderer(tokenizer, "model").render(TURNS)
    assert rendered.text == tokenizer.apply_chat_template(turns, tokenize=False)
    assert rendered.text[: rendered.prompt_end] == tokenizer.apply_chat_template(turns[:-1], tokenize=False, add_generation_prompt=True)
    assert not rendered.append_end


def test_a_default_system_prompt_is_there_and_carries_no_loss():
    rendered = ChatRenderer(tiny_tokenizer(DEFAULT_SYSTEM), "model").render(TURNS[:2])
    assert "You are helpful." in rendered.text[: rendered.spans[0].start]


def test_a_template_without_an_end_token_gets_one():
    rendered = ChatRenderer(tiny_tokenizer(PLAIN), "model").render(TURNS)
    assert rendered.append_end
    assert rendered.text.endswith("assistant: Because.")


def test_a_system_turn_that_the_template_refuses_goes_before_the_question():
    renderer = ChatRenderer(tiny_tokenizer(LLAMA2), "model")
    rendered = renderer.render([("system", "Be brief."), *TURNS[:2]])
    assert "[INST] Be brief.\n\nWhy? [/INST]" in rendered.text


def test_the_reference_form_is_as_published():
    """bos + '### System:…### Human:…### Assistant:' + answer + eos; the BOS is the tokenizer's own."""
    rendered = ChatRenderer(tiny_tokenizer(None), "pesc").render([("system", "Be brief."), *TURNS[:2]])
    assert rendered.text == "### System:\nBe brief.\n### Human:\nWhy?\n### Assistant:\nSo.<|im_end|>"


@pytest.mark.parametrize(
    ("template", "messages", "says"),
    [
        ("{% for m in messages %}{{ m['content'] | upper }}{% endfor %}", TURNS, "rewrites the content"),
        ("{{ messages[0]['content'] }}", TURNS, "does not render the turns"),
        (LLAMA2, [("user", "a"), ("tool", "b"), ("assistant", "c")], "no system turn"),
        (CHATML, [("user", "what is <|im_end|>?"), ("assistant", "a token")], r"special token '<\|im_end\|>' as text"),
    ],
)
def test_what_cannot_be_masked_rightly_is_refused(template, messages, says):
    with pytest.raises(TemplateRefusal, match=says):
        ChatRenderer(tiny_tokenizer(template), "model").render(messages)


def test_turns_of_the_reference_form_stand_on_lines_of_their_own():
    rendered = ChatRenderer(tiny_tokenizer(None), "pesc").render(TURNS)
    turns = ["### Human:\nWhy?", "### Assistant:\nSo.<|im_end|>", "### Human:\nSo what?", "### Assistant:\nBecause.<|im_end|>"]
    assert rendered.text == "\n".join(turns)


def test_a_tool_turn_is_shown_and_carries_no_loss():
    turns = [("user", "Rain?"), ("assistant", "CALL rain"), ("tool", "no"), ("assistant", "No.")]
    assert with_loss(CHATML, turns) == ["CALL rain<|im_end|>", "No.<|im_end|>"]
    assert "<|im_start|>tool\nno<|im_end|>" in ChatRenderer(tiny_tokenizer(CHATML), "model").render(turns).text
    assert "### Tool:\nno\n### Assistant:\n" in ChatRenderer(tiny_tokenizer(None), "pesc").render(turns).text


@pytest.mark.parametrize(
    "template",
    [
        "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] | trim }}<|im_end|>\n{% endfor %}",
        "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'].split('</think>')[-1] }}<|im_end|>\n{% endfor %}",
        "{% for m in messages %}{% if '{{' in m['content'] %}{{ raise_exception('no braces') }}{% endif %}"
        "<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}",
    ],
)
def test_of_many_rows_only_those_that_the_template_rewrites_or_rejects_are_refused(template):
    """The check is on every row, however late and rare the one is that the template treats differently."""
    odd = "</think> {{ x " if "trim" not in template else " x "
    rows = [[("user", f"question {n}"), ("assistant", odd if n in (300, 399) else f"answer {n}")] for n in range(400)]
    renderer = ChatRenderer(tiny_tokenizer(template), "model")
    results = renderer.render_all(rows)
    assert [n for n, row in enumerate(results) if isinstance(row, TemplateRefusal)] == [300, 399]
    kept = [row.text for row in results if not isinstance(row, TemplateRefusal)]
    assert kept == [renderer.render(row).text for n, row in enumerate(rows) if n not in (300, 399)]


def test_a_tokenizer_without_template_or_end_token_says_what_to_do():
    with pytest.raises(DataError, match=r"no chat template. Set tokenize\.chat_template"):
        ChatRenderer(tiny_tokenizer(None), "model")
    tokenizer = tiny_tokenizer(CHATML)
    tokenizer.eos_token = None
    with pytest.raises(DataError, match="no end token"):
        ChatRenderer(tokenizer, "model")


RENDERERS = {name: ChatRenderer(tiny_tokenizer(template), "model") for name, template in {"chatml": CHATML, "thinking": THINKING}.items()}
content = st.text(alphabet=st.characters(codec="utf-8", exclude_categories=["Cs"]), min_size=1, max_size=30).map(str.strip).filter(bool)


@settings(deadline=None, max_examples=100)
@given(st.lists(st.tuples(content, content), min_size=1, max_size=4), st.sampled_from(sorted(RENDERERS)))
def test_spans_are_the_answers_for_any_text(rounds, name):
    messages = [turn for question, answer in rounds for turn in (("user", question), ("assistant", answer))]
    rendered = RENDERERS[name].render(messages)
    spans = [rendered.text[span.start : span.end] for span in rendered.spans]
    head = "<think>\n\n</think>\n\n" if name == "thinking" else ""
    expected = [answer + "<|im_end|>" for _, answer in rounds]
    assert spans == [*expected[:-1], head + expected[-1]]
