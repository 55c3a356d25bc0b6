"""`base`, `embedder` and `align` on any M-BEIR folder: right gradients, bounded batches, resumable, frozen things stay frozen."""

from __future__ import annotations

import copy
import json
import re
import shutil

import pytest
import torch
from retrv_r1_training import train_embedder
from retrv_r1_training.cli import main
from retrv_r1_training.data import Item
from retrv_r1_training.data_config import DataConfig, Part
from retrv_r1_training.draws import Contrasted, Contrasts, Draws, Opened, Unusable

from retrv_r1_retriever.errors import ImageError, InputError
from retrv_r1_retriever.model.checkpoint import load_checkpoint, load_embedder_checkpoint, read_manifest
from retrv_r1_retriever.model.embedding import embed_chunks, embedding_chunk
from retrv_r1_retriever.types import Query
from tests.tiny import contents
from tests.training.parts import stage_part as part

SCALE = "model.icm.tag_scale"
LM = "model.language_model.layers.0.self_attn.q_proj.weight"


def stage(name, recipe, run, *sets):
    overrides = [part for text in sets for part in ("--set", text)]
    return main([name, str(recipe), "--run", str(run), "--threads", "1", *overrides])


def logged(run, key="loss"):
    rows = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    return [row[key] for row in rows if key in row]


@pytest.fixture(scope="session", params=["embedder", "align", "base"])
def done(request, recipes, tmp_path_factory):
    """Each stage's finished run of four steps, with states after the second and the fourth."""
    run = tmp_path_factory.mktemp(request.param) / "run"
    assert stage(request.param, recipes / f"{request.param}.yaml", run) == 0
    return request.param, run


def test_a_run_leaves_logs_figures_and_a_checkpoint_that_loads(done):
    name, run = done
    assert len(logged(run)) == 4
    assert len(set(logged(run))) == 4
    figures = {"embedder": "eval_recall@5", "align": "eval_relation", "base": "eval_words"}
    assert len(logged(run, figures[name])) == 2
    assert {json.loads(line)["stage"] for line in (run / "log.jsonl").read_text().splitlines()} == {name}
    assert list(run.rglob("events.out.tfevents.*"))
    load_checkpoint(run / "checkpoint", device="cpu")


def test_a_resumed_run_is_the_uninterrupted_one(done, recipes, tmp_path):
    name, whole = done
    run = tmp_path / "run"
    shutil.copytree(whole, run)
    shutil.rmtree(run / "checkpoint-4")
    shutil.rmtree(run / "checkpoint")
    assert stage(name, recipes / f"{name}.yaml", run) == 0
    assert logged(run) == logged(whole)
    assert len(logged(run)) == 4
    digests = [read_manifest(folder / "checkpoint") for folder in (run, whole)]
    assert digests[0] == digests[1]


def test_the_embedder_leaves_model_and_memory_as_they_were(material, recipes, tmp_path):
    assert (
        stage("embedder", recipes / "embedder.yaml", tmp_path / "run", "optim.steps=1", "data.validation_queries=0")
        == 0
    )
    before, after = (read_manifest(f) for f in (material / "start", tmp_path / "run" / "checkpoint"))
    assert after.checkpoint_digest == before.checkpoint_digest
    assert after.memory_digest == before.memory_digest
    assert after.embedder_dim == 8
    old = load_checkpoint(material / "start", device="cpu").model.state_dict()
    new = load_embedder_checkpoint(tmp_path / "run" / "checkpoint", device="cpu").model.state_dict()
    moved = {name for name in old if ".icm." not in name and not torch.equal(old[name], new[name])}
    assert LM in moved
    assert all(".language_model.layers." in name for name in moved)


@pytest.mark.parametrize("done", ["align"], indirect=True)
def test_align_moves_the_module_alone(material, done):
    _, run = done
    before, after = (read_manifest(f) for f in (material / "start", run / "checkpoint"))
    assert after.memory_digest != before.memory_digest
    assert after.embedder_digest == before.embedder_digest
    old, new = (load_checkpoint(f, device="cpu").model.state_dict() for f in (material / "start", run / "checkpoint"))
    moved = {name for name in old if not torch.equal(old[name], new[name])}
    assert {"model.icm.in_proj.1.weight", "model.icm.content_out.proj.weight", "model.icm.att2.q.weight"} <= moved
    assert all(".icm." in name for name in moved)
    assert SCALE in moved, "chosen, not trained: the label tag is to be as long as the two tokens"


