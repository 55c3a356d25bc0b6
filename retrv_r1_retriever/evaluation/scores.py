"""Scores of M-BEIR task runs, and an average only where all sixteen are whole."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from retrv_r1_retriever.errors import InputError, explain
from retrv_r1_retriever.evaluation.benchmark import DEPTH, TASKS, TaskRun
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
    task, problems = run.task, list(run.skipped)
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
    """Query -> right answers; those with none, or none in the pool, go to the problems."""
    positives = {}
    for number in range(len(run.data)):
        judged = run.data.graded(run.data.queries[number])
        positives[judged.id] = frozenset(judged.grades)
        if run.data.qrels is not None and not run.data.qrels.grades(judged.id):
            problems.append(f"query {judged.id}: not in the qrels; the positives of its own row count")
        if not judged.grades:
            problems.append(f"query {judged.id}: no right answer in the qrels")
        elif not any(id in run.data.pool for id in judged.grades):
            problems.append(f"query {judged.id}: its right answers are not in the pool ({next(iter(judged.grades))})")
    for name, lines in (("queries", run.data.queries.lines), ("pool", run.data.pool.lines)):
        if lines.skipped.count:
            problems.append(f"{name}: {lines.skipped.count} bad rows left out; {lines.skipped.examples[0]}")
    return positives


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
