"""The teacher without a model: it claims nothing that captions do not show, and all of it replays."""

from __future__ import annotations

import asyncio
import gc
import json
import tracemalloc
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from retrv_r1_training.admit import rejection
from retrv_r1_training.labelled import LabelledList, ListOptions, MbeirLists
from retrv_r1_training.synthesize import RunOptions
from retrv_r1_training.teacher import TeacherStyle
from retrv_r1_training.words_teacher import Wording, WordsTeacher

from retrv_r1_retriever.errors import InputError, OptionsError
from retrv_r1_retriever.evaluation.mbeir import Limits
from retrv_r1_retriever.evaluation.runs import write_qrels, write_run
from retrv_r1_retriever.images import LocalImages
from retrv_r1_retriever.prompt import KEEP, NONE_INDEX
from retrv_r1_retriever.types import Candidate, Content, Document, Query
from tests.helpers import png

WORDS = ("a", "dog", "cat", "on", "beach", "sofa", "red", "collar7", "lighthouse", "")
CAPTION = st.lists(st.sampled_from(WORDS), max_size=6).map(" ".join)
WORDING = Wording(frozenset({"dog", "cat", "beach", "sofa", "red"}), frozenset({"a", "on"}))


def task(captions, right, *, text=None, target="", image=None):
    shown = [Candidate(Document(str(i), Content("x")), None, i + 1) for i in range(len(captions))]
    query = Query.of(text, image, id="q")
    return LabelledList(query, tuple(shown), tuple(captions), tuple(map(str, right)), target)


def write(one, style=TeacherStyle(), wording=WORDING):
    return asyncio.run(WordsTeacher(wording, style).write(one, 0))


@given(st.lists(CAPTION, min_size=1, max_size=8), st.data())
@settings(max_examples=300)
def test_what_it_claims_is_in_the_captions_and_replays(captions, data):
    right = data.draw(st.lists(st.integers(0, len(captions) - 1), max_size=3, unique=True))
    target = captions[min(right)] if right else data.draw(CAPTION)
    image = data.draw(st.sampled_from([None, png()]))
    one = task(captions, right, text=data.draw(CAPTION.filter(str.strip)), target=target, image=image)
    style = TeacherStyle(*(data.draw(st.floats(0, 1)) for _ in range(3)), max_inspections=data.draw(st.integers(1, 4)))
    thought = write(one, style).thought
    if thought is None:
        return
    for verdict in thought.verdicts:
        words = captions[verdict.index].split()
        assert verdict.text == KEEP or verdict.text.removeprefix("no ") not in words
        assert verdict.text == KEEP or verdict.index not in right
    for check in thought.checks:
        assert check.match == (check.index in right)
        assert check.match or any(w not in captions[check.index].split() for w in thought.hypothesis.split())
    reason = asyncio.run(rejection(thought, one, RunOptions().replay, LocalImages()))
    assert reason is None or (reason == "none_unexplained" and not right)


def test_a_candidate_that_words_cannot_tell_from_the_answer_is_kept_and_never_opened():
    thought = write(task(["red collar7", "red collar7", "red"], [1], text="red collar7", target="red collar7")).thought
    assert [v.text for v in thought.verdicts] == [KEEP] * 3
    assert {c.index for c in thought.checks} <= {1, 2}


def test_a_text_query_is_not_thought_to_know_more_than_it_says():
    captions, target = ["dog beach collar7", "dog sofa"], "dog beach collar7"
    assert write(task(captions, [0], text="the dog", target=target)).thought.hypothesis == "dog"
    assert write(task(captions, [0], text="the dog", image=png(), target=target)).thought.hypothesis == target


def test_a_query_without_a_word_of_its_answer_guesses_frequent_words_only():
    thought = write(task(["dog lighthouse", "cat"], [0], text="pet", target="dog lighthouse")).thought
    assert thought.hypothesis == "dog"
    assert thought.verdicts[1].text == "no dog"


def test_several_right_answers_share_what_is_sought():
    thought = write(task(["dog beach", "dog sofa", "cat"], [0, 1], image=png(), target="dog beach")).thought
    assert thought.hypothesis == "dog"
    assert [v.text for v in thought.verdicts] == [KEEP, KEEP, "no dog"]


def test_nothing_in_words_is_rejected_by_name():
    assert write(task(["", ""], [0], image=png())).rejected == "no_words_to_seek"


def test_frequent_words_are_coarse_and_words_with_a_digit_never():
    captions = [f"A {animal} on a mat, tag x{i % 3}" for i, animal in enumerate(["dog", "cat", "cow"] * 40 + ["yak"])]
    wording = Wording.of(captions)
    assert wording.coarse == {"dog", "cat", "cow"}, "a, on, mat and tag stand in more than half of the captions"
    assert wording.read("The yak on a mat near a cat x1 cat").fine == ("yak", "near", "x1")


# -- lists from M-BEIR files -------------------------------------------------------------------------------------------


@pytest.fixture
def files(tmp_path):
    pool = [{"did": str(i), "txt": f"t{i}", "img_path": None} for i in range(6)]
    pool[1]["src_content"] = json.dumps({"caption": "from source"})
    queries = [{"qid": q, "query_txt": "x", "query_img_path": None, "pos_cand_list": ["1"]} for q in "abc"]
    (tmp_path / "pool.jsonl").write_text("".join(json.dumps(r) + "\n" for r in pool))
    (tmp_path / "q.jsonl").write_text("".join(json.dumps(r) + "\n" for r in queries))
    write_run(tmp_path / "run", {"a": ["0", "1", "2"], "b": ["3", "4", "5"]}, "t")
    return tmp_path


