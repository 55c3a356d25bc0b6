"""What an evaluation of your own queries comes to: tables, sentences, JSON and the page."""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from retrv_r1_retriever.cli.terminal import print_table, print_wrapped, printable
from retrv_r1_retriever.evaluation.measure import Measured
from retrv_r1_retriever.evaluation.metrics import Qrels
from retrv_r1_retriever.evaluation.records import Effort, LostBy, Price, Record, Summary, effort, percentiles, summarise
from retrv_r1_retriever.images import ImageSource
from retrv_r1_retriever.report import ReportTable

NAMED = 10  # of what is missing
REASONS = 3  # of fallbacks, the most frequent first
METRICS = ("recall@1", "recall@5", "recall@10", "mrr@10", "ndcg@10")  # the last one is tested for significance
DEPTH = 10  # the deepest cut among them
LATENCY_NOTE = "p50 and p95 are seconds per query, first stage included"


@dataclass(frozen=True, slots=True)
class Gaps:
    """What the figures leave out, or count as not found.

    missing_positives, outside_filter: right answers that no search can find; no_match: said where nothing matches the filter
    unasked_queries: judged, but not in the file of queries; unreadable_queries: id -> why
    """

    missing_positives: Sequence[str]
    outside_filter: Sequence[str]
    no_match: str | None
    unjudged_queries: int
    unasked_queries: Sequence[str]
    queries_not_in_run: int
    unreadable_queries: Mapping[str, str]

    def sentences(self, args: argparse.Namespace, total: int) -> Iterator[str]:
        """Nothing where nothing is amiss."""
        if missing := self.missing_positives:
            yield f"right answers that are not in the store, so that no search can find them: {_counted(missing, ', ')}"
        if self.no_match:
            yield self.no_match
        if outside := self.outside_filter:
            yield f"right answers outside the filter, so that no search can find them: {_counted(outside, ', ')}"
        if self.unjudged_queries:
            yield f"queries without a right answer in {args.qrels}, left out: {self.unjudged_queries}"
        if unasked := self.unasked_queries:
            yield f"in {args.qrels}, but not among the queries of {args.file}, left out: {_counted(unasked, ', ')}"
        if self.queries_not_in_run:
            lacking = f"{self.queries_not_in_run} of {total}"
            yield f"queries that {args.from_run} does not have: {lacking}; they count as not found"
        if unreadable := [f"{id}: {why}" for id, why in self.unreadable_queries.items()]:
            yield f"queries whose picture cannot be read, left out: {_counted(unreadable, ' ')}"


def _counted(items: Sequence[str], between: str) -> str:
    more = f" and {len(items) - NAMED} more" if len(items) > NAMED else ""
    return f"{len(items)} ({between.join(items[:NAMED])}{more})"


@dataclass(frozen=True, slots=True)
class Outcome:
    """summaries, efforts, words: by mode; no summaries without right answers."""

    measured: Measured
    summaries: Mapping[str, Summary]
    efforts: Mapping[str, Effort]
    words: Mapping[str, str]

    @classmethod
    def of(cls, measured: Measured, qrels: Qrels | None, price: Price | None) -> Outcome:
        judged = {id: grades for id, grades in (qrels or {}).items() if id not in measured.unreadable}
        summaries = {name: summarise(records, judged, METRICS) for name, records in measured.records.items() if qrels}
        words = {
            name: verdict(summaries[name]) if qrels else _disagreement(records)
            for name, records in measured.records.items()
        }
        return cls(
            measured, summaries, {name: effort(records, price) for name, records in measured.records.items()}, words
        )

    def sentences(self) -> Iterator[str]:
        """Of each mode: what it changed, how many queries were reranked, and what all its traces note."""
        for name, words in self.words.items():
            took, total = self.efforts[name], len(self.measured.records[name])
            yield f"{name}: {words} {', '.join(f'{count} {status}' for status, count in took.statuses.items())}."
            if reasons := [
                f"{count}: {reason}" for reason, count in self.measured.fallbacks[name].most_common(REASONS)
            ]:
                yield f"{name}: why the model ranked nothing, for {'; for '.join(reasons)}"
            if took.timed < total:
                yield f"{name}: p50 and p95 are over {took.timed} of {total} queries: the others had no candidates."
            if took.counted < total:
                counted = f"{took.counted} of {total} queries"
                yield f"{name}: opened and tokens are over {counted}: a fallback or a thought cut off leaves no count."
            yield from (f"note: {note}" for note in self.measured.notes[name])

    def tables(self) -> list[ReportTable]:
        """Quality beside effort; with right answers also who lost the others."""
        header = ("", *(map(_short, METRICS) if self.summaries else ()), "opened", "p50", "p95", "tokens in", "out")
        rows = []
        if self.summaries:  # one list was fetched for all modes
            found = next(iter(self.summaries.values())).first_stage
            rows.append(
                ("first stage", *_numbers(found.values()), "", *_numbers(percentiles(self.measured.seconds)), "", "")
            )
        for name, one in self.efforts.items():
            quality = self.summaries[name].reranked.values() if self.summaries else ()
            tokens = _numbers((one.tokens_in, one.tokens_out), "{:,.0f}")
            rows.append(
                (name, *_numbers(quality), *_numbers([one.opened], "{:.2f}"), *_numbers((one.p50, one.p95)), *tokens)
            )
        if any(one.cost is not None for one in self.efforts.values()):
            costs = ["", *_numbers((one.cost for one in self.efforts.values()), "{:,.2f}")][-len(rows) :]
            header, rows = (*header, "per 1,000"), [(*row, cost) for row, cost in zip(rows, costs, strict=True)]
        queries = f"{len(self.measured.seconds)} queries" + ("" if self.summaries else " without right answers")
        tables = [ReportTable(queries, header, tuple(rows))]
        if self.summaries:
            lost = [
                (name, f"{s.ceiling:.3f}", f"{s.reranked['recall@1']:.3f}", *map(str, s.lost.values()))
                for name, s in self.summaries.items()
            ]
            lost_header = ("", "R@K found", "R@1 final", *(step.value for step in LostBy))
            tables.append(ReportTable("Who lost the queries whose first place is wrong", lost_header, tuple(lost)))
        return tables


