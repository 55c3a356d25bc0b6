"""Stages started as on several GPUs, on the CPU: by torchrun, since `accelerate launch` calls it for GPUs and wants MPI on a CPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def launch(stage: str, recipe: Path, run: Path, processes: int, *sets: str) -> subprocess.CompletedProcess[str]:
    """processes: 1 = without a launcher"""
    command = [sys.executable, "-m"]
    if processes > 1:
        command += ["torch.distributed.run", "--nproc_per_node", str(processes), "--standalone", "-m"]
    command += ["retrv_r1_training.cli", stage, str(recipe), "--folder", str(run), "--threads", "1"]
    command += [part for text in sets for part in ("--set", text)]
    paths = [str(ROOT), str(ROOT / "training"), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(paths)}
    return subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=900)


def launched(stage: str, recipe: Path, run: Path, processes: int, *sets: str) -> Path:
    """The run's folder, of a launch that went well."""
    done = launch(stage, recipe, run, processes, *sets)
    assert done.returncode == 0, done.stderr[-4000:]
    return run


def logged(run: Path, key: str) -> list[float]:
    rows = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    return [row[key] for row in rows if key in row]
