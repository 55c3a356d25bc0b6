"""`retrv-r1 eval` over a real store and a real (untrained) model; `eval compare` over files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from retrv_r1_retriever.evaluation.runs import read_run
from retrv_r1_retriever.filters import matches
from retrv_r1_retriever.store import Equals, Filter, OneOf, Range
from retrv_r1_retriever.tracelog import read_traces
from tests.cli.conftest import Run
from tests.evaluation.mbeir_root import write_root

MODE = "K=20 auto/hybrid"  # of the workplace's config
QUERIES = [
    {"id": "a", "text": "two red circle", "positives": ["card1"]},
    {"query_txt": None, "query_img_path": "card0.png", "qid": "90:1", "pos_cand_list": ["card0"]},
    {"text": "nothing of the kind", "positives": ["elsewhere"]},
]


@pytest.fixture
def indexed(workplace: Path, run: Run) -> Path:
    run("index", "items")
    Path("queries.jsonl").write_text("\n".join(map(json.dumps, QUERIES)))
    return workplace


def test_modes_over_the_same_candidates(indexed: Path, run: Run) -> None:
    modes = ["--mode", "never/logits", "--mode", "always/hybrid", "--top-k", "2,20,2", "--price", 1, 4]
    ran = run("eval", "queries.jsonl", *modes, "--run", "run.txt", "--report", "eval.html", "--json")
    names = ["K=2 never/logits", "K=2 always/hybrid", "K=20 never/logits", "K=20 always/hybrid"]
    assert list(ran.json["modes"]) == names
    assert ran.json["missing_positives"] == ["elsewhere"]
    direct, thought = (ran.json["modes"][name] for name in names[2:])
    assert direct["ceiling"] == thought["ceiling"] == pytest.approx(2 / 3)
    assert direct["first_stage"] == thought["first_stage"]
    assert direct["lost"]["first stage"] == 1
    assert (direct["lost"]["thought"], direct["lost"]["inspection"]) == (0, 0), "it did not think"
    assert thought["lost"]["direct read"] == 0
    assert all(sum(m["lost"].values()) == round(3 * (1 - m["reranked"]["recall@1"])) for m in (direct, thought))
    assert thought["tokens_out"] > direct["tokens_out"] == 0
    assert direct["cost"] == pytest.approx(direct["tokens_in"] / 1_000)
    assert direct["p50"] > 0
    written = read_run(Path("run.retrv-r1.K2.never.logits.txt"))
    assert {query: len(documents) for query, documents in written.items()} == {"a": 4, "90:1": 4, "queries.jsonl:3": 4}
    assert ran.json["configuration"]["modes"][names[0]]["top_k"] == 2
    page = Path("eval.html").read_text()
    assert "Who lost the queries" in page
    assert "fusion: none" in page
    assert "3 reranked.\nnote: this list is 4 long and the model was trained on lists of 20" in page
    assert page.count("<img") >= 1
    assert "class='tiles'" not in page, "means over a selection, each query once per mode"


def test_what_a_person_reads(indexed: Path, run: Run) -> None:
    out = run("eval", "queries.jsonl", "--limit", 2).out
    flat = " ".join(out.split())
    assert "2 queries" in flat
    assert "first stage" in flat
    assert f"{MODE}: first place:" in flat
    assert "95 % interval" in flat
    assert "this list is 4 long and the model was trained on lists of 20" in flat
    assert "not in the store" not in flat
    assert max(map(len, out.splitlines())) <= 120
    flat = " ".join(run("eval", "queries.jsonl").out.split())
    assert "right answers that are not in the store, so that no search can find them: 1 (elsewhere)" in flat


def test_fallbacks_are_timed_and_have_no_tokens(indexed: Path, run: Run) -> None:
    late = ["eval", "queries.jsonl", "--timeout", "0.000001", "--price", 1, 1]
    mode = run(*late, "--json").json["modes"][MODE]
    assert (mode["statuses"], mode["counted"], mode["tokens_in"], mode["cost"]) == ({"fallback": 3}, 0, None, None)
    assert mode["p50"] > 0
    flat = " ".join(run(*late).out.split())
    assert (
        f"{MODE}: opened and tokens are over 0 of 3 queries: a fallback or a thought cut off leaves no count." in flat
    )
    assert "leaves no count" not in run("eval", "queries.jsonl").out


def test_without_labels_disagreements_are_shown(indexed: Path, run: Run) -> None:
    Path("bare.csv").write_text('id,text,image\nx,"two, red",\ny,,card0.png\n')
    ran = run("eval", "bare.csv", "--report", "page.html", "--json").json
    assert "recall@1" not in json.dumps(ran["modes"])
    changed = ran["modes"][MODE]["first_place_changed"]
    assert Path("page.html").read_text().count("first places differ") == 2 * changed, "in the contents and above it"
    assert "2 queries without right answers" in run("eval", "bare.csv").out


def test_right_answers_in_a_cell_may_have_spaces_between_them(indexed: Path, run: Run) -> None:
    Path("cells.csv").write_text("id,text,positives,image,images\nx,two red, card1 | card0,,7\ny,which,card2|,,8\n")
    found = run("eval", "cells.csv", "--json").json
    assert (found["missing_positives"], found["modes"][MODE]["ceiling"]) == ([], 1)


def test_an_existing_run_is_reranked(indexed: Path, run: Run) -> None:
    Path("run.json").write_text(json.dumps({"a": {"note": 0.5, "card1": 0.25}, "other": {"z": 1}}))
    Path("qrels.tsv").write_text("query-id\tcorpus-id\tscore\na\tcard1\t2\na\tnote\t0\n")
    ran = run("eval", "queries.jsonl", "--from-run", "run.json", "--qrels", "qrels.tsv", "--json").json
    mode = ran["modes"][MODE]
    assert (ran["queries"], mode["first_stage"]["mrr@10"], mode["ceiling"]) == (1, 0.5, 1.0)
    assert ran["configuration"]["first_stage"] == "run run.json"
    assert ran["unjudged_queries"] == 2
    out = run("eval", "queries.jsonl", "--from-run", "run.json", "--qrels", "qrels.tsv").out
    assert "queries without a right answer in qrels.tsv, left out: 2" in out
    assert "does not have" not in out


def test_judged_queries_that_nobody_asks_are_named(indexed: Path, run: Run) -> None:
    """Else the mean over a part of the judged queries is read as the mean over all of them."""
    Path("qrels.txt").write_text("a 0 card1 1\n90:1 0 card0 1\nlost 0 card2 1\nbare 0 card2 0\n")
    bare = ["eval", "queries.jsonl", "--qrels", "qrels.txt", "--mode", "never/logits"]
    found = run(*bare, "--limit", 1, "--json").json
    assert (found["queries"], found["unasked_queries"]) == (1, ["lost"])
    out = " ".join(run(*bare).out.split())
    assert "in qrels.txt, but not among the queries of queries.jsonl, left out: 1 (lost)" in out


def test_a_filter_leaves_its_documents(indexed: Path, run: Run) -> None:
    bare = ["eval", "queries.jsonl", "--limit", 1, "--json", "--run", "run.txt"]
    assert run(*bare, "--filter", "modality=image").json["configuration"]["filter"] == ["modality=image"]
    assert set(read_run(Path("run.txt"))["a"]) == {"card0", "card2"}, "card1 has words, too"
    assert run(*bare, "--filter", "modality=smell").json["modes"][MODE]["ceiling"] == 0


def test_right_answers_outside_the_filter_are_named(indexed: Path, run: Run) -> None:
    """They are no loss of the first stage's: nobody let it find them."""
    bare = ["eval", "queries.jsonl", "--mode", "never/logits", "--filter"]
    found = run(*bare, "modality=image", "--json").json
    assert (found["missing_positives"], found["outside_filter"], found["no_match"]) == (["elsewhere"], ["card1"], None)
    assert run(*bare, "modality=image,text", "--json").json["outside_filter"] == ["card0"]
    flat = " ".join(run(*bare, "modalty=image").out.split())
    assert "0 of 4 documents match the filter modalty=image" in flat
    assert "right answers outside the filter, so that no search can find them: 2 (card0, card1)" in flat
    assert "K=20 never/logits: why the model ranked nothing, for 3: no candidates to rank" in flat


