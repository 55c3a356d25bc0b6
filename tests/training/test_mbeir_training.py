"""Any M-BEIR folder as training reads it: memory as served, bounded caches, lists with several right answers, thoughts that fit."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from retrv_r1_training import embedder as stage
from retrv_r1_training.candidate_reader import Bounded, CandidateReader
from retrv_r1_training.data import encode_pool, load_pool
from retrv_r1_training.data_config import DataConfig, Part
from retrv_r1_training.embedded_lists import EmbeddedLists
from retrv_r1_training.examples import TraceExamples, Traces, _documents, over, relabelled
from retrv_r1_training.mbeir_tasks import Folder
from retrv_r1_training.ranknet import FACTOR, ranknet
from retrv_r1_training.sft import SftLoss, direct_read_loss, example_of, filled
from retrv_r1_training.sft_recipe import ExampleSettings
from retrv_r1_training.traces import read_traces
from retrv_r1_training.unreadable import Unreadable, UnreadablePicture

from retrv_r1_retriever.demo.catalogue import TASKS, read_queries
from retrv_r1_retriever.engines.local import LocalEngine
from retrv_r1_retriever.errors import InputError, OptionsError
from retrv_r1_retriever.evaluation.runs import read_run
from retrv_r1_retriever.images import LocalImages
from retrv_r1_retriever.model.checkpoint import load_checkpoint
from retrv_r1_retriever.model.embedding import BackboneEmbedder
from retrv_r1_retriever.model.processing import EncodedImage
from retrv_r1_retriever.parser import Check, Thought, Verdict, render
from retrv_r1_retriever.prompt import LABELS, NONE_INDEX
from retrv_r1_retriever.trace import Full
from retrv_r1_retriever.types import Content, Document
from tests.training.parts import part, with_lists, with_thoughts


@pytest.fixture(scope="module")
def start(material):
    return load_checkpoint(material / "start", device="cpu")


@pytest.fixture(scope="module")
def folder(material):
    root = material / "catalogue"
    return Folder(config(root, with_lists(root, "t2i", "val", 3)), material / "start", seed=0)


def config(root, *parts, **changes):
    return DataConfig(str(root), tuple(Part(**p) for p in parts), top_k=3, max_bad_share=0.0, **changes)


@pytest.fixture(scope="module")
def reader(start, folder):
    return CandidateReader(start, folder.images)


def test_memory_is_what_the_engine_that_indexes_makes(start, folder, reader):
    data = folder.dataset(folder.config.train[0])
    documents = [data.pool[n] for n in (0, 1, 2)]  # picture, text, picture
    decoded = [reader._decoded([d.content])[0] for d in documents]
    want = LocalEngine(start).compress(decoded)
    for candidate, made in zip(reader.candidates(documents), want, strict=True):
        np.testing.assert_array_equal(candidate.memory.rows, made.rows)
        assert candidate.memory.full_tokens == made.full_tokens
    opened = reader.open(documents[0].content).image
    assert isinstance(opened, EncodedImage)
    torch.testing.assert_close(opened.features, LocalEngine(start).encode_picture(decoded[0].image).features)


def test_the_frozen_copy_does_not_follow_the_model_in_training(start, folder):
    model = load_checkpoint(folder._checkpoint, device="cpu")
    own = CandidateReader(model, folder.images)
    assert len(model.model.model.language_model.layers) == 2, "the model itself keeps its layers"
    with torch.no_grad():
        for parameter in model.model.parameters():
            parameter.add_(1.0)
    document = folder.dataset(folder.config.train[0]).pool[0]
    want = CandidateReader(start, folder.images).candidates([document])[0].memory.rows
    np.testing.assert_array_equal(own.candidates([document])[0].memory.rows, want)


def test_a_picture_is_read_once_and_a_broken_one_is_named(start, tmp_path):
    class Counting(LocalImages):
        seen = 0

        async def load(self, image):
            Counting.seen += 1
            return await super().load(image)

    from tests.tiny import picture

    picture(0).save(tmp_path / "a.png")
    (tmp_path / "b.png").write_bytes(b"no picture")
    own = CandidateReader(start, Counting(tmp_path))
    content = Content(image="a.png")
    for _ in range(3):
        own.open(content)
        own.candidates([Document("a", content)])
    assert Counting.seen == 2, "once to open it, once for its memory"
    with pytest.raises(UnreadablePicture, match=r"image b\.png"):
        own.candidates([Document("b", Content(image="b.png"))])


def test_the_cache_keeps_what_was_used_last_within_its_bytes():
    kept = Bounded(10)
    for name in "abc":
        kept.put(name, name.upper(), 4)
        kept.get("a")
    assert [kept.get(name) for name in "abc"] == ["A", None, "C"]
    kept.put("c", "again", 6)
    assert [kept.get(name) for name in "ac"] == ["A", "again"]
    kept.put("huge", "x", 11)
    assert kept.get("huge") is None


def test_a_pool_without_a_run_is_searched_by_the_embedder_inside(material, start):
    """As the miniature's own lists are made, task by task."""
    root = material / "catalogue"
    embedder = BackboneEmbedder.from_pretrained(material / "start")
    pool = encode_pool(start.model.model, start.processor, load_pool(root, "val"))
    want = stage.first_stage_lists(start.model, start.processor, pool, embedder.dim, 5)
    start.model.eval()
    ids = {q.query.id: [pool.items[i].id for i in row] for q, row in zip(pool.queries, want, strict=True)}
    for task in TASKS:
        folder = Folder(config(root, part(root, task, "val")), material / "start", 0)
        lists = EmbeddedLists(embedder, folder.dataset(folder.config.train[0]), folder.images, 5)
        for query in read_queries(root, "val", task):
            assert lists.ranked(query.query.id) == ids[query.query.id]
    assert lists.ranked("unknown") == []


