"""Prints the lowest supported version of all that the framework extras name, as pip constraints; for `make lowest`."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

EXTRAS = ("qdrant", "langchain", "llamaindex")


def pins(pyproject: str) -> list[str]:
    extras = tomllib.loads(pyproject)["project"]["optional-dependencies"]
    named = [one for name in EXTRAS for one in extras[name] if not one.startswith("retrv-r1-retriever[")]
    return [re.sub(r"^([\w-]+)>=([\d.]+)(,<[\d.]+)?$", r"\1==\2", one) for one in named]


if __name__ == "__main__":
    print("\n".join(pins((Path(__file__).parents[1] / "pyproject.toml").read_text(encoding="utf-8"))))
