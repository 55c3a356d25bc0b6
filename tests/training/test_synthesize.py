"""`retrv-r1-train synthesize` against a server that misbehaves: what is admitted, what is counted, what a kill costs."""

from __future__ import annotations

import argparse
import io
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from PIL import Image
from retrv_r1_training.endpoint import EndpointError, FatalEndpointError
from retrv_r1_training.synthesize_cli import add_parser
from retrv_r1_training.traces import read_traces

from retrv_r1_retriever.errors import InputError, OptionsError, RetrvR1Error
from retrv_r1_retriever.evaluation.runs import write_run
from retrv_r1_retriever.images import data_uri_bytes
from tests.helpers import png
from tests.training.teacher_server import candidates_of, teacher_server

ROOT = Path(__file__).parents[2]
COLOURS, SHAPES = ("red", "blue", "green", "black"), ("ring", "square", "cross")


@pytest.fixture
def data(tmp_path):
    """12 text candidates, 12 queries for one each, lists of 6; the last query's answer is in no list."""
    words = [f"{c} {s}" for c in COLOURS for s in SHAPES]
    pool = [{"did": f"9:{i}", "txt": f"a {w} in a box", "img_path": None} for i, w in enumerate(words)]
    queries, run = [], {}
    for i, w in enumerate(words):
        queries.append({"qid": f"q{i}", "query_txt": w, "query_img_path": None, "pos_cand_list": [f"9:{i}"]})
        others = [f"9:{j}" for j in random.Random(i).sample(range(12), 12) if j != i][:5]
        run[f"q{i}"] = [*others[:2], *([] if i == 11 else [f"9:{i}"]), *others[2:]]
    (tmp_path / "pool.jsonl").write_text("".join(json.dumps(r) + "\n" for r in pool))
    (tmp_path / "queries.jsonl").write_text("".join(json.dumps(r) + "\n" for r in queries))
    write_run(tmp_path / "run.trec", run, "first")
    return tmp_path


def arguments(data: Path, *more: str) -> list[str]:
    files = ["--queries", "queries.jsonl", "--pool", "pool.jsonl", "--lists", "run.trec"]
    files = [f if f.startswith("--") else str(data / f) for f in files]
    return ["synthesize", *files, "--out", str(data / "out"), *more]


def chat(url: str, *more: str) -> list[str]:
    return ["--teacher", "chat", "--endpoint", url, "--model", "m", "--body", '{"temperature": 0}', *more]


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser()
    add_parser(parser.add_subparsers())
    args = parser.parse_args(argv)
    return args.main(args)


def summary(data: Path) -> dict:
    return json.loads((data / "out" / "summary.json").read_text())


def traces(data: Path) -> list:
    return list(read_traces(data / "out" / "traces.jsonl"))


def test_free_text_becomes_traces_a_session_replays(data, capsys):
    with teacher_server() as server:
        assert main(arguments(data, *chat(server.url, "--yes", "--licence", "Apache-2.0"))) == 0
    found = {t.query_id: t for t in traces(data)}
    assert set(found) == {f"q{i}" for i in range(12)}
    assert {id: t.answer for id, t in found.items()} == {f"q{i}": f"9:{i}" for i in range(11)} | {"q11": None}
    assert {(t.teacher, t.licence) for t in found.values()} == {("m", "Apache-2.0")}
    trace = found["q0"]
    assert trace.thought.hypothesis == "Something with red ring"
    assert {v.text for v in trace.thought.verdicts} == {"keep", "no red"}
    assert [c.text for c in trace.thought.checks] == ["it says a red ring in a box match"]
    out = capsys.readouterr().out
    assert "12 lists, 0 done before, 12 to ask 'm' about" in out
    assert summary(data)["tokens_in"] == 12_000


def test_the_estimate_comes_first_and_asks(data, capsys, monkeypatch):
    with teacher_server() as server:
        priced = chat(server.url, "--price-in", "1000", "--price-out", "1000")
        assert main(arguments(data, *priced, "--dry-run")) == 0
        assert "cost: about" in capsys.readouterr().out
        assert main(arguments(data, *priced)) == 1, "no terminal and no --yes"
        assert "pass --yes" in capsys.readouterr().err
        assert not server.requests
    assert not (data / "out" / "traces.jsonl").exists()


BAD = {
    "refusal": "refused", "wrong": "wrong_answer", "invented": "invented_label", "silent": "no_answer", "long": "cut_by_length",
    "twice": "refused_inspection", "greedy": "forced_by_budget", "skips": "missing_verdicts",
}  # fmt: skip


@pytest.mark.parametrize("act", BAD)
def test_a_bad_answer_is_rejected_by_name_and_asked_for_again(data, act):
    with teacher_server(lambda query, number: act if number == 0 and query == "red ring" else "good") as server:
        assert main(arguments(data, *chat(server.url, "--yes"))) == 0
        assert server.seen["red ring"] == 2
        assert [r["seed"] for r in server.requests if "red ring\n" in r["messages"][1]["content"][1]["text"] + "\n"][
            :2
        ] == [0, 1]
    assert summary(data)["rejected"] == {BAD[act]: 1}
    assert len(traces(data)) == 12


