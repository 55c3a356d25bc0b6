"""What a teacher writes about: a query, its candidates in prompt order, which of them are right, and all of it in words."""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, Protocol, get_args

from retrv_r1_retriever.errors import InputError, OptionsError, explain
from retrv_r1_retriever.evaluation.runs import read_qrels, read_run
from retrv_r1_retriever.indexing import IndexFailure
from retrv_r1_retriever.readers import read_mbeir
from retrv_r1_retriever.types import MAX_CANDIDATES, Candidate, Document, Query

Missing = Literal["none", "inject", "drop"]


@dataclass(frozen=True, slots=True)
class LabelledList:
    """One query and K candidates.

    query: with an id, unique in its source
    candidates: in the order of the prompt
    captions: each candidate in words, for teachers only; "" where nobody knows
    positives: ids of all right answers, in the list or not; target: the first of them in words, "" where nobody knows
    """

    query: Query
    candidates: tuple[Candidate, ...]
    captions: tuple[str, ...]
    positives: tuple[str, ...]
    target: str = ""

    @property
    def query_id(self) -> str:
        if self.query.id is None:
            raise InputError(explain("query", expected="an id", got="None", fix="Pass Query.of(..., id=...)."))
        return self.query.id

    @property
    def ids(self) -> tuple[str, ...]:
        return tuple(c.document.id for c in self.candidates)

    @property
    def right(self) -> tuple[int, ...]:
        """Places of the right answers in the list; empty means `<|none|>` is the answer."""
        return tuple(i for i, id in enumerate(self.ids) if id in self.positives)


class ListSource(Protocol):
    """Any reader of a data set. Iterating it again gives the same lists in the same order.

    counts: what became of the queries in the last full iteration ("injected", "dropped", ...), for the summary
    """

    def __iter__(self) -> Iterator[LabelledList]: ...

    @property
    def counts(self) -> Mapping[str, int]: ...


@dataclass(frozen=True, slots=True)
class ListOptions:
    """top_k: K. shuffle: share of lists in random order, so that rank alone decides nothing.

    missing: a list without a right answer trains `<|none|>` ("none"), gets one put in at a random place ("inject"), or is dropped
    """

    top_k: int = 20
    shuffle: float = 0.5
    missing: Missing = "none"
    seed: int = 0
    instruction: str | None = None

    def __post_init__(self) -> None:
        if not 1 <= self.top_k <= MAX_CANDIDATES:
            raise OptionsError(
                explain("top_k", expected=f"1 to {MAX_CANDIDATES}", got=self.top_k, fix="Pass such a number.")
            )
        if not 0.0 <= self.shuffle <= 1.0:
            raise OptionsError(explain("shuffle", expected="a share, 0 to 1", got=self.shuffle, fix="Pass a share."))
        if self.missing not in get_args(Missing):
            raise OptionsError(
                explain("missing", expected=get_args(Missing), got=repr(self.missing), fix="Pass one of these.")
            )


@dataclass
class MbeirLists:
    """Lists from M-BEIR query and pool files and a first-stage run (TREC); pictures stay paths.

    Keeps only the candidates that some list names. qrels: replaces the `pos_cand_list` of the query rows.
    captions: JSONL {"id", "caption"}; without it a candidate's words are the caption in its `src_content`, else its text.
    """

    queries: Sequence[Path]
    pools: Sequence[Path]
    first_stage: Path
    options: ListOptions = ListOptions()
    qrels: Path | None = None
    captions: Path | None = None
    counts: Counter[str] = field(default_factory=Counter)

    def __iter__(self) -> Iterator[LabelledList]:
        self.counts.clear()
        for row, positives in self._rows():
            made = self._list(row, positives)
            if made is not None:
                yield made

    def _list(self, row: dict[str, Any], positives: tuple[str, ...]) -> LabelledList | None:
        id, options = str(row["qid"]), self.options
        ranked = self._run.get(id, [])[: options.top_k]
        if not ranked:
            self.counts["without a first-stage list"] += 1
            return None
        rng = random.Random(f"{options.seed}:{id}")
        if not set(ranked) & set(positives):
            if options.missing == "drop" or (options.missing == "inject" and not positives):
                self.counts["dropped: no right answer in the list"] += 1
                return None
            if options.missing == "inject":
                ranked[rng.randrange(len(ranked))] = positives[0]
            self.counts["injected" if options.missing == "inject" else "answer none"] += 1
        ranks = list(enumerate(ranked, 1))
        if rng.random() < options.shuffle:
            rng.shuffle(ranks)
        query = Query.of(row.get("query_txt"), row.get("query_img_path"), options.instruction, id)
        candidates = tuple(Candidate(self._document(d, id), None, rank) for rank, d in ranks)
        target = next((d for d in (*(d for _, d in ranks if d in positives), *positives)), None)
        words = tuple(self._words(d) for _, d in ranks)
        return LabelledList(query, candidates, words, positives, self._words(target) if target else "")

    def _rows(self) -> Iterator[tuple[dict[str, Any], tuple[str, ...]]]:
        graded = read_qrels(self.qrels) if self.qrels else None
        for row in _jsonl(self.queries, "qid"):
            if graded is None:
                positives: Iterable[str] = map(str, row.get("pos_cand_list") or ())
            else:
                grades = graded.get(str(row["qid"]), {})
                positives = sorted((d for d, grade in grades.items() if grade > 0), key=lambda d: -grades[d])
            yield row, tuple(positives)

    @cached_property
    def _run(self) -> dict[str, list[str]]:
        return read_run(self.first_stage)

    @cached_property
    def _documents(self) -> dict[str, Document]:
        needed = {d for ranked in self._run.values() for d in ranked[: self.options.top_k]}
        needed |= {d for _, positives in self._rows() for d in positives}
        found = {}
        for path in self.pools:
            for row in read_mbeir(path):
                if isinstance(row, IndexFailure):
                    raise InputError(row.reason)
                if row.id in needed:
                    found[row.id] = row
        return found

    @cached_property
    def _captions(self) -> dict[str, str]:
        rows = _jsonl([self.captions] if self.captions else [], "id")
        return {str(row["id"]): str(row.get("caption") or "") for row in rows}

    def _document(self, id: str, query_id: str) -> Document:
        document = self._documents.get(id)
        if document is None:
            fix = "Pass the pool that the first stage searched."
            raise InputError(
                explain(f"query {query_id}", expected=f"candidate {id} in the pool", got="no such row", fix=fix)
            )
        return document

    def _words(self, id: str) -> str:
        if id in self._captions:
            return self._captions[id]
        document = self._documents.get(id)
        if document is None:
            return ""
        return source_caption(document.metadata.get("src_content")) or document.content.text or ""


def source_caption(source: object) -> str:
    """The caption in M-BEIR's free `src_content`, where a data set has put one there as JSON."""
    try:
        data = json.loads(source) if isinstance(source, str) else source
    except ValueError:
        return ""
    return str(data.get("caption") or "") if isinstance(data, dict) else ""


def _jsonl(paths: Iterable[Path], key: str) -> Iterator[dict[str, Any]]:
    """Rows; one that is no object with `key` is an `InputError` naming file and line."""
    for path in paths:
        with path.open(encoding="utf-8") as file:
            for number, line in enumerate(file, 1):
                try:
                    row = json.loads(line)
                except ValueError as error:
                    raise InputError(f"{path}:{number}: {error}") from None
                if not isinstance(row, dict) or key not in row:
                    got = repr(line.strip()[:60])
                    raise InputError(
                        explain(f"{path}:{number}", expected=f"an object with {key!r}", got=got, fix="Fix the row.")
                    )
                yield row
