"""Lines `name: what it is` of our docstrings become lists on the site; in the source they stay plain. An extension of griffe."""

from __future__ import annotations

import re
from typing import Any

import griffe

_ITEM = re.compile(r"^(\w+(?:, \w+)*): (?=\S)", re.M)


class Lists(griffe.Extension):
    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:  # griffe's signature
        if obj.docstring is None:
            return
        lines: list[str] = []
        inside = False
        for line in obj.docstring.value.split("\n"):
            item = _ITEM.match(line)
            if item and not inside:
                lines.append("")
            if inside and line and not item and not line.startswith(" "):
                lines.append("")
            inside = bool(item) or (inside and line.startswith(" "))
            lines.append(_ITEM.sub(lambda m: f"- **{m[1]}**: ", line))
        obj.docstring.value = "\n".join(lines)
