"""Words are what the expression says, whatever the alphabet; the normal form is NFKC, one space, one case."""

from __future__ import annotations

import re
import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pesc.data.text import excerpt, normal_form, words

alphabets = st.sampled_from(["aZ_0 9\n.\x1c", "éÀßµ²ª\x85\xa0 x", "’‘“”–—…•−a b", "ЯжİΣ नमस्ते 漢字", "ﬁⅣ\ud800\0"])
texts = st.one_of(st.text(), alphabets.flatmap(st.text), st.lists(alphabets.flatmap(st.text)).map("".join))


@given(texts)
def test_words_are_the_lower_cased_expression(text):
    assert words(text) == re.findall(r"\w+", text.lower())


@pytest.mark.parametrize("block", range(0, 0x110000, 0x10000))
def test_every_character_is_split_as_the_expression_splits_it(block):
    for character in map(chr, range(block, block + 0x10000)):
        text = f"{character}a{character} B{character}"
        assert words(text) == re.findall(r"\w+", text.lower())


@given(texts)
def test_the_normal_form_is_nfkc_with_single_spaces_and_no_case(text):
    assert normal_form(text) == re.sub(r"\s+", " ", unicodedata.normalize("NFKC", text)).strip().casefold()


def test_golden_words():
    assert words("Tom's “Big-Endian” café: 3.5 kg_x\r\n") == ["tom", "s", "big", "endian", "café", "3", "5", "kg_x"]


def test_an_excerpt_is_one_line_of_at_most_its_length():
    assert excerpt("a\n b") == "a b"
    assert excerpt("x" * 200) == "x" * 159 + "…"
