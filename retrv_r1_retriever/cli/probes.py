"""What `doctor` asks of servers: a model server by a tiny real request, a Qdrant by what lies in it."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from PIL import Image

from retrv_r1_retriever import config as settings
from retrv_r1_retriever._sync import run
from retrv_r1_retriever.cli.findings import Finding, guarded
from retrv_r1_retriever.config import Config

if TYPE_CHECKING:
    from retrv_r1_retriever.engines.chat import ChatEngine
    from retrv_r1_retriever.model.checkpoint import Manifest
    from retrv_r1_retriever.qdrant import QdrantStore


def model_server(config: Config) -> Iterator[Finding]:
    """The server of [engine], if it names one."""
    if config.engine.kind == "vllm":
        yield from _vllm(config)
    elif config.engine.kind == "chat":
        yield from _chat(config)


def _vllm(config: Config) -> Iterator[Finding]:
    engine, finding = guarded("engine", lambda: settings.open_vllm(config))
    if engine is None:
        yield finding or Finding("fail", "engine", "cannot be opened")
        return
    where = f"{config.engine.model} at {config.engine.base_url}"
    yield Finding("ok", "engine", f"{where}: vLLM {engine.versions['vllm']}, {engine.max_context:,} tokens")
    yield Finding("ok", "model server", "takes rows, pictures, 128 labels; has this checkpoint")
    share, finding = guarded("prefix cache", lambda: run(engine.cached_share()))
    if finding is not None:
        yield finding
    elif share is None:
        fix = "Start vLLM with --enable-prompt-tokens-details to see it."
        yield Finding("warn", "prefix cache", "the server does not say what it had cached, or had nothing", fix)
    elif share < 0.5:
        fix = "Every step of a thought reads its prompt again: start vLLM without --no-enable-prefix-caching."
        yield Finding("warn", "prefix cache", f"{share:.0%} of a prompt sent twice", fix)
    else:
        yield Finding("ok", "prefix cache", f"{share:.0%} of a prompt sent twice")
    run(engine.aclose())


def _chat(config: Config) -> Iterator[Finding]:
    """Whether the server answers, knows the model, and what a list of two is judged with."""
    names, finding = guarded("engine", lambda: run(settings.open_chat(config).models()))
    where = f"{config.engine.model} at {config.engine.base_url}"
    if finding is not None:
        yield finding
    elif names and config.engine.model not in names:
        yield Finding("fail", "engine", f"no {where}, but {', '.join(names[:5])}", "Fix model in [engine].")
    else:
        yield Finding("ok", "engine", where)
        yield _judging(settings.open_chat(config))


def _judging(engine: ChatEngine) -> Finding:
    from retrv_r1_retriever.options import RerankOptions
    from retrv_r1_retriever.reranker import RetrvR1Reranker
    from retrv_r1_retriever.types import Content, Document, Status

    square = io.BytesIO()
    Image.new("RGB", (64, 64), "red").save(square, "PNG")
    uri = "data:image/png;base64," + base64.b64encode(square.getvalue()).decode()
    documents = [Document("text", Content("a blue ring")), Document("picture", Content("a square", uri))]
    results = RetrvR1Reranker(engine, options=RerankOptions(think="never")).rerank("a red square", documents)
    run(engine.aclose())
    if results.status is Status.FALLBACK:
        return Finding("fail", "judging", results.reason or "no judgement")
    known = engine.known
    able = {"pictures": known.pictures, "log-probabilities": "logprobs" not in known.dropped}
    can, cannot = ([name for name, has in able.items() if has is wanted] for wanted in (True, False))
    detail = f"replies as {', '.join([known.format.replace('_', ' '), *can])}" + (
        f"; no {', no '.join(cannot)}" if cannot else ""
    )
    if results.reason:
        detail += f"; {results.reason}"
    if known.pictures and results.status is Status.RERANKED:
        return Finding("ok", "judging", detail)
    fix = "See docs/hosted-vlm.md." if known.pictures else "Take a vision-language model if documents have pictures."
    return Finding("warn", "judging", detail, fix)


def collection(config: Config, store: QdrantStore, manifest: Manifest | None) -> Iterator[Finding]:
    """Server, vectors and memories of a collection."""
    from retrv_r1_retriever.qdrant import look_at

    assert config.store.url is not None  # an open store has both
    assert config.store.collection is not None
    key = settings.api_key(config.store.api_key_env)
    seen, finding = guarded("qdrant", lambda: look_at(config.store.collection or "", config.store.url or "", key))
    if seen is None:
        yield finding or Finding("fail", "qdrant", "unreadable")
        return
    vectors = ", ".join(f"{name or 'unnamed'} {kind}" for name, kind in seen.vectors.items())
    yield Finding("ok", "qdrant", f"version {seen.version}, {config.store.collection}: {vectors}")
    if manifest is not None and config.engine.kind != "chat":
        yield _memories(store, manifest.memory_digest)


def _memories(store: Any, digest: str) -> Finding:
    sidecars, inside = run(store.sidecars.all()), store.spec.memory_digest
    found = [f"{inside} in the collection"] if inside else []
    found += [f"{one.digest} beside it ({one.points:,} points{', in use' if one.in_use else ''})" for one in sidecars]
    detail = f"checkpoint {digest}; {', '.join(found) or 'no memory'}"
    fitting = next((one for one in sidecars if one.digest == digest), None)
    if digest == inside or (fitting and fitting.in_use):
        return Finding("ok", "digests", detail)
    fix = "Run: retrv-r1 memory switch" if fitting else "Run: retrv-r1 memory build, then memory switch"
    return Finding("warn", "digests", detail, f"{fix}; until then memory is recomputed per query.")
