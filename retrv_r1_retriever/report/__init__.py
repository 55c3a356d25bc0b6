"""One self-contained HTML page for any number of ranked results: open it, mail it, attach it to an issue. No network, and no script but the
one that filters a page of many queries."""

from retrv_r1_retriever.report.entry import ReportEntry
from retrv_r1_retriever.report.page import ReportTable, render_report, write_report

__all__ = ["ReportEntry", "ReportTable", "render_report", "write_report"]