@pytest.mark.parametrize(
    ("asked", "expected"),
    [
        (Filter(must=(Equals("tags", "red"), Equals("shop.open", True))), True),
        (Filter(must=(Equals("tags", "green"),)), False),
        (Filter(must=(Equals("number", True),)), False),
        (Filter(must=(Range("number", gte=1, lte=1),)), True),
        (Filter(must=(Range("number", gt=1),)), False),
        (Filter(should=(OneOf("tags", ("green", "blue")), Equals("number", 7))), True),
        (Filter(must_not=(Equals("tags", "blue"),)), False),
    ],
)
def test_a_filter_over_metadata(asked: Filter, expected: bool) -> None:
    assert matches(asked, {"tags": ["red", "blue"], "number": 1, "shop": {"open": True}}) is expected


def test_queries_that_a_run_lacks_are_counted(indexed: Path, run: Run) -> None:
    Path("run.txt").write_text("a Q0 note 1 0.5 t\n")
    assert run("eval", "queries.jsonl", "--from-run", "run.txt", "--json").json["queries_not_in_run"] == 2
    out = " ".join(run("eval", "queries.jsonl", "--from-run", "run.txt").out.split())
    assert "queries that run.txt does not have: 2 of 3; they count as not found" in out
    assert "p50 and p95 are over 1 of 3 queries: the others had no candidates." in out
    assert "opened and tokens are over 1 of 3 queries" in out


