"""What a teacher writes about: a query, its candidates in prompt order, which of them are right, and all of it in words."""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Literal, Protocol, get_args

from retrv_r1_retriever.errors import InputError, OptionsError, explain
from retrv_r1_retriever.evaluation.mbeir import Dataset, JudgedQuery, Limits, Pool, Qrels, Queries, RunFile
from retrv_r1_retriever.evaluation.offsets import LineFormat, Skipped
from retrv_r1_retriever.types import MAX_CANDIDATES, Candidate, Document, Query
from retrv_r1_training.klists import list_length

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
    """top_k: K. min_k: half of the lists are cut to a random length from this to K; 0 = none: a thought taught on one length may go wrong
    on every other (docs/experiments.md)
    shuffle: share of lists in random order, so that rank alone decides nothing
    missing: a list without a right answer trains `<|none|>` ("none"), gets one put in at a random place ("inject"), or is dropped
    """

    top_k: int = 20
    min_k: int = 0
    shuffle: float = 0.5
    missing: Missing = "none"
    seed: int = 0
    instruction: str | None = None

    def __post_init__(self) -> None:
        if not 1 <= self.top_k <= MAX_CANDIDATES:
            raise OptionsError(
                explain("top_k", expected=f"1 to {MAX_CANDIDATES}", got=self.top_k, fix="Pass such a number.")
            )
        if not 0 <= self.min_k <= self.top_k:
            raise OptionsError(
                explain("min_k", expected=f"0 to top_k ({self.top_k})", got=self.min_k, fix="Pass such a number.")
            )
        if not 0.0 <= self.shuffle <= 1.0:
            raise OptionsError(explain("shuffle", expected="a share, 0 to 1", got=self.shuffle, fix="Pass a share."))
        if self.missing not in get_args(Missing):
            raise OptionsError(
                explain("missing", expected=get_args(Missing), got=repr(self.missing), fix="Pass one of these.")
            )


class Captions:
    """What a candidate shows, in words: from a JSONL file {"id", "caption"}, else from its `src_content`; "" where nobody knows."""

    def __init__(self, file: Path | None, limits: Limits = Limits()) -> None:
        self._lines = file and limits.open(file, LineFormat("captions-1", _caption_id))

    def of(self, document: Document) -> str:
        found = self._lines.find(document.id) if self._lines else []
        if found:
            return str(json.loads(found[0]).get("caption") or "")
        return source_caption(document.metadata.get("src_content"))


@dataclass
class MbeirLists:
    """Lists from M-BEIR query and pool files and a first-stage run (TREC), read line by line as training reads them; pictures
    stay paths.

    root: where the table of instructions is, None = no table; options.instruction goes before it and before the rows' own
    qrels: judgements, where a query has any there; otherwise the positives of its row
    captions: JSONL {"id", "caption"}; without it a candidate's words are the caption in its `src_content`, else its text
    """

    queries: Sequence[Path]
    pools: Sequence[Path]
    first_stage: Path
    options: ListOptions = ListOptions()
    qrels: Path | None = None
    captions: Path | None = None
    root: Path | None = None
    limits: Limits = field(default_factory=Limits)
    counts: Counter[str] = field(default_factory=Counter)

    def __iter__(self) -> Iterator[LabelledList]:
        """Raises `InputError` at the end if the run has no list for any query, or more of it than `limits.max_bad_share` is not in the
        pools."""
        self.counts.clear()
        wanted, listed, outside, examples = "none", 0, 0, list[str]()
        for data in self._data:
            for number in range(len(data)):
                judged = data.query(
                    number, random.Random(f"{self.options.seed}:{data.queries.lines.path.name}:{number}")
                )
                wanted = judged.id
                ranked = self._run.ranked(wanted)[: self.options.top_k]
                lost = [did for did in ranked if did not in data.pool]
                listed, outside = listed + len(ranked), outside + len(lost)
                examples += [f"query {judged.id}: candidate {did} is in no pool" for did in lost[: 3 - len(examples)]]
                made = self._list(data, judged, [did for did in ranked if did not in lost])
                if made is not None:
                    yield made
        if not listed:
            found = next(self._run.lines.distinct_keys(), "none")
            got = f"lists of others, such as {found}"
            fix = "Fix the ids: those that convert wrote begin with the data set's (100:...)."
            expected = f"lists of the queries, such as {wanted}"
            raise InputError(explain(str(self.first_stage), expected=expected, got=got, fix=fix))
        self.counts.update({"candidates outside the pool": outside} if outside else {})
        Skipped(outside, listed, tuple(examples)).check(str(self.first_stage), self.limits.max_bad_share)

    def _list(self, data: Dataset, judged: JudgedQuery, ranked: list[str]) -> LabelledList | None:
        options, id = self.options, judged.id
        positives = tuple(did for did in judged.grades if did in data.pool)
        if not ranked:
            self.counts["without a first-stage list"] += 1
            return None
        rng = random.Random(f"{options.seed}:{id}")
        ranked = ranked[: list_length(options.min_k, options.top_k, rng)]
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
        documents = {did: _found(data, did) for did in (*ranked, *positives[:1])}
        query = judged.query if options.instruction is None else replace(judged.query, instruction=options.instruction)
        candidates = tuple(Candidate(documents[did], None, rank) for rank, did in ranks)
        target = next((did for did in (*(did for _, did in ranks if did in positives), *positives)), None)
        words = tuple(self._words(documents[did]) for _, did in ranks)
        return LabelledList(query, candidates, words, positives, self._words(documents[target]) if target else "")

    @cached_property
    def _data(self) -> list[Dataset]:
        pool = _Pools([Pool(path, self.limits) for path in self.pools])
        qrels = Qrels(self.qrels, self.limits) if self.qrels else None
        root = self.root or Path(self.queries[0]).parent
        return [Dataset(root, Queries(path, self.limits), pool, qrels) for path in self.queries]

    @cached_property
    def _run(self) -> RunFile:
        return RunFile(self.first_stage, self.limits)

    @cached_property
    def _captions(self) -> Captions:
        return Captions(self.captions, self.limits)

    def _words(self, document: Document) -> str:
        return self._captions.of(document) or document.content.text or ""


class _Pools(Pool):
    """Several as one, by id."""

    def __init__(self, pools: Sequence[Pool]) -> None:
        self._pools = pools

    def __contains__(self, did: object) -> bool:
        return any(did in pool for pool in self._pools)

    def get(self, did: str) -> Document | None:
        return next(filter(None, (pool.get(did) for pool in self._pools)), None)


def _found(data: Dataset, did: str) -> Document:
    document = data.pool.get(did)
    assert document is not None, "ids of the pool only"
    return document


def _caption_id(line: bytes) -> str:
    row = json.loads(line)
    if not isinstance(row, dict) or "id" not in row:
        raise InputError(
            explain("row", expected='an object with "id" and "caption"', got=repr(row)[:60], fix="Fix the row.")
        )
    return str(row["id"])


def source_caption(source: object) -> str:
    """The caption in M-BEIR's free `src_content`, where a data set has put one there as JSON."""
    try:
        data = json.loads(source) if isinstance(source, str) else source
    except ValueError:
        return ""
    return str(data.get("caption") or "") if isinstance(data, dict) else ""
