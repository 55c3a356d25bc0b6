"""A small catalogue as any M-BEIR folder: first-stage lists as a TREC run, thoughts by `synthesize`, and the recipe's `data` block."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
from retrv_r1_training import cli

from retrv_r1_retriever.demo import catalogue
from retrv_r1_retriever.evaluation.runs import write_run


def small_catalogue(root: Path, queries: int = 3) -> Path:
    """Splits train0 and val with `queries` of each task and stratum."""
    few = catalogue.combos("val")[:24]
    with pytest.MonkeyPatch.context() as patch:
        small = {n: catalogue.Split(n, "val", s.seed, queries) for n, s in catalogue.SPLITS.items()}
        patch.setattr(catalogue, "SPLITS", small)
        patch.setattr(catalogue, "combos", lambda part: few)
        return catalogue.write_catalogue(root, ("train0", "val"))


def part(root: Path, task: str, split: str) -> dict[str, str]:
    return {
        "queries": f"query/{split}/mbeir_cards_{task}_{split}.jsonl",
        "pool": f"cand_pool/local/mbeir_cards_{split}_cand_pool.jsonl",
        "qrels": f"qrels/{split}/mbeir_cards_{task}_{split}_qrels.txt",
    }


def with_lists(root: Path, task: str, split: str, top_k: int) -> dict[str, str]:
    """The part with a run in which the positive stands at a random place, and is missing from every fifth list."""
    made = part(root, task, split)
    pool = [json.loads(line) for line in (root / made["pool"]).read_text().splitlines()]
    rows = [json.loads(line) for line in (root / made["queries"]).read_text().splitlines()]
    run = {}
    for number, row in enumerate(rows):
        rng = random.Random(number)
        right = row["pos_cand_list"][0]
        modality = next(r["modality"] for r in pool if r["did"] == right)
        others = [r["did"] for r in pool if r["modality"] == modality and r["did"] != right]
        listed = rng.sample(others, top_k)
        if number % 5 != 4:
            listed[rng.randrange(top_k)] = right
        run[row["qid"]] = listed
    made["lists"] = str(root / f"{task}-{split}.trec")
    write_run(Path(made["lists"]), run, "test")
    return made


def with_thoughts(root: Path, task: str, split: str, top_k: int) -> dict[str, str]:
    """That with thoughts of the teacher that needs no model."""
    made = with_lists(root, task, split, top_k)
    out = root / "thoughts" / f"{task}-{split}"
    argv = [
        "synthesize",
        "--teacher",
        "words",
        "--queries",
        made["queries"],
        "--pool",
        made["pool"],
        "--qrels",
        made["qrels"],
    ]
    argv = [str(root / a) if a.startswith(("query/", "cand_pool/", "qrels/")) else a for a in argv]
    argv += [
        "--lists",
        made["lists"],
        "--images",
        str(root),
        "--top-k",
        str(top_k),
        "--out",
        str(out),
        "--licence",
        "CC0-1.0",
    ]
    assert cli.main(argv) == 0
    return {**made, "traces": str(out / "traces.jsonl")}


def data_block(root: Path, top_k: int, prepare=with_thoughts, tasks=("t2i", "cir")) -> dict[str, object]:
    parts = {split: [prepare(root, task, split, top_k) for task in tasks] for split in ("train0", "val")}
    return {
        "root": str(root), "top_k": top_k, "train": parts["train0"], "validation": parts["val"], "validation_queries": 0,
        "max_bad_share": 0.5,
    }  # fmt: skip


def stage_part(split: str, task: str) -> dict[str, str]:
    """As `embedder`, `align` and `base` name a part."""
    name = f"mbeir_cards_{task}_{split}"
    return {
        "queries": f"query/{split}/{name}.jsonl", "pool": f"cand_pool/local/mbeir_cards_{split}_cand_pool.jsonl",
        "qrels": f"qrels/{split}/{name}_qrels.txt", "lists": f"{name}_run.txt",
    }  # fmt: skip
