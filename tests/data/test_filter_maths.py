r"""Final answers of one solution: `\boxed{…}`, `#### …`, "The answer is: …"."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pesc.data.filters import answers_disagree


def boxed(value: str, said: str) -> str:
    return f"So the result is $\\boxed{{{value}}}$.\nThe answer is: {said}"


def hashes(value: str, said: str) -> str:
    return f"She has 3 + 4 = 7 apples.\n#### {value}\nThe answer is: {said}"


AGREE = [
    ("7", "7"),
    ("1,234", "1234"),
    ("\\$1,234.50", "1234.5"),
    ("\\frac{9}{20}", "9/20"),
    ("\\dfrac{1}{2}", "0.5"),
    ("\\frac12", "\\frac{1}{2}"),
    ("2\\frac{1}{2}", "5/2"),
    ("\\frac{2}{3}", "0.67"),
    ("25\\%", "25"),
    ("25\\%", "0.25"),
    ("6\\text{ cm}", "6"),
    ("45^\\circ", "45"),
    ("144_8", "144"),
    ("x = 5", "5"),
    ("\\text{(B)}", "B"),
    ("(1, 2)", "(1,2)"),
    ("1,2", "2, 1"),
    ("\\begin{pmatrix} 0 \\\\ 1/11 \\end{pmatrix}", "\\begin{pmatrix}0\\1/11\\end{pmatrix}"),
    ("\\left[0, 1\\right)", "[0,1)"),
    ("-4", "$-4$"),
    ("3 + 5", "5 + 3"),
    ("64\\pi", "64\\pi"),
    ("\\sin 30", "\\sin 150"),
    ("7.50", "7.5"),
    ("0.667", "0.67"),
    ("5\\text{ million}", "5000000"),
    ("2\\sqrt{8}", "4\\sqrt{2}"),
    ("3e5", "300000"),
    ("\\text{even}", "odd"),  # words are not judged
]
DISAGREE = [
    ("7", "8"),
    ("1,234", "1235"),
    ("\\frac{9}{20}", "9/21"),
    ("\\dfrac{1}{2}", "0.55"),
    ("-4", "4"),
    ("25\\%", "30\\%"),
    ("6\\text{ cm}", "7"),
    ("x = 5", "6"),
    ("\\text{(B)}", "C"),
    ("(1, 2)", "(1, 3)"),
    ("2x+1", "2x+3"),
    ("2\\frac{1}{2}", "2"),
    ("100 dollars", "$90"),
    ("7.5", "7.6"),
    ("64\\pi", "54\\pi"),
    ("\\sqrt{3}", "\\sqrt{5}"),
]


@pytest.mark.parametrize(("value", "said"), AGREE)
@pytest.mark.parametrize("form", [boxed, hashes])
def test_equal_results_agree_however_they_are_written(form, value, said):
    assert not answers_disagree(form(value, said))
    assert not answers_disagree(form(said, value))


@pytest.mark.parametrize(("value", "said"), DISAGREE)
@pytest.mark.parametrize("form", [boxed, hashes])
def test_different_results_disagree(form, value, said):
    assert answers_disagree(form(value, said))
    assert answers_disagree(form(said, value))


@pytest.mark.parametrize(
    "answer",
    [
        "The answer is: 7",
        "So $\\boxed{7}$.",
        "#### 7",
        "#### 1. First step\nWe add.\n#### 2. Second step\nWe multiply.\nThe answer is: 12",
        "Either $\\boxed{3}$ or $\\boxed{4}$. The answer is: 4",
        "Either $\\boxed{3}$ or $\\boxed{4}$. The answer is: 3 and 4",
        "$\\boxed{7}$ would be wrong. The answer is 12 for people who add. That is all, since a box was drawn in vain here.",
        "An unclosed $\\boxed{7",
        "We have $\\boxed{\\frac{15}{2}}$.The answer is: \\frac{15}{2}",
    ],
)
def test_one_value_or_a_heading_is_nothing_to_disagree_with(answer):
    assert not answers_disagree(answer)


def test_all_three_ways_are_compared():
    three = "We get $\\boxed{{{}}}$.\n#### {}\nThe answer is: {}"
    assert not answers_disagree(three.format(5, 5, 5))
    assert answers_disagree(three.format(5, 5, 6))
    assert answers_disagree(three.format(5, 6, 5))
    assert answers_disagree(three.format(6, 5, 5))


@given(st.integers(-(10**6), 10**6), st.integers(-(10**6), 10**6))
def test_integers_disagree_exactly_when_they_differ(first, second):
    assert answers_disagree(boxed(f"{first:,}", str(second))) is (first != second)
    assert answers_disagree(hashes(str(first), f"{second:,}")) is (first != second)


@given(
    st.text(alphabet="0123456789.,/-+%$\\{}()[]^_ abexfrctimes\n", max_size=60), st.text(alphabet="0123456789./,\\{}$ fracx", max_size=60)
)
def test_no_text_breaks_the_comparison_and_none_disagrees_with_itself(value, other):
    answers_disagree(boxed(value, other))
    plain = value.translate({ord(char): None for char in "{}\n"})  # braces that do not match end a box early
    assert not answers_disagree(boxed(plain, plain))
