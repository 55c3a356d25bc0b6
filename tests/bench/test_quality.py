"""Quality beside latency: every kind of checkpoint is measured by its own reading, on a small catalogue and an untrained model."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from retrv_r1_retriever._sync import run
from retrv_r1_retriever.bench import quality
from retrv_r1_retriever.bench.catalogue import opened
from retrv_r1_retriever.demo import catalogue
from retrv_r1_retriever.demo.figures import ask
from retrv_r1_retriever.model.checkpoint import save_checkpoint
from retrv_r1_retriever.prompt import ANSWER_START, build_full_prompt
from retrv_r1_retriever.store import VectorFirstStage
from tests.tiny import checkpoint

__all__ = ["checkpoint"]


@pytest.fixture(scope="module")
def folder(checkpoint, tmp_path_factory):
    path = tmp_path_factory.mktemp("checkpoint")
    manifest = replace(checkpoint.manifest, embedder_dim=16, trained_top_k=20)
    save_checkpoint(path, checkpoint.model, checkpoint.processor, manifest, embedder=checkpoint.model)
    return path


@pytest.fixture(autouse=True)
def small_catalogue(monkeypatch):
    everything = catalogue.combos
    monkeypatch.setattr(catalogue, "combos", lambda part: everything(part)[:8])
    monkeypatch.setitem(catalogue.SPLITS, "val", replace(catalogue.SPLITS["val"], queries=2))
    short = {name: options.with_options(max_new_tokens=24) for name, options in quality.MODES.items()}
    monkeypatch.setattr(quality, "MODES", short)
    full = {name: options.with_options(max_new_tokens=24) for name, options in quality.FULL.items()}
    monkeypatch.setattr(quality, "FULL", full)


def test_all_kinds_in_one_table_and_one_picture(folder, tmp_path, capsys):
    kinds = ["--checkpoint", f"a={folder}", "--full", f"b={folder}", "--pointwise", f"c={folder}"]
    argv = [*kinds, "--limit", "1", "--dir", str(tmp_path / "data"), "--out", str(tmp_path)]
    assert quality.main(argv) == 0
    assert "| pointwise, K prompts |" in capsys.readouterr().out
    report = json.loads((tmp_path / "quality.json").read_text())
    found = {name: [r["mode"] for r in report["rows"] if r["checkpoint"] == name] for name in "abc"}
    compressed = ["logits, think=never", "hybrid, think=always", "hybrid, think=always, max_inspections=0"]
    assert found == {
        "a": ["first stage", *compressed],
        "b": ["first stage", "all in full, think=never", "all in full, think=always"],
        "c": ["first stage", "pointwise, K prompts"],
    }
    assert all((row["ms"] > 0) == (row["mode"] != "first stage") for row in report["rows"])
    assert (tmp_path / "quality.png").read_bytes().startswith(b"\x89PNG")


def test_peers_put_first_what_their_reading_says(folder, tmp_path):
    """The same from prompts built here: pictures through the tower, one query at a time."""
    with opened(tmp_path, str(folder), "val") as data:
        asked = run(ask(tmp_path, "val", VectorFirstStage(data.store, data.embedder), 1, 6))
        engine = data.engine

        async def slots(one, candidates):
            contents = [await quality.load_content(data.images, c.document.content) for c in candidates]
            plain = [
                replace(c, document=replace(c.document, content=content))
                for c, (content, _) in zip(candidates, contents, strict=True)
            ]
            handle = await engine.open(build_full_prompt(one.query, plain))
            *found, none = (await engine.probe(handle, ANSWER_START)).logprobs
            await engine.close(handle)
            return found, none

        listwise, pointwise = [], []
        for one in asked:
            found, _ = run(slots(one, one.candidates))
            listwise.append(one.candidates[found.index(max(found))].document.id)
            alone = [run(slots(one, [c])) for c in one.candidates]
            leads = [label - none for (label,), none in alone]
            pointwise.append(one.candidates[leads.index(max(leads))].document.id)
        for (name, call, ready), expected in (
            (next(quality._in_full(data, asked)), listwise),
            (next(quality._pointwise(data, asked)), pointwise),
        ):
            assert [run(call(one)) for one in ready] == expected, name
        assert listwise != pointwise, "or the two could be exchanged unseen"
