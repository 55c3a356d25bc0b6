"""HTML by construction: whatever is not already `Html` is escaped, so foreign text cannot become markup."""

from __future__ import annotations

from collections.abc import Iterable
from html import escape


class Html(str):
    """Text that is already markup. Made by `html` and `join` only."""

    __slots__ = ()


def html(template: str, *values: object) -> Html:
    """Fill the `{}` of a literal template; every value that is not `Html` is escaped, quotes included."""
    return Html(template.format(*(value if isinstance(value, Html) else escape(str(value)) for value in values)))


def join(parts: Iterable[Html]) -> Html:
    return Html("".join(parts))


EMPTY = Html("")
