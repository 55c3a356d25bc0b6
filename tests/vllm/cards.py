"""Lists of the demo catalogue's validation cards, each with a query that one of them answers; made in memory."""

from __future__ import annotations

import random
from collections import Counter
from functools import cache

from retrv_r1_retriever.demo import catalogue
from retrv_r1_retriever.types import Candidate, Content, Document, Query


@cache
def tasks(per_stratum: int = 4, count: int = 20) -> tuple[tuple[Query, tuple[Document, ...]], ...]:
    """Of every task and stratum so many; `count` candidates each, the answer and its neighbours in the pool."""
    split = catalogue.SPLITS["val"]
    cards, rng = catalogue.make_cards(split), random.Random(5)
    taken: Counter[tuple[str, str]] = Counter()
    found = []
    for spec in catalogue.make_queries(split, cards):
        kind = spec["task"], spec["stratum"]
        taken[kind] += 1
        if taken[kind] > per_stratum:
            continue
        picture = None if spec["picture"] is None else catalogue.render(spec["picture"], rng)
        query = Query.of(spec["text"], picture, catalogue.TASKS[spec["task"]])
        start = max(0, min(spec["target"] - count // 2, len(cards) - count))
        numbers = list(range(start, start + count))
        rng.shuffle(numbers)
        texts = spec["task"] == "i2t"
        documents = tuple(Document(str(n), _content(cards[n][0], texts, rng)) for n in numbers)
        found.append((query, documents))
    return tuple(found)


def candidates(documents: tuple[Document, ...]) -> list[Candidate]:
    return [Candidate(document, 1.0 / rank, rank) for rank, document in enumerate(documents, 1)]


def _content(card: catalogue.Card, text: bool, rng: random.Random) -> Content:
    return Content(card.text) if text else Content(image=catalogue.render(card, rng))
