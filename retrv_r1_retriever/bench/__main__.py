"""Time and work of reranking with two tokens per candidate, against the same weights reading every candidate in full.

    python -m retrv_r1_retriever.bench --shape miniature ratio --out bench

One thread (on a CPU), modes interleaved, best of several rounds: a ratio holds for this machine and this shape only. `modes.py` says
what the modes are, `shapes.py` what the shapes are. A shape with random weights says nothing about quality.
"""

from __future__ import annotations

import argparse
import json
import platform
import shlex
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

from retrv_r1_retriever._sync import run
from retrv_r1_retriever.bench.arguments import MODES, add_arguments
from retrv_r1_retriever.bench.floors import Counts, measure_ceiling
from retrv_r1_retriever.bench.machine import processor
from retrv_r1_retriever.bench.modes import (
    Mode,
    Task,
    auto,
    counted,
    interleaved,
    margin_below,
    modes,
    thought,
    throughput,
)
from retrv_r1_retriever.bench.shapes import SHAPES, Shape, random_checkpoint, random_task
from retrv_r1_retriever.bench.stages import Stage, stages
from retrv_r1_retriever.config import Config, ModelConfig, checkpoint_path
from retrv_r1_retriever.demo.catalogue import TASKS, pool_path, read_queries, write_catalogue
from retrv_r1_retriever.edge import EdgeStore
from retrv_r1_retriever.engines.local import LocalEngine
from retrv_r1_retriever.images import LocalImages, load_content, load_query
from retrv_r1_retriever.model.checkpoint import Checkpoint, load_checkpoint
from retrv_r1_retriever.points import CollectionSpec
from retrv_r1_retriever.prompt import build_full_prompt, build_prompt
from retrv_r1_retriever.readers import read_mbeir
from retrv_r1_retriever.store import Point
from retrv_r1_retriever.types import Candidate, Content, Document, Memory, Query

Row = dict[str, float | str]
AUTO_QUERIES = 10
_FOLDERS = ("--out", "--dir")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    measure(parser.parse_args(argv), command("python -m retrv_r1_retriever.bench", argv))
    return 0


def measure(args: argparse.Namespace, typed: str) -> dict[str, Any]:
    """Measure, print the tables, write the files. typed: the command, for the report"""
    if not torch.cuda.is_available():
        torch.set_num_threads(1)
    told = {"command": typed, "machine": machine(), "rounds": args.rounds}
    report: dict[str, Any] = told | {"shapes": []}
    for name in args.shape:
        report["shapes"].append(bench_shape(name, args))
    if args.out:
        from retrv_r1_retriever.bench.plot import draw  # matplotlib: only where a picture is asked for

        args.out.mkdir(parents=True, exist_ok=True)
        (args.out / "bench.json").write_text(json.dumps(report, indent=1) + "\n")
        draw(report, args.out / "bench.png")
    return report


def bench_shape(name: str, args: argparse.Namespace) -> dict[str, Any]:
    """Measure one shape and print its tables."""
    checkpoint = _miniature() if name == "miniature" else random_checkpoint(SHAPES[name])
    engine = LocalEngine(checkpoint, max_batch_tokens=1 << 17)
    ceiling = measure_ceiling(checkpoint.model.device, checkpoint.model.dtype)
    say(f"\n## {name}: {ceiling.flops / 1e9:,.0f} GFLOP/s in a large matmul, {ceiling.bytes / 1e9:,.1f} GB/s read\n")
    out: dict[str, Any] = {"shape": name, "ceiling": asdict(ceiling), "modes": [], "auto": [], "stages": []}
    for k in args.top_k:
        tasks = miniature_tasks(k) if name == "miniature" else {"image + text": _random_tasks(SHAPES[name], k)}
        for label, (queries, candidates) in tasks.items():
            task = Task.of(engine, queries[0], candidates)
            head: Row = {"task": label, "K": str(k)}
            out["modes"] += [head | row for row in run(time_modes(checkpoint, engine, task, args))]
            if args.steps:
                out["auto"].append(head | run(time_auto(engine, queries, task, args, checkpoint.model.device)))
            found = stages(checkpoint, task, ceiling, args.rounds) if args.stages else []
            memory = task.stored[0].memory
            assert memory is not None
            fetch = fetch_seconds(k, len(memory.rows), memory.rows.shape[1], args.rounds)
            found.append(Stage("fetch with memory (Edge)", fetch))
            out["stages"] += [head | asdict(stage) for stage in found]
    say(table(out["modes"]))
    if out["auto"]:
        say(table(out["auto"]))
    say(table([stage_row(stage) for stage in out["stages"]]))
    return out


