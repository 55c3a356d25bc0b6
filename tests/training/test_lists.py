"""Training lists: labels from all 127, negatives that words can tell from the positive, lists that grow."""

from __future__ import annotations

import random
from dataclasses import replace

import numpy as np
import pytest
from retrv_r1_training.align import agreement
from retrv_r1_training.data import Item, Pool
from retrv_r1_training.direct import list_size
from retrv_r1_training.lists import Contrast, Lists, contrast, largest_list, prompt_of, spread_labels
from retrv_r1_training.teacher import Caption

from retrv_r1_retriever.demo.catalogue import ATTRIBUTES, LabelledQuery
from retrv_r1_retriever.prompt import build_prompt, label, query_segments
from retrv_r1_retriever.trace import Compressed, Full, Text
from retrv_r1_retriever.types import Candidate, Content, Document, Memory, Query


@pytest.fixture
def lists():
    """60 cards of all colours and shapes; one query, which asks for card 7."""
    words = [
        f"one {colour} {shape} plain {frame} a{i % 10}"
        for i, (colour, shape, frame) in enumerate(
            (c, s, f) for c in ATTRIBUTES["colour"][:5] for s in ATTRIBUTES["shape"][:3] for f in ATTRIBUTES["frame"]
        )
    ]
    items = tuple(Item(str(i), "text", Content(text), text) for i, text in enumerate(words))
    query = LabelledQuery(Query.of(words[7]), "t2i", "coarse", ("7",), "text", words[7])
    memory = Memory(np.zeros((1, 1), np.float16), "", "", 0)
    return Lists(Pool(items, (query,)), np.arange(20)[None], [memory] * len(items))


def test_labels_in_order_are_the_prompt_as_served(lists):
    chosen = [4, 7, 9]
    items = [lists.pool.items[i] for i in chosen]
    served = build_prompt(
        lists.pool.queries[0].query,
        [Candidate(Document(x.id, x.content), None, r, lists.memories[0]) for r, x in enumerate(items, 1)],
    )
    assert prompt_of(lists, 0, chosen, [0, 1, 2]) == served


def test_in_full_the_query_stands_before_the_candidates(lists):
    """Behind them their tokens cannot be compared with it as they are read."""
    query, chosen = lists.pool.queries[0].query, [4, 7, 9]
    prompt = prompt_of(replace(lists, full=True), 0, chosen, [0, 3, 5])
    shown = [at for at, segment in enumerate(prompt.segments) if isinstance(segment, Full)]
    asked = [at for at, segment in enumerate(prompt.segments) if segment in query_segments(query)]
    assert asked
    assert max(asked) < min(shown)
    assert [prompt.segments[at].content for at in shown] == [lists.pool.items[i].content for i in chosen]
    assert [prompt.segments[at - 1] for at in shown] == [Text(label(i)) for i in (0, 3, 5)]
    words = "".join(s.text for s in prompt.segments if isinstance(s, Text))
    compressed = "".join(s.text for s in prompt_of(lists, 0, chosen, [0, 3, 5]).segments if isinstance(s, Text))
    assert sorted(words) == sorted(compressed), "the same words in another order"


def test_spread_labels_show_their_candidates_and_nothing_else(lists):
    rng = random.Random(0)
    labels = spread_labels(3, rng)
    assert labels == sorted(labels)
    prompt = prompt_of(lists, 0, [4, 7, 9], labels)
    shown = [s.index for s in prompt.segments if isinstance(s, Compressed)]
    assert shown == labels
    assert [prompt.candidates[i].document.id for i in shown] == ["4", "7", "9"]
    assert [s.text for s in prompt.segments if isinstance(s, Text) and s.text.startswith("<|c")] == [
        *map(label, labels)
    ]
    assert {s for at in range(200) for s in spread_labels(9, random.Random(at))} == set(range(127)), (
        "all labels are drawn"
    )


def test_contrast_starts_with_the_positive_and_never_repeats_its_words(lists):
    for seed in range(20):
        chosen = contrast(lists.pool, 0, lists.ranked[0].tolist(), Contrast(12), random.Random(seed))
        assert chosen[0] == 7
        assert len(set(chosen)) == 12
        assert all(lists.pool.captions[i].coarse != lists.pool.captions[7].coarse for i in chosen[1:])


def test_every_word_is_contradicted_by_some_negative(lists):
    want = lists.pool.captions[7].coarse
    negatives = [lists.pool.captions[lists.pool.contradicting(7, random.Random(seed))].coarse for seed in range(60)]
    first = {next(at for at, word in enumerate(c) if word != want[at]) for c in negatives if c != want}
    assert first == {1, 2, 4}, "of five words, two are the same on every card"


def test_lists_grow_from_one_candidate_to_k():
    rng = random.Random(0)
    sizes = {share: {list_size(share, 20, rng) for _ in range(500)} for share in (0.0, 0.3, 0.5, 0.9)}
    assert sizes == {0.0: {1}, 0.3: {1, 2}, 0.5: set(range(2, 9)), 0.9: set(range(5, 21))}


def test_agreement_is_word_by_word_with_the_first_and_unknown_where_a_word_is_missing():
    candidates = [Caption(("one", "red", "ring"), ("a1",)), Caption(("one", "blue"), ("a1",)), Caption(("two",), ())]
    same = agreement(candidates, 4)
    assert same.nan_to_num(9).tolist() == [[1, 1, 1, 9], [1, 0, 9, 9], [0, 9, 9, 9]]


def test_lists_grow_and_never_beyond_k():
    growth = ((0.25, 1), (0.5, 8))
    assert [largest_list(growth, progress, 20) for progress in (0.0, 0.25, 0.49, 0.5, 0.99)] == [1, 8, 8, 20, 20]
    assert largest_list(growth, 0.3, 4) == 4
