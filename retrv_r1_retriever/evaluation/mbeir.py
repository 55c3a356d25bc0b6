"""M-BEIR's files, read from disk line by line: pool, queries, judgements, first-stage run, instructions.

    cand_pool/**/*.jsonl                 {"did", "txt", "img_path", "modality", "src_content"}
    query/<split>/*.jsonl                {"qid", "query_txt", "query_img_path", "query_modality", "pos_cand_list", "neg_cand_list"}
    qrels/<split>/*_qrels.txt            qid 0 did grade task
    instructions/query_instructions.tsv  query modality, candidate modality, dataset, dataset id, paraphrases

Ids are "<dataset>:<id>"; picture paths are relative to the folder. One field is ours: `instruction` in a query row, used before
the table of instructions. Texts are taken as they stand (the reference code of M-BEIR adds a capital and a full stop).
"""

from __future__ import annotations

import json
import math
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from retrv_r1_retriever.errors import InputError, OptionsError, explain
from retrv_r1_retriever.evaluation.offsets import MAX_BAD_SHARE, LineFormat, LineIndex, Skipped
from retrv_r1_retriever.readers import mbeir_document
from retrv_r1_retriever.types import Content, Document, Query

INSTRUCTIONS = Path("instructions", "query_instructions.tsv")
#: M-BEIR's numbers of the task shapes: (query modality, candidate modality). 5 is unused there.
TASKS = {
    ("text", "image"): 0, ("text", "text"): 1, ("text", "image,text"): 2, ("image", "text"): 3, ("image", "image"): 4,
    ("image,text", "text"): 6, ("image,text", "image"): 7, ("image,text", "image,text"): 8,
}  # fmt: skip
MODALITIES = ("text", "image", "image,text")


@dataclass(frozen=True, slots=True)
class JudgedQuery:
    """A query and what is known about candidates.

    query: picture as a path relative to the data folder
    grades: candidate id -> grade above 0, best first; empty = nothing answers the query
    negatives: ids judged wrong
    stratum: group to report by, from `query_src_content`; "" = none is named
    """

    query: Query
    modality: str
    grades: Mapping[str, int]
    negatives: tuple[str, ...] = ()
    stratum: str = ""

    @property
    def id(self) -> str:
        assert self.query.id is not None
        return self.query.id


@dataclass(frozen=True, slots=True)
class Limits:
    """index_dir: where indexes are kept (None = `.retrv` beside each file); max_bad_share: see `Skipped`."""

    index_dir: Path | None = None
    max_bad_share: float = MAX_BAD_SHARE

    def __post_init__(self) -> None:
        if not 0 <= self.max_bad_share <= 1:
            fix = "0 allows no bad row."
            raise OptionsError(explain("max_bad_share", expected="a share, 0 to 1", got=self.max_bad_share, fix=fix))

    def open(self, path: Path, format: LineFormat) -> LineIndex:
        return LineIndex(path, format, folder=self.index_dir, max_bad_share=self.max_bad_share)


class Pool:
    """Candidates by number or id."""

    def __init__(self, path: Path, limits: Limits = Limits()) -> None:
        self.lines = limits.open(path, LineFormat("pool-1", lambda line: _candidate(line).id))

    def __len__(self) -> int:
        return len(self.lines)

    def __contains__(self, did: object) -> bool:
        return did in self.lines

    def __getitem__(self, number: int) -> Document:
        return _candidate(self.lines[number])

    def get(self, did: str) -> Document | None:
        found = self.lines.find(did)
        return _candidate(found[0]) if found else None


class Queries:
    """Queries by number or id, as their rows say: every positive of grade 1, no instruction but the row's own."""

    def __init__(self, path: Path, limits: Limits = Limits()) -> None:
        self.lines = limits.open(path, LineFormat("queries-1", lambda line: _query(line).id))

    def __len__(self) -> int:
        return len(self.lines)

    def __getitem__(self, number: int) -> JudgedQuery:
        return _query(self.lines[number])

    def get(self, qid: str) -> JudgedQuery | None:
        found = self.lines.find(qid)
        return _query(found[0]) if found else None


class Qrels:
    """Graded judgements, by query."""

    def __init__(self, path: Path, limits: Limits = Limits()) -> None:
        self.lines = limits.open(path, LineFormat("qrels-2", lambda line: _judgement(line)[0], unique=False))

    def grades(self, qid: str) -> dict[str, int]:
        """candidate id -> grade, as written; empty for an unknown query. Two grades of one candidate are an `InputError`."""
        grades: dict[str, int] = {}
        for _, did, grade in map(_judgement, self.lines.find(qid)):
            if (known := grades.setdefault(did, grade)) != grade:
                got = f"{did!r} as {known} and {grade}"
                raise InputError(
                    explain(f"{self.lines.path.name}, query {qid!r}", expected="one grade per candidate", got=got,
                            fix="Keep one of the lines.")
                )  # fmt: skip
        return grades


