"""Tables into M-BEIR's files: one call for the candidates, one for the queries of each split. Columns are named, never guessed.

Rows are read, checked and written one at a time, pictures in a few threads. Output appears in one step at the end; rows left out
are listed in `<out>/skipped/`.
"""

from __future__ import annotations

import json
import re
import sqlite3
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any, TypeVar

from retrv_r1_retriever.errors import InputError, OptionsError, RetrvR1Error, explain
from retrv_r1_retriever.evaluation.mbeir import INSTRUCTIONS, MODALITIES, TASKS, Limits, Pool, modality_of
from retrv_r1_retriever.evaluation.offsets import scratch_table
from retrv_r1_retriever.types import Content
from retrv_r1_training.convert_output import Report, Skips, Target, check_name, output
from retrv_r1_training.pictures import Pictures
from retrv_r1_training.sources import SourceRow, read_rows
from retrv_r1_training.waiting import counted

CANDIDATE_FIELDS = ("id", "text", "image")
QUERY_FIELDS = ("id", "text", "image", "instruction", "positives", "grades", "negatives")
JUDGEMENT_FIELDS = ("query", "candidate", "grade")
_WINDOW = 64
_COLUMN = re.compile(r"\{([^{}]+)\}")
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Table:
    """A table and what its columns mean.

    mapping: field -> column; for `text` also a template over several ("{title}. {description}")
    format: None = by the file's suffix; separator: what stands between ids where one cell holds several
    """

    source: str
    mapping: Mapping[str, str]
    format: str | None = None
    separator: str | None = None

    def check(self, fields: Sequence[str], needed: Sequence[str]) -> None:
        for name in self.mapping:
            if name not in fields:
                raise OptionsError(explain("--map", expected=f"one of {', '.join(fields)}", got=name, fix="Fix it."))
        for name in needed:
            if name not in self.mapping:
                fix = f"Add --map {name}=COLUMN."
                raise OptionsError(explain("--map", expected=f"a column for {name!r}", got="none", fix=fix))

    @property
    def columns(self) -> list[str]:
        return list(dict.fromkeys(c for value in self.mapping.values() for c in _COLUMN.findall(value) or [value]))

    def rows(self, more: Sequence[str] = ()) -> Iterator[SourceRow]:
        return read_rows(self.source, list(dict.fromkeys((*self.columns, *more))), self.format)

    def value(self, row: SourceRow, name: str) -> Any:
        column = self.mapping.get(name)
        if column is None:
            return None
        if _COLUMN.search(column):
            return _COLUMN.sub(lambda match: _shown(row.values.get(match[1])), column).strip()
        return row.values.get(column)

    def text(self, row: SourceRow, name: str) -> str | None:
        value = self.value(row, name)
        if value is not None and not isinstance(value, str):
            raise InputError(explain(name, expected="text", got=type(value).__name__, fix="Convert the column."))
        return value.strip() or None if value else None

    def id(self, value: object) -> str:
        text = "" if value is None or isinstance(value, bool | float) else str(value).strip()
        if len(text.split()) != 1:
            raise InputError(explain("id", expected="an id without spaces", got=repr(value), fix="Give it one."))
        return text

    def ids(self, row: SourceRow, name: str) -> list[str]:
        return [self.id(value) for value in self.list(row, name)]

    def list(self, row: SourceRow, name: str) -> list[Any]:
        """A list column, or one cell, cut at the separator if there is one."""
        value = self.value(row, name)
        if value is None or isinstance(value, list):
            return value or []
        if self.separator is not None and isinstance(value, str):
            return [part.strip() for part in value.split(self.separator) if part.strip()]
        return [value]


def convert_candidates(
    table: Table, target: Target, pictures: Pictures | None = None, keep: Sequence[str] = (), workers: int = 8
) -> Report:
    """keep: columns that go into `src_content`."""
    table.check(CANDIDATE_FIELDS, ["id"])

    def make(row: SourceRow) -> dict[str, Any]:
        id = table.id(table.value(row, "id"))
        content = _content(table, row, pictures, id)
        kept = {name: row.values.get(name) for name in keep}
        return {
            "did": target.id(id),
            "txt": content.text,
            "img_path": content.image,
            "modality": modality_of(content),
            "src_content": json.dumps(kept, ensure_ascii=False, default=str) if keep else None,
        }

    with output(target, [target.pool]) as (files, skip, report), scratch_table("") as seen:
        seen.execute("CREATE TABLE ids(id TEXT PRIMARY KEY)")
        for row, made in _converted(table.rows(keep), make, skip, workers):
            if not _is_new(seen, made["did"]):
                skip(row, f"id {made['did']!r} a second time")
                continue
            files[0].write(_line(made))
            report.written += 1
            report.notes[f"candidates of modality {made['modality']}"] += 1
    return report


