"""A page of many queries: each one folded to a line, found by words and by what happened.

Everything is in the page; a script of its own hides, counts, and shows the pictures of a query that is opened.
"""

from __future__ import annotations

import base64
import hashlib
from collections import Counter
from collections.abc import Callable, Sequence
from importlib import resources

from retrv_r1_retriever.report.entry import STATUS_WORDS, STOP_WORDS, ReportEntry, asked, headline, render_body
from retrv_r1_retriever.report.markup import EMPTY, Html, html, join
from retrv_r1_retriever.report.pictures import Pictures
from retrv_r1_retriever.types import RankedResults, Status, StopReason

#: Queries from which on a page is folded: fewer can be scrolled through.
MANY = 12
_CHANGES = {
    "first": "first place changed by reranking",
    "same": "first place as retrieved",
    "overruled": "thought overruled the direct read",
    "none": "no candidate fits",
    "cached": "answered from the cache",
}


def render_many(entries: Sequence[ReportEntry], pictures: Pictures) -> Html:
    rows = [_row(entry, number, pictures) for number, entry in enumerate(entries, 1)]
    return html(
        "{}<div class='many'>{}</div><p class='card nothing' hidden>No query here fits these filters.</p>",
        _filters(entries),
        join(rows),
    )


def script() -> Html:
    return Html((resources.files("retrv_r1_retriever.report") / "report.js").read_text(encoding="utf-8"))


def policy(code: Html | None) -> Html:
    """A content security policy: nothing from outside, and no script but this one, whatever a trace holds."""
    digest = base64.b64encode(hashlib.sha256(code.encode("utf-8")).digest()).decode("ascii") if code else None
    scripts = f"'sha256-{digest}'" if digest else "'none'"
    words = f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src {scripts}"
    return html("<meta http-equiv='Content-Security-Policy' content=\"{}\">", Html(words))


def changes(results: RankedResults) -> tuple[str, ...]:
    """Where first stage, direct read and answer disagree, and other things to filter by; keys of `_CHANGES`."""
    found = []
    if results.results and results.status is not Status.FALLBACK:
        found.append("same" if results.results[0].candidate.rank == 1 else "first")
    read = [r for r in results.results if r.signals.slot_logprob is not None]
    if read and results.trace and "think" in results.trace.timings:
        favourite = max(read, key=lambda r: r.signals.slot_logprob or 0.0)
        found += [] if favourite.selected else ["overruled"]
    found += ["none"] if results.none_chosen else []
    return (*found, "cached") if results.trace and results.trace.cached else tuple(found)


def _row(entry: ReportEntry, number: int, pictures: Pictures) -> Html:
    results = entry.results
    return html(
        "<section class='card query' id='q{}' data-status='{}' data-stop='{}' data-change='{}'><details><summary>"
        "<span class='number'>{}</span><span class='asked'>{}{}<small>{}</small></span>"
        "<span class='badge {}'>{}</span></summary>{}</details></section>",
        number,
        results.status.value,
        _stop(results),
        " ".join(changes(results)),
        number,
        html("<span class='kind'>{}</span> ", entry.kind) if entry.kind else EMPTY,
        html("<b>{}</b>", asked(results.query)),
        headline(entry),
        results.status.value,
        results.status.value,
        render_body(entry, pictures, brief=True),
    )


def _stop(results: RankedResults) -> str:
    return results.trace.stop_reason.value if results.trace and results.trace.stop_reason else ""


def _filters(entries: Sequence[ReportEntry]) -> Html:
    lists = [entry.results for entry in entries]
    selects = [
        _select("status", "any status", {s.value: STATUS_WORDS[s] for s in Status}, lists, lambda r: [r.status.value]),
        _select(
            "stop", "any end of thought", {s.value: STOP_WORDS[s] for s in StopReason}, lists, lambda r: [_stop(r)]
        ),
        _select("change", "agreeing or not", _CHANGES, lists, changes),
    ]
    return html(
        "<form class='filters' role='search'><input type='search' name='words' placeholder='Search queries, ids, words'"
        " aria-label='Search' autocomplete='off'>{}<output>{} queries</output></form>",
        join(selects),
        len(entries),
    )


def _select(
    name: str,
    all_words: str,
    words: dict[str, str],
    lists: Sequence[RankedResults],
    of: Callable[[RankedResults], Sequence[str]],
) -> Html:
    """Only what there is on this page, with how often."""
    counts = Counter(value for results in lists for value in of(results))
    options = join(
        html("<option value='{}'>{} ({})</option>", value, text, counts[value])
        for value, text in words.items()
        if counts[value]
    )
    return html(
        "<select name='{}' aria-label='{}'><option value=''>{}</option>{}</select>", name, all_words, all_words, options
    )
