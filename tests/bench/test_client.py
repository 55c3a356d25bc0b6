"""What a list costs the client of a vLLM server: the command runs, and a list of 50 at a 7B model's width keeps within its bytes."""

from __future__ import annotations

import json

import pytest

from retrv_r1_retriever.bench import client


def test_a_list_of_fifty_at_real_width_keeps_within_its_bytes(capsys: pytest.CaptureFixture[str]) -> None:
    assert client.main(["--rounds", "1", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["hidden"], found["top_k"]) == (3584, 50)
    rows = 50 * 2 * 3584 * 2
    assert rows * 4 / 3 < found["bytes"] < 1_100_000
    for step in ("open", "direct read", "step"):
        assert found[step]["ms"] > 0
    said = client.describe(found)
    assert f"{found['bytes']:,} bytes" in said
    assert f"K = 50, width 3,584, {found['query tokens']} query tokens; one thread, fastest of 1" in said
