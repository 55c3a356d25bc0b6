"""A short run of `tests/fuzz.py`; RETRV_FUZZ=100000 makes it the long one."""

from __future__ import annotations

import logging
import os

import pytest

from retrv_r1_retriever.types import Status
from tests.fuzz import fuzz


def test_generated_outputs_break_nothing(capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.ERROR)  # thousands of expected fallbacks
    wanted = int(os.environ.get("RETRV_FUZZ", "3000"))
    counts = fuzz(wanted)
    assert counts["outputs"] >= wanted
    assert min(counts[status] for status in Status) > 0, "the soup must reach every status"
    with capsys.disabled():
        print(f"\nfuzz: {counts['outputs']} generated outputs, no fault")