def convert_queries(
    table: Table, target: Target, split: str, pictures: Pictures | None = None, judgements: Table | None = None,
    workers: int = 8,
) -> Report:  # fmt: skip
    """judgements: a table of query, candidate and grade instead of a column `positives`; those of other queries, say of another
        split, are left out and counted

    The candidates come first. Raises `InputError` if more rows of either table are bad than `target` lets pass, or no judgement is of
    one of these queries.
    """
    check_name("--split", split)
    table.check(QUERY_FIELDS, ["id"] if judgements else ["id", "positives"])
    if judgements is not None:
        judgements.check(JUDGEMENT_FIELDS, ["query", "candidate"])
    if not target.pool.is_file():
        fix = "Convert the candidates first."
        raise InputError(explain(str(target.pool), expected="the pool", got="no such file", fix=fix))
    pool = Pool(target.pool, Limits(max_bad_share=target.max_bad_share))
    paths = [target.queries(split), target.qrels(split)]
    with output(target, paths) as (files, skip, report), scratch_table("") as scratch:
        scratch.execute("CREATE TABLE ids(id TEXT PRIMARY KEY)")
        if judgements is not None:
            other = skip.of_another_table()
            strange = _load_judgements(judgements, table, scratch, other)
            report.judgements = other.skipped
            report.judgements.check(judgements.source, target.max_bad_share)
            report.notes["judgements of other queries (left out)"] = strange

        def make(row: SourceRow) -> tuple[dict[str, Any], Content]:
            id = table.id(table.value(row, "id"))
            return {"qid": target.id(id)}, _content(table, row, pictures, id)

        for row, (made, content) in _converted(table.rows(), make, skip, workers):
            try:
                qid = made["qid"].partition(":")[2]
                known = _grades(table, row) if judgements is None else _judged(scratch, qid)
                grades = _in_pool({target.id(d): grade for d, grade in known.items()}, pool, report)
                negatives = _in_pool(dict.fromkeys(map(target.id, table.ids(row, "negatives")), 0), pool, report)
                instruction = table.text(row, "instruction")
            except (InputError, ValueError) as error:
                skip(row, str(error))
                continue
            if not _is_new(scratch, made["qid"]):
                skip(row, f"id {made['qid']!r} a second time")
                continue
            _write_query(files, made["qid"], content, instruction, negatives | grades, pool)
            report.written += 1
            positives = sum(grade > 0 for grade in grades.values())
            report.notes["queries with several positives"] += positives > 1
            report.notes["queries without a positive (they train <|none|>)"] += positives == 0
    return report


def parse_instructions(lines: Sequence[str]) -> dict[tuple[str, str], list[str]]:
    """Lines "text -> image: Find the product."; several of one shape are paraphrases of each other."""
    prompts: dict[tuple[str, str], list[str]] = {}
    for line in lines:
        match = re.fullmatch(r"\s*(\S+)\s*->\s*(\S+?)\s*:\s*(\S.*)", line)
        if match is None or match[1] not in MODALITIES or match[2] not in MODALITIES or "\t" in line:
            expected = '"QUERY -> CANDIDATE: words" with modalities text, image or image,text'
            raise OptionsError(explain("--instruction", expected=expected, got=repr(line), fix="Fix it."))
        prompts.setdefault((match[1], match[2]), []).append(match[3].strip())
    return prompts


def write_instructions(target: Target, prompts: Mapping[tuple[str, str], Sequence[str]]) -> Path:
    """Into the table, in place of what this data set had there for the same modalities."""
    path = target.out / INSTRUCTIONS
    lines = path.read_text("utf-8").splitlines() if path.is_file() else []
    kept = [line for line in lines[1:] if (c := line.split("\t"))[3:4] != [str(target.dataset_id)]
            or (c[0], c[1]) not in prompts]  # fmt: skip
    head = "query_modality\tcand_modality\tdataset_name\tdataset_id\t" + "\t".join(f"prompt_{i}" for i in range(1, 5))
    rows = ["\t".join([*shape, target.name, str(target.dataset_id), *words]) for shape, words in prompts.items()]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join([head, *kept, *rows]) + "\n", "utf-8")
    return path


# -- parts -------------------------------------------------------------------------------------------------------------


def _converted(
    rows: Iterable[SourceRow], make: Callable[[SourceRow], T], skip: Skips, workers: int
) -> Iterator[tuple[SourceRow, T]]:
    """`make` of every row in a few threads (it reads pictures), in the rows' order, never more than a window ahead."""
    waiting: deque[tuple[SourceRow, Future[T]]] = deque()

    def finished() -> Iterator[tuple[SourceRow, T]]:
        row, future = waiting.popleft()
        try:
            yield row, future.result()
        except (RetrvR1Error, OSError) as error:
            skip(row, str(error))

    with ThreadPoolExecutor(workers) as pool:
        for row in counted(rows, "rows"):
            if skip.broken(row):
                continue
            waiting.append((row, pool.submit(make, row)))
            if len(waiting) >= _WINDOW:
                yield from finished()
        while waiting:
            yield from finished()


