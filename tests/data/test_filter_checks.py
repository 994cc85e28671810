"""Each check of one answer on clear cases of both kinds."""

from __future__ import annotations

import sys

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from pesc.data.filters import (
    encoding,
    has_bad_encoding,
    has_broken_python,
    has_foreign_script,
    has_loop,
    has_python2,
    has_unclosed_code,
    is_empty,
    is_other_language,
    is_refusal,
    is_truncated,
    names_itself,
    prose,
)
from pesc.errors import DataError


@pytest.mark.parametrize("answer", ["...", "…", "---", "```\n```", "<nooutput>", "<No Output>", "- \n- \n- ", "."])
def test_answers_without_content_are_empty(answer):
    assert is_empty(answer)


@pytest.mark.parametrize("answer", ["no", "7", "?", "+", "No output", "🙂", "if x < 3 ...", "是", "-1", "**", "|", "<", "-"])
def test_short_answers_are_not_empty(answer):
    assert not is_empty(answer)


@pytest.mark.parametrize(
    "answer",
    [
        "I'm sorry, but I can't assist with that request.",
        "I’m sorry, but I cannot help with that.",
        "I cannot provide medical advice.",
        "I'm sorry, but I don't have the capability to book flights.",
        "Unfortunately, I do not have access to real-time data.",
        "As an AI language model, I am unable to browse the internet.",
        "I apologize, but I won't write that.",
    ],
)
def test_refusals_are_found(answer):
    assert is_refusal(answer)


@pytest.mark.parametrize(
    "answer",
    [
        "I cannot say which of the two is older; the text gives no dates.",
        "The company was sorry. It could not assist the victims.",
        "Unfortunately, the train was late, so Ann arrived at nine.",
        "I'm sorry, but I'm unable to come into work today due to unforeseen medical issues.",
        "Unfortunately, we cannot provide a refund after 30 days. Kind regards, the shop",
        "I can't help falling in love with you",
        "I won't give up on us, even if the skies get rough",
        "Can't answer",
    ],
)
def test_sentences_of_the_same_words_are_no_refusals(answer):
    assert not is_refusal(answer)


@pytest.mark.parametrize(
    "answer",
    [
        "As an AI language model, I do not have feelings.",
        "Here are some ideas. As an AI, I rely on clear instructions.",
        "I'm an AI Assistant, so unable to see the site.",
        "Sure! I was trained by OpenAI to help.",
        "I am a large language model created by Google, so here it is.",
        "Well, I am ChatGPT.",
        "I’m Claude, an AI made by Anthropic.",
        "My knowledge cutoff is September 2021, so prices may differ.",
    ],
)
def test_self_references_are_found(answer):
    assert names_itself(answer, "What does a pound of apples cost?")


@pytest.mark.parametrize(
    "answer",
    [
        "A language model assigns probabilities to texts. OpenAI released GPT-2 in 2019.",
        "You can train an AI model by gradient descent.",
        "As an AI researcher, I have led a team of five.",
        "I am an AI engineer with ten years of practice.",
        "As a machine learning engineer, I split my training data first.",
        "As a language teacher, I correct essays every day.",
        "BERT can be used as a language model after a change of its mask.",
        'const input = "Hello, I am an AI language model!";',
        "text = 'I am an AI assistant.'",
        "I am Claude, a painter's son, and this is my story.",
        "The bridge was designed by Google engineers.",
    ],
)
def test_sentences_about_models_are_no_self_references(answer):
    assert not names_itself(answer, "Write something.")


def test_a_user_who_asks_about_ai_is_answered_but_no_vendor_is_named_as_ones_own():
    asked = "Are you an AI, and do you sleep?"
    assert not names_itself("As an AI, I do not sleep.", asked)
    assert not names_itself("I am an AI assistant created by {{author}}.", "Who created you?")
    assert names_itself("I am an AI assistant, and I was created by OpenAI.", asked)
    assert names_itself("As an AI, I do not sleep.", "You are an AI assistant. Do you sleep?")


@pytest.mark.parametrize(
    "answer",
    [
        "The cafÃ© is open.",
        "itâ€™s late",
        "It is 20Â°C.",
        "naÃ¯ve",
        "ðŸ˜€ hello",
        "broken \ufffd sign",
        "a\x00b",
        "a\x08b",
        "a\x9db",
        "Ð¿Ñ€Ð¸Ð²ÐµÑ‚",
    ],
)
def test_wrong_encodings_are_found(answer):
    assert has_bad_encoding(answer)


