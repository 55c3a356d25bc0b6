"""What a reader at the terminal is told besides the list."""

from __future__ import annotations

import pytest

from retrv_r1_retriever.cli.show import print_results, status_line
from retrv_r1_retriever.engines.scripted import ScriptedEngine
from retrv_r1_retriever.options import BALANCED, FAST
from retrv_r1_retriever.parser import Check, Thought, Verdict
from retrv_r1_retriever.prompt import NONE, NONE_INDEX, label
from retrv_r1_retriever.reranker import RetrvR1Reranker
from tests.helpers import candidates

SLOTS = (1.0, 2.0, 0.0, 3.0, -1.0)


def shown(engine: ScriptedEngine, capsys: pytest.CaptureFixture[str], options=BALANCED) -> str:
    print_results(RetrvR1Reranker(engine, options=options).rerank("q", candidates(4)))
    return " ".join(capsys.readouterr().out.split())


def test_what_a_thought_left_out_is_in_the_summary(capsys: pytest.CaptureFixture[str]) -> None:
    checks = (Check(1, "match", True), Check(77, "match", True))  # the second one is refused
    thought = Thought("x", (Verdict(0, "blue"), Verdict(1, "keep"), Verdict(9, "keep"), Verdict(2, "")), checks, 1)
    out = shown(ScriptedEngine(thought, slots=SLOTS), capsys)
    assert (
        "inspections refused: 1, verdicts on labels that no candidate has: 1, candidates without a verdict: 2 of 4"
        in out
    )
    assert "keeps #2 rejects #1 blue opens" in out, "neither the unknown label nor the one without a word"


def test_words_of_the_verdict_column_are_explained(capsys: pytest.CaptureFixture[str]) -> None:
    thought = Thought("x", (Verdict(0, "blue"), Verdict(1, "keep")), (), 1)
    assert "verdict: keep, or the model's first reason against it" in shown(
        ScriptedEngine(thought, slots=SLOTS), capsys
    )
    assert "verdict:" not in shown(ScriptedEngine(slots=SLOTS), capsys, FAST), "a direct read has no words"


def test_checks_are_shown_without_labels_and_short(capsys: pytest.CaptureFixture[str]) -> None:
    noise = f"a4 same differs{label(0)}{NONE * 30} " + "x y " * 200
    out = shown(ScriptedEngine(Thought("x", (), (Check(3, noise, None),), 3), slots=SLOTS), capsys)
    assert "opens #4 a4 same differs #1 none (×30) x y" in out
    assert "<|" not in out
    assert len(out) < 1000


def test_a_complete_thought_needs_no_such_line() -> None:
    thought = Thought("x", tuple(Verdict(i, "no") for i in range(3)), (Check(3, "match", True),), 3)
    results = RetrvR1Reranker(ScriptedEngine(thought, slots=SLOTS)).rerank("q", candidates(4))
    assert len(status_line(results).splitlines()) == 1


def test_none_fits_is_a_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    out = shown(ScriptedEngine(Thought("x", (Verdict(0, "no"),), (), NONE_INDEX), slots=SLOTS), capsys)
    assert "The model answers that no candidate fits; this is its next-best order." in out
    assert "answers no candidate fits" in out


def test_notes_are_shown_without_a_thought_too(capsys: pytest.CaptureFixture[str]) -> None:
    out = shown(ScriptedEngine(slots=SLOTS, direct_read=False), capsys, FAST)
    assert "reasoning" not in out
    assert "note the direct read of this checkpoint was not trained" in out
