"""Two processes on the CPU, plain and under ZeRO-2 and ZeRO-3, walk the trajectory of one process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from retrv_r1_retriever.model.checkpoint import load_checkpoint, read_manifest

ROOT = Path(__file__).parents[2]
STEPS = ["optim.steps=3", "optim.batch_size=8", "data.validation_queries=4", "run.evaluate=3"]


def launch(material, run, processes, *sets):
    """By torchrun: `accelerate launch` calls it for GPUs, and wants MPI on a CPU. Returns losses, gradient norms, validation losses."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(processes),
               "--standalone", "-m", "retrv_r1_training.cli", "sft", str(material / "recipe.yaml"), "--folder", str(run),
               "--threads", "1"]  # fmt: skip
    command += [part for text in (*STEPS, *sets) for part in ("--set", text)]
    paths = [str(ROOT), str(ROOT / "training"), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(paths)}
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-4000:]
    assert f"{processes} process(es), {8 // processes} lists each" in done.stderr
    rows = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    return [[row[key] for row in rows if key in row] for key in ("loss", "grad_norm", "eval_loss")]


@pytest.fixture(scope="module", params=["lora", "full"])
def one(request, material, tmp_path_factory):
    run = tmp_path_factory.mktemp(f"one-{request.param}") / "run"
    return request.param, run, launch(material, run, 1, f"tune={request.param}", "optim.per_device=8")


@pytest.mark.slow
@pytest.mark.parametrize("zero", ["null", "zero2", "zero3"])
def test_two_processes_agree_with_one(material, one, tmp_path, zero):
    tune, alone, want = one
    run = tmp_path / "run"
    got = launch(material, run, 2, f"tune={tune}", "optim.per_device=2", f"run.deepspeed={zero}")
    assert len(got[0]) == 3
    for name, mine, theirs in zip(("loss", "grad_norm", "eval_loss"), got, want, strict=True):
        assert mine == pytest.approx(theirs, rel=2e-3), name
    assert read_manifest(run / "checkpoint").memory_digest == read_manifest(material / "start").memory_digest
    models = [load_checkpoint(f / "checkpoint", device="cpu", dtype="float32").model.state_dict() for f in (alone, run)]
    for name, value in models[0].items():
        assert (models[1][name] - value).abs().max() < 0.02, name


@pytest.mark.slow
@pytest.mark.parametrize("zero", ["zero2", "zero3"])
def test_resuming_under_zero_changes_nothing(material, tmp_path, zero):
    sets = [f"run.deepspeed={zero}", "optim.per_device=4", "run.save=2"]
    want = launch(material, tmp_path / "whole", 2, *sets)
    run = tmp_path / "cut"
    subprocess.run(["cp", "-r", str(tmp_path / "whole"), str(run)], check=True)
    for folder in ("checkpoint-3", "checkpoint"):
        subprocess.run(["rm", "-r", str(run / folder)], check=True)
    got = launch(material, run, 2, *sets)
    for mine, theirs in zip(got, want, strict=True):
        assert mine == pytest.approx(theirs, rel=1e-5)
