"""M-BEIR's files through the general readers, and K-lists made of them."""

from __future__ import annotations

import json
import random
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from retrv_r1_training.klists import (
    KListConfig,
    KLists,
    Missing,
    Outcome,
    evaluation_list,
    hard_negatives,
    training_list,
)

from retrv_r1_retriever.demo import catalogue
from retrv_r1_retriever.errors import InputError, OptionsError
from retrv_r1_retriever.evaluation.mbeir import Dataset, Instructions, JudgedQuery, Limits, Queries, RunFile
from retrv_r1_retriever.evaluation.runs import read_run, write_run
from retrv_r1_retriever.types import Query

POOL, QUERIES, QRELS, RUN = "cand_pool/p.jsonl", "query/q.jsonl", "qrels/q.txt", "run.txt"


def put(path: Path, lines: list[object]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in lines), encoding="utf-8")


@pytest.fixture
def root(tmp_path):
    """Twenty images and a text; q1 has graded positives, q2 one that no list has, q3 none at all."""
    pool = [{"did": f"7:{n}", "txt": None, "img_path": f"{n}.png", "modality": "image"} for n in range(20)]
    put(tmp_path / POOL, [*pool, {"did": "7:t", "txt": "words", "img_path": None, "modality": "text"}])
    query = {"query_txt": "find it", "query_img_path": None, "query_modality": "text", "neg_cand_list": []}
    rows = [
        {"qid": "7:q1", **query, "pos_cand_list": ["7:3", "7:5"]},
        {"qid": "7:q2", **query, "pos_cand_list": ["7:19", "8:0"]},
        {"qid": "7:q3", **query, "pos_cand_list": [], "instruction": "Look."},
        {"qid": "7:q4", **query, "pos_cand_list": ["7:t"]},
    ]
    put(tmp_path / QUERIES, rows)
    put(tmp_path / QRELS, ["7:q1 0 7:3 1 0", "7:q1 0 7:5 2 0", "7:q1 0 7:6 0 0"])
    run = {q: [f"7:{n}" for n in range(10)] for q in ("7:q1", "7:q2", "7:q3")}
    run["7:q2"].insert(0, "7:unknown")
    write_run(tmp_path / RUN, run, "t")
    head = "query_modality\tcand_modality\tdataset_name\tdataset_id\tprompt_1\tprompt_2\n"
    put(
        tmp_path / "instructions" / "query_instructions.tsv", [head + "text\timage\tx\t7\tFind a picture.\tShow one.\t"]
    )
    return tmp_path


def opened(root: Path, qrels: str | None = None) -> Dataset:
    return Dataset.open(root, QUERIES, POOL, qrels=qrels)


def test_query_with_grades_and_instruction(root):
    plain, graded = opened(root), opened(root, QRELS)
    assert plain.query(0, random.Random(0)).grades == {"7:3": 1, "7:5": 1}
    first = graded.query(0, random.Random(0))
    assert list(first.grades.items()) == [("7:5", 2), ("7:3", 1)]
    assert first.negatives == ("7:6",)
    drawn = {graded.query(0, random.Random(seed)).query.instruction for seed in range(20)}
    assert drawn == {"Find a picture.", "Show one."}
    assert graded.query(0, random.Random(5)) == graded.query(0, random.Random(5))
    assert graded.query(2, random.Random(0)).query.instruction == "Look.", "a row's own instruction comes first"
    assert graded.query(3, random.Random(0)).query.instruction is None, "text -> text is not in the table"


def test_positives_of_other_datasets_can_be_left_out(root):
    data = opened(root)
    assert set(data.query(1, random.Random(0)).grades) == {"7:19", "8:0"}
    strict = Dataset(data.root, data.queries, data.pool, same_dataset=True)
    assert set(strict.query(1, random.Random(0)).grades) == {"7:19"}


