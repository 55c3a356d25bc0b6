"""Speed of the compressed prompt against the same model reading every candidate in full.

    python -m retrv_r1_retriever.bench

One thread, modes interleaved, minimum of several rounds; a ratio holds for this machine and this model only. Modes, all ending in
the direct read of K + 1 slots:

U   every candidate in full, its picture through the tower at query time
U'  every candidate in full, tower tokens cached: what is left of the difference is the language model's alone
P   two tokens per candidate, memory made at index time: how the retriever works

"candidates' part" is their tokens, labels included, compressed against full.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from PIL.Image import Image

from retrv_r1_retriever._sync import run
from retrv_r1_retriever.config import Config, ModelConfig, checkpoint_path
from retrv_r1_retriever.demo.catalogue import TASKS, pool_path, read_queries, write_catalogue
from retrv_r1_retriever.engines.local import LocalEngine
from retrv_r1_retriever.images import LocalImages, content_hash, load_content
from retrv_r1_retriever.model.checkpoint import load_checkpoint
from retrv_r1_retriever.options import RerankOptions
from retrv_r1_retriever.prompt import ANSWER_START, Prompt, build_full_prompt, build_prompt
from retrv_r1_retriever.readers import read_mbeir
from retrv_r1_retriever.reranker import RetrvR1Reranker
from retrv_r1_retriever.types import Candidate, Content, Document, Memory, Query

#: A timed call; returns the prompt tokens it read.
Mode = Callable[[], Awaitable[int]]
THINK = RerankOptions(think="always", timeout_s=None)


@dataclass(frozen=True, slots=True)
class Case:
    """One query with decoded candidates, memory and cached tower tokens."""

    task: str
    query: Query
    candidates: tuple[Candidate, ...]
    cached: tuple[Candidate, ...]


async def cases(engine: LocalEngine, folder: Path, k: int) -> list[Case]:
    """The first fine query of each task, with K candidates of the modality it asks for."""
    images = LocalImages(folder)
    documents = [d for d in read_mbeir(pool_path(folder, "test")) if isinstance(d, Document)]
    out = []
    for task in TASKS:
        labelled = next(q for q in read_queries(folder, "test", task) if q.stratum == "fine")
        content, _ = await load_content(images, labelled.query.content)
        chosen = [d for d in documents if d.metadata["modality"] == labelled.target_modality][:k]
        decoded = [(await load_content(images, d.content))[0] for d in chosen]
        memories = [
            Memory(c.rows, engine.memory_digest, content_hash(d), c.full_tokens)
            for d, c in zip(decoded, engine.compress(decoded), strict=True)
        ]
        candidates = tuple(
            Candidate(Document(d.id, c), None, i, m)
            for i, (d, c, m) in enumerate(zip(chosen, decoded, memories, strict=True), 1)
        )
        query = Query(content, labelled.query.instruction)
        out.append(Case(task, query, candidates, tuple(map(_with_cached_tower(engine), candidates))))
    return out


def _with_cached_tower(engine: LocalEngine) -> Callable[[Candidate], Candidate]:
    def cached(candidate: Candidate) -> Candidate:
        content = candidate.document.content
        if content.image is None:
            return candidate
        assert isinstance(content.image, Image)
        encoded = engine.encode_picture(content.image)
        return replace(candidate, document=replace(candidate.document, content=Content(content.text, encoded)))  # type: ignore[arg-type]

    return cached


async def direct_read(engine: LocalEngine, prompt: Prompt) -> int:
    """Prompt tokens read."""
    handle = await engine.open(prompt)
    try:
        await engine.probe(handle, ANSWER_START)
        return handle.prompt_tokens
    finally:
        await engine.close(handle)


async def interleaved(modes: dict[str, Mode], rounds: int) -> tuple[dict[str, float], dict[str, int]]:
    """Best seconds per mode over `rounds` passes through all modes in turn, after one warm-up pass; and each mode's result."""
    best = dict.fromkeys(modes, float("inf"))
    last = {name: await call() for name, call in modes.items()}
    for _ in range(rounds):
        for name, call in modes.items():
            started = time.perf_counter()
            last[name] = await call()
            best[name] = min(best[name], time.perf_counter() - started)
    return best, last


def measure(engine: LocalEngine, case: Case, rounds: int) -> dict[str, float | str]:
    modes: dict[str, Mode] = {
        "U": lambda: direct_read(engine, build_full_prompt(case.query, case.candidates)),
        "U'": lambda: direct_read(engine, build_full_prompt(case.query, case.cached)),
        "P": lambda: direct_read(engine, build_prompt(case.query, case.candidates)),
    }
    best, tokens = run(interleaved(modes, rounds))
    row: dict[str, float | str] = {"task": case.task, "K": len(case.candidates)}
    row |= {f"{name} tokens": tokens[name] for name in ("U", "P")}
    compressed = 3 * len(case.candidates)  # a label and two tokens each
    row["candidates' part, %"] = 100 * compressed / (tokens["U"] - tokens["P"] + compressed)
    row |= {f"{name} ms": 1e3 * seconds for name, seconds in best.items()}
    return row | {"U/P": best["U"] / best["P"], "U'/P": best["U'"] / best["P"]}


def outside_the_model(engine: LocalEngine, case: Case, rounds: int) -> tuple[float, float]:
    """(ms of a whole rerank call with thinking, ms of it outside the engine's forward passes), minimum of `rounds`."""
    reranker = RetrvR1Reranker(engine, options=THINK)
    best = (float("inf"), float("inf"))
    for _ in range(rounds + 1):
        before, started = engine.forward_seconds, time.perf_counter()
        reranker.rerank(case.query, case.candidates)
        whole = time.perf_counter() - started
        best = min(best, (1e3 * whole, 1e3 * (whole - (engine.forward_seconds - before))))
    return best


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", default="miniature")
    parser.add_argument("--dir", type=Path, default=Path("demo-data"))
    parser.add_argument("--top-k", type=int, nargs="+", default=[20, 50])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    write_catalogue(args.dir, ("test",))
    checkpoint = load_checkpoint(checkpoint_path(Config(model=ModelConfig(args.checkpoint))))
    engine = LocalEngine(checkpoint, max_batch_tokens=65536)
    rows = [measure(engine, c, args.rounds) for k in args.top_k for c in asyncio.run(cases(engine, args.dir, k))]
    names = list(rows[0])
    lines = ["| " + " | ".join(names) + " |", "|" + " --- |" * len(names)]
    lines += [
        "| " + " | ".join(f"{r[n]:.1f}" if isinstance(r[n], float) else str(r[n]) for n in names) + " |" for r in rows
    ]
    sys.stdout.write("\n".join(lines) + "\n\n")
    for case in asyncio.run(cases(engine, args.dir, 20)):
        whole, outside = outside_the_model(engine, case, args.rounds)
        sys.stdout.write(
            f"{case.task}: rerank with thinking {whole:.0f} ms, of it outside the model {outside:.1f} ms\n"
        )
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