class RunFile:
    """A first stage's lists: a TREC run, by query."""

    def __init__(self, path: Path, limits: Limits = Limits()) -> None:
        self.lines = limits.open(path, LineFormat("run-2", lambda line: _retrieved(line)[0], unique=False))

    def ranked(self, qid: str) -> list[str]:
        """Ids by falling score, equal scores as in the file (see `read_run`); empty for an unknown query."""
        found = sorted(map(_retrieved, self.lines.find(qid)), key=lambda row: -row[2])
        return list(dict.fromkeys(did for _, did, _ in found))


@dataclass(frozen=True)
class Instructions:
    """(dataset id, query modality, candidate modality) -> paraphrases. A table of a few dozen lines."""

    prompts: Mapping[tuple[str, str, str], tuple[str, ...]]
    skipped: Skipped = field(default_factory=Skipped)

    @classmethod
    def read(cls, path: Path) -> Instructions:
        prompts: dict[tuple[str, str, str], tuple[str, ...]] = {}
        bad = []
        lines = path.read_text(encoding="utf-8-sig").split("\n")[1:]
        for number, line in enumerate(lines, 2):
            columns = [column.strip() for column in line.split("\t")]
            if line.strip():
                if len(columns) < 5 or not any(columns[4:]):
                    expected = "query modality, candidate modality, dataset, dataset id, at least one prompt"
                    bad.append(explain(f"{path.name}:{number}", expected=expected, got=repr(line), fix="Fix the line."))
                else:
                    prompts[columns[3], columns[0], columns[1]] = tuple(filter(None, columns[4:]))
        return cls(prompts, Skipped(len(bad), len(prompts) + len(bad), tuple(bad)))

    def choose(self, qid: str, query_modality: str, candidate_modality: str, rng: random.Random) -> str | None:
        """One paraphrase, or None if the table has no such line."""
        known = self.prompts.get((qid.partition(":")[0], query_modality, candidate_modality))
        return rng.choice(known) if known else None


@dataclass(frozen=True)
class Dataset:
    """One query file with the pool it is answered from.

    same_dataset: leave out positives of other datasets than the query's, as M-BEIR's reference evaluation does (OVEN, INFOSEEK)
    sought: the modality that every query is to find, which chooses its instruction; None = each one's first positive says it
    """

    root: Path
    queries: Queries
    pool: Pool
    qrels: Qrels | None = None
    same_dataset: bool = False
    sought: str | None = None

    @classmethod
    def open(
        cls, root: Path, queries: str, pool: str, *, qrels: str | None = None, limits: Limits = Limits()
    ) -> Dataset:
        """Files as paths relative to `root`. Without `qrels`, the positives of the query rows count, each with grade 1."""
        judged = None if qrels is None else Qrels(root / qrels, limits)
        return cls(root, Queries(root / queries, limits), Pool(root / pool, limits), judged)

    @cached_property
    def instructions(self) -> Instructions:
        path = self.root / INSTRUCTIONS
        return Instructions.read(path) if path.is_file() else Instructions({})

    def __len__(self) -> int:
        return len(self.queries)

    def query(self, number: int, rng: random.Random) -> JudgedQuery:
        """With grades from the qrels and a paraphrase drawn by `rng`."""
        return self._asked(self.queries[number], rng)

    def find(self, qid: str, rng: random.Random) -> JudgedQuery | None:
        """The same by id; None for an unknown one."""
        judged = self.queries.get(qid)
        return None if judged is None else self._asked(judged, rng)

    def _asked(self, judged: JudgedQuery, rng: random.Random) -> JudgedQuery:
        judged = self.graded(judged)
        if judged.query.instruction is not None:
            return judged
        modality = self.sought or self.target_modality(judged)
        instruction = modality and self.instructions.choose(judged.id, judged.modality, modality, rng)
        return replace(judged, query=replace(judged.query, instruction=instruction or None))

    def graded(self, judged: JudgedQuery) -> JudgedQuery:
        if self.qrels is not None and (known := self.qrels.grades(judged.id)):
            judged = replace(judged, grades=best_first(known), negatives=tuple(d for d, g in known.items() if g <= 0))
        if self.same_dataset:
            dataset = judged.id.partition(":")[0]
            kept = {did: grade for did, grade in judged.grades.items() if did.partition(":")[0] == dataset}
            judged = replace(judged, grades=kept)
        return judged

    def target_modality(self, judged: JudgedQuery) -> str | None:
        """Of the first positive that is in the pool: what a query is to find is part of its task."""
        found = next(filter(None, map(self.pool.get, judged.grades)), None)
        return None if found is None else modality_of(found)