async def time_modes(checkpoint: Checkpoint, engine: LocalEngine, task: Task, args: argparse.Namespace) -> list[Row]:
    """One row a mode: what it reads, milliseconds of the direct read alone, with a thought, and queries per second."""
    device, counts = checkpoint.model.device, Counts(checkpoint.model.config, checkpoint.model.dtype.itemsize)
    chosen = {*args.modes, "U", "F"} if args.modes else set(MODES)
    calls = {name: call for name, call in modes(engine, task).items() if name in chosen}
    reads = await counted(calls, checkpoint.model.model.visual)
    seconds = await interleaved(calls, args.rounds, device)
    full, compressed = build_full_prompt(task.query, task.cached), build_prompt(task.query, task.stored)
    thinking: dict[str, Mode] = {
        "U'": lambda: thought(engine, full, args.steps), "F": lambda: thought(engine, compressed, args.steps)
    }  # fmt: skip
    thoughts = await interleaved(thinking, args.rounds, device) if args.steps else {}
    rows: list[Row] = []
    for mode, count in reads.items():
        row: Row = {"mode": mode, "prompt tokens": str(count.prompt), "tower patches": str(count.patches)}
        shown = 3 * len(task.plain)  # a label and two tokens each
        share = 100 * shown / (reads["U"].prompt - reads["F"].prompt + shown)
        row["candidates' part of U's, %"] = share if mode in ("C", "F") else "-"
        row |= {"ms": 1e3 * seconds[mode], "x faster than U": seconds["U"] / seconds[mode]}
        row["KV MB"] = counts.kv_bytes(count.prompt) / 1e6
        row[f"ms with {args.steps} tokens of thought"] = 1e3 * thoughts[mode] if mode in thoughts else "-"
        prompt = {"U'": full, "F": compressed}.get(mode)
        for n in args.concurrency:
            rate = await throughput(engine, prompt, n, max(1, args.rounds // 2), device) if prompt else None
            row[f"q/s at {n}"] = "-" if rate is None else rate
        rows.append(row)
    return rows


async def time_auto(
    engine: LocalEngine, queries: Sequence[Query], task: Task, args: argparse.Namespace, device: torch.device
) -> Row:
    """F over several queries, a thought where a read is unsure: threshold, share that thought, milliseconds a query."""
    prompts, chosen = [build_prompt(query, task.stored) for query in queries], "given"
    threshold = args.margin
    if threshold is None:
        threshold, chosen = engine.think_margin, "calibrated"
    if threshold is None:
        threshold = await margin_below(engine, prompts, args.think_share)
        chosen = f"leaves {args.think_share:.0%} below it"
    found = await auto(engine, prompts, args.steps, threshold, args.rounds, device)
    return {
        "mode": "auto", "queries": str(len(queries)), "threshold, nats": threshold, "chosen": chosen,
        "thought about, %": 100 * found.share, f"ms a query, {args.steps} tokens a thought": 1e3 * found.seconds,
    }  # fmt: skip


def _random_tasks(shape: Shape, top_k: int) -> tuple[tuple[Query, ...], tuple[Candidate, ...]]:
    query, candidates = random_task(shape, top_k)
    return (query, *(random_task(shape, 1, seed)[0] for seed in range(1, AUTO_QUERIES))), candidates


def miniature_tasks(top_k: int) -> dict[str, tuple[tuple[Query, ...], tuple[Candidate, ...]]]:
    """The first queries of each task of the catalogue, a fine one first, over K candidates of the modality they ask for."""
    out = {}
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        write_catalogue(root, ("test",))
        images = LocalImages(root)
        documents = [d for d in read_mbeir(pool_path(root, "test")) if isinstance(d, Document)]
        for task in TASKS:
            asked = read_queries(root, "test", task)
            strata = ([q for q in asked if q.stratum == name][: AUTO_QUERIES // 2] for name in ("fine", "coarse"))
            labelled = [q for one in strata for q in one]
            chosen = [d for d in documents if d.metadata["modality"] == labelled[0].target_modality][:top_k]
            contents = [run(load_content(images, d.content))[0] for d in chosen]
            queries = [run(load_query(images, q.query)) for q in labelled]
            candidates = (
                Candidate(Document(d.id, c), None, i) for i, (d, c) in enumerate(zip(chosen, contents, strict=True), 1)
            )
            out[task] = (tuple(queries), tuple(candidates))
    return out


def fetch_seconds(top_k: int, rows: int, width: int, rounds: int) -> float:
    """Of one search for K candidates with memory among 2,000 points of an embedded index, the shortest of `rounds`."""
    rng = np.random.default_rng(0)
    memory = Memory(rng.standard_normal((rows, width)).astype(np.float16), "some", "some", 1)
    with tempfile.TemporaryDirectory() as folder:
        store = EdgeStore(Path(folder) / "points", spec=CollectionSpec(64, width, memory.digest))
        vectors = rng.standard_normal((2000, 64)).astype(np.float32)
        points = [Point(Document(str(i), Content("x")), v, memory) for i, v in enumerate(vectors)]
        run(store.upsert(points))

        async def search() -> float:
            started = time.perf_counter()
            found = await store.search(vectors[0], top_k)
            assert all(c.memory is not None for c in found)
            return time.perf_counter() - started

        best = min(run(search()) for _ in range(rounds + 1))
        run(store.close())
    return best


def command(program: str, argv: Sequence[str] | None) -> str:
    """As it was typed, without the folders of this machine."""
    words = list(sys.argv[1:] if argv is None else argv)
    kept = [w for i, w in enumerate(words) if w not in _FOLDERS and (i == 0 or words[i - 1] not in _FOLDERS)]
    return shlex.join([*program.split(), *kept])


def machine() -> dict[str, str]:
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else ""
    return {
        "processor": gpu or processor(), "python": platform.python_version(),
        "torch": torch.__version__, "transformers": transformers.__version__, "threads": str(torch.get_num_threads()),
    }  # fmt: skip


def table(rows: Sequence[Row]) -> str:
    names = list(rows[0])
    lines = ["| " + " | ".join(names) + " |", "|" + " --- |" * len(names)]
    lines += ["| " + " | ".join(_cell(row[name]) for name in names) + " |" for row in rows]
    return "\n".join(lines) + "\n"


def say(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def _cell(value: float | str) -> str:
    return value if isinstance(value, str) else f"{value:.2f}" if value < 10 else f"{value:,.1f}"


def stage_row(stage: dict[str, Any]) -> Row:
    """Of a report's stage. The floor is that of the FLOPs or of the bytes, whichever is higher."""
    work, seconds, floor = stage["work"], stage["seconds"], stage["floor"]
    row: Row = {"task": stage["task"], "K": stage["K"], "stage": stage["name"], "ms": 1e3 * seconds}
    if work is None:
        return row | dict.fromkeys(("GFLOP", "MB", "floor ms", "% of floor"), "-")
    counted = {"GFLOP": f"{work['flops'] / 1e9:.3g}", "MB": f"{work['bytes'] / 1e6:.3g}"}
    return row | counted | {"floor ms": 1e3 * floor, "% of floor": 100 * floor / seconds}


def _miniature() -> Checkpoint:
    return load_checkpoint(checkpoint_path(Config(model=ModelConfig("miniature"))))


if __name__ == "__main__":
    raise SystemExit(main())
