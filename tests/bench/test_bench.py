"""The bench: what it says was read was read, its formulas agree with a counter that watches the model, its output is whole."""

from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from retrv_r1_retriever import cli
from retrv_r1_retriever._sync import run
from retrv_r1_retriever.bench import __main__ as bench
from retrv_r1_retriever.bench.arguments import MODES, NAMES
from retrv_r1_retriever.bench.floors import Ceiling, Counts, Work
from retrv_r1_retriever.bench.modes import OPENED, Task, auto, counted, margin_below, modes, thought
from retrv_r1_retriever.bench.shapes import SHAPES, Shape, random_checkpoint, random_task
from retrv_r1_retriever.edge import EdgeStore
from retrv_r1_retriever.engines.local import LocalEngine
from retrv_r1_retriever.model.configuration import IcmConfig
from retrv_r1_retriever.points import CollectionSpec
from retrv_r1_retriever.prompt import build_prompt
from retrv_r1_retriever.store import Point
from retrv_r1_retriever.types import Content, Document, Memory

ROPE = {"rope_type": "default", "mrope_section": [6, 5, 5], "rope_theta": 1e4}
SMALL = Shape(
    {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1, "intermediate_size": 128,
     "vocab_size": 1024, "max_position_embeddings": 8192, "rope_parameters": ROPE},
    {"depth": 2, "hidden_size": 32, "intermediate_size": 64, "num_heads": 2, "patch_size": 8, "window_size": 32,
     "fullatt_block_indexes": [0, 1]},
    picture=64, words=4, query_words=3, icm=IcmConfig(32, 4, 8),
)  # fmt: skip
PATCHES, TOKENS = 64, 16  # of a picture of 64 x 64: 8 x 8 patches, merged 2 x 2


@pytest.fixture(scope="module")
def checkpoint():
    return random_checkpoint(SMALL, "cpu")


@pytest.fixture(autouse=True)
def small_shape(monkeypatch):
    monkeypatch.setitem(SHAPES, "ratio", SMALL)


@pytest.mark.parametrize("k", [50, 127])
def test_every_mode_reads_exactly_what_it_must(checkpoint, k):
    engine = LocalEngine(checkpoint, max_batch_tokens=1 << 17)
    task = Task.of(engine, *random_task(SMALL, k))
    got = run(counted(modes(engine, task), checkpoint.model.model.visual))
    frame = got["F"].prompt - 3 * k  # the template, the query and its picture
    full = TOKENS + 2 + SMALL.words  # a candidate in full: picture, its two marks, words
    cue = len(checkpoint.processor.tokenise("\nCheck:"))
    assert got["U"].prompt == got["U'"].prompt == frame + k * (1 + full)
    assert got["C"].prompt == got["F"].prompt
    assert got["X"].prompt == got["X'"].prompt == k * (frame + 1 + full)
    assert got[f"F+{OPENED}"].prompt == got["F"].prompt + OPENED * (full + cue)
    pictures = {mode: count.patches / PATCHES for mode, count in got.items()}
    assert pictures == {"U": k + 1, "U'": 1, "X": k + 1, "X'": 1, "C": k + 1, "F": 1, f"F+{OPENED}": 1 + OPENED}
    stored = sum(c.memory.rows.nbytes for c in task.stored)
    assert stored == k * SMALL.icm.memory_rows * SMALL.icm.width * 2
    read = engine.forward_tokens
    assert run(thought(engine, build_prompt(task.query, task.stored), 7)) == 7
    # beside the prompt: the probe's token, `<think>`, and all but the last sampled one
    assert engine.forward_tokens - read == got["F"].prompt + 1 + 1 + 6


def test_auto_thinks_where_the_read_is_unsure(checkpoint):
    engine = LocalEngine(checkpoint, max_batch_tokens=1 << 17)
    query, candidates = random_task(SMALL, 8)
    others = [random_task(SMALL, 1, seed)[0] for seed in range(1, 5)]
    task = Task.of(engine, query, candidates)
    prompts = [build_prompt(one, task.stored) for one in (query, *others)]
    for share in (0.0, 0.4, 1.0):
        threshold = run(margin_below(engine, prompts, share))
        read = engine.forward_tokens
        found = run(auto(engine, prompts, 6, threshold, 0, checkpoint.model.device))
        assert found.share == share
        counts = [len(checkpoint.processor.chunk(p.segments, p)) for p in prompts]
        # a probe each; `<think>` and all but the last sampled token of a thought
        assert engine.forward_tokens - read == sum(counts) + 5 + 5 * share * (1 + 5)


def test_formulas_agree_with_a_counter_on_the_model(checkpoint):
    """Attention is kept small by reading few tokens: the counter knows nothing of causality, nor of every CPU kernel."""
    model, counts = checkpoint.model, Counts(checkpoint.model.config, 4)
    ids, grid = torch.ones(1, 4, dtype=torch.long), torch.tensor([[1, 2, 2]])
    patches = torch.zeros(4, 3 * 2 * 8 * 8)
    memory, query = torch.randn(5, 8, 32), torch.randn(1, 1, 32)
    icm_inputs = (
        memory,
        torch.ones(5, 8, dtype=torch.bool),
        query,
        torch.ones(1, 1, dtype=torch.bool),
        torch.zeros(5).long(),
    )
    for call, work in (
        (lambda: model.lm_head(model.model.language_model(ids).last_hidden_state[:, -1]), counts.prefill(4)),
        (lambda: model.model.encode_images(patches, grid), counts.tower(4, 1)),
        (lambda: model.model.icm(*icm_inputs), counts.compression(5, 8, 1)),
        (lambda: model.model.icm.memories([torch.randn(9, 64)]), counts.memory(9, 1)),
    ):
        counter = FlopCounterMode(display=False)
        with counter, torch.no_grad():
            call()
        assert work.flops == pytest.approx(counter.get_total_flops(), rel=0.03)


