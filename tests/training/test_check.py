"""`retrv-r1-train check` and `first-stage`: what they find, and what they say to a person."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from retrv_r1_training import cli
from retrv_r1_training.first_stage import recall, write_run
from retrv_r1_training.klists import KListConfig, KLists

from retrv_r1_retriever import _sync
from retrv_r1_retriever.embedders import Embedder
from retrv_r1_retriever.evaluation.mbeir import Dataset, RunFile
from retrv_r1_retriever.images import LocalImages
from retrv_r1_retriever.indexing import Indexer
from retrv_r1_retriever.points import CollectionSpec
from retrv_r1_retriever.readers import read_mbeir
from retrv_r1_retriever.store import VectorFirstStage

POOL, QUERIES, QRELS = "cand_pool/local/p.jsonl", "query/val/q.jsonl", "qrels/val/q_qrels.txt"
COLOURS = ("red", "green", "blue", "white", "black", "yellow")


def put(path: Path, lines: list[object]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in lines), encoding="utf-8")


@pytest.fixture
def root(tmp_path):
    """Six plain pictures; two queries by picture, two in words."""
    for name in COLOURS:
        Image.new("RGB", (8, 8), name).save(tmp_path / f"{name}.png")
    pool = [{"did": f"7:{c}", "txt": None, "img_path": f"{c}.png", "modality": "image"} for c in COLOURS]
    put(tmp_path / POOL, pool)
    rows = [
        {"qid": f"7:{n}", "query_txt": None if n < 2 else f"in words {n}", "query_img_path": f"{c}.png" if n < 2 else None,
         "query_modality": "image" if n < 2 else "text", "pos_cand_list": [f"7:{c}"], "neg_cand_list": []}
        for n, c in enumerate(COLOURS[:4])
    ]  # fmt: skip
    put(tmp_path / QUERIES, rows)
    put(tmp_path / QRELS, [f"7:{n} 0 7:{c} {n + 1} 0" for n, c in enumerate(COLOURS[:4])])
    head = "query_modality\tcand_modality\tdataset_name\tdataset_id\tprompt_1"
    put(tmp_path / "instructions/query_instructions.tsv", [head, "text\timage\tx\t7\tFind it."])
    return tmp_path


def test_a_sound_folder(root, capsys):
    assert cli.main(["check", str(root), "--samples", "4"]) == 0
    out = capsys.readouterr().out
    for words in (
        "cand_pool/local/p.jsonl: 6 rows\n", "modalities  image: 6", "pictures    6, 6 opened",
        "tasks                image -> image: 2, text -> image: 2", "positives per query  1: 4; most 1",
        "(qrels: qrels/val/q_qrels.txt)", "cand_pool/local/p.jsonl 4 of 4",
        "note      2 queries have no instruction (image -> image): 7:0, 7:1",
        "    7:2 Find it.\n      asks in words 2\n      right 7:blue [blue.png]\n", "0 problems, 0 rows skipped",
    ):  # fmt: skip
        assert words in out


def test_everything_wrong_is_named(root, capsys):
    (root / "red.png").unlink()
    (root / "blue.png").write_bytes(b"no picture")
    with (root / POOL).open("a") as file:
        file.write('{"did": "7:red", "txt": "again"}\n')
    rows = [json.loads(line) for line in (root / QUERIES).read_text().splitlines()]
    more = [
        {**rows[2], "qid": "7:lost", "pos_cand_list": ["7:nowhere"]},
        {**rows[2], "qid": "7:open", "pos_cand_list": []},
    ]
    put(root / QUERIES, [*rows, *more, "{cut"])
    put(root / QRELS, ["7:2 0 7:red 1 0"])
    assert cli.main(["check", str(root), "--max-bad-share", "0.5", "--samples", "0"]) == 1
    out = capsys.readouterr().out
    for words in (
        "p.jsonl: 6 rows, 1 skipped\n", "skipped   p.jsonl:7: id '7:red' a second time",
        "PROBLEM   2 of 6 pictures cannot be opened: red.png (no such file); blue.png (UnidentifiedImageError)",
        "skipped   q.jsonl:7: ", "PROBLEM   1 queries have no positive in any pool: 7:lost",
        "note      1 queries have no positive (they train <|none|>): 7:open",
        "note      1 queries whose row and qrels name different positives: 7:2",
        "note      4 queries have no line in the qrels: 7:0, 7:1, 7:3", "3 problems, 2 rows skipped",
    ):  # fmt: skip
        assert words in out
    assert cli.main(["check", str(root)]) == 1
    assert "p.jsonl: expected at most 1.0% bad rows, got 1 of 7" in capsys.readouterr().err


def test_pictures_are_decoded_so_one_that_was_cut_off_is_named(root, capsys):
    rng = np.random.default_rng(0)
    for name in ("green.png", "black.png"):
        Image.fromarray(rng.integers(0, 255, (64, 64, 3), np.uint8)).save(root / name)
    data = (root / "green.png").read_bytes()
    (root / "green.png").write_bytes(data[: len(data) // 2])
    assert cli.main(["check", str(root), "--pictures", "all"]) == 1
    problem = "PROBLEM   1 of 6 pictures cannot be opened: green.png (OSError: image file is truncated"
    assert problem in capsys.readouterr().out


@pytest.mark.parametrize(
    ("wrong", "message"),
    [("--pictures=-3", "pictures: expected 0 or more, got -3"), ("--samples=-1", "samples: expected 0 or more, got -1"),
     ("--pictures=abc", "--pictures: expected a whole number or all, got 'abc'")],
)  # fmt: skip
def test_counts_out_of_range_are_named(root, capsys, wrong, message):
    try:
        code = cli.main(["check", str(root), wrong])
    except SystemExit as error:  # of the parser
        code = error.code
    assert code
    assert message in capsys.readouterr().err


def test_only_the_files_named(root, capsys):
    put(root / "query/val/other.jsonl", ["broken"])
    assert cli.main(["check", str(root), "--queries", QUERIES, "--pool", POOL, "--pictures", "1"]) == 0
    out = capsys.readouterr().out
    assert "other" not in out
    assert "pictures    6, 1 opened" in out
    assert cli.main(["check", str(root / "query")]) == 1
    assert "expected cand_pool/**/*.jsonl and query/**/*.jsonl, got neither" in capsys.readouterr().err


def test_recall_of_a_run_counts_any_positive_and_lists_that_are_not_there(root):
    put(
        root / QRELS,
        ["7:0 0 7:red 1 0", "7:0 0 7:blue 1 0", "7:1 0 7:gone 1 0", "7:2 0 7:blue 1 0", "7:3 0 7:white 1 0"],
    )
    rows = ["7:0 Q0 7:green 1 9 t", "7:0 Q0 7:blue 2 8 t", "7:1 Q0 7:green 1 9 t", "7:3 Q0 7:white 1 9 t"]
    put(root / "run.txt", rows)
    data = Dataset.open(root, QUERIES, POOL, qrels=QRELS)
    found, count = recall(data, RunFile(root / "run.txt"), (1, 2), seed=0)
    assert count == 3, "of 7:1 no positive is in the pool"
    assert found == {1: pytest.approx(1 / 3), 2: pytest.approx(2 / 3)}


class MeanColour(Embedder):
    def embed(self, items):
        contents = [getattr(item, "content", item) for item in items]
        return np.stack([
            np.asarray(c.image, np.float32).mean((0, 1)) + 1 if c.image is not None else np.ones(3, np.float32) for c in contents
        ])  # fmt: skip


def test_lists_from_our_own_store(root, tmp_path):
    edge = pytest.importorskip("retrv_r1_retriever.edge")
    spec = CollectionSpec(vector_size=3)
    store = edge.EdgeStore(tmp_path / "index", spec=spec)
    Indexer(store, MeanColour(), images=LocalImages(root)).index(read_mbeir(root / POOL))
    (root / "green.png").write_bytes(b"broken by now")
    data = Dataset.open(root, QUERIES, POOL, qrels=QRELS)
    out = root / "run.txt"
    search = VectorFirstStage(store, MeanColour(), with_memory=False)
    skipped = _sync.run(write_run(data, search, LocalImages(root), out, top_k=4, batch=3))
    _sync.run(store.close())
    assert (skipped.count, skipped.total) == (1, 4)
    assert skipped.examples[0].startswith("q.jsonl, query 7:1: image green.png")
    run = RunFile(out)
    assert run.ranked("7:0")[0] == "7:red"
    assert [len(run.ranked(f"7:{n}")) for n in range(4)] == [4, 0, 4, 4]
    lists = KLists(data, run, seed=0)
    (first, *_) = [k for k in lists.training(KListConfig(4), 0) if k.query.id == "7:0"]
    assert first.grades[first.answers[0]] == 1
    assert [d.content.image for d in lists.documents(first)] == [f"{did[2:]}.png" for did in first.candidates]
    assert lists.counts["no first-stage list"] == 1


def test_first_stage_command(tmp_path, capsys):
    """The catalogue, the shipped checkpoint, an index made by `retrv-r1 index`'s own parts."""
    pytest.importorskip("retrv_r1_retriever.edge")
    from retrv_r1_retriever import config as settings

    pool = [{"did": f"90:{n}", "txt": f"two red circle plain thin a1 b2 c{n}", "img_path": None, "modality": "text"}
            for n in range(6)]  # fmt: skip
    put(tmp_path / POOL, pool)
    query = {"query_txt": "two red", "query_img_path": None, "query_modality": "text", "neg_cand_list": []}
    put(tmp_path / QUERIES, [{"qid": "90:q", **query, "pos_cand_list": ["90:1"]}])
    (tmp_path / "retrv.toml").write_text("")
    config = settings.read_config(tmp_path / "retrv.toml")
    embedder = settings.open_embedder(config)
    store = settings.open_store(config, CollectionSpec(embedder.dim, embedder=embedder.digest))
    Indexer(store, embedder).index(read_mbeir(tmp_path / POOL))
    _sync.run(store.close())
    argv = ["first-stage", str(tmp_path), "--queries", QUERIES, "--pool", POOL, "--config", str(tmp_path / "retrv.toml"),
            "--out", str(tmp_path / "run.txt"), "--top-k", "3"]  # fmt: skip
    assert cli.main(argv) == 0
    out = capsys.readouterr().out
    assert "1 queries, 0 skipped" in out
    assert re.search(r"^R@1 [01]\.000, R@3 [01]\.000 of 1 queries with a positive in the pool$", out, re.M)
    assert len(RunFile(tmp_path / "run.txt").ranked("90:q")) == 3
