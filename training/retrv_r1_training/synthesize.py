"""Stage `synthesize`: a teacher writes a thought about every list; what a session replays to a right answer is kept to train on.

Two files in the run's folder: `journal.jsonl`, every answer as it came (all the state there is), and `traces.jsonl`, the admitted ones.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from retrv_r1_retriever.errors import InputError, OptionsError, explain
from retrv_r1_retriever.images import ImageSource
from retrv_r1_retriever.options import RerankOptions
from retrv_r1_retriever.parser import Thought
from retrv_r1_training.admit import rejection
from retrv_r1_training.endpoint import EndpointError, FatalEndpointError
from retrv_r1_training.journal import Entry, Journal
from retrv_r1_training.labelled import LabelledList, ListSource
from retrv_r1_training.traces import TeacherTrace, write_traces


@dataclass(frozen=True, slots=True)
class Cost:
    """Tokens sent and received."""

    tokens_in: int = 0
    tokens_out: int = 0

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.tokens_in + other.tokens_in, self.tokens_out + other.tokens_out)


@dataclass(frozen=True, slots=True)
class Written:
    """One answer of a teacher: a thought, or the reason why its words are none. text: the words as they came"""

    thought: Thought | None = None
    rejected: str | None = None
    text: str = ""
    cost: Cost = Cost()


class Teacher(Protocol):
    """Writes thoughts. `write` raises `EndpointError` where there is no answer at all; nothing is paid for that."""

    @property
    def name(self) -> str: ...

    @property
    def licence(self) -> str: ...

    @property
    def pays(self) -> bool:
        """Whether an answer costs anything: then it is safe on the disk before the next one is asked for."""

    def prompt_hash(self, task: LabelledList) -> str: ...

    def estimate(self, task: LabelledList) -> Cost:
        """What one answer will cost, roughly; opens no picture."""

    async def write(self, task: LabelledList, attempt: int) -> Written: ...


_AS_SERVED = RerankOptions(think="always", timeout_s=None)


@dataclass(frozen=True, slots=True)
class RunOptions:
    """attempts: answers asked for per query until one is admitted; concurrency: queries at a time

    limit: lists taken from the source, None = all; give_up_after: queries in a row without any answer, before the run ends
    replay: budget under which a thought must come to its answer by itself: what the model will be served with
    """

    attempts: int = 2
    concurrency: int = 8
    limit: int | None = None
    give_up_after: int = 20
    replay: RerankOptions = _AS_SERVED

    def __post_init__(self) -> None:
        for name in ("attempts", "concurrency", "give_up_after"):
            if getattr(self, name) < 1:
                raise OptionsError(explain(name, expected="at least 1", got=getattr(self, name), fix="Raise it."))


@dataclass(frozen=True, slots=True)
class Plan:
    """What is left to do. done: queries admitted, or out of attempts; cost: of one answer for each open query"""

    lists: int
    done: int
    cost: Cost

    @property
    def open(self) -> int:
        return self.lists - self.done


@dataclass(slots=True)
class Report:
    """Of one run; counts of former runs on the same folder are in the journal's.

    failed: queries without an answer, by reason; they are asked again by the next run
    """

    answers: int = 0
    admitted: int = 0
    failed: Counter[str] = field(default_factory=Counter)


def plan(teacher: Teacher, source: ListSource, journal: Journal, options: RunOptions) -> Plan:
    """Reads all lists, asks nothing. Raises `InputError` if the journal is of other lists, another prompt or another teacher."""
    lists, done, cost = 0, 0, Cost()
    for task in _tasks(source, options.limit):
        lists += 1
        state = journal.state(task.query_id)
        if state.answers and state.prompt_hash != teacher.prompt_hash(task):
            fix = "Run it with the lists, teacher and options of the first run, or pass another folder."
            got = f"query {task.query_id} of other lists, another prompt or another teacher"
            raise InputError(explain(str(journal.path), expected="answers to these questions", got=got, fix=fix))
        if state.admitted or state.answers >= options.attempts:
            done += 1
        else:
            cost += teacher.estimate(task)
    return Plan(lists, done, cost)


async def synthesize(
    teacher: Teacher,
    source: ListSource,
    journal: Journal,
    images: ImageSource,
    options: RunOptions,
    report: Report,
    progress: Callable[[Report], None] = lambda report: None,
) -> None:
    """Ask until every list has an admitted thought or is out of attempts; `report` counts along and holds when this raises.

    Raises `FatalEndpointError`, or `EndpointError` after `give_up_after` failures in a row; answers on their way are awaited first.
    """
    run = _Run(teacher, journal, images, options, progress, _tasks(source, options.limit), report)
    await asyncio.gather(*(run.work() for _ in range(options.concurrency)))
    if run.stopped is not None:
        raise run.stopped


def save_traces(folder: Path, journal: Journal) -> int:
    """`traces.jsonl` from the journal; returns their number."""
    return write_traces(folder / "traces.jsonl", journal.traces())


@dataclass(slots=True)
class _Run:
    teacher: Teacher
    journal: Journal
    images: ImageSource
    options: RunOptions
    progress: Callable[[Report], None]
    tasks: Iterator[LabelledList]
    report: Report
    failed_in_a_row: int = 0
    stopped: Exception | None = None

    async def work(self) -> None:
        """One of several workers on the same iterator, so that lists are read as they are needed."""
        while self.stopped is None:
            try:
                task = next(self.tasks, None)
                if task is None:
                    return
                await self._settle(task)
            except Exception as error:  # of a data set, a disk or a bug: the others finish what they have paid for
                self.stopped = self.stopped or error
            self.progress(self.report)

    async def _settle(self, task: LabelledList) -> None:
        state = self.journal.state(task.query_id)
        if state.admitted:
            return
        for number in range(state.answers, self.options.attempts):
            try:
                written = await self.teacher.write(task, number)
            except FatalEndpointError:
                raise
            except EndpointError as error:
                self._fail(error)
                return
            self.failed_in_a_row = 0
            entry = await self._entry(task, number, written)
            self.journal.append(entry)
            self.report.answers += 1
            self.report.admitted += entry.trace is not None
            if entry.trace is not None or self.stopped is not None:
                return

    async def _entry(self, task: LabelledList, number: int, written: Written) -> Entry:
        reason, trace, hash = written.rejected, None, self.teacher.prompt_hash(task)
        if written.thought is not None:
            reason = await rejection(written.thought, task, self.options.replay, self.images)
            if reason is None:
                trace = TeacherTrace(
                    task.query_id, task.ids, written.thought, self.teacher.name, self.teacher.licence, hash
                )
        cost = written.cost
        return Entry(task.query_id, number, hash, reason, written.text, cost.tokens_in, cost.tokens_out, trace)

    def _fail(self, error: EndpointError) -> None:
        self.report.failed[error.reason] += 1
        self.failed_in_a_row += 1
        if self.failed_in_a_row >= self.options.give_up_after:
            self.stopped = EndpointError(
                f"{self.failed_in_a_row} queries in a row got no answer; {error}", error.reason
            )


def _tasks(source: ListSource, limit: int | None) -> Iterator[LabelledList]:
    """Raises `InputError` on a second query of the same id: its answers could not be told apart."""
    seen: set[str] = set()
    for number, task in enumerate(source):
        if number == limit:
            return
        if task.query_id in seen:
            raise InputError(
                explain("queries", expected="ids that differ", got=f"{task.query_id} twice", fix="Rename one.")
            )
        seen.add(task.query_id)
        yield task


def describe(plan: Plan, teacher: Teacher, options: RunOptions, prices: tuple[float, float] | None) -> str:
    """The estimate in words. prices: per million tokens in and out, of any currency."""
    lines = [f"{plan.lists} lists, {plan.done} done before, {plan.open} to ask {teacher.name!r} about"]
    if not teacher.pays:
        return lines[0]
    cost = plan.cost
    lines.append(
        f"one answer each: about {cost.tokens_in:,} tokens in, {cost.tokens_out:,} out "
        "(4 characters or 784 pixels a token; an answer as long as asked for)"
    )
    if prices is None:
        lines.append("cost: unknown without --price-in and --price-out")
    else:
        lines.append(f"cost: about {price(cost, prices):.2f}")
    if options.attempts > 1:
        lines.append(f"at most {options.attempts} times that, if every answer is rejected")
    return "\n".join(lines)


def price(cost: Cost, prices: tuple[float, float]) -> float:
    return (cost.tokens_in * prices[0] + cost.tokens_out * prices[1]) / 1e6


def summarise(report: Report, journal: Journal, source: ListSource, retries: Mapping[str, int]) -> dict[str, object]:
    """All counts of a run, for people and for `summary.json`."""
    return {
        "answers_now": report.answers,
        "admitted_now": report.admitted,
        "failed_now": dict(report.failed),
        "retries_now": dict(retries),
        "admitted": journal.admitted,
        "rejected": dict(journal.rejected.most_common()),
        "tokens_in": journal.tokens_in,
        "tokens_out": journal.tokens_out,
        "lists": dict(source.counts),
    }