@pytest.mark.parametrize("workers", [0, 1])
def test_rows_passed_over_are_counted_whoever_reads_ahead(material, recipes, tmp_path, caplog, workers):
    root = tmp_path / "data"
    shutil.copytree(material / "catalogue", root)
    own = part("train0", "t2i")
    file = root / own["queries"]
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    alone = [{**row, "pos_cand_list": []} if n % 2 else row for n, row in enumerate(rows)]
    file.write_text("".join(json.dumps(row) + "\n" for row in alone))
    caplog.set_level("INFO")
    train = f"data.train=[{{queries: {own['queries']}, pool: {own['pool']}}}]"
    sets = [f"data.root={root}", train, f"data.workers={workers}", "optim.steps=2", "data.validation_queries=0"]
    assert stage("align", recipes / "align.yaml", tmp_path / "run", *sets) == 0
    assert re.search(r"skipped \d+ x a query without a positive in the pool", caplog.text)


def test_a_broken_picture_leaves_the_pool_that_the_embedder_is_measured_in(material, recipes, tmp_path, caplog):
    root = tmp_path / "data"
    shutil.copytree(material / "catalogue", root)
    for picture in sorted((root / "mbeir_images" / "val").glob("card*"))[::4]:
        picture.write_bytes(picture.read_bytes()[:60])
    sets = [f"data.root={root}", "pool=100", "optim.steps=1", "data.max_bad_share=0.9"]
    assert stage("embedder", recipes / "embedder.yaml", tmp_path / "run", *sets) == 0
    assert "validation: left out of the pool: image" in caplog.text
    assert logged(tmp_path / "run", "eval_recall@1")


# -- embedder ----------------------------------------------------------------------------------------------------------


def contrasted(count, width=2):
    """Queries with candidates of mixed kinds and lengths; the positives of 0 and 1 are right for query 2 too."""
    kinds = ("text", "image", "image,text")
    items = [Item(f"1:{n}", kinds[n % 3], c, "") for n, c in enumerate(contents(count * width))]
    rows = [items[n * width : (n + 1) * width] for n in range(count)]
    more = {2: {rows[0][0].id, rows[1][0].id}}
    return [
        Contrasted(Query.of(f"which card {n}"), tuple(row), frozenset({row[0].id, *more.get(n, ())}))
        for n, row in enumerate(rows)
    ]


@pytest.mark.parametrize("at_once", [1, 3, 100])
def test_cached_gradients_are_those_of_one_large_batch(checkpoint, monkeypatch, at_once):
    model, processor = checkpoint.model, checkpoint.processor
    examples, seen = contrasted(5), []
    right, allowed = train_embedder.competition(examples, True, torch.device("cpu"))

    def gradients(embed):
        model.zero_grad()
        chunks = [embedding_chunk(processor, e.query) for e in examples]
        chunks += [embedding_chunk(processor, i.content) for e in examples for i in e.items]
        vectors = embed(chunks)
        loss, _ = train_embedder.info_nce(vectors[:5], vectors[5:], right, allowed, 10)
        loss.backward()
        return loss.item(), {n: p.grad.clone() for n, p in model.model.language_model.named_parameters()}

    def counting(model, processor, chunks, dim):
        seen.append(len(chunks))
        return embed_chunks(model, processor, chunks, dim)

    want, large = gradients(lambda chunks: embed_chunks(model.model, processor, chunks, 8))
    monkeypatch.setattr(train_embedder, "embed_chunks", counting)
    got, cached = gradients(lambda chunks: train_embedder.embed_in_parts(model.model, processor, chunks, 8, at_once))
    model.zero_grad()
    assert got == pytest.approx(want, rel=1e-5)
    assert max(seen) == min(at_once, 15)
    assert sum(seen) == 2 * 15, "each part is read again for its gradient"
    for name, gradient in large.items():
        torch.testing.assert_close(cached[name], gradient, atol=1e-6, rtol=1e-4)


def test_right_answers_and_other_modalities_do_not_compete():
    examples = contrasted(4)
    right, allowed = train_embedder.competition(examples, True, torch.device("cpu"))
    assert right.tolist() == [0, 2, 4, 6]
    assert (~allowed).nonzero().tolist() == [[2, 0], [2, 2]], "right for query 2 as well"
    _, narrow = train_embedder.competition(examples, False, torch.device("cpu"))
    kinds = [item.modality for e in examples for item in e.items]
    for n, row in enumerate(narrow.tolist()):
        assert {kinds[m] for m, free in enumerate(row) if free} == {examples[n].items[0].modality}
        assert row[right[n]]


