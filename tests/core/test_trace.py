from __future__ import annotations

import json
import math
from pathlib import Path
from types import MappingProxyType

import pytest
from hypothesis import given
from hypothesis import strategies as st

from retrv_r1_retriever.errors import InputError
from retrv_r1_retriever.trace import Compressed, Forced, Full, QueryImage, ReasoningTrace, Sampled, Text, Usage
from retrv_r1_retriever.tracelog import read_traces, to_line
from retrv_r1_retriever.types import (
    Candidate,
    Content,
    Document,
    Query,
    RankedResult,
    RankedResults,
    Status,
    StopReason,
)
from tests.helpers import png

numbers = st.floats(allow_nan=False, allow_infinity=False)
segments = st.one_of(
    st.builds(Text, st.text(), st.booleans()),
    st.just(QueryImage()),
    st.builds(Compressed, st.integers(0, 126)),
    st.builds(Full, st.integers(0, 126), st.none() | st.just(Content(image=png()))),
    st.builds(
        Sampled,
        st.text(),
        st.none() | st.lists(st.integers(0, 200_000)).map(tuple),
        st.none() | st.lists(numbers).map(tuple),
    ),
    st.builds(Forced, st.text()),
)
traces = st.builds(
    ReasoningTrace,
    segments=st.lists(segments, max_size=8).map(tuple),
    answer=st.none() | st.integers(0, 126),
    margin=st.none() | numbers,
    inspected=st.lists(st.integers(0, 126)).map(tuple),
    unreadable=st.lists(st.integers(0, 126)).map(tuple),
    stop_reason=st.none() | st.sampled_from(StopReason),
    usage=st.builds(Usage, *[st.integers(0, 9)] * 5),
    timings=st.dictionaries(st.text(), numbers),
    versions=st.dictionaries(st.text(), st.text()),
    notes=st.lists(st.text()).map(tuple),
)


@given(traces)
def test_json_round_trip(trace: ReasoningTrace) -> None:
    assert ReasoningTrace.from_json(trace.to_json()) == trace


def strict(text: str) -> object:
    """As any other language reads JSON."""
    return json.loads(text, parse_constant=lambda word: pytest.fail(f"{word} is no JSON"))


def test_numbers_that_json_does_not_have_are_null() -> None:
    """The log-probability of what cannot be is minus infinity; a broken model may write NaN."""
    sampled = Sampled("x", (1, 2, 3), (-0.5, -math.inf, math.nan))
    trace = ReasoningTrace((sampled,), margin=math.inf, timings={"total": math.nan}, versions={"a": "NaN"})
    text = trace.to_json()
    strict(text)
    read = ReasoningTrace.from_json(text)
    assert read.segments == (Sampled("x", (1, 2, 3), (-0.5, -math.inf, -math.inf)),)
    assert (read.margin, read.versions) == (None, {"a": "NaN"})
    assert read.to_json() == text


def test_a_stored_list_with_such_numbers_is_read_again(tmp_path: Path) -> None:
    trace = ReasoningTrace((Sampled("x \ud800", (1,), (-math.inf,)),), notes=("\udcff",))
    trace.to_json().encode()  # can be written to a file
    result = RankedResult(Candidate(Document("a", Content("x"), {"price": math.nan}), math.nan, 1), 1, 1.0)
    line = to_line(RankedResults(Query.of("q"), (result,), Status.RERANKED, trace=trace))
    strict(line)
    (tmp_path / "traces.jsonl").write_text(line + "\n", encoding="utf-8")
    (read,) = read_traces(tmp_path / "traces.jsonl")
    assert read.trace == trace


@given(traces)
def test_a_redacted_trace_holds_no_text_and_keeps_its_shape(trace: ReasoningTrace) -> None:
    redacted = trace.redacted()
    assert [type(s) for s in redacted.segments] == [type(s) for s in trace.segments]
    assert not any(s.text for s in redacted.segments if isinstance(s, Text | Sampled | Forced))
    assert not any(s.token_ids for s in redacted.segments if isinstance(s, Sampled))
    assert not any(s.content for s in redacted.segments if isinstance(s, Full))
    assert (redacted.notes, redacted.inspected, redacted.usage) == ((), trace.inspected, trace.usage)


def test_read_only_mappings_can_be_written() -> None:
    trace = ReasoningTrace(timings=MappingProxyType({"open": 1.0}), versions=MappingProxyType({"a": "b"}))
    assert ReasoningTrace.from_json(trace.to_json()) == trace


@pytest.mark.parametrize("text", ["", "[]", "{", "null", json.dumps({"trace_version": 99})])
def test_other_json_is_a_clear_error(text: str) -> None:
    with pytest.raises(InputError, match="trace"):
        ReasoningTrace.from_json(text)


def test_the_turn_starts_after_the_prompt() -> None:
    turn = (Forced("<think>"), Sampled("x"), Full(3))
    trace = ReasoningTrace((Text("prompt"), Compressed(0), *turn))
    assert trace.turn == turn
    assert trace.thought == "<think>x[candidate 3 in full]"
