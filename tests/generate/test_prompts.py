"""A prompt file: a broken row is named before the first one is answered."""

import io
import sys
from types import SimpleNamespace

import pytest

from pesc.errors import DataError
from pesc.generate.prompts import read_prompts

GOOD = b'{"prompt": "a", "id": 7}\n\n{"messages": [{"role": "user", "content": "b"}]}\n'


def test_rows_keep_their_line_and_their_other_fields(tmp_path, monkeypatch):
    (tmp_path / "p.jsonl").write_bytes(GOOD)
    rows = read_prompts(str(tmp_path / "p.jsonl"))
    assert [(row.number, row.content) for row in rows] == [(1, "a"), (3, [{"role": "user", "content": "b"}])]
    assert rows[0].fields["id"] == 7
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(GOOD)))
    assert read_prompts("-") == rows


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b"{", "is not JSON"),
        (b"\xff", "is not JSON"),
        (b'"text"', "must be an object with `prompt` or `messages`, not str"),
        (b"{}", "must have `prompt` or `messages`, one of the two"),
        (b'{"prompt": "a", "messages": []}', "must have `prompt` or `messages`, one of the two"),
        (b'{"prompt": ""}', "`prompt` must be a text that is not empty"),
        (b'{"prompt": 3}', "`prompt` must be a text that is not empty"),
        (b'{"messages": []}', "`messages` must be a list that is not empty"),
        (b'{"messages": [{"role": "user"}]}', "message 1 must be an object with `role` and `content`, both text"),
        (b'{"messages": [{"role": "user", "content": "a"}, {"role": "human", "content": "b"}]}', "message 2 has the role 'human'"),
        (b"[" * 100_000, "is not JSON"),
    ],
)
def test_a_broken_row_is_named(tmp_path, line, message):
    path = tmp_path / "p.jsonl"
    path.write_bytes(GOOD + line)
    with pytest.raises(DataError) as error:
        read_prompts(str(path))
    assert str(error.value).startswith(f"{path}, row 4: ")
    assert message in str(error.value)


def test_a_file_without_rows_and_one_that_is_not_there_are_sentences(tmp_path):
    (tmp_path / "p.jsonl").write_bytes(b"\n")
    with pytest.raises(DataError, match="has no rows: write one JSON object a line"):
        read_prompts(str(tmp_path / "p.jsonl"))
    with pytest.raises(DataError, match="none cannot be read"):
        read_prompts(str(tmp_path / "none"))