@pytest.mark.parametrize(
    "answer",
    [
        "The café is open.",
        "it’s late — “so”",
        "20 °C, £5, 5 €",
        "SÃO PAULO",
        "Âge d’or",
        "naïve résumé",
        "привет",
        "你好",
        "🙂👨‍👩‍👧",
        "a\tb\r\nc",
        "Ã, â, Â",
        "Åsa Ågren",
    ],
)
def test_right_encodings_are_kept(answer):
    assert not has_bad_encoding(answer)


@given(st.text(alphabet=st.characters(min_codepoint=0xA1, max_codepoint=0x2FFF, categories=["L"]), min_size=1, max_size=20))
def test_text_read_in_the_wrong_encoding_is_found_whatever_it_says(text):
    shown = text.encode("utf-8").decode("latin-1")
    assert has_bad_encoding(shown)


RUSSIAN = "Эти права включают право выбирать своих партнеров и решать, когда."


@pytest.mark.parametrize(
    ("answer", "others", "expected"),
    [
        (RUSSIAN, "Name three rights of a citizen.", True),
        (RUSSIAN, "Translate the following sentence: These rights would include…", False),
        (RUSSIAN, "Say it in Russian.", False),
        (RUSSIAN, "Какие права?", False),
        ("The word is мир, which means peace and world.", "Name a word.", False),
        ("Let α, β and γ be angles.", "Name three angles.", False),
        ("中华人民共和国" * 4, "Give a description of the country.", True),
    ],
)
def test_an_answer_in_a_script_that_nobody_asked_for_is_found(answer, others, expected):
    assert has_foreign_script(answer, others) is expected


FRENCH = "Le comité a recommandé que le gouvernement reprenne ses prérogatives politiques et qu'il présente un plan au parlement. " * 2
ENGLISH = "The panel has recommended that the government reclaim its powers and that it present a plan to the parliament this year. " * 2


def test_languages_are_told_apart_in_long_answers_alone():
    pytest.importorskip("pycld2", reason="optional: pip install 'pesc[language]'")
    assert is_other_language(FRENCH, ("en",))
    assert not is_other_language(FRENCH, ("en", "fr"))
    assert not is_other_language(ENGLISH, ("en",))
    assert not is_other_language(FRENCH[:100], ("en",))
    assert not is_other_language(f"```\n{FRENCH}\n```", ("en",))
    assert not is_other_language("bonjour le monde\x00\x01" * 40, ("en",))


def test_the_missing_package_of_the_language_check_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "pycld2", None)
    encoding._cld2.cache_clear()
    with pytest.raises(DataError, match=r"filters\.languages needs the package pycld2: pip install -e '\.\[language\]'"):
        is_other_language(FRENCH, ("en",))
    encoding._cld2.cache_clear()


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("the cat sat on the mat " * 12, True),
        ("A good start of an answer. " + "and then " * 40, True),
        ("yes " * 30, True),
        ("0, " * 200, False),
        ("| --- | --- |\n" * 20, False),
        (" ".join(f"Step {n}: add {n} to the sum." for n in range(40)), False),
        ("short short short short short", False),
        (" ".join(f"word{n}" for n in range(400)), False),
    ],
)
def test_loops_of_words_are_found_but_not_rows_of_numbers(answer, expected):
    assert has_loop(answer) is expected


@given(
    st.lists(st.sampled_from(["the", "cat", "sat", "on", "a", "mat"]), max_size=40),
    st.lists(st.sampled_from(["the", "cat", "and", "x", "dog"]), min_size=1, max_size=26),
    st.integers(1, 12),
    st.lists(st.sampled_from(["the", "end", "of", "it"]), max_size=40),
)
@example(["a"] * 3, ["the", "cat"], 12, ["end"])
def test_the_quick_look_at_a_few_places_never_misses_a_loop(before, phrase, times, after):
    words = before + phrase * times + after
    numbers: dict[str, int] = {}
    ids = np.array([numbers.setdefault(word, len(numbers)) for word in words])
    needed = max(prose.LOOP_WORDS, int(len(words) * prose.LOOP_SHARE))
    slow = len(words) >= prose.LOOP_WORDS and any(
        prose._repeats(words, ids, period, max(needed, prose.LOOP_REPEATS * period)) for period in range(1, prose.LOOP_PERIOD + 1)
    )
    assert has_loop(" ".join(words)) is slow


@pytest.mark.parametrize(
    "answer",
    [
        "It is no longer with us. It was a fine bird. Its memory serves as a reminder of the importance of",
        "There are three reasons why the sky is blue, and the first of them is the",
        "First you should mix the flour and the eggs, then the milk, and after all that you add,",
        'In the end the old man looked at the sea and said "come back to me',
        "Therefore the two sides of the equation are $x + 3 =",
        "const rows = [\n  {id: 1},\n  {id: 2},\n  {id: 3},",
        "Here it is:\n```js\nfunction add(a, b) {\n  const c = a;\n  const d = b;\n  return plus(\n```",
    ],
)
def test_truncated_answers_are_found(answer):
    assert is_truncated(answer)