def test_recall_counts_any_right_answer_of_the_modality():
    examples = contrasted(3)
    ids, kinds = [f"1:{n}" for n in range(6)], ["text"] * 6
    scores = torch.tensor([[9.0, 8, 7, 6, 5, 4], [9, 8, 7, 6, 5, 4], [9, 8, 7, 6, 5, 4]]).numpy()
    examples = [
        Contrasted(e.query, (Item("x", "text", i.content, ""),), e.right) for e in examples for i in e.items[:1]
    ]
    figures = train_embedder.recall(examples, scores, ids, kinds)
    assert figures["recall@1"] == pytest.approx(2 / 3), "query 2 has the positives of 0 and 1 too"
    assert figures["recall@5"] == 1


# -- align -------------------------------------------------------------------------------------------------------------


def test_without_captions_the_target_is_what_the_model_says_of_the_full_tokens(checkpoint, tmp_path, monkeypatch):
    """Greedy, by a plain forward pass over prompt and words; said once, then read from disk."""
    from retrv_r1_training.align import Frame
    from retrv_r1_training.describe import Descriptions
    from retrv_r1_training.loss import hidden_states

    from retrv_r1_retriever.prompt import Prompt
    from retrv_r1_retriever.trace import Full

    frame, file = Frame(before="Query: ", after=" which"), tmp_path / "said.sqlite"
    items = [Item(f"1:{n}", "", c, "a caption" if n == 1 else "") for n, c in enumerate(contents(3))]
    said = Descriptions(checkpoint, frame, 5, file).of([*items, items[0]])
    assert said[1].text == " a caption"
    assert said[0] == said[3]
    for item, words in ((items[0], said[0]), (items[2], said[2])):
        prompt = Prompt(Query(item.content), (), ())
        chunk = checkpoint.processor.chunk([*frame.around((Full(0, item.content, cue=False),)), words], prompt)
        with torch.no_grad():
            hidden, batch = hidden_states(checkpoint.model, checkpoint.processor, [chunk])
            best = checkpoint.model.lm_head(hidden)[0].argmax(-1)
        at = batch.sampled[0].nonzero()[:, 0]
        assert 1 <= len(at) <= 5
        assert best[at - 1].tolist() == batch.input_ids[0, at].tolist() == list(words.token_ids)
    monkeypatch.setattr(Descriptions, "_say", lambda *a: pytest.fail("said again"))
    assert Descriptions(checkpoint, frame, 5, file).of(items) == said[:3]


def test_captions_of_any_length_make_one_loss_however_a_batch_is_cut(checkpoint, tmp_path):
    """A mean over the tokens of each micro-batch would not."""
    from retrv_r1_training.align import Frame
    from retrv_r1_training.base import caption_chunk, caption_loss
    from retrv_r1_training.describe import Descriptions
    from retrv_r1_training.train_align import AlignModel, Objective

    processor, model = checkpoint.processor, AlignModel.of(copy.deepcopy(checkpoint.model))
    model.reading = torch.nn.Linear(model.config.text_config.hidden_size, 1)
    captions = ["red", "two blue circles on stripes in a frame of dots"]
    pictures = contents(3)
    lists = [Contrasted(Query(pictures[0]), tuple(Item(f"1:{n}", "", c, words) for n, c in enumerate(pictures[1:])), frozenset(), (0, 1))
             for words in captions]  # fmt: skip
    align = Objective(processor, Descriptions(checkpoint, Frame(), 5, tmp_path / "said"), Frame(), 0)
    chunks = [caption_chunk(processor, pictures[0], words) for words in captions]
    with torch.no_grad():
        for loss, rows in (
            (lambda part: align(model, part)[0], lists),
            (lambda part: caption_loss(model, processor, part)[0], chunks),
        ):
            whole, parts = loss(rows).item(), [loss([row]).item() for row in rows]
            assert abs(parts[0] - parts[1]) > 0.01
            assert whole == pytest.approx(sum(parts) / 2, rel=1e-5)


# -- data --------------------------------------------------------------------------------------------------------------


def test_every_row_is_drawn_once_before_any_comes_again():
    draws = Draws([3, 0, 4], lambda file, row, rng: (file, row, rng.random()), 14, 0)
    rows = [draws[n][:2] for n in range(14)]
    everything = [(0, n) for n in range(3)] + [(2, n) for n in range(4)]
    assert sorted(rows[:7]) == sorted(rows[7:]) == everything
    assert rows[:7] != rows[7:]
    assert draws[3] == Draws([3, 0, 4], lambda file, row, rng: (file, row, rng.random()), 14, 0)[3]


