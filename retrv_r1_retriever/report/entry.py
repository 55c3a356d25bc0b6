"""One query on the page: what was asked, how the model reasoned, and the list before and after."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from os import PathLike
from pathlib import PurePath

from retrv_r1_retriever.images import is_data_uri
from retrv_r1_retriever.parser import Check, Thought, parse, readable
from retrv_r1_retriever.prompt import KEEP, LABELS
from retrv_r1_retriever.report.markup import EMPTY, Html, html, join
from retrv_r1_retriever.report.pictures import Pictures
from retrv_r1_retriever.trace import ReasoningTrace
from retrv_r1_retriever.types import Query, RankedResult, RankedResults, Status, StopReason

STATUS_WORDS = {
    Status.RERANKED: "reranked by the model",
    Status.PARTIAL: "partly reranked",
    Status.FALLBACK: "not reranked: first-stage order",
}
STOP_WORDS = {
    StopReason.ANSWERED: "answered",
    StopReason.FORCED_BY_BUDGET: "answer forced: budget spent",
    StopReason.CONTEXT_OVERFLOW: "answer forced: context full",
    StopReason.ENGINE_ERROR: "engine failed",
}
VERDICT_WORDS = f"The word beside a candidate is the model's first reason against it; {KEEP} means none was found."
ROWS_SHOWN = 10  # the rest is folded
TEXT_SHOWN = 220  # characters of a candidate's text in a row; the whole text is in its tooltip


@dataclass(frozen=True, slots=True)
class ReportEntry:
    """One query to show.

    kind: what kind of query, e.g. "text → image"
    positives: ids known to be right, if any; marks them and says how the right one moved
    note: a line of the caller's
    """

    results: RankedResults
    kind: str | None = None
    positives: frozenset[str] = frozenset()
    note: str | None = None


def headline(entry: ReportEntry) -> str:
    """What happened, in one sentence."""
    results = entry.results
    if not results.results:
        return f"Nothing to rank: {results.reason or 'no candidates'}"
    if results.status is Status.FALLBACK:
        return f"Not reranked, first-stage order shown: {results.reason or 'no reason given'}"
    opened = len(results.trace.inspected) if results.trace else 0
    effort = f" after opening {opened} candidate{'s' if opened != 1 else ''} in full" if opened else ""
    right = next((r for r in results.results if r.document.id in entry.positives), None)
    if results.none_chosen:
        moved = f". {_rise(right)}" if right else "; its next-best order is shown"
        return f"The model answered that no candidate fits{effort}{moved}."
    if right is not None:
        return f"{_rise(right)}{effort}."
    if entry.positives:
        return f"The right answer is not among the results{effort}."
    selected = results.selected
    if selected is not None:
        return f"Answered with candidate #{selected.candidate.rank}{effort}."
    return f"Reordered{effort}."


def asked(query: Query) -> str:
    """A query in a few words: its text; without one, its picture's file or its id."""
    image = query.content.image
    file = PurePath(image).name if isinstance(image, str | PathLike) and not is_data_uri(str(image)) else None
    return query.content.text or file or query.id or "a picture"


def _rise(right: RankedResult) -> str:
    before, after = right.candidate.rank, right.rank
    if before == after:
        return f"The right answer stayed at rank {after}"
    return f"The right answer {'rose' if after < before else 'fell'} from rank {before} to rank {after}"


def render_entry(entry: ReportEntry, number: int, pictures: Pictures) -> Html:
    return html("<section class='card query' id='q{}'>{}</section>", number, render_body(entry, pictures))


def render_body(entry: ReportEntry, pictures: Pictures, *, brief: bool = False) -> Html:
    """brief: candidates far down the list as a line of text"""
    trace = entry.results.trace
    reasoning = _reasoning(trace, entry, pictures) if trace else EMPTY
    note = html("<p class='note'>{}</p>", entry.note) if entry.note else EMPTY
    return html(
        "{}<p class='outcome'>{}</p>{}<div class='columns'>{}{}</div>{}",
        _question(entry, pictures),
        headline(entry),
        note,
        reasoning,
        _ranking(entry, pictures, brief),
        _cost(trace) if trace else EMPTY,
    )


