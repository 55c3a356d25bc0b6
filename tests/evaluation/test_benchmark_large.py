"""200,000 candidates end to end in a process that is killed while it reranks, and in one that is not: `make slow`.

A kill while the index is made is tested on a small pool only (test_benchmark.py): both processes here share one index.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from retrv_r1_retriever.evaluation.benchmark import TASKS
from tests.evaluation.mbeir_root import write_root

ROOT = Path(__file__).parents[2]
CANDIDATES, QUERIES = 200_000 // len(TASKS), 20
MEMORY_MB = 300


def start(root: Path, out: Path) -> subprocess.Popen[str]:
    path = os.pathsep.join(str(ROOT / part) for part in (".", "training", "integrations"))
    command = [sys.executable, "-m", "tests.evaluation.mbeir_process", str(root), str(out)]
    return subprocess.Popen(command, cwd=ROOT, env=os.environ | {"PYTHONPATH": path}, stdout=subprocess.PIPE, text=True)


def peak_mb(process: subprocess.Popen[str]) -> int:
    out, _ = process.communicate()
    assert process.returncode == 0
    return int(out)


def killed_in_the_middle(root: Path, out: Path) -> int:
    """Killed when the fifth task has a reranking; how many rerankings were there by then."""
    process = start(root, out)
    while process.poll() is None:
        done = sum(path.read_bytes().count(b"\n") - 1 for path in (out / "lists").glob("*K50*"))
        if done > 4.5 * QUERIES:
            process.kill()
            process.communicate()
            return done
        time.sleep(0.05)
    raise AssertionError("it ended before it was killed")


@pytest.mark.slow
def test_200_000_candidates_in_bounded_memory_killed_and_resumed(tmp_path: Path) -> None:
    root = write_root(tmp_path / "root", CANDIDATES, QUERIES)
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    peaks = [peak_mb(start(root, whole))]
    shutil.copytree(whole / "index", resumed / "index")  # made once; stopping while it is made: test_benchmark.py
    done = killed_in_the_middle(root, resumed)
    peaks.append(peak_mb(start(root, resumed)))
    print(f"{CANDIDATES * len(TASKS):,} candidates: peak resident memory {peaks} MB; killed after {done} rerankings")
    [results], [again] = whole.glob("local.*"), resumed.glob("local.*")
    for name in ("results.json", "results.tsv"):
        assert (again / name).read_bytes() == (results / name).read_bytes()
    assert json.loads((results / "results.json").read_text())["complete"]
    assert max(peaks) < MEMORY_MB
