"""TREC run and qrels files, the format every evaluation tool of this field reads.

run    <query> Q0 <document> <rank> <score> <tag>
qrels  <query> 0 <document> <grade>           (M-BEIR adds a task id as fifth column; it is ignored)
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from retrv_r1_retriever.errors import InputError, explain
from retrv_r1_retriever.types import RankedResults


def write_run(path: Path, run: Mapping[str, Sequence[str]], tag: str) -> None:
    """Best first becomes rank 1; the score is -rank, so that tools which sort by score keep the order."""
    lines = []
    for query, documents in run.items():
        for rank, document in enumerate(documents, 1):
            lines.append(f"{_field(query)} Q0 {_field(document)} {rank} {-rank} {_field(tag)}\n")
    path.write_text("".join(lines), encoding="utf-8")


def read_run(path: Path) -> dict[str, list[str]]:
    """query -> documents by falling score; equal scores keep the file's order. Ranks in the file are ignored, as trec_eval does."""
    scored: dict[str, list[tuple[float, str]]] = {}
    for number, (query, _, document, _, score, *_) in _rows(path, 5, "query Q0 document rank score tag"):
        scored.setdefault(query, []).append((_number(score, path, number), document))
    return {query: [d for _, d in sorted(pairs, key=lambda pair: -pair[0])] for query, pairs in scored.items()}


def write_qrels(path: Path, qrels: Mapping[str, Mapping[str, int]]) -> None:
    lines = [f"{_field(q)} 0 {_field(d)} {grade}\n" for q, grades in qrels.items() for d, grade in grades.items()]
    path.write_text("".join(lines), encoding="utf-8")


def read_qrels(path: Path) -> dict[str, dict[str, int]]:
    qrels: dict[str, dict[str, int]] = {}
    for number, (query, _, document, grade, *_) in _rows(path, 4, "query 0 document grade"):
        qrels.setdefault(query, {})[document] = int(_number(grade, path, number))
    return qrels


def run_of(results: Iterable[RankedResults]) -> dict[str, list[str]]:
    """Reranked lists as a run; queries need ids."""
    run: dict[str, list[str]] = {}
    for ranked in results:
        if ranked.query.id is None:
            raise InputError(explain("query", expected="an id", got="None", fix="Pass Query.of(..., id=...)."))
        run[ranked.query.id] = [result.document.id for result in ranked.results]
    return run


def _rows(path: Path, columns: int, layout: str) -> Iterator[tuple[int, list[str]]]:
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        fields = line.split()
        if fields and len(fields) < columns:
            raise InputError(explain(f"{path}:{number}", expected=layout, got=repr(line), fix="Fix the line."))
        if fields:
            yield number, fields


def _number(text: str, path: Path, line: int) -> float:
    try:
        return float(text)
    except ValueError:
        raise InputError(explain(f"{path}:{line}", expected="a number", got=repr(text), fix="Fix the line.")) from None


def _field(text: str) -> str:
    if not text or len(text.split()) != 1 or text != text.strip():
        raise InputError(
            explain(
                "TREC file", expected="ids without spaces", got=repr(text), fix="Rename it: columns are split there."
            )
        )
    return text