def test_run_is_read_as_the_core_reads_it(root):
    (root / RUN).write_text("q Q0 low 1 0.1 t\nq Q0 high 2 0.9 t\nq Q0 same 3 0.1 t\nr Q0 x 1 1e-3 t\n")
    run = RunFile(root / RUN)
    assert {q: run.ranked(q) for q in ("q", "r")} == read_run(root / RUN)
    assert run.ranked("nobody") == []


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"qid": "1:1"}, "q.jsonl:1: Content: expected a text, an image or both"),
        ({"query_txt": "t"}, "q.jsonl:1: qid: expected a string without spaces, got nothing"),
        ({"qid": "1:1", "query_txt": 5}, "query_txt: expected a string or null, got int"),
        ({"qid": "1:1", "query_txt": "t", "pos_cand_list": "7:1"}, "pos_cand_list: expected a list of ids, got '7:1'"),
        ({"qid": "1:1", "query_txt": "t", "query_modality": "sound"}, "query_modality: expected one of"),
    ],
)
def test_bad_query_rows_say_what_is_wrong(tmp_path, row, message):
    put(tmp_path / "q.jsonl", [row])
    with pytest.raises(InputError, match=message):
        Queries(tmp_path / "q.jsonl")


def test_bad_instruction_lines_are_named(root):
    path = root / "instructions" / "query_instructions.tsv"
    path.write_text(path.read_text() + "\n7\tFind it.\n")
    table = Instructions.read(path)
    assert table.skipped.count == 1
    assert table.skipped.examples[0].startswith("query_instructions.tsv:4: expected query modality")


def test_the_demo_catalogue_is_a_data_set(tmp_path, monkeypatch):
    few = catalogue.combos("val")[:6]
    monkeypatch.setattr(catalogue, "SPLITS", {"val": catalogue.Split("val", "val", 1, 3)})
    monkeypatch.setattr(catalogue, "combos", lambda part: few)
    catalogue.write_catalogue(tmp_path, ("val",))
    for task, words in catalogue.TASKS.items():
        data = Dataset.open(
            tmp_path, f"query/val/mbeir_cards_{task}_val.jsonl", "cand_pool/local/mbeir_cards_val_cand_pool.jsonl",
            qrels=f"qrels/val/mbeir_cards_{task}_val_qrels.txt",
        )  # fmt: skip
        labelled = catalogue.read_queries(tmp_path, "val", task)
        mine = [data.query(number, random.Random(0)) for number in range(len(data))]
        assert [(q.query, tuple(q.grades)) for q in mine] == [(q.query, q.positives) for q in labelled]
        assert {q.query.instruction for q in mine} == {words}


# -- K-lists -----------------------------------------------------------------------------------------------------------

ids = st.lists(st.integers(0, 40).map(str), unique=True, min_size=1, max_size=40)


@given(ids, st.dictionaries(st.integers(0, 60).map(str), st.integers(1, 3), max_size=4), st.integers(1, 20),
       st.integers(0, 20), st.sampled_from(Missing), st.floats(0, 1), st.integers(0, 9))  # fmt: skip
def test_training_lists(ranked, grades, top_k, more, missing, shuffle, seed):
    query = JudgedQuery(Query.of("x", id="q"), "text", grades)
    config = KListConfig(top_k, top_k + more, shuffle, missing)
    klist = training_list(query, ranked, config, random.Random(seed))
    found = set(ranked[: top_k + more]) & grades.keys()
    assert len(set(klist.candidates)) == len(klist.candidates) == min(top_k, len(ranked))
    assert len(set(klist.candidates) - set(ranked[: top_k + more])) == (klist.outcome is Outcome.INJECTED)
    assert klist == training_list(query, ranked, config, random.Random(seed)), "seeded"
    assert [klist.candidates[slot] for slot in klist.answers] == sorted(
        (d for d in klist.candidates if d in grades), key=lambda d: -grades[d]
    )
    if found:
        assert klist.outcome is Outcome.PRESENT
        assert klist.answers
    elif missing is Missing.DROP:
        assert klist.outcome is Outcome.DROPPED
    elif missing is Missing.INJECT and grades:
        assert klist.outcome is Outcome.INJECTED
        assert len(klist.answers) == 1
    else:
        assert klist.outcome is Outcome.NONE
        assert klist.answers == ()


@given(ids, st.sets(st.integers(0, 60).map(str), max_size=4), st.integers(1, 40))
def test_evaluation_lists_are_the_first_stages_own(ranked, positives, top_k):
    klist = evaluation_list(JudgedQuery(Query.of("x"), "text", dict.fromkeys(positives, 1)), ranked, top_k)
    assert list(klist.candidates) == ranked[:top_k]
    assert klist.outcome == (Outcome.PRESENT if positives & set(ranked[:top_k]) else Outcome.MISS)


