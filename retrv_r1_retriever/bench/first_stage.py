"""The embedded first stage at size: recall against the exact answer, latency, memory, disk and the time to build.

    python -m retrv_r1_retriever.bench.first_stage --points 100000 --out first-stage.json

Vectors are synthetic and clustered: `points / 100` centres drawn around `points / 10000` broader ones in a latent space of 48 dimensions
whose variance falls as 1 / rank, each point a draw around a centre, mapped to 256 dimensions by one random rotation and normalised.
Queries are further draws around the same centres, none of them stored. Uniform vectors would be a bad model: in 256 dimensions all
of them lie equally far from any query, so that the fifty nearest are fifty by chance, no graph finds its way to them, and every bit
that quantization drops costs recall. What real embeddings have is few directions that matter and neighbours that are near.

Each setting is built in a process of its own, opened again in another, and searched by one thread. Behind a filter a graph is searched
both ways: along the graph, and exactly among what the filter leaves, which is what `EdgeStore` does.
"""

from __future__ import annotations

import argparse
import json
import platform
import resource
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from importlib.metadata import version
from multiprocessing import get_context
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import qdrant_edge as edge
from numpy.typing import NDArray

from retrv_r1_retriever._arguments import whole
from retrv_r1_retriever.bench.machine import processor

DIM, LATENT, TOP_K, BATCH = 256, 48, 50, 1000
TIE = 1e-6  # of a cosine: two sums of 256 products in float32 differ by less, and either order is right
#: Share of the points that a filter leaves: payload `share` is 0 for one point in a hundred, 1 for the next nine, else 2.
FILTERS: dict[str, list[int]] = {"": [], "10 %": [0, 1], "1 %": [0]}
Floats = NDArray[np.float32]
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Setting:
    """graph: HNSW is built (`EdgeStore.optimize`); quantization: "int8", "turbo4" or none; oversampling: found by codes, then rescored"""

    name: str
    graph: bool
    quantization: str = ""
    oversampling: float = 1.0
    payload_index: bool = False


SETTINGS = (
    Setting("scan", False),
    Setting("HNSW", True),
    Setting("HNSW, payload index", True, payload_index=True),
    Setting("HNSW, int8", True, "int8", 2.0),
    Setting("HNSW, TurboQuant 4 bit", True, "turbo4", 2.0),
)


