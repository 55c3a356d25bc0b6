"""Index a folder of pictures, then search it by words, by a picture, or by both.

    python examples/own_pictures.py FOLDER "two red rings" [--image query.png]

Runs on the miniature checkpoint, which knows only the demo's product cards: `retrv-r1 demo` writes some to ./demo-data.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

from retrv_r1_retriever import CollectionSpec, EdgeStore, Indexer, LocalImages, Query, RerankOptions, RetrvR1Retriever
from retrv_r1_retriever.config import Config, collection_spec, open_embedder, open_engine
from retrv_r1_retriever.readers import read_folder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("text", nargs="?")
    parser.add_argument("--image", type=Path)
    args = parser.parse_args()

    engine, embedder = open_engine(Config()), open_embedder(Config())
    spec: CollectionSpec = collection_spec(engine, embedder)
    images = LocalImages(args.folder)

    with tempfile.TemporaryDirectory() as folder:
        store = EdgeStore(Path(folder) / "index", spec=spec)
        report = Indexer(store, embedder, engine, images).index(read_folder(args.folder))
        print(f"{report.indexed} pictures indexed, {len(report.failed)} failed")

        retriever = RetrvR1Retriever(store=store, embedder=embedder, engine=engine, images=images)
        picture = args.image.read_bytes() if args.image else None
        results = retriever.retrieve(Query.of(args.text, picture), options=RerankOptions(top_k=20, top_n=5))

        print(results.status, results.reason or "")
        for r in results:
            opened = "opened" if r.signals.opened else ""
            print(f"{r.rank}. {r.document.id}  was {r.candidate.rank}  {r.signals.verdict or ''} {opened}")
        if results.trace:
            print(results.trace.thought)


if __name__ == "__main__":
    main()