def test_shuffled_lists_put_the_positive_anywhere_and_injection_too():
    ranked = [str(n) for n in range(10)]
    for positive in ("0", "injected"):
        query = JudgedQuery(Query.of("x"), "text", {positive: 1})
        for shuffle in (1.0, 0.0):
            config = KListConfig(5, None, shuffle, Missing.INJECT)
            places = Counter(training_list(query, ranked, config, random.Random(s)).answers[0] for s in range(400))
            anywhere = shuffle or positive == "injected"
            assert (min(places[slot] for slot in range(5)) > 40) if anywhere else (places == {0: 400})


def test_half_of_the_lists_are_cut_where_short_ones_are_asked_for():
    ranked, query = [str(n) for n in range(10)], JudgedQuery(Query.of("x"), "text", {"9": 1})
    made = [training_list(query, ranked, KListConfig(10, min_k=4), random.Random(seed)) for seed in range(400)]
    lengths = Counter(len(klist.candidates) for klist in made)
    assert set(lengths) == set(range(4, 11))
    assert lengths[10] == pytest.approx(200 * 8 / 7, abs=45)
    assert all(set(k.candidates) == set(ranked[: len(k.candidates)]) for k in made), "the first ones, not any"
    assert {bool(k.answers) for k in made if len(k.candidates) < 10} == {False}


def test_hard_negatives_are_the_mistakes_of_the_first_stage():
    query = JudgedQuery(Query.of("x"), "text", {"1": 2})
    assert set(hard_negatives(query, ["0", "1", "2"], 5, random.Random(0))) == {"0", "2"}


def test_lists_of_a_data_set_are_counted(root):
    for missing, outcomes in {
        Missing.NONE: {"7:q1": "present", "7:q2": "none", "7:q3": "none"},
        Missing.INJECT: {"7:q1": "present", "7:q2": "injected", "7:q3": "none"},
        Missing.DROP: {"7:q1": "present"},
    }.items():
        lists = KLists(opened(root), RunFile(root / RUN), seed=0)
        made = list(lists.training(KListConfig(8, missing=missing), epoch=0))
        assert {k.query.id: k.outcome.value for k in made} == outcomes
        assert lists.counts[Outcome.NO_LIST] == 1
        assert lists.counts["positives outside the pool"] == 1
        assert lists.counts["candidates outside the pool"] == 1
        assert lists.counts[Outcome.DROPPED] == (2 if missing is Missing.DROP else 0)
        for klist in made:
            assert [d.id for d in lists.documents(klist)] == list(klist.candidates)


def test_epochs_differ_ranks_share_and_reruns_agree(root):
    lists = KLists(opened(root), RunFile(root / RUN), seed=3)
    config = KListConfig(8)
    whole = list(lists.training(config, 0))
    assert whole == list(KLists(opened(root), RunFile(root / RUN), seed=3).training(config, 0))
    assert {k.query.id: k.candidates for k in whole} != {k.query.id: k.candidates for k in lists.training(config, 1)}
    parts = [k for rank in (0, 1) for k in lists.training(config, 0, rank=rank, world=2)]
    assert sorted(parts, key=lambda k: k.query.id) == sorted(whole, key=lambda k: k.query.id)


def test_evaluation_keeps_every_query(root):
    lists = KLists(opened(root), RunFile(root / RUN), seed=0)
    made = list(lists.evaluation(8))
    assert [(k.query.id, k.outcome.value) for k in made] == [
        ("7:q1", "present"), ("7:q2", "miss"), ("7:q3", "miss"), ("7:q4", "miss"),
    ]  # fmt: skip
    assert made[3].candidates == ()


@pytest.mark.parametrize(("values", "message"), [
    ({"top_k": 128}, "top_k: expected 1 to 127"), ({"depth": 5}, "depth: expected None, or top_k and more, got 5"),
    ({"min_k": 21}, "min_k: expected 0 to top_k"),
    ({"shuffle": 2.0}, "shuffle: expected 0 to 1"), ({"missing": "guess"}, "expected one of none, inject, drop"),
])  # fmt: skip
def test_list_config_says_what_it_takes(values, message):
    with pytest.raises(OptionsError, match=message):
        KListConfig(**values)


def test_limits_reach_every_file(root):
    put(root / POOL, [{"did": "7:3", "txt": "x"}, "{"])
    with pytest.raises(InputError, match="got 1 of 2"):
        opened(root)
    assert len(Dataset.open(root, QUERIES, POOL, limits=Limits(root / "ix", 0.5)).pool) == 1
    assert len(list((root / "ix").iterdir())) == 2