def best_first(grades: Mapping[str, int]) -> dict[str, int]:
    """The positives, best grade first."""
    return dict(sorted(((d, g) for d, g in grades.items() if g > 0), key=lambda pair: -pair[1]))


def modality_of(thing: Document | Content) -> str:
    """ "text", "image" or "image,text": what a pool's row says, else what is there."""
    if isinstance(thing, Document) and "modality" in thing.metadata:
        return str(thing.metadata["modality"])
    content = thing.content if isinstance(thing, Document) else thing
    return "image,text" if content.image and content.text else "image" if content.image else "text"


def find_files(root: Path, pattern: str) -> list[str]:
    """Files below `root`, relative, in order of their names."""
    return sorted(path.relative_to(root).as_posix() for path in root.glob(pattern) if path.is_file())


def iterate(queries: Queries) -> Iterator[JudgedQuery]:
    return (queries[number] for number in range(len(queries)))


# -- lines -------------------------------------------------------------------------------------------------------------


def _candidate(line: bytes) -> Document:
    document = mbeir_document(_json(line))
    _check_id("did", document.id)
    _check_modality("modality", document.metadata.get("modality"))
    return document


def _query(line: bytes) -> JudgedQuery:
    row = _json(line)
    qid = row.get("qid")
    _check_id("qid", qid)
    text, image, instruction = (_string(row, name) for name in ("query_txt", "query_img_path", "instruction"))
    query = Query(Content(text, image), instruction, qid)
    _check_modality("query_modality", row.get("query_modality"))
    positives = dict.fromkeys(_ids(row, "pos_cand_list"), 1)
    return JudgedQuery(query, row.get("query_modality") or modality_of(query.content), positives,
                       tuple(_ids(row, "neg_cand_list")), _stratum(row.get("query_src_content")))  # fmt: skip


def _stratum(source: object) -> str:
    """M-BEIR's free field, where a data set has put a JSON object with a stratum there."""
    try:
        data = json.loads(source) if isinstance(source, str) else source
    except ValueError:
        return ""
    return str(data.get("stratum") or "") if isinstance(data, dict) else ""


def _judgement(line: bytes) -> tuple[str, str, int]:
    fields = line.decode("utf-8-sig").split()
    if len(fields) < 4:
        raise InputError(explain("line", expected="qid 0 did grade", got=repr(line), fix="Fix it."))
    return fields[0], fields[2], int(fields[3])


def _retrieved(line: bytes) -> tuple[str, str, float]:
    fields = line.decode("utf-8-sig").split()
    if len(fields) < 5:
        raise InputError(explain("line", expected="qid Q0 did rank score tag", got=repr(line), fix="Fix it."))
    if not math.isfinite(score := float(fields[4])):
        raise InputError(explain("score", expected="a finite number", got=fields[4], fix="Fix it."))
    return fields[0], fields[2], score


def _json(line: bytes) -> dict[str, Any]:
    row = json.loads(line)
    if not isinstance(row, dict):
        raise InputError(explain("row", expected="a JSON object", got=type(row).__name__, fix="Write {...}."))
    return row


def _check_id(field: str, id: object) -> None:
    if not isinstance(id, str) or not id or len(id.split()) != 1 or id != id.strip():
        got = "nothing" if id is None else repr(id)
        raise InputError(explain(field, expected="a string without spaces", got=got, fix="Give every row one."))


def _check_modality(field: str, modality: object) -> None:
    if modality is not None and modality not in MODALITIES:
        raise InputError(explain(field, expected=f"one of {MODALITIES}", got=repr(modality), fix="Fix it."))


def _string(row: Mapping[str, Any], field: str) -> str | None:
    value = row.get(field)
    if value is not None and not isinstance(value, str):
        raise InputError(explain(field, expected="a string or null", got=type(value).__name__, fix="Convert it."))
    return value or None


def _ids(row: Mapping[str, Any], field: str) -> Sequence[str]:
    ids = row.get(field) or []
    if not isinstance(ids, list) or not all(isinstance(id, str) for id in ids):
        raise InputError(explain(field, expected="a list of ids", got=repr(ids)[:80], fix="Write a list of strings."))
    return list(dict.fromkeys(ids))
