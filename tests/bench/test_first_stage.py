"""The first stage at size, at a size that takes seconds: the data, the exact answer, and that the table is whole."""

from __future__ import annotations

import json

import numpy as np
import pytest

from retrv_r1_retriever.bench import first_stage
from retrv_r1_retriever.bench.first_stage import DIM, FILTERS, TOP_K, Clusters, Setting, _exact, share_of


def test_rows_are_the_same_wherever_they_are_drawn_and_near_to_some():
    data = Clusters(3000)
    whole = np.concatenate([block for _, block in data.blocks()])
    assert whole.shape == (3000, DIM)
    assert np.array_equal(whole[2000:], Clusters(3000).block(2000))
    assert np.allclose(np.linalg.norm(whole, axis=1), 1, atol=1e-6)
    similar = np.sort(data.queries(20) @ whole.T, axis=1)
    spread = similar[:, -1] - np.median(similar, axis=1)
    assert spread.min() > 0.4  # uniform ones differ by 4 / sqrt(256) = 0.25 at this count


def test_the_exact_answer_is_that_of_a_sort():
    data = Clusters(2500)
    whole, asked = np.concatenate([block for _, block in data.blocks()]), data.queries(5)
    shares = share_of(np.arange(2500))
    for left in FILTERS.values():
        scores = asked @ whole.T
        if left:
            scores[:, ~np.isin(shares, left)] = -9
        want = [set(np.argsort(-row)[:TOP_K]) for row in scores]
        want = [{int(i) for i in row if not left or shares[i] in left} for row in want]
        assert _exact(asked, 2500, left) == want
    assert {int(share): round(float((shares == share).mean()), 2) for share in (0, 1, 2)} == {0: 0.01, 1: 0.09, 2: 0.9}


def test_a_tie_for_the_last_place_counts_either_way(monkeypatch):
    rows = np.eye(DIM, dtype=np.float32)[np.zeros(TOP_K + 1, dtype=int)]  # all the same

    class Same:
        def __init__(self, points):
            self.points = points

        def blocks(self):
            yield 0, rows

    monkeypatch.setattr(first_stage, "Clusters", Same)
    assert _exact(rows[:1], TOP_K + 1, []) == [set(range(TOP_K + 1))]


def test_every_setting_and_filter_gets_a_row(tmp_path, monkeypatch):
    monkeypatch.setattr(first_stage, "SETTINGS", (Setting("scan", False), Setting("int8", True, "int8", 2.0, True)))
    monkeypatch.setattr(first_stage, "_alone", lambda work, *args: work(*args))
    out = tmp_path / "out.json"
    assert first_stage.main(["--points", "2000", "--queries", "10", "--dir", str(tmp_path), "--out", str(out)]) == 0
    rows = json.loads(out.read_text())["rows"]
    both = [(f, s) for f in FILTERS for s in (("graph", "exact") if f else ("graph",))]
    expected = [("scan", f, "exact") for f in FILTERS] + [("int8", *way) for way in both]
    assert [(row["setting"], row["filter"], row["search"]) for row in rows] == expected
    assert all(row["recall@50"] == 1.0 for row in rows if row["search"] == "exact")
    assert all(row["recall@50"] > 0.9 and row["p95 ms"] >= row["p50 ms"] > 0 for row in rows)
    assert all(row["disk MB"] > 2000 * DIM * 4 / 1e6 for row in rows)
    assert list(tmp_path.glob("first-stage-*")) == []  # nothing is left behind


def test_a_search_that_misses_is_seen(monkeypatch, tmp_path):
    monkeypatch.setattr(first_stage, "_exact", lambda asked, points, shares: [{-1} for _ in asked])
    setting = Setting("scan", False)
    first_stage.build(tmp_path, setting, 1000)
    assert all(row["recall@50"] == 0.0 for row in first_stage.search(tmp_path, setting, 1000, 3))


@pytest.mark.slow
@pytest.mark.parametrize("points", [100_000, 1_000_000])
def test_at_size(tmp_path, points):
    """A million: more than ten minutes, 6 GB of memory, 2 GB of disk."""
    out = tmp_path / "out.json"
    assert first_stage.main(["--points", str(points), "--dir", str(tmp_path), "--out", str(out)]) == 0
    rows = {(row["setting"], row["filter"], row["search"]): row for row in json.loads(out.read_text())["rows"]}
    assert {row["recall@50"] for (*_, search), row in rows.items() if search == "exact"} == {1.0}
    assert rows["HNSW", "", "graph"]["recall@50"] > 0.95
