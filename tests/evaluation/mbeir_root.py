"""A generated folder in M-BEIR's layout: all sixteen tasks, every modality, and a system whose mistakes can be worked out.

Query and candidates belong to topics. `TopicEmbedder` finds the topic (its right answer and distractors, among them), and
`topic_engine` then prefers the right variant. Pictures are single pixels: their colour is the number.
"""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from retrv_r1_retriever.engines.scripted import ScriptedEngine
from retrv_r1_retriever.evaluation.benchmark import TASKS, Parts, Task
from retrv_r1_retriever.evaluation.mbeir import TASKS as SHAPES
from retrv_r1_retriever.images import LocalImages
from retrv_r1_retriever.points import CollectionSpec
from retrv_r1_retriever.prompt import Prompt
from retrv_r1_retriever.types import Content, Query

DATASETS = {
    "visualnews": 0, "fashion200k": 1, "webqa": 2, "edis": 3, "nights": 4, "oven": 5, "infoseek": 6, "fashioniq": 7, "cirr": 8,
    "mscoco": 9,
}  # fmt: skip
VARIANTS = 12  # candidates of a topic
SIZE = 16


def write_root(root: Path, candidates: int, queries: int) -> Path:
    """`candidates` and `queries` per task; the union pool holds all of them."""
    for folder in ("query/test", "qrels/test", "cand_pool/local", "cand_pool/global", "instructions", "mbeir_images"):
        (root / folder).mkdir(parents=True, exist_ok=True)
    with (root / "cand_pool/global/mbeir_union_test_cand_pool.jsonl").open("w") as union:
        for number, task in enumerate(TASKS):
            pool = _pool(root, task, number * candidates, candidates)
            (root / task.pool("local")).write_text(pool)
            union.write(pool)
            _queries(root, task, number * candidates, candidates, queries)
    lines = ["query_modality\tcand_modality\tdataset_name\tdataset_id\tprompt_1\tprompt_2"]
    for task in TASKS:
        query, candidate = _shape(task)
        dataset = task.dataset
        lines.append(f"{query}\t{candidate}\t{dataset}\t{DATASETS[dataset]}\tFind it.\tShow {dataset}.")
    (root / "instructions/query_instructions.tsv").write_text("\n".join(lines) + "\n")
    return root


def topic_of(content: Content) -> tuple[int, int]:
    """(topic, variant) of a candidate or query."""
    number = int(content.text.split()[-1]) if content.text else _number(content.image)
    return divmod(number, VARIANTS)


class TopicEmbedder:
    """Candidates of a topic lie together, in an order that has nothing to do with the right one."""

    digest = "topics-1"

    def embed(self, items: Sequence[Query | Content]) -> np.ndarray:
        return np.stack([self._vector(item) for item in items]).astype(np.float32)

    def _vector(self, item: Query | Content) -> np.ndarray:
        topic, variant = topic_of(item.content if isinstance(item, Query) else item)
        centre = np.random.default_rng(topic).standard_normal(SIZE)
        if isinstance(item, Query):
            return centre
        return centre + 0.8 * np.random.default_rng([topic, variant]).standard_normal(SIZE)


def topic_engine() -> ScriptedEngine:
    """Prefers the query's number, but takes every third one for the next."""

    def slots(prompt: Prompt) -> list[float]:
        topic, variant = topic_of(prompt.query.content)
        wanted = (topic, variant if variant % 3 else (variant + 1) % VARIANTS)
        return [*(3.0 if topic_of(c.document.content) == wanted else 0.0 for c in prompt.candidates), -1.0]

    return ScriptedEngine(slots=slots)


def parts(root: Path) -> Parts:
    spec = CollectionSpec(SIZE, embedder=TopicEmbedder.digest)
    return Parts(TopicEmbedder(), TopicEmbedder.digest, spec, LocalImages(root), topic_engine())


def _shape(task: Task) -> tuple[str, str]:
    return next(shape for shape, number in SHAPES.items() if number == task.number)


def _pool(root: Path, task: Task, first: int, count: int) -> str:
    return "".join(
        json.dumps({"did": f"{DATASETS[task.dataset]}:{n}", "src_content": None, **_fields(root, _shape(task)[1], n)}) + "\n"
        for n in range(first, first + count)
    )  # fmt: skip


def _queries(root: Path, task: Task, first: int, count: int, queries: int) -> None:
    rng, dataset, rows, qrels = random.Random(task.name), DATASETS[task.dataset], [], []
    for query, answer in enumerate(rng.sample(range(first, first + count), queries)):
        qid = f"{dataset}:{task.number}{query}"
        fields = _fields(root, _shape(task)[0], answer)
        row = {"query_txt": fields["txt"], "query_img_path": fields["img_path"], "query_modality": fields["modality"]}
        did = f"{dataset}:{answer}"
        rows.append(json.dumps({"qid": qid, **row, "pos_cand_list": [did], "neg_cand_list": []}) + "\n")
        qrels.append(f"{qid} 0 {did} 1 {task.number}\n")
    (root / task.queries).write_text("".join(rows))
    (root / task.qrels).write_text("".join(qrels))


def _fields(root: Path, modality: str, number: int) -> dict[str, str | None]:
    picture = None
    if "image" in modality:
        picture = f"mbeir_images/{number}.ppm"
        path = root / picture
        if not path.exists():
            path.write_bytes(b"P6 1 1 255\n" + number.to_bytes(3, "big"))
    return {"txt": f"topic {number}" if "text" in modality else None, "img_path": picture, "modality": modality}


def _number(image: object) -> int:
    if isinstance(image, str):  # a candidate's, which nobody opened
        return int(Path(image).stem)
    assert isinstance(image, Image.Image)
    return int.from_bytes(bytes(image.getpixel((0, 0))), "big")