def _question(entry: ReportEntry, pictures: Pictures) -> Html:
    query = entry.results.query
    picture = pictures.thumbnail(query.content.image, "the query's picture")
    instruction = html("<p class='instruction'>{}</p>", query.instruction) if query.instruction else EMPTY
    words = html("<h2>{}</h2>", query.content.text) if query.content.text else EMPTY
    return html(
        "<div class='question'>{}<div><p class='badges'>{}{}</p>{}{}</div></div>",
        picture,
        html("<span class='kind'>{}</span>", entry.kind) if entry.kind else EMPTY,
        _badges(entry.results),
        instruction,
        words,
    )


def _badges(results: RankedResults) -> Html:
    badges = [html("<span class='badge {}'>{}</span>", results.status.value, STATUS_WORDS[results.status])]
    if results.trace and results.trace.stop_reason:
        stop = results.trace.stop_reason
        badges.append(html("<span class='badge {}'>{}</span>", stop.value, STOP_WORDS[stop]))
    if results.none_chosen:
        badges.append(html("<span class='badge partial'>no candidate fits</span>"))
    if results.unranked:
        badges.append(html("<span class='badge partial'>{} not judged</span>", len(results.unranked)))
    if results.trace and results.trace.cached:
        badges.append(html("<span class='badge'>from the cache</span>"))
    return join(badges)


# -- reasoning ---------------------------------------------------------------------------------------------------------


def _reasoning(trace: ReasoningTrace, entry: ReportEntry, pictures: Pictures) -> Html:
    thought = parse(trace.turn)
    shown = _by_label(trace, entry.results)
    steps = [
        _step("Looks for", html("<p class='hypothesis'>{}</p>", _short(thought.hypothesis)))
        if thought.hypothesis
        else EMPTY,
        _elimination(thought, trace, shown),
        join(_opened(check, shown, pictures) for check in _checks(thought, trace)),
        _answer(trace, entry.results.none_chosen, shown, pictures),
    ]
    raw = html("<details><summary>The model's own words</summary><pre>{}</pre></details>", trace.thought)
    return html(
        "<div class='reasoning'><h3>Reasoning <small>#n is a candidate's first-stage rank</small></h3><ol class='steps'>{}</ol>{}</div>",
        join(steps),
        raw if thought.hypothesis or thought.verdicts or thought.checks else EMPTY,
    )


def _step(name: str, body: Html, css_class: str = "") -> Html:
    return html("<li class='{}'><h4>{}</h4>{}</li>", css_class, name, body)


def _by_label(trace: ReasoningTrace, results: RankedResults) -> Mapping[int, RankedResult]:
    """Label index -> result. Labels count only the candidates in the prompt; those cut by `top_n` are missing."""
    labels = {id: index for index, id in reversed(list(enumerate(trace.candidates)))}
    if not labels:  # a trace of other making: labels in first-stage order
        return {result.candidate.rank - 1: result for result in results.results}
    return {labels[r.document.id]: r for r in results.results if r.document.id in labels}


def _name(index: int, shown: Mapping[int, RankedResult]) -> str:
    """A candidate by its first-stage rank, the number a reader sees in the list."""
    return f"#{shown[index].candidate.rank}" if index in shown else f"#{index + 1}"


