"""Trace files: what is written can be read again, what is redacted cannot, and a foreign file is a clear error."""

from __future__ import annotations

import json
import stat
from pathlib import Path

import pytest

from retrv_r1_retriever.engines.scripted import ScriptedEngine
from retrv_r1_retriever.errors import EngineError, InputError
from retrv_r1_retriever.observe import ObserveConfig, open_observers
from retrv_r1_retriever.options import BALANCED
from retrv_r1_retriever.parser import Check, Thought, Verdict
from retrv_r1_retriever.plain import artifact, results_json
from retrv_r1_retriever.reranker import RetrvR1Reranker
from retrv_r1_retriever.trace import ReasoningTrace
from retrv_r1_retriever.tracelog import TraceLog, read_traces, redacted, to_line
from retrv_r1_retriever.types import Candidate, Content, Document, Query, RankedResults, Status
from tests.helpers import png
from tests.report.samples import fallback, rescued, text_list

THINK = BALANCED.with_options(think="always")
THOUGHT = Thought("s3cret", (Verdict(0, "s3cret"), Verdict(1, "keep")), (Check(1, "s3cret match", True),), 1)
SECRET = [
    Candidate(Document(f"id-{n}", Content("s3cret", f"s3cret{n}.png"), {"a": "s3cret"}), 0.5, n + 1) for n in range(3)
]


def reranker(path: Path, engine: ScriptedEngine, redact: bool = False) -> RetrvR1Reranker:
    return RetrvR1Reranker(
        engine, observers=open_observers(ObserveConfig(traces=str(path), redact=redact), path.parent)
    )


async def written(path: Path, redact: bool) -> list[RankedResults]:
    """Three calls: one answered (its picture cannot be opened), one batch of one, one failed."""
    good = ScriptedEngine(THOUGHT, slots=(1.0, 2.0, 0.0, -1.0))
    results = [
        await reranker(path, good, redact).arerank(Query.of("s3cret", None, "s3cret", "q1"), SECRET, options=THINK)
    ]
    results += await reranker(path, good, redact).arerank_batch(["s3cret"], [SECRET], options=THINK)
    failing = ScriptedEngine(failing={"open": EngineError("s3cret host is down")})
    return [*results, await reranker(path, failing, redact).arerank("s3cret", SECRET, options=THINK)]


async def test_every_call_is_one_line_that_is_read_again(tmp_path: Path) -> None:
    path = tmp_path / "traces.jsonl"
    results = await written(path, redact=False)
    stored = list(read_traces(path))
    assert [results_json(r) for r in stored] == [results_json(r) for r in results]
    assert [r.trace for r in stored] == [r.trace for r in results]
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


async def test_a_redacted_line_has_ids_and_numbers_and_no_word(tmp_path: Path) -> None:
    path = tmp_path / "traces.jsonl"
    results = await written(path, redact=True)
    assert "s3cret" not in path.read_text(encoding="utf-8")
    stored = list(read_traces(path))
    assert stored == [redacted(r) for r in results]
    for kept, whole in zip(stored, results, strict=True):
        assert [(r.document.id, r.rank, r.score, r.candidate.rank) for r in kept] == [
            (r.document.id, r.rank, r.score, r.candidate.rank) for r in whole
        ]
        assert (kept.status, kept.query.id) == (whole.status, whole.query.id)
    assert [r.reason for r in stored] == ["not_opened", "not_opened", "engine"]


@pytest.mark.parametrize("entry", [rescued(), text_list(), fallback()])
def test_lists_of_all_kinds_survive(entry: object, tmp_path: Path) -> None:
    results = entry.results  # type: ignore[attr-defined]
    (tmp_path / "t").write_text(to_line(results) + "\n", encoding="utf-8")
    [stored] = read_traces(tmp_path / "t")
    assert results_json(stored)["results"][0]["id"] == results_json(results)["results"][0]["id"]
    assert (stored.status, stored.trace) == (results.status, results.trace)


def test_an_adapters_artifact_and_a_bare_trace_are_read_too(tmp_path: Path) -> None:
    results = rescued().results
    assert results.trace is not None
    (tmp_path / "a.json").write_text(json.dumps(artifact(results), indent=2), encoding="utf-8")
    [stored] = read_traces(tmp_path / "a.json")
    assert stored.trace == results.trace
    (tmp_path / "b.json").write_text(results.trace.to_json(), encoding="utf-8")
    [bare] = read_traces(tmp_path / "b.json")
    assert bare.query.content.text is not None
    assert bare.query.content.text.endswith("two red ring stripes thin a4 b1 c7")
    assert (bare.trace, bare.status) == (results.trace, Status.PARTIAL)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("nonsense", r"t:2: expected a trace as JSON, got JSONDecodeError"),
        ("[]", r"t:2: expected a trace as JSON"),
        ("{}", r"t:2: expected a trace as JSON, got KeyError: 'query'"),
        ('{"record_version": 2}', r"t:2: record_version: expected 1, got 2\. Read it with the release that wrote it"),
        ('{"trace_version": 99}', r"t:2: trace_version: expected 1, got 99\. Read it with the release that wrote it"),
    ],
)
def test_what_is_no_trace_or_a_newer_one_is_named_by_its_line(tmp_path: Path, line: str, message: str) -> None:
    (tmp_path / "t").write_text(f"{ReasoningTrace().to_json()}\n{line}\n", encoding="utf-8")
    with pytest.raises(InputError, match=message):
        list(read_traces(tmp_path / "t"))


def test_a_newer_trace_inside_a_record_is_named_too(tmp_path: Path) -> None:
    record = json.loads(to_line(rescued().results))
    record["trace"]["trace_version"] = 2
    (tmp_path / "t").write_text(json.dumps(record), encoding="utf-8")
    with pytest.raises(InputError, match=r"t:1: trace_version: expected 1, got 2"):
        list(read_traces(tmp_path / "t"))


async def test_a_full_disk_costs_no_call(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    asking = RetrvR1Reranker(ScriptedEngine(slots=(1.0, 0.0)), observers=(TraceLog(tmp_path / "none" / "t"),))
    assert (await asking.arerank("q", [Document("a", Content("a", png()))])).results
    assert "a trace could not be written to" in caplog.text


def test_a_folder_that_is_not_there_is_said_before_any_work(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"traces .*none/t\.jsonl: expected a file in a writable folder"):
        open_observers(ObserveConfig(traces="none/t.jsonl"), tmp_path)
