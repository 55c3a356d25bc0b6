"""Rerank with a vision-language model behind an OpenAI-compatible server: no training, no checkpoint, no torch.

    python examples/hosted_vlm.py                                        # offline, against the scripted server of the tests
    python examples/hosted_vlm.py --base-url http://127.0.0.1:8000/v1 --model Qwen/Qwen2.5-VL-7B-Instruct
    MY_KEY=... python examples/hosted_vlm.py --base-url https://host/v1 --model NAME --api-key-env MY_KEY

The scripted model compares words and the colour of pictures; it stands in for a real one and shows nothing about quality.
"""

from __future__ import annotations

import argparse
import io
import os
import sys
from pathlib import Path

from PIL import Image

from retrv_r1_retriever import Content, Document, RerankOptions, RetrvR1Reranker
from retrv_r1_retriever.engines.chat import ChatEngine


def picture(colour: str) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (600, 400), colour).save(buffer, "PNG")
    return buffer.getvalue()


DOCUMENTS = [
    Document("blue-hat", Content("a hat of blue wool")),
    Document("green-shoe", Content("a running shoe", picture("green"))),
    Document("second-hand", Content("maybe a red shoe, maybe not: the seller sent no picture")),
    Document("red-shoe", Content("a running shoe", picture("red"))),
    Document("red-picture", Content(image=picture("red"))),
]


def rerank(base_url: str, model: str, api_key: str | None) -> None:
    engine = ChatEngine(model, base_url=base_url, api_key=api_key)
    reranker = RetrvR1Reranker(engine, options=RerankOptions(max_inspections=2))
    results = reranker.rerank("red shoe", DOCUMENTS)

    print(results.status, results.reason or "")
    for r in results:
        opened = "opened" if r.signals.opened else ""
        print(f"{r.rank}. {r.document.id:12} was {r.candidate.rank}  {r.signals.verdict or '-'}  {opened}")
    if results.trace:
        print(results.trace.thought)
        print(*results.trace.notes, sep="\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base-url")
    parser.add_argument("--model")
    parser.add_argument("--api-key-env", metavar="NAME")
    args = parser.parse_args()
    if args.base_url:
        rerank(args.base_url, args.model, os.environ[args.api_key_env] if args.api_key_env else None)
        return
    sys.path.insert(0, str(Path(__file__).parents[1]))  # the scripted server lives with the tests
    from tests.serving.openai_stub import MODEL, openai_stub

    with openai_stub() as (server, _):
        rerank(server.url, MODEL, None)


if __name__ == "__main__":
    main()
