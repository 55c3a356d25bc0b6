"""The page around the queries: headline numbers, tables, contents, footer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from importlib import resources
from pathlib import Path

from retrv_r1_retriever import __version__
from retrv_r1_retriever.images import ImageSource, LocalImages
from retrv_r1_retriever.report.browse import MANY, policy, render_many, script
from retrv_r1_retriever.report.entry import ReportEntry, asked, headline, render_entry
from retrv_r1_retriever.report.markup import EMPTY, Html, html, join
from retrv_r1_retriever.report.pictures import Pictures, loader
from retrv_r1_retriever.trace import ReasoningTrace


@dataclass(frozen=True, slots=True)
class ReportTable:
    """Numbers beside the queries. The first column is a label, the others are aligned as figures."""

    caption: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    note: str | None = None


def render_report(
    entries: Sequence[ReportEntry],
    *,
    title: str = "Search report",
    intro: str | None = None,
    tables: Sequence[ReportTable] = (),
    images: ImageSource | None = None,
    tiles: bool = True,
) -> str:
    """The page as text. `images` resolves pictures; the default shows bytes, data URIs and Pillow images, and opens no file.

    tiles: means over the queries on the page; not for one that shows a selection, or a query more than once
    """
    many = len(entries) >= MANY
    pictures = Pictures(loader(images or LocalImages()), shared=many)
    code = script() if many else None
    css = (resources.files("retrv_r1_retriever.report") / "report.css").read_text(encoding="utf-8")
    traces = [entry.results.trace for entry in entries if entry.results.trace]
    body = join(
        [
            _header(title, intro),
            _tiles(len(entries), traces) if traces and tiles else EMPTY,
            join(_table(table) for table in tables),
            render_many(entries, pictures) if many else _few(entries, pictures),
            _footer(traces),
        ]
    )
    return html(
        "<!doctype html>\n<html lang='en'><head><meta charset='utf-8'><title>{}</title>"
        "<meta name='viewport' content='width=device-width, initial-scale=1'>"
        "<meta name='color-scheme' content='light dark'>{}<style>{}</style></head><body><main>{}</main>{}{}</body></html>\n",
        title, policy(code), Html(css), body, pictures.block(), html("<script>{}</script>", code) if code else EMPTY,
    )  # fmt: skip


def write_report(
    path: Path,
    entries: Sequence[ReportEntry],
    *,
    title: str = "Search report",
    intro: str | None = None,
    tables: Sequence[ReportTable] = (),
    images: ImageSource | None = None,
    tiles: bool = True,
) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    page = render_report(entries, title=title, intro=intro, tables=tables, images=images, tiles=tiles)
    path.write_text(page, encoding="utf-8", errors="replace")  # half a surrogate pair must not cost the page
    return path


def _header(title: str, intro: str | None) -> Html:
    lead = html("<p class='lead'>{}</p>", intro) if intro else EMPTY
    when = datetime.now().strftime("%Y-%m-%d %H:%M")
    return html("<header><p class='brand'>retrv-r1 · {}</p><h1>{}</h1>{}</header>", when, title, lead)


def _tiles(queries: int, traces: Sequence[ReasoningTrace]) -> Html:
    opened = sum(len(trace.inspected) for trace in traces)
    tiles = [("queries on this page", f"{queries}"), ("candidates opened per query", f"{opened / len(traces):.1f}")]
    prompt = sum(trace.usage.prompt_tokens for trace in traces if trace.usage.uncompressed_tokens)
    full = sum(trace.usage.uncompressed_tokens for trace in traces)
    if prompt and full:
        tiles.append(("of the uncompressed prompt", f"{prompt / full:.0%}"))
    seconds = sum(total_seconds(trace) for trace in traces)
    if seconds:
        tiles.append(("per query on average, from question to list", format_seconds(seconds / len(traces))))
    cells = join(html("<div><b>{}</b><span>{}</span></div>", value, label) for label, value in tiles)
    return html("<section class='tiles'>{}</section>", cells)


def _table(table: ReportTable) -> Html:
    head = join(html("<th scope='col'>{}</th>", cell) for cell in table.header)
    rows = join(
        html("<tr><th scope='row'>{}</th>{}</tr>", row[0], join(_cells(table.header, row))) for row in table.rows
    )
    note = html("<p class='note'>{}</p>", table.note) if table.note else EMPTY
    return html(
        "<section class='card'><h2>{}</h2><div class='scroll'><table class='figures'><thead><tr>{}</tr></thead>"
        "<tbody>{}</tbody></table></div>{}</section>",
        table.caption, head, rows, note,
    )  # fmt: skip


def _cells(header: Sequence[str], row: Sequence[str]) -> list[Html]:
    """Each with its column's name, which stands over it where the table is too wide for the screen."""
    return [html("<td data-name='{}'>{}</td>", name, cell) for name, cell in zip(header[1:], row[1:], strict=True)]


def _few(entries: Sequence[ReportEntry], pictures: Pictures) -> Html:
    contents = _contents(entries, pictures) if len(entries) > 1 else EMPTY
    return join([contents, *(render_entry(entry, number, pictures) for number, entry in enumerate(entries, 1))])


def _contents(entries: Sequence[ReportEntry], pictures: Pictures) -> Html:
    items = join(
        html(
            "<li><a href='#q{}'><span class='number'>{}</span><span class='kind'>{}</span>{}<span><b>{}</b> {}</span></a></li>",
            number,
            number,
            entry.kind or "query",
            pictures.thumbnail(entry.results.query.content.image, "the query's picture"),
            asked(entry.results.query),
            headline(entry),
        )
        for number, entry in enumerate(entries, 1)
    )
    return html("<nav class='card'><h2>Queries on this page</h2><ol>{}</ol></nav>", items)


def _footer(traces: Sequence[ReasoningTrace]) -> Html:
    versions: dict[str, str] = {"retrv-r1-retriever": __version__}
    for trace in traces:
        versions.update(trace.versions)
    pairs = join(html("<span>{} <code>{}</code></span>", name, value) for name, value in versions.items())
    return html("<footer><p>{}</p></footer>", pairs)


def total_seconds(trace: ReasoningTrace) -> float:
    """`total` if the driver measured it, else the sum of the stages."""
    return trace.timings.get("total", sum(trace.timings.values()))


def format_seconds(seconds: float) -> str:
    return f"{seconds * 1000:.0f} ms" if seconds < 1 else f"{seconds:.1f} s"
