"""`retrv-r1 doctor`: is everything there, does it fit together, and what to change."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from retrv_r1_retriever import config as settings
from retrv_r1_retriever._sync import run
from retrv_r1_retriever.cli.draft import write_config
from retrv_r1_retriever.cli.findings import Finding, guarded
from retrv_r1_retriever.cli.probes import collection, model_server
from retrv_r1_retriever.cli.search import load_config
from retrv_r1_retriever.cli.show import describe
from retrv_r1_retriever.cli.terminal import one_line, print_json, print_wrapped, printable, terminal_width
from retrv_r1_retriever.config import Config
from retrv_r1_retriever.errors import RetrvR1Error
from retrv_r1_retriever.images import content_hash

if TYPE_CHECKING:
    from retrv_r1_retriever.model.checkpoint import Manifest

LIBRARIES = {
    "numpy": None,
    "pillow": None,
    "qdrant-edge-py": "edge",
    "qdrant-client": "qdrant",
    "httpx": "http",
    "torch": "local",
    "transformers": "local",
    "safetensors": "local",
}
SAMPLE = 5
BUILD = "Run `retrv-r1 memory build` and `memory switch`, or index again; until then it is recomputed per query."
#: Licences that do not allow commercial use, by a part of their name.
RESTRICTED = ("research", "non-commercial", "noncommercial", "cc-by-nc")


def add(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--write-config", nargs=2, metavar=("URL", "COLLECTION"),
        help="draft the config file for a collection on a Qdrant server, from what lies in it",
    )  # fmt: skip
    parser.add_argument("--api-key-env", metavar="NAME", help="environment variable with the server's API key")
    parser.set_defaults(run=main)


def main(args: argparse.Namespace) -> int:
    if args.write_config:
        return write_config(args, *args.write_config)
    findings = list(_findings(args))
    if args.json:
        print_json([{"level": f.level, "name": f.name, "detail": f.detail, "fix": f.fix} for f in findings])
    else:
        for finding in findings:
            _print(finding)
    return 1 if any(f.level == "fail" for f in findings) else 0


def _print(finding: Finding) -> None:
    head, room = f"{finding.level:<4}  {finding.name:<14}  ", terminal_width() - 22
    if finding.level == "ok":
        print(head + one_line(finding.detail, room))
        return
    print_wrapped(head + printable(". ".join(filter(None, (finding.detail, finding.fix)))), indent=len(head))


def _findings(args: argparse.Namespace) -> Iterator[Finding]:
    yield Finding("ok", "python", sys.version.split()[0])
    yield from _libraries()
    config, finding = guarded("config", lambda: load_config(args))
    if finding or config is None:
        yield finding or Finding("fail", "config", "unreadable")
        return
    where = args.config if Path(args.config).exists() else f"none at {args.config}: defaults"
    yield Finding("ok", "config", f"{where}; top_k {config.rerank.top_k}, think {config.rerank.think}")
    manifest, finding = guarded("checkpoint", lambda: _manifest(config))
    if manifest is None:
        yield finding or Finding("fail", "checkpoint", "unreadable")
    else:
        yield from _checkpoint(config, manifest)
    yield from model_server(config)
    yield from _images(config)
    yield from _store(config, manifest)


def _libraries() -> Iterator[Finding]:
    for name, extra in LIBRARIES.items():
        try:
            yield Finding("ok", name, version(name))
        except PackageNotFoundError:
            yield Finding("warn", name, "not installed", f"If needed: pip install 'retrv-r1-retriever[{extra}]'")


def _manifest(config: Config) -> Manifest:
    from retrv_r1_retriever.model.checkpoint import read_manifest

    return read_manifest(Path(settings.checkpoint_path(config)))


def _checkpoint(config: Config, manifest: Manifest) -> Iterator[Finding]:
    yield Finding("ok", "checkpoint", f"{settings.checkpoint_path(config)}, digest {manifest.checkpoint_digest}")
    licence = manifest.licence or "not stated"
    restricted = not manifest.licence or any(word in licence.lower() for word in RESTRICTED)
    fix = "Check the licence of the base before commercial use." if restricted else ""
    yield Finding("warn" if restricted else "ok", "base", f"{manifest.base}, licence {licence}", fix)
    if config.engine.kind == "chat":
        return  # the checkpoint only embeds then
    shortest = manifest.trained_min_k or manifest.trained_top_k
    if manifest.trained_top_k and not shortest <= config.rerank.top_k <= manifest.trained_top_k:
        detail = f"top_k {config.rerank.top_k}, but trained with lists of {shortest} to {manifest.trained_top_k}"
        yield Finding(
            "warn", "top_k", detail, f"Set top_k = {manifest.trained_top_k} in [rerank], or measure: retrv-r1 eval"
        )
    if not manifest.direct_read:
        fix = (
            "Keep think = 'always', or 'auto', which then always thinks; a thought that runs out of time is a fallback"
        )
        yield Finding("warn", "direct read", "not trained in this checkpoint: think = 'never' orders by chance", fix)
    if manifest.think_margin is None and config.rerank.think_margin is None and config.rerank.think == "auto":
        yield Finding("ok", "think", "auto without a calibrated margin: it always thinks")


def _images(config: Config) -> Iterator[Finding]:
    root = config.path(config.images.root)
    if root.is_dir():
        yield Finding("ok", "images", f"root {root}")
    else:
        yield Finding("fail", "images", f"root {root} is no folder", "Set root in [images].")


def _store(config: Config, manifest: Manifest | None) -> Iterator[Finding]:
    store, finding = guarded("store", lambda: settings.open_store(config))
    if store is None:
        yield finding or Finding("fail", "store", "cannot be opened")
        return
    try:
        if manifest is not None and store.spec.embedder not in (None, manifest.embedder_digest or None):
            yield Finding(
                "fail", "embedder", f"vectors of {store.spec.embedder}, checkpoint has {manifest.embedder_digest or 'none'}",
                "Use the checkpoint the store was made with, or index into a new one.",
            )  # fmt: skip
        count = run(store.count())
        if count == 0:
            yield Finding("fail", "store", "opened, but empty", "Run: retrv-r1 index SOURCE")
            return
        yield Finding("ok", "store", f"{count:,} documents")
        if config.store.kind == "qdrant":
            yield from collection(config, store, manifest)
        sample = run(store.sample(SAMPLE))
        if not sample:
            yield Finding("fail", "payload", "no document could be read", "Check text and image in [store].")
        for candidate in sample:
            document = candidate.document
            yield Finding("ok", "payload", f"{document.id}: {describe(document.content)}")
        if manifest is not None and config.engine.kind != "chat":
            yield _memory([c.document.id for c in sample], store, manifest)
    except RetrvR1Error as error:
        yield Finding("fail", "store", str(error))
    finally:
        run(store.close())


def _memory(ids: list[str], store: Any, manifest: Manifest) -> Finding:
    digest = manifest.memory_digest
    found = run(store.get(ids))
    stored = [(c.memory, content_hash(c.document.content)) for c in found if c.memory is not None]
    fitting = sum(memory.digest == digest for memory, _ in stored)
    changed = sum(memory.content_hash != present for memory, present in stored)
    if changed:
        return Finding("warn", "memory", f"{changed} of {len(ids)} sampled documents changed since it was made", BUILD)
    if fitting == len(ids):
        return Finding("ok", "memory", f"digest {digest} on all {len(ids)} sampled documents")
    detail = f"{fitting} of {len(ids)} sampled documents have memory {digest}; {len(stored) - fitting} have another"
    return Finding("warn", "memory", detail, BUILD)
