from __future__ import annotations

import os

from hypothesis import given
from hypothesis import strategies as st

from pesc.launch.events import MARKER, ProgressEmitter, emit, encode, parse
from pesc.stage import Progress

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@given(
    st.text(min_size=1), st.dictionaries(st.text(), json_values, max_size=4), st.text().filter(lambda t: MARKER not in t and "\n" not in t)
)
def test_an_event_survives_the_pipe_behind_any_unfinished_line(kind, fields, noise):
    event = {**fields, "event": kind}
    line = encode(event).decode()
    assert line.count("\n") == 1
    assert parse(noise + line.rstrip("\n")) == (noise, event)


@given(st.text().filter(lambda t: MARKER not in t))
def test_other_output_is_never_an_event(text):
    assert parse(text) == (text, None)


def test_a_torn_event_is_other_output():
    torn = encode({"event": "log", "message": "x" * 50}).decode()[:30]
    assert parse(torn) == (torn, None)
    assert parse(f"{MARKER}[1, 2]")[1] is None
    assert parse(f"{MARKER}{{}}")[1] is None


def test_a_reader_that_has_gone_away_is_no_error():
    reader, writer = os.pipe()
    os.close(reader)
    emit({"event": "late"}, writer)
    os.close(writer)


def test_progress_is_thinned_but_the_last_one_always_sent():
    sent = []
    emitter = ProgressEmitter(interval=60, send=sent.append)
    for done in range(1, 101):
        emitter(Progress(done, 100, "rows", "", {"loss": 1.0}))
    assert [event["done"] for event in sent] == [1, 100]
    assert sent[0]["fields"] == {"loss": 1.0}
