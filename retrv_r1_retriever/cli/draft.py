"""`retrv-r1 doctor --write-config`: a first `retrv.toml` for a collection that is there already."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from retrv_r1_retriever import config as settings
from retrv_r1_retriever._sync import run
from retrv_r1_retriever.cli.show import describe
from retrv_r1_retriever.cli.terminal import one_line, print_json, print_wrapped, terminal_width
from retrv_r1_retriever.errors import InputError, OptionsError, explain

if TYPE_CHECKING:
    from retrv_r1_retriever.drafting import Draft
    from retrv_r1_retriever.types import Candidate

SAMPLED, SHOWN = 64, 3


def write_config(args: argparse.Namespace, url: str, collection: str) -> int:
    """Nothing is written over, and nothing at all unless the draft can be read and maps documents."""
    from retrv_r1_retriever.drafting import draft
    from retrv_r1_retriever.qdrant import look_into

    path = Path(args.config)
    if path.exists():
        raise InputError(
            explain(str(path), expected="no such file yet", got="one", fix="Move it away, or pass --config OTHER.toml.")
        )
    payloads, vectors = look_into(collection, url, _api_key(args.api_key_env), SAMPLED)
    made = draft(payloads, vectors, f"collection {collection!r}")
    path.write_text(made.toml(url, collection, args.api_key_env), encoding="utf-8")
    try:
        store = settings.open_store(settings.read_config(path))
        try:
            samples = run(store.sample(SHOWN))
        finally:
            run(store.close())
    except BaseException:
        path.unlink()
        raise
    _print(args, path, made, vectors[made.vector], samples)
    return 0 if samples else 1


def _print(args: argparse.Namespace, path: Path, made: Draft, size: int, samples: list[Candidate]) -> None:
    if args.json:
        documents = [{"id": c.document.id, "content": describe(c.document.content)} for c in samples]
        print_json(
            {"config": str(path), "shape": made.shape, "vector_size": size, "samples": documents, **_fields(made)}
        )
        return
    print(f"wrote {path}: payload {made.shape}, vector {made.vector!r} of size {size}")
    for name, value in _fields(made).items():
        print(f"  {name:<6} {value if value is not None else '–'}")
    for note in made.notes:
        print_wrapped(f"  note   {note}", indent=9)
    print(f"{len(samples)} documents as the model will read them:")
    for candidate in samples:
        print(one_line(f"  {candidate.document.id}: {describe(candidate.document.content)}", terminal_width()))
    print_wrapped(
        "Searching needs the embedder these vectors were made with. The command line embeds with the checkpoint's own; in Python pass "
        "yours: RetrvR1Retriever(store=..., embedder=...). Next: retrv-r1 memory plan"
    )


def _fields(made: Draft) -> dict[str, Any]:
    return {"text": made.text, "image": made.image, "id": made.id}


def _api_key(name: str | None) -> str | None:
    if name is not None and name not in os.environ:
        raise OptionsError(
            explain(f"environment variable {name}", expected="the API key", got="nothing", fix="Set it.")
        )
    return None if name is None else os.environ[name]
