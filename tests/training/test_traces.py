"""Trace files: round trip, whole or not at all, bad lines named."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from retrv_r1_training.traces import TeacherTrace, read_traces, write_traces

from retrv_r1_retriever.errors import InputError
from retrv_r1_retriever.parser import Check, Thought, Verdict, render
from retrv_r1_retriever.prompt import DIFFERS, MATCH, NONE_INDEX

WORDS = st.text("abc é的", min_size=1).filter(str.strip)


@st.composite
def traces(draw):
    ids = tuple(draw(st.lists(WORDS, min_size=1, max_size=6, unique=True)))
    verdicts = tuple(Verdict(i, draw(WORDS)) for i in range(len(ids)))
    opened = draw(st.lists(st.integers(0, len(ids) - 1), unique=True))
    matches = {i: draw(st.booleans()) for i in opened}
    checks = tuple(Check(i, f"{draw(WORDS).strip()} {MATCH if m else DIFFERS}", m) for i, m in matches.items())
    answer = draw(st.sampled_from([NONE_INDEX, *range(len(ids))]))
    return TeacherTrace(draw(WORDS), ids, Thought(draw(WORDS), verdicts, checks, answer), "t", "l", "h")


@given(st.lists(traces(), max_size=4))
def test_what_is_written_is_read(tmp_path_factory, written):
    path = tmp_path_factory.mktemp("traces") / "traces.jsonl"
    assert write_traces(path, written) == len(written)
    assert list(read_traces(path)) == written
    assert [t.turn for t in written] == [render(t.thought) for t in written]


GOOD = TeacherTrace("q", ("a", "b"), Thought("h", (Verdict(0, "keep"),), (), 1), "t", "", "h").to_dict()


@pytest.mark.parametrize(
    "line",
    [
        "{",
        "[]",
        json.dumps(GOOD | {"trace_version": 2}),
        json.dumps(GOOD | {"answer": "c"}),
        json.dumps(GOOD | {"verdicts": [[2, "keep"]]}),
        json.dumps(GOOD | {"checks": [["a", "x"]]}),
        json.dumps({k: v for k, v in GOOD.items() if k != "teacher"}),
    ],
)
def test_a_bad_line_is_named(tmp_path, line):
    path = tmp_path / "traces.jsonl"
    path.write_text(json.dumps(GOOD) + "\n" + line + "\n")
    with pytest.raises(InputError, match=r"traces\.jsonl:2"):
        list(read_traces(path))


def test_the_answer_is_an_id_or_none(tmp_path):
    assert GOOD["answer"] == "b"
    assert TeacherTrace.from_dict(GOOD | {"answer": None}).thought.answer == NONE_INDEX


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "traces.jsonl"
    write_traces(path, [TeacherTrace.from_dict(GOOD)])

    def broken():
        yield TeacherTrace.from_dict(GOOD)
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write_traces(path, broken())
    assert len(list(read_traces(path))) == 1