def lists(files, **more):
    options = ListOptions(**({"top_k": 3, "shuffle": 0.0} | more.pop("options", {})))
    return MbeirLists([files / "q.jsonl"], [files / "pool.jsonl"], files / "run", options, **more)


def test_lists_come_twice_the_same_and_count_what_is_missing(files):
    source = lists(files, options={"shuffle": 1.0})
    first = list(source)
    assert list(source) == first
    assert +source.counts == {"without a first-stage list": 1, "answer none": 1}
    assert [t.right == () for t in first] == [False, True]
    assert first[1].target == "from source", "the answer's words are known though it is not in the list"
    assert sorted(c.rank for c in first[0].candidates) == [1, 2, 3]


def test_half_of_the_lists_are_cut_where_a_shortest_is_given(files):
    lengths = Counter(len(made.ids) for seed in range(40) for made in lists(files, options={"min_k": 2, "seed": seed}))
    assert set(lengths) == {2, 3}
    assert 0.15 < lengths[2] / lengths.total() < 0.35, "a half of the half"
    cut = next(
        made for seed in range(40) for made in lists(files, options={"min_k": 1, "seed": seed}) if made.ids == ("0",)
    )
    assert cut.right == (), "an answer that was cut off is not put back"
    with pytest.raises(OptionsError, match=r"min_k: expected 0 to top_k \(3\), got 4"):
        ListOptions(top_k=3, min_k=4)


def test_missing_answers_can_be_injected_or_dropped(files):
    injected = list(lists(files, options={"missing": "inject"}))[1]
    assert len(injected.right) == 1
    assert len(set(injected.ids)) == 3
    assert [t.query_id for t in lists(files, options={"missing": "drop"})] == ["a"]


def test_qrels_and_captions_replace_what_the_rows_say(files):
    write_qrels(files / "qrels", {"a": {"0": 1, "1": 0, "2": 2}})
    (files / "captions").write_text('{"id": "0", "caption": "better words"}\n')
    one = next(iter(lists(files, qrels=files / "qrels", captions=files / "captions")))
    assert one.positives == ("2", "0")
    assert one.captions == ("better words", "from source", "t2")


def test_the_teacher_is_asked_as_the_model_will_be(files):
    """The task in words: of the row itself, else of the table of instructions, as every other stage takes it."""
    rows = [json.loads(line) | {"query_modality": "text"} for line in (files / "q.jsonl").read_text().splitlines()]
    rows[1]["instruction"] = "By hand."
    put(files / "q.jsonl", [{**row, "qid": f"7:{row['qid']}", "pos_cand_list": ["1"]} for row in rows])
    write_run(files / "run", {f"7:{q}": ["0", "1"] for q in "abc"}, "t")
    (files / "instructions").mkdir()
    (files / "instructions/query_instructions.tsv").write_text("q\tc\tname\tid\tprompt\ntext\ttext\tx\t7\tFind it.\n")
    assert [t.query.instruction for t in lists(files, root=files)] == ["Find it.", "By hand.", "Find it."]
    own = lists(files, root=files, options={"instruction": "Mine."})
    assert {t.query.instruction for t in own} == {"Mine."}


def put(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_lists_are_read_in_memory_that_does_not_grow_with_the_files(tmp_path):
    """Three times the pool and the queries: what Python holds while the lists pass by stays as it was."""
    peaks = []
    for count in (1000, 3000):  # below that, SQLite's own caches are still filling
        folder = tmp_path / str(count)
        folder.mkdir()
        put(folder / "pool.jsonl", [{"did": f"d{i}", "txt": f"{i} " + "word " * 100} for i in range(count)])
        put(
            folder / "q.jsonl",
            [{"qid": f"q{i}", "query_txt": f"{i}", "pos_cand_list": [f"d{i}"]} for i in range(count)],
        )
        write_run(folder / "run", {f"q{i}": [f"d{(i + n) % count}" for n in range(2)] for i in range(count)}, "t")
        source = lists(folder)
        next(iter(source))  # the indexes are made
        peaks.append(_peak_of_reading(source, count))
    assert peaks[1] < 1.3 * peaks[0], peaks


def _peak_of_reading(source, count):
    gc.collect()
    tracemalloc.start()
    assert sum(1 for _ in source) == count
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return peak


def test_files_that_do_not_fit_together_are_named(files):
    write_run(files / "run", {"a": ["77", "1"], "b": ["3"]}, "t")
    with pytest.raises(
        InputError, match=r"run: expected at most 1\.0% bad rows, got 1 of 3; query a: candidate 77 is in no pool"
    ):
        list(lists(files))
    assert [t.ids for t in lists(files, limits=Limits(max_bad_share=0.5))] == [("1",), ("3",)]
    with (files / "q.jsonl").open("a") as file:
        file.write("{}\n")
    with pytest.raises(InputError, match=r"q\.jsonl: expected at most 1\.0% bad rows, got 1 of 4; q\.jsonl:4: qid"):
        list(lists(files))
    assert len(list(lists(files, limits=Limits(max_bad_share=0.5)))) == 2, "a bad row is left out below the share"
    with pytest.raises(OptionsError, match="top_k"):
        ListOptions(top_k=128)


def test_answers_none_with_an_open_question_is_not_admitted():
    one = task(["dog", "cat"], [], text="dog")
    thought = write(one).thought
    assert thought.answer == NONE_INDEX
    assert asyncio.run(rejection(thought, one, RunOptions().replay, LocalImages())) == "none_unexplained"