@pytest.mark.parametrize(
    ("name", "text", "arguments", "message"),
    [
        ("run.txt", "a Q0 nobody 1 0.5 t\n", ["--from-run", "run.txt"], "expected documents of this store, got 1 of 1"),
        ("run.txt", "b Q0 note 1 0.5 t\n", ["--from-run", "run.txt"], "run.txt: expected the ids of the queries, got none"),
        ("run.txt", "a Q0 note 1 nan t\n", ["--from-run", "run.txt"], "run.txt:1: expected a number, got 'nan'"),
        ("run.txt", "a Q0 d 1 1 t\na Q0 d 2 0 t\n", ["--from-run", "run.txt"], "expected each document once per query"),
        ("run.json", '{"a": {"note":', ["--from-run", "run.json"], "expected {query: {document: score}}, got Expecting"),
        ("queries.jsonl", '{"text": "x"}\n{"text"', [], "queries.jsonl:2: expected a JSON object, got Expecting"),
        ("queries.jsonl", '{"text": "x"}', ["--price", "-1", "nan"], "price: expected numbers of at least 0, got -1.0 and nan"),
        ("queries.jsonl", '{"text": "x"}', ["--shown", "0"], "expected a whole number of at least 1, got '0'"),
        ("queries.jsonl", '{"id": 1, "text": "x"}\n{"id": 1, "text": "y"}', [], "expected distinct ids, got '1' a second time"),
        ("queries.csv", "id,text\n1,a,b\n", [], "queries.csv:2: expected 2 cells, got another number"),
        ("queries.csv", "id,text,Positives\n1,a,b\n", [], "queries.csv:2: field: expected 'positives', got 'Positives'"),
        ("queries.csv", "id, text\n1,a\n", [], "queries.csv:2: field: expected 'text', got ' text'"),
        ("queries.jsonl", '{"text": "x", "positive": ["card0"]}', [], "queries.jsonl:1: field: expected 'positives', got"),
        ("queries.jsonl", '{"query_txt": "x", "Pos_cand_list": ["a"]}', [], "expected 'pos_cand_list', got 'Pos_cand_list'"),
        ("run.txt", "a Q0 note 1 0.5 t\n", ["--from-run", "run.txt", "--filter", "a=1"], "--filter: expected a search, got"),
        ("queries.jsonl", '{"text": "x"}', ["--filter", "a"], "--filter: expected field=value, got 'a'"),
        ("queries.jsonl", '{"text": "x"}', ["--mode", "maybe"], "--mode: expected THINK/RANKING of"),
        ("queries.jsonl", '{"text": "x"}', ["--top-k", "ten"], "--top-k: expected numbers, e.g. 10,50, got 'ten'"),
    ],
)  # fmt: skip
def test_bad_input_is_named(indexed: Path, run: Run, name: str, text: str, arguments: list[str], message: str) -> None:
    Path(name).write_text(text)
    ran = run("eval", name if name.startswith("queries") else "queries.jsonl", *arguments)
    assert (ran.code, message in ran.err) == (2, True), ran.err