def test_a_query_out_of_attempts_stays_out(data):
    with teacher_server(lambda query, number: "wrong" if query == "red ring" else "good") as server:
        for _ in range(2):
            assert main(arguments(data, *chat(server.url, "--yes", "--attempts", "3"))) == 0
        assert server.seen["red ring"] == 3
    assert summary(data)["rejected"] == {"wrong_answer": 3}
    assert "q0" not in {t.query_id for t in traces(data)}


TRANSIENT = {"500": "http_500", "503": "http_503", "cut": "cut_answer", "malformed": "malformed_answer",
             "other": "malformed_answer", "slow": "timeout"}  # fmt: skip


@pytest.mark.parametrize("act", TRANSIENT)
def test_a_failed_request_is_tried_again(data, act):
    with teacher_server(lambda query, number: act if number == 0 and query == "red ring" else "good") as server:
        assert main(arguments(data, *chat(server.url, "--yes", "--timeout", "3"))) == 0
        assert server.seen["red ring"] == 2
    assert summary(data)["retries_now"][TRANSIENT[act]] == 1
    assert not summary(data)["rejected"]
    assert len(traces(data)) == 12


def test_retry_after_holds_back_every_worker(data):
    with teacher_server(lambda query, number: "429" if number == 0 and query == "red ring" else "good") as server:
        assert main(arguments(data, *chat(server.url, "--yes", "--concurrency", "2"))) == 0
        gaps = [b - a for a, b in zip(server.times, server.times[1:], strict=False)]
        assert max(gaps) > 0.9
        assert sum(gap > 0.9 for gap in gaps) == 1, "they all wait at the same time"
    assert summary(data)["retries_now"] == {"http_429": 1}


def test_requests_at_a_time_are_bounded(data):
    with teacher_server(delay_s=0.1) as server:
        main(arguments(data, *chat(server.url, "--yes", "--concurrency", "3")))
        assert server.most_at_once == 3


def test_what_got_no_answer_is_counted_and_asked_again_by_the_next_run(data):
    down = {"red ring"}
    with teacher_server(lambda query, number: "500" if query in down else "good") as server:
        assert main(arguments(data, *chat(server.url, "--yes", "--retries", "0"))) == 1
        assert summary(data)["failed_now"] == {"http_500": 1}
        assert len(traces(data)) == 11
        down.clear()
        assert main(arguments(data, *chat(server.url, "--yes"))) == 0
    assert len(traces(data)) == 12
    assert set(server.seen.values()) == {1, 2}


def test_a_wrong_key_stops_the_run_at_once(data, monkeypatch):
    monkeypatch.setenv("MY_KEY", "secret")
    with teacher_server(lambda query, number: "401") as server:
        with pytest.raises(FatalEndpointError, match="Check the key"):
            main(arguments(data, *chat(server.url, "--yes", "--concurrency", "2", "--key-env", "MY_KEY")))
        assert len(server.requests) <= 2
        assert server.keys == {"Bearer secret"}
    assert "secret" not in "".join(p.read_text() for p in (data / "out").iterdir())


def test_a_server_that_is_down_does_not_go_unnoticed(data):
    with teacher_server() as server:
        url = server.url
    with pytest.raises(EndpointError, match="in a row got no answer"):
        main([*arguments(data, *chat(url, "--yes", "--retries", "0")), "--give-up-after", "3"])
    assert summary(data)["failed_now"]["no_connection"] >= 3


def test_other_lists_cannot_continue_a_run(data):
    with teacher_server() as server:
        main(arguments(data, *chat(server.url, "--yes", "--limit", "2")))
        with pytest.raises(InputError, match="answers to these questions"):
            main(arguments(data, *chat(server.url, "--yes", "--shuffle", "1", "--seed", "9")))
        assert len(server.requests) == 2


def test_a_run_of_other_queries_is_an_error(data):
    write_run(data / "run.trec", {"other": ["9:0"]}, "first")
    message = r"run\.trec: expected lists of the queries, such as q11, got lists of others, such as other"
    with pytest.raises(InputError, match=message):
        main(arguments(data, "--teacher", "words"))
    with teacher_server() as server:
        with pytest.raises(InputError, match=message):
            main(arguments(data, *chat(server.url, "--yes")))
        assert not server.requests


def test_a_hint_is_given_and_must_not_be_mentioned(data):
    with teacher_server() as server:
        assert main(arguments(data, *chat(server.url, "--yes", "--hint", "--limit", "1"))) == 0
        right = next(i for i, c in enumerate(candidates_of(server.requests[0])) if "red ring" in c)
        assert f'"c{right}"' in server.requests[0]["messages"][1]["content"][-1]["text"]


