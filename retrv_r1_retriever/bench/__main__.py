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
from retrv_r1_retriever.bench.floors import Counts, measure_ceiling
from retrv_r1_retriever.bench.modes import Mode, Task, counted, interleaved, modes, thought, throughput
from retrv_r1_retriever.bench.shapes import SHAPES, random_checkpoint, random_task
from retrv_r1_retriever.bench.stages import stages
from retrv_r1_retriever.config import Config, ModelConfig, checkpoint_path
from retrv_r1_retriever.demo.catalogue import TASKS, pool_path, read_queries, write_catalogue
from retrv_r1_retriever.edge import EdgeStore
from retrv_r1_retriever.engines.local import LocalEngine
from retrv_r1_retriever.images import LocalImages, load_content
from retrv_r1_retriever.model.checkpoint import Checkpoint, load_checkpoint
from retrv_r1_retriever.points import CollectionSpec
from retrv_r1_retriever.prompt import build_full_prompt, build_prompt
from retrv_r1_retriever.readers import read_mbeir
from retrv_r1_retriever.store import Point
from retrv_r1_retriever.types import Candidate, Content, Document, Memory, Query

Row = dict[str, float | str]
_FOLDERS = ("--out", "--dir")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=("miniature", *SHAPES), nargs="+", default=["miniature", "ratio"])
    parser.add_argument("--top-k", type=int, nargs="+", default=[50])
    parser.add_argument("--rounds", type=int, default=7, help="timed passes through all modes (default: 7)")
    parser.add_argument("--steps", type=int, default=100, help="decoded tokens of a thought (default: 100; 0 = none)")
    parser.add_argument("--concurrency", type=int, nargs="*", default=[1, 8])
    parser.add_argument("--modes", nargs="+", help="only these, U and F among them (default: all)")
    parser.add_argument(
        "--stages", action=argparse.BooleanOptionalAction, default=True, help="also time the stages of a query"
    )
    parser.add_argument("--out", type=Path, help="folder for bench.json and bench.png")
    args = parser.parse_args(argv)
    if not torch.cuda.is_available():
        torch.set_num_threads(1)
    told = {"command": command("retrv_r1_retriever.bench", argv), "machine": machine(), "rounds": args.rounds}
    report: dict[str, Any] = told | {"shapes": []}
    for name in args.shape:
        report["shapes"].append(bench_shape(name, args))
    if args.out:
        from retrv_r1_retriever.bench.plot import draw  # matplotlib: only where a picture is asked for

        args.out.mkdir(parents=True, exist_ok=True)
        (args.out / "bench.json").write_text(json.dumps(report, indent=1) + "\n")
        draw(report, args.out / "bench.png")
    return 0


def bench_shape(name: str, args: argparse.Namespace) -> dict[str, Any]:
    """Measure one shape and print its tables."""
    checkpoint = _miniature() if name == "miniature" else random_checkpoint(SHAPES[name])
    engine = LocalEngine(checkpoint, max_batch_tokens=1 << 17)
    ceiling = measure_ceiling(checkpoint.model.device, checkpoint.model.dtype)
    say(f"\n## {name}: {ceiling.flops / 1e9:,.0f} GFLOP/s in a large matmul, {ceiling.bytes / 1e9:,.1f} GB/s read\n")
    out: dict[str, Any] = {"shape": name, "ceiling": asdict(ceiling), "modes": [], "stages": []}
    for k in args.top_k:
        tasks = miniature_tasks(k) if name == "miniature" else {"image + text": random_task(SHAPES[name], k)}
        for label, (query, candidates) in tasks.items():
            task = Task.of(engine, query, candidates)
            head: Row = {"task": label, "K": str(k)}
            out["modes"] += [head | row for row in run(time_modes(checkpoint, engine, task, args))]
            found = [asdict(s) for s in stages(checkpoint, task, ceiling, args.rounds)] if args.stages else []
            memory = task.stored[0].memory
            assert memory is not None
            fetch = fetch_seconds(k, len(memory.rows), memory.rows.shape[1], args.rounds)
            found.append({"name": "fetch with memory (Edge)", "seconds": fetch, "floor": None})
            out["stages"] += [head | stage for stage in found]
    say(table(out["modes"]))
    say(table([_stage_row(s) for s in out["stages"]]))
    return out


async def time_modes(checkpoint: Checkpoint, engine: LocalEngine, task: Task, args: argparse.Namespace) -> list[Row]:
    """One row a mode: what it reads, milliseconds of the direct read alone, with a thought, and queries per second."""
    device, counts = checkpoint.model.device, Counts(checkpoint.model.config, checkpoint.model.dtype.itemsize)
    calls = {name: call for name, call in modes(engine, task).items() if not args.modes or name in args.modes}
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
        row["KV MB"] = counts.kv_bytes(count.prompt if mode != "X" else count.prompt // len(task.plain)) / 1e6
        row[f"ms with {args.steps} tokens of thought"] = 1e3 * thoughts[mode] if mode in thoughts else "-"
        prompt = {"U'": full, "F": compressed}.get(mode)
        for n in args.concurrency:
            rate = await throughput(engine, prompt, n, max(1, args.rounds // 2), device) if prompt else None
            row[f"q/s at {n}"] = "-" if rate is None else rate
        rows.append(row)
    return rows


def miniature_tasks(top_k: int) -> dict[str, tuple[Query, tuple[Candidate, ...]]]:
    """The first fine query of each task of the catalogue, over K candidates of the modality it asks for."""
    out = {}
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        write_catalogue(root, ("test",))
        images = LocalImages(root)
        documents = [d for d in read_mbeir(pool_path(root, "test")) if isinstance(d, Document)]
        for task in TASKS:
            labelled = next(q for q in read_queries(root, "test", task) if q.stratum == "fine")
            chosen = [d for d in documents if d.metadata["modality"] == labelled.target_modality][:top_k]
            contents = [run(load_content(images, d.content))[0] for d in chosen]
            query = Query(run(load_content(images, labelled.query.content))[0], labelled.query.instruction)
            candidates = (
                Candidate(Document(d.id, c), None, i) for i, (d, c) in enumerate(zip(chosen, contents, strict=True), 1)
            )
            out[task] = (query, tuple(candidates))
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


def command(module: str, argv: Sequence[str] | None) -> str:
    """As it was typed, without the folders of this machine."""
    words = list(sys.argv[1:] if argv is None else argv)
    kept = [w for i, w in enumerate(words) if w not in _FOLDERS and (i == 0 or words[i - 1] not in _FOLDERS)]
    return shlex.join(["python", "-m", module, *kept])


def machine() -> dict[str, str]:
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else ""
    return {
        "processor": gpu or platform.processor() or platform.machine(), "python": platform.python_version(),
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


def _stage_row(stage: dict[str, Any]) -> Row:
    floor = stage["floor"]
    return {
        "task": stage["task"], "K": stage["K"], "stage": stage["name"], "ms": 1e3 * stage["seconds"],
        "floor ms": "-" if floor is None else 1e3 * floor, "% of floor": "-" if floor is None else 100 * floor / stage["seconds"],
    }  # fmt: skip


def _miniature() -> Checkpoint:
    return load_checkpoint(checkpoint_path(Config(model=ModelConfig("miniature"))))


if __name__ == "__main__":
    raise SystemExit(main())
