"""Scores of M-BEIR task runs, and an average only where all sixteen are whole."""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from retrv_r1_retriever.errors import InputError, explain
from retrv_r1_retriever.evaluation.benchmark import DEPTH, TASKS, TaskRun
from retrv_r1_retriever.evaluation.mbeir import JudgedQuery, Pool
from retrv_r1_retriever.evaluation.records import LostBy, lost_by

FIRST_STAGE = "first stage"
#: Recall of the first stage is reported at these too: no reranking of K candidates can find more.
CEILINGS = (10, 20, 50, 100, DEPTH)


@dataclass(frozen=True, slots=True)
class SystemScore:
    """One system on one task. recall: k -> share of queries with a right answer among the first k

    lost: step -> queries without one among the first `headline`; of the first stage alone, empty
    """

    recall: Mapping[int, float]
    mrr: float
    lost: Mapping[str, int]
    statuses: Mapping[str, int]


@dataclass(frozen=True, slots=True)
class TaskScore:
    """systems: `first stage` and every mode; problems: why these numbers are not those of the whole task."""

    task: str
    title: str
    headline: int
    queries: int
    systems: Mapping[str, SystemScore]
    problems: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class BenchmarkScore:
    """tasks: in the papers' column order; absent: task -> missing files

    average: system -> mean of the sixteen headline recalls, None while anything is missing
    """

    tasks: tuple[TaskScore, ...]
    absent: Mapping[str, Sequence[str]]

    @property
    def complete(self) -> bool:
        return len(self.tasks) == len(TASKS) and not any(task.problems for task in self.tasks)

    @property
    def systems(self) -> list[str]:
        return list(self.tasks[0].systems) if self.tasks else []

    @property
    def average(self) -> dict[str, float | None]:
        return {
            name: math.fsum(t.systems[name].recall[t.headline] for t in self.tasks) / len(TASKS)
            if self.complete
            else None
            for name in self.systems
        }


def score(run: TaskRun) -> TaskScore:
    """A query that was skipped counts as a miss, and is a problem."""
    task, problems = run.task, list(dict.fromkeys(run.skipped))  # a picture is missed once in every mode
    positives = _positives(run, problems)
    ks = sorted({*task.cuts, *CEILINGS})
    found = ((row["query"], [id for id, _ in row["ranked"]]) for row in run.first_stage.rows())
    systems = {FIRST_STAGE: _system(found, positives, ks, {}, {})}
    for mode, journal in run.rerankings.items():
        lost: Counter[str] = Counter()
        statuses: Counter[str] = Counter()
        for record in run.records(mode):
            step = lost_by(record, _known(positives, record.query, str(journal.path)), task.headline)
            lost.update([step.value] if step else [])
            statuses[record.status.value] += 1
        after = ((record.query, record.reranked) for record in run.records(mode))
        steps = {step.value: lost[step.value] for step in LostBy}
        systems[mode] = _system(after, positives, list(task.cuts), steps, dict(statuses))
        missing = len(positives) - sum(statuses.values()) - len(run.skipped)
        if missing > 0:
            problems.append(f"{mode}: {missing} queries are not reranked yet")
    return TaskScore(task.name, task.title, task.headline, len(positives), systems, tuple(problems))


def _positives(run: TaskRun, problems: list[str]) -> dict[str, frozenset[str]]:
    """Query -> right answers. What keeps the data from being the task's goes to the problems."""
    data, positives = run.data, {}
    assert data.qrels is not None  # every task has its file
    for number in range(len(data)):
        judged = data.query(number, random.Random(0))
        positives[judged.id] = frozenset(judged.grades)
        if judged.query.instruction is None:
            problems.append(f"query {judged.id}: no instruction for {judged.modality} → {data.sought} of its data set")
        if not data.qrels.grades(judged.id):
            problems.append(f"query {judged.id}: not in the qrels; the positives of its own row count")
        if not judged.grades:
            problems.append(f"query {judged.id}: no right answer in the qrels")
        elif missing := _missing(judged, data.pool, whole=run.pool == "global"):
            words = f"{len(missing)} of {len(judged.grades)} of its right answers are not in the pool ({missing[0]})"
            problems.append(f"query {judged.id}: {words}")
    unasked = (qid for qid in data.qrels.lines.distinct_keys() if qid not in positives)
    problems.extend(f"query {qid}: in the qrels, but not among the queries" for qid in unasked)
    skipped = {"queries": data.queries.lines.skipped, "qrels": data.qrels.lines.skipped, "pool": data.pool.lines.skipped,
               "instructions": data.instructions.skipped}  # fmt: skip
    problems.extend(f"{name}: {s.count} bad rows left out; {s.examples[0]}" for name, s in skipped.items() if s.count)
    return positives


def _missing(judged: JudgedQuery, pool: Pool, *, whole: bool) -> list[str]:
    """Right answers that the pool should have. Only the whole pool has those of other data sets, unless there are no others."""
    missing = [did for did in judged.grades if did not in pool]
    own = [did for did in missing if did.partition(":")[0] == judged.id.partition(":")[0]]
    return missing if whole or len(missing) == len(judged.grades) else own


def _system(
    lists: Iterable[tuple[str, Sequence[str]]],
    positives: Mapping[str, frozenset[str]],
    ks: Sequence[int],
    lost: Mapping[str, int],
    statuses: Mapping[str, int],
) -> SystemScore:
    """Only the place of the first right answer is kept of each list: there may be tens of thousands."""
    places = []
    for query, ids in lists:
        right = _known(positives, query, "list")
        places.append(next((place for place, id in enumerate(dict.fromkeys(ids), 1) if id in right), math.inf))
    recall = {k: sum(place <= k for place in places) / len(positives) for k in ks}
    return SystemScore(recall, math.fsum(1 / place for place in places) / len(positives), lost, statuses)


def _known(positives: Mapping[str, frozenset[str]], query: str, where: str) -> frozenset[str]:
    if query not in positives:
        fix = "Delete the file: it is of other queries."
        raise InputError(explain(where, expected="queries of the task", got=repr(query), fix=fix))
    return positives[query]