def _elimination(thought: Thought, trace: ReasoningTrace, shown: Mapping[int, RankedResult]) -> Html:
    count = len(trace.candidates) or len(LABELS)
    verdicts = [v for v in thought.verdicts if v.index < count and v.text]  # the others are counted below
    if not verdicts:
        return EMPTY
    chips = []
    for verdict in verdicts:
        css_class = "keep" if verdict.text == KEEP else "out"
        opened = html("<i title='opened in full'>◉</i>") if verdict.index in trace.inspected else EMPTY
        chips.append(
            html(
                "<span class='chip {}'><b>{}</b> {} {}</span>",
                css_class,
                _name(verdict.index, shown),
                verdict.text,
                opened,
            )
        )
    kept = sum(v.text == KEEP for v in verdicts)
    name = f"Eliminates {len(verdicts) - kept} of {len(verdicts)} from their compressed tokens"
    legend = html("<p class='note'>{}</p>", VERDICT_WORDS) if kept < len(verdicts) else EMPTY
    return _step(name, html("<p class='chips'>{}</p>{}", join(chips), legend))


def _checks(thought: Thought, trace: ReasoningTrace) -> list[Check]:
    """One per opened candidate, in order; a thought cut short has no words for the last one."""
    checks = {check.index: check for check in thought.checks}
    return [checks.get(index, Check(index, "")) for index in trace.inspected]


def _opened(check: Check, shown: Mapping[int, RankedResult], pictures: Pictures) -> Html:
    word, css_class = {True: ("match", "match"), False: ("differs", "differs"), None: ("undecided", "")}[check.match]
    picture = _content(check.index, shown, pictures)
    body = html(
        "<div class='inspection'>{}<div><span class='verdict {}'>{}</span><p class='check'>{}</p></div></div>",
        picture,
        css_class,
        word,
        _short(readable(check.text, lambda index: _name(index, shown))) or "no words were written",
    )
    return _step(f"◉ Opens {_name(check.index, shown)} in full", body, f"opened {css_class}")


def _answer(trace: ReasoningTrace, none_chosen: bool, shown: Mapping[int, RankedResult], pictures: Pictures) -> Html:
    if trace.answer is None or trace.answer >= len(LABELS):
        words = "No candidate fits." if none_chosen else "No answer was given."
        return _step("Answers", html("<p>{}</p>", words), "answer")
    picture = _content(trace.answer, shown, pictures)
    body = html("<div class='inspection'>{}<p><b>{}</b> is the one.</p></div>", picture, _name(trace.answer, shown))
    return _step("Answers", body, "answer")


def _content(index: int, shown: Mapping[int, RankedResult], pictures: Pictures) -> Html:
    if index not in shown:
        return EMPTY
    content = shown[index].document.content
    picture = pictures.thumbnail(content.image, f"candidate {_name(index, shown)}")
    return picture or html("<p class='quote'>{}</p>", _short(content.text or "no picture to show"))


# -- ranking -----------------------------------------------------------------------------------------------------------


def _ranking(entry: ReportEntry, pictures: Pictures, brief: bool) -> Html:
    top, rest = entry.results.results[:ROWS_SHOWN], entry.results.results[ROWS_SHOWN:]
    if brief:
        folded = html(
            "<p class='rest'>{}</p>", " · ".join(f"{r.rank} {r.document.id} (was {r.candidate.rank})" for r in rest)
        )
    else:
        folded = html("<ol class='rows'>{}</ol>", join(_row(result, entry, pictures) for result in rest))
    return html(
        "<div class='ranking'><h3>Ranked list</h3><ol class='rows'>{}</ol>{}</div>",
        join(_row(result, entry, pictures) for result in top),
        html("<details><summary>{} more</summary>{}</details>", len(rest), folded) if rest else EMPTY,
    )


def _row(result: RankedResult, entry: ReportEntry, pictures: Pictures) -> Html:
    content = result.document.content
    marks = ["selected"] if result.selected else []
    right = result.document.id in entry.positives
    text = html("<p class='text' title='{}'>{}</p>", content.text, _short(content.text)) if content.text else EMPTY
    return html(
        "<li class='{}'><span class='rank'>{}</span>{}<div class='what'>{}<p class='id'>{}</p><p class='chips'>{}</p></div>"
        "<div class='scores'>{}{}</div></li>",
        " ".join(marks),
        result.rank,
        pictures.thumbnail(content.image, f"candidate {result.candidate.rank}"),
        text,
        result.document.id,
        _chips(result, right),
        _movement(result),
        _scores(result),
    )


