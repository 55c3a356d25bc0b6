"""What a client sends is what the whole model would have read, and it loads no more of the checkpoint than that takes."""

from __future__ import annotations

import base64
import io
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from retrv_r1_retriever.engines.local import LocalEngine
from retrv_r1_retriever.engines.vllm.server import as_json
from retrv_r1_retriever.errors import CheckpointError
from retrv_r1_retriever.model.checkpoint import load_checkpoint
from retrv_r1_retriever.model.embedding import encode_pictures
from retrv_r1_retriever.model.processing import Chunk, collate
from retrv_r1_retriever.model.wire import RowsPart, TextPart, Wire, _saved, text_tail
from retrv_r1_retriever.trace import Forced, Full
from retrv_r1_retriever.types import Content, Query
from tests.tiny import contents, make_prompt, picture
from tests.vllm.stub import received

QUERIES = [Query.of("which card", instruction="find it"), Query.of(image=picture(99)), Query.of("red two", picture(98))]


@pytest.fixture
def wire(folder: Path) -> Wire:
    return Wire.from_pretrained(folder)


@pytest.fixture(scope="module")
def local(folder: Path) -> LocalEngine:
    return LocalEngine(load_checkpoint(folder, device="cpu"))


@pytest.mark.parametrize("query", QUERIES, ids=["text", "image", "both"])
def test_a_server_receives_what_the_whole_model_reads(wire: Wire, local: LocalEngine, query: Query) -> None:
    prompt = make_prompt(local, query, 5)
    opened = [Forced("<think>"), Full(2, prompt.candidates[2].document.content)]
    first = wire.processor.chunk(prompt.segments, prompt)
    second = wire.processor.chunk(opened, prompt, first.next_position)
    parts = wire.parts(first)
    parts += wire.parts(second, text_tail(parts))
    ids, rows, pictures = received([json.loads(as_json(part)) for part in parts], wire.processor)

    whole = Chunk.join([first, second])
    batch = collate([whole], wire.processor)
    model = local._model.model
    with torch.inference_mode():
        features = encode_pictures(model, wire.processor, batch.pictures)
        embeds = model.embed(batch.input_ids, features, batch.image_mask, batch.compressed)[0]
    assert len(ids) == len(whole)
    assert len(rows) >= 10
    for place, row in rows.items():
        assert torch.allclose(row, embeds[place], atol=1e-5)
    assert [b for a, b in zip(ids, whole.ids.tolist(), strict=True) if a != -1] == [a for a in ids if a != -1]
    assert [p.tobytes() for p in pictures] == [p.tobytes() for p in whole.pictures]
    assert wire.holds_tower is (query.content.image is not None)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bytes_are_a_saved_tensor_of_the_very_rows(dtype: torch.dtype) -> None:
    """Written without `torch.save`, read by `torch.load` as vLLM reads: on weights only, from any place in a larger tensor."""
    rows = torch.randn(7, 2, 24).to(dtype)
    for one in (rows[3], rows[:, 1]):
        again = torch.load(io.BytesIO(base64.b64decode(_saved(one), validate=True)), weights_only=True)
        assert again.dtype == dtype
        assert torch.equal(again, one)


def test_text_queries_need_no_weight_of_the_backbone(folder: Path, tmp_path: Path, local: LocalEngine) -> None:
    bare = tmp_path / "bare"
    shutil.copytree(folder, bare)
    weights = load_file(bare / "model.safetensors")
    (bare / "model.safetensors").unlink()
    save_file({n: w for n, w in weights.items() if "embed_tokens" in n}, bare / "rows.safetensors")
    wire = Wire.from_pretrained(bare)
    prompt = make_prompt(local, QUERIES[0], 5)
    assert len(wire.parts(wire.processor.chunk(prompt.segments, prompt))) > 5
    texts = [Content("two red circles"), Content("which card")]
    for a, b in zip(wire.compress(texts), local.compress(texts), strict=True):
        assert np.array_equal(a.rows, b.rows)
    assert not any("language_model" in name for name, _ in wire._model.named_parameters())
    with pytest.raises(CheckpointError, match=r"expected a complete one, got KeyError: 'visual\.'"):
        wire.compress([Content(image=picture(1))])


def test_memory_is_the_local_engines(wire: Wire, local: LocalEngine) -> None:
    for a, b in zip(wire.compress(contents(6)), local.compress(contents(6)), strict=True):
        assert np.array_equal(a.rows, b.rows)
        assert (a.full_tokens, a.cut_tokens) == (b.full_tokens, b.cut_tokens)


def test_ids_that_text_cannot_say_go_as_rows(wire: Wire) -> None:
    tokenizer = wire.processor.tokenizer
    whole = wire.processor.tokenise("which")
    letters = [i for letter in "which" for i in wire.processor.tokenise(letter)]
    assert letters != whole
    assert [type(p) for p in wire.parts(Chunk.plain(whole, 0))] == [TextPart]
    assert [type(p) for p in wire.parts(Chunk.plain(letters, 0))] == [RowsPart]
    # alone "ch" is text; behind "whi" a server would read "which"
    head, tail = wire.processor.tokenise("whi"), wire.processor.tokenise("ch")
    joined = tokenizer("which", add_special_tokens=False)["input_ids"]
    assert joined != [*head, *tail]
    first = wire.parts(Chunk.plain(head, 0))
    assert [type(p) for p in wire.parts(Chunk.plain(tail, 3), text_tail(first))] == [RowsPart]
    assert [type(p) for p in wire.parts(Chunk.plain(tail, 3))] == [TextPart]
    reserved = wire.processor.tokenise("a <prompt_embeds> b")
    assert [type(p) for p in wire.parts(Chunk.plain(reserved, 0))] == [RowsPart]
