"""`retrv-r1 index`: a folder, a JSONL or an M-BEIR candidate pool into the store of the config."""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import os
import sys
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

from retrv_r1_retriever import config as settings
from retrv_r1_retriever._arguments import at_least_one
from retrv_r1_retriever._sync import run
from retrv_r1_retriever.cli.search import load_config
from retrv_r1_retriever.cli.terminal import Progress, print_json, print_wrapped, printable
from retrv_r1_retriever.config import Config
from retrv_r1_retriever.errors import InputError, explain
from retrv_r1_retriever.types import Content, Document

if TYPE_CHECKING:
    from retrv_r1_retriever.indexing import IndexReport, Row

FAILURES_SHOWN = 10


def add(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", type=Path, help="folder of pictures and .txt files, JSONL, or M-BEIR candidate JSONL")
    parser.add_argument("--store", metavar="FOLDER", help="index folder (default: [store] path of the config)")
    parser.add_argument(
        "--images", metavar="FOLDER", help="what picture paths are relative to (default: found from the source)"
    )
    parser.add_argument(
        "--force",
        action="store_true",
        help="write again what looks unchanged, e.g. after replacing pictures under the same names",
    )
    parser.add_argument("--batch-size", type=at_least_one, default=32, metavar="N")
    parser.add_argument(
        "--filter-field",
        action="append",
        default=[],
        metavar="FIELD",
        help="make searches that filter by it fast; repeatable",
    )
    parser.set_defaults(run=main)


def main(args: argparse.Namespace) -> int:
    from retrv_r1_retriever.indexing import Indexer

    config = _config(args)
    total, rows = _rows(args.source, config)
    rows = _not_empty(rows, args.source)
    progress = Progress()
    engine = settings.open_engine(config) if config.engine.kind != "chat" else None  # a chat model reads no memory
    embedder = settings.open_embedder(config)
    store = settings.open_store(config, settings.collection_spec(engine, embedder))

    if not Path(args.config).exists():
        _write_config(Path(args.config), config)

    def show(report: IndexReport) -> None:
        progress("indexing", report.indexed + report.skipped + len(report.failed), total)

    try:
        indexer = Indexer(
            store, embedder, engine, settings.open_images(config), batch_size=args.batch_size, progress=show
        )
        report = indexer.index(rows, force=args.force)
        if count := run(store.count()):
            with contextlib.suppress(InputError):  # the documents' own field of that name may be of any kind
                run(store.index_fields("modality"))
            run(store.index_fields(*args.filter_field))
    except KeyboardInterrupt:
        print("stopped: what was written stays; the same command goes on from there", file=sys.stderr)
        raise
    finally:
        run(store.close())
    _print(args, report, count)
    return 1 if report.failed and not report.indexed + report.skipped else 0


def _print(args: argparse.Namespace, report: IndexReport, count: int) -> None:
    if args.json:
        failed = [{"id": f.id, "reason": f.reason} for f in report.failed]
        print_json(
            {
                "indexed": report.indexed,
                "skipped": report.skipped,
                "failed": failed,
                "cut": report.cut,
                "documents": count,
                "seconds": round(report.seconds, 3),
            }
        )
        return
    print(
        f"{report.indexed:,} indexed, {report.skipped:,} unchanged, {len(report.failed):,} failed "
        f"in {report.seconds:.1f} s; {count:,} documents in the store"
    )
    if report.cut:
        print(f"  {report.cut:,} texts are longer than the model reads; their ends are not in its memory")
    for failure in report.failed[:FAILURES_SHOWN]:
        print_wrapped(f"  failed: {' '.join(printable(failure.reason).split())}", indent=10)
    if len(report.failed) > FAILURES_SHOWN:
        print(f"  ... and {len(report.failed) - FAILURES_SHOWN} more (--json lists all)")


def _not_empty(rows: Iterable[Row], source: Path) -> Iterable[Row]:
    """The same rows. Raises `InputError` if there are none, before a model is loaded or a folder or config is made."""
    rows = iter(rows)
    first = next(rows, None)
    if first is None:
        expected = "pictures or .txt files" if source.is_dir() else "documents, one a line"
        raise InputError(explain(str(source), expected=expected, got="none", fix="Fix the path."))
    return itertools.chain([first], rows)


def _config(args: argparse.Namespace) -> Config:
    """The config file, with what the command line says; without one, what is to be written into a new one."""
    path = Path(args.config)
    if path.exists():
        config = load_config(args)
        root = args.images
    else:
        config = Config(folder=path.parent.resolve())
        root = args.images or _guess_root(args.source)
    if args.store:
        config = replace(config, store=replace(config.store, path=os.path.relpath(args.store, config.folder)))
    if root:
        config = replace(config, images=replace(config.images, root=os.path.relpath(root, config.folder)))
    return config


def _write_config(path: Path, config: Config) -> None:
    """So that later commands find what this one made, with lists as long as the model was trained on."""
    from retrv_r1_retriever.model.checkpoint import read_manifest

    trained = read_manifest(Path(settings.checkpoint_path(config))).trained_top_k
    path.write_text(
        "# Written by `retrv-r1 index`; every key is explained in docs/config.md.\n"
        f"[store]\npath = {json.dumps(config.store.path)}\n\n[images]\nroot = {json.dumps(config.images.root)}\n"
        + (f"\n[rerank]\ntop_k = {trained}\n" if trained else ""),
        encoding="utf-8",
    )


def _guess_root(source: Path) -> Path:
    """What the source's picture paths are relative to: the folder itself, or the nearest one above a JSONL that holds the first."""
    if source.is_dir():
        return source
    try:
        with source.open(encoding="utf-8-sig") as file:
            rows = [json.loads(line) for line in (next(file, "") for _ in range(100)) if line.strip()]
    except (OSError, ValueError):
        rows = []  # reading it for real says what is wrong
    named = (row.get("image") or row.get("img_path") for row in rows if isinstance(row, dict))
    picture = next((name for name in named if isinstance(name, str) and not name.startswith("data:")), None)
    above = [source.resolve().parent, *source.resolve().parent.parents]
    return next((folder for folder in above if picture and (folder / picture).is_file()), above[0])


def _rows(source: Path, config: Config) -> tuple[int | None, Iterable[Row]]:
    """How many there will be, if that is cheap to know, and the documents with their modality as a field to filter by."""
    from retrv_r1_retriever.readers import read_folder, read_jsonl, read_mbeir

    if source.is_dir():
        root = config.path(config.images.root).resolve()
        if not source.resolve().is_relative_to(root):
            raise InputError(
                explain(
                    str(source),
                    expected=f"a folder below [images] root = {root}",
                    got=str(source.resolve()),
                    fix=f"Set root = {json.dumps(str(source.resolve()))} in {config.folder / settings.FILE_NAME}, or pass --images.",
                )
            )
        inside = PurePosixPath(source.resolve().relative_to(root).as_posix())
        return None, _with_modality(read_folder(source), inside)
    rows = read_mbeir(source) if _is_mbeir(source) else read_jsonl(source)
    with source.open("rb") as file:
        total = sum(1 for line in file if line.strip())
    return total, _with_modality(rows, PurePosixPath())


def _is_mbeir(source: Path) -> bool:
    try:
        with source.open(encoding="utf-8-sig") as file:
            return "did" in json.loads(next((line for line in file if line.strip()), "{}"))
    except (OSError, ValueError, TypeError):
        return False


def _with_modality(rows: Iterable[Row], inside: PurePosixPath) -> Iterator[Row]:
    """inside: from the images' root to what the rows' picture paths are relative to"""
    for row in rows:
        if not isinstance(row, Document):
            yield row
            continue
        text, image = row.content.text, row.content.image
        if isinstance(image, str) and inside.parts:
            image = (inside / image).as_posix()
        modality = ",".join(name for name, part in (("image", image), ("text", text)) if part)
        yield replace(row, content=Content(text, image), metadata={"modality": modality, **row.metadata})
