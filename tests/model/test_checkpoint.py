"""Checkpoints: stock transformers loads them, nothing changes on the way, and the digests say exactly what they should."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from retrv_r1_training.backbone import BackboneSize, build_model, build_tokenizer
from transformers import Qwen2_5_VLForConditionalGeneration

from retrv_r1_retriever.engines.local import LocalEngine
from retrv_r1_retriever.errors import CheckpointError, InputError
from retrv_r1_retriever.model.checkpoint import (
    add_tokens,
    create_checkpoint,
    load_checkpoint,
    read_manifest,
    save_checkpoint,
)
from retrv_r1_retriever.model.configuration import IcmConfig
from retrv_r1_retriever.model.embedding import BackboneEmbedder
from retrv_r1_retriever.prompt import LABELS
from retrv_r1_retriever.types import Query
from tests.tiny import contents, make_prompt


@pytest.fixture(scope="module")
def saved(checkpoint, tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint")
    manifest = replace(checkpoint.manifest, embedder_dim=16)
    save_checkpoint(folder, checkpoint.model, checkpoint.processor, manifest, checkpoint.model, torch.float32)
    return folder


def test_round_trip_gives_the_same_memory_and_answers(checkpoint, saved):
    before, after = LocalEngine(checkpoint), LocalEngine(load_checkpoint(saved, device="cpu"))
    for a, b in zip(before.compress(contents(3)), after.compress(contents(3)), strict=True):
        assert (a.rows == b.rows).all()
    prompt = make_prompt(before, Query.of("red"), 3)
    one, two = (e._processor.chunk(prompt.segments, prompt).ids for e in (before, after))
    assert (one == two).all()


def test_stock_transformers_loads_the_directory(checkpoint, saved):
    stock = Qwen2_5_VLForConditionalGeneration.from_pretrained(saved).eval()
    assert json.loads((saved / "config.json").read_text())["model_type"] == "qwen2_5_vl"
    ids = torch.arange(20)[None]
    torch.testing.assert_close(stock(ids).logits, checkpoint.model(ids).logits)


def test_embedder_is_normalised_and_batch_free(saved):
    embedder = BackboneEmbedder.from_pretrained(saved, device="cpu")
    items = [Query.of("red", instruction="find it"), *contents(6)]
    together = embedder.embed(items)
    assert together.shape == (7, 16)
    assert together.dtype.name == "float32"
    torch.testing.assert_close(torch.tensor(together).norm(dim=1), torch.ones(7))
    alone = np.stack([embedder.embed([item])[0] for item in items])
    np.testing.assert_allclose(together, alone, atol=1e-5, rtol=1e-4)


def digests(checkpoint, tmp_path, change):
    model = build_model(checkpoint.processor.tokenizer, BackboneSize(hidden=64, layers=1, heads=2, kv_heads=1,
                        tower_hidden=32, tower_depth=1), IcmConfig(16, 2, 4), seed=3)  # fmt: skip
    with torch.no_grad():
        change(model)
    saved = save_checkpoint(tmp_path, model, checkpoint.processor, checkpoint.manifest)
    return saved.memory_digest, saved.checkpoint_digest


def test_memory_digest_changes_with_memory_only(checkpoint, tmp_path):
    slot = checkpoint.processor.token_id(LABELS[5])
    word = checkpoint.processor.tokenise(" red")[0]
    base = digests(checkpoint, tmp_path, lambda m: None)
    assert base == digests(checkpoint, tmp_path, lambda m: None), "deterministic"
    free = {
        "a slot row": lambda m: m.get_input_embeddings().weight[slot].add_(1),
        "a layer": lambda m: m.model.language_model.layers[0].mlp.up_proj.weight.add_(1),
        "ATT1": lambda m: m.model.icm.att1.q.weight.add_(1),
    }
    bound = {
        "in_proj": lambda m: m.model.icm.in_proj[1].weight.add_(1),
        "the tower": lambda m: m.model.visual.blocks[0].mlp.up_proj.weight.add_(1),
        "a word's row": lambda m: m.get_input_embeddings().weight[word].add_(1),
    }
    for name, change in (free | bound).items():
        memory, whole = digests(checkpoint, tmp_path, change)
        assert whole != base[1], name
        assert (memory == base[0]) == (name in free), name


@pytest.mark.parametrize("field", ["prompt_version", "memory_version", "escaping_version", "format_version"])
def test_other_versions_are_refused(saved, tmp_path, field):
    (tmp_path / "retrv").mkdir()
    data = json.loads((saved / "retrv" / "manifest.json").read_text())
    (tmp_path / "retrv" / "manifest.json").write_text(json.dumps(data | {field: 99}))
    with pytest.raises(CheckpointError, match=f"{field} of .*expected 1, got 99"):
        load_checkpoint(tmp_path)


def test_what_was_trained_is_in_the_manifest_and_older_ones_lack_it(saved, tmp_path):
    shutil.copytree(saved, tmp_path, dirs_exist_ok=True)
    edit_manifest(tmp_path, direct_read=False, trained_top_k=7)
    engine = LocalEngine.from_pretrained(tmp_path)
    assert (engine.direct_read, engine.trained_top_k) == (False, 7)
    older = tmp_path / "retrv" / "manifest.json"
    older.write_text(json.dumps({k: v for k, v in json.loads(older.read_text()).items() if k != "direct_read"}))
    assert read_manifest(tmp_path).direct_read is True


def test_plain_directory_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match=r"expected a Retrv-R1 checkpoint, got no retrv/manifest\.json"):
        load_checkpoint(tmp_path)


def test_checkpoint_without_embedder_says_so(checkpoint, tmp_path):
    save_checkpoint(tmp_path, checkpoint.model, checkpoint.processor, checkpoint.manifest)
    with pytest.raises(CheckpointError, match="expected an embedder inside"):
        BackboneEmbedder.from_pretrained(tmp_path)


def test_create_from_a_stock_backbone(checkpoint, saved, tmp_path):
    """The path from a released Qwen2.5-VL: tokens take spare rows, nothing is resized."""
    from transformers import AutoTokenizer

    for name in ("config.json", "model.safetensors", "preprocessor_config.json"):
        (tmp_path / name).write_bytes((saved / name).read_bytes())
    plain = build_tokenizer(["which card is red"])
    words = AutoTokenizer.from_pretrained(saved)
    assert len(plain) <= len(words)
    plain.save_pretrained(tmp_path)
    made = create_checkpoint(str(tmp_path), icm=IcmConfig(16, 2, 4), licence="Apache-2.0", device="cpu")
    assert made.manifest.licence == "Apache-2.0"
    assert made.model.get_input_embeddings().weight.shape == checkpoint.model.get_input_embeddings().weight.shape
    engine = LocalEngine(made)
    assert engine.compress(contents(2))[0].rows.shape[1] == 16


def test_too_few_spare_rows_are_named():
    with pytest.raises(CheckpointError, match="expected at least"):
        add_tokens(build_tokenizer(["red"]), vocab_size=100)


BREAK = {
    "no weights": lambda folder: (folder / "model.safetensors").unlink(),
    "cut weights": lambda folder: (folder / "model.safetensors").write_bytes(b"xx"),
    "no module": lambda folder: (folder / "retrv" / "icm.safetensors").unlink(),
    "no tokenizer": lambda folder: (folder / "tokenizer.json").unlink(),
    "cut manifest": lambda folder: (folder / "retrv" / "manifest.json").write_text("{"),
    "no object": lambda folder: (folder / "retrv" / "manifest.json").write_text("[]"),
    "another module": lambda folder: edit_manifest(folder, icm={"breadth": 7}),
}


def edit_manifest(folder, **changes):
    file = folder / "retrv" / "manifest.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


@pytest.mark.parametrize("name", BREAK)
def test_incomplete_checkpoints_are_named(saved, tmp_path, name):
    folder = tmp_path / "broken"
    shutil.copytree(saved, folder)
    BREAK[name](folder)
    with pytest.raises(CheckpointError, match=r"checkpoint .*broken: expected a complete one, got .*Copy or export it"):
        load_checkpoint(folder)


def test_an_embedder_that_is_gone_is_named(saved, tmp_path):
    folder = tmp_path / "broken"
    shutil.copytree(saved, folder)
    edit_manifest(folder, embedder_dim=8)
    shutil.rmtree(folder / "retrv" / "embedder", ignore_errors=True)
    with pytest.raises(CheckpointError, match="expected a complete one"):
        BackboneEmbedder.from_pretrained(folder)


def test_the_embedder_has_a_digest_of_its_own(checkpoint, saved, tmp_path):
    first = BackboneEmbedder.from_pretrained(saved).digest
    assert first
    other = build_model(checkpoint.processor.tokenizer, BackboneSize(hidden=64, layers=1, heads=2, kv_heads=1,
                        tower_hidden=32, tower_depth=1), IcmConfig(16, 2, 4), seed=4)  # fmt: skip
    manifest = replace(checkpoint.manifest, embedder_dim=8)
    made = save_checkpoint(tmp_path, checkpoint.model, checkpoint.processor, manifest, embedder=other)
    assert made.embedder_digest not in ("", first)
    without = save_checkpoint(tmp_path, checkpoint.model, checkpoint.processor, manifest)
    assert without.embedder_digest == ""
    assert made.memory_digest == without.memory_digest == read_manifest(tmp_path).memory_digest


def test_a_query_far_beyond_the_context_is_named(saved):
    with pytest.raises(InputError, match=r"text to embed: expected at most 4,096 tokens, got 5,\d+. Shorten it"):
        BackboneEmbedder.from_pretrained(saved).embed([Query.of("red " * 5000)])