class Clusters:
    """points: rows of the collection; block(start) is the same in every process."""

    def __init__(self, points: int, seed: int = 0) -> None:
        rng = np.random.default_rng(seed)
        self.points, self._seed = points, seed
        self._scale = (1 / np.sqrt(np.arange(1, LATENT + 1))).astype(np.float32)
        broad = rng.standard_normal((max(2, points // 10_000), LATENT), dtype=np.float32)
        count = max(4, points // 100)
        near = broad[rng.integers(len(broad), size=count)]
        self._centres = near + 0.7 * rng.standard_normal((count, LATENT), dtype=np.float32)
        self._turn = np.linalg.qr(rng.standard_normal((DIM, LATENT)))[0].T.astype(np.float32)

    def block(self, start: int, count: int = BATCH) -> Floats:
        """Rows start .. start + count."""
        return self._draw(np.random.default_rng((self._seed, 1, start)), min(count, self.points - start))

    def queries(self, count: int) -> Floats:
        return self._draw(np.random.default_rng((self._seed, 2)), count)

    def blocks(self) -> Iterator[tuple[int, Floats]]:
        for start in range(0, self.points, BATCH):
            yield start, self.block(start)

    def _draw(self, rng: np.random.Generator, count: int) -> Floats:
        around = self._centres[rng.integers(len(self._centres), size=count)]
        latent = around + 0.4 * rng.standard_normal((count, LATENT), dtype=np.float32)
        rows: Floats = (latent * self._scale) @ self._turn + 0.01 * rng.standard_normal((count, DIM), dtype=np.float32)
        rows /= np.linalg.norm(rows, axis=1, keepdims=True)
        return rows


def share_of(row: NDArray[np.int64]) -> NDArray[np.int64]:
    """Payload of a row: spread over all clusters."""
    mixed = (row * 2_654_435_761) % 2**32 % 100
    return np.where(mixed < 1, 0, np.where(mixed < 10, 1, 2))


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--points", type=whole(1), required=True)
    parser.add_argument("--queries", type=whole(1), default=200)
    parser.add_argument("--dir", type=Path, help="where the collections are built; removed afterwards")
    parser.add_argument("--out", type=Path, help="JSON file")
    args = parser.parse_args(argv)
    rows: list[dict[str, Any]] = []
    for setting in SETTINGS:
        folder = Path(tempfile.mkdtemp(prefix="first-stage-", dir=args.dir))
        try:
            built = _alone(build, folder, setting, args.points)
            for found in _alone(search, folder, setting, args.points, args.queries):
                rows.append({"setting": setting.name, **found, **built})
                sys.stdout.write(json.dumps(rows[-1]) + "\n")
                sys.stdout.flush()
        finally:
            shutil.rmtree(folder, ignore_errors=True)
    report = {
        "command": f"python -m retrv_r1_retriever.bench.first_stage --points {args.points} --queries {args.queries}",
        "machine": {"processor": processor(), "python": platform.python_version(), "threads": "1"},
        "points": args.points, "dimensions": DIM, "top_k": TOP_K, "queries": args.queries,
        "qdrant-edge-py": version("qdrant-edge-py"), "rows": rows,
    }  # fmt: skip
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(report, indent=1) + "\n")
    return 0


def build(folder: Path, setting: Setting, points: int) -> dict[str, float]:
    """Seconds to write all points and to build the graph, MB on disk, MB that the process had at most."""
    started = time.perf_counter()
    shard = edge.EdgeShard.create(str(folder), _config(setting))
    if setting.payload_index:
        shard.update(edge.UpdateOperation.create_field_index("share", edge.PayloadSchemaType.Integer))
    for start, block in Clusters(points).blocks():
        shares = share_of(np.arange(start, start + len(block))).tolist()
        rows = zip(block.tolist(), shares, strict=True)
        batch = [edge.Point(start + i, {"dense": row}, {"share": share}) for i, (row, share) in enumerate(rows)]
        shard.update(edge.UpdateOperation.upsert_points(batch))
    shard.flush()
    written = time.perf_counter() - started
    if setting.graph:
        shard.optimize()
    shard.close()
    seconds = time.perf_counter() - started
    disk = sum(512 * path.stat().st_blocks for path in folder.rglob("*") if path.is_file())
    return {"write s": written, "graph s": seconds - written, "disk MB": disk / 1e6, "build MB": _peak_mb()}


def search(folder: Path, setting: Setting, points: int, queries: int) -> list[dict[str, Any]]:
    """Recall, p50 and p95 by filter, and the MB this process has after searching beyond what it had before opening."""
    asked = Clusters(points).queries(queries)
    right = {name: _exact(asked, points, shares) for name, shares in FILTERS.items()}
    before = _now_mb()
    shard = edge.EdgeShard.load(str(folder))
    out = []
    for name, exact in _searches(setting):
        found, seconds = [], []
        for query in [asked[0], *asked]:  # the first one twice: it opens what the others find open
            request = _request(query, setting, FILTERS[name], exact)
            started = time.perf_counter()
            answer = shard.query(request)
            seconds.append(time.perf_counter() - started)
            found.append({int(point.id) for point in answer})
        hits = [len(got & want) / min(len(want), TOP_K) for got, want in zip(found[1:], right[name], strict=True)]
        p50, p95 = np.percentile(seconds[1:], [50, 95])
        told = {"filter": name, "search": "exact" if exact else "graph", "recall@50": float(np.mean(hits))}
        out.append(told | {"p50 ms": 1e3 * p50, "p95 ms": 1e3 * p95})
    info, memory = shard.info(), _now_mb() - before
    shard.close()
    return [row | {"RAM MB": memory, "indexed": info.indexed_vectors_count} for row in out]


def _exact(asked: Floats, points: int, shares: list[int]) -> list[set[int]]:
    """The true TOP_K of every query among the points that the filter leaves, and those tied with the last; block by block."""
    kept_of_each = 2 * TOP_K
    best = np.full((len(asked), kept_of_each), -2.0, dtype=np.float32)
    ids = np.full((len(asked), kept_of_each), -1, dtype=np.int64)
    for start, block in Clusters(points).blocks():
        rows = np.arange(start, start + len(block))
        if shares:
            kept = np.isin(share_of(rows), shares)
            rows, block = rows[kept], block[kept]
        scores = np.concatenate([best, asked @ block.T], axis=1)
        named = np.concatenate([ids, np.broadcast_to(rows, (len(asked), len(rows)))], axis=1)
        order = np.argpartition(-scores, kept_of_each - 1, axis=1)[:, :kept_of_each]
        best, ids = np.take_along_axis(scores, order, 1), np.take_along_axis(named, order, 1)
    last = -np.partition(-best, TOP_K - 1, axis=1)[:, TOP_K - 1 : TOP_K]
    return [set(row[(row >= 0) & near].tolist()) for row, near in zip(ids, best >= last - TIE, strict=True)]


def _searches(setting: Setting) -> list[tuple[str, bool]]:
    """Filter and whether to search exactly: a graph both ways behind a filter."""
    ways = {name: (False, True) if name else (False,) for name in FILTERS}
    return [(name, way) for name in FILTERS for way in (ways[name] if setting.graph else (True,))]


def _request(query: Floats, setting: Setting, shares: list[int], exact: bool) -> Any:
    match = edge.Filter(must=[edge.FieldCondition(key="share", match=edge.MatchAny(shares))]) if shares else None
    quantized = edge.QuantizationSearchParams(rescore=True, oversampling=setting.oversampling)
    return edge.QueryRequest(
        limit=TOP_K, query=edge.Query.Nearest(query.tolist(), using="dense"), filter=match, with_payload=False,
        params=edge.SearchParams(exact=exact, quantization=quantized if setting.quantization else None),
    )  # fmt: skip


def _config(setting: Setting) -> Any:
    quantization: Any = None
    if setting.quantization == "int8":
        quantization = edge.ScalarQuantizationConfig(edge.ScalarType.Int8, quantile=0.99, memory=edge.Memory.Pinned)
    elif setting.quantization == "turbo4":
        bits = edge.TurboQuantBitSize.Bits4
        quantization = edge.TurboQuantQuantizationConfig(bits=bits, memory=edge.Memory.Pinned)
    params = edge.EdgeVectorParams(size=DIM, distance=edge.Distance.Cosine, quantization_config=quantization)
    return edge.EdgeConfig(vectors={"dense": params}, max_search_threads=1)


def _alone(work: Callable[..., T], *args: object) -> T:
    """In a fresh process, so that its memory is its own."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(work, *args).result()


def _now_mb() -> float:
    """Of private and mapped pages together, as they are now."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / 1e6


def _peak_mb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6


if __name__ == "__main__":
    raise SystemExit(main())