def test_tasks_have_every_right_slot_and_ask_for_none_where_there_is_none(folder, reader, tmp_path):
    tasks = folder.training(reader, shuffle=0.0, missing="none")
    run = read_run(Path(folder.config.train[0].lists))
    assert len(tasks) == 6
    assert tasks[4].right == (NONE_INDEX,)
    assert tasks[4].rank is None
    assert {t.stratum for t in tasks} == {"coarse", "fine"}
    for task in tasks:
        assert [c.document.id for c in task.prompt.candidates] == run[task.id], "as the first stage has them"
        assert all(c.memory is not None for c in task.prompt.candidates)
    assert len(folder.training(reader, 0.0, "drop")) == 5
    two = tmp_path / "qrels.txt"
    wanted = tasks[0]
    first, second = (wanted.prompt.candidates[i].document.id for i in (2, 0))
    two.write_text(f"{wanted.id} 0 {first} 1 0\n{wanted.id} 0 {second} 2 0\n")
    both = replace(folder.config.train[0], qrels=str(two))
    judged = Folder(replace(folder.config, train=(both,)), folder._checkpoint, 0).training(reader, 0.0, "none")
    assert judged[0].right == (0, 2), "best grade first"
    assert judged[0].rank == 1


def test_validation_lists_are_as_served_and_a_missing_positive_is_a_miss(material, reader):
    root = material / "catalogue"
    made = with_lists(root, "t2i", "val", 3)
    settings = DataConfig(str(root), (Part(**made),), (Part(**made),), top_k=3, validation_queries=4)
    tasks = Folder(settings, material / "start", 0).validation(reader)
    assert len(tasks) == 4
    few = tasks.only(range(12))
    assert [few.spread(n)._where for n in (8, 5, 11)] == [
        [0, 1, 3, 4, 6, 7, 9, 10], [0, 2, 4, 7, 9], [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10],
    ]  # fmt: skip
    assert len(few.spread(12)) == len(few.spread(99)) == 12
    off = replace(settings, validation_queries=0)
    assert len(Folder(off, material / "start", 0).validation(reader)) == 0


@pytest.fixture(scope="module")
def traces(material):
    root = material / "catalogue"
    made = with_thoughts(root, "t2i", "val", 3)
    folder = Folder(config(root, made), material / "start", 0)
    return folder, Traces.open(folder, folder.config.train[0])


def test_every_thought_comes_once_before_any_comes_again(traces, reader):
    _, found = traces
    drawn = TraceExamples([found, found], reader, 2 * len(found) * 2, ExampleSettings(spread=0.0), seed=3)
    seen = [drawn[n].turn.ids.tobytes() for n in range(len(drawn))]
    half = len(drawn) // 2
    assert sorted(seen[:half]) == sorted(seen[half:])
    assert seen[:half] != seen[half:], "in another order"
    assert found.teachers == {"words": "CC0-1.0"}


def test_examples_are_the_traces_word_for_word(traces, reader):
    _, found = traces
    drawn = TraceExamples([found], reader, len(found), ExampleSettings(spread=0.0), seed=0)
    said = {reader.processor.tokenizer.decode(drawn[n].turn.ids[drawn[n].turn.sampled]) for n in range(len(found))}
    for trace in read_traces(found.lines.path):
        written = "".join(s.text for s in trace.turn if hasattr(s, "text") and type(s).__name__ == "Sampled")
        ids = [i for s in trace.turn if type(s).__name__ == "Sampled" for i in reader.processor.tokenise(s.text)]
        assert reader.processor.tokenizer.decode(ids) in said, written