def test_every_file_says_what_its_numbers_depend_on(indexed: Path, run: Run) -> None:
    """Of two evaluations that differ in one setting, no file can be taken for the other's."""
    Path("qrels.txt").write_text("a 0 card1 1\na 0 elsewhere 1\n90:1 0 card0 1\n")
    Path("bm25.txt").write_text("a Q0 note 1 0.5 t\n")
    Path("float.toml").write_text(Path("retrv.toml").read_text().replace("[model]", "[model]\ndtype = 'float64'"))
    bare = ["eval", "queries.jsonl", "--run", "run.txt", "--report", "page.html", "--mode", "never/logits", "--json"]
    varied = [
        ["--filter", "modality=image"], ["--from-run", "bm25.txt"], ["--qrels", "qrels.txt"], ["--limit", 1],
        ["--concurrency", 2], ["--top-k", 3], ["--max-inspections", 0], ["--config", "float.toml"],
    ]  # fmt: skip
    tags = set()
    for more in ([], *varied):
        found = run(*bare, *more).json
        (tag,) = {line.split()[-1] for line in Path("run.txt").read_text().splitlines()}
        assert tag.startswith("retrv-r1.K")
        assert tag.endswith(f".never.logits.{found['configuration']['id']}")
        assert f">{found['configuration']['id']}<" in Path("page.html").read_text()
        tags.add(tag)
    assert len(tags) == 1 + len(varied)

    given = ["--qrels", "qrels.txt", "--from-run", "bm25.txt"]
    found = run(*bare, *given).json
    configuration = found["configuration"]
    assert (configuration["qrels"], configuration["limit"]) == ("qrels.txt", None)
    assert configuration["pool"] == "4 documents in retrv-index"
    page, out = Path("page.html").read_text(), " ".join(run(*bare[:-1], *given).out.split())
    for words in (
        "right answers that are not in the store, so that no search can find them: 1 (elsewhere)",
        "queries without a right answer in qrels.txt, left out: 1",
        "queries that bm25.txt does not have: 1 of 2; they count as not found",
    ):
        assert words in page
        assert words in out
    assert (
        f"configuration: id {configuration['id']}, queries queries.jsonl, qrels qrels.txt, limit none, first stage run"
        in out
    )


def test_what_the_files_say_is_part_of_the_id(indexed: Path, run: Run) -> None:
    Path("r.txt").write_text("a Q0 note 1 0.5 t\n")
    Path("qrels.txt").write_text("a 0 card1 1\n")
    bare = ["eval", "queries.jsonl", "--from-run", "r.txt", "--qrels", "qrels.txt", "--mode", "never/logits", "--json"]
    ids = [run(*bare).json["configuration"]["id"] for _ in range(2)]
    assert len({*ids}) == 1
    for name, text in (
        ("r.txt", "a Q0 card1 1 0.5 t\n"),
        ("qrels.txt", "a 0 card0 1\n"),
        ("queries.jsonl", json.dumps(QUERIES[0])),
    ):
        Path(name).write_text(text)
        ids.append(run(*bare).json["configuration"]["id"])
    assert len({*ids}) == 4


