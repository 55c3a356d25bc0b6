"""One self-contained HTML page for any number of ranked results: open it, mail it, attach it to an issue. No script, no network."""

from retrv_r1_retriever.report.page import ReportEntry, ReportTable, render_report, write_report
from retrv_r1_retriever.report.pictures import PictureLoader, local_pictures

__all__ = ["PictureLoader", "ReportEntry", "ReportTable", "local_pictures", "render_report", "write_report"]
