"""The compression module: the paper's formulas, the stored memory, both presets."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

from retrv_r1_retriever.engines.local import LocalEngine
from retrv_r1_retriever.model.checkpoint import from_backbone
from retrv_r1_retriever.model.configuration import IcmConfig, RetrvR1Config
from retrv_r1_retriever.model.embedding import encode_pictures
from retrv_r1_retriever.model.icm import Icm, pool
from retrv_r1_retriever.model.modeling import RetrvR1ForConditionalGeneration
from retrv_r1_retriever.model.processing import collate
from retrv_r1_retriever.prompt import ADDED_TOKENS
from retrv_r1_retriever.types import Query
from tests.tiny import contents, make_prompt


def test_index_time_memory_is_memory_on_the_fly(checkpoint):
    """compress() == in_proj(T_c) + P pooled, with T_c taken from the prompt's own embedding path."""
    items = contents(6)
    model, processor = checkpoint.model.model, checkpoint.processor
    for item, row in zip(items, LocalEngine(checkpoint).compress(items), strict=True):
        batch = collate([processor.content_chunk(item)], processor)
        with torch.inference_mode():
            features = encode_pictures(model, processor, batch.pictures)
            embeds = model.embed(batch.input_ids, features, batch.image_mask, None)[0]
            want = model.icm.memories([embeds])[0].half().numpy()
        np.testing.assert_allclose(row.rows, want, atol=2e-3)
        assert row.rows.shape == (min(8, len(embeds)), 32)
        assert row.full_tokens > len(embeds)


def test_relation_token_depends_on_the_query_and_content_token_does_not(checkpoint):
    engine = LocalEngine(checkpoint)
    model, processor = checkpoint.model.model, checkpoint.processor
    outs = []
    for text in ("red two", "which card is plain"):
        prompt = make_prompt(engine, Query.of(text), 3)
        batch = collate([processor.chunk(prompt.segments, prompt)], processor)
        with torch.inference_mode():
            embeds = model.embed(batch.input_ids, None, None, batch.compressed)[0]
        outs.append((embeds[batch.compressed.content_at], embeds[batch.compressed.relation_at]))
    torch.testing.assert_close(outs[0][0], outs[1][0])
    assert (outs[0][1] - outs[1][1]).abs().max() > 1e-3


