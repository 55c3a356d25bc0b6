"""What is taken from a reply: any text gives a value, and never a candidate that was not named."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from retrv_r1_retriever.engines.chat.replies import (
    Grade,
    Reading,
    check_schema,
    merge,
    name,
    parse_check,
    parse_reading,
    reading_schema,
)
from retrv_r1_retriever.engines.chat.server import read_reply
from retrv_r1_retriever.errors import EngineError
from retrv_r1_retriever.prompt import NONE_INDEX

WHOLE = {
    "looking_for": "a red shoe",
    "candidates": {"c0": {"verdict": "Keep.", "grade": 7}, "c1": {"verdict": "blue", "grade": 1}},
    "none_fits": 2,
    "answer": "c0",
    "open": ["c1", "c1", "c9", "none", 3],
}
READ = Reading("a red shoe", {0: Grade("keep", 7.0), 1: Grade("blue", 1.0)}, 2.0, 0, (1,))


@pytest.mark.parametrize("around", ["{}", "```json\n{}\n```", "Here it is:\n{}\nI hope this helps."])
def test_a_whole_reply(around: str) -> None:
    assert parse_reading(around.replace("{}", json.dumps(WHOLE)), (0, 1)) == READ


def test_a_cut_reply_is_read_as_far_as_its_entries_are_whole() -> None:
    text = json.dumps(WHOLE)
    assert parse_reading(text[: text.index('"none_fits"')], (0, 1)).grades == READ.grades
    assert parse_reading(text[: text.index('"blue"') + 3], (0, 1)).grades == {0: Grade("keep", 7.0)}


def test_a_list_of_entries_is_read_too() -> None:
    listed = [{"label": "c1", "verdict": "blue", "grade": "1"}, {"label": "c0", "verdict": "keep", "grade": 7}]
    assert parse_reading(json.dumps({"candidates": listed}), (0, 1)).grades == READ.grades


@pytest.mark.parametrize(
    "entry", ['{"verdict": "x"}', '{"grade": 10}', '{"grade": -1}', '{"grade": true}', '{"grade": null}', "7", "[]"]
)
def test_no_grade_is_no_entry(entry: str) -> None:
    assert parse_reading(f'{{"candidates": {{"c0": {entry}}}}}', (0, 1)).grades == {}


def test_two_entries_that_contradict_each_other_count_as_none() -> None:
    text = '{"candidates": {"c0": {"verdict": "keep", "grade": 9}, "c0": {"verdict": "no", "grade": 0}}}'
    assert parse_reading(text, (0,)).grades == {}


@pytest.mark.parametrize(
    ("text", "answer"), [("c1", 1), ('"c1".', 1), ("none", NONE_INDEX), ("c7", None), ("I reject c1", None), ("", None)]
)
def test_a_bare_label_is_an_answer_and_a_label_in_a_sentence_is_not(text: str, answer: int | None) -> None:
    assert parse_reading(text, (0, 1)) == Reading(answer=answer)


def test_words_of_the_model_cannot_act_as_tags() -> None:
    said = {"candidates": {"c0": {"verdict": "no <|c1|> keep </think>\n<answer>", "grade": 3}}}
    verdict = parse_reading(json.dumps(said), (0,)).grades[0].verdict
    assert "<" not in verdict
    assert "\n" not in verdict


@given(st.text(), st.text())
def test_any_text_gives_a_value(before: str, after: str) -> None:
    for text in (before, before + json.dumps(WHOLE)[:90] + after):
        reading, checked = parse_reading(text, (0, 1)), parse_check(text, (0, 1))
        assert set(reading.grades) <= {0, 1}
        assert reading.answer in (None, 0, 1, NONE_INDEX)
        assert checked.answer in (None, 0, 1, NONE_INDEX)


KEYS = ["choices", "message", "content", "usage", "logprobs", "finish_reason", "c0", "candidates", "grade", "answer"]
LEAVES = st.none() | st.booleans() | st.floats() | st.text(max_size=3)


@given(st.recursive(LEAVES, lambda x: st.lists(x, max_size=3) | st.dictionaries(st.sampled_from(KEYS), x, max_size=4)))
def test_any_json_is_a_reply_or_a_clear_error(answer: object) -> None:
    parse_reading(json.dumps(answer), (0, 1))
    for whole in (answer, {"choices": [answer]}, {"choices": [{"message": answer}]}):
        try:
            read_reply(whole)
        except EngineError as error:
            assert str(error)  # noqa: PT017


def test_parts_are_merged_by_grade() -> None:
    other = Reading("", {2: Grade("keep", 9.0)}, 5.0, 2, (2,))
    merged = merge([READ, other])
    assert (merged.answer, merged.none_fits, merged.open) == (2, 2.0, (2, 1))
    assert set(merged.grades) == {0, 1, 2}
    assert merge([READ, Reading(answer=NONE_INDEX)]).answer == 0
    assert merge([Reading(answer=NONE_INDEX), Reading()]).answer == NONE_INDEX


def test_the_schema_leaves_no_candidate_out_and_lets_no_other_in() -> None:
    entries = reading_schema((0, 3))["properties"]["candidates"]
    assert entries["required"] == ["c0", "c3"]
    assert entries["additionalProperties"] is False
    assert check_schema((0, 3))["properties"]["answer"]["enum"] == ["c0", "c3", "none"]
    assert name(NONE_INDEX) == "none"
