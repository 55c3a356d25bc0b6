"""`retrv-r1 memory`: candidate memory beside a collection, from estimate to clean-up."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from retrv_r1_retriever import config as settings
from retrv_r1_retriever._arguments import at_least_one
from retrv_r1_retriever._sync import run
from retrv_r1_retriever.cli.search import load_config
from retrv_r1_retriever.cli.terminal import Progress, one_line, print_json, print_table, terminal_width
from retrv_r1_retriever.config import Config
from retrv_r1_retriever.errors import OptionsError, StoreError, explain

if TYPE_CHECKING:
    from retrv_r1_retriever.sidecar import Sidecars
    from retrv_r1_retriever.sidecar_build import BuildReport, MemoryBuilder, MemoryPlan

FAILURES_SHOWN = 10
ORPHAN_PAGE = 1000


def add(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "action",
        choices=list(ACTIONS),
        help="plan: what a build will take, nothing is written; build: make it; switch: use it; drop: list what is no "
        "longer needed, and with --yes delete it",
    )
    parser.add_argument("--shard", default="1/1", metavar="I/N", help="build: only part I of N; plan: with N processes")
    parser.add_argument("--sample", type=at_least_one, default=32, metavar="N", help="plan: documents measured")
    parser.add_argument("--batch-size", type=at_least_one, default=32, metavar="N")
    parser.add_argument("--digest", help="switch, drop: this memory (default: the checkpoint's)")
    parser.add_argument("--force", action="store_true", help="switch: although documents have no memory yet")
    parser.add_argument("--yes", action="store_true", help="drop: delete what is listed")
    parser.set_defaults(run=main)


def main(args: argparse.Namespace) -> int:
    config = load_config(args)
    if args.action in ("build", "switch", "drop") and config.store.read_only:
        raise OptionsError(
            explain(f"memory {args.action}", expected="a store that may be written to", got="read_only = true",
                    fix="Leave read_only out of [store]; the collection itself is never written to.")
        )  # fmt: skip
    store = settings.open_store(config)
    try:
        return ACTIONS[args.action](args, config, store)
    finally:
        run(store.close())


def plan(args: argparse.Namespace, config: Config, store: Any) -> int:
    from retrv_r1_retriever.sidecar_build import Shard

    shard = Shard.parse(args.shard)
    made = run(_builder(args, config, store).plan(run(store.count()), sample=args.sample))
    hours = made.total_seconds / 3600 / shard.count
    end = time.strftime("%Y-%m-%d %H:%M", time.localtime(time.time() + made.total_seconds / shard.count))
    top_k = config.rerank.top_k
    if args.json:
        print_json(
            {
                "documents": made.documents, "present": made.present, "sampled": made.sampled,
                "unreadable": made.unreadable, "reason": made.reason,
                "gigabytes": made.total_bytes / 1e9, "hours": hours, "processes": shard.count, "end": end,
                "rest_bytes_per_query": made.json_bytes * top_k, "grpc_bytes_per_query": made.grpc_bytes * top_k,
            }
        )  # fmt: skip
    else:
        _print_plan(made, hours, end, shard.count, top_k)
        if config.store.kind == "qdrant":
            _print_transport(made, top_k)
    return 0 if made.unreadable < made.sampled else 1


def _print_plan(made: MemoryPlan, hours: float, end: str, processes: int, top_k: int) -> None:
    print(f"documents   {made.documents:,}, of which {made.present:,} have memory of this checkpoint")
    if made.unreadable:
        print(f"unreadable  {made.unreadable} of {made.sampled} sampled. The first: {made.reason}")
    print(f"size        {_bytes(made.total_bytes)} ({made.bytes:,.0f} bytes a document)")
    print(f"time        {_hours(hours)} with {processes} process{'es' * (processes > 1)} like this one "
          f"({made.seconds * 1000:,.1f} ms a document, measured on {made.sampled})")  # fmt: skip
    print(f"end         {end} if started now")
    print("Nothing was written.")


def _print_transport(made: MemoryPlan, top_k: int) -> None:
    rest, grpc = made.json_bytes * top_k, made.grpc_bytes * top_k
    print(f"per query   {_bytes(rest)} over REST, {_bytes(grpc)} over gRPC (top_k {top_k})")
    if rest > 1e6:
        print("warning     that is heavy for REST: open the server's gRPC port (6334), or lower top_k")


def build(args: argparse.Namespace, config: Config, store: Any) -> int:
    from retrv_r1_retriever.sidecar_build import Shard

    shard, builder, total = Shard.parse(args.shard), _builder(args, config, store), run(store.count())
    progress = Progress()

    def show(report: BuildReport) -> None:
        progress(f"memory {args.shard}", report.seen, total)

    report = run(builder.build(shard, progress=show))
    digest = builder.compressor.memory_digest
    if args.json:
        failed = [{"id": f.id, "reason": f.reason} for f in report.failed]
        print_json(
            {"digest": digest, "written": report.written, "current": report.current, "failed": failed,
             "seconds": round(report.seconds, 3)}
        )  # fmt: skip
    else:
        print(f"memory {digest}: {report.written:,} written, {report.current:,} there already, "
              f"{len(report.failed):,} failed, {report.seconds:,.1f} s")  # fmt: skip
        for failure in report.failed[:FAILURES_SHOWN]:
            print(one_line(f"  {failure.id}: {failure.reason}", terminal_width()))
        print("Use it with: retrv-r1 memory switch")
    return 1 if report.failed and not report.written + report.current else 0


def switch(args: argparse.Namespace, config: Config, store: Any) -> int:
    digest = args.digest or _checkpoint_digest(config)
    sidecars: Sidecars = store.sidecars
    before, total = run(sidecars.in_use()), run(store.count())
    points = next((one.points for one in run(sidecars.all()) if one.digest == digest), 0)
    if 0 < points < total and not args.force:
        raise StoreError(
            explain(f"memory {digest}", expected=f"{total:,} documents", got=f"{points:,} of them",
                    fix="Run `retrv-r1 memory build` to the end, or pass --force: the rest is then made per query.")
        )  # fmt: skip
    run(sidecars.switch(digest))
    if args.json:
        print_json({"before": before, "in_use": digest, "points": points, "documents": total})
    else:
        print(f"in use: memory {digest}, {points:,} of {total:,} documents (before: {before or 'none'})")
        if before not in (None, digest):
            print(f"Back with: retrv-r1 memory switch --digest {before}")
    return 0


def drop(args: argparse.Namespace, config: Config, store: Any) -> int:
    """Sidecars that are neither in use nor of the present checkpoint, and memory of deleted documents in the others."""
    sidecars: Sidecars = store.sidecars
    kept = _checkpoint_digest(config) if args.digest is None else None
    rows, dropped, orphans = [], [], {}
    for one in run(sidecars.all()):
        if one.digest == args.digest or (args.digest is None and not one.in_use and one.digest != kept):
            dropped.append(one.digest)
            rows.append([one.digest, f"{one.points:,}", "all: not in use"])
            continue
        orphans[one.digest] = [] if args.digest else run(_orphans(sidecars, one.digest))
        gone = len(orphans[one.digest])
        rows.append([one.digest, f"{one.points:,}", f"{gone:,} of deleted documents" if gone else "nothing"])
    if args.digest is not None and args.digest not in dropped:
        raise StoreError(explain("--digest", expected="memory beside this collection", got=args.digest, fix="Fix it."))
    if args.yes:
        for digest in dropped:
            run(sidecars.drop(digest))
        for digest, ids in orphans.items():
            for start in range(0, len(ids), ORPHAN_PAGE):
                run(sidecars.forget(digest, ids[start : start + ORPHAN_PAGE]))
    if args.json:
        print_json(
            {"dropped": dropped, "orphans": {d: len(ids) for d, ids in orphans.items() if ids}, "deleted": args.yes}
        )
    else:
        print_table(["memory", "points", "deleted" if args.yes else "to delete"], rows)
        if not args.yes and (dropped or any(orphans.values())):
            print("Nothing was deleted: pass --yes.")
    return 0


async def _orphans(sidecars: Sidecars, digest: str) -> list[str]:
    found, following = await sidecars.orphans(digest, None, ORPHAN_PAGE)
    while following is not None:
        more, following = await sidecars.orphans(digest, following, ORPHAN_PAGE)
        found += more
    return found


ACTIONS: dict[str, Callable[[argparse.Namespace, Config, Any], int]] = {
    "plan": plan,
    "build": build,
    "switch": switch,
    "drop": drop,
}


def _builder(args: argparse.Namespace, config: Config, store: Any) -> MemoryBuilder:
    from retrv_r1_retriever.sidecar_build import MemoryBuilder

    engine, images = settings.open_engine(config), settings.open_images(config)
    return MemoryBuilder(store.sidecars, engine, images, batch_size=args.batch_size)


def _checkpoint_digest(config: Config) -> str:
    from retrv_r1_retriever.model.checkpoint import read_manifest

    return read_manifest(Path(settings.checkpoint_path(config))).memory_digest


def _bytes(count: float) -> str:
    for size, name in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if count >= size:
            return f"{count / size:,.2f} {name}"
    return f"{count:,.0f} bytes"


def _hours(hours: float) -> str:
    for size, name in ((1.0, "hours"), (1 / 60, "minutes")):
        if hours >= size:
            return f"{hours / size:,.1f} {name}"
    return f"{hours * 3600:,.1f} seconds"
