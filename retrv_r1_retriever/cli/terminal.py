"""What the commands share in front of a terminal: safe text, tables that fit, progress."""

from __future__ import annotations

import re
import shutil
import sys
import textwrap
import time
from collections.abc import Sequence
from typing import Any, TextIO

from retrv_r1_retriever.trace import strict_json

ELLIPSIS = "…"


def printable(text: str) -> str:
    """Foreign text with control characters removed: a candidate must not move the cursor or recolour the terminal."""
    return "".join(c if c.isprintable() or c == "\n" else " " for c in text)


def one_line(text: str, width: int) -> str:
    text = " ".join(printable(text).split())
    return text if len(text) <= width else text[: max(0, width - 1)] + ELLIPSIS


def terminal_width() -> int:
    return max(40, shutil.get_terminal_size((100, 24)).columns)


def print_json(value: Any) -> None:
    print(strict_json(value, indent=2, default=str))


def print_wrapped(text: str, *, indent: int = 0) -> None:
    """Filled to the terminal; lines after the first are indented."""
    print(textwrap.fill(text, terminal_width(), subsequent_indent=" " * indent, break_on_hyphens=False))


#: Where heads may be broken, tried in turn: nowhere, at the last space, behind a slash too.
_BREAKS = (r"(?!)", r" (?=[^ ]*$)", r" (?=[^ ]*$)|(?<=/)(?=.)")


def print_table(header: Sequence[str], rows: Sequence[Sequence[str]], *, indent: str = "") -> None:
    """Columns aligned, numbers to the right; the last column takes what is left of the line.

    Figures are worth more than one line of heads: where it is these that make a table too wide, they are set in several. No head
    is cut, also where the line gets too long by that: it says which column is which.
    """
    names = [one_line(cell, 400) for cell in header]
    body = [[one_line(cell, 400) for cell in row] for row in rows]
    right = [all(_is_number(row[i]) for row in body) for i in range(len(names))]
    room = terminal_width() - len(indent) - 2 * (len(names) - 1)
    of_figures = max((len(row[-1]) for row in body), default=0) <= len(names[-1])
    for breaks in _BREAKS if of_figures else _BREAKS[:1]:
        heads = _in_lines(names, breaks)
        widths = [max(len(row[i]) for row in (*heads, *body)) for i in range(len(names))]
        if sum(widths) <= room:
            break
    longest = max(len(line[-1]) for line in heads)
    widths[-1] = min(widths[-1], max(8, longest, room - sum(widths[:-1])))
    for row in (*heads, *body):
        parts = [
            one_line(cell, width).rjust(width) if flush_right else one_line(cell, width).ljust(width)
            for cell, width, flush_right in zip(row, widths, right, strict=True)
        ]
        print((indent + "  ".join(parts)).rstrip())


def _in_lines(names: Sequence[str], breaks: str) -> list[list[str]]:
    """As many lines as the head with the most parts has; the others stand at the bottom."""
    parts = [re.split(breaks, name) for name in names]
    height = max(map(len, parts))
    return [list(line) for line in zip(*([""] * (height - len(p)) + p for p in parts), strict=True)]


def _is_number(cell: str) -> bool:
    return not cell.strip("–+-.,%0123456789 ")


class Progress:
    """`progress(what, done, total)`: a bar that is redrawn on a terminal, a line every few seconds elsewhere. Writes to stderr."""

    def __init__(self, stream: TextIO | None = None, *, every_s: float = 5.0) -> None:
        self._stream = stream or sys.stderr
        self._live = self._stream.isatty()
        self._every_s = 0.1 if self._live else every_s
        self._started: dict[str, float] = {}
        self._last = 0.0

    def __call__(self, what: str, done: int, total: int | None = None) -> None:
        now = time.monotonic()
        started = self._started.setdefault(what, now)
        finished = total is not None and done >= total
        if not finished and now - self._last < self._every_s:
            return
        self._last = now
        line = self._line(what, done, total, now - started)
        self._stream.write(f"\r\x1b[K{line}" if self._live else f"{line}\n")
        if finished and self._live:
            self._stream.write("\n")
        self._stream.flush()

    def _line(self, what: str, done: int, total: int | None, seconds: float) -> str:
        speed = done / seconds if seconds > 0.5 else 0.0
        rate = f"{speed:,.0f}/s" if speed >= 10 else f"{speed:.2g}/s" if speed else ""
        if not total:
            return f"{what:<24} {done:,}  {rate}"
        filled = round(24 * min(1.0, done / total))
        bar = f"{'█' * filled}{'·' * (24 - filled)} " if self._live else ""
        left = (total - done) * seconds / done if done and seconds > 1 else 0.0
        remaining = f"  {_duration(left)} left" if left >= 1 else ""
        return f"{what:<24} {bar}{done:,}/{total:,}  {rate}{remaining}"


def _duration(seconds: float) -> str:
    minutes = round(seconds / 60)
    return f"{seconds:.0f} s" if seconds < 120 else f"{minutes} min" if minutes < 120 else f"{minutes / 60:.1f} h"