@pytest.mark.parametrize(
    "answer",
    [
        "Done.",
        "yes",
        "A book that one can be proud of",
        "Romanian:",
        "cream, butter, Parmesan cheese, vinegar, salt, pepper, nutmeg,",
        "def gcd(a, b):\n    while b:\n        a, b = b, a % b\n    return a",
        'for i in range(len(arr)): \n\tprint ("%d" %arr[i]),',
        'find "$dir" -type f -name \'*.txt\' -exec mv -t "$target" {} +',
        "She was the one that everybody in the village was always looking for",
        "He is 6'2\" tall, she is 5'9\" tall, and both of them play well",
        "The answer is: \\frac{9}{20}",
        "Opened with `{`, as in\n```c\nint main() {\n```",
        "The class begins with\n```java\npublic class A {\n    int x;\n    int y;\n}\n```",
    ],
)
def test_whole_answers_are_not_truncated(answer):
    assert not is_truncated(answer)


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("```python\nx = 1\n```", False),
        ("```python\nx = 1\n", True),
        ("```\na\n```\ntext\n```js\nb", True),
        ("use `x` and ``y``", False),
        ("````md\n```py\nx\n```\n````", False),
        ("  ```\nx\n  ```", False),
        ("It prints:\n\n```Median value is: 23```\n\nas expected.", False),
        ("text ``` in a line", False),
        ("~~~\ncode\n```\n~~~", False),
        ("~~~\ncode", True),
    ],
)
def test_unclosed_code_fences_are_found(answer, expected):
    assert has_unclosed_code(answer) is expected


def python(*lines: str) -> str:
    return "Here you are:\n```python\n" + "\n".join(lines) + "\n```\nIt works."


LOST_INDENTATION = python("def factorial(n):", " if n == 0:", " return 1", " else:", " return n * factorial(n-1)")
PRINT_STATEMENT = python("import sys", "for name in sys.argv:", "    print 'Hello', name")


@pytest.mark.parametrize(
    "answer",
    [
        LOST_INDENTATION,
        python("def f(x):", "    return (x + 1", "", "print(f(2))"),
        python("x = 1", "y = = 2", "z = 3"),
        "```py\na = 1\nb = 'open\nc = 2\n```",
        "1. Do:\n   ```Python3\n   a = 1\n   if a\n       b = 2\n   ```",
        python("a = 1", "b = 2\x00", "c = 3"),
    ],
)
def test_python_that_does_not_parse_is_found(answer):
    assert has_broken_python(answer)
    assert not has_python2(answer)


@pytest.mark.parametrize(
    "answer",
    [
        python("def f(x):", "    return x + 1", "", "print(f(2))"),
        "1. Do:\n   ```python\n   a = 1\n   if a:\n       b = 2\n   ```",
        python(">>> 1 + 1", "2", ">>> print('a'", "a"),
        python("$ pip install pesc", "import pesc", "pesc.run()"),
        python("pip install numpy", "import numpy as np", "np.zeros(3)"),
        python("def f(x):", "    ...rest of the code...", "    return x", "    ..."),
        python("class A:", "    def parse(self):", "        # Your implementation here", "", "    def run(self):", "        return 1"),
        python("elif x > 3:", "    y = 1", "else:", "    y = 2"),
        python("1. Import the library:", "    import nltk", "2. Tokenize:", "    words = text.split()"),
        python("for <name> in <names>:", "    print(<name>)", "x = 1"),
        python("def f(x):"),
        python("return 1", "x = 2", "await y"),
        python("x = 'a\\d'", "y = 1 is 1", "assert (x, y)"),
        python(*["(" * 300, "x", ")" * 300]),
        python("x = (", "y" * 20_001, "z"),
        "```javascript\nlet x = {;\nlet y = 1;\nlet z = 2;\n```",
        "```python\nx = (\ny = 2\nz = 3\n",
        PRINT_STATEMENT,
        "no code at all",
    ],
)
def test_python_that_parses_or_is_not_meant_to_is_kept(answer):
    assert not has_broken_python(answer)


@pytest.mark.parametrize(
    "line", ["    print 'Hello', name", "    print name", "    exec 'x = 1'", "    raise ValueError, 'no'", "    a = b <> c"]
)
def test_python_2_is_its_own_reason(line):
    answer = python("import sys", "for name in sys.argv:", line)
    assert has_python2(answer)
    assert not has_broken_python(answer)
    assert not has_python2(python("import sys", "for name in sys.argv:", "    print('Hello', name)"))
