"""Prints the lowest supported version of everything the framework extras name, as pip constraints; for `make lowest`."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

EXTRAS = ("qdrant", "langchain", "llamaindex")


def pins(pyproject: str) -> list[str]:
    extras = tomllib.loads(pyproject)["project"]["optional-dependencies"]
    found = [re.fullmatch(r"([\w-]+)>=([\d.]+)(?:,<[\d.]+)?", one) for name in EXTRAS for one in extras[name]]
    return [f"{one[1]}=={one[2]}" for one in found if one]


if __name__ == "__main__":
    print("\n".join(pins((Path(__file__).parents[1] / "pyproject.toml").read_text(encoding="utf-8"))))