def test_a_floor_is_the_slower_of_computing_and_moving():
    ceiling = Ceiling(flops=100.0, bytes=10.0)
    assert ceiling.floor(Work(50, 1)) == 0.5
    assert ceiling.floor(Work(50, 20)) == 2.0


def test_the_command_prints_tables_and_writes_json_and_a_picture(checkpoint, tmp_path, capsys):
    argv = ["--shape", "ratio", "--top-k", "6", "--rounds", "1", "--steps", "3", "--concurrency", "2"]
    assert bench.main([*argv, "--out", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert "| x faster than U |" in printed
    assert "tower, K pictures" in printed
    report = json.loads((tmp_path / "bench.json").read_text())
    assert [row["mode"] for row in report["shapes"][0]["modes"]] == ["U", "U'", "X", "X'", "C", "F", f"F+{OPENED}"]
    [row] = report["shapes"][0]["auto"]
    assert (row["queries"], row["chosen"], row["thought about, %"]) == ("10", "leaves 20% below it", 20.0)
    stages = report["shapes"][0]["stages"]
    assert all(stage["seconds"] > 0 for stage in stages)
    tower = next(stage for stage in stages if stage["name"] == "tower, K pictures")
    assert tower["work"]["flops"] == Counts(checkpoint.model.config, 4).tower(PATCHES, 6).flops
    assert f"| {tower['work']['flops'] / 1e9:.3g} |" in printed
    assert (tmp_path / "bench.png").read_bytes().startswith(b"\x89PNG")


def test_the_command_line_has_it_too_and_prints_json(monkeypatch, capsys):
    assert set(NAMES) == {"miniature", *SHAPES}
    assert ("U", "U'", "X", "X'", "C", "F", f"F+{OPENED}") == MODES
    monkeypatch.setattr(sys, "argv", ["retrv-r1", "bench", "--json", "--shape", "ratio"])
    argv = ["--shape", "ratio", "--top-k", "6", "--rounds", "1", "--steps", "0", "--concurrency", "--no-stages"]
    assert cli.main(["bench", *argv, "--json"]) == 0
    printed = capsys.readouterr()
    report = json.loads(printed.out)
    assert report["command"] == "retrv-r1 bench --json --shape ratio"
    assert report["shapes"][0]["modes"][0]["mode"] == "U"
    assert "| x faster than U |" in printed.err


@pytest.mark.parametrize(
    ("argument", "expected"),
    [
        (["--rounds", "0"], "expected a whole number of at least 1, got '0'"),
        (["--top-k", "200"], "expected a whole number from 1 to 127, got '200'"),
        (["--steps", "-1"], "expected a whole number of at least 0, got '-1'"),
        (["--concurrency", "x"], "expected a whole number of at least 1, got 'x'"),
        (["--think-share", "2"], "expected a share, 0 to 1, got '2'"),
        (["--modes", "U", "Z"], "invalid choice: 'Z'"),
    ],
)
def test_arguments_out_of_range_are_told_before_anything_is_measured(argument, expected, capsys):
    with pytest.raises(SystemExit):
        bench.main(["--shape", "ratio", *argument])
    assert expected in capsys.readouterr().err


@pytest.mark.parametrize("module", ["", ".first_stage", ".outside", ".page", ".quality"])
def test_each_bench_starts_by_itself(module):
    """In a process that has imported nothing else of this package: a circle of imports shows nowhere else."""
    command = [sys.executable, "-m", f"retrv_r1_retriever.bench{module}", "--help"]
    found = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (found.returncode, found.stderr) == (0, "")


def test_the_modes_to_compare_with_are_always_there(tmp_path):
    argv = ["--shape", "ratio", "--top-k", "6", "--rounds", "1", "--steps", "0", "--concurrency", "--no-stages"]
    assert bench.main([*argv, "--modes", "C", "--out", str(tmp_path)]) == 0
    report = json.loads((tmp_path / "bench.json").read_text())
    assert [row["mode"] for row in report["shapes"][0]["modes"]] == ["U", "C", "F"]


@pytest.mark.parametrize("k", [50, 127])
def test_the_store_hands_over_exactly_the_bytes_of_the_memory(tmp_path, k):
    rows = np.arange(8 * 32, dtype=np.float16).reshape(8, 32)
    store = EdgeStore(tmp_path, spec=CollectionSpec(4, 32, "d"))
    documents = [Document(str(i), Content("x")) for i in range(k + 20)]
    memories = [Memory(rows + np.float16(i), "d", "c", 1) for i in range(len(documents))]
    run(store.upsert([Point(d, np.eye(4, dtype=np.float32)[0], m) for d, m in zip(documents, memories, strict=True)]))
    found = run(store.search(np.eye(4)[0], k))
    assert sum(c.memory.rows.nbytes for c in found) == k * 8 * 32 * 2
    assert all(np.array_equal(c.memory.rows, memories[int(c.document.id)].rows) for c in found)
    run(store.close())