def test_masked_rows_do_not_matter():
    icm = Icm(IcmConfig(32, 4, 8), 64).eval()
    memory, query = torch.randn(2, 5, 32), torch.randn(1, 4, 32)
    mask, query_mask = torch.ones(2, 5, dtype=torch.bool), torch.ones(1, 4, dtype=torch.bool)
    mask[0, 3:] = False
    row = torch.zeros(2, dtype=torch.long)
    one = icm(memory, mask, query, query_mask, row)
    memory[0, 3:] = 99.0
    two = icm(memory, mask, query, query_mask, row)
    for a, b in zip(one, two, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize(("width", "rows", "count"), [(48, 16, 20), (128, 64, 127)])
def test_folded_attention_is_the_plain_one(width, rows, count):
    torch.manual_seed(0)
    attention = Icm(IcmConfig(width, 4, rows), 64).att1
    for layer in (attention.q, attention.k, attention.v, attention.out):
        torch.nn.init.normal_(layer.bias)
    shared, keys = torch.randn(width), torch.randn(count, rows, width)
    mask = torch.arange(rows) < torch.randint(1, rows + 1, (count, 1))
    plain = attention(shared.expand(count, 1, -1), keys, mask, torch.arange(count))[:, 0]
    torch.testing.assert_close(attention.pooled(shared, keys, mask), plain, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("width", "rows", "count", "asked"), [(48, 16, 20, 9), (128, 64, 50, 28), (128, 64, 50, 90)])
def test_folding_over_one_query_is_the_plain_attention(width, rows, count, asked):
    """Few keys, for which folding pays, and many, for which it does not."""
    torch.manual_seed(0)
    icm = Icm(IcmConfig(width, 4, rows), 64).eval()
    for layer in (icm.att2.q, icm.att2.k, icm.att2.v, icm.att2.out):
        torch.nn.init.normal_(layer.bias)
    memory, query = torch.randn(count, rows, width), torch.randn(asked, width)
    mask = torch.arange(rows) < torch.randint(1, rows + 1, (count, 1))
    every, row = torch.ones(1, asked, dtype=torch.bool), torch.zeros(count, dtype=torch.long)
    plain = icm.att2(memory, query[None], every, row)
    torch.testing.assert_close(icm.att2.shared(memory, query), plain, atol=1e-5, rtol=1e-5)
    for folded, token in zip(
        icm.of_one_query(memory, mask, query), icm(memory, mask, query[None], every, row), strict=True
    ):
        torch.testing.assert_close(folded, token, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("n", "rows"), [(3, 8), (8, 8), (9, 8), (64, 8), (13, 4)])
def test_pool_is_means_of_equal_chunks(n, rows):
    x = torch.randn(n, 5)
    got = pool(x, rows)
    if n <= rows:
        torch.testing.assert_close(got, x)
        return
    bounds = [-(-n * k // rows) for k in range(rows + 1)]
    want = torch.stack([x[a:b].mean(0) for a, b in itertools.pairwise(bounds)])
    torch.testing.assert_close(got, want)
    sizes = [b - a for a, b in itertools.pairwise(bounds)]
    assert max(sizes) - min(sizes) <= 1


def test_paper_preset_keeps_every_row():
    config = IcmConfig.paper(64)
    assert Icm(config, 64).memories([torch.randn(100, 64)])[0].shape == (100, 64)


@pytest.mark.parametrize(("name", "vocab", "layers", "hidden", "heads", "kv", "inter", "tied", "billions"), [
    ("3B", 151936, 36, 2048, 16, 2, 11008, True, 3.75), ("7B", 152064, 28, 3584, 28, 4, 18944, False, 8.29),
])  # fmt: skip
def test_real_sizes_construct_and_have_spare_rows(
    name, vocab, layers, hidden, heads, kv, inter, tied, billions, capsys
):
    """Published shapes of Qwen2.5-VL on the meta device: parameters, and room for our 136 tokens beyond the 151,665 used."""
    config = RetrvR1Config(
        text_config={
            "vocab_size": vocab, "num_hidden_layers": layers, "hidden_size": hidden, "num_attention_heads": heads,
            "num_key_value_heads": kv, "intermediate_size": inter, "tie_word_embeddings": tied,
            "rope_parameters": {"rope_type": "default", "mrope_section": [16, 24, 24], "rope_theta": 1e6},
        },
        vision_config={"depth": 32, "hidden_size": 1280, "out_hidden_size": hidden, "intermediate_size": 3420},
        tie_word_embeddings=tied,
    )  # fmt: skip
    with torch.device("meta"):
        model = RetrvR1ForConditionalGeneration(config)
    parameters = {id(p): p for p in model.parameters()}.values()
    count = sum(p.numel() for p in parameters) - (vocab * hidden if tied and not _is_tied(model) else 0)
    icm = sum(p.numel() for p in model.model.icm.parameters())
    spare = vocab - 151_665
    with capsys.disabled():
        print(f"\nQwen2.5-VL-{name}: {count / 1e9:.2f} B parameters, ICM {icm / 1e6:.2f} M, spare rows {spare}")
    assert count / 1e9 == pytest.approx(billions, abs=0.02)
    assert spare >= len(ADDED_TOKENS) == 136


def _is_tied(model) -> bool:
    return model.lm_head.weight is model.get_input_embeddings().weight


def test_from_backbone_moves_a_stock_model():
    tiny = Qwen2_5_VLConfig(
        text_config={"vocab_size": 300, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1,
                     "num_attention_heads": 2, "num_key_value_heads": 1,
                     "rope_parameters": {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 1e4}},
        vision_config={"depth": 1, "hidden_size": 32, "num_heads": 2, "intermediate_size": 32, "out_hidden_size": 32},
        tie_word_embeddings=True,
    )  # fmt: skip
    stock = Qwen2_5_VLForConditionalGeneration(tiny).eval()
    ids = torch.arange(10)[None]
    want = stock(ids).logits
    model = from_backbone(stock, IcmConfig(16, 2, 4))
    assert model.model.language_model is stock.model.language_model
    torch.testing.assert_close(model(ids).logits, want)
    assert not any(p.is_meta for p in model.parameters())