def _content(table: Table, row: SourceRow, pictures: Pictures | None, id: str) -> Content:
    image = table.value(row, "image")
    if image is not None and pictures is None:
        raise InputError(explain("image", expected="to know where pictures are", got="nothing", fix="Pass --images."))
    return Content(table.text(row, "text"), None if image is None or pictures is None else pictures.save(image, id))


def _grades(table: Table, row: SourceRow) -> dict[str, int]:
    ids = table.ids(row, "positives")
    grades = [_grade(value) for value in table.list(row, "grades")] if "grades" in table.mapping else [1] * len(ids)
    if len(grades) != len(ids):
        raise InputError(explain("grades", expected=f"{len(ids)}, one per positive", got=len(grades), fix="Fix it."))
    return dict(zip(ids, grades, strict=True))


def _load_judgements(judgements: Table, queries: Table, scratch: sqlite3.Connection, skip: Skips) -> int:
    """How many are of queries that are not in their table.

    Raises `InputError` if all are: ids of another kind would train every query on `<|none|>`.
    """
    scratch.execute("CREATE TABLE asked(query TEXT PRIMARY KEY)")
    for row in counted(replace(queries, mapping={"id": queries.mapping["id"]}).rows(), "query ids"):
        with suppress(InputError):  # its row is skipped when it is converted
            scratch.execute("INSERT OR IGNORE INTO asked VALUES (?)", (queries.id(queries.value(row, "id")),))
    scratch.execute("CREATE TABLE judged(query TEXT, candidate TEXT, grade INTEGER)")
    kept, strange, example = 0, 0, ""
    for row in counted(judgements.rows(), "judgements"):
        if skip.broken(row):
            continue
        try:
            grade = _grade(judgements.value(row, "grade")) if "grade" in judgements.mapping else 1
            query, candidate = (judgements.id(judgements.value(row, name)) for name in ("query", "candidate"))
            if scratch.execute("SELECT 1 FROM asked WHERE query = ?", (query,)).fetchone() is None:
                strange += 1
                example = query
                continue
            scratch.execute("INSERT INTO judged VALUES (?, ?, ?)", (query, candidate, grade))
            kept += 1
        except InputError as error:
            skip(row, str(error))
    if strange and not kept:
        got, fix = f"{strange} of others, such as {example!r}", "Fix the ids."
        raise InputError(
            explain(judgements.source, expected=f"judgements of the queries of {queries.source}", got=got, fix=fix)
        )
    scratch.execute("CREATE INDEX by_query ON judged(query)")
    return strange


def _judged(scratch: sqlite3.Connection, qid: str) -> dict[str, int]:
    return dict(scratch.execute("SELECT candidate, grade FROM judged WHERE query = ? ORDER BY rowid", (qid,)))


def _grade(value: object) -> int:
    try:
        number = float(value)  # type: ignore[arg-type]
        if number == int(number) and abs(number) < 1e15:  # a float keeps no more digits, and SQLite hardly more
            return int(number)
    except (TypeError, ValueError, OverflowError):
        pass
    expected = "a whole number of up to 15 digits"
    raise InputError(explain("grade", expected=expected, got=repr(value), fix="Convert the column."))


def _in_pool(grades: Mapping[str, int], pool: Pool, report: Report) -> dict[str, int]:
    """What is in the pool. Raises `InputError` if positives are named and none of them is."""
    kept = {did: grade for did, grade in grades.items() if did in pool}
    report.notes["judged candidates outside the pool (left out)"] += len(grades) - len(kept)
    lost = [did for did, grade in grades.items() if grade > 0]
    if lost and not any(grade > 0 for grade in kept.values()):
        raise InputError(explain("positives", expected="one in the pool", got=", ".join(lost[:3]), fix="Fix the ids."))
    return kept


def _write_query(
    files: Sequence[IO[str]], qid: str, content: Content, instruction: str | None, grades: Mapping[str, int], pool: Pool
) -> None:
    ranked = sorted(grades, key=lambda did: -grades[did])
    positives = [did for did in ranked if grades[did] > 0]
    first = pool.get(positives[0]) if positives else None
    modality = modality_of(content)
    task = -1 if first is None else TASKS.get((modality, modality_of(first)), -1)
    row = {
        "qid": qid,
        "query_txt": content.text,
        "query_img_path": content.image,
        "query_modality": modality,
        "query_src_content": None,
        "pos_cand_list": positives,
        "neg_cand_list": [did for did in ranked if grades[did] <= 0],
        "task_id": task,
    }
    files[0].write(_line(row if instruction is None else {**row, "instruction": instruction}))
    files[1].writelines(f"{qid} 0 {did} {grades[did]} {task}\n" for did in ranked)


def _is_new(table: sqlite3.Connection, id: str) -> bool:
    return table.execute("INSERT OR IGNORE INTO ids VALUES (?)", (id,)).rowcount == 1


def _line(row: Mapping[str, Any]) -> str:
    return json.dumps(row, ensure_ascii=False) + "\n"


def _shown(value: object) -> str:
    return "" if value is None else str(value)