def print_outcome(outcome: Outcome, notes: Sequence[str], settings: Mapping[str, Any]) -> None:
    for table in outcome.tables():
        print(f"{table.caption}\n")
        print_table(table.header, table.rows, indent="  ")
        print()
    print_wrapped(f"{LATENCY_NOTE}, {settings['concurrency']} at a time.")
    for line in notes:
        print_wrapped(printable(line))
    known = (f"{name.replace('_', ' ')} {_plain(v)}" for name, v in settings.items() if not isinstance(v, Mapping))
    print_wrapped(printable(f"configuration: {', '.join(known)}"))


def _numbers(values: Iterable[float | None], form: str = "{:.3f}") -> tuple[str, ...]:
    """With a dash for what was not measured."""
    return tuple("–" if value is None else form.format(value) for value in values)


def _short(metric: str) -> str:
    return metric.replace("recall", "R").replace("ndcg", "nDCG").replace("mrr", "MRR")


def verdict(summary: Summary) -> str:
    """What reranking did to the first places, and whether the gain is more than chance, in a few sentences."""
    before, after = summary.first_stage["recall@1"], summary.reranked["recall@1"]
    moved = f"first place: {summary.rescued} rescued by reranking, {summary.spoiled} lost."
    gain, metric = summary.gain.difference, list(summary.reranked)[-1]
    moved += f" {_short(metric)} {gain.mean:+.3f} (95 % interval {gain.low:+.3f} to {gain.high:+.3f}, p = {summary.gain.p:.4f})."
    if after >= before:
        return moved
    return f"{moved} Reranking LOWERED R@1, from {before:.3f} to {after:.3f}: here the first stage alone is better."


def _disagreement(records: Sequence[Record]) -> str:
    moved = sum(r.before[:1] != r.after[:1] for r in records)
    return f"another first place than the first stage for {moved} of {len(records)} queries."


def outcome_json(outcome: Outcome, settings: Mapping[str, Any]) -> dict[str, Any]:
    measured = outcome.measured
    modes = {
        name: {
            **(asdict(outcome.summaries[name]) if outcome.summaries else {}),
            **asdict(one),
            "first_place_changed": sum(r.before[:1] != r.after[:1] for r in measured.records[name]),
            "fallback_reasons": measured.fallbacks[name],
            "notes": measured.notes[name],
        }
        for name, one in outcome.efforts.items()
    }
    return {"queries": len(measured.seconds), "configuration": settings, "modes": modes}


def write_page(
    outcome: Outcome, notes: Sequence[str], settings: Mapping[str, Any], images: ImageSource, path: Path
) -> None:
    from retrv_r1_retriever.report import ReportEntry, write_report

    shown = sorted(
        (one for kept in outcome.measured.shown.values() for one in kept), key=lambda one: (one.mode, one.kind)
    )
    entries = [ReportEntry(s.results, kind=f"{s.mode}: {s.kind}", positives=s.positives) for s in shown]
    first, *rest = outcome.tables()
    intro = (
        f"First stage: {settings['first_stage']}; fusion: none; {LATENCY_NOTE}, {settings['concurrency']} at a time. "
        f"Below: queries that a mode changed or left wrong, at most {outcome.measured.limit} of a kind."
    )
    tables = [replace(first, note="\n".join(notes)), *rest, configuration_table(settings)]
    write_report(path, entries, title="Evaluation", intro=intro, tables=tables, images=images, tiles=False)


def configuration_table(settings: Mapping[str, Any]) -> ReportTable:
    """What the numbers on a page depend on, a line each."""
    rows = [(name.replace("_", " "), value) for name, value in settings.items() if not isinstance(value, Mapping)]
    nested = [(f"{name.replace('_', ' ')}: {key}", v) for name, value in settings.items() if isinstance(value, Mapping)
              for key, v in value.items()]  # fmt: skip
    return ReportTable("Configuration", ("", ""), tuple((name, _plain(value)) for name, value in (*rows, *nested)))


def _plain(value: object) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{name}={_plain(inner)}" for name, inner in value.items())
    if isinstance(value, list):
        return " and ".join(map(_plain, value)) or "none"
    return (
        {True: "yes", False: "no", None: "none"}.get(value, str(value))
        if isinstance(value, bool | None)
        else str(value)
    )
