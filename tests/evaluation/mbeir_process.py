"""One evaluation of a generated root in a process of its own, so that it can be killed and its memory read.

python tests/evaluation/mbeir_process.py ROOT OUT      prints the peak resident memory in MB
"""

from __future__ import annotations

import resource
import sys
from pathlib import Path

from retrv_r1_retriever._sync import run
from retrv_r1_retriever.cli.evaluate_mbeir import describe, write_results
from retrv_r1_retriever.evaluation.benchmark import Setup, run_benchmark
from retrv_r1_retriever.evaluation.scores import BenchmarkScore, score
from retrv_r1_retriever.options import FAST
from tests.evaluation.mbeir_root import parts


def main(root: Path, out: Path) -> None:
    setup = Setup(root, out, (FAST.with_options(top_k=50, timeout_s=None),), concurrency=2)
    system = parts(root)
    runs = run(run_benchmark(setup, system, lambda *_: None))
    scores = BenchmarkScore(tuple(map(score, runs)), setup.absent())
    write_results(setup, runs, scores, describe(setup, system))
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
