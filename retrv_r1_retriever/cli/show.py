"""Ranked results on a terminal."""

from __future__ import annotations

from retrv_r1_retriever.cli.terminal import one_line, print_table, print_wrapped, printable, terminal_width
from retrv_r1_retriever.images import is_data_uri
from retrv_r1_retriever.parser import parse, readable
from retrv_r1_retriever.prompt import KEEP, LABELS
from retrv_r1_retriever.trace import ReasoningTrace
from retrv_r1_retriever.types import Content, RankedResult, RankedResults, Status

OPENED = "◉"
CHOSEN = "★"
VERDICTS = "verdict: keep, or the model's first reason against it; for an opened candidate whether it is a match"
CHECK_SHOWN = 240  # characters; --json has them all


def print_results(results: RankedResults, *, limit: int | None = None, positives: frozenset[str] = frozenset()) -> None:
    """Status, ranked table, reasoning, notes."""
    if not results.results:
        print_wrapped(printable(results.reason or "no candidates"))
        return
    for line in status_line(results).splitlines():
        print_wrapped(line)
    print()
    _print_ranking(results, limit, positives)
    if results.trace is not None:
        _print_reasoning(results, results.trace)
        for note in results.trace.notes:
            _paragraph("note", note)


def status_line(results: RankedResults) -> str:
    """Who decided, at what cost; on lines of their own what the thought left out, that none fits, and the reason."""
    line = f"{results.status.value}"
    trace = results.trace
    if trace is not None:
        if trace.stop_reason is not None:
            line += f", {trace.stop_reason.value.replace('_', ' ')}"
        line += f", {len(trace.inspected)} of {len(trace.candidates)} opened"
        if trace.usage.uncompressed_tokens:
            line += f", {trace.usage.prompt_tokens:,} prompt tokens (all in full: {trace.usage.uncompressed_tokens:,})"
        if "total" in trace.timings:
            line += f", {1000 * trace.timings['total']:.0f} ms in all"
        if left_out := _left_out(trace):
            line += f"\n{left_out}"
    if results.none_chosen:
        line += "\nThe model answers that no candidate fits; this is its next-best order."
    if results.reason:
        line += f"\n{'NOT RERANKED: ' if results.status is Status.FALLBACK else ''}{printable(results.reason)}"
    return line


def _left_out(trace: ReasoningTrace) -> str:
    usage = trace.usage
    counts = (
        ("inspections refused", usage.refused_inspections, ""),
        ("verdicts on labels that no candidate has", usage.unknown_labels, ""),
        ("candidates without a verdict", usage.without_verdict, f" of {len(trace.candidates)}"),
    )
    return ", ".join(f"{what}: {count}{of}" for what, count, of in counts if count)


def describe(content: Content) -> str:
    """A candidate or query in a few words: its text, and its picture's path if it has one."""
    picture = ""
    if isinstance(content.image, str) and not is_data_uri(content.image):
        picture = f"[{content.image}]"
    elif content.image is not None:
        picture = "[picture]"
    return " ".join(part for part in (content.text, picture) if part)


def _print_ranking(results: RankedResults, limit: int | None, positives: frozenset[str]) -> None:
    narrow = terminal_width() < 72
    header = ["rank", "was", "score", "retrieval", "verdict", "", "document"]
    rows = [_row(r, positives) for r in results.results[:limit]]
    if narrow:  # the two that the status line and the report can stand in for
        header = [header[i] for i in (0, 1, 2, 5, 6)]
        rows = [[row[i] for i in (0, 1, 2, 5, 6)] for row in rows]
    print_table(header, rows)
    hidden = len(results.results) - len(rows)
    if hidden > 0:
        print(f"... and {hidden} more")
    marks = [f"{CHOSEN} chosen", f"{OPENED} opened in full"] + (["✓ right answer"] if positives else [])
    print_wrapped("   ".join(marks))
    if not narrow and any(r.signals.verdict for r in results.results[:limit]):
        print_wrapped(VERDICTS)


def _row(result: RankedResult, positives: frozenset[str]) -> list[str]:
    before, after = result.candidate.rank, result.rank
    arrow = "↑" if after < before else "↓" if after > before else " "
    marks = (CHOSEN if result.selected else "") + (OPENED if result.signals.opened else "")
    marks += "✓" if result.document.id in positives else ""
    return [
        f"{after}",
        f"{before}{arrow}",
        "–" if result.score is None else f"{result.score:.3f}",
        "–" if result.retrieval_score is None else f"{result.retrieval_score:.3f}",
        one_line(_verdict(result), 20),
        marks,
        f"{result.document.id}  {describe(result.document.content)}",
    ]


def _verdict(result: RankedResult) -> str:
    if result.signals.opened and result.signals.match is not None:
        return "match" if result.signals.match else "differs"
    return result.signals.verdict or ""


def _print_reasoning(results: RankedResults, trace: ReasoningTrace) -> None:
    """The thought in plain words; `#n` is a candidate's first-stage rank."""
    thought = parse(trace.turn)
    if not (thought.hypothesis or thought.verdicts or trace.inspected):
        return
    ranks = {r.document.id: r.candidate.rank for r in results.results}
    names = {i: f"#{ranks.get(id, i + 1)}" for i, id in enumerate(trace.candidates)}
    known = [v for v in thought.verdicts if v.index in names and v.text]  # the others: see the status line
    kept = [names[v.index] for v in known if v.text == KEEP]
    out = [f"{names[v.index]} {v.text}" for v in known if v.text != KEEP]
    checks = {c.index: c for c in thought.checks}
    print("\nreasoning (#n: rank before)")
    _paragraph("looks for", thought.hypothesis)
    _paragraph("keeps", ", ".join(kept))
    _paragraph("rejects", ", ".join(out))
    for index in trace.inspected:
        words = readable(checks[index].text, lambda i: names.get(i, "?")) if index in checks else ""
        _paragraph(f"opens {names.get(index, '?')}", one_line(words, CHECK_SHOWN) or "(no words)")
    if trace.answer is not None and trace.answer < len(LABELS):
        _paragraph("answers", names.get(trace.answer, "?"))
    else:
        _paragraph("answers", "no candidate fits" if results.none_chosen else "")


def _paragraph(name: str, words: str) -> None:
    if words := " ".join(printable(words).split()):
        print_wrapped(f"  {name:<10}  {words}", indent=14)