def _chips(result: RankedResult, right: bool) -> Html:
    signals = result.signals
    chips = [html("<span class='chip right'>✓ right answer</span>")] if right else []
    if result.selected:
        chips.append(html("<span class='chip chosen'>chosen</span>"))
    if signals.opened:
        word = {True: "opened: match", False: "opened: differs", None: "opened"}[signals.match]
        chips.append(html("<span class='chip opened'>◉ {}</span>", word))
    elif signals.verdict:
        css_class = "keep" if signals.verdict == KEEP else "out"
        chips.append(html("<span class='chip {}'>{}</span>", css_class, signals.verdict))
    if signals.keep_logprob is not None:
        chips.append(html("<span class='p'>p(keep) {}</span>", f"{math.exp(min(0.0, signals.keep_logprob)):.3f}"))
    return join(chips)


def _movement(result: RankedResult) -> Html:
    before, after = result.candidate.rank, result.rank
    if before == after:
        return html("<span class='move same'><small>stayed</small></span>")
    css_class, arrow = ("up", "▲") if after < before else ("down", "▼")
    return html(
        "<span class='move {}'>{} {}<small>was {}</small></span>", css_class, arrow, abs(before - after), before
    )


def _scores(result: RankedResult) -> Html:
    retrieval = "–" if result.retrieval_score is None else f"{result.retrieval_score:.3f}"
    if result.score is None:
        return html("<span class='score'><small>retrieval</small> {}</span>", retrieval)
    return html(
        "<span class='score'><span class='bar'><i style='width:{}%'></i></span>{} <small>retrieval {}</small></span>",
        f"{100 * result.score:.0f}", f"{result.score:.3f}", retrieval,
    )  # fmt: skip


def _short(text: str) -> str:
    return text if len(text) <= TEXT_SHOWN else text[: TEXT_SHOWN - 1].rstrip() + "…"


# -- cost --------------------------------------------------------------------------------------------------------------


def _cost(trace: ReasoningTrace) -> Html:
    usage = trace.usage
    parts = []
    if usage.uncompressed_tokens:
        share = min(1.0, usage.prompt_tokens / usage.uncompressed_tokens)
        parts.append(
            html(
                "<div class='tokens'><p><b>{}</b> prompt tokens instead of <b>{}</b> with every candidate in full</p>"
                "<span class='bar'><i style='width:{}%'></i></span></div>",
                f"{usage.prompt_tokens:,}",
                f"{usage.uncompressed_tokens:,}",
                f"{100 * share:.1f}",
            )
        )
    counts = [
        ("written", usage.sampled_tokens),
        ("opened in full", usage.inspected_tokens),
        ("refused inspections", usage.refused_inspections),
        ("verdicts on unknown labels", usage.unknown_labels),
        ("candidates without a verdict", usage.without_verdict),
    ]
    facts = [html("<span>{} <b>{}</b></span>", f"tokens {name}", f"{value:,}") for name, value in counts[:2] if value]
    facts += [html("<span>{} <b>{}</b></span>", name, value) for name, value in counts[2:] if value]
    facts += [html("<span>{} <b>{} ms</b></span>", name, f"{1000 * s:.1f}") for name, s in _stages(trace.timings)]
    notes = join(html("<p class='note'>{}</p>", note) for note in trace.notes)
    return html("<div class='cost'>{}<p class='facts'>{}</p>{}</div>", join(parts), join(facts), notes)


def _stages(timings: Mapping[str, float]) -> list[tuple[str, float]]:
    """In the order of the pipeline, the sum last."""
    place = {"first_stage": -1, "total": 1}
    ordered = sorted(timings.items(), key=lambda item: place.get(item[0], 0))
    return [(name.replace("_", " "), seconds) for name, seconds in ordered]
