"""What a list costs the client of a vLLM server, beside HTTP: milliseconds of one thread, and bytes on the wire.

    python -m retrv_r1_retriever.bench.client --hidden 3584 --top-k 50

Everything that `VllmEngine` does is timed but the socket and the server: tokenising, the compression module, rows into base64, the
request's JSON, the answer's JSON. Memory is there already, as it is for an indexed collection. Weights are random, which costs the
same; the tokenizer is the miniature's. Times are the fastest of several rounds.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from retrv_r1_retriever.bench.floors import Counts, measure_ceiling
from retrv_r1_retriever.bench.shapes import Shape, random_checkpoint
from retrv_r1_retriever.engines.vllm import VllmEngine
from retrv_r1_retriever.engines.vllm.engine import Handle
from retrv_r1_retriever.http import JsonHttp
from retrv_r1_retriever.model.checkpoint import save_checkpoint
from retrv_r1_retriever.model.configuration import IcmConfig
from retrv_r1_retriever.prompt import ANSWER_START, THINK_END, Prompt, build_prompt
from retrv_r1_retriever.session import GenerateParams
from retrv_r1_retriever.trace import Forced, Text
from retrv_r1_retriever.types import Candidate, Content, Document, Memory, Query

WORDS = ("red", "two", "ring", "dots")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--hidden", type=int, default=3584, help="width of the language model (default: 3584, the 7B's)"
    )
    parser.add_argument("--top-k", type=int, default=50)
    parser.add_argument("--query-words", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--json", action="store_true", help="one line of JSON")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        engine = make_engine(Path(folder), args.hidden)
        found = asyncio.run(measure(engine, task(engine, args.top_k, args.query_words), args.rounds))
    found = {"hidden": args.hidden, "top_k": args.top_k, "rounds": args.rounds} | found
    sys.stdout.write(json.dumps(found) + "\n" if args.json else describe(found))
    return 0


def describe(found: dict[str, Any]) -> str:
    size = f"K = {found['top_k']}, width {found['hidden']:,}, {found['query tokens']} query tokens"
    lines = [f"{size}; one thread, fastest of {found['rounds']}"]
    for step, words in (
        ("open", "make the list"),
        ("direct read", "make it and ask once"),
        ("step", "one step of a thought"),
    ):
        lines.append(f"{words:<22} {found[step]['ms']:6.2f} ms, {found[step]['cpu ms']:.2f} of the processor")
    lines.append(f"{'request':<22} {found['bytes']:,} bytes")
    lines.append(
        f"{'floor of a list':<22} {found['floor ms']:6.2f} ms: the module's multiplications at this machine's matmul rate"
    )
    return "\n".join(lines) + "\n"


@dataclass
class Canned(JsonHttp):
    """Requests made whole and dropped, answers ready: what is left of HTTP is nothing."""

    answer: bytes = b""
    sizes: list[int] = field(default_factory=list)

    def __init__(self) -> None:
        super().__init__("http://127.0.0.1:9/v1")
        self.answer, self.sizes = b"", []

    async def _call(
        self, method: str, path: str, body: bytes | None, *, idempotent: bool, headers: Mapping[str, str] | None = None
    ) -> Any:
        self.sizes.append(len(body or b""))
        return json.loads(self.answer)


def make_engine(folder: Path, hidden: int) -> VllmEngine:
    """On a checkpoint of that width in bfloat16, with one small layer: the client reads none."""
    heads = max(1, hidden // 128)
    text = {
        "hidden_size": hidden, "num_hidden_layers": 1, "num_attention_heads": heads, "num_key_value_heads": 1, "intermediate_size": 64,
        "vocab_size": 1024, "max_position_embeddings": 32768,
        "rope_parameters": {"rope_type": "default", "mrope_section": [16, 24, 24], "rope_theta": 1e6},
    }  # fmt: skip
    vision = {
        "depth": 1, "hidden_size": 32, "intermediate_size": 32, "num_heads": 2, "patch_size": 8, "window_size": 64,
        "fullatt_block_indexes": [0],
    }  # fmt: skip
    made = random_checkpoint(Shape(text, vision, 64, 8, 16, IcmConfig.fast()), "cpu")
    save_checkpoint(folder, made.model, made.processor, made.manifest, dtype=torch.bfloat16)
    engine = VllmEngine(folder, base_url="http://127.0.0.1:9/v1", model="random", check=False)
    engine._server.http = Canned()
    return engine


def task(engine: VllmEngine, top_k: int, words: int) -> Prompt:
    rng, noise = random.Random(0), np.random.default_rng(0)
    rows, width = engine.memory_shape
    candidates = [
        Candidate(
            Document(str(i), Content("x")),
            None,
            i + 1,
            Memory(noise.standard_normal((rows, width)).astype(np.float16), engine.memory_digest, "", 344),
        )
        for i in range(top_k)
    ]
    return build_prompt(Query.of(" ".join(rng.choices(WORDS, k=words)), instruction="find it"), candidates)


async def measure(engine: VllmEngine, prompt: Prompt, rounds: int) -> dict[str, Any]:
    http = engine._server.http
    assert isinstance(http, Canned)
    slots = [engine._processor.token_id(slot) for slot in prompt.slots]
    words = engine._processor.tokenise(" ".join(WORDS * 25))

    async def opened() -> Handle:
        return await engine.open(prompt)

    async def direct() -> None:
        handle = await opened()
        http.answer = answer(handle.prompt_tokens + 1, [slots[0]], slots)
        await engine.probe(handle, ANSWER_START)

    thinking = await opened()
    await engine.append(thinking, [Forced("<think>")])
    parts, recent, position = list(thinking.parts), thinking.recent, thinking.next_position

    async def step() -> None:
        thinking.parts[:], thinking.recent, thinking.next_position = parts, recent, position
        http.answer = answer(sum(part.count for part in parts), words, [engine._keep_id])
        await engine.generate(thinking, GenerateParams((THINK_END,), len(words)))

    asked = sum(len(engine._processor.tokenise(s.text)) for s in prompt.segments if isinstance(s, Text) and s.query)
    out: dict[str, Any] = {"open": await best(opened, rounds), "direct read": await best(direct, rounds)}
    out |= {"bytes": http.sizes[-1], "step": await best(step, rounds), "query tokens": asked}
    return out | {"floor ms": floor_ms(engine, len(prompt.candidates), asked)}


def floor_ms(engine: VllmEngine, top_k: int, asked: int) -> float:
    """Of the module's two tokens alone, with attention to the query as it is written, not folded."""
    work = Counts(engine.wire._model.config, 4).compression(top_k, engine.memory_shape[0], asked)
    return round(1e3 * measure_ceiling(torch.device("cpu"), torch.float32).floor(work), 2)


async def best(call: Callable[[], Awaitable[object]], rounds: int) -> dict[str, float]:
    """Milliseconds of the fastest round, and of the one that took the least time of the processor."""
    found = [float("inf")] * 2
    for _ in range(rounds):
        started = time.perf_counter(), time.process_time()
        await call()
        took = time.perf_counter() - started[0], time.process_time() - started[1]
        found = [min(pair) for pair in zip(found, took, strict=True)]
    return {name: round(1e3 * seconds, 2) for name, seconds in zip(("ms", "cpu ms"), found, strict=True)}


def answer(prompt_tokens: int, ids: Sequence[int], read: Sequence[int]) -> bytes:
    """As vLLM's."""
    tops = [{"token": f"token_id:{i}", "logprob": -1.5, "bytes": None} for i in read]
    places = [{"token": f"token_id:{i}", "logprob": -0.5, "bytes": None, "top_logprobs": tops} for i in ids]
    choice = {"token_ids": list(ids), "logprobs": {"content": places}, "message": {"content": "..."}}
    return json.dumps(
        {"choices": [choice], "usage": {"prompt_tokens": prompt_tokens, "completion_tokens": len(ids)}}
    ).encode()


if __name__ == "__main__":
    raise SystemExit(main())