def test_bad_arguments(data):
    with pytest.raises(OptionsError, match="--endpoint: expected a value"):
        main(arguments(data, "--teacher", "chat"))
    with pytest.raises(OptionsError, match="expected http"):
        main(arguments(data, *chat("localhost:8000")))
    with pytest.raises(OptionsError, match="concurrency: expected at least 1"):
        main(arguments(data, *chat("http://localhost/v1", "--concurrency", "0")))
    with pytest.raises(OptionsError, match="retries: expected 0 or more"):
        main(arguments(data, *chat("http://localhost/v1", "--retries", "-1")))
    for wrong in (["--qrels", "nowhere"], ["--price-in", "-1"], ["--price-out", "nan"], ["--price-in", "inf"]):
        with pytest.raises(SystemExit):
            main(arguments(data, "--teacher", "words", *wrong))


def test_the_words_teacher_needs_no_server_and_repeats_itself(data):
    assert main(arguments(data, "--teacher", "words")) == 0
    first = (data / "out" / "traces.jsonl").read_bytes()
    assert len(traces(data)) == 12
    assert main(arguments(data, "--teacher", "words")) == 0, "nothing left to do"
    assert (data / "out" / "traces.jsonl").read_bytes() == first
    (data / "out" / "journal.jsonl").unlink()
    assert main(arguments(data, "--teacher", "words")) == 0
    assert (data / "out" / "traces.jsonl").read_bytes() == first


RUN = (
    "import argparse, sys; from retrv_r1_training.synthesize_cli import add_parser; p = argparse.ArgumentParser();"
    "add_parser(p.add_subparsers()); a = p.parse_args(sys.argv[1:]); sys.exit(a.main(a))"
)


def test_a_kill_loses_nothing_and_pays_nothing_twice_but_what_was_on_its_way(data):
    argv = [sys.executable, "-c", RUN]
    path = os.pathsep.join([str(ROOT), str(ROOT / "training")])
    workers, killed = 3, 0
    with teacher_server(delay_s=0.2) as server:
        argv += arguments(data, *chat(server.url, "--yes", "--concurrency", str(workers)))
        for stop_after in (2, 7):
            process = subprocess.Popen(argv, env={**os.environ, "PYTHONPATH": path}, stdout=subprocess.DEVNULL)
            deadline = time.monotonic() + 120
            while sum(server.answered.values()) < stop_after and process.poll() is None:
                assert time.monotonic() < deadline
                time.sleep(0.005)
            process.send_signal(signal.SIGKILL)
            killed += process.wait() == -signal.SIGKILL
            time.sleep(0.3)  # answers to the dead go out
        done = subprocess.run(argv, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
        assert killed == 2
        assert sum(server.seen.values()) <= 12 + killed * workers
        assert sum(server.seen.values()) > 12, "the kill came between answers; nothing was tested"
    ids = [t.query_id for t in traces(data)]
    assert sorted(ids) == sorted(f"q{i}" for i in range(12))
    entries = [json.loads(line) for line in (data / "out" / "journal.jsonl").read_text().splitlines()]
    assert len(entries) == 12


def test_a_torn_last_line_is_cut_off_and_a_broken_one_is_named(data):
    with teacher_server() as server:
        main(arguments(data, *chat(server.url, "--yes", "--limit", "3")))
        journal = data / "out" / "journal.jsonl"
        whole = journal.read_bytes()
        journal.write_bytes(whole[:-40])
        main(arguments(data, *chat(server.url, "--yes", "--limit", "3")))
        assert len(server.requests) == 4
        assert len(traces(data)) == 3
        journal.write_bytes(b"{}\n" + whole)
        with pytest.raises(InputError, match=r"journal\.jsonl:1"):
            main(arguments(data, *chat(server.url, "--yes", "--limit", "3")))


def test_two_runs_on_one_folder_are_refused(data):
    fcntl = pytest.importorskip("fcntl")
    (data / "out").mkdir()
    with (data / "out" / "journal.jsonl").open("ab") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.raises(RetrvR1Error, match="no other run"):
            main(arguments(data, "--teacher", "words"))


def test_pictures_are_sent_and_one_that_cannot_be_opened_costs_nothing(data):
    (data / "pictures").mkdir()
    (data / "pictures" / "0.png").write_bytes(png())
    rows = [json.loads(line) for line in (data / "queries.jsonl").read_text().splitlines()[:2]]
    rows = [row | {"query_img_path": f"{i}.png"} for i, row in enumerate(rows)]
    (data / "queries.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    with teacher_server() as server:
        assert (
            main(
                [*arguments(data, *chat(server.url, "--yes", "--max-pixels", "4")), "--images", str(data / "pictures")]
            )
            == 1
        )
    assert summary(data)["failed_now"] == {"unreadable_picture": 1}
    assert [t.query_id for t in traces(data)] == ["q0"]
    (request,) = server.requests
    (uri,) = [p["image_url"]["url"] for p in request["messages"][1]["content"] if p["type"] == "image_url"]
    assert Image.open(io.BytesIO(data_uri_bytes(uri))).size == (2, 2)