class Blind(CandidateReader):
    """Cannot read one picture, or with None any."""

    def __init__(self, reader, did):
        self.__dict__ |= reader.__dict__
        self.did = did

    def candidates(self, documents):
        if self.did is None or any(d.id == self.did for d in documents):
            raise UnreadablePicture(f"image of {self.did}: expected a picture, got none. Fix it.")
        return super().candidates(documents)


def test_a_thought_or_list_with_a_broken_picture_is_passed_over_and_the_next_one_stands_in(
    traces, folder, reader, caplog
):
    _, found = traces
    settings = ExampleSettings(spread=0.0)
    good = TraceExamples([found], reader, 2 * len(found), settings, seed=0)
    lost = found[0].candidates[0]
    hit = [lost in found[good._at(n)].candidates for n in range(len(good))]
    assert any(hit)
    assert not all(hit)
    blind = Blind(reader, lost)
    drawn = TraceExamples([found], blind, len(good), settings, seed=0)
    for n in range(len(good)):
        want = next(m for m in range(n, n + len(found)) if lost not in found[good._at(m)].candidates)
        assert drawn[n].turn.ids.tolist() == good._drawn(good._at(want), n).turn.ids.tolist(), (
            "whatever was asked for before"
        )
    assert drawn._unreadable.count == sum(lost in found[n].candidates for n in range(len(found)))
    assert f"passed over: image of {lost}" in caplog.text
    tasks = folder.training(blind, shuffle=0.0, missing="none")
    plain = folder.training(reader, shuffle=0.0, missing="none")
    ids = [t.id for t in tasks]
    assert set(ids) == {t.id for t in plain if lost not in [c.document.id for c in t.prompt.candidates]}
    assert len(ids) == len(plain)
    assert [t.id for t in tasks[2:4]] == [plain[n].id if plain[n].id in ids else ids[n] for n in (2, 3)]


def test_a_validation_list_with_a_broken_picture_is_left_out_and_counted(material, reader, caplog):
    root = material / "catalogue"
    made = Part(**with_lists(root, "t2i", "val", 3))
    settings = DataConfig(str(root), (made,), (made,), top_k=3, max_bad_share=0.9)
    plain = list(Folder(settings, material / "start", 0).validation(reader))
    lost = plain[0].prompt.candidates[0].document.id
    whole = [t.id for t in plain if lost not in [c.document.id for c in t.prompt.candidates]]
    assert 0 < len(whole) < len(plain)
    blind = Blind(reader, lost)
    caplog.set_level("INFO")
    tasks = Folder(settings, material / "start", 0).validation(blind)
    assert [t.id for t in tasks] == whole
    assert f"validation: {len(whole)} of {len(plain)} lists can be read and are measured" in caplog.text
    blind.did = tasks[0].prompt.candidates[0].document.id
    with pytest.raises(UnreadablePicture):
        tasks[0]
    strict = replace(settings, max_bad_share=0.01)
    with pytest.raises(InputError, match=rf"pictures: expected at most 1% unreadable ones, got 1 of {len(plain)}"):
        Folder(strict, material / "start", 0).validation(blind)
    blind.did = None
    with pytest.raises(InputError, match="expected some that can be read, got none"):
        Folder(replace(settings, max_bad_share=1.0), material / "start", 0).validation(blind)


def test_a_validation_thought_with_a_broken_picture_is_left_out(traces, reader):
    _, found = traces
    lost = found[0].candidates[0]
    drawn = TraceExamples([found], Blind(reader, lost), len(found), ExampleSettings(spread=0.0), seed=0)
    good = TraceExamples([found], reader, len(found), ExampleSettings(spread=0.0), seed=0)
    whole = [n for n in range(len(found)) if lost not in found[good._at(n)].candidates]
    measured = drawn.readable(0.9)
    assert [measured[n].turn.ids.tolist() for n in range(len(measured))] == [good[n].turn.ids.tolist() for n in whole]
    with pytest.raises(InputError, match=f"expected at most 1% unreadable ones, got 1 of {len(found)}"):
        drawn.readable(0.01)


def test_many_broken_pictures_are_an_error():
    broken = Unreadable(0.1)

    def make(key):
        if key < 60:
            raise UnreadablePicture(f"image {key}.png: expected a picture, got none. Fix it.")
        return key

    with pytest.raises(
        InputError,
        match=r"pictures: expected at most 10% unreadable ones, got 21 of \d+, last: image 20\.png.*got none\. ",
    ):
        [broken.first([n, 99], make) for n in range(60)]
    with pytest.raises(InputError, match="expected some that can be read"):
        Unreadable().first([1, 2], make)