def test_unusable_rows_are_counted_and_replaced_and_unreadable_ones_have_a_limit():
    def make(file, row, rng):
        if row % 2:
            raise Unusable("odd")
        return row

    draws = Draws([10], make, 30, 0)
    assert all(draws[n] % 2 == 0 for n in range(30))
    assert draws.skipped["odd"] > 5

    def broken(file, row, rng):
        if row < 40:
            raise ImageError("image 3.png: expected a picture, got none. Fix it.")
        return row

    with pytest.raises(InputError, match=r"pictures: expected at most 1% unreadable ones, got 21 of .*image 3.png"):
        list(map(Draws([50], broken, 100, 0).__getitem__, range(100)))
    assert min(map(Draws([160], broken, 160, 0, max_bad_share=0.5).__getitem__, range(160))) == 40
    with pytest.raises(InputError, match="data: expected rows that can be used, got 5 x never"):
        Draws([5], lambda *a: (_ for _ in ()).throw(Unusable("never")), 1, 0)[0]


def test_rows_to_measure_on_come_once_and_nothing_stands_in_for_an_unreadable_one(caplog):
    def make(file, row, rng):
        if row == 3:
            raise ImageError("image 3.png: expected a picture, got none. Fix it.")
        if row % 2 == 0:
            raise Unusable("even")
        return row

    caplog.set_level("INFO")
    draws = Draws([10], make, 30, 0)
    measured = draws.readable(0.2)
    assert sorted(measured[n] for n in range(len(measured))) == [1, 5, 7, 9]
    assert "validation: 4 examples are measured, 1 cannot be read" in caplog.text
    order = [row for row in draws._shuffled(0, 10) if row % 2]
    assert len(Draws([10], make, 3, 0).readable(1.0)) == 3 - (3 in order[:3]), "not even by one further on"
    with pytest.raises(InputError, match=r"pictures: expected at most 5% unreadable ones, got 1 of 10, last: image 3"):
        draws.readable(0.05)
    with pytest.raises(InputError, match="expected rows that can be used, got 1 x unreadable"):
        Draws([1], lambda *a: make(0, 3, None), 1, 0).readable(1.0)


def test_lists_hold_hard_negatives_first_and_no_right_answer_twice(material, recipes):
    folder = material / "catalogue"
    own = {**part("train0", "t2i"), "lists": str(folder / "mbeir_cards_t2i_train0_run.txt")}
    data = DataConfig(str(folder), (Part(**own),), validation_queries=0)
    sources = Opened(data).train
    drawn = Contrasts(sources, negatives=4, hard=2, depth=5, described=2).draws(20, 0)
    top = set(sources[0].run.ranked(drawn[0].query.id)[:5])
    for n in range(20):
        example = drawn[n]
        ids = [item.id for item in example.items]
        assert len(set(ids)) == 5
        assert ids[0] in example.right
        assert not set(ids[1:]) & example.right
        assert len(set(ids[1:3]) & top) == 2
        assert set(example.described) < set(range(5))
    missing = Contrasts(sources, negatives=500, hard=0, depth=5).draws(1, 0)
    with pytest.raises(InputError, match="a pool with fewer than 500 wrong candidates"):
        missing[0]


# -- runs --------------------------------------------------------------------------------------------------------------


def test_a_loss_that_is_not_finite_stops_with_a_saved_state(recipes, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(train_embedder, "info_nce", lambda q, *a: (q.sum() * float("nan"), torch.ones(1)))
    assert stage("embedder", recipes / "embedder.yaml", tmp_path / "run") == 1
    assert "embedder: loss at step 0, examples [0, 1, 2, 3]: expected a finite number" in capsys.readouterr().err
    assert (tmp_path / "run" / "stopped" / "checkpoint-0" / "trained.safetensors").exists()


@pytest.mark.parametrize(
    ("name", "sets", "message"),
    [
        ("embedder", ["temperature=0"], "temperature: expected a number above 0, got 0"),
        ("embedder", ["data.train=[{queries: q, pool: p}]"], "lists of q: expected a TREC run, got none"),
        ("embedder", ["run.deepspeed=zero3"], "run.deepspeed: expected null or zero2, got zero3"),
        ("base", ["run.deepspeed=zero2"], "run.deepspeed: expected null, got zero2"),
        ("align", ["described=9"], "described: expected 1 to data.top_k"),
        ("align", ["data.train=[{queries: q, pole: p}]"], "got pole"),
        ("align", ["data.train=7"], "data: train: expected tuple"),
        ("base", ["data.train=[]"], "data.train: expected at least one part"),
    ],
)
def test_a_recipe_that_cannot_run_says_why(recipes, tmp_path, capsys, name, sets, message):
    assert stage(name, recipes / f"{name}.yaml", tmp_path / "run", *sets) == 1
    assert message in capsys.readouterr().err