def test_no_output_is_written_over_an_input(indexed: Path, run: Run) -> None:
    Path("r.txt").write_text("a Q0 note 1 0.5 t\n")
    Path("r.retrv-r1.K2.never.logits.txt").symlink_to("r.txt")
    Path("qrels.txt").write_text("a 0 card1 1\n")
    before = {path: path.read_bytes() for path in Path().glob("*.*") if path.is_file()}
    bare = ["eval", "queries.jsonl", "--from-run", "r.txt", "--qrels", "qrels.txt", "--mode", "never/logits"]
    for more in (
        ["--run", "r.txt"], ["--report", "queries.jsonl"], ["--report", "./qrels.txt"], ["--run", "retrv.toml"],
        ["--traces", "r.txt"], ["--run", "r.txt", "--top-k", "2,3"], ["--run", "new.txt", "--report", "new.txt"],
    ):  # fmt: skip
        ran = run(*bare, *more)
        assert (ran.code, "expected a file of its own for what is written" in ran.err) == (2, True), more
    ran = run("rerank", "items/card0.png", "--text", "x", "--report", "items/card0.png")
    assert (ran.code, "card0.png: expected a file of its own" in ran.err) == (2, True), ran.err
    assert {path: path.read_bytes() for path in before} == before


def test_queries_lost_by_the_first_stage_are_shown(indexed: Path, run: Run) -> None:
    Path("bm25.txt").write_text("a Q0 note 1 0.5 t\n")
    run("eval", "queries.jsonl", "--from-run", "bm25.txt", "--report", "page.html")
    page = Path("page.html").read_text()
    assert page.count(f"{MODE}: lost: first stage") == 2 * 3, "in the contents and above it"
    assert "Nothing to rank" in page, "the run does not have it"


def test_a_query_whose_picture_cannot_be_read_is_left_out(indexed: Path, run: Run) -> None:
    Path("torn.png").write_bytes((indexed / "items" / "card0.png").read_bytes()[:60])
    torn = {"id": "torn", "image": "torn.png", "positives": ["card0"]}
    Path("queries.jsonl").write_text("\n".join(map(json.dumps, [QUERIES[0], torn, QUERIES[1]])))
    for modes in (["--mode", "never/logits"], ["--mode", "never/logits", "--concurrency", 4]):
        ran = run("eval", "queries.jsonl", *modes, "--report", "page.html", "--json").json
        assert (ran["queries"], ran["modes"]["K=20 never/logits"]["queries"]) == (2, 2)
        assert list(ran["unreadable_queries"]) == ["torn"]
    flat = " ".join(run("eval", "queries.jsonl").out.split())
    assert "queries whose picture cannot be read, left out: 1 (torn: image (60 bytes): expected a readable" in flat
    Path("queries.jsonl").write_text(json.dumps(torn))
    refused = run("eval", "queries.jsonl")
    assert refused.code == 2
    assert (
        "queries: expected some whose picture can be read, got none of 1 (first: 'torn': image (60 bytes)"
        in refused.err
    )


def test_a_run_that_cannot_be_written_costs_nothing(indexed: Path, run: Run) -> None:
    Path("my queries.jsonl").write_text('{"text": "two red circle"}\n')
    refused = run("eval", "my queries.jsonl", "--run", "run.txt")
    assert (refused.code, refused.out, Path("run.txt").exists()) == (2, "", False)
    assert "--run: expected ids of queries without spaces, got 'my queries.jsonl:1'" in refused.err
    assert "evaluating" not in refused.err, "before the work"
    Path("half.jsonl").write_text('{"id": "\\ud800", "text": "two red circle"}\n')
    assert "--run: expected ids of queries in valid Unicode" in run("eval", "half.jsonl", "--run", "run.txt").err
    (indexed / "items" / "card2.png").rename(indexed / "items" / "card 2.png")
    run("index", "items")
    for form in ((), ("--json",)):
        ran = run("eval", "queries.jsonl", "--limit", 1, "--run", "run.txt", "--report", "page.html", *form)
        assert (ran.code, Path("run.txt").exists()) == (2, False)
        assert "expected ids without spaces, got 'card 2'" in (ran.json["error"]["message"] if form else ran.err)
        assert MODE in (ran.json["modes"] if form else ran.out)
        assert Path("page.html").is_file()
        Path("page.html").unlink()