def test_verdicts_in_any_order_are_those_of_their_candidates(traces, reader):
    _, found = traces
    trace = found[0]
    labels = list(range(len(trace.candidates)))
    prompt = over(
        reader, found.data.find(trace.query_id, random.Random(0)), _documents(found.data, trace.candidates), labels
    )
    thought = replace(trace.thought, checks=())
    backwards = replace(thought, verdicts=thought.verdicts[::-1])
    made = [example_of(reader.processor, prompt, t, filled(render(t), prompt)) for t in (thought, backwards)]
    assert made[0].verdicts == made[1].verdicts == tuple(v.text for v in thought.verdicts)


def test_spread_labels_rename_the_thought_with_its_candidates(traces, reader):
    thought = Thought("x", (Verdict(0, "red"), Verdict(1, "keep")), (Check(1, "a4 match", True),), 1)
    moved = relabelled(thought, [5, 90])
    assert [s.index for s in render(moved) if isinstance(s, Full)] == [90]
    assert moved.answer == 90
    assert relabelled(replace(thought, answer=NONE_INDEX), [5, 90]).answer == NONE_INDEX
    _, found = traces
    example = TraceExamples([found], reader, len(found), ExampleSettings(spread=1.0), seed=0)[0]
    known = {reader.processor.token_id(label) for label in LABELS}
    shown = [i for i in example.prompt.ids.tolist() if i in known]
    named = [i for i in example.turn.ids.tolist() if i in known]
    assert set(named) <= set(shown)
    assert shown == [reader.processor.token_id(LABELS[c]) for c in example.prompt.candidates]
    assert max(example.prompt.candidates) > 2


def test_the_direct_read_may_answer_any_right_slot(start, traces, reader):
    _, found = traces
    example = TraceExamples([found], reader, 1, ExampleSettings(spread=0.0), seed=0)[0]
    both = replace(example, target=0, also=(2,))
    hidden = torch.randn(1, start.model.config.text_config.hidden_size, generator=torch.Generator().manual_seed(0))
    slots = [start.processor.token_id(s) for s in example.slots]
    p = torch.softmax(start.model.lm_head(hidden)[0, slots].float(), 0)
    plain = SftLoss(direct=1.0)
    loss, hits = direct_read_loss(start.model, start.processor, hidden, [both], plain)
    assert loss.item() == pytest.approx(-torch.log(p[0] + p[2]).item(), rel=1e-5)
    assert hits.tolist() == [p.argmax().item() in (0, 2)]
    alone = direct_read_loss(start.model, start.processor, hidden, [replace(example, target=0)], plain)[0]
    assert alone.item() == pytest.approx(-torch.log(p[0]).item(), rel=1e-5)
    weighted = SftLoss(direct=0.7, ranknet=FACTOR)
    both_parts = direct_read_loss(start.model, start.processor, hidden, [replace(example, target=0)], weighted)[0]
    pairs = ranknet(torch.log(p), example.ranks).item()
    assert both_parts.item() == pytest.approx(0.7 * alone.item() + FACTOR * pairs, rel=1e-4), (
        "two weights, not a product"
    )
    assert SftLoss().ranknet == 0


def test_thoughts_that_no_longer_fit_are_left_out_up_to_a_share(traces, tmp_path):
    folder, found = traces
    rows = [json.loads(line) for line in found.lines.path.read_text().splitlines()]
    wrong = next(r for r in rows if r["answer"] is not None)
    other = next(c for c in wrong["candidates"] if c != wrong["answer"])
    rows += [
        {**wrong, "answer": other}, {**wrong, "query_id": "90:gone"}, {**wrong, "verdicts": wrong["verdicts"][:1]},
        {**wrong, "candidates": ["90:gone", *wrong["candidates"][1:]], "answer": None},
        {**wrong, "verdicts": [*wrong["verdicts"], wrong["verdicts"][0]]},
    ]  # fmt: skip
    file = tmp_path / "traces.jsonl"
    file.write_text("".join(json.dumps(r) + "\n" for r in rows) + "{broken\n")
    bad = replace(folder.config.train[0], traces=str(file))
    lenient = Folder(replace(folder.config, max_bad_share=0.9), folder._checkpoint, 0)
    assert len(Traces.open(lenient, bad)) == len(found)
    half = Folder(replace(folder.config, max_bad_share=0.25), folder._checkpoint, 0)
    with pytest.raises(
        InputError, match=r"expected at most 25\.0% bad rows, got 5 of .*judged wrong.*not in mbeir_cards"
    ):
        Traces.open(half, bad)


def test_a_recipe_without_thoughts_or_embedder_says_what_to_run(material, folder):
    with pytest.raises(OptionsError, match=r"traces of query/val.*expected a file, got none.*synthesize"):
        Traces.open(folder, folder.config.train[0])
    with pytest.raises(OptionsError, match=r"data\.train: expected at least one part"):
        DataConfig("x", ())
