"""The machine that a figure is of."""

from __future__ import annotations

import os
import platform
from pathlib import Path


def processor() -> str:
    """Its model's name where the system tells it, with the number of cores."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    named = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
    return f"{named or platform.processor() or platform.machine()} ({os.cpu_count()} cores)"