def test_a_share_of_a_batch_is_no_property_of_a_query(indexed: Path, run: Run) -> None:
    config = Path("retrv.toml")
    config.write_text(config.read_text() + "max_think_share = 0.5\n")
    refused = run("eval", "queries.jsonl")
    assert refused.code == 2
    assert "max_think_share: expected 1 in an evaluation, got 0.5 with think='auto'" in refused.err
    for without_effect in ("never/hybrid", "always/hybrid", "auto/logits"):
        assert run("eval", "queries.jsonl", "--limit", 1, "--mode", without_effect).code == 0


def test_compare_two_runs(tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("qrels.txt").write_text("".join(f"q{i} 0 d{i} 1\n" for i in range(40)) + "none 0 d 0\n")
    Path("a.txt").write_text("".join(f"q{i} Q0 x 1 2 a\nq{i} Q0 d{i} 2 1 a\n" for i in range(40)))
    Path("b.txt").write_text("".join(f"q{i} Q0 d{i} 1 2 b\n" for i in range(36)))
    found = run("eval", "compare", "a.txt", "b.txt", "--qrels", "qrels.txt", "--json").json
    mrr = found["metrics"]["mrr"]
    assert (mrr["first"], mrr["second"]) == (0.5, 0.9)
    assert (mrr["test"]["better"], mrr["test"]["worse"]) == (36, 4)
    assert mrr["test"]["p"] < 0.001
    assert found["metrics"]["recall@5"]["test"]["difference"]["mean"] == pytest.approx(-0.1)
    out = run("eval", "compare", "a.txt", "b.txt", "--qrels", "qrels.txt", "--metric", "map@5").out
    assert "map@5  0.5000  0.9000     +0.4000" in out
    assert "b.txt lacks 4 of the 40 queries" in out
    assert "1 queries of the qrels have no right answer" in out
    assert "first: a.txt, tag a" in out
    assert "second: b.txt, tag b" in out
    assert "different pools" not in out
    for pool in ("local", "global"):
        Path(pool).mkdir()
        line = f"q0 Q0 d0 1 1 mbeir.{pool}.5f0c.first-stage\nz Q0 d 1 1 mbeir.{pool}.5f0c.first-stage\n"
        Path(pool, "run.txt").write_text(line)
    pools = ["eval", "compare", "local/run.txt", "global/run.txt", "--qrels", "qrels.txt"]
    flat = " ".join(run(*pools).out.split())
    assert "first: local/run.txt, tag mbeir.local.5f0c.first-stage second: global/run.txt" in flat
    assert "the runs are over different pools (global, local)" in flat
    assert "global/run.txt has 1 queries that are not in the qrels" in flat
    assert run(*pools, "--json").json["unjudged_queries"] == {"local/run.txt": 1, "global/run.txt": 1}
    Path("c.txt").write_text("zz Q0 d 1 1 c\n")
    assert "c.txt: expected a run of the qrels' queries, got none" in run(
        "eval", "compare", "a.txt", "c.txt", "--qrels", "qrels.txt"
    ).err  # fmt: skip
    assert run("eval", "compare", "a.txt", "--qrels", "qrels.txt").code == 2
    assert "eval compare" in run("eval", "compare", "--help").out


def test_compare_says_when_runs_are_of_different_pools(
    tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever their tags: a run of another pool is worse, or better, for other reasons than its order."""
    monkeypatch.chdir(tmp_path)
    Path("qrels.txt").write_text("".join(f"q{i} 0 90:{i} 1\n" for i in range(5)))
    Path("here.txt").write_text("".join(f"q{i} Q0 90:{i} 1 2 a\n" for i in range(5)))
    Path("there.txt").write_text(Path("here.txt").read_text().replace("Q0 90:", "Q0 91:"))
    compared = ["eval", "compare", "there.txt", "here.txt", "--qrels", "qrels.txt"]
    flat = " ".join(run(*compared).out.split())
    assert "the runs share no document, so they seem to be over different pools" in flat
    assert "no document of there.txt is in the qrels, so all its values are 0" in flat
    assert "no document of here.txt" not in flat
    assert len(run(*compared, "--json").json["different_pools"]) == 2
    assert (
        run("eval", "compare", "here.txt", "here.txt", "--qrels", "qrels.txt", "--json").json["different_pools"] == []
    )


def test_compare_refuses_a_seed_below_0(tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("qrels.txt").write_text("q 0 d 1\n")
    Path("a.txt").write_text("q Q0 d 1 1 a\n")
    refused = run("eval", "compare", "a.txt", "a.txt", "--qrels", "qrels.txt", "--seed", -1)
    assert (refused.code, "--seed: expected a whole number of at least 0, got '-1'" in refused.err) == (2, True), (
        refused.err
    )


def test_mbeir_with_a_model(workplace: Path, run: Run) -> None:
    write_root(workplace / "data", 14, 2)
    arguments = ["eval", "mbeir", "--root", "data", "--top-k", "4", "--mode", "always/hybrid", "--report", "page.html"]
    ran = run(*arguments, "--tasks", "cirr_task7,webqa_task1", "--traces", "traces.jsonl")
    assert ran.code == 1, "no average, no success"
    flat = " ".join(ran.out.split())
    assert "WebQA t→t 2 R@5" in flat
    assert flat.index("WebQA t→t") < flat.index("CIRR it→i"), "the papers' order"
    assert "average refused refused" in flat
    assert "2 of the 16 tasks were asked for" in flat
    assert "reranking 4/4" in " ".join(ran.err.split())
    page = Path("page.html").read_text()
    assert "What the first stage found" in page
    assert "2 of the 16 tasks were asked for" in page, "why there is no average"
    rows = [json.loads(line) for line in next(Path("mbeir-eval/lists").glob("cirr*K4*")).read_text().splitlines()[1:]]
    assert [row["record"]["status"] for row in rows] == ["reranked", "reranked"]
    assert all(row["record"]["thought"] and row["record"]["tokens_out"] > 0 for row in rows)
    again = run(*arguments, "--tasks", "cirr_task7,webqa_task1", "--json", "--traces", "none.jsonl")
    assert again.json["average"] == {"first stage": None, "K=4 always/hybrid": None}
    assert again.json["configuration"]["pool"] == "local"
    assert "reranking" not in again.err, "it was done already"
    assert len([*read_traces(Path("traces.jsonl"))]) == 4
    assert not Path("none.jsonl").exists()
    assert "expected a whole number of at least 1, got '-1'" in run(*arguments, "--shown", -1).err
    wrong = run("eval", "mbeir", "--root", "items")
    assert "items: expected M-BEIR's files, got no query/test/mbeir_visualnews_task0_test.jsonl" in wrong.err
    assert "expected some of visualnews_task0" in run("eval", "mbeir", "--root", "data", "--tasks", "mnist").err


def test_mbeir_in_another_precision_is_another_configuration(workplace: Path, run: Run) -> None:
    """The same weights in bfloat16 give other vectors and other slots: nothing that float32 made stands for them."""
    write_root(workplace / "data", 14, 2)
    config = Path("retrv.toml").read_text()
    Path("bf16.toml").write_text(config.replace("[model]", '[model]\ndtype = "bfloat16"'))
    command = [
        "eval",
        "mbeir",
        "--root",
        "data",
        "--tasks",
        "webqa_task1",
        "--top-k",
        2,
        "--mode",
        "never/logits",
        "--json",
    ]
    first, second = run(*command), run(*command, "--config", "bf16.toml")
    assert "reranking 2/2" in " ".join(second.err.split())
    configurations = [ran.json["configuration"] for ran in (first, second)]
    assert [c["engine"]["dtype"] for c in configurations] == ["float32", "bfloat16"]
    assert configurations[0]["id"] != configurations[1]["id"]
    for kind in ("index/*", "lists/*first-stage*", "lists/*K2*"):
        assert len([*Path("mbeir-eval").glob(kind)]) == 2, kind
